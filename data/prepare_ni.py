"""Turn task folders, as Super-NaturalInstructions has them, into records for seq2seq.py and
sft_causal.py: prompts as Tk-Instruct's, character by character.

    git clone https://github.com/allenai/natural-instructions
    python data/prepare_ni.py --task_dir natural-instructions/tasks --tk_instruct \\
        --num_pos_examples 2 --max_num_instances_per_task 100 --eval_fraction 0.01 \\
        --tokenizer google/t5-xl-lm-adapt --out data/ni.jsonl

    {"prompt": "Definition: Say how ...", "completion": "two", "references": ["two", "2"],
     "task": "task1_count", "categories": ["Counting"], "id": "task1-0"}

Beside the folder of <task>.json stands splits/default/ with train_tasks.txt, dev_tasks.txt (the
evaluation) and test_tasks.txt, a task a line; --split_dir names another one. A task file has
"Definition", "Positive Examples", "Negative Examples" and "Instances", or, Flan-style, "Instruction
Prompt" with places for {examplars} and {task_input}, "Examplars" and "Instances".

With --tokenizer a prompt has at most --max_source_length tokens: examples are taken as long as they
fit, then the input loses its end. docs/instructions.md shows the prompt.
"""

import bisect
import collections
import pathlib
import random
import re
import string

import records  # first: it makes common.py importable

# isort: split
from tqdm import tqdm

import common
from common import SPLITS, log

LISTS = {"train": "train_tasks.txt", "eval": "dev_tasks.txt", "test": "test_tasks.txt"}
N_TEST = 100  # instances of a test task that count, the first ones, as published
PLACES = ("{examplars}", "{task_input}")

# parts: texts, among them PLACES; examples: [text] of each kind; query: what the input follows
Prompt = collections.namedtuple("Prompt", "parts examples query")
# what a prompt shows before the input
Encoding = collections.namedtuple("Encoding", "definition n_positive n_negative explanation")
TK_INSTRUCT = [  # its training draws one of these for each instance (Wang et al. 2022)
    Encoding(True, 0, 0, False),
    Encoding(False, 2, 0, False),
    Encoding(True, 2, 0, False),
    Encoding(True, 2, 2, False),
    Encoding(True, 2, 0, True),
]

NUMBERS = [  # flags: name, default, help
    ("max_source_length", 1024, "tokens of a prompt, with --tokenizer"),
    ("num_pos_examples", 0, "positive examples in a prompt"),
    ("num_neg_examples", 0, "negative examples in a prompt"),
    ("num_shots", 0, "examples in the prompt of a Flan-style task"),
    ("max_num_instances_per_task", 0, "of training, drawn at random; 0: all"),
    ("max_num_instances_per_eval_task", 500, "of the other splits; 0: all"),
]
SWITCHES = [
    ("add_task_name", "begin prompts with the task's name"),
    ("no_task_definition", "leave the definition out"),
    ("add_explanation", "examples with their explanations"),
    ("tk_instruct", "five prompts a training record; the flags above say evaluation's"),
]

# ------------------------------------------------------------------------------------------ tasks


def list_tasks(args, problems):
    """{file of a task: split}"""
    task_dir = pathlib.Path(args.task_dir)
    split_dir = pathlib.Path(args.split_dir or task_dir.parent / "splits" / "default")
    tasks = {}
    for split, list_name in LISTS.items():
        path = split_dir / list_name
        text = path.read_text(errors="replace") if path.is_file() else ""
        for name in text.split():
            task = task_dir / f"{name}.json"
            if task in tasks:
                problems.append(f"{path}: {name} is a task of {tasks[task]} already")
            tasks[task] = split
    if not tasks:
        problems.append(f"{split_dir}: no tasks in {', '.join(LISTS.values())}")
    return tasks


def choose_instances(args, split, task):
    """The instances of a task that count, in their order."""
    instances = task["Instances"]
    cap = args.max_num_instances_per_eval_task
    if split == "train":
        cap = args.max_num_instances_per_task
    if split == "test":
        instances = instances[:N_TEST]
    if not 0 < cap < len(instances):
        return instances
    chooser = random.Random(common.derive_seed(0, "instances", task["Task"]))
    chosen = chooser.sample(range(len(instances)), cap)
    return [instances[i] for i in sorted(chosen)]


# ---------------------------------------------------------------------------------------- prompts


def line(text):
    """With a full stop, unless ASCII punctuation ends it."""
    return f"{text}\n" if text[-1] in string.punctuation else f"{text}.\n"


def first_text(value):
    """Of a text, or of a list whose first text counts."""
    return records.as_list(value)[0].strip()


def example_text(head, example):
    return line(head + example["input"].strip()) + line(f" Output: {example['output'].strip()}")


def tk_prompt(task, encoding, name=""):
    """A Prompt of Tk-Instruct: yizhongw/Tk-Instruct, src/ni_collator.py."""
    definition = ""
    if encoding.definition:
        definition = line(f"Definition: {first_text(task['Definition'])}") + "\n"
    examples = []
    for kind, n in (("Positive", encoding.n_positive), ("Negative", encoding.n_negative)):
        texts = []
        for number, example in enumerate(task[f"{kind} Examples"][:n], start=1):
            text = example_text(f" {kind} Example {number} -\nInput: ", example)
            if encoding.explanation and "explanation" in example:
                text += line(f" Explanation: {example['explanation'].strip()}")
            texts.append(f"{text}\n")
        examples.append(texts)
    query = "Now complete the following example -\nInput: "
    return Prompt([name, definition, *PLACES], examples, query)


