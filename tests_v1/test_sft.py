"""sft_causal.py: losses, gradients, packing and masks against slow references; generation. Models are made on the spot."""

import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import bpe_tokenizer
from transformers import PreTrainedTokenizerFast

import common_v1 as common
import sft_causal

V = 300
SMALL = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 128, "initializer_range": 0.1}
FAMILIES = {
    "llama": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama-tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "neox": transformers.GPTNeoXConfig(**SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1),
    "gemma2": transformers.Gemma2Config(**{**LLAMA, "num_attention_heads": 4}, head_dim=8, sliding_window=5, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "granite": transformers.GraniteConfig(**LLAMA, logits_scaling=3.0),
    "cohere": transformers.CohereConfig(**LLAMA, logit_scale=0.3),
    "opt": transformers.OPTConfig(**SMALL, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
                                  word_embed_proj_dim=32, init_std=0.1, dropout=0.0),
}
PACKABLE = ["llama", "gpt2", "neox", "gemma2", "granite", "cohere"]


def make(name, dtype=torch.float64):
    torch.manual_seed(0)
    return sft_causal.TargetLosses(transformers.AutoModelForCausalLM.from_config(FAMILIES[name]).to(dtype))


def documents(n=7, seed=0):
    """Ragged documents with several runs of targets, as `seal` stores them."""
    rng, found = np.random.default_rng(seed), []
    for i in range(n):
        length = int(rng.integers(4, 30))
        is_target = rng.random(length) < 0.4
        is_target[:2], is_target[-1] = False, True
        found.append(sft_causal.seal(rng.integers(3, V, length), is_target))
    return found


def slow_loss(model, row):
    """Sum of the cross entropy of the targets of one document, from the model's own whole logits."""
    ids, is_target = sft_causal.unseal(row)
    logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0]
    return F.cross_entropy(logits[:-1][is_target[1:]], torch.from_numpy(ids)[1:][is_target[1:]], reduction="sum")


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def apart(a, b):
    """Relative distance in norm; some families compute parts in fp32 whatever their weights are."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradient_are_those_of_the_models_own_whole_logits(name):
    """Padded rows, one chunk and several; a mask that is off by one would be seen."""
    module, rows = make(name), documents()
    wanted = sum(slow_loss(module.model, row) for row in rows)
    wanted_gradient = gradient(module.model, wanted)
    batch = sft_causal.collate([[i] for i in range(len(rows))], rows, 0)
    for n_chunks in (1, 3):
        losses = module(batch, n_chunks)
        assert losses.dtype == torch.float64 and losses.shape == batch["target_ids"].shape
        assert losses.sum().item() == pytest.approx(wanted.item(), rel=1e-7)
        assert apart(gradient(module.model, losses.sum()), wanted_gradient) < 1e-6
    shifted = {**batch, "target_index": batch["target_index"] + 1}
    shifted["target_index"][-1] -= 1
    assert module(shifted).sum().item() != pytest.approx(wanted.item(), rel=1e-3)


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_rows_give_the_losses_and_gradients_of_the_documents_one_by_one(name):
    """Sliding windows (Gemma 2) and learned positions (GPT-2) included; without restarting positions the loss is another."""
    module, rows = make(name), documents()
    lengths = np.array([len(row) for row in rows])
    packed = sft_causal.collate(sft_causal.best_fit(np.arange(len(rows)), lengths, 60), rows, 0, packed=True)
    assert len(packed["input_ids"]) < len(rows) - 2
    wanted = sum(slow_loss(module.model, row) for row in rows)
    losses = module(packed).sum()
    assert losses.item() == pytest.approx(wanted.item(), rel=1e-7)
    assert apart(gradient(module.model, losses), gradient(module.model, wanted)) < 1e-6
    leaking = {name: tensor for name, tensor in packed.items() if name != "position_ids"}
    assert module(leaking).sum().item() != pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("name", PACKABLE)
def test_changing_one_packed_document_never_changes_anothers_states(name):
    module, rows = make(name, torch.float32), documents(3)
    other = [sft_causal.seal(sft_causal.unseal(rows[0])[0][::-1], rows[0] < 0), *rows[1:]]
    with torch.no_grad():
        a, b = (module.hidden(sft_causal.collate([[0, 1, 2]], some, 0, packed=True)) for some in (rows, other))
    n = len(rows[0])
    assert torch.equal(a[:, n:], b[:, n:]) and not torch.equal(a[:, :n], b[:, :n])


def check(module, packing, bidirectional=False):
    """check_model with a stand-in for the engine -> exit code, 0 where it is content."""
    engine = types.SimpleNamespace(module=module, eval=module.eval, train=module.train, torch_autocast_enabled=lambda: False)
    args = types.SimpleNamespace(packing=packing, bidirectional_prompt=bidirectional)
    try:
        sft_causal.check_model(args, engine, documents(), 0, torch.device("cpu"))
    except SystemExit as stop:
        return stop.code
    assert module.training  # as it was: with dropout
    return 0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_check_at_the_start_lets_families_pass_that_pack_and_refuses_opt(name, capsys):
    module = make(name, torch.float32)
    assert check(module, False) == 0
    assert check(module, True) == (0 if name in [*PACKABLE, "llama-tied"] else 2)
    if name == "opt":
        assert "does not keep the documents of a row apart" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
def test_the_check_at_the_start_refuses_a_transform_of_the_logits_that_is_not_known(name, monkeypatch, capsys):
    monkeypatch.setattr(common, "finish_logits", lambda config, logits: logits)
    assert check(make(name, torch.float32), False) == 2
    assert "does something to its logits" in capsys.readouterr().err


@pytest.mark.parametrize("name, kernel", [("gpt2", "flex_attention"), ("gemma2", "sdpa"), ("bloom", "sdpa")])
def test_a_kernel_that_a_family_lacks_is_refused_not_ignored(name, kernel, capsys):
    """transformers raises for the first two and, with a warning, keeps what it has for the third."""
    config = FAMILIES.get(name) or transformers.BloomConfig(vocab_size=V, hidden_size=32, n_layer=1, n_head=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(SystemExit) as stop:
        sft_causal.set_attention(model, kernel)
    assert stop.value.code == 2 and f"--attention {kernel}: not for a {model.config.model_type}" in capsys.readouterr().err
    sft_causal.set_attention(model, "eager")


def test_positions_that_do_not_restart_are_refused_where_they_are_learnt(monkeypatch):
    """GPT-2: documents that are kept apart are not enough."""
    real = sft_causal.collate

    def running(rows, documents, pad_id, packed=False, *options):
        batch = real(rows, documents, pad_id, packed, *options)
        if packed:  # from the second document on they start at 7
            batch["position_ids"] += 7 * (torch.arange(batch["input_ids"].shape[1]) >= 14)
        return batch
    assert check(make("gpt2", torch.float32), True) == 0
    monkeypatch.setattr(sft_causal, "collate", running)
    assert check(make("gpt2", torch.float32), True) == 2


def test_a_forward_step_without_targets_or_documents_has_loss_0_and_gradient_0():
    module = make("llama")
    losses = module(sft_causal.collate([], {}, 0))
    assert losses.shape == (0,) and losses.sum().item() == 0.0
    assert not gradient(module.model, losses.sum()).any()


def test_losses_are_fp32_under_bf16_weights():
    module = make("llama", torch.bfloat16)
    batch = sft_causal.collate([[0], [1]], documents(2), 0)
    losses = module(batch, 2)
    logits = module.model.lm_head(module.hidden(batch).flatten(0, 1)[batch["target_index"]])
    assert losses.dtype == torch.float32 and logits.dtype == torch.bfloat16
    assert torch.allclose(losses, F.cross_entropy(logits.float(), batch["target_ids"], reduction="none"), rtol=1e-4)
    assert (F.cross_entropy(logits, batch["target_ids"], reduction="none").float() - losses).abs().max() > 1e-3  # what bf16 would give


def test_hits_are_where_the_likeliest_token_is_the_target():
    module, rows = make("llama"), documents()
    batch = sft_causal.collate([[i] for i in range(len(rows))], rows, 0)
    with torch.no_grad():
        logits = module.model(input_ids=batch["input_ids"]).logits.flatten(0, 1)[batch["target_index"]]
        targets = logits.argmax(1)
        targets[::2] = (targets[::2] + 1) % V
        losses, hits = module({**batch, "target_ids": targets}, 2, True)
    assert hits.tolist() == [i % 2 for i in range(len(targets))]
    assert torch.allclose(losses, F.cross_entropy(logits, targets, reduction="none"))


def test_only_targets_get_gradient_from_the_loss():
    """The gradient with respect to the hidden states is zero at all other positions."""
    module, rows = make("llama"), documents(3)
    batch, kept = sft_causal.collate([[0], [1], [2]], rows, 0), []
    real = module.hidden
    module.hidden = lambda batch: kept.append(real(batch)) or kept[0].retain_grad() or kept[0]
    module(batch).sum().backward()
    touched = kept[0].grad.flatten(0, 1).abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == sorted(batch["target_index"].tolist())


def test_poly_loss_is_the_closed_form():
    losses = torch.tensor([math.log(2), 0.0, 3.0], dtype=torch.float64)
    assert sft_causal.poly_loss(losses, 1.0).tolist() == pytest.approx([math.log(2) + 0.5, 0.0, 3.0 + 1 - math.exp(-3)])
    assert torch.equal(sft_causal.poly_loss(losses, 0.0), losses)


def test_cross_entropy_is_torchs_in_value_and_gradient():
    torch.manual_seed(0)
    logits = torch.randn(9, 50, dtype=torch.float64) * 5
    targets, weight = torch.randint(50, (9,)), torch.rand(9, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    a = sft_causal.CrossEntropy.apply(ours * 1.0, targets)
    b = F.cross_entropy(theirs, targets, reduction="none")
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    assert torch.allclose(a, b) and torch.allclose(ours.grad, theirs.grad)
    extreme = torch.tensor([[1e4, -1e4, 0.0]])
    assert sft_causal.CrossEntropy.apply(extreme.clone(), torch.tensor([1])).tolist() == [2e4]


def test_neftune_noise_has_the_papers_size_whatever_the_row_and_is_off_at_evaluation():
    """Each document's embeddings move by at most alpha / sqrt(L D), also beside a longer document in a packed row."""
    torch.manual_seed(0)
    module = sft_causal.TargetLosses(transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]), neftune_alpha=5.0)
    rows, seen = documents(2), []
    module.model.get_input_embeddings().register_forward_hook(lambda module, inputs, embedded: seen.append(embedded.detach()))
    batch = sft_causal.collate([[0, 1]], rows, 0, packed=True, noise=True)
    module.train().hidden(batch)
    module.eval().hidden(batch)
    clean = module.model.get_input_embeddings().weight.detach()[batch["input_ids"]]
    assert torch.equal(seen[1], clean)
    moved, start = (seen[0] - clean).abs(), 0
    for row in rows:
        limit = 5.0 / math.sqrt(len(row) * 32)
        largest = moved[0, start: start + len(row)].max().item()
        assert 0.9 * limit < largest <= limit * (1 + 1e-5)
        assert (seen[0] - clean)[0, start: start + len(row)].min().item() < -0.9 * limit  # both ways
        start += len(row)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_bidirectional_prompt_sees_itself_both_ways_and_replies_stay_causal(packed, kernel):
    module = make("llama")
    module.model.set_attn_implementation(kernel)
    ids = np.arange(10, 22)
    two = [sft_causal.seal(ids, np.arange(12) >= 6), sft_causal.seal(ids + 50, np.arange(12) >= 8)]

    def states(row, position):
        """Hidden states of both documents when one token of the first is another one."""
        changed = two[0].copy()
        if position is not None:
            changed[position] = sft_causal.seal(np.array([99]), np.array([position >= 6]))[0]
        with torch.no_grad():
            batch = sft_causal.collate([[0, 1]] if packed else [[0], [1]], [changed, two[1]], 0, packed, prefix=True)
            return module.hidden(batch).reshape(2, 12, -1)[row]
    before = states(0, None)
    differs = [(states(0, t) - before).abs().amax(1) > 1e-9 for t in (4, 8)]
    assert differs[0][:6].all()  # a later token of the prompt reaches the earlier ones
    assert not differs[1][:8].any() and differs[1][8:].all()  # a later token of the reply does not
    assert torch.equal(states(1, 4), states(1, None))
    causal = module.hidden({name: tensor for name, tensor in sft_causal.collate([[0]], two, 0).items()})
    assert not torch.allclose(causal[0], before)
    assert check(make("llama", torch.float32), packed, bidirectional=True) == 0


