"""Make a data file for seq2seq.py from the GLUE or SuperGLUE files that you have already.

    python data/prepare_glue.py --task sst2 --data_dir SST-2 --out data/sst2.json

    {"prompt": "sst2 sentence: a gem", "completion": "positive"}
    {"prompt": "stsb sentence1: Up. sentence2: Down.", "completion": "1.2", "references": ["1.25"]}

The words are those of T5 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683, appendix D), the
columns in alphabetical order as in its code, STS-B's scores in steps of 0.2. GLUE's dev set becomes
"eval"; the public test sets have no labels. White space around a text goes, repeats stay. The last
line that is shown says how seq2seq.py trains on the file.
"""

import collections
import functools
import pathlib
import re

import records  # first: it makes common.py importable

# isort: split
from common import log
from prepare_table import fill, look_up, to_text

GLUE = {"train": "train.tsv", "eval": "dev.tsv"}
SUPERGLUE = {"train": "train.jsonl", "eval": "val.jsonl"}
ENTAILED = {name: name for name in ("entailment", "not_entailment")}
INFERENCE = {name: name for name in ("entailment", "neutral", "contradiction")}
COMMITMENT = {name: name for name in ("entailment", "contradiction", "neutral")}
TRUTH = {"false": "False", "true": "True"}
PAIR = "sentence1: {sentence1} sentence2: {sentence2}"
MNLI = "mnli hypothesis: {sentence2} premise: {sentence1}"
COPA = "copa choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}"

# prompt: with {columns}. answers: {label: completion} in the order of the label integers, the
# metric f1 is that of the second; {}: a score. label: its column. metrics: the first chooses the
# checkpoint. columns: of a table whose first row does not name them.
Task = collections.namedtuple(
    "Task",
    "prompt answers label metrics files columns",
    defaults=["label", ["accuracy"], GLUE, None],
)
TASKS = {
    "cola": Task(
        "cola sentence: {sentence}",
        {"0": "unacceptable", "1": "acceptable"},
        metrics=["matthews", "accuracy"],
        columns=["source", "label", "mark", "sentence"],
    ),
    "sst2": Task("sst2 sentence: {sentence}", {"0": "negative", "1": "positive"}),
    "mrpc": Task(
        "mrpc sentence1: {#1 String} sentence2: {#2 String}",
        {"0": "not_equivalent", "1": "equivalent"},
        label="Quality",
        metrics=["f1", "accuracy"],
    ),
    "stsb": Task(f"stsb {PAIR}", {}, "score", ["spearman", "pearson"]),
    "qqp": Task(
        "qqp question1: {question1} question2: {question2}",
        {"0": "not_duplicate", "1": "duplicate"},
        label="is_duplicate",
        metrics=["accuracy", "f1"],
    ),
    "mnli": Task(MNLI, INFERENCE, "gold_label", files={**GLUE, "eval": "dev_matched.tsv"}),
    "mnli_mismatched": Task(MNLI, INFERENCE, "gold_label", files={"eval": "dev_mismatched.tsv"}),
    "qnli": Task("qnli question: {question} sentence: {sentence}", ENTAILED),
    "rte": Task(f"rte {PAIR}", ENTAILED),
    "wnli": Task(f"wnli {PAIR}", {"0": "not_entailment", "1": "entailment"}),
    "boolq": Task("boolq passage: {passage} question: {question}", TRUTH, files=SUPERGLUE),
    "cb": Task("cb hypothesis: {hypothesis} premise: {premise}", COMMITMENT, files=SUPERGLUE),
    "copa": Task(COPA, {"0": "choice1", "1": "choice2"}, files=SUPERGLUE),
    "superglue_rte": Task(
        "rte hypothesis: {hypothesis} premise: {premise}", ENTAILED, files=SUPERGLUE
    ),
    "wic": Task(f"wic {PAIR} word: {{word}}", TRUTH, files=SUPERGLUE),
}


def to_record(row, task):
    """The record of a row. A ValueError says what is wrong with the row."""
    prompt = fill(task.prompt, row)
    label = to_text(look_up(row, task.label), task.label)
    if task.answers:
        if label not in task.answers:
            raise ValueError(f"{task.label} {label!r}, expected {' or '.join(task.answers)}")
        return {"prompt": prompt, "completion": task.answers[label]}
    if not re.fullmatch(r"[0-5](\.[0-9]+)?", label) or float(label) > 5:
        raise ValueError(f"{task.label} {label!r}, expected a score from 0 to 5")
    # 1 / 0.2 = 5: T5 multiplies too, and rounds 2.5 to the even 2
    completion = f"{round(float(label) * 5) / 5:.1f}"
    return {"prompt": prompt, "completion": completion, "references": [label]}


def train_command(task, out):
    command = f"python seq2seq.py --model_init_path google/t5-v1_1-base --data {out}"
    command += f" --metrics {' '.join(task.metrics)} --metric_for_best {task.metrics[0]}"
    if task.answers:
        command += f" --labels {' '.join(task.answers.values())}"
    return f"{command} --max_new_tokens 8"


def main(argv=None):
    parser = records.make_parser(__doc__)
    records.add_skip(parser)
    add = parser.add_argument
    add("--task", required=True, choices=list(TASKS))
    add("--data_dir", required=True, metavar="FOLDER", help="with train.tsv or train.jsonl, ...")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    problems = []
    use = functools.partial(to_record, task=task)
    splits = {}
    for split, name in task.files.items():
        path = pathlib.Path(args.data_dir, name)
        rows = records.convert(path, use, args, problems, task.columns)
        splits[split] = [record for _, record in rows]
        if not rows:
            problems.append(f"{path}: no records")
    records.finish(args, splits, problems)
    if "train" in splits:
        log(train_command(task, args.out))


if __name__ == "__main__":
    main()
