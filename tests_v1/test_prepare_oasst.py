"""data/prepare_oasst.py: trees to records by hand, the threads that sft_causal.py reads itself, no tree on two sides, every way to get a file
wrong, the real files and the readers of the three scripts."""

import argparse
import gzip
import itertools
import json
import re
import types

import numpy as np
import prepare_oasst
import pytest
from conftest import ROOT, write_babbler

import clf
import rl_ppo
import sft_causal

SHARED = ROOT.parent / "shared" / "data" / "oasst"
FLAT, NESTED, SEED = "oasst1_en_validation_messages.jsonl", "en_100_tree_first60.jsonl", "realistic_seed_data.json"


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """prepare(records or {file: text, bytes or records}, "flags") -> (exit code, what was written or None, stdout, stderr); the first file is
    train's, a second one eval's."""
    def prepare(files, *words, out="out.json"):
        monkeypatch.chdir(tmp_path)
        files = files if isinstance(files, dict) else {"trees.jsonl": files}
        for name, content in files.items():
            text = "".join(json.dumps(record) + "\n" for record in content) if isinstance(content, list) else content
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        names = [word for flag, name in zip(("--train", "--eval"), files) for word in (flag, name)]
        before = (tmp_path / out).exists()
        try:
            code = prepare_oasst.main([*names, "--out", out, *map(str, words)])
        except SystemExit as stop:
            code = stop.code
        written = json.loads((tmp_path / out).read_text(encoding="utf-8")) if (tmp_path / out).exists() and not before else None
        return code, written, *capsys.readouterr()
    return prepare


def node(text, *replies, **more):
    """"?..." is the prompter's, everything else the assistant's."""
    return {"role": "prompter" if text.startswith("?") else "assistant", "text": text, **more, "replies": list(replies)}


