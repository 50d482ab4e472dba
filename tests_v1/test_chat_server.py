"""chat.py's server: OpenAI's API over a tiny model in this process, what it refuses, clients that leave; two hundred at once (slow)."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import threading
import time
import types

import pytest
import torch
import transformers
from conftest import ROOT, finish, kill, start, write_babbler, write_byt5

import chat

openai = pytest.importorskip("openai", reason="openai is not installed (pip install -r requirements-dev.txt)")

HI = [{"role": "user", "content": "hi"}]
FLAGS = ["--temperature", "0", "--max_new_tokens", "40", "--max_batch", "8"]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_babbler(tmp_path_factory.mktemp("models") / "babbler")


class Served:
    """Engine and server in this process, and what the model itself says."""

    def __init__(self, folder):
        args = chat.parse_args(["--model_path", str(folder), "--serve", "0", *FLAGS])
        source, config, self.tokenizer, self.prompts, *_ = chat.prepare(args)
        device = torch.device("cpu")
        self.model = chat.load(args, source, config, device)
        self.engine = chat.Engine(self.model, self.tokenizer, self.prompts, device, args.max_batch, 64, 1e9)
        self.engine.start()
        self.server = chat.Server(args, self.engine, self.prompts, "babbler")
        self.port, self.args = self.server.server_port, args
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.client = self.connect("none")

    def connect(self, key):
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60,
                             http_client=openai.DefaultHttpxClient(trust_env=False, timeout=60))

    def close(self):
        self.client.close()  # and with it the threads of its connections
        until(lambda: not any("process_request" in thread.name for thread in threading.enumerate()), 40)
        self.server.shutdown()
        self.server.server_close()
        self.engine.stop()

    def chat(self, messages=HI, **options):
        return self.client.chat.completions.create(model="babbler", messages=messages, **{"max_tokens": 12, **options})

    def complete(self, prompt, **options):
        return self.client.completions.create(model="babbler", prompt=prompt, **{"max_tokens": 12, **options})

    def logp(self, ids):
        """(length of ids, V): log-probabilities of what follows each token."""
        with torch.inference_mode():
            return torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), -1)

    def greedy(self, ids, n=12):
        """n ids, one full forward pass each."""
        ids, before = list(ids), len(ids)
        for _ in range(n):
            ids.append(int(self.logp(ids)[-1].argmax()))
        return ids[before:]

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def post(self, path, body=None, headers=JSON, method="POST"):
        """(status, parsed body) of one request; body: bytes, or what becomes JSON."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def send(self, data):
        """Bytes of the answer to raw bytes, until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(data)
            found = b""
            while piece := connection.recv(65536):
                found += piece
            return found

    def assert_well(self):
        """It answers an ordinary request, and rightly."""
        assert self.chat(max_tokens=5).choices[0].message.content == self.text(self.greedy(self.prompts.ids(HI), 5))

    def rows(self):
        return [row for batch in self.engine.batches for row in batch.rows]


@pytest.fixture(scope="module")
def module_served(folder):
    served = Served(folder)
    yield served
    served.close()


@pytest.fixture
def served(module_served):
    """Idle before and after every test: what one leaves running would be another's failure."""
    yield module_served
    until(lambda: module_served.engine.n_running() == module_served.engine.n_waiting() == 0)


