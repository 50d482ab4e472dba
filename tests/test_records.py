"""data/records.py: tables and JSON of many kinds; what is held out, dropped, written."""

import argparse
import gzip
import json
import pathlib

import pytest

import common
import records
import seq2seq


def read(name, content, **options):
    """([record], problems)"""
    if isinstance(content, str):
        content = content.encode()
    pathlib.Path(name).write_bytes(content)
    problems = []
    rows = list(records.read(name, problems, **options))
    return [row for _, _, row in rows], problems


def test_all_kinds_of_files_give_the_same_records():
    rows = [{"a": "1", "b": 'x "y"'}, {"a": "", "b": "über\u2028z"}]
    lines = "".join(json.dumps(row) + "\n\n" for row in rows)
    for name, content in {
        "t.csv": '\ufeffa,b\r\n1,"x ""y"""\r\n\r\n,über\u2028z\r\n',
        "t.tsv": 'a\tb\n1\tx "y"\n\n\tüber\u2028z\n',
        "t.jsonl": lines,
        "t.json": json.dumps(rows),
        "wrapped.json": json.dumps({"version": "1", "tags": ["x"], "data": rows}),
        "columns.json": json.dumps({"a": ["1", ""], "b": [rows[0]["b"], rows[1]["b"]]}),
        "t.jsonl.gz": gzip.compress(lines.encode()),
        "t.tsv.gz": gzip.compress('a\tb\n1\tx "y"\n\tüber\u2028z\n'.encode()),
    }.items():
        assert read(name, content) == (rows, []), name
    assert read("t.tsv", '1\tx "y"\n', names=["a", "b"]) == (rows[:1], [])
    assert read("t.tsv", "1\t2\n", names=[]) == ([{"0": "1", "1": "2"}], [])
    assert read("t.csv", "\n\na,b\n1,2\n")[0] == [{"a": "1", "b": "2"}]
    # a line break in a cell of a .csv, and a lone "\r" in a .tsv, are text
    assert read("t.csv", 'a\n"x\ny"\n')[0] == [{"a": "x\ny"}]
    assert read("t.tsv", "a\nx\ry\r\n")[0] == [{"a": "x\ry"}]
    assert read("t.csv", f"a\n{'x' * 200_000}\n")[1] == []


def test_lists_are_splits():
    lists = {"train": [{"a": 1}], "validation": [{"a": 2}], "test": []}
    pathlib.Path("t.json").write_text(json.dumps(lists))
    found = list(records.read("t.json", []))
    assert [(split, row["a"]) for _, split, row in found] == [("train", 1), ("eval", 2)]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", 'a,b\n1,"x\n', "t.csv, behind row 1: unexpected end of data"),
        ("t.csv", "a,b\n1\n", "1 columns, expected 2"),
        ("t.tsv", "a\ta\n1\t2\n", "a key is repeated among a, a"),
        ("t.jsonl", '{"a": 1, "a": 2}\n', "a key is repeated among a, a: rename it"),
        ("t.jsonl", '{"a": NaN}\n', "t.jsonl, line 1', 'NaN is no JSON: write null"),
        ("t.jsonl", '{"a": 1}\n\ufeff{"a": 2}\n', "a byte order mark inside the file"),
        ("t.csv", "a\n1\n\ufeffa\n", "a byte order mark inside the file"),
        ("t.json", "[" * 100_000, "nested too deeply"),
        (
            "t.json",
            '{"a": [{"x": 1}], "b": [{"x": 1}]}',
            "expected one list, or train, eval and test: a, b",
        ),
        (
            "t.json",
            '{"a": [1, 2], "b": [1]}',
            "zip() argument 2 is shorter than argument 1",
        ),
        ("t.json", '[{"a": 1}, 2]', "t.json, row 2', '2: expected an object"),
        (
            "t.json",
            '{"a": "1", "b": [2]}',
            "t.json, behind row 0: expected a list of objects, or columns",
        ),
        ("t.json", '"a"', "expected a list of objects, or columns"),
        ("t.json.gz", b"no gzip", "t.json.gz, behind row 0: Not a gzipped file"),
        (
            "t.tsv.gz",
            gzip.compress(b"a\tb\n" * 99, mtime=0)[:-9],
            "behind row 99: Compressed file ended before",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_named(name, content, message):
    _, problems = read(name, content)
    assert message in str(problems)


def test_a_json_file_that_is_none_is_a_problem():
    pathlib.Path("t.json").write_text('{"a": ')
    problems = []
    assert records.load_json(pathlib.Path("t.json"), problems) is None
    assert records.load_json(pathlib.Path("none.json"), problems) is None
    assert len(problems) == 2 and "t.json: Expecting" in problems[0]


def test_what_is_held_out_depends_on_the_key_alone():
    args = argparse.Namespace(eval_fraction=0.2, test_fraction=0.1)
    splits = [records.hold_out(args, "train", f"key {i}") for i in range(2000)]
    assert 340 < splits.count("eval") < 460 and 150 < splits.count("test") < 250
    assert splits == [records.hold_out(args, "train", f"key {i}") for i in range(2000)]
    assert {records.hold_out(args, "test", f"key {i}") for i in range(100)} == {"test"}


def test_clean_drops_repeats_and_what_a_later_split_has():
    def record(prompt, completion="x"):
        return {"prompt": prompt, "completion": completion}

    splits = {
        "train": [
            record("A b"),
            record("a  B"),
            record("c"),
            record("c", "y"),
            record("É"),
            record("é"),
        ],
        "eval": [record("C "), record("e")],
        "test": [record("D"), record("e"), record("E")],
    }
    records.clean(splits, lambda record: [record["prompt"]])
    assert splits == {
        "train": [record("A b"), record("É")],
        "eval": [record("C ")],
        "test": [record("D"), record("e")],
    }


def test_what_is_written_is_what_a_trainer_reads(capsys):
    splits = {
        "train": [{"prompt": ["a b", "c", "d"], "completion": "x\u2028", "references": ["y"]}] * 2,
        "eval": [{"prompt": "half \ud800", "completion": "x"}],
    }
    for name in ("data/t.json", "data/t.jsonl"):
        records.write(name, splits)
        found = {"train": [], "eval": []}
        for _, split, record in common.read_records(pathlib.Path(name), []):
            found[split].append(record)
        assert found == splits
        records.show(name, splits)
    assert list(pathlib.Path("data").glob("*.tmp")) == []
    shown = capsys.readouterr().out
    assert "data/t.json: 2 train records\n" in shown
    problems = []
    args = seq2seq.parse_args(["--data", "t"])
    seq2seq.read_examples(args, problems)
    assert "'prompt' holds bytes that are no UTF-8, or half a character" in str(problems)


def test_a_new_file_is_none_that_exists():
    pathlib.Path("there.json").touch()
    for name in ("there.json", "no/folder.json", "a.csv"):
        with pytest.raises(argparse.ArgumentTypeError):
            records.new_file(name)
    assert records.new_file("new.jsonl") == pathlib.Path("new.jsonl")
