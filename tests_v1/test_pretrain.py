"""seq2seq.py on plain text: T5's golden vectors, every token once, noise as a pure function, corpora on disk, that it learns."""

import collections
import gzip
import json
import math
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import assert_same_mathematics, assert_same_run, flags, rows, stop_at
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

import common_v1 as common
import seq2seq

WORDS = "the cat dog reads water book answer word number one two three yes no long small".split()


def sentences(n, seed=0):
    """n documents of 3 to 30 words, of a language with some order in it."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        word, text = int(rng.integers(16)), []
        for _ in range(int(rng.integers(3, 31))):
            text.append(WORDS[word])
            word = (word * 5 + int(rng.integers(2))) % 16
        found.append(" ".join(text) + ".")
    return found


@pytest.fixture
def corpus(mount):
    """The mount with data/corpus.txt: 300 documents, a line each; a tenth is held out by the flags of `text_flags`."""
    (mount / "data" / "corpus.txt").write_text("\n".join(sentences(300)) + "\n")
    return mount


def text_flags(mount, run="run", **changes):
    return flags(mount, run, **{"objective": "span_corruption", "data": "corpus", "eval_fraction": 0.1, "input_length": 24, "max_new_tokens": None, **changes})


# ------------------------------------------------------------------------------------------------ golden vectors


@pytest.mark.parametrize("input_length, density, mean, text, target", [(64, 0.2, 2, 70, 22), (64, 0.2, 1, 63, 27), (512, 0.15, 3, 568, 114)])
def test_lengths_are_those_of_t5s_helper(input_length, density, mean, text, target):
    length = seq2seq.text_length(input_length, (density, mean))
    assert length == text and seq2seq.example_lengths(length, (density, mean))[1] == target
    assert seq2seq.example_lengths(length, (density, mean))[0] <= input_length < seq2seq.example_lengths(length + 1, (density, mean))[0]


def test_half_noise_gives_no_more_targets_than_inputs():
    """t5's exception at a density of 0.5: 23 tokens would fit too, as 16 inputs and 17 targets."""
    assert seq2seq.text_length(16, (0.5, 3.0)) == 22 and seq2seq.example_lengths(22, (0.5, 3.0)) == (16, 16)
    assert seq2seq.example_lengths(23, (0.5, 3.0)) == (16, 17)


def by_random_state(seed):
    """shuffle and offset as the earlier system draws them, from NumPy's old generator."""
    state = np.random.RandomState(seed)

    def shuffle(flags):
        flags = flags.copy()
        state.shuffle(flags)
        return flags[None]
    return shuffle, lambda length: np.array([int(state.uniform() * length)])


class Rolled:
    """An offset that is drawn when it is needed: after both shuffles."""

    def __init__(self, draw, length):
        self.draw, self.length = draw, length

    def __getitem__(self, key):
        return self.draw(self.length)[key]


@pytest.mark.parametrize("seed, length, density, mean, golden", [
    (42, 5, 0.5, 2, "01100"), (42, 10, 0.5, 3, "1000111001"), (100, 10, 0.5, 3, "0001111001"), (42, 10, 0.3, 3, "0011100000"),
    (42, 10, 0.9, 9, "1011111111")])
def test_golden_masks_of_the_earlier_system(seed, length, density, mean, golden):
    shuffle, offset = by_random_state(seed)
    mask = seq2seq.span_masks(length, density, mean, shuffle, Rolled(offset, length))
    assert "".join(str(int(m)) for m in mask[0]) == golden


def random_shuffle(n, seed=0):
    rng = np.random.default_rng(seed)
    return lambda flags: np.stack([rng.permutation(flags) for _ in range(n)]) if n else np.zeros((0, len(flags)), bool)


def test_masks_as_t5_describes_them():
    """Length 32, density 0.25, mean 2: 8 noise tokens in 4 spans, text first, noise last; all 21 x 1771 layouts are equally likely."""
    masks = seq2seq.span_masks(32, 0.25, 2.0, random_shuffle(2000))
    runs = seq2seq.first_of_runs(masks).sum(1)
    assert (masks.sum(1) == 8).all() and (runs == 4).all() and not masks[:, 0].any() and masks[:, -1].all()
    first_span = np.array([int(np.flatnonzero(~row[np.argmax(row):])[0]) for row in masks])  # C(7 - k, 2) of C(7, 3) layouts begin with k tokens
    expected = {k: math.comb(7 - k, 2) / math.comb(7, 3) for k in range(1, 6)}
    for k, share in expected.items():
        assert np.mean(first_span == k) == pytest.approx(share, abs=0.04)
    assert seq2seq.span_counts(2, 0.01, 3) == (1, 1)  # at least one noise token and one span


