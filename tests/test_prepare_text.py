"""data/prepare_text.py and data/prepare_tokenizer.py: the ids of a corpus, what is held out,
mistakes; a tokenizer as T5's."""

import gzip
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "data"))

import numpy as np
import pytest
from transformers import AutoTokenizer

import prepare_text
import prepare_tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY_T5 = ROOT / "models" / "tiny-t5"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_T5)


def write(folder, files):
    """files: {name: text, or bytes}"""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.encode()
        path.write_bytes(content)


def prepare(folder, *words, out="made"):
    """corpus.json, or the exit code"""
    flags = ["--input", str(folder / "text"), "--tokenizer", str(TINY_T5)]
    try:
        prepare_text.main([*flags, "--out", str(folder / out), *words])
    except SystemExit as stop:
        return stop.code
    return json.loads((folder / out / "corpus.json").read_text())


def ids(folder, split, out="made"):
    return np.fromfile(folder / out / f"{split}.ids", "uint16").tolist()


def end_to_end(tokenizer, *documents):
    rows = tokenizer(list(documents), add_special_tokens=False).input_ids
    return np.concatenate(rows).tolist()


def test_files_of_all_kinds_give_their_documents_end_to_end(tmp_path, tokenizer):
    records = '{"text": "of a record"}\n\n{"text": "held out", "split": "eval"}\n{"text": ""}\n'
    files = {
        "a.txt": "a document\r\nof two lines\r\n \r\nanother\r\n\r\n",
        "b.txt": "\ufeffa line\nschön\n\n",
        "c.jsonl": records,
        "d.txt.gz": gzip.compress(b"packed\nlines"),
        "d.eval.txt": "held out by name",
        "test/e.txt": "held out by folder",
        "test.txt": "held out too",
        "notes.md": "no text of the corpus",
    }
    write(tmp_path / "text", files)
    about = prepare(tmp_path)
    train = ["a document\nof two lines", "another", "a line", "schön"]
    train += ["of a record", "packed", "lines"]
    assert ids(tmp_path, "train") == end_to_end(tokenizer, *train)
    assert ids(tmp_path, "eval") == end_to_end(tokenizer, "held out", "held out by name")
    assert ids(tmp_path, "test") == end_to_end(tokenizer, "held out by folder", "held out too")
    assert about["documents"] == {"train": 7, "eval": 2, "test": 2}
    for split in ("train", "eval", "test"):
        assert about["tokens"][split] == len(ids(tmp_path, split))
    assert (about["format"], about["dtype"], about["special"]) == (2, "uint16", 0)


def test_the_corpus_depends_on_the_text_alone(tmp_path, monkeypatch):
    lines = [f"sentence {i} of the text" for i in range(400)]
    write(tmp_path / "text", {"a.txt": "\n".join(lines)})
    about = prepare(tmp_path, "--eval_fraction", "0.1")
    monkeypatch.setattr(prepare_text, "BLOCK", 50)
    assert prepare(tmp_path, "--eval_fraction", "0.1", out="again") == about
    assert ids(tmp_path, "train") == ids(tmp_path, "train", "again")
    assert 20 < about["documents"]["eval"] < 60

    # a document's side is its own: it does not move with the others
    write(tmp_path / "text", {"a.txt": "\n".join(reversed(lines))})
    reverse = prepare(tmp_path, "--eval_fraction", "0.1", out="reverse")
    assert sorted(ids(tmp_path, "eval")) == sorted(ids(tmp_path, "eval", "reverse"))
    assert reverse["sha256"] != about["sha256"]


def test_a_long_line_is_cut_at_blanks_and_loses_nothing(tmp_path, tokenizer, monkeypatch):
    line = "some words " * 50 + "x" * 130
    write(tmp_path / "text", {"a.txt": line, "b.jsonl": json.dumps({"text": line})})
    monkeypatch.setattr(prepare_text, "LONGEST", 64)
    about = prepare(tmp_path)
    text = tokenizer.decode(ids(tmp_path, "train"))
    assert about["documents"]["train"] > 20
    assert text.replace(" ", "") == 2 * line.replace(" ", "")
    assert text.count("some words") == 100  # no word is cut but the one of 130 letters


