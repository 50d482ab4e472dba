"""project_grads.py as real processes: several ranks, ZeRO-3, kills, true fine-tunes, the demo."""

import json
import time

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, finish, in_process, kill, start
from test_project_grads import collect, place, run  # noqa: F401 (place is a fixture)

import project_grads as grads

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]
SCRIPT = str(ROOT / "project_grads.py")


@pytest.mark.parametrize("kind", ["llama-tied", "t5"])
def test_rows_are_the_same_on_two_processes_and_under_zero3(place, kind):  # noqa: F811
    one = collect(place, f"one-{kind}", kind, "--batch_tokens", 60)
    for out, more in (("two", []), ("three", ["--ds_config", "zero3"])):
        words = [SCRIPT, "collect", "--model_init_name", kind, "--data_name", "mix", "--groups", "skill", "--store_dtype", "fp32", "--mount_dir", place,
                 "--batch_tokens", 60, "--out", place / f"{out}-{kind}", *more]
        codes, output = finish(start(words, 2))
        assert codes == [0, 0], output[-3000:]
        store = grads.Store(place / f"{out}-{kind}", [])
        assert np.abs(store.read() - one.read()).max() <= 1e-5 * np.abs(one.read()).max()
        np.testing.assert_allclose(store.norm, one.norm, rtol=1e-5)
        np.testing.assert_allclose(store.logodds, one.logodds, atol=1e-5)


@pytest.mark.parametrize("n_procs", [1, 2])
def test_a_killed_collection_goes_on_to_the_same_rows(place, n_procs):  # noqa: F811
    lines = [json.loads(line) for line in (place / "data" / "mix.jsonl").read_text().splitlines()][:24]
    (place / "data" / "long.jsonl").write_text("".join(json.dumps({**line, "prompt": f"{i} {line['prompt']}"}) + "\n" for i in range(30) for line in lines))

    def words(out):
        return [SCRIPT, "collect", "--model_init_name", "llama", "--data_name", "long", "--store_dtype", "fp32", "--mount_dir", place, "--batch_tokens", 20,
                "--out", place / out]
    codes, output = finish(start(words(f"calm{n_procs}"), n_procs))
    assert codes == [0] * n_procs, output[-3000:]
    processes, done = start(words(f"killed{n_procs}"), n_procs), place / f"killed{n_procs}" / "done.npy"
    end = time.monotonic() + 100
    while time.monotonic() < end and not (done.exists() and done.stat().st_size >= 720 and np.load(done).any()):
        time.sleep(0.02)
    time.sleep(0.5)  # rows after the first are written, and not marked yet
    kill(processes)
    n_done = int(np.load(done).sum())
    assert 0 < n_done < 720 and not (place / f"killed{n_procs}" / "COMPLETE").exists()
    codes, output = finish(start(words(f"killed{n_procs}"), n_procs))
    assert codes == [0] * n_procs and f"{720 - n_done} of 720 rows to collect" in output, output[-3000:]
    calm, killed = (grads.Store(place / f"{name}{n_procs}", []) for name in ("calm", "killed"))
    assert np.abs(calm.read() - killed.read()).max() <= 1e-6 * np.abs(calm.read()).max()
    assert (calm.loss == killed.loss).mean() > 0.5 and np.abs(calm.loss - killed.loss).max() < 1e-5


