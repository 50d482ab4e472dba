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
import sys

import records  # first: it makes common.py importable

# isort: split
from tqdm import tqdm

import common
from common import SPLITS, log

LISTS = {"train": "train_tasks.txt", "eval": "dev_tasks.txt", "test": "test_tasks.txt"}
N_TEST = 100  # instances of a test task that count, the first ones, as published

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
    ("max_num_instances_per_task", 0, "of training, drawn by --seed; 0: all"),
    ("max_num_instances_per_eval_task", 500, "of the other splits, always the same ones; 0: all"),
    ("seed", 0, "of the training instances that are drawn"),
]
SWITCHES = [
    ("add_task_name", "begin a prompt with the name of the task"),
    ("no_task_definition", "leave the definition out"),
    ("add_explanation", "examples with their explanations"),
    ("tk_instruct", "five prompts for a training record; the flags above say the evaluation's"),
]

# ------------------------------------------------------------------------------------------ tasks


def list_tasks(args, problems):
    """{file of a task: split}"""
    task_dir = pathlib.Path(args.task_dir)
    split_dir = pathlib.Path(args.split_dir or task_dir.parent / "splits" / "default")
    tasks = {}
    for split, list_name in LISTS.items():
        path = split_dir / list_name
        text = path.read_text("utf-8-sig", errors="replace") if path.is_file() else ""
        for name in text.split():
            task = task_dir / f"{name}.json"
            if tasks.get(task, split) != split:
                problems.append(f"{path}: {name} is a task of {tasks[task]} already")
            tasks[task] = split
    if not tasks:
        problems.append(f"{split_dir}: no tasks in {', '.join(LISTS.values())}")
    return tasks


def choose_instances(args, split, task):
    """The instances of a task that count, in their order."""
    instances = task["Instances"]
    cap, seed = args.max_num_instances_per_task, args.seed
    if split != "train":  # always the same ones
        cap, seed = args.max_num_instances_per_eval_task, 0
    if split == "test":
        instances = instances[:N_TEST]
    if cap and cap < len(instances):
        chooser = random.Random(common.derive_seed(seed, "instances", task["Task"]))
        chosen = chooser.sample(range(len(instances)), cap)
        instances = [instances[i] for i in sorted(chosen)]
    return instances


# ---------------------------------------------------------------------------------------- prompts


def stopped(line):
    """With a full stop, unless ASCII punctuation ends the line."""
    return line if line[-1] in string.punctuation else f"{line}."


def first_text(value):
    """Of a text, or of a list whose first text counts."""
    return records.as_list(value)[0].strip()


class TkPrompt:
    """Tk-Instruct's prompts of a task: yizhongw/Tk-Instruct, src/ni_collator.py."""

    def __init__(self, task, encoding, with_name):
        self.name = f"{task['Task']}. " if with_name else ""
        self.definition = first_text(task["Definition"]) if encoding.definition else ""
        self.examples = []  # of each kind the texts
        for kind, n in (("Positive", encoding.n_positive), ("Negative", encoding.n_negative)):
            texts = []
            for number, example in enumerate(task[f"{kind} Examples"][:n], start=1):
                text = f" {kind} Example {number} -\n"
                text += stopped(f"Input: {example['input'].strip()}") + "\n"
                text += stopped(f" Output: {example['output'].strip()}") + "\n"
                if encoding.explanation and "explanation" in example:
                    text += stopped(f" Explanation: {example['explanation'].strip()}") + "\n"
                texts.append(text + "\n")
            self.examples.append(texts)

    def around(self, definition, examples, text):
        """The definition, if the prompt has one, the examples and the query."""
        if self.definition:
            definition = stopped(f"Definition: {definition}") + "\n\n"
        query = "Now complete the following example -\n"
        query += stopped(f"Input: {text.strip()}") + "\nOutput: "
        return definition + examples + query

    def fill(self, definition, examples, text):
        """The prompt, of an input text and examples, a list of each kind."""
        positive, negative = examples
        return self.name + self.around(definition, "".join(positive + negative), text)

    def fill_to_measure(self, definition, examples, example, text):
        """Of this Tk-Instruct counts the tokens before it takes one more example."""
        positive, negative = examples
        shown = " ".join(positive) + " ".join(negative) + example
        return self.around(definition, shown, text)


class FlanPrompt:
    """The prompts of a task that brings its own, with places for examples and input."""

    def __init__(self, task, n_shots):
        self.definition = first_text(task["Instruction Prompt"])
        if "{task_input}" not in self.definition:
            raise KeyError("{task_input}")
        texts = []
        for number, example in enumerate(task["Examplars"][:n_shots], start=1):
            text = stopped(f"({number}) {example['input'].strip()}") + "\n"
            texts.append(text + stopped(f" Output: {example['output'].strip()}") + "\n")
        self.examples = [texts]

    def fill(self, definition, examples, text):
        query = stopped(f"Now complete the following example \n{text.strip()}") + "\nOutput: "
        filling = {"{examplars}": "".join(examples[0]), "{task_input}": query}
        places = r"\{examplars\}|\{task_input\}"
        return re.sub(places, lambda place: filling[place[0]], definition)

    def fill_to_measure(self, definition, examples, example, text):
        return self.fill(definition, examples, text) + example


