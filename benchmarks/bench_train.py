"""Training speed of the trainers and of their peers, and clf.py's scoring, in turn on one machine.

    pip install -r benchmarks/requirements.txt
    python benchmarks/bench_train.py --task sft --data gsm8k_train.jsonl       # 2 CPU cores: 10 min
    python benchmarks/bench_train.py --task seq2seq --data gsm8k_train.jsonl --width 768 \\
        --batch 64 --gpu-only

Data: JSON lines with question and answer (GSM8K: github.com/openai/grade-school-math). Both sides
have the same model with new weights, examples, batches, precision (bf16 on GPUs), fused
AdamW, clipping. Each run is a process of its own, of which the first third of the steps is not
timed. Figures: target tokens per second; of clf.py texts per second, trained and scored.
    seq2seq            a T5; hf: Seq2SeqTrainer, padded to the longest of a batch; hf-grouped: with
                       its grouping by length
    clf-t5, clf-llama  hf: Trainer and AutoModelForSequenceClassification; hf-grouped
    sft                a Llama; trl: SFTTrainer as it is; trl-packed: packed to rows of 1024
                       tokens, without gradient checkpointing
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

import harness
import tokenizers
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

PACKED = {"packing": True, "max_length": 1024, "per_device_train_batch_size": 1}
PACKED["gradient_checkpointing"] = False
GROUPED = harness.by_length(transformers.TrainingArguments)
HF = {"hf": {}, "hf-grouped": GROUPED}
# of each task the script, the figures that are compared, and the peers with their options
TASKS = {
    "seq2seq": ("seq2seq.py", ["trained"], HF),
    "clf-t5": ("clf.py", ["trained", "scored"], HF),
    "clf-llama": ("clf.py", ["trained", "scored"], HF),
    "sft": ("sft_causal.py", ["trained"], {"trl": {}, "trl-packed": PACKED}),
}
SCRIPT_FLAGS = {
    "seq2seq.py": "--max_new_tokens 1",
    "clf.py": "--max_length 1024 --positive_word the --negative_word of",
    "sft_causal.py": "--max_length 1024 --raw_prompt --n_generate 0",
}


def read_data(args):
    """[record] for the script of the task."""
    records = []
    for line in open(args.data, encoding="utf-8"):
        record = json.loads(line)
        question, answer = record["question"], record["answer"]
        if args.task.startswith("clf"):
            for text in (question, answer):
                records.append({"input": text, "target": len(records) % 2})
        elif args.task == "seq2seq":  # T5 knows no line break
            records.append({"prompt": question, "completion": answer.replace("\n", " ")})
        else:  # which keeps pieces from reaching over the border: TRL tokenises both as one text
            records.append({"prompt": question + "\n", "completion": answer})
    return records[: args.examples]


def write_t5(args, folder, texts):
    model = folder / "models" / "bench"
    (folder / "bench.txt").write_text("\n".join(texts))
    words = f"--input {folder}/bench.txt --out {model} --vocab_size 4000 --size tiny"
    harness.run_script("data/prepare_tokenizer.py", words)
    config = transformers.T5Config.from_pretrained(model)
    config.update({"d_model": args.width, "d_ff": 4 * args.width, "num_heads": args.width // 32})
    config.update({"num_layers": args.layers, "num_decoder_layers": args.layers})
    # Trainer's T5 has its head tied to the embedding, whatever the configuration says
    config.update({"vocab_size": 32128, "dropout_rate": 0.1, "tie_word_embeddings": True})
    config.save_pretrained(model)


def write_llama(args, folder, texts):
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|pad|>"]
    bpe.train_from_iterator(texts, vocab_size=8000, special_tokens=special)
    names = dict(zip(("eos_token", "pad_token"), special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers + 2,
        num_attention_heads=args.width // 32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.save_pretrained(folder / "models" / "bench")
    tokenizer.save_pretrained(folder / "models" / "bench")


def prepare(args, folder):
    """The model without weights, its tokenizer learnt from the data, and data/*.json."""
    records = read_data(args)
    texts = []
    for record in records:
        texts += [text for text in record.values() if isinstance(text, str)]
    (folder / "data").mkdir()
    lists = {"train": records, "eval": records[:1]}
    (folder / "data" / "bench.json").write_text(json.dumps(lists))
    (folder / "data" / "score.json").write_text(json.dumps({"eval": records}))
    write = write_t5 if args.task in ("seq2seq", "clf-t5") else write_llama
    write(args, folder, texts)


def run_ours(args, folder):
    script = TASKS[args.task][0]
    every = args.steps // 3
    words = (
        f"--mount_dir {folder} --model_init_name bench --training_run_name run --overwrite "
        f"--train_batch_size {args.batch} --gradient_accumulation_steps {args.accumulation} "
        f"--max_steps {3 * every} --logging_steps {every} --eval_steps 1000000 --save_steps 0 "
        f"--data bench {SCRIPT_FLAGS[script]}"
    )
    harness.run_script(script, words)
    rows = harness.metric_rows(folder / "models" / "run")[1:]
    speed = statistics.harmonic_mean(row["tokens_per_sec"] for row in rows)
    found = {"trained": speed, "peak_memory_gb": rows[-1]["peak_memory_gb"]}
    if script == "clf.py":
        found.update(harness.in_child("score", folder))
    return found


def run_scoring(args, folder):
    """clf.py --no_train in this process, its scoring timed."""
    sys.path.insert(0, str(harness.ROOT))
    import clf
    import common

    words = f"--mount_dir {folder} --model_init_name bench --data score --no_train --overwrite "
    words += f"--eval_batch_size {args.batch} --training_run_name score {SCRIPT_FLAGS['clf.py']}"
    score = clf.score
    speeds = []

    def timed_score(args, engine, rows, device):
        start = time.perf_counter()
        logits = score(args, engine, rows, device)
        speeds.append(len(logits) / (time.perf_counter() - start))
        return logits

    clf.score = timed_score
    common.adopt_launcher()
    clf.main(clf.parse_args(words.split()))
    print(json.dumps({"scored": speeds[0]}))


def make_trainer(args, folder, count, options):
    """The trainer of a peer; count(collator) counts what a collator makes."""
    config = AutoConfig.from_pretrained(folder / "models" / "bench")
    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "bench")
    records = json.loads((folder / "data" / "bench.json").read_text())["train"]
    common = {"processing_class": tokenizer, "callbacks": [harness.StepClock()]}
    if args.task == "sft":
        import datasets
        import trl

        trainer = trl.SFTTrainer(
            model=transformers.AutoModelForCausalLM.from_config(config),
            args=trl.SFTConfig(**options),
            train_dataset=datasets.Dataset.from_list(records),
            **common,
        )
        trainer.data_collator = count(trainer.data_collator)
        return trainer
    if args.task == "seq2seq":
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        for record in records:
            record["input_ids"] = tokenizer(record.pop("prompt")).input_ids
            record["labels"] = tokenizer(record.pop("completion")).input_ids
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, model=model)
        arguments = transformers.Seq2SeqTrainingArguments(**options)
        return transformers.Seq2SeqTrainer(
            model=model,
            args=arguments,
            train_dataset=records,
            data_collator=count(collator),
            **common,
        )
    auto_class = transformers.AutoModelForSequenceClassification
    config.num_labels = 2
    for record in records:
        record["input_ids"] = tokenizer(record.pop("input")).input_ids
        record["labels"] = record.pop("target")
    return transformers.Trainer(
        model=auto_class.from_config(config),
        args=transformers.TrainingArguments(**options, per_device_eval_batch_size=args.batch),
        train_dataset=records,
        data_collator=count(transformers.DataCollatorWithPadding(tokenizer)),
        **common,
    )


def mean_tokens(folder):
    """Of an example of prompt and completion."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "bench")
    records = json.loads((folder / "data" / "bench.json").read_text())["train"]
    texts = [record["prompt"] + record["completion"] for record in records]
    return statistics.mean(map(len, tokenizer(texts).input_ids))


def run_trainer(args, folder, peer):
    every = args.steps // 3
    options = harness.trainer_options(folder, args, every)
    options["bf16"] = torch.cuda.is_available()
    options.update(TASKS[args.task][2][peer])
    n_accumulated = args.accumulation
    if options.get("packing"):  # as many forward steps as have the tokens of one of our steps
        n_tokens = args.batch * args.accumulation * mean_tokens(folder)
        n_accumulated = max(1, round(n_tokens / options["max_length"]))
        options["gradient_accumulation_steps"] = n_accumulated
    n_targets = []  # of each forward step; the loader is ahead of the training

    def count(collator):
        def collate(features):
            batch = collator(features)
            n_targets.append(int((batch["labels"] != -100).sum()))
            return batch

        return collate

    trainer = make_trainer(args, folder, count, options)
    found = {}
    if args.task.startswith("clf"):
        prediction = trainer.predict(trainer.train_dataset)
        found["scored"] = prediction.metrics["test_samples_per_second"]
        n_targets.clear()
    trainer.train()
    first = every * n_accumulated
    (clock,) = [c for c in trainer.callback_handler.callbacks if type(c) is harness.StepClock]
    seconds = clock.times[-1] - clock.times[every - 1]
    found["trained"] = sum(n_targets[first : 3 * first]) / seconds
    print(json.dumps({**found, "peak_memory_gb": harness.peak_memory_gb()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--task", choices=list(TASKS), required=True)
    add("--data", required=True)
    add("--width", type=int, default=256)
    add("--layers", type=int, default=4, help="of a T5's encoder and of its decoder; a Llama: + 2")
    add("--batch", type=int, default=8, help="examples of a forward step")
    add("--accumulation", type=int, default=2)
    add("--steps", type=int, default=45)
    add("--examples", type=int, default=2000)
    harness.add_flags(parser)
    args = parser.parse_args()
    if args.child == "score":
        return run_scoring(args, pathlib.Path(args.folder))
    if args.child:
        return run_trainer(args, pathlib.Path(args.folder), args.child)
    if harness.no_gpu(args):
        return None

    def run(peer):
        return run_ours(args, folder) if peer == "ours" else harness.in_child(peer, folder)

    _, figures, peers = TASKS[args.task]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        prepare(args, folder)
        results = harness.alternate(["ours", *peers], args.rounds, run)
    ratios = {}
    for figure in figures:
        ratios[figure] = harness.ratios(results, "ours", peers, figure)
    memory = {}
    for peer, runs in results.items():
        memory[peer] = statistics.median(run["peak_memory_gb"] for run in runs)
    harness.write_summary(args, ratios=ratios, peak_memory_gb=memory, runs=results)
    return None


if __name__ == "__main__":
    main()
