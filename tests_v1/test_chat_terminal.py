"""chat.py's terminal: commands, the history of a conversation, input of several lines; (slow) a real one in a pseudo-terminal."""

import json
import os
import pty
import queue
import re
import subprocess
import sys
import threading
import time

import pytest
import torch
import transformers
from conftest import ROOT, finish, start, write_babbler

import chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_babbler(tmp_path_factory.mktemp("models") / "babbler", 10**6)


class FakeEngine:
    """Replies at once: "reply 1", "reply 2", ... in two pieces, or what `script` says: a list of events per reply."""

    def __init__(self):
        self.requests, self.cancelled, self.script = [], [], {}

    def submit(self, request):
        self.requests.append(request)
        n = len(self.requests)
        request.events = queue.SimpleQueue()
        for event in self.script.get(n, [(0, "reply", 7, None, None), (0, f" {n}", 8, None, None), (0, "", None, None, "stop")]):
            request.events.put(event)
        return request

    def cancel(self, request):
        self.cancelled.append(request)


class Left(Exception):
    """The terminal has ended."""


class Session:
    """A terminal whose input is a script."""

    def __init__(self, folder, *flags):
        args = chat.parse_args(["--model_path", str(folder), "--max_context", "200", "--max_new_tokens", "20", *flags])
        _, _, self.tokenizer, self.prompts, *_ = chat.prepare(args)
        self.engine = FakeEngine()
        self.terminal = chat.Terminal(args, self.engine, self.prompts)

    def __call__(self, *lines, end=True):
        """Say these lines; -> what was printed. An exception as a line is raised where it would be read. end=False: the last line must end it."""
        left = list(lines)

        def read(prompt=""):
            if not left:
                assert end, "asked for more input"
                raise EOFError
            line = left.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line
        said = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("builtins.input", read)
            patch.setattr("builtins.print", lambda *words, end="\n", **_: said.append(" ".join(words) + end))
            try:
                self.terminal.run()
            except KeyboardInterrupt:
                raise Left("by Ctrl-C") from None  # pytest itself would end
        assert not left, f"not read: {left}"
        return "".join(said)

    def asked(self, i=-1):
        """The text of the prompt that the engine got."""
        return self.tokenizer.decode(self.engine.requests[i].ids)

    @property
    def contents(self):
        return [message["content"] for message in self.terminal.messages]


@pytest.fixture
def session(folder):
    return Session(folder)


# ------------------------------------------------------------------------------------------------ a conversation


def test_earlier_turns_are_in_the_next_prompt(session):
    assert session("one", "two") == "reply 1\nreply 2\n"
    assert session.asked(0) == "<s><|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert session.asked(1) == "<s><|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nreply 1<|im_end|>\n" \
                               "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert session.terminal.messages == [{"role": r, "content": c} for r, c in
                                         (("user", "one"), ("assistant", "reply 1"), ("user", "two"), ("assistant", "reply 2"))]


@pytest.mark.parametrize("command", ["/reset", "!reset", "  !reset "])
def test_reset_forgets_the_conversation(session, command):
    session("one", command, "two")
    assert "one" not in session.asked() and session.contents == ["two", "reply 2"]


def test_reset_keeps_the_system_turn_and_is_no_part_of_other_commands(session):
    session("/system Say !reset", "one", "/reset", "two")
    assert session.terminal.system == "Say !reset" and session.asked().startswith("<s><|im_start|>system\nSay !reset<|im_end|>")


@pytest.mark.parametrize("word", ["quit", "exit", "/quit", "/exit", " QUIT "])
def test_these_words_leave(session, word):
    assert session("one", word, end=False) == "reply 1\n"


def test_a_message_about_leaving_does_not_leave(session):
    session("quit it", "exit?")
    assert session.contents == ["quit it", "reply 1", "exit?", "reply 2"]


def test_empty_lines_say_nothing(session):
    assert session("", "   ", "\t") == "" and not session.engine.requests


def test_retry_asks_the_same_with_other_noise_and_replaces_the_reply(session):
    session("one", "two", "/retry", "/retry")
    ids, keys = [r.ids for r in session.engine.requests], [r.keys[0] for r in session.engine.requests]
    assert ids[1] == ids[2] == ids[3] != ids[0] and len(set(keys)) == 4
    assert session.contents == ["one", "reply 1", "two", "reply 4"]
    again = Session(session.prompts.tokenizer.name_or_path)
    again("one", "two", "/retry", "/retry")
    assert [r.keys[0] for r in again.engine.requests] == keys  # --seed makes a session repeatable


