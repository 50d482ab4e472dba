"""sft_causal.py: instruction and chat fine-tuning of decoder-only models (Llama, Qwen, Pythia, Gemma, GPT-2 ...), with DeepSpeed.

    {"instruction": "Add one to 41.", "input": "", "output": "42"}                                       data/<name>.jsonl
    {"messages": [{"role": "user", "content": "Reverse: abc"}, {"role": "assistant", "content": "cba"}]}
    {"prompt": "2 + 2 =", "completion": " 4"}      {"text": "..."}      OpenAssistant message trees

    python sft_causal.py                                                     # demo from scratch, 2 minutes on a laptop
    python sft_causal.py --model_init_path HuggingFaceTB/SmolLM2-135M --data mydata --packing            # one GPU
    python sft_causal.py --model_init_name llama-7b --data mydata --lora_rank 16 --quantize nf4          # one small GPU
    deepspeed --num_gpus 4 sft_causal.py --model_init_name llama-7b --data oasst gsm8k:0.05 --train_batch_size 64

Writes models/<training_run_name>/: metrics.jsonl, predictions (temperature=0.00_n=1_step=2000.json), checkpoint-<step>/
for resuming, and the trained model or adapter as a plain Hugging Face (PEFT) folder, whose tokenizer carries the chat
template it was trained with. docs/sft_causal.md explains every number.

Loss: sum over target tokens of -log p(token | tokens before), divided by the number of target tokens in the whole
optimizer step (all forward steps, all processes). Targets are what the assistant says and its end token.
Shapes: R rows (one document each, or several packed), S tokens of a row, N target tokens of a forward step, D hidden
size, V vocabulary. A document is one conversation (or text) as token ids.
"""

import collections
import concurrent.futures
import csv
import inspect
import itertools
import json
import math
import pathlib
import re
import sys
import time
import types

import common_v1 as common  # first: it prepares the import of DeepSpeed

import deepspeed
import jinja2
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AddedToken, AutoModelForCausalLM, GenerationConfig

from common_v1 import log

DEMO = ("--model_init_name tiny-llama --data instructions --training_run_name sft-demo --max_steps 1800 --train_batch_size 64 "
        "--learning_rate 0.006 --weight_decay 0.1 --warmup_steps 100 --eval_steps 900 --max_new_tokens 24 --logging_steps 50 --n_generate 300")
MAX_DROPPED = 0.01  # share of the documents that truncation may leave without a target
EVAL_METRICS = {"loss": "low", "perplexity": "low", "token_accuracy": "high", "exact_match": "high"}
TASK_METRICS = {"rouge1": "high", "rougeL": "high"}  # besides, of task folders
FREE_FLAGS = {"max_new_tokens", "temperature", "n_samples", "top_p", "zero3_generation", "n_generate", "show_examples", "write_results",
              "attention", "packing"}  # evaluation only, or another layout of the same mathematics

# Templates for tokenizers without one (--template). {bos} is filled in where the tokenizer puts a begin token in front.
TEMPLATES = {
    # The prompts of Taori et al. 2023 (Stanford Alpaca), with alpaca-lora's newline behind "### Response:", which keeps the reply's first
    # token apart; an input is part of the user's message, behind "### Input:"
    "alpaca": "{bos}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% elif '\\n\\n### Input:\\n' in "
              "messages[0]['content'] %}{{ 'Below is an instruction that describes a task, paired with an input that provides further "
              "context. Write a response that appropriately completes the request.\\n\\n' }}{% else %}{{ 'Below is an instruction that "
              "describes a task. Write a response that appropriately completes the request.\\n\\n' }}{% endif %}{% for message in messages %}"
              "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}"
              "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ('' if loop.last else '\\n\\n') }}"
              "{% elif not loop.first %}{{ raise_exception('a system message may only come first') }}{% endif %}{% endfor %}",
    # the "v2" format of Open-Assistant's model_training
    "oasst": "{bos}{% for message in messages %}{{ {'system': '<|system|>', 'user': '<|prompter|>', 'assistant': '<|assistant|>'}"
             "[message['role']] + message['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "chatml": "{bos}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "plain": "{bos}{% for message in messages %}{{ message['content'] + (eos_token if message['role'] == 'assistant' else "
             "sep_token or '\\n') }}{% endfor %}",
}
TEMPLATE_TOKENS = {"oasst": ["<|system|>", "<|prompter|>", "<|assistant|>"], "chatml": ["<|im_start|>", "<|im_end|>"]}

# ------------------------------------------------------------------------------------------------ arguments


