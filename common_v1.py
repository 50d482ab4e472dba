"""common_v1.py: the plumbing that all rawtune scripts share, and nothing that a reader came for.

Processes, command line, run folders, data files, loading models, checkpoints. The loops, losses, collators, metrics
and `deepspeed.initialize` are in the scripts; nothing here calls back into them. Units: a "step" is an optimizer step.
Every function that talks to other processes says "collective": all ranks must call it.
"""

import argparse
import atexit
import bisect
import contextlib
import ctypes
import datetime
import difflib
import fcntl
import functools
import gzip
import hashlib
import importlib
import itertools
import json
import logging
import logging.handlers
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
import types
import unittest.mock
import warnings
import zlib

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers.integrations.deepspeed import set_hf_deepspeed_config
from transformers.pytorch_utils import Conv1D

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or importing DeepSpeed begins with a warning
import deepspeed
import deepspeed.ops

HERE = pathlib.Path(__file__).resolve().parent
COMPLETE = "COMPLETE"  # marker file, written last: a folder without it is unfinished
EXIT_SAVED = 75  # stopped by a signal or --max_hours after saving; the same command continues (EX_TEMPFAIL)

# ------------------------------------------------------------------------------------------------ processes


def adopt_launcher():
    """Give srun's variables the names that torchrun, accelerate and deepspeed use; alone, be rank 0 of 1."""
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in env:
        env["RANK"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env.get("SLURM_LOCALID", "0")
        env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_WORLD_SIZE"] = env.get("SLURM_STEP_TASKS_PER_NODE", env["WORLD_SIZE"]).split("(")[0].split(",")[0]
        # rank 0 is on the first host of the step: n[3-5,8] -> n3, a,b -> a
        first = re.match(r"([^\[,]+)(?:\[(\d+))?", env.get("SLURM_STEP_NODELIST", "127.0.0.1"))
        env.setdefault("MASTER_ADDR", first[1] + (first[2] or ""))
        env.setdefault("MASTER_PORT", str(20000 + derive_seed(env.get("SLURM_JOB_ID"), env.get("SLURM_STEP_ID")) % 20000))
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        with socket.socket() as free:  # a free port, so that two runs on one machine do not meet
            free.bind(("127.0.0.1", 0))
            env["MASTER_PORT"] = str(free.getsockname()[1])


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size():
    """Processes of this job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size())))


def setup_distributed():
    """Collective. Start the process group (nccl on GPUs, gloo without); returns this process's device."""
    # Never build DeepSpeed's shared-memory op: it needs a compiler, and a build that is killed leaves a lock file on
    # which every later run waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    on_gpu = torch.cuda.is_available()
    # srun may show each task only its own GPU, hence the remainder
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size()))
    if not on_gpu and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc gives every large tensor back to the system, and a tenth to a third of a step went into page faults on taking it again
        libc.mallopt(ctypes.c_int(-4), ctypes.c_int(0))  # M_MMAP_MAX: no block is mapped by itself
        libc.mallopt(ctypes.c_int(-1), ctypes.c_int(2**31 - 1))  # M_TRIM_THRESHOLD: what is freed stays
    if not dist.is_initialized():
        # rank 0 alone writes, syncs and converts checkpoints: DeepSpeed's 10 minutes would end an 11 B run there
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", verbose=False, timeout=datetime.timedelta(hours=2))
    idle = torch.cuda.device_count() - local_world_size() if on_gpu else 0
    if idle > 0 and world_size() == 1:
        log.info(f"using GPU {device.index}; {idle} more are idle. All of them: deepspeed --num_gpus {idle + 1} "
                 + shlex.join(sys.argv))
    return device


def leave(code):
    """Close the process group, where there is one, and end the process with this exit code.

    Without the interpreter's own taking down: a thread of gloo's (or a daemon's) that drops its last tensor then asks for a
    lock that is gone, and a process whose work is done ends with an abort (PyTorch issue 190489; closing the group does not
    prevent it).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def all_reduce_sum(values, device):
    """Collective. Element-wise sum of a list of numbers over all processes, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def broadcast(thing, device):
    """Collective. Rank 0's (picklable) object, on every rank."""
    box = [thing]
    dist.broadcast_object_list(box, src=0, device=device)
    return box[0]


def derive_seed(*keys):
    """A 63-bit seed from any keys: the same on every machine, unrelated for different keys."""
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=8).digest(), "little") >> 1


class Stopper:
    """Why this process should save and leave: SIGTERM or SIGUSR1, --max_hours, or a launcher that is gone.

    A SIGTERM to the single-node `deepspeed` command ends the command but not the ranks; they see it here.
    """

    def __init__(self, max_hours):
        self.end = time.monotonic() + max_hours * 3600 if max_hours else math.inf
        self.signal = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)
        self.launchers = self._launchers()

    def _remember(self, number, frame):
        self.signal = signal.Signals(number).name

    @staticmethod
    def _launchers():
        """Process ids of the torchrun / deepspeed / accelerate commands above this process (Linux)."""
        found, pid = [], os.getppid()
        with contextlib.suppress(OSError, IndexError, ValueError):  # no /proc: no launcher known, signals still work
            while pid > 1:
                command = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                if not any(re.search(r"deepspeed|torchrun|torch\.distributed|accelerate", word) for word in command[:4]):
                    break
                found.append(pid)
                pid = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return found

    def reason(self):
        if self.signal:
            return self.signal
        if time.monotonic() > self.end:
            return "--max_hours"
        if self.launchers and self._launchers() != self.launchers:
            return "the launcher is gone"
        return None


# ------------------------------------------------------------------------------------------------ messages


class _ThroughTqdm(logging.Handler):
    """Print above a progress bar instead of through it; only rank 0 prints."""

    def emit(self, record):
        if rank() == 0:
            tqdm.write(self.format(record), file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout)
            sys.stdout.flush()


class _Format(logging.Formatter):
    def format(self, record):
        return ("WARNING " if record.levelno >= logging.WARNING else "") + record.getMessage()


log = logging.getLogger("rawtune")


def start_log():
    """Lines of `log` go to the screen now, and to <run folder>/log.txt once `start_run` has made it."""
    log.setLevel(logging.INFO)
    log.propagate = False
    for old in list(log.handlers):
        log.removeHandler(old)
        old.close()
    later = logging.handlers.MemoryHandler(10000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    for handler in (_ThroughTqdm(), later):
        handler.setFormatter(_Format())
        log.addHandler(handler)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of DeepSpeed, every step
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def fail(problems, only_here=False):
    """Print what the user has to mend and leave with exit code 2.

    Every rank finds the same problems, so rank 0 speaks first; the others give the launcher 20 s to end them and then
    speak too (only their node may miss a file). only_here: something that only this rank knows, say at once.
    """
    problems = [problems] if isinstance(problems, str) else list(problems)
    if rank() and not only_here:
        time.sleep(float(os.environ.get("RAWTUNE_FAIL_WAIT", 20)))
    where = f"rank {rank()}: " if only_here and world_size() > 1 else ""
    shown = problems[:40] + ([f"... and {len(problems) - 40} more problems"] if len(problems) > 40 else [])
    tqdm.write("\n".join(f"ERROR {where}{problem}" for problem in shown), file=sys.stderr)
    sys.stderr.flush()
    raise SystemExit(2)


# ------------------------------------------------------------------------------------------------ command line


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; unknown flags are refused with the nearest match; @file presets."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, fromfile_prefix_chars="@", formatter_class=_HelpFormatter, **options)

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

    def parse_args(self, argv=None, namespace=None):
        argv = list(sys.argv[1:] if argv is None else argv)
        for i, word in enumerate(argv):  # @presets/x is also found beside the script
            if word.startswith("@") and not os.path.exists(word[1:]) and (HERE / word[1:]).exists():
                argv[i] = "@" + str(HERE / word[1:])
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            commands = [sub for action in self._actions if isinstance(action, argparse._SubParsersAction) for sub in action.choices.values()]
            flags = sorted({flag for parser in (self, *commands) for flag in parser._option_string_actions if flag.startswith("--")})
            lines = []
            for word in unknown:
                word_flag = word.split("=")[0]
                near = [flag for flag in flags if len(word_flag) > 3 and flag.startswith(word_flag)] or (
                    difflib.get_close_matches(word_flag, flags, 1, 0.5) if word.startswith("-") else [])
                lines.append(f"unknown argument {word!r}" + (f": did you mean {near[0]}?" if near else ""))
            self.error("; ".join(lines))
        return args

    def error(self, message):
        fail([f"{message} (all flags: python {self.prog} -h)"])


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=120)

    def _get_help_string(self, action):
        off = action.default is None or action.default is False or action.default is argparse.SUPPRESS
        return action.help if off or action.required else super()._get_help_string(action)


PRECISIONS = {  # every accepted spelling -> the four that exist; None: refused by check_shared_args
    "fp32": "fp32", "32": "fp32", "32-true": "fp32", "bf16": "bf16", "bf16-true": "bf16", "bf16-mixed": "bf16-mixed",
    "fp16": "fp16", "16-true": "fp16", "16-mixed": None, "fp64": "fp64", "64": "fp64", "64-true": "fp64",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-mixed": torch.float32, "fp16": torch.float16,
          "fp64": torch.float64}


def add_shared_args(parser):
    """The flags that every trainer has, in fixed groups, so that they cannot drift apart."""
    group = parser.add_argument_group("model")
    group.add_argument("--model_init_name", help="folder under models/ [name]")
    group.add_argument("--model_init_path", help="folder or hub id; wins over --model_init_name [path]")
    group.add_argument("--revision", help="branch, tag or commit of a hub id [name]")
    group.add_argument("--trust_remote_code", action="store_true", help="run model code that a hub id brings along")

    group = parser.add_argument_group("data")
    group.add_argument("--data_name", "--data", nargs="+", default=["data"], metavar="NAME[:AMOUNT]",
                       help="data sets under data/ (.json, .jsonl, .gz of both), or paths; NAME:0.05 = that fraction, "
                       "NAME:500 = that many examples, drawn anew each epoch")
    group.add_argument("--eval_fraction", type=float, default=0.0,
                       help="hold out this share of the training prompts for evaluation [0-1], 0 = off")
    group.add_argument("--mount_dir", help="where models/ and data/ are [path], default: ./mount if it holds one of "
                       "them, else .")
    group.add_argument("--cache_dir", help="where tokenised data is kept [path], default: data/.cache under --mount_dir")

    group = parser.add_argument_group("batch and steps")
    group.add_argument("--train_batch_size", type=int, default=16,
                       help="examples in one forward step, all processes together [examples]")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1,
                       help="forward steps per optimizer step; effective batch = train_batch_size x this [count]")
    group.add_argument("--max_steps", type=int, help="training length [optimizer steps], default: --num_epochs")
    group.add_argument("--num_epochs", type=float, default=4, help="training length where --max_steps is not given")
    group.add_argument("--max_hours", type=float, default=0.0,
                       help=f"save and leave with exit code {EXIT_SAVED} after this time [hours], 0 = off")
    group.add_argument("--seed", type=int, default=0, help="of data order, dropout, sampling and new weights [integer]")

    group = parser.add_argument_group("optimiser")
    group.add_argument("--learning_rate", type=float, default=5e-5, help="peak, reached after warm-up [no unit]")
    group.add_argument("--lr_scheduler_type", default="linear",
                       choices=["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"],
                       help="shape after warm-up; constant has no warm-up; inverse_sqrt: peak x sqrt(warm-up / step)")
    group.add_argument("--warmup_steps", type=int,
                       help="linear warm-up [optimizer steps], default: min(2000, max_steps / 10), 0 = off")
    group.add_argument("--weight_decay", type=float, default=0.0, help="AdamW's, on matrices only [no unit], 0 = off")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="clip the gradient to this norm, 0 = off")

    group = parser.add_argument_group("precision and ZeRO")
    group.add_argument("--precision", default="auto", help="fp32 | bf16 (bf16 weights, fp32 masters) | bf16-mixed "
                       "(fp32 weights, autocast) | fp64 | fp16 (not for T5); auto = bf16 where the GPU has it, else fp32")
    group.add_argument("--ds_config", default="auto", help="DeepSpeed JSON: a name in ds_configs/ or a path; auto = the "
                       "lowest stage whose estimate fits")
    group.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, ~30 %% slower")
    group.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler on CPU); not with ZeRO-3")
    group.add_argument("--estimate", action="store_true", help="print the memory table and leave; loads no weights")
    group.add_argument("--peak_tflops", type=float, help="of one GPU, for mfu [TFLOP/s], default: measured by a matrix product")
    group.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher passes it

    group = parser.add_argument_group("adapters and quantised base")
    group.add_argument("--lora_rank", type=int, default=0, help="train LoRA matrices of this rank, freeze the rest [columns], 0 = off")
    group.add_argument("--lora_alpha", type=float, help="LoRA's update counts alpha / rank [no unit], default: 2 x --lora_rank")
    group.add_argument("--lora_dropout", type=float, help="on LoRA's input [0-1], default 0 = off")
    group.add_argument("--lora_targets", nargs="+", metavar="NAME", help="linear layers that get LoRA, by the end of their names, or "
                       "all-linear (but the head); default auto: attention's, by family")
    group.add_argument("--train_adapter", action="store_true", help="train bottleneck adapters (Houlsby et al. 2019), freeze the rest")
    group.add_argument("--reduction_factor", type=int, help="hidden size / width of a bottleneck [no unit], default 128")
    group.add_argument("--adapter_dropout", type=float, help="on the bottleneck's input [0-1], default 0.1, 0 = off")
    group.add_argument("--no_mh_adapter", action="store_true", help="no bottleneck after attention")
    group.add_argument("--no_output_adapter", action="store_true", help="no bottleneck after the feed-forward network")
    group.add_argument("--quantize", choices=["nf4", "int8", "none"], help="keep the frozen linear layers in 4 or 8 bits per weight; "
                       "default none, or what the adapter was trained with")
    group.add_argument("--freeze", nargs="+", metavar="PATTERN", help="do not train parameters in whose names a regular expression is found")
    group.add_argument("--merge_lora", metavar="OUT", help="write the model with its LoRA adapter merged in as a plain folder [path], and leave")

    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval_steps", type=int, help="evaluation interval [optimizer steps], default: once per epoch; "
                       "also before training and at the end")
    group.add_argument("--eval_batch_size", type=int, default=32,
                       help="rows in one evaluation batch of one process [examples]; a batch is never split, so results "
                       "do not depend on the number of processes")
    group.add_argument("--metric_for_best", help="keep and export the checkpoint that is best by this metric [name]")
    group.add_argument("--early_stopping_patience", type=int, default=0,
                       help="stop after this many evaluations without a better --metric_for_best [count], 0 = off")
    group.add_argument("--no_train", action="store_true", help="evaluate only")

    group = parser.add_argument_group("output")
    group.add_argument("--training_run_name", help="run folder under models/ [name], default: <model>_<data>_<seed>")
    group.add_argument("--save_steps", type=int, help="checkpoint interval [optimizer steps], default: once per epoch; "
                       "0 = only at the end")
    group.add_argument("--save_total_limit", type=int, default=2, help="newest checkpoints kept, besides the best [count]")
    group.add_argument("--resume", action="store_true", help="continue a finished run, for instance with more --max_steps "
                       "(an unfinished run continues by itself)")
    group.add_argument("--overwrite", action="store_true", help="start anew; the old run folder becomes <run>.old-N")
    group.add_argument("--force", nargs="+", default=[], choices=["fp16", "changed_flags"],
                       help="fp16: train T5 in fp16; changed_flags: with --resume, continue under other flags")
    group.add_argument("--logging_steps", type=int, default=10, help="interval of metric rows [optimizer steps]")
    group.add_argument("--report_to", choices=["none", "wandb", "tensorboard"], default="none", help="besides metrics.jsonl")
    group.add_argument("--wandb_project", default="rawtune", help="[name]")
    group.add_argument("--wandb_entity", help="[name]")
    group.add_argument("--debug", action="store_true", help="10 steps, 100 evaluation rows")


