"""common.py: flags, data files, the order of examples, the learning rate, a run's bookkeeping."""

import gzip
import json
import pathlib
import shutil
import types

import conftest
import numpy as np
import pytest
import scipy.stats
import torch

import common
import seq2seq

# -------------------------------------------------------------------------------------------- flags


def test_help_begins_with_what_everybody_needs(capsys):
    with pytest.raises(SystemExit) as stop:
        seq2seq.parse_args(["-h"])
    text = capsys.readouterr().out
    names = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert stop.value.code == 0
    assert names[:8] == [f"--{name}" for name in list(common.SHARED_FLAGS)[:8]]
    assert text.startswith("Train an encoder-decoder") and "usage:" not in text


def test_presets_are_files_of_flags_and_later_flags_win():
    lines = "# a comment, isn't it\n--data a 'b c'  # two sets\n\n--learning_rate 0.5 --no_train\n"
    pathlib.Path("mine").write_text(lines)
    args = seq2seq.parse_args(["@mine", "--learning_rate", "0.25"])
    assert args.data_name == ["a", "b c"]
    assert args.no_train and args.learning_rate == 0.25


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("a", ("a", None)),
        ("a:0.05", ("a", 0.05)),
        ("a:1.", ("a", 1.0)),
        ("a:500", ("a", 500)),
        ("C:/x", ("C:/x", None)),
        ("a:0", None),
        ("a:1.5", None),
    ],
)
def test_amounts_with_a_point_are_fractions(spec, expected):
    problems = []
    value = common.parse_data_spec(spec, problems)
    if expected:
        assert value == expected and type(value[1]) is type(expected[1])
    assert bool(problems) == (expected is None)


# --------------------------------------------------------------------------------------- data files

RECORDS = [
    {"prompt": "é", "completion": "1", "id": 7},
    {"prompt": "b\u2028b", "completion": "2"},
    {"prompt": "c", "completion": "3"},
]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.json.gz", "d.jsonl.gz", "list.json"])
def test_every_format_gives_the_same_records(name):
    train, evaluation = RECORDS[:2], RECORDS[2:]
    with_split = [*train, {**evaluation[0], "split": "eval"}]
    if ".jsonl" in name:
        lines = [json.dumps(record, ensure_ascii=False) for record in with_split]
        text = "\n\n".join(lines)
    elif name == "list.json":
        text = json.dumps(with_split)
    else:
        text = json.dumps({"train": train, "eval": evaluation})
    data = ("\ufeff" + text).encode()
    path = pathlib.Path("data", name)
    path.write_bytes(gzip.compress(data) if ".gz" in name else data)
    problems = []
    found = list(common.read_records(path, problems))
    assert problems == []
    assert [record for _, _, record in found] == RECORDS
    assert [split for _, split, _ in found] == ["train", "train", "eval"]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"train": [{"prompt": NaN}]}', "NaN is no JSON: write null"),
        ('\ufeff{"train": []}', "byte order mark inside the file: remove"),
        ("[" * 100_000, "nested too deeply: write the inside as text"),
        ('{"train": [3]}', "expected an object"),
        ('"text"', "expected an object"),
        ("3", "expected lists train, eval, test, or lines in a .jsonl"),
    ],
)
def test_what_is_no_data_is_named(text, message):
    path = pathlib.Path("data", "d.json")
    path.write_text("\ufeff" + text)  # the first mark belongs to the file
    problems = []
    assert list(common.read_records(path, problems)) == []
    assert "d.json" in str(problems) and message in str(problems)


# -------------------------------------------------------------------------------- order of examples


def ragged_lengths(n):
    """(n, 2) source and target lengths from 1 to some hundreds, long ones being rare."""
    lengths = np.random.default_rng(0).lognormal([3, 2], 1, (n, 2))
    return lengths.astype(int) + 1


def make_order(sizes, amounts=(None, None), batch=16, seed=0):
    return common.Order(seed, batch, sizes, amounts)


def epoch_steps(order, lengths, epoch):
    first = epoch * order.steps_per_epoch
    return [order.step_ids(first + i, lengths) for i in range(order.steps_per_epoch)]


def padded_share(batches, lengths):
    n_tokens = sum(lengths[ids].sum() for ids in batches)
    n_computed = sum(len(ids) * lengths[ids].max(axis=0).sum() for ids in batches)
    return 1 - n_tokens / n_computed


