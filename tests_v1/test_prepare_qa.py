"""data/prepare_qa.py: every layout's records by hand, nothing on both sides of a split, what the scripts read, every way to get a file wrong."""

import hashlib
import json

import clf
import common as common_v2
import common_v1 as common
import prepare_qa
import pytest
import rl_ppo
import seq2seq
import sft_causal
import transformers
from conftest import ROOT

SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """prepare(layout, {split: (file name, its text or what it holds)}, "more flags") -> (exit code, what was written or None, stdout, stderr)."""
    def prepare(layout, files, *words, out="out.json"):
        monkeypatch.chdir(tmp_path)
        flags = []
        for split, (name, content) in files.items():
            content = content if isinstance(content, (str, bytes)) else json.dumps(content)
            (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
            flags += [f"--{split}", name]
        before = (tmp_path / out).exists()
        parse = json.loads if out.endswith(".json") else lambda text: [json.loads(line) for line in text.split("\n")[:-1]]
        try:
            code = prepare_qa.main(["--layout", layout, *flags, "--out", out, *words])
        except SystemExit as stop:
            code = stop.code
        written = parse((tmp_path / out).read_text(encoding="utf-8")) if (tmp_path / out).exists() and not before else None
        return code, written, *capsys.readouterr()
    return prepare


def ask(id, question, *answers, **more):
    return {"id": id, "question": question, "answers": [{"text": answer, "answer_start": 0} for answer in answers], **more}


def article(title, context, *qas):
    return {"title": title, "paragraphs": [{"context": context, "qas": list(qas)}]}


NORMANS = article("Normans", " The Norse Vikings settled.\n",
                  ask("a1", "Who settled?  ", "Vikings", " Norse Vikings", "Vikings", is_impossible=False),
                  {**ask("a2", "Who left?", is_impossible=True), "plausible_answers": [{"text": "Vikings", "answer_start": 10}]})
HEAT = article("Heat", "Heat {is} \"energy\".", ask("b1", "What is heat?", "energy"))
SQUAD = {"version": "v2.0", "data": [NORMANS, HEAT]}
TRIVIA = {"Data": [{"Question": "Which county is Leeds in?", "QuestionId": "tc_1", "QuestionSource": "x", "EntityPages": [], "Answer": {
    "Value": "Yorkshire", "Aliases": ["Yorks", "Yorkshire", " County of York ", ""], "NormalizedAliases": ["yorks"], "Type": "WikipediaEntity"}},
                   {"Question": "2 + 2?", "QuestionId": "tc_2", "Answer": {"Value": "4"}}], "Domain": "Web", "Version": 1.0}
SCIQ = ('question_id,set,question,correct_answer,distractor1,distractor2,distractor3,support\n'
        '7,valid,"What, if ""heated"", melts?",ice ,iron,wood,stone,"Ice melts.\nIt is ""water""."\n'
        '8,valid,Which way is up?,north,west,south,west,\n')
QUESTION = {"question": "Q?", "correct_answer": "a", "distractor1": "b", "distractor2": "c", "distractor3": "d", "support": ""}


def compare(question, *answers, scores=(1, -1)):
    return {"question": question, **{f"answer_{i}": answer for i, answer in enumerate(answers)}, **{f"score_{i}": s for i, s in enumerate(scores)},
            "quotes_0": {"title": ["t"], "extract": ["e"]}}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


SKY = {"dataset": "eli5", "id": "q1", "full_text": "Why is the sky blue?"}
WEBGPT = [compare(SKY, "Air scatters blue light [1][2, 3]. ", "The sea is blue [1].", scores=(0.5, -0.5)),
          compare("Why?", "no", "yes", scores=(-1.0, 1)), compare("Why?", "a", "b", scores=(0, 0.0)), compare("How?", "same [1]", "same [2]")]


# ------------------------------------------------------------------------------------------------ records


def test_squad(prepare, tmp_path):
    """The file to the byte, and what is shown."""
    code, _, shown, errors = prepare("squad", {"train": ("train.json", SQUAD)})
    first = ('{"prompt": "The Norse Vikings settled.\\n\\nWho settled?", "completion": "Vikings", '
             '"references": ["Vikings", "Norse Vikings"], "id": "a1"}')
    second = '{"prompt": "Heat {is} \\"energy\\".\\n\\nWhat is heat?", "completion": "energy", "references": ["energy"], "id": "b1"}'
    assert (code, errors) == (0, "")
    assert (tmp_path / "out.json").read_text() == '{"train": [\n' + first + ",\n" + second + "\n]}\n"
    assert shown.splitlines()[:3] == ["train.json: 3 questions, 1 without an answer dropped", "train: 0 repeated dropped", "out.json: 2 train"]
    assert shown.splitlines()[3].startswith("train, tokens of prompt (models/tiny-llama): 0% ")
    assert shown.splitlines()[4].startswith("train, tokens of completion (models/tiny-llama): 0% ") and shown.splitlines()[5:] == [first, second]


def test_squad_without_an_answer(prepare):
    code, written, shown, _ = prepare("squad", {"train": ("train.json", SQUAD)}, "--no_answer", " none ", "--to", "messages", out="out.jsonl")
    assert code == 0 and "3 questions, 1 without an answer kept, answered ' none '\n" in shown
    turns = [{"role": "user", "content": "The Norse Vikings settled.\n\nWho left?"}, {"role": "assistant", "content": "none"}]
    assert written[1] == {"messages": turns, "references": ["none"], "id": "a2", "split": "train"}
    assert "train, tokens of messages (models/tiny-llama): 0% " in shown


@pytest.mark.parametrize("file, content", [("a.json", {"data": SQUAD["data"]}), ("a.json", SQUAD["data"]), ("a.jsonl", lines(NORMANS, HEAT)),
                                           ("a.jsonl", lines(SQUAD))])
def test_squad_in_other_wrappings(prepare, file, content):
    expected = prepare("squad", {"train": ("train.json", SQUAD)}, out="expected.json")[1]
    assert prepare("squad", {"train": (file, content)})[1] == expected and len(expected["train"]) == 2


def test_triviaqa(prepare):
    code, written, shown, _ = prepare("triviaqa", {"eval": ("t.json", TRIVIA)})
    assert code == 0 and shown.startswith("t.json: 2 questions\neval: 0 repeated dropped\nout.json: 2 eval\n")
    assert written == {"eval": [
        {"prompt": "Which county is Leeds in?", "completion": "Yorkshire", "references": ["Yorkshire", "Yorks", "County of York"], "id": "tc_1"},
        {"prompt": "2 + 2?", "completion": "4", "references": ["4"], "id": "tc_2"}]}
    written = prepare("triviaqa", {"eval": ("t.json", TRIVIA)}, "--to", "messages", out="m.json")[1]
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    assert written["eval"][1] == {"messages": turns, "references": ["4"], "id": "tc_2"}


def test_webgpt(prepare):
    """The higher score is better; equal scores, and in pairs equal answers, are dropped and counted."""
    code, written, shown, _ = prepare("webgpt", {"train": ("w.jsonl", lines(*WEBGPT))}, "--strip_citations")
    assert code == 0 and shown.startswith("w.jsonl: 4 questions, 1 with equal scores dropped, 1 with equal answers dropped\n")
    assert written == {"train": [{"prompt": "Why is the sky blue?", "chosen": "Air scatters blue light.", "rejected": "The sea is blue.", "id": "q1"},
                                 {"prompt": "Why?", "chosen": "yes", "rejected": "no"}]}
    code, written, shown, _ = prepare("webgpt", {"train": ("w.json", WEBGPT)}, "--to", "messages", out="m.json")
    assert code == 0 and shown.startswith("w.json: 4 questions, 1 with equal scores dropped\n")
    assert [[message["content"] for message in record["messages"]] for record in written["train"]] == [
        ["Why is the sky blue?", "Air scatters blue light [1][2, 3]."], ["Why?", "yes"], ["How?", "same [1]"]]


@pytest.mark.parametrize("text, stripped", [("So [1] it is [12][3].", "So it is."), ("[1, 2] a [3-5] b [6–7]", " a b"),
                                            ("a[i] [x] [] (1)", "a[i] [x] [] (1)"), ("line [1]\n[2] next", "line\n next")])
def test_citations(text, stripped):
    assert prepare_qa.re.sub(prepare_qa.CITATION, "", text) == stripped


def test_sciq(prepare):
    """Quotation marks and a line break within a field; a passage may be missing."""
    code, written, shown, _ = prepare("sciq", {"train": ("s.csv", SCIQ)})
    assert code == 0 and shown.startswith("s.csv: 2 questions, 1 without a passage\n")
    assert written == {"train": [{"prompt": 'Ice melts.\nIt is "water".\n\nWhat, if "heated", melts?', "completion": "ice", "id": "7"},
                                 {"prompt": "Which way is up?", "completion": "north", "id": "8"}]}
    assert prepare("sciq", {"train": ("s.json", [QUESTION])}, out="j.json")[1] == {"train": [{"prompt": "Q?", "completion": "a"}]}


def test_sciq_choices(prepare):
    """Every choice once, in an order that neither the other rows nor that of the columns change, but the seed does."""
    rows = [{**QUESTION, "question": f"Q{i}?"} for i in range(40)]
    prompts = {name: [record["prompt"] for record in prepare("sciq", {"train": ("s.json", part)}, *words, out=f"{name}.json")[1]["train"]]
               for name, part, words in (("zero", rows, ["--choices"]), ("again", rows[::-1], ["--choices", "0"]), ("one", rows, ["--choices", "1"]))}
    assert prompts["zero"] == prompts["again"][::-1] and prompts["zero"] != prompts["one"]
    choices = [prompt.splitlines()[2:] for prompt in prompts["zero"]]
    assert all([line[:4] for line in part] == ["(A) ", "(B) ", "(C) ", "(D) "] and {line[4:] for line in part} == set("abcd") for part in choices)
    assert {line[1] for part in choices for line in part if line.endswith(" a")} == set("ABCD")  # the answer has no place of its own
    swapped = [{**row, "distractor1": "d", "distractor3": "b"} for row in rows]
    written = prepare("sciq", {"train": ("s.json", swapped)}, "--choices", out="swapped.json")[1]
    assert [record["prompt"] for record in written["train"]] == prompts["zero"]
    order = sorted(["north", "west", "south"], key=lambda choice: hashlib.sha256(f"0\nWhich way is up?\n{choice}".encode()).hexdigest())
    written = prepare("sciq", {"train": ("s.csv", SCIQ)}, "--choices", out="csv.json")[1]
    assert written["train"][1]["prompt"] == "Which way is up?\n\n" + "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABC", order))