# ------------------------------------------------------------------------------------------------ rows


def test_best_fit_keeps_every_document_whole_and_every_row_within_its_capacity():
    rng = np.random.default_rng(0)
    assert sft_causal.best_fit(np.arange(4), np.array([5, 4, 3, 2]), 7) == [[0, 3], [1, 2]]
    for _ in range(20):
        lengths = rng.integers(1, 50, 40)
        ids = rng.permutation(40)[:30]
        rows = sft_causal.best_fit(ids, lengths, 50)
        assert sorted(i for row in rows for i in row) == sorted(ids.tolist()) and all(lengths[row].sum() <= 50 for row in rows)
        assert len(rows) <= -(-int(lengths[ids].sum()) // 50) * 1.25 + 1  # far from one document per row
        for sparse in (False, True):
            packed = sft_causal.pack(ids, lengths, 200, 64, sparse)
            assert sorted(i for row in packed for i in row) == sorted(ids.tolist()) and max(lengths[row].sum() for row in packed) <= 200
        assert len(sft_causal.pack(ids, lengths, 200, 64, True)) <= len(sft_causal.pack(ids, lengths, 200, 64, False))
    assert sft_causal.pack(np.empty(0, int), lengths, 100, 64, False) == []


def test_collate_shifts_once_and_restarts_positions_with_each_document_and_the_padding():
    a, b = sft_causal.seal(np.array([1, 5, 6, 7]), np.array([0, 0, 1, 1], bool)), sft_causal.seal(np.array([1, 8]), np.array([0, 1], bool))
    batch = sft_causal.collate([[0, 1], [1]], [a, b], 9, packed=True, prefix=True)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, 1, 8], [1, 8, 9, 9, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]]
    assert batch["target_index"].tolist() == [1, 2, 4, 6] and batch["target_ids"].tolist() == [6, 7, 8, 8]
    assert batch["target_example"].tolist() == [0, 0, 1, 1]
    assert batch["document"].tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 0, 0, 0, 0]]
    assert batch["is_prompt"].tolist() == [[True, True, False, False, True, False], [True, False, False, False, False, False]]


