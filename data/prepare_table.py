"""Make a data file for any of the scripts from a table that you have already (CSV, TSV, JSON, JSON lines), by templates.

    --prompt "{question}" --completion "{answer}"        {"prompt": "2 + 2 =", "completion": "4"}             seq2seq.py, sft_causal.py
    --user "{question}" --assistant "{answer}"           {"messages": [{"role": "user", "content": "2 + 2 ="}, ...]}     sft_causal.py
    --input "{text}" --target score                      {"input": "She won.", "target": 1.0}                            clf.py
    --prompt "{q}" --chosen "{good}" --rejected "{bad}"  {"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}           clf.py --loss pairwise
    --prompt "{question}" --keep answer                  {"prompt": "2 + 2 =", "answer": "4"}                            rl_ppo.py
    --text "{title}\\n\\n{body}"                         {"text": "Tides\\n\\nThe moon pulls."}        sft_causal.py; .jsonl: seq2seq.py, pretraining

GSM8K. Expected: 2000 train, 500 test; nothing dropped. With --keep answer instead of --completion: prompts for rl_ppo.py.
    python data/prepare_table.py --train gsm8k_train.jsonl --test gsm8k_test.jsonl --prompt "{question}" --completion "{answer}" --out data/gsm8k.json
RTE. Expected: 999 train (1 repeated), 277 eval; 641 rows have target 1.
    python data/prepare_table.py --train RTE/train.tsv --eval RTE/dev.tsv --input "sentence1: {sentence1} sentence2: {sentence2}" \\
        --target label --positive entailment --out data/rte_scores.json
SMS spam, without a header. Expected: 77 repeated in all; 1514 train, 219 eval, 190 test, as with prepare_tsv.py.
    python data/prepare_table.py --train SMSSpamCollection_2000.tsv --no_header --input "{1}" --target 0 --positive spam \\
        --eval_share 0.1 --test_share 0.1 --out data/spam.json
Alpaca rows with an input. Expected: 287 of 500 rows dropped, 1 repeated; 187 train, 25 eval.
    python data/prepare_table.py --train alpaca_en_demo_500.json --eval_share 0.1 --skip_empty --system "Be brief." \\
        --user "{instruction}\\n\\n{input}" --assistant "{output}" --out data/alpaca.json
MultiArith, whose rows are a list within an object. Expected: 20 of 600 rows repeated; 516 train, 64 eval.
    python data/prepare_table.py --train multiarith.json --rows data --prompt "{question}" --completion "{answer}" --eval_share 0.1 \\
        --out data/arith.json

{name} is a column, or a path in nested JSON: {answer.text}, {choices.0}. Numbers, true and false are written as JSON writes them; white
space around a value is not part of it. A missing or empty value is a problem, or with --skip_empty its row is dropped and counted; what
--keep names may be empty, and stays as it is. A pair of equal replies is dropped and counted.

Splits: a file each; or --split_column; or a .json of lists named train, eval, test; or shares of the prompts (--input, --text; of messages
all but the last answer), by a hash, so that a prompt's place never depends on the other rows. Records are the same if prompt and answer
are equal but for case and white space: the first stays. A prompt that is also in a later split (train, eval, test) stays in the later one.
"""

import argparse
import collections
import json
import math
import pathlib
import re
import sys

from tqdm import tqdm

import records_v1 as records

FIELD = r"\{([^{}]+)\}"  # not str.format: column names may have dots, brackets and spaces
FORMATS = [["prompt", "completion"], ["prompt", "chosen", "rejected"], ["prompt"], ["input", "target"], ["text"], ["user", "assistant"], ["user"]]
SPLIT_WORDS = {"train": "train", "training": "train", "eval": "eval", "evaluation": "eval", "dev": "eval", "development": "eval", "val": "eval",
               "valid": "eval", "validation": "eval", "test": "test", "testing": "test"}


