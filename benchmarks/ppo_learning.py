"""Does rl_ppo.py learn? Three studies, each with a decoder-only model and a T5, all made here.

    python benchmarks/ppo_learning.py --out benchmarks/results/ppo_learning.json   # 3 seeds: 1 hour

optimum     Replies of one token and a programmatic reward: the best policy under the price of KL
            is known, pi*(a) ~ reference(a) exp(reward(a) / beta), and so is its worth, reward -
            beta KL.
verifier    A model tuned on sentences, half of them about sports, is trained on the score of a
            verifier of sports; another one, trained on other sentences, is held out.
arithmetic  A model that adds four digits, not well yet; the reward is 1 for the right answer.
            Greedy accuracy on additions that no training saw.
"""

import argparse
import itertools
import json
import pathlib
import random
import sys
import tempfile

import harness
import numpy as np
import torch
import transformers

ROOT = harness.ROOT
sys.path.insert(0, str(ROOT / "data"))
import rewards  # noqa: E402

BASES = {"decoder": "tiny-llama", "T5": "tiny-t5"}
BETA = 0.05
OPTIMUM = (
    f"--reward_fn data/rewards.py:wish --max_new_tokens 1 --max_steps 800 --num_rollouts 256 "
    f"--train_batch_size 64 --ppo_epochs 2 --lr_scheduler_type linear --init_kl_coef {BETA} "
    "--target_kl 0 --eval_steps 400 --logging_steps 40"
)
VERIFIER = (
    "--reward_model judge --heldout_reward_model holdout --reward_text {reply} "
    "--max_new_tokens 32 --max_steps 200 --num_rollouts 64 --train_batch_size 32 --ppo_epochs 2 "
    "--learning_rate 0.0003 --reward_scaling norm --vf_coef 0.1 --eval_steps 40 "
    "--eval_temperature 1 --n_eval 100 --eval_batch_size 100 --logging_steps 8"
)
ARITHMETIC = (
    "--reward_fn data/rewards.py:last_number --max_new_tokens 6 --max_steps 800 "
    "--num_rollouts 256 --train_batch_size 64 --ppo_epochs 2 --init_kl_coef 0.01 --target_kl 0 "
    "--eval_steps 80 --n_eval 200 --eval_batch_size 200 --logging_steps 16"
)


def auto_class(family):
    if family == "T5":
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def run(mount, script, name, words):
    """models/<name>, made once, by a script of ours."""
    folder = mount / "models" / name
    if not (folder / "COMPLETE").exists():
        shared = f"--mount_dir {mount} --training_run_name {name} --precision fp32 --save_steps 0"
        harness.run_script(script, [*shared.split(), *words.split()])
    return folder


def tune(mount, family, data, words):
    """The name of a run of supervised fine-tuning from scratch."""
    script = "seq2seq.py"
    if family == "decoder":
        script = "sft_causal.py"
        words += " --raw_prompt"
    name = f"{data}-{family}"
    base = f"--model_init_path {ROOT}/models/{BASES[family]} --data {data} --train_batch_size 64"
    run(mount, script, name, f"{base} --learning_rate 0.004 {words}")
    return name


def ppo(mount, name, policy, data, seed, words):
    flags = f"--policy {policy} --data {data} --seed {seed} --num_layers_unfrozen 0 {words}"
    return run(mount, "rl_ppo.py", name, flags)


def curve(folder, split, name):
    """[(step, value)]"""
    return [(row["step"], row[name]) for row in harness.metric_rows(folder, split)]


# ---------------------------------------------------------------------------------------- optimum


