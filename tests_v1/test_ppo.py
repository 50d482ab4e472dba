"""rl_ppo.py: its mathematics against golden vectors and slow references, its models against plain transformers, its rollouts."""

import math
import types

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

import common_v1 as common
import rl_ppo

V, CPU = 64, torch.device("cpu")
FAMILIES = ["llama", "gpt2", "gemma2", "t5 v1.0", "t5 v1.1", "bart"]
START = {"t5 v1.0": 0, "t5 v1.1": 0, "bart": 2}  # of encoder-decoders


def small_model(family, dropout=0.0, seed=0, **changes):
    """A random model of the family with V tokens and two blocks, the same every time."""
    torch.manual_seed(seed)
    llama = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0, "tie_word_embeddings": False}
    t5 = {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
          "dropout_rate": dropout}
    ids = {"pad_token_id": 1, "bos_token_id": None, "eos_token_id": None, "forced_eos_token_id": None}
    two = {"encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
           "decoder_ffn_dim": 48}
    config = {
        "llama": lambda: transformers.LlamaConfig(**{**llama, "attention_dropout": dropout, **changes}),
        "gemma2": lambda: transformers.Gemma2Config(**{**llama, "head_dim": 8, "final_logit_softcapping": 1.0, "sliding_window": 4,
                                                       "attention_dropout": dropout, **changes}),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
                                                resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=None, eos_token_id=None),
        "opt": lambda: transformers.OPTConfig(vocab_size=V, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, init_std=0.2,
                                              max_position_embeddings=64, dropout=dropout, attention_dropout=dropout,
                                              **{**ids, "word_embed_proj_dim": 32, **changes}),
        "t5 v1.0": lambda: transformers.T5Config(**t5),
        "t5 v1.1": lambda: transformers.T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False, scale_decoder_outputs=False),
        "bart": lambda: transformers.BartConfig(vocab_size=V, d_model=32, max_position_embeddings=64, init_std=0.2, decoder_start_token_id=2, **two,
                                                dropout=dropout, attention_dropout=dropout, activation_dropout=dropout, **ids)}[family]()
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager" if family == "gemma2" else None).eval()
    if family == "t5 v1.1":
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    if family == "t5 v1.0":  # as it is made, its greedy replies repeat one token
        with torch.no_grad():
            model.shared.weight.mul_(0.2)
            model.decoder.final_layer_norm.weight.mul_(5)
    if family == "bart":
        model.final_logits_bias = torch.randn(1, V)
    return model


def ragged(lengths, seed):
    noise = np.random.default_rng(seed)
    return [noise.integers(5, V - 1, n) for n in lengths]  # V - 1 is in no text


PROMPTS, REPLIES, ROWS = ragged((3, 9, 1, 5), 1), ragged((4, 1, 7, 2), 2), [2, 0, 3, 1]


def batch_of(family, rows=ROWS, prompts=PROMPTS, replies=REPLIES, pad_id=0):
    return rl_ppo.collate(rows, prompts, replies, pad_id, START.get(family))


def slow_log_probabilities(model, prompt, reply, temperature):
    """(n, V) of one text, alone, by the model's own forward."""
    prompt, reply = torch.tensor(prompt)[None], torch.tensor(reply)[None]
    if model.config.is_encoder_decoder:
        before = torch.cat([torch.tensor([[model.config.decoder_start_token_id]]), reply[:, :-1]], 1)
        logits = model(input_ids=prompt, decoder_input_ids=before).logits[0]
    else:
        logits = model(input_ids=torch.cat([prompt, reply], 1)).logits[0, prompt.shape[1] - 1: -1]
    return torch.log_softmax(logits / temperature, -1)


def gradients(module):
    found = {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}
    module.zero_grad()
    return found


def assert_close(a, b, rel=1e-5):
    """Two gradients, against the largest entry."""
    assert a.keys() == b.keys()
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < rel * max(float(b[k].abs().max()) for k in b)


def arguments(*words):
    return rl_ppo.parse_args(["--data", "x", "--model_init_name", "x", *map(str, words)])


# ------------------------------------------------------------------------------------------------ golden vectors

IS_REPLY = np.array([[True] * 4, [True] * 3 + [False]])
REWARDS, VALUES = np.array([[-.05, .02, -.01, 1], [0, -.03, .5, 9]]), np.array([[.1, .2, .3, .4], [.5, .4, .3, 9]])
GOLDEN = {1.0: ([[.75965, .747, .66, .6], [-.043, .06, .2, 0]], .426236, .117398),
          0.9: ([[.518517, .571365, .563, .6], [-.130595, .011, .2, 0]], .333327, .091953)}


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_gives_the_golden_vectors_and_nothing_leaks_from_padding(gamma):
    expected, mean, variance = GOLDEN[gamma]
    advantages, returns = rl_ppo.gae(REWARDS, VALUES, IS_REPLY, gamma, 0.95)
    assert advantages == pytest.approx(np.array(expected), abs=1e-6)
    assert returns == pytest.approx(advantages + np.where(IS_REPLY, VALUES, 0), abs=1e-12)
    assert (advantages[IS_REPLY].mean(), advantages[IS_REPLY].var(ddof=1)) == pytest.approx((mean, variance), abs=1e-6)
    leaky, _ = rl_ppo.gae(REWARDS, VALUES, np.ones_like(IS_REPLY), gamma, 0.95)
    assert abs(leaky[1, 2] - expected[1][2]) > 1