def test_retry_of_a_greedy_reply_says_that_it_will_be_the_same(session):
    assert "greedy" not in session("one", "/retry") and "greedy" in session("/set temperature 0", "/retry")


def test_another_seed_is_other_noise(session):
    session("one", "/reset", "one", "/reset", "/set seed 5", "one")
    keys = [r.keys[0] for r in session.engine.requests]
    assert keys[0] == keys[1] != keys[2]


def test_undo_takes_exchanges_back_until_none_is_left(session):
    said = session("one", "two", "/undo", "three", "/undo", "/undo", "/undo")
    assert "two" not in session.asked(2) and "reply 1" in session.asked(2)
    assert said.endswith("[taken back: three]\n[taken back: one]\n[nothing was said yet]\n") and session.contents == []


@pytest.mark.parametrize("command", ["/retry", "/undo"])
def test_nothing_to_retry_or_undo_is_said(session, command):
    assert session(command, "one") == "[nothing was said yet]\nreply 1\n"


@pytest.mark.parametrize("command", ["/retry", "/undo"])
def test_a_conversation_that_begins_with_the_assistant_has_nothing_to_retry(session, tmp_path, command):
    (tmp_path / "a.json").write_text(json.dumps([{"role": "assistant", "content": "Hello."}]))
    assert session(f"/load {tmp_path}/a.json", command, "one").endswith("[nothing was said yet]\nreply 1\n")
    assert session.contents == ["Hello.", "one", "reply 1"]


def test_the_system_turn_comes_first_and_can_be_changed_and_taken_away(session):
    session("one", "/system Be brief.", "two", "/system Be long.", "three", "/system", "four")
    firsts = ["<s><|im_start|>user\none", "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none",
              "<s><|im_start|>system\nBe long.<|im_end|>\n<|im_start|>user\none", "<s><|im_start|>user\none"]
    assert all(session.asked(i).startswith(first) for i, first in enumerate(firsts))
    assert session.asked().count("reply") == 3  # the history stays


def test_the_system_prefix_stays_through_a_reset(folder):
    session = Session(folder, "--system_prefix", "Be kind.")
    session("one", "/reset", "two")
    assert session.asked(0).count("Be kind.") == session.asked(1).count("Be kind.") == 1 and "one" not in session.asked(1)


def test_set_changes_the_next_request_and_shows_all(session):
    said = session("one", "/set temperature 0.5", "/set top_k=5", "/set top_p = 0.25", "/set max_new_tokens 7", "/set repetition_penalty 1.5", "two")
    first, second = session.engine.requests
    assert (second.temperature, second.top_k, second.top_p, second.max_new_tokens, second.repetition_penalty) == (0.5, 5, 0.25, 7, 1.5)
    assert (first.temperature, first.top_k, first.top_p, first.max_new_tokens, first.repetition_penalty) == (0.8, 0, 0.9, 20, 1.0)
    shown = session("/set")
    assert said.count("\n") == 7 and shown in said and "temperature 0.5" in shown and "max_new_tokens 7" in shown


@pytest.mark.parametrize("setting", ["temperature hot", "temperature", "temperature -1", "temperature nan", "temperature inf", "top_p 2", "top_k 1.5",
                                     "top_k 1e3", "max_new_tokens -1", "max_new_tokens 99999999999", "seed x", "colour 5", "repetition_penalty 0", "top_k 1 2"])
def test_bad_settings_change_nothing(session, setting):
    before = dict(session.terminal.settings)
    said = session(f"/set {setting}", "one")
    assert said.startswith("[") and "expected" in said and said.endswith("]\nreply 1\n") and session.terminal.settings == before


def test_a_seed_of_64_bits_can_be_set(session):
    session(f"/set seed {2**53 + 1}")  # a float has no such number
    assert session.terminal.settings["seed"] == 2**53 + 1


def test_help_names_every_command_and_unknown_ones_are_no_messages(session):
    said = session("/help")
    for command in ("/reset", "/retry", "/undo", "/system", "/set", "/save", "/load", "quit", "Ctrl-C", "Ctrl-D"):
        assert command in said
    for line in ("/hlep", "/", "/retry!", "/usr/bin", "/save", "/load"):
        assert session(line).startswith("[")
    assert "unknown command /hlep" in session("/hlep") and not session.engine.requests


