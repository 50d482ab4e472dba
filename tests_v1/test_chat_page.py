"""chat.html in headless Chromium, on a small server that speaks as chat.py does. pytest -m slow."""

import http.server
import json
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from conftest import ROOT, write_babbler

pytest.importorskip("selenium", reason="selenium is not installed (pip install -r requirements-dev.txt)")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

pytestmark = pytest.mark.slow
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
          "form-action 'none'; frame-ancestors 'none'")
DEFAULTS = {"max_tokens": 512, "temperature": 0.8, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.0, "seed": None}
CHROMIUM = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,800")


class FakeChat(http.server.ThreadingHTTPServer):
    """Answers every message with `pieces`, and before each piece but the first takes one of `allowed` where it is a semaphore: the
    test decides when a reply grows. None as a piece closes the connection without an end, a dict goes out as an event of its own, bytes as
    they are."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pieces, self.finish, self.status, self.key = ["Hello", ", ", "you."], "stop", None, None
        self.health = {"status": "ok", "model": "sft-demo", "running": 0, "waiting": 0, "multi_turn": True, "system_prompt": True,
                       "defaults": DEFAULTS}
        self.received, self.allowed, self.hung_up = [], None, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status, body, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def do_GET(self):
        if self.path == "/":
            return self.answer(200, (ROOT / "chat.html").read_bytes(), "text/html; charset=utf-8")
        return self.answer(200, self.server.health) if self.path == "/healthz" else self.answer(404, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            return self.answer(401, {"error": {"message": "this server wants its API key", "type": "auth", "code": None}})
        self.server.received.append(body)
        if self.server.status:
            return self.answer(self.server.status, {"error": {"message": "the prompt is too long", "type": "x", "code": None}})
        self.answer(200, b"", "text/event-stream")
        try:
            self.stream()
        except (BrokenPipeError, ConnectionResetError):
            self.server.hung_up.set()

    def send(self, event):
        self.wfile.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())

    def choice(self, delta, finish=None):
        self.send({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    def stream(self):
        self.choice({"role": "assistant", "content": ""})
        for i, piece in enumerate(self.server.pieces):
            while i and (allowed := self.server.allowed) and not allowed.acquire(timeout=0.02):
                if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                    raise BrokenPipeError
            if piece is None:
                return
            if isinstance(piece, bytes):
                self.wfile.write(piece)
            else:
                self.send(piece) if isinstance(piece, dict) else self.choice({"content": piece})
        self.choice({}, self.server.finish)
        n = len(self.server.pieces)
        self.send({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": n, "total_tokens": 5 + n}})
        self.send("[DONE]")


class Page:
    """What a user sees and does."""

    def __init__(self, driver):
        self.driver = driver

    def __getattr__(self, name):
        return self.driver.find_element(By.ID, name)

    def js(self, code, *args):
        return self.driver.execute_script(f"return {code}", *args)

    def all(self, selector):
        return [node.get_attribute("textContent") for node in self.driver.find_elements(By.CSS_SELECTOR, selector)]

    def replies(self):
        return self.all(".message.assistant .text")

    def set(self, name, value):
        self.js("arguments[0].closest('details') && (arguments[0].closest('details').open = true)", getattr(self, name))
        getattr(self, name).clear()
        getattr(self, name).send_keys(value)

    def say(self, text, reply="Hello, you."):
        """Sends and waits for the whole reply."""
        n = len(self.replies())
        self.input.send_keys(text + Keys.ENTER)
        until(lambda: len(self.replies()) == n + 1 and self.replies()[-1] == reply and self.idle())

    def idle(self):
        return self.send.is_displayed() and not self.stop.is_displayed()


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("no chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*CHROMIUM, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def server():
    """A port of its own, so an origin with an empty sessionStorage."""
    server = FakeChat()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.allowed = None
    server.shutdown()
    server.server_close()


@pytest.fixture
def page(browser, server):
    """At the end the console must be clean: no exception of the page, nothing that the security policy had to stop."""
    page = opened(browser, server)
    yield page
    wrong = [line["message"] for line in browser.get_log("browser") if "Failed to load resource" not in line["message"]]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert not wrong, wrong


def opened(browser, server):
    browser.get(server.url)
    page = Page(browser)
    until(lambda: page.model.text == server.health["model"])
    return page


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def history(server, n=-1):
    return server.received[n]["messages"]


def test_a_reply_grows_piece_by_piece(page, server):
    server.allowed = threading.Semaphore(0)
    page.input.send_keys("Hi" + Keys.ENTER)
    until(lambda: page.replies() == ["Hello"])
    assert page.stop.is_displayed() and not page.send.is_displayed() and not page.driver.find_elements(By.CSS_SELECTOR, ".message #retry")
    server.allowed.release()
    until(lambda: page.replies() == ["Hello, "])
    server.allowed.release()
    until(lambda: page.replies() == ["Hello, you."] and page.idle())
    assert page.all(".user .text") == ["Hi"] and page.input.get_attribute("value") == ""
    until(lambda: page.spoken.get_attribute("textContent") == "Hello, you.")
    assert [word.split()[-1] for word in page.all(".assistant .stats")[0].split(" · ")] == ["tokens", "tokens/s", "s"]
    assert page.all(".assistant .stats")[0].startswith("3 tokens · ")


def test_an_event_may_come_in_parts_and_with_others(page, server):
    """The cut is within a letter of two bytes."""
    event = 'data: {"choices": [{"index": 0, "delta": {"content": "Zürich"}}]}\r\n\r\n'.encode()
    cut = event.index("ü".encode()) + 1
    server.allowed, server.pieces = threading.Semaphore(0), ["In ", b": a comment\n\n" + event + event[:cut], event[cut:] + event]
    page.input.send_keys("Hi" + Keys.ENTER)
    for reply in ("In ", "In Zürich", "In ZürichZürichZürich"):
        until(lambda: page.replies() == [reply])
        server.allowed.release()
    until(page.idle)


def test_what_a_request_holds(page, server):
    page.say("Hi")
    assert server.received == [{"model": "sft-demo", "messages": [user("Hi")], "stream": True, "stream_options": {"include_usage": True},
                                **{name: value for name, value in DEFAULTS.items() if value is not None}}]


def test_earlier_turns_and_the_system_prompt_are_sent(page, server):
    page.set("system", "Be brief.")
    page.say("One")
    page.say("Two")
    assert history(server) == [{"role": "system", "content": "Be brief."}, user("One"), assistant("Hello, you."), user("Two")]
    page.new.click()
    assert page.all(".message") == []
    page.say("Three")
    assert history(server)[1:] == [user("Three")]


def test_a_model_without_turns_or_system_prompt(browser, server):
    server.health.update(multi_turn=False, system_prompt=False)
    page = opened(browser, server)
    assert page.note.is_displayed()
    page.js("document.getElementById('options').open = true")
    assert page.temperature.is_displayed() and not page.system.is_displayed()
    page.say("One")
    page.say("Two")
    assert history(server) == [user("Two")]


def test_enter_sends_and_shift_enter_or_an_input_method_does_not(page, server):
    page.input.send_keys("one" + Keys.SHIFT + Keys.ENTER + Keys.SHIFT + "two")
    for how in ("isComposing: true", "keyCode: 229"):
        page.js(f"arguments[0].dispatchEvent(new KeyboardEvent('keydown', {{key: 'Enter', cancelable: true, {how}}}))", page.input)
    assert page.all(".message") == [] and page.input.get_attribute("value") == "one\ntwo"
    page.say("")
    assert history(server) == [user("one\ntwo")]
    page.input.send_keys("  " + Keys.ENTER)
    assert len(page.all(".user")) == 1


def test_stop_hangs_up_and_keeps_what_has_come(page, server):
    server.allowed = threading.Semaphore(1)
    page.input.send_keys("Hi" + Keys.ENTER)
    until(lambda: page.replies() == ["Hello, "])
    page.input.send_keys("next")
    page.stop.click()
    until(server.hung_up.is_set)
    until(page.idle)
    assert page.replies() == ["Hello, "] and page.all(".assistant .stats")[0].startswith("about 2 tokens")
    assert page.all(".assistant .stats")[0].endswith("stopped") and page.all(".error") == ["", ""]
    server.allowed = None
    page.say("")
    assert history(server) == [user("Hi"), assistant("Hello, "), user("next")]


def test_new_conversation_hangs_up(page, server):
    server.allowed = threading.Semaphore(0)
    page.input.send_keys("Hi" + Keys.ENTER)
    until(lambda: page.replies() == ["Hello"])
    page.new.click()
    until(server.hung_up.is_set)
    assert page.all(".message") == [] and page.idle() and page.spoken.get_attribute("textContent") == ""


def test_retry_sends_the_same_history_without_the_last_reply(page, server):
    page.say("One")
    page.say("Two")
    server.pieces = ["Better."]
    page.retry.click()
    until(lambda: page.replies() == ["Hello, you.", "Better."] and page.idle())
    assert history(server, 1) == history(server, 2) == [user("One"), assistant("Hello, you."), user("Two")]
    page.say("Three", "Better.")
    assert history(server)[2:] == [user("Two"), assistant("Better."), user("Three")]


def test_undo_takes_the_last_turn_back_into_the_field(page, server):
    page.say("One")
    page.say("Two")
    page.undo.click()
    assert page.all(".text") == ["One", "Hello, you."] and page.input.get_attribute("value") == "Two"
    page.say(", please")
    assert history(server) == [user("One"), assistant("Hello, you."), user("Two, please")]
    page.input.send_keys("a draft")
    page.undo.click()
    assert page.input.get_attribute("value") == "Two, please\na draft"
    page.undo.click()
    assert page.all(".message") == [] and page.input.get_attribute("value") == "One\nTwo, please\na draft"


def test_sampling_options_reach_the_server(page, server):
    assert page.temperature.get_attribute("value") == "0.8" and page.seed.get_attribute("value") == ""
    chosen = {"temperature": 0.33, "top_p": 0.5, "top_k": 40, "repetition_penalty": 1.2, "max_tokens": 7, "seed": 3}
    for name, value in chosen.items():
        page.set(name, str(value))
    page.say("Hi")
    assert {name: server.received[-1][name] for name in chosen} == chosen
    page.temperature.clear()
    page.seed.clear()
    page.retry.click()
    until(lambda: len(server.received) == 2 and page.idle())
    assert not {"temperature", "seed"} & set(server.received[-1])
    page.set("top_p", "2")
    page.input.send_keys("kept" + Keys.ENTER)
    assert page.input.get_attribute("value") == "kept" and len(server.received) == 2


def test_a_cut_reply_says_so(page, server):
    server.finish = "length"
    page.say("Hi")
    assert page.all(".assistant .stats")[0].endswith("cut at max_tokens")


def test_the_key_is_asked_for_and_used(page, server):
    assert not page.key.is_displayed()
    server.key = "secret"
    page.input.send_keys("Hi" + Keys.ENTER)
    until(lambda: page.key.is_displayed() and page.all(".assistant .error") == ["this server wants its API key"])
    page.key.send_keys("wrong" + Keys.ENTER)
    until(lambda: page.key.is_displayed() and page.idle())
    page.set("key", "secret" + Keys.ENTER)
    until(lambda: page.replies() == ["Hello, you."] and page.idle())
    assert not page.key.is_displayed() and page.all(".error") == ["", ""] and history(server) == [user("Hi")]
    assert page.js("[Object.values({...sessionStorage}).includes('secret'), localStorage.length, document.cookie]") == [True, 0, ""]


@pytest.mark.parametrize("case", ["refused", "in the stream", "cut off", "gone"])
def test_an_error_stands_in_its_place_and_nothing_typed_is_lost(case, page, server):
    page.say("One")
    what = {"refused": "the prompt is too long", "in the stream": "out of memory", "cut off": "closed before", "gone": "Is the server still running"}
    if case == "refused":
        server.status = 400
    elif case == "gone":
        server.shutdown()
        server.server_close()
    else:
        server.pieces = ["Par", {"error": {"message": "out of memory"}} if case == "in the stream" else None]
    page.input.send_keys("Two" + Keys.ENTER)
    until(lambda: what[case] in page.all(".assistant .error")[-1] and page.idle())
    assert page.all(".user .text") == ["One", "Two"] and page.replies()[-1] == ("" if case in ("refused", "gone") else "Par")
    if case == "gone":
        page.undo.click()
        assert page.input.get_attribute("value") == "Two"
        return
    server.status, server.pieces = None, ["Good."]
    page.retry.click()
    until(lambda: page.replies() == ["Hello, you.", "Good."] and page.idle())
    assert page.all(".error") == [""] * 4 and history(server) == [user("One"), assistant("Hello, you."), user("Two")]


def test_a_turn_that_failed_is_left_out_of_later_ones(page, server):
    server.status = 500
    page.input.send_keys("One" + Keys.ENTER)
    until(lambda: page.all(".assistant .error") == ["the prompt is too long"] and page.idle())
    assert "leave this one out" in page.all(".assistant .stats")[0]
    server.status = None
    page.say("Two")
    assert history(server) == [user("Two")]


def test_a_server_that_has_started_again_with_another_model_is_met_by_a_retry(page, server):
    server.status, server.health["model"] = 404, "next"
    page.input.send_keys("One" + Keys.ENTER)
    until(lambda: page.all(".assistant .error") == ["the prompt is too long"] and page.idle())
    server.status = None
    page.retry.click()
    until(lambda: page.replies() == ["Hello, you."] and page.idle())
    assert [body["model"] for body in server.received] == ["sft-demo", "next"] and page.model.text == "next"


def test_model_text_is_shown_and_never_run(page, server):
    evil = "<img src=x onerror=\"window.hit=1\"> <script>window.hit=1</script>\n\t<b>two  spaces</b> &amp;"
    server.pieces = [evil[:5], evil[5:]]
    page.say(evil.replace("\t", ""), evil)
    assert page.js("[window.hit === undefined, document.querySelectorAll('.message img, .message script, .message b').length]") == [True, 0]
    assert page.js("getComputedStyle(document.querySelector('.assistant .text div')).whiteSpace").startswith("pre-wrap")


def test_fences_become_code_blocks(page, server):
    server.pieces = ["So:\n``", "`py\nif x:\n", "    <b>\n", "```", "\nDone.\n```\nopen"]
    page.say("Hi", "So:if x:\n    <b>Done.open")
    assert page.all(".assistant .text > *") == ["So:", "if x:\n    <b>", "Done.", "open"]
    assert page.all(".assistant .text > pre") == ["if x:\n    <b>", "open"]
    server.pieces = ["```one line```\n", "``` two\n"]
    page.say("Hi", "```one line```\n``` two\n")


def test_copy_takes_the_text_as_the_model_wrote_it(page, server):
    server.pieces = ["a\n```\nb  c\n```\n"]
    page.say("Hi", "ab  c")
    page.driver.find_element(By.CSS_SELECTOR, ".assistant .copy").click()
    page.input.send_keys(Keys.CONTROL + "v")
    assert page.input.get_attribute("value") == "a\n```\nb  c\n```\n"


def test_a_reload_keeps_conversation_and_draft(page, server):
    page.say("One")
    page.input.send_keys("draft")
    page.driver.refresh()
    until(lambda: page.replies() == ["Hello, you."] and page.input.get_attribute("value") == "draft")
    page.say("", "Hello, you.")
    assert history(server) == [user("One"), assistant("Hello, you."), user("draft")]


def test_the_view_follows_only_a_reader_who_is_at_the_end(page, server):
    server.allowed, server.pieces = threading.Semaphore(0), ["line\n" * 100, "line\n" * 100, "line\n" * 100]
    page.input.send_keys("Hi" + Keys.ENTER)
    until(lambda: page.replies() == ["line\n" * 100])
    place = "[s = document.getElementById('scroller'), s.scrollTop, s.scrollHeight - s.scrollTop - s.clientHeight].slice(1)"
    assert page.js(place)[0] > 1000 and page.js(place)[1] < 2
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 1280, "height": 400, "deviceScaleFactor": 1, "mobile": False})
    until(lambda: page.js("innerHeight") == 400 and page.js(place)[1] < 2)  # as if a phone's keyboard had come up
    page.js("document.getElementById('scroller').scrollTop = 100")
    server.allowed.release(9)
    until(lambda: page.replies() == ["line\n" * 300] and page.idle())
    assert page.js(place)[0] == 100


LUMINANCE = """
const parse = c => { const [r, g, b, a = 1] = c.match(/[\\d.]+/g).map(Number); return {rgb: [r, g, b], a}; };
const light = c => c.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
const ground = node => { for (; node; node = node.parentElement) { const c = parse(getComputedStyle(node).backgroundColor); if (c.a) return c.rgb; } };
return [...document.querySelectorAll(arguments[0])].filter(n => n.offsetParent && n.textContent.trim()).map(n => {
  const [a, b] = [light(parse(getComputedStyle(n).color).rgb), light(ground(n))].sort((x, y) => y - x);
  return [n.id || n.className || n.tagName, (a + .05) / (b + .05)]; });