def flan_prompt(task, n_shots):
    """The Prompt of a task that brings its own, with places for examples and input."""
    parts = re.split(f"({'|'.join(PLACES)})", first_text(task["Instruction Prompt"]))
    if PLACES[1] not in parts:
        raise KeyError(PLACES[1])
    texts = []
    for number, example in enumerate(task["Examplars"][:n_shots], start=1):
        texts.append(example_text(f"({number}) ", example))
    return Prompt(parts, [texts], "Now complete the following example \n")


def fill(prompt, examples, text):
    """The prompt with the text of its examples and an input text."""
    query = line(prompt.query + text.strip()) + "Output: "
    filling = dict(zip(PLACES, [examples, query]))
    return "".join(filling.get(part, part) for part in prompt.parts)


def fit(prompt, text, max_length, count):
    """(the prompt of an input text, of at most max_length tokens, whether the text lost its end).
    count: a function, text -> tokens."""
    every = sum(prompt.examples, [])
    whole = fill(prompt, "".join(every), text)
    if count(whole) + len(every) <= max_length:  # and the blanks between examples, if measured
        return whole, False
    taken = measured = ""  # Tk-Instruct counts the examples of a kind with blanks between them
    for examples in prompt.examples:
        of_kind = []
        for example in examples:
            shown = measured + " ".join(of_kind) + example
            if count(fill(prompt, shown, text)) > max_length:
                break
            of_kind.append(example)
        measured += " ".join(of_kind)
        taken += "".join(of_kind)

    def is_too_long(n):
        return count(fill(prompt, taken, text[:n])) > max_length

    if not is_too_long(len(text)):
        return fill(prompt, taken, text), False
    n = bisect.bisect_left(range(1, len(text) + 1), True, key=is_too_long)
    if is_too_long(n):
        raise ValueError(f"--max_source_length {max_length} leaves no room for the input")
    return fill(prompt, taken, text[:n]), True


def make_prompts(args, split, task):
    """The Prompts of a task: one, or in training with --tk_instruct five."""
    if "Instruction Prompt" in task:
        return [flan_prompt(task, args.num_shots)]
    if args.tk_instruct and split == "train":
        return [tk_prompt(task, encoding) for encoding in TK_INSTRUCT]
    counts = (args.num_pos_examples, args.num_neg_examples)
    encoding = Encoding(not args.no_task_definition, *counts, args.add_explanation)
    name = f"{task['Task']}. " if args.add_task_name else ""
    return [tk_prompt(task, encoding, name)]


# ---------------------------------------------------------------------------------------- records


def to_records(args, split_of_task, task, count, tally):
    """Yield (split, record) of a task. Of several prompts or completions, training draws one of
    each for every epoch."""
    about = first_text(task.get("Instruction Prompt") or task["Definition"])
    prompts_of = {split: make_prompts(args, split, task) for split in SPLITS}
    for instance in choose_instances(args, split_of_task, task):
        text = instance["input"]
        split = records.hold_out(args, split_of_task, f"{about}\n{text}")
        prompts = []
        for prompt in prompts_of[split]:
            filled, is_cut = fit(prompt, text.strip(), args.max_source_length, count)
            prompts.append(filled)
            tally[is_cut] += 1
        references = records.as_list(instance["output"])
        record = {
            "prompt": prompts if len(prompts) > 1 else prompts[0],
            "completion": references if len(references) > 1 else references[0],
            "references": references,
            "task": task["Task"],
            "categories": records.as_list(task.get("Categories", [])),
            "id": instance.get("id"),
        }
        yield split, record


def convert(args, tasks, tokenizer, problems):
    """{split: [record]} of {file of a task: split}"""
    splits = {split: [] for split in SPLITS}
    tally = collections.Counter()

    def count(text):
        return len(tokenizer(text, verbose=False).input_ids) if tokenizer else 0

    for path, split_of_task in tqdm(tasks.items(), unit=" tasks", delay=5):
        task = records.load_json(path, problems)
        try:
            task["Task"] = path.stem
            for split, record in to_records(args, split_of_task, task, count, tally):
                splits[split].append(record)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            kind = type(error).__name__
            problems.append((path, f"{kind}: {error}; prepare_ni.py -h says what a task has"))
    if tally[True]:
        n_cut = f"{tally[True]} of {tally.total()} prompts"
        log(f"WARNING {n_cut} lost the end of their input to --max_source_length")
    return splits


def main(argv=None):
    parser = records.make_parser(__doc__)
    records.add_fractions(parser)
    add = parser.add_argument
    add("--task_dir", required=True, metavar="FOLDER", help="with a <task>.json for each task")
    add("--tokenizer", metavar="MODEL", help="folder or hub id, to cut prompts")
    add("--split_dir", metavar="FOLDER", help="default: splits/default beside --task_dir")
    for name, default, text in NUMBERS:
        add(f"--{name}", type=records.natural, default=default, metavar="N", help=text)
    for name, text in SWITCHES:
        add(f"--{name}", action="store_true", help=text)
    args = parser.parse_args(argv)
    problems = []
    tokenizer = args.tokenizer and records.load_tokenizer(args.tokenizer, problems)
    tasks = list_tasks(args, problems)
    if problems:
        common.fail(problems)
    records.finish(args, convert(args, tasks, tokenizer, problems), problems)


if __name__ == "__main__":
    main()
