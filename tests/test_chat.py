"""chat.py: replies against transformers' generate; files, terminal, server and its page."""

import contextlib
import fcntl
import gc
import http.client
import io
import json
import os
import pathlib
import pty
import queue
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import types
import unittest.mock

import conftest
import pytest
import torch
import transformers

import chat
import sft_causal

CHAT = conftest.ROOT / "chat.py"
GREEDY = ("--temperature", 0, "--max_new_tokens", 12)
HI = [{"role": "user", "content": "hi there"}]


def make_babbler(name="babbler", **changes):
    """models/<name>: new weights that write without an end, and a chatml template; -> the model."""
    path = pathlib.Path(conftest.make_causal("llama", weights=False, **changes))
    path = path.rename(f"models/{name}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(sft_causal.TEMPLATE_TOKENS["chatml"], special_tokens=True)
    tokenizer.chat_template = sft_causal.TEMPLATES["chatml"].replace("{bos}", "")
    tokenizer.save_pretrained(path)
    config = transformers.AutoConfig.from_pretrained(path)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(std=0.4)
    model.save_pretrained(path)
    return model, tokenizer


def expected_reply(model, tokenizer, messages, n_tokens=12):
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    n_prompt = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False, eos_token_id=None)
    return tokenizer.decode(ids[0, n_prompt:])


def write_lines(path, records):
    pathlib.Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))


def read_lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def run_file(model, records, *words, out="out.jsonl"):
    """[the replies to each record]"""
    write_lines("in.jsonl", records)
    files = ("--input", "in.jsonl", "--output", out)
    assert conftest.run("--model_path", model, *files, *words, module=chat) == 0
    rows = read_lines(out)
    assert [row["row"] for row in rows] == list(range(len(records)))
    assert [row["orig_d"] for row in rows] == records
    return [row["replies"] for row in rows]


def fails(capsys, *words):
    """What a mistake is told; before a weight is loaded."""
    with pytest.raises(SystemExit) as stop:
        conftest.run(*words, module=chat)
    assert stop.value.code == 2
    del stop
    gc.collect()  # files that the frames of the failure hold open, and locked
    return capsys.readouterr().err


def start_engine(*words):
    args = chat.parse_args([str(word) for word in words])
    load_args, config, prompts, _ = chat.prepare(args)
    engine = chat.load_engine(args, load_args, config, prompts)
    engine.start()
    return engine


# ------------------------------------------------------------------------------- text and sampling


def test_pieces_are_certain_and_together_the_text():
    tokenizer = transformers.AutoTokenizer.from_pretrained(conftest.ROOT / "models/tiny-llama")
    engine = types.SimpleNamespace(prompts=chat.common.Prompts(tokenizer, is_raw=True))
    text = "Well: ends 🐦é and User again. User: no"
    for stop, end in (([], text), (["User:", "nothing"], "Well: ends 🐦é and User again. ")):
        request = chat.Request([], 0, 1, 0, 1000, stop, 0)
        for token in tokenizer(text, add_special_tokens=False).input_ids:
            if not request.is_over:
                chat.Engine.add_token(engine, request, token)
        if not request.is_over:
            chat.Engine.add_token(engine, request, 2)
        pieces = [piece for piece, _ in request.wait()]
        assert "".join(pieces) == end and len(pieces) > 10
        assert not any("\ufffd" in piece for piece in pieces)


def test_top_k_and_top_p_cut_what_is_drawn():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for top_k, top_p, drawn in ((0, 1, 4), (2, 1, 2), (0, 0.6, 2), (3, 0.7, 2), (0, 0, 1)):
        request = chat.Request([], 1.0, top_p, top_k, 1, [], 0)
        request.generator = torch.Generator().manual_seed(0)
        tokens = {int(chat.choose(logits, [request])) for _ in range(200)}
        assert tokens == set(range(drawn))


# ------------------------------------------------------------------------------------------ files