# ------------------------------------------------------------------------------------------------ splits


def titles(written, n_asked):
    return {split: {record["id"].split("-")[0] for record in part} for split, part in written.items()}, \
        sorted(record["id"] for part in written.values() for record in part) == sorted(f"{i}-{j}" for i in range(60) for j in range(n_asked))


def test_no_article_is_in_two_splits(prepare):
    """Held out by title; the negative control, a split by question, tears articles."""
    data = [article(f"title {i}", f"Passage {i}.", *(ask(f"{i}-{j}", f"Question {j} of {i}?", "x") for j in range(5))) for i in range(60)]
    code, written, _, _ = prepare("squad", {"train": ("a.json", data)}, "--eval_share", "0.3", "--test_share", "0.2")
    sides, is_whole = titles(written, 5)
    assert code == 0 and is_whole and list(sides) == ["train", "eval", "test"]
    assert sum(map(len, sides.values())) == 60 and 10 <= len(sides["eval"]) <= 26 and 4 <= len(sides["test"]) <= 20
    without = [{**part, "title": f"title {i}-{j}", "paragraphs": [{"context": f"Passage {i}: {j}.", "qas": [qa]}]}
               for i, part in enumerate(data) for j, qa in enumerate(part["paragraphs"][0]["qas"])]
    sides, is_whole = titles(prepare("squad", {"train": ("b.json", without)}, "--eval_share", "0.3", "--test_share", "0.2", out="b.json.json")[1], 5)
    assert is_whole and sides["train"] & sides["eval"] & sides["test"]
    untitled = [{**part, "title": ""} for part in data]
    sides, is_whole = titles(prepare("squad", {"train": ("c.json", untitled)}, "--eval_share", "0.3", out="c.json.json")[1], 5)
    assert is_whole and sum(map(len, sides.values())) == 60 and len(sides["eval"]) > 5


