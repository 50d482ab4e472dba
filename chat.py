"""Talk to a model: in the terminal, through files, or as a server with OpenAI's API and a page.

    {"prompt": "Add one to 41."}       {"messages": [{"role": "user", "content": "Hi"}]}
    {"text": "is continued as it is"}

    python chat.py                                         # the newest run under models/
    python chat.py --model_path sft-demo --temperature 0
    python chat.py --model_path sft-demo --input prompts.jsonl --output replies.jsonl
    python chat.py --model_path sft-demo --serve 8000      # http://127.0.0.1:8000

--model_path is what the trainers write (a run, a checkpoint-<step>, an adapter folder), a Hugging
Face folder or a hub id. A model sees the ids that it was trained on: the tokenizer has the chat
template, and what was trained without one reads a single message. docs/chat.md explains the API.

One thread, the engine, writes all replies together, a token of each in a step.
Shapes: B replies, V vocabulary.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hmac
import http.server
import json
import os
import pathlib
import queue
import secrets
import select
import signal
import socket
import sys
import threading
import time

import common  # first: it prepares the import of DeepSpeed

# isort: split
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

import decoding
from common import log

FLAGS = {
    "model_path": ("", "run, checkpoint, adapter or hub id"),
    "max_new_tokens": (512, "longest reply"),
    "temperature": (0.8, "of sampling; <= 0.001 is greedy"),
    "top_p": (0.9, "the likeliest tokens of this mass; 1: off"),
    "top_k": (0, "so many likeliest tokens; 0: off"),
    "do_sample": ("true", "false: greedy", "true", "false"),
    "seed": (0, "of sampling"),
    "mount_dir": ("", "where models/ is; else ./mount or ."),
    "dtype": ("auto", "fp32, bf16 or fp16; auto: bf16 where the GPU has it"),
    "quantize": ("", "by bitsandbytes; else as trained", "nf4", "int8"),
    "format": (
        "auto",
        "how a conversation becomes text; auto: as trained",
        *("auto", "template", "raw", "turns", "v2"),
    ),
    "system_prefix": ("", "system turn of every conversation"),
    "bot_name": ("Assistant", "on the screen and in --format turns"),
    "input": ("", "file of prompts: .jsonl, .json, .gz"),
    "output": ("", "file of replies: JSON lines"),
    "serve": (-1, "port of a server; 0: any free one"),
    "host": ("127.0.0.1", "others need an --api_key"),
    "api_key": ("", "of clients; else CHAT_API_KEY"),
    "max_batch": (32, "replies that are written together"),
}
FORMATS = {  # chat templates for models whose tokenizer has none
    "turns": """
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{ message.content + '\n\n' }}
    {%- else -%}
        {{ ('User: ' if message.role == 'user' else {bot} + ' ') + message.content | trim + '\n' }}
    {%- endif -%}
{%- endfor -%}
{{ {bot} if add_generation_prompt }}""",
    # of Open-Assistant's first models
    "v2": """
{%- set names = {'system': '<prefix>', 'user': '<human>', 'assistant': '<bot>'} -%}
{%- for message in messages -%}
    {{ names[message.role] + message.content + ('</prefix>' if message.role == 'system' else '') }}
{%- endfor -%}
{{ '<bot>' if add_generation_prompt }}""",
}
FORMAT_STOPS = {"turns": ["\nUser:"], "v2": ["<human>"]}
RANGES = {  # of what /set and the API change: type, smallest, largest
    "temperature": (float, 0, 100),
    "top_p": (float, 0, 1),
    "top_k": (int, -1, 2**31),
    "max_new_tokens": (int, 1, 2**31),
}
API_KNOWN = {
    *("messages", "stream", "stream_options", "stop", "seed"),
    *("temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens"),
    # change nothing
    *("model", "user", "metadata", "store", "service_tier", "prompt_cache_key"),
    *("safety_identifier", "parallel_tool_calls"),
}
API_OFF = {  # values with which a name changes nothing
    "n": [1],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "logprobs": [False],
    "suffix": [""],
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "repetition_penalty": [1],
    "min_p": [0],
}
UNLIMITED = 8192  # tokens that a model without a limit of positions may read
MAX_READ = 8192  # tokens of prompts that are read in one step, while running replies wait
MAX_BODY = 2**21  # bytes of a request
LOOPBACK = ("127.0.0.1", "localhost")

# --------------------------------------------------------------------------------------- prompts


class Prompts(common.Prompts):
    """Conversations and records as the ids that training made of them. Raises ValueError."""

    def __init__(self, args, config, tokenizer, about):
        """about: of the run's rawtune.json, or {}."""
        self.is_encoder_decoder = config.is_encoder_decoder
        n_positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.n_positions = n_positions or UNLIMITED
        self.format = args.format
        if self.format == "auto":
            self.format = self.trained_format(tokenizer, about)
        if self.format in FORMATS:
            name = json.dumps(f"{args.bot_name}:")
            tokenizer.chat_template = FORMATS[self.format].replace("{bot}", name)
        super().__init__(tokenizer, is_raw=self.format != "template")
        self.stop = FORMAT_STOPS.get(self.format, [])
        self.stop_ids += about.get("stop_ids", [])
        self.has_turns = self.format != "raw"
        self.system = args.system_prefix

    def trained_format(self, tokenizer, about):
        if about.get("raw_prompt") or "record_layout" in about:
            return "raw"
        if tokenizer.chat_template:
            return "template"
        return "raw" if self.is_encoder_decoder else "turns"

    def raw_ids(self, text):
        """Of text as it is: what an encoder reads ends with its end token."""
        if self.is_encoder_decoder:
            return self.tokenizer(text).input_ids
        return self.begin + self.tokenizer(text, add_special_tokens=False).input_ids

    def ids(self, record):
        """Of a conversation, or a body of OpenAI's API, that the assistant goes on with."""
        messages = self.messages(record)
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            raise ValueError("the last message must be the user's")
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        for message in messages:
            if message["role"] == "assistant":  # may have written special tokens
                message["content"] = self.special.sub("", message["content"])
        if not self.has_turns:
            if len(messages) > 1:
                raise ValueError("this model reads one message, without turns")
            return self.raw_ids(messages[0]["content"])
        text = self.render(messages, reply_follows=True)
        if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
            raise ValueError("the chat template leaves out the system turn")
        if self.is_raw:  # a template of ours
            return self.raw_ids(text)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def record_ids(self, record):
        """Of a record of --input, by the keys that the trainers know."""
        if "messages" in record or "conversations" in record:
            messages = self.messages(record)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()  # what training would have learned
            return self.ids({"messages": messages})
        name = "text" if "text" in record else "prompt"
        text = record.get(name)
        problem = common.text_problem(text, name, record)
        if problem:
            raise ValueError(problem)
        if name == "text":
            return self.raw_ids(text)
        return self.ids({"messages": [{"role": "user", "content": text}]})


