"""project_grads.py: gradients against autograd, sketches, stores, estimates against slow ones."""

import collections
import pathlib
import re
import shutil
import sys
import time

import conftest
import numpy as np
import pytest
import torch
import transformers
from test_prompts import CHAT

import project_grads as grads
import seq2seq
import sft_causal

COLLECT = ["--data", "mix", "--groups", "skill", "--raw_prompt", "--dim", 300, "--batch_size", 4]


def write_mix(n=24, name="mix"):
    """data/mix.json: n training and 9 evaluation records of very different lengths in 3 groups."""
    records = conftest.pairs(n + 9)
    for i, record in enumerate(records):
        record["skill"] = "abc"[i % 3]
    conftest.write_data(name, records[:n], records[n:])


def run(command, *words):
    """The command in this process."""
    return conftest.run(command, *words, module=grads)


def collect(out, model, split="train", *words):
    flags = [*COLLECT, "--model_init_path", model, "--split", split, "--out", out]
    assert not run("collect", *flags, *words)
    return grads.Store(out)


@pytest.fixture
def stores():
    """Stores of the training and the target examples of models/llama."""
    write_mix()
    model = conftest.make_causal("llama")
    return collect("G", model), collect("E", model, "eval")


# -------------------------------------------------------------------------------------- gradients

FAMILIES = {
    "llama": {"pad_token_id": 85},  # a letter: torch gives it no gradient
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},  # has biases
    "gpt2": {},  # Conv1D
    "t5": {},
    "t5v1.1": {},
}


def make_family(name):
    kind = name.removesuffix("-tied")
    make = conftest.make_model if kind.startswith("t5") else conftest.make_causal
    return make(kind, **FAMILIES[name])


def move_weights(path, to):
    """A copy of a model with other weights."""
    shutil.copytree(path, to)
    weights = conftest.safetensors.torch.load_file(f"{to}/model.safetensors")
    for weight in weights.values():
        weight.mul_(1.02)
    conftest.safetensors.torch.save_file(weights, f"{to}/model.safetensors", {"format": "pt"})


def open_model(path, *words):
    args = grads.parse_args(["collect", "--model_init_path", path, *map(str, [*COLLECT, *words])])
    return grads.Opened(args, [])


class WholeGradients(grads.Sketch):
    """In place of a sketch: all numbers of all weights."""

    def start(self, n_rows):
        sizes = [weight.numel() for weight in self.tracked.values()]
        self.starts = dict(zip(self.tracked, np.cumsum([0, *sizes])))
        return torch.zeros(n_rows, sum(sizes))

    def add(self, sums, name, start, values):
        first = self.starts[name] + start
        sums[:, first : first + values.shape[1]] += values

    def add_at(self, sums, name, coordinates, values):
        sums.scatter_add_(1, self.starts[name] + coordinates, values)

    def finish(self, sums):
        return sums.clone()


def own_loss(opened, i):
    """The loss of an example as transformers computes it, alone and without padding."""
    source_ids, input_ids, is_target = opened.examples[i]
    labels = torch.tensor(np.where(is_target, input_ids, -100))[None]
    read = torch.tensor(source_ids or input_ids.tolist())[None]
    return opened.model(input_ids=read, labels=labels).loss


def check_rows(opened, monkeypatch):
    monkeypatch.setattr(grads, "Sketch", WholeGradients)
    gradients = grads.Gradients(opened.model, 0, 0)
    ids = [0, 5, 11, 16, 23]  # padded to the longest
    losses, rows = gradients.rows(opened.batch(ids))
    weights = list(gradients.tracked.values())
    for weight in weights:
        weight.requires_grad_()
    for row, loss, i in zip(rows, losses, ids):
        gradients.n_rows = 1  # the hooks still watch
        expected_loss = own_loss(opened, i)
        found = torch.autograd.grad(expected_loss, weights)
        expected = torch.cat([grad.flatten() for grad in found])
        assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
        assert (row - expected).norm() <= 1e-6 * expected.norm()
    assert not torch.allclose(rows[0], rows[1])
    return gradients


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_autograds_one_by_one(name, monkeypatch):
    write_mix()
    opened = open_model(make_family(name))
    gradients = check_rows(opened, monkeypatch)
    tracked = set(map(id, gradients.tracked.values()))
    for path, weight in opened.model.named_parameters():
        is_left_out = re.search("norm|ln_|wpe|relative", path) is not None
        assert (id(weight) in tracked) != is_left_out, path


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_rows_of_lora_are_autograds(name, monkeypatch):
    write_mix()
    opened = open_model(make_family(name), "--lora_rank", 2)
    torch.manual_seed(1)
    for path, weight in opened.model.named_parameters():
        if "lora_B" in path:
            torch.nn.init.normal_(weight.data, std=0.1)
    gradients = check_rows(opened, monkeypatch)
    assert all("lora_" in path for path in gradients.tracked)


