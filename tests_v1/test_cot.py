"""data/cot.py: the evaluator string by string, templates and paths by hand, splits as published, teachers that fail and go on, exports."""

import collections
import http.server
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import cot
import pytest
from conftest import ROOT, write_babbler

REAL = ROOT.parent / "shared" / "data" / "reasoning_teacher" / "data"
KEY = "sk-test-0123456789"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("words", ...) in an empty folder -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(cot.Server, "first_wait_sec", 0.01)

    def run(*words):
        try:
            code = cot.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


def real(*parts):
    path = REAL.joinpath(*parts)
    if not path.exists():
        pytest.skip("the shared data are not here")
    return path


def dataset(path, key, pairs, **more):
    """A wrapped data set; pairs: [(question, answer)] or [(question, answer, rationale)]."""
    names = ("question", "answer", "rationale")
    data = [{"sample_index": i, **dict(zip(names, pair))} for i, pair in enumerate(pairs)]
    pathlib.Path(path).write_text(json.dumps({"metadata": {"dataset_key": key, **more}, "data": data}))


def completions(path, rows, key="multiarith", template="zs_cot", **meta):
    """A completion data set; rows: [(sample_index, completion_index, question, answer, reasoning or None, completion, more keys)]."""
    data = collections.defaultdict(list)
    for i, c, question, answer, reasoning, completion, *more in rows:
        row = {"sample_index": i, "completion_index": c, "question": question, "answer": answer, "prompt": "p", "completion": completion}
        data[str(i)].append({**row, **({} if reasoning is None else {"reasoning_completion": reasoning}), **(more[0] if more else {})})
    meta = {"base_model": "big", "dataset_key": key, "completion_key": "zs_cot", "finetune_key": None, "train_key": None, "epoch": None,
            "prediction_template": template, **meta}
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metadata": meta, "data": data}))


def value(path):
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------ the evaluator

# (data set, template, gold): what is right by both rules, by neither, by the corrected rule alone, by the earlier system's alone
FIXTURES = {
    ("aqua", "zs", "B"): (
        ["B", " B.", "(B)", "B) 12", "The answer is (B).", "is B, not C", "b or B", "[B]", "x=3,B", "\nB\n"],
        ["", "b", "A", "C or B", "A person takes B", "F", "12", "AB", "(D) since B is wrong"],
        ["Answer: B", "Adding gives B", "Choose B", "CO2, so B"], ["Because it is late", "Both", "B2", "Bread, so C"]),
    ("commonsense_qa", "ft_cot_token", "B"): (
        ["A is 3. --> B", "C --> (B)", "--> B --> C", "A or C, so B"], ["B --> C", "B, so -->", "A B C"], ["--> Answer B", "B, Done"], ["--> Bah"]),
    ("date_understanding", "zs", "F"): (
        ["F", "(F)", "F.", "so F, then A", "f or F", "05/01/2021 (F)", "Feb 1, so (F)", "{F}"],
        ["", "A", "E or F", "G", "f", "(A) F", "05/01/2021", "AF"],
        ["April, so F", "Dec 3: F", "Because F", "Every day F"], ["Friday", "Feb", "Fifth of May", "Four, so C"]),
    ("date_understanding", "fs_cot", "F"): (
        ["Today is A. The answer is F.", "The answer is (F).", "A, B, F"],
        ["F. The answer is A.", "F or A", "The answer is"], ["F on Dec 3"], ["A, Friday"]),
    ("tracking_shuffled_objects", "zs", "C"): (
        ["C", "(C)", "C.", "so C and B", "c, C", "the (C) one", "D or C", "blue ball C", "C C C"],
        ["", "c", "A", "B or C", "D", "(A) C", "blue", "ACC"],
        ["Alice has it: C", "Bob: C", "At the end (C)", "Blue ball, so C"], ["Claire has it", "Claire and Bob", "C3", "Catch: B"]),
    ("tracking_shuffled_objects", "ft_cot_natural", "C"): (
        ["A. Therefore, the answer is C", "B C"], ["C. Therefore, the answer is A"], ["C and Bob"], ["Therefore the answer is A, Claire"]),
    ("svamp", "zs", "5.0"): (
        ["5", "5.0", "5.00", " 5.", "$5", "5 apples", "05", "+5", "it is 5, then 6", "5.0000001", "x=5", "(5)", ".5"],
        ["", "five", "-5", "15", "6 or 5", "5.1", "5,000", "5.00001", "0.5", "3-5", "5.5.5"], [], []),
    ("addsub", "ft_cot_token", "5"): (["2 + 3 = 5 --> 5", "--> 5 6", "1 2 5"], ["5 --> 6", "so 5, not 6", "5 -->"], [], []),
    ("gsm8k", "zs", "1,000"): (
        ["1000", "1,000", "$1,000.", "1000 men", "is 1000 or 2", "=1000", "1000-7", "10,00"],
        ["", "100", "-1000", "2 or 1000", "1 000", "one thousand", "1000.5", "10000"], ["1000.0", "1,000.00", "01000", "1000.0000001"], []),
    ("multiarith", "ft_cot_token", "5"): (
        ["7 - 2 = 5 --> 5", "--> 5", "2 3 5", "6 --> 5 or 6"], ["5 --> 6", "5 6", "--> -5", "5 -->"], ["--> 5.0", "2, 5.00"], []),
    ("coin_flip", "zs", "no"): (
        ["no", "No.", "NO", "'no'", "no, yes", "So: no", "is\nno", "\"No\"", "no:yes", "tails,no", "\tno"],
        ["", "yes", "yes, no", "nope", "not", "no!", "(no)", "no;", "no-one", "know", "n o", "yes\nno", "heads"], [], []),
    ("strategy_qa", "ft_cot_token", "Yes"): (["no --> yes", "no yes", "--> YES."], ["yes --> no", "yes no", "yes -->"], [], []),
    ("last_letter_concatenation", "zs", "yajo"): (
        ["yajo", "yajo.", " y a j o", "\"yajo\"", "'yajo'\n", "y.a.j.o", "ya jo", "\tyajo.."],
        ["", "Yajo", "yajo!", "yajo, so", "is yajo", "yaj", "yajoo", "y-a-j-o", "(yajo)", "yajo yajo"], [], []),
    ("last_letter_concatenation", "ft_cot_token", "yajo"): (
        ["y, a, j, o --> yajo", "-->yajo.", "yajo", "z --> \"yajo\"", "--> y a j o"],
        ["--> so yajo", "yajo --> yaj", "so yajo", "-->", "yajo -->"], [], []),
    ("last_letter_concatenation", "fs_cot", "yajo"): (["The answer is yajo.", "y a. The answer is yajo"], ["The answer is: yajo"], [], []),
}


def test_evaluator_fixtures_have_thirty_strings_of_each_kind():
    counts = collections.Counter()
    for (key, _, _), texts in FIXTURES.items():
        counts[cot.DATASETS[key]["kind"]] += sum(map(len, texts))
    assert set(counts) == set(cot.KINDS) and min(counts.values()) >= 30, counts


@pytest.mark.parametrize("key, template, gold", FIXTURES)
def test_evaluator(key, template, gold):
    for texts, expected in zip(FIXTURES[key, template, gold], ((True, True), (False, False), (True, False), (False, True))):
        for text in texts:
            found = tuple(cot.judge(key, template, text, gold, compat)["correct"] for compat in (False, True))
            assert found == expected, (text, found)


def test_contains_answer_and_correct_format():
    """The candidates behind the prefix if it is there, else all; a template without a prefix has no format to miss."""
    def judged(template, text):
        return tuple(cot.judge("svamp", template, text, "7").values())
    assert judged("ft_cot_token", "7 --> 8 or 7") == (False, True, True)
    assert judged("ft_cot_token", "7 --> 8") == (False, False, True)
    assert judged("ft_cot_token", "7, so 8") == (False, True, False)
    assert judged("zs", "8, not 7") == (False, True, True) and judged(None, "none") == (False, False, True)
    meta = {"dataset_key": "svamp", "prediction_template": "zs"}
    rows = [{"completion": "7", "answer": "7", "finish_reason": "stop"}, {"completion": "8", "answer": "7", "finish_reason": "length"},
            {"completion": "7", "answer": "7"}]
    assert cot.summary(meta, rows) == {"n": 3, "accuracy": 2 / 3, "contains_answer": 2 / 3, "correct_format": 1, "complete": 0.5}
    assert cot.summary(meta, rows[2:])["complete"] is None  # nobody said how it ended


@pytest.mark.parametrize("key, answer", [("svamp", "five"), ("svamp", ""), ("gsm8k", "3 or 4"), ("aqua", "F"), ("aqua", "b"), ("coin_flip", "maybe"),
                                         ("last_letter_concatenation", " . "), ("svamp", 5), ("aqua", None)])
def test_gold_answers_of_another_kind_are_refused(key, answer):
    with pytest.raises(ValueError, match="expected"):
        cot.gold_value(key, answer)


# ------------------------------------------------------------------------------------------------ templates, paths