def until(condition, seconds=60):
    """Wait for a condition; a time-out fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.005)


def deltas(stream):
    """(joined text, last finish reason, last usage) of a streamed chat."""
    text, reason, usage = "", None, None
    with stream:  # here and below: left to the garbage collector, an open stream may deadlock the client's pool of connections
        for event in stream:
            for choice in event.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
            usage = event.usage or usage
    return text, reason, usage


def consume(answer):
    """Read a stream to its end; other answers have been read."""
    if isinstance(answer, openai.Stream):
        deltas(answer)


# ------------------------------------------------------------------------------------------------ replies


def test_a_reply_is_the_models_greedy_one_and_its_stream_says_the_same(served):
    ids = served.prompts.ids(HI)
    expected = served.text(served.greedy(ids))
    plain = served.chat()
    assert (plain.choices[0].message.content, plain.choices[0].message.role, plain.choices[0].finish_reason) == (expected, "assistant", "length")
    assert (plain.usage.prompt_tokens, plain.usage.completion_tokens, plain.usage.total_tokens) == (len(ids), 12, len(ids) + 12)
    text, reason, usage = deltas(served.chat(stream=True, stream_options={"include_usage": True}))
    assert (text, reason, usage) == (expected, "length", plain.usage)
    assert deltas(served.chat(stream=True))[2] is None
    assert served.chat([{"role": "user", "content": "ho"}]).choices[0].message.content != expected  # the control


def test_earlier_turns_and_the_system_turn_are_part_of_the_prompt(served):
    turns = [{"role": "system", "content": "a"}, *HI, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    text = served.chat(turns).choices[0].message.content
    assert text == served.text(served.greedy(served.prompts.ids(turns)))
    assert text != served.chat(turns[1:]).choices[0].message.content and text != served.chat(turns[3:]).choices[0].message.content
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    assert text == served.chat(parts).choices[0].message.content  # the other way to write a content
    assert text == served.chat([{**turns[0], "role": "developer"}, *turns[1:]]).choices[0].message.content


def test_the_system_prefix_is_put_in_front_where_a_conversation_has_none(served, monkeypatch):
    own = [{"role": "system", "content": "own"}, *HI]
    plain, with_own = served.chat().choices[0].message.content, served.chat(own).choices[0].message.content
    monkeypatch.setattr(served.args, "system_prefix", "own")
    assert served.chat().choices[0].message.content == with_own != plain
    monkeypatch.setattr(served.args, "system_prefix", "other")
    assert served.chat(own).choices[0].message.content == with_own != served.chat().choices[0].message.content


def across_tokens(served, ids, text):
    """Three characters of a text that no single token has, and that occur first in its second half."""
    pieces = [served.text([i]) for i in ids]
    return next(text[i: i + 3] for i in range(len(text) // 2, len(text) - 3)
                if text.find(text[i: i + 3]) == i and not any(text[i: i + 3] in piece for piece in pieces))


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_cut_away_also_where_several_tokens_make_it(served, stream):
    ids = served.greedy(served.prompts.ids(HI), 30)
    text = served.text(ids)
    stop = across_tokens(served, ids, text)

    def ask(**options):
        reply = served.chat(max_tokens=30, stream=stream, **options)
        return deltas(reply)[:2] if stream else (reply.choices[0].message.content, reply.choices[0].finish_reason)
    assert ask(stop=stop) == ask(stop=["never said", stop, stop + "x"]) == (text[: text.find(stop)], "stop")
    assert ask(stop=text[4]) == (text[: text.find(text[4])], "stop")  # one character
    # what could begin a stop string is held back, but not lost: the end of the text is the beginning of this one
    assert ask(stop=text[-2:] + "no") == ask() == (text, "length")


def test_a_seed_gives_n_replies_again_and_another_seed_others(served):
    def ask(**options):
        return [choice.message.content for choice in sorted(served.chat(n=3, temperature=1, **options).choices, key=lambda c: c.index)]
    texts = ask(seed=5)
    assert len(set(texts)) == 3 and texts == ask(seed=5)
    assert not set(texts) & set(ask(seed=6)) and not set(ask()) & set(ask())
    together = {0: "", 1: "", 2: ""}
    with served.chat(n=3, temperature=1, seed=5, stream=True) as stream:
        for choice in (choice for event in stream for choice in event.choices):
            together[choice.index] += choice.delta.content or ""
    assert list(together.values()) == texts


@pytest.mark.parametrize("seed", [2**53 + 1, -2**61 + 1])  # floats have no such numbers
def test_a_seed_of_64_bits_is_one_of_its_own(served, seed):
    text = served.chat(seed=seed, temperature=1).choices[0].message.content
    assert text == served.chat(seed=seed, temperature=1).choices[0].message.content
    assert text != served.chat(seed=seed + 1, temperature=1).choices[0].message.content


def test_temperature_top_p_and_top_k_reach_the_engine(served):
    greedy = served.chat().choices[0].message.content
    assert served.chat(temperature=2, seed=1).choices[0].message.content != greedy
    assert served.chat(temperature=2, seed=1, top_p=0).choices[0].message.content == greedy
    assert served.chat(temperature=2, seed=1, extra_body={"top_k": 1}).choices[0].message.content == greedy
    assert served.chat(extra_body={"repetition_penalty": 5}, max_tokens=40).choices[0].message.content != served.chat(max_tokens=40).choices[0].message.content


def test_max_tokens_has_two_names_and_a_default(served):
    for options, n in (({"max_tokens": 3}, 3), ({"max_completion_tokens": 4, "max_tokens": None}, 4), ({"max_tokens": None}, 40),
                       ({"max_tokens": 0}, 0), ({"max_tokens": 10**6}, 512 - len(served.prompts.ids(HI)))):  # the context cuts the last
        reply = served.chat(**options)
        assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (n, "length")
    assert served.client.completions.create(model="babbler", prompt="hi").usage.completion_tokens == 16  # OpenAI's default there


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat_are_the_models_own(served, stream):
    ids = served.prompts.ids(HI)
    reply = served.greedy(ids, 6)
    logp = served.logp(ids + reply)[len(ids) - 1: -1]

    def ask(**options):
        answer = served.chat(max_tokens=6, logprobs=True, top_logprobs=3, stream=stream, **options)
        with answer if stream else contextlib.nullcontext([answer]) as events:
            parts = [choice.logprobs for event in events for choice in event.choices]
        return [token for part in parts if part for token in part.content]
    found = ask()
    assert [token.logprob for token in found] == pytest.approx([float(logp[i, t]) for i, t in enumerate(reply)], abs=1e-4)
    assert [token.token for token in found] == [served.tokenizer.decode([t]) for t in reply]
    top, at = logp.topk(3)
    assert [[p.logprob for p in token.top_logprobs] for token in found] == [pytest.approx(row, abs=1e-4) for row in top.tolist()]
    assert [[p.token for p in token.top_logprobs] for token in found] == [[served.tokenizer.decode([t]) for t in row] for row in at.tolist()]
    hot = ask(temperature=3, seed=1)  # the control, and: they are the model's, whatever the temperature
    assert [token.token for token in hot] != [token.token for token in found]
    assert [p.logprob for p in hot[0].top_logprobs] == pytest.approx(top[0].tolist(), abs=1e-4)


def test_no_logprobs_unless_asked(served):
    assert served.chat(top_logprobs=3).choices[0].logprobs is None and served.complete("hi").choices[0].logprobs is None


def test_completions_take_text_ids_and_lists_of_both(served):
    ids = served.tokenizer("the cat").input_ids
    expected, other = served.text(served.greedy(ids)), served.text(served.greedy(served.tokenizer("a dog").input_ids))
    assert expected != other  # the control
    for prompt, texts in (("the cat", [expected]), (ids, [expected]), (["the cat", "a dog"], [expected, other]),
                          ([served.tokenizer("a dog").input_ids, ids], [other, expected])):
        reply = served.complete(prompt)
        assert [choice.text for choice in reply.choices] == texts and [choice.index for choice in reply.choices] == list(range(len(texts)))
    streamed = {0: "", 1: ""}
    with served.complete(["the cat", "a dog"], stream=True) as stream:
        for choice in (choice for event in stream for choice in event.choices):
            streamed[choice.index] += choice.text
    assert streamed == {0: expected, 1: other}
    both = served.complete(["the cat", "a dog"], n=2, temperature=1, seed=3)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3] and both.choices[0].text != both.choices[1].text


@pytest.mark.parametrize("length", [5, 150])  # 150: in three chunks
def test_echo_with_logprobs_tells_the_models_logprobs_of_the_prompt(served, length):
    ids = torch.randint(3, 280, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    logp = served.logp(ids)
    reply = served.complete(ids, echo=True, logprobs=2, max_tokens=0)
    choice = reply.choices[0]
    assert choice.text == served.tokenizer.decode(ids)
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx([float(logp[i, t]) for i, t in enumerate(ids[1:])], abs=1e-4)
    assert [max(top.values()) for top in choice.logprobs.top_logprobs[1:]] == pytest.approx(logp[:-1].amax(-1).tolist(), abs=1e-4)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (length, 0)
    shifted = [float(logp[i, t]) for i, t in enumerate(ids[:-1])]  # the control: off by one
    assert choice.logprobs.token_logprobs[1:] != pytest.approx(shifted, abs=1e-4)


def test_echo_and_a_reply_together(served):
    ids = served.tokenizer("the cat").input_ids
    reply = served.complete("the cat", echo=True, logprobs=0, max_tokens=4)
    more, logprobs = served.greedy(ids, 4), reply.choices[0].logprobs
    assert reply.choices[0].text == "the cat" + served.text(more) and served.complete("the cat", echo=True, max_tokens=4).choices[0].text == reply.choices[0].text
    logp = served.logp(ids + more)
    assert logprobs.token_logprobs[1:] == pytest.approx([float(logp[i, t]) for i, t in enumerate((ids + more)[1:])], abs=1e-4)
    assert logprobs.tokens == [served.tokenizer.decode([t]) for t in ids + more] and reply.usage.completion_tokens == 4


def test_models_health_and_page(served):
    assert [model.id for model in served.client.models.list()] == ["babbler"]
    status, health = served.post("/healthz", method="GET")
    assert status == 200 and (health["status"], health["running"], health["waiting"], health["model"]) == ("ok", 0, 0, "babbler")
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)) as connection:
        for _ in range(2):  # twice over one connection
            connection.request("GET", "/?from=mail")
            response = connection.getresponse()
            assert response.status == 200 and response.read() == served.server.page
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]


# ------------------------------------------------------------------------------------------------ together


@pytest.mark.parametrize("max_batch", [8, 1])
def test_a_late_request_is_answered_while_an_early_one_is_running(served, monkeypatch, max_batch):
    """The early reply may not pass its 150th token before the late one's first has arrived. With room for one row (the control) it
    never does, so there the wait is a short one."""
    engine, step, arrived, in_time = served.engine, served.engine.step, threading.Event(), []

    def slow_step():
        longest = max((row.n_new for row in served.rows()), default=0)
        if longest == 20:
            until(lambda: engine.n_waiting() or len(served.rows()) > 1 or arrived.is_set())  # the late one is there
        if longest == 150 and not in_time:
            in_time.append(arrived.wait(60 if max_batch > 1 else 0.2))
        step()
    monkeypatch.setattr(engine, "step", slow_step)
    monkeypatch.setattr(engine, "max_batch", max_batch)

    def late():
        with served.connect("none") as client, client.chat.completions.create(model="babbler", messages=HI, max_tokens=2, stream=True) as stream:
            next(iter(stream))
            arrived.set()
    thread = threading.Thread(target=late)
    with served.chat(max_tokens=200, stream=True) as early:
        next(iter(early))
        thread.start()
        *_, last = early
    thread.join(60)
    assert last.choices[0].finish_reason == "length" and arrived.is_set() and in_time == [max_batch > 1]


def test_replies_together_are_those_of_each_alone(served):
    messages = [[{"role": "user", "content": "the cat " * i}] for i in range(1, 20)]
    alone = [served.chat(m).choices[0].message.content for m in messages]
    together, most = [None] * len(messages), 0

    def ask(i):
        together[i] = served.post("/v1/chat/completions", {"messages": messages[i], "max_tokens": 12})[1]["choices"][0]["message"]["content"]
    threads = [threading.Thread(target=ask, args=[i]) for i in range(len(messages))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, served.engine.n_running())
        time.sleep(0.001)
    assert together == alone and len(set(alone)) > 15 and 1 < most <= 8


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(served, monkeypatch, stream):
    step, before = served.engine.step, served.engine.n_generated

    def slow_step():  # a reply of 400 tokens takes 20 s, longer than a server may need to see that the client is gone
        time.sleep(0.05)
        step()
    monkeypatch.setattr(served.engine, "step", slow_step)
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps({"messages": HI, "max_tokens": 400, "stream": stream}), JSON)
    if stream:
        connection.getresponse().read(1)
    until(lambda: served.engine.n_running() == 1)
    connection.sock.close() if connection.sock else None
    connection.close()
    until(lambda: served.engine.n_running() == 0)
    assert 0 < served.engine.n_generated - before < 400
    monkeypatch.undo()
    served.assert_well()


def test_a_client_that_leaves_the_queue_is_not_answered(served, monkeypatch):
    step, go = served.engine.step, threading.Event()
    monkeypatch.setattr(served.engine, "step", lambda: (go.wait(60), step()))
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps({"messages": HI}), JSON)
    until(lambda: served.engine.n_waiting() == 1)
    connection.close()
    until(lambda: len(served.engine.waiting) == len(served.engine.inbox) == 1)  # the cancellation, which is no prompt that waits
    assert served.engine.n_waiting() == 1
    before = served.engine.n_generated
    monkeypatch.undo()
    go.set()
    until(lambda: served.engine.n_waiting() == 0)
    served.assert_well()
    # the reply of assert_well has 5; the step that was under way when the client left may have begun the other
    assert 5 <= served.engine.n_generated - before <= 5 + 2


@pytest.mark.parametrize("comes", ["in the step of the cancellation", "a step later", "before it, and waited for a full batch"])
def test_a_reply_is_right_that_begins_when_all_others_are_cancelled(served, comes):
    """An engine without a thread, as what matters is what comes between two steps. "A step later" is the control."""
    engine = chat.Engine(served.model, served.tokenizer, served.prompts, torch.device("cpu"), 2, 64, 1e9)

    def steps(n):
        with torch.inference_mode():
            for _ in range(n):
                engine.inbox and engine._exchange()
                engine.step()
    ids, other = served.prompts.ids(HI), served.prompts.ids([{"role": "user", "content": "the cat"}])
    early = engine.submit(chat.Request(other, [0, 0], 200))
    steps(50)
    assert engine.n_running() == 2
    late = chat.Request(ids, [0], 12)
    if comes.startswith("before"):
        engine.submit(late)
        steps(10)
        assert (engine.n_running(), engine.n_waiting()) == (2, 1)
    engine.cancel(early)
    if comes.startswith("a step"):
        steps(1)
        assert engine.n_running() == 0
    if not comes.startswith("before"):
        engine.submit(late)
    steps(20)
    assert [token for token, _ in chat.collect(late)[0]["tokens"]] == served.greedy(ids) != served.greedy(other)
    assert engine.n_running() == 0


def test_a_full_queue_answers_429_and_those_in_it_are_served(served, monkeypatch):
    step, go, statuses = served.engine.step, threading.Event(), []
    monkeypatch.setattr(served.engine, "step", lambda: (go.wait(60), step()))
    monkeypatch.setattr(served.args, "max_queue", 2)
    ask = lambda: statuses.append(served.post("/v1/chat/completions", {"messages": HI, "max_tokens": 2})[0])  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for n, thread in enumerate(threads):
        thread.start()
        until(lambda n=n: served.engine.n_waiting() == n + 1)
    with pytest.raises(openai.RateLimitError) as refused:
        served.chat()
    assert refused.value.code == "queue_full" and served.post("/healthz", method="GET")[1]["waiting"] == 2
    go.set()
    for thread in threads:
        thread.join(60)
    assert statuses == [200, 200]
    served.assert_well()


@pytest.mark.parametrize("stream", [False, True])
def test_request_timeout_ends_a_reply_that_is_being_written(served, monkeypatch, stream):
    monkeypatch.setattr(served.args, "request_timeout", 0)
    with pytest.raises(openai.APIError, match="--request_timeout") as refused:
        consume(served.chat(max_tokens=400, stream=stream))
    assert stream or refused.value.status_code == 408
    until(lambda: served.engine.n_running() == 0)
    monkeypatch.undo()
    served.assert_well()


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_in_the_engine_is_told_and_the_next_request_works(served, monkeypatch, stream):
    forward, left = chat.Engine._forward, [5]

    def failing(self, *args, **options):
        left[0] -= 1
        if left[0] == 0:
            raise ZeroDivisionError("on purpose")
        return forward(self, *args, **options)
    monkeypatch.setattr(chat.log, "disabled", True)
    monkeypatch.setattr(chat.Engine, "_forward", failing)
    with pytest.raises(openai.APIError, match="on purpose") as refused:
        consume(served.chat(max_tokens=100, stream=stream))
    assert stream or refused.value.status_code == 500
    assert left == [0]
    served.assert_well()
    until(lambda: served.engine.n_running() == served.engine.n_waiting() == 0 and not served.engine.reading)


def test_an_error_in_the_server_itself_is_a_500_in_json(served, monkeypatch):
    def broken(messages):
        raise KeyError("on purpose")
    monkeypatch.setattr(served.prompts, "ids", broken)
    monkeypatch.setattr(chat.log, "disabled", True)
    status, answer = served.post("/v1/chat/completions", {"messages": HI})
    assert status == 500 and "on purpose" in answer["error"]["message"]
    monkeypatch.undo()
    served.assert_well()


# ------------------------------------------------------------------------------------------------ what is refused

NUMBERS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "max_completion_tokens", "seed")
BAD = [{"messages": HI, name: value} for name in NUMBERS for value in (True, "0.5", "x", [1], {}, float("nan"), float("inf"), 10**400, 1e300)
       ] + [{"messages": HI, name: -1} for name in NUMBERS[:-1]] + [{"messages": HI, **more} for more in (
           {"temperature": 100.5}, {"top_p": 1.01}, {"top_k": 1.5}, {"max_tokens": 2.5}, {"seed": 2**63}, {"repetition_penalty": 0},
           {"n": 0}, {"n": True}, {"n": 17}, {"n": "2"}, {"n": 1.5}, {"n": 10**30}, {"stop": 5}, {"stop": ""}, {"stop": [""]}, {"stop": {"a": 1}},
           {"stop": ["x", 1]}, {"stop": ["x"] * 17}, {"stop": "x" * 1001}, {"stream": "yes"}, {"stream": 1}, {"stream_options": "x", "stream": True},
           {"stream_options": [1], "stream": True}, {"logprobs": "x"}, {"logprobs": 3}, {"top_logprobs": 21}, {"top_logprobs": -1}, {"top_logprobs": "2"},
           {"top_logprobs": True}, {"tools": [{"type": "function"}]}, {"tool_choice": "auto"}, {"functions": [{}]}, {"response_format": {"type": "json_object"}},
           {"logit_bias": {"5": 1}}, {"frequency_penalty": 0.5}, {"presence_penalty": 0.5})
       ] + [{"messages": messages} for messages in (
           None, [], {}, "hi", 5, ["hi"], [None], [{"role": "user"}], [{"content": "hi"}], [{"role": "tool", "content": "x"}],
           [{"role": ["user"], "content": "x"}], [{"role": 5, "content": "x"}], [{"role": "user", "content": None}], [{"role": "user", "content": {}}],
           [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
           [{"role": "user", "content": [{"text": 5}]}], [{"role": "user", "content": ["x"]}], [*HI, {"role": "assistant", "content": "x"}],
           [{"role": "system", "content": "x"}], [{"role": "user", "content": "\ud800"}])
       ] + [{}]
BAD_PROMPTS = [{"prompt": prompt} for prompt in (
    None, [], 5, {}, True, [[]], [True], [-1], [400], [2**70], [1.5], [None], ["a", 5], [["a"]], [[5], "a", [10**6]], "\ud800", ["a"] * 257, [[[5]]])
    ] + [{"prompt": "a", **more} for more in ({"logprobs": 21}, {"logprobs": -1}, {"logprobs": "x"}, {"logprobs": 1.5}, {"echo": "x"}, {"echo": 1},
                                              {"echo": True, "n": 2}, {"echo": True, "stream": True}, {"suffix": "x"}, {"best_of": 2})]


def test_bad_values_are_refused_with_a_reason(served):
    """One test for all: each takes milliseconds."""
    for path, bodies in (("/v1/chat/completions", BAD), ("/v1/completions", BAD_PROMPTS)):
        for body in bodies:
            status, answer = served.post(path, body)
            assert status == 400 and answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error", (body, status, answer)
    assert "temperature" in served.post("/v1/chat/completions", BAD[0])[1]["error"]["message"]
    served.assert_well()


def test_values_that_change_nothing_are_accepted(served):
    """The control for the test above: the same names with null, and what OpenAI's own clients send."""
    nothing = {name: None for name in {name for body in BAD for name in body} - {"messages"}}
    assert served.post("/v1/chat/completions", {"messages": HI, **nothing})[0] == 200
    usual = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {},
             "user": "someone", "metadata": {}, "n": 1, "stop": [], "stream": False, "top_p": 1, "model": "babbler", "max_tokens": 2.0}
    assert served.post("/v1/chat/completions", {"messages": HI, **usual})[1]["usage"]["completion_tokens"] == 2


