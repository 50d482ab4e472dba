"""All scripts on one GPU at real sizes, with random weights, and what only a GPU can get wrong.

    python benchmarks/gpu.py --out gpu.json        # one GPU with 80 GB: 8 minutes
    python benchmarks/gpu.py --only sft stages     # some parts
    python benchmarks/gpu.py --tiny                # tiny models on a CPU: do the commands run?

Each part is a process of its own with a time limit, and its figures are in --out as soon as it is
done; tiny ones share a process until one fails. The exit code is the number of failures. Figures:
    tokens_per_sec   target tokens of training, written tokens of chat.py
    mfu              6 x weights x tokens (Kaplan et al. 2020, without attention) per second, as a
                     share of the GPU's dense bf16 peak
    peak_memory_gb   of torch's allocator

Not looked at: which kernels run, the error of the cross entropy, synchronisations in a step, pinned
memory, recompilations, memory against the estimate; and all that takes several GPUs.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common  # first: it sets torch's memory and prepares the import of DeepSpeed

# isort: split
import harness
import torch
import transformers

TINY = "--tiny" in sys.argv  # of the processes of the parts too
N_STEPS = 3 if TINY else 12
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
MINUTES, PART_MINUTES = (60, 30) if TINY else (8, 4)  # limits of all and of a process
WORDS = "the of a number word reads three long letter under city when water".split()

# ------------------------------------------------------------------------------- models and data


def write_models():
    """models/: t5-large, t5-3b, llama (1.1 B weights); t5-small and llama-small for equalities. No
    weights but those of start, a llama for scripts that make none."""
    t5_small = harness.t5_config(64, 2, vocab_size=1024, dropout_rate=0.0)
    llama_small = harness.llama_config(64, 2, vocab_size=1024)
    llama = {"intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    configs = {
        "t5-large": harness.t5_config(1024, 24, d_ff=2816, d_kv=64, num_heads=16),
        "t5-3b": harness.t5_config(2048, 24, d_ff=5120, d_kv=64, num_heads=32),
        "llama": harness.llama_config(2048, 22, **llama),
        "t5-small": t5_small,
        "llama-small": llama_small,
    }
    for name, config in configs.items():
        kind = name.split("-")[0]
        if TINY:
            config = t5_small if kind == "t5" else llama_small
        shutil.copytree(harness.ROOT / "models" / f"tiny-{kind}", f"models/{name}")
        config.save_pretrained(f"models/{name}")
    shutil.copytree("models/llama", "models/start")
    config = transformers.AutoConfig.from_pretrained("models/llama")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained("models/start")


def write_data():
    """data/: words at random; prompts are twice as long as completions."""
    rng = random.Random(0)
    longest = 10 if TINY else 300
    lists = {"records": [], "scored": []}
    for i in range(64 if TINY else 4000):
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))
        completion = " ".join(rng.choices(WORDS, k=rng.randint(1, longest // 2)))
        record = {"prompt": prompt, "completion": completion, "want": "digits"}
        lists["records"].append(record)
        lists["scored"].append({"input": prompt, "target": i % 2})
    for name, records in lists.items():
        harness.write_json(f"data/{name}.json", {"train": records, "eval": records[:8]})


def write_lines(path, n, prompt, completion):
    """The first n records as JSON lines, with these names of the keys."""
    records = json.loads(pathlib.Path("data/records.json").read_text())["train"][:n]
    lines = [{prompt: record["prompt"], completion: record["completion"]} for record in records]
    pathlib.Path(path).write_text("\n".join(map(json.dumps, lines)))


# ---------------------------------------------------------------------------------- running scripts


def run(name, words, code=0):
    """A script in this process; it must end with this exit code."""
    script = importlib.import_module(name.removesuffix(".py"))
    try:
        found = script.main(script.parse_args(words.split())) or 0
    except SystemExit as stop:
        found = stop.code
    if found != code:
        sys.exit(f"{name} {words}: exit code {found}, expected {code}")


def train(script, words, n_steps=N_STEPS):
    """The train rows of metrics.jsonl of a training run."""
    folder = pathlib.Path("models", "run")
    run(
        script,
        f"--training_run_name run --overwrite --max_steps {n_steps} --num_epochs 100 "
        f"--eval_steps 100000 --save_steps 0 --logging_steps {max(1, n_steps // 3)} {words}",
    )
    rows = harness.metric_rows(folder)
    shutil.rmtree(folder)  # of the largest model 6 GB
    return rows


def speed(rows, flops_per_token=0):
    """Without the first third of the steps."""
    timed = rows[1:]
    n_targets = sum(row["target_tokens"] for row in timed)
    seconds = sum(row["target_tokens"] / row["tokens_per_sec"] for row in timed)
    found = {"tokens_per_sec": n_targets / seconds, "loss": timed[-1]["loss"]}
    found["peak_memory_gb"] = timed[-1]["peak_memory_gb"]
    for name, peak in PEAK_FLOPS.items():
        if name in harness.device_name() and flops_per_token:
            found["mfu"] = n_targets / seconds * flops_per_token / peak
    return found


def count_weights(name, beginning=""):
    """Of the matrices whose names begin so, without embeddings that are only looked up."""
    config = transformers.AutoConfig.from_pretrained(pathlib.Path("models", name))
    auto_class = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto_class = transformers.AutoModelForSeq2SeqLM
    with torch.device("meta"):
        model = auto_class.from_config(config)
    head = model.get_output_embeddings().weight
    n = 0 if beginning == "encoder" else head.numel()
    for path, weight in model.named_parameters():
        if path.removeprefix("model.").startswith(beginning) and weight is not head:
            n += weight.numel() * ("embed" not in path and "shared" not in path)
    return n


# ------------------------------------------------------------------------------------ parts: speed


def train_t5(name, batch):
    words = f"--model_init_name {name} --data records --max_new_tokens 1"
    weights = count_weights(name, "decoder") + 2 * count_weights(name, "encoder")
    rows = train("seq2seq.py", f"{words} --train_batch_size {batch}")
    return speed(rows, 6 * weights)  # for each target token


def t5_large():
    return train_t5("t5-large", 64)


def t5_3b():
    return train_t5("t5-3b", 16)


def clf():
    words = "--model_init_name t5-large --data scored --train_batch_size 64"
    return speed(train("clf.py", words))


def sft():
    """Rows of 4096 tokens, each of them a target, so that MFU counts them all."""
    words = "--model_init_name llama --data records --raw_prompt --targets all --n_generate 0 "
    words += "--max_length 4096 --train_batch_size 32"
    return speed(train("sft_causal.py", words), 6 * count_weights("llama"))


def ppo():
    """It stops by itself unless the first ratio is 1 and sampler and scorer agree."""
    words = "--policy start --data records --reward_fn data/rewards.py:wish --lora_rank 16 "
    words += "--num_rollouts 64 --rollout_batch_size 64 --train_batch_size 32 --n_eval 8"
    row = train("rl_ppo.py", words)[-1]
    return {name: value for name, value in row.items() if isinstance(value, float)}


def chat():
    """64 replies, 32 at a time; the seconds include loading."""
    start = time.perf_counter()
    write_lines("chats.jsonl", 64, "prompt", "answer")
    words = "--model_path start --input chats.jsonl --output replies.jsonl --max_batch 32"
    run("chat.py", f"{words} --max_new_tokens {16 if TINY else 128}")
    return {"seconds": time.perf_counter() - start}


def collect():
    """Rows of 4096 numbers of 256 examples; the seconds include loading."""
    start = time.perf_counter()
    words = "collect --model_init_name start --data records --downsample 256 --out grads"
    run("project_grads.py", words)
    return {"seconds": time.perf_counter() - start}


def peers(script, words):
    """The ratios of a benchmark."""
    harness.run_script(f"benchmarks/{script}", f"{words} --rounds 1 --out peers.json")
    return json.loads(pathlib.Path("peers.json").read_text())["ratios"]


def generate():
    """chat.py's engine at 64 rows, against one padded batch of transformers' generate."""
    size = "--width 64 --layers 1" if TINY else "--width 2048 --layers 16"
    return peers("bench_decoding.py", f"--task chat --rows {4 if TINY else 64} {size}")


def hf():
    """The ratio to transformers' Trainer."""
    if not importlib.util.find_spec("accelerate"):
        return {"not run": "the package accelerate is missing"}
    write_lines("questions.jsonl", 4000, "question", "answer")
    size = "--width 768 --layers 12 --batch 64 --steps 30"
    if TINY:
        size = "--width 64 --layers 1 --batch 4 --steps 3"
    words = f"--task seq2seq --data questions.jsonl --vocab_size 100 --accumulation 1 {size}"
    return peers("bench_train.py", words)


