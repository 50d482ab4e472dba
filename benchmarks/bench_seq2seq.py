"""Training speed of seq2seq.py against Hugging Face's Seq2SeqTrainer: target tokens per second and peak memory.

    pip install -r benchmarks/requirements.txt
    python benchmarks/bench_seq2seq.py --data gsm8k_train.jsonl                      # 2 CPU cores, about 10 minutes
    python benchmarks/bench_seq2seq.py --data gsm8k_train.jsonl --model t5-base --precision bf16 --batch 32 --gpu-only

Same model (random weights), same examples, same batch, precision, optimiser (fused AdamW, clipping at 1.0) and cores.
The peers run alternately, `--rounds` times, each run in its own process; the first steps of a run are not timed.
    ours           seq2seq.py, the engine at ZeRO stage 0 (CPU) or 1 (bf16)
    hf             Seq2SeqTrainer with its defaults: random order, padded to the longest of the batch
    hf-grouped     the same with its length grouping
Data: JSON lines with "question" and "answer" (GSM8K: openai/grade-school-math). Without --data, lengths drawn from
GSM8K's distribution (log-normal) and random words.
Without a GPU and --gpu-only the figure is "not run".
"""

import argparse
import json
import math
import os
import pathlib
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = {  # name: d_model, d_kv, d_ff, layers, heads
    "mini": (256, 32, 1024, 4, 8), "t5-small": (512, 64, 1024, 8, 6), "t5-base": (768, 64, 2048, 12, 12),
    "t5-large": (1024, 64, 2816, 24, 16), "t5-3b": (2048, 64, 5120, 24, 32),
}
PEERS = ("ours", "hf", "hf-grouped")


def prepare(args, folder):
    """A model folder with random weights, a tokenizer learnt from the data, and the data in our format."""
    import sentencepiece
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration
    if args.data:
        records = [json.loads(line) for line in open(args.data, encoding="utf-8")]
        pairs = [{"prompt": r["question"], "completion": r["answer"].replace("\n", " ")} for r in records][: args.examples]
    else:
        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(4000)]
        def text(median, sigma):
            return " ".join(rng.choices(words, k=max(4, min(200, round(median * math.exp(sigma * rng.gauss(0, 1)))))))
        pairs = [{"prompt": text(42, 0.36), "completion": text(45, 0.5)} for _ in range(args.examples)]
    model = folder / "models" / "bench"
    model.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for p in pairs for text in p.values()), model_prefix=str(model / "spiece"), vocab_size=4000,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0, minloglevel=2)
    (model / "spiece.vocab").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
    width, d_kv, d_ff, layers, heads = SIZES[args.model]
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(
        vocab_size=32128, d_model=width, d_kv=d_kv, d_ff=d_ff, num_layers=layers, num_heads=heads, dropout_rate=0.1,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0)).save_pretrained(model)
    AutoTokenizer.from_pretrained(model).save_pretrained(model)
    (folder / "data").mkdir()
    (folder / "data" / "bench.json").write_text(json.dumps({"train": pairs, "eval": pairs[:1]}))


