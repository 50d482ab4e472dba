"""chat.py: talk to any checkpoint, decoder-only or encoder-decoder: in the terminal, from a file, or as a small server.

    {"prompt": "Add one to 41."}      {"messages": [{"role": "user", "content": "Hi"}]}      a line of prompts.jsonl

    python chat.py                                                     # the newest model under models/
    python chat.py --model_path models/sft-demo --temperature 0
    python chat.py --model_path models/sft-demo --input prompts.jsonl --output replies.jsonl --n_samples 4
    python chat.py --model_path models/sft-demo --serve 8000           # OpenAI's API, and a page at http://127.0.0.1:8000
    deepspeed --num_gpus 4 chat.py --model_path models/llama-70b       # weights partitioned over four GPUs (ZeRO-3)

--model_path is a run folder, a checkpoint-<step>, an adapter folder (which names its base), a plain Hugging Face folder or
a hub id. Prompts are what training made of the same conversation: the tokenizer carries the template. docs/chat.md has
commands, the API and the numbered details.

One engine serves all three: it reads new prompts in chunks between the tokens of running replies, lets rows join and
leave at any token, and keeps the keys and values of finished conversations, so that a next turn reads its new part only.
Shapes: B rows, W columns of the key-value cache (rows end at the same column, padding is on the left), V vocabulary.
"""

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import hmac
import http.server
import inspect
import itertools
import json
import math
import os
import pathlib
import queue
import re
import secrets
import select
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.parse

import common_v1 as common  # first: it prepares the import of DeepSpeed

import deepspeed
import jinja2
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from common_v1 import log

SAMPLING = {  # what /set and the API change for one reply: type, smallest and largest value
    "temperature": (float, 0, 100), "top_k": (int, 0, 2**31), "top_p": (float, 0, 1), "repetition_penalty": (float, 0.01, 100),
    "max_new_tokens": (int, 0, 2**31), "seed": (int, -2**62, 2**62)}
GREEDY = 0.001  # temperatures up to this are greedy decoding
CANDIDATES = 256  # likeliest tokens that top_k and top_p look at first; all of them where these do not suffice
REUSE_FROM = 32  # shorter conversations are read again rather than kept [tokens]
FORMATS = {  # --format: chat templates for models whose tokenizer has none; bot is --bot_name
    # plain dialogue, as for a base model
    "turns": "{% for m in messages %}{{ {'user': 'User: ', 'assistant': bot + ': ', 'system': ''}[m['role']] + m['content'] + "
             "('\\n\\n' if m['role'] == 'system' else '\\n') }}{% endfor %}{{ bot + ':' if add_generation_prompt }}",
    # Open-Assistant's first models: no token ends a turn, the next <human> does
    "v2": "{% for m in messages %}{{ {'user': '<human>', 'assistant': '<bot>', 'system': '<prefix>'}[m['role']] + m['content'] + "
          "('</prefix>' if m['role'] == 'system' else '') }}{% endfor %}{{ '<bot>' if add_generation_prompt }}",
    # and the later ones
    "v2.5": "{% for m in messages %}{{ {'user': '<|prompter|>', 'assistant': '<|assistant|>', 'system': '<|prefix_begin|>'}[m['role']] + "
            "m['content'] + ('<|prefix_end|>' if m['role'] == 'system' else eos_token) }}{% endfor %}"
            "{{ '<|assistant|>' if add_generation_prompt }}",
}
FORMAT_TOKENS = {"v2": ["<human>", "<bot>"], "v2.5": ["<|prompter|>", "<|assistant|>"]}
FORMAT_STOPS = {"turns": ["\nUser:"], "v2": ["<human>"], "v2.5": ["<|prompter|>"]}
UNLIMITED = 8192  # --max_context of models without a limit of their own: one that nobody else could be computed beside helps nobody [tokens]
CONNECTIONS, BODY_SECONDS = 512, 30  # --serve: open connections; time to send a request, and to take a piece of the answer
MAX_CHOICES = 16
LOOPBACK = ("127.0.0.1", "localhost", "::1")
NOT_SERVED = {  # of OpenAI's API, what would change a reply and is not here: the value that changes nothing
    "tools": None, "tool_choice": "none", "functions": None, "logit_bias": None, "frequency_penalty": 0, "presence_penalty": 0, "suffix": None,
    "best_of": 1, "response_format": {"type": "text"}, "audio": None}

# ------------------------------------------------------------------------------------------------ arguments


def parse_args(argv=None):
    parser = common.Parser(prog="chat.py", description=__doc__.split("\n\n")[0])
    group = parser.add_argument_group("model")
    group.add_argument("--model_path", help="run, checkpoint, adapter or model folder, a name under models/, or a hub id; default: the newest under models/")
    group.add_argument("--revision", help="branch, tag or commit of a hub id [name]")
    group.add_argument("--trust_remote_code", action="store_true", help="run model code that a hub id brings along")
    group.add_argument("--mount_dir", help="where models/ is [path], default: ./mount if it holds models/ or data/, else .")
    group.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto = bf16 where the GPU has it, else fp32")
    group.add_argument("--quantize", choices=["nf4", "int8", "none"], help="keep the linear layers in 4 or 8 bits per weight; default none, or what "
                       "the adapter was trained with")
    group.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    group.add_argument("--compile", action="store_true", help="static cache and torch.compile, for long sessions on a GPU (CPU: needs a C++ compiler)")
    group.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher passes it

    group = parser.add_argument_group("conversation")
    group.add_argument("--format", choices=["auto", "template", "raw", *FORMATS], default="auto",
                       help="how a conversation becomes text; auto = as it was trained, else the tokenizer's template, else turns (raw for encoder-decoders)")
    group.add_argument("--system_prefix", help="system turn in front of every conversation [text]")
    group.add_argument("--bot_name", default="Assistant", help="what the model is called on the screen and in --format turns [name]")
    group.add_argument("--max_context", type=int, help="prompt and reply together [tokens], default: what the model has positions for")

    group = parser.add_argument_group("sampling")
    group.add_argument("--max_new_tokens", type=int, default=512, help="longest reply [tokens]")
    group.add_argument("--temperature", type=float, default=0.8, help=f"<= {GREEDY} = greedy [no unit]")
    group.add_argument("--top_k", type=int, default=0, help="sample from this many likeliest tokens [count], 0 = off")
    group.add_argument("--top_p", type=float, default=0.9, help="sample from the likeliest tokens of this mass [0-1], 1 = off")
    group.add_argument("--repetition_penalty", type=float, default=1.0, help="divides what was said before (Keskar et al. 2019) [no unit], 1 = off")
    group.add_argument("--do_sample", nargs="?", const="true", choices=["true", "false"], help="false = greedy, whatever --temperature says")
    group.add_argument("--seed", type=int, default=0, help="of sampling [integer]")

    group = parser.add_argument_group("file mode")
    group.add_argument("--input", help="prompts: .jsonl, .json, .gz of both [path]; the keys of training records are understood")
    group.add_argument("--output", help="replies, a JSON line per prompt [path]")
    group.add_argument("--n_samples", type=int, default=1, help="replies per prompt [count]")
    group.add_argument("--logprobs", action="store_true", help="write the log-probability of every token, before temperature and cuts [nats]")

    group = parser.add_argument_group("server")
    group.add_argument("--serve", type=int, metavar="PORT", help="OpenAI's API and a page for the browser; 0 = any free port")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; all but loopback need --api_key")
    group.add_argument("--api_key", help="what clients must send as bearer token [text], default: $CHAT_API_KEY")
    group.add_argument("--max_batch", type=int, default=32, help="rows computed together [count]; also of --input")
    group.add_argument("--max_queue", type=int, default=256, help="prompts that may wait; more are answered 429 [count]")
    group.add_argument("--max_request_mb", type=float, default=2.0, help="largest request body [MB]")
    group.add_argument("--request_timeout", type=float, default=600.0, help="waiting and computing, per request [s]")
    args = parser.parse_args(argv)
    if args.do_sample == "false":
        args.temperature = 0.0
    args.api_key = args.api_key or os.environ.get("CHAT_API_KEY")
    return args


def check_args(args, problems):
    for name, (_, low, high) in SAMPLING.items():
        if not low <= getattr(args, name) <= high:
            problems.append(f"--{name} {getattr(args, name)}: expected {low} to {high}")
    if args.do_sample == "true" and args.temperature <= GREEDY:
        problems.append(f"--do_sample at --temperature {args.temperature}, which is greedy: raise it")
    for name in ("n_samples", "max_batch", "max_queue", "max_request_mb", "request_timeout", "max_new_tokens"):
        if getattr(args, name) <= 0:
            problems.append(f"--{name} {getattr(args, name)}: expected more than 0")
    if args.max_context is not None and args.max_context < 2:
        problems.append(f"--max_context {args.max_context}: expected 2 or more")
    if bool(args.input) != bool(args.output):
        problems.append("--input and --output go together")
    if args.output and os.path.exists(args.output):
        problems.append(f"--output {args.output} exists; move it away or choose another")
    if args.input and args.serve is not None:
        problems.append("--input and --serve: one of them")
    if not args.input and (args.n_samples > 1 or args.logprobs):
        problems.append("--n_samples and --logprobs belong to --input; in the conversation /retry gives another reply")
    if args.n_samples > 1 and args.temperature <= GREEDY:
        problems.append(f"--n_samples {args.n_samples}: greedy replies are all the same; raise --temperature")
    if args.serve is not None and not 0 <= args.serve < 65536:
        problems.append(f"--serve {args.serve}: expected a port, 0 to 65535")
    if args.serve is not None and args.host not in LOOPBACK and not args.api_key:
        problems.append(f"--host {args.host} opens the model to the network: give an --api_key as well")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device):
        problems.append(f"--device {args.device}: expected auto, cpu, cuda or cuda:N")
    elif args.device.startswith("cuda") and not torch.cuda.is_available():
        problems.append(f"--device {args.device}: this PyTorch sees no GPU")
    if args.device != "auto" and common.world_size() > 1:
        problems.append("--device: with several processes each takes its own; leave it out")
    if args.compile and common.world_size() > 1:
        problems.append("--compile: not with several processes (ZeRO-3 partitions the weights)")


