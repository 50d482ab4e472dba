"""chat.py's engine: batches that rows join and leave give each reply as if it were alone, caches, sampling, text and prompts."""

import math
import types

import pytest
import torch
import transformers
from conftest import bpe_tokenizer

import chat
import common_v1 as common

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


def steps(engine, n=2000):
    """Up to n steps, yielding after each, until there is nothing to do (where the engine would wait)."""
    for _ in range(n):
        if not (engine.inbox or engine.waiting or engine.batches or engine.reading):
            return
        with engine._no_grad():
            engine._exchange()
            engine.step()
        yield
    assert n < 2000, "the engine does not end"


def finish(engine, requests=()):
    """Step until all have ended -> for each request a list of replies, each a list of ids."""
    for _ in steps(engine):
        pass
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
        for _ in steps(engine, 3):
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


def test_a_model_that_does_not_use_the_cache_is_refused_at_the_start(capsys):
    model = transformers.AutoModelForCausalLM.from_config(transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2)).eval()
    with pytest.raises(SystemExit):
        engine_of(model)
    assert "mamba does not run on a plain key-value cache" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_engine_ends_empty_and_a_full_batch_makes_others_wait(name):
    engine = engine_of(make(name), max_batch=2)
    requests = [ask(engine, prompt, 5) for prompt in prompts_of()]
    assert max(engine.n_running() for _ in steps(engine)) == 2
    assert all(len(reply) == 5 for replies in finish(engine, requests) for reply in replies)
    assert not engine.batches and not engine.waiting and engine.n_running() == engine.n_waiting() == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_short_row_that_outlives_a_long_one_gives_its_padding_back(name):
    model = make(name)
    engine, (long, short) = engine_of(model, chunk=256), prompts_of((100, 4))
    n_long, n_short = (10, 60) if name != "t5" else (110, 150)
    requests = [ask(engine, long, n_long)]
    if name == "t5":  # decoders are long by what they have written
        list(steps(engine, 105))
    requests.append(ask(engine, short, n_short))
    widths = [max((batch.width() for batch in engine.batches), default=0) for _ in steps(engine)]
    assert max(widths) > 100 and any(b < a - 60 for a, b in zip(widths, widths[1:]) if b)
    assert finish(engine, requests) == [[alone(model, long, n_long)], [alone(model, short, n_short)]]


def test_memory_bounds_what_runs_together_but_never_stops_a_single_request():
    engine = engine_of(make("llama"), max_batch=8)
    engine.capacity_bytes = 2 * 60 * engine.bytes_per_token
    requests = [ask(engine, prompt, 20) for prompt in prompts_of((40, 40, 40, 100))]
    assert max(engine.n_running() for _ in steps(engine)) == 2
    assert all(len(reply) == 20 for replies in finish(engine, requests) for reply in replies)


def test_a_cancelled_request_leaves_at_once_waiting_reading_or_running_and_others_do_not_notice():
    model = make("llama")
    engine, (running, other, long, waiting) = engine_of(model, max_batch=2, chunk=32), prompts_of((9, 12, 200, 5))
    kept = ask(engine, other, 30)
    gone = [ask(engine, running, 1000)]
    list(steps(engine, 6))
    assert engine.n_running() == 2
    engine.cancel(gone[0])
    gone.append(ask(engine, long, 1000))  # read in chunks: cancelled half-way
    list(steps(engine, 1))
    assert engine.n_running() == 1 and engine.reading_requests == [gone[1]]
    gone.append(ask(engine, waiting, 1000))
    for request in gone[1:]:
        engine.cancel(request)
    list(steps(engine, 1))
    assert not engine.reading and not engine.waiting
    assert finish(engine, [kept]) == [[alone(model, other, 30)]]
    assert engine.n_read < len(running) + len(other) + len(long)


def test_a_failing_step_ends_its_replies_with_the_error_and_the_next_request_works(monkeypatch, capsys):
    model = make("llama")
    engine, ids = engine_of(model), prompts_of((9, 12))
    requests = [ask(engine, prompt, 50) for prompt in ids]
    calls, forward = [], chat.Engine._forward

    def fails_once(self, *more, **options):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *more, **options)
    monkeypatch.setattr(chat.Engine, "_forward", fails_once)
    engine.start()
    for request in requests:
        with pytest.raises(RuntimeError, match="out of memory"):
            chat.collect(request)
    after = ask(engine, ids[0], 5)
    assert [token for token, _ in chat.collect(after)[0]["tokens"]] == alone(model, ids[0], 5)
    engine.stop()