def check_shared_args(args, problems):
    """Append every problem of the shared flags to `problems`; no side effects."""
    for name, low in dict(train_batch_size=1, gradient_accumulation_steps=1, eval_batch_size=1, logging_steps=1, max_steps=1,
                          warmup_steps=0, eval_steps=1, save_steps=0, save_total_limit=1, early_stopping_patience=0,
                          max_hours=0, weight_decay=0, max_grad_norm=0, seed=0, peak_tflops=0).items():
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            problems.append(f"--{name} {value}: expected {low} or more")
    if not 0 < args.learning_rate < math.inf:
        problems.append(f"--learning_rate {args.learning_rate}: expected a positive number")
    if not 0 < args.num_epochs < math.inf:
        problems.append(f"--num_epochs {args.num_epochs}: expected a positive number")
    if not 0 <= args.eval_fraction < 1:
        problems.append(f"--eval_fraction {args.eval_fraction}: expected a share between 0 and 1")
    if args.train_batch_size % world_size() and not args.no_train:
        problems.append(f"--train_batch_size {args.train_batch_size} counts the examples of all processes together and "
                        f"cannot be divided by {world_size()} processes; nearest: "
                        f"{max(1, round(args.train_batch_size / world_size())) * world_size()}")
    if args.precision not in ("auto", *PRECISIONS):
        problems.append(f"--precision {args.precision}: expected auto, {', '.join(PRECISIONS)}")
    elif args.precision != "auto" and PRECISIONS[args.precision] is None:
        problems.append(f"--precision {args.precision}: fp16 autocast is not offered (T5 overflows in it); use bf16-mixed")
    if not args.model_init_name and not args.model_init_path:
        problems.append("no model: give --model_init_name (a folder under models/) or --model_init_path (a folder or hub id)")
    if args.training_run_name and (args.training_run_name.startswith("/") or ".." in args.training_run_name.split("/")):
        problems.append(f"--training_run_name {args.training_run_name}: expected a name under models/, not a path elsewhere")
    if args.resume and args.overwrite:
        problems.append("--resume and --overwrite exclude each other")
    _check_adapter_args(args, problems)
    if args.report_to != "none":
        try:
            importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(args.report_to, args.report_to))
        except ImportError:
            problems.append(f"--report_to {args.report_to}: package {args.report_to!r} is not installed")
    for name in ("revision", "wandb_project", "wandb_entity", "mount_dir", "cache_dir", "training_run_name"):
        if getattr(args, name) == "":
            problems.append(f"--{name}: empty")


def _check_adapter_args(args, problems):
    """What can be said without the model; the rest is said by `adapter_plan` and `count_trained`."""
    for needed, names in (("lora_rank", ["lora_alpha", "lora_dropout", "lora_targets"]),
                          ("train_adapter", ["reduction_factor", "adapter_dropout", "no_mh_adapter", "no_output_adapter"])):
        problems += [f"--{name} has no effect without --{needed}" for name in names
                     if getattr(args, name) not in (None, False) and not getattr(args, needed)]
    if args.lora_rank < 0 or args.lora_alpha is not None and not 0 < args.lora_alpha < math.inf:
        problems.append(f"--lora_rank {args.lora_rank} --lora_alpha {args.lora_alpha}: expected positive numbers")
    if args.reduction_factor is not None and args.reduction_factor < 1:
        problems.append(f"--reduction_factor {args.reduction_factor}: expected 1 or more")
    for name in ("lora_dropout", "adapter_dropout"):
        if not 0 <= (getattr(args, name) or 0) < 1:
            problems.append(f"--{name} {getattr(args, name)}: expected a share below 1")
    if args.lora_rank and args.train_adapter:
        problems.append("--lora_rank and --train_adapter exclude each other")
    if args.no_mh_adapter and args.no_output_adapter:
        problems.append("--no_mh_adapter and --no_output_adapter leave no adapter to train")
    if args.lora_targets and len(args.lora_targets) > 1 and {"auto", "all-linear"} & set(args.lora_targets):
        problems.append(f"--lora_targets {' '.join(args.lora_targets)}: auto and all-linear stand alone")
    if args.quantize in ("nf4", "int8") and args.compile:
        problems.append("--compile does not go with --quantize")
    for pattern in args.freeze or ():
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"--freeze {pattern!r}: not a regular expression ({error})")
    if args.freeze and (args.no_train or args.merge_lora):
        problems.append("--freeze has no effect without training")
    if args.merge_lora is not None:
        if not args.merge_lora or os.path.exists(args.merge_lora):
            problems.append(f"--merge_lora {args.merge_lora!r}: exists; choose a new folder")
        if world_size() > 1:
            problems.append("--merge_lora runs in one process")


def resolve_precision(args):
    if args.precision != "auto":
        return PRECISIONS.get(args.precision) or "fp32"  # what does not exist was reported by check_shared_args
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


# ------------------------------------------------------------------------------------------------ places


def mount_dir(args):
    if args.mount_dir:
        return pathlib.Path(args.mount_dir)
    has_mount = os.path.isdir("mount/models") or os.path.isdir("mount/data")
    return pathlib.Path("mount" if has_mount else ".")


def find_input(args, kind, name, endings, problems):
    """The path of models/<name> or data/<name><ending>: under the mount, else here, else beside the script."""
    hits = {}
    for root in (mount_dir(args), pathlib.Path(".")):
        for ending in endings:
            path = root / kind / (name + ending)
            if path.exists():
                hits.setdefault(path.resolve(), path)
    if not hits:  # the demo's model and data lie beside the script
        hits = {path: path for path in (HERE / kind / (name + ending) for ending in endings) if path.exists()}
    if len(hits) > 1:
        problems.append(f"{kind}/{name} is ambiguous: {' and '.join(map(str, hits.values()))}; rename one")
    if not hits:
        folder = mount_dir(args) / kind
        there = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
        near = difflib.get_close_matches(name, [t.split(".")[0] for t in there], 1)
        problems.append(f"{folder / name}{endings[0]}: not found" + (f"; did you mean {near[0]}?" if near else "")
                        + f" ({folder} has: {', '.join(there[:12]) or 'nothing'})")
        return None
    return next(iter(hits.values()))


def write_json(path, thing):
    """Write aside, then rename: a reader never sees half a file."""
    aside = pathlib.Path(f"{path}.tmp")
    aside.write_text(json.dumps(thing, indent=2, ensure_ascii=False, default=str) + "\n", "utf-8", "backslashreplace")  # half surrogates
    os.replace(aside, path)


def move_aside(path):
    """Rename to <path>.old-N; nothing a user made is overwritten."""
    n = next(n for n in range(1, 10**6) if not os.path.exists(f"{path}.old-{n}"))
    os.rename(path, f"{path}.old-{n}")
    return f"{path}.old-{n}"


# ------------------------------------------------------------------------------------------------ run folder

# Flags that may change between stop and resume, because they do not change the mathematics. The batch split may
# change as long as the effective batch stays (see `start_of_run`).
FREE_FLAGS = {"local_rank", "mount_dir", "cache_dir", "max_hours", "eval_batch_size", "save_steps", "save_total_limit", "resume",
              "overwrite", "force", "logging_steps", "report_to", "wandb_project", "wandb_entity", "estimate", "peak_tflops",
              "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "compile", "ds_config", "eval_steps",
              "training_run_name", "precision", "merge_lora"}  # precision: compared resolved, in `identity`
LENGTH_FLAGS = {"max_steps", "num_epochs"}  # --resume alone may change these


def start_of_run(args, run_dir, identity, free_flags, problems):
    """What is in the run folder: None (start at 0) or the path of the checkpoint to continue from. Reads only.

    identity: what must not change besides flags (data hashes, effective batch, precision); free_flags: flags of the
    script that may change, besides FREE_FLAGS.
    """
    if run_dir.exists() and not run_dir.is_dir():
        problems.append(f"{run_dir} is a file: choose another --training_run_name")
        return None
    if not run_dir.exists() or args.overwrite or not any(run_dir.iterdir()):
        return None
    record = run_dir / "args.json"
    if not record.exists():
        problems.append(f"{run_dir} exists but is no run folder (no args.json): choose another --training_run_name, "
                        "or --overwrite (renames it)")
        return None
    before = json.loads(record.read_text())
    now = {**vars(args), **identity}
    changed = {key: (before.get(key), value) for key, value in json.loads(json.dumps(now, default=str)).items()
               if key not in FREE_FLAGS | free_flags and before.get(key) != value and (key in before or value)}  # or: a flag that did not exist
    text = "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in changed.items())
    if (run_dir / COMPLETE).exists() and not args.resume:
        problems.append(f"{run_dir} is a finished run: --resume continues it (with more --max_steps), --overwrite starts "
                        "anew (the old folder is renamed), or choose another --training_run_name")
    elif changed and not args.resume:
        problems.append(f"{run_dir} is an unfinished run with other flags ({text}): give the old flags to continue, "
                        "--overwrite to start anew (the old folder is renamed), or another --training_run_name")
    elif set(changed) - LENGTH_FLAGS and "changed_flags" not in args.force:
        problems.append(f"--resume: flags that change the mathematics differ ({text}); --force changed_flags continues anyway")
    elif changed:
        log.warning(f"continuing {run_dir} with other flags: {text}")
    return latest_checkpoint(run_dir)


def plan_run(args, source, identity, free_flags, state, n_params, n_trained, precision, problems, quantized=(0, 0)):
    """(run folder, checkpoint to continue from or None, state, name and content of the DeepSpeed configuration). Reads only.

    identity, free_flags: see `start_of_run`; state: of a run that starts, else the checkpoint's is returned; n_params,
    n_trained: 0 where the model is unknown, then there is no configuration (None); quantized: how many of n_params, and bytes.
    """
    model_name = (args.model_init_path or args.model_init_name or "model").strip("/").replace("/", "_")
    data_name = "+".join(parse_data_spec(spec, [])[0] for spec in args.data_name).replace("/", "_")
    sweep = f"_{os.environ.get('WANDB_RUN_ID')}" if os.environ.get("WANDB_SWEEP_ID") else ""  # an agent's runs would all have one name
    run_name = args.training_run_name or f"{model_name}_{data_name}_{'eval' if args.no_train else args.seed}{sweep}"
    if args.early_stopping_patience and not args.metric_for_best:
        problems.append("--early_stopping_patience needs --metric_for_best")
    run_dir, resume_from, ds_name, ds_config = mount_dir(args) / "models" / run_name, None, args.ds_config, None
    if not args.no_train:
        resume_from = start_of_run(args, run_dir, identity, free_flags, problems)
        if args.overwrite and source and run_dir.resolve() == pathlib.Path(source).resolve():
            problems.append(f"--overwrite would rename {run_dir}, the model to start from: choose another --training_run_name")
    if resume_from:
        state = json.loads((resume_from / "state.json").read_text())
    if n_params:
        if ds_name == "auto":
            ds_name = state.get("ds_config") or choose_stage(n_params - quantized[0], precision, problems, n_trained, quantized[1])
        ds_config = read_ds_config(args, ds_name, precision, problems)
        if precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            problems.append(f"--precision {args.precision}: DeepSpeed has no fp16 on this machine's {'GPU' if torch.cuda.is_available() else 'CPU'}; "
                            "use bf16 or fp32")
        if ds_config and resume_from and ds_config["zero_optimization"]["stage"] != state["zero_stage"]:
            problems.append(f"--ds_config {args.ds_config}: {resume_from} was written at ZeRO stage {state['zero_stage']} and continues there")
    return run_dir, resume_from, state, ds_name, ds_config


def begin_run(args, job, script):
    """Collective. Start the processes and the run folder that a script's `prepare` has planned; -> (device, ranks' agreed
    resume_from, state, precision, ds_name, ds_config, universal: whether the checkpoint is of another number of ranks)."""
    device = setup_distributed()
    # what was decided from this machine's memory and disk is rank 0's word, or unlike nodes would wait for each other
    resume_from, state, precision, ds_name, ds_config = broadcast((job.resume_from, job.state, job.precision, job.ds_name, job.ds_config), device)
    if rank() == 0:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        if not args.no_train:
            start_run(args, job.run_dir, job.identity, script)
            write_json(job.run_dir / "ds_config.json", ds_config)
    universal = bool(resume_from) and state["world_size"] != world_size() and state["zero_stage"] > 0
    if universal:
        ds_config["checkpoint"] = {"load_universal": True}
        if rank() == 0:
            universal_checkpoint(resume_from)
    dist.barrier()
    return device, resume_from, state, precision, ds_name, ds_config, universal


def start_run(args, run_dir, identity, script):
    """Rank 0: make the run folder, write args.json, env.json and code/; `log` goes to log.txt from here."""
    if args.overwrite and run_dir.exists() and any(run_dir.iterdir()):
        log.info(f"{run_dir} was renamed to {move_aside(run_dir)}")
    run_dir.mkdir(parents=True, exist_ok=True)
    for leftover in run_dir.glob("*.tmp"):  # of a killed process; no finished file has this ending
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    (run_dir / COMPLETE).unlink(missing_ok=True)
    write_json(run_dir / "args.json", {**vars(args), **identity})
    git = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True) if shutil.which("git") else None
    env = {"command": shlex.join([sys.executable, *sys.argv]), "time": datetime.datetime.now().isoformat(timespec="seconds"),
           "host": socket.gethostname(), "python": sys.version.split()[0], "torch": torch.__version__,
           "transformers": transformers.__version__, "deepspeed": deepspeed.__version__,
           "rawtune_commit": git.stdout.strip() if git and git.returncode == 0 else None, "world_size": world_size(),
           "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}
    write_json(run_dir / "env.json", env)
    (run_dir / "code").mkdir(exist_ok=True)
    for source in (script, __file__):
        shutil.copyfile(source, run_dir / "code" / os.path.basename(source))
    for handler in [h for h in log.handlers if isinstance(h, logging.handlers.MemoryHandler)]:
        to_file = logging.FileHandler(run_dir / "log.txt")
        to_file.setFormatter(_Format())
        handler.setTarget(to_file)
        handler.flush()
        log.removeHandler(handler)
        log.addHandler(to_file)


def note_evaluation(args, state, step, metrics, directions):
    """Keep in `state` when was evaluated and what was best. directions: {metric: "high" or "low" is better}."""
    state["last_eval"] = step
    if args.metric_for_best and step:
        value, metric = metrics[args.metric_for_best], args.metric_for_best.split("/")[-1]
        sign = 1 if directions[metric] == "high" else -1
        if state["best"] is None or sign * value > sign * state["best"]:
            state.update(best=value, best_step=step, evals_since_best=0)
        else:
            state["evals_since_best"] += 1


def rewind_metrics(run_dir, step, last_eval):
    """Rank 0: rows past the checkpoint that we continue from, and an evaluation that it does not know of, move to
    metrics.replaced.jsonl."""
    path = run_dir / "metrics.jsonl"
    if path.exists():
        rows = [line for line in path.read_text().splitlines() if line.endswith("}")]  # a kill may leave half a line
        parsed = [json.loads(row) for row in rows]
        is_kept = [row["step"] < step or row["step"] == step and (row["split"] == "train" or step == last_eval) for row in parsed]
        kept = [row for row, keep in zip(rows, is_kept) if keep]
        with open(run_dir / "metrics.replaced.jsonl", "a") as replaced:
            replaced.writelines(row + "\n" for row, keep in zip(rows, is_kept) if not keep)
        aside = run_dir / "metrics.jsonl.tmp"
        aside.write_text("".join(row + "\n" for row in kept))
        os.replace(aside, path)


def open_tracker(args, run_dir):
    """Rank 0: the wandb run or tensorboard writer of --report_to, or None."""
    if args.report_to == "wandb":
        import wandb
        own_id = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]  # the agent of a sweep has given one already
        return wandb.init(project=args.wandb_project, entity=args.wandb_entity, name=run_dir.name, dir=run_dir, config=vars(args),
                          id=os.environ.get("WANDB_RUN_ID", own_id), resume="allow")
    if args.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(run_dir)
    return None