# ------------------------------------------------------------------------- parts: right or wrong


def kernels():
    """Masked attention backwards as T5 needs it: finite, and no plan is made for each new shape."""
    device = common.setup_distributed(argparse.Namespace(deterministic=False))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    seconds = []
    for length in [704, *range(200, 400, 10)] * 2:
        start = time.perf_counter()
        states = torch.randn(3, 2, 4, length, 64, device=device, dtype=dtype, requires_grad=True)
        bias = torch.randn(2, 4, length, length, device=device, dtype=dtype, requires_grad=True)
        attention = torch.nn.functional.scaled_dot_product_attention
        attention(*states, attn_mask=bias).sum().backward()
        if not (states.grad.isfinite().all() and bias.grad.isfinite().all()):
            sys.exit(f"gradients of masked attention are not finite at length {length}")
        seconds.append(time.perf_counter() - start)
    half = len(seconds) // 2
    return {"new_shapes_over_known_ones": sum(seconds[1:half]) / sum(seconds[half + 1 :])}


def losses(script, model, words):
    words = f"--model_init_name {model} --data records --train_batch_size 16 {words}"
    return [row["loss"] for row in train(script, words, n_steps=3)]


def check_close(found, expected, tolerance, what):
    gap = max(abs(a - b) for a, b in zip(found, expected))
    if not gap <= tolerance:
        sys.exit(f"{what}: losses {found}, expected {expected}")
    return gap


