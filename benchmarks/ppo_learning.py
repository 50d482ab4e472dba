"""Does rl_ppo.py learn? Three studies, each with a decoder-only model and a T5 and three seeds, all made here, on a CPU.

    python benchmarks/ppo_learning.py --out benchmarks/results/ppo_learning_cpu_2cores.json      # 40 minutes on 2 cores

optimum     replies of one token and a programmatic reward: the best policy under the KL price is known in closed form,
            pi*(a) ~ reference(a) exp(reward(a) / beta), and its worth is beta log sum reference exp(reward / beta).
verifier    supervised fine-tuning on sentences, of which half are about sports; a clf.py verifier of sports is the reward; another
            verifier, trained on other sentences with another seed, is held out.
arithmetic  a model that adds four digits, not well yet; the reward is 1 for the right answer. Greedy accuracy on additions that
            neither training saw.
"""

import argparse
import itertools
import json
import pathlib
import random
import sys
import tempfile

import numpy as np

import harness
import torch
import transformers

ROOT = harness.ROOT
sys.path.insert(0, str(ROOT / "data"))
import rewards

FAMILIES = {"decoder": ("tiny-llama", "sft_causal.py"), "T5": ("tiny-t5", "seq2seq.py")}


def auto(family):
    return transformers.AutoModelForCausalLM if family == "decoder" else transformers.AutoModelForSeq2SeqLM


def write_lines(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def run_script(name, words):
    harness.run_script(name, [str(word) for word in words])


def ppo(mount, run, policy, data, seed, words):
    """One run of rl_ppo.py; -> its folder."""
    if not (mount / "models" / run / "COMPLETE").exists():
        run_script("rl_ppo.py", ["--mount_dir", mount, "--policy", policy, "--data", data, "--training_run_name", run, "--seed", seed,
                                         "--precision", "fp32", "--num_layers_unfrozen", "0", "--save_steps", "0", *words])
    return mount / "models" / run


def tune(mount, family, run, data, words):
    """Supervised fine-tuning from scratch; -> run name."""
    model, script = FAMILIES[family]
    if not (mount / "models" / run / "COMPLETE").exists():
        more = ["--raw_prompt", "--n_generate", "200"] if family == "decoder" else []
        run_script(script, ["--mount_dir", mount, "--model_init_path", ROOT / "models" / model, "--data", data, "--training_run_name", run,
                                    "--precision", "fp32", "--save_steps", "0", *more, *words])
    return run


def curve(run, name, split):
    return [(row["step"], row[name]) for row in harness.metric_rows(run, split)]


# ------------------------------------------------------------------------------------------------ optimum

BETA = 0.05


def next_token_probabilities(folder, family, prompts):
    """(prompts, V) float64."""
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), auto(family).from_pretrained(folder, dtype=torch.float64).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        start = {"decoder_input_ids": torch.tensor([[model.config.decoder_start_token_id]])} if family == "T5" else {}
        with torch.no_grad():
            found.append(model(input_ids=ids, **start).logits[0, -1].softmax(-1).numpy())
    return np.stack(found), tokenizer