def log_metrics(run_dir, row, tracker=None):
    """Rank 0: append one JSON line to metrics.jsonl and print one short line. row: step, epoch, split, metrics."""
    row = {**row, "time": round(time.time(), 3)}
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k not in ("step", "epoch", "time")}
    shown = {k: v for k, v in numbers.items() if "_for_" not in k}  # of hundreds of tasks
    log.info(f"step {row['step']:>6} {row['split']:<5} " + "  ".join(f"{k.split('/', 1)[-1]} {v:.4g}" for k, v in shown.items()))
    if hasattr(tracker, "log"):
        tracker.log({f"{row['split']}/{k.split('/', 1)[-1]}": v for k, v in numbers.items()}, step=row["step"])
    elif tracker is not None:
        for k, v in numbers.items():
            tracker.add_scalar(f"{row['split']}/{k.split('/', 1)[-1]}", v, row["step"])
        tracker.flush()


def plot_curves(run_dir):
    """Rank 0: curves.png from metrics.jsonl, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no curves.png: package 'matplotlib' is not installed")
        return
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = [n for n in dict.fromkeys(k for row in rows for k in row) if n not in ("step", "epoch", "split", "time") and "_for_" not in n
             and sum(n in row for row in rows) > 1]
    figure = Figure(figsize=(12, 2.6 * math.ceil(len(names) / 3) or 1), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(math.ceil(len(names) / 3), 3, i + 1, title=name, xlabel="optimizer step")
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points), marker="." if len(points) < 40 else None)
        axes.grid(alpha=0.3)
    figure.savefig(run_dir / "curves.png", dpi=80)


# ------------------------------------------------------------------------------------------------ data files

DATA_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
ROLES = {"prompter": "user", "human": "user", "gpt": "assistant", "bot": "assistant"}  # other names of the two


def parse_data_spec(spec, problems):
    """'a' -> ('a', None); 'a:0.05' -> ('a', 0.05), a fraction; 'a:500' -> ('a', 500), examples per epoch."""
    name, colon, amount = spec.rpartition(":")
    if not colon or not re.fullmatch(r"[-+\d.eE]+", amount):
        return spec, None
    try:
        value = int(amount) if re.fullmatch(r"[-+]?\d+", amount) else float(amount)
    except ValueError:
        return spec, None
    if not (value > 0 and (isinstance(value, int) or value <= 1)):
        problems.append(f"--data {spec}: expected a fraction like :0.05 (above 0, at most 1.0) or a count like :500")
    return name, value


def reads_tasks(args):
    """Whether the data are task folders; not every script has them."""
    return getattr(args, "data_format", "records") != "records"


def is_held_out(args, salt, key):
    """Whether --eval_fraction takes a training example out: by its prompt, so that duplicates stay together. salt: the script's own."""
    return derive_seed(salt, key) % 10**6 < args.eval_fraction * 10**6


def find_data(args, name, problems):
    """Files of one data set: {split or None: path}; None = the file says the splits itself. Of task folders those of `find_tasks`."""
    if reads_tasks(args):
        return find_tasks(args, problems)
    is_path = name.endswith(DATA_ENDINGS)
    path = pathlib.Path(name) if is_path else find_input(args, "data", name, DATA_ENDINGS, problems)
    if path is None or not path.is_file():
        if path is not None:
            problems.append(f"{path}: not a file; --data takes a name under data/ or the path of a {', '.join(DATA_ENDINGS)} file")
        return {}
    stem, ending = re.fullmatch(r"(.*?)(\.jsonl?(?:\.gz)?)", path.name).groups()
    beside = {split: path.with_name(f"{stem}.{split}{ending}") for split in ("eval", "test")}
    return {None: path, **{split: p for split, p in beside.items() if "jsonl" in ending and p.is_file()}}


def read_records(path, problems, default_split="train"):
    """Yield (where, split, record) from one file; what is malformed is appended to `problems` with its place.

    .jsonl is streamed, a line at a time; .json is read whole: an object of lists, or a bare list like Alpaca's. Lines and
    bare lists belong to default_split, where a record has no "split" key of its own.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            if ".jsonl" in path.name:
                for n, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    where = f"{path}, line {n}"
                    try:
                        record = json.loads(line)
                    except ValueError as error:
                        problems.append(f"{where}: not JSON ({error}); expected one object per line")
                        continue
                    if isinstance(record, dict):
                        yield where, record.get("split", default_split), record
                    else:
                        problems.append(f"{where}: a {type(record).__name__}, expected an object")
                return
            whole = json.load(file)
    except (OSError, EOFError, zlib.error) as error:
        problems.append(f"{path}: cannot be read ({error})")
        return
    except UnicodeDecodeError as error:
        problems.append(f"{path}: not UTF-8 ({error}); save it as UTF-8")
        return
    except (ValueError, RecursionError) as error:
        problems.append(f"{path}: not JSON ({error}); one object per line belongs into a file named .jsonl")
        return
    bare = isinstance(whole, list)
    if not bare and not (isinstance(whole, dict) and all(isinstance(part, list) for part in whole.values())):
        problems.append(f"{path}: expected an object of lists, {{\"train\": [...], \"eval\": [...]}}, or a list of records")
        return
    for split, records in {"": whole}.items() if bare else whole.items():
        for i, record in enumerate(records):
            where = f"{path}, {split}[{i}]"
            if isinstance(record, dict):
                yield where, record.get("split", default_split) if bare else split, record
            else:
                problems.append(f"{where}: a {type(record).__name__}, expected an object")


def clean_messages(messages):
    """Messages with the three usual roles and text as content. Raises ValueError, which names what is wrong."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list that is not empty")
    found = []
    for i, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            content = "".join(part["text"] for part in content)
        role = {**ROLES, "developer": "system"}.get(role, role) if isinstance(role, str) else role
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise ValueError(f"messages[{i}]: expected a 'role' (system, user, assistant) and a 'content' of text")
        found.append({"role": role, "content": content})
    return found


