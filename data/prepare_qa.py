"""Make a data file from a question answering set that you have already: SQuAD, TriviaQA, SciQ, WebGPT's comparisons.

    {"prompt": "Norse Vikings settled in Normandy.\\n\\nWho settled?", "completion": "Vikings", "references": ["Vikings", "Norse Vikings"], ...}
    {"messages": [{"role": "user", "content": "Which county is Leeds in?"}, {"role": "assistant", "content": "Yorkshire"}], "references": [...]}
    {"prompt": "Why is the sky blue?", "chosen": "Air scatters blue light most.", "rejected": "The sea is blue."}

SciQ's 1000 validation questions. Expected: 805 train, 92 eval, 103 test, nothing dropped; 113 without a passage, 2 that name a choice twice.
    python data/prepare_qa.py --layout sciq --train SciQ_valid.csv --eval_share 0.1 --test_share 0.1 --choices --out data/sciq.json
Of the other sets there is nothing here to count on:
    python data/prepare_qa.py --layout squad --train train-v2.0.json --eval dev-v2.0.json --no_answer unanswerable --out data/squad.jsonl
    python data/prepare_qa.py --layout triviaqa --train unfiltered-web-train.json --eval_share 0.05 --to messages --out data/trivia.jsonl
    python data/prepare_qa.py --layout webgpt --train comparisons.jsonl --eval_share 0.1 --strip_citations --out data/webgpt.jsonl

The prompt is the question; of squad and sciq the passage, a blank line, the question; --choices adds a blank line and the choices, a
line each, "(A) genes". completion is the first answer, "references" are all of them (triviaqa: Value, then Aliases). "id" rides along.
squad: a question without an answer is dropped and counted, or gets the text of --no_answer as its answer. webgpt: the answer with the
higher score is chosen, or the assistant's turn; equal scores say nothing and are dropped and counted; quotes are not used.

White space around a text is not part of it. Records are the same if prompt and answer are equal but for case and white space: the first
stays. What must not be in two splits is the article (squad: its title and its passages), or else the question: it stays in the later one (train, eval, test); hold-outs go by a hash of it, so no question's fate depends on the other lines.
"""

import argparse
import collections
import hashlib
import json
import re
import sys

from tqdm import tqdm

import records_v1 as records

NESTED = {"squad": ["data", "paragraphs", "qas"], "triviaqa": ["Data"], "webgpt": [], "sciq": []}  # lists in lists, down to the questions
CITATION = r"[ \t]*\[\d+(?:\s*[,–-]\s*\d+)*\]"  # " [1]", "[2, 3]", "[1-3]"

# ------------------------------------------------------------------------------------------------ questions
# (row, args, counts) -> (keys, prompt, answers), or None for what is dropped and counted. A ValueError says what is wrong with the row.


def text(row, name):
    if name not in row:
        raise ValueError(f"no {name!r} (has: {', '.join(row)})")
    if not isinstance(row[name], str):
        raise ValueError(f"{name!r} is a {type(row[name]).__name__}, expected a string")
    if not row[name].strip():
        raise ValueError(f"{name!r} is empty")
    return row[name].strip()


def squad(row, args, counts):
    answers, impossible = row.get("answers", []), row.get("is_impossible")
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise ValueError("'answers' is no list of objects")
    if impossible not in (None, True, False) or impossible is not None and impossible != (not answers):
        raise ValueError(f"is_impossible is {impossible!r}, and there are {len(answers)} answers")
    context, question, answers = text(row, "context"), text(row, "question"), [text(answer, "text") for answer in answers]
    keys = (text(row, "title"), context) if row.get("title") else (context,)
    if not answers:
        counts["without an answer " + ("dropped" if args.no_answer is None else f"kept, answered {args.no_answer!r}")] += 1
        if args.no_answer is None:
            return None
    return keys, f"{context}\n\n{question}", answers or [args.no_answer.strip()]


def triviaqa(row, args, counts):
    question, answer = text(row, "Question"), row.get("Answer")
    if not isinstance(answer, dict):
        raise ValueError(f"no object 'Answer' (has: {', '.join(row)})")
    aliases = answer.get("Aliases") or []
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise ValueError("'Aliases' is no list of strings")
    return (question,), question, [text(answer, "Value"), *filter(None, map(str.strip, aliases))]


def webgpt(row, args, counts):
    asked, scores = row.get("question"), [row.get(name) for name in ("score_0", "score_1")]
    question = text(asked, "full_text") if isinstance(asked, dict) else text(row, "question")
    if not all(isinstance(score, (int, float)) and not isinstance(score, bool) and abs(score) < 1e9 for score in scores):  # no nan
        raise ValueError(f"score_0 and score_1 are {scores[0]!r} and {scores[1]!r}, expected numbers")
    if scores[0] == scores[1]:
        counts["with equal scores dropped"] += 1
        return None
    best = int(scores[1] > scores[0])
    if args.strip_citations:
        row = {name: re.sub(CITATION, "", value) if isinstance(value, str) else value for name, value in row.items() if name.startswith("answer_")}
    answers = [text(row, f"answer_{i}") for i in ([best] if args.to == "messages" else [best, 1 - best])]
    if answers[0] == answers[-1] and args.to == "pairs":
        counts["with equal answers dropped"] += 1
        return None
    return (question,), question, answers