def tree(name, prompt, **more):
    return {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": prompt, **more}


def line(name, parent, text="?a", **more):
    return {"message_id": name, "parent_id": parent, "role": "prompter" if text.startswith("?") else "assistant", "text": text, **more}


GOOD = [line("a", None), line("b", "a", "c", rank=0)]
#   ?a -> b (rank 1) -> ?c -> d
#                    -> ?e                  a question without an answer
#      -> f (rank 0) -> ?g -> h (rank 2), i (rank 0), j (rank 1)
#      -> k (no rank)
TREE = tree("t1", node("?a", node("b", node("?c", node("d")), node("?e"), rank=1),
                       node("f", node("?g", node("h", rank=2), node("i", rank=0), node("j", rank=1)), rank=0), node("k")))


def talk(*texts):
    return [{"role": "user" if text.startswith("?") else "assistant", "content": text} for text in texts]


def threads(written, split="train"):
    return [" ".join(message["content"] for message in record["messages"]) for record in written[split]]


# ------------------------------------------------------------------------------------------------ records


def test_conversations(prepare):
    """A thread per leaf in the order of the file; the question without an answer gives the thread above it."""
    code, written, shown, _ = prepare([TREE], "--to", "conversations")
    assert code == 0 and threads(written) == ["?a b ?c d", "?a b", "?a f ?g h", "?a f ?g i", "?a f ?g j", "?a k"]
    assert written["train"][0] == {"messages": talk("?a", "b", "?c", "d"), "tree": "t1"}
    assert shown.startswith("trees.jsonl: 1 trees, 0 in another state, 0 without a record\ntrees.jsonl: 11 messages; left out: none\n"
                            "train: 0 repeated dropped; prompts with several answers: 2\nout.json: 6 train\n"
                            "train, tokens of messages (models/tiny-llama): 0% ")
    assert shown.endswith("".join(json.dumps(record) + "\n" for record in written["train"][:2]))
    code, written, _, _ = prepare([TREE], "--to", "conversations", "--threads", "best", out="best.json")
    assert code == 0 and threads(written) == ["?a f ?g i"]
    code, written, _, _ = prepare([TREE], "--to", "conversations", "--top_k", 2, out="top.json")
    assert code == 0 and threads(written) == ["?a b ?c d", "?a b", "?a f ?g i", "?a f ?g j"]  # h and k are third


def test_pairs(prepare):
    """The replies to a question, best first; unranked ones are no replies to compare."""
    history = "User: ?a\n\nAssistant: f\n\nUser: ?g"
    code, written, shown, _ = prepare([TREE], "--to", "pairs")
    assert code == 0 and written == {"train": [
        {"prompt": "?a", "chosen": "f", "rejected": "b", "thread": "?a", "tree": "t1"},
        {"prompt": history, "replies": ["i", "j", "h"], "thread": history, "tree": "t1"}]}
    assert "trees.jsonl: 11 messages; left out: none; replies not compared: 1 without a rank\n" in shown
    code, written, _, _ = prepare([TREE], "--to", "pairs", "--top_k", 2, out="top.json")
    assert code == 0 and written["train"][1] == {"prompt": history, "chosen": "i", "rejected": "j", "thread": history, "tree": "t1"}
    turned = tree("t", node("?a", node("b", node("?c", node("x", rank=0), node("y", rank=1)), rank=1), node("f", rank=0)))
    code, written, _, _ = prepare([turned], "--to", "pairs", "--threads", "best", out="best.json")
    assert code == 0 and [record["prompt"] for record in written["train"]] == ["?a"]  # f is followed, b is not
    code, written, _, _ = prepare([turned], "--to", "pairs", out="all.json")
    assert code == 0 and [record["prompt"] for record in written["train"]] == ["?a", "User: ?a\n\nAssistant: b\n\nUser: ?c"]


def test_replies_that_are_no_better_or_worse_are_not_compared(prepare):
    ties = tree("t", node("?a", node("x", rank=0), node("tie", rank=0), node(" x ", rank=1), node("y", rank=2), node("z"), node("z")))
    code, written, shown, _ = prepare([ties, tree("u", node("?b", node("lone")))], "--to", "pairs")
    assert code == 0 and written["train"] == [{"prompt": "?a", "chosen": "x", "rejected": "y", "thread": "?a", "tree": "t"}]
    assert "replies not compared: 1 with the rank of another, 1 with the text of another, 2 without a rank\n" in shown
    assert "trees.jsonl: 2 trees, 0 in another state, 1 without a record\n" in shown


def test_prompts(prepare):
    """Every thread that ends with a question, answered or not."""
    code, written, _, _ = prepare([TREE], "--to", "prompts")
    assert code == 0 and written["train"] == [
        {"prompt": "?a", "thread": "?a", "tree": "t1"},
        {"messages": talk("?a", "b", "?c"), "thread": "User: ?a\n\nAssistant: b\n\nUser: ?c", "tree": "t1"},
        {"messages": talk("?a", "b", "?e"), "thread": "User: ?a\n\nAssistant: b\n\nUser: ?e", "tree": "t1"},
        {"messages": talk("?a", "f", "?g"), "thread": "User: ?a\n\nAssistant: f\n\nUser: ?g", "tree": "t1"}]
    code, written, _, _ = prepare([TREE], "--to", "prompts", "--threads", "best", out="best.json")
    assert code == 0 and [record["thread"] for record in written["train"]] == ["?a", "User: ?a\n\nAssistant: f\n\nUser: ?g"]


def flat(parent, message, counter):
    """A nested message as lines with ids m0, m1, ..., children before the next sibling."""
    name = f"m{next(counter)}"
    yield {"message_id": name, "parent_id": parent, **{key: value for key, value in message.items() if key != "replies"}}
    for reply in message["replies"]:
        yield from flat(name, reply, counter)


def test_all_formats_say_the_same(prepare):
    """Lines in any order, the earlier system's trees without ids, its backend's list; also compressed, with a byte-order mark and CRLF."""
    lines = list(flat(None, TREE["prompt"], iter(range(99))))
    wanted = [record["messages"] for record in prepare([TREE], "--to", "conversations")[1]["train"]]
    seeds = [{"task_message_id": "x" + m["message_id"], "user_message_id": m["message_id"], "parent_message_id": m["parent_id"],
              "role": m["role"], "text": m["text"]} for m in lines]
    jsonl = "\ufeff" + "\r\n".join(map(json.dumps, [*lines[1:], lines[0]])) + "\r\n\r\n"
    name_of_text = "67c01b5b60a954f8"  # printf ?a | sha256sum
    for i, (files, name) in enumerate([({"a.jsonl": jsonl}, "m0"), ({"b.jsonl.gz": gzip.compress(jsonl.encode())}, "m0"),
                                       ({"c.json": json.dumps(seeds)}, "m0"), ({"d.json": json.dumps({"prompt": TREE["prompt"]})}, name_of_text)]):
        code, written, shown, _ = prepare(files, "--to", "conversations", out=f"out{i}.json")
        assert code == 0 and sorted(map(str, wanted)) == sorted(str(record["messages"]) for record in written["train"]), shown
        assert {record["tree"] for record in written["train"]} == {name}


def test_what_does_not_count(prepare):
    """Each reason with what is below it; --keep, --lang and --min_quality change it."""
    labels = {"name": ["spam", "quality"], "value": [0.0, 0.25]}
    replies = [node("deleted", node("?below1"), deleted=True), node("synthetic", synthetic=True), node("spam", review_result=False),
               node(" \n", node("?below2", node("below3"))), node("german", lang="de"), node("poor", labels=labels, lang="en"),
               node("fair", labels={"quality": {"value": 0.5, "count": 3}}, lang="en"), node("?again"),
               node("unreviewed", review_result=None, lang="en")]
    one = [tree("t", node("?a", *replies, lang="en"))]
    words = ["--to", "conversations"]
    code, written, shown, _ = prepare(one, *words)
    assert code == 0 and threads(written) == ["?a german", "?a poor", "?a fair", "?a unreviewed"]
    assert ": 5 messages; left out: 1 deleted, 1 synthetic, 1 spam, 1 empty, 1 with the role of the one before, 3 below one of these\n" in shown
    code, written, shown, _ = prepare(one, *words, "--keep", "synthetic", "spam", out="b.json")
    assert code == 0 and threads(written) == ["?a synthetic", "?a spam", "?a german", "?a poor", "?a fair", "?a unreviewed"]
    code, written, shown, _ = prepare(one, *words, "--lang", "fr", "en", "--min_quality", 0.5, out="c.json")
    assert code == 0 and threads(written) == ["?a fair", "?a unreviewed"]
    assert "2 in another language, 1 below --min_quality, 3 below one of these\n" in shown


def test_trees_in_another_state(prepare):
    trees = [tree("a", node("?a", node("b"))), tree("c", node("?c", node("d")), tree_state="ranking"),
             tree("e", node("?e", node("f")), tree_state=None)]
    code, written, shown, _ = prepare(trees, "--to", "conversations")
    assert code == 0 and threads(written) == ["?a b", "?e f"] and "trees.jsonl: 3 trees, 1 in another state," in shown
    code, written, _, _ = prepare(trees, "--to", "conversations", "--tree_state", "ranking", "initial_prompt_review", out="b.json")
    assert code == 0 and threads(written) == ["?c d", "?e f"]


def test_repeated_records_are_dropped(prepare):
    trees = [tree("a", node("?a", node("b"), node("b"))), tree("b", node("?a", node("b"), node("c")))]
    code, written, shown, _ = prepare(trees, "--to", "conversations")
    assert code == 0 and [(r["messages"][1]["content"], r["tree"]) for r in written["train"]] == [("b", "a"), ("c", "b")]
    assert "\ntrain: 2 repeated dropped; prompts with several answers: 1\n" in shown
    code, written, shown, _ = prepare([tree("a", node("?a", node("b", node("?c"), node("?d"))))], "--to", "conversations", out="b.json")
    assert code == 0 and threads(written) == ["?a b"] and "\ntrain: 0 repeated dropped\n" in shown  # one thread, two ways to go on


def test_pairs_with_the_same_prompt(prepare):
    trees = [tree(name, node("?a", node("b", rank=0), node(other, rank=1))) for name, other in (("a", "c"), ("b", "c"), ("c", "d"))]
    code, written, shown, _ = prepare(trees, "--to", "pairs")
    assert code == 0 and [record["rejected"] for record in written["train"]] == ["c", "d"] and "\ntrain: 1 repeated dropped;" in shown


def test_messages_without_their_parent(prepare):
    code, written, shown, _ = prepare([*GOOD, line("d", "gone", "e"), line("f", "d"), line("g", "f", "h")], "--to", "conversations")
    assert code == 0 and threads(written) == ["?a c"]
    assert "trees.jsonl: 2 messages; left out: 1 without their parent, 2 below one of these\n" in shown


# ------------------------------------------------------------------------------------------------ splits, slices


def many(n=300):
    """Trees of three threads; a tenth of them begin like another, but for blanks and case."""
    first = [f"?{'Question ' if i < n * 9 // 10 else 'question  '}{i % (n * 9 // 10)}" for i in range(n)]
    return [tree(f"t{i}", node(first[i], node(f"x{i}", rank=0), node(f"y{i}", rank=1), node(f"z{i}"))) for i in range(n)]


def leaks(written):
    """First messages, trees and records that two sides share."""
    sides = [{value for record in part for value in (record["tree"], json.dumps(record["messages"]),
                                                     record["messages"][0]["content"].replace(" ", "").casefold())} for part in written.values()]
    return {value for i, side in enumerate(sides) for other in sides[:i] for value in side & other}


def test_no_tree_and_no_first_message_is_on_two_sides(prepare, monkeypatch):
    code, written, shown, _ = prepare(many(), "--to", "conversations", "--eval_share", 0.2, "--test_share", 0.1)
    n = {split: len({record["tree"] for record in part}) for split, part in written.items()}
    assert code == 0 and leaks(written) == set() and sum(n.values()) == 300 and 40 <= n["eval"] <= 80 and 15 <= n["test"] <= 45
    assert f"\nout.json: {len(written['train'])} train, {len(written['eval'])} eval, {len(written['test'])} test\n" in shown
    code, fewer, _, _ = prepare(many()[100:], "--to", "pairs", "--eval_share", 0.2, "--test_share", 0.1, out="pairs.json")
    for split, part in written.items():  # a tree's side does not depend on the others, nor on the kind of records
        assert {record["tree"] for record in fewer[split]} <= {record["tree"] for record in part}
    monkeypatch.setattr(prepare_oasst.records, "normal", lambda text, n=itertools.count(): f"{text} {next(n)}")
    code, torn, _, _ = prepare(many(), "--to", "conversations", "--eval_share", 0.2, out="torn.json")
    assert code == 0 and len(leaks(torn)) > 10  # the check sees a leak where there is one


def test_a_file_for_eval(prepare):
    """Train loses the trees that begin as one of eval's; messages are joined within a file, and the slice is of train."""
    trees = [tree("a", node("?A  b", node("x"))), tree("b", node("?c", node("y")))]
    code, written, shown, _ = prepare({"t.jsonl": trees, "e.jsonl": [line("d", None, "?a b"), line("e", "d", "z")]}, "--to", "conversations")
    assert code == 0 and {split: threads(written, split) for split in written} == {"train": ["?c y"], "eval": ["?a b z"]}
    assert "\ntrain: 0 repeated, 1 also in eval dropped\n" in shown
    code, written, _, errors = prepare({"t.jsonl": [line("a", None), line("b", "d", "z")], "e.jsonl": [line("d", None)]}, "--to", "prompts",
                                       out="c.json")
    assert code == 2 and "train: no record is left (0 repeated, 1 also in eval dropped; t.jsonl: 1 trees" in errors
    assert "t.jsonl: 1 messages; left out: 1 without their parent" in errors
    code, written, shown, _ = prepare({"t.jsonl": many(8), "e.jsonl": trees}, "--to", "conversations", "--slices", out="b.json")
    assert code == 0 and len({record["tree"] for record in written["train"]}) == len({record["tree"] for record in written["eval"]}) == 2
    assert "t.jsonl: 8 trees, 2 in this slice, 0 in another state" in shown and "e.jsonl: 2 trees, 0 in another state" in shown


def test_all_kinds_hold_the_same_trees_out(prepare):
    """A tree of eval that gives no pairs keeps its beginning out of train all the same."""
    trees = [tree(name, node(f"?{name}", node("x", rank=0), node("y", rank=1))) for name in "ab"]
    held = [tree("c", node("?A", node("z"))), tree("d", node("?d", node("x", rank=0), node("y", rank=1)))]
    for kind in ("pairs", "conversations", "prompts"):
        code, written, _, _ = prepare({"t.jsonl": trees, "e.jsonl": held}, "--to", kind, out=f"{kind}.json")
        assert code == 0 and {record["tree"] for record in written["train"]} == {"b"}, kind


def test_slices_are_the_earlier_systems(prepare):
    """NumPy's default_rng(0) over the positions of the trees; 25, 40 and 35 %, none in two."""
    order = np.random.default_rng(0).permutation(10)  # 10 trees: 2, 4, 4
    assert order.tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]
    trees = [tree(f"t{i}", node(f"?{i}", node("x", rank=0), node("y", rank=1)), tree_state="ranking" if i == 7 else None) for i in range(10)]
    found = {}
    for kind in ("conversations", "pairs", "prompts"):
        code, written, shown, _ = prepare(trees, "--to", kind, "--slices", out=f"{kind}.json")
        assert code == 0
        found[kind] = list(dict.fromkeys(int(record["tree"][1:]) for record in written["train"]))
    assert found == {"conversations": [4, 6], "pairs": [2, 3, 5], "prompts": [9, 0, 8, 1]}  # t7 is in its place, and not ready
    assert "trees.jsonl: 10 trees, 4 in this slice, 0 in another state" in shown


