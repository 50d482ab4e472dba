"""rl_ppo.py on several ranks, at every ZeRO stage, killed, copied away, and its demo. pytest -m slow."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import (ROOT, clf_flags, copy_script, distance, finish, in_process, launch, ppo_flags, rows, run_again, run_and_kill, run_several, start,
                      weights, write_ppo_mount)
from test_ppo_runs import SPLITS, assert_close, assert_same_ppo_run, critic, replies, told

import rl_ppo

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]
TASKS = {"llama": {"entropy_coef": 0.01}, "t5": {"policy": "t5", "reward_fn": None, "reward_model": "clf-tiny", "critic": "reward_model"},
         "lora": {"policy": "chat", "lora_rank": 4, "num_layers_unfrozen": None, "reward_fn": None, "reward_model": "clf-llama"},
         "grpo": {"policy": "chat", "advantage": "grpo", "n_samples": 2}, "top": {"policy": "t5", "num_layers_unfrozen": 1}}
GRID = [("llama", 0, "2x4", None), ("llama", 1, "8x1", "partitioned"), ("llama", 2, "4x2", "offloaded"), ("llama", 3, "8x1", None),
        ("llama", 3, "2x4", "replicated"),
        ("t5", 0, "2x4", None), ("t5", 2, "8x1", None), ("t5", 3, "8x1", None), ("lora", 1, "8x1", None), ("lora", 3, "4x2", None),
        ("grpo", 3, "2x4", None), ("top", 2, "8x1", None), ("top", 3, "4x2", None)]
LENGTHS = {"unlike": {"max_new_tokens": 12, "rollout_batch_size": 2, "eval_batch_size": 2, "n_eval": 4, "max_steps": 3},
           "few": {"num_rollouts": 4, "train_batch_size": 4, "max_steps": 2}}
WAITING = [("unlike", "llama", "synced"), ("unlike", "t5", "synced"), ("unlike", "lora", "gathered"), ("few", "llama", "gathered"), ("few", "t5", "synced")]


def task_flags(mount, run, task, split="8x1", **changes):
    """20 replies a rollout: the last step has 4, for up to 8 pieces. The learning rate is small because AdamW turns rounding in gradients
    near 0 into whole steps."""
    batch, accumulation = SPLITS[split]
    return ppo_flags(mount, run, **{"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "num_rollouts": 20, "max_steps": 6,
                                    "learning_rate": 0.0001, **TASKS[task], **changes})


def resume_flags(mount, run):
    return ppo_flags(mount, run, reward_scaling="norm", ds_config="zero3", ppo_epochs=2, max_steps=32, save_steps=8, eval_steps=16, kl_horizon=50)


def moved_flags(mount, run, stage, **changes):
    return ppo_flags(mount, run, lr_scheduler_type="constant", weight_decay=0.3, learning_rate=0.0001, ds_config=f"zero{stage}", **changes)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A mount with reward models, on which two ranks have run everything that the tests below compare with one rank."""
    mount, before = write_ppo_mount(tmp_path_factory.mktemp("grid")), dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        for name in ("llama", "tiny"):
            assert in_process("clf", patch)(clf_flags(mount, f"clf-{name}", data="pairs", model_init_name=name, loss="pairwise")) == 0
    os.environ.clear()
    os.environ.update(before)
    jobs = [(None, task_flags(mount, f"2-{task}-{stage}-{split}-{frozen}", task, split, ds_config=f"zero{stage}", frozen_models=frozen))
            for task, stage, split, frozen in GRID]
    jobs += [(None, task_flags(mount, f"2-{kind}-{task}-{how}", task, ds_config="zero3", zero3_generation=how, **LENGTHS[kind]))
             for kind, task, how in WAITING]
    jobs += [(None, moved_flags(mount, f"moved{stage}", stage, max_steps=4)) for stage in (1, 3)]
    jobs += [(None, resume_flags(mount, "straight")), (2, resume_flags(mount, "stopped")), (None, resume_flags(mount, "stopped"))]
    run_several(mount, "rl_ppo", [(stop, {}, words) for stop, words in jobs], 2)
    return mount


@pytest.fixture
def reference(grid, run_ppo):
    """reference(task) -> the run folder of one rank, stage 0, without accumulation."""
    def reference(task, name="reference", **changes):
        run = grid / "models" / f"{name}-{task}"
        assert run.exists() or run_ppo(task_flags(grid, run.name, task, **changes)) == 0
        return run
    return reference