def stages():
    """Each ZeRO stage, precision, offload, accumulation and --compile: the losses of fp32. At each
    stage a loss that is not finite ends the run."""
    variants = ["--precision fp32 --train_batch_size 4 --gradient_accumulation_steps 4"]
    variants += ["--precision fp32 --gradient_checkpointing"]
    variants += ["--precision bf16-mixed", "--precision bf16 --ds_config zero2_offload"]
    for stage in (1, 2, 3):
        variants += [f"--precision {name} --ds_config zero{stage}" for name in ("fp32", "bf16")]
    if not TINY:  # compiling takes a minute on a CPU
        variants.append("--precision fp32 --compile")
    gaps = {}
    for script, model, more in (
        ("seq2seq.py", "t5-small", "--max_new_tokens 1 "),
        ("sft_causal.py", "llama-small", "--n_generate 0 --raw_prompt "),
    ):
        expected = losses(script, model, f"{more} --precision fp32 --ds_config zero0")
        for variant in variants:
            found = losses(script, model, more + variant)
            tolerance = 1e-3 if "fp32" in variant else 0.05
            what = f"{script} {variant}"
            gaps[what] = check_close(found, expected, tolerance, what)
        for stage in range(4):
            words = f"--model_init_name {model} --data records --training_run_name inf --overwrite "
            words += f"--learning_rate 1e38 --warmup_steps 0 --max_steps 4 --ds_config zero{stage}"
            run(script, f"{more}{words}", code=2)
    return gaps


def adapters():
    """LoRA at ZeRO-3 with checkpointing, and over 8 and 4 bits, where bitsandbytes is there."""
    words = "--lora_rank 8 --n_generate 0 --raw_prompt"
    expected = losses("sft_causal.py", "start", words)
    gaps = {}
    variants = {"--ds_config zero3 --gradient_checkpointing": 0.05}
    if torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes"):
        variants.update({"--quantize int8": 0.1, "--quantize nf4": 0.3})
    for variant, tolerance in variants.items():
        found = losses("sft_causal.py", "start", f"{words} {variant}")
        gaps[variant] = check_close(found, expected, tolerance, variant)
    return gaps