def test_rolled_masks_of_512_tokens_have_26_or_27_spans():
    rng = np.random.default_rng(0)
    masks = seq2seq.span_masks(512, 0.15, 3.0, random_shuffle(1000), rng.integers(0, 512, 1000))
    runs = collections.Counter(seq2seq.first_of_runs(masks).sum(1).tolist())
    assert (masks.sum(1) == 77).all() and set(runs) == {26, 27} and 0.05 < runs[27] / 1000 < 0.15
    tokens = np.tile(np.arange(512), (1000, 1))
    shapes = {(len(s), len(t)) for s, t in zip(seq2seq.with_sentinels(tokens, masks, np.arange(600, 500, -1)),
                                                    seq2seq.behind_sentinels(tokens, masks, np.arange(600, 500, -1)))}
    assert shapes == {(461, 103), (462, 104)}  # without end tokens
    assert np.abs(masks.mean(0) - 0.15).max() < 0.06  # every place is masked as often as any other


def test_golden_sentinels():
    """t5's noise_span_to_unique_sentinel and its counterpart for the targets."""
    tokens, mask, sentinels = np.arange(10, 16)[None], np.array([[1, 1, 0, 0, 1, 0]], bool), np.arange(999, 990, -1)
    assert seq2seq.with_sentinels(tokens, mask, sentinels)[0].tolist() == [999, 12, 13, 998, 15]
    assert seq2seq.with_sentinels(tokens, ~mask, sentinels)[0].tolist() == [10, 11, 999, 14, 998]
    assert seq2seq.behind_sentinels(tokens, mask, sentinels)[0].tolist() == [999, 10, 11, 998, 14]
    masks = seq2seq.span_masks(64, 0.3, 2.0, random_shuffle(50))  # begin with text and end with noise: both ways to write targets are one
    tokens = np.arange(50 * 64).reshape(50, 64)
    for a, b in zip(seq2seq.with_sentinels(tokens, ~masks, np.arange(9999, 9900, -1)), seq2seq.behind_sentinels(tokens, masks, np.arange(9999, 9900, -1))):
        assert a.tolist() == b.tolist()


def test_golden_batch_of_the_earlier_system():
    """Its three rows, padded together to 14, density 0.5, mean 3, one generator for all; padding and end tokens are taken out of the mask."""
    texts = [[8774, 296, 55], [947, 19, 46, 677, 28, 3, 9, 1200, 7142], [389, 677, 28, 1317, 16513, 58, 23840, 36, 16114, 233, 16990, 2505, 55]]
    golden = [([32099, 296, 55], [32099, 8774]), ([947, 32099, 46, 677, 28, 3, 9, 1200, 32098], [32099, 19, 32098, 7142]),
              ([32099, 28, 1317, 16513, 32098, 16114, 233, 16990, 2505, 32097], [32099, 389, 677, 32098, 58, 23840, 36, 32097, 55])]
    shuffle, offset = by_random_state(42)
    for text, (source, target) in zip(texts, golden):
        mask = seq2seq.span_masks(14, 0.5, 3.0, shuffle, Rolled(offset, 14))[:, :len(text)]
        assert seq2seq.with_sentinels(np.array([text]), mask, np.arange(32099, 31999, -1))[0].tolist() == source
        assert seq2seq.behind_sentinels(np.array([text]), mask, np.arange(32099, 31999, -1))[0].tolist() == target


# ------------------------------------------------------------------------------------------------ examples