class Empty(ValueError):
    """A value is missing or empty: what --skip_empty skips and counts."""


def look_up(row, name):
    """A column's value or, where no column has that name, a path's: ({"a": [{"b": 1}]}, "a.0.b") -> 1."""
    found = row
    for part in [name] if name in row else name.split("."):
        if isinstance(found, dict) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            raise Empty(f"no {name!r} (has: {', '.join(row)})")
    return found


def has(row, name):
    try:
        look_up(row, name)
    except Empty:
        return False
    return True


def text_of(row, name):
    """A value as a text: numbers, true and false as JSON writes them; missing, null, nan and white space are Empty."""
    found = look_up(row, name)
    if isinstance(found, float) and math.isinf(found):
        raise ValueError(f"{name!r} is {found}, expected a text or a number")
    if isinstance(found, (dict, list)):
        raise ValueError(f"{name!r} is {'an object' if isinstance(found, dict) else 'a list'}, expected a text or a number; its parts: "
                         + (", ".join(f"{name}.{part}" for part in list(found if isinstance(found, dict) else range(len(found)))[:3]) or "none"))
    text = found.strip() if isinstance(found, str) else "" if found is None or found != found else json.dumps(found)
    if not text:
        raise Empty(f"{name!r} is empty")
    return text


def fill(template, row):
    """("Is it {kind}?", {"kind": "sports"}) -> "Is it sports?"."""
    return re.sub(FIELD, lambda found: text_of(row, found[1]), template)


def is_wanted(row, conditions):
    try:
        return all(text_of(row, name) == value for name, value in conditions)
    except Empty:
        return False


def to_target(row, args, labels):
    """The target column as a number; counts its values in `labels`."""
    label = text_of(row, args.target)
    labels[label] += 1
    try:
        target = float(label.replace("_", " _")) if args.positive is None else float(label == args.positive)  # "1_0" is no number
    except ValueError:
        target = math.nan
    if not math.isfinite(target):
        raise ValueError(f"target {label!r} is no number (words: --positive WORD)")
    return target


def to_item(row, args, form, labels):
    """-> (key, (prompt, answer), record), as records.clean has them, or None for equal replies; form: one of FORMATS."""
    extra = {"skill": text_of(row, args.group)} if args.group else {}
    extra.update({name: look_up(row, name) for name in args.keep})
    if form[0] == "user":
        turns = [("system", template) for template in args.system or []]
        for i, template in enumerate(args.user):
            turns += [("user", template), *(("assistant", template) for template in (args.assistant or [])[i:i + 1])]
        record = {"messages": [{"role": role, "content": fill(template, row)} for role, template in turns]}
        texts = [message["content"] for message in record["messages"]]
        n_answers = int(turns[-1][0] == "assistant")
    else:
        record = {name: to_target(row, args, labels) if name == "target" else fill(getattr(args, name), row) for name in form}
        texts, n_answers = list(map(str, record.values())), len(form) - 1
        if form[-1] == "rejected" and texts[1] == texts[2]:  # neither is better, and clf.py refuses it
            return None
    record.update(extra)
    json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # a ValueError for nan and half a surrogate pair, which no file should hold
    prompt, answer = (records.normal("\0".join(part)) for part in (texts[:len(texts) - n_answers], texts[len(texts) - n_answers:]))
    return prompt, (prompt, answer), record


