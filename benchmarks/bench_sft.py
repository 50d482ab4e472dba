"""Training speed and memory of sft_causal.py against TRL's SFTTrainer, in target tokens per second.

    pip install -r benchmarks/requirements.txt
    python benchmarks/bench_sft.py --data gsm8k_train.jsonl --out benchmarks/results/sft_cpu_2cores.json   # 2 CPU cores
    python benchmarks/bench_sft.py --gpu-only        # one GPU: sft_causal.py at 1 B and 3 B, see below

A Llama of 6 layers, 256 wide, with 49152 rows of logits, from the same random weights, in fp32, fused AdamW at a constant
learning rate, clipping at 1.0, micro-batch 8 x accumulation 2. Prompt and completion in plain text; the targets are the
completion and its end token. The peers run alternately, `--rounds` times, each run in a process of its own; start-up,
tokenising and the first third of the steps are not timed. All of the clock between two steps counts, logging too.
    ours                  sft_causal.py
    ours-packed           --packing: the same examples in every step
    trl                   SFTTrainer's defaults but bf16: padded, random order, gradient checkpointing
    trl-our-order         the same, given exactly the examples of each of our steps, long ones first
    trl-stored            without gradient checkpointing
    trl-grouped           without it, with length grouping
    trl-padding-free      without it, 8 examples in one row without padding
    trl-packed            without it, best-fit packing to rows of 1024 tokens (its default), one row per forward step and as
                          many forward steps as give the target tokens of our optimizer step
Checked, or the benchmark ends: both sides make the same ids and the same targets of every example; ours, ours-packed and
trl-our-order train the same number of target tokens in every step and report the same loss within LOSS_TOLERANCE.
Memory is the largest of the training process so far (VmHWM), imports included, for both sides.
Data: JSON lines with "question" and "answer" (GSM8K: openai/grade-school-math).

--gpu-only measures sft_causal.py alone: Llamas of about 1 B and 3 B parameters from scratch, bf16, random words in rows of
2048 tokens, full / LoRA / LoRA on NF4, the first two without and with --compile: tokens per second, MFU against the rate of a
plain matrix product, memory. Where there is no GPU it prints "not run" and the commands.
"""

import argparse
import json
import math
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile

import harness
import torch

OURS = {"ours": [], "ours-packed": ["--packing"]}
STORED = {"gradient_checkpointing": False}
TRL = {"trl": {}, "trl-our-order": {"train_sampling_strategy": "sequential"}, "trl-stored": STORED,
       "trl-grouped": {**STORED, "train_sampling_strategy": "group_by_length"},
       "trl-padding-free": {**STORED, "padding_free": True, "max_length": None},  # it does not enforce a length
       "trl-packed": {**STORED, "packing": True, "packing_strategy": "bfd", "max_length": 1024, "per_device_train_batch_size": 1}}
SAME_EXAMPLES = ("ours", "ours-packed", "trl-our-order")
LOSS_TOLERANCE = 1e-3  # relative, at every step; fp32 sums in another order, amplified by AdamW's division
VOCABULARY = 49152  # columns of the logits; the tokenizer has fewer pieces
GPU_SIZES = {"1b": (2048, 8192, 16, 32), "3b": (3072, 8192, 28, 24)}  # width, d_ff, layers, heads (8 of keys): Llama 3.2's
GPU_JOBS = {"full": [], "lora": ["--lora_rank", "16"], "nf4": ["--lora_rank", "16", "--quantize", "nf4"]}