def sciq(row, args, counts):
    question, answer = text(row, "question"), text(row, "correct_answer")
    passage = text(row, "support") if str(row.get("support", "none")).strip() else ""
    counts["without a passage"] += not passage
    prompt = f"{passage}\n\n{question}" if passage else question
    if args.choices is not None:
        def order(choice):  # by a hash, so it depends on nothing but the seed and the question
            return hashlib.sha256(f"{args.choices}\n{question}\n{choice}".encode()).digest()
        choices = sorted({answer, *(text(row, f"distractor{i}") for i in (1, 2, 3))}, key=order)
        counts["with fewer than four different choices"] += len(choices) < 4
        prompt += "\n\n" + "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", choices))
    return (question,), prompt, [answer]


LAYOUTS = {"squad": squad, "triviaqa": triviaqa, "webgpt": webgpt, "sciq": sciq}


def to_item(row, args, counts):
    """-> (keys, (prompt, answer), record), or None."""
    found = LAYOUTS[args.layout](row, args, counts)
    if not found:
        return None
    keys, prompt, answers = found
    record = {"prompt": prompt, "completion": answers[0]}
    if args.to == "messages":
        record = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answers[0]}]}
    elif args.layout == "webgpt":
        record = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    if args.layout in ("squad", "triviaqa"):
        record["references"] = list(dict.fromkeys(answers))
    question = row["question"] if isinstance(row.get("question"), dict) else {}
    ids = [row.get("id"), row.get("QuestionId"), row.get("question_id"), question.get("id")]
    record.update({"id": name for name in ids if isinstance(name, (str, int)) and name != ""})
    json.dumps([keys, record], ensure_ascii=False).encode()  # a ValueError for half a surrogate pair, which no UTF-8 file can hold
    return tuple(map(records.normal, keys)), (records.normal(prompt), records.normal("\n".join(answers[:1 + ("rejected" in record)]))), record


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--layout", required=True, choices=list(LAYOUTS), help="what the files are")
    records.add_split_arguments(parser, "articles (squad) or questions")
    parser.add_argument("--to", default="pairs", choices=["pairs", "messages"], help="pairs: prompt and completion, of webgpt prompt, chosen and "
                        "rejected for clf.py --loss pairwise | messages: a user's and an assistant's turn; default pairs")
    parser.add_argument("--no_answer", metavar="TEXT", help="squad: the answer to a question that has none; default: such a question is dropped")
    parser.add_argument("--strip_citations", action="store_true", help="webgpt: marks like [1] and [2, 3] are taken out of the answers")
    parser.add_argument("--choices", nargs="?", type=int, const=0, metavar="SEED", help="sciq: the choices are part of the prompt, in an order that "
                        "depends on the question and SEED, 0 if none is given")
    parser.add_argument("--skip_malformed", action="store_true", help="drop and count questions with missing, empty or wrong fields")
    records.add_arguments(parser)
    args, problems = parser.parse_args(argv), []
    records.check_out(args.out, problems)
    files, shares = records.check_splits(args, problems)
    for flag, layout, given in (("no_answer", "squad", args.no_answer is not None), ("strip_citations", "webgpt", args.strip_citations),
                                ("choices", "sciq", args.choices is not None)):
        if given and args.layout != layout:
            problems.append(f"--{flag}: only with --layout {layout}")
    if args.no_answer is not None and not args.no_answer.strip():
        problems.append("--no_answer: the text is empty, and no script trains on an empty answer")
    splits, notes = {split: [] for split in records.SPLITS}, []
    for split, path in files.items():
        rows, counts, malformed = records.read(path, problems), collections.Counter(), []
        lists = list(dict.fromkeys(records.list_of(where, path) for where, _ in rows))
        if len(lists) > 1 or {*lists} & {*records.SPLITS} - {split}:
            problems.append(f"{path}: has the lists {', '.join(lists)}; expected one, a file for each split")
        rows = records.flatten(rows, NESTED[args.layout], problems)
        for where, row in tqdm(rows, desc=str(path), unit=" questions", delay=5):
            try:
                splits[split].append(to_item(row, args, counts))
            except ValueError as error:
                malformed.append(f"{where}: {error}")
        splits[split] = [item for item in splits[split] if item]
        notes.append(f"{path}: {len(rows)} questions" + "".join(f", {n} {what}" for what, n in counts.items() if n))
        if args.skip_malformed:
            notes[-1] += f", {len(malformed)} malformed dropped" + "".join(f"; the first: {what}" for what in malformed[:1])
        else:
            problems += malformed
    wanted = [split for split in records.SPLITS if split in files or shares.get(split)]
    return records.finish(args, splits, wanted, shares, ["messages"] if args.to == "messages" else
                  ["prompt", "chosen", "rejected"] if args.layout == "webgpt" else ["prompt", "completion"], notes, problems)


if __name__ == "__main__":
    sys.exit(main())