def test_two_slashes_begin_a_message_with_one(session):
    session("//usr/bin is a folder", "//")
    assert session.contents[::2] == ["/usr/bin is a folder", "/"]


# ------------------------------------------------------------------------------------------------ several lines


def test_a_backslash_at_the_end_goes_on(session):
    session("one\\", "two\\", "three", "four\\five")
    assert session.contents[::2] == ["one\ntwo\nthree", "four\\five"]


def test_three_quotes_begin_and_end_a_text_of_several_lines(session):
    session('"""', "one", "", "  two\\", '  """', 'a """ within')
    assert session.contents[::2] == ["one\n\n  two\\", 'a """ within']


@pytest.mark.parametrize("lines, message", [(["one\\"], "one\n"), (["one\\", "two\\"], "one\ntwo\n"), (['"""', "one", "two"], "one\ntwo")])
def test_a_file_that_ends_within_a_message_still_asks_it(session, lines, message):
    session("first", *lines)
    assert session.contents[::2] in (["first", message], ["first", message.rstrip("\n")])


def test_ctrl_c_while_typing_drops_the_message_only(session):
    session.terminal.interactive = True
    said = session("one", '"""', "half", KeyboardInterrupt(), "two\\", KeyboardInterrupt(), KeyboardInterrupt(), "three")
    assert session.contents[::2] == ["one", "three"] and said.count("quit or Ctrl-D leaves") == 3


# ------------------------------------------------------------------------------------------------ what goes wrong


def ticks(session, n, then=(0, "", None, None, "stop")):
    return [*[(0, f"{i} ", 7, None, None) for i in range(n)], then]


def test_ctrl_c_stops_a_reply_and_keeps_what_was_said(session):
    class Interrupted(queue.SimpleQueue):
        def get(self, *args):
            event = super().get(*args)
            if event is None:
                raise KeyboardInterrupt
            return event
    submit = session.engine.submit

    def interrupted(request):
        submit(request)
        if len(session.engine.requests) == 2:
            request.events = Interrupted()
            for event in ticks(session, 3, None):
                request.events.put(event)
        return request
    session.engine.submit, session.terminal.interactive = interrupted, True
    said = session("one", "two", "three")
    assert session.contents == ["one", "reply 1", "two", "0 1 2 ", "three", "reply 3"]
    assert session.engine.cancelled == [session.engine.requests[1]] and "0 1 2 \n[3 tokens" in said and "stopped" in said
    assert "0 1 2 <|im_end|>" in session.asked()


