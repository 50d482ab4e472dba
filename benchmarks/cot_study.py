"""Does a rationale help a tiny student? A scripted teacher, a T5 from scratch.

    python benchmarks/cot_study.py --out benchmarks/results/cot_cpu_2cores.json   # 2 hours

For each set and seed two students see the same questions in as many steps: one learns rationale and
answer, one the answer alone. The step is chosen on the validation part; accuracy is that of the
test part, 30 % of the questions.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETS = {"coin_flip": 190, "last_letter_concatenation": 110}  # and the pieces of its tokenizer
TRAIN = "--train_batch_size 64 --learning_rate 0.003 --lr_scheduler_type cosine --warmup_steps 100"
EVALUATE = "--eval_batch_size 128 --max_new_tokens 100"


def run(folder, script, *words):
    """What a command in the folder prints."""
    words = [sys.executable, str(ROOT / script), *map(str, words)]
    return subprocess.run(words, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def prepare(folder, key, n):
    """Data files with and without rationales, and a tokenizer."""
    run(folder, "data/cot.py", "make", key, "--n", n, "--out", "d.json")
    run(folder, "data/cot.py", "split", "--dataset", "d.json", "--out", "s.json")
    words = ["export", "--dataset", "d.json", "--split", "s.json", "--eval_fraction", 0.03]
    run(folder, "data/cot.py", *words, "--rationales", "--out", "data/rationale.json")
    run(folder, "data/cot.py", *words, "--out", "data/answer.json")
    records = json.loads((folder / "data" / "rationale.json").read_text())["train"][:3000]
    texts = [{"text": f"{record['prompt']} {record['completion']}"} for record in records]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    words = ["--vocab_size", SETS[key], "--size", "tiny", "--out", "models/student"]
    run(folder, "data/prepare_tokenizer.py", "--input", "texts.jsonl", *words)


def accuracy(folder, path):
    """In per cent, of the predictions in a file."""
    table = run(folder, "data/cot.py", "evaluate", path)
    return float(table.splitlines()[1].split()[0])


def student(folder, data, seed, steps):
    """Accuracy in per cent on the test part, at the step that is best on the validation part."""
    name = f"{data}-{seed}"
    words = ["--model_init_name", "student", "--data", data, "--training_run_name", name]
    words += ["--seed", seed, "--max_steps", steps, "--save_total_limit", 20]
    words += ["--eval_steps", steps // 4, *TRAIN.split(), *EVALUATE.split()]
    run(folder, "seq2seq.py", *words)
    run_dir = folder / "models" / name
    accuracies = {}
    for path in run_dir.glob("temperature=*.json"):
        step = int(path.stem.partition("_step=")[2])
        if step > 0:
            accuracies[step] = accuracy(folder, path)
    best = max(sorted(accuracies), key=accuracies.get)  # of equals the first
    if best != steps:  # whose test the run itself has made
        words = ["--no_train", "--data", data, "--training_run_name", f"{name}-best"]
        words += ["--model_init_path", run_dir / f"checkpoint-{best}", *EVALUATE.split()]
        run(folder, "seq2seq.py", *words)
        run_dir = folder / "models" / f"{name}-best"
    return accuracy(folder, next(run_dir.glob("test_temperature=*.json")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--n", type=int, default=20000, help="questions of each set")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", required=True, help="JSON to write")
    args = parser.parse_args()
    accuracies = {}
    for key in SETS:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            (folder / "data").mkdir()
            prepare(folder, key, args.n)
            for data in ("rationale", "answer"):
                found = [student(folder, data, seed, args.steps) for seed in range(args.seeds)]
                accuracies[f"{key}/{data}"] = found
                print(key, data, found, flush=True)
    found = {"flags": f"{TRAIN} {EVALUATE}", **vars(args), "accuracy": accuracies}
    pathlib.Path(args.out).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
