"""sft_causal.py on several ranks, at every ZeRO stage, killed, copied away, and its demo. pytest -m slow."""

import json
import shutil

import pytest
import transformers
from conftest import (ROOT, assert_same_mathematics, assert_same_run, copy_script, distance, finish, launch, rows, run_again, run_and_kill,
                      run_several, start, weights, write_llama)
from test_sft_runs import chats, resume_words, split_words, words, write_mount

import sft_causal

pytestmark = pytest.mark.slow
GRID = [(stage, split, packing) for stage in range(4) for split, packing in (("8x1", False), ("2x4", False), ("4x2", True))]


def run_all(mount, jobs, n_procs):
    """[(step at which to stop or None, words)]; packed as for a wide model: several documents in every row."""
    run_several(mount, "sft_causal", [(stop, {}, words) for stop, words in jobs], n_procs,
                "pack = script.pack\nscript.pack = lambda *a: pack(*a[:4], True)")


def grid_run(stage, split, packing):
    return f"2-{stage}-{split}-{packing}"


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A mount on which two ranks have run everything that the tests below compare with one rank."""
    mount = write_mount(tmp_path_factory.mktemp("grid"))
    jobs = [(None, split_words(mount, grid_run(*cell), cell[1], ds_config=f"zero{cell[0]}", packing=cell[2])) for cell in GRID]
    for stage in range(4):
        jobs += [(stop, resume_words(mount, f"{run}{stage}", stage, save_steps=2)) for run, stop in
                 (("straight", None), ("stopped", 3), ("stopped", None))]
    jobs += [(None, words(mount, f"moved{stage}", ds_config=f"zero{stage}", max_steps=3, lr_scheduler_type="constant")) for stage in (1, 3)]
    run_all(mount, jobs, 2)
    return mount


@pytest.fixture
def reference(grid, run_sft):
    """The run folder of one rank, stage 0, without accumulation or packing."""
    run = grid / "models" / "reference"
    assert run.exists() or run_sft(split_words(grid, "reference", "8x1")) == 0
    return run


@pytest.mark.parametrize("stage, split, packing", GRID)
def test_two_ranks_in_any_stage_and_split_packed_or_not_give_the_losses_gradients_and_weights_of_one(grid, reference, stage, split, packing):
    """43 documents in 6 steps: one step has 3 documents for up to 8 pieces, so some forward steps have none on some rank."""
    run = grid / "models" / grid_run(stage, split, packing)
    assert_same_mathematics(run, reference)
    assert rows(run)[-1]["epoch"] == 1 and (not packing or {row["padding_share"] for row in rows(run)} == {0})  # 2 documents of a rank: one row


def test_a_wrong_divisor_would_be_seen(grid, reference, run_sft, monkeypatch):
    """Negative control of the grid: documents counted instead of target tokens."""
    real = sft_causal.TrainingData.micro_batches
    monkeypatch.setattr(sft_causal.TrainingData, "micro_batches", lambda self, step: (real(self, step)[0], len(self.step_ids(step))))
    assert run_sft(split_words(grid, "mutated", "8x1")) == 0
    assert abs(rows(grid / "models" / "mutated")[0]["grad_norm"] / rows(reference)[0]["grad_norm"] - 1) > 0.1


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_that_stopped_and_went_on_equal_uninterrupted_ones_to_the_bit(grid, stage):
    """Dropout, random windows and random paths on. The fourth step is computed after the stop."""
    straight, stopped = grid / "models" / f"straight{stage}", grid / "models" / f"stopped{stage}"
    assert_same_run(straight, stopped, 8)
    assert "from step 3" in (stopped / "log.txt").read_text()


@pytest.mark.parametrize("stage", [1, 3])
def test_one_rank_continues_what_two_began(grid, run_sft, stage):
    options = {"ds_config": f"zero{stage}", "max_steps": 6, "lr_scheduler_type": "constant"}
    assert run_sft(words(grid, f"moved{stage}", resume=True, **options)) == 0
    assert run_sft(words(grid, f"stayed{stage}", **options)) == 0
    moved, stayed = grid / "models" / f"moved{stage}", grid / "models" / f"stayed{stage}"
    assert "from step 3 (written by 2 processes)" in (moved / "log.txt").read_text()
    # in loss, not in weights: AdamW turns rounding in gradients near 0 into whole steps
    for mine, theirs in zip(rows(moved), rows(stayed), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert distance(weights(stayed), weights(moved)) < 1e-3 < distance(weights(stayed), weights(moved / "checkpoint-3"))


# ------------------------------------------------------------------------------------------------ evaluation


def digits(folder):
    """Every digit of the predictions and metrics of an evaluation; times and memory are not results."""
    found = {name: value for name, value in rows(folder, "eval")[0].items() if name.startswith("eval/")
             and name not in ("eval/eval_seconds", "eval/peak_memory_gb")}
    (path,) = folder.glob("temperature=*.json")
    return path.read_bytes(), found


def test_evaluation_is_the_same_to_the_last_digit_on_1_2_and_3_ranks_and_under_zero3(grid, reference, run_sft):
    """1, 2, 5 and 11 rows, greedy and sampled, in small batches, some ranks without any; ZeRO-3 generates gathered and synced."""
    models, kinds = grid / "models", {"greedy": {}, "sampled": {"temperature": 0.8, "n_samples": 2, "top_p": 0.9}}
    cells = [(kind, size) for kind in kinds for size in (1, 2, 5, 11)]
    zero3 = [(kind, size, how) for kind in kinds for size in (1, 5) for how in ("gathered", "synced")]
    for size in (1, 2, 5, 11):
        (grid / "data" / f"dev{size}.json").write_text(json.dumps({"eval": chats(size, seed=size)}))

    def command(kind, size, run, **changes):
        return words(grid, f"{kind} {size} {run}", data=f"dev{size}", model_init_name=reference.name, no_train=True, eval_batch_size=6,
                     train_batch_size=6, n_generate=20, **{"max_new_tokens": 8, **kinds[kind], **changes})
    for cell in cells:
        assert run_sft(command(*cell, 1)) == 0
    for n in (2, 3):
        run_all(grid, [(None, command(*cell, n)) for cell in cells] + [
            (None, command(kind, size, f"{how} {n}", ds_config="zero3", zero3_generation=how)) for kind, size, how in zero3], n)
    for kind, size in cells:
        wanted = digits(models / f"{kind} {size} 1")
        assert len(json.loads(wanted[0])) == size
        others = [2, 3] + [f"{how} {n}" for n in (2, 3) for how in ("gathered", "synced") if (kind, size, how) in zero3]
        assert [other for other in others if digits(models / f"{kind} {size} {other}") != wanted] == []
    assert digits(models / "greedy 5 1") != digits(models / "sampled 5 1") and digits(models / "greedy 5 1") != digits(models / "greedy 11 1")


# ------------------------------------------------------------------------------------------------ killed, copied, launched


def test_kill_9_then_the_same_command_equals_uninterrupted_to_the_bit(grid):
    run, command = grid / "models" / "killed", [ROOT / "sft_causal.py", *resume_words(grid, "killed", 2, save_steps=2)]
    assert run_and_kill(command, run, 2, 3)
    run_again(command, 2)
    assert_same_run(grid / "models" / "straight2", run, 8)


def test_the_copied_script_runs_under_the_launcher(tmp_path):
    """sft_causal.py, common_v1.py and ds_configs/ in an empty folder, called from elsewhere; default precision and stage, packed."""
    home, cwd = tmp_path / "home", tmp_path / "elsewhere"
    script = copy_script("sft_causal.py", home)
    write_llama(cwd / "models" / "llama")
    (cwd / "data").mkdir()
    (cwd / "data" / "mine.json").write_text(json.dumps({"train": chats(40), "eval": chats(6, seed=1)}))
    launch(["deepspeed", "--num_gpus", "2"], [script, *("--model_init_name llama --data mine --packing --max_steps 6 --eval_steps 3 --save_steps 3 "
           "--train_batch_size 8 --max_new_tokens 4 --training_run_name run").split()], cwd)
    run = cwd / "models" / "run"
    assert [row["step"] for row in rows(run, "eval")] == [0, 3, 6]
    assert {"model.safetensors", "COMPLETE", "checkpoint-6", "code", "temperature=0.00_n=1_step=6.json"} <= {p.name for p in run.iterdir()}
    assert sorted(p.name for p in (run / "code").iterdir()) == ["common_v1.py", "sft_causal.py"]
    assert {p.name for p in home.iterdir()} - {"__pycache__"} == {"common_v1.py", "ds_configs", "sft_causal.py"}
    assert {p.name for p in cwd.iterdir()} == {"data", "models"}
    assert transformers.AutoModelForCausalLM.from_pretrained(run).num_parameters() and transformers.AutoTokenizer.from_pretrained(run).chat_template


def test_the_demo_answers_nine_of_ten_unseen_instructions_exactly(tmp_path):
    """`python sft_causal.py` in a copy of what it needs."""
    for name in ("sft_causal.py", "common_v1.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("ds_configs", "models/tiny-llama"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "instructions.jsonl", tmp_path / "data")
    codes, output = finish(start([tmp_path / "sft_causal.py"], cwd=tmp_path), 1200)  # one thread: two wait for each other on a busy machine
    assert codes == [0], output[-3000:]
    run = tmp_path / "models" / "sft-demo"
    assert rows(run, "test")[-1]["test/exact_match"] >= 0.9 and rows(run, "eval")[0]["eval/exact_match"] < 0.05
    assert "demo: python sft_causal.py --model_init_name tiny-llama" in output
