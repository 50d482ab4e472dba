"""sft_causal.py with LoRA, bottleneck adapters and quantised bases: what is trained, what is saved, who can read it."""

import json
import math

import pytest
import torch
import transformers
from conftest import bpe_tokenizer, flags, rows, stop_at, weights, write_llama

import common_v1 as common

WORDS = "the cat reads a long book".split()


@pytest.fixture
def sft_mount(tmp_path):
    """models/tied and /untied: Llama types whose tokenizer lacks a chat template, so chatml adds two tokens; data/chats.json."""
    for name, tied in (("tied", True), ("untied", False)):
        write_llama(tmp_path / "models" / name, vocab_size=len(bpe_tokenizer()), tie_word_embeddings=tied, attention_dropout=0.1)
    records = [{"instruction": f"{' '.join(WORDS[: 1 + i % 6])} {i}", "output": " ".join(WORDS[i % 5:])} for i in range(24)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chats.json").write_text(json.dumps({"train": records[:18], "eval": records[18:]}))
    return tmp_path


def words(mount, run="run", **changes):
    return flags(mount, run, **{"model_init_name": "untied", "data": "chats", "lora_rank": 4, "max_steps": 5, **changes})


def logits(model, tokenizer):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        return model.eval()(input_ids=ids["input_ids"]).logits.double()


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_rows_of_added_tokens_are_trained_saved_and_read_by_peft(sft_mount, run_sft, name):
    """J5, J2. The two tokens of chatml are beyond the base's rows; PEFT and the merged model give the same logits."""
    peft = pytest.importorskip("peft")
    assert run_sft(words(sft_mount, model_init_name=name)) == 0
    run = sft_mount / "models" / "run"
    adapter = weights(run)
    new = {key: value for key, value in adapter.items() if "token_adapter" in key}
    assert len(new) == (1 if name == "tied" else 2) and all(value.shape == (2, 32) for value in new.values())
    assert all((value[0] != value[1]).any() for value in new.values())  # both began as the mean
    assert all(value.abs().sum() for key, value in adapter.items() if "lora_B" in key)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run)
    base = transformers.AutoModelForCausalLM.from_pretrained(run / "base")
    assert base.get_input_embeddings().weight.shape[0] == len(tokenizer) - 2
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs = logits(peft.PeftModel.from_pretrained(base, run), tokenizer)
    assert run_sft(words(sft_mount, lora_rank=None, model_init_name="run", merge_lora=sft_mount / "merged", training_run_name=None)) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(sft_mount / "merged")
    assert torch.allclose(theirs, logits(merged, tokenizer), atol=1e-5)
    assert theirs.abs().max() > 0.1
    generation = merged.generation_config
    assert generation.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>"), 2] and generation.pad_token_id == 0
    # a run on the merged model, one on the adapter: the same evaluation
    for model in ("run", str(sft_mount / "merged")):
        again = words(sft_mount, f"eval-{model[-3:]}", lora_rank=None, no_train=True, model_init_name=None, model_init_path=None)
        assert run_sft([*again, *(["--model_init_name", model] if model == "run" else ["--model_init_path", model])]) == 0
    a, b = (rows(sft_mount / "models" / f"eval-{end}", "eval")[0] for end in ("run", "ged"))
    assert a["eval/loss"] == pytest.approx(b["eval/loss"], rel=1e-6) and a["eval/loss"] == pytest.approx(rows(run, "eval")[-1]["eval/loss"], rel=1e-6)
    assert (sft_mount / "models" / "eval-run" / "temperature=0.00_n=1_step=0.json").read_bytes() == (
        sft_mount / "models" / "eval-ged" / "temperature=0.00_n=1_step=0.json").read_bytes()


LORA, BOTTLENECK = {"lora_rank": 4, "lora_dropout": 0.1}, {"lora_rank": None, "train_adapter": True, "reduction_factor": 8}
NF4, INT8 = {"lora_rank": 4, "quantize": "nf4", "lora_targets": "all-linear"}, {"lora_rank": 4, "quantize": "int8", "packing": True}


@pytest.mark.parametrize("kind, stage", [(LORA, 0), *(pytest.param(kind, stage, marks=pytest.mark.slow) for kind, stage in [
    (LORA, 1), (LORA, 2), (LORA, 3), (BOTTLENECK, 0), (BOTTLENECK, 3), (NF4, 0), (NF4, 3), (INT8, 2), (INT8, 3)])])