def parse_args(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if not any(re.match(r"(@|--(model_init_name|model_init_path|data|data_name|data_format|task_dir)(=|$))", word) for word in argv):
        if common.rank() == 0 and not {"-h", "--help"} & set(argv):
            print("demo: python sft_causal.py", " ".join([DEMO, *argv]), flush=True)
        argv = DEMO.split() + argv
    parser = common.Parser(prog="sft_causal.py", description=__doc__.split("\n\n")[0])
    group = parser.add_argument_group("task")
    group.add_argument("--template", choices=["auto", *TEMPLATES], default="auto",
                       help="how a conversation becomes text; auto = the tokenizer's own, or chatml where it has none")
    group.add_argument("--targets", choices=["assistant", "last", "all"], default="assistant",
                       help="what counts in the loss: all assistant turns | the last one only | every token")
    group.add_argument("--raw_prompt", action="store_true", help="prompt and completion as they are, without a template")
    group.add_argument("--max_length", type=int, default=2048, help="longer documents are cut, and so wide may packed rows get [tokens]")
    group.add_argument("--truncation", choices=["end", "start", "random_window"], default="end",
                       help="what a long document loses: its end | its start | all but a window, another one each epoch")
    group.add_argument("--truncated_eos", action="store_true", help="end what lost its end with the end token all the same")
    group.add_argument("--packing", action="store_true", help="several documents in a row, none of which sees another")
    group.add_argument("--attention", choices=["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"], default="auto",
                       help="kernel in training; auto = flex_attention for packed rows on a GPU, else sdpa")
    group.add_argument("--loss", choices=["cross_entropy", "poly"], default="cross_entropy",
                       help="poly: cross entropy + poly_eps (1 - p) (Leng et al. 2022)")
    group.add_argument("--poly_eps", type=float, help="weight of the second term of --loss poly [no unit], default 1")
    group.add_argument("--neftune_alpha", type=float, default=0.0, help="noise on the embeddings in training (Jain et al. 2023) [no unit], 0 = off")
    group.add_argument("--bidirectional_prompt", action="store_true",
                       help="tokens before the first target see each other in both directions (prefix-LM, as GPT-JT)")
    group.add_argument("--oasst_paths", choices=["best", "all", "random"], default="best",
                       help="of a message tree: the best-ranked thread | one per leaf | another random one each epoch")
    group.add_argument("--oasst_lang", nargs="+", metavar="CODE", help="keep messages in these languages, default: all")
    group.add_argument("--oasst_min_quality", type=float, default=0.0, help="keep messages whose quality label is at least this [0-1], 0 = off")
    for name in ("pad", "eos", "sep"):
        group.add_argument(f"--{name}_token", help=f"the tokenizer's {name} token, one that it has or a new one [text]")
    group.add_argument("--show_examples", type=int, default=0, help="print this many documents of each data set, targets marked [count], 0 = off")
    group.add_argument("--n_generate", type=int, default=200, help="evaluation rows per data set that are answered in text [count], 0 = none")
    group.add_argument("--max_new_tokens", type=int, default=512, help="generation limit at evaluation [tokens]")
    group.add_argument("--temperature", type=float, default=0.001, help="sampling temperature; <= 0.001 = greedy [no unit]")
    group.add_argument("--n_samples", type=int, default=1, help="generations per prompt [count]")
    group.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens of this mass [0-1], 1 = off")
    group.add_argument("--zero3_generation", choices=["auto", "gathered", "synced"], default="auto",
                       help="under ZeRO-3 generate with a whole copy of the weights (gathered) or layer by layer (synced); "
                       "auto = gathered if it fits")
    group.add_argument("--write_results", metavar="FILE", help="append a row with the last metrics to this .csv [path]")
    common.add_task_args(parser)
    parser.add_argument("--max_source_length", type=int, help="of the prompts that --data_format ni or flan makes [tokens], default 1024")
    common.add_shared_args(parser)
    parser.set_defaults(num_epochs=3)
    args = parser.parse_args(argv)
    if args.debug:
        args.max_steps = 10
    if common.reads_tasks(args) and args.data_name == ["data"]:
        args.data_name = [args.data_format]
    return args


def check_args(args, problems):
    common.check_shared_args(args, problems)
    common.check_task_args(args, problems)
    if args.max_source_length is not None and (args.data_format == "records" or args.max_source_length < 2):
        problems.append(f"--max_source_length {args.max_source_length}: expected 2 or more tokens, and has no effect without --data_format ni or flan")
    for name, low in dict(max_length=4, max_new_tokens=1, n_samples=1, show_examples=0, n_generate=0, neftune_alpha=0,
                          oasst_min_quality=0, temperature=0).items():
        if not low <= getattr(args, name) < math.inf:
            problems.append(f"--{name} {getattr(args, name)}: expected {low} or more")
    if not 0 < args.top_p <= 1:
        problems.append(f"--top_p {args.top_p}: expected a share above 0, at most 1")
    if args.temperature <= 0.001 and args.n_samples > 1:
        problems.append(f"--n_samples {args.n_samples} at --temperature {args.temperature}: greedy decoding gives the same answer every time; "
                        "raise --temperature")
    if args.temperature <= 0.001 and args.top_p < 1:
        problems.append("--top_p has no effect in greedy decoding: raise --temperature")
    if args.truncated_eos and args.truncation != "end":
        problems.append(f"--truncated_eos has no effect with --truncation {args.truncation}, which leaves the end in place")
    if args.poly_eps is not None and (args.loss != "poly" or not math.isfinite(args.poly_eps)):
        problems.append(f"--poly_eps {args.poly_eps}: expected a finite number, and has no effect without --loss poly")
    if args.raw_prompt and args.template != "auto":
        problems.append(f"--raw_prompt uses no template: leave out --template {args.template}")
    if args.bidirectional_prompt and args.attention not in ("auto", "sdpa", "eager"):
        problems.append(f"--bidirectional_prompt needs a mask of its own, which --attention {args.attention} cannot take: use sdpa or eager")
    if args.bidirectional_prompt and args.targets == "all":
        problems.append("--bidirectional_prompt with --targets all: a prompt that is predicted must not see its own tokens")
    if args.packing and args.attention == "flash_attention_2" and args.precision in ("fp32", "fp64"):
        problems.append(f"--attention flash_attention_2 does not exist in {args.precision}")
    for name in ("pad_token", "eos_token", "sep_token", "write_results"):
        if getattr(args, name) == "":
            problems.append(f"--{name}: empty")
    if args.write_results and pathlib.Path(args.write_results).is_dir():
        problems.append(f"--write_results {args.write_results}: is a folder, expected a .csv file")
    names = [*EVAL_METRICS, *(TASK_METRICS if common.reads_tasks(args) else ())] + [f"{common.parse_data_spec(spec, [])[0]}/{name}" for spec in args.data_name
                                               for name in EVAL_METRICS if len(args.data_name) > 1]
    if args.metric_for_best and args.metric_for_best not in names:
        problems.append(f"--metric_for_best {args.metric_for_best}: expected one of {', '.join(names)}")
    if (args.metric_for_best or "").endswith(("exact_match", *TASK_METRICS)) and (not args.n_generate or args.bidirectional_prompt):
        problems.append(f"--metric_for_best {args.metric_for_best} needs generated answers: leave out --n_generate 0 and --bidirectional_prompt")


# ------------------------------------------------------------------------------------------------ template


def set_tokens(args, tokenizer, problems):
    """--pad_token, --eos_token, --sep_token; what the tokenizer lacks is a problem that names the flag."""
    for name in ("pad", "eos", "sep"):
        token = getattr(args, f"{name}_token")
        if token:
            if token not in tokenizer.get_vocab():
                tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
            setattr(tokenizer, f"{name}_token", token)
    has = ", ".join(repr(token) for token in tokenizer.all_special_tokens[:8]) or "none"
    for name, use in (("eos", "ends a document"), ("pad", "fills rows; the end token will do, as padding never counts")):
        if getattr(tokenizer, f"{name}_token") is None:
            problems.append(f"the tokenizer has no {name} token ({use}): --{name}_token TEXT, one of its special tokens ({has}) or a new one")


def set_template(args, tokenizer, problems):
    """Write the template into the tokenizer; -> (its name, the token that ends an assistant turn or None)."""
    name = args.template
    if name == "auto":
        name = "tokenizer" if tokenizer.chat_template else "chatml"
    if name in TEMPLATES:
        if tokenizer.chat_template:
            log.warning(f"--template {name} replaces the tokenizer's own template; a chat model goes on best with its own")
        new = [token for token in TEMPLATE_TOKENS.get(name, []) if token not in tokenizer.get_vocab()]
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
        tokenizer.chat_template = TEMPLATES[name].replace("{bos}", "{{ bos_token }}" if common.adds_bos(tokenizer) else "")
    if not tokenizer.is_fast:
        problems.append("the tokenizer has no fast version (tokenizer.json): the masks are made from its character positions")
        return name, None
    probe = [{"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "Blue."}]
    try:
        text, before = render(tokenizer, probe), render(tokenizer, probe[:1], True)
    except (jinja2.exceptions.TemplateError, TypeError) as error:
        problems.append(f"the chat template fails on a plain exchange ({error}); choose another --template")
        return name, None
    # the end token is the first special token behind what the assistant says
    found = re.match(rf"\s*({common.special_tokens(tokenizer).pattern})", text[text.rfind("Blue.") + 5:]) if "Blue." in text else None
    if not text.startswith(before) or not found:
        problems.append(f"the chat template writes no end token after an assistant turn (it ends with {text[-30:]!r}), so the model would never "
                        f"learn to stop; choose --template {' or '.join(TEMPLATES)}")
        return name, None
    ids = tokenizer(found[1], add_special_tokens=False).input_ids
    if len(ids) != 1:
        problems.append(f"the end token {found[1]!r} is not one id of this tokenizer but {len(ids)}; give another --eos_token or --template")
        return name, None
    return name, found[1]


def render(tokenizer, messages, reply_follows=False):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply_follows)


def chat_spans(tokenizer, messages, targets, end):
    """(text, [(start, stop)]) of a conversation that ends with the assistant: the characters of the assistant's turns, each up to
    and with its end token. What stands before a span is, to the letter, the prompt that a chat renders for that turn.

    Raises ValueError, which says what is wrong, for templates that write a turn in another way once others follow.
    """
    text, spans = render(tokenizer, messages), []
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in turns if targets != "last" else turns[-1:]:
        before = render(tokenizer, messages[:i], True)
        turn = text if i == turns[-1] else render(tokenizer, messages[: i + 1])
        stop = turn.rfind(end) + len(end)
        if not turn.startswith(before) or stop <= len(before) or text[:stop] != turn[:stop]:
            raise ValueError(f"the chat template writes turn {i + 1} in another way once others follow (or no end token behind it), so what is "
                             "trained is not what a chat sees; --targets last trains the last turn only")
        spans.append((len(before), stop))
    return text, spans


# ------------------------------------------------------------------------------------------------ data


def to_conversations(record, args, template):
    """([(probability, conversation)], key, what is wrong or None). A conversation is a list of messages, or (prompt, completion) of
    plain text; key: what two records share when one may give the other's answer away.

    {"instruction": "Add", "input": "1 2", "output": "3"} -> [(1.0, [user "Add\n\n1 2", assistant "3"])].
    """
    def wrong(text):
        return None, None, text

    def text_of(name):
        text = record.get(name)
        if text is None:
            return f"no {name!r} (has: {', '.join(map(str, record))})"
        if not isinstance(text, str):
            return f"{name!r} is a {type(text).__name__}, expected a string (numbers: put them in quotes)"
        if not text.strip():
            return f"{name!r} is empty; remove the record or fill it"
        return None

    def chat(user, assistant):
        return [(1.0, [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}])], user, None

    if "messages" in record:
        messages, problem = clean_messages(record["messages"])
        return wrong(problem) if problem else ([(1.0, messages)], json.dumps(messages[:-1]), None)
    if isinstance(record.get("prompt"), dict):  # a tree of OpenAssistant, nested
        paths = tree_paths(record["prompt"], args)
        return (paths, str(record["prompt"].get("text")), None)
    if "instruction" in record:
        names, extra = ("instruction", "output"), record.get("input")
        if extra is not None and not isinstance(extra, str):
            return wrong(f"'input' is a {type(extra).__name__}, expected a string (numbers: put them in quotes)")
    elif "prompt" in record or "completion" in record:
        names, extra = ("prompt", "completion"), None
    elif "text" in record:
        problem = text_of("text")
        return wrong(problem) if problem else ([(1.0, ("", record["text"]))], record["text"], None)
    else:
        return wrong(f"none of the known formats (has: {', '.join(map(str, record))}); expected 'messages', 'instruction' and 'output', "
                     "'prompt' and 'completion', 'text', or an OpenAssistant tree; see data/README.md")
    for name in names:
        if problem := text_of(name):
            return wrong(problem + ("" if name in record else f"; expected {names[0]!r} and {names[1]!r}"))
    first, second = record[names[0]], record[names[1]]
    if extra:
        first += ("\n\n### Input:\n" if template == "alpaca" else "\n\n") + extra
    if args.raw_prompt and "prompt" in record:
        return [(1.0, (first, second))], first, None
    return chat(first, second)


def clean_messages(messages):
    """(messages up to the last assistant turn, what is wrong or None)."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None, "'messages' is no list of objects with 'role' and 'content'"
    found = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            return None, f"messages[{i}] has no 'role' and 'content' that are strings (has: {', '.join(map(str, message))})"
        role = common.ROLES.get(role, role)
        if role == "assistant" and not content.strip():
            return None, f"messages[{i}]: the assistant's 'content' is empty; remove the record or fill it"
        found.append({"role": role, "content": content})
    last = max((i for i, message in enumerate(found) if message["role"] == "assistant"), default=None)
    if last is None:
        return None, f"no message of the role 'assistant' (roles: {', '.join(sorted({m['role'] for m in found})) or 'none'}), so nothing to learn"
    return found[: last + 1], None


def tree_paths(root, args):
    """[(probability, messages)] of an OpenAssistant tree {"text", "role", "replies": [...]}: threads that end with the assistant.

    best: at every message the reply with the lowest `rank`; all: each thread up to a leaf once; random: each thread with the probability
    that a walk over random replies takes it. Deleted, other-language and low-quality messages do not exist, nor do their replies.
    """
    def number(value):
        return value if isinstance(value, (int, float)) else math.inf

    def usable(node):
        if not isinstance(node, dict) or node.get("deleted") or node.get("role") not in ("prompter", "assistant"):
            return False
        labels = node.get("labels") if isinstance(node.get("labels"), dict) else {}
        quality = dict(zip(labels["name"], labels["value"])).get("quality") if {"name", "value"} <= set(labels) else labels.get("quality")
        quality = quality.get("value") if isinstance(quality, dict) else quality
        return (isinstance(node.get("text"), str) and bool(node["text"].strip()) and (not args.oasst_lang or node.get("lang") in args.oasst_lang)
                and number(quality) >= args.oasst_min_quality)

    paths, stack = {}, [(1.0, [root])] if usable(root) else []
    while stack:
        probability, path = stack.pop()
        replies = [reply for reply in path[-1].get("replies") or () if usable(reply) and reply["role"] != path[-1]["role"]]
        if args.oasst_paths == "best":
            replies = sorted(replies, key=lambda reply: number(reply.get("rank")))[:1]
        if replies:
            stack += [(probability / len(replies), [*path, reply]) for reply in reversed(replies)]
            continue
        while path and path[-1]["role"] != "assistant":
            path = path[:-1]
        if path:  # threads that only differed in an unanswered last question are one
            key = tuple(id(node) for node in path)
            messages = [{"role": common.ROLES.get(n["role"], n["role"]), "content": n["text"]} for n in path]
            paths[key] = (paths.get(key, (0.0, None))[0] + probability, messages)
    found = list(paths.values())
    if args.oasst_paths == "all":
        return [(1.0, messages) for _, messages in found]
    total = sum(probability for probability, _ in found)
    return [(probability / total, messages) for probability, messages in found]


def grow_trees(nodes, problems):
    """[(where, split, message)] of a flat OpenAssistant file -> [(where, split, {"message_tree_id", "prompt": nested})], and the number of
    messages whose parent is not in the file."""
    by_id, roots, n_orphans = {}, [], 0
    for where, _, node in nodes:
        if not isinstance(node["message_id"], str) or not isinstance(node.get("parent_id"), (str, type(None))) or node["message_id"] in by_id:
            problems.append(f"{where}: 'message_id' {node['message_id']!r}, 'parent_id' {node.get('parent_id')!r}: expected a string that no other "
                            "message has, and that of another message or null")
            return [], 0
        by_id[node["message_id"]] = {**node, "replies": []}
    for where, split, node in nodes:
        parent = node.get("parent_id")
        if parent is None:
            roots.append((where, split, {"message_tree_id": node.get("message_tree_id"), "tree_state": node.get("tree_state"),
                                         "prompt": by_id[node["message_id"]]}))
        elif parent in by_id:
            by_id[parent]["replies"].append(by_id[node["message_id"]])
        else:
            n_orphans += 1
    return roots, n_orphans


def read_examples(files, args, template, tokenizer, problems, counts):
    """Yield (where, split, record, [(probability, conversation)], key) of one data set, see `examples_of`. Task folders: a conversation for each
    prompt and reference."""
    if not common.reads_tasks(args):
        for split, path in files.items():
            for where, own, record, conversations, key in examples_of(path, split or "train", args, template, problems, counts):
                yield where, "eval" if own == "train" and common.is_held_out(args, "text", key) else own, record, conversations, key
        return
    for where, split, record, prompts, references, key in common.task_examples(args, files, tokenizer, args.max_source_length or 1024, "text",
                                                                               problems, counts):
        pairs = [(prompt, reference) for prompt in prompts for reference in references]
        conversations = pairs if args.raw_prompt else [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
        yield where, split, record, [(1 / len(pairs), conversation) for conversation in conversations], key


def examples_of(path, default_split, args, template, problems, counts):
    """Yield (where, split, record, [(probability, conversation)], key) of one file. A record is one example; of --oasst_paths all, every
    thread is one. The messages of a flat OpenAssistant file are joined to trees at its end."""
    flat = []

    def records():
        for where, split, record in common.read_records(path, problems, default_split):
            if split not in ("train", "eval", "test"):
                problems.append(f"{where}: split {split!r}, expected train, eval or test")
            elif "message_id" in record and "text" in record:
                flat.append((where, split, record))
            else:
                yield where, split, record
        trees, n_orphans = grow_trees(flat, problems)
        counts["messages without their parent"] += n_orphans
        yield from trees

    for where, split, record in records():
        conversations, key, wrong = to_conversations(record, args, template)
        if wrong:
            problems.append(f"{where}: {wrong}")
        elif (record.get("tree_state") or "ready_for_export") != "ready_for_export" or not conversations:
            counts["trees without a usable thread"] += 1
        elif isinstance(record.get("prompt"), dict):
            counts["trees"] += 1
            # a whole tree would be a lot to carry along
            record = {"message_tree_id": record.get("message_tree_id")}
            for group in [[thread] for thread in conversations] if args.oasst_paths == "all" else [conversations]:
                yield where, split, record, group, key
        else:
            yield where, split, record, conversations, key


def encode(tokenizer, conversations, args, end):
    """[(ids (n,) int64, is_target (n,) bool, [tokens before each reply]) or what is wrong] of a list of conversations.

    Chat: the ids are those of the whole rendered text, so they are apply_chat_template's; a token is a target when it begins inside a span
    of the assistant. Plain text: prompt and completion are tokenised apart, a begin token in front where the tokenizer puts one.
    """
    found, texts, work = [None] * len(conversations), [], []  # work: (place, spans or None for plain text, whose two texts follow)
    begin, specials = [tokenizer.bos_token_id] if common.adds_bos(tokenizer) else [], common.special_tokens(tokenizer)
    for i, conversation in enumerate(conversations):
        contents = conversation if isinstance(conversation, tuple) else [message["content"] for message in conversation]
        if special := next(filter(None, map(specials.search, contents)), None):
            found[i] = f"the text holds the special token {special[0]!r}, which would be read as one; remove it"
        elif any(not text.isascii() and re.search("[\ud800-\udfff]", text) for text in contents):
            found[i] = "the text holds half a character (a lone \\ud800-\\udfff escape); remove it or write the file as UTF-8"
        elif isinstance(conversation, tuple):
            texts += contents
            work.append((i, None))
        else:
            try:
                text, of_text = chat_spans(tokenizer, conversation, args.targets, end)
            except jinja2.exceptions.TemplateError as error:
                found[i] = f"the chat template refuses this conversation: {error}"
            except (ValueError, TypeError, KeyError) as error:
                found[i] = str(error)
            else:
                texts.append(text)
                work.append((i, of_text))
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True) if texts else {"input_ids": [], "offset_mapping": []}
    rows = iter(zip(encoded["input_ids"], encoded["offset_mapping"]))
    for i, of_text in work:
        ids, offsets = next(rows)
        if of_text is None:
            n_prompt, ids = len(begin) + len(ids), [*begin, *ids, *next(rows)[0], tokenizer.eos_token_id]
            found[i] = np.array(ids), np.arange(len(ids)) >= n_prompt, [n_prompt if n_prompt > len(begin) else 0]
            continue
        starts, stops = np.array(offsets).reshape(-1, 2).T
        is_target = np.zeros(len(ids), bool)
        for start, stop in of_text:
            is_target |= (starts >= start) & (starts < stop)
            if ((starts < start) & (stops > start)).any():
                found[i] = ("a token reaches over the border of prompt and reply, so a chat would never see this prompt; take away the blanks or "
                            "newlines where the reply begins")
        if found[i] is None:
            found[i] = np.array(ids), is_target, [int((starts < start).sum()) for start, _ in of_text]
    if args.targets == "all":
        found = [f if isinstance(f, str) else (f[0], np.ones(len(f[0]), bool), f[2]) for f in found]
    return found


def check_ids(tokenizer, messages, ids, before, targets):
    """What is wrong with the ids of a conversation, or None: they must be apply_chat_template's, whole and before every reply."""
    def template_ids(messages, reply_follows):
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=reply_follows))
    if template_ids(messages, False) != ids.tolist():
        return "its ids are not those of apply_chat_template"
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for n, i in zip(before, turns if targets != "last" else turns[-1:], strict=True):
        if template_ids(messages[:i], True) != ids[:n].tolist():
            return (f"the prompt of message {i + 1} has other ids alone than inside the conversation; take away blanks or newlines where the "
                    "reply begins, or choose another --template")
    return None