def choose_model(args, problems):
    """--model_path as a path or hub id; without it the newest folder under models/ that can write text."""
    models = common.mount_dir(args) / "models"
    if args.model_path:
        named = models / args.model_path
        return str(named) if not os.path.exists(args.model_path) and named.is_dir() else args.model_path
    found = []
    for folder in models.iterdir() if models.is_dir() else []:
        about = folder / "rawtune.json"
        if folder.is_dir() and (folder / "COMPLETE").is_file() and about.is_file() and json.loads(about.read_text()).get("script") != "clf.py":
            found.append(((folder / "COMPLETE").stat().st_mtime, str(folder)))
    if not found:
        problems.append(f"{models}: no finished run to talk to. `python sft_causal.py` trains one in two minutes; or name a model: --model_path")
        return None
    return max(found)[1]


def model_args(args):
    """The trainers' flags as `common.load_model` reads them: all at their defaults, but for this model."""
    parser = common.Parser()
    common.add_shared_args(parser)
    return argparse.Namespace(**{**vars(parser.parse_args([])), **{k: getattr(args, k) for k in ("revision", "trust_remote_code", "quantize", "mount_dir")},
                                 "model_init_path": args.model_path, "no_train": True, "seed": 0})


# ------------------------------------------------------------------------------------------------ prompts


