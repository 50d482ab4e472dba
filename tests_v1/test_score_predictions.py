"""data/score_predictions.py: every file layout, published figures, baselines, bootstrap, what is refused."""

import csv
import json

import numpy as np
import pytest
import score_predictions
from conftest import ROOT, bpe_tokenizer
from test_instructions import TASK, instances, write_tasks

import common_v1 as common


SHARED = ROOT.parent / "shared" / "data"
ROWS = [("A dog.", ["a dog", "cat"], "task1_x", "Word Analogy"), ("three cats", ["a cat"], "task1_x", "Word Analogy"), ("no", ["yes"], "task2_y", "Title Generation")]


@pytest.fixture
def score(tmp_path, capsys, monkeypatch):
    """score(name, content, flags) -> (exit code, figures, stdout, stderr)."""
    def score(name, content, *words):
        monkeypatch.chdir(tmp_path)
        if name:
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        (tmp_path / "out.json").unlink(missing_ok=True)
        try:
            code = score_predictions.main([*(["--predictions", name] if name else []), *words, "--out", "out.json"])
        except SystemExit as stop:
            code = stop.code
        return code, json.loads((tmp_path / "out.json").read_text()) if (tmp_path / "out.json").exists() else None, *capsys.readouterr()
    return score


def lines(key="prediction"):
    return "".join(json.dumps({key: p, "Task": t, "Categories": [c], "Instance": {"id": "i", "input": "x", "output": r}}) + "\n" for p, r, t, c in ROWS)


def test_all_layouts_give_the_same_figures(score):
    """Tk-Instruct's JSON lines (both spellings), our predictions with instances, and by hand: 1 of 3 exact; ROUGE-1 1, 1/2, 0 (a cat / three cats)."""
    code, found, shown, _ = score("p.jsonl", lines(), "--per_task", "--per_category")
    assert code == 0 and found["exact_match"] == 33.3333 and found["rouge1"] == found["rougeL"] == 50.0
    assert (found["rougeL_for_task1_x"], found["rougeL_for_task2_y"], found["exact_match_for_word_analogy"]) == (75.0, 0.0, 50.0)
    assert "3 predictions: exact_match 33.3333" in shown and "word_analogy (2): exact_match 50.0" in shown and "title_generation (1): rougeL 0.0" in shown
    assert "task1_x (2): exact_match 50.0" in shown
    assert score("p.jsonl", lines("Prediction"), "--per_task")[1] == found
    ours = [{"prompt": "x", "generations": [{"lm_postprocess": p}, {"lm_postprocess": "other"}], "demonstration": r[0], "dataset": "ni",
             "orig_d": {"Task": t, "Categories": [c], "Instance": {"output": r}}} for p, r, t, c in ROWS]
    assert score("ours.json", ours)[1] == found
    for row in ours:
        row["orig_d"] = {}
    plain = score("ours.json", ours)
    assert plain[1] == {"exact_match": 33.3333, "rouge1": 50.0, "rougeL": 50.0} and "_for_" not in plain[2]


