"""What the preparers of this folder share: they read tables and JSON, hold out, clean, write, and
show what they wrote. No script; a preparer that is copied elsewhere needs this file and common.py.
"""

import argparse
import contextlib
import csv
import json
import os
import pathlib
import shutil
import sys
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from transformers import AutoTokenizer

import common
from common import SPLITS, log, open_text

BLANK = object()  # a line that holds no record
READ_ERRORS = (OSError, EOFError, zlib.error, ValueError, csv.Error)
SPLIT_OF = {  # and what others call it
    **dict.fromkeys(["train", "training"], "train"),
    **dict.fromkeys(["eval", "validation", "valid", "val", "dev"], "eval"),
    "test": "test",
}

csv.field_size_limit(2**31 - 1)  # of a cell, in characters; the default is 131,072


def new_file(text):
    """For argparse: the path of a data file that does not exist yet."""
    path = pathlib.Path(text)
    if path.exists() or path.suffix not in (".json", ".jsonl") or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"{path}: expected a .json or .jsonl that is not there yet, in a folder that is"
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
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    text = "the .json or .jsonl to write"
    parser.add_argument("--out", required=True, type=new_file, metavar="FILE", help=text)
    return parser


def add_fractions(parser):
    for split in ("eval", "test"):
        text = f"share of the training data held out for {split}"
        parser.add_argument(f"--{split}_fraction", type=share, default=0.0, help=text)


def add_files(parser):
    for split in SPLITS:
        parser.add_argument(f"--{split}", metavar="FILE", help=".csv, .tsv, .json[l], also .gz")
    add_fractions(parser)


def files_of(args):
    """{split: file} of those that are given."""
    return {split: getattr(args, split) for split in SPLITS if getattr(args, split)}


def add_skip(parser):
    text = "drop rows that cannot be used, and count them"
    parser.add_argument("--skip_malformed", action="store_true", help=text)


