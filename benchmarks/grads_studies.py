"""Do the estimates of project_grads.py hold? Studies with true fine-tunes, on a CPU.

    python benchmarks/grads_studies.py noisy symbolic --out benchmarks/results/grads_studies_cpu_2cores.json          # 25 minutes
    python benchmarks/grads_studies.py smollm2 --model models/SmolLM2-135M-Instruct --shared SHARED \\
        --out benchmarks/results/grads_smollm2_cpu_2cores.json                                                         # an hour

noisy     20 groups of 25 additions, 8 of them with wrong answers (shuffled among the group's questions); a tiny model that adds a little (400 steps),
          or already well (1500), is fine-tuned on 7 groups. Do the estimates rank the subsets, and does the mean estimate of the subsets with a
          group tell clean from noisy?
symbolic  12 tasks on rows of digits (copy, reverse, sort, running sum ...), 48 rows each; a tiny model that knows all a little (100 steps), or
          nine perfectly (600), is fine-tuned on 6. Which task's loss moves how? Also: how many of the exact top 5 % of cosines
          does selection find in sketches of 512, 4096 and 8192?
smollm2   SmolLM2-135M-Instruct with LoRA, six public tasks, fine-tuned on three. An adapter is warmed up on rows of its own first, so that B is not
          zero: that is the base (theta0). Few steps (6) leave it ignorant of the form of the answers, more (36) do not: two studies.

Every study: the truth by fine-tuning, some of it twice (the ceiling), and estimates from gradients at theta0 or around the model fine-tuned on
everything (the anchor). A finished step is not repeated: the same command with the same --mount goes on.
"""

import argparse
import csv
import json
import pathlib
import random
import sys
import tempfile
import time

import harness
import numpy as np
import torch
import transformers

sys.path.insert(0, str(harness.ROOT))
import project_grads  # noqa: E402

N_TRAIN, N_EVAL, N_WARM, LONGEST = 24, 12, 8, 240  # smollm2: rows of a group; characters of a row
CONSTANT = "--warmup_steps 0 --lr_scheduler_type constant --logging_steps 20"
WARM = {"noisy": (400, 1500), "symbolic": (100, 600), "smollm2": (6, 36)}  # steps of the base's training; one study each
N_CALIBRATE = 3  # true runs that give the step size, and are not judged


# ------------------------------------------------------------------------------------------------ data


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_additions(mount, shared):
    """data/warm.jsonl: clean additions; data/tasks.jsonl: 12 clean groups, 8 noisy ones, 150 clean questions to measure on. All questions differ."""
    rng, seen = random.Random(0), set()

    def draw(n):
        found = []
        while len(found) < n:
            a, b = rng.randrange(100, 1000), rng.randrange(10, 100)
            if (a, b) not in seen:
                seen.add((a, b))
                found.append((f"{a} + {b} =", f" {a + b}"))
        return found

    def records(pairs, group, split="train"):
        return [{"prompt": p, "completion": c, "group": group, "split": split} for p, c in pairs]
    write_lines(mount / "data" / "warm.jsonl", records(draw(6000), "warm") + records(draw(50), "warm", "eval"))
    tasks = []
    for i in range(20):
        pairs = draw(25)
        if i >= 12:
            answers = [c for _, c in pairs]
            pairs = [(p, c) for (p, _), c in zip(pairs, answers[1:] + answers[:1])]
        tasks += records(pairs, f"{'clean' if i < 12 else 'noisy'}_{i:02d}")
    write_lines(mount / "data" / "tasks.jsonl", tasks + records(draw(150), "addition", "eval"))


SYMBOLIC = {
    "copy": lambda x: x, "reverse": lambda x: x[::-1], "sort": sorted, "falling": lambda x: sorted(x, reverse=True), "left": lambda x: x[1:] + x[:1],
    "right": lambda x: x[-1:] + x[:-1], "next": lambda x: [(d + 1) % 10 for d in x], "twice": lambda x: [2 * d % 10 for d in x],
    "running": lambda x: [sum(x[: i + 1]) % 10 for i in range(len(x))], "steps": lambda x: [(b - a) % 10 for a, b in zip(x, x[1:] + x[:1])],
    "pairs": lambda x: [x[1], x[0], x[3], x[2], *x[4:]], "parity": lambda x: [d % 2 for d in x]}