def check_templates(args, problems):
    """-> (one of FORMATS or None, {flag: [columns that it names]})."""
    flags = {name: getattr(args, name) for name in dict.fromkeys(name for form in FORMATS for name in form) if getattr(args, name)}
    form = next((form for form in FORMATS if set(form) == set(flags)), None)
    if not form:
        problems.append(f"{' '.join(f'--{name}' for name in flags) or 'no template'}: expected "
                        + ", or ".join(" ".join(f"--{name}" for name in form) for form in FORMATS))
    if args.system and not (form and form[0] == "user" and len(args.system) == 1 and args.system[0].strip()):
        problems.append("--system: expected a single one that is not empty, and --user")
    if args.positive is not None and not args.target:
        problems.append("--positive: only with --target COLUMN")
    if form == ["user", "assistant"] and len(args.user) - len(args.assistant) not in (0, 1):
        problems.append(f"{len(args.user)} --user and {len(args.assistant)} --assistant: expected turn by turn, the user first")
    templates = {name: value if isinstance(value, list) else [value] for name, value in flags.items() if name != "target"}
    problems += [f"--{name} {template!r}: no {{column}} in it" for name, part in templates.items() for template in part
                 if not re.search(FIELD, template)]
    columns = {name: re.findall(FIELD, " ".join(part)) for name, part in {**templates, "system": args.system or []}.items()}
    columns.update({name: [value] for name in ("target", "group", "split_column") if (value := getattr(args, name))})
    taken = {*(form or []), "split", *(["skill"] if args.group else [])}
    problems += [f"--keep {name}: the record has a key of that name already" for name in args.keep if name in taken]
    telling = {"messages", "instruction", *{"text": ("prompt", "completion", "message_id"), "input": ("chosen", "replies", "reply")}.get((form or [""])[0], ())}
    problems += [f"--keep {name}: by this key the scripts would take the record for one of another format" for name in args.keep if name in telling]
    for name, part in templates.items():
        if any(set("{}") & set(re.sub(FIELD, "", template)) for template in part):
            print(f"WARNING: --{name}: braces without a column in them are written as they are", file=sys.stderr)
    problems += [f"--where {word}: expected COLUMN=VALUE" for word in args.where if not word.partition("=")[2].strip()]
    return form, {**columns, "keep": args.keep, "where": [word.partition("=")[0] for word in args.where]}


def read_rows(path, args, columns, problems):
    """-> [(where, name of the list in the file or None, row)]; a column that no row has is a problem of the file."""
    rows = records.read(path, problems, header=not args.no_header)
    rows = [(where, records.list_of(where, path), row) for where, row in rows]
    rows = [(where, part, row) for place, part, above in rows for where, row in records.flatten([(place, above)], args.rows, problems)]
    if args.no_header and not {".csv", ".tsv"} & set(pathlib.Path(path).suffixes):
        problems.append(f"--no_header: {path} is no table")
    unknown = [f"{path}: no column {name!r}, which --{flag} names; it has {', '.join(rows[0][2])}"
               for flag, names in columns.items() for name in dict.fromkeys(names) if rows and not any(has(row, name) for _, _, row in rows)]
    problems += unknown
    return [] if unknown else rows


