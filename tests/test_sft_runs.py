"""sft_causal.py's training, through the engine in this process: its mathematics, learning, evaluation, stopping and resuming, what it writes."""

import json
import math
import re

import pytest
import torch
import transformers
from conftest import assert_same_run, chat_records, distance, rows, sft_flags, stop_at, weights, write_llama, write_sft_mount

import common
import sft_causal

pytestmark = pytest.mark.usefixtures("no_pictures", "widest_rows")


@pytest.fixture
def mount(tmp_path):
    return write_sft_mount(tmp_path)


@pytest.fixture
def widest_rows(monkeypatch):
    """Packed rows are filled as with a sparse kernel on a GPU; documents of a step are too alike in length to be packed for a dense one."""
    pack = sft_causal.pack
    monkeypatch.setattr(sft_causal, "pack", lambda ids, lengths, limit, width, sparse: pack(ids, lengths, limit, width, True))


def same_losses_and_weights(a, b, tolerance=1e-6):
    for mine, theirs in zip(rows(a), rows(b), strict=True):
        assert (mine["loss"], mine["grad_norm"]) == (pytest.approx(theirs["loss"], rel=tolerance), pytest.approx(theirs["grad_norm"], rel=tolerance))
        assert (mine["lr"], mine["target_tokens"], mine["step"]) == (theirs["lr"], theirs["target_tokens"], theirs["step"])
    assert distance(weights(b), weights(a)) < tolerance


