"""What the preparers of this folder share: tables to read, data files to write, and what a user sees at the end.

No script: data/prepare_*.py import it. A preparer copied elsewhere needs this file beside it.
"""

import collections
import csv
import gzip
import hashlib
import io
import json
import os
import pathlib
import re
import sys
import zlib

from tqdm import tqdm

SPLITS = ("train", "eval", "test")
TOKENIZER = pathlib.Path(__file__).resolve().parent.parent / "models" / "tiny-llama"


def add_arguments(parser):
    """--out and --tokenizer, the same for every preparer."""
    parser.add_argument("--out", required=True, help="the .json or .jsonl file to write; an existing one is never overwritten")
    add_tokenizer(parser)


def add_tokenizer(parser):
    parser.add_argument("--tokenizer", help="a model's folder or hub name, for the lengths that are shown at the end; default: models/tiny-llama, "
                        "which has small pieces and so gives high numbers")


def check_out(path, problems):
    path = pathlib.Path(path)
    if os.path.lexists(path):
        problems.append(f"--out {path}: exists; move it away or choose another name")
    elif path.suffix not in (".json", ".jsonl") or not path.parent.is_dir():
        problems.append(f"--out {path}: expected a name that ends in .json or .jsonl, in a folder that exists")


def stop(problems):
    """Show the problems, at most 40; -> exit code 2."""
    print(*problems[:40], *([f"... and {len(problems) - 40} more problems"] if len(problems) > 40 else []), sep="\n", file=sys.stderr)
    return 2