def write_model(folder, texts, width, d_ff, layers, heads, kv_heads, vocabulary, weights):
    """A Llama with random weights (or its configuration only) and a byte-level BPE tokenizer learnt from the texts."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    learnt = tokenizers.ByteLevelBPETokenizer()
    learnt.train_from_iterator(texts, vocab_size=8000, min_frequency=2, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=d_ff, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    (LlamaForCausalLM(config) if weights else config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(args, folder):
    """Model, tokenizer and data; one example is kept for the evaluation that sft_causal.py wants."""
    records = [json.loads(line) for line in open(args.data, encoding="utf-8")]
    # the line break keeps a piece from reaching over the border: TRL tokenises both texts as one
    pairs = [{"prompt": r["question"].strip() + "\n", "completion": r["answer"].strip()} for r in records][: args.examples + 1]
    write_model(folder / "models" / "bench", (text for pair in pairs for text in pair.values()), args.width, 4 * args.width, args.layers, 8, 8,
                VOCABULARY, True)
    (folder / "data").mkdir()
    (folder / "data" / "bench.json").write_text(json.dumps({"train": pairs[1:], "eval": pairs[:1]}))


def our_words(args, folder, peer):
    """The command line of sft_causal.py."""
    return ["--mount_dir", str(folder), "--model_init_name", "bench", "--data", "bench", "--training_run_name", peer, "--raw_prompt",
            "--max_length", "1024", "--max_steps", str(args.steps), "--train_batch_size", str(args.batch), "--gradient_accumulation_steps",
            str(args.accumulation), "--learning_rate", str(args.learning_rate), "--lr_scheduler_type", "constant", "--precision", "fp32",
            "--logging_steps", "1", "--n_generate", "0", "--eval_steps", "1000000", "--save_steps", "0", *OURS[peer]]


def write_our_steps(args, folder):
    """What sft_causal.py trains, asked from itself: ids and labels of every example, and the examples of every step."""
    sys.path.insert(0, str(harness.ROOT))
    import sft_causal
    options = sft_causal.parse_args(our_words(args, folder, "ours"))
    job = sft_causal.prepare(options)
    data = sft_causal.TrainingData(options, job.data_sets, job.config.hidden_size, VOCABULARY, job.tokenizer.pad_token_id, False)
    steps = [sorted(data.step_ids(step).tolist(), key=lambda i: -data.lengths[i]) for step in range(args.steps)]
    if steps[-1] and max(map(len, steps)) * args.steps > data.per_epoch:
        sys.exit(f"--steps {args.steps} need more than the {data.per_epoch} examples of one epoch: raise --examples")
    documents = [sft_causal.unseal(job.data_sets[0].tokens["train"][i]) for i in range(data.per_epoch)]
    rows = [{"input_ids": ids.tolist(), "labels": [int(n) if t else -100 for n, t in zip(ids, is_target)]} for ids, is_target in documents]
    (folder / "ours.json").write_text(json.dumps({"steps": steps, "rows": rows}))


def run_ours(args, folder, peer):
    """One run of the script as users run it, from its own metrics.jsonl."""
    harness.run_script("sft_causal.py", our_words(args, folder, peer))
    rows = harness.metric_rows(folder / "models" / peer)
    shutil.rmtree(folder / "models" / peer)
    timed = rows[args.steps // 3:]
    seconds = timed[-1]["time"] - rows[args.steps // 3 - 1]["time"]  # the same clock as TRL's; tokens_per_sec leaves out logging
    return {"tokens_per_sec": sum(row["target_tokens"] for row in timed) / seconds,
            "padding_share": statistics.mean(row["padding_share"] for row in timed), "peak_memory_gb": timed[-1]["peak_memory_gb"],
            "last_loss": rows[-1]["loss"], "losses": [row["loss"] for row in rows], "targets": [row["target_tokens"] for row in rows]}


def run_trl(args, folder, peer):
    """In this process (a child of its own): SFTTrainer."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    disable_progress_bars()
    ours = json.loads((folder / "ours.json").read_text())
    pairs = json.loads((folder / "data" / "bench.json").read_text())["train"]
    order = [i for step in ours["steps"] for i in step] if peer == "trl-our-order" else list(range(len(pairs)))
    counts = []  # of each forward step: (optimizer step, loss, target tokens, real tokens, computed positions)

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            n_computed = inputs["input_ids"].numel()
            n_real = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else n_computed
            n_targets = int((inputs["labels"][:, 1:] != -100).sum())
            loss = super().training_step(model, inputs, num_items_in_batch)
            counts.append((self.state.global_step, float(loss), n_targets, n_real, n_computed))
            return loss

    options = {**harness.trainer_options(folder, args, 1), "max_steps": args.steps, "learning_rate": args.learning_rate,
               "lr_scheduler_type": "constant", "bf16": False, **TRL[peer]}
    if peer == "trl-packed":
        tokens = sum(len(ours["rows"][i]["input_ids"]) for step in ours["steps"] for i in step) / args.steps
        options["gradient_accumulation_steps"] = max(1, round(tokens / options["max_length"]))
    clock = harness.StepClock()
    trainer = Counting(model=AutoModelForCausalLM.from_pretrained(folder / "models" / "bench", dtype=torch.float32), args=SFTConfig(**options),
                       train_dataset=Dataset.from_list([pairs[i] for i in order]), callbacks=[clock],
                       processing_class=AutoTokenizer.from_pretrained(folder / "models" / "bench"))
    made, wanted = trainer.train_dataset, [ours["rows"][i] for i in order]
    if peer == "trl-packed":  # rows of several examples: the same tokens, joined
        for name in ("input_ids", "labels"):
            if sorted(n for row in made[name] for n in row) != sorted(n for row in wanted for n in row[name]):
                sys.exit(f"{peer} trains other {name} than ours")
    elif [{name: list(row[name]) for name in ("input_ids", "labels")} for row in made] != wanted:
        sys.exit(f"{peer} makes other ids or labels of the same texts than ours")
    trainer.train()
    columns = ("losses", "targets", "real", "computed")
    sums = {name: [sum(row[n] for row in counts if row[0] == step) for step in range(args.steps)] for n, name in enumerate(columns, 1)}
    first = args.steps // 3
    print(json.dumps({
        "tokens_per_sec": sum(sums["targets"][first:]) / (clock.times[-1] - clock.times[first - 1]),
        "padding_share": 1 - sum(sums["real"][first:]) / sum(sums["computed"][first:]), "peak_memory_gb": harness.peak_memory_gb(),
        "last_loss": sums["losses"][-1], "losses": sums["losses"], "targets": sums["targets"]}))


