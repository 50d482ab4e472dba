"""clf.py: scores, losses and gradients against slow references written out by hand; that it learns. Runs are short."""

import itertools
import json
import math
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import clf_flags, rows, write_byt5, write_llama
from transformers import T5Config, T5ForConditionalGeneration

import clf
import common_v1 as common

pytestmark = pytest.mark.usefixtures("no_pictures")
SMALL_T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
            "decoder_start_token_id": 0}
NO_YES = [17, 90]
FAMILIES = ["t5 v1.0", "t5 v1.1", "byt5", "bart", "llama", "gpt2"]


def small_model(family):
    """(model, 8 ragged texts as token ids, [id of no, id of yes]) of one family, the same every time."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    texts = [torch.randint(5, 128, (n,), generator=g).tolist() for n in (7, 1, 20, 3, 12, 2, 9, 16)]
    if family == "byt5":  # "yes" is three bytes, so the answers are y and n
        tokenizer = transformers.ByT5Tokenizer()
        model = T5ForConditionalGeneration(T5Config(**{**SMALL_T5, "vocab_size": 384}, feed_forward_proj="gated-gelu"))
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        layout = types.SimpleNamespace(family="seq2seq", template="{input}", positive_word="y", negative_word="n")
        no_yes = clf.verbaliser(tokenizer, layout, problems := [])
        assert problems == [] and no_yes == [ord("n") + 3, ord("y") + 3]
        return model.eval(), tokenizer([f"text {'é' * k}" for k in range(8)]).input_ids, no_yes
    if family == "t5 v1.0":
        model = T5ForConditionalGeneration(T5Config(**SMALL_T5))
    elif family == "t5 v1.1":
        model = T5ForConditionalGeneration(T5Config(**SMALL_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                                                    scale_decoder_outputs=False))
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    elif family == "bart":
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(
            vocab_size=128, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, init_std=0.2, decoder_start_token_id=2, pad_token_id=1))
        model.final_logits_bias = torch.randn(1, 128)
    elif family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, initializer_range=0.2))
    elif family == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return model.eval(), texts, NO_YES


def full_logits(model, texts, side="right"):
    """(R, V) logits of the answer by the model's own forward, on a batch padded on one side; with a mask and positions."""
    config, width = model.config, max(map(len, texts))
    pads = [[config.pad_token_id or 0] * (width - len(text)) for text in texts]
    ids = torch.tensor([text + pad if side == "right" else pad + text for text, pad in zip(texts, pads)])
    ones = [[1] * len(text) for text in texts]
    mask = torch.tensor([one + [0] * len(pad) if side == "right" else [0] * len(pad) + one for one, pad in zip(ones, pads)])
    if config.is_encoder_decoder:
        start = torch.full((len(texts), 1), config.decoder_start_token_id)
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=start).logits[:, 0]
    logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    last = torch.tensor([len(text) - 1 for text in texts]) if side == "right" else torch.full((len(texts),), width - 1)
    return logits[torch.arange(len(texts)), last]


def log_probabilities(model, texts, no_yes, side="right"):
    """(R, 2) log P(no), log P(yes): the softmax over the pair, out of all V logits."""
    return torch.log_softmax(full_logits(model, texts, side)[:, no_yes], -1)


def scores_in_batches(yes_no, texts, size):
    batches = [clf.collate(texts[i: i + size], yes_no.model.config.pad_token_id or 0) for i in range(0, len(texts), size)]
    return torch.cat([yes_no(batch["input_ids"], batch["lengths"]) for batch in batches])


