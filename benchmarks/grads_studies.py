"""Do the estimates of project_grads.py hold? Studies with true fine-tunes, on a CPU.

    python benchmarks/grads_studies.py noisy symbolic --out benchmarks/results/grads_studies.json

noisy     20 groups of 25 additions, 8 of them with wrong answers (shuffled among the questions of
          the group); a tiny model that adds a little is fine-tuned on 7 groups. Do estimates rank
          the subsets, and does the mean estimate of the subsets with a group tell clean from noisy?
symbolic  12 tasks on rows of digits (copy, reverse, sort, running sum ...), 48 rows each; a tiny
          model that knows all of them a little is fine-tuned on 6. Which task's loss moves how?
noisy-trained, symbolic-trained: the same with a base that has hardly anything left to learn.

Each study fine-tunes on 23 subsets, of which 3 give the step size, on 8 of them twice (the
ceiling), and on everything (the anchor): 8 minutes on one core. A finished step is not repeated:
the same command with the same --mount goes on.
"""

import argparse
import json
import pathlib
import random
import shlex
import tempfile

import harness
import numpy as np

N_SUBSETS, N_CALIBRATE, N_REPEATED = 23, 3, 8
# how the data is made; steps and learning rate of the base's training; groups of a subset; how the
# base is fine-tuned
NOISY = "--max_steps 40 --train_batch_size 25 --learning_rate 0.0002"
SYMBOLIC = "--max_steps 60 --train_batch_size 32 --learning_rate 0.0001"
STUDIES = {
    "noisy": ("additions", 400, 0.002, 7, NOISY),
    "noisy-trained": ("additions", 1500, 0.002, 7, NOISY),
    "symbolic": ("digits", 100, 0.003, 6, SYMBOLIC),
    "symbolic-trained": ("digits", 600, 0.003, 6, SYMBOLIC),
}
RULES = {
    "copy": lambda x: x,
    "reverse": lambda x: x[::-1],
    "sort": sorted,
    "falling": lambda x: sorted(x, reverse=True),
    "left": lambda x: x[1:] + x[:1],
    "right": lambda x: x[-1:] + x[:-1],
    "next": lambda x: [(digit + 1) % 10 for digit in x],
    "twice": lambda x: [2 * digit % 10 for digit in x],
    "running": lambda x: (np.cumsum(x) % 10).tolist(),
    "steps": lambda x: ((np.roll(x, -1) - x) % 10).tolist(),
    "pairs": lambda x: [x[1], x[0], x[3], x[2], *x[4:]],
    "parity": lambda x: [digit % 2 for digit in x],
}
# every step of a study after its base is trained; {m}: its folder
STEPS = """
collect {base} --split train --out {m}/G
collect {base} --split eval --out {m}/E
subsets --grads {m}/G --number_of_subsets 40 --subset_size {size} --out {m}/subsets.txt
truth {stores} --limit {n_repeated} --repeat 2 --out {m}/truth.csv -- {tune}
collect {anchor} --split train --out {m}/GA
collect {anchor} --split eval --out {m}/EA
linerr --grads {m}/E
estimate {stores} {calibrate} --anchor_grads {m}/GA {m}/EA --out {m}/anchor.csv
compare --estimates {m}/anchor.csv --truth {m}/truth.csv
truth {stores} --limit {n_subsets} --out {m}/truth.csv -- {tune}
estimate {stores} {calibrate} --out {m}/base.csv
estimate {stores} {calibrate} --fit logistic --limit {n_subsets} --out {m}/logistic.csv
"""


def write_additions(rng):
    """(warm-up records, their evaluation, tasks, evaluation); no question occurs twice."""
    seen = set()

    def draw(n, group):
        records = []
        while len(records) < n:
            a, b = rng.randrange(100, 1000), rng.randrange(10, 100)
            if (a, b) not in seen:
                seen.add((a, b))
                completion = f" {a + b}"
                records.append({"prompt": f"{a} + {b} =", "completion": completion, "group": group})
        return records

    warm, warm_eval = draw(6000, "warm"), draw(50, "warm")
    tasks = []
    for i in range(20):
        group = draw(25, f"{'clean' if i < 12 else 'noisy'}_{i:02d}")
        answers = [record["completion"] for record in group]
        for record, answer in zip(group, answers[1:] + answers[:1]):
            if i >= 12:
                record["completion"] = answer
        tasks += group
    return warm, warm_eval, tasks, draw(150, "addition")