def loss_difference(results):
    """Largest relative difference of a step's loss among the peers that train the same examples; their targets must be equal."""
    first = results["ours"][0]
    largest = 0.0
    for peer in SAME_EXAMPLES:
        for run in results.get(peer, []):
            if run["targets"] != first["targets"]:
                sys.exit(f"{peer} trained other numbers of target tokens: {run['targets']}, ours {first['targets']}")
            largest = max(largest, max(abs(a - b) / b for a, b in zip(run["losses"], first["losses"])))
    if largest > LOSS_TOLERANCE:
        sys.exit("the losses differ by " f"{largest:.2g}, more than {LOSS_TOLERANCE}: " + json.dumps({p: results[p][0]["losses"] for p in SAME_EXAMPLES}))
    return largest


def gpu_commands(args, folder):
    """{name: command line of sft_causal.py} of the part on a GPU."""
    return {f"{size}-{job}{'-compiled' if compiled else ''}":
            ["--mount_dir", str(folder), "--model_init_name", size, "--data", "random", "--training_run_name", "run", "--precision", "bf16",
             "--packing", "--max_length", "2048", "--train_batch_size", str(args.gpu_batch), "--max_steps", str(args.steps), "--logging_steps", "1",
             "--lr_scheduler_type", "constant", "--n_generate", "0", "--eval_steps", "1000000", "--save_steps", "0", "--gradient_checkpointing",
             *GPU_JOBS[job], *(["--compile"] if compiled else [])]
            for size in GPU_SIZES for job in GPU_JOBS for compiled in ((False,) if job == "nf4" else (False, True))}  # refused with --quantize