# ------------------------------------------------------------------------------------------------ generation


def replies(prompts, batch_size, pad="<pad>", **changes):
    """{row: texts} of sft_causal.generate on one rank."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe_tokenizer().backend_tokenizer, pad_token=pad, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**LLAMA, "vocab_size": 283}, tie_word_embeddings=False)).eval()
    engine = types.SimpleNamespace(module=types.SimpleNamespace(model=model), torch_autocast_enabled=lambda: False,
                                   zero_optimization_partition_weights=lambda: False)
    args = types.SimpleNamespace(**{"eval_batch_size": batch_size, "n_samples": 1, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12, "seed": 0,
                                    "zero3_generation": "auto", **changes})
    return sft_causal.generate(args, engine, tokenizer, list(enumerate(prompts)), [2], 3, torch.device("cpu"))


def slow_reply(prompt):
    """12 tokens, or up to the end token: the likeliest one each time."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**LLAMA, "vocab_size": 283}, tie_word_embeddings=False)).eval()
    ids = prompt.tolist()
    with torch.no_grad():
        while len(ids) < len(prompt) + 12 and (len(ids) == len(prompt) or ids[-1] != 2):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return bpe_tokenizer().decode(ids[len(prompt):], skip_special_tokens=True)


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.8, "n_samples": 2, "top_p": 0.9}])
def test_left_padded_generation_in_any_batch_is_that_of_each_prompt_alone(changes):
    """Greedy and sampled; the end token's id is not masked away inside a prompt, though padding may have it."""
    prompts = [np.array([1, 5, 2, 9]), np.array([1, 7]), np.array([1, *range(10, 40)]), np.array([1, 2, 2]), np.array([1, 60, 61, 62, 63])]
    alone = replies(prompts, 1, **changes)
    assert alone == replies(prompts, 8, **changes) == replies(prompts, 2, **changes)
    assert len({text for texts in alone.values() for text in texts}) > len(prompts) - 2
    if changes:
        assert alone != replies(prompts, 8, **{**changes, "seed": 1})
        twins = replies([prompts[0], prompts[0]], 8, **changes)
        assert twins[0] == alone[0] != twins[1]  # the same question in another row
    else:  # a slow loop over whole forward passes, without cache or padding
        assert alone == {i: [slow_reply(prompt)] for i, prompt in enumerate(prompts)}
    assert alone == replies(prompts, 8, pad="</s>", **changes)


