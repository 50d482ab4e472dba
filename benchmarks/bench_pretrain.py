"""Pretraining speed of seq2seq.py against Hugging Face's Trainer with the span corruption of its run_t5_mlm example, in PyTorch.

    pip install -r benchmarks/requirements.txt
    python benchmarks/bench_pretrain.py --text tinyshakespeare.txt                   # 2 CPU cores, about 10 minutes
    python benchmarks/bench_pretrain.py --text tinyshakespeare.txt --model v1.1-base --precision bf16 --batch 128 --gpu-only

Same model (random weights, T5 v1.1, untied), same text, same lengths (512 tokens in, 114 out), same batch, precision, optimiser
(fused AdamW, clipping at 1.0) and cores. The peers run alternately, `--rounds` times, each run in its own process; the
first third of a run is not timed. Tokens are those of the encoder and of the decoder.
    ours           seq2seq.py --objective span_corruption, the engine at ZeRO stage 0 (fp32) or 1 (bf16)
    hf             Trainer; its collator draws a mask for each example with NumPy, as that example (for Flax) and nanoT5 do
Besides, `--sizes`: seconds per step and memory of seq2seq.py on prepared corpora of any size, to see whether they are flat:
    python benchmarks/bench_pretrain.py --sizes data/small data/large --model_folder models/my-t5
Without a GPU and --gpu-only the figure is "not run".
"""

import argparse
import json
import pathlib
import statistics
import tempfile

import harness

SIZES = {  # d_model, d_kv, d_ff, layers, heads
    "mini": (256, 32, 512, 4, 8), "v1.1-small": (512, 64, 1024, 8, 6), "v1.1-base": (768, 64, 2048, 12, 12), "v1.1-large": (1024, 64, 2816, 24, 16),
}
N_INPUT, N_TARGET, N_TEXT = 512, 114, 568


def prepare(args, folder):
    """A model folder with random weights and a tokenizer learnt from the text, and the text as a corpus."""
    import sentencepiece
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration
    model = folder / "models" / "bench"
    model.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(input=args.text, model_prefix=str(model / "spiece"), vocab_size=4000, hard_vocab_limit=False,
                                             pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    (model / "spiece.vocab").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
    width, d_kv, d_ff, layers, heads = SIZES[args.model]
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32128, d_model=width, d_kv=d_kv, d_ff=d_ff, num_layers=layers, num_heads=heads, dropout_rate=0.0,
                                             feed_forward_proj="gated-gelu", decoder_start_token_id=0, tie_word_embeddings=False))
    t5.lm_head.weight = torch.nn.Parameter(torch.randn_like(t5.lm_head.weight) * width**-0.5)
    t5.save_pretrained(model)
    AutoTokenizer.from_pretrained(model).save_pretrained(model)
    (folder / "data").mkdir()
    harness.run_script("data/prepare_text.py", ["--input", args.text, "--tokenizer", str(model), "--eval_fraction", "0.01",
                                                "--out", str(folder / "data" / "bench")])


def run_ours(args, folder, data, model, run, every):
    harness.run_script("seq2seq.py", [
        "--objective", "span_corruption", "--mount_dir", str(folder), "--model_init_path", str(model), "--data", str(data),
        "--training_run_name", run, "--overwrite", "--max_steps", str(3 * every), "--train_batch_size", str(args.batch),
        "--gradient_accumulation_steps", str(args.accumulation), "--logging_steps", str(every), "--precision", args.precision,
        "--eval_steps", "1000000", "--save_steps", "0", *(["--compile"] if args.compile else []),
        "--input_length", str(N_INPUT)])
    rows = harness.metric_rows(folder / "models" / run)[1:]
    seconds = sum(row["target_tokens"] / row["tokens_per_sec"] for row in rows)
    steps = 2 * every
    found = {"tokens_per_sec": steps * args.batch * args.accumulation * (N_INPUT + N_TARGET) / seconds, "seconds_per_step": seconds / steps,
             "padding_share": statistics.mean(row["padding_share"] for row in rows), "peak_memory_gb": rows[-1]["peak_memory_gb"]}
    mfu = [row["mfu_of_matmul"] for row in rows if "mfu_of_matmul" in row]
    return {**found, **({"mfu_of_matmul": statistics.mean(mfu)} if mfu else {})}


