"""Make instruction tasks of question generation, in the layout of Super-NaturalInstructions, from textbook questions that you have as files.

EduQG (Hadifar et al. 2023; the two files of hadifar/question-generation), whole books on one side of the split:
    python data/prepare_eduqg.py --eduqg qg_train_v0.json qg_valid_v0.json --out data/eduqg
SciQ, every passage on one side. Expected for its validation part, 1000 rows: 113 without a passage and 77 whose answer is not in it are
left out; 648 train, 81 dev, 81 test of each task.
    python data/prepare_eduqg.py --sciq SciQ_valid.csv --out data/sciq
data/prepare_ni.py makes records for seq2seq.py of these folders (@presets/qg, @presets/qog-def-pos).
Prompts to ask a trained model about a book of your own, which is plain text:
    python data/prepare_eduqg.py --text book.txt --out data/book.jsonl

Tasks, one file each for train, dev and test: qg, passage and answer to question; options, question, passage and answer to the wrong
options; qog, passage and answer to question and wrong options at once. splits/qg, options and qog list one task, splits/default all three,
the mixture that the earlier system found best. An instance:
    Answer: nucleotides
    Passage: A gene is copied first. <hl> A frameshift mutation is a deletion or insertion of nucleotides. <hl> It changes ...
    -> qg       What is inserted or deleted in a frameshift mutation?
    -> options  proteins | carotenoids | genes            (in the file's order; its input begins with "Question: ...")
    -> qog      What is inserted or deleted in a frameshift mutation? Options: proteins | carotenoids | genes
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import re
import string
import sys

import records_v1 as records

SEPARATOR = " | "
EXAMPLES = [  # (question, answer, wrong options, passage, why)
    ("Which gas do plants take from the air for photosynthesis?", "carbon dioxide", ["oxygen", "nitrogen", "hydrogen"],
     "Leaves have small openings on their lower side. <hl> Through them a plant takes in carbon dioxide, from which it makes sugar in the light. <hl> "
     "Oxygen leaves the same way.", "the marked sentence says what the plant takes in"),
    ("What happens to a price when more people want a good whose supply stays the same?", "it rises", ["it falls", "it stays the same", "it becomes zero"],
     "Markets bring buyers and sellers together. <hl> If demand grows while supply stays as it is, the price rises until fewer people want to buy. <hl> "
     "In time, producers may offer more.", "the marked sentence names the condition and its effect"),
]
BAD_EXAMPLES = [  # (question, answer, wrong options, passage, why not)
    ("What colour is the sky?", "carbon dioxide", ["carbon dioxide", "blue", "the leaf"], EXAMPLES[0][3],
     "the answer does not answer the question, and an option repeats the answer"),
    ("It rises?", "it rises", ["perhaps", "it rises quickly", "yes"], EXAMPLES[1][3], "nobody could answer this without the passage, and the options are no rivals"),
]
# qog: the earlier system's words, with their double "and"
TASKS = {
    "qg": ("Question Generation", "You need to read the given passage from a chapter of a textbook and construct an educational question whose answer is the "
           "provided answer. The question needs to be answerable from the passage."),
    "options": ("Options Generation", "You need to read the given passage from a chapter of a textbook, a question about it and its correct answer, and write "
                "wrong answer choices that a student could take for right, separated by |."),
    "qog": ("Question and Options Generation", "You need to read the given passage from a chapter of a textbook and and construct a multi-choices educational question based on a "
            "provided answer about information in the passage. The question needs to be answerable from the passage and also include possible answer choices."),
}


def to_pair(task, question, answer, wrong, passage):
    """(input, output) of one of the three tasks."""
    given = f"Answer: {answer}\nPassage: {passage}"
    options = SEPARATOR.join(wrong)
    return {"qg": (given, question), "options": (f"Question: {question}\n{given}", options), "qog": (given, f"{question} Options: {options}")}[task]


def around_marks(passage, max_words):
    """At most so many words of the passage: the marked sentence and what stands around it. 0 = all."""
    before, marked, after = passage.split("<hl>")
    before, after, room = before.split(), after.split(), max(0, max_words - len(marked.split()))
    if max_words and len(before) + len(after) > room:
        n_before = min(len(before), max(room // 2, room - len(after)))
        before, after = before[len(before) - n_before:], after[: room - n_before]
    return " ".join([*before, "<hl>", *marked.split(), "<hl>", *after])


def sentences(text):
    """Sentences of running text: split behind . ! ? with a capital, a digit or a quotation mark next."""
    text = " ".join(text.split())
    return [part for part in re.split(r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b[A-Z][a-z]\.)(?<!e\.g\.)(?<!i\.e\.)\s+(?=[\"'(A-Z0-9])", text) if part]


def read_eduqg(path, problems, skipped):
    """Yield (group, question, answer, wrong options, passage) of the chapters of a file; group: the book."""
    try:
        chapters = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path}: cannot be read ({error}); expected a JSON list of chapters")
        return
    if not isinstance(chapters, list):
        problems.append(f"{path}: a {type(chapters).__name__}, expected a list of chapters")
        return
    for i, chapter in enumerate(chapters):
        where = f"{path}, [{i}]"
        if not isinstance(chapter, dict) or not isinstance(chapter.get("questions"), list) or not isinstance(chapter.get("bname"), str):
            problems.append(f"{where}: expected an object with 'bname' (the book) and a list 'questions'")
            continue
        for k, item in enumerate(chapter["questions"]):
            try:
                question, at, context = item["question"], item["answer"]["ans_choice"], item["hl_context"]
                choices = question["question_choices"]
                text = (question.get("normal_format") or question["question_text"]).strip()
                if not isinstance(at, int) or not 0 <= at < len(choices) or not all(isinstance(choice, str) for choice in choices):
                    raise ValueError(f"answer {at!r} of the choices {choices!r}")
                context = " ".join(context) if isinstance(context, list) else context or ""
                if context.count("<hl>") != 2:
                    skipped["without one marked sentence"] += 1
                    continue
                choices = [choice.strip() for choice in choices]
                wrong = [choice for n, choice in enumerate(choices) if n != at]
                if not text or not wrong or not all(choices) or choices[at] in wrong:
                    skipped["without a question, an answer or other options"] += 1
                else:
                    yield chapter["bname"], text, choices[at], wrong, context
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                problems.append(f"{where}, questions[{k}]: {type(error).__name__}: {error}; expected 'question' (normal_format or question_text, "
                                "question_choices), 'answer' (ans_choice, from 0) and 'hl_context'")


def read_sciq(path, problems, skipped):
    """The same of a SciQ table; group: the passage."""
    names = ("question", "correct_answer", "distractor1", "distractor2", "distractor3", "support")
    for where, row in records.read(path, problems):
        if missing := [name for name in names if not isinstance(row.get(name), str)]:
            problems.append(f"{where}: no {', '.join(missing)}")
            continue
        question, answer, *wrong, support = (row[name].strip() for name in names)
        parts = sentences(support)
        at = next((i for i, part in enumerate(parts) if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", part, re.IGNORECASE)), None) if answer else None
        if "<hl>" in support:
            skipped["with <hl> in its passage"] += 1
        elif not support or at is None:
            skipped["whose passage has not the answer" if support else "without a passage"] += 1
        elif not question or not all(wrong):
            problems.append(f"{where}: the question or an option is empty")
        else:
            yield support, question, answer, wrong, " ".join([*parts[:at], f"<hl> {parts[at]} <hl>", *parts[at + 1:]])


def split_groups(sizes, shares):
    """{group: instances} -> {group: "train" | "dev" | "test"}: in the order of a hash, each group goes to the emptier of test and dev, unless
    it would be over its share by more than half of the group. shares: {"dev": 0.1, "test": 0.1}."""
    total, found, filled = sum(sizes.values()), {}, collections.Counter()
    for group in sorted(sizes, key=lambda group: hashlib.sha256(group.encode()).digest()):
        open_sides = [side for side in ("test", "dev") if shares[side] and filled[side] + sizes[group] / 2 < max(1, shares[side] * total)]
        found[group] = min(open_sides, key=lambda side: filled[side] / shares[side], default="train")
        filled[found[group]] += sizes[group]
    return found


def task_object(task, instances, source):
    category, definition = TASKS[task]

    def shown(example):
        given, output = to_pair(task, *example[:4])
        return {"input": given, "output": output, "explanation": example[4][0].upper() + example[4][1:] + "."}

    return {"Contributors": [], "Source": [source], "URL": [], "Categories": [category], "Reasoning": [], "Definition": [definition],
            "Input_language": ["English"], "Output_language": ["English"], "Instruction_language": ["English"], "Domains": ["Education"],
            "Positive Examples": [shown(example) for example in EXAMPLES], "Negative Examples": [shown(example) for example in BAD_EXAMPLES],
            "Instances": instances, "Instance License": ["of the source"]}


def book_prompts(path, max_words, problems):
    """Prompts of qg for every sentence of a plain text that says something: 8 to 40 words that end with a full stop; the answer is the sentence."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: cannot be read ({error}); expected plain text in UTF-8")
        return []
    found = []
    for n, block in enumerate(re.split(r"\n\s*\n", text), 1):
        parts = sentences(block)
        for i, part in enumerate(parts):
            if 8 <= len(part.split()) <= 40 and part.endswith(".") and "<hl>" not in block:
                passage = around_marks(" ".join([*parts[:i], f"<hl> {part} <hl>", *parts[i + 1:]]), max_words)
                given, _ = to_pair("qg", "", part, [], passage)
                # as prepare_ni.py writes it, with the definition alone
                prompt = f"Definition: {TASKS['qg'][1]}\n\nNow complete the following example -\nInput: {given}"
                found.append({"prompt": f"{prompt}{'' if given[-1] in string.punctuation else '.'}\nOutput: ", "paragraph": n, "answer": part})
    if not found:
        problems.append(f"{path}: no sentence of 8 to 40 words that ends with a full stop")
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--eduqg", nargs="+", metavar="FILE", help="chapters of EduQG, .json")
    source.add_argument("--sciq", nargs="+", metavar="FILE", help="SciQ, .csv or .json")
    source.add_argument("--text", metavar="FILE", help="plain text of a book")
    parser.add_argument("--out", required=True, help="the folder to write, with --text the .jsonl file; never overwritten")
    parser.add_argument("--dev_share", type=float, default=0.1, help="of the instances, in whole books or passages [0-1]")
    parser.add_argument("--test_share", type=float, default=0.1, help="of the instances, in whole books or passages [0-1]")
    parser.add_argument("--max_words", type=int, default=300, help="of a passage, around its marked sentence [words], 0 = all")
    records.add_tokenizer(parser)
    args = parser.parse_args(argv)
    problems, skipped, out = [], collections.Counter(), pathlib.Path(args.out)
    shares = {"dev": args.dev_share, "test": args.test_share}
    aside = out.with_name(out.name + ".tmp")  # a kill leaves no half of it under its name
    if args.text:
        records.check_out(out, problems)
        problems += [f"--{name} has no effect with --text" for name in ("dev_share", "test_share") if getattr(args, name) != 0.1]
    elif aside.exists():
        problems.append(f"{aside}: exists, perhaps from a run that was killed; delete or move it")
    elif out.exists() or not out.parent.is_dir():
        problems.append(f"--out {out}: " + ("exists; move it away or choose another name" if out.exists() else "expected a new folder in one that exists"))
    if not all(share >= 0 for share in shares.values()) or not sum(shares.values()) < 1:
        problems.append(f"--dev_share {args.dev_share} --test_share {args.test_share}: expected 0 or more, below 1 together")
    if args.max_words < 0:
        problems.append(f"--max_words {args.max_words}: expected 0 (all) or more")
    count = records.token_counter(args.tokenizer, problems)
    if args.text:
        prompts = book_prompts(args.text, args.max_words, problems)
        if problems:
            return records.stop(problems)
        records.write(out, {"train": prompts})
        records.show(out, {"train": prompts}, {"prompt": lambda r: r["prompt"]}, count, args.tokenizer)
        return 0
    read = read_eduqg if args.eduqg else read_sciq
    rows = [row for path in args.eduqg or args.sciq for row in read(path, problems, skipped)]
    repeats = len(rows) - len(rows := list({(row[1], row[2], row[4]): row for row in rows}.values()))
    side_of = split_groups(collections.Counter(row[0] for row in rows), shares)
    rows.sort(key=lambda row: hashlib.sha256("\n".join((row[1], row[4])).encode()).digest())  # of a test task the first 100 count: of all books
    splits = {side: [row for row in rows if side_of[row[0]] == side] for side in ("train", "dev", "test") if side == "train" or shares[side]}
    problems += [f"{side}: no instance is left; {len(side_of)} books or passages are too few for these shares" for side, part in splits.items() if not part and not problems]
    if problems:
        return records.stop(problems)
    name = "eduqg" if args.eduqg else "sciq"
    shown = {}
    (aside / "tasks").mkdir(parents=True)
    for kind in (*TASKS, "default"):
        (aside / "splits" / kind).mkdir(parents=True)
        for side in splits:
            names = [f"{name}_{task}_{side}" for task in (TASKS if kind == "default" else [kind])]
            (aside / "splits" / kind / f"{side}_tasks.txt").write_text("\n".join(names) + "\n")
    for task in TASKS:
        for side, part in splits.items():
            instances = [{"id": f"{name}-{task}-{side}-{i}", "input": given, "output": [output]} for i, (given, output) in enumerate(
                to_pair(task, *row[1:4], around_marks(row[4], args.max_words)) for row in part)]
            shown[f"{task} {side}"] = instances
            (aside / "tasks" / f"{name}_{task}_{side}.json").write_text(json.dumps(task_object(task, instances, name), ensure_ascii=False, indent=1), "utf-8")
    os.rename(aside, out)
    print("left out: " + (", ".join(f"{n} {why}" for why, n in skipped.items()) or "none") + f"; {repeats} repeats")
    groups = collections.Counter(side_of.values())
    print(f"{len(side_of)} {'books' if args.eduqg else 'passages'}: " + ", ".join(f"{groups[side]} {side}" for side in splits))
    if len(splits.get("test", ())) > 100:
        print("of a test task the first 100 instances count, as in Super-NaturalInstructions; they are in a random order")
    records.show(out, shown, {"input": lambda r: r["input"], "output": lambda r: r["output"][0]}, count, args.tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
