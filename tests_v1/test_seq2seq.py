"""seq2seq.py: the mathematics against slow references, that it learns, and what a run leaves behind."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from conftest import distance, flags, rows, weights, write_model
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

import common_v1 as common
import seq2seq

SMALL = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
         "decoder_start_token_id": 0}


def fixture_2():
    """The model and the 8 ragged examples on which Seq2SeqTrainer 5.23 prints 5.55, 11.1, 21.99 or 43.69."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**SMALL))
    g = torch.Generator().manual_seed(1)
    examples = []
    for i in range(8):
        n = int(torch.randint(4, 12, (1,), generator=g))
        examples.append((torch.randint(2, 128, (n,), generator=g).tolist(), torch.randint(2, 128, (1 + 3 * i,), generator=g).tolist()))
    return model, examples


def tables(examples):
    return [s for s, _ in examples], [t for _, t in examples], np.array([[len(s), len(t)] for s, t in examples])


def step_gradient(model, examples, n_micro, packed=True, group_tokens=1, normalise="global"):
    """Loss and gradient norm of one optimizer step in n_micro forward steps, as the script computes it."""
    sources, targets, lengths = tables(examples)
    losses_module, total = seq2seq.TargetLosses(model, packed, 0.0), int(lengths[:, 1].sum())
    model.zero_grad()
    loss_sum = 0.0
    for piece in common.deal(np.arange(len(examples)), lengths.sum(1), n_micro):
        groups = seq2seq.plan(piece, lengths, 32, packed, group_tokens)
        losses = losses_module([seq2seq.collate(g, sources, targets, 0, 0) for g in groups])
        (losses.sum() / (total if normalise == "global" else len(losses) * n_micro)).backward()
        loss_sum += float(losses.sum())
    return loss_sum / total, float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))


# ------------------------------------------------------------------------------------------------ maths


@pytest.mark.parametrize("n_micro", [1, 2, 4, 8])
def test_every_accumulation_split_gives_the_loss_and_gradient_of_plain_autograd(n_micro):
    model, examples = fixture_2()
    loss, norm = step_gradient(model, examples, n_micro)
    assert loss == pytest.approx(5.550, abs=5e-4) and norm == pytest.approx(1.576, abs=5e-4)


def test_a_mean_of_means_would_give_another_gradient():
    model, examples = fixture_2()
    assert abs(step_gradient(model, examples, 4, normalise="mean of means")[1] - 1.576) > 0.05