def write_symbolic(mount, shared):
    """data/warm.jsonl: a stream of all tasks; data/tasks.jsonl: 48 rows to train and 32 to measure of each."""
    rng, warm, tasks = random.Random(0), [], []
    for task, rule in SYMBOLIC.items():
        rows = [[int(c) for c in f"{n:05d}"] for n in rng.sample(range(10**5), 1000 + 80)]
        pairs = [{"prompt": f"{task} {' '.join(map(str, x))} =", "completion": " " + " ".join(map(str, rule(x))), "group": task} for x in rows]
        tasks += [{**r, "split": "train"} for r in pairs[:48]] + [{**r, "split": "eval"} for r in pairs[48:80]]
        warm += pairs[80:]
    rng.shuffle(warm)
    write_lines(mount / "data" / "warm.jsonl", [{**r, "split": "eval"} if i < 50 else r for i, r in enumerate(warm)])
    write_lines(mount / "data" / "tasks.jsonl", tasks)


def tables(path, shared, header):
    lines = [line.split("\t") for line in (shared / "data" / path).read_text(encoding="utf-8").split("\n") if line]
    return lines[1:] if header else lines


def public_tasks(shared):
    """{group: [(prompt, completion)]}, every row of the sets."""
    def lines(path):
        return [json.loads(line) for line in (shared / "data" / path).read_text(encoding="utf-8").splitlines()]
    with open(shared / "data" / "sciq" / "SciQ_valid.csv", newline="", encoding="utf-8") as file:
        sciq = list(csv.DictReader(file))
    alpaca = json.loads((shared / "data" / "alpaca" / "alpaca_en_demo_500.json").read_text(encoding="utf-8"))
    return {
        "gsm8k": [(f"Problem: {r['question']}\nAnswer:", " " + r["answer"].split("#### ")[1]) for r in lines("gsm8k_train.jsonl")],
        "sciq": [(f"Question: {r['question']}\nAnswer:", f" {r['correct_answer']}") for r in sciq],
        "sst2": [(f"Review: {text.strip()}\nSentiment:", " positive" if label == "1" else " negative") for text, label in tables("SST-2/train.tsv", shared, True)],
        "cola": [(f"Sentence: {row[3]}\nGrammatical:", " yes" if row[1] == "1" else " no") for row in tables("CoLA/train.tsv", shared, False)],
        "spam": [(f"Message: {text}\nKind:", f" {label}") for label, text in tables("sms_spam/SMSSpamCollection_2000.tsv", shared, False)],
        "alpaca": [(f"Instruction: {r['instruction']}\nResponse:", f" {r['output']}") for r in alpaca if not r["input"]]}


def write_public(mount, shared):
    """data/tasks.jsonl (train and eval records with a group) and data/warm.jsonl, different rows, half of each label where there are two."""
    rng, records, warm = random.Random(0), [], []
    for group, rows in public_tasks(shared).items():
        rows = list(dict.fromkeys(row for row in rows if len(row[0] + row[1]) <= LONGEST and row[1].strip()))
        rng.shuffle(rows)
        labels = sorted({completion for _, completion in rows})
        if len(labels) == 2:
            rows = [row for pair in zip(*([r for r in rows if r[1] == label] for label in labels)) for row in pair]
        for i, (prompt, completion) in enumerate(rows[: N_TRAIN + N_EVAL + N_WARM]):
            record = {"prompt": prompt, "completion": completion, "group": group}
            if i < N_TRAIN + N_EVAL:
                records.append({**record, "split": "train" if i < N_TRAIN else "eval"})
            else:
                warm.append(record)
    rng.shuffle(records)
    warm += [{**warm[0], "split": "eval"}]  # the trainer asks for one
    write_lines(mount / "data" / "tasks.jsonl", records)
    write_lines(mount / "data" / "warm.jsonl", warm)


# ------------------------------------------------------------------------------------------------ one study


