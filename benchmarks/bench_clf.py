"""Speed of clf.py against Hugging Face's Trainer with a sequence-classification head on the same backbone.

    pip install -r benchmarks/requirements.txt
    python benchmarks/bench_clf.py --data questions.jsonl --out benchmarks/results/clf_cpu_2cores.json   # 2 CPU cores
    python benchmarks/bench_clf.py --family llama --size base --precision bf16 --batch 64 --gpu-only     # one GPU

Scored texts per second: `clf.py --no_train` against `Trainer.predict`; trained input tokens per second (padding not
counted): the two training loops, fused AdamW, clipping at 1.0. Same weights of the backbone (random), texts, batch
sizes, precision and cores; each run in its own process, the peers alternately, `--rounds` times; start-up, tokenising
and the first third of the steps are not timed.
    ours           clf.py
    hf             Trainer, AutoModelForSequenceClassification, padded to the longest of the batch, its defaults
    hf-grouped     the same with length grouping (training only: predict has no such option)
Data: JSON lines; the values of "question" and "answer" (or "input") are the texts, in the order of the file. Without
--data: random words, lengths drawn log-normally (median 40 words, sigma 0.7).
"""

import argparse
import json
import math
import pathlib
import random
import shutil
import statistics
import tempfile

import harness

SIZES = {"mini": (256, 32, 1024, 4, 8), "base": (768, 64, 2048, 12, 12), "large": (1024, 64, 2816, 24, 16)}  # width, d_kv, d_ff, layers, heads
PEERS = ("ours", "hf", "hf-grouped")


def prepare(args, folder):
    """Two model folders with the same random backbone and one tokenizer learnt from the texts, and the data."""
    import sentencepiece
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
    rng = random.Random(0)
    if args.data:
        records = [json.loads(line) for line in open(args.data, encoding="utf-8")]
        texts = [r[key] for r in records for key in ("input", "question", "answer") if key in r][: args.examples]
    else:
        words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(4000)]
        texts = [" ".join(rng.choices(words, k=max(3, min(300, round(40 * math.exp(0.7 * rng.gauss(0, 1))))))) for _ in range(args.examples)]
    records = [{"input": text, "target": rng.randint(0, 1)} for text in texts]
    model = folder / "models" / "bench"
    model.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(model / "spiece"), vocab_size=4000, hard_vocab_limit=False, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, user_defined_symbols=["▁yes", "▁no"], character_coverage=1.0, minloglevel=2)
    (model / "spiece.vocab").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
    width, d_kv, d_ff, layers, heads = SIZES[args.size]
    torch.manual_seed(0)
    if args.family == "t5":
        built = T5ForConditionalGeneration(T5Config(
            vocab_size=32128, d_model=width, d_kv=d_kv, d_ff=d_ff, num_layers=layers, num_heads=heads, dropout_rate=0.1,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0))
    else:
        built = LlamaForCausalLM(LlamaConfig(
            vocab_size=32128, hidden_size=width, intermediate_size=d_ff, num_hidden_layers=2 * layers, num_attention_heads=heads,
            max_position_embeddings=2048, pad_token_id=0, eos_token_id=1, bos_token_id=1, tie_word_embeddings=True))
    built.save_pretrained(model)
    AutoTokenizer.from_pretrained(model).save_pretrained(model)
    (folder / "data").mkdir()
    (folder / "data" / "score.json").write_text(json.dumps({"eval": records}))
    (folder / "data" / "train.json").write_text(json.dumps({"train": records, "eval": records[:4]}))


