"""data/cot.py: answers that are judged, published splits, a server with faults, students' data."""

import argparse
import collections
import contextlib
import http.server
import json
import pathlib
import re
import shlex
import signal
import socket
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, SHARED, finish, make_causal, make_model, needs_shared, run, start

import cot
import seq2seq
import sft_causal

PUBLIC = SHARED / "data" / "reasoning_teacher" / "data"


def prepare(*words):
    """The exit code of a command of cot.py."""
    try:
        return cot.main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


def read(path):
    return json.loads(pathlib.Path(path).read_text())


def read_lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def write_dataset(key, questions, **others):
    """d.json of [(question, answer)]."""
    data = []
    for i, (question, answer) in enumerate(questions):
        data.append({"sample_index": i, "question": question, "answer": answer, **others})
    pathlib.Path("d.json").write_text(json.dumps({"metadata": {"dataset_key": key}, "data": data}))


def completion(index, text, answer="5", template="zs", **others):
    row = {"dataset_key": "svamp", "prediction_template": template, "sample_index": index}
    row.update(completion_index=0, question=f"q{index}", answer=answer, completion=text)
    return {**row, **others}


def write_lines(path, *rows):
    pathlib.Path(path).parent.mkdir(exist_ok=True)
    pathlib.Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


# --------------------------------------------------------------------------------------- the judge

JUDGED = {  # (data set, template, answer): completions that are right, and that are wrong
    ("aqua", "zs", "B"): (
        ["(B)", "B) 12", "is B, not C", "b or B", "x=3,B", "Because B"],
        ["", "b", "C or B", "A person takes B", "AB", "Both", "B2"],
    ),
    ("commonsense_qa", "ft_cot_token", "B"): (
        ["A is 3. --> B", "--> (B) --> C", "A or C, so B"],
        ["B --> C", "B, so -->", "A B C", "--> Bah"],
    ),
    ("date_understanding", "fs_cot", "F"): (
        ["A. The answer is (F).", "A, B, F", "F on Feb 3"],
        ["F. The answer is A.", "F or A", "The answer is", "A, Friday", "G"],
    ),
    ("tracking_shuffled_objects", "ft_cot_natural", "C"): (
        ["A. Therefore, the answer is C", "B C", "C and D"],
        ["C. Therefore, the answer is A", "A, Claire", "c"],
    ),
    ("svamp", "zs", "5.0"): (
        ["5", " 5.", "$5", "05", "it is 5, then 6", "5.0000001", "x=5"],
        ["five", "-5", "15", "6 or 5", "5.1", "5,000", "5.00001", "3-5"],
    ),
    ("gsm8k", "zs", "1,000"): (
        ["1000", "$1,000.", "1000 men", "=1000", "1000.0"],
        ["100", "-1000", "2 or 1000", "1 000", "10000"],
    ),
    ("coin_flip", "zs", "no"): (
        ["No.", "'no'", "no, yes", "So: no", "is\nno", "tails,no"],
        ["", "yes, no", "nope", "no!", "(no)", "no-one", "yes\nno"],
    ),
    ("strategy_qa", "ft_cot_token", "Yes"): (["no --> yes", "no yes"], ["yes --> no", "yes -->"]),
    ("last_letter_concatenation", "ft_cot_token", "yajo"): (
        ["y, a --> yajo", '-->"yajo".', "ya\tj o"],
        ["--> so yajo", "yajo --> yaj", "-->", "Yajo", "y-a-j-o"],
    ),
}


@pytest.mark.parametrize("about", JUDGED)
def test_judge(about):
    key, template, answer = about
    for is_right, texts in zip((True, False), JUDGED[about]):
        for text in texts:
            row = completion(0, text, answer, template, dataset_key=key)
            assert cot.judge(row).accuracy == is_right, text


