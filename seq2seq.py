"""seq2seq.py: train an encoder-decoder (T5, Flan-T5, mT5, ByT5, BART) on prompt -> completion data, or T5 on plain text, with DeepSpeed.

    {"train": [{"prompt": "4 March 1997", "completion": "1997-03-04"}, ...], "eval": [...]}      data/<name>.json

    python seq2seq.py                                                        # demo from scratch, 2 minutes on a laptop
    python seq2seq.py --model_init_path google/flan-t5-base --data mydata    # one GPU
    deepspeed --num_gpus 4 seq2seq.py --model_init_name flan-t5-xxl --data mydata --train_batch_size 8 \
        --gradient_accumulation_steps 2                                      # ZeRO stage chosen by the memory table
    python seq2seq.py @presets/t5-pretrain --model_init_name tiny-t5 --data corpus.txt  # pretraining by span corruption

Writes models/<training_run_name>/: metrics.jsonl, predictions (temperature=0.00_n=1_step=2000.json), checkpoint-<step>/
for resuming, and the trained model itself as a plain Hugging Face folder. docs/seq2seq.md explains every number.

Loss: sum over target tokens of -log p(token | prompt, tokens before), divided by the number of target tokens in the
whole optimizer step (all forward steps, all processes). T5: Raffel et al. 2020, https://arxiv.org/abs/1910.10683.
Shapes: R rows (one or several examples packed), S source tokens, T target tokens of a row, N target tokens of a forward
step, D hidden size, V vocabulary.
"""

import collections
import concurrent.futures
import gzip
import itertools
import json
import math
import mmap
import os
import pathlib
import re
import string
import sys
import time
import types
import zlib

import common_v1 as common  # first: it prepares the import of DeepSpeed

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM

from common_v1 import log

DEMO = ("--model_init_name tiny-t5 --data dates --training_run_name dates-demo --max_steps 800 --train_batch_size 128 "
        "--learning_rate 0.004 --warmup_steps 100 --eval_steps 400 --eval_batch_size 200 --max_new_tokens 16 --logging_steps 50")
PACKED_FAMILIES = ("t5", "mt5")  # relative positions only, so examples can share a row behind block masks
TASK_METRICS = ("accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman")
EVAL_METRICS = {"loss": "low", **dict.fromkeys(("token_accuracy", "exact_match", "token_f1", *TASK_METRICS, "rouge1", "rougeL"), "high")}
TEXT_ENDINGS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
PIECE = 2**20  # longer documents are cut [bytes]
# [noise density, mean span length], or None: the end of the text from a random place on (prefix language model)
DENOISERS = {"prefix_lm": [None], "ul2": [(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 8.0), (0.15, 64.0), (0.5, 64.0), None]}
FREE_FLAGS = {"max_new_tokens", "temperature", "n_samples", "top_p", "num_beams", "zero3_generation"}  # evaluation only
RECORD_LAYOUT = {"source": "{prompt}", "target": "{completion}"}

# ------------------------------------------------------------------------------------------------ arguments