class Study:
    """The steps of a study in a folder: finished ones are skipped, their seconds kept."""

    def __init__(self, mount, write, shared, model_flags, data_flags, tune, n_true, n_repeat):
        self.mount, self.model_flags, self.data_flags, self.tune, self.n_true, self.n_repeat = mount, model_flags, data_flags, tune, n_true, n_repeat
        (mount / "models").mkdir(parents=True, exist_ok=True)
        self.record = mount / "seconds.json"
        self.seconds = json.loads(self.record.read_text()) if self.record.exists() else {}
        self.base, self.truth = mount / "models" / "base", mount / "truth.csv"
        self.anchor = mount / "truth.csv.runs" / "models" / "all"
        self.stores = ["--grads", mount / "theta0_train", "--target_grads", mount / "theta0_target"]
        if not (mount / "data" / "tasks.jsonl").exists():
            write(mount, shared)

    def step(self, title, done, script, *words):
        if not (self.mount / done).exists():
            started = time.monotonic()
            harness.run_script(script, [str(word) for word in words])
            self.seconds[title] = round(time.monotonic() - started, 1)
            self.record.write_text(json.dumps(self.seconds))
            (self.mount / done).touch()
            print(f"{title}: {self.seconds[title]} s", flush=True)

    def grads(self, title, done, command, *words):
        self.step(title, done, "project_grads.py", command, *words)

    def pretrain(self, *words):
        self.step("warm-up", "models/base/COMPLETE", "sft_causal.py", "--mount_dir", self.mount, *self.model_flags, "--data_name", "warm", "--training_run_name",
                  "base", "--raw_prompt", "--n_generate", 0, "--eval_steps", 10**9, "--precision", "fp32", *words)

    def collect(self, name, model, *more):
        for part, split in (("train", "train"), ("target", "eval")):
            self.grads(f"collect {name} {part}", f"{name}_{part}/COMPLETE", "collect", "--mount_dir", self.mount, "--model_init_path", model, "--data_name", "tasks",
                       "--groups", "group", "--split", split, "--raw_prompt", *self.data_flags, "--out", self.mount / f"{name}_{part}", *more)

    def true_runs(self, subset_size, number):
        drawn, subsets = self.mount / "drawn.txt", self.mount / "subsets.txt"
        self.grads("subsets", "drawn.done", "subsets", "--grads", self.mount / "theta0_train", "--number_of_subsets", 2 * number, "--subset_size", subset_size,
                   "--out", drawn)
        if not subsets.exists():  # different ones, in the order in which they are drawn
            subsets.write_text("\n".join(list(dict.fromkeys(drawn.read_text().split("\n")))[:number]) + "\n")

        def run(title, done, *words):
            self.grads(title, done, "truth", *self.stores, "--train_all", "--out", self.truth, *words, "--", *self.tune)
        chosen = ["--subsets", subsets]
        run("truth of all", "truth_all.done")
        run("truth of subsets", "truth.done", *chosen, "--limit", self.n_true)
        if not (self.mount / "repeats.done").exists():
            once = self.truth.read_text().splitlines(keepends=True)
            run("truth again", "repeats.done", *chosen, "--limit", self.n_repeat, "--repeat", 2)
            again = [row for row in self.truth.read_text().splitlines(keepends=True) if row not in once]
            self.truth.write_text("".join([*once, *again]))

    def estimates(self, gradex=False, far_adam=True):
        """{title: figures}: all ways to estimate, compared with the truth; and the baselines and the ceiling."""
        mount = self.mount
        checkpoint = next(iter(sorted(self.base.glob("checkpoint-*"))), None)
        self.collect("anchor", self.anchor, "--base_model", self.base)
        self.collect("adam", self.base, "--precond", f"adam:{checkpoint}")
        calibrate = ["--calibrate", f"{self.truth}:{N_CALIBRATE}"]
        anchored = ["--anchor_grads", mount / "anchor_train", mount / "anchor_target"]
        adam = ["--grads", mount / "adam_train", "--target_grads", mount / "adam_target"]
        limit = ["--limit", self.n_true]
        ways = {"theta0, 3 true runs for the step size": ("theta0", [*self.stores, *calibrate]),
                "theta0, AdamW's metric, 3 true runs": ("adam", [*adam, *calibrate]),
                "anchor": ("anchor", [*self.stores, *anchored]),
                "anchor, 3 true runs for the step size": ("anchor3", [*self.stores, *anchored, *calibrate]),
                "anchor, weights moved": ("lift", [*self.stores, *anchored, "--eval", "lift", *limit]),
                "anchor, weights moved, 3 true runs": ("lift3", [*self.stores, *anchored, *calibrate, "--eval", "lift", *limit])}
        if far_adam:
            self.collect("anchoradam", self.anchor, "--base_model", self.base, "--precond", f"adam:{checkpoint}")
            anchored_adam = [*adam, "--anchor_grads", mount / "anchoradam_train", mount / "anchoradam_target"]
            ways |= {"anchor, AdamW's metric": ("anchoradam", anchored_adam),
                     "anchor, AdamW's metric, 3 true runs": ("anchoradam3", [*anchored_adam, *calibrate]),
                     "anchor, AdamW's metric, weights moved": ("liftadam", [*anchored_adam, "--eval", "lift", *limit]),
                     "anchor, AdamW's metric, weights moved, 3 true runs": ("liftadam3", [*anchored_adam, *calibrate, "--eval", "lift", *limit])}
        if gradex:
            for dim in (100, 400):
                self.collect(f"gradex{dim}", self.base, "--compat", "gradex", "--dim", dim)
                stores = ["--grads", mount / f"gradex{dim}_train", "--target_grads", mount / f"gradex{dim}_target"]
                ways[f"GradEx, d = {dim}, scale 0.02"] = (f"gradex{dim}", [*stores, "--compat", "gradex", "--scale", 0.02, *limit])
        found, others = {}, {}
        for title, (name, words) in ways.items():
            self.grads(f"estimate {name}", f"{name}.done", "estimate", *words, "--subsets", mount / "subsets.txt", "--out", mount / f"{name}.csv")
            self.grads(f"compare {name}", f"{name}.compared", "compare", mount / f"{name}.csv", self.truth)
            table = json.loads((mount / f"{name}.csv.compare.json").read_text())
            found[title] = {**table.pop("estimate"), "step_size": json.loads((mount / f"{name}.csv.json").read_text()).get("step_size")}
            others[name] = table
        # the baselines without the runs that calibrate, as the estimates; the ceiling from all that were repeated
        found |= {key: row for key, row in others["theta0"].items() if key.startswith("baseline")}
        found |= {key: row for key, row in others["anchor"].items() if key.startswith("ceiling")}
        judged = {key: others["theta0"][key] for key in ("subsets", "true_runs")}
        print(json.dumps({title: {k: row[k]["value"] for k in ("spearman", "pearson", "relative_error", "r2")} for title, row in found.items()}, indent=1), flush=True)
        return {**judged, "compare": found}

    def figures(self, **more):
        names, runs = project_grads.read_table(self.truth, [])
        manifest = json.loads((self.mount / "theta0_train" / "manifest.json").read_text())
        distance = json.loads((self.mount / "anchor_train" / "delta.json").read_text())["norm"]
        return {"tracked_parameters": manifest["coverage"]["tracked"], "sketch": manifest["dim"], "seconds": self.seconds, "anchor_distance": distance,
                "groups": names[:-1], "truth": [{"run": r, "subset": " ".join(map(str, s)), "losses": v.round(4).tolist()} for r, s, v in runs], **more}