def file_sha256(path):
    """Of a file that did not change since the last call, without reading it again: a large base takes minutes."""
    stat = os.stat(path)
    return _file_sha256(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _file_sha256(path, *_):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_fingerprint(tokenizer):
    """Changes whenever the ids of any text could change."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256((type(tokenizer).__name__ + text).encode()).hexdigest()


def special_tokens(tokenizer):
    """A pattern that matches each special token of the tokenizer; one that has none gets a pattern that matches nothing."""
    found = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | set(tokenizer.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or "(?!)")


def adds_bos(tokenizer):
    """Whether the tokenizer puts a begin token in front of a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


class Ragged:
    """Rows of token ids in a memory-mapped file: ragged[i] -> (n,) int32; .lengths -> (rows,) int64."""

    def __init__(self, prefix):
        self.offsets = np.fromfile(f"{prefix}.offsets", dtype=np.int64)
        empty = self.offsets[-1] == 0  # an empty file cannot be mapped
        self.values = np.empty(0, np.int32) if empty else np.memmap(f"{prefix}.ids", dtype=np.int32, mode="r")
        self.lengths = np.diff(self.offsets)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return self.values[self.offsets[i]: self.offsets[i + 1]]


class RaggedWriter:
    """Write rows of token ids, one after the other, in bounded memory."""

    def __init__(self, prefix, dtype=np.int32):
        self.ids, self.offsets, self.end, self.dtype = open(f"{prefix}.ids", "wb"), open(f"{prefix}.offsets", "wb"), 0, dtype
        self.offsets.write(np.int64(0).tobytes())

    def append(self, row):
        self.end += len(row)
        self.ids.write(np.asarray(row, dtype=self.dtype).tobytes())
        self.offsets.write(np.int64(self.end).tobytes())

    def close(self):
        self.ids.close()
        self.offsets.close()


def in_blocks(examples, size, unit):
    """Yield lists of up to `size` examples, to be tokenised together; with a progress bar on rank 0."""
    examples = iter(examples)
    with tqdm(desc="tokenising", unit=f" {unit}", delay=5, disable=rank() > 0 or None) as bar:
        while block := list(itertools.islice(examples, size)):
            yield block
            bar.update(len(block))


@contextlib.contextmanager
def cache_folder(root, key, problems):
    """Yield (folder, is_new) under a lock. A new folder is filled aside and renamed when the block ends without problems.

    The lock (flock) goes with its process, so a killed job blocks nobody; waiting says so and ends after an hour.
    """
    root.mkdir(parents=True, exist_ok=True)
    done, aside = root / key, root / f"{key}.{socket.gethostname()}.{os.getpid()}.tmp"
    with open(root / f"{key}.lock", "w") as lock:
        for second in range(3600):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if second % 60 == 10:
                    log.info(f"waiting for another process that tokenises the same data ({lock.name})")
                time.sleep(1)
        else:
            raise TimeoutError(f"{lock.name}: locked for an hour by another process; end it")
        if (done / COMPLETE).exists():
            yield done, False
            return
        for leftover in root.glob(f"{key}.*.tmp"):  # of killed processes: we hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir()
        try:
            n_before = len(problems)
            yield aside, True
            if len(problems) == n_before:
                (aside / COMPLETE).touch()
                if done.exists():
                    shutil.rmtree(done)  # unfinished: no marker
                os.rename(aside, done)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def token_cache(args, layout, files, tokenizer, settings):
    """(root, key) for `cache_folder`: the key changes with the layout's version, the files, the tokenizer and the settings."""
    parts = [layout, [(split, file_sha256(path)) for split, path in files.items()], tokenizer_fingerprint(tokenizer), *settings]
    root = pathlib.Path(args.cache_dir) if args.cache_dir else mount_dir(args) / "data" / ".cache"
    return root, hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def check_training_part(args, data, path, problems, expected='{"train": [...]} or JSON lines'):
    """Of one data set: there are training records, and as many as --data asks for."""
    n_train = data.counts["train"]
    if not n_train and not args.no_train:
        problems.append(f"{path}: no training records; expected {'a train_tasks.txt with tasks' if reads_tasks(args) else expected}")
    if data.amount is not None:
        take = data.amount if isinstance(data.amount, int) else round(data.amount * n_train)
        if not 1 <= take <= n_train:
            problems.append(f"--data {data.name}:{data.amount}: {take} of {n_train} training records; expected 1 to all of them")


def check_evaluation_parts(args, data_sets, what, problems, remedy='add an "eval" list (JSON lines: a "split" key, or <name>.eval.jsonl beside the file)'):
    """Of all data sets: one has evaluation records; those that are in the training data too are counted. what: "prompts"."""
    if len(data_sets) == len(args.data_name) and not any(d.counts["eval"] or (args.no_train and d.counts["test"]) for d in data_sets):
        problems.append(f"{', '.join(args.data_name)}: no evaluation records; {'write dev_tasks.txt' if reads_tasks(args) else remedy}, or hold some out with --eval_fraction 0.05")
    trained = np.concatenate([data.hashes["train"] for data in data_sets]) if data_sets else []
    for data in data_sets:
        for split in ("eval", "test"):
            n_seen = int(np.isin(data.hashes[split], trained).sum())
            if n_seen:
                log.warning(f"{data.name}: {n_seen} of {len(data.hashes[split])} {split} {what} occur in the training data")


# ------------------------------------------------------------------------------------------------ task folders (instructions)

# What a prompt shows before the input: definition, positive and negative examples, explanations. --tk_instruct draws one of the five for
# each instance in each epoch (Wang et al. 2022, https://arxiv.org/abs/2204.07705).
TK_ENCODINGS = [(True, 0, 0, False), (False, 2, 0, False), (True, 2, 0, False), (True, 2, 2, False), (True, 2, 0, True)]
TASK_LAYOUTS = {  # the prompt's key, what must be in it, the keys of examples
    "ni": ("Definition", (), ("Positive Examples", "Negative Examples")), "flan": ("Instruction Prompt", ("{task_input}", "{examplars}"), ("Examplars",))}
SHORTENED = ("prompts without all examples", "prompts without all input")
TASK_FLAGS = dict(task_dir=None, split_dir=None, max_num_instances_per_task=None, max_num_instances_per_eval_task=500, add_task_name=False,
                  no_task_definition=False, num_pos_examples=0, num_neg_examples=0, add_explanation=False, tk_instruct=False, num_shots=0)


def add_task_args(parser):
    group = parser.add_argument_group("task folders, in place of --data")
    group.add_argument("--data_format", choices=["records", "ni", "flan"], default="records",
                       help="ni: tasks as Super-NaturalInstructions has them; flan: tasks with a prompt of their own; records: --data")
    group.add_argument("--task_dir", help="with a file <task>.json for each task [path]")
    group.add_argument("--split_dir", help="with train_tasks.txt, dev_tasks.txt, test_tasks.txt [path], default: ../splits/default beside --task_dir")
    group.add_argument("--max_num_instances_per_task", type=int, help="of training, drawn by --seed [count], default: all")
    group.add_argument("--max_num_instances_per_eval_task", type=int, default=500,
                       help="of dev and test tasks, always the same ones; of a test task only the first 100 count, as published [count]")
    group.add_argument("--add_task_name", action="store_true", help="begin the prompt with the task's name")
    group.add_argument("--no_task_definition", action="store_true", help="leave the definition out of the prompt")
    group.add_argument("--num_pos_examples", type=int, default=0, help="positive examples in the prompt, as far as they fit [count]")
    group.add_argument("--num_neg_examples", type=int, default=0, help="negative examples in the prompt, as far as they fit [count]")
    group.add_argument("--add_explanation", action="store_true", help="examples with their explanations")
    group.add_argument("--tk_instruct", action="store_true", help="training draws one of Tk-Instruct's five prompts for each instance and epoch; "
                       "the flags above hold for evaluation")
    group.add_argument("--num_shots", type=int, default=0, help="examples in the prompt of --data_format flan, as far as they fit [count]")


def check_task_args(args, problems):
    given = [name for name, off in TASK_FLAGS.items() if getattr(args, name) != off]
    if args.data_format == "records":
        problems += [f"--{name} has no effect without --data_format ni or flan" for name in given]
        return
    of_ni = ("add_task_name", "no_task_definition", "num_pos_examples", "num_neg_examples", "add_explanation", "tk_instruct")
    problems += [f"--{name} has no effect with --data_format {args.data_format}" for name in given
                 if name in (("num_shots",) if args.data_format == "ni" else of_ni)]
    if args.add_explanation and not args.num_pos_examples and not args.num_neg_examples:
        problems.append("--add_explanation has no effect without examples: give --num_pos_examples")
    if args.data_name != [args.data_format]:
        problems.append(f"--data {' '.join(args.data_name)}: --data_format {args.data_format} reads --task_dir instead")
    for name, low in dict(max_num_instances_per_task=1, max_num_instances_per_eval_task=1, num_pos_examples=0, num_neg_examples=0, num_shots=0).items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            problems.append(f"--{name} {getattr(args, name)}: expected {low} or more")
    try:
        rouge_scorer()
    except ImportError as error:
        problems.append(f"--data_format {args.data_format} is scored with package 'rouge-score' ({error}): pip install rouge-score")


def task_settings(args):
    """What the examples of task folders depend on, for `token_cache`."""
    flags = [name for name in TASK_FLAGS if not name.endswith("_dir")]
    return [] if args.data_format == "records" else [args.data_format, args.seed, *(getattr(args, name) for name in flags)]


def find_tasks(args, problems, splits=("train", "eval", "test")):
    """{"train <task>": file, ...} of the tasks that the lists in --split_dir name; dev_tasks.txt is the evaluation."""
    if not args.task_dir or not os.path.isdir(args.task_dir):
        problems.append(f"--task_dir {args.task_dir}: expected a folder of <task>.json files")
        return {}
    tasks, files, split_of = pathlib.Path(args.task_dir), {}, {}
    folder = pathlib.Path(args.split_dir) if args.split_dir else tasks.parent / "splits" / "default"
    lists = {split: folder / f"{name}_tasks.txt" for split, name in (("train", "train"), ("eval", "dev"), ("test", "test"))}
    if not any(path.is_file() for path in lists.values()):
        problems.append(f"--split_dir {folder}: expected train_tasks.txt, dev_tasks.txt or test_tasks.txt, with the name of a task per line")
    for split, path in lists.items():
        try:
            names = path.read_text(encoding="utf-8-sig").split("\n") if path.is_file() and split in splits else ()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{path}: cannot be read ({error}); expected the name of a task per line, in UTF-8")
            continue
        for n, task in enumerate(map(str.strip, names), 1):
            if task and task in split_of:
                problems.append(f"{path}, line {n}: task {task} is in {split_of[task]} already")
            elif task and not (tasks / f"{task}.json").is_file():
                problems.append(f"{path}, line {n}: no file {tasks / task}.json")
            elif task:
                split_of[task], files[f"{split} {task}"] = split, tasks / f"{task}.json"
    return files


def load_task(args, path, name, problems):
    """A task file -> its object, with "Task", texts in place of lists where one text is used, and references as lists; None where it cannot
    be used. What is wrong goes to `problems`."""
    def texts(value, keys):  # a list of objects with these texts
        return isinstance(value, list) and all(isinstance(v, dict) and all(isinstance(v.get(key), str) for key in keys) for v in value)

    def wrong(text):
        problems.append(f"{path}: {text}")

    try:
        task = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        return wrong(f"cannot be read ({error}); expected a JSON object in UTF-8")
    if not isinstance(task, dict) or not texts(task.get("Instances"), ["input"]) or not task["Instances"]:
        return wrong("'Instances' is empty" if isinstance(task, dict) and task.get("Instances") == [] else
                     "no list 'Instances' of objects with 'input' and 'output'")
    if re.search("[\ud800-\udfff]", json.dumps(task, ensure_ascii=False)):
        return wrong("holds half a character (a lone \\ud800-\\udfff escape); remove it or write the file as UTF-8")
    prompt, places, keys = TASK_LAYOUTS[args.data_format]
    text = task[prompt][0] if isinstance(task.get(prompt), list) and task[prompt] else task.get(prompt)
    if not isinstance(text, str) or not text.strip():
        return wrong(f"{prompt!r} is no text, nor a list that begins with one")
    for place in places:
        if place not in text and (place != "{examplars}" or args.num_shots):
            wrong(f"no {place} in {prompt!r}" + (f", and --num_shots {args.num_shots}" if place == "{examplars}" else ""))
    for key in keys:
        if not texts(task.setdefault(key, []), ["input", "output"]):
            wrong(f"{key!r} is no list of objects with 'input' and 'output'")
            task[key] = []
    categories = task.get("Categories", [])
    categories = [categories] if isinstance(categories, str) else categories
    if not isinstance(categories, list) or not all(isinstance(category, str) for category in categories):
        wrong("'Categories' is no list of texts")
        categories = []
    for i, instance in enumerate(task["Instances"]):
        output = [instance["output"]] if isinstance(instance.get("output"), str) else instance.get("output")
        if not isinstance(output, list) or not output or not all(isinstance(text, str) and text.strip() for text in output):
            problems.append(f"{path}, Instances[{i}]: 'output' is no list of texts that are not empty")
        instance["output"] = output
    return {**task, "Task": name, prompt: text, "Categories": categories}


def category_name(category):
    return "_".join(category.lower().split())


def named_alike(tasks, categories):
    """Problems of tasks that are named like a `category_name`."""
    return [f"task {name} is named like a category, and metrics are named after both: rename the task" for name in sorted(tasks & categories)]


def read_tasks(args, files, problems):
    """Yield (where, split, task, instance) of the files of `find_tasks`, after the caps. task: as `load_task` gives it; instance: {"id",
    "input", "output": [references]}."""
    names, categories, n_short, n_all, n_used = set(), set(), 0, 0, 0
    shown = (args.num_shots,) if args.data_format == "flan" else (
        max(args.num_pos_examples, 2 * args.tk_instruct), max(args.num_neg_examples, 2 * args.tk_instruct))
    for label, path in files.items():
        (split, name), before = label.split(" ", 1), len(problems)
        task = load_task(args, path, name, problems)
        if task is None or len(problems) > before:
            continue
        names.add(name)
        categories.update(map(category_name, task["Categories"][:1]))
        n_short += any(len(task[key]) < n for key, n in zip(TASK_LAYOUTS[args.data_format][2], shown))
        instances = list(enumerate(task.pop("Instances")))
        n_all += len(instances)
        instances = instances[: 100 if split == "test" else None]
        cap = args.max_num_instances_per_task if split == "train" else args.max_num_instances_per_eval_task
        if cap is not None and cap < len(instances):
            instances = sorted(random.Random(derive_seed(args.seed if split == "train" else 0, "instances", name)).sample(instances, cap),
                               key=lambda pair: pair[0])
        n_used += len(instances)
        for i, instance in instances:
            yield f"{path}, Instances[{i}]", split, task, {"id": instance.get("id", f"{name}-{i}"), "input": instance["input"], "output": instance["output"]}
    problems += named_alike(names, categories)
    if n_used < n_all:
        log.info(f"{args.task_dir}: {n_used} of {n_all} instances count, by the caps and the first 100 of a test task")
    if n_short:
        log.warning(f"{args.task_dir}: {n_short} of {len(files)} tasks have fewer examples than the prompts could show")


def task_examples(args, files, tokenizer, limit, salt, problems, counts):
    """Yield (where, split, record, [prompt], [reference], key) of the instances of task folders. Of several prompts or references training
    draws one in each epoch. key: what may not be on both sides of --eval_fraction, see `is_held_out`; no tokenizer: only to find problems."""
    size = functools.lru_cache(2**14)(lambda text: len(tokenizer(text).input_ids) if tokenizer else 0)
    for where, split, task, instance in read_tasks(args, files, problems):
        key = f"{task[TASK_LAYOUTS[args.data_format][0]]}\n{instance['input']}"
        split = "eval" if split == "train" and is_held_out(args, salt, key) else split
        prompts, n_lost, n_cut = task_prompts(args, split, task, instance["input"], limit, size)
        counts.update({"prompts": len(prompts), **dict(zip(SHORTENED, (n_lost, n_cut)))})
        record = {"Task": task["Task"], "Categories": task["Categories"], "Instance": instance}
        yield where, split, record, prompts, instance["output"][: None if split == "train" else 1], key


def warn_of_shortened_prompts(data, limit):
    for what in SHORTENED:
        if data.counts.get(what):
            log.warning(f"{data.name}: {data.counts[what]} of {data.counts['prompts']} {what}: --max_source_length {limit} tokens")


def task_prompts(args, split, task, text, limit, size):
    """([prompt], how many lost examples, how many a part of their input or definition): one, or in training with --tk_instruct five, of which
    each epoch draws one. size: text -> tokens; a prompt has at most `limit`."""
    drawn = args.tk_instruct and split == "train"
    encodings = TK_ENCODINGS if drawn else [(not args.no_task_definition, args.num_pos_examples, args.num_neg_examples, args.add_explanation)]
    parts = ([flan_parts(task, args.num_shots)] if args.data_format == "flan" else
             [ni_parts(task, encoding, args.add_task_name and not drawn) for encoding in encodings])
    prompts, lost, cut = zip(*(fit_prompt(*part, text, limit, size) for part in parts))
    return list(prompts), sum(lost), sum(cut)


def stopped(line):
    """A line of Tk-Instruct: with a full stop, unless its last character is ASCII punctuation."""
    return line if line[-1] in string.punctuation else line + "."


def ni_parts(task, encoding, add_name):
    """(definition, lists of examples, whole, measured) of Tk-Instruct's prompt, character by character. whole(definition, examples, text) ->
    the prompt; measured: what Tk-Instruct counts the tokens of before it takes one more example."""
    define, n_positive, n_negative, explain = encoding
    examples = []
    for kind, n in (("Positive", n_positive), ("Negative", n_negative)):
        examples.append([])
        for k, example in enumerate(task[f"{kind} Examples"][:n], 1):
            lines = [f" {kind} Example {k} -", stopped(f"Input: {example['input'].strip()}"), stopped(f" Output: {example['output'].strip()}")]
            if explain and isinstance(example.get("explanation"), str):
                lines.append(stopped(f" Explanation: {example['explanation'].strip()}"))
            examples[-1].append("\n".join(lines) + "\n\n")

    def begin(definition):
        return stopped(f"Definition: {definition}") + "\n\n" if define else ""

    def query(text):
        return "Now complete the following example -\n" + stopped(f"Input: {text.strip()}") + "\nOutput: "

    def whole(definition, examples, text):
        return (f"{task['Task']}. " if add_name else "") + begin(definition) + "".join(e for part in examples for e in part) + query(text)

    def measured(definition, examples, text, example):
        return begin(definition) + "".join(" ".join(part) for part in examples) + example + query(text)

    return task["Definition"].strip(), examples, whole, measured


def flan_parts(task, n_shots):
    """The same of a task whose own 'Instruction Prompt' has places for {examplars} and {task_input}."""
    examples = [[f"{stopped(f'({k}) ' + example['input'].strip())}\n{stopped(' Output: ' + example['output'].strip())}\n"
                 for k, example in enumerate(task["Examplars"][:n_shots], 1)]]

    def whole(definition, examples, text):
        fill = {"{examplars}": "".join(examples[0]),
                "{task_input}": stopped("Now complete the following example \n" + text.strip()) + "\nOutput: "}
        return re.sub(r"\{examplars\}|\{task_input\}", lambda found: fill[found[0]], definition)

    return task["Instruction Prompt"].strip(), examples, whole, lambda *parts: whole(*parts[:3]) + parts[3]


def fit_prompt(definition, examples, whole, measured, text, limit, size):
    """(prompt of at most `limit` tokens, whether it lost examples, whether its input or definition was cut). The first example that does not
    fit ends its list, as in Tk-Instruct; what is still too long loses examples first and the end of the input last, never the query."""
    def too_long(definition, examples, text):
        return size(whole(definition, examples, text)) > limit

    n_all, nothing = sum(map(len, examples)), [[] for _ in examples]
    if size(whole(definition, nothing, text)) + sum(size(example) + 4 for part in examples for example in part) + 8 <= limit:
        return whole(definition, examples, text), False, False  # it fits without counting
    taken = nothing
    for part, mine in zip(examples, taken):
        for example in part:
            if size(measured(definition, taken, text, example)) > limit:
                break
            mine.append(example)
    while any(taken) and too_long(definition, taken, text):
        (taken[-1] or taken[0]).pop()
    is_cut = too_long(definition, taken, text)
    if is_cut:
        room = limit - min(size(text) + 8, limit // 2)  # for the definition, should it be the longer one
        if size(whole(definition, taken, "")) > room and "{task_input}" not in definition:
            n = bisect.bisect_left(range(1, len(definition) + 1), True, key=lambda n: size(whole(definition[:n], taken, "")) > room)
            definition = definition[:n]
        text = text.strip()
        text = text[:bisect.bisect_left(range(1, len(text) + 1), True, key=lambda n: too_long(definition, taken, text[:n]))]
    return whole(definition, taken, text), sum(map(len, taken)) < n_all, is_cut


def rouge_scorer(tokenizer=None):
    """Of package rouge-score; English with the Porter stemmer, or by the tokens of a tokenizer. Raises ImportError."""
    from rouge_score import rouge_scorer
    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=tokenizer is None, tokenizer=tokenizer)


def instruction_scores(prediction, references, scorer):
    """(exact match, ROUGE-1, ROUGE-L) as Super-NaturalInstructions scores, each 0-1 and the best over the references: exact match after lower
    case, without ASCII punctuation, single blanks; ROUGE's F-measure."""
    def normal(text):
        return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())

    rouge = [scorer.score(target=reference, prediction=prediction) for reference in references]
    return (float(normal(prediction) in map(normal, references)), max(r["rouge1"].fmeasure for r in rouge), max(r["rougeL"].fmeasure for r in rouge))


def instruction_metrics(scores, tasks, categories):
    """{"exact_match": ..., "rougeL_for_<task>": ..., "rouge1_for_<category>": ...} x 100, to four digits, means over rows. scores: (rows, 3)
    of `instruction_scores`; tasks, categories: names or None by row."""
    scores, groups = np.asarray(scores), {"": range(len(scores))}
    for names in ([category and category_name(category) for category in categories], tasks):
        for name in sorted(set(filter(None, names))):
            groups[f"_for_{name}"] = [i for i, n in enumerate(names) if n == name]
    return {metric + ending: round(100 * float(scores[rows, k].mean()), 4) for ending, rows in groups.items() if len(rows)
            for k, metric in enumerate(("exact_match", "rouge1", "rougeL"))}


