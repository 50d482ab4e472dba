"""Random kill -9 over all scripts that go on where they were: whenever a run is killed, the same
command comes to the same bits.

    python tests/kills.py --n 40                    # 10 minutes on 2 cores

A case is a script with a random ZeRO stage, number of processes and flags, a function of (seed,
case). It runs once undisturbed; then it is killed up to three times, at a random moment or while a
file is written, and runs to its end. All files of the two runs have to be the same, but for times.
Processes are forks of this one, in which everything is imported: a start costs 8 seconds.
"""

import argparse
import collections
import hashlib
import itertools
import multiprocessing
import os
import pathlib
import random
import re
import shlex
import socket
import sys
import tempfile
import time

import conftest  # first: it prepares the import of DeepSpeed

# isort: split
import test_clf
import test_ppo
from tqdm import tqdm

import chat
import clf
import common
import project_grads
import rl_ppo
import seq2seq
import sft_causal

TRAINING = (
    "--max_steps 12 --save_steps 2 --eval_steps 6 --logging_steps 3 --train_batch_size 8 "
    "--learning_rate 1e-3 --warmup_steps 2 --training_run_name run"
)
SAMPLING = "--data ../../data/pairs --max_new_tokens 8 --temperature 1"
TRAINERS = {  # the models have dropout, which rl_ppo.py switches off
    seq2seq: f"--model_init_path ../../models/t5v1.1 --metric_for_best loss {SAMPLING}",
    clf: "--model_init_path ../../models/t5v1.1 --data ../../data/scores --max_length 64",
    sft_causal: f"--model_init_path ../../models/gpt2 --template alpaca {SAMPLING}",
    rl_ppo: f"--policy ../../models/llama --reward_fn ../../reward.py:length --num_rollouts 16 "
    f"--n_samples 2 --ppo_epochs 1 --reward_scaling norm {SAMPLING}",
}
OTHERS = {
    project_grads: "collect --model_init_path ../../models/gpt2 --data ../../data/pairs "
    "--raw_prompt --dim 300 --batch_size 4 --out run",
    chat: "--model_path ../../models/llama --input ../../data/pairs.json --output run",
}
OPTIONS = (  # of the trainers
    "",
    "--lora_rank 2 --lora_dropout 0.1",
    "--precision bf16-mixed --gradient_accumulation_steps 2",
    "--gradient_checkpointing --save_total_limit 1",
)
TIMES = rb'"(tokens_per_sec|peak_memory_gb|log_bytes)": [-+.e\d]+'
PATIENCE = 180  # seconds, after which a run hangs
MOST_FAULTS = 5
FORK = multiprocessing.get_context("fork")

# name: for people; words: of the command
Case = collections.namedtuple("Case", "name module words n_ranks")


def write_inputs():
    """Models and data in the working folder."""
    os.mkdir("models")
    os.mkdir("data")
    test_ppo.make_policy("llama")
    conftest.make_model("t5v1.1", dropout_rate=0.1)
    conftest.make_causal("gpt2", resid_pdrop=0.1)
    conftest.write_data("pairs", conftest.pairs(90), conftest.pairs(9, 90))
    conftest.write_data("scores", test_clf.records(90), test_clf.records(9, 90))


def draw_case(rng):
    module = rng.choice([*TRAINERS, *TRAINERS, *OTHERS])  # a trainer twice as often
    n_ranks = 1 if module == chat else rng.randint(1, 2)
    words = OTHERS.get(module, "")
    options = ""
    if module in TRAINERS:
        options = f"--ds_config zero{rng.randrange(4)} {rng.choice(OPTIONS)}"
        words = f"{TRAINERS[module]} {TRAINING} {options}"
    name = f"{module.__name__}.py {options}, {n_ranks} processes"
    return Case(name, module, words.split(), n_ranks)


