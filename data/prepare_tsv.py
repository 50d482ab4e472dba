"""Make a data file for clf.py, {"input": text, "target": number}, from tab-separated tables that you have already.

SST-2 (header; label 0 or 1). Expected: 2000 train, 500 eval; nothing dropped; mean target 0.5565 and 0.582.
    python data/prepare_tsv.py --train SST-2/train.tsv --eval SST-2/dev.tsv --input sentence --target label --out data/sst2.json
SMS spam (no header: columns are counted from 0; no dev file: a tenth of the texts is held out for eval and one for test).
Expected, for the first 2000 lines: 77 repeated in all, 1514 train, 219 eval, 190 test; mean target 0.1394, 0.1598, 0.1158.
    python data/prepare_tsv.py --train SMSSpamCollection_2000.tsv --no_header --input 1 --target 0 --positive spam \\
        --holdout 0.1 0.1 --out data/spam.json
STS-B (two sentences, score 0 to 5), 1875 and 500 pairs without MSRpar and MSRvid. Expected: 9 repeated, 1 also in eval,
1865 train, 500 eval; mean target 2.647 and 2.12.
    python data/prepare_tsv.py --train STS-B/train.tsv --eval STS-B/dev.tsv --target score --out data/stsb.json \\
        --text "sentence1: {sentence1} sentence2: {sentence2}"
RTE: --text as for STS-B, --target label --positive entailment. CoLA: --no_header --input 3 --target 1.

Lines are split on tabs, a quotation mark is text. Columns that --text or --keep names ride along as keys of their own.
Texts are the same if they are equal but for case and white space. Of the same text with the same target the first
stays; a text that is also in a later split (train, eval, test) stays in the later one; hold-outs go by a hash of the text.
"""

import argparse
import collections
import hashlib
import json
import math
import pathlib
import re
import sys

SPLITS = ("train", "eval", "test")
FIELD = r"\{([^{}]+)\}"  # not str.format: column names may have dots, brackets and colons


def read_rows(path, no_header, problems):
    """-> (column names, [(where, {column: value})]); lines with another number of columns are problems."""
    try:  # utf-8-sig: a byte-order mark is not part of the first column; no splitlines: U+2028 and the like are text
        lines = pathlib.Path(path).read_bytes().decode("utf-8-sig").rstrip("\r\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: cannot be read ({error})")
        return [], []
    table = [[value.strip() for value in line.split("\t")] for line in lines]
    names = [str(i) for i in range(len(table[0]))] if no_header else table[0]
    rows = []
    for number, values in list(enumerate(table, 1))[not no_header:]:
        if len(values) == len(names):
            rows.append((f"{path}, line {number}", dict(zip(names, values))))
        else:
            problems.append(f"{path}, line {number}: number of columns {len(values)}, expected {len(names)}")
    return names, rows


def to_records(path, args, labels, problems):
    """One file -> records; counts the target column's values in `labels`."""
    names, rows = read_rows(path, args.no_header, problems)
    in_text = list(dict.fromkeys(re.findall(FIELD, args.text))) if args.text else [args.input]
    wrong = [name for name in dict.fromkeys([*in_text, args.target, *args.keep]) if names.count(name) != 1]
    if names:  # else the file could not be read, which is said already
        problems += [f"{path}: {names.count(name) or 'no'} columns named {name!r}; it has {', '.join(names)}" for name in wrong]
    if wrong:
        return []
    extra = [name for name in [*(in_text if args.text else []), *args.keep] if name not in ("input", "target", "split")]
    records = []
    for where, row in rows:
        text = re.sub(FIELD, lambda found, row=row: row[found[1]], args.text) if args.text else row[args.input]
        if not any(row[name] for name in in_text):
            problems.append(f"{where}: the text is empty")
        label = row[args.target]
        labels[label] += 1
        try:
            target = float(label == args.positive) if args.positive and label else float(label)
        except ValueError:
            target = math.nan
        if not math.isfinite(target):
            problems.append(f"{where}: target {label!r} is no number ({'words: --positive WORD' if label else 'empty'})")
        records.append({"input": text, "target": target, **{name: row[name] for name in extra}})
    return records


def same(record):
    """What two records share if their texts count as the same."""
    return " ".join(record["input"].split()).casefold()


def hold_out(records, shares):
    """Move shares of the distinct texts to eval and test; by a hash, so a text's fate never depends on the other lines."""
    splits = {split: [] for split in SPLITS}
    for record in records:
        place = int.from_bytes(hashlib.sha256(same(record).encode()).digest()[:8], "big") / 2 ** 64
        splits["eval" if place < shares[0] else "test" if place < sum(shares) else "train"].append(record)
    return splits