def test_a_file_is_answered_as_training_would_ask():
    model, tokenizer = make_babbler()
    talk = [*HI, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "no"}]
    system = {"role": "developer", "content": "Rhyme."}
    records = [
        {"prompt": "hi there", "id": 7},
        {"messages": [system, *talk, {"role": "assistant", "content": "is not read"}]},
        {"text": "Once upon"},
    ]
    replies = run_file("babbler", records, *GREEDY)
    ids = tokenizer("Once upon", return_tensors="pt").input_ids
    raw = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert replies == [
        [expected_reply(model, tokenizer, HI)],
        [expected_reply(model, tokenizer, [{"role": "system", "content": "Rhyme."}, *talk])],
        [tokenizer.decode(raw[0, ids.shape[1] :])],
    ]
    prefixed = run_file("babbler", [{"prompt": "no"}], *GREEDY, "--system_prefix", "B.", out="2")
    asked = [{"role": "system", "content": "B."}, {"role": "user", "content": "no"}]
    assert prefixed == [[expected_reply(model, tokenizer, asked)]]


def test_a_sampled_reply_depends_on_its_place_and_the_seed_alone():
    make_babbler()
    records = [{"prompt": "a b c " * (1 + 7 * (i % 3))} for i in range(9)]
    words = ("--max_new_tokens", 20, "--top_p", 0.95)
    first = run_file("babbler", records, *words)
    assert run_file("babbler", records, *words, "--max_batch", 1, out="alone") == first
    assert run_file("babbler", records, *words, "--seed", 1, out="seed") != first
    assert len({reply for (reply,) in first}) == 9


def test_seq2seq_runs_read_prompts_raw_and_keep_sentinels():
    conftest.make_model("t5")
    train = [{"prompt": f"say {n}", "completion": f"<extra_id_0> {n}"} for n in "abcd"]
    conftest.write_data("d", train, train)
    words = ("--data", "d", "--learning_rate", 0.01, "--train_batch_size", 4)
    conftest.run("--model_init_name", "t5", *words, "--max_steps", 40, "--training_run_name", "r")
    (predictions,) = pathlib.Path("models/r").glob("temperature*_step=40.json")
    answers = [row["generations"] for row in conftest.read_json(predictions)]
    prompts = [{"prompt": record["prompt"]} for record in train]
    assert run_file("r", prompts, *GREEDY) == [[row[0]["lm_postprocess"]] for row in answers]
    assert "<extra_id_0>" in answers[0][0]["lm_postprocess"]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_in_few_bits_answers(kind, capsys):
    pytest.importorskip("bitsandbytes")
    make_babbler()
    replies = run_file("babbler", [{"prompt": "hi"}], *GREEDY, "--quantize", kind)
    assert replies[0][0] and f"adapters in 0 layers {kind}" in capsys.readouterr().err


