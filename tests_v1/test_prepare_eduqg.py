"""data/prepare_eduqg.py: a miniature in EduQG's layout, SciQ, plain text; nothing of a book on two sides; what it writes is read back."""

import json
import types

import prepare_eduqg
import pytest
from conftest import ROOT

import common_v1 as common


SHARED = ROOT.parent / "shared" / "data" / "sciq" / "SciQ_valid.csv"


def args_of(**changes):
    return types.SimpleNamespace(**{"data_format": "ni", "seed": 0, **common.TASK_FLAGS, **changes})


def item(n, **changes):
    return {"question": {"question_id": n, "question_text": f"Cells of kind {n} have", "question_choices": [f"wrong {n}", f"right {n}", "walls", "none"],
                         "cloze_format": f"Cells of kind {n} have ___", "normal_format": f"What do cells of kind {n} have?"},
            "answer": {"ans_text": "B", "ans_choice": 1}, "references_are_paraphrase": True, "bloom": None,
            "hl_sentences": f"Cells of kind {n} have right {n}.", "hl_context": f"First. <hl> Cells of kind {n} have right {n}. <hl> Last.", **changes}


def chapter(book, questions, number=1):
    return {"chapter": number, "intro": "x", "chapter_text": "y", "questions": questions, "summary": "", "keyterm": "", "bname": book}


BOOKS = [chapter(f"book_{b}", [item(10 * b + i) for i in range(3)], c) for b in range(10) for c in range(2)]


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """prepare({file: content}, flags) -> (exit code, stdout, stderr)."""
    def prepare(files, *words):
        monkeypatch.chdir(tmp_path)
        for name, content in files.items():
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        try:
            code = prepare_eduqg.main(list(words))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return prepare


def read(folder, kind="default"):
    problems, args = [], args_of(task_dir=str(folder / "tasks"), split_dir=str(folder / "splits" / kind))
    found = [(split, task, instance) for _, split, task, instance in common.read_tasks(args, common.find_tasks(args, problems), problems)]
    assert not problems
    return found


def test_three_tasks_of_a_miniature(prepare, tmp_path):
    code, shown, _ = prepare({"t.json": BOOKS[:12], "v.json": BOOKS[12:]}, "--eduqg", "t.json", "v.json", "--out", "eduqg", "--dev_share", "0.2", "--test_share", "0.2")
    assert code == 0 and "left out: none; 30 repeats" in shown and "10 books: 6 train, 2 dev, 2 test" in shown  # the second chapters repeat the first
    found = read(tmp_path / "eduqg")
    one = {task["Task"].split("_")[1]: (instance["input"], instance["output"]) for split, task, instance in found if " 41 " in instance["input"]}
    given = "Answer: right 41\nPassage: First. <hl> Cells of kind 41 have right 41. <hl> Last."
    assert one == {"qg": (given, ["What do cells of kind 41 have?"]),
                   "options": ("Question: What do cells of kind 41 have?\n" + given, ["wrong 41 | walls | none"]),
                   "qog": (given, ["What do cells of kind 41 have? Options: wrong 41 | walls | none"])}
    definition = {task["Task"].split("_")[1]: task["Definition"] for _, task, _ in found}
    assert definition["qog"] == ("You need to read the given passage from a chapter of a textbook and and construct a multi-choices educational question based on a provided answer "
                                 "about information in the passage. The question needs to be answerable from the passage and also include possible answer choices.")
    for split, task, _ in found:
        assert len(task["Positive Examples"]) == len(task["Negative Examples"]) == 2 and all(e["explanation"] for e in task["Positive Examples"])
    for kind in ("qg", "options", "qog"):
        assert {task["Task"].split("_")[1] for _, task, _ in read(tmp_path / "eduqg", kind)} == {kind}


