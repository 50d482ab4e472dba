"""data/score_predictions.py: all layouts, the published figures, mistakes."""

import csv
import json
import pathlib

import pytest
from conftest import SHARED, needs_shared

import score_predictions

ROWS = [  # prediction, references, task, category; exact match, ROUGE-1 and ROUGE-L by hand
    (("A dog.", ["a dog", "cat"], "task1", "Word Analogy"), (100, 100, 100)),
    (("three cats", ["a cat"], "task1", "Word Analogy"), (0, 50, 50)),  # stemmed: cats, cat
    (("b a", ["a b"], "task2", "Title Generation"), (0, 100, 50)),
]


def score(*words, name="p.jsonl", content=None):
    """The lines that are shown, or the exit code."""
    if content is not None:
        pathlib.Path(name).write_text(content)
    try:
        score_predictions.main(["--predictions", name, *words])
    except SystemExit as stop:
        return stop.code
    return None


def tk_instruct(prediction, references, task, category):
    instance = {"id": "i", "input": "x", "output": references}
    return {
        "Prediction": prediction,
        "Task": task,
        "Categories": [category],
        "Instance": instance,
    }


def ours(prediction, references, task, category):
    record = {"prompt": ["x"], "completion": references, "references": references}
    return {
        "prompt": "x",
        "generations": [{"lm_postprocess": prediction}, {"lm_postprocess": "other"}],
        "demonstration": references[0],
        "orig_d": {**record, "task": task, "categories": [category]},
        "dataset": "ni",
    }


def plain(prediction, references, task, category):
    return {
        "prediction": prediction,
        "references": references,
        "task": task,
        "category": category,
    }


@pytest.mark.parametrize("layout", [tk_instruct, ours, plain])
def test_all_layouts_have_the_figures_that_are_right_by_hand(layout, capsys):
    records = [layout(*row) for row, _ in ROWS]
    content = "".join(json.dumps(record) + "\n" for record in records)
    score("--per_category", "--per_task", content=content)
    assert capsys.readouterr().out.splitlines() == [
        "all (3 predictions): exact_match 33.3333  rouge1 83.3333  rougeL 66.6667",
        "Title Generation (1 predictions): exact_match 0.0000  rouge1 100.0000  rougeL 50.0000",
        "Word Analogy (2 predictions): exact_match 50.0000  rouge1 75.0000  rougeL 75.0000",
        "task1 (2 predictions): exact_match 50.0000  rouge1 75.0000  rougeL 75.0000",
        "task2 (1 predictions): exact_match 0.0000  rouge1 100.0000  rougeL 50.0000",
    ]


def test_predictions_without_a_task(capsys):
    score("--per_task", content=json.dumps({"prediction": "x", "references": ["x"]}))
    assert "None (1 predictions): exact_match 100" in capsys.readouterr().out


def test_tables(capsys):
    """Empty cells are no references, unless all of them are."""
    for name, delimiter in (("t.csv", ","), ("t.tsv", "\t")):
        rows = [
            ["p", "r1", "r2"],
            ["", "Paris", ""],
            [".", "", "Rome"],
            ["x", "y", "X"],
            ["", "", ""],
        ]
        with open(name, "w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows(rows[:-1])
            file.write(delimiter * 2 + "\n")
        flags = ["--prediction_column", "p", "--reference_columns", "r1", "r2"]
        score(*flags, name=name)
        assert "exact_match 50.0000" in capsys.readouterr().out


@needs_shared
@pytest.mark.parametrize(
    "name, mean, published", [("llama", 57.9853, 58.0104), ("flan_t5", 50.5539, 50.5839)]
)
def test_published_rouge_l(name, mean, published, capsys):
    path = SHARED / "data/rouge" / f"alpaca_plus_{name}_pos_control_validation_seen.csv"
    flags = ["--prediction_column", "y_pred", "--reference_columns", "y_true"]
    score(*flags, name=str(path))
    assert capsys.readouterr().out.endswith(f"rougeL {mean}\n")
    assert abs(mean - published) < 0.05  # which is a median of a bootstrap


@pytest.mark.parametrize(
    "record, words, message",
    [
        ({"text": "x"}, [], "no prediction and references in ['text']"),
        ({"prediction": "x", "references": [None]}, [], "no prediction and references"),
        ({"generations": [], "references": ["x"], "category": []}, [], "no prediction"),
        ({"generations": 7, "references": ["x"]}, [], "no prediction and references"),
        ({}, ["--prediction_column", "y"], "a table needs both --prediction_column"),
        (None, [], "p.jsonl: no predictions"),
    ],
)
def test_mistakes(record, words, message, capsys):
    content = "" if record is None else json.dumps(record)
    assert score(*words, content=content) == 2
    assert message in capsys.readouterr().err


def test_a_column_that_is_missing_is_no_empty_cell(capsys):
    pathlib.Path("t.csv").write_text("p,r\nx,x\n")
    assert score("--prediction_column", "p", "--reference_columns", "r", "R", name="t.csv") == 2
    assert "no prediction and references in ['p', 'r']" in capsys.readouterr().err