@dataclasses.dataclass
class Request:
    """A reply to write. It arrives in pieces as (text, finish reason or None)."""

    prompt_ids: list
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop: list  # strings that end the reply
    seed: int  # of the noise of this reply
    pieces: queue.SimpleQueue = dataclasses.field(default_factory=queue.SimpleQueue, repr=False)
    ids: list = dataclasses.field(default_factory=list)  # of the reply so far
    text: str = ""  # the part of it that is in pieces
    generator: torch.Generator = None  # of the noise; None: greedy
    is_over: bool = False  # finished, or nobody waits for it

    def wait(self, check=None):
        """The pieces until the reply is over. check: called all the while. Raises RuntimeError
        where the engine failed."""
        finish_reason = None
        while finish_reason is None:
            if check:
                check()
            with contextlib.suppress(queue.Empty):
                text, finish_reason = self.pieces.get(timeout=0.5)
                if finish_reason == "error":
                    raise RuntimeError(text)
                yield text, finish_reason

    def usage(self):
        return {
            "prompt_tokens": len(self.prompt_ids),
            "completion_tokens": len(self.ids),
            "total_tokens": len(self.prompt_ids + self.ids),
        }


def check_number(name, value, limits):
    kind, lowest, highest = limits
    is_number = type(value) in (int, kind)  # neither true nor a text
    if not is_number or not lowest <= value <= highest:
        raise ValueError(f"{name} {value!r}: expected a number from {lowest} to {highest}")
    return value


