"""presets/sweeps: files parse with the trainer's flags; run.py searches with a toy."""

import importlib.util
import json
import os
import pathlib
import signal
import time

import pytest
import yaml
from conftest import ROOT, finish, start

import prepare_glue
import seq2seq

pytest.importorskip("optuna")
SCRIPT = ROOT / "presets" / "sweeps" / "run.py"
spec = importlib.util.spec_from_file_location("sweeps_run", SCRIPT)
sweeps = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweeps)

TOY = """
import json, os, pathlib, sys, time
flags = dict(word[2:].split("=") for word in sys.argv[1:])
folder = pathlib.Path("models", flags["training_run_name"])
folder.mkdir(exist_ok=True)
with open("starts.txt", "a") as file:
    file.write(f"{os.getpid()} {json.dumps(flags)}\\n")
while not os.path.exists("go"):
    time.sleep(0.02)
score = float(flags["x"])
values = [float("nan"), 0.0, score, score - 1]
rows = [json.dumps({"eval/score": value}) + "\\n" for value in values]
folder.joinpath("metrics.jsonl").write_text("".join(rows))
"""
SWEEP = {"program": "toy.py", "method": "bayes", "name": "toy", "run_cap": 50}
SWEEP["metric"] = {"name": "eval/score", "goal": "maximize"}
SWEEP["parameters"] = {"x": {"min": 1.0, "max": 2.0}, "y": {"values": ["a", "1e-5"]}}
SWEEP["parameters"]["wandb_project"] = {"value": "p"}


def write(**changes):
    pathlib.Path("toy.py").write_text(TOY)
    pathlib.Path("toy.yaml").write_text(yaml.safe_dump({**SWEEP, **changes}))


def search(*words):
    try:
        return sweeps.main(["toy.yaml", *map(str, words)])
    except SystemExit as stop:
        return stop.code


def starts():
    """[(process, flags)] of the toys that were started."""
    path = pathlib.Path("starts.txt")
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(line.split()[0]), json.loads(line.split(maxsplit=1)[1])) for line in lines]


def wait_for_starts(n):
    for _ in range(3000):  # a minute
        if len(starts()) == n:
            return
        time.sleep(0.02)
    raise AssertionError(starts())


FILES = sorted((ROOT / "presets" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_have_flags_of_seq2seq(path, monkeypatch, folder):
    monkeypatch.chdir(ROOT)
    task = prepare_glue.TASKS[path.stem.split("_")[1]]
    sweep = yaml.safe_load(path.read_text())
    assert sweep["metric"]["name"] == f"eval/{task.metrics[0]}" and len(FILES) == 8
    study = sweeps.optuna.create_study()
    trial = study.ask()
    params = sweeps.choose(trial, sweep)
    command = sweeps.command_line(sweep, params)
    args = seq2seq.parse_args(command[3:])
    assert command[2] == "seq2seq.py" and 1e-5 <= args.learning_rate <= 1e-3
    assert args.metrics == task.metrics and args.labels == list(task.answers.values())
    assert args.train_batch_size == params["train_batch_size"]


def test_search(capsys):
    """The best value counts; the same command does nothing more; --set is for all trials."""
    write()
    pathlib.Path("go").touch()
    words = ["--set", "z=3", "--trials"]
    assert search(*words, 4) == 0 and search(*words, 4) == 0
    flags = [flags for _, flags in starts()]
    assert len(flags) == 4 and {found["z"] for found in flags} == {"3"}
    assert [found["training_run_name"] for found in flags] == [
        f"sweeps/toy/trial-{n:03d}" for n in range(4)
    ]
    assert {found["y"] for found in flags} <= {"a", "1e-5"} and "wandb_project" not in flags[0]
    best = max(float(found["x"]) for found in flags)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[1] == f"{best:.5g}"
    assert search("--trials", 5) == 2 and "--set" in capsys.readouterr().err


def test_grid_and_failures(capsys):
    pathlib.Path("go").touch()
    values = ["1e-1", "no number", 2]
    write(method="grid", parameters={"x": {"values": values}, "y": {"values": [1, 2]}})
    assert search("--trials", 99) == 0
    assert [flags["x"] for _, flags in starts()] == ["1e-1"] * 2 + ["no number"] * 2 + ["2"] * 2
    assert "exit code 1" in capsys.readouterr().out
    write(name="bad", parameters={"x": {"value": "no number"}})
    assert search("--trials", 9) == 1 and len(starts()) == 6 + 3


@pytest.mark.slow
def test_two_agents_of_which_one_is_killed():
    """Each trial runs once; that of a killed agent runs on, or if it was killed too, again."""
    write()
    words = ["toy.yaml", "--trials", 4]
    first = start(*words, script=SCRIPT)
    wait_for_starts(1)
    second = start(*words, script=SCRIPT)
    wait_for_starts(2)
    first.kill()
    first.wait()
    third = start("toy.yaml", "--trials", 2, script=SCRIPT)
    assert "2 trials failed, or run elsewhere" in finish(third) and len(starts()) == 2
    os.kill(starts()[0][0], signal.SIGKILL)
    pathlib.Path("go").touch()
    finish(second)
    finish(start(*words, script=SCRIPT))
    found = [flags for _, flags in starts()]
    names = [flags["training_run_name"][-3:] for flags in found]
    assert sorted(names) == ["000", "000", "001", "002", "003"]
    again = names.index("000", 1)
    assert found[0] == found[again]
    assert len({flags["x"] for flags in found}) == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"program": "none.py"}, "no none.py here"),
        ({"method": "best"}, "expected method grid, random or bayes"),
        ({"metric": {"goal": "up"}}, "up"),
        ({"parameters": {"x": {"vlaues": [1]}}}, "KeyError: 'min'"),
        ({"parameters": {"x": {"min": 2.0, "max": 1.0}}}, "ValueError"),
        ({"parameters": {"x": {"min": 0, "max": 9, "distribution": "normal"}}}, "not supported"),
        ({"command": ["${program}", "${args_json}"]}, "${args_json}"),
        ({"parameters": {"x": {"value": 1}, "mount_dir": {"value": ["a"]}}}, "mount_dir: expected"),
        (
            {"parameters": {"x": {"value": 1}, "mount_dir": {"values": ["a"]}}},
            "mount_dir: expected",
        ),
    ],
)
def test_mistakes(changes, message, capsys):
    write(**changes)
    assert search("--trials", 2) == 2
    assert message in capsys.readouterr().err and not os.listdir("models")