def test_a_place_does_not_depend_on_the_other_lines(prepare):
    rows = [compare(f"question {i % 300}", f"better {i}", f"worse {i}") for i in range(600)]
    words = ["--eval_share", "0.2", "--test_share", "0.1"]
    whole = prepare("webgpt", {"train": ("w.json", rows)}, *words)[1]
    fewer = prepare("webgpt", {"train": ("w.json", rows[199::-1])}, *words, out="fewer.json")[1]
    sides = {split: {record["prompt"] for record in whole[split]} for split in whole}
    assert sum(map(len, sides.values())) == 300 and sum(map(len, whole.values())) == 600  # both answers to a question are on one side
    assert 40 <= len(sides["eval"]) <= 80 and 15 <= len(sides["test"]) <= 45
    assert all({record["prompt"] for record in fewer[split]} <= sides[split] for split in whole)


def test_what_a_later_split_has_is_dropped(prepare):
    """An article of eval leaves train as a whole, a prompt of eval also if its title is another one; a repeat is one but for case and white
    space; other answers are none."""
    train = [article("Heat", "x", ask("1", "a?", "b"), ask("2", "c?", "d")),
             article("Cold", "y", ask("3", "a?", "b"), ask("4", "A?  ", "B"), ask("5", "a?", "c")),
             article("Frost", "v", ask("9", "k?", "m"))]
    evals = [article(" heat", "z", ask("6", "e?", "f")), article("Ice", "y", ask("7", "g?", "h")), article("Rime", "V ", ask("10", "K?", "n"))]
    test = [article("Ice ", "w", ask("8", "g?", "h"))]
    files = {split: (f"{split}.json", part) for split, part in (("train", train), ("eval", evals), ("test", test))}
    code, written, shown, _ = prepare("squad", files)
    ids = {split: [record["id"] for record in part] for split, part in written.items()}
    assert code == 0 and ids == {"train": ["3", "5"], "eval": ["6", "10"], "test": ["8"]}
    assert "train: 1 repeated, 3 also in eval dropped; prompts with several answers: 1\neval: 0 repeated, 1 also in test dropped\ntest: 0" in shown