def assert_same_mathematics(run, expected):
    """Another layout: the same replies, and every number within 1e-6."""
    assert_close(told(run), told(expected))
    assert_close(told(run, "eval"), told(expected, "eval"))
    last = rows(expected)[-1]["step"]
    assert replies(run, last) == replies(expected, last)
    assert distance(weights(expected), weights(run)) < 1e-6 and (run / "critic").exists() == (expected / "critic").exists()
    assert not (run / "critic").exists() or distance(critic(expected), critic(run)) < 1e-6


@pytest.mark.parametrize("task, stage, split, frozen", GRID)
def test_two_ranks_in_any_stage_and_split_give_the_replies_numbers_and_weights_of_one(grid, reference, task, stage, split, frozen):
    """Frozen models whole, partitioned or offloaded; the last step of a rollout has fewer replies than pieces, so some ranks hold none."""
    assert_same_mathematics(grid / "models" / f"2-{task}-{stage}-{split}-{frozen}", reference(task))


@pytest.mark.parametrize("task, stage, split", [("llama", 3, "4x2"), ("t5", 1, "8x1"), ("lora", 2, "2x4")])
def test_one_rank_in_any_stage_gives_the_same(grid, reference, run_ppo, task, stage, split):
    assert run_ppo(task_flags(grid, f"1-{task}-{stage}-{split}", task, split, ds_config=f"zero{stage}")) == 0
    assert_same_mathematics(grid / "models" / f"1-{task}-{stage}-{split}", reference(task))


def test_a_wrong_divisor_would_be_seen(grid, reference, run_ppo, monkeypatch):
    """Negative control of the grid: replies counted instead of their tokens."""
    real = rl_ppo.micro_batches
    monkeypatch.setattr(rl_ppo, "micro_batches", lambda args, ids, *rest: (real(args, ids, *rest)[0], len(ids)))
    assert run_ppo(task_flags(grid, "mutated", "t5")) == 0
    assert abs(rows(grid / "models" / "mutated")[0]["grad_norm"] / rows(reference("t5"))[0]["grad_norm"] - 1) > 0.1


@pytest.mark.parametrize("kind, task, how", WAITING)
def test_ranks_whose_replies_end_at_other_tokens_or_that_have_none_wait_for_each_other(grid, reference, run_ppo, monkeypatch, kind, task, how):
    """E1: two replies a batch, of 1 to 12 tokens; and one batch for two ranks. The replies are those of one rank."""
    sizes, real = [], rl_ppo.all_replies
    monkeypatch.setattr(rl_ppo, "all_replies", lambda *a: (found := real(*a), sizes.extend(len(ids) for ids, _ in found))[0])
    expected = reference(task, kind, **LENGTHS[kind])
    assert_same_mathematics(grid / "models" / f"2-{kind}-{task}-{how}", expected)
    assert kind == "few" or task == "lora" or min(sizes) == 1 and max(sizes) == 12