def test_a_family_whose_rows_cannot_join_is_answered_in_turns():
    path = conftest.make_model("bart", init_std=0.5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    engine = start_engine("--model_path", "bart")
    engine.prompts.stop_ids = set()
    requests = []
    for n in (1, 9, 4):
        prompt_ids = tokenizer("so " * n).input_ids
        requests.append(chat.Request(prompt_ids, 0.0, 1.0, 0, 100 + n, [], 0))
        engine.waiting.put(requests[-1])
        next(requests[-1].wait())  # the next one comes while this one runs
    settings = engine.model.generation_config
    settings.forced_eos_token_id = settings.eos_token_id = None
    for request in requests:
        list(request.wait())
        ids = torch.tensor([request.prompt_ids])
        n_tokens = request.max_new_tokens
        output = engine.model.generate(ids, max_new_tokens=n_tokens, do_sample=False)
        assert request.ids == output[0, 1:].tolist()


def test_a_long_prompt_does_not_pad_short_ones(monkeypatch):
    make_babbler()
    monkeypatch.setattr(chat.Engine, "start", lambda _: None)
    monkeypatch.setattr(chat, "MAX_READ", 250)
    engine = start_engine("--model_path", "babbler")
    read = unittest.mock.Mock(side_effect=engine.decoding.read)
    engine.decoding.read = read
    for n in (9, 200, 9, 9):
        engine.waiting.put(chat.Request([5] * n, 0.0, 1.0, 0, 2, [], 0))
    with torch.inference_mode():
        engine.step()
    sizes = [[len(prompt) for prompt in call.args[0]] for call in read.call_args_list]
    assert sizes == [[200], [9, 9, 9]]


def test_a_killed_file_goes_on_and_has_one_writer(capsys):
    make_babbler()
    records = [{"prompt": f"{n} " * 9} for n in range(40)]
    words = ["--max_new_tokens", 40, "--max_batch", 2]
    whole = run_file("babbler", records, *words, out="whole")
    files = ["--model_path", "babbler", "--input", "in.jsonl", "--output", "out"]
    process = conftest.start(*files, *words, script=CHAT)
    part = pathlib.Path("out.part")
    while not part.exists() or part.read_text().count("\n") < 6:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    assert "is another process writing it?" in fails(capsys, *files, *words)
    process.kill()
    process.wait()
    rows = part.read_text().splitlines()
    assert 5 < len(rows) < 40
    part.write_text("\n".join(rows)[:-30])  # the kill came within a line
    assert "was begun with other flags" in fails(capsys, *files, *words, "--temperature", 0.9)
    assert run_file("babbler", records, *words, out="out") == whole
    assert pathlib.Path("out").read_text() == pathlib.Path("whole").read_text()
    assert not part.exists()


# --------------------------------------------------------------------------------------- terminal


def test_a_piped_terminal_remembers_what_was_said(monkeypatch, capsys):
    model, tokenizer = make_babbler()
    lines = "hi there\nand\n/system Rhyme.\n/reset\nhi there\n/set max_new_tokens 3\n"
    lines += "/set temperature warm\n/set speed 3\nand\n/dance\n" + "far " * 300 + "\nquit\nno\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert conftest.run("--model_path", "babbler", *GREEDY, module=chat) == 0
    talk = [*HI]
    for n_tokens in (12, 12):
        reply = expected_reply(model, tokenizer, talk, n_tokens)
        talk += [{"role": "assistant", "content": reply}, {"role": "user", "content": "and"}]
    first, second = talk[1]["content"], talk[3]["content"]
    asked = [{"role": "system", "content": "Rhyme."}, *HI]
    third = expected_reply(model, tokenizer, asked)
    asked += [{"role": "assistant", "content": third}, {"role": "user", "content": "and"}]
    fourth = expected_reply(model, tokenizer, asked, 3)
    output, errors = capsys.readouterr()
    assert output == "".join(f"{reply} [cut]\n" for reply in (first, second, third, fourth))
    errors = errors[errors.index("[could") :]
    assert errors.startswith("[could not convert string to float: 'warm']\n[expected one")
    assert "]\n[/reset, " in errors
    assert "[the prompt has 3" in errors and "256 positions" in errors and "quit" in errors


def test_ctrl_c_stops_a_reply_in_a_terminal():
    make_babbler(max_position_embeddings=100_000)
    process, terminal = pty.fork()
    if process == 0:
        words = ["--model_path", "babbler", "--max_new_tokens", "90000", "--bot_name", "Joi"]
        os.execv(sys.executable, [sys.executable, str(CHAT), *words])
    seen = ""

    def wait_for(text):
        nonlocal seen
        while text not in seen:
            seen += os.read(terminal, 1000).decode(errors="replace")
        seen = seen.partition(text)[2]

    wait_for("> ")
    os.write(terminal, b"hi\n")
    wait_for("Joi: ")
    wait_for(" ")
    os.write(terminal, b"\x03")
    wait_for("> ")
    os.write(terminal, b"/reset\nquit\n")
    with contextlib.suppress(OSError):  # Linux's way to say that the other side has closed
        wait_for("never")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


# ----------------------------------------------------------------------------------------- server


class Served:
    """A server over a babbler, in this process."""

    def __init__(self, *words):
        self.model, self.tokenizer = make_babbler(max_position_embeddings=300)
        self.engine = start_engine("--model_path", "babbler", "--serve", 0, *GREEDY, *words)
        self.server = chat.Server(("127.0.0.1", 0), chat.Handler)
        self.server.engine = self.engine
        self.server.name = "babbler"
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def ask(self, body, path="/v1/chat/completions", method="POST", **headers):
        """(status, text) of one request; body: bytes, or an iterator of them, else JSON."""
        connection = http.client.HTTPConnection(self.address, timeout=60)
        if not isinstance(body, bytes) and not hasattr(body, "__next__"):
            body = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, headers, encode_chunked=True)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def reply(self, messages=HI, n_tokens=12):
        return expected_reply(self.model, self.tokenizer, messages, n_tokens)


