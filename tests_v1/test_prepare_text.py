"""data/prepare_text.py and data/prepare_tokenizer.py: the same tokens for any parts, workers and kills; a tokenizer as T5's."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import prepare_text
import prepare_tokenizer
import pytest
from conftest import ROOT, rows, stop_at
from test_pretrain import load, sentences, stream, text_flags
from transformers import AutoTokenizer

import common_v1 as common


def write_tokenizer(folder, text, vocab_size=500):
    """A model folder of the tiny size, narrower, with a tokenizer learnt from a file."""
    assert prepare_tokenizer.main(["--input", str(text), "--out", str(folder), "--vocab_size", str(vocab_size), "--size", "tiny"]) == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "d_model": 32, "d_ff": 48, "d_kv": 8}))


def prepare(mount, out, *words):
    try:
        return prepare_text.main(["--input", str(mount / "data" / "corpus.txt"), "--tokenizer", str(mount / "models" / "tiny"), "--out", str(mount / "data" / out),
                                  "--eval_fraction", "0.1", "--workers", "1", *map(str, words)])
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def corpus(mount):
    (mount / "data" / "corpus.txt").write_text("\n".join(sentences(300)) + "\n")
    return mount


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_number_of_parts_and_attempts_gives_the_same_bytes_and_those_of_the_cache(corpus, monkeypatch, capsys):
    assert prepare(corpus, "whole") == 0 and prepare(corpus, "parts", "--part_mb", 0.001) == 0
    whole = contents(corpus / "data" / "whole")
    assert contents(corpus / "data" / "parts") == whole and not list((corpus / "data").glob("*.parts"))
    _, [cached], _, _ = load(corpus)
    _, [data], problems, _ = load(corpus, data="whole", eval_fraction=0)
    assert problems == [] and all(stream(cached, split) == stream(data, split) for split in ("train", "eval"))
    offsets = np.frombuffer(whole["train.offsets"], np.int64)
    assert len(offsets) == data.about["train documents"] + 1 and offsets[-1] == data.about["train tokens"] == len(stream(data, "train"))
    calls, tokenize = [], prepare_text.tokenize_part

    def killed(job):
        calls.append(job)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return tokenize(job)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_text, "tokenize_part", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, "again", "--part_mb", 0.001)
    assert prepare(corpus, "other", "--part_mb", 0.001) == 0  # does not touch it
    capsys.readouterr()
    assert prepare(corpus, "again", "--part_mb", 0.001) == 0 and "4 of" in capsys.readouterr().out
    assert contents(corpus / "data" / "again") == whole
    monkeypatch.setattr(prepare_text, "tokenize_part", lambda job: 1 / 0)
    assert prepare(corpus, "again") == 0 and "prepared already" in capsys.readouterr().out


def test_a_gz_gives_the_tokens_of_its_content(corpus):
    with gzip.open(corpus / "data" / "packed.txt.gz", "wt") as file:
        file.write((corpus / "data" / "corpus.txt").read_text())
    assert prepare(corpus, "plain") == 0 and prepare(corpus, "gz", "--input", str(corpus / "data" / "packed.txt.gz"), "--part_mb", 0.001) == 0
    plain, packed = contents(corpus / "data" / "plain"), contents(corpus / "data" / "gz")
    assert plain.pop("corpus.json") != packed.pop("corpus.json") and plain == packed


def test_other_text_other_flags_and_another_tokenizer_are_refused(corpus, capsys):
    assert prepare(corpus, "made") == 0
    before = contents(corpus / "data" / "made")
    assert prepare(corpus, "made", "--documents", "line") == 2 and prepare(corpus, "made", "--eval_fraction", 0.2) == 2
    (corpus / "data" / "corpus.txt").write_text("\n".join(sentences(100, seed=3)))
    assert prepare(corpus, "made") == 2 and capsys.readouterr().err.count("made from other files or flags") == 3
    assert contents(corpus / "data" / "made") == before
    config = json.loads((corpus / "models" / "tiny" / "tokenizer_config.json").read_text())
    (corpus / "models" / "tiny" / "tokenizer_config.json").write_text(json.dumps({**config, "extra_ids": 90}))
    assert "was prepared with another tokenizer" in load(corpus, data="made", eval_fraction=0)[2][0]


@pytest.mark.parametrize("words, said", [(["--input", "nowhere"], "nowhere: no text files"), (["--tokenizer", "/models/none"], "--tokenizer /models/none"),
                                         (["--eval_fraction", "1"], "--eval_fraction 1.0"), (["--workers", "0"], "--workers 0")], ids=str)
def test_wrong_arguments_are_named(corpus, capsys, words, said):
    assert prepare(corpus, "made", *words) == 2
    assert said in capsys.readouterr().err and not (corpus / "data" / "made").exists()


def test_malformed_text_is_named_and_nothing_is_written(corpus, capsys):
    (corpus / "data" / "corpus.txt").write_bytes(b"fine\n" * 3000 + b"ba\xffd\n" + b"fine\n" * 10)
    assert prepare(corpus, "made", "--part_mb", 0.001) == 2
    assert "not UTF-8" in capsys.readouterr().err and not (corpus / "data" / "made").exists()


def test_stopped_in_the_middle_of_an_epoch_of_a_prepared_corpus_resumes_to_the_bit(corpus, run_main, monkeypatch):
    assert prepare(corpus, "made") == 0
    words = {"data": "made", "eval_fraction": 0, "max_steps": 9}
    assert run_main(text_flags(corpus, "whole", **words)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert run_main(text_flags(corpus, "stopped", **words)) == common.EXIT_SAVED
    assert run_main(text_flags(corpus, "stopped", **words)) == 0
    whole, stopped = corpus / "models" / "whole", corpus / "models" / "stopped"
    assert [row["loss"] for row in rows(whole)] == [row["loss"] for row in rows(stopped)]
    assert (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()
    (corpus / "data" / "corpus.txt").write_text("\n".join(sentences(300, seed=9)))
    assert prepare(corpus, "new") == 0
    assert run_main(text_flags(corpus, "whole", **{**words, "data": "new"})) == 2  # a finished run, and of another corpus


@pytest.mark.slow
def test_memory_of_reading_does_not_grow_with_what_is_read(tmp_path):
    """300 MB of tokens, all read: the process holds a few MB of them at a time. (Without the pages given back: all.)"""
    code = f"""
