"""Speed of what writes tokens row by row, against transformers' generate, in turn on one machine.

    python benchmarks/bench_decoding.py --task chat                # 2 CPU cores: 3 min
    python benchmarks/bench_decoding.py --task chat --gpu-only --width 2048 --layers 16

Both sides have the same model with new weights (bf16 on GPUs), prompts and lengths of replies.
Figure: tokens that were wanted, per second.
    chat    16 replies of 16 to 192 tokens at once, greedy. ours: chat.py's engine, from requests to
            pieces of text; generate: one padded batch, which ends with its longest reply
"""

import argparse
import random
import sys
import time
import types

import harness
import torch
import transformers

sys.path.insert(0, str(harness.ROOT))
import chat

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 32000


def make_llama(args):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        num_key_value_heads=args.width // 32,
        max_position_embeddings=2048,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32)


# A case is a class: what its sides share is made once; ours and generate run once in each round and
# return the number of tokens that were wanted.


class Chat:
    def __init__(self, args):
        rng = random.Random(0)
        self.model = make_llama(args)
        self.jobs = []  # (prompt ids, tokens of the reply)
        for i in range(args.rows):
            prompt = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(16, 128))]
            self.jobs.append((prompt, 16 + 176 * i // (args.rows - 1)))
        rng.shuffle(self.jobs)
        self.n_wanted = sum(n_tokens for _, n_tokens in self.jobs)
        tokenizer = transformers.AutoTokenizer.from_pretrained(harness.ROOT / "models/tiny-llama")
        prompts = types.SimpleNamespace(tokenizer=tokenizer)
        engine_args = types.SimpleNamespace(max_batch=args.rows)
        self.engine = chat.Engine(self.model, engine_args, prompts, set())
        self.engine.start()

    def ours(self):
        requests = []
        for prompt_ids, n_tokens in self.jobs:
            request = chat.Request(prompt_ids, 0.0, 1.0, 0, n_tokens, [], 0)
            requests.append(request)
            self.engine.waiting.put(request)
        for request in requests:
            for _ in request.wait():
                pass
        assert sum(len(request.ids) for request in requests) == self.n_wanted
        return self.n_wanted

    @torch.inference_mode()
    def generate(self):
        longest = max(len(prompt_ids) for prompt_ids, _ in self.jobs)
        input_ids = torch.zeros(len(self.jobs), longest, dtype=torch.long)
        for row, (prompt_ids, _) in zip(input_ids, self.jobs):
            row[longest - len(prompt_ids) :] = torch.tensor(prompt_ids)
        input_ids = input_ids.to(DEVICE)
        mask = (input_ids > 0).long()
        n_tokens = max(n_tokens for _, n_tokens in self.jobs)
        options = {"max_new_tokens": n_tokens, "do_sample": False}
        self.model.generate(input_ids, attention_mask=mask, **options)
        return self.n_wanted


CASES = {"chat": Chat}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", choices=list(CASES), required=True)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=16)
    harness.add_flags(parser)
    args = parser.parse_args()
    if harness.no_gpu(args):
        return
    case = CASES[args.task](args)

    def run(peer):
        start = time.perf_counter()
        n_tokens = getattr(case, peer)()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return {"tokens_per_sec": n_tokens / (time.perf_counter() - start)}

    peers = ["ours", "generate"]
    for peer in peers:
        run(peer)  # the first calls are slow
    results = harness.alternate(peers, args.rounds, run)
    ratios = harness.ratios(results, "ours", "tokens_per_sec")
    harness.write_summary(args, results, ratios=ratios)


if __name__ == "__main__":
    main()
