"""Search with a W&B sweep file, without the service. Needs the packages optuna and pyyaml.

    python presets/sweeps/run.py presets/sweeps/glue_sst2_sweep.yaml --trials 8
    python presets/sweeps/run.py presets/sweeps/glue_sst2_sweep.yaml --trials 8 --set num_epochs=1

--trials counts the trials of all agents, past ones too: the same command goes on with what is
unfinished, then does nothing. Agents (the same command, also on machines that share the folder)
share the trials. In models/sweeps/<name>:

    trial-000/     the run folder that the program makes
    trial-000.log  its output; locked until the last process that writes to it has ended
    journal.log    optuna's study: what is searched, and all results

A trial without a result whose log is free was interrupted: the next agent gives its command again,
and the trainer goes on. The trial of a killed agent runs on; Ctrl-C reaches it, and it saves.
Exit codes: 0 done; 1 three trials failed one after the other; 2 something to mend; 75 stopped.
"""

import argparse
import fcntl
import itertools
import json
import math
import os
import pathlib
import shlex
import subprocess
import sys

EXIT_SAVED = 75  # of a trial or an agent: the same command goes on
COMMAND = ["${env}", "${interpreter}", "${program}", "${args}"]  # W&B's, where the file has none


def fail(problem):
    print(f"ERROR {problem}", file=sys.stderr)
    raise SystemExit(2)


try:
    import optuna
    import yaml
    from optuna.trial import TrialState
except ImportError as error:
    fail(f"the package {error.name} is missing: pip install optuna pyyaml")

# ------------------------------------------------------------------------------------ sweep files


def suggest(trial, name, spec):
    """The value of a parameter in a trial of optuna."""
    if "value" in spec:
        return spec["value"]
    if "values" in spec:
        return trial.suggest_categorical(name, spec["values"])
    low, high = spec["min"], spec["max"]
    is_int = isinstance(low, int) and isinstance(high, int)
    kind = spec.get("distribution", "int_uniform" if is_int else "uniform")
    if kind == "int_uniform":
        return trial.suggest_int(name, low, high)
    if kind not in ("uniform", "log_uniform_values"):
        raise ValueError(f"{name}: {kind} is not supported; list values")
    # PyYAML takes 1e-5 for a text
    return trial.suggest_float(name, float(low), float(high), log=kind != "uniform")


def choose(trial, sweep):
    """{name: value} of a trial of optuna."""
    if "points" in sweep:
        return sweep["points"][trial.number]
    return {name: suggest(trial, name, spec) for name, spec in sweep["parameters"].items()}


def read_sweep(args):
    """The sweep file, with --set in it and "points" of a grid: [parameters]; its folder."""
    sweep = {"name": args.sweep.stem, "command": COMMAND, "run_cap": math.inf}
    sweep.update(yaml.safe_load(args.sweep.read_text("utf-8")))
    sweep["metric"] = {"goal": "minimize", **sweep["metric"]}
    parameters = sweep["parameters"]
    parameters.pop("wandb_project", None)  # no service takes part, unless --set says so
    for setting in args.set:
        name, _, value = setting.partition("=")
        parameters[name] = {"value": yaml.safe_load(value)}
    if sweep["method"] == "grid":
        values = [spec.get("values") or [spec["value"]] for spec in parameters.values()]
        sweep["points"] = [dict(zip(parameters, point)) for point in itertools.product(*values)]
        sweep["run_cap"] = min(sweep["run_cap"], len(sweep["points"]))
    # what would fail in a trial fails here
    trial = optuna.create_study(direction=sweep["metric"]["goal"]).ask()
    command_line(sweep, choose(trial, sweep))
    if sweep["method"] not in ("grid", "random", "bayes") or "name" not in sweep["metric"]:
        raise ValueError("expected method grid, random or bayes, and a metric with its name")
    mount = "mount" if os.path.isdir("mount") else "."
    if "mount_dir" in parameters:
        mount = parameters["mount_dir"].get("value")
    if not isinstance(mount, str):
        raise ValueError("mount_dir: expected {value: FOLDER}")
    if not os.path.isfile(sweep["program"]):
        raise ValueError(f"no {sweep['program']} here: start in the repository root")
    return sweep, pathlib.Path(mount, "models", "sweeps", sweep["name"])


def command_line(sweep, params):
    """The words of a trial's command: a flag that is true has no value."""
    flags = []
    for name, value in params.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not False:
            flags.append(f"--{name}={value}")
    macros = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [sys.executable],
        "${program}": [sweep["program"]],
        "${args}": flags,
        "${args_no_boolean_flags}": flags,
    }
    command = []
    for word in map(str, sweep["command"]):
        command += macros[word] if word.startswith("${") else [word]
    return command