def truncate(ids, is_target, limit, how, bos, end_id):
    """Cut a document to `limit` tokens. end: its end goes, and with it the end token (end_id: written there all the same, or None); start:
    its start goes, a begin token stays. ([1, 5, 6, 7], ., 3, "start", 1, None) -> [1, 6, 7]."""
    if len(ids) > limit and how == "end":
        ids, is_target = ids[:limit].copy(), is_target[:limit]
        if end_id is not None and is_target[-1]:
            ids[-1] = end_id
    elif len(ids) > limit:
        kept = limit - (ids[0] == bos)
        ids, is_target = np.concatenate([ids[: limit - kept], ids[-kept:]]), np.concatenate([is_target[: limit - kept], is_target[-kept:]])
    is_target = is_target.copy()
    is_target[0] = False  # nothing comes before it that could predict it; also a begin token
    return ids, is_target


def seal(ids, is_target):
    """One int32 array for both: a target is stored as ~id, which is negative. So a mask cannot part from its tokens."""
    return np.where(is_target, ~ids, ids).astype(np.int32)


def unseal(row):
    """-> (ids (n,) int64, is_target (n,) bool)."""
    row = np.asarray(row, np.int64)
    return np.where(row < 0, ~row, row), row < 0


def text_hash(text):
    return np.int64(common.derive_seed("text", text))


