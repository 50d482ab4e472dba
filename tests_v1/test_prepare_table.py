"""data/prepare_table.py: every format by hand, templates, splits without leaks, what the scripts read, every way to get a table wrong, real files."""

import json
import types

import clf
import common as common_v2
import common_v1 as common
import prepare_table
import prepare_text
import prepare_tsv
import pytest
import rl_ppo
import seq2seq
import sft_causal
import transformers
from conftest import ROOT

SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """prepare({file name: its text, or what it holds}, "flags") -> (exit code, what was written or None, stdout, stderr)."""
    def prepare(files, *words, out="out.json"):
        monkeypatch.chdir(tmp_path)
        for name, content in files.items():
            content = content if isinstance(content, (str, bytes)) else json.dumps(content)
            (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        before = (tmp_path / out).exists()
        parse = json.loads if out.endswith(".json") else lambda text: [json.loads(line) for line in text.split("\n")[:-1]]
        try:
            code = prepare_table.main([*words, "--out", out])
        except SystemExit as stop:
            code = stop.code
        written = parse((tmp_path / out).read_text(encoding="utf-8")) if (tmp_path / out).exists() and not before else None
        return code, written, *capsys.readouterr()
    return prepare


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


TRAIN = ["--train", "t.csv"]
PAIR = ["--prompt", "{q}", "--completion", "{a}"]
CSV = 'q,a,bad,topic\n"2 + 2, ""please"" =",4,5,sum\n"one\ntwo",three, two ,"list, of words"\n'
USER = {"role": "user", "content": '2 + 2, "please" ='}


# ------------------------------------------------------------------------------------------------ formats


def test_pairs(prepare, tmp_path):
    """Quotation marks, commas and a line break within CSV fields; the file to the byte, and what is shown."""
    code, _, shown, errors = prepare({"t.csv": CSV}, *TRAIN, "--prompt", "question: {q} choices: {a}, {bad}", "--completion", "{a}")
    first = '{"prompt": "question: 2 + 2, \\"please\\" = choices: 4, 5", "completion": "4"}'
    second = '{"prompt": "question: one\\ntwo choices: three, two", "completion": "three"}'
    assert (code, errors) == (0, "")
    assert (tmp_path / "out.json").read_text() == '{"train": [\n' + first + ",\n" + second + "\n]}\n"
    assert shown.splitlines()[:3] == ["t.csv: 2 rows", "train: 0 repeated dropped", "out.json: 2 train"]
    assert shown.splitlines()[3].startswith("train, tokens of prompt (models/tiny-llama): 0% ")
    assert shown.splitlines()[4].startswith("train, tokens of completion (models/tiny-llama): 0% ") and shown.splitlines()[5:] == [first, second]


@pytest.mark.parametrize("words, first", [
    (["--prompt", "{q}"], {"prompt": '2 + 2, "please" ='}),
    (["--prompt", "{q}", "--keep", "a", "topic"], {"prompt": '2 + 2, "please" =', "a": "4", "topic": "sum"}),
    (["--prompt", "{q}", "--chosen", "{a}!", "--rejected", "{bad}"], {"prompt": '2 + 2, "please" =', "chosen": "4!", "rejected": "5"}),
    (["--text", "{topic}\\n\\n{q} {a}"], {"text": 'sum\n\n2 + 2, "please" = 4'}),
    (["--text", "{q}", "--group", "topic"], {"text": '2 + 2, "please" =', "skill": "sum"}),
    (["--user", "{q}"], {"messages": [USER]}),
    (["--user", "{q}", "--assistant", "{a}", "--system", "Be brief."],
     {"messages": [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "4"}]}),
    (["--user", "{q}", "--user", "Why not {bad}?", "--assistant", "{a}"],
     {"messages": [USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Why not 5?"}]})])
def test_formats(prepare, words, first):
    code, written, _, _ = prepare({"t.csv": CSV}, *TRAIN, *words, "--where", "a=4", out="out.jsonl")
    assert code == 0 and written == [{**first, "split": "train"}]


def test_scores(prepare):
    """A TSV's quotation marks are text; numbers are what they are; words are --positive or not."""
    table = '\ufefftext\tlabel\tid\n"fine\t1\ta\nnot "so" good \t-0.5\tb\n'
    code, written, _, _ = prepare({"t.tsv": table}, "--train", "t.tsv", "--input", "{text}", "--target", "label", "--keep", "id")
    assert code == 0 and written == {"train": [{"input": '"fine', "target": 1.0, "id": "a"}, {"input": 'not "so" good', "target": -0.5, "id": "b"}]}
    code, written, shown, _ = prepare({"t.tsv": "ham\thello\nspam\twin\nother\tbye\nham\tok\n"}, "--train", "t.tsv", "--no_header", "--input", "{1}",
                                      "--target", "0", "--positive", "spam", out="b.json")
    assert code == 0 and [(record["input"], record["target"]) for record in written["train"]] == [("hello", 0), ("win", 1), ("bye", 0), ("ok", 0)]
    assert "target 1: 'spam' (1 rows); target 0: 'ham' (2), 'other' (1)\n" in shown


def test_template_fields(prepare):
    """Names with dots, brackets and blanks; paths; a column's own braces are no template; numbers and true as JSON writes them."""
    row = {"a.b": "dot", "c [d] e": "{f}", "f": 1.50, "g": True, "h": {"i": [{"j": " deep "}, 2]}, "k": 10 ** 20, "l": -0.0}
    template = "{a.b}|{c [d] e}|{f}|{g}|{h.i.0.j}|{h.i.1}|{k}|{l}|{}|{{f}}\\n."
    code, written, _, _ = prepare({"t.jsonl": lines(row)}, "--train", "t.jsonl", "--text", template)
    assert code == 0 and written == {"train": [{"text": "dot|{f}|1.5|true|deep|2|100000000000000000000|-0.0|{}|{1.5}\n."}]}
    code, written, _, _ = prepare({"t.jsonl": lines({"h.i": "column", "h": {"i": "path"}})}, "--train", "t.jsonl", "--text", "{h.i}", out="b.json")
    assert written == {"train": [{"text": "column"}]}


def test_kept_columns_stay_as_they_are(prepare):
    row = {"q": "x", "a": "y", "n": {"m": [1, None]}, "e": "", "t": "task"}
    code, written, _, _ = prepare({"t.json": [row]}, "--train", "t.json", *PAIR, "--keep", "n", "e", "n.m.0", "--group", "t")
    assert code == 0 and written == {"train": [{"prompt": "x", "completion": "y", "skill": "task", "n": {"m": [1, None]}, "e": "", "n.m.0": 1}]}


def test_where(prepare):
    rows = [{"q": "a", "n": 1, "ok": True}, {"q": "b", "n": 2, "ok": True}, {"q": "c", "n": 1, "ok": False},
            {"q": "d", "n": 1}, {"q": "e", "n": "1", "ok": "true"}]
    code, written, shown, _ = prepare({"t.json": rows}, "--train", "t.json", "--prompt", "{q}", "--where", "n=1", "ok= true")
    assert code == 0 and [record["prompt"] for record in written["train"]] == ["a", "e"]
    assert shown.startswith("t.json: 5 rows, 3 rows left out by --where n=1 ok= true\n")


def test_rows_within_an_object(prepare):
    files = {"t.json": {"name": "N", "version": 1, "data": [{"title": "T", "items": [{"q": "a"}, {"q": "b"}]}]}}
    code, written, _, _ = prepare(files, "--train", "t.json", "--rows", "data", "items", "--prompt", "{name} {title} {q}")
    assert code == 0 and written == {"train": [{"prompt": "N T a"}, {"prompt": "N T b"}]}
    errors = prepare(files, "--train", "t.json", "--rows", "data", "item", "--prompt", "{q}", out="b.json")[3]
    assert errors.startswith("t.json, data[0]: no list 'item' (has: name, version, title, items)\n")


def test_skip_empty_drops_and_counts(prepare):
    rows = [{"q": "a", "a": "b"}, {"q": "a"}, {"q": None, "a": "b"}, {"q": "c", "a": " \n"}, {"q": float("nan"), "a": "b"}, {"q": 0, "a": False}]
    code, written, shown, _ = prepare({"t.jsonl": lines(*rows)}, "--train", "t.jsonl", *PAIR, "--skip_empty")
    assert code == 0 and written == {"train": [{"prompt": "a", "completion": "b"}, {"prompt": "0", "completion": "false"}]}
    assert shown.startswith("t.jsonl: 6 rows, 4 rows with missing or empty values dropped\n")
    code, written, _, errors = prepare({"t.jsonl": lines(*rows)}, "--train", "t.jsonl", *PAIR, out="b.json")
    assert (code, written) == (2, None) and errors.splitlines() == [
        "t.jsonl, line 2: no 'a' (has: q)", "t.jsonl, line 3: 'q' is empty", "t.jsonl, line 4: 'a' is empty", "t.jsonl, line 5: 'q' is empty"]


def test_equal_replies_are_dropped_and_counted(prepare):
    code, written, shown, _ = prepare({"t.csv": "q,a,b\nx,y, y\nx,y,Y\n"}, *TRAIN, "--prompt", "{q}", "--chosen", "{a}", "--rejected", "{b}")
    assert code == 0 and written == {"train": [{"prompt": "x", "chosen": "y", "rejected": "Y"}]}
    assert shown.startswith("t.csv: 2 rows, 1 rows whose replies are equal dropped\n")


# ------------------------------------------------------------------------------------------------ splits


def test_split_column(prepare):
    words = ["train", "Training", "eval", "evaluation", "dev", "development", "val", "VALID", "validation", "test", "testing"]
    table = "q,part\n" + "".join(f"{word}s,{word}\n" for word in words)
    code, written, _, _ = prepare({"t.csv": table}, *TRAIN, "--prompt", "{q}", "--split_column", "part")
    assert code == 0 and {split: [record["prompt"][:-1] for record in part] for split, part in written.items()} == {
        "train": words[:2], "eval": words[2:9], "test": words[9:]}
    written = prepare({"t.jsonl": lines({"q": "a"}, {"q": "b", "split": "eval"})}, "--train", "t.jsonl", "--prompt", "{q}", "--split_column", "split",
                      out="b.jsonl")[1]
    assert written == [{"prompt": "a", "split": "train"}, {"prompt": "b", "split": "eval"}]  # as in data/README.md
    written = prepare({"t.csv": "q,part\nx,dev\n"}, *TRAIN, "--prompt", "{q}", "--split_column", "part", out="c.json")[1]
    assert written == {"eval": [{"prompt": "x"}]}
    words = ["--prompt", "{q}", "--split_column", "part", "--test_share", "0.5"]
    code, written, _, _ = prepare({"t.csv": "q,part\nx,dev\n" + "".join(f"{i},train\n" for i in range(20))}, *TRAIN, *words, out="d.json")
    assert code == 0 and len(written["eval"]) == 1 and len(written["train"]) + len(written["test"]) == 20 and len(written["test"]) > 3


def test_a_split_column_that_is_not_used_is_said(prepare):
    code, _, shown, _ = prepare({"t.jsonl": lines({"q": "b", "split": "eval"})}, "--train", "t.jsonl", "--prompt", "{q}")
    assert code == 0 and "WARNING: t.jsonl has a column 'split', which is not used; --split_column split uses it\n" in shown


def test_lists_of_a_json_file_are_its_splits(prepare):
    content = {"train": [{"q": "a"}], "validation": [{"q": "b"}], "test": [{"q": "c"}]}
    assert prepare({"t.json": content}, "--train", "t.json", "--prompt", "{q}")[1] == {"train": [{"prompt": "a"}], "eval": [{"prompt": "b"}],
                                                                                       "test": [{"prompt": "c"}]}
    assert prepare({"t.json": {"rows": [{"q": "a"}]}}, "--eval", "t.json", "--prompt", "{q}", out="b.json")[1] == {"eval": [{"prompt": "a"}]}
    for words, content in ((["--train", "t.json", "--test", "t.json"], content), (["--train", "t.json"], {**content, "task": [{"q": "d"}]})):
        code, written, _, errors = prepare({"t.json": content}, *words, "--prompt", "{q}", out="c.json")
        assert (code, written) == (2, None) and "t.json: has the lists train, validation, test" in errors and "expected one list, or" in errors
    content = {"train": [{"q": "a"}], "eval": [{"q": "b"}]}
    code, written, _, errors = prepare({"t.json": content}, "--train", "t.json", "--prompt", "{q}", "--eval_share", "0.1", out="c.json")
    assert (code, written, errors) == (2, None, "--eval_share: the data has eval records of its own\n")


@pytest.mark.parametrize("path", ["./t.json", "sub//t.json", "sub/../t.json"])
def test_lists_are_splits_however_the_path_is_written(prepare, tmp_path, path):
    (tmp_path / "sub").mkdir()
    content = {"train": [{"q": "a", "a": "1"}], "eval": [{"q": "b", "a": "2"}], "test": [{"q": "c", "a": "3"}]}
    code, written, _, _ = prepare({"t.json": content, "sub/t.json": content}, "--train", path, *PAIR)
    assert code == 0 and {split: [record["prompt"] for record in part] for split, part in written.items()} == {"train": ["a"], "eval": ["b"], "test": ["c"]}


def test_a_single_list_is_the_split_that_its_name_says(prepare):
    for name, split in (("eval", "eval"), ("validation", "eval"), ("test", "test"), ("train", "train"), ("data", "train")):
        code, written, _, _ = prepare({"t.json": {"train": [], name: [{"q": "c", "a": "3"}], "test" if name != "test" else "eval": []}},
                                      "--train", "t.json", *PAIR, out=f"{name}.json")
        assert code == 0 and {s: len(part) for s, part in written.items()} == {split: 1}, name
    code, _, _, errors = prepare({"t.json": {"test": [{"q": "c", "a": "3"}]}}, "--train", "t.json", "--eval", "t.json", *PAIR, out="x.json")
    assert code == 2 and "t.json: has the lists test; expected one list" in errors
    code, _, _, errors = prepare({"t.json": {"train": [{"q": "c", "a": "3"}]}}, "--eval", "t.json", *PAIR, out="x.json")
    assert code == 2 and "t.json: has the lists train; expected one list" in errors


def test_braces_that_name_nothing_are_said(prepare):
    code, written, _, errors = prepare({"t.csv": "q,a\nx,y\n"}, *TRAIN, "--prompt", "{} {q}", "--completion", "{a} {foo")
    assert code == 0 and written["train"] == [{"prompt": "{} x", "completion": "y {foo"}]
    assert [line.split(": ")[1] for line in errors.splitlines()] == ["--prompt", "--completion"] and "WARNING" in errors


def test_a_write_that_fails_leaves_nothing(prepare, tmp_path, monkeypatch):
    """A full disk; a name that appears, or is a link to nowhere."""
    monkeypatch.setattr(prepare_table.records, "pieces", lambda path, splits: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    code, written, _, errors = prepare({"t.csv": "q,a\nx,y\n"}, *TRAIN, *PAIR)
    assert code == 2 and written is None and "--out out.json: [Errno 28]" in errors and [path.name for path in tmp_path.iterdir()] == ["t.csv"]
    monkeypatch.undo()
    (tmp_path / "link.json").symlink_to("nowhere.json")
    code, _, _, errors = prepare({}, *TRAIN, *PAIR, out="link.json")
    assert code == 2 and "--out link.json: exists" in errors


def test_no_prompt_is_in_two_splits(prepare):
    """Held out by prompt, whatever the answer and the other rows; the negative control, distinct prompts, tears what had the same."""
    def rows(mark):
        return [{"q": f"question {i % 200}" + mark * i, "a": f"answer {i}"} for i in range(400)]
    words = ["--train", "t.json", "--user", "{q}", "--assistant", "{a}", "--system", "s", "--eval_share", "0.2", "--test_share", "0.1"]

    def sides(written):
        return {split: {" ".join(record["messages"][1]["content"].split()) for record in part} for split, part in written.items()}
    code, written, _, _ = prepare({"t.json": rows("")}, *words)
    whole = sides(written)
    assert code == 0 and list(whole) == ["train", "eval", "test"] and sum(map(len, written.values())) == 400 and sum(map(len, whole.values())) == 200
    assert 25 <= len(whole["eval"]) <= 55 and 8 <= len(whole["test"]) <= 32
    fewer = sides(prepare({"t.json": rows("")[100::-1]}, *words, out="fewer.json")[1])
    assert all(fewer[split] <= whole[split] for split in whole)
    same = sides(prepare({"t.json": rows(" ")}, *words, out="blanks.json")[1])  # but for white space the same prompts
    assert same == whole
    torn = sides(prepare({"t.json": rows(".")}, *words, out="torn.json")[1])
    torn = {split: {prompt.rstrip(".") for prompt in part} for split, part in torn.items()}
    assert torn["train"] & torn["eval"] and torn["train"] & torn["test"]


def test_a_question_without_an_answer_is_a_prompt_of_its_own(prepare):
    """For rl_ppo.py: the last turn is the user's, and counts."""
    files = {"t.json": [{"q": f"question {i % 30}"} for i in range(40)]}
    code, written, _, _ = prepare(files, "--train", "t.json", "--user", "{q}", "--eval_share", "0.3")
    assert code == 0 and sum(map(len, written.values())) == 30 and len(written["eval"]) > 3


def test_repeats_and_what_a_later_split_has(prepare):
    """The later split keeps a prompt, whatever its answer; a repeat is one but for case and white space; other answers are none."""
    files = {"t.csv": "q,a\na,1\nA , 1\na,2\nb,1\nC,1\nd,1\n", "e.csv": "q,a\nb,2\ne,1\nf,1\n", "s.csv": "q,a\nc,1\nf,1\n"}
    code, written, shown, _ = prepare(files, *TRAIN, "--eval", "e.csv", "--test", "s.csv", *PAIR)
    assert code == 0 and {split: [record["prompt"] + record["completion"] for record in part] for split, part in written.items()} == {
        "train": ["a1", "a2", "d1"], "eval": ["b2", "e1"], "test": ["c1", "f1"]}
    assert "train: 1 repeated, 1 also in eval, 1 also in test dropped; prompts with several answers: 1\n" in shown
    assert "\neval: 0 repeated, 1 also in test dropped\n" in shown


def test_same_bytes_every_time(prepare, tmp_path):
    rows = [{"q": f"{i}", "a": "x"} for i in range(50)]
    for out in ("one.jsonl", "two.jsonl"):
        assert prepare({"t.json": rows}, "--train", "t.json", *PAIR, "--eval_share", "0.3", out=out)[0] == 0
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


# ------------------------------------------------------------------------------------------------ the scripts read it


def read(path):
    problems = []
    found = list(common.read_records(path, problems))
    assert len(found) == 2 and not problems
    return [(split, record) for _, split, record in found]


def test_every_format_is_what_its_scripts_read(prepare, tmp_path):
    formats = {"pair": PAIR, "prompt": ["--prompt", "{q}", "--keep", "a"], "text": ["--text", "{q}"], "score": ["--input", "{q}", "--target", "n"],
               "preference": ["--prompt", "{q}", "--chosen", "{a}", "--rejected", "{bad}"], "asked": ["--user", "{q}"],
               "chat": ["--user", "{q}", "--assistant", "{a}", "--user", "{bad}?", "--assistant", "no {a}", "--system", "s"]}
    rows = [{"q": "x", "a": "y", "bad": "z", "n": 1}, {"q": "1 + 1", "a": 2, "bad": 3, "n": 0.5}]
    found = {}
    for name, words in formats.items():
        assert prepare({"t.json": rows}, "--train", "t.json", *words, out=f"{name}.jsonl")[0] == 0
        found[name] = read(tmp_path / f"{name}.jsonl")
    problems = []
    examples = [seq2seq.to_example("set", record, "here", problems) for _, record in found["pair"]]
    assert [(e.prompts, e.completions) for e in examples] == [(["x"], ["y"]), (["1 + 1"], ["2"])] and not problems
    options = types.SimpleNamespace(template="chatml")
    for name, n_turns in (("pair", 2), ("chat", 5)):
        for _, record in found[name]:
            (messages,) = sft_causal.to_conversations(options, record)
            assert len(messages) == n_turns and messages[-1]["role"] == "assistant"
    texts = [sft_causal.to_conversations(options, record)[0][0]["content"] for _, record in found["text"]]
    assert texts == ["x", "1 + 1"]
    scored = {}
    for name, loss in (("score", "cross_entropy"), ("preference", "pairwise")):
        args = clf.parse_args(["--model_init_name", "x", "--loss", loss])
        clf.complete_flags(args, None, problems)
        scored[name] = [clf.to_example(args, "set", split, record, "here", problems) for split, record in found[name]]
    assert [(e.texts, e.target) for e in scored["score"]] == [(["x"], 1.0), (["1 + 1"], 0.5)] and not problems
    assert [e.texts for e in scored["preference"]] == [["x\n\ny", "x\n\nz"], ["1 + 1\n\n2", "1 + 1\n\n3"]]
    prompts = common_v2.Prompts(transformers.AutoTokenizer.from_pretrained(ROOT / "models" / "tiny-llama"), is_raw=True)
    for name in ("prompt", "asked"):
        assert [rl_ppo.to_example(prompts, False, set(), "set", record).text for _, record in found[name]] == ["x", "1 + 1"] and not problems
    assert [record["a"] for _, record in found["prompt"]] == ["y", 2]
    assert list(prepare_text.read_documents("train", tmp_path / "text.jsonl", problems)) == [("train", "x"), ("train", "1 + 1")] and not problems


# ------------------------------------------------------------------------------------------------ what is refused


def test_all_problems_at_once_with_their_lines(prepare):
    files = {"t.csv": 'q,a,y\nx,,1\n,b,word\n"x","y",inf\nx,y,\nx,y,2\n', "e.csv": "q,b\nx,y\n"}
    code, written, shown, errors = prepare(files, *TRAIN, "--eval", "e.csv", "--input", "{q} {a}", "--target", "y", "--positive", "", "--where", "q",
                                           "--keep", "target", "--eval_share", "0.1", "--no_header", out="out.txt")
    assert (code, written, shown) == (2, None, "")
    assert errors.splitlines() == [
        "--out out.txt: expected a name that ends in .json or .jsonl, in a folder that exists",
        "--eval_share: eval has a file",
        "--keep target: the record has a key of that name already",
        "--where q: expected COLUMN=VALUE",
        "t.csv: no column 'q', which --input names; it has 0, 1, 2",
        "t.csv: no column 'a', which --input names; it has 0, 1, 2",
        "t.csv: no column 'y', which --target names; it has 0, 1, 2",
        "t.csv: no column 'target', which --keep names; it has 0, 1, 2",
        "t.csv: no column 'q', which --where names; it has 0, 1, 2",
        "e.csv: no column 'q', which --input names; it has 0, 1",
        "e.csv: no column 'a', which --input names; it has 0, 1",
        "e.csv: no column 'y', which --target names; it has 0, 1",
        "e.csv: no column 'target', which --keep names; it has 0, 1",
        "e.csv: no column 'q', which --where names; it has 0, 1",
    ]
    code, written, shown, errors = prepare(files, *TRAIN, "--eval", "e.csv", "--input", "{q} {a}", "--target", "y")
    assert (code, written, shown) == (2, None, "")
    assert errors.splitlines() == [
        "t.csv, line 2: 'a' is empty", "t.csv, line 3: 'q' is empty", "t.csv, line 4: target 'inf' is no number (words: --positive WORD)",
        "t.csv, line 5: 'y' is empty", "e.csv: no column 'a', which --input names; it has q, b",
        "e.csv: no column 'y', which --target names; it has q, b"]


@pytest.mark.parametrize("name, content, words, message", [
    ("t.csv", "q,a\n", PAIR, "train: no record is left (0 repeated dropped; t.csv: 0 rows)"),
    ("t.csv", "", PAIR, "t.csv: is empty"),
    ("t.csv", "q,a,q\nx,y,z\n", PAIR, "t.csv: columns of the same name: q, a, q"),
    ("t.csv", 'q,a\n"x"y,z\n', PAIR, "t.csv, line 2: not a table"),
    ("t.csv", 'q,a\n"x,y\n', PAIR, "t.csv, line 2: not a table"),
    ("t.csv", "q,a\nx,y,z\n", PAIR, "t.csv, line 2: number of columns 3, expected 2"),
    ("t.csv", b"q,a\n\xff,y\n", PAIR, "t.csv: cannot be read ('utf-8' codec"),
    ("t.csv.gz", b"q,a\nx,y\n", PAIR, "t.csv.gz: cannot be read"),
    ("t.csv", "q,a\nx,y\n", ["--prompt", "{q", "--completion", "a"], "--prompt '{q': no {column} in it\n--completion 'a': no {column} in it\n"),
    ("t.csv", "q,a\nx,y\n", ["--prompt", "{Q}", "--completion", "{a}"], "t.csv: no column 'Q', which --prompt names; it has q, a"),
    ("t.csv", "q,a\nx,y\n", ["--prompt", "{Q}", "--skip_empty"], "t.csv: no column 'Q', which --prompt names; it has q, a"),
    ("t.csv", "q,a\nx,y\n", ["--completion", "{a}"], "--completion: expected --prompt --completion, or --prompt --chosen --rejected, or "),
    ("t.csv", "q,a\nx,y\n", ["--prompt", "{q}", "--target", "a"], "--prompt --target: expected "),
    ("t.csv", "q,a\nx,y\n", [], "no template: expected --prompt --completion"),
    ("t.csv", "q,a\nx,y\n", ["--user", "{q}", "--assistant", "{a}", "--assistant", "{a}"], "1 --user and 2 --assistant: expected turn by turn"),
    ("t.csv", "q,a\nx,y\n", [*PAIR, "--system", "s"], "--system: expected a single one that is not empty, and --user"),
    ("t.csv", "q,a\nx,y\n", ["--user", "{q}", "--system", " "], "--system: expected a single one that is not empty"),
    ("t.csv", "q,a\nx,y\n", [*PAIR, "--positive", "x"], "--positive: only with --target COLUMN"),
    ("t.csv", "q,a\nx,y\n", ["--input", "{q}", "--target", "a"], "t.csv, line 2: target 'y' is no number (words: --positive WORD)"),
    ("t.csv", "q,a\nx,y\n", ["--input", "{q}", "--target", "a", "--positive", "Y"], "--positive 'Y': no target is that; there are 'y'"),
    ("t.csv", "q,a\nx,y\n", [*PAIR, "--keep", "split"], "--keep split: the record has a key of that name already"),
    ("t.csv", "q,a\nx,y\n", [*PAIR, "--keep", "skill", "--group", "a"], "--keep skill: the record has a key of that name already"),
    ("t.csv", "instruction,a\nx,y\n", ["--prompt", "N {instruction}", "--completion", "{a}", "--keep", "instruction"],
     "--keep instruction: by this key the scripts would take the record for one of another format"),
    ("t.csv", "q,prompt\nx,y\n", ["--text", "{q}", "--keep", "prompt"], "--keep prompt: by this key"),
    ("t.csv", "q,a,chosen\nx,1,y\n", ["--input", "{q}", "--target", "a", "--keep", "chosen"], "--keep chosen: by this key"),
    ("t.csv", "q,a\nx,1_0\n", ["--input", "{q}", "--target", "a"], "t.csv, line 2: target '1_0' is no number"),
    ("t.jsonl", '{"q": "x", "a": 1e400}\n', PAIR, "t.jsonl, line 1: 'a' is inf, expected a text or a number"),
    ("t.tsv", "q\ta\nx\ty\n\t\n", PAIR, "t.tsv, line 3: 'q' is empty"),
    ("t.csv", "q,a\n,y\n", [*PAIR, "--tokenizer", "./none"], "--tokenizer ./none: "),
    ("t.csv", "q,a\nx,\n", ["--prompt", "{q}", "--group", "a"], "t.csv, line 2: 'a' is empty"),
    ("t.csv", "q,a\nx,y\n", [*PAIR, "--where", "a=z"], "no record is left (0 repeated dropped; t.csv: 1 rows, 1 rows left out by --where a=z)"),
    ("t.csv", "q,a\nx,y\n", [*PAIR, "--where", "a="], "--where a=: expected COLUMN=VALUE"),
    ("t.csv", "q,a\nx,y\n", [*PAIR, "--split_column", "a"], "t.csv, line 2: 'a' is 'y', expected train, training, eval, "),
    ("t.csv", "q,a\nx,\n", ["--prompt", "{q}", "--split_column", "a"], "t.csv, line 2: 'a' is empty"),
    ("t.csv", "q,a\nx,y\n", [*PAIR, "--split_column", "a", "--eval", "t.csv"], "--split_column: expected a single file, as --train"),
    ("t.csv", "q,a\nx,y\n", [*PAIR, "--eval", "t.csv"], "train: no record is left (0 repeated, 1 also in eval dropped"),
    ("t.csv", "q,a\nx,y\n", [*PAIR, "--test_share", "-0.1"], "--test_share -0.1: expected shares of 0 or more"),
    ("t.csv", "q,a\nx,y\n", [*PAIR, "--eval_share", "1e-9"], "eval: no record is left"),
    ("t.csv", "q,a\nx,y\n", [*PAIR, "--skip"], "unrecognized arguments: --skip"),
    ("t.tsv", 'q\ta\n"x\ty\n"x"\n', PAIR, "t.tsv, line 3: number of columns 1, expected 2"),
    ("t.txt", "q,a\nx,y\n", PAIR, "t.txt: not JSON"),
    ("t.json", [{"q": "x", "a": "y"}], [*PAIR, "--no_header"], "--no_header: t.json is no table"),
    ("t.json", "{", PAIR, "t.json: not JSON"),
    ("t.json", [1], PAIR, "t.json, [0]: a int, expected an object"),
    ("t.jsonl", lines({"q": ["x"], "a": "y"}), PAIR, "t.jsonl, line 1: 'q' is a list, expected a text or a number; its parts: q.0"),
    ("t.jsonl", lines({"q": {"x": 1, "y": 2}, "a": "y"}), PAIR, "line 1: 'q' is an object, expected a text or a number; its parts: q.x, q.y"),
    ("t.jsonl", lines({"q": [], "a": "y"}), PAIR, "t.jsonl, line 1: 'q' is a list, expected a text or a number; its parts: none"),
    ("t.jsonl", lines({"q": ["x"], "a": "y"}), ["--prompt", "{q.1}"], "t.jsonl: no column 'q.1', which --prompt names; it has q, a"),
    ("t.jsonl", lines({"q": "\ud800", "a": "y"}), PAIR, "t.jsonl, line 1: 'utf-8' codec can't encode"),
    ("t.jsonl", lines({"q": "x", "a": float("nan")}), ["--prompt", "{q}", "--keep", "a"], "t.jsonl, line 1: Out of range float values are not JSON"),
    ("t.jsonl", lines({"q": "x"}, {"q": "y", "a": "z"}), ["--prompt", "{q}", "--keep", "a"], "t.jsonl, line 1: no 'a' (has: q)"),
    ("t.jsonl", lines({"q": "x", "y": True}), ["--input", "{q}", "--target", "y"], "t.jsonl, line 1: target 'true' is no number")])
def test_refused(prepare, name, content, words, message):
    code, written, shown, errors = prepare({name: content}, "--train", name, *words)
    assert (code, written, shown) == (2, None, "") and message in errors


def test_an_existing_file_is_never_overwritten(prepare, tmp_path):
    assert prepare({"t.csv": CSV}, *TRAIN, *PAIR)[0] == 0
    before = (tmp_path / "out.json").read_bytes()
    code, _, _, errors = prepare({"t.csv": CSV}, *TRAIN, "--text", "{q}")
    assert code == 2 and errors.startswith("--out out.json: exists") and (tmp_path / "out.json").read_bytes() == before


# ------------------------------------------------------------------------------------------------ the real files

BOTH = "sentence1: {sentence1} sentence2: {sentence2}"
REAL = {  # files below SHARED: (flags, first line of the lengths, what else is said)
    "gsm8k": (["--train", "gsm8k_train.jsonl", "--test", "gsm8k_test.jsonl", "--prompt", "{question}", "--completion", "{answer}"],
              "2000 train, 500 test", ["train: 0 repeated dropped", "test: 0 repeated dropped"]),
    "rte": (["--train", "RTE/train.tsv", "--eval", "RTE/dev.tsv", "--input", BOTH, "--target", "label", "--positive", "entailment"],
            "999 train, 277 eval", ["target 1: 'entailment' (641 rows); target 0: 'not_entailment' (636)", "train: 1 repeated dropped"]),
    "stsb": (["--train", "STS-B/train.tsv", "--eval", "STS-B/dev.tsv", "--input", BOTH, "--target", "score"],
             "1865 train, 500 eval", ["train: 9 repeated, 1 also in eval dropped"]),
    "alpaca": (["--train", "alpaca/alpaca_en_demo_500.json", "--eval_share", "0.1", "--skip_empty", "--system", "Be brief.",
                "--user", "{instruction}\\n\\n{input}", "--assistant", "{output}"],
               "187 train, 25 eval", ["500 rows, 287 rows with missing or empty values dropped", "train: 1 repeated dropped"]),
    "seed": (["--train", "alpaca/seed_tasks.jsonl", "--user", "{instruction}\\n\\n{instances.0.input}", "--assistant", "{instances.0.output}",
              "--where", "is_classification=true", "--keep", "id"], "26 train", ["149 rows left out by --where is_classification=true"]),
    "multiarith": (["--train", "reasoning_teacher/data/dataset/multiarith.json", "--rows", "data", "--prompt", "{question}",
                    "--completion", "{answer}", "--eval_share", "0.1"], "516 train, 64 eval",
                   ["600 rows", "train: 18 repeated dropped", "eval: 2 repeated dropped"]),
    "sciq": (["--train", "sciq/SciQ_valid.csv", "--split_column", "set", "--prompt", "question: {question} choices: {correct_answer}, {distractor1}",
              "--completion", "{correct_answer}"], "1000 eval", ["eval: 0 repeated dropped"])}


@pytest.mark.parametrize("name", REAL)
def test_real_files(prepare, name):
    words, counts, said = REAL[name]
    words = [str(SHARED / word) if before in ("--train", "--eval", "--test") else word for before, word in zip(["", *words], words)]
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}")
    code, written, shown, errors = prepare({}, *words)
    assert (code, errors) == (0, "") and f"\nout.json: {counts}\n" in shown and all(what in shown for what in said)
    assert ", ".join(f"{len(part)} {split}" for split, part in written.items()) == counts


def test_scores_are_those_of_prepare_tsv(prepare, tmp_path, capsys):
    """SMS spam, the whole file: the same records in the same splits."""
    path = SHARED / "sms_spam" / "SMSSpamCollection_2000.tsv"
    if not path.is_file():
        pytest.skip(f"no {path}")
    words = ["--train", str(path), "--no_header", "--target", "0", "--positive", "spam"]
    code, written, _, _ = prepare({}, *words, "--input", "{1}", "--eval_share", "0.1", "--test_share", "0.1")
    assert code == 0 and {split: len(part) for split, part in written.items()} == {"train": 1514, "eval": 219, "test": 190}
    assert prepare_tsv.main([*words, "--input", "1", "--holdout", "0.1", "0.1", "--out", str(tmp_path / "tsv.json")]) == 0
    assert json.loads((tmp_path / "tsv.json").read_text(encoding="utf-8")) == written
