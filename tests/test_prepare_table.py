"""data/prepare_table.py: renaming and templates by hand, awkward cells and files, mistakes, real
tables."""

import json
import pathlib

import pytest
from conftest import SHARED, needs_shared

import prepare_table

CSV = 'q,a,part\n"2 + 2, ""please"" =", 4 ,train\n"one\ntwo",three,dev\n'
ROWS = [{"q": "x", "a": "y"}, {"q": "z", "a": "w"}]
PAIR = ["prompt=q", "completion=a"]


def prepare(content, *words, name="t.json", out="out.json"):
    """What is written of a file, or the exit code."""
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    pathlib.Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    pathlib.Path(out).unlink(missing_ok=True)
    try:
        prepare_table.main(["--train", name, "--out", out, *words])
    except SystemExit as stop:
        return stop.code
    return json.loads(pathlib.Path(out).read_text())


@pytest.mark.parametrize(
    "words, first",
    [
        (["prompt=q", "completion=a"], {"prompt": '2 + 2, "please" =', "completion": "4"}),
        (["prompt=q", "a"], {"prompt": '2 + 2, "please" =', "a": " 4 "}),
        (["input={q}\\n{a}!", "target=a"], {"input": '2 + 2, "please" =\n4!', "target": 4.0}),
        (["text=[{q}]", "target=part", "--positive", "train"], {"text": '[2 + 2, "please" =]'}),
    ],
)
def test_columns_are_renamed_and_templates_filled(words, first):
    if "--positive" in words:
        first = {**first, "target": 1.0}
    first_row = CSV[: CSV.index('"one')]
    assert prepare(first_row, *words, name="t.csv") == {"train": [first]}


def test_cells_of_all_kinds():
    row = {"a.b": "dot", "c [d]": "{f}", "f": 1.5, "g": True, "h": {"i": [{"j": " deep "}, 2]}}
    words = ["text={a.b}|{c [d]}|{f}|{g}|{h.i.0.j}|{h.i.1}|{}", "h", "prompt=n"]
    alpaca = [{"instruction": "Go.", "input": "", "output": 5}]
    assert prepare(alpaca, "instruction", "input", "output") == {
        "train": [{"instruction": "Go.", "output": "5"}]
    }
    found = prepare([{**row, "n": [1, " two "]}], *words)
    text = "dot|{f}|1.5|true|deep|2|{}"
    assert found == {"train": [{"text": text, "h": row["h"], "prompt": ["1", "two"]}]}


@pytest.mark.parametrize(
    "content, words",
    [
        ({"train": ROWS[:1], "validation": ROWS[1:]}, PAIR),
        ([{**ROWS[0], "in": "training"}, {**ROWS[1], "in": "dev"}], [*PAIR, "split=in"]),
        ([ROWS[0], {**ROWS[1], "split": "valid"}], PAIR),
    ],
)
def test_a_list_or_a_column_says_the_split(content, words):
    train, evaluation = [{"prompt": row["q"], "completion": row["a"]} for row in ROWS]
    assert prepare(content, *words) == {"train": [train], "eval": [evaluation]}
    # but what is given as --eval is not trained
    words = [*words, "--eval", "t.json"]
    pathlib.Path("none.csv").write_text("q,a\n")
    assert prepare("q,a\n", *words, name="none.csv")["eval"] == [train, evaluation]


def test_columns_without_a_header():
    table = "ham\thi\nspam\twin\n"
    words = ["--no_header", "input=1", "target=0", "--positive", "spam"]
    expected = [{"input": "hi", "target": 0.0}, {"input": "win", "target": 1.0}]
    assert prepare(table, *words, name="t.tsv") == {"train": expected}


def test_chats_are_kept_as_they_are_and_held_out_by_their_question():
    def chat(i):
        turns = ["Be brief.", f"q {i % 40}", f"a {i}"]
        return [{"role": r, "content": t} for r, t in zip(("system", "user", "assistant"), turns)]

    rows = [{"chat": chat(i)} for i in range(80)]
    found = prepare(rows, "messages=chat", "--eval_fraction", "0.3")
    assert found["train"][0] == {"messages": chat(0)}
    train, evaluation = [
        {record["messages"][1]["content"] for record in found[split]} for split in ("train", "eval")
    ]
    assert len(train) + len(evaluation) == 40 and not train & evaluation


@pytest.mark.parametrize(
    "content, words, message",
    [
        (
            ROWS,
            ["prompt=question", "completion=a"],
            "2 records, first t.json, row 1: no 'question'",
        ),
        ([{"q": None}], ["prompt=q"], "'q' is empty; --skip_malformed drops it"),
        ([{"q": {"x": 1}}], ["prompt=q"], "'q' is {'x': 1}, expected a text: name its parts"),
        ([{"q": [1]}], ["text={q}"], "'q' is [1], expected a text"),
        (ROWS, ["input=q", "target=a"], "'a' is 'y', no number: --positive WORD makes 1 and 0"),
        (ROWS, ["input=q", "target=a", "--positive", "Y"], "--positive Y: no row has this word"),
        (ROWS, ["prompt=q", "chosen=a", "rejected=a"], "chosen and rejected are equal"),
        (ROWS, [*PAIR, "split=a"], "split 'y', expected train, eval or test"),
        ([{"q": [3]}], ["messages=q"], "expected messages: a list of objects"),
        ([], PAIR, "out.json: no records: no file, an empty one"),
        (ROWS, ["prompt="], "invalid field value: 'prompt='"),
        ('[{"q": NaN}]', PAIR, "NaN is no JSON: write null or a number"),
        (ROWS, [*PAIR, "--eval", "none.csv"], "none.csv, behind row 0: [Errno 2]"),
    ],
)
def test_mistakes(content, words, message, capsys):
    assert prepare(content, *words) == 2
    assert message in capsys.readouterr().err
    assert not pathlib.Path("out.json").exists()


def test_rows_that_cannot_be_used_are_dropped_and_counted(capsys):
    table = "q,a\nx,y\n,y\nz\nw,v\n"
    found = prepare(table, *PAIR, "--skip_malformed", name="t.csv")
    assert [record["prompt"] for record in found["train"]] == ["x", "w"]
    assert "dropped 2 rows; the first: t.csv, row 3: 'q' is empty" in capsys.readouterr().out


@needs_shared
@pytest.mark.parametrize(
    "path, words, sizes",
    [
        ("gsm8k_train.jsonl", ["prompt=question", "completion=answer"], {"train": 2000}),
        (
            "RTE/train.tsv",
            ["input={sentence1} {sentence2}", "target=label", "--positive", "entailment"],
            {"train": 999},
        ),
        (
            "sms_spam/SMSSpamCollection_2000.tsv",
            [*("--no_header", "input=1", "target=0", "--positive", "spam")],
            {"train": 1923},
        ),
        (
            "alpaca/alpaca_en_demo_500.json",
            ["prompt={instruction}\\n\\n{input}", "completion=output", "--skip_malformed"],
            {"train": 212},
        ),
        (
            "reasoning_teacher/data/dataset/multiarith.json",
            ["prompt=question", "completion=answer"],
            {"train": 580},
        ),
    ],
)
def test_real_tables(path, words, sizes):
    prepare_table.main(["--train", str(SHARED / "data" / path), "--out", "out.json", *words])
    found = json.loads(pathlib.Path("out.json").read_text())
    assert {split: len(found[split]) for split in found} == sizes