def run_ours(args, folder, steps):
    """Scored texts and trained tokens per second of the script as users run it, from its own metrics.jsonl; the first third of the
    steps is left out."""
    every, found = max(1, steps // 3), {}
    shared = ["--mount_dir", str(folder), "--model_init_name", "bench", "--precision", args.precision, "--max_length", "1024",
              "--eval_batch_size", str(args.batch), "--training_run_name", "run"]
    jobs = {"score": ["--data", "score", "--no_train"],
            "train": ["--data", "train", "--max_steps", str(3 * every), "--logging_steps", str(every), "--train_batch_size", str(args.batch),
                      "--gradient_accumulation_steps", str(args.accumulation), "--save_steps", "0", "--eval_steps", "1000000"]}
    for name, words in jobs.items():
        harness.run_script("clf.py", [*shared, *words])
        if name == "score":
            found["scored_per_sec"] = harness.metric_rows(folder / "models" / "run", "eval")[0]["eval/texts_per_sec"]
        else:
            rows = harness.metric_rows(folder / "models" / "run")[1:]
            seconds = [row["target_tokens"] / row["tokens_per_sec"] for row in rows]
            tokens = sum(row["input_tokens_per_sec"] * s for row, s in zip(rows, seconds))
            found["trained_tokens_per_sec"] = tokens / sum(seconds)
            found.update(padding_share=statistics.mean(row["padding_share"] for row in rows), peak_memory_gb=rows[-1]["peak_memory_gb"])
        shutil.rmtree(folder / "models" / "run")
    return found


def run_hf(args, folder, steps, grouped):
    """In this process (a child of its own): Trainer.predict over all texts, then Trainer.train from a fresh head."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments
    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "bench")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "models" / "bench", num_labels=2, pad_token_id=0, dtype=torch.float32)
    records = json.loads((folder / "data" / "score.json").read_text())["eval"]
    ids = tokenizer([record["input"] for record in records], truncation=True, max_length=1024).input_ids
    rows = [{"input_ids": row if args.family == "t5" else row[:-1], "labels": record["target"]} for row, record in zip(ids, records)]
    collator, every = DataCollatorWithPadding(tokenizer), max(1, steps // 3)
    clock, counts = harness.StepClock(), []  # counts: (real tokens, computed positions) of each forward step, in order

    def counted(features):
        batch = collator(features)
        counts.append((int(batch["attention_mask"].sum()), batch["input_ids"].numel()))
        return batch

    options = {**harness.trainer_options(folder, args, every), "per_device_eval_batch_size": args.batch, "bf16": args.precision == "bf16",
               **(harness.by_length(TrainingArguments) if grouped else {})}
    trainer = Trainer(model=model, args=TrainingArguments(**options), train_dataset=rows, data_collator=counted, callbacks=[clock],
                      processing_class=tokenizer)
    found = {}
    if not grouped:
        found["scored_per_sec"] = trainer.predict(rows).metrics["test_samples_per_second"]
    counts.clear()
    trainer.train()
    real, computed = (sum(column) for column in zip(*counts[every * args.accumulation: 3 * every * args.accumulation]))
    print(json.dumps({**found, "trained_tokens_per_sec": real / (clock.times[-1] - clock.times[every - 1]), "padding_share": 1 - real / computed,
                      "peak_memory_gb": harness.peak_memory_gb()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="JSON lines with input, or question and answer")
    parser.add_argument("--family", choices=["t5", "llama"], default="t5")
    parser.add_argument("--size", choices=SIZES, default="mini")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=16, help="texts per forward step, training and scoring")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of a training run; the first third is not timed")
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
    median = harness.medians(results)
    ours, hf, grouped = (median[peer] for peer in PEERS)
    ratios = {"scoring_over_hf": ours["scored_per_sec"] / hf["scored_per_sec"],
              "training_over_hf": ours["trained_tokens_per_sec"] / hf["trained_tokens_per_sec"],
              "training_over_hf_grouped": ours["trained_tokens_per_sec"] / grouped["trained_tokens_per_sec"]}
    print(f"{args.family} on {harness.device_name()}: scoring {ratios['scoring_over_hf']:.2f} x Trainer.predict; training "
          f"{ratios['training_over_hf']:.2f} x Trainer, {ratios['training_over_hf_grouped']:.2f} x with its length grouping")
    harness.write_summary(args, results, **ratios)


if __name__ == "__main__":
    main()