def test_other_metrics():
    def judged(template, text):
        return list(cot.judge(completion(0, text, "7", template)))

    assert judged("ft_cot_token", "7 --> 8 or 7") == [False, True, True]
    assert judged("ft_cot_token", "7 --> 8") == [False, False, True]
    assert judged("ft_cot_token", "7, so 8") == [False, True, False]
    assert judged(None, "8, not 7") == [False, True, True]


@pytest.mark.parametrize(
    "key, answer", [("svamp", "five"), ("gsm8k", "3 or 4"), ("aqua", "F"), ("coin_flip", "maybe")]
)
def test_answers_of_another_kind(key, answer, capsys):
    write_dataset(key, [("Q?", answer), ("R?", answer)])
    assert prepare("split", "--dataset", "d.json", "--out", "s.json") == 2
    message = f"2 records, first d.json, data 1: {answer!r} is no answer of {key}"
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------- data and splits


def test_made_sets():
    assert prepare("make", "coin_flip", "--n", 200, "--out", "c.json") == 0
    samples = read("c.json")["data"]
    assert [sample["sample_index"] for sample in samples] == list(range(200))
    assert len({sample["question"] for sample in samples}) == 200
    for sample in samples:
        acts = re.findall(r"[A-Z][a-z]+ (flips|does not flip) the coin\.", sample["question"])
        states = re.findall("(heads|tails) up", sample["rationale"])
        sides = [["heads", "tails"][acts[:i].count("flips") % 2] for i in range(5)]
        assert states == sides and sample["answer"] == ("yes" if sides[-1] == "heads" else "no")
    assert cot.last_letters(["Amy", "Bob"], None)[1] == "yb"
    assert prepare("make", "last_letter_concatenation", "--names", 1, "--out", "x.json") == 2


SIZES = {"addsub": (276, 119), "gsm8k": (7473, 1319), "aqua": (10000, 254)}
SIZES["commonsense_qa"] = (9741, 1221)


@pytest.mark.parametrize("key", SIZES)
def test_published_sizes(key):
    n_train, n_test = SIZES[key]
    n = 97721 if key == "aqua" else n_train + n_test
    write_dataset(
        key, [(f"Question {i}?", "1" if key in ("addsub", "gsm8k") else "A") for i in range(n)]
    )
    assert prepare("split", "--dataset", "d.json", "--out", "s.json") == 0
    split = read("s.json")
    assert (len(split["train"]), len(split["test"])) == SIZES[key]
    if key != "addsub":
        assert split["test"] == list(range(n - n_test, n))
        drawn = np.random.RandomState(0).permutation(n - n_test)[:n_train]
        assert split["train"] == sorted(drawn.tolist())


@needs_shared
@pytest.mark.parametrize("key", ["coin_flip", "multiarith", "date_understanding"])
def test_published_splits(key):
    """Byte for byte; and of our template splits and theirs none tears our templates apart, but two
    of date_understanding."""
    dataset = PUBLIC / "dataset" / f"{key}.json"
    assert prepare("split", "--dataset", dataset, "--out", "s.json") == 0
    published = PUBLIC / "split" / f"{key}__default.json"
    assert pathlib.Path("s.json").read_bytes() == published.read_bytes()
    if key == "coin_flip":
        return
    prepare("split", "--dataset", dataset, "--kind", "template", "--out", "t.json")
    samples = read(dataset)["data"]
    assert 0.66 * len(samples) < len(read("t.json")["train"]) <= 0.7 * len(samples)
    theirs = PUBLIC / "split" / f"{key}__template.json"
    n_torn = []
    for path in ("t.json", theirs):
        sides = collections.defaultdict(set)
        for side, indices in read(path).items():
            for index in indices:
                sides[cot.template_of(samples[index]["question"])].add(side)
        n_torn.append(sum(len(found) > 1 for found in sides.values()))
    assert n_torn == [0, 2 if key == "date_understanding" else 0]