def test_a_passage_is_in_one_split_whatever_its_title(prepare):
    train = [article("Normans", "Of Normans.", ask("1", "who?", "a"), ask("2", "when?", "b")), article("Heat", "Of heat.", ask("3", "what?", "c"))]
    for i, title in enumerate(("", "Normans_(2)")):
        evals = [article(title, "of  normans.", ask("4", "where?", "d"))]
        code, written, _, _ = prepare("squad", {"train": ("a.json", train), "eval": ("b.json", evals)}, out=f"{i}.json")
        assert code == 0 and [record["id"] for record in written["train"]] == ["3"]


def test_a_list_that_is_named_after_another_split_is_refused(prepare):
    code, _, _, errors = prepare("sciq", {"train": ("a.json", {"test": [QUESTION]})})
    assert code == 2 and "a.json: has the lists test; expected one, a file for each split" in errors


def test_the_same_question_with_another_passage_is_in_one_split(prepare):
    """SciQ: the question decides, not the prompt."""
    train = [{**QUESTION, "support": "One."}, {**QUESTION, "question": "R?", "support": "One."}]
    code, written, shown, _ = prepare("sciq", {"train": ("a.json", train), "test": ("b.json", [{**QUESTION, "support": "Two."}])})
    assert code == 0 and [record["prompt"] for record in written["train"]] == ["One.\n\nR?"] and "train: 0 repeated, 1 also in test dropped" in shown


def test_same_bytes_every_time(prepare, tmp_path):
    words = ["--choices", "3", "--eval_share", "0.5", "--tokenizer", str(ROOT / "models" / "tiny-t5")]
    for out in ("one.jsonl", "two.jsonl"):
        assert prepare("sciq", {"train": ("s.csv", SCIQ)}, *words, out=out)[0] == 0
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