def models_of_the_family():
    untied = T5Config(**SMALL, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    mt5 = transformers.MT5Config(**SMALL, feed_forward_proj="gated-gelu")
    yield "v1.0 tied", T5ForConditionalGeneration(T5Config(**SMALL))
    model = T5ForConditionalGeneration(untied)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    yield "v1.1 untied", model
    yield "mt5", transformers.MT5ForConditionalGeneration(mt5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_give_the_losses_of_single_examples(attention):
    for name, model in models_of_the_family():
        model.set_attn_implementation(attention)
        _, examples = fixture_2()
        sources, targets, _ = tables(examples)
        packed = seq2seq.collate([[0, 7, 3], [1, 2], [6, 4, 5]], sources, targets, 0, 0)
        losses = seq2seq.TargetLosses(model, True, 0.0)([packed])
        for i, (source, target) in enumerate(examples):
            alone = model(input_ids=torch.tensor([source]), labels=torch.tensor([target])).loss * len(target)
            assert float(losses[packed["target_example"] == i].sum()) == pytest.approx(float(alone), rel=1e-5), (name, i)
        assert losses.dtype == torch.float32


def test_without_segments_the_packed_losses_would_differ():
    model, examples = fixture_2()
    sources, targets, _ = tables(examples)
    batch = seq2seq.collate([[0, 7, 3]], sources, targets, 0, 0)
    right = seq2seq.TargetLosses(model, True, 0.0)([batch]).sum()
    batch["source_segment"][:] = 1
    batch["decoder_segment"][:] = 1
    assert abs(float(seq2seq.TargetLosses(model, True, 0.0)([batch]).sum() - right)) > 1e-2


def test_packing_does_not_leak_between_examples():
    model, examples = fixture_2()
    sources, targets, _ = tables(examples)
    losses = seq2seq.TargetLosses(model, True, 0.0)
    before = losses([seq2seq.collate([[1, 2, 3]], sources, targets, 0, 0)])
    sources[2], targets[2] = [5] * len(sources[2]), [6] * len(targets[2])
    batch = seq2seq.collate([[1, 2, 3]], sources, targets, 0, 0)
    after = losses([batch])
    other = batch["target_example"] != 2
    assert torch.equal(before[other], after[other]) and not torch.allclose(before[~other], after[~other])


def test_padding_and_batching_do_not_change_a_loss():
    model, examples = fixture_2()
    sources, targets, _ = tables(examples)
    losses = seq2seq.TargetLosses(model, True, 0.0)
    together = seq2seq.collate([[i] for i in range(8)], sources, targets, 0, 0)
    of_all = losses([together])
    for i in range(8):
        alone = losses([seq2seq.collate([[i]], sources, targets, 0, 0)])
        assert torch.allclose(of_all[together["target_example"] == i], alone, atol=1e-5)


def bart_fixture():
    """A small BART and the examples of fixture_2 as one batch, one example per row."""
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(
        vocab_size=128, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, dropout=0.0))
    _, examples = fixture_2()
    sources, targets, _ = tables(examples)
    return model, seq2seq.collate([[i] for i in range(8)], sources, targets, model.config.decoder_start_token_id, model.config.pad_token_id), examples


def test_bart_is_trained_on_the_loss_of_its_own_forward():
    model, batch, examples = bart_fixture()
    losses = seq2seq.TargetLosses(model, False, 0.0)([batch])
    for i, (source, target) in enumerate(examples):
        alone = model(input_ids=torch.tensor([source]), labels=torch.tensor([target])).loss * len(target)
        assert float(losses[batch["target_example"] == i].sum()) == pytest.approx(float(alone), rel=1e-5)


def test_the_gradient_of_a_big_vocabulary_without_packing_is_autograds():
    """Many targets of a family that is not packed: its logits exist whole, and are overwritten only once."""
    model, batch, examples = bart_fixture()
    norms = []
    for losses in (lambda: seq2seq.TargetLosses(model, False, 0.0)([batch], 5),
                   lambda: torch.nn.functional.cross_entropy(seq2seq.TargetLosses(model, False, 0.0).plain_logits(batch), batch["target_ids"],
                                                             reduction="none")):
        model.zero_grad()
        losses().sum().backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_missing_weights_are_refused(mount, run_main, capsys):
    from safetensors.torch import load_file, save_file
    assert run_main(flags(mount, max_steps=1)) == 0
    path = mount / "models" / "run" / "model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if not k.startswith("decoder.block.1")}
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    assert run_main(flags(mount, run="next", model_init_name="run")) == 2
    assert "weights are missing in its files, among them decoder.block.1" in capsys.readouterr().err


def test_chunked_cross_entropy_has_the_same_losses_and_gradients():
    torch.manual_seed(0)
    head, hidden, ids = torch.nn.Linear(16, 50), torch.randn(23, 16, requires_grad=True), torch.randint(50, (23,))
    found = []
    for n_chunks in (1, 4, 40):  # 40: more chunks than targets
        head.zero_grad()
        hidden.grad = None
        losses = seq2seq.token_losses(head, hidden, ids, n_chunks, 0.1, 0.0)
        losses.sum().backward()
        found.append((losses.detach(), hidden.grad, head.weight.grad.clone()))
    reference = torch.nn.functional.cross_entropy(head(hidden), ids, reduction="none", label_smoothing=0.1)
    for losses, hidden_grad, head_grad in found:
        assert torch.allclose(losses, reference, atol=1e-6)
        assert torch.allclose(hidden_grad, found[0][1], atol=1e-6) and torch.allclose(head_grad, found[0][2], atol=1e-5)


def test_losses_are_fp32_when_the_model_is_bf16():
    model, examples = fixture_2()
    sources, targets, _ = tables(examples)
    batch = seq2seq.collate([[0, 1]], sources, targets, 0, 0)
    assert seq2seq.TargetLosses(model.bfloat16(), True, 0.0)([batch]).dtype == torch.float32


def test_a_rank_without_examples_computes_a_zero_loss_with_zero_gradients():
    model, _ = fixture_2()
    losses = seq2seq.TargetLosses(model, True, 0.0)([seq2seq.collate([], [], [], 0, 0)], 3)
    losses.sum().backward()
    assert len(losses) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_flops_count_encoder_decoder_and_head_weights():
    model, _ = fixture_2()
    blocks = {side: sum(p.numel() for n, p in getattr(model, side).named_parameters() if "embed_tokens" not in n)
              for side in ("encoder", "decoder")}
    assert seq2seq.train_flops(model, 100, 10) == 6 * (blocks["encoder"] * 100 + (blocks["decoder"] + 128 * 32) * 10)


# ------------------------------------------------------------------------------------------------ sampling and metrics


def test_row_keyed_sampling_draws_from_the_softmax_at_the_temperature():
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5]).repeat(40000, 1)
    keys = torch.tensor([common.derive_seed("row", i) for i in range(40000)])
    drawn = common.RowKeyedSampler(keys, 0.7, 1.0)(torch.zeros(40000, 3), scores).argmax(-1)
    expected = torch.softmax(scores[0] / 0.7, -1)
    observed = torch.bincount(drawn, minlength=5) / 40000
    assert float((observed - expected).abs().max()) < 4 * math.sqrt(0.25 / 40000)
    assert float((observed - torch.softmax(scores[0], -1)).abs().max()) > 0.05  # the test can tell temperatures apart