def test_stop_ids_name_the_end_of_a_turn_and_never_the_padding():
    tokenizer = bpe_tokenizer()
    for pad, end, eos, wanted, pad_id in [("<pad>", "</s>", "</s>", [2], 0), ("</s>", "</s>", "</s>", [2], None), ("</s>", "<pad>", "</s>", [0], 2)]:
        some = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token=pad, bos_token="<s>", eos_token=eos)
        generation = transformers.GenerationConfig(temperature=0.6)
        stop_ids = sft_causal.stop_ids_of(some, end)
        sft_causal.set_stop_ids(generation, some, stop_ids)
        assert stop_ids == generation.eos_token_id == wanted and generation.pad_token_id == pad_id
        generation.validate(strict=True)


def test_train_flops_count_frozen_weights_less():
    module = make("llama")
    full = sft_causal.train_flops(module.model, 100, 10)
    body = sum(p.numel() for name, p in module.model.named_parameters() if "embed" not in name and "lm_head" not in name)
    assert full == 6 * body * 100 + 6 * V * 32 * 10
    module.model.requires_grad_(False)
    assert sft_causal.train_flops(module.model, 100, 10) == 4 * body * 100 + 4 * V * 32 * 10
    assert common.flops_per_token(module.model.base_model, "embed") == 4 * body
