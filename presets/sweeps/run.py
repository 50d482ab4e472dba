"""run.py: the search of a W&B sweep file without the service; with optuna (optional) `method: bayes` is Bayesian. From the repository root:

    python presets/sweeps/run.py presets/sweeps/glue_sst2_sweep.yaml --trials 8
    python presets/sweeps/run.py presets/sweeps/glue_sst2_sweep.yaml --trials 8 --launcher "deepspeed --num_gpus 4" --set num_epochs=1

--trials counts the trials of all agents, past ones too: the same command continues what is unfinished, then does nothing. Several agents (the
same command, also on machines that share the folder) share the trials. <folder>, by default models/sweeps/<name>-<hash of file and --set>:

    trial-NNN/                 the run folder that the program makes (--training_run_name)
    trials/NNN.params.json     what the trial runs with
    trials/NNN.log             its output and hosts; locked by its agent and by all processes that write to it, until the last one ends
    trials/NNN.result.json     written last: params, value (the best), step, state, seconds of the last start, exit_code
    results.csv, sweep.png     table and picture; sweep.json: what is searched; journal.log: optuna's study, with the parameters as user_attrs

A trial without result whose log is free was interrupted: the next agent gives its command again. Delete a failed trial's result to try again.
When a machine dies the file server frees its locks (NFSv4: in about 90 s). Where it never does, and nothing of the trial runs any more, put a
copy in the log's place (cp, then mv): a new file has no lock. Lustre needs mount -o flock.

Exit codes: 0 done; 1 three trials failed in a row, or all; 2 something to mend; 75 stopped by a signal or by a trial's 75: the same command
continues. torchrun and accelerate turn a trial's 75 into 1, a failure unless the agent got a signal.
"""

import argparse
import csv
import difflib
import fcntl
import hashlib
import importlib.util
import itertools
import json
import math
import os
import pathlib
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import yaml

EXIT_SAVED = 75  # of a trial: saved, the same command continues
KEYS = ("program", "method", "metric", "parameters", "name", "description", "project", "entity", "early_terminate", "run_cap", "command")
DISTRIBUTIONS = {  # and their keys; all as in W&B's documentation
    "constant": ("value",), "categorical": ("values",),
    **dict.fromkeys(("uniform", "int_uniform", "log_uniform", "log_uniform_values"), ("min", "max")),
    **dict.fromkeys(("q_uniform", "q_log_uniform", "q_log_uniform_values"), ("min", "max", "q"))}
ARGS = {  # W&B's macros for all parameters, as functions of one
    "${args}": lambda key, value: [f"--{key}={value}"],
    "${args_no_hyphens}": lambda key, value: [f"{key}={value}"],
    "${args_no_boolean_flags}": lambda key, value: [f"--{key}"] * value if isinstance(value, bool) else [f"--{key}={value}"],
}
COMMAND = ["${env}", "${interpreter}", "${program}", "${args}"]  # W&B's, where the file has none