def test_a_prompt_that_is_too_long_is_refused_with_openais_code(served):
    long = [{"role": "user", "content": "x" * 600}]
    for ask in (lambda: served.chat(long), lambda: served.complete("x" * 600), lambda: served.complete([5] * 512)):
        with pytest.raises(openai.BadRequestError) as refused:
            ask()
        assert refused.value.code == "context_length_exceeded"
    assert served.complete([5] * 511).usage.completion_tokens == 1  # the control: the last place
    assert served.complete([5] * 512, max_tokens=0, echo=True, logprobs=1).usage.completion_tokens == 0  # a whole context is scored
    served.assert_well()


def test_a_model_without_a_limit_gets_one(tmp_path):
    """T5 has none: one reply of 2**31 tokens would keep all others waiting, one prompt of 20 kB stops the server for a minute."""
    write_byt5(tmp_path / "t5")
    transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "t5")).save_pretrained(tmp_path / "t5")
    settings = {"max_new_tokens": 2**31, "temperature": 0, "top_k": 0, "top_p": 1, "repetition_penalty": 1}
    for flags, limit in (([], 8192), (["--max_context", "20000"], 20000)):
        prompts = chat.prepare(chat.parse_args(["--model_path", str(tmp_path / "t5"), *flags]))[3]
        assert prompts.context == limit >= chat.new_request(prompts, [5], [0], settings).max_new_tokens >= limit - 1


