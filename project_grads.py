"""project_grads.py: projected per-example gradients, and fine-tuning outcomes estimated without fine-tuning.

    {"prompt": "12 + 30 =", "completion": " 42", "skill": "add"}          data/<name>.jsonl, any record of sft_causal.py or seq2seq.py

    python project_grads.py                                               # demo: estimates against real fine-tunes, minutes on a laptop
    python project_grads.py collect --model_init_name base --data_name train --groups skill --out G          # one row per example
    python project_grads.py collect --model_init_name base --data_name train --split eval --groups skill --out E
    python project_grads.py subsets --grads G --number_of_subsets 1000 --subset_size 0.5 --out subsets.txt
    python project_grads.py estimate --grads G --target_grads E --subsets subsets.txt --calibrate truth.csv:3 --out est.csv
    python project_grads.py truth --grads G --target_grads E --subsets subsets.txt --limit 20 --out truth.csv -- --max_steps 100
    python project_grads.py compare est.csv truth.csv
    deepspeed --num_gpus 4 project_grads.py collect --model_init_path some/model --data_name train --out G   # rows dealt out

collect: one batched backward pass with hooks; each layer's per-example gradient is a batched product, reduced at once by a
signed count-sketch (SJLT with one non-zero; Charikar et al. 2002, Kane and Nelson 2014) whose buckets and signs come from a
hash of (seed, parameter, coordinate), so no projection matrix exists and rows do not depend on batch, order or processes.
estimate: f(S) ~ f + g . Delta(S), with Delta(S) along the mean training gradient of the subset S (Li et al. 2024, GradEx).
docs/project_grads.md explains every number.

Shapes: B examples of a batch, T tokens, K targets, V vocabulary, d sketch size, p tracked parameters, n rows of a store.
"""

import argparse
import collections
import concurrent.futures
import copy
import csv
import hashlib
import inspect
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
import types

import common_v1 as common  # first: it prepares the import of DeepSpeed

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from common_v1 import log

HASH = "splitmix64-1"  # its version: rows of another are refused
MAX_LOGODDS = 15.0  # |log p - log(1-p)| beyond this is fp32 noise
GRADEX_EXCLUDED = "shared|lm_head|wte|wpe|ln|embed_tokens|norm|word_embeddings"  # of the earlier system, by substring
SKETCHES = ("sjlt", "rolled", "dense", "kron", "exact", "gradex")
KRON = 128  # columns of each factor of --sketch kron
LOGIT_ELEMENTS = 2**27  # of one batch: 512 MB in fp32

# ------------------------------------------------------------------------------------------------ arguments


def add_model_flags(sub, *more):
    """The flags of common_v1.py that name a model, as the trainers have them, and names of the earlier system. more: further ones of common_v1.py."""
    shared = common.Parser(add_help=False)
    common.add_shared_args(shared)
    wanted = ("model_init_name", "model_init_path", "revision", "trust_remote_code", "mount_dir", "cache_dir", "precision", "quantize",
              *more)
    for action in shared._actions:
        if action.dest in wanted:
            sub._add_action(action)
    sub.set_defaults(**{action.dest: action.default for action in shared._actions if action.dest not in wanted and action.dest != "data_name"})
    sub.add_argument("--seed", type=int, default=0, help="of the sketch, of new weights and of drawing [integer]")
    sub.add_argument("--model_key", dest="model_init_path", default=argparse.SUPPRESS, help="same as --model_init_path")
    sub.add_argument("--load_model_dir", help="a run or adapter folder to load instead of --model_key [path]")
    sub.add_argument("--batch_tokens", type=int, help="padded tokens of one batch [tokens], default 8192 on a GPU, 1024 on a CPU")
    sub.add_argument("--attn", choices=["auto", "eager", "math", "default"], default="auto",
                     help="attention kernel; auto = math, whose gradients do not depend on the batch")


def add_data_flags(sub):
    sub.add_argument("--data_name", "--data", nargs="+", default=["data"], metavar="NAME", help="data sets under data/, or paths")
    sub.add_argument("--split", choices=["train", "eval", "test"], default="train", help="which records become rows")
    sub.add_argument("--groups", help="key of the records that names their group [name], or a JSON file of `subsets --clusters`; default: "
                     "the data set's name")
    sub.add_argument("--max_length", type=int, default=2048, help="longer documents lose their end [tokens]")
    sub.add_argument("--max_source_length", type=int, default=1024, help="of an encoder's prompts [tokens]")
    sub.add_argument("--raw_prompt", action="store_true", help="prompt and completion as they are, without the chat template")
    sub.add_argument("--downsample", type=float, help="keep this share (below 1) or number of the rows, drawn by --seed, default: all")