def noisy(args, mount, warm_steps):
    study = Study(mount, write_additions, None, ["--model_init_path", harness.ROOT / "models" / "tiny-llama"], ["--max_length", 64],
                  f"--max_steps 40 --train_batch_size 25 --learning_rate 0.0002 {CONSTANT}".split(), N_CALIBRATE + 20, 10)
    study.pretrain("--max_steps", warm_steps, "--train_batch_size", 64, "--learning_rate", 0.002, "--save_steps", warm_steps, "--max_length", 64, "--warmup_steps", 50)
    study.collect("theta0", study.base)
    study.true_runs(7, 200)
    found = study.estimates(gradex=True)
    scores = {}
    for name in ("theta0", "anchor3"):
        study.grads(f"ensemble {name}", f"ensemble-{name}.jsonl", "select", *study.stores, "--method", "ensemble", "--estimates", mount / f"{name}.csv", "--top", 12,
                    "--out", mount / f"ensemble-{name}.jsonl")
        scores[name] = separation(mount / f"ensemble-{name}.jsonl")
    return study.figures(**found, ensemble=scores)


def separation(path):
    """Of select --method ensemble: how many noisy groups are among the 12 best, and the AUC of its mean losses."""
    score = {row["group"]: row["loss"] for row in json.loads(path.with_suffix(".scores.json").read_text())["estimated_loss"]}
    clean, noisy_ = ([s for g, s in score.items() if g.startswith(kind)] for kind in ("clean", "noisy"))
    wins = np.sign(np.subtract.outer(noisy_, clean))
    return {"estimated_loss": score, "auc": float((wins + 1).mean() / 2), "noisy among the best 12": sum(g.startswith("noisy") for g in sorted(score, key=score.get)[:12])}


