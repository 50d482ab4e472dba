"""data/prepare_tsv.py: small tables to records by hand, every way to get a table wrong, nothing on both sides of a split."""

import json

import prepare_tsv
import pytest


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """prepare(tables, "more flags") -> (exit code, what was written or None, stdout, stderr); tables: {split: text or bytes}."""
    def prepare(tables, *words, out="out.json"):
        monkeypatch.chdir(tmp_path)
        for split, text in tables.items():
            (tmp_path / f"{split}.tsv").write_bytes(text if isinstance(text, bytes) else text.encode())
        files = [word for split in tables for word in (f"--{split}", f"{split}.tsv")]
        before = (tmp_path / out).exists()
        try:
            code = prepare_tsv.main([*files, *words, "--out", out])
        except SystemExit as stop:
            code = stop.code
        written = json.loads((tmp_path / out).read_text(encoding="utf-8")) if (tmp_path / out).exists() and not before else None
        return code, written, *capsys.readouterr()
    return prepare


SENTENCES = ["--input", "sentence", "--target", "label"]
NUMBERED = ["--no_header", "--input", "1", "--target", "0"]
PAIRS = ["--text", "first: {a} second: {b}", "--target", "y"]


def texts(written, split):
    return [record["input"] for record in written[split]]


# ------------------------------------------------------------------------------------------------ records


def test_header_one_column(prepare):
    """Quotation marks and U+2028 are text, white space around a column is not, a byte-order mark and CRLF are no part of it."""
    table = '\ufeffsentence\tlabel\r\n"fine\t1\r\nnot "so" good \t0\r\none\u2028line\t1\r\n\r\n'
    code, written, shown, _ = prepare({"train": table, "eval": "label\tsentence\n0\tdull\n"}, *SENTENCES)
    assert code == 0
    assert written == {"train": [{"input": '"fine', "target": 1.0}, {"input": 'not "so" good', "target": 0.0},
                                 {"input": "one\u2028line", "target": 1.0}], "eval": [{"input": "dull", "target": 0.0}]}
    assert shown.splitlines()[0] == "out.json: 3 train, 1 eval"
    assert "train: 0 repeated dropped; mean target 0.6667; characters 0% 5 5% 5 50% 8 95% 13 100% 13" in shown
    assert str(written["train"][0]) in shown and str(written["train"][1]) in shown


def test_numbered_columns_and_words_as_labels(prepare):
    code, written, shown, _ = prepare({"train": "ham\thello\nspam\twin £5\nother\tbye\nham\tok\n"}, *NUMBERED, "--positive", "spam")
    assert code == 0
    assert written == {"train": [{"input": "hello", "target": 0.0}, {"input": "win £5", "target": 1.0},
                                 {"input": "bye", "target": 0.0}, {"input": "ok", "target": 0.0}]}
    assert "target 1: 'spam' (1 lines); target 0: 'ham' (2), 'other' (1)" in shown


def test_template_keeps_its_columns(prepare):
    """A column's own braces are not a template; the score keeps its decimals; --keep adds a column."""
    table = "id\ta\tb\ty\tgenre\n7\ta {b} c\td\t3.75\tnews\n8\te\tf\t0\tforum\n"
    code, written, _, _ = prepare({"train": table}, *PAIRS, "--keep", "genre")
    assert code == 0
    assert written["train"] == [{"input": "first: a {b} c second: d", "target": 3.75, "a": "a {b} c", "b": "d", "genre": "news"},
                                {"input": "first: e second: f", "target": 0.0, "a": "e", "b": "f", "genre": "forum"}]


def test_template_with_numbers_and_reserved_names(prepare):
    code, written, _, _ = prepare({"train": "x\ty\t1\n"}, "--no_header", "--text", "{1}|{0}", "--target", "2")
    assert (code, written) == (0, {"train": [{"input": "y|x", "target": 1.0, "0": "x", "1": "y"}]})
    code, written, _, _ = prepare({"train": "input\ttarget\nx\t1\n"}, "--text", "Say {input}!", "--target", "target", out="b.json")
    assert (code, written) == (0, {"train": [{"input": "Say x!", "target": 1.0}]})


# ------------------------------------------------------------------------------------------------ repeats, both sides


def test_repeats_are_dropped_and_torn_texts_stay(prepare):
    table = "sentence\tlabel\nso  good\t1\nSo good\t1\nbad\t0\nbad\t1\nbad\t0\n"
    code, written, shown, _ = prepare({"train": table}, *SENTENCES)
    assert code == 0
    assert [(r["input"], r["target"]) for r in written["train"]] == [("so  good", 1.0), ("bad", 0.0), ("bad", 1.0)]
    assert "train: 2 repeated dropped; texts kept with several targets: 1; mean target" in shown


def test_no_text_is_in_two_splits(prepare):
    """The later split keeps it, whatever the target says."""
    head = "sentence\tlabel\n"
    tables = {"train": head + "a\t1\nb\t0\nC\t1\nc\t1\nd\t1\n", "eval": head + "b\t1\ne\t0\nf\t1\n", "test": head + "c\t1\nf\t1\ng\t0\n"}
    code, written, shown, _ = prepare(tables, *SENTENCES)
    assert code == 0
    assert {split: texts(written, split) for split in written} == {"train": ["a", "d"], "eval": ["b", "e"], "test": ["c", "f", "g"]}
    assert "train: 1 repeated, 1 also in eval, 1 also in test dropped; mean" in shown
    assert "eval: 0 repeated, 1 also in test dropped; mean" in shown