def test_template_of():
    for question in ("Ann has 3 pens. How many?", "He has 1,200 pens. Why?"):
        assert cot.template_of(question) == "N has N pens"
    question = "Today is 4/5/1999. What is it?\nWhich choice is true? Answer choices: (A) x, (B) y."
    assert cot.template_of(question) == "N is N"


# ---------------------------------------------------------------------------------------- teachers

SUMS = [(f"What is {i} + {i}?", str(2 * i)) for i in range(6)]
TEACH = ["teach", "--dataset", "d.json", "--out", "t.jsonl", "--workers", 1]


@contextlib.contextmanager
def server(reply_to, kind="completions"):
    """(address, [request]); reply_to: (prompt, number of the request) -> (status, body)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**body, "authorization": self.headers["Authorization"]})
            prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
            status, reply = reply_to(prompt, len(asked))
            data = json.dumps(reply).encode() if reply != "cut" else b'{"choi'
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1/{kind}", asked
    httpd.shutdown()


def choices(text, finish_reason="stop", **others):
    choice = {"text": text, "message": {"content": text}, "finish_reason": finish_reason}
    return {"choices": [{**choice, **others}]}


def right(prompt, number=0):
    double = 2 * int(re.search(r"What is (\d+)", prompt)[1])
    thought = f" It is {double}.\nQ: What"
    return 200, choices(thought if prompt.endswith("step.") else f" {double}.")


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(cot, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")


def test_faults_that_pass(no_waiting, capsys):
    """Each is tried again; the key is in the header and nowhere else."""
    write_dataset("multiarith", SUMS)
    faults = [
        (429, {"error": "slow down, sk-secret"}),
        (500, {}),
        (200, "cut"),
        (200, {"error": {"code": 429}}),
        (200, {"choices": [{"error": {"code": "502"}, "finish_reason": "error"}]}),
        (400, {"error": "use 'max_completion_tokens' instead of 'max_tokens'"}),
    ]

    def reply_to(prompt, number):
        return faults[number - 1] if number <= len(faults) else right(prompt)

    with server(reply_to, "chat/completions") as (address, asked):
        assert prepare(*TEACH, "--server", address, "--model", "m") == 0
    assert len(asked) == len(faults) + 12
    assert "max_tokens" in asked[5] and asked[6]["max_completion_tokens"] == 128
    assert {body["authorization"] for body in asked} == {"Bearer sk-secret"}
    row = read_lines("t.jsonl")[3]
    assert row["reasoning_prompt"] == "Q: What is 3 + 3?\nA: Let's think step by step."
    assert row["reasoning_completion"] == " It is 6."
    assert row["prompt"] == f"{row['reasoning_prompt']}It is 6.\nTherefore, the answer is"
    assert row["completion"] == " 6." and row["finish_reason"] == "stop"
    output = "".join(capsys.readouterr()) + pathlib.Path("t.jsonl").read_text()
    assert "sk-secret" not in output and "***" in output


@pytest.mark.parametrize(
    "fault",
    [
        {"choices": []},
        {"choices": None, "error": {"message": "overloaded"}},
        choices(" "),
        choices(None, "content_filter"),
        choices(" 4.", "error"),
    ],
    ids=str,
)
def test_faults_of_one_prompt(fault, no_waiting, capsys):
    """Nothing of it is kept, the others are, and the same command asks for it alone."""
    write_dataset("multiarith", SUMS)

    def reply_to(prompt, number):
        return (200, fault) if "What is 2" in prompt else right(prompt)

    with server(reply_to) as (address, asked):
        words = [*TEACH, "--method", "zs", "--server", address, "--model", "m"]
        assert prepare(*words) == 2 and len(asked) == 6
    assert "sample 2: " in capsys.readouterr().err
    assert [row["sample_index"] for row in read_lines("t.jsonl")] == [0, 1, 3, 4, 5]
    with open("t.jsonl", "a") as file:
        file.write('{"sample_index": 2, "comp')  # as a kill may leave it
    with server(right) as (address, asked):
        words[-3] = address
        assert prepare(*words) == 0 and len(asked) == 1
        assert [row["completion"] for row in read_lines("t.jsonl")][-1] == " 4."
        assert prepare(*words, "--max_tokens", 9) == 2 and len(asked) == 1
        assert prepare(*words[:-2], "--model", "other") == 2  # of another command
        assert prepare(*words, "--k", 2, "--temperature", 0.7) == 2


@pytest.mark.parametrize("status, code", [(401, 2), (302, 2), (503, 75)])
def test_servers_that_fail(status, code, no_waiting):
    write_dataset("multiarith", SUMS)

    def reply_to(prompt, number):
        return right(prompt) if number < 4 else (status, {})

    with server(reply_to) as (address, asked):
        assert prepare(*TEACH, "--method", "zs", "--server", address, "--model", "m") == code
    assert len(asked) == (4 if code == 2 else 3 + cot.ATTEMPTS)
    assert len(read_lines("t.jsonl")) == 3


def test_several_draws_and_few_shots(no_waiting):
    write_dataset("multiarith", SUMS)
    shots = {"multiarith": {"prompt": "Q: 1 + {1}?\nA: The answer is 2."}}
    pathlib.Path("f.json").write_text(json.dumps(shots))
    pathlib.Path("s.json").write_text(json.dumps({"train": [1, 4], "test": [0]}))
    words = [*TEACH, "--method", "fs_cot", "--few_shot", "f.json", "--temperature", 0.7]
    words += ["--model", "m", "--split", "s.json", "--workers", 3, "--server"]
    with server(right) as (address, asked):
        assert prepare(*words, address) == 0 and len(asked) == 2
        assert prepare(*words, address, "--k", 3) == 0 and len(asked) == 6
    prompts = {body["prompt"] for body in asked}
    assert "Q: 1 + {1}?\nA: The answer is 2.\nQ: What is 4 + 4?\nA:" in prompts
    assert len(prompts) == 2 and len({body["seed"] for body in asked}) == 6
    assert len(read_lines("t.jsonl")) == 6


@pytest.mark.slow
def test_kill_and_go_on():
    """What was answered is not asked again."""
    write_dataset("multiarith", SUMS)

    def reply_to(prompt, number):
        if number == 8:
            time.sleep(60)
        return right(prompt)

    with server(reply_to) as (address, asked):
        words = [*TEACH, "--server", address, "--model", "m"]
        process = start(*words, script=ROOT / "data" / "cot.py")
        while len(asked) < 8:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(read_lines("t.jsonl")) == 3
        finish(start(*words, script=ROOT / "data" / "cot.py"))
        assert len(asked) == 8 + 6 and len(read_lines("t.jsonl")) == 6


@pytest.mark.slow
def test_chat_is_a_server_for_it():
    """With --format raw the prompts are continued as texts; answers differ by their seeds. It is
    asked again until it is up."""
    make_causal("llama")
    write_dataset("multiarith", SUMS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--model_path", "llama", "--format", "raw", "--top_p", 1, "--serve", port]
    chat = start(*words, script=ROOT / "chat.py")
    words = ["--server", f"http://127.0.0.1:{port}/v1/chat/completions", "--model", "llama"]
    words += ["--k", 2, "--temperature", 1, "--max_tokens", 5]
    try:
        assert prepare(*TEACH, *words) in (0, 2)  # 2: a random model may give an empty answer
    finally:
        chat.terminate()
        finish(chat)
    rows = read_lines("t.jsonl")
    assert len(rows) > 6 and len({row["reasoning_completion"] for row in rows}) > 6


# -------------------------------------------------------------------------------- students' data


def export(*words):
    words = ["--dataset", "d.json", "--split", "s.json", "--out", "data/o.json", *words]
    return prepare("export", *words)


def test_export(monkeypatch):
    """Right completions with a rationale of the training part; of a held-out question one record,
    also where the teacher was wrong; of the test part the answers alone."""
    write_dataset("svamp", [(f"q{i}", "5") for i in range(6)])
    pathlib.Path("s.json").write_text(json.dumps({"train": [0, 1, 2, 3], "test": [4, 5]}))
    rows = [
        completion(0, "5", reasoning_completion=" So. "),
        completion(0, "5", reasoning_completion="And", completion_index=1),
        completion(1, "4", reasoning_completion="Wrong"),
        completion(2, "5", reasoning_completion="a --> b"),
        completion(3, "Hence. The answer is 5.", template="fs_cot"),
        completion(4, "5", reasoning_completion="Of the test part"),
    ]
    write_lines("c.jsonl", *rows)
    monkeypatch.setattr(cot.common, "is_held_out", lambda args, key: key in ("q1", "q3"))
    assert export("--completions", "c.jsonl") == 0
    found = read("data/o.json")
    pairs = {}
    for split, records in found.items():
        pairs[split] = [(record["prompt"], record["completion"]) for record in records]
    assert pairs == {
        "train": [("q0", "So. --> 5"), ("q0", "And --> 5")],
        "eval": [("q1", "5"), ("q3", "Hence. --> 5")],
        "test": [("q4", "5"), ("q5", "5")],
    }
    sample = {"question": " Q? ", "answer": "5 ", "sample_index": 7}
    args = argparse.Namespace(family="decoder", completions="", rationales=False)
    assert cot.student_record(args, "svamp", sample, "") == {
        **{"prompt": "Q? ###", "completion": " 5", "sample_index": 7, "answer": "5"},
        **{"dataset_key": "svamp", "prediction_template": "ft_token"},
    }
    args.rationales = True
    assert cot.student_record(args, "svamp", sample, "So.")["completion"] == " So. --> 5"


@pytest.mark.parametrize("family, kind", [("encoder_decoder", "t5"), ("decoder", "llama")])
def test_students_read_it(family, kind):
    """From made questions to a trained student, whose predictions are judged."""
    prepare("make", "coin_flip", "--n", 40, "--names", 1, "--out", "d.json")
    assert prepare("split", "--dataset", "d.json", "--out", "s.json") == 0
    assert export("--rationales", "--family", family, "--eval_fraction", 0.2) == 0
    assert "up. --> yes" in pathlib.Path("data/o.json").read_text()
    module = seq2seq if kind == "t5" else sft_causal
    (make_model if kind == "t5" else make_causal)(kind)
    words = ["--model_init_name", kind, "--data", "o", "--max_steps", 1, "--max_new_tokens", 3]
    words += ["--training_run_name", "student", "--train_batch_size", 4]
    if kind == "llama":
        words += ["--raw_prompt", "--n_generate", 100]
    run(*words, module=module)
    found = sorted(pathlib.Path("models/student").glob("*temperature=*.json"))
    assert len(found) == 3  # eval at the steps 0 and 1, and test
    assert prepare("evaluate", *found) == 0


def test_filter_and_evaluate(capsys):
    """Of completions, and of a trainer's predictions with several answers."""
    write_lines("saved/a.jsonl", completion(0, "5"), completion(1, "6"))
    about = {"dataset_key": "addsub", "prediction_template": "ft_cot_token", "answer": "5"}
    generations = [{"lm_postprocess": text} for text in ("--> 5", "5", "--> 6", "--> 6, 5")]
    predictions = [{"orig_d": about, "generations": generations}]
    pathlib.Path("p.json").write_text(json.dumps(predictions))
    assert prepare("evaluate", "p.json", "--saved_dir", "saved") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[0] == ["50.00", "75.00", "75.00", "4", "addsub,", "ft_cot_token,", "p.json"]
    assert rows[1] == ["50.00", "50.00", "100.00", "2", "svamp,", "zs,", "saved/a.jsonl"]
    assert prepare("filter", "--completions", "saved/a.jsonl", "--out", "r.jsonl") == 0
    assert read_lines("r.jsonl") == [completion(0, "5", split="train")]