def test_sampling_noise_depends_on_row_and_position_but_not_on_the_batch():
    keys = torch.tensor([common.derive_seed("row", i) for i in range(3)])
    scores = torch.zeros(3, 1000)
    together = common.RowKeyedSampler(keys, 1.0, 1.0)(torch.zeros(3, 4), scores)
    alone = common.RowKeyedSampler(keys[1:2], 1.0, 1.0)(torch.zeros(1, 4), scores[:1])
    later = common.RowKeyedSampler(keys, 1.0, 1.0)(torch.zeros(3, 5), scores)
    assert torch.equal(together[1], alone[0]) and not torch.equal(together[0], together[1]) and not torch.equal(together, later)
    assert abs(float(together.mean()) - 0.5772) < 0.1 and abs(float(np.corrcoef(together[0], together[1])[0, 1])) < 0.1


def test_top_p_never_draws_outside_the_nucleus():
    scores = torch.tensor([3.0, 2.0, 0.0, -1.0]).repeat(5000, 1)
    keys = torch.tensor([common.derive_seed(i) for i in range(5000)])
    drawn = common.RowKeyedSampler(keys, 1.0, 0.9)(torch.zeros(5000, 1), scores).argmax(-1)
    assert set(drawn.tolist()) == {0, 1}


@pytest.mark.parametrize("prediction, gold, f1", [("The red book", "a red cat", 0.5), ("yes.", "Yes", 1.0), ("", "yes", 0.0),
                                                  ("the", "a", 1.0), ("two two", "two", 2 / 3)])
def test_token_f1(prediction, gold, f1):
    assert seq2seq.token_f1(prediction, gold) == pytest.approx(f1)


# ------------------------------------------------------------------------------------------------ learns


def test_overfits_eight_examples_and_stops_by_itself(mount, run_main):
    data = json.loads((mount / "data" / "ragged.json").read_text())["train"][:8]
    (mount / "data" / "eight.json").write_text(json.dumps({"train": data, "eval": data}))
    assert run_main(flags(mount, data="eight", max_steps=90, warmup_steps=10, learning_rate=0.015, logging_steps=45, max_new_tokens=64)) == 0
    run = mount / "models" / "run"
    assert rows(run)[-1]["loss"] < 0.1
    last = rows(run, "eval")[-1]
    assert last["eval/exact_match"] == 1.0 and last["eval/token_f1"] == 1.0  # also: longer than generate's default of 20 tokens
    predictions = json.loads((run / "temperature=0.00_n=1_step=90.json").read_text())
    assert max(len(p["demonstration"].split()) for p in predictions) > 10