def spans_of(n_tokens=5000, input_length=64, batch=8, objective="span_corruption", density=0.15, mean=3.0, labels=None, seed=0, amounts=(None,), split="train", n_micro=1):
    """`Spans` over random ids in memory, with 100 sentinels from 999 downwards."""
    denoisers = seq2seq.DENOISERS.get(objective, [(density, mean)])
    length = min(seq2seq.text_length(input_length, d, labels or "t5") for d in denoisers)
    args = types.SimpleNamespace(train_batch_size=batch, gradient_accumulation_steps=n_micro, seed=seed, span_labels=labels)
    corpora = []
    for k, amount in enumerate(amounts):
        ids = np.random.default_rng([9, k]).integers(2, 900, n_tokens).astype(np.uint16)
        corpus = seq2seq.Corpus.__new__(seq2seq.Corpus)
        corpus.__dict__.update(name=str(k), amount=amount, ids={split: ids}, maps=[], length=length,
                               counts={"train": -(-n_tokens // length), "eval": n_tokens // length})
        corpora.append(corpus)
    config = types.SimpleNamespace(d_model=32, vocab_size=1000, decoder_start_token_id=0, pad_token_id=0)
    return seq2seq.Spans(args, corpora, split, config, range(999, 899, -1), 1, True, 200, denoisers)


def rebuilt(source, target, labels="t5"):
    """The text, from the two halves of an example."""
    source, target = source.tolist(), target.tolist()
    assert source.pop() == 1 and (labels == "compact" or target.pop() == 1)
    spans, found, order = {}, [], []
    for token in target:
        if token >= 900:
            order.append(token)
        spans.setdefault(order[-1] if order else None, []).append(token)
    for token in source:
        found += spans[token][1:] if token >= 900 else [token]
    assert order == [999 - k for k in range(len(order))] == [token for token in source if token >= 900]  # each once, downwards, none at the end
    return found


@pytest.mark.parametrize("settings", [
    {}, {"density": 0.5, "mean": 1.0}, {"mean": 8.0}, {"density": 0.02}, {"density": 0.6, "mean": 5.0}, {"labels": "compact"},
    {"labels": "compact", "density": 0.4, "mean": 2.0}, {"objective": "ul2"}, {"objective": "prefix_lm"}], ids=str)
def test_sources_and_targets_together_rebuild_the_text(settings):
    spans, n_examples = spans_of(60000, **settings), 0
    for step in range(60):
        ids = spans.step_ids(step)
        sources, targets = spans.examples(ids)
        text = spans.text(spans.places)
        for i in map(int, ids):
            assert [len(sources[i]), len(targets[i])] == spans.lengths[i].tolist() and max(sources[i]) < 1000
            kind = spans.denoisers[spans.kinds(spans.places[i: i + 1])[0][0]]
            if kind is None:
                assert sources[i][:-1].tolist() + targets[i][:-1].tolist() == text[i].tolist()
                assert sources[i][-1] == targets[i][-1] == 1 < min(len(sources[i]), len(targets[i]))
            else:
                assert rebuilt(sources[i], targets[i], settings.get("labels", "t5")) == text[i].tolist()
            n_examples += 1
        assert len(sources[0]) <= 64
    assert n_examples == 480


def test_span_corruption_pads_nothing_and_masks_nothing_away():
    spans = spans_of(input_length=512, n_tokens=40000)
    [(groups, _)], n_targets = spans.micro_batches(0)
    assert [tuple(g["source_ids"].shape) for g in groups] == [(8, 512)] and groups[0]["decoder_ids"].shape == (8, 114) and n_targets == 8 * 114
    assert "source_segment" not in groups[0] and (groups[0]["source_ids"] > 0).all() and (groups[0]["target_ids"].view(8, 114)[:, -1] == 1).all()
    assert (groups[0]["decoder_ids"][:, 0] == 0).all() and torch.equal(groups[0]["decoder_ids"][:, 1:].flatten(), groups[0]["target_ids"].view(8, 114)[:, :-1].flatten())


def test_mean_span_lengths_really_differ():
    """1, 3 and 8: what the earlier system's collator ignored."""
    lengths = {}
    for mean in (1.0, 3.0, 8.0):
        spans = spans_of(60000, input_length=256, mean=mean)
        places = np.arange(64)
        spans.choose(0, places)
        masks = spans.noise(places)
        lengths[mean] = masks.sum() / seq2seq.first_of_runs(masks).sum()
    assert all(lengths[mean] == pytest.approx(mean, rel=0.1) for mean in lengths), lengths  # whole numbers of tokens and spans


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 1000])
def test_permuted_is_a_permutation_of_its_own_for_every_key(n):
    orders = [seq2seq.permuted(np.arange(n), n, key) for key in range(3)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 64 or not any(np.array_equal(a, b) for a, b in zip(orders, [np.arange(n), *orders]))
    assert np.array_equal(seq2seq.permuted(np.arange(n)[n // 2:], n, 0), orders[0][n // 2:])  # place by place


def test_permuted_leaves_no_trace_of_the_order():
    """Neighbours end up as far apart as in a random order (mean distance n / 3), and every place is as likely."""
    order = seq2seq.permuted(np.arange(5000), 5000, common.derive_seed("x"))
    assert np.abs(np.diff(order)).mean() == pytest.approx(5000 / 3, rel=0.05)
    assert abs(np.corrcoef(np.arange(5000), order)[0, 1]) < 0.05
    first = [int(seq2seq.permuted(np.array([0]), 10, common.derive_seed(key))[0]) for key in range(2000)]
    assert all(140 < count < 260 for count in np.bincount(first, minlength=10))


@pytest.mark.parametrize("amounts", [(None,), (None, 20), (0.25, None, 7)], ids=str)
def test_an_epoch_has_every_token_once_and_the_next_one_another_order_and_cut(amounts):
    spans = spans_of(5000, amounts=amounts)
    n_all, length = -(-5000 // spans.length), spans.length
    expected = [n_all if a is None else a if isinstance(a, int) else round(a * n_all) for a in amounts]
    assert spans.per_epoch == sum(expected)
    seen = [np.concatenate([spans.text(spans.places) for step in range(epoch * spans.steps_per_epoch, (epoch + 1) * spans.steps_per_epoch)
                            for _ in [spans.step_ids(step)]]) for epoch in (0, 1)]
    assert len(seen[0]) == spans.per_epoch and not np.array_equal(seen[0], seen[1])
    for k, (amount, corpus) in enumerate(zip(amounts, spans.corpora)):
        if amount is None:
            text = corpus.ids["train"].astype(np.int64)
            windows = {tuple(text[(np.arange(length) + start) % 5000]): start for start in range(5000)}
            assert len({min(windows[tuple(row)] % length for row in rows_ if windows.get(tuple(row), -1) >= 0) for rows_ in seen}) == 2  # cut elsewhere
            for rows_ in seen:
                starts = sorted(windows[tuple(row)] for row in rows_ if tuple(row) in windows)
                assert len(starts) == n_all
                covered = np.bincount(np.concatenate([(np.arange(length) + start) % 5000 for start in starts]), minlength=5000)
                assert covered.min() == 1 and covered.sum() == n_all * length
    masks = [spans.choose(epoch, np.arange(8)) is None or spans.noise(np.arange(8)) for epoch in (0, 1)]
    assert not np.array_equal(*masks)


def test_noise_and_text_of_a_place_do_not_depend_on_what_is_asked_beside(monkeypatch):
    spans, again = spans_of(objective="ul2"), spans_of(objective="ul2")
    spans.step_ids(3)
    sources, targets = spans.examples(np.arange(8))
    again.step_ids(3)
    for i in (5, 0):
        s, t = again.examples(np.array([i]))
        assert np.array_equal(s[i], sources[i]) and np.array_equal(t[i], targets[i])
    other = spans_of(objective="ul2", seed=1)
    other.step_ids(3)
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(other.examples(np.arange(8))[0].values(), sources.values()))
    plain, other = spans_of(), spans_of(seed=1)  # the noise by itself, not only the order of the text
    for spans in (plain, other):
        spans.choose(0, np.arange(8))
    assert (plain.noise(np.arange(8)) != other.noise(np.arange(8))).any(1).all()


def test_corpora_are_mixed_within_an_epoch():
    spans = spans_of(amounts=(None, None))
    spans.corpora[1].ids["train"][:] = 5
    for first in (0, 32, spans.per_epoch - 32):
        spans.choose(0, np.arange(first, first + 32))
        assert 4 < (spans.text(spans.places) == 5).all(1).sum() < 28


@pytest.mark.parametrize("objective, labels", [("span_corruption", None), ("span_corruption", "compact"), ("ul2", None)])
def test_two_ranks_and_any_split_see_the_examples_of_one_rank(monkeypatch, objective, labels):
    def examples(world, n_micro):
        found = []
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world))
            spans = spans_of(objective=objective, labels=labels, batch=8 // n_micro, n_micro=n_micro)
            for step in (0, 2, spans.steps_per_epoch - 1):
                batches, n_targets = spans.micro_batches(step)
                for groups, _ in batches:
                    for group in groups:
                        if len(group["target_ids"]):
                            found += [(step, n_targets, *group["target_ids"][group["target_example"] == i].tolist()) for i in group["target_example"].unique()]
        return sorted(found)
    one = examples(1, 1)
    assert len({row[2:] for row in one}) == len(one)
    assert examples(2, 1) == examples(2, 2) == examples(1, 4) == examples(3, 1) == one
    monkeypatch.setattr(seq2seq.Spans, "noise", lambda self, places, noise=seq2seq.Spans.noise: noise(self, places + common.rank()))
    assert examples(2, 1) != one  # noise that knew of the rank would be seen


# ------------------------------------------------------------------------------------------------ text files


def read(path, documents="auto", **part):
    problems = []
    found = list(seq2seq.read_documents(path, None, documents, problems, **part))
    return [text for _, text in found], problems


def test_documents_by_line_by_blank_line_and_from_json(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone two\r\nthree\u2028four\r\n".encode())
    (tmp_path / "b.txt").write_text("\n\none\ntwo\n \nthree\n\n\nfour")
    (tmp_path / "c.jsonl").write_text('{"text": "one\\n\\ntwo"}\n\n{"text": "three", "split": "eval", "url": 5}\n')
    with gzip.open(tmp_path / "d.txt.gz", "wt") as file:
        file.write("one\n\ntwo\n")
    assert read(tmp_path / "a.txt") == (["one two", "three\u2028four"], [])
    assert read(tmp_path / "b.txt") == (["one\ntwo", "three", "four"], [])
    assert read(tmp_path / "b.txt", "line")[0] == ["one", "two", "three", "four"]
    assert read(tmp_path / "a.txt", "blank")[0] == ["one two\nthree\u2028four"]
    assert read(tmp_path / "d.txt.gz")[0] == ["one", "two"]
    assert list(seq2seq.read_documents(tmp_path / "c.jsonl", "train", "auto", [])) == [("train", "one\n\ntwo"), ("eval", "three")]


@pytest.mark.parametrize("documents", ["line", "blank"])
def test_parts_of_a_file_have_every_document_once(tmp_path, documents, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(seq2seq, "PIECE", 40)  # so that some lines and documents are cut
    for case in range(30):
        lines = [" ".join("aé日🙂"[int(c)] * int(rng.integers(1, 9)) for c in rng.integers(0, 4, rng.integers(0, 12))) for _ in range(int(rng.integers(1, 40)))]
        path = tmp_path / f"{case}.txt"
        path.write_text("\n".join(lines) + "\n" * int(rng.integers(0, 3)), newline="")
        whole, problems = read(path, documents)
        size = path.stat().st_size
        for n_parts in (2, 3, 7, size):
            bounds = np.linspace(0, size, n_parts + 1).astype(int)
            parts = [read(path, documents, start=int(a), end=int(b))[0] for a, b in zip(bounds, bounds[1:]) if b > a]
            assert [text for part in parts for text in part] == whole and not problems
        flat = "".join("".join(line.split()) for line in lines)
        assert "".join("".join(text.split()) for text in whole) == flat


@pytest.mark.parametrize("name, content, said", [
    ("a.jsonl", b'{"text": "fine"}\n{"txt": "x"}\n', "line 2"), ("a.jsonl", b"[]\n", "line 1"), ("a.jsonl", b'{"text": 5}\n', "line 1"),
    ("a.jsonl", b'{"text": "\\ud83d"}\n', "half a character"), ("a.jsonl", b'{"text": "x", "split": ["train"]}\n', "line 1: ValueError(\"split ['train']"), ("a.txt", b"fine\nba\xffd\n", "line 2: not UTF-8"), ("a.jsonl", b"{]\n", "line 1")], ids=str)
def test_malformed_text_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    _, problems = read(tmp_path / name)
    assert len(problems) == 1 and said in problems[0] and str(tmp_path / name) in problems[0]


def test_looking_for_blank_lines_takes_no_time_on_a_long_line(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 2**20)
    (tmp_path / "b.txt").write_text("x" * 2**19 + "\n \t\n\ny")
    assert not seq2seq.has_blank_lines(tmp_path / "a.txt") and seq2seq.has_blank_lines(tmp_path / "b.txt")  # once 20 minutes


def test_a_gz_that_is_cut_short_is_named(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(("word " * 1000).encode())[:-10])
    assert "cannot be read" in read(tmp_path / "a.txt.gz")[1][0]


def load(mount, **changes):
    args = seq2seq.parse_args(text_flags(mount, **changes))
    problems, tokenizer = [], AutoTokenizer.from_pretrained(mount / "models" / "tiny")
    config = T5Config(**json.loads((mount / "models" / "tiny" / "config.json").read_text()))
    return *seq2seq.load_text(args, config, tokenizer, problems)[1:], problems, tokenizer


def stream(corpus, split):
    return corpus.ids[split].tolist() if split in corpus.ids else []


def test_every_form_of_a_corpus_gives_the_same_tokens(mount):
    """A file by lines, by blank lines, JSON lines, gzipped, shards in a folder; splits by file name, folder and key."""
    train, held = sentences(60), sentences(9, seed=1)
    data = mount / "data"
    (data / "lines.txt").write_text("\n".join(train))
    (data / "lines.eval.txt").write_text("\n".join(held))
    (data / "blank.txt").write_text("\n\n".join(train))
    (data / "blank.eval.txt").write_text("\n\n".join(held))
    (data / "json.jsonl").write_text("".join(json.dumps({"text": t, "split": s}) + "\n" for t, s in [(t, "train") for t in train] + [(t, "eval") for t in held]))
    for name in ("shards/b/eval", "shards/train"):
        (data / name).mkdir(parents=True)
    (data / "shards" / "train" / "0.txt").write_text("\n".join(train[:20]))
    with gzip.open(data / "shards" / "train" / "1.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"text": t}) + "\n" for t in train[20:]))
    (data / "shards" / "b" / "eval" / "0.txt").write_text("\n".join(held))
    (data / "shards" / "README.md").write_text("not text of the corpus")
    expected = None
    for name in ("lines", "blank", "json", "shards", str(data / "lines.txt")):
        sentinels, [corpus], problems, tokenizer = load(mount, data=name, eval_fraction=0)
        assert problems == [] and sentinels[:2] == [319, 318] and len(sentinels) == 100
        expected = expected or [[i for t in part for i in tokenizer(t, add_special_tokens=False).input_ids] for part in (train, held)]
        assert [stream(corpus, "train"), stream(corpus, "eval")] == expected and corpus.about["train documents"] == 60


@pytest.mark.parametrize("name", ["test", "train"])
def test_the_folder_that_a_corpus_lies_in_says_nothing(mount, name):
    folder = mount / name
    folder.mkdir()
    (folder / "c.txt").write_text("\n".join(sentences(100)))
    for data in (folder, folder / "c.txt"):
        _, [corpus], problems, _ = load(mount, data=data, eval_fraction=0.2)
        assert problems == [] and {split for split in corpus.ids} == {"train", "eval"}


def test_mt5_spells_its_sentinels_with_a_blank(corpus, monkeypatch):
    vocabulary = AutoTokenizer.from_pretrained(corpus / "models" / "tiny").get_vocab()
    monkeypatch.setattr("transformers.T5Tokenizer.get_vocab", lambda self: {t.replace("<extra", "▁<extra"): i for t, i in vocabulary.items()})
    assert load(corpus)[0] == list(range(319, 219, -1))


def test_special_tokens_in_a_text_are_left_out_and_said(mount, messages):
    (mount / "data" / "html.txt").write_text("\n".join(["the cat</s> reads <extra_id_0> a <pad> book"] * 40))
    _, [corpus], problems, tokenizer = load(mount, data="html", eval_fraction=0.5)
    assert not set(stream(corpus, "train") + stream(corpus, "eval")) & {0, 1, *range(220, 320)}
    assert any("120 special tokens" in line for line in messages) and not any("unknown" in line for line in messages)
    (mount / "data" / "other.txt").write_text("\n".join(["the \u65e5\u672c reads \u8a9e"] * 40))
    load(mount, data="other", eval_fraction=0.5)
    assert any("80 pieces of text are unknown" in line for line in messages)


def test_the_cache_is_used_until_the_text_changes(corpus, monkeypatch):
    load(corpus)
    monkeypatch.setattr(seq2seq, "tokenize_documents", lambda *_: 1 / 0)
    load(corpus)
    (corpus / "data" / "corpus.txt").write_text("\n".join(sentences(200, seed=5)))
    with pytest.raises(ZeroDivisionError):
        load(corpus)


def test_a_corpus_cut_short_is_refused(corpus):
    _, [data], _, _ = load(corpus)
    path = next((corpus / "data" / ".cache").glob("*/train.ids"))
    path.write_bytes(path.read_bytes()[:-2])
    assert "expected" in load(corpus)[2][0] and str(path) in load(corpus)[2][0]


@pytest.mark.parametrize("change, said", [
    ({"noise_density": 0}, "--noise_density 0.0"), ({"mean_noise_span_length": 0.5}, "--mean_noise_span_length 0.5"), ({"input_length": 3}, "--input_length 3"),
    ({"target_length": 5}, "--target_length 5: the targets have up to"), ({"input_length": 3000, "mean_noise_span_length": 1}, "sentinels"),
    ({"input_length": 9999, "mean_noise_span_length": 500}, "tokens of text for train"), ({"data": "nothing"}, "nothing: not found"),
    ({"n_samples": 3}, "--n_samples has no effect with --objective span_corruption"), ({"temperature": 0.5}, "--temperature has no effect"),
    ({"objective": "completion", "data": "ragged", "noise_density": 0.2}, "--noise_density has no effect with --objective completion"),
    ({"objective": "ul2", "mean_noise_span_length": 3}, "ul2 has its own noise"), ({"eval_fraction": 0}, "no evaluation records"),
    ({"optimizer": "adafactor", "ds_config": "zero1"}, "--optimizer adafactor looks at whole matrices"), ({"z_loss": -1}, "--z_loss -1.0"),
    ({"optimizer": "adamw_rms", "ds_config": "zero3"}, "--optimizer adamw_rms"), ({"no_scale_parameter": True}, "without --optimizer adafactor"),
    ({"metric_for_best": "exact_match"}, "expected one of loss, token_accuracy"), ({"data": "corpus:99999"}, "expected 1 to all"),
    ({"documents": "line", "data": "prepared"}, "have no effect"), ({"data": "ragged"}, "not found")], ids=str)
def test_wrong_arguments_are_refused_before_the_model_loads(corpus, run_main, monkeypatch, capsys, change, said):
    folder = corpus / "data" / "prepared"
    folder.mkdir()
    (folder / "corpus.json").write_text(json.dumps({"tokenizer": "x", "tokenizer_name": "other", "dtype": "uint16"}))
    monkeypatch.setattr(common, "load_model", lambda *_: 1 / 0)
    assert run_main(text_flags(corpus, **change)) == 2
    assert said in capsys.readouterr().err


def test_problems_of_model_and_text_are_reported_together(corpus, run_main, capsys):
    (corpus / "data" / "bad.jsonl").write_text('{"txt": 5}\n')
    assert run_main(text_flags(corpus, model_init_name="nosuch", data=["bad", "nodata"])) == 2
    error = capsys.readouterr().err
    assert "nosuch: not found" in error and "nodata: not found" in error and "bad.jsonl, line 1" in error


@pytest.mark.parametrize("settings", [(64, 0.2, 1.0), (512, 0.15, 1.0), (4, 0.15, 3.0), (100, 0.5, 3.0)])
def test_compact_sources_fit_too(settings):
    length = seq2seq.text_length(settings[0], settings[1:], "compact")
    assert seq2seq.example_lengths(length, settings[1:], "compact")[0] <= settings[0]


# ------------------------------------------------------------------------------------------------ loss and optimisers


def test_without_segments_the_loss_is_that_of_the_models_own_forward():
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=1000, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0))
    spans = spans_of()
    [(groups, _)], n_targets = spans.micro_batches(0)
    loss = seq2seq.TargetLosses(model, True, 0.0)(groups).sum() / n_targets
    loss.backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    T = groups[0]["decoder_ids"].shape[1]
    theirs = model(input_ids=groups[0]["source_ids"], labels=groups[0]["target_ids"].view(-1, T)).loss
    theirs.backward()
    assert float(loss) == pytest.approx(float(theirs), rel=1e-6)
    assert all(torch.allclose(p.grad, mine[name], atol=1e-6) for name, p in model.named_parameters())


@pytest.mark.parametrize("B, H, T, S, masked", [(3, 4, 7, 9, 0), (3, 4, 7, 7, 1), (2, 6, 300, 700, 2), (40, 3, 200, 170, 1)])
def test_attention_with_a_trained_bias_against_autograd(B, H, T, S, masked):
    """One head, some heads or several examples at a time; masked: 0 not, 1 alike for all examples, 2 each its own."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(B, H, n, 8, dtype=torch.float64, requires_grad=True) for n in (T, S, S))
    table = torch.randn(1, T, S, H, dtype=torch.float64, requires_grad=True)
    allowed = torch.rand(B if masked == 2 else 1, 1, T, S) > 0.4 if masked else None
    if masked:
        allowed[..., 0] = True
    scores = query @ key.transpose(2, 3) + table.permute(0, 3, 1, 2)
    wanted = (scores if allowed is None else scores.masked_fill(~allowed, -1e300)).softmax(-1) @ value
    found = seq2seq.BiasedAttention.apply(query, key, value, table.permute(0, 3, 1, 2), allowed)
    assert torch.allclose(found, wanted, atol=1e-12)
    weight = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), (query, key, value, table)) for out in (found, wanted))):
        assert torch.allclose(a, b, atol=1e-10) and a.abs().max() > 0.01


@pytest.mark.parametrize("rows_", [[[0], [1], [2], [3]], [[0, 3], [1, 2]]], ids=["one per row", "packed"])
def test_the_faster_layers_have_the_losses_and_gradients_of_the_models_own(rows_):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=1000, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
                                                decoder_start_token_id=0, feed_forward_proj="gated-gelu")).double()
    sources, targets = ([torch.randint(2, 1000, (n,)).tolist() for n in lengths] for lengths in ((9, 4, 7, 5), (3, 8, 2, 6)))
    batch, found = seq2seq.collate(rows_, sources, targets, 0, 0), []
    for change in (lambda: None, lambda: seq2seq.speed_up(model, torch.device("cpu"))):
        change()
        model.zero_grad()
        loss = seq2seq.TargetLosses(model, True, 0.0)([batch]).sum()
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert model.config._attn_implementation == "biased" and type(model.encoder.block[0].layer[1].DenseReluDense.act) is torch.nn.GELU
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*found))
    model.config.dropout_rate = 0.1
    for module in model.modules():
        if hasattr(module, "has_relative_attention_bias"):
            module.dropout = 0.1
    assert torch.isfinite(seq2seq.TargetLosses(model.train(), True, 0.0)([batch])).all()  # by torch's own


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_z_loss_adds_log_z_squared_and_its_gradient(smoothing):
    torch.manual_seed(0)
    logits = (3 * torch.randn(6, 11, dtype=torch.float64)).requires_grad_()
    target = torch.randint(11, (6,))
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing) + 0.01 * logits.logsumexp(1)**2
    gradient = torch.autograd.grad((expected * torch.arange(6)).sum(), logits)[0]
    losses = seq2seq.token_losses(lambda h: h * 1, logits, target, 1, smoothing, 0.01)
    assert torch.allclose(losses, expected) and torch.allclose(torch.autograd.grad((losses * torch.arange(6)).sum(), logits)[0], gradient)
    with torch.no_grad():
        assert torch.equal(seq2seq.token_losses(lambda h: h * 1, logits, target, 2, 0.0, 0.0)[1], (logits.argmax(1) == target).double())


def test_rms_scaled_adamw_against_nanot5s_formula():
    torch.manual_seed(0)
    start = [torch.randn(5, 4, dtype=torch.float64), torch.randn(7, dtype=torch.float64) * 1e-6]
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = seq2seq.RMSScaledAdamW([{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0}], lr=0.02)
    wanted, m, v = [p.clone() for p in start], [0, 0], [0, 0]
    for step in range(1, 6):
        for k, decay in ((0, 0.1), (1, 0.0)):
            g = torch.randn_like(start[k])
            params[k].grad = g
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g * g
            rms = max(1e-3, float((wanted[k]**2).mean().sqrt()))
            update = 0.02 * rms * (m[k] / (1 - 0.9**step)) / ((v[k] / (1 - 0.999**step)).sqrt() + 1e-8)
            wanted[k] = wanted[k] * (1 - 0.02 * decay) - update
        optimizer.step()
        assert all(torch.allclose(p, w, rtol=1e-6) for p, w in zip(params, wanted))  # the step's scale is fp32
    again = seq2seq.RMSScaledAdamW([{"params": params[:1]}, {"params": params[1:]}], lr=0.02)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[params[0]]["exp_avg"], optimizer.state[params[0]]["exp_avg"])


def test_inverse_square_root_of_the_step():
    assert common.lr_at(0, 1.0, "inverse_sqrt", 4, 10) == 0.25 and common.lr_at(3, 1.0, "inverse_sqrt", 4, 10) == 1.0
    assert common.lr_at(15, 1.0, "inverse_sqrt", 4, 10) == 0.5 and common.lr_at(8, 1.0, "inverse_sqrt", 0, 10) == pytest.approx(1 / 3)


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("change", [
    {}, *(pytest.param(change, marks=pytest.mark.slow) for change in (
        {"optimizer": "adafactor", "lr_scheduler_type": "inverse_sqrt", "warmup_steps": 30, "learning_rate": 0.1, "z_loss": 1e-4},
        {"span_labels": "compact"}, {"objective": "prefix_lm"}, {"objective": "ul2", "max_steps": 400}, {"optimizer": "adamw_rms", "learning_rate": 0.1}))], ids=str)
def test_held_out_loss_falls_below_the_unigram_entropy(corpus, run_main, change):
    assert run_main(text_flags(corpus, **{"max_steps": 250, "train_batch_size": 16, "learning_rate": 0.02, "warmup_steps": 10, "logging_steps": 50, **change})) == 0
    _, [data], _, _ = load(corpus)
    counts = np.bincount(stream(data, "train") + stream(data, "eval"))
    entropy = -sum(c / counts.sum() * math.log(c / counts.sum()) for c in counts if c)
    evaluations = rows(corpus / "models" / "run", "eval")
    assert evaluations[0]["eval/loss"] > entropy > evaluations[-1]["eval/loss"] + 0.5, (entropy, evaluations[-1])
    assert evaluations[-1]["eval/token_accuracy"] > 0.5 > evaluations[0]["eval/token_accuracy"]
    assert json.loads((corpus / "models" / "run" / "rawtune.json").read_text())["task"] == change.get("objective", "span_corruption")


@pytest.mark.parametrize("change", [{}, *(pytest.param(change, marks=pytest.mark.slow) for change in (
    {"optimizer": "adafactor"}, {"objective": "ul2", "ds_config": "zero2"}, {"optimizer": "adamw_rms"}))], ids=str)
def test_stopped_within_an_epoch_and_resumed_equals_uninterrupted_to_the_bit(corpus, run_main, monkeypatch, change):
    words = {"max_steps": 12, "model_init_name": "dropout", **change}
    assert run_main(text_flags(corpus, "whole", **words)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert run_main(text_flags(corpus, "stopped", **words)) == common.EXIT_SAVED
    assert run_main(text_flags(corpus, "stopped", **words)) == 0
    whole, stopped = corpus / "models" / "whole", corpus / "models" / "stopped"
    if "optimizer" in change:
        assert [row["loss"] for row in rows(whole)] == [row["loss"] for row in rows(stopped)]
    else:
        assert_same_run(whole, stopped)


@pytest.mark.parametrize("change", [
    {"precision": "bf16-mixed"}, *(pytest.param(change, marks=pytest.mark.slow) for change in (
        {"ds_config": "zero3", "objective": "ul2"},
        {"precision": "bf16-mixed", "optimizer": "adafactor"}, {"precision": "bf16", "ds_config": "zero1"}, {"gradient_checkpointing": True}))], ids=str)
def test_precisions_and_memory_savers_follow_the_fp32_run(corpus, run_main, change):
    same = {key: value for key, value in change.items() if key in ("optimizer", "objective")}
    for run, words in (("exact", same), ("other", change)):
        assert run_main(text_flags(corpus, run, max_steps=3, learning_rate=0.001, **words)) == 0
    exact, other = ([row["loss"] for row in rows(corpus / "models" / run)] for run in ("exact", "other"))
    assert other == pytest.approx(exact, rel=0.02 if "precision" in change else 1e-6)


def test_bart_learns_the_end_of_texts_from_their_beginning(corpus, run_main):
    shutil.copytree(corpus / "models" / "tiny", corpus / "models" / "bart")
    (corpus / "models" / "bart" / "config.json").write_text(json.dumps({
        "model_type": "bart", "vocab_size": 320, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
        "decoder_start_token_id": 1, "forced_eos_token_id": None}))
    assert run_main(text_flags(corpus, model_init_name="bart", objective="prefix_lm", max_steps=2)) == 0


def test_a_split_batch_and_another_evaluation_batch_change_nothing(corpus, run_main):
    assert run_main(text_flags(corpus, "a", max_steps=6)) == 0
    assert run_main(text_flags(corpus, "b", max_steps=6, train_batch_size=2, gradient_accumulation_steps=4, eval_batch_size=5)) == 0
    assert_same_mathematics(corpus / "models" / "b", corpus / "models" / "a")


def test_a_pretrained_model_is_continued_on_other_text_and_on_pairs(corpus, run_main):
    assert run_main(text_flags(corpus, "pre", max_steps=60, train_batch_size=16, learning_rate=0.02)) == 0
    shutil.copy(corpus / "data" / "corpus.txt", corpus / "data" / "more.txt")
    assert run_main(text_flags(corpus, "on", max_steps=2, model_init_name="pre", data=["corpus", "more:0.5"])) == 0
    before, after = (rows(corpus / "models" / run, "eval") for run in ("pre", "on"))
    assert after[0]["eval/corpus/loss"] == pytest.approx(before[-1]["eval/loss"], rel=1e-6) and "eval/more/token_accuracy" in after[-1]
    assert run_main(flags(corpus, "pairs", model_init_name="pre")) == 0
    assert run_main(text_flags(corpus, "scored", model_init_name="pre", no_train=True)) == 0
    assert rows(corpus / "models" / "scored", "eval")[0]["eval/loss"] == pytest.approx(before[-1]["eval/loss"], rel=1e-6)
