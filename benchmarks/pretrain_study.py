"""Does pretraining on a little text help? A tiny T5 on a few MB for some minutes, then fine-tuned on GLUE tasks from it and from scratch.

    python benchmarks/pretrain_study.py --data ../shared/data --out benchmarks/results/pretrain_study_cpu_2cores.json

--data: a folder with text/tinyshakespeare.txt, and where they are sciq/, gsm8k_train.jsonl, alpaca/, oasst/ (text only) and the
training sentences, without labels, of SST-2/, CoLA/, RTE/ and STS-B/; the tasks are SST-2 and STS-B. Everything is one command
of the scripts each, in --folder (default: a temporary one). `ways`: the SST-2 task from the pretrained model in full, by
LoRA and by bottleneck adapters; sst2_300: its first 300 training records alone. About 40 minutes on 2 cores.
"""

import argparse
import csv
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import harness
import numpy as np

SEEDS = (0, 1, 2)
FINE_TUNE = "--train_batch_size 32 --num_epochs 8 --warmup_steps 50 --eval_batch_size 128 --logging_steps 100 --save_total_limit 1"
FEW = "--num_epochs 20 --warmup_steps 20 --eval_steps 20"  # of 300 records
WAYS = {"full": "--learning_rate 1e-3", "lora": "--lora_rank 16 --lora_targets all-linear --learning_rate 5e-3",
        "adapter": "--train_adapter --reduction_factor 4 --learning_rate 5e-3"}
METRICS = {"sst2": "--metrics accuracy --labels negative positive --metric_for_best accuracy --max_new_tokens 8",
           "stsb": "--metrics spearman pearson --metric_for_best spearman --max_new_tokens 8"}  # as prepare_glue.py says


