"""Make a data file from OpenAssistant message trees that you have already: chats to imitate, ranked replies, or prompts.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], "tree": "t1"}   sft_causal.py
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?", "thread": "Hi", "tree": "t1"}                       clf.py --loss pairwise
    {"prompt": "Hi", "thread": "Hi", "tree": "t1"}                                                                rl_ppo.py

Expected, from the English part of OpenAssistant's validation set, 1248 messages in 118 trees: 1193 of them used, left out 2 without
their parent, 15 deleted, 28 spam, 10 below one of these. --threads best: 118 conversations in all, a thread per tree.
    python data/prepare_oasst.py --train messages.jsonl --eval_share 0.05 --to conversations --out data/chats.jsonl    # 534 train, 38 eval
    python data/prepare_oasst.py --train messages.jsonl --eval_share 0.05 --to pairs --out data/ranked.jsonl           # 240 train, 17 eval
    python data/prepare_oasst.py --train messages.jsonl --eval_share 0.05 --to prompts --out data/prompts.jsonl        # 433 train, 25 eval
60 nested English trees of 684 messages, 4 of whose roots a model wrote: 319, 118, 278 records; with --slices 89, 51, 98.

Input: trees, nested, one per line; or messages, one per line; or the earlier system's {"prompt": {"text", "role", "replies"}} without
ids; or the list of messages with "user_message_id" that its backend is tested with. Left out is a message that is deleted, written by a
model, spam (refused by its review), empty, in another language, below --min_quality or of the same role as the one that it answers, and
all that is below such a message.
- conversations: a thread per leaf; a last question without an answer is cut off. --threads best: only the best-ranked reply everywhere.
- pairs: a record per question with two or more ranked replies; more than two (never with --top_k 2) are "replies", the best first.
- prompts: every thread that ends with a question; one of several turns has "messages" in place of "prompt".
"thread" is a thread as text: the question alone, several turns as "User: Hi\\n\\nAssistant: Hello!\\n\\nUser: Bye". rl_ppo.py shows a reward
model only the last question as {prompt}; with clf.py --template '{thread}\\n\\n{reply}' it reads there what it was trained on.

A tree is whole on one side of a split: shares are held out by a hash of its first message, so the three files hold out the same trees;
train loses trees that begin as one of a file for eval. An id that comes twice is refused. --slices, as in the earlier system: train's
trees in the order of NumPy's default_rng(0), the first 25 % for conversations, 40 % for pairs, 35 % for prompts.
"""

import argparse
import collections
import hashlib
import json
import math
import re
import sys

import numpy as np

import records_v1 as records

KINDS = {"conversations": (0, 25), "pairs": (25, 65), "prompts": (65, 100)}  # and the slice of the trees that each has [%]
ROLES = {"prompter": "user", "assistant": "assistant"}
TEXT = "a string without half characters (lone \\ud800-\\udfff escapes)"
EXPECTED = {"role": " or ".join(ROLES), "text": TEXT, "message_id": TEXT, "parent_id": TEXT, "replies": "a list of messages or null",
            "rank": "a number (0 is best) or null", "labels": "an object whose 'quality' is a number or null",
            **dict.fromkeys(("deleted", "synthetic", "review_result"), "true, false or null")}
BELOW = "below one of these"


def is_text(value):
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def quality(node):
    """The quality that people gave a message: 0.5 for the labels {"name": ["quality"], "value": [0.5]} and {"quality": {"value": 0.5}}, None
    where there is none. What is no number is a fault of the file."""
    labels = node.get("labels")
    try:
        labels = dict(zip(labels["name"], labels["value"])) if {"name", "value"} <= set(labels or ()) else labels or {}
        return labels["quality"]["value"] if isinstance(labels.get("quality"), dict) else labels.get("quality")
    except (AttributeError, KeyError, TypeError):
        return "unknown"


def faults(node, min_quality):
    """What is wrong with a message, in words."""
    if not isinstance(node, dict):
        return [f"a {type(node).__name__}, expected a message, an object with 'text' and 'role'"]
    good = {"role": node.get("role") in list(ROLES), "text": is_text(node.get("text")), "rank": node.get("rank") is None or is_number(node["rank"]),
            "replies": isinstance(node.get("replies"), (list, type(None))),
            "labels": not min_quality or quality(node) is None or is_number(quality(node)),
            **{name: node.get(name) is None or is_text(node[name]) for name in ("message_id", "parent_id")},
            **{name: isinstance(node.get(name), (bool, type(None))) for name in ("deleted", "synthetic", "review_result")}}
    return [f"{name!r} {str(node.get(name))[:60]!r}, expected {EXPECTED[name]}" for name in good if not good[name]]


def everything(nodes):
    """Messages and all that is below them, in the order of a reader."""
    stack = list(reversed(nodes))
    while stack:
        node = stack.pop()
        yield node
        replies = node.get("replies") if isinstance(node, dict) else None
        stack += reversed(replies if isinstance(replies, list) else [])


