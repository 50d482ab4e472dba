"""rl_ppo.py's runs: what they leave, their guards, stopping and continuing, adapters, critics, other advantages. All in this process."""

import copy
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, clf_flags, distance, in_process, moments, ppo_flags, rows, stop_at, weights, write_ppo_mount

import common_v1 as common
import rl_ppo

pytestmark = pytest.mark.usefixtures("no_pictures")  # but `shared` is made before it
TIMES = ("time", "time/sample", "time/reward", "time/score", "time/update", "tokens_per_sec", "peak_memory_gb")
T5_CRITIC = {"policy": "tiny", "reward_fn": None, "reward_model": "clf-tiny", "critic": "reward_model"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A mount with two reward models, models/clf-llama and /clf-tiny, and models/run: 4 rollouts of the Llama. Tests only read
    these, and write runs of other names."""
    mount, before = write_ppo_mount(tmp_path_factory.mktemp("ppo")), dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "plot_curves", lambda *_: None)
        for name in ("llama", "tiny"):
            assert in_process("clf", patch)(clf_flags(mount, f"clf-{name}", data="pairs", model_init_name=name, loss="pairwise")) == 0
        assert in_process("rl_ppo", patch)(ppo_flags(mount)) == 0
    os.environ.clear()
    os.environ.update(before)
    return mount


def told(run, split="train"):
    """The rows of metrics.jsonl without times and memory."""
    return [{name: value for name, value in row.items() if name not in TIMES and not name.endswith(("_seconds", "/peak_memory_gb"))}
            for row in rows(run, split)]


def replies(run, step):
    return [row["generations"][0]["lm_postprocess"] for row in json.loads((run / f"temperature=0.00_n=1_step={step}.json").read_text())]


def assert_close(a, b):
    """Rows of another layout: equal within 1e-6 but for padding, and 1e-5 nats, for a KL adds fp32 log-probabilities of -6."""
    for mine, theirs in zip(a, b, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"padding_share", "split"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-5 if "kl" in name else 1e-6), name


def critic(folder):
    return weights(folder / "critic")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------ what a run leaves


@pytest.mark.parametrize("policy", ["chat", "t5"])
def test_a_run_leaves_what_the_docs_name_and_transformers_and_chat_give_its_replies(shared, run_ppo, capsys, monkeypatch, policy):
    """With and without a chat template. The evaluation's greedy replies are those of the exported policy, to the letter."""
    run = shared / "models" / f"left by {policy}"
    assert run_ppo(ppo_flags(shared, run.name, policy=policy, reward_fn=ROOT / "data" / "rewards.py:wish", learning_rate=0.01, save_steps=4)) == 0
    for name in ("args.json", "env.json", "ds_config.json", "metrics.jsonl", "rawtune.json", "config.json", "model.safetensors", "COMPLETE", "log.txt",
                 "code/rl_ppo.py", "code/common_v1.py", "tokenizer_config.json", "critic/model.safetensors", "checkpoint-8/critic/model.safetensors",
                 "checkpoint-8/COMPLETE", "checkpoint-8/engine", "checkpoint-8/rawtune.json", "checkpoint-4", "test_temperature=0.00_n=1_step=8.json"):
        assert (run / name).exists(), name
    assert not list(run.glob("**/*.tmp")) and [row["step"] for row in rows(run)] == [2, 4, 6, 8] and [row["step"] for row in rows(run, "eval")] == [0, 8]
    assert {"loss", "lr", "grad_norm", "tokens_per_sec", "target_tokens", "padding_share", "peak_memory_gb", "epoch", *(f"ppo/{name}" for name in (
        "kl kl_per_token kl_coef score score_std shaped_score returns values explained_variance reply_tokens eos_rate sampler_gap policy_loss value_loss "
        "entropy clip_fraction value_clip_fraction update_kl log_ratio").split()), *TIMES} <= rows(run)[-1].keys()
    assert {"eval/reward", "eval/reply_tokens", "eval/eos_rate", "eval/eval_seconds"} <= rows(run, "eval")[-1].keys()
    last, = rows(run, "test")
    assert last["step"] == 8 and "test/reward" in last

    records = [json.loads(line) for line in (shared / "data" / "wants.jsonl").read_text().splitlines()][40:52]
    found = json.loads((run / "temperature=0.00_n=1_step=8.json").read_text())
    assert [row["orig_d"] for row in found] == records and [row["prompt"] for row in found] == [record["prompt"] for record in records]
    assert {tuple(row) for row in found} == {("prompt", "generations", "demonstration", "orig_d", "dataset")}
    assert all(set(row["generations"][0]) == {"lm_postprocess", "reward"} and row["dataset"] == "wants" for row in found)
    assert np.mean([row["generations"][0]["reward"] for row in found]) == pytest.approx(rows(run, "eval")[-1]["eval/reward"])
    said = capsys.readouterr().out
    assert replies(run, 8) != replies(run, 0) and said.count("    before: ") == said.count("    after:  ") == 10

    model, report = (transformers.AutoModelForSeq2SeqLM if policy == "t5" else transformers.AutoModelForCausalLM).from_pretrained(
        run, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and distance(weights(run), weights(run / "checkpoint-8")) == 0
    tokenizer, about = transformers.AutoTokenizer.from_pretrained(run), json.loads((run / "rawtune.json").read_text())
    assert (about["script"], about["family"], about["format"]) == ("rl_ppo.py", "seq2seq" if policy == "t5" else "causal", 1)
    ends = model.generation_config.eos_token_id
    for record, reply in list(zip(records, replies(run, 8)))[:3]:
        if policy == "chat":
            ids = tokenizer.apply_chat_template([{"role": "user", "content": record["prompt"]}], add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            ids = tokenizer(record["prompt"]).input_ids
        out = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=about.get("stop_ids", ends), pad_token_id=0)[0]
        assert tokenizer.decode(out[0 if policy == "t5" else len(ids):], skip_special_tokens=True) == reply
    (shared / f"{policy}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    out = shared / f"{policy}-told.jsonl"
    assert in_process("chat", monkeypatch)(["--mount_dir", shared, "--model_path", run.name, "--temperature", 0, "--max_new_tokens", 6, "--dtype", "fp32",
                                            "--input", shared / f"{policy}.jsonl", "--output", out]) == 0
    told = [json.loads(line)["replies"][0] for line in out.read_text().splitlines()]  # version 2's chat.py keeps sentinels
    assert [re.sub(r"<extra_id_\d+>", "", reply).strip() for reply in told] == [reply.strip() for reply in replies(run, 8)]


def test_an_export_ends_its_replies_where_training_did(shared, run_ppo, capsys):
    """Also a T5 that began without weights, whose generation_config.json names many end tokens."""
    assert run_ppo(ppo_flags(shared, "t5 scratch", policy="tiny", max_steps=2)) == 0
    assert run_ppo(ppo_flags(shared, "t5 again", policy="t5 scratch", no_train=True)) == 0
    a, b = re.findall(r"replies end with (\[.*?\]), reference", capsys.readouterr().out)
    assert a == b and len(a) > 100


def test_no_train_evaluates_and_leaves_policy_and_folder_as_they_are(shared, run_ppo, capsys):
    before = {path: path.read_bytes() for path in (shared / "models" / "run").rglob("*") if path.is_file()}
    words = ppo_flags(shared, "looked", policy="run", no_train=True)
    assert run_ppo(words) == 0
    assert {path: path.read_bytes() for path in (shared / "models" / "run").rglob("*") if path.is_file()} == before
    run = shared / "models" / "looked"
    assert replies(run, 0) == replies(shared / "models" / "run", 8) != replies(shared / "models" / "run", 0) and not list(run.glob("**/*.safetensors"))
    assert "before:" not in capsys.readouterr().out
    assert [rows(run, split)[0][f"{split}/reward"] for split in ("eval", "test")] == [
        rows(shared / "models" / "run", split)[-1][f"{split}/reward"] for split in ("eval", "test")]
    assert run_ppo(words) == 2 and "step=0.json exists" in capsys.readouterr().err


def test_estimate_prints_a_table_and_writes_nothing(shared, run_ppo, capsys, monkeypatch):
    monkeypatch.setattr(common, "load_model", None)
    assert run_ppo(ppo_flags(shared, "estimated", estimate=True, **T5_CRITIC)) == 0
    assert "zero3" in capsys.readouterr().out and not (shared / "models" / "estimated").exists()


# ------------------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("changes", [{}, {"policy": "tiny"}, {"policy": "chat", "temperature": 0.7}, {"policy": "dropout"}, T5_CRITIC,
                                     {"reward_fn": None, "reward_model": "clf-llama", "critic": "reward_model"},
                                     {"policy": "chat", "lora_rank": 2, "num_layers_unfrozen": None}], ids=lambda changes: "-".join(map(str, changes.values())))
def test_without_a_learning_rate_the_kl_is_exactly_zero_and_nothing_moves(shared, run_ppo, changes):
    """P1, P2, P3, P10: prompts of other lengths in one left-padded batch, a temperature, dropout in the configuration."""
    name = "still " + "-".join(map(str, changes.values()))
    assert run_ppo(ppo_flags(shared, name, **{"learning_rate": 1e-30, "weight_decay": 0, "ppo_epochs": 2, "max_steps": 12, **changes})) == 0
    run = shared / "models" / name
    assert [row["ppo/kl"] for row in rows(run)] == [row["ppo/kl_per_token"] for row in rows(run)] == [0.0] * 3
    assert all(row["ppo/update_kl"] < 1e-9 and row["ppo/clip_fraction"] == row["ppo/value_clip_fraction"] == 0 and row["ppo/sampler_gap"] < 1e-5 for row in rows(run))
    assert len({row["ppo/score"] for row in rows(run)}) == 3 and replies(run, 0) == replies(run, 12)  # other prompts, other noise


def test_the_order_of_prompts_and_the_replies_do_not_depend_on_how_they_are_batched(shared, run_ppo, monkeypatch):
    """Of three rollouts, into the second epoch; the steps between them have no effect."""
    seen, score = {}, rl_ppo.score_replies
    monkeypatch.setattr(rl_ppo, "score_replies", lambda args, reward, prompts, replies, *rest: (
        seen.setdefault(args.training_run_name, []).append((prompts, replies)), score(args, reward, prompts, replies, *rest))[1])
    for name, changes in {"4": {"train_batch_size": 4}, "2x8": {"train_batch_size": 2, "gradient_accumulation_steps": 8},
                          "3": {"train_batch_size": 16, "rollout_batch_size": 3}, "seed": {"train_batch_size": 16, "seed": 1}}.items():
        assert run_ppo(ppo_flags(shared, f"order {name}", learning_rate=1e-30, max_steps=12 if name == "4" else 3, **changes)) == 0
    found = {name.split()[1]: [part for part in parts if len(part[0]) == 16] for name, parts in seen.items()}
    assert found["4"] == found["2x8"] == found["3"] and len(found["4"]) == 3 and len({len(reply) for _, replies in found["4"] for reply in replies}) > 3
    prompts = [prompt for part, _ in found["4"] for prompt in part]
    assert len(set(prompts[:40])) == 40 and prompts != [prompt for part, _ in found["seed"] for prompt in part]
    assert [replies for _, replies in found["4"][:1]] != [replies for _, replies in found["seed"][:1]]


SPLITS = {"8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4)}


def split_flags(mount, run, split, **changes):
    """The learning rate is small because AdamW turns rounding in gradients near 0 into whole steps."""
    batch, accumulation = SPLITS[split]
    return ppo_flags(mount, run, train_batch_size=batch, gradient_accumulation_steps=accumulation, **{"learning_rate": 0.0001, "max_steps": 4, **changes})


@pytest.mark.parametrize("task", ["llama", "tiny"])
def test_accumulation_splits_are_the_same_mathematics_and_a_mean_of_means_is_not(shared, run_ppo, monkeypatch, task):
    changes = T5_CRITIC if task == "tiny" else {"entropy_coef": 0.01}
    for split in SPLITS:
        assert run_ppo(split_flags(shared, f"{task} {split}", split, **changes)) == 0
    runs = [shared / "models" / f"{task} {split}" for split in SPLITS]
    for other in runs[1:]:
        assert_close(told(other), told(runs[0]))
        assert distance(weights(runs[0]), weights(other)) < 1e-6 and distance(critic(runs[0]), critic(other)) < 1e-6
    real = rl_ppo.micro_batches

    def mean_of_means(args, ids, buffer, *rest):
        batches, _ = real(args, ids, buffer, *rest)
        return batches, len(batches) * int(buffer.lengths[batches[0][1]].sum())
    monkeypatch.setattr(rl_ppo, "micro_batches", mean_of_means)
    assert run_ppo(split_flags(shared, f"{task} mutated", "2x4", **changes)) == 0
    assert abs(rows(shared / "models" / f"{task} mutated")[0]["grad_norm"] / rows(runs[0])[0]["grad_norm"] - 1) > 0.02


def test_a_missing_end_costs_its_penalty(shared, run_ppo):
    assert run_ppo(ppo_flags(shared, "penalty", missing_eos_penalty=0.5)) == 0
    for row in rows(shared / "models" / "penalty"):
        assert row["ppo/shaped_score"] == pytest.approx(row["ppo/score"] - 0.5 * (1 - row["ppo/eos_rate"])) and 0 < row["ppo/eos_rate"] < 1
    assert all(row["ppo/shaped_score"] == pytest.approx(row["ppo/score"]) for row in rows(shared / "models" / "run"))


# ------------------------------------------------------------------------------------------------ guards


def test_dropout_between_scoring_and_updating_stops_the_run(shared, run_ppo, monkeypatch, capsys):
    """P1, P10. Left on from sampling to the update, the sampler's own check sees it first."""
    quiet, check = rl_ppo.no_dropout, rl_ppo.check_rollout
    monkeypatch.setattr(rl_ppo, "no_dropout", lambda policy: policy.train())
    assert run_ppo(ppo_flags(shared, "dropout on", policy="dropout")) == 2 and "the sampler's log-probabilities differ" in capsys.readouterr().err
    monkeypatch.setattr(rl_ppo, "check_rollout", lambda *_: None)
    assert run_ppo(ppo_flags(shared, "dropout unseen", policy="dropout")) == 2
    assert "before the first update of a rollout the log-ratio must be 0" in capsys.readouterr().err
    assert not list((shared / "models" / "dropout unseen").glob("checkpoint-*"))
    monkeypatch.setattr(rl_ppo, "no_dropout", quiet)
    monkeypatch.setattr(rl_ppo, "check_rollout", check)
    assert run_ppo(ppo_flags(shared, "dropout off", policy="dropout")) == 0


def by_generate(model, prompts, keys, temperature, max_new_tokens, stop_ids, pad_id, device, synced=False):
    """Another engine: transformers' own generate, one prompt at a time, without log-probabilities."""
    found = []
    for prompt, key in zip(prompts, keys):
        torch.manual_seed(key)
        how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0.001 else {"do_sample": False}
        with torch.no_grad():
            out = model.generate(torch.from_numpy(prompt)[None], max_new_tokens=max_new_tokens, eos_token_id=stop_ids, pad_token_id=pad_id, **how)
        found.append((out[0, 1 if model.config.is_encoder_decoder else len(prompt):].numpy(), None))
    return found


@pytest.mark.parametrize("policy", ["llama", "tiny"])
def test_another_engine_fits_the_seam_of_rollout(shared, run_ppo, monkeypatch, policy):
    monkeypatch.setattr(rl_ppo, "rollout", by_generate)
    assert run_ppo(ppo_flags(shared, f"engine {policy}", policy=policy)) == 0
    run = shared / "models" / f"engine {policy}"
    assert all(row["ppo/sampler_gap"] == 0 and row["ppo/kl"] > -1 and 1 < row["ppo/reply_tokens"] < 6 for row in rows(run)) and rows(run)[0]["ppo/kl"] == 0
    assert policy == "tiny" or replies(run, 0) == replies(shared / "models" / "run", 0)


def test_canned_replies_fit_the_seam_too(shared, run_ppo, monkeypatch):
    canned = [np.array(ids) for ids in ([100, 101, 2], [2], [102] * 6)]
    monkeypatch.setattr(rl_ppo, "rollout", lambda model, prompts, keys, *rest: [(canned[key % 3], None) for key in keys])
    assert run_ppo(ppo_flags(shared, "canned", max_steps=2)) == 0
    assert 1 < rows(shared / "models" / "canned")[0]["ppo/reply_tokens"] < 6


@pytest.mark.parametrize("policy", ["llama", "tiny"])
@pytest.mark.parametrize("wrong", ["temperature", "shift", "mask"])
def test_a_sampler_that_sees_something_else_stops_the_run(shared, run_ppo, monkeypatch, capsys, policy, wrong):
    real = rl_ppo.rollout

    def rollout(model, prompts, keys, temperature, *rest):
        if wrong == "temperature":
            return real(model, prompts, keys, 1.5 * temperature, *rest)
        if wrong == "mask":  # half of the prompt is not seen
            return real(model, [prompt[len(prompt) // 2:] for prompt in prompts], keys, temperature, *rest)
        return [(ids, np.roll(logprobs, 1)) for ids, logprobs in real(model, prompts, keys, temperature, *rest)]
    monkeypatch.setattr(rl_ppo, "rollout", rollout)
    assert run_ppo(ppo_flags(shared, f"wrong {wrong} {policy}", policy=policy, temperature=0.5)) == 2
    assert "step 0: the sampler's log-probabilities differ" in capsys.readouterr().err


@pytest.mark.parametrize("gives_logprobs", [True, False])
def test_an_engine_that_keeps_the_first_weights_is_found_out(shared, run_ppo, monkeypatch, capsys, gives_logprobs):
    """By its log-probabilities; without them by a KL below 0, which only a stale sampler gives."""
    real, first = rl_ppo.rollout, []

    def rollout(model, *rest):
        first.append(first[0] if first else copy.deepcopy(model))
        return [(ids, logprobs if gives_logprobs else None) for ids, logprobs in real(first[0], *rest)]
    monkeypatch.setattr(rl_ppo, "rollout", rollout)
    name = f"stale {gives_logprobs}"
    assert run_ppo(ppo_flags(shared, name, learning_rate=0.005, num_rollouts=128, train_batch_size=32, max_steps=100, kl_cap=0, init_kl_coef=0)) == 2
    error = capsys.readouterr().err
    assert ("the sampler's log-probabilities differ" if gives_logprobs else "standard errors below 0") in error
    assert rows(shared / "models" / name)[0]["ppo/kl"] == 0  # the first rollout was right


@pytest.mark.parametrize("n_errors, stops", [(-5.1, True), (-4.9, False), (0, False), (50, False)])
def test_a_kl_below_zero_by_more_than_five_standard_errors_is_no_chance(capsys, n_errors, stops):
    """Two rollouts of 64 replies: the first alone are too few to judge."""
    noise, lengths = np.random.default_rng(0).normal(size=128), np.random.default_rng(1).integers(1, 9, 128)
    sums = (noise - noise.mean()) / noise.std(ddof=1) + n_errors / 128**0.5  # of a reply: deviation 1, mean n_errors standard errors
    reference = [np.full(n, -3.0) for n in lengths]
    old, state = [part + x / len(part) for part, x in zip(reference, sums)], {"kl_stats": [0, 0.0, 0.0]}
    sampled = [(np.zeros(n, int), None) for n in lengths]
    rl_ppo.check_rollout("fp32", sampled[:64], old[:64], reference[:64], state, 6)
    if stops:
        with pytest.raises(SystemExit) as stop:
            rl_ppo.check_rollout("fp32", sampled[64:], old[64:], reference[64:], state, 7)
        assert stop.value.code == 2 and "step 7: the KL to the reference is -0.4508" in capsys.readouterr().err
    else:
        rl_ppo.check_rollout("fp32", sampled[64:], old[64:], reference[64:], state, 7)
    rl_ppo.check_rollout("fp32", sampled, reference, reference, {"kl_stats": [0, 0.0, 0.0]}, 7)  # no deviation, no KL


def test_a_value_within_the_clip_range_is_not_counted_as_clipped():
    """old + (new - old) is not new in the last bit."""
    noise = torch.Generator().manual_seed(0)
    old, new, returns = ((0.05 * torch.randn(1000, generator=noise)).clamp(-0.09, 0.09) for _ in range(3))
    assert rl_ppo.value_losses(old + 1, old, old + 1, 0.2)[1].all()
    assert not rl_ppo.value_losses(new, old, returns, 0.2)[1].any()


@pytest.mark.parametrize("precision, gap, stops", [
    ("fp32", 0.0005, False), ("fp32", 0.002, True), ("bf16", 0.05, False), ("bf16", 0.2, True), ("fp32", np.nan, True)])
def test_the_samplers_gap_has_a_bound_for_each_precision(precision, gap, stops):
    old = [np.full(n, -3.0) for n in (1, 4)]
    sampled = [(np.zeros(len(part), int), (part + gap).astype(np.float32)) for part in old]
    if stops:
        with pytest.raises(SystemExit):
            rl_ppo.check_rollout(precision, sampled, old, old, {"kl_stats": [0, 0.0, 0.0]}, 0)
    else:
        rl_ppo.check_rollout(precision, sampled, old, old, {"kl_stats": [0, 0.0, 0.0]}, 0)


def test_a_learning_rate_that_tears_the_policy_away_stops_before_the_step_is_applied(shared, run_ppo, capsys):
    assert run_ppo(ppo_flags(shared, "torn", learning_rate=10.0, ppo_epochs=4)) == 2
    error = capsys.readouterr().err
    assert "nats per token away from the one that sampled (--max_log_ratio 2)" in error or "the loss is nan" in error or "the loss is inf" in error
    assert "Nothing of this step was applied" in error and not (shared / "models" / "torn" / "COMPLETE").exists()


def test_at_the_kl_cap_the_run_ends_with_a_warning_and_its_policy_and_goes_on_with_a_higher_one(shared, run_ppo, capsys):
    """P8."""
    words = dict(max_steps=40, learning_rate=0.01, save_steps=4)
    assert run_ppo(ppo_flags(shared, "capped", kl_cap=0.5, **words)) == 0
    run = shared / "models" / "capped"
    error, last = capsys.readouterr().err, rows(run)[-1]
    assert f"WARNING step {last['step']}: the KL of a reply is" in error and "above --kl_cap 0.5" in error
    assert last["step"] < 40 and last["ppo/kl"] > 0.5 >= max(row["ppo/kl"] for row in rows(run)[:-1]) and (run / "COMPLETE").exists()
    assert rows(run, "eval")[-1]["step"] == rows(run, "test")[-1]["step"] == last["step"]
    assert distance(weights(run), weights(run / f"checkpoint-{last['step']}")) == 0
    assert run_ppo([*ppo_flags(shared, "capped", kl_cap=0, **words), "--resume"]) == 0
    assert rows(run)[-1]["step"] == 40 and [row["step"] for row in rows(run)] == list(range(2, 41, 2))


def test_a_hacked_reward_is_warned_about_and_the_heldout_one_chooses_the_policy(shared, run_ppo, capsys):
    """P8: length pays, and the held-out reward is its opposite."""
    words = dict(reward_fn=f"{shared}/reward.py:length", heldout_reward_fn=f"{shared}/reward.py:shortness", learning_rate=0.01, eval_temperature=1.0,
                 max_new_tokens=10, num_rollouts=32, train_batch_size=16, max_steps=20, eval_steps=4, save_total_limit=1, kl_cap=0, init_kl_coef=0)
    assert run_ppo(ppo_flags(shared, "hacked", **words)) == 0
    run = shared / "models" / "hacked"
    held, proxy = ({row["step"]: row[f"eval/{name}"] for row in rows(run, "eval")} for name in ("heldout_reward", "reward"))
    assert list(held) == [0, 4, 8, 12, 16, 20] and all(held[step] == -proxy[step] for step in held)
    best = json.loads((run / "best.json").read_text())
    best_step = max((step for step in held if step), key=held.get)
    assert best == {"checkpoint": f"checkpoint-{best_step}", "metric": "heldout_reward", "value": held[best_step]} and best_step < 20
    assert distance(weights(run), weights(run / f"checkpoint-{best_step}")) == 0 < distance(weights(run), weights(run / "checkpoint-20"))
    assert equal(critic(run), critic(run / f"checkpoint-{best_step}")) and (run / f"test_temperature=1.00_n=1_step={best_step}.json").exists()
    error = capsys.readouterr().err
    assert "the reward is being hacked" in error and f"at step {best_step} it was {proxy[best_step]:.4g}" in error and proxy[20] > proxy[best_step]
    warned = [step for step in held if f"step {step}: the reward is {proxy[step]:.4g}" in error]
    assert warned and min(warned) >= best_step + 8


def test_a_reward_that_is_right_is_not_called_hacked(shared, run_ppo, capsys):
    both = f"{shared}/reward.py:length"
    assert run_ppo(ppo_flags(shared, "honest", reward_fn=both, heldout_reward_fn=both, learning_rate=0.01, eval_steps=2, max_steps=12)) == 0
    assert "hacked" not in capsys.readouterr().err and (shared / "models" / "honest" / "best.json").exists()


# ------------------------------------------------------------------------------------------------ stopping and continuing


RESUMED = {"llama": {"reward_scaling": "norm"}, "tiny": {**T5_CRITIC, "reward_scaling": "norm"},
           "lora": {"policy": "chat", "lora_rank": 2, "num_layers_unfrozen": None, "reward_scaling": "std"}, "rloo": {"advantage": "rloo", "n_samples": 2}}


def resume_flags(mount, run, kind, **changes):
    return ppo_flags(mount, run, **{"ppo_epochs": 2, "max_steps": 16, "save_steps": 4, "eval_steps": 8, "kl_horizon": 50, "init_kl_coef": 0.2, **RESUMED[kind],
                                    **changes})


def assert_same_ppo_run(a, b, last, n_padding=0):
    """Every row but times, weights, critic and moments are equal to the bit. n_padding: numbers in which ZeRO-3 may differ, for it pads
    the weights of uneven ranks with what was in memory."""
    for split in ("train", "eval", "test"):
        assert told(a, split) == told(b, split)
    assert equal(weights(a), weights(b))
    a_moments, b_moments = (moments(run / f"checkpoint-{last}") for run in (a, b))
    assert a_moments.shape == b_moments.shape and (a_moments != b_moments).sum() <= n_padding
    assert (a / "critic").exists() == (b / "critic").exists() and (not (a / "critic").exists() or equal(critic(a), critic(b)))
    a, b = ({**json.loads((run / f"checkpoint-{last}" / "state.json").read_text()), "last_eval": None, "eval_due": None} for run in (a, b))
    assert a == b  # but for evaluations: a checkpoint of a stop is older than its own


@pytest.fixture
def straight(shared, run_ppo):
    """straight(kind) -> the folder of a run that was never stopped."""
    def straight(kind):
        run = shared / "models" / f"straight {kind}"
        assert run.exists() or run_ppo(resume_flags(shared, run.name, kind)) == 0
        return run
    return straight


@pytest.mark.parametrize("kind, stop", [("llama", 1), ("llama", 4), ("tiny", 3), pytest.param("lora", 1, marks=pytest.mark.slow), ("rloo", 3)])
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(shared, run_ppo, monkeypatch, straight, kind, stop):
    """R9: also behind the last rollout. The adaptive KL price, the scaling and the order of prompts go on where they were."""
    name, run = f"stopped {kind} {stop}", straight(kind)
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        assert run_ppo(resume_flags(shared, name, kind)) == common.EXIT_SAVED
    stopped = shared / "models" / name
    state = json.loads((stopped / f"checkpoint-{4 * stop}" / "state.json").read_text())
    assert state["rollout"] == stop and state["kl_coef"] != 0.2 and state["reward_stats"][0] == 16 * stop and state["step"] == 4 * stop
    assert [row["step"] for row in rows(stopped)] == [4 * (i + 1) for i in range(stop)] and not (stopped / "COMPLETE").exists()
    assert run_ppo(resume_flags(shared, name, kind)) == 0
    assert_same_ppo_run(run, stopped, 16)
    assert len({row["ppo/kl_coef"] for row in rows(run)}) == 4 and rows(run)[-1]["ppo/kl"] > 0


def test_a_stop_where_an_evaluation_is_due_loses_none(shared, run_ppo, monkeypatch, straight):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run_ppo(resume_flags(shared, "due", "llama")) == common.EXIT_SAVED
    assert run_ppo(resume_flags(shared, "due", "llama")) == 0
    assert [row["step"] for row in rows(straight("llama"), "eval")] == [0, 8, 16] == [row["step"] for row in rows(shared / "models" / "due", "eval")]
    assert_same_ppo_run(straight("llama"), shared / "models" / "due", 16)


def test_a_stop_at_the_kl_cap_loses_no_evaluation(shared, run_ppo, monkeypatch):
    words = dict(kl_cap=0.1, learning_rate=0.01)
    assert run_ppo(resume_flags(shared, "cap straight", "llama", **words)) == 0
    n = len(rows(shared / "models" / "cap straight"))
    with monkeypatch.context() as patch:
        stop_at(patch, n)
        assert run_ppo(resume_flags(shared, "cap stopped", "llama", **words)) == common.EXIT_SAVED
    assert run_ppo(resume_flags(shared, "cap stopped", "llama", **words)) == 0
    assert n < 4
    assert_same_ppo_run(shared / "models" / "cap straight", shared / "models" / "cap stopped", 4 * n)


@pytest.mark.parametrize("field, value", [("kl_coef", 0.9), ("reward_stats", [16, 0.0, 99.0]), ("rollout", 3)])
def test_what_state_json_holds_is_what_is_continued(shared, run_ppo, monkeypatch, straight, field, value):
    """Negative control: another value in a checkpoint is another run."""
    name = f"changed {field}"
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert run_ppo(resume_flags(shared, name, "llama")) == common.EXIT_SAVED
    path = shared / "models" / name / "checkpoint-4" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert run_ppo(resume_flags(shared, name, "llama", max_steps=8, resume=True)) == 0
    mine, theirs = told(shared / "models" / name)[1], told(straight("llama"))[1]
    assert mine["loss"] != theirs["loss"] and (mine["ppo/score"] != theirs["ppo/score"]) == (field == "rollout")


def test_a_finished_run_is_refused_continued_or_moved_aside(shared, run_ppo, capsys):
    words = dict(lr_scheduler_type="constant")
    assert run_ppo(ppo_flags(shared, "ended", max_steps=4, **words)) == 0
    run = shared / "models" / "ended"
    assert run_ppo(ppo_flags(shared, "ended", max_steps=4, **words)) == 2 and "finished run" in capsys.readouterr().err
    assert run_ppo(ppo_flags(shared, "ended", max_steps=8, **words)) == 2
    assert run_ppo([*ppo_flags(shared, "ended", max_steps=8, **words), "--resume"]) == 0
    assert distance(weights(run), weights(shared / "models" / "run")) == 0 and equal(critic(run), critic(shared / "models" / "run"))
    assert run_ppo([*ppo_flags(shared, "ended", max_steps=8, gamma=0.9, **words), "--resume"]) == 2
    assert "flags that change the mathematics differ (gamma: 1.0 -> 0.9)" in capsys.readouterr().err
    before = (run / "model.safetensors").read_bytes()
    assert run_ppo([*ppo_flags(shared, "ended", max_steps=2, **words), "--overwrite"]) == 0
    assert (shared / "models" / "ended.old-1" / "model.safetensors").read_bytes() == before and rows(run)[-1]["step"] == 2


@pytest.mark.parametrize("changes, named", [({"max_new_tokens": 7}, "max_new_tokens: 6 -> 7"), ({"reward_fn": "{mount}/reward.py:length"}, "reward_fn: "),
                                            ({"n_samples": 2}, "n_samples: 1 -> 2"), ({"n_eval": 3, "rollout_batch_size": 4, "kl_cap": 9}, None)])
def test_an_unfinished_run_takes_other_guards_and_evaluation_and_no_other_mathematics(shared, run_ppo, monkeypatch, capsys, changes, named):
    name, changes = f"half {named}", {key: value.format(mount=shared) if isinstance(value, str) else value for key, value in changes.items()}
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert run_ppo(ppo_flags(shared, name, max_steps=4)) == common.EXIT_SAVED
    assert run_ppo(ppo_flags(shared, name, max_steps=4, **changes)) == (2 if named else 0)
    assert not named or named in capsys.readouterr().err


def test_another_reward_of_the_same_name_is_refused(shared, run_ppo, monkeypatch, capsys):
    (shared / "own.py").write_text("def score(prompts, replies, records):\n    return [0.5] * len(replies)\n")
    words = ppo_flags(shared, "own reward", reward_fn=f"{shared}/own.py:score", max_steps=4)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert run_ppo(words) == common.EXIT_SAVED
    (shared / "own.py").write_text((shared / "own.py").read_text().replace("0.5", "0.6"))
    assert run_ppo(words) == 2 and "reward_sha256" in capsys.readouterr().err


def test_a_policy_that_changed_meanwhile_is_refused_for_the_reference_would_be_another(shared, run_ppo, monkeypatch, capsys):
    own = shared / "models" / "retrained"
    shutil.copytree(shared / "models" / "chat", own)
    words = ppo_flags(shared, "of retrained", policy="retrained", max_steps=4)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert run_ppo(words) == common.EXIT_SAVED
    tensors = common.safetensors.torch.load_file(own / "model.safetensors")
    before = (own / "model.safetensors").read_bytes()
    common.safetensors.torch.save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, own / "model.safetensors", {"format": "pt"})
    assert run_ppo(words) == 2 and "not the weights that" in capsys.readouterr().err
    (own / "model.safetensors").write_bytes(before)
    assert run_ppo(words) == 0


def test_a_kl_price_that_is_changed_by_force_counts_from_there(shared, run_ppo, monkeypatch):
    words = ppo_flags(shared, "dearer", max_steps=4)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert run_ppo(words) == common.EXIT_SAVED
    assert run_ppo([*words, "--resume", "--force", "changed_flags", "--init_kl_coef", 5]) == 0
    assert [row["ppo/kl_coef"] for row in rows(shared / "models" / "dearer")] == [0.05, 5]


@pytest.mark.parametrize("run, changes, flag", [("clf-llama", {"reward_fn": None, "reward_model": "clf-llama"}, "--reward_model"),
                                                ("clf-tiny", {"heldout_reward_model": "clf-tiny"}, "--heldout_reward_model"),
                                                ("run", {"policy": "run"}, "the model to start from")])
def test_overwrite_never_moves_a_model_that_the_run_needs(shared, run_ppo, capsys, run, changes, flag):
    assert run_ppo(ppo_flags(shared, run, overwrite=True, **changes)) == 2
    error = capsys.readouterr().err
    assert "--overwrite would rename" in error and flag in error and (shared / "models" / run / "COMPLETE").exists()


def test_overwrite_never_moves_the_run_whose_critic_is_taken(shared, run_ppo, capsys):
    shutil.copytree(shared / "models" / "run", shared / "models" / "own critic")
    assert run_ppo(ppo_flags(shared, "own critic", overwrite=True, critic_init="own critic")) == 2
    assert "--overwrite would rename" in capsys.readouterr().err and (shared / "models" / "own critic" / "critic").exists()


def test_all_mistakes_are_reported_at_once_before_a_model_loads(shared, run_ppo, monkeypatch, capsys):
    monkeypatch.setattr(common, "load_model", None)
    (shared / "data" / "long.jsonl").write_text(json.dumps({"prompt": "the cat reads a long book " * 20}) + "\n")
    transformers.LlamaConfig(num_labels=2, architectures=["LlamaForSequenceClassification"], num_hidden_layers=1).save_pretrained(shared / "models" / "two")
    shutil.copy(shared / "models" / "llama" / "tokenizer.json", shared / "models" / "two")
    shutil.copy(shared / "models" / "llama" / "tokenizer_config.json", shared / "models" / "two")
    assert run_ppo(ppo_flags(shared, "wrong", policy="clf-llama", reward_fn=None, reward_model="two", heldout_reward_fn="absent.py:score", top_k=5,
                             num_rollouts=15, n_samples=2, data=["absent", "long"], seq_length=40)) == 2
    error = capsys.readouterr().err
    for part in ("a clf.py run scores texts", "with 2 outputs; expected a clf.py run",
                 "reward function 'absent.py:score'", "--top_k 5", "cannot be divided by --n_samples 2", "absent", "long"):
        assert part in error, part
    assert error.count("ERROR") >= 7 and not (shared / "models" / "wrong").exists()


# ------------------------------------------------------------------------------------------------ adapters, critics, other advantages


def test_lora_asks_the_base_with_the_adapter_off_and_peft_reads_the_policy(shared, run_ppo, capsys):
    before = (shared / "models" / "chat" / "model.safetensors").read_bytes()
    words = dict(policy="chat", lora_rank=4, num_layers_unfrozen=None, learning_rate=0.02)
    assert run_ppo(ppo_flags(shared, "lora", **words)) == 0
    run = shared / "models" / "lora"
    assert "reference: adapter off" in capsys.readouterr().out
    assert (shared / "models" / "chat" / "model.safetensors").read_bytes() == before and not list(run.glob("**/model.safetensors.index.json"))
    adapter = weights(run)
    assert all("lora_" in name for name in adapter) and all(tensor.abs().sum() for name, tensor in adapter.items() if "lora_B" in name)
    assert rows(run)[0]["ppo/kl"] == 0 < rows(run)[-1]["ppo/kl"]
    # a copy as reference: the same to the last digit; continued: the copy has the adapter
    assert run_ppo(ppo_flags(shared, "lora copy", **words, reference="copy")) == 0 and equal(weights(shared / "models" / "lora copy"), adapter)
    assert run_ppo(ppo_flags(shared, "lora on", policy="lora", learning_rate=0.01, num_layers_unfrozen=None)) == 0
    on = shared / "models" / "lora on"
    assert "reference: copy" in capsys.readouterr().out and rows(on)[0]["ppo/kl"] == 0 < rows(on)[-1]["ppo/kl"]
    assert replies(on, 0) == replies(run, 8) != replies(run, 0) and not equal(weights(on), adapter)
    assert run_ppo(ppo_flags(shared, "lora refused", policy="lora", reference="adapter_off", num_layers_unfrozen=None)) == 2
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(shared / "models" / "chat"), run)
    tokenizer, about = transformers.AutoTokenizer.from_pretrained(run), json.loads((run / "rawtune.json").read_text())
    for row in json.loads((run / "temperature=0.00_n=1_step=8.json").read_text())[:4]:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=6, do_sample=False, eos_token_id=about["stop_ids"], pad_token_id=0)
        assert tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True) == row["generations"][0]["lm_postprocess"]


@pytest.mark.parametrize("kind", ["trunk", "reward_model"])
def test_critic_init_starts_with_the_critic_of_an_earlier_run(shared, run_ppo, capsys, kind):
    own = {} if kind == "trunk" else {"reward_fn": None, "reward_model": "clf-llama", "critic": "reward_model"}
    for name, changes in (("first", {}), ("again", {"critic_init": f"{kind} first"}), ("by checkpoint", {"critic_init": f"{kind} first/checkpoint-4"}),
                          ("fresh", {})):
        rate = 0.01 if name == "first" else 1e-30
        assert run_ppo(ppo_flags(shared, f"{kind} {name}", learning_rate=rate, weight_decay=0, max_steps=4, **own, **changes)) == 0
    first, again, by_checkpoint, fresh = (critic(shared / "models" / f"{kind} {name}") for name in ("first", "again", "by checkpoint", "fresh"))
    assert distance(first, again) < 1e-12 and distance(first, by_checkpoint) < 1e-12 and distance(first, fresh) > 1e-3
    other = {} if kind == "reward_model" else {"reward_fn": None, "reward_model": "clf-llama", "critic": "reward_model"}
    assert run_ppo(ppo_flags(shared, f"{kind} mixed", critic_init=f"{kind} first", **other)) == 2
    assert "not the weights of a critic of this kind" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["chat", "tiny"])
