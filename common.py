"""What the scripts share: processes, flags, run folders, data, models, DeepSpeed, checkpoints.

Loops, losses, collators and metrics are in the scripts; nothing here calls back into them.
A step is an optimizer step. Collective: every rank must call it.
"""

import argparse
import atexit
import collections
import concurrent.futures
import contextlib
import ctypes
import datetime
import difflib
import gzip
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
import zlib

# idle OpenMP threads must sleep: spinning ones slow two runs on one machine twentyfold
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# batches of ever new shapes would leave the GPU's memory in pieces
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# isort: split
import numpy as np
import safetensors
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.modeling_layers import GradientCheckpointingLayer

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or importing DeepSpeed begins with a warning

# isort: split
import deepspeed
import deepspeed.ops

STARTED = time.monotonic()
HERE = pathlib.Path(__file__).resolve().parent
COMPLETE = "COMPLETE"  # written last: a folder without this file is unfinished
EXIT_SAVED = 75  # saved after a signal or --max_hours: the same command continues
WINDOW = 64  # batches among which examples of like length are grouped
WEIGHT_ENDINGS = (".safetensors", ".bin")
FOREIGN_ENDINGS = (".h5", ".msgpack", ".pth", ".gguf", ".part")
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,  # with fp32 masters and fp32 sums of gradients
    "bf16-mixed": torch.float32,  # autocast
    "fp16": torch.float16,
}
PRECISION_ALIASES = {
    "32": "fp32",
    "32-true": "fp32",
    "bf16-true": "bf16",
    # both with fp32 masters and a loss scale
    "16-true": "fp16",
    "16-mixed": "fp16",
}

# ------------------------------------------------------------------------------------- processes


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size():
    """Processes of this run on this machine, as torchrun, deepspeed and srun say it."""
    env = os.environ
    return int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world_size())


def use_slurm_ranks():
    """srun alone starts the processes: put its numbers where torch and DeepSpeed look for them."""
    env = os.environ
    env["RANK"] = env["SLURM_PROCID"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_WORLD_SIZE"] = re.match(r"\d+", env["SLURM_STEP_TASKS_PER_NODE"])[0]  # 4(x2)
    first_host = re.match(r"([^\[,]+)(?:\[(\d+))?", env["SLURM_STEP_NODELIST"])  # gpu[07-09,12]
    env.setdefault("MASTER_ADDR", first_host[1] + (first_host[2] or ""))
    env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))


def adopt_launcher():
    """Find out which process of how many this is. What an earlier launcher left in the environment
    counts for nothing unless RANK is there."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        use_slurm_ranks()
    if "RANK" not in os.environ or world_size() == 1:
        # port 0 means a free one, so that two runs on one machine do not meet
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(address, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's own port is not used


def launch(main, args):
    """Run main(args) and leave with its exit code; without a launcher as rank 0 of 1."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of DeepSpeed's calls, at every step
    try:
        adopt_launcher()
        code = main(args) or 0
    except SystemExit as error:
        code = error.code
    except Exception as error:
        traceback.print_exc()
        code = 1
        # cuBLAS, NCCL and the CPU's allocator have errors of their own for it
        if re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)):
            code = 2
            print_error(
                "out of memory: halve --train_batch_size and double --gradient_accumulation_steps, "
                "or a higher ZeRO stage"
            )
    atexit._run_exitfuncs()  # wandb's: os._exit leaves them out
    sys.stdout.flush()
    os._exit(code)  # the interpreter's own end may abort in a thread of gloo (pytorch#190489)


def setup_distributed(args):
    """Collective. Start nccl, or gloo without GPUs; returns this process's device."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun sets 1, with which offloading crawls
        torch.set_num_threads(max(1, os.cpu_count() // local_world_size()))
    patience = datetime.timedelta(hours=2)  # rank 0 alone writes checkpoints
    if torch.cuda.is_available():
        backend = "nccl"
        device = choose_gpu()
        # cuDNN's attention may give NaN in backward, and plans anew for every shape
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        backend = "gloo"
        device = torch.device("cpu")
        # a build of this op that is killed leaves a lock on which all later runs wait
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # glibc gives freed memory back to the system: page faults would take a third of a step
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
    deepspeed.init_distributed(backend, verbose=False, timeout=patience)
    return device


def choose_gpu():
    n_gpus = torch.cuda.device_count()
    if n_gpus == 1 and "SLURM_PROCID" in os.environ:  # srun may show each process one GPU, number 0
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed looks here too
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def gather(rows):
    """Collective. The union of all ranks' dictionaries; of equal keys the lowest rank's."""
    of_ranks = [None] * world_size()
    dist.all_gather_object(of_ranks, rows)
    union = {}
    for of_rank in reversed(of_ranks):
        union.update(of_rank)
    return union


def on_one_process(build):
    """Collective. {name: array} of build(), which runs on one process per node; all processes map
    its arrays from a temporary file."""
    if world_size() == 1:
        return build()
    host = socket.gethostname()
    is_first = gather({host: rank()})[host] == rank()
    paths = {}
    if is_first:
        tensors = {name: torch.as_tensor(array) for name, array in build().items()}
        with tempfile.NamedTemporaryFile(prefix="rawtune-", delete=False) as file:
            torch.save(tensors, file)
        paths[host] = file.name
    path = gather(paths)[host]
    tensors = torch.load(path, mmap=True)
    dist.barrier()
    if is_first:
        os.unlink(path)  # what is mapped stays readable
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def derive_seed(*keys):
    """63 bits from any keys: the same on every machine, unrelated for different keys."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def log(text):
    if rank() == 0:
        tqdm.write(text)


def progress(items, text, **options):
    """The items; on a terminal with a bar where it takes long."""
    is_off = rank() > 0 or None  # None: unless this is a terminal
    return tqdm(items, text, delay=5, disable=is_off, leave=False, **options)


def print_error(text):
    print(f"ERROR {text}", file=sys.stderr, flush=True)


def fail(problems, only_here=False):
    """Print what the user has to mend and leave with exit code 2. A problem is a text, or (where,
    text) of a record; equal texts become one line."""
    if rank() and not only_here:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(20)  # rank 0 finds the same and speaks; then the launcher ends us
    if isinstance(problems, str):
        problems = [problems]
    places = collections.defaultdict(list)
    for problem in problems:
        where, text = ("", problem) if isinstance(problem, str) else problem
        places[text].append(where)
    for text, wheres in list(places.items())[:40]:
        if len(wheres) > 1:
            text = f"{len(wheres)} records, first {wheres[0]}: {text}"
        elif wheres[0]:
            text = f"{wheres[0]}: {text}"
        print_error(text)
    raise SystemExit(2)


# ------------------------------------------------------------------------------------------ flags

