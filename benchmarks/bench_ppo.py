"""Sampling for PPO: rl_ppo.py's `rollout` against transformers' `generate`, the same replies by both, in turn.

    python benchmarks/bench_ppo.py --out benchmarks/results/ppo_cpu_2cores.json
    python benchmarks/bench_ppo.py --gpu-only                              # on a GPU: larger models in bf16

Random models whose replies end after 24 tokens on average (geometric: the end token has probability 1/24) and at the latest after
128, prompts of 8 to 64 tokens. `generate` samples with the same row-keyed noise, so both write the same tokens; it computes all rows
of a batch until the last one ends. Reported: median ratio of reply tokens per second over the rounds.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import numpy as np

import harness
import torch
import transformers

sys.path.insert(0, str(harness.ROOT))
import common_v1 as common
import rl_ppo

N, LIMIT, END = 64, 128, 2


def models(big):
    size = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16} if big else {
        "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8}
    t5 = {"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16} if big else {
        "d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 4, "num_heads": 8}
    torch.manual_seed(0)
    yield "llama", transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8000, tie_word_embeddings=False, pad_token_id=0, **size))
    yield "t5", transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=8000, decoder_start_token_id=0, feed_forward_proj="gated-gelu",
                                                                              **t5))


class EndsSometimes(torch.nn.Module):
    """The model's head with a fixed chance of the end token, so that lengths are those of a tuned model."""

    def __init__(self, head):
        super().__init__()
        self.head, self.weight = head, head.weight

    def forward(self, hidden):
        logits = self.head(hidden)
        logits[..., END] = logits.float().logsumexp(-1).to(logits.dtype) - np.log(23.0)
        return logits


def with_generate(model, prompts, keys, batch, device):
    found = {}
    order = np.argsort([-len(p) for p in prompts], kind="stable")
    is_source = model.config.is_encoder_decoder
    for start in range(0, len(prompts), batch):
        rows = order[start: start + batch]
        width = max(len(prompts[i]) for i in rows)
        ids = np.zeros((len(rows), width), np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        for r, i in enumerate(rows):
            part = slice(0, len(prompts[i])) if is_source else slice(width - len(prompts[i]), width)
            ids[r, part], mask[r, part] = prompts[i], 1
        first = 1 if is_source else width
        sampler = common.RowKeyedSampler(torch.tensor([keys[i] for i in rows], device=device), 1.0, 1.0, first)
        out = model.generate(input_ids=torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask).to(device), max_new_tokens=LIMIT,
                             do_sample=False, eos_token_id=END, pad_token_id=0, logits_processor=[sampler])[:, first:].cpu().numpy()
        for r, i in enumerate(rows):
            ends = np.flatnonzero(out[r] == END)
            found[int(i)] = out[r][: ends[0] + 1 if len(ends) else LIMIT]
    return [found[i] for i in range(len(prompts))]


def with_rollout(model, prompts, keys, batch, device):
    found = {}
    order = np.argsort([-len(p) for p in prompts], kind="stable")
    for start in range(0, len(prompts), batch):
        rows = [int(i) for i in order[start: start + batch]]
        replies = rl_ppo.rollout(model, [prompts[i] for i in rows], [keys[i] for i in rows], 1.0, LIMIT, [END], 0, device)
        found.update(zip(rows, (ids for ids, _ in replies)))
    return [found[i] for i in range(len(prompts))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    harness.add_flags(parser)
    parser.add_argument("--batch", type=int, default=32, help="replies sampled at once")
    args = parser.parse_args()
    if harness.no_gpu(args):
        return
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    rng, found = np.random.default_rng(0), {}
    prompts = [rng.integers(3, 8000, rng.integers(8, 65)) for _ in range(N)]
    keys = [common.derive_seed("bench", i) for i in range(N)]
    for name, model in models(on_gpu):
        model = model.to(device, torch.bfloat16 if on_gpu else torch.float32).eval()
        model.set_output_embeddings(EndsSometimes(model.get_output_embeddings()))
        peers = {"rollout": with_rollout, "generate": with_generate}
        seconds, replies = {peer: [] for peer in peers}, {}
        for round_ in range(args.rounds + 1):  # the first one warms up
            for peer, function in peers.items():
                started = time.perf_counter()
                with torch.no_grad():
                    replies[peer] = function(model, prompts, keys, args.batch, device)
                if round_:
                    seconds[peer].append(time.perf_counter() - started)
        same = sum(np.array_equal(a, b) for a, b in zip(*replies.values()))
        ratios = [b / a for a, b in zip(seconds["rollout"], seconds["generate"])]
        tokens = sum(map(len, replies["rollout"]))
        found[name] = {"ratio": statistics.median(ratios), "ratios": ratios, "tokens_per_sec": {p: tokens / statistics.median(s) for p, s in seconds.items()},
                       "reply_tokens": tokens, "equal_replies": f"{same} of {N}"}
        print(name, json.dumps(found[name]), flush=True)
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps({"command": "python benchmarks/bench_ppo.py", "device": harness.device_name(), "torch": torch.__version__,
                                                      "transformers": transformers.__version__, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