Q, A, R = "How many? ", " 5", " 2 + 3.\n"
GOLDEN = {
    ("ft_token", "encoder_decoder"): ("How many?", "5"),
    ("ft_token", "decoder"): ("How many? ###", " 5"),
    ("ft_token", "openai"): ("How many?\n\n###\n\n", " 5 END"),
    ("ft_natural", "encoder_decoder"): ("Q: How many?", "5"),
    ("ft_natural", "decoder"): ("Q: How many?\n\nA:", " 5"),
    ("ft_natural", "openai"): ("Q: How many?\n\nA:", " 5 END"),
    ("ft_cot_token", "encoder_decoder"): ("How many?", "2 + 3. --> 5"),
    ("ft_cot_token", "decoder"): ("How many? ###", " 2 + 3. --> 5"),
    ("ft_cot_token", "openai"): ("How many?\n\n###\n\n", " 2 + 3.\n\n-->\n\n5 END"),
    ("ft_cot_natural", "decoder"): ("Q: How many?\n\nA: Let's think step by step.\n\n", " 2 + 3.\n\nTherefore, the answer is 5"),
    ("ft_cot_natural", "openai"): ("Q: How many?\n\nA: Let's think step by step.\n\n", " 2 + 3.\n\nTherefore, the answer is 5 END"),
    ("zs", "decoder"): ("Q: How many?\n\nA:", None),
    ("zs", "encoder_decoder"): ("question: How many?", None),
    ("zs_cot", "decoder"): ("Q: How many?\nA: Let's think step by step.", None),
    ("zs_cot", "step 2"): ("Q: x\nA: Let's think step by step.2 + 3.\nTherefore, the answer is", None),
    ("fs_cot", "decoder"): ("Q: {a}?\nA: 1.\nQ: How many?\nA:", None),
    ("fs_cot", "encoder_decoder"): ("Q: {a}?\nA: 1.\nQ: How many?\nA:", None),
}


def test_templates():
    row = {"question": Q, "answer": A, "reasoning_completion": R, "reasoning_prompt": "Q: x\nA: Let's think step by step."}
    found = {(name, family): cot.render(name, family, row, "Q: {a}?\nA: 1.") for name, shapes in cot.TEMPLATES.items() for family in shapes
             if family != "prefix"}
    assert found == GOLDEN
    assert cot.render("ft_cot_natural", "decoder", row, compat=True)[1] == " 2 + 3.\n\nTherefore the answer is 5"
    assert cot.render("ft_token", "decoder", {"question": "{q} {0} {", "answer": "}"}) == ("{q} {0} { ###", " }")  # braces are text


def test_paths():
    assert str(cot.completion_path("saved", "text-davinci-002", "zs_cot", "aqua")) == "saved/completion_data/B_text-davinci-002__C_zs_cot/D_aqua.json"
    assert str(cot.completion_path(".", "curie", "ft_cot", "svamp", "ft_cot", 3)) == "completion_data/B_curie__C_ft_cot/D_svamp__T_ft_cot__E_003.json"
    assert cot.completion_path("", "t5", "ft", "aqua", epoch=0).name == "D_aqua__E_000.json"


# ------------------------------------------------------------------------------------------------ make


def test_made_sets(run):
    code, out, _ = run("make", "coin_flip", "--n", 300, "--rationale", "--out", "new/c.json")
    samples = value("new/c.json")["data"]
    assert code == 0 and "300 samples, 300 with a rationale" in out and len({s["question"] for s in samples}) == 300
    assert [s["sample_index"] for s in samples] == list(range(300)) and value("new/c.json")["metadata"] == {"dataset_key": "coin_flip"}
    for sample in samples:
        acts = re.fullmatch(r'A coin is heads up\. ((?:[A-Z][a-z]+ (?:flips|does not flip) the coin\. ){4})Is the coin still heads up\? '
                            r'Note that "flip" here means "reverse"\.', sample["question"])[1]
        assert len(set(re.findall("[A-Z][a-z]+", acts))) == 4
        assert sample["answer"] == ("yes" if acts.count("flips") % 2 == 0 else "no")
        states = re.findall("(heads|tails) up", sample["rationale"])  # the state after each person, by counting flips up to there
        flips = [word == "flips" for word in re.findall("flips|does not", acts)]
        assert states == ["heads", *(["heads", "tails"][sum(flips[: i + 1]) % 2] for i in range(4))]
    assert 120 < sum(s["answer"] == "yes" for s in samples) < 180
    first = pathlib.Path("new/c.json").read_bytes()
    run("make", "coin_flip", "--n", 300, "--rationale", "--out", "again.json")
    run("make", "coin_flip", "--n", 300, "--rationale", "--seed", 1, "--out", "other.json")
    assert first == pathlib.Path("again.json").read_bytes() != pathlib.Path("other.json").read_bytes()
    assert run("make", "last_letter_concatenation", "--n", 50, "--names", 2, "--out", "l.json")[0] == 0
    for sample in value("l.json")["data"]:
        a, b = re.fullmatch(r'Take the last letters of each words in "(\w+) (\w+)" and concatenate them\.', sample["question"]).groups()
        assert sample["answer"] == a[-1] + b[-1] and "rationale" not in sample
    question, answer, rationale = cot.last_letters(["Amy", "Bob"], None)
    assert (answer, rationale) == ("yb", 'Amy ends in y. Bob ends in b. Together: yb.')
    assert len(set(cot.NAMES)) == len(cot.NAMES) > 250 and all(re.fullmatch("[A-Z][a-z]+", name) for name in cot.NAMES)


RAW = {  # data set: (file name, content, [(question, answer, rationale)])
    "multiarith": ("a.json", [{"iIndex": 0, "sQuestion": " Two and 3? ", "lSolutions": [5.0]}], [("Two and 3?", "5", None)]),
    "single_eq": ("a.json", [{"sQuestion": "A half?", "lSolutions": [0.5]}, {"sQuestion": "Two?", "lSolutions": [2.0]}],
                  [("A half?", "0.5", None), ("Two?", "2.0", None)]),
    "addsub": ("a.json", [{"sQuestion": "One?", "lSolutions": [1]}], [("One?", "1", None)]),
    "svamp": ("a.json", [{"Body": "Ann has 3 pens. ", "Question": "How many? ", "Answer": 3.0}], [("Ann has 3 pens. How many?", "3.0", None)]),
    "gsm8k": ("a.jsonl", [{"question": "How much? ", "answer": "He pays 500 + 500.\n#### 1,000"}], [("How much? ", "1,000", "He pays 500 + 500.")]),
    "aqua": ("a.jsonl", [{"question": "2 + 2? ", "options": ["A)3", "B) 4 ", "C)5", "D)6", "E)7"], "correct": "B", "rationale": "Add."}],
             [("2 + 2? Answer choices: (A) 3, (B) 4, (C) 5, (D) 6, (E) 7.", "B", "Add.")]),
    "commonsense_qa": ("a.jsonl", [{"answerKey": "A", "question": {"stem": "Where? ", "choices": [
        {"label": "A", "text": "sea"}, {"label": "B", "text": "sky"}]}}], [("Where? Answer choices: (A) sea, (B) sky.", "A", None)]),
    "strategy_qa": ("a.json", {"examples": [{"input": "Do fish swim?", "target_scores": {"Yes": 1, "No": 0}, "target": "Yes. They have fins."}]},
                    [("Do fish swim?", "Yes", "They have fins.")]),
    "tracking_shuffled_objects": ("a.json", {"name": "three_objects", "examples": [
        {"input": "Al has the", "target_scores": {"red ball.": 0, "blue ball.": 1, "pink ball.": 0}}]},
        [("Al has the\nWhich choice is true? Answer choices: (A) red ball, (B) blue ball, (C) pink ball.", "B", None)]),
    # RandomState(0).permutation(3) is [2, 1, 0], then [2, 0, 1]
    "date_understanding": ("a.json", {"examples": [{"input": "Today?", "target_scores": {"x": 1, "y": 0, "z": 0}},
                                                   {"input": "When?", "target_scores": {"x": 0, "y": 1, "z": 0}}]},
                           [("Today?\nWhich choice is true? Answer choices: (A) z, (B) y, (C) x.", "C", None),
                            ("When?\nWhich choice is true? Answer choices: (A) y, (B) z, (C) x.", "A", None)]),
    "coin_flip": ("a.json", {"examples": [{"question": "Heads?", "answer": "yes"}]}, [("Heads?", "yes", None)]),
    "last_letter_concatenation": ("a.json", [{"question": "Ann?", "answer": "n", "rationale": "n."}], [("Ann?", "n", "n.")]),
}


