"""sft_causal.py's runs: batch splits, stopping and continuing, what a run leaves, and that replies end. All in this process."""

import csv
import json
import math
import os
import random

import numpy as np
import pytest
import torch
import transformers
from conftest import (assert_same_mathematics, assert_same_run, bpe_tokenizer, distance, flags, in_process, rows, stop_at, weights,
                      write_llama)

import common_v1 as common
import sft_causal

WORDS = "the cat dog reads water book answer word number one two three yes no long small".split()
SPLITS = {"8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4)}


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes longer than a short run; `shared` is made before it, with the picture."""
    monkeypatch.setattr(common, "plot_curves", lambda *_: None)


def chats(n, seed=0):
    """Records whose replies have 1 to 14 words: a mean of means over forward steps is wrong on them."""
    rng = random.Random(seed)
    return [{"instruction": " ".join(rng.choices(WORDS, k=rng.randint(1, 5))) + f" {i}",
             "output": " ".join(rng.choices(WORDS, k=rng.choice([1, 1, 1, 2, 5, 14])))} for i in range(n)]


def trees(n, seed=1):
    """OpenAssistant trees: a question with three answers, the first of which is asked back and answered twice."""
    found = []
    for i, texts in enumerate(chats(7 * n, seed)[k * 7:][:7] for k in range(n)):
        said = [t["output"] + f" {k}" for k, t in enumerate(texts)]
        last = [{"text": said[k], "role": "assistant", "rank": k, "replies": []} for k in (1, 2)]
        back = {"text": said[3], "role": "prompter", "replies": last}
        answers = [{"text": said[k], "role": "assistant", "rank": k - 4, "replies": [back] if k == 4 else []} for k in (4, 5, 6)]
        found.append({"message_tree_id": str(i), "prompt": {"text": said[0] + f" {i}", "role": "prompter", "replies": answers}})
    return found


def write_mount(folder):
    """models/tiny and /dropout; data/chats.json (43 train, 11 eval, 5 test) and data/trees.json (6 trees, 2 eval)."""
    write_llama(folder / "models" / "tiny")
    write_llama(folder / "models" / "dropout", attention_dropout=0.1)
    (folder / "data").mkdir()
    records, grown = chats(59), trees(8)
    (folder / "data" / "chats.json").write_text(json.dumps({"train": records[:43], "eval": records[43:54], "test": records[54:]}))
    (folder / "data" / "trees.json").write_text(json.dumps({"train": grown[:6], "eval": grown[6:]}))
    return folder


@pytest.fixture
def sft_mount(tmp_path):
    return write_mount(tmp_path)


def words(mount, run="run", **changes):
    return flags(mount, run, **{"data": "chats", "n_generate": 0, **changes})


def split_words(mount, run, split, **changes):
    """Six steps, one of which has 3 instead of 8 documents. A small learning rate: AdamW turns rounding in gradients near 0 into whole steps."""
    batch, accumulation = SPLITS[split]
    return words(mount, run, **{"max_steps": 6, "learning_rate": 0.0001, "train_batch_size": batch, "gradient_accumulation_steps": accumulation,
                                **changes})


# ------------------------------------------------------------------------------------------------ batch splits


def test_any_split_of_a_step_gives_the_same_loss_gradient_and_weights_and_a_wrong_divisor_does_not(sft_mount, run_sft, monkeypatch):
    """8x1, 4x2, 2x4, packed or not (as for a wide model, as short rows cost a narrow one more). Negative control: a mean of means."""
    models, pack, packed = sft_mount / "models", sft_causal.pack, []
    monkeypatch.setattr(sft_causal, "pack", lambda *a: packed.append(pack(*a[:4], True)) or packed[-1])
    assert run_sft(split_words(sft_mount, "8x1", "8x1")) == 0
    assert rows(models / "8x1")[-1]["epoch"] == 1  # 43 documents in 6 steps: one of them has 3 instead of 8
    for split, packing in (("4x2", False), ("2x4", False), ("4x2", True), ("8x1", True)):
        run = f"{split} {packing}"
        assert run_sft(split_words(sft_mount, run, split, packing=packing)) == 0
        assert_same_mathematics(models / run, models / "8x1")
    assert max(len(row) for step in packed for row in step) == 8
    real = sft_causal.TrainingData.micro_batches

    def means(self, step):  # each forward step's own mean, averaged
        batches, _ = real(self, step)
        for batch, *_ in batches:
            batch["weight"] = torch.tensor(max(1, len(batch["target_ids"])) * len(batches))
        return batches, 1
    forward = sft_causal.TargetLosses.forward
    monkeypatch.setattr(sft_causal.TrainingData, "micro_batches", means)
    monkeypatch.setattr(sft_causal.TargetLosses, "forward", lambda self, batch, *more: forward(self, batch, *more) / batch.get("weight", 1))
    assert run_sft(split_words(sft_mount, "mean of means", "2x4")) == 0
    right, wrong = rows(models / "8x1"), rows(models / "mean of means")
    assert max(abs(w["loss"] / r["loss"] - 1) for r, w in zip(right, wrong)) > 1e-3
    assert max(abs(w["grad_norm"] / r["grad_norm"] - 1) for r, w in zip(right, wrong)) > 0.05
    assert distance(weights(models / "8x1"), weights(models / "mean of means")) > 1e-5


@pytest.mark.parametrize("loss", ["cross_entropy", "poly"])
def test_a_partial_step_over_unequal_forward_steps_is_that_of_plain_autograd(sft_mount, run_sft, loss):
    """A2, A3. The sixth step of an epoch has 3 documents; its loss and gradient norm are computed by hand from checkpoint-5 and whole logits."""
    command = split_words(sft_mount, "run", "4x2", save_steps=1, loss=loss)
    assert run_sft(command) == 0
    run, data = sft_mount / "models" / "run", json.loads((sft_mount / "data" / "chats.json").read_text())["train"]
    other = sft_causal.parse_args([str(word) for word in split_words(sft_mount, "other", "4x2", loss=loss)])
    job = sft_causal.prepare(other)
    numbers = sft_causal.TrainingData(other, job.data_sets, 32, 300, 0, False).step_ids(5)
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoint-5")
    losses = torch.cat([reply_losses(model, job.tokenizer, data[i]["instruction"], data[i]["output"])[0] for i in numbers])
    losses = losses + 1 - torch.exp(-losses) if loss == "poly" else losses
    losses.mean().backward()
    last = rows(run)[-1]
    assert (len(numbers), last["step"], last["target_tokens"]) == (3, 6, len(losses))
    assert last["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert last["grad_norm"] == pytest.approx(sum(float(p.grad.double().norm() ** 2) for p in model.parameters()) ** 0.5, rel=1e-5)


def reply_losses(model, tokenizer, question, reply):
    """(-log p (n,), is the likeliest (n,)) of the tokens of a reply and its end token, from whole logits."""
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    start = len(tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False))
    ids = torch.tensor(tokenizer.apply_chat_template(chat, return_dict=False))
    ids = ids[: start + ids[start:].tolist().index(tokenizer.convert_tokens_to_ids("<|im_end|>")) + 1]
    logits = model(input_ids=ids[None]).logits[0, start - 1: -1].double()
    return torch.nn.functional.cross_entropy(logits, ids[start:], reduction="none"), logits.argmax(1) == ids[start:]


@pytest.mark.parametrize("changes", [{"packing": True}, {"gradient_checkpointing": True}, {"attention": "eager"}, {"ds_config": "zero2"},
                                     {"ds_config": "zero2_offload"}, {"ds_config": "zero3_offload", "packing": True}, {"logits of 7 tokens": True}],
                         ids=lambda changes: " ".join(map(str, changes.values())) + " " + next(iter(changes)))
def test_packing_and_memory_savers_do_not_change_the_result(sft_mount, run_sft, monkeypatch, changes):
    """Packed rows as for a wide model. A longer run would be seen: the weights of step 3 are others."""
    pack, packed, plain = sft_causal.pack, [], sft_mount / "models" / "plain"
    monkeypatch.setattr(sft_causal, "pack", lambda *a: packed.append(pack(*a[:4], True)) or packed[-1])
    assert run_sft(split_words(sft_mount, "plain", "8x1", max_steps=4, save_steps=3)) == 0 and not packed
    if changes.pop("logits of 7 tokens", None):
        monkeypatch.setattr(common, "chunk_tokens", lambda vocabulary: 7)
    assert run_sft(split_words(sft_mount, "other", "8x1", max_steps=4, **changes)) == 0
    assert_same_mathematics(sft_mount / "models" / "other", plain)
    assert distance(weights(plain), weights(plain / "checkpoint-3")) > 1e-5
    assert any(len(row) > 1 for step in packed for row in step) == ("packing" in changes)


@pytest.mark.parametrize("precision, config", [pytest.param("bf16", "zero1", marks=pytest.mark.slow), ("bf16-mixed", "zero0"), pytest.param("fp64", "auto", marks=pytest.mark.slow)])
def test_precisions_follow_the_fp32_run(sft_mount, run_sft, precision, config):
    for name, changes in (("fp32", {}), ("other", {"precision": precision, "ds_config": config})):
        assert run_sft(words(sft_mount, name, max_steps=8, learning_rate=0.003, logging_steps=4, packing=True, **changes)) == 0
    a, b = ([row["loss"] for row in rows(sft_mount / "models" / run)] for run in ("fp32", "other"))
    assert max(abs(x - y) / x for x, y in zip(a, b)) < (1e-5 if precision == "fp64" else 0.03) and (precision == "fp64" or a != b)


def test_noise_and_prefix_attention_act_on_training_and_only_the_second_on_evaluation(sft_mount, run_sft, capsys):
    first, baseline = {}, {}
    for name, changes in (("plain", {}), ("noise", {"neftune_alpha": 5}), ("prefix", {"bidirectional_prompt": True, "packing": True}),
                          ("prefix, single", {"bidirectional_prompt": True})):
        assert run_sft(words(sft_mount, name, max_steps=1, n_generate=2, **changes)) == 0
        first[name] = rows(sft_mount / "models" / name)[0]["loss"]
        baseline[name] = rows(sft_mount / "models" / name, "eval")[0]
    loss = {name: row["eval/loss"] for name, row in baseline.items()}
    assert first["noise"] != pytest.approx(first["plain"], rel=1e-4) and loss["noise"] == loss["plain"]
    assert first["prefix"] == pytest.approx(first["prefix, single"], rel=1e-6) and first["prefix"] != pytest.approx(first["plain"], rel=1e-4)
    assert loss["prefix"] != pytest.approx(loss["plain"], rel=1e-4)
    assert "eval/exact_match" in baseline["plain"] and "eval/exact_match" not in baseline["prefix"]
    assert "WARNING --bidirectional_prompt: no replies are generated" in capsys.readouterr().err


def test_evaluating_after_every_step_leaves_the_training_with_dropout_as_it_was(sft_mount, run_sft):
    for name, changes in (("often", {"eval_steps": 1, "n_generate": 2}), ("rarely", {}), ("without", {"model_init_name": "tiny"})):
        assert run_sft(words(sft_mount, name, **{"model_init_name": "dropout", **changes})) == 0
    often, rarely, without = (sft_mount / "models" / name for name in ("often", "rarely", "without"))
    assert distance(weights(often), weights(rarely)) == 0 and [r["loss"] for r in rows(often)] == [r["loss"] for r in rows(rarely)]
    assert rows(rarely)[0]["loss"] != pytest.approx(rows(without)[0]["loss"], rel=1e-3)


def test_a_non_finite_loss_stops_before_the_update_and_keeps_the_checkpoints(sft_mount, run_sft, monkeypatch, capsys):
    forward, calls = sft_causal.TargetLosses.forward, []

    def poisoned(self, *batch):
        calls.append(self.training)
        return forward(self, *batch) * (math.nan if calls.count(True) == 4 and self.training else 1.0)
    monkeypatch.setattr(sft_causal.TargetLosses, "forward", poisoned)
    assert run_sft(words(sft_mount, save_steps=2)) == 2
    assert "step 4: the loss is nan" in capsys.readouterr().err
    assert sorted(p.name for p in (sft_mount / "models" / "run").glob("checkpoint-?")) == ["checkpoint-2"]


@pytest.mark.parametrize("while_training", [True, False])
def test_out_of_memory_names_the_step_and_the_next_thing(sft_mount, run_sft, monkeypatch, capsys, while_training):
    forward = sft_causal.TargetLosses.forward

    def full(self, *batch):
        if self.training == while_training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *batch)
    monkeypatch.setattr(sft_causal.TargetLosses, "forward", full)
    assert run_sft(words(sft_mount)) == 2
    error = capsys.readouterr().err
    assert ("step 1: out of memory" in error and "--gradient_accumulation_steps" in error if while_training
            else "evaluation: out of memory" in error and "--eval_batch_size" in error)


def test_tokenising_happens_before_any_process_group(sft_mount, run_sft, monkeypatch):
    order, load, setup = [], sft_causal.load_data, common.setup_distributed
    monkeypatch.setattr(sft_causal, "load_data", lambda *a: order.append("data") or load(*a))
    monkeypatch.setattr(common, "setup_distributed", lambda: order.append("group") or setup())
    assert run_sft(words(sft_mount, max_steps=1)) == 0
    assert order == ["data", "group"]


# ------------------------------------------------------------------------------------------------ continuing


def resume_words(mount, run, stage=0, **changes):
    """Dropout, random windows and random paths on; 8 steps = one epoch of 5 and some of the next, in which both are drawn anew."""
    return words(mount, run, **{"data": ["chats:14", "trees"], "model_init_name": "dropout", "ds_config": f"zero{stage}", "max_steps": 8,
                                "train_batch_size": 4, "truncation": "random_window", "max_length": 60, "oasst_paths": "random", **changes})


def test_a_run_that_stopped_after_its_best_evaluation_tests_and_exports_the_best(sft_mount, run_sft, monkeypatch):
    """The longer it learns yes, the worse it gets at no."""
    pairs = [{"prompt": str(i), "completion": "no" if i > 20 else "yes yes yes"} for i in range(25)]
    (sft_mount / "data" / "turn.json").write_text(json.dumps({"train": pairs[:20], "eval": pairs[21:23], "test": pairs[23:]}))
    options = {"data": "turn", "max_steps": 10, "eval_steps": 2, "metric_for_best": "loss", "learning_rate": 0.05}
    assert run_sft(words(sft_mount, "straight", **options)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        assert run_sft(words(sft_mount, "stopped", **options)) == common.EXIT_SAVED
    assert run_sft(words(sft_mount, "stopped", **options)) == 0
    a, b = sft_mount / "models" / "straight", sft_mount / "models" / "stopped"
    best = json.loads((a / "best.json").read_text())
    assert json.loads((b / "best.json").read_text()) == best and best["checkpoint"] < "checkpoint-8"
    assert distance(weights(a), weights(b)) == 0 < distance(weights(a), weights(a / "checkpoint-10"))
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(b), transformers.AutoModelForCausalLM.from_pretrained(b).eval()
    with torch.no_grad():
        by_hand = torch.cat([reply_losses(model, tokenizer, pair["prompt"], pair["completion"])[0] for pair in pairs[23:]]).mean()
    for run in (a, b):
        assert rows(run, "test")[0]["test/loss"] == pytest.approx(float(by_hand), rel=1e-6)


@pytest.mark.parametrize("stage", [0, 3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2))])
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(sft_mount, run_sft, monkeypatch, stage):
    """Stopped inside the first epoch. With another dropout stream or other windows behind the stop it is another run."""
    models = sft_mount / "models"
    assert run_sft(resume_words(sft_mount, "straight", stage)) == 0
    assert "are cut (--truncation random_window)" in (models / "straight" / "log.txt").read_text()

    def stopped(run, **changes):
        with monkeypatch.context() as patch:
            stop_at(patch, 3)
            assert run_sft(resume_words(sft_mount, run, stage, **changes)) == common.EXIT_SAVED
        assert run_sft(resume_words(sft_mount, run, stage, **changes)) == 0
    stopped("stopped")
    assert_same_run(models / "straight", models / "stopped", 8)
    assert "from step 3" in (models / "stopped" / "log.txt").read_text()
    if stage:
        return
    derive, window = common.derive_seed, sft_causal.random_window
    mutations = {"dropout": (common, "derive_seed", lambda seed, name, *more: derive(seed, name, *more) + (name == "dropout" and more[0] >= 3)),
                 "window": (sft_causal, "random_window", lambda mask, limit, rng: window(mask, limit, np.random.default_rng(5)))}
    for name, mutation in mutations.items():
        with monkeypatch.context() as patch:
            patch.setattr(*mutation)
            assert run_sft(resume_words(sft_mount, f"another {name}")) == 0
        losses = [[row["loss"] for row in rows(models / run)] for run in ("straight", f"another {name}")]
        assert losses[0] != losses[1] and (name == "window" or losses[0][:3] == losses[1][:3])


def test_a_finished_run_and_changed_flags_are_refused(sft_mount, run_sft, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run_sft(words(sft_mount)) == common.EXIT_SAVED
    for name, value in {"targets": "all", "max_length": 500, "template": "plain", "learning_rate": 0.5, "neftune_alpha": 5.0}.items():
        assert run_sft(words(sft_mount, **{name: value})) == 2
        error = capsys.readouterr().err
        assert "is an unfinished run with other flags" in error and f"{name}: " in error and f" -> {value}" in error
    assert run_sft(words(sft_mount, packing=True)) == 0  # another layout of the same mathematics
    before = (sft_mount / "models" / "run" / "metrics.jsonl").read_bytes()
    assert run_sft(words(sft_mount)) == 2 and (sft_mount / "models" / "run" / "metrics.jsonl").read_bytes() == before
    assert "--resume" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ what a run leaves


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A mount with models/run: 12 steps, evaluated and saved every 4, 7 evaluation rows answered. Tests only read it, and write runs of
    other names."""
    mount, before = write_mount(tmp_path_factory.mktemp("sft")), dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        assert in_process("sft_causal", patch)(words(mount, max_steps=12, eval_steps=4, save_steps=4, n_generate=7, save_total_limit=2,
                                                     write_results=mount / "results.csv")) == 0
    os.environ.clear()
    os.environ.update(before)
    return mount


def predictions(path):
    return json.loads(path.read_text())


def test_a_run_leaves_what_the_contract_names(shared):
    run = shared / "models" / "run"
    for name in ("args.json", "env.json", "ds_config.json", "metrics.jsonl", "rawtune.json", "config.json", "model.safetensors", "COMPLETE",
                 "log.txt", "code/sft_causal.py", "code/common_v1.py", "checkpoint-8/COMPLETE", "checkpoint-12/engine", "checkpoint-12/rawtune.json",
                 "curves.png", "tokenizer.json", "generation_config.json", "test_temperature=0.00_n=1_step=12.json"):
        assert (run / name).exists(), name
    assert sorted(p.name for p in run.glob("temperature=*")) == sorted(f"temperature=0.00_n=1_step={n}.json" for n in (0, 4, 8, 12))
    assert not (run / "checkpoint-4").exists() and not list(run.glob("*.tmp"))
    assert [row["step"] for row in rows(run, "eval")] == [0, 4, 8, 12] and [row["step"] for row in rows(run)] == list(range(1, 13))
    assert {"step", "epoch", "split", "time", "loss", "lr", "grad_norm", "tokens_per_sec", "target_tokens", "input_tokens_per_sec", "padding_share",
            "peak_memory_gb"} <= rows(run)[-1].keys()
    assert distance(weights(run), weights(run / "checkpoint-12")) == 0 < distance(weights(run), weights(run / "checkpoint-8"))
    found = json.loads((run / "rawtune.json").read_text())
    assert [found[name] for name in ("format", "script", "task", "family", "template", "end_token", "raw_prompt", "max_length")] == [
        1, "sft_causal.py", "chat", "causal", "chatml", "<|im_end|>", False, 2048]


def test_predictions_are_the_first_records_in_order_with_their_last_reply(shared):
    run, data = shared / "models" / "run", json.loads((shared / "data" / "chats.json").read_text())
    for name, split, n in (("", "eval", 7), ("test_", "test", 5)):
        found, records = predictions(run / f"{name}temperature=0.00_n=1_step=12.json"), data[split][:n]
        assert [row["orig_d"] for row in found] == records and {row["dataset"] for row in found} == {"chats"}
        assert [row["prompt"] for row in found] == [[{"role": "user", "content": r["instruction"]}] for r in records]
        assert [row["demonstration"] for row in found] == [r["output"] for r in records]
        assert all([*generation] == ["lm_postprocess"] for row in found for generation in row["generations"])
        right = np.mean([row["generations"][0]["lm_postprocess"].strip() == row["demonstration"].strip() for row in found])
        assert rows(run, split)[-1][f"{split}/exact_match"] == pytest.approx(right)


def test_the_exported_folder_is_the_trained_model_for_plain_transformers(shared, run_sft):
    """Loss and token accuracy of the whole evaluation set by transformers' own logits, on texts of the saved chat template; a checkpoint
    of another step gives another loss."""
    run, data = shared / "models" / "run", json.loads((shared / "data" / "chats.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(run)

    def loss_and_accuracy(folder):
        model, sums = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), np.zeros(3)
        for record in data["eval"]:
            chat = [{"role": "user", "content": record["instruction"]}, {"role": "assistant", "content": record["output"]}]
            prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
            ids = tokenizer.apply_chat_template(chat, return_dict=False)
            ids = ids[: len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1: -1].double()
            wanted = torch.tensor(ids[len(prompt):])
            loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
            sums += [loss.item(), (logits.argmax(1) == wanted).sum().item(), len(wanted)]
        return sums[:2] / sums[2]
    loss, accuracy = loss_and_accuracy(run)
    last = rows(run, "eval")[-1]
    assert last["eval/loss"] == pytest.approx(loss, rel=1e-5) and last["eval/token_accuracy"] == pytest.approx(accuracy)
    assert last["eval/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert abs(loss_and_accuracy(run / "checkpoint-8")[0] / loss - 1) > 1e-3


def test_an_evaluation_alone_repeats_the_last_one_and_leaves_the_model_as_it_is(shared, run_sft):
    run, before = shared / "models" / "run", (shared / "models" / "run" / "model.safetensors").read_bytes()
    alone = words(shared, "alone", model_init_name="run", no_train=True, n_generate=7)
    assert run_sft(alone) == 0
    again = shared / "models" / "alone"
    for split, name in (("eval", ""), ("test", "test_")):
        assert predictions(again / f"{name}temperature=0.00_n=1_step=0.json") == predictions(run / f"{name}temperature=0.00_n=1_step=12.json")
        for metric in ("loss", "token_accuracy", "exact_match"):
            assert rows(again, split)[0][f"{split}/{metric}"] == rows(run, split)[-1][f"{split}/{metric}"]
    assert predictions(run / "temperature=0.00_n=1_step=0.json") != predictions(run / "temperature=0.00_n=1_step=12.json")
    assert (run / "model.safetensors").read_bytes() == before and not list(again.glob("*.safetensors")) and not list(again.glob("checkpoint-*"))
    assert run_sft(alone) == 2  # what is there is not written over


def test_results_are_appended_and_a_table_with_other_columns_is_left_alone(shared, run_sft, tmp_path):
    with open(shared / "results.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    run = shared / "models" / "run"
    assert (row["run"], row["data"], row["step"]) == ("run", "chats", "12") and row["eval/loss"] == str(rows(run, "eval")[-1]["eval/loss"])
    assert row["test/exact_match"] == str(rows(run, "test")[-1]["test/exact_match"])
    table = tmp_path / "table.csv"
    common_words = {"model_init_name": "run", "no_train": True, "write_results": table}
    for name in ("first", "second"):
        assert run_sft(words(shared, name, **common_words)) == 0
    assert [line.split(",")[0] for line in table.read_text().splitlines()] == ["run", "first", "second"]
    before = table.read_bytes()
    for name in ("third", "fourth"):  # exact_match is a column more
        assert run_sft(words(shared, name, n_generate=2, **common_words)) == 0
    assert table.read_bytes() == before
    assert [line.split(",")[0] for line in (tmp_path / "table.2.csv").read_text().splitlines()] == ["run", "third", "fourth"]


@pytest.mark.parametrize("metric", ["loss", "token_accuracy"])
def test_the_best_checkpoint_is_kept_tested_and_exported(sft_mount, run_sft, metric):
    """The evaluation replies are other ones to the same prompts, so learning by heart soon makes their loss rise."""
    train = chats(24)
    turned = [{**r, "output": other["output"]} for r, other in zip(train[:11], train[1:])]
    (sft_mount / "data" / "turned.json").write_text(json.dumps({"train": train, "eval": turned, "test": turned[:5]}))
    assert run_sft(words(sft_mount, data="turned", max_steps=60, eval_steps=4, metric_for_best=metric, save_total_limit=1,
                         early_stopping_patience=3, learning_rate=0.03)) == 0
    run = sft_mount / "models" / "run"
    found = {row["step"]: row[f"eval/{metric}"] for row in rows(run, "eval") if row["step"]}
    best_step, best = (min if metric == "loss" else max)(found, key=found.get), json.loads((run / "best.json").read_text())
    assert best == {"checkpoint": f"checkpoint-{best_step}", "metric": metric, "value": found[best_step]}
    assert best_step + 12 == max(found) < 60  # stopped three evaluations later
    last = run / f"checkpoint-{max(found)}"
    assert distance(weights(run), weights(run / best["checkpoint"])) == 0 < distance(weights(run), weights(last))
    assert run_sft(words(sft_mount, "again", data="turned", model_init_name="run", no_train=True)) == 0
    assert rows(sft_mount / "models" / "again", "test")[0]["test/loss"] == rows(run, "test")[-1]["test/loss"]
    assert (run / f"test_temperature=0.00_n=1_step={best_step}.json").exists()


def test_an_evaluation_does_not_depend_on_its_batch_size_and_several_data_sets_weigh_by_tokens(shared, run_sft):
    """Rows of two data sets, one of which has texts without a prompt."""
    (shared / "data" / "texts.json").write_text(json.dumps({"train": [{"text": "the cat"}], "eval": [{"text": "a book"}, {"text": "the cat reads"}]}))
    found = []
    for size in (2, 7, 32):
        assert run_sft(words(shared, f"size {size}", model_init_name="run", data=["chats", "texts"], no_train=True, eval_batch_size=size,
                             n_generate=20, temperature=0.8, n_samples=2)) == 0
        run = shared / "models" / f"size {size}"
        found.append((rows(run, "eval")[0], predictions(run / "temperature=0.80_n=2_step=0.json")))
    for row, predicted in found[1:]:
        assert predicted == found[0][1] and row["eval/loss"] == pytest.approx(found[0][0]["eval/loss"], rel=1e-6)
    row, predicted = found[0]
    assert {p["dataset"] for p in predicted} == {"chats"} and len(predicted) == 11 and "eval/texts/exact_match" not in row
    job = sft_causal.prepare(sft_causal.parse_args([str(w) for w in words(shared, "other", model_init_name="run", data=["chats", "texts"])]))
    n = [int(d.n_targets["eval"].sum()) for d in job.data_sets]
    for metric in ("loss", "token_accuracy"):
        parts = [row[f"eval/{name}/{metric}"] for name in ("chats", "texts")]
        assert row[f"eval/{metric}"] == pytest.approx((n[0] * parts[0] + n[1] * parts[1]) / sum(n), rel=1e-9)
    assert row["eval/chats/loss"] != row["eval/texts/loss"] and n[0] != n[1]


def test_the_export_of_one_run_goes_on_with_its_template_and_another_one_is_a_warning(sft_mount, run_sft, capsys):
    tokenizers = {}
    write_llama(sft_mount / "models" / "exact", vocab_size=len(bpe_tokenizer()))  # the template's tokens are beyond its rows
    for name, changes in (("first", {"model_init_name": "exact", "template": "oasst"}),
                          ("second", {"model_init_name": "first"}), ("third", {"model_init_name": "first", "template": "chatml"})):
        assert run_sft(words(sft_mount, name, max_steps=1, **changes)) == 0
        tokenizers[name] = transformers.AutoTokenizer.from_pretrained(sft_mount / "models" / name)
        assert ("WARNING --template chatml replaces the tokenizer's own template" in capsys.readouterr().err) == (name == "third")
    assert tokenizers["first"].chat_template == tokenizers["second"].chat_template and len(tokenizers["first"]) == len(tokenizers["second"])
    assert json.loads((sft_mount / "models" / "second" / "rawtune.json").read_text())["template"] == "tokenizer"
    assert len(tokenizers["third"]) == len(tokenizers["first"]) + 2
    model = transformers.AutoModelForCausalLM.from_pretrained(sft_mount / "models" / "third")
    assert model.config.vocab_size == len(tokenizers["third"]) == len(bpe_tokenizer()) + 5 == len(model.lm_head.weight)
    assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape


# ------------------------------------------------------------------------------------------------ it learns


def stops(run, records):
    """Of the records, those whose greedy answer by plain transformers, as the saved configuration says, is the reply and its end token."""
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(run), transformers.AutoModelForCausalLM.from_pretrained(run).eval()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = []
    for record in records:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": record["instruction"]}], add_generation_prompt=True, return_dict=True,
                                            return_tensors="pt")["input_ids"]
        reply = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, do_sample=False)[0, ids.shape[1]:].tolist()
        found.append(reply[-1] == end and reply.count(end) == 1 and tokenizer.decode(reply[:-1]) == record["output"])
    return found


@pytest.mark.slow
def test_eight_pairs_are_learnt_by_heart_and_every_answer_ends_with_the_end_token(sft_mount, run_sft, monkeypatch):
    """Loss below 0.01. Negative control: with the end tokens no targets, nothing stops."""
    pairs = chats(8, seed=3)
    (sft_mount / "data" / "pairs.json").write_text(json.dumps({"train": pairs, "eval": pairs}))
    learn = {"data": "pairs", "max_steps": 120, "n_generate": 8, "max_new_tokens": 100, "weight_decay": 0, "logging_steps": 120}
    assert run_sft(words(sft_mount, **learn)) == 0
    run = sft_mount / "models" / "run"
    assert rows(run, "eval")[-1]["eval/loss"] < 0.01 and rows(run, "eval")[-1]["eval/exact_match"] == 1
    assert stops(run, pairs) == [True] * 8
    spans = sft_causal.chat_spans

    def without_end(tokenizer, messages, targets, end):
        text, found = spans(tokenizer, messages, targets, end)
        return text, [(start, stop - len(end)) for start, stop in found]
    monkeypatch.setattr(sft_causal, "chat_spans", without_end)
    assert run_sft(words(sft_mount, "endless", cache_dir=sft_mount / "other", **{**learn, "n_generate": 0})) == 0
    assert rows(sft_mount / "models" / "endless", "eval")[-1]["eval/loss"] < 0.01 and not any(stops(sft_mount / "models" / "endless", pairs))