def plain(value):
    """PyYAML takes 1e-5 for a string (YAML 1.1 wants 1.0e-5). "1e-5" -> 1e-05, ["1e-5", "x"] -> [1e-05, "x"]."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value) else value


def expect(where, words, known, problems):
    """Every word that is not known is a problem; -> whether there is none."""
    wrong = [word for word in words if word not in list(known)]
    for word in wrong:
        near = difflib.get_close_matches(str(word), known, 1)
        problems.append(f"{where} {word!r}: " + (f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"))
    return not wrong


def read_parameter(where, spec, problems):
    """{"values": all of them, or None if continuous; "ordered", "log", "low", "high"}; None where a range is wrong."""
    spec = {key: plain(value) for key, value in spec.items()} if isinstance(spec, dict) else {}
    low, high, q = spec.get("min"), spec.get("max"), spec.get("q", 1)
    kind = spec.get("distribution") or ("constant" if "value" in spec else "categorical" if "values" in spec
                                        else "int_uniform" if type(low) is type(high) is int else "uniform")
    if not expect(f"{where}: distribution", [kind], DISTRIBUTIONS, problems):
        return None
    keys = DISTRIBUTIONS[kind]
    expect(f"{where}: unknown key", spec, ["distribution", *keys], problems)
    if "min" not in keys:
        values = spec.get("values") if kind == "categorical" else [spec.get("value", [])]
        if not isinstance(values, list) or not values or any(isinstance(value, (list, dict)) for value in values):
            problems.append(f"{where}: {values!r}: expected words or numbers, value: one, or values: a list of them")
        return {"values": values, "ordered": False, "log": False}
    numbers, bound = (int,) if kind == "int_uniform" else (int, float), 700 if kind.endswith("log_uniform") else math.inf
    if not all(type(x) in numbers and abs(x) < bound for x in (low, high)) or low >= high or kind.endswith("values") and low <= 0:
        problems.append(f"{where}: min {low!r}, max {high!r}: {kind} expects numbers, min < max (int_uniform: integers; log_uniform: exponents "
                        "of e; ..._values: above 0); or value: one, or values: a list")
        return None
    if kind.endswith("log_uniform"):
        low, high = math.exp(low), math.exp(high)
    values = range(low, high + 1) if kind == "int_uniform" else None
    if "q" in keys:  # rounded, as 0.3 / 0.1 is 2.9999999999999996; an integer q gives integers, as W&B's does
        ks = range(math.ceil(round(low / q, 9)), math.floor(round(high / q, 9)) + 1) if type(q) in (int, float) and q > 0 else ()
        values = [k * q if isinstance(q, int) else float(f"{k * q:.12g}") for k in ks]
        if not values:
            problems.append(f"{where}: q {q!r}: expected a positive step with a multiple between {low:g} and {high:g}")
    return {"values": values, "ordered": True, "log": "log" in kind, "low": low, "high": high}


def read_sweep(path, settings, problems):
    """The sweep file with --set put in: its keys, with defaults, "space" (the parameters, read) and "source" (what decides the search)."""
    try:
        source = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"{path}: cannot be read ({error})")
        return None
    if not isinstance(source, dict):
        problems.append(f"{path}: expected a mapping with the keys {', '.join(KEYS)}")
        return None
    sweep = {"name": pathlib.Path(path).stem, "run_cap": math.inf, "command": COMMAND, **source}
    metric, command, parameters = (sweep[key] if isinstance(sweep.get(key), kind) else kind() for key, kind in (
        ("metric", dict), ("command", list), ("parameters", dict)))
    metric, command = {"goal": "minimize", **metric}, [str(word) for word in command]
    found = [problem for good, problem in (
        (os.path.isfile(str(source.get("program"))), f"program {source.get('program')!r}: no such file under {os.getcwd()}, the repository root?"),
        (isinstance(metric.get("name"), str), f"metric {source.get('metric')!r}: expected {{name: eval/accuracy, goal: maximize}}"),
        (type(sweep["run_cap"]) is int or "run_cap" not in source, f"run_cap {sweep['run_cap']!r}: expected a number of trials"),
        (set(command) & set(ARGS), f"command {sweep['command']!r}: expected a list with one of {', '.join(ARGS)} for the parameters"),
        (parameters, f"parameters {source.get('parameters')!r}: expected {{learning_rate: {{min: 0.1, max: 0.5}}, ...}}"),
        ("training_run_name" not in {**parameters, **settings}, "training_run_name: run.py names the run folders, leave it out")) if not good]
    for where, words, known in (
            ("unknown key", source, KEYS), ("method", [source.get("method")], ("grid", "random", "bayes")),
            ("metric: unknown key", metric, ("name", "goal")), ("metric: goal", [metric["goal"]], ("minimize", "maximize")),
            ("command: macro", [word for word in command if "${" in word], [*COMMAND[:3], *ARGS])):
        expect(where, words, known, found)
    space = {**{key: read_parameter(key, spec, found) for key, spec in parameters.items() if key not in settings},
             **{key: {"values": [value], "ordered": False, "log": False} for key, value in settings.items()}}
    found += ["mount_dir: expected one value" for p in [space.get("mount_dir")] if p and len(p["values"] or "") != 1]
    if sweep.get("method") == "grid":
        found += [f"{key}: a grid needs values, integers or steps" for key, p in space.items() if p and p["values"] is None]
    problems += [f"{path}: {problem}" for problem in found]
    return {**sweep, "metric": metric, "command": command, "space": space,
            "source": json.loads(json.dumps({**source, "--set": settings}, default=str))}


def command_line(sweep, params, launcher):
    """The words of one trial's command; a launcher stands for all that is before ${program}."""
    words = [*shlex.split(launcher), *sweep["command"][sweep["command"].index("${program}"):]] if launcher else sweep["command"]
    fixed = {"${env}": "/usr/bin/env", "${interpreter}": sys.executable, "${program}": sweep["program"]}
    return [part for word in words for part in (
        [arg for item in params.items() for arg in ARGS[word](*item)] if word in ARGS else [fixed.get(word, word)])]