def test_ctrl_c_between_replies_does_not_lose_the_conversation(session, monkeypatch):
    session("one")
    fit = session.prompts.fit
    monkeypatch.setattr(session.prompts, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    session.terminal.interactive = True
    session("two")
    monkeypatch.setattr(session.prompts, "fit", fit)
    session("three")
    assert session.contents == ["one", "reply 1", "three", "reply 2"]


def test_ctrl_c_ends_a_session_that_is_piped(session):
    with pytest.raises(Left):
        session("one", KeyboardInterrupt(), end=False)


def test_an_error_of_the_engine_takes_the_message_back(session):
    session.engine.script[2] = [(0, "half ", 7, None, None), (None, "out of memory: ...", None, None, "error")]
    said = session("one", "two", "three")
    assert "[out of memory: ...]" in said and session.contents == ["one", "reply 1", "three", "reply 3"]


@pytest.mark.parametrize("by", ["engine", "length"])
def test_a_retry_that_fails_keeps_the_reply_that_was_there(session, by):
    session("one", "two")
    if by == "engine":
        session.engine.script[3] = [(None, "out of memory", None, None, "error")]
        said = session("/retry")
    else:
        said = session("/system " + "x" * 400, "/retry", "/system")
    assert ("out of memory" if by == "engine" else "too long") in said
    assert session.contents == ["one", "reply 1", "two", "reply 2"]


def test_a_message_that_is_too_long_is_refused_and_the_conversation_goes_on(session):
    said = session("one", "x" * 300, "two")
    assert re.search(r"too long: \d{3} tokens, and the context has 200", said)
    assert session.contents == ["one", "reply 1", "two", "reply 2"] and "xxx" not in session.asked()


def test_whole_exchanges_are_left_out_oldest_first_and_that_is_said(session):
    messages = [f"{i} " + "x" * 40 for i in range(8)]
    said = session("/system Be brief.", *messages)
    lengths = [len(r.ids) for r in session.engine.requests]
    assert max(lengths) <= 200 - 20 < lengths[-1] + 80  # and no more than needed
    assert session.asked().startswith("<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    left = re.findall(r"user\n(\d)", session.asked())
    assert left == ["6", "7"] and "reply 7" in session.asked() and "reply 6" not in session.asked()
    told = [int(n) for n in re.findall(r"the first (\d+) exchange", said)]
    assert told == sorted(told) and told[-1] == 6 and len(told) < 8
    assert len(session.contents) == 16  # all of it can still be saved


@pytest.mark.parametrize("text", ["half a \ud800 pair", "\udcff"])
def test_text_that_is_no_unicode_is_refused(session, text):
    """What a terminal of another encoding makes of its bytes."""
    said = session("one", text, "two")
    assert said.count("[") == 1 and session.contents == ["one", "reply 1", "two", "reply 2"]


def test_input_that_cannot_be_decoded_does_not_end_the_session(session):
    session("one", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "two")
    assert session.contents == ["one", "reply 1", "two", "reply 2"]


# ------------------------------------------------------------------------------------------------ files


def test_save_and_load_are_a_round_trip(session, tmp_path):
    file = tmp_path / "my talk.json"
    said = session("/system Sei höflich.", "one", "zwei 🙂", "/set top_k 9", f"/save {file}", "/reset", "/system", "/set top_k 3", f"/load {file}")
    assert f"[4 messages in {file}]" in said and f"[4 messages from {file}]" in said and "höflich" in file.read_text(encoding="utf-8")
    session("three")
    assert "Sei höflich." in session.asked() and "zwei 🙂" in session.asked() and session.engine.requests[-1].top_k == 9
    assert session.contents == ["one", "reply 1", "zwei 🙂", "reply 2", "three", "reply 3"]


def test_save_does_not_overwrite(session, tmp_path):
    file = tmp_path / "a.json"
    file.write_text("mine")
    said = session("one", f"/save {file}", f"/save {tmp_path}", f"/save {tmp_path}/none/b.json", "two")
    assert file.read_text() == "mine" and said.count("[") >= 3 and session.contents[-1] == "reply 2"


@pytest.mark.parametrize("stored, system", [
    ([{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}], None),
    ([{"role": "system", "content": "Be."}, {"role": "human", "content": "one"}, {"role": "gpt", "content": "two"}], "Be."),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "one"}]}, {"role": "bot", "content": "two"}], "other": 5}, None),
    ({"system": "Be.", "messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}, "Be.")])
def test_load_reads_messages_of_other_origin(session, tmp_path, stored, system):
    (tmp_path / "a.json").write_text(json.dumps(stored))
    session("before", f"/load {tmp_path}/a.json", "three")
    assert session.contents == ["one", "two", "three", "reply 2"] and session.terminal.system == system
    assert "before" not in session.asked()


@pytest.mark.parametrize("stored", ["", "{", "nonsense", "5", '"one"', "null", '{"other": 1}', '{"messages": 5}', '[5]', '[{"role": "tool", "content": "x"}]',
                                    '[{"role": "user"}]', '{"messages": [], "settings": 5}', '{"messages": [], "settings": {"top_k": -1}}',
                                    '{"messages": [], "settings": {"colour": 1}}', '{"messages": [], "system": 5}', '{"messages": [], "settings": [1]}', b"\xff\xfe"])
def test_load_of_anything_else_changes_nothing(session, tmp_path, stored):
    (tmp_path / "a.json").write_bytes(stored if isinstance(stored, bytes) else stored.encode())
    before = dict(session.terminal.settings)
    said = session("/system Be.", "one", f"/load {tmp_path}/a.json", f"/load {tmp_path}/none.json", f"/load {tmp_path}", "two")
    assert said.count("\n[") == 3, said
    assert session.contents == ["one", "reply 1", "two", "reply 2"]
    assert session.terminal.settings == before and session.terminal.system == "Be."


# ------------------------------------------------------------------------------------------------ with a model


def test_a_reply_is_the_models_and_a_retry_at_a_temperature_another(folder):
    """The control for the fake engine of the tests above."""
    session = Session(folder, "--temperature", "0")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    session.terminal.engine = engine = chat.Engine(model, session.tokenizer, session.prompts, torch.device("cpu"), 2, 64, 1e9)
    engine.start()
    try:
        session("one", "two")
        for i in (1, 3):
            ids = session.prompts.ids(session.terminal.messages[:i])
            reply = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids):]
            assert session.contents[i] == session.tokenizer.decode(reply, skip_special_tokens=True)
        texts = {session("/retry") and session.contents[-1], session.contents[-1]}
        assert len(texts) == 1
        session("/set temperature 1")
        for _ in range(3):
            session("/retry")
            texts.add(session.contents[-1])
        assert len(texts) == 4 and len(session.contents) == 4
    finally:
        engine.stop()