@pytest.fixture
def served(folder):
    served = Served()
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_the_official_client_streams_and_counts(served):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://{served.address}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["babbler"]
    assert client.models.retrieve("babbler").id == "babbler"
    parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": " there"}]
    system = {"role": "developer", "content": "Rhyme."}
    messages = [system, {"role": "user", "content": parts}]
    ask = {"model": "x", "messages": messages, "max_completion_tokens": 30, "user": "u"}
    expected = served.reply([{"role": "system", "content": "Rhyme."}, *HI], 30)
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 30
    options = {"include_usage": True}
    stream = list(client.chat.completions.create(**ask, stream=True, stream_options=options))
    texts = [chunk.choices[0].delta.content for chunk in stream[:-1]]
    assert "".join(texts) == expected and len(texts) > 10
    assert stream[0].choices[0].delta.role == "assistant"
    assert stream[-2].choices[0].finish_reason == "length"
    assert (stream[-1].choices, stream[-1].usage) == ([], whole.usage)
    stopped = client.chat.completions.create(**ask, stop=[expected[9:12], "never"])
    assert stopped.choices[0].message.content == expected[: expected.find(expected[9:12])]
    assert stopped.choices[0].finish_reason == "stop"
    drawn = [
        client.chat.completions.create(**ask, temperature=1.0, seed=seed).choices[0].message.content
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


TALK = [*HI, {"role": "assistant", "content": "Yes."}]
IMAGE = [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "data:x"}}]
BODIES = [  # what a body changes, status, words of the answer
    ({}, 200, "chat.completion"),
    ({"metadata": {}, "store": False, "tools": [], "tool_choice": "auto", "n": 1}, 200, ""),
    ({"top_k": -1, "suffix": "", "response_format": {"type": "text"}, "stop": ""}, 200, ""),
    ({"temperature": None, "frequency_penalty": 0, "seed": None, "logprobs": False}, 200, ""),
    ({"min_p": 0.5}, 400, "'min_p' is not supported"),
    ({"temprature": 1.5}, 400, "'temprature'"),
    ({"n": 2}, 400, "'n' is not supported"),
    ({"response_format": {"type": "json_object"}}, 400, "'response_format'"),
    ({"temperature": "hot"}, 400, "temperature 'hot': expected a number from 0 to 100"),
    ({"top_p": 1.5}, 400, "top_p 1.5"),
    ({"max_tokens": True}, 400, "max_tokens True"),
    ({"stop": 3}, 400, "int"),
    ({"stream_options": 3}, 400, ""),
    ({"messages": []}, 400, "the last message must be the user's"),
    ({"messages": TALK}, 400, "the last message must be the user's"),
    ({"messages": None}, 400, "expected messages"),
    ({"messages": [{"role": "user", "content": []}]}, 400, "'content'"),
    ({"messages": [{"role": "user", "content": IMAGE}]}, 400, "'image_url' is not supported"),
    ({"messages": [{"role": "robot", "content": "Hi"}]}, 400, "role 'robot'"),
    ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, 400, "special token"),
    ({"messages": [{"role": "user", "content": "far " * 300}]}, 400, "300 positions"),
]


def test_a_body_is_answered_or_refused_by_name(served):
    for change, status, words in BODIES:
        found, text = served.ask({"messages": HI, **change})
        assert found == status and words in text, (change, text)
        if status == 200:
            assert json.loads(text)["choices"][0]["message"]["content"] == served.reply()
        else:
            assert json.loads(text)["error"]["message"]
    said = {"role": "assistant", "content": "Yes.<|im_end|>"}  # as a model may write it
    text = served.ask({"messages": [*HI, said, *HI]})[1]
    reply = served.reply([*TALK, *HI])
    assert json.loads(text)["choices"][0]["message"]["content"] == reply


