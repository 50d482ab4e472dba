"""What the preparers of this folder share: they read tables and JSON, hold out, clean, write, and
show what they wrote. No script; a preparer that is copied elsewhere needs this file and common.py.
"""

import argparse
import csv
import json
import os
import pathlib
import sys
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
from transformers import AutoTokenizer

import common
from common import SPLITS, log, open_text

TEXT_FIELDS = ("prompt", "completion", "input", "messages")  # whose lengths are shown

csv.field_size_limit(2**31 - 1)  # of a cell, in characters; the default is 131,072


def new_file(text):
    """For argparse: the path of a data file that does not exist yet."""
    path = pathlib.Path(text)
    if path.exists():
        raise argparse.ArgumentTypeError(f"{path} exists: move it away or choose another name")
    if path.suffix not in (".json", ".jsonl") or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"{path}: expected a .json or .jsonl in an existing folder"
        )
    return path


def natural(text):
    """For argparse: a whole number, 0 or more."""
    if int(text) < 0:
        raise ValueError
    return int(text)


def share(text):
    """For argparse: a number from 0 to 0.5, so that two of them leave something."""
    if not 0 <= float(text) <= 0.5:
        raise ValueError
    return float(text)


def add_flags(parser):
    add = parser.add_argument
    add("--out", required=True, type=new_file, metavar="FILE", help="the .json or .jsonl to write")
    add("--tokenizer", metavar="MODEL", help="folder or hub id: lengths are shown in its tokens")


def add_fractions(parser):
    for split in ("eval", "test"):
        text = f"share of the training data held out for {split}"
        parser.add_argument(f"--{split}_fraction", type=share, default=0.0, help=text)


def load_tokenizer(name, problems):
    """The tokenizer of a model, or None without a name."""
    if not name:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        problems.append(f"--tokenizer {name}: {str(error).strip().splitlines()[0]}")
        return None
    # transformers makes one up for a folder that has none: special tokens and a blank
    if len(tokenizer.get_vocab()) - len(tokenizer.get_added_vocab()) < 10:
        problems.append(f"--tokenizer {name}: it has no vocabulary")
    return tokenizer


# ---------------------------------------------------------------------------------------- reading


def load_json(path, problems):
    """The value that a JSON file holds, or None."""
    try:
        with open_text(path) as file:
            return json.load(file, object_pairs_hook=common.unique_keys)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        problems.append(f"{path}: {error}; expected JSON")
        return None


def read_table(path, problems, names=None):
    """Yield (where, {column: text}) of a .csv, or of a .tsv, in which a quotation mark is text. The
    first row names the columns, unless `names` does."""
    is_csv = kind_of(path) == ".csv"
    number = 0
    try:
        with open_text(path, newline="" if is_csv else "\n") as file:
            rows = csv.reader(file, strict=True)
            if not is_csv:  # only "\n" ends a row
                rows = (line.rstrip("\r\n").split("\t") for line in file)
            for number, row in enumerate(rows, start=1):
                where = f"{path}, row {number}"
                if row in ([], [""]):  # a blank line
                    continue
                if names is None:
                    names = [name.strip() for name in row]
                elif len(row) == len(names):
                    yield where, common.unique_keys(list(zip(names, row)))
                else:
                    problems.append((where, f"{len(row)} columns, expected {len(names)}"))
    except (OSError, EOFError, zlib.error, ValueError, csv.Error) as error:
        problems.append(f"{path}, behind row {number}: {error}; expected a table")


def kind_of(path):
    """The ending of a file's name, without .gz."""
    return pathlib.Path(path.name.lower().removesuffix(".gz")).suffix


def read(path, problems, names=None):
    """Yield (where, split, record) of a file of JSON, see common.read_records, or of a table."""
    path = pathlib.Path(path)
    if kind_of(path) in (".csv", ".tsv"):
        for where, row in read_table(path, problems, names):
            yield where, "train", row
    else:
        yield from common.read_records(path, problems)


# ----------------------------------------------------------------------------------------- splits


def hold_out(args, split, key):
    """The split of a record of `split`: the shares of train that --eval_fraction and
    --test_fraction say leave it, by a hash, so that records of the same key stay together."""
    if split != "train":
        return split
    place = common.derive_seed("held out", key) / 2**63  # from 0 to 1
    if place < args.eval_fraction:
        return "eval"
    if place < args.eval_fraction + args.test_fraction:
        return "test"
    return "train"


def normal(text):
    return " ".join(text.split()).casefold()


def clean(splits, keys):
    """Drop repeated records, and those that share a text with a later split; case and white space
    make no difference. splits: {split: [record]}, changed; keys: record -> [text] to compare."""
    later = set()
    for split in reversed(SPLITS):
        kept = {}
        n_leaks = 0
        for record in splits[split]:
            if later & set(map(normal, keys(record))):
                n_leaks += 1
            else:
                kept.setdefault(normal(to_json(record)), record)
        n_repeats = len(splits[split]) - n_leaks - len(kept)
        if n_leaks or n_repeats:
            log(f"{split}: dropped {n_repeats} repeats, {n_leaks} that a later split has")
        splits[split] = list(kept.values())
        for record in splits[split]:
            later.update(map(normal, keys(record)))


# ---------------------------------------------------------------------------------------- writing


def to_json(record):
    """On a line. Half a character is written as its escape; the trainers name such a record."""
    line = json.dumps(record, ensure_ascii=False)
    return line.encode(errors="backslashreplace").decode()


def write(path, splits):
    """Write {split: [record]}, a record a line: the whole file, or nothing."""
    path = pathlib.Path(path)
    parts = []
    for split, records in splits.items():
        if path.suffix == ".jsonl":
            parts += [to_json({**record, "split": split}) + "\n" for record in records]
        else:
            lines = ",\n".join(map(to_json, records))
            parts.append(f'"{split}": [\n{lines}\n]')
    aside = path.with_name(f"{path.name}.tmp")
    with open(aside, "w", encoding="utf-8", newline="\n") as file:
        if path.suffix == ".jsonl":
            file.writelines(parts)
        else:
            file.write("{" + ",\n".join(parts) + "}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def as_list(value):
    return value if isinstance(value, list) else [value]


def texts_of(value):
    """[text] of a field: a text, a list of alternatives, or the turns of a chat as one."""
    values = as_list(value)
    if values and isinstance(values[0], dict):
        values = ["\n".join(str(turn.get("content")) for turn in values)]
    return [text for text in values if isinstance(text, str)]


def show(path, splits, tokenizer=None):
    """Log what a user wants to see: the records of each split, how long their texts are, and two
    records. splits: {split: [record]}, of which none is empty."""
    unit = "tokens" if tokenizer else "words"
    for split, records in splits.items():
        log(f"{path}: {len(records)} {split} records")
        for name in TEXT_FIELDS:
            texts = []
            for record in records:
                texts += texts_of(record.get(name))
            rows = common.tokenize(tokenizer, texts) if tokenizer else map(str.split, texts)
            lengths = [len(row) for row in rows]
            if lengths:
                low, middle, high = np.percentile(lengths, [5, 50, 95], method="nearest")
                spread = f"{low} (5 %), {middle} (median), {high} (95 %), {max(lengths)} at most"
                log(f"    {unit} of {name}: {spread}")
    for record in next(iter(splits.values()))[:2]:
        log(to_json(record))