@pytest.mark.parametrize("key", RAW)
def test_public_layouts(run, key):
    name, content, expected = RAW[key]
    text = "".join(json.dumps(row) + "\n" for row in content) if name.endswith("l") else json.dumps(content)
    pathlib.Path(name).write_text(text)
    code, out, err = run("make", key, "--input", name, "--out", "new.json")
    assert code == 0 and f"the public {key} has" in out, err
    assert [(s["question"], s["answer"], s.get("rationale")) for s in value("new.json")["data"]] == expected
    assert run("make", key, "--input", "new.json", "new.json", "--out", "twice.json")[0] == 0  # the wrapped form is read, and files are joined
    assert [s["sample_index"] for s in value("twice.json")["data"]] == list(range(2 * len(expected)))


def test_samples_keep_their_own_index(run):
    """Splits and completions go by it."""
    rows = [{"sample_index": i, "question": f"q{i}", "answer": "1"} for i in (7, 3, 12)]
    pathlib.Path("a.json").write_text(json.dumps({"metadata": {"dataset_key": "svamp"}, "data": rows}))
    pathlib.Path("new.json.tmp").write_text("mine")
    code, out, _ = run("make", "svamp", "--input", "a.json", "--out", "new.json")
    assert code == 0 and "numbered anew" not in out and value("new.json")["data"] == rows and pathlib.Path("new.json.tmp").read_text() == "mine"
    code, out, _ = run("make", "svamp", "--input", "a.json", "a.json", "--out", "two.json")
    assert code == 0 and "samples are numbered anew, 0 to 5" in out and [s["sample_index"] for s in value("two.json")["data"]] == list(range(6))


@pytest.mark.parametrize("key", ["coin_flip", "multiarith", "date_understanding"])
def test_real_files_come_back_byte_for_byte(run, key):
    path = real("dataset", f"{key}.json")
    pathlib.Path("list.json").write_text(json.dumps([{k: s[k] for k in ("question", "answer")} for s in value(path)["data"]]))
    for source in (path, "list.json"):
        out = f"{pathlib.Path(source).stem}.out.json"
        code, shown, _ = run("make", key, "--input", source, "--out", out)
        assert code == 0 and pathlib.Path(out).read_bytes() == path.read_bytes()
    assert ("repeated: 20" in shown) == (key == "multiarith")


def test_order_of_the_choices_is_the_published_one(run):
    """The public questions, their choices put back into the order before the draw: the right one stands first in all but a few, as in
    BIG-bench's file; read as a raw file they give the public questions again."""
    path, draw, raw, n_first = real("dataset", "date_understanding.json"), np.random.RandomState(0), [], 0
    for sample in value(path)["data"]:
        text, choices = sample["question"].split("\nWhich choice is true? Answer choices: ")
        choices = re.split(r"(?:, )?\([A-F]\) ", choices[:-1])[1:]
        order = draw.permutation(len(choices))
        raw.append({"input": text, "target_scores": {choices[i]: int("ABCDEF"[i] == sample["answer"]) for i in order}})
        n_first += "ABCDEF"[order[0]] == sample["answer"]
    assert n_first == 364
    pathlib.Path("task.json").write_text(json.dumps({"examples": raw}))
    assert run("make", "date_understanding", "--input", "task.json", "--out", "out.json")[0] == 0
    assert value("out.json") == value(path)


# ------------------------------------------------------------------------------------------------ split


@pytest.mark.parametrize("key, sizes", {"single_eq": (356, 152), "addsub": (276, 119), "multiarith": (420, 180), "gsm8k": (7473, 1319),
                                        "aqua": (10000, 254), "svamp": (700, 300), "tracking_shuffled_objects": (525, 225),
                                        "date_understanding": (258, 111), "coin_flip": (350, 150), "last_letter_concatenation": (350, 150),
                                        "commonsense_qa": (9741, 1221), "strategy_qa": (1603, 687)}.items())
def test_split_sizes_of_the_table(run, key, sizes):
    size, answer = cot.DATASETS[key]["size"], {"yes/no": "no", "word": "x"}.get(cot.DATASETS[key]["kind"])
    answer = answer or ("A" if "-" in cot.DATASETS[key]["kind"] else "1")
    dataset("d.json", key, [(f"Question {i}?", answer) for i in range(size)])
    code, out, _ = run("split", "--dataset", "d.json", "--out", "s.json")
    split = value("s.json")
    assert code == 0 and (len(split["train"]), len(split["test"])) == sizes and f"{sizes[0]} train, {sizes[1]} test" in out
    assert all(part == sorted(set(part)) for part in split.values()) and not set(split["train"]) & set(split["test"])
    if sizes[0] + sizes[1] < size:
        assert set(split["train"]) <= set(range(97467)) and split["test"] == list(range(97467, 97721))
        assert split["train"] == sorted(np.random.RandomState(0).permutation(97467)[:10000].tolist())
    elif "test_last" in cot.DATASETS[key]:
        assert split["train"] == list(range(sizes[0]))


@pytest.mark.parametrize("key", ["coin_flip", "multiarith", "date_understanding"])
def test_random_split_is_the_published_file_byte_for_byte(run, key):
    code, _, err = run("split", "--dataset", real("dataset", f"{key}.json"), "--out", "s.json")
    assert code == 0 and pathlib.Path("s.json").read_bytes() == real("split", f"{key}__default.json").read_bytes()
    assert ("WARNING: 5 test questions are also in train" in err) == (key == "multiarith")


@pytest.mark.parametrize("key, groups, torn", [("multiarith", 120, 0), ("date_understanding", 38, 2)])
def test_template_split_keeps_templates_together(run, key, groups, torn):
    """Nothing of a template on both sides. The published template splits tear none of our groups, or two of date_understanding."""
    path = real("dataset", f"{key}.json")
    code, out, _ = run("split", "--dataset", path, "--kind", "template", "--out", "s.json")
    split, samples = value("s.json"), value(path)["data"]
    assert code == 0 and f"templates: {groups}" in out and 0.66 < len(split["train"]) / len(samples) <= 0.7
    for sides, expected in ((split, 0), (value(real("split", f"{key}__template.json")), torn)):
        of = collections.defaultdict(set)
        for side, part in sides.items():
            for i in part:
                of[cot.template_of(samples[i]["question"])].add(side)
        assert sum(len(found) > 1 for found in of.values()) == expected
    assert pathlib.Path("s.json").read_text() == json.dumps(split)  # on one line, as the published ones


def test_template_of():
    assert cot.template_of("Ann has 3 pens. How many?") == cot.template_of("Bob has 1,200 pens. Why?") == "N has N pens"
    assert cot.template_of("She is on her bike.") == cot.template_of("He is on his bike.")
    assert cot.template_of("Today is 4/5/1999. What is it?\nWhich choice is true? Answer choices: (A) x, (B) y.") == "N is N"
    assert cot.template_of("Ann has pens. Why?") != cot.template_of("Ann has cups. Why?")


def test_split_flags(run):
    dataset("d.json", "svamp", [(f"Is it {i}?", "1") for i in range(20)])
    run("split", "--dataset", "d.json", "--out", "a.json")
    run("split", "--dataset", "d.json", "--test_last", 5, "--out", "b.json")
    run("split", "--dataset", "d.json", "--train_n", 8, "--seed", 3, "--out", "c.json")
    a, b, c = map(value, ("a.json", "b.json", "c.json"))
    assert b == {"train": list(range(15)), "test": list(range(15, 20))}
    assert c == {"train": sorted(np.random.RandomState(3).permutation(a["train"])[:8].tolist()), "test": a["test"]}
    dataset("g.json", "gsm8k", [("One?", "1")] * 9)
    code, _, err = run("split", "--dataset", "g.json", "--out", "x.json")
    assert code == 2 and "g.json: 9 samples; the published split of gsm8k, the last 1319 for test, is of 8792: say --test_last N" in err
    assert run("split", "--dataset", "g.json", "--test_last", 3, "--out", "x.json")[0] == 0
    code, _, err = run("split", "--dataset", "d.json", "--kind", "template", "--out", "y.json")
    assert code == 2 and "templates: 1" in err and not pathlib.Path("y.json").exists()
    for words in (["--train_n", "15"], ["--train_n", "0"], ["--train_n", "-1"], ["--test_last", "20"], ["--test_last", "0"], ["--test_last", "-1"]):
        code, _, err = run("split", "--dataset", "d.json", *words, "--out", "y.json")
        assert code == 2 and "d.json: 20 samples give" in err, words


# ------------------------------------------------------------------------------------------------ teach

SUMS = [(f"What is {i} + {i}?", str(2 * i)) for i in range(6)]


class Stub:
    """An OpenAI-compatible server in a thread; `answer(prompt, n)` -> (status, headers, body) of request n, or None: it hangs."""

    def __init__(self, answer, path="/v1/completions"):
        self.asked, self.headers, self.hang = [], [], threading.Event()
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.asked.append(body)
                stub.headers.append(dict(self.headers))
                found = answer(body.get("prompt") or body["messages"][-1]["content"], len(stub.asked))
                if found is None:
                    stub.hang.wait(20)
                    return
                status, headers, reply = found
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                for name, text in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}{path}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def prompts(self):
        return [body.get("prompt") or body["messages"][-1]["content"] for body in self.asked]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hang.set()
        self.server.shutdown()
        self.server.server_close()