def read_trees(path, min_quality, places, counts, problems):
    """-> [{"id", "state", "root"}] in the order of the file; what is in no tree is counted. places: {id of a message: where it was first seen}."""
    trees, flat = [], {}

    def checked(where, node):
        found, name = faults(node, min_quality), node.get("message_id") if isinstance(node, dict) else None
        if isinstance(name, str):
            where += f", message {name!r}"
            if places.setdefault(name, where) is not where:
                found.append(f"this id is also at {places[name]}; remove one of the two")
        problems.extend(f"{where}: {what}" for what in found)
        return not found

    def add_tree(where, record, root):
        name = record.get("message_tree_id") or root.get("message_id") or hashlib.sha256(root["text"].encode()).hexdigest()[:16]
        problems.extend([] if is_text(name) else [f"{where}: 'message_tree_id' {name!r}, expected {TEXT}"])
        trees.append({"id": name, "state": record.get("tree_state"), "root": root})

    for where, record in records.read(path, problems):
        if "prompt" in record:
            if all([checked(where, node) for node in everything([record["prompt"]])]):
                add_tree(where, record, record["prompt"])
        elif {"message_id", "user_message_id"} & set(record):
            node = {"message_id": record.get("user_message_id"), "parent_id": record.get("parent_message_id"), **record, "replies": []}
            if record.get("replies") or not isinstance(node["message_id"], str):
                problems.append(f"{where}: a message with 'replies' or without an id of its own; expected one that names itself and its parent, "
                                'or {"prompt": message with replies}')
            elif checked(where, node):
                flat[node["message_id"]] = where, node
        else:
            problems.append(f"{where}: none of the known formats (has: {', '.join(record) or 'nothing'}); expected 'prompt' with a tree, "
                            "'message_id' and 'parent_id', or 'user_message_id' and 'parent_message_id'")
    roots, orphans = [], []
    for where, node in flat.values():
        if node["parent_id"] is None:
            roots.append(node)
            add_tree(where, node, node)
        elif node["parent_id"] in flat:
            flat[node["parent_id"]][1]["replies"].append(node)
        else:
            orphans.append(node)
    circles = set(flat) - {node["message_id"] for node in everything(roots + orphans)}
    problems += [f"{flat[name][0]}: its parents lead back to itself; expected them to lead to a root" for name in flat if name in circles]
    counts["without their parent"] += len(orphans)
    counts[BELOW] += sum(1 for _ in everything(orphans)) - len(orphans)
    return trees


def prune(root, args, counts):
    """Take out of a tree what does not count and what is below that, counted by its reason; -> the root, or None."""
    stack = [(root, {}, None)]
    while stack:
        node, parent, why = stack.pop()
        grade = quality(node) if args.min_quality else None
        reasons = {BELOW: why, "deleted": node.get("deleted"), "synthetic": node.get("synthetic") and "synthetic" not in args.keep,
                   "spam": node.get("review_result") is False and "spam" not in args.keep, "empty": not node["text"].strip(),
                   "in another language": args.lang and node.get("lang") not in args.lang,
                   "below --min_quality": grade is not None and grade < args.min_quality,
                   "with the role of the one before": node["role"] == parent.get("role")}
        why = next((reason for reason, holds in reasons.items() if holds), None)
        counts[why or "used"] += 1
        stack += [(reply, node, why) for reply in reversed(node.get("replies") or [])]
        node["replies"] = []
        if not why and parent:
            parent["replies"].append(node)
        root = None if why and node is root else root
    return root


def visit(root, threads, top_k):
    """Yield (the thread down to a message, its replies best first, those of them that are followed) for each message that is reached."""
    stack = [[root]]
    while stack:
        thread = stack.pop()
        ranked = sorted(thread[-1]["replies"], key=lambda reply: math.inf if reply.get("rank") is None else reply["rank"])
        followed = ranked[:1] if threads == "best" else ranked[:top_k] if thread[-1]["role"] == "prompter" else ranked
        yield thread, ranked, followed
        stack += [[*thread, reply] for reply in reversed(thread[-1]["replies"]) if any(reply is other for other in followed)]


def comparable(ranked, counts):
    """Replies, best first -> those with a rank and a text of their own, which are better or worse than others."""
    ranks, texts, found = set(), set(), []
    for reply in ranked if len(ranked) > 1 else []:
        rank, text = reply.get("rank"), " ".join(reply["text"].split())
        reasons = {"without a rank": rank is None, "with the rank of another": rank in ranks, "with the text of another": text in texts}
        if any(reasons.values()):
            counts[max(reasons, key=reasons.get)] += 1
        else:
            found.append(reply)
        ranks.add(rank)
        texts.add(text)
    return found


def messages_of(thread):
    return [{"role": ROLES[node["role"]], "content": node["text"]} for node in thread]


def text_of(thread):
    """A thread as text: of one turn the turn alone, of several each with who speaks, blank lines between."""
    return thread[0]["text"] if len(thread) == 1 else "\n\n".join(f"{ROLES[node['role']].capitalize()}: {node['text']}" for node in thread)