def test_an_epoch_has_every_example_once_in_batches_of_like_length():
    lengths = ragged_lengths(2040)
    order = make_order([2040])
    epochs = [epoch_steps(order, lengths, epoch) for epoch in range(2)]
    for batches in epochs:
        assert [len(ids) for ids in batches] == [16] * 127 + [8]
        assert sorted(np.concatenate(batches)) == list(range(2040))
        means = [lengths[ids, 1].mean() for ids in batches[: common.WINDOW]]
        trend = scipy.stats.spearmanr(means, range(common.WINDOW))[0]
        assert abs(trend) < 0.4  # of short examples at first, as they are drawn
    assert not np.array_equal(epochs[0][0], epochs[1][0])
    shuffled = np.random.default_rng(0).permutation(2040).reshape(-1, 8)
    assert padded_share(epochs[0], lengths) < 0.4
    assert padded_share(shuffled, lengths) > 0.6


def test_a_step_depends_on_seed_step_and_effective_batch_alone():
    lengths = ragged_lengths(200)
    order = make_order([200])
    steps = [order.step_ids(step, lengths) for step in range(40)]
    resumed = make_order([200])
    assert np.array_equal(resumed.step_ids(31, lengths), steps[31])
    assert np.array_equal(resumed.step_ids(2, lengths), steps[2])
    assert not np.array_equal(make_order([200], seed=1).step_ids(31, lengths), steps[31])


def test_a_data_set_without_training_records_takes_no_part():
    assert make_order([8, 0], [None, 0.1], batch=4).steps_per_epoch == 2


@pytest.mark.parametrize("amount, n_drawn", [(0.05, 50), (30, 30), (1.0, 1000)])
def test_data_sets_are_mixed_and_drawn_anew_each_epoch(amount, n_drawn):
    lengths = ragged_lengths(1100)
    order = make_order([100, 1000], [None, amount])
    drawn = []
    for epoch in range(2):
        ids = np.concatenate(epoch_steps(order, lengths, epoch))
        assert sorted(ids[ids < 100]) == list(range(100))
        others = set(ids[ids >= 100])
        assert len(ids) - 100 == len(others) == n_drawn
        drawn.append(others)
    assert (drawn[0] == drawn[1]) == (amount == 1.0)
    first_half = ids[: len(ids) // 2]
    assert 25 <= np.sum(first_half < 100) <= 75


def test_deal_gives_every_example_to_one_of_equal_pieces():
    sizes = ragged_lengths(128).sum(axis=1)
    ids = np.random.default_rng(1).permutation(128)[:100]
    pieces = common.deal(ids, sizes, 7)
    assert sorted(np.concatenate(pieces)) == sorted(ids)
    totals = [sizes[piece].sum() for piece in pieces]
    assert max(totals) < 1.25 * min(totals)
    # fewer examples than pieces: some are empty
    assert sorted(len(piece) for piece in common.deal(ids[:3], sizes, 5)) == [0, 0, 1, 1, 1]


def test_evaluation_batches_are_the_same_for_any_number_of_ranks(monkeypatch):
    lengths = ragged_lengths(50)[:, 0]
    unions = []
    for world in (1, 2, 3):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        union, n_batches = [], set()
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            batches = list(common.my_batches(lengths, 8))
            n_batches.add(len(batches))
            union += [ids for ids in batches if ids]
        assert len(n_batches) == 1  # or a rank would wait for the others for ever
        assert sorted(sum(union, [])) == list(range(50))
        unions.append(sorted(union))
    assert unions[0] == unions[1] == unions[2]
    first = next(iter(common.my_batches(lengths, 8)))
    assert min(lengths[first]) >= np.sort(lengths)[-24]  # of 3 ranks the last: its first is the 3rd


# ---------------------------------------------------------------------------- mathematics of a step


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("constant", {0: 1, 11: 1}),
        ("constant_with_warmup", {0: 1 / 4, 2: 3 / 4, 3: 1, 11: 1}),
        ("linear", {0: 1 / 4, 3: 1, 4: 1, 8: 1 / 2, 11: 1 / 8, 12: 0, 99: 0}),
        ("cosine", {3: 1, 4: 1, 6: 0.5 + 0.5**1.5, 8: 1 / 2, 12: 0}),
        ("inverse_sqrt", {0: 1 / 4, 3: 1, 15: 1 / 2, 63: 1 / 4}),
    ],
)
def test_learning_rates(kind, expected):
    args = types.SimpleNamespace(learning_rate=3e-4, lr_scheduler_type=kind, warmup_steps=4)
    for step, share in expected.items():
        assert common.lr_at(step, args, 12) == pytest.approx(3e-4 * share, abs=1e-12)
    args.warmup_steps = -1
    args.lr_scheduler_type = "linear"
    assert common.lr_at(0, args, 100) == pytest.approx(3e-5)
    assert common.lr_at(0, args, 10**6) == pytest.approx(3e-4 / 2000)