def score_instructions(texts, records, tokenizer):
    """`instruction_metrics` of generated texts against all references, and their mean length [tokens, end token counted] as gen_len.
    records: {"Task", "Categories", "Instance": {"output": [references]}}."""
    scorer, lengths = rouge_scorer(), [len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    scores = [instruction_scores(text, record["Instance"]["output"], scorer) for text, record in zip(texts, records)]
    return {**instruction_metrics(scores, [r["Task"] for r in records], [(r["Categories"] or [None])[0] for r in records]),
            "gen_len": sum(lengths) / len(lengths)}


# ------------------------------------------------------------------------------------------------ order of examples


def mixed_epoch(sizes, amounts, seed, epoch):
    """Example ids of one epoch over several data sets, numbered through; a set with an amount is sampled anew."""
    ids, start = [], 0
    for which, (size, amount) in enumerate(zip(sizes, amounts)):
        take = size if amount is None else amount if isinstance(amount, int) else max(1, round(amount * size))
        drawn = np.arange(size) if take == size else np.random.default_rng([seed, 1, epoch, which]).permutation(size)[:take]
        ids.append(start + drawn)
        start += size
    return np.concatenate(ids)


def length_cells(ids, lengths, n_cells):
    """Cut ids into n_cells arrays of about equal size that are alike in source and target length.

    Sorted by target length into about sqrt(n_cells) groups, each group by source length. lengths: (N, 2), by id.
    """
    bounds = np.arange(n_cells + 1) * len(ids) // n_cells
    ids = ids[np.argsort(lengths[ids, 1], kind="stable")]
    cells = []
    for group in np.array_split(np.arange(n_cells), max(1, round(math.sqrt(n_cells)))):
        start = bounds[group[0]]
        part = ids[start: bounds[group[-1] + 1]]
        part = part[np.argsort(lengths[part, 0], kind="stable")]
        cells += [part[bounds[i] - start: bounds[i + 1] - start] for i in group]
    return cells


def epoch_batches(ids, lengths, batch, seed, epoch, window=64):
    """The batches of one epoch: a pure function of its arguments, the same for any number of ranks.

    ids: (n,) example numbers of this epoch; lengths: (N, 2) source and target tokens, indexed by example number.
    A batch is a cell (see length_cells) of a random window of 64 batches, so little padding is needed. Returns
    ceil(n / batch) arrays in random order; a shorter one comes last, of randomly chosen examples.
    """
    rng = np.random.default_rng([seed, 2, epoch])
    order = ids[rng.permutation(len(ids))]
    n_full = len(order) // batch
    batches = []
    for start in range(0, n_full, window):
        n_batches = min(window, n_full - start)
        batches += length_cells(order[start * batch: (start + n_batches) * batch], lengths, n_batches)
    batches = [batches[i] for i in rng.permutation(n_full)]
    return batches + ([order[n_full * batch:]] if len(order) % batch else [])


def deal(ids, sizes, n_pieces):
    """Cut the examples of a step into n_pieces runs of similar size and about equal token counts.

    ids: (n,) int; sizes: (N,) tokens. Some pieces are empty when n < n_pieces. Depends on nothing else, so all ranks agree.
    """
    ids = ids[np.argsort(-sizes[ids], kind="stable")]
    tokens = np.cumsum(sizes[ids])
    piece = np.minimum((tokens - sizes[ids] / 2) * n_pieces // tokens[-1], n_pieces - 1)
    return [ids[piece == i] for i in range(n_pieces)]


def my_batches(n_rows, lengths, batch_size):
    """This rank's evaluation batches, longest first, and how many the busiest rank has. A batch is never split, so its
    padding, and with it every digit of the result, is the same for any number of ranks."""
    order = np.argsort(-lengths, kind="stable") if n_rows else np.empty(0, int)
    batches = [order[i: i + batch_size].tolist() for i in range(0, n_rows, batch_size)]
    return batches[rank()::world_size()], -(-len(batches) // world_size())


def to_device(batch, device):
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


# ------------------------------------------------------------------------------------------------ model

CHUNK_ELEMENTS = 2**26  # logits computed at once: 256 MB in fp32


def open_model_folder(args, problems):
    """(source, config, tokenizer) of the model that the flags name; small files only, the weights come later."""
    source = args.model_init_path or (args.model_init_name and find_input(args, "models", args.model_init_name, [""], problems))
    if not source:
        return None, None, None
    source = str(source)
    adapter = read_adapter(source, problems)
    if adapter and adapter.base is None:
        return None, None, None
    base, revision = (adapter.base, adapter.rawtune.get("base", {}).get("revision")) if adapter else (source, args.revision)
    folder = pathlib.Path(base)
    if folder.is_dir():
        names = {p.name for p in folder.iterdir()}
        if "config.json" not in names or not names & {"tokenizer.json", "spiece.model", "tokenizer_config.json", "vocab.json"}:
            problems.append(f"{base}: no model folder: expected config.json and a tokenizer (it has: "
                            f"{', '.join(sorted(names)[:12]) or 'nothing'})")
            return None, None, None
        for file in folder.glob("*.safetensors"):
            try:
                safetensors.safe_open(file, "pt").__enter__()
            except Exception as error:  # safetensors raises its own class, not an OSError, for a file cut short
                problems.append(f"{file}: damaged ({error}); copy or download it again")
    stored = adapter.rawtune.get("base", {}).get("sha256") if adapter else None
    if stored and rank() == 0 and weights_sha256(base) != stored:  # rank 0 alone: it may take minutes
        problems.append(f"{source}: {base} has other weights than those that this adapter was trained on (sha256 {stored})")
    options = {"revision": revision or "main", "trust_remote_code": args.trust_remote_code}
    own_tokenizer = adapter and (adapter.folder / "tokenizer_config.json").is_file()
    try:
        config = transformers.AutoConfig.from_pretrained(base, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source if own_tokenizer else base, config=config, **options)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        remedy = "" if folder.is_dir() else (" A gated model needs HF_TOKEN and its licence accepted on the hub; without network "
                 "(HF_HUB_OFFLINE=1) it must be in HF_HOME; or copy its folder under models/.")
        problems.append(f"model {base!r}: {first}{remedy}")
        return None, None, None
    adapter_plan(args, source, config, problems)
    return source, config, tokenizer


def is_decoder_only(config):
    """A language model whose tokens see what came before them only; some among transformers' causal models do not, unless configured."""
    kind = type(config)
    return (kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and kind not in transformers.MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder
            and config.model_type not in ("xlnet", "bert-generation"))


def out_of_memory(step, error, shapes, last_resort):
    """What to say of a training step that did not fit. shapes: of this rank's forward steps, as text."""
    return (f"step {step + 1}: out of memory ({str(error).splitlines()[0]}). Rows x tokens of this rank: {', '.join(shapes)}. Next: halve "
            "--train_batch_size and double --gradient_accumulation_steps (same mathematics), then --gradient_checkpointing, then a higher "
            f"--ds_config stage, then {last_resort}")


def has_weights(source):
    """False for a folder with a configuration but no weights: it is trained from scratch."""
    return not os.path.isdir(source) or any(
        name.endswith((".safetensors", ".bin", ".index.json")) and not name.startswith("training_args") for name in os.listdir(source))


def weights_sha256(source):
    """One hash over the weight files of a folder, or None (hub id: the commit names them; from scratch: none)."""
    files = sorted(pathlib.Path(source).glob("*.safetensors")) or sorted(pathlib.Path(source).glob("pytorch_model*.bin"))
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest() if files else None


def count_parameters(auto_class, config):
    """Distinct parameters, without allocating them. transformers ties every new T5; v1.1 and mT5 have a head of their own."""
    with torch.device("meta"):
        tied = sum(p.numel() for p in auto_class.from_config(config).parameters())
    untied = config.model_type == "mt5" or getattr(config, "scale_decoder_outputs", True) is False
    return tied + (config.vocab_size * config.d_model if untied else 0)


class _PartitionWhileLoading:
    """While this object lives, from_pretrained loads weights already partitioned. transformers keeps a weak reference to
    it and asks these two things; its own class for the purpose, HfDeepSpeedConfig, wants accelerate installed."""

    def __init__(self, ds_config):
        self.config = ds_config
        set_hf_deepspeed_config(self)

    def is_zero3(self):
        return True


def _whole_weights_equal(a, b, equal=torch.equal):
    """torch.equal for partitioned weights. transformers ties a T5's head unless the checkpoint's head and embedding
    differ, and under ZeRO-3 it would compare their empty stand-ins: always equal, and v1.1's head was lost."""
    with deepspeed.zero.GatheredParameters([w for w in (a, b) if hasattr(w, "ds_id")]):
        return equal(a, b)


def _new_model(auto_class, source, config, args):
    """New weights from the seed, in fp32."""
    log.info(f"{source} has no weights: training from scratch (seed {args.seed})")
    torch.manual_seed(derive_seed(args.seed, "new weights"))
    model = auto_class.from_config(config)
    raw = json.loads((pathlib.Path(source) / "config.json").read_text())
    if raw.get("tie_word_embeddings") is False and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        # transformers 5 ties every new T5, also where the configuration says otherwise (v1.1, mT5). Untie by hand;
        # scale as in t5x: variance 1 / fan-in.
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.randn_like(head.weight) * head.in_features**-0.5)
    return model


@torch.no_grad()
def _add_rows(model, n_tokens):
    """Embeddings, and an untied head, of exactly n_tokens rows; each new row is the mean of the old ones."""
    n_old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(n_tokens, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight[n_old:] = layer.weight[:n_old].double().mean(0).to(layer.weight.dtype)


def load_model(auto_class, source, config, args, precision, ds_config, n_tokens=None, new_ids=()):
    """The model in the precision's dtype, quantised and with adapters as flags or the adapter folder `source` say.

    ZeRO-3 loads weights already partitioned; without weights: new ones from the seed, made whole on every rank, so that
    they are the same at every stage. n_tokens: where it exceeds the embedding's rows, rows are added; new_ids: tokens
    whose rows are trained beside an adapter, too.
    """
    dtype, plan = DTYPES[precision], adapter_plan(args, source, config, [])
    plan.dtype, plan.token_ids = dtype, plan.token_ids or sorted(int(i) for i in new_ids)
    n_tokens = max([n_tokens or 0] + [i + 1 for i in plan.token_ids])
    grows = n_tokens > config.get_text_config().vocab_size
    if has_weights(plan.base):
        partitioned = _PartitionWhileLoading(ds_config) if ds_config["zero_optimization"]["stage"] == 3 and not grows else None
        with unittest.mock.patch.object(torch, "equal", _whole_weights_equal) if partitioned else contextlib.nullcontext():
            model, info = auto_class.from_pretrained(plan.base, config=config, dtype=dtype, revision=plan.revision,
                                                     trust_remote_code=args.trust_remote_code, output_loading_info=True)
        if info["missing_keys"]:
            fail(f"{plan.base}: {len(info['missing_keys'])} weights are missing in its files, among them "
                 f"{', '.join(sorted(info['missing_keys'])[:5])}; is it a {type(model).__name__} checkpoint?")
    else:
        model = _new_model(auto_class, plan.base, config, args).to(dtype)
    if grows:
        _add_rows(model, n_tokens)
    install_layers(model, plan)
    model.adapter_plan = plan
    if plan.folder:
        copy_weights(model, plan.folder)
    freeze(model, args.freeze)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if layers:
        n, size = sum(m.in_features * m.out_features for m in layers), quantized_bytes(layers)
        log.info(f"--quantize {plan.quantize}: {len(layers)} linear layers, {size / 1e6:.2f} MB on every process, {size / n:.4f} bytes per parameter")
    if plan.kind == "lora" and plan.targets == "all-linear" and args.lora_targets != ["all-linear"] and not plan.folder:
        log.info(f"--lora_targets auto: {plan.model_type} is not among the known families, so all linear layers but the head get LoRA")
    if plan.kind != "none" or args.freeze:
        sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters() if p.requires_grad}
        n_all = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()) + sum(m.in_features * m.out_features for m in layers)
        log.info(f"{plan.kind if plan.kind != 'none' else 'all'}{f' from {plan.folder}' if plan.folder else ''}: "
                 f"{sum(sizes.values())} of {n_all} parameters are trained ({100 * sum(sizes.values()) / n_all:.3g} %)")
    return model.train()


def merge_and_save(auto_class, source, config, tokenizer, args):
    """--merge_lora: base and LoRA adapter as one plain model folder, with the tokenizer and what rawtune.json says of the task.
    Computed in fp32, saved in the base's type; a quantised base is dequantised and stays so."""
    out = pathlib.Path(args.merge_lora)
    model = load_model(auto_class, source, config, args, "fp32", {"zero_optimization": {"stage": 0}})
    merge_adapter(model)
    model.to(config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    aside = pathlib.Path(f"{out}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.save_pretrained(aside, state_dict=full_state_dict(model))
    tokenizer.save_pretrained(aside)
    record = read_adapter(source, []).rawtune
    write_json(aside / "rawtune.json", {"format": 1, **record, "adapter": "none", "quantize": None, "merged_from": str(source)})
    fsync_tree(aside)
    os.rename(aside, out)
    log.info(f"{out}: {source} merged into its base, in {str(model.dtype).removeprefix('torch.')}")


def estimate_or_merge(auto_class, source, config, tokenizer, args, precision, n_params, n_trained, quantized, problems):
    """--estimate and --merge_lora, which are all that such a command does: whether it was one."""
    if not args.estimate and not args.merge_lora:
        return False
    if problems:
        fail(problems)
    if args.estimate:
        log.info(estimate_table(n_params, precision, device_memory(), n_trained, quantized))
    else:
        merge_and_save(auto_class, source, config, tokenizer, args)
    return True


def plain_copy(model, device):
    """Collective. A whole copy of a ZeRO-3 partitioned model on this device, for generating: one gather per weight
    instead of one per weight and token. In eval mode, without gradients."""
    with torch.device("meta"):
        twin = type(model)(model.config)
        if hasattr(model, "adapter_plan"):
            install_layers(twin, model.adapter_plan)
    twins = {}  # by identity: a weight under two names stays one weight
    for name, weight in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if id(weight) not in twins:
            with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
                is_parameter = isinstance(weight, torch.nn.Parameter)
                value = weight.detach().to(device, copy=is_parameter)  # quantised weights, which are buffers, are shared
            twins[id(weight)] = torch.nn.Parameter(value, False) if is_parameter else value
        module, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(module), leaf, twins[id(weight)])
    twin.generation_config = model.generation_config
    return twin.eval()


def generating_model(args, engine, device):
    """The model to call `generate` on, and whether all ranks must run equally many forward passes (ZeRO-3, synced)."""
    model = engine.module.model
    if not engine.zero_optimization_partition_weights():
        return model, False
    if device.type == "cuda":
        torch.cuda.empty_cache()  # or what training has cached counts as used
    need = sum(p.ds_numel * p.element_size() for p in model.parameters())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else device_memory() / 2
    n_full = all_reduce_sum([need > 0.6 * free], device)[0]
    if args.zero3_generation == "synced" or (args.zero3_generation == "auto" and n_full):
        return model, True
    return plain_copy(model, device), False


def finish_logits(config, logits):
    """What these families do to the logits behind their head; sft_causal.py's `check_model` finds families that do something else."""
    if getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    return logits


def chunk_tokens(vocabulary):
    """Target tokens whose logits are computed at once."""
    return max(128, CHUNK_ELEMENTS // vocabulary)


def refuse_fp32_logits(head, inputs, logits):
    """Forward hook of the head under bf16-mixed: were autocast not in effect, the run would silently be fp32."""
    if logits.dtype != torch.bfloat16:
        raise RuntimeError(f"--precision bf16-mixed: the logits are {logits.dtype}, so autocast is not in effect with this DeepSpeed")


class RowKeyedSampler(transformers.LogitsProcessor):
    """Sampling that depends on (seed, step, row, sample, position) only: not on batch, order or number of ranks.

    Adds Gumbel noise to the scores, so that the argmax of greedy `generate` is an exact sample of softmax(scores /
    temperature), cut to top_p (Gumbel-max trick; Maddison et al. 2014). The noise is a hash (splitmix64) of key,
    position and token, computed on the device in int64.
    """

    def __init__(self, keys, temperature, top_p, start=0):
        # keys: (B,) int64, one per generated row; start: width of the (padded) prompt, from which positions count
        self.keys, self.temperature, self.start = keys, temperature, start
        self.top_p = transformers.TopPLogitsWarper(top_p) if top_p < 1 else None

    @staticmethod
    def _mix(z):
        def right(z, n):  # logical shift; int64 has only the arithmetic one
            return (z >> n) & ((1 << (64 - n)) - 1)
        z = (z ^ right(z, 30)) * -4658895280553007687  # 0xbf58476d1ce4e5b9
        z = (z ^ right(z, 27)) * -7723592293110705685  # 0x94d049bb133111eb
        return z ^ right(z, 31)

    @classmethod
    def gumbel(cls, keys, ids):
        """Noise (fp32) of the tokens `ids` (n,) or (B, n) in rows with keys (B, 1), int64: key + position."""
        hashed = cls._mix(cls._mix(keys) + 1 + ids)
        uniform = (((hashed >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
        return -torch.log(-torch.log(uniform)).float()

    def __call__(self, input_ids, scores):
        scores = scores.float() / self.temperature
        scores = self.top_p(input_ids, scores) if self.top_p else scores
        keys = self.keys[:, None] + input_ids.shape[1] - self.start
        return scores + self.gumbel(keys, torch.arange(scores.shape[1], device=scores.device))


# ------------------------------------------------------------------------------------------------ layers

LORA_TARGETS = {  # --lora_targets auto, by config.model_type; elsewhere all-linear
    **dict.fromkeys(["t5", "mt5", "umt5", "longt5"], ["q", "k", "v"]), "gpt2": ["c_attn", "c_proj", "c_fc"], "phi3": ["qkv_proj"],
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "gptj", "gpt_neo", "opt", "bart", "mbart"],
                    ["q_proj", "k_proj", "v_proj"]), **dict.fromkeys(["gpt_neox", "falcon", "bloom"], ["query_key_value"])}
BOTTLENECKS = {  # output projections of self-attention and of the feed-forward network, by config.model_type
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"], ("self_attn.o_proj", "mlp.down_proj")),
    **dict.fromkeys(["t5", "mt5", "umt5"], ("SelfAttention.o", "DenseReluDense.wo")), "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"), **dict.fromkeys(["opt", "bart", "mbart"], ("self_attn.out_proj", "fc2")),
    "gptj": ("attn.out_proj", "mlp.fc_out"), "gpt_neo": ("attention.out_proj", "mlp.c_proj"), "phi": ("self_attn.dense", "mlp.fc2"),
    **dict.fromkeys(["bloom", "falcon"], ("self_attention.dense", "mlp.dense_4h_to_h"))}
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495,
       0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)  # the code book of QLoRA, appendix E
ADAPTER_NAMES = re.compile(r"\.(lora_[AB]|token_adapter|mh_adapter|output_adapter)\.")  # parameters that an adapter folder holds


def quantize_nf4(weight):
    """4-bit NormalFloat (Dettmers et al. 2023, section 3) of a tensor in blocks of 64, read row by row, the last one filled
    up with zeros -> codes (n / 2,) uint8, the first of two in the high half, and the blocks' largest magnitudes fp32."""
    flat = weight.detach().float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    absmax, table = blocks.abs().amax(1), torch.tensor(NF4, device=flat.device)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8).flatten()  # the nearest one
    return codes[::2] << 4 | codes[1::2], absmax


@functools.cache
def _nf4_pairs(device):
    """(256, 2): the two values of each byte."""
    table = torch.tensor(NF4, device=device)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)


