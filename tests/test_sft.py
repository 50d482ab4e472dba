"""sft_causal.py's mathematics on tiny models in fp64, without an engine: losses and gradients against a slow loop over full logits, packing,
prefix attention, noise, generation."""

import json
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import bpe_tokenizer, sft_flags

import common
import sft_causal

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}


def family(name):
    """A model with weights large enough for its logits to matter, in fp64 and training mode, without dropout."""
    config = {
        "llama": lambda: transformers.LlamaConfig(**GATED, tie_word_embeddings=False),
        "llama-tied": lambda: transformers.LlamaConfig(**GATED, tie_word_embeddings=True),
        "gpt2": lambda: transformers.GPT2Config(**SIZES, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0, init_std=0.3),
        "neox": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=48, tie_word_embeddings=False),
        "bloom": lambda: transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, pad_token_id=0),
        # small caps and windows, so that both act on these short documents
        "gemma2": lambda: transformers.Gemma2Config(**GATED, head_dim=8, sliding_window=5, final_logit_softcapping=3.0, attn_logit_softcapping=5.0),
        "granite": lambda: transformers.GraniteConfig(**GATED, logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=3.0),
        "cohere": lambda: transformers.CohereConfig(**GATED, logit_scale=0.25),
    }[name]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager" if name in ("gemma2", "bloom") else "sdpa")
    assert getattr(model.config, "hidden_size", 32) == 32
    return model.double().train()


FAMILIES = ["llama", "llama-tied", "gpt2", "opt", "neox", "gemma2", "granite", "cohere"]


def some_documents(lengths=(7, 13, 3, 9, 2, 17), seed=0):
    """One to three runs of targets each, as stored; the first token is never one."""
    rng, found = np.random.default_rng(seed), []
    for length in lengths:
        is_target = rng.random(length) < 0.4
        is_target[0], is_target[-1] = False, True
        found.append(sft_causal.seal(rng.integers(3, 61, length), is_target))
    return found


def slow_losses(model, documents):
    """-log p of each target from the model's own full logits, a document at a time, a token at a time."""
    losses = []
    for document in documents:
        ids = torch.tensor([-1 - v if v < 0 else v for v in document.tolist()])
        logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
        for t in range(1, len(ids)):
            if document[t] < 0:
                losses.append(torch.logsumexp(logits[t - 1], 0) - logits[t - 1, ids[t]])
    return torch.stack(losses)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in model.parameters()]).clone()


def apart(a, b):
    return float((a - b).norm() / b.norm())


def batch_of(documents, rows=None, **options):
    return sft_causal.collate(rows or [[i] for i in range(len(documents))], documents, 0, **options)


def wrapped(model, documents=(), **changes):
    """What check_model and generate use of an engine."""
    module = sft_causal.TargetLosses(model)
    return types.SimpleNamespace(module=module, eval=module.eval, train=module.train, torch_autocast_enabled=lambda: False,
                                 zero_optimization_partition_weights=lambda: False)


def arguments(**changes):
    args = sft_causal.parse_args(["--data", "x"])
    vars(args).update(changes)
    return args


# ------------------------------------------------------------------------------------------------ losses and gradients


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_are_those_of_full_logits_in_one_chunk_and_in_several(name):
    model, documents = family(name), some_documents()
    expected = slow_losses(model, documents)
    wanted = gradient(model, expected.sum())
    for n_chunks in (1, 3, 100):  # 100: more chunks than targets
        losses = sft_causal.TargetLosses(model)(batch_of(documents), n_chunks)
        assert losses.shape == expected.shape and apart(losses.detach(), expected.detach()) < 1e-6
        assert apart(gradient(model, losses.sum()), wanted) < 1e-5


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
def test_without_its_logits_transform_a_family_is_wrong_and_check_model_refuses_it(name, monkeypatch, capsys):
    model, documents = family(name), some_documents()
    sft_causal.check_model(arguments(), wrapped(model), documents, 0, torch.device("cpu"))
    expected = slow_losses(model, documents)
    monkeypatch.setattr(sft_causal, "finish_logits", lambda config, logits: logits)
    assert apart(sft_causal.TargetLosses(model)(batch_of(documents)).detach(), expected.detach()) > 0.01
    with pytest.raises(SystemExit) as stop:
        sft_causal.check_model(arguments(), wrapped(model), documents, 0, torch.device("cpu"))
    assert stop.value.code == 2 and "does something to its logits that sft_causal.py does not know" in capsys.readouterr().err