def new_request(prompts, prompt_ids, settings, seed, stop=()):
    """settings: of the names in RANGES. Raises ValueError where the prompt is too long."""
    room = prompts.n_positions - len(prompt_ids)
    if prompts.is_encoder_decoder and room >= 0:
        room = prompts.n_positions  # the decoder's are its own
    if room < 1:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens, and the model {prompts.n_positions} "
            "positions for prompt and reply: shorten it"
        )
    settings = {**settings, "max_new_tokens": min(settings["max_new_tokens"], room)}
    return Request(prompt_ids, **settings, stop=[*prompts.stop, *stop], seed=seed)


# ----------------------------------------------------------------------------------------- engine


def choose(logits, requests):
    """The next token of each request, (B,), of logits (B, V)."""
    scores = []
    for i, request in enumerate(requests):
        row = logits[i : i + 1]
        if request.generator:
            row = row / request.temperature
            if request.top_k > 0:
                row = TopKLogitsWarper(request.top_k)(None, row)
            if request.top_p < 1:
                row = TopPLogitsWarper(request.top_p)(None, row)
        scores.append(row)
    generators = [request.generator for request in requests]
    return decoding.choose(torch.cat(scores), generators)


class Engine(threading.Thread):
    """Writes all requested replies together. Requests join between two steps, and leave when their
    reply is over."""

    def __init__(self, model, args, prompts):
        super().__init__(daemon=True)
        self.model = model
        self.args = args
        self.prompts = prompts
        self.waiting = queue.SimpleQueue()
        self.reset()

    def reset(self):
        self.decoding = decoding.Decoding(self.model)
        self.requests = []  # of each row of the decoding
        self.tokens = None  # (B,), the last one of each row

    @torch.inference_mode()
    def run(self):
        while True:
            try:
                self.step()
            except Exception as error:  # such as out of memory: only these replies end
                message = f"{type(error).__name__}: {error}; a smaller --max_batch?"
                common.print_error(message)
                for request in self.requests:
                    request.pieces.put((message, "error"))
                self.reset()

    def take_waiting(self):
        """The requests that join now. Blocks while there is nothing to do."""
        n_free = self.args.max_batch - len(self.requests)
        if not self.decoding.can_join and self.requests:
            n_free = 0
        joining = []
        n_read = 0
        while len(joining) < n_free and n_read < MAX_READ:
            if self.waiting.empty() and (self.requests or joining):
                break
            request = self.waiting.get()
            if not request.is_over:
                joining.append(request)
                n_read += len(request.prompt_ids)
                if request.temperature > decoding.GREEDY:
                    generator = torch.Generator(self.model.device)
                    request.generator = generator.manual_seed(request.seed)
        joining.sort(key=lambda request: -len(request.prompt_ids))
        return joining

    def step(self):
        """The next token of every running reply, and the first one of those that join."""
        joining = self.take_waiting()
        n_running = len(self.requests)
        self.requests += joining
        logits = []
        if n_running:
            logits.append(self.decoding.step(self.tokens[:, None]))
        waiting = [request.prompt_ids for request in joining]  # the longest first
        while waiting:
            n = max(1, MAX_READ // len(waiting[0]))
            logits.append(self.decoding.read(waiting[:n]))
            waiting = waiting[n:]
        self.tokens = choose(torch.cat(logits), self.requests)
        for request, token in zip(self.requests, self.tokens.tolist()):
            self.add_token(request, token)
        kept = [i for i, request in enumerate(self.requests) if not request.is_over]
        if len(kept) < len(self.requests):
            self.requests = [self.requests[i] for i in kept]
            kept = torch.tensor(kept, dtype=torch.long, device=self.tokens.device)
            self.decoding.keep(kept)
            self.tokens = self.tokens[kept]

    def add_token(self, request, token):
        """Append a token to a reply, and pass on the text that is certain by now."""
        request.ids.append(token)
        finish_reason = None
        if token in self.prompts.stop_ids:
            finish_reason = "stop"
        elif len(request.ids) == request.max_new_tokens:
            finish_reason = "length"
        text = self.prompts.decode(request.ids)  # all of it: a character may be several tokens
        for ending in request.stop:
            before, found, _ = text.partition(ending)
            if found:
                text = before
                finish_reason = "stop"
        if not finish_reason:  # what the next tokens may change is held back
            text = text.rstrip("\ufffd")  # the first bytes of a character
            n_held = max(map(len, request.stop), default=1) - 1
            text = text[: max(0, len(text) - n_held)]
        piece = text[len(request.text) :]
        request.text = text
        if piece or finish_reason:
            request.pieces.put((piece, finish_reason))
        if finish_reason:
            request.is_over = True  # which another thread may set too


# --------------------------------------------------------------------------------------- terminal


def change_setting(settings, name, text):
    """Of /set."""
    if name not in RANGES:
        raise ValueError(f"expected one of {', '.join(RANGES)}")
    kind = RANGES[name][0]
    settings[name] = check_number(name, kind(text), RANGES[name])


def print_reply(request):
    """Piece by piece; returns it. Ctrl-C stops it."""
    reply = ""
    try:
        for text, finish_reason in request.wait():
            reply += text
            print(text, end=" [cut]" if finish_reason == "length" else "", flush=True)
    except KeyboardInterrupt:
        request.is_over = True
    print()
    return reply


def talk(engine):
    """A conversation on standard input and output. Piped: a line is a message."""
    args = engine.args
    prompts = engine.prompts
    is_interactive = sys.stdin.isatty()
    if is_interactive:
        import readline  # noqa: F401, lets input() edit lines
    settings = args.settings
    messages = []
    while True:
        try:
            line = input("> " if is_interactive else "").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        try:
            if command in ("quit", "exit"):
                return
            elif command in ("/reset", "!reset"):
                messages = []
            elif command == "/system":
                prompts.system = rest
            elif command == "/set":
                name, _, value = rest.partition(" ")
                change_setting(settings, name, value)
            elif command.startswith("/"):
                raise ValueError(
                    "/reset, /system TEXT, /set NAME VALUE, quit; Ctrl-C stops a reply"
                )
            elif line:
                if not prompts.has_turns:
                    messages = []
                asked = [*messages, {"role": "user", "content": line}]
                prompt_ids = prompts.ids({"messages": asked})
                seed = common.derive_seed(args.seed, "terminal", len(asked))
                request = new_request(prompts, prompt_ids, settings, seed)
                engine.waiting.put(request)
                if is_interactive:
                    print(f"{args.bot_name}: ", end="", flush=True)
                reply = print_reply(request)
                if reply.strip():  # an empty one was not said
                    messages = [*asked, {"role": "assistant", "content": reply}]
        except (ValueError, RuntimeError) as error:
            print(f"[{error}]", file=sys.stderr)


# ------------------------------------------------------------------------------------------ files


def read_requests(args, prompts, problems):
    """[(record, Request)] of --input."""
    found = []
    for where, _, record in common.read_records(pathlib.Path(args.input), problems):
        try:
            seed = common.derive_seed(args.seed, "file", len(found))
            prompt_ids = prompts.record_ids(record)
            found.append((record, new_request(prompts, prompt_ids, args.settings, seed)))
        except ValueError as error:
            problems.append((where, str(error)))
    if not found and not problems:
        problems.append("--input: no prompts in it")
    return found


def open_output(path, command):
    """(file, number of rows) of the unfinished output, which is locked and may be new."""
    part = f"{path}.part"
    try:
        # half characters of a record are written as \\udc80
        file = open(part, "a+", encoding="utf-8", errors="backslashreplace")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
    except OSError as error:
        common.fail(f"{part}: {error}: is another process writing it?")
    file.seek(0)
    lines = [line for line in file if line.endswith("\n")]  # a kill may have cut the last one
    file.truncate(len("".join(lines).encode()))
    if {json.loads(line)["command"] for line in lines} - {command}:
        common.fail(f"{part} was begun with other flags, prompts or weights: move it away")
    return file, len(lines)


def answer_file(engine, found, file, n_done, command):
    """Append replies, in the order of the prompts."""
    rest = found[n_done:]
    for _, request in rest:
        engine.waiting.put(request)
    for i, (record, request) in enumerate(common.progress(rest, "replies")):
        *_, (_, finish_reason) = request.wait()
        row = {
            "row": n_done + i,
            "replies": [request.text],
            "finish_reasons": [finish_reason],
            "orig_d": record,
            "command": command,
        }
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
    os.rename(file.name, engine.args.output)
    log(f"{engine.args.output}: replies to {len(found)} prompts")


# ----------------------------------------------------------------------------------------- server


class Refusal(Exception):
    """Its arguments are an HTTP status and a message."""


def join_parts(parts):
    """The text of a message that comes as a list of parts."""
    texts = []
    for part in parts:
        if part["type"] != "text":
            raise ValueError(f"content of type {part['type']!r} is not supported, only text")
        texts.append(part["text"])
    return "".join(texts)


def parse_body(args, prompts, body):
    """The Request of a JSON body. What would change the reply is never left out in silence."""
    for name, value in body.items():
        is_known = name in API_KNOWN or value is None
        if not is_known and value not in API_OFF.get(name, []):
            raise ValueError(f"{name!r} is not supported: leave it out")
    for message in body.get("messages") or []:
        if isinstance(message.get("content"), list):
            message["content"] = join_parts(message["content"])
    prompt_ids = prompts.ids(body)
    settings = {**args.settings}
    for key in ("temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens"):
        if body.get(key) is not None:
            name = "max_new_tokens" if key.startswith("max") else key
            settings[name] = check_number(key, body[key], RANGES[name])
    seed = body.get("seed")
    if seed is None:
        seed = secrets.randbits(62)
    stop = body.get("stop") or []
    if isinstance(stop, str):
        stop = [stop]
    stop = [str(text) for text in stop if text]
    return new_request(prompts, prompt_ids, settings, common.derive_seed("server", seed), stop)


def error_of(message):
    return {"error": {"message": message, "type": "error"}}


class Handler(http.server.BaseHTTPRequestHandler):
    """A connection, which has one request. Its thread only waits and writes."""

    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds for a piece of a body, or to take a piece of a reply

    def log_message(self, *args):
        pass

    def send_head(self, status, content_type):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Connection", "close")  # which ends the body
        self.end_headers()

    def send_json(self, status, value):
        self.send_head(status, "application/json")
        self.wfile.write(json.dumps(value).encode())

    def refuse(self, status, message):
        self.send_json(status, error_of(message))
        # a connection that closes on unread bytes is reset, and the client would not see why
        self.connection.shutdown(socket.SHUT_WR)
        for _ in range(10_000):  # but not for ever
            if not self.rfile.read1(2**16):
                break

    def handle(self):
        with contextlib.suppress(OSError):  # the client has left
            super().handle()

    def answer(self):
        try:
            self.respond()
        except Refusal as refusal:
            self.refuse(*refusal.args)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            self.refuse(400, str(error))
        except RuntimeError as error:
            self.refuse(500, str(error))

    do_GET = do_POST = answer

    def respond(self):
        name = self.server.name
        path = self.path.partition("?")[0]
        if path == "/":
            self.send_head(200, "text/html; charset=utf-8")
            self.wfile.write((common.HERE / "chat.html").read_bytes())
            return
        self.check_access()
        has_turns = self.server.engine.prompts.has_turns  # for the page
        model = {"id": name, "object": "model", "has_turns": has_turns}
        readable = {
            "/healthz": model,
            "/v1/models": {"object": "list", "data": [model]},
            f"/v1/models/{name}": model,
        }
        if self.command == "GET" and path in readable:
            self.send_json(200, readable[path])
        elif self.command == "POST" and path == "/v1/chat/completions":
            self.complete()
        else:
            raise Refusal(404, f"{self.command} {path}: no such endpoint")

    def check_access(self):
        """By the API key; without one, by the name under which the server was addressed."""
        api_key = self.server.engine.args.api_key
        if api_key:
            given = self.headers.get("Authorization", "").encode()
            # in constant time, so that a key cannot be guessed letter by letter
            if not hmac.compare_digest(given, f"Bearer {api_key}".encode()):
                raise Refusal(401, "wrong or missing API key")
            return
        # a page of another site can point its own name here (DNS rebinding)
        host = self.headers.get("Host", "").partition(":")[0]
        if host not in LOOPBACK:
            raise Refusal(403, f"{host!r}: this server answers to localhost only")

    def read_body(self):
        # a form on another site can post here, but not JSON
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "expected Content-Type: application/json")
        if "Transfer-Encoding" not in self.headers:
            return self.read_bytes(int(self.headers.get("Content-Length", 0)))
        body = bytearray()  # in chunks (RFC 9112, section 7.1)
        while True:
            n_bytes = int(self.rfile.readline(100).partition(b";")[0], 16)
            body += self.read_bytes(n_bytes, len(body))
            self.rfile.readline(100)
            if not n_bytes:
                return body

    def read_bytes(self, n_bytes, n_before=0):
        if not 0 <= n_bytes <= MAX_BODY - n_before:
            raise Refusal(413, f"a body may have {MAX_BODY} bytes")
        return self.rfile.read(n_bytes)

    def check_client(self):
        poll = select.poll()  # select.select() knows 1024 files only
        poll.register(self.connection, select.POLLIN)
        if poll.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError("the client has left")

    def complete(self):
        engine = self.server.engine
        body = json.loads(self.read_body())
        request = parse_body(engine.args, engine.prompts, body)
        has_usage = (body.get("stream_options") or {}).get("include_usage")
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.server.name,
        }
        engine.waiting.put(request)
        try:
            if body.get("stream"):
                self.stream(request, head, has_usage)
            else:
                self.send_reply(request, head)
        finally:
            request.is_over = True  # a client that leaves frees its row

    def send_reply(self, request, head):
        *_, (_, finish_reason) = request.wait(self.check_client)
        message = {"role": "assistant", "content": request.text}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        head.update(object="chat.completion", choices=[choice], usage=request.usage())
        self.send_json(200, head)

    def send_event(self, event):
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def stream(self, request, head, has_usage):
        """Server-sent events: a chunk for each piece, and an end mark."""
        head["object"] = "chat.completion.chunk"
        self.send_head(200, "text/event-stream")
        role = {"role": "assistant"}
        try:
            for text, finish_reason in request.wait(self.check_client):
                delta = {**role, "content": text}
                choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
                self.send_event({**head, "choices": [choice]})
                role = {}
        except RuntimeError as error:  # too late for a status
            self.send_event(error_of(str(error)))
            return
        if has_usage:
            self.send_event({**head, "choices": [], "usage": request.usage()})
        self.wfile.write(b"data: [DONE]\n\n")


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 512  # connections that come at once