def test_returns_and_whitened_advantages_are_the_golden_vectors():
    advantages, returns = rl_ppo.gae(REWARDS, VALUES, IS_REPLY, 1.0, 0.95)
    assert returns == pytest.approx(np.array([[.85965, .947, .96, 1], [.457, .46, .5, 0]]), abs=1e-9)
    whitened = rl_ppo.whiten(np.where(IS_REPLY, advantages, 9), IS_REPLY)
    assert whitened[IS_REPLY] == pytest.approx(np.array([.973092, .936172, .682257, .507143, -1.369496, -1.068883, -.660284]), abs=1e-6)
    assert whitened[1, 3] == 0 and rl_ppo.whiten(np.full((1, 1), 3.0), np.ones((1, 1), bool)) == 0  # one token: no deviation


def test_returns_of_a_single_terminal_reward_are_torchtunes():
    _, returns = rl_ppo.gae(np.array([[0, 0, 0, 1.0]]), np.array([[0, 0, 0, 1.0]]), np.ones((1, 4), bool), 0.9, 0.95)
    assert returns[0] == pytest.approx([.9**3 * .95**2, .9**2 * .95, .9, 1], abs=1e-12)


def test_gae_is_the_sum_of_discounted_residuals_on_ragged_replies():
    noise = np.random.default_rng(0)
    lengths = noise.integers(1, 13, 20)
    rewards, values, is_reply = noise.normal(size=(20, 12)), noise.normal(size=(20, 12)), np.arange(12) < lengths[:, None]
    for gamma, lam in ((1, 0.95), (0.9, 0.8), (1, 0), (0.97, 1)):
        advantages, returns = rl_ppo.gae(rewards, values, is_reply, gamma, lam)
        assert (advantages.dtype, advantages[~is_reply].any(), returns[~is_reply].any()) == (np.float64, False, False)
        for row, n in enumerate(lengths):
            delta = [rewards[row, t] + gamma * (values[row, t + 1] if t + 1 < n else 0) - values[row, t] for t in range(n)]
            for t in range(n):
                expected = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
                assert (advantages[row, t], returns[row, t]) == pytest.approx((expected, expected + values[row, t]), abs=1e-12)


NEW, OLD = (torch.tensor(x, dtype=torch.float64) for x in ([-1, -.5, -2, -.3], [-1.2, -.5, -1.5, -.9]))
ADVANTAGES = torch.tensor([1, -.5, -1, 2], dtype=torch.float64)


def test_policy_loss_and_clip_fraction_are_the_golden_ones():
    losses, ratio, is_clipped = rl_ppo.policy_losses(NEW, OLD, ADVANTAGES, 0.2)
    assert ratio.tolist() == pytest.approx([1.221403, 1, .606531, 1.822119], abs=1e-6)
    assert losses.mean().item() == pytest.approx(-.575, abs=1e-12) and is_clipped.double().mean() == .75
    one = torch.ones(1)
    assert rl_ppo.policy_losses(one, 0 * one, one, 0.2)[0].item() == pytest.approx(-1.2)
    assert rl_ppo.policy_losses(-one, 0 * one, -one, 0.2)[0].item() == pytest.approx(0.8)  # ratio 1/e; as torchtune's


def test_where_the_ratio_is_clipped_the_gradient_is_zero_and_elsewhere_minus_advantage_times_ratio():
    old = torch.zeros(8, dtype=torch.float64)
    new = torch.tensor([.5, .5, -.5, -.5, .1, .1, -.1, -.1], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([2.0, -2, 2, -2, 2, -2, 2, -2], dtype=torch.float64)
    losses, ratio, is_clipped = rl_ppo.policy_losses(new, old, advantages, 0.2)
    losses.sum().backward()
    assert is_clipped.tolist() == [True, False, False, True] + [False] * 4  # only where clipping makes the loss larger
    assert torch.equal(new.grad, torch.where(is_clipped, 0.0, -advantages * ratio.detach()))


def test_dual_clip_bounds_the_loss_of_a_large_ratio_only_where_the_advantage_is_negative():
    new = torch.log(torch.tensor([8.0, 2.0, 0.5, 8.0], dtype=torch.float64)).requires_grad_()
    old, advantages = torch.zeros(4, dtype=torch.float64), torch.tensor([-1.0, -1, -1, 1], dtype=torch.float64)
    losses, *_ = rl_ppo.policy_losses(new, old, advantages, 0.2, dual_clip=3.0)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([3, 2, 0.8, -1.2]) and new.grad.tolist() == pytest.approx([0, 2, 0, 0])
    assert rl_ppo.policy_losses(new, old, advantages, 0.2)[0].tolist() == pytest.approx([8, 2, 0.8, -1.2])


def test_kl_estimates_are_the_golden_ones_for_arrays_and_tensors():
    for d in (NEW - OLD, (NEW - OLD).numpy()):
        found = [float(rl_ppo.kl_terms(d, kind).mean()) for kind in ("k1", "k2", "k3")]
        assert found == pytest.approx([.075, .08125, .079066], abs=1e-6)
        assert (rl_ppo.kl_terms(d, "k3") >= 0).all() and float(rl_ppo.kl_terms(d * 0, "k3").sum()) == 0


def test_value_loss_and_clip_fraction_are_the_golden_ones_and_cliprange_0_is_half_the_squared_error():
    new, old, returns = (torch.tensor(x, dtype=torch.float64) for x in ([.5, 1.2, -.3], [.1, 1, 0], [1, 1.1, -.5]))
    losses, is_clipped = rl_ppo.value_losses(new, old, returns, 0.2)
    assert losses.mean().item() == pytest.approx(.098333, abs=1e-6)
    assert is_clipped.double().mean().item() == pytest.approx(2 / 3)  # at 1.2 both are the same
    plain, none = rl_ppo.value_losses(new, old, returns, 0)
    assert torch.equal(plain, (new - returns) ** 2 / 2) and not none.any() and plain.mean() < losses.mean()


# ------------------------------------------------------------------------------------------------ scores, rewards, advantages


def test_replies_are_compared_within_their_group():
    """rloo: against the mean of the others; grpo: in deviations from the mean."""
    scores = np.array([1.0, 2, 6, 5, 5, 5])
    assert rl_ppo.group_advantages(scores, 3, "rloo").tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0])
    expected = np.array([-2, -1, 3]) / (math.sqrt(7) + 1e-4)
    assert rl_ppo.group_advantages(scores, 3, "grpo").tolist() == pytest.approx([*expected, 0, 0, 0])
    assert rl_ppo.group_advantages(scores[:2], 2, "rloo").tolist() == [-1, 1]


