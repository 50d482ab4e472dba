"""clf.py on several ranks, at every ZeRO stage, killed, copied away, and its demo. pytest -m slow."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import (ROOT, assert_same_mathematics, assert_same_run, clf_flags, copy_script, distance, finish, launch, rows, run_again,
                      run_and_kill, run_several, score_records, scores, start, stop_at, weights, write_clf_mount, write_model)

import clf
import common_v1 as common

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]
SPLITS = {"8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4)}
def run_all(mount, jobs, n_procs):
    """[(step or shard after which to stop or None, texts per shard, words)]."""
    run_several(mount, "clf", [(stop, {"SHARD": shard}, words) for stop, shard, words in jobs], n_procs)


def task_flags(mount, run, task, split, **changes):
    """All steps of an epoch, the last of which is partial. Class weights and ragged texts: a mean of means would be wrong. The
    learning rate is small because AdamW turns rounding in gradients near 0, of which preferences have many, into whole steps."""
    own = {"t5": {"class_weights": ["1", "3"]}, "llama": {"class_weights": ["1", "3"], "model_init_name": "llama"},
           "pairs": {"data": "pairs", "loss": "pairwise", "max_steps": 3}}[task]  # 21 prompts
    batch, accumulation = SPLITS[split]
    own.update(train_batch_size=batch, gradient_accumulation_steps=accumulation)
    return clf_flags(mount, run, **{"max_steps": 6, "learning_rate": 0.0001, **own, **changes})


def resume_flags(mount, run, stage):
    return clf_flags(mount, run, model_init_name="dropout", ds_config=f"zero{stage}", max_steps=6, save_steps=2, train_batch_size=4,
                     gradient_accumulation_steps=2)


GRID = [("t5", stage, split) for stage in range(4) for split in ("8x1", "2x4")] + [("t5", 3, "4x2"), ("llama", 0, "2x4"), ("llama", 2, "8x1"), ("llama", 3, "4x2")] + [
    ("pairs", 0, "2x4"), ("pairs", 1, "8x1"), ("pairs", 3, "4x2")]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A mount on which two ranks have run everything that the tests below compare with one rank."""
    mount = write_clf_mount(tmp_path_factory.mktemp("grid"))
    for size in range(1, 8):
        (mount / "data" / f"dev{size}.json").write_text(json.dumps({"eval": score_records(size, seed=size)}))
    jobs = [(None, 8192, task_flags(mount, f"2-{task}-{stage}-{split}", task, split, ds_config=f"zero{stage}")) for task, stage, split in GRID]
    jobs += [(None, 8192, clf_flags(mount, f"moved{stage}", ds_config=f"zero{stage}", max_steps=3, lr_scheduler_type="constant", weight_decay=0.3))
             for stage in (1, 3)]
    for stage in range(4):
        jobs += [(stop, 8192, resume_flags(mount, f"{run}{stage}", stage)) for run, stop in (("straight", None), ("stopped", 3), ("stopped", None))]
    run_all(mount, jobs, 2)
    return mount


@pytest.fixture
def reference(grid, run_clf):
    """reference(task) -> the run folder of one rank, stage 0, without accumulation."""
    def reference(task):
        run = grid / "models" / f"reference-{task}"
        assert run.exists() or run_clf(task_flags(grid, run.name, task, "8x1")) == 0
        return run
    return reference


@pytest.mark.parametrize("task, stage, split", GRID)
def test_two_ranks_in_any_stage_and_split_give_the_losses_gradients_and_weights_of_one(grid, reference, task, stage, split):
    """The last step has 3 texts (5 prompts) for up to 8 pieces, so some ranks hold none."""
    assert_same_mathematics(grid / "models" / f"2-{task}-{stage}-{split}", reference(task))


@pytest.mark.parametrize("task, stage, split", [("t5", 1, "8x1"), ("t5", 2, "4x2"), ("t5", 3, "2x4"), ("llama", 3, "4x2"), ("pairs", 3, "2x4")])
def test_one_rank_in_any_stage_gives_the_same(grid, reference, run_clf, task, stage, split):
    assert run_clf(task_flags(grid, f"1-{task}-{stage}-{split}", task, split, ds_config=f"zero{stage}")) == 0
    assert_same_mathematics(grid / "models" / f"1-{task}-{stage}-{split}", reference(task))


def test_a_wrong_divisor_would_be_seen(grid, reference, run_clf, monkeypatch):
    """Negative control of the grid: texts counted instead of their class weights."""
    real = clf.TrainingData.micro_batches
    monkeypatch.setattr(clf.TrainingData, "micro_batches", lambda self, step: (real(self, step)[0], len(self.step_ids(step))))
    assert run_clf(task_flags(grid, "mutated", "t5", "8x1")) == 0
    assert abs(rows(grid / "models" / "mutated")[0]["grad_norm"] / rows(reference("t5"))[0]["grad_norm"] - 1) > 0.1