def runs(mount):
    """models/old and /new have ended, in this order; later ones have not, were trained by clf.py, or are no runs."""
    for i, (name, script, complete) in enumerate([("new", "sft_causal.py", True), ("old", "seq2seq.py", True), ("unfinished", "sft_causal.py", False),
                                                  ("scores", "clf.py", True), ("plain", None, False)]):
        folder = write_babbler(mount / "models" / name)
        if script:
            (folder / "rawtune.json").write_text(json.dumps({"script": script}))
        if complete:
            (folder / "COMPLETE").touch()
            os.utime(folder / "COMPLETE", ns=(0, 10**18 + (i if name != "old" else -1) * 10**9))
    return mount


def test_the_newest_finished_run_that_can_talk_is_chosen(tmp_path):
    runs(tmp_path)

    def choose(*flags):
        problems = []
        return chat.choose_model(chat.parse_args(["--mount_dir", str(tmp_path), *flags]), problems), problems
    assert choose() == (str(tmp_path / "models" / "new"), [])
    os.utime(tmp_path / "models" / "old" / "COMPLETE")  # the control
    assert choose() == (str(tmp_path / "models" / "old"), [])
    assert choose("--model_path", "plain") == (str(tmp_path / "models" / "plain"), [])
    assert choose("--model_path", "some/hub-id") == ("some/hub-id", [])
    found, problems = choose("--mount_dir", str(tmp_path / "none"))
    assert found is None and "python sft_causal.py" in problems[0]


# ------------------------------------------------------------------------------------------------ as a process


def piped(words, text, cwd):
    return subprocess.run([sys.executable, ROOT / "chat.py", *map(str, words)], input=text, capture_output=True, cwd=cwd, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_piped_lines_are_answered_in_order_without_anything_else(folder, tmp_path):
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)
    messages, expected = [], b""
    for line in ("one", "two"):
        messages.append({"role": "user", "content": line})
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), add_special_tokens=False).input_ids
        reply = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids):]
        messages.append({"role": "assistant", "content": tokenizer.decode(reply, skip_special_tokens=True)})
        expected += messages[-1]["content"].encode() + b"\n"
    done = piped(["--model_path", folder, "--temperature", 0, "--max_new_tokens", 20], b"one\n\ntwo", tmp_path)
    replies = done.stdout.split(b"/help lists the commands\n")[-1]  # behind the log lines, where those are on the same stream
    assert (done.returncode, replies) == (0, expected), done.stderr.decode()[-3000:]
    assert b"Traceback" not in done.stderr and b"\x1b" not in done.stderr


@pytest.mark.slow
def test_without_a_model_it_says_how_to_get_one(tmp_path):
    done = piped([], b"", tmp_path)
    assert done.returncode == 2 and b"python sft_causal.py" in done.stderr and b"Traceback" not in done.stderr and done.stdout == b""


@pytest.mark.slow
def test_the_first_line_names_the_newest_run(tmp_path):
    codes, output = finish(start([ROOT / "chat.py", "--device", "cpu"], cwd=runs(tmp_path)))
    assert codes == [0] and re.search(r"models/new\b.*newest", [line for line in output.splitlines() if line][0]), output