SHARED_FLAGS = {  # name: (default, help, *choices)
    # these eight come first in -h: everybody needs them
    "model_init_name": ("", "folder under models/"),
    "model_init_path": ("", "folder or hub id; wins over --model_init_name"),
    "data_name": (
        ["data"],
        "or --data: files under data/, or paths; NAME:0.05 and NAME:500 draw so much of one anew "
        "each epoch",
    ),
    "training_run_name": ("", "folder under models/ to write; else <model>_<data>_<seed>"),
    "train_batch_size": (16, "examples in one forward step of all processes together"),
    "max_steps": (0, "training length in optimizer steps; 0: --num_epochs decides"),
    "num_epochs": (4.0, "training length in epochs"),
    "learning_rate": (5e-5, "peak, reached after warm-up"),
    # training
    "mount_dir": ("", "where models/ and data/ are; else ./mount if it exists, else ."),
    "eval_fraction": (0.0, "share of the training prompts for evaluation"),
    "gradient_accumulation_steps": (1, "forward steps per optimizer step"),
    "max_hours": (0.0, f"save and leave with exit code {EXIT_SAVED} after this time"),
    "seed": (0, "of data order, dropout, sampling and new weights"),
    "lr_scheduler_type": (
        "linear",
        "shape after warm-up; constant has no warm-up",
        "linear",
        "cosine",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ),
    "warmup_steps": (-1, "-1: min(2000, max_steps / 10)"),
    "weight_decay": (0.0, "AdamW's, on matrices only"),
    "max_grad_norm": (1.0, "clip the gradient to this norm; 0: off"),
    # precision and ZeRO
    "precision": ("auto", "fp32, bf16, bf16-mixed, fp16; auto: bf16 where the GPU has it"),
    "ds_config": ("auto", "name in ds_configs/ or a JSON; auto: the lowest ZeRO stage that fits"),
    "gradient_checkpointing": (False, "recompute activations: less memory, 30 %% slower"),
    "compile": (False, "torch.compile; not with ZeRO-3"),
    "deterministic": (False, "the same bits on GPUs too, slower"),
    # adapters
    "lora_rank": (0, "train LoRA matrices of this rank and freeze the rest"),
    "lora_alpha": (0.0, "the update counts alpha / rank; 0: 2 x rank"),
    "lora_dropout": (0.0, "on the input of LoRA and of bottlenecks"),
    "lora_targets": ([], "ends of layer names, or all-linear; none: by family"),
    "train_adapter": (
        False,
        "train bottlenecks (Houlsby et al. 2019) instead of LoRA",
    ),
    "reduction_factor": (128, "hidden size / width of a bottleneck"),
    "adapter_parts": (
        ["mh_adapter", "output_adapter"],
        "behind attention, behind the feed-forward network",
        "mh_adapter",
        "output_adapter",
    ),
    "quantize": ("", "the frozen base in 4 or 8 bits (package bitsandbytes)", "nf4", "int8"),
    # evaluation and output
    "eval_steps": (0, "evaluation interval; 0: every epoch"),
    "eval_batch_size": (32, "rows of one evaluation batch of one process"),
    "metric_for_best": ("", "keep and export the best checkpoint by this metric"),
    "early_stopping_patience": (0, "stop after so many evaluations without a better one"),
    "no_train": (False, "evaluate only"),
    "save_steps": (-1, "checkpoint interval; -1: every epoch, 0: at the end"),
    "save_total_limit": (2, "newest checkpoints kept, besides the best"),
    "overwrite": (False, "start anew; the old folder becomes <run>.old-<time>"),
    "logging_steps": (10, "interval of metric rows"),
    "wandb_project": ("", "log to this W&B project too"),
}
# may differ when a run goes on: the mathematics stays the same
FREE_FLAGS = {
    "local_rank",
    "mount_dir",
    "training_run_name",
    "overwrite",
    "wandb_project",
    "ds_config",
    "max_hours",
    "save_steps",
    "save_total_limit",
    "eval_steps",
    "eval_batch_size",
    "compile",
    "gradient_checkpointing",
    "train_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
}
POSITIVE_FLAGS = (
    "train_batch_size",
    "gradient_accumulation_steps",
    "eval_batch_size",
    "learning_rate",
    "num_epochs",
    "logging_steps",
    "save_total_limit",
    "reduction_factor",
)


def add_flag(parser, name, default, text, *choices):
    names = [f"--{name}"]
    if name == "data_name":
        names.append("--data")
    if default is False:
        parser.add_argument(*names, action="store_true", help=text)
        return
    is_list = isinstance(default, list)
    parser.add_argument(
        *names,
        default=default,
        type=str if is_list else type(default),
        nargs="+" if is_list else None,
        choices=choices or None,
        metavar="X",
        help=f"{text} [{default}]" if default else text,
    )