def optimum(mount, family, seed):
    base = mount / "models" / f"random-{family}-{seed}"
    if not base.exists():  # new weights, saved so that the reference can be read again
        source = ROOT / "models" / FAMILIES[family][0]
        torch.manual_seed(seed)
        auto(family).from_config(transformers.AutoConfig.from_pretrained(source)).save_pretrained(base)
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(base)
    run = ppo(mount, f"optimum-{family}-{seed}", base.name, ROOT / "data" / "wishes.jsonl", seed, [
        "--reward_fn", f"{ROOT / 'data' / 'rewards.py'}:wish", "--max_new_tokens", "1", "--max_steps", "800", "--num_rollouts", "256", "--train_batch_size",
        "64", "--ppo_epochs", "2", "--learning_rate", "0.003" if family == "decoder" else "0.002", "--lr_scheduler_type", "linear", "--init_kl_coef", str(BETA), "--kl_controller", "fixed",
        "--kl_cap", "0", "--eval_steps", "400", "--logging_steps", "40"])
    records = [json.loads(line) for line in (ROOT / "data" / "wishes.jsonl").read_text().splitlines()]
    records = [record for record in records if record.get("split", "train") == "train"]
    before, tokenizer = next_token_probabilities(base, family, [r["prompt"] for r in records])
    after, _ = next_token_probabilities(run, family, [r["prompt"] for r in records])
    texts = [tokenizer.decode([i], skip_special_tokens=True) for i in range(before.shape[1])]
    reward = np.array([rewards.wish([record["prompt"]] * len(texts), texts, [record] * len(texts)) for record in records])

    def worth(policy):
        kl = (policy * (np.log(policy) - np.log(before))).sum(1).mean()
        return (policy * reward).sum(1).mean(), kl, (policy * reward).sum(1).mean() - BETA * kl
    best = before * np.exp(reward / BETA)
    best /= best.sum(1, keepdims=True)
    (start, *_), (mine, kl, value), (top, top_kl, top_value) = worth(before), worth(after), worth(best)
    return {"reward_before": start, "reward": mine, "reward_of_optimum": top, "kl": kl, "kl_of_optimum": top_kl,
            "share_of_the_way": (value - start) / (top_value - start), "curve": curve(run, "ppo/score", "train")}


# ------------------------------------------------------------------------------------------------ verifier


def verifier(mount, family, seed):
    source = json.loads((ROOT / "data" / "clf_debug.json").read_text())
    texts = [record["input"].split(". ")[0].rstrip(".") + "." for part in source.values() for record in part]
    texts = sorted(set(texts))
    rng = random.Random(0)
    rng.shuffle(texts)
    pairs = [{"prompt": f"News {rng.randrange(100)}:", "completion": (" " if family == "decoder" else "") + rng.choice(texts)} for _ in range(3000)]
    write_lines(mount / "data" / f"news-{family}.jsonl", pairs[:2900] + [{**p, "split": "eval"} for p in pairs[2900:]])
    write_lines(mount / "data" / "news-prompts.jsonl", [{"prompt": f"News {i}:"} for i in range(80)] + [
        {"prompt": f"News {i}:", "split": "eval"} for i in range(80, 100)] * 5)
    for name, half in (("judge", 0), ("holdout", 1)):
        if not (mount / "models" / f"{name}" / "COMPLETE").exists():
            part = {split: records[half::2] for split, records in source.items()}
            (mount / "data" / f"{name}.json").write_text(json.dumps(part))
            run_script("clf.py", ["--mount_dir", mount, "--model_init_path", ROOT / "models" / "tiny-t5", "--data", name, "--training_run_name", name,
                                          "--max_steps", "400", "--train_batch_size", "64", "--learning_rate", "0.003", "--seed", str(half),
                                          "--eval_steps", "400", "--precision", "fp32"])
    start = tune(mount, family, f"news-{family}", f"news-{family}", ["--max_steps", "300", "--train_batch_size", "64", "--learning_rate", "0.004",
                                                                     "--eval_steps", "300", "--max_new_tokens", "32"])
    run = ppo(mount, f"verifier-{family}-{seed}", start, "news-prompts", seed, [
        "--reward_model", "judge", "--heldout_reward_model", "holdout", "--reward_text", "{reply}", "--max_new_tokens", "32", "--max_steps", "200",
        "--num_rollouts", "64", "--train_batch_size", "32", "--ppo_epochs", "2", "--learning_rate", "0.0003", "--init_kl_coef", "0.05", "--target_kl", "6", "--reward_scaling", "norm", "--vf_coef", "0.1",
        "--eval_steps", "40", "--eval_temperature", "1", "--n_eval", "100", "--eval_batch_size", "100", "--logging_steps", "8"])
    scores = {name: curve(run, f"eval/{name}", "eval") for name in ("reward", "heldout_reward")}
    return {"heldout_before": scores["heldout_reward"][0][1], "heldout": max(score for _, score in scores["heldout_reward"]),
            "reward_before": scores["reward"][0][1], "reward": scores["reward"][-1][1], "kl": curve(run, "ppo/kl", "train")[-1][1],
            "curve": scores["heldout_reward"]}