def test_stopped_and_resumed_equals_uninterrupted_and_holds_only_what_is_trained(sft_mount, run_sft, monkeypatch, kind, stage):
    """R6, dropout on: equal to the bit, the base untouched, a checkpoint of adapter + AdamW state + 1 MiB at most."""
    words_of = {**kind, "ds_config": f"zero{stage}", "save_steps": 2, "n_generate": 2}
    assert run_sft(words(sft_mount, "straight", **words_of)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert run_sft(words(sft_mount, "stopped", **words_of)) == common.EXIT_SAVED
    base = {name: (sft_mount / "models" / name / "base" / "model.safetensors").read_bytes() for name in ("straight", "stopped")}
    assert run_sft(words(sft_mount, "stopped", **words_of)) == 0
    a, b = (weights(sft_mount / "models" / name) for name in ("straight", "stopped"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    before = weights(sft_mount / "models" / "stopped" / "checkpoint-4")
    assert any(not torch.equal(before[key], b[key]) for key in b)  # it went on
    for name, content in base.items():
        assert (sft_mount / "models" / name / "base" / "model.safetensors").read_bytes() == content
    n_trained = sum(value.numel() for value in a.values())
    size = sum(p.stat().st_size for p in (sft_mount / "models" / "stopped" / "checkpoint-5").rglob("*") if p.is_file())
    assert size < n_trained * (4 + 16) + 2**20
    assert not list((sft_mount / "models" / "stopped" / "checkpoint-5").glob("model*.safetensors"))


def test_gradients_with_checkpointing_and_a_frozen_base_are_the_same(sft_mount, run_sft):
    """J1."""
    for name, on in (("plain", None), ("recomputed", True)):
        assert run_sft(words(sft_mount, name, gradient_checkpointing=on, max_steps=2, n_generate=0)) == 0
    a, b = (rows(sft_mount / "models" / name) for name in ("plain", "recomputed"))
    assert [row["grad_norm"] for row in a] == pytest.approx([row["grad_norm"] for row in b], rel=1e-6)
    assert all(row["grad_norm"] > 0 for row in a)


@pytest.mark.slow
def test_adapters_and_precisions_start_from_the_same_loss(sft_mount, run_sft):
    """LoRA and bottlenecks change nothing before the first update; a quantised base changes the loss a little."""
    kinds = {"full": {"lora_rank": None}, "lora": {}, "bottleneck": {"lora_rank": None, "train_adapter": True}, "nf4": {"quantize": "nf4"},
             "int8": {"quantize": "int8"}, "bf16": {"precision": "bf16", "ds_config": "zero2"}, "fp64": {"precision": "fp64", "ds_config": "zero1"}}
    for name, kind in kinds.items():
        assert run_sft(words(sft_mount, name, max_steps=1, n_generate=0, save_total_limit=1, **kind)) == 0
    loss = {name: rows(sft_mount / "models" / name, "eval")[0]["eval/loss"] for name in kinds}
    assert loss["lora"] == loss["bottleneck"] == loss["full"] and loss["fp64"] == pytest.approx(loss["full"], rel=1e-5)
    assert 0 < abs(loss["int8"] / loss["full"] - 1) < 0.02 and 0 < abs(loss["nf4"] / loss["full"] - 1) < 0.2
    assert math.isclose(loss["bf16"], loss["full"], rel_tol=0.02)


def test_an_adapter_run_is_continued_and_other_tokens_or_ranks_are_refused(sft_mount, run_sft, capsys):
    assert run_sft(words(sft_mount, "first", n_generate=0)) == 0
    assert run_sft(words(sft_mount, "second", model_init_name="first", lora_rank=None, n_generate=0)) == 0
    a, b = (rows(sft_mount / "models" / name, "eval") for name in ("first", "second"))
    assert b[0]["eval/loss"] == pytest.approx(a[-1]["eval/loss"], rel=1e-6) and b[-1]["eval/loss"] < b[0]["eval/loss"]
    assert run_sft(words(sft_mount, "third", model_init_name="first", lora_rank=8)) == 2 and "merge it first" in capsys.readouterr().err
    assert run_sft(words(sft_mount, "third", model_init_name="first", lora_rank=None, template="oasst")) == 2
    assert "whose tokenizer lacks <|system|>, <|prompter|>, <|assistant|>" in capsys.readouterr().err