def reply(text, finish="stop"):
    return 200, {}, {"choices": [{"text": text, "message": {"content": text}, "finish_reason": finish}]}


def sums(prompt, n):
    """The right rationale, then the right answer."""
    i = int(re.search(r"What is (\d+)", prompt)[1])
    return reply(f" It is {2 * i}.\nQ: What") if prompt.endswith("step.") else reply(f" {2 * i}.", "length")


DONE = "out/completion_data/B_gpt__C_zs_cot/D_multiarith.json"


def teach(url, *words, method="zs_cot"):
    return ["teach", "--dataset", "d.json", "--method", method, "--server", url, "--model", "org/gpt", "--root", "out", *words]


def test_server_in_two_steps_with_a_key_and_a_limit(run, tmp_path, monkeypatch):
    """429 with Retry-After, 500 and a lost connection are tried again; the key comes from the environment and lands nowhere."""
    dataset("d.json", "multiarith", SUMS)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    first = {1: (429, {"Retry-After": "0.02"}, {"error": f"slow down, {KEY}"}), 2: (500, {}, b"oops"), 3: (200, {"Content-Encoding": "x"}, b"")}

    def answer(prompt, n):
        return sums(prompt, n) if n > 2 else first[n]

    with Stub(answer) as stub:
        code, out, err = run(*teach(stub.url, "--workers", 1))
    assert code == 0 and "accuracy 100.00" in out and "6 completions; ended by length 6" in out
    assert "HTTP 429" in err and "waiting 0.02 s, then attempt 2 of 9" in err and "HTTP 500 oops; waiting 0.02 s" in err  # 0.01 x 2
    assert len(stub.asked) == 2 + 12 and {headers["Authorization"] for headers in stub.headers} == {f"Bearer {KEY}"}
    assert [(body["model"], body["max_tokens"], body["temperature"], body["stop"]) for body in stub.asked[-7:-5]] == \
        [("org/gpt", 128, 0.0, ["\nQ:"])] * 2
    whole = value(DONE)
    assert whole["metadata"] == {
        "base_model": "gpt", "dataset_key": "multiarith", "completion_key": "zs_cot", "finetune_key": None, "train_key": None, "epoch": None,
        "prediction_template": "zs_cot", "model": "org/gpt", "teacher": "completions", "family": "decoder", "seed": 0, "temperature": 0.0,
        "max_tokens": 128, "reasoning_temperature": 0.0, "reasoning_max_tokens": 128}
    assert whole["data"]["3"] == [{
        "sample_index": 3, "completion_index": 0, "question": "What is 3 + 3?", "answer": "6",
        "reasoning_prompt": "Q: What is 3 + 3?\nA: Let's think step by step.", "reasoning_completion": " It is 6.", "reasoning_finish_reason": "stop",
        "prompt": "Q: What is 3 + 3?\nA: Let's think step by step.It is 6.\nTherefore, the answer is", "completion": " 6.",
        "finish_reason": "length"}]
    assert list(whole["data"]) == list("012345") and not list(tmp_path.glob("**/*.part"))
    assert KEY not in err + out and not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_killed_and_resumed_asks_no_row_twice(run, tmp_path):
    """The process is killed in the second step; what was answered, in both steps, is not asked again."""
    dataset("d.json", "multiarith", SUMS)
    with Stub(lambda prompt, n: sums(prompt, n) if n <= 8 else None) as stub:
        process = subprocess.Popen([sys.executable, ROOT / "data" / "cot.py", *teach(stub.url, "--workers", "1")], cwd=tmp_path,
                                   stderr=subprocess.DEVNULL)
        while len(stub.asked) < 9:
            assert process.poll() is None
            threading.Event().wait(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        answered = stub.prompts()[:8]
    part = pathlib.Path(DONE + "l.part")
    assert len(part.read_text().splitlines()) == 1 + 8 and not pathlib.Path(DONE).exists()
    with open(part, "a") as file:
        file.write('{"sample_index": 5, "compl')  # as if it had been killed in the middle of a line
    with Stub(lambda prompt, n: sums(prompt, n) if n == 1 else (400, {}, b"no")) as stub:
        code, _, err = run(*teach(stub.url, "--workers", 1))
        assert code == 2 and "2 of 6 completions are there" in err and "3 of 6 completions are kept" in err
        assert len([json.loads(line) for line in part.read_text().splitlines()]) == 1 + 9 and not set(stub.prompts()) & set(answered)
        answered.append(stub.prompts()[0])
    with Stub(sums) as stub:
        code, out, err = run(*teach(stub.url))
        assert code == 0 and "3 of 6 completions are there" in err and not set(stub.prompts()) & set(answered)
        assert len(stub.asked) == 3 and "accuracy 100.00" in out and not part.exists()
        code, _, err = run(*teach(stub.url))  # finished: nothing is asked, nothing changes
        assert code == 0 and "6 of 6 completions are there" in err and len(stub.asked) == 3 and not part.exists()


def test_more_completions_extend_a_finished_file(run):
    """--k 1, then --k 3: the first ones stay; other parts of the split too. Each draw has a seed of its own."""
    dataset("d.json", "multiarith", SUMS)
    pathlib.Path("s.json").write_text(json.dumps({"train": [0, 1, 1, 4, 5], "test": [2, 3]}))
    with Stub(sums) as stub:
        words = ["--temperature", "0.7", "--split", "s.json", "--part"]
        assert run(*teach(stub.url, *words, "train"))[0] == 0 and len(stub.asked) == 8
        path = DONE.replace("C_zs_cot", "C_zs_cot_t70")
        before = value(path)["data"]
        assert run(*teach(stub.url, *words, "train", "--k", 3))[0] == 0 and len(stub.asked) == 24
        assert run(*teach(stub.url, *words, "test", "--k", 2))[0] == 0 and len(stub.asked) == 32
    after = value(path)["data"]
    assert [len(after[i]) for i in "012345"] == [3, 3, 2, 2, 3, 3] and all(after[i][0] == before[i][0] for i in "0145")
    assert list(after) == list("012345") and [row["completion_index"] for row in after["5"]] == [0, 1, 2]
    drawn = [body["seed"] for body in stub.asked if body["temperature"]]
    assert len(set(drawn)) == len(drawn) == 16 and all("seed" not in body for body in stub.asked if not body["temperature"])


def test_chat_endpoint_few_shot_and_zero_shot(run):
    dataset("d.json", "multiarith", SUMS)
    pathlib.Path("f.json").write_text(json.dumps({"multiarith": {"prompt": "Q: What is 1 + 1?\nA: The answer is 2."}}))
    with Stub(lambda prompt, n: reply(" So. The answer is 4."), "/v1/chat/completions") as stub:
        code, out, err = run(*teach(stub.url, "--few_shot", "f.json", "--max_tokens", 9, method="fs_cot"))
        assert code == 0 and "accuracy 16.67" in out and "WARNING: 1 of the questions stand in the few-shot prompt" in err
        assert sorted(stub.prompts())[2] == "Q: What is 1 + 1?\nA: The answer is 2.\nQ: What is 2 + 2?\nA:" and stub.asked[0]["max_tokens"] == 9
        assert run(*teach(stub.url, "--family", "encoder_decoder", method="zs"))[0] == 0
        assert stub.asked[-1]["messages"][0]["content"].startswith("question: What is ")
        code, _, err = run(*teach(stub.url, method="zs"))
        assert code == 2 and "family 'encoder_decoder' there, 'decoder' now" in err


@pytest.mark.parametrize("words", [["--seed", "1"], ["--max_tokens", "7"], ["--model", "other/gpt"]])
def test_another_command_is_refused(run, words):
    dataset("d.json", "multiarith", SUMS)
    with Stub(sums) as stub:
        run(*teach(stub.url))
        before, n = pathlib.Path(DONE).read_bytes(), len(stub.asked)
        code, _, err = run(*teach(stub.url, *words))
        assert code == 2 and "made by another command" in err and pathlib.Path(DONE).read_bytes() == before and len(stub.asked) == n
        dataset("d.json", "multiarith", [("What is 9 + 9?", "18"), *SUMS[1:]])
        code, _, err = run(*teach(stub.url))
        assert code == 2 and "sample 0 has another question or answer there" in err and pathlib.Path(DONE).read_bytes() == before
    assert not list(pathlib.Path("out").glob("**/*.part"))


@pytest.mark.parametrize("answer, code, message", [
    (lambda prompt, n: (401, {}, {"error": f"wrong key {KEY}"}), 2, "HTTP 401"),
    (lambda prompt, n: (302, {"Location": "http://127.0.0.1:9/"}, b""), 2, "HTTP 302"),
    (lambda prompt, n: (200, {}, {"error": "none"}), 2, "HTTP 200"),
    (lambda prompt, n: (200, {}, b"{}"), 2, "HTTP 200 {}"),
    (lambda prompt, n: (503, {}, b"busy"), 75, "gave up after 3 attempts"),
])
def test_servers_that_fail_keep_what_there_is(run, monkeypatch, answer, code, message):
    dataset("d.json", "multiarith", SUMS)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Stub(lambda prompt, n: sums(prompt, n) if n <= 7 else answer(prompt, n)) as stub:
        found, _, err = run(*teach(stub.url, "--workers", 1, "--retries", 2))
    assert (found, message in err, KEY in err) == (code, True, False), err
    assert "1 of 6 completions are kept; the same command goes on" in err
    assert len(pathlib.Path(DONE + "l.part").read_text().splitlines()) == 1 + 7
    found, _, err = run(*teach(stub.url, "--workers", 1, "--retries", 0))  # nobody listens any more
    assert found == 75 and "Connection refused" in err and "1 of 6" in err and len(stub.asked) == (10 if code == 75 else 8)


def test_a_prompt_that_is_refused_does_not_stop_the_others(run, monkeypatch):
    """A filter refuses question 2 (400, or null for an answer): the rest is asked, the row is named, and the same command asks for it again."""
    dataset("d.json", "multiarith", SUMS)
    for no in ((400, {}, {"error": "content policy"}), reply(None, "content_filter")):
        with Stub(lambda prompt, n: no if "What is 2" in prompt else sums(prompt, n)) as stub:
            code, _, err = run(*teach(stub.url))
            assert code == 2 and "sample 2, completion 0, reasoning: " in err and "5 of 6 completions are kept" in err and len(stub.asked) == 11
        assert len(value(DONE)["data"]) == 5
        with Stub(sums) as stub:
            code, out, err = run(*teach(stub.url))
            assert code == 0 and "5 of 6 completions are there" in err and "accuracy 100.00" in out and len(stub.asked) == 2
        os.remove(DONE)
    with Stub(lambda prompt, n: (400, {}, {"error": "no such model"})) as stub:  # all of them: not even tried
        dataset("d.json", "multiarith", [(f"What is {i} + {i}?", str(2 * i)) for i in range(40)])
        code, _, err = run(*teach(stub.url))
        assert code == 2 and "no such model" in err and len(stub.asked) < 16 and not pathlib.Path(DONE).exists()


def test_waits_are_never_shorter_than_the_back_off_nor_endless(run, monkeypatch):
    dataset("d.json", "multiarith", SUMS[:1])
    waits = []
    monkeypatch.setattr(cot.Server, "first_wait_sec", 1.0)
    monkeypatch.setattr(cot.threading.Event, "wait", lambda self, seconds=None: waits.append(seconds))
    # no limit, one of ages, a reply that was cut, a time-out on the server's side
    first = {1: (429, {"Retry-After": "0"}, b""), 2: (429, {"Retry-After": "99999999999"}, b""), 3: (429, {"Retry-After": "9999"}, b""),
             4: (200, {}, b'{"choi'), 5: (408, {}, b"")}
    with Stub(lambda prompt, n: first.get(n) or sums(prompt, n)) as stub:
        assert run(*teach(stub.url))[0] == 0
    assert [wait for wait in waits if wait] == [1.0, 2.0, 3600.0, 8.0, 16.0]


@pytest.mark.parametrize("body", [{"choices": [{"text": ["parts"]}]}, {"choices": [{"text": 5}]}, {"choices": [{"text": "5", "finish_reason": {}}]}, [],
                                  {"choices": []}, {"choices": 3}])
def test_replies_that_are_none_are_said(run, body):
    dataset("d.json", "multiarith", SUMS)
    with Stub(lambda prompt, n: (200, {}, body)) as stub:
        code, _, err = run(*teach(stub.url, "--workers", 1))
    assert code == 2 and "HTTP 200" in err and len(stub.asked) == 1


def test_a_key_that_no_header_can_hold_is_not_shown(run, monkeypatch):
    dataset("d.json", "multiarith", SUMS)
    for key in (f"{KEY}\nX: y", f"{KEY}é"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        code, out, err = run(*teach("http://127.0.0.1:9/v1/completions"))
        assert code == 2 and "OPENAI_API_KEY: has characters" in err and KEY not in out + err
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    code, out, err = run(*teach("http://example.org/v1/completions", "--method", "zs_cot", "--k", 0))
    assert code == 2 and "WARNING: OPENAI_API_KEY goes over plain http" in err


def test_ctrl_c_keeps_what_there_is(run, monkeypatch):
    dataset("d.json", "multiarith", SUMS)
    with Stub(sums) as stub:
        def interrupted(futures):
            futures[0].result()
            raise KeyboardInterrupt
        monkeypatch.setattr(cot.concurrent.futures, "as_completed", interrupted)
        code, _, err = run(*teach(stub.url, "--workers", 1))
    assert code == 75 and "stopped\n0 of 6 completions are kept; the same command goes on" in err
    assert 1 <= len(pathlib.Path(DONE + "l.part").read_text().splitlines()) - 1 == len(stub.asked) <= 6


def test_two_processes_do_not_write_one_file(run):
    import fcntl
    dataset("d.json", "multiarith", SUMS)
    part = pathlib.Path(DONE + "l.part")
    part.parent.mkdir(parents=True)
    with open(part, "a") as file, Stub(sums) as stub:
        file.write('{"half a line')
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, err = run(*teach(stub.url))
        assert code == 2 and "another process is writing it" in err and part.read_text() == '{"half a line' and not stub.asked


def fake_chat(monkeypatch, texts, codes=()):
    """chat.py's file mode without a model: replies from texts(prompt) once `codes` are used up; -> the commands that were run."""
    commands, codes = [], list(codes)

    def run(command):
        commands.append(command)
        flags = dict(zip(command[2::2], command[3::2]))
        if codes and (code := codes.pop(0)):
            return subprocess.CompletedProcess(command, code)
        lines = [json.loads(line) for line in open(flags["--input"], encoding="utf-8")]
        with open(flags["--output"], "x", encoding="utf-8") as file:
            file.writelines(json.dumps({"row": i, "replies": [texts(line["text"])], "finish_reasons": ["length"], "orig_d": line}) + "\n"
                            for i, line in enumerate(lines))
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(cot.subprocess, "run", run)
    return commands


def test_local_model(run, monkeypatch, tmp_path):
    """Two steps, two calls of chat.py; after a stop the same input and output again, and replies that lay there are used."""
    dataset("d.json", "multiarith", SUMS)
    commands = fake_chat(monkeypatch, lambda prompt: sums(prompt, 0)[2]["choices"][0]["text"], codes=[75, 0, 75])
    words = ["teach", "--dataset", "d.json", "--method", "zs_cot", "--local", "models/tiny", "--root", "out", "--temperature", "0.7"]
    code, _, err = run(*words)
    assert code == 75 and "0 of 6" in err
    code, _, err = run(*words)
    assert code == 75 and "chat.py ended with exit code 75" in err and commands[0] == commands[1] != commands[2]
    code, out, _ = run(*words)
    assert code == 0 and "accuracy 100.00" in out and len(commands) == 4 and commands[2] == commands[3]
    path = "out/completion_data/B_tiny__C_zs_cot_t70/D_multiarith.json"
    assert commands[1][1:] == [str(ROOT / "chat.py"), "--model_path", "models/tiny", "--input", f"{path}.reasoning_prompts.jsonl", "--output",
                               f"{path}.reasoning_replies.jsonl", "--max_new_tokens", "128", "--temperature", "0.7", "--top_p", "1",
                               "--seed", commands[1][-1]]
    assert commands[3][commands[3].index("--temperature") + 1] == "0.0"
    row = value(path)["data"]["2"][0]
    assert row["reasoning_completion"] == " It is 4." and row["completion"] == " 4." and row["finish_reason"] == "length"
    assert [p.name for p in pathlib.Path(path).parent.iterdir()] == ["D_multiarith.json"]
    assert run(*words, "--k", 2)[0] == 0  # draws of the same questions in the same order: with another seed
    assert commands[4][-1] != commands[1][-1] and [len(rows) for rows in value(path)["data"].values()] == [2] * 6


@pytest.mark.slow
def test_local_model_for_real(run, tmp_path):
    write_babbler(tmp_path / "babbler")
    dataset("d.json", "multiarith", SUMS)
    words = ["teach", "--dataset", "d.json", "--local", "babbler", "--k", 2, "--max_tokens", 5, "--root"]
    for root, more in (("a", []), ("b", []), ("c", ["--chat"])):
        assert run(*words, root, "--method", "zs_cot", *more)[0] == 0
    a, b, c = (value(f"{root}/completion_data/B_babbler__C_zs_cot_t70/D_multiarith.json")["data"] for root in "abc")
    assert a == b and [len(rows) for rows in a.values()] == [2] * 6 and c != a
    assert len({row["reasoning_completion"] for rows in a.values() for row in rows}) == 12


# ------------------------------------------------------------------------------------------------ filter, export


def test_filter_keeps_only_what_is_correct(run):
    completions("c.json", [(0, 2, "a", "5", "r", " 5.0"), (0, 1, "a", "5", "r", " 6."), (0, 0, "a", "5", "r", " 5."), (7, 0, "b", "1", "r", " 2."),
                           (10, 0, "c", "3", "r", " 3.")])
    code, out, _ = run("filter", "--completions", "c.json", "--out", "f.json")
    assert code == 0 and "3 of 5 completions are correct; 1 of 3 questions have none" in out and "1 with 0, 1 with 1, 1 with 2" in out
    assert {i: [row["completion_index"] for row in rows] for i, rows in value("f.json")["data"].items()} == {"0": [0, 2], "7": [], "10": [0]}
    assert value("f.json")["metadata"] == {**value("c.json")["metadata"], "completions": 3}  # of a question, before the wrong ones went
    run("filter", "--completions", "c.json", "--out", "g.json", "--compat")
    assert [row["completion"] for row in value("g.json")["data"]["0"]] == [" 5."]
    assert run("filter", "--completions", "c.json", "--out", "g.json")[0] == 2


@pytest.fixture
def taught(run):
    """Six questions, 0 to 3 for training: 0 with two right completions, 1 with a wrong and a right one, 2 with none, 3 without a rationale."""
    dataset("d.json", "multiarith", SUMS)
    completions("c.json", [(0, 0, *SUMS[0], " Nought. ", " 0."), (0, 1, *SUMS[0], "Zero", "0"), (1, 0, *SUMS[1], "bad", " 3"),
                           (1, 1, *SUMS[1], "One", " 2"), (2, 0, *SUMS[2], "bad", " 5"), (3, 0, *SUMS[3], " ", " 6"),
                           (4, 0, *SUMS[4], "test!", " 8")], completion_key="zs_cot_t70")
    pathlib.Path("s.json").write_text(json.dumps({"train": [0, 1, 2, 3], "test": [4, 5]}))
    return lambda method, style, family, *words: run("export", "--dataset", "d.json", "--split", "s.json", "--method", method, "--style", style,
                                                     "--family", family, *(["--completions", "c.json"] if method == "ft_cot" else []), *words)


def test_export_to_the_earlier_system(taught):
    earlier = ["--to", "earlier", "--root", "saved"]
    assert taught("ft_cot", "token", "encoder_decoder", *earlier)[0] == 0
    path = pathlib.Path("saved/finetune_data/P_encoder_decoder/F_zs_cot_t70_multiarith_2aug.json")
    assert path.read_text() == json.dumps({"sample_index": [0, 0, 1], "input": ["What is 0 + 0?", "What is 0 + 0?", "What is 1 + 1?"],
                                           "label": ["Nought. --> 0", "Zero --> 0", "One --> 2"]}, indent=4)
    code, out, _ = taught("ft_cot", "natural", "decoder", *earlier, "--k", 1, "--compat")
    assert code == 0 and "2 wrong completions and 1 without a rationale left out; 3 of 4 questions have none left" in out
    assert value("saved/finetune_data/P_decoder/F_zs_cot_t70_multiarith_1aug.json") == {
        "sample_index": [0], "input": ["Q: What is 0 + 0?\n\nA: Let's think step by step.\n\n"],
        "label": [" Nought.\n\nTherefore the answer is 0"]}
    assert taught("ft_cot", "token", "openai", *earlier)[0] == 0
    lines = pathlib.Path("saved/finetune_data/P_openai/F_zs_cot_t70_multiarith_2aug.jsonl").read_text().split("\n")
    assert len(lines) == 3 and lines[0] == r'{"prompt": "What is 0 + 0?\n\n###\n\n", "completion": " Nought.\n\n-->\n\n0 END"}'
    assert taught("ft", "token", "decoder", *earlier)[0] == 0
    path = pathlib.Path("saved/finetune_data/P_decoder/F_multiarith.json")
    assert value(path) == {"sample_index": [0, 1, 2, 3], "input": [f"{q} ###" for q, _ in SUMS[:4]], "label": [f" {a}" for _, a in SUMS[:4]]}
    code, out, _ = taught("ft", "token", "decoder", *earlier)
    assert code == 0 and "was there already" in out
    code, _, err = taught("ft", "natural", "decoder", *earlier)
    assert code == 2 and f"{path}: exists and differs" in err and "###" in path.read_text()


def test_export_for_our_trainers(taught, monkeypatch):
    """Nothing of the test part in training; the held-out questions have one record each, also where the teacher was wrong."""
    monkeypatch.setattr(cot, "is_held_out", lambda question, share: question in ("What is 0 + 0?", "What is 2 + 2?"))
    code, out, _ = taught("ft_cot", "natural", "decoder", "--out", "data/new.json")
    assert code == 0 and "data/new.json: 1 train, 2 eval, 2 test" in out and "eval: 1 questions have the gold answer alone" in out

    def made(i, label):
        return {"prompt": f"Q: What is {i} + {i}?\n\nA: Let's think step by step.\n\n", "completion": label, "sample_index": i, "answer": str(2 * i),
                "dataset_key": "multiarith", "prediction_template": "ft_cot_natural"}
    assert value("data/new.json") == {"train": [made(1, " One\n\nTherefore, the answer is 2")],
                                      "eval": [made(0, " Nought.\n\nTherefore, the answer is 0"), made(2, " 4")],
                                      "test": [made(4, " 8"), made(5, " 10")]}
    assert taught("ft", "token", "encoder_decoder", "--out", "ft.jsonl")[0] == 0
    rows = [json.loads(line) for line in open("ft.jsonl")]
    assert [(row["split"], row["prompt"], row["completion"]) for row in rows] == [
        (split, f"What is {i} + {i}?", str(2 * i)) for split, i in (("train", 1), ("train", 3), ("eval", 0), ("eval", 2), ("test", 4), ("test", 5))]
    before = pathlib.Path("ft.jsonl").read_bytes()
    code, _, err = taught("ft", "natural", "encoder_decoder", "--out", "ft.jsonl")
    assert code == 2 and "exists and differs" in err and pathlib.Path("ft.jsonl").read_bytes() == before


def test_export_leaves_out_rationales_that_hold_the_mark_and_knows_how_many_completions_there_are(taught, run):
    whole = value("c.json")
    whole["data"]["0"][1]["reasoning_completion"] = "0 --> 0,\nso"
    pathlib.Path("c.json").write_text(json.dumps(whole))
    code, out, _ = taught("ft_cot", "token", "encoder_decoder", "--out", "a.json", "--val_share", 0)
    assert code == 0 and "1 with '-->' in the rationale; 2 of 4 questions have none left" in out and len(value("a.json")["train"]) == 2
    code, out, _ = taught("ft_cot", "natural", "decoder", "--out", "b.json", "--val_share", 0)
    assert code == 0 and "in the rationale" not in out and "several lines" not in out and len(value("b.json")["train"]) == 3
    code, _, err = taught("ft_cot", "token", "decoder", "--out", "x.json", "--k", 3)
    assert code == 2 and "--k 3: c.json has 2 completions of a question" in err
    whole["data"] = {"0": whole["data"]["0"][:1]}
    pathlib.Path("c.json").write_text(json.dumps({**whole, "metadata": {**whole["metadata"], "completions": 2}}))
    assert taught("ft_cot", "token", "decoder", "--to", "earlier", "--root", "saved")[0] == 0
    assert list(pathlib.Path("saved").rglob("F_*.json"))[0].name == "F_zs_cot_t70_multiarith_2aug.json"  # not as many as happen to be right


def test_held_out_by_a_hash_of_the_question():
    held = [cot.is_held_out(f"What is {i}?", 0.1) for i in range(2000)]
    assert 160 < sum(held) < 240 and held == [cot.is_held_out(f"  what IS\n{i}? ", 0.1) for i in range(2000)]
    assert not any(cot.is_held_out(f"{i}", 0) for i in range(100))


def test_few_shot_rationales_end_at_the_answer(run):
    dataset("d.json", "multiarith", SUMS)
    completions("c.json", [(0, 0, *SUMS[0], None, " None and none. The answer is 0."), (1, 0, *SUMS[1], None, " The answer is 2.")],
                template="fs_cot", completion_key="fs_cot")
    pathlib.Path("s.json").write_text(json.dumps({"train": [0, 1], "test": [4, 5]}))
    code, out, _ = run("export", "--dataset", "d.json", "--split", "s.json", "--completions", "c.json", "--method", "ft_cot", "--style", "token",
                       "--family", "decoder", "--out", "o.json", "--val_share", 0)
    assert code == 0 and "0 wrong completions and 1 without a rationale" in out
    assert [row["completion"] for row in value("o.json")["train"]] == [" None and none. --> 0"] and "eval" not in value("o.json")


def test_a_whole_round_with_the_scripted_teacher(run):
    """make, split, teach, filter, export, and the exported completions are right by the evaluator."""
    for key, method in (("coin_flip", "zs_cot"), ("last_letter_concatenation", "fs_cot")):
        run("make", key, "--n", 60, "--rationale", "--out", f"{key}.json")
        run("split", "--dataset", f"{key}.json", "--out", f"{key}__default.json")
        pathlib.Path("f.json").write_text(json.dumps({key: {"prompt": "Q: x\nA: y"}}))
        code, out, err = run("teach", "--dataset", f"{key}.json", "--method", method, "--rationales", "--root", "s",
                             *(["--few_shot", "f.json"] if method == "fs_cot" else []))
        assert code == 0 and "accuracy 100.00" in out, err
        path = f"s/completion_data/B_rationales__C_{method}/D_{key}.json"
        assert "60 of 60 completions are correct" in run("filter", "--completions", path, "--out", f"{key}.right.json")[1]
        assert run("export", "--completions", f"{key}.right.json", "--dataset", f"{key}.json", "--split", f"{key}__default.json",
                   "--method", "ft_cot", "--style", "token", "--family", "encoder_decoder", "--out", f"{key}.data.json")[0] == 0
        data = value(f"{key}.data.json")
        assert len(data["train"]) + len(data["eval"]) == 42 and len(data["test"]) == 18 and data["eval"]
        questions = [{row["prompt"] for row in part} for part in data.values()]
        assert len(set.union(*questions)) == sum(map(len, questions)) == 60
        assert all(cot.judge(key, "ft_cot_token", row["completion"], row["answer"])["correct"] for row in data["train"] + data["eval"])
        rationale = value(f"{key}.json")["data"][data["train"][0]["sample_index"]]["rationale"]
        assert data["train"][0]["completion"] == f"{rationale} --> {data['train'][0]['answer']}"


# ------------------------------------------------------------------------------------------------ evaluate


def predictions(path, texts, key="svamp", template="ft_cot_token", gold="7"):
    rows = [{"prompt": "p", "generations": [{"lm_postprocess": text} for text in found], "demonstration": "d", "dataset": "x",
             "orig_d": {"sample_index": i, "answer": gold, "dataset_key": key, "prediction_template": template}} for i, found in enumerate(texts)]
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(json.dumps(rows))


def table(out):
    return [re.split(r" {2,}", line) for line in out.splitlines()]


def test_evaluate_files(run):
    completions("c.json", [(0, 0, "a", "5", None, "--> 5", {"finish_reason": "stop"}), (1, 0, "b", "5", None, "5 or 6", {"finish_reason": "length"}),
                           (2, 0, "c", "5", None, "--> 5.0", {"finish_reason": "stop"}), (3, 0, "d", "5", None, "6", {"finish_reason": "stop"})],
                template="ft_cot_token")
    predictions("p.json", [["--> 7", "--> 8"], ["7"], ["8"]])
    code, out, _ = run("evaluate", "c.json", "p.json")
    header = ["file", "data set", "template", "n", "accuracy", "contains_answer", "correct_format", "complete"]
    assert code == 0 and table(out) == [header, ["c.json", "multiarith", "ft_cot_token", "4", "50.00", "75.00", "50.00", "75.00"],
                                        ["p.json", "svamp", "ft_cot_token", "4", "50.00", "50.00", "50.00", "-"]]
    assert table(run("evaluate", "c.json", "--compat")[1])[1][4:6] == ["25.00", "50.00"]
    assert table(run("evaluate", "c.json", "--template", "zs")[1])[1][2:] == ["zs", "4", "75.00", "75.00", "100.00", "75.00"]
    pathlib.Path("s.json").write_text(json.dumps({"train": [0, 2], "test": [1, 3]}))
    assert table(run("evaluate", "c.json", "--split", "s.json", "--part", "train")[1])[1][3:5] == ["2", "100.00"]


def test_best_on_eval_never_looks_at_test(run):
    """Step 20 is the best on eval. The other steps' test files are no JSON, so opening one would be seen."""
    for step, texts in ((10, [["7"], ["8"]]), (20, [["7"], ["7"]]), (30, [["7"], ["7"]]), (100, [["8"], ["8"]])):
        predictions(f"run/temperature=0.00_n=1_step={step}.json", texts)
        pathlib.Path(f"run/test_temperature=0.00_n=1_step={step}.json").write_text("no JSON")
    predictions("run/test_temperature=0.00_n=1_step=20.json", [["8"], ["8"], ["7"], ["8"]])
    code, out, err = run("evaluate", "--best_on_eval", "run")
    assert code == 0 and out.splitlines()[-1] == "temperature=0.00_n=1: best on eval is step 20", err
    assert [pathlib.Path(row[0]).name.split("step=")[1] for row in table(out)[1:-1]] == ["10.json", "20.json", "30.json", "100.json", "20.json"]
    assert table(out)[-2][0].endswith("run/test_temperature=0.00_n=1_step=20.json") and table(out)[-2][3:5] == ["4", "25.00"]
    assert "different numbers" not in err
    os.remove("run/test_temperature=0.00_n=1_step=20.json")
    predictions("run/temperature=0.00_n=1_step=30.json", [["7"]])
    assert "WARNING: temperature=0.00_n=1: the steps were evaluated on different numbers of questions" in run("evaluate", "--best_on_eval", "run")[2]
    code, out, err = run("evaluate", "--best_on_eval", "run")
    assert code == 0 and "best on eval is step 20" in out and "WARNING: no test_temperature=0.00_n=1_step=20.json" in err and "checkpoint-20" in err


def test_saved_dir(run):
    """One table, of epochs the last, not the best; the split leaves the training part out."""
    pytest.importorskip("matplotlib")
    right, wrong = (0, 0, "a", "5", None, "--> 5"), (0, 0, "a", "5", None, "--> 6")
    student = {"base_model": "t5", "completion_key": "ft_cot", "train_key": "ft_cot", "template": "ft_cot_token"}
    folder = "saved/completion_data/B_t5__C_ft_cot"
    for epoch, row in ((2, right), (10, wrong)):
        completions(f"{folder}/D_multiarith__T_ft_cot__E_{epoch:03d}.json", [row], epoch=epoch, **student)
    completions(f"{folder}/D_svamp__T_ft_cot__E_001.json", [right], epoch=1, key="svamp", **student)
    completions("saved/completion_data/B_big__C_zs_cot/D_multiarith.json", [(0, 0, "a", "5", "r", "5"), (1, 0, "b", "5", "r", "6")])
    code, out, err = run("evaluate", "--saved_dir", "saved", "--csv", "t.csv", "--figure", "t.svg")
    assert code == 0, err
    assert table(out)[:-1] == [["model", "method", "multiarith", "svamp"], ["big", "zs_cot", "50.00", "-"], ["t5", "ft_cot", "0.00", "100.00"]]
    assert out.splitlines()[-1] == "multiarith: the files have 1, 2 completions, --csv shows which"
    assert pathlib.Path("t.csv").read_text().splitlines() == [
        "model,method,dataset,epoch,n,accuracy,contains_answer,correct_format,complete", "big,zs_cot,multiarith,,2,0.5,0.5,1.0,",
        "t5,ft_cot,multiarith,2,1,1.0,1.0,1.0,", "t5,ft_cot,multiarith,10,1,0.0,0.0,1.0,", "t5,ft_cot,svamp,1,1,1.0,1.0,1.0,"]
    assert pathlib.Path("t.svg").read_text().startswith("<?xml")
    assert run("evaluate", "--saved_dir", "saved", "--csv", "t.csv")[0] == 2
    pathlib.Path("splits").mkdir()
    for key in ("multiarith", "svamp"):
        pathlib.Path(f"splits/{key}__default.json").write_text(json.dumps({"train": [1], "test": [0]}))
    assert table(run("evaluate", "--saved_dir", "saved", "--split", "splits", "--part", "test")[1])[1][2] == "100.00"
    completions(f"again/{folder}/D_svamp__T_ft_cot__E_001.json", [wrong], epoch=1, key="svamp", **student)
    code, _, err = run("evaluate", "--saved_dir", ".")  # which of two would the cell be of?
    assert code == 2 and f"{folder}/D_svamp__T_ft_cot__E_001.json: a cell of the table that again/{folder}/D_svamp" in err
    pathlib.Path(f"{folder}/D_svamp__T_ft_cot__E_001.json").rename(f"{folder}/D_svamp__T_ft_cot__E_002.json")
    code, _, err = run("evaluate", "--saved_dir", "saved")
    assert code == 2 and "D_svamp__T_ft_cot__E_002.json: its metadata belong to B_t5__C_ft_cot/D_svamp__T_ft_cot__E_001.json" in err


# ------------------------------------------------------------------------------------------------ rubbish

def teacher_file(key, data):
    base = {"sample_index": 0, "completion_index": 0, "question": "q0", "answer": "1"}
    data = {i: [{**base, **row} if isinstance(row, dict) else row for row in rows] for i, rows in data.items()}
    return json.dumps({"metadata": {"dataset_key": key, "prediction_template": "zs", "completion_key": "zs"}, "data": data})


FILES = {
    "no.json": "{", "list.json": "[1]", "empty.json": '{"metadata": {"dataset_key": "svamp"}, "data": []}',
    "unknown.json": '{"metadata": {"dataset_key": "x"}, "data": [1]}',
    "bad.json": json.dumps({"metadata": {"dataset_key": "svamp"}, "data": [
        {"sample_index": 0, "question": "a", "answer": "x"}, {"sample_index": True, "question": "a", "answer": "1"}, 7,
        {"sample_index": 1, "question": " ", "answer": "1"}]}),
    "twice.json": json.dumps({"metadata": {"dataset_key": "svamp"}, "data": [{"sample_index": 0, "question": "a", "answer": "1"}] * 2}),
    "good.json": json.dumps({"metadata": {"dataset_key": "svamp"}, "data": [
        {"sample_index": i, "question": f"q{i}", "answer": "1"} for i in range(9)]}),
    "both.json": '{"train": [1, 2], "test": [2]}', "far.json": '{"train": [1], "test": [99]}', "text.json": '{"train": ["1"], "test": []}',
    "open.json": teacher_file("svamp", {"0": [{"prompt": "p"}, 5]}),
    "other.json": teacher_file("svamp", {"0": [{"question": "other", "completion": "1"}]}),
    "moved.json": teacher_file("addsub", {"0": [{"completion": "1"}]}), "index.json": teacher_file("svamp", {"1": [{"completion": "1"}]}),
    "pred.json": '[{"generations": [{"lm_postprocess": "1"}], "orig_d": {"answer": "1"}}, 3]',
    "raw.json": '[{"question": "a"}, {"Body": 3, "Question": "b"}, {"sQuestion": "c", "lSolutions": [1, 2]}, {"question": "d", "answer": "e"}, '
                '{"question": "\\ud800", "answer": "1"}, {"question": "f", "answer": "1", "rationale": 3}]',
    "null.json": "null", "double.json": teacher_file("svamp", {"0": [{"completion": "1"}] * 2}), "none.answers.json": teacher_file("svamp", {}),
    "blank.txt": "", "blank.jsonl": "\n", "one.json": '{"train": [1], "test": []}',
}
EXPORT = "export --dataset good.json --method ft --style token --family decoder --out new.json --split"


@pytest.mark.parametrize("words, messages", [
    ("split --dataset no.json --out new.json", ["no.json: cannot be read as JSON"]),
    ("split --dataset none.json --out new.txt", ["none.json: cannot be read", "new.txt: expected a name in .json"]),
    ("split --dataset list.json --out new.json", ["list.json: expected {'metadata'"]),
    ("split --dataset empty.json --out good.json", ["empty.json: expected", "good.json: exists"]),
    ("split --dataset unknown.json --out new.json", ["unknown.json: expected"]),
    ("split --dataset bad.json --out new.json", [
        "bad.json, data[0]: answer 'x': expected a number", "bad.json, data[1]: expected an object with sample_index",
        "bad.json, data[2]: expected an object", "bad.json, data[3]: the question is empty"]),
    ("split --dataset twice.json --out new.json", ["twice.json: 1 samples have the sample_index of another one"]),
    ("make svamp --out new.json", ["svamp: --input FILE is needed"]),
    ("make coin_flip --n 0 --out new.json", ["--n 0 --names 4: expected"]),
    ("make coin_flip --n 400 --names 1 --out new.json", ["1 to 2"]),
    ("make coin_flip --n 5 --names -1 --out new.json", ["--names -1"]),
    ("make svamp --input raw.json --n 3 --rationale --out new.json", [
        "--n: for sets that are made", "--rationale: for sets that are made", "raw.json, [0]: no record of svamp (KeyError: 'answer')",
        "raw.json, [1]: no record",
        "raw.json, [2]: no record", "raw.json, [3]: answer 'e': expected a number", "raw.json, [4]: 'utf-8' codec can't encode",
        "raw.json, [5]: the rationale is no text"]),
    ("make svamp --input no.json --out new.json", ["no.json: not JSON"]),
    ("make svamp --input blank.jsonl --out new", ["new: expected a name in .json", "blank.jsonl: no records in it"]),
    ("make coin_flip --input good.json --seed 1 --out new.js", [
        "good.json: metadata {'dataset_key': 'svamp'}, expected", "--seed: for sets", "new.js: "]),
    (f"{EXPORT} both.json", ["both.json: sample 2 is on both sides"]),
    (f"{EXPORT} far.json", ["far.json: sample 99 is not in the data set"]),
    (f"{EXPORT} text.json", ["text.json: expected {'train'"]),
    (f"{EXPORT} good.json --completions other.json --val_share 1 --k 0", [
        "good.json: expected {'train'", "--completions FILE: needed for --method ft_cot, and for no other", "--val_share: expected",
        "other.json, data['0']: another"]),
    (f"{EXPORT.replace('ft ', 'ft_cot ')} one.json --completions moved.json", ["moved.json: of addsub, and good.json is svamp"]),
    ("split --dataset null.json --out new.json --seed 5", ["null.json: holds null", "--seed 5: the random split is the published one"]),
    ("split --dataset good.json --out new.json --seed -1 --train_n 2", ["--seed -1: expected 0 to"]),
    (f"{EXPORT} null.json", ["null.json: holds null"]),
    ("filter --completions null.json --out new.json", ["null.json: holds null"]),
    ("filter --completions none.answers.json --out new.json", ["none.answers.json: no completions in it"]),
    ("filter --completions double.json --out new.json", ["double.json, data['0']: completion_index 0 is there 2 times"]),
    ("make coin_flip --out good.json/x.json", ["good.json"]),
    ("teach --dataset good.json --method zs --server http://h/v1/completions --model m --root good.json", ["good.json"]),
    ("teach --dataset good.json --method zs --server http://h/ä/v1/completions --model m", ["--server: expected"]),
    ("teach --dataset good.json --method zs --server http://h/v1/completions --model m --timeout_sec nan", ["--timeout_sec"]),
    ("evaluate index.json", ["index.json, data['1']: sample_index is another one"]),
    (f"{EXPORT.replace('decoder', 'openai')} far.json", ["--family openai: not for ft_token --to rawtune"]),
    (f"{EXPORT} far.json --to earlier", ["--out FILE.json or FILE.jsonl: needed for --to rawtune"]),
    ("filter --completions open.json --out new.json", ["open.json, data['0']: no completion (not finished?)",
                                                       "open.json, data['0']: expected an object"]),
    ("filter --completions good.json --out new.json", ["good.json: no completion data set"]),
    ("evaluate pred.json", ["pred.json, [0]: no prediction for a record of `export` (KeyError: 'dataset_key')", "pred.json, [1]: no prediction"]),
    ("evaluate open.json blank.txt", ["open.json, data['0']", "blank.txt: cannot be read"]),
    ("evaluate", ["expected one of: files"]),
    ("evaluate --best_on_eval . --split both.json --csv new.csv", ["--split and --part go together", "--csv and --figure: belong to --saved_dir"]),
    ("evaluate --best_on_eval .", [".: no predictions of an evaluation"]),
    ("evaluate --saved_dir .", [".: no completion files"]),
    ("evaluate --saved_dir . --template zs --csv no/t.csv --figure t.gif", [
        "--template: not with it", "no/t.csv: no such folder", "t.gif: expected a name"]),
    (f"{EXPORT.replace(' --out new.json', '')} one.json --to earlier --val_share 0.1", ["--val_share and --tokenizer: belong to --to rawtune"]),
    ("teach --dataset good.json --method fs_cot --rationales --k 2 --chat --part train --workers 0", [
        "--k, --max_tokens, --workers", "--split and --part go together", "--chat: belongs to --local", "--few_shot FILE: needed",
        "--rationales: one a question", "good.json: 9 samples have no rationale, sample 0 is one"]),
    ("teach --dataset good.json --method zs_cot --family encoder_decoder --server localhost:8000 --model a*b", [
        "--family encoder_decoder: zs_cot has no prompt for it", "--server: expected a whole address", "--model a*b: its last part"]),
    ("teach --dataset good.json --method zs --server http://x:pw@h/v1/completions --temperature 3", [
        "--model NAME is needed", "expected 0 to 2", "--server: expected"]),
    ("teach --dataset good.json --method zs --server http://h/v1/completions?key=pw@ --model m --split one.json --part test", [
        "--server: expected"]),
    ("teach --dataset good.json --method zs --local m --split one.json --part test", ["one.json: no samples in test"]),
    ("teach --dataset good.json --method fs_cot --local m --few_shot good.json", ["good.json: no prompt for svamp"]),
    ("teach --dataset good.json --method zs", ["one of the arguments --server --local --rationales is required"]),
    ("teach --dataset good.json --method zs --serv http://h/v1/completions", ["required"]),
])
def test_rubbish(run, words, messages):
    for name, text in FILES.items():
        pathlib.Path(name).write_text(text)
    code, _, err = run(*words.split())
    assert code == 2 and all(message in err for message in messages), err
    assert sorted(os.listdir()) == sorted(FILES) and all(pathlib.Path(name).read_text() == text for name, text in FILES.items())
    assert "pw@" not in err