class QuantizedLinear(torch.nn.Module):
    """A frozen linear layer in 4 (nf4) or 8 bits (int8) per weight; (.., n_in) -> (.., n_out) in autocast's or x's type.

    nf4: double quantisation, as in QLoRA: the blocks' magnitudes less their mean are 8-bit integers under one fp32 scale per
    256 blocks; equally spaced (bitsandbytes: its dynamic map), so each is off by at most 1/254 of the largest. int8: one fp32
    scale per output row. All in integer buffers, scales by their bits: ZeRO-3 takes no uint8 parameter, a cast of the
    module leaves them alone, and no checkpoint holds them. Buffers are not partitioned: every process has all of them.
    """

    def __init__(self, linear, kind, dtype):
        super().__init__()
        self.kind, self.dtype, self.bias, self.transposed = kind, dtype, linear.bias, isinstance(linear, Conv1D)
        self.in_features, self.out_features = linear_sizes(linear)
        with deepspeed.zero.GatheredParameters([linear.weight], enabled=hasattr(linear.weight, "ds_id")):
            weight = linear.weight.detach()
            if torch.cuda.is_available() and not weight.is_meta:
                weight = weight.to(torch.cuda.current_device())  # a hundred times faster there
            weight = weight.T if self.transposed else weight
            if kind == "nf4":
                codes, absmax = quantize_nf4(weight)
                mean, self.n_blocks = absmax.mean(), len(absmax)
                groups = torch.nn.functional.pad(absmax - mean, (0, -len(absmax) % 256)).view(-1, 256)
                scales = groups.abs().amax(1).clamp(min=1e-38) / 127
                self.register_buffer("absmax", (groups / scales[:, None]).round().to(torch.int8), persistent=False)
                scales = torch.cat([scales, mean[None]])
            else:
                scales = weight.float().abs().amax(1).clamp(min=1e-38) / 127
                codes = (weight.float() / scales[:, None]).round().to(torch.int8)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales.view(torch.int32), persistent=False)

    @property
    def weight(self):
        """Model code asks for its dtype and device (T5's feed-forward). Empty: use `dequantize`."""
        return torch.empty(0, dtype=self.dtype, device=self.codes.device)

    def dequantize(self, dtype):
        """(n_out, n_in)"""
        scales = self.scales.view(torch.float32)
        if self.kind == "int8":
            return (self.codes * scales[:, None]).to(dtype)
        absmax = (self.absmax * scales[:-1, None]).flatten()[: self.n_blocks] + scales[-1]
        values = torch.nn.functional.embedding(self.codes.int(), _nf4_pairs(self.codes.device)).view(-1, 64) * absmax[:, None]
        return values.flatten()[: self.in_features * self.out_features].view(self.out_features, self.in_features).to(dtype)

    def forward(self, x):
        kind = x.device.type
        y = _FrozenMatmul.apply(x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _FrozenMatmul(torch.autograd.Function):
    """x W^T for a quantised W, which the backward pass dequantises again: autograd would keep it whole in between."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        with torch.autocast(x.device.type, enabled=False):
            return torch.nn.functional.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            return grad @ ctx.layer.dequantize(grad.dtype), None


class LoraLinear(torch.nn.Module):
    """y = base(x) + scale B A dropout(x) (Hu et al. 2021, equation 3). A starts as PEFT's does, B with zeros; names are PEFT's."""

    def __init__(self, base_layer, rank, scale, dropout, dtype, seed):
        super().__init__()
        n_in, n_out = linear_sizes(base_layer)
        self.base_layer, self.scale, self.dropout = base_layer, scale, torch.nn.Dropout(dropout)
        self.lora_A, self.lora_B = _new_linear(n_in, rank, dtype, base_layer), _new_linear(rank, n_out, dtype, base_layer)
        _fill(self.lora_A.weight, "uniform_", -(n_in**-0.5), n_in**-0.5, seed=seed)  # kaiming_uniform_(a=sqrt(5))

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        y = self.base_layer(x)
        return y + (self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))) * self.scale).to(y.dtype)

    def update(self):
        """scale B A: (n_out, n_in)."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)


class BottleneckLinear(torch.nn.Module):
    """h = base(x), then h + scale up(relu(down(dropout(h)))), scale 1 (Houlsby et al. 2019, figure 2). `up` starts with zeros: no change."""

    def __init__(self, base_layer, name, width, dropout, dtype, seed):
        super().__init__()
        h = linear_sizes(base_layer)[1]
        self.base_layer, self.scale, self.name = base_layer, 1.0, name  # mh_adapter or output_adapter
        down, up = (_new_linear(*sizes, dtype, base_layer, bias=True) for sizes in ((h, width), (width, h)))
        _fill(down.weight, "normal_", 0.0, 0.02, seed=seed)
        self.add_module(name, torch.nn.ModuleDict({"dropout": torch.nn.Dropout(dropout), "down": down, "up": up}))

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        h, part = self.base_layer(x), getattr(self, self.name)
        inner = part["down"](part["dropout"](h.to(part["down"].weight.dtype)))
        return h + (part["up"](inner.relu()) * self.scale).to(h.dtype)


class TokenRows(torch.nn.Module):
    """Trained rows (K, D) of an embedding or output head for the token numbers ids (K,), which rise; PEFT's names."""

    def __init__(self, weight, ids, dtype):
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids, device=weight.device), persistent=False)
        with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
            self.trainable_tokens_delta = torch.nn.Parameter(weight.detach()[self.ids].to(dtype, copy=True))

    def forward(self, tokens, hidden, scale):
        """Of an embedding: its vectors `hidden` (.., D), with ours where `tokens` (..) is one of ids; of a head (tokens None):
        our logits (.., K) of `hidden` (.., D)."""
        if tokens is None:
            return torch.nn.functional.linear(hidden, self.trainable_tokens_delta)
        at = torch.searchsorted(self.ids, tokens).clamp(max=len(self.ids) - 1)
        ours = torch.nn.functional.embedding(at, self.trainable_tokens_delta) * scale
        return torch.where((self.ids[at] == tokens)[..., None], ours.to(hidden.dtype), hidden)


class EmbeddingWithRows(torch.nn.Module):
    def __init__(self, base_layer, token_adapter):
        super().__init__()
        self.base_layer, self.token_adapter = base_layer, token_adapter

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, tokens):
        return self.token_adapter(tokens, self.base_layer(tokens), getattr(self.base_layer, "embed_scale", 1.0))  # Gemma scales


class HeadWithRows(EmbeddingWithRows):
    def forward(self, hidden):
        logits = self.base_layer(hidden)
        return logits.index_copy_(-1, self.token_adapter.ids, self.token_adapter(None, hidden, 1.0).to(logits.dtype))


def linear_sizes(linear):
    """(n_in, n_out) of any linear layer; transformers' Conv1D (GPT-2) holds its weight transposed."""
    if isinstance(linear, (LoraLinear, BottleneckLinear)):
        return linear_sizes(linear.base_layer)
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def _new_linear(n_in, n_out, dtype, like, bias=False):
    """Of zeros, where the layer `like` is."""
    linear = torch.nn.Linear(n_in, n_out, bias=bias, dtype=dtype, device=like.weight.device)
    for weight in linear.parameters():
        torch.nn.init.zeros_(weight)
    return linear


def _fill(weight, how, a, b, seed):
    if not weight.is_meta:
        weight.data.copy_(getattr(torch.empty(weight.shape), how)(a, b, generator=torch.Generator().manual_seed(seed)))


def _replace(model, old, new):
    """Put `new` where the module `old` is."""
    path = next(path for path, module in model.named_modules() if module is old)
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def linear_layers(model):
    """{path: module} of every linear layer but the output head."""
    head = model.get_output_embeddings()
    return {path: module for path, module in model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D, QuantizedLinear)) and module is not head}


def is_target(path, names):
    """As PEFT understands a list: is_target("h.0.attn.q", ["q"]) but not is_target("h.0.attn.seq", ["q"])."""
    return any(path == name or path.endswith(f".{name}") for name in names)


ADAPTER_FILES = {"lora": ("adapter_config.json", "adapter_model.safetensors"), "bottleneck": ("bottleneck_config.json", "bottleneck.safetensors")}
NOT_LORA = ("use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters", "layer_replication", "use_qalora",
            "use_bdlora", "alora_invocation_tokens", "velora_config", "kasa_config", "monteclora_config", "arrow_config")  # of PEFT


def read_adapter(source, problems):
    """What an adapter folder says, None for any other model: kind, its JSON, rawtune.json ({} in a folder of PEFT's), keys of
    its weights, and base, the model it belongs to (None: not found): a hub id, or a folder, perhaps moved together with this one."""
    folder = pathlib.Path(source)
    kind = next((kind for kind, (name, _) in ADAPTER_FILES.items() if (folder / name).is_file()), None)
    if kind is None:
        return None
    found = types.SimpleNamespace(kind=kind, folder=folder, json={}, rawtune={}, keys=[], base=None)
    name, weights = ADAPTER_FILES[kind]
    try:
        found.json = json.loads((folder / name).read_text())
        found.rawtune = json.loads((folder / "rawtune.json").read_text()) if (folder / "rawtune.json").is_file() else {}
        with safetensors.safe_open(folder / weights, "pt") as file:
            found.keys = list(file.keys())
    except Exception as error:  # safetensors raises its own class for a damaged file
        problems.append(f"{folder}: no whole adapter, {name} and {weights} ({error})")
        return found
    stored = found.rawtune.get("base", {})
    path = pathlib.Path(str(stored.get("path") or found.json.get("base_model_name_or_path") or ""))
    run = folder.parent if folder.name.startswith("checkpoint-") else folder
    places = [run / "base"] * (path.name == "base") + [path, folder / path, run.parent / path.name]
    found.base = next((str(place) for place in places if path.name and (place / "config.json").is_file()), None)
    if found.base is None and path.name and not path.is_absolute() and not stored.get("sha256"):
        found.base = str(path)  # a hub id
    if found.base is None:
        problems.append(f"{folder}: the model that this adapter belongs to is not at {str(path)!r}, nor beside the adapter; put it into "
                        f"{run.parent / (path.name or 'base')}")
    return found


def adapter_plan(args, source, config, problems):
    """What `install_layers` puts into the model, from the flags or from the adapter folder `source`; reads small files only.

    kind: none, lora or bottleneck; base: what from_pretrained loads; folder: the adapter to start from, or None; quantize:
    None, nf4 or int8; paths: layers with LoRA, where a folder says them; token_ids: new tokens whose rows are trained,
    head_rows: in an untied head too.
    """
    kind, targets = "lora" if args.lora_rank else "bottleneck" if args.train_adapter else "none", args.lora_targets or ["auto"]
    plan = types.SimpleNamespace(
        kind=kind, base=source, revision=args.revision or "main", folder=None, quantize=args.quantize, model_type=config.model_type, seed=args.seed,
        dtype=None, token_ids=[], head_rows=True, rank=args.lora_rank, alpha=args.lora_alpha or 2 * args.lora_rank, rslora=False, paths=None,
        targets=LORA_TARGETS.get(config.model_type, "all-linear") if targets == ["auto"] else "all-linear" if targets == ["all-linear"] else targets,
        dropout=args.lora_dropout or 0.0, reduction_factor=args.reduction_factor or 128,
        parts=[name for name in ("mh_adapter", "output_adapter") if not getattr(args, f"no_{name}")])
    if kind == "bottleneck":
        plan.dropout = 0.1 if args.adapter_dropout is None else args.adapter_dropout
    stored = read_adapter(source, []) if source else None
    if stored:
        _continue_adapter(plan, stored, args, problems)
    elif args.no_train and kind != "none":
        problems.append("--lora_rank and --train_adapter have no effect with --no_train: name a folder that holds an adapter")
    plan.quantize = None if plan.quantize == "none" else plan.quantize
    if plan.kind == "bottleneck" and config.model_type not in BOTTLENECKS:
        problems.append(f"--train_adapter: where adapters go in a {config.model_type} is not known; known: {', '.join(sorted(BOTTLENECKS))}")
    if plan.kind == "none" and plan.quantize and not args.no_train:
        problems.append(f"--quantize {args.quantize}: quantised weights are not trained; add --lora_rank or --train_adapter (or --no_train)")
    if args.merge_lora and not (plan.kind == "lora" and plan.folder):
        problems.append(f"--merge_lora: {source} holds no LoRA adapter" + (", and bottleneck adapters are not linear: nothing can be merged"
                                                                           if plan.kind == "bottleneck" else ""))
    return plan