def test_no_logits_are_computed_where_there_is_no_target_so_prompts_get_no_gradient():
    """The head sees exactly the states before targets; whatever logits a prompt had could not change the loss."""
    model, documents, seen = family("llama"), some_documents(), []
    model.lm_head.register_forward_hook(lambda head, inputs, logits: seen.append(inputs[0].detach()))
    module = sft_causal.TargetLosses(model)
    module(batch_of(documents))
    hidden = [model.model(input_ids=torch.from_numpy(sft_causal.unseal(d)[0])[None]).last_hidden_state[0].detach() for d in documents]
    expected = torch.cat([h[:-1][torch.from_numpy(d[1:] < 0)] for h, d in zip(hidden, documents)])
    assert len(seen) == 1 and seen[0].shape == expected.shape and apart(seen[0], expected) < 1e-6


def test_the_likeliest_tokens_are_counted_and_cross_entropy_keeps_its_value():
    model, documents = family("llama"), some_documents()
    expected = slow_losses(model, documents)
    with torch.no_grad():
        losses, hits = sft_causal.TargetLosses(model)(batch_of(documents), 2, True)
        slow = [int(model(input_ids=torch.from_numpy(ids)[None]).logits[0, t - 1].argmax() == ids[t]) for ids, is_target in map(sft_causal.unseal, documents)
                for t in np.flatnonzero(is_target)]
    assert apart(losses, expected.detach()) < 1e-6 and hits.tolist() == slow
    documents = [sft_causal.seal(np.array([5, int(model(input_ids=torch.tensor([[5]])).logits.argmax())]), np.array([False, True]))]
    assert sft_causal.TargetLosses(model)(batch_of(documents), 1, True)[1].tolist() == [1.0]


