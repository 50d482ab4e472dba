"""Ranks, ZeRO stages, kills, signals, launchers: what only whole runs show (pytest -m slow)."""

import hashlib
import math
import os
import pathlib
import random
import shutil
import signal
import sys
import time

import conftest
import pytest
import torch
from conftest import finish, make_model, start_many

import common
import seq2seq

STAGES = ("zero0", "zero1", "zero2", "zero3")
SHORT = ["--data", "d", "--max_steps", "7", "--save_steps", "0", "--max_new_tokens", "8"]
SHORT += ["--learning_rate", "1e-3", "--warmup_steps", "2", "--weight_decay", "0.01"]
SHORT += ["--logging_steps", "1", "--eval_steps", "7"]
SAMPLING = ["--temperature", "1", "--n_samples", "2"]
SAMPLING += ["--eval_batch_size", "8"]  # the ranks share three batches


@pytest.fixture(autouse=True)
def prepared(folder):
    """7 steps of 16 examples, the last one short; 10 rows to evaluate."""
    conftest.write_data("d", conftest.pairs(100), conftest.pairs(10, 100))


def predictions(name):
    """{file: bytes}"""
    paths = pathlib.Path("models", name).glob("temperature=*.json")
    return {path.name: path.read_bytes() for path in paths}


def at_stages(words, prefix="", stages=STAGES):
    """Words of a run at each stage, whose name comes last."""
    return [[*words, "--ds_config", s, "--training_run_name", f"{prefix}{s}"] for s in stages]


def losses(name, key="loss"):
    return [row[key] for row in conftest.metrics(name, "train")]


def check_same(name, other):
    """Weights, samples, losses, and the norms that Adam and clipping would hide."""
    assert conftest.distance(other, name) < 1e-6, name
    assert predictions(name) == predictions(other), name
    assert len(predictions(name)) == 2
    for key in ("loss", "grad_norm"):
        assert losses(name, key) == pytest.approx(losses(other, key), rel=1e-5)


def check_mixture(data_sets):
    """models/run was trained on 8 examples of d and of e; data_sets: those of its answers."""
    row = conftest.metrics("run", "eval")[-1]
    assert row["step"] == 4
    assert {"eval/loss", "eval/d/loss", "eval/e/loss", "eval/e/exact_match"} <= set(row)
    assert row["eval/d/loss"] != row["eval/e/loss"]
    answers = conftest.read_json("models/run/temperature=0.80_n=3_step=4.json")
    assert [answer["dataset"] for answer in answers] == data_sets
    samples = {sample["lm_postprocess"] for sample in answers[0]["generations"]}
    assert len(samples) == 3


def check_ranks(words, module=seq2seq):
    """Two ranks at each stage against one process, the run "one"."""
    two_ranks = ["--train_batch_size", "8", "--gradient_accumulation_steps", "2", *words]
    process = start_many(at_stages(two_ranks), 2, module)
    alone = ["--train_batch_size", 16, "--training_run_name", "one"]
    conftest.run(*words, *alone, module=module)
    finish(process)
    for stage in STAGES:
        check_same(stage, "one")


@pytest.mark.slow
def test_ranks_accumulation_and_stages_give_the_same_weights():
    make_model("t5v1.1")
    words = ["--model_init_name", "t5v1.1", *SHORT, *SAMPLING]
    check_ranks(words)
    four = ["--train_batch_size", 4, "--gradient_accumulation_steps", 4]
    conftest.run(*words, *four, "--training_run_name", "four")
    check_same("four", "one")
    assert conftest.distance("one", "../models/t5v1.1") > 1e-3  # something was learned at all