def parse_args(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if not [word for word in argv if not word.startswith("--local_rank")]:
        argv.append("demo")
    argv, after = (argv[: argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    parser = common.Parser(prog="project_grads.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    subs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    sub = subs.add_parser("demo", help="a small study: estimates against real fine-tunes of a tiny model (also: no command at all)")
    sub.add_argument("--out", default="project-grads-demo", help="its folder [path]; a finished step is not repeated")
    sub.add_argument("--n_true", type=int, default=16, help="subsets to fine-tune on for real [count]")
    sub.add_argument("--parallel", type=int, default=2, help="fine-tunes at a time [count]")

    sub = subs.add_parser("collect", help="outputs and projected gradients of every example into a store")
    add_model_flags(sub, "lora_rank", "lora_alpha", "lora_targets", "ds_config")
    add_data_flags(sub)
    sub.add_argument("--out", help="folder of the store [path]; an unfinished one is continued")
    sub.add_argument("--dim", "--project_dimension", type=int, default=4096, help="numbers per example [count]")
    sub.add_argument("--sketch", choices=SKETCHES, default="sjlt", help="sjlt: count-sketch | rolled: the same with contiguous, deterministic "
                     "adds | dense: Rademacher matrix, slow | kron: factored (LoGra) | exact: unprojected, tiny models | gradex: the earlier "
                     "system's matrix")
    sub.add_argument("--target", choices=["loss", "logodds", "loss_sum"], default="loss",
                     help="whose gradient: mean loss of the targets | mean of log p/(1-p) | summed loss")
    sub.add_argument("--params", default="auto", help="all | linear | lora | gradex (its exclusion list) | match:REGEX; auto = lora where there "
                     "is an adapter, else all")
    sub.add_argument("--precond", default="none", metavar="none|adam:CHECKPOINT", help="multiply gradients by v^(-1/4) of that checkpoint's AdamW "
                     "[path of a checkpoint-N folder]")
    sub.add_argument("--base_model", help="model that this one was fine-tuned from: also store the sketch of the difference, for an anchor [path]")
    sub.add_argument("--store_dtype", choices=["fp16", "fp32", "int8"], default="fp16", help="of the stored rows")
    sub.add_argument("--chunk_mb", type=int, help="gradients of one layer held at a time [MB], default 256 on a GPU, 8 on a CPU")
    sub.add_argument("--table_mb", type=int, default=2048, help="memory for buckets of the sketch; without room they are hashed anew [MB]")
    sub.add_argument("--no_check", action="store_true", help="do not compare the hooks with autograd on two rows before the start")
    sub.add_argument("--export", choices=["npz", "less_pt", "gradex"], help="also write the finished rows in this layout")
    sub.add_argument("--compat", choices=["gradex"], help="the earlier system: dense matrix from NumPy's generator, its parameters, outputs "
                     "and folder names")
    sub.add_argument("--run", type=int, default=0, help="seed of the earlier system's matrix, with --compat gradex [integer]")
    sub.add_argument("--batch_size", type=int, default=4, help="rows per file of the earlier layout [rows]")
    sub.add_argument("--num_batches_gradients", type=int, help="keep this many batches of --batch_size rows, from the front [count]")
    sub.add_argument("--save_name", help="part of the folder's name with --compat gradex [name]")
    for name in ("project_gradients", "compute_pretrained_outputs", "train_lora"):
        sub.add_argument(f"--{name}", action="store_true", help="accepted from the earlier system; collect always does this" if name != "train_lora"
                         else "same as --params lora")

    sub = subs.add_parser("linerr", help="how far the first-order approximation holds: error against distance")
    add_model_flags(sub)
    sub.add_argument("--grads", required=True, help="store of the training rows: model, data and parameters are taken from it [path]")
    sub.add_argument("--target_grads", help="store whose rows are measured [path], default: --grads")
    sub.add_argument("--direction", default="dual,random", help="comma-separated: dual (mean gradient of 75 %% of the groups) | primal (P w) | "
                     "random | delta (needs --delta)")
    sub.add_argument("--delta", help="fine-tuned model of the same kind, whose difference is a direction [path]")
    sub.add_argument("--scale", type=float, nargs="+", default=[0.001, 0.003, 0.01, 0.02, 0.05, 0.1], help="distances, as shares of the weights' norm")
    sub.add_argument("--target", choices=["logodds", "loss"], default="logodds", help="output that is approximated")
    sub.add_argument("--limit", type=int, default=400, help="rows measured [count]")
    sub.add_argument("--out", help="JSON file for the table [path], default: linerr.json in --grads")

    sub = subs.add_parser("subsets", help="random subsets of groups, one line of group numbers each; or clusters of rows as groups")
    sub.add_argument("--grads", required=True, help="store that knows the groups [path]")
    sub.add_argument("--number_of_subsets", type=int, default=100, help="lines [count]")
    sub.add_argument("--subset_size", type=float, default=0.5, help="share (at most 1) or number of the groups in each")
    sub.add_argument("--clusters", type=int, default=0, help="instead: cluster the rows by cosine of their gradients [count], 0 = off")
    sub.add_argument("--seed", type=int, default=0, help="of drawing [integer]")
    sub.add_argument("--out", required=True, help="text file (clusters: JSON file for --groups) [path]")

    sub = subs.add_parser("estimate", help="predicted loss of every group after fine-tuning on each subset")
    add_model_flags(sub)
    sub.add_argument("--grads", required=True, help="store of the training rows [path]")
    sub.add_argument("--target_grads", required=True, help="store of the evaluation rows [path]")
    sub.add_argument("--anchor_grads", nargs=2, metavar=("TRAIN", "TARGET"), help="the same two stores, collected at the model fine-tuned on everything")
    sub.add_argument("--groups", help="JSON file of `subsets --clusters`: other groups of the training rows [path]")
    sub.add_argument("--subsets", "--load_sample_task_dir", required=True, help="text file, one subset of group numbers a line [path]")
    sub.add_argument("--expand", choices=["auto", "anchor", "theta0"], default="auto", help="auto = anchor where its stores are given")
    sub.add_argument("--fit", choices=["mean", "logistic", "ridge"], default="mean", help="direction of a subset: its mean gradient | logistic "
                     "regression with the offset f0 | ridge regression of the residual")
    sub.add_argument("--ridge_lambda", type=float, default=1e-2, help="penalty of logistic and ridge, times the rows' mean squared norm [no unit]")
    sub.add_argument("--eval", choices=["linear", "lift"], default="linear", help="g . Delta in the sketch (seconds) | the weights moved, real forward")
    sub.add_argument("--calibrate", metavar="FILE:K", help="fit the one step size to the first K true runs of truth.csv")
    sub.add_argument("--step_size", type=float, help="the step size itself, learning rate x steps [no unit]; default: --calibrate, or the anchor's")
    sub.add_argument("--budget", choices=["steps", "epochs"], default="steps", help="what true runs hold fixed: --max_steps | --num_epochs")
    sub.add_argument("--dim", "--project_dimension", type=int, help="fold the rows to this many numbers, store's size / 2^k [count]")
    sub.add_argument("--compat", choices=["gradex"], help="the earlier system: random labels, logistic regression, primal lift, real forward")
    sub.add_argument("--scale", type=float, default=0.02, help="with --compat gradex: distance, as a share of the weights' norm")
    sub.add_argument("--abs_scale", type=float, default=-1, help="with --compat gradex: distance itself, -1 = off")
    sub.add_argument("--limit", "--subset_num", type=int, help="only the first subsets [count]")
    sub.add_argument("--out", required=True, help="table [path of a .csv]")

    sub = subs.add_parser("truth", help="really fine-tune on subsets, by sft_causal.py or seq2seq.py; their flags follow after --")
    add_model_flags(sub)
    sub.add_argument("--grads", required=True, help="store of the training rows: model and data are taken from it [path]")
    sub.add_argument("--target_grads", required=True, help="store of the evaluation rows [path]")
    sub.add_argument("--groups", help="JSON file of `subsets --clusters` [path]")
    sub.add_argument("--subsets", "--load_sample_task_dir", help="text file, one subset of group numbers a line [path]")
    sub.add_argument("--limit", "--subset_num", type=int, default=20, help="only the first subsets that differ [count]")
    sub.add_argument("--repeat", type=int, default=1, help="runs per subset, which differ in the order of the data only [count]")
    sub.add_argument("--train_all", action="store_true", help="first fine-tune on all groups and keep that model, the anchor")
    sub.add_argument("--parallel", type=int, default=1, help="runs at a time [count]")
    sub.add_argument("--launcher", default=shlex.quote(sys.executable), help="what starts the trainer, e.g. 'deepspeed --num_gpus 4' [command]")
    sub.add_argument("--out", required=True, help="table [path of a .csv]; runs are kept beside it, in <out>.runs")

    sub = subs.add_parser("compare", help="estimate against truth: correlations, errors, ceiling, baselines, a scatter")
    sub.add_argument("estimate", help="table of `estimate` [path]")
    sub.add_argument("truth", help="table of `truth` [path]")
    sub.add_argument("--bootstrap", type=int, default=1000, help="resampled sets of subsets for the intervals [count]")
    sub.add_argument("--out", help="JSON file [path], default: <estimate>.compare.json; the picture lies beside it")

    sub = subs.add_parser("select", help="score training examples or groups for a target, and write the chosen as a data file")
    add_model_flags(sub)
    sub.add_argument("--grads", nargs="+", required=True, help="stores of the training rows, one per checkpoint [path]")
    sub.add_argument("--target_grads", nargs="+", required=True, help="stores of the target rows, one per checkpoint [path]")
    sub.add_argument("--lr_weights", type=float, nargs="+", help="weight of each checkpoint, its learning rate [no unit], default: equal")
    sub.add_argument("--groups", help="JSON file of `subsets --clusters` [path]")
    sub.add_argument("--method", choices=["less", "dot", "trak", "forward", "ensemble"], default="less", help="rows: cosine, mean over a target "
                     "group, greatest over groups | dot product | dot product under (Z'Z + lambda)^-1. Groups: greedy forward selection by the "
                     "estimated loss | mean estimated loss of the subsets with a group")
    sub.add_argument("--estimates", help="table of `estimate`, for --method ensemble [path]")
    sub.add_argument("--step_size", type=float, help="for --method forward: as `estimate` prints it [no unit]")
    sub.add_argument("--order", choices=["best", "index"], default="best", help="of --method forward: the best group next | in turn, kept unless "
                     "it hurts (the earlier system)")
    sub.add_argument("--top", type=float, default=0.05, help="share (below 1) or number of rows, or of groups, that are kept")
    sub.add_argument("--out", required=True, help="data file for sft_causal.py and seq2seq.py [path of a .jsonl]; scores lie beside it")

    sub = subs.add_parser("verify", help="check gradients, sketch and derivatives on a model; exit code 1 where one fails")
    add_model_flags(sub, "lora_rank", "lora_alpha", "lora_targets")
    add_data_flags(sub)
    sub.add_argument("-n", type=int, default=64, help="rows [count]")
    sub.add_argument("--params", default="auto", help="as in collect")

    args = parser.parse_args(argv)
    if after and args.command != "truth":
        parser.error(f"nothing may follow -- in {args.command}")
    args.train_flags = after
    if getattr(args, "compat", None) and args.command == "collect":
        args.sketch, args.target, args.params, args.store_dtype = "gradex", "logodds", "gradex", "fp32"
    if getattr(args, "train_lora", False):
        args.params = "lora" if args.params in ("auto", "gradex") else args.params
    if getattr(args, "load_model_dir", None):
        args.model_init_path = args.load_model_dir
    return args


def check_args(args, problems):
    """Append every problem of the flags that can be said without a file."""
    for name, low in dict(dim=1, number_of_subsets=1, limit=1, repeat=1, parallel=1, n=2, seed=0, run=0, max_length=4, max_source_length=2, batch_tokens=1,
                          chunk_mb=1, batch_size=1, num_batches_gradients=1, bootstrap=1, clusters=0, ridge_lambda=1e-12, subset_size=1e-9,
                          top=1e-9, n_true=4, downsample=1e-9).items():
        value = getattr(args, name, None)
        if value is not None and not low <= value < math.inf:
            problems.append(f"--{name} {value}: expected {low} or more")
    for name in ("subset_size", "top", "downsample"):
        value = getattr(args, name, None)
        if value is not None and value > 1 and value != int(value):
            problems.append(f"--{name} {value}: expected a share up to 1, or a whole number")
    if getattr(args, "precision", "auto") not in ("auto", *common.PRECISIONS):
        problems.append(f"--precision {args.precision}: expected auto, fp32 or bf16")
    elif getattr(args, "precision", "auto") != "auto" and common.PRECISIONS[args.precision] not in ("fp32", "bf16", "fp64"):
        problems.append(f"--precision {args.precision}: gradients are collected in fp32 or bf16")
    if args.command != "collect" and common.world_size() > 1:
        problems.append(f"{args.command} runs in one process; collect takes several" + (", and truth's --launcher" if args.command == "truth" else ""))
    if args.command == "collect":
        if args.base_model and args.ds_config not in ("auto", "zero0"):
            problems.append(f"--base_model with --ds_config {args.ds_config}: a difference needs whole weights; leave one out")
        if not args.out and args.compat != "gradex":
            problems.append("--out: the folder of the store is missing")
        for name in ("run", "save_name", "num_batches_gradients"):
            if getattr(args, name) and args.compat != "gradex" and not (name == "run" and args.sketch == "gradex"):
                problems.append(f"--{name} has no effect without --compat gradex")
        if args.num_batches_gradients and args.downsample:
            problems.append("--num_batches_gradients and --downsample exclude each other")
        if not re.fullmatch(r"auto|all|linear|lora|gradex|match:.+", args.params):
            problems.append(f"--params {args.params}: expected auto, all, linear, lora, gradex or match:REGEX")
        if args.precond != "none" and not args.precond.startswith("adam:"):
            problems.append(f"--precond {args.precond}: expected none or adam:CHECKPOINT")
        if args.sketch == "kron" and args.precond != "none":
            problems.append("--precond scales every coordinate, which --sketch kron never forms")
    if args.command == "estimate":
        if args.calibrate and not re.fullmatch(r".+:\d+", args.calibrate):
            problems.append(f"--calibrate {args.calibrate}: expected FILE:K, such as truth.csv:3")
        if args.calibrate and args.step_size:
            problems.append("--calibrate and --step_size exclude each other")
        if args.expand == "anchor" and not args.anchor_grads:
            problems.append("--expand anchor needs --anchor_grads")
        if args.expand == "theta0" and args.anchor_grads:
            problems.append("--expand theta0 makes no use of --anchor_grads: leave one out")
        if args.fit != "mean" and (args.eval == "lift" or args.anchor_grads):
            problems.append(f"--fit {args.fit} works in the sketch at theta0: leave out --eval lift and --anchor_grads")
        if args.compat and (args.anchor_grads or args.calibrate or args.step_size or args.fit != "mean"):
            problems.append("--compat gradex has its own fit and distance: leave out --anchor_grads, --calibrate, --step_size and --fit")
        if args.eval == "lift" and args.dim:
            problems.append("--dim has no effect with --eval lift")
    if args.command == "truth" and not args.subsets and not args.train_all:
        problems.append("nothing to do: give --subsets, or --train_all")
    if args.command == "linerr":
        if unknown := set(args.direction.split(",")) - {"dual", "primal", "random", "delta"}:
            problems.append(f"--direction {','.join(sorted(unknown))}: expected dual, primal, random or delta")
        if ("delta" in args.direction.split(",")) != bool(args.delta):
            problems.append("--direction delta and --delta CHECKPOINT belong together")
    if args.command == "select":
        if len(args.grads) != len(args.target_grads) or args.lr_weights and len(args.lr_weights) != len(args.grads):
            problems.append("--grads, --target_grads and --lr_weights: expected one of each per checkpoint")
        if (args.method == "ensemble") != bool(args.estimates):
            problems.append("--method ensemble and --estimates belong together")
        if args.method != "less" and len(args.grads) > 1:
            problems.append(f"--method {args.method} takes one store of each")
        if args.method == "forward" and not args.step_size:
            problems.append("--method forward needs --step_size (estimate prints it)")


# ------------------------------------------------------------------------------------------------ data


def end_token(tokenizer):
    """The special token that the chat template writes behind an assistant turn, or None. As in sft_causal.py."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "Blue."}], tokenize=False)
    found = re.match(rf"\s*({common.special_tokens(tokenizer).pattern})", text[text.rfind("Blue.") + 5:])
    return found[1] if found else None


def chat_ids(tokenizer, messages, end):
    """(ids, is_target) of a conversation: a token is a target when it begins inside an assistant turn, its end token included."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array(encoded["offset_mapping"]).reshape(-1, 2)[:, 0]
    is_target = np.zeros(len(starts), bool)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            stop = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False).rfind(end) + len(end)
            if not text.startswith(before) or stop <= len(before):
                raise ValueError(f"the chat template writes turn {i + 1} in another way once others follow")
            is_target |= (starts >= len(before)) & (starts < stop)
    return np.array(encoded["input_ids"]), is_target


def encode(record, tokenizer, family, args, chat):
    """(source ids, token ids, is_target) of a record, as the trainers have it. Raises ValueError, which says what is wrong.

    causal: no source; a conversation where chat = (template's name, end token), else prompt + completion as plain text. seq2seq: source
    and target, both with their end token. Cut to --max_length (--max_source_length); position 0 is never a target.
    """
    def text(name):
        if not isinstance(record.get(name), str) or not record[name].strip():
            raise ValueError(f"{name!r} is no text or is empty (has: {', '.join(map(str, record))}); see data/README.md")
        return record[name]

    eos, messages = tokenizer.eos_token_id, None
    if "messages" in record:
        messages = common.clean_messages(record["messages"])
    elif "instruction" in record and "prompt" not in record:
        prompt, completion, extra = text("instruction"), text("output"), record.get("input")
        prompt += (("\n\n### Input:\n" if chat and chat[0] == "alpaca" else "\n\n") + extra) if extra else ""
    elif "text" in record and "prompt" not in record:
        prompt, completion = "", text("text")
    else:
        prompt, completion = text("prompt"), text("completion")
    if family == "seq2seq":
        if messages or not prompt:
            raise ValueError("an encoder-decoder takes 'prompt' and 'completion', or 'instruction' and 'output'")
        source, target = tokenizer(prompt).input_ids, tokenizer(completion).input_ids
        source = source if len(source) <= args.max_source_length else source[: args.max_source_length - 1] + [eos]
        target = (target if target[-1:] == [eos] else target + [eos])[: args.max_length]
        return source, target, np.ones(len(target), bool)
    if messages is None and chat and prompt and not (args.raw_prompt and "prompt" in record):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if messages:
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None or not chat:
            raise ValueError("no assistant turn" if chat else "'messages' need a tokenizer with a chat template")
        ids, is_target = chat_ids(tokenizer, messages[: last + 1], chat[1])
    else:
        begin = [tokenizer.bos_token_id] if common.adds_bos(tokenizer) else []
        front, back = (tokenizer(part, add_special_tokens=False).input_ids if part else [] for part in (prompt, completion))
        ids = np.array([*begin, *front, *back, eos])
        is_target = np.arange(len(ids)) >= len(begin) + len(front)
    ids, is_target = ids[: args.max_length], is_target[: args.max_length].copy()
    is_target[0] = False  # nothing comes before it
    return [], ids, is_target


def seal(ids, is_target):
    """One int32 array for both: a target is stored as ~id, which is negative."""
    return np.where(is_target, ~np.asarray(ids), ids).astype(np.int32)


def chat_of(args, source, tokenizer, family):
    """(template's name or None, end token) where prompts are rendered as a chat, else None."""
    if family == "seq2seq" or not tokenizer.chat_template:
        return None
    record = pathlib.Path(source) / "rawtune.json"
    return (json.loads(record.read_text()).get("template") if record.is_file() else None), end_token(tokenizer)


def raw_records(name, split, args, problems):
    """Yield (where, record) of one split of a data set, in the order of its files."""
    for file_split, path in common.find_data(args, name, problems).items():
        for where, record_split, record in common.read_records(path, problems, file_split or "train"):
            if record_split == split:
                yield where, record


def load_rows(args, source, tokenizer, family, problems):
    """The rows of a store: namespace of source, tokens (sequences of int32 arrays, sealed), group (n,), names, digest, numbers (n,) of the
    records. Tokenised once into the cache."""
    chat, sources, tokens, labels = chat_of(args, source, tokenizer, family), [], [], []
    by_key = args.groups and not args.groups.endswith(".json")
    for name in args.data_name:
        before = len(problems)
        files = common.find_data(args, name, problems)
        if not files:
            continue
        settings = [family, args.split, args.groups if by_key else None, args.max_length, args.max_source_length, args.raw_prompt, chat, tokenizer.chat_template]
        root, key = common.token_cache(args, "grads 1", files, tokenizer, settings)
        try:
            with common.cache_folder(root, key, problems) as (folder, is_new):
                if is_new:
                    writers, groups = [common.RaggedWriter(folder / part) for part in ("source", "tokens")], []
                    for where, record in tqdm(raw_records(name, args.split, args, problems), desc="tokenising", unit=" records", delay=5,
                                              disable=common.rank() > 0 or None):
                        try:
                            source_ids, ids, is_target = encode(record, tokenizer, family, args, chat)
                            group = str(record[args.groups]) if by_key else pathlib.Path(name).name.split(".")[0]
                        except KeyError:
                            problems.append(f"{where}: no {args.groups!r}, which --groups names (has: {', '.join(map(str, record))})")
                            continue
                        except ValueError as error:
                            problems.append(f"{where}: {error}")
                            continue
                        for writer, row in zip(writers, (source_ids, seal(ids, is_target))):
                            writer.append(row)
                        groups.append(group)
                    for writer in writers:
                        writer.close()
                    common.write_json(folder / "groups.json", groups)
        except OSError as error:
            problems.append(f"the token cache cannot be written ({error}); --cache_dir names another folder")
            continue
        if len(problems) == before:
            found = json.loads((root / key / "groups.json").read_text())
            if not found:
                problems.append(f"{next(iter(files.values()))}: no {args.split} records")
                continue
            sources.append(common.Ragged(root / key / "source"))
            tokens.append(common.Ragged(root / key / "tokens"))
            labels += found
    if not labels:
        return None
    numbers = np.arange(len(labels))
    if args.downsample:
        n = int(args.downsample) if args.downsample > 1 else max(1, round(args.downsample * len(labels)))
        numbers = np.sort(np.random.default_rng([args.seed, 5]).permutation(len(labels))[:n])
    if getattr(args, "num_batches_gradients", None):
        numbers = numbers[: args.num_batches_gradients * args.batch_size]
    flat = [(part, i) for part, rows in enumerate(tokens) for i in range(len(rows))]
    flat_start = np.cumsum([0, *map(len, tokens)])
    names = sorted(set(labels))
    number_of = {name: i for i, name in enumerate(names)}
    pick = [flat[i] for i in numbers]
    digest = hashlib.sha256()
    for p, i in pick:
        for part in (np.asarray(sources[p][i]), np.asarray(tokens[p][i]), labels[flat_start[p] + i]):
            digest.update(part.encode() if isinstance(part, str) else np.int64(len(part)).tobytes() + part.tobytes())
    return types.SimpleNamespace(source=[sources[p][i] for p, i in pick], tokens=[tokens[p][i] for p, i in pick], names=names, numbers=numbers,
                                 group=np.array([number_of[labels[i]] for i in numbers]), digest=digest.hexdigest(),
                                 lengths=np.array([len(sources[p][i]) + len(tokens[p][i]) for p, i in pick]),
                                 n_targets=np.array([int((np.asarray(tokens[p][i]) < 0).sum()) for p, i in pick]))


def make_batches(rows, which, batch_tokens, vocabulary):
    """Lists of row numbers, alike in length, within the token and the logit budget."""
    batches, batch, width, most = [], [], 0, 0
    for i in sorted(which, key=lambda i: (-rows.lengths[i], i)):
        widths = max(width, rows.lengths[i]), max(most, rows.n_targets[i])
        if batch and ((len(batch) + 1) * widths[0] > batch_tokens or (len(batch) + 1) * widths[1] * vocabulary > LOGIT_ELEMENTS):
            batches.append(batch)
            batch, widths = [], (rows.lengths[i], rows.n_targets[i])
        batch.append(int(i))
        width, most = widths
    return batches + ([batch] if batch else [])


def collate(rows, batch, pad_id, start_id, device):
    """Tensors of a batch. input_ids: (B, T); causal: position_ids (B, T); seq2seq: source_ids, source_mask (B, S), input_ids shifted right.
    target_index: (B, K) positions in T whose hidden state predicts target_ids (B, K); is_target: (B, K) bool, False = padding."""
    ids = [np.asarray(rows.tokens[i], np.int64) for i in batch]
    B, T, K = len(batch), max(map(len, ids)), max(1, max(int((row < 0).sum()) for row in ids))
    is_causal = not any(len(rows.source[i]) for i in batch)
    arrays = {"input_ids": np.full((B, T), pad_id), "target_index": np.zeros((B, K), np.int64), "target_ids": np.zeros((B, K), np.int64),
              "is_target": np.zeros((B, K), bool)}
    for b, row in enumerate(ids):
        plain, at = np.where(row < 0, ~row, row), np.flatnonzero(row < 0)
        # the shift happens here and only here: causal, position t - 1 predicts token t; seq2seq, the decoder's input is one behind
        arrays["input_ids"][b, : len(row)] = plain if is_causal else [start_id, *plain[:-1]]
        arrays["target_index"][b, : len(at)] = at - 1 if is_causal else at
        arrays["target_ids"][b, : len(at)] = plain[at]
        arrays["is_target"][b, : len(at)] = True
    if is_causal:
        arrays["position_ids"] = np.tile(np.arange(T), (B, 1))
    else:
        S = max(len(rows.source[i]) for i in batch)
        arrays["source_ids"], arrays["source_mask"] = np.full((B, S), pad_id), np.zeros((B, S), np.int64)
        for b, i in enumerate(batch):
            arrays["source_ids"][b, : len(rows.source[i])], arrays["source_mask"][b, : len(rows.source[i])] = rows.source[i], 1
    return {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()}


# ------------------------------------------------------------------------------------------------ model and outputs


def token_losses(model, batch):
    """(B, K) fp32 -log p of every target, 0 where is_target is False. No logits where no row has a target."""
    if "source_ids" in batch:
        if model.base_model is model:  # T5
            states = model.get_encoder()(input_ids=batch["source_ids"], attention_mask=batch["source_mask"]).last_hidden_state
            hidden = model.get_decoder()(input_ids=batch["input_ids"], encoder_hidden_states=states, use_cache=False,
                                         encoder_attention_mask=batch["source_mask"]).last_hidden_state  # (B, T, D)
        else:
            hidden = model.base_model(input_ids=batch["source_ids"], attention_mask=batch["source_mask"], decoder_input_ids=batch["input_ids"],
                                      use_cache=False).last_hidden_state
        if getattr(model.config, "scale_decoder_outputs", False):
            hidden = hidden * model.config.d_model**-0.5
    else:
        takes = "position_ids" in inspect.signature(model.base_model.forward).parameters
        hidden = model.base_model(input_ids=batch["input_ids"], use_cache=False, **({"position_ids": batch["position_ids"]} if takes else {})).last_hidden_state
    hidden = hidden.gather(1, batch["target_index"][..., None].expand(-1, -1, hidden.shape[-1]))  # (B, K, D)
    logits = common.finish_logits(model.config, model.get_output_embeddings()(hidden))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = logits.logsumexp(-1) - logits.gather(-1, batch["target_ids"][..., None]).squeeze(-1)
    return losses * batch["is_target"]


def log_odds(losses, compat=False):
    """log p - log(1 - p) from -log p, within +-15. compat: the earlier system's, with p > 0.9 lowered and p < 0.001 raised by 0.01."""
    if compat:
        p = torch.exp(-losses)
        p = p - 0.01 * (p > 0.9) + 0.01 * (p < 0.001)
        return torch.log(p / (1 - p))
    return -torch.log(torch.expm1(losses.clamp(min=1e-7))).clamp(-MAX_LOGODDS, MAX_LOGODDS)


def reduce_rows(losses, is_target, target, compat=False):
    """(B,) output of every row from (B, K) token losses: loss = their mean, loss_sum, logodds = mean log-odds; 0 for a row without targets."""
    values = losses if target != "logodds" else log_odds(losses, compat) * is_target
    return values.sum(1) if target == "loss_sum" else values.sum(1) / is_target.sum(1).clamp(min=1)


# ------------------------------------------------------------------------------------------------ sketches


def mix(x):
    """The finaliser of splitmix64 (Steele et al. 2014) on int64 tensors, in place. Products wrap; >> is arithmetic, hence the masks."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        x ^= (x >> shift) & ((1 << (64 - shift)) - 1)
        if factor is not None:
            x *= factor - (1 << 64)
    return x


def hashed(key, coordinates):
    """(n,) int64 hashes of int64 coordinates under a 63-bit key."""
    return mix((coordinates + 1) * (0x9E3779B97F4A7C15 - (1 << 64)) + key)


class Sketch:
    """P^T of a gradient, parameter by parameter: out = start(B); add(out, ...); finish(out) -> (B, d) fp32.

    sizes: {parameter: number of coordinates}, in the model's order. No factor is needed: with one non-zero of size 1 per coordinate,
    E |P^T g|^2 = |g|^2. Buckets come from the upper 32 bits of the hash, so that adding neighbours of a (.., d) sketch gives the sketch
    of the same seed with d / 2; the sign is the hash's last bit, kept as the last bit of the bucket.
    """

    def __init__(self, kind, dim, seed, sizes, device, table_mb=2048, run=0):
        self.kind, self.seed, self.sizes, self.device, self.run = kind, seed, sizes, device, run
        self.starts = dict(zip(sizes, itertools.accumulate([0, *sizes.values()])))
        self.n_coordinates = sum(sizes.values())
        self.dim = self.n_coordinates if kind == "exact" else dim
        self.tables, self.room = {}, table_mb * 2**20 // 4

    def key(self, name):
        return common.derive_seed(self.seed, name)

    def buckets(self, name, coordinates):
        """2 x bucket + (1 where the sign is minus), int64, of coordinates (n,)."""
        h = hashed(self.key(name), coordinates)
        if self.kind == "rolled":  # chunks of d neighbours stay neighbours, turned by a hash of the chunk
            turn = ((hashed(self.key(name + " chunk"), coordinates // self.dim) >> 32) & 0xFFFFFFFF) * self.dim >> 32
            return (coordinates + turn) % self.dim * 2 + (h & 1)
        return (((h >> 32) & 0xFFFFFFFF) * self.dim >> 32) * 2 + (h & 1)

    def table(self, name, start, stop):
        """Buckets of a run of coordinates, from memory where all of a parameter's fit."""
        size = self.sizes[name]
        if name not in self.tables and size <= self.room:
            self.room -= size
            parts = [self.buckets(name, torch.arange(a, min(a + 2**18, size), device=self.device)).int() for a in range(0, size, 2**18)]
            self.tables[name] = torch.cat(parts)
        if name in self.tables:
            return self.tables[name][start:stop].long()
        return self.buckets(name, torch.arange(start, stop, device=self.device))

    def signs(self, name, coordinates):
        """(n, d) of +-1/sqrt(d), one hash for 64 columns: the dense Rademacher matrix (Achlioptas 2003)."""
        n_words = -(-self.dim // 64)
        words = hashed(self.key(name), coordinates[:, None] * n_words + torch.arange(n_words, device=self.device))  # (n, words)
        bits = (words[:, :, None] >> torch.arange(64, device=self.device)) & 1
        return (bits.flatten(1)[:, : self.dim].float() * 2 - 1) / math.sqrt(self.dim)

    def start(self, B):
        width = {"exact": self.dim, "gradex": self.n_coordinates, "dense": self.dim}.get(self.kind, 2 * self.dim)
        return torch.zeros(B, width, dtype=torch.float32, device=self.device)

    def add(self, out, name, start, values):
        """out: rows of `start(B)`, changed in place; values: (B, n) fp32, the coordinates start .. start + n of the parameter `name`."""
        n = values.shape[1]
        if self.kind in ("exact", "gradex"):
            out[:, self.starts[name] + start: self.starts[name] + start + n] += values
        elif self.kind == "dense":
            for a in range(0, n, 4096):
                block = values[:, a: a + 4096]
                out += block @ self.signs(name, torch.arange(start + a, start + a + block.shape[1], device=self.device))
        elif self.kind == "rolled":
            table, d = self.table(name, start, start + n), self.dim
            signed = values * (1 - 2 * (table & 1)).float()
            for a in range(-(start % d), n, d):  # each chunk is one or two contiguous adds: no atomics, the same order every time
                a, b = max(a, 0), min(a + d, n)
                at = int(table[a]) >> 1
                first = min(b - a, d - at)
                out[:, at: at + first] += signed[:, a: a + first]
                out[:, : b - a - first] += signed[:, a + first: b]
        else:
            out.scatter_add_(1, self.table(name, start, start + n).expand(len(out), -1), values)

    def add_at(self, out, name, coordinates, values):
        """The same for a few coordinates of each row: coordinates int64 and values fp32, both (B, n)."""
        if self.kind in ("exact", "gradex"):
            out.scatter_add_(1, self.starts[name] + coordinates, values)
        elif self.kind == "dense":
            for b in range(len(out)):
                for a in range(0, coordinates.shape[1], 4096):
                    out[b] += values[b, a: a + 4096] @ self.signs(name, coordinates[b, a: a + 4096])
        else:
            if self.sizes[name] <= self.room or name in self.tables:
                self.table(name, 0, 1)
                found = self.tables[name][coordinates].long()
            else:
                found = self.buckets(name, coordinates)
            if self.kind == "rolled":
                out.scatter_add_(1, found >> 1, values * (1 - 2 * (found & 1)))
            else:
                out.scatter_add_(1, found, values)

    def finish(self, out):
        if self.kind == "gradex":
            return self.gradex(out)
        return out if self.kind in ("exact", "dense") else out[:, : self.dim] if self.kind == "rolled" else out[:, 0::2] - out[:, 1::2]

    def gradex_blocks(self):
        """(first coordinate, (n, d) rows of +-1/sqrt(d)) of NumPy's legacy generator, in order: the earlier system's matrix, never whole."""
        generator, step = np.random.RandomState(self.run), max(1, 2**22 // self.dim)
        for a in range(0, self.n_coordinates, step):
            block = 2 * generator.randint(2, size=(min(step, self.n_coordinates - a), self.dim)) - 1
            yield a, torch.from_numpy(block).float().to(self.device) / math.sqrt(self.dim)

    def gradex(self, gradients):
        return sum(gradients[:, a: a + len(block)] @ block for a, block in self.gradex_blocks())

    def lift(self, w):
        """P w: w (d,) -> {parameter: (its coordinates,)}, the adjoint of add and finish."""
        if self.kind == "gradex":
            whole = torch.cat([block @ w for _, block in self.gradex_blocks()])
            return {name: whole[start: start + self.sizes[name]] for name, start in self.starts.items()}
        lifted = {}
        for name, size in self.sizes.items():
            if self.kind == "exact":
                lifted[name] = w[self.starts[name]: self.starts[name] + size]
            elif self.kind == "dense":
                lifted[name] = torch.cat([self.signs(name, torch.arange(a, min(a + 4096, size), device=self.device)) @ w for a in range(0, size, 4096)])
            else:
                table = self.table(name, 0, size)
                lifted[name] = w[table >> 1] * (1 - 2 * (table & 1))
        return lifted


# ------------------------------------------------------------------------------------------------ per-example gradients


class NoBatchAxis(Exception):
    """A module whose parameter cannot be told apart per example; the text says which and what to do."""


class _Tap(torch.autograd.Function):
    """The identity on a layer's output, which hands (input, gradient of the output) to `sink` in the backward pass."""

    @staticmethod
    def forward(ctx, output, x, sink):
        ctx.save_for_backward(x)
        ctx.sink = sink
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        ctx.sink(ctx.saved_tensors[0], grad)
        return grad, None, None


def numel(weight):
    return getattr(weight, "ds_numel", weight.numel())  # under ZeRO-3 a weight is empty outside its module


def tracked_parameters(model, which):
    """{name: parameter} whose gradients are collected, each tied weight once. which: --params."""
    linear = {id(p) for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)) for p in m._parameters.values()}
    if which == "auto":
        which = "lora" if common.adapter_kind(model) != "none" else "all"
    keep = {"all": lambda n, p: p.requires_grad or common.adapter_kind(model) == "none", "linear": lambda n, p: id(p) in linear,
            "lora": lambda n, p: "lora_" in n, "gradex": lambda n, p: p.requires_grad and not re.search(GRADEX_EXCLUDED, n)}.get(which)
    pattern = which.removeprefix("match:")
    return {n: p for n, p in model.named_parameters() if (keep(n, p) if keep else re.search(pattern, n))}


class Gradients:
    """Per-example gradients of a model by hooks, each layer's sketched as soon as the backward pass reaches it.

    rows(batch) -> (loss (B,), log-odds (B,), exact norm of the gradient (B,), sketch (B, d)), fp32. All weights are frozen: the backward
    pass computes gradients of activations only, and each layer's G = D^T X is formed here, `chunk` numbers at a time. Linear layers are
    tapped at their outputs; embeddings' outputs and copies of norm weights, one per example, are leaves whose .grad is the answer. A
    parameter that several modules share (tied embeddings) waits for all its parts, as their sum has the norm.
    """

    def __init__(self, model, tracked, sketch_of, target, chunk, scales=None, compat=False):
        self.model, self.tracked, self.target, self.chunk, self.scales, self.compat = model, tracked, target, chunk, scales or {}, compat
        self.device, self.B = next(model.parameters()).device, 0
        name_of, owners = {id(p): n for n, p in tracked.items()}, collections.Counter()
        problems, self.linear, self.handles, self.replaced = [], {}, [], []
        embeddings = getattr(model.get_input_embeddings(), "base_layer", model.get_input_embeddings())
        biases = {m.relative_attention_bias: m for m in model.modules() if hasattr(m, "compute_bias") and hasattr(m, "relative_attention_bias")}
        for path, module in model.named_modules():
            own = {leaf: name_of[id(p)] for leaf, p in module._parameters.items() if p is not None and id(p) in name_of}
            owners.update(own.values())
            is_norm = "norm" in type(module).__name__.lower() and all(self.tracked[n].dim() == 1 or hasattr(self.tracked[n], "ds_id") for n in own.values())
            if isinstance(module, torch.nn.Embedding) and (own or module.weight is embeddings.weight):  # T5 has the same weight in two modules
                if module in biases:
                    self.watch_bias(biases[module], own["weight"])
                elif type(module).forward is torch.nn.Embedding.forward or not own:
                    self.handles.append(module.register_forward_hook(self.embedding_hook(path, own.get("weight"))))
                else:
                    problems.append((path, module, own))
            elif not own:
                continue
            elif isinstance(module, (torch.nn.Linear, Conv1D)):
                self.linear.update({own[leaf]: module for leaf in own if leaf == "weight"})
                self.handles.append(module.register_forward_hook(self.linear_hook(path, own, isinstance(module, Conv1D))))
            elif is_norm:
                self.watch_norm(path, module, own)
            else:
                problems.append((path, module, own))
        if problems:
            raise NoBatchAxis("\n".join(f"{path} ({type(module).__name__}): no rule for the per-example gradient of {', '.join(own.values()) or 'the model'}; "
                                        "leave it out with --params linear or --params 'match:REGEX'" for path, module, own in problems))
        self.shared = {n for n, count in owners.items() if count > 1}
        sizes = {n: KRON * KRON if sketch_of[0] == "kron" and n in self.linear and n not in self.shared else numel(p) for n, p in tracked.items()}
        self.sketch = Sketch(sketch_of[0], sketch_of[1], sketch_of[2], sizes, self.device, *sketch_of[3:])
        model.requires_grad_(False)

    def close(self):
        """Take all hooks off the model."""
        for handle in self.handles:
            handle.remove()
        for module, name, before in reversed(self.replaced):
            module.__dict__.pop(name)
            module.__dict__.update({name: before} if before else {})

    def replace(self, module, name, function):
        """An instance's method, until close()."""
        self.replaced.append((module, name, module.__dict__.get(name)))
        module.__dict__[name] = function

    def check_batch(self, path, tensor):
        if tensor.shape[0] != self.B or tensor.dim() < 2:
            raise NoBatchAxis(f"{path}: its input has shape {tuple(tensor.shape)}, whose first axis is not the batch of {self.B}: examples are mixed "
                              "there (mixture of experts, flattened tokens); leave it out with --params 'match:REGEX'")

    # -- what the forward pass leaves behind

    def linear_hook(self, path, own, transposed):
        def hook(module, inputs, output):
            if not self.B or not output.requires_grad:
                return None
            self.check_batch(path, inputs[0])
            return _Tap.apply(output, inputs[0].detach(), lambda x, grad: self.linear_arrived(own, transposed, x, grad))
        return hook

    def embedding_hook(self, path, name):
        def hook(module, inputs, output):
            if not self.B:
                return None
            leaf = output.detach().requires_grad_()
            if name:
                self.check_batch(path, inputs[0])
                self.leaves.append((name, inputs[0], leaf))
            return leaf
        return hook

    def watch_norm(self, path, module, own):
        """Inside the forward pass the weight is a leaf of one copy per example, (B, 1 .., D): an instance attribute hides the parameter."""
        def before(module, inputs):
            if self.B:
                self.check_batch(path, inputs[0])
                for leaf, name in own.items():
                    shape = (self.B,) + (1,) * (inputs[0].dim() - 2) + (-1,)
                    copies = module._parameters[leaf].detach().expand(self.B, -1).reshape(shape).clone().requires_grad_()
                    module.__dict__[leaf] = copies
                    self.leaves.append((name, None, copies))

        def after(module, inputs, output):
            for leaf in own:
                module.__dict__.pop(leaf, None)

        if isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)):  # the functional form takes no such weight
            def forward(x):
                if not self.B:
                    return type(module).forward(module, x)
                plain = (torch.nn.functional.layer_norm if isinstance(module, torch.nn.LayerNorm) else torch.nn.functional.rms_norm)
                normal = plain(x, module.normalized_shape, eps=module.eps)
                normal = normal if module.weight is None else normal * module.weight
                return normal if getattr(module, "bias", None) is None else normal + module.bias
            self.replace(module, "forward", forward)
        self.handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def watch_bias(self, attention, name):
        """T5's relative position bias is computed once for the whole batch: give every example its own copy."""
        original, buckets = attention.compute_bias, []
        self.handles.append(attention.relative_attention_bias.register_forward_pre_hook(lambda module, inputs: buckets.append(inputs[0])))

        def compute_bias(*args, **options):
            buckets.clear()
            bias = original(*args, **options)  # (1, H, Q, K)
            if not self.B:
                return bias
            leaf = bias.detach().expand(self.B, -1, -1, -1).clone().requires_grad_()
            self.leaves.append((name, buckets[-1], leaf))
            return leaf
        self.replace(attention, "compute_bias", compute_bias)

    # -- what the backward pass brings

    def add(self, name, start, values):
        """Coordinates start .. of a parameter, (B, n): into the sketch, and into the squared norm."""
        values = values.float()
        if name in self.scales:
            values = values * self.scales[name][start: start + values.shape[1]]
        self.squares += torch.linalg.vector_norm(values, dim=1).square()
        self.sketch.add(self.out, name, start, values)

    def linear_arrived(self, own, transposed, x, grad):
        """x: (B, .., n_in); grad: (B, .., n_out), of one layer."""
        x, grad = x.flatten(1, -2) if x.dim() > 2 else x[:, None], grad.flatten(1, -2) if grad.dim() > 2 else grad[:, None]
        if "bias" in own:
            self.seen.add(own["bias"])
            self.add(own["bias"], 0, grad.float().sum(1))
        if "weight" in own:
            name = own["weight"]
            left, right = (x, grad) if transposed else (grad, x)
            if name in self.shared and self.sketch.kind != "kron":
                self.waiting.setdefault(name, []).append((left, right))
            elif name in self.seen:
                raise NoBatchAxis(f"{name}: its layer is called twice in a forward pass; leave it out with --params 'match:REGEX'")
            else:
                self.linear_weight(name, left.to(x.dtype), right.to(x.dtype))
            self.seen.add(name)

    def linear_weight(self, name, left, right):
        """G = left^T right, (B, n_left, n_right), in pieces of rows."""
        if self.sketch.kind == "kron" and name not in self.shared:
            left, right = (side @ self.factor(f"{name} {which}", side) for side, which in ((left, "left"), (right, "right")))
        n = max(1, self.chunk // (self.B * right.shape[2]))
        for a in range(0, left.shape[2], n):
            part = torch.bmm(left[:, :, a: a + n].transpose(1, 2), right)
            self.add(name, a * right.shape[2], part.flatten(1))

    def factor(self, name, side):
        """(n, KRON) of +-1/sqrt(KRON), from the hash."""
        coordinates = torch.arange(side.shape[2] * KRON, device=self.device)
        return ((hashed(self.sketch.key(name), coordinates) & 1).to(side.dtype) * 2 - 1).view(-1, KRON) / math.sqrt(KRON)

    def finish_leaves(self):
        """Embeddings, norms and relative biases, whose gradients are in .grad now; then what waited for its other parts."""
        rows = collections.defaultdict(list)  # {name: [(ids (B, U), gradients (B, U, D))]}
        plain = collections.defaultdict(int)
        for name, ids, leaf in self.leaves:
            if leaf.grad is None:
                continue
            self.seen.add(name)
            if ids is None:
                plain[name] = plain[name] + leaf.grad.float().flatten(1)
            elif leaf.dim() == 4:  # relative bias: (B, H, Q, K), buckets (Q, K)
                rows[name].append((ids.flatten().expand(self.B, -1), leaf.grad.float().flatten(2).transpose(1, 2)))
            else:
                rows[name].append((ids, leaf.grad.float()))
        for name, values in plain.items():
            self.add(name, 0, values)
        for name in rows.keys() | self.waiting.keys():
            self.add_rows(name, rows.get(name, []), self.waiting.get(name, []))

    def add_rows(self, name, parts, dense):
        """A parameter that gets (ids, gradients) of some of its rows, and perhaps dense products besides. Under one coordinate they sum
        up before they are squared; a dense part is never held whole."""
        if dense:
            left, right = torch.cat([l for l, _ in dense], 1).float(), torch.cat([r for _, r in dense], 1).float()
            width = right.shape[2]
            order = [torch.argsort(ids, dim=1) for ids, _ in parts]
            sorted_ids = [ids.gather(1, o) for (ids, _), o in zip(parts, order)]
            sorted_rows = [values.gather(1, o[..., None].expand(-1, -1, width)) for (_, values), o in zip(parts, order)]
            n = max(1, self.chunk // (self.B * width))
            for a in range(0, left.shape[2], n):
                part = torch.bmm(left[:, :, a: a + n].transpose(1, 2), right)  # (B, n, width)
                for ids, values in zip(sorted_ids, sorted_rows):
                    for b in range(self.B):
                        first, last = torch.searchsorted(ids[b], torch.tensor([a, a + part.shape[1]], device=ids.device)).tolist()
                        part[b].index_add_(0, ids[b, first:last] - a, values[b, first:last])
                self.add(name, a * width, part.flatten(1))
            return
        ids, values = torch.cat([i for i, _ in parts], 1), torch.cat([v for _, v in parts], 1)
        if values.shape[1] > 4 * (n_rows := numel(self.tracked[name]) // values.shape[2]):  # few rows, many uses: relative biases
            table = torch.zeros(self.B, n_rows, values.shape[2], device=values.device)
            table.scatter_add_(1, ids[..., None].expand_as(values), values)
            return self.add(name, 0, table.flatten(1))
        ids, order = ids.sort(dim=1)
        values = values.gather(1, order[..., None].expand_as(values))
        is_first = torch.cat([torch.ones_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != ids[:, :-1]], 1)
        place = is_first.cumsum(1) - 1  # equal ids fall into one place
        merged = torch.zeros_like(values).scatter_add_(1, place[..., None].expand_as(values), values)
        where = torch.zeros_like(ids).scatter_(1, place, ids)
        coordinates = (where[..., None] * values.shape[2] + torch.arange(values.shape[2], device=ids.device)).flatten(1)
        merged = merged.flatten(1)
        if name in self.scales:
            merged = merged * self.scales[name][coordinates]
        self.squares += torch.linalg.vector_norm(merged, dim=1).square()
        self.sketch.add_at(self.out, name, coordinates, merged)

    def rows(self, batch):
        self.B = len(batch["input_ids"])
        self.leaves, self.waiting, self.seen = [], {}, set()
        self.squares, self.out = torch.zeros(self.B, device=self.device), self.sketch.start(self.B)
        try:
            losses = token_losses(self.model, batch)
            outputs = reduce_rows(losses, batch["is_target"], self.target, self.compat)
            outputs.sum().backward()
            self.finish_leaves()
        finally:
            self.B = 0
        self.leaves, self.waiting = [], {}
        losses, is_target = losses.detach(), batch["is_target"]
        loss, odds = (reduce_rows(losses, is_target, kind, self.compat) for kind in ("loss", "logodds"))
        return loss, odds, self.squares.sqrt(), self.sketch.finish(self.out)


@torch.no_grad()
def outputs_of(model, rows, which, args, ids, device, bar=None):
    """(n, 2) float64 mean loss and mean log-odds of rows `which`, in their order. ids: (pad, start)."""
    found = np.zeros((len(rows.tokens), 2))
    for batch in tqdm(make_batches(rows, which, args.batch_tokens, model.config.vocab_size), desc=bar, delay=5, disable=bar is None, leave=False):
        tensors = collate(rows, batch, *ids, device)
        losses = token_losses(model, tensors)
        found[batch] = torch.stack([reduce_rows(losses, tensors["is_target"], kind).double() for kind in ("loss", "logodds")], 1).cpu().numpy()
    return found[which]


# ------------------------------------------------------------------------------------------------ store

COMPARED = {"sketch": "sketch", "dim": "size of the sketch", "seed": "seed of the sketch", "run": "run of the matrix", "hash": "hash",
            "parameters": "parameters", "precond_digest": "preconditioner"}  # of two stores whose rows are multiplied


class Store:
    """A folder of rows: proj.npy (n, d), norm.npy (n,), outputs.npz, done.npy (n,), manifest.json; COMPLETE is written last."""

    def __init__(self, path, problems, role=None):
        self.path = pathlib.Path(path)
        record = self.path / "manifest.json"
        if not record.is_file():
            problems.append(f"{path}: no store of `collect` (no manifest.json)")
            return
        self.manifest = json.loads(record.read_text())
        if not (self.path / common.COMPLETE).exists():
            done = np.load(self.path / "done.npy") if (self.path / "done.npy").exists() else np.zeros(0)
            problems.append(f"{path}: unfinished, {int(done.sum())} of {self.manifest['n']} rows are there; give its collect command again")
            return
        self.n, self.dim, self.names = self.manifest["n"], self.manifest["dim"], self.manifest["groups"]
        try:
            self.rows = np.load(self.path / "proj.npy", mmap_mode="r")
            self.norm = np.load(self.path / "norm.npy")
            outputs = np.load(self.path / "outputs.npz")
            self.loss, self.logodds, self.n_tokens, self.group = (outputs[name] for name in ("loss", "logodds", "n_tokens", "group"))
            self.scale = np.load(self.path / "scale.npy") if self.rows.dtype == np.int8 else None
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{path}: damaged ({str(error).splitlines()[0]}); delete the folder and collect again")
            return
        if self.rows.shape != (self.n, self.dim) or len(self.loss) != self.n:
            problems.append(f"{path}: proj.npy holds {self.rows.shape}, the manifest says {(self.n, self.dim)}: copied in part? Collect again")

    def read(self, which=slice(None)):
        """(rows, d) fp32."""
        rows = np.asarray(self.rows[which]).astype(np.float32)
        return rows if self.scale is None else rows * self.scale[which][:, None]

    def weights(self):
        """(n,) what a row counts in its trainer's loss: its target tokens (a row of --target loss is a mean over them)."""
        return self.n_tokens if self.manifest["target"] != "loss_sum" else np.ones(self.n)


def check_together(a, b, problems, same_model=True, same_data=False):
    """Append why the rows of two stores cannot be multiplied."""
    for key, what in COMPARED.items():
        if a.manifest[key] != b.manifest[key]:
            shown = [str(store.manifest[key])[:60] for store in (a, b)]
            problems.append(f"{a.path} and {b.path}: another {what} ({shown[0]} and {shown[1]}); collect one of them again")
    for key, wanted in (("model", same_model), ("data", same_data)):
        if wanted and a.manifest[key]["digest"] != b.manifest[key]["digest"]:
            problems.append(f"{a.path} and {b.path}: another {key} ({a.manifest[key]['name']} and {b.manifest[key]['name']}, by digest)")


def open_stores(paths, problems):
    stores = [Store(path, problems) for path in paths]
    if problems:
        common.fail(problems)
    return stores


class Writer:
    """Rows into a store, each at its own place, by plain writes: processes of several machines share the files. A row is marked as done
    after its bytes are on the disk."""

    def __init__(self, folder, n, dim, dtype):
        self.folder, self.dtype, self.pending = folder, {"fp16": np.float16, "fp32": np.float32, "int8": np.int8}[dtype], []
        shapes = {"proj": ((n, dim), self.dtype), "norm": ((n,), np.float32), "outputs": ((n, 3), np.float64), "done": ((n,), np.bool_)}
        if self.dtype is np.int8:
            shapes["scale"] = ((n,), np.float32)
        if common.rank() == 0 and not (folder / "done.npy").exists():
            for name, (shape, kind) in shapes.items():  # done.npy last: it tells that the others are there
                np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=shape).flush()
        if dist.is_initialized():
            dist.barrier()
        maps = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}
        self.offsets = {name: (array.offset, array.nbytes // max(1, n)) for name, array in maps.items()}
        self.done = np.array(maps["done"])
        self.files = {name: os.open(folder / f"{name}.npy", os.O_RDWR) for name in shapes}
        self.flushed, self.n_lost = -math.inf, 0

    def write(self, name, i, value):
        offset, size = self.offsets[name]
        data = np.ascontiguousarray(value).tobytes()
        assert len(data) == size, (name, len(data), size)
        os.pwrite(self.files[name], data, offset + i * size)

    def put(self, batch, loss, odds, norms, projected, n_targets):
        projected, norms = projected.cpu().numpy(), norms.cpu().numpy()
        for b, i in enumerate(batch):
            row = projected[b]
            if self.dtype is np.int8:
                scale = np.float32(max(np.abs(row).max(), 1e-30) / 127)
                self.write("scale", i, scale)
                row = np.round(row / scale)
            elif self.dtype is np.float16:
                if np.abs(row).max() > 65504:
                    raise OverflowError(f"row {i}: a number of its gradient ({np.abs(row).max():.3g}) does not fit into fp16; use --store_dtype fp32")
                size = float(np.linalg.norm(row))
                self.n_lost += abs(float(np.linalg.norm(row.astype(np.float16).astype(np.float32))) - size) > 0.01 * size
            self.write("proj", i, row.astype(self.dtype))
            self.write("norm", i, np.float32(norms[b]))
            self.write("outputs", i, np.array([float(loss[b]), float(odds[b]), n_targets[i]]))
        self.pending += batch
        if time.monotonic() - self.flushed > 5:
            self.flush()

    def flush(self):
        for name, file in self.files.items():
            if name != "done":
                os.fsync(file)
        for i in self.pending:
            self.write("done", i, np.True_)
        os.fsync(self.files["done"])
        self.pending, self.flushed = [], time.monotonic()


def model_digest(source, config, args):
    """{name, digest} of the weights: files by their hash, a hub id by its commit, new weights by configuration and seed."""
    adapter = common.read_adapter(source, [])
    base = adapter.base if adapter else source
    weights = [common.weights_sha256(path) for path in ([source, base] if adapter else [base]) if os.path.isdir(path)]
    fresh = [args.seed, config.to_json_string()] if not common.has_weights(base) else None
    lora = [args.lora_rank, args.lora_alpha, args.lora_targets, args.seed] if args.lora_rank and not adapter else None
    digest = common.derive_seed(weights, fresh, lora, None if os.path.isdir(base) else (base, getattr(config, "_commit_hash", None)), args.quantize)
    return {"name": str(pathlib.Path(source).resolve()) if os.path.isdir(source) else source, "digest": digest}


def adam_scales(checkpoint, tracked, problems):
    """{parameter: (numbers,) fp32 of (sqrt(v) + eps)^(-1/2)} from a checkpoint-N folder of these scripts: symmetric, so that a product of two
    scaled gradients is g^T V^(-1/2) g', AdamW's metric. v is bias-corrected."""
    checkpoint = pathlib.Path(checkpoint)
    stage_file = next(iter(sorted(checkpoint.glob("engine/state/mp_rank_00_model_states.pt"))), None)
    state = json.loads((checkpoint / "state.json").read_text()) if (checkpoint / "state.json").is_file() else None
    if state is None or stage_file is None:
        problems.append(f"--precond adam:{checkpoint}: no checkpoint-N folder with engine/ and state.json")
        return {}
    moments, steps = {}, max(1, state["step"])
    if "zero_stage" not in state:  # version 2 of a trainer writes it down with the flags
        state["zero_stage"] = json.loads((checkpoint.parent / "args.json").read_text())["zero_stage"]
        if state["zero_stage"]:
            problems.append(f"--precond adam:{checkpoint}: the moments of ZeRO stage {state['zero_stage']} lie in pieces; train with --ds_config zero0")
            return {}
    if state["zero_stage"] == 0:
        optimizer = torch.load(stage_file, map_location="cpu", weights_only=False)["optimizer"]
        saved, names = optimizer["state"], list(tracked)
        if len(optimizer["param_groups"]) > 1:  # with weight decay: matrices first, then the rest (common.param_groups), numbered through
            names = [n for decayed in (True, False) for n, p in tracked.items() if (p.dim() > 1) == decayed]
        if len(names) != len(saved):
            problems.append(f"--precond adam:{checkpoint}: it trained {len(saved)} weights, {len(names)} are tracked; use --params all (or lora)")
            return {}
        moments = {name: saved[i]["exp_avg_sq"] for i, name in enumerate(names)}
    else:
        if common.rank() == 0:
            common.universal_checkpoint(checkpoint)
        if dist.is_initialized():
            dist.barrier()
        for folder in (checkpoint / "universal" / "state" / "zero").iterdir():
            name = folder.name.removeprefix("module.").removeprefix("model.") if folder.name not in tracked else folder.name
            match = [n for n in tracked if folder.name.endswith(n) and folder.name.removesuffix(n).strip(".") in ("", "model", "module", "module.model")]
            if match:
                loaded = torch.load(folder / "exp_avg_sq.pt", map_location="cpu", weights_only=False)
                moments[match[0] if match else name] = loaded["param"] if isinstance(loaded, dict) else loaded
    missing = [n for n, p in tracked.items() if n not in moments or moments[n].numel() != numel(p)]
    if missing:
        problems.append(f"--precond adam:{checkpoint}: no second moment for {len(missing)} of {len(tracked)} parameters, among them {missing[0]}")
        return {}
    beta2 = 0.999
    return {n: ((v.float().flatten() / (1 - beta2**steps)).sqrt() + 1e-8).rsqrt() for n, v in moments.items()}


def digest_of(scales):
    """SHA-256 of a preconditioner's numbers, "none" without one."""
    found = hashlib.sha256()
    for name in sorted(scales or {}):
        found.update(name.encode() + scales[name].float().cpu().numpy().tobytes())
    return found.hexdigest() if scales else "none"


def open_model(args, source, config, device, precision):
    """(model on the device, engine's module under ZeRO-3) in eval mode, weights frozen later by `Gradients`."""
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if args.attn in ("auto", "math", "default"):
        config._attn_implementation = "sdpa"
    else:
        config._attn_implementation = "eager"
    stage, ds_config = 0, {"zero_optimization": {"stage": 0}}
    if args.ds_config not in ("auto", "zero0"):
        ds_config = common.read_ds_config(args, args.ds_config, precision, problems := [])
        if problems:
            common.fail(problems)
        stage = ds_config["zero_optimization"]["stage"]
    if stage not in (0, 3):
        common.fail(f"--ds_config {args.ds_config}: there is no optimizer here; zero0 (each process holds the model) or zero3 (weights partitioned)")
    try:
        model = common.load_model(auto_class, source, config, args, precision, ds_config).eval()
    except ValueError as error:
        if "sdpa" not in str(error).lower() and "scaled_dot_product" not in str(error):
            raise
        log.warning(f"{config.model_type} has no sdpa attention: eager is used")
        config._attn_implementation = "eager"
        model = common.load_model(auto_class, source, config, args, precision, ds_config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if stage == 0:
        return model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]  # DeepSpeed takes the flags as they are: freeze before it looks
    model.requires_grad_(False)
    zero = {"train_micro_batch_size_per_gpu": 1, **{key: ds_config[key] for key in ("zero_optimization", "bf16") if key in ds_config}}
    engine = deepspeed.initialize(model=model, config=zero)[0]
    for p in trained:
        p.requires_grad_(True)
    return engine.module.eval()


def attention_kernel(args):
    """Context in which attention is the math kernel: fused ones may give gradients that depend on the batch."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH) if args.attn in ("auto", "math") else torch.enable_grad()


def prepare(args):
    """(source, config, tokenizer, rows, family, precision) after all checks; every problem is reported at once."""
    problems = []
    check_args(args, problems)
    source, config, tokenizer = common.open_model_folder(args, problems)
    if not args.model_init_name and not args.model_init_path:
        problems.append("no model: give --model_init_name (a folder under models/) or --model_init_path (a folder or hub id)")
    rows, family = None, "seq2seq" if config is not None and config.is_encoder_decoder else "causal"
    if config is not None and family == "causal" and not common.is_decoder_only(config):
        problems.append(f"{source}: a {config.model_type} is neither a decoder-only model nor an encoder-decoder")
    if tokenizer is not None:
        rows = load_rows(args, source, tokenizer, family, problems)
    else:  # still say what is wrong with the data's names
        for name in args.data_name:
            common.find_data(args, name, problems)
    if problems:
        common.fail(problems)
    args.batch_tokens = args.batch_tokens or (8192 if torch.cuda.is_available() else 1024)
    empty = int((rows.n_targets == 0).sum())
    if empty:
        log.warning(f"{empty} of {len(rows.tokens)} rows have no target token left after truncation; their gradient is zero and they count nowhere")
    return source, config, tokenizer, rows, family, common.resolve_precision(args)


def pad_and_start(tokenizer, config):
    return tokenizer.pad_token_id or 0, getattr(config, "decoder_start_token_id", None) or 0


def gradients_of(model, args, scales=None):
    """`Gradients` with the sketch and chunk of the flags; a module without a rule or a batch axis ends the run with its name."""
    tracked = tracked_parameters(model, args.params)
    if not tracked:
        common.fail(f"--params {args.params}: no parameter matches; names are like {', '.join([n for n, _ in model.named_parameters()][:3])}")
    chunk = (args.chunk_mb or (256 if torch.cuda.is_available() else 8)) * 2**18
    try:
        return Gradients(model, tracked, (args.sketch, args.dim, args.seed, args.table_mb, args.run), args.target, chunk, scales, bool(args.compat))
    except NoBatchAxis as error:
        common.fail(str(error).splitlines())


def check_hooks(gradients, rows, args, ids, config):
    """Compare the hooks with autograd on two rows: -> largest relative error of a parameter. Finds what no hook saw: a second use of a
    weight, an operation without a batch axis. Under ZeRO-3 weights are never whole, so there: coverage only."""
    usable = np.flatnonzero(rows.n_targets)
    usable = usable[np.argsort(rows.lengths[usable], kind="stable")]
    pair = [int(usable[len(usable) // 4]), int(usable[len(usable) // 2])]
    batch = collate(rows, pair, *ids, gradients.device)
    if batch["input_ids"].shape[1] == len(pair):
        batch = collate(rows, pair + pair[:1], *ids, gradients.device)
    model, tracked, sketch = gradients.model, gradients.tracked, gradients.sketch
    if any(hasattr(p, "ds_id") for p in tracked.values()):
        gradients.rows(batch)
        error = 0.0
    else:
        gradients.sketch = Recorder(tracked, gradients)
        scales, gradients.scales = gradients.scales, {}
        gradients.rows(batch)
        found = {n: value.sum(0) for n, value in gradients.sketch.found.items()}
        gradients.sketch, gradients.scales = sketch, scales
        for p in tracked.values():
            p.requires_grad_(True)
        outputs = reduce_rows(token_losses(model, batch), batch["is_target"], gradients.target, gradients.compat)
        wanted = torch.autograd.grad(outputs.sum(), list(tracked.values()), allow_unused=True)
        model.requires_grad_(False)
        error, worst = 0.0, None
        scale = max(float(g.norm()) for g in wanted if g is not None)
        for (name, p), g in zip(tracked.items(), wanted):
            if g is None:  # autograd does not reach it: then its gradient is zero
                gradients.seen.add(name)
                g = torch.zeros(p.shape, device=p.device)
            ours = found.get(name, torch.zeros(p.numel(), device=g.device))
            off = float((ours - g.float().flatten()).norm()) / max(float(g.norm()), 1e-3 * scale)
            error, worst = (off, name) if off > error else (error, worst)
        if error > (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1):
            common.fail(f"{worst}: the hooks' gradient differs from autograd's by {error:.2g}: this {config.model_type} uses it in a way that has no batch "
                        "axis (or a second time); leave it out with --params linear or --params 'match:REGEX'")
    if missing := set(tracked) - gradients.seen:
        common.fail(f"no gradient arrived for {len(missing)} parameters, among them {sorted(missing)[0]}; leave them out with --params 'match:REGEX'")
    return error


class Recorder:
    """Stands in for a sketch and keeps whole gradients, {name: (B, numbers)}: for checks on a few rows."""
    kind = "exact"

    def __init__(self, tracked, gradients):
        self.sizes, self.B, self.found, self.gradients = {n: p.numel() for n, p in tracked.items()}, None, {}, gradients

    def start(self, B):
        self.found = {}
        return torch.zeros(B, 1, device=self.gradients.device)

    def whole(self, out, name):
        return self.found.setdefault(name, torch.zeros(len(out), self.sizes[name], device=out.device))

    def add(self, out, name, start, values):
        self.whole(out, name)[:, start: start + values.shape[1]] += values

    def add_at(self, out, name, coordinates, values):
        self.whole(out, name).scatter_add_(1, coordinates, values)

    def finish(self, out):
        return out


def parameter_list(tracked):
    return [{"name": n, "shape": list(getattr(p, "ds_shape", p.shape))} for n, p in tracked.items()]


def gradex_name(args, source):
    """The earlier system's folder: gradients/<model>_..._dim_<d>_run_<run>."""
    lora = f"_lora_r_{args.lora_rank}" if args.lora_rank or args.train_lora else ""
    name = f"Alpaca_{(args.model_init_name or source).strip('/').split('/')[-1].replace('/', '-')}{lora}" + (f"_{args.save_name}" if args.save_name else "")
    return f"gradients/{name}_dim_{args.dim}_run_{args.run}"


def collect(args):
    """Outputs and sketched gradients of every row; an unfinished store is continued where it stopped."""
    source, config, tokenizer, rows, family, precision = prepare(args)
    out = pathlib.Path(args.out or gradex_name(args, source))
    device = common.setup_distributed()
    model = open_model(args, source, config, device, precision)
    problems, scales = [], {}
    if args.precond != "none":
        scales = {n: s.to(device) for n, s in adam_scales(args.precond[5:], tracked_parameters(model, args.params), problems).items()}
    if problems:
        common.fail(problems)
    precond = f"adam:{pathlib.Path(args.precond[5:]).resolve()}" if scales else "none"
    if args.lora_rank and common.read_adapter(source, []) is None:
        log.warning("a fresh LoRA adapter has B = 0, so the gradient of A is zero: fine-tune a little first, and collect at that run")
    gradients = gradients_of(model, args, scales)
    tracked, sketch, ids = gradients.tracked, gradients.sketch, pad_and_start(tokenizer, config)
    skipped = [n for n, _ in model.named_parameters() if n not in tracked]
    chat = chat_of(args, source, tokenizer, family)
    manifest = {
        "format": 1, "n": len(rows.tokens), "dim": sketch.dim, "sketch": args.sketch, "hash": HASH, "seed": args.seed, "run": args.run,
        "scaling": "E |row|^2 = |g|^2", "target": args.target, "compat": args.compat, "reduction": "per row over its target tokens",
        "parameters": parameter_list(tracked), "model": model_digest(source, config, args), "family": family, "chat": bool(chat),
        "lora": {"rank": args.lora_rank, "alpha": args.lora_alpha, "targets": args.lora_targets} if args.lora_rank else None,
        "coverage": {"tracked": sum(map(numel, tracked.values())), "all": sum(numel(p) for p in model.parameters()), "skipped": skipped[:50]},
        "data": {"name": args.data_name, "split": args.split, "digest": rows.digest, "downsample": args.downsample, "key": args.groups,
                 "paths": [str(common.find_data(args, name, [])[None].resolve()) for name in args.data_name]},
        "numbers": rows.numbers.tolist() if len(rows.numbers) != rows.numbers[-1] + 1 else None,
        "groups": rows.names, "max_length": args.max_length, "max_source_length": args.max_source_length, "raw_prompt": args.raw_prompt,
        "precision": precision, "store_dtype": args.store_dtype, "precond": precond, "precond_digest": digest_of(scales), "attention": args.attn, "seed_of_weights": args.seed,
        "quantize": args.quantize, "revision": args.revision, "params": args.params}
    identity = json.loads(json.dumps(manifest))
    if common.rank() == 0:
        if (out / "manifest.json").is_file():
            before = json.loads((out / "manifest.json").read_text())
            changed = [k for k, v in identity.items() if before.get(k) != v]
            if changed:
                shown = "; ".join(f"{k}: {str(before.get(k))[:60]} -> {str(identity[k])[:60]}" for k in changed)
                common.fail(f"{out} is a store of something else ({shown}): choose another --out, or delete it", only_here=True)
        elif out.exists() and any(out.iterdir()):
            common.fail(f"{out} exists and is no store: choose another --out", only_here=True)
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "manifest.json").is_file():
            common.write_json(out / "manifest.json", manifest)
    if not common.broadcast((out / common.COMPLETE).exists(), device):
        with attention_kernel(args):
            fill_store(args, out, gradients, rows, ids, config, device)
            dist.barrier()  # every process has written its rows
            if common.rank() == 0:
                if args.base_model:
                    save_difference(args, out, gradients, precision)
                finish_store(out, rows)
        dist.barrier()
    else:
        log.info(f"{out} is finished already")
    gradients.close()
    if args.export or args.compat == "gradex":
        if common.rank() == 0:
            export(out, args.export or "gradex", args.batch_size)
    return out


def fill_store(args, out, gradients, rows, ids, config, device):
    """Collective. All rows that are not done: batches alike in length, dealt over the processes."""
    writer = Writer(out, len(rows.tokens), gradients.sketch.dim, args.store_dtype)
    todo = np.flatnonzero(~writer.done)
    if not len(todo):
        return
    partitioned = any(hasattr(p, "ds_id") for p in gradients.model.parameters())
    try:
        if not args.no_check:
            error = check_hooks(gradients, rows, args, ids, config)
            log.info(f"hooks against autograd on two rows: largest relative error {error:.2g}" if not partitioned else "hooks see every parameter "
                     "(ZeRO-3: not compared with autograd)")
        batches = make_batches(rows, todo, args.batch_tokens, config.vocab_size)
        mine = batches[common.rank()::common.world_size()]
        rounds = -(-len(batches) // common.world_size()) if partitioned else len(mine)
        log.info(f"{len(todo)} of {len(rows.tokens)} rows to collect, {sum(map(numel, gradients.tracked.values()))} parameters, d = {gradients.sketch.dim}; "
                 f"store {out}")
        bar = tqdm(total=sum(map(len, mine)), desc="collecting", unit=" rows", delay=5, disable=common.rank() > 0 or None)
        for i in range(rounds):  # under ZeRO-3 all ranks run the same number of passes; what a rank does twice is not written
            batch = mine[i] if i < len(mine) else batches[0]
            loss, odds, norms, projected = gradients.rows(collate(rows, batch, *ids, device))
            if i < len(mine):
                if not torch.isfinite(norms).all():
                    bad = batch[int((~torch.isfinite(norms)).nonzero()[0])]
                    common.fail(f"row {rows.numbers[bad]}: its gradient is not finite; is the model in order, or --precision too low?", only_here=True)
                writer.put(batch, loss.tolist(), odds.tolist(), norms, projected, rows.n_targets)
                bar.update(len(batch))
        bar.close()
    except NoBatchAxis as error:
        common.fail(str(error).splitlines())
    except torch.OutOfMemoryError as error:
        common.fail(f"out of memory ({str(error).splitlines()[0]}): lower --batch_tokens, then --chunk_mb and --table_mb, then --ds_config zero3", only_here=True)
    except OverflowError as error:
        common.fail(str(error), only_here=True)
    writer.flush()
    if writer.n_lost:
        log.warning(f"{writer.n_lost} rows are so small that fp16 changes their norm by over 1 %; where these matter, use --store_dtype fp32")


def finish_store(out, rows):
    """Rank 0: outputs.npz, the counts that only a finished store has, COMPLETE."""
    outputs, norms, done = (np.load(out / f"{name}.npy") for name in ("outputs", "norm", "done"))
    assert done.all(), f"{out}: {int((~done).sum())} rows were not written"
    np.savez(out / "outputs.npz", loss=outputs[:, 0], logodds=outputs[:, 1], n_tokens=outputs[:, 2].astype(np.int64), group=rows.group)
    record = json.loads((out / "manifest.json").read_text())
    common.write_json(out / "manifest.json", {**record, "zero_rows": int((norms == 0).sum()), "rows_without_target": int((rows.n_targets == 0).sum())})
    (out / common.COMPLETE).touch()


def save_difference(args, out, gradients, precision):
    """delta.npy: the sketch of (weights - weights of --base_model), both in the model's dtype; delta.json: its exact norm."""
    problems, other = [], copy.copy(args)
    other.model_init_path, other.lora_rank = args.base_model, args.lora_rank if common.read_adapter(args.base_model, []) is None else 0
    source, base_config, _ = common.open_model_folder(other, problems)
    if problems:
        common.fail(problems)
    base = dict(open_model(other, source, base_config, gradients.device, precision).named_parameters())
    if missing := [n for n in gradients.tracked if n not in base or base[n].shape != gradients.tracked[n].shape]:
        common.fail(f"--base_model {args.base_model}: another kind of model, it has no {missing[0]} of this shape", only_here=True)
    out_row, square = gradients.sketch.start(1), 0.0
    for name, weight in gradients.tracked.items():
        difference = (weight.detach().float() - base[name].detach().float()).flatten()
        square += float(difference.double().square().sum())
        if name in gradients.scales:  # rows are V^(-1/4) g, so a step is V^(1/4) Delta
            difference = difference / gradients.scales[name]
        for a in range(0, len(difference), 2**22):
            gradients.sketch.add(out_row, name, a, difference[None, a: a + 2**22])
    np.save(out / "delta.npy", gradients.sketch.finish(out_row)[0].cpu().numpy())
    common.write_json(out / "delta.json", {"norm": math.sqrt(square), "base": model_digest(source, base_config, other)})


def export(folder, layout, batch_size):
    """A finished store in another layout, beside its own files: npz | less_pt (all_orig.pt, rows of unit length) | gradex
    (train_batch_<k>_gradients.npy of batch_size rows, pretrain_outputs.npy)."""
    (store,) = open_stores([folder], [])
    rows = store.read()
    if layout == "npz":
        np.savez(store.path / "gradients.npz", gradients=rows, loss=store.loss, logodds=store.logodds, n_tokens=store.n_tokens, group=store.group)
    elif layout == "less_pt":
        torch.save(torch.from_numpy(rows), store.path / "all_unormalized.pt")
        torch.save(torch.nn.functional.normalize(torch.from_numpy(rows)), store.path / "all_orig.pt")
    else:
        for k in range(0, store.n, batch_size):
            np.save(store.path / f"train_batch_{k // batch_size}_gradients.npy", rows[k: k + batch_size])
        np.save(store.path / "pretrain_outputs.npy", store.logodds[:, None])
    log.info(f"{folder}: written as {layout}, {store.n} rows x {store.dim}")



# ------------------------------------------------------------------------------------------------ from a store back to its model


def of_store(store, args):
    """The model, rows and hooks' parameters that a store was collected with: (model, rows, tracked, ids, config, tokenizer). The model is
    looked up where it was, or where --model_init_path says; another one, and other data, are refused by digest."""
    m, found = store.manifest, copy.copy(args)
    if not found.model_init_name and not found.model_init_path:
        found.model_init_path = m["model"]["name"]
    lora = m["lora"] or {"rank": 0, "alpha": None, "targets": None}
    for name, value in dict(data_name=m["data"]["paths"], split=m["data"]["split"], groups=m["data"]["key"], downsample=m["data"]["downsample"],
                            max_length=m["max_length"], max_source_length=m["max_source_length"], raw_prompt=m["raw_prompt"], seed=m["seed_of_weights"],
                            lora_rank=lora["rank"], lora_alpha=lora["alpha"], lora_targets=lora["targets"], quantize=m["quantize"], params=m["params"],
                            revision=m["revision"], num_batches_gradients=None).items():
        setattr(found, name, value)
    if found.precision == "auto":
        found.precision = m["precision"]
    source, config, tokenizer, rows, _, precision = prepare(found)
    args.batch_tokens = found.batch_tokens
    if m["numbers"] is not None and len(m["numbers"]) != len(rows.tokens):  # --num_batches_gradients
        kept = [int(np.flatnonzero(rows.numbers == i)[0]) for i in m["numbers"] if i in set(rows.numbers)]
        rows = types.SimpleNamespace(**{**vars(rows), "source": [rows.source[i] for i in kept], "tokens": [rows.tokens[i] for i in kept],
                                        "group": rows.group[kept], "lengths": rows.lengths[kept], "n_targets": rows.n_targets[kept]})
    problems = []
    if rows.digest != m["data"]["digest"] and m["numbers"] is None:
        problems.append(f"{store.path}: {', '.join(m['data']['paths'])} changed since the rows were collected (digest); collect again")
    digest = model_digest(source, config, found)
    if digest["digest"] != m["model"]["digest"]:
        problems.append(f"{store.path}: collected with other weights than {digest['name']} has now (digest); give --model_init_path, or collect again")
    if problems:
        common.fail(problems)
    device = common.setup_distributed()
    model = open_model(found, source, config, device, precision)
    tracked = tracked_parameters(model, m["params"])
    if parameter_list(tracked) != m["parameters"]:
        common.fail(f"{store.path}: the parameters of {digest['name']} are other ones")
    return types.SimpleNamespace(model=model, rows=rows, tracked=tracked, ids=pad_and_start(tokenizer, config), config=config, tokenizer=tokenizer,
                                 args=found, device=device, source=source)


def sketch_of(store, device):
    m = store.manifest
    sizes = {p["name"]: math.prod(p["shape"]) for p in m["parameters"]}
    return Sketch(m["sketch"], m["dim"], m["seed"], sizes, device, 2048, m["run"])


def scales_of(store, tracked, device):
    """V^(-1/4) of the store's preconditioner, {} without one."""
    if store.manifest["precond"] == "none":
        return {}
    scales = adam_scales(store.manifest["precond"][5:], tracked, problems := [])
    if not problems and digest_of(scales) != store.manifest["precond_digest"]:
        problems.append(f"{store.path}: its preconditioner {store.manifest['precond']} has changed since; collect again")
    if problems:
        common.fail(problems)
    return {n: s.to(device) for n, s in scales.items()}


def mean_gradient(here, which, target, compat=False):
    """{parameter: fp32 gradient} of the token-weighted mean output of rows `which`, by plain autograd: sum_i w_i g_i / sum_i w_i."""
    weights = torch.tensor(here.rows.n_targets if target != "loss_sum" else np.ones(len(here.rows.tokens)), dtype=torch.float32, device=here.device)
    for p in here.tracked.values():
        p.requires_grad_(True)
    total = {n: torch.zeros(p.shape, device=here.device) for n, p in here.tracked.items()}
    weights = weights * torch.tensor(here.rows.n_targets > 0, device=here.device)
    for batch in make_batches(here.rows, which, here.args.batch_tokens, here.config.vocab_size):
        tensors = collate(here.rows, batch, *here.ids, here.device)
        outputs = reduce_rows(token_losses(here.model, tensors), tensors["is_target"], target, compat)
        share = weights[batch] / weights[list(which)].sum()
        found = torch.autograd.grad((outputs * share).sum(), list(here.tracked.values()), allow_unused=True)
        for n, g in zip(total, found):
            if g is not None:
                total[n] += g.float()
    here.model.requires_grad_(False)
    return total


def flat(tensors, names):
    return torch.cat([tensors[n].float().flatten() for n in names])


@torch.no_grad()
def move(here, start, step):
    """Weights := start + step, both {parameter: tensor}; step is an iterable of (name, tensor)."""
    for name, part in step:
        here.tracked[name].copy_((start[name].float() + part.view(start[name].shape)).to(start[name].dtype))


# ------------------------------------------------------------------------------------------------ linerr


class Outputs(torch.nn.Module):
    """forward(batch) -> (B,) outputs: a module, so that functional_call can replace its weights."""

    def __init__(self, model, target):
        super().__init__()
        self.model, self.target = model, target

    def forward(self, batch):
        return reduce_rows(token_losses(self.model, batch), batch["is_target"], self.target)


def directional(here, target, step, which):
    """(n,) derivative of the rows' outputs along {parameter: tensor}: one Jacobian-vector product in forward mode."""
    import torch.autograd.forward_ad as forward_ad
    found, module = np.zeros(len(here.rows.tokens)), Outputs(here.model, target)
    for batch in make_batches(here.rows, which, here.args.batch_tokens, here.config.vocab_size):
        tensors = collate(here.rows, batch, *here.ids, here.device)
        with forward_ad.dual_level():
            duals = {f"model.{n}": forward_ad.make_dual(p.detach(), step[n].view(p.shape).to(p.dtype)) for n, p in here.tracked.items()}
            outputs = torch.func.functional_call(module, duals, (tensors,))
            found[batch] = forward_ad.unpack_dual(outputs).tangent.double().cpu().numpy()
    return found[which]


def difference_quotient(here, target, step, which, start):
    """The same by a central difference, for models whose operations have no forward mode: error of third order, and rounding."""
    size = 1e-3 * math.sqrt(sum(float(p.double().square().sum()) for p in start.values())) / math.sqrt(sum(float(s.double().square().sum()) for s in step.values()))
    values = []
    for sign in (1, -1):
        move(here, start, ((n, sign * size * s) for n, s in step.items()))
        values.append(outputs_of(here.model, here.rows, which, here.args, here.ids, here.device)[:, 1 if target == "logodds" else 0])
    move(here, start, ((n, 0 * s) for n, s in step.items()))
    return (values[0] - values[1]) / (2 * size)


def linearisation(f0, slope, f1):
    """Errors of f0 + slope for f1, all (n,) float64. squared: the earlier system's mean of ((f0 + slope - f1) / max(|f0|, |f1|))^2, no_gradient:
    the same without slope; relative: |error| / |change| in norm; r2: 1 - relative^2, the share of the change that is explained."""
    scale = np.maximum(np.abs(f0), np.abs(f1))
    ok = scale > 0
    ratio, plain = (f0 + slope - f1)[ok] / scale[ok], (f0 - f1)[ok] / scale[ok]
    change = np.sum((f1 - f0) ** 2)
    relative = math.sqrt(np.sum((f0 + slope - f1) ** 2) / change) if change else math.nan
    return {"squared": float(np.mean(ratio**2)), "no_gradient": float(np.mean(plain**2)), "root": float(np.sqrt(np.mean(ratio**2))),
            "median": float(np.median(np.abs(ratio))), "relative": relative, "r2": 1 - relative**2}


def linerr(args):
    """A table of `linearisation` for every direction and distance."""
    problems = []
    check_args(args, problems)
    stores = open_stores([args.grads] + ([args.target_grads] if args.target_grads else []), problems)
    train, target = stores[0], stores[-1]
    check_together(train, target, problems)
    if problems:
        common.fail(problems)
    with attention_kernel(args):
        here = of_store(train, args)
        measured = here if target is train else types.SimpleNamespace(**{**vars(here), "rows": of_rows(target, here)})
        start = {n: p.detach().clone() for n, p in here.tracked.items()}
        norm = math.sqrt(sum(float(p.double().square().sum()) for p in start.values()))
        which = np.flatnonzero(measured.rows.n_targets)[: args.limit]
        column = 1 if args.target == "logodds" else 0
        f0 = outputs_of(here.model, measured.rows, which, here.args, here.ids, here.device)[:, column]
        table = []
        for direction in args.direction.split(","):
            step = direction_of(direction, train, here, start, args)
            size = math.sqrt(sum(float(s.double().square().sum()) for s in step.values()))
            try:
                slope, how = directional(measured, args.target, step, which), "jvp"
            except NotImplementedError as error:
                log.warning(f"no forward-mode derivative of this model ({str(error).splitlines()[0][:80]}): a central difference is used")
                slope, how = difference_quotient(measured, args.target, step, which, start), "difference"
            errors = []
            for scale in args.scale:
                factor = scale * norm / size
                move(here, start, ((n, factor * s) for n, s in step.items()))
                f1 = outputs_of(here.model, measured.rows, which, here.args, here.ids, here.device)[:, column]
                table.append({"direction": direction, "scale": scale, "derivative": how, **linearisation(f0, factor * slope, f1)})
                errors.append(np.abs(f0 + factor * slope - f1).mean())
            move(here, start, ((n, 0 * s) for n, s in step.items()))
            with np.errstate(divide="ignore"):
                rise = np.diff(np.log(errors)) / np.diff(np.log(args.scale)) if len(args.scale) > 1 else []
            for row, slope_of_error in zip(table[-len(args.scale):], [math.nan, *rise]):
                row["error_slope"] = float(slope_of_error)
    print(f"{'direction':<9} {'distance':>8} {'squared':>10} {'no grad.':>10} {'root':>8} {'median':>8} {'relative':>8} {'R2':>8} {'slope':>6}")
    for r in table:
        print(f"{r['direction']:<9} {r['scale']:>8.3g} {r['squared']:>10.3g} {r['no_gradient']:>10.3g} {r['root']:>8.3g} {r['median']:>8.3g} "
              f"{r['relative']:>8.3g} {r['r2']:>8.4f} {r['error_slope']:>6.2f}")
    common.write_json(args.out or train.path / "linerr.json", without_nan({"target": args.target, "rows": len(which), "norm": norm, "table": table}))
    return table


def of_rows(store, here):
    """The rows of another store of the same model."""
    m, args = store.manifest, copy.copy(here.args)
    for name, value in dict(data_name=m["data"]["paths"], split=m["data"]["split"], groups=m["data"]["key"], downsample=m["data"]["downsample"],
                            max_length=m["max_length"], max_source_length=m["max_source_length"], raw_prompt=m["raw_prompt"], seed=m["seed_of_weights"]).items():
        setattr(args, name, value)
    rows = load_rows(args, here.source, here.tokenizer, m["family"], problems := [])
    if not problems and rows.digest != m["data"]["digest"]:
        problems.append(f"{store.path}: {', '.join(m['data']['paths'])} changed since the rows were collected (digest); collect again")
    if problems:
        common.fail(problems)
    return rows


def direction_of(direction, train, here, start, args):
    """{parameter: tensor} of a named direction; its length is of no account."""
    if direction == "random":
        generator = torch.Generator().manual_seed(common.derive_seed(args.seed, "direction"))
        return {n: torch.randn(p.shape, generator=generator).to(here.device) for n, p in here.tracked.items()}
    if direction == "delta":
        other = copy.copy(args)
        other.model_init_path, other.model_init_name = args.delta, None
        source, config, _ = common.open_model_folder(other, problems := [])
        if problems:
            common.fail(problems)
        tuned = dict(open_model(other, source, config, here.device, here.args.precision).named_parameters())
        if missing := [n for n, p in start.items() if n not in tuned or tuned[n].shape != p.shape]:
            common.fail(f"--delta {args.delta}: another kind of model, it has no {missing[0]} of this shape")
        return {n: tuned[n].detach().float() - p.float() for n, p in start.items()}
    groups = np.random.default_rng([args.seed, 6]).permutation(len(train.names))[: max(1, int(0.75 * len(train.names)))]
    rows = np.flatnonzero(np.isin(train.group, groups) & (train.n_tokens > 0))
    sign, scales = sign_of(train), scales_of(train, here.tracked, here.device)
    if direction == "dual":
        gradient = mean_gradient(here, rows, train.manifest["target"])
        return {n: sign * g * (scales[n].view(g.shape) ** 2 if scales else 1) for n, g in gradient.items()}
    w = torch.from_numpy(train.read(rows)).to(here.device).mean(0)
    return {n: sign * (part * (scales[n] if scales else 1)).view(here.tracked[n].shape) for n, part in sketch_of(train, here.device).lift(w).items()}


# ------------------------------------------------------------------------------------------------ subsets


def grouping(store, path, problems):
    """(group number of every row (n,), names): the store's own groups, or those of a JSON file of `subsets --clusters`."""
    if not path:
        return store.group, store.names
    try:
        record = json.loads(pathlib.Path(path).read_text())
        group, names = np.array(record["group"]), record["names"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"--groups {path}: no file of `subsets --clusters` ({error})")
        return store.group, store.names
    if len(group) != store.n or record.get("data") != store.manifest["data"]["digest"]:
        problems.append(f"--groups {path}: it was made from other rows than those of {store.path}")
    return group, names


def read_subsets(path, n_groups, limit, problems):
    """[sorted group numbers] of a text file, one subset a line; the earlier system's sampled_indices."""
    found = []
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except OSError as error:
        problems.append(f"--subsets {path}: cannot be read ({error})")
        return found
    for n, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if not all(re.fullmatch(r"\d+", word) and int(word) < n_groups for word in words) or len(set(words)) < len(words):
            problems.append(f"{path}, line {n}: {line[:60]!r}: expected different group numbers from 0 to {n_groups - 1}")
        else:
            found.append(sorted(map(int, words)))
    if not lines:
        problems.append(f"{path}: no subset in it")
    return found[:limit]


def cluster(rows, k, seed, n_init=4, rounds=50):
    """(n,) numbers of k clusters of rows (n, d) by cosine: spherical k-means (Dhillon and Modha 2001), the best of n_init starts."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    best, best_worth = None, -math.inf
    for start in range(n_init):
        rng = np.random.default_rng([seed, 7, start])
        centres = unit[rng.choice(len(unit), k, replace=False)]
        for _ in range(rounds):
            assigned = (unit @ centres.T).argmax(1)
            sums = np.stack([unit[assigned == c].sum(0) if (assigned == c).any() else unit[rng.integers(len(unit))] for c in range(k)])
            new = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-30)
            if np.allclose(new, centres):
                break
            centres = new
        worth = float((unit * centres[assigned]).sum())
        if worth > best_worth:
            best, best_worth = assigned, worth
    return best


def subsets(args):
    """Write random subsets of the store's groups; or, with --clusters, groups of rows."""
    problems = []
    check_args(args, problems)
    (store,) = open_stores([args.grads], problems)
    out, n = pathlib.Path(args.out), len(store.names)
    if out.exists():
        problems.append(f"--out {out}: exists; choose another name")
    if args.clusters and args.clusters > store.n:
        problems.append(f"--clusters {args.clusters}: there are {store.n} rows")
    size = int(args.subset_size) if args.subset_size > 1 else int(args.subset_size * n)
    if not args.clusters and not 1 <= size <= n:
        problems.append(f"--subset_size {args.subset_size}: {size} of {n} groups; expected 1 to all of them")
    if problems:
        common.fail(problems)
    if args.clusters:
        assigned = cluster(store.read(), args.clusters, args.seed)
        names = [f"cluster_{i}" for i in range(args.clusters)]
        common.write_json(out, {"group": assigned.tolist(), "names": names, "data": store.manifest["data"]["digest"]})
        log.info(f"{out}: {store.n} rows in {args.clusters} clusters of {', '.join(map(str, np.bincount(assigned, minlength=args.clusters)))} rows")
        return
    rng = np.random.default_rng([args.seed, 8])
    lines = [" ".join(map(str, sorted(rng.permutation(n)[:size]))) for _ in range(args.number_of_subsets)]
    out.write_text("\n".join(lines) + "\n")
    names = ", ".join(f"{i} {name}" for i, name in enumerate(store.names[:50]))
    log.info(f"{out}: {len(lines)} subsets ({len(set(lines))} different) of {size} of {n} groups: {names}")


# ------------------------------------------------------------------------------------------------ estimate


def group_sums(store, group, n_groups):
    """(n_groups, d) weighted sums of the rows, (n_groups,) weights, (n_groups,) rows, over rows with a target. Read in blocks."""
    sums, weights, counts = np.zeros((n_groups, store.dim)), np.zeros(n_groups), np.zeros(n_groups)
    w = store.weights() * (store.n_tokens > 0)
    for a in range(0, store.n, 4096):
        block = slice(a, a + 4096)
        onehot = np.zeros((n_groups, len(w[block])))
        onehot[group[block], np.arange(len(w[block]))] = w[block]
        sums += onehot @ store.read(block)
        weights += onehot.sum(1)
        counts += (onehot > 0).sum(1)
    return sums, weights, counts


def membership(chosen, n_groups):
    """(subsets, groups) 0 / 1."""
    table = np.zeros((len(chosen), n_groups))
    for row, subset in zip(table, chosen):
        row[subset] = 1
    return table


def mean_rows(chosen, sums, weights):
    """(subsets, d) weighted mean row of every subset."""
    table = membership(chosen, len(weights))
    return (table @ sums) / np.maximum(table @ weights, 1e-30)[:, None]


def fold(rows, dim):
    """A sketch of the same seed with fewer numbers: neighbours added. (.., d) -> (.., dim)."""
    while rows.shape[-1] > dim:
        rows = rows.reshape(*rows.shape[:-1], -1, 2).sum(-1)
    return rows


def logistic(rows, offset, penalty, flips=None):
    """w (d,) that minimises mean log(1 + exp(-(offset + rows w))) + penalty |w|^2 (Zhang et al. 2025, EnsembleLoRA). With flips (n,) of +-1 the
    earlier system's: sum log(1 + exp(-(rows w + flips b))) + (|w|^2 + b^2) / 2C, C = penalty, whose offset is dropped. By L-BFGS in float64."""
    rows = torch.as_tensor(rows, dtype=torch.float64)
    offset = torch.as_tensor(offset, dtype=torch.float64)
    w = torch.zeros(rows.shape[1] + (flips is not None), dtype=torch.float64, requires_grad=True)
    if flips is not None:
        rows = torch.cat([rows, torch.as_tensor(flips, dtype=torch.float64)[:, None]], 1)
    optimizer = torch.optim.LBFGS([w], lr=1, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, history_size=20, line_search_fn="strong_wolfe")

    def objective():
        losses = torch.nn.functional.softplus(-(offset + rows @ w))
        value = losses.mean() + penalty * w.square().sum() if flips is None else penalty * losses.sum() + w.square().sum() / 2
        optimizer.zero_grad()
        value.backward()
        return value
    optimizer.step(objective)
    return w.detach().numpy()[: rows.shape[1] - (flips is not None)]


def ridge(rows, residual, penalty):
    """w (d,) that minimises |rows w - residual|^2 + n penalty |w|^2, in n or d dimensions, whichever are fewer."""
    n, d = rows.shape
    if n < d:
        return rows.T @ np.linalg.solve(rows @ rows.T + n * penalty * np.eye(n), residual)
    return np.linalg.solve(rows.T @ rows + n * penalty * np.eye(d), rows.T @ residual)


def group_means(values, target, names):
    """(.., groups + 1) means over the target rows of each group, and over all of them last. values: (.., n)."""
    usable = target.n_tokens > 0
    columns = [values[..., usable & (target.group == g)].mean(-1) if (usable & (target.group == g)).any() else np.full(values.shape[:-1], np.nan)
               for g in range(len(names))]
    return np.stack([*columns, values[..., usable].mean(-1)], -1)


def changes(target, directions, dim):
    """(subsets, n) change of every target row's output for a step along directions (subsets, dim): g . Delta."""
    found = np.empty((len(directions), target.n), np.float32)
    for a in range(0, target.n, 4096):
        found[:, a: a + 4096] = directions.astype(np.float32) @ fold(target.read(slice(a, a + 4096)), dim).T
    return found


def to_losses(target, change):
    """Losses (.., n) from a store's outputs and their predicted changes; log-odds go through softplus, less its error at no change."""
    kind = target.manifest["target"]
    if kind == "logodds":
        return target.loss + np.logaddexp(0, -(target.logodds + change)) - np.logaddexp(0, -target.logodds)
    return target.loss + (change / np.maximum(target.n_tokens, 1) if kind == "loss_sum" else change)


def write_table(path, names, rows):
    """rows: [(run, subset or None, values (groups + 1,))]. The earlier system's columns, and `run` before them."""
    aside = pathlib.Path(f"{path}.tmp")
    with open(aside, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "Data indices", *[f"loss_{name}" for name in names], "loss"])
        for run, subset, values in rows:
            writer.writerow([run, " ".join(map(str, subset or [])), *[f"{value:.8g}" for value in values]])
    os.replace(aside, path)


def read_table(path, problems):
    """(names of the columns, [(run, subset, values)])."""
    try:
        with open(path, newline="") as file:
            header, *lines = csv.reader(file)
        columns = [name.removeprefix("loss_") for name in header[2:]]
        if header[:2] != ["run", "Data indices"]:
            raise ValueError(f"columns {header[:3]}")
        return columns, [(line[0], tuple(map(int, line[1].split())), np.array(line[2:], float)) for line in lines]
    except (OSError, ValueError, IndexError) as error:
        problems.append(f"{path}: no table of `estimate` or `truth` ({error})")
        return [], []


def calibration(spec, names, chosen, unit, base, problems):
    """(step size that fits the first K true runs best, their subsets): least squares of the true on the predicted changes, all groups together.
    unit: {subset: predicted change (groups + 1,) of step size 1}; base: losses (groups + 1,) that changes count from."""
    path, _, k = spec.rpartition(":")
    columns, rows = read_table(path, problems)
    runs = [(subset, values) for run, subset, values in rows if run not in ("base", "all")]
    if columns and columns != [*names, "loss"]:
        problems.append(f"--calibrate {path}: its groups are {', '.join(columns[:6])}; those of the target rows are {', '.join(names[:6])}")
    used = [(subset, values) for subset, values in runs if subset in unit][: int(k)]
    known = [(unit[subset], values - base) for subset, values in used]
    if not problems and len(known) < int(k):
        problems.append(f"--calibrate {spec}: {len(known)} of its runs are of subsets in --subsets, {k} are asked for")
    if problems:
        common.fail(problems)
    predicted, true = (np.concatenate([pair[i][:-1] for pair in known]) for i in (0, 1))
    ok = np.isfinite(true) & np.isfinite(predicted)
    return float((predicted[ok] * true[ok]).sum() / max((predicted[ok] ** 2).sum(), 1e-30)), {subset for subset, _ in used}


def estimate(args):
    """Losses of every target group after fine-tuning on each subset, from the stores. See docs/project_grads.md for the formulas."""
    problems = []
    check_args(args, problems)
    train, target, *anchors = open_stores([args.grads, args.target_grads, *(args.anchor_grads or [])], problems)
    check_together(train, target, problems)
    if anchors:
        check_together(anchors[0], anchors[1], problems)
        check_together(train, anchors[0], problems, same_model=False, same_data=True)
        check_together(target, anchors[1], problems, same_model=False, same_data=True)
        if anchors[0].manifest["model"]["digest"] == train.manifest["model"]["digest"]:
            problems.append("--anchor_grads: collected at the same weights as --grads; the anchor is the model fine-tuned on everything")
    group, groups = grouping(train, args.groups, problems)
    chosen = read_subsets(args.subsets, len(groups), args.limit, problems)
    if train.manifest["target"] == "logodds" and target.manifest["target"] != "logodds":
        problems.append(f"{args.target_grads}: gradients of {target.manifest['target']}, the training rows' are of log-odds; collect it with --target logodds")
    if args.fit == "logistic" and train.manifest["target"] != "logodds":
        problems.append("--fit logistic needs rows of --target logodds")
    if args.fit == "ridge" and train.manifest["target"] != "loss":
        problems.append("--fit ridge needs rows of --target loss")
    dim = args.dim or train.dim
    if args.dim and (train.manifest["sketch"] != "sjlt" or train.dim % dim or (train.dim // dim) & (train.dim // dim - 1)):
        problems.append(f"--dim {args.dim}: an sjlt store of {train.dim} numbers folds to {train.dim} / 2, / 4, ...")
    if args.compat and (train.manifest["sketch"] != "gradex" or train.manifest["target"] != "logodds"):
        problems.append("--compat gradex needs a store that was collected with --compat gradex")
    out = pathlib.Path(args.out)
    if out.exists():
        problems.append(f"--out {out}: exists; choose another name")
    if problems:
        common.fail(problems)
    started = time.monotonic()
    if args.compat or args.eval == "lift":
        with attention_kernel(args):
            rows, step_size, seconds = lifted(args, train, target, anchors, group, groups, chosen)
    else:
        rows, step_size, seconds = linear(args, train, target, anchors, group, groups, chosen, dim)
    write_table(out, target.names, rows)
    common.write_json(f"{out}.json", {"step_size": step_size, "eval": "lift" if args.compat else args.eval, "fit": args.compat or args.fit, "dim": dim,
                                      "anchor": bool(anchors), "calibrate": args.calibrate, "subsets": len(chosen), "seconds": seconds})
    log.info(f"{out}: {len(chosen)} subsets x {len(target.names)} target groups, step size {step_size:.4g}, {time.monotonic() - started:.1f} s")


AGAINST = "the way to the anchor goes against the gradients: it overshot; give --calibrate or --step_size, or an anchor of a shorter run"
N_STEP_SUBSETS, N_STEP_ROWS = 4, 64  # whose training loss chooses the step of --eval lift
ANCHOR_STEP = ("step size from the way to the anchor: after AdamW often several times too large, so that the order of the subsets means more than the size "
               "of the changes; --calibrate fits it to a few true runs")


def sign_of(store):
    """A training step lowers the loss: against its gradient, along the log-odds'."""
    return 1 if store.manifest["target"] == "logodds" else -1


def steps_for(chosen, counts, args):
    """(subsets,) training steps of each subset, 1 = those of all the data: the same for --budget steps, by rows for epochs."""
    return membership(chosen, len(counts)) @ counts / counts.sum() if args.budget == "epochs" else np.ones(len(chosen))


def linear(args, train, target, anchors, group, groups, chosen, dim):
    """Estimates in the sketch: f(S) = f + step_size x g . direction(S)."""
    everything, sign = list(range(len(groups))), sign_of(train)
    sums, weights, counts = group_sums(train, group, len(groups))
    length = steps_for(chosen, counts, args)[:, None]
    if args.fit == "mean":
        directions, of_all = mean_rows(chosen, sums, weights), mean_rows([everything], sums, weights)[0]
        if anchors:  # gradients change on the way to the anchor: the mean of both ends
            far, far_weights, _ = group_sums(anchors[0], group, len(groups))
            directions = (directions + mean_rows(chosen, far, far_weights)) / 2
            of_all = (of_all + mean_rows([everything], far, far_weights)[0]) / 2
        directions, of_all = sign * fold(directions, dim) * length, sign * fold(of_all, dim)
    else:
        directions, of_all = np.empty((len(chosen), dim)), None
        mean_square = float((train.norm.astype(float) ** 2).mean())
        for i, subset in enumerate(tqdm(chosen, desc=f"fitting ({args.fit})", delay=5)):
            which = np.flatnonzero(np.isin(group, subset) & (train.n_tokens > 0))
            rows, penalty = fold(train.read(which), dim), args.ridge_lambda * mean_square
            directions[i] = logistic(rows, train.logodds[which], penalty) if args.fit == "logistic" else ridge(rows, -train.loss[which], penalty)
        directions *= length
    reference = anchors[1] if anchors else target
    if anchors:
        directions = directions - of_all
    delta = np.load(anchors[0].path / "delta.npy") if anchors and (anchors[0].path / "delta.npy").exists() else None
    base = group_means(target.loss[None], target, target.names)[0]
    at_reference = group_means(reference.loss[None], reference, target.names)[0]

    def predicted(step_size):
        return group_means(to_losses(reference, changes(reference, step_size * directions, dim)), reference, target.names)

    def step_that_changes(size):
        """The step size at which outputs change by `size` on average."""
        return size / max(float(np.abs(changes(reference, directions, dim)).mean()), 1e-30)
    a_little = 1e-3 * float(np.abs(reference.loss).mean())
    step_size, used = args.step_size, set()
    if args.step_size:
        pass
    elif args.calibrate:
        guess = step_that_changes(1e-3)  # small: log-odds' link is straight there
        unit = {tuple(s): v for s, v in zip(chosen, (predicted(guess) - at_reference) / guess)}
        step_size, used = calibration(args.calibrate, target.names, chosen, unit, at_reference, [])
        if step_size <= 0:
            log.warning(f"the true runs move against the first order (fitted step size {step_size:.4g}): training goes too far from these weights for it. "
                        "The order of the subsets is kept, with a tiny step; the sizes mean nothing. Use an anchor, or shorter runs")
            step_size = step_that_changes(a_little)
    elif delta is not None:  # Delta_all = step_size x of_all, as far as it lies along it
        step_size = float(fold(delta, dim) @ of_all / (of_all @ of_all))
        log.warning(ANCHOR_STEP if step_size > 0 else AGAINST + ". The order of the subsets is kept, with a tiny step; the sizes mean nothing")
        step_size = step_size if step_size > 0 else step_that_changes(a_little)
    else:
        step_size = 1.0 if args.fit != "mean" else step_that_changes(a_little)
        log.warning("no --calibrate, --step_size or anchor with --base_model: the order of the subsets means something, the size of the changes does not")
    seconds = time.process_time()
    values = predicted(step_size)
    rows = [("base", None, base)] + ([("all", everything, at_reference)] if anchors else [])
    return rows + [(run_name(s, used), s, v) for s, v in zip(chosen, values)], step_size, time.process_time() - seconds


def run_name(subset, used):
    """What a row of estimates is: one that --calibrate has seen the truth of is no test of it."""
    return "calibration" if tuple(subset) in used else "estimate"


def lifted(args, train, target, anchors, group, groups, chosen):
    """Estimates by moving the weights and a real forward pass over the target rows."""
    everything, started = list(range(len(groups))), time.monotonic()
    here = of_store(train, args)
    names, sign = list(here.tracked), sign_of(train)
    target_rows = of_rows(target, here)
    base, used = group_means(target.loss[None], target, target.names)[0], set()
    start = {n: p.detach().clone() for n, p in here.tracked.items()}
    if args.compat:
        sketch, step_size = sketch_of(train, here.device), args.scale
        lora = [n for n in names if "lora" in n] or names
        norm = args.abs_scale if args.abs_scale > 0 else math.sqrt(sum(float(start[n].double().square().sum()) for n in lora))
    else:
        scales = scales_of(train, here.tracked, here.device)
        metric = flat({n: s.square() for n, s in scales.items()}, names) if scales else 1.0
        weights = np.array([here.rows.n_targets[group == g].sum() for g in everything], float)
        counts = np.array([((group == g) & (here.rows.n_targets > 0)).sum() for g in everything], float)
        gradients = group_gradients(train, here, group, groups, names)
        if anchors:
            other = of_store(anchors[0], argparse.Namespace(**{**vars(args), "model_init_path": None, "model_init_name": None}))
            gradients = (gradients + group_gradients(anchors[0], other, group, groups, names)) / 2
            delta = flat(other.tracked, names) - flat(start, names)
            start, here = {n: p.detach().clone() for n, p in other.tracked.items()}, other
        of_all = sign * metric * (torch.tensor(weights, dtype=torch.float32, device=here.device) @ gradients) / weights.sum()
        if args.step_size:
            step_size = args.step_size
        elif args.calibrate:
            known, step_size, _ = linear(argparse.Namespace(**{**vars(args), "fit": "mean"}), train, target, anchors, group, groups, chosen, train.dim)
            used = {tuple(subset) for run, subset, _ in known if run == "calibration"}
        elif anchors:  # in the metric of the step: Delta_all = step_size x of_all, as far as it lies along it
            step_size = float((delta * of_all / metric).sum() / (of_all * of_all / metric).sum())
            if step_size <= 0:
                common.fail(AGAINST)
        else:
            common.fail("--eval lift moves the weights by real steps: give --anchor_grads, --calibrate or --step_size")
        lengths = steps_for(chosen, counts, args)
    rows, which = [("base", None, base)], np.arange(target.n)
    if anchors:
        rows.append(("all", everything, group_means(anchors[1].loss[None], anchors[1], target.names)[0]))

    def outputs_after(i, step_size, rows, which):
        """(rows,) after the weights have moved by the estimated step of subset i."""
        if args.compat:
            used_rows = np.flatnonzero(np.isin(group, chosen[i]) & (train.n_tokens > 0))
            step = gradex_step(args, train, used_rows, sketch, norm * (args.scale if args.abs_scale <= 0 else 1))
        else:
            share = torch.tensor(weights * membership([chosen[i]], len(groups))[0], dtype=torch.float32, device=here.device)
            whole = step_size * (lengths[i] * sign * metric * (share @ gradients) / share.sum() - (of_all if anchors else 0))
            step = dict(zip(names, whole.split([start[n].numel() for n in names])))
        move(here, start, step.items())
        return outputs_of(here.model, rows, which, here.args, here.ids, here.device)[:, 0]

    def losses_of(i, step_size):
        return group_means(outputs_after(i, step_size, target_rows, which)[None], target, target.names)[0]
    if anchors and not used and not args.step_size and not args.compat:  # training curves around walls that a straight step climbs
        train_rows, rng, tried = of_rows(train, here), np.random.default_rng(0), range(min(N_STEP_SUBSETS, len(chosen)))
        own = {i: np.sort(rng.permutation(np.flatnonzero(np.isin(group, chosen[i]) & (train.n_tokens > 0)))[:N_STEP_ROWS]) for i in tried}
        errors, way = {}, step_size
        for size in tqdm([way / 2**k for k in range(10)], desc="fitting the step size", delay=5):
            errors[size] = float(np.mean([outputs_after(i, size, train_rows, own[i]).mean() for i in tried]))
            if errors[size] > min(errors.values()):
                break
        step_size = min(errors, key=errors.get)
        log.info(f"step size {step_size:.4g}: {step_size / way:.3g} of the way to the anchor, where the training loss of the first {len(tried)} subsets is least; "
                 "--calibrate fits it to a few true runs")
    if used:  # a step that is right to first order can be too long for the real loss
        true = {subset: values for run, subset, values in read_table(args.calibrate.rpartition(":")[0], [])[1][::-1] if run not in ("base", "all")}
        ours = [i for i, subset in enumerate(chosen) if tuple(subset) in used]
        errors = {size: sum(float(np.nansum((losses_of(i, size) - true[tuple(chosen[i])])[:-1] ** 2)) for i in ours)
                  for size in tqdm([step_size / 2**k for k in range(6)], desc="fitting the step size", delay=5)}
        step_size = min(errors, key=errors.get)
    for i, subset in enumerate(tqdm(chosen, desc="estimating", delay=5)):
        rows.append((run_name(subset, used), subset, losses_of(i, step_size)))
    move(here, start, ((n, 0 * p.float()) for n, p in start.items()))
    return rows, step_size, time.monotonic() - started


def group_gradients(store, here, group, groups, names):
    """(groups, p) fp32 token-weighted mean gradients of the training groups, kept in the store: group_gradients.npy, made once."""
    key = common.derive_seed(group.tolist(), names)
    path = store.path / f"group_gradients_{key % 10**8}.npy"
    if not path.exists():
        rows = np.stack([flat(mean_gradient(here, np.flatnonzero(group == g), store.manifest["target"]), names).cpu().numpy()
                         for g in tqdm(range(len(groups)), desc="group gradients", delay=5)])
        np.save(store.path / "group_gradients.tmp.npy", rows)
        os.replace(store.path / "group_gradients.tmp.npy", path)
    return torch.from_numpy(np.load(path)).to(here.device)


def gradex_step(args, store, which, sketch, distance):
    """The earlier system's step: random labels, logistic regression of C = 1e-4 without an offset, P w rescaled to a distance."""
    flips = 2.0 * (np.random.default_rng([args.seed, 9, len(which)]).random(len(which)) < 0.7) - 1
    w = logistic(store.read(which), np.zeros(len(which)), 1e-4, flips)
    step = sketch.lift(torch.tensor(w, dtype=torch.float32, device=sketch.device))
    size = math.sqrt(sum(float(s.double().square().sum()) for s in step.values()))
    return {n: s * (distance / max(size, 1e-30)) for n, s in step.items()}


# ------------------------------------------------------------------------------------------------ truth


def records_of(store, problems):
    """The records behind the rows of a store, in its order: [dict]."""
    m, found = store.manifest, []
    args = argparse.Namespace(mount_dir=None)
    for path in m["data"]["paths"]:
        found += [record for _, record in raw_records(path, m["data"]["split"], args, problems)]
    numbers = m["numbers"] if m["numbers"] is not None else range(store.n)
    if not problems and len(found) <= max(numbers, default=0):
        problems.append(f"{store.path}: {', '.join(m['data']['paths'])} changed since the rows were collected")
    return [] if problems else [found[i] for i in numbers]


def write_records(path, records, evaluation):
    """A .jsonl that the trainers take: training records, and a few others as their evaluation part."""
    aside = pathlib.Path(f"{path}.tmp")
    with open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:
        for split, part in (("train", records), ("eval", evaluation)):
            for record in part:
                file.write(json.dumps({**record, "split": split}, ensure_ascii=False) + "\n")
    os.replace(aside, path)


def truth(args):
    """Fine-tune on subsets with the family's trainer (started, not imported), then measure the target rows. Finished runs are not repeated."""
    problems = []
    check_args(args, problems)
    train, target = open_stores([args.grads, args.target_grads], problems)
    check_together(train, target, problems)
    group, groups = grouping(train, args.groups, problems)
    chosen = read_subsets(args.subsets, len(groups), None, problems) if args.subsets else []
    chosen = [list(subset) for subset in dict.fromkeys(map(tuple, chosen))][: args.limit]  # drawn twice is run once; --repeat is another order
    for flag in ("--data", "--model_init", "--training_run_name", "--mount_dir", "--seed", "--overwrite", "--resume"):
        if hit := next((word for word in args.train_flags if word.startswith(flag)), None):
            problems.append(f"{hit} behind --: truth sets it itself")
    if not any(re.match(r"--(max_steps|num_epochs)", word) for word in args.train_flags):
        problems.append("behind --: give the trainer's flags, --max_steps or --num_epochs at least")
    script = common.HERE / ("seq2seq.py" if train.manifest["family"] == "seq2seq" else "sft_causal.py")
    if not script.is_file():
        problems.append(f"{script}: not found; truth needs the trainer beside this script")
    records, evaluation = records_of(train, problems), records_of(target, problems)[:2]
    work, out = pathlib.Path(f"{args.out}.runs").resolve(), pathlib.Path(args.out)
    settings = {"grads": train.manifest["data"]["digest"], "model": train.manifest["model"]["digest"], "target": target.manifest["data"]["digest"],
                "flags": args.train_flags, "groups": len(groups), "seed": args.seed}
    if (work / "settings.json").is_file() and json.loads((work / "settings.json").read_text()) != json.loads(json.dumps(settings)):
        problems.append(f"{work} holds runs with other data, model or flags: choose another --out, or delete it")
    if problems:
        common.fail(problems)
    (work / "data").mkdir(parents=True, exist_ok=True)
    common.write_json(work / "settings.json", settings)
    with attention_kernel(args):
        here = of_store(train, args)
        target_rows = of_rows(target, here)
    del here.model, here.tracked
    runs = [("all", list(range(len(groups))), 0)] * args.train_all + [(str(r), s, r) for s in chosen for r in range(args.repeat)]
    base = group_means(target.loss[None], target, target.names)[0]

    def name_of(subset, repeat):
        return f"subset-{common.derive_seed(subset, repeat) % 10**10}" if len(subset) < len(groups) or repeat else "all"

    def fine_tune(run):
        """Start the trainer on the run's records: -> (run, folder or None, its last lines)."""
        _, subset, repeat = run
        name = name_of(subset, repeat)
        if (work / f"{name}.npy").exists() and not (name == "all" and not (work / "models" / name / common.COMPLETE).exists()):
            return run, None, ""
        if (work / "models" / name / common.COMPLETE).exists():  # trained, but not yet measured when it was stopped
            return run, work / "models" / name, ""
        write_records(work / "data" / f"{name}.jsonl", [r for r, g in zip(records, group) if g in set(subset)], evaluation)
        m = train.manifest
        lengths = ["--max_source_length", m["max_source_length"], "--max_target_length", m["max_length"]] if m["family"] == "seq2seq" else [
            "--max_length", m["max_length"], "--n_generate", 0, *(["--raw_prompt"] if m["raw_prompt"] or not m["chat"] else [])]
        lora = [] if not m["lora"] else ["--lora_rank", m["lora"]["rank"]] + (["--lora_alpha", m["lora"]["alpha"]] if m["lora"]["alpha"] else []) + (
            ["--lora_targets", *m["lora"]["targets"]] if m["lora"]["targets"] else [])
        flags = ["--model_init_path", here.source, "--data_name", work / "data" / f"{name}.jsonl", "--mount_dir", work, "--training_run_name", name,
                 "--seed", args.seed + repeat, "--save_steps", 0, "--eval_steps", 10**9, "--save_total_limit", 1, "--precision", m["precision"], *lengths, *lora]
        flags += ["--quantize", m["quantize"]] if m["quantize"] else []
        given = {word.split("=")[0] for word in args.train_flags if word.startswith("--")}
        pairs = [list(part) for part in split_flags(map(str, flags)) if part[0] not in given]
        command = [*shlex.split(args.launcher), str(script), *itertools.chain(*pairs), *args.train_flags]
        threads = {} if "OMP_NUM_THREADS" in os.environ or torch.cuda.is_available() else {
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // args.parallel))}
        hidden = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
        env = {**{k: v for k, v in os.environ.items() if k not in hidden}, **threads, "TOKENIZERS_PARALLELISM": "false"}
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        if result.returncode:
            return run, None, f"{shlex.join(command)} ended with exit code {result.returncode}:\n{result.stdout[-1500:]}"
        return run, work / "models" / name, ""

    def table():
        rows = [("base", None, base)]
        for run, subset, repeat in runs:
            path = work / f"{name_of(subset, repeat)}.npy"
            if path.exists():
                rows.append((run, subset, group_means(np.load(path)[None], target, target.names)[0]))
        write_table(out, target.names, rows)

    with concurrent.futures.ThreadPoolExecutor(args.parallel) as pool:
        waiting = [pool.submit(fine_tune, run) for run in runs]
        for future in tqdm(concurrent.futures.as_completed(waiting), total=len(runs), desc="fine-tuning", delay=5):
            (_, subset, repeat), folder, wrong = future.result()
            if wrong:
                for other in waiting:
                    other.cancel()
                common.fail(f"a fine-tune failed; finished ones are kept, the same command goes on. {wrong}")
            if folder is None:
                continue
            losses = measure(folder, here, target_rows, args)
            np.save(work / "measured.tmp.npy", losses)
            os.replace(work / "measured.tmp.npy", work / f"{name_of(subset, repeat)}.npy")
            if name_of(subset, repeat) != "all":
                shutil.rmtree(folder)
            table()
    table()
    log.info(f"{out}: {len(runs)} true runs" + (f"; the anchor is {work / 'models' / 'all'}" if args.train_all else ""))


def split_flags(words):
    """[--a, 1, --b] -> [[--a, 1], [--b]]."""
    parts = []
    for word in words:
        if word.startswith("--"):
            parts.append([])
        parts[-1].append(word)
    return parts


def measure(folder, here, rows, args):
    """(n,) losses of the rows under a trained model."""
    own = copy.copy(here.args)
    own.model_init_path, own.model_init_name, own.lora_rank, own.lora_alpha, own.lora_targets, own.quantize, own.revision = str(folder), None, 0, None, None, None, None
    source, config, _ = common.open_model_folder(own, problems := [])
    if problems:
        common.fail(problems)
    with attention_kernel(args):
        model = open_model(own, source, config, here.device, here.args.precision)
        return outputs_of(model, rows, np.arange(len(rows.tokens)), own, here.ids, here.device)[:, 0]


# ------------------------------------------------------------------------------------------------ compare


def ranks(values):
    """Ranks with ties averaged."""
    values = np.asarray(values)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def pearson(a, b):
    """nan where one side is constant."""
    a, b = np.asarray(a) - np.mean(a), np.asarray(b) - np.mean(b)
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size > 1e-30 else math.nan


def agreement(estimate, true, base):
    """How (subsets, groups) estimates fit the truth. pearson, spearman: across subsets, mean over groups; of_mean: of the mean over groups;
    pooled_pearson: all changes together; relative_error: mean of |estimate - true| / true; r2: of the changes from base (groups,)."""
    columns = range(true.shape[1])
    error, change = estimate - true, true - base
    with np.errstate(invalid="ignore"):
        per_group = [np.array([f(estimate[:, g], true[:, g]) for g in columns]) for f in (pearson, lambda a, b: pearson(ranks(a), ranks(b)))]
        return {"pearson": float(np.nanmean(per_group[0])) if np.isfinite(per_group[0]).any() else math.nan,
                "spearman": float(np.nanmean(per_group[1])) if np.isfinite(per_group[1]).any() else math.nan,
                "pearson_of_mean": pearson(estimate.mean(1), true.mean(1)), "spearman_of_mean": pearson(ranks(estimate.mean(1)), ranks(true.mean(1))),
                "pooled_pearson": pearson((estimate - base).ravel(), change.ravel()), "relative_error": float(np.mean(np.abs(error) / np.abs(true))),
                "r2": 1 - float((error**2).sum() / max((change**2).sum(), 1e-30))}


def compare(args):
    """Estimate against truth, beside the noise ceiling and the trivial baselines; intervals by resampling subsets."""
    problems = []
    check_args(args, problems)
    (columns, estimates), (true_columns, truths) = read_table(args.estimate, problems), read_table(args.truth, problems)
    if not problems and columns != true_columns:
        problems.append(f"{args.estimate} and {args.truth}: other target groups")
    if not problems and not any(run == "base" for run, _, _ in truths):
        problems.append(f"{args.truth}: no row of the losses before fine-tuning (run: base)")
    if problems:
        common.fail(problems)
    of = {subset: values for run, subset, values in estimates if run == "estimate"}
    repeats = collections.defaultdict(list)
    for run, subset, values in truths:
        if run not in ("base", "all"):
            repeats[subset].append(values)
    shared = [subset for subset in repeats if subset in of]
    if len(shared) < 3:
        common.fail(f"{args.estimate} and {args.truth} have {len(shared)} subsets in common; expected 3 or more")
    groups = np.isfinite(np.array([of[s] for s in shared])[:, :-1]).all(0)
    base = next(values for run, _, values in truths if run == "base")[:-1][groups]
    estimate = np.array([of[s] for s in shared])[:, :-1][:, groups]
    true = np.array([np.mean(repeats[s], 0) for s in shared])[:, :-1][:, groups]
    rng, n = np.random.default_rng(0), len(shared)
    draws = [rng.integers(n, size=n) for _ in range(args.bootstrap)]

    def with_interval(estimate, true):
        found, samples = agreement(estimate, true, base), [agreement(estimate[d], true[d], base) for d in draws]
        with np.errstate(all="ignore"):
            return {k: {"value": v, "interval": [float(x) for x in np.nanpercentile([s[k] for s in samples], [2.5, 97.5])]} for k, v in found.items()}
    table = {"estimate": with_interval(estimate, true)}
    twice = [s for s in shared if len(repeats[s]) > 1]
    if len(twice) > 2:
        first, second = (np.array([repeats[s][i] for s in twice])[:, :-1][:, groups] for i in (0, 1))
        table["ceiling: the same subset, data in another order"] = {k: {"value": v} for k, v in agreement(first, second, base).items()}
    table["baseline: the loss before fine-tuning"] = {k: {"value": v} for k, v in agreement(np.tile(base, (n, 1)), true, base).items()}
    table["baseline: the mean of the true runs"] = {k: {"value": v} for k, v in agreement(np.tile(true.mean(0), (n, 1)), true, base).items()}
    result = {"subsets": n, "groups": [c for c, ok in zip(columns[:-1], groups) if ok], "true_runs": sum(len(repeats[s]) for s in shared), **table}
    out = pathlib.Path(args.out or f"{args.estimate}.compare.json")
    common.write_json(out, without_nan(result))
    names = ("pearson", "spearman", "spearman_of_mean", "pooled_pearson", "relative_error", "r2")
    print(f"{n} subsets, {result['true_runs']} true runs, {true.shape[1]} target groups; brackets: 95 % by resampling subsets")
    print(" " * 48 + "".join(f"{name:>24}" for name in names))
    for title, row in table.items():
        cells = [f"{row[k]['value']:.3f}" + (" [{:.2f}, {:.2f}]".format(*row[k]["interval"]) if "interval" in row[k] else "") for k in names]
        print(f"{title:<48}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
    scatter(out.with_suffix(".png"), estimate - base, true - base, result["groups"], table["estimate"])
    return result


def without_nan(found):
    """The same, with None for what is not defined: strict JSON has no NaN."""
    if isinstance(found, dict):
        return {k: without_nan(v) for k, v in found.items()}
    if isinstance(found, list):
        return [without_nan(v) for v in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def figure_of(size):
    """A matplotlib figure, or None without matplotlib (said once)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no picture: package 'matplotlib' is not installed")
        return None
    return Figure(figsize=size, layout="constrained")


def scatter(path, estimate, true, names, numbers):
    if (figure := figure_of((5.5, 5))) is None:
        return
    axes = figure.add_subplot(xlabel="true change of the loss [nats per token]", ylabel="estimated change [nats per token]",
                              title=f"Spearman {numbers['spearman']['value']:.2f}, R2 {numbers['r2']['value']:.2f}")
    for g, name in enumerate(names[:12]):
        axes.plot(true[:, g], estimate[:, g], ".", label=name)
    ends = [min(true.min(), estimate.min()), max(true.max(), estimate.max())]
    axes.plot(ends, ends, color="grey", linewidth=0.8)
    if len(names) <= 12:
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    log.info(f"{path}: the scatter")


# ------------------------------------------------------------------------------------------------ select


def influences(train, target, method, penalty=1e-2):
    """(train rows, target groups) fp32 scores. less: cosine of a row with each target row, mean over the group (Xia et al. 2024); dot: product with
    the group's mean gradient; trak: the same under (Z'Z / n + penalty I)^-1, in units of the rows' mean square (Park et al. 2023)."""
    usable = target.n_tokens > 0
    rows = target.read()
    if method == "less":
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    means = np.stack([rows[usable & (target.group == g)].mean(0) for g in range(len(target.names)) if (usable & (target.group == g)).any()])
    if method == "trak":
        gram, n = np.zeros((train.dim, train.dim)), train.n
        for a in range(0, n, 4096):
            block = train.read(slice(a, a + 4096)).astype(np.float64)
            gram += block.T @ block / n
        means = np.linalg.solve(gram + penalty * np.trace(gram) / train.dim * np.eye(train.dim), means.T.astype(np.float64)).T.astype(np.float32)
    scores = np.empty((train.n, len(means)), np.float32)
    for a in range(0, train.n, 4096):
        block = train.read(slice(a, a + 4096))
        if method == "less":
            block = block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-30)
        scores[a: a + 4096] = block @ means.T
    scores[train.n_tokens == 0] = -math.inf
    return scores


def forward_selection(sums, weights, target, step_size, sign, order, n_most):
    """Groups in the order in which they are taken, and the estimated mean loss after each, for training by epochs (for a fixed number of steps,
    the one best group alone would always seem best, as the estimate is linear in the mean gradient). best: the one that lowers it most, while one does;
    index: in turn, kept unless the loss rises (the earlier system)."""
    usable = target.n_tokens > 0
    mean = target.read(np.flatnonzero(usable)).mean(0) if target.manifest["target"] == "loss" else None
    start, taken, trail = float(target.loss[usable].mean()), [], []

    def loss_of(subset):
        direction = sign * step_size * sums[subset].sum(0) / weights.sum()  # epochs: every group brings its own steps along
        if mean is not None:
            return start + float(mean @ direction)
        return float(to_losses(target, changes(target, direction[None], target.dim))[0][usable].mean())
    best, left = math.inf, [g for g in range(len(weights)) if weights[g] > 0]
    while left and len(taken) < n_most:
        found = {g: loss_of([*taken, g]) for g in (left if order == "best" else left[:1])}
        g = min(found, key=found.get)
        if found[g] <= best:
            taken.append(g)
            best = found[g]
            trail.append(best)
        elif order == "best":
            break
        left.remove(g)
    return taken, trail


def select(args):
    """Score rows or groups; write the chosen records as a data file, scores beside it, and the heat map of group on group."""
    problems = []
    check_args(args, problems)
    stores = open_stores([*args.grads, *args.target_grads], problems)
    trains, targets = stores[: len(args.grads)], stores[len(args.grads):]
    for train, target in zip(trains, targets):
        check_together(train, target, problems)
        check_together(trains[0], train, problems, same_model=False, same_data=True)
        check_together(targets[0], target, problems, same_model=False, same_data=True)
    train, target = trains[0], targets[0]
    group, groups = grouping(train, args.groups, problems)
    if args.method == "forward" and train.manifest["target"] != target.manifest["target"]:
        problems.append("--method forward needs both stores with the same --target")
    columns, estimates = read_table(args.estimates, problems) if args.estimates else ([], [])
    out = pathlib.Path(args.out)
    if out.suffix != ".jsonl" or out.exists():
        problems.append(f"--out {out}: expected the name of a new .jsonl file")
    records, evaluation = records_of(train, problems), records_of(target, problems)
    if problems:
        common.fail(problems)
    n_things = train.n if args.method in ("less", "dot", "trak") else len(groups)
    n_top = min(n_things, int(args.top) if args.top > 1 else max(1, round(args.top * n_things)))
    sign = sign_of(train) * sign_of(target)  # rows that point the same way help, whatever their output
    weights = args.lr_weights or [1.0] * len(trains)
    if args.method in ("less", "dot", "trak"):
        scores = sign * sum(w * influences(a, b, args.method) for w, a, b in zip(weights, trains, targets))
        best = scores.max(1)
        kept = np.sort(np.argsort(-best, kind="stable")[:n_top])
        np.savez(out.with_suffix(".scores.npz"), scores=scores, best=best, groups=[n for g, n in enumerate(target.names) if (target.group == g).any()])
        log.info(f"{args.method}: {n_top} of {train.n} rows, scores {best[kept].min():.4g} to {best.max():.4g}; the others up to "
                 f"{np.delete(best, kept).max() if n_top < train.n else math.nan:.4g}")
    else:
        if args.method == "forward":
            sums, of_groups, _ = group_sums(train, group, len(groups))
            taken, trail = forward_selection(sums, of_groups, target, args.step_size, sign_of(train), args.order, n_top)
            scores = [(groups[g], loss) for g, loss in zip(taken, trail)]
        else:
            found = [(set(subset), values[-1]) for run, subset, values in estimates if run == "estimate"]
            mean_of = {g: np.mean([loss for subset, loss in found if g in subset]) for g in range(len(groups)) if any(g in s for s, _ in found)}
            if not mean_of:
                common.fail(f"{args.estimates}: no estimated subset in it")
            ordered = sorted(mean_of, key=mean_of.get)
            taken, scores = ordered[:n_top], [(groups[g], float(mean_of[g])) for g in ordered]
        common.write_json(out.with_suffix(".scores.json"), {"method": args.method, "taken": [groups[g] for g in taken],
                                                            "estimated_loss": [{"group": name, "loss": loss} for name, loss in scores]})
        kept = np.flatnonzero(np.isin(group, taken))
        log.info(f"{args.method}: {len(taken)} of {len(groups)} groups: {', '.join(groups[g] for g in taken)}")
    write_records(out, [records[i] for i in kept], evaluation)
    heat_map(out, train, target, group, groups, sign)
    log.info(f"{out}: {len(kept)} training records, {len(evaluation)} evaluation records; sft_causal.py and seq2seq.py take it as --data_name {out}")


def heat_map(out, train, target, group, groups, sign):
    """<out>.influence.csv and .png: cosine of each training group's mean gradient with each target group's."""
    sums, _, _ = group_sums(train, group, len(groups))
    of_target, _, _ = group_sums(target, target.group, len(target.names))
    unit = [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30) for rows in (sums, of_target)]
    cosine = sign * unit[0] @ unit[1].T
    with open(out.with_suffix(".influence.csv"), "w", newline="") as file:
        csv.writer(file).writerows([["training group", *target.names], *([name, *(f"{c:.5f}" for c in row)] for name, row in zip(groups, cosine))])
    if (figure := figure_of((2 + 0.35 * min(60, len(target.names)), 2 + 0.25 * min(100, len(groups))))) is None:
        return
    axes = figure.add_subplot(title="cosine of mean gradients", xlabel="target group", ylabel="training group")
    limit = max(1e-9, float(np.abs(cosine).max()))
    figure.colorbar(axes.imshow(cosine, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto"), ax=axes)
    if len(groups) <= 100 and len(target.names) <= 60:
        axes.set_yticks(range(len(groups)), groups, fontsize=7)
        axes.set_xticks(range(len(target.names)), target.names, fontsize=7, rotation=90)
    figure.savefig(out.with_suffix(".influence.png"), dpi=100)


# ------------------------------------------------------------------------------------------------ verify


def verify(args):
    """A1-A5: gradients against autograd one by one, the sum, the adjoint, the sketch's quality, derivatives. Exit code 1 where one fails."""
    args.sketch, args.dim, args.table_mb, args.run, args.target, args.compat, args.chunk_mb = "sjlt", 4096, 2048, 0, "loss", None, None
    args.precision = "fp32" if args.precision == "auto" else args.precision
    source, config, tokenizer, rows, _, precision = prepare(args)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = False
    device, ids, failed = common.setup_distributed(), pad_and_start(tokenizer, config), []

    def report(name, text, value, bound, is_ok=None):
        ok = value <= bound if is_ok is None else is_ok
        failed.extend([] if ok else [name])
        log.info(f"{name}  {'ok    ' if ok else 'FAILED'} {text}: {value:.3g} (bound {bound:.3g})")

    which = np.flatnonzero(rows.n_targets)[: args.n]
    with attention_kernel(args):
        model = open_model(args, source, config, device, precision)
        start_norm = math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))
        gradients = gradients_of(model, args)
        tracked, sketch = gradients.tracked, gradients.sketch
        gradients.sketch = recorder = Recorder(tracked, gradients)
        worst, total = 0.0, {n: torch.zeros(p.numel(), device=device) for n, p in tracked.items()}
        some = which[np.linspace(0, len(which) - 1, min(8, len(which))).astype(int)].tolist()
        gradients.rows(collate(rows, some, *ids, device))
        found = recorder.found
        for b, i in enumerate(some):  # alone, unpadded
            for p in tracked.values():
                p.requires_grad_(True)
            batch = collate(rows, [i], *ids, device)
            wanted = torch.autograd.grad(reduce_rows(token_losses(model, batch), batch["is_target"], "loss").sum(), list(tracked.values()), allow_unused=True)
            model.requires_grad_(False)
            whole = math.sqrt(sum(float(g.double().square().sum()) for g in wanted if g is not None))
            for (n, p), g in zip(tracked.items(), wanted):
                g = torch.zeros(p.numel(), device=device) if g is None else g.float().flatten()
                worst = max(worst, float((found[n][b] - g).norm() if n in found else g.norm()) / max(float(g.norm()), 1e-3 * whole))
                total[n] += g
        report("A1", f"per-example gradients of {len(some)} padded rows against each alone, worst parameter", worst, 1e-5)
        seen = sum(numel(p) for n, p in tracked.items() if n in gradients.seen)
        report("A1", "share of the tracked parameters that no gradient reached", 1 - seen / sum(map(numel, tracked.values())), 0.0)
        error = max(float((found[n].sum(0) - t).norm()) / max(float(t.norm()), 1e-3 * max(float(x.norm()) for x in total.values()))
                    for n, t in total.items() if n in found)
        report("A2", "sum over rows against autograd of the sum", error, 1e-5)
        gradients.sketch = sketch
        # the adjoint
        whole = torch.cat([found[n].view(len(some), -1) if n in found else torch.zeros(len(some), numel(p), device=device) for n, p in tracked.items()], 1)
        rotated = sketch.start(len(some))
        for n in tracked:
            if n in found:
                sketch.add(rotated, n, 0, found[n])
        w = torch.randn(sketch.dim, generator=torch.Generator().manual_seed(0)).to(device)
        left, right = sketch.finish(rotated).double() @ w.double(), whole.double() @ flat(sketch.lift(w), tracked).double()
        report("A3", "<P g, w> against <g, P^T w>", float((left - right).norm() / right.norm()), 1e-5)
        # quality, on as many whole gradients as fit into 2 GB
        few = which[: max(9, min(len(which), 2**29 // sketch.n_coordinates))]
        gradients.sketch = recorder
        exact = []
        for batch in make_batches(rows, few, args.batch_tokens, config.vocab_size):
            gradients.rows(collate(rows, batch, *ids, device))
            exact.append(torch.cat([recorder.found.get(n, torch.zeros(len(batch), numel(p), device=device)) for n, p in tracked.items()], 1))
        exact = torch.cat(exact)
        gradients.sketch = sketch
        norms = exact.double().norm(dim=1)
        gram, upper = (exact @ exact.T).double(), torch.triu_indices(len(exact), len(exact), 1, device=device)
        cosine = (gram / norms[:, None] / norms)[upper[0], upper[1]]
        quality = {}
        for kind, dim, seeds in (("sjlt", 4096, 4), ("sjlt", 512, 4), ("dense", 512, 4)):
            numbers = []
            for seed in range(seeds):
                tried = Sketch(kind, dim, args.seed + seed, sketch.sizes, device)
                out = tried.start(len(exact))
                for n, first in tried.starts.items():
                    tried.add(out, n, 0, exact[:, first: first + tried.sizes[n]])
                small = tried.finish(out).double()
                guess = ((small @ small.T) / norms[:, None] / norms)[upper[0], upper[1]]
                numbers.append((float((guess - cosine).square().mean().sqrt()), float((small.norm(dim=1) / norms - 1).abs().mean()),
                                pearson(guess.cpu().numpy(), cosine.cpu().numpy())))
            quality[kind, dim] = np.mean(numbers, 0)
        pairs, spread = len(cosine), math.sqrt(1 + float(cosine.square().mean()))  # an ideal sketch's variance is (1 + cosine^2) / d
        rms, norm_error, _ = quality["sjlt", 4096]
        behind = quality["dense", 512][2] - quality["sjlt", 512][2]
        if pairs >= 2000:
            report("A4", f"rms error of {pairs} inner products at d = 4096, in units of an ideal sketch's", rms * 64 / spread, 1.15)
            report("A4", "mean relative error of the norm at d = 4096, in units of an ideal sketch's", norm_error * math.sqrt(8192) / 0.8, 1.25)
            report("A4", f"Pearson of inner products at d = 512 below the dense matrix's ({quality['dense', 512][2]:.3f}), mean of 4 seeds", behind, 0.02)
        else:
            log.warning(f"A4 is not judged: {len(exact)} rows have {pairs} pairs, it wants 2000 (-n 64 on a model whose gradients fit into 2 GB): "
                        f"rms {rms * 64 / spread:.3f}, norm {norm_error * math.sqrt(8192) / 0.8:.3f}, Pearson {behind:.3f} below dense")
        gradients.close()
        # derivatives
        here = types.SimpleNamespace(model=model, rows=rows, tracked=tracked, ids=ids, config=config, args=args, device=device)
        generator = torch.Generator().manual_seed(1)
        step = {n: torch.randn(p.shape, generator=generator).to(device) for n, p in tracked.items()}
        slope = directional(here, "loss", step, np.array(some))
        wanted = (whole.double() @ flat(step, tracked).double()).cpu().numpy()
        report("A5", "Jacobian-vector product against g . Delta", float(np.linalg.norm(slope - wanted) / np.linalg.norm(wanted)), 1e-4)
        start = {n: p.detach().clone() for n, p in tracked.items()}
        size, errors, scales = math.sqrt(sum(float(s.double().square().sum()) for s in step.values())), [], [0.002, 0.004, 0.008]
        f0 = outputs_of(model, rows, np.array(some), args, ids, device)[:, 0]
        for scale in scales:
            factor = scale * start_norm / size
            move(here, start, ((n, factor * s) for n, s in step.items()))
            errors.append(np.abs(outputs_of(model, rows, np.array(some), args, ids, device)[:, 0] - f0 - factor * slope).mean())
        move(here, start, ((n, 0 * s) for n, s in step.items()))
        rise = float(np.polyfit(np.log(scales), np.log(errors), 1)[0])
        report("A5", "slope of the first-order error in the distance, less 2", abs(rise - 2), 0.2)
    log.info(f"{source}: {'all checks pass' if not failed else 'FAILED: ' + ', '.join(sorted(set(failed)))}")
    return 1 if failed else 0


# ------------------------------------------------------------------------------------------------ demo


def demo(args):
    """Pretrain a tiny model on a few tasks, then ask which of 16 small training groups help which task, by estimates and by fine-tuning."""
    problems = []
    check_args(args, problems)
    if not (common.HERE / "sft_causal.py").is_file():
        problems.append("the demo trains with sft_causal.py: copy it, models/tiny-llama and data/ beside this script")
    if problems:
        common.fail(problems)
    out, started = pathlib.Path(args.out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)

    def step(title, done, *words):
        log.info(f"\n{title}\n  python project_grads.py {shlex.join(map(str, words))}")
        if not (out / done).exists():
            COMMANDS[words[0]](parse_args(list(map(str, words))))
    base = out / "models" / "base"
    data = str(common.HERE / "data" / "skills.jsonl")
    if not (base / common.COMPLETE).exists():
        command = [sys.executable, str(common.HERE / "sft_causal.py"), *DEMO_BASE.split(), "--data_name", str(common.HERE / "data" / "skills_base.jsonl"),
                   "--mount_dir", str(out)]
        log.info(f"a base model that knows the tasks a little:\n  {shlex.join(['python', 'sft_causal.py', *command[2:]])}")
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        if result.returncode:
            common.fail(f"sft_causal.py ended with exit code {result.returncode}:\n{result.stdout[-1500:]}")
    collect_flags = ["--data_name", data, "--groups", "group", "--raw_prompt", "--mount_dir", out]
    sides = [("train", "train"), ("target", "eval")]
    for name, split in sides:
        step(f"gradients of the {name} rows at the base model", f"{name}/COMPLETE", "collect", "--model_init_path", base, "--split", split,
             "--out", out / name, *collect_flags)
    step("half of the groups, drawn at random", "subsets.txt", "subsets", "--grads", out / "train", "--number_of_subsets", max(200, args.n_true), "--out", out / "subsets.txt")
    step(f"the truth: fine-tune on everything (the anchor), and on {args.n_true} subsets", "truth.done", "truth", "--grads", out / "train", "--target_grads",
         out / "target", "--subsets", out / "subsets.txt", "--limit", args.n_true, "--train_all", "--parallel", args.parallel, "--out", out / "truth.csv",
         "--", *DEMO_TUNE.split())
    anchor = out / "truth.csv.runs" / "models" / "all"
    for name, split in sides:
        step(f"gradients of the {name} rows at the anchor", f"anchor_{name}/COMPLETE", "collect", "--model_init_path", anchor, "--base_model", base,
             "--split", split, "--out", out / f"anchor_{name}", *collect_flags)
    flags = ["--grads", out / "train", "--target_grads", out / "target", "--subsets", out / "subsets.txt"]
    anchored = ["--anchor_grads", out / "anchor_train", out / "anchor_target"]
    for name, title, more in (("theta0", "estimates at the base model, one number fitted to 3 true runs", ["--calibrate", f"{out / 'truth.csv'}:3"]),
                              ("anchor", "estimates around the anchor, the same number fitted", [*anchored, "--calibrate", f"{out / 'truth.csv'}:3"]),
                              ("lift", "the same, weights moved and measured", [*anchored, "--calibrate", f"{out / 'truth.csv'}:3", "--eval", "lift",
                                                                                "--limit", args.n_true])):
        step(title, f"{name}.csv", "estimate", *flags, *more, "--out", out / f"{name}.csv")
        compare(parse_args(["compare", str(out / f"{name}.csv"), str(out / "truth.csv")]))
    step("which groups to keep for the tasks: greedy on the estimated loss", "chosen.jsonl", "select", "--grads", out / "train", "--target_grads", out / "target",
         "--method", "forward", "--step_size", json.loads((out / "theta0.csv.json").read_text())["step_size"], "--top", 8, "--out", out / "chosen.jsonl")
    log.info(DEMO_READING.format(seconds=time.monotonic() - started, out=out, n=args.n_true))


DEMO_BASE = ("--model_init_name tiny-llama --raw_prompt --training_run_name base --max_steps 90 --train_batch_size 64 --learning_rate 0.004 "
             "--warmup_steps 50 --eval_steps 90 --n_generate 0 --save_steps 0 --logging_steps 100")
DEMO_TUNE = "--max_steps 40 --train_batch_size 32 --learning_rate 0.0001 --warmup_steps 0 --lr_scheduler_type constant --logging_steps 20"
DEMO_READING = """
What this shows ({seconds:.0f} s, everything under {out}): 16 training groups, four tasks with three clean groups and one with wrong answers each. A
point of a scatter is one task's loss after fine-tuning on one subset of 8 groups, estimated (up) and true (across). "theta0" needs the gradients at
the base model and 3 true runs for the size of a step, which are not judged; "anchor" and "lift" also one fine-tune on everything. The {n} fine-tunes
took minutes, the estimates of 200 subsets a second. Spearman 1 would rank the subsets of every task as fine-tuning does; relative_error and R2 say
whether the sizes are right too, and the baselines what knowing nothing is worth. chosen.influence.csv and .png show which group helps which task:
groups with wrong answers are the cold rows of their task."""

# ------------------------------------------------------------------------------------------------ main

COMMANDS = {"collect": collect, "linerr": linerr, "subsets": subsets, "estimate": estimate, "truth": truth, "compare": compare, "select": select,
            "verify": verify, "demo": demo}


def main(args):
    common.start_log()
    common.adopt_launcher()
    found = COMMANDS[args.command](args)
    if dist.is_initialized():
        dist.barrier()
    return found if isinstance(found, int) else 0


if __name__ == "__main__":
    common.leave(main(parse_args()))
