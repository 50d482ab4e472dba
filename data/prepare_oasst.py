"""Make a data file from OpenAssistant's message trees: chats to imitate, ranked replies, prompts.

    python data/prepare_oasst.py --train train.jsonl --eval validation.jsonl --lang en \\
        --to conversations --out data/oasst.jsonl

    --to conversations, for sft_causal.py: a thread from the root down to each leaf
        {"messages": [{"role": "user", "content": "Hi"}, ...], "tree": "t1"}
    --to pairs, for clf.py --loss pairwise: a record for each question with ranked replies; more
        than two are "replies", the best first
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?", "thread": "Hi", "tree": "t1"}
    --to prompts, for rl_ppo.py: each thread that ends with a question; several turns are "messages"
        {"prompt": "Hi", "thread": "Hi", "tree": "t1"}

Reads trees, nested, one per line, or messages, one per line, with "message_id" and "parent_id" (or
"user_message_id" and "parent_message_id"). Left out is a message that is deleted, spam, written by
a model, empty, in another language, of low quality or of the same role as the one that it answers,
with all that is below it. A tree is whole on one side of a split.
"""

import collections
import math
import sys

import records  # first: it makes common.py importable

# isort: split
from common import SPLITS, log

ROLES = {"prompter": "user", "assistant": "assistant"}


def read_trees(path, problems):
    """[root message]; a message has "text", "role" and "replies"."""
    roots = []
    messages = {}
    for where, _, record in records.read(path, problems):
        if isinstance(record.get("prompt"), dict):
            roots.append({**record["prompt"], "state": record.get("tree_state")})
            continue
        name = record.get("message_id") or record.get("user_message_id")
        if name is None or name in messages:
            problems.append((where, "no tree in 'prompt', and no id of its own"))
        messages[name] = {**record, "replies": [], "state": record.get("tree_state")}
    n_lost = 0
    for message in messages.values():
        parent = message.get("parent_id") or message.get("parent_message_id")
        if parent is None:
            roots.append(message)
        elif parent in messages:
            messages[parent]["replies"].append(message)
        else:
            n_lost += 1
    log(f"{path}: {len(roots)} trees" + f"; {n_lost} messages without their parent" * (n_lost > 0))
    return roots


def quality(message):
    """The mean grade that people gave, 0 to 1, or None."""
    labels = message.get("labels") or {}
    if "name" in labels:
        labels = dict(zip(labels["name"], labels["value"]))
    grade = labels.get("quality")
    return grade["value"] if isinstance(grade, dict) else grade


def reason_to_drop(message, parent, args):
    """Why a message and all below it are left out, or None."""
    if message.get("deleted"):
        return "deleted"
    if message.get("synthetic"):
        return "written by a model"
    if message.get("review_result") is False:
        return "spam"
    if not message["text"].strip():
        return "empty"
    if args.lang and message.get("lang") not in args.lang:
        return "in another language"
    if message["role"] == (parent["role"] if parent else "assistant"):
        return "of the same role as the one before"
    grade = quality(message)
    if grade is not None and grade < args.min_quality:
        return "of low quality"
    return None


def walk(thread, message, args, dropped):
    """Yield (thread, replies, the best first) for each message in a tree that is reached; thread:
    [message] from the root down to it. Count what is left out."""
    reason = reason_to_drop(message, thread[-1] if thread else None, args)
    if reason:
        dropped[reason] += 1
        return
    thread = [*thread, message]
    replies = []
    for reply in message.get("replies") or []:
        if not reason_to_drop(reply, message, args):
            replies.append(reply)
    replies.sort(key=rank_of)
    yield thread, replies
    followed = message.get("replies") or []
    if args.threads == "best":
        followed = replies[:1]
    for reply in followed:
        yield from walk(thread, reply, args, dropped)


def rank_of(reply):
    return math.inf if reply.get("rank") is None else reply["rank"]


def ranked_texts(replies):
    """Of replies, the best first, those that are better or worse than the others."""
    texts = {}
    for reply in replies:
        rank = rank_of(reply)
        if rank < math.inf and rank not in texts and reply["text"] not in texts.values():
            texts[rank] = reply["text"]
    return list(texts.values())


def to_record(kind, thread, replies):
    """The record of a thread, or None."""
    is_question = thread[-1]["role"] == "prompter"
    if kind == "conversations":
        if replies:
            return None
        thread = thread[:-1] if is_question else thread  # a question without an answer goes
    elif not is_question:
        return None
    messages = [{"role": ROLES[turn["role"]], "content": turn["text"]} for turn in thread]
    if kind == "conversations":
        return {"messages": messages} if messages else None
    text = messages[0]["content"]
    if len(messages) > 1:
        turns = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages]
        text = "\n\n".join(turns)
    if kind == "prompts":
        start = {"messages": messages} if len(messages) > 1 else {"prompt": text}
        return {**start, "thread": text}
    texts = ranked_texts(replies)
    if len(texts) < 2:
        return None
    answers = {"replies": texts}
    if len(texts) == 2:
        answers = {"chosen": texts[0], "rejected": texts[1]}
    return {"prompt": text, **answers, "thread": text}


def convert(args, split_of_file, path, splits, roots, problems):
    """Add the records of a file to splits, {split: [record]}, and to roots, {tree: its text}."""
    dropped = collections.Counter()
    for number, root in enumerate(read_trees(path, problems)):
        ids = (root.get("message_id"), root.get("user_message_id"), f"{path}-{number}")
        tree = next(filter(None, ids))
        if root["state"] not in (None, "ready_for_export"):
            dropped["roots of unfinished trees"] += 1
            continue
        try:
            roots[tree] = root["text"]
            split = records.hold_out(args, split_of_file, records.normal(root["text"]))
            for thread, replies in walk([], root, args, dropped):
                record = to_record(args.to, thread, replies)
                if record:
                    splits[split].append({**record, "tree": tree})
        except (KeyError, TypeError, AttributeError) as error:
            problems.append((f"{path}, tree {tree}", f"{type(error).__name__}: {error}"))
    if dropped:
        reasons = [f"{n} {reason}" for reason, n in dropped.most_common()]
        log(f"{path}: left out, with all that is below: {', '.join(reasons)}")


def main(argv=None):
    parser = records.make_parser(__doc__)
    records.add_files(parser)
    add = parser.add_argument
    add("--to", required=True, choices=["conversations", "pairs", "prompts"])
    add("--threads", choices=["all", "best"], default="all", help="best: only the best replies")
    add("--lang", nargs="+", metavar="CODE", help="messages in these languages, such as en")
    add("--min_quality", type=float, default=0.0, help="lowest grade of a message, from 0 to 1")
    args = parser.parse_args(argv)
    problems = []
    splits = {split: [] for split in SPLITS}
    roots = {}
    for split, path in records.files_of(args).items():
        convert(args, split, path, splits, roots, problems)
    records.clean(splits, lambda record: [roots[record["tree"]]])
    records.finish(args, splits, problems)
    return 0


if __name__ == "__main__":
    sys.exit(main())