def test_http(served):
    body = json.dumps({"messages": HI}).encode()
    whole = served.ask(body)[1]
    assert json.loads(whole)["choices"][0]["message"]["content"] == served.reply()
    status, chunked = served.ask(iter([body[:9], body[9:]]), Transfer_Encoding="chunked")
    assert status == 200 and json.loads(chunked)["choices"] == json.loads(whole)["choices"]
    pieces = (b" " * 2**16 for _ in range(40))
    requests = [  # (arguments, status, words)
        ((body, "/v1/completions"), 404, "POST /v1/completions: no such endpoint"),
        ((b"", "/v1/models/gpt-4", "GET"), 404, "no such"),
        ((b"", "/healthz", "GET"), 200, ""),
        ((b"", "/", "GET"), 200, "<!doctype html>"),
        ((b"{",), 400, ""),
        ((b"[" * 100_000,), 400, ""),
        ((b" " * 2**22,), 413, "a body may have"),
        ((body, "/v1/chat/completions", "POST", {"Content-Type": "text/plain"}), 415, "JSON"),
        ((body, "/v1/chat/completions", "POST", {"Host": "evil.example"}), 403, "localhost"),
        ((pieces, "/v1/chat/completions", "POST", {"Transfer-Encoding": "chunked"}), 413, ""),
    ]
    for (content, *rest), status, words in requests:
        *where, headers = rest if len(rest) == 3 else [*rest, {}]
        found, text = served.ask(content, *where, **headers)
        assert found == status and words.lower() in text.lower(), (content[:20], rest, text)
    served.engine.args.api_key = "sesame"
    assert served.ask(b"", "/v1/models", "GET")[0] == 401
    assert served.ask(body, Authorization="Bearer x")[0] == 401
    assert served.ask(body, Authorization="Bearer sesame", Host="other.example")[0] == 200


def post(served, body):
    """A connection on which this body was sent."""
    connection = http.client.HTTPConnection(served.address, timeout=300)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    return connection


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_frees_its_row(served, is_stream):
    connection = post(served, {"messages": HI, "max_tokens": 250, "stream": is_stream})
    while not served.engine.requests:
        time.sleep(0.001)
    request = served.engine.requests[0]
    connection.sock.close()
    while not request.is_over:
        time.sleep(0.001)
    assert len(request.ids) < 250


def test_a_client_is_watched_behind_a_thousand_files():
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    ours, theirs = socket.socketpair()
    number = fcntl.fcntl(ours, fcntl.F_DUPFD, 1024)
    handler = types.SimpleNamespace(connection=socket.socket(fileno=number))
    chat.Handler.check_client(handler)
    theirs.close()
    with pytest.raises(ConnectionError):
        chat.Handler.check_client(handler)


def test_what_is_refused_is_not_read_for_ever():
    handler = unittest.mock.Mock()
    handler.rfile.read1.side_effect = [b"x"] * 20_000
    chat.Handler.refuse(handler, 401, "no")