def run_gpu(args):
    """sft_causal.py on one GPU. A job that fails (no memory, for instance) is written down with its last words; the others go on."""
    if harness.no_gpu(args):
        for name, words in gpu_commands(args, "FOLDER").items():
            print(f"{name:<18} python sft_causal.py {' '.join(words)}")
        return
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(4000)]
    texts = [" ".join(rng.choices(words, k=max(8, min(600, round(120 * math.exp(0.8 * rng.gauss(0, 1))))))) for _ in range(args.gpu_batch * args.steps + 1)]
    sys.path.insert(0, str(harness.ROOT))
    import common_v1 as common
    matmul = common.measured_tflops(torch.device("cuda"), torch.bfloat16)
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for size, (width, d_ff, layers, heads) in GPU_SIZES.items():
            write_model(folder / "models" / size, texts[:2000], width, d_ff, layers, heads, 8, 128256, False)
        (folder / "data").mkdir()
        (folder / "data" / "random.json").write_text(json.dumps({"train": [{"text": t} for t in texts[1:]], "eval": [{"text": texts[0]}]}))
        commands = gpu_commands(args, folder)

        def run(name):
            result = subprocess.run([sys.executable, str(harness.ROOT / "sft_causal.py"), *commands[name]], capture_output=True, text=True)
            if result.returncode:
                found = {"failed": result.stderr.strip()[-500:]}
            else:
                rows = harness.metric_rows(folder / "models" / "run")
                timed, before = rows[args.steps // 3:], rows[args.steps // 3 - 1]
                tokens = sum(row["input_tokens_per_sec"] * row["target_tokens"] / row["tokens_per_sec"] for row in timed)
                found = {"input_tokens_per_sec": tokens / (timed[-1]["time"] - before["time"]), "matmul_tflops": matmul,
                         "mfu_of_matmul": statistics.mean(row["mfu_of_matmul"] for row in timed),
                         "padding_share": statistics.mean(row["padding_share"] for row in timed), "peak_memory_gb": timed[-1]["peak_memory_gb"]}
            shutil.rmtree(folder / "models" / "run", ignore_errors=True)
            return found
        results = harness.alternate(commands, args.rounds, run)
    for name, runs in results.items():
        if "failed" in runs[0]:
            print(f"{name}: failed: {runs[0]['failed']}")
    harness.write_summary(args, results)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="JSON lines with question and answer")
    parser.add_argument("--batch", type=int, default=8, help="examples per forward step")
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--examples", type=int, default=1900)
    parser.add_argument("--steps", type=int, default=15, help="optimizer steps of a run; the first third is not timed")
    parser.add_argument("--peers", nargs="+", choices=[*OURS, *TRL], default=[*OURS, *TRL])
    parser.add_argument("--gpu_batch", type=int, default=64, help="documents per step of the part on a GPU")
    harness.add_flags(parser)
    args = parser.parse_args()
    if args.steps < 3:
        parser.error(f"--steps {args.steps}: expected 3 or more")
    if args.child:
        return run_trl(args, pathlib.Path(args.folder), args.child)
    if args.gpu_only:
        return run_gpu(args)
    if not args.data:
        parser.error("--data: GSM8K's train.jsonl")
    if "ours" not in args.peers:
        parser.error("--peers: ours is what the others are compared with")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        prepare(args, folder)
        write_our_steps(args, folder)
        results = harness.alternate(args.peers, args.rounds,
                                    lambda peer: run_ours(args, folder, peer) if peer in OURS else harness.in_child(peer, folder))
    median, difference = harness.medians(results), loss_difference(results)
    figures = {"largest_loss_difference": difference, "loss_tolerance": LOSS_TOLERANCE}
    rivals = [peer for peer in args.peers if peer in TRL]
    if "trl" in rivals:
        best = max(rivals, key=lambda peer: median[peer]["tokens_per_sec"])
        figures["best_trl"] = best
        for ours in (peer for peer in OURS if peer in args.peers):
            for name, rival in (("trl_default", "trl"), ("trl_best", best)):
                figures[f"{ours}_speed_over_{name}"] = median[ours]["tokens_per_sec"] / median[rival]["tokens_per_sec"]
                figures[f"{ours}_memory_of_{name}"] = median[ours]["peak_memory_gb"] / median[rival]["peak_memory_gb"]
    print("\n".join(f"{name:<36} {value:.4g}" if isinstance(value, float) else f"{name:<36} {value}" for name, value in figures.items()))
    import trl
    harness.write_summary(args, results, trl=trl.__version__, **figures)


if __name__ == "__main__":
    main()