class Parser(argparse.ArgumentParser):
    """argparse from tables of flags, with @file presets; an unknown flag names the nearest one.
    demo: the flags of a command that names neither model nor data."""

    def __init__(self, description, own_flags, demo="", shared_flags=SHARED_FLAGS):
        super().__init__(
            description=description,
            usage=argparse.SUPPRESS,
            allow_abbrev=False,
            fromfile_prefix_chars="@",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, spec in {**shared_flags, **own_flags}.items():  # a script's own default wins
            add_flag(self, name, *spec)
        self.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher gives it
        self.demo = demo

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

    def parse_args(self, argv):
        names = ("@", "-h", "--help", "--model", "--policy", "--data")
        if self.demo and not any(word.startswith(names) for word in argv):
            log(f"demo: python {self.prog} {self.demo}")
            argv = [*self.demo.split(), *argv]
        try:
            args, unknown = self.parse_known_args(argv)
        except (ValueError, RecursionError) as error:  # no UTF-8; an open quotation mark; itself
            self.error(f"a preset in '{shlex.join(argv)}' cannot be read: {error}")
        if unknown:
            name = unknown[0].lstrip("-").split("=")[0]
            near = difflib.get_close_matches(f"--{name}", self._option_string_actions, 3, 0.0)
            self.error(f"unknown argument {unknown[0]}: did you mean {', '.join(near)}?")
        return args

    def error(self, message):
        fail(f"{message} (all flags: -h)")


def resolve_precision(args, problems):
    if args.precision == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
        args.precision = "bf16" if has_bf16 else "fp32"
    args.precision = PRECISION_ALIASES.get(args.precision, args.precision)
    if args.precision not in DTYPES:
        problems.append(f"--precision {args.precision}: expected auto, {', '.join(DTYPES)}")


def check_shared_args(args, positive_flags, problems):
    """Append what cannot work to problems; resolve --precision. positive_flags: of the script."""
    for name, value in vars(args).items():
        lowest = -1 if name in ("warmup_steps", "save_steps") else 0
        is_zero = value == 0 and name in POSITIVE_FLAGS + positive_flags
        if isinstance(value, (int, float)) and (is_zero or not lowest <= value < math.inf):
            problems.append(f"--{name} {value}: expected a positive number")
    if args.train_batch_size % world_size():
        problems.append(
            f"--train_batch_size {args.train_batch_size} counts the examples of all "
            f"processes together and cannot be divided by {world_size()}"
        )
    if not args.model_init_name and not args.model_init_path:
        problems.append("no model: --model_init_name (under models/) or --model_init_path")
    if args.early_stopping_patience and not args.metric_for_best:
        problems.append("--early_stopping_patience needs --metric_for_best")
    for name, package in (("wandb_project", "wandb"), ("quantize", "bitsandbytes")):
        if getattr(args, name) and not importlib.util.find_spec(package):
            problems.append(f"--{name} needs the package {package}: pip install {package}")
    resolve_precision(args, problems)


# ------------------------------------------------------------------------------------- run folder


def mount(args):
    default = "mount" if os.path.isdir("mount") else "."
    return pathlib.Path(args.mount_dir or default)


def find_input(args, kind, name, endings, problems):
    """models/<name> or data/<name><ending>, under the mount, here or beside the script; or a path.
    Without endings a folder is meant."""
    folder = mount(args) / kind
    for root in (folder, pathlib.Path(kind), HERE / kind, pathlib.Path()):
        for ending in ("", *endings):
            path = root / f"{name}{ending}"
            if path.exists() and path.is_dir() == (not endings):
                return path
    names = [path.name for path in folder.glob("*")]
    near = difflib.get_close_matches(name, names, 12, 0.0)
    problems.append(f"{folder / name} not found; there is: {', '.join(near)}")
    return None


def write_json(path, value):
    """Write aside, then rename: a reader never sees half a file."""
    aside = pathlib.Path(f"{path}.tmp")
    text = json.dumps(value, indent=2, ensure_ascii=False)
    aside.write_text(text + "\n", "utf-8", errors="backslashreplace")  # half characters of a model
    os.replace(aside, path)


def run_name(args):
    if args.training_run_name:
        return args.training_run_name
    model = args.model_init_path or args.model_init_name
    data = "+".join(args.data_name)
    ending = "eval" if args.no_train else args.seed
    if "WANDB_SWEEP_ID" in os.environ:  # or the trials of a sweep would share a folder
        ending = os.environ["WANDB_RUN_ID"]
    return f"{model}_{data}_{ending}".replace("/", "_")


class Run:
    """A run folder, and where its training stands: the bookkeeping around a loop, not the loop."""

    def __init__(self, args, free_flags, ds_config, data_sha256, problems):
        """free_flags: of the script, may differ when a run goes on. Where there are problems,
        ds_config may be None."""
        self.args = args
        self.dir = mount(args) / "models" / run_name(args)
        self.tracker = None
        self.resume_from = None
        self.signal = None
        self.deadline = STARTED + 3600 * (args.max_hours or math.inf)
        self.state = {
            "step": 0,
            "last_eval": -1,
            "loss_sum": 0.0,  # since the last train row
            "n_targets": 0,
            "bad_evals": 0,
            "log_bytes": 0,
            "best_score": None,
            "best_step": None,
        }
        self.record = {
            **vars(args),
            # the product counts, not how it is made
            "batch": args.train_batch_size * args.gradient_accumulation_steps,
            # the layout counts for the bits of a resumed run
            "world_size": world_size(),
            "zero_stage": ds_config and ds_config["zero_optimization"]["stage"],
            "data_sha256": data_sha256,
        }
        if self.dir.exists() and not args.overwrite:
            self.look_at_earlier_run(FREE_FLAGS | free_flags, problems)

    @property
    def step(self):
        return self.state["step"]

    def look_at_earlier_run(self, free_flags, problems):
        """Refuse to mix two runs in one folder, or take up the one that is there."""
        names = {path.name for path in self.dir.iterdir()}
        if names <= {"args.json.tmp"}:  # of a start that was killed
            return
        if "args.json" not in names:
            problems.append(f"{self.dir} is no run folder: choose another --training_run_name")
            return
        earlier = json.loads((self.dir / "args.json").read_text())
        if self.args.no_train and earlier["no_train"]:
            return  # evaluated again, perhaps with other flags
        checkpoints = complete_checkpoints(self.dir)
        if checkpoints:
            self.resume_from = checkpoints[-1]
            self.state = json.loads((self.resume_from / "state.json").read_text())
        if (self.dir / COMPLETE).exists():
            free_flags = free_flags | {"max_steps", "num_epochs"}  # a finished run is extended
        changed = []
        for key, value in self.record.items():
            if key not in free_flags and earlier.get(key) != value:
                changed.append(f"{key} was {earlier.get(key)}")
        if changed and not problems:
            problems.append(
                f"{self.dir} is another run ({'; '.join(changed)}): make it the same to go on; or "
                "--overwrite; or another --training_run_name, perhaps with --model_init_path "
                f"{self.dir}/checkpoint-N"
            )

    def start(self, script, max_steps=0, steps_per_epoch=1):
        """Collective. Make the folder and write down what runs; leave if it is finished."""
        self.max_steps = max_steps
        self.steps_per_epoch = steps_per_epoch
        if not self.args.no_train:  # else there is nothing to save
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, self.on_signal)
        is_exported = self.resume_from and (self.dir / COMPLETE).exists()
        dist.barrier()  # nobody is still looking at what an earlier run has left
        if is_exported and self.finished():
            log(f"{self.dir} is finished: a larger --max_steps goes on")
            raise SystemExit(0)
        if rank() == 0:
            self.prepare_folder(script)
        dist.barrier()

    def prepare_folder(self, script):
        """Rank 0."""
        if self.dir.exists() and (self.args.overwrite or self.args.no_train):
            os.rename(self.dir, f"{self.dir}.old-{time.time_ns()}")
        self.dir.mkdir(parents=True, exist_ok=True)
        about = {
            **self.record,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "deepspeed": deepspeed.__version__,
            "command": sys.argv,
        }
        write_json(self.dir / "args.json", about)
        (self.dir / COMPLETE).unlink(missing_ok=True)  # an extended run is unfinished again
        for leftover in self.dir.glob("checkpoint-*.tmp"):  # of a killed process
            shutil.rmtree(leftover)
        (self.dir / "code").mkdir(exist_ok=True)
        for source in (script, __file__):
            shutil.copy(source, self.dir / "code")
        # what is computed again is logged again: rows stay unique by (step, split)
        with open(self.dir / "metrics.jsonl", "a") as file:
            file.truncate(self.state["log_bytes"])
        if self.args.wandb_project:
            self.start_wandb()

    def resume(self, engine):
        """Collective. The weights and the optimizer of the last checkpoint, if there is one."""
        if self.resume_from:
            load_checkpoint(engine, self.resume_from)
        log(
            f"{self.dir}: from step {self.step} to {self.max_steps}, {self.args.precision}, ZeRO "
            f"stage {engine.zero_optimization_stage()}, {world_size()} x {engine.device.type}"
        )
        self.restart_clock()

    def start_wandb(self):
        import wandb  # optional package; WANDB_ENTITY and the like are its own business

        run_id = self.state.setdefault("wandb_id", str(time.time_ns()))
        os.environ.setdefault("WANDB_RUN_ID", run_id)
        self.tracker = wandb.init(
            project=self.args.wandb_project,
            name=self.dir.name,
            config=self.record,
            resume="allow",
        )

    def on_signal(self, number, frame):
        """The first one asks for saving. A second Ctrl-C quits, but only 5 seconds later: launchers
        repeat the first one at once."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self.signal_time = number, now
        elif number == signal.SIGINT and now - self.signal_time > 5:
            os._exit(130)

    def restart_clock(self):
        self.clock = time.perf_counter()
        self.timed_targets = 0

    def log(self, split, metrics):
        """One line of metrics.jsonl and of the screen; W&B's names are those of metrics.jsonl."""
        if rank() == 0:
            row = {"step": self.step, "epoch": self.step / self.steps_per_epoch, "split": split}
            shown = []
            for name, value in metrics.items():
                row[name if split == "train" else f"{split}/{name}"] = value
                shown.append(f"{name} {value:.4g}")
            with open(self.dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
                self.state["log_bytes"] = file.tell()
            log(f"step {self.step:>6} {split:<5} {'  '.join(shown)}")
            if self.tracker:
                self.tracker.log(row, step=self.step)
        self.restart_clock()

    def stepped(self, loss, n_targets, **others):
        """Count an optimizer step; every --logging_steps a row with the mean loss since then."""
        state = self.state
        state["step"] += 1
        state["loss_sum"] += loss * n_targets
        state["n_targets"] += n_targets
        self.timed_targets += n_targets
        if self.step % self.args.logging_steps and self.step != self.max_steps:
            return
        metrics = {
            "loss": state["loss_sum"] / state["n_targets"],
            "tokens_per_sec": self.timed_targets / (time.perf_counter() - self.clock),
            "target_tokens": state["n_targets"],
            **others,
            # on CPU of the whole process
            "peak_memory_gb": deepspeed.get_accelerator().max_memory_allocated() / 1e9,
        }
        self.log("train", metrics)
        state.update(loss_sum=0.0, n_targets=0)

    def evaluated(self, metrics, low_is_better=("loss",)):
        """Log an evaluation, keep which was the best, and write that into the checkpoint."""
        self.log("eval", metrics)
        state = self.state
        state.update(last_eval=self.step, metrics=metrics)
        name = self.args.metric_for_best
        if name and name not in metrics:
            fail(f"--metric_for_best {name}: expected one of {', '.join(metrics)}")
        if name and self.step:
            sign = -1 if name.split("/")[-1] in low_is_better else 1
            score = [sign * metrics[name], -metrics.get("loss", 0.0)]  # the loss breaks a tie
            state["bad_evals"] += 1
            if state["best_score"] is None or score > state["best_score"]:
                state.update(best_score=score, best_step=self.step, bad_evals=0)
        path = self.dir / f"checkpoint-{self.step}" / "state.json"
        if rank() == 0 and path.exists():
            write_json(path, state)

    def must_stop(self):
        return self.signal is not None or time.monotonic() > self.deadline

    def finished(self):
        patience = self.args.early_stopping_patience
        return self.step >= self.max_steps or 0 < patience <= self.state["bad_evals"]

    def eval_is_due(self):
        interval = self.args.eval_steps or self.steps_per_epoch
        is_due = self.step % interval == 0 or self.step >= self.max_steps
        return is_due and self.state["last_eval"] != self.step

    def save_is_due(self):
        """Before every evaluation too. --save_steps 0: only at the end, and where the best is
        looked for."""
        interval = self.args.save_steps
        if interval == 0:
            return self.finished() or (self.args.metric_for_best != "" and self.eval_is_due())
        if interval < 0:
            interval = self.steps_per_epoch
        return self.finished() or self.eval_is_due() or self.step % interval == 0

    def chosen(self):
        """The checkpoint to export: the best, or the last where there is no --metric_for_best."""
        return self.dir / f"checkpoint-{self.state['best_step'] or self.step}"

    def plot_curves(self):
        """Rank 0. curves.png, where matplotlib is installed."""
        try:
            from matplotlib.figure import Figure  # optional package
        except ImportError:
            return
        figure = Figure()
        axes = figure.add_subplot(xlabel="step", ylabel="loss")
        lines = (self.dir / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        for split, name in (("train", "loss"), ("eval", "eval/loss")):
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points), label=split)
        axes.legend()
        figure.savefig(self.dir / "curves.png")


