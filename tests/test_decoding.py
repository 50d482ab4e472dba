"""decoding.py against transformers' generate; test_ppo.py samples with it."""

import pytest
import torch
import transformers
from conftest import make_causal, make_model

from decoding import Decoding, choose

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
OTHERS = {  # families that conftest.py does not make
    "mistral": transformers.MistralConfig(
        **HEADS, head_dim=8, num_hidden_layers=2, vocab_size=300, sliding_window=6
    ),
    "gpt_neo": transformers.GPTNeoConfig(
        hidden_size=32,
        num_heads=4,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        window_size=6,
        vocab_size=300,
    ),
    "bloom": transformers.BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=300),
}
BART = {"d_model": 32, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 300}
FAMILIES = ["llama", "gpt2", "pythia", "opt", "gemma2", "t5", "mt5", *OTHERS]
PROMPTS = [[5, 9, 40, 41, 7, 120, 9, 200, 33, 8], [7, 11], [90, 4, 55, 23, 8], [3, 3, 201, 60]]
LENGTHS = [5, 14, 9, 12]  # of their replies


def make(family):
    """A model whose every token counts: new weights of a deviation of 0.02 attend to nothing."""
    if family in ("t5", "mt5", "bart"):
        auto_class = transformers.AutoModelForSeq2SeqLM
        config = transformers.AutoConfig.from_pretrained(make_model(family, weights=False))
    else:
        auto_class = transformers.AutoModelForCausalLM
        config = OTHERS.get(family)
        config = config or transformers.AutoConfig.from_pretrained(make_causal(family, False))
    torch.manual_seed(0)
    model = auto_class.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(std=0.4)
    return model


def reference(model, prompt, n_tokens):
    """Greedy token ids of transformers."""
    settings = model.generation_config
    settings.eos_token_id = settings.forced_eos_token_id = None
    output = model.generate(torch.tensor([prompt]), max_new_tokens=n_tokens, do_sample=False)
    output = output[0].tolist()
    return output[1:] if model.config.is_encoder_decoder else output[len(prompt) :]


@torch.inference_mode()
def decode(model, joins):
    """The replies to PROMPTS. joins: {step: numbers of the prompts that join then}; each row leaves
    when its reply is as long as LENGTHS says."""
    decoding = Decoding(model)
    replies = [[] for _ in PROMPTS]
    rows, tokens, step = [], torch.zeros(0, dtype=torch.long), 0
    while rows or step <= max(joins):
        logits = [decoding.step(tokens[:, None])] if rows else []
        new = joins.get(step, [])
        if new:
            logits.append(decoding.read([PROMPTS[i] for i in new]))
        step += 1
        rows = rows + new
        if not rows:
            continue
        tokens = choose(torch.cat(logits), [None] * len(rows))
        for i, token in zip(rows, tokens.tolist()):
            replies[i].append(token)
        kept = [k for k, i in enumerate(rows) if len(replies[i]) < LENGTHS[i]]
        rows = [rows[k] for k in kept]
        kept = torch.tensor(kept, dtype=torch.long)
        tokens = tokens[kept]
        decoding.keep(kept)
        if rows:
            longest = max(len(PROMPTS[i]) + len(replies[i]) for i in rows)
            assert decoding.attention_mask.shape[1] <= longest  # no column that nobody needs
    return replies


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_join_and_leave_write_what_generate_writes(family):
    model = make(family)
    expected = [reference(model, *pair) for pair in zip(PROMPTS, LENGTHS)]
    assert Decoding(model).can_join
    assert len({tuple(reply) for reply in expected}) == len(expected)
    assert decode(model, {0: [1], 2: [0, 3], 4: [2]}) == expected
    assert decode(model, {0: [0, 1, 2, 3], 20: []}) == expected
    assert decode(model, {0: [0], 30: [2, 1], 32: [3]}) == expected  # nothing runs in between


def test_a_decoder_that_counts_padding_says_so():
    model = make("bart")
    expected = [reference(model, *pair) for pair in zip(PROMPTS, LENGTHS)]
    assert not Decoding(model).can_join
    assert decode(model, {0: [0, 1, 2, 3]}) == expected  # begin together
    assert decode(model, {0: [1], 2: [0, 3], 4: [2]}) != expected


def test_a_state_that_is_no_cache_of_keys_and_values_is_refused():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300}
    hybrid = transformers.Lfm2Config(**small, layer_types=["full_attention", "conv"])
    for config in (transformers.MambaConfig(**small), hybrid):
        model = transformers.AutoModelForCausalLM.from_config(config)
        with pytest.raises(ValueError, match=f"a {config.model_type} keeps more than keys"):
            Decoding(model)


def test_prompts_of_unlike_lengths_are_refused_where_padding_counts():
    model = transformers.BartForCausalLM(transformers.BartConfig(**BART, decoder_layers=1))
    with pytest.raises(ValueError, match="counts padding"):
        Decoding(model).read(PROMPTS)


def test_tokens_are_drawn_from_the_distribution():
    probs = torch.tensor([[0.5, 0.25, 0.2, 0.05, 0.0]])
    generator = torch.Generator().manual_seed(1)
    n_draws = 4000
    scores = probs.log().expand(n_draws, -1)
    tokens = choose(scores, [generator] * n_draws)
    shares = tokens.bincount(minlength=5) / n_draws
    torch.testing.assert_close(shares, probs[0], atol=0.03, rtol=0)  # four deviations
    assert choose(scores[:1], [None]) == 0