def test_the_same_bytes_every_time(prepare, tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        with pytest.raises(json.JSONDecodeError):  # lines
            prepare(many(50), "--to", "pairs", "--eval_share", 0.2, out=name)
    content = (tmp_path / "a.jsonl").read_bytes()
    assert content == (tmp_path / "b.jsonl").read_bytes()
    assert {json.loads(line)["split"] for line in content.splitlines()} == {"train", "eval"}


# ------------------------------------------------------------------------------------------------ what is refused


def test_all_problems_at_once_with_their_places(prepare):
    files = {"a.jsonl": [tree("t", node("?a", {"role": "bot", "text": None}, message_id="m1")), line("m2", None), line("m1", "m2", "c"),
                         {"text": "d"}],
             "b.json": json.dumps([{"user_message_id": "m2", "parent_message_id": None, "role": "prompter", "text": "?e"}])}
    code, written, shown, errors = prepare(files, "--to", "prompts", "--eval_share", 1, "--min_quality", 2, "--top_k", 0, out="out.txt")
    assert (code, written, shown) == (2, None, "")
    assert errors.splitlines() == [
        "--out out.txt: expected a name that ends in .json or .jsonl, in a folder that exists",
        "--eval_share 1.0, --test_share 0.0: expected shares of 0 or more, together below 1",
        "--eval_share: eval has a file",
        "--min_quality 2.0: expected 0 to 1",
        "--top_k 0: expected 1 or more",
        "a.jsonl, line 1: 'role' 'bot', expected prompter or assistant",
        "a.jsonl, line 1: 'text' 'None', expected a string without half characters (lone \\ud800-\\udfff escapes)",
        "a.jsonl, line 3, message 'm1': this id is also at a.jsonl, line 1, message 'm1'; remove one of the two",
        "a.jsonl, line 4: none of the known formats (has: text); expected 'prompt' with a tree, 'message_id' and 'parent_id', or 'user_message_id' "
        "and 'parent_message_id'",
        "b.json, [0], message 'm2': this id is also at a.jsonl, line 2, message 'm2'; remove one of the two"]


@pytest.mark.parametrize("files, words, message", [
    ([line("a", None, deleted="false")], [], "message 'a': 'deleted' 'false', expected true, false or null"),
    ([line("a", None, review_result="false")], [], "message 'a': 'review_result' 'false', expected true, false or null"),
    ([*GOOD, line("b", "a", "d")], [], "trees.jsonl, line 3, message 'b': this id is also at trees.jsonl, line 2, message 'b'"),
    ([tree("t", node("?a", node("b", message_id="x"), node("c", message_id="x")))], [], "line 1, message 'x': this id is also at trees.jsonl"),
    ([line("a", "b"), line("b", "a", "c")], [], "trees.jsonl, line 1: its parents lead back to itself"),
    ([line("a", "a")], [], "trees.jsonl, line 1: its parents lead back to itself"),
    ([line(None, None)], [], "trees.jsonl, line 1: a message with 'replies' or without an id of its own"),
    ([line(7, None)], [], "trees.jsonl, line 1: a message with 'replies' or without an id of its own"),
    ([line("a", None, replies=[node("b")])], [], "trees.jsonl, line 1: a message with 'replies' or without an id"),
    ([line("a", 7)], [], "trees.jsonl, line 1, message 'a': 'parent_id' '7', expected a string"),
    ([*GOOD, line("d", "a", "\ud800")], [], "line 3, message 'd': 'text' '\\ud800', expected a string without half characters"),
    ([tree("t\udfff", node("?a", node("b")))], [], "trees.jsonl, line 1: 'message_tree_id' 't\\udfff', expected a string"),
    ([tree(["t"], node("?a", node("b")))], [], "trees.jsonl, line 1: 'message_tree_id' ['t'], expected a string"),
    ([*GOOD, line("d", "a", "x", rank="0")], [], "line 3, message 'd': 'rank' '0', expected a number (0 is best) or null"),
    ([*GOOD, line("d", "a", "x", rank=True)], [], "'rank' 'True', expected a number"),
    ([*GOOD, line("d", "a", "x", rank=float("nan"))], [], "'rank' 'nan', expected a number"),
    ([*GOOD, line("d", "a", "x", labels=[0.5])], ["--min_quality", 0.5], "line 3, message 'd': 'labels' '[0.5]', expected an object"),
    ([*GOOD, line("d", "a", "x", labels={"quality": "good"})], ["--min_quality", 0.5], "'labels' \"{'quality': 'good'}\", expected an object"),
    ([{"prompt": "plain", "completion": "b"}], [], "trees.jsonl, line 1: a str, expected a message"),
    ([tree("t", node("?a", "b"))], [], "trees.jsonl, line 1: a str, expected a message"),
    ([tree("t", {"role": "prompter", "text": "a", "replies": {}})], [], "'replies' '{}', expected a list of messages"),
    ([tree("t", {"role": "prompter", "replies": []})], [], "'text' 'None', expected a string"),
    ([{}], [], "trees.jsonl, line 1: none of the known formats (has: nothing)"),
    ({"a.jsonl": "{}\nnot json\n[1]\n"}, [], "a.jsonl, line 2: not JSON ("),
    ({"a.jsonl": "[1]\n"}, [], "a.jsonl, line 1: a list, expected an object"),
    ({"a.jsonl": b"\xff\n"}, [], "a.jsonl: cannot be read ('utf-8' codec"),
    ({"a.jsonl.gz": b"no gzip"}, [], "a.jsonl.gz: cannot be read"),
    ({"a.jsonl": ""}, [], "train: no record is left (0 repeated dropped; a.jsonl: 0 trees,"),
    (GOOD, ["--train", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
    (GOOD, ["--lang", "de"], "train: no record is left (0 repeated dropped; trees.jsonl: 1 trees, 0 in another state, 1 without a record"),
    (GOOD, ["--eval_share", 1e-9], "eval: no record is left (0 repeated dropped; trees.jsonl: 1 trees"),
    ({"a.jsonl": GOOD, "b.jsonl": GOOD}, [], "b.jsonl, line 1, message 'a': this id is also at a.jsonl, line 1, message 'a'; remove one of the two"),
    ({"a.jsonl": GOOD, "b.jsonl": GOOD}, ["--eval_share", 0.1], "--eval_share: eval has a file"),
    ({}, [], "no data: expected --train FILE"),
    (GOOD, ["--eval_share", "nan"], "--eval_share nan, --test_share 0.0: expected shares"),
    (GOOD, ["--eval_share", 0.5, "--test_share", 0.5], "together below 1"),
    (GOOD, ["--test_share", -0.1], "expected shares of 0 or more"),
    (GOOD, ["--to", "pairs"], "train: no record is left (0 repeated dropped; trees.jsonl: 1 trees, 0 in another state, 1 without"),
    (GOOD, ["--to", "pairs", "--top_k", 1], "--top_k 1: expected 2 or more"),
    (GOOD, ["--threads", "best", "--top_k", 3], "--top_k has no effect on conversations with --threads best"),
    (GOOD, ["--slices"], "trees.jsonl: 1 trees, 0 in this slice"),
    (GOOD, ["--tokenizer", "."], "--tokenizer .: "),
    (GOOD, ["--keep", "deleted"], "invalid choice: 'deleted'"),
    (GOOD, ["--thread", "best"], "unrecognized arguments: --thread best")])
def test_refused(prepare, files, words, message):
    code, written, shown, errors = prepare(files, "--to", "conversations", *words)
    assert (code, written, shown) == (2, None, "") and message in errors


def test_an_existing_file_is_never_overwritten(prepare, tmp_path):
    assert prepare([TREE], "--to", "prompts")[0] == 0
    before = (tmp_path / "out.json").read_bytes()
    code, _, _, errors = prepare([TREE], "--to", "pairs")
    assert (code, errors) == (2, "--out out.json: exists; move it away or choose another name\n") and (tmp_path / "out.json").read_bytes() == before


# ------------------------------------------------------------------------------------------------ the real files


def real(name):
    if not (SHARED / name).is_file():
        pytest.skip(f"no {SHARED / name}")
    return str(SHARED / name)


def counted(prepare, name, *words, out="real.json"):
    code, written, shown, errors = prepare({}, "--train", real(name), *words, out=out)
    assert (code, re.sub("counting tokens: .*", "", errors).strip()) == (0, "")  # its bar shows after 5 s, on a busy machine
    return written, shown


@pytest.mark.parametrize("kind, n, n_nested, n_slice", [("conversations", (534, 38), 319, 89), ("pairs", (240, 17), 118, 51),
                                                        ("prompts", (433, 25), 278, 98)])
def test_real_counts(prepare, kind, n, n_nested, n_slice):
    """The docstring's; the messages of the flat file add up to all 1248."""
    written, shown = counted(prepare, FLAT, "--to", kind, "--eval_share", 0.05)
    assert (len(written["train"]), len(written["eval"])) == n and f"real.json: {n[0]} train, {n[1]} eval\n" in shown
    assert not {record["tree"] for record in written["train"]} & {record["tree"] for record in written["eval"]}
    assert ": 118 trees, 0 in another state, 0 without a record\n" in shown and 1193 + 2 + 15 + 28 + 10 == 1248
    assert ": 1193 messages; left out: 2 without their parent, 15 deleted, 28 spam, 10 below one of these" in shown
    written, shown = counted(prepare, NESTED, "--to", kind, out="nested.json")
    assert len(written["train"]) == n_nested and ": 667 messages; left out: 4 synthetic, 13 below one of these" in shown
    assert len(counted(prepare, NESTED, "--to", kind, "--slices", out="slice.json")[0]["train"]) == n_slice


def test_real_seed_list(prepare):
    """74 trees, 7 of them not ready; two assistants in a row twice, once in a tree that is not; no ranks."""
    written, shown = counted(prepare, SEED, "--to", "conversations")
    assert len(written["train"]) == 139
    assert ": 74 trees, 7 in another state, 0 without a record\n" in shown
    assert ": 358 messages; left out: 1 with the role of the one before, 5 below one of these\n" in shown


def test_two_real_files_share_trees(prepare):
    """Four trees are in both: said by file and line, and nothing is written."""
    code, written, _, errors = prepare({}, "--train", real(FLAT), "--eval", real(NESTED), "--to", "prompts")
    assert code == 2 and written is None and errors.count("this id is also at") == 40 and f"{NESTED}, line " in errors and f"{FLAT}, line " in errors


def trees_of(name):
    """A real file as the trees that sft_causal.py reads."""
    lines = json.loads((SHARED / name).read_text()) if name == SEED else [json.loads(line) for line in (SHARED / name).read_text().splitlines()]
    if name == NESTED:
        return lines
    if name == SEED:
        lines = [{"message_id": m["user_message_id"], "parent_id": m["parent_message_id"], **m} for m in lines]
    return [record for _, _, record in sft_causal.grow_trees([("", "train", m) for m in lines], [])[0]]


@pytest.mark.parametrize("name", [FLAT, NESTED, SEED])
@pytest.mark.parametrize("paths, quality", [("best", 0), ("all", 0.5), pytest.param("all", 0, marks=pytest.mark.slow)])
def test_threads_are_those_of_sft_causal(prepare, name, paths, quality):
    """On the real files, with what sft_causal.py keeps kept; and without it, if what is left out is marked as deleted there."""
    real(name)
    flags = argparse.Namespace(oasst_paths=paths, oasst_lang=None, oasst_min_quality=quality)

    def wanted(left_out):
        found = []
        for record in trees_of(name):
            for message in prepare_oasst.everything([record["prompt"]]):
                message["deleted"] = bool(message.get("deleted") or left_out(message))
            if (record.get("tree_state") or "ready_for_export") == "ready_for_export":
                found += [messages for _, messages in sft_causal.tree_paths(record["prompt"], flags)]
        return found
    words = ["--to", "conversations", "--threads", paths, "--min_quality", quality]
    written, _ = counted(prepare, name, *words, "--keep", "synthetic", "spam")
    assert [record["messages"] for record in written["train"]] == wanted(lambda message: False)
    written, _ = counted(prepare, name, *words, out="strict.json")
    assert [record["messages"] for record in written["train"]] == wanted(
        lambda message: message.get("synthetic") or message.get("review_result") is False)


def test_the_scripts_read_what_is_written(prepare, tmp_path):
    chats, _ = counted(prepare, FLAT, "--to", "conversations", out="chats.json")
    for record in chats["train"][::3]:
        (_, messages), = sft_causal.to_conversations(record, argparse.Namespace(raw_prompt=False), "chatml")[0]
        assert messages == record["messages"]
    pairs, _ = counted(prepare, FLAT, "--to", "pairs", out="pairs.json")
    for template in ("{prompt}\n\n{reply}", "{thread}\n\n{reply}"):
        for record in pairs["train"][::3]:
            texts, _, key, wrong = clf.to_texts(record, "train", types.SimpleNamespace(loss="pairwise", template=template))
            assert wrong is None and len(texts) >= 2 and key == record["prompt"] + "\n\n"
    prompts, _ = counted(prepare, FLAT, "--to", "prompts", out="prompts.json")
    import transformers
    folder = write_babbler(tmp_path / "babbler")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    reader = rl_ppo.Prompts(argparse.Namespace(raw_prompt=False), folder, transformers.AutoConfig.from_pretrained(folder), tokenizer, problems := [])
    reward_model = types.SimpleNamespace(template="{thread}\n\n{reply}", reward_text=None, tokenizer=tokenizer, no_yes=None, limit=None)
    for record in prompts["train"][::5]:
        ids, text = reader.read(record)
        assert len(ids) > 3 and record["thread"].endswith(text)
        assert rl_ppo.reward_ids(reward_model, text, "Yes.", record, None) == tokenizer(record["thread"] + "\n\nYes.").input_ids
    assert problems == [] and {len(record.get("messages", [1])) % 2 for record in prompts["train"]} == {1}
