"""Speed of what writes tokens row by row, against transformers' generate, in turn on one machine.

    python benchmarks/bench_decoding.py --task chat                # 2 CPU cores: 3 min
    python benchmarks/bench_decoding.py --task ppo-llama --rows 32
    python benchmarks/bench_decoding.py --task chat --width 2048 --layers 16

Both sides have the same model with new weights (bf16 on GPUs), prompts and lengths of replies.
Figure: tokens that were wanted, per second of decoding.
    chat    16 replies of 16 to 192 tokens at once, greedy. ours: chat.py's engine, from requests to
            pieces of text; generate: one padded batch, which ends with its longest reply
    ppo     ppo-llama, ppo-t5: 64 replies to prompts of 8 to 64 tokens, sampled with an end token of
            probability 1/24, at most 128 tokens, --rows at once. ours: rl_ppo.py's sample;
            generate: batches of prompts of like length, with the same noise: the same replies
"""

import argparse
import math
import random
import sys
import time
import types

import harness
import torch
import transformers

sys.path.insert(0, str(harness.ROOT))
import chat
import common
import decoding
import rl_ppo

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 32000
N_REPLIES, LONGEST_REPLY, END = 64, 128, 2


def make_model(auto_class, config):
    torch.manual_seed(0)
    model = auto_class.from_config(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32)


def make_llama(args):
    config = harness.llama_config(args.width, args.layers, vocab_size=VOCABULARY)
    return make_model(transformers.AutoModelForCausalLM, config)


def make_t5(args):
    config = harness.t5_config(args.width, args.layers)
    return make_model(transformers.AutoModelForSeq2SeqLM, config)


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
        prompts = common.Prompts(tokenizer, is_raw=True)
        prompts.stop_ids = []
        self.engine = chat.Engine(self.model, types.SimpleNamespace(max_batch=args.rows), prompts)
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


class EndsSometimes(torch.nn.Module):
    """A head that gives the end token the probability 1/24."""

    def __init__(self, head):
        super().__init__()
        self.head = head
        self.weight = head.weight

    def forward(self, states):
        logits = self.head(states)
        logits[..., END] = logits.float().logsumexp(dim=-1).to(logits.dtype) - math.log(23)
        return logits


class SameNoise(transformers.LogitsProcessor):
    """decoding.choose, which leaves one token to each row."""

    def __init__(self, keys):
        self.generators = [torch.Generator(DEVICE).manual_seed(key) for key in keys]

    def __call__(self, input_ids, scores):
        tokens = decoding.choose(scores.float(), self.generators)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


class Ppo:
    def __init__(self, args, model):
        self.n_rows = args.rows
        self.model = model
        model.set_output_embeddings(EndsSometimes(model.get_output_embeddings()))
        rng = random.Random(0)
        self.examples = []
        for length in rng.choices(range(8, 65), k=N_REPLIES):
            input_ids = [rng.randrange(3, VOCABULARY) for _ in range(length)]
            self.examples.append(rl_ppo.Example("", "", "", input_ids, {}))
        # the keys of sample: seed, name, number
        self.keys = [common.derive_seed(0, "benchmark", i) for i in range(N_REPLIES)]
        self.replies = None
        # what rl_ppo.sample asks of DeepSpeed's engine
        engine = {"module": types.SimpleNamespace(model=model), "device": model.device}
        for name in ("zero_optimization_partition_weights", "torch_autocast_enabled"):
            engine[name] = lambda: False
        engine["eval"] = engine["train"] = lambda: None
        self.engine = types.SimpleNamespace(**engine)
        common.adopt_launcher()
        common.setup_distributed(types.SimpleNamespace(deterministic=False))

    def count(self, replies):
        assert self.replies in (None, replies), "the two sides write different replies"
        self.replies = replies
        return sum(map(len, replies))

    def ours(self):
        args = {"rollout_batch_size": self.n_rows, "max_new_tokens": LONGEST_REPLY, "seed": 0}
        replies, _ = rl_ppo.sample(
            types.SimpleNamespace(**args),
            self.engine,
            types.SimpleNamespace(stop_ids=[END]),
            self.examples,
            ("benchmark",),
            1.0,
        )
        return self.count(list(replies))

    @torch.inference_mode()
    def generate(self):
        has_encoder = self.model.config.is_encoder_decoder
        order = sorted(range(N_REPLIES), key=lambda i: -len(self.examples[i].input_ids))
        replies = [None] * N_REPLIES
        for start in range(0, N_REPLIES, self.n_rows):
            rows = order[start : start + self.n_rows]
            prompts = [self.examples[i].input_ids for i in rows]
            side = "right" if has_encoder else "left"
            input_ids, attention_mask = decoding.collate(prompts, side, DEVICE)
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=LONGEST_REPLY,
                do_sample=False,
                eos_token_id=END,
                pad_token_id=0,
                logits_processor=[SameNoise([self.keys[i] for i in rows])],
            )
            n_before = 1 if has_encoder else input_ids.shape[1]
            for i, ids in zip(rows, output[:, n_before:].tolist()):
                replies[i] = ids[: ids.index(END) + 1] if END in ids else ids
        return self.count(replies)


def ppo_llama(args):
    return Ppo(args, make_llama(args))


def ppo_t5(args):
    return Ppo(args, make_t5(args))


CASES = {"chat": Chat, "ppo-llama": ppo_llama, "ppo-t5": ppo_t5}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", choices=list(CASES), required=True)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=16)
    harness.add_flags(parser)
    args = parser.parse_args()
    case = CASES[args.task](args)

    def run(peer):
        start = time.perf_counter()
        n_tokens = getattr(case, peer)()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return {"decoded": n_tokens / (time.perf_counter() - start)}

    peers = ["ours", "generate"]
    for peer in peers:
        run(peer)  # the first calls are slow
    results = harness.alternate(peers, args.rounds, run)
    ratios = harness.ratios(results, "ours", ["generate"], "decoded")
    harness.write_summary(args, ratios={"decoded": ratios}, runs=results)


if __name__ == "__main__":
    main()