def load_tokenizer(name, problems):
    """The tokenizer of a model, or None and a problem."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        problems.append(f"--tokenizer {name}: {error}")
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


def read_table(file, is_csv, names):
    """Yield {column: text} or a ValueError of each row of a .csv, or of a .tsv, in which quotation
    marks are text."""
    rows = csv.reader(file, strict=True)
    if not is_csv:  # only "\n" ends a row
        rows = (line.rstrip("\r\n").split("\t") for line in file)
    for cells in rows:
        if cells in ([], [""]):
            yield BLANK
            continue
        if names is None:
            names = [name.strip() for name in cells]
            yield BLANK
            continue
        names = names or [str(i) for i in range(len(cells))]
        if len(cells) != len(names):
            yield ValueError(f"{len(cells)} columns, expected {len(names)}")
        elif "\ufeff" in cells[0]:
            yield ValueError(common.INNER_MARK)
        else:
            yield common.unique_keys(list(zip(names, cells)))


def read_lines(file):
    """Yield the value or a ValueError of each line of JSON."""
    for line in file:
        try:
            yield common.parse_json(line) if line.strip() else BLANK
        except ValueError as error:
            yield error


def read_lists(value):
    """{name: [row]} of JSON: a list, an object with one list of objects or with several, named as
    splits, or an object of columns."""
    lists = value if isinstance(value, dict) else {"row": value}
    tables = {}
    for name, rows in lists.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            tables[name] = rows
    if len(tables) > 1 and not tables.keys() <= SPLIT_OF.keys():
        raise ValueError(f"expected one list, or train, eval and test: {', '.join(tables)}")
    if tables:
        return tables
    if {type(cells) for cells in lists.values()} != {list}:
        raise ValueError("expected a list of objects, or columns")
    rows = zip(*lists.values(), strict=True)
    return {"row": [dict(zip(lists, row)) for row in rows]}


def read(path, problems, names=None):
    """Yield (where, split or None, row) of a table, JSON lines or other JSON (see read_lists). Of a
    table the first row names the columns, unless `names` does; an empty list numbers them from 0.
    A problem (where, text) is about a row, a text about the file."""
    path = pathlib.Path(path)
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    number = 0
    try:
        with open_text(path, newline="\n") as file:
            if kind in ("csv", "tsv"):
                lists = {"row": read_table(file, kind == "csv", names)}
            elif kind == "jsonl":
                lists = {"line": read_lines(file)}
            else:
                lists = read_lists(common.parse_json(file.read()))
            for name, rows in lists.items():
                for number, row in enumerate(rows, start=1):
                    where = f"{path}, {name} {number}"
                    if isinstance(row, dict):
                        yield where, SPLIT_OF.get(name), row
                    elif isinstance(row, ValueError):
                        problems.append((where, str(row)))
                    elif row is not BLANK:
                        problems.append((where, f"{row!r:.40}: expected an object"))
    except READ_ERRORS as error:
        problems.append(f"{path}, behind row {number}: {error}")


def convert(path, to_record, args, problems, names=None):
    """[(split or None, to_record(row))] of a file, see read. A row that cannot be used is a
    problem, or with --skip_malformed dropped and counted."""
    found = []
    malformed = []
    for where, split, row in read(path, malformed, names):
        try:
            found.append((split, to_record(row)))
        except ValueError as error:
            malformed.append((where, str(error)))
        except (LookupError, TypeError, AttributeError) as error:
            malformed.append((where, f"{type(error).__name__}: {error}"))
    if malformed and isinstance(malformed[-1], str):  # about the file
        problems.append(malformed.pop())
    if malformed and args.skip_malformed:
        log(f"{path}: dropped {len(malformed)} rows; the first: {': '.join(malformed[0])}")
        return found
    problems += [(where, f"{text}; --skip_malformed drops it") for where, text in malformed]
    return found


# ----------------------------------------------------------------------------------------- splits


def hold_out(args, split, key):
    """The split of a record of `split`: the shares of train that --eval_fraction and
    --test_fraction say leave it, by a hash, so that records of the same key stay together."""
    if split == "train":
        place = common.derive_seed("held out", key) / 2**63  # from 0 to 1
        if place < args.eval_fraction:
            return "eval"
        if place < args.eval_fraction + args.test_fraction:
            return "test"
    return split


def normal(text):
    return " ".join(text.split()).casefold()


def clean(splits, keys):
    """Drop repeated records, and those that share a text with a later split; case and white space
    make no difference. splits: {split: [record]}, changed; keys: record -> [text] to compare."""
    later = set()
    for split in reversed(SPLITS):
        kept = {}
        for record in splits[split]:
            if not later & set(map(normal, keys(record))):
                kept.setdefault(normal(to_json(record)), record)
        n_dropped = len(splits[split]) - len(kept)
        if n_dropped:
            log(f"{split}: dropped {n_dropped} records that it or a later split has already")
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
    is_lines = str(path).endswith(".jsonl")
    parts = []
    for split, found in splits.items():
        if is_lines:
            parts += [to_json({**record, "split": split}) for record in found]
        else:
            lines = ",\n".join(map(to_json, found))
            parts.append(f'"{split}": [\n{lines}\n]')
    text = "\n".join(parts) if is_lines else "{" + ",\n".join(parts) + "}"
    aside = pathlib.Path(f"{path}.tmp")
    aside.write_text(f"{text}\n", encoding="utf-8")
    os.replace(aside, path)


@contextlib.contextmanager
def new_folder(path, problems):
    """Yield a folder to write into, which becomes `path`: the whole of it, or nothing. Leave with
    exit code 2 if there are problems before or after."""
    if os.path.exists(path):
        problems.append(f"{path} exists: move it away or choose another name")
    if problems:
        common.fail(problems)
    aside = pathlib.Path(f"{path}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of an attempt that was stopped
    aside.mkdir(parents=True)
    yield aside
    if problems:
        shutil.rmtree(aside)
        common.fail(problems)
    os.rename(aside, path)


def finish(args, splits, problems):
    """Write and show {split: [record]}, or leave with exit code 2; splits without records go."""
    splits = {split: found for split, found in splits.items() if found}
    if problems or not splits:
        common.fail(problems or f"{args.out}: no records: no file, an empty one, or all left out")
    write(args.out, splits)
    show(args.out, splits)


def as_list(value):
    return value if isinstance(value, list) else [value]


def texts_of(value):
    """[text] of a field: a text, or a list of alternatives."""
    return [text for text in as_list(value) if isinstance(text, str)]


def show(path, splits):
    """Log how many records each split has, and two of them. splits: {split: [record]}, of which
    none is empty."""
    for split, found in splits.items():
        log(f"{path}: {len(found)} {split} records")
    for record in next(iter(splits.values()))[:2]:
        log(to_json(record))