def test_bart_trains_too(mount, run_main):
    config = transformers.BartConfig(vocab_size=320, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, dropout=0.0,
                                     decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128,
                                     pad_token_id=0, eos_token_id=1, bos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None)
    write_model(mount / "models" / "bart")
    config.save_pretrained(mount / "models" / "bart")
    assert run_main(flags(mount, model_init_name="bart", max_steps=60, logging_steps=10)) == 0
    losses = [row["loss"] for row in rows(mount / "models" / "run")]
    assert losses[-1] < 0.7 * losses[0]
    assert max(row["padding_share"] for row in rows(mount / "models" / "run")) < 0.25


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("precision, config, n_steps", [pytest.param("bf16", "zero1", 200, marks=pytest.mark.slow), pytest.param("bf16", "zero3", 40, marks=pytest.mark.slow),
                                                        ("bf16-mixed", "zero0", 40), pytest.param("bf16-mixed", "zero2", 40, marks=pytest.mark.slow), pytest.param("fp64", "auto", 40, marks=pytest.mark.slow)])
def test_precisions_follow_the_fp32_run(mount, run_main, precision, config, n_steps):
    """B4: the whole loss curve stays in a band around fp32's (before the examples are learnt by heart: near loss 0 small
    differences grow)."""
    options = dict(max_steps=n_steps, learning_rate=0.12 / n_steps, logging_steps=10)
    assert run_main(flags(mount, run="fp32", **options)) == 0
    assert run_main(flags(mount, run="other", **options, precision=precision, ds_config=config)) == 0
    a, b = ([row["loss"] for row in rows(mount / "models" / run)] for run in ("fp32", "other"))
    band = 1e-6 if precision == "fp64" else 0.03
    assert max(abs(x - y) / x for x, y in zip(a, b)) < band
    assert a[-1] < 0.9 * a[0] and (precision == "fp64" or a != b)


def engine_of(module, config, lr=0.0):
    common.adopt_launcher()
    common.setup_distributed()
    import deepspeed
    return deepspeed.initialize(model=module, optimizer=torch.optim.AdamW(module.parameters(), lr=lr, fused=True), config=config)[0]


class Dot(torch.nn.Module):
    """Losses w x: the gradient of their sum by w is x, exactly, also in bf16."""

    def __init__(self, dtype):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))

    def forward(self, x):
        return self.w * x


@pytest.mark.parametrize("precision, stage", [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)])
def test_the_engine_adds_gradients_of_64_forward_steps_unscaled_and_in_fp32(precision, stage):
    """A4 and B1: ratio 1.0 to autograd, and one large gradient followed by 63 small ones, which bf16 would swallow."""
    words = ["--model_init_name", "x", "--max_grad_norm", "0", "--gradient_accumulation_steps", "64"]
    config = common.read_ds_config(seq2seq.parse_args(words), f"zero{stage}", precision, [])
    dtype = common.DTYPES[precision]
    engine = engine_of(Dot(dtype), config)
    xs = [torch.full((64, 64), 1.0 if i == 0 else 1 / 256, dtype=dtype) for i in range(64)]
    norm = None
    for i, x in enumerate(xs):
        engine.set_gradient_accumulation_boundary(i == 63)
        engine.backward(engine(x).sum(), scale_wrt_gas=False)
        norm = common.grad_norm_before_step(engine) if i == 63 else None
        engine.step()
    norm = float(engine.get_global_grad_norm()) if norm is None else norm
    assert norm == pytest.approx(64 * (1 + 63 / 256), rel=1e-3)
    swallowed = sum(xs[1:], xs[0]).float() if dtype == torch.bfloat16 else None
    assert swallowed is None or abs(float(swallowed.norm()) / norm - 1) > 0.01  # what accumulation in bf16 would give


def test_bf16_weights_have_fp32_masters(mount, run_main, monkeypatch):
    seen = {}
    save = common.save_checkpoint
    def spy(engine, model, *rest):
        seen["model"] = {p.dtype for p in model.parameters()}
        seen["masters"] = {p.dtype for group in engine.optimizer.param_groups for p in group["params"]}
        seen["counts"] = (sum(p.numel() for p in model.parameters()), sum(p.numel() for g in engine.optimizer.param_groups for p in g["params"]))
        save(engine, model, *rest)
    monkeypatch.setattr(common, "save_checkpoint", spy)
    assert run_main(flags(mount, precision="bf16", ds_config="zero2")) == 0
    assert seen["model"] == {torch.bfloat16} and seen["masters"] == {torch.float32} and seen["counts"][1] >= seen["counts"][0]


