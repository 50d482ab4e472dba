"""project_grads.py: gradients against autograd, sketches, the store, estimates; on tiny models of random weights."""

import copy
import hashlib
import json
import math
import re
import shutil
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import bpe_tokenizer, write_llama, write_model

import project_grads as grads

KINDS = ["llama", "llama tied", "gpt2", "qwen3", "t5", "t5 untied"]


def save_random(kind, folder):
    """A model folder with random weights, norms and biases included."""
    torch.manual_seed(0)
    if kind.startswith("t5"):
        write_model(folder, **({"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"} if "untied" in kind else {}))
    elif kind == "gpt2":
        bpe_tokenizer().save_pretrained(folder)
        transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
                                initializer_range=0.1).save_pretrained(folder)
    elif kind == "qwen3":
        bpe_tokenizer().save_pretrained(folder)
        transformers.Qwen3Config(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                                 num_key_value_heads=2, initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    else:
        write_llama(folder, tie_word_embeddings="tied" in kind)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = (transformers.AutoModelForSeq2SeqLM if kind.startswith("t5") else transformers.AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """models/<kind>, and data/mix.jsonl with 24 ragged training and 9 evaluation records in three groups."""
    root = tmp_path_factory.mktemp("grads")
    for kind in KINDS:
        save_random(kind, root / "models" / kind.replace(" ", "-"))
    rng, words = np.random.default_rng(0), "the cat reads a long book yes no".split()
    lines = [{"prompt": " ".join(rng.choice(words, rng.integers(1, 9))) + ":", "completion": " " + " ".join(rng.choice(words, rng.integers(1, 7))),
              "skill": "abc"[i % 3], **({"split": "eval"} if i >= 24 else {})} for i in range(33)]
    (root / "data").mkdir()
    (root / "data" / "mix.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def run(place, command, *words):
    """The command in this process; -> exit code."""
    flags = ["--mount_dir", place] if command in ("collect", "linerr", "estimate", "verify", "select", "truth") else []
    try:
        return grads.main(grads.parse_args([str(word) for word in (command, *words, *flags)]))
    except SystemExit as stop:
        return stop.code


def collect(place, out, kind="llama", *words, split="train", data="mix"):
    assert run(place, "collect", "--model_init_name", kind, "--data_name", data, "--groups", "skill", "--split", split, "--store_dtype", "fp32",
               "--out", place / out, *words) == 0
    return grads.Store(place / out, [])


@pytest.fixture(scope="module")
def stores(place):
    return collect(place, "G"), collect(place, "E", split="eval")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_autograds_one_by_one_and_alone(place, kind):
    """24 padded rows by hooks against each unpadded row by autograd, every parameter; `verify` does it, with the sum, adjoint and derivatives."""
    assert run(place, "verify", "--model_init_name", kind.replace(" ", "-"), "--data_name", "mix", "-n", 12) == 0


def opened(place, kind, *words):
    """(model, rows, args, ids, config) as collect has them before the first hook."""
    args = grads.parse_args(["collect", "--model_init_name", kind, "--data_name", "mix", "--raw_prompt", "--mount_dir", str(place), "--sketch", "exact",
                             "--out", "x", *map(str, words)])
    source, config, tokenizer, rows, _, precision = grads.prepare(args)
    return grads.open_model(args, source, config, torch.device("cpu"), precision), rows, args, grads.pad_and_start(tokenizer, config), config


def alone(model, rows, i, target="loss"):
    """Output of row i, unpadded, by the model's own forward: the mean loss that it computes from labels, or mean log-odds from its logits."""
    ids = torch.tensor(np.where(rows.tokens[i] < 0, ~rows.tokens[i], rows.tokens[i]), dtype=torch.long)[None]
    labels = torch.where(torch.tensor(rows.tokens[i] < 0)[None], ids, -100)
    if model.config.is_encoder_decoder:
        found = model(input_ids=torch.tensor(np.asarray(rows.source[i]), dtype=torch.long)[None], labels=labels)
        logits, wanted = found.logits[0], labels[0]
    else:
        found = model(input_ids=ids, labels=labels)
        logits, wanted = found.logits[0, :-1], labels[0, 1:]
    if target != "logodds":
        return found.loss * ((wanted >= 0).sum() if target == "loss_sum" else 1)
    p = torch.softmax(logits.double(), -1).gather(-1, wanted.clamp(min=0)[:, None])[:, 0][wanted >= 0]
    return torch.log(p / (1 - p)).clamp(-grads.MAX_LOGODDS, grads.MAX_LOGODDS).mean()


def assert_rows_are_autograds(found, model, tracked, rows, which, target="loss", rel=1e-5):
    """found: (rows, p) gradients of rows `which`, against one backward pass each. The bound is per parameter."""
    for row, i in zip(found, which):
        for p in tracked.values():
            p.requires_grad_(True)
        wanted = torch.autograd.grad(alone(model, rows, i, target), list(tracked.values()), allow_unused=True)
        model.requires_grad_(False)
        whole = math.sqrt(sum(float(g.square().sum()) for g in wanted if g is not None))
        for (name, p), g, part in zip(tracked.items(), wanted, torch.tensor(row).split([p.numel() for p in tracked.values()])):
            g = torch.zeros(p.numel()) if g is None else g.flatten()
            assert float((part - g).norm()) <= rel * max(float(g.norm()), 1e-3 * whole), (i, name)


SOME = [0, 3, 7, 13, 22]  # ragged: 2 to 14 targets


@pytest.mark.parametrize("kind", KINDS)
def test_stored_rows_are_the_gradients_of_the_models_own_loss(place, kind):
    """An exact store against transformers' loss of each row, alone and unpadded; norm and loss too, and tied weights are there once."""
    store = collect(place, f"exact-{kind}", kind.replace(" ", "-"), "--sketch", "exact", "--raw_prompt")
    model, rows, *_ = opened(place, kind.replace(" ", "-"))
    tracked = dict(model.named_parameters())
    assert [p["name"] for p in store.manifest["parameters"]] == list(tracked)
    assert_rows_are_autograds(store.read(SOME), model, tracked, rows, SOME)
    assert store.loss[SOME] == pytest.approx([float(alone(model, rows, i)) for i in SOME], rel=1e-5)
    assert store.logodds[SOME] == pytest.approx([float(alone(model, rows, i, "logodds")) for i in SOME], rel=1e-4)
    np.testing.assert_allclose(np.linalg.norm(store.read(), axis=1), store.norm, rtol=2e-5)
    assert store.dim == store.manifest["coverage"]["tracked"] == store.manifest["coverage"]["all"]
    with pytest.raises(AssertionError):  # of another row
        assert_rows_are_autograds(store.read([1]), model, tracked, rows, [2])


@pytest.mark.parametrize("kind", ["llama-tied", "t5"])
@pytest.mark.parametrize("target", ["logodds", "loss_sum"])
def test_other_targets_have_their_own_gradients(place, kind, target):
    store = collect(place, f"exact-{kind}-{target}", kind, "--sketch", "exact", "--raw_prompt", "--target", target)
    model, rows, *_ = opened(place, kind)
    assert_rows_are_autograds(store.read(SOME), model, dict(model.named_parameters()), rows, SOME, target, 2e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_some_parameters_have_the_gradients_that_they_have_among_all(place, kind):
    whole = collect(place, f"exact-{kind}", kind, "--sketch", "exact", "--raw_prompt")
    starts = dict(zip([p["name"] for p in whole.manifest["parameters"]], np.cumsum([0, *[math.prod(p["shape"]) for p in whole.manifest["parameters"]]])))
    for i, (params, is_there, is_not) in enumerate((("linear", "mlp", "norm|ln_|wpe|embed_tokens"), ("match:mlp", "mlp", "attn|norm|embed"),
                                                    ("gradex", "mlp", grads.GRADEX_EXCLUDED))):
        part = collect(place, f"part-{kind}-{i}", kind, "--sketch", "exact", "--raw_prompt", "--params", params)
        names = [p["name"] for p in part.manifest["parameters"]]
        assert any(is_there in n for n in names) and not any(re.search(is_not, n) for n in names)
        columns = np.concatenate([np.arange(starts[p["name"]], starts[p["name"]] + math.prod(p["shape"])) for p in part.manifest["parameters"]])
        np.testing.assert_allclose(part.read(), whole.read()[:, columns], atol=1e-6 * np.abs(whole.read()).max())
        assert part.manifest["coverage"]["tracked"] == len(columns) < part.manifest["coverage"]["all"]


@pytest.mark.parametrize("kind", ["llama-tied", "t5", "gpt2"])
def test_a_preconditioner_multiplies_every_coordinate(place, kind):
    model, rows, args, ids, _ = opened(place, kind)
    batch = grads.collate(rows, SOME, *ids, torch.device("cpu"))
    tracked = grads.tracked_parameters(model, "all")
    generator = torch.Generator().manual_seed(0)
    scales = {n: torch.rand(p.numel(), generator=generator) + 0.5 for n, p in tracked.items()}
    gradients = grads.gradients_of(model, args)
    *_, plain = gradients.rows(batch)
    gradients.close()
    gradients = grads.gradients_of(model, args, scales)
    _, _, norms, scaled = gradients.rows(batch)
    gradients.close()
    wanted = plain * grads.flat(scales, tracked)
    torch.testing.assert_close(scaled, wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(norms, wanted.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("targets", [[], ["--lora_targets", "all-linear"]])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_a_warm_adapter_has_its_gradients_and_a_fresh_one_none_in_a(place, kind, targets):
    model, rows, args, ids, _ = opened(place, kind, "--lora_rank", 2, *targets)

    def found():
        gradients = grads.gradients_of(model, args)
        try:
            return gradients.rows(grads.collate(rows, SOME, *ids, torch.device("cpu")))[3], gradients.tracked
        finally:
            gradients.close()
    fresh, tracked = found()
    assert all(".lora_" in n for n in tracked)
    for name, part in zip(tracked, fresh.split([p.numel() for p in tracked.values()], 1)):
        assert bool(part.any()) == ("lora_B" in name)
    torch.manual_seed(1)
    for name, p in tracked.items():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    warm, tracked = found()
    assert_rows_are_autograds(warm, model, tracked, rows, SOME)


def test_a_batch_of_as_many_rows_as_tokens_is_not_taken_for_a_row(place):
    for kind in ("gpt2", "t5"):
        model, rows, args, ids, _ = opened(place, kind)
        gradients, tracked = grads.gradients_of(model, args), dict(model.named_parameters())
        width = max(len(rows.tokens[i]) for i in SOME)
        which = (SOME * width)[:width]
        batch = grads.collate(rows, which, *ids, torch.device("cpu"))
        assert batch["input_ids"].shape[0] == batch["input_ids"].shape[1]
        found = gradients.rows(batch)[3]
        gradients.close()
        assert_rows_are_autograds(found[:5], model, tracked, rows, which[:5])


def drop_embedding(self, name, parts, dense, whole=grads.Gradients.add_rows):
    whole(self, name, [] if dense else parts, dense)


def sum_norms(self, name, start, values, whole=grads.Gradients.add):
    whole(self, name, start, values * (2 if "ln_" in name or "norm" in name else 1))


@pytest.mark.parametrize("kind, method, wrong, name", [
    ("gpt2", "add_rows", drop_embedding, "transformer.wte.weight"), ("llama-tied", "add_rows", drop_embedding, "model.embed_tokens.weight"),
    ("t5", "add_rows", drop_embedding, "shared.weight"), ("gpt2", "add", sum_norms, "ln_"), ("t5", "watch_bias", lambda *_: None, "relative_attention_bias")])
def test_a_rule_that_is_broken_is_found_before_the_first_row(place, monkeypatch, capsys, kind, method, wrong, name):
    """Negative control: a part of a tied weight, a norm twice, a bias that no hook sees."""
    monkeypatch.setattr(grads.Gradients, method, wrong)
    assert run(place, "collect", "--model_init_name", kind, "--data_name", "mix", "--out", place / f"broken-{kind}-{method}") == 2
    assert name in capsys.readouterr().err
    assert not (place / f"broken-{kind}-{method}" / "COMPLETE").exists()


def test_a_scalar_flattened_tokens_and_a_layer_used_twice_are_refused_with_their_names(place, capsys):
    model, rows, args, ids, config = opened(place, "llama")
    mlp = model.model.layers[1].mlp
    mlp.gain = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(SystemExit) as stop:
        grads.gradients_of(model, args)
    assert stop.value.code == 2 and "model.layers.1.mlp (LlamaMLP)" in (said := capsys.readouterr().err) and "mlp.gain" in said
    del mlp.gain
    plain = mlp.forward
    mlp.forward = lambda x: plain(x.flatten(0, 1)).view_as(x)
    gradients = grads.gradients_of(model, args)
    with pytest.raises(grads.NoBatchAxis, match="model.layers.1.mlp.gate_proj"):
        gradients.rows(grads.collate(rows, SOME, *ids, torch.device("cpu")))
    gradients.close()
    del mlp.forward
    model.model.layers[1].mlp, model.model.layers[1].input_layernorm = model.model.layers[0].mlp, model.model.layers[0].input_layernorm
    gradients = grads.gradients_of(model, args)
    with pytest.raises(grads.NoBatchAxis, match="model.layers.0.mlp.*twice"):
        gradients.rows(grads.collate(rows, SOME, *ids, torch.device("cpu")))
    gradients.close()
    args.params = "match:norm"  # a norm used twice has the sum of both uses
    gradients = grads.gradients_of(model, args)
    assert grads.check_hooks(gradients, rows, args, ids, config) < 1e-5
    gradients.close()
    args.params = "match:nothing"
    with pytest.raises(SystemExit):
        grads.gradients_of(model, args)
    assert "no parameter matches" in capsys.readouterr().err


def test_a_check_of_hooks_leaves_a_model_as_it_was(place):
    model, rows, args, ids, config = opened(place, "gpt2")
    before, logits = {n: p.clone() for n, p in model.named_parameters()}, model(torch.arange(5, 12)[None]).logits
    gradients = grads.gradients_of(model, args)
    assert grads.check_hooks(gradients, rows, args, ids, config) < 1e-5
    gradients.close()
    assert torch.equal(model(torch.arange(5, 12)[None]).logits, logits)
    assert all(torch.equal(p, before[n]) and p.grad is None and not p.requires_grad for n, p in model.named_parameters())


def test_a_module_that_mixes_examples_is_refused_with_its_name(place, capsys):
    folder = place / "models" / "mixtral"
    bpe_tokenizer().save_pretrained(folder)
    config = transformers.MixtralConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                                        num_key_value_heads=2, num_local_experts=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert run(place, "collect", "--model_init_name", "mixtral", "--data_name", "mix", "--out", place / "moe") == 2
    assert "mlp" in capsys.readouterr().err
    assert run(place, "collect", "--model_init_name", "mixtral", "--data_name", "mix", "--params", "match:self_attn", "--out", place / "moe2") == 0


def python_mix(x):
    """splitmix64's finaliser in plain integers."""
    mask = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_the_hash_is_splitmix64():
    """Its first numbers from seed 0 (Vigna's reference: e220a8397b1dcdaf, 6e789e6aa1b965f4, 06c45d188009454f)."""
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [python_mix((i + 1) * 0x9E3779B97F4A7C15 % 2**64) for i in range(3)] == known
    assert [int(h) % 2**64 for h in grads.hashed(0, torch.arange(3))] == known


def test_buckets_and_signs_are_the_golden_vector():
    """HASH splitmix64-1, seed 5, parameter "a", d = 4096: coordinate, bucket and sign, from Python's integers."""
    golden = [(0, 2749, -1), (3, 2804, 1), (4, 3072, -1), (6, 1097, -1), (2**31 + 7, 2334, -1), (2**40 + 1, 745, -1), (12345678901, 1072, -1)]
    key = int.from_bytes(hashlib.blake2b(b"(5, 'a')", digest_size=8).digest(), "little") >> 1
    assert key == 3652484201725092463 and grads.HASH == "splitmix64-1"
    sketch = grads.Sketch("sjlt", 4096, 5, {"a": 2**41}, torch.device("cpu"))
    table = sketch.buckets("a", torch.tensor([c for c, _, _ in golden]))
    assert [(int(t) >> 1, 1 - 2 * (int(t) & 1)) for t in table] == [(bucket, sign) for _, bucket, sign in golden]
    for c, bucket, sign in golden:
        h = python_mix(((c + 1) * 0x9E3779B97F4A7C15 + key) % 2**64)
        assert ((h >> 32) * 4096 >> 32, 1 - 2 * (h & 1)) == (bucket, sign)
    out = sketch.start(1)
    sketch.add_at(out, "a", torch.tensor([[golden[0][0], golden[5][0]]]), torch.tensor([[2.0, 3.0]]))
    assert {(int(i), float(sketch.finish(out)[0, i])) for i in sketch.finish(out)[0].nonzero()} == {(golden[i][1], v * golden[i][2]) for i, v in ((0, 2.0), (5, 3.0))}


@pytest.mark.parametrize("kind", ["sjlt", "rolled", "dense", "gradex", "exact"])
def test_a_sketch_does_not_depend_on_pieces_or_tables_and_lift_is_its_adjoint(kind):
    sizes, values = {"a": 1000, "b": 37}, torch.randn(3, 1037, generator=torch.Generator().manual_seed(0))
    found = []
    for table_mb, step in ((2048, 1000), (0, 7), (0, 333)):
        sketch = grads.Sketch(kind, 64, 5, sizes, torch.device("cpu"), table_mb)
        out = sketch.start(3)
        for start in range(0, 1000, step):
            sketch.add(out, "a", start, values[:, start: min(start + step, 1000)])
        order = torch.randperm(37, generator=torch.Generator().manual_seed(step)).expand(3, -1)
        sketch.add_at(out, "b", order, values[:, 1000:].gather(1, order))
        found.append(sketch.finish(out))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-5)
    w = torch.randn(sketch.dim, generator=torch.Generator().manual_seed(1))
    lifted = torch.cat(list(sketch.lift(w).values()))
    torch.testing.assert_close(found[0] @ w, values @ lifted, rtol=1e-4, atol=1e-3)
    other = grads.Sketch(kind, 64, 6, sizes, torch.device("cpu"), run=1)
    out = other.start(3)
    other.add(out, "a", 0, values[:, :1000])
    assert kind == "exact" or not torch.allclose(other.finish(out), found[0], atol=0.1)


def test_half_a_sketch_is_the_sketch_of_half_the_size_and_gradex_is_numpys_matrix():
    values = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    big, small = (grads.Sketch("sjlt", d, 5, {"a": 5000}, torch.device("cpu")) for d in (256, 64))
    outs = [sketch.start(2) for sketch in (big, small)]
    for sketch, out in zip((big, small), outs):
        sketch.add(out, "a", 0, values)
    np.testing.assert_allclose(grads.fold(big.finish(outs[0]).numpy(), 64), small.finish(outs[1]).numpy(), atol=1e-4)
    long = grads.Sketch("sjlt", 64, 5, {"a": 2**18 + 9}, torch.device("cpu"))  # buckets are hashed in pieces
    assert torch.equal(long.table("a", 2**18 - 9, 2**18 + 9), long.buckets("a", torch.arange(2**18 - 9, 2**18 + 9)))
    sketch = grads.Sketch("gradex", 10, 0, {"a": 5000}, torch.device("cpu"), run=3)
    out = sketch.start(2)
    sketch.add(out, "a", 0, values)
    whole = (2 * np.random.RandomState(3).randint(2, size=(5000, 10)) - 1) / math.sqrt(10)
    np.testing.assert_allclose(sketch.finish(out).numpy(), values.numpy() @ whole, rtol=1e-4, atol=1e-4)


def test_rows_do_not_depend_on_the_batch_and_a_stopped_store_goes_on(place, stores, monkeypatch):
    store = stores[0]
    other = collect(place, "small", "llama", "--batch_tokens", 20, "--chunk_mb", 1, "--table_mb", 0)
    np.testing.assert_allclose(other.read(), store.read(), atol=1e-5 * np.abs(store.read()).max())
    whole, calls = grads.Gradients.rows, []

    def stops(self, batch):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return whole(self, batch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(grads.Gradients, "rows", stops)
        patch.setattr(grads.Writer, "put", lambda self, *a, put=grads.Writer.put: (put(self, *a), self.flush()))
        collect(place, "stopped", "llama", "--batch_tokens", 60)
    done = np.load(place / "stopped" / "done.npy")
    assert 0 < done.sum() < 24
    marked = np.load(place / "stopped" / "proj.npy")[done]
    problems = []
    grads.Store(place / "stopped", problems)
    assert f"{done.sum()} of 24 rows" in problems[0]
    again = collect(place, "stopped", "llama", "--batch_tokens", 60)
    assert (again.read()[done] == marked).all()  # what was there was not made again
    np.testing.assert_allclose(again.read(), store.read(), atol=1e-5 * np.abs(store.read()).max())


def test_stores_of_other_things_are_refused(place, stores, capsys):
    collect(place, "seed", "llama", "--seed", 1)
    collect(place, "other", "llama-tied")
    (place / "subsets.txt").write_text("0 1\n1 2\n0 2\n")
    for first, second, word in (("seed", "E", "seed"), ("other", "E", "parameters"), ("G", "nothing", "no store")):
        capsys.readouterr()
        assert run(place, "estimate", "--grads", place / first, "--target_grads", place / second, "--subsets", place / "subsets.txt", "--out",
                   place / "x.csv") == 2
        assert word in capsys.readouterr().err
    data = (place / "G" / "proj.npy").read_bytes()
    try:
        (place / "G" / "proj.npy").write_bytes(data[:-100])
        assert run(place, "subsets", "--grads", place / "G", "--out", place / "y.txt") == 2
    finally:
        (place / "G" / "proj.npy").write_bytes(data)
    assert run(place, "collect", "--model_init_name", "gpt2", "--data_name", "mix", "--out", place / "G") == 2  # another model into a finished store


@pytest.fixture(scope="module")
def moved(place):
    """Exact stores (training rows, evaluation rows) at the weights of models/llama moved a little, as Adam's first step would: models/moved."""
    folder = place / "models" / "moved"
    shutil.copytree(place / "models" / "llama", folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(5)
    gradient = torch.tensor(collect(place, "unmoved", "llama", "--sketch", "exact").read().mean(0))
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradient.split([p.numel() for p in model.parameters()])):
            p.add_(0.02 * torch.randn_like(p) - 0.1 * g.view_as(p).sign())
    model.save_pretrained(folder)
    base = place / "models" / "llama"
    return tuple(collect(place, f"moved-{split}", "moved", "--sketch", "exact", "--base_model", base, split=split) for split in ("train", "eval"))


def test_stores_of_other_weights_or_data_are_refused_by_digest(place, stores, moved, capsys):
    train, target = collect(place, "HG", "llama", "--sketch", "exact"), collect(place, "HE", "llama", "--sketch", "exact", split="eval")
    lines = (place / "data" / "mix.jsonl").read_text().splitlines(keepends=True)
    (place / "data" / "mixed.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    swapped = collect(place, "HS", "moved", "--sketch", "exact", data="mixed")
    (place / "both.txt").write_text("0 1\n")

    def refused(*words):
        capsys.readouterr()
        code = run(place, "estimate", *words, "--subsets", place / "both.txt", "--out", place / "refused.csv")
        return code == 2 and capsys.readouterr().err
    assert "another model" in refused("--grads", train.path, "--target_grads", moved[1].path)
    assert "another data" in refused("--grads", train.path, "--target_grads", target.path, "--anchor_grads", swapped.path, moved[1].path)
    assert "same weights" in refused("--grads", train.path, "--target_grads", target.path, "--anchor_grads", train.path, target.path)


def test_an_estimate_around_an_anchor_by_hand(place, moved):
    train, target = collect(place, "AG", "llama", "--sketch", "exact"), collect(place, "AE", "llama", "--sketch", "exact", split="eval")
    chosen = [[0, 1], [1, 2], [0, 1, 2]]
    (place / "three.txt").write_text("".join(" ".join(map(str, s)) + "\n" for s in chosen))
    flags = ["--grads", train.path, "--target_grads", target.path, "--anchor_grads", moved[0].path, moved[1].path, "--subsets", place / "three.txt"]
    assert run(place, "estimate", *flags, "--step_size", 0.01, "--out", place / "a.csv") == 0

    def mean(subset):
        which = np.isin(train.group, subset)
        return sum(train.n_tokens[which] @ store.read()[which] for store in (train, moved[0])) / train.n_tokens[which].sum() / 2
    rows = grads.read_table(place / "a.csv", [])[1]
    assert [run for run, _, _ in rows] == ["base", "all", "estimate", "estimate", "estimate"]
    for _, subset, values in rows[2:]:
        wanted = moved[1].loss - 0.01 * moved[1].read() @ (mean(subset) - mean([0, 1, 2]))
        np.testing.assert_allclose(values, [*[wanted[target.group == g].mean() for g in range(3)], wanted.mean()], rtol=1e-5)
    np.testing.assert_allclose(rows[4][2], rows[1][2], rtol=1e-6)  # everything: the anchor itself
    assert run(place, "estimate", *flags, "--out", place / "b.csv") == 0  # the step size that the way to the anchor has
    weights = [dict(transformers.AutoModelForCausalLM.from_pretrained(place / "models" / n).named_parameters()) for n in ("moved", "llama")]
    way, of_all = grads.flat(weights[0], weights[0]) - grads.flat(weights[1], weights[0]), -torch.tensor(mean([0, 1, 2])).float()
    way = float(way @ of_all / (of_all @ of_all))
    assert json.loads((place / "b.csv.json").read_text())["step_size"] == pytest.approx(way, rel=1e-3)
    # --eval lift: halved as long as that lowers the subsets' own training loss, here that of target rows that are the training rows
    assert run(place, "estimate", *flags, "--eval", "lift", "--out", place / "own.csv") == 0
    flags[3], flags[6] = train.path, moved[0].path
    own = []
    while len(own) < 2 or own[-1] < own[-2]:
        name = place / f"own{len(own)}.csv"
        assert run(place, "estimate", *flags, "--eval", "lift", "--step_size", way / 2 ** len(own), "--out", name) == 0
        after = [np.average(values[list(subset)], weights=np.bincount(train.group)[list(subset)]) for run_, subset, values in grads.read_table(name, [])[1] if run_ == "estimate"]
        own.append(np.mean(after))
    assert json.loads((place / "own.csv.json").read_text())["step_size"] == pytest.approx(way / 2 ** int(np.argmin(own)), rel=1e-3), own
    assert np.argmin(own) > 0, own  # else this shows nothing


def test_a_way_to_the_anchor_against_the_gradients_is_said(place, moved, capsys, caplog):
    """Base and anchor exchanged: the order of the subsets must not be turned round."""
    train, target = collect(place, "NG", "llama", "--sketch", "exact"), collect(place, "NE", "llama", "--sketch", "exact", split="eval")
    delta = np.load(moved[0].path / "delta.npy")
    (place / "three.txt").write_text("0 1\n1 2\n")
    flags = ["--grads", train.path, "--target_grads", target.path, "--anchor_grads", moved[0].path, moved[1].path, "--subsets", place / "three.txt"]
    try:
        np.save(moved[0].path / "delta.npy", -delta)
        assert run(place, "estimate", *flags, "--out", place / "n.csv") == 0
    finally:
        np.save(moved[0].path / "delta.npy", delta)
    assert "goes against the gradients" in capsys.readouterr().err + caplog.text and json.loads((place / "n.csv.json").read_text())["step_size"] > 0


def sft_rows(tokenizer, record, *words):
    """(ids, whether each is trained, the token that ends a reply) as sft_causal.py reads a record; the tokenizer gets its template."""
    import sft_causal
    args, problems = sft_causal.parse_args(["--model_init_name", "x", *words]), []
    prompts = sft_causal.open_prompts(args, "nowhere", tokenizer, problems)
    example = sft_causal.to_example(args, prompts, "set", record, "here")
    (ids, labels, _), = sft_causal.tokenize_block(example.documents, args, prompts, problems)
    assert not problems
    return ids.tolist(), (labels != sft_causal.IGNORED).tolist(), prompts.end_token


def test_rows_are_encoded_as_the_trainers_do(place, monkeypatch):
    import seq2seq
    tokenizer = bpe_tokenizer()
    record = {"prompt": "the cat:", "completion": " reads a book"}
    args = types.SimpleNamespace(max_length=2048, max_source_length=1024, raw_prompt=True, targets="assistant")
    _, ids, is_target = grads.encode(record, tokenizer, "causal", args, None)
    theirs, their_target, _ = sft_rows(tokenizer, record, "--raw_prompt")
    assert ids.tolist() == theirs and is_target.tolist() == their_target
    chat = copy.deepcopy(tokenizer)
    messages = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "no"},
                {"role": "assistant", "content": "a book"}]
    theirs, their_target, end = sft_rows(chat, {"messages": messages})
    _, ids, is_target = grads.encode({"messages": messages}, chat, "causal", args, ("chatml", grads.end_token(chat)))
    assert grads.end_token(chat) == end and ids.tolist() == theirs and is_target.tolist() == their_target
    t5 = transformers.AutoTokenizer.from_pretrained(place / "models" / "t5")
    for args.max_source_length, args.max_length in ((1024, 2048), (4, 3)):  # whole, and cut
        source, target, _ = grads.encode(record, t5, "seq2seq", args, None)
        theirs, = seq2seq.tokenize_prompts([record["prompt"]], t5, args.max_source_length)
        their_target, = seq2seq.tokenize_completions([record["completion"]], t5, args.max_length)
        assert (list(source), list(target)) == (list(theirs), list(their_target))


def test_a_linear_estimate_is_the_first_order_change_and_calibration_finds_a_planted_step(place, capsys):
    train, target = collect(place, "XG", "llama", "--sketch", "exact"), collect(place, "XE", "llama", "--sketch", "exact", split="eval")
    (place / "two.txt").write_text("0 1\n1 2\n0 2\n")
    flags = ["--grads", place / "XG", "--target_grads", place / "XE", "--subsets", place / "two.txt"]
    assert run(place, "estimate", *flags, "--step_size", 0.01, "--out", place / "e.csv") == 0
    _, rows = grads.read_table(place / "e.csv", [])
    for _, subset, values in rows[1:]:
        which = np.isin(train.group, subset)
        mean = (train.n_tokens[which] @ train.read()[which]) / train.n_tokens[which].sum()
        wanted = target.loss - 0.01 * target.read() @ mean
        np.testing.assert_allclose(values, [*[wanted[target.group == g].mean() for g in range(3)], wanted.mean()], rtol=1e-5)
    grads.write_table(place / "truth.csv", target.names, [("base", None, rows[0][2]), *(("0", list(s), v) for _, s, v in rows[1:])])
    assert run(place, "estimate", *flags, "--calibrate", f"{place / 'truth.csv'}:2", "--out", place / "c.csv") == 0
    assert json.loads((place / "c.csv.json").read_text())["step_size"] == pytest.approx(0.01, rel=1e-3)
    assert [run for run, _, _ in grads.read_table(place / "c.csv", [])[1]] == ["base", "calibration", "calibration", "estimate"]
    assert run(place, "estimate", *flags, "--eval", "lift", "--step_size", 1e-3, "--out", place / "l.csv") == 0
    assert run(place, "estimate", *flags, "--step_size", 1e-3, "--out", place / "m.csv") == 0
    against = [("0", list(s), 2 * np.array(rows[0][2]) - np.array(v)) for _, s, v in rows[1:]]  # every subset moves the other way
    grads.write_table(place / "against.csv", target.names, [("base", None, rows[0][2]), *against])
    assert run(place, "estimate", *flags, "--calibrate", f"{place / 'against.csv'}:2", "--out", place / "g.csv") == 0
    assert json.loads((place / "g.csv.json").read_text())["step_size"] > 0 and "against the first order" in capsys.readouterr().err
    weak = grads.read_table(place / "l.csv", [])[1]
    grads.write_table(place / "weak.csv", target.names, [("base", None, rows[0][2]), *(("0", list(s), v) for _, s, v in weak[1:])])
    far = [(run, list(s), rows[0][2] + 1000 * (np.array(v) - rows[0][2])) for run, s, v in weak[1:]]  # what first order says of a step of 1: no real one
    grads.write_table(place / "far.csv", target.names, [("base", None, rows[0][2]), *(("0", s, v) for _, s, v in far)])
    for name in ("weak", "far"):
        assert run(place, "estimate", *flags, "--eval", "lift", "--calibrate", f"{place / name}.csv:2", "--out", place / f"{name}-lift.csv") == 0
    step = {name: json.loads((place / f"{name}-lift.csv.json").read_text())["step_size"] for name in ("weak", "far")}
    assert step["weak"] == pytest.approx(1e-3, rel=0.01) and step["far"] < 0.6  # halved until the real losses fit best
    lift, linear = (np.array([v for _, _, v in grads.read_table(place / f"{n}.csv", [])[1]]) for n in "lm")
    np.testing.assert_allclose(lift[1:] - lift[0], linear[1:] - linear[0], rtol=0.01)


def test_predicted_outputs_become_losses():
    store = types.SimpleNamespace(loss=np.array([0.5, 2.0]), logodds=np.array([0.3, -1.5]), n_tokens=np.array([4, 1]), manifest={"target": "loss"})
    change = np.array([[0.2, -0.1]])
    assert grads.to_losses(store, change) == pytest.approx(np.array([[0.7, 1.9]]))
    store.manifest["target"] = "loss_sum"
    assert grads.to_losses(store, change) == pytest.approx(np.array([[0.55, 1.9]]))
    store.manifest["target"] = "logodds"  # a token of log-odds o has the loss log(1 + exp(-o)); the row's own loss is kept at no change
    assert grads.to_losses(store, 0 * change) == pytest.approx(store.loss[None])
    wanted = store.loss + np.log1p(np.exp(-store.logodds - change)) - np.log1p(np.exp(-store.logodds))
    assert grads.to_losses(store, change) == pytest.approx(wanted)


def test_logistic_regression_is_scikit_learns():
    from sklearn.linear_model import LogisticRegression
    rng = np.random.default_rng(0)
    rows, flips = rng.normal(size=(60, 8)), 2.0 * (rng.random(60) < 0.7) - 1
    ours = grads.logistic(rows, np.zeros(60), 0.5, flips)
    theirs = LogisticRegression(C=0.5, solver="liblinear", random_state=0, tol=1e-10, max_iter=10000).fit(rows * flips[:, None], flips)
    np.testing.assert_allclose(ours, theirs.coef_[0], rtol=1e-3, atol=1e-4)
    penalty = 0.01
    np.testing.assert_allclose(grads.ridge(rows, flips, penalty), np.linalg.solve(rows.T @ rows + 60 * penalty * np.eye(8), rows.T @ flips), rtol=1e-6)


def test_linearisation_by_hand_and_the_weights_come_back(place, stores):
    found = grads.linearisation(np.array([1.0, 2.0]), np.array([0.5, 0.0]), np.array([2.0, 1.0]))
    assert found["squared"] == pytest.approx((0.25**2 + 0.5**2) / 2) and found["no_gradient"] == pytest.approx((0.5**2 + 0.5**2) / 2)
    assert found["r2"] == pytest.approx(1 - (0.25 + 1) / 2) and found["relative"] == pytest.approx(math.sqrt(1.25 / 2))
    assert run(place, "linerr", "--grads", place / "G", "--target_grads", place / "E", "--direction", "dual,primal,random", "--scale", 0.001, 0.002, 0.004,
               "--out", place / "lin.json") == 0
    table = json.loads((place / "lin.json").read_text())["table"]
    assert len(table) == 9 and all(r["derivative"] == "jvp" and r["squared"] < r["no_gradient"] and r["r2"] > 0.8 for r in table)
    assert [r["error_slope"] for r in table if r["direction"] == "dual"][-1] == pytest.approx(2, abs=0.3)
    model, rows, args, ids, config = opened(place, "llama")
    here = types.SimpleNamespace(model=model, rows=rows, tracked=grads.tracked_parameters(model, "all"), ids=ids, config=config, args=args,
                                 device=torch.device("cpu"))
    start, step = {n: p.detach().clone() for n, p in here.tracked.items()}, {n: torch.randn_like(p) for n, p in here.tracked.items()}
    quotient = grads.difference_quotient(here, "loss", step, np.array(SOME), start)
    assert all(torch.equal(p, start[n]) for n, p in here.tracked.items())
    with grads.attention_kernel(args):
        np.testing.assert_allclose(quotient, grads.directional(here, "loss", step, np.array(SOME)), rtol=0.02)


def test_a_model_without_forward_mode_gets_a_central_difference_and_says_so(place, stores, monkeypatch, capsys):
    flags = ["linerr", "--grads", place / "G", "--target_grads", place / "E", "--direction", "random", "--scale", 0.01, "--out", place / "without.json"]
    plain = grads.directional

    def raises(error):
        def directional(*words):
            raise error
        return directional
    monkeypatch.setattr(grads, "directional", raises(NotImplementedError("forward AD with some_kernel")))
    assert run(place, *flags) == 0
    row, = json.loads((place / "without.json").read_text())["table"]
    assert row["derivative"] == "difference" and row["r2"] > 0.8 and "some_kernel" in capsys.readouterr().err
    monkeypatch.setattr(grads, "directional", raises(RuntimeError("a mistake")))  # anything else is not taken for that
    with pytest.raises(RuntimeError, match="a mistake"):
        run(place, *flags)
    monkeypatch.setattr(grads, "directional", plain)
    assert run(place, *flags) == 0 and json.loads((place / "without.json").read_text())["table"][0]["derivative"] == "jvp"


def test_ranks_correlations_and_what_knowing_nothing_is_worth():
    assert grads.ranks([3, 1, 3, 2]).tolist() == [3.5, 1, 3.5, 2]
    true = np.array([[1.0, 2], [2, 1], [3, 0], [4, 5]])
    perfect, base = grads.agreement(true, true, np.zeros(2)), grads.agreement(np.zeros((4, 2)), true + 1, np.zeros(2))
    assert perfect["pearson"] == pytest.approx(1) and perfect["spearman"] == pytest.approx(1) and perfect["r2"] == 1
    assert math.isnan(base["pearson"]) and base["r2"] == 0 and base["relative_error"] == 1
    assert grads.agreement(true + 2, true + 1, true.mean(0) + 1)["r2"] == pytest.approx(1 - 8 / 19)  # of the changes from the base, not of the losses
    a, b = np.array([1.0, 2, 4, 3]), np.array([1.0, 3, 2, 9])
    assert grads.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_select_writes_a_data_file_and_scores_are_cosines(place, stores):
    train, target = stores
    assert run(place, "select", "--grads", place / "G", "--target_grads", place / "E", "--top", 5, "--out", place / "chosen.jsonl") == 0
    lines = [json.loads(line) for line in (place / "chosen.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines] == ["train"] * 5 + ["eval"] * 9
    unit = [s.read() / np.linalg.norm(s.read(), axis=1, keepdims=True) for s in (train, target)]
    scores = np.stack([(unit[0] @ unit[1][target.group == g].T).mean(1) for g in range(3)], 1)
    np.testing.assert_allclose(np.load(place / "chosen.scores.npz")["scores"], scores, atol=1e-5)
    records = [json.loads(line) for line in (place / "data" / "mix.jsonl").read_text().splitlines()][:24]
    best = np.sort(np.argsort(-scores.max(1))[:5])
    assert [line["prompt"] for line in lines[:5]] == [records[i]["prompt"] for i in best]
    planted = np.repeat(np.eye(3), 10, 0) + 0.05 * np.random.default_rng(0).normal(size=(30, 3))
    assert len({tuple(grads.cluster(planted, 3, 0)[i: i + 10]) for i in (0, 10, 20)}) == 3
