"""clf.py: score texts by a language model's own yes and no, with DeepSpeed: classification, regression, reward models.

    {"train": [{"input": "The striker scored twice.", "target": 1}, ...], "eval": [...]}                data/<name>.json
    {"prompt": "Name a prime number.", "chosen": "7", "rejected": "9"}        preferences, for --loss pairwise

    python clf.py                                                            # demo from scratch, a minute on a laptop
    python clf.py --model_init_path google/flan-t5-base --data mydata --template 'Is this about sports? {input}'
    deepspeed --num_gpus 4 clf.py --model_init_name flan-t5-xl --data mydata --training_run_name myrun
    python clf.py --no_train --model_init_name myrun --data texts.jsonl      # score a file of any size

Writes models/<training_run_name>/: metrics.jsonl, predictions (checkpoint-<step>-preds.json, preds.json), pictures,
checkpoint-<step>/ for resuming, and the trained model as a plain Hugging Face folder. docs/clf.md explains every number.

Score of a text: P(yes) = softmax(logit(no), logit(yes))[1], at the first decoder step (encoder-decoders) or after the
last token (decoder-only). Loss: sum over the texts of the whole optimizer step (all forward steps, all processes) of
the cross entropy with the target (1 - t, t), divided by their number. Preferences: Bradley & Terry 1952, as in Ouyang
et al. 2022, equation 1, https://arxiv.org/abs/2203.02155.
Shapes: R rows (texts) of a forward step, S tokens, D hidden size, V vocabulary, P pairs of replies.
"""

import collections
import concurrent.futures
import itertools
import json
import math
import os
import pathlib
import re
import sys
import time
import types

import common_v1 as common  # first: it prepares the import of DeepSpeed

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from common_v1 import log

DEMO = ("--model_init_name tiny-t5 --data clf_debug --training_run_name clf-demo --max_steps 400 --train_batch_size 64 "
        "--learning_rate 0.003 --warmup_steps 40 --eval_steps 100 --logging_steps 50 --metric_for_best auc")
USUAL_WORDS = ("yes", "no", "Yes", "No", "true", "false", "good", "bad", "y", "n", "1", "0")  # suggested as answers
SHARD = 8192  # texts that are scored between two writes of --no_train
POINT_METRICS = {"loss": "low", "accuracy": "high", "f1": "high", "auc": "high", "average_precision": "high", "brier": "low", "ece": "low",
                 "rmse": "low", "pearson": "high", "spearman": "high", "optimal_accuracy": "high"}
PAIR_METRICS = {"loss": "low", "accuracy": "high", "kendall": "high", "margin": "high"}
LAYOUT = {"template": None, "positive_word": "yes", "negative_word": "no", "max_length": 512, "target_min": 0.0, "target_max": 1.0,
          "loss": "cross_entropy"}  # a flag that is not given: what the model's rawtune.json says, else this
FREE_FLAGS = {"scores_only", "pred_save_path"}  # do not change the mathematics

# ------------------------------------------------------------------------------------------------ arguments


