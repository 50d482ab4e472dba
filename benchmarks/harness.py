"""What all share here: flags, models, processes, runs in turn, a peer's clock, the summary."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time

# as common.py sets it, for all peers; it counts only before torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# isort: split
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent


def add_flags(parser):
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)


def device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {len(os.sched_getaffinity(0))} cores"


def t5_config(width, layers, **more):
    options = {"d_model": width, "d_ff": 4 * width, "d_kv": 32, "num_heads": width // 32}
    options.update(num_layers=layers, vocab_size=32128, decoder_start_token_id=0)
    options.update(feed_forward_proj="gated-gelu")
    options.update(more)
    return transformers.T5Config(**options)


def llama_config(width, layers, **more):
    options = {"hidden_size": width, "num_hidden_layers": layers, "max_position_embeddings": 8192}
    options.update(intermediate_size=4 * width, num_attention_heads=width // 32)
    options.update(more)
    return transformers.LlamaConfig(**options)


def run_script(name, words, folder=None):
    """What one of the scripts prints, run in a folder; ends the benchmark with it if it fails."""
    command = [sys.executable, str(ROOT / name), *words.split()]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stdout[-2000:] + result.stderr[-4000:])
    return result.stdout


def run_limited(command, minutes, **streams):
    """Exit code of a command; None if it took longer: then all that it started is killed."""
    process = subprocess.Popen(command, start_new_session=True, **streams)
    try:
        return process.wait(60 * minutes)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:  # Ctrl-C too does not reach another session
            os.killpg(process.pid, signal.SIGKILL)


def metric_rows(run_dir, split="train"):
    """The rows of a split in the metrics.jsonl of a run, in order."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def in_child(peer, folder):
    """The JSON that this benchmark prints last, in a process of its own that runs one peer."""
    command = [sys.executable, *sys.argv, "--child", peer, "--folder", str(folder)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        sys.exit(child.stderr[-4000:])
    return json.loads(child.stdout.strip().splitlines()[-1])


def alternate(peers, rounds, run):
    """{peer: [run(peer) of each round]}, {figure: number} each. In every round one peer runs after
    the other, so that all of them see the same hours of a machine."""
    results = {peer: [] for peer in peers}
    for number in range(1, rounds + 1):
        for peer in peers:
            figures = run(peer)
            results[peer].append(figures)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            print(f"round {number}  {peer:<22}{shown}", flush=True)
    return results


def ratios(results, ours, peers, figure):
    """{peer: [median, lowest, highest]} of our figure / the peer's in the same round; printed."""
    found = {}
    for peer in peers:
        rounds = zip(results[ours], results[peer])
        values = sorted(mine[figure] / theirs[figure] for mine, theirs in rounds)
        found[peer] = [statistics.median(values), values[0], values[-1]]
        median, lowest, highest = found[peer]
        print(f"{figure}: {ours} / {peer} = {median:.2f} (rounds: {lowest:.2f} to {highest:.2f})")
    return found


def write_json(path, value):
    pathlib.Path(path).write_text(json.dumps(value, indent=1) + "\n")


def write_summary(args, **figures):
    """What was measured, on what, and how to get it again, to --out. Paths of this machine become
    relative to the checkout."""
    if not args.out:
        return
    words = [os.path.relpath(word, ROOT) if os.path.isabs(word) else word for word in sys.argv[1:]]
    packages = ("torch", "transformers", "deepspeed")
    script = pathlib.Path(sys.argv[0]).name
    about = {
        "command": " ".join(["python", f"benchmarks/{script}", *words]),
        "device": device_name(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
    write_json(args.out, {**about, **figures})


def peak_memory_gb():
    """Of this process (imports and data included), or of the GPU's allocator."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux


class StepClock(transformers.TrainerCallback):
    """times[k]: when optimizer step k + 1 was done [s]."""

    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def trainer_options(folder, args, every):
    """Of TrainingArguments, the same for every peer. Nothing is written but one log."""
    has_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder / "hf"),
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": args.accumulation,
        "max_steps": 3 * every,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "learning_rate": 5e-5,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": every,
        "disable_tqdm": True,
        "dataloader_pin_memory": has_gpu,
        "use_cpu": not has_gpu,
        "bf16": has_gpu,
    }
