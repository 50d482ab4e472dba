"""Make a data file for seq2seq.py, prompts and answers in T5's words, from the GLUE or SuperGLUE files that you have already.

    {"prompt": "sst2 sentence: a gem", "completion": "positive"}
    {"prompt": "stsb sentence1: A cat. sentence2: A dog.", "completion": "1.2", "references": ["1.25"]}

Expected, from parts of four sets; GLUE's dev set becomes "eval":
    python data/prepare_glue.py --task sst2 --data_dir SST-2 --out data/sst2.json   # 887 negative, 1113 positive; eval 209, 291
    python data/prepare_glue.py --task cola --data_dir CoLA --out data/cola.json    # 614 unacceptable, 1386 acceptable; eval 163, 359
    python data/prepare_glue.py --task rte --data_dir RTE --out data/rte.json       # 495 entailment, 505 not; eval 146, 131
    python data/prepare_glue.py --task stsb --data_dir STS-B --out data/stsb.json   # 1875, mean score 2.648; eval 500, 2.12

GLUE: cola sst2 mrpc stsb qqp mnli qnli rte wnli; SuperGLUE: boolq cb copa superglue_rte wic. Prompts: Raffel et al. 2020,
appendix D, https://arxiv.org/abs/1910.10683, columns in alphabetical order as in T5's code; STS-B's scores in steps of 0.2.
The last line says how seq2seq.py trains on it: the labels in the order of their integers, and the metrics. MNLI's second
validation set goes to <out>_mismatched. A quotation mark is text, white space around a text is not. Repeats stay, also
between splits.
"""

import argparse
import itertools
import json
import math
import pathlib
import re
import shlex
import sys

GLUE = {"train": "train.tsv", "eval": "dev.tsv"}
SUPERGLUE = {"train": "train.jsonl", "eval": "val.jsonl"}
ENTAILED = {"entailment": "entailment", "not_entailment": "not_entailment"}
FIELD = r"\{([^{}]+)\}"  # not str.format: column names may have dots, brackets and colons

# A new data set is a new entry. files: split -> file; a table has a header unless `columns` names its columns.
# text: the prompt around the columns. label: the column with the label. words: label in the file -> completion, in the order
# of the label integers (f1 counts the second), JSON's 1 and true as "1" and "true"; None = a score within `range`.
# metrics: the first is the one to optimise. more: name -> files of a data set of their own.
TASKS = {
    "cola": {"files": GLUE, "columns": ["source", "label", "mark", "sentence"], "text": "cola sentence: {sentence}", "label": "label",
             "words": {"0": "unacceptable", "1": "acceptable"}, "metrics": ["matthews", "accuracy"]},
    "sst2": {"files": GLUE, "text": "sst2 sentence: {sentence}", "label": "label", "words": {"0": "negative", "1": "positive"},
             "metrics": ["accuracy"]},
    "mrpc": {"files": GLUE, "text": "mrpc sentence1: {#1 String} sentence2: {#2 String}", "label": "Quality",
             "words": {"0": "not_equivalent", "1": "equivalent"}, "metrics": ["f1", "accuracy"]},
    "stsb": {"files": GLUE, "text": "stsb sentence1: {sentence1} sentence2: {sentence2}", "label": "score", "words": None,
             "range": [0, 5], "metrics": ["spearman", "pearson"]},
    "qqp": {"files": GLUE, "text": "qqp question1: {question1} question2: {question2}", "label": "is_duplicate",
            "words": {"0": "not_duplicate", "1": "duplicate"}, "metrics": ["accuracy", "f1"]},
    "mnli": {"files": {"train": "train.tsv", "eval": "dev_matched.tsv"}, "more": {"mismatched": {"eval": "dev_mismatched.tsv"}},
             "text": "mnli hypothesis: {sentence2} premise: {sentence1}", "label": "gold_label",
             "words": {word: word for word in ("entailment", "neutral", "contradiction")}, "metrics": ["accuracy"]},
    "qnli": {"files": GLUE, "text": "qnli question: {question} sentence: {sentence}", "label": "label", "words": ENTAILED, "metrics": ["accuracy"]},
    "rte": {"files": GLUE, "text": "rte sentence1: {sentence1} sentence2: {sentence2}", "label": "label", "words": ENTAILED, "metrics": ["accuracy"]},
    "wnli": {"files": GLUE, "text": "wnli sentence1: {sentence1} sentence2: {sentence2}", "label": "label",
             "words": {"0": "not_entailment", "1": "entailment"}, "metrics": ["accuracy"]},
    "boolq": {"files": SUPERGLUE, "text": "boolq passage: {passage} question: {question}", "label": "label",
              "words": {"false": "False", "true": "True"}, "metrics": ["accuracy"]},
    "cb": {"files": SUPERGLUE, "text": "cb hypothesis: {hypothesis} premise: {premise}", "label": "label",
           "words": {word: word for word in ("entailment", "contradiction", "neutral")}, "metrics": ["accuracy"]},
    "copa": {"files": SUPERGLUE, "text": "copa choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}",
             "label": "label", "words": {"0": "choice1", "1": "choice2"}, "metrics": ["accuracy"]},
    "superglue_rte": {"files": SUPERGLUE, "text": "rte hypothesis: {hypothesis} premise: {premise}", "label": "label",
                      "words": ENTAILED, "metrics": ["accuracy"]},
    "wic": {"files": SUPERGLUE, "text": "wic sentence1: {sentence1} sentence2: {sentence2} word: {word}", "label": "label",
            "words": {"false": "False", "true": "True"}, "metrics": ["accuracy"]},
}