def symbolic(args, mount, warm_steps):
    study = Study(mount, write_symbolic, None, ["--model_init_path", harness.ROOT / "models" / "tiny-llama"], ["--max_length", 64],
                  f"--max_steps 60 --train_batch_size 32 --learning_rate 0.0001 {CONSTANT}".split(), N_CALIBRATE + 20, N_CALIBRATE + 20)
    study.pretrain("--max_steps", warm_steps, "--train_batch_size", 64, "--learning_rate", 0.003, "--save_steps", warm_steps, "--max_length", 64, "--warmup_steps", 50)
    study.collect("theta0", study.base)
    study.true_runs(6, 200)
    found = study.estimates(gradex=True)
    study.grads("linerr", "linerr.done", "linerr", *study.stores, "--direction", "dual,random,delta", "--delta", study.anchor, "--target", "loss", "--out",
                mount / "linerr.json")
    recall = {}
    for title, more in (("exact", ["--sketch", "exact"]), ("4096", []), ("8192", ["--dim", 8192]), ("512", ["--dim", 512])):
        study.collect(f"size{title}", study.base, "--store_dtype", "fp32" if title == "exact" else "fp16", *more)
        stores = ["--grads", mount / f"size{title}_train", "--target_grads", mount / f"size{title}_target"]
        study.grads(f"select {title}", f"top-{title}.jsonl", "select", *stores, "--method", "less", "--top", 0.05, "--out", mount / f"top-{title}.jsonl")
        records = [json.loads(line) for line in (mount / f"top-{title}.jsonl").read_text().splitlines()]
        recall[title] = {r["prompt"] for r in records if r.get("split", "train") == "train"}
    return study.figures(**found, linerr=json.loads((mount / "linerr.json").read_text()),
                         recall={title: len(chosen & recall["exact"]) / len(recall["exact"]) for title, chosen in recall.items()})


def smollm2(args, mount, warm_steps):
    study = Study(mount, write_public, pathlib.Path(args.shared), ["--model_init_path", args.model], ["--max_length", 96, "--params", "lora"],
                  f"--max_steps 9 --train_batch_size 8 --learning_rate 0.0005 {CONSTANT}".split(), 14, 3)
    study.pretrain("--max_steps", warm_steps, "--save_steps", warm_steps, "--train_batch_size", 8, "--learning_rate", 0.0005, "--lora_rank", 4,
                   "--max_length", 96, *CONSTANT.split())
    study.collect("theta0", study.base)
    study.true_runs(0.5, 20)  # all that there are
    found = study.estimates(far_adam=False)
    study.grads("linerr", "linerr.done", "linerr", *study.stores, "--direction", "dual,random,delta", "--delta", study.anchor, "--limit", 64, "--target", "loss",
                "--scale", 0.01, 0.03, 0.1, 0.2, "--out", mount / "linerr.json")
    return study.figures(**found, linerr=json.loads((mount / "linerr.json").read_text()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("studies", nargs="+", choices=["noisy", "symbolic", "smollm2"])
    parser.add_argument("--model", help="smollm2: folder of SmolLM2-135M-Instruct (or another small decoder-only model)")
    parser.add_argument("--shared", help="smollm2: folder that holds data/ with the public sets")
    parser.add_argument("--mount", help="where models, stores and tables are kept, default: a temporary folder")
    parser.add_argument("--out", help="write the figures to this JSON file")
    args = parser.parse_args()
    if "smollm2" in args.studies and not (args.model and args.shared):
        parser.error("smollm2 needs --model and --shared")
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        mount = pathlib.Path(args.mount or temporary).resolve()
        for name in args.studies:
            run = {"noisy": noisy, "symbolic": symbolic, "smollm2": smollm2}[name]
            found |= {f"{name}, {n} warm-up steps": run(args, mount / f"{name}-{n}", n) for n in WARM[name]}
    if args.out:
        summary = {"command": f"python benchmarks/grads_studies.py {' '.join(args.studies)}" + (" --model SmolLM2-135M-Instruct --shared SHARED" * bool(args.model)),
                   "device": harness.device_name(), "torch": torch.__version__, "transformers": transformers.__version__, "studies": found}
        pathlib.Path(args.out).write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