def test_a_zero3_export_has_whole_tensors_and_plain_transformers_loads_it(grid, reference):
    for task, auto_class in (("t5", transformers.AutoModelForSeq2SeqLM), ("llama", transformers.AutoModelForCausalLM)):
        run, ids = grid / "models" / f"2-{task}-3-4x2", torch.tensor([[5, 6, 7, 1]])
        assert all(tensor.numel() for tensor in weights(run).values()) and weights(run).keys() == weights(reference(task)).keys()
        a, b = (auto_class.from_pretrained(folder).eval() for folder in (run, reference(task)))
        batch = {"decoder_input_ids": ids} if task == "t5" else {}
        assert torch.allclose(a(input_ids=ids, **batch).logits, b(input_ids=ids, **batch).logits, atol=1e-4)
        assert a.get_output_embeddings().weight.shape == b.get_output_embeddings().weight.shape


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_that_stopped_and_went_on_equal_uninterrupted_ones_to_the_bit(grid, stage):
    """Dropout on. The fourth step is computed after the stop."""
    straight, stopped = grid / "models" / f"straight{stage}", grid / "models" / f"stopped{stage}"
    assert_same_run(straight, stopped, 6)
    assert (straight / "preds.json").read_bytes() == (stopped / "preds.json").read_bytes()
    assert "continuing" in (stopped / "log.txt").read_text() and "from step 3" in (stopped / "log.txt").read_text()


@pytest.mark.parametrize("stage", [1, 3])
def test_one_rank_continues_what_two_began(grid, run_clf, stage):
    words = {"ds_config": f"zero{stage}", "max_steps": 6, "lr_scheduler_type": "constant", "weight_decay": 0.3}
    assert run_clf(clf_flags(grid, f"moved{stage}", resume=True, **words)) == 0
    assert run_clf(clf_flags(grid, f"stayed{stage}", **words)) == 0
    moved, stayed = grid / "models" / f"moved{stage}", grid / "models" / f"stayed{stage}"
    assert "from step 3 (written by 2 processes)" in (moved / "log.txt").read_text()
    assert distance(weights(stayed), weights(moved)) < 1e-6 and [row["step"] for row in rows(moved)] == list(range(1, 7))
    assert distance(weights(stayed), weights(moved / "checkpoint-3")) > 1e-3


# ------------------------------------------------------------------------------------------------ scoring


def digits(folder):
    """Every digit of the predictions and metrics of a scoring; times and memory are not results."""
    no_results = ("eval/texts_per_sec", "eval/eval_seconds", "eval/peak_memory_gb")
    found = {name: value for name, value in rows(folder, "eval")[0].items() if name.startswith("eval/") and name not in no_results}
    return (folder / "preds.json").read_bytes(), found


def test_scores_are_the_same_to_the_last_digit_on_1_2_and_3_ranks_for_any_size(grid, reference, run_clf):
    """1 to 7 texts in batches of 2, some ranks without any; and a file that one rank began to score is
    finished by three."""
    model = reference("t5").name

    def words(run, size, **changes):
        return clf_flags(grid, run, **{"data": f"dev{size}", "model_init_name": model, "no_train": True, "eval_batch_size": 2,
                                       "train_batch_size": 6, **changes})
    base = {"data": "scores", "eval_batch_size": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clf, "SHARD", 4)
        assert run_clf(words("whole", 0, **base)) == 0
        stop_at(patch, 1)
        assert run_clf(words("begun", 0, **base)) == common.EXIT_SAVED
    shutil.copytree(grid / "models" / "begun", grid / "models" / "begun2")
    for size in range(1, 8):
        assert run_clf(words(f"dev{size}-1", size)) == 0
    jobs = {n: [(None, 8192, words(f"dev{size}-{n}", size)) for size in range(1, 8)] for n in (2, 3)}
    jobs[2] += [(None, 4, words("begun2", 0, **base)), (2, 4, words("halted", 0, **base)), (None, 4, words("halted", 0, **base))]
    jobs[3] += [(None, 4, words("begun", 0, **base)), *((None, 8192, words(f"dev{size}-zero3", size, ds_config="zero3")) for size in (1, 5))]
    for n in (2, 3):
        run_all(grid, jobs[n], n)
    models = grid / "models"
    for size in range(1, 8):
        assert digits(models / f"dev{size}-1") == digits(models / f"dev{size}-2") == digits(models / f"dev{size}-3")
    for size in (1, 5):
        # another stage is another layout, hence 1e-6: ZeRO-3 gathers weights at any address, and on some CPUs the last bits of a
        # product with one row depend on how its matrix is aligned
        (_, found), (_, wanted) = digits(models / f"dev{size}-zero3"), digits(models / f"dev{size}-1")
        assert scores(models / f"dev{size}-zero3" / "preds.json") == pytest.approx(scores(models / f"dev{size}-1" / "preds.json"), rel=1e-6)
        assert found.keys() == wanted.keys() and all(found[name] == pytest.approx(wanted[name], rel=1e-5) for name in found)
    for name in ("preds.json", "test_preds.json"):
        found = [(models / run / name).read_bytes() for run in ("whole", "begun", "begun2", "halted")]
        assert found[1:] == found[:1] * 3
    assert digits(models / "dev5-1") != digits(models / "dev6-1")


