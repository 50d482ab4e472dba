"""rl_ppo.py: PPO with a KL budget for encoder-decoders (T5) and decoder-only models, on plain DeepSpeed; also RLOO and GRPO.

    {"prompt": "Name a prime number."}                                                               data/<name>.jsonl
    {"messages": [{"role": "user", "content": "Name a prime number."}], "answer": "any other key reaches the reward function"}

    python rl_ppo.py                                                         # demo from scratch, minutes on a laptop
    python rl_ppo.py --policy models/my-sft --data myprompts --reward_fn myreward.py:score               # one GPU
    deepspeed --num_gpus 4 rl_ppo.py --policy my-sft --reward_model my-clf --data myprompts @presets/rlhf-defaults

Writes models/<training_run_name>/: metrics.jsonl, predictions (temperature=0.00_n=1_step=400.json), checkpoint-<step>/ for
resuming, and the trained policy as a plain Hugging Face (PEFT) folder. docs/rl_ppo.md explains every number.

A rollout: one sampled reply per prompt, its score, and per token the log-probabilities of policy and reference and a value.
Reward of a token: -beta KL(policy, reference), the last one also has the score (Ziegler et al. 2019, eq. 2). Advantages:
GAE (Schulman et al. 2016, eq. 16). Loss: clipped policy and value losses (Schulman et al. 2017, eq. 7 and 9), summed over the
reply tokens of the whole optimizer step (all forward steps, all processes) and divided by their number.
Shapes: R rows (replies) of a forward step, S tokens, N reply tokens of a forward step, B replies of a rollout, T tokens of its
longest reply, D hidden size, V vocabulary. A reply ends with its end token or at --max_new_tokens; nothing follows it.
"""

import collections
import contextlib
import inspect
import json
import math
import os
import pathlib
import re
import select
import subprocess
import sys
import time
import types

import common_v1 as common  # first: it prepares the import of DeepSpeed

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, DynamicCache, EncoderDecoderCache)
from transformers.modeling_layers import GradientCheckpointingLayer

from common_v1 import log

DEMO = ("--model_init_name tiny-llama --data wishes --reward_fn data/rewards.py:wish --training_run_name ppo-demo --max_steps 600 "
        "--num_rollouts 128 --train_batch_size 64 --ppo_epochs 2 --learning_rate 0.003 --lr_scheduler_type linear --max_new_tokens 8 "
        "--num_layers_unfrozen 0 --init_kl_coef 0.015 --kl_controller fixed --kl_cap 40 --eval_steps 200 --save_steps 200 --logging_steps 20")
EVAL_METRICS = {"reward": "high", "heldout_reward": "high"}
UPDATE_METRICS = ("loss", "policy_loss", "value_loss", "entropy", "clip_fraction", "value_clip_fraction", "update_kl",
                  "log_ratio")  # sums over reply tokens
FREE_FLAGS = {"rollout_batch_size", "reward_timeout", "eval_temperature", "n_eval", "zero3_generation", "frozen_models", "kl_cap",
              "max_log_ratio"}  # evaluation, guards, or another layout of the same mathematics
RATIO_BOUND = {"fp32": 1e-5, "fp64": 1e-5, "bf16": 0.02, "bf16-mixed": 0.02}  # largest |log ratio| before the first update of a rollout
SAMPLER_BOUND = {"fp32": 1e-3, "fp64": 1e-3, "bf16": 0.1, "bf16-mixed": 0.1}  # mean |log p while sampling - log p of the whole text|
WORKER = """
import importlib.util, json, os, pathlib, signal, sys
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # the trainer saves first; this process ends with it
    signal.signal(number, lambda *_: None)
requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")  # whatever the function or its children read or print goes elsewhere
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
path = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(path.parent))
spec = importlib.util.spec_from_file_location(path.stem, path)
module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
function = getattr(module, sys.argv[2])
print(json.dumps("ready"), file=answers, flush=True)
for line in requests:
    print(json.dumps([float(value) for value in function(*json.loads(line))]), file=answers, flush=True)
"""

# ------------------------------------------------------------------------------------------------ arguments


