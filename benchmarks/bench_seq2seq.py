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
import pathlib
import random
import statistics
import tempfile

import harness

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
    harness.run_script("seq2seq.py", [
        "--mount_dir", str(folder), "--model_init_name", "bench", "--data", "bench", "--training_run_name", "run", "--overwrite",
        "--max_steps", str(3 * every), "--train_batch_size", str(args.batch), "--gradient_accumulation_steps", str(args.accumulation),
        "--logging_steps", str(every), "--max_new_tokens", "1", "--precision", args.precision, "--eval_steps", "1000000",
        "--save_steps", "0", "--allow_lossy", *(["--gradient_checkpointing"] if args.checkpointing else [])])
    rows = harness.metric_rows(folder / "models" / "run")[1:]
    tokens = sum(row["target_tokens"] for row in rows)
    found = {"tokens_per_sec": tokens / sum(row["target_tokens"] / row["tokens_per_sec"] for row in rows),
             "padding_share": statistics.mean(row["padding_share"] for row in rows), "peak_memory_gb": rows[-1]["peak_memory_gb"]}
    mfu = [row["mfu_of_matmul"] for row in rows if "mfu_of_matmul" in row]
    return {**found, **({"mfu_of_matmul": statistics.mean(mfu)} if mfu else {})}


def run_hf(args, folder, steps, grouped):
    """In this process (a child of its own): Seq2SeqTrainer, timed from the first third of the steps on."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments
    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "bench")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "models" / "bench")
    pairs = json.loads((folder / "data" / "bench.json").read_text())["train"]
    rows = [{"input_ids": tokenizer(p["prompt"]).input_ids, "labels": tokenizer(p["completion"]).input_ids} for p in pairs]
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    every, clock = max(1, steps // 3), harness.StepClock()
    counts = []  # (target tokens, real tokens, computed positions) of each forward step, in order

    def counted(features):
        batch = collator(features)
        n_targets = int((batch["labels"] != -100).sum())
        counts.append((n_targets, n_targets + int(batch["attention_mask"].sum()), batch["labels"].numel() + batch["input_ids"].numel()))
        return batch

    options = {**harness.trainer_options(folder, args, every), "bf16": args.precision == "bf16", "gradient_checkpointing": args.checkpointing,
               **(harness.by_length(Seq2SeqTrainingArguments) if grouped else {})}
    trainer = Seq2SeqTrainer(model=model, args=Seq2SeqTrainingArguments(**options), train_dataset=rows, data_collator=counted,
                             callbacks=[clock], processing_class=tokenizer)
    trainer.train()
    # by position, not by when they were collated: the loader is a batch ahead
    targets, real, computed = (sum(column) for column in zip(*counts[every * args.accumulation: 3 * every * args.accumulation]))
    print(json.dumps({"tokens_per_sec": targets / (clock.times[-1] - clock.times[every - 1]), "padding_share": 1 - real / computed,
                      "peak_memory_gb": harness.peak_memory_gb()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="JSON lines with question and answer")
    parser.add_argument("--model", choices=SIZES, default="mini")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=8, help="examples per forward step")
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=45, help="optimizer steps of a run; the first third is not timed")
    parser.add_argument("--checkpointing", action="store_true")
    harness.add_flags(parser)
    args = parser.parse_args()
    if args.child:
        run_hf(args, pathlib.Path(args.folder), args.steps, args.child == "hf-grouped")
        return
    if harness.no_gpu(args):
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        prepare(args, folder)
        results = harness.alternate(
            PEERS, args.rounds, lambda peer: run_ours(args, folder, args.steps) if peer == "ours" else harness.in_child(peer, folder))
    speed = {peer: figures["tokens_per_sec"] for peer, figures in harness.medians(results).items()}
    over_default, over_best = speed["ours"] / speed["hf"], speed["ours"] / max(speed["hf"], speed["hf-grouped"])
    print(f"target tokens/s on {harness.device_name()}: ours {speed['ours']:.0f}, hf {speed['hf']:.0f}, hf-grouped {speed['hf-grouped']:.0f}; "
          f"ours / hf = {over_default:.2f}, ours / best hf = {over_best:.2f}")
    harness.write_summary(args, results, ratio_over_hf_default=over_default, ratio_over_hf_best=over_best)


if __name__ == "__main__":
    main()
