"""Training speed of seq2seq.py and of Hugging Face's Seq2SeqTrainer, in turn on one machine.

    pip install -r benchmarks/requirements.txt
    python benchmarks/bench_seq2seq.py --data gsm8k_train.jsonl       # 2 CPU cores: 10 minutes
    python benchmarks/bench_seq2seq.py --data gsm8k_train.jsonl --size base --batch 64 --gpu-only

Data: JSON lines with question and answer (GSM8K: github.com/openai/grade-school-math). The same T5
with new weights, examples, batches, precision (bf16 on GPUs), fused AdamW, clipping. Every run is a
process of its own, of which the first third of the steps is not timed.
    ours         seq2seq.py, as users run it
    hf           Seq2SeqTrainer: random order, padded to the longest of the batch
    hf-grouped   the same with its grouping by length
    against      with --against FOLDER: the seq2seq.py of another checkout
"""

import argparse
import json
import pathlib
import statistics
import tempfile

import harness
import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

MINI = {"d_model": 256, "d_ff": 1024, "num_heads": 8, "num_layers": 4, "num_decoder_layers": 4}


def prepare(args, folder):
    """data/bench.json; models/bench without weights, its tokenizer learnt from the data."""
    records, texts = [], []
    for line in open(args.data, encoding="utf-8"):
        record = json.loads(line)
        completion = record["answer"].replace("\n", " ")  # T5 knows no newline
        records.append({"prompt": record["question"], "completion": completion})
        texts += [record["question"], completion]
    data = folder / "data" / "bench.json"
    data.parent.mkdir()
    data.write_text(json.dumps({"train": records, "eval": records[:1]}))
    (folder / "bench.txt").write_text("\n".join(texts))
    model = folder / "models" / "bench"
    words = f"--input {folder}/bench.txt --out {model} --vocab_size 4000 --size "
    words += args.size or "tiny"
    harness.run_script("data/prepare_tokenizer.py", words.split())
    config = json.loads((model / "config.json").read_text())
    # Seq2SeqTrainer's T5 has its head tied to the embedding, whatever the configuration says
    config.update(vocab_size=32128, dropout_rate=0.1, tie_word_embeddings=True)
    if not args.size:
        config.update(MINI)
    (model / "config.json").write_text(json.dumps(config))


def run_script(args, folder, checkout):
    every = args.steps // 3
    words = (
        f"--mount_dir {folder} --model_init_name bench --data bench --training_run_name run "
        f"--overwrite --train_batch_size {args.batch} "
        f"--gradient_accumulation_steps {args.accumulation} --max_steps {3 * every} "
        f"--logging_steps {every} --eval_steps 1000000 --max_new_tokens 1 --save_steps 0"
    )
    harness.run_script(checkout / "seq2seq.py", words.split())
    rows = harness.metric_rows(folder / "models" / "run")[1:]
    speed = statistics.harmonic_mean(row["tokens_per_sec"] for row in rows)
    return {"tokens_per_sec": speed, "peak_memory_gb": rows[-1]["peak_memory_gb"]}


def run_trainer(args, folder, is_grouped):
    source = folder / "models" / "bench"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(source))
    rows = []
    for record in json.loads((folder / "data" / "bench.json").read_text())["train"]:
        labels = tokenizer(record["completion"]).input_ids
        rows.append({"input_ids": tokenizer(record["prompt"]).input_ids, "labels": labels})
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    n_targets = []  # of each forward step; the loader is ahead of the training

    def collate(features):
        batch = collator(features)
        n_targets.append(int((batch["labels"] != -100).sum()))
        return batch

    every = args.steps // 3
    options = harness.trainer_options(folder, args, every)
    options["bf16"] = torch.cuda.is_available()
    if is_grouped:
        options.update(harness.by_length(Seq2SeqTrainingArguments))
    clock = harness.StepClock()
    Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**options),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[clock],
    ).train()
    first = every * args.accumulation
    seconds = clock.times[-1] - clock.times[every - 1]
    speed = sum(n_targets[first : 3 * first]) / seconds
    print(json.dumps({"tokens_per_sec": speed, "peak_memory_gb": harness.peak_memory_gb()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", required=True)
    add("--size", help="of data/prepare_tokenizer.py, small to xxl; else 256 wide, 2 x 4 layers")
    add("--batch", type=int, default=8, help="examples of a forward step")
    add("--accumulation", type=int, default=2)
    add("--steps", type=int, default=45)
    add("--against", type=pathlib.Path)
    harness.add_flags(parser)
    args = parser.parse_args()
    if args.child:
        run_trainer(args, pathlib.Path(args.folder), args.child == "hf-grouped")
        return
    if harness.no_gpu(args):
        return
    checkouts = {"ours": harness.ROOT}
    if args.against:
        checkouts["against"] = args.against

    def run(peer):
        if peer in checkouts:
            return run_script(args, folder, checkouts[peer])
        return harness.in_child(peer, folder)

    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        prepare(args, folder)
        results = harness.alternate([*checkouts, "hf", "hf-grouped"], args.rounds, run)
    ratios = harness.ratios(results, "ours", "tokens_per_sec")
    harness.write_summary(args, results, ratios=ratios)


if __name__ == "__main__":
    main()