def test_a_zero3_export_has_whole_tensors_and_plain_transformers_loads_it(grid, reference):
    for task, auto_class in (("t5", transformers.AutoModelForSeq2SeqLM), ("llama", transformers.AutoModelForCausalLM)):
        run, ids = grid / "models" / f"2-{task}-3-8x1-None", torch.tensor([[5, 6, 7, 1]])
        assert all(tensor.numel() for tensor in [*weights(run).values(), *critic(run).values()]) and weights(run).keys() == weights(reference(task)).keys()
        a, b = (auto_class.from_pretrained(folder).eval() for folder in (run, reference(task)))
        batch = {"decoder_input_ids": ids} if task == "t5" else {}
        assert torch.allclose(a(input_ids=ids, **batch).logits, b(input_ids=ids, **batch).logits, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
@pytest.mark.parametrize("policy", ["llama", "chat", "t5"])
def test_low_precision_keeps_the_identities_within_its_bounds(grid, run_ppo, precision, policy):
    """The log-ratio before the first update is checked by the run itself."""
    run = grid / "models" / f"{precision} {policy}"
    assert run_ppo(ppo_flags(grid, run.name, policy=policy, precision=precision, ds_config="zero1", max_steps=12)) == 0
    assert len(rows(run)) == 6 and abs(rows(run)[0]["ppo/kl"]) < 0.05 and rows(run)[-1]["ppo/kl"] > -1
    assert all(0 < row["ppo/sampler_gap"] < 0.05 and np.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in rows(run))
    assert policy == "llama" or distance(weights(grid / "models" / policy), weights(run)) > 1e-4


# ------------------------------------------------------------------------------------------------ stopped, killed, moved


def test_two_ranks_that_stopped_and_went_on_equal_uninterrupted_ones_to_the_bit(grid):
    assert_same_ppo_run(grid / "models" / "straight", grid / "models" / "stopped", 32, 2)
    assert "from step 8" in (grid / "models" / "stopped" / "log.txt").read_text()


def test_kill_9_then_the_same_command_equals_uninterrupted_to_the_bit(grid):
    run, command = grid / "models" / "killed", [ROOT / "rl_ppo.py", *resume_flags(grid, "killed")]
    assert run_and_kill(command, run, 2, 3)
    run_again(command, 2)
    assert_same_ppo_run(grid / "models" / "straight", run, 32, 2)


@pytest.mark.parametrize("stage", [1, 3])
def test_one_rank_continues_what_two_began(grid, run_ppo, stage):
    assert run_ppo(moved_flags(grid, f"moved{stage}", stage, max_steps=8, resume=True)) == 0
    assert run_ppo(moved_flags(grid, f"stayed{stage}", stage, max_steps=8)) == 0
    moved, stayed = grid / "models" / f"moved{stage}", grid / "models" / f"stayed{stage}"
    assert "from step 4 (written by 2 processes)" in (moved / "log.txt").read_text()
    assert_close(told(moved), told(stayed))
    assert distance(weights(stayed), weights(moved)) < 1e-6 and distance(critic(stayed), critic(moved)) < 1e-6
    assert distance(weights(stayed), weights(moved / "checkpoint-4")) > 1e-4


# ------------------------------------------------------------------------------------------------ copied, launched, the demo


def test_the_copied_script_runs_under_the_launcher(tmp_path):
    """rl_ppo.py, common_v1.py and ds_configs/ in an empty folder, called from elsewhere; model, data and reward function by path."""
    mount, home, cwd = write_ppo_mount(tmp_path / "mount"), tmp_path / "home", tmp_path / "elsewhere"
    script = copy_script("rl_ppo.py", home)
    cwd.mkdir()
    shutil.copy(mount / "reward.py", cwd / "mine.py")
    launch(["deepspeed", "--num_gpus", "2"], [script, "--policy", mount / "models" / "chat", "--data", mount / "data" / "wants.jsonl", *(
        "--reward_fn mine.py:variety --num_rollouts 16 --train_batch_size 8 --ppo_epochs 2 --max_steps 8 --eval_steps 4 --save_steps 4 --max_new_tokens 6 "
        "--learning_rate 0.001 --training_run_name run").split()], cwd)
    run = cwd / "models" / "run"
    assert [row["step"] for row in rows(run, "eval")] == [0, 4, 8] and [row["step"] for row in rows(run)] == [4, 8]
    assert {"model.safetensors", "critic", "COMPLETE", "checkpoint-8", "code", "temperature=0.00_n=1_step=8.json"} <= {p.name for p in run.iterdir()}
    assert sorted(p.name for p in (run / "code").iterdir()) == ["common_v1.py", "rl_ppo.py"]
    assert {p.name for p in home.iterdir()} - {"__pycache__"} == {"common_v1.py", "ds_configs", "rl_ppo.py"}
    assert {p.name for p in cwd.iterdir()} - {"__pycache__"} == {"mine.py", "models"}
    assert transformers.AutoModelForCausalLM.from_pretrained(run).num_parameters() and transformers.AutoTokenizer.from_pretrained(run).chat_template


def test_the_demo_learns_to_grant_wishes_within_its_kl_budget(tmp_path):
    """P7: `python rl_ppo.py` in a copy of what it needs."""
    for name in ("rl_ppo.py", "common_v1.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("ds_configs", "models/tiny-llama"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "data").mkdir()
    for name in ("wishes.jsonl", "rewards.py"):
        shutil.copy(ROOT / "data" / name, tmp_path / "data")
    codes, output = finish(start([tmp_path / "rl_ppo.py"], cwd=tmp_path), 600)  # one thread: two wait for each other on a busy machine
    assert codes == [0], output[-3000:]
    run = tmp_path / "models" / "ppo-demo"
    first, *_, last = [row["eval/reward"] for row in rows(run, "eval")]
    assert last > 0.6 and last > 3 * first and all(row["ppo/kl"] < 40 for row in rows(run))
    assert "demo: python rl_ppo.py --model_init_name tiny-llama" in output and json.loads((run / "rawtune.json").read_text())["script"] == "rl_ppo.py"