# ------------------------------------------------------------------------------------------------ the scripts read it


def read(path):
    problems = []
    found = list(common.read_records(path, problems))
    assert found and not problems
    return found


@pytest.mark.parametrize("layout, file, content", [("squad", "a.json", SQUAD), ("triviaqa", "a.json", TRIVIA), ("sciq", "a.csv", SCIQ)])
def test_seq2seq_and_sft_read_it(prepare, tmp_path, layout, file, content):
    for to, out in (("pairs", "p.json"), ("messages", "m.jsonl")):
        assert prepare(layout, {"eval": (file, content)}, "--to", to, out=out)[0] == 0
    pairs, chats = read(tmp_path / "p.json"), read(tmp_path / "m.jsonl")
    assert len(pairs) == len(chats) == 2
    for (_, split, record), (_, chat_split, chat) in zip(pairs, chats):
        problems, prompt, completion = [], record["prompt"], record["completion"]
        example = seq2seq.to_example("set", record, "here", problems)
        assert (split, chat_split, problems) == ("eval", "eval", []) and (example.prompts, example.completions) == ([prompt], [completion])
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        for each in (record, chat):
            assert sft_causal.to_conversations(None, each) == [turns]


def test_clf_and_ppo_read_it(prepare, tmp_path):
    assert prepare("webgpt", {"train": ("w.json", WEBGPT)}, out="p.jsonl")[0] == prepare("triviaqa", {"train": ("t.json", TRIVIA)})[0] == 0
    args, problems = clf.parse_args(["--model_init_name", "x", "--loss", "pairwise"]), []
    clf.complete_flags(args, None, problems)
    examples = [clf.to_example(args, "set", split, record, "here", problems) for _, split, record in read(tmp_path / "p.jsonl")]
    assert len(examples) == 3 and examples[1].texts == ["Why?\n\nyes", "Why?\n\nno"] and not problems
    prompts = common_v2.Prompts(transformers.AutoTokenizer.from_pretrained(ROOT / "models" / "tiny-llama"), is_raw=True)
    texts = [rl_ppo.to_example(prompts, False, set(), "set", record).text for _, _, record in read(tmp_path / "out.json")]
    assert texts == ["Which county is Leeds in?", "2 + 2?"] and not problems


# ------------------------------------------------------------------------------------------------ what is refused


def test_all_problems_at_once_with_their_places(prepare):
    data = [article("T", "c", ask("1", "q?", "a", is_impossible=True), ask("2", "", "a"), {"id": "3", "question": "q?", "answers": "a"}, "qa",
                    ask("4", "q?", is_impossible=False)),
            {"title": "U"}, {"title": 5, "paragraphs": [{"context": "c", "qas": [ask("5", "q?", "a")]}, 7]}]
    files = {"train": ("a.json", {"data": data, "version": 1})}
    code, written, shown, errors = prepare("squad", files, "--choices", "--eval_share", "1", out="out.txt")
    assert (code, written, shown) == (2, None, "")
    assert errors.splitlines() == [
        "--out out.txt: expected a name that ends in .json or .jsonl, in a folder that exists",
        "--eval_share 1.0, --test_share 0.0: expected shares of 0 or more, together below 1",
        "--choices: only with --layout sciq",
        "a.json, data[1]: no list 'paragraphs' (has: version, title)",
        "a.json, data[2], paragraphs[1]: a int, expected an object",
        "a.json, data[0], paragraphs[0], qas[3]: a str, expected an object",
        "a.json, data[0], paragraphs[0], qas[0]: is_impossible is True, and there are 1 answers",
        "a.json, data[0], paragraphs[0], qas[1]: 'question' is empty",
        "a.json, data[0], paragraphs[0], qas[2]: 'answers' is no list of objects",
        "a.json, data[0], paragraphs[0], qas[4]: is_impossible is False, and there are 0 answers",
        "a.json, data[2], paragraphs[0], qas[0]: 'title' is a int, expected a string",
    ]


