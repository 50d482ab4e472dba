"""Does a rationale help a tiny student? Coin flips and last letters, from nothing: questions, a scripted teacher's rationales, a T5 from scratch.

    python benchmarks/cot_study.py --out benchmarks/results/cot_cpu_2cores.json --figure docs/img/cot.png        # 75 minutes on 2 cores

Everything is a command of data/cot.py, data/prepare_tokenizer.py and seq2seq.py, in --folder (default: a temporary one). For each set and
seed two students see the same questions in the same number of steps: one learns rationale and answer, one the answer alone. Two
students learn at a time, with one thread each.
The step is chosen on the validation part; accuracy is that of the test part, 30 % of the questions.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import harness

SETS = {"coin_flip": 340, "last_letter_concatenation": 110}  # and the pieces of its tokenizer: whole words, and little more than letters
METHODS = {"rationale": "ft_cot", "answer alone": "ft"}
TRAIN = "--train_batch_size 64 --learning_rate 0.003 --lr_scheduler_type cosine --warmup_steps 100 --save_total_limit 20 --logging_steps 50"
EVALUATE = "--eval_batch_size 128 --max_source_length 256 --max_target_length 256 --max_new_tokens 100"


def run(folder, *words):
    """One command in the folder; -> what it printed."""
    result = subprocess.run([sys.executable, str(harness.ROOT / words[0]), *map(str, words[1:])], cwd=folder, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    if result.returncode:
        sys.exit(" ".join(map(str, words)) + "\n" + result.stdout[-2000:] + result.stderr[-4000:])
    return result.stdout


def prepare(folder, key, n):
    """The set, its split, the teacher's rationales, both data files, a tokenizer."""
    run(folder, "data/cot.py", "make", key, "--n", n, "--rationale", "--out", f"{key}.json")
    run(folder, "data/cot.py", "split", "--dataset", f"{key}.json", "--out", f"{key}__default.json")
    run(folder, "data/cot.py", "teach", "--dataset", f"{key}.json", "--method", "zs_cot", "--rationales", "--root", ".")
    run(folder, "data/cot.py", "filter", "--completions", f"completion_data/B_rationales__C_zs_cot/D_{key}.json", "--out", f"{key}_right.json")
    for method in METHODS.values():
        run(folder, "data/cot.py", "export", "--dataset", f"{key}.json", "--split", f"{key}__default.json", "--method", method, "--style", "token",
            "--family", "encoder_decoder", "--val_share", "0.03", "--out", f"data/{key}_{method}.json",
            *(["--completions", f"{key}_right.json"] if method == "ft_cot" else []))
    texts = [record[side] for record in json.loads((folder / "data" / f"{key}_ft_cot.json").read_text())["train"][:3000] for side in ("prompt", "completion")]
    (folder / f"{key}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run(folder, "data/prepare_tokenizer.py", "--input", f"{key}.jsonl", "--out", f"models/student-{key}", "--vocab_size", SETS[key], "--size", "tiny")


def student(folder, key, method, seed, steps):
    """One student; -> (accuracy on the test part at the step that is best on the validation part, seconds of training)."""
    name = f"{key}-{method}-{seed}"
    run(folder, "seq2seq.py", "--model_init_name", f"student-{key}", "--data", f"{key}_{method}", "--training_run_name", name, "--seed", seed, "--max_steps", steps,
        "--eval_steps", steps // 4, "--save_steps", steps // 4, *TRAIN.split(), *EVALUATE.split())
    found = {json.loads(path.read_text())[0]["orig_d"]["dataset_key"] for path in (folder / "models" / name).glob("temperature=*.json")}
    assert found == {key}
    shown = run(folder, "data/cot.py", "evaluate", "--best_on_eval", folder / "models" / name)
    best = int(shown.split("best on eval is step ")[1].split()[0]) or steps  # step 0: none was ever better than no training
    test = folder / "models" / name / f"test_temperature=0.00_n=1_step={best}.json"
    if test.exists():
        shown = run(folder, "data/cot.py", "evaluate", test)
    else:  # the run's own test was that of the last step
        run(folder, "seq2seq.py", "--no_train", "--model_init_path", folder / "models" / name / f"checkpoint-{best}", "--data", f"{key}_{method}",
            "--training_run_name", f"{name}-best", *EVALUATE.split())
        shown = run(folder, "data/cot.py", "evaluate", folder / "models" / f"{name}-best" / "test_temperature=0.00_n=1_step=0.json")
    line = next(line for line in shown.splitlines() if "test_temperature" in line and key in line)
    rows = [json.loads(line) for line in (folder / "models" / name / "metrics.jsonl").read_text().splitlines()]
    trained = sum(row["target_tokens"] / row["tokens_per_sec"] for row in rows if row["split"] == "train")
    return round(float(line.split()[4]) / 100, 4), round(trained, 1), best


def draw(found, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for i, method in enumerate(METHODS):
        for k, key in enumerate(SETS):
            values = [100 * value for value in found[f"{key}/{method}"]["accuracy"]]
            axes.bar(k + 0.4 * i - 0.2, statistics.mean(values), 0.36, color=f"C{i}", alpha=0.6, label=method if k == 0 else None)
            axes.plot([k + 0.4 * i - 0.2] * len(values), values, "k.")
    axes.set_xticks(range(len(SETS)), [key.replace("_", " ") for key in SETS])
    axes.set(ylabel="accuracy on the test part [%]", ylim=(0, 105))
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--n", type=int, default=20000, help="questions of each set")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--folder", help="to work in, default: a temporary one")
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("--figure", help="draw them into this .png or .svg")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(args.folder or temporary).resolve()
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for key in args.sets:
            prepare(folder, key, args.n)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            asked = {(key, method): [pool.submit(student, folder, key, short, seed, args.steps) for seed in range(args.seeds)]
                     for key in args.sets for method, short in METHODS.items()}
            found = {}
            for (key, method), futures in asked.items():
                results = [future.result() for future in futures]
                found[f"{key}/{method}"] = dict(zip(("accuracy", "seconds", "best_step"), map(list, zip(*results))))
                print(f"{key:<26} {method:<13} accuracy {[round(a, 4) for a, *_ in results]}, {statistics.mean(s for _, s, _ in results):.0f} s", flush=True)
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps({"device": harness.device_name(), "command": f"python benchmarks/cot_study.py --n {args.n} --steps {args.steps} --seeds {args.seeds} --sets {' '.join(args.sets)}",
                                                      "questions": args.n, "steps": args.steps, "flags": f"{TRAIN} {EVALUATE}", **found}, indent=2) + "\n")
    if args.figure:
        draw(found, args.figure)


if __name__ == "__main__":
    main()