@pytest.mark.slow
def test_a_reader_that_leaves_ends_a_piped_session_quietly(folder, tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "chat.py", "--model_path", folder, "--max_new_tokens", "100000"], cwd=tmp_path,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        process.stdin.write(b"one\ntwo\n")
        process.stdin.close()
        assert len(process.stdout.read(1000)) == 1000  # into the first reply
        process.stdout.close()
        errors = process.stderr.read()  # until it ends
        assert process.wait(60) != 0 and b"Traceback" not in errors, errors.decode()[-2000:]
    finally:
        process.kill()


class Pty:
    """chat.py with a terminal of its own, so that \\x03 and \\x04 are Ctrl-C and Ctrl-D."""

    def __init__(self, words, cwd):
        self.master, slave = pty.openpty()
        # Not by preexec_fn: that forks, which a worker with tens of GB of DeepSpeed's unused buffers is refused.
        own = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        self.process = subprocess.Popen([sys.executable, "-c", own, ROOT / "chat.py", *map(str, words)], stdin=slave, stdout=slave, stderr=slave,
                                        cwd=cwd, start_new_session=True,
                                        env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1", "INPUTRC": "/dev/null"})
        os.close(slave)
        self.output, self.seen = b"", 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        while True:
            try:
                piece = os.read(self.master, 65536)
            except OSError:  # how Linux says that nobody holds the other end
                return
            if not piece:
                return
            self.output += piece

    def expect(self, pattern, seconds=120):
        """Wait until this comes after what was expected before; -> the match."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.output[self.seen:], re.S)):
            assert time.monotonic() < end, f"{pattern} did not come: {self.output[-2000:]}"
            time.sleep(0.01)
        self.seen += match.end()
        return match

    def say(self, text):
        os.write(self.master, text.encode())


@pytest.fixture
def terminal(folder, tmp_path):
    opened = []

    def begin(*flags):
        opened.append(Pty(["--model_path", folder, "--temperature", 0, *flags], tmp_path))
        return opened[-1]
    yield begin
    for it in opened:
        it.process.kill()
        it.process.wait()
        os.close(it.master)


@pytest.mark.slow
def test_ctrl_c_stops_a_long_reply_and_keeps_the_conversation(terminal, tmp_path):
    it = terminal("--max_new_tokens", 900000)  # hours
    it.expect(rb"\n(\x1b\[\?2004h)?> ")
    it.say("one\r")
    it.expect(rb"Assistant: .{50,}")  # it streams
    it.say("\x03")
    it.expect(rb"\[\d+ tokens.*, stopped\].*> ")
    it.say("/set max_new_tokens 10\r")
    it.expect(rb"max_new_tokens 10,.*> ")
    it.say("two\r")
    it.expect(rb"Assistant: .*\[10 tokens.*> ")
    it.say("\x03")
    it.expect(rb"Ctrl-D leaves.*> ")
    it.say("\x03\x03")
    it.expect(rb"Ctrl-D leaves.*> ")
    it.say("/save talk.json\r")
    it.expect(rb"\[4 messages in talk.json\].*> ")
    assert it.process.poll() is None
    it.say("\x04")
    assert it.process.wait(60) == 0
    talk = json.loads((tmp_path / "talk.json").read_text())
    one, partial, two, reply = [message["content"] for message in talk["messages"]]
    assert (one, two) == ("one", "two") and len(partial) > 40 and reply
    shown = it.output.replace(b"\r\n", b"\n").replace(b"^C", b"")  # terminals begin lines so, and show Ctrl-C where it comes
    assert b"Assistant: " + partial.encode() + b"\n[" in shown and b"Assistant: " + reply.encode() + b"\n[10 tokens" in shown
    assert b"Traceback" not in shown


@pytest.mark.slow
def test_the_up_arrow_brings_the_last_message_back(terminal):
    pytest.importorskip("readline", reason="this Python was built without readline")
    it = terminal("--max_new_tokens", 3)
    it.expect(rb"\n(\x1b\[\?2004h)?> ")
    it.say("remember me\r")
    it.expect(rb"\[3 tokens.*> ")
    it.say("\x1b[A")
    it.expect(rb"remember me")
    it.say("\r")
    it.expect(rb"\[3 tokens.*> ")
    it.say("/undo\r")
    it.expect(rb"\[taken back: remember me\].*> ")
    it.say("/undo\r")
    it.expect(rb"\[taken back: remember me\].*> ")  # it was said twice
    it.say("quit\r")
    assert it.process.wait(60) == 0 and b"Traceback" not in it.output