def read_line(line, names):
    """One line -> {column: value}; names: the columns of a table, None for JSON. A ValueError says what is wrong with the line."""
    if names is None:
        if not line.lstrip().startswith("{"):
            raise ValueError(f"expected a JSON object, found {line[:40]}")
        row = json.loads(line)
    else:
        values = line.split("\t")
        if len(values) != len(names):
            raise ValueError(f"number of columns {len(values)}, expected {len(names)}")
        row = dict(zip(names, values))
    return {name: value.strip() if isinstance(value, str) else value for name, value in row.items()}


def to_example(row, task):
    """-> (prompt, number): a label's integer or a score. A ValueError says what is wrong with the row."""
    in_text = re.findall(FIELD, task["text"])
    for name in [*in_text, task["label"]]:
        if name not in row:
            raise ValueError(f"no key {name!r}; it has {', '.join(row)}")
        if name in in_text and (not isinstance(row[name], str) or not row[name]):
            raise ValueError(f"{name} {row[name]!r}, expected a text")
    prompt = re.sub(FIELD, lambda found: row[found[1]], task["text"])
    prompt.encode()  # a ValueError for half a surrogate pair, which JSON can escape and no UTF-8 file can hold
    label = row[task["label"]] if isinstance(row[task["label"]], str) else json.dumps(row[task["label"]])
    if task["words"]:
        if label not in task["words"]:
            raise ValueError(f"{task['label']} {label!r}, expected {' or '.join(task['words'])}")
        return prompt, list(task["words"]).index(label)
    score = float(label) if re.fullmatch(r"-?\d+(\.\d+)?", label) else math.nan
    if not task["range"][0] <= score <= task["range"][1]:
        raise ValueError(f"{task['label']} {label!r}, expected a number from {' to '.join(map(str, task['range']))}")
    return prompt, score


