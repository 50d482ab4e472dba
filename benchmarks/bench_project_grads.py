"""Speed of project_grads.py's collect against a training step and against other ways to projected per-example gradients.

    pip install -r benchmarks/requirements.txt
    python benchmarks/bench_project_grads.py --out benchmarks/results/project_grads_cpu_2cores.json   # one thread
    python benchmarks/bench_project_grads.py --gpu-only --family llama-1b --precision bf16 --tokens 512

One model (GPT-2's architecture, 4 layers of width 256, vocabulary 2048, untied: 4.2 M parameters, random weights), 8 rows of 128 random tokens,
all parameters. Seconds for the batch; the peers alternately, --rounds times, the least of each counts (what disturbs a machine only adds).
    step           forward and backward with weight gradients, loss over all tokens: what training does, without the optimizer
    ours D         collect's loop: hooks, sketch of size D, rows written to a store; also the sketches rolled and kron
    trak           the TRAK pipeline of the package traker: vmap(grad), BasicProjector (Rademacher, regenerated in blocks of 100 columns)
    loop+trak      one backward pass a row, then BasicProjector
    gradex         one backward pass a row, then a product with a stored dense matrix, all rows at once: the GradEx loop, batched
    vmap           vmap(grad), then our own sketch of size 4096 and the exact norms, as collect stores them
The dense projections are measured for 200 columns (stored: 100) and scaled up; per column they cost the same. Extra memory: how far a process's
peak, less what it held before the first batch, lies above that of `step`; each in its own process.
Then what estimates cost: `estimate` for 1000 subsets of 40 groups out of 10 000 rows, d = 4096, as a user runs it, against the same number of
fine-tunes of one epoch (fine-tuning time = that of `step` on half of the rows, no optimizer, no evaluation).
"""

import argparse
import json
import pathlib
import re
import sys
import tempfile
import time

import harness
import numpy as np
import torch
import transformers

sys.path.insert(0, str(harness.ROOT))
import common_v1 as common  # noqa: E402
import project_grads as grads  # noqa: E402

B = 8
FAMILIES = {"gpt2": dict(n_layer=4, n_embd=256, n_head=4, vocab_size=2048, n_positions=128, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False),
            "llama-1b": dict(num_hidden_layers=16, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
                             vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=True)}


def build(args):
    """(model, batch): batch as grads.collate makes it, every token but the first a target."""
    torch.manual_seed(0)
    kind = transformers.GPT2Config if args.family == "gpt2" else transformers.LlamaConfig
    config = kind(**FAMILIES[args.family], attn_implementation="eager" if args.family == "gpt2" else "sdpa")
    if args.family == "gpt2":
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_config(config).to(device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    T = args.tokens
    ids = torch.randint(0, config.vocab_size, (B, T), device=device)
    batch = {"input_ids": ids, "position_ids": torch.arange(T, device=device).expand(B, T), "target_index": torch.arange(T - 1, device=device).expand(B, T - 1),
             "target_ids": ids[:, 1:].contiguous(), "is_target": torch.ones(B, T - 1, dtype=torch.bool, device=device)}
    return model, batch


def row_losses(model, batch):
    return grads.reduce_rows(grads.token_losses(model, batch), batch["is_target"], "loss")


def step(model, batch):
    """A training step's forward and backward."""
    row_losses(model, batch).mean().backward()
    for p in model.parameters():
        p.grad = None


class Ours:
    """collect's loop on one batch; the store is written to `folder`."""

    def __init__(self, model, batch, kind, dim, folder):
        self.batch, self.tracked = batch, grads.tracked_parameters(model, "all")
        folder.mkdir()
        self.writer = grads.Writer(folder, B, dim, "fp16")
        chunk = 256 if torch.cuda.is_available() else 8
        self.make = lambda: grads.Gradients(model, self.tracked, (kind, dim, 0), "loss", chunk * 2**20 // 4)
        self.tables = None

    def __call__(self):
        gradients = self.make()
        if self.tables is not None:
            gradients.sketch.tables = self.tables
        started = time.perf_counter()
        loss, odds, norms, projected = gradients.rows(self.batch)
        self.writer.put(list(range(B)), loss.tolist(), odds.tolist(), norms, projected, np.full(B, self.batch["target_ids"].shape[1]))
        seconds = time.perf_counter() - started
        self.tables = gradients.sketch.tables
        gradients.close()
        return seconds


def loop(model, batch):
    """(B, p) gradients by one backward pass a row."""
    found = []
    for b in range(B):
        wanted = torch.autograd.grad(row_losses(model, {k: v[b: b + 1] for k, v in batch.items()}).sum(), list(model.parameters()))
        found.append(torch.cat([g.flatten() for g in wanted]))
    return torch.stack(found)


def vmapped(model, batch):
    """{parameter: (B, ...) gradients} by torch.func; the loss is written out, as the hooks' own gathering is not needed."""
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss(weights, ids):
        logits = torch.func.functional_call(model, weights, (ids[None],), {"use_cache": False}).logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, ids[1:])
    return torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, batch["input_ids"])


