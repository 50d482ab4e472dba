"""All ratios of speed on two CPU cores in one go: benchmarks/results/, and the table of
docs/benchmarks.md with its picture. 25 minutes on a machine that does nothing else.

    pip install -r benchmarks/requirements.txt
    python benchmarks/run.py
    python benchmarks/run.py --only chat sft       # these again; the others' results stay

A part that fails, or takes longer than 15 minutes, has no row: what it said is in the terminal, the
other parts go on, and the exit code is the number of parts that failed.
"""

import argparse
import json
import os
import pathlib
import sys

import harness
from matplotlib import pyplot

RESULTS = harness.ROOT / "benchmarks" / "results"
PAGE = harness.ROOT / "docs" / "benchmarks.md"
PICTURE = PAGE.parent / "img" / "benchmarks.png"
BEGIN, END = "<!-- written by benchmarks/run.py -->", "<!-- until here -->"
DATA = harness.ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
MINUTES = 15  # limit of a part
CLF = "--rounds 2 --steps 6 --batch 16 --accumulation 1 --examples 600"
PARTS = {  # label, benchmark, flags
    "seq2seq": ("seq2seq.py", "bench_train.py", "--task seq2seq --rounds 3 --steps 12"),
    "sft": ("sft_causal.py", "bench_train.py", "--task sft --rounds 2 --steps 6"),
    "clf_t5": ("clf.py, T5", "bench_train.py", f"--task clf-t5 {CLF}"),
    "clf_llama": ("clf.py, Llama", "bench_train.py", f"--task clf-llama {CLF}"),
    "ppo_llama": ("rl_ppo.py, Llama", "bench_decoding.py", "--task ppo-llama --rows 32"),
    "ppo_t5": ("rl_ppo.py, T5", "bench_decoding.py", "--task ppo-t5 --rows 32"),
    "chat": ("chat.py", "bench_decoding.py", "--task chat"),
    "project_grads": ("project_grads.py", "bench_project_grads.py", ""),
}
PEERS = {
    "hf": "Trainer",
    "hf-grouped": "Trainer, length grouping",
    "trl": "SFTTrainer",
    "trl-packed": "SFTTrainer, packing",
    "generate": "generate",
    "step": "passes of a training step",
    "trak": "a pass a row, BasicProjector",
}


def result_path(part):
    return RESULTS / f"{part}_cpu_2cores.json"


def measure(part, data):
    """Whether it worked; its figures are then in its file of results."""
    _, script, flags = PARTS[part]
    out = result_path(part)
    out.unlink(missing_ok=True)  # a file is always of the last attempt
    command = [sys.executable, f"{harness.ROOT}/benchmarks/{script}", *flags.split()]
    command += ["--out", str(out)]
    if script == "bench_train.py":
        command += ["--data", data]
    print(f"\n{part}: {' '.join(command)}", flush=True)
    code = harness.run_limited(command, MINUTES)
    is_done = code == 0 and out.exists()
    if not is_done:
        reason = f"longer than {MINUTES} minutes" if code is None else f"exit code {code}"
        print(f"FAILED {part}: {reason}", flush=True)
    return is_done


def read_rows():
    """[(what, [median, lowest, highest], memory)] of all results, {versions}."""
    rows, versions = [], set()
    for part, (label, _, _) in PARTS.items():
        if not result_path(part).exists():
            continue
        found = json.loads(result_path(part).read_text())
        versions.add(f"torch {found['torch']}, transformers {found['transformers']}")
        for figure, ratios in found["ratios"].items():
            for peer, ratio in ratios.items():
                memory = ""
                if figure == "trained":
                    gigabytes = found["peak_memory_gb"]
                    memory = f"{gigabytes['ours']:.2f} against {gigabytes[peer]:.2f} GB"
                rows.append((f"{label}, {figure} / {PEERS[peer]}", ratio, memory))
    return rows, versions


def shown(ratio):
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def write_page(rows, versions):
    """The part of the page between the two comments."""
    lines = [f"With {' or '.join(sorted(versions))}:", ""]
    lines += ["| | faster by (rounds) | peak memory |", "|---|---|---|"]
    for what, ratio, memory in rows:
        median, lowest, highest = map(shown, ratio)
        lines.append(f"| {what} | {median} x ({lowest} to {highest}) | {memory} |")
    lines += ["", "![The ratios up to 20 as bars](img/benchmarks.png)", "", END]
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + after)


def draw(rows):
    """A bar for each ratio up to 20: what is above has nothing to do with the others."""
    rows = [row for row in rows if row[1][0] <= 20]
    figure, axes = pyplot.subplots(figsize=(10, 1 + len(rows) / 3), layout="constrained")
    for what, (median, lowest, highest), _ in rows:
        bars = axes.barh(what, median, color="#3b6ea8")
        axes.bar_label(bars, [f"   {shown(median)}"])
        axes.plot([lowest, highest], [what, what], color="#222222")
    axes.axvline(1, color="#222222", linestyle="dotted")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("faster by; line: range of the rounds; dotted: as fast as the peer")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)
    pyplot.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--data", default=str(DATA), help="GSM8K's train.jsonl")
    args = parser.parse_args(argv)
    if not pathlib.Path(args.data).exists():
        sys.exit(f"no {args.data}: --data train.jsonl of github.com/openai/grade-school-math")
    # for the processes that are started here
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    failed = []
    for part in args.only:
        if not measure(part, args.data):
            failed.append(part)
        rows, versions = read_rows()
        write_page(rows, versions)
        draw(rows)
    print(f"{PAGE} is written; FAILED: {' '.join(failed) or 'none'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