"""


def test_light_and_dark_differ_and_both_can_be_read(page, server):
    page.say("Hi")
    server.pieces = ["```\ncode", {"error": {"message": "out of memory"}}]
    page.input.send_keys("Two" + Keys.ENTER)
    until(lambda: page.all(".assistant .error")[-1] == "out of memory" and page.idle())
    page.js("document.getElementById('options').open = true")
    grounds = set()
    for scheme in ("light", "dark"):
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        grounds.add(page.js("getComputedStyle(document.body).backgroundColor"))
        ratios = page.driver.execute_script(LUMINANCE, "h1, summary, button, label, small, .text div, .text pre, .stats, .error")
        assert len(ratios) > 15 and min(ratio for _, ratio in ratios) >= 4.5, (scheme, sorted(ratios, key=lambda r: r[1])[:5])
    assert len(grounds) == 2


def test_every_control_has_a_name_and_the_keyboard_reaches_it(page, server):
    page.say("Hi")
    page.js("document.getElementById('options').open = true")
    page.input.send_keys("x")
    assert [node.accessible_name for node in page.driver.find_elements(By.TAG_NAME, "article")] == ["Your message", "Reply"]
    reached, names = set(), []
    page.driver.execute_script("document.body.tabIndex = -1; document.body.focus()")
    for _ in range(20):
        webdriver.ActionChains(page.driver).send_keys(Keys.TAB).perform()
        focused = page.driver.switch_to.active_element
        reached.add(focused.get_attribute("id") or focused.get_attribute("className") or focused.tag_name)
        names.append((focused.tag_name, focused.accessible_name))
    assert reached >= {"new", "summary", "system", *DEFAULTS, "copy", "undo", "retry", "input", "send"}
    assert all(name for tag, name in names if tag in ("button", "input", "textarea")), names


def test_a_phone_shows_everything_without_scrolling_sideways(page, server):
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 375, "height": 700, "deviceScaleFactor": 2, "mobile": True})
    server.pieces = ["w" * 300, "\n```\n" + "code " * 60 + "\n```\n"]
    page.say("u" * 200, "w" * 300 + "code " * 60)
    for state in ("false", "true"):
        page.js(f"document.getElementById('options').open = {state}")
        assert page.js("[innerWidth, document.documentElement.scrollWidth]") == [375, 375]
        wide = page.js("[...document.querySelectorAll('body *')].filter(n => n.checkVisibility() && n.getBoundingClientRect().right > 375.5)"
                       ".map(n => n.outerHTML.slice(0, 80))")
        assert wide == [] and page.js("document.getElementById('scroller').scrollWidth") <= 375
    assert page.js("[...document.querySelectorAll('input, textarea')].map(n => getComputedStyle(n).fontSize)") == ["16px"] * 9
    assert page.js("document.querySelector('footer').getBoundingClientRect().bottom") == 700


def test_the_page_is_one_file(page, server):
    page.say("Hi")
    fetched = page.js("performance.getEntriesByType('resource').map(e => e.name)")
    assert set(fetched) <= {server.url + path for path in ("healthz", "v1/chat/completions")}


def test_the_page_and_chat_py_understand_each_other(browser, tmp_path):
    """The real server with a small random model: a reply streams in, Stop frees its row, the rate and a refusal are shown."""
    write_babbler(tmp_path / "tiny", 8192)
    log = tmp_path / "log"
    with open(log, "w") as out:
        process = subprocess.Popen([sys.executable, ROOT / "chat.py", "--model_path", tmp_path / "tiny", "--serve", "0", "--max_new_tokens", "8000"],
                                   stdout=out, stderr=out)
    try:
        until(lambda: process.poll() is None and "http://" in log.read_text(), 60)
        url = re.search(r"http://\S+", log.read_text())[0]
        browser.get(url)
        page = Page(browser)
        until(lambda: page.model.text == "tiny")
        page.input.send_keys("the cat" + Keys.ENTER)
        text = lambda: page.js("document.querySelector('.assistant .text')?.textContent ?? ''")  # noqa: E731  as it is, blanks too
        until(lambda: len(text()) > 20)
        first = text()
        until(lambda: len(text()) > len(first))
        assert text().startswith(first)
        page.stop.click()
        until(lambda: page.idle() and json.loads(urllib.request.urlopen(url + "/healthz").read())["running"] == 0)
        assert "tokens/s" in page.all(".assistant .stats")[0]
        page.input.send_keys("a book <|im_end|>" + Keys.ENTER)
        until(lambda: any("special token" in error for error in page.all(".error")))
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
