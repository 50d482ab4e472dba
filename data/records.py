"""What the preparers of this folder share: tables to read, data files to write, and what a user sees at the end.

No script: data/prepare_*.py import it. A preparer copied elsewhere needs this file beside it.
"""

import csv
import gzip
import io
import json
import pathlib
import sys

SPLITS = ("train", "eval", "test")
TOKENIZER = pathlib.Path(__file__).resolve().parent.parent / "models" / "tiny-llama"


def add_arguments(parser):
    """--out and --tokenizer, the same for every preparer."""
    parser.add_argument("--out", required=True, help="the .json or .jsonl file to write; an existing one is never overwritten")
    parser.add_argument("--tokenizer", help="a model's folder or hub name, for the lengths that are shown at the end; default: models/tiny-llama, "
                        "which has small pieces and so gives high numbers")


def check_out(path, problems):
    path = pathlib.Path(path)
    if path.exists():
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
    except (OSError, EOFError, UnicodeDecodeError) as error:  # gzip.BadGzipFile is an OSError
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
                except ValueError as error:
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
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
                       strict=not tabs)
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
    return [(f"{path}, line {n}", dict(zip(names, row))) for n, row in table[header:]]


def write(path, splits):
    """{split: [records]} -> the file: .json an object of lists, .jsonl a line each with its "split". Raises FileExistsError."""
    path = pathlib.Path(path)
    with open(path, "x", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps({**record, "split": split}, ensure_ascii=False) + "\n" for split, part in splits.items() for record in part)
        else:
            parts = [f'"{split}": [\n' + ",\n".join(json.dumps(record, ensure_ascii=False) for record in part) + "\n]" for split, part in splits.items()]
            file.write("{" + ",\n".join(parts) + "}\n")


def token_counter(name, problems):
    """A function, texts -> their numbers of tokens; name: what --tokenizer says."""
    import tokenizers
    if not name:
        bpe = tokenizers.Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
        return lambda texts: [len(found.ids) for found in bpe.encode_batch(texts, add_special_tokens=False)]
    from transformers import AutoTokenizer  # seconds
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        problems.append(f"--tokenizer {name}: {error}")
        return None
    return lambda texts: [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids] if texts else []


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