# ------------------------------------------------------------------------------------- data files

DATA_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SPLITS = ("train", "eval", "test")
INNER_MARK = "a byte order mark inside the file: remove it"


def parse_data_spec(spec, problems):
    """'a' -> ('a', None); 'a:0.05' -> ('a', 0.05), a fraction; 'a:500' -> ('a', 500), examples."""
    match = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", spec)
    if not match:
        return spec, None
    name, amount = match.groups()
    is_fraction = "." in amount
    value = float(amount) if is_fraction else int(amount)
    if value == 0 or (is_fraction and value > 1):
        problems.append(f"--data {spec}: expected a fraction like :0.05 or a count like :500")
    return name, value


def unique_keys(pairs):
    """For json: of a repeated key it would silently keep the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = ", ".join(key for key, _ in pairs)
        raise ValueError(f"a key is repeated among {names}: rename it")
    return record


def refuse_constant(word):
    raise ValueError(f"{word} is no JSON: write null or a number")


def parse_json(text):
    """The value of a JSON text; a ValueError names the remedy. json would take some of it."""
    if text.startswith("\ufeff"):
        raise ValueError(INNER_MARK)
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply: write the inside as text") from None


def open_text(path, newline=None):
    open_file = gzip.open if path.suffix == ".gz" else open
    # a byte that is not UTF-8 becomes half a character, so that its record can be named; utf-8-sig
    # drops the mark that Windows writes at the start of a file
    return open_file(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def read_records(path, problems):
    """Yield (where, split, record) of a file of JSON lines, of a list, or of lists by split."""
    where = path
    found = []
    try:
        with open_text(path) as file:
            if ".jsonl" in path.name:
                for number, line in enumerate(file, start=1):
                    where = f"{path}, line {number}"
                    if line.strip():
                        found.append((where, "train", parse_json(line)))
            else:
                lists = parse_json(file.read())
                if not isinstance(lists, dict):
                    lists = {"train": lists}
                for split, records in lists.items():
                    for i, record in enumerate(records):
                        found.append((f"{path}, {split}[{i}]", split, record))
    except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
        problems.append(f"{where}: {error}; expected lists train, eval, test, or lines in a .jsonl")
    for where, split, record in found:
        if not isinstance(record, dict):
            problems.append((where, f"{record!r:.40}: expected an object"))
            continue
        split = record.pop("split", split)
        if split in SPLITS:
            yield where, split, record
        else:
            problems.append((where, f"split {split!r}, expected {', '.join(SPLITS)}"))


def text_problem(text, name, record):
    """What is wrong with a text of a record, or None."""
    if text is None and name not in record:
        keys = ", ".join(record)
        return f"{name!r} is missing; there is {keys}: data/prepare_table.py can rename them"
    if not isinstance(text, str) or not text.strip():
        return f"{name!r} is {text!r:.40}, expected text"
    if re.search("[\ud800-\udfff]", text):
        return f"{name!r} holds bytes that are no UTF-8, or half a character"
    return None


def is_held_out(args, key):
    """Whether --eval_fraction takes an example: by its prompt, so that repeats stay together."""
    return derive_seed("held out", key) % 10**6 < args.eval_fraction * 10**6


def read_data_sets(args, problems):
    """([(data set, where, split, record)] of --data, {data set: how much an epoch takes of it})"""
    records = []
    amounts = {}
    for spec in args.data_name:
        name, amount = parse_data_spec(spec, problems)
        if name in amounts:
            problems.append(f"--data {name}: named twice")
        amounts[name] = amount
        path = find_input(args, "data", name, DATA_ENDINGS, problems)
        if path:
            records += [(name, *found) for found in read_records(path, problems)]
    return records, amounts


def check_examples(args, examples, amounts, problems):
    """Sizes of the training parts. examples: {split: [what has a .data_set and a .key]}; a key is
    what two examples share when one gives the other's answer away."""
    sizes = collections.Counter(example.data_set for example in examples["train"])
    for name, amount in amounts.items():
        if isinstance(amount, int) and amount > sizes[name] and not args.no_train:
            problems.append(f"--data {name}:{amount}: it has {sizes[name]} training records")
    if not examples["train"] and not args.no_train:
        problems.append("no training records: a list train, or JSON lines")
    if not examples["eval"] and not (args.no_train and examples["test"]):
        problems.append("no evaluation records: a list eval, or --eval_fraction 0.05")
    train_keys = {example.key for example in examples["train"]}
    eval_keys = {example.key for example in [*examples["eval"], *examples["test"]]}
    n_seen = len(train_keys & eval_keys)
    if n_seen:
        log(f"WARNING {n_seen} prompts of the evaluation are in the training data too")
    return [sizes[name] for name in amounts]