def test_a_failure_ends_its_replies_and_not_the_server(served, monkeypatch):
    choose = chat.choose

    def fail(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(chat, "choose", fail)
    status, text = served.ask({"messages": HI})
    assert status == 500 and "out of memory" in text
    status, text = served.ask({"messages": HI, "stream": True})
    assert status == 200 and '"error"' in text and "[DONE]" not in text
    monkeypatch.setattr(chat, "choose", choose)
    reply = json.loads(served.ask({"messages": HI})[1])["choices"][0]["message"]["content"]
    assert reply == served.reply()


def memory_mb():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1000


@pytest.mark.slow
def test_two_hundred_streams_of_which_half_are_dropped(served):
    results = queue.Queue()

    def client(number):
        connection = post(served, {"messages": HI, "stream": True, "max_tokens": 200})
        response = connection.getresponse()
        if number % 2:
            response.read(100)
            response.close()
            connection.close()
            results.put("dropped")
        else:
            results.put("whole" if "[DONE]" in response.read().decode() else "cut")

    sizes = []
    for _ in range(3):
        threads = [threading.Thread(target=client, args=(n,)) for n in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        while served.engine.requests:
            time.sleep(0.05)
        sizes.append(memory_mb())
        found = [results.get() for _ in range(200)]
        assert found.count("whole") == found.count("dropped") == 100
    assert sizes[2] < sizes[1] * 1.05 + 10


@pytest.mark.slow
def test_the_page_in_a_browser(served):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (chromium and driver):
        pytest.skip("no Chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        browser.get(f"http://{served.address}/")
        browser.find_element("id", "input").send_keys("hi there\n")
        deadline = time.monotonic() + 60
        while served.reply() not in browser.page_source and time.monotonic() < deadline:
            time.sleep(0.1)
        replies = browser.find_elements("css selector", ".assistant .text")
        assert [reply.get_property("textContent") for reply in replies] == [served.reply()]
    finally:
        browser.quit()


# --------------------------------------------------------------------------------------- mistakes

MISTAKES = [  # words, what the message has
    ("--model_path nope", "models/nope not found; there is: "),
    ("--modelpath babbler", "did you mean --model_path"),
    ("--model_path babbler --input in.jsonl", "--input and --output go together"),
    ("--model_path babbler --input in.jsonl --output in.jsonl", "in.jsonl exists"),
    ("--model_path babbler --input in.jsonl --output o", "in.jsonl, line 2: 'prompt' is missing"),
    ("--model_path babbler --input in.jsonl --output o", "line 3: the prompt has 3"),
    ("--model_path babbler --host 0.0.0.0 --serve 80", "add an --api_key"),
    ("--model_path babbler --max_new_tokens 0", "--max_new_tokens 0: expected a positive"),
    ("--model_path wide", "the tokenizer has 594 tokens, the embedding 400 rows"),
    ("--model_path empty", "has no weights"),
    ("--model_path tiny --format template", "perhaps another --format"),
    ("--model_path raw --system_prefix x", "reads one message"),
    ("", "no finished run in models"),
]


def test_mistakes_are_told_before_a_weight_is_loaded(capsys, monkeypatch):
    make_babbler()
    make_babbler("wide", vocab_size=400)
    make_babbler("empty")
    pathlib.Path("models/empty/model.safetensors").unlink()
    for name in ("tiny", "raw"):
        conftest.make_causal("llama")
        pathlib.Path("models/llama").rename(f"models/{name}")
    pathlib.Path("models/raw/rawtune.json").write_text('{"raw_prompt": true}')
    write_lines("in.jsonl", [{"prompt": "a"}, {"question": "a"}, {"prompt": "far " * 300}])
    monkeypatch.setattr(chat.common, "load_model", None)
    for words, message in MISTAKES:
        found = fails(capsys, *words.split())
        assert message in found and "Traceback" not in found, (words, found)


def test_mistakes_that_only_the_model_or_the_port_tells(capsys):
    _, tokenizer = make_babbler()
    small = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    config = transformers.Lfm2Config(**small, layer_types=["conv"])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("models/babbler")
    assert "a lfm2 keeps more than" in fails(capsys, "--model_path", "babbler")
    args = types.SimpleNamespace(host="127.0.0.1", serve=70000)
    with pytest.raises(SystemExit):
        chat.serve(types.SimpleNamespace(args=args), "x")


def test_the_newest_run_is_taken_and_a_base_model_gets_turns(monkeypatch, capsys):
    conftest.make_causal("llama")
    for i, name in enumerate(("old", "new", "scores")):
        path = shutil.copytree("models/llama", f"models/{name}")
        script = "clf.py" if name == "scores" else "x"
        pathlib.Path(path, "rawtune.json").write_text(json.dumps({"script": script}))
        pathlib.Path(path, "COMPLETE").touch()
        os.utime(pathlib.Path(path, "COMPLETE"), (i, i))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    args = chat.parse_args(["--bot_name", 'Jo"i'])
    load_args, _, prompts, _ = chat.prepare(args)
    assert load_args.model_init_path == "models/new"
    messages = [*HI, {"role": "assistant", "content": " Yes. "}, *HI]
    text = prompts.tokenizer.decode(prompts.ids({"messages": messages}), skip_special_tokens=True)
    assert text == 'User: hi there\nJo"i: Yes.\nUser: hi there\nJo"i:'
    assert prompts.stop == ["\nUser:"]
    args = chat.parse_args(["--format", "v2"])
    text = chat.prepare(args)[2].render([{"role": "system", "content": "S"}, *messages], True)
    assert text == "<prefix>S</prefix><human>hi there<bot> Yes. <human>hi there<bot>"