def _continue_adapter(plan, stored, args, problems):
    """The plan becomes that of an adapter folder (see `read_adapter`); flags that say otherwise are problems."""
    asked, is_lora, said = plan.kind, stored.kind == "lora", stored.json
    remedy = "merge it first (--merge_lora) and start from that" if is_lora else "start from its base"
    if asked not in ("none", stored.kind):
        problems.append(f"{stored.folder} holds a {stored.kind} adapter, which training continues; for a {asked} adapter {remedy}")
    names = {"rank": "r", "alpha": "lora_alpha", "targets": "target_modules"} if is_lora else {"reduction_factor": "reduction_factor", "parts": "parts"}
    given = {"rank": args.lora_rank, "alpha": args.lora_alpha, "targets": args.lora_targets and plan.targets, "parts": asked == stored.kind and plan.parts,
             "reduction_factor": args.reduction_factor}
    for name, key in names.items():
        wanted, value = (sorted(v) if isinstance(v, list) else v for v in (given[name], said.get(key)))
        if wanted and wanted not in (value, "all-linear"):
            problems.append(f"{stored.folder} is an adapter with {name} {value}, not {wanted}; training continues it as it is. For another one {remedy}")
        setattr(plan, name, value)
    dropout = args.lora_dropout if is_lora else args.adapter_dropout
    plan.dropout = said.get("lora_dropout" if is_lora else "dropout", 0.0) if dropout is None else dropout
    plan.kind, plan.base, plan.folder, plan.rslora = stored.kind, stored.base, stored.folder, bool(said.get("use_rslora"))
    plan.revision = stored.rawtune.get("base", {}).get("revision") or said.get("revision") or "main"
    plan.quantize = args.quantize or stored.rawtune.get("quantize")
    plan.paths = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in stored.keys if ".lora_A." in key}
    tokens = said.get("trainable_token_indices") or []
    tokens = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
    plan.token_ids, plan.head_rows = tokens[0], sum("token_adapter" in key for key in stored.keys) > 1
    if any(ids != sorted(tokens[0]) for ids in tokens):
        problems.append(f"{stored.folder}: trainable_token_indices must be the same rising numbers for every layer")
    other = [name for name in NOT_LORA if said.get(name)] + ["bias"] * (said.get("bias", "none") != "none")
    other += ["init_lora_weights"] * (said.get("init_lora_weights", True) not in (True, False, "gaussian", "eva", "orthogonal"))
    if other or is_lora and said.get("peft_type") != "LORA":
        problems.append(f"{stored.folder}: only plain LoRA can be read, not {', '.join(other) or said.get('peft_type')} in adapter_config.json")


def adapter_kind(model):
    """none, lora or bottleneck."""
    return model.adapter_plan.kind if hasattr(model, "adapter_plan") else "none"


@contextlib.contextmanager
def adapters_off(model):
    """Inside, the model answers as its base does (rows of new tokens stay), but calls the same modules, which ZeRO-3 counts. Only
    without gradients: recomputed activations would see the scale of later. `plain_copy` builds its adapters anew, switched on."""
    layers = [module for module in model.modules() if isinstance(module, (LoraLinear, BottleneckLinear))]
    scales = [layer.scale for layer in layers]
    try:
        for layer in layers:
            layer.scale = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales):
            layer.scale = scale


def count_trained(auto_class, source, config, args, n_params, problems):
    """(trained parameters, (quantised ones, their bytes)), without allocating them; what the flags match nothing with is a
    problem. n_params: all of them."""
    _check_adapter_args(args, reported := [])
    plan = adapter_plan(args, source, config, reported)
    if plan.kind == "none" and not plan.quantize and not args.freeze or reported:
        return n_params, (0, 0)
    plan.dtype, plan.token_ids = torch.float32, []
    with torch.device("meta"):
        model = auto_class.from_config(config)
        install_layers(model, plan)
    unmatched = freeze(model, args.freeze)
    if plan.kind != "none" and not any(isinstance(module, (LoraLinear, BottleneckLinear)) for module in model.modules()):
        leaves = sorted({path.rpartition(".")[2] for path in linear_layers(model)})
        problems.append(f"--lora_targets {plan.targets}: no linear layer has such a name; this {config.model_type} has {', '.join(leaves)}")
    problems += [f"--freeze {pattern!r}: found in no parameter's name; names are like {', '.join([n for n, _ in model.named_parameters()][:3])}"
                 for pattern in unmatched]
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not n_trained and not args.no_train and not args.merge_lora:
        problems.append("--freeze leaves no parameter to train")
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return n_trained, (sum(m.in_features * m.out_features for m in layers), quantized_bytes(layers))


def quantized_bytes(layers):
    return sum(buffer.numel() * buffer.element_size() for layer in layers for buffer in layer.buffers())


def base_of_run(auto_class, source, config, tokenizer, args, precision, run_dir):
    """Collective. What `load_model` loads: `source`, or, for an adapter on new weights, <run>/base, where they are saved once
    so that a resumed run and readers of the adapter have them."""
    if adapter_plan(args, source, config, []).kind == "none" or has_weights(source):
        return source
    base = run_dir / "base"
    if rank() == 0 and not base.exists():
        aside = run_dir / "base.tmp"
        model = _new_model(auto_class, source, config, args).to(DTYPES[precision])
        model.save_pretrained(aside, state_dict=full_state_dict(model))
        tokenizer.save_pretrained(aside)
        fsync_tree(aside)
        os.rename(aside, base)
    dist.barrier()
    return str(base)


def origin(args, source, config, resume_from):
    """The part of rawtune.json that says what the weights are: base (sha256 on rank 0 only), adapter, quantize."""
    plan = adapter_plan(args, source, config, [])
    base = {"path": str(plan.base), "revision": getattr(config, "_commit_hash", None) or (plan.revision if plan.folder else None)}
    if rank() == 0:  # hashing 45 GB takes minutes, so a resumed run that holds all weights takes it from its checkpoint
        before = json.loads((resume_from / "rawtune.json").read_text())["base"]["sha256"] if resume_from else None
        base["sha256"] = before if resume_from and plan.kind == "none" else weights_sha256(plan.base)
        if resume_from and base["sha256"] != before:
            fail(f"{plan.base}: these are not the weights that {resume_from} was trained on (sha256 {base['sha256']}, then {before})")
    return {"base": base, "adapter": plan.kind, "quantize": plan.quantize}


def install_layers(model, plan):
    """Quantise, put adapters in and freeze, as the plan says; works on a model without memory ("meta") too."""
    if plan.quantize:
        for path in list(linear_layers(model)):  # one after the other: the old weights are freed
            linear = model.get_submodule(path)
            _replace(model, linear, QuantizedLinear(linear, plan.quantize, plan.dtype))
    if plan.kind != "none":
        model.requires_grad_(False)
    if plan.kind == "lora":
        for path, linear in linear_layers(model).items():
            if path in plan.paths if plan.paths else plan.targets == "all-linear" or is_target(path, plan.targets):
                scale = plan.alpha / (math.sqrt(plan.rank) if plan.rslora else plan.rank)
                _replace(model, linear, LoraLinear(linear, plan.rank, scale, plan.dropout, plan.dtype, derive_seed(plan.seed, "lora", path)))
    for name, ending in zip(("mh_adapter", "output_adapter"), BOTTLENECKS[plan.model_type]) if plan.kind == "bottleneck" else ():
        for path, linear in linear_layers(model).items() if name in plan.parts else ():
            if is_target(path, [ending]):
                width = max(1, linear_sizes(linear)[1] // plan.reduction_factor)
                _replace(model, linear, BottleneckLinear(linear, name, width, plan.dropout, plan.dtype, derive_seed(plan.seed, name, path)))
    if plan.kind != "none" and plan.token_ids:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        rows = TokenRows(embedding.weight, plan.token_ids, plan.dtype)
        if getattr(head, "bias", None) is not None or model.config.is_encoder_decoder:
            fail(f"{type(model).__name__}: new tokens cannot be trained beside an adapter in this family; train all weights")
        is_tied = head.weight is embedding.weight
        plan.head_rows = plan.head_rows or is_tied  # also for a twin without memory, whose weights are not tied
        if plan.head_rows:
            _replace(model, head, HeadWithRows(head, rows if is_tied else TokenRows(head.weight, plan.token_ids, plan.dtype)))
        _replace(model, embedding, EmbeddingWithRows(embedding, rows))


def freeze(model, patterns):
    """--freeze: no gradient for parameters whose name a regular expression is found in; returns those that match nothing."""
    names = [name for name, _ in model.named_parameters()]
    for name, weight in model.named_parameters():
        if any(re.search(pattern, name) for pattern in patterns or ()):
            weight.requires_grad_(False)
    return [pattern for pattern in patterns or () if not any(re.search(pattern, name) for name in names)]


@torch.no_grad()
def merge_adapter(model):
    """In place, for a whole model: quantised weights become plain ones, LoRA and token rows are added in. For models in fp32 or fp64."""
    for module in list(model.modules()):
        base = getattr(module, "base_layer", None)
        if isinstance(module, EmbeddingWithRows):
            base.weight[module.token_adapter.ids] = module.token_adapter.trainable_tokens_delta
            _replace(model, module, base)
        if isinstance(module, LoraLinear):
            if isinstance(base, QuantizedLinear):
                base = _plain_linear(base)
            base.weight += module.update().T if isinstance(base, Conv1D) else module.update()
            _replace(model, module, base)
    for module in list(model.modules()):
        if isinstance(module, QuantizedLinear):
            _replace(model, module, _plain_linear(module))
    del model.adapter_plan


def _plain_linear(quantized):
    """A QuantizedLinear as torch.nn.Linear or, in GPT-2, Conv1D."""
    linear = Conv1D(quantized.out_features, quantized.in_features) if quantized.transposed else torch.nn.Linear(
        quantized.in_features, quantized.out_features, bias=quantized.bias is not None)
    weight = quantized.dequantize(quantized.dtype)
    linear.weight, linear.bias = torch.nn.Parameter(weight.T.contiguous() if quantized.transposed else weight), quantized.bias
    return linear


# ------------------------------------------------------------------------------------------------ DeepSpeed, optimiser

STAGES = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]


def memory_per_gpu(n_params, name, precision, n_gpus, n_trained=None, frozen_bytes=0):
    """Bytes of weights + gradients + AdamW state on each GPU (activations come on top). Rajbhandari et al. 2020, table 1,
    with fp32 accumulation of bf16 gradients, and for ZeRO-3 the up to 1e9 weights that DeepSpeed keeps gathered. Gradients
    and state exist for n_trained of the parameters only, default all. frozen_bytes: quantised weights, not among n_params."""
    weight = DTYPES[precision].itemsize
    n, n_trained = n_gpus, n_params if n_trained is None else n_trained
    grad = n_trained * (weight + (4 if precision == "bf16" else 0))
    state = n_trained * ((16 if precision == "fp64" else 8) + (0 if name == "zero0" and weight >= 4 else max(4, weight)))  # and masters
    live = weight * min(n_params, 10**9)
    return {"zero0": n_params * weight + grad + state,
            "zero1": n_params * weight + grad + state / n,
            "zero2": n_params * weight + (grad + state) / n,
            "zero3": (n_params * weight + grad + state) / n + live * (1 - 1 / n),
            "zero2_offload": n_params * weight, "zero3_offload": live}[name] + frozen_bytes


def estimate_table(n_params, precision, memory, n_trained=None, quantized=(0, 0)):
    """quantized: how many of n_params are, and their bytes."""
    lines = [f"{n_params / 1e6:.1f} M parameters, {precision}: GB per GPU for weights, gradients and AdamW; activations come on "
             f"top, so up to 80 % of {memory / 1e9:.1f} GB is taken", "              " + "".join(f"{n:>6} GPU" for n in (1, 2, 4, 8, 16))]
    for name in STAGES:
        cells = [memory_per_gpu(n_params - quantized[0], name, precision, n, n_trained, quantized[1]) for n in (1, 2, 4, 8, 16)]
        lines.append(f"{name:<14}" + "".join(f"{c / 1e9:>9.2f}{'*' if c < 0.8 * memory else ' '}" for c in cells))
    return "\n".join(lines + ["* fits here"])


