"""Make task folders of question generation from textbook questions, for prepare_ni.py.

    python data/prepare_eduqg.py --eduqg qg_train_v0.json qg_valid_v0.json --out eduqg
    python data/prepare_eduqg.py --sciq SciQ_valid.csv --out sciq
    python data/prepare_ni.py --task_dir eduqg/tasks --out data/eduqg.json

EduQG (Hadifar et al. 2023) has chapters of books, in whose passages a sentence is marked. SciQ has
a passage for each question; marked is the first sentence that has the answer. Three tasks:

    Answer: nucleotides
    Passage: A gene is copied first. <hl> A frameshift mutation is ... of nucleotides. <hl> It ...
    -> qg       What is inserted or deleted in a frameshift mutation?
    -> options  proteins | carotenoids | genes       (its input begins with "Question: ...")
    -> qog      What is inserted ... mutation? Options: proteins | carotenoids | genes

splits/qg, options and qog list one of them each, splits/default all three. A book, of SciQ a
passage, is whole in train, dev or test.
"""

import argparse
import collections
import pathlib
import re
import sys

import records  # first: it makes common.py importable

# isort: split
import common
from common import SPLITS, log

MAX_WORDS = 300  # of a passage
LEAF = (
    "Leaves have small openings on their lower side. <hl> Through them a plant takes in carbon "
    "dioxide, from which it makes sugar in the light. <hl> Oxygen leaves the same way."
)
PRICE = (
    "Markets bring buyers and sellers together. <hl> If demand grows while supply stays as it is, "
    "the price rises until fewer people want to buy. <hl> In time, producers may offer more."
)

# group: the book or passage; why: of an example in the prompt
Item = collections.namedtuple("Item", "question answer wrong passage group why", defaults=["", ""])
EXAMPLES = [
    Item(
        "Which gas do plants take from the air for photosynthesis?",
        "carbon dioxide",
        ["oxygen", "nitrogen", "hydrogen"],
        LEAF,
        why="The marked sentence says what the plant takes in.",
    ),
    Item(
        "What happens to a price when more people want a good whose supply stays the same?",
        "it rises",
        ["it falls", "it stays the same", "it becomes zero"],
        PRICE,
        why="The marked sentence names the condition and its effect.",
    ),
]
TASKS = {  # category and definition
    "qg": (
        "Question Generation",
        "You need to read the given passage from a chapter of a textbook and construct an "
        "educational question whose answer is the provided answer. The question needs to be "
        "answerable from the passage.",
    ),
    "options": (
        "Options Generation",
        "You need to read the given passage from a chapter of a textbook, a question about it and "
        "its correct answer, and write wrong answer choices that a student could take for right, "
        "separated by |.",
    ),
    # as published, with its double "and"
    "qog": (
        "Question and Options Generation",
        "You need to read the given passage from a chapter of a textbook and and construct a "
        "multi-choices educational question based on a provided answer about information in the "
        "passage. The question needs to be answerable from the passage and also include possible "
        "answer choices.",
    ),
}


def to_pair(task, item):
    """(input, output) of one of the three tasks."""
    given = f"Answer: {item.answer}\nPassage: {item.passage}"
    options = " | ".join(item.wrong)
    if task == "qg":
        return given, item.question
    if task == "options":
        return f"Question: {item.question}\n{given}", options
    return given, f"{item.question} Options: {options}"


def sentences(text):
    """Of running text: a sentence ends before a capital, a digit or a quotation mark."""
    abbreviation = r"(?<!\b[A-Z]\.)(?<!\b[A-Z][a-z]\.)(?<!e\.g\.)(?<!i\.e\.)"
    return re.split(rf"(?<=[.!?]){abbreviation}\s+(?=[\"'(A-Z0-9])", " ".join(text.split()))