# ------------------------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt"])
def test_a_next_turn_reads_its_new_tokens_only_and_replies_the_same(name):
    model = make(name)
    engine, (first, more) = engine_of(model, chunk=512), prompts_of((50, 7))
    reply = finish(engine, [ask(engine, first, 10)])[0][0]
    before = engine.n_read
    turn = first + reply + more
    again = finish(engine, [ask(engine, turn, 10)])[0][0]
    assert again == alone(model, turn, 10)
    assert engine.n_read - before == len(more) + 1  # the last token of a reply was chosen, not yet read
    before = engine.n_read
    assert finish(engine, [ask(engine, turn, 10)])[0][0] == again and engine.n_read - before == 1  # the same once more
    before, others = engine.n_read, prompts_of((60, 58), seed=5)
    assert finish(engine, [ask(engine, prompt, 10) for prompt in (turn, *others)])[0][0] == again
    assert engine.n_read - before == 1 + sum(map(len, others))  # not read anew to be read beside others
    engine.kept.clear()
    before = engine.n_read
    assert finish(engine, [ask(engine, turn, 10)])[0][0] == again and engine.n_read - before == len(turn)


def test_of_two_kept_conversations_the_longer_beginning_is_used_and_the_oldest_go():
    model = make("llama")
    engine, (a, b, c) = engine_of(model), prompts_of((60, 50, 40))
    mixed = a[:45] + b[45:]
    for prompt in (a, mixed):
        finish(engine, [ask(engine, prompt, 4)])
    before = engine.n_read
    assert finish(engine, [ask(engine, a + c, 6)]) == [[alone(model, a + c, 6)]]
    assert engine.n_read - before == len(c)
    engine.capacity_bytes = 4 * 80 * engine.bytes_per_token
    finish(engine, [ask(engine, b, 4)])
    assert list(engine.kept) == [next(iter(engine.kept))] and next(iter(engine.kept))[:50] == tuple(b)
    finish(engine, [ask(engine, c[:20], 4)])  # short ones are not kept
    assert len(engine.kept) == 1


@pytest.mark.slow
def test_compiled_steps_reply_the_same_without_compiling_anew_for_each_token():
    """Needs a C++ compiler, as --compile does."""
    import shutil
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    torch._dynamo.utils.counters.clear()
    model = make("llama")
    engine, ids = engine_of(model, compiled=True), prompts_of()
    requests = [ask(engine, prompt, n) for prompt, n in zip(ids, (30, 12, 9, 5, 70, 3, 7))]
    assert finish(engine, requests) == [[alone(model, prompt, n)] for prompt, n in zip(ids, (30, 12, 9, 5, 70, 3, 7))]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # one row, any number of rows, and the start's check


# ------------------------------------------------------------------------------------------------ sampling


def knobs(rows, vocabulary=300, **options):
    """A stand-in for a batch of rows with these options; each value one per row."""
    made = []
    for i in range(rows):
        request = chat.Request([5], [1000 + i], 5, **{name: value[i] for name, value in options.items()})
        made.append(chat.Row(request, 0, TOKENIZER, [5, 7, 7]))
    return types.SimpleNamespace(rows=made, knobs=None)


def test_choice_is_the_row_keyed_sample_of_the_evaluations_whatever_the_batch():
    """The same key draws the token that `common.RowKeyedSampler` draws in seq2seq.py and sft_causal.py; a batch changes nothing."""
    engine, logits = engine_of(make("llama")), torch.randn(6, 300, generator=torch.Generator().manual_seed(1)) * 3
    temperature, top_p = [0.7] * 6, [0.8] * 6
    batch = knobs(6, temperature=temperature, top_p=top_p)
    for i, row in enumerate(batch.rows):
        row.n_new = i
    chosen = engine.choose(batch, logits)
    for i in range(6):
        sampler = common.RowKeyedSampler(torch.tensor([1000 + i]), 0.7, 0.8, start=0)
        assert chosen[i] == sampler(torch.zeros(1, i), logits[i: i + 1]).argmax()
    some = types.SimpleNamespace(rows=[batch.rows[4], batch.rows[1]], knobs=None)
    assert engine.choose(some, logits[[4, 1]]).tolist() == chosen[[4, 1]].tolist()
    batch.rows[0].key += 1
    batch.knobs, others = None, chosen.clone()
    draws = {int(engine.choose(batch, logits)[0]) for batch.rows[0].key in range(50) if not setattr(batch, "knobs", None)}
    assert len(draws) > 1 and others.equal(chosen)