def vmap_sketcher(model, batch):
    """A function of nothing: -> (sketches (B, 4096), norms (B,)) of the batch by vmap(grad)."""
    sketch = grads.Sketch("sjlt", 4096, 0, {n: q.numel() for n, q in model.named_parameters()}, "cpu")

    def run():
        found, out, squares = vmapped(model, batch), sketch.start(B), torch.zeros(B)
        for name in found:
            rows = found[name].reshape(B, -1)
            squares += torch.linalg.vector_norm(rows, dim=1).square()
            sketch.add(out, name, 0, rows)
        return sketch.finish(out), squares.sqrt()
    return run


def timed(function):
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def speed(args, folder):
    """Seconds of a batch for every way, {name: least over the rounds}."""
    model, batch = build(args)
    p = sum(q.numel() for q in model.parameters())
    names = {f"ours {d}": ("sjlt", d) for d in (512, 4096, 8192)} | {"ours rolled 4096": ("rolled", 4096), "ours kron 4096": ("kron", 4096)}
    ways = {"step": lambda: timed(lambda: step(model, batch))}
    for name, (kind, dim) in names.items():
        ways[name] = Ours(model, batch, kind, dim, folder / name)
    if not args.gpu_only:
        from trak.projectors import BasicProjector, ProjectionType
        sketched = vmap_sketcher(model, batch)
        stacked, dense = torch.randn(B, p), torch.randint(0, 2, (p, 100), dtype=torch.int8).float() * 2 - 1
        projector = BasicProjector(p, 200, 0, ProjectionType.rademacher, torch.device("cpu"))
        ways |= {"loop": lambda: timed(lambda: loop(model, batch)), "vmap": lambda: timed(lambda: vmapped(model, batch)),
                 "vmap + our sketch": lambda: timed(sketched),
                 "BasicProjector, 200 columns": lambda: timed(lambda: projector.project(stacked, 0)),
                 "stored matrix, 100 columns": lambda: timed(lambda: stacked @ dense)}

    def run(name):
        for q in model.parameters():
            q.requires_grad_(True)
        return {"s": ways[name]()}
    for name in ways:  # compile, tables, allocator
        run(name)
    results = harness.alternate(ways, args.rounds, run)
    return p, {name: min(r["s"] for r in runs) for name, runs in results.items()}, results


def ratios(best):
    """The figures of the acceptance table: times a training step, and times ours."""
    found = {f"{name} / step": s / best["step"] for name, s in best.items() if name.startswith("ours")}
    found["ours 8192 / ours 512"] = best["ours 8192"] / best["ours 512"]
    if "vmap" in best:
        for d in (512, 4096):
            ours, rest = best[f"ours {d}"], d / 200 * best["BasicProjector, 200 columns"]
            found |= {f"loop+trak {d} / ours": (best["loop"] + rest) / ours, f"trak {d} / ours": (best["vmap"] + rest) / ours,
                      f"gradex {d} / ours": (best["loop"] + d / 100 * best["stored matrix, 100 columns"]) / ours}
        found["ours 4096 / vmap + our sketch"] = best["ours 4096"] / best["vmap + our sketch"]
    return found