def test_hold_out(prepare):
    """Shares of the texts, every text once, repeats with other targets on one side, and independent of the other lines."""
    lines = [f"{'ham' if i % 3 else 'spam'}\ttext number {i % 500}\n" for i in range(1000)]
    code, written, shown, _ = prepare({"train": "".join(lines)}, *NUMBERED, "--positive", "spam", "--holdout", "0.2", "0.1")
    sides = {split: set(texts(written, split)) for split in written}
    assert code == 0 and list(sides) == ["train", "eval", "test"]
    assert sum(map(len, sides.values())) == len(set.union(*sides.values())) == 500
    assert 75 <= len(sides["eval"]) <= 125 and 30 <= len(sides["test"]) <= 70  # 100 and 50 expected
    assert len(written["eval"]) > len(sides["eval"]) and "several targets" in shown
    code, fewer, _, _ = prepare({"train": "".join(reversed(lines[:300]))}, *NUMBERED, "--positive", "spam", "--holdout", "0.2", "0.1",
                                out="fewer.json")
    assert code == 0 and all(set(texts(fewer, split)) <= sides[split] for split in sides)
    code, other, _, _ = prepare({"train": "".join(lines)}, *NUMBERED, "--positive", "spam", "--holdout", "0", "0.1", out="other.json")
    assert code == 0 and list(other) == ["train", "test"]


# ------------------------------------------------------------------------------------------------ what is refused


def test_all_problems_at_once_with_their_lines(prepare):
    tables = {"train": "sentence\tlabel\nfine\t1\ntoo\tmany\t1\nfew\n\t1\nword\tgood\ninf\tinf\nnone\t\n", "eval": "text\tlabel\nx\t1\n"}
    code, written, shown, errors = prepare(tables, *SENTENCES)
    assert (code, written, shown) == (2, None, "")
    assert errors.splitlines() == [
        "train.tsv, line 3: number of columns 3, expected 2",
        "train.tsv, line 4: number of columns 1, expected 2",
        "train.tsv, line 5: the text is empty",
        "train.tsv, line 6: target 'good' is no number (words: --positive WORD)",
        "train.tsv, line 7: target 'inf' is no number (words: --positive WORD)",
        "train.tsv, line 8: target '' is no number (empty)",
        "eval.tsv: no columns named 'sentence'; it has text, label",
    ]


def test_many_problems_are_counted(prepare):
    code, _, _, errors = prepare({"train": "sentence\tlabel\n" + "x\n" * 100}, *SENTENCES)
    assert code == 2 and len(errors.splitlines()) == 41 and errors.endswith("... and 60 more problems\n")


@pytest.mark.parametrize("table, words, message", [
    ("a\tlabel\ta\nx\t1\ty\n", ["--input", "a", "--target", "label"], "train.tsv: 2 columns named 'a'; it has a, label, a"),
    ("x\t1\n", ["--no_header", "--input", "sentence", "--target", "1"], "train.tsv: no columns named 'sentence'; it has 0, 1"),
    ("a\tb\ty\n1\t2\t3\n", ["--text", "{a} {c}", "--target", "y"], "train.tsv: no columns named 'c'; it has a, b, y"),
    ("a\tb\ty\n1\t2\t3\n", ["--text", "a", "--target", "y"], "--text 'a': no {column} in it"),
    ("ham\tx\n\ty\nspam\tz\n", [*NUMBERED, "--positive", "spam"], "train.tsv, line 2: target '' is no number (empty)"),
    ("ham\tx\nspam\ty\n", [*NUMBERED, "--positive", "Spam"], "--positive 'Spam': no target is that; there are 'ham', 'spam'"),
    ("1\tx\n", [*NUMBERED, "--holdout", "0.5", "0.5"], "--holdout [0.5, 0.5]: expected one or two shares"),
    ("1\tx\n", [*NUMBERED, "--holdout", "nan"], "--holdout [nan]: expected one or two shares"),
    ("1\tx\n", [*NUMBERED, "--holdout", "1e-9"], "eval: no record is left (0 repeated dropped)"),
    ("sentence\tlabel\n", SENTENCES, "train: no record is left"),
    ("", SENTENCES, "train.tsv: no columns named 'sentence'"),
    (b"sentence\tlabel\n\xff\t1\n", SENTENCES, "train.tsv: cannot be read ('utf-8' codec"),
    ("sentence\tlabel\nx\t1\n", [*SENTENCES, "--eval", "nowhere.tsv"], "nowhere.tsv: cannot be read"),
    ("sentence\tlabel\nx\t1\n", [*SENTENCES, "--eval", "train.tsv"], "train: no record is left (0 repeated, 1 also in eval dropped)"),
    ("sentence\tlabel\nx\t1\n", [*SENTENCES, "--eval", "train.tsv", "--holdout", "0.1"], "--holdout: a share for eval, which has a file"),
    ("sentence\tlabel\nx\t1\n", [*SENTENCES, "--text", "{sentence}"], "not allowed with argument"),
    ("sentence\tlabel\nx\t1\n", [*SENTENCES, "--hold", "0.1"], "unrecognized arguments: --hold 0.1")])
def test_refused(prepare, table, words, message):
    code, written, shown, errors = prepare({"train": table}, *words)
    assert (code, written, shown) == (2, None, "") and message in errors


def test_an_existing_file_is_never_overwritten(prepare, tmp_path):
    table = {"train": "sentence\tlabel\nx\t1\n"}
    assert prepare(table, *SENTENCES)[0] == 0
    before = (tmp_path / "out.json").read_bytes()
    code, _, _, errors = prepare({"train": "sentence\tlabel\ny\t1\n"}, *SENTENCES)
    assert (code, errors) == (2, "--out out.json: exists\n") and (tmp_path / "out.json").read_bytes() == before
    for out in ("out.jsonl", "nowhere/out.json"):
        code, written, _, errors = prepare(table, *SENTENCES, out=out)
        assert (code, written) == (2, None) and "expected a name that ends in .json, in a folder that exists" in errors
