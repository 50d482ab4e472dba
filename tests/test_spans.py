"""seq2seq.py --objective span_corruption: t5's golden vectors, tokens of an epoch, training."""

import collections
import types

import conftest
import numpy as np
import pytest

import prepare_text
import seq2seq

EOS = 1
SENTINELS = list(range(999, 899, -1))


# ----------------------------------------------------------------------------------- golden vectors


@pytest.mark.parametrize(
    "input_length, density, mean_length, n_text, n_target",
    [
        (64, 0.2, 2, 70, 22),  # these three from t5's own tests
        (64, 0.2, 1, 63, 27),
        (512, 0.15, 3, 568, 114),
        (16, 0.5, 3, 22, 16),  # 23 would fit too, but has 17 target tokens
    ],
)
def test_lengths_are_those_of_t5(input_length, density, mean_length, n_text, n_target):
    noise = (density, mean_length)
    length = seq2seq.text_length(input_length, *noise)
    assert length == n_text
    assert seq2seq.pair_lengths(length, *noise) == (input_length, n_target)


def earlier_mask(length, density, mean_length, random_state):
    """As an earlier implementation rolls it around, from NumPy's old generator."""
    mask = seq2seq.span_mask(length, density, mean_length, random_state)
    return np.roll(mask, int(random_state.uniform() * length))


@pytest.mark.parametrize(
    "seed, length, density, mean_length, golden",
    [
        (42, 5, 0.5, 2, "01100"),
        (42, 10, 0.5, 3, "1000111001"),
        (100, 10, 0.5, 3, "0001111001"),
        (42, 10, 0.3, 3, "0011100000"),
        (42, 10, 0.9, 9, "1011111111"),
    ],
)
def test_golden_masks(seed, length, density, mean_length, golden):
    mask = earlier_mask(length, density, mean_length, np.random.RandomState(seed))
    assert "".join(map(str, mask.astype(int))) == golden


def test_masks_begin_with_text_and_end_with_noise():
    rng = np.random.default_rng(0)
    first_lengths = collections.Counter()
    for _ in range(1000):
        mask = seq2seq.span_mask(32, 0.25, 2, rng)
        starts = np.flatnonzero(np.diff(mask, prepend=False))
        assert mask.sum() == 8 and len(starts) == 7  # 4 spans of noise, 3 of text behind the first
        assert mask[-1] and not mask[0]
        first_lengths[starts[1] - starts[0]] += 1
    # all 35 ways to cut 8 noise tokens into 4 spans are equally likely; 15 have a first one of 1
    assert first_lengths[1] / 1000 == pytest.approx(15 / 35, abs=0.05)
    assert seq2seq.span_counts(2, 0.01, 3) == (1, 1)


def test_golden_sentinels():
    mask = np.array([1, 1, 0, 0, 1, 0], bool)
    pair = seq2seq.corrupt(np.arange(10, 16), mask, SENTINELS, EOS)
    source, target = (ids.tolist() for ids in pair)
    assert source == [999, 12, 13, 998, 15, EOS]
    assert target == [999, 10, 11, 998, 14, EOS]


@pytest.mark.parametrize("spelling", ["<extra_id_{}>", "▁<extra_id_{}>"])  # of T5, of mT5
def test_sentinels_are_found_by_their_number(spelling):
    vocabulary = {"word": 5}
    for i in range(100):
        vocabulary[spelling.format(i)] = 999 - i
    tokenizer = types.SimpleNamespace(get_vocab=lambda: vocabulary)
    assert seq2seq.find_sentinels(tokenizer) == SENTINELS


# ----------------------------------------------------------------------------------------- examples


def make_spans(n_tokens, input_length=32, density=0.3, seed=0):
    """Spans of the tokens 0, 1, 2, ..., so that a token tells its place."""
    options = {"input_length": input_length, "noise_density": density, "seed": seed}
    args = types.SimpleNamespace(mean_noise_span_length=2.0, **options)
    sentinels = [-1 - i for i in range(50)]
    return seq2seq.Spans(args, np.arange(n_tokens), sentinels, -99)