def test_tables_of_several_references(score, tmp_path):
    for name, delimiter in (("t.csv", ","), ("t.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["p", "r1", "r2"], *([p, r[0], r[-1]] for p, r, *_ in ROWS)])
        code, found, *_ = score(name, (tmp_path / name).read_text(), "--prediction_column", "p", "--reference_columns", "r1", "r2")
        assert code == 0 and found == {"exact_match": 33.3333, "rouge1": 50.0, "rougeL": 50.0}


def test_empty_cells_of_a_table_are_no_references(score):
    """But where all are empty: the answer that is expected is none."""
    words = ["--prediction_column", "p", "--reference_columns", "r1", "r2"]
    assert score("p.csv", "p,r1,r2\n,Paris,\n.,Rome,\nx,x,y\n", *words)[1]["exact_match"] == 33.3333
    assert score("p.csv", "p,r1,r2\n,,\nx,y,\n", *words)[1]["exact_match"] == 50.0


@pytest.mark.skipif(not (SHARED / "rouge").is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("name, mean, published", [("llama", 57.9853, 58.0104), ("flan_t5", 50.5539, 50.5839)])
def test_published_rouge_l(score, name, mean, published):
    path = SHARED / "rouge" / f"alpaca_plus_{name}_pos_control_validation_seen.csv"
    code, found, *_ = score(None, None, "--predictions", str(path), "--prediction_column", "y_pred", "--reference_columns", "y_true", "--bootstrap", "300")
    median, low, high = found["rougeL_bootstrap"]
    assert code == 0 and found["rougeL"] == mean and abs(median - published) < 0.15 and low < mean < high and 4 < high - low < 6


def test_bootstrap_is_that_of_the_mean():
    scores = np.random.default_rng(1).random((400, 3))
    median, low, high = score_predictions.bootstrap(scores, 2000)
    error = scores.std(0) / 20
    assert np.allclose(median, scores.mean(0), atol=0.1 * error.max()) and np.allclose(high - low, 2 * 1.96 * error, rtol=0.1)
    assert (score_predictions.bootstrap(scores, 20) == score_predictions.bootstrap(scores, 20)).all()


def test_cross_lingual_track_counts_a_tokenizers_pieces(score, tmp_path, monkeypatch):
    """Where English words are none: the default track sees nothing in these characters. A blank before a piece does not tell it apart."""
    bpe_tokenizer().save_pretrained(tmp_path / "bpe")
    rows = "".join(json.dumps({"prediction": p, "Task": "t", "Instance": {"output": [r]}}) + "\n" for p, r in (("день", "день"), ("yes no", "no")))
    assert score("p.jsonl", rows)[1]["rougeL"] == pytest.approx(100 * (0 + 2 / 3) / 2, abs=1e-4)
    assert score("p.jsonl", rows, "--track", "xlingual", "--gpt2_tokenizer", str(tmp_path / "bpe"))[1]["rougeL"] == pytest.approx(100 * (1 + 2 / 3) / 2, abs=1e-4)
    code, _, _, shown = score("p.jsonl", rows, "--track", "xlingual", "--gpt2_tokenizer", str(tmp_path / "none"))
    assert code == 2 and "--gpt2_tokenizer" in shown


def test_baselines(score, tmp_path):
    folder = write_tasks(tmp_path / "f", {"task1_a": (TASK, instances(120)), "task2_b": ({**TASK, "Categories": ["Title Generation"]}, [
        {"input": "x", "output": ["one", "x"]}])}, {"test": ["task1_a", "task2_b"], "train": []})
    code, found, shown, _ = score(None, None, "--baseline", "copy_demo", "--task_dir", str(folder / "tasks"))
    assert code == 0 and "101 predictions" in shown and found["exact_match_for_task2_b"] == 100 and found["rougeL_for_task1_a"] == pytest.approx(100 * 2 / 3, abs=1e-3)
    found = score(None, None, "--baseline", "copy_input", "--task_dir", str(folder / "tasks"), "--split_dir", str(folder / "splits" / "default"))[1]
    assert found["exact_match_for_task2_b"] == 100 and found["exact_match_for_task1_a"] == 0
    (folder / "tasks" / "task1_a.json").write_text(json.dumps({**TASK, "Positive Examples": [], "Instances": instances(1)}))
    code, _, _, shown = score(None, None, "--baseline", "copy_demo", "--task_dir", str(folder / "tasks"))
    assert code == 2 and "task task1_a has no positive example to copy" in shown


@pytest.mark.parametrize("name, content, words, message", [
    ("p.jsonl", "{}\n", [], "line 1: no text 'prediction'"), ("p.jsonl", '{"prediction": "x"}\n', [], "line 1: no references"),
    ("p.jsonl", '{"prediction": "x", "Instance": {"output": []}}\n', [], "line 1: no references"), ("p.jsonl", "[1]\n", [], "line 1: a list, expected an object"),
    ("p.jsonl", '{"prediction": "x", "Instance": {"output": ["y"]}, "Categories": [3]}\n', [], "or 'Categories' no list of texts"), ("p.jsonl", "", [], "no predictions"),
    ("p.json", "[", [], "p.json: not JSON"), ("p.jsonl", '{"prediction": "x", "demonstration": "x"}\n', ["--per_task", "--per_category"], "--per_task: 1 of 1 rows name no task"),
    ("p.csv", "a,b\n1,2\n", [], "--prediction_column: is needed"), ("p.csv", "a,b\n1,2\n", ["--prediction_column", "a", "--reference_columns", "c"], "no column 'c'; it has a, b"),
    ("p.jsonl", lines(), ["--prediction_column", "a"], "--prediction_column: has no effect"), ("p.jsonl", lines(), ["--bootstrap", "-1"], "--bootstrap -1"),
    ("p.jsonl", '{"prediction": "x", "Task": ["x"], "Instance": {"output": ["y"]}}\n', [], "line 1: 'Task' is no text"),
    ("p.jsonl", '{"prediction": "x", "Task": " ", "Categories": [""], "Instance": {"output": ["y"]}}\n', ["--per_task", "--per_category"],
     "--per_category: 1 of 1 rows name no category"),
    ("p.jsonl", '{"prediction": "\\ud800", "Instance": {"output": ["y"]}}\n', [], "line 1: holds half a character"),
    ("p.jsonl", lines().replace("task2_y", "word_analogy"), [], "task word_analogy is named like a category"),
    ("p.jsonl", lines(), ["--track", "xlingual", "--gpt2_tokenizer", "./none"], "--gpt2_tokenizer ./none: "),
    ("p.jsonl", lines(), ["--gpt2_tokenizer", "x"], "belongs to --track xlingual"),
    (None, None, ["--baseline", "copy_demo", "--task_dir", "x", "--prediction_column", "x"], "belong to --predictions"),
    ("p.jsonl", lines(), ["--task_dir", "x"], "belong to --baseline"), (None, None, ["--predictions", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
    (None, None, ["--baseline", "copy_demo"], "--task_dir None: expected a folder")], ids=str)
def test_what_is_wrong_is_said(score, name, content, words, message):
    code, found, _, shown = score(name, content, *words)
    assert code == 2 and found is None and message in shown


def test_without_the_package(score, monkeypatch):
    def missing(*_):
        raise ImportError("No module named 'rouge_score'")
    monkeypatch.setattr(common, "rouge_scorer", missing)
    code, _, _, shown = score("p.jsonl", lines())
    assert code == 2 and "pip install rouge-score" in shown


def test_an_existing_file_is_not_overwritten(score, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(lines())
    (tmp_path / "mine.json").write_text("mine")
    assert score_predictions.main(["--predictions", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "mine.json")]) == 2
    assert (tmp_path / "mine.json").read_text() == "mine" and "exists" in capsys.readouterr().err
