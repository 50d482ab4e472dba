"""rl_ppo.py: golden vectors, whole rollouts against a slow plain reference, rewards, runs."""

import json
import pathlib
import re
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
    auto_class = common.auto_class_of(transformers.AutoConfig.from_pretrained(path))
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
        replies, log_probs = sample(args, engine, prompts, examples, *others)
        if len(examples) == args.num_rollouts:
            scores = [len(prompts.decode(reply)) / 10 for reply in replies]
            rollouts.append((examples, replies, scores))
        return replies, log_probs

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


# ---------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("kind", [*KINDS, "gpt2", "bart"])
def test_a_reply_depends_on_its_key_and_not_on_the_rows_beside_it(kind):
    make_policy(kind)
    for name, n_rows in (("few", 3), ("all", 32)):
        flags = f"--no_train --eval_temperature 1 --max_new_tokens 12 --rollout_batch_size {n_rows}"
        assert train(name, flags, kind) == 0
    few, every = (
        conftest.read_json(f"models/{n}/temperature=1.00_n=1_step=0.json") for n in ("few", "all")
    )
    assert few == every
    texts = [row["generations"][0]["lm_postprocess"] for row in few]
    assert len(set(texts)) == len(texts) and len(set(map(len, texts))) > 3
    row = conftest.metrics("few", "eval")[0]
    assert row["eval/eos_rate"] > 0 and 1 < row["eval/reply_tokens"] < 12


def test_prompts_come_in_epochs_without_gaps_and_replies_in_steps(monkeypatch):
    make_policy("llama")
    words = f"--policy llama --num_rollouts 8 --n_samples 2 --train_batch_size 4 {SMALL}"
    args = rl_ppo.parse_args(f"{words} --eval_steps 5 --save_steps -1 --num_epochs 3".split())
    config = transformers.AutoConfig.from_pretrained("models/llama")
    # half the logits that the 4 replies of a step, of 6 tokens, may have
    monkeypatch.setattr(rl_ppo, "MAX_LOGITS", 4 * 6 * config.vocab_size // 2)
    plan = rl_ppo.Plan(args, rl_ppo.Data({}, [10], [None]), config)
    assert (plan.steps_per_rollout, plan.steps_per_epoch, plan.max_steps) == (4, 8, 24)
    assert (args.eval_steps, args.save_steps) == (8, -1)
    ids = sum((plan.prompts(index) for index in range(5)), [])
    assert ids[::2] == ids[1::2]
    epochs = [ids[::2][:10], ids[::2][10:]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]
    updates = plan.updates(0, np.arange(8) + 1)
    for first, second in (updates[:2], updates[2:]):
        assert sorted([*first[0], *second[0]]) == list(range(8))
    for ids, pieces in updates:
        assert len(pieces) == 2
        assert sorted(ids) == sorted(np.concatenate(pieces))


def test_what_is_no_reply_never_counts():
    texts = [([5, 6, 7], [20, 21]), ([9], [9]), ([8], [22, 23, 24])]
    batch = rl_ppo.collate(texts, [0, 2], None, "cpu")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 20, 21], [8, 22, 23, 24, 0]]
    assert batch["labels"].tolist() == [20, 21, 22, 23, 24]
    assert batch["label_index"].tolist() == [2, 3, 5, 6, 7]
    batch = rl_ppo.collate(texts, [0, 2], 0, "cpu")
    assert batch["decoder_input_ids"].tolist() == [[0, 20, 0], [0, 22, 23]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["label_index"].tolist() == [0, 1, 3, 4, 5]
    for start_id in (None, 0):
        assert len(rl_ppo.collate(texts, [], start_id, "cpu")["labels"]) == 0


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "t5", "t5v1.1", "bart"])
def test_log_probabilities_are_those_of_the_model(kind):
    make_policy(kind)
    auto_class = common.auto_class_of(transformers.AutoConfig.from_pretrained(f"models/{kind}"))
    model = auto_class.from_pretrained(f"models/{kind}")
    texts = [([5, 6, 7, 9], [20, 21]), ([8, 4], [22, 23, 24])]
    batch = rl_ppo.collate(texts, [0, 1], rl_ppo.start_id_of(model.config), "cpu")
    expected = torch.cat([plain_scores(model, None, *text, 0.7)[0] for text in texts])
    expected.exp().sum().backward()
    grads = conftest.gradients(model)
    log_probs, entropies, _ = rl_ppo.Policy(model, 0.7)(batch)
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-5)
    assert (entropies > 0).all()
    log_probs.exp().sum().backward()
    for name, grad in conftest.gradients(model).items():
        assert (grad - grads[name]).norm() <= 1e-4 * grads[name].norm() + 1e-7, name