def test_cross_entropy_and_its_gradient_are_torchs_and_extreme_logits_stay_finite():
    torch.manual_seed(0)
    logits, targets = torch.randn(9, 17, dtype=torch.float64) * 30, torch.randint(0, 17, (9,))
    weights = torch.rand(9, dtype=torch.float64)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    mine, theirs = sft_causal.CrossEntropy.apply(a * 1, targets), torch.nn.functional.cross_entropy(b, targets, reduction="none")
    (mine * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert apart(mine.detach(), theirs.detach()) < 1e-12 and apart(a.grad, b.grad) < 1e-12
    extreme = torch.tensor([[1e4, -1e4, 0.0]])
    assert sft_causal.CrossEntropy.apply(extreme.clone(), torch.tensor([1])).tolist() == [2e4]


def test_poly_loss_has_its_closed_form_and_gradient():
    """CE + eps (1 - p)."""
    losses = torch.tensor([1e-9, 0.1, np.log(2), 3.0, 40.0], dtype=torch.float64, requires_grad=True)
    for eps in (1.0, -0.5, 2.0):
        got = sft_causal.poly_loss(losses, eps)
        assert torch.allclose(got, losses + eps * (1 - torch.exp(-losses)), rtol=1e-7, atol=0)
        grad, = torch.autograd.grad(got.sum(), losses)
        assert torch.allclose(grad, 1 + eps * torch.exp(-losses))
    assert float(sft_causal.poly_loss(torch.tensor(np.log(2)), 1.0)) == pytest.approx(np.log(2) + 0.5)


def test_no_target_at_all_gives_zero_and_no_gradient_but_calls_every_layer():
    """A rank without an example, and what the other losses are made of: sums, never a mean over nothing."""
    model, called = family("llama"), []
    model.lm_head.register_forward_hook(lambda *_: called.append(1))
    for rows, documents in (([], {}), ([[0]], [sft_causal.seal(np.array([5, 6]), np.array([False, True]))])):
        batch = sft_causal.collate(rows, documents, 0)
        for n_chunks in (1, 3):
            called.clear()
            losses = sft_causal.TargetLosses(model)(batch, n_chunks)
            found = gradient(model, (sft_causal.poly_loss(losses, 1.0).sum() * 2.0))
            assert len(called) >= n_chunks and torch.isfinite(found).all() and bool(found.any()) == bool(rows) and losses.shape == (len(rows),)


def test_losses_are_fp32_under_bf16_weights_and_fp64_under_fp64():
    """B: log-softmax of the bf16 logits in fp32, exactly."""
    model, documents = family("llama").bfloat16(), some_documents()
    batch = batch_of(documents)
    module = sft_causal.TargetLosses(model)
    losses = module(batch)
    assert losses.dtype == torch.float32
    logits = model.lm_head(module.hidden(batch).flatten(0, 1)[batch["target_index"]])
    assert logits.dtype == torch.bfloat16
    expected = torch.nn.functional.cross_entropy(logits.float(), batch["target_ids"], reduction="none")
    assert torch.allclose(losses, expected, rtol=1e-5)
    coarse = torch.nn.functional.cross_entropy(logits, batch["target_ids"], reduction="none").float()
    assert float((coarse - losses).abs().max()) > 1e-3  # what a loss in bf16 would have been
    assert sft_causal.TargetLosses(family("llama"))(batch).dtype == torch.float64


# ------------------------------------------------------------------------------------------------ packing


ROWS = [[5, 0], [1, 2, 3], [4]]  # 24, 25 and 2 tokens: padding in two of them


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2", "granite"])
def test_packed_rows_give_the_losses_and_gradients_of_single_documents(name):
    model, documents = family(name), some_documents()
    module = sft_causal.TargetLosses(model)
    alone, packed = batch_of(documents), batch_of(documents, ROWS, packed=True)
    losses, losses_packed = module(alone), module(packed)
    order = [torch.argsort(batch["target_example"], stable=True) for batch in (alone, packed)]
    assert apart(losses_packed[order[1]].detach(), losses[order[0]].detach()) < 1e-6
    assert apart(gradient(model, losses_packed.sum()), gradient(model, losses.sum())) < 1e-5


@pytest.mark.parametrize("name, attention", [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("neox", "sdpa"), ("gemma2", "eager"), ("opt", "sdpa")])
def test_changing_one_packed_document_never_changes_another(name, attention):
    """To the bit; and whether check_model sees the difference. Negative control: without position ids everything behind it changes, and so
    it does for families that leak."""
    model, documents = family(name), some_documents()
    model.set_attn_implementation(attention)
    module = sft_causal.TargetLosses(model)
    changed = list(documents)
    changed[2] = sft_causal.seal(60 - sft_causal.unseal(documents[2])[0], documents[2] < 0)
    a, b = (module.hidden(batch_of(d, [[5], [1, 2, 3]], packed=True))[1] for d in (documents, changed))
    first, last = slice(0, 13), slice(16, 25)
    assert torch.equal(a[first], b[first])
    leaks = not torch.equal(a[last], b[last])
    assert not torch.equal(a[13:16], b[13:16])
    def refused():
        with pytest.raises(SystemExit) as stop:
            sft_causal.check_model(arguments(packing=True), wrapped(model), documents, 0, torch.device("cpu"))
        assert stop.value.code == 2
    if leaks:
        refused()
    else:
        sft_causal.check_model(arguments(packing=True), wrapped(model), documents, 0, torch.device("cpu"))
    assert leaks == (name == "opt")
    module.takes_positions = False
    a, b = (module.hidden(batch_of(d, [[5], [1, 2, 3]], packed=True))[1] for d in (documents, changed))
    assert not torch.equal(a[last], b[last])


def test_a_family_that_leaks_is_refused_with_packing_and_taken_without(capsys):
    model = family("bloom")
    for packing in (False, True):
        try:
            sft_causal.check_model(arguments(packing=packing), wrapped(model), some_documents(), 0, torch.device("cpu"))
            assert not packing
        except SystemExit as stop:
            assert packing and stop.code == 2
    assert "--packing: a bloom" in capsys.readouterr().err and model.training


def test_positions_that_do_not_restart_are_refused_where_they_are_learnt(monkeypatch):
    """GPT-2: separate attention is not enough."""
    real = sft_causal.collate
    def running(rows, documents, pad_id, packed=False, *options):
        batch = real(rows, documents, pad_id, packed, *options)
        if packed:  # restarts, but not at 0
            batch["position_ids"] = torch.where(batch["position_ids"] < 0, 0, batch["position_ids"] + 7 * (torch.arange(batch["input_ids"].shape[1]) >= 14))
        return batch
    monkeypatch.setattr(sft_causal, "collate", running)
    with pytest.raises(SystemExit):
        sft_causal.check_model(arguments(packing=True), wrapped(family("gpt2")), some_documents(), 0, torch.device("cpu"))


@pytest.mark.parametrize("name, kernel", [("gpt2", "flex_attention"), ("gemma2", "sdpa"), ("bloom", "sdpa")])
def test_a_kernel_that_a_family_lacks_is_refused_not_ignored(name, kernel, capsys):
    """transformers raises for the first two and keeps what it has for the third."""
    model = family(name)
    with pytest.raises(SystemExit) as stop:
        sft_causal.set_attention(model, kernel)
    assert stop.value.code == 2 and f"--attention {kernel}: not for a {model.config.model_type}" in capsys.readouterr().err
    sft_causal.set_attention(model, "eager")


# ------------------------------------------------------------------------------------------------ noise, prefix attention


def test_neftune_noise_has_its_size_per_document_packed_or_not_and_none_at_evaluation(monkeypatch):
    """Uniform in +- alpha / sqrt(tokens x D)."""
    model, documents = family("llama"), some_documents()
    module = sft_causal.TargetLosses(model, neftune_alpha=5.0)
    embed, seen = model.get_input_embeddings(), []
    model.model.layers[0].register_forward_pre_hook(lambda layer, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).detach()),
                                                    with_kwargs=True)
    for rows in ([[i] for i in range(6)], ROWS):
        batch = batch_of(documents, rows, packed=rows is ROWS, noise=True)
        largest, everything = {}, []
        for seed in range(40):
            torch.manual_seed(seed)
            seen.clear()
            module.hidden(batch)
            noise = (seen[0] - embed.weight[batch["input_ids"]].detach())
            for r, row in enumerate(rows):
                t = 0
                for i in row:
                    part = noise[r, t: t + len(documents[i])]
                    bound = 5.0 / (len(documents[i]) * 32) ** 0.5
                    assert float(part.abs().max()) <= bound * (1 + 1e-9)
                    largest[i] = max(largest.get(i, 0), float(part.abs().max()) / bound)
                    everything.append(part.flatten() / bound)
                    t += len(documents[i])
        assert min(largest.values()) > 0.98
        everything = torch.cat(everything)
        assert abs(float(everything.mean())) < 0.01 and float((everything ** 2).mean()) == pytest.approx(1 / 3, abs=0.01)
    module.eval()
    seen.clear()
    module.hidden(batch)
    assert torch.equal(seen[0], embed.weight[batch["input_ids"]])