def test_buffers_that_belong_to_the_weights_are_saved():
    model = torch.nn.Linear(2, 2)
    model.register_buffer("logits_bias", torch.ones(2))
    model.register_buffer("cache", torch.ones(2), persistent=False)
    assert set(common.full_state_dict(model)) == {"weight", "bias", "logits_bias"}


# -------------------------------------------------------------------------------------- bookkeeping


def start_run(flags=""):
    """A Run of 5 steps, one an epoch, without a model."""
    words = f"--model_init_name t5 --training_run_name r {flags}"
    args = seq2seq.parse_args(words.split())
    common.setup_distributed(args)
    run = common.Run(args, set(), None, None, [])
    run.start(conftest.__file__, max_steps=5)
    run.restart_clock()
    return run


EVALUATIONS = [  # of steps 1 to 5
    {"accuracy": 0.5, "loss": 2.0},
    {"accuracy": 0.5, "loss": 1.0},
    {"accuracy": 0.5, "loss": 1.0},
    {"accuracy": 0.5, "loss": 1.5},
    {"accuracy": 0.4, "loss": 0.5},
]


@pytest.mark.parametrize(
    "name, best_step, bad_evals",
    [("accuracy", 2, [0, 0, 1, 2, 3]), ("loss", 5, [0, 0, 1, 2, 0]), ("", None, [0, 0, 0, 0, 0])],
)
def test_the_lower_loss_breaks_a_tie(name, best_step, bad_evals):
    run = start_run("--early_stopping_patience 2")
    run.args.metric_for_best = name
    run.evaluated({"accuracy": 1.0, "loss": 0.1})  # the baseline is no checkpoint
    counted, stops = [], []
    for metrics in EVALUATIONS:
        run.stepped(loss=1.0, n_targets=10)
        run.evaluated(metrics)
        counted.append(run.state["bad_evals"])
        stops.append(run.finished())
    assert counted == bad_evals
    assert run.chosen().name == f"checkpoint-{best_step or 5}"
    assert stops == [n >= 2 for n in bad_evals[:4]] + [True]


def test_a_train_row_is_the_mean_over_target_tokens_since_the_last():
    run = start_run("--logging_steps 2")
    for loss, n_targets in [(4.0, 10), (1.0, 30), (2.0, 5), (3.0, 5), (7.0, 1)]:
        run.stepped(loss, n_targets, lr=0.1)
    rows = conftest.metrics("r")
    assert [(row["step"], row["loss"]) for row in rows] == [(2, 1.75), (4, 2.5), (5, 7.0)]
    assert [row["lr"] for row in rows] == [0.1] * 3
    assert [row["epoch"] for row in rows] == [2, 4, 5]


def due_steps(name, flags=""):
    """Those of 7 steps, 3 of them an epoch, at which run.<name>() is true."""
    shutil.rmtree("models/r", ignore_errors=True)
    run = start_run(flags)
    run.max_steps, run.steps_per_epoch = 7, 3
    steps = []
    for run.state["step"] in range(8):
        if getattr(run, name)():
            steps.append(run.step)
    return steps


def test_a_checkpoint_is_due_before_every_evaluation():
    assert due_steps("eval_is_due") == [0, 3, 6, 7]
    assert due_steps("eval_is_due", "--eval_steps 2") == [0, 2, 4, 6, 7]
    assert due_steps("save_is_due", "--eval_steps 2") == [0, 2, 3, 4, 6, 7]
    assert due_steps("save_is_due", "--eval_steps 2 --save_steps 5") == [0, 2, 4, 5, 6, 7]
    assert due_steps("save_is_due", "--save_steps 0") == [7]
    assert due_steps("save_is_due", "--save_steps 0 --metric_for_best loss") == [0, 3, 6, 7]