def test_true_runs_go_on_where_they_stopped_and_an_anchor_is_its_own_estimate(place):  # noqa: F811
    for out, split in (("G", "train"), ("E", "eval")):
        collect(place, out, "llama", "--raw_prompt", split=split)
    (place / "pairs.txt").write_text("0 1\n1 0\n1 2\n0 1 2\n")  # one is there twice
    words = ["truth", "--grads", place / "G", "--target_grads", place / "E", "--subsets", place / "pairs.txt", "--limit", 2, "--train_all", "--mount_dir",
             place, "--out", place / "truth.csv", "--", "--max_steps", 4, "--train_batch_size", 8, "--learning_rate", 0.001, "--warmup_steps", 0]
    processes = start([SCRIPT, *words])
    end = time.monotonic() + 100
    while time.monotonic() < end and not list((place / "truth.csv.runs").glob("*.npy")):
        time.sleep(0.05)
    kill(processes)  # in the second of three runs
    first = {path.name: path.stat().st_mtime_ns for path in (place / "truth.csv.runs").glob("*.npy")}
    codes, output = finish(start([SCRIPT, *words]), 200)
    assert codes == [0] and first, output[-3000:]
    names, rows = grads.read_table(place / "truth.csv", [])
    assert [r for r, _, _ in rows] == ["base", "all", "0", "0"] and names == ["a", "b", "c", "loss"]
    assert all((place / "truth.csv.runs" / name).stat().st_mtime_ns == when for name, when in first.items())
    base, everything, *_ = (values for _, _, values in rows)
    assert everything[-1] != base[-1]
    before = (place / "truth.csv").read_text()
    assert finish(start([SCRIPT, *words]))[0] == [0] and (place / "truth.csv").read_text() == before
    anchor = place / "truth.csv.runs" / "models" / "all"
    for out, split in (("GA", "train"), ("EA", "eval")):
        assert run(place, "collect", "--model_init_path", anchor, "--base_model", place / "models" / "llama", "--data_name", "mix", "--groups", "skill", "--split",
                   split, "--store_dtype", "fp32", "--raw_prompt", "--out", place / out) == 0
    tuned, plain = (dict(transformers.AutoModelForCausalLM.from_pretrained(f).named_parameters()) for f in (anchor, place / "models" / "llama"))
    norm = torch.sqrt(sum((tuned[n] - plain[n]).double().square().sum() for n in plain))
    assert json.loads((place / "GA" / "delta.json").read_text())["norm"] == pytest.approx(float(norm), rel=1e-5)
    assert np.linalg.norm(np.load(place / "GA" / "delta.npy")) == pytest.approx(float(norm), rel=0.05)
    for how in ("linear", "lift"):
        assert run(place, "estimate", "--grads", place / "G", "--target_grads", place / "E", "--anchor_grads", place / "GA", place / "EA", "--subsets",
                   place / "pairs.txt", "--eval", how, "--out", place / f"{how}.csv") == 0
        _, rows = grads.read_table(place / f"{how}.csv", [])
        assert [r for r, _, _ in rows] == ["base", "all", *["estimate"] * 4]
        np.testing.assert_allclose(rows[-1][2], everything, rtol=1e-5)  # all groups: the anchor itself
        assert np.abs(rows[-2][2] - everything).max() > 1e-6


def test_the_preconditioner_is_the_checkpoints_second_moment(place, monkeypatch):  # noqa: F811
    stage = "zero0"
    run_sft = in_process("sft_causal", monkeypatch)
    assert run_sft(["--model_init_name", "llama", "--data_name", "mix", "--mount_dir", place, "--training_run_name", f"adam-{stage}", "--max_steps", 3,
                    "--train_batch_size", 8, "--raw_prompt", "--n_generate", 0, "--ds_config", stage, "--precision", "fp32", "--max_grad_norm", 0,
                    "--learning_rate", 1e-9, "--warmup_steps", 0]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "models" / "llama")
    tracked = grads.tracked_parameters(model, "all")
    scales = grads.adam_scales(place / "models" / f"adam-{stage}" / "checkpoint-3", tracked, problems := [])
    assert not problems and {n: s.numel() for n, s in scales.items()} == {n: p.numel() for n, p in tracked.items()}
    never = (scales["model.embed_tokens.weight"].view(300, -1) > 9e3).all(1)  # v = 0 where a token never occurs: (0 + 1e-8)^(-1/2) = 1e4
    assert 0 < never.sum() < 300 and not never[transformers.AutoTokenizer.from_pretrained(place / "models" / "llama")("the cat").input_ids].any()


def test_the_demo_ranks_subsets_as_fine_tuning_does(tmp_path):
    codes, output = finish(start([SCRIPT, "demo", "--out", tmp_path / "demo", "--n_true", 10, "--parallel", 1]), 400)
    assert codes == [0], output[-3000:]
    found = {name: json.loads((tmp_path / "demo" / f"{name}.csv.compare.json").read_text()) for name in ("theta0", "anchor", "lift")}
    assert found["lift"]["subsets"] == 7 and found["lift"]["estimate"]["pearson"]["value"] > 0.8 and found["anchor"]["estimate"]["pearson"]["value"] > 0.8
    assert found["anchor"]["estimate"]["relative_error"]["value"] < found["anchor"]["baseline: the loss before fine-tuning"]["relative_error"]["value"]
    rows = [line.split(",") for line in (tmp_path / "demo" / "chosen.influence.csv").read_text().splitlines()]
    of = {row[0]: dict(zip(rows[0][1:], map(float, row[1:]))) for row in rows[1:]}
    assert all(of[f"{task}_noisy"][task] < sum(of[f"{task}_clean_{i}"][task] for i in range(3)) / 3 for task in rows[0][1:])
    assert (tmp_path / "demo" / "chosen.jsonl").exists() and "What this shows" in output
