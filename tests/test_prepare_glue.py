"""data/prepare_glue.py: the prompt and the answer of every task by hand, rows that are wrong."""

import json
import pathlib

import pytest
from conftest import SHARED, needs_shared

import prepare_glue

# a row that has the columns of all tasks; white space around a text goes
ROW = {"sentence": ' They\r"rode. ', "sentence1": "A.", "sentence2": "B.", "question": "Q?"}
ROW.update({"question1": "A?", "question2": "B?", "#1 String": "A.", "#2 String": "B."})
ROW.update({"premise": "P.", "hypothesis": "H.", "passage": "a\u2028b", "word": "w"})
ROW.update({"choice1": "C.", "choice2": "D."})
EXPECTED = {  # task: its label column, a label, the prompt, the completion
    "cola": ("label", "1", 'cola sentence: They\r"rode.', "acceptable"),
    "sst2": ("label", "0", 'sst2 sentence: They\r"rode.', "negative"),
    "mrpc": ("Quality", "1", "mrpc sentence1: A. sentence2: B.", "equivalent"),
    "stsb": ("score", "2.5", "stsb sentence1: A. sentence2: B.", "2.4"),
    "qqp": ("is_duplicate", "1", "qqp question1: A? question2: B?", "duplicate"),
    "mnli": ("gold_label", "neutral", "mnli hypothesis: B. premise: A.", "neutral"),
    "mnli_mismatched": ("gold_label", "neutral", "mnli hypothesis: B. premise: A.", "neutral"),
    "qnli": ("label", "entailment", 'qnli question: Q? sentence: They\r"rode.', "entailment"),
    "rte": ("label", "not_entailment", "rte sentence1: A. sentence2: B.", "not_entailment"),
    "wnli": ("label", "1", "wnli sentence1: A. sentence2: B.", "entailment"),
    "boolq": ("label", True, "boolq passage: a\u2028b question: Q?", "True"),
    "cb": ("label", "contradiction", "cb hypothesis: H. premise: P.", "contradiction"),
    "copa": ("label", 1, "copa choice1: C. choice2: D. premise: P. question: Q?", "choice2"),
    "superglue_rte": ("label", "entailment", "rte hypothesis: H. premise: P.", "entailment"),
    "wic": ("label", False, "wic sentence1: A. sentence2: B. word: w", "False"),
}


def prepare(task, *words, out="out.json"):
    """What was written, or the exit code."""
    try:
        prepare_glue.main(["--task", task, "--data_dir", ".", "--out", out, *words])
    except SystemExit as stop:
        return stop.code
    return json.loads(pathlib.Path(out).read_text())


def write(name, *lines):
    pathlib.Path(name).write_bytes("".join(f"{line}\n" for line in lines).encode())


@pytest.mark.parametrize("task", EXPECTED)
def test_prompt_and_answer(task, capsys):
    column, label, prompt, completion = EXPECTED[task]
    files = prepare_glue.TASKS[task].files
    row = {**ROW, column: label}
    for name in files.values():
        if name.endswith(".jsonl"):
            write(name, json.dumps(row), "")
        elif task == "cola":
            write(name, "\t".join(["gj04", "1", "", ROW["sentence"]]))
        else:
            write(name, "\t".join(row), "\t".join(row.values()), "")
    record = {"prompt": prompt, "completion": completion}
    if task == "stsb":
        record["references"] = ["2.5"]
    assert prepare(task) == {split: [record] for split in files}
    shown = capsys.readouterr().out.splitlines()[-1]
    assert shown.startswith("python seq2seq.py --model_init_path") == ("train" in files)


def test_every_task_has_its_line():
    assert list(EXPECTED) == list(prepare_glue.TASKS)


def test_stsb_scores_are_rounded_as_in_t5():
    record = prepare_glue.to_record
    for score, rounded in {"0.3": "0.4", "4.400": "4.4", "3.75": "3.8", "0.1": "0.0"}.items():
        row = {**ROW, "score": score}
        assert record(row, prepare_glue.TASKS["stsb"])["completion"] == rounded


def test_rows_that_are_wrong_are_named_or_dropped(capsys):
    good = "fine\t1"
    write("train.tsv", "sentence\tlabel", good, "too\tmany\t1", " \t1", "x\t2", good)
    write("dev.tsv", "sentence\tlabel", good)
    assert prepare("sst2") == 2
    errors = capsys.readouterr().err
    for text in (
        "train.tsv, row 3: 3 columns, expected 2; --skip_malformed",
        "train.tsv, row 4: 'sentence' is empty",
        "train.tsv, row 5: label '2', expected 0 or 1",
    ):
        assert text in errors
    assert len(prepare("sst2", "--skip_malformed")["train"]) == 2
    assert "dropped 3 rows; the first: train.tsv, row 3" in capsys.readouterr().out
    assert prepare("sst2", "--skip_malformed") == 2  # out.json is there


@pytest.mark.parametrize(
    "task, lines, message",
    [
        ("sst2", [], "dev.tsv: no records"),
        ("sst2", ["text\tlabel", "x\t1"], "no 'sentence'; there is text, label"),
        ("stsb", ["sentence1\tsentence2\tscore", "a\tb\t5.1"], "expected a score from 0 to 5"),
        ("cb", ['{"premise": '], "val.jsonl, line 1: Expecting value"),
        ("cb", ['{"premise": null, "hypothesis": "b", "label": "neutral"}'], "'premise' is empty"),
    ],
)
def test_what_is_refused(task, lines, message, capsys):
    write(prepare_glue.TASKS[task].files["eval"], *lines)
    assert prepare(task, "--skip_malformed") == 2
    output = capsys.readouterr()
    assert message in output.err + output.out
    assert "No such file" in output.err  # the other file


@needs_shared
@pytest.mark.parametrize(
    "task, data_dir, n_train, n_eval",
    [
        ("sst2", "SST-2", {"negative": 887, "positive": 1113}, {"negative": 209, "positive": 291}),
        ("cola", "CoLA", {"unacceptable": 614, "acceptable": 1386}, None),
        ("rte", "RTE", {"entailment": 495, "not_entailment": 505}, None),
        ("stsb", "STS-B", None, None),
    ],
)
def test_real_files(task, data_dir, n_train, n_eval):
    found = prepare(task, "--data_dir", str(SHARED / "data" / data_dir))
    for split, expected in (("train", n_train), ("eval", n_eval)):
        answers = [record["completion"] for record in found[split]]
        for answer, n in (expected or {}).items():
            assert answers.count(answer) == n
    if task == "stsb":
        scores = [float(record["references"][0]) for record in found["train"]]
        assert len(scores) == 1875 and round(sum(scores) / 1875, 3) == 2.648