def read_examples(path, task, malformed, problems):
    """One file, a line at a time -> (prompt, number); what is wrong with single lines goes to `malformed`."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:  # a carriage return inside a line is text
            names = None
            if path.suffix != ".jsonl":
                names = task.get("columns") or [name.strip() for name in file.readline().split("\t")]
                wrong = [name for name in [*re.findall(FIELD, task["text"]), task["label"]] if names.count(name) != 1]
                problems += [f"{path}: {names.count(name) or 'no'} columns named {name!r}; it has {', '.join(names)}" for name in wrong]
                if wrong:
                    return
            for number, line in enumerate(file, 1 if names is None or "columns" in task else 2):
                if line := line.rstrip("\r\n"):
                    try:
                        yield to_example(read_line(line, names), task)
                    except ValueError as error:
                        malformed.append(f"line {number}: {error}")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: cannot be read ({error})")


def to_record(prompt, number, task, args):
    if args.clf:
        return {"input": prompt, "target": number}
    if task["words"]:
        return {"prompt": prompt, "completion": list(task["words"].values())[number]}
    per_unit = round(1 / (args.stsb_step or 0.2))  # T5 multiplies; 0.3 / 0.2 is a little below 1.5 and would be rounded down
    return {"prompt": prompt, "completion": f"{round(number * per_unit) / per_unit:.1f}", "references": [str(number)]}


def write(file, splits, as_lines):
    """splits: {split: records}; the records come one at a time, so that memory does not grow with them."""
    for i, (split, records) in enumerate(splits.items()):
        if as_lines:
            file.writelines(json.dumps({"split": split, **record}, ensure_ascii=False) + "\n" for record in records)
        else:
            file.write((",\n" if i else "{") + f'"{split}": [\n')
            file.writelines(",\n" * (j > 0) + json.dumps(record, ensure_ascii=False) for j, record in enumerate(records))
            file.write("\n]")
    file.write("" if as_lines else "}\n")


def train_command(task, outs):
    names = [path.stem if path.parent.name == "data" else str(path) for path in outs]
    best = task["metrics"][0] if len(names) == 1 else f"{names[0]}/{task['metrics'][0]}"
    labels = ["--labels", *task["words"].values()] if task["words"] else []
    return shlex.join(["python", "seq2seq.py", "--model_init_path", "google/t5-v1_1-base", "--data", *names, "--metrics", *task["metrics"],
                       *labels, "--metric_for_best", best, "--max_new_tokens", "8"])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--task", required=True, choices=list(TASKS))
    parser.add_argument("--data_dir", required=True, metavar="FOLDER", help="has train.tsv and dev.tsv, or train.jsonl and val.jsonl")
    parser.add_argument("--out", required=True, help="the .json or .jsonl file to write; an existing one is never overwritten")
    parser.add_argument("--clf", action="store_true", help='write {"input", "target"} for clf.py instead; tasks with two labels, and stsb')
    parser.add_argument("--stsb_step", type=float, choices=[0.2, 0.1], help="STS-B's scores are rounded to this, default 0.2 as in T5")
    parser.add_argument("--skip_malformed", action="store_true", help="drop and count lines with wrong columns, label or empty text")
    args = parser.parse_args(argv)
    task, out, folder, problems, notes = TASKS[args.task], pathlib.Path(args.out), pathlib.Path(args.data_dir), [], []
    outs = {out: task["files"], **{out.with_stem(f"{out.stem}_{name}"): files for name, files in task.get("more", {}).items()}}
    if out.suffix not in (".json", ".jsonl") or not out.parent.is_dir():
        problems.append(f"--out {out}: expected a name that ends in .json or .jsonl, in a folder that exists")
    problems += [f"--out {path}: exists" for path in outs if path.exists()]
    words = list((task["words"] or {}).values())
    if args.clf and len(words) > 2:
        problems.append(f"--clf: {args.task} has {len(words)} labels, clf.py tells two apart")
    if args.stsb_step and (words or args.clf):
        problems.append("--stsb_step: " + (f"{args.task} has no scores" if words else "--clf keeps the scores as they are"))
    sizes = {(path, split): [] for path, files in outs.items() for split in files}  # (characters, label or score) of each example
    for path, split in sizes:
        malformed, source = [], folder / outs[path][split]
        sizes[path, split] = new = [(len(prompt), number) for prompt, number in read_examples(source, task, malformed, problems)]
        dropped = f", {len(malformed)} malformed lines dropped" + "".join(f"; the first: {what}" for what in malformed[:1])
        notes.append(f"{source}: {len(new)} records" + dropped * args.skip_malformed)
        problems += [f"{source}, {what}" for what in malformed if not args.skip_malformed]
        if not new and not problems:
            problems.append(notes.pop())
    if problems:
        shown = problems[:40] + ([f"... and {len(problems) - 40} more problems"] if len(problems) > 40 else [])
        print(*shown, sep="\n", file=sys.stderr)
        return 2

    def records(name):  # from the file once more: it may be larger than memory
        return (to_record(*example, task, args) for example in read_examples(folder / name, task, [], []))

    for path, files in outs.items():
        with open(path, "x", encoding="utf-8") as file:
            write(file, {split: records(name) for split, name in files.items()}, out.suffix == ".jsonl")
        print(f"{path}: " + ", ".join(f"{len(sizes[path, split])} {split}" for split in files))
    unread = {path.name for path in folder.glob("test*.*")}.difference(*(files.values() for files in outs.values()))
    notes += [f"{folder / name}: not written (the test files of GLUE and SuperGLUE have no labels)" for name in sorted(unread)]
    print(*notes, sep="\n")
    for (path, split), found in sizes.items():
        lengths, numbers = zip(*sorted(found))
        counts = [f"{word} {numbers.count(i)}" for i, word in enumerate(words)] or [f"mean score {sum(numbers) / len(found):.4g}"]
        marks = [f"{q:.0%} {lengths[round(q * (len(lengths) - 1))]}" for q in (0, 0.05, 0.5, 0.95, 1)]
        print(f"{split if path == out else path}: {', '.join(counts)}; characters {' '.join(marks)}")
    print(*itertools.islice(records(task["files"]["train"]), 2), sep="\n")
    if not args.clf:
        print(train_command(task, outs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