def run_ours(args, folder, steps):
    """One run of the script as users run it; speed from its own metrics.jsonl, the first window left out."""
    every = max(1, steps // 3)
    command = [sys.executable, str(ROOT / "seq2seq.py"), "--mount_dir", str(folder), "--model_init_name", "bench", "--data", "bench",
               "--training_run_name", "run", "--overwrite", "--max_steps", str(3 * every), "--train_batch_size", str(args.batch),
               "--gradient_accumulation_steps", str(args.accumulation), "--logging_steps", str(every), "--max_new_tokens", "1",
               "--precision", args.precision, "--eval_steps", "1000000", "--save_steps", "0", "--allow_lossy",
               *(["--gradient_checkpointing"] if args.checkpointing else [])]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stdout[-2000:] + result.stderr[-4000:])
    rows = [json.loads(line) for line in (folder / "models" / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "train"][1:]
    tokens = sum(row["target_tokens"] for row in rows)
    found = {"tokens_per_sec": tokens / sum(row["target_tokens"] / row["tokens_per_sec"] for row in rows),
             "padding_share": statistics.mean(row["padding_share"] for row in rows), "peak_memory_gb": rows[-1]["peak_memory_gb"]}
    mfu = [row["mfu_of_matmul"] for row in rows if "mfu_of_matmul" in row]
    return {**found, **({"mfu_of_matmul": statistics.mean(mfu)} if mfu else {})}


def run_hf(args, folder, steps, grouped):
    """In this process (a child of its own): Seq2SeqTrainer, timed from the first third of the steps on."""
    import torch
    from transformers import (AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, Seq2SeqTrainer,
                              Seq2SeqTrainingArguments, TrainerCallback)
    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "bench")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "models" / "bench")
    pairs = json.loads((folder / "data" / "bench.json").read_text())["train"]
    rows = [{"input_ids": tokenizer(p["prompt"]).input_ids, "labels": tokenizer(p["completion"]).input_ids} for p in pairs]
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    every = max(1, steps // 3)
    clock, counts = {}, []  # counts: (target tokens, real tokens, computed positions) of each forward step, in order

    def counted(features):
        batch = collator(features)
        n_targets = int((batch["labels"] != -100).sum())
        counts.append((n_targets, n_targets + int(batch["attention_mask"].sum()), batch["labels"].numel() + batch["input_ids"].numel()))
        return batch

    class Clock(TrainerCallback):
        def on_step_end(self, args_, control_state, control, **_):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if control_state.global_step == every:
                clock["start"] = time.perf_counter()
            clock["end"] = time.perf_counter()

    options = {"output_dir": str(folder / "hf"), "per_device_train_batch_size": args.batch, "max_steps": 3 * every,
               "gradient_accumulation_steps": args.accumulation, "optim": "adamw_torch_fused", "max_grad_norm": 1.0, "learning_rate": 5e-5,
               "save_strategy": "no", "report_to": "none", "logging_steps": every, "bf16": args.precision == "bf16", "disable_tqdm": True,
               "gradient_checkpointing": args.checkpointing, "dataloader_pin_memory": torch.cuda.is_available(),
               "use_cpu": not torch.cuda.is_available()}
    if grouped:  # the option's name changed in transformers 5
        name = "train_sampling_strategy" if "train_sampling_strategy" in Seq2SeqTrainingArguments.__dataclass_fields__ else "group_by_length"
        options[name] = "group_by_length" if name.startswith("train") else True
    trainer = Seq2SeqTrainer(model=model, args=Seq2SeqTrainingArguments(**options), train_dataset=rows, data_collator=counted,
                             callbacks=[Clock()], processing_class=tokenizer)
    trainer.train()
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        peak = int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text()).group(1)) * 1024 / 1e9
    # by position, not by when they were collated: the loader is a batch ahead
    targets, real, computed = (sum(column) for column in zip(*counts[every * args.accumulation: 3 * every * args.accumulation]))
    print(json.dumps({"tokens_per_sec": targets / (clock["end"] - clock["start"]), "padding_share": 1 - real / computed,
                      "peak_memory_gb": peak}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="JSON lines with question and answer")
    parser.add_argument("--model", choices=SIZES, default="mini")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=8, help="examples per forward step")
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=45, help="optimizer steps of a run; the first third is not timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--gpu-only", action="store_true", help='print "not run" where there is no GPU')
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_hf(args, pathlib.Path(args.folder), args.steps, args.child == "hf-grouped")
        return
    import torch
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {len(os.sched_getaffinity(0))} cores"
    if args.gpu_only and not torch.cuda.is_available():
        print("not run: no GPU here")
        return
    results = {peer: [] for peer in PEERS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        prepare(args, folder)
        for round_ in range(args.rounds):
            for peer in PEERS:
                if peer == "ours":
                    found = run_ours(args, folder, args.steps)
                else:
                    child = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child", peer, "--folder", str(folder)],
                                           capture_output=True, text=True)
                    if child.returncode:
                        sys.exit(child.stderr[-4000:])
                    found = json.loads(child.stdout.strip().splitlines()[-1])
                results[peer].append(found)
                print(f"round {round_ + 1}  {peer:<11}" + "  ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
    median = {peer: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for peer, runs in results.items()}
    speed = {peer: median[peer]["tokens_per_sec"] for peer in PEERS}
    summary = {"command": " ".join(["python", "benchmarks/bench_seq2seq.py", *sys.argv[1:]]), "device": device,
               "python": platform.python_version(), "torch": torch.__version__, "transformers": __import__("transformers").__version__,
               "deepspeed": __import__("deepspeed").__version__, "median": median, "runs": results,
               "ratio_over_hf_default": speed["ours"] / speed["hf"], "ratio_over_hf_best": speed["ours"] / max(speed["hf"], speed["hf-grouped"])}
    print(f"target tokens/s on {device}: ours {speed['ours']:.0f}, hf {speed['hf']:.0f}, hf-grouped {speed['hf-grouped']:.0f}; "
          f"ours / hf = {summary['ratio_over_hf_default']:.2f}, ours / best hf = {summary['ratio_over_hf_best']:.2f}")
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