def memory(args):
    """In a process of its own: peak of one way above what was held before [MB], over two batches."""
    model, batch = build(args)
    with tempfile.TemporaryDirectory() as folder:
        ways = {"step": lambda: step(model, batch)}
        if args.child == "ours":
            ways["ours"] = Ours(model, batch, "sjlt", 4096, pathlib.Path(folder) / "store")
        if args.child == "vmap":
            ways["vmap"] = vmap_sketcher(model, batch)
        status = pathlib.Path("/proc/self/status")

        def field(name):
            return int(re.search(rf"{name}:\s+(\d+)", status.read_text()).group(1)) / 1024
        before = field("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        ways[args.child]()
        ways[args.child]()
        print(json.dumps({"MB": field("VmHWM") - before}))


def make_store(folder, n, dim, n_groups, rng):
    """A finished store of random rows, as collect would leave it: only the sizes matter here."""
    folder.mkdir()
    writer = grads.Writer(folder, n, dim, "fp16")
    for a in range(0, n, 1000):
        block = torch.from_numpy(rng.standard_normal((min(1000, n - a), dim), dtype=np.float32))
        size = len(block)
        writer.put(list(range(a, a + size)), [2.0] * size, [0.0] * size, block.norm(dim=1), block, np.full(n, 100))
    writer.flush()
    rows = argparse.Namespace(n_targets=np.full(n, 100), group=np.arange(n) % n_groups)
    same = {"name": "random", "digest": "0"}
    common.write_json(folder / "manifest.json", {
        "n": n, "dim": dim, "groups": [f"g{i}" for i in range(n_groups)], "target": "loss", "sketch": "sjlt", "seed": 0, "run": 0, "hash": "splitmix64-1",
        "parameters": [], "precond": "none", "precond_digest": "none", "model": same, "data": same})
    grads.finish_store(folder, rows)


def estimating(args, folder, step_seconds):
    """Seconds of `estimate` for 1000 subsets, start of Python included, and the fine-tunes that it stands for."""
    rng, n = np.random.default_rng(0), 10_000
    make_store(folder / "train", n, 4096, 40, rng)
    make_store(folder / "target", 500, 4096, 10, rng)
    (folder / "subsets.txt").write_text("".join(" ".join(map(str, sorted(rng.choice(40, 20, replace=False)))) + "\n" for _ in range(1000)))
    seconds = []
    for i in range(min(3, args.rounds)):
        started = time.perf_counter()
        harness.run_script("project_grads.py", ["estimate", "--grads", str(folder / "train"), "--target_grads", str(folder / "target"), "--subsets",
                                                str(folder / "subsets.txt"), "--step_size", "1", "--out", str(folder / f"estimates-{i}.csv")])
        seconds.append(time.perf_counter() - started)
    true = 1000 * n / 2 / B * step_seconds
    return {"estimate [s]": min(seconds), "1000 fine-tunes of one epoch, derived [s]": true, "ratio": true / min(seconds)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    harness.add_flags(parser)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="gpt2")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--tokens", type=int, default=128, help="length of a row")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        return memory(args)
    if harness.no_gpu(args):
        return None
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        p, best, results = speed(args, folder)
        figures = {"parameters": p, "threads": 1, "least [s]": best, "ratios": ratios(best)}
        if not args.gpu_only:
            peak = {peer: harness.in_child(peer, folder)["MB"] for peer in ("step", "ours", "vmap")}
            figures["memory [MB]"] = {"peak above the start": peak, "extra": {peer: peak[peer] - peak["step"] for peer in ("ours", "vmap")},
                                      "B x parameters x 4 bytes": B * p * 4 / 2**20}
            figures["estimate"] = estimating(args, folder, best["step"])
    print(json.dumps(figures, indent=1))
    harness.write_summary(args, results, **figures)
    return None


if __name__ == "__main__":
    main()
