"""chat.py's engine: batches that rows join and leave give each reply as if it were alone, caches, sampling, text and prompts."""

import json
import math
import types

import pytest
import torch
import transformers
from conftest import bpe_tokenizer

import chat
import common

SMALL = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYERS = {**SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
T5 = {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0,
      "eos_token_id": 2, "initializer_factor": 2.0}
FAMILIES = {
    "llama": transformers.LlamaConfig(**LAYERS, num_key_value_heads=2),
    "qwen2": transformers.Qwen2Config(**LAYERS, num_key_value_heads=4),
    "gpt2": transformers.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2),
    "neox": transformers.GPTNeoXConfig(**LAYERS),
    "mistral": transformers.MistralConfig(**LAYERS, num_key_value_heads=2, sliding_window=6),
    "gemma2": transformers.Gemma2Config(**LAYERS, num_key_value_heads=2, head_dim=8, sliding_window=5, query_pre_attn_scalar=8),
    "opt": transformers.OPTConfig(**SMALL, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
                                  word_embed_proj_dim=32, init_std=0.2),
    "bloom": transformers.BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
    "t5": transformers.T5Config(**T5),
    "t5-v1.1": transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": transformers.BartConfig(**SMALL, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                                    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128, decoder_start_token_id=2,
                                    forced_eos_token_id=None, init_std=0.2),
}
LENGTHS = (40, 3, 9, 21, 4, 40, 12)  # of the prompts, in the order in which they come
TOKENIZER = bpe_tokenizer()


def make(name, dtype=torch.float32):
    torch.manual_seed(0)
    config = FAMILIES[name]
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config).to(dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


def engine_of(model, max_batch=4, chunk=16, capacity=1e9, **options):
    """An engine that is stepped by hand: no thread."""
    prompts = types.SimpleNamespace(stop_ids=lambda generation: {generation.eos_token_id} - {None}, encoder_decoder=model.config.is_encoder_decoder,
                                    stops=[], context=10**6)
    return chat.Engine(model, TOKENIZER, prompts, torch.device("cpu"), max_batch, chunk, capacity, **options)


def prompts_of(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]


def ask(engine, ids, n_tokens=12, keys=(0,), **options):
    return engine.submit(chat.Request(list(ids), list(keys), n_tokens, **options))


def finish(engine, requests):
    """Step until all have ended -> for each request a list of replies, each a list of ids."""
    for _ in range(2000):
        if not (engine.inbox or engine.waiting or engine.batches or engine.reading):
            break
        with torch.inference_mode():
            engine._exchange()
            engine.step()
    else:
        raise AssertionError("the engine does not end")
    return [[[token for token, _ in reply["tokens"]] for reply in chat.collect(request)] for request in requests]


def alone(model, ids, n_tokens=12, **options):
    """transformers' own `generate`."""
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=n_tokens,
                         min_new_tokens=0, **{"do_sample": False, **options})[0].tolist()
    return out[1:] if model.config.is_encoder_decoder else out[len(ids):]


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("name", FAMILIES)
def test_each_reply_is_generates_own_while_rows_join_and_leave(name):
    """Prompts of 3 to 40 tokens and replies of 2 to 14, in a batch of 4: rows join late, leave early, move places, shift columns."""
    model = make(name)
    engine, ids = engine_of(model), prompts_of()
    assert engine.shiftable == (name != "bart")
    n_tokens = [14, 2, 9, 5, 11, 3, 7]
    requests, together = [], 0
    for prompt, n in zip(ids, n_tokens):  # one more each third step
        requests.append(ask(engine, prompt, n))
        for _ in range(3):
            with torch.inference_mode():
                engine._exchange()
                engine.step()
            together = max(together, engine.n_running())
    assert together >= 3
    replies = finish(engine, requests)
    assert replies == [[alone(model, prompt, n)] for prompt, n in zip(ids, n_tokens)]


def test_padding_that_is_not_masked_changes_replies(monkeypatch):
    """The control for the test above."""
    model = make("llama")
    engine, forward = engine_of(model), chat.Engine._forward

    def unmasked(self, batch, *more, **options):
        start, batch.start = batch.start, [0] * len(batch.start)
        try:
            return forward(self, batch, *more, **options)
        finally:
            batch.start = start
    monkeypatch.setattr(chat.Engine, "_forward", unmasked)
    ids = prompts_of()
    assert finish(engine, [ask(engine, prompt) for prompt in ids]) != [[alone(model, prompt)] for prompt in ids]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_engine_ends_empty_and_a_full_batch_makes_others_wait(name):
    engine = engine_of(make(name), max_batch=2)
    requests = [ask(engine, prompt, 5) for prompt in prompts_of()]
    with torch.inference_mode():
        engine._exchange()
        for _ in range(6):
            engine.step()
            assert engine.n_running() <= 2
    finish(engine, requests)
    assert not engine.batches and not engine.waiting and engine.n_running() == engine.n_waiting() == 0