def main(argv=None):
    def template(text):
        return text.replace("\\n", "\n")  # what a shell passes on of "\n"
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    records.add_split_arguments(parser, "prompts or texts")
    parser.add_argument("--split_column", metavar="COLUMN", help="the column that says where a row of --train's file belongs: "
                        f"{', '.join(SPLIT_WORDS)}; train where a JSON row lacks it")
    parser.add_argument("--no_header", action="store_true", help="the first line of a table is data; its columns are named 0, 1, 2, ...")
    parser.add_argument("--rows", nargs="+", default=[], metavar="KEY", help="JSON: the rows are in the list of this key, in that one's list of the "
                        "next key, ...; the keys around them are columns of each row")
    for name, what in (("prompt", "what a model reads"), ("completion", "what it writes"), ("chosen", "the better of two replies"),
                       ("rejected", "the worse one"), ("input", "the text that is scored"), ("text", "plain text")):
        parser.add_argument(f"--{name}", type=template, metavar="TEMPLATE", help=f"{what}: words, {{column}}, {{path.to.0.part}}, \\n for a new line")
    parser.add_argument("--target", metavar="COLUMN", help="its score")
    parser.add_argument("--positive", metavar="WORD", help="target 1 where the target column is WORD, else 0")
    for name, what in (("user", "a user's turn; repeat it for several"), ("assistant", "the answer to each"), ("system", "what comes before them")):
        parser.add_argument(f"--{name}", type=template, action="append", metavar="TEMPLATE", help=what)
    parser.add_argument("--keep", nargs="+", default=[], metavar="COLUMN", help="columns that ride along under their names")
    parser.add_argument("--group", metavar="COLUMN", help='is written as "skill", for project_grads.py --groups skill')
    parser.add_argument("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="only rows for which all of these hold")
    parser.add_argument("--skip_empty", action="store_true", help="drop and count rows in which a value is missing or empty")
    records.add_arguments(parser)
    args, problems = parser.parse_args(argv), []
    records.check_out(args.out, problems)
    files, shares = records.check_splits(args, problems)
    form, columns = check_templates(args, problems)
    if args.split_column and list(files) != ["train"]:
        problems.append("--split_column: expected a single file, as --train")
    if not form:
        return records.stop(problems)
    conditions = [(name, value.strip()) for name, _, value in (word.partition("=") for word in args.where)]
    splits, notes, labels, by_row = {split: [] for split in records.SPLITS}, [], collections.Counter(), bool(args.split_column)
    for split, path in files.items():
        rows, counts = read_rows(path, args, columns, problems), collections.Counter()
        lists = list(dict.fromkeys(part for _, part, _ in rows))
        # also a single list, such as "eval", that says it is something else than the flag
        by_list = not args.split_column and (len(lists) > 1 or SPLIT_WORDS.get(*lists or [None], split) != split)
        by_row |= by_list
        if by_list and (len(files) > 1 or len(lists) == 1 and split != "train" or not SPLIT_WORDS.keys() >= set(lists)):
            problems.append(f"{path}: has the lists {', '.join(lists)}; expected one list, or a single file with lists named train, eval, test")
            continue
        for where, part, row in tqdm(rows, desc=str(path), unit=" rows", delay=5):
            try:
                if not is_wanted(row, conditions):
                    counts[f"rows left out by --where {' '.join(args.where)}"] += 1
                    continue
                word = part if by_list else split
                if args.split_column and has(row, args.split_column):
                    word = text_of(row, args.split_column)
                if word.casefold() not in SPLIT_WORDS:
                    raise ValueError(f"{args.split_column!r} is {word!r}, expected {', '.join(SPLIT_WORDS)}")
                item = to_item(row, args, form, labels)
                splits[SPLIT_WORDS[word.casefold()]] += [item] if item else []
                counts["rows whose replies are equal dropped"] += not item
            except ValueError as error:
                if args.skip_empty and isinstance(error, Empty):
                    counts["rows with missing or empty values dropped"] += 1
                else:
                    problems.append(f"{where}: {error}")
        notes.append(f"{path}: {len(rows)} rows" + "".join(f", {n} {what}" for what, n in counts.items() if n))
        if not args.split_column and any("split" in row for _, _, row in rows):
            notes.append(f"WARNING: {path} has a column 'split', which is not used; --split_column split uses it")
    problems += [f"--{split}_share: the data has {split} records of its own" for split, share in shares.items()
                 if share > 0 and splits[split] and split not in files]
    if args.positive is not None:
        if not problems and args.positive not in labels:
            problems.append(f"--positive {args.positive!r}: no target is that; there are {', '.join(map(repr, list(labels)[:10]))}")
        notes.append(f"target 1: {args.positive!r} ({labels.pop(args.positive, 0)} rows); target 0: "
                     + (", ".join(f"{label!r} ({n})" for label, n in labels.most_common()) or "none"))
    wanted = [split for split in records.SPLITS if splits[split] or shares.get(split) or split in files and not by_row]
    fields = ["messages"] if form[0] == "user" else [name for name in form if name != "target"]
    return records.finish(args, splits, wanted or ["train"], shares, fields, notes, problems)


if __name__ == "__main__":
    sys.exit(main())