TO_SERVER = "teach --dataset d.json --model m --server http://h/completions"
MISTAKES = [
    ("split --dataset twice.json --out x.json", "a key is repeated"),
    ("split --dataset none.json --out x.json", "none.json"),
    ("split --dataset s.json --out x.json", "s.json: expected a data set of single_eq"),
    (
        "split --dataset d.json --out s.json",
        "s.json: expected a .json or .jsonl that is not there yet",
    ),
    ("make coin_flip --n 0 --out x.json", "expected make coin_flip or make last_letter"),
    ("make --out x.json", "expected make coin_flip or make last_letter"),
    ("export --dataset d.json --split both.json --out x.json", "a sample on both sides"),
    ("export --dataset d.json --split d.json --out x.json", "expected a split"),
    ("export --dataset d.json --split s.json --completions c.jsonl --out x.json", "another one"),
    ("export --dataset d.json --split s.json --rationales --out x.json", "expected a rationale in"),
    ("export --dataset d.json --split s.json --completions p.json --out x.json", "another one"),
    ("filter --completions c.jsonl --out x.csv", "expected a .json or .jsonl that"),
    ("filter --completions d.json --out x.jsonl", "KeyError: 'dataset_key'"),
    ("filter --completions odd.jsonl --out x.jsonl", "line 1: KeyError: 'completion'"),
    ("evaluate", "nothing to judge"),
    ("teach --dataset d.json --out x.jsonl", "--model is missing"),
    (f"{TO_SERVER} --out x.json", "ends in .jsonl"),
    (f"{TO_SERVER} --out x.jsonl --k 2", "--k above 1 needs --temperature"),
    (f"{TO_SERVER} --out x.jsonl --method fs_cot", "--few_shot FILE"),
    (f"{TO_SERVER} --out x.jsonl --server localhost:8000", "--server: expected http"),
    (f"{TO_SERVER} --out x.jsonl --workers 0", "max_workers must be greater than 0"),
    (f"{TO_SERVER} --out mine.jsonl", "teach did not write it"),
]


