"""Do the estimates of project_grads.py hold? A study with true fine-tunes: 8 minutes on one core.

    python benchmarks/grads_studies.py --out benchmarks/results/grads_noisy_cpu_2cores.json

20 groups of 25 additions, 8 of them with wrong answers (shuffled among the questions of the group).
A tiny model that adds a little is fine-tuned on 7 groups: on 23 subsets, of which 3 give the step
size, on 8 of them twice (the ceiling), and on everything (the anchor). Do estimates rank the
subsets, and does the mean estimate of the subsets with a group tell clean from noisy?
"""

import argparse
import json
import pathlib
import random
import tempfile

import harness
import numpy as np

# in the folder {m}: the base, the stores of rows, true fine-tunes, estimates
STEPS = """
sft_causal.py --mount_dir {m} --model_init_path {root}/models/tiny-llama --data_name warm \
    --training_run_name base --raw_prompt --warmup_steps 50 --train_batch_size 64 --max_length 64 \
    --n_generate 0 --eval_steps 1000000 --save_steps 0 --max_steps 400 --learning_rate 0.002
project_grads.py collect {base} --split train --out {m}/G
project_grads.py collect {base} --split eval --out {m}/E
project_grads.py subsets --grads {m}/G --number_of_subsets 40 --subset_size 7 \
    --out {m}/subsets.txt
project_grads.py truth {stores} --limit 8 --repeat 2 --out {m}/truth.csv -- {tune}
project_grads.py collect {anchor} --split train --out {m}/GA
project_grads.py collect {anchor} --split eval --out {m}/EA
project_grads.py linerr --grads {m}/E
project_grads.py estimate {stores} {calibrate} --anchor_grads {m}/GA {m}/EA --out {m}/anchor.csv
project_grads.py compare --estimates {m}/anchor.csv --truth {m}/truth.csv
"""
MORE_STEPS = """
project_grads.py truth {stores} --limit 23 --out {m}/truth.csv -- {tune}
project_grads.py estimate {stores} {calibrate} --out {m}/base.csv
project_grads.py estimate {stores} {calibrate} --fit logistic --limit 23 --out {m}/logistic.csv
"""
TUNE = "--max_steps 40 --train_batch_size 25 --learning_rate 0.0002 --warmup_steps 0 "
TUNE += "--lr_scheduler_type constant"
JUDGE = """
project_grads.py compare --estimates {m}/{way}.csv --truth {m}/truth.csv
project_grads.py select --grads {m}/G --target_grads {m}/E --method ensemble --top 1 \
    --estimates {m}/{way}.csv --out {m}/{way}.json
"""


def write_data(folder):
    """warm.json and tasks.json; no question occurs twice."""
    rng = random.Random(0)
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

    warm = draw(6050, "warm")
    tasks = []
    for i in range(20):
        group = draw(25, f"{'clean' if i < 12 else 'noisy'}_{i:02d}")
        answers = [record["completion"] for record in group]
        for record, answer in zip(group, answers[1:] + answers[:1]):
            if i >= 12:
                record["completion"] = answer
        tasks += group
    harness.write_json(folder / "warm.json", {"train": warm[50:], "eval": warm[:50]})
    harness.write_json(folder / "tasks.json", {"train": tasks, "eval": draw(150, "addition")})


def separation(path):
    """The share of pairs of a clean and a noisy group in which the clean one has the lower loss."""
    losses = {"clean": [], "noisy": []}
    for group, score in json.loads(path.read_text()):
        losses[group.split("_")[0]].append(-score)
    wins = np.subtract.outer(losses["noisy"], losses["clean"]) > 0
    return float(wins.mean())


def study(m):
    """The figures, in the folder m."""
    (m / "data").mkdir()
    write_data(m / "data")
    collect = f"--mount_dir {m} --data tasks --groups group --raw_prompt --max_length 64"
    places = {
        "m": m,
        "root": harness.ROOT,
        "base": f"{collect} --model_init_path {m}/models/base",
        "anchor": f"{collect} --model_init_path {m}/truth.csv.runs/models/all",
        "stores": f"--grads {m}/G --target_grads {m}/E --subsets {m}/subsets.txt",
        "calibrate": f"--calibrate {m}/truth.csv:3",
        "tune": TUNE,
    }

    def run(lines, **more):
        for line in lines.format(**places, **more).strip().splitlines():
            print(line, flush=True)
            harness.run_script(*line.split(maxsplit=1))

    run(STEPS)
    twice = json.loads((m / "anchor.csv.compare.json").read_text())
    found = {"ceiling": twice["ceiling: another order"]}
    run(MORE_STEPS)
    for way in ("anchor", "base", "logistic"):
        run(JUDGE, way=way)
        compared = json.loads((m / f"{way}.csv.compare.json").read_text())
        found[way] = compared["estimate"]
        found[way]["auc"] = separation(m / f"{way}.json.scores.json")
    found["mean of truth"] = compared["baseline: mean of truth"]
    found["linerr"] = json.loads((m / "E/linerr.json").read_text())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", help="write the figures to this JSON file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = study(pathlib.Path(temporary))
    print(json.dumps(found, indent=1))
    harness.write_summary(args, noisy=found)


if __name__ == "__main__":
    main()