def read(path, problems, header=True):
    """[(where, record)] of a JSON file (a list, an object of lists, or one object), of JSON lines, or of a table (.csv: quoted, .tsv: a
    quotation mark is text), each also as .gz. Without a header a table's columns are "0", "1", ... What is wrong goes to `problems`."""
    path = pathlib.Path(path)
    try:
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:  # gzip.BadGzipFile is an OSError
        problems.append(f"{path}: cannot be read ({error}); expected a UTF-8 file")
        return []
    kind = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    if kind in (".csv", ".tsv"):
        return _table(path, text, kind == ".tsv", header, problems)
    found = []
    if kind == ".jsonl":
        for n, line in enumerate(text.split("\n"), 1):  # no splitlines: U+2028 and the like are text
            if line.strip():
                try:
                    found.append((f"{path}, line {n}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    problems.append(f"{path}, line {n}: not JSON ({error}); expected one object per line")
    else:
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}: not JSON ({error}); one object per line belongs into a file named .jsonl, a table into .csv or .tsv")
            return []
        lists = {"": whole} if isinstance(whole, list) else whole
        if isinstance(lists, dict) and lists and all(isinstance(part, list) for part in lists.values()):
            found = [(f"{path}, {name}[{i}]", record) for name, part in lists.items() for i, record in enumerate(part)]
        else:
            found = [(str(path), whole)]
    problems += [f"{where}: a {type(record).__name__}, expected an object" for where, record in found if not isinstance(record, dict)]
    return [(where, record) for where, record in found if isinstance(record, dict)]


def _table(path, text, tabs, header, problems):
    if tabs:  # a quotation mark, U+2028 or a lone \r is text
        table = [(n, line.removesuffix("\r").split("\t")) for n, line in enumerate(text.split("\n"), 1) if line.strip(" \r")]
    else:
        csv.field_size_limit(2**31 - 1)
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            table = [(lines.line_num, row) for row in lines if row]
        except csv.Error as error:
            problems.append(f"{path}, line {lines.line_num}: not a table ({error})")
            return []
    if not table:
        problems.append(f"{path}: is empty")
        return []
    names = [name.strip() for name in table[0][1]] if header else [str(i) for i in range(len(table[0][1]))]
    if len(set(names)) < len(names):
        problems.append(f"{path}: columns of the same name: {', '.join(names)}")
    problems += [f"{path}, line {n}: number of columns {len(row)}, expected {len(names)}" for n, row in table if len(row) != len(names)]
    return [(f"{path}, line {n}", dict(zip(names, row))) for n, row in table[header:] if len(row) == len(names)]


def pieces(path, splits):
    """{split: [records]} -> the text of the file, in pieces: .json an object of lists, .jsonl a line each with its "split"."""
    if pathlib.Path(path).suffix == ".jsonl":
        return (json.dumps({**record, "split": split}, ensure_ascii=False) + "\n" for split, part in splits.items() for record in part)
    parts = [f'"{split}": [\n' + ",\n".join(json.dumps(record, ensure_ascii=False) for record in part) + "\n]" for split, part in splits.items()]
    return ["{", ",\n".join(parts), "}\n"]


def write_aside(path, parts, is_new=False):
    """The whole file or none of it; parts: texts, or one text; is_new: FileExistsError where there is one by the end. Raises OSError."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "w", encoding="utf-8", newline="\n") as file:
            file.writelines([parts] if isinstance(parts, str) else parts)
            file.flush()
            os.fsync(file.fileno())
        if is_new and os.path.lexists(path):
            raise FileExistsError(f"{path} exists by now")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write(path, splits):
    """`pieces` into a new file: the whole of it, or none and exit code 2."""
    try:
        write_aside(path, pieces(path, splits), is_new=True)
    except OSError as error:
        sys.exit(stop([f"--out {path}: {error}"]))


def token_counter(name, problems):
    """A function, texts -> their numbers of tokens; name: what --tokenizer says."""
    if not name:
        import tokenizers
        bpe = tokenizers.Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))

        def encode(texts):
            return [found.ids for found in bpe.encode_batch(texts, add_special_tokens=False)]
    else:
        from transformers import AutoTokenizer  # seconds
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            problems.append(f"--tokenizer {name}: {error}")
            return None

        def encode(texts):
            return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids

    def count(texts):
        return [len(ids) for i in tqdm(range(0, len(texts), 1000), desc="counting tokens", delay=5) for ids in encode(texts[i: i + 1000])]
    return count


def show(out, splits, fields, count, tokenizer=None):
    """What a user wants to see: records per split, the spread of their lengths in tokens, two records. fields: {name: record -> text};
    count: of `token_counter`."""
    print(f"{out}: " + ", ".join(f"{len(records)} {split}" for split, records in splits.items()))
    for split, records in splits.items():
        for name, text_of in fields.items():
            lengths = sorted(count([text_of(record) for record in records]))
            if lengths:
                print(f"{split}, tokens of {name} ({tokenizer or 'models/tiny-llama'}): "
                      + " ".join(f"{q:.0%} {lengths[round(q * (len(lengths) - 1))]}" for q in (0, 0.05, 0.5, 0.95, 1)))
    print(*(json.dumps(record, ensure_ascii=False) for record in next(iter(splits.values()), [])[:2]), sep="\n")


# ------------------------------------------------------------------------------------------------ splits


def add_split_arguments(parser, key):
    """--train, --eval, --test, --eval_share, --test_share; key: what the shares are of, in words."""
    for split in SPLITS:
        parser.add_argument(f"--{split}", metavar="FILE", help=".json, .jsonl, .csv (quoted), .tsv (a quotation mark is text), or one as .gz")
    for split in SPLITS[1:]:
        parser.add_argument(f"--{split}_share", type=float, default=0.0, metavar="SHARE", help=f"share of train's {key} that is held out for "
                            f"{split}, by a hash; default 0")


def check_splits(args, problems):
    """-> ({split: file}, {"eval": share, "test": share})."""
    files = {split: getattr(args, split) for split in SPLITS if getattr(args, split)}
    shares = {split: getattr(args, f"{split}_share") for split in SPLITS[1:]}
    if not files:
        problems.append("no data: expected --train FILE, --eval FILE or --test FILE")
    if not all(share >= 0 for share in shares.values()) or sum(shares.values()) >= 1:  # nan is not >= 0
        problems.append(f"--eval_share {shares['eval']}, --test_share {shares['test']}: expected shares of 0 or more, together below 1")
    problems += [f"--{split}_share: {split} has a file" if split in files else f"--{split}_share: needs --train FILE, of which it is a share"
                 for split, share in shares.items() if share > 0 and (split in files or files and "train" not in files)]
    return files, shares


def normal(text):
    """Two texts count as the same if this is."""
    return " ".join(text.split()).casefold()


def place_of(text):
    """A number from 0 to 1 by a hash, so that a text's side of a split depends on nothing else."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2 ** 64


def hold_out(splits, shares):
    """Move shares of train's keys to eval and test."""
    train, splits["train"] = splits["train"], []
    for item in train:
        place = place_of(keys_of(item)[0])
        splits["eval" if place < shares["eval"] else "test" if place < sum(shares.values()) else "train"].append(item)


def keys_of(item):
    """By which an item is in one split only; the hold-out goes by the first."""
    return item[0] if isinstance(item[0], tuple) else item[:1]


def clean(splits, held={}):
    """Drop repeats within a split and what a later split has, by a key or the prompt; -> {split: what was dropped, in words}.
    splits: {split: [(key or keys, (prompt, answer), record)]}, the first two made of normal texts; held: {split: [key]} of what a split has
    without a record."""
    notes, later = {}, {}
    for split in reversed(SPLITS):
        first = {}
        for item in splits[split]:
            first.setdefault(item[1], item)
        where = {texts: next(filter(None, map(later.get, (*keys_of(item), texts[0]))), None) for texts, item in first.items()}
        kept = [item for texts, item in first.items() if not where[texts]]
        also = collections.Counter(where.values())
        n_answers = collections.Counter(prompt for _, (prompt, _), _ in kept)
        torn = sum(n > 1 for n in n_answers.values())
        what = [f"{len(splits[split]) - len(first)} repeated", *(f"{also[name]} also in {name}" for name in SPLITS if also[name])]
        notes[split] = f"{', '.join(what)} dropped" + (f"; prompts with several answers: {torn}" if torn else "")
        later.update((text, split) for item in kept for text in (*keys_of(item), item[1][0]))
        later.update(dict.fromkeys(held.get(split, ()), split))
        splits[split] = kept
    return notes


def finish(args, splits, wanted, shares, fields, notes, problems, held={}):
    """Hold out, clean, write and show; -> exit code. fields: the keys whose lengths are shown; notes: lines about the files; held: as
    `clean` has it."""
    count = token_counter(args.tokenizer, problems)
    if not problems:
        hold_out(splits, shares)
        dropped = clean(splits, held)
        problems += [f"{split}: no record is left ({dropped[split]}; {'; '.join(notes)})" for split in wanted if not splits[split]]
        notes += [f"{split}: {dropped[split]}" for split in wanted]
    if problems:
        return stop(problems)
    found = {split: [record for _, _, record in splits[split]] for split in wanted}
    write(args.out, found)
    print(*notes, sep="\n")

    def text_of(name):
        return lambda record: "\n".join(message["content"] for message in record[name]) if name == "messages" else record[name]
    show(args.out, found, {name: text_of(name) for name in fields}, count, args.tokenizer)
    return 0


def list_of(where, path):
    """("a.json, eval[3]", "a.json") -> "eval": the list of the file in which a record stands, or None."""
    found = re.fullmatch(r", (.+)\[\d+\]", where[len(str(pathlib.Path(path))):])  # as `read` writes it: "./a.json" is "a.json"
    return found and found[1]


def flatten(rows, names, problems):
    """Go down into lists of objects: [(where, {"a": 1, "data": [{"b": 2}, {"b": 3}]})], ["data"] -> a row each of {"a": 1, "b": 2} and
    {"a": 1, "b": 3}. A row that lacks the first list passes as it is."""
    for name in names:
        below = []
        for where, row in rows:
            items = row.get(name)
            if name == names[0] and name not in row:
                below.append((where, row))
            elif not isinstance(items, list):
                problems.append(f"{where}: no list {name!r} (has: {', '.join(row)})")
            else:
                rest = {key: value for key, value in row.items() if key != name}
                places = [(f"{where}, {name}[{i}]", item) for i, item in enumerate(items)]
                problems += [f"{place}: a {type(item).__name__}, expected an object" for place, item in places if not isinstance(item, dict)]
                below += [(place, {**rest, **item}) for place, item in places if isinstance(item, dict)]
        rows = below
    return rows