def test_the_score_is_on_the_last_reply_token_and_nothing_is_behind_it():
    is_reply, kl = np.array([[True] * 3, [True, False, False], [True, True, False]]), np.array([[1.0, 2, 3], [1, 9, 9], [-1, 2, 9]])
    rewards = rl_ppo.token_rewards(kl, np.array([10.0, 20, 30]), is_reply, 0.5)
    assert rewards.tolist() == [[-.5, -1, 10 - 1.5], [20 - .5, 0, 0], [.5, 30 - 1, 0]]


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_advantages_of_a_rollout_are_those_of_its_parts_and_do_not_see_padding(advantage):
    args = arguments("--advantage", advantage, "--n_samples", 1 if advantage == "gae" else 2, "--kl_estimator", "k3", "--gamma", 0.9)
    noise, is_reply = np.random.default_rng(3), np.arange(6) < np.array([6, 1, 4, 2])[:, None]
    columns, scores = [noise.normal(size=(4, 6)) for _ in range(3)], noise.normal(size=4)
    advantages, returns, kl, metrics = rl_ppo.estimate_advantages(args, *columns, scores, is_reply, 0.3)
    other = rl_ppo.estimate_advantages(args, *(np.where(is_reply, x, fill) for x, fill in zip(columns, (9, -9, 9))), scores, is_reply, 0.3)
    assert all(np.array_equal(a, b) for a, b in zip((advantages, returns, kl), other)) and metrics == other[3]
    d = columns[0] - columns[1]
    terms = np.where(is_reply, np.exp(-d) - 1 + d, 0)
    assert kl == pytest.approx(terms.sum(1)) and (metrics["kl"], metrics["kl_per_token"]) == pytest.approx((terms.sum() / 4, terms.sum() / 13))
    if advantage == "gae":
        plain, expected_returns = rl_ppo.gae(rl_ppo.token_rewards(terms, scores, is_reply, 0.3), columns[2], is_reply, 0.9, 0.95)
        of, mine = returns[is_reply], columns[2][is_reply]
        assert np.allclose(returns, expected_returns) and np.allclose(advantages, rl_ppo.whiten(plain, is_reply))
        assert metrics["explained_variance"] == pytest.approx(1 - (of - mine).var() / of.var()) and metrics["returns"] == pytest.approx(of.mean())
    else:
        priced = scores - 0.3 * kl if advantage == "rloo" else scores  # grpo has the KL in its loss
        expected = rl_ppo.group_advantages(priced, 2, advantage)
        assert np.allclose(advantages, expected[:, None] * is_reply) and not returns.any()


def test_beta_follows_the_target_by_the_formula_and_both_clips():
    for kl, factor in ((6.6, .1), (6, 0), (5.4, -.1), (60, .2), (0.1, -.2), (-3, -.2)):
        assert rl_ppo.next_kl_coef(0.05, kl, 6, 10000, 128) == pytest.approx(0.05 * (1 + factor * 128 / 10000), rel=1e-12)


def test_running_statistics_of_chunks_are_those_of_all_values():
    values, stats = np.random.default_rng(0).normal(1e4, 3, 101), [0, 0.0, 0.0]
    for chunk in np.split(values, [1, 2, 40, 90]):
        stats = rl_ppo.add_to_stats(stats, chunk)
    n, mean, squares = stats
    assert (n, mean, squares / (n - 1)) == pytest.approx((101, values.mean(), values.var(ddof=1)), rel=1e-9)


def test_scores_are_scaled_then_clipped_and_a_missing_end_costs_its_penalty():
    scores, has_end, stats = np.array([1.0, -40, 3, 8]), np.array([True, True, False, False]), [5, 2.0, 16.0]  # mean 2, deviation 2
    def shaped(*words):
        return rl_ppo.shaped_scores(arguments(*words), scores, has_end, stats).tolist()
    assert shaped() == [1, -10, 3, 8] and shaped("--cliprange_reward", 0) == [1, -40, 3, 8]
    assert shaped("--reward_scaling", "std") == pytest.approx([.5, -10, 1.5, 4])
    assert shaped("--reward_scaling", "norm", "--cliprange_reward", 2.5) == pytest.approx([-.5, -2.5, .5, 2.5])
    assert shaped("--missing_eos_penalty", 1.5, "--cliprange_reward", 5) == [1, -5, 1.5, 3.5]
    assert scores.tolist() == [1, -40, 3, 8]  # the raw ones are logged


