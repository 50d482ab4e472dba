"""seq2seq.py on data that names its task (data/prepare_glue.py): metrics against scikit-learn and scipy, parts, defaults, early stopping."""

import json
import re
import shutil
import sys
import types

import numpy as np
import prepare_glue
import pytest
import scipy.stats
import sklearn.metrics
from conftest import ROOT, flags, rows

import seq2seq

SHARED = ROOT.parent / "shared" / "data"
PAIR = {"labels": ["no", "yes"], "metrics": ["accuracy", "f1", "matthews"], "metric_for_best": "matthews"}
THREE = {"labels": ["a", "b", "c"], "metrics": ["accuracy", "macro_f1"], "metric_for_best": "accuracy"}
SCORE = {"labels": None, "range": [0, 5], "metrics": ["pearson", "spearman"], "metric_for_best": "spearman"}


def records(completions, scores=None):
    return [{"completion": c, "orig_d": {} if scores is None else {"score": s}} for c, s in zip(completions, scores or completions)]


@pytest.mark.parametrize("seed", range(20))
def test_metrics_of_labels_are_scikit_learns(seed):
    """An answer that is no label counts as wrong: as the other one of two, as none of three."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 60))
    for task in (PAIR, THREE):
        labels = task["labels"]
        gold = rng.choice(labels[: int(rng.integers(1, len(labels) + 1))], n).tolist()
        said = rng.choice([*labels, "", labels[1] + " " + labels[1], labels[0].upper()], n).tolist()
        found = seq2seq.task_metrics(task, [f" {text}\n" for text in said], records(gold))
        valid = [text in labels for text in said]
        if len(labels) == 2:
            said = [text if ok else labels[1 - labels.index(g)] for text, ok, g in zip(said, valid, gold)]
            assert found["f1"] == pytest.approx(sklearn.metrics.f1_score(gold, said, pos_label="yes", zero_division=0))
            assert found["matthews"] == pytest.approx(sklearn.metrics.matthews_corrcoef(gold, said), abs=1e-12)
        else:
            said = [text if ok else "none" for text, ok in zip(said, valid)]
            assert found["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(gold, said, labels=labels, average="macro", zero_division=0))
        assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(gold, said)) and found["invalid"] == n - sum(valid)


@pytest.mark.parametrize("seed", range(10))
def test_correlations_are_scipys_and_no_number_is_the_farther_end(seed):
    rng = np.random.default_rng(seed)
    gold = (rng.integers(0, 26, 40) / 5).tolist()
    said = [f"{min(5, max(0, g + rng.normal())):.1f}" for g in gold]
    for i, text in ((0, "high"), (1, ""), (2, "nan"), (3, "inf")):
        said[i] = text
    found = seq2seq.task_metrics(SCORE, said, records([f"{g:.1f}" for g in gold], gold))
    numbers = [(0.0 if g > 2.5 else 5.0) if i < 4 else float(text) for i, (text, g) in enumerate(zip(said, gold))]
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(numbers, gold).statistic)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(numbers, gold).statistic) and found["invalid"] == 4
    assert seq2seq.task_metrics(SCORE, ["1.0"] * 40, records(["1.0"] * 40, gold))["spearman"] == 0  # always the same answer


def test_scores_that_were_rounded_for_training_are_compared_unrounded():
    exact = seq2seq.task_metrics(SCORE, ["1.0", "2.0", "3.0"], records(["1.0", "2.0", "2.0"], [1.0, 1.9, 2.1]))
    assert exact["spearman"] == pytest.approx(1.0)


@pytest.mark.parametrize("change", [{"labels": ["a"]}, {"labels": "ab"}, {"metrics": "accuracy"}, {"metrics": ["auc"]}, {"metric_for_best": None},
                                    {"labels": ["a", "b", "c"]}, {"labels": None}], ids=str)
def test_an_entry_that_makes_no_sense_is_refused(change):
    assert seq2seq.check_task(PAIR) == seq2seq.check_task(THREE) == seq2seq.check_task(SCORE) == []
    assert seq2seq.check_task({**PAIR, **change})


def write_task(mount, name="task", task=PAIR, n_train=40, n_eval=12, lines=False, **more):
    """Which of two words is in the prompt: learnt in a few steps."""
    answer = {"cat": task["labels"][0], "dog": task["labels"][1]}
    parts = {"train": [{"prompt": f"the {w} {i}", "completion": answer[w]} for i in range(n_train) for w in answer],
             "eval": [{"prompt": f"a {w} number {i}", "completion": answer[w], **more} for i in range(n_eval // 2) for w in answer]}
    path = mount / "data" / f"{name}.json{'l' * lines}"
    if lines:
        path.write_text("".join(json.dumps({"split": split, **r}) + "\n" for split, rs in {"task": [task], **parts}.items() for r in rs))
    else:
        path.write_text(json.dumps({"task": [task], **parts}))
    return parts


@pytest.mark.parametrize("lines", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_datas_own_metric_keeps_the_best_weights_and_stops_early(mount, run_main, capsys, lines):
    write_task(mount, lines=lines)
    assert run_main(flags(mount, data="task", max_steps=300, eval_steps=10, train_batch_size=16, learning_rate=0.01, max_new_tokens=None,
                          early_stopping_patience=3)) == 0
    run = mount / "models" / "run"
    evaluations = rows(run, "eval")
    assert evaluations[0]["eval/invalid"] == 12 and evaluations[0]["eval/accuracy"] == 0 and evaluations[0]["eval/matthews"] == -1
    assert max(row["eval/matthews"] for row in evaluations) == 1 and evaluations[-1]["step"] < 300 and evaluations[-1]["eval/invalid"] == 0
    best = json.loads((run / "best.json").read_text())
    assert best["metric"] == "matthews" and best["value"] == 1
    args = json.loads((run / "args.json").read_text())
    assert args["metric_for_best"] == "matthews" and args["max_new_tokens"] == 3  # "▁yes </s>", and one more
    assert re.search("^eval  task +accuracy 1  f1 1  matthews 1  invalid 0$", capsys.readouterr().out, re.M)


@pytest.mark.slow
def test_parts_and_several_tasks_are_scored_apart(mount, run_main, capsys):
    write_task(mount, "one")
    parts = write_task(mount, "mnli", {**THREE, "metric_for_best": "matched/accuracy"}, part="matched")
    parts["eval"] += [{**record, "part": "mismatched", "completion": "c"} for record in parts["eval"][:4]]
    (mount / "data" / "mnli.json").write_text(json.dumps({"task": [{**THREE, "metric_for_best": "matched/accuracy"}], **parts}))
    assert run_main(flags(mount, data=["one", "mnli", "ragged"], max_steps=1)) == 0
    row = rows(mount / "models" / "run", "eval")[-1]
    assert {f"eval/{name}" for name in ("loss", "one/accuracy", "one/f1", "mnli/accuracy", "mnli/matched/macro_f1", "mnli/mismatched/accuracy",
                                        "mnli/mismatched/invalid", "ragged/exact_match")} <= row.keys()
    assert not {"eval/accuracy", "eval/ragged/accuracy", "eval/invalid"} & row.keys()
    assert row["eval/mnli/invalid"] == row["eval/mnli/matched/invalid"] + row["eval/mnli/mismatched/invalid"] == 16
    table = [line.split()[1] for line in capsys.readouterr().out.splitlines() if " invalid " in line and not line.startswith("step")]
    assert table == ["one", "mnli", "mnli/matched", "mnli/mismatched"]
    args = json.loads((mount / "models" / "run" / "args.json").read_text())
    assert args["metric_for_best"] is None  # several sets: nothing is guessed
    args = seq2seq.parse_args(flags(mount, "other", data=["one", "ragged"], max_new_tokens=None))
    seq2seq.prepare(args)
    assert args.max_new_tokens == 512
    assert run_main(flags(mount, "alone", data="mnli", max_steps=1, max_new_tokens=None)) == 0
    assert json.loads((mount / "models" / "alone" / "best.json").read_text())["metric"] == "matched/accuracy"
    assert run_main(flags(mount, "named", data=["one", "mnli"], max_steps=1, max_new_tokens=None, metric_for_best="mnli/matched/accuracy")) == 0


@pytest.mark.parametrize("change, said", [
    ({"completion": "maybe"}, "completion 'maybe', expected one of no, yes"), ({"metrics": ["bleu"]}, "metric 'bleu' of the task entry")], ids=str)
def test_wrong_labels_and_entries_are_named(mount, run_main, capsys, change, said):
    parts = write_task(mount)
    if "completion" in change:
        parts["train"][5].update(change)
    (mount / "data" / "task.json").write_text(json.dumps({"task": [{**PAIR, **{k: v for k, v in change.items() if k in PAIR}}], **parts}))
    assert run_main(flags(mount, data="task")) == 2
    assert said in capsys.readouterr().err


def test_a_metric_that_the_data_has_not_is_refused(mount, run_main, capsys):
    write_task(mount)
    assert run_main(flags(mount, data="task", metric_for_best="spearman")) == 2
    assert "expected one of loss, token_accuracy, exact_match, token_f1, accuracy, f1, matthews" in capsys.readouterr().err
    assert run_main(flags(mount, metric_for_best="accuracy")) == 2


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize("task, folder, more", [("sst2", "SST-2", {"lora_rank": 4}), ("stsb", "STS-B", {"num_beams": 2}), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in (("cola", "CoLA", {}), ("rte", "RTE", {"train_adapter": True})))])
def test_real_files_are_prepared_and_trained_on(mount, run_main, monkeypatch, task, folder, more):
    assert prepare_glue.main(["--task", task, "--data_dir", str(SHARED / folder), "--out", str(mount / "data" / f"{task}.jsonl")]) == 0
    shutil.rmtree(mount / "models" / "tiny")
    from test_prepare_text import write_tokenizer
    shutil.copy(SHARED / folder / "train.tsv", mount / "data" / "text.txt")
    write_tokenizer(mount / "models" / "tiny", mount / "data" / "text.txt")
    assert run_main(flags(mount, data=task, max_steps=2, max_new_tokens=None, debug=True, early_stopping_patience=2, **more)) == 0
    last = rows(mount / "models" / "run", "eval")[-1]
    metrics = prepare_glue.TASKS[task]["metrics"]
    assert {f"eval/{name}" for name in [*metrics, "invalid"]} <= last.keys()
    assert json.loads((mount / "models" / "run" / "best.json").read_text())["metric"] == metrics[0]


def test_trials_of_a_wandb_sweep_have_run_folders_of_their_own_and_report_eval_names(mount, run_main, monkeypatch):
    """As under `wandb agent`, which sets these two variables and gives flags as --key=value."""
    logged, begun = [], []
    module = types.SimpleNamespace(init=lambda **words: begun.append(words) or types.SimpleNamespace(log=lambda row, step: logged.append((step, row))))
    monkeypatch.setitem(sys.modules, "wandb", module)
    write_task(mount)
    words = [f"{a}={b}" for a, b in zip(*[iter(flags(mount, None, data="task", max_steps=1, max_new_tokens=None, report_to="wandb", training_run_name=None))] * 2)]
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    for trial in ("t1", "t2"):
        monkeypatch.setenv("WANDB_RUN_ID", trial)
        assert run_main(words) == 0
    assert [(mount / "models" / f"tiny_task_0_{trial}" / "COMPLETE").exists() for trial in ("t1", "t2")] == [True, True]
    assert [start["id"] for start in begun] == ["t1", "t2"] and {"eval/accuracy", "eval/matthews"} <= logged[-1][1].keys() and logged[-1][0] == 1