@pytest.mark.parametrize("body", [b"", b"{", b"nonsense", b'{"messages": [}', b"\xff\xfe\xfd", b"[" * 100000, b'{"a": "\xff"}', b"9" * 5000])
def test_what_is_not_json_is_refused(served, body):
    status, answer = served.post("/v1/chat/completions", body)
    assert status == 400 and "JSON" in answer["error"]["message"]
    served.assert_well()


@pytest.mark.parametrize("body", [b"[]", b"5", b"null", b'"messages"', b"true"])
def test_json_that_is_no_object_is_refused(served, body):
    status, answer = served.post("/v1/completions", body)
    assert status == 400 and "object" in answer["error"]["message"]


def test_endpoints_methods_models_and_content_types_that_are_not_there(served):
    for method, path, body, headers, status, code in (
            ("GET", "/v1/none", None, JSON, 404, "not_found"), ("POST", "/v1/embeddings", {}, JSON, 404, "not_found"),
            ("GET", "/v1/chat/completions", None, JSON, 404, "not_found"), ("POST", "/healthz", {}, JSON, 404, "not_found"),
            ("GET", "/../chat.py", None, JSON, 404, "not_found"), ("PUT", "/v1/chat/completions", {}, JSON, 501, None),
            ("DELETE", "/v1/models", None, JSON, 501, None), ("OPTIONS", "/v1/chat/completions", None, JSON, 501, None),
            ("POST", "/v1/chat/completions", {"messages": HI, "model": "gpt-4"}, JSON, 404, "model_not_found"),
            ("POST", "/v1/chat/completions", {"messages": HI, "model": ["babbler"]}, JSON, 404, "model_not_found"),
            ("POST", "/v1/chat/completions", {"messages": HI}, {"Content-Type": "text/plain"}, 415, None),
            ("POST", "/v1/chat/completions", {"messages": HI}, {"Content-Type": "application/x-www-form-urlencoded"}, 415, None),
            ("POST", "/v1/chat/completions", {"messages": HI}, {}, 415, None)):
        found, answer = served.post(path, body, headers, method)
        assert (found, answer["error"]["code"]) == (status, code) and answer["error"]["message"], (method, path)
    assert served.post("/v1/chat/completions", {"messages": HI, "model": "babbler"}, {"Content-Type": "application/json; charset=utf-8"})[0] == 200


