"""Training speed of the trainers and of their peers, and clf.py's scoring, in turn on one machine.

    pip install -r benchmarks/requirements.txt
    python benchmarks/bench_train.py --task sft --data gsm8k_train.jsonl       # 2 CPU cores: 10 min
    python benchmarks/bench_train.py --task seq2seq --data gsm8k_train.jsonl --width 768 \\
        --batch 64

Data: JSON lines with question and answer (GSM8K: github.com/openai/grade-school-math). Both sides
have the same model with new weights, examples, batches, precision (bf16 on GPUs), fused
AdamW, clipping. Each run is a process of its own, of which the first third of the steps is not
timed. Figures: target tokens per second; of clf.py texts per second, trained and scored.
    seq2seq            a T5; hf: Trainer, padded to the longest of a batch; hf-grouped: with its
                       grouping by length
    clf-t5, clf-llama  hf, hf-grouped: Trainer and AutoModelForSequenceClassification
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
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

PACKED = {"packing": True, "max_length": 1024, "per_device_train_batch_size": 1}
PACKED["gradient_checkpointing"] = False
HF = {"hf": {}, "hf-grouped": {"train_sampling_strategy": "group_by_length"}}
TASKS = {  # the script; the peers with their options
    "seq2seq": ("seq2seq.py", HF),
    "clf-t5": ("clf.py", HF),
    "clf-llama": ("clf.py", HF),
    "sft": ("sft_causal.py", {"trl": {}, "trl-packed": PACKED}),
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
    words = f"--input {folder}/bench.txt --out {model} --vocab_size {args.vocab_size}"
    harness.run_script("data/prepare_tokenizer.py", words)
    # Trainer's T5 has its head tied to the embedding, whatever the configuration says
    config = harness.t5_config(args.width, args.layers, tie_word_embeddings=True)
    config.save_pretrained(model)


def write_llama(args, folder, texts):
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|pad|>"]
    bpe.train_from_iterator(texts, vocab_size=8000, special_tokens=special)
    names = dict(zip(("eos_token", "pad_token"), special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)
    config = harness.llama_config(
        args.width,
        args.layers + 2,
        vocab_size=49152,
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

    def timed_score(args, engine, rows):
        start = time.perf_counter()
        logits = score(args, engine, rows)
        speeds.append(len(logits) / (time.perf_counter() - start))
        return logits

    clf.score = timed_score
    common.adopt_launcher()
    clf.main(clf.parse_args(words.split()))
    print(json.dumps({"scored": speeds[0]}))


def make_trainer(args, folder, options):
    """The trainer of a peer."""
    config = AutoConfig.from_pretrained(folder / "models" / "bench")
    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "bench")
    records = json.loads((folder / "data" / "bench.json").read_text())["train"]
    if args.task == "sft":
        import datasets
        import trl

        return trl.SFTTrainer(
            model=transformers.AutoModelForCausalLM.from_config(config),
            args=trl.SFTConfig(**options),
            train_dataset=datasets.Dataset.from_list(records),
            processing_class=tokenizer,
        )
    if args.task == "seq2seq":
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, model=model)
        for record in records:
            record["input_ids"] = tokenizer(record.pop("prompt")).input_ids
            record["labels"] = tokenizer(record.pop("completion")).input_ids
    else:
        config.num_labels = 2
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        collator = transformers.DataCollatorWithPadding(tokenizer)
        for record in records:
            record["input_ids"] = tokenizer(record.pop("input")).input_ids
            record["labels"] = record.pop("target")
    arguments = transformers.TrainingArguments(**options, per_device_eval_batch_size=args.batch)
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=records, data_collator=collator
    )


def mean_tokens(folder):
    """Of an example of prompt and completion."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "bench")
    records = json.loads((folder / "data" / "bench.json").read_text())["train"]
    texts = [record["prompt"] + record["completion"] for record in records]
    return statistics.mean(map(len, tokenizer(texts).input_ids))


def run_trainer(args, folder):
    """Prints the figures of a peer."""
    every = args.steps // 3
    options = harness.trainer_options(folder, args, every)
    options.update(TASKS[args.task][1][args.child])
    n_accumulated = args.accumulation
    if options.get("packing"):  # as many forward steps as have the tokens of one of our steps
        n_tokens = args.batch * args.accumulation * mean_tokens(folder)
        n_accumulated = max(1, round(n_tokens / options["max_length"]))
        options["gradient_accumulation_steps"] = n_accumulated
    trainer = make_trainer(args, folder, options)
    found = {}
    if args.task.startswith("clf"):
        prediction = trainer.predict(trainer.train_dataset)
        found["scored"] = prediction.metrics["test_samples_per_second"]
    clock = harness.StepClock()
    trainer.add_callback(clock)
    n_targets = []  # of each forward step; the loader is ahead of the training
    collator = trainer.data_collator

    def count(features):
        batch = collator(features)
        n_targets.append(int((batch["labels"] != -100).sum()))
        return batch

    trainer.data_collator = count
    trainer.train()
    first = every * n_accumulated
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
    add("--vocab_size", type=int, default=4000, help="of a T5's tokenizer")
    add("--batch", type=int, default=8, help="examples of a forward step")
    add("--accumulation", type=int, default=2)
    add("--steps", type=int, default=45)
    add("--examples", type=int, default=2000)
    harness.add_flags(parser)
    args = parser.parse_args()
    if args.child:
        run_child = run_scoring if args.child == "score" else run_trainer
        run_child(args, pathlib.Path(args.folder))
        return

    def run(peer):
        if peer == "ours":
            return run_ours(args, folder)
        return harness.in_child(peer, folder)

    peers = TASKS[args.task][1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        prepare(args, folder)
        results = harness.alternate(["ours", *peers], args.rounds, run)
    ratios = {}
    for figure in ("trained", "scored"):
        if figure in results["ours"][0]:
            ratios[figure] = harness.ratios(results, "ours", peers, figure)
    memory = {}
    for peer, runs in results.items():
        memory[peer] = statistics.median(run["peak_memory_gb"] for run in runs)
    harness.write_summary(args, ratios=ratios, peak_memory_gb=memory, runs=results)


if __name__ == "__main__":
    main()
