"""seq2seq.py: fine-tune an encoder-decoder (T5, Flan-T5, mT5, ByT5, BART) on prompt -> completion data, with DeepSpeed.

    {"train": [{"prompt": "4 March 1997", "completion": "1997-03-04"}, ...], "eval": [...]}      data/<name>.json

    python seq2seq.py                                                        # demo from scratch, 2 minutes on a laptop
    python seq2seq.py --model_init_path google/flan-t5-base --data mydata    # one GPU
    deepspeed --num_gpus 4 seq2seq.py --model_init_name flan-t5-xxl --data mydata --train_batch_size 8 \
        --gradient_accumulation_steps 2                                      # ZeRO stage chosen by the memory table

Writes models/<training_run_name>/: metrics.jsonl, predictions (temperature=0.00_n=1_step=2000.json), checkpoint-<step>/
for resuming, and the trained model itself as a plain Hugging Face folder. docs/seq2seq.md explains every number.

Loss: sum over target tokens of -log p(token | prompt, tokens before), divided by the number of target tokens in the
whole optimizer step (all forward steps, all processes). T5: Raffel et al. 2020, https://arxiv.org/abs/1910.10683.
Shapes: R rows (one or several examples packed), S source tokens, T target tokens of a row, N target tokens of a forward
step, D hidden size, V vocabulary.
"""

import collections
import concurrent.futures
import json
import math
import re
import string
import sys
import time
import types

import common  # first: it prepares the import of DeepSpeed

if getattr(common, "__version__", None) != "0.1.0":
    print(f"ERROR {__file__} belongs to common.py 0.1.0, but {common.__file__} is {getattr(common, '__version__', None)}: copy both from one place",
          file=sys.stderr)
    sys.exit(2)

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM

from common import log

DEMO = ("--model_init_name tiny-t5 --data dates --training_run_name dates-demo --max_steps 800 --train_batch_size 128 "
        "--learning_rate 0.004 --warmup_steps 100 --eval_steps 400 --eval_batch_size 200 --max_new_tokens 16 --logging_steps 50")
PACKED_FAMILIES = ("t5", "mt5")  # relative positions only, so examples can share a row behind block masks
EVAL_METRICS = {"loss": "low", "exact_match": "high", "token_f1": "high"}
FREE_FLAGS = {"max_new_tokens", "temperature", "n_samples", "top_p", "num_beams", "zero3_generation"}  # evaluation only
RECORD_LAYOUT = {"source": "{prompt}", "target": "{completion}"}

# ------------------------------------------------------------------------------------------------ arguments