# ------------------------------------------------------------------------------------------------ probabilities of a text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_entropies_are_those_of_each_text_alone(family, temperature):
    model = small_model(family)
    with torch.no_grad():
        slow = [slow_log_probabilities(model, PROMPTS[i], REPLIES[i], temperature) for i in ROWS]
        found, entropies, values = rl_ppo.Policy(model, temperature)(batch_of(family))
        other = rl_ppo.Policy(model, temperature + 0.3)(batch_of(family))[0]
    expected = torch.cat([p[torch.arange(len(p)), torch.tensor(REPLIES[i])] for p, i in zip(slow, ROWS)])
    assert values is None and torch.allclose(found, expected, atol=2e-5) and not torch.allclose(other, expected, atol=0.02)
    slow = torch.cat(slow)
    assert torch.allclose(entropies, -(slow.exp() * slow).sum(-1), atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES + ["opt"])
@pytest.mark.parametrize("n_top", [0, 1])
def test_the_scoring_pass_without_gradients_gives_the_updates_log_probabilities(family, n_top):
    """The first ratio of a rollout is 1: within rl_ppo.py's own bound at the start of training, far within it here."""
    policy = rl_ppo.Policy(small_model(family), 0.7)
    rl_ppo.freeze_layers(policy.model, n_top) if n_top else None
    rl_ppo.no_dropout(policy)
    with torch.no_grad():
        old = policy(batch_of(family))[0]
    new = policy(batch_of(family), 1, entropy_grad=True)[0]
    assert new.requires_grad and not old.requires_grad and (new.detach() - old).abs().max() < 0.2 * rl_ppo.RATIO_BOUND["fp32"]


@pytest.mark.parametrize("family", ["llama", "t5 v1.0", "bart"])
def test_chunks_of_logits_change_neither_results_nor_gradients(family):
    found = []
    for n_chunks in (1, 3):
        policy = rl_ppo.Policy(small_model(family), 0.7, rl_ppo.ValueHead(32, torch.float32, 5))
        parts = policy(batch_of(family), n_chunks, entropy_grad=True)
        weights = torch.arange(14.0) - 4
        sum((part * weights).sum() for part in parts).backward()
        found.append(([part.detach() for part in parts], gradients(policy)))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0][0], found[1][0])) and found[0][0][0].shape == (14,)
    assert_close(found[1][1], found[0][1])


def test_the_entropy_has_a_gradient_only_where_its_bonus_is_asked_for():
    policy = rl_ppo.Policy(small_model("llama"), 1.0)
    asked, unasked = (policy(batch_of("llama"), 1, entropy_grad=entropy_grad)[1] for entropy_grad in (True, False))
    assert torch.equal(asked, unasked) and asked.requires_grad and not unasked.requires_grad


@pytest.mark.parametrize("family", ["llama", "t5 v1.1", "bart"])
def test_what_follows_a_reply_has_neither_effect_nor_gradient(family):
    policy, found = rl_ppo.Policy(small_model(family), 1.0, rl_ppo.ValueHead(32, torch.float32, 5)), []
    for pad_id in (0, V - 1):
        logprobs, entropies, values = policy(batch_of(family, pad_id=pad_id))
        (logprobs.sum() + values.sum()).backward()
        found.append((logprobs.detach(), entropies, values.detach(), gradients(policy)))
    embedding = policy.model.get_input_embeddings()
    name = next(name for name, weight in policy.named_parameters() if weight is embedding.weight)
    assert all(torch.equal(a, b) for a, b in zip(found[0][:3], found[1][:3])) and all(torch.equal(found[1][3][k], g) for k, g in found[0][3].items())
    if family != "bart":  # its head is its embedding
        assert not found[1][3][name][V - 1].any() and found[1][3][name].any()
    changed = [*REPLIES[:3], REPLIES[3] + 1]
    assert not torch.equal(policy(batch_of(family, replies=changed))[0], found[0][0])  # inside a reply it does


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5 v1.0", "t5 v1.1", "bart"])
@pytest.mark.parametrize("n_chunks", [1, 3])
def test_a_rank_without_replies_computes_a_zero_loss_with_zero_gradients(family, n_chunks):
    policy = rl_ppo.Policy(small_model(family), 1.0, rl_ppo.ValueHead(32, torch.float32, 5))
    logprobs, entropies, values = policy(batch_of(family, rows=[]), n_chunks, entropy_grad=True)
    assert logprobs.shape == entropies.shape == values.shape == (0,)
    losses, *_ = rl_ppo.policy_losses(logprobs, torch.zeros(0), torch.zeros(0), 0.2)
    total = losses.sum() - entropies.sum() + rl_ppo.value_losses(values, torch.zeros(0), torch.zeros(0), 0.2)[0].sum()
    total.backward()
    assert total.item() == 0 and all(p.grad is not None and not p.grad.any() for p in policy.parameters())


# ------------------------------------------------------------------------------------------------ KL to the reference


def perturbed(model, size):
    other = small_model("llama")
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters()):
            mine.copy_(theirs + size * torch.randn(theirs.shape, generator=noise))
    return other


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_mean_of_k1_is_the_exact_kl_of_the_next_token_and_k3_varies_less(temperature):
    """10,000 sampled tokens at each of three positions, by the sampler and the scoring pass of training."""
    model = small_model("llama", initializer_range=0.1)
    other = perturbed(model, 0.03)
    policy, reference = rl_ppo.Policy(model, temperature), rl_ppo.Policy(other, temperature)
    for n, prompt in enumerate(PROMPTS[:3]):
        table = rl_ppo.collate(range(V), [prompt] * V, [[token] for token in range(V)], 0)
        with torch.no_grad():
            log_p, log_q = policy(table)[0].double(), reference(table)[0].double()
        exact = float((log_p.exp() * (log_p - log_q)).sum())
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5) and exact > 0.01
        keys = [common.derive_seed("kl", n, k) for k in range(10000)]
        tokens = np.concatenate([ids for ids, _ in rl_ppo.rollout(model, [prompt] * 10000, keys, temperature, 1, [], 0, CPU)])
        d = (log_p - log_q)[torch.from_numpy(tokens)]
        k1, k3 = rl_ppo.kl_terms(d, "k1"), rl_ppo.kl_terms(d, "k3")
        for estimate in (k1, k3):
            assert abs(estimate.mean() - exact) < 3 * estimate.std() / 100
        assert k3.std() < 0.7 * k1.std() and abs(rl_ppo.kl_terms(d, "k2").mean() - exact) < 0.5 * exact
        uniform = (log_p - log_q)[torch.arange(10000) % V]  # the negative control: not drawn from the policy
        assert abs(uniform.mean() - exact) > 3 * uniform.std() / 100