def parse_args(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if not any(re.match(r"(@|--(model_init_name|model_init_path|model_pretrain_name|data|data_name|ensemble)(=|$))", word) for word in argv):
        if common.rank() == 0 and not {"-h", "--help"} & set(argv):
            print("demo: python clf.py", " ".join([DEMO, *argv]), flush=True)
        argv = DEMO.split() + argv
    parser = common.Parser(prog="clf.py", description=__doc__.split("\n\n")[0])
    group = parser.add_argument_group("task")
    group.add_argument("--template", help="text that is scored; {key} = that key of the record, \\n = newline; default {input} "
                       "(--loss pairwise: {prompt}\\n\\n{reply})")
    group.add_argument("--positive_word", help="answer whose logit counts for 1; one piece of the tokenizer; default yes")
    group.add_argument("--negative_word", help="answer whose logit counts for 0; one piece of the tokenizer; default no")
    group.add_argument("--max_length", type=int, help="longer texts lose the end of what was filled in, preferences their beginning "
                       "[tokens], default 512")
    group.add_argument("--target_min", type=float, help="target that means a sure no [your unit], default 0")
    group.add_argument("--target_max", type=float, help="target that means a sure yes [your unit], default 1")
    group.add_argument("--loss", choices=["cross_entropy", "half_kl", "squared_error", "pairwise"],
                       help="soft-label cross entropy (the default) | half its divergence, as an earlier system had it | (score - "
                       "target)^2 | Bradley-Terry on preferences")
    group.add_argument("--class_weights", nargs="+", metavar="NO YES",
                       help="weight of a no and of a yes in the loss [no unit], or 'balanced'; default: equal")
    group.add_argument("--scores_only", action="store_true", help="rows of the predictions files hold pred_score alone")
    group.add_argument("--pred_save_path", help="where the last predictions go [path], default preds.json in the run folder")
    group.add_argument("--ensemble", nargs="+", metavar="FILE", help="average these predictions files into --pred_save_path, and leave")
    group.add_argument("--ensemble_by", choices=["rank", "logit"], help="what --ensemble averages, default rank")
    group.add_argument("--model_pretrain_name", help="folder under models/, else hub id; earlier name of --model_init_name and --model_init_path")
    common.add_shared_args(parser)
    parser.set_defaults(data_name=["clf_debug"], train_batch_size=32, weight_decay=0.01)
    args = parser.parse_args(argv)
    if args.debug:
        args.max_steps = 10
    if args.model_pretrain_name and not args.model_init_name and not args.model_init_path:
        name = args.model_pretrain_name
        roots = (common.mount_dir(args), pathlib.Path("."), common.HERE)
        folders = [n for n in (name, name.split("/")[-1]) if n and any((root / "models" / n).is_dir() for root in roots)]
        args.model_init_name, args.model_init_path = (folders[0], None) if folders else (None, name)
    return args


def check_args(args, problems):
    common.check_shared_args(args, problems)
    if args.max_length is not None and args.max_length < 4:
        problems.append(f"--max_length {args.max_length}: expected 4 or more tokens")
    for name in ("template", "positive_word", "negative_word", "pred_save_path"):
        if getattr(args, name) == "":
            problems.append(f"--{name}: empty")
    for name in ("class_weights", "metric_for_best"):
        if args.no_train and getattr(args, name):
            problems.append(f"--{name} has no effect with --no_train")
    if args.ensemble_by and not args.ensemble:
        problems.append("--ensemble_by has no effect without --ensemble")
    if args.class_weights and args.class_weights != ["balanced"]:
        try:
            good = len(args.class_weights) == 2 and all(0 < float(weight) < math.inf for weight in args.class_weights)
        except ValueError:
            good = False
        if not good:
            problems.append(f"--class_weights {' '.join(args.class_weights)}: expected two positive numbers (of no, of yes), or balanced")


def resolve_layout(args, source, family, problems):
    """What is scored and how: the flag, else the model's own rawtune.json (when clf.py trained it), else the default."""
    stored, path = {}, pathlib.Path(source or "") / "rawtune.json"
    if source and path.is_file() and (record := json.loads(path.read_text())).get("script") == "clf.py":
        stored = {**record["record_layout"], "threshold": record["threshold"], "positive_word": record["verbaliser"]["positive"],
                  "negative_word": record["verbaliser"]["negative"], "target_min": record["target_min"], "target_max": record["target_max"],
                  "loss": record["loss"]}
    layout = {}
    for name, default in LAYOUT.items():
        flag = getattr(args, name)
        flag = flag.replace("\\n", "\n") if name == "template" and flag else flag  # as a shell passes it
        layout[name] = flag if flag is not None else stored.get(name, default)
        if flag is not None and name in stored and flag != stored[name]:
            log.warning(f"--{name} {flag}: the model was trained with {stored[name]!r}")
            stored["threshold"] = None  # it was for that
    if layout["template"] is None:
        layout["template"] = "{prompt}\n\n{reply}" if layout["loss"] == "pairwise" else "{input}"
    if family == "causal" and layout["template"].endswith(" "):
        problems.append(f"--template {layout['template']!r}: the blank at its end belongs to the answer's piece; end without it")
    if not re.search(r"\{\w+\}", layout["template"]):
        problems.append(f"--template {layout['template']!r}: nothing is filled in; expected a key of the records in braces, like {{input}}")
    if layout["loss"] == "pairwise" and "{reply}" not in layout["template"]:
        problems.append(f"--template {layout['template']!r}: --loss pairwise compares replies: expected {{reply}} in it")
    if not -math.inf < layout["target_min"] < layout["target_max"] < math.inf:
        problems.append(f"--target_min {layout['target_min']} --target_max {layout['target_max']}: expected a smaller and a larger number")
    if layout["loss"] == "pairwise" and args.class_weights:
        problems.append("--class_weights has no effect with --loss pairwise, which has no classes: leave one out")
    return types.SimpleNamespace(**layout, family=family, threshold=stored.get("threshold"))


def verbaliser(tokenizer, layout, problems):
    """[id of no, id of yes], each one piece where an answer begins: alone for an encoder-decoder; for a decoder-only model
    as the text goes on, after a blank unless the template ends with a newline. T5: [150, 4273] for "no" and "yes"."""
    before = "" if layout.family == "seq2seq" else "a:\n" if layout.template.endswith("\n") else "a:"
    unknown, words = tokenizer.unk_token_id, {"--negative_word": layout.negative_word, "--positive_word": layout.positive_word}

    def pieces(word):
        head = tokenizer(before, add_special_tokens=False).input_ids if before else []
        ids = tokenizer(before + " " * (before == "a:") + word, add_special_tokens=False).input_ids
        return ids[len(head):] if ids[: len(head)] == head else ids

    found = {flag: pieces(word) for flag, word in words.items()}
    bad = [flag for flag, ids in found.items() if len(ids) != 1 or ids[0] == unknown]
    for flag in bad:
        usual = [w for w in USUAL_WORDS if len(pieces(w)) == 1 and pieces(w)[0] != unknown]
        shown = " ".join(map(repr, tokenizer.convert_ids_to_tokens(found[flag])))
        problems.append(f"{flag} {words[flag]!r} is not one piece of this tokenizer but {len(found[flag])}: {shown}; one piece each: "
                        f"{', '.join(usual) or 'none of the usual words'}")
    if not bad and found["--negative_word"] == found["--positive_word"]:
        problems.append(f"--positive_word {layout.positive_word!r} and --negative_word {layout.negative_word!r} are the same piece: "
                        f"{tokenizer.convert_ids_to_tokens(found['--positive_word'])[0]!r}; choose two words")
    return [ids[0] for ids in found.values() if ids]


# ------------------------------------------------------------------------------------------------ data


def fill(template, record):
    """("Is it {kind}? {input}", {"kind": "sports", "input": "Goal!"}) -> "Is it sports? Goal!"."""
    return re.sub(r"\{(\w+)\}", lambda match: record[match[1]], template)


def to_texts(record, split, layout):
    """(texts, target, key, what is wrong or None): one text and its target in [0, 1] (nan: none given); for preferences
    one text per reply, the best first. key: what two records share when one may give the other's answer away."""
    def wrong(text):
        return None, None, None, text

    needed, replies = set(re.findall(r"\{(\w+)\}", layout.template)), []
    if layout.loss == "pairwise":
        single = split != "train" and "reply" in record and not {"chosen", "replies"} & set(record)  # it has a reward, if no rival
        replies = [record["reply"]] if single else record.get("replies", [record.get("chosen"), record.get("rejected")])
        if not isinstance(replies, list) or len(replies) < 2 - single or None in replies:
            return wrong(f"no 'chosen' and 'rejected' texts, and no list of 'replies', best first (has: {', '.join(map(str, record))}); "
                         "--loss pairwise compares replies; only evaluation records may have a single 'reply'")
        if any(reply in replies[:i] for i, reply in enumerate(replies)):
            return wrong("two of the replies are the same text, so neither is better; remove the record")
        needed -= {"reply"}
    elif "chosen" in record or "replies" in record:
        return wrong("a preference record ('chosen', 'rejected' or 'replies'): needs --loss pairwise")
    for name, text in [*((name, record.get(name)) for name in sorted(needed)), *(("reply", reply) for reply in replies)]:
        if text is None:
            return wrong(f"no {name!r} (has: {', '.join(map(str, record))}), which the template {layout.template!r} fills in")
        if not isinstance(text, str):
            return wrong(f"{name!r} is a {type(text).__name__}, expected a string (numbers: put them in quotes)")
        if not text.strip():
            return wrong(f"{name!r} is empty; remove the record or fill it")
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            return wrong(f"{name!r} holds half a character (a lone \\ud800-\\udfff escape); remove it or write the file as UTF-8")
    if layout.loss == "pairwise":
        texts = [fill(layout.template, {**record, "reply": reply}) for reply in ["", *replies]]
        return texts[1:], math.nan, texts[0], None
    target = record.get("target")
    if target is None and split == "train":
        return wrong(f"no 'target' (has: {', '.join(map(str, record))}); only evaluation records may lack it")
    if target is not None and (isinstance(target, bool) or not isinstance(target, (int, float))):
        return wrong(f"'target' is {target!r}, expected a number from {layout.target_min:g} to {layout.target_max:g}")
    if target is not None and not layout.target_min <= target <= layout.target_max:
        return wrong(f"'target' is {target}, expected {layout.target_min:g} to {layout.target_max:g} (--target_min, --target_max)")
    scaled = math.nan if target is None else (target - layout.target_min) / (layout.target_max - layout.target_min)
    text = fill(layout.template, record)
    return [text], scaled, text, None


def cut(ids, limit, n_end):
    """Cut to `limit` tokens; the last n_end of them stay. ([5, 6, 7, 8, 1], 4, 1) -> [5, 6, 7, 1]."""
    return ids if len(ids) <= limit else ids[: limit - n_end] + ids[len(ids) - n_end:]


def text_hash(text):
    return np.int64(common.derive_seed("text", text))


def encode(tokenizer, texts, layout):
    """Token ids of each text, not yet cut. Encoder-decoders: with their end token; decoder-only: the answer comes next,
    so an end token that some tokenizers add is taken off."""
    ids = tokenizer(texts).input_ids
    if layout.family == "seq2seq":
        return ids
    return [row[:-1] if len(row) > 1 and row[-1] == tokenizer.eos_token_id else row for row in ids]


def tokenize_data_set(files, folder, tokenizer, layout, args, problems):
    """Read, check and tokenise one data set into `folder`, in blocks of 1000 records; returns its counts.

    Per split: rows of token ids (.text), the first row of each example (.first), targets (.targets), hashes of the
    texts (.hashes); evaluation records go to .jsonl, line by line.
    """
    splits = ("train", "eval", "test")
    writers = {split: common.RaggedWriter(folder / f"{split}.text") for split in splits}
    columns = {(split, name): open(folder / f"{split}.{name}", "wb") for split in splits for name in ("first", "targets", "hashes")}
    kept = {split: open(folder / f"{split}.jsonl", "w", encoding="utf-8", errors="backslashreplace") for split in splits[1:]}
    counts, n_rows = collections.Counter({split: 0 for split in splits}), collections.Counter()
    # what stays of a long text: the template's words after what was filled in, and an end token; of preferences all but
    # the beginning, or long prompts would make their replies equal
    n_begin = int(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    n_end = len(encode(tokenizer, [layout.template.rpartition("}")[2]], layout)[0]) - n_begin
    if n_end >= layout.max_length - 1:
        problems.append(f"--max_length {layout.max_length}: the template alone ends with {n_end} tokens")
    if layout.loss == "pairwise":
        n_end = layout.max_length - n_begin
    for split in splits:
        columns[split, "first"].write(np.int64(0).tobytes())

    def flush(block):
        encoded = iter(encode(tokenizer, [text for _, _, texts, _, _ in block for text in texts], layout))
        for split, record, texts, target, key in block:
            rows = [next(encoded) for _ in texts]
            counts[split] += 1
            counts["texts"] += len(rows)
            counts["long texts"] += sum(len(row) > layout.max_length for row in rows)
            counts["texts with unknown characters"] += sum(tokenizer.unk_token_id in row for row in rows)
            for row in rows:
                writers[split].append(cut(row, layout.max_length, n_end))
            n_rows[split] += len(rows)
            columns[split, "first"].write(np.int64(n_rows[split]).tobytes())
            columns[split, "targets"].write(np.float64(target).tobytes())
            columns[split, "hashes"].write(text_hash(key).tobytes())
            if split != "train":
                kept[split].write(json.dumps(record, ensure_ascii=False) + "\n")

    def examples():
        for file_split, path in files.items():
            own_split = file_split or "train"
            if args.no_train and len(files) == 1 and not any("split" in record for _, _, record in common.read_records(path, [])):
                own_split = "eval"  # no line says where it belongs: all are to be scored
            for where, split, record in common.read_records(path, problems, own_split):
                if split not in splits:
                    problems.append(f"{where}: split {split!r}, expected train, eval or test")
                    continue
                texts, target, key, wrong = to_texts(record, split, layout)
                if wrong:
                    problems.append(f"{where}: {wrong}")
                    continue
                if split == "train" and common.is_held_out(args, "text", key):
                    split = "eval"
                yield split, record, texts, target, key

    for block in common.in_blocks(examples(), 1000, "records"):
        flush(block)
    for file in [*writers.values(), *columns.values(), *kept.values()]:
        file.close()
    return dict(counts)


class DataSet:
    """One tokenised data set; texts and evaluation records stay on disk. limit: of evaluation records, or None."""

    def __init__(self, name, amount, folder, limit):
        self.name, self.amount = name, amount
        self.sha256, self.counts = folder.name, json.loads((folder / "counts.json").read_text())
        self.text = {split: common.Ragged(folder / f"{split}.text") for split in ("train", "eval", "test")}
        self.first, self.targets, self.hashes = (
            {split: np.fromfile(folder / f"{split}.{name}", kind) for split in ("train", "eval", "test")}
            for name, kind in (("first", np.int64), ("targets", np.float64), ("hashes", np.int64)))
        for split in ("eval", "test") if limit else ():
            self.first[split], self.targets[split] = self.first[split][: limit + 1], self.targets[split][:limit]
            self.text[split].lengths = self.text[split].lengths[: self.first[split][-1]]
        self.lines = {split: open(folder / f"{split}.jsonl", encoding="utf-8") for split in ("eval", "test")}  # the cache may be deleted

    def records(self, split):
        self.lines[split].seek(0)
        yield from map(json.loads, itertools.islice(self.lines[split], len(self.targets[split])))


def load_data(args, tokenizer, layout, problems):
    """All data sets of --data, tokenised once into the cache. Runs before any process group exists: no time-out to hit."""
    data_sets = []
    for spec in args.data_name:
        name, amount = common.parse_data_spec(spec, problems)
        files = common.find_data(args, name, problems)
        if not files or tokenizer is None:
            for split, path in files.items():  # no tokenizer: still report what is wrong with the records
                found = ((where, to_texts(record, split or own_split, layout)[3]) for where, own_split, record in common.read_records(path, problems))
                problems += [f"{where}: {wrong}" for where, wrong in found if wrong]
            continue
        before = len(problems)
        settings = [layout.template, layout.max_length, layout.target_min, layout.target_max, layout.loss == "pairwise", layout.family,
                    args.eval_fraction, args.no_train]
        root, key = common.token_cache(args, "clf 2", files, tokenizer, settings)
        try:
            with common.cache_folder(root, key, problems) as (folder, is_new):
                if is_new:
                    common.write_json(folder / "counts.json", tokenize_data_set(files, folder, tokenizer, layout, args, problems))
        except OSError as error:
            problems.append(f"the token cache cannot be written ({error}); --cache_dir names another folder")
            continue
        if len(problems) > before:
            continue
        data = DataSet(name, amount, root / key, 100 if args.debug else None)
        data_sets.append(data)
        check_counts(args, data, next(iter(files.values())), problems)
    common.check_evaluation_parts(args, data_sets, "texts", problems)
    return data_sets


def check_counts(args, data, path, problems):
    """What only the whole data set shows: empty splits, amounts, truncation, characters that the tokenizer lacks."""
    counts = data.counts
    common.check_training_part(args, data, path, problems)
    if counts.get("long texts"):
        log.warning(f"{data.name}: {counts['long texts']} of {counts['texts']} texts are longer than --max_length and are cut")
    if counts.get("texts with unknown characters"):
        log.warning(f"{data.name}: {counts['texts with unknown characters']} of {counts['texts']} texts hold characters that this tokenizer "
                    "does not know")


def class_weights(args, data_sets, problems):
    """(weight of a no, weight of a yes) in the loss. balanced: both classes get half of the whole."""
    if not args.class_weights:
        return 1.0, 1.0
    if args.class_weights != ["balanced"]:
        return tuple(float(weight) for weight in args.class_weights)
    taken = [d.amount if isinstance(d.amount, int) else len(d.targets["train"]) * (d.amount or 1) for d in data_sets]
    share = sum(d.targets["train"].mean() * n for d, n in zip(data_sets, taken)) / sum(taken)
    if not 0 < share < 1:
        problems.append(f"--class_weights balanced: all training targets are {share:g}, so one class is empty")
        return 1.0, 1.0
    return 0.5 / (1 - share), 0.5 / share


def collate(texts, pad_id):
    """Token ids of R texts -> input_ids (R, S) int64, padded right, and lengths (R,). No text: one row of one pad token,
    which keeps other ranks company and has weight 0 everywhere."""
    lengths = np.array([len(text) for text in texts] or [1])
    input_ids = np.full((len(lengths), lengths.max()), pad_id)
    for row, text in enumerate(texts):
        input_ids[row, : len(text)] = text
    return {"input_ids": torch.from_numpy(input_ids), "lengths": torch.from_numpy(lengths)}


def collate_pairs(group_sizes):
    """Rows of examples with K replies each, best first -> (better, worse, weight), each (P,): all pairs of an example; their
    weights sum to 1 (Ouyang et al. 2022). [2, 3] -> better 0 2 2 3, worse 1 3 4 4, weight 1 1/3 1/3 1/3."""
    better, worse, weight, start = [], [], [], 0
    for size in group_sizes:
        a, b = np.triu_indices(size, 1)
        better.append(start + a)
        worse.append(start + b)
        weight.append(np.full(len(a), 1 / len(a)))
        start += size
    parts = (better, worse, weight) if group_sizes else ([[0]], [[0]], [[0.0]])
    return {name: torch.from_numpy(np.concatenate(part)) for name, part in zip(("better", "worse", "weight"), parts)}


class TrainingData:
    """The forward steps of optimizer step k, for this rank: a pure function of (seed, k) and the effective batch."""

    def __init__(self, args, data_sets, layout, weights, pad_id):
        self.args, self.pad_id, self.pairwise = args, pad_id, layout.loss == "pairwise"
        self.parts = [(d.text["train"], d.first["train"]) for d in data_sets]
        self.sizes, self.amounts = [len(first) - 1 for _, first in self.parts], [d.amount for d in data_sets]
        self.targets = np.concatenate([d.targets["train"] for d in data_sets])
        self.weights = np.ones(len(self.targets)) if self.pairwise else (1 - self.targets) * weights[0] + self.targets * weights[1]
        self.longest = np.concatenate([np.maximum.reduceat(text.lengths, first[:-1]) for text, first in self.parts])
        self.tokens = np.concatenate([np.add.reduceat(text.lengths, first[:-1]) for text, first in self.parts])
        self.starts = np.cumsum([0, *self.sizes])
        self.batch = args.train_batch_size * args.gradient_accumulation_steps
        self.per_epoch = len(common.mixed_epoch(self.sizes, self.amounts, args.seed, 0))
        self.steps_per_epoch = -(-self.per_epoch // self.batch)
        self.epoch, self.batches = None, None

    def step_ids(self, step):
        """Example numbers of optimizer step `step`, counted from 0."""
        epoch, i = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            ids = common.mixed_epoch(self.sizes, self.amounts, self.args.seed, epoch)
            lengths = np.stack([self.longest, self.longest], 1)
            self.epoch, self.batches = epoch, common.epoch_batches(ids, lengths, self.batch, self.args.seed, epoch)
        return self.batches[i]

    def texts(self, i):
        """Token ids of the texts of example i: one, or one per reply."""
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        text, first = self.parts[part]
        return [text[row] for row in range(*first[i - self.starts[part]: i - self.starts[part] + 2])]

    def micro_batches(self, step):
        """[batch] of this rank, one per forward step, and the total weight of the examples of the whole step."""
        ids, world, n_micro = self.step_ids(step), common.world_size(), self.args.gradient_accumulation_steps
        pieces = common.deal(ids, self.tokens, world * n_micro)
        batches = []
        for g in range(n_micro):  # at once all ranks compute pieces of like size
            mine = pieces[g * world + common.rank()]
            groups = [self.texts(i) for i in mine]
            batch = collate([text for group in groups for text in group], self.pad_id)
            if self.pairwise:
                batch.update(collate_pairs([len(group) for group in groups]))
            else:
                batch.update(target=torch.from_numpy(self.targets[mine] if groups else np.zeros(1)),
                             weight=torch.from_numpy(self.weights[mine] if groups else np.zeros(1)))
            batches.append(batch)
        return batches, math.fsum(self.weights[ids])


# ------------------------------------------------------------------------------------------------ model and loss


class YesNo(torch.nn.Module):
    """What the engine wraps: forward(input_ids (R, S), lengths (R,)) -> (R,) logit(yes) - logit(no), fp32 or fp64.

    The model's own forward runs unchanged, but its head computes two columns instead of V, in fp32 whatever the weights'
    type: a bf16 logit of 10 has steps of 0.06, a bf16 probability is useless for ranking.
    """

    def __init__(self, model, no_yes, mixed=False, device=None):
        super().__init__()
        self.model, self.mixed, self.last = model, mixed, None
        self.register_buffer("no_yes", torch.tensor(no_yes, device=device), persistent=False)
        head = model.get_output_embeddings()

        def two_columns(hidden):  # (R, S, D) -> (R, S or 1, 2); called through the head, so ZeRO-3 gathers its weight
            hidden = hidden if self.last is None else hidden[self.last][:, None]
            wide = torch.promote_types(hidden.dtype, torch.float32)
            with torch.autocast(hidden.device.type, enabled=False):
                bias = None if getattr(head, "bias", None) is None else head.bias[self.no_yes].to(wide)
                return F.linear(hidden.to(wide), head.weight[self.no_yes].to(wide), bias)
        head.forward = two_columns

    def forward(self, input_ids, lengths):
        model = self.model
        if self.mixed and not torch.is_autocast_enabled(input_ids.device.type):
            raise RuntimeError("--precision bf16-mixed: autocast is not in effect with this DeepSpeed")
        if not model.config.is_encoder_decoder:
            # what follows the last token of a text cannot change it (causal attention), so padding needs no mask
            self.last = torch.arange(len(lengths), device=lengths.device), lengths - 1
            logits = model(input_ids=input_ids, use_cache=False).logits[:, 0]
        else:
            inputs = {"attention_mask": torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None], "use_cache": False}
            start = torch.full_like(input_ids[:, :1], model.config.decoder_start_token_id)
            if hasattr(model, "final_logits_bias"):  # BART's family: a bias for each of the V columns
                hidden = model.model(input_ids=input_ids, decoder_input_ids=start, **inputs).last_hidden_state[:, 0]
                logits = model.get_output_embeddings()(hidden) + model.final_logits_bias[0, self.no_yes].to(hidden.device)
            else:
                logits = model(input_ids=input_ids, decoder_input_ids=start, **inputs).logits[:, 0]
        assert logits.shape == (len(lengths), 2), f"{type(model).__name__} does not call its head: logits of shape {tuple(logits.shape)}"
        return logits[:, 1] - logits[:, 0]


def point_losses(logit, target, kind):
    """Loss of each text. logit: (R,) yes minus no; target: (R,) in [0, 1] -> (R,).

    cross_entropy: -(t log p + (1 - t) log(1 - p)); half_kl: half of (cross entropy - entropy of the target), the gradient
    of which is half as large; squared_error: (p - t)^2. point_losses(0, 1, "cross_entropy") = log 2.
    """
    target = target.to(logit.dtype)
    if kind == "squared_error":
        return (logit.sigmoid() - target) ** 2
    cross_entropy = F.binary_cross_entropy_with_logits(logit, target, reduction="none")
    return cross_entropy if kind == "cross_entropy" else 0.5 * (cross_entropy + torch.xlogy(target, target) + torch.xlogy(1 - target, 1 - target))


def pair_losses(logit, better, worse):
    """-log P(better beats worse), P = sigmoid(difference of the replies' logits). logit: (R,), indices: (P,) -> (P,)."""
    return F.softplus(logit[worse] - logit[better])


def batch_loss(logit, batch, kind):
    """Weighted sum of the losses of a batch; divided by the weight of the whole step this is the training loss."""
    losses = pair_losses(logit, batch["better"], batch["worse"]) if kind == "pairwise" else point_losses(logit, batch["target"], kind)
    return (losses * batch["weight"].to(losses.dtype)).sum()


def train_flops(model, n_tokens, n_rows):
    """Floating-point operations of a training step, embeddings and head not counted: a decoder behind an encoder sees one
    token per row."""
    but = "embed|wte|wpe|shared"
    if not model.config.is_encoder_decoder:
        return common.flops_per_token(model.get_decoder(), but) * n_tokens
    return common.flops_per_token(model.get_encoder(), but) * n_tokens + common.flops_per_token(model.get_decoder(), but) * n_rows


# ------------------------------------------------------------------------------------------------ evaluation


def sigmoid(logits):
    """Of a float64 array, exact also where exp would overflow."""
    return np.exp(-np.logaddexp(0, -logits))


def average_ranks(values):
    """Ranks from 1, ties share their mean. [3, 1, 3] -> [2.5, 1, 2.5]."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def rank_shares(values):
    """rank / N, ties share their last rank, as the earlier system normalises scores. [3, 1, 3] -> [1, 1/3, 1]."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) / len(values))[inverse]


def pearson(a, b):
    """Correlation of two (n,) arrays; 0 where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else 0.0


def correlation_p_value(r, n):
    """Two-sided p-value of a correlation r of n pairs, by Student's t with n - 2 degrees of freedom. With t = sqrt(n - 2)
    tan(angle) its tail is the integral of cos(angle)^(n - 3) from asin |r|, here by Gauss-Legendre."""
    if n < 3 or abs(r) >= 1:
        return 0.0 if n > 2 else 1.0
    start = math.asin(abs(r))
    width = min(math.pi / 2 - start, 40 / math.sqrt(n))  # beyond it the integrand is below 1e-300
    nodes, weights = np.polynomial.legendre.leggauss(400)
    tail = float(np.sum(weights * np.cos(start + width * (nodes + 1) / 2) ** (n - 3))) * width / 2
    half = math.exp(math.lgamma((n - 2) / 2) - math.lgamma((n - 1) / 2)) * math.sqrt(math.pi) / 2
    return min(1.0, tail / half)


def roc_auc(scores, is_positive):
    """Probability that a positive scores above a negative, ties half (Mann-Whitney)."""
    n_pos = int(is_positive.sum())
    n_neg = len(is_positive) - n_pos
    return float((average_ranks(scores)[is_positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def average_precision(scores, is_positive):
    """Sum over distinct thresholds, from high to low, of precision x increase of recall."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(is_positive[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # ties are one threshold
    return float(np.sum(hits[last] / (last + 1) * np.diff(hits[last], prepend=0)) / hits[-1])


def f1_score(is_predicted, is_positive):
    found = int((is_predicted & is_positive).sum())
    total = int(is_predicted.sum()) + int(is_positive.sum())
    return 2 * found / total if total else 0.0


def score_bins(p):
    """Which of ten equal bins of [0, 1] each score falls into."""
    return np.minimum((p * 10).astype(int), 9)


def calibration_error(p, target):
    """ECE (Guo et al. 2017): mean over ten equal bins, weighted by their rows, of |mean score - mean target|."""
    return float(np.abs(np.bincount(score_bins(p), p - target)).sum() / len(p))


def best_threshold(p, is_positive):
    """The threshold in [0, 1] with the most right answers of "p >= threshold": halfway between two scores (or 0, or above
    the highest); of several the one nearest to 0.5."""
    values, inverse = np.unique(p, return_inverse=True)
    n_pos = np.bincount(inverse, is_positive, minlength=len(values))
    n_neg = np.bincount(inverse, ~is_positive, minlength=len(values))
    right = np.append(np.cumsum(n_pos[::-1])[::-1], 0) + np.append(0, np.cumsum(n_neg))  # threshold just below values[i]
    between = (values[1:] + values[:-1]) / 2
    between = np.where(between > values[:-1], between, values[1:])  # two neighbours in float64 have nothing between them
    above = (values[-1] + 1) / 2
    thresholds = np.concatenate([[0.0], between, [above] if above > values[-1] else []])  # sigmoid(40) is 1: nothing is above it
    right = right[: len(thresholds)]
    best = np.flatnonzero(right == right.max())
    return float(thresholds[best[np.argmin(np.abs(thresholds[best] - 0.5))]])


def kendall_tau(scores):
    """Tau-b of K scores with the order best to worst: 1 = the same order, -1 = the reverse. scores: (K,), K > 1."""
    signs = np.sign(scores[:, None] - scores[None])
    wanted = np.sign(np.arange(len(scores))[None] - np.arange(len(scores))[:, None])
    return float((signs * wanted).sum() / math.sqrt(max(1.0, (signs**2).sum()) * (wanted**2).sum()))


def rank_metrics(files, target):
    """The earlier system's metrics, all on rank-normalised scores; of several lists of scores the ranks are averaged.

    files: [(n,) scores]; target: (n,) in [0, 1]. Gold is 1 where target > 0.5; the threshold is the best of 0.00 ... 0.99.
    """
    ranks, is_positive = np.mean([rank_shares(scores) for scores in files], 0), target > 0.5
    tried = np.arange(100) / 100
    right = [float(((ranks > threshold) == is_positive).mean()) for threshold in tried]
    spearman = pearson(average_ranks(ranks), average_ranks(target))
    points, values = sigmoid(np.arange(-50, 51) / 10), np.sort(np.mean(files, 0))
    shares = np.searchsorted(values, points, side="right") / len(values)
    shares[0], shares[-1] = 0.0, 1.0
    found = {"accuracy": float(((ranks > 0.5) == is_positive).mean()), "rmse": float(np.sqrt(np.mean((ranks - target) ** 2))),
             "spearman_corr": spearman, "spearman_p-value": correlation_p_value(spearman, len(target)), "optimal_acc": max(right),
             "optimal_threshold": float(tried[int(np.argmax(right))]), "calibration_map": np.stack([points, shares], 1).tolist(),
             "discrete_pred_label": (ranks > 0.5).astype(int).tolist(), "pred_scores": ranks.tolist(), "gold_scores": target.tolist()}
    found["threshold_tuned_discrete_pred_label"] = (ranks > found["optimal_threshold"]).astype(int).tolist()
    return {**found, **({"auc": roc_auc(ranks, is_positive)} if 0 < is_positive.sum() < len(target) else {})}


def undefined_metrics(targets):
    """Metrics that these targets leave without meaning: {name: why}."""
    found, is_positive = {}, targets > 0.5
    if not len(targets):
        return {name: "no evaluation record has a target" for name in POINT_METRICS}
    if not 0 < is_positive.sum() < len(targets):
        found.update({name: "all targets are on one side of the middle" for name in ("auc", "average_precision")})
    if len(np.unique(targets)) < 2:
        found.update({name: "all targets are equal" for name in ("pearson", "spearman")})
    return found


def point_metrics(logits, target, layout, threshold=None):
    """Metrics of (n,) yes-minus-no logits against (n,) targets in [0, 1], nan = none given: that row is left out.

    rmse and thresholds are in the user's unit. threshold: the one of the evaluation split, for test.
    """
    has_target = ~np.isnan(target)
    logits, target = logits[has_target], target[has_target]
    if not len(target):
        return {}
    p, is_positive, span = sigmoid(logits), target > 0.5, layout.target_max - layout.target_min
    skip, brier = undefined_metrics(target), float(np.mean((p - target) ** 2))
    metrics = {
        "loss": float(point_losses(torch.from_numpy(logits), torch.from_numpy(target), layout.loss).mean()),
        "accuracy": float(((p >= 0.5) == is_positive).mean()), "f1": f1_score(p >= 0.5, is_positive),
        "brier": brier, "ece": calibration_error(p, target), "rmse": span * math.sqrt(brier)}
    if "auc" not in skip:
        metrics.update(auc=roc_auc(logits, is_positive), average_precision=average_precision(logits, is_positive))
    if "spearman" not in skip:
        metrics.update(pearson=pearson(p, target), spearman=pearson(average_ranks(logits), average_ranks(target)))
    if threshold is None:
        threshold = best_threshold(p, is_positive)
        metrics.update(optimal_threshold=layout.target_min + span * threshold, optimal_accuracy=float(((p >= threshold) == is_positive).mean()))
    else:  # chosen elsewhere: an honest figure
        threshold = (threshold - layout.target_min) / span
        metrics.update(accuracy_at_threshold=float(((p >= threshold) == is_positive).mean()), f1_at_threshold=f1_score(p >= threshold, is_positive))
    return metrics


def pair_metrics(logits, first):
    """Metrics of ranked replies: rows first[i] to first[i + 1] of the (n,) logits belong to example i, the best first. Each
    is a mean over examples: of -log P(better beats worse), right pairs (ties half), Kendall's tau, logit differences.
    Single replies are left out."""
    sums, n = collections.Counter(), int((np.diff(first) > 1).sum())
    for start, stop in itertools.pairwise(first):
        if stop - start > 1:
            a, b = np.triu_indices(stop - start, 1)
            difference = logits[start: stop][a] - logits[start: stop][b]
            sums.update(loss=float(np.logaddexp(0, -difference).mean()), accuracy=float((np.sign(difference) + 1).mean() / 2),
                        kendall=kendall_tau(logits[start: stop]), margin=float(difference.mean()))
    return {name: value / n for name, value in sums.items()}


@torch.no_grad()
def score_texts(args, engine, texts, pad_id, device, partial=None, stopper=None):
    """Collective. ((n,) float64 yes-minus-no logits of a Ragged of texts, on every rank, or None when told to stop; number of
    texts that were scored now).

    One shard of texts after the other, each sorted by length. partial: a file to which every finished shard is added, so
    that a killed job goes on behind it.
    """
    done = np.empty(0)
    if partial is not None and partial.exists() and common.rank() == 0:
        done = np.fromfile(partial, np.float64, os.path.getsize(partial) // 8 // SHARD * SHARD)  # a kill may leave part of a shard
        log.info(f"{len(done)} of {len(texts)} texts were scored before")
    done = common.broadcast(done, device)
    start = n_before = len(done)
    logits = np.concatenate([done, np.empty(len(texts) - start)])
    synced = engine.zero_optimization_partition_weights()  # all ranks must run equally many forward passes
    bar = tqdm(total=len(texts), initial=start, desc="scoring", unit=" texts", delay=5, disable=common.rank() > 0 or None, leave=False)
    if partial is not None and common.rank() == 0:
        with open(partial, "ab") as file:
            file.truncate(start * 8)
    while start < len(texts):
        stop = min(start + SHARD, len(texts))
        mine, n_rounds = common.my_batches(stop - start, texts.lengths[start: stop], args.eval_batch_size)
        found, scores = torch.zeros(stop - start + 1, dtype=torch.float64), []
        for round_ in range(n_rounds if synced else len(mine)):
            rows = mine[round_] if round_ < len(mine) else []
            batch = common.to_device(collate([texts[start + i] for i in rows], pad_id), device)
            scores.append(engine(batch["input_ids"], batch["lengths"])[: len(rows)])  # stays there: a GPU need not wait
            bar.update(len(rows) * common.world_size())
        if mine:
            found[[i for rows in mine for i in rows]] = torch.cat(scores).double().cpu()
        reason = stopper.reason() if stopper else None
        found[-1] = bool(reason)
        found = found.to(device)
        dist.all_reduce(found)  # each row is one rank's, the others hold zeros
        found = found.cpu().numpy()
        logits[start: stop] = found[:-1]
        if partial is not None and common.rank() == 0:
            with open(partial, "ab") as file:
                file.write(logits[start: stop].tobytes())
                file.flush()
                os.fsync(file.fileno())
        start = stop
        if found[-1] and start < len(texts):
            log.info(f"{reason or 'another process was told to stop'}: {start} of {len(texts)} texts are scored; the same command continues "
                     f"from here (exit code {common.EXIT_SAVED})")
            return None, start - n_before
    bar.close()
    if not np.isfinite(logits).all():
        common.fail(f"{int((~np.isfinite(logits)).sum())} of {len(logits)} texts have no finite score: the weights or --precision "
                    f"{common.resolve_precision(args)} are at fault; try --precision fp32")
    return logits, len(logits) - n_before


def evaluate(args, engine, data_sets, split, layout, pad_id, device, threshold=None, partial=None, stopper=None):
    """Collective. -> (metrics, [(n,) logits of each data set]) on every rank, every text counted once; (None, None) when
    told to stop."""
    engine.eval()
    started, all_logits, n_texts = time.perf_counter(), [], 0
    try:
        for i, data in enumerate(data_sets):
            file = partial and partial.with_name(f"{partial.name}-{split}-{i}.f64")
            logits, n_scored = score_texts(args, engine, data.text[split], pad_id, device, file, stopper)
            if logits is None:
                return None, None
            all_logits.append(logits)
            n_texts += n_scored
    except torch.OutOfMemoryError as error:
        common.fail(f"evaluation: out of memory ({str(error).splitlines()[0]}). Next: a smaller --eval_batch_size, then a smaller --max_length",
                    only_here=True)
    engine.train()
    groups = [("", data_sets, all_logits)] + [(f"{d.name}/", [d], [z]) for d, z in zip(data_sets, all_logits) if len(data_sets) > 1]
    metrics = {}
    for prefix, members, logits in groups:
        if layout.loss == "pairwise":
            starts = np.cumsum([0] + [len(z) for z in logits])
            first = np.concatenate([[0], *(d.first[split][1:] + start for d, start in zip(members, starts))])
            found = pair_metrics(np.concatenate(logits), first)
        else:
            found = point_metrics(np.concatenate(logits), np.concatenate([d.targets[split] for d in members]), layout, threshold)
        metrics.update({prefix + name: value for name, value in found.items()})
    seconds = time.perf_counter() - started
    metrics.update(texts_per_sec=n_texts / seconds, eval_seconds=round(seconds, 2), peak_memory_gb=common.peak_memory_gb(device))
    return common.broadcast(metrics, device), all_logits  # rank 0's: the last digit may differ on unlike machines, and decides


def to_user(layout, logits):
    """Scores in the user's unit, never outside by rounding."""
    return np.clip(layout.target_min + (layout.target_max - layout.target_min) * sigmoid(logits), layout.target_min, layout.target_max)


def write_predictions(path, data_sets, split, logits, layout, scores_only):
    """Rank 0. A JSON list with one row per record, in the order of the data, written aside and renamed; bounded memory."""
    aside, total = pathlib.Path(f"{path}.tmp"), sum(len(d.targets[split]) for d in data_sets)
    aside.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=total, desc="writing", unit=" records", delay=5, leave=False)
    with open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("[")
        n = 0
        for data, values in zip(data_sets, logits):
            scores = to_user(layout, values)
            for i, record in enumerate(data.records(split)):
                rows = slice(*data.first[split][i: i + 2])
                row = {"orig_d": record, "pred_score": float(scores[rows][0]), "dataset": data.name}
                if layout.loss == "pairwise":
                    row["reward"] = float(values[rows][0])
                    if len(scores[rows]) > 1:
                        row.update(pred_score=scores[rows].tolist(), reward=values[rows].tolist())
                file.write((",\n " if n else "\n ") + json.dumps({"pred_score": row["pred_score"]} if scores_only else row, ensure_ascii=False))
                n += 1
                bar.update()
        file.write("\n]\n")
    bar.close()
    os.replace(aside, path)


def plot_reliability(path, p, target):
    """Rank 0: mean target against mean score in ten bins, and the histogram of the scores, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info(f"no {path.name}: package 'matplotlib' is not installed")
        return
    which = score_bins(p)
    filled = np.unique(which)
    figure = Figure(figsize=(9, 4), layout="constrained")
    left = figure.add_subplot(1, 2, 1, title=f"{len(p)} texts, ECE {calibration_error(p, target):.3f}", xlabel="mean score of the bin",
                              ylabel="mean target of the bin", xlim=(0, 1), ylim=(0, 1))
    left.plot([0, 1], [0, 1], color="grey", linestyle="--")
    left.plot([p[which == b].mean() for b in filled], [target[which == b].mean() for b in filled], marker="o")
    right = figure.add_subplot(1, 2, 2, title="scores", xlabel="score", ylabel="texts")
    right.hist([p[target > 0.5], p[target <= 0.5]], bins=20, range=(0, 1), stacked=True, label=["target above the middle", "below"])
    right.legend()
    figure.savefig(path, dpi=80)


def results_path(args, run_dir, split):
    path = pathlib.Path(args.pred_save_path or run_dir / "preds.json")
    return path.with_name(("test_" if split == "test" else "") + path.name)


def write_results(args, run_dir, data_sets, split, logits, layout):
    """Rank 0: the last word on a split: predictions, the earlier system's metrics with their lists, the picture."""
    prefix = "test_" if split == "test" else ""
    write_predictions(results_path(args, run_dir, split), data_sets, split, logits, layout, args.scores_only)
    target = np.concatenate([data.targets[split] for data in data_sets])
    if layout.loss != "pairwise" and not np.isnan(target).all():
        p, target = sigmoid(np.concatenate(logits)[~np.isnan(target)]), target[~np.isnan(target)]
        common.write_json(run_dir / f"{prefix}rank_metrics.json", rank_metrics([p], target))
        plot_reliability(run_dir / f"{prefix}reliability.png", p, target)


def ensemble(args):
    """--ensemble: average predictions files of the same records, by rank / N or by logit, and print metrics; exit code."""
    low, high = (default if flag is None else flag for flag, default in ((args.target_min, 0.0), (args.target_max, 1.0)))
    layout, problems, lists = types.SimpleNamespace(target_min=low, target_max=high, loss="cross_entropy"), [], []
    if not -math.inf < low < high < math.inf:
        common.fail(f"--target_min {low} --target_max {high}: expected a smaller and a larger number")
    if common.rank():
        return 0  # nothing to share out
    if not args.pred_save_path:
        problems.append("--ensemble needs --pred_save_path, where the averaged predictions go")
    elif os.path.exists(args.pred_save_path):
        problems.append(f"--pred_save_path {args.pred_save_path} exists; move it away or choose another")
    for name in args.ensemble:
        try:
            rows = json.loads(pathlib.Path(name).read_text(encoding="utf-8"))
            scores = np.array([row["pred_score"] for row in rows], dtype=np.float64)
            if scores.ndim != 1 or not len(rows) or not ((low <= scores) & (scores <= high)).all():
                raise ValueError(f"expected one score from {low:g} to {high:g} per row (--target_min, --target_max)")
            lists.append((name, rows, scores))
        except (OSError, ValueError, TypeError, KeyError) as error:
            problems.append(f"--ensemble {name}: no predictions file of clf.py ({type(error).__name__}: {error})")
    for name, rows, _ in lists[1:]:
        if [row.get("orig_d") for row in rows] != [row.get("orig_d") for row in lists[0][1]]:
            problems.append(f"--ensemble {name}: other records than {lists[0][0]}, or in another order")
    if problems:
        common.fail(problems)
    shares = [(scores - low) / (high - low) for _, _, scores in lists]

    def logit(p):
        p = np.clip(p, 1e-15, 1 - 1e-15)
        return np.log(p) - np.log1p(-p)

    mean = np.mean([rank_shares(share) for share in shares], 0) if args.ensemble_by != "logit" else sigmoid(np.mean([logit(p) for p in shares], 0))
    rows = [{**row, "pred_score": low + (high - low) * float(value)} for row, value in zip(lists[0][1], mean)]
    for row in rows:
        row.pop("reward", None)  # the first file's
    pathlib.Path(args.pred_save_path).parent.mkdir(parents=True, exist_ok=True)
    common.write_json(args.pred_save_path, [{"pred_score": row["pred_score"]} for row in rows] if args.scores_only else rows)
    log.info(f"{args.pred_save_path}: {len(rows)} rows, each the mean {args.ensemble_by or 'rank'} of {len(lists)} files")
    target = (np.array([row.get("orig_d", {}).get("target", math.nan) for row in rows], dtype=np.float64) - low) / (high - low)
    has_target = ~np.isnan(target)
    if has_target.any():
        metrics = point_metrics(logit(mean), target, layout)
        if args.ensemble_by != "logit":  # ranks are no probabilities
            metrics = {name: value for name, value in metrics.items() if name not in ("loss", "brier", "ece")}
        path = pathlib.Path(args.pred_save_path)
        ranked = rank_metrics([share[has_target] for share in shares], target[has_target])
        common.write_json(path.with_name(f"{path.stem}.rank_metrics.json"), ranked)
        log.info("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    else:
        log.info("no targets in the records: no metrics")
    return 0


# ------------------------------------------------------------------------------------------------ training


def prepare(args):
    """Everything that can be wrong is found here and reported together, before any weight is loaded and before the
    processes meet. Returns what main needs; None after --estimate."""
    problems = []
    check_args(args, problems)
    source, config, tokenizer = common.open_model_folder(args, problems)
    precision, n_params, auto_class, family, no_yes = common.resolve_precision(args), 0, None, None, None
    n_trained, quantized = 0, (0, 0)
    if config is not None:
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is not None:
            auto_class, family = AutoModelForSeq2SeqLM, "seq2seq"
        elif common.is_decoder_only(config):
            auto_class, family = AutoModelForCausalLM, "causal"
        else:
            problems.append(f"model {source!r} is a {config.model_type}: expected an encoder-decoder with a decoder_start_token_id, or a "
                            "decoder-only language model")
        if precision == "fp16" and "t5" in config.model_type and "fp16" not in args.force:
            problems.append("--precision fp16: T5 overflows in fp16 (inf after the feed-forward layer, then NaN); use bf16 or "
                            "bf16-mixed, or --force fp16")
    layout = resolve_layout(args, source, family, problems)
    if args.no_train and source and not common.has_weights(source):
        log.warning(f"{source} has no weights: these are the scores of a random model")
    if auto_class:
        n_params = common.count_parameters(auto_class, config)
        n_trained, quantized = common.count_trained(auto_class, source, config, args, n_params, problems)
        if common.adapter_plan(args, source, config, []).token_ids:
            problems.append(f"{source} is an adapter with rows of new tokens, which scores do not use: merge it first (--merge_lora)")
        no_yes = verbaliser(tokenizer, layout, problems)
    if common.estimate_or_merge(auto_class, source, config, tokenizer, args, precision, n_params, n_trained, quantized, problems):
        return None
    data_sets = load_data(args, tokenizer if auto_class else None, layout, problems)
    weights = class_weights(args, data_sets, problems) if not problems else None
    limit = getattr(config, "max_position_embeddings", None)
    longest = max((int(d.text[split].lengths.max(initial=0)) for d in data_sets for split in d.text), default=0)
    if limit and longest > limit:
        problems.append(f"--max_length {layout.max_length}: there are texts of {longest} tokens, and {source} has {limit} positions; "
                        f"set --max_length {limit} or less")
    if args.metric_for_best:
        check_metric(args, layout, data_sets, problems)
    identity = {"data_sha256": [d.sha256 for d in data_sets], "resolved_precision": precision,
                "effective_batch": args.train_batch_size * args.gradient_accumulation_steps}
    state = {"step": 0, "best": None, "best_step": None, "evals_since_best": 0, "last_eval": None, "threshold": None}
    run_dir, resume_from, state, ds_name, ds_config = common.plan_run(
        args, source, identity, FREE_FLAGS, state, n_params, n_trained, precision, problems, quantized)
    is_own = args.resume and (run_dir / common.COMPLETE).exists() and (
        json.loads((run_dir / "args.json").read_text()).get("pred_save_path") == args.pred_save_path)  # written by this run when it finished
    outputs = [results_path(args, run_dir, split) for split in ("eval", "test") if args.no_train or args.pred_save_path and not is_own]
    outputs += [run_dir / (prefix + name) for prefix in ("", "test_") for name in ("rank_metrics.json", "reliability.png") if args.no_train]
    problems += [f"{path} exists; move it away or choose another {'--pred_save_path' if path.parent != run_dir else '--training_run_name'}"
                 for path in outputs if path.exists()]
    if problems:
        common.fail(problems)
    return types.SimpleNamespace(source=source, config=config, tokenizer=tokenizer, precision=precision, n_params=n_params, ds_name=ds_name,
                                 data_sets=data_sets, run_dir=run_dir, identity=identity, resume_from=resume_from, state=state,
                                 ds_config=ds_config, auto_class=auto_class, layout=layout, no_yes=no_yes, weights=weights)


def check_metric(args, layout, data_sets, problems):
    """--metric_for_best must exist for this loss and mean something on these targets."""
    *prefix, metric = args.metric_for_best.rsplit("/", 1)
    names = [common.parse_data_spec(spec, [])[0] for spec in args.data_name]
    chosen = [d for d in data_sets if prefix in ([], [d.name])]
    if metric not in directions(layout) or prefix and (len(names) < 2 or prefix[0] not in names):
        problems.append(f"--metric_for_best {args.metric_for_best}: expected one of {', '.join(directions(layout))}; with several data sets "
                        "also <data set>/<metric>")
    elif layout.loss != "pairwise" and chosen:
        targets = np.concatenate([d.targets["eval"] for d in chosen])
        why = undefined_metrics(targets[~np.isnan(targets)]).get(metric)
        if why:
            problems.append(f"--metric_for_best {args.metric_for_best}: it has no meaning on the evaluation records: {why}")
    elif chosen and not any((np.diff(d.first["eval"]) > 1).any() for d in chosen):
        problems.append(f"--metric_for_best {args.metric_for_best}: no evaluation records with replies to compare")


def directions(layout):
    return PAIR_METRICS if layout.loss == "pairwise" else POINT_METRICS


def scores_key(args, job):
    """Which texts are scored by what: a file of partial scores is only continued under the same key."""
    files = sorted(pathlib.Path(job.source).glob("*.safetensors")) + sorted(pathlib.Path(job.source).glob("*.bin"))
    weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files] or [getattr(job.config, "_commit_hash", None), args.seed]
    quantize = common.adapter_plan(args, job.source, job.config, []).quantize
    return f"{common.derive_seed(job.source, quantize, weights, [d.sha256 for d in job.data_sets], job.precision, args.eval_batch_size, args.debug):016x}"


def main(args):
    # 1 setup, 2 data
    common.adopt_launcher()
    common.start_log()
    if args.ensemble:
        return ensemble(args)
    job = prepare(args)
    if job is None:
        return 0
    source, config, tokenizer, data_sets, run_dir, layout = job.source, job.config, job.tokenizer, job.data_sets, job.run_dir, job.layout
    device, resume_from, state, precision, ds_name, ds_config, universal = common.begin_run(args, job, __file__)
    rank, world = common.rank(), common.world_size()
    stopper = common.Stopper(args.max_hours)

    # 3 model
    source = common.base_of_run(job.auto_class, source, config, tokenizer, args, precision, run_dir)
    model = common.load_model(job.auto_class, source, config, args, precision, ds_config)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.compile:
        for part in (model.get_encoder(), model.get_decoder()) if config.is_encoder_decoder else (model.get_decoder(),):
            part.compile(dynamic=True)

    # 4 engine
    optimizer = None
    if not args.no_train:
        optimizer = torch.optim.AdamW(common.param_groups(model, args.weight_decay), lr=args.learning_rate, fused=True)
    elif ds_config["zero_optimization"]["stage"] < 3:  # without an optimizer there is nothing to partition
        ds_config.update(zero_optimization={"stage": 0}, bf16={"enabled": False}, fp16={"enabled": False})
    engine, *_ = deepspeed.initialize(model=YesNo(model, job.no_yes, precision == "bf16-mixed", device), optimizer=optimizer, config=ds_config)
    no, yes = tokenizer.convert_ids_to_tokens(job.no_yes)
    log.info(f"{source}: {job.n_params / 1e6:.2f} M parameters, {precision}, ZeRO stage {engine.zero_optimization_stage()}, "
             f"{world} process(es) on {device.type}; score = P({yes!r} against {no!r}) after {layout.template!r}")
    step, tracker, steps_per_epoch, pad_id = state["step"], None, math.inf, config.pad_token_id or 0

    def log_row(split, metrics):
        if rank == 0:
            row = metrics if split == "train" else {f"{split}/{name}": value for name, value in metrics.items()}
            common.log_metrics(run_dir, {"step": step, "epoch": round(step / steps_per_epoch, 3), "split": split, **row}, tracker)

    if args.no_train:
        threshold, partial = layout.threshold, run_dir / f"scores-{scores_key(args, job)}"
        results = {}
        for split in [split for split in ("eval", "test") if any(d.counts[split] for d in data_sets)]:
            metrics, logits = evaluate(args, engine, data_sets, split, layout, pad_id, device, threshold, partial, stopper)
            if metrics is None:
                return common.EXIT_SAVED
            results[split] = metrics, logits
            threshold = metrics.get("optimal_threshold", threshold)
        for split, (metrics, logits) in results.items():  # only now: the same command must be able to continue what was stopped
            log_row(split, metrics)
            if rank == 0:
                write_results(args, run_dir, data_sets, split, logits, layout)
        if rank == 0:
            for path in run_dir.glob("scores-*.f64"):
                if path.name.startswith(partial.name):
                    path.unlink()
                else:
                    log.warning(f"{path} holds scores of another, unfinished command")
        return 0
    train_data = TrainingData(args, data_sets, layout, job.weights, pad_id)
    steps_per_epoch = train_data.steps_per_epoch
    max_steps, eval_steps, save_steps, warmup = common.plan_steps(args, train_data.per_epoch, steps_per_epoch, run_dir)
    rawtune = {"format": 1, "script": "clf.py", "task": "preference" if layout.loss == "pairwise" else "score", "family": layout.family,
               "record_layout": {"template": layout.template, "max_length": layout.max_length,
                                 "truncation": "start" if layout.loss == "pairwise" else "end"}, "loss": layout.loss,
               "verbaliser": {"positive": layout.positive_word, "negative": layout.negative_word, "positive_id": job.no_yes[1],
                              "negative_id": job.no_yes[0]},
               "target_min": layout.target_min, "target_max": layout.target_max, **common.origin(args, source, config, resume_from)}

    # 5 resume
    if resume_from:
        common.load_checkpoint(engine, resume_from, universal)
        log.info(f"continuing {run_dir} from step {step}" + (f" (written by {state['world_size']} processes)" if universal else ""))
    if rank == 0:
        common.rewind_metrics(run_dir, step, state["last_eval"])
        tracker = common.open_tracker(args, run_dir)
    saved_step, evaluated = step if resume_from else None, {}  # evaluated: {step: logits} of the newest evaluation

    def run_evaluation():
        metrics, logits = evaluate(args, engine, data_sets, "eval", layout, pad_id, device)
        log_row("eval", metrics)
        if rank == 0:
            write_predictions(run_dir / f"checkpoint-{step}-preds.json", data_sets, "eval", logits, layout, args.scores_only)
        state["threshold"] = metrics.get("optimal_threshold")
        evaluated.clear()
        evaluated[step] = logits
        common.note_evaluation(args, state, step, metrics, directions(layout))

    def about():
        return {**rawtune, "threshold": state["threshold"] if state["last_eval"] == step else None}  # of these weights, or none

    def save():
        nonlocal saved_step
        if saved_step != step:
            common.save_checkpoint(engine, model, tokenizer, run_dir, step, {**state, "ds_config": ds_name}, about(),
                                   args.save_total_limit, state["best_step"])
            saved_step = step
        elif rank == 0:  # a stop came before the evaluation of this step
            common.write_json(run_dir / f"checkpoint-{step}" / "rawtune.json", about())
        if rank == 0 and state["best_step"] == step:
            common.write_json(run_dir / "best.json", {"checkpoint": f"checkpoint-{step}", "metric": args.metric_for_best, "value": state["best"]})

    def finished():
        return step >= max_steps or bool(args.early_stopping_patience) and state["evals_since_best"] >= args.early_stopping_patience

    if state["last_eval"] != step and (step % eval_steps == 0 or step >= max_steps):  # the baseline, or what a stop left out
        run_evaluation()
        if saved_step == step:
            save()

    # 6 loop
    peak_flops = (args.peak_tflops or common.measured_tflops(device, torch.bfloat16)) * 1e12 if device.type == "cuda" else None
    window, n_overflows, stop = collections.Counter(), 0, None
    bar = tqdm(total=max_steps, initial=step, desc="training", unit="step", disable=rank > 0 or None)
    ahead = concurrent.futures.ThreadPoolExecutor(1)  # collates step k + 1 while step k is computed
    pending = ahead.submit(train_data.micro_batches, step)
    while not finished() and not stop:
        started = time.perf_counter()
        # fetch the batch of this step, a pure function of (seed, step), and the weight of its examples everywhere
        micro_batches, n_targets = pending.result()
        pending = ahead.submit(train_data.micro_batches, step + 1)
        lr = common.lr_at(step, args.learning_rate, args.lr_scheduler_type, warmup, max_steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(common.derive_seed(args.seed, "dropout", step, rank))  # so there is no random state to save
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        try:
            for i, batch in enumerate(micro_batches):
                is_last = i == len(micro_batches) - 1
                engine.set_gradient_accumulation_boundary(is_last)
                batch = common.to_device(batch, device)
                summed = batch_loss(engine(batch["input_ids"], batch["lengths"]), batch, layout.loss)
                loss_sum += summed.detach()
                # DeepSpeed averages gradients over processes, hence x world; told not to divide by the accumulation
                # steps, this is the sum over all texts of the step / their number. (It must be computed from
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
            shapes = [str(tuple(batch["input_ids"].shape)) for batch in micro_batches]
            common.fail(common.out_of_memory(step, error, shapes, "a shorter --max_length"), only_here=True)
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
        for batch in micro_batches:
            if batch["weight"].any():
                window.update(computed=batch["input_ids"].numel(), tokens=int(batch["lengths"].sum()), texts=len(batch["lengths"]))
        window.update(loss=step_loss, targets=n_targets, seconds=time.perf_counter() - started)
        stop = (reason or "another process was told to stop") if n_stop else None
        if step % args.logging_steps == 0 or step == max_steps or stop:
            computed, tokens, texts = common.all_reduce_sum([window["computed"], window["tokens"], window["texts"]], device)
            row = {"loss": window["loss"] / window["targets"], "lr": lr, "grad_norm": grad_norm, "tokens_per_sec": texts / window["seconds"],
                   "target_tokens": int(texts), "input_tokens_per_sec": tokens / window["seconds"], "padding_share": 1 - tokens / computed,
                   "peak_memory_gb": common.peak_memory_gb(device)}
            if peak_flops:
                row["mfu" if args.peak_tflops else "mfu_of_matmul"] = train_flops(model, tokens, texts) / window["seconds"] / peak_flops / world
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

    # 7 export: the best checkpoint if there is a metric for it, else the last; the last predictions are of these weights
    save()
    if step < max_steps:
        log.info(f"step {step}: {state['evals_since_best']} evaluations without a better {args.metric_for_best}: stopped early")
    chosen_step = state["best_step"] or step
    chosen = run_dir / f"checkpoint-{chosen_step}"
    if chosen_step != step:
        common.copy_weights(model, chosen)
    results = {"eval": evaluated.get(chosen_step) or evaluate(args, engine, data_sets, "eval", layout, pad_id, device)[1]}
    if any(d.counts["test"] for d in data_sets):
        threshold = common.broadcast(json.loads((chosen / "rawtune.json").read_text())["threshold"] if rank == 0 else None, device)
        metrics, results["test"] = evaluate(args, engine, data_sets, "test", layout, pad_id, device, threshold)
        log_row("test", metrics)
    for split, logits in results.items() if rank == 0 else ():
        write_results(args, run_dir, data_sets, split, logits, layout)
    if rank == 0:
        common.plot_curves(run_dir)
        common.export_root(run_dir, chosen)
        log.info(f"done: {run_dir} holds the model of {chosen.name}, metrics.jsonl and the predictions")
    dist.barrier()
    return 0


if __name__ == "__main__":
    common.leave(main(parse_args()))