# ------------------------------------------------------------------------------------------------ arithmetic


def arithmetic(mount, family, seed):
    rng = random.Random(1)
    digits = list(itertools.product(range(1, 10), repeat=4))
    rng.shuffle(digits)
    rows = [{"prompt": "+".join(map(str, four)) + "=", "completion": str(sum(four)), "answer": str(sum(four))} for four in digits[:4000]]
    write_lines(mount / "data" / "sums.jsonl", rows[:3800] + [{**row, "split": "eval"} for row in rows[3800:]])
    start = tune(mount, family, f"sums-{family}", "sums", ["--max_steps", "100" if family == "decoder" else "250", "--train_batch_size", "64",
                                                           "--learning_rate", "0.004", "--eval_steps", "1000", "--max_new_tokens", "6"])
    run = ppo(mount, f"sums-{family}-{seed}", start, "sums", seed, [
        "--reward_fn", f"{ROOT / 'data' / 'rewards.py'}:exact_answer", "--max_new_tokens", "6", "--max_steps", "800", "--num_rollouts", "256",
        "--train_batch_size", "64", "--ppo_epochs", "2", "--learning_rate", "0.0004" if family == "decoder" else "0.0001", "--init_kl_coef", "0.01", "--kl_controller", "fixed",
        "--eval_steps", "80", "--n_eval", "200", "--eval_batch_size", "200", "--logging_steps", "16"])
    scores = curve(run, "eval/reward", "eval")
    return {"accuracy_before": scores[0][1], "accuracy": scores[-1][1], "kl": curve(run, "ppo/kl", "train")[-1][1], "curve": scores}


STUDIES = {"optimum": optimum, "verifier": verifier, "arithmetic": arithmetic}
LABELS = {"optimum": "reward of sampled replies", "verifier": "held-out verifier's logit", "arithmetic": "greedy accuracy, unseen sums"}


def draw(found, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for i, (study, of_family) in enumerate(found.items()):
        axes = figure.add_subplot(1, len(found), i + 1, title=f"{study}: {LABELS[study]}", xlabel="optimizer step")
        for family, style in (("decoder", "C0"), ("T5", "C1")):
            for seed, result in of_family.get(family, {}).items():
                axes.plot(*zip(*result["curve"]), style, label=family if seed == min(of_family[family]) else None)
            if study == "optimum" and family in of_family:
                axes.axhline(np.mean([r["reward_of_optimum"] for r in of_family[family].values()]), color=style, linestyle=":", label=f"{family}, optimum")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--mount", help="where models and data of the study are kept, default: a temporary folder")
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("--picture", help="draw the curves into this file (.svg, .png)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        mount = pathlib.Path(args.mount or temporary).resolve()
        for folder in ("models", "data"):
            (mount / folder).mkdir(parents=True, exist_ok=True)
        found = {}
        for study in args.studies:
            for family in FAMILIES:
                for seed in args.seeds:
                    result = STUDIES[study](mount, family, seed)
                    found.setdefault(study, {}).setdefault(family, {})[seed] = result
                    print(study, family, f"seed {seed}", *(f"{name} {value:.4g}" for name, value in result.items() if name != "curve"), flush=True)
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps({"device": harness.device_name(), "command": "python benchmarks/ppo_learning.py", "torch": torch.__version__,
                                                      "transformers": transformers.__version__, "results": found}, indent=1) + "\n")
    if args.picture:
        draw(found, args.picture)


if __name__ == "__main__":
    main()