def texts(data):
    """The pieces of text of the folder."""
    yield from (data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8").split("\n\n")
    if (data / "sciq").is_dir():
        with open(data / "sciq" / "SciQ_valid.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                yield from (row["support"], row["question"])
    if (data / "gsm8k_train.jsonl").is_file():
        yield from (json.loads(line)["question"] for line in open(data / "gsm8k_train.jsonl", encoding="utf-8"))
    for path in sorted((data / "alpaca").glob("*.json")):
        for row in json.loads(path.read_text(encoding="utf-8")):
            yield from (row["instruction"], row["input"], row["output"])
    for path in sorted((data / "oasst").glob("*messages.jsonl")):
        yield from (json.loads(line)["text"] for line in open(path, encoding="utf-8"))
    for task, columns in (("SST-2", ["sentence"]), ("RTE", ["sentence1", "sentence2"]), ("STS-B", ["sentence1", "sentence2"]), ("CoLA", None)):
        if (data / task).is_dir():
            table = [line.rstrip("\n").split("\t") for line in open(data / task / "train.tsv", encoding="utf-8")]
            places = [table[0].index(name) for name in columns] if columns else [3]
            yield from (row[i] for row in table[1 if columns else 0:] for i in places)


def run(folder, words):
    """One command in the folder; -> its words, for the record."""
    script, *words = words
    result = subprocess.run([sys.executable, str(harness.ROOT / script), *words], cwd=folder, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stdout[-2000:] + result.stderr[-4000:])
    return " ".join(["python", script, *words])


def unigram(folder):
    """Cross entropy of the held-out text under the frequencies of the training text [nats per token]."""
    corpus = folder / "data" / "corpus"
    kind = json.loads((corpus / "corpus.json").read_text())["dtype"]
    counts = np.bincount(np.fromfile(corpus / "train.ids", kind), minlength=4100) + 0.1
    return float(-np.log(counts / counts.sum())[np.fromfile(corpus / "eval.ids", kind)].mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="the folder of data sets")
    parser.add_argument("--steps", type=int, default=1600, help="of pretraining, about 10 minutes")
    parser.add_argument("--folder", help="to work in, default: a temporary one")
    parser.add_argument("--out", help="write the figures to this JSON file")
    args = parser.parse_args()
    data = pathlib.Path(args.data).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(args.folder or temporary).resolve()
        (folder / "data" / "text").mkdir(parents=True, exist_ok=True)
        pieces = [" ".join(text.split()) for text in texts(data)]
        (folder / "data" / "text" / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in pieces if text))
        commands = [run(folder, ["data/prepare_tokenizer.py", "--input", "data/text", "--out", "models/scratch", "--vocab_size", "4000", "--size", "tiny"])]
        commands.append(run(folder, ["data/prepare_text.py", "--input", "data/text", "--tokenizer", "models/scratch", "--eval_fraction", "0.02", "--out",
                                     "data/corpus"]))
        words = ("--objective span_corruption --model_init_name scratch --data corpus --input_length 128 --train_batch_size 64 "
                 f"--optimizer adafactor --learning_rate 0.02 --lr_scheduler_type cosine --warmup_steps 100 --max_steps {args.steps} --eval_steps 200 "
                 f"--save_steps 200 --logging_steps 50 --training_run_name pretrained").split()
        start = time.perf_counter()
        commands.append(run(folder, ["seq2seq.py", *words]))
        seconds = time.perf_counter() - start
        rows = [json.loads(line) for line in (folder / "models" / "pretrained" / "metrics.jsonl").read_text().splitlines()]
        evaluations = [{k: row[k] for k in ("step", "eval/loss", "eval/token_accuracy")} for row in rows if row["split"] == "eval"]
        found = {"held_out": evaluations, "unigram_nats_per_text_token": unigram(folder), "text_share_of_targets": 21 / 29, "minutes": seconds / 60}
        print(f"held-out loss {evaluations[-1]['eval/loss']:.3f} after {seconds / 60:.1f} minutes; were the sentinels free, "
              f"{evaluations[-1]['eval/loss'] * 29 / 21:.3f} per token of text; unigram {found['unigram_nats_per_text_token']:.3f}", flush=True)
        for task, files, metric in (("sst2", "SST-2", "accuracy"), ("sst2_300", None, "accuracy"), ("stsb", "STS-B", "spearman")):
            if files:
                commands.append(run(folder, ["data/prepare_glue.py", "--task", task, "--data_dir", str(data / files), "--out", f"data/{task}.json"]))
            else:
                whole = json.loads((folder / "data" / "sst2.json").read_text())
                (folder / "data" / "sst2_300.json").write_text(json.dumps({**whole, "train": whole["train"][:300]}))
            plans = [(start, "full") for start in ("pretrained", "scratch")] + [("pretrained", way) for way in ("lora", "adapter") if task == "sst2"]
            for start, way in plans:
                values = []
                for seed in SEEDS:
                    name = f"{task}-{start}-{way}-{seed}"
                    commands.append(run(folder, ["seq2seq.py", "--model_init_name", start, "--data", task, "--seed", str(seed), "--training_run_name", name,
                                                 *FINE_TUNE.split(), *(FEW.split() if not files else []), *WAYS[way].split(),
                                                 *METRICS[task.split("_")[0]].split()]))
                    rows_of_run = [json.loads(line) for line in (folder / "models" / name / "metrics.jsonl").read_text().splitlines()]
                    values.append(max(row[f"eval/{metric}"] for row in rows_of_run if row["split"] == "eval" and row["step"]))
                found[f"{task}/{start}/{way}/{metric}"] = values
                print(f"{task:<5} from {start:<10} {way:<8} {metric} {statistics.mean(values):.3f} {[round(v, 3) for v in values]}", flush=True)
    if args.out:
        record = [command.replace(str(data), args.data) for command in commands]
        pathlib.Path(args.out).write_text(json.dumps({"device": harness.device_name(), **found, "commands": record}, indent=2) + "\n")


if __name__ == "__main__":
    main()