@pytest.mark.parametrize("top_k, top_p, vocabulary, sharpness", [(0, 0.9, 300, 3), (5, 1.0, 300, 3), (7, 0.6, 300, 3), (0, 0.9, 5000, 0.01),
                                                              (0, 0.5, 5000, 3), (1000, 0.9, 5000, 0.1), (1000, 0.7, 5000, 1.3), (3, 0.3, 5000, 0.1), (0, 1.0, 300, 1)])
def test_what_can_be_drawn_is_what_transformers_warpers_leave_with_their_probabilities(top_k, top_p, vocabulary, sharpness):
    """More than CANDIDATES tokens in flat distributions included."""
    engine, generator = engine_of(make("llama")), torch.Generator().manual_seed(3)
    logits = torch.randn(2, vocabulary, generator=generator) * sharpness
    wanted = logits / 0.8
    if top_k:
        wanted = transformers.TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = transformers.TopPLogitsWarper(top_p)(None, wanted)
    allowed = [set(row.isfinite().nonzero()[:, 0].tolist()) for row in wanted]
    probabilities = wanted.softmax(-1)
    n, counts = 400, torch.zeros(2, vocabulary)
    batch = knobs(2, temperature=[0.8] * 2, top_k=[top_k] * 2, top_p=[top_p] * 2)
    for key in range(n):
        for i, row in enumerate(batch.rows):
            row.key = common.derive_seed(key, i)
        batch.knobs = None
        for i, token in enumerate(engine.choose(batch, logits).tolist()):
            assert token in allowed[i]
            counts[i, token] += 1
    # the share of the likeliest half of the allowed tokens, within 5 standard deviations
    for i in range(2):
        half = probabilities[i].argsort(descending=True)[: max(1, len(allowed[i]) // 2)]
        p = float(probabilities[i, half].sum())
        assert abs(float(counts[i, half].sum()) / n - p) <= 5 * math.sqrt(max(p * (1 - p), 1e-4) / n)


def test_greedy_and_sampled_rows_and_penalties_share_a_batch():
    engine, logits = engine_of(make("llama")), torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    logits[:, 7] = 20.0  # said before: [5, 7, 7]
    batch = knobs(3, temperature=[0.0, 0.0, 5.0], repetition_penalty=[1.0, 1000.0, 1.0])
    chosen = engine.choose(batch, logits)
    wanted = transformers.RepetitionPenaltyLogitsProcessor(1000.0)(torch.tensor([[5, 7, 7]]), logits[1:2].clone()).argmax()
    assert chosen[0] == 7 and chosen[1] == wanted != 7
    below = logits - 100
    below[:, 5] = -1.0  # the likeliest, said before: a penalty makes it less likely also where its logit is negative
    batch.knobs = None
    assert engine.choose(batch, below)[0] == 5 != engine.choose(batch, below)[1]
    assert len({int(engine.choose(batch, logits)[2]) for batch.rows[2].key in range(30) if not setattr(batch, "knobs", None)}) > 3


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_samples_share_one_reading_of_their_prompt_and_do_not_depend_on_the_batch(name):
    model = make(name)
    engine, ids = engine_of(model, max_batch=8), prompts_of((30, 6))
    keys = [common.derive_seed(0, n) for n in range(3)]
    options = {"temperature": 1.0, "top_p": 0.9}
    together = finish(engine, [ask(engine, ids[0], 12, keys, **options), ask(engine, ids[1], 12, keys, **options)])
    assert engine.n_read == 36 and len({tuple(reply) for reply in together[0]}) == 3
    for n in range(3):
        one = engine_of(model)
        assert finish(one, [ask(one, ids[0], 12, keys[n: n + 1], **options)])[0][0] == together[0][n]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_log_probabilities_are_the_models_own_at_temperature_1(name):
    model = make(name)
    engine, ids = engine_of(model), prompts_of((20, 5))
    requests = [ask(engine, prompt, 8, temperature=0.7, logprobs=3) for prompt in ids]
    requests.append(ask(engine, ids[0], 8))
    finish(engine)
    replies = [chat.collect(request) for request in requests]
    for prompt, (reply,) in zip(ids, replies):
        tokens = [token for token, _ in reply["tokens"]]
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0] + tokens[:-1]])).logits[0]
            else:
                logits = model(input_ids=torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1:]
        wanted = logits.log_softmax(-1)
        for place, (token, (p, top)) in enumerate(reply["tokens"]):
            assert p == pytest.approx(float(wanted[place, token]), abs=1e-4)
            values, best = wanted[place].topk(3)
            assert list(top) == best.tolist() and list(top.values()) == pytest.approx(values.tolist(), abs=1e-4)
    assert all(told is None for _, told in replies[2][0]["tokens"])