def around_marks(passage, max_words=MAX_WORDS):
    """At most so many words of a passage: the marked sentence and what stands around it."""
    before, marked, after = [part.split() for part in passage.split("<hl>")]
    room = max(0, max_words - len(marked))
    n_before = min(len(before), max(room // 2, room - len(after)))
    before = before[len(before) - n_before :]
    after = after[: room - n_before]
    return " ".join([*before, "<hl>", *marked, "<hl>", *after])


def make_item(group, question, answer, wrong, passage):
    """The Item, or None if it cannot be used."""
    question, *choices = [text.strip() for text in [question, answer, *wrong]]
    if passage.count("<hl>") != 2 or not question or not all(choices) or len(choices) < 2:
        return None
    return Item(question, choices[0], choices[1:], around_marks(passage), group)


def from_chapter(chapter):
    """[Item or None] of a chapter of a book."""
    items = []
    for entry in chapter["questions"]:
        question = entry["question"]
        text = question.get("normal_format") or question["question_text"]
        wrong = list(question["question_choices"])
        answer = wrong.pop(entry["answer"]["ans_choice"])
        passage = " ".join(records.as_list(entry["hl_context"] or ""))
        items.append(make_item(chapter["bname"], text, answer, wrong, passage))
    return items


def from_sciq(row):
    """[Item or None] of a row."""
    answer, passage = row["correct_answer"].strip(), row["support"]
    parts = sentences(passage)
    for i, part in enumerate(parts):
        if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", part, re.IGNORECASE):
            parts[i] = f"<hl> {part} <hl>"
            break
    wrong = [row[f"distractor{i}"] for i in (1, 2, 3)]
    return [make_item(passage, row["question"], answer, wrong, " ".join(parts))]


def split_groups(args, items):
    """{group: split}. The smallest groups are held out: several of few books."""
    sizes = collections.Counter(item.group for item in items)
    wanted = {"eval": args.eval_fraction * len(items), "test": args.test_fraction * len(items)}
    splits = {}
    for group in sorted(sizes, key=lambda group: (sizes[group], common.derive_seed(group))):
        splits[group] = "train"
        for split, n in wanted.items():
            if n > 0:
                splits[group] = split
                wanted[split] -= sizes[group]
                break
    return splits


def write_tasks(folder, name, splits):
    """<name>_<task>_<side>.json of each task and split, and the lists of them."""
    (folder / "tasks").mkdir(parents=True)
    for task, (category, definition) in TASKS.items():
        examples = []
        for item in EXAMPLES:
            given, output = to_pair(task, item)
            examples.append({"input": given, "output": output, "explanation": item.why})
        for split, items in splits.items():
            side = "dev" if split == "eval" else split
            instances = []
            for i, item in enumerate(items):
                given, output = to_pair(task, item)
                instances.append({"id": f"{name}-{i}", "input": given, "output": [output]})
            about = {
                "Categories": [category],
                "Definition": [definition],
                "Positive Examples": examples,
                "Negative Examples": [],
                "Instances": instances,
            }
            common.write_json(folder / "tasks" / f"{name}_{task}_{side}.json", about)
            for kind in (task, "default"):
                path = folder / "splits" / kind / f"{side}_tasks.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "a") as file:
                    file.write(f"{name}_{task}_{side}\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", required=True, metavar="FOLDER", help="to write")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--eduqg", nargs="+", metavar="FILE", help="chapters, .json")
    source.add_argument("--sciq", nargs="+", metavar="FILE", help="a row a question, .csv, .json")
    records.add_fractions(parser)
    records.add_skip(parser)
    parser.set_defaults(eval_fraction=0.1, test_fraction=0.1)
    args = parser.parse_args(argv)
    out = pathlib.Path(args.out)
    problems = []
    if out.exists():
        problems.append(f"--out {out}: exists")
    rows = []
    to_items = from_chapter if args.eduqg else from_sciq
    for path in args.eduqg or args.sciq:
        rows += records.convert(path, to_items, args, problems)
    found = [item for _, items in rows for item in items]
    items = [item for item in found if item]
    log(f"{len(found)} questions, of which {len(found) - len(items)} lack a mark or a choice")
    split_of = split_groups(args, items)
    # scores take the first 100 instances of a test task: so they are of all books
    items.sort(key=lambda item: common.derive_seed(item.question, item.passage))
    splits = {split: [] for split in SPLITS}
    for item in items:
        splits[split_of[item.group]].append(item)
    records.clean(splits, lambda item: [item.passage.replace("<hl>", "")])
    if problems or not splits["train"]:
        common.fail(problems or f"--out {out}: too few books or passages: none is left to train on")
    splits = {split: found for split, found in splits.items() if found}
    write_tasks(out, "eduqg" if args.eduqg else "sciq", splits)
    for split, found in splits.items():
        log(f"{out}: {len(found)} {split} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