def sha256_of(arrays):
    """Of {name: array}."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()


def tokenize(tokenizer, texts):
    """[(n,) token ids] of a list of texts, in blocks, with a progress bar where it takes long."""
    rows = []
    blocks = range(0, len(texts), 1000)
    for start in progress(blocks, "tokenising"):
        rows += map(np.int32, tokenizer(texts[start : start + 1000]).input_ids)
    return rows


class Ragged:
    """Rows of token ids in one array: ragged[i] -> (n,); .lengths: (rows,)."""

    def __init__(self, name, arrays):
        self.values = arrays[name]
        self.lengths = arrays[f"{name}_lengths"]
        self.ends = np.cumsum(self.lengths)

    def __getitem__(self, i):
        start = self.ends[i] - self.lengths[i]
        return self.values[start : self.ends[i]]

    @staticmethod
    def arrays(name, rows):
        """{name: array} of a list of (n,) ids, as the constructor reads them."""
        values = np.concatenate([np.zeros(0, np.int32), *rows])
        lengths = np.array([len(row) for row in rows], np.int64)
        return {name: values, f"{name}_lengths": lengths}


# ------------------------------------------------------------------------------ order of examples


def length_cells(ids, lengths, batch):
    """Cut ids into arrays of `batch` that are alike in both lengths, (N, 2): sort by target length,
    cut into a few runs, sort each of these by source length and cut it into batches."""
    ids = ids[np.argsort(lengths[ids, 1], kind="stable")]
    run = batch * max(1, round(math.sqrt(len(ids) / batch)))
    cells = []
    for start in range(0, len(ids), run):
        members = ids[start : start + run]
        members = members[np.argsort(lengths[members, 0], kind="stable")]
        cells += np.split(members, range(batch, len(members), batch))
    return cells


class Order:
    """Which examples step k has: a function of (seed, k, batch), the same for any number of ranks.
    A batch is a cell of a random window of batches, so that little padding is needed."""

    def __init__(self, seed, batch, sizes, amounts):
        """Of each data set its size and how much of it an epoch takes, see parse_data_spec."""
        self.seed = seed
        self.epoch = None
        self.batch = batch
        self.sizes = sizes
        self.takes = []
        for size, amount in zip(sizes, amounts):
            if isinstance(amount, float):
                amount = min(size, max(1, round(amount * size)))
            self.takes.append(size if amount is None else amount)
        self.steps_per_epoch = max(1, math.ceil(sum(self.takes) / self.batch))

    def start_epoch(self, epoch, lengths):
        drawn = []
        first_id = 0
        for k, (size, take) in enumerate(zip(self.sizes, self.takes)):
            rng = np.random.default_rng([1, self.seed, epoch, k])
            drawn.append(rng.permutation(size)[:take] + first_id)
            first_id += size
        rng = np.random.default_rng([2, self.seed, epoch])
        ids = rng.permutation(np.concatenate(drawn))
        # sorting within a window only: batches stay random, yet hold examples of like length
        n_full = len(ids) // self.batch * self.batch
        batches = []
        for window in np.split(
            ids[:n_full], range(WINDOW * self.batch, n_full, WINDOW * self.batch)
        ):
            batches += length_cells(window, lengths, self.batch)
        # shuffled again, or an epoch would go from short examples to long ones
        self.batches = [batches[k] for k in rng.permutation(len(batches))]
        self.batches.append(ids[n_full:])  # the short last step
        self.epoch = epoch

    def step_ids(self, step, lengths):
        """(batch,) example numbers over all data sets; lengths: (N, 2) by example."""
        epoch, i = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.start_epoch(epoch, lengths)
        return self.batches[i]


def deal(ids, sizes, n_pieces):
    """Cut the examples of a step into pieces of like lengths and about equal token counts."""
    ids = ids[np.argsort(-sizes[ids], kind="stable")]
    n_tokens = np.cumsum(sizes[ids])
    # an example belongs to the piece in which its middle token falls
    middles = n_tokens - sizes[ids] / 2
    piece = np.minimum(middles * n_pieces // n_tokens[-1], n_pieces - 1)
    return [ids[piece == i] for i in range(n_pieces)]


def my_batches(lengths, batch_size):
    """This rank's evaluation batches, longest first; as many on each rank, some empty. A batch is
    never split, so that its padding and every digit are the same for any number of ranks."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    # a rank without a batch still joins every collective call of the others
    batches += [[]] * (-len(batches) % world_size())
    return progress(batches[rank() :: world_size()], "evaluating")


