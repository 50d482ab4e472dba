"""rl_ppo.py: golden vectors, whole rollouts against a slow plain reference, rewards, runs."""

import json
import pathlib
import shutil

import conftest
import numpy as np
import pytest
import test_runs
import torch
import torch.nn.functional as F
import transformers

import clf
import common
import rl_ppo

STAGES = ("zero0", "zero1", "zero2", "zero3")
KINDS = ("llama", "t5")
REWARD = """
def length(prompts, replies, records):
    return [len(reply) / 10 for reply in replies]

def shortness(prompts, replies, records):
    return [-len(reply) / 10 for reply in replies]

def wrong(prompts, replies, records):
    return [float("nan") for reply in replies]

def broken(prompts, replies, records):
    return records[0]["nope"]
"""


def make_policy(kind, **changes):
    """models/<kind>, whose replies often end, for 60 tokens end one; data/d.json, reward.py"""
    make = conftest.make_causal if kind in conftest.CAUSAL else conftest.make_model
    path = pathlib.Path(make(kind, **changes))
    about = {"script": "x", "raw_prompt": True, "stop_ids": list(range(20, 80))}
    (path / "rawtune.json").write_text(json.dumps(about))
    records = conftest.pairs(20)
    conftest.write_data("d", records[:10], records[10:16], test=records[16:])
    pathlib.Path("reward.py").write_text(REWARD)
    return path


SMALL = "--data d --max_new_tokens 6 --num_layers_unfrozen 0 --ppo_epochs 2 --learning_rate 0.003"


def train(name, flags="", kind="llama", reward="--reward_fn reward.py:length"):
    """models/<name> of data/d.json: 8 replies a rollout, of 2 x 2 steps"""
    words = f"--policy {kind} --training_run_name {name} --num_rollouts 8 --train_batch_size 4"
    words = f"{words} {SMALL} --max_steps 8 {reward} {flags}"
    return conftest.run(*words.split(), module=rl_ppo)


def predictions(path):
    return json.loads(pathlib.Path("models", path).read_text())


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# ---------------------------------------------------------------------------------- golden vectors

REWARDS = tensor([-0.05, 0.02, -0.01, 1], [0, -0.03, 0.5, 9])  # 9: padding, which must not leak
VALUES = tensor([0.1, 0.2, 0.3, 0.4], [0.5, 0.4, 0.3, 9])
IS_REPLY = torch.tensor([[True] * 4, [True] * 3 + [False]])
LATE = tensor([0, 0, 0, 1])


def test_advantages_by_hand():
    advantages, returns = rl_ppo.gae(REWARDS, VALUES, IS_REPLY, 1.0, 0.95)
    expected = tensor([0.75965, 0.747, 0.66, 0.6], [-0.043, 0.06, 0.2, 0])
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns[1], tensor(0.457, 0.46, 0.5, 0))
    whitened = rl_ppo.whiten(advantages, IS_REPLY)
    expected = tensor(0.973092, 0.936172, 0.682257, 0.507143, -1.369496, -1.068883, -0.660284)
    torch.testing.assert_close(whitened[IS_REPLY], expected, atol=1e-6, rtol=0)
    assert whitened[1, 3] == 0
    advantages, _ = rl_ppo.gae(REWARDS, VALUES, IS_REPLY, 0.9, 0.95)
    expected = tensor([0.518517, 0.571365, 0.563, 0.6], [-0.130595, 0.011, 0.2, 0])
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0)
    _, returns = rl_ppo.gae(LATE, LATE, LATE == LATE, 0.9, 0.95)
    expected = tensor([0.9**3 * 0.95**2, 0.9**2 * 0.95, 0.9, 1])
    torch.testing.assert_close(returns, expected)