def clean(splits):
    """Drop repeats within a split and texts that a later split has; -> {split: what was dropped, in words}."""
    notes, later = {}, {}
    for split in reversed(SPLITS):
        first = {}
        for record in splits[split]:
            first.setdefault((same(record), record["target"]), record)
        kept = {key: record for key, record in first.items() if key[0] not in later}
        also = collections.Counter(later[text] for text, _ in first if text in later)
        n_targets = collections.Counter(text for text, _ in kept)
        notes[split] = [f"{len(splits[split]) - len(first)} repeated", *(f"{also[name]} also in {name}" for name in SPLITS if also[name])]
        torn = sum(n > 1 for n in n_targets.values())
        notes[split] = f"{', '.join(notes[split])} dropped" + (f"; texts kept with several targets: {torn}" if torn else "")
        splits[split] = list(kept.values())
        later.update((text, split) for text in n_targets)
    return notes


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--train", required=True, metavar="FILE", help="tab-separated table, UTF-8")
    parser.add_argument("--eval", metavar="FILE")
    parser.add_argument("--test", metavar="FILE")
    parser.add_argument("--no_header", action="store_true", help="the first line is data; columns are named 0, 1, 2, ...")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--input", metavar="COLUMN", help="the column with the text")
    text.add_argument("--text", metavar="TEMPLATE", help='several columns, "question: {question} answer: {answer}"')
    parser.add_argument("--target", required=True, metavar="COLUMN")
    parser.add_argument("--positive", metavar="LABEL", help="target 1 where the target column is LABEL, else 0")
    parser.add_argument("--keep", nargs="+", default=[], metavar="COLUMN", help="further columns that ride along")
    parser.add_argument("--holdout", nargs="+", type=float, metavar="SHARE", help="share of train's texts for eval, and one for test")
    parser.add_argument("--out", required=True, help="the .json file to write; an existing one is never overwritten")
    args = parser.parse_args(argv)
    out, problems, labels = pathlib.Path(args.out), [], collections.Counter()
    if out.exists() or out.suffix != ".json" or not out.parent.is_dir():
        problems.append(f"--out {out}: " + ("exists" if out.exists() else "expected a name that ends in .json, in a folder that exists"))
    if args.text and not re.search(FIELD, args.text):
        problems.append(f"--text {args.text!r}: no {{column}} in it")
    shares = [*(args.holdout or []), 0, 0][:2]
    if len(args.holdout or []) > 2 or not all(share >= 0 for share in shares) or not sum(shares) < 1 or args.holdout and not sum(shares):
        problems.append(f"--holdout {args.holdout}: expected one or two shares of 0 or more, together between 0 and 1")
    problems += [f"--holdout: a share for {split}, which has a file" for split, share in zip(SPLITS[1:], shares)
                 if share > 0 and getattr(args, split)]
    files = {split: getattr(args, split) for split in SPLITS if getattr(args, split)}
    splits = {split: to_records(files[split], args, labels, problems) if split in files else [] for split in SPLITS}
    if args.positive is not None and labels and not labels[args.positive]:
        problems.append(f"--positive {args.positive!r}: no target is that; there are {', '.join(map(repr, list(labels)[:10]))}")
    if not problems:
        for split, records in hold_out(splits["train"], shares).items():
            splits[split] = records if split == "train" else splits[split] + records
        notes = clean(splits)
        wanted = [split for split, share in zip(SPLITS, (1, *shares)) if share or split in files]
        problems += [f"{split}: no record is left ({notes[split]})" for split in wanted if not splits[split]]
    if problems:
        shown = problems[:40] + ([f"... and {len(problems) - 40} more problems"] if len(problems) > 40 else [])
        print(*shown, sep="\n", file=sys.stderr)
        return 2
    parts = [f'"{split}": [\n' + ",\n".join(json.dumps(r, ensure_ascii=False) for r in splits[split]) + "\n]" for split in wanted]
    with open(out, "x", encoding="utf-8") as file:
        file.write("{" + ",\n".join(parts) + "}\n")
    print(f"{out}: " + ", ".join(f"{len(splits[split])} {split}" for split in wanted))
    if args.positive is not None:
        print(f"target 1: {args.positive!r} ({labels.pop(args.positive)} lines); "
              "target 0: " + (", ".join(f"{label!r} ({n})" for label, n in labels.most_common()) or "none"))
    for split in wanted:
        lengths = sorted(len(record["input"]) for record in splits[split])
        marks = {f"{q:.0%}": lengths[round(q * (len(lengths) - 1))] for q in (0, 0.05, 0.5, 0.95, 1)}
        print(f"{split}: {notes[split]}; mean target {sum(r['target'] for r in splits[split]) / len(lengths):.4g}; "
              "characters " + " ".join(f"{name} {n}" for name, n in marks.items()))
    print(*splits["train"][:2], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
