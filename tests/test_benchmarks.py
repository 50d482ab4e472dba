"""benchmarks/: run.py writes the page from results; gpu.py's parts run, and fail loudly."""

import importlib
import json
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT

pytest.importorskip("matplotlib")
BENCHMARKS = ROOT / "benchmarks"
PAGE = "before\n<!-- written by benchmarks/run.py -->\nold\n<!-- until here -->\nafter\n"


def test_run_writes_the_page(monkeypatch, folder, capsys):
    """A part that fails has no row, an earlier result of it is gone, and the others go on."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("run")
    monkeypatch.setattr(bench.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which it sets
    for name, path in {"RESULTS": "", "PAGE": "page.md", "PICTURE": "img/page.png"}.items():
        monkeypatch.setattr(bench, name, folder / path)
    bench.PAGE.write_text(PAGE)
    bench.result_path("chat").write_text("{}")
    versions = {"torch": "2", "transformers": "5"}
    ratios = {"trained": {"hf": [2.0, 1.5, 2.5]}, "scored": {"hf": [30.0, 20.0, 40.0]}}

    def run_limited(command, minutes):
        if "chat" in command:
            return 1
        found = {**versions, "ratios": ratios, "peak_memory_gb": {"ours": 1.0, "hf": 2.0}}
        out = command[command.index("--out") + 1]
        pathlib.Path(out).write_text(json.dumps(found))
        return 0

    monkeypatch.setattr(bench.harness, "run_limited", run_limited)
    assert bench.main(["--only", "chat", "clf_t5", "--data", "page.md"]) == 1
    assert "FAILED chat: exit code 1" in capsys.readouterr().out
    page = bench.PAGE.read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert (
        "| clf.py, T5, trained / Trainer | 2.00 x (1.50 to 2.50) | 1.00 against 2.00 GB |" in page
    )
    assert "| clf.py, T5, scored / Trainer | 30 x (20 to 40) |" in page and "chat" not in page
    assert bench.PICTURE.stat().st_size > 1000


def test_a_process_that_takes_too_long_is_killed(monkeypatch):
    """With what it has started, which would go on and hold the GPU's memory."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    harness = importlib.import_module("harness")
    command = ["sh", "-c", "sh -c 'echo $$ > pid; exec sleep 600'; true"]
    assert harness.run_limited(command, 10 / 60) is None
    stat = pathlib.Path("/proc", pathlib.Path("pid").read_text().strip(), "stat")
    for _ in range(600):  # a minute
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("it is still there")


def gpu(root, *words):
    command = [sys.executable, root / "benchmarks/gpu.py", "--tiny", "--out", "gpu.json", *words]
    code = subprocess.run(command).returncode
    return code, json.loads(pathlib.Path("gpu.json").read_text())["parts"]


@pytest.mark.slow
def test_gpu_tiny():
    code, parts = gpu(ROOT)
    assert code == 0 and len(parts) == 14
    assert len(parts["stages"]) > 20 and parts["resume"]["same_bits"]


@pytest.mark.slow
def test_gpu_fails_loudly():
    for name in ("benchmarks", "models/tiny-t5", "models/tiny-llama"):
        shutil.copytree(ROOT / name, f"copy/{name}")
    for name in ("common.py", "seq2seq.py"):
        shutil.copy(ROOT / name, "copy")
    shutil.copytree(ROOT / "ds_configs", "copy/ds_configs")
    pathlib.Path("copy/clf.py").write_text("raise RuntimeError('broken')")
    code, parts = gpu(pathlib.Path("copy"), "--only", "clf", "t5_large")
    assert code == 1 and "RuntimeError: broken" in parts["clf"]["failed"]
    assert parts["t5_large"]["loss"] > 0