def next_token_probs(folder, family, prompts):
    """(prompts, V) fp64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = auto_class(family).from_pretrained(folder, dtype=torch.float64).eval()
    found = []
    for prompt in prompts:
        inputs = {"input_ids": torch.tensor([tokenizer(prompt).input_ids])}
        if family == "T5":
            inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]])
        with torch.no_grad():
            found.append(model(**inputs).logits[0, -1].softmax(-1).numpy())
    return np.stack(found), tokenizer


def worth(policy, reference, reward):
    """(reward, KL, reward - beta KL), each (prompts, V), summed over the vocabulary."""
    kl = (policy * (np.log(policy) - np.log(reference))).sum(axis=1).mean()
    mean_reward = (policy * reward).sum(axis=1).mean()
    return mean_reward, kl, mean_reward - BETA * kl


def optimum(mount, family, seed):
    base = mount / "models" / f"random-{family}-{seed}"
    source = ROOT / "models" / BASES[family]
    if not base.exists():
        torch.manual_seed(seed)
        config = transformers.AutoConfig.from_pretrained(source)
        auto_class(family).from_config(config).save_pretrained(base)
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(base)
    learning_rate = 0.003 if family == "decoder" else 0.002
    # raw, for the probabilities below are those behind the plain prompt
    words = f"{OPTIMUM} --learning_rate {learning_rate} --raw_prompt"
    folder = ppo(mount, f"optimum-{family}-{seed}", base.name, "wishes", seed, words)
    lines = (ROOT / "data" / "wishes.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "split" not in record]
    prompts = [record["prompt"] for record in records]
    reference, tokenizer = next_token_probs(base, family, prompts)
    policy, _ = next_token_probs(folder, family, prompts)
    ends = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    texts = [tokenizer.decode([i] if i not in ends else []) for i in range(reference.shape[1])]
    n = len(texts)
    reward = np.array([rewards.wish(prompts[:1] * n, texts, [record] * n) for record in records])
    best = reference * np.exp(reward / BETA)
    best /= best.sum(axis=1, keepdims=True)
    start = worth(reference, reference, reward)
    found = worth(policy, reference, reward)
    top = worth(best, reference, reward)
    return {
        "reward_before": start[0],
        "reward": found[0],
        "reward_of_optimum": top[0],
        "kl": found[1],
        "kl_of_optimum": top[1],
        "share_of_the_way": (found[2] - start[2]) / (top[2] - start[2]),
        "curve": curve(folder, "train", "ppo/score"),
    }


# --------------------------------------------------------------------------------------- verifier


def write_verifier_data(mount):
    """news-<family>.jsonl to tune on, news.jsonl of prompts, judge.json and holdout.json."""
    source = json.loads((ROOT / "data" / "clf_debug.json").read_text())
    texts = set()
    for records in source.values():
        texts |= {record["input"].split(". ")[0].rstrip(".") + "." for record in records}
    texts = sorted(texts)
    rng = random.Random(0)
    rng.shuffle(texts)
    pairs = [(f"News {rng.randrange(100)}:", rng.choice(texts)) for _ in range(3000)]
    for family in BASES:
        blank = " " if family == "decoder" else ""
        records = [{"prompt": prompt, "completion": blank + text} for prompt, text in pairs]
        for record in records[2900:]:
            record["split"] = "eval"
        write_lines(mount / "data" / f"news-{family}.jsonl", records)
    train = [{"prompt": f"News {i}:"} for i in range(80)]
    held_out = [{"prompt": f"News {i}:", "split": "eval"} for i in range(80, 100)]
    write_lines(mount / "data" / "news.jsonl", train + held_out * 5)
    for name, half in (("judge", 0), ("holdout", 1)):
        part = {split: records[half::2] for split, records in source.items()}
        (mount / "data" / f"{name}.json").write_text(json.dumps(part))


def verifier(mount, family, seed):
    write_verifier_data(mount)
    for name, half in (("judge", 0), ("holdout", 1)):
        words = f"--model_init_path {ROOT}/models/tiny-t5 --data {name} --max_steps 400 "
        words += f"--train_batch_size 64 --learning_rate 0.003 --seed {half} --eval_steps 400"
        run(mount, "clf.py", name, words)
    words = "--max_steps 300 --eval_steps 300 --max_new_tokens 32"
    start = tune(mount, family, f"news-{family}", words)
    folder = ppo(mount, f"verifier-{family}-{seed}", start, "news", seed, VERIFIER)
    heldout = curve(folder, "eval", "eval/heldout_reward")
    reward = curve(folder, "eval", "eval/reward")
    return {
        "heldout_before": heldout[0][1],
        "heldout": max(score for _, score in heldout),
        "reward_before": reward[0][1],
        "reward": reward[-1][1],
        "kl": curve(folder, "train", "ppo/kl")[-1][1],
        "curve": heldout,
    }


# ------------------------------------------------------------------------------------- arithmetic


def arithmetic(mount, family, seed):
    rng = random.Random(1)
    sums = list(itertools.product(range(1, 10), repeat=4))
    rng.shuffle(sums)
    records = []
    for digits in sums[:4000]:
        answer = str(sum(digits))
        prompt = "+".join(map(str, digits)) + "="
        records.append({"prompt": prompt, "completion": answer, "answer": answer})
    for record in records[3800:]:
        record["split"] = "eval"
    write_lines(mount / "data" / "sums.jsonl", records)
    n_steps = 100 if family == "decoder" else 250  # stopped early on purpose
    words = f"--max_steps {n_steps} --eval_steps 1000 --max_new_tokens 6"
    start = tune(mount, family, "sums", words)
    learning_rate = 0.0004 if family == "decoder" else 0.0001
    words = f"{ARITHMETIC} --learning_rate {learning_rate}"
    folder = ppo(mount, f"arithmetic-{family}-{seed}", start, "sums", seed, words)
    accuracy = curve(folder, "eval", "eval/reward")
    return {
        "accuracy_before": accuracy[0][1],
        "accuracy": accuracy[-1][1],
        "kl": curve(folder, "train", "ppo/kl")[-1][1],
        "curve": accuracy,
    }


STUDIES = {"optimum": optimum, "verifier": verifier, "arithmetic": arithmetic}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--mount", help="folder for models and data; else a temporary one")
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--families", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", help="JSON file for the figures and curves")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        mount = pathlib.Path(args.mount or temporary).resolve()
        for name in ("models", "data"):
            (mount / name).mkdir(parents=True, exist_ok=True)
        found = []
        for study, family, seed in itertools.product(args.studies, args.families, args.seeds):
            result = {"study": study, "family": family, "seed": seed}
            result.update(STUDIES[study](mount, family, seed))
            found.append(result)
            shown = [f"{key} {value:.4g}" for key, value in list(result.items())[2:-1]]
            print(study, family, *shown, flush=True)
    if args.out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        about = {"device": harness.device_name(), "command": " ".join(sys.argv), **versions}
        pathlib.Path(args.out).write_text(json.dumps({**about, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