# ----------------------------------------------------------------------------------------- trials


def lock(path, flags=0):
    """The open file, locked until it is closed here and in the processes that have inherited it;
    None if another one has it and flags say not to wait."""
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        return file
    except BlockingIOError:
        return None


def open_study(folder, sweep):
    """optuna's study; call it with the folder locked."""
    journal = folder / "journal.log"
    journal.with_name("journal.log.lock").unlink(missing_ok=True)  # optuna's, of a killed agent
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="sweep",
        direction=sweep["metric"]["goal"],
        load_if_exists=True,
    )
    if study.user_attrs.get("sweep", sweep) != sweep:
        fail(f"{folder} has another search or --set: rename one")
    study.set_user_attr("sweep", sweep)
    seed = len(study.trials)
    study.sampler = optuna.samplers.RandomSampler(seed)
    if sweep["method"] == "bayes":
        # running trials count too, so that agents do not search at the same place; optuna's 10
        # random trials first would be all of a short search
        study.sampler = optuna.samplers.TPESampler(
            seed=seed, constant_liar=True, n_startup_trials=4
        )
    return study


def next_trial(folder, sweep, n_trials):
    """(number, parameters, its locked log) of an interrupted trial, else of a new one; None when
    all are done or run elsewhere. Call it with the folder locked."""
    study = open_study(folder, sweep)
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        log = lock(folder / f"trial-{trial.number:03d}.log", fcntl.LOCK_NB)
        if log and "params" in trial.user_attrs:
            return trial.number, trial.user_attrs["params"], log
        if log:  # its agent was killed before it had all parameters
            study.tell(trial.number, state=TrialState.FAIL)
    if len(study.trials) >= min(n_trials, sweep["run_cap"]):
        return None
    trial = study.ask()
    params = choose(trial, sweep)
    trial.set_user_attr("params", params)
    return trial.number, params, lock(folder / f"trial-{trial.number:03d}.log")


def best_value(path, name, goal):
    """The best finite value of a metric in a metrics.jsonl, or None."""
    lines = path.read_text().splitlines() if path.exists() else []
    values = [json.loads(line).get(name, math.nan) for line in lines]
    best = max if goal == "maximize" else min
    return best(filter(math.isfinite, values), default=None)


def report(study):
    """Print the trials, the best last."""
    trials = study.get_trials(states=[TrialState.COMPLETE])
    trials.sort(key=lambda trial: trial.value, reverse=study.direction.name == "MINIMIZE")
    for trial in trials:
        print(f"trial-{trial.number:03d}  {trial.value:.5g}  {trial.user_attrs['params']}")
    print(f"{len(study.trials) - len(trials)} trials failed, or run elsewhere")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("sweep", type=pathlib.Path)
    parser.add_argument("--trials", type=int, required=True)
    parser.add_argument("--set", action="append", default=[], help="NAME=VALUE in all trials")
    args = parser.parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sweep, folder = read_sweep(args)
    except Exception as error:
        fail(f"{args.sweep}: {type(error).__name__}: {error}")
    if "early_terminate" in sweep:
        print("WARNING no early_terminate here: every trial runs to its end")
    folder.mkdir(parents=True, exist_ok=True)
    n_failed = 0
    while n_failed < 3:
        with lock(folder / "lock"):
            found = next_trial(folder, sweep, args.trials)
        if not found:
            break
        trial, params, log = found
        name = f"trial-{trial:03d}"
        flags = {**params, "training_run_name": f"sweeps/{sweep['name']}/{name}"}
        command = command_line(sweep, flags)
        print(f"{shlex.join(command)} > {log.name}", flush=True)
        # it writes to its log itself, and so outlives a killed agent
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            code = child.wait()
        except KeyboardInterrupt:  # which the trial has got too
            child.wait()
            code = EXIT_SAVED
        if code == EXIT_SAVED:
            print("stopped: the same command goes on")
            return code
        value = best_value(folder / name / "metrics.jsonl", **sweep["metric"])
        state = TrialState.COMPLETE
        n_failed += 1
        if code or value is None:
            value, state = None, TrialState.FAIL
            print(f"exit code {code}, or no finite metric: see {log.name}")
        else:
            n_failed = 0
        with lock(folder / "lock"):
            open_study(folder, sweep).tell(trial, value, state=state)
        log.close()  # not before: another agent would take the trial up
    with lock(folder / "lock"):
        report(open_study(folder, sweep))
    return int(n_failed == 3)


if __name__ == "__main__":
    sys.exit(main())