def prompt_and_reply():
    """Two documents of a prompt of 6 or 4 tokens and a reply of 4 or 5, and a copy of the first whose k-th token is another one."""
    ids = [np.arange(10, 20), np.arange(30, 39)]
    documents = [sft_causal.seal(ids[0], np.arange(10) >= 6), sft_causal.seal(ids[1], np.arange(9) >= 4)]
    def changed(k):
        other = ids[0].copy()
        other[k] = 50
        return [sft_causal.seal(other, np.arange(10) >= 6), documents[1]]
    return documents, changed


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("packed", [False, True])
def test_prefix_attention_is_two_way_in_the_prompt_and_causal_in_the_reply(attention, packed):
    model, (documents, changed) = family("llama"), prompt_and_reply()
    model.set_attn_implementation(attention)
    module = sft_causal.TargetLosses(model)
    rows = [[0, 1]] if packed else [[0], [1]]
    def states(documents, prefix=True):
        hidden = module.hidden(sft_causal.collate(rows, documents, 0, packed, prefix)).detach()
        return (hidden[0, :10], hidden[0, 10:19]) if packed else (hidden[0], hidden[1, :9])
    first, second = states(documents)
    for k in range(10):
        other, unconcerned = states(changed(k))
        assert torch.equal(unconcerned, second)  # packed or not, another document is another document
        differ = [not torch.equal(a, b) for a, b in zip(first, other)]
        assert differ == [t >= k or k < 6 and t < 6 for t in range(10)], k
    causal, _ = states(documents, prefix=False)
    assert apart(causal, first) > 0.01  # negative control: the ordinary mask sees otherwise