class Prompts:
    """Conversations and records as the ids that training made of them, where replies end, and what fits."""

    def __init__(self, args, config, tokenizer, rawtune, problems):
        self.tokenizer, self.encoder_decoder, self.rawtune = tokenizer, config.is_encoder_decoder, rawtune
        self.format = args.format
        if self.format == "auto":
            raw = rawtune.get("raw_prompt") or "record_layout" in rawtune or (self.encoder_decoder and not tokenizer.chat_template)
            self.format = "raw" if raw else "template" if tokenizer.chat_template else "turns"
        if self.format == "template" and not tokenizer.chat_template:
            problems.append("--format template: the tokenizer has none; choose another --format")
        missing = [token for token in FORMAT_TOKENS.get(self.format, []) if token not in tokenizer.get_vocab()]
        if missing:
            problems.append(f"--format {self.format}: the tokenizer has no {' and no '.join(missing)}; choose another --format")
        self.template, self.bot = FORMATS.get(self.format), args.bot_name
        self.stops, self.special = FORMAT_STOPS.get(self.format, []), common.special_tokens(tokenizer)
        self.begin = [tokenizer.bos_token_id] if common.adds_bos(tokenizer) else []
        self.context = args.max_context
        limit = None if config.model_type in ("t5", "mt5", "umt5") else getattr(config.get_text_config(), "max_position_embeddings", None)
        if limit and self.context and self.context > limit:
            problems.append(f"--max_context {args.max_context}: the model has {limit} positions")
        self.context = self.context or limit or UNLIMITED
        self.multi_turn = self.format != "raw"
        self.system = self.multi_turn and not missing and self._has_system_turn()
        if args.system_prefix and not missing and not self.system:
            problems.append(f"--system_prefix: --format {self.format} has no system turn for this model; leave it out")

    def _has_system_turn(self):
        try:
            return "Be brief." in self.render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
        except ValueError:
            return False

    def stop_ids(self, generation):
        """Every id that ends a reply: the run's, the generation configuration's, the template's end of a turn."""
        eos = generation.eos_token_id
        ids = set(self.rawtune.get("stop_ids") or []) | set(eos if isinstance(eos, list) else [] if eos is None else [eos])
        if not ids and self.tokenizer.eos_token_id is not None:
            ids = {self.tokenizer.eos_token_id}
        if self.format == "template":
            special = {token.content: i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
            try:
                text = self.render([{"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "Blue."}], False)
            except ValueError:
                text = ""
            after = text[text.rfind("Blue.") + 5:].lstrip() if "Blue." in text else ""
            ids |= {i for token, i in special.items() if after.startswith(token)}
        if self.format in FORMAT_TOKENS:
            ids |= {self.tokenizer.convert_tokens_to_ids(stop) for stop in self.stops if stop in self.tokenizer.get_vocab()}
        return ids

    def render(self, messages, reply_follows=True):
        """Text of a conversation. Raises ValueError with what the template objects to."""
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False, add_generation_prompt=reply_follows,
                                                      **({"bot": self.bot} if self.template else {}))
        except (jinja2.exceptions.TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from None

    def ids(self, messages):
        """[{"role", "content"}] that end with the user -> list of token ids. Raises ValueError."""
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("the last message must be the user's")
        if self.format == "raw":
            return self.raw_ids(messages[-1]["content"])
        if special := next(filter(None, (self.special.search(message["content"]) for message in messages)), None):
            raise ValueError(f"the text holds the special token {special[0]!r}, which would be read as one; remove it")
        text = self.render(messages)
        return self.raw_ids(text) if self.template else self._tokenize(text, add_special_tokens=False)

    def raw_ids(self, text):
        """Text as it is: what an encoder-decoder reads ends with its end token; otherwise a begin token where the tokenizer has one."""
        return self._tokenize(text) if self.encoder_decoder else self.begin + self._tokenize(text, add_special_tokens=False)

    def _tokenize(self, text, **options):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the text has half a surrogate pair, which is no character") from None
        return self.tokenizer(text, **options).input_ids

    def fit(self, messages, max_new_tokens):
        """(ids, number of turns left out): whole turns go, oldest first, until the reply has room too. Raises ValueError."""
        room = self.context - min(max_new_tokens, self.context // 2)
        system, turns, left_out = messages[: messages[0]["role"] == "system"], messages[messages[0]["role"] == "system":], 0
        while True:
            ids = self.ids(system + turns)
            starts = [i for i, message in enumerate(turns) if message["role"] == "user"][1:]
            if len(ids) <= room or not starts or not self.multi_turn:
                break
            turns, left_out = turns[starts[0]:], left_out + 1
        if len(ids) >= self.context:
            raise ValueError(f"the message is too long: {len(ids)} tokens, and the context has {self.context}")
        return ids, left_out

    def of_record(self, record):
        """(messages, None) or (None, raw text) of a row with the keys that the trainers know. Raises ValueError."""
        if "messages" in record:
            messages = common.clean_messages(record["messages"])
            last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
            if last is None:
                raise ValueError("'messages' has no user turn")
            return messages[: last + 1], None
        name = next((name for name in ("instruction", "prompt", "text") if name in record), None)
        if name is None:
            raise ValueError(f"none of the known keys (has: {', '.join(map(str, record))}); expected 'prompt', 'messages', 'instruction' or 'text'")
        text, extra = record[name], record.get("input") if name == "instruction" else None
        if not isinstance(text, str) or not text.strip() or not isinstance(extra or "", str):
            raise ValueError(f"{name!r} (and 'input') must be text that is not empty")
        if extra:
            text += ("\n\n### Input:\n" if self.rawtune.get("template") == "alpaca" else "\n\n") + extra
        return (None, text) if name == "text" or self.format == "raw" else ([{"role": "user", "content": text}], None)


# ------------------------------------------------------------------------------------------------ text of a reply


class Text:
    """Token ids of one reply to pieces of text: each piece as soon as its characters are whole and no stop string can begin in it."""

    def __init__(self, tokenizer, stops):
        self.tokenizer, self.stops, self.ids, self.first, self.read, self.held, self.stopped = tokenizer, stops, [], 0, 0, "", False

    def _decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def push(self, token, last=False):
        """The next piece, perhaps empty; token None: only end. `stopped` is set when a stop string was met: it is cut away."""
        if token is not None:
            self.ids.append(token)
        # decoded together with the tokens before, as sentencepiece and bytes of one character depend on them
        before, text = self._decode(self.ids[self.first: self.read]), self._decode(self.ids[self.first:])
        if len(text) > len(before) and (last or not text.endswith("\ufffd")):
            self.held += text[len(before):]
            self.first, self.read = self.read, len(self.ids)
        found = [self.held.find(stop) for stop in self.stops if stop in self.held]
        if found:
            self.stopped, piece, self.held = True, self.held[: min(found)], ""
            return piece
        keep = 0 if last else max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        piece, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep:]
        return piece


# ------------------------------------------------------------------------------------------------ key-value cache


class Slots(DynamicLayer):
    """Keys and values of a layer: (B, heads, W, size) views into a larger room, so that a new token, a row that joins and a row
    that leaves copy nothing else. transformers' DynamicLayer copies all of it for each token."""

    def __init__(self):
        super().__init__()
        self.room, self.n_rows, self.width = None, 0, 0

    def lazy_initialization(self, keys, values):
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.room = [new.new_zeros(0, new.shape[1], 0, new.shape[3]) for new in (keys, values)]

    def reserve(self, n_rows, width, shift=0):
        """Room for so many; the present columns move to the right by `shift`."""
        has_rows, has_width = self.room[0].shape[0], self.room[0].shape[2]
        fits = n_rows <= has_rows and width <= has_width
        # what is computed with weight 0 must be finite: new room is zeros
        rows = has_rows if n_rows <= has_rows else max(n_rows, 2 * has_rows)
        columns = has_width if width <= has_width else -(-width * 5 // 4 // 64) * 64
        for i, old in enumerate(self.room):
            new = old if fits else old.new_zeros(rows, old.shape[1], columns, old.shape[3])
            if not fits or shift:
                inside = old[: self.n_rows, :, : self.width]
                new[: self.n_rows, :, shift: shift + self.width] = inside.clone() if fits else inside
            self.room[i] = new

    def _show(self, n_rows, width):
        self.n_rows, self.width = n_rows, width
        self.keys, self.values = (room[:n_rows, :, :width] for room in self.room)

    def update(self, keys, values, *_, **__):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        n_rows, width = keys.shape[0], self.width + keys.shape[2]
        self.reserve(n_rows, width)
        for room, new in zip(self.room, (keys, values)):
            room[:n_rows, :, self.width: width] = new
        self._show(n_rows, width)
        return self.keys, self.values

    def join(self, other, to_the_right):
        """Append the rows of another layer, all ending (or all beginning) at the same column."""
        width, n = max(self.width, other.width), self.n_rows
        self.reserve(n + other.n_rows, width, width - self.width if to_the_right else 0)
        for room, new in zip(self.room, (other.keys, other.values)):
            at = width - other.width if to_the_right else 0
            room[n: n + other.n_rows, :, at: at + other.width] = new
        self._show(n + other.n_rows, width)

    def remove(self, row):
        """The last row takes the place of this one."""
        for room in self.room:
            if row < self.n_rows - 1:
                room[row, :, : self.width] = room[self.n_rows - 1, :, : self.width]
        self._show(self.n_rows - 1, self.width)

    def cut_left(self, columns):
        for room in self.room:
            room[: self.n_rows, :, : self.width - columns] = room[: self.n_rows, :, columns: self.width].clone()
        self._show(self.n_rows, self.width - columns)

    def part(self, rows, first=0, stop=None):
        """A new layer with copies of these rows (a list, repeats allowed) and columns."""
        new, rows = Slots(), torch.tensor(rows, device=self.device)
        new.dtype, new.device, new.is_initialized = self.dtype, self.device, True
        new.room = [x[:, :, first:stop].index_select(0, rows) for x in (self.keys, self.values)]
        new._show(*new.room[0].shape[0:3:2])
        return new


class Still(DynamicLayer):
    """A `Slots` layer as the compiled step sees it: the whole room, written at a column that is a tensor, so no shape changes with a token."""

    def __init__(self, slots, column):
        super().__init__()
        (self.keys, self.values), self.column, self.is_initialized = slots.room, column, True

    def update(self, keys, values, *_, **__):
        return tuple(room.index_copy_(2, self.column, new) for room, new in zip((self.keys, self.values), (keys, values)))


class Batch:
    """Rows that are computed together: their caches, and what each is fed next."""

    def __init__(self, rows, start, source_lengths=None, own=None, cross=None):
        self.rows, self.start, self.source_lengths = rows, start, source_lengths  # start: column at which each row begins
        self.tokens = self.knobs = None  # (B, 1) next input; what `Engine.choose` has prepared for these rows
        own, cross = (Cache(layers=layers) if layers else Cache(layer_class_to_replicate=Slots) for layers in (own, cross))
        # the pair notes whether the encoder has been read: whether `cross` has layers
        self.cache = own if source_lengths is None else EncoderDecoderCache(own, cross)

    def width(self):
        return self.cache.get_seq_length()

    def layers(self):
        """(layer, rows end at one column) of all caches."""
        if self.source_lengths is None:
            return [(layer, True) for layer in self.cache.layers]
        return [(layer, True) for layer in self.cache.self_attention_cache.layers] + [
            (layer, False) for layer in self.cache.cross_attention_cache.layers]

    def join(self, other):
        width, mine, theirs = max(self.width(), other.width()), self.width(), other.width()
        for (layer, to_the_right), (new, _) in zip(self.layers(), other.layers()):
            layer.join(new, to_the_right)
        self.start = [s + width - mine for s in self.start] + [s + width - theirs for s in other.start]
        self.rows, self.tokens, self.knobs = self.rows + other.rows, torch.cat([self.tokens, other.tokens]), None
        if self.source_lengths is not None:
            self.source_lengths = self.source_lengths + other.source_lengths

    def repeat(self, rows, which):
        """A batch of `rows`, the i-th of which begins as row which[i] of this one."""
        if which == list(range(len(self.rows))):
            self.rows = rows
            return self
        own, cross = ([layer.part(which) for layer, right in self.layers() if right == end] for end in (True, False))
        lengths = [self.source_lengths[i] for i in which] if cross else None
        return Batch(rows, [self.start[i] for i in which], lengths, own, cross)

    def remove(self, i):
        for layer, _ in self.layers():
            layer.remove(i)
        last = len(self.rows) - 1
        for values in filter(None, (self.rows, self.start, self.source_lengths)):
            values[i] = values[last]
            values.pop()
        if i < last:
            self.tokens[i] = self.tokens[last]
        self.tokens, self.knobs = self.tokens[:last], None
        unused = min(self.start, default=0)
        if unused > 64 and unused > self.width() // 2:
            for layer, to_the_right in self.layers():
                if to_the_right:
                    layer.cut_left(unused)
            self.start = [s - unused for s in self.start]


# ------------------------------------------------------------------------------------------------ engine


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and how to answer it. rank 0's copy has `events`: (choice, piece of text, token, its log-probabilities, None) for each
    token, (choice, last piece, None, None, "stop" | "length") at the end of a reply, (None, message, None, None, "error")."""

    ids: list
    keys: list  # one int64 per reply: the seed of its noise
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stops: list = dataclasses.field(default_factory=list)
    logprobs: int | None = None  # also this many likeliest tokens of each place
    echo: bool = False  # log-probabilities of the prompt's tokens too, as events of choice 0 before the reply
    keep: bool = True  # keep the conversation's keys and values for its next turn
    number: int = -1
    events: queue.SimpleQueue | None = None


class Row:
    """One reply in the making."""

    def __init__(self, request, choice, tokenizer, prompt_ids):
        self.request, self.choice, self.key = request, choice, request.keys[choice]
        self.ids = list(prompt_ids)  # what the decoder has read and written
        self.n_new, self.text, self.finish = 0, Text(tokenizer, request.stops), None


class Engine:
    """Continuous batching over any transformers model with a plain key-value cache (Yu et al. 2022, Orca). Collective: all ranks
    `run` the same steps; rank 0 hands out requests and, to be safe from rounding, the tokens."""

    def __init__(self, model, tokenizer, prompts, device, max_batch, chunk, capacity_bytes, compiled=False):
        self.model, self.tokenizer, self.prompts, self.device = model, tokenizer, prompts, device
        self.max_batch, self.chunk, self.capacity_bytes = max_batch, chunk, capacity_bytes
        accepted = inspect.signature(model.forward).parameters
        self.takes_positions, self.takes_last = "position_ids" in accepted, "logits_to_keep" in accepted
        self.encoder_decoder = model.config.is_encoder_decoder
        self.stop_ids, self.n_threads = prompts.stop_ids(model.generation_config), torch.get_num_threads()
        self.waiting, self.batches, self.cancelled = collections.deque(), [], set()
        self.reading, self.reading_requests = None, []  # a generator over the chunks of new prompts; whose they are
        self.kept = collections.OrderedDict()  # ids of a conversation -> layers with its keys and values
        self.inbox, self.wake, self.numbers, self.stopping = collections.deque(), threading.Event(), itertools.count(), False
        self.n_generated = self.n_read = 0
        self.compiled_step = torch.compile(model, dynamic=True) if compiled else None
        self.shiftable, self.bytes_per_token, self.thread = True, 1, None
        with self._no_grad():
            try:
                self._probe()
            except (ValueError, AttributeError, TypeError, IndexError, KeyError) as error:
                common.fail(f"a {model.config.model_type} does not run on a plain key-value cache ({type(error).__name__}: {error}), so not here")
        self.n_generated = self.n_read = 0  # tokens written, prompt tokens computed

    def _no_grad(self):
        return torch.no_grad() if common.world_size() > 1 or self.compiled_step is not None else torch.inference_mode()

    def _probe(self):
        """Do the steps compute what the model computes in one go? If not (Mamba ignores this cache), it is refused. Does a row
        compute the same with padding on its left? If not (BART: positions are counted from the left), rows of unlike length take
        turns. Also measures what a token's keys and values take."""
        ids = [i % self.model.config.get_text_config().vocab_size for i in range(3, 10)]
        alone, joined = [], []
        for prompts, results in (([ids], alone), ([ids[:3]], alone), ([ids, ids[:3]], joined)):
            batch = None
            for prompt in prompts:
                request = Request(prompt, [0], 1)
                *_, (new, logits) = self._read([request])
                if self.encoder_decoder:  # the rows' decoders are of unlike length only after a token
                    for _ in range(len(prompt)):
                        logits = self._forward(new, torch.tensor([[prompt[0]]], device=self.device))[:, -1]
                new = new.repeat([Row(request, 0, self.tokenizer, prompt)], [0])
                new.tokens = logits.argmax(-1, keepdim=True) * 0 + prompt[0]
                if batch is None:
                    batch = new
                else:
                    batch.join(new)
            results.append(self._forward(batch, batch.tokens)[:, -1].float())
        self.bytes_per_token = sum(sum(x.element_size() * x.shape[1] * x.shape[3] for x in (layer.keys, layer.values)) for layer, _ in batch.layers())
        expected, found = torch.cat(alone), joined[0]
        bound = 1e-4 if self.model.dtype == torch.float32 else 0.05
        one_go = {"input_ids": torch.tensor([ids + ids[:1]], device=self.device)}
        if self.encoder_decoder:
            one_go = {"input_ids": torch.tensor([ids], device=self.device),
                      "decoder_input_ids": torch.tensor([[self.first_id()] + ids[:1] * (len(ids) + 1)], device=self.device)}
        apart = (self.model(**one_go, use_cache=False).logits[:, -1].float() - expected[:1]).abs().max()
        if not apart <= 10 * bound * expected.abs().max():
            raise ValueError(f"its steps give other logits than one go, by {float(apart):.3g}")
        self.shiftable = bool((expected - found).abs().max() <= bound * expected.abs().max())
        if not self.shiftable:
            log.info(f"{self.model.config.model_type}: its positions count padding, so only replies that began together are computed together")

    # requests, from any thread of rank 0

    def submit(self, request):
        request.number, request.events = next(self.numbers), queue.SimpleQueue()
        self.inbox.append(request)
        self.wake.set()
        return request

    def cancel(self, request):
        self.inbox.append(request.number)
        self.wake.set()

    def n_waiting(self):
        return len(self.waiting) + sum(isinstance(x, Request) for x in list(self.inbox))  # cancellations do not wait

    def n_running(self):
        return sum(len(batch.rows) for batch in self.batches)

    def start(self):
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def stop(self):
        self.stopping = True
        self.wake.set()
        if self.thread:
            self.thread.join()

    def _exchange(self):
        """Collective. New requests and cancellations of rank 0, on every rank; False when it is time to leave."""
        if common.rank() == 0:
            if not (self.waiting or self.batches or self.reading):
                self.wake.wait(30)  # then a sign of life, as other ranks wait in a collective
            self.wake.clear()
            new = [self.inbox.popleft() for _ in range(len(self.inbox))]
            going = not self.stopping
        if common.world_size() > 1:
            plain = [dataclasses.replace(x, events=None) if isinstance(x, Request) else x for x in new] if common.rank() == 0 else None
            plain, going = common.broadcast((plain, going) if common.rank() == 0 else None, self.device)
            new = new if common.rank() == 0 else plain
        self.waiting.extend(x for x in new if isinstance(x, Request))
        self.cancelled.update(x for x in new if not isinstance(x, Request))
        return going

    def run(self):
        """Collective. Until `stop`; a step that fails ends its replies with an error, not the engine."""
        torch.set_num_threads(self.n_threads)  # the setting is per thread
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        with self._no_grad():
            while self._exchange():
                try:
                    self.step()
                except Exception as error:
                    if common.world_size() > 1:
                        traceback.print_exc()
                        os._exit(1)  # the other ranks would wait for this one
                    self._fail(error)

    def _fail(self, error):
        memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        message = "out of memory: a shorter prompt, --max_context or --max_batch may help" if memory else f"{type(error).__name__}: {error}"
        log.error(message if memory else traceback.format_exc())
        requests = {row.request.number: row.request for batch in self.batches for row in batch.rows}
        requests.update((request.number, request) for request in self.reading_requests)
        self.batches, self.reading, self.reading_requests = [], None, []
        self.kept.clear()
        for request in requests.values():
            request.events.put((None, message, None, None, "error"))
        if self.device.type == "cuda":
            try:
                torch.cuda.empty_cache()
            except Exception:  # the GPU's context is lost: no later step can succeed
                traceback.print_exc()
                os._exit(1)

    # computing

    def step(self):
        """One chunk of a new prompt, one token of every running row."""
        if self.cancelled:
            self.waiting = collections.deque(request for request in self.waiting if request.number not in self.cancelled)
            for batch in list(self.batches):
                for row in batch.rows:
                    if row.request.number in self.cancelled:
                        row.finish = "cancelled"
                self._drop(batch)
            self.reading_requests = [request for request in self.reading_requests if request.number not in self.cancelled]
            self.cancelled.clear()
            if not self.reading_requests:
                self.reading = None
        if not self.reading and (requests := self._admit()):
            self.reading_requests, self.reading = requests, self._read(requests)
        if self.reading and (done := next(self.reading)):
            self._begin(*done)
            self.reading, self.reading_requests = None, []
        for batch in list(self.batches):
            self._advance(batch, self._forward(batch, batch.tokens)[:, -1])

    def _need(self, request):
        """Columns of the cache."""
        return len(request.ids) + request.max_new_tokens

    def _admit(self):
        """The next requests to read: the oldest, and those behind it that fit beside it with little padding."""
        found, alone, n_rows = [], False, self.n_running()
        longest = max((self._need(row.request) for batch in self.batches for row in batch.rows), default=0)
        while self.waiting and not alone and len(found) < self.max_batch:
            request = self.waiting[0]
            rows, columns = n_rows + len(request.keys), max(longest, self._need(request))
            too_much = rows > self.max_batch or rows * columns * self.bytes_per_token > self.capacity_bytes
            if too_much and n_rows:
                break
            lengths = [len(r.ids) for r in [*found, request]]
            alone = request.echo or self._kept_prefix(request.ids)[1] > 0  # such a prompt is read by itself
            if found and (alone or max(lengths) * len(lengths) > self.chunk or max(lengths) > 1.5 * min(lengths)
                          or (not self.shiftable and len(set(lengths)) > 1)):
                break
            found.append(self.waiting.popleft())
            n_rows, longest = rows, columns
        return found

    def _kept_prefix(self, ids):
        """(key of `kept`, tokens) of the kept conversation that shares the longest beginning with these ids."""
        best = None, 0
        for key in self.kept if not self.encoder_decoder else ():
            n = next((i for i, (a, b) in enumerate(zip(key, ids)) if a != b), min(len(key), len(ids)))
            n = min(n, len(ids) - 1)  # the last token is always read: its logits are what is wanted
            if n >= REUSE_FROM and n > best[1]:
                best = key, n
        return best

    def first_id(self):
        """What the decoder of an encoder-decoder begins with."""
        start = self.model.generation_config.decoder_start_token_id
        return self.model.config.decoder_start_token_id if start is None else start

    def _read(self, requests):
        """Generator over the chunks of some prompts; at last (batch with a row per request, logits (B, V) behind each prompt)."""
        if self.encoder_decoder:
            lengths = [len(request.ids) for request in requests]
            ids = torch.tensor([request.ids + [0] * (max(lengths) - len(request.ids)) for request in requests], device=self.device)
            mask = torch.arange(max(lengths), device=self.device) < torch.tensor(lengths, device=self.device)[:, None]
            hidden = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
            batch = Batch(list(requests), [0] * len(requests), lengths)
            logits = self._forward(batch, torch.full((len(requests), 1), self.first_id(), device=self.device), hidden)
            self.n_read += sum(lengths)
            yield batch, logits[:, -1]
            return
        width = max(len(request.ids) for request in requests)
        start = [width - len(request.ids) for request in requests]
        ids = torch.tensor([[0] * (width - len(request.ids)) + request.ids for request in requests], device=self.device)
        key, done = self._kept_prefix(requests[0].ids) if len(requests) == 1 and not requests[0].echo else (None, 0)
        layers = [layer.part([0], 0, done) for layer in self.kept[key]] if key else None
        batch = Batch(list(requests), start, own=layers)
        chunk = max(32, self.chunk // len(requests))
        while True:
            stop = min(done + chunk, width)
            logits = self._forward(batch, ids[:, done:stop], keep_all=requests[0].echo)
            self.n_read += sum(max(0, stop - max(done, first)) for first in start)
            if requests[0].echo:
                self._echo(requests[0], done, logits[0])
            done = stop
            if done == width:
                break
            yield None
        yield batch, logits[:, -1]

    def _echo(self, request, done, logits):
        """Events for the prompt's tokens: those that follow columns done, done + 1, ... with logits (n, V)."""
        if done == 0:
            self._put(request, (0, "", request.ids[0], None, None))
        following = request.ids[done + 1: done + 1 + len(logits)]
        for token, told in zip(following, self._log_probabilities(logits[: len(following)], following, [request.logprobs or 0] * len(following))):
            self._put(request, (0, "", token, told, None))

    def _forward(self, batch, ids, hidden=None, keep_all=False):
        """Logits (B, 1 or more, V) of the last column(s); ids: (B, n) go behind what the cache has. hidden: the encoder's output, the first time."""
        before, n = batch.width(), ids.shape[1]
        if n == 1 and self.compiled_step is not None and before:
            return self._compiled_forward(batch, ids)
        options = {"past_key_values": batch.cache, "use_cache": True}
        padded = any(batch.start)
        columns = torch.arange(before + n, device=self.device)
        start = torch.tensor(batch.start, device=self.device)[:, None] if padded else 0
        mask = columns >= start if padded else None
        if self.encoder_decoder:
            lengths = torch.tensor(batch.source_lengths, device=self.device)[:, None]
            # once the encoder has been read, its output is only asked for its shape
            hidden = hidden if hidden is not None else torch.zeros(1, device=self.device, dtype=self.model.dtype).expand(
                len(ids), max(batch.cache.cross_attention_cache.layers[0].width, 1), self.model.config.hidden_size)
            options.update(decoder_input_ids=ids, decoder_attention_mask=mask, encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
                           attention_mask=torch.arange(hidden.shape[1], device=self.device) < lengths)
        else:
            options.update(input_ids=ids, attention_mask=mask)
            if self.takes_positions:
                options["position_ids"] = (columns[before:] - start).clamp_min(0).expand(len(ids), n)
            if self.takes_last and not keep_all:
                options["logits_to_keep"] = 1
        return self.model(**options).logits

    def _compiled_forward(self, batch, ids):
        """`_forward` for one token, by shapes that stay: all of the cache's room takes part, behind a mask."""
        width, slots = batch.width() + 1, [layer for layer, _ in batch.layers()]
        for layer in slots:
            layer.reserve(len(ids), width)
        rows, _, columns, _ = slots[0].room[0].shape
        start = torch.tensor(batch.start + [0] * (rows - len(ids)), device=self.device)[:, None]
        column = torch.arange(columns, device=self.device)
        ids = torch.cat([ids, ids.new_zeros(rows - len(ids), 1)])  # free rows take part too
        out = self.compiled_step(input_ids=ids, position_ids=(width - 1 - start).clamp_min(0), use_cache=True,
                                 attention_mask=((column >= start) & (column < width))[:, None, None],
                                 past_key_values=Cache(layers=[Still(layer, column[width - 1: width].clone()) for layer in slots]))
        for layer in slots:
            layer._show(len(batch.start), width)
        return out.logits[: len(batch.start)]

    def _begin(self, batch, logits):
        """Rows whose prompts are read get their first token and join the others."""
        rows, which = [], []
        for i, request in enumerate(batch.rows):
            if request in self.reading_requests:  # else it was cancelled
                prompt = request.ids if not self.encoder_decoder else []
                rows += [Row(request, choice, self.tokenizer, prompt) for choice in range(len(request.keys))]
                which += [i] * len(request.keys)
        if not rows:
            return
        batch = batch.repeat(rows, which)
        batch.tokens = torch.zeros(len(rows), 1, dtype=torch.long, device=self.device)
        self._advance(batch, logits[torch.tensor(which, device=self.device)])
        # a short row beside a very long one would mostly compute with padding
        near = [other for other in self.batches if self.shiftable and max(other.width(), batch.width()) <= max(512, 4 * min(other.width(), batch.width()))]
        if batch.rows and near:
            near[0].join(batch)
        elif batch.rows:
            self.batches.append(batch)

    def _advance(self, batch, logits):
        """Choose a token for each row, tell whoever waits for it, let rows leave that are done."""
        tokens = self.choose(batch, logits)
        if common.world_size() > 1:
            dist.broadcast(tokens, 0)
        batch.tokens = tokens[:, None]
        chosen = tokens.tolist()
        wanted = [-1 if row.request.logprobs is None else row.request.logprobs for row in batch.rows]
        told = self._log_probabilities(logits, chosen, wanted) if max(wanted) >= 0 else [None] * len(chosen)
        for row, token, about in zip(batch.rows, chosen, told):
            request = row.request
            if request.max_new_tokens == 0:
                row.finish = "length"
                self._put(request, (row.choice, "", None, None, "length"))
                continue
            row.ids.append(token)
            row.n_new += 1
            self.n_generated += 1
            piece = ""
            if token in self.stop_ids:
                row.finish = "stop"
            else:
                piece = row.text.push(token)
                row.finish = "stop" if row.text.stopped else "length" if row.n_new >= request.max_new_tokens else None
            self._put(request, (row.choice, piece, token, about, None))
            if row.finish:
                self._put(request, (row.choice, "" if row.text.stopped else row.text.push(None, last=True), None, None, row.finish))
        self._drop(batch)

    def _put(self, request, event):
        if request.events is not None:
            request.events.put(event)

    def _drop(self, batch):
        for i in reversed(range(len(batch.rows))):
            if batch.rows[i].finish:
                self._keep(batch, i)
                batch.remove(i)
        if not batch.rows and batch in self.batches:  # an empty one has no width: who joined it would start wrong
            self.batches.remove(batch)

    def _keep(self, batch, i):
        """Keep what a conversation's next turn can begin with; the oldest go when they take more than a quarter of the cache's memory."""
        row, first = batch.rows[i], batch.start[i]
        n = batch.width() - first
        if self.encoder_decoder or not row.request.keep or row.choice > 0 or n < REUSE_FROM:
            return
        ids = tuple(row.ids[:n])
        for key in [key for key in self.kept if key == ids[: len(key)]]:
            del self.kept[key]
        self.kept[ids] = [layer.part([i], first) for layer, _ in batch.layers()]
        while len(self.kept) > 8 * self.max_batch or len(self.kept) > 1 and sum(map(len, self.kept)) * self.bytes_per_token > self.capacity_bytes / 4:
            self.kept.popitem(last=False)

    def _log_probabilities(self, logits, tokens, counts):
        """[(log-probability of the token, {likeliest token: its log-probability}) or None where the count is negative], at temperature 1."""
        logp = torch.log_softmax(logits.float(), -1)
        chosen = logp.gather(1, torch.tensor(tokens, device=logp.device)[:, None])[:, 0].tolist()
        most = min(max(counts), logp.shape[1])
        top, ids = logp.topk(most, -1) if most > 0 else (torch.empty(len(tokens), 0), torch.empty(len(tokens), 0, dtype=torch.long))
        return [None if n < 0 else (p, dict(zip(i[:n], t[:n]))) for p, i, t, n in zip(chosen, ids.tolist(), top.tolist(), counts)]

    def choose(self, batch, logits):
        """(B,) ids. Greedy, or an exact sample of softmax(logits / temperature) cut to top_k, then top_p: the argmax after adding Gumbel
        noise that is a hash of (key, position, token), as `common.RowKeyedSampler` has it, so neither batch nor order matter."""
        logits = logits.float()
        if batch.knobs is None:
            asked = [row.request for row in batch.rows]
            column = lambda values, dtype: torch.tensor(values, dtype=dtype, device=self.device)[:, None]  # noqa: E731
            batch.knobs = (
                all(r.temperature <= GREEDY for r in asked), column([r.temperature <= GREEDY for r in asked], torch.bool),
                column([r.temperature if r.temperature > GREEDY else 1.0 for r in asked], torch.float),
                any(r.top_k or r.top_p < 1 for r in asked), column([r.top_k or logits.shape[1] for r in asked], torch.long),
                column([r.top_p for r in asked], torch.float), column([row.key for row in batch.rows], torch.long),
                [i for i, r in enumerate(asked) if r.repetition_penalty != 1])
        all_greedy, greedy, temperature, cut, top_k, top_p, keys, penalised = batch.knobs
        if penalised:
            logits = logits.clone()
        for i in penalised:
            said = torch.tensor(sorted(set(batch.rows[i].ids)), dtype=torch.long, device=self.device)
            penalty = batch.rows[i].request.repetition_penalty
            logits[i, said] = torch.where(logits[i, said] > 0, logits[i, said] / penalty, logits[i, said] * penalty)
        if all_greedy:
            return logits.argmax(-1)
        scores, ids = logits / temperature, torch.arange(logits.shape[1], device=self.device).expand_as(logits)
        if cut:
            n = min(CANDIDATES, scores.shape[1])
            total = scores.logsumexp(-1, keepdim=True)
            best, ids = scores.topk(n, -1)
            if n < scores.shape[1] and not bool((greedy | (top_k <= n) | (
                    (top_k >= scores.shape[1]) & ((best - total).exp().sum(-1, keepdim=True) >= top_p))).all()):
                best, ids = scores.sort(-1, descending=True)  # a flat distribution: all tokens matter
            ranks = torch.arange(best.shape[1], device=self.device)
            best = best.masked_fill(ranks >= top_k, -math.inf)
            total = torch.where(top_k < scores.shape[1], best.logsumexp(-1, keepdim=True), total)
            mass = (best - total).exp()
            scores = best.masked_fill((mass.cumsum(-1) - mass >= top_p) & (ranks > 0), -math.inf)
        position = torch.tensor([row.n_new for row in batch.rows], device=self.device)[:, None]
        drawn = (scores + common.RowKeyedSampler.gumbel(keys + position, ids)).argmax(-1, keepdim=True)
        return torch.where(greedy, logits.argmax(-1, keepdim=True), ids.gather(1, drawn))[:, 0]


# ------------------------------------------------------------------------------------------------ terminal

HELP = """  /reset            forget the conversation             /retry            another reply to the last message
  /undo             take the last exchange back         /system TEXT      new system turn (empty: none)
  /set NAME VALUE   temperature, top_k, top_p, repetition_penalty, max_new_tokens, seed; alone: show them
  /save FILE        write the conversation as JSON      /load FILE        read one
  /help             this                                quit, Ctrl-D      leave
  Ctrl-C stops a reply. A line that ends with \\ goes on; a line of three quotes begins and ends a text of several lines."""


class Terminal:
    """A conversation on standard input and output; piped too: a line is a message, a paragraph of output its reply."""

    def __init__(self, args, engine, prompts):
        self.engine, self.prompts, self.name = engine, prompts, args.bot_name
        self.settings = {name: getattr(args, name) for name in SAMPLING}
        self.system, self.messages, self.n_retries = args.system_prefix, [], 0
        self.interactive = sys.stdin.isatty()
        if self.interactive:
            try:
                import readline  # noqa: F401 (line editing and history, where Python was built with it)
            except ImportError:
                pass

    def say(self, text):
        print(text, flush=True)

    def read_message(self):
        """One message, or None at the end of the input."""
        lines = []
        try:
            line = input("> " if self.interactive else "")
            if line.strip() == '"""':
                while (line := input("| " if self.interactive else "")).strip() != '"""':
                    lines.append(line)
                return "\n".join(lines)
            lines.append(line)
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
                lines.append(input("| " if self.interactive else ""))
            return "\n".join(lines)
        except EOFError:
            return "\n".join(lines) if lines and not self.interactive else None  # a file may end within a message
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self.say("\n(quit or Ctrl-D leaves, /reset begins anew)")
            return ""

    def run(self):
        while True:
            before = list(self.messages)
            try:
                if (message := self.read_message()) is None or message.strip().lower() in ("quit", "exit", "/quit", "/exit"):
                    break
                if message.strip() == "!reset" or (message.startswith("/") and not message.startswith("//")):
                    self.command("/reset" if message.strip() == "!reset" else message.strip())
                elif message.strip():
                    self.messages.append({"role": "user", "content": message[1:] if message.startswith("//") else message})
                    self.n_retries = 0
                    self.reply()
            except BrokenPipeError:  # `| head`: nobody reads on
                raise
            except (ValueError, OSError) as error:
                self.messages = before  # what failed was not said
                self.say(f"[{error}]")
            except KeyboardInterrupt:  # between two tokens, or in a command
                self.messages = before
                if not self.interactive:
                    raise
                self.say("\n[stopped]")
        if self.interactive:
            self.say("")

    def reply(self):
        """Answer the last message, piece by piece. What was said stays when Ctrl-C stops it; whoever calls takes back what failed."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        ids, left_out = self.prompts.fit(system + self.messages, self.settings["max_new_tokens"])
        if left_out:
            self.say(f"[the first {left_out} exchange(s) no longer fit into {self.prompts.context} tokens and are left out]")
        key = common.derive_seed(self.settings["seed"], "chat", len(self.messages), self.n_retries)
        request = self.engine.submit(new_request(self.prompts, ids, [key], self.settings))
        pieces, n_tokens, began, first, finish = [], 0, time.perf_counter(), None, None
        if self.interactive:
            print(f"{self.name}: ", end="", flush=True)
        while finish is None:
            try:
                _, piece, token, _, finish = request.events.get()
                if finish == "error":
                    raise ValueError(piece)
                first = first or time.perf_counter()
                n_tokens += token is not None
                pieces.append(piece if any(pieces) or self.prompts.format != "turns" else piece.lstrip())
                print(pieces[-1], end="", flush=True)
            except KeyboardInterrupt:
                self.engine.cancel(request)
                finish = "stopped"
        text = "".join(pieces)
        self.messages.append({"role": "assistant", "content": text.rstrip() if self.prompts.format == "turns" else text})
        seconds = time.perf_counter() - first if first else 0
        if self.interactive:
            speed = f", {(n_tokens - 1) / seconds:.1f} tokens/s" if n_tokens > 1 and seconds else ""
            why = {"length": ", cut at max_new_tokens or the context", "stopped": ", stopped"}.get(finish, "")
            self.say(f"\n[{n_tokens} tokens{speed}, first after {(first or began) - began:.2f} s{why}]")
        else:
            self.say("")

    def command(self, line):
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name == "help":
            self.say(HELP)
        elif name == "reset":
            self.messages = []
            self.say("[a new conversation]")
        elif name in ("retry", "undo"):
            if not any(message["role"] == "user" for message in self.messages):
                raise ValueError("nothing was said yet")
            if self.messages[-1]["role"] == "assistant":
                self.messages.pop()
            if name == "undo":
                self.say(f"[taken back: {self.messages.pop()['content'][:60]}]")
            else:
                if self.settings["temperature"] <= GREEDY:
                    self.say("[greedy: the same reply again; /set temperature 0.8 for others]")
                self.n_retries += 1
                self.reply()
        elif name == "system":
            if rest and not self.prompts.system:
                raise ValueError(f"--format {self.prompts.format} has no system turn for this model")
            self.system = rest or None
            self.say("[system turn set]" if rest else "[no system turn]")
        elif name == "set":
            key, _, value = rest.replace("=", " ").partition(" ")
            if key:
                self.settings[key] = sampling_value(key, value.strip())
            self.say("[" + ", ".join(f"{k} {v}" for k, v in self.settings.items()) + "]")
        elif name == "save" and rest:
            with open(rest, "x", encoding="utf-8") as file:  # an existing file stays as it is
                json.dump({"system": self.system, "messages": self.messages, "settings": self.settings}, file, indent=2, ensure_ascii=False)
            self.say(f"[{len(self.messages)} messages in {rest}]")
        elif name == "load" and rest:
            with open(rest, encoding="utf-8") as file:
                stored = json.load(file)
            stored = stored if isinstance(stored, dict) else {"messages": stored}
            if not isinstance(stored.get("messages"), list) or not isinstance(stored.get("settings") or {}, dict) or not isinstance(
                    stored.get("system") or "", str):
                raise ValueError(f"{rest}: expected a list of messages, or what /save writes")
            messages = common.clean_messages(stored["messages"]) if stored["messages"] else []
            system = stored.get("system") or None
            if messages and messages[0]["role"] == "system":
                system, messages = messages[0]["content"], messages[1:]
            settings = {k: sampling_value(k, v) for k, v in (stored.get("settings") or {}).items()}
            self.system, self.messages, self.settings = system, messages, {**self.settings, **settings}
            self.say(f"[{len(messages)} messages from {rest}]")
        else:
            raise ValueError(f"unknown command /{name}; /help lists them (// begins a message with a slash)" if name not in ("save", "load")
                             else f"/{name} FILE")


def sampling_value(name, value):
    """A checked sampling option. Raises ValueError."""
    if name not in SAMPLING:
        raise ValueError(f"{name!r}: expected one of {', '.join(SAMPLING)}")
    kind, low, high = SAMPLING[name]
    try:
        number = kind(value)
        if isinstance(value, bool) or (isinstance(value, float) and value != number) or not low <= number <= high:
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{name} {value!r}: expected {'a whole number' if kind is int else 'a number'}, {low} to {high}") from None
    return number


def new_request(prompts, ids, keys, settings, **more):
    """A Request from the six sampling options. The reply's length is what the context leaves."""
    room = prompts.context - (1 if prompts.encoder_decoder else len(ids))
    more["stops"] = [*prompts.stops, *more.get("stops", [])]
    sampling = {name: settings[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty")}
    return Request(ids, keys, min(settings["max_new_tokens"], room), **sampling, **more)


# ------------------------------------------------------------------------------------------------ files


def read_prompts(args, prompts, problems):
    """[(record, ids)] of --input."""
    found, path = [], pathlib.Path(args.input)
    for where, _, record in common.read_records(path, problems):
        try:
            messages, text = prompts.of_record(record)
            ids = prompts.raw_ids(text) if messages is None else prompts.ids(messages)
            if len(ids) >= prompts.context:
                raise ValueError(f"{len(ids)} tokens, and the context has {prompts.context}; shorten it")
            json.dumps(record, ensure_ascii=False).encode()  # half a character: a UnicodeEncodeError, which is a ValueError
            found.append((record, ids))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if not found and not problems:
        problems.append(f"{path}: no prompts in it")
    return found


def open_output(args, found, problems):
    """(the unfinished output, open and locked; rows that it has). What another command began, or writes just now, is not continued."""
    out = pathlib.Path(args.output)
    part = out.with_name(out.name + ".part")
    head = {"model": str(args.model_path), "weights_sha256": common.weights_sha256(args.model_path) if os.path.isdir(args.model_path) else None,
            "input_sha256": common.file_sha256(pathlib.Path(args.input)), "format": args.format, "system_prefix": args.system_prefix,
            "n_samples": args.n_samples, "logprobs": args.logprobs, "revision": args.revision, "quantize": args.quantize, "dtype": args.dtype,
            "bot_name": args.bot_name, "max_context": args.max_context, **{name: getattr(args, name) for name in SAMPLING}}
    try:
        file, done = open(part, "a", encoding="utf-8"), set()
    except OSError as error:
        problems.append(f"--output {out}: {error}")
        return None, None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process
    except BlockingIOError:
        problems.append(f"{part}: another process is writing it; wait for its end, or stop it and start this command again")
        return file, done
    except OSError as error:
        log.warning(f"{part}: no locks on this file system ({error}), so two processes could write it at the same time")
    lines = part.read_bytes().split(b"\n")[:-1]  # a last line without an end was cut by a kill
    if out.exists():  # by now: another process has just ended
        problems.append(f"--output {out} exists; move it away or choose another")
        if not file.tell():
            part.unlink()
    elif not file.tell():
        file.write(json.dumps(head) + "\n")
        file.flush()
    elif not lines or json.loads(lines[0]) != head:
        problems.append(f"{part} was begun with other flags, input or weights: finish it with those, or move it away")
    else:
        done = {json.loads(line)["row"] for line in lines[1:]}
        os.truncate(part, sum(len(line) + 1 for line in lines))
        log.info(f"{part}: {len(done)} of {len(found)} prompts are done, continuing")
    return file, done


def answer_file(args, engine, prompts, found, file, done):
    """All prompts that are not done, the longest first; rows are written as they end and put in order at the end."""
    part = pathlib.Path(file.name)
    settings = {name: getattr(args, name) for name in SAMPLING}
    rest = collections.deque(sorted((i for i in range(len(found)) if i not in done), key=lambda i: -len(found[i][1])))
    running, began, n_before = collections.deque(), time.perf_counter(), engine.n_generated
    bar = tqdm(total=len(rest), desc="prompts", delay=2)
    with file:
        while rest or running:
            while rest and len(running) < 2 * args.max_batch:
                i = rest.popleft()
                keys = [common.derive_seed(args.seed, "file", i, n) for n in range(args.n_samples)]
                logprobs = 0 if args.logprobs else None
                running.append((i, engine.submit(new_request(prompts, found[i][1], keys, settings, logprobs=logprobs, keep=False))))
            i, request = running.popleft()
            replies = collect(request)
            row = {"row": i, "replies": [r["text"] for r in replies], "finish_reasons": [r["finish"] for r in replies],
                   "n_prompt_tokens": len(request.ids), "n_tokens": [len(r["tokens"]) for r in replies], "orig_d": found[i][0]}
            if args.logprobs:
                row["tokens"] = [[prompts.tokenizer.decode([t]) for t, _ in r["tokens"]] for r in replies]
                row["token_logprobs"] = [[told[0] for _, told in r["tokens"]] for r in replies]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()
        bar.close()
        rows = sorted((json.loads(line) for line in part.read_bytes().split(b"\n")[1:-1]), key=lambda row: row["row"])
        aside = part.with_name(part.name + ".tmp")
        aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(aside, args.output)
        part.unlink()
    n, seconds = engine.n_generated - n_before, time.perf_counter() - began
    log.info(f"{args.output}: {len(rows)} prompts, {n} tokens in {seconds:.1f} s, {n / seconds:.1f} tokens/s")


def collect(request, wait=lambda request: request.events.get()):
    """Wait for all replies of a request: [{"text", "finish", "tokens": [(id, log-probabilities)]}]. Raises RuntimeError with its error.
    wait: gives the next event."""
    replies = [{"pieces": [], "finish": None, "tokens": []} for _ in request.keys]
    while any(reply["finish"] is None for reply in replies):
        choice, piece, token, told, finish = wait(request)
        if finish == "error":
            raise RuntimeError(piece)
        reply = replies[choice]
        reply["pieces"].append(piece)
        reply["finish"] = finish
        if token is not None:
            reply["tokens"].append((token, told))
    for reply in replies:
        reply["text"] = "".join(reply.pop("pieces"))
    return replies


# ------------------------------------------------------------------------------------------------ server


class BadRequest(Exception):
    """Answered as OpenAI's API does: a status and {"error": {...}}."""

    def __init__(self, status, message, kind="invalid_request_error", code=None):
        super().__init__(message)
        self.status, self.message, self.kind, self.code = status, message, kind, code


class Gone(Exception):
    """The client closed the connection."""


class Server(http.server.ThreadingHTTPServer):
    """A thread per connection; none of them computes. The page and /healthz are open, /v1 needs the key where there is one."""

    daemon_threads, request_queue_size = True, CONNECTIONS

    def __init__(self, args, engine, prompts, name):
        self.args, self.engine, self.prompts, self.name, self.started = args, engine, prompts, name, int(time.time())
        page = common.HERE / "chat.html"
        self.page = page.read_bytes() if page.is_file() else b"chat.html is not beside chat.py; the API is at /v1\n"
        self.slots = threading.BoundedSemaphore(CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        super().__init__((args.host, args.serve), Handler)
        self.loopback = args.host in LOOPBACK

    def process_request(self, request, address):
        if not self.slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, address)
        except RuntimeError:  # no more threads
            self.slots.release()
            raise

    def process_request_thread(self, request, address):
        try:
            super().process_request_thread(request, address)
        finally:
            self.slots.release()

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], (OSError, Gone)):
            log.error(traceback.format_exc())


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, server_version, sys_version, timeout, disable_nagle_algorithm = "HTTP/1.1", "rawtune", "", BODY_SECONDS, True
    streaming = False

    def log_message(self, *_):
        pass

    def send_error(self, code, message=None, explain=None):
        """What the library refuses by itself: other methods, broken request lines."""
        self.request_version = self.request_version or "HTTP/1.1"
        self.refuse(BadRequest(code, message or explain or "refused"))

    def refuse(self, error):
        self.close_connection = True  # what is left of its body is not read
        about = {"error": {"message": error.message, "type": error.kind, "param": None, "code": error.code}}
        if self.streaming:
            self.event(about)
            self.end_stream()
        else:
            self.send(error.status, about)

    def do_GET(self):
        self.answer({"/": self.page, "/healthz": self.health, "/v1/models": self.models})

    def do_POST(self):
        self.answer({"/v1/chat/completions": self.chat, "/v1/completions": self.completions})

    def answer(self, routes):
        self.streaming, self.unread = False, self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers
        try:
            try:
                host = urllib.parse.urlsplit("//" + (self.headers.get("Host") or "")).hostname
            except ValueError:
                host = None
            if self.server.loopback and host not in LOOPBACK:  # another site's name that leads here
                raise BadRequest(403, f"the Host header names {host!r}; this server answers to localhost only")
            path = self.path.split("?")[0]
            if path not in routes:
                raise BadRequest(404, f"{self.command} {path}: no such endpoint", code="not_found")
            key = self.server.args.api_key
            if key and path.startswith("/v1/") and not hmac.compare_digest(self.headers.get("Authorization", "").encode("latin-1"), f"Bearer {key}".encode()):
                raise BadRequest(401, "wrong or missing API key (Authorization: Bearer ...)", "authentication_error", "invalid_api_key")
            routes[path]()
            self.close_connection |= self.unread  # a GET with a body: what is left is no next request
        except (OSError, Gone):
            self.close_connection = True
        except Exception as error:
            if not isinstance(error, BadRequest):
                log.error(traceback.format_exc())
                error = BadRequest(500, f"{type(error).__name__}: {error}", "server_error")
            with contextlib.suppress(OSError):
                self.refuse(error)
                self.drain()

    def drain(self):
        """Read what is left of a refused body: closed before, the connection would be reset, and the client not hear why."""
        if self.unread:
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(2)
            end = time.monotonic() + BODY_SECONDS
            while time.monotonic() < end and self.rfile.read1(65536):
                pass

    def send(self, status, thing, kind="application/json"):
        body = thing if isinstance(thing, bytes) else json.dumps(thing, ensure_ascii=False).encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        if kind.startswith("text/html"):
            self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
                             "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def page(self):
        self.send(200, self.server.page, "text/html; charset=utf-8")

    def health(self):
        args, engine, prompts = self.server.args, self.server.engine, self.server.prompts
        defaults = {name: getattr(args, name) for name in SAMPLING if name not in ("max_new_tokens", "seed")}
        self.send(200, {"status": "ok", "model": self.server.name, "running": engine.n_running(), "waiting": engine.n_waiting(),
                        "multi_turn": prompts.multi_turn, "system_prompt": prompts.system,
                        "defaults": {**defaults, "max_tokens": args.max_new_tokens, "seed": None}})

    def models(self):
        self.send(200, {"object": "list", "data": [{"id": self.server.name, "object": "model", "created": self.server.started,
                                                    "owned_by": "rawtune"}]})

    # reading a request

    def body(self):
        limit = self.server.args.max_request_mb * 1e6
        if self.headers.get_content_type() != "application/json":  # a form on another site could send the other types
            raise BadRequest(415, "expected Content-Type: application/json")
        try:
            length = int(self.headers["Content-Length"])
        except (TypeError, ValueError):
            raise BadRequest(411, "expected a Content-Length") from None
        if not 0 <= length <= limit:
            raise BadRequest(413, f"the body has {length} bytes, the limit is {limit:.0f} (--max_request_mb)")
        data, end = b"", time.monotonic() + BODY_SECONDS
        while len(data) < length:
            try:
                piece = self.rfile.read1(min(65536, length - len(data))) if time.monotonic() < end else b""
            except TimeoutError:
                piece = b""
            if not piece:
                raise BadRequest(408, f"the body did not come within {BODY_SECONDS} s")
            data += piece
        self.unread = False
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadRequest(400, f"the body is not JSON: {error}") from None
        if not isinstance(found, dict):
            raise BadRequest(400, "the body must be a JSON object")
        return found

    def options(self, body, default_tokens):
        """(sampling options, stop strings, number of choices) of a request."""
        args, server = self.server.args, self.server
        if body.get("model") not in (None, server.name):
            raise BadRequest(404, f"model {body['model']!r}: this server has {server.name!r}", code="model_not_found")
        for name, nothing in NOT_SERVED.items():
            if body.get(name) not in (None, nothing, [], {}):
                raise BadRequest(400, f"{name!r} is not supported")
        for name in ("stream", "echo"):
            self.switch(body, name)
        if not isinstance(body.get("stream_options"), (dict, type(None))):
            raise BadRequest(400, "'stream_options' must be an object")
        tokens = body.get("max_completion_tokens") if body.get("max_completion_tokens") is not None else body.get("max_tokens")
        asked = {"max_new_tokens": default_tokens if tokens is None else tokens, "seed": body.get("seed")}
        asked.update((name, body.get(name)) for name in ("temperature", "top_k", "top_p", "repetition_penalty"))
        asked = {name: getattr(args, name) if value is None else value for name, value in asked.items()}
        try:
            if text := [name for name, value in asked.items() if not isinstance(value, (int, float))]:
                raise ValueError(f"{text[0]} {asked[text[0]]!r}: expected a number")
            settings = {name: sampling_value(name, value) for name, value in asked.items()}
        except ValueError as error:
            raise BadRequest(400, str(error).replace("max_new_tokens", "max_tokens")) from None
        settings["seed"] = secrets.randbits(62) if body.get("seed") is None else settings["seed"]
        stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop")
        stops = [] if stops is None else stops
        if not isinstance(stops, list) or len(stops) > 16 or not all(isinstance(stop, str) and 0 < len(stop) <= 1000 for stop in stops):
            raise BadRequest(400, "'stop' must be a string, or up to 16 of them, not empty")
        return settings, stops, self.whole(body, "n", 1, 1, MAX_CHOICES)

    def switch(self, body, name):
        if not isinstance(body.get(name), (bool, type(None))):
            raise BadRequest(400, f"{name!r} must be true or false")
        return bool(body.get(name))

    def whole(self, body, name, default, low, high):
        value = default if body.get(name) is None else body[name]
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise BadRequest(400, f"{name!r} must be a whole number from {low} to {high}")
        return value

    def submit(self, jobs):
        """[(ids, settings, n, options of Request)] -> requests, or 429 where the queue is full."""
        engine, prompts, found = self.server.engine, self.server.prompts, []
        if engine.n_waiting() + len(jobs) > self.server.args.max_queue:
            raise BadRequest(429, "too many requests are waiting; try again later", "overloaded_error", "queue_full")
        for ids, settings, n, more in jobs:
            if not ids:
                raise BadRequest(400, "the prompt has no tokens")
            if max(ids) >= engine.model.config.get_text_config().vocab_size:
                raise BadRequest(400, "the prompt has a token for which this model has no embedding")
            if len(ids) + (settings["max_new_tokens"] > 0) > prompts.context:
                raise BadRequest(400, f"the prompt has {len(ids)} tokens, and the context {prompts.context}", code="context_length_exceeded")
        for ids, settings, n, more in jobs:
            found.append(engine.submit(new_request(prompts, ids, [common.derive_seed(settings["seed"], i) for i in range(n)], settings, **more)))
        return found

    def wait(self, request):
        """The next event of a request, while the client is there and its time lasts."""
        while True:
            now = time.monotonic()
            if now >= self.deadline:
                raise BadRequest(408, f"not done within {self.server.args.request_timeout:g} s (--request_timeout)", "timeout")
            if now >= self.next_look:  # also while tokens come: nobody else notices that a client who gets no stream is gone
                self.next_look = now + 0.25
                if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                    raise Gone
            try:
                return request.events.get(timeout=0.25)
            except queue.Empty:
                pass

    def event(self, thing):
        data = b"data: " + (thing if isinstance(thing, bytes) else json.dumps(thing, ensure_ascii=False).encode("utf-8", "replace")) + b"\n\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if self.chunked else data)

    def begin_stream(self):
        self.streaming, self.chunked = True, self.request_version != "HTTP/1.0"
        self.close_connection |= not self.chunked  # an old proxy: the end of the connection is the end of the stream
        self.send_response(200)
        for name, value in (("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-store"),
                            ("Transfer-Encoding", "chunked") if self.chunked else ("Connection", "close")):
            self.send_header(name, value)
        self.end_headers()

    def end_stream(self):
        if self.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def serve(self, body, jobs, kind, choice_of, delta_of):
        """Run jobs; send one JSON object, or the stream of its pieces. choice_of(reply, job number) and delta_of(piece, token,
        log-probabilities, first) make the parts of a choice that differ between the two endpoints."""
        self.deadline, self.next_look = time.monotonic() + self.server.args.request_timeout, 0.0
        stream = body.get("stream") or False
        requests = self.submit(jobs)
        head = {"id": f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()),
                "model": self.server.name}
        n_prompt = sum(len(request.ids) for request in requests)
        usage = lambda n: {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}  # noqa: E731
        try:
            if not stream:
                choices, n = [], 0
                for j, request in enumerate(requests):
                    for reply in collect(request, self.wait):
                        choices.append({"index": len(choices), **choice_of(reply, j), "finish_reason": reply["finish"]})
                        n += len(reply["tokens"])
                    n -= len(request.ids) if request.echo else 0
                self.send(200, {**head, "choices": choices, "usage": usage(n)})
                return
            self.begin_stream()
            n, index, with_usage = 0, 0, (body.get("stream_options") or {}).get("include_usage")
            for request in requests:
                open_choices, begun = set(range(len(request.keys))), set()
                while open_choices:
                    choice, piece, token, told, finish = self.wait(request)
                    if finish == "error":
                        raise RuntimeError(piece)
                    n += token is not None
                    if piece or told or finish or choice not in begun:
                        self.event({**head, "choices": [{"index": index + choice, **delta_of(piece, token, told, choice not in begun),
                                                         "finish_reason": finish}]})
                    begun.add(choice)
                    open_choices -= {choice} if finish else set()
                index += len(request.keys)
            if with_usage:
                self.event({**head, "choices": [], "usage": usage(n)})
            self.event(b"[DONE]")
            self.end_stream()
        except RuntimeError as error:
            raise BadRequest(500, str(error), "server_error") from None
        finally:
            for request in requests:
                self.server.engine.cancel(request)  # whatever still runs; nothing where all is done

    # the two endpoints

    def chat(self):
        body = self.body()
        settings, stops, n = self.options(body, self.server.args.max_new_tokens)
        try:
            messages = common.clean_messages(body.get("messages"))
            if self.server.args.system_prefix and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": self.server.args.system_prefix})
            ids = self.server.prompts.ids(messages)
        except ValueError as error:
            raise BadRequest(400, str(error)) from None
        logprobs, top = self.switch(body, "logprobs"), self.whole(body, "top_logprobs", 0, 0, 20)
        decode = self.server.prompts.tokenizer.decode

        def told_of(token, told):
            def one(token, p):
                text = decode([token])
                return {"token": text, "logprob": p, "bytes": list(text.encode("utf-8", "replace"))}
            return {**one(token, told[0]), "top_logprobs": [one(t, p) for t, p in told[1].items()]}

        def choice_of(reply, _):
            content = [told_of(token, told) for token, told in reply["tokens"] if told]
            return {"message": {"role": "assistant", "content": reply["text"]}, "logprobs": {"content": content} if content else None}

        def delta_of(piece, token, told, first):
            return {"delta": {"role": "assistant", "content": piece} if first else {"content": piece} if piece else {},
                    "logprobs": {"content": [told_of(token, told)]} if told else None}

        jobs = [(ids, settings, n, {"stops": stops, "logprobs": top if logprobs else None})]
        self.serve(body, jobs, "chat.completion.chunk" if body.get("stream") else "chat.completion", choice_of, delta_of)

    def completions(self):
        """Text or ids as they are, without a template; with "echo" and "logprobs" the prompt's log-probabilities too."""
        body, prompts = self.body(), self.server.prompts
        settings, stops, n = self.options(body, 16)
        prompt, logprobs, echo = body.get("prompt"), body.get("logprobs"), self.switch(body, "echo")
        prompt = [prompt] if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) is int) else prompt
        size = len(prompts.tokenizer)
        if not isinstance(prompt, list) or not prompt or not all(
                isinstance(p, str) or (isinstance(p, list) and all(type(i) is int and 0 <= i < size for i in p)) for p in prompt):
            raise BadRequest(400, "'prompt' must be a string, a list of token ids of this model, or a list of these")
        if len(prompt) > self.server.args.max_queue:
            raise BadRequest(400, f"{len(prompt)} prompts; send up to {self.server.args.max_queue} at once")
        logprobs = (0 if logprobs else None) if isinstance(logprobs, bool) else self.whole(body, "logprobs", None, 0, 20)
        if echo and (body.get("stream") or n > 1 or prompts.encoder_decoder):
            raise BadRequest(400, "'echo' goes with one choice of a decoder-only model, not streamed")
        try:
            ids = [prompts.raw_ids(p) if isinstance(p, str) else p for p in prompt]
        except ValueError as error:  # half a character
            raise BadRequest(400, f"'prompt': {error}") from None
        decode = prompts.tokenizer.decode

        def likeliest(top):
            found = {}
            for token, p in top.items():  # of several tokens with one text (half characters) the likeliest
                found.setdefault(decode([token]), p)
            return found

        def logprobs_of(tokens, offset=0):
            texts = [decode([token]) for token, _ in tokens]
            return {"tokens": texts, "token_logprobs": [told and told[0] for _, told in tokens],
                    "top_logprobs": [told and likeliest(told[1]) for _, told in tokens],
                    "text_offset": list(itertools.accumulate(map(len, texts), initial=offset))[:-1]}

        def choice_of(reply, job):
            text = reply["text"]
            if echo:
                text = (prompt[job] if isinstance(prompt[job], str) else decode(prompt[job])) + text
            return {"text": text, "logprobs": logprobs_of(reply["tokens"]) if logprobs is not None else None}

        def delta_of(piece, token, told, first):
            return {"text": piece, "logprobs": logprobs_of([(token, told)]) if told else None}

        more = {"stops": stops, "logprobs": logprobs, "echo": echo and logprobs is not None, "keep": False}
        self.serve(body, [(i, settings, n, more) for i in ids], "text_completion", choice_of, delta_of)


# ------------------------------------------------------------------------------------------------ main


def prepare(args):
    """Everything that can be wrong is found here and reported together, before any weight is loaded."""
    problems = []
    check_args(args, problems)
    newest = not args.model_path
    args.model_path = choose_model(args, problems)
    if args.model_path is None:
        common.fail(problems)
    source, config, tokenizer = common.open_model_folder(model_args(args), problems)
    if config is None:
        common.fail(problems)
    about = pathlib.Path(source) / "rawtune.json"
    rawtune = json.loads(about.read_text()) if about.is_file() else {}
    n_before = len(problems)
    prompts = Prompts(args, config, tokenizer, rawtune, problems)
    found, part, done = None, None, None
    if args.input and len(problems) == n_before:
        found = read_prompts(args, prompts, problems)
        if not problems and common.rank() == 0:
            part, done = open_output(args, found, problems)
    if args.compile and (config.is_encoder_decoder or getattr(config.get_text_config(), "sliding_window", None)):
        problems.append(f"--compile: not for a {config.model_type}: decoder-only models whose layers all look back to the beginning")
    if not common.has_weights(source):
        problems.append(f"{source} has no weights, only a configuration: train it first, or name another --model_path")
    if problems:
        common.fail(problems)
    if common.rank() == 0:
        log.info(f"{source}{' (the newest run under models/; --model_path names another)' if newest else ''}")
        if rawtune.get("script") == "clf.py":
            log.warning(f"{source} was trained by clf.py to answer one word; its scores: python clf.py --no_train --model_init_name ...")
        if rawtune.get("bidirectional_prompt"):
            log.warning("trained with --bidirectional_prompt; here the prompt is read from left to right, so replies will be worse")
    return source, config, tokenizer, prompts, found, part, done


def load(args, source, config, device):
    """The model in eval mode on its device; with several processes partitioned by ZeRO-3."""
    by_device = "fp32" if args.dtype == "auto" and device.type == "cpu" else args.dtype
    precision = common.resolve_precision(argparse.Namespace(precision=by_device))
    auto_class, many = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM, common.world_size() > 1
    ds_config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100000},
                 "bf16": {"enabled": precision == "bf16"}, "fp16": {"enabled": precision == "fp16"}}
    model = common.load_model(auto_class, source, config, model_args(args), precision, ds_config if many else {"zero_optimization": {"stage": 0}})
    model.requires_grad_(False)
    if args.compile and model.config._attn_implementation == "eager":  # which adds a mask where others apply it
        common.fail(f"--compile: not for a {config.model_type}, which has only eager attention; leave it out")
    n = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()) + sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, common.QuantizedLinear))
    log.info(f"{n / 1e6:.2f} M parameters, {precision} on {device.type}" + (f", ZeRO-3 over {common.world_size()} processes" if many else ""))
    if not many:
        return model.to(device).eval()
    engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    return engine.module.eval()