def serve(engine, name):
    args = engine.args
    try:
        server = Server((args.host, args.serve), Handler)
    except (OSError, OverflowError) as error:
        common.fail(f"--serve {args.serve}: {error}")
    server.engine = engine
    server.name = name
    log(f"http://{args.host}:{server.server_port} (Ctrl-C ends it)")
    server.serve_forever()


# ------------------------------------------------------------------------------------------- main


def check_args(args, problems):
    if bool(args.input) != bool(args.output):
        problems.append("--input and --output go together")
    if os.path.exists(args.output):
        problems.append(f"--output {args.output} exists: choose another")
    if args.host not in LOOPBACK and not args.api_key:
        problems.append(f"--host {args.host} opens the model to the network: add an --api_key")


def find_model(args, problems):
    """The path or hub id of --model_path; without it that of the newest run."""
    name = args.model_path
    owner = name.partition("/")[0]
    if "/" in name and not os.path.exists(owner):
        return name  # a hub id, or a whole path
    if name:
        return str(common.find_input(args, "models", name, [], problems) or "")
    models = common.mount(args) / "models"
    for path in sorted(models.glob(f"*/{common.COMPLETE}"), key=os.path.getmtime, reverse=True):
        if common.read_about(path.parent).get("script") != "clf.py":
            return str(path.parent)
    problems.append(f"no finished run in {models}: --model_path")
    return ""