@pytest.mark.parametrize("family", ["llama", "t5 v1.0"])
def test_the_kl_of_equal_models_is_exactly_zero(family):
    with torch.no_grad():
        (mine, *_), (theirs, *_) = (rl_ppo.Policy(small_model(family), 0.7)(batch_of(family)) for _ in range(2))
    for kind in ("k1", "k2", "k3"):
        assert not rl_ppo.kl_terms(mine - theirs, kind).any()


# ------------------------------------------------------------------------------------------------ dropout, value head, frozen layers


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5 v1.0", "opt", "bart"])
def test_no_dropout_is_active_with_and_without_recomputed_activations(family):
    def passes(policy):
        """Log-probabilities, values and gradients of one pass; how often the last block's first matrix was used."""
        block = [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)][-1]
        ran, matrix = [], next(m for m in block.modules() if isinstance(m, (torch.nn.Linear, transformers.pytorch_utils.Conv1D)))
        hook = matrix.register_forward_hook(lambda *_: ran.append(1))
        logprobs, _, values = policy(batch_of(family))
        (logprobs.sum() + values.sum()).backward()
        hook.remove()
        return logprobs.detach(), values.detach(), gradients(policy), len(ran)
    plain = rl_ppo.Policy(small_model(family, dropout=0.5), 1.0, rl_ppo.ValueHead(32, torch.float32, 5))
    rl_ppo.no_dropout(plain)
    saving = rl_ppo.Policy(small_model(family, dropout=0.5), 1.0, rl_ppo.ValueHead(32, torch.float32, 5))
    saving.model.gradient_checkpointing_enable({"use_reentrant": False})
    for step in range(2):
        saving.eval()  # as sampling does
        rl_ppo.no_dropout(saving)
        first, second, third = passes(plain), passes(plain), passes(saving)
        assert (first[3], third[3]) == (1, 2) and torch.equal(first[0], second[0]) and torch.equal(first[0], third[0])
        assert torch.equal(first[1], third[1])
        assert_close(third[2], first[2], 1e-6)
    for policy in (plain, saving) if family != "bart" else (plain,):
        policy.train()
        torch.manual_seed(1)
        assert not torch.equal(policy(batch_of(family))[0], first[0]) and not torch.equal(policy(batch_of(family))[0], policy(batch_of(family))[0])


