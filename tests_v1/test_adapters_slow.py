"""Adapters and quantised bases on two ranks, at every ZeRO stage, killed and moved to another number of ranks. pytest -m slow."""

import json
import time

import pytest
from conftest import ROOT, assert_same_run, distance, finish, flags, kill, ragged_records, rows, run_jobs, start, weights, write_model

import common_v1 as common

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]
KINDS = {"lora": {"lora_rank": 2}, "nf4": {"lora_rank": 2, "quantize": "nf4"}, "int8": {"lora_rank": 2, "quantize": "int8", "lora_targets": "all-linear"},
         "bottleneck": {"train_adapter": True, "reduction_factor": 8, "adapter_dropout": 0}}


def run_flags(mount, run, **changes):
    """Six steps, the last of which is partial. The learning rate is small because AdamW turns rounding in gradients near 0 into
    whole steps."""
    return flags(mount, run, **{"max_steps": 6, "learning_rate": 0.0001, "train_batch_size": 4, "gradient_accumulation_steps": 2, **changes})


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A mount on which two ranks have run every kind at every stage."""
    mount = tmp_path_factory.mktemp("grid")
    write_model(mount / "models" / "tiny")
    (mount / "data").mkdir()
    records = ragged_records(59)
    (mount / "data" / "ragged.json").write_text(json.dumps({"train": records[:43], "eval": records[43:54], "test": records[54:]}))
    run_jobs(mount, [run_flags(mount, f"{kind}{stage}", ds_config=f"zero{stage}", **options) for kind, options in KINDS.items()
                     for stage in range(4)] + [run_flags(mount, "moved", max_steps=3, ds_config="zero2", lr_scheduler_type="constant", **KINDS["nf4"])], 2)
    return mount


@pytest.fixture
def reference(grid, run_main):
    """reference(kind) -> folder of the run on one rank at stage 0."""
    def reference(kind):
        if not (grid / "models" / f"{kind}-alone" / common.COMPLETE).exists():
            assert run_main(run_flags(grid, f"{kind}-alone", **KINDS[kind])) == 0
        return grid / "models" / f"{kind}-alone"
    return reference


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_what_one_rank_trains(grid, reference, kind, stage):
    """J4. The data are ragged, so a mean of means would be seen; so would a base that differs between ranks."""
    alone, together = reference(kind), grid / "models" / f"{kind}{stage}"
    for a, b in zip(rows(alone), rows(together), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    assert distance(weights(alone), weights(together)) < 1e-6
    for split in ("eval", "test"):
        last, other = rows(alone, split)[-1], rows(together, split)[-1]
        assert last[f"{split}/loss"] == pytest.approx(other[f"{split}/loss"], rel=1e-6)
    text = (together / "log.txt").read_text()
    assert ("bytes per parameter" in text) == ("quantize" in KINDS[kind])


def test_kinds_differ(grid, reference):
    """Or the comparisons above would compare nothing."""
    losses = {kind: rows(reference(kind))[-1]["loss"] for kind in KINDS}
    assert len(set(losses.values())) == len(KINDS) and rows(reference("lora"))[0]["loss"] != losses["lora"]


def test_a_lora_run_moves_from_two_ranks_to_one(grid, run_main):
    options = dict(ds_config="zero2", lr_scheduler_type="constant", **KINDS["nf4"])
    assert run_main(run_flags(grid, "moved", max_steps=6, resume=True, **options)) == 0
    assert run_main(run_flags(grid, "unmoved", max_steps=6, **options)) == 0
    assert distance(weights(grid / "models" / "moved"), weights(grid / "models" / "unmoved")) < 1e-6
    assert [row["step"] for row in rows(grid / "models" / "moved")] == list(range(1, 7))


def test_a_killed_lora_run_goes_on_as_if_nothing_had_been(mount, tmp_path):
    """kill -9 on two ranks at ZeRO stage 3 with a quantised base and dropout."""
    options = dict(model_init_name="dropout", max_steps=12, save_steps=2, ds_config="zero3", lora_dropout=0.1, **KINDS["nf4"])
    run_jobs(tmp_path, [run_flags(mount, "straight", **options)], 2)
    words, run = [ROOT / "seq2seq.py", *run_flags(mount, "killed", **options)], mount / "models" / "killed"
    processes, end = start(words, 2), time.monotonic() + 120
    while not (run / "checkpoint-4" / common.COMPLETE).exists() and time.monotonic() < end:
        time.sleep(0.01)
    kill(processes)
    assert (run / "checkpoint-4").exists() and not (run / common.COMPLETE).exists()
    codes, output = finish(start(words, 2))
    assert codes == [0, 0] and "continuing" in output, output[-3000:]
    assert_same_run(mount / "models" / "straight", run)
