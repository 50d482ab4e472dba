"""data/prepare_qa.py, prepare_translation.py and prepare_eduqg.py: records by hand, what is left
out, mistakes; SciQ."""

import json
import pathlib

import pytest
from conftest import SHARED, needs_shared

import prepare_eduqg
import prepare_qa
import prepare_translation

SCIQ = str(SHARED / "data" / "sciq" / "SciQ_valid.csv")


def question(text, *answers):
    return {"question": f" {text} ", "answers": [{"text": answer} for answer in answers]}


SQUAD = {
    "title": "Normandy",
    "paragraphs": [
        {"context": "Vikings came.", "qas": [question("Who?", " Vikings", "They", "They")]},
        {"context": "It rained.", "qas": [question("Who?")]},
    ],
}
TRIVIA = {"Question": "Where?", "Answer": {"Value": "York", "Aliases": ["York", "yorks"]}}
SCIENCE = {
    **{"question": "What moves?", "support": "", "correct_answer": "genes"},
    **{"distractor1": "a", "distractor2": "b", "distractor3": "c "},
}
WEBGPT = {"question": "Why?", "answer_0": "y [1]", "answer_1": "x", "score_0": 9, "score_1": "-10"}
FIRST = {"prompt": "Vikings came.\n\nWho?", "completion": "Vikings", "article": "Normandy"}


def prepare(module, content, *words, out="out.json"):
    pathlib.Path("in.json").write_text(json.dumps(content))
    pathlib.Path(out).unlink(missing_ok=True)
    try:
        module.main([*words, "--out", out])
    except SystemExit as stop:
        return stop.code
    return json.loads(pathlib.Path(out).read_text())


@pytest.mark.parametrize(
    "words, rows, expected",
    [
        ("squad", {"data": [SQUAD]}, [{**FIRST, "references": ["Vikings", "They"]}]),
        (
            "triviaqa",
            {"Data": [TRIVIA], "Domain": "Web"},
            [{"prompt": "Where?", "completion": "York", "references": ["York", "yorks"]}],
        ),
        (
            "webgpt",
            [WEBGPT, {**WEBGPT, "score_1": 9, "answer_1": "z"}, {**WEBGPT, "answer_1": "y [1]"}],
            [{"prompt": "Why?", "chosen": "y [1]", "rejected": "x"}],
        ),
    ],
)
def test_questions_by_hand(words, rows, expected):
    words = f"--train in.json --layout {words}".split()
    assert prepare(prepare_qa, rows, *words) == {"train": expected}


def test_sciq_by_hand():
    record = {"prompt": "It is so.\n\nWhat moves?", "completion": "genes", "references": ["genes"]}
    words = ["--layout", "sciq", "--train", "in.json"]
    found = prepare(prepare_qa, [{**SCIENCE, "support": " It is so.\n"}], *words)
    assert found == {"train": [{**record, "question": "What moves?"}]}


@pytest.mark.parametrize(
    "layout, row, message",
    [
        ("squad", {"title": "x"}, "KeyError: 'paragraphs'"),
        ("triviaqa", {**TRIVIA, "Question": " "}, "'Question' is empty"),
        ("sciq", {**SCIENCE, "support": None}, "AttributeError"),
        ("webgpt", {**WEBGPT, "score_0": "good"}, "could not convert string to float: 'good'"),
    ],
)
def test_questions_that_cannot_be_used(layout, row, message, capsys):
    assert prepare(prepare_qa, [row], "--layout", layout, "--train", "in.json") == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------ translation


def translate(*words):
    return prepare(prepare_translation, [], "--pairs", *words)


def test_both_directions_of_a_pair_in_the_language_of_the_source(capsys):
    pathlib.Path("p.tsv").write_text("nl\ten\nDag {x}.\t Hello.\nDoei.\t\nDag  {X}.\tHello.\n")
    there, back = translate("ted_trans_nl-en=p.tsv", "--skip_malformed")["train"]
    assert "dropped 1 rows; the first: p.tsv, row 3: 'en' is empty" in capsys.readouterr().out
    about = {"dataset": "ted_trans_nl-en", "source_lang": "nl", "target_lang": "en"}
    prompts = [
        words.format(language="Engels", text="Dag {x}.")
        for words in prepare_translation.ASK["nl"][1:]
    ]
    assert there["prompt"] in prompts and there == {**there, "completion": "Hello.", **about}
    assert "Dutch" in back["prompt"] and back["completion"] == "Dag {x}."


def test_every_language_asks_in_three_ways_and_names_all_others():
    ask = prepare_translation.ASK
    assert list(ask) == prepare_translation.LANGUAGES
    for code, (names, *wordings) in ask.items():
        assert len(set(names.split())) == 12 and len(set(wordings)) == 3, code
        for wording in wordings:
            assert wording.count("{language}") == wording.count("{text}") == 1