def gradients(model):
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def largest_difference(a, b):
    """Largest difference of two gradients, against the largest entry."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a) / max(float(b[k].abs().max()) for k in b)


TARGETS = [0.0, 1.0, 0.3, 0.5, 1.0, 0.75, 0.0, 0.1]


# ------------------------------------------------------------------------------------------------ scores and gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_score_is_the_softmax_over_the_pair_of_all_logits_in_any_batch_and_padding(family):
    model, texts, no_yes = small_model(family)
    with torch.no_grad():
        alone = torch.cat([log_probabilities(model, [text], no_yes) for text in texts])
        padded = {side: log_probabilities(model, texts, no_yes, side) for side in ("right", "left")}
        yes_no = clf.YesNo(model, no_yes)
        found = {size: scores_in_batches(yes_no, texts, size) for size in (1, 3, 8)}
    if family == "bart":
        del padded["left"]  # its learnt positions start at the padding
    for logit in found.values():
        for expected in (alone, *padded.values()):
            assert torch.allclose(logit.sigmoid(), expected[:, 1].exp(), atol=1e-5, rtol=0)
            assert torch.allclose(logit, expected[:, 1] - expected[:, 0], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(logit.sigmoid(), alone[:, 0].exp(), atol=1e-2)  # not: no against yes
        assert not torch.allclose(logit.sigmoid(), alone.flip(0)[:, 1].exp(), atol=1e-3)  # the texts have scores of their own


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["cross_entropy", "squared_error", "pairwise"])
def test_gradient_of_a_batch_equals_plain_autograd_one_text_at_a_time(family, kind):
    model, texts, no_yes = small_model(family)
    if kind == "pairwise":
        pairs = [(0, 1, 1.0), *((a, b, 1 / 3) for a, b in ((2, 3), (2, 4), (3, 4), (5, 6), (5, 7), (6, 7)))]
        for better, worse, weight in pairs:
            logp = [log_probabilities(model, [texts[i]], no_yes)[0] for i in (better, worse)]
            a, b = (p[1] - p[0] for p in logp)
            (-weight * torch.log(torch.sigmoid(a - b))).backward()
        batch = clf.collate_pairs([2, 3, 3])
    else:
        for text, target in zip(texts, TARGETS):
            logp = log_probabilities(model, [text], no_yes)[0]
            loss = -((1 - target) * logp[0] + target * logp[1]) if kind == "cross_entropy" else (logp[1].exp() - target) ** 2
            loss.backward()
        batch = {"target": torch.tensor(TARGETS, dtype=torch.float64), "weight": torch.ones(8, dtype=torch.float64)}
    expected = gradients(model)
    yes_no = clf.YesNo(model, no_yes)
    clf.batch_loss(scores_in_batches(yes_no, texts, 8), batch, kind).backward()
    assert largest_difference(gradients(model), expected) < 1e-5
    clf.batch_loss(-scores_in_batches(yes_no, texts, 8), batch, kind).backward()
    assert largest_difference(gradients(model), expected) > 1e-2


@pytest.mark.parametrize("family", ["t5 v1.0", "t5 v1.1"])
def test_t5_scores_are_by_hand_from_the_hidden_state_scaled_only_where_the_head_is_tied(family):
    model, texts, no_yes = small_model(family)
    is_tied = model.lm_head.weight is model.shared.weight
    assert is_tied == (family == "t5 v1.0")
    with torch.no_grad():
        encoded = [model.encoder(input_ids=torch.tensor([text])).last_hidden_state for text in texts]
        hidden = torch.cat([model.decoder(input_ids=torch.tensor([[0]]), encoder_hidden_states=e).last_hidden_state[:, 0] for e in encoded])
        head = model.lm_head.weight
        logit = hidden @ (head[no_yes[1]] - head[no_yes[0]])
        found = scores_in_batches(clf.YesNo(model, no_yes), texts, 8)
    scaled = logit * 32**-0.5
    assert torch.allclose(found, scaled if is_tied else logit, atol=1e-5) and not torch.allclose(found, logit if is_tied else scaled, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_two_columns_of_the_head_are_computed(family):
    model, texts, no_yes = small_model(family)
    widths = []
    yes_no = clf.YesNo(model, no_yes)
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: widths.append(output.shape[-1]))
    scores_in_batches(yes_no, texts, 8)
    assert widths == [2]


def test_scores_of_a_bf16_model_are_computed_in_fp32():
    """A bf16 logit difference has at most 256 values between two powers of two."""
    model, texts, no_yes = small_model("t5 v1.0")
    found = scores_in_batches(clf.YesNo(model.bfloat16(), no_yes), texts, 8)
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
    assert scores_in_batches(clf.YesNo(model.double(), no_yes), texts, 8).dtype == torch.float64


def test_a_model_that_was_wrapped_is_saved_with_its_whole_head(tmp_path):
    model, texts, no_yes = small_model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        expected = full_logits(model, texts)
        clf.YesNo(model, no_yes).model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(full_logits(again, texts), expected) and again.state_dict().keys() == before.keys()


# ------------------------------------------------------------------------------------------------ losses


def test_losses_are_the_formulas_of_the_docs():
    logit, target = torch.tensor([-3.0, 0.0, 0.2, 5.0], dtype=torch.float64), torch.tensor([0.0, 1.0, 0.25, 0.7], dtype=torch.float64)
    p = [1 / (1 + math.exp(-z)) for z in logit.tolist()]
    expected = {"cross_entropy": [-(t * math.log(q) + (1 - t) * math.log(1 - q)) for q, t in zip(p, target.tolist())],
                "squared_error": [(q - t) ** 2 for q, t in zip(p, target.tolist())]}
    for kind, values in expected.items():
        assert clf.point_losses(logit, target, kind).tolist() == pytest.approx(values, rel=1e-12)
    assert clf.point_losses(torch.zeros(1), torch.ones(1), "cross_entropy").item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("target", [[0.0, 1.0, 0.5], [0.25, 0.9, 1.0]])
def test_half_kl_is_the_earlier_systems_loss_and_half_of_the_batch_mean_kl(target):
    """The earlier system: (1/(2B)) sum over texts and classes of q (log q - log p), which torch calls the element mean."""
    logit, t = torch.tensor([-2.0, 1.5, 0.3], dtype=torch.float64, requires_grad=True), torch.tensor(target, dtype=torch.float64)
    logp, q = torch.stack([-torch.nn.functional.softplus(logit), -torch.nn.functional.softplus(-logit)], 1), torch.stack([1 - t, t], 1)
    found = clf.point_losses(logit, t, "half_kl").mean()
    by_hand = sum(q[b, c] * (math.log(q[b, c]) - logp[b, c].item()) for b in range(3) for c in range(2) if q[b, c] > 0) / 6
    assert found.item() == pytest.approx(float(by_hand), rel=1e-12)
    assert found.item() == pytest.approx(torch.nn.functional.kl_div(logp, q, reduction="mean").item(), rel=1e-12)
    assert found.item() == pytest.approx(0.5 * torch.nn.functional.kl_div(logp, q, reduction="batchmean").item(), rel=1e-12)
    half, = torch.autograd.grad(found, logit)
    whole, = torch.autograd.grad(clf.point_losses(logit, t, "cross_entropy").mean(), logit)
    assert torch.allclose(2 * half, whole, rtol=1e-12) and not torch.allclose(half, whole)


def test_extreme_logits_have_finite_losses_and_gradients():
    for kind in ("cross_entropy", "half_kl", "squared_error"):
        logit = torch.tensor([-1e4, 1e4, 90.0, -90.0], requires_grad=True)
        loss = clf.point_losses(logit, torch.tensor([1.0, 0.0, 1.0, 0.5]), kind).sum()
        loss.backward()
        assert math.isfinite(loss.item()) and torch.isfinite(logit.grad).all()
    logit = torch.tensor([-1e4, 1e4], requires_grad=True)
    clf.pair_losses(logit, torch.tensor([0]), torch.tensor([1])).sum().backward()
    assert logit.grad.tolist() == [-1, 1]


def test_ranked_replies_count_as_the_mean_over_their_pairs():
    """[2, 3] replies: the first prompt has one pair, the second three that share the weight of one."""
    pairs = clf.collate_pairs([2, 3])
    assert (pairs["better"].tolist(), pairs["worse"].tolist()) == ([0, 2, 2, 3], [1, 3, 4, 4])
    assert pairs["weight"].tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    logit = [0.3, -0.2, 1.0, 2.0, -1.0]
    by_hand = math.log1p(math.exp(-0.5)) + np.mean([math.log1p(math.exp(logit[b] - logit[a])) for a, b in itertools.combinations((2, 3, 4), 2)])
    assert clf.batch_loss(torch.tensor(logit), pairs, "pairwise").item() == pytest.approx(by_hand, rel=1e-6)
    assert clf.batch_loss(torch.tensor(logit).flip(0), pairs, "pairwise").item() != pytest.approx(by_hand, rel=1e-2)


@pytest.mark.parametrize("kind", ["cross_entropy", "pairwise"])
def test_a_rank_without_texts_computes_a_zero_loss_with_zero_gradients(kind):
    model, _, no_yes = small_model("llama")
    batch = {**clf.collate([], 0), **(clf.collate_pairs([]) if kind == "pairwise" else {"target": torch.zeros(1), "weight": torch.zeros(1)})}
    loss = clf.batch_loss(clf.YesNo(model, no_yes)(batch["input_ids"], batch["lengths"]), batch, kind)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("family", ["t5 v1.0", "t5 v1.1", "llama", "gpt2"])
def test_flops_are_six_per_weight_and_token_without_embeddings_and_head(family):
    """Encoder blocks see every token, decoder blocks of a T5 one per text."""
    model, _, _ = small_model(family)
    names = {"llama": ["model.layers", "model.norm"], "gpt2": ["transformer.h", "transformer.ln_f"]}.get(family)
    def size(starts):
        return sum(p.numel() for n, p in model.named_parameters() if n.startswith(tuple(starts)))
    assert size(names or ["encoder.", "decoder."]) > 10000
    assert clf.train_flops(model, 100, 10) == 6 * (size(names) * 100 if names else size(["encoder."]) * 100 + size(["decoder."]) * 10)


# ------------------------------------------------------------------------------------------------ one optimizer step


def training_data(mount, model="tiny", weights=(1.0, 1.0), **changes):
    """(TrainingData, tokenizer, model) of a command line; texts and targets are read by clf.py itself."""
    args = clf.parse_args(list(map(str, clf_flags(mount, model_init_name=model, **changes))))
    problems = []
    source, config, tokenizer = common.open_model_folder(args, problems)
    layout = clf.resolve_layout(args, source, "seq2seq" if config.is_encoder_decoder else "causal", problems)
    data = clf.TrainingData(args, clf.load_data(args, tokenizer, layout, problems), layout, weights, 0)
    assert problems == []
    torch.manual_seed(3)
    auto_class = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return data, tokenizer, auto_class.from_config(config).eval(), clf.verbaliser(tokenizer, layout, problems)


@pytest.mark.parametrize("model", ["tiny", "llama"])
@pytest.mark.parametrize("split", [(8, 1), (4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("step", [0, 5])
def test_a_step_in_any_accumulation_split_is_the_weighted_mean_over_its_texts(clf_mount, model, split, step):
    """The reference reads the file, tokenises and sums one text at a time. Step 5 holds the last 3 of 43 texts, so of 8
    forward steps 5 are empty."""
    data, tokenizer, network, no_yes = training_data(clf_mount, model, (1.0, 3.0), train_batch_size=split[0], gradient_accumulation_steps=split[1])
    records = json.loads((clf_mount / "data" / "scores.json").read_text())["train"]
    ids, total, loss = data.step_ids(step), 0.0, 0.0
    assert len(ids) == (8 if step == 0 else 3)
    for i in ids:
        target, text = records[i]["target"], tokenizer(records[i]["input"]).input_ids
        logp, weight = log_probabilities(network, [text], no_yes)[0], 1.0 * (1 - target) + 3.0 * target
        loss, total = loss - weight * ((1 - target) * logp[0] + target * logp[1]), total + weight
    (loss / total).backward()
    expected, yes_no = gradients(network), clf.YesNo(network, no_yes)
    batches, n_targets = data.micro_batches(step)
    assert len(batches) == split[1] and n_targets == pytest.approx(total, rel=1e-12)

    def run(scales):
        losses = [clf.batch_loss(yes_no(b["input_ids"], b["lengths"]), b, "cross_entropy") * scale for b, scale in zip(batches, scales)]
        sum(losses).backward()
        return float(sum(losses)), gradients(network)
    found_loss, found = run([1 / n_targets] * len(batches))
    assert found_loss == pytest.approx(float(loss / total), rel=1e-5) and largest_difference(found, expected) < 1e-5
    if 1 < split[1] < 8:  # the negative control: a mean of means
        other_loss, other = run([1 / max(1e-9, float(b["weight"].sum())) / len(batches) for b in batches])
        assert abs(other_loss / found_loss - 1) > 1e-3 and largest_difference(other, expected) > 1e-2


@pytest.mark.parametrize("split", [(8, 1), (2, 4)])
def test_a_step_of_preferences_is_the_mean_over_prompts_of_the_mean_over_pairs(clf_mount, split):
    data, tokenizer, network, no_yes = training_data(clf_mount, data="pairs", loss="pairwise", train_batch_size=split[0],
                                                     gradient_accumulation_steps=split[1])
    records = json.loads((clf_mount / "data" / "pairs.json").read_text())["train"]
    ids, loss = data.step_ids(0), 0.0
    for i in ids:
        replies = records[i].get("replies") or [records[i]["chosen"], records[i]["rejected"]]
        logp = [log_probabilities(network, [tokenizer(f"{records[i]['prompt']}\n\n{reply}").input_ids], no_yes)[0] for reply in replies]
        rewards = [p[1] - p[0] for p in logp]
        pairs = list(itertools.combinations(rewards, 2))
        loss = loss - sum(torch.log(torch.sigmoid(a - b)) for a, b in pairs) / len(pairs) / len(ids)
    loss.backward()
    expected, yes_no = gradients(network), clf.YesNo(network, no_yes)
    batches, n_targets = data.micro_batches(0)
    found = sum(clf.batch_loss(yes_no(b["input_ids"], b["lengths"]), b, "pairwise") for b in batches) / n_targets
    found.backward()
    assert {len(r.get("replies", "12")) for r in (records[i] for i in ids)} >= {2, 3} and n_targets == 8
    assert float(found) == pytest.approx(float(loss), rel=1e-5) and largest_difference(gradients(network), expected) < 1e-5
    per_pair = sum(clf.batch_loss(yes_no(b["input_ids"], b["lengths"]), {**b, "weight": (b["weight"] > 0).double()}, "pairwise") for b in batches)
    (per_pair / sum((b["weight"] > 0).sum() for b in batches)).backward()
    assert largest_difference(gradients(network), expected) > 1e-3  # counting every pair once is something else


def test_balanced_class_weights_give_both_classes_half_of_the_loss():
    args = clf.parse_args(["--data", "x", "--class_weights", "balanced"])
    targets = np.array([0.0, 0, 0, 0, 0, 1, 1, 0.5])
    no, yes = clf.class_weights(args, [types.SimpleNamespace(targets={"train": targets}, amount=None)], problems := [])
    assert problems == [] and ((1 - targets) * no).sum() == pytest.approx((targets * yes).sum()) == pytest.approx(4)
    several = [types.SimpleNamespace(targets={"train": targets}, amount=amount) for targets, amount in
               ((np.ones(40), 0.25), (np.zeros(500), 30), (np.array([1.0, 0.0]), None))]
    assert clf.class_weights(args, several, problems) == pytest.approx((42 / 2 / 31, 42 / 2 / 11))  # of what an epoch holds
    clf.class_weights(args, [types.SimpleNamespace(targets={"train": np.zeros(5)}, amount=None)], problems)
    assert "all training targets are 0, so one class is empty" in problems[0]
    assert clf.class_weights(clf.parse_args(["--data", "x", "--class_weights", "1", "2.5"]), [], []) == (1, 2.5)
    assert clf.class_weights(clf.parse_args(["--data", "x"]), [], []) == (1, 1)


# ------------------------------------------------------------------------------------------------ learns

NOUNS = {1.0: "cat dog bird horse fox cow".split(), 0.0: "book word number letter page line".split()}


def separable_records(n, start=0):
    """Texts with a noun of one side among the same other words."""
    return [{"input": f"the {NOUNS[float(i % 2)][i // 2 % 6]} is long {i + start}", "target": i % 2} for i in range(n)]


@pytest.mark.parametrize("model", ["tiny", "llama"])
def test_a_separable_toy_is_learnt_to_an_auc_of_99_percent_on_unseen_texts(clf_mount, run_clf, model):
    (clf_mount / "data" / "toy.json").write_text(json.dumps({"train": separable_records(96), "eval": separable_records(48, 500)}))
    assert run_clf(clf_flags(clf_mount, model_init_name=model, data="toy", max_steps=60, train_batch_size=16, warmup_steps=10,
                             logging_steps=60)) == 0
    first, *_, last = rows(clf_mount / "models" / "run", "eval")
    assert last["eval/auc"] >= 0.99 and last["eval/accuracy"] >= 0.95 and first["eval/auc"] < 0.9


@pytest.mark.parametrize("model", ["tiny", "llama"])
def test_soft_targets_are_recovered_within_5_percent(clf_mount, run_clf, model):
    texts, targets = ["the cat", "a dog", "book", "water is long", "three", "no"], [0, 0.1, 0.3, 0.5, 0.8, 1]
    records = [{"input": text, "target": target} for text, target in zip(texts, targets)]
    (clf_mount / "data" / "soft.json").write_text(json.dumps({"train": records, "eval": records}))
    assert run_clf(clf_flags(clf_mount, model_init_name=model, data="soft", max_steps=100, warmup_steps=10, logging_steps=100,
                             learning_rate=0.01)) == 0
    found = json.loads((clf_mount / "models" / "run" / "preds.json").read_text())
    assert [row["pred_score"] for row in found] == pytest.approx(targets, abs=0.05)
    start = json.loads((clf_mount / "models" / "run" / "checkpoint-0-preds.json").read_text())
    assert [row["pred_score"] for row in start] != pytest.approx(targets, abs=0.2)


@pytest.mark.parametrize("model", ["tiny", "llama"])
def test_eight_preferences_are_learnt_to_a_pair_accuracy_of_one(clf_mount, run_clf, model):
    pairs = json.loads((clf_mount / "data" / "pairs.json").read_text())["train"][:8]
    (clf_mount / "data" / "eight.json").write_text(json.dumps({"train": pairs, "eval": pairs}))
    assert run_clf(clf_flags(clf_mount, model_init_name=model, data="eight", loss="pairwise", max_steps=60, warmup_steps=10,
                             logging_steps=60)) == 0
    first, last = rows(clf_mount / "models" / "run", "eval")
    assert last["eval/accuracy"] == last["eval/kendall"] == 1.0 and first["eval/accuracy"] < 0.9 and last["eval/margin"] > 1


@pytest.mark.parametrize("model", ["byt5", "bart"])
def test_other_families_train_too(clf_mount, run_clf, model):
    words = {}
    if model == "byt5":
        write_byt5(clf_mount / "models" / "byt5")
        words = {"positive_word": "y", "negative_word": "n"}
    else:
        write_llama(clf_mount / "models" / "bart")
        transformers.BartConfig(vocab_size=300, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
                                dropout=0.0, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
                                eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None).save_pretrained(clf_mount / "models" / "bart")
    (clf_mount / "data" / "toy.json").write_text(json.dumps({"train": separable_records(32), "eval": separable_records(32)}))
    assert run_clf(clf_flags(clf_mount, model_init_name=model, data="toy", max_steps=30, logging_steps=10, warmup_steps=3, **words)) == 0
    losses = [row["loss"] for row in rows(clf_mount / "models" / "run")]
    assert losses[-1] < 0.8 * losses[0]