# ----------------------------------------------------------------------------------------- rewards


def make_judge(kind, name):
    """models/<name>, a reward model of clf.py."""
    lines = [{"prompt": f"Q {i}?", "chosen": "yes " * i, "rejected": "no"} for i in range(1, 9)]
    conftest.write_data("ranked", lines[:6], lines[6:])
    words = f"--model_init_name {kind} --data ranked --loss pairwise --max_steps 3 --max_length 40"
    words += f" --learning_rate 0.01 --training_run_name {name} --template"
    conftest.run(*words.split(), "{prompt}: {reply}\n", module=clf)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_clf_gives_the_scores_that_clf_gives(kind):
    make_policy(kind)
    make_judge(kind, "judge")
    assert train("run", "--no_train --eval_temperature 1", kind, "--reward_model judge") == 0
    rows = conftest.read_json("models/run/temperature=1.00_n=1_step=0.json")
    replies = [row["generations"][0] for row in rows]
    texts = []
    for row, reply in zip(rows, replies):
        texts.append({"prompt": row["prompt"], "reply": reply["lm_postprocess"] or "-"})
    conftest.write_data("texts", [], texts)
    words = ["--no_train", "--model_init_name", "judge", "--data", "texts"]
    conftest.run(*words, "--training_run_name", "scored", module=clf)
    expected = [row["reward"] for row in conftest.read_json("models/scored/preds.json")]
    found = [reply["reward"] for reply in replies if reply["lm_postprocess"]]
    assert len(found) > 2 and max(found) > min(found)
    pairs = zip(expected, texts)
    assert found == pytest.approx([e for e, text in pairs if text["reply"] != "-"], abs=1e-4)


def test_what_the_readme_says_happens():
    page = (conftest.ROOT / "README.md").read_text()
    section = page.split("\n## A reward: rl_ppo.py\n")[1].split("\n## ")[0]
    make_policy("llama").rename("models/assistant")
    make_judge("assistant", "reward")
    lines = section.split("```json\n")[1].split("```")[0]
    pathlib.Path("data/myprompts.jsonl").write_text(lines)
    commands = re.findall("^python rl_ppo.py (.+)", section, re.MULTILINE)
    for words in commands:
        words += " --max_steps 4 --num_rollouts 4 --train_batch_size 4 --max_new_tokens 4"
        assert conftest.run(*words.split(), module=rl_ppo) == 0
    assert pathlib.Path("models/solver/model.safetensors").exists()
    assert pathlib.Path("models/pleaser/adapter_model.safetensors").exists()


TEMPLATE = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
TEMPLATE += "{{ 'assistant:' if add_generation_prompt }}"


def test_prompts_are_read_as_they_were_trained():
    def read(record, kind, is_raw):
        tokenizer = transformers.AutoTokenizer.from_pretrained(conftest.ROOT / "models" / kind)
        tokenizer.chat_template = TEMPLATE
        prompts = common.Prompts(tokenizer, is_raw)
        example = rl_ppo.to_example(prompts, kind == "tiny-t5", set(), "d", record)
        assert example.text == "a b"
        return tokenizer.decode(example.input_ids)

    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a b"}]
    chat = read({"messages": turns}, "tiny-llama", False)
    assert chat == "system:s</s>user:a b</s>assistant:"
    assert read({"prompt": "a b"}, "tiny-llama", False) == "user:a b</s>assistant:"
    assert read({"prompt": "a b"}, "tiny-llama", True) == "<s>a b"
    assert read({"prompt": "a b"}, "tiny-t5", True) == "a b</s>"