@pytest.mark.slow
def test_feed_forward_weights_that_overflow_fp16_stay_finite_in_bf16(mount, run_main):
    model = T5ForConditionalGeneration(T5Config.from_pretrained(mount / "models" / "tiny"))
    with torch.no_grad():
        model.encoder.block[0].layer[-1].DenseReluDense.wo.weight *= 3e5
    model.save_pretrained(mount / "models" / "tiny")
    assert not torch.isfinite(model.half()(input_ids=torch.tensor([[5, 6, 1]]), labels=torch.tensor([[7, 1]])).loss)
    assert run_main(flags(mount, precision="bf16", ds_config="zero1")) == 0
    assert all(math.isfinite(row["loss"]) for row in rows(mount / "models" / "run"))


@pytest.mark.skipif(not common.deepspeed.accelerator.get_accelerator().is_fp16_supported(), reason="DeepSpeed has no fp16 on this CPU")
def test_an_overflowed_fp16_step_is_repeated_and_does_not_advance_the_schedule(mount, run_main):
    """H2: the loss scale starts far too high, so the first attempts at step 1 are skipped."""
    config = mount / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": {"enabled": "auto", "initial_scale_power": 24}}))
    options = dict(ds_config=config, precision="fp16", force="fp16", max_steps=5, learning_rate=1e-3)
    assert run_main(flags(mount, **options)) == 0
    found = rows(mount / "models" / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert [row["lr"] for row in found] == pytest.approx([common.lr_at(k, 1e-3, "linear", 1, 5) for k in range(5)])
    assert "overflow" in (mount / "models" / "run" / "log.txt").read_text()


# ------------------------------------------------------------------------------------------------ contract


def test_a_run_leaves_what_the_contract_names_and_reloads_with_identical_logits(mount, run_main):
    assert run_main(flags(mount, max_steps=6, save_steps=2, eval_steps=3)) == 0
    run = mount / "models" / "run"
    for name in ("args.json", "env.json", "ds_config.json", "metrics.jsonl", "rawtune.json", "config.json", "model.safetensors", "COMPLETE",
                 "log.txt", "code/seq2seq.py", "code/common_v1.py", "checkpoint-4/COMPLETE", "checkpoint-6/COMPLETE", "checkpoint-6/engine",
                 "test_temperature=0.00_n=1_step=6.json", "generation_config.json", "tokenizer_config.json"):
        assert (run / name).exists(), name
    assert sorted(p.name for p in run.glob("temperature*")) == [f"temperature=0.00_n=1_step={n}.json" for n in (0, 3, 6)]
    assert not list(run.glob("checkpoint-2*")) and not list(run.glob("*.tmp"))  # the newest two are kept
    assert [row["step"] for row in rows(run, "eval")] == [0, 3, 6]
    train = rows(run)[-1]
    assert {"step", "epoch", "split", "time", "loss", "lr", "grad_norm", "tokens_per_sec", "target_tokens", "padding_share",
            "peak_memory_gb"} <= train.keys()
    predictions = json.loads((run / "temperature=0.00_n=1_step=6.json").read_text())
    assert len(predictions) == 11 and predictions[3].keys() == {"prompt", "generations", "demonstration", "orig_d", "dataset"}
    assert predictions[3]["orig_d"]["row"] == 46 and "lm_postprocess" in predictions[3]["generations"][0]
    assert distance(weights(run), weights(run / "checkpoint-6")) == 0
    rawtune = json.loads((run / "rawtune.json").read_text())
    assert (rawtune["format"], rawtune["family"], rawtune["record_layout"]["source"]) == (1, "seq2seq", "{prompt}")
    again = AutoModelForSeq2SeqLM.from_pretrained(run)
    assert again.lm_head.weight is again.shared.weight
    assert run_main(flags(mount, run="more", model_init_name="run", max_steps=1)) == 0
    assert rows(mount / "models" / "more", "eval")[0]["eval/loss"] == rows(run, "eval")[-1]["eval/loss"]


def test_a_fresh_v11_model_is_really_untied_and_stays_so(mount, run_main):
    write_model(mount / "models" / "v11", tie_word_embeddings=False)
    assert run_main(flags(mount, model_init_name="v11")) == 0
    first = weights(mount / "models" / "run")
    assert "lm_head.weight" in first and float((first["lm_head.weight"] - first["shared.weight"]).abs().max()) > 0.1
    model = AutoModelForSeq2SeqLM.from_pretrained(mount / "models" / "run")
    assert model.lm_head.weight is not model.shared.weight and not model.config.scale_decoder_outputs
    for stage in (0, 3):  # loaded in parts, transformers would compare empty stand-ins and tie the head
        assert run_main(flags(mount, run=f"second{stage}", model_init_name="run", max_steps=1, learning_rate=1e-9, ds_config=f"zero{stage}")) == 0
        second = mount / "models" / f"second{stage}"
        assert rows(second, "eval")[0]["eval/loss"] == pytest.approx(rows(mount / "models" / "run", "eval")[-1]["eval/loss"], rel=1e-6)
        assert distance(first, weights(second)) < 1e-6


def test_no_train_leaves_the_weights_and_gives_n_samples_for_every_row(mount, run_main):
    assert run_main(flags(mount)) == 0
    data = json.loads((mount / "data" / "ragged.json").read_text())
    data["eval"] = [data["eval"][0]] * 3 + data["eval"][:2]  # duplicate prompts are separate records
    (mount / "data" / "twice.json").write_text(json.dumps(data))
    before = (mount / "models" / "run" / "model.safetensors").read_bytes()
    words = flags(mount, run=None, model_init_name="run", data="twice", no_train=True, temperature=1.0, n_samples=3)
    assert run_main(words) == 0
    folder = mount / "models" / "run_twice_eval"
    predictions = json.loads((folder / "temperature=1.00_n=3_step=0.json").read_text())
    assert len(predictions) == 5 and all(len(p["generations"]) == 3 for p in predictions)
    texts = [tuple(g["lm_postprocess"] for g in p["generations"]) for p in predictions]
    assert len(set(texts[0])) > 1 and texts[0] != texts[1]  # samples and rows have streams of their own
    assert (mount / "models" / "run" / "model.safetensors").read_bytes() == before
    assert not (folder / "model.safetensors").exists()
    assert run_main(words) == 2  # predictions are never overwritten


def test_sampled_predictions_do_not_depend_on_the_evaluation_batch(mount, run_main):
    found = []
    for size in (1, 4, 32):
        assert run_main(flags(mount, run=f"b{size}", no_train=True, temperature=0.8, n_samples=2, eval_batch_size=size)) == 0
        found.append((mount / "models" / f"b{size}" / "temperature=0.80_n=2_step=0.json").read_text())
    assert found[0] == found[1] == found[2]


def test_debug_is_ten_steps_and_at_most_100_rows(mount, run_main):
    data = json.loads((mount / "data" / "ragged.json").read_text())
    data["eval"] = data["eval"] * 12
    (mount / "data" / "long.json").write_text(json.dumps(data))
    assert run_main(flags(mount, data="long", debug=True, max_steps=None)) == 0
    assert rows(mount / "models" / "run")[-1]["step"] == 10
    assert len(json.loads((mount / "models" / "run" / "temperature=0.00_n=1_step=10.json").read_text())) == 100


def test_several_data_sets_are_mixed_and_scored_apart(mount, run_main):
    (mount / "data" / "b.json").write_text((mount / "data" / "ragged.json").read_text())
    assert run_main(flags(mount, data=["ragged:10", "b:0.5"], max_steps=None, num_epochs=2, metric_for_best="b/loss")) == 0
    run = mount / "models" / "run"
    assert rows(run)[-1]["step"] == 2 * math.ceil((10 + 22) / 8)
    last = rows(run, "eval")[-1]
    assert last["eval/ragged/loss"] == last["eval/b/loss"] and {"eval/b/exact_match", "eval/loss", "test/b/loss"} <= {*last, *rows(run, "test")[-1]}


def test_the_best_checkpoint_is_kept_tested_and_exported(mount, run_main):
    """R7: the evaluation answers use letters that training never does, so their loss soon rises."""
    data = json.loads((mount / "data" / "ragged.json").read_text())
    for record in data["eval"] + data["test"]:
        record["completion"] = "QXZWVUKJQXZWVUKJQXZWVUKJ"
    (mount / "data" / "other.json").write_text(json.dumps(data))
    words = flags(mount, data="other", max_steps=30, eval_steps=3, metric_for_best="loss", learning_rate=0.03, save_total_limit=1,
                  early_stopping_patience=3)
    assert run_main(words) == 0
    run = mount / "models" / "run"
    best = json.loads((run / "best.json").read_text())
    losses = {row["step"]: row["eval/loss"] for row in rows(run, "eval") if row["step"]}
    best_step = min(losses, key=losses.get)
    assert best["checkpoint"] == f"checkpoint-{best_step}" and best["value"] == losses[best_step]
    assert max(losses) < 30 and max(losses) == best_step + 9  # stopped three evaluations later
    assert distance(weights(run), weights(run / f"checkpoint-{best_step}")) == 0
    assert distance(weights(run), weights(run / f"checkpoint-{max(losses)}")) > 0
    assert run_main(flags(mount, run="again", data="other", model_init_name="run", no_train=True)) == 0
    assert rows(mount / "models" / "again", "test")[-1]["test/loss"] == pytest.approx(rows(run, "test")[-1]["test/loss"], rel=1e-6)


def test_a_non_finite_loss_stops_before_the_update_and_keeps_the_checkpoints(mount, run_main, monkeypatch, capsys):
    forward = seq2seq.TargetLosses.forward
    calls = []
    def poisoned(self, groups, n_chunks=1):
        calls.append(self.training)
        return forward(self, groups, n_chunks) * (math.nan if calls.count(True) == 4 and self.training else 1.0)
    monkeypatch.setattr(seq2seq.TargetLosses, "forward", poisoned)
    assert run_main(flags(mount, save_steps=2)) == 2
    assert "step 4: the loss is nan" in capsys.readouterr().err
    assert sorted(p.name for p in (mount / "models" / "run").glob("checkpoint-*")) == ["checkpoint-2"]


def test_out_of_memory_names_the_step_the_shapes_and_the_next_thing(mount, run_main, monkeypatch, capsys):
    def full(self, groups, n_chunks=1):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(seq2seq, "evaluate", lambda *_: {"loss": 1.0})
    monkeypatch.setattr(seq2seq.TargetLosses, "forward", full)
    assert run_main(flags(mount)) == 2
    error = capsys.readouterr().err
    assert "step 1: out of memory" in error and "->" in error and "--gradient_accumulation_steps" in error


def test_tokenising_happens_before_any_process_group(mount, run_main, monkeypatch):
    """F3: however long it takes, no collective can time out meanwhile."""
    order = []
    load, setup = seq2seq.load_data, common.setup_distributed
    monkeypatch.setattr(seq2seq, "load_data", lambda *a: order.append("data") or load(*a))
    monkeypatch.setattr(common, "setup_distributed", lambda: order.append("group") or setup())
    assert run_main(flags(mount, max_steps=1)) == 0
    assert order == ["data", "group"]


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, pytest.param({"ds_config": "zero2_offload"}, marks=pytest.mark.slow), {"ds_config": "zero3_offload"}])
def test_memory_savers_do_not_change_the_result(mount, run_main, change):
    assert run_main(flags(mount, run="plain", ds_config="zero2")) == 0
    assert run_main(flags(mount, run="saved", **{"ds_config": "zero2", **change})) == 0
    assert distance(weights(mount / "models" / "plain"), weights(mount / "models" / "saved")) < 1e-6


def test_label_smoothing_counts_in_training_only(mount, run_main):
    assert run_main(flags(mount, run="sharp", max_steps=1, learning_rate=1e-9)) == 0
    assert run_main(flags(mount, run="smooth", max_steps=1, learning_rate=1e-9, label_smoothing=0.2)) == 0
    sharp, smooth = mount / "models" / "sharp", mount / "models" / "smooth"
    assert rows(sharp, "eval")[0]["eval/loss"] == rows(smooth, "eval")[0]["eval/loss"]
    assert rows(sharp)[0]["loss"] != rows(smooth)[0]["loss"]