def test_skip_malformed_drops_and_counts(prepare):
    rows = [*WEBGPT, compare("Why?", "", "x"), compare("Why?", "x", "", scores=(2, 1)), {"question": "x"}]
    code, written, shown, _ = prepare("webgpt", {"train": ("w.json", rows)}, "--skip_malformed")
    assert code == 0 and len(written["train"]) == 3
    assert shown.startswith("w.json: 7 questions, 1 with equal scores dropped, 3 malformed dropped; the first: w.json, [4]: 'answer_0' is empty\n")
    code, written, _, errors = prepare("webgpt", {"train": ("w.json", rows[4:])}, "--skip_malformed", out="other.json")
    assert (code, written) == (2, None)
    assert errors.startswith("train: no record is left (0 repeated dropped; w.json: 3 questions, 3 malformed dropped;")
    written = prepare("webgpt", {"train": ("w.json", rows)}, "--skip_malformed", "--to", "messages", out="m.json")[1]
    assert [record["messages"][1]["content"] for record in written["train"]][-1] == "x"  # an assistant's turn needs the better answer alone


@pytest.mark.parametrize("layout, file, content, words, message", [
    ("squad", "a.json", "{", [], "a.json: not JSON"),
    ("squad", "a.json", "[1]", [], "a.json, [0]: a int, expected an object"),
    ("squad", "a.json", {"x": 1}, [], "a.json: no list 'paragraphs' (has: x)"),
    ("squad", "a.json", {"data": 5}, [], "a.json: no list 'data' (has: data)"),
    ("squad", "a.json", {"data": []}, [], "train: no record is left (0 repeated dropped; a.json: 0 questions)"),
    ("squad", "a.json", [NORMANS], ["--eval_share", "1e-9"], "eval: no record is left"),
    ("squad", "a.json", [NORMANS], ["--no_answer", " "], "--no_answer: the text is empty"),
    ("squad", "a.json", [article("T", "c", ask("1", "q?", 5))], [], "qas[0]: 'text' is a int, expected a string"),
    ("squad", "a.json", [article("T", "c", {"id": "1", "answers": []})], [], "qas[0]: no 'question' (has: title, context, id, answers)"),
    ("squad", "a.json", [article("T", "c \ud800", ask("1", "q?", "a"))], [], "qas[0]: 'utf-8' codec can't encode"),
    ("squad", "a.json", [article("\ud800", "c", ask("1", "q?", "a"))], [], "qas[0]: 'utf-8' codec can't encode"),
    ("squad", "a.json", [NORMANS], ["--strip_citations"], "--strip_citations: only with --layout webgpt"),
    ("squad", "a.json", [NORMANS], ["--test_share", "nan"], "--test_share nan: expected shares of 0 or more, together below 1"),
    ("squad", "a.json", [NORMANS], ["--eval", "a.json"], "train: no record is left (0 repeated, 1 also in eval dropped; a.json"),
    ("squad", "a.json", [NORMANS], ["--eval", "a.json", "--eval_share", "0.1"], "--eval_share: eval has a file"),
    ("squad", "a.json", [NORMANS], ["--eval", "nowhere.json"], "nowhere.json: cannot be read"),
    ("squad", "a.json", [NORMANS], ["--layout", "squad3"], "invalid choice: 'squad3'"),
    ("squad", "a.json", [NORMANS], ["--tokenizer", "nowhere/at/all"], "--tokenizer nowhere/at/all: "),
    ("triviaqa", "a.json", {"Data": [{"Question": "q?"}]}, [], "a.json, Data[0]: no object 'Answer' (has: Question)"),
    ("triviaqa", "a.json", {"Data": [{"Question": "q?", "Answer": {"Value": "v", "Aliases": [1]}}]}, [], "'Aliases' is no list of strings"),
    ("triviaqa", "a.json", {"Data": [{"Question": "q?", "Answer": {}}], "Version": 1}, [], "a.json, Data[0]: no 'Value' (has: )"),
    ("webgpt", "a.jsonl", lines(WEBGPT[0]) + "{\n", [], "a.jsonl, line 2: not JSON"),
    ("webgpt", "a.jsonl", lines(compare({"id": 1}, "a", "b")), [], "a.jsonl, line 1: no 'full_text' (has: id)"),
    ("webgpt", "a.jsonl", lines(compare("q", "a", "b", scores=(True, 0))), [], "score_0 and score_1 are True and 0, expected numbers"),
    ("webgpt", "a.jsonl", lines(compare("q", "a", "b", scores=(float("nan"), 0))), [], "score_0 and score_1 are nan and 0, expected numbers"),
    ("webgpt", "a.jsonl", lines(compare("q", "a", "b", scores=(10 ** 400, 0))), [], "0000 and 0, expected numbers"),
    ("webgpt", "a.jsonl", lines(compare("q", "a", "b", scores=("1",))), [], "score_0 and score_1 are '1' and None, expected numbers"),
    ("webgpt", "a.jsonl", lines(compare("q", "[1]", "b")), ["--strip_citations"], "a.jsonl, line 1: 'answer_0' is empty"),
    ("webgpt", "a.json", {"train": WEBGPT, "eval": WEBGPT}, [], "a.json: has the lists train, eval; expected one, a file for each split"),
    ("sciq", "a.csv", SCIQ + 'x,"y\n', [], "a.csv, line 5: not a table"),
    ("sciq", "a.csv", SCIQ + "x,y\n", [], "a.csv, line 5: number of columns 2, expected 8"),
    ("sciq", "a.csv", "question,answer\nq,a\n", [], "a.csv, line 2: no 'correct_answer' (has: question, answer)"),
    ("sciq", "a.csv", b"question\n\xff\n", [], "a.csv: cannot be read ('utf-8' codec"),
    ("sciq", "a.json", [{**QUESTION, "support": 5}], [], "a.json, [0]: 'support' is a int, expected a string"),
    ("sciq", "a.json", [{name: value for name, value in QUESTION.items() if name != "support"}], [], "a.json, [0]: no 'support'"),
    ("sciq", "a.json", [{**QUESTION, "distractor2": " "}], ["--choices"], "a.json, [0]: 'distractor2' is empty"),
    ("sciq", "a.json", [QUESTION], ["--choice"], "unrecognized arguments: --choice")])
