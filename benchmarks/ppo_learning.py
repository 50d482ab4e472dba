"""Does rl_ppo.py find the best policy? With a decoder-only model and a T5, both with new weights.

    python benchmarks/ppo_learning.py --out benchmarks/results/ppo_optimum_cpu_2cores.json  # 20 min

Replies have one token, and the reward is a program. So the best policy under the price of KL is
known, pi*(a) ~ reference(a) exp(reward(a) / beta), and so is its worth, reward - beta KL. The
figure is the share of the way from the worth of the reference to it.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import harness
import numpy as np
import torch
import transformers

sys.path.insert(0, str(harness.ROOT / "data"))
import rewards

BETA = 0.05
FAMILIES = {  # base, class, learning rate
    "decoder": ("tiny-llama", transformers.AutoModelForCausalLM, 0.003),
    "T5": ("tiny-t5", transformers.AutoModelForSeq2SeqLM, 0.002),
}
FLAGS = (  # raw, for the probabilities below are those behind the plain prompt
    "--raw_prompt --reward_fn data/rewards.py:wish --max_new_tokens 1 --max_steps 800 "
    "--num_rollouts 256 --train_batch_size 64 --ppo_epochs 2 --lr_scheduler_type linear "
    f"--init_kl_coef {BETA} --target_kl 0 --eval_steps 400 --logging_steps 40 --data wishes "
    "--num_layers_unfrozen 0 --precision fp32 --save_steps 0 --training_run_name tuned"
)


def token_log_probs(folder, auto_class, prompts):
    """(prompts, V) fp64, of the first token of a reply."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = auto_class.from_pretrained(folder, dtype=torch.float64).eval()
    rows = []
    for prompt in prompts:
        inputs = {"input_ids": torch.tensor([tokenizer(prompt).input_ids])}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]])
        with torch.no_grad():
            rows.append(model(**inputs).logits[0, -1].log_softmax(-1).numpy())
    return np.stack(rows)


def rewards_of_tokens(folder, records):
    """(prompts, V)"""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ends = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    n = transformers.AutoConfig.from_pretrained(folder).vocab_size
    texts = [tokenizer.decode([i] if i not in ends else []) for i in range(n)]
    return np.array([rewards.wish([""] * n, texts, [record] * n) for record in records])


def worth(policy, reference, reward):
    """Of log-probabilities (prompts, V): reward - beta KL, a mean over the prompts."""
    gain = reward - BETA * (policy - reference)
    return (np.exp(policy) * gain).sum(axis=1).mean()


def share_of_the_way(mount, family, seed):
    base, auto_class, learning_rate = FAMILIES[family]
    source = harness.ROOT / "models" / base
    start = mount / "models" / "start"
    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(source)
    auto_class.from_config(config).save_pretrained(start)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(start)
    words = f"--mount_dir {mount} --policy start --seed {seed} --learning_rate {learning_rate}"
    harness.run_script("rl_ppo.py", f"{words} {FLAGS}")
    lines = (harness.ROOT / "data" / "wishes.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "split" not in record]
    prompts = [record["prompt"] for record in records]
    reward = rewards_of_tokens(start, records)
    reference = token_log_probs(start, auto_class, prompts)
    policy = token_log_probs(mount / "models" / "tuned", auto_class, prompts)
    best = reference + reward / BETA
    best -= np.log(np.exp(best).sum(axis=1, keepdims=True))
    lowest = worth(reference, reference, reward)
    way = worth(best, reference, reward) - lowest
    return float((worth(policy, reference, reward) - lowest) / way)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", help="write the figures to this JSON file")
    args = parser.parse_args()
    shares = {family: [] for family in FAMILIES}
    for family in FAMILIES:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as mount:
                shares[family].append(share_of_the_way(pathlib.Path(mount), family, seed))
            print(family, shares[family], flush=True)
    harness.write_summary(args, share_of_the_way=shares)


if __name__ == "__main__":
    main()