def parse_args(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if not any(re.match(r"(@|--(model_init_name|model_init_path|data|data_name)(=|$))", word) for word in argv):
        if common.rank() == 0 and not {"-h", "--help"} & set(argv):
            print("demo: python seq2seq.py", " ".join([DEMO, *argv]), flush=True)
        argv = DEMO.split() + argv
    parser = common.Parser(prog="seq2seq.py", description=__doc__.split("\n\n")[0])
    group = parser.add_argument_group("task")
    group.add_argument("--max_source_length", type=int, default=1024, help="longer prompts lose their end [tokens]")
    group.add_argument("--max_target_length", type=int, default=512, help="longer completions lose their end [tokens]")
    group.add_argument("--truncated_eos", action="store_true", help="end truncated completions with the end token all the same")
    group.add_argument("--allow_lossy", action="store_true",
                       help="train although the tokenizer cannot express over 1 %% of the completions")
    group.add_argument("--label_smoothing", type=float, default=0.0, help="share of the target spread over the vocabulary [0-1]")
    group.add_argument("--max_new_tokens", type=int, default=512, help="generation limit at evaluation [tokens]")
    group.add_argument("--temperature", type=float, default=0.001, help="sampling temperature; <= 0.001 = greedy [no unit]")
    group.add_argument("--n_samples", type=int, default=1, help="generations per prompt [count]")
    group.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens of this mass [0-1], 1 = off")
    group.add_argument("--num_beams", type=int, default=1, help="beam search width [count], 1 = off")
    group.add_argument("--zero3_generation", choices=["auto", "gathered", "synced"], default="auto",
                       help="under ZeRO-3 generate with a whole copy of the weights (gathered) or layer by layer (synced); "
                       "auto = gathered if it fits")
    common.add_shared_args(parser)
    args = parser.parse_args(argv)
    if args.debug:
        args.max_steps = 10
    return args


def check_args(args, problems):
    common.check_shared_args(args, problems)
    for name in ("max_source_length", "max_target_length"):
        if getattr(args, name) < 2:
            problems.append(f"--{name} {getattr(args, name)}: expected 2 or more tokens")
    for name in ("max_new_tokens", "n_samples", "num_beams"):
        if getattr(args, name) < 1:
            problems.append(f"--{name} {getattr(args, name)}: expected 1 or more")
    if not 0 <= args.label_smoothing < 1:
        problems.append(f"--label_smoothing {args.label_smoothing}: expected a share below 1")
    if not 0 < args.top_p <= 1:
        problems.append(f"--top_p {args.top_p}: expected a share above 0, at most 1")
    if not 0 <= args.temperature < math.inf:
        problems.append(f"--temperature {args.temperature}: expected 0 (greedy) or more")
    if args.temperature <= 0.001 and args.n_samples > max(1, args.num_beams):
        problems.append(f"--n_samples {args.n_samples} at --temperature {args.temperature}: greedy decoding gives the same answer "
                        "every time; raise --temperature, or --num_beams to at least --n_samples")
    if args.temperature > 0.001 and args.num_beams > 1:
        problems.append(f"--num_beams {args.num_beams} at --temperature {args.temperature}: beams are not sampled; leave out one")
    if args.temperature <= 0.001 and args.top_p < 1:
        problems.append("--top_p has no effect in greedy decoding: raise --temperature")
    names = [name for name in EVAL_METRICS] + [f"{common.parse_data_spec(spec, [])[0]}/{name}" for spec in args.data_name
                                               for name in EVAL_METRICS if len(args.data_name) > 1]
    if args.metric_for_best and args.metric_for_best not in names:
        problems.append(f"--metric_for_best {args.metric_for_best}: expected one of {', '.join(names)}")


# ------------------------------------------------------------------------------------------------ data


def to_pair(record):
    """(prompt, completion, what is wrong or None). {"instruction": "Add", "input": "1 2", "output": "3"} -> ("Add\\n\\n1 2", "3")."""
    if "prompt" not in record and "instruction" in record:  # Alpaca
        prompt, extra, completion = record["instruction"], record.get("input"), record.get("output")
        if extra is not None and not isinstance(extra, str):
            return None, None, f"'input' is a {type(extra).__name__}, expected a string (numbers: put them in quotes)"
        if isinstance(prompt, str) and extra:
            prompt = f"{prompt}\n\n{extra}"
        names = ("instruction", "output")
    else:
        prompt, completion, names = record.get("prompt"), record.get("completion"), ("prompt", "completion")
    for name, text in zip(names, (prompt, completion)):
        if text is None:
            return None, None, f"no {name!r} (has: {', '.join(map(str, record))}); expected {names[0]!r} and {names[1]!r}"
        if not isinstance(text, str):
            return None, None, f"{name!r} is a {type(text).__name__}, expected a string (numbers: put them in quotes)"
        if not text.strip():
            return None, None, f"{name!r} is empty; remove the record or fill it"
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            return None, None, f"{name!r} holds half a character (a lone \\ud800-\\udfff escape); remove it or write the file as UTF-8"
    return prompt, completion, None


def encode_source(ids, limit, eos):
    """Cut a prompt to `limit` tokens: the end is lost, the end token stays. ([5, 6, 7, 1], 3, 1) -> [5, 6, 1]."""
    return ids if len(ids) <= limit else ids[: limit - 1] + [eos] if ids[-1] == eos else ids[:limit]


def encode_target(ids, limit, eos, truncated_eos):
    """End with the end token, unless it was cut away: then the model is not taught to stop there.

    ([5, 6, 7, 1], 3, 1, False) -> [5, 6, 7]; with truncated_eos -> [5, 6, 1].
    """
    ids = ids if ids[-1:] == [eos] else ids + [eos]
    return ids if len(ids) <= limit else ids[: limit - 1] + [eos] if truncated_eos else ids[:limit]


def prompt_hash(prompt):
    return np.int64(common.derive_seed("prompt", prompt))


def tokenize_data_set(files, folder, tokenizer, args, problems):
    """Read, check and tokenise one data set into `folder`, in blocks of 1000 records; returns its counts."""
    writers = {(split, side): common.RaggedWriter(folder / f"{split}.{side}") for split in ("train", "eval", "test")
               for side in ("source", "target")}
    hashes = {split: open(folder / f"{split}.hashes", "wb") for split in ("train", "eval", "test")}
    kept = {split: open(folder / f"{split}.jsonl", "w", encoding="utf-8", errors="backslashreplace") for split in ("eval", "test")}
    counts = collections.Counter({"train": 0, "eval": 0, "test": 0})
    lossy, eos, ends = [], tokenizer.eos_token_id, {tokenizer.eos_token_id, tokenizer.bos_token_id}

    def flush(block):
        if not block:
            return
        prompts, completions = [p for _, _, _, p, _ in block], [c for _, _, _, _, c in block]
        sources, targets = tokenizer(prompts).input_ids, tokenizer(completions).input_ids
        back = tokenizer.batch_decode([[t for t in ids if t not in ends] for ids in targets], skip_special_tokens=False)
        for (where, split, record, prompt, completion), source, target, text in zip(block, sources, targets, back):
            counts[split] += 1
            counts["long prompts"] += len(source) > args.max_source_length
            counts["long completions"] += len(target) > args.max_target_length
            if text.strip() != completion.strip() or tokenizer.unk_token_id in target:
                counts["lossy"] += 1
                if len(lossy) < 3:
                    lossy.append(f"{where}: {completion[:60]!r} comes back as {text[:60]!r}")
            writers[split, "source"].append(encode_source(source, args.max_source_length, eos))
            writers[split, "target"].append(encode_target(target, args.max_target_length, eos, args.truncated_eos))
            hashes[split].write(prompt_hash(prompt).tobytes())
            if split != "train":
                kept[split].write(json.dumps({"prompt": prompt, "completion": completion, "orig_d": record}, ensure_ascii=False) + "\n")

    bar = tqdm(desc="tokenising", unit=" records", delay=5, disable=common.rank() > 0 or None)
    for file_split, path in files.items():
        block = []
        for where, split, record in common.read_records(path, problems, file_split or "train"):
            if split not in ("train", "eval", "test"):
                problems.append(f"{where}: split {split!r}, expected train, eval or test")
                continue
            prompt, completion, wrong = to_pair(record)
            if wrong:
                problems.append(f"{where}: {wrong}")
                continue
            if split == "train" and args.eval_fraction and int(prompt_hash(prompt)) % 10**6 < args.eval_fraction * 10**6:
                split = "eval"  # by prompt, so that duplicates stay together
            block.append((where, split, record, prompt, completion))
            if len(block) == 1000:
                flush(block)
                bar.update(len(block))
                block = []
        flush(block)
    bar.close()
    for file in [*writers.values(), *hashes.values(), *kept.values()]:
        file.close()
    return dict(counts), lossy


class DataSet:
    """One tokenised data set: token ids stay on disk; evaluation records are in memory."""

    def __init__(self, name, amount, folder):
        self.name, self.amount = name, amount
        self.sha256, self.counts = folder.name, json.loads((folder / "counts.json").read_text())
        self.source = {split: common.Ragged(folder / f"{split}.source") for split in ("train", "eval", "test")}
        self.target = {split: common.Ragged(folder / f"{split}.target") for split in ("train", "eval", "test")}
        self.hashes = {split: np.fromfile(folder / f"{split}.hashes", np.int64) for split in ("train", "eval", "test")}
        self.records = {split: [json.loads(line) for line in open(folder / f"{split}.jsonl", encoding="utf-8")]
                        for split in ("eval", "test")}


def load_data(args, tokenizer, problems):
    """All data sets of --data, tokenised once into the cache. Runs before any process group exists: no time-out to hit."""
    data_sets = []
    for spec in args.data_name:
        name, amount = common.parse_data_spec(spec, problems)
        files = common.find_data(args, name, problems)
        if not files or tokenizer is None:
            for split, path in files.items():  # no tokenizer: still report what is wrong with the records
                problems += [f"{where}: {to_pair(r)[2]}" for where, _, r in common.read_records(path, problems) if to_pair(r)[2]]
            continue
        before = len(problems)
        settings = [args.max_source_length, args.max_target_length, args.truncated_eos, args.eval_fraction]
        root, key = common.token_cache(args, "seq2seq 1", files, tokenizer, settings)
        try:
            with common.cache_folder(root, key, problems) as (folder, is_new):
                if is_new:
                    counts, lossy = tokenize_data_set(files, folder, tokenizer, args, problems)
                    common.write_json(folder / "counts.json", {**counts, "lossy_examples": lossy})
        except OSError as error:
            problems.append(f"the token cache cannot be written ({error}); --cache_dir names another folder")
            continue
        if len(problems) > before:
            continue
        data = DataSet(name, amount, root / key)
        data_sets.append(data)
        check_counts(args, data, next(iter(files.values())), problems)
    common.check_evaluation_parts(args, data_sets, "prompts", problems)
    return data_sets


def check_counts(args, data, path, problems):
    """What only the whole data set shows: empty splits, amounts, truncation, completions the tokenizer cannot express."""
    counts, n_all = data.counts, sum(data.counts[split] for split in ("train", "eval", "test"))
    common.check_training_part(args, data, path, problems)
    for what, flag in (("long prompts", "--max_source_length"), ("long completions", "--max_target_length")):
        if counts.get(what):
            log.warning(f"{data.name}: {counts[what]} of {n_all} {what.split()[1]} are longer than {flag} "
                        f"{getattr(args, flag[2:])} tokens and lose their end")
    if counts.get("lossy"):
        examples = "; ".join(counts["lossy_examples"])
        text = (f"{data.name}: {counts['lossy']} of {n_all} completions cannot be expressed by this tokenizer, so the model can never "
                f"write them ({examples})")
        if counts["lossy"] > 0.01 * n_all and not args.allow_lossy:
            problems.append(text + ". Use a byte-level or multilingual model (google/byt5-base, google/mt5-base), or --allow_lossy")
        else:
            log.warning(text)


def pack(ids, lengths, width, packed):
    """(cost, rows): examples put into rows (lists of ids) so that the rows cost little to compute.

    Cost of R rows of S + T tokens, in tokens: R (S + T) + R (S S + T T + S T) / 1.75 width + 4 x padding. The second part
    is attention; 1.75 x the hidden size is where it takes as long as the matrices do (measured on CPU, widths 96 to
    512). Padding weighs more than its time, so that it stays under 5 % on ragged data. Tried are 1, 2, 3, 4, 6, 8 ...
    examples per row while that helps (packed=False: 1); an example goes where it lengthens the fullest row least.
    """
    best_cost, best_rows, n_worse = math.inf, [], 0
    order = ids[np.argsort(-lengths[ids].max(1), kind="stable")]
    real = lengths[ids].sum(0)
    for per_row in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if packed else (1,):
        n_rows = -(-len(ids) // per_row)
        used, rows = (lengths[order], [[int(i)] for i in order]) if per_row == 1 else (np.zeros((n_rows, 2)), [[] for _ in range(n_rows)])
        for i in order if per_row > 1 else []:
            filled = (used + lengths[i]) / real
            row = int(np.argmin(filled.max(1) + 1e-3 * filled.sum(1)))
            used[row] += lengths[i]
            rows[row].append(int(i))
        rows = [row for row in rows if row]
        S, T = map(int, used.max(0))
        padding = len(rows) * (S + T) - int(real.sum())
        cost = len(rows) * (S + T + (S * S + T * T + S * T) / (1.75 * width)) + 4 * padding
        if cost < best_cost:
            best_cost, best_rows, n_worse = cost, rows, 0
        else:
            n_worse += 1
        if n_worse == 2 or len(rows) == 1:
            break
    return best_cost, best_rows


def plan(ids, lengths, width, packed, group_tokens):
    """Groups of rows for one forward step of one rank: examples of like shape together, each group packed.

    Every group costs launches worth about group_tokens tokens. No ids: one empty group. Returns a list of lists of rows.
    """
    best_cost, best_groups = math.inf, [[]]
    for n in (1, 2, 3, 4, 6, 9, 12, 16, 25):
        if n > max(1, len(ids) // 2) or not len(ids):
            break
        found = [pack(cell, lengths, width, packed) for cell in common.length_cells(ids, lengths, n)]
        cost = sum(cost for cost, _ in found) + n * group_tokens
        if cost < best_cost:
            best_cost, best_groups = cost, [rows for _, rows in found]
        elif n > 2:
            break
    return best_groups


def collate(rows, sources, targets, start_id, pad_id):
    """Rows of example ids -> tensors. sources[i], targets[i]: token ids of example i.

    source_ids, source_segment: (R, S); decoder_ids, decoder_segment: (R, T); segment = number of the example in its row,
    from 1 (0 = source padding; target padding belongs to segment 1, so that it attends to something).
    target_index: (N,) positions in the flattened (R x T) hidden states; target_ids: (N,); target_example: (N,).
    The shift happens here and only here: decoder position t reads target t - 1 and predicts target t.
    No rows (this rank has no example): one token in, and no target.
    """
    has_targets = bool(rows)
    if not rows:
        rows, sources, targets = [[0]], {0: [pad_id]}, {0: [pad_id]}
    S = max(sum(len(sources[i]) for i in row) for row in rows)
    T = max(sum(len(targets[i]) for i in row) for row in rows)
    source_ids, source_segment = np.full((len(rows), S), pad_id), np.zeros((len(rows), S), np.int64)
    decoder_ids, decoder_segment = np.full((len(rows), T), pad_id), np.ones((len(rows), T), np.int64)
    index, ids, example = [], [], []
    for r, row in enumerate(rows):
        s = t = 0
        for segment, i in enumerate(row, 1):
            source, target = np.asarray(sources[i]), np.asarray(targets[i])
            source_ids[r, s: s + len(source)], source_segment[r, s: s + len(source)] = source, segment
            decoder_ids[r, t], decoder_ids[r, t + 1: t + len(target)] = start_id, target[:-1]
            decoder_segment[r, t: t + len(target)] = segment
            index.append(r * T + t + np.arange(len(target)))
            ids.append(target)
            example.append(np.full(len(target), i))
            s, t = s + len(source), t + len(target)
    index, ids, example = (np.concatenate(parts)[: None if has_targets else 0] for parts in (index, ids, example))
    arrays = {"source_ids": source_ids, "source_segment": source_segment, "decoder_ids": decoder_ids,
              "decoder_segment": decoder_segment, "target_index": index, "target_ids": ids, "target_example": example}
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}


class TrainingData:
    """The forward steps of optimizer step k, for this rank: a pure function of (seed, k) and the effective batch."""

    def __init__(self, args, data_sets, model_config, packed, group_tokens):
        self.args, self.packed, self.config, self.group_tokens = args, packed, model_config, group_tokens
        self.parts = [(d.source["train"], d.target["train"]) for d in data_sets]
        self.sizes, self.amounts = [len(s) for s, _ in self.parts], [d.amount for d in data_sets]
        self.lengths = np.concatenate([np.stack([s.lengths, t.lengths], 1) for s, t in self.parts])
        self.starts = np.cumsum([0, *self.sizes])
        self.batch = args.train_batch_size * args.gradient_accumulation_steps
        self.per_epoch = len(common.mixed_epoch(self.sizes, self.amounts, args.seed, 0))
        self.steps_per_epoch = -(-self.per_epoch // self.batch)
        self.epoch, self.batches = None, None
        self.width = getattr(model_config, "d_model", 512)

    def step_ids(self, step):
        """Example numbers of optimizer step `step`, counted from 0."""
        epoch, i = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            ids = common.mixed_epoch(self.sizes, self.amounts, self.args.seed, epoch)
            self.epoch, self.batches = epoch, common.epoch_batches(ids, self.lengths, self.batch, self.args.seed, epoch)
        return self.batches[i]

    def example(self, i, side):
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.parts[part][side][i - self.starts[part]]

    def micro_batches(self, step):
        """[(groups, number of logits chunks)] of this rank, one per forward step, and the target tokens of the whole step."""
        ids, world, n_micro = self.step_ids(step), common.world_size(), self.args.gradient_accumulation_steps
        pieces = common.deal(ids, self.lengths.sum(1), world * n_micro)
        batches = []
        for g in range(n_micro):
            together = pieces[g * world: (g + 1) * world]  # what all ranks compute at once: pieces of like size
            # under ZeRO-3 every rank must call the head equally often, so the number of chunks is common
            n_chunks = max(1, -(-max(int(self.lengths[p, 1].sum()) for p in together) // common.chunk_tokens(self.config.vocab_size)))
            mine = together[common.rank()]
            sources, targets = ({int(i): self.example(i, side) for i in mine} for side in (0, 1))
            groups = plan(mine, self.lengths, self.width, self.packed, self.group_tokens)
            batches.append(([collate(rows, sources, targets, self.config.decoder_start_token_id, self.config.pad_token_id)
                             for rows in groups], n_chunks))
        return batches, int(self.lengths[ids, 1].sum())


# ------------------------------------------------------------------------------------------------ model and loss


class CrossEntropy(torch.autograd.Function):
    """-log p of each target: logits (N, V) fp32 or fp64, target_ids (N,) -> (N,). Overwrites the logits, in the forward
    pass by exp(logits - max) and in the backward pass by the gradient, softmax - target: F.cross_entropy holds four
    buffers of that size, which costs a third of the head's time on CPU. Smoothing e: targets (1 - e) onehot + e / V."""

    @staticmethod
    def forward(ctx, logits, target_ids, smoothing):
        wanted = (1 - smoothing) * logits.gather(1, target_ids[:, None]).squeeze(1) + (smoothing * logits.mean(1) if smoothing else 0.0)
        top = logits.amax(1, keepdim=True)
        sums = logits.sub_(top).exp_().sum(1)
        ctx.save_for_backward(logits, sums, target_ids)
        ctx.smoothing = smoothing
        return sums.log() + top.squeeze(1) - wanted

    @staticmethod
    def backward(ctx, grad):
        exps, sums, target_ids = ctx.saved_tensors
        exps.mul_((grad / sums)[:, None])
        if ctx.smoothing:
            exps.sub_((grad * ctx.smoothing / exps.shape[1])[:, None])
        return exps.scatter_add_(1, target_ids[:, None], (ctx.smoothing - 1) * grad[:, None]), None, None


def token_losses(head, hidden, target_ids, n_chunks, smoothing):
    """Cross entropy of each target token: hidden (N, D), target_ids (N,) -> (N,). Through `head`, never more than
    one chunk of logits (N / n_chunks, V) at a time; several chunks are recomputed in the backward pass."""
    def chunk_losses(hidden, target_ids):
        logits = head(hidden)
        return CrossEntropy.apply(logits if logits.dtype == torch.float64 else logits.float(), target_ids, smoothing)
    pairs = zip(hidden.tensor_split(n_chunks), target_ids.tensor_split(n_chunks))
    if n_chunks == 1 or not torch.is_grad_enabled():
        return torch.cat([chunk_losses(h, t) for h, t in pairs])
    return torch.cat([checkpoint(chunk_losses, h, t, use_reentrant=False) for h, t in pairs])


class TargetLosses(torch.nn.Module):
    """What the engine wraps: forward(groups) -> (N,) fp32 loss of every target token, group after group."""

    def __init__(self, model, packed, label_smoothing):
        super().__init__()
        self.model, self.packed, self.label_smoothing = model, packed, label_smoothing

    def forward(self, groups, n_chunks=1):
        if self.packed:
            # all tokens are looked up at once: every look-up costs a dense (V, D) gradient in the backward pass
            ids = [group[name] for group in groups for name in ("source_ids", "decoder_ids")]
            looked_up = self.model.get_input_embeddings()(torch.cat([i.flatten() for i in ids])).split([i.numel() for i in ids])
            embedded = [part.view(*i.shape, -1) for part, i in zip(looked_up, ids)]
            states = [self.packed_states(group, *pair) for group, pair in zip(groups, zip(embedded[::2], embedded[1::2]))]
            head = self.model.lm_head
        else:
            states, head = [self.plain_logits(group) for group in groups], torch.nn.Identity()
        smoothing = self.label_smoothing if self.training else 0.0
        return token_losses(head, torch.cat(states), torch.cat([group["target_ids"] for group in groups]),
                            n_chunks if self.packed else 1, smoothing)  # whole logits exist already: nothing to save

    def plain_logits(self, group):
        """(N, V) logits of any encoder-decoder, one example per row; positions are the model's own business."""
        return self.model(input_ids=group["source_ids"], attention_mask=group["source_segment"] > 0, decoder_input_ids=group["decoder_ids"],
                          use_cache=False).logits.flatten(0, 1)[group["target_index"]]

    def packed_states(self, group, source, decoder_input):
        """(N, D) decoder states of a T5 with several examples per row; source (R, S, D) and decoder_input (R, T, D) are the
        embedded tokens. Masks (R, 1, queries, keys) bool, True = may attend: only within an example. T5's positions are
        relative, so they need no restart."""
        model, source_segment, decoder_segment = self.model, group["source_segment"], group["decoder_segment"]
        T = decoder_segment.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=decoder_segment.device).tril()
        masks = [(source_segment[:, :, None] == source_segment[:, None]).unsqueeze(1),
                 ((decoder_segment[:, :, None] == decoder_segment[:, None]) & causal).unsqueeze(1),
                 (decoder_segment[:, :, None] == source_segment[:, None]).unsqueeze(1)]
        if model.config._attn_implementation == "eager":  # eager attention adds its mask to the scores
            masks = [torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -1e9) for mask in masks]
        encoder_mask, decoder_mask, cross_mask = masks
        encoded = model.encoder(inputs_embeds=source, attention_mask=encoder_mask).last_hidden_state  # (R, S, D)
        hidden = model.decoder(inputs_embeds=decoder_input, attention_mask=decoder_mask, encoder_hidden_states=encoded,
                               encoder_attention_mask=cross_mask).last_hidden_state  # (R, T, D)
        hidden = hidden.flatten(0, 1)[group["target_index"]]  # (N, D): no logits where there is no target
        # T5 v1.0 scales; v1.1, mT5 and ByT5 do not
        return hidden * model.config.d_model**-0.5 if getattr(model.config, "scale_decoder_outputs", False) else hidden


def train_flops(model, n_source, n_target):
    """Floating-point operations of a training step, embeddings left out: encoder weights see source tokens, decoder and head
    target tokens."""
    encoder, decoder = (common.flops_per_token(part, "embed|shared") for part in (model.get_encoder(), model.get_decoder()))
    head = (6 if model.get_output_embeddings().weight.requires_grad else 4) * model.config.vocab_size * getattr(model.config, "d_model", 0)
    return encoder * n_source + (decoder + head) * n_target


# ------------------------------------------------------------------------------------------------ evaluation


def normalize_answer(text):
    """SQuAD's normalisation (Rajpurkar et al. 2016): lower case, no punctuation, no articles, single blanks."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(prediction, gold):
    """F1 of the bags of normalised words. token_f1("the red book", "a red cat") = 0.5."""
    predicted, wanted = normalize_answer(prediction), normalize_answer(gold)
    common_words = sum((collections.Counter(predicted) & collections.Counter(wanted)).values())
    if not predicted or not wanted or not common_words:
        return float(predicted == wanted)
    return 2 * common_words / (len(predicted) + len(wanted))


@torch.no_grad()
def generate(args, engine, tokenizer, rows, step, device):
    """Collective. rows: [(row number, source ids)] -> {row: [n_samples texts]} of this rank's share."""
    per_batch = max(1, args.eval_batch_size // args.n_samples)
    lengths = np.array([len(source) for _, source in rows])
    mine, n_rounds = common.my_batches(len(rows), lengths, per_batch)
    texts = {}
    options = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams, "do_sample": False, "min_length": 0}
    sampled = args.temperature > 0.001
    options["num_return_sequences"] = 1 if sampled else args.n_samples
    model, synced = common.generating_model(args, engine, device)
    for round_ in tqdm(range(n_rounds if synced else len(mine)), desc="generating", delay=5, disable=common.rank() > 0 or None, leave=False):
        batch = mine[round_] if round_ < len(mine) else []  # none left: keep the others company with one token
        sources = [rows[i][1] for i in batch] or [[tokenizer.eos_token_id]]
        if sampled:
            sources = [source for source in sources for _ in range(args.n_samples)]
            keys = [common.derive_seed(args.seed, "sample", step, rows[i][0], n) for i in batch for n in range(args.n_samples)]
            keys = torch.tensor(keys or [0] * args.n_samples, device=device)
            options["logits_processor"] = [common.RowKeyedSampler(keys, args.temperature, args.top_p)]
        padded = collate([[i] for i in range(len(sources))], sources, [[0]] * len(sources), 0, model.config.pad_token_id)
        with torch.autocast(device.type, torch.bfloat16, enabled=engine.torch_autocast_enabled()):
            out = model.generate(input_ids=padded["source_ids"].to(device), attention_mask=(padded["source_segment"] > 0).to(device),
                                 synced_gpus=synced, **options)
        decoded = tokenizer.batch_decode(out, skip_special_tokens=True)
        for n, i in enumerate(batch):
            texts[rows[i][0]] = decoded[n * args.n_samples: (n + 1) * args.n_samples]
    return texts


@torch.no_grad()
def row_losses(args, engine, examples, config, device):
    """Collective. examples: [(source, target)] -> {row: (summed loss, target tokens)} of this rank's share."""
    lengths = np.array([[len(s), len(t)] for s, t in examples]).reshape(-1, 2)
    mine, n_rounds = common.my_batches(len(examples), lengths.sum(1), args.eval_batch_size)
    sources, targets, found = [s for s, _ in examples], [t for _, t in examples], {}
    rounds = n_rounds if engine.zero_optimization_partition_weights() else len(mine)
    n_chunks = -(-args.eval_batch_size * int(lengths[:, 1].max(initial=1)) // common.chunk_tokens(config.vocab_size))  # on every rank the same
    for round_ in tqdm(range(rounds), desc="loss", delay=5, disable=common.rank() > 0 or None, leave=False):
        rows = [[i] for i in mine[round_]] if round_ < len(mine) else []
        batch = collate(rows, sources, targets, config.decoder_start_token_id, config.pad_token_id)
        losses = engine([common.to_device(batch, device)], n_chunks).double().cpu()
        for i in (i for row in rows for i in row):
            of_row = losses[batch["target_example"] == i]
            found[i] = (float(of_row.sum()), len(of_row))
    return found


def evaluate(args, engine, tokenizer, data_sets, split, step, run_dir, device):
    """Collective. Token-mean loss, exact match and token F1 over `split`; writes the predictions file; returns the
    metrics on every rank. Every row is counted once; exact match and F1 are those of the first generation."""
    rows = [(d.name, record, d.source[split][i], d.target[split][i]) for d in data_sets for i, record in enumerate(d.records[split])]
    rows = rows[:100] if args.debug else rows
    engine.eval()
    started = time.perf_counter()
    try:
        local_losses = row_losses(args, engine, [(s, t) for _, _, s, t in rows], engine.module.model.config, device)
        local_texts = generate(args, engine, tokenizer, [(i, s) for i, (_, _, s, _) in enumerate(rows)], step, device)
    except torch.OutOfMemoryError as error:
        common.fail(f"step {step}, evaluation: out of memory ({str(error).splitlines()[0]}). Next: a smaller --eval_batch_size, then a "
                    "smaller --max_new_tokens, then --zero3_generation synced", only_here=True)
    engine.train()
    gathered = [None] * common.world_size()
    dist.all_gather_object(gathered, (local_losses, local_texts))
    losses, texts = {}, {}
    for part_losses, part_texts in gathered:
        losses.update(part_losses)
        texts.update(part_texts)
    assert len(losses) == len(texts) == len(rows), (len(losses), len(texts), len(rows))
    scores = [{"loss": losses[i], "exact_match": float(texts[i][0].strip() == record["completion"].strip()),
               "token_f1": token_f1(texts[i][0], record["completion"])} for i, (_, record, _, _) in enumerate(rows)]
    groups = {"": scores}
    if len(data_sets) > 1:
        for data in data_sets:
            groups[f"{data.name}/"] = [score for score, row in zip(scores, rows) if row[0] == data.name]
    metrics = {}
    for prefix, group in groups.items():
        if group:
            metrics[f"{prefix}loss"] = math.fsum(s["loss"][0] for s in group) / sum(s["loss"][1] for s in group)
            for name in ("exact_match", "token_f1"):
                metrics[f"{prefix}{name}"] = math.fsum(s[name] for s in group) / len(group)
    metrics.update(eval_seconds=round(time.perf_counter() - started, 2), peak_memory_gb=common.peak_memory_gb(device))
    if common.rank() == 0:
        name = predictions_name(args, split, step)
        common.write_json(run_dir / name, [
            {"prompt": record["prompt"], "generations": [{"lm_postprocess": text} for text in texts[i]],
             "demonstration": record["completion"], "orig_d": record["orig_d"], "dataset": name_of_set}
            for i, (name_of_set, record, _, _) in enumerate(rows)])
    return metrics


def predictions_name(args, split, step):
    return f"{'test_' if split == 'test' else ''}temperature={args.temperature:.2f}_n={args.n_samples}_step={step}.json"


# ------------------------------------------------------------------------------------------------ training


def prepare(args):
    """Everything that can be wrong is found here and reported together, before any weight is loaded and before the
    processes meet. Returns what main needs; None after --estimate."""
    problems = []
    check_args(args, problems)
    source, config, tokenizer = common.open_model_folder(args, problems)
    precision, n_params, n_trained, quantized = common.resolve_precision(args), 0, 0, (0, 0)
    if config is not None:
        n_params = common.count_parameters(AutoModelForSeq2SeqLM, config) if config.is_encoder_decoder else 0
        if not n_params or config.decoder_start_token_id is None:
            problems.append(f"model {source!r} is a {config.model_type}, not an encoder-decoder with a decoder_start_token_id; "
                            "decoder-only models: sft_causal.py")
        if precision == "fp16" and "t5" in config.model_type and "fp16" not in args.force:
            problems.append("--precision fp16: T5 overflows in fp16 (inf after the feed-forward layer, then NaN); use bf16 or "
                            "bf16-mixed, or --force fp16")
        if n_params:
            n_trained, quantized = common.count_trained(AutoModelForSeq2SeqLM, source, config, args, n_params, problems)
    if common.estimate_or_merge(AutoModelForSeq2SeqLM, source, config, tokenizer, args, precision, n_params, n_trained, quantized, problems):
        return None
    data_sets = load_data(args, tokenizer, problems)
    problems += [f"--metric_for_best {args.metric_for_best}: {d.name} has no evaluation records" for d in data_sets
                 if (args.metric_for_best or "").startswith(f"{d.name}/") and not d.records["eval"]]
    identity = {"data_sha256": [d.sha256 for d in data_sets], "resolved_precision": precision,
                "effective_batch": args.train_batch_size * args.gradient_accumulation_steps}
    state = {"step": 0, "best": None, "best_step": None, "evals_since_best": 0, "last_eval": None}
    run_dir, resume_from, state, ds_name, ds_config = common.plan_run(
        args, source, identity, FREE_FLAGS, state, n_params, n_trained, precision, problems, quantized)
    if args.no_train:
        for path in (run_dir / predictions_name(args, split, 0) for split in ("eval", "test") if any(d.records[split] for d in data_sets)):
            if path.exists():
                problems.append(f"{path} exists; move it away or choose another --training_run_name")
    if problems:
        common.fail(problems)
    return types.SimpleNamespace(source=source, config=config, tokenizer=tokenizer, precision=precision, n_params=n_params, ds_name=ds_name,
                                 data_sets=data_sets, run_dir=run_dir, identity=identity, resume_from=resume_from, state=state, ds_config=ds_config)


def main(args):
    # 1 setup, 2 data
    common.adopt_launcher()
    common.start_log()
    job = prepare(args)
    if job is None:
        return 0
    source, config, tokenizer, data_sets, run_dir = job.source, job.config, job.tokenizer, job.data_sets, job.run_dir
    device, resume_from, state, precision, ds_name, ds_config, universal = common.begin_run(args, job, __file__)
    rank, world = common.rank(), common.world_size()

    # 3 model
    source = common.base_of_run(AutoModelForSeq2SeqLM, source, config, tokenizer, args, precision, run_dir)
    model = common.load_model(AutoModelForSeq2SeqLM, source, config, args, precision, ds_config)
    packed = config.model_type in PACKED_FAMILIES
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if precision == "bf16-mixed":
        model.get_output_embeddings().register_forward_hook(common.refuse_fp32_logits)
    if args.compile:
        for part in (model.encoder, model.decoder) if packed else (model,):
            part.compile(dynamic=True)

    # 4 engine
    optimizer = None
    if not args.no_train:
        optimizer = torch.optim.AdamW(common.param_groups(model, args.weight_decay), lr=args.learning_rate, fused=True)
    elif ds_config["zero_optimization"]["stage"] < 3:  # without an optimizer there is nothing to partition
        ds_config.update(zero_optimization={"stage": 0}, bf16={"enabled": False}, fp16={"enabled": False})
    engine, *_ = deepspeed.initialize(model=TargetLosses(model, packed, args.label_smoothing), optimizer=optimizer, config=ds_config)
    log.info(f"{source}: {job.n_params / 1e6:.2f} M parameters, {precision}, ZeRO stage {engine.zero_optimization_stage()}, "
             f"{world} process(es) on {device.type}, {'packed rows' if packed else 'one example per row'}")
    step, tracker, steps_per_epoch = state["step"], None, math.inf

    def log_row(split, metrics):
        if rank == 0:
            row = metrics if split == "train" else {f"{split}/{name}": value for name, value in metrics.items()}
            common.log_metrics(run_dir, {"step": step, "epoch": round(step / steps_per_epoch, 3), "split": split, **row}, tracker)

    if args.no_train:
        for split in ("eval", "test"):
            if any(d.records[split] for d in data_sets):
                log_row(split, evaluate(args, engine, tokenizer, data_sets, split, 0, run_dir, device))
        return 0
    stopper = common.Stopper(args.max_hours)  # not before: a signal ends an evaluation at once
    # what one more group of rows costs in launches [tokens]; ZeRO-3 wants the same number of passes on every rank: one
    group_tokens = 1e12 if engine.zero_optimization_partition_weights() else 2048 if device.type == "cuda" else 200
    train_data = TrainingData(args, data_sets, config, packed, group_tokens)
    steps_per_epoch = train_data.steps_per_epoch
    max_steps, eval_steps, save_steps, warmup = common.plan_steps(args, train_data.per_epoch, steps_per_epoch, run_dir)
    rawtune = {"format": 1, "script": "seq2seq.py", "task": "completion", "family": "seq2seq", "record_layout": RECORD_LAYOUT,
               **common.origin(args, source, config, resume_from)}

    # 5 resume
    if resume_from:
        common.load_checkpoint(engine, resume_from, universal)
        log.info(f"continuing {run_dir} from step {step}" + (f" (written by {state['world_size']} processes)" if universal else ""))
    if rank == 0:
        common.rewind_metrics(run_dir, step, state["last_eval"])
        tracker = common.open_tracker(args, run_dir)
    saved_step = step if resume_from else None

    def run_evaluation():
        metrics = evaluate(args, engine, tokenizer, data_sets, "eval", step, run_dir, device)
        log_row("eval", metrics)
        common.note_evaluation(args, state, step, metrics, EVAL_METRICS)

    def save():
        nonlocal saved_step
        if saved_step != step:
            common.save_checkpoint(engine, model, tokenizer, run_dir, step, {**state, "ds_config": ds_name}, rawtune,
                                   args.save_total_limit, state["best_step"])
            saved_step = step
        if rank == 0 and state["best_step"] == step:
            common.write_json(run_dir / "best.json", {"checkpoint": f"checkpoint-{step}", "metric": args.metric_for_best, "value": state["best"]})

    def finished():
        return step >= max_steps or bool(args.early_stopping_patience) and state["evals_since_best"] >= args.early_stopping_patience

    if state["last_eval"] != step and (step % eval_steps == 0 or step >= max_steps):  # the baseline, or what a stop left out
        run_evaluation()
        if saved_step == step and state["best_step"] == step:
            save()  # best.json

    # 6 loop
    peak_flops = (args.peak_tflops or common.measured_tflops(device, torch.bfloat16)) * 1e12 if device.type == "cuda" else None
    window, n_overflows, stop = collections.Counter(), 0, None
    bar = tqdm(total=max_steps, initial=step, desc="training", unit="step", disable=rank > 0 or None)
    ahead = concurrent.futures.ThreadPoolExecutor(1)  # packs step k + 1 while step k is computed
    pending = ahead.submit(train_data.micro_batches, step)
    while not finished() and not stop:
        started = time.perf_counter()
        # fetch the batch of this step, a pure function of (seed, step), and the number of its target tokens everywhere
        micro_batches, n_targets = pending.result()
        pending = ahead.submit(train_data.micro_batches, step + 1)
        lr = common.lr_at(step, args.learning_rate, args.lr_scheduler_type, warmup, max_steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(common.derive_seed(args.seed, "dropout", step, rank))  # so there is no random state to save
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        try:
            for i, (groups, n_chunks) in enumerate(micro_batches):
                is_last = i == len(micro_batches) - 1
                engine.set_gradient_accumulation_boundary(is_last)
                summed = engine([common.to_device(group, device) for group in groups], n_chunks).sum()  # of (N,) losses; N may be 0
                loss_sum += summed.detach()
                # DeepSpeed averages gradients over processes, hence x world; told not to divide by the accumulation
                # steps, this is the sum over all target tokens of the step / their number. (It must be computed from
                # the engine's output: on the output itself 0.19.8 divides all the same, at stage 0 and at bf16 stage 1.)
                engine.backward(summed * (world / n_targets), scale_wrt_gas=False)
                if is_last:  # one small all-reduce: the loss of the whole step, and whether anybody wants to stop
                    reason = stopper.reason()
                    step_loss, n_stop = common.all_reduce_sum([loss_sum.item(), bool(reason)], device)
                    if not math.isfinite(step_loss) and precision != "fp16":
                        common.fail(f"step {step + 1}: the loss is {step_loss}. Nothing of this step was applied; checkpoints are intact. "
                                    "Lower --learning_rate, set --max_grad_norm 1.0, or try --precision fp32")
                    grad_norm = common.grad_norm_before_step(engine)
                engine.step()  # weights move on the last call of a step
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            shapes = [f"{tuple(group['source_ids'].shape)} -> {tuple(group['decoder_ids'].shape)}" for groups, _ in micro_batches for group in groups]
            common.fail(common.out_of_memory(step, error, shapes, "a shorter --max_source_length"), only_here=True)
        grad_norm = float(engine.get_global_grad_norm() if grad_norm is None else grad_norm)
        if precision == "fp16" and not engine.was_step_applied() and n_overflows < 50:
            n_overflows += 1  # the loss scale went down: the same step again
            log.info(f"step {step + 1}: fp16 overflow, repeated with a smaller loss scale")
            pending = ahead.submit(train_data.micro_batches, step)
            continue
        if not math.isfinite(grad_norm):
            common.fail(f"step {step + 1}: the gradient norm is {grad_norm}. Checkpoints are intact: continue from the last one with a lower "
                        "--learning_rate or --precision fp32 (--resume --force changed_flags)")
        n_overflows, step = 0, step + 1
        bar.update()
        for group in (group for groups, _ in micro_batches for group in groups if len(group["target_ids"])):
            window.update(computed=group["source_ids"].numel() + group["decoder_ids"].numel(), sources=int((group["source_segment"] > 0).sum()))
        window.update(loss=step_loss, targets=n_targets, seconds=time.perf_counter() - started)
        stop = (reason or "another process was told to stop") if n_stop else None
        if step % args.logging_steps == 0 or step == max_steps or stop:
            computed, sources = common.all_reduce_sum([window["computed"], window["sources"]], device)
            row = {"loss": window["loss"] / window["targets"], "lr": lr, "grad_norm": grad_norm,
                   "tokens_per_sec": window["targets"] / window["seconds"], "target_tokens": window["targets"],
                   "padding_share": 1 - (sources + window["targets"]) / computed, "peak_memory_gb": common.peak_memory_gb(device)}
            if peak_flops:
                row["mfu" if args.peak_tflops else "mfu_of_matmul"] = (
                    train_flops(model, sources, window["targets"]) / window["seconds"] / peak_flops / world)
            log_row("train", row)
            window.clear()
        if (step % eval_steps == 0 or step == max_steps) and not stop:
            run_evaluation()
        if finished() or stop or state["best_step"] == step or (save_steps and step % save_steps == 0):
            save()
    bar.close()
    ahead.shutdown(cancel_futures=True)
    if stop:
        log.info(f"{stop}: saved at step {step}; the same command continues from here (exit code {common.EXIT_SAVED})")
        return common.EXIT_SAVED

    # 7 export: the best checkpoint if there is a metric for it, else the last; test once with these weights
    save()
    if step < max_steps:
        log.info(f"step {step}: {state['evals_since_best']} evaluations without a better {args.metric_for_best}: stopped early")
    chosen = run_dir / f"checkpoint-{state['best_step'] or step}"
    if any(d.records["test"] for d in data_sets):
        if state["best_step"] not in (None, step):
            common.copy_weights(model, chosen)
        log_row("test", evaluate(args, engine, tokenizer, data_sets, "test", state["best_step"] or step, run_dir, device))
    if rank == 0:
        common.plot_curves(run_dir)
        common.export_root(run_dir, chosen)
        log.info(f"done: {run_dir} holds the model of {chosen.name}, metrics.jsonl and the predictions")
    dist.barrier()
    return 0


if __name__ == "__main__":
    common.leave(main(parse_args()))