def write_digits(rng):
    """The same; of each task 1000 records to warm up, 48 to train and 32 to measure."""
    warm, tasks, evaluation = [], [], []
    for group, rule in RULES.items():
        records = []
        for n in rng.sample(range(10**5), 1080):
            x = [int(digit) for digit in f"{n:05d}"]
            prompt = f"{group} {' '.join(map(str, x))} ="
            completion = " " + " ".join(map(str, rule(x)))
            records.append({"prompt": prompt, "completion": completion, "group": group})
        tasks += records[:48]
        evaluation += records[48:80]
        warm += records[80:]
    rng.shuffle(warm)
    return warm[50:], warm[:50], tasks, evaluation


def step(folder, script, words):
    """Run a script with the words of a line, unless it has."""
    done = folder / "done.json"
    lines = json.loads(done.read_text()) if done.exists() else []
    if words not in lines:
        print(f"{script} {words}", flush=True)
        harness.run_script(script, shlex.split(words))
        done.write_text(json.dumps([*lines, words]))


def separation(path):
    """The share of pairs of a clean and a noisy group in which the clean one has the lower loss."""
    losses = {"clean": [], "noisy": []}
    for group, score in json.loads(path.read_text()):
        losses[group.split("_")[0]].append(-score)
    wins = np.subtract.outer(losses["noisy"], losses["clean"]) > 0
    return float(wins.mean())


def study(name, m):
    """The figures of a study, in the folder m."""
    data, warm_steps, learning_rate, size, tune = STUDIES[name]
    (m / "data").mkdir(parents=True, exist_ok=True)
    write = write_additions if data == "additions" else write_digits
    warm, warm_eval, tasks, evaluation = write(random.Random(0))
    (m / "data/warm.json").write_text(json.dumps({"train": warm, "eval": warm_eval}))
    (m / "data/tasks.json").write_text(json.dumps({"train": tasks, "eval": evaluation}))
    tiny = harness.ROOT / "models/tiny-llama"
    step(
        m,
        "sft_causal.py",
        f"--mount_dir {m} --model_init_path {tiny} --data_name warm --training_run_name base "
        f"--raw_prompt --max_steps {warm_steps} --learning_rate {learning_rate} --warmup_steps 50 "
        "--train_batch_size 64 --max_length 64 --n_generate 0 --eval_steps 1000000 --save_steps 0",
    )
    collect = f"--mount_dir {m} --data tasks --groups group --raw_prompt --max_length 64"
    lines = STEPS.format(
        m=m,
        base=f"{collect} --model_init_path {m}/models/base",
        anchor=f"{collect} --model_init_path {m}/truth.csv.runs/models/all",
        stores=f"--grads {m}/G --target_grads {m}/E --subsets {m}/subsets.txt",
        calibrate=f"--calibrate {m}/truth.csv:{N_CALIBRATE}",
        size=size,
        tune=f"{tune} --warmup_steps 0 --lr_scheduler_type constant",
        n_subsets=N_SUBSETS,
        n_repeated=N_REPEATED,
    )
    for line in lines.strip().splitlines():
        step(m, "project_grads.py", line)
    twice = json.loads((m / "anchor.csv.compare.json").read_text())
    found = {"ceiling": twice["ceiling: another order"]}
    for way in ("anchor", "base", "logistic"):
        words = f"compare --estimates {m}/{way}.csv --truth {m}/truth.csv"
        harness.run_script("project_grads.py", words.split())
        compared = json.loads((m / f"{way}.csv.compare.json").read_text())
        found[way] = compared["estimate"]
        if data == "additions":
            words = f"select --grads {m}/G --target_grads {m}/E --method ensemble --top 1"
            words = f"{words} --estimates {m}/{way}.csv --out {m}/{way}.json"
            step(m, "project_grads.py", words)
            found[way]["auc"] = separation(m / f"{way}.json.scores.json")
    found["mean of truth"] = compared["baseline: mean of truth"]
    found["linerr"] = json.loads((m / "E/linerr.json").read_text())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("studies", nargs="+", choices=list(STUDIES))
    parser.add_argument("--mount", help="folder to keep everything in; else a temporary one")
    parser.add_argument("--out", help="write the figures to this JSON file")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.studies:
            found[name] = study(name, pathlib.Path(args.mount or temporary).resolve() / name)
            print(json.dumps(found[name], indent=1), flush=True)
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