def prepare(args):
    """All that can be wrong, found and reported together before any weight is loaded."""
    problems = []
    check_args(args, problems)
    # what the trainers' flags say where common.py loads a model
    flags = {name: spec[0] for name, spec in common.SHARED_FLAGS.items()}
    # serve=0: its -1 would count as a mistake
    flags.update(vars(args), serve=0, no_train=True, precision=args.dtype)
    load_args = argparse.Namespace(**flags)
    load_args.model_init_path = find_model(args, problems)
    source, config, tokenizer = common.open_model(load_args, problems)
    if not source:
        common.fail(problems)
    about = common.read_about(source)
    if not args.quantize:
        load_args.quantize = about.get("quantize") or ""
    common.check_shared_args(load_args, ("max_new_tokens", "max_batch"), problems)
    if not common.has_weights(common.adapter_base(source) or source):
        problems.append(f"{source} has no weights: train it first")
    found = []
    try:
        prompts = Prompts(args, config, tokenizer, about)
        prompts.record_ids({"prompt": "Q"})  # with the system turn
        if args.input:
            found = read_requests(args, prompts, problems)
    except ValueError as error:
        problems.append(f"{source}: {error}; perhaps another --format")
    if problems:
        common.fail(problems)
    return load_args, config, prompts, found


def load_engine(args, load_args, config, prompts):
    device = common.setup_distributed(load_args)
    source = load_args.model_init_path
    auto_class = common.auto_class_of(config)
    ds_config = {"zero_optimization": {"stage": 0}}
    model = common.load_model(auto_class, source, config, load_args, ds_config, prompts.tokenizer)
    model.to(device).eval()
    log(f"{source}: {load_args.precision} on {device.type}, --format {prompts.format}")
    of_model = model.generation_config.eos_token_id
    if not isinstance(of_model, list):
        of_model = [of_model]
    prompts.stop_ids = {*prompts.stop_ids, *of_model} - {None}
    try:
        return Engine(model, args, prompts)
    except ValueError as error:
        common.fail(f"{source}: {error}")


def main(args):
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for replies
        load_args, config, prompts, found = prepare(args)
        source = load_args.model_init_path
        if args.input:
            # everything that is asked, and of whom
            weights = sorted(pathlib.Path(source).glob("*.safetensors"))
            times = [os.path.getmtime(path) for path in weights]
            command = common.derive_seed(source, times, args.dtype, args.quantize, found)
            file, n_done = open_output(args.output, command)
        engine = load_engine(args, load_args, config, prompts)
    engine.start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        if args.input:
            answer_file(engine, found, file, n_done, command)
        elif args.serve >= 0:
            serve(engine, pathlib.Path(source).name)
        else:
            talk(engine)
    except KeyboardInterrupt:
        return common.EXIT_SAVED if args.input else 0
    return 0


def parse_args(argv):
    args = common.Parser(__doc__, FLAGS, shared_flags={}).parse_args(argv)
    if args.do_sample == "false":
        args.temperature = 0.0
    args.settings = {name: getattr(args, name) for name in RANGES}
    args.api_key = args.api_key or os.environ.get("CHAT_API_KEY", "")
    return args


if __name__ == "__main__":
    common.launch(main, parse_args(sys.argv[1:]))