def tokenize_data_set(files, folder, tokenizer, template, end, args, problems):
    """Read, check and tokenise one data set into `folder`, in blocks of 500 examples; returns its counts.

    Per split: documents (.tokens), cumulative probabilities of the documents of an example (.edges, see `TrainingData.start_epoch`), target
    tokens of each document (.n_targets), hashes of the prompts (.hashes); evaluation rows also have what comes before their last reply
    (.prompt) and .jsonl.
    """
    splits = ("train", "eval", "test")
    writers = {(split, name): common.RaggedWriter(folder / f"{split}.{name}") for split in splits for name in ("tokens", "prompt")}
    columns = {(split, name): open(folder / f"{split}.{name}", "wb") for split in splits for name in ("edges", "n_targets", "hashes")}
    kept = {split: open(folder / f"{split}.jsonl", "w", encoding="utf-8", errors="backslashreplace") for split in splits[1:]}
    counts, end_id, n_checked = collections.Counter({split: 0 for split in splits}), tokenizer.convert_tokens_to_ids(end), 0

    def flush(block):
        nonlocal n_checked
        encoded = iter(encode(tokenizer, [conversation for *_, conversations, _ in block for _, conversation in conversations], args, end))
        for where, split, record, conversations, key in block:
            rows = [(probability, conversation, next(encoded)) for probability, conversation in conversations]
            if bad := [wrong for _, _, wrong in rows if isinstance(wrong, str)]:
                problems.append(f"{where}: {bad[0]}")
                continue
            documents = []
            for probability, conversation, (ids, is_target, before) in rows:
                if n_checked < 100 and not isinstance(conversation, tuple):
                    n_checked += 1
                    if wrong := check_ids(tokenizer, conversation, ids, before, args.targets):
                        problems.append(f"{where}: {wrong}")
                counts["documents"] += 1
                counts["long"] += len(ids) > args.max_length
                prompt, is_window = ids[:before[-1]], args.truncation == "random_window"
                limit = len(ids) if is_window and split == "train" else args.max_length  # windows are cut anew each epoch
                ids, is_target = truncate(ids, is_target, limit, "start" if is_window else args.truncation, tokenizer.bos_token_id,
                                          end_id if args.truncated_eos else None)
                if is_target.any():
                    documents.append((probability, conversation, ids, is_target, prompt))
                else:
                    counts["dropped"] += 1
            if not documents:
                continue
            if split != "train" and len(documents) > 1:  # of a tree: its likeliest thread
                documents = [max(documents, key=lambda document: document[0])]
            total, reached = math.fsum(d[0] for d in documents), 0.0
            for probability, conversation, ids, is_target, prompt in documents:
                reached += probability / total
                writers[split, "tokens"].append(seal(ids, is_target))
                columns[split, "edges"].write(np.float64(counts[split] + min(1.0, reached)).tobytes())
                columns[split, "n_targets"].write(np.int64(is_target.sum()).tobytes())
            counts[split] += 1
            columns[split, "hashes"].write(text_hash(key).tobytes())
            if split != "train":
                writers[split, "prompt"].append(prompt)
                before, reply = conversation if isinstance(conversation, tuple) else (conversation[:-1], conversation[-1]["content"])
                kept[split].write(json.dumps({"prompt": before, "completion": reply, "orig_d": record}, ensure_ascii=False) + "\n")

    for block in common.in_blocks(read_examples(files, args, template, tokenizer, problems, counts), 500, "examples"):
        flush(block)
    for file in [*writers.values(), *columns.values(), *kept.values()]:
        file.close()
    return dict(counts)


def marked(tokenizer, ids, is_target):
    """The document as text, targets between ⟦ and ⟧."""
    borders = [0, *(np.flatnonzero(np.diff(is_target.astype(int))) + 1), len(ids)]
    parts = [(tokenizer.decode(ids[a:b]), is_target[a]) for a, b in zip(borders, borders[1:])]
    return "".join(f"⟦{text}⟧" if target else text for text, target in parts)


class DataSet:
    """One tokenised data set: documents stay on disk; evaluation records are in memory."""

    def __init__(self, name, amount, folder, limit):
        self.name, self.amount = name, amount
        self.sha256, self.counts = folder.name, json.loads((folder / "counts.json").read_text())
        splits = ("train", "eval", "test")
        self.tokens, self.prompt = ({split: common.Ragged(folder / f"{split}.{name}") for split in splits} for name in ("tokens", "prompt"))
        self.edges, self.n_targets, self.hashes = (
            {split: np.fromfile(folder / f"{split}.{name}", kind) for split in splits}
            for name, kind in (("edges", np.float64), ("n_targets", np.int64), ("hashes", np.int64)))
        self.records = {split: [json.loads(line) for line in open(folder / f"{split}.jsonl", encoding="utf-8")][:limit]
                        for split in ("eval", "test")}


def load_data(args, tokenizer, template, end, problems):
    """All data sets of --data, tokenised once into the cache. Runs before any process group exists: no time-out to hit."""
    data_sets = []
    for spec in args.data_name:
        name, amount = common.parse_data_spec(spec, problems)
        files = common.find_data(args, name, problems)
        if not files or end is None:
            # no tokenizer: still report what is wrong with the records
            collections.deque(read_examples(files, args, template, tokenizer, problems, collections.Counter()), 0)
            continue
        before = len(problems)
        settings = [tokenizer.chat_template, template, args.max_length, args.truncation, args.truncated_eos, args.targets, args.raw_prompt,
                    args.oasst_paths, args.oasst_lang, args.oasst_min_quality, args.eval_fraction, args.max_source_length, *common.task_settings(args)]
        root, key = common.token_cache(args, "sft 2", files, tokenizer, settings)
        try:
            with common.cache_folder(root, key, problems) as (folder, is_new):
                if is_new:
                    common.write_json(folder / "counts.json", tokenize_data_set(files, folder, tokenizer, template, end, args, problems))
        except OSError as error:
            problems.append(f"the token cache cannot be written ({error}); --cache_dir names another folder")
            continue
        if len(problems) > before:
            continue
        data = DataSet(name, amount, root / key, 100 if args.debug else None)
        data_sets.append(data)
        check_counts(args, data, next(iter(files.values())), problems)
    tree_flags = [f"--{name}" for name, off in (("oasst_paths", "best"), ("oasst_lang", None), ("oasst_min_quality", 0.0)) if getattr(args, name) != off]
    if tree_flags and len(data_sets) == len(args.data_name) and not any(d.counts.get("trees") for d in data_sets):
        problems.append(f"{', '.join(tree_flags)}: no effect, there is no OpenAssistant tree in {', '.join(args.data_name)}")
    common.check_evaluation_parts(args, data_sets, "prompts", problems)
    return data_sets


def check_counts(args, data, path, problems):
    """What only the whole data set shows: empty splits, amounts, truncation, documents that lost every target."""
    counts = data.counts
    common.check_training_part(args, data, path, problems)
    if counts.get("long"):
        log.warning(f"{data.name}: {counts['long']} of {counts['documents']} documents are longer than --max_length {args.max_length} tokens "
                    f"and are cut (--truncation {args.truncation})")
    if counts.get("dropped"):
        text = (f"{data.name}: {counts['dropped']} of {counts['documents']} documents have no target token left after truncation to "
                f"--max_length {args.max_length} tokens")
        if counts["dropped"] > MAX_DROPPED * counts["documents"]:
            problems.append(f"{text}; raise it, or use --truncation start, which keeps the end")
        else:
            log.warning(f"{text} and are left out")
    for what in ("trees without a usable thread", "messages without their parent"):
        if counts.get(what):
            log.warning(f"{data.name}: {counts[what]} {what} are left out")
    common.warn_of_shortened_prompts(data, args.max_source_length or 1024)


def best_fit(ids, lengths, capacity):
    """Rows of example numbers with at most `capacity` tokens each: the longest first, each into the fullest row that still takes it (best-fit
    decreasing). best_fit([0, 1, 2, 3], [5, 4, 3, 2], 7) -> [[0, 3], [1, 2]]."""
    rows, free = [], []
    for i in ids[np.argsort(-lengths[ids], kind="stable")]:
        fits = [r for r, room in enumerate(free) if room >= lengths[i]]
        r = min(fits, key=lambda r: free[r]) if fits else len(rows)
        if not fits:
            rows.append([])
            free.append(capacity)
        rows[r].append(int(i))
        free[r] -= lengths[i]
    return rows


