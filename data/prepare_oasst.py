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

Reads the export of trees, one per line; a message has its "replies". Left out is a message that is
deleted, spam, written by a model, empty, in another language or of the same role as the one that it
answers, with all that is below it. A tree is whole on one side of a split.
"""

import collections
import functools
import math

import records  # first: it makes common.py importable

# isort: split
from common import log

ROLES = {"prompter": "user", "assistant": "assistant"}


def reason_to_drop(message, parent_role, languages):
    """Why a message and all below it are left out, or None."""
    if message.get("deleted"):
        return "deleted"
    if message.get("synthetic"):
        return "written by a model"
    if message.get("review_result") is False:
        return "spam"
    if not message["text"].strip():
        return "empty"
    if languages and message.get("lang") not in languages:
        return "in another language"
    if message["role"] == parent_role:
        return "of the same role as the one before"
    return None


def walk(thread, args, dropped):
    """Yield (thread, replies, the best first) for each message from the end of a thread on that is
    reached; thread: [message] from the root down. Count what is left out."""
    replies = []
    for reply in thread[-1].get("replies") or []:
        reason = reason_to_drop(reply, thread[-1]["role"], args.lang)
        if reason:
            dropped[reason] += 1
        else:
            replies.append(reply)
    ranked = sorted(replies, key=rank_of)
    yield thread, ranked
    for reply in ranked[:1] if args.threads == "best" else replies:
        yield from walk([*thread, reply], args, dropped)


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
    messages = [{"role": ROLES[turn["role"]], "content": turn["text"]} for turn in thread]
    if kind == "conversations":
        if is_question:  # without an answer
            messages.pop()
        return {"messages": messages} if messages and not replies else None
    if not is_question:
        return None
    text = messages[0]["content"]
    start = {"prompt": text}
    if len(messages) > 1:
        turns = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages]
        text = "\n\n".join(turns)
        start = {"messages": messages}
    if kind == "prompts":
        return {**start, "thread": text}
    texts = ranked_texts(replies)
    if len(texts) < 2:
        return None
    answers = {"replies": texts}
    if len(texts) == 2:
        answers = {"chosen": texts[0], "rejected": texts[1]}
    return {"prompt": text, **answers, "thread": text}


def to_records(row, args, dropped, roots):
    """[record] of a tree; what is left out is counted in dropped, the text of its root goes to
    roots."""
    if "prompt" not in row:
        raise ValueError("no 'prompt': take the export of trees, not that of messages")
    root = row["prompt"]
    reason = reason_to_drop(root, "assistant", args.lang)
    if row.get("tree_state", "ready_for_export") != "ready_for_export":
        reason = "roots of unfinished trees"
    if reason:
        dropped[reason] += 1
        return []
    tree = root.get("message_id") or root["text"]
    roots[tree] = root["text"]
    found = []
    for thread, replies in walk([root], args, dropped):
        record = to_record(args.to, thread, replies)
        if record:
            found.append({**record, "tree": tree})
    return found


def main(argv=None):
    parser = records.make_parser(__doc__)
    records.add_files(parser)
    records.add_skip(parser)
    add = parser.add_argument
    add("--to", required=True, choices=["conversations", "pairs", "prompts"])
    add("--threads", choices=["all", "best"], default="all", help="best: only the best replies")
    add("--lang", nargs="+", metavar="CODE", help="messages in these languages, such as en")
    args = parser.parse_args(argv)
    problems = []
    roots = {}
    dropped = collections.Counter()
    use = functools.partial(to_records, args=args, dropped=dropped, roots=roots)
    splits = records.split_files(args, use, lambda record: roots[record["tree"]], problems)
    if dropped:
        reasons = [f"{n} {reason}" for reason, n in dropped.most_common()]
        log(f"left out, with all that is below: {', '.join(reasons)}")
    records.finish(args, splits, problems)


if __name__ == "__main__":
    main()