def test_rewards_groups_and_the_price_of_kl_by_hand():
    kl = tensor([2, 4, 0], [1, 0, 0])
    rewards = rl_ppo.token_rewards(kl, tensor(3, 5), torch.tensor([3, 1]), 0.5)
    assert rewards.tolist() == [[-1, -2, 3], [4.5, 0, 0]]
    scores = tensor(1, 3, 5, 5)
    assert rl_ppo.group_advantages(scores, 2, "rloo").tolist() == [-2, 2, 0, 0]
    grpo = rl_ppo.group_advantages(scores, 2, "grpo")
    torch.testing.assert_close(grpo, tensor(-1, 1, 0, 0) / (2**0.5 + 1e-4))
    args = rl_ppo.parse_args("--target_kl 6 --num_rollouts 100 --kl_horizon 1000 --data d".split())
    assert rl_ppo.next_beta(0.1, 6.6, args) == pytest.approx(0.101)
    assert rl_ppo.next_beta(0.1, 60, args) == pytest.approx(0.102)
    assert rl_ppo.next_beta(0.1, 0, args) == pytest.approx(0.098)
    args.target_kl = 0
    assert rl_ppo.next_beta(0.1, 60, args) == 0.1


@pytest.mark.parametrize("kind", ["none", "std", "norm"])
def test_scores_are_scaled_by_all_so_far(kind):
    args = rl_ppo.parse_args(f"--data d --reward_scaling {kind} --cliprange_reward 2".split())
    rng = np.random.default_rng(0)
    sums = [0, 0.0, 0.0]
    seen = np.zeros(0)
    for n in (5, 3, 8):
        scores = rng.normal(3, 2, n)
        seen = np.append(seen, scores)
        mean = seen.mean() if kind == "norm" else 0
        deviation = 1 if kind == "none" else seen.std(ddof=1)
        expected = ((scores - mean) / deviation).clip(-2, 2)
        np.testing.assert_allclose(rl_ppo.scale_scores(args, scores, sums), expected)


# ------------------------------------------------------------------- a slow plain reference of it


def policy_loss(new, old, advantages, cliprange):
    """(n,) Schulman et al. 2017, equation 7."""
    ratio = (new - old).exp()
    lowest, highest = 1 - cliprange, 1 + cliprange
    return -torch.minimum(ratio * advantages, ratio.clip(lowest, highest) * advantages)


def value_loss(new, old, returns, cliprange):
    clipped = torch.minimum(torch.maximum(new, old - cliprange), old + cliprange)
    return 0.5 * torch.maximum((new - returns) ** 2, (clipped - returns) ** 2)


def test_the_losses_of_the_reference_by_hand():
    new, old = tensor(-1, -0.5, -2, -0.3), tensor(-1.2, -0.5, -1.5, -0.9)
    loss = policy_loss(new, old, tensor(1, -0.5, -1, 2), 0.2).mean()
    assert loss == pytest.approx(-0.575)
    loss = value_loss(tensor(0.5, 1.2, -0.3), tensor(0.1, 1, 0), tensor(1, 1.1, -0.5), 0.2).mean()
    assert loss == pytest.approx(0.098333, abs=1e-6)


def plain_scores(model, head, prompt, reply, temperature):
    """(log-probabilities, values) (n,) of one reply alone, by the model's own forward."""
    reply = torch.tensor(reply)
    if model.config.is_encoder_decoder:
        labels = {"labels": reply[None]}
        output = model(input_ids=torch.tensor([prompt]), output_hidden_states=True, **labels)
        logits, states = output.logits[0], output.decoder_hidden_states[-1][0]
    else:
        input_ids = torch.cat([torch.tensor(prompt), reply])[None]
        output = model(input_ids=input_ids, output_hidden_states=True)
        logits, states = output.logits[0, :-1], output.hidden_states[-1][0, :-1]
    logits, states = logits[-len(reply) :], states[-len(reply) :]
    log_probs = F.log_softmax(logits / temperature, dim=1)
    values = head(states)[:, 0] if head else torch.zeros(len(reply))
    return log_probs[range(len(reply)), reply], values


def plain_gae(rewards, values, gamma, lam):
    """By the definition: the sum of (gamma lam)^k times the k-th next error."""
    values = [*values.tolist(), 0.0]
    n = len(rewards)
    errors = [float(rewards[t]) + gamma * values[t + 1] - values[t] for t in range(n)]
    sums = [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, n)) for t in range(n)]
    return torch.tensor(sums)


