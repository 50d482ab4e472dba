"""presets/sweeps: our sweep files against seq2seq.py's own flags; run.py with a toy program that trains in no time."""

import csv
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time

import prepare_glue
import pytest
import yaml
from conftest import ROOT, load_file

run = load_file(ROOT / "presets" / "sweeps" / "run.py")

OURS = sorted((ROOT / "presets" / "sweeps").glob("*.yaml"))
HAS_OPTUNA = importlib.util.find_spec("optuna") is not None
MODES = [pytest.param([], marks=pytest.mark.skipif(not HAS_OPTUNA, reason="optuna is not installed"), id="optuna"),
         pytest.param(["--no_optuna"], id="random")]

# Best at x = 0.3, in step 2 of 3. starts.txt has a line per start; --wait: until the file go is there; --once CODE: the first start fails
TOY = """
import argparse, json, os, pathlib, signal, sys, time
parser = argparse.ArgumentParser(allow_abbrev=False)
for flag in ("x", "y", "training_run_name", "mount_dir", "report_to", "wait", "code", "once"):
    parser.add_argument("--" + flag)
args = parser.parse_args()
run = pathlib.Path(args.mount_dir or ".", "models", args.training_run_name)
again = run.exists()
run.mkdir(parents=True, exist_ok=True)
with open("starts.txt", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
print("started", flush=True)
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("saved").touch(), sys.exit(75)))
while args.wait and not os.path.exists("go"):
    time.sleep(0.02)
if args.code or args.once and not again:
    print("the toy is broken", flush=True)
    sys.exit(int(args.code or args.once))
score = 1 - (float(args.x) - 0.3) ** 2
with open(run / "metrics.jsonl", "w") as file:
    for step, value in enumerate([0.0, score, score - 0.1]):
        file.write(json.dumps({"step": step + 1, "split": "eval", "eval/score": value, "eval/loss": 1.0}) + "\\n")
    file.write('{"step": 4, "eval/sc')
"""
SWEEP = {"program": "toy.py", "method": "bayes", "metric": {"name": "eval/score", "goal": "maximize"}, "name": "toy",
         "parameters": {"x": {"min": 0.0, "max": 1.0}, "y": {"values": ["a", "b"]}, "report_to": {"value": "wandb"}, "wandb_project": {"value": "p"}}}