def test_frozen_layers_keep_every_bit(shared, run_ppo, policy):
    """Two runs that differ in the learning rate agree in what is frozen, and differ in all the rest."""
    for rate in (0.001, 0.002):
        assert run_ppo(ppo_flags(shared, f"top {policy} {rate}", policy=policy, num_layers_unfrozen=1, learning_rate=rate, max_steps=4)) == 0
    a, b = (weights(shared / "models" / f"top {policy} {rate}") for rate in (0.001, 0.002))
    same = {name for name in a if torch.equal(a[name], b[name])}
    if policy == "chat":
        source = weights(shared / "models" / "chat")
        assert same == {name for name in a if torch.equal(a[name], source[name])} == {name for name in a if "layers.0." in name or "embed_tokens" in name}
    else:
        assert same == {name for name in a if not name.startswith("decoder.block.1.") and name != "decoder.final_layer_norm.weight"}
    assert 0 < len(same) < len(a)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_rloo_and_grpo_train_without_a_critic_on_several_replies_to_a_prompt(shared, run_ppo, monkeypatch, kind):
    seen, score = [], rl_ppo.score_replies
    monkeypatch.setattr(rl_ppo, "score_replies", lambda args, reward, prompts, *rest: (seen.append(prompts), score(args, reward, prompts, *rest))[1])
    assert run_ppo(ppo_flags(shared, kind, policy="chat", advantage=kind, n_samples=4, learning_rate=0.01)) == 0
    run = shared / "models" / kind
    assert not list(run.glob("**/critic")) and distance(weights(shared / "models" / "chat"), weights(run)) > 1e-4
    assert not {"ppo/values", "ppo/explained_variance"} & rows(run)[0].keys() and rows(run)[-1]["ppo/kl"] > 0
    rollouts = [prompts for prompts in seen if len(prompts) == 16]
    assert len(rollouts) == 4 and all(len(set(prompts[i: i + 4])) == 1 for prompts in rollouts for i in (0, 4, 8, 12))
    assert all(len(set(prompts)) == 4 for prompts in rollouts)
    assert run_ppo(ppo_flags(shared, f"{kind} policy", policy=kind, no_train=True)) == 0 and replies(shared / "models" / f"{kind} policy", 0) == replies(run, 8)


def test_the_reference_stays_what_the_policy_was(shared, run_ppo, monkeypatch):
    made, real = [], rl_ppo.Frozen.__init__
    monkeypatch.setattr(rl_ppo.Frozen, "__init__", lambda self, *a: (real(self, *a), made.append(self))[0])
    assert run_ppo(ppo_flags(shared, "twins", policy="chat", learning_rate=0.01)) == 0
    found = {name: tensor.double() for name, tensor in made[0].module.model.state_dict().items()}
    assert equal({name: found[name] for name in weights(shared / "models" / "chat")}, weights(shared / "models" / "chat"))
    assert not made[0].module.training and not any(p.requires_grad for p in made[0].module.parameters())