def device_memory():
    """Bytes of one GPU, or this process's share of the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / local_world_size()


def choose_stage(n_params, precision, problems, n_trained=None, frozen_bytes=0):
    """--ds_config auto: the lowest stage that fits; none: an error that names the smallest set-up that does."""
    memory = device_memory()
    # bf16 with fp32 accumulation does not exist at stage 0, fp64 only at stages 1 and 2 (DeepSpeed 0.19.8)
    for name in STAGES[1 if precision in ("bf16", "fp64") else 0: 3 if precision == "fp64" else 4]:
        if memory_per_gpu(n_params, name, precision, world_size(), n_trained, frozen_bytes) < 0.8 * memory:
            return name
    fp64 = precision == "fp64"
    fits = [f"{name} on {n} GPUs" for n in (1, 2, 4, 8, 16, 32, 64) for name in (("zero2", "zero2_offload") if fp64 else STAGES[3:]) if n >= world_size()
            and memory_per_gpu(n_params, name, precision, n, n_trained, frozen_bytes) < 0.8 * memory]
    problems.append(f"the model does not fit: no ZeRO stage keeps {n_params / 1e9:.2f} G parameters in {precision} under 80 % of "
                    f"{memory / 1e9:.1f} GB on {world_size()} GPUs; smallest set-up that does: {fits[0] if fits else 'none up to 64 GPUs'}"
                    " (--ds_config zero2_offload or zero3_offload use the machine's memory; table: --estimate)")
    return "zero2" if fp64 else "zero3"


def read_ds_config(args, name, precision, problems):
    """The effective DeepSpeed configuration. Flags own batch, accumulation, clipping, precision and learning rate: a
    JSON may say "auto" there, its own value is refused. "auto" elsewhere means DeepSpeed's default."""
    path = pathlib.Path(name) if name.endswith(".json") else HERE / "ds_configs" / f"{name}.json"
    try:
        config = json.loads(path.read_text())
        stage = int(config.setdefault("zero_optimization", {}).setdefault("stage", 0))
        if stage not in range(4):
            raise ValueError(f"zero_optimization.stage is {stage}, expected 0 to 3")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        problems.append(f"--ds_config {name}: {path} cannot be used ({error}); expected a DeepSpeed JSON or one of {', '.join(STAGES)}")
        return None
    owners = {"train_batch_size": "--train_batch_size", "train_micro_batch_size_per_gpu": "--train_batch_size",
              "gradient_accumulation_steps": "--gradient_accumulation_steps", "gradient_clipping": "--max_grad_norm",
              "bf16": "--precision", "fp16": "--precision", "data_types": "--precision", "torch_autocast": "--precision",
              "optimizer": "--learning_rate, --weight_decay", "scheduler": "--lr_scheduler_type, --warmup_steps"}

    def own_values(part):
        values = part.values() if isinstance(part, dict) else part if isinstance(part, list) else [part]
        return any(own_values(v) if isinstance(v, (dict, list)) else v != "auto" for v in values)

    fp16_details = {k: v for k, v in config["fp16"].items() if k != "enabled"} if isinstance(config.get("fp16"), dict) else {}
    for key, flag in owners.items():
        if key in config:
            part = config.pop(key)
            part = part.get("params", {}) if key in ("optimizer", "scheduler") and isinstance(part, dict) else part
            part = part.get("enabled", "auto") if key in ("bf16", "fp16") and isinstance(part, dict) else part
            if own_values(part):
                problems.append(f"{path}: {key!r} has a value of its own; {flag} decides it: write \"auto\" or leave it out")
            elif key in ("optimizer", "scheduler"):
                log.info(f"{path}: section {key!r} is not used; {flag} decide")

    def without_auto(part):
        return {k: without_auto(v) for k, v in part.items() if v != "auto"} if isinstance(part, dict) else part

    config = without_auto(config)
    if precision == "bf16" and stage == 0:
        problems.append("--precision bf16 needs ZeRO stage 1 or more (bf16 with fp32 accumulation): --ds_config zero1, or bf16-mixed")
    if precision == "fp64" and stage not in (1, 2):
        problems.append("--precision fp64 exists at ZeRO stages 1 and 2 only: --ds_config zero1")
    if args.compile and stage == 3:
        problems.append("--compile does not go with ZeRO-3, whose hooks break the graph at every layer; use zero2")
    if (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none":
        config.setdefault("zero_force_ds_cpu_optimizer", False)
        log.warning(f"{path.name}: the optimizer runs on the CPU with torch AdamW (DeepSpeed's own would be compiled first)")
    config.update(
        train_micro_batch_size_per_gpu=max(1, args.train_batch_size // world_size()),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        gradient_clipping=args.max_grad_norm,  # always written: DeepSpeed's default is 1.0
        bf16={"enabled": precision == "bf16"}, fp16={**without_auto(fp16_details), "enabled": precision == "fp16"})
    if precision != "fp64":  # DeepSpeed's own choice is the weights' type: right for fp64, wrong for bf16
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if precision == "bf16":  # or gradients are rounded to bf16 where the ranks add theirs
        config.setdefault("communication_data_type", "fp32")
    if precision == "bf16-mixed":  # an outer torch.autocast is switched off by DeepSpeed on CUDA
        # no module's gradients are to be reduced in bf16 (DeepSpeed's default: those of all linear layers)
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


def param_groups(model, weight_decay):
    """AdamW groups: decay on matrices, none on vectors (norms, biases). Under ZeRO-3 a weight's shape is in ds_shape."""
    groups = {True: [], False: []}
    for weight in model.parameters():
        if weight.requires_grad:
            groups[len(getattr(weight, "ds_shape", weight.shape)) > 1].append(weight)
    return [{"params": weights, "weight_decay": weight_decay if decay else 0.0} for decay, weights in groups.items() if weights]


def warmup_steps(args, max_steps):
    """The flag, or min(2000, max_steps / 10); long ones are warned of."""
    warmup = min(2000, max_steps // 10) if args.warmup_steps is None else args.warmup_steps
    if warmup > max_steps / 3 and args.lr_scheduler_type != "constant":
        log.warning(f"--warmup_steps {warmup} is more than a third of {max_steps} steps; {min(2000, max_steps // 10)} is usual")
    return warmup


def flops_per_token(part, but):
    """Floating-point operations of a training step per token, attention scores not counted (so a lower bound): 6 per weight
    (Kaplan et al. 2020), 4 where it is frozen, for it has no gradient. but: names to leave out [regular expression]."""
    found = 4 * sum(m.in_features * m.out_features for m in part.modules() if isinstance(m, QuantizedLinear))
    return found + sum((6 if p.requires_grad else 4) * getattr(p, "ds_numel", p.numel()) for n, p in part.named_parameters() if not re.search(but, n))


def plan_steps(args, n_examples, steps_per_epoch, run_dir):
    """(max_steps, eval_steps, save_steps, warm-up) [optimizer steps] from flags and epochs; says so. n_examples: of an epoch."""
    max_steps = args.max_steps or math.ceil(args.num_epochs * steps_per_epoch)
    save_steps = steps_per_epoch if args.save_steps is None else args.save_steps
    warmup = warmup_steps(args, max_steps)
    log.info(f"{n_examples} training examples = {steps_per_epoch} steps per epoch; one step = {args.train_batch_size} examples "
             f"({args.train_batch_size // world_size()} per process) x {args.gradient_accumulation_steps}; {max_steps} steps, {warmup} of warm-up; "
             f"run folder {run_dir}")
    return max_steps, args.eval_steps or steps_per_epoch, save_steps, warmup


def lr_at(step, peak, schedule, warmup, max_steps):
    """Learning rate of the update from `step` to `step + 1`, in closed form; exactly 0 at max_steps (linear, cosine).

    lr_at(0, 1.0, "linear", 4, 10) = 0.25; the peak is reached by the 4th update. inverse_sqrt (Raffel et al. 2020) knows no
    max_steps: lr_at(15, 1.0, "inverse_sqrt", 4, 10) = sqrt(4 / 16); without warm-up it counts as one step long.
    """
    if schedule == "constant":
        return peak
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "inverse_sqrt":
        return peak * math.sqrt(max(1, warmup) / (step + 1))
    done = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    return peak * {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant_with_warmup": 1.0}[schedule]


def grad_norm_before_step(engine):
    """Global gradient norm where DeepSpeed reports none (stage 0 without loss scaling); else None. Before engine.step()."""
    if engine.zero_optimization() or engine.fp16_enabled():
        return None
    return float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))


def measured_tflops(device, dtype):
    """This GPU's rate in a plain matrix product [TFLOP/s]; the yardstick of mfu where --peak_tflops is not given."""
    a = torch.randn(8192, 8192, device=device, dtype=dtype)
    for repeat in range(8):
        if repeat == 3:
            torch.cuda.synchronize()
            start = time.perf_counter()
        a @ a
    torch.cuda.synchronize()
    return 5 * 2 * 8192**3 / (time.perf_counter() - start) / 1e12


def peak_memory_gb(device):
    """Largest memory use so far [GB]: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = pathlib.Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(peak.group(1)) * 1024 / 1e9 if peak else 0.0


# ------------------------------------------------------------------------------------------------ checkpoints


def checkpoints(run_dir):
    """All checkpoint-<step> folders, oldest first."""
    return sorted((p for p in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)), key=lambda p: int(p.name[11:]))


def latest_checkpoint(run_dir):
    """The newest complete checkpoint-<step>, or None. Unfinished ones are named and left alone."""
    for path in reversed(checkpoints(run_dir)):
        if (path / COMPLETE).exists():
            return path
        log.warning(f"{path} is unfinished (no file {COMPLETE}) and is not used")
    return None


def full_state_dict(model):
    """Collective under ZeRO-3. {name: whole CPU tensor} on rank 0, each tied weight once; {} on the others. Of a model with
    adapters: theirs."""
    only_adapter = adapter_kind(model) != "none"
    state, persistent = {}, () if only_adapter else set(model.state_dict())
    for name, weight in model.named_parameters():
        if only_adapter and not ADAPTER_NAMES.search(name):
            continue
        with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
            if rank() == 0:
                state[name] = weight.detach().to("cpu", copy=True)
    if rank() == 0:
        state.update({name: b.detach().to("cpu", copy=True) for name, b in model.named_buffers() if name in persistent})
        empty = [name for name, weight in state.items() if weight.numel() == 0]
        assert not empty, f"zero-size tensors in the export: {empty}"
    return state


def copy_weights(model, folder):
    """Collective. Copy the safetensors weights of `folder` into the model in place, also under ZeRO-3; those of adapters only
    where it has adapters."""
    kind = adapter_kind(model)
    prefix = "base_model.model." if kind == "lora" else ""
    files = [safetensors.safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}
    wanted = {name: weight for name, weight in model.named_parameters() if kind == "none" or ADAPTER_NAMES.search(name)}
    if kind != "none" and (other := {prefix + name for name in wanted} ^ set(where)):
        fail(f"{folder}: the adapter's weights and this model do not belong together: {', '.join(sorted(other)[:4])}")
    for name, weight in wanted.items():
        partitioned = hasattr(weight, "ds_id")
        with torch.no_grad(), deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=partitioned):
            if rank() == 0 or not partitioned:
                weight.copy_(where[prefix + name].get_tensor(prefix + name))


def save_adapter(model, weights, folder):
    """Rank 0. adapter_config.json and adapter_model.safetensors as PEFT writes them, or bottleneck_config.json and bottleneck.safetensors."""
    plan = model.adapter_plan
    name, file = ADAPTER_FILES[plan.kind]
    where = {"base_model_name_or_path": str(plan.base)}
    tokens = plan.token_ids or None
    if tokens and isinstance(model.get_output_embeddings(), HeadWithRows):
        layers = [layer.token_adapter for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
        leaves = [next(path for path, m in model.named_modules() if m is layer).rpartition(".")[2]
                  for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
        tokens = tokens if layers[0] is layers[1] else dict.fromkeys(leaves, tokens)
    if plan.kind == "bottleneck":
        write_json(folder / name, {**where, "reduction_factor": plan.reduction_factor, "dropout": plan.dropout, "parts": plan.parts,
                                   "trainable_token_indices": tokens})
    else:
        layers = {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}
        write_json(folder / name, {
            **where, "bias": "none", "fan_in_fan_out": any(isinstance(m.base_layer, Conv1D) or getattr(m.base_layer, "transposed", False)
                                                           for m in layers.values()),
            "inference_mode": True, "init_lora_weights": True, "lora_alpha": int(plan.alpha) if plan.alpha == int(plan.alpha) else plan.alpha,
            "lora_dropout": plan.dropout, "modules_to_save": None, "peft_type": "LORA", "r": plan.rank,
            "revision": None if plan.revision == "main" else plan.revision,
            "target_modules": sorted({path.rpartition(".")[2] for path in layers}) if plan.targets == "all-linear" else plan.targets,
            "task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM", "trainable_token_indices": tokens,
            "use_dora": False, "use_rslora": plan.rslora})
    prefix = "base_model.model." if plan.kind == "lora" else ""
    safetensors.torch.save_file({prefix + key: weight.contiguous() for key, weight in weights.items()}, folder / file, {"format": "pt"})


def _drop_frozen(module, state, prefix, _):
    """State-dict hook. DeepSpeed's exclude_frozen_parameters (0.19.8) overlooks second names of one weight, such as T5's tied embeddings."""
    for name, weight in module.named_parameters(remove_duplicate=False):
        if not weight.requires_grad:
            state.pop(prefix + name, None)


def fsync_tree(folder, pattern="**/*"):
    """Flush the files that match, and the folder itself, to the disk."""
    for path in [*(folder.glob(pattern) if pattern else []), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def save_checkpoint(engine, model, tokenizer, run_dir, step, state, rawtune, limit, best_step=None, extra=None):
    """Collective. checkpoint-<step>/: a Hugging Face folder (with adapters: only theirs), engine/ for resuming, state.json,
    rawtune.json. extra: rank 0's {"critic/model.safetensors": {name: CPU tensor}}, more files for it.

    Written as checkpoint-<step>.tmp, synced, marked COMPLETE, renamed: a kill at any moment leaves a whole checkpoint
    or a .tmp folder that the next start removes. Then all but the newest `limit` and the best are deleted.
    """
    done, aside = run_dir / f"checkpoint-{step}", run_dir / f"checkpoint-{step}.tmp"
    has_adapter = adapter_kind(model) != "none"
    try:
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        dist.barrier()
        weights = full_state_dict(model)
        if rank() == 0:
            if has_adapter:
                save_adapter(model, weights, aside)
            else:
                model.save_pretrained(aside, state_dict=weights)
            tokenizer.save_pretrained(aside)
            write_json(aside / "rawtune.json", rawtune)
            write_json(aside / "state.json", {**state, "step": step, "world_size": world_size(),
                                              "zero_stage": engine.zero_optimization_stage()})
            for name, tensors in (extra or {}).items():
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside / name, {"format": "pt"})
        del weights
        # universal_checkpoint_info lets the optimizer state move to another number of ranks
        hook = model.register_state_dict_post_hook(_drop_frozen) if has_adapter else None
        engine.save_checkpoint(str(aside / "engine"), tag="state", client_state={"universal_checkpoint_info": {}}, save_latest=False,
                               exclude_frozen_parameters=has_adapter)
        if hook:
            hook.remove()
        fsync_tree(aside)  # every rank: each node has pages of its own to write
        dist.barrier()
        if rank() == 0:
            (aside / COMPLETE).touch()
            fsync_tree(aside, "*")
            if done.exists():
                log.warning(f"{done} was there already; renamed to {move_aside(done)}")
            os.rename(aside, done)
            fsync_tree(run_dir, "")
            for old in checkpoints(run_dir)[:-limit]:
                if old.name != f"checkpoint-{best_step}":
                    trash = run_dir / f"{old.name}.tmp"  # renamed first: half a deletion is no checkpoint
                    os.rename(old, trash)
                    shutil.rmtree(trash)
    except (AssertionError, AttributeError, KeyError, TypeError):
        raise  # ours to mend
    except Exception as error:  # torch, safetensors and tokenizers each have a class of their own for a failed write
        free = shutil.disk_usage(run_dir).free / 1e9
        fail(f"step {step}: the checkpoint could not be written ({type(error).__name__}: {str(error).splitlines()[0]}; {free:.2f} GB free under {run_dir}). "
             "Earlier checkpoints are whole: make room and give the same command again", only_here=True)
    dist.barrier()


def universal_checkpoint(checkpoint):
    """Rank 0: engine/ converted so that another number of ranks can load it (kept beside it as universal/)."""
    target = checkpoint / "universal"
    if not target.exists():
        aside = checkpoint / "universal.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(checkpoint / "engine" / "state"),
                   "--output_folder", str(aside / "state"), "--num_extract_workers", "1", "--num_merge_workers", "1"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
        os.rename(aside, target)


def load_checkpoint(engine, checkpoint, universal):
    """Collective. Weights, optimizer and masters into a fresh engine."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    has_adapter = any(isinstance(module, (LoraLinear, BottleneckLinear)) for module in engine.module.modules())  # then the base is not in it
    path, _ = engine.load_checkpoint(str(checkpoint / ("universal" if universal else "engine")), tag="state", load_module_strict=not has_adapter)
    assert path is not None, f"DeepSpeed loaded nothing from {checkpoint}"
    # DeepSpeed 0.19.8's universal ZeRO-3 loader gives all groups ONE step tensor, which fused AdamW then advances once
    # per group, and the first group's weight decay
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    for group, decay in zip(optimizer.param_groups, decays):
        group["weight_decay"] = decay


def export_root(run_dir, checkpoint):
    """Rank 0: the run folder itself becomes a plain Hugging Face folder with the weights of `checkpoint`, and its critic/."""
    for stale in [*run_dir.glob("*.safetensors"), *run_dir.glob("*.safetensors.index.json")]:
        stale.unlink()  # of this run, before it was continued; the checkpoint has them newer
    for source in [*checkpoint.iterdir(), *checkpoint.glob("critic/*")]:
        if source.is_file() and source not in (checkpoint / COMPLETE, checkpoint / "state.json"):
            target = run_dir / source.relative_to(checkpoint)
            target.parent.mkdir(exist_ok=True)
            aside = target.with_name(f"{target.name}.tmp")
            aside.unlink(missing_ok=True)
            try:
                if source.suffix != ".safetensors":
                    raise OSError("small files are copied: people edit them")
                os.link(source, aside)  # no second copy of the weights where the file system can do this
            except OSError:
                shutil.copyfile(source, aside)
            os.replace(aside, target)
    (run_dir / COMPLETE).touch()