# ------------------------------------------------------------------------------------------------ drawing


def at(p, u):
    """The value at u in [0, 1] of a parameter's range. {min: 10, max: 1000, log_uniform_values}, 0.5 -> 100.0."""
    if p["values"] and not p["log"]:
        return p["values"][min(int(u * len(p["values"])), len(p["values"]) - 1)]
    x = p["low"] * (p["high"] / p["low"]) ** u if p["log"] else p["low"] + u * (p["high"] - p["low"])
    return min(p["values"], key=lambda value: abs(value - x)) if p["values"] else min(max(x, p["low"]), p["high"])


def draw(sweep, seed, n):
    """Trial n's parameters without a history: a pure function of (seed, n), so that agents and restarts agree; grid: the n-th point."""
    space = sweep["space"]
    if sweep["method"] == "grid":
        return dict(zip(space, next(itertools.islice(itertools.product(*(p["values"] for p in space.values())), n, None))))
    return {name: at(p, random.Random(f"{seed}/{n}/{name}").random()) for name, p in space.items()}


def open_study(optuna, sweep, folder, total, seed=0):
    """The study in journal.log, told every result so far. Call it with the folder locked."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal, states = str(folder / "journal.log"), optuna.trial.TrialState
    backend = optuna.storages.journal.JournalFileBackend(journal, optuna.storages.journal.JournalFileOpenLock(journal))
    # optuna's 10 random trials would be all of a short search
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, 2 + total // 4), constant_liar=True)
    study = optuna.create_study(storage=optuna.storages.JournalStorage(backend), study_name="sweep", sampler=sampler,
                                direction=sweep["metric"]["goal"], load_if_exists=True)
    running = {trial.number for trial in study.get_trials(deepcopy=False, states=[states.RUNNING])}
    for _, record, result in read_trials(folder):
        if result and record["optuna"] in running:
            study.tell(record["optuna"], result["value"], state=states.FAIL if result["state"] == "failed" else states.COMPLETE)
    return study


def ask(study, space):
    """(optuna's number, parameters) of a new trial."""
    trial = study.ask()
    params = {name: at(p, trial.suggest_float(name, 0, 1)) if p["ordered"] else p["values"][0] if len(p["values"]) == 1
              else trial.suggest_categorical(name, p["values"]) for name, p in space.items()}
    trial.set_user_attr("params", params)
    return trial.number, params


# ------------------------------------------------------------------------------------------------ trials


def write_whole(path, text):
    """Write aside, then rename: a reader never sees half a file."""
    aside = pathlib.Path(f"{path}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def lock(path, wait=True):
    """The file, opened and locked until it is closed here and in every child that writes to it; None if it is taken and we do not wait."""
    file = open(path, "a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    return file


def read_trials(folder):
    """[(n, {"params", "optuna"}, result or None)], by n."""
    found = sorted(int(path.name.split(".")[0]) for path in folder.glob("trials/*.params.json"))
    files = [[folder / "trials" / f"{n:03d}.{kind}.json" for kind in ("params", "result")] for n in found]
    return [(n, json.loads(params.read_text()), json.loads(result.read_text()) if result.exists() else None)
            for n, (params, result) in zip(found, files)]


def next_trial(sweep, folder, total, seed, optuna):
    """(n, params, its locked log) of an interrupted trial, else of a new one; None when all are done or run elsewhere. Folder locked."""
    trials = read_trials(folder)
    for n, record, result in trials:
        if result is None and (log := lock(folder / "trials" / f"{n:03d}.log", wait=False)):
            return n, record["params"], log
    if len(trials) >= total:
        return None
    n, number = trials[-1][0] + 1 if trials else 0, None
    if optuna:  # a seed of the trial's own: agents with the same --agent_seed must not draw the same
        number, params = ask(open_study(optuna, sweep, folder, total, random.Random(f"{seed}/{n}").getrandbits(32)), sweep["space"])
    else:
        params = draw(sweep, seed, n)
    write_whole(folder / "trials" / f"{n:03d}.params.json", json.dumps({"params": params, "optuna": number}, indent=2) + "\n")
    return n, params, lock(folder / "trials" / f"{n:03d}.log")


def best_row(path, name, goal):
    """(value, step, None) of the best row of a metrics.jsonl, or (None, None, why there is none)."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may leave half a line
    found = [row for row in rows if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])]
    if not found:
        names = sorted({key for row in rows for key in row} - {"step", "epoch", "split", "time"})
        return None, None, f"{path} has no finite {name!r}; it has {', '.join(names) or 'nothing'}"
    best = (max if goal == "maximize" else min)(found, key=lambda row: row[name])
    return best[name], best.get("step"), None


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) are passed on to the trial; `got` then ends the search."""

    def __init__(self):
        self.got = self.child = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.pass_on)

    def pass_on(self, number, frame):
        self.got = number
        if self.child:
            self.child.send_signal(number)

    def run(self, command, run_dir, log):
        """Exit code of the trial. Its output goes straight to the log, so that it outlives the agent."""
        if (run_dir / "COMPLETE").exists():  # it ended after its agent had died
            return 0
        print(f"# {time.strftime('%F %T')}, {os.uname().nodename}: {shlex.join(command)}", file=log, flush=True)
        # a session of its own: Ctrl-C arrives once, from here
        self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        if self.got:
            self.child.send_signal(self.got)
        return self.child.wait()


def report(sweep, folder):
    """Print the table, best first, and write it as results.csv, and sweep.png where matplotlib is installed. Folder locked."""
    varied = [name for name, p in sweep["space"].items() if p["values"] is None or len(p["values"]) > 1]
    none = {"value": None, "step": None, "state": "unfinished"}
    rows = [(f"trial-{n:03d}", (result or none)["value"], (result or none)["step"], *(record["params"][name] for name in varied),
             (result or none)["state"]) for n, record, result in read_trials(folder)]
    rows.sort(key=lambda row: math.inf if row[1] is None else -row[1] if sweep["metric"]["goal"] == "maximize" else row[1])
    done = [row for row in rows if row[1] is not None]
    rows.insert(0, ("trial", sweep["metric"]["name"], "step", *varied, "state"))
    with open(folder / "results.csv.tmp", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    os.replace(folder / "results.csv.tmp", folder / "results.csv")
    shown = [["" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown)]
    print(*("  ".join(map(str.ljust, row, widths)).rstrip() for row in shown), sep="\n", flush=True)
    if not done or not varied:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no sweep.png: package 'matplotlib' is not installed")
        return
    figure = Figure(figsize=(12, 3 * math.ceil(len(varied) / 3)), layout="constrained")
    for i, (name, p) in enumerate((name, sweep["space"][name]) for name in varied):
        axes = figure.add_subplot(math.ceil(len(varied) / 3), 3, i + 1, xlabel=name, ylabel=rows[0][1], xscale="log" if p["log"] else "linear")
        x = [row[3 + i] if p["ordered"] else p["values"].index(row[3 + i]) for row in done]
        if not p["ordered"]:
            axes.set_xticks(range(len(p["values"])), map(str, p["values"]))
        axes.plot(x, [row[1] for row in done], "o")
        axes.plot(x[0], done[0][1], "*", markersize=16)
    figure.suptitle(f"best: {done[0][0]}")
    figure.savefig(folder / "sweep.tmp.png")
    os.replace(folder / "sweep.tmp.png", folder / "sweep.png")


# ------------------------------------------------------------------------------------------------ main


def prepare(args):
    """(sweep, folder, number of trials); what is wrong is said all together, with exit code 2."""
    problems = [f"--set {word}: expected key=value" for word in args.set if not re.match("[^=]+=", word)]
    boolean = {"true": True, "false": False}  # for ${args_no_boolean_flags}; all else arrives as it was typed
    settings = {key: boolean.get(value.lower(), value) for key, _, value in (word.partition("=") for word in args.set)}
    sweep = read_sweep(args.sweep, settings, problems)
    if sweep and args.launcher and "${program}" not in sweep["command"]:
        problems.append(f"--launcher: {args.sweep} has no ${{program}} in command, so it is not known what the launcher replaces")
    if not problems:
        mount = sweep["space"].get("mount_dir", {"values": ["mount" if any(map(os.path.isdir, ("mount/models", "mount/data"))) else "."]})
        models = pathlib.Path(str(mount["values"][0]), "models").resolve()
        short = hashlib.sha256(json.dumps(sweep["source"], sort_keys=True).encode()).hexdigest()[:8]
        folder = pathlib.Path(args.folder or models / "sweeps" / re.sub(r"[^\w.-]", "_", f"{sweep['name']}-{short}")).resolve()
        if models not in folder.parents:
            problems.append(f"--folder {folder}: expected a folder under {models}, where the program makes its run folders")
        record = folder / "sweep.json"
        before = json.loads(record.read_text()) if record.exists() else sweep["source"]
        changed = [key for key in {**before, **sweep["source"]} if before.get(key) != sweep["source"].get(key)]
        if changed:
            problems.append(f"--folder {folder} was begun with another {', '.join(changed)}: choose another folder, or restore the sweep")
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        raise SystemExit(2)
    sweep["runs"] = folder.relative_to(models)
    size = math.prod(len(p["values"]) for p in sweep["space"].values()) if sweep["method"] == "grid" else math.inf
    return sweep, folder, min(args.trials, sweep["run_cap"], size)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("sweep", help="the sweep file, YAML")
    parser.add_argument("--trials", type=int, required=True, help="of the whole folder, over all agents and restarts [count], 0 = only the table")
    parser.add_argument("--folder", help="under models/ [path], default: models/sweeps/<name>-<hash of file and --set>")
    parser.add_argument("--agent_seed", type=int, default=0, help="of what is drawn [integer], default: 0")
    parser.add_argument("--launcher", help='goes before ${program} instead of what is there, "deepspeed --num_gpus 4"')
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="values that all trials have")
    parser.add_argument("--no_optuna", action="store_true", help="random search, though optuna is installed")
    args = parser.parse_args(argv)
    sweep, folder, total = prepare(args)
    optuna = None
    if sweep["method"] == "bayes":  # a grid and a random search need no history, and no package: see `draw`
        if not args.no_optuna and importlib.util.find_spec("optuna"):
            optuna = importlib.import_module("optuna")
        else:
            print("method bayes is plain random search here; `pip install optuna` gives Bayesian search")
    if "early_terminate" in sweep["source"]:
        print("WARNING early_terminate is not supported here: every trial runs to its end")
    if "report_to" not in sweep["source"]["--set"] and sweep["space"].get("report_to", {}).get("values") == ["wandb"]:
        sweep["space"]["report_to"]["values"] = ["none"]
        print("report_to wandb is replaced by none, as no service takes part; --set report_to=wandb keeps it")
    if "wandb_project" not in sweep["source"]["--set"] and sweep["space"].pop("wandb_project", None):  # seq2seq.py's flag
        print("wandb_project is left out, as no service takes part; --set wandb_project=NAME keeps it")
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    with lock(folder / "lock"):
        write_whole(folder / "sweep.json", json.dumps(sweep["source"], indent=2) + "\n")
    print(f"{total} trials in {folder}")
    signals, failed_in_row = Signals(), 0
    while True:
        with lock(folder / "lock"):
            report(sweep, folder)
            stop = signals.got or failed_in_row == 3
            trial = None if stop else next_trial(sweep, folder, total, args.agent_seed, optuna)
        if trial is None:
            break
        n, params, log = trial
        with log:
            command = command_line(sweep, {**params, "training_run_name": f"{sweep['runs']}/trial-{n:03d}"}, args.launcher)
            print(f"trial-{n:03d}: {shlex.join(command)} > {log.name}", flush=True)
            start, run_dir = time.time(), folder / f"trial-{n:03d}"
            code = signals.run(command, run_dir, log)
            if code == EXIT_SAVED or code and signals.got:
                print(f"trial-{n:03d} was stopped with exit code {code}; the same command continues")
                return EXIT_SAVED
            value, step, problem = (None, None, f"exit code {code}") if code else best_row(run_dir / "metrics.jsonl", **sweep["metric"])
            write_whole(folder / "trials" / f"{n:03d}.result.json", json.dumps({
                "params": params, "value": value, "step": step, "state": "failed" if problem else "complete",
                "seconds": round(time.time() - start, 1), "exit_code": code}, indent=2) + "\n")
        failed_in_row = failed_in_row + 1 if problem else 0
        if problem:
            lines = pathlib.Path(log.name).read_text(encoding="utf-8", errors="replace").splitlines()
            print(f"trial-{n:03d} failed: {problem}; {log.name} ends:", *(f"    {line}" for line in lines[-15:]), sep="\n")
    if optuna:
        with lock(folder / "lock"):
            open_study(optuna, sweep, folder, total)
    states = [result and result["state"] for _, _, result in read_trials(folder)]
    if None in states:
        print(f"trials without result, running elsewhere or to be continued: {states.count(None)}")
    return EXIT_SAVED if signals.got else int(failed_in_row == 3 or set(states) == {"failed"})


if __name__ == "__main__":
    sys.exit(main())
