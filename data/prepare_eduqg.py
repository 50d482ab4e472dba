"""Make task folders of question generation from textbook questions, for prepare_ni.py.

    python data/prepare_eduqg.py --eduqg qg_train_v0.json qg_valid_v0.json --out eduqg
    python data/prepare_ni.py --task_dir eduqg/tasks --out data/eduqg.json

EduQG (Hadifar et al. 2023) has chapters of books, in whose passages a sentence is marked. Three
tasks:

    Answer: nucleotides
    Passage: A gene is copied first. <hl> A frameshift mutation is ... of nucleotides. <hl> It ...
    -> qg       What is inserted or deleted in a frameshift mutation?
    -> options  proteins | carotenoids | genes       (its input begins with "Question: ...")
    -> qog      What is inserted ... mutation? Options: proteins | carotenoids | genes

splits/qg, options and qog list one of them each, splits/default all three. A book is whole in
train, dev or test; dev and test get about a tenth of the questions each.
"""

import argparse
import collections

import records  # first: it makes common.py importable

# isort: split
import common
from common import SPLITS, log

MAX_WORDS = 300  # of a passage
HELD_OUT = 0.1  # share of the questions for dev, and for test
LEAF = (
    "Leaves have small openings on their lower side. <hl> Through them a plant takes in carbon "
    "dioxide, from which it makes sugar in the light. <hl> Oxygen leaves the same way."
)
PRICE = (
    "Markets bring buyers and sellers together. <hl> If demand grows while supply stays as it is, "
    "the price rises until fewer people want to buy. <hl> In time, producers may offer more."
)

# group: the book
Item = collections.namedtuple("Item", "question answer wrong passage group", defaults=[""])
EXAMPLES = [
    Item(
        "Which gas do plants take from the air for photosynthesis?",
        "carbon dioxide",
        ["oxygen", "nitrogen", "hydrogen"],
        LEAF,
    ),
    Item(
        "What happens to a price when more people want a good whose supply stays the same?",
        "it rises",
        ["it falls", "it stays the same", "it becomes zero"],
        PRICE,
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
    """The input and output of one of the three tasks."""
    given = f"Answer: {item.answer}\nPassage: {item.passage}"
    options = " | ".join(item.wrong)
    if task == "qg":
        return {"input": given, "output": item.question}
    if task == "options":
        return {"input": f"Question: {item.question}\n{given}", "output": options}
    return {"input": given, "output": f"{item.question} Options: {options}"}


def around_marks(passage):
    """At most MAX_WORDS of a passage: the marked sentence and what stands around it."""
    before, marked, after = [part.split() for part in passage.split("<hl>")]
    room = max(0, MAX_WORDS - len(marked))
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


def split_groups(items):
    """{group: split} of those that are held out, the smallest ones: several of few books."""
    sizes = collections.Counter(item.group for item in items)
    groups = sorted(sizes, key=lambda group: (-sizes[group], -common.derive_seed(group)))
    splits = {}
    for split in ("eval", "test"):
        n = 0
        while groups and n < HELD_OUT * len(items):
            group = groups.pop()
            splits[group] = split
            n += sizes[group]
    return splits


def write_tasks(folder, splits):
    """eduqg_<task>_<side>.json of each task and split, and the lists of them."""
    (folder / "tasks").mkdir()
    lists = collections.defaultdict(str)
    for task, (category, definition) in TASKS.items():
        examples = [to_pair(task, item) for item in EXAMPLES]
        for split, items in splits.items():
            instances = []
            for i, item in enumerate(items):
                pair = to_pair(task, item)
                instances.append({"id": f"eduqg-{i}", **pair, "output": [pair["output"]]})
            about = {
                "Categories": [category],
                "Definition": [definition],
                "Positive Examples": examples,
                "Negative Examples": [],
                "Instances": instances,
            }
            side = "dev" if split == "eval" else split
            name = f"eduqg_{task}_{side}"
            common.write_json(folder / "tasks" / f"{name}.json", about)
            for kind in (task, "default"):
                lists[folder / "splits" / kind / f"{side}_tasks.txt"] += f"{name}\n"
    for path, names in lists.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(names)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", required=True, metavar="FOLDER", help="to write")
    parser.add_argument("--eduqg", required=True, nargs="+", metavar="FILE", help="chapters, .json")
    records.add_skip(parser)
    args = parser.parse_args(argv)
    problems = []
    found = []
    for path in args.eduqg:
        for _, items in records.convert(path, from_chapter, args, problems):
            found += items
    items = [item for item in found if item]
    log(f"{len(found)} questions, of which {len(found) - len(items)} lack a mark or a choice")
    split_of = split_groups(items)
    # scores take the first 100 instances of a test task: so they are of all books
    items.sort(key=lambda item: common.derive_seed(item.question, item.passage))
    splits = {split: [] for split in SPLITS}
    for item in items:
        splits[split_of.get(item.group, "train")].append(item)
    records.clean(splits, lambda item: [item.passage.replace("<hl>", "")])
    if not splits["train"]:
        problems.append(f"--out {args.out}: too few books to train on")
    with records.new_folder(args.out, problems) as folder:
        write_tasks(folder, splits)
    for split, found in splits.items():
        log(f"{args.out}: {len(found)} {split} questions")


if __name__ == "__main__":
    main()