def test_special_tokens_of_a_reply_reach_the_reward():
    make_policy("t5")
    tokenizer = transformers.AutoTokenizer.from_pretrained("models/t5")
    prompts = common.Prompts(tokenizer, is_raw=True)
    ids = tokenizer("a<extra_id_0> b").input_ids
    assert prompts.decode([0, *ids]) == "a<extra_id_0> b"


# ------------------------------------------------------------------------------------- whole runs


def test_a_run_leaves_what_the_contract_names_and_the_best_by_the_held_out_reward():
    make_policy("llama")
    flags = "--heldout_reward_fn reward.py:shortness --max_steps 16 --eval_steps 8"
    assert train("run", flags) == 0
    rows = conftest.metrics("run", "eval")
    assert [row["step"] for row in rows] == [0, 8, 16]
    held_out = {row["step"]: row["eval/heldout_reward"] for row in rows[1:]}
    best = max(held_out, key=lambda step: (held_out[step], step))
    folder = pathlib.Path("models/run")
    state = conftest.read_json(folder / "checkpoint-16/state.json")
    assert state["best_step"] == best
    about = conftest.read_json(folder / "rawtune.json")
    assert about["script"] == "rl_ppo.py" and about["raw_prompt"] and about["task"] == "chat"
    assert about["stop_ids"] == [2, *range(20, 80)]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    checkpoint = conftest.weights(f"run/checkpoint-{best}")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, checkpoint[name]), name
    row = conftest.read_json(f"models/run/test_temperature=0.00_n=1_step={best}.json")[0]
    assert set(row) == {"prompt", "generations", "demonstration", "orig_d", "dataset"}
    assert set(row["generations"][0]) == {"lm_postprocess", "reward", "heldout_reward"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(row["prompt"], return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert row["generations"][0]["lm_postprocess"] in tokenizer.decode(output[0])
    assert train("run", flags) == 0  # finished


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_top_layers_are_trained(kind):
    make_policy(kind)
    before = conftest.weights(kind)
    assert train("run", "--num_layers_unfrozen 1", kind) == 0
    changed = {n for n, weight in conftest.weights("run").items() if (weight != before[n]).any()}
    assert changed and all("1." in n or "norm" in n or n == "lm_head.weight" for n in changed)
    assert not any("encoder" in name or "layers.0" in name for name in changed)


def test_the_reference_of_a_new_adapter_is_the_model_without_it():
    make_policy("llama")
    lora = "--lora_rank 4 --learning_rate 0.02"
    assert train("adapter", lora) == 0
    rows = conftest.metrics("adapter", "train")
    assert rows[0]["ppo/kl"] == 0 and rows[1]["ppo/kl"] > 0.01
    # a copy of a trained one: its KL begins at 0 again
    assert train("on", kind="adapter", flags="--max_steps 4 --learning_rate 0.02") == 0
    assert conftest.metrics("on", "train")[0]["ppo/kl"] == pytest.approx(0, abs=1e-6)
    assert pathlib.Path("models/on/adapter_model.safetensors").exists()
    assert rl_ppo.parse_args("--policy adapter --data d".split()).learning_rate == 1e-4
    assert rl_ppo.parse_args("--policy llama --data d".split()).learning_rate == 1e-6


def sharper(model, batch, run_model=rl_ppo.run_model):
    states, logits = run_model(model, batch)
    return states, 10 * logits


@pytest.mark.parametrize(
    "name, replacement, message",
    [
        ("run_model", sharper, "log-probabilities while"),
        ("switch_off_dropout", lambda model: None, "the log-ratio before the first update"),
    ],
)
def test_invariants_stop_a_run(name, replacement, message, monkeypatch, refused):
    make_policy("gpt2", resid_pdrop=0.1)
    monkeypatch.setattr(rl_ppo, name, replacement)
    monkeypatch.setitem(rl_ppo.SAMPLER_BOUND, "fp32", 0.5)
    assert message in refused(train, "run", kind="gpt2")


WORDS = [
    (
        "--reward_fn nope.py:length",
        "nope.py:length: expected FILE:NAME of a function, found FileNotFound",
    ),
    (
        "--reward_fn reward.py:nope",
        "reward.py:nope: expected FILE:NAME of a function, found KeyError",
    ),
    ("--reward_fn reward.py:wrong", "no finite number for each of 6"),
    ("--reward_fn reward.py:broken", "fails with KeyError('nope') (reward.py, line 12)"),
    ("--reward_fn reward.py:length --reward_model x", "exclude each other"),
    ("--reward_model llama", "expected a run of clf.py"),
    ("--reward_fn reward.py:length --temperature 0.001", "have no alternatives to learn from"),
    ("--reward_fn reward.py:length --advantage rloo", "compares replies: --n_samples 4"),
    ("--reward_fn reward.py:length --num_rollouts 9 --n_samples 2", "expected a multiple of 2"),
    ("--reward_fn reward.py:length --policy nope", "models/nope not found; there is: "),
    ("--reward_model nope", "models/nope not found; there is: "),
    ("--reward_fn reward.py:length --policy judge", "judge is a run of clf.py, which scores"),
    ("--reward_fn reward.py:length --precision fp16", "fp16"),
    ("--reward_fn reward.py:length --data late", "the last message has to be the user's"),
    ("--reward_fn reward.py:length --data turns", "several messages need a chat template"),
    ("--reward_fn reward.py:length --seq_length 8", "no training records"),
]


@pytest.mark.parametrize("words, message", WORDS)
def test_mistakes_have_words(words, message, refused):
    judge = make_policy("llama").with_name("judge")
    shutil.copytree("models/llama", judge)
    (judge / "rawtune.json").write_text('{"script": "clf.py"}')
    ask = {"role": "user", "content": "a"}
    reply = {"role": "assistant", "content": "b"}
    conftest.write_data("late", [{"messages": [ask, reply]}], [{"prompt": "a"}])
    conftest.write_data("turns", [{"messages": [ask, reply, ask]}], [{"prompt": "a"}])
    assert message in refused(train, "run", words, reward="")


# -------------------------------------------------------------------------------------- slow tests

SLOW = f"--policy llama --num_rollouts 16 --n_samples 2 {SMALL} --max_steps 16 --logging_steps 4"
SLOW += " --reward_fn reward.py:length --reward_scaling norm --rollout_batch_size 5"


@pytest.mark.slow
def test_ranks_accumulation_and_stages_give_the_same_weights():
    make_policy("llama")
    words = f"{SLOW} --train_batch_size 4 --gradient_accumulation_steps 2 --eval_temperature 1"
    process = conftest.start_many(test_runs.at_stages(words.split()), 2, rl_ppo)
    alone = f"{SLOW} --train_batch_size 8 --eval_temperature 1 --training_run_name one"
    conftest.run(*alone.split(), module=rl_ppo)
    conftest.finish(process)
    expected = conftest.read_json("models/one/temperature=1.00_n=1_step=16.json")
    for name in test_runs.STAGES:
        assert conftest.distance("one", name) < 1e-5, name
        found = conftest.read_json(f"models/{name}/temperature=1.00_n=1_step=16.json")
        for row, other in zip(found, expected):
            assert row["generations"][0]["reward"] == other["generations"][0]["reward"]
        for key in ("loss", "grad_norm", "ppo/kl", "ppo/score"):
            one = test_runs.losses("one", key)
            assert test_runs.losses(name, key) == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits():
    make_policy("llama")
    words = f"{SLOW} --train_batch_size 8 --save_steps 4 --target_kl 0.1 --kl_horizon 30".split()
    test_runs.check_kills(words, rl_ppo)
    for stage in test_runs.STAGES:
        keys = ("beta", "score_sums")
        states = [
            conftest.read_json(f"models/{n}-{stage}/checkpoint-16/state.json")
            for n in ("whole", "killed")
        ]
        assert [states[0][key] for key in keys] == [states[1][key] for key in keys]


@pytest.mark.slow
def test_the_demo_learns():
    assert conftest.run(module=rl_ppo) == 0
    assert conftest.metrics("ppo-demo", "eval")[-1]["eval/reward"] >= 0.8
