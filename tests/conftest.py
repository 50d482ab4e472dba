"""Fixtures: tiny models and data made on the spot, scripts run in-process or as real processes. No network."""

import json
import logging
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for name in LAUNCHER:
    os.environ.pop(name, None)
os.environ["RAWTUNE_FAIL_WAIT"] = "0.5"  # seconds that other ranks let rank 0 speak first


def ragged_records(n, seed=0, longest=14):
    """Records whose prompts and completions differ widely in length: a mean of means is wrong on them."""
    rng = random.Random(seed)
    words = "the cat dog reads water book answer word number one two three yes no long small".split()
    return [{"prompt": " ".join(rng.choices(words, k=rng.randint(1, 12))) + f" {i}",
             "completion": " ".join(rng.choices(words, k=rng.choice([1, 1, 1, 2, 5, longest]))), "row": i} for i in range(n)]


def write_model(folder, **changes):
    """models/<folder>: the committed tiny tokenizer with a smaller configuration; no weights."""
    folder.mkdir(parents=True)
    for name in ("spiece.model", "tokenizer_config.json"):
        shutil.copy(ROOT / "models" / "tiny-t5" / name, folder)
    config = json.loads((ROOT / "models" / "tiny-t5" / "config.json").read_text())
    config.update(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, **changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def mount(tmp_path):
    """A mount folder with models/tiny (dropout 0), models/dropout, data/ragged.json (43 train, 11 eval, 5 test)."""
    write_model(tmp_path / "models" / "tiny")
    write_model(tmp_path / "models" / "dropout", dropout_rate=0.1)
    (tmp_path / "data").mkdir()
    records = ragged_records(59)
    (tmp_path / "data" / "ragged.json").write_text(json.dumps({"train": records[:43], "eval": records[43:54], "test": records[54:]}))
    return tmp_path


def flags(mount, run="run", **changes):
    """A short command line on the fixtures above; flag=None leaves a flag out, flag=True makes it a switch."""
    options = {"mount_dir": mount, "model_init_name": "tiny", "data": "ragged", "training_run_name": run, "max_steps": 4,
               "train_batch_size": 8, "max_new_tokens": 4, "learning_rate": 0.01, "warmup_steps": 1, "logging_steps": 1,
               "ds_config": "zero0", "precision": "fp32", "eval_steps": 1000, "save_steps": 0, **changes}
    words = []
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name}"] + ([] if value is True else [str(v) for v in value] if isinstance(value, list) else [str(value)])
    return words


@pytest.fixture(autouse=True)
def global_state():
    """Signal handlers and environment are as before after every test; a run changes both."""
    handlers, before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}, dict(os.environ)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def messages(monkeypatch):
    """The log lines of one test, as a list of strings."""
    import common
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(common.log, "handlers", [handler])
    monkeypatch.setattr(common.log, "level", logging.INFO)
    return lines


@pytest.fixture
def run_main(monkeypatch):
    """run_main(words) -> exit code of seq2seq.main in this process."""
    import seq2seq

    def run(words):
        monkeypatch.setattr(sys, "argv", ["seq2seq.py", *words])
        try:
            return seq2seq.main(seq2seq.parse_args(words))
        except SystemExit as stop:
            return stop.code
    return run


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(words, n_procs=1, cwd=None, env=None):
    """Start `python words` as n_procs ranks, each in a process group of its own; returns the processes."""
    port, processes = free_port(), []
    for rank in range(n_procs):
        outside = {k: v for k, v in os.environ.items() if k not in LAUNCHER}  # runs in this process have set them
        own = {**outside, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", **(env or {})}
        if n_procs > 1:
            own.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n_procs), LOCAL_WORLD_SIZE=str(n_procs),
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        output = tempfile.TemporaryFile("w+")  # not a pipe: a full one would stop its rank, and with it all others
        processes.append(subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd, env=own, stdout=output,
                                          stderr=subprocess.STDOUT, start_new_session=True))
        processes[-1].output = output
    return processes


def finish(processes, timeout=120):
    """Wait for all; -> (list of exit codes, joined output). A time-out kills and fails with the output so far."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and any(p.poll() is None for p in processes):
        time.sleep(0.05)
    timed_out = any(p.poll() is None for p in processes)
    kill(processes)
    outputs = []
    for p in processes:
        p.output.seek(0)
        outputs.append(p.output.read())
        p.output.close()
    if timed_out:
        pytest.fail(f"no end after {timeout} s:\n" + "\n".join(o[-3000:] for o in outputs))
    return [p.returncode for p in processes], "\n".join(outputs)


def kill(processes):
    """kill -9 the process groups of those that still run."""
    for p in processes:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)
        p.wait()


def run_jobs(tmp_path, jobs, n_procs, timeout=300):
    """Run several command lines one after the other in one launch of n_procs ranks (imports cost 8 s a process)."""
    path = tmp_path / f"jobs-{free_port()}.json"
    path.write_text(json.dumps([[str(word) for word in job] for job in jobs]))
    codes, output = finish(start([ROOT / "tests" / "worker.py", path], n_procs), timeout)
    assert codes == [0] * n_procs, output[-6000:]
    return output


def rows(run_dir, split="train"):
    return [row for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if row["split"] == split]


def weights(folder):
    """{name: float64 array} of a Hugging Face folder."""
    import safetensors.torch
    tensors = {}
    for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
        tensors.update(safetensors.torch.load_file(file))
    return {name: tensor.double() for name, tensor in tensors.items()}


def distance(a, b):
    """Relative distance of two weight dictionaries in norm."""
    assert a.keys() == b.keys()
    return (sum(float(((a[k] - b[k]) ** 2).sum()) for k in a) / sum(float((a[k] ** 2).sum()) for k in a)) ** 0.5