@pytest.mark.slow
def test_precisions_offload_compilation_and_checkpointing_agree():
    """A process each would cost 8 seconds; that of --compile takes its own part."""
    make_model("t5v1.1")
    words = ["--model_init_name", "t5v1.1", *SHORT, "--training_run_name"]
    conftest.run(*words, "plain")
    for flag in ("compile", "gradient_checkpointing"):
        conftest.run(*words, flag, f"--{flag}")
        assert losses(flag) == pytest.approx(losses("plain"), rel=1e-4)
    for precision, stage in (
        *(("bf16", "zero1"), ("bf16", "zero2"), ("bf16", "zero3")),
        ("bf16-mixed", "zero0"),
    ):
        name = f"{precision}-{stage}"
        conftest.run(*words, name, "--precision", precision, "--ds_config", stage)
        assert losses(name) == pytest.approx(losses("plain"), rel=0.02)
        assert losses(name) != pytest.approx(losses("plain"), rel=1e-6)
    conftest.run(*words, "adafactor", "--optimizer", "adafactor")
    assert losses("adafactor")[-1] < losses("adafactor")[0]
    for stage in ("zero2_offload", "zero3_offload"):
        conftest.run(*words, stage, "--ds_config", stage)
        assert conftest.distance("plain", stage) < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_stops_the_run(stage, monkeypatch, capsys, refused):
    make_model("t5")
    words = ["--model_init_name", "t5", *SHORT, "--save_steps", 1, "--ds_config", stage]
    with pytest.raises(SystemExit) as error:
        conftest.run(*words, "--learning_rate", 1e30, "--training_run_name", "high")
    assert error.value.code == 2
    saved = common.complete_checkpoints(pathlib.Path("models/high"))
    message = capsys.readouterr().err
    assert (
        f"step {len(saved) + 1}: the loss is " in message and "a lower --learning_rate" in message
    )
    assert len(saved) < 3

    def cross_entropy(*args, **kwargs):
        losses = torch.nn.functional.nll_loss(args[0].log_softmax(1), args[1], reduction="none")
        if losses.requires_grad:
            losses.register_hook(lambda grad: grad * math.inf)
        return losses

    monkeypatch.setattr(seq2seq.F, "cross_entropy", cross_entropy)
    assert "step 1: the loss is " in refused(
        conftest.run, *words, "--training_run_name", "gradient"
    )
    assert not list(pathlib.Path("models/gradient").glob("checkpoint-*"))


def newest(run):
    """(step, whether it is being written) of the newest checkpoint of a run."""
    found = [(0, False)]
    for path in run.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        found.append((int(step.removesuffix(".tmp")), step.endswith(".tmp")))
    return max(found)


def kill_at(step, name, process, while_saving=False, delay=0.0):
    """kill -9 of all ranks when models/<name> has the checkpoint of a step, or writes it."""
    run = pathlib.Path("models", name)
    while process.poll() is None:
        reached, is_saving = newest(run)
        if reached >= step and (is_saving or not while_saving):
            break
        time.sleep(0.001)
    time.sleep(delay)
    assert process.poll() is None, finish(process)
    process.kill()
    assert not (run / common.COMPLETE).exists()


def bits(name):
    """{file: hash} of all weights, predictions, and rows of metrics without their times."""
    run = pathlib.Path("models", name)
    found = {}
    for path in [*run.rglob("*.safetensors"), *run.glob("temperature=*.json")]:
        found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    rows = conftest.metrics(name)
    for row in rows:
        for measured in ("tokens_per_sec", "peak_memory_gb"):
            row.pop(measured, None)
    return found, rows


def check_kills(words, module=seq2seq, stages=STAGES):
    """Runs of two ranks, each killed while it saves, or a moment later, end like others."""
    undisturbed = start_many(at_stages(words, "whole-", stages), 2, module)
    rng = random.Random(0)
    for i, run in enumerate(at_stages(words, "killed-", stages)):
        process = start_many([run], 2, module)
        kill_at(rng.randrange(3, 10), run[-1], process, i % 2 == 0, i % 2 * rng.random() / 8)
        finish(start_many([run], 2, module))
    finish(undisturbed)
    for stage in stages:
        assert bits(f"killed-{stage}") == bits(f"whole-{stage}")
        assert len(bits(f"killed-{stage}")[0]) > 4


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits():
    make_model("t5v1.1", dropout_rate=0.1)
    words = ["--model_init_name", "t5v1.1", *SHORT, "--max_steps", "14", "--save_steps", "2"]
    words += ["--train_batch_size", "8", "--logging_steps", "3", "--metric_for_best", "loss"]
    check_kills(words)