def parse_args(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if not any(re.match(r"(@|--(model_init_name|model_init_path|data|data_name|data_format|task_dir)(=|$))", word) for word in argv):
        if common.rank() == 0 and not {"-h", "--help"} & set(argv):
            print("demo: python seq2seq.py", " ".join([DEMO, *argv]), flush=True)
        argv = DEMO.split() + argv
    args = arguments().parse_args(argv)
    if args.debug:
        args.max_steps = 10
    if common.reads_tasks(args) and args.data_name == ["data"]:
        args.data_name = [args.data_format]
    return args


def arguments():
    parser = common.Parser(prog="seq2seq.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--objective", choices=["completion", "span_corruption", *DENOISERS], default="completion",
                        help="completion: prompt -> completion; the others pretrain on plain text: T5's span corruption, its end from its "
                        "beginning, UL2's mixture of both")
    group = parser.add_argument_group("pretraining on plain text")
    group.add_argument("--input_length", "--input_seq_length", type=int,
                       help="of the encoder; as much text is taken as fills it [tokens], default 512")
    group.add_argument("--target_length", "--target_seq_length", type=int,
                       help="most that the decoder may get [tokens], default: what --input_length gives")
    group.add_argument("--noise_density", "--mlm_probability", type=float, help="share of the text that is masked [0-1], default 0.15")
    group.add_argument("--mean_noise_span_length", type=float, help="of a masked span [tokens], default 3")
    group.add_argument("--span_labels", choices=["t5", "compact"], help="compact: spans may begin and end anywhere, no end token behind the "
                       "labels; default t5")
    group.add_argument("--documents", choices=["auto", "line", "blank"], help="documents of a .txt: one per line, or with blank lines between; "
                       "default auto: blank if the first MB has any")
    group = parser.add_argument_group("prompts and completions")
    group.add_argument("--max_source_length", type=int, default=1024, help="longer prompts lose their end [tokens]")
    group.add_argument("--max_target_length", type=int, default=512, help="longer completions lose their end [tokens]")
    group.add_argument("--truncated_eos", action="store_true", help="end truncated completions with the end token all the same")
    group.add_argument("--allow_lossy", action="store_true",
                       help="train although the tokenizer cannot express over 1 %% of the completions")
    group.add_argument("--label_smoothing", type=float, default=0.0, help="share of the target spread over the vocabulary [0-1]")
    group.add_argument("--max_new_tokens", type=int,
                       help="generation limit at evaluation [tokens], default 512, or one more than the longest label where the data names labels")
    group.add_argument("--temperature", type=float, default=0.001, help="sampling temperature; <= 0.001 = greedy [no unit]")
    group.add_argument("--n_samples", type=int, default=1, help="generations per prompt [count]")
    group.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens of this mass [0-1], 1 = off")
    group.add_argument("--num_beams", type=int, default=1, help="beam search width [count], 1 = off")
    group.add_argument("--zero3_generation", choices=["auto", "gathered", "synced"], default="auto",
                       help="under ZeRO-3 generate with a whole copy of the weights (gathered) or layer by layer (synced); "
                       "auto = gathered if it fits")
    common.add_task_args(parser)
    group = parser.add_argument_group("optimiser, of this script")
    group.add_argument("--optimizer", choices=["adamw", "adamw_rms", "adafactor"], default="adamw",
                       help="adafactor, and adamw_rms (AdamW's step x the root mean square of each matrix), want ZeRO stage 0")
    group.add_argument("--no_scale_parameter", action="store_true", help="Adafactor's step not x the root mean square of each matrix")
    group.add_argument("--z_loss", type=float, default=0.0, help="adds this x log(Z)^2 to every token's loss [no unit], 1e-4 in T5X, 0 = off")
    common.add_shared_args(parser)
    return parser


def check_args(args, problems):
    common.check_shared_args(args, problems)
    common.check_task_args(args, problems)
    if common.reads_tasks(args) and args.objective != "completion":
        problems.append(f"--data_format {args.data_format} has no effect with --objective {args.objective}")
    parser = arguments()
    for group in parser._action_groups:
        if group.title == ("pretraining on plain text" if args.objective == "completion" else "prompts and completions"):
            problems += [f"--{action.dest} has no effect with --objective {args.objective}" for action in group._group_actions
                         if getattr(args, action.dest) != action.default]
    if args.objective in DENOISERS:
        problems += [f"--{name} belongs to --objective span_corruption, {args.objective} has its own noise"
                     for name in ("noise_density", "mean_noise_span_length", "span_labels") if getattr(args, name) is not None]
    if not 0 < default(args.noise_density, 0.15) < 1:
        problems.append(f"--noise_density {args.noise_density}: expected a share between 0 and 1")
    if not 1 <= default(args.mean_noise_span_length, 3) < math.inf:
        problems.append(f"--mean_noise_span_length {args.mean_noise_span_length}: expected 1 or more tokens")
    if args.no_scale_parameter and args.optimizer != "adafactor":
        problems.append("--no_scale_parameter has no effect without --optimizer adafactor")
    if not 0 <= args.z_loss < math.inf:
        problems.append(f"--z_loss {args.z_loss}: expected 0 (off) or more")
    for name in ("max_source_length", "max_target_length", "input_length", "target_length"):
        if default(getattr(args, name), 4) < (4 if name == "input_length" else 2):
            problems.append(f"--{name} {getattr(args, name)}: expected {4 if name == 'input_length' else 2} or more tokens")
    for name in ("max_new_tokens", "n_samples", "num_beams"):
        if default(getattr(args, name), 1) < 1:
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
    if args.metric_for_best and args.metric_for_best.split("/")[-1] not in EVAL_METRICS:
        problems.append(f"--metric_for_best {args.metric_for_best}: expected one of {', '.join(EVAL_METRICS)}, behind <data set>/ where there are several")


def default(value, otherwise):
    return otherwise if value is None else value


def check_metric(args, data_sets, problems):
    """--metric_for_best exists; where it is unset, a single data set that names its task decides it."""
    if len(data_sets) == 1 and data_sets[0].task and not args.metric_for_best and not args.no_train:
        args.metric_for_best = data_sets[0].task["metric_for_best"]
        log.info(f"--metric_for_best {args.metric_for_best}, as {data_sets[0].name} says")
    plain = ["loss", "token_accuracy"] + ([] if args.objective != "completion" else ["exact_match", "rouge1", "rougeL"] if common.reads_tasks(args) else
                                          ["exact_match", "token_f1"])
    found = dict.fromkeys(plain, data_sets) if len(data_sets) > 1 else {}
    for data in data_sets:
        first = f"{data.name}/" if len(data_sets) > 1 else ""
        for prefix in (first, *(f"{first}{part}/" for part in data.parts)):
            found.update({prefix + name: data.records["eval"] for name in plain + (data.task["metrics"] if data.task else [])})
    if args.metric_for_best and len(data_sets) == len(args.data_name) and not found.get(args.metric_for_best):
        problems.append(f"--metric_for_best {args.metric_for_best}: " + (
            f"{args.metric_for_best.split('/')[0]} has no evaluation records" if args.metric_for_best in found else f"expected one of {', '.join(found)}"))


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


def read_examples(files, tokenizer, args, problems, counts):
    """Yield (where, split, record, [prompt], [completion], key) of one data set, or ("task", entry) in place of the prompts. Of several
    prompts or completions training draws one in each epoch; key: what records share that must not be on both sides of a split."""
    if common.reads_tasks(args):
        yield from common.task_examples(args, files, tokenizer, args.max_source_length, "prompt", problems, counts)
        return
    for file_split, path in files.items():
        for where, split, record in common.read_records(path, problems, file_split or "train"):
            if split == "task":
                yield where, split, record, [], [], None
                continue
            prompt, completion, wrong = to_pair(record)
            if split not in ("train", "eval", "test"):
                wrong = f"split {split!r}, expected train, eval or test"
            if wrong:
                problems.append(f"{where}: {wrong}")
            else:
                split = "eval" if split == "train" and common.is_held_out(args, "prompt", prompt) else split
                yield where, split, record, [prompt], [completion], prompt


def tokenize_data_set(files, folder, tokenizer, args, problems):
    """Read, check and tokenise one data set into `folder`, in blocks of 1000 records; returns its counts.

    Per split: the ids of all prompts (.source) and completions (.target), how many of both each example has (.choices, int64), hashes of
    the keys (.hashes); evaluation rows also as .jsonl.
    """
    writers = {(split, side): common.RaggedWriter(folder / f"{split}.{side}") for split in ("train", "eval", "test")
               for side in ("source", "target")}
    columns = {(split, name): open(folder / f"{split}.{name}", "wb") for split in ("train", "eval", "test") for name in ("choices", "hashes")}
    kept = {split: open(folder / f"{split}.jsonl", "w", encoding="utf-8", errors="backslashreplace") for split in ("eval", "test")}
    counts, task = collections.Counter({"train": 0, "eval": 0, "test": 0}), None
    lossy, eos, ends = [], tokenizer.eos_token_id, {tokenizer.eos_token_id, tokenizer.bos_token_id}

    def flush(block):
        texts = [[text for example in block for text in example[i]] for i in (3, 4)]
        sources, targets = (tokenizer(part).input_ids for part in texts)
        back = tokenizer.batch_decode([[t for t in ids if t not in ends] for ids in targets], skip_special_tokens=False)
        sources, targets = iter(sources), zip(targets, back)
        for where, split, record, prompts, completions, key in block:
            counts.update({split: 1, "all prompts": len(prompts), "all completions": len(completions)})
            for source in itertools.islice(sources, len(prompts)):
                counts["long prompts"] += len(source) > args.max_source_length
                writers[split, "source"].append(encode_source(source, args.max_source_length, eos))
            for completion, (target, text) in zip(completions, itertools.islice(targets, len(completions))):
                counts["long completions"] += len(target) > args.max_target_length
                counts["longest completion"] = max(counts["longest completion"], len(target))
                if text.strip() != completion.strip() or tokenizer.unk_token_id in target:
                    counts["lossy"] += 1
                    if len(lossy) < 3:
                        lossy.append(f"{where}: {completion[:60]!r} comes back as {text[:60]!r}")
                writers[split, "target"].append(encode_target(target, args.max_target_length, eos, args.truncated_eos))
            columns[split, "choices"].write(np.array([len(prompts), len(completions)]).tobytes())
            columns[split, "hashes"].write(prompt_hash(key).tobytes())
            if split != "train":
                kept[split].write(json.dumps({"prompt": prompts[0], "completion": completions[0], "orig_d": record}, ensure_ascii=False) + "\n")

    def checked():
        nonlocal task
        for example in read_examples(files, tokenizer, args, problems, counts):
            where, split, record, _, completions, _ = example
            if split == "task":
                task = record
                problems.extend(f"{where}: {wrong}" for wrong in check_task(task))
            elif task and to_class(task, completions[0]) is None:
                problems.append(f"{where}: completion {completions[0]!r}, expected {'one of ' + ', '.join(task['labels']) if task['labels'] else 'a number'}")
            else:
                yield example

    for block in common.in_blocks(checked(), 1000, "records"):
        flush(block)
    for file in [*writers.values(), *columns.values(), *kept.values()]:
        file.close()
    return {**counts, "lossy_examples": lossy, "task": task}


class DataSet:
    """One tokenised data set: token ids stay on disk; evaluation records are in memory."""

    def __init__(self, name, amount, folder):
        self.name, self.amount = name, amount
        self.sha256, self.counts = folder.name, json.loads((folder / "counts.json").read_text())
        self.source = {split: common.Ragged(folder / f"{split}.source") for split in ("train", "eval", "test")}
        self.target = {split: common.Ragged(folder / f"{split}.target") for split in ("train", "eval", "test")}
        self.hashes = {split: np.fromfile(folder / f"{split}.hashes", np.int64) for split in ("train", "eval", "test")}
        self.choices = np.fromfile(folder / "train.choices", np.int64).reshape(-1, 2)
        self.records = {split: [json.loads(line) for line in open(folder / f"{split}.jsonl", encoding="utf-8")]
                        for split in ("eval", "test")}
        self.task = self.counts["task"]  # labels and metrics, from data/prepare_glue.py, or None
        parts = [record["orig_d"].get("part") for split in ("eval", "test") for record in self.records[split]] if self.task else []
        self.parts = sorted(set(filter(None, parts)))  # such as MNLI's two validation sets


def load_data(args, tokenizer, problems):
    """All data sets of --data, tokenised once into the cache. Runs before any process group exists: no time-out to hit."""
    data_sets = []
    for spec in args.data_name:
        name, amount = common.parse_data_spec(spec, problems)
        files = common.find_data(args, name, problems)
        if not files or tokenizer is None:  # still report what is wrong with the records
            collections.deque(read_examples(files, tokenizer, args, problems, collections.Counter()), 0)
            continue
        before = len(problems)
        settings = [args.max_source_length, args.max_target_length, args.truncated_eos, args.eval_fraction, *common.task_settings(args)]
        root, key = common.token_cache(args, "seq2seq 4", files, tokenizer, settings)
        try:
            with common.cache_folder(root, key, problems) as (folder, is_new):
                if is_new:
                    common.write_json(folder / "counts.json", tokenize_data_set(files, folder, tokenizer, args, problems))
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


def find_corpus(args, name, problems):
    """-> (path or None, [(split or None, text file)]); no files: a folder of tokens that data/prepare_text.py made."""
    path = (pathlib.Path(name) if os.path.exists(name) and (os.sep in name or name.endswith(TEXT_ENDINGS))
            else common.find_input(args, "data", name, ["", *TEXT_ENDINGS], problems))
    if path is None or (path / "corpus.json").is_file():
        return path, []
    stem, ending = re.fullmatch(r"(.*?)((?:\.txt|\.jsonl)(?:\.gz)?|)", path.name).groups()
    files = (sorted(p for p in path.rglob("*") if p.name.endswith(TEXT_ENDINGS)) if path.is_dir() else
             [path, *(p for p in (path.with_name(f"{stem}.{split}{ending}") for split in ("eval", "test")) if p.is_file())])
    splits = [re.search(r"\.(train|eval|test)\.", p.name) or (re.fullmatch(r"(train|eval|test)", p.parent.name) if p.parent not in (path, path.parent) else None)
              for p in files]
    if not files or files == [path] and not ending:
        problems.append(f"{path}: no text; expected files that end in {', '.join(TEXT_ENDINGS)}, or what data/prepare_text.py makes")
    return path, [(split and split[1], p) for split, p in zip(splits, files)]


def text_lines(path, start, longest):
    """(position, whether a line begins there, line) of a text file from its byte `start` on. Lines are bytes, in pieces where they are
    over `longest` bytes (0: never), cut at a blank or else between two characters."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        if start:  # a line that begins before is not ours
            file.seek(start - 1)
            while (skipped := file.readline(PIECE)) and not skipped.endswith(b"\n"):
                pass
        place, is_new, rest = file.tell(), True, b""
        while piece := rest + file.readline(longest or -1):
            cut = len(piece)
            if longest and cut >= longest and not piece.endswith(b"\n"):
                cut = piece.rfind(b" ") + 1 or cut - 4
                while cut < len(piece) and piece[cut] & 0xC0 == 0x80:
                    cut -= 1
            yield place, is_new, piece[:cut]
            place, is_new, rest = place + cut, piece[:cut].endswith(b"\n"), piece[cut:]


def has_blank_lines(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        return bool(re.search(rb"\S[ \t\r]*\n[ \t\r]*\n\s*\S", file.read(2**20)))


def read_documents(path, split, documents, problems, start=0, end=math.inf):
    """Yield (split or None, text) of the documents of a text file; of a part of it, from byte `start` to `end`, those that begin
    there (between blank lines: that follow a blank line there). Parts that adjoin give every document once."""
    is_json, held, n_bytes, n_wrong = ".jsonl" in path.name, [], 0, 0
    try:
        by_blank = not is_json and (documents == "blank" or documents == "auto" and has_blank_lines(path))
        is_ours = not start or not by_blank  # this document, or else the next one
        for n, (place, is_new, line) in enumerate(text_lines(path, start, 0 if is_json else PIECE), 1):
            text = line.decode("utf-8" if place else "utf-8-sig").rstrip("\r\n")
            is_empty = not text.strip()
            if is_empty and by_blank or is_new and not by_blank:
                is_ours = place < end
            if held and (is_empty or n_bytes > PIECE):
                yield split, "\n".join(held)
                held, n_bytes = [], 0
            if not is_ours and place >= end:
                return
            if is_empty or not is_ours:
                continue
            if by_blank:
                held.append(text)
                n_bytes += len(line)
            elif not is_json:
                yield split, text
            else:
                try:
                    record = json.loads(text)
                    if not record["text"].strip() or re.search("[\ud800-\udfff]", record["text"]):
                        raise ValueError("'text' is empty or holds half a character")
                    if record.get("split", split) not in (None, "train", "eval", "test"):
                        raise ValueError(f"split {record['split']!r}, expected train, eval or test")
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    problems.append(f"{path}, line {n}{f' after byte {start}' if start else ''}: {error!r}; expected one object per line with 'text'")
                    n_wrong += 1
                    if n_wrong == 40:
                        return
                else:
                    yield record.get("split", split), record["text"]
        if held:
            yield split, "\n".join(held)
    except UnicodeDecodeError as error:
        problems.append(f"{path}, line {n}{f' after byte {start}' if start else ''}: not UTF-8 ({error}); save it as UTF-8")
    except (OSError, EOFError, zlib.error) as error:
        problems.append(f"{path}: cannot be read ({error})")


def tokenize_documents(documents, folder, tokenizer, eval_fraction):
    """(split or None, text) -> <folder>/<split>.ids and .offsets, the ids of all documents one after the other with nothing between; returns counts.

    No end tokens: T5 is pretrained without (t5's reduce_concat_tokens). Special tokens spelled out in a text are left out.
    """
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    writers = {split: common.RaggedWriter(folder / split, dtype) for split in ("train", "eval", "test")}
    special, counts, block, size = common.special_tokens(tokenizer), collections.Counter(), [], 0

    def flush():
        rows = tokenizer([text for _, text in block], add_special_tokens=False, return_attention_mask=False).input_ids
        for (split, _), ids in zip(block, rows):
            writers[split].append(ids)
            counts.update({f"{split} documents": 1, f"{split} tokens": len(ids), "unknown": ids.count(tokenizer.unk_token_id)})
        block.clear()

    for split, text in documents:
        counts["bytes"] += len(text.encode())
        text, n_special = special.subn(" ", text)
        counts["special"] += n_special
        split = split or ("eval" if common.derive_seed("document", text) % 10**6 < eval_fraction * 10**6 else "train")
        block.append((split, text))
        size += len(text)
        if size > PIECE:
            flush()
            size = 0
    if block:
        flush()
    for writer in writers.values():
        writer.close()
    return {"dtype": np.dtype(dtype).name, **{f"{split} {what}": counts[f"{split} {what}"] for split in writers for what in ("documents", "tokens")},
            **{what: counts[what] for what in ("bytes", "special", "unknown")}}


class Corpus:
    """One tokenised corpus: the ids of a split as one stream on disk, cut into examples of `length` tokens, the last one going on at the start."""

    def __init__(self, name, amount, folder, length, problems, needs_training=True):
        self.name, self.amount, self.task, self.parts, self.about = name, amount, None, [], json.loads((folder / "corpus.json").read_text())
        self.sha256, self.length = self.about.get("sha256", folder.name), length
        self.ids, self.maps = {}, []
        for split in ("train", "eval", "test"):
            n, path = self.about[f"{split} tokens"], folder / f"{split}.ids"
            size = n * np.dtype(self.about["dtype"]).itemsize
            if not path.is_file() or path.stat().st_size != size:
                problems.append(f"{path}: expected {size} bytes; delete {folder} and prepare it again")
            elif n:
                with open(path, "rb") as file:
                    self.maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                self.ids[split] = np.frombuffer(self.maps[-1], self.about["dtype"])
        n = {split: len(ids) for split, ids in self.ids.items()}
        self.counts = {"train": -(-n.get("train", 0) // length), "eval": n.get("eval", 0) // length, "test": n.get("test", 0) // length}
        self.records = {split: range(self.counts[split]) for split in ("eval", "test")}
        self.hashes = {split: np.empty(0, np.int64) for split in ("train", "eval", "test")}
        problems += [f"{name}: {n[split]} tokens of text for {split}, fewer than the {length} of one example: more text, a smaller --input_length, or "
                     "a larger --eval_fraction" for split in n if n[split] < length and (needs_training or split != "train")]

    def read(self, split, starts):
        """(n,) places in the stream -> (n, length) token ids."""
        found = np.take(self.ids[split], starts[:, None] + np.arange(self.length), mode="wrap").astype(np.int64)
        for mapped in self.maps:
            mapped.madvise(mmap.MADV_DONTNEED)  # or all of the corpus that was read would count as memory of this process
        return found


def load_corpora(args, tokenizer, length, problems):
    """All corpora of --data: prepared ones as they are, plain text tokenised once into the cache, before any process group exists."""
    corpora = []
    for spec in args.data_name:
        name, amount = common.parse_data_spec(spec, problems)
        folder, files = find_corpus(args, name, problems)
        if folder is None or tokenizer is None:
            for split, path in files:  # no tokenizer: still report what is wrong with the text
                collections.deque(read_documents(path, split, args.documents or "auto", problems), maxlen=0)
            continue
        before, documents = len(problems), args.documents or "auto"
        if not files:
            about = json.loads((folder / "corpus.json").read_text())
            if about["tokenizer"] != common.tokenizer_fingerprint(tokenizer):
                problems.append(f"{folder} was prepared with another tokenizer ({about['tokenizer_name']}) than this model's: prepare it again")
            if args.eval_fraction or args.documents:
                problems.append(f"--eval_fraction and --documents have no effect on {folder}, which data/prepare_text.py made: give them to that")
        else:
            root, key = common.token_cache(args, "text 1", {f"{split} {i}": p for i, (split, p) in enumerate(files)}, tokenizer,
                                           [args.eval_fraction, documents])
            folder = root / key
            try:
                with common.cache_folder(root, key, problems) as (aside, is_new):
                    if is_new:
                        bar = tqdm(files, desc="tokenising", unit=" files", delay=5, disable=common.rank() > 0 or None)
                        found = (d for split, path in bar for d in read_documents(path, split, documents, problems))
                        common.write_json(aside / "corpus.json", tokenize_documents(found, aside, tokenizer, args.eval_fraction))
            except OSError as error:
                problems.append(f"the token cache cannot be written ({error}); --cache_dir names another folder")
        if len(problems) > before:
            continue
        data = Corpus(name, amount, folder, length, problems, not args.no_train)
        if data.about["special"]:
            log.warning(f"{name}: {data.about['special']} special tokens that are spelled out in the text (such as </s>) were left out")
        if data.about["unknown"]:
            log.warning(f"{name}: {data.about['unknown']} pieces of text are unknown to the tokenizer, and all become one token; a tokenizer of your own: "
                        "data/prepare_tokenizer.py")
        common.check_training_part(args, data, name, problems, "text")
        corpora.append(data)
    common.check_evaluation_parts(args, corpora, "documents", problems, "put <name>.eval.txt beside the file, or files into a folder eval")
    return corpora


def load_text(args, config, tokenizer, problems):
    """(denoisers, sentinel ids, corpora) of a pretraining objective; says what an example looks like."""
    span = (default(args.noise_density, 0.15), default(args.mean_noise_span_length, 3.0))
    denoisers, labels = DENOISERS.get(args.objective, [span]), args.span_labels or "t5"
    if not (0 < span[0] < 1 and 1 <= span[1] < math.inf) or tokenizer is None or config is None:
        return denoisers, [], load_corpora(args, tokenizer, 1, problems)
    length = min(text_length(default(args.input_length, 512), denoiser, labels) for denoiser in denoisers)
    sentinels, vocabulary = [], tokenizer.get_vocab()
    while (token := vocabulary.get(f"<extra_id_{len(sentinels)}>", vocabulary.get(f"▁<extra_id_{len(sentinels)}>"))) is not None:  # mT5 has the latter
        sentinels.append(token)
    n_spans = max(span_counts(length, *d)[1] + (labels == "compact") for d in denoisers if d) if any(denoisers) else 0
    n_target = max(example_lengths(length, denoiser, labels)[1] for denoiser in denoisers)
    if n_spans > len(sentinels):
        problems.append(f"--input_length {default(args.input_length, 512)}: {n_spans} spans in {length} tokens of text, but the tokenizer of "
                        f"{type(tokenizer).__name__} has {len(sentinels)} sentinels (<extra_id_0>, ...): a smaller --input_length, longer spans, or a T5")
    if any(sentinel >= config.vocab_size for sentinel in sentinels):
        problems.append(f"the model has {config.vocab_size} rows of embeddings, fewer than the tokenizer has tokens")
    if args.target_length and n_target > args.target_length:
        problems.append(f"--target_length {args.target_length}: the targets have up to {n_target} tokens, and none may be lost; leave it out, or a smaller "
                        "--input_length or --noise_density")
    lengths = [example_lengths(length, denoiser, labels) for denoiser in denoisers]
    log.info(f"--objective {args.objective}: {length} tokens of text in each example; source -> target "
             + ", ".join(f"{s} -> {t}" if d else f"{s + 2} tokens in all" for d, (s, t) in zip(denoisers, lengths)))
    return denoisers, sentinels, load_corpora(args, tokenizer, length, problems)


def check_counts(args, data, path, problems):
    """What only the whole data set shows: empty splits, amounts, truncation, completions the tokenizer cannot express."""
    counts = data.counts
    common.check_training_part(args, data, path, problems)
    common.warn_of_shortened_prompts(data, args.max_source_length)
    for what, flag in (("long prompts", "--max_source_length"), ("long completions", "--max_target_length")):
        if counts.get(what):
            log.warning(f"{data.name}: {counts[what]} of {counts['all ' + what.split()[1]]} {what.split()[1]} are longer than {flag} "
                        f"{getattr(args, flag[2:])} tokens and lose their end")
    if counts.get("lossy"):
        examples = "; ".join(counts["lossy_examples"])
        text = (f"{data.name}: {counts['lossy']} of {counts['all completions']} completions cannot be expressed by this tokenizer, so the model can never "
                f"write them ({examples})")
        if counts["lossy"] > 0.01 * counts["all completions"] and not args.allow_lossy:
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
    if len(ids) and (lengths[ids] == lengths[ids[0]]).all():  # nothing to gain
        return [[[int(i)] for i in ids]]
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
    No rows (this rank has no example): one token in, and no target. No segments are given where every row is one example and
    nothing is padded.
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
    if (source_segment == 1).all() and len(index) == len(rows) * T:
        del arrays["source_segment"], arrays["decoder_segment"]
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}


class TrainingData:
    """The forward steps of optimizer step k, for this rank: a pure function of (seed, k) and the effective batch."""

    def __init__(self, args, data_sets, model_config, packed, group_tokens):
        self.args, self.packed, self.config, self.group_tokens = args, packed, model_config, group_tokens
        self.parts = [(d.source["train"], d.target["train"]) for d in data_sets]
        self.sizes, self.amounts = [d.counts["train"] for d in data_sets], [d.amount for d in data_sets]
        self.starts = np.cumsum([0, *self.sizes])
        self.choices = np.concatenate([d.choices for d in data_sets])
        self.firsts = np.concatenate([d.choices.cumsum(0) - d.choices for d in data_sets])
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
            self.draw(epoch)
            self.epoch, self.batches = epoch, common.epoch_batches(ids, self.lengths, self.batch, self.args.seed, epoch)
        return self.batches[i]

    def draw(self, epoch):
        """Which of its prompts and completions (most have one of each) every example has in this epoch: a function of (seed, epoch)."""
        key, n = common.derive_seed(self.args.seed, "choice", epoch), np.arange(len(self.choices))[:, None]
        self.drawn = self.firsts + (hashed(key, n, np.arange(2)) % self.choices.astype(np.uint64)).astype(np.int64)
        borders = zip(self.starts, self.starts[1:])
        self.lengths = np.concatenate([np.stack([self.parts[k][side].lengths[self.drawn[a:b, side]] for side in (0, 1)], 1)
                                       for k, (a, b) in enumerate(borders)])

    def examples(self, ids):
        """({id: source ids}, {id: target ids})"""
        parts = [(int(i), int(np.searchsorted(self.starts, i, side="right")) - 1) for i in ids]
        return tuple({i: self.parts[part][side][self.drawn[i, side]] for i, part in parts} for side in (0, 1))

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
            sources, targets = self.examples(mine)
            groups = plan(mine, self.lengths, self.width, self.packed, self.group_tokens)
            batches.append(([collate(rows, sources, targets, self.config.decoder_start_token_id, self.config.pad_token_id)
                             for rows in groups], n_chunks))
        return batches, int(self.lengths[ids, 1].sum())


# ------------------------------------------------------------------------------------------------ noise, for pretraining


def hashed(key, *counters):
    """uint64 random numbers, a pure function of a number and of integer arrays that broadcast (SplitMix64, Steele et al. 2014)."""
    x = np.uint64(key)
    with np.errstate(over="ignore"):
        for counter in counters:
            x = (x ^ np.asarray(counter).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return x


def permuted(places, n, key):
    """Where a random order of 0 ... n - 1 has its `places`, an int64 array: a pure function, nothing of size n is in memory.

    A Feistel network over the next power of 4; what falls outside goes through again (Black & Rogaway 2002).
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    found, todo = np.array(places, np.int64), np.ones(len(places), bool)
    while todo.any():
        left, right = found[todo] >> half, found[todo] & (1 << half) - 1
        for turn in range(4):
            left, right = right, left ^ (hashed(key, turn, right) >> np.uint64(64 - half)).astype(np.int64)
        found[todo] = left << half | right
        todo = found >= n
    return found


def span_counts(length, density, mean):
    """(noise tokens, spans) of a text of `length` tokens, as T5 counts them. span_counts(512, 0.15, 3) = (77, 26)."""
    n_noise = min(max(round(length * density), 1), length - 1)
    return n_noise, min(max(round(n_noise / mean), 1), length - n_noise)


def example_lengths(length, denoiser, labels="t5"):
    """(source, target) tokens, at most, of a text of `length` tokens, end tokens and sentinels counted in."""
    if denoiser is None:
        return length, length
    n_noise, n_spans = span_counts(length, *denoiser)
    n_spans += labels == "compact"  # one may be cut in two
    return length - n_noise + n_spans + 1, n_noise + n_spans + (labels == "t5")


def text_length(input_length, denoiser, labels="t5"):
    """Tokens of text that fill `input_length` tokens of the encoder, as t5's random_spans_helper finds them: (512, (0.15, 3)) -> 568.
    The copies of that function elsewhere begin one higher, and may return one too many."""
    length = input_length - (2 if labels == "compact" else 1)  # a span more may come
    while example_lengths(length + 1, denoiser, labels)[0] <= input_length and length < 100 * input_length:
        length += 1
    source, target = example_lengths(length, denoiser, labels)
    return length - (denoiser is not None and denoiser[0] == 0.5 and target > source)  # of t5, too: not more targets than inputs


def span_masks(length, density, mean, shuffle, offsets=None):
    """(n, length) bool, True = noise: spans of text and of noise in turn, text first and noise last (t5's random_spans_noise_mask).

    shuffle(flags): a (k,) bool array -> (n, k) in n random orders, asked for the noise, then for the text; offsets (n,): the masks
    are rolled by so much.
    """
    n_noise, n_spans = span_counts(length, density, mean)
    is_first = [np.pad(shuffle(np.arange(n_items - 1) < n_spans - 1), ((0, 0), (1, 0)), constant_values=True) for n_items in (n_noise, length - n_noise)]
    text_starts = np.nonzero(is_first[1])[1].reshape(-1, n_spans)
    text_before = np.concatenate([text_starts[:, 1:], np.full((len(text_starts), 1), length - n_noise)], 1)  # the noise of each span
    masks = np.zeros((len(text_starts), length), bool)
    np.put_along_axis(masks, np.arange(n_noise) + np.take_along_axis(text_before, is_first[0].cumsum(1) - 1, 1), True, 1)
    return masks if offsets is None else np.take_along_axis(masks, (np.arange(length) - offsets[:, None]) % length, 1)


def first_of_runs(masks):
    return masks & ~np.pad(masks[:, :-1], ((0, 0), (1, 0)))


def with_sentinels(tokens, masks, sentinels):
    """Each run of True becomes one sentinel: tokens, masks (n, L) -> n arrays. [10 11 12 13 14 15], 110010 -> [999 12 13 998 15]."""
    first = first_of_runs(masks)
    tokens, kept = np.where(first, sentinels[first.cumsum(1) - 1], tokens), first | ~masks
    return [row[keep] for row, keep in zip(tokens, kept)]


def behind_sentinels(tokens, masks, sentinels):
    """Each run of True behind a sentinel, the rest left out: [10 11 12 13 14 15], 110010 -> [999 10 11 998 14]."""
    first = first_of_runs(masks)
    both = np.stack([sentinels[first.cumsum(1) - 1], tokens], 2).reshape(len(tokens), 2 * tokens.shape[1])
    return [row[keep] for row, keep in zip(both, np.stack([first, masks], 2).reshape(both.shape))]


class Spans(TrainingData):
    """Examples made from text. Those of step k, their order and their noise are a pure function of (seed, epoch, place in the epoch)."""

    def __init__(self, args, corpora, split, model_config, sentinels, eos, packed, group_tokens, denoisers):
        self.args, self.corpora, self.split, self.config, self.sentinels, self.eos = args, corpora, split, model_config, np.array(sentinels or [0]), eos
        self.packed, self.group_tokens, self.denoisers, self.length = packed, group_tokens, denoisers, corpora[0].length
        self.width, self.batch = getattr(model_config, "d_model", 512), args.train_batch_size * args.gradient_accumulation_steps
        sizes = [corpus.counts[split] for corpus in corpora]
        amounts = [corpus.amount if split == "train" else None for corpus in corpora]
        takes = [n if a is None else a if isinstance(a, int) else max(1, round(a * n)) for n, a in zip(sizes, amounts)]
        self.sizes, self.starts = sizes, np.cumsum([0, *takes])
        self.per_epoch = int(self.starts[-1])
        self.steps_per_epoch = -(-self.per_epoch // self.batch)

    def step_ids(self, step):
        epoch, i = divmod(step, self.steps_per_epoch)
        return self.choose(epoch, np.arange(i * self.batch, min((i + 1) * self.batch, self.per_epoch)))

    def choose(self, epoch, places):
        """Make `lengths` and `examples` those of these places of the epoch; -> their numbers, 0 ... n - 1."""
        self.epoch, self.places = epoch, places
        kinds, cuts = self.kinds(places)
        self.lengths = np.array([example_lengths(self.length, denoiser) for denoiser in self.denoisers])[kinds]
        is_prefix = np.array([denoiser is None for denoiser in self.denoisers])[kinds]
        self.lengths[is_prefix] = np.stack([cuts + 1, self.length - cuts + 1], 1)[is_prefix]
        if self.args.span_labels == "compact":  # the roll cuts a span in two, or not
            n_noise = span_counts(self.length, *self.denoisers[0])[0]
            n_runs = np.concatenate([first_of_runs(self.noise(part)).sum(1) for part in np.array_split(places, max(1, len(places) // 1000))])
            self.lengths = np.stack([self.length - n_noise + n_runs + 1, n_noise + n_runs], 1)
        return np.arange(len(places))

    def kinds(self, places):
        """Which denoiser each place has, and where a prefix would end there."""
        key = common.derive_seed(self.args.seed, "noise", self.epoch)
        return ((hashed(key, places, 0) % np.uint64(len(self.denoisers))).astype(np.int64),
                1 + (hashed(key, places, 1) % np.uint64(self.length - 1)).astype(np.int64))

    def noise(self, places):
        """(n, length) bool, True = noise."""
        key, (kinds, cuts) = common.derive_seed(self.args.seed, "noise", self.epoch), self.kinds(places)
        masks = np.arange(self.length) >= cuts[:, None]
        for kind, denoiser in enumerate(self.denoisers):
            mine = places[kinds == kind]
            if denoiser is not None and len(mine):
                turns = iter((2, 3))
                offsets = (hashed(key, mine, 4) % np.uint64(self.length)).astype(np.int64) if self.args.span_labels == "compact" else None
                masks[kinds == kind] = span_masks(
                    self.length, *denoiser, lambda flags: flags[hashed(key, mine[:, None], next(turns), np.arange(len(flags))).argsort(1)], offsets)
        return masks

    def text(self, places):
        """(n, length) token ids. Each epoch goes through the examples of the text in an order of its own, and cuts the text elsewhere."""
        shuffled = self.split == "train"
        if shuffled:
            places = permuted(places, self.per_epoch, common.derive_seed(self.args.seed, "text", self.epoch))
        which, tokens = np.searchsorted(self.starts, places, side="right") - 1, np.empty((len(places), self.length), np.int64)
        for k in np.unique(which):
            examples, begin = places[which == k] - self.starts[k], 0
            if shuffled:
                examples = permuted(examples, self.sizes[k], common.derive_seed(self.args.seed, "part", self.epoch, int(k)))
                begin = common.derive_seed(self.args.seed, "begin", self.epoch, int(k)) % self.length
            tokens[which == k] = self.corpora[k].read(self.split, begin + examples * self.length)
        return tokens

    def examples(self, ids):
        places = self.places[ids]
        tokens, masks, kinds = self.text(places), self.noise(places), self.kinds(places)[0]
        sources, targets = with_sentinels(tokens, masks, self.sentinels), behind_sentinels(tokens, masks, self.sentinels)
        for i in (i for i, kind in enumerate(kinds) if self.denoisers[kind] is None):
            sources[i], targets[i] = tokens[i][~masks[i]], tokens[i][masks[i]]
        end = [] if self.args.span_labels == "compact" else [self.eos]
        return {int(i): np.append(s, self.eos) for i, s in zip(ids, sources)}, {int(i): np.append(t, end).astype(np.int64) for i, t in zip(ids, targets)}


# ------------------------------------------------------------------------------------------------ model and loss


class CrossEntropy(torch.autograd.Function):
    """-log p of each target: logits (N, V) fp32 or fp64, target_ids (N,) -> (N,). Overwrites the logits, in the forward
    pass by exp(logits - max) and in the backward pass by the gradient, softmax - target: F.cross_entropy holds four
    buffers of that size, which costs a third of the head's time on CPU. Smoothing e: targets (1 - e) onehot + e / V. z-loss:
    + z log(Z)^2 with Z = sum(exp(logits)), which keeps the logits from drifting (T5X; Chowdhery et al. 2022)."""

    @staticmethod
    def forward(ctx, logits, target_ids, smoothing, z_loss):
        wanted = (1 - smoothing) * logits.gather(1, target_ids[:, None]).squeeze(1) + (smoothing * logits.mean(1) if smoothing else 0.0)
        top = logits.amax(1, keepdim=True)
        sums = logits.sub_(top).exp_().sum(1)
        log_z = sums.log() + top.squeeze(1)
        ctx.save_for_backward(logits, sums, target_ids, log_z)
        ctx.smoothing, ctx.z_loss = smoothing, z_loss
        return log_z - wanted + (z_loss * log_z**2 if z_loss else 0.0)

    @staticmethod
    def backward(ctx, grad):
        exps, sums, target_ids, log_z = ctx.saved_tensors
        exps.mul_((grad / sums * (1 + 2 * ctx.z_loss * log_z))[:, None])
        if ctx.smoothing:
            exps.sub_((grad * ctx.smoothing / exps.shape[1])[:, None])
        return exps.scatter_add_(1, target_ids[:, None], (ctx.smoothing - 1) * grad[:, None]), None, None, None


def token_losses(head, hidden, target_ids, n_chunks, smoothing, z_loss):
    """Cross entropy of each target token: hidden (N, D), target_ids (N,) -> (N,); where no gradient is wanted (2, N), with whether it is
    the likeliest token. Through `head`, never more than one chunk of logits (N / n_chunks, V) at a time; several chunks are
    recomputed in the backward pass."""
    def chunk_losses(hidden, target_ids):
        logits = head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        is_right = None if torch.is_grad_enabled() else logits.argmax(1) == target_ids  # before: the logits are overwritten
        losses = CrossEntropy.apply(logits, target_ids, smoothing, z_loss)
        return losses if is_right is None else torch.stack([losses, is_right.to(losses.dtype)])
    pairs = zip(hidden.tensor_split(n_chunks), target_ids.tensor_split(n_chunks))
    if n_chunks == 1 or not torch.is_grad_enabled():
        return torch.cat([chunk_losses(h, t) for h, t in pairs], -1)
    return torch.cat([checkpoint(chunk_losses, h, t, use_reentrant=False) for h, t in pairs])


class BiasedAttention(torch.autograd.Function):
    """softmax(q k^T + bias) v with a bias that is trained, for CPUs: torch's fast kernel gives no gradient of a bias, and its other one
    copies the scores about nine times. Here it does the forward pass, and the backward pass computes the scores again, a
    few heads at a time, so that they stay in the processor's cache.

    query, key, value: (B, H, T or S, D); bias: (1, H, T, S); allowed: (B or 1, 1, T, S) bool, True = may attend, or None -> (B, H, T, D).
    """

    @staticmethod
    def forward(ctx, query, key, value, bias, allowed):
        query, key, value, bias = (states.contiguous() for states in (query, key, value, bias))
        ctx.save_for_backward(query, key, value, bias, allowed)
        lowest = torch.finfo(bias.dtype).min
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias if allowed is None else torch.where(allowed, bias, lowest), scale=1.0)

    @staticmethod
    def backward(ctx, grad):
        query, key, value, bias, allowed = ctx.saved_tensors
        (B, H, T), S = query.shape[:3], key.shape[2]
        most = max(1, 2**19 // (T * S))  # 2 MB of scores
        n_rows, n_heads = max(1, min(B, most // H)), max(n for n in range(1, H + 1) if H % n == 0 and n <= max(1, most))
        found, of_bias = [torch.empty_like(states) for states in (query, key, value)], torch.zeros_like(bias)
        for part in ((slice(b, b + n_rows), slice(h, h + n_heads)) for b in range(0, B, n_rows) for h in range(0, H, n_heads)):
            q, k, v, g = (states[part].flatten(0, 1) for states in (query, key, value, grad))
            scores = torch.baddbmm(bias[0, part[1]].repeat(len(q) // n_heads, 1, 1), q, k.transpose(1, 2))
            if allowed is not None:
                scores.view(-1, n_heads, T, S).masked_fill_(~(allowed[part[0]] if len(allowed) > 1 else allowed), torch.finfo(bias.dtype).min)
            shares = torch.softmax(scores, -1, out=scores)
            by_score = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), shares, -1, shares.dtype)
            for into, states in zip(found, (torch.bmm(by_score, k), torch.bmm(by_score.transpose(1, 2), q), torch.bmm(shares.transpose(1, 2), g))):
                into[part] = states.unflatten(0, (-1, n_heads))
            of_bias[0, part[1]] += by_score.unflatten(0, (-1, n_heads)).sum(0)
        return *found, of_bias, None


def biased_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=1.0, position_bias=None, **options):
    """What T5 calls for every attention (transformers' attention interface); scaling is 1 in T5."""
    if (dropout or scaling != 1.0 or not (torch.is_grad_enabled() and position_bias.requires_grad) or len(position_bias) > 1
            or position_bias.dtype != query.dtype or attention_mask is not None and attention_mask.dtype != torch.bool):
        return transformers.AttentionInterface()["sdpa"](module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                                         position_bias=position_bias, **options)
    T, S = query.shape[2], key.shape[2]
    if attention_mask is None and module.is_causal:
        attention_mask = torch.ones(1, 1, T, S, dtype=torch.bool).tril()
    return BiasedAttention.apply(query, key, value, position_bias, attention_mask).transpose(1, 2).contiguous(), None


def speed_up(model, device):
    """The same mathematics from fewer kernels: GELU as one, and on CPUs the attention above."""
    for module in model.modules():
        if type(getattr(module, "act", None)).__name__ == "NewGELUActivation":
            module.act = torch.nn.GELU(approximate="tanh")
    if device.type == "cpu" and model.config.model_type in PACKED_FAMILIES:
        transformers.AttentionInterface.register("biased", biased_attention)
        transformers.AttentionMaskInterface.register("biased", transformers.masking_utils.sdpa_mask)
        model.set_attn_implementation("biased")


class TargetLosses(torch.nn.Module):
    """What the engine wraps: forward(groups) -> (N,) fp32 loss of every target token, group after group (see `token_losses`)."""

    def __init__(self, model, packed, label_smoothing, z_loss=0.0):
        super().__init__()
        self.model, self.packed, self.label_smoothing, self.z_loss = model, packed, label_smoothing, z_loss

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
        extras = (self.label_smoothing, self.z_loss) if self.training else (0.0, 0.0)
        return token_losses(head, torch.cat(states), torch.cat([group["target_ids"] for group in groups]),
                            n_chunks if self.packed else 1, *extras)  # whole logits exist already: nothing to save

    def plain_logits(self, group):
        """(N, V) logits of any encoder-decoder, one example per row; positions are the model's own business."""
        mask = group["source_segment"] > 0 if "source_segment" in group else None
        return self.model(input_ids=group["source_ids"], attention_mask=mask, decoder_input_ids=group["decoder_ids"],
                          use_cache=False).logits.flatten(0, 1)[group["target_index"]]

    def packed_states(self, group, source, decoder_input):
        """(N, D) decoder states of a T5 with several examples per row; source (R, S, D) and decoder_input (R, T, D) are the
        embedded tokens. Masks (R, 1, queries, keys) bool, True = may attend: only within an example. T5's positions are
        relative, so they need no restart. Without segments there is nothing to mask but the future."""
        model, masks = self.model, [None, None, None]
        if "source_segment" in group:
            source_segment, decoder_segment = group["source_segment"], group["decoder_segment"]
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
                               encoder_attention_mask=cross_mask, use_cache=False).last_hidden_state  # (R, T, D)
        hidden = hidden.flatten(0, 1)[group["target_index"]]  # (N, D): no logits where there is no target
        # T5 v1.0 scales; v1.1, mT5 and ByT5 do not
        return hidden * model.config.d_model**-0.5 if getattr(model.config, "scale_decoder_outputs", False) else hidden


class RMSScaledAdamW(torch.optim.Optimizer):
    """AdamW whose step on each matrix is multiplied by the root mean square of the matrix, at least 1e-3, as Adafactor's is (nanoT5:
    Nawrot 2023, https://arxiv.org/abs/2309.02373). Decay is decoupled: lr x weight_decay."""

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in (p for p in params if not self.state[p]):
                self.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            states, grads, (beta1, beta2) = [self.state[p] for p in params], [p.grad for p in params], group["betas"]
            means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
            torch._foreach_add_([s["step"] for s in states], 1)
            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            n = float(states[0]["step"])  # T5 has all gradients at every step, so all are at the same one
            steps = torch._foreach_sqrt(squares)
            torch._foreach_div_(steps, math.sqrt(1 - beta2**n))
            torch._foreach_add_(steps, group["eps"])
            steps = torch._foreach_div(means, steps)
            scales = torch.stack(torch._foreach_norm(params)) / torch.tensor([math.sqrt(p.numel()) for p in params], device=params[0].device)
            torch._foreach_mul_(steps, list((scales.clamp_min(1e-3) * (-group["lr"] / (1 - beta1**n))).unbind()))
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, steps)


def make_optimizer(args, model):
    groups = common.param_groups(model, args.weight_decay)
    if args.optimizer == "adafactor":  # the learning rate is ours, not one that Adafactor makes up from the step
        from transformers import Adafactor  # 4 s
        return Adafactor(groups, lr=args.learning_rate, scale_parameter=not args.no_scale_parameter, relative_step=False, warmup_init=False)
    if args.optimizer == "adamw_rms":
        return RMSScaledAdamW(groups, lr=args.learning_rate)
    return torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)


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


def check_task(task):
    """What is wrong with the entry that names a data set's labels and metrics, as data/prepare_glue.py writes it; a list of texts."""
    labels, metrics = task.get("labels"), task.get("metrics")
    if not (labels is None or isinstance(labels, list) and len(set(labels)) > 1) or not isinstance(metrics, list) or not isinstance(
            task.get("metric_for_best"), str):
        return ["the task entry wants 'labels' (two or more, or null for numbers), 'metrics' (a list) and 'metric_for_best'"]
    known = ("pearson", "spearman") if labels is None else ("accuracy", "f1", "matthews") if len(labels) == 2 else ("accuracy", "macro_f1")
    return [f"metric {name!r} of the task entry, expected {', '.join(known)}" for name in metrics if name not in known]


def to_class(task, text):
    """The number of a whole label, or the number that the text is where the task has no labels; None: neither."""
    text = text.strip()
    if task["labels"]:
        return task["labels"].index(text) if text in task["labels"] else None
    try:
        return float(text) if math.isfinite(float(text)) else None
    except ValueError:
        return None


def f1_score(predicted, gold, positive):
    total = np.sum(predicted == positive) + np.sum(gold == positive)
    return 2 * np.sum((predicted == positive) & (gold == positive)) / total if total else 0.0


def correlation(a, b):
    """Pearson's; 0 where one of both is constant. Of two labels, 0 and 1, it is Matthews'."""
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else 0.0


def average_ranks(values):
    """Ties share their mean. [3, 1, 3] -> [2.5, 1, 2.5]."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def task_metrics(task, texts, records):
    """The task's metrics over whole generated texts, and how many were no label (no number). Those count as wrong: as the other
    one of two labels (t5's f1_score_with_invalid), as none of several; in place of a number, as the end of the scale that is
    farther off."""
    found = [to_class(task, text) for text in texts]
    gold = np.array([to_class(task, record["completion"]) if task["labels"] else record["orig_d"].get("score", to_class(task, record["completion"]))
                     for record in records])
    low, high = task.get("range") or (gold.min(), gold.max())
    wrong = np.where(gold - low > high - gold, low, high) if not task["labels"] else 1 - gold if len(task["labels"]) == 2 else np.full(len(gold), -1)
    predicted = np.array([w if f is None else f for f, w in zip(found, wrong)])
    values = {"accuracy": lambda: np.mean(predicted == gold), "f1": lambda: f1_score(predicted, gold, 1),
              "macro_f1": lambda: np.mean([f1_score(predicted, gold, k) for k in range(len(task["labels"]))]),
              "matthews": lambda: correlation(predicted, gold), "pearson": lambda: correlation(predicted, gold),
              "spearman": lambda: correlation(average_ranks(predicted), average_ranks(gold))}
    return {**{name: float(values[name]()) for name in task["metrics"]}, "invalid": sum(f is None for f in found)}


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
        is_source = padded["source_segment"] > 0 if "source_segment" in padded else torch.ones_like(padded["source_ids"], dtype=torch.bool)
        with torch.autocast(device.type, torch.bfloat16, enabled=engine.torch_autocast_enabled()):
            out = model.generate(input_ids=padded["source_ids"].to(device), attention_mask=is_source.to(device),
                                 synced_gpus=synced, **options)
        decoded = tokenizer.batch_decode(out, skip_special_tokens=True)
        for n, i in enumerate(batch):
            texts[rows[i][0]] = decoded[n * args.n_samples: (n + 1) * args.n_samples]
    return texts


@torch.no_grad()
def row_losses(args, engine, lengths, fetch, config, device):
    """Collective. lengths: (rows, 2) source and target tokens; fetch(ids) -> ({id: source}, {id: target}). -> {row: (summed loss, right
    tokens, target tokens)} of this rank's share."""
    mine, n_rounds = common.my_batches(len(lengths), lengths.sum(1), args.eval_batch_size)
    rounds, found = n_rounds if engine.zero_optimization_partition_weights() else len(mine), {}
    n_chunks = -(-args.eval_batch_size * int(lengths[:, 1].max(initial=1)) // common.chunk_tokens(config.vocab_size))  # on every rank the same
    for round_ in tqdm(range(rounds), desc="loss", delay=5, disable=common.rank() > 0 or None, leave=False):
        ids = mine[round_] if round_ < len(mine) else []
        batch = collate([[i] for i in ids], *fetch(ids), config.decoder_start_token_id, config.pad_token_id)
        losses, is_right = engine([common.to_device(batch, device)], n_chunks).double().cpu()
        for i in ids:
            here = batch["target_example"] == i
            found[i] = (float(losses[here].sum()), int(is_right[here].sum()), int(here.sum()))
    return found


def evaluate(args, engine, tokenizer, data_sets, split, step, run_dir, device, spans=None):
    """Collective. Token-mean loss and accuracy over `split`, with `spans` of noise that is always the same; of completions also exact
    match, token F1 and the task's metrics, all of the first generation, and the predictions file. Every row counts once. Returns
    the metrics on every rank."""
    rows = [(data, record, None, None) if spans else (data, record, data.source[split][i], data.target[split][i])
            for data in data_sets for i, record in enumerate(data.records[split])]
    rows = rows[:100] if args.debug else rows
    if spans:
        spans.choose("evaluation", np.arange(len(rows)))
    lengths = spans.lengths if spans else np.array([[len(s), len(t)] for _, _, s, t in rows])
    engine.eval()
    started, local_texts = time.perf_counter(), {}
    try:
        local_losses = row_losses(args, engine, lengths, spans.examples if spans else lambda ids: (
            {i: rows[i][2] for i in ids}, {i: rows[i][3] for i in ids}), engine.module.model.config, device)
        if not spans:
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
    assert len(losses) == len(rows) and (spans or len(texts) == len(rows)), (len(losses), len(texts), len(rows))
    groups = {"": range(len(rows))}
    for data in data_sets:
        first, of_data = f"{data.name}/" if len(data_sets) > 1 else "", [i for i, row in enumerate(rows) if row[0] is data]
        groups[first] = of_data
        groups.update({f"{first}{part}/": [i for i in of_data if rows[i][1]["orig_d"].get("part") == part] for part in data.parts})
    metrics = {}
    for prefix, group in groups.items():
        if not group:
            continue
        n_tokens = sum(losses[i][2] for i in group)
        metrics[f"{prefix}loss"] = math.fsum(losses[i][0] for i in group) / n_tokens
        metrics[f"{prefix}token_accuracy"] = sum(losses[i][1] for i in group) / n_tokens
        if spans:
            continue
        answers, records = [texts[i][0] for i in group], [rows[i][1] for i in group]
        if common.reads_tasks(args):
            metrics.update(common.score_instructions(answers, [record["orig_d"] for record in records], tokenizer))
            continue
        wanted = [record["completion"] for record in records]
        metrics[f"{prefix}exact_match"] = sum(text.strip() == completion.strip() for text, completion in zip(answers, wanted)) / len(group)
        metrics[f"{prefix}token_f1"] = math.fsum(map(token_f1, answers, wanted)) / len(group)
        task = rows[group[0]][0].task
        if task and (prefix or len(data_sets) == 1):
            metrics.update({prefix + name: value for name, value in task_metrics(task, answers, records).items()})
    metrics.update(eval_seconds=round(time.perf_counter() - started, 2), peak_memory_gb=common.peak_memory_gb(device))
    if common.rank() == 0 and not spans:
        name = predictions_name(args, split, step)
        common.write_json(run_dir / name, [
            {"prompt": record["prompt"], "generations": [{"lm_postprocess": text} for text in texts[i]],
             "demonstration": record["completion"], "orig_d": record["orig_d"], "dataset": data.name}
            for i, (data, record, _, _) in enumerate(rows)])
    return metrics


def task_table(run_dir, data_sets, step):
    """Lines of text: the metrics of every data set that names its task, of the weights of `step`, from metrics.jsonl."""
    rows, lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()], []
    for split in ("eval", "test"):
        row = next((row for row in reversed(rows) if row["split"] == split and (split == "test" or row["step"] == step)), {})
        for data in (d for d in data_sets if d.task):
            for prefix in ("", *(f"{part}/" for part in data.parts)):
                prefix = (f"{data.name}/" if len(data_sets) > 1 else "") + prefix
                values = {name: row.get(f"{split}/{prefix}{name}") for name in [*data.task["metrics"], "invalid"]}
                if None not in values.values():
                    lines.append(f"{split}  {prefix.strip('/') or data.name:<24} " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
    return lines


def predictions_name(args, split, step):
    return f"{'test_' if split == 'test' else ''}temperature={args.temperature:.2f}_n={args.n_samples}_step={step}.json"


# ------------------------------------------------------------------------------------------------ training


def prepare(args):
    """Everything that can be wrong is found here and reported together, before any weight is loaded and before the
    processes meet. Returns what main needs; None after --estimate."""
    problems = []
    check_args(args, problems)
    source, config, tokenizer = common.open_model_folder(args, problems)
    if args.optimizer != "adamw" and args.precision == "auto" and common.resolve_precision(args) == "bf16":
        args.precision = "bf16-mixed"  # bf16 weights want ZeRO, these optimisers want none
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
    if args.objective == "completion":
        denoisers, sentinels, data_sets = None, None, load_data(args, tokenizer, problems)
        if args.max_new_tokens is None:  # a longer answer is wrong anyway
            args.max_new_tokens = max(d.counts["longest completion"] + 1 if d.task else 512 for d in data_sets) if data_sets else 512
    else:
        denoisers, sentinels, data_sets = load_text(args, config, tokenizer, problems)
    check_metric(args, data_sets, problems)
    identity = {"data_sha256": [d.sha256 for d in data_sets], "resolved_precision": precision,
                "effective_batch": args.train_batch_size * args.gradient_accumulation_steps}
    state = {"step": 0, "best": None, "best_step": None, "evals_since_best": 0, "last_eval": None}
    run_dir, resume_from, state, ds_name, ds_config = common.plan_run(
        args, source, identity, FREE_FLAGS, state, n_params, n_trained, precision, problems, quantized)
    if args.optimizer != "adamw" and ds_config and not args.no_train and (ds_config["zero_optimization"]["stage"] or precision == "bf16"):
        problems.append(f"--optimizer {args.optimizer} looks at whole matrices, which ZeRO stages 1 to 3 flatten into one vector: --ds_config zero0 "
                        "with --precision bf16-mixed or fp32")
    if args.no_train and args.objective == "completion":
        for path in (run_dir / predictions_name(args, split, 0) for split in ("eval", "test") if any(d.records[split] for d in data_sets)):
            if path.exists():
                problems.append(f"{path} exists; move it away or choose another --training_run_name")
    if problems:
        common.fail(problems)
    return types.SimpleNamespace(source=source, config=config, tokenizer=tokenizer, precision=precision, n_params=n_params, ds_name=ds_name,
                                 data_sets=data_sets, denoisers=denoisers, sentinels=sentinels, run_dir=run_dir, identity=identity,
                                 resume_from=resume_from, state=state, ds_config=ds_config)


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
    if not args.compile:  # it fuses by itself
        speed_up(model, device)
    if precision == "bf16-mixed":
        model.get_output_embeddings().register_forward_hook(common.refuse_fp32_logits)
    if args.compile:
        for part in (model.encoder, model.decoder) if packed else (model,):
            part.compile(dynamic=True)

    # 4 engine
    optimizer = None
    if not args.no_train:
        optimizer = make_optimizer(args, model)
    elif ds_config["zero_optimization"]["stage"] < 3:  # without an optimizer there is nothing to partition
        ds_config.update(zero_optimization={"stage": 0}, bf16={"enabled": False}, fp16={"enabled": False})
    engine, *_ = deepspeed.initialize(model=TargetLosses(model, packed, args.label_smoothing, args.z_loss), optimizer=optimizer, config=ds_config)
    if world == 1 and not engine.zero_optimization():
        engine.enable_backward_allreduce = False  # it would copy all gradients to and fro, for nothing
    log.info(f"{source}: {job.n_params / 1e6:.2f} M parameters, {precision}, ZeRO stage {engine.zero_optimization_stage()}, "
             f"{world} process(es) on {device.type}, {'packed rows' if packed else 'one example per row'}")
    step, tracker, steps_per_epoch = state["step"], None, math.inf

    def log_row(split, metrics):
        if rank == 0:
            row = metrics if split == "train" else {f"{split}/{name}": value for name, value in metrics.items()}
            common.log_metrics(run_dir, {"step": step, "epoch": round(step / steps_per_epoch, 3), "split": split, **row}, tracker)

    # what one more group of rows costs in launches [tokens]; ZeRO-3 wants the same number of passes on every rank: one
    group_tokens = 1e12 if engine.zero_optimization_partition_weights() else 2048 if device.type == "cuda" else 200

    def spans(split):
        if job.denoisers:
            return Spans(args, data_sets, split, config, job.sentinels, tokenizer.eos_token_id, packed, group_tokens, job.denoisers)

    if args.no_train:
        for split in ("eval", "test"):
            if any(d.records[split] for d in data_sets):
                log_row(split, evaluate(args, engine, tokenizer, data_sets, split, 0, run_dir, device, spans(split)))
        for line in task_table(run_dir, data_sets, 0) if rank == 0 else []:
            log.info(line)
        return 0
    stopper = common.Stopper(args.max_hours)  # not before: a signal ends an evaluation at once
    train_data = spans("train") or TrainingData(args, data_sets, config, packed, group_tokens)
    steps_per_epoch = train_data.steps_per_epoch
    max_steps, eval_steps, save_steps, warmup = common.plan_steps(args, train_data.per_epoch, steps_per_epoch, run_dir)
    rawtune = {"format": 1, "script": "seq2seq.py", "task": args.objective, "family": "seq2seq", "record_layout": RECORD_LAYOUT,
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
        metrics = evaluate(args, engine, tokenizer, data_sets, "eval", step, run_dir, device, spans("eval"))
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
            n_sources = int((group["source_segment"] > 0).sum()) if "source_segment" in group else group["source_ids"].numel()
            window.update(computed=group["source_ids"].numel() + group["decoder_ids"].numel(), sources=n_sources)
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
        log_row("test", evaluate(args, engine, tokenizer, data_sets, "test", state["best_step"] or step, run_dir, device, spans("test")))
    if rank == 0:
        common.plot_curves(run_dir)
        common.export_root(run_dir, chosen)
        for line in task_table(run_dir, data_sets, state["best_step"] or step):
            log.info(line)
        log.info(f"done: {run_dir} holds the model of {chosen.name}, metrics.jsonl and the predictions")
    dist.barrier()
    return 0


if __name__ == "__main__":
    common.leave(main(parse_args()))
