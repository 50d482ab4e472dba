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
READ_ERRORS = (OSError, EOFError, zlib.error, ValueError, csv.Error)
SPLIT_OF = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **dict.fromkeys(["eval", "evaluation", "dev", "val", "valid", "validation"], "eval"),
}

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


def make_parser(doc):
    """With the flags that all preparers have."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=raw)
    add = parser.add_argument
    add("--out", required=True, type=new_file, metavar="FILE", help="the .json or .jsonl to write")
    add("--tokenizer", metavar="MODEL", help="folder or hub id: lengths are shown in its tokens")
    return parser


def add_fractions(parser):
    for split in ("eval", "test"):
        text = f"share of the training data held out for {split}"
        parser.add_argument(f"--{split}_fraction", type=share, default=0.0, help=text)


def add_files(parser):
    for split in SPLITS:
        text = f"for {split}: .csv, .tsv, .json or .jsonl, also .gz"
        parser.add_argument(f"--{split}", metavar="FILE", help=text)
    add_fractions(parser)


def files_of(args):
    """{split: file} of those that are given."""
    return {split: getattr(args, split) for split in SPLITS if getattr(args, split)}


def add_skip(parser):
    text = "drop rows that cannot be used, and count them"
    parser.add_argument("--skip_malformed", action="store_true", help=text)


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
            return common.parse_json(file.read())
    except READ_ERRORS as error:
        problems.append(f"{path}: {error}; expected JSON")
        return None


def read_table(path, problems, names=None):
    """Yield (where, {column: text}) of a .csv, or of a .tsv, in which a quotation mark is text. The
    first row names the columns, unless `names` does; an empty list numbers them from 0."""
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
                    continue
                names = names or [str(i) for i in range(len(row))]
                if row[0].startswith("\ufeff"):
                    problems.append((where, common.INNER_MARK))
                elif len(row) == len(names):
                    yield where, common.unique_keys(list(zip(names, row)))
                else:
                    problems.append((where, f"{len(row)} columns, expected {len(names)}"))
    except READ_ERRORS as error:
        problems.append(f"{path}, behind row {number}: {error}; expected a table")


def read_lines(path, problems):
    """Yield (where, value) of a file of JSON lines."""
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    value = common.parse_json(line)
                except ValueError as error:
                    problems.append((where, f"{error}; expected JSON"))
                    continue
                yield where, value
    except READ_ERRORS as error:
        problems.append(f"{path}: {error}")


def lists_of(value):
    """{name of a list, or "": [row]} of JSON: a list, an object of columns, or an object with one
    list of objects or with several, named as splits. A ValueError says what does not fit."""
    if isinstance(value, list):
        return {"": value}
    if not isinstance(value, dict):
        raise ValueError("expected a list or an object")
    lists = {}
    for name, rows in value.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            lists[name] = rows
    if len(lists) > 1 and not lists.keys() <= SPLIT_OF.keys():
        raise ValueError(f"it has the lists {', '.join(lists)}, expected one, or train, eval, test")
    if lists:
        return lists
    columns = []
    for cells in value.values():
        if not isinstance(cells, (list, dict)):
            return {"": [value]}  # a single row
        columns.append(list(cells.values()) if isinstance(cells, dict) else cells)
    if len(set(map(len, columns))) > 1:
        raise ValueError(f"the columns {', '.join(value)} are of different lengths")
    return {"": [dict(zip(value, cells)) for cells in zip(*columns)]}


def kind_of(path):
    """The ending of a file's name, without .gz."""
    return pathlib.Path(path.name.lower().removesuffix(".gz")).suffix


def read(path, problems, names=None):
    """Yield (where, split, row) of a table (see read_table), of JSON lines, or of other JSON (see
    lists_of). split: train, eval or test where the name of a list says it, else None."""
    path = pathlib.Path(path)
    lists = {}
    if kind_of(path) in (".csv", ".tsv"):
        lists[""] = read_table(path, problems, names)
    elif kind_of(path) == ".jsonl":
        lists[""] = read_lines(path, problems)
    else:
        try:
            for name, rows in lists_of(load_json(path, problems) or []).items():
                lists[name] = [(f"{path}, {name}[{i}]", row) for i, row in enumerate(rows)]
        except ValueError as error:
            problems.append(f"{path}: {error}")
    for name, rows in lists.items():
        for where, row in rows:
            if isinstance(row, dict):
                yield where, SPLIT_OF.get(name), row
            else:
                problems.append((where, f"{row!r:.40}: expected an object"))


def convert(path, to_record, args, problems, names=None):
    """[(split or None, to_record(row))] of a file, see read. A row that cannot be used is a
    problem, or with --skip_malformed dropped and counted."""
    found = []
    wrong = []  # a pair (where, text) is about a row, a text about the file
    for where, split, row in read(path, wrong, names):
        try:
            found.append((split, to_record(row)))
        except ValueError as error:
            wrong.append((where, str(error)))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            wrong.append((where, f"{type(error).__name__}: {error}"))
    malformed = [problem for problem in wrong if isinstance(problem, tuple)]
    problems += [problem for problem in wrong if isinstance(problem, str)]
    if malformed and args.skip_malformed:
        log(f"{path}: dropped {len(malformed)} rows; the first: {': '.join(malformed[0])}")
    else:
        problems += [(where, f"{text}; --skip_malformed drops it") for where, text in malformed]
    return found


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


def split_files(args, to_records, key_of, problems, names=None):
    """{split: [record]} of the files of --train, --eval and --test, clean. to_records: row ->
    [record], whose key "split" says more than its file; key_of: record -> text, see hold_out."""
    splits = {split: [] for split in SPLITS}
    for split_of_file, path in files_of(args).items():
        for split_of_list, found in convert(path, to_records, args, problems, names):
            for record in found:
                split = SPLIT_OF[record.pop("split", split_of_list or "train")]
                if split_of_file != "train":
                    split = split_of_file
                splits[hold_out(args, split, normal(key_of(record)))].append(record)
    clean(splits, lambda record: [key_of(record)])
    return splits


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


def finish(args, splits, problems):
    """Write and show {split: [record]}, or leave with exit code 2; splits without records go."""
    tokenizer = load_tokenizer(args.tokenizer, problems)
    splits = {split: found for split, found in splits.items() if found}
    if problems or not splits:
        common.fail(problems or f"{args.out}: no records: no file, an empty one, or all left out")
    write(args.out, splits)
    show(args.out, splits, tokenizer)


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