def pack(ids, lengths, limit, width, sparse):
    """Rows for one forward step: best fit at the capacity, up to `limit` tokens, where the rows cost least to compute.

    Cost of R rows of S tokens, in tokens: R S (1 + S / 4 width), the second part being attention over the whole row; sparse kernels skip
    what other documents hold, so for them the widest rows are best. No ids: no rows.
    """
    if not len(ids):
        return []
    best_cost, best_rows, capacity = math.inf, None, int(lengths[ids].max())
    while True:
        rows = best_fit(ids, lengths, max(capacity, limit) if sparse else capacity)
        S = max(int(lengths[row].sum()) for row in rows)
        cost = len(rows) * S * (1 if sparse else 1 + S / (4 * width))
        if cost < best_cost:
            best_cost, best_rows = cost, rows
        if sparse or len(rows) == 1 or capacity >= limit:
            return best_rows
        capacity = min(limit, max(capacity + 1, capacity * 3 // 2))


def collate(rows, documents, pad_id, packed=False, prefix=False, noise=False):
    """Rows of example numbers -> tensors. documents[i]: example i as `seal` stores it.

    input_ids: (R, S). target_index: (N,) positions in the flattened (R x S) hidden states; target_ids, target_example: (N,). The shift
    happens here and only here: position t predicts token t + 1. What the options need besides, (R, S) each: packed, position_ids, which
    restart with each document (and with the padding, which so is a document of its own); prefix, document (numbers from 1) and is_prompt;
    noise, document_length. No rows (this rank has no example): one token in, and no target.
    """
    S = max((sum(len(documents[i]) for i in row) for row in rows), default=1)
    shape = (max(1, len(rows)), S)
    input_ids, positions, number = np.full(shape, pad_id), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    is_prompt, length = np.zeros(shape, bool), np.ones(shape, np.int64)
    index, targets, example = [], [], []
    positions[:] = np.arange(S)
    for r, row in enumerate(rows):
        t = 0
        for n, i in enumerate(row, 1):
            ids, is_target = unseal(documents[i])
            here = slice(t, t + len(ids))
            input_ids[r, here], positions[r, here], number[r, here], length[r, here] = ids, np.arange(len(ids)), n, len(ids)
            wanted = np.flatnonzero(is_target)  # never 0, see `truncate`
            is_prompt[r, t: t + wanted[0]] = True
            index.append(r * S + t + wanted - 1)
            targets.append(ids[wanted])
            example.append(np.full(len(wanted), i))
            t += len(ids)
        positions[r, t:] = np.arange(S - t)
    index, targets, example = (np.concatenate(parts) if parts else np.empty(0, np.int64) for parts in (index, targets, example))
    arrays = {"input_ids": input_ids, "target_index": index, "target_ids": targets, "target_example": example}
    arrays.update({"position_ids": positions} if packed else {})
    arrays.update({"document": number, "is_prompt": is_prompt} if prefix else {})
    arrays.update({"document_length": length} if noise else {})
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class TrainingData:
    """The forward steps of optimizer step k, for this rank: a pure function of (seed, k) and the effective batch."""

    def __init__(self, args, data_sets, width, vocabulary, pad_id, sparse):
        self.args, self.width, self.vocabulary, self.pad_id, self.sparse = args, width, vocabulary, pad_id, sparse
        self.parts = [d.tokens["train"] for d in data_sets]
        self.sizes, self.amounts = [d.counts["train"] for d in data_sets], [d.amount for d in data_sets]
        self.starts = np.cumsum([0, *(len(tokens) for tokens in self.parts)])  # of the documents of each data set
        self.edges = np.concatenate([d.edges["train"] + before for d, before in zip(data_sets, np.cumsum([0, *self.sizes]))])
        self.document_lengths = np.concatenate([tokens.lengths for tokens in self.parts])
        self.document_targets = np.concatenate([d.n_targets["train"] for d in data_sets])
        self.batch = args.train_batch_size * args.gradient_accumulation_steps
        self.per_epoch = len(common.mixed_epoch(self.sizes, self.amounts, args.seed, 0))
        self.steps_per_epoch = -(-self.per_epoch // self.batch)
        self.epoch = None

    def document(self, n):
        part = int(np.searchsorted(self.starts, n, side="right")) - 1
        return self.parts[part][n - self.starts[part]]

    def start_epoch(self, epoch):
        """Which document of each example, which window of it, and the order of the examples: functions of (seed, epoch)."""
        ids, limit = common.mixed_epoch(self.sizes, self.amounts, self.args.seed, epoch), self.args.max_length
        rng = np.random.default_rng([self.args.seed, 3, epoch])
        n = sum(self.sizes)
        # edges of example i run up to i + 1; a draw below that picks one of its documents by its probability
        self.chosen = np.minimum(np.searchsorted(self.edges, np.arange(n) + rng.random(n), side="right"), len(self.edges) - 1)
        self.lengths, self.n_targets = self.document_lengths[self.chosen], self.document_targets[self.chosen].copy()
        self.windows = {}
        if self.args.truncation == "random_window":
            for i in ids[self.lengths[ids] > limit]:
                start, self.n_targets[i] = random_window(unseal(self.document(self.chosen[i]))[1], limit, np.random.default_rng(
                    [self.args.seed, 4, epoch, int(i)]))
                self.windows[int(i)] = start
            self.lengths = np.minimum(self.lengths, limit)
        lengths = np.stack([self.lengths, self.lengths], 1)
        self.epoch, self.batches = epoch, common.epoch_batches(ids, lengths, self.batch, self.args.seed, epoch)

    def step_ids(self, step):
        """Example numbers of optimizer step `step`, counted from 0."""
        epoch, i = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.start_epoch(epoch)
        return self.batches[i]

    def example(self, i):
        """What is trained of example i in this epoch, as `seal` stores it."""
        row = np.asarray(self.document(self.chosen[i]))
        if i in self.windows:
            row = row[self.windows[i]: self.windows[i] + self.args.max_length].copy()
            row[0] = ~row[0] if row[0] < 0 else row[0]  # nothing before it
        return row

    def micro_batches(self, step):
        """[(batch, number of logits chunks, tokens)] of this rank, one per forward step, and the target tokens of the whole step."""
        ids, world, n_micro = self.step_ids(step), common.world_size(), self.args.gradient_accumulation_steps
        pieces = common.deal(ids, self.lengths, world * n_micro)
        batches = []
        for g in range(n_micro):
            together = pieces[g * world: (g + 1) * world]  # what all ranks compute at once: pieces of like size
            # under ZeRO-3 every rank must call the head equally often, so the number of chunks is common
            n_chunks = max(1, -(-max(int(self.n_targets[p].sum()) for p in together) // common.chunk_tokens(self.vocabulary)))
            mine = together[common.rank()]
            rows = pack(mine, self.lengths, self.args.max_length, self.width, self.sparse) if self.args.packing else [[int(i)] for i in mine]
            batches.append((collate(rows, {int(i): self.example(int(i)) for i in mine}, self.pad_id, self.args.packing,
                                    self.args.bidirectional_prompt, self.args.neftune_alpha > 0), n_chunks, int(self.lengths[mine].sum())))
        return batches, int(self.n_targets[ids].sum())


def random_window(is_target, limit, rng):
    """(start, targets in it) of a random window of `limit` tokens that has a target; its first token counts as none."""
    before = np.concatenate([[0], np.cumsum(is_target)])
    starts = np.arange(len(is_target) - limit + 1)
    inside = before[starts + limit] - before[starts + 1]
    start = int(rng.choice(np.flatnonzero(inside)))
    return start, int(inside[start])


# ------------------------------------------------------------------------------------------------ model and loss


class CrossEntropy(torch.autograd.Function):
    """-log p of each target: logits (N, V) fp32 or fp64, target_ids (N,) -> (N,). Overwrites the logits, in the forward
    pass by exp(logits - max) and in the backward pass by the gradient, softmax - target: F.cross_entropy holds four
    buffers of that size, which costs a third of the head's time on CPU."""

    @staticmethod
    def forward(ctx, logits, target_ids):
        wanted = logits.gather(1, target_ids[:, None]).squeeze(1)
        top = logits.amax(1, keepdim=True)
        sums = logits.sub_(top).exp_().sum(1)
        ctx.save_for_backward(logits, sums, target_ids)
        return sums.log() + top.squeeze(1) - wanted

    @staticmethod
    def backward(ctx, grad):
        exps, sums, target_ids = ctx.saved_tensors
        exps.mul_((grad / sums)[:, None])
        return exps.scatter_add_(1, target_ids[:, None], -grad[:, None]), None


def poly_loss(losses, eps):
    """PolyLoss (Leng et al. 2022, eq. 5): CE + eps (1 - p), p = exp(-CE). losses: (N,). poly_loss(log 2, 1) = log 2 + 0.5."""
    return losses - eps * torch.expm1(-losses)


class TargetLosses(torch.nn.Module):
    """What the engine wraps: forward(batch) -> (N,) fp32 cross entropy of every target token; with_hits: (2, N), second row 1.0 where the
    likeliest token is the target."""

    def __init__(self, model, neftune_alpha=0.0):
        super().__init__()
        self.model, self.noise, self.document_length = model, neftune_alpha, None
        self.takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
        if neftune_alpha:
            model.get_input_embeddings().register_forward_hook(self.add_noise)

    def add_noise(self, module, inputs, embedded):
        """NEFTune (Jain et al. 2023): uniform noise of size alpha / sqrt(tokens of the document x D). embedded: (R, S, D)."""
        if not self.training or self.document_length is None:
            return embedded
        scale = self.noise / (self.document_length * embedded.shape[-1]).to(embedded.dtype).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * scale[..., None]

    def hidden(self, batch):
        """(R, S, D) last hidden states."""
        self.document_length = batch.get("document_length")
        options = {"position_ids": batch["position_ids"]} if "position_ids" in batch and self.takes_positions else {}
        if "is_prompt" in batch:
            options["attention_mask"] = self.prefix_mask(batch["document"], batch["is_prompt"])
        # no mask for padding: it comes last, and no token sees what follows it
        return self.model.base_model(input_ids=batch["input_ids"], use_cache=False, **options).last_hidden_state

    def prefix_mask(self, document, is_prompt):
        """(R, 1, S, S), True = may attend: what came before in the document, and its whole prompt, which so sees itself both ways."""
        causal = torch.ones(document.shape[1:] * 2, dtype=torch.bool, device=document.device).tril()
        seen = (document[:, :, None] == document[:, None]) & (causal | is_prompt[:, None])
        seen = seen.unsqueeze(1)
        if self.model.config._attn_implementation == "eager":  # eager attention adds its mask to the scores
            dtype = self.model.dtype
            return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return seen

    def forward(self, batch, n_chunks=1, with_hits=False):
        hidden = self.hidden(batch).flatten(0, 1)[batch["target_index"]]  # (N, D): no logits where there is no target
        head, config = self.model.get_output_embeddings(), self.model.config

        def chunk_losses(hidden, target_ids):
            logits = common.finish_logits(config, head(hidden))
            logits = logits if logits.dtype == torch.float64 else logits.float()
            hits = logits.argmax(1) == target_ids if with_hits else None  # CrossEntropy overwrites them
            losses = CrossEntropy.apply(logits, target_ids)
            return torch.stack([losses, hits.to(losses.dtype)]) if with_hits else losses
        pairs = list(zip(hidden.tensor_split(n_chunks), batch["target_ids"].tensor_split(n_chunks)))
        if n_chunks == 1 or not torch.is_grad_enabled():
            return torch.cat([chunk_losses(h, t) for h, t in pairs], -1)
        # several chunks are recomputed in the backward pass, so that only one holds logits at a time
        return torch.cat([checkpoint(chunk_losses, h, t, use_reentrant=False) for h, t in pairs], -1)


@torch.no_grad()
def check_model(args, engine, documents, pad_id, device):
    """Collective. Two identities, on real documents, before anything is trained: our logits are the model's own; and with --packing no
    document sees another, and its positions restart. documents: (n,) int32 arrays, of which a few tokens are taken."""
    module, model = engine.module, engine.module.model
    engine.eval()
    ids = np.resize(np.concatenate([unseal(document)[0] for document in documents]), 25)
    two = [seal(part, np.arange(len(part)) >= len(part) - 2) for part in (ids[:14], ids[14:])]
    other = [seal(ids[13::-1], np.arange(14) >= 12), two[1]]  # another first document of the same length
    prefix = args.bidirectional_prompt

    def states(documents, rows, packed):
        batch = common.to_device(collate(rows, documents, pad_id, packed, prefix), device)
        return module.hidden(batch), batch
    with torch.autocast(device.type, torch.bfloat16, enabled=engine.torch_autocast_enabled()):
        alone, batch = states(two, [[1]], False)
        mask = {"attention_mask": module.prefix_mask(batch["document"], batch["is_prompt"])} if prefix else {}
        wanted = model(input_ids=batch["input_ids"], use_cache=False, **mask).logits
        ours = common.finish_logits(model.config, model.get_output_embeddings()(alone))
        packed = [states(pair, [[0, 1]], True)[0][:, len(two[0]): len(two[0]) + len(two[1])] for pair in (two, other)] if args.packing else None
    engine.train()
    loose = 1e-3 if model.dtype in (torch.float32, torch.float64) and not engine.torch_autocast_enabled() else 0.1

    def differ(a, b):
        return float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
    family = model.config.model_type
    if differ(ours.double(), wanted.double()) > loose:
        common.fail(f"{family}: this model does something to its logits that sft_causal.py does not know (they differ by "
                    f"{differ(ours.double(), wanted.double()):.2g}); `common.finish_logits` is the place to add it")
    if args.packing and (differ(*packed) > loose / 1000 or differ(packed[0].double(), alone.double()) > loose):
        common.fail(f"--packing: a {family} with --attention {model.config._attn_implementation} does not keep the documents of a row apart; "
                    "leave out --packing")


def train_flops(model, n_tokens, n_targets):
    """Floating-point operations of a training step, embeddings left out: the layers see all tokens, the head target tokens."""
    head = (6 if model.get_output_embeddings().weight.requires_grad else 4) * model.config.vocab_size * model.config.hidden_size
    return common.flops_per_token(model.base_model, "embed|wte|wpe") * n_tokens + head * n_targets


# ------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def generate(args, engine, tokenizer, rows, stop_ids, step, device):
    """Collective. rows: [(row number, prompt ids)] -> {row: [n_samples texts]} of this rank's share. Prompts are padded on the left."""
    per_batch = max(1, args.eval_batch_size // args.n_samples)
    mine, n_rounds = common.my_batches(len(rows), np.array([len(prompt) for _, prompt in rows]), per_batch)
    if not rows:
        return {}
    sampled, pad_id, texts = args.temperature > 0.001, tokenizer.pad_token_id, {}
    model, synced = common.generating_model(args, engine, device)
    limit = getattr(model.config, "max_position_embeddings", None)
    limit = max(1, limit - args.max_new_tokens) if limit else None
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "min_length": 0, "num_beams": 1, "eos_token_id": stop_ids,
               "pad_token_id": pad_id, "use_cache": True, "num_return_sequences": 1, "repetition_penalty": 1.0}
    for round_ in tqdm(range(n_rounds if synced else len(mine)), desc="generating", delay=5, disable=common.rank() > 0 or None, leave=False):
        batch = mine[round_] if round_ < len(mine) else []  # none left: keep the others company with one token
        prompts = [np.asarray(rows[i][1])[-limit:] if limit else np.asarray(rows[i][1]) for i in batch] or [np.array([pad_id])]
        if sampled:
            prompts = [prompt for prompt in prompts for _ in range(args.n_samples)]
            keys = [common.derive_seed(args.seed, "sample", step, rows[i][0], n) for i in batch for n in range(args.n_samples)]
            keys = torch.tensor(keys or [0] * args.n_samples, device=device)
        width = max(map(len, prompts))
        options["logits_processor"] = [common.RowKeyedSampler(keys, args.temperature, args.top_p, width)] if sampled else []
        input_ids = torch.from_numpy(np.stack([np.pad(prompt, (width - len(prompt), 0), constant_values=pad_id) for prompt in prompts]))
        # the mask is made from lengths: padding may have the id of the end token
        attention_mask = torch.arange(width) >= torch.tensor([[width - len(prompt)] for prompt in prompts])
        with torch.autocast(device.type, torch.bfloat16, enabled=engine.torch_autocast_enabled()):
            out = model.generate(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), synced_gpus=synced, **options)
        decoded = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        for n, i in enumerate(batch):
            texts[rows[i][0]] = decoded[n * args.n_samples: (n + 1) * args.n_samples]
    return texts


@torch.no_grad()
def row_losses(args, engine, documents, n_targets, vocabulary, pad_id, device):
    """Collective. documents: [as `seal` stores them] -> {row: (summed loss, right tokens, target tokens)} of this rank's share."""
    mine, n_rounds = common.my_batches(len(documents), np.array([len(document) for document in documents]), args.eval_batch_size)
    rounds, found = n_rounds if engine.zero_optimization_partition_weights() else len(mine), {}
    n_chunks = -(-args.eval_batch_size * max(n_targets, default=1) // common.chunk_tokens(vocabulary))  # on every rank the same
    for round_ in tqdm(range(rounds), desc="loss", delay=5, disable=common.rank() > 0 or None, leave=False):
        rows = [[i] for i in mine[round_]] if round_ < len(mine) else []
        batch = collate(rows, documents, pad_id, prefix=args.bidirectional_prompt)
        losses, hits = engine(common.to_device(batch, device), n_chunks, True).double().cpu()
        for i in (i for row in rows for i in row):
            of_row = batch["target_example"] == i
            found[i] = (float(losses[of_row].sum()), int(hits[of_row].sum()), int(of_row.sum()))
    return found


def evaluate(args, engine, tokenizer, data_sets, split, stop_ids, step, run_dir, device):
    """Collective. Loss, perplexity and token accuracy over the target tokens of `split`, exact match of the generated last replies; writes
    the predictions file; returns the metrics on every rank. Every row is counted once."""
    rows = [(d, i) for d in data_sets for i in range(len(d.records[split]))]
    spread = common.reads_tasks(args)  # over all tasks, which come one after the other; else the first rows
    asked = [n for n, (d, i) in enumerate(rows) if (i < args.n_generate if not spread or len(rows) <= args.n_generate else
                                                    (i + 1) * args.n_generate // len(rows) > i * args.n_generate // len(rows))
             and len(d.prompt[split][i]) and not args.bidirectional_prompt]
    vocabulary = max(len(tokenizer), engine.module.model.config.vocab_size)
    engine.eval()
    started, model = time.perf_counter(), engine.module.model
    training_kernel = model.config._attn_implementation
    if training_kernel == "flex_attention":  # compiled for one shape after the other; evaluation has many
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        local_losses = row_losses(args, engine, [d.tokens[split][i] for d, i in rows], [int(d.n_targets[split][i]) for d, i in rows], vocabulary,
                                  tokenizer.pad_token_id, device)
        local_texts = generate(args, engine, tokenizer, [(n, rows[n][0].prompt[split][rows[n][1]]) for n in asked], stop_ids, step, device)
    except torch.OutOfMemoryError as error:
        common.fail(f"step {step}, evaluation: out of memory ({str(error).splitlines()[0]}). Next: a smaller --eval_batch_size, then a "
                    "smaller --max_new_tokens, then --zero3_generation synced", only_here=True)
    if training_kernel != model.config._attn_implementation:
        model.set_attn_implementation(training_kernel)
    engine.train()
    gathered = [None] * common.world_size()
    dist.all_gather_object(gathered, (local_losses, local_texts))
    losses, texts = {}, {}
    for part_losses, part_texts in gathered:
        losses.update(part_losses)
        texts.update(part_texts)
    assert len(losses) == len(rows) and len(texts) == len(asked), (len(losses), len(rows), len(texts), len(asked))
    metrics = {}
    for prefix, members in [("", data_sets)] + [(f"{d.name}/", [d]) for d in data_sets if len(data_sets) > 1]:
        of_group = [n for n, (d, _) in enumerate(rows) if d in members]
        if not of_group:
            continue
        n_targets = sum(losses[n][2] for n in of_group)
        loss = math.fsum(losses[n][0] for n in of_group) / n_targets
        metrics.update({f"{prefix}loss": loss, f"{prefix}perplexity": math.exp(min(loss, 700.0)),
                        f"{prefix}token_accuracy": sum(losses[n][1] for n in of_group) / n_targets})
        answered = [n for n in of_group if n in texts]
        if answered and common.reads_tasks(args):
            metrics.update(common.score_instructions(
                [texts[n][0] for n in answered], [rows[n][0].records[split][rows[n][1]]["orig_d"] for n in answered], tokenizer))
        elif answered:
            right = [texts[n][0].strip() == rows[n][0].records[split][rows[n][1]]["completion"].strip() for n in answered]
            metrics[f"{prefix}exact_match"] = sum(right) / len(right)
    metrics.update(eval_seconds=round(time.perf_counter() - started, 2), peak_memory_gb=common.peak_memory_gb(device))
    if common.rank() == 0:
        predictions = []
        for n in asked:
            record = rows[n][0].records[split][rows[n][1]]
            predictions.append({"prompt": record["prompt"], "generations": [{"lm_postprocess": text} for text in texts[n]],
                                "demonstration": record["completion"], "orig_d": record["orig_d"], "dataset": rows[n][0].name})
        common.write_json(run_dir / predictions_name(args, split, step), predictions)
    return metrics


def predictions_name(args, split, step):
    return f"{'test_' if split == 'test' else ''}temperature={args.temperature:.2f}_n={args.n_samples}_step={step}.json"


def write_results(path, run_dir, args, step, metrics):
    """Rank 0: append one row to a .csv; a file with other columns is left alone and the row goes to <name>.N.csv."""
    row = {"run": run_dir.name, "model": args.model_init_path or args.model_init_name, "data": " ".join(args.data_name), "seed": args.seed,
           "step": step, **{name: value for name, value in metrics.items() if not name.endswith(("seconds", "peak_memory_gb")) and "_for_" not in name}}
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    for n in itertools.count(1):
        path = pathlib.Path(args.write_results) if n == 1 else pathlib.Path(args.write_results).with_suffix(f".{n}.csv")
        with open(path, "a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            header = next(csv.reader(file), None)
            if header in (None, list(row)):
                writer = csv.DictWriter(file, row)
                if header is None:
                    writer.writeheader()
                writer.writerow(row)
                log.info(f"{path}: a row was added")
                return


# ------------------------------------------------------------------------------------------------ training


def prepare(args):
    """Everything that can be wrong is found here and reported together, before any weight is loaded and before the
    processes meet. Returns what main needs; None after --estimate."""
    problems = []
    check_args(args, problems)
    source, config, tokenizer = common.open_model_folder(args, problems)
    precision, n_params, n_trained, quantized, n_tokens, new_ids, template, end = common.resolve_precision(args), 0, 0, (0, 0), 0, [], None, None
    if config is not None:
        if common.is_decoder_only(config):
            n_params = common.count_parameters(AutoModelForCausalLM, config)
            n_trained, quantized = common.count_trained(AutoModelForCausalLM, source, config, args, n_params, problems)
            old_ids, n_problems = set(tokenizer.get_vocab().values()), len(problems)
            if not args.merge_lora:
                set_tokens(args, tokenizer, problems)
                if len(problems) == n_problems:
                    template, end = set_template(args, tokenizer, problems)
            ids = set(tokenizer.get_vocab().values())
            n_tokens, new_ids = max(ids) + 1, sorted(ids - old_ids)
            if new_ids and common.adapter_plan(args, source, config, []).folder:
                problems.append(f"{source} is an adapter whose tokenizer lacks {', '.join(tokenizer.convert_ids_to_tokens(new_ids))}: merge it first "
                                "(--merge_lora) and start from that, or choose another --template")
        else:
            problems.append(f"model {source!r} is a {config.model_type}: expected a decoder-only language model; encoder-decoders: seq2seq.py")
    if common.estimate_or_merge(AutoModelForCausalLM, source, config, tokenizer, args, precision, n_params, n_trained, quantized, problems):
        if args.merge_lora and not args.estimate:
            keep_stop_ids(args, source, tokenizer)
        return None
    data_sets = load_data(args, tokenizer, template, end, problems)
    limit = getattr(config, "max_position_embeddings", None)
    longest = max((min(int(d.tokens[split].lengths.max(initial=0)), args.max_length) for d in data_sets for split in d.tokens), default=0)
    if limit and longest > limit:
        problems.append(f"--max_length {args.max_length}: there are documents of {longest} tokens, and {source} has {limit} positions; "
                        f"set --max_length {limit} or less")
    window = getattr(config, "sliding_window", None)
    if args.bidirectional_prompt and window and longest > window:
        problems.append(f"--bidirectional_prompt: {source} looks back {window} tokens in some layers, which this mask would lift; set --max_length "
                        f"{window} or less")
    if args.metric_for_best:
        *prefix, metric = args.metric_for_best.rsplit("/", 1)
        chosen = [d for d in data_sets if prefix in ([], [d.name])]
        if chosen and not any(d.records["eval"] and (metric != "exact_match" or d.prompt["eval"].lengths.any()) for d in chosen):
            problems.append(f"--metric_for_best {args.metric_for_best}: no evaluation records{' with a prompt' if metric == 'exact_match' else ''}")
    identity = {"data_sha256": [d.sha256 for d in data_sets], "resolved_precision": precision,
                "effective_batch": args.train_batch_size * args.gradient_accumulation_steps}
    state = {"step": 0, "best": None, "best_step": None, "evals_since_best": 0, "last_eval": None}
    run_dir, resume_from, state, ds_name, ds_config = common.plan_run(
        args, source, identity, FREE_FLAGS, state, n_params, n_trained, precision, problems, quantized)
    if args.no_train:
        for path in (run_dir / predictions_name(args, split, 0) for split in ("eval", "test") if any(d.records[split] for d in data_sets)):
            if path.exists():
                problems.append(f"{path} exists; move it away or choose another --training_run_name")
    if problems:
        common.fail(problems)
    return types.SimpleNamespace(source=source, config=config, tokenizer=tokenizer, precision=precision, n_params=n_params, ds_name=ds_name,
                                 data_sets=data_sets, run_dir=run_dir, identity=identity, resume_from=resume_from, state=state,
                                 ds_config=ds_config, template=template, end=end, n_tokens=n_tokens, new_ids=new_ids)


def keep_stop_ids(args, source, tokenizer):
    """After --merge_lora: the merged model stops where the adapter's replies did."""
    stop_ids = common.read_adapter(source, []).rawtune.get("stop_ids")
    if stop_ids:
        generation = GenerationConfig.from_pretrained(args.merge_lora)
        set_stop_ids(generation, tokenizer, stop_ids)
        generation.save_pretrained(args.merge_lora)


def stop_ids_of(tokenizer, end):
    """Ids at which a reply stops: the end of a turn, and the tokenizer's end token, unless that is what rows are filled with."""
    end_id = tokenizer.convert_tokens_to_ids(end)
    return [end_id] + [i for i in [tokenizer.eos_token_id] if i not in (end_id, tokenizer.pad_token_id)]


def set_attention(model, kernel):
    """--attention; a family without it either raises or only warns and keeps its own."""
    try:
        model.set_attn_implementation(kernel)
        reason = "the model keeps its own"
    except (ValueError, ImportError) as error:
        reason = str(error).split(". ")[0]
    if model.config._attn_implementation != kernel:
        common.fail(f"--attention {kernel}: not for a {model.config.model_type} here ({reason}); leave it out, or choose another")


def set_stop_ids(generation, tokenizer, stop_ids):
    """Write into a generation configuration what a chat needs: where a reply stops, and a padding id that is none of these."""
    generation.eos_token_id = stop_ids
    generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id not in stop_ids else None
    if not generation.do_sample and (generation.temperature not in (None, 1.0) or generation.top_p not in (None, 1.0)):
        generation.do_sample = True  # or transformers refuses to save the configuration that it has loaded


def main(args):
    # 1 setup, 2 data
    common.adopt_launcher()
    common.start_log()
    job = prepare(args)
    if job is None:
        return 0
    source, config, tokenizer, data_sets, run_dir = job.source, job.config, job.tokenizer, job.data_sets, job.run_dir
    device, resume_from, state, precision, ds_name, ds_config, universal = common.begin_run(args, job, __file__)
    rank, world = common.rank(), common.world_size()
    for data in data_sets:
        for i in range(min(args.show_examples, len(data.tokens["train"]))):
            log.info(f"{data.name}, document {i + 1}, targets between ⟦ and ⟧:\n{marked(tokenizer, *unseal(data.tokens['train'][i]))}\n")

    # 3 model
    source = common.base_of_run(AutoModelForCausalLM, source, config, tokenizer, args, precision, run_dir)
    model = common.load_model(AutoModelForCausalLM, source, config, args, precision, ds_config, job.n_tokens, job.new_ids)
    kernel = args.attention  # a packed row on a GPU: one that skips what is masked, where the family has it
    if kernel == "auto" and args.packing and device.type == "cuda" and not args.bidirectional_prompt and model._supports_flex_attn:
        kernel = "flex_attention"
    if kernel != "auto":
        set_attention(model, kernel)
    sparse = kernel in ("flex_attention", "flash_attention_2")
    stop_ids, pad_id = stop_ids_of(tokenizer, job.end), tokenizer.pad_token_id
    set_stop_ids(model.generation_config, tokenizer, stop_ids)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if precision == "bf16-mixed":
        model.get_output_embeddings().register_forward_hook(common.refuse_fp32_logits)
    if args.compile:
        model.base_model.compile(dynamic=True)

    # 4 engine
    optimizer = None
    if not args.no_train:
        optimizer = torch.optim.AdamW(common.param_groups(model, args.weight_decay), lr=args.learning_rate, fused=True)
    elif ds_config["zero_optimization"]["stage"] < 3:  # without an optimizer there is nothing to partition
        ds_config.update(zero_optimization={"stage": 0}, bf16={"enabled": False}, fp16={"enabled": False})
    engine, *_ = deepspeed.initialize(model=TargetLosses(model, args.neftune_alpha), optimizer=optimizer, config=ds_config)
    log.info(f"{source}: {job.n_params / 1e6:.2f} M parameters, {precision}, ZeRO stage {engine.zero_optimization_stage()}, {world} process(es) on "
             f"{device.type}, {'packed rows' if args.packing else 'one document per row'}, template {job.template}, replies end with {job.end!r}")
    documents = [data.tokens[split][i] for data in data_sets for split in data.tokens for i in range(min(8, len(data.tokens[split])))]
    check_model(args, engine, documents, pad_id, device)
    step, tracker, steps_per_epoch = state["step"], None, math.inf
    if args.bidirectional_prompt and args.n_generate:
        log.warning("--bidirectional_prompt: no replies are generated, as `generate` has no such mask; the loss is evaluated")

    def log_row(split, metrics):
        if rank == 0:
            row = metrics if split == "train" else {f"{split}/{name}": value for name, value in metrics.items()}
            common.log_metrics(run_dir, {"step": step, "epoch": round(step / steps_per_epoch, 3), "split": split, **row}, tracker)

    if args.no_train:
        found = {}
        for split in ("eval", "test"):
            if any(d.records[split] for d in data_sets):
                metrics = evaluate(args, engine, tokenizer, data_sets, split, stop_ids, 0, run_dir, device)
                log_row(split, metrics)
                found.update({f"{split}/{name}": value for name, value in metrics.items()})
        if args.write_results and rank == 0:
            write_results(args.write_results, run_dir, args, 0, found)
        return 0
    stopper = common.Stopper(args.max_hours)  # not before: a signal ends an evaluation at once
    train_data = TrainingData(args, data_sets, config.hidden_size, max(len(tokenizer), config.vocab_size), pad_id, sparse)
    steps_per_epoch = train_data.steps_per_epoch
    max_steps, eval_steps, save_steps, warmup = common.plan_steps(args, train_data.per_epoch, steps_per_epoch, run_dir)
    rawtune = {"format": 1, "script": "sft_causal.py", "task": "chat", "family": "causal", "template": job.template, "end_token": job.end,
               "stop_ids": stop_ids, "raw_prompt": args.raw_prompt, "bidirectional_prompt": args.bidirectional_prompt,
               "max_length": args.max_length, **common.origin(args, source, config, resume_from)}

    # 5 resume
    if resume_from:
        common.load_checkpoint(engine, resume_from, universal)
        log.info(f"continuing {run_dir} from step {step}" + (f" (written by {state['world_size']} processes)" if universal else ""))
    if rank == 0:
        common.rewind_metrics(run_dir, step, state["last_eval"])
        tracker = common.open_tracker(args, run_dir)
    saved_step, last_metrics = step if resume_from else None, {}

    def run_evaluation():
        metrics = evaluate(args, engine, tokenizer, data_sets, "eval", stop_ids, step, run_dir, device)
        log_row("eval", metrics)
        last_metrics.update({f"eval/{name}": value for name, value in metrics.items()})
        common.note_evaluation(args, state, step, metrics, EVAL_METRICS | TASK_METRICS)

    def save():
        nonlocal saved_step
        if saved_step != step:
            common.save_checkpoint(engine, model, tokenizer, run_dir, step, {**state, "ds_config": ds_name}, rawtune,
                                   args.save_total_limit, state["best_step"])
            saved_step = step
        if rank == 0 and state["best_step"] == step:
            common.write_json(run_dir / "best.json", {"checkpoint": f"checkpoint-{step}", "metric": args.metric_for_best, "value": state["best"]})

    def finished():
        return step >= max_steps or bool(args.early_stopping_patience) and state["evals_since_best"] >= args.early_stopping_patience

    if state["last_eval"] != step and (step % eval_steps == 0 or step >= max_steps):  # the baseline, or what a stop left out
        run_evaluation()
        if saved_step == step and state["best_step"] == step:
            save()  # best.json

    # 6 loop
    peak_flops = (args.peak_tflops or common.measured_tflops(device, torch.bfloat16)) * 1e12 if device.type == "cuda" else None
    window, n_overflows, stop = collections.Counter(), 0, None
    bar = tqdm(total=max_steps, initial=step, desc="training", unit="step", disable=rank > 0 or None)
    ahead = concurrent.futures.ThreadPoolExecutor(1)  # packs step k + 1 while step k is computed
    pending = ahead.submit(train_data.micro_batches, step)
    while not finished() and not stop:
        started = time.perf_counter()
        # fetch the batch of this step, a pure function of (seed, step), and the number of its target tokens everywhere
        micro_batches, n_targets = pending.result()
        pending = ahead.submit(train_data.micro_batches, step + 1)
        lr = common.lr_at(step, args.learning_rate, args.lr_scheduler_type, warmup, max_steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(common.derive_seed(args.seed, "dropout", step, rank))  # so there is no random state to save
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        try:
            for i, (batch, n_chunks, _) in enumerate(micro_batches):
                is_last = i == len(micro_batches) - 1
                engine.set_gradient_accumulation_boundary(is_last)
                losses = engine(common.to_device(batch, device), n_chunks)  # (N,); N may be 0
                summed = (poly_loss(losses, 1.0 if args.poly_eps is None else args.poly_eps) if args.loss == "poly" else losses).sum()
                loss_sum += summed.detach()
                # DeepSpeed averages gradients over processes, hence x world; told not to divide by the accumulation
                # steps, this is the sum over all target tokens of the step / their number. (It must be computed from
                # the engine's output: on the output itself 0.19.8 divides all the same, at stage 0 and at bf16 stage 1.)
                engine.backward(summed * (world / n_targets), scale_wrt_gas=False)
                if is_last:  # one small all-reduce: the loss of the whole step, and whether anybody wants to stop
                    reason = stopper.reason()
                    step_loss, n_stop = common.all_reduce_sum([loss_sum.item(), bool(reason)], device)
                    if not math.isfinite(step_loss) and precision != "fp16":
                        common.fail(f"step {step + 1}: the loss is {step_loss}. Nothing of this step was applied; checkpoints are intact. "
                                    "Lower --learning_rate, set --max_grad_norm 1.0, or try --precision fp32")
                    grad_norm = common.grad_norm_before_step(engine)
                engine.step()  # weights move on the last call of a step
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            shapes = [str(tuple(batch["input_ids"].shape)) for batch, *_ in micro_batches]
            common.fail(common.out_of_memory(step, error, shapes, "a shorter --max_length, then --lora_rank with --quantize"), only_here=True)
        grad_norm = float(engine.get_global_grad_norm() if grad_norm is None else grad_norm)
        if precision == "fp16" and not engine.was_step_applied() and n_overflows < 50:
            n_overflows += 1  # the loss scale went down: the same step again
            log.info(f"step {step + 1}: fp16 overflow, repeated with a smaller loss scale")
            pending = ahead.submit(train_data.micro_batches, step)
            continue
        if not math.isfinite(grad_norm):
            common.fail(f"step {step + 1}: the gradient norm is {grad_norm}. Checkpoints are intact: continue from the last one with a lower "
                        "--learning_rate or --precision fp32 (--resume --force changed_flags)")
        n_overflows, step = 0, step + 1
        bar.update()
        for batch, _, n_tokens in micro_batches:
            window.update(computed=batch["input_ids"].numel() * (n_tokens > 0), tokens=n_tokens)
        window.update(loss=step_loss, targets=n_targets, seconds=time.perf_counter() - started)
        stop = (reason or "another process was told to stop") if n_stop else None
        if step % args.logging_steps == 0 or step == max_steps or stop:
            computed, tokens = common.all_reduce_sum([window["computed"], window["tokens"]], device)
            row = {"loss": window["loss"] / window["targets"], "lr": lr, "grad_norm": grad_norm,
                   "tokens_per_sec": window["targets"] / window["seconds"], "target_tokens": window["targets"],
                   "input_tokens_per_sec": tokens / window["seconds"], "padding_share": 1 - tokens / computed,
                   "peak_memory_gb": common.peak_memory_gb(device)}
            if peak_flops:
                row["mfu" if args.peak_tflops else "mfu_of_matmul"] = (
                    train_flops(model, tokens, window["targets"]) / window["seconds"] / peak_flops / world)
            log_row("train", row)
            window.clear()
        if (step % eval_steps == 0 or step == max_steps) and not stop:
            run_evaluation()
        if finished() or stop or state["best_step"] == step or (save_steps and step % save_steps == 0):
            save()
    bar.close()
    ahead.shutdown(cancel_futures=True)
    if stop:
        log.info(f"{stop}: saved at step {step}; the same command continues from here (exit code {common.EXIT_SAVED})")
        return common.EXIT_SAVED

    # 7 export: the best checkpoint if there is a metric for it, else the last; test once with these weights
    save()
    if step < max_steps:
        log.info(f"step {step}: {state['evals_since_best']} evaluations without a better {args.metric_for_best}: stopped early")
    chosen = run_dir / f"checkpoint-{state['best_step'] or step}"
    if any(d.records["test"] for d in data_sets):
        if state["best_step"] not in (None, step):
            common.copy_weights(model, chosen)
        metrics = evaluate(args, engine, tokenizer, data_sets, "test", stop_ids, state["best_step"] or step, run_dir, device)
        log_row("test", metrics)
        last_metrics.update({f"test/{name}": value for name, value in metrics.items()})
    if rank == 0:
        if args.write_results:
            write_results(args.write_results, run_dir, args, state["best_step"] or step, last_metrics)
        common.plot_curves(run_dir)
        common.export_root(run_dir, chosen)
        log.info(f"done: {run_dir} holds the model of {chosen.name}, metrics.jsonl and the predictions")
    dist.barrier()
    return 0


if __name__ == "__main__":
    common.leave(main(parse_args()))