def resume():
    """SIGTERM saves and leaves with 75. 3 of 6 steps, and 3 when started again: the same bits as 6
    at once, with --deterministic."""
    words = "--model_init_name t5-small --data records --train_batch_size 16 --max_new_tokens 1 "
    words += "--logging_steps 1 --eval_steps 1000 --lr_scheduler_type constant --deterministic "
    words += "--save_steps 3 --training_run_name"
    killed = f"{words} killed --max_steps 100000"
    process = subprocess.Popen([sys.executable, harness.ROOT / "seq2seq.py", *killed.split()])
    rows = pathlib.Path("models/killed/metrics.jsonl")
    while process.poll() is None and not (rows.exists() and rows.stat().st_size > 1000):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    if process.wait(60) != 75:
        sys.exit(f"SIGTERM: exit code {process.returncode}, expected 75")
    for name, n_steps in (("whole", 6), ("halves", 3), ("halves", 6)):
        run("seq2seq.py", f"{words} {name} --max_steps {n_steps}")
    ends = [pathlib.Path("models", name, "model.safetensors") for name in ("whole", "halves")]
    if ends[0].read_bytes() != ends[1].read_bytes():
        sys.exit("3 + 3 steps give other weights than 6")
    return {"same_bits": True}


def out_of_memory():
    """Ends with exit code 2 and words, not with a traceback alone."""
    if not torch.cuda.is_available():
        return {"not run": "no GPU"}
    words = "--model_init_name t5-3b --data records --train_batch_size 4000 --max_steps 1"
    command = [sys.executable, harness.ROOT / "seq2seq.py", *words.split()]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 2 or "out of memory: halve" not in result.stdout:
        sys.exit(f"exit code {result.returncode}, expected 2\n{result.stdout}")
    return {"says": result.stdout.splitlines()[-1]}


# what matters most comes first: the minutes may not be enough for all
PARTS = (kernels, t5_large, sft, ppo, chat, collect, clf, t5_3b, resume, stages, adapters)
PARTS += (out_of_memory, generate, hf)


def in_process(names, folder, minutes):
    """{part: figures} of a process of these parts, up to one that fails."""
    if minutes <= 0:
        return {names[0]: {"failed": f"not begun: {MINUTES} minutes are over"}}
    command = [sys.executable, *sys.argv, "--child", ",".join(names), "--folder", str(folder)]
    log = folder / f"{names[0]}.log"
    with open(log, "w") as file:
        code = harness.run_limited(command, minutes, stdout=file, stderr=file)
    results = {}
    for name in names:
        path = folder / f"{name}.json"
        if not path.exists():
            reason = f"longer than {minutes:.1f} minutes" if code is None else f"exit code {code}"
            results[name] = {"failed": f"{reason}: {log.read_text()[-4000:]}"}
            break
        results[name] = json.loads(path.read_text())
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parts = {part.__name__: part for part in PARTS}
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--tiny", action="store_true")
    harness.add_flags(parser)
    args = parser.parse_args()
    if args.child:
        os.chdir(args.folder)
        common.adopt_launcher()
        for name in args.child.split(","):
            start = time.perf_counter()
            found = parts[name]()
            seconds = time.perf_counter() - start
            harness.write_json(f"{name}.json", {**found, "part_seconds": seconds})
        os._exit(0)  # as common.launch ends, which says why
    if not TINY and not torch.cuda.is_available():
        print("not run: no GPU here")
        return 0
    start = time.perf_counter()
    print(f"{harness.device_name()}, cuDNN {torch.backends.cudnn.version()}", flush=True)
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for name in ("models", "data"):
            (folder / name).mkdir()
        with contextlib.chdir(folder):
            write_models()
            write_data()
        names = list(dict.fromkeys(args.only))
        while names:
            left = MINUTES - (time.perf_counter() - start) / 60
            done = in_process(names if TINY else names[:1], folder, min(left, PART_MINUTES))
            print(json.dumps(done, indent=1), flush=True)
            results.update(done)
            names = names[len(done) :]
            harness.write_summary(args, parts=results)
    return sum("failed" in found for found in results.values())


if __name__ == "__main__":
    sys.exit(main())
