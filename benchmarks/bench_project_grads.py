"""The cost of a projected gradient per example: collect of project_grads.py, a training step, TRAK.

    pip install -r benchmarks/requirements.txt
    python benchmarks/bench_project_grads.py --out benchmarks/results/project_grads_cpu_2cores.json

A GPT-2 of 4.2 M parameters with new weights, 8 rows of 128 random tokens, one thread; one way after
the other in each round. On a CPU the seconds that the process has computed: others may use it too.
    step       forward and backward with the gradients of all weights: training, less the optimizer
    ours       losses and rows of 4096 numbers, as collect computes them
    loop       a backward pass for each row: whole gradients, one by one
    projector  traker's BasicProjector: 8 whole gradients to 200 numbers, by a random matrix that is
               drawn again from its seed. Each number costs the same, so this is scaled up
    trak       loop, then projector
"""

import argparse
import sys
import time

import harness

sys.path.insert(0, str(harness.ROOT))
import common  # first: it prepares the import of DeepSpeed

# isort: split
import torch
import transformers

import project_grads

N_ROWS, N_TOKENS, DIM, N_COLUMNS = 8, 128, 4096, 200


def make_model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=4,
        n_embd=256,
        n_head=4,
        vocab_size=2048,
        n_positions=N_TOKENS,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return transformers.AutoModelForCausalLM.from_config(config).to(device).eval()


def make_batch(model):
    input_ids = torch.randint(model.config.vocab_size, (N_ROWS, N_TOKENS))
    labels = torch.cat([input_ids[:, 1:], torch.full((N_ROWS, 1), project_grads.IGNORED)], dim=1)
    return common.to_device({"input_ids": input_ids, "labels": labels}, model.device)


def train_step(model, batch):
    project_grads.row_losses(model, batch).mean().backward()
    model.zero_grad()


def loop(model, batch):
    """(B, p) whole gradients."""
    rows = []
    for i in range(N_ROWS):
        row = {name: tensor[i : i + 1] for name, tensor in batch.items()}
        project_grads.row_losses(model, row).sum().backward()
        rows.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
        model.zero_grad()
    return torch.stack(rows)


def make_ways():
    """{name: function without arguments}"""
    from trak.projectors import BasicProjector, ProjectionType

    plain = make_model()
    batch = make_batch(plain)
    whole = loop(plain, batch)
    kind = ProjectionType.rademacher
    projector = BasicProjector(whole.shape[1], N_COLUMNS, 0, kind, plain.device)
    ways = {"step": lambda: train_step(plain, batch)}
    gradients = project_grads.Gradients(make_model(), DIM, seed=0)
    ways["ours"] = lambda: gradients.rows(batch)
    ways["loop"] = lambda: loop(plain, batch)
    ways["projector"] = lambda: projector.project(whole, 0)
    return ways


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    harness.add_flags(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ways = make_ways()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time

    def run(name):
        start = clock()
        ways[name]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = clock() - start
        return {"seconds": seconds, "rows_per_sec": N_ROWS / seconds}

    for name in ways:  # tables of places, memory
        run(name)
    results = harness.alternate(ways, args.rounds, run)
    results["trak"] = []
    for loop_run, projector_run in zip(results["loop"], results["projector"]):
        seconds = loop_run["seconds"] + projector_run["seconds"] * DIM / N_COLUMNS
        results["trak"].append({"rows_per_sec": N_ROWS / seconds})
    ratios = harness.ratios(results, "ours", ["step", "trak"], "rows_per_sec")
    harness.write_summary(args, ratios={"projected": ratios}, runs=results)


if __name__ == "__main__":
    main()