def test_prefix_attention_is_the_same_in_both_kernels_packed_and_single_and_passes_the_start_check():
    model, (documents, _) = family("llama"), prompt_and_reply()
    module, found = sft_causal.TargetLosses(model), []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        for rows, packed in (([[0], [1]], False), ([[1, 0]], True)):
            batch = sft_causal.collate(rows, documents, 0, packed, True)
            found.append(module(batch).detach()[torch.argsort(batch["target_example"], stable=True)])
        sft_causal.check_model(arguments(packing=True, bidirectional_prompt=True), wrapped(model), documents, 0, torch.device("cpu"))
    assert all(apart(losses, found[0]) < 1e-6 for losses in found)


# ------------------------------------------------------------------------------------------------ generation, evaluation


def generating(name="llama", **changes):
    """(args, engine, tokenizer) with a model over the fixture's tokenizer, whose pad token is its end token, as in many chat models."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe_tokenizer().backend_tokenizer, pad_token="</s>", bos_token="<s>", eos_token="</s>")
    sizes = {**(GATED if name == "llama" else SIZES), "vocab_size": len(tokenizer), "max_position_embeddings": 128}
    config = {"llama": transformers.LlamaConfig, "gpt2": transformers.GPT2Config, "neox": transformers.GPTNeoXConfig}[name](**sizes)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    sft_causal.set_stop_ids(model.generation_config, tokenizer, [2])
    return arguments(**{"max_new_tokens": 12, "temperature": 0.0, "eval_batch_size": 16, "seed": 0, **changes}), wrapped(model), tokenizer


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("temperature, n_samples", [(0.0, 1), (1.3, 3)])
def test_replies_do_not_depend_on_the_batch_and_padding_is_never_seen(name, temperature, n_samples):
    """Prompts of 1 to 40 tokens, some of which hold the padding's id. Greedy ones against a slow loop over full forward passes."""
    rng = np.random.default_rng(0)
    prompts = [np.concatenate([[1], np.where(rng.random(n) < 0.2, 2, rng.integers(3, 280, n))]) for n in (1, 3, 7, 12, 12, 25, 39)]
    found = {}
    for size in (1, 3, 16):
        args, engine, tokenizer = generating(name, temperature=temperature, n_samples=n_samples, eval_batch_size=size * n_samples)
        found[size] = sft_causal.generate(args, engine, tokenizer, list(enumerate(prompts)), [2], 5, torch.device("cpu"))
        assert sorted(found[size]) == list(range(7)) and {len(texts) for texts in found[size].values()} == {n_samples}
    assert found[1] == found[3] == found[16]
    if n_samples > 1:
        assert len({tuple(texts) for texts in found[1].values()}) == 7 and any(len(set(texts)) > 1 for texts in found[1].values())
        assert sft_causal.generate(args, engine, tokenizer, list(enumerate(prompts)), [2], 6, torch.device("cpu")) != found[16]  # another step
        twins = sft_causal.generate(args, engine, tokenizer, [(3, prompts[3]), (8, prompts[3])], [2], 5, torch.device("cpu"))
        assert twins[3] == found[16][3] != twins[8]  # the same question in another row
    else:
        for i, prompt in enumerate(prompts):
            ids = prompt.tolist()
            with torch.no_grad():
                while len(ids) < len(prompt) + 12 and (len(ids) == len(prompt) or ids[-1] != 2):
                    ids.append(int(engine.module.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            assert found[1][i] == [tokenizer.decode(ids[len(prompt):], skip_special_tokens=True)]


def test_a_mask_made_from_ids_would_be_seen():
    """Negative control of the test above: hiding tokens by their id changes the replies to prompts that hold the padding's id."""
    args, engine, tokenizer = generating(eval_batch_size=1)
    prompt = np.array([1, 270, 2, 2, 2, 30, 40, 2, 2])
    right = sft_causal.generate(args, engine, tokenizer, [(0, prompt)], [2], 0, torch.device("cpu"))
    model, real = engine.module.model, engine.module.model.generate
    model.generate = lambda input_ids, attention_mask, **options: real(input_ids=input_ids, attention_mask=(input_ids != 2).long(), **options)
    assert sft_causal.generate(args, engine, tokenizer, [(0, prompt)], [2], 0, torch.device("cpu")) != right


def test_stop_ids_hold_the_end_of_a_turn_and_never_the_padding(tmp_path):
    """C6, for the three ways in which pad, end of turn and end token can coincide."""
    tokenizer = bpe_tokenizer()
    for pad, end, stop_ids, pad_id in (("<pad>", "</s>", [2], 0), ("</s>", "</s>", [2], None), ("</s>", "<s>", [1], 2), ("<pad>", "<s>", [1, 2], 0)):
        mine = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token=pad, bos_token="<s>", eos_token="</s>")
        generation = transformers.GenerationConfig(temperature=0.7)
        found = sft_causal.stop_ids_of(mine, end)
        sft_causal.set_stop_ids(generation, mine, found)
        assert (found, generation.eos_token_id, generation.pad_token_id) == (stop_ids, stop_ids, pad_id)
        generation.save_pretrained(tmp_path)  # refuses what contradicts itself


def test_perplexity_of_an_untrained_model_is_about_its_vocabulary():
    model = family("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
        loss = sft_causal.TargetLosses(model)(batch_of(some_documents())).mean()
    assert float(loss) == pytest.approx(np.log(61), abs=0.01)


def test_operations_of_a_step_count_the_head_for_targets_only():
    model = family("llama")
    body = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    assert sft_causal.train_flops(model, 0, 10) == 6 * 10 * 61 * 32
    assert sft_causal.train_flops(model, 7, 0) == pytest.approx(6 * 7 * body, rel=1e-6)


def test_results_are_appended_and_another_tables_columns_are_left_alone(tmp_path):
    args, run = arguments(model_init_name="m", seed=3), tmp_path / "models" / "a run"
    path = tmp_path / "out" / "results.csv"
    for step in (1, 2):
        sft_causal.write_results(path, run, arguments(write_results=str(path), data_name=["d"], model_init_name="m", seed=3), step,
                                 {"eval/loss": 0.5, "eval/eval_seconds": 1.0, "eval/peak_memory_gb": 2})
    assert path.read_text().splitlines() == ["run,model,data,seed,step,eval/loss", "a run,m,d,3,1,0.5", "a run,m,d,3,2,0.5"]
    before = path.read_bytes()
    for loss in (0.1, 0.2):
        sft_causal.write_results(path, run, arguments(write_results=str(path), data_name=["d"], model_init_name="m", seed=3), 3, {"test/loss": loss})
    assert path.read_bytes() == before
    assert (tmp_path / "out" / "results.2.csv").read_text().splitlines() == ["run,model,data,seed,step,test/loss", "a run,m,d,3,3,0.1", "a run,m,d,3,3,0.2"]