class Toy:
    """A folder with toy.py and a sweep file."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "toy.py").write_text(TOY)
        self.write()

    def write(self, **changes):
        (self.folder / "toy.yaml").write_text(yaml.safe_dump({**SWEEP, **changes}))

    def start(self, *words, trials=3, folder="models/s"):
        command = [sys.executable, ROOT / "presets" / "sweeps" / "run.py", "toy.yaml", "--trials", str(trials), "--folder", folder, *words]
        return subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def run(self, *words, **options):
        process = self.start(*words, **options)
        text, _ = process.communicate(timeout=120)
        return process.returncode, text

    def starts(self):
        path = self.folder / "starts.txt"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def results(self, folder="models/s"):
        return [json.loads(path.read_text()) for path in sorted((self.folder / folder / "trials").glob("*.result.json"))]

    def wait_for_starts(self, n):
        end = time.monotonic() + 60
        while len(self.starts()) < n:
            assert time.monotonic() < end, f"{len(self.starts())} of {n} starts"
            time.sleep(0.02)

    def children(self, agent):
        return [int(pid) for pid in (open(f"/proc/{agent.pid}/task/{agent.pid}/children").read().split())]


@pytest.fixture
def toy(tmp_path):
    return Toy(tmp_path)


def parameter(**spec):
    problems = []
    found = run.read_parameter("x", spec, problems)
    assert not problems
    return found


def drawn(**spec):
    sweep = {"method": "random", "space": {"x": parameter(**spec)}}
    return [run.draw(sweep, 0, n)["x"] for n in range(300)]


# ------------------------------------------------------------------------------------------------ our files


def test_there_is_a_file_for_every_task():
    assert [path.name for path in OURS] == [f"glue_{task}_sweep.yaml" for task in sorted("cola sst2 mrpc stsb qqp mnli qnli rte".split())]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_our_files_name_flags_of_seq2seq(path, monkeypatch):
    import seq2seq
    monkeypatch.chdir(ROOT)
    problems = []
    sweep = run.read_sweep(path, {}, problems)
    assert not problems and sweep["method"] == "bayes" and sweep["metric"]["goal"] == "maximize"
    task = path.stem.split("_")[1]
    as_wandb_reads_it = yaml.safe_load(path.read_text())["parameters"]["learning_rate"]
    assert type(as_wandb_reads_it["min"]) is type(as_wandb_reads_it["max"]) is float
    for n in range(3):
        params = run.draw(sweep, 0, n)
        assert type(params["learning_rate"]) is float and 1e-5 <= params["learning_rate"] <= 1e-3
        command = run.command_line(sweep, {**params, "training_run_name": "sweeps/a/trial-000"}, None)
        assert command[:3] == ["/usr/bin/env", sys.executable, "seq2seq.py"]
        args = seq2seq.parse_args(command[3:])
        about = prepare_glue.TASKS[task]
        assert args.learning_rate == params["learning_rate"] and args.data_name == [task] and args.metrics == about.metrics
        assert args.metric_for_best == about.metrics[0] == sweep["metric"]["name"].removeprefix("eval/")
        assert args.labels == list(about.answers.values()) and args.train_batch_size == params["train_batch_size"]


# ------------------------------------------------------------------------------------------------ macros and distributions


def test_macros():
    params = {"lr": 1e-5, "deep": True, "wide": False, "name": "a b"}

    def line(*command, launcher=None):
        return run.command_line({"command": list(command), "program": "p.py"}, params, launcher)

    assert line(*run.COMMAND) == ["/usr/bin/env", sys.executable, "p.py", "--lr=1e-05", "--deep=True", "--wide=False", "--name=a b"]
    assert line("${program}", "--fixed", "${args_no_boolean_flags}") == ["p.py", "--fixed", "--lr=1e-05", "--deep", "--name=a b"]
    assert line("accelerate", "launch", "${program}", "${args_no_hyphens}") == [
        "accelerate", "launch", "p.py", "lr=1e-05", "deep=True", "wide=False", "name=a b"]
    assert line(*run.COMMAND, launcher="deepspeed --num_gpus 4")[:4] == ["deepspeed", "--num_gpus", "4", "p.py"]


def test_float_ranges_and_bounds_spelled_1e_5():
    for low, high in (("1e-5", "1e-3"), (1e-5, 1e-3)):
        for spec in ({"min": low, "max": high}, {"distribution": "uniform", "min": low, "max": high}):
            found = drawn(**spec)
            assert all(type(x) is float and 1e-5 <= x <= 1e-3 for x in found) and 4e-4 < sorted(found)[150] < 6e-4
        found = drawn(distribution="log_uniform_values", min=low, max=high)
        assert all(type(x) is float and 1e-5 <= x <= 1e-3 for x in found) and 7e-5 < sorted(found)[150] < 1.4e-4
    found = drawn(distribution="log_uniform", min=-2, max=1)
    assert all(math.exp(-2) <= x <= math.e for x in found) and 0.45 < sorted(found)[150] < 0.8


def test_integers_and_steps():
    assert set(drawn(min=2, max=5)) == set(drawn(distribution="int_uniform", min=2, max=5)) == {2, 3, 4, 5}
    assert all(type(x) is int for x in drawn(min=2, max=5))
    assert set(drawn(distribution="q_uniform", min=0.1, max=0.3, q=0.1)) == {0.1, 0.2, 0.3}
    assert set(drawn(distribution="q_uniform", min=5, max=21, q=8)) == {8, 16}
    assert set(drawn(distribution="q_uniform", min=0.5, max=2.5)) == {1, 2}
    found = drawn(distribution="q_log_uniform_values", min=32, max=256, q=32)
    assert set(found) == set(range(32, 257, 32)) and all(type(x) is int for x in found) and found.count(32) > 2 * found.count(224)
    assert set(drawn(distribution="q_log_uniform", min=0, max=1, q=0.5)) == {1.0, 1.5, 2.5, 2.0}


def test_words_and_constants():
    assert set(drawn(values=["1e-5", "linear", 3, True])) == {1e-5, "linear", 3, True}
    assert set(drawn(distribution="categorical", values=[4])) == {4}
    assert set(drawn(value="1E-3")) == set(drawn(distribution="constant", value=0.001)) == {0.001}


def test_without_optuna_a_trial_is_a_function_of_seed_and_number():
    sweep = {"method": "bayes", "space": {"x": parameter(min=0.0, max=1.0), "y": parameter(values=[1, 2, 3])}}
    assert run.draw(sweep, 0, 5) == run.draw(sweep, 0, 5) != run.draw(sweep, 0, 6)
    assert run.draw(sweep, 0, 5) != run.draw(sweep, 1, 5)
    assert run.draw(sweep, 0, 0)["x"] == 0.7049200546009414  # on every machine


# ------------------------------------------------------------------------------------------------ searches


@pytest.mark.parametrize("mode", MODES)
def test_search_and_report(toy, mode):
    code, text = toy.run(*mode, trials=5)
    assert code == 0, text
    assert ("plain random search" in text and "pip install optuna" in text) == bool(mode)
    assert "report_to wandb is replaced by none" in text and "wandb_project is left out" in text
    results = toy.results()
    assert len(results) == len(toy.starts()) == 5
    for n, (result, words) in enumerate(zip(results, toy.starts())):
        assert result["state"] == "complete" and result["exit_code"] == 0 and result["step"] == 2 and result["seconds"] >= 0
        assert result["value"] == 1 - (result["params"]["x"] - 0.3) ** 2 and result["params"]["report_to"] == "none"
        assert words == [*(f"--{key}={value}" for key, value in result["params"].items()), f"--training_run_name=s/trial-{n:03d}"]
        assert json.loads((toy.folder / f"models/s/trials/{n:03d}.params.json").read_text())["params"] == result["params"]
        assert "started" in (toy.folder / f"models/s/trials/{n:03d}.log").read_text()
    table = list(csv.reader(open(toy.folder / "models/s/results.csv")))
    assert table[0] == ["trial", "eval/score", "step", "x", "y", "state"] and len(table) == 6
    values = [float(row[1]) for row in table[1:]]
    assert values == sorted(values, reverse=True) == sorted((result["value"] for result in results), reverse=True)
    assert table[1][0] in text.splitlines()[-5]  # the best comes first
    if importlib.util.find_spec("matplotlib"):
        assert (toy.folder / "models/s/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (toy.folder / "models/s/journal.log").exists() != bool(mode)
    code, text = toy.run(*mode, trials=5)
    assert code == 0 and len(toy.starts()) == 5, "the same command does nothing more"
    code, text = toy.run(*mode, trials=6)
    assert code == 0 and len(toy.starts()) == 6


@pytest.mark.skipif(not HAS_OPTUNA, reason="optuna is not installed")
@pytest.mark.slow
def test_optuna_learns_from_the_results(toy):
    import optuna
    assert toy.run(trials=20)[0] == 0
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = str(toy.folder / "models/s/journal.log")
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(journal)))
    assert [trial.value for trial in study.trials] == [result["value"] for result in toy.results()]
    assert [trial.user_attrs["params"] for trial in study.trials] == [result["params"] for result in toy.results()]
    early, late = [sorted(abs(result["params"]["x"] - 0.3) for result in part) for part in (toy.results()[:7], toy.results()[-7:])]
    assert late[3] < early[3] and late[3] < 0.15


def test_grid(toy):
    toy.write(method="grid", parameters={"x": {"values": ["1e-1", 0.2]}, "y": {"min": 1, "max": 3}}, metric={"name": "eval/score"})
    code, text = toy.run(trials=100)
    assert code == 0 and "6 trials in" in text
    assert [(result["params"]["x"], result["params"]["y"]) for result in toy.results()] == [(x, y) for x in (0.1, 0.2) for y in (1, 2, 3)]
    assert {result["step"] for result in toy.results()} == {1}, "the goal is minimize where the file says nothing"


def test_default_folder_set_and_launcher(toy):
    """--set fixes a parameter, moves models/, and makes another folder; flags go as --key=value, too."""
    command = [sys.executable, ROOT / "presets" / "sweeps" / "run.py", "toy.yaml", "--trials=1", "--no_optuna", "--set", "x=0.5", "mount_dir=m"]
    for words in (["--set=y=b", "--launcher=env MARK=1 " + sys.executable], ["--set=y=a"]):
        done = subprocess.run([*command, *words], cwd=toy.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    folders = list((toy.folder / "m/models/sweeps").glob("toy-????????"))
    assert len(folders) == 2 and all((folder / "trial-000/metrics.jsonl").exists() for folder in folders)
    assert toy.starts()[0][:4] == ["--report_to=none", "--x=0.5", "--mount_dir=m", "--y=b"]
    (toy.folder / "mount" / "data").mkdir(parents=True)
    done = subprocess.run([*command[:-1], "mount_dir=mount", "--folder", "models/s"], cwd=toy.folder, capture_output=True, text=True)
    assert done.returncode == 2 and "expected a folder under" in done.stderr


def test_mount_is_found_as_in_common(toy):
    (toy.folder / "mount" / "data").mkdir(parents=True)
    code, text = toy.run(trials=1)
    assert code == 2 and str(toy.folder / "mount" / "models") in text


@pytest.mark.parametrize("mode", MODES)
def test_two_agents_share_the_trials(toy, mode):
    toy.write(parameters={**SWEEP["parameters"], "wait": {"value": "go"}})
    agents = [toy.start(*mode, trials=6) for _ in range(2)]
    toy.wait_for_starts(2)  # both are at work
    (toy.folder / "go").touch()
    texts = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], texts
    names = sorted(words[-1] for words in toy.starts())
    assert names == [f"--training_run_name=s/trial-{n:03d}" for n in range(6)]
    assert len({result["params"]["x"] for result in toy.results()}) == 6


@pytest.mark.parametrize("mode", MODES)
def test_killed_agent_and_trial_are_continued(toy, mode):
    toy.write(parameters={**SWEEP["parameters"], "wait": {"value": "go"}})
    agent = toy.start(*mode, trials=2)
    toy.wait_for_starts(1)
    child = toy.children(agent)[0]
    agent.kill()
    agent.wait()
    code, text = toy.run(*mode, trials=1)  # the trial lives and keeps its log locked
    assert code == 0 and len(toy.starts()) == 1 and "running elsewhere" in text
    os.kill(child, signal.SIGKILL)
    (toy.folder / "go").touch()
    code, text = toy.run(*mode, trials=2)
    assert code == 0 and len(toy.starts()) == 3 and len(toy.results()) == 2, text
    assert toy.starts()[0] == toy.starts()[1] != toy.starts()[2]


def test_trial_that_outlived_its_agent_is_not_run_again(toy):
    toy.write(parameters={**SWEEP["parameters"], "wait": {"value": "go"}})
    agent = toy.start("--no_optuna", trials=1)
    toy.wait_for_starts(1)
    agent.kill()
    (toy.folder / "go").touch()
    run.lock(toy.folder / "models/s/trials/000.log").close()  # the trial has ended
    (toy.folder / "models/s/trial-000/COMPLETE").touch()
    assert toy.run("--no_optuna", trials=1)[0] == 0
    assert len(toy.starts()) == 1 and toy.results()[0]["state"] == "complete"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_goes_to_the_trial_and_ends_the_agent(toy, number):
    toy.write(parameters={**SWEEP["parameters"], "wait": {"value": "go"}})
    agent = toy.start("--no_optuna", trials=2)
    toy.wait_for_starts(1)
    agent.send_signal(number)
    text, _ = agent.communicate(timeout=60)
    assert agent.returncode == 75 and not toy.results() and "the same command continues" in text
    assert (toy.folder / "saved").exists() == (number == signal.SIGTERM)
    (toy.folder / "go").touch()
    assert toy.run("--no_optuna", trials=2)[0] == 0
    assert len(toy.results()) == 2 and toy.starts()[0] == toy.starts()[1]


def test_trial_that_saved_ends_the_agent_and_is_continued(toy):
    toy.write(parameters={**SWEEP["parameters"], "once": {"value": 75}})
    for n in range(2):
        assert toy.run("--no_optuna", trials=2)[0] == 75
        assert len(toy.results()) == n
    assert toy.run("--no_optuna", trials=2)[0] == 0
    assert [words[-1][-3:] for words in toy.starts()] == ["000", "000", "001", "001"]


@pytest.mark.parametrize("mode", MODES)
def test_three_failures_in_a_row_end_the_agent(toy, mode):
    toy.write(parameters={**SWEEP["parameters"], "code": {"value": 3}})
    code, text = toy.run(*mode, trials=9)
    assert code == 1 and len(toy.results()) == 3
    assert "trial-000 failed: exit code 3" in text and "    the toy is broken" in text
    assert {(result["state"], result["value"], result["exit_code"]) for result in toy.results()} == {("failed", None, 3)}
    assert [row[-1] for row in csv.reader(open(toy.folder / "models/s/results.csv"))] == ["state"] + ["failed"] * 3


def test_search_goes_on_after_a_failure(toy):
    toy.write(method="grid", parameters={"x": {"values": ["no number", 0.1, "none", 0.2]}})
    code, text = toy.run(trials=4)
    assert code == 0 and [result["state"] for result in toy.results()] == ["failed", "complete"] * 2


def test_missing_metric(toy):
    toy.write(metric={"name": "eval/accuracy", "goal": "maximize"})
    code, text = toy.run("--no_optuna", trials=1)
    assert code == 1 and toy.results()[0]["state"] == "failed" and toy.results()[0]["exit_code"] == 0
    assert "trial-000/metrics.jsonl has no finite 'eval/accuracy'; it has eval/loss, eval/score" in text


def test_metrics_that_are_no_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "m": NaN}\n{"step": 2, "m": 3.0}\n{"step": 3, "m": 2}\n{"step": 4}\n')
    assert run.best_row(path, "m", "maximize") == (3.0, 2, None)
    assert run.best_row(path, "m", "minimize") == (2, 3, None)
    path.write_text('{"step": 1, "m": NaN, "other": 1}\n')
    assert run.best_row(path, "m", "minimize")[2] == f"{path} has no finite 'm'; it has m, other"
    assert run.best_row(tmp_path / "none", "m", "minimize")[2].endswith("it has nothing")


# ------------------------------------------------------------------------------------------------ mistakes


def test_changed_sweep_is_refused(toy):
    assert toy.run("--no_optuna", trials=1)[0] == 0
    toy.write(parameters={"x": {"min": 0.0, "max": 0.5}})
    code, text = toy.run("--no_optuna", trials=2)
    assert code == 2 and "was begun with another parameters: choose another folder" in text
    toy.write()
    code, text = toy.run("--no_optuna", "--set", "y=a", trials=2)
    assert code == 2 and "was begun with another --set" in text


def test_all_mistakes_are_said_together(toy):
    toy.write(program="gone.py", method="bayesian", metric={"goal": "max", "nam": "x"}, run_cap="ten", earlyterminate={}, command=["${args_jsn}"],
              parameters={"a": {"distribution": "log_unifrom", "min": 1, "max": 2}, "b": {"min": 2, "max": "1e0"}, "c": {"vlaues": [1]},
                          "d": 0.1, "e": {"distribution": "log_uniform_values", "min": 0, "max": 1}, "f": {"values": []},
                          "g": {"distribution": "q_uniform", "min": 0.1, "max": 0.2, "q": 1}, "h": {"value": [1]},
                          "training_run_name": {"value": "x"}, "mount_dir": {"values": ["a", "b"]},
                          "i": {"distribution": "int_uniform", "min": 0.5, "max": 2}, "j": {"distribution": "log_uniform", "min": 1, "max": 5000},
                          "k": {"distribution": "constant"}, "l": {"parameters": {"m": {"value": 1}}}})
    code, text = toy.run("--set", "oops")
    assert code == 2
    for wanted in ("--set oops: expected key=value", "unknown key 'earlyterminate': did you mean early_terminate?", "program 'gone.py': no such file",
                   "method 'bayesian': did you mean bayes?", "metric {'goal': 'max', 'nam': 'x'}: expected {name:", "run_cap 'ten'",
                   "command ['${args_jsn}']: expected a list with one of ${args}, ${args_no_hyphens}, ${args_no_boolean_flags}",
                   "a: distribution 'log_unifrom': did you mean log_uniform?", "b: min 2, max 1.0: uniform expects numbers, min < max",
                   "c: unknown key 'vlaues'", "d: min None, max None", "e: min 0, max 1: log_uniform_values expects", "f: []: expected",
                   "g: q 1: expected a positive step with a multiple between 0.1 and 0.2", "h: [[1]]: expected", "i: min 0.5, max 2: int_uniform",
                   "j: min 1, max 5000: log_uniform expects", "k: [[]]: expected", "l: unknown key 'parameters'", "training_run_name: run.py names",
                   "mount_dir: expected one value"):
        assert wanted in text, (wanted, text)
    assert all(line.startswith(("toy.yaml: ", "--set")) for line in text.splitlines())
    assert not (toy.folder / "models").exists()


def test_more_mistakes(toy):
    toy.write(command=["${program}", "${args}", "${args_json}"], metric={"name": "m", "goal": "maximise", "target": 1})
    code, text = toy.run()
    assert code == 2 and len(text.splitlines()) == 3
    assert "command: macro '${args_json}': did you mean ${args" in text and "metric: goal 'maximise': did you mean maximize?" in text
    assert "metric: unknown key 'target': expected one of name, goal" in text
    toy.write(method="grid")
    assert "x: a grid needs values, integers or steps" in toy.run()[1]
    toy.write(command=["python", "toy.py", "${args}"])
    assert "has no ${program} in command" in toy.run("--launcher", "deepspeed")[1]
    for text in ("[", "- a\n", ""):
        (toy.folder / "toy.yaml").write_text(text)
        code, text = toy.run()
        assert code == 2 and "toy.yaml" in text and "Traceback" not in text
    (toy.folder / "toy.yaml").unlink()
    assert "toy.yaml: cannot be read" in toy.run()[1]


def test_early_terminate_and_run_cap(toy):
    toy.write(early_terminate={"type": "hyperband"}, run_cap=2)
    code, text = toy.run("--no_optuna", trials=5)
    assert code == 0 and "WARNING early_terminate is not supported" in text and len(toy.results()) == 2


def test_earlier_sweep_file(toy):
    """As the earlier system had them, with the program and the launcher changed."""
    (toy.folder / "toy.yaml").write_text("""
program: toy.py
method: bayes
metric: {name: eval/score, goal: maximize}
parameters:
  x: {distribution: uniform, min: 1e-5, max: 1e-3}
  y: {values: [linear, cosine, constant]}
command:
  - ${env}
  - nice
  - --adjustment
  - 1
  - ${interpreter}
  - ${program}
  - ${args}
""")
    assert toy.run("--no_optuna", trials=2)[0] == 0
    assert all(1e-5 <= result["params"]["x"] <= 1e-3 for result in toy.results()) and len(toy.results()) == 2