def ahead(function, first, last):
    """Yield (step, function(step)); a thread computes the next one meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pending = pool.submit(function, first)
        for step in progress(range(first, last), "training", initial=first, total=last):
            result = pending.result()
            pending = pool.submit(function, step + 1)
            yield step, result


def to_tensors(arrays):
    """{name: int64 tensor}, in memory from which a GPU can copy while it computes."""
    tensors = {}
    for name, array in arrays.items():
        tensor = torch.as_tensor(np.asarray(array, np.int64))
        tensors[name] = tensor.pin_memory() if torch.cuda.is_available() else tensor
    return tensors


def to_device(batch, device):
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


# ---------------------------------------------------------------------------------------- prompts

ROLES = {  # other names of the three
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "developer": "system",
}


class Prompts:
    """Conversations as the ids of the tokenizer's chat template: the same in training and chat.
    is_raw: no template, texts as they are. Methods raise ValueError: what is wrong with a record.

    end_token: ends a reply; stop_ids: where to stop a generation; begin: ids in front of raw text.
    """

    def __init__(self, tokenizer, is_raw=False):
        self.tokenizer = tokenizer
        self.is_raw = is_raw
        bos = tokenizer.bos_token_id
        self.begin = [bos] if bos in tokenizer("a").input_ids[:1] else []
        self.end_token = tokenizer.eos_token
        added = tokenizer.added_tokens_decoder.values()
        names = [re.escape(token.content) for token in added if token.special]
        self.special = re.compile("|".join(sorted(names, key=len, reverse=True)) or "(?!)")
        if not is_raw:
            text = self.render(
                [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A."}]
            )
            ending = self.special.match(text.rpartition("A.")[2].lstrip())
            if not ending:
                raise ValueError(f"the chat template writes no end token after a reply: {text!r}")
            self.end_token = ending[0]
        end_id = tokenizer.convert_tokens_to_ids(self.end_token)
        self.stop_ids = sorted({end_id, tokenizer.eos_token_id})

    @staticmethod
    def messages(record):
        """[{"role", "content"}] of OpenAI's messages or ShareGPT's conversations."""
        conversation = []
        messages = record.get("messages", record.get("conversations"))
        if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
            raise ValueError("expected messages: a list of objects with role and content")
        for message in messages:
            for name in ("tool_calls", "tools"):
                if message.get(name) or record.get(name):
                    raise ValueError(f"{name!r} is not supported: write it into the texts")
            role = message.get("role", message.get("from"))
            role = ROLES.get(str(role), role)
            if role not in ("system", "user", "assistant", "tool"):
                raise ValueError(f"role {role!r}, expected system, user, assistant or tool")
            content = message.get("content", message.get("value"))
            problem = text_problem(content, "content", message)
            if problem:
                raise ValueError(problem)
            turn = {"role": role, "content": content}
            if "weight" in message:
                turn["weight"] = message["weight"]
                if turn["weight"] not in (0, 1):
                    raise ValueError(f"weight {turn['weight']!r}, expected 0 (not trained) or 1")
            conversation.append(turn)
        return conversation

    def render(self, messages, reply_follows=False):
        """The text of a conversation; reply_follows: as far as the assistant's next words."""
        for message in messages:
            spelled = self.special.search(message["content"])
            if spelled:
                raise ValueError(f"the text holds the special token {spelled[0]!r}: remove it")
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=reply_follows
            )
        except Exception as error:  # of jinja, or of what a template does to a message
            raise ValueError(f"the chat template fails: {error}") from None

    def decode(self, ids):
        """The text of a reply. Only pad, begin and end are dropped: others may be its content."""
        tokenizer = self.tokenizer
        dropped = {tokenizer.pad_token_id, tokenizer.bos_token_id, *self.stop_ids}
        return tokenizer.decode([i for i in ids if i not in dropped])


# ------------------------------------------------------------------------------------------ model


def auto_class_of(config):
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def count_positions(config):
    """Tokens that a model can number; infinitely many where only distances count."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def adapter_base(source):
    """The model that an adapter folder belongs to; None for a plain model."""
    for path in pathlib.Path(source).glob("*_config.json"):
        base = json.loads(path.read_text()).get("base_model_name_or_path")
        if base:
            return base
    return None


def read_about(folder):
    """rawtune.json of a trained model: how it was trained. {} of other models."""
    path = pathlib.Path(folder, "rawtune.json")
    return json.loads(path.read_text()) if path.is_file() else {}


def has_weights(base):
    """Of a hub id we assume so."""
    folder = pathlib.Path(base)
    return not folder.is_dir() or any(path.suffix in WEIGHT_ENDINGS for path in folder.glob("*"))


def check_weights(folder, problems):
    """A folder without weights is trained from scratch: see to it that it was meant to be empty."""
    for path in folder.glob("*"):
        is_pointer = path.suffix in WEIGHT_ENDINGS and path.stat().st_size < 1000
        is_foreign = path.suffix in FOREIGN_ENDINGS and not has_weights(folder)
        if is_pointer or is_foreign:
            problems.append(f"{path}: expected weights in safetensors; of Git LFS: git lfs pull")


def open_model(args, problems):
    """(source, config, tokenizer) of the model that the flags name; no weights yet."""
    source = args.model_init_path
    if not source and args.model_init_name:
        source = find_input(args, "models", args.model_init_name, [], problems)
    if not source:
        return None, None, None
    base = adapter_base(source) or source
    try:
        config = transformers.AutoConfig.from_pretrained(base)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, config=config)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        problems.append(f"model {source}: {str(error).strip().splitlines()[0]}")
        return None, None, None
    check_weights(pathlib.Path(base), problems)
    vocabulary = len(tokenizer.get_vocab()) - len(tokenizer.get_added_vocab())
    if vocabulary < 10:
        problems.append(f"{source} has no tokenizer: tokenizer.json or spiece.model is missing")
    n_rows = config.get_text_config().vocab_size
    is_fixed = args.no_train or args.lora_rank or args.train_adapter or base != source
    if len(tokenizer) > n_rows and is_fixed:
        problems.append(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, the embedding {n_rows} rows; "
            "only training of all weights adds rows"
        )
    return str(source), config, tokenizer


def untie_head(auto_class, config):
    """transformers ties every T5's head to its embedding, though v1.1 (Flan-T5) and mT5 have one
    of their own, which ZeRO-3 would lose. Before a model is made. Returns whether it has one."""
    is_v1_1 = getattr(config, "scale_decoder_outputs", True) is False
    has_own_head = config.model_type == "mt5" or is_v1_1
    if config.model_type in ("t5", "mt5"):
        model_class = auto_class._model_mapping[type(config)]
        tied = {**model_class._tied_weights_keys, "lm_head.weight": "shared.weight"}
        if has_own_head:
            del tied["lm_head.weight"]
        model_class._tied_weights_keys = tied
    return has_own_head


class Zero3:
    """What from_pretrained asks, to load weights partitioned; transformers' own class for it wants
    accelerate."""

    def __init__(self, ds_config):
        self.config = ds_config

    def is_zero3(self):
        return True


def load_weights(auto_class, base, config, args, ds_config):
    """New ones from the seed where a folder has none. ds_config: where ZeRO-3 partitions them while
    they are loaded, else None."""
    has_own_head = untie_head(auto_class, config)
    torch.manual_seed(derive_seed(args.seed, "new weights"))
    dtype = DTYPES[args.precision]
    if not has_weights(base):
        log(f"{base} has no weights: training from scratch")
        model = auto_class.from_config(config).to(dtype)
        if has_own_head:  # transformers starts it with a deviation of 1; t5x: variance 1 / fan-in
            model.lm_head.weight.data.mul_(config.d_model**-0.5)
        return model
    zero3 = Zero3(ds_config)  # transformers keeps a weak reference
    if ds_config:
        set_hf_deepspeed_config(zero3)
    try:
        model, info = auto_class.from_pretrained(
            base, config=config, dtype=dtype, output_loading_info=True
        )
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        fail(f"{base}: its weights cannot be loaded ({error})")
    unset_hf_deepspeed_config()  # from here on models are made whole again
    if info["missing_keys"]:
        fail(f"{base}: weights are missing, such as {sorted(info['missing_keys'])[:5]}")
    return model


def load_model(auto_class, source, config, args, ds_config, tokenizer):
    """Collective. The model in --precision's dtype, with adapters."""
    base = adapter_base(source) or source
    n_tokens = len(tokenizer)
    is_grown = n_tokens > config.get_text_config().vocab_size
    if is_grown or ds_config["zero_optimization"]["stage"] < 3:
        ds_config = None
    model = load_weights(auto_class, base, config, args, ds_config)
    if is_grown:
        log(f"the embedding grows to {n_tokens} tokens")
        model.resize_token_embeddings(n_tokens)
    if args.lora_rank or args.train_adapter or args.quantize or base != source:
        import adapters

        adapters.install(model, source, base, args)
    for module in model.modules():
        if type(getattr(module, "act", None)).__name__ == "NewGELUActivation":
            module.act = torch.nn.GELU(approximate="tanh")  # one kernel: 5 % of a step of T5 v1.1
        if args.compile and isinstance(module, GradientCheckpointingLayer):  # a layer's block
            module.compile(dynamic=True)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    dist.barrier()  # DeepSpeed's own first meeting has a time-out of 10 minutes
    return model.train()