def main(args):
    common.adopt_launcher()
    common.start_log()
    in_terminal = not args.input and args.serve is None
    # piped, standard output is for the replies
    with contextlib.redirect_stdout(sys.stderr) if in_terminal and not sys.stdin.isatty() else contextlib.nullcontext():
        source, config, tokenizer, prompts, found, part, done = prepare(args)
        if common.world_size() > 1:
            device = common.setup_distributed()
        else:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else torch.device(args.device)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)  # set_device wants a number
            torch.cuda.set_device(device)
        model = load(args, source, config, device)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / common.local_world_size() / 4
        if device.type == "cuda":
            torch.cuda.empty_cache()
            memory = torch.cuda.mem_get_info(device)[0]
        if common.world_size() > 1:
            memory = common.broadcast(memory, device)  # all ranks decide alike
        engine = Engine(model, tokenizer, prompts, device, args.max_batch, 2048 if device.type == "cuda" else 512, 0.8 * memory, args.compile)
        if in_terminal:
            log.info(f"format {prompts.format}{'' if prompts.multi_turn else '; each message is a prompt of its own'}; /help lists the commands")
    if common.rank() > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        engine.run()
        return 0
    engine.start()
    if not in_terminal:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        if args.input:
            answer_file(args, engine, prompts, found, part, done)
        elif args.serve is not None:
            serve(args, engine, prompts, pathlib.Path(source).name)
        else:
            Terminal(args, engine, prompts).run()
    except KeyboardInterrupt:
        log.info(f"stopped{'; the same command continues' if args.input else ''}")
        return common.EXIT_SAVED if args.input else 0
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        return 1
    finally:
        engine.stop()
    return 0


def serve(args, engine, prompts, name):
    try:
        server = Server(args, engine, prompts, name)
    except OSError as error:
        common.fail(f"--serve {args.serve}: {args.host} port {args.serve} cannot be used ({error.strerror})")
    host = f"[{args.host}]" if ":" in args.host else args.host
    log.info(f"http://{host}:{server.server_port}  (page; OpenAI's API is at /v1, model {name!r}; Ctrl-C ends it)")
    try:
        server.serve_forever()
    finally:
        server.server_close()


if __name__ == "__main__":
    common.leave(main(parse_args()))