@pytest.mark.parametrize("words, message", MISTAKES)
def test_mistakes(words, message, capsys):
    write_dataset("svamp", [(f"question {i}?", "1") for i in range(3)])
    pathlib.Path("twice.json").write_text('{"metadata": {}, "metadata": {}}')
    pathlib.Path("s.json").write_text('{"train": [0], "test": [1, 2]}')
    pathlib.Path("both.json").write_text('{"train": [0], "test": [0]}')
    pathlib.Path("mine.jsonl").write_text("notes")
    write_lines("c.jsonl", completion(0, "5"))
    about = {"dataset_key": "svamp", "prediction_template": "zs", "answer": "1", "sample_index": 0}
    predictions = [{"orig_d": about, "generations": [{"lm_postprocess": "1"}]}]
    pathlib.Path("p.json").write_text(json.dumps(predictions))
    write_lines("odd.jsonl", {"dataset_key": "svamp", "prediction_template": "zs", "answer": "1"})
    assert prepare(*words.split()) == 2
    assert message in capsys.readouterr().err
    assert not pathlib.Path("x.json").exists()
    assert pathlib.Path("mine.jsonl").read_text() == "notes"


def test_commands_of_the_pages(monkeypatch):
    for name, (_, needed) in cot.COMMANDS.items():
        monkeypatch.setitem(cot.COMMANDS, name, (print, needed))
    page = (ROOT / "docs" / "cot.md").read_text()
    commands = re.findall(r"^python data/cot\.py (.*)$", page, re.MULTILINE)
    assert len(commands) > 5
    for command in commands:
        assert prepare(*shlex.split(command)) == 0, command