def parse_args(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if not any(re.match(r"(@|--(model_init_name|model_init_path|policy|sft_model|data|data_name)(=|$))", word) for word in argv):
        if common.rank() == 0 and not {"-h", "--help"} & set(argv):
            print("demo: python rl_ppo.py", " ".join([DEMO, *argv]), flush=True)
        argv = DEMO.split() + argv
    parser = common.Parser(prog="rl_ppo.py", description=__doc__.split("\n\n")[0])
    group = parser.add_argument_group("task")
    group.add_argument("--policy", "--sft_model", help="the model to train, also its reference: a run under models/, a folder or a hub id")
    group.add_argument("--reward_model", "--rank_model", help="a clf.py run (logit of yes minus no) or a sequence-classification model with "
                       "one logit: a run under models/, a folder or a hub id")
    group.add_argument("--reward_fn", metavar="FILE:NAME", help="Python function (prompts, replies, records) -> list of floats")
    group.add_argument("--reward_text", help="what a reward model reads, or the {input} of a clf.py run [text with {prompt} and {reply}], "
                       "default: the decoded text, prompt and reply")
    group.add_argument("--reward_timeout", type=float, default=60.0, help="of one call of a reward function [seconds]")
    group.add_argument("--heldout_reward_model", help="tracked at evaluation, never trained on; chooses the best checkpoint")
    group.add_argument("--heldout_reward_fn", metavar="FILE:NAME", help="the same as a function")
    group.add_argument("--raw_prompt", action="store_true", help="prompts as they are, without a template")
    group.add_argument("--seq_length", type=int, default=1024, help="prompts that leave no room for a reply in it are left out [tokens]")

    group = parser.add_argument_group("rollouts")
    group.add_argument("--num_rollouts", type=int, default=128, help="replies that are sampled before each --ppo_epochs of updates [count]")
    group.add_argument("--n_samples", type=int, default=1, help="replies per prompt; rloo and grpo compare them [count]")
    group.add_argument("--rollout_batch_size", "--chunk_size", type=int, default=32, help="replies that one process samples at once; a batch "
                       "is never split, so the replies do not depend on the number of processes [count]")
    group.add_argument("--max_new_tokens", type=int, default=40, help="reply length limit [tokens]")
    group.add_argument("--temperature", type=float, default=1.0, help="of sampling; log-probabilities are at it too [no unit]")
    group.add_argument("--top_k", type=int, default=0, help="only 0 = off: a cut distribution is not the one whose log-probabilities are trained")
    group.add_argument("--top_p", type=float, default=1.0, help="only 1 = off, for the same reason")
    group.add_argument("--zero3_generation", choices=["auto", "gathered", "synced"], default="auto",
                       help="under ZeRO-3 sample with a whole copy of the weights (gathered) or layer by layer (synced); "
                       "auto = gathered if it fits")

    group = parser.add_argument_group("PPO")
    group.add_argument("--advantage", choices=["gae", "rloo", "grpo"], default="gae", help="gae: PPO with a critic | rloo, grpo: without, "
                       "each reply against the others to its prompt (Ahmadian et al. 2024 | Shao et al. 2024)")
    group.add_argument("--ppo_epochs", type=int, default=4, help="passes over a rollout [count]")
    group.add_argument("--gamma", type=float, default=1.0, help="discount per token [0-1], 1 = off")
    group.add_argument("--lam", type=float, default=0.95, help="lambda of GAE [0-1]")
    group.add_argument("--cliprange", type=float, default=0.2, help="the ratio counts within 1 +- this [no unit]")
    group.add_argument("--dual_clip", type=float, default=0.0, help="largest ratio where the advantage is negative (Ye et al. 2020), above 1, "
                       "0 = off [no unit]")
    group.add_argument("--cliprange_value", type=float, default=0.2, help="a value counts within this of the old one, 0 = off [reward]")
    group.add_argument("--vf_coef", type=float, default=1.0, help="weight of the value loss [no unit]")
    group.add_argument("--entropy_coef", type=float, default=0.0, help="weight of the entropy bonus [no unit], 0 = off")
    group.add_argument("--init_kl_coef", type=float, default=0.05, help="beta, the price of a nat of KL [reward / nat], 0 = off")
    group.add_argument("--kl_controller", choices=["adaptive", "fixed"], default="adaptive", help="adaptive: beta follows --target_kl")
    group.add_argument("--target_kl", type=float, default=6.0, help="KL of a reply that the adaptive beta aims at [nats]")
    group.add_argument("--kl_horizon", type=float, default=10000.0, help="its slowness [replies]")
    group.add_argument("--kl_estimator", choices=["k1", "k2", "k3"], default="k1", help="per token, d = log-ratio to the reference: "
                       "d | d^2 / 2 | exp(-d) - 1 + d")
    group.add_argument("--cliprange_reward", type=float, default=10.0, help="scores count within +- this [reward], 0 = off")
    group.add_argument("--reward_scaling", choices=["none", "std", "norm"], default="none",
                       help="scores / their running deviation | also minus their running mean")
    group.add_argument("--missing_eos_penalty", type=float, default=0.0, help="taken from the score of a reply without an end [reward], 0 = off")
    group.add_argument("--critic", choices=["trunk", "reward_model"], default="trunk",
                       help="trunk: a value head on the policy | reward_model: a model of its own that starts as the reward model")
    group.add_argument("--critic_init", help="start the critic with that of an earlier run: its folder or its checkpoint's [path]")
    group.add_argument("--value_head_init", choices=["normal", "zero"], default="normal", help="last layer: N(0, 1 / (inputs + 1)) | zeros")
    group.add_argument("--num_layers_unfrozen", type=int, help="train this many top layers, norm and untied head [layers], 0 = all; "
                       "default 2, with adapters all")
    group.add_argument("--reference", choices=["auto", "copy", "adapter_off"], default="auto", help="a frozen copy | the same weights with a "
                       "new adapter off (auto where there is one)")
    group.add_argument("--frozen_models", choices=["auto", "replicated", "partitioned", "offloaded"], default="auto",
                       help="reference and reward models: whole on each GPU | ZeRO-3 | in the machine's memory while not used; auto = as the policy")

    group = parser.add_argument_group("guards")
    group.add_argument("--kl_cap", type=float, help="stop when the mean KL of a reply is above this [nats], 0 = off, default: 5 x --target_kl")
    group.add_argument("--max_log_ratio", type=float, default=2.0, help="stop when the mean |log ratio| of a step's tokens, of the policy to the one "
                       "that sampled, is above this [nats], 0 = off")
    group.add_argument("--n_eval", type=int, default=64, help="evaluation prompts of each data set [count]")
    group.add_argument("--eval_temperature", type=float, default=0.001, help="sampling temperature at evaluation; <= 0.001 = greedy [no unit]")
    common.add_shared_args(parser)
    for name, more in (("--learning_rate", ", default: 1e-6, with an adapter 1e-4"), ("--max_steps", " if given, else 10000"), ("--num_epochs", ": passes over "
                       "the prompts")):
        parser._option_string_actions[name].help += more  # other defaults than the siblings'
    parser.set_defaults(train_batch_size=128, learning_rate=None, lr_scheduler_type="constant", weight_decay=1e-6, num_epochs=None, logging_steps=1)
    args = parser.parse_args(argv)
    if args.debug:
        args.max_steps = 10
    if args.num_epochs is None:
        args.num_epochs, args.max_steps = 10.0, 10000 if args.max_steps is None else args.max_steps
    if args.kl_cap is None:
        args.kl_cap = 5 * args.target_kl
    args.reward_text = args.reward_text and args.reward_text.replace("\\n", "\n")  # as a shell passes it
    if args.policy:
        args.model_init_path = named_model(args, args.policy)
    if args.learning_rate is None:
        folder = pathlib.Path(args.model_init_path or common.mount_dir(args) / "models" / (args.model_init_name or ""))
        has_adapter = args.lora_rank or args.train_adapter or any((folder / name).is_file() for name, _ in common.ADAPTER_FILES.values())
        args.learning_rate = 1e-4 if has_adapter else 1e-6
    if args.metric_for_best is None and (args.heldout_reward_model or args.heldout_reward_fn):
        args.metric_for_best = "heldout_reward"
    return args


def named_model(args, name):
    """A path as it is; models/<name> or <name> under --mount_dir where there is such a folder; else a hub id."""
    folders = [common.mount_dir(args) / "models" / name, common.mount_dir(args) / name]
    return next((str(folder) for folder in folders if not os.path.exists(name) and folder.is_dir()), name)


def check_args(args, problems):
    common.check_shared_args(args, problems)
    for name, low in dict(num_rollouts=1, n_samples=1, rollout_batch_size=1, max_new_tokens=1, ppo_epochs=1, seq_length=2, n_eval=1, dual_clip=0,
                          cliprange_value=0, vf_coef=0, entropy_coef=0, init_kl_coef=0, cliprange_reward=0, missing_eos_penalty=0, kl_cap=0,
                          max_log_ratio=0, eval_temperature=0).items():
        if not low <= getattr(args, name) < math.inf:
            problems.append(f"--{name} {getattr(args, name)}: expected {low} or more")
    for name in ("temperature", "target_kl", "kl_horizon", "cliprange", "reward_timeout"):
        if not 0 < getattr(args, name) < math.inf:
            problems.append(f"--{name} {getattr(args, name)}: expected a positive number")
    for name in ("gamma", "lam"):
        if not 0 <= getattr(args, name) <= 1:
            problems.append(f"--{name} {getattr(args, name)}: expected 0 to 1")
    if args.temperature <= 0.001:
        problems.append(f"--temperature {args.temperature}: PPO learns from sampled replies; greedy ones have no alternatives")
    if args.top_k or args.top_p != 1:
        problems.append(f"--top_k {args.top_k} --top_p {args.top_p}: replies from a cut distribution have other probabilities than those that are "
                        "trained (the KL turns negative); leave both out, a lower --temperature is exact")
    if args.kl_controller == "adaptive" and args.num_rollouts >= 5 * args.kl_horizon:
        problems.append(f"--kl_horizon {args.kl_horizon:g} replies is too short for --num_rollouts {args.num_rollouts}: beta would fall below 0")
    if args.dual_clip and args.dual_clip <= 1:
        problems.append(f"--dual_clip {args.dual_clip}: expected a ratio above 1 (3 is usual), or 0 = off")
    if args.num_layers_unfrozen is not None and args.num_layers_unfrozen < 0:
        problems.append(f"--num_layers_unfrozen {args.num_layers_unfrozen}: expected 0 (all) or more layers")
    if args.num_rollouts % args.n_samples:
        problems.append(f"--num_rollouts {args.num_rollouts} counts replies and cannot be divided by --n_samples {args.n_samples}")
    if args.advantage != "gae":
        if args.n_samples < 2:
            problems.append(f"--advantage {args.advantage} compares replies to one prompt: --n_samples 2 or more")
        problems += [f"--{name} has no effect with --advantage {args.advantage}, which has no critic" for name, off in
                     (("critic", "trunk"), ("critic_init", None), ("value_head_init", "normal"), ("vf_coef", 1.0), ("cliprange_value", 0.2), ("lam", 0.95), ("gamma", 1.0))
                     if getattr(args, name) != off]
    elif (args.critic != "trunk" or args.critic_init) and args.value_head_init != "normal":
        problems.append("--value_head_init has no effect with --critic reward_model or --critic_init, which say how the critic starts")
    if args.reference == "adapter_off" and not args.lora_rank and not args.train_adapter:
        problems.append("--reference adapter_off needs a new adapter (--lora_rank or --train_adapter); a continued one is the reference itself: copy")
    for kind in ("", "heldout_"):
        model, function = getattr(args, f"{kind}reward_model"), getattr(args, f"{kind}reward_fn")
        if model and function:
            problems.append(f"--{kind}reward_model and --{kind}reward_fn exclude each other")
        if not model and not function and not kind:
            problems.append("no reward: give --reward_model (a clf.py run, or a model with one logit) or --reward_fn file.py:name")
    functions, frozen = args.reward_fn or args.heldout_reward_fn, args.reward_model or args.heldout_reward_model or not (args.lora_rank or args.train_adapter)
    for name, off, has_effect, needed in (("reward_timeout", 60.0, functions, "a reward function"), ("frozen_models", "auto", frozen, "a frozen model"),
                                          ("kl_horizon", 10000.0, args.kl_controller == "adaptive", "--kl_controller adaptive"),
                                          ("model_init_name", None, not args.policy, "leaving out --policy"), ("cache_dir", None, False, "a cache: prompts "
                                           "are kept in memory")):
        if getattr(args, name) != off and not has_effect:
            problems.append(f"--{name} {getattr(args, name)} has no effect without {needed}")
    if args.critic == "reward_model" and not args.reward_model:
        problems.append("--critic reward_model needs --reward_model")
    if args.critic_init and not (pathlib.Path(named_model(args, args.critic_init)) / "critic" / "model.safetensors").is_file():
        problems.append(f"--critic_init {args.critic_init}: expected a run or checkpoint folder with critic/model.safetensors in it")
    if args.reward_text is not None and ("{reply}" not in args.reward_text or not (args.reward_model or args.heldout_reward_model)):
        problems.append(f"--reward_text {args.reward_text!r}: expected {{reply}} in it, and a reward model that reads it")
    if args.precision in ("fp16", "16-true"):
        problems.append("--precision fp16: rl_ppo.py does not train in fp16, whose skipped steps would break a rollout; use bf16")
    for name in ("compile", "merge_lora"):
        if getattr(args, name):
            problems.append(f"--{name} is not offered here" + ("; sft_causal.py or seq2seq.py merge" if name == "merge_lora" else ""))
    if args.metric_for_best and args.metric_for_best not in EVAL_METRICS:
        problems.append(f"--metric_for_best {args.metric_for_best}: expected {' or '.join(EVAL_METRICS)}")
    if args.metric_for_best == "heldout_reward" and not (args.heldout_reward_model or args.heldout_reward_fn):
        problems.append("--metric_for_best heldout_reward needs --heldout_reward_model or --heldout_reward_fn")


# ------------------------------------------------------------------------------------------------ data


class Prompts:
    """Records as the ids that the policy reads, by its own template, and where its replies end."""

    def __init__(self, args, source, config, tokenizer, problems):
        about = pathlib.Path(source) / "rawtune.json"
        self.rawtune = json.loads(about.read_text()) if about.is_file() else {}
        if self.rawtune.get("script") == "clf.py":
            problems.append(f"--policy {source}: a clf.py run scores texts; expected a model that writes them")
        if self.rawtune.get("bidirectional_prompt"):
            problems.append(f"--policy {source}: it was trained with --bidirectional_prompt, a mask that sampling does not have")
        self.tokenizer, self.encoder_decoder = tokenizer, config.is_encoder_decoder
        raw = self.rawtune.get("raw_prompt") or "record_layout" in self.rawtune
        self.is_raw = args.raw_prompt or bool(raw) or not tokenizer.chat_template
        self.begin = [tokenizer.bos_token_id] if common.adds_bos(tokenizer) else []
        self.special = common.special_tokens(tokenizer)
        self.stop_ids = self._stop_ids(source, problems)
        pad_id = tokenizer.pad_token_id  # fills what counts nowhere; it must only have a row in the embeddings
        self.pad_id = pad_id if pad_id is not None and pad_id < config.get_text_config().vocab_size else 0
        if not self.stop_ids:
            problems.append(f"{source}: nothing says where a reply ends: no end token in its tokenizer or generation_config.json")

    def _stop_ids(self, source, problems):
        """Every id that ends a reply: the run's, the generation configuration's, the tokenizer's, the template's end of a turn."""
        try:
            eos = transformers.GenerationConfig.from_pretrained(source).eos_token_id
        except OSError:
            eos = None
        ids = set(self.rawtune.get("stop_ids") or []) | set(eos if isinstance(eos, list) else [] if eos is None else [eos])
        if not ids and self.tokenizer.eos_token_id is not None:
            ids = {self.tokenizer.eos_token_id}
        if not self.is_raw:
            probe = [{"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "Blue."}]
            try:
                text = self.tokenizer.apply_chat_template(probe, tokenize=False)
            except Exception as error:  # jinja2's and the template's own
                problems.append(f"{source}: its chat template fails on a plain exchange ({error}); --raw_prompt does without it")
                return [0]
            if end := re.match(rf"\s*({self.special.pattern})", text[text.rfind("Blue.") + 5:]):
                ids.add(self.tokenizer.convert_tokens_to_ids(end[1]))
        return sorted(ids)

    def read(self, record):
        """(ids, text of the prompt) of {"prompt"} or {"messages"}. Raises ValueError, which says what is wrong."""
        if "messages" in record:
            messages = common.clean_messages(record["messages"])
            if messages[-1]["role"] != "user":
                raise ValueError("'messages' must end with the user's, whom the policy answers")
            text = messages[-1]["content"]
        else:
            text = record.get("prompt")
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"no 'prompt' text and no 'messages' (has: {', '.join(map(str, record))})")
            messages = [{"role": "user", "content": text}]
        if self.is_raw and len(messages) > 1:
            raise ValueError("'messages' with several turns need a chat template, and this policy reads raw prompts")
        if special := next(filter(None, (self.special.search(message["content"]) for message in messages)), None):
            raise ValueError(f"the text holds the special token {special[0]!r}, which would be read as one; remove it")
        if any(re.search("[\ud800-\udfff]", message["content"]) for message in messages):
            raise ValueError("the text holds half a character (a lone \\ud800-\\udfff escape); remove it or write the file as UTF-8")
        if self.is_raw:
            ids = self.tokenizer(text).input_ids if self.encoder_decoder else [*self.begin, *self.tokenizer(text, add_special_tokens=False).input_ids]
        else:
            try:
                rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # jinja2's and the template's own
                raise ValueError(f"the chat template refuses these messages: {error}") from None
            ids = self.tokenizer(rendered, add_special_tokens=False).input_ids
        if not ids or not text.strip():
            raise ValueError("the prompt is empty")
        return np.array(ids, np.int64), text


class DataSet:
    """The prompts of one --data name, in memory: per split ids, texts and records."""

    def __init__(self, name, amount, files, args, prompts, problems):
        self.name, self.amount, self.sha256 = name, amount, [common.file_sha256(path) for path in files.values()]
        self.ids, self.texts, self.records = ({split: [] for split in ("train", "eval", "test")} for _ in range(3))
        hashes, n_long, n_unused, room = {split: [] for split in self.ids}, 0, 0, args.seq_length - (0 if prompts.encoder_decoder else args.max_new_tokens)
        for file_split, path in files.items():
            for where, split, record in common.read_records(path, problems, file_split or "train"):
                if split not in self.ids:
                    problems.append(f"{where}: split {split!r}, expected train, eval or test")
                    continue
                try:
                    ids, text = prompts.read(record)
                except ValueError as error:
                    problems.append(f"{where}: {error}")
                    continue
                number = common.derive_seed("text", text)
                if split == "train" and common.is_held_out(args, "text", text):
                    split = "eval"
                if len(ids) > room:
                    n_long += 1
                elif split == "train" or len(self.ids[split]) < args.n_eval:
                    self.ids[split].append(ids)
                    self.texts[split].append(text)
                    self.records[split].append(record)
                    hashes[split].append(number)
                else:
                    n_unused += 1
        self.hashes, self.counts = {split: np.array(h, np.int64) for split, h in hashes.items()}, {split: len(i) for split, i in self.ids.items()}
        if n_unused:
            log.info(f"{name}: {n_unused} evaluation prompts beyond the first --n_eval {args.n_eval} are not used")
        if n_long:
            log.warning(f"{name}: {n_long} prompts are longer than {room} tokens (--seq_length, --max_new_tokens) and are left out")


def load_data(args, prompts, problems):
    data_sets = []
    for spec in args.data_name:
        name, amount = common.parse_data_spec(spec, problems)
        files = common.find_data(args, name, problems)
        if files and prompts:
            before = len(problems)
            data = DataSet(name, amount, files, args, prompts, problems)
            if len(problems) == before:
                data_sets.append(data)
                common.check_training_part(args, data, next(iter(files.values())), problems)
    if prompts:
        common.check_evaluation_parts(args, data_sets, "prompts", problems)
    return data_sets


class PromptOrder:
    """The prompts of rollout k: a pure function of (seed, k). Each epoch is another order of all prompts; epochs follow without a gap."""

    def __init__(self, args, data_sets):
        self.sizes, self.amounts, self.seed = [d.counts["train"] for d in data_sets], [d.amount for d in data_sets], args.seed
        self.per_rollout, self.epochs = args.num_rollouts // args.n_samples, {}
        self.per_epoch = len(common.mixed_epoch(self.sizes, self.amounts, args.seed, 0))

    def ids(self, rollout):
        """(prompts of a rollout,) numbers of prompts, counted through all data sets."""
        found = []
        for place in range(rollout * self.per_rollout, (rollout + 1) * self.per_rollout):
            epoch, i = divmod(place, self.per_epoch)
            if epoch not in self.epochs:
                ids = common.mixed_epoch(self.sizes, self.amounts, self.seed, epoch)
                self.epochs = {epoch: ids[np.random.default_rng([self.seed, 2, epoch]).permutation(len(ids))]}
            found.append(int(self.epochs[epoch][i]))
        return found


def padded(rows, fill=0.0):
    """[(n,)] -> (B, T) float64."""
    out = np.full((len(rows), max(map(len, rows))), fill)
    for row, values in enumerate(rows):
        out[row, : len(values)] = values
    return out


def collate(rows, prompts, replies, pad_id, start_id=None):
    """Token ids of the rows (numbers of replies) of one forward step; no rows: one of padding, which keeps other ranks company.

    Decoder-only: input_ids (R, S), prompt and reply, padded right. Encoder-decoder (start_id given): source_ids (R, S),
    source_lengths (R,), decoder_ids (R, T), the reply behind the start token. target_index (N,): the flat position that
    predicts each reply token, target_ids (N,) these tokens, row after row.
    """
    pairs = [(np.asarray(prompts[i]), np.asarray(replies[i])) for i in rows] or [(np.array([pad_id]), np.array([], np.int64))]
    if start_id is None:
        texts = [np.concatenate(pair) for pair in pairs]
        before = [len(prompt) - 1 for prompt, _ in pairs]
    else:
        texts = [np.concatenate([[start_id], reply[:-1]]) for _, reply in pairs]
        before = [0] * len(pairs)
    ids = padded(texts, pad_id)
    index = [r * ids.shape[1] + n + np.arange(len(reply)) for r, (n, (_, reply)) in enumerate(zip(before, pairs))]
    arrays = {"target_index": np.concatenate(index), "target_ids": np.concatenate([reply for _, reply in pairs])}
    if start_id is None:
        arrays["input_ids"] = ids
    else:
        sources = [prompt for prompt, _ in pairs]
        arrays.update(decoder_ids=ids, source_ids=padded(sources, pad_id), source_lengths=np.array([len(s) for s in sources]))
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}


def minibatches(args, rollout, epoch):
    """The replies of each optimizer step of one pass over a rollout: a pure function of (seed, rollout, epoch)."""
    order = np.random.default_rng([args.seed, 5, rollout, epoch]).permutation(args.num_rollouts)
    size = args.train_batch_size * args.gradient_accumulation_steps
    return [order[i: i + size] for i in range(0, len(order), size)]


def micro_batches(args, ids, buffer, vocabulary, pad_id, start_id):
    """[(batch, numbers of its replies, logits chunks)] of this rank, one per forward step, and the reply tokens of the whole step."""
    world, n_micro = common.world_size(), args.gradient_accumulation_steps
    pieces = common.deal(ids, buffer.lengths + buffer.prompt_lengths, world * n_micro)
    batches = []
    for g in range(n_micro):
        together = pieces[g * world: (g + 1) * world]  # under ZeRO-3 every rank must call the head equally often
        n_chunks = max(1, -(-max(int(buffer.lengths[p].sum()) for p in together) // common.chunk_tokens(vocabulary)))
        mine = [int(i) for i in together[common.rank()]]
        batches.append((collate(mine, buffer.prompts, buffer.replies, pad_id, start_id), mine, n_chunks))
    return batches, int(buffer.lengths[ids].sum())


# ------------------------------------------------------------------------------------------------ model


class ValueHead(torch.nn.Module):
    """Linear D -> 2 D, ReLU, linear 2 D -> 1 (trlx), or one linear layer D -> 1 with given weights; computed in fp32 whatever the
    weights' type. Parameters of its own, not sub-modules: under ZeRO-3 its forward then has them all."""

    def __init__(self, size, dtype, seed, init="normal", linear=None):
        super().__init__()
        noise = torch.Generator().manual_seed(seed)
        if linear is not None:  # (D,)
            weights = {"out_weight": linear.reshape(1, -1).float(), "out_bias": torch.zeros(1)}
        else:
            weights = {"in_weight": torch.randn(2 * size, size, generator=noise) / (size + 1) ** 0.5, "in_bias": torch.zeros(2 * size),
                       "out_weight": torch.randn(1, 2 * size, generator=noise) / (2 * size + 1) ** 0.5, "out_bias": torch.zeros(1)}
            if init == "zero":
                weights["out_weight"].zero_()
        for name, value in weights.items():
            setattr(self, name, torch.nn.Parameter(value.to(dtype)))

    def forward(self, hidden):
        """(N, D) -> (N,) fp32 (fp64 for fp64 weights)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(wide)
            if hasattr(self, "in_weight"):
                hidden = F.linear(hidden, self.in_weight.to(wide), self.in_bias.to(wide)).relu()
            return F.linear(hidden, self.out_weight.to(wide), self.out_bias.to(wide)).squeeze(-1)


def target_states(model, batch):
    """(N, D) last hidden states at the positions that predict a reply token. Right padding needs no mask in a decoder, and positions
    count from the first token of the prompt."""
    if "source_ids" in batch:
        mask = torch.arange(batch["source_ids"].shape[1], device=batch["source_ids"].device) < batch["source_lengths"][:, None]
        source = model.get_encoder()(input_ids=batch["source_ids"], attention_mask=mask).last_hidden_state
        hidden = model.get_decoder()(input_ids=batch["decoder_ids"], encoder_hidden_states=source, encoder_attention_mask=mask,
                                     use_cache=False).last_hidden_state
    else:
        hidden = model.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[batch["target_index"]]


class Critic(torch.nn.Module):
    """A value model of its own: (N,) values from its own hidden states."""

    def __init__(self, model, head):
        super().__init__()
        self.model, self.head = model, head

    def forward(self, batch):
        return self.head(target_states(self.model, batch))


class Policy(torch.nn.Module):
    """What the engine wraps: forward(batch) -> (log-probabilities (N,), entropies (N,), values (N,) or None), fp32.

    Log-probabilities are those of the sampling distribution, softmax(logits / temperature). critic: None, a `ValueHead` on this
    model's hidden states, or a `Critic`.
    """

    def __init__(self, model, temperature, critic=None):
        super().__init__()
        self.model, self.temperature, self.critic = model, temperature, critic
        use_one_kernel(self)

    def forward(self, batch, n_chunks=1, with_values=True, with_entropy=True, entropy_grad=False):
        model, config = self.model, self.model.config
        hidden, head = target_states(model, batch), model.get_output_embeddings()
        values = None
        if self.critic is not None and with_values:
            values = self.critic(hidden) if isinstance(self.critic, ValueHead) else self.critic(batch)

        def of_chunk(hidden, target_ids):
            scaled = hidden * config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else hidden
            logits = common.finish_logits(config, head(scaled))
            logits = logits + model.final_logits_bias.to(logits.device) if hasattr(model, "final_logits_bias") else logits
            logits = logits.flatten(0, -2)
            logits = (logits if logits.dtype == torch.float64 else logits.float()) / self.temperature
            total = logits.logsumexp(-1)
            entropy = torch.zeros_like(total)
            if with_entropy:
                with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
                    log_p = logits - total[:, None]
                    entropy = -(log_p.exp() * log_p).sum(-1)
            return logits.gather(1, target_ids[:, None]).squeeze(1) - total, entropy
        pairs = list(zip(hidden.tensor_split(n_chunks), batch["target_ids"].tensor_split(n_chunks)))
        if n_chunks == 1 or not torch.is_grad_enabled():
            parts = [of_chunk(h, t) for h, t in pairs]
        else:  # recomputed in the backward pass, so that only one chunk holds logits at a time
            parts = [checkpoint(of_chunk, h, t, use_reentrant=False) for h, t in pairs]
        logprobs, entropies = (torch.cat(part) for part in zip(*parts))
        return logprobs, entropies, values


def use_one_kernel(model):
    """T5's self-attention by a kernel that takes a bias with and without gradient. PyTorch's fast CPU kernel takes it only without, so the pass
    that scores and the update would use different ones, and their log-probabilities would differ in the fifth digit."""
    for path, module in model.named_modules():
        if path.endswith(".SelfAttention"):
            def forward(*inputs, own=module.forward, **options):
                with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                    return own(*inputs, **options)
            module.forward = forward


def no_dropout(policy):
    """Every module in eval mode, for PPO compares the same text's probabilities before and after an update. The blocks that recompute
    activations do so in training mode only: they alone have it, and no dropout of their own."""
    policy.train()
    for child in policy.children():
        child.eval()
    for block in policy.modules():
        if isinstance(block, GradientCheckpointingLayer) and block.gradient_checkpointing:
            block.training = True
            for name, value in vars(block).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(block, name, 0.0)


def freeze_layers(model, n_top):
    """Train the n_top last blocks of the decoder, what follows them, and an untied head; freeze the rest."""
    decoder, embedding, head = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
    config = model.config.get_text_config()
    n_layers = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None) or config.num_hidden_layers
    blocks = next(m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n_layers)
    model.requires_grad_(False)
    inside = {id(p) for p in [*blocks.parameters(), *embedding.parameters()]}
    trained = [p for block in list(blocks)[-n_top:] for p in block.parameters()]
    # besides the blocks a decoder has its last norm, and what comes before the first block
    trained += [p for name, p in decoder.named_parameters() if id(p) not in inside and not re.search("embed|wpe|project_in", name)]
    trained += [p for p in head.parameters() if id(p) not in inside]
    for weight in trained:
        weight.requires_grad_(True)
    return min(n_top, n_layers)


def frozen_args(args, source):
    """The flags as `common.load_model` reads them for a model that is only asked: what trains or quantises the policy is not for it."""
    return types.SimpleNamespace(**{**vars(args), "model_init_path": source, "model_init_name": None, "revision": None, "lora_rank": 0,
                                    "train_adapter": False, "quantize": None, "freeze": None, "no_train": True, "lora_alpha": None,
                                    "lora_targets": None, "reduction_factor": None})


def read_reward_model(args, source, what, problems):
    """Small files of a reward model -> its flags, source, configuration, tokenizer, and how it scores: auto_class, no_yes (ids of a clf.py
    run, or None), template, limit; None where it cannot be used."""
    own, found, n_before = frozen_args(args, named_model(args, source)), [], len(problems)
    path, config, tokenizer = common.open_model_folder(own, found)
    problems += [f"{what}: {problem}" for problem in found]
    if len(problems) > n_before or config is None:
        return None
    if not common.has_weights(path):
        problems.append(f"{what}: {path} has no weights")
    part, about = types.SimpleNamespace(args=own, source=path, config=config, tokenizer=tokenizer, what=what), pathlib.Path(path) / "rawtune.json"
    about = json.loads(about.read_text()) if about.is_file() else {}
    begins = (part.tokenizer.bos_token_id, getattr(part.tokenizer, "cls_token_id", None))
    n_begin = int(part.tokenizer("a").input_ids[0] in begins)
    part.template, part.reward_text, part.no_yes = None, args.reward_text, None
    if about.get("script") == "clf.py":
        layout = about["record_layout"]
        part.template, part.limit = layout["template"], layout["max_length"]
        part.no_yes = [about["verbaliser"]["negative_id"], about["verbaliser"]["positive_id"]]
        part.auto_class = AutoModelForSeq2SeqLM if about["family"] == "seq2seq" else AutoModelForCausalLM
        part.n_end = part.limit - n_begin if about["task"] == "preference" else len(text_ids(part, part.template.rpartition("}")[2])) - n_begin
    else:
        part.auto_class = AutoModelForSequenceClassification
        names = " ".join(config.architectures or [])
        if config.num_labels != 1 or "SequenceClassification" not in names or config.is_encoder_decoder:
            problems.append(f"{what} {part.source}: a {names or config.model_type} with {config.num_labels} outputs; expected a clf.py run, or a "
                            "sequence-classification model (no encoder-decoder) with one logit")
            return None
        positions = getattr(config, "max_position_embeddings", None) or 10**9
        if re.search("roberta|camembert|longformer|mpnet", config.model_type):  # their positions begin behind the padding id
            positions -= config.pad_token_id + 1
        part.limit = min(positions, part.tokenizer.model_max_length)
        part.n_end = part.limit - n_begin
    part.n_params = common.count_parameters(part.auto_class, config)
    return part


class RewardModel(torch.nn.Module):
    """forward(input_ids (R, S) padded right, lengths (R,)) -> (R,) fp32 scores: logit(yes) - logit(no) of a clf.py run as clf.py computes
    it, or the one logit of a sequence classifier, read at the last token that is no padding, whatever id padding has."""

    def __init__(self, model, no_yes):
        super().__init__()
        self.model, self.last, self.no_yes = model, None, no_yes
        head = model.get_output_embeddings() if no_yes else getattr(model, "score", None)

        def few_columns(hidden):  # in fp32: a bf16 logit of 10 has steps of 0.06. Through the head, so that ZeRO-3 gathers its weight
            hidden = hidden if self.last is None else hidden[self.last][:, None]
            wide, columns = torch.promote_types(hidden.dtype, torch.float32), no_yes or slice(None)
            with torch.autocast(hidden.device.type, enabled=False):
                bias = None if getattr(head, "bias", None) is None else head.bias[columns].to(wide)
                return F.linear(hidden.to(wide), head.weight[columns].to(wide), bias)
        if head is not None:
            head.forward = few_columns

    def forward(self, input_ids, lengths):
        model, mask = self.model, torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
        self.last = torch.arange(len(lengths), device=lengths.device), lengths - 1
        if not self.no_yes:
            if not hasattr(model, "score"):  # BERT and its kin: the first token, which padding does not move
                return model(input_ids=input_ids, attention_mask=mask).logits[:, 0].float()
            return model.score(model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state)[:, 0, 0]
        if not model.config.is_encoder_decoder:
            logits = model(input_ids=input_ids, use_cache=False).logits[:, 0]
        else:
            self.last = None
            start = torch.full_like(input_ids[:, :1], model.config.decoder_start_token_id)
            if hasattr(model, "final_logits_bias"):  # BART's family: a bias for each of the V columns
                hidden = model.model(input_ids=input_ids, decoder_input_ids=start, attention_mask=mask, use_cache=False).last_hidden_state[:, 0]
                logits = model.get_output_embeddings()(hidden) + model.final_logits_bias[0, self.no_yes].to(hidden.device)
            else:
                logits = model(input_ids=input_ids, decoder_input_ids=start, attention_mask=mask, use_cache=False).logits[:, 0]
        return logits[:, 1] - logits[:, 0]


class Frozen:
    """A model that is only asked: whole on this device, partitioned by ZeRO-3, or moved here while it is asked."""

    def __init__(self, args, module_of, part, auto_class, precision, ds_config, device):
        stage = ds_config["zero_optimization"]["stage"]
        how = args.frozen_models if args.frozen_models != "auto" else "partitioned" if stage == 3 else "replicated"
        zero = ds_config["zero_optimization"] if stage == 3 else {"stage": 3}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero if how == "partitioned" else {"stage": 0},
                  **{key: ds_config[key] for key in ("bf16", "fp16", "torch_autocast") if key in ds_config}}
        model = common.load_model(auto_class, part.source, part.config, part.args, precision, config)
        self.module, self.device, self.is_offloaded = module_of(model).eval().requires_grad_(False), device, how == "offloaded"
        self.is_partitioned, self.mixed = how == "partitioned", precision == "bf16-mixed"
        self.ask = deepspeed.initialize(model=self.module, config=config)[0] if self.is_partitioned else self.module
        self.module.eval()
        if not self.is_partitioned and not self.is_offloaded:
            self.module.to(device)

    def __enter__(self):
        if self.is_offloaded:
            self.module.to(self.device)
        return self

    def __exit__(self, *_):
        if self.is_offloaded and self.device.type == "cuda":
            self.module.to("cpu")

    @torch.no_grad()
    def __call__(self, *inputs):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed and not self.is_partitioned):
            return self.ask(*inputs)


def update_flops(model, n_prompt_tokens, n_reply_tokens):
    """Floating-point operations of an update's forward and backward pass, embeddings and a separate critic left out."""
    but, head = "embed|wte|wpe|shared|lm_head", model.get_output_embeddings()
    of_head = (6 if head.weight.requires_grad else 4) * model.config.get_text_config().vocab_size * getattr(head, "base_layer", head).in_features
    in_decoder, encoder = n_reply_tokens, 0
    if model.config.is_encoder_decoder:
        encoder = common.flops_per_token(model.get_encoder(), but) * n_prompt_tokens
    else:
        in_decoder += n_prompt_tokens
    return encoder + common.flops_per_token(model.get_decoder(), but) * in_decoder + of_head * n_reply_tokens


# ------------------------------------------------------------------------------------------------ reward


class RewardFunction:
    """--reward_fn file.py:name in a process of its own, so that its time is limited: (prompts, replies, records) -> floats. On rank 0."""

    def __init__(self, spec, timeout, problems):
        self.spec, self.timeout, self.process = spec, timeout, None
        file, colon, name = spec.rpartition(":")
        path = next((p for p in (pathlib.Path(file), common.HERE / file) if p.is_file()), None)
        if not colon or not name.isidentifier() or path is None:
            problems.append(f"reward function {spec!r}: expected file.py:name" + ("" if path else f"; there is no file {file!r}"))
            return
        self.path, self.name, self.sha256 = path.resolve(), name, common.file_sha256(path)
        if common.rank() == 0:
            self._start()
            answer = self._answer()
            if answer != "ready":
                problems.append(f"reward function {spec}: {answer[0]}")

    def _start(self):
        env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
        self.process = subprocess.Popen([sys.executable, "-c", WORKER, str(self.path), self.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        self.received = b""

    def _answer(self):
        """The next line of the process, parsed; or what went wrong, as a tuple of one text."""
        end, pipe = time.monotonic() + self.timeout, self.process.stdout.fileno()
        while b"\n" not in self.received:
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                self.process.kill()
                return (f"no answer within {self.timeout:g} s; make it faster, or raise --reward_timeout",)
            piece = os.read(pipe, 2**20)
            if not piece:
                return (f"it ended with exit code {self.process.wait()}; what it said is above",)
            self.received += piece
        line, _, self.received = self.received.partition(b"\n")
        return json.loads(line)

    def __call__(self, prompts, replies, records):
        request = (json.dumps([prompts, replies, records]) + "\n").encode()
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said in the end is in _answer
        answer = self._answer()
        if isinstance(answer, tuple):
            common.fail(f"reward function {self.spec}: {answer[0]}", only_here=True)
        same = len(answer) == len(replies)
        bad = next((i for i, value in enumerate(answer) if not math.isfinite(value)), None) if same else None
        if not same or bad is not None:
            common.fail(f"reward function {self.spec}: " + (f"{len(answer)} numbers for {len(replies)} replies" if not same else
                        f"{answer[bad]} for the reply {replies[bad]!r} to {prompts[bad]!r}; expected a finite number"), only_here=True)
        return answer


def text_ids(part, text):
    """Token ids as the model was trained on: clf.py takes off an end token that some tokenizers of decoder-only models add."""
    ids = part.tokenizer(text).input_ids
    is_causal_run = part.no_yes and not part.config.is_encoder_decoder
    return ids[:-1] if is_causal_run and len(ids) > 1 and ids[-1] == part.tokenizer.eos_token_id else ids


def reward_ids(part, prompt, reply, record, joined):
    """Ids of what a reward model reads of one reply. joined: prompt and reply as one text, as the policy wrote it."""
    values = {**record, "prompt": prompt, "reply": reply}

    def fill(template):
        return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)
    values["input"] = joined if part.reward_text is None else fill(part.reward_text)
    if part.template is not None or part.reward_text is not None:
        ids = text_ids(part, values["input"] if part.template is None else fill(part.template))
    elif getattr(part.tokenizer, "chat_template", None):
        before = common.clean_messages(record["messages"]) if "messages" in record else [{"role": "user", "content": prompt}]
        messages = [*before, {"role": "assistant", "content": reply}]
        ids = part.tokenizer(part.tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids
    else:
        ids = text_ids(part, joined)
    if part.limit and len(ids) > part.limit:  # as clf.py: what the template filled in loses its end, a preference and other texts their beginning
        ids = ids[: part.limit - part.n_end] + ids[len(ids) - part.n_end:]
    return ids or [part.tokenizer.pad_token_id or 0]


def score_replies(args, reward, prompts, replies, records, joined, device):
    """Collective. (n,) float64 scores of replies, the same on every rank. reward: a `RewardFunction`, or (part, Frozen)."""
    if isinstance(reward, RewardFunction):
        return np.array(common.broadcast(reward(prompts, replies, records) if common.rank() == 0 else None, device))
    part, model = reward
    ids = [reward_ids(part, *row) for row in zip(prompts, replies, records, joined)]
    mine, n_rounds = common.my_batches(len(ids), np.array([len(i) for i in ids]), args.eval_batch_size)
    found = torch.zeros(len(ids), dtype=torch.float64)
    with model:
        for round_ in range(n_rounds if model.is_partitioned else len(mine)):
            rows = mine[round_] if round_ < len(mine) else []
            texts = [ids[i] for i in rows] or [[0]]
            lengths = torch.tensor([len(text) for text in texts], device=device)
            batch = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
            for row, text in enumerate(texts):
                batch[row, : len(text)] = torch.tensor(text)
            scores = model(batch.to(device), lengths)
            if rows:
                found[rows] = scores.double().cpu()
    found = found.to(device)
    dist.all_reduce(found)  # each row is one rank's, the others hold zeros
    found = found.cpu().numpy()
    if not np.isfinite(found).all():
        common.fail(f"{part.what} {part.source}: {int((~np.isfinite(found)).sum())} of {len(found)} replies have no finite score")
    return found


# ------------------------------------------------------------------------------------------------ rollouts


@torch.no_grad()
def rollout(model, prompts, keys, temperature, max_new_tokens, stop_ids, pad_id, device, synced=False):
    """One reply to each prompt: [(ids (n,) int64, log-probabilities (n,) fp32)]. This is the seam for an external engine.

    prompts: list of (n,) int64 ids; keys: one int64 each, the seed of its noise. What must hold for every engine: a reply ends with
    the first of stop_ids, which belongs to it, or after max_new_tokens; tokens are drawn from softmax(logits / temperature) of
    `model` (the engine's current weights), uncut; the same key gives the same reply. temperature <= 0.001: greedy.
    synced: all ranks run equally many forward passes, as ZeRO-3 needs, ranks without prompts too.

    Rows share a cache that grows to the right, prompts are padded on the left (of an encoder: on the right); a row that has ended
    leaves the batch at once, so finished replies cost nothing.
    """
    config, n, sampled = model.config, len(prompts), temperature > 0.001
    prompts = prompts or [np.array([pad_id])]
    width, lengths = max(map(len, prompts)), torch.tensor([len(p) for p in prompts], device=device)
    is_source, takes = config.is_encoder_decoder, inspect.signature(model.forward).parameters
    pads = [(0, width - len(p)) if is_source else (width - len(p), 0) for p in prompts]
    feed = torch.from_numpy(np.stack([np.pad(p, pad, constant_values=pad_id) for p, pad in zip(prompts, pads)])).to(device)
    columns = torch.arange(width, device=device)
    mask = (columns < lengths[:, None] if is_source else columns >= width - lengths[:, None]).long()
    options, source = {"use_cache": True}, None
    if is_source:
        source = model.get_encoder()(input_ids=feed, attention_mask=mask)
        feed = torch.full_like(feed[:, :1], config.decoder_start_token_id)
        options["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
    else:
        options["past_key_values"] = DynamicCache()
        if "logits_to_keep" in takes:
            options["logits_to_keep"] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    keys = torch.tensor(keys or [0], device=device)[:, None]
    replies = torch.full((len(prompts), max_new_tokens), pad_id, device=device)
    logprobs, sizes = torch.zeros(replies.shape, device=device), torch.zeros(len(prompts), dtype=torch.int64, device=device)
    alive, stops, is_idle = torch.arange(len(prompts), device=device), torch.tensor(stop_ids, device=device), n == 0
    for t in range(max_new_tokens):
        if is_source:
            logits = model(encoder_outputs=source, attention_mask=mask, decoder_input_ids=feed, **options).logits[:, -1]
        else:
            place = {"position_ids": positions} if "position_ids" in takes else {}
            logits = model(input_ids=feed, attention_mask=mask, **place, **options).logits[:, -1]
        logits = logits.float() / (temperature if sampled else 1.0)
        noise = common.RowKeyedSampler.gumbel(keys + t, torch.arange(logits.shape[1], device=device)) if sampled else 0.0
        token = (logits + noise).argmax(-1)
        if not is_idle:
            replies[alive, t], sizes[alive] = token, t + 1
            logprobs[alive, t] = logits.gather(1, token[:, None]).squeeze(1) - logits.logsumexp(-1)
        goes_on = ~torch.isin(token, stops)
        n_on = 0 if is_idle else int(goes_on.sum())
        if not (common.all_reduce_sum([n_on], device)[0] if synced else n_on):
            break
        if not is_idle and n_on < len(token):
            kept = goes_on.nonzero().squeeze(1)
            if n_on == 0:  # the others go on: keep them company with one row
                is_idle, kept = True, torch.zeros(1, dtype=torch.int64, device=device)
            options["past_key_values"].batch_select_indices(kept)
            alive, keys, token, positions, mask = (x[kept] for x in (alive, keys, token, positions, mask))
            if is_source:
                source = type(source)(last_hidden_state=source.last_hidden_state[kept])
        feed = token[:, None]
        if not is_source:
            positions, mask = positions[:, -1:] + 1, F.pad(mask, (0, 1), value=1)
    sizes, replies, logprobs = sizes[:n].tolist(), replies[:n].cpu().numpy(), logprobs[:n].cpu().numpy()
    return [(reply[:size].copy(), logprob[:size]) for size, reply, logprob in zip(sizes, replies, logprobs)]


def all_replies(args, engine, prompts, keys, temperature, batch_size, stop_ids, pad_id, device):
    """Collective. Replies to all prompts, in their order, on every rank. Sorted by length and sampled in batches, which ranks share out."""
    mine, n_rounds = common.my_batches(len(prompts), np.array([len(p) for p in prompts]), batch_size)
    model, synced = common.generating_model(args, engine, device)
    found = {}
    for round_ in tqdm(range(n_rounds if synced else len(mine)), desc="sampling", delay=5, disable=common.rank() > 0 or None, leave=False):
        rows = mine[round_] if round_ < len(mine) else []
        with torch.autocast(device.type, torch.bfloat16, enabled=engine.torch_autocast_enabled()):
            found.update(zip(rows, rollout(model, [prompts[i] for i in rows], [keys[i] for i in rows], temperature, args.max_new_tokens, stop_ids,
                                           pad_id, device, synced)))
    del model
    return gather(found)


def gather(found):
    """Collective. {row: anything} of each rank -> list of all rows, on every rank."""
    parts = [None] * common.world_size()
    dist.all_gather_object(parts, found)
    together = {row: value for part in parts for row, value in part.items()}
    return [together[row] for row in sorted(together)]


@torch.no_grad()
def score_tokens(engine, reference, steps, lengths, device):
    """Collective. Per reply: log-probabilities of the policy and of the reference, and values, by the forward steps of the first updates,
    so that their first ratio is exactly 1. steps: [micro-batches of an optimizer step]. Returns three lists of (n,) float64 arrays."""
    found = {}
    for batch, rows, n_chunks in (forward for batches in steps for forward in batches):
        batch = common.to_device(batch, device)
        new, _, values = engine(batch, n_chunks, True, False)
        with common.adapters_off(engine.module.model) if reference is None else contextlib.nullcontext():
            old, *_ = (reference or engine)(batch, n_chunks, False, False)
        ends = np.cumsum([lengths[i] for i in rows])[:-1]
        columns = [np.split(x.double().cpu().numpy(), ends) for x in (new, old, torch.zeros_like(new) if values is None else values)]
        found.update(zip(rows, zip(*columns)))
    return [list(column) for column in zip(*gather(found))]


# ------------------------------------------------------------------------------------------------ PPO mathematics


def kl_terms(d, estimator):
    """Per-token estimates of KL(policy, reference) from d = log policy - log reference at sampled tokens (Schulman 2020, "Approximating KL
    divergence"): k1 = d, unbiased; k2 = d^2 / 2; k3 = exp(-d) - 1 + d, unbiased, never negative. Arrays or tensors."""
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d * d / 2
    return (torch.expm1(-d) if torch.is_tensor(d) else np.expm1(-d)) + d


def token_rewards(kl, scores, is_reply, kl_coef):
    """-kl_coef kl of every reply token, and the score on the last one (Ziegler et al. 2019, eq. 2). kl, is_reply: (B, T), True = a reply
    token; scores: (B,) -> (B, T)."""
    rewards = np.where(is_reply, -kl_coef * kl, 0.0)
    rewards[np.arange(len(scores)), is_reply.sum(1) - 1] += scores
    return rewards


def gae(rewards, values, is_reply, gamma, lam):
    """Advantages and returns (B, T) (Schulman et al. 2016, eq. 16); the value behind the last reply token is 0, and so is everything
    outside is_reply. Rewards 0, 0, 1, values 0, gamma 1, lambda 0.5 -> advantages 0.25, 0.5, 1."""
    rewards, values = np.where(is_reply, rewards, 0.0), np.where(is_reply, values, 0.0)
    advantages, later, next_value = np.zeros_like(rewards), np.zeros(len(rewards)), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        later = np.where(is_reply[:, t], delta + gamma * lam * later, 0.0)
        advantages[:, t], next_value = later, values[:, t]
    return advantages, advantages + values


def whiten(x, is_reply):
    """Mean 0, variance 1 over the reply tokens of the whole rollout: unbiased variance, 1e-8 under the root; 0 elsewhere. (B, T)."""
    n = int(is_reply.sum())
    mean = x[is_reply].mean()
    variance = ((x[is_reply] - mean) ** 2).sum() / max(1, n - 1)
    return np.where(is_reply, (x - mean) / np.sqrt(variance + 1e-8), 0.0)


def group_advantages(scores, n_samples, kind):
    """(B,) advantages of replies, n_samples to each prompt, in order. rloo: score - mean of the others (Ahmadian et al. 2024, eq. 8);
    grpo: (score - mean) / (unbiased deviation + 1e-4) (Shao et al. 2024, section 4.1.2). rloo of 1, 3 -> -2, 2."""
    groups = scores.reshape(-1, n_samples)
    mean = groups.mean(1, keepdims=True)
    if kind == "rloo":
        return ((groups - mean) * n_samples / (n_samples - 1)).reshape(-1)
    return ((groups - mean) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)


def estimate_advantages(args, old, of_reference, values, scores, is_reply, kl_coef):
    """(advantages (B, T), returns (B, T), KL of each reply (B,), {metric: number}) of a rollout, from log-probabilities of policy and
    reference and values, each (B, T), and scores (B,)."""
    kl = np.where(is_reply, kl_terms(np.where(is_reply, old - of_reference, 0.0), args.kl_estimator), 0.0)
    reply_kl, metrics = kl.sum(1), {"kl": kl.sum(1).mean(), "kl_per_token": kl.sum() / is_reply.sum()}
    if args.advantage == "gae":
        advantages, returns = gae(token_rewards(kl, scores, is_reply, kl_coef), values, is_reply, args.gamma, args.lam)
        spread = returns[is_reply].var()
        metrics.update(returns=returns[is_reply].mean(), values=values[is_reply].mean(),
                       explained_variance=1 - (returns - values)[is_reply].var() / spread if spread else 0.0)
        return whiten(advantages, is_reply), returns, reply_kl, metrics
    # rloo: the price of the KL is part of the score; grpo: part of the loss
    whole = scores - kl_coef * reply_kl if args.advantage == "rloo" else scores
    return group_advantages(whole, args.n_samples, args.advantage)[:, None] * is_reply, np.zeros(is_reply.shape), reply_kl, metrics


def policy_losses(new, old, advantages, cliprange, dual_clip=0.0):
    """(losses, ratio, is_clipped), each (N,): max(-A r, -A clip(r, 1 - c, 1 + c)), r = exp(new - old) (Schulman et al. 2017, eq. 7). dual_clip:
    where A < 0 at most -A dual_clip (Ye et al. 2020, eq. 5)."""
    ratio = torch.exp(new - old)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    losses = torch.maximum(plain, clipped)
    if dual_clip:
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)
    return losses, ratio, clipped > plain


def value_losses(new, old, returns, cliprange):
    """(losses, is_clipped), each (N,): half the larger squared error of the value and of the value within cliprange of the old one; 0: not
    clipped (Schulman et al. 2016b, as in OpenAI's baselines)."""
    plain = (new - returns) ** 2
    if not cliprange:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    clipped = (old + (new - old).clamp(-cliprange, cliprange) - returns) ** 2
    return torch.maximum(plain, clipped) / 2, (clipped > plain) & ((new - old).abs() > cliprange)  # old + (new - old) rounds


def next_kl_coef(kl_coef, kl, target, horizon, n):
    """Adaptive KL penalty (Ziegler et al. 2019, section 2.2): beta (1 + clip(kl / target - 1, +-0.2) n / horizon). kl: mean of a reply [nats];
    n: replies it was measured on."""
    return kl_coef * (1 + min(0.2, max(-0.2, kl / target - 1)) * n / horizon)


def add_to_stats(stats, values):
    """Running count, mean and sum of squared deviations with `values` added (Chan et al. 1979)."""
    n, mean, squares = stats
    m = len(values)
    own, total = float(values.mean()), n + m
    delta = own - mean
    return [total, mean + delta * m / total, squares + float(((values - own) ** 2).sum()) + delta * delta * n * m / total]


def shaped_scores(args, scores, has_end, stats):
    """What the reward model's scores count as: scaled by the running statistics, clipped, minus the penalty of replies without an end."""
    if args.reward_scaling != "none":
        deviation = math.sqrt(stats[2] / max(1, stats[0] - 1)) + 1e-8
        scores = (scores - (stats[1] if args.reward_scaling == "norm" else 0.0)) / deviation
    if args.cliprange_reward:
        scores = scores.clip(-args.cliprange_reward, args.cliprange_reward)
    return scores - args.missing_eos_penalty * ~has_end


# ------------------------------------------------------------------------------------------------ evaluation


def reply_texts(prompts, texts, prompt_ids, reply_ids):
    """(replies as text, prompt and reply as one text), special tokens left out. An encoder-decoder's two texts are joined by a blank line."""
    decode = prompts.tokenizer.batch_decode
    replies = decode([reply.tolist() for reply in reply_ids], skip_special_tokens=True)
    if prompts.encoder_decoder:
        return replies, [f"{text}\n\n{reply}" for text, reply in zip(texts, replies)]
    return replies, decode([[*prompt.tolist(), *reply.tolist()] for prompt, reply in zip(prompt_ids, reply_ids)], skip_special_tokens=True)


def evaluate(args, engine, prompts, data_sets, split, rewards, step, run_dir, device):
    """Collective. Replies to the prompts of `split` at --eval_temperature, their rewards, length and share with an end; writes the
    predictions; returns the metrics on every rank. rewards: {"reward": .., "heldout_reward": ..}."""
    rows = [(d, i) for d in data_sets for i in range(len(d.ids[split]))]
    started = time.perf_counter()
    engine.eval()
    keys = [common.derive_seed(args.seed, "evaluation", step, n) for n in range(len(rows))]
    try:
        ids = [reply for reply, _ in all_replies(args, engine, [d.ids[split][i] for d, i in rows], keys, args.eval_temperature,
                                                 args.eval_batch_size, prompts.stop_ids, prompts.pad_id, device)]
    except torch.OutOfMemoryError as error:
        common.fail(f"step {step}, evaluation: out of memory ({str(error).splitlines()[0]}). Next: a smaller --eval_batch_size, then a "
                    "smaller --max_new_tokens, then --zero3_generation synced", only_here=True)
    texts, records = [d.texts[split][i] for d, i in rows], [d.records[split][i] for d, i in rows]
    replies, joined = reply_texts(prompts, texts, [d.ids[split][i] for d, i in rows], ids)
    scores = {name: score_replies(args, reward, texts, replies, records, joined, device) for name, reward in rewards.items()}
    no_dropout(engine.module)
    has_end = [bool(len(reply)) and int(reply[-1]) in prompts.stop_ids for reply in ids]
    metrics = {}
    for prefix, members in [("", data_sets)] + [(f"{d.name}/", [d]) for d in data_sets if len(data_sets) > 1]:
        of_group = [n for n, (d, _) in enumerate(rows) if d in members]
        if of_group:
            metrics.update({f"{prefix}{name}": float(values[of_group].mean()) for name, values in scores.items()})
            metrics.update({f"{prefix}reply_tokens": float(np.mean([len(ids[n]) for n in of_group])),
                            f"{prefix}eos_rate": float(np.mean([has_end[n] for n in of_group]))})
    metrics.update(eval_seconds=round(time.perf_counter() - started, 2), peak_memory_gb=common.peak_memory_gb(device))
    if common.rank() == 0:
        common.write_json(run_dir / predictions_name(args, split, step), [
            {"prompt": texts[n], "generations": [{"lm_postprocess": replies[n], **{name: float(values[n]) for name, values in scores.items()}}],
             "demonstration": records[n].get("completion"), "orig_d": records[n], "dataset": d.name} for n, (d, _) in enumerate(rows)])
    return metrics


def predictions_name(args, split, step):
    return f"{'test_' if split == 'test' else ''}temperature={args.eval_temperature:.2f}_n=1_step={step}.json"


def show_before_and_after(args, run_dir, step):
    """Rank 0: ten evaluation prompts with the first reply and the last."""
    files = [run_dir / predictions_name(args, "eval", s) for s in (0, step)]
    if step and all(file.is_file() for file in files):
        before, after = (json.loads(file.read_text()) for file in files)
        for old, new in list(zip(before, after))[:10]:
            (a,), (b,) = old["generations"], new["generations"]
            log.info(f"{old['prompt'][-200:]!r}\n    before: {a['lm_postprocess'][:200]!r} ({a['reward']:.3g})\n"
                     f"    after:  {b['lm_postprocess'][:200]!r} ({b['reward']:.3g})")


# ------------------------------------------------------------------------------------------------ guards


def sampler_gap(sampled, old):
    """Mean |difference| of the log-probabilities while sampling and of the whole text; 0 where the sampler gives none."""
    pairs = [(logprobs, mine) for (_, logprobs), mine in zip(sampled, old) if logprobs is not None]
    return float(np.mean(np.abs(np.concatenate([a - b for a, b in pairs])))) if pairs else 0.0


def check_rollout(precision, sampled, old, of_reference, state, step):
    """Two identities, the same on every rank: the sampler's log-probabilities are the policy's, and over each hundred replies or more the mean
    KL to the reference is not negative by more than chance (5 standard errors)."""
    gap = sampler_gap(sampled, old)
    if not gap <= SAMPLER_BOUND[precision]:
        common.fail(f"step {step}: the sampler's log-probabilities differ by {gap:.3g} on average from those of the whole text (allowed in {precision}: "
                    f"{SAMPLER_BOUND[precision]:g}). One of the two sees other positions, another mask or other weights, or `common.finish_logits` does not "
                    "know what this family does to its logits")
    n, mean, squares = state["kl_stats"] = add_to_stats(state["kl_stats"], np.array([(a - b).sum() for a, b in zip(old, of_reference)]))
    if n < 100:
        return
    error, state["kl_stats"] = math.sqrt(squares / (n - 1) / n), [0, 0.0, 0.0]
    if not mean >= -5 * error - (1e-6 if precision in ("fp32", "fp64") else 0.05):
        common.fail(f"step {step}: the KL to the reference is {mean:.4g} nats a reply, {-mean / max(error, 1e-12):.1f} standard errors below 0, which "
                    "sampled replies cannot give: they were not drawn from the policy whose probabilities are trained")


def check_update(args, precision, found, n_targets, largest, is_first, step):
    """Collective. Before an update: its loss is finite, the policy is near the one that sampled, and before the first update it is that one."""
    if not math.isfinite(found["loss"]):
        common.fail(f"step {step + 1}: the loss is {found['loss']}. Nothing of this step was applied; checkpoints are intact. "
                    "Lower --learning_rate, set --max_grad_norm 1.0, or try --precision fp32")
    moved = found["log_ratio"] / n_targets  # not a KL, which one rare token would dominate
    if args.max_log_ratio and moved > args.max_log_ratio:
        common.fail(f"step {step + 1}: the policy is {moved:.3g} nats per token away from the one that sampled (--max_log_ratio {args.max_log_ratio:g}). "
                    "Nothing of this step was applied; checkpoints are intact. Lower --learning_rate, --ppo_epochs or --cliprange")
    if is_first:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        if largest.item() > RATIO_BOUND[precision]:
            common.fail(f"step {step + 1}: before the first update of a rollout the log-ratio must be 0, and it is {largest.item():.3g} (allowed in "
                        f"{precision}: {RATIO_BOUND[precision]:g}). Something differs between two passes over the same text: dropout, or a kernel "
                        "that is not deterministic")


def warn_of_trends(args, state, means, step):
    """Once each: replies twice or half as long as in the first rollout, ends half as often, and a value loss that the shared layers follow
    more than the policy's."""
    if state["start"] is None:
        state["start"] = {"reply_tokens": float(means["reply_tokens"]), "eos_rate": float(means["eos_rate"])}
    start = state["start"]
    for name, is_off, text in (
            ("length", not 0.5 <= means["reply_tokens"] / start["reply_tokens"] <= 2, f"replies have {means['reply_tokens']:.3g} tokens, at the start "
             f"{start['reply_tokens']:.3g}: is length what the reward likes?"),
            ("eos_rate", start["eos_rate"] >= 0.1 and means["eos_rate"] < 0.5 * start["eos_rate"], f"{100 * means['eos_rate']:.3g} % of the replies end by themselves, at the start "
             f"{100 * start['eos_rate']:.3g} %: --missing_eos_penalty makes it cost something"),
            ("value_loss", args.critic == "trunk" and args.vf_coef * means.get("value_loss", 0) > 2, f"the value loss is {means.get('value_loss', 0):.3g}, and "
             "the layers that the critic shares with the policy follow it: --reward_scaling norm, a smaller --vf_coef or --critic reward_model")):
        if is_off and name not in state["warned"]:
            state["warned"].append(name)
            log.warning(f"step {step}: {text}")


# ------------------------------------------------------------------------------------------------ training


def prepare(args):
    """Everything that can be wrong is found here and reported together, before any weight is loaded and before the
    processes meet. Returns what main needs; None after --estimate."""
    problems = []
    check_args(args, problems)
    source, config, tokenizer = common.open_model_folder(args, problems)
    precision, auto_class, prompts, n_params, n_trained, quantized, plan = common.resolve_precision(args), None, None, 0, 0, (0, 0), None
    if config is not None:
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is not None:
            auto_class = AutoModelForSeq2SeqLM
        elif common.is_decoder_only(config):
            auto_class = AutoModelForCausalLM
        else:
            problems.append(f"model {source!r} is a {config.model_type}: expected an encoder-decoder with a decoder_start_token_id, or a "
                            "decoder-only language model")
    if auto_class:
        plan = common.adapter_plan(args, source, config, [])
        n_params = common.count_parameters(auto_class, config)
        n_trained, quantized = common.count_trained(auto_class, source, config, args, n_params, problems)
        prompts = Prompts(args, source, config, tokenizer, problems)
    n_top = (0 if plan.kind != "none" else 2) if plan and args.num_layers_unfrozen is None else args.num_layers_unfrozen or 0
    if plan and plan.kind != "none" and args.num_layers_unfrozen:
        problems.append("--num_layers_unfrozen has no effect beside an adapter, which freezes the model")
    if n_top and plan:
        with torch.device("meta"):
            twin = auto_class.from_config(config)
        n_top = freeze_layers(twin, n_top)
        n_trained = sum(p.numel() for p in twin.parameters() if p.requires_grad)
    adapter_off = bool(plan) and plan.kind != "none" and plan.folder is None and args.reference != "copy"
    if plan and args.reference == "adapter_off" and plan.folder:
        problems.append(f"--reference adapter_off: {source} is a trained adapter, without which the policy is not what it starts as; leave it out")
    rewards, fingerprint = {}, common.tokenizer_fingerprint(tokenizer) if auto_class else None
    for name, model, function in (("reward", args.reward_model, args.reward_fn),
                                  ("heldout_reward", args.heldout_reward_model, args.heldout_reward_fn)):
        if function:
            rewards[name] = RewardFunction(function, args.reward_timeout, problems)
        elif model:
            rewards[name] = read_reward_model(args, model, f"--{name}_model" if name != "reward" else "--reward_model", problems)
    models = [part for part in rewards.values() if isinstance(part, types.SimpleNamespace)]
    if args.critic == "reward_model" and models and auto_class and isinstance(rewards["reward"], types.SimpleNamespace):
        part = rewards["reward"]
        if part.config.is_encoder_decoder != config.is_encoder_decoder or config.is_encoder_decoder and not part.no_yes:
            problems.append(f"--critic reward_model: {part.source} is a {part.config.model_type}, the policy a {config.model_type}; both must be "
                            "decoder-only, or both encoder-decoders")
        elif common.tokenizer_fingerprint(part.tokenizer) != fingerprint:
            problems.append(f"--critic reward_model: {part.source} has another tokenizer than the policy, so it cannot read its tokens")
        n_trained += part.n_params
    n_all = n_params * (1 if adapter_off or args.no_train else 2) + sum(part.n_params for part in models)
    n_all += rewards["reward"].n_params if args.critic == "reward_model" and rewards.get("reward") else 0
    if args.estimate and not problems:
        log.info(common.estimate_table(n_all, precision, common.device_memory(), n_trained, quantized))
        return None
    data_sets = load_data(args, prompts, problems)
    for part in models:
        missing = set(re.findall(r"\{(\w+)\}", (part.template or "") + (part.reward_text or ""))) - {"prompt", "reply", "input"}
        bad = [(d.name, split, i, key) for d in data_sets for split, records in d.records.items() for i, record in enumerate(records)
               for key in sorted(missing) if not isinstance(record.get(key), str)]
        problems += [f"{name}, {split} prompt {i + 1}: no text {key!r}, which the template of {part.what} fills in" for name, split, i, key in bad]
        if part.template is None and part.reward_text is None and getattr(part.tokenizer, "chat_template", None):
            for data, record in ((d, record) for d in data_sets for records in d.records.values() for record in records):
                try:
                    reward_ids(part, record.get("prompt", ""), "a reply", record, "")
                except Exception as error:  # jinja2's and the template's own
                    problems.append(f"{data.name}: the chat template of {part.what} refuses {str(record)[:100]} ({error}); --reward_text does without it")
    if args.reward_text and models and all(part.template and "{input}" not in part.template for part in models):
        problems.append(f"--reward_text has no effect: {models[0].source} is a clf.py run whose template {models[0].template!r} has no {{input}}")
    if -(-args.num_rollouts // args.rollout_batch_size) < common.world_size() and not args.no_train:
        log.warning(f"--num_rollouts {args.num_rollouts} in batches of --rollout_batch_size {args.rollout_batch_size} leave some of {common.world_size()} "
                    "processes without replies to sample: lower the second")
    limit = None if config is None or "t5" in config.model_type else getattr(config, "max_position_embeddings", None)
    longest = max((len(ids) for d in data_sets for split in d.ids.values() for ids in split), default=0)
    longest = longest if auto_class is AutoModelForSeq2SeqLM else longest + args.max_new_tokens
    if limit and max(longest, args.max_new_tokens) > limit:
        problems.append(f"--seq_length {args.seq_length}: prompts and replies of up to {max(longest, args.max_new_tokens)} tokens, and {source} has {limit} positions; "
                        f"set --seq_length {limit} or less, or a smaller --max_new_tokens")
    identity = {"data_sha256": [d.sha256 for d in data_sets], "resolved_precision": precision,
                "effective_batch": args.train_batch_size * args.gradient_accumulation_steps, "reward_sha256": {
                    name: part.sha256 for name, part in rewards.items() if hasattr(part, "sha256")}}
    state = {"step": 0, "best": None, "best_step": None, "evals_since_best": 0, "last_eval": None, "rollout": 0, "kl_coef": args.init_kl_coef,
             "init_kl_coef": args.init_kl_coef, "kl_stats": [0, 0.0, 0.0], "weights_sha256": None,
             "reward_stats": [0, 0.0, 0.0], "start": None, "warned": [], "kl": 0.0, "best_proxy": None, "eval_due": True}
    run_dir, resume_from, state, ds_name, ds_config = common.plan_run(
        args, source, identity, FREE_FLAGS, state, n_all if n_params else 0, n_trained, precision, problems, quantized)
    for what, path in [*((part.what, part.source) for part in models), *([("--critic_init", named_model(args, args.critic_init))] if args.critic_init else [])]:
        if args.overwrite and run_dir.resolve() in (pathlib.Path(path).resolve(), *pathlib.Path(path).resolve().parents):
            problems.append(f"--overwrite would rename {run_dir}, in which is what {what} names: choose another --training_run_name")
    if args.no_train:
        problems += [f"{path} exists; move it away or choose another --training_run_name" for path in
                     (run_dir / predictions_name(args, split, 0) for split in ("eval", "test") if any(d.ids[split] for d in data_sets)) if path.exists()]
    if problems:
        common.fail(problems)
    return types.SimpleNamespace(source=source, config=config, tokenizer=tokenizer, precision=precision, n_params=n_params, ds_name=ds_name,
                                 data_sets=data_sets, run_dir=run_dir, identity=identity, resume_from=resume_from, state=state, ds_config=ds_config,
                                 auto_class=auto_class, prompts=prompts, rewards=rewards, n_top=n_top, adapter_off=adapter_off)


def make_critic(args, job, model, precision, ds_config):
    """None, a `ValueHead` on the policy's hidden states, or a `Critic` that starts as the reward model: its value is that model's score."""
    if args.advantage != "gae":
        return None
    dtype, seed = common.DTYPES[precision], common.derive_seed(args.seed, "value head")
    if args.critic == "trunk":
        head = model.get_output_embeddings()
        critic = ValueHead(getattr(head, "base_layer", head).in_features, dtype, seed, args.value_head_init)
    else:
        part = job.rewards["reward"]
        own = common.load_model(part.auto_class, part.source, part.config, part.args, precision, ds_config)
        head = own.get_output_embeddings() if part.no_yes else own.score
        with deepspeed.zero.GatheredParameters([head.weight], enabled=hasattr(head.weight, "ds_id")):
            rows = head.weight.detach().cpu().float()
            linear = rows[part.no_yes[1]] - rows[part.no_yes[0]] if part.no_yes else rows[0].clone()
        if getattr(part.config, "scale_decoder_outputs", False):
            linear = linear * part.config.d_model**-0.5
        own.requires_grad_(True)
        if args.gradient_checkpointing:
            own.gradient_checkpointing_enable({"use_reentrant": False})
        if not part.no_yes or head.weight is not own.get_input_embeddings().weight:
            head.requires_grad_(False)  # the value head takes its place
        critic = Critic(own, ValueHead(len(linear), dtype, seed, linear=linear))
    if args.critic_init:
        folder = pathlib.Path(named_model(args, args.critic_init)) / "critic"
        with common.safetensors.safe_open(folder / "model.safetensors", "pt") as file:
            if {name: file.get_slice(name).get_shape() for name in file.keys()} != {
                    name: list(getattr(p, "ds_shape", p.shape)) for name, p in critic.named_parameters()}:
                common.fail(f"--critic_init {args.critic_init}: not the weights of a critic of this kind; choose the --critic that it was trained with")
        common.copy_weights(critic, folder)
    return critic


def main(args):
    # 1 setup, 2 data
    common.adopt_launcher()
    common.start_log()
    job = prepare(args)
    if job is None:
        return 0
    source, config, tokenizer, data_sets, prompts, run_dir = job.source, job.config, job.tokenizer, job.data_sets, job.prompts, job.run_dir
    device, resume_from, state, precision, ds_name, ds_config, universal = common.begin_run(args, job, __file__)
    rank, world = common.rank(), common.world_size()

    # 3 model
    source = common.base_of_run(job.auto_class, source, config, tokenizer, args, precision, run_dir)
    model = common.load_model(job.auto_class, source, config, args, precision, ds_config)
    if job.n_top:
        freeze_layers(model, job.n_top)
        common.freeze(model, args.freeze)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if precision == "bf16-mixed":
        model.get_output_embeddings().register_forward_hook(common.refuse_fp32_logits)
    policy = Policy(model, args.temperature, None if args.no_train else make_critic(args, job, model, precision, ds_config))
    reference, rewards = None, {}
    if not args.no_train and not job.adapter_off:
        own = types.SimpleNamespace(**{**vars(args), "lora_rank": 0, "train_adapter": False, "freeze": None})
        part = types.SimpleNamespace(source=source, config=config, args=own)
        reference = Frozen(args, lambda model: Policy(model, args.temperature), part, job.auto_class, precision, ds_config, device)
    for name, reward in job.rewards.items():
        rewards[name] = reward if isinstance(reward, RewardFunction) else (
            reward, Frozen(args, lambda model, part=reward: RewardModel(model, part.no_yes), reward, reward.auto_class, precision, ds_config, device))

    # 4 engine
    optimizer = None
    if not args.no_train:
        optimizer = torch.optim.AdamW(common.param_groups(policy, args.weight_decay), lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    elif ds_config["zero_optimization"]["stage"] < 3:  # without an optimizer there is nothing to partition
        ds_config.update(zero_optimization={"stage": 0}, bf16={"enabled": False}, fp16={"enabled": False})
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=ds_config)
    no_dropout(policy)
    n_trained = sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters() if p.requires_grad)
    log.info(f"{source}: {job.n_params / 1e6:.2f} M parameters, {n_trained / 1e6:.2f} M trained, {precision}, ZeRO stage "
             f"{engine.zero_optimization_stage()}, {world} process(es) on {device.type}, prompts {'raw' if prompts.is_raw else 'by the chat template'}, "
             f"replies end with {tokenizer.convert_ids_to_tokens(prompts.stop_ids)}, reference: {'adapter off' if job.adapter_off else 'copy'}")
    step, tracker, steps_per_epoch = state["step"], None, math.inf
    if rank == 0:  # reference and reward models are read again when a run continues: rank 0 alone hashes them, which may take minutes
        sources = [job.source, *(part.source for part in job.rewards.values() if hasattr(part, "source"))]
        sha256 = [common.weights_sha256(path) for path in sources]
        for path, now, then in zip(sources, sha256, state["weights_sha256"] or []):
            if now != then:
                common.fail(f"{path}: these are not the weights that {run_dir} started with, so reference or reward would be another one (sha256 {now}, "
                            f"then {then}); put the old ones back, or start anew under another --training_run_name", only_here=True)
        state["weights_sha256"] = sha256

    def log_row(split, metrics):
        if rank == 0:
            row = metrics if split == "train" else {f"{split}/{name}": value for name, value in metrics.items()}
            common.log_metrics(run_dir, {"step": step, "epoch": round(step / steps_per_epoch, 3), "split": split, **row}, tracker)

    if args.no_train:
        for split in ("eval", "test"):
            if any(d.ids[split] for d in data_sets):
                log_row(split, evaluate(args, engine, prompts, data_sets, split, rewards, 0, run_dir, device))
        return 0
    stopper = common.Stopper(args.max_hours)  # not before: a signal ends an evaluation at once
    order = PromptOrder(args, data_sets)
    train_ids, train_texts, train_records = ([x for d in data_sets for x in getattr(d, name)["train"]] for name in ("ids", "texts", "records"))
    per_rollout = args.ppo_epochs * -(-args.num_rollouts // (args.train_batch_size * args.gradient_accumulation_steps))
    steps_per_epoch = per_rollout * order.per_epoch / order.per_rollout  # an epoch is a pass over the prompts
    max_steps, eval_steps, save_steps, warmup = common.plan_steps(args, order.per_epoch, steps_per_epoch, run_dir)
    log.info(f"a rollout of {args.num_rollouts} replies to {order.per_rollout} prompts = {per_rollout} steps; evaluation, checkpoints and the end come "
             f"behind a whole one, so the last step is {-(-max_steps // per_rollout) * per_rollout}")
    about = {"task": "chat", "family": "causal", "raw_prompt": prompts.is_raw, "stop_ids": prompts.stop_ids}
    if config.is_encoder_decoder:
        layout = prompts.rawtune.get("record_layout", {"source": "{prompt}", "target": "{completion}"})
        about = {"task": "seq2seq", "family": "seq2seq", "record_layout": layout, "stop_ids": prompts.stop_ids}
    rawtune = {"format": 1, **prompts.rawtune, **about, "script": "rl_ppo.py", **common.origin(args, source, config, resume_from)}

    # 5 resume
    if resume_from:
        common.load_checkpoint(engine, resume_from, universal)
        log.info(f"continuing {run_dir} from step {step}" + (f" (written by {state['world_size']} processes)" if universal else ""))
    if rank == 0:
        common.rewind_metrics(run_dir, step, state["last_eval"])
        tracker = common.open_tracker(args, run_dir)
    saved_step = step if resume_from else None

    def run_evaluation():
        metrics = evaluate(args, engine, prompts, data_sets, "eval", rewards, step, run_dir, device)
        log_row("eval", metrics)
        common.note_evaluation(args, state, step, metrics, EVAL_METRICS)
        state["eval_due"] = False
        if args.metric_for_best == "heldout_reward" and step:
            if state["best_step"] == step:
                state["best_proxy"] = metrics["reward"]
            elif state["evals_since_best"] >= 2 and metrics["reward"] > state["best_proxy"]:
                log.warning(f"step {step}: the reward is {metrics['reward']:.4g}, at step {state['best_step']} it was {state['best_proxy']:.4g}; the held-out "
                            f"one fell from {state['best']:.4g} to {metrics['heldout_reward']:.4g}: the reward is being hacked. Stop here, raise "
                            "--init_kl_coef, or set --early_stopping_patience")

    def save():
        nonlocal saved_step
        if saved_step != step:
            critic = common.full_state_dict(policy.critic) if policy.critic is not None else None
            common.save_checkpoint(engine, model, tokenizer, run_dir, step, {**state, "ds_config": ds_name}, rawtune, args.save_total_limit,
                                   state["best_step"], {"critic/model.safetensors": critic} if critic else None)
            saved_step = step
        if rank == 0 and state["best_step"] == step:
            common.write_json(run_dir / "best.json", {"checkpoint": f"checkpoint-{step}", "metric": args.metric_for_best, "value": state["best"]})

    def over_cap():
        return bool(args.kl_cap) and state["kl"] > args.kl_cap

    def finished():
        return (step >= max_steps or over_cap()
                or bool(args.early_stopping_patience) and state["evals_since_best"] >= args.early_stopping_patience)

    if state["eval_due"]:  # the baseline, or what a stop left out
        run_evaluation()
        if saved_step == step and state["best_step"] == step:
            save()  # best.json

    if args.kl_controller == "fixed" or state["init_kl_coef"] != args.init_kl_coef:  # it was changed by --force changed_flags
        state.update(kl_coef=args.init_kl_coef, init_kl_coef=args.init_kl_coef)

    # 6 loop: one rollout and its updates
    window, stop, vocabulary = [], None, config.get_text_config().vocab_size
    start_id = config.decoder_start_token_id if config.is_encoder_decoder else None
    peak_flops = (args.peak_tflops or common.measured_tflops(device, torch.bfloat16)) * 1e12 if device.type == "cuda" else None
    bar = tqdm(total=max_steps, initial=step, desc="training", unit="step", disable=rank > 0 or None)
    while not finished() and not stop:
        clock, phases, first_step = time.perf_counter(), collections.Counter(), step

        def lap(phase):
            nonlocal clock
            phases[phase] += time.perf_counter() - clock
            clock = time.perf_counter()

        # sample: n_samples replies to each prompt, next to each other
        rows = [i for i in order.ids(state["rollout"]) for _ in range(args.n_samples)]
        keys = [common.derive_seed(args.seed, "rollout", state["rollout"], n) for n in range(len(rows))]
        try:
            engine.eval()
            sampled = all_replies(args, engine, [train_ids[i] for i in rows], keys, args.temperature, args.rollout_batch_size, prompts.stop_ids,
                                  prompts.pad_id, device)
            no_dropout(policy)
        except torch.OutOfMemoryError as error:
            common.fail(f"step {step}, sampling: out of memory ({str(error).splitlines()[0]}). Next: a smaller --rollout_batch_size, then a smaller "
                        "--max_new_tokens, then --zero3_generation synced, then --frozen_models offloaded", only_here=True)
        buffer = types.SimpleNamespace(prompts=[train_ids[i] for i in rows], replies=[ids for ids, _ in sampled])
        buffer.lengths, buffer.prompt_lengths = (np.array([len(x) for x in part]) for part in (buffer.replies, buffer.prompts))
        ends = [np.isin(reply, prompts.stop_ids) for reply in buffer.replies]
        assert all(len(is_end) and not is_end[:-1].any() for is_end in ends), "a reply is empty, or goes on behind its end token"
        has_end, is_reply = np.array([bool(is_end[-1]) for is_end in ends]), padded([np.ones(n) for n in buffer.lengths]) > 0
        lap("sample")

        # score the replies
        texts, records = [train_texts[i] for i in rows], [train_records[i] for i in rows]
        replies, joined = reply_texts(prompts, texts, buffer.prompts, buffer.replies)
        raw_scores = score_replies(args, rewards["reward"], texts, replies, records, joined, device)
        state["reward_stats"] = add_to_stats(state["reward_stats"], raw_scores)
        scores = shaped_scores(args, raw_scores, has_end, state["reward_stats"])
        lap("reward")

        # log-probabilities of policy and reference, and values, by the forward steps of the first updates
        passes = [[micro_batches(args, ids, buffer, vocabulary, prompts.pad_id, start_id) for ids in minibatches(args, state["rollout"], epoch)]
                  for epoch in range(args.ppo_epochs)]
        with reference or contextlib.nullcontext():
            old, of_reference, old_values = score_tokens(engine, reference, [batches for batches, _ in passes[0]], buffer.lengths, device)
        check_rollout(precision, sampled, old, of_reference, state, step)
        lap("score")

        # rewards and advantages, the same on every rank
        kl_coef, columns = state["kl_coef"], [padded(part) for part in (old, of_reference, old_values)]
        advantages, returns, reply_kl, means = estimate_advantages(args, *columns, scores, is_reply, kl_coef)
        columns += [advantages, returns]

        # update
        sums, computed, tokens, n_updates = collections.Counter(), 0, 0, 0
        for forwards, n_targets in (update for updates in passes for update in updates):
            lr = common.lr_at(step, args.learning_rate, args.lr_scheduler_type, warmup, max_steps)
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
            local, largest = torch.zeros(len(UPDATE_METRICS), dtype=torch.float64, device=device), torch.zeros((), device=device)
            try:
                for i, (batch, rows_, n_chunks) in enumerate(forwards):
                    is_last = i == len(forwards) - 1
                    engine.set_gradient_accumulation_boundary(is_last)
                    new, entropy, value = engine(common.to_device(batch, device), n_chunks, entropy_grad=args.entropy_coef > 0)
                    before, ref, old_value, advantage, target = (torch.from_numpy(np.concatenate(
                        [column[r, : buffer.lengths[r]] for r in rows_] or [np.zeros(0)])).to(device, new.dtype) for column in columns)
                    losses, ratio, is_clipped = policy_losses(new, before, advantage, args.cliprange, args.dual_clip)
                    total, of_value, is_value_clipped = losses.sum() - args.entropy_coef * entropy.sum(), losses[:0], is_clipped[:0]
                    if value is not None:
                        of_value, is_value_clipped = value_losses(value, old_value, target, args.cliprange_value)
                        total = total + args.vf_coef * of_value.sum()
                    if args.advantage == "grpo":
                        total = total + kl_coef * kl_terms(new - ref, "k3").sum()
                    moved = new.detach() - before
                    largest = torch.maximum(largest, moved.abs().max() if len(moved) else largest)
                    # in the order of UPDATE_METRICS; k2, for one rare token that became likely is a huge k3
                    local += torch.stack([x.detach().sum().double() for x in (
                        total, losses, of_value, entropy, is_clipped, is_value_clipped, kl_terms(moved, "k2"), moved.abs())])
                    # DeepSpeed averages gradients over processes, hence x world; told not to divide by the accumulation
                    # steps, this is the sum over all reply tokens of the step / their number
                    engine.backward(total * (world / n_targets), scale_wrt_gas=False)
                    if is_last:
                        dist.all_reduce(local)
                        found = dict(zip(UPDATE_METRICS, local.tolist()))
                        check_update(args, precision, found, n_targets, largest, n_updates == 0, step)
                        grad_norm = common.grad_norm_before_step(engine)
                engine.step()  # weights move on the last call of a step
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                    raise
                shapes = [str(tuple(batch.get("input_ids", batch.get("source_ids")).shape)) for batch, *_ in forwards]
                common.fail(common.out_of_memory(step, error, shapes, "--frozen_models offloaded, then --lora_rank"), only_here=True)
            grad_norm = float(engine.get_global_grad_norm() if grad_norm is None else grad_norm)
            if not math.isfinite(grad_norm):
                common.fail(f"step {step + 1}: the gradient norm is {grad_norm}. Checkpoints are intact: continue from the last one with a lower "
                            "--learning_rate or --precision fp32 (--resume --force changed_flags)")
            step, n_updates = step + 1, n_updates + 1
            bar.update()
            sums.update({name: value / n_targets for name, value in found.items()}, grad_norm=grad_norm)
            for batch, rows_, _ in forwards:
                computed += sum(batch[name].numel() for name in ("input_ids", "source_ids", "decoder_ids") if name in batch) * bool(rows_)
                tokens += int((buffer.lengths + buffer.prompt_lengths)[rows_].sum())
        lap("update")

        # the next rollout's KL price, metrics, guards
        if args.kl_controller == "adaptive":
            state["kl_coef"] = next_kl_coef(kl_coef, float(reply_kl.mean()), args.target_kl, args.kl_horizon, args.num_rollouts)
        state["rollout"] += 1
        state["kl"] = float(reply_kl.mean())
        reason = stopper.reason()
        computed, tokens, seconds, n_stop = common.all_reduce_sum([computed, tokens, sum(phases.values()) / world, bool(reason)], device)
        stop = (reason or "another process was told to stop") if n_stop else None
        means.update(score=raw_scores.mean(), score_std=raw_scores.std(), shaped_score=scores.mean(), kl_coef=kl_coef, reply_tokens=buffer.lengths.mean(), eos_rate=has_end.mean(),
                     sampler_gap=sampler_gap(sampled, old), **{name: value / n_updates for name, value in sums.items()
                        if name not in ("loss", "grad_norm") and (policy.critic is not None or "value" not in name)})
        window.append({"loss": sums["loss"] / n_updates, "lr": lr, "grad_norm": sums["grad_norm"] / n_updates,
                       "tokens_per_sec": buffer.lengths.sum() / seconds, "target_tokens": float(buffer.lengths.sum()), "padding_share": 1 - tokens / computed,
                       "peak_memory_gb": common.peak_memory_gb(device), **{f"ppo/{name}": value for name, value in means.items()},
                       **{f"time/{phase}": value for phase, value in phases.items()}})
        if peak_flops:
            flops = args.ppo_epochs * update_flops(model, int(buffer.prompt_lengths.sum()), int(buffer.lengths.sum()))
            window[-1]["mfu" if args.peak_tflops else "mfu_of_matmul"] = flops / phases["update"] / peak_flops / world
        warn_of_trends(args, state, means, step)
        if step // args.logging_steps > first_step // args.logging_steps or finished() or stop:
            log_row("train", {name: float(np.mean([row[name] for row in window])) for name in window[0]})
            window = []
        if over_cap():
            log.warning(f"step {step}: the KL of a reply is {state['kl']:.4g} nats, above --kl_cap {args.kl_cap:g}: the policy has left its reference, "
                        "where the reward is no longer to be trusted. The run ends here; a higher --init_kl_coef or a lower --learning_rate keeps it closer")
        state["eval_due"] = step // eval_steps > first_step // eval_steps or finished()
        if state["eval_due"] and not stop:
            run_evaluation()
        if finished() or stop or state["best_step"] == step or (save_steps and step // save_steps > first_step // save_steps):
            save()
    bar.close()
    if stop:
        log.info(f"{stop}: saved at step {step}; the same command continues from here (exit code {common.EXIT_SAVED})")
        return common.EXIT_SAVED

    # 7 export: the best checkpoint if there is a metric for it, else the last; test once with these weights
    save()
    if step < max_steps and not over_cap():
        log.info(f"step {step}: {state['evals_since_best']} evaluations without a better {args.metric_for_best}: stopped early")
    chosen = run_dir / f"checkpoint-{state['best_step'] or step}"
    if any(d.ids["test"] for d in data_sets):
        if state["best_step"] not in (None, step):
            common.copy_weights(model, chosen)
        log_row("test", evaluate(args, engine, prompts, data_sets, "test", rewards, state["best_step"] or step, run_dir, device))
    if rank == 0:
        show_before_and_after(args, run_dir, state["best_step"] or step)
        common.plot_curves(run_dir)
        common.export_root(run_dir, chosen)
        log.info(f"done: {run_dir} holds the policy of {chosen.name}, metrics.jsonl and the predictions")
    dist.barrier()
    return 0


if __name__ == "__main__":
    common.leave(main(parse_args()))