def loaded(folder):
    """(model, tokenizer) as plain transformers reads them."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def losses_of(model, tokenizer, record):
    """[(-log p, is the likeliest)] of the target tokens of a record {"messages"}, from the saved template and full logits. Each reply is found by
    its prompt, and ends with the first end token behind it."""
    messages, found = record["messages"], []
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(tokenizer.apply_chat_template(messages[:i], tokenize=True, return_dict=False, add_generation_prompt=True))
            stop = ids.index(tokenizer.convert_tokens_to_ids("<|im_end|>"), start) + 1
            for t in range(start, stop):
                found.append((torch.logsumexp(logits[t - 1], 0) - logits[t - 1, ids[t]], bool(logits[t - 1].argmax() == ids[t])))
    return found


# ------------------------------------------------------------------------------------------------ the mathematics of the loop


@pytest.mark.parametrize("packing", [False, True])
def test_accumulation_splits_give_the_same_losses_gradients_and_weights_and_a_mean_of_means_does_not(mount, run_sft, monkeypatch, packing):
    """Six steps, the last of 3 documents over up to 4 forward steps."""
    models, words = mount / "models", {"max_steps": 6, "learning_rate": 0.001, "n_generate": 0, "packing": packing}
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        words.update(train_batch_size=batch, gradient_accumulation_steps=accumulation)
        assert run_sft(sft_flags(mount, f"{batch}", **words)) == 0
        same_losses_and_weights(models / f"{batch}", models / "8")
    real = sft_causal.TargetLosses.forward
    def mean_of_means(self, batch, *rest):
        losses = real(self, batch, *rest)
        return losses * (20 / max(1, len(losses))) if self.training else losses
    monkeypatch.setattr(sft_causal.TargetLosses, "forward", mean_of_means)
    assert run_sft(sft_flags(mount, "mutated", **words)) == 0
    assert abs(rows(models / "mutated")[0]["grad_norm"] / rows(models / "8")[0]["grad_norm"] - 1) > 1e-2
    assert distance(weights(models / "8"), weights(models / "mutated")) > 1e-4


@pytest.mark.parametrize("loss", ["cross_entropy", "poly"])
def test_a_partial_last_step_over_unequal_forward_steps_is_that_of_plain_autograd(mount, run_sft, loss):
    """A2, A3. Step 6 of an epoch has 3 documents; its loss and gradient are computed from checkpoint-5 by hand."""
    words = {"max_steps": 6, "save_steps": 1, "train_batch_size": 4, "gradient_accumulation_steps": 2, "n_generate": 0, "loss": loss}
    assert run_sft(sft_flags(mount, **words)) == 0
    run = mount / "models" / "run"
    job = sft_causal.prepare(sft_causal.parse_args(list(map(str, sft_flags(mount, "other", **words)))))
    numbers = sft_causal.TrainingData(sft_causal.parse_args(list(map(str, sft_flags(mount, "other", **words)))), job.data_sets, 32, 300, 0, False).step_ids(5)
    assert len(numbers) == 3
    model, tokenizer = loaded(run / "checkpoint-5")
    records = json.loads((mount / "data" / "chats.json").read_text())["train"]
    losses = torch.stack([value for i in numbers for value, _ in losses_of(model, tokenizer, records[i])])
    if loss == "poly":
        losses = losses + 1 - torch.exp(-losses)
    losses.mean().backward()
    last = rows(run)[-1]
    assert (last["step"], last["target_tokens"]) == (6, len(losses))
    assert last["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    norm = sum(float(p.grad.double().norm() ** 2) for p in model.parameters()) ** 0.5
    assert last["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("changes", [{"packing": True}, {"gradient_checkpointing": True}, {"attention": "eager"}, {"ds_config": "zero2"}, {"ds_config": "zero3"},
                                     {"ds_config": "zero2_offload"}, {"ds_config": "zero3_offload", "packing": True}, {"chunks": 2**11}])
def test_packing_and_memory_savers_do_not_change_the_result(mount, run_sft, monkeypatch, changes):
    words, plain = {"learning_rate": 0.001, "save_steps": 3, "n_generate": 0}, mount / "models" / "plain"
    assert run_sft(sft_flags(mount, "plain", **words)) == 0
    if "chunks" in changes:
        monkeypatch.setattr(sft_causal, "CHUNK_ELEMENTS", changes["chunks"])
        monkeypatch.setattr(sft_causal, "chunk_tokens", lambda vocabulary: 7)
        changes = {}
    assert run_sft(sft_flags(mount, "other", **{**words, **changes})) == 0
    same_losses_and_weights(mount / "models" / "other", plain)
    assert distance(weights(plain), weights(plain / "checkpoint-3")) > 1e-4
    assert rows(mount / "models" / "other", "eval")[-1]["eval/loss"] == pytest.approx(rows(plain, "eval")[-1]["eval/loss"], rel=1e-6)
    if changes.get("packing"):
        assert rows(mount / "models" / "other")[0]["padding_share"] == 0 < rows(plain)[0]["padding_share"]


def test_noise_and_prefix_attention_act_on_a_run_and_its_evaluation_has_no_noise(mount, run_sft, capsys):
    found = {}
    for name, changes in (("plain", {}), ("noise", {"neftune_alpha": 5}), ("prefix", {"bidirectional_prompt": True, "packing": True}),
                          ("prefix, single", {"bidirectional_prompt": True})):
        assert run_sft(sft_flags(mount, name, max_steps=2, learning_rate=0.001, n_generate=2, **changes)) == 0
        found[name] = rows(mount / "models" / name), rows(mount / "models" / name, "eval")
    loss = {name: train[0]["loss"] for name, (train, _) in found.items()}
    baseline = {name: evaluated[0]["eval/loss"] for name, (_, evaluated) in found.items()}
    assert loss["noise"] != pytest.approx(loss["plain"], rel=1e-4) and baseline["noise"] == baseline["plain"]
    assert loss["prefix"] == pytest.approx(loss["prefix, single"], rel=1e-6) and loss["prefix"] != pytest.approx(loss["plain"], rel=1e-4)
    assert baseline["prefix"] != pytest.approx(baseline["plain"], rel=1e-4)
    assert "eval/exact_match" in found["plain"][1][0] and "eval/exact_match" not in found["prefix"][1][0]
    assert "WARNING --bidirectional_prompt: no replies are generated" in capsys.readouterr().err


def test_evaluating_after_every_step_leaves_the_training_with_dropout_as_it_was(mount, run_sft):
    for name, changes in (("often", {"eval_steps": 1}), ("rarely", {}), ("without", {"model_init_name": "llama"})):
        assert run_sft(sft_flags(mount, name, **{"model_init_name": "dropout", "n_generate": 2, **changes})) == 0
    often, rarely, without = (mount / "models" / name for name in ("often", "rarely", "without"))
    assert distance(weights(often), weights(rarely)) == 0 and [r["loss"] for r in rows(often)] == [r["loss"] for r in rows(rarely)]
    assert rows(rarely)[0]["loss"] != pytest.approx(rows(without)[0]["loss"], rel=1e-3)


@pytest.mark.parametrize("precision, config", [("bf16", "zero1"), ("bf16-mixed", "zero0"), ("fp64", "auto")])
def test_precisions_follow_the_fp32_run(mount, run_sft, precision, config):
    for name, changes in (("fp32", {}), ("other", {"precision": precision, "ds_config": config})):
        assert run_sft(sft_flags(mount, name, max_steps=12, learning_rate=0.003, logging_steps=4, n_generate=2, packing=True, **changes)) == 0
    a, b = ([row["loss"] for row in rows(mount / "models" / run)] for run in ("fp32", "other"))
    assert max(abs(x - y) / x for x, y in zip(a, b)) < (1e-5 if precision == "fp64" else 0.03) and (precision == "fp64" or a != b)


def test_a_family_that_mixes_packed_documents_is_refused_before_a_step(mount, run_sft, capsys):
    config = transformers.OPTConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32,
                                    max_position_embeddings=256, init_std=0.1)
    config.save_pretrained(mount / "models" / "opt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (mount / "models" / "opt" / name).write_bytes((mount / "models" / "llama" / name).read_bytes())
    assert run_sft(sft_flags(mount, model_init_name="opt", packing=True)) == 2
    assert "--packing: a opt" in capsys.readouterr().err and not list((mount / "models" / "run").glob("checkpoint-*"))
    assert run_sft(sft_flags(mount, "single", model_init_name="opt", max_steps=1, n_generate=0)) == 0


def test_a_non_finite_loss_stops_before_the_update_and_keeps_the_checkpoints(mount, run_sft, monkeypatch, capsys):
    forward, calls = sft_causal.TargetLosses.forward, []
    def poisoned(self, *batch):
        calls.append(self.training)
        return forward(self, *batch) * (math.nan if calls.count(True) == 4 and self.training else 1.0)
    monkeypatch.setattr(sft_causal.TargetLosses, "forward", poisoned)
    assert run_sft(sft_flags(mount, save_steps=2, n_generate=0)) == 2
    assert "step 4: the loss is nan" in capsys.readouterr().err
    assert sorted(p.name for p in (mount / "models" / "run").glob("checkpoint-?")) == ["checkpoint-2"]


@pytest.mark.parametrize("while_training", [True, False])
def test_out_of_memory_names_the_step_the_shapes_and_the_next_thing(mount, run_sft, monkeypatch, capsys, while_training):
    forward = sft_causal.TargetLosses.forward
    def full(self, *batch):
        if self.training == while_training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *batch)
    monkeypatch.setattr(sft_causal.TargetLosses, "forward", full)
    assert run_sft(sft_flags(mount, n_generate=0)) == 2
    error = capsys.readouterr().err
    assert ("step 1: out of memory" in error and "--gradient_accumulation_steps" in error if while_training
            else "evaluation: out of memory" in error and "--eval_batch_size" in error)


# ------------------------------------------------------------------------------------------------ learning


def test_eight_pairs_are_learnt_and_every_reply_stops_by_its_end_token(mount, run_sft):
    """C5, with the exported folder's own tokenizer and generation settings in plain transformers."""
    pairs = [{"prompt": question, "completion": reply} for question, reply in (
        ("the cat", "reads"), ("a cat", "yes, a long book"), ("book?", "no"), ("1 + 1", "2"), ("2 + 2", "4"), ("long", "long long"), ("é", "ü"), ("say", "yes yes yes no"))]
    (mount / "data" / "eight.json").write_text(json.dumps({"train": pairs, "eval": pairs}))
    words = sft_flags(mount, data="eight", max_steps=80, learning_rate=0.01, warmup_steps=5, max_new_tokens=20, logging_steps=80)
    assert run_sft(words) == 0
    run = mount / "models" / "run"
    before, after = rows(run, "eval")
    assert before["eval/loss"] > 4 and before["eval/exact_match"] == 0
    assert after["eval/loss"] < 0.02 and after["eval/exact_match"] == 1 and after["eval/token_accuracy"] == 1
    model, tokenizer = loaded(run)
    for pair in pairs:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": pair["prompt"]}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        reply = model.generate(**prompt, max_new_tokens=20)[0, prompt["input_ids"].shape[1]:].tolist()
        assert len(reply) < 20 and reply[-1] in model.generation_config.eos_token_id and tokenizer.decode(reply, skip_special_tokens=True) == pair["completion"]


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_equals_a_slow_recomputation_from_the_exported_model(mount, run_sft):
    """Every metric, of whatever batches; the test split too. The learning rate is high, so that some tokens are right."""
    assert run_sft(sft_flags(mount, max_steps=25, learning_rate=0.02, eval_batch_size=3, n_generate=5, max_new_tokens=6)) == 0
    run = mount / "models" / "run"
    model, tokenizer = loaded(run)
    data = json.loads((mount / "data" / "chats.json").read_text())
    for split in ("eval", "test"):
        with torch.no_grad():
            found = [pair for record in data[split] for pair in losses_of(model, tokenizer, record)]
        row, mean = rows(run, split)[-1], float(torch.stack([loss for loss, _ in found]).mean())
        assert row[f"{split}/loss"] == pytest.approx(mean, rel=1e-6)
        assert row[f"{split}/perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
        assert row[f"{split}/token_accuracy"] == sum(hit for _, hit in found) / len(found) > 0.02
        predictions = json.loads((run / f"{'test_' if split == 'test' else ''}temperature=0.00_n=1_step=25.json").read_text())
        assert len(predictions) == 5
        for prediction, record in zip(predictions, data[split]):
            assert list(prediction) == ["prompt", "generations", "demonstration", "orig_d", "dataset"]
            *before, last = record["messages"]
            assert (prediction["prompt"], prediction["demonstration"], prediction["orig_d"], prediction["dataset"]) == (before, last["content"], record, "chats")
            (generation,) = prediction["generations"]
            prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            expected = model.generate(**prompt, max_new_tokens=6)[0, prompt["input_ids"].shape[1]:]
            assert generation == {"lm_postprocess": tokenizer.decode(expected, skip_special_tokens=True)}
        right = [p["generations"][0]["lm_postprocess"].strip() == p["demonstration"].strip() for p in predictions]
        assert row[f"{split}/exact_match"] == sum(right) / 5


def test_evaluation_does_not_depend_on_its_batch_size_greedy_or_sampled(mount, run_sft):
    found = {}
    for temperature, n_samples in ((0, 1), (1.5, 2)):
        for size in (2, 7, 32):
            name = f"{temperature} {size}"
            assert run_sft(sft_flags(mount, name, no_train=True, eval_batch_size=size, temperature=temperature, n_samples=n_samples)) == 0
            (row,) = rows(mount / "models" / name, "eval")
            predictions = (mount / "models" / name / f"temperature={temperature:.2f}_n={n_samples}_step=0.json").read_text()
            assert all(len(p["generations"]) == n_samples for p in json.loads(predictions))
            found.setdefault(temperature, []).append((predictions, row["eval/exact_match"], row["eval/token_accuracy"], row["eval/loss"]))
    for (first, *others) in found.values():
        for other in others:
            assert other[:3] == first[:3] and other[3] == pytest.approx(first[3], rel=1e-6)
    assert found[0][0][0] != found[1.5][0][0]


def test_several_data_sets_have_metrics_of_their_own_and_the_joint_ones_weigh_by_tokens(mount, run_sft):
    (mount / "data" / "texts.json").write_text(json.dumps({"train": [{"text": "the cat reads a long book"}] * 9, "eval": [{"text": "a book"}, {"text": "the cat"}]}))
    assert run_sft(sft_flags(mount, data=["chats:8", "texts"], max_steps=3, n_generate=3, metric_for_best="texts/loss")) == 0
    run = mount / "models" / "run"
    row = rows(run, "eval")[-1]
    a, b, both = row["eval/chats/loss"], row["eval/texts/loss"], row["eval/loss"]
    job = sft_causal.prepare(sft_causal.parse_args(list(map(str, sft_flags(mount, "other", data=["chats:8", "texts"])))))
    counts = [int(d.n_targets["eval"].sum()) for d in job.data_sets]
    assert both == pytest.approx((counts[0] * a + counts[1] * b) / sum(counts), rel=1e-9) and a != b
    assert "eval/chats/exact_match" in row and "eval/texts/exact_match" not in row  # a text has no prompt
    assert json.loads((run / "best.json").read_text())["metric"] == "texts/loss"


def test_no_train_leaves_the_weights_and_writes_predictions_of_both_splits_once(mount, run_sft, capsys):
    assert run_sft(sft_flags(mount, "trained", n_generate=0)) == 0
    before = weights(mount / "models" / "trained")
    words = sft_flags(mount, "scored", model_init_name="trained", no_train=True, write_results=mount / "results.csv")
    assert run_sft(words) == 0
    scored = mount / "models" / "scored"
    assert distance(before, weights(mount / "models" / "trained")) == 0 and not list(scored.glob("*.safetensors")) and not list(scored.glob("checkpoint-*"))
    assert sorted(p.name for p in scored.glob("*step=0.json")) == ["temperature=0.00_n=1_step=0.json", "test_temperature=0.00_n=1_step=0.json"]
    for split in ("eval", "test"):
        assert rows(scored, split)[0][f"{split}/loss"] == pytest.approx(rows(mount / "models" / "trained", split)[-1][f"{split}/loss"], rel=1e-6)
    header, line = (mount / "results.csv").read_text().splitlines()
    assert header.startswith("run,model,data,seed,step,eval/loss") and line.startswith("scored,trained,chats,")
    assert run_sft(words) == 2 and "exists" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ resume


def node(text, role, replies=()):
    return {"text": text, "role": role, "replies": list(replies)}


def resume_flags(mount, run, stage, **changes):
    """Everything that is drawn anew each epoch: dropout, windows, threads of trees, noise, the sample of a mixture."""
    if not (mount / "data" / "trees.json").exists():
        trees = [{"prompt": node(f"q{i}", "prompter", [node("the cat", "assistant"), node("long " * 12, "assistant", [
            node("book", "prompter", [node("yes " * 20, "assistant"), node("no", "assistant")])])])} for i in range(9)]
        (mount / "data" / "trees.json").write_text(json.dumps({"train": trees, "eval": trees[:2]}))
    return sft_flags(mount, run, **{"model_init_name": "dropout", "ds_config": f"zero{stage}", "max_steps": 4, "save_steps": 2, "n_generate": 2, "train_batch_size": 4,
                                    "gradient_accumulation_steps": 2, "data": ["trees", "chats:7"], "max_length": 48, "truncation": "random_window",
                                    "oasst_paths": "random", "neftune_alpha": 2, "packing": True, "learning_rate": 0.003, **changes})


@pytest.mark.parametrize("stage", range(4))
def test_two_steps_and_two_more_equal_four_to_the_bit(mount, run_sft, monkeypatch, stage):
    """16 examples are two steps, so the second half is another epoch, with other threads and windows. Negative control: other dropout draws."""
    models = mount / "models"
    assert run_sft(resume_flags(mount, "straight", stage)) == 0
    for name in ("stopped", "other") if stage == 0 else ("stopped",):
        with monkeypatch.context() as patch:
            stop_at(patch, 2)
            assert run_sft(resume_flags(mount, name, stage)) == common.EXIT_SAVED
    assert [row["step"] for row in rows(models / "stopped")] == [1, 2]
    assert run_sft(resume_flags(mount, "stopped", stage)) == 0
    assert_same_run(models / "straight", models / "stopped", 4)
    name = "temperature=0.00_n=1_step=4.json"
    assert (models / "straight" / name).read_bytes() == (models / "stopped" / name).read_bytes()
    if stage == 0:
        assert rows(models / "straight")[0]["target_tokens"] != rows(models / "straight")[2]["target_tokens"]
        derive = common.derive_seed
        monkeypatch.setattr(common, "derive_seed", lambda *keys: derive(*keys, "other") if "dropout" in keys else derive(*keys))
        assert run_sft(resume_flags(mount, "other", stage)) == 0
        assert distance(weights(models / "straight"), weights(models / "other")) > 1e-6


def test_changed_mathematics_is_refused_and_what_changes_none_is_taken(mount, run_sft, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run_sft(resume_flags(mount, "run", 0)) == common.EXIT_SAVED
    for changes in ({"template": "oasst"}, {"targets": "last"}, {"neftune_alpha": 3}, {"loss": "poly"}, {"bidirectional_prompt": True}, {"max_length": 40},
                    {"oasst_paths": "all"}, {"truncation": "end"}, {"seed": 5}, {"learning_rate": 0.1}):
        assert run_sft(resume_flags(mount, "run", 0, **changes)) == 2, changes
        assert f"{next(iter(changes))}: " in capsys.readouterr().err, changes
    assert run_sft(resume_flags(mount, "run", 0, packing=False, n_generate=1, eval_batch_size=2, attention="eager")) == 0
    assert run_sft(resume_flags(mount, "run", 0)) == 2 and "finished" in capsys.readouterr().err


def test_a_run_that_stopped_after_its_best_evaluation_still_exports_and_tests_the_best(mount, run_sft, monkeypatch):
    pairs = [{"prompt": f"{i}", "completion": "no" if i > 20 else "yes yes yes"} for i in range(25)]  # the longer it learns yes, the worse
    (mount / "data" / "turn.json").write_text(json.dumps({"train": pairs[:20], "eval": pairs[21:23], "test": pairs[23:]}))
    words = {"data": "turn", "max_steps": 10, "eval_steps": 2, "metric_for_best": "loss", "learning_rate": 0.05, "n_generate": 1}
    assert run_sft(sft_flags(mount, "straight", **words)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        assert run_sft(sft_flags(mount, "stopped", **words)) == common.EXIT_SAVED
    assert run_sft(sft_flags(mount, "stopped", **words)) == 0
    a, b = mount / "models" / "straight", mount / "models" / "stopped"
    best = json.loads((a / "best.json").read_text())
    evaluated = {row["step"]: row["eval/loss"] for row in rows(a, "eval")}
    step = min((step for step in evaluated if step), key=evaluated.get)
    assert best == {"checkpoint": f"checkpoint-{step}", "metric": "loss", "value": evaluated[step]} and step < 8
    assert json.loads((b / "best.json").read_text()) == best and distance(weights(a), weights(b)) == 0
    assert distance(weights(a), weights(a / f"checkpoint-{step}")) == 0 < distance(weights(a), weights(a / "checkpoint-10"))
    (x,), (y,) = rows(a, "test"), rows(b, "test")
    assert x["test/loss"] == y["test/loss"] and (a / f"test_temperature=0.00_n=1_step={step}.json").exists()


# ------------------------------------------------------------------------------------------------ what a run writes


def test_files_of_a_run(mount, run_sft):
    assert run_sft(sft_flags(mount, save_steps=2, pad_token="</s>", write_results=mount / "results.csv")) == 0
    run = mount / "models" / "run"
    for folder in (run, run / "checkpoint-2", run / "checkpoint-4"):
        assert (folder / "COMPLETE").exists()
        rawtune = json.loads((folder / "rawtune.json").read_text())
        assert {**rawtune, "base": None} == {"format": 1, "script": "sft_causal.py", "task": "chat", "family": "causal", "template": "chatml", "end_token": "<|im_end|>",
                                             "stop_ids": [284], "raw_prompt": False, "bidirectional_prompt": False, "max_length": 2048, "base": None,
                                             "adapter": "none", "quantize": None}
        generation = json.loads((folder / "generation_config.json").read_text())  # C6
        assert generation["eos_token_id"] == [284] and generation["pad_token_id"] == 2
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template and (tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")) == (2, 284)
    assert {"args.json", "env.json", "ds_config.json", "metrics.jsonl", "log.txt"} <= {p.name for p in run.iterdir()}
    assert {row["step"] for row in rows(run)} == {1, 2, 3, 4} and [row["step"] for row in rows(run, "eval")] == [0, 4]
    (row,) = rows(run, "test")
    assert {"step", "epoch", "split", "time", "test/loss", "test/perplexity", "test/token_accuracy", "test/exact_match"} <= row.keys()
    assert len((mount / "results.csv").read_text().splitlines()) == 2


def test_both_end_tokens_stop_a_reply_and_padding_does_not(mount, run_sft):
    assert run_sft(sft_flags(mount, max_steps=1, n_generate=0)) == 0
    generation = json.loads((mount / "models" / "run" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([284, 2], 0)


def test_shown_examples_mark_the_targets_of_each_data_set(mount, run_sft, capsys):
    (mount / "data" / "texts.json").write_text(json.dumps({"train": [{"text": "the cat"}], "eval": [{"text": "a book"}]}))
    assert run_sft(sft_flags(mount, data=["chats", "texts"], max_steps=1, show_examples=2, n_generate=0)) == 0
    shown = re.findall(r"^(\w+), document (\d), targets between ⟦ and ⟧:\n(.*?)\n\n", capsys.readouterr().out, re.MULTILINE | re.DOTALL)
    record = chat_records(1)[0]["messages"]
    assert [(name, n) for name, n, _ in shown] == [("chats", "1"), ("chats", "2"), ("texts", "1")] and shown[2][2] == "<s>⟦the cat</s>⟧"
    for message in record:
        assert (f"assistant\n⟦{message['content']}<|im_end|>⟧" if message["role"] == "assistant" else f"{message['role']}\n{message['content']}<|im_end|>\n") in shown[0][2]


def test_a_longer_vocabulary_than_the_models_is_trained_and_exported_whole(mount, run_sft):
    """chatml's two tokens are beyond the model's rows."""
    assert run_sft(sft_flags(mount, max_steps=3, n_generate=0, learning_rate=0.05)) == 0
    model, tokenizer = loaded(mount / "models" / "run")
    assert model.config.vocab_size >= 285 and model.lm_head.weight.shape[0] == model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    again, _ = loaded(mount / "models" / "run" / "checkpoint-3")
    ids = torch.tensor([[1, 283, 272, 284]])
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_tokenising_happens_before_any_process_group(mount, run_sft, monkeypatch):
    order, load, setup = [], sft_causal.load_data, common.setup_distributed
    monkeypatch.setattr(sft_causal, "load_data", lambda *a: order.append("data") or load(*a))
    monkeypatch.setattr(common, "setup_distributed", lambda: order.append("group") or setup())
    assert run_sft(sft_flags(mount, max_steps=1, n_generate=0)) == 0
    assert order == ["data", "group"]


def test_a_model_with_its_own_template_goes_on_with_it(mount, run_sft, capsys):
    """The export of one run is the start of another, which adds nothing; another template is a warning."""
    assert run_sft(sft_flags(mount, "first", max_steps=1, n_generate=0, template="oasst")) == 0
    first = transformers.AutoTokenizer.from_pretrained(mount / "models" / "first")
    assert run_sft(sft_flags(mount, "second", model_init_name="first", max_steps=1, n_generate=0)) == 0
    second = transformers.AutoTokenizer.from_pretrained(mount / "models" / "second")
    assert first.chat_template == second.chat_template and len(first) == len(second)
    assert json.loads((mount / "models" / "second" / "rawtune.json").read_text())["template"] == "tokenizer"
    assert "replaces the tokenizer's own template" not in capsys.readouterr().err
    assert run_sft(sft_flags(mount, "third", model_init_name="first", max_steps=1, n_generate=0, template="chatml")) == 0
    assert "WARNING --template chatml replaces the tokenizer's own template" in capsys.readouterr().err