def be_rank(case, rank, port, folder):
    """In a fork: the script from its command line to its exit code."""
    os.chdir(folder)
    output = os.open(f"../{folder.name}.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.n_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    common.launch(case.module.main, case.module.parse_args(case.words))


def start(case, folder):
    """[Process] of the ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # a free port
        port = server.getsockname()[1]
    processes = []
    for rank in range(case.n_ranks):
        processes.append(FORK.Process(target=be_rank, args=(case, rank, port, folder)))
        processes[rank].start()
    return processes


def finish(case, folder):
    """Seconds of a run to its end. Raises RuntimeError."""
    begin = time.monotonic()
    processes = start(case, folder)
    for process in processes:
        process.join(PATIENCE)
    codes = [process.exitcode for process in processes]  # None: it hangs
    for process in processes:
        process.kill()
    if set(codes) != {0}:
        output = pathlib.Path(f"{folder}.0.txt").read_text()
        raise RuntimeError(f"{folder} ends with {codes}\n{output[-2000:]}")
    return time.monotonic() - begin


def written(folder):
    """Names of what is being written."""
    names = []
    for _, folders, files in os.walk(folder):  # a folder may go meanwhile
        names += [name for name in (*folders, *files) if name.endswith(".tmp")]
    return names


def kill(case, folder, seconds, rng):
    """Kill a run: (whether it was still running, words about its state)."""
    processes = start(case, folder)
    time.sleep(seconds * rng.uniform(0.1, 1))
    if rng.random() < 0.5:
        last_moment = time.monotonic() + seconds
        while processes[0].is_alive() and time.monotonic() < last_moment and not written(folder):
            time.sleep(0.001)
        time.sleep(rng.choice((0.01, 0.1, 0.5)) * rng.random())  # a slow machine saves longer
    is_running = any(process.is_alive() for process in processes)
    walk = os.walk(folder)
    saved = [pathlib.Path(root).name for root, _, files in walk if common.COMPLETE in files]
    state = f"behind {saved}, writing {written(folder)}"
    gap = rng.choice((0, 0, 0.5))  # all ranks at once, or one after the other
    for process in rng.sample(processes, len(processes)):
        process.kill()
        time.sleep(gap)
    for process in processes:
        process.join()
    return is_running, state


def bits(case, folder):
    """{file: hash of what it holds, without times}"""
    found = {}
    for path in folder.rglob("*"):
        # ZeRO-3 fills its partitions up with memory that nobody has initialised
        is_padded = "zero3" in case.words and "engine" in path.parts
        if path.is_file() and not is_padded:
            content = re.sub(TIMES, b"", path.read_bytes())
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def run_case(case, folder, rng):
    """Yield the state of the run at each kill. Raises RuntimeError where a run fails, hangs or
    comes to other bits."""
    seconds = finish(case, folder / "whole")
    for _ in range(rng.randint(1, 3)):
        is_running, state = kill(case, folder / "killed", seconds, rng)
        if not is_running:
            break
        yield state
    is_done = case.module == chat and (folder / "killed" / "run").exists()  # which it refuses
    if not is_done:
        finish(case, folder / "killed")
    whole, killed = bits(case, folder / "whole"), bits(case, folder / "killed")
    different = [name for name in {**whole, **killed} if whole.get(name) != killed.get(name)]
    if different:
        raise RuntimeError(f"{folder}: other bits in {', '.join(different[:5])}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--n", type=int, default=40, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    args = parser.parse_args()
    root = pathlib.Path(tempfile.mkdtemp(prefix="kills-"))
    os.chdir(root)
    write_inputs()
    counts = collections.Counter()
    n_writing = n_faults = 0
    bar = tqdm(total=args.n, unit="kill", disable=None)
    for i in itertools.count():
        if counts.total() >= args.n or n_faults == MOST_FAULTS:
            break
        rng = random.Random(f"{args.seed} {i}")
        case = draw_case(rng)
        try:
            for state in run_case(case, root / str(i), rng):
                bar.update()
                counts[case.module.__name__] += 1
                n_writing += ".tmp" in state
                tqdm.write(f"{i}: {case.name}: killed {state}")
        except RuntimeError as error:
            n_faults += 1
            tqdm.write(f"FAULT {i}: {case.name}: {shlex.join(case.words)}\n{error}")
    print(
        f"\n`tests/kills.py`, seed {args.seed}: {counts.total()} kills, {n_writing} of them while"
    )
    print(f"a file was written; {n_faults} differences.\n\n| script | kills |\n|---|---:|")
    for script, n_kills in sorted(counts.items()):
        print(f"| {script}.py | {n_kills} |")
    return 1 if n_faults else 0


if __name__ == "__main__":
    sys.exit(main())