@pytest.mark.parametrize(
    "spec, message",
    [
        ("wmt_nl-xx=p.tsv", "wmt_nl-xx: expected a name such as wmt2019_zh-en"),
        ("wmt_nl-nl=p.tsv", "wmt_nl-nl: expected a name"),
        ("wmt_en-nl=p.tsv", "p.tsv: expected the columns en, nl, in this order"),
        (
            "wmt_nl-en=three.tsv",
            "three.tsv, row 1: 3 columns, expected 2; --skip_malformed drops it",
        ),
        ("wmt_nl-en", "Is a directory"),
    ],
)
def test_pairs_that_are_wrong(spec, message, capsys):
    pathlib.Path("p.tsv").write_text("nl\ten\nDag\tHello\n")
    pathlib.Path("three.tsv").write_text("a\tb\tc\n")
    assert translate(spec) == 2
    assert message in capsys.readouterr().err


# -------------------------------------------------------------------------------------- textbooks


def chapter(book, n, **changes):
    """With n questions of one book."""
    entries = []
    for i in range(n):
        choices = [f"wrong {i}", f" right {i} ", "none"]
        text = {"question_text": "Kinds have", "normal_format": f"What has {book} {i}?"}
        passage = ["a b c", f"<hl> {book} {i}. <hl>", "d"]
        entry = {"question": {**text, "question_choices": choices}, "hl_context": passage}
        entries.append({**entry, "answer": {"ans_choice": 1}, **changes})
    return {"bname": book, "questions": entries}


def make_books(chapters, *words):
    pathlib.Path("books.json").write_text(json.dumps(chapters))
    try:
        prepare_eduqg.main(["--eduqg", "books.json", "--out", "books", *words])
    except SystemExit as stop:
        return stop.code
    return {
        path.stem: json.loads(path.read_text()) for path in pathlib.Path("books/tasks").iterdir()
    }


def test_three_tasks_of_a_question_and_whole_books():
    tasks = make_books([chapter(f"b{i % 10}", 3 + i % 10) for i in range(20)])
    given = "Answer: right 2\nPassage: a b c <hl> b9 2. <hl> d"
    expected = {
        "qg": (given, "What has b9 2?"),
        "options": (f"Question: What has b9 2?\n{given}", "wrong 2 | none"),
        "qog": (given, "What has b9 2? Options: wrong 2 | none"),
    }
    for kind, (given, output) in expected.items():
        books = {}
        for side in ("train", "dev", "test"):
            name = f"eduqg_{kind}_{side}"
            for lists in (kind, "default"):
                path = pathlib.Path(f"books/splits/{lists}/{side}_tasks.txt")
                assert name in path.read_text().split()
            found = {i["input"]: i["output"] for i in tasks[name]["Instances"]}
            books[side] = {text.split("<hl> ")[1][:2] for text in found}
            if side == "train":
                assert found[given] == [output]
        assert sum(map(len, books.values())) == len(set.union(*books.values())) == 10
        assert min(map(len, books.values())) >= 1


def test_questions_that_are_left_out(capsys):
    unmarked = chapter("b0", 1, hl_context="no mark")
    lone = chapter("b1", 1, question={"question_text": "x", "question_choices": ["y"]})
    lone["questions"][0]["answer"]["ans_choice"] = 0
    books = [chapter(f"b{i}", 2) for i in range(3)]
    assert len(make_books([unmarked, lone, *books])) == 9
    assert "8 questions, of which 2 lack a mark or a choice" in capsys.readouterr().out
    assert make_books(books) == 2
    assert "books exists: move it away" in capsys.readouterr().err


@pytest.mark.parametrize(
    "chapters, message",
    [
        ([{"bname": "b"}], "books.json, row 1: KeyError: 'questions'"),
        ([chapter("b", 1, answer={"ans_choice": 9})], "IndexError: pop index out of range"),
        ([chapter("b", 3)], "too few books to train on"),
    ],
)
def test_books_that_are_wrong(chapters, message, capsys):
    assert make_books(chapters) == 2
    assert message in capsys.readouterr().err and not pathlib.Path("books").exists()


@pytest.mark.parametrize(
    "n, words",
    [
        (9, "a b c <hl> D e. <hl> f g h"),
        (7, "b c <hl> D e. <hl> f g h"),
        (4, "c <hl> D e. <hl> f"),
        (1, "<hl> D e. <hl>"),
    ],
)
def test_the_words_around_the_marked_sentence(n, words, monkeypatch):
    monkeypatch.setattr(prepare_eduqg, "MAX_WORDS", n)
    assert prepare_eduqg.around_marks("a b c <hl> D e. <hl> f g h") == words
    monkeypatch.setattr(prepare_eduqg, "MAX_WORDS", 4)
    # what is not needed on one side goes to the other
    assert prepare_eduqg.around_marks("a b c d <hl> E. <hl>") == "b c d <hl> E. <hl>"


@needs_shared
def test_sciq():
    prepare_qa.main(["--layout", "sciq", "--train", SCIQ, "--out", "out.json"])
    assert len(json.loads(pathlib.Path("out.json").read_text())["train"]) == 1000
