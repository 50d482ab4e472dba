"""What the benchmarks share: flags, runs in turn, the clock and the memory of a run inside Hugging Face's Trainer, the summary."""

import argparse
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as common.py sets it, for all peers: it counts only before torch is imported
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent


def add_flags(parser):
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu-only", action="store_true", help='print "not run" where there is no GPU')
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)


def device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {len(os.sched_getaffinity(0))} cores"


def no_gpu(args):
    """Whether a GPU is asked for and missing; says so."""
    missing = args.gpu_only and not torch.cuda.is_available()
    if missing:
        print("not run: no GPU here")
    return missing


def run_script(name, words):
    """One of the scripts as users run it; ends the benchmark with what it said if it fails."""
    result = subprocess.run([sys.executable, str(ROOT / name), *words], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stdout[-2000:] + result.stderr[-4000:])


def metric_rows(run_dir, split="train"):
    """The rows of a split in the metrics.jsonl of a run, in order."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def in_child(peer, folder):
    """This benchmark again, in a process of its own that runs one peer; returns the JSON of its last line."""
    child = subprocess.run([sys.executable, *sys.argv, "--child", peer, "--folder", str(folder)], capture_output=True, text=True)
    if child.returncode:
        sys.exit(child.stderr[-4000:])
    return json.loads(child.stdout.strip().splitlines()[-1])


def alternate(peers, rounds, run):
    """{peer: [run(peer) of each round]}, one peer after the other in every round, so that all see the same hours of a machine."""
    results = {peer: [] for peer in peers}
    for round_ in range(rounds):
        for peer in peers:
            found = run(peer)
            results[peer].append(found)
            print(f"round {round_ + 1}  {peer:<22}" + "  ".join(f"{k} {v:.4g}" for k, v in found.items() if isinstance(v, (int, float))), flush=True)
    return results


def medians(results):
    """{peer: {figure: its median over the rounds}}; lists are left out."""
    return {peer: {k: statistics.median(r[k] for r in runs) for k, v in runs[0].items() if isinstance(v, (int, float))}
            for peer, runs in results.items()}


def ratios(results, ours, figure):
    """{peer: [median, lowest, highest]} of a figure of ours / the peer's in the same round; printed."""
    found = {}
    for peer in results.keys() - {ours}:
        of_rounds = sorted(mine[figure] / theirs[figure] for mine, theirs in zip(results[ours], results[peer]))
        found[peer] = [statistics.median(of_rounds), of_rounds[0], of_rounds[-1]]
        print(f"{ours} / {peer} = {found[peer][0]:.2f} (rounds: {of_rounds[0]:.2f} to {of_rounds[-1]:.2f})")
    return found


def write_summary(args, results, **figures):
    """Every run, the medians and how to get them again, to --out."""
    import deepspeed
    summary = {"command": " ".join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]]), "device": device_name(),
               "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
               "deepspeed": deepspeed.__version__, "median": medians(results), "runs": results, **figures}
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(summary, indent=2) + "\n")


def peak_memory_gb():
    """Of this process (imports and data included), or of the GPU's allocator."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text()).group(1)) * 1024 / 1e9


class StepClock(transformers.TrainerCallback):
    """times[k]: when optimizer step k + 1 was done [s]."""

    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def trainer_options(folder, args, every):
    """Of TrainingArguments, the same for every peer: fused AdamW, clipping at 1.0, nothing written but one log."""
    return {"output_dir": str(folder / "hf"), "per_device_train_batch_size": args.batch, "gradient_accumulation_steps": args.accumulation,
            "max_steps": 3 * every, "optim": "adamw_torch_fused", "max_grad_norm": 1.0, "learning_rate": 5e-5, "save_strategy": "no",
            "report_to": "none", "logging_steps": every, "disable_tqdm": True, "dataloader_pin_memory": torch.cuda.is_available(),
            "use_cpu": not torch.cuda.is_available()}


def by_length(arguments):
    """The length grouping of TrainingArguments, whose name changed in transformers 5."""
    new = "train_sampling_strategy" in arguments.__dataclass_fields__
    return {"train_sampling_strategy": "group_by_length"} if new else {"group_by_length": True}