def test_no_book_is_on_two_sides_and_shares_are_kept(prepare, tmp_path):
    prepare({"t.json": BOOKS}, "--eduqg", "t.json", "--out", "eduqg", "--dev_share", "0.2", "--test_share", "0.3")
    sides, counts = {}, {}
    for split, task, instance in read(tmp_path / "eduqg", "qg"):
        sides.setdefault(int(instance["input"].split("right ")[1].split("\n")[0]) // 10, set()).add(split)
        counts[split] = counts.get(split, 0) + 1
    assert all(len(side) == 1 for side in sides.values()) and counts == {"train": 15, "eval": 6, "test": 9}
    assert prepare_eduqg.split_groups({"a": 1, "b": 1}, {"dev": 0.5, "test": 0.0}) == prepare_eduqg.split_groups({"b": 1, "a": 1}, {"dev": 0.5, "test": 0.0})
    big = prepare_eduqg.split_groups({"a": 100, "b": 1, "c": 1}, {"dev": 0.1, "test": 0.1})
    assert sorted(big.values()) == ["dev", "test", "train"]  # however large the books are


def test_what_is_left_out_and_repeats_are_counted(prepare):
    empty = item(9)
    empty["question"]["question_choices"][1] = " "
    questions = [empty, item(1, hl_context="no marks"), item(2, hl_context=None), item(3, question={**item(3)["question"], "normal_format": None}), item(4), item(4)]
    code, shown, _ = prepare({"t.json": [chapter("a", questions), chapter("b", [item(7)]), chapter("c", [item(8)])]}, "--eduqg", "t.json", "--out", "o")
    assert code == 0 and "left out: 1 without a question, an answer or other options, 2 without one marked sentence; 1 repeats" in shown
    assert "Cells of kind 3 have" in json.dumps([i for _, _, i in read(prepare_eduqg.pathlib.Path("o"), "qg")])


@pytest.mark.parametrize("content, message", [
    ("{", "t.json: cannot be read"), ({}, "a dict, expected a list of chapters"), ([3], "[0]: expected an object with 'bname'"),
    ([chapter("a", [{}])], "[0], questions[0]: KeyError: 'question'"), ([chapter("a", [item(1, answer={"ans_choice": 9})])], "questions[0]: ValueError: answer 9 of the choices"),
    ([chapter("a", [item(1)])], "dev: no instance is left; 1 books")], ids=["json", "object", "number", "empty", "choice", "one book"])
def test_what_is_wrong_is_said(prepare, tmp_path, content, message):
    code, _, shown = prepare({"t.json": content}, "--eduqg", "t.json", "--out", "eduqg")
    assert code == 2 and message in shown and not (tmp_path / "eduqg").exists()


def test_nothing_of_the_user_is_deleted(prepare, tmp_path):
    (tmp_path / "eduqg.tmp").mkdir()
    (tmp_path / "eduqg.tmp" / "mine.txt").write_text("mine")
    code, _, shown = prepare({"t.json": BOOKS}, "--eduqg", "t.json", "--out", "eduqg")
    assert code == 2 and "eduqg.tmp: exists" in shown and (tmp_path / "eduqg.tmp" / "mine.txt").read_text() == "mine"


def test_the_first_hundred_test_instances_are_of_all_books(prepare, tmp_path):
    books = [chapter(f"book_{b}", [item(100 * b + i) for i in range(60)]) for b in range(12)]
    code, shown, _ = prepare({"t.json": books}, "--eduqg", "t.json", "--out", "eduqg", "--test_share", "0.4")
    found = [int(i["input"].split("right ")[1].split("\n")[0]) // 100 for split, _, i in read(tmp_path / "eduqg", "qg") if split == "test"]
    assert code == 0 and len(found) == 100 and len(set(found)) >= 4 and "the first 100 instances count" in shown


def test_flags(prepare, tmp_path):
    (tmp_path / "eduqg").mkdir()
    code, _, shown = prepare({"t.json": BOOKS}, "--eduqg", "t.json", "--out", "eduqg", "--dev_share", "0.7", "--test_share", "0.4", "--max_words", "-1")
    assert code == 2 and all(m in shown for m in ("--out eduqg: exists", "--dev_share 0.7 --test_share 0.4", "--max_words -1"))


@pytest.mark.parametrize("max_words, expected", [(0, "a b c <hl> D e. <hl> f g h"), (4, "c <hl> D e. <hl> f"), (2, "<hl> D e. <hl>"), (1, "<hl> D e. <hl>"), (7, "b c <hl> D e. <hl> f g h")])
def test_the_words_around_the_marked_sentence(max_words, expected):
    assert prepare_eduqg.around_marks("a b c <hl> D e. <hl> f g h", max_words) == expected


def test_words_left_on_one_side_go_to_the_other():
    assert prepare_eduqg.around_marks("<hl> D e. <hl> f g h i", 5) == "<hl> D e. <hl> f g h"
    assert prepare_eduqg.around_marks("f g h i <hl> D e. <hl>", 5) == "g h i <hl> D e. <hl>"


def test_sentences():
    assert prepare_eduqg.sentences('It is, e.g. this, by J. Smith. "No," she said. 3.5 is\nenough! Why? yes. B') == [
        "It is, e.g. this, by J. Smith.", '"No," she said.', "3.5 is enough!", "Why? yes.", "B"]


def test_prompts_from_a_book_are_the_training_prompts(prepare, tmp_path):
    text = "Cells have a wall that keeps out most things. Short one.\n\nWhat is a question that has more than eight words in it?\n\nA second long sentence ends here, with eight words."
    code, shown, _ = prepare({"b.txt": text}, "--text", "b.txt", "--out", "b.jsonl")
    assert code == 0
    first, second = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert (first["paragraph"], second["paragraph"]) == (1, 3) and first["answer"] == "Cells have a wall that keeps out most things."
    task = {"Task": "t", "Definition": prepare_eduqg.TASKS["qg"][1], "Positive Examples": [], "Negative Examples": []}
    given = "Answer: Cells have a wall that keeps out most things.\nPassage: <hl> Cells have a wall that keeps out most things. <hl> Short one."
    assert first["prompt"] == common.task_prompts(args_of(), "test", task, given, 10**6, len)[0][0]
    assert prepare({"b.txt": "Nothing here"}, "--text", "b.txt", "--out", "c.jsonl")[0] == 2


@pytest.mark.skipif(not SHARED.is_file(), reason="needs ../shared")
def test_sciq(prepare, tmp_path):
    code, shown, _ = prepare({}, "--sciq", str(SHARED), "--out", "sciq")
    assert code == 0 and "left out: 113 without a passage, 77 whose passage has not the answer; 0 repeats" in shown and "648 qg train, 81 qg dev, 81 qg test" in shown
    found = read(tmp_path / "sciq", "qg")
    passages = {split: {i["input"].split("Passage: ")[1].replace("<hl> ", "").replace(" <hl>", "") for s, _, i in found if s == split} for split in ("train", "eval", "test")}
    assert not passages["train"] & (passages["eval"] | passages["test"]) and not passages["eval"] & passages["test"]
    assert all(i["input"].count("<hl>") == 2 for _, _, i in found)