def forget_lookups(self, own, module, ids, grad):
    """A wrong rule."""


@pytest.mark.parametrize("name", ["llama-tied", "t5"])
def test_a_rule_that_does_not_fit_is_found_before_the_first_row(name, monkeypatch, refused):
    write_mix()
    monkeypatch.setattr(grads.Gradients, "add_lookup", forget_lookups)
    assert "the gradients differ from autograd's" in refused(collect, "G", make_family(name))


def test_layers_that_mix_examples_are_refused(refused):
    write_mix()
    opened = open_model(conftest.make_causal("llama"))
    mlp = opened.model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x.flatten(0, 1)).view_as(x)
    gradients = grads.Gradients(opened.model, 8, 0)
    assert "model.layers.1.mlp.gate_proj mixes the examples" in refused(
        gradients.rows, opened.batch([0, 1])
    )


# --------------------------------------------------------------------------------------- sketches


def test_the_hash_is_splitmix64():
    """Its first numbers from seed 0, as Vigna's reference has them."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    states = torch.arange(1, 4) * (0x9E3779B97F4A7C15 - 2**64)
    assert [int(number) % 2**64 for number in grads.mix(states)] == expected


@pytest.mark.parametrize("dim", [100, 512])
def test_a_sketch_keeps_inner_products_as_an_ideal_one_does(dim):
    rng = np.random.default_rng(0)
    vectors = torch.tensor(rng.standard_normal((20, 20000)), dtype=torch.float32)
    vectors += 0.5  # neither orthogonal nor with a mean of 0
    vectors /= vectors.norm(dim=1, keepdim=True)
    weights = {"a": torch.zeros(100, 150), "b": torch.zeros(5000)}
    pairs = np.triu_indices(20, 1)
    cosines = (vectors @ vectors.T).numpy()[pairs]
    errors = []
    for seed in range(30):
        sketch = grads.Sketch(weights, dim, seed, "cpu")
        sums = sketch.start(20)
        sketch.add(sums, "a", 0, vectors[:, :7000])
        sketch.add(sums, "a", 7000, vectors[:, 7000:15000])
        order = torch.randperm(5000).expand(20, -1)
        sketch.add_at(sums, "b", order, vectors[:, 15000:].gather(1, order))
        rows = sketch.finish(sums).numpy()
        errors.append((rows @ rows.T)[pairs] - cosines)
    ideal = np.sqrt(np.mean((1 + cosines**2) / dim))  # of a dense random matrix
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(ideal, rel=0.15)
    assert abs(np.mean(errors)) < ideal / 3


# ------------------------------------------------------------------------------ records and stores

RECORDS = [
    {"prompt": "add 1 2 =", "completion": " 3"},
    {"prompt": ["add 1 2 =", "1 + 2 ="], "completion": [" 3", " three"]},
    {"text": "one and two"},
    {"messages": CHAT},
    {"messages": [*CHAT[:2], {**CHAT[2], "weight": 0}, *CHAT[3:]]},
]


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("flag", ["--raw_prompt", "--template=chatml"])
def test_records_are_read_as_sft_causal_reads_them(record, flag):
    if "messages" in record and flag == "--raw_prompt":
        pytest.skip("texts only")
    words = ["--model_init_name", "x", "--max_length", "64", flag]
    args = sft_causal.parse_args(words)
    tokenizer = transformers.AutoTokenizer.from_pretrained(conftest.ROOT / "models/tiny-llama")
    prompts = sft_causal.open_prompts(args, "x", tokenizer, [])
    document = sft_causal.to_example(args, prompts, "d", record, "here").documents[0]
    ((input_ids, labels, _),) = sft_causal.tokenize_block([document], args, prompts, [])
    _, found, is_target = grads.encode(record, prompts, args, is_seq2seq=False)
    n = len(found)  # what follows the last reply is left out
    assert found.tolist() == input_ids[:n].tolist()
    assert is_target.tolist() == (labels[:n] != sft_causal.IGNORED).tolist()
    assert not (labels[n:] != sft_causal.IGNORED).any()


@pytest.mark.parametrize("lengths", [(1024, 512), (6, 3)])
def test_records_are_read_as_seq2seq_reads_them(lengths):
    source_length, length = lengths
    write_mix()
    flags = ["--max_source_length", source_length, "--max_length", length]
    opened = open_model(conftest.make_model("t5"), *flags)
    texts = collections.defaultdict(list)
    for _, _, record in opened.records:
        for name in ("prompt", "completion"):
            texts[name].append(record[name])
    sources = seq2seq.tokenize_prompts(texts["prompt"], opened.tokenizer, source_length)
    labels = seq2seq.tokenize_completions(texts["completion"], opened.tokenizer, length)
    for example, source_ids, answer_ids in zip(opened.examples, sources, labels):
        assert example.source_ids == source_ids.tolist()
        assert example.input_ids.tolist() == answer_ids.tolist()


def test_a_store_that_was_stopped_goes_on_to_the_same_bits(stores, monkeypatch, capsys, refused):
    whole = stores[0]
    rows = grads.Gradients.rows
    calls = []

    def stop_at_fourth(self, batch):
        calls.append(len(batch["labels"]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return rows(self, batch)

    monkeypatch.setattr(grads.Gradients, "rows", stop_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        collect("again", "models/llama")
    assert len(list(pathlib.Path("again/parts").glob("*.npz"))) == 2
    assert "'again' is no finished store" in refused(
        run, "subsets", "--grads", "again", "--out", "s"
    )
    store = collect("again", "models/llama")
    assert (store.rows == whole.rows).all() and (store.loss == whole.loss).all()
    assert calls == [3, 4, 4, 4] + [3] + [4] * 4  # both times the check first
    other_batches = collect("other", "models/llama", "train", "--batch_size", 7)
    np.testing.assert_allclose(other_batches.rows, whole.rows, atol=1e-6 * abs(whole.rows).max())
    assert whole.rows.shape == (24, 300) and whole.names == ["a", "b", "c"]
    assert whole.group.tolist() == [0, 1, 2] * 8
    collect("./again", "models/llama")
    assert "again is finished" in capsys.readouterr().out
    assert "again is another store: ['max_length" in refused(
        collect, "again", "models/llama", "train", "--max_length", 9
    )


def test_which_examples_are_collected(stores):
    few = collect("few", "models/llama", "train", "--num_batches_gradients", 2)
    np.testing.assert_allclose(few.loss, stores[0].loss[:8], rtol=1e-5)
    for name, n in ((0.25, 6), (5, 5)):
        assert len(collect(f"drawn{n}", "models/llama", "train", "--downsample", name).rows) == n


def test_stores_that_do_not_belong_together_are_refused(stores, refused):
    write_mix(27, "longer")
    pathlib.Path("subsets.txt").write_text("0 1\n1 2\n")
    collect("seed", "models/llama", "eval", "--seed", 1)
    collect("tied", conftest.make_causal("gpt2"), "eval")
    move_weights("models/llama", "models/tuned")
    collect("tuned", "models/tuned", "eval")
    collect("longer", "models/tuned", "train", "--data", "longer")
    pair = ["--grads", "G", "--target_grads"]
    for words, message in [
        ([*pair, "seed"], "another seed"),
        ([*pair, "E", "--anchor_grads", "G", "tuned"], "another model_sha256"),
        ([*pair, "tied"], "another parameters"),
        ([*pair, "tuned"], "another model_sha256"),
        ([*pair, "E", "--anchor_grads", "longer", "tuned"], "another data_sha256"),
    ]:
        assert message in refused(
            run, "estimate", *words, "--subsets", "subsets.txt", "--out", "e.csv"
        )
    write_mix(21)
    assert "G: its data files have changed" in refused(
        run, "select", *pair, "E", "--out", "chosen.json"
    )


# -------------------------------------------------------------------------------------- estimates


def slow_mean(stores, groups, subset):
    """The mean of the rows of a subset, over tokens, token by token."""
    rows = []
    for i, g in enumerate(groups):
        if g in subset:
            for _ in range(stores[0].n_tokens[i]):
                rows.append(np.mean([store.rows[i] for store in stores], axis=0))
    return np.mean(np.array(rows, np.float64), axis=0)


def slow_losses(store, step):
    """Of each group: the mean over tokens of loss + row . step."""
    losses = np.repeat(store.loss + store.rows @ step, store.n_tokens)
    groups = np.repeat(store.group, store.n_tokens)
    return np.array([losses[groups == g].mean() for g in range(len(store.names))])


def estimate(out, *words):
    flags = ["--grads", "G", "--target_grads", "E", "--subsets", "subsets.txt", "--out", out]
    assert not run("estimate", *flags, *words)
    return grads.read_table(out)


def test_estimates_are_those_of_a_slow_reference(stores):
    train, target = stores
    pathlib.Path("subsets.txt").write_text("0 1\n1 2\n0 2\n0 1 2\n0 1\n")
    subsets = [(0, 1), (1, 2), (0, 2), (0, 1, 2)]
    columns, rows = estimate("base.csv", "--step_size", 0.1)
    assert columns == ["loss_a", "loss_b", "loss_c"] and len(rows) == 5
    np.testing.assert_allclose(rows["base", ()], slow_losses(target, np.zeros(300)), rtol=1e-6)
    for subset in subsets:
        step = -0.1 * slow_mean([train], train.group, subset)
        expected = slow_losses(target, step)
        np.testing.assert_allclose(rows["estimate", subset], expected, rtol=1e-5)
    # around an anchor, here a model of other weights
    move_weights("models/llama", "models/all")
    anchors = collect("GA", "models/all"), collect("EA", "models/all", "eval")
    anchored = ["--anchor_grads", "GA", "EA"]
    _, rows = estimate("anchor.csv", *anchored, "--step_size", 0.1)
    everything = slow_mean([train, anchors[0]], train.group, (0, 1, 2))
    for subset in subsets:
        step = -0.1 * (slow_mean([train, anchors[0]], train.group, subset) - everything)
        expected = slow_losses(anchors[1], step)
        np.testing.assert_allclose(rows["estimate", subset], expected, rtol=1e-5)
    expected = slow_losses(anchors[1], np.zeros(300))  # of everything: the anchor's own
    np.testing.assert_allclose(rows["estimate", (0, 1, 2)], expected, rtol=1e-6)
    # a step size is found again from true runs that it made
    truth = [("base", (), rows["base", ()])]
    for subset in subsets:
        truth.append(("0", subset, rows["estimate", subset]))
    grads.write_table("truth.csv", target.names, truth)
    _, again = estimate("again.csv", *anchored, "--calibrate", "truth.csv:2")
    assert [run for run, _ in again] == ["base", *["calibration"] * 2, *["estimate"] * 2]
    for (_, subset), losses in list(again.items())[1:]:
        np.testing.assert_allclose(losses, rows["estimate", subset], rtol=1e-5)


def test_no_step_size_keeps_the_order_and_says_so(stores, capsys):
    pathlib.Path("subsets.txt").write_text("0\n1\n2\n")
    orders = []
    for words in (["--step_size", 0.1], []):
        _, table = estimate("e.csv", *words)
        losses = np.array([table["estimate", (g,)] for g in range(3)])
        orders.append(np.argsort(losses, axis=0).tolist())
    assert orders[0] == orders[1]
    assert "WARNING no step size" in capsys.readouterr().out


def test_the_logistic_fit_is_at_its_minimum(stores):
    train = stores[0]
    (w,) = grads.logistic_directions(train, [(0, 2)])
    chosen = np.isin(train.group, (0, 2))
    p = np.exp(-train.loss[chosen])
    rows = -train.rows[chosen].astype(np.float64) / (1 - p)[:, None]
    margins = np.log(p / (1 - p)) + rows @ w
    penalty = grads.PENALTY * np.square(rows).sum(1).mean()
    pull = rows.T @ (1 / (1 + np.exp(margins))) / len(rows)
    assert np.linalg.norm(2 * penalty * w - pull) < 1e-3 * np.linalg.norm(pull)
    pathlib.Path("subsets.txt").write_text("0 2\n")
    _, table = estimate("fit.csv", "--fit", "logistic", "--step_size", 1)
    np.testing.assert_allclose(table["estimate", (0, 2)], slow_losses(stores[1], w), rtol=1e-5)


def test_the_first_order_error_is_that_of_a_slow_reference(stores):
    assert not run("linerr", "--grads", "E", "--scale", 0.003)
    errors = conftest.read_json("E/linerr.json")
    opened = open_model("models/llama", "--split", "eval")
    weights = list(opened.model.parameters())
    before, gradients = [], []
    for i in range(9):
        loss = own_loss(opened, i)
        before.append(float(loss))
        grad = torch.autograd.grad(loss, weights)
        gradients.append(torch.cat([part.flatten() for part in grad]))
    gradients = torch.stack(gradients)
    direction = gradients.sum(0)
    vector = torch.nn.utils.parameters_to_vector(weights).detach()
    step = -0.003 * vector.norm() / direction.norm() * direction
    torch.nn.utils.vector_to_parameters(vector + step, weights)
    change = np.array([float(own_loss(opened, i)) for i in range(9)]) - before
    error = np.linalg.norm((gradients @ step).numpy() - change) / np.linalg.norm(change)
    assert errors["distance 0.003"]["relative_error"] == pytest.approx(error, rel=0.1)
    assert errors["distance 3e-05"]["relative_error"] < error / 3
    collect("E16", "models/llama", "eval", "--precision", "bf16")
    assert not run("linerr", "--grads", "E16", "--scale", 0.003)
    of_bf16, of_fp32 = pathlib.Path("E16/linerr.json"), pathlib.Path("E/linerr.json")
    assert of_bf16.read_text() == of_fp32.read_text()


def test_subsets_and_clusters(stores):
    run("subsets", "--grads", "G", "--subset_size", 2, "--out", "s.txt")
    lines = pathlib.Path("s.txt").read_text().splitlines()
    assert len(lines) == 100 and set(lines) == {"0 1", "0 2", "1 2"}
    centres = np.repeat(np.eye(2), 10, axis=0)
    rows = centres + 0.05 * np.random.default_rng(0).standard_normal((20, 2))
    found = grads.cluster(rows, 2, seed=0)
    assert len(set(found[:10])) == len(set(found[10:])) == 1
    run("subsets", "--grads", "G", "--clusters", 4, "--out", "clustered")
    store = grads.Store("clustered")
    assert len(store.names) <= 4 and (store.rows == stores[0].rows).all()
    assert not run("subsets", "--grads", "clustered", "--out", "c.txt")


def test_agreement_and_baselines():
    true = np.array([[1.0, 2], [2, 1], [3, 4], [4, 5]])
    base = np.array([2.0, 2])
    perfect = {"pearson": 1, "spearman": 1, "relative_error": 0, "r2": 1}
    assert grads.agreement(true, true, base) == pytest.approx(perfect)
    nothing = grads.agreement(0 * true + base, true, base)
    assert nothing["r2"] == nothing["spearman"] == 0
    bent = grads.agreement(true**3, true, base)
    assert bent["spearman"] == pytest.approx(1) and bent["pearson"] < 0.99
    rows = [("base", (), base)]
    for g, losses in enumerate(true):
        rows += [("0", (g,), losses), ("1", (g,), losses + 0.1)]
    grads.write_table("truth.csv", ["a", "b"], rows)
    estimates = [("estimate", (g,), losses) for g, losses in enumerate(true)]
    grads.write_table("e.csv", ["a", "b"], estimates)
    run("compare", "--estimates", "e.csv", "--truth", "truth.csv")
    table = conftest.read_json("e.csv.compare.json")
    assert table["estimate"]["pearson"] == pytest.approx(1)
    changes = np.square(true + 0.05 - base).sum()
    assert table["estimate"]["r2"] == pytest.approx(1 - 8 * 0.05**2 / changes)
    assert table["ceiling: another order"]["spearman"] == pytest.approx(1)


def select(method, *words):
    """(data file, {name: score})"""
    flags = ["--grads", "G", "--target_grads", "E", "--method", method, "--out", f"{method}.json"]
    assert not run("select", *flags, *words)
    scored = conftest.read_json(f"{method}.json.scores.json")
    return conftest.read_json(f"{method}.json"), dict(scored)


def test_select_keeps_what_helps(stores):
    train, target = stores
    chosen, scored = select("less", "--top", 5)
    scores = []
    for row in train.rows:
        cosines = target.rows @ row / np.linalg.norm(target.rows, axis=1) / np.linalg.norm(row)
        scores.append(max(np.mean(cosines[target.group == g]) for g in range(3)))
    best = np.argsort(scores)[:-6:-1]
    records = conftest.read_json("data/mix.json")
    assert chosen["train"] == [records["train"][i] for i in sorted(best)]
    assert chosen["eval"] == records["eval"]
    assert list(scored) == best.tolist()
    np.testing.assert_allclose(list(scored.values()), np.array(scores)[best], rtol=1e-4)
    # groups: by the change of the loss that each brings, and by the mean of its estimates
    _, gains = select("forward", "--top", 1.0)
    before = slow_losses(target, np.zeros(300)).mean()
    for g, name in enumerate(train.names):
        share = train.n_tokens[train.group == g].sum() / train.n_tokens.sum()
        after = slow_losses(target, -share * slow_mean([train], train.group, (g,))).mean()
        assert gains.get(name, 0) == pytest.approx(max(before - after, 0), rel=1e-3)
    losses = {(0, 1): 3.0, (1, 2): 1.0, (0, 2): 2.0}
    rows = [("estimate", subset, [0, loss, 2 * loss]) for subset, loss in losses.items()]
    grads.write_table("e.csv", target.names, rows)
    chosen, scored = select("ensemble", "--estimates", "e.csv", "--top", 2)
    assert scored == {"c": -1.5, "b": -2.0}
    assert {record["skill"] for record in chosen["train"]} == {"b", "c"}


def test_a_group_that_no_subset_has_is_not_the_best(capsys):
    grads.write_table("e.csv", ["a"], [("estimate", (0, 2), [0.5])])
    with pytest.raises(SystemExit):
        grads.ensemble("e.csv", 3)
    assert "no subset has group 1" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- mistakes

MISTAKES = [
    ("collect --data mix --out x", "no model: --model_init_name"),
    ("collect --model_init_name llama --data mix", "--out is missing"),
    ("collect --model_init_name nope --data mix --out x", "models/nope not found"),
    ("collect --model_init_name llama --data nope --out x", "data/nope not found"),
    ("collect --model_init_name llama --data mix:9 --out x", "use --downsample"),
    (
        "collect --model_init_name llama --data mix --out x --groups kind",
        "no 'kind', which --groups names",
    ),
    ("collect --model_init_name llama --data mix --out x --split test", "no test records"),
    ("collect --model_init_name llama --data mix --out x --dim 0", "--dim 0: expected more than 0"),
    ("collect --model_init_name llama --data bad --out x", "'completion' is missing"),
    ("collect --model_init_name llama --data mix --out data", "data is no store"),
    ("subsets --grads nope --out x", "'nope' is no finished store"),
    ("estimate --grads G --target_grads E --out x", "--subsets is missing"),
    ("estimate --grads G --target_grads E --subsets s --out x", "No such file or directory: 's'"),
    ("estimate --grads G --target_grads E --subsets bad.txt --out x", "expected numbers below 3"),
    ("estimate --grads G --target_grads E --subsets ok.txt --calibrate t --out x", "FILE:3"),
    ("estimate --grads G --target_grads E --subsets ok.txt --calibrate t:0 --out x", "FILE:3"),
    ("estimate --grads G --target_grads E --subsets ok.txt --anchor_grads G --out x", "two stores"),
    ("compare", "--estimates is missing"),
    ("demo --out data", "--out data exists"),
    ("compare --estimates e.csv --truth t.csv", "No such file or directory: 'e.csv'"),
    ("select --grads G --target_grads E --out x --nope", "unrecognized arguments: --nope"),
]


def test_mistakes_are_told_in_a_line(stores, refused):
    conftest.write_data("bad", [{"prompt": "a"}], [])
    pathlib.Path("bad.txt").write_text("0 3\n")
    pathlib.Path("ok.txt").write_text("0 1\n")
    for words, message in MISTAKES:
        assert message in refused(run, *words.split()), words


def test_names_of_the_earlier_system():
    words = (
        "collect --model_key gpt2 --load_model_dir run --train_lora --lora_rank 4 --lora_alpha 32 "
    )
    words += "--project_gradients --project_dimension 200 --downsample 0.5 --batch_size 2 "
    words += "--num_batches_gradients 9 --compute_pretrained_outputs --save_name G"
    args = grads.parse_args(words.split())
    assert (args.model_init_path, args.lora_rank, args.dim, args.out) == ("run", 4, 200, "G")
    args = grads.parse_args("estimate --load_sample_task_dir s.txt --subset_num 3".split())
    assert (args.subsets, args.limit) == ("s.txt", 3)
    words = ["--save_name", "--train_lora"]  # of the trainer
    assert grads.parse_args(["truth", "--", *words]).trainer_flags == words
    grads.parse_args("subsets --number_of_subsets 7 --subset_size 0.75 --seed 2".split())
    grads.parse_args("linerr --scale 0.02".split())


# ------------------------------------------------------------------------------------ whole runs


@pytest.mark.slow
def test_a_kill_and_two_ranks_change_nothing():
    write_mix(400)
    model = make_family("t5")
    calm = collect("calm", model)
    words = ["collect", *COLLECT, "--model_init_path", model, "--out", "killed"]
    parts = pathlib.Path("killed/parts")
    process = conftest.start_many([words], 2, grads)
    while len(list(parts.glob("*.npz"))) < 10:
        assert process.poll() is None, conftest.finish(process)
        time.sleep(0.01)
    process.kill()
    assert not pathlib.Path("killed/COMPLETE").exists()
    conftest.finish(conftest.start_many([words], 2, grads))
    killed = grads.Store("killed")
    np.testing.assert_allclose(killed.rows, calm.rows, atol=1e-6 * abs(calm.rows).max())
    np.testing.assert_allclose(killed.loss, calm.loss, rtol=1e-5)


def test_a_trainer_that_fails_is_told(refused):
    grads.run_trainer([sys.executable, "-c", "print('fine')"])
    assert "ERROR why\n" in refused(
        grads.run_trainer, [sys.executable, "-c", "print('why'); raise SystemExit(2)"]
    )


def run_here(command):
    """In place of grads.run_trainer: a process takes 8 seconds to import what it needs."""
    _, script, *words = command
    assert not conftest.run(*words, module=sys.modules[pathlib.Path(script).stem])


@pytest.mark.slow
@pytest.mark.parametrize("name, lora", [("llama", []), ("t5", []), ("t5", ["--lora_rank", 2])])
def test_truth_is_what_the_trainers_find(name, lora, monkeypatch):
    monkeypatch.setattr(grads, "run_trainer", run_here)
    write_mix()
    model = make_family(name)
    collect("G", model, "train", *lora)
    collect("E", model, "eval", *lora)
    pathlib.Path("subsets.txt").write_text("0\n1 2\n")
    words = ["truth", "--grads", "G", "--target_grads", "E", "--subsets", "subsets.txt", "--out"]
    tune = ["--max_steps", 4, "--train_batch_size", 8, "--learning_rate", 0.01]
    run(*words, "truth.csv", "--repeat", 2, "--", *tune)
    _, rows = grads.read_table("truth.csv")
    runs = [("0", (0,)), ("0", (1, 2)), ("1", (0,)), ("1", (1, 2))]
    assert list(rows) == [("base", ()), ("all", (0, 1, 2)), *runs]
    assert len({losses[-1] for losses in rows.values()}) == 6
    assert not list(pathlib.Path("truth.csv.runs/models").glob("subset-*/**/*.pt"))
    anchor = "truth.csv.runs/models/all"
    assert pathlib.Path(anchor, "adapter_model.safetensors").exists() == bool(lora)
    store = collect("EA", anchor, "eval")
    expected = grads.group_means(store.loss, store)
    np.testing.assert_allclose(rows["all", (0, 1, 2)], expected, rtol=1e-5)
    before = pathlib.Path("truth.csv").read_text()
    run(*words, "truth.csv", "--repeat", 2, "--", *tune)  # everything is there
    assert pathlib.Path("truth.csv").read_text() == before
    with pytest.raises(SystemExit):
        run(*words, "truth.csv", "--", *tune, "--learning_rate", 0.02)


@pytest.mark.slow
def test_the_demo_ranks_subsets_as_fine_tuning_does(monkeypatch):
    runners = iter([grads.run_trainer])  # the first in a process of its own, as all of a user's
    monkeypatch.setattr(grads, "run_trainer", lambda words: next(runners, run_here)(words))
    assert not run("demo", "--limit", 8)  # which goes into its folder
    table = conftest.read_json("anchor.csv.compare.json")
    assert table["estimate"]["pearson"] > 0.7
    nothing = table["baseline: nothing changes"]
    assert table["estimate"]["relative_error"] < nothing["relative_error"]
    kept = [name for name, _ in conftest.read_json("best.json.scores.json")]
    assert not [name for name in kept[:4] if "noisy" in name]