def wait_for_training(process, name):
    path = pathlib.Path("models", name, "metrics.jsonl")
    while not path.exists() or '"train"' not in path.read_text():
        assert process.poll() is None, finish(process)
        time.sleep(0.05)


@pytest.mark.slow
def test_a_signal_saves_and_leaves(capsys, refused):
    make_model("t5", dropout_rate=0.1)
    words = ["--model_init_name", "t5", *SHORT, "--max_steps", 300, "--train_batch_size", "4"]
    words += ["--eval_steps", 300, "--training_run_name"]
    signals = {"TERM": signal.SIGTERM, "USR1": signal.SIGUSR1, "INT": signal.SIGINT}
    for name, number in signals.items():
        process = start_many([[*words, name]], 1)
        wait_for_training(process, name)
        process.send_signal(number)
        output = finish(process, common.EXIT_SAVED)
        assert "saved at step" in output and "Traceback" not in output
    assert conftest.run(*words, "time", "--max_hours", 1e-9) == common.EXIT_SAVED
    assert newest(pathlib.Path("models/time")) == (1, False)
    for name in ("TERM", "undisturbed"):
        assert conftest.run(*words, name) == 0
    assert bits("TERM")[1] == bits("undisturbed")[1]
    assert conftest.distance("TERM", "undisturbed") == 0
    # torchrun hands SIGTERM on, and leaves with 1 whatever its processes say
    process = conftest.start(*words, "ranks", n_ranks=2)
    wait_for_training(process, "ranks")
    process.terminate()
    finish(process, 1)
    (saved,) = common.complete_checkpoints(pathlib.Path("models/ranks"))
    capsys.readouterr()
    message = refused(conftest.run, *words, "ranks")
    assert "world_size was 2" in message and "make it the same" in message
    assert f"--model_init_path {saved.parent}/checkpoint-" in message
    assert conftest.run("--model_init_path", saved, *words[2:], "other", "--max_steps", 2) == 0


COMMAND = (  # promise 9, letter for letter
    "seq2seq.py --model_init_name flan-t5-xxl --training_run_name 0216syn_explain "
    "--gradient_accumulation_steps 2 --train_batch_size 8 --max_steps 6001 "
    "--data synthetic_explain --eval_steps 2000 --temperature 0.001 --n_samples 1"
)


@pytest.mark.slow
def test_copied_files_run_under_every_launcher(folder):
    """A script, common.py and ds_configs/ in an empty folder: plain, deepspeed, srun alone."""
    for name in ("seq2seq.py", "common.py"):
        shutil.copy(conftest.ROOT / name, folder)
    shutil.copytree(conftest.ROOT / "ds_configs", folder / "ds_configs")
    make_model("t5")
    pathlib.Path("models/t5").rename("models/flan-t5-xxl")
    pathlib.Path("data/d.json").rename("data/synthetic_explain.json")
    script, *words = COMMAND.split()
    assert seq2seq.parse_args(words).max_steps == 6001
    words += ["--max_steps", "3"]
    finish(conftest.start(*words, script=script))
    words += ["--training_run_name", "deepspeed"]
    launcher = pathlib.Path(sys.executable).with_name("deepspeed")
    launch = [launcher, "--num_gpus", "2", "--master_port", str(random.randrange(20000, 40000))]
    process = conftest.start(*words, script=script, launcher=launch)
    finish(process)
    words[-1] = "srun"
    variables = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    variables.update(SLURM_STEP_NODELIST="localhost", SLURM_JOB_ID=str(os.getpid()))
    processes = []
    for rank in ("0", "1"):
        variables.update(SLURM_PROCID=rank, SLURM_LOCALID=rank)
        processes.append(conftest.start(*words, script=script, environment=variables))
    for process in processes:
        finish(process)
    for name in ("deepspeed", "srun"):
        assert conftest.read_json(f"models/{name}/args.json")["world_size"] == 2
        assert conftest.distance("0216syn_explain", name) < 1e-6
        assert predictions("0216syn_explain") == predictions(name)