def head(*lines):
    return "\r\n".join((*lines, "", "")).encode()


POST_HEAD = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")


@pytest.mark.parametrize("data, status", [
    (head(*POST_HEAD), 411), (head(*POST_HEAD, "Content-Length: x"), 411), (head(*POST_HEAD, "Content-Length: -1"), 413),
    (head(*POST_HEAD, "Content-Length: 2000001"), 413), (head(*POST_HEAD, "Content-Length: 99999999999999999999"), 413),
    (head(*POST_HEAD, "Content-Length: " + "9" * 5000), 411), (head(*POST_HEAD, "Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n", 411),
    (head("GET /healthz HTTP/1.1"), 403), (head("GET /healthz HTTP/1.1", "Host: localhost.evil.org"), 403), (head("GET /healthz HTTP/1.0"), 403),
    (b"\x16\x03\x01 what is this\r\n\r\n", 400), (b"GET / HTTP/9.9\r\n\r\n", 505), (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", 414),
    (head("GET / HTTP/1.1", *["A: b"] * 150), 431), (head("GET / HTTP/1.1", "A: " + "b" * 70000), 431), (head("GET http://localhost/v2 HTTP/1.1", "Host: localhost"), 404)])
def test_requests_of_a_wrong_form_are_refused_in_json(served, data, status):
    answer = served.send(data)
    about, _, body = answer.partition(b"\r\n\r\n")
    # what is no HTTP at all is answered as HTTP/0.9 was: without a head
    assert about.startswith(b"HTTP/1.1 %d " % status) if body else status in (400, 505)
    assert json.loads(body or about)["error"]["message"]
    served.assert_well()


def test_a_body_that_is_too_large_is_refused_and_the_client_hears_it(served):
    """30 MB do not fit into the sockets' buffers: a server that closes at once resets the connection before the answer is read."""
    status, answer = served.post("/v1/completions", b"x" * 30_000_000)
    assert status == 413 and "--max_request_mb" in answer["error"]["message"]
    with pytest.raises(openai.APIStatusError) as refused:
        served.complete("x" * 30_000_000)
    assert refused.value.status_code == 413
    served.assert_well()


def test_a_body_that_does_not_come_is_answered_408(served, monkeypatch):
    monkeypatch.setattr(chat, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(chat.Handler, "timeout", 0.3)
    assert b" 408 " in served.send(head(*POST_HEAD, "Content-Length: 50") + b'{"prompt"').partition(b"\r\n")[0]
    monkeypatch.undo()
    served.assert_well()


def test_a_get_with_a_body_does_not_begin_the_next_request(served):
    answer = served.send(head("GET /healthz HTTP/1.1", "Host: localhost", "Content-Length: 60") + head("GET /v1/models HTTP/1.1", "Host: localhost"))
    assert answer.count(b"HTTP/1.1 200") == 1 and b'"status": "ok"' in answer
    pipelined = served.send(head("GET /healthz HTTP/1.1", "Host: localhost") + head("GET /v1/models HTTP/1.1", "Host: localhost", "Connection: close"))
    assert pipelined.count(b"HTTP/1.1 200") == 2  # the control


def test_hosts_of_other_names_are_refused_on_loopback_only(served, monkeypatch):
    for host, status in (("127.0.0.1", 200), ("localhost:1234", 200), ("LocalHost", 200), ("[::1]", 200), ("[::1]:80", 200), ("evil.org", 403), ("", 403),
                         ("localhost.evil.org:80", 403), ("127.0.0.1.evil.org", 403), ("evil.org:localhost", 403), ("192.168.0.5", 403)):
        assert served.post("/healthz", None, {"Host": host}, "GET")[0] == status, host
    monkeypatch.setattr(served.server, "loopback", False)  # as with --host 0.0.0.0 --api_key
    assert served.post("/healthz", None, {"Host": "evil.org"}, "GET")[0] == 200


@pytest.mark.parametrize("key", ["secret", "gehéim"])
def test_an_api_key_opens_v1_and_nothing_else_does(served, monkeypatch, key):
    monkeypatch.setattr(served.args, "api_key", key)
    for wrong in ("wrong", key + "x", key[:-1], key.upper(), "\xff"):
        for path, body, method in (("/v1/models", b"", "GET"), ("/v1/chat/completions", {"messages": HI}, "POST")):
            status, answer = served.post(path, body, {**JSON, "Authorization": f"Bearer {wrong}".encode()}, method)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
    for headers in ({}, {"Authorization": key.encode()}, {"Authorization": b"Basic " + key.encode()}, {"Authorization": ""}):
        assert served.post("/v1/models", b"", headers, "GET")[0] == 401
    assert served.post("/v1/models", b"", {"Authorization": f"Bearer {key}".encode()}, "GET")[0] == 200
    assert served.post("/healthz", b"", {}, "GET")[0] == 200
    if key.isascii():
        with pytest.raises(openai.AuthenticationError):
            served.chat()
        with served.connect(key) as client:
            assert client.chat.completions.create(model="babbler", messages=HI, max_tokens=1).usage.completion_tokens == 1


def test_http_1_0_gets_a_stream_without_chunks(served):
    body = json.dumps({"prompt": "hi", "max_tokens": 3, "stream": True}).encode()
    lines = ["Host: localhost", "Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close"]
    old, new = (served.send(head(f"POST /v1/completions HTTP/{version}", *lines) + body).partition(b"\r\n\r\n") for version in ("1.0", "1.1"))
    assert b"chunked" in new[0] and b"chunked" not in old[0]
    events = [line for line in old[2].splitlines() if line]
    assert all(line.startswith(b"data: ") for line in events) and events[-1] == b"data: [DONE]"
    assert not all(line.startswith(b"data: ") for line in new[2].splitlines() if line)  # the control: sizes of chunks stand between them


# ------------------------------------------------------------------------------------------------ as a process


@pytest.fixture
def process(folder, tmp_path):
    """serve(*flags) -> a running `python chat.py --serve 0` with its port."""
    running = []

    def serve(*flags):
        process, = start([ROOT / "chat.py", "--model_path", folder, "--serve", "0", *FLAGS, *flags], cwd=tmp_path)
        running.append(process)

        def url():
            assert process.poll() is None, finish([process])[1]
            process.output.seek(0)
            return re.search(r"http://[\d.]+:(\d+)", process.output.read())
        until(url, 120)
        return types.SimpleNamespace(process=process, port=int(url()[1]))
    yield serve
    kill(running)


def request(port, body, path="/v1/chat/completions"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), JSON)
    return connection


@pytest.mark.slow
def test_the_real_server_answers_and_ctrl_c_ends_it_cleanly(served, process):
    it = process()
    connection = request(it.port, {"messages": HI, "max_tokens": 5})
    answer = json.loads(connection.getresponse().read())
    assert answer["choices"][0]["message"]["content"] == served.text(served.greedy(served.prompts.ids(HI), 5))
    running = request(it.port, {"messages": HI, "max_tokens": 480, "stream": True})  # one that is under way does not keep it
    running.getresponse().read(1)
    os.kill(it.process.pid, signal.SIGINT)
    codes, output = finish([it.process], 30)
    assert codes == [0] and "Traceback" not in output and "stopped" in output


@pytest.mark.slow
def test_the_network_is_not_served_without_a_key(folder):
    codes, output = finish(start([ROOT / "chat.py", "--model_path", folder, "--serve", "0", "--host", "0.0.0.0"], env={"CHAT_API_KEY": ""}))
    assert codes == [2] and "--api_key" in output and "parameters" not in output


@pytest.mark.slow
def test_a_body_that_comes_byte_by_byte_stalls_nobody(served, process):
    it = process()
    body = json.dumps({"messages": HI, "max_tokens": 5}).encode()
    with socket.create_connection(("127.0.0.1", it.port), timeout=60) as slow:
        slow.sendall(head("POST /v1/chat/completions HTTP/1.1", *POST_HEAD[1:], f"Content-Length: {len(body)}"))
        for i in range(len(body) - 1):
            slow.sendall(body[i: i + 1])
            if i % 10 == 0:
                assert request(it.port, {"messages": HI, "max_tokens": 2}).getresponse().status == 200
        slow.sendall(body[-1:])
        response = http.client.HTTPResponse(slow)
        response.begin()
        assert json.loads(response.read())["usage"]["completion_tokens"] == 5


def wave(port, expected, n=200):
    """n streams at once: half leave in the middle, ten read a byte per second at first; twenty malformed requests beside them.
    -> texts of those that stay, by message."""
    texts, failures, go = [], [], threading.Barrier(n + 20)

    def one(i):
        try:
            go.wait(60)
            if i >= n:
                assert request(port, b'{"messages": [' if i % 2 else {"messages": HI, "n": "x"}).getresponse().status == 400
                return
            message = i % len(expected)
            connection = request(port, {"messages": [{"role": "user", "content": f"message {message}"}], "max_tokens": 40, "stream": True})
            response = connection.getresponse()
            if i % 2:
                response.read(1 + 17 * i)  # from the first event to somewhere in the middle
                response.close()
                connection.close()
                return
            raw = b""
            for _ in range(4 if i % 20 == 0 else 0):
                raw += response.read(1)
                time.sleep(1)
            raw += response.read()
            connection.close()
            events = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: ")]
            assert events[-1] == "[DONE]"
            texts.append((message, "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])))
        except Exception as error:
            failures.append((i, repr(error)))
    threads = [threading.Thread(target=one, args=[i]) for i in range(n + 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    assert not failures
    assert sorted(texts) == sorted((i % len(expected), expected[i % len(expected)]) for i in range(0, n, 2))


def of_status(pid, name):
    """A number of /proc/<pid>/status: threads, or kB."""
    return int(re.search(rf"{name}:\s+(\d+)", open(f"/proc/{pid}/status").read())[1])


@pytest.mark.slow
def test_two_hundred_at_once_of_whom_half_leave(served, process):
    it = process()
    prompts = [served.prompts.ids([{"role": "user", "content": f"message {i}"}]) for i in range(25)]
    expected = [served.text(served.greedy(ids, 40)) for ids in prompts]
    assert len(set(expected)) == 25

    def idle():
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", it.port, timeout=60)) as connection:
            connection.request("GET", "/healthz")
            health = json.loads(connection.getresponse().read())
        return health["running"] == health["waiting"] == 0 and of_status(it.process.pid, "Threads") <= n_threads + 2
    request(it.port, {"messages": HI}).getresponse().read()
    n_threads, memory = of_status(it.process.pid, "Threads"), []
    for _ in range(3):
        wave(it.port, expected)
        until(idle)
        memory.append(of_status(it.process.pid, "VmRSS"))
    assert memory[2] - memory[1] < 20_000 and memory[1] - memory[0] < 20_000, memory
    os.kill(it.process.pid, signal.SIGINT)
    codes, output = finish([it.process], 30)
    assert codes == [0] and "Traceback" not in output, output[-3000:]