def plain_run(path, args, plan, rollouts):
    """Losses of the rollouts and the state dict, from the sampled replies and their scores."""
    auto_class = rl_ppo.auto_class_of(transformers.AutoConfig.from_pretrained(path))
    model, reference = (auto_class.from_pretrained(path) for _ in range(2))
    head = rl_ppo.new_value_head(model, args) if args.advantage == "gae" else None
    weights = [*model.parameters(), *(head.parameters() if head else [])]
    optimizer = torch.optim.AdamW(weights, args.learning_rate, weight_decay=0)
    beta, losses = args.init_kl_coef, []
    for index, (examples, replies, scores) in enumerate(rollouts):
        rows, kls = [], []
        with torch.no_grad():
            for example, reply, score in zip(examples, replies, scores):
                inputs = (example.input_ids, reply, args.temperature)
                old, values = plain_scores(model, head, *inputs)
                ref, _ = plain_scores(reference, None, *inputs)
                rewards = -beta * (old - ref)
                rewards[-1] += score
                advantages = plain_gae(rewards, values, args.gamma, args.lam)
                kls.append(float((old - ref).sum()))
                rows.append([inputs, old, ref, values, advantages, advantages + values])
        if args.advantage == "gae":
            deviation, mean = torch.std_mean(torch.cat([row[4] for row in rows]))
            for row in rows:
                row[4] = (row[4] - mean) / deviation
        else:
            for i, row in enumerate(rows):
                group = range(i // 4 * 4, i // 4 * 4 + 4)
                price = beta if args.advantage == "rloo" else 0
                net = torch.tensor([scores[k] - price * kls[k] for k in group])
                others = (net.sum() - net[i % 4]) / 3
                row[4] = net[i % 4] - others
                if args.advantage == "grpo":
                    row[4] = (net[i % 4] - net.mean()) / (net.std() + 1e-4)
        lengths = np.array([len(reply) for reply in replies])
        rollout_loss = rollout_tokens = 0
        for ids, _ in plan.updates(index, lengths):
            total = 0
            for i in ids:
                inputs, old, ref, old_values, advantages, returns = rows[i]
                new, values = plain_scores(model, head, *inputs)
                total += policy_loss(new, old, advantages, args.cliprange).sum()
                if head:
                    clip = args.cliprange_value
                    total += args.vf_coef * value_loss(values, old_values, returns, clip).sum()
                if args.advantage == "grpo":
                    total += beta * ((ref - new).exp() - 1 - (ref - new)).sum()
            rollout_loss += total.item()
            rollout_tokens += lengths[ids].sum()
            optimizer.zero_grad()
            (total / lengths[ids].sum()).backward()
            torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
            optimizer.step()
        losses.append(rollout_loss / rollout_tokens)
        error = np.clip(np.mean(kls) / args.target_kl - 1, -0.2, 0.2)
        beta *= 1 + error * args.num_rollouts / args.kl_horizon
    return losses, model.state_dict()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_two_rollouts_are_trained_as_a_slow_plain_reference_trains(kind, advantage, monkeypatch):
    path = make_policy(kind)
    rollouts, plans = [], []
    sample, plan_class = rl_ppo.sample, rl_ppo.Plan

    def record_plan(*arguments):
        plans.append(plan_class(*arguments))
        return plans[-1]

    def record(args, engine, prompts, examples, *others):
        replies = sample(args, engine, prompts, examples, *others)
        if len(examples) == args.num_rollouts:
            ids = [ids for ids, _ in replies]
            scores = [len(rl_ppo.decode(prompts, reply)) / 10 for reply in ids]
            rollouts.append((examples, ids, scores))
        return replies

    monkeypatch.setattr(rl_ppo, "sample", record)
    monkeypatch.setattr(rl_ppo, "Plan", record_plan)
    flags = f"--advantage {advantage} --n_samples 4 --temperature 0.8 --gamma 0.98 --vf_coef 0.7"
    flags += " --train_batch_size 2 --gradient_accumulation_steps 2 --weight_decay 0"
    flags += " --init_kl_coef 0.3 --kl_horizon 20 --target_kl 0.1"
    assert train("run", flags, kind) == 0
    args = plans[0].args
    losses, expected = plain_run(path, args, plans[0], rollouts)
    rows = conftest.metrics("run", "train")
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=2e-5)
    assert rows[-1]["ppo/kl"] > 0.001 and rows[-1]["ppo/clip_fraction"] > 0.01
    weights = conftest.weights("run")
    for name, weight in weights.items():
        distance = (weight - expected[name]).norm() / expected[name].norm()
        assert distance < 1e-4, name
    lengths = {len(ids) for _, replies, _ in rollouts for ids in replies}
    assert len(lengths) > 3