class PeerCollator:
    """The peer's data path: one mask after the other, then both sides from the stacked batch, end tokens, and labels; the model shifts them."""

    def __init__(self, sentinel_0, seed=0):
        import numpy as np
        self.np, self.top = np, sentinel_0
        np.random.seed(seed)

    def parts(self, n_items, n_parts):
        np = self.np
        first = np.arange(n_items - 1) < n_parts - 1
        np.random.shuffle(first)
        ids = np.cumsum(np.pad(first, [[1, 0]]))
        return np.unique(ids, return_counts=True)[1]

    def mask(self, length):
        np = self.np
        n_noise = int(np.round(length * 0.15))
        n_spans = int(np.round(n_noise / 3.0))
        lengths = np.reshape(np.stack([self.parts(length - n_noise, n_spans), self.parts(n_noise, n_spans)], 1), [2 * n_spans])
        starts = np.zeros(length, np.int8)
        starts[np.cumsum(lengths)[:-1]] = True
        return np.cumsum(starts) % 2 == 1

    def side(self, tokens, mask):
        np = self.np
        first = mask - np.roll(mask, 1, axis=-1) * mask
        first[:, 0] = mask[:, 0]
        sentinels = np.where(first != 0, np.cumsum(first, axis=-1), first)
        sentinels = np.where(sentinels != 0, self.top + 1 - sentinels, 0) - (mask - first)
        found = np.where(sentinels != 0, sentinels, tokens)
        found = found[found >= 0].reshape(len(tokens), -1)
        return np.concatenate([found, np.full((len(tokens), 1), 1)], 1)

    def __call__(self, examples):
        import torch
        tokens = self.np.stack([example["input_ids"] for example in examples])
        masks = self.np.asarray([self.mask(tokens.shape[1]) for _ in examples])
        source, target = (self.side(tokens, mask.astype(self.np.int64)) for mask in (masks, ~masks))
        assert source.shape[1] == N_INPUT and target.shape[1] == N_TARGET
        return {"input_ids": torch.tensor(source), "labels": torch.tensor(target)}


def run_hf(args, folder, every):
    """In this process (a child of its own): Trainer, timed from the first third of the steps on."""
    import numpy as np
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Trainer, TrainingArguments
    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "bench")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "models" / "bench")
    text = (folder / "data" / "bench.txt").read_text(encoding="utf-8").split("\n\n")
    ids = np.concatenate([np.array(row, np.int64) for row in tokenizer(text, add_special_tokens=False).input_ids])
    rows = [{"input_ids": row} for row in ids[: len(ids) // N_TEXT * N_TEXT].reshape(-1, N_TEXT)]
    clock = harness.StepClock()
    options = {**harness.trainer_options(folder, args, every), "bf16": args.precision == "bf16", "torch_compile": args.compile, "remove_unused_columns": False}
    Trainer(model=model, args=TrainingArguments(**options), train_dataset=rows, callbacks=[clock],
            data_collator=PeerCollator(tokenizer.convert_tokens_to_ids("<extra_id_0>"))).train()
    seconds = clock.times[-1] - clock.times[every - 1]
    print(json.dumps({"tokens_per_sec": 2 * every * args.batch * args.accumulation * (N_INPUT + N_TARGET) / seconds, "seconds_per_step": seconds / (2 * every),
                      "peak_memory_gb": harness.peak_memory_gb()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", help="plain text, with blank lines between documents")
    parser.add_argument("--sizes", nargs="+", metavar="CORPUS", help="folders that data/prepare_text.py made: only ours, on each of them")
    parser.add_argument("--model_folder", help="the model that --sizes were prepared for")
    parser.add_argument("--model", choices=SIZES, default="mini")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=8, help="examples per forward step")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of a run; the first third is not timed")
    parser.add_argument("--compile", action="store_true", help="torch.compile, for all peers")
    harness.add_flags(parser)
    args = parser.parse_args()
    every = max(1, args.steps // 3)
    if args.child:
        run_hf(args, pathlib.Path(args.folder), every)
        return
    if harness.no_gpu(args):
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        if args.sizes:
            paths = {pathlib.Path(name).name: pathlib.Path(name).resolve() for name in args.sizes}
            model = pathlib.Path(args.model_folder).resolve()
            results = harness.alternate(list(paths), args.rounds, lambda name: run_ours(args, folder, paths[name], model, name, every))
            about = {name: json.loads((path / "corpus.json").read_text()) for name, path in paths.items()}
            harness.write_summary(args, results, corpora={name: {"train tokens": a["tokens"]["train"]} for name, a in about.items()})
            return
        prepare(args, folder)
        model = folder / "models" / "bench"
        results = harness.alternate(("ours", "hf"), args.rounds, lambda peer: run_ours(args, folder, "bench", model, "run", every) if peer == "ours"
                                    else harness.in_child(peer, folder))
    speed = {peer: figures["tokens_per_sec"] for peer, figures in harness.medians(results).items()}
    print(f"tokens/s on {harness.device_name()}: ours {speed['ours']:.0f}, hf {speed['hf']:.0f}; ours / hf = {speed['ours'] / speed['hf']:.2f}")
    harness.write_summary(args, results, ratio_over_hf=speed["ours"] / speed["hf"])


if __name__ == "__main__":
    main()