def test_refused(prepare, layout, file, content, words, message):
    code, written, shown, errors = prepare(layout, {"train": (file, content)}, *words)
    assert (code, written, shown) == (2, None, "") and message in errors


def test_a_share_needs_a_file(prepare):
    assert "no data: expected --train FILE, --eval FILE or --test FILE" in prepare("squad", {})[3]
    code, written, _, errors = prepare("squad", {"test": ("a.json", SQUAD)}, "--eval_share", "0.1")
    assert (code, written, errors) == (2, None, "--eval_share: needs --train FILE, of which it is a share\n")


def test_an_existing_file_is_never_overwritten(prepare, tmp_path):
    assert prepare("squad", {"train": ("a.json", SQUAD)})[0] == 0
    before = (tmp_path / "out.json").read_bytes()
    code, _, _, errors = prepare("triviaqa", {"train": ("t.json", TRIVIA)})
    assert code == 2 and errors.startswith("--out out.json: exists") and (tmp_path / "out.json").read_bytes() == before


# ------------------------------------------------------------------------------------------------ the real file


def test_sciq_as_published(prepare):
    path = SHARED / "sciq" / "SciQ_valid.csv"
    if not path.is_file():
        pytest.skip(f"no {path}")
    words = ["--train", str(path), "--eval_share", "0.1", "--test_share", "0.1", "--choices"]
    code, written, shown, _ = prepare("sciq", {}, *words)
    assert code == 0 and shown.splitlines()[0] == f"{path}: 1000 questions, 113 without a passage, 2 with fewer than four different choices" and shown.count(": 0 repeated dropped\n") == 3
    assert {split: len(part) for split, part in written.items()} == {"train": 805, "eval": 92, "test": 103}
    assert written["train"][0] == {"prompt": "Who proposed the theory of evolution by natural selection?\n\n"
                                             "(A) Scopes\n(B) shaw\n(C) darwin\n(D) Linnaeus", "completion": "darwin", "id": "11679"}
    whole = [record for part in written.values() for record in part]
    assert all(f") {record['completion']}" in record["prompt"] for record in whole)
    assert sum("(D)" not in record["prompt"] for record in whole) == 2  # two rows name a choice twice