def to_items(root, args, counts):
    """A pruned tree -> ((prompt, answer), record): the record, without the tree's id, and the texts by which another would be a repeat."""
    done = set()  # answers that ended a thread: several questions behind one may have no answer
    for thread, ranked, followed in visit(root, args.threads, args.top_k):
        asked, text = thread[-1]["role"] == "prompter", text_of(thread)
        if args.to == "conversations" and not followed:
            thread = thread[:-1] if asked else thread
            if thread and id(thread[-1]) not in done:
                done.add(id(thread[-1]))
                yield (text_of(thread[:-1]), thread[-1]["text"]), {"messages": messages_of(thread)}
        elif args.to == "prompts" and asked:
            yield (text, ""), {**({"messages": messages_of(thread)} if len(thread) > 1 else {"prompt": text}), "thread": text}
        elif args.to == "pairs" and asked:
            replies = [reply["text"] for reply in comparable(ranked, counts)[: args.top_k]]
            if len(replies) > 1:
                found = {"chosen": replies[0], "rejected": replies[1]} if len(replies) == 2 else {"replies": replies}
                yield (text, json.dumps(replies)), {"prompt": text, **found, "thread": text}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    records.add_split_arguments(parser, "trees")
    parser.add_argument("--to", required=True, choices=list(KINDS), help="records for sft_causal.py, clf.py, rl_ppo.py")
    parser.add_argument("--threads", choices=["all", "best"], default="all", help="which replies are followed down: all | the best-ranked one")
    parser.add_argument("--top_k", type=int, metavar="K", help="of the replies to a question only the K best-ranked, default: all")
    parser.add_argument("--lang", nargs="+", metavar="CODE", help="messages in these languages, such as en de; default: all")
    parser.add_argument("--min_quality", type=float, default=0.0, help="messages whose quality label is this or more, or missing [0-1], 0 = off")
    parser.add_argument("--keep", nargs="+", choices=["synthetic", "spam"], default=[], help="messages that are left out otherwise")
    parser.add_argument("--tree_state", nargs="+", default=["ready_for_export"], metavar="STATE", help="trees in these states, or that say none")
    parser.add_argument("--slices", action="store_true", help="of train only this kind's part of the trees: 25, 40, 35 %% for conversations, "
                        "pairs, prompts")
    records.add_arguments(parser)
    args = parser.parse_args(argv)
    problems, places, notes, splits, roots = [], {}, [], {split: [] for split in records.SPLITS}, {}
    records.check_out(args.out, problems)
    files, shares = records.check_splits(args, problems)
    if not 0 <= args.min_quality <= 1:
        problems.append(f"--min_quality {args.min_quality}: expected 0 to 1")
    if args.top_k is not None and args.top_k < 1 + (args.to == "pairs"):
        problems.append(f"--top_k {args.top_k}: expected {1 + (args.to == 'pairs')} or more")
    if args.top_k is not None and args.threads == "best" and args.to != "pairs":
        problems.append(f"--top_k has no effect on {args.to} with --threads best: leave out one of them")
    for split, path in files.items():
        messages, unranked, n_used = collections.Counter(), collections.Counter(), 0
        trees = taken = read_trees(path, args.min_quality, places, messages, problems)
        if args.slices and split == "train":
            order = np.arange(len(trees))
            np.random.default_rng(0).shuffle(order)
            taken = [trees[i] for i in order[KINDS[args.to][0] * len(trees) // 100: KINDS[args.to][1] * len(trees) // 100]]
        roots[split] = [records.normal(tree["root"]["text"]) for tree in trees] if split != "train" else []
        ready = [tree for tree in taken if tree["state"] is None or tree["state"] in args.tree_state]
        for tree in [] if problems else ready:
            root = prune(tree["root"], args, messages)
            found = list(to_items(root, args, unranked)) if root else []
            splits[split] += [(records.normal(root["text"]), texts, {**record, "tree": tree["id"]}) for texts, record in found]
            n_used += bool(found)
        lost = sorted(((why, n) for why, n in messages.items() if n and why != "used"), key=lambda pair: pair[0] == BELOW)
        notes += [f"{path}: {len(trees)} trees, " + f"{len(taken)} in this slice, " * (args.slices and split == "train")
                  + f"{len(taken) - len(ready)} in another state, {len(ready) - n_used} without a record",
                  f"{path}: {messages['used']} messages; left out: " + (", ".join(f"{n} {why}" for why, n in lost) or "none")
                  + ("; replies not compared: " + ", ".join(f"{n} {why}" for why, n in unranked.items())) * bool(unranked)]
    wanted = [split for split in records.SPLITS if split in files or shares.get(split)]
    field = {"conversations": "messages", "pairs": "prompt", "prompts": "thread"}[args.to]
    return records.finish(args, splits, wanted, shares, [field], notes, problems, roots)


if __name__ == "__main__":
    sys.exit(main())