def rebuild(source, target):
    """The text of an example, whose sentinels are -1, -2, ... and whose end token is -99."""
    assert source[-1] == target[-1] == -99
    spans = {}
    for token in target[:-1]:
        if token < 0:
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    assert list(spans) == [-1 - i for i in range(len(spans))]  # in order, each once
    text = []
    for token in source[:-1]:
        text += spans.pop(token) if token < 0 else [token]
    assert not spans
    return text


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.8])
def test_an_epoch_holds_every_token_and_the_next_one_another_cut(density):
    spans = make_spans(1000, density=density)
    n_examples = len(spans.lengths)
    cuts = []
    for epoch in range(3):
        spans.start_epoch(7, epoch)
        sources, targets = spans.fetch(range(n_examples))
        text = []
        for i in range(n_examples):
            assert (len(sources[i]), len(targets[i])) == tuple(spans.lengths[i])
            text += rebuild(sources[i], targets[i])
        # end to end, from where the epoch begins; the last example goes on at the beginning
        assert text == [(text[0] + k) % 1000 for k in range(n_examples * spans.length)]
        assert 0 <= len(text) - 1000 < spans.length
        cuts.append(text[0])
    assert len(set(cuts)) == 3


def test_an_example_is_a_function_of_seed_epoch_and_place():
    def fetched(spans, ids):
        sources, targets = spans.fetch(ids)
        return [(sources[i].tolist(), targets[i].tolist()) for i in ids]

    spans = make_spans(1000)
    spans.start_epoch(7, 1)
    again = make_spans(1000)
    again.start_epoch(7, 1)
    assert fetched(again, [5]) == fetched(spans, range(20))[5:6]
    again.start_epoch(8, 1)
    assert fetched(again, [5]) != fetched(spans, [5])
    evaluated = fetched(make_spans(1000), range(20))
    assert evaluated == fetched(make_spans(1000), range(20))
    assert evaluated != fetched(make_spans(1000, seed=1), range(20))


# ----------------------------------------------------------------------------------------- training


def write_corpus():
    """data/corpus, of sentences in which every word says which one comes next."""
    words = "the cat reads water book answer word number".split()
    documents = []
    for i in range(60):
        chain = [words[(i + k) % 8] for k in range(5 + i % 20)]
        documents.append(" ".join(chain))
    with open("text.txt", "w") as file:
        file.write("\n".join(documents))
    flags = ["--input", "text.txt", "--tokenizer", "models/t5", "--out", "data/corpus"]
    prepare_text.main([*flags, "--eval_fraction", "0.2"])


def pretrain(name, flags):
    words = "--objective span_corruption --model_init_name t5 --data corpus --input_length 24"
    words += " --train_batch_size 8 --learning_rate 0.02 --logging_steps 5"
    return conftest.run(*f"{words} --training_run_name {name} {flags}".split())


def test_training_on_a_corpus_learns_and_pads_nothing():
    conftest.make_model("t5")
    write_corpus()
    assert pretrain("learned", "--max_steps 40 --eval_steps 20") == 0
    losses = [row["eval/loss"] for row in conftest.metrics("learned", "eval")]
    ids = np.fromfile("data/corpus/train.ids", "uint16")
    shares = np.bincount(ids)[np.unique(ids)] / len(ids)
    entropy = -np.sum(shares * np.log(shares))  # what the frequencies of tokens would give
    assert losses[-1] < entropy - 0.3 < losses[0]
    for row in conftest.metrics("learned", "train"):
        assert row["padding_share"] == 0
    # the exported model, and the same noise
    assert pretrain("again", "--model_init_name learned --no_train") == 0
    (row,) = conftest.metrics("again")
    assert row["eval/loss"] == pytest.approx(losses[-1], rel=1e-6)
