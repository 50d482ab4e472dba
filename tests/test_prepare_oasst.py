"""data/prepare_oasst.py: a tree by hand, what is left out, real trees, mistakes."""

import json
import pathlib

import pytest
from conftest import SHARED, needs_shared

import clf
import prepare_oasst


def message(name, role, text, rank=None, *replies, **others):
    """A message of a nested tree."""
    found = {"message_id": name, "role": role, "text": text, "replies": list(replies), **others}
    return {**found, "rank": rank} if rank is not None else found


TREE = message(
    *("m1", "prompter", "Hi", None),
    message(
        *("m2", "assistant", "Bye.", 1),
        message("m5", "prompter", "Why?", None),
    ),
    message(
        *("m3", "assistant", "Hello!", 0),
        message(
            *("m6", "prompter", "How?", None),
            message("m7", "assistant", "So.", None),
            message("m8", "assistant", "Spam", None, review_result=False),
        ),
    ),
    message("m4", "assistant", "Well.", 2),
    message("m9", "assistant", "Gone", 3, deleted=True),
)


def prepare(records, to, *words, out="out.json"):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    pathlib.Path("trees.jsonl").write_text(lines)
    try:
        prepare_oasst.main(["--train", "trees.jsonl", "--to", to, "--out", out, *words])
    except SystemExit as stop:
        return stop.code
    return json.loads(pathlib.Path(out).read_text())["train"]


def test_the_records_of_a_tree():
    records = [{"prompt": TREE}]
    chats = []
    for record in prepare(records, "conversations", out="chats.json"):
        assert record["tree"] == "m1"
        roles = [turn["role"] for turn in record["messages"]]
        assert roles == (["user", "assistant"] * 2)[: len(roles)]
        chats.append([turn["content"] for turn in record["messages"]])
    # a question at the end that nobody has answered goes
    assert sorted(chats) == [["Hi", "Bye."], ["Hi", "Hello!", "How?", "So."], ["Hi", "Well."]]
    best = prepare(records, "conversations", "--threads", "best", out="best.json")
    assert [len(record["messages"]) for record in best] == [4]
    answers = {"replies": ["Hello!", "Bye.", "Well."], "thread": "Hi", "tree": "m1"}
    pairs = prepare(records, "pairs", out="pairs.json")
    assert pairs == [{"prompt": "Hi", **answers}]
    args = clf.parse_args(["--model_init_name", "x", "--loss", "pairwise"])
    clf.complete_flags(args, None, [])
    example = clf.to_example(args, "d", "train", pairs[0], "here", [])
    assert example.texts[0] == "Hi\n\nHello!"
    prompts = prepare(records, "prompts", out="prompts.json")
    assert {record["thread"] for record in prompts} == {
        "Hi",
        "User: Hi\n\nAssistant: Bye.\n\nUser: Why?",
        "User: Hi\n\nAssistant: Hello!\n\nUser: How?",
    }


def test_what_is_left_out(capsys):
    replies = [
        message("a", "assistant", "spam", 0, lang="en", review_result=False),
        message("b", "assistant", "bien", 1, lang="fr"),
        message("c", "assistant", "good", 2, lang="en"),
        message("d", "assistant", "fine", 3, lang="en"),
        message("e", "assistant", "same rank", 3, lang="en"),
        message("f", "prompter", "same role", 4, lang="en"),
        message("g", "assistant", "by a model", 5, lang="en", synthetic=True),
        message("h", "assistant", " ", 6, lang="en"),
    ]
    tree = {"prompt": message("r", "prompter", "Hi", None, *replies, lang="en")}
    unfinished = {"prompt": message("s", "prompter", "No"), "tree_state": "growing"}
    (record,) = prepare([tree, unfinished], "pairs", "--lang", "en")
    assert (record["chosen"], record["rejected"]) == ("good", "fine")
    shown = capsys.readouterr().out
    assert "1 roots of unfinished trees" in shown and "1 written by a model" in shown


def test_a_tree_is_on_one_side():
    trees = [{"prompt": message(f"r{i}", "prompter", f"Hi {i}", None)} for i in range(60)]
    for tree in trees:
        tree["prompt"]["replies"] = [message(None, "assistant", text) for text in ("a", "b")]
    found = prepare(trees, "conversations", "--eval_fraction", "0.3")
    assert 60 < len(found) < 110 and len(found) % 2 == 0


@pytest.mark.parametrize(
    "record, message",
    [
        ({"text": "x"}, "trees.jsonl, line 1: no 'prompt': take the export of trees"),
        ({"prompt": {"text": "x"}}, "KeyError: 'role'"),
        ({"prompt": {"text": 5, "role": "prompter"}}, "trees.jsonl, line 1: AttributeError"),
    ],
)
def test_mistakes(record, message, capsys):
    assert prepare([record], "prompts") == 2
    assert message in capsys.readouterr().err


@needs_shared
def test_real_trees():
    path = str(SHARED / "data" / "oasst" / "en_100_tree_first60.jsonl")
    for to, n in {"conversations": 319, "pairs": 118, "prompts": 278}.items():
        prepare_oasst.main(["--train", path, "--to", to, "--out", f"{to}.json"])
        assert len(json.loads(pathlib.Path(f"{to}.json").read_text())["train"]) == n