def test_an_echoed_prompt_has_its_own_log_probabilities_in_chunks():
    model = make("llama")
    engine, (ids,) = engine_of(model, chunk=8), prompts_of((100,))
    request = ask(engine, ids, 0, logprobs=1, echo=True)
    finish(engine)
    reply, = chat.collect(request)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    assert [token for token, _ in reply["tokens"]] == ids and reply["tokens"][0][1] is None
    found = [told[0] for _, told in reply["tokens"][1:]]
    assert found == pytest.approx([float(wanted[i, token]) for i, token in enumerate(ids[1:])], abs=1e-4)
    assert reply["finish"] == "length" and reply["text"] == ""


# ------------------------------------------------------------------------------------------------ text

SENTENCES = ["The cat reads.", "naïve café, 東京 🙂🙂 ok", "a  b\n\n c\t", "  leading", "", "�broken"]


def tokenizers():
    yield "bytes of BPE", TOKENIZER
    yield "ByT5", transformers.ByT5Tokenizer()
    tiny = transformers.AutoTokenizer.from_pretrained(common.HERE / "models" / "tiny-t5")
    yield "sentencepiece", tiny


@pytest.mark.parametrize("name, tokenizer", tokenizers(), ids=lambda x: x if isinstance(x, str) else "")
def test_pieces_of_text_add_up_to_the_text_and_never_hold_half_a_character(name, tokenizer):
    for sentence in SENTENCES:
        ids = tokenizer(sentence, add_special_tokens=False).input_ids
        text = chat.Text(tokenizer, [])
        pieces = [text.push(token) for token in ids] + [text.push(None, last=True)]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if "�" not in sentence:
            assert not any("�" in piece for piece in pieces[:-1])


def test_text_that_breaks_off_inside_a_character_shows_so_at_the_end():
    ids = TOKENIZER("東", add_special_tokens=False).input_ids[:-1]
    text = chat.Text(TOKENIZER, [])
    assert [text.push(token) for token in ids] == [""] * len(ids) and text.push(None, last=True) == "�"


def test_a_stop_string_over_several_tokens_is_cut_away_and_what_might_begin_one_waits():
    for stops, wanted in ((["\nUser:"], "Yes."), (["User", "s."], "Ye"), (["absent"], "Yes.\nUser: and more"), (["more!"], "Yes.\nUser: and more")):
        text, pieces = chat.Text(TOKENIZER, stops), []
        for token in TOKENIZER("Yes.\nUser: and more", add_special_tokens=False).input_ids:
            pieces.append(text.push(token))
            assert not any(stop in "".join(pieces) for stop in stops)
            if text.stopped:
                break
        else:
            pieces.append(text.push(None, last=True))
        assert "".join(pieces) == wanted and text.stopped == (wanted != "Yes.\nUser: and more")


def test_a_row_whose_top_k_exceeds_the_candidates_does_not_depend_on_its_neighbours():
    """A flat neighbour makes all tokens be looked at: the same draw with and without."""
    engine, generator = engine_of(make("llama")), torch.Generator().manual_seed(5)
    logits = torch.stack([torch.randn(5000, generator=generator) * 2.6, torch.randn(5000, generator=generator) * 0.01])
    for key in range(300):
        batch = knobs(2, temperature=[1.0, 1.0], top_k=[1000, 0], top_p=[0.7, 0.99])
        for row in batch.rows:
            row.key = common.derive_seed(key)
        together = engine.choose(batch, logits)
        batch.rows, batch.knobs = batch.rows[:1], None
        assert engine.choose(batch, logits[:1])[0] == together[0]