def longest_beginning(text, fits):
    """The longest text[:n] for which fits(text[:n]) holds, if it does for all shorter ones."""
    lengths = range(1, len(text) + 1)
    return text[: bisect.bisect_left(lengths, True, key=lambda n: not fits(text[:n]))]


def take_examples(prompt, text, max_length, count):
    """Lists of the examples that fit: as in Tk-Instruct, the first that does not ends its list."""
    taken = [[] for _ in prompt.examples]
    for examples, taken_of_kind in zip(prompt.examples, taken):
        for example in examples:
            measured = prompt.fill_to_measure(prompt.definition, taken, example, text)
            if count(measured) > max_length:
                break
            taken_of_kind.append(example)
    # the name of the task was not measured
    while any(taken) and count(prompt.fill(prompt.definition, taken, text)) > max_length:
        last_kind = taken[-1] or taken[0]
        last_kind.pop()
    return taken


def shorten(prompt, examples, text, max_length, count):
    """The prompt with less of its input, and of a definition that leaves too little room for it.
    The query stays, and Flan-style all but the input."""

    def fits(definition, text, limit=max_length):
        return count(prompt.fill(definition, examples, text)) <= limit

    definition = prompt.definition
    # the input may take half of the prompt
    limit = max_length - min(count(text) + 8, max_length // 2)
    if not fits(definition, "", limit) and isinstance(prompt, TkPrompt):
        definition = longest_beginning(definition, lambda part: fits(part, "", limit))
    text = longest_beginning(text.strip(), lambda part: fits(definition, part))
    return prompt.fill(definition, examples, text)


def fit(prompt, text, max_length, count):
    """(the prompt of an input text, of at most max_length tokens, [what it lost: "examples",
    "text"]). count: a function, text -> tokens."""
    n_examples = sum(map(len, prompt.examples))
    whole = prompt.fill(prompt.definition, prompt.examples, text)
    if count(whole) + n_examples <= max_length:  # and the blanks between examples, if measured
        return whole, []
    examples = take_examples(prompt, text, max_length, count)
    lost = ["examples"] if sum(map(len, examples)) < n_examples else []
    if count(prompt.fill(prompt.definition, examples, text)) <= max_length:
        return prompt.fill(prompt.definition, examples, text), lost
    return shorten(prompt, examples, text, max_length, count), [*lost, "text"]


def make_prompts(args, split, task):
    """The TkPrompts of a task, one or in training with --tk_instruct five, or its FlanPrompt."""
    if "Instruction Prompt" in task:
        return [FlanPrompt(task, args.num_shots)]
    if args.tk_instruct and split == "train":
        return [TkPrompt(task, encoding, with_name=False) for encoding in TK_INSTRUCT]
    counts = (args.num_pos_examples, args.num_neg_examples)
    encoding = Encoding(not args.no_task_definition, *counts, args.add_explanation)
    return [TkPrompt(task, encoding, args.add_task_name)]


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
            filled, lost = fit(prompt, text, args.max_source_length, count)
            prompts.append(filled)
            tally.update(["prompts", *lost])
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
                for text in [*records.as_list(record["prompt"]), *record["references"]]:
                    problem = common.text_problem(text, "output", record)
                    if problem:
                        problems.append((f"{path}, {record['id']}", problem))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            kind = type(error).__name__
            problems.append((path, f"{kind}: {error}; prepare_ni.py -h says what a task has"))
    for lost, what in (("examples", "examples"), ("text", "the end of their input or definition")):
        if tally[lost]:
            n_lost = f"{tally[lost]} of {tally['prompts']} prompts"
            log(f"WARNING {n_lost} lost {what} to --max_source_length {args.max_source_length}")
    return {split: found for split, found in splits.items() if found}


def parse_args(argv):
    parser = records.make_parser(__doc__)
    records.add_fractions(parser)
    add = parser.add_argument
    add("--task_dir", required=True, metavar="FOLDER", help="with a <task>.json for each task")
    add("--split_dir", metavar="FOLDER", help="default: splits/default beside --task_dir")
    for name, default, text in NUMBERS:
        add(f"--{name}", type=records.natural, default=default, metavar="N", help=text)
    for name, text in SWITCHES:
        add(f"--{name}", action="store_true", help=text)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    problems = []
    tokenizer = records.load_tokenizer(args.tokenizer, problems)
    if not args.tokenizer:
        log("no --tokenizer: prompts have all their examples, however long they are")
    tasks = list_tasks(args, problems)
    if problems:
        common.fail(problems)
    splits = convert(args, tasks, tokenizer, problems)
    if problems or not splits:
        common.fail(problems or f"--task_dir {args.task_dir}: no instances")
    records.write(args.out, splits)
    records.show(args.out, splits, tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