@contextlib.contextmanager
def generating(engine, settings):
    """Collective. The model to call generate on. Under ZeRO-3 its weights are whole meanwhile: to
    gather each of them again for every token takes ten times as long."""
    engine.eval()
    model = engine.module.model
    gathered = contextlib.nullcontext()
    if engine.zero_optimization_partition_weights():
        gathered = deepspeed.zero.unwrap_model_for_generation(engine)
    # generate fills gaps of its arguments from the model's own settings, so these are replaced
    inherited = model.generation_config
    model.generation_config = settings
    is_mixed = engine.torch_autocast_enabled()
    autocast = torch.autocast(engine.device.type, torch.bfloat16, enabled=is_mixed)
    with gathered, torch.no_grad(), autocast:
        yield model
    model.generation_config = inherited
    engine.train()


# -------------------------------------------------------------------------- DeepSpeed, optimizer


def without_auto(pairs):
    """Hugging Face's JSONs say "auto" where DeepSpeed's default or a flag of ours is meant."""
    return {key: value for key, value in pairs if value != "auto"}


def needs_masters(args):
    """Whether weights need the fp32 copy that ZeRO keeps of them, from stage 1 on."""
    return args.precision in ("bf16", "fp16") and not args.no_train


def make_ds_config(args, auto_class, model_config, problems):
    """DeepSpeed's configuration: the JSON of --ds_config, in which batch, clipping and precision
    are the flags'."""
    if type(model_config) not in auto_class._model_mapping:
        problems.append(f"a {model_config.model_type} writes no text: expected another model")
        return None
    if args.precision not in DTYPES:
        return None
    if args.precision == "fp16" and "t5" in model_config.model_type:
        problems.append("--precision fp16: T5 overflows in it; use bf16 or fp32")
    name = args.ds_config
    if name == "auto":
        name = choose_stage(args, auto_class, model_config, problems)
    path = pathlib.Path(name) if name.endswith(".json") else HERE / "ds_configs" / f"{name}.json"
    try:
        config = json.loads(path.read_text(), object_pairs_hook=without_auto)
        stage = config["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"--ds_config {name}: {path} cannot be used ({error!r})")
        return None
    if args.no_train and stage < 3:
        stage = config["zero_optimization"]["stage"] = 0  # there is no optimizer to partition
    if "optimizer" in config or "scheduler" in config:
        problems.append(f"{path}: remove optimizer and scheduler; --learning_rate etc. decide")
    if stage == 0 and needs_masters(args):
        problems.append(f"--precision {args.precision} needs ZeRO: --ds_config zero1 or higher")
    if stage == 3 and (args.compile or args.quantize):
        problems.append("--compile and --quantize do not go with ZeRO-3: --ds_config zero2")
    # what the flags decide is written always, for DeepSpeed's defaults differ from ours
    config.pop("train_batch_size", None)
    config.update(
        train_micro_batch_size_per_gpu=max(1, args.train_batch_size // world_size()),
        gradient_accumulation_steps=1,  # the loops accumulate by hand; DeepSpeed is not to divide
        gradient_clipping=args.max_grad_norm,
        bf16={"enabled": args.precision == "bf16" and stage > 0},
        fp16={"enabled": args.precision == "fp16" and stage > 0},
        torch_autocast={
            "enabled": args.precision == "bf16-mixed",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        data_types={"grad_accum_dtype": "fp32"},
        zero_force_ds_cpu_optimizer=False,  # torch's AdamW is as fast and needs no compiler
    )
    if args.precision == "bf16":  # or gradients are rounded to bf16 where ranks add theirs
        config.setdefault("communication_data_type", "fp32")
    try:
        deepspeed.DeepSpeedConfig(config)
    except Exception as error:  # of many types
        problems.append(f"--ds_config {name}: {error}")
    return config


def choose_stage(args, auto_class, config, problems):
    """The lowest ZeRO stage whose weights, gradients and AdamW state fill less than 80 % of memory
    (Rajbhandari et al. 2020, table 1); activations need the rest."""
    untie_head(auto_class, config)
    with torch.device("meta"):
        model = auto_class.from_config(config)
    n_params = sum(weight.numel() for weight in model.parameters())
    memory = deepspeed.get_accelerator().total_memory()
    if not torch.cuda.is_available():
        memory /= local_world_size()
    weight = {"nf4": 0.6, "int8": 1.1}.get(args.quantize, DTYPES[args.precision].itemsize)
    gradient = 4 if weight == 4 else 6  # half precision is added up in fp32
    state = 12  # 4 each: AdamW's two means, ZeRO's fp32 masters
    if args.lora_rank or args.train_adapter or args.no_train:
        gradient = state = 0  # next to nothing
    n = world_size()
    parts = [state, gradient, weight]  # stage k divides the first k
    for stage in range(needs_masters(args), 4):
        n_bytes = sum(parts[:stage]) / n + sum(parts[stage:])
        if n_params * n_bytes < 0.8 * memory:
            return f"zero{stage}"
    problems.append(
        f"{n_params / 1e9:.2f} G parameters in {args.precision} do not fit {n} x "
        f"{memory / 1e9:.1f} GB: more processes, or --ds_config zero3_offload"
    )
    return "zero3"


def make_adamw(model, args):
    """torch's AdamW, with weight decay on matrices and none on vectors."""
    groups = {args.weight_decay: [], 0.0: []}
    for weight in model.parameters():
        is_matrix = len(getattr(weight, "ds_shape", weight.shape)) > 1  # ZeRO-3 has flattened it
        if weight.requires_grad:
            groups[args.weight_decay if is_matrix else 0.0].append(weight)
    groups = [
        {"params": params, "weight_decay": decay} for decay, params in groups.items() if params
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)


def lr_at(step, args, max_steps):
    """Learning rate of the update from step to step + 1, in closed form."""
    peak, kind = args.learning_rate, args.lr_scheduler_type
    warmup = args.warmup_steps
    if warmup < 0:
        warmup = min(2000, max_steps // 10)
    if kind == "constant":  # without warm-up
        return peak
    if step < warmup:
        return peak * (step + 1) / warmup
    if kind == "constant_with_warmup":
        return peak
    if kind == "inverse_sqrt":  # Raffel et al. 2020
        return peak * math.sqrt(max(1, warmup) / (step + 1))
    done = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    if kind == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * (1 - done)


def set_lr(engine, step, args, max_steps):
    lr = lr_at(step, args, max_steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    return lr


def step_totals(engine, loss_sum, wants_stop):
    """Collective, between backward and step: the loss of all ranks, how many of them want to stop,
    the gradient's norm before clipping or None. At ZeRO 0 the one wait for the GPU."""
    totals = torch.zeros(3, dtype=torch.float64, device=engine.device)
    totals[0] = loss_sum
    totals[1] = wants_stop
    dist.all_reduce(totals)
    has_own_norm = engine.zero_optimization()  # after the step
    if not has_own_norm:
        grads = [weight.grad for weight in engine.module.parameters() if weight.grad is not None]
        totals[2] = torch.nn.utils.get_total_norm(grads)
    loss_sum, n_stop, norm = totals.tolist()
    return loss_sum, n_stop, None if has_own_norm else norm


def check_step(engine, args, step, loss, norm):
    """The gradient's norm. Stops where a step has spoiled the weights, or was skipped; fp16 skips
    steps on purpose, to find its loss scale."""
    if norm is None:
        norm = float(engine.get_global_grad_norm())
    is_right = math.isfinite(loss) and math.isfinite(norm) and engine.was_step_applied()
    if not is_right and args.precision != "fp16":
        fail(
            f"step {step + 1}: the loss is {loss}, the gradient's norm {norm}: start from an "
            "earlier checkpoint with a lower --learning_rate or --precision fp32"
        )
    return norm


# ------------------------------------------------------------------------------------ checkpoints


def complete_checkpoints(run_dir):
    """checkpoint-<step>/ folders, oldest first; not those that a kill left unfinished."""
    complete = [path.parent for path in run_dir.glob(f"checkpoint-*[0-9]/{COMPLETE}")]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def full_state_dict(model):
    """Collective. {name: whole CPU tensor} on rank 0, a tied weight once, of adapters theirs only;
    on the other ranks no weights."""
    state = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad or not hasattr(model, "adapter"):
            with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
                if rank() == 0:
                    state[name] = weight.detach().to("cpu", copy=True)
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():  # such as the bias of Marian's logits
        if name in saved and not hasattr(model, "adapter"):
            state[name] = buffer
    return state


def sync_to_disk(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file)


def write_checkpoint(folder, engine, model, tokenizer, run, about):
    """Collective. A Hugging Face (or PEFT) folder, engine/ to resume from, and state.json."""
    only_trained = hasattr(model, "adapter")
    weights = full_state_dict(model)
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        if only_trained:
            model.adapter.save(weights, folder)
        else:
            model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        write_json(folder / "rawtune.json", about)
        write_json(folder / "state.json", run.state)
    dist.barrier()  # the folder is there before any rank writes into it
    engine.save_checkpoint(
        str(folder / "engine"),
        tag="state",
        save_latest=False,
        exclude_frozen_parameters=only_trained,
    )
    sync_to_disk(folder)  # every rank: each node has pages of its own
    dist.barrier()


def prune_checkpoints(run):
    """Rank 0. Keep the newest --save_total_limit, and the best."""
    for path in complete_checkpoints(run.dir)[: -run.args.save_total_limit]:
        if path != run.chosen():
            # renamed first: a kill while deleting must not leave half a checkpoint
            aside = path.rename(path.with_suffix(".tmp"))
            shutil.rmtree(aside)


def save_checkpoint(engine, model, tokenizer, run, about):
    """Collective. checkpoint-<step>/. Written aside, synced, marked COMPLETE
    and renamed, so that a kill at any moment leaves all of it or a .tmp."""
    folder = run.dir / f"checkpoint-{run.step}"
    aside = folder.with_suffix(".tmp")
    write_checkpoint(aside, engine, model, tokenizer, run, about)
    if rank() == 0:
        (aside / COMPLETE).touch()
        os.rename(aside, folder)
        prune_checkpoints(run)
    dist.barrier()  # nobody trains on before it is certain that the checkpoint is there


def load_checkpoint(engine, checkpoint):
    """Collective. Weights and optimizer; ZeRO-3 has the weights with the optimizer alone."""
    path, _ = engine.load_checkpoint(
        str(checkpoint / "engine"),
        tag="state",
        load_module_strict=False,  # the frozen base of adapters is not there
    )
    if path is None:
        fail(f"nothing could be loaded from {checkpoint}: delete it and try again")


def export(run):
    """Rank 0. The run folder becomes a Hugging Face folder with the chosen weights."""
    for stale in run.dir.glob("*.safetensors*"):  # of this run before it was extended
        stale.unlink()
    to_resume = shutil.ignore_patterns("engine", "state.json", COMPLETE)
    shutil.copytree(run.chosen(), run.dir, ignore=to_resume, dirs_exist_ok=True)
    run.plot_curves()
    (run.dir / COMPLETE).touch()
    log(f"done: {run.dir} holds the model of {run.chosen().name}")