def test_a_value_head_is_finite_and_a_function_of_its_seed_alone():
    hidden, state = torch.randn(50, 32), torch.get_rng_state()
    head, again, other = (rl_ppo.ValueHead(32, torch.float32, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.isfinite(head(hidden)).all() and torch.equal(head(hidden), again(hidden)) and not torch.equal(head(hidden), other(hidden))
    w, b, v, c = (getattr(head, name) for name in ("in_weight", "in_bias", "out_weight", "out_bias"))
    assert head(hidden).shape == (50,) and torch.allclose(head(hidden), (torch.relu(hidden @ w.T + b) @ v.T + c)[:, 0], atol=1e-6)
    assert (w.std().item(), v.std().item()) == pytest.approx((33**-0.5, 65**-0.5), rel=0.3) and not b.any() and not c.any()


def test_a_zero_value_head_gives_zero_and_learns_and_a_linear_one_has_the_given_weights():
    hidden, weights = torch.randn(50, 32), torch.randn(32)
    zero, linear = rl_ppo.ValueHead(32, torch.float32, 1, "zero"), rl_ppo.ValueHead(32, torch.float32, 1, linear=weights)
    assert not zero(hidden).any() and torch.allclose(linear(hidden), hidden @ weights, atol=1e-5)
    zero(hidden).sum().backward()
    assert zero.out_weight.grad.any() and torch.isfinite(zero.out_weight.grad).all()


@pytest.mark.parametrize("family, changes", [*[(family, {}) for family in [*FAMILIES, "opt"]], ("opt", {"word_embed_proj_dim": 16})])
def test_the_value_head_has_the_width_of_the_last_hidden_state(family, changes):
    model = small_model(family, **changes)
    heads = [rl_ppo.make_critic(arguments("--seed", seed), None, model, "fp32", None) for seed in (0, 0, 1)]
    values = [rl_ppo.Policy(model, 1.0, head)(batch_of(family))[2] for head in heads]
    assert values[0].shape == (14,) and torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert torch.isfinite(values[0]).all()
    assert rl_ppo.make_critic(arguments("--advantage", "rloo", "--n_samples", 2), None, model, "fp32", None) is None


def test_values_are_computed_in_fp32_whatever_the_weights_are():
    """A bf16 value has at most 256 steps between two powers of two."""
    hidden = torch.randn(50, 32)
    head, half, double = (rl_ppo.ValueHead(32, dtype, 1) for dtype in (torch.float32, torch.bfloat16, torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head(hidden)
    assert torch.equal(mixed, head(hidden)) and half(hidden.bfloat16()).dtype == torch.float32 and double(hidden.double()).dtype == torch.float64
    found = half(hidden.bfloat16())
    assert not torch.equal(found, found.bfloat16().float()) and torch.allclose(found, head(hidden), atol=0.1)


@pytest.mark.parametrize("family, trained, total", [
    ("llama", ["model.layers.1.", "model.norm.", "lm_head."], 2), ("llama tied", ["model.layers.1.", "model.norm."], 2),
    ("gpt2", ["transformer.h.1.", "transformer.ln_f."], 2), ("t5 v1.0", ["decoder.block.1.", "decoder.final_layer_norm."], 2),
    ("t5 v1.1", ["decoder.block.1.", "decoder.final_layer_norm.", "lm_head."], 2), ("bart", ["model.decoder.layers.1."], 2),
    ("opt", ["model.decoder.layers.1.", "model.decoder.final_layer_norm."], 2),
    ("opt narrow", ["model.decoder.layers.1.", "model.decoder.final_layer_norm.", "model.decoder.project_out."], 2)])
def test_the_top_layers_are_trained_and_the_embedding_is_frozen(family, trained, total):
    """What lies between the embedding and the first block is frozen too: BART's norm, the projection of a narrow embedding."""
    changes = {"llama tied": {"tie_word_embeddings": True}, "opt narrow": {"word_embed_proj_dim": 16}}.get(family, {})
    model = small_model(family.removesuffix(" tied").removesuffix(" narrow"), **changes)
    assert rl_ppo.freeze_layers(model, 1) == 1
    found = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert found == {name for name, _ in model.named_parameters() if name.startswith(tuple(trained))} and len(found) > 5
    assert not model.get_input_embeddings().weight.requires_grad
    assert rl_ppo.freeze_layers(model, 9) == total  # it has no more
    below = trained[0].replace(".1.", ".0.")
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} - found == {
        name for name, _ in model.named_parameters() if name.startswith(below)}


# ------------------------------------------------------------------------------------------------ rollouts

LONG = ragged((3, 9, 1, 5, 12, 2), 4)


def sample(model, prompts=LONG, temperature=1.0, stop_ids=(), limit=8, pad_id=0, keys=None):
    keys = [common.derive_seed("key", n) for n in range(len(prompts))] if keys is None else keys
    return rl_ppo.rollout(model, prompts, keys, temperature, limit, list(stop_ids), pad_id, CPU)


def some_stop_ids(replies):
    """Two tokens that end some replies early, at different places, and leave others."""
    counts = {token: sum(token in ids[:-1].tolist() for ids, _ in replies) for token in set(np.concatenate([ids for ids, _ in replies]).tolist())}
    usable = sorted(token for token, n in counts.items() if 0 < n <= len(replies) // 2)
    return usable[:2]


@pytest.mark.parametrize("family", FAMILIES + ["opt"])
def test_greedy_replies_are_those_of_generate_for_each_prompt_alone(family):
    model = small_model(family, seed=3)
    stop_ids = some_stop_ids(sample(model, temperature=0))
    found = sample(model, temperature=0.001, stop_ids=stop_ids, pad_id=V - 1)
    assert len({len(ids) for ids, _ in found}) > 1 and max(len(ids) for ids, _ in found) == 8
    for prompt, (ids, _) in zip(LONG, found):
        prompt = torch.tensor(prompt)[None]
        whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8, eos_token_id=stop_ids,
                               pad_token_id=0)
        expected = whole[0, 1 if model.config.is_encoder_decoder else prompt.shape[1]:].tolist()
        assert ids.tolist() == expected and ids.dtype == np.int64


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5 v1.0", "bart"])
def test_a_sampled_reply_depends_on_its_key_not_on_batch_order_or_padding(family):
    model = small_model(family)
    stop_ids = some_stop_ids(sample(model))
    together, keys = sample(model, stop_ids=stop_ids), [common.derive_seed("key", n) for n in range(6)]
    order = [4, 0, 5, 3, 1, 2]
    turned = sample(model, [LONG[i] for i in order], stop_ids=stop_ids, keys=[keys[i] for i in order], pad_id=9)
    alone = [sample(model, [LONG[i]], stop_ids=stop_ids, keys=[keys[i]])[0] for i in range(6)]
    others = sample(model, stop_ids=stop_ids, keys=keys[::-1])
    for i, (ids, logprobs) in enumerate(together):
        for again, its in (turned[order.index(i)], alone[i]):
            assert again.tolist() == ids.tolist() and np.allclose(its, logprobs, atol=1e-4)
    assert sum(a.tolist() != b.tolist() for (a, _), (b, _) in zip(together, others)) >= 5
    assert len({tuple(ids.tolist()) for ids, _ in sample(model, [LONG[0]] * 6)}) > 3  # replies to one prompt differ


@pytest.mark.parametrize("family", FAMILIES + ["opt"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_log_probabilities_are_those_of_the_scoring_pass(family, temperature):
    model = small_model(family)
    sampled = sample(model, temperature=temperature, stop_ids=some_stop_ids(sample(model)))
    with torch.no_grad():
        batch = batch_of(family, range(6), LONG, [ids for ids, _ in sampled])
        expected = rl_ppo.Policy(model, temperature)(batch)[0]
        other = rl_ppo.Policy(model, temperature * 1.2)(batch)[0]
    found = torch.from_numpy(np.concatenate([logprobs for _, logprobs in sampled]))
    assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-4) and not torch.allclose(found, other, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "t5 v1.0", "bart"])
def test_replies_end_with_the_first_stop_id_or_at_the_limit_and_leave_the_batch_at_once(family):
    model, seen = small_model(family), []
    free = sample(model)
    stop_ids = some_stop_ids(free)
    name = "decoder_input_ids" if family in START else "input_ids"
    model.register_forward_pre_hook(lambda module, inputs, options: seen.append(len(options[name])), with_kwargs=True)
    found = sample(model, stop_ids=stop_ids)
    for (ids, logprobs), (whole, _) in zip(found, free):
        end = next((t for t, token in enumerate(whole) if token in stop_ids), 7)
        assert ids.tolist() == whole[: end + 1].tolist() and len(logprobs) == end + 1
    lengths = [len(ids) for ids, _ in found]
    assert seen == [sum(n > t for n in lengths) for t in range(8)] and seen[-1] < seen[0] == 6
    seen.clear()
    # one token, and nobody is left
    assert [ids.tolist() for ids, _ in sample(model, stop_ids=range(V))] == [whole[:1].tolist() for whole, _ in free] and seen == [6]


@pytest.mark.parametrize("family", ["llama", "t5 v1.0"])
def test_tokens_are_drawn_from_the_softmax_at_the_temperature(family):
    """Chi-square of 4,000 first tokens, of tokens with fewer than 5 expected as one; mean k - 1, deviation sqrt(2 (k - 1))."""
    model, n = small_model(family, seed=2), 4000
    tokens = np.concatenate([ids for ids, _ in sample(model, [LONG[0]] * n, temperature=0.7, limit=1)])
    counts = np.bincount(tokens, minlength=V)
    for temperature, fits in ((0.7, True), (1.0, False)):
        with torch.no_grad():
            expected = n * slow_log_probabilities(model, LONG[0], [5], temperature)[0].double().exp().numpy()
        is_rare = expected < 5
        observed, wanted = (np.append(x[~is_rare], x[is_rare].sum() if is_rare.any() else []) for x in (counts, expected))
        chi, k = ((observed - wanted) ** 2 / wanted).sum(), len(wanted)
        assert k > 10 and (chi < k - 1 + 4 * math.sqrt(2 * (k - 1))) == fits


def test_successive_tokens_are_drawn_independently():
    """A model that ignores its text: pairs of successive tokens are as frequent as the product says."""
    model = small_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as any
    pairs = np.stack([ids for ids, _ in sample(model, [LONG[2]] * 4000, limit=2)])
    table = np.zeros((8, 8))
    np.add.at(table, (pairs[:, 0] % 8, pairs[:, 1] % 8), 1)
    assert ((table - 62.5) ** 2 / 62.5).sum() < 63 + 4 * math.sqrt(126)


def test_no_prompts_have_no_replies():
    assert sample(small_model("llama"), []) == [] == sample(small_model("t5 v1.0"), [])


# ------------------------------------------------------------------------------------------------ order


def test_every_reply_is_in_one_minibatch_of_each_epoch_as_a_pure_function_of_seed_rollout_and_epoch():
    args = arguments("--num_rollouts", 13, "--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--seed", 3)
    found = {(rollout, epoch): rl_ppo.minibatches(args, rollout, epoch) for rollout in range(2) for epoch in range(3)}
    for (rollout, epoch), steps in found.items():
        assert [len(ids) for ids in steps] == [4, 4, 4, 1] and sorted(np.concatenate(steps)) == list(range(13))
        assert all(np.array_equal(a, b) for a, b in zip(steps, rl_ppo.minibatches(args, rollout, epoch)))
    assert len({tuple(np.concatenate(steps)) for steps in found.values()}) == 6
    args.seed = 4
    assert not np.array_equal(np.concatenate(rl_ppo.minibatches(args, 0, 0)), np.concatenate(found[0, 0]))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("family", ["llama", "t5 v1.0"])
def test_the_forward_steps_of_all_ranks_hold_every_reply_of_a_step_once(monkeypatch, world, family):
    args = arguments("--num_rollouts", 13, "--train_batch_size", 2, "--gradient_accumulation_steps", 3)
    buffer = types.SimpleNamespace(prompts=ragged(range(1, 14), 5), replies=ragged([1, 9, 2, 30, 4, 4, 3, 8, 2, 1, 5, 6, 7], 6))
    buffer.lengths, buffer.prompt_lengths = (np.array([len(x) for x in part]) for part in (buffer.replies, buffer.prompts))
    monkeypatch.setattr(common, "chunk_tokens", lambda vocabulary: 5)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for ids in rl_ppo.minibatches(args, 0, 1):
        ranks = []
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            ranks.append(rl_ppo.micro_batches(args, ids, buffer, V, 0, START.get(family)))
        rows = [i for batches, _ in ranks for _, mine, _ in batches for i in mine]
        assert sorted(rows) == sorted(ids) and {n for _, n in ranks} == {buffer.lengths[ids].sum()} and {len(batches) for batches, _ in ranks} == {3}
        assert len({tuple(n_chunks for *_, n_chunks in batches) for batches, _ in ranks}) == 1  # under ZeRO-3 all must call the head alike
        for batch, mine, n_chunks in (forward for batches, _ in ranks for forward in batches):
            targets = np.concatenate([buffer.replies[i] for i in mine] or [[]])
            assert batch["target_ids"].tolist() == targets.tolist() and n_chunks >= max(1, math.ceil(len(targets) / 5))
            if family == "llama":  # what predicts a token is just before it
                assert batch["input_ids"].flatten()[batch["target_index"] + 1].tolist() == targets.tolist() if mine else True


def prompt_order(seed=0, num_rollouts=6, n_samples=1, sizes=((10, None),)):
    args = arguments("--seed", seed, "--num_rollouts", num_rollouts, "--n_samples", n_samples)
    return rl_ppo.PromptOrder(args, [types.SimpleNamespace(counts={"train": size}, amount=amount) for size, amount in sizes])


def test_every_prompt_is_sampled_once_an_epoch_and_epochs_follow_without_a_gap():
    places = [i for rollout in range(5) for i in prompt_order().ids(rollout)]  # 30 prompts are three epochs of 10; a rollout has 6
    epochs = [places[n: n + 10] for n in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2] != epochs[0]
    order = prompt_order()
    assert all(order.ids(rollout) == places[rollout * 6: rollout * 6 + 6] for rollout in (4, 0, 3, 1, 2))
    assert prompt_order(seed=1).ids(0) != places[:6] and len(prompt_order(n_samples=3).ids(0)) == 2
    assert sorted(prompt_order(num_rollouts=25).ids(0)) == sorted([*range(10)] * 2 + prompt_order(num_rollouts=25).ids(0)[20:])  # more than an epoch


def test_a_data_set_with_an_amount_gives_that_many_prompts_an_epoch():
    order = prompt_order(num_rollouts=9, sizes=((4, None), (10, 0.3), (20, 2)))
    assert order.per_epoch == order.per_rollout == 9
    epochs = [order.ids(rollout) for rollout in range(3)]
    for epoch in epochs:
        found = [sum(low <= i < high for i in epoch) for low, high in ((0, 4), (4, 14), (14, 34))]
        assert found == [4, 3, 2] and len(set(epoch)) == 9
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 3  # sampled anew


# ------------------------------------------------------------------------------------------------ guards


def kl_sample(n, mean, seed=0, deviation=0.05, shift=0.0):
    """(sampled, policy's, reference's log-probabilities) of n one-token replies whose log-ratio to the reference is normal."""
    d = np.random.default_rng(seed).normal(mean, deviation, n)
    return [(ids, np.array([-1 + x + shift])) for ids, x in enumerate(d)], [np.array([-1 + x]) for x in d], [np.array([-1.0])] * n


def fresh():
    return {"kl_stats": [0, 0.0, 0.0]}


def test_a_rollout_by_another_distribution_than_the_trained_one_is_refused(capsys):
    rl_ppo.check_rollout("fp32", *kl_sample(128, 0.05**2 / 2), fresh(), 0)
    assert rl_ppo.sampler_gap(*kl_sample(128, 0, shift=0.25)[:2]) == pytest.approx(0.25)
    assert rl_ppo.sampler_gap([(np.array([5]), None)], [np.ones(1)]) == 0
    for rollout, said in ((kl_sample(128, 0, shift=0.01), "log-probabilities differ by 0.01"), (kl_sample(128, -0.05), "KL to the reference is -0.0"),
                          (kl_sample(128, np.nan), "differ by nan")):
        with pytest.raises(SystemExit) as stop:
            rl_ppo.check_rollout("fp32", *rollout, fresh(), 7)
        errors = capsys.readouterr().err
        assert stop.value.code == 2 and said in errors and "step 7" in errors
    rl_ppo.check_rollout("bf16", *kl_sample(128, 0, shift=0.01), fresh(), 0)
    state = fresh()
    for seed in range(24):  # small rollouts are judged together
        rl_ppo.check_rollout("fp32", *kl_sample(4, -0.05, seed), state, 7)
    with pytest.raises(SystemExit):
        rl_ppo.check_rollout("fp32", *kl_sample(4, -0.05, 24), state, 7)


@pytest.mark.parametrize("n", [1, 2, 4, 16, 128])
def test_rollouts_of_any_size_that_were_drawn_from_the_policy_are_accepted(n):
    """Log-ratios of deviation s have mean s^2 / 2; a few replies near the reference may all be below 0."""
    state = fresh()
    for seed in range(400):
        rl_ppo.check_rollout("fp32", *kl_sample(n, 0.05**2 / 2, seed), state, 0)


@pytest.mark.parametrize("changes, said", [({}, None), ({"loss": math.nan}, "--learning_rate"), ({"loss": -math.inf}, "the loss is -inf"),
                                           ({"log_ratio": 201}, "--max_log_ratio")])
def test_an_update_that_is_not_finite_or_goes_too_far_is_not_applied(capsys, changes, said):
    found = {"loss": 1.0, "log_ratio": 199.0, **changes}
    if said is None:
        return rl_ppo.check_update(arguments(), "fp32", found, 100, torch.zeros(()), False, 3)
    with pytest.raises(SystemExit) as stop:
        rl_ppo.check_update(arguments(), "fp32", found, 100, torch.zeros(()), False, 3)
    assert stop.value.code == 2 and said in (errors := capsys.readouterr().err) and "step 4" in errors
    if "log_ratio" in changes:
        rl_ppo.check_update(arguments("--max_log_ratio", 0), "fp32", found, 100, torch.zeros(()), False, 3)


def test_trends_of_length_and_ends_are_told_once(messages):
    state = {"start": None, "warned": []}
    for tokens, ends in ((10, 0.8), (19, 0.5), (6, 0.41), (21, 0.8), (30, 0.39), (4, 0.1)):
        rl_ppo.warn_of_trends(arguments(), state, {"reply_tokens": tokens, "eos_rate": ends}, 5)
    assert len(messages) == 2 and "replies have 21 tokens, at the start 10" in messages[0] and "39 % of the replies end" in messages[1]