import sys, json, pathlib, resource
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, seq2seq
folder = pathlib.Path({str(tmp_path)!r})
np.arange(150_000_000, dtype=np.uint16).tofile(folder / "train.ids")
for split in ("eval", "test"):
    open(folder / f"{{split}}.ids", "wb").close()
(folder / "corpus.json").write_text(json.dumps({{"dtype": "uint16", "train tokens": 150_000_000, "eval tokens": 0, "test tokens": 0}}))
def held():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])
corpus = seq2seq.Corpus("x", None, folder, 1000, [])
before, most = held(), 0
for i in range(0, 150_000, 500):
    rows = corpus.read("train", np.arange(i, i + 500) * 1000)
    assert rows[0, 0] == i * 1000 % 65536
    most = max(most, held() - before)
print(most)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout.split()[-1]) < 60_000, result.stdout  # kB


# ------------------------------------------------------------------------------------------------ tokenizer


def test_a_tokenizer_as_t5s(corpus):
    folder = corpus / "models" / "made"
    write_tokenizer(folder, corpus / "data" / "corpus.txt", 110)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, len(tokenizer)) == (0, 1, 2, 210)
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>"]) == [209, 110] and config["vocab_size"] == 256
    for text in ("the cat reads.", "not_entailment 5.0 {x} ~ \"quoted\""):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    before = contents(folder)
    with pytest.raises(SystemExit):
        write_tokenizer(folder, corpus / "data" / "corpus.txt", 110)
    write_tokenizer(corpus / "models" / "again", corpus / "data" / "corpus.txt", 110)
    assert before == contents(folder) == contents(corpus / "models" / "again")


def test_more_pieces_than_the_text_has_is_said(corpus, capsys):
    with pytest.raises(SystemExit):
        write_tokenizer(corpus / "models" / "made", corpus / "data" / "corpus.txt", 30000)
    assert "--vocab_size 30000: sentencepiece" in capsys.readouterr().err and not (corpus / "models" / "made").exists()


def test_from_tokenizer_to_a_trained_model(corpus, run_main):
    write_tokenizer(corpus / "models" / "made", corpus / "data" / "corpus.txt", 110)
    assert run_main(text_flags(corpus, model_init_name="made", max_steps=3, train_batch_size=16)) == 0
    assert rows(corpus / "models" / "run")[-1]["padding_share"] == 0


# ------------------------------------------------------------------------------------------------ processes


@pytest.mark.slow
def test_killed_again_and_again_two_workers_end_with_the_bytes_of_one(corpus):
    (corpus / "data" / "corpus.txt").write_text("\n".join(sentences(20000)) + "\n")
    assert prepare(corpus, "whole") == 0
    command = [sys.executable, ROOT / "data" / "prepare_text.py", "--input", corpus / "data" / "corpus.txt", "--tokenizer", corpus / "models" / "tiny",
               "--out", corpus / "data" / "made", "--eval_fraction", "0.1", "--workers", "2", "--part_mb", "0.02"]
    n_before, work = -1, corpus / "data" / "made.parts"
    for attempt in range(3):
        process = subprocess.Popen(list(map(str, command)), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 100
        while process.poll() is None and len(list(work.glob("??????"))) < n_before + 4 and time.monotonic() < end:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        n_before = len(list(work.glob("??????")))
    assert n_before > 3 and not (corpus / "data" / "made").exists()
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200)
    assert result.returncode == 0 and "parts are there already" in result.stdout, result.stderr[-2000:]
    assert {k: v for k, v in contents(corpus / "data" / "made").items()} == contents(corpus / "data" / "whole")