MEMORY = """
import json, re, sys
sys.path.insert(0, {root!r})
import clf
peaks = []
for n in (2000, 42000):
    with open(f"{{n}}.jsonl", "w") as file:
        for i in range(n):
            file.write(json.dumps({{"input": f"cat {{i % 90}}", "target": i % 2, "note": "x" * 3000}}) + "\\n")
    words = ["--model_init_path", sys.argv[1], "--data", f"{{n}}.jsonl", "--no_train", "--cache_dir", "cache", "--eval_batch_size", "256"]
    assert clf.main(clf.parse_args([*words, "--training_run_name", str(n)])) == 0
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
print("GREW", peaks[1] - peaks[0])
"""


def test_a_large_file_is_scored_in_bounded_memory(tmp_path):
    """40000 records more, which a list would hold in 120 MB at least."""
    write_model(tmp_path / "models" / "tiny")
    codes, output = finish(start(["-c", MEMORY.format(root=str(ROOT)), tmp_path / "models" / "tiny"], cwd=tmp_path), 120)
    assert codes == [0], output[-3000:]
    assert (tmp_path / "models" / "42000" / "preds.json").stat().st_size > 120e6
    assert int(output.rsplit("GREW", 1)[1]) < 60, output[-200:]


# ------------------------------------------------------------------------------------------------ killed, copied, launched


def test_kill_9_then_the_same_command_equals_uninterrupted_to_the_bit(grid):
    run, command = grid / "models" / "killed", [ROOT / "clf.py", *resume_flags(grid, "killed", 2)]
    assert run_and_kill(command, run, 2, 3)
    run_again(command, 2)
    assert_same_run(grid / "models" / "straight2", run, 6)


def test_the_copied_script_runs_the_earlier_systems_command_under_the_launcher(tmp_path):
    """clf.py, common_v1.py and ds_configs/ in an empty folder, called from elsewhere; a tiny model under the big one's name."""
    home, cwd = tmp_path / "home", tmp_path / "elsewhere"
    script = copy_script("clf.py", home)
    write_model(cwd / "models" / "flan-t5-xl")
    (cwd / "data").mkdir()
    records = score_records(59)
    (cwd / "data" / "1226verifier_ft_all.json").write_text(json.dumps({"train": records[:43], "eval": records[43:]}))
    launch(["deepspeed", "--num_gpus", "2"], [script, *(
        "--model_pretrain_name google/flan-t5-xl --data_name 1226verifier_ft_all --max_steps 21 --eval_steps 20 --save_steps 20").split()], cwd)
    run = cwd / "models" / "flan-t5-xl_1226verifier_ft_all_0"
    assert [row["step"] for row in rows(run, "eval")] == [0, 20, 21] and (run / "checkpoint-20-preds.json").exists()
    assert {"preds.json", "rank_metrics.json", "model.safetensors", "COMPLETE", "checkpoint-20", "code"} <= {p.name for p in run.iterdir()}
    assert sorted(p.name for p in (run / "code").iterdir()) == ["clf.py", "common_v1.py"]
    assert {p.name for p in home.iterdir()} - {"__pycache__"} == {"clf.py", "common_v1.py", "ds_configs"}
    assert {p.name for p in cwd.iterdir()} == {"data", "models"}


def test_the_demo_ranks_unseen_texts_with_an_auc_of_95_percent(tmp_path):
    """`python clf.py` in a copy of what it needs, from another folder."""
    for name in ("clf.py", "common_v1.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("ds_configs", "models/tiny-t5"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "clf_debug.json", tmp_path / "data")
    codes, output = finish(start([tmp_path / "clf.py"], cwd=tmp_path), 300)  # one thread: two wait for each other on a busy machine
    assert codes == [0], output[-3000:]
    last = rows(tmp_path / "models" / "clf-demo", "test")[-1]
    assert last["test/auc"] >= 0.95 and last["test/rmse"] < 0.2 and "demo: python clf.py --model_init_name tiny-t5" in output
    assert len(json.loads((tmp_path / "models" / "clf-demo" / "test_preds.json").read_text())) == 300