def test_special_tokens_in_the_text_are_left_out(tmp_path, tokenizer, capsys):
    write(tmp_path / "text", {"a.txt": "an end</s>\n<extra_id_3> a sentinel <pad>"})
    about = prepare(tmp_path)
    assert about["special"] == 3 and "left out 3 special tokens" in capsys.readouterr().out
    assert ids(tmp_path, "train") == end_to_end(tokenizer, "an end", "a sentinel")


def test_a_finished_corpus_is_left_as_it_is(tmp_path, capsys):
    write(tmp_path, {"text/a.txt": "one", "made.tmp/train.ids": "of an attempt that was killed"})
    prepare(tmp_path)
    assert not (tmp_path / "made.tmp").exists()
    train = ids(tmp_path, "train")
    write(tmp_path, {"text/a.txt": "two"})
    assert prepare(tmp_path) == 2
    assert "made exists: move it away" in capsys.readouterr().err
    assert ids(tmp_path, "train") == train


MISTAKES = [
    ({"a.md": "x"}, [], "no file there that ends in .txt"),
    ({"a.txt": "\n"}, [], "there is no text in these files"),
    (
        {"a.txt": b"fine\nba\xffd\n"},
        [],
        "a.txt, up to line 2: 'text' holds bytes that are no UTF-8",
    ),
    ({"a.jsonl": b'{"text": "\xff"}'}, [], "a.jsonl"),
    ({"a.jsonl": '{"text": "\\ud83d"}'}, [], "half a character"),
    ({"a.jsonl": '{"text": "x"}\n{"text'}, [], "a.jsonl, line 2: "),
    ({"a.jsonl": '{"txt": "x"}'}, [], "'text' is missing; there is txt"),
    ({"a.jsonl": '{"text": "x", "split": "dev"}'}, [], "split 'dev'"),
    ({"a.txt.gz": "not packed"}, [], "a.txt.gz cannot be read"),
    ({"a.txt": "x"}, ["--tokenizer", "no/such/model"], "--tokenizer no/such/model"),
    ({"a.txt": "x"}, ["--tokenizer", str(ROOT / "presets")], "--tokenizer"),
    ({"a.txt": "x"}, ["--eval_fraction", "1"], "--eval_fraction: invalid share value: '1'"),
]


@pytest.mark.parametrize("files, words, message", MISTAKES)
def test_mistakes_are_named_and_nothing_is_written(tmp_path, capsys, files, words, message):
    write(tmp_path / "text", files)
    assert prepare(tmp_path, *words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("made*"))


# -------------------------------------------------------------------------------------- tokenizer


def make_tokenizer(folder, name, vocab_size):
    flags = ["--input", str(folder / "text"), "--out", str(folder / name), "--size", "tiny"]
    prepare_tokenizer.main([*flags, "--vocab_size", str(vocab_size)])


def test_a_tokenizer_as_t5s(tmp_path, capsys):
    lines = []
    for verb in ("sleeps", "dreams", "reads", "hides"):
        lines += [f"the cat {verb} under {number} trees" for number in range(9)]
    write(tmp_path / "text", {"a.txt": "\n".join(lines), "b.eval.txt": "☃ " * 99})
    make_tokenizer(tmp_path, "made", 103)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>"]) == [202, 103]
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["vocab_size"] == 256 and config["tie_word_embeddings"] is False
    text = 'the cat 5.0 {x} not_entailment ~ "quoted"'
    assert tokenizer.decode(end_to_end(tokenizer, text)) == text
    assert tokenizer.unk_token_id in end_to_end(tokenizer, "☃")  # held-out text is not learnt

    make_tokenizer(tmp_path, "again", 103)
    for name in ("spiece.model", "config.json", "tokenizer_config.json"):
        assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("name, size, message", [("text", 9, "exists"), ("new", 30000, "too high")])
def test_no_tokenizer(tmp_path, capsys, name, size, message):
    write(tmp_path / "text", {"a.txt": "a few words"})
    with pytest.raises(SystemExit):
        make_tokenizer(tmp_path, name, size)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("new*"))
