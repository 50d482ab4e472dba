"""Nothing is lost: kill, resume, other ranks, half-written checkpoints, full disks. Dropout on, unless said otherwise."""

import json
import os
import random
import shutil
import signal
import time

import pytest
from conftest import (ROOT, assert_same_run, distance, finish, flags, kill, ragged_records, rows, run_again, run_and_kill, run_jobs, start,
                      stop_at, weights, write_model)

import common_v1 as common
import seq2seq


def dropout_flags(mount, run, stage, **changes):
    return flags(mount, run, **{"model_init_name": "dropout", "ds_config": f"zero{stage}", "max_steps": 12, "save_steps": 2,
                                "gradient_accumulation_steps": 2, "train_batch_size": 4, **changes})


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2)), 3])
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(mount, run_main, monkeypatch, stage):
    assert run_main(dropout_flags(mount, "straight", stage)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert run_main(dropout_flags(mount, "stopped", stage)) == common.EXIT_SAVED
    assert [row["step"] for row in rows(mount / "models" / "stopped")] == list(range(1, 6))
    assert run_main(dropout_flags(mount, "stopped", stage)) == 0
    assert_same_run(mount / "models" / "straight", mount / "models" / "stopped")


def test_another_dropout_seed_would_be_seen(mount, run_main, monkeypatch):
    """Negative control: a resumed run whose dropout draws differ is not equal."""
    assert run_main(dropout_flags(mount, "straight", 0)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert run_main(dropout_flags(mount, "stopped", 0)) == common.EXIT_SAVED
    derive = common.derive_seed
    monkeypatch.setattr(common, "derive_seed", lambda *keys: derive(*keys, "other") if "dropout" in keys else derive(*keys))
    assert run_main(dropout_flags(mount, "stopped", 0)) == 0
    assert distance(weights(mount / "models" / "straight"), weights(mount / "models" / "stopped")) > 1e-6


@pytest.mark.parametrize("stop", [6, pytest.param(12, marks=pytest.mark.slow)])
def test_stopping_at_an_epoch_boundary_or_at_the_last_step_loses_nothing(mount, run_main, monkeypatch, stop):
    """R2: 43 examples in batches of 8 make 6 steps an epoch."""
    assert run_main(dropout_flags(mount, "straight", 0)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        assert run_main(dropout_flags(mount, "stopped", 0)) == common.EXIT_SAVED
    assert run_main(dropout_flags(mount, "stopped", 0)) == 0
    assert_same_run(mount / "models" / "straight", mount / "models" / "stopped")


def test_ranks_have_dropout_streams_of_their_own_before_and_after_resume():
    """R4: the stream is derived from (seed, step, rank), so there is nothing to mix up between ranks."""
    seeds = [common.derive_seed(0, "dropout", step, rank) for step in range(50) for rank in range(8)]
    assert len(set(seeds)) == 400


def test_the_same_step_gets_the_same_examples_whatever_the_batch_split(mount):
    """The examples of step k depend on seed, k and the effective batch only."""
    def ids(**changes):
        args = seq2seq.parse_args(flags(mount, **changes))
        tokenizer = common.open_model_folder(args, [])[2]
        config = common.open_model_folder(args, [])[1]
        data = seq2seq.TrainingData(args, seq2seq.load_data(args, tokenizer, []), config, True, 64)
        return [data.step_ids(k).tolist() for k in range(14)]
    a, b = ids(train_batch_size=8), ids(train_batch_size=2, gradient_accumulation_steps=4)
    assert a == b and a[:6] != a[6:12] and a != ids(train_batch_size=8, seed=1)
    assert sorted(i for batch in a[:6] for i in batch) == list(range(43))


def test_an_unfinished_checkpoint_is_named_and_the_one_before_it_used(mount, run_main, monkeypatch, capsys):
    """R3: killed while saving, before and after the rename of DeepSpeed's files."""
    assert run_main(dropout_flags(mount, "straight", 0)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        assert run_main(dropout_flags(mount, "broken", 0)) == common.EXIT_SAVED
    run = mount / "models" / "broken"
    shutil.copytree(run / "checkpoint-6", run / "checkpoint-8.tmp")
    (run / "checkpoint-6" / "COMPLETE").unlink()
    (run / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    capsys.readouterr()
    assert run_main(dropout_flags(mount, "broken", 0)) == 0
    out = capsys.readouterr()
    assert "checkpoint-6 is unfinished" in out.err and "continuing" in out.out and "step 4" in out.out
    assert not (run / "checkpoint-8.tmp").exists() and (run / "checkpoint-6.old-1").exists()
    assert_same_run(mount / "models" / "straight", run)


def test_metric_rows_past_the_checkpoint_move_aside(mount, run_main, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert run_main(dropout_flags(mount, "run", 0, save_steps=2)) == common.EXIT_SAVED
    run = mount / "models" / "run"
    shutil.rmtree(run / "checkpoint-5")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "spl')  # the kill came in the middle of a line
    assert run_main(dropout_flags(mount, "run", 0)) == 0
    assert [row["step"] for row in rows(run)] == list(range(1, 13))
    assert [json.loads(line)["step"] for line in (run / "metrics.replaced.jsonl").read_text().splitlines()] == [5]


def test_a_finished_run_is_refused_continued_or_moved_aside(mount, run_main, capsys):
    assert run_main(dropout_flags(mount, "run", 0, max_steps=4, lr_scheduler_type="constant")) == 0
    again = dropout_flags(mount, "run", 0, max_steps=4, lr_scheduler_type="constant")
    assert run_main(again) == 2 and "finished run" in capsys.readouterr().err
    longer = dropout_flags(mount, "run", 0, max_steps=6, lr_scheduler_type="constant")
    assert run_main(longer) == 2
    assert run_main([*longer, "--resume"]) == 0 and rows(mount / "models" / "run")[-1]["step"] == 6
    assert run_main(dropout_flags(mount, "straight", 0, max_steps=6, lr_scheduler_type="constant")) == 0
    assert distance(weights(mount / "models" / "straight"), weights(mount / "models" / "run")) == 0
    before = (mount / "models" / "run" / "model.safetensors").read_bytes()
    assert run_main([*again, "--overwrite"]) == 0
    assert (mount / "models" / "run.old-1" / "model.safetensors").read_bytes() == before
    assert rows(mount / "models" / "run")[-1]["step"] == 4


def test_sigterm_and_max_hours_save_and_leave_with_75(mount, run_main, monkeypatch):
    real = seq2seq.TrainingData.micro_batches
    def signalled(self, step):
        if step == 4:  # packed ahead, while step 3 is computed
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, step)
    with monkeypatch.context() as patch:
        patch.setattr(seq2seq.TrainingData, "micro_batches", signalled)
        assert run_main(dropout_flags(mount, "signal", 0, max_steps=500, save_steps=0)) == common.EXIT_SAVED
    assert common.latest_checkpoint(mount / "models" / "signal") is not None
    assert run_main(dropout_flags(mount, "hours", 0, max_steps=5000, max_hours=0.0003, save_steps=0, logging_steps=1000)) == common.EXIT_SAVED
    assert common.latest_checkpoint(mount / "models" / "hours") is not None


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [40, 260])
def test_a_full_disk_is_said_and_earlier_checkpoints_stay_whole(mount, kilobytes):
    """A file-size limit stands in for the full disk: it strikes at the Hugging Face file (40 kB) or at DeepSpeed's (260 kB)."""
    words = [str(w) for w in dropout_flags(mount, "full", 0, max_steps=4)]
    program = ("import resource, signal, sys; sys.path.insert(0, sys.argv[1]); import seq2seq, common_v1 as common\n"
               "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               "save, saves = common.save_checkpoint, []\n"
               "def limited(*a, **k):\n"
               "    saves.append(1)\n"
               f"    if len(saves) == 2: resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes * 1000}, {kilobytes * 1000}))\n"
               "    return save(*a, **k)\n"
               "common.save_checkpoint = limited\n"
               "sys.exit(seq2seq.main(seq2seq.parse_args(sys.argv[2:])))\n")
    codes, output = finish(start(["-c", program, ROOT, *words]), 90)
    assert codes == [2] and "step 4: the checkpoint could not be written" in output and "Traceback" not in output, output[-3000:]
    assert common.latest_checkpoint(mount / "models" / "full").name == "checkpoint-2"
    codes, output = finish(start([ROOT / "seq2seq.py", *words]), 90)
    assert codes == [0] and "from step 2" in output


@pytest.fixture(scope="module")
def long_mount(tmp_path_factory):
    mount = tmp_path_factory.mktemp("kill")
    write_model(mount / "models" / "dropout", dropout_rate=0.1)
    write_model(mount / "models" / "tiny")
    (mount / "data").mkdir()
    records = ragged_records(59)
    (mount / "data" / "ragged.json").write_text(json.dumps({"train": records[:43], "eval": records[43:54], "test": records[54:]}))
    return mount


@pytest.mark.slow
@pytest.mark.parametrize("n_procs", [1, 2])
def test_kill_9_then_the_same_command_equals_uninterrupted_to_the_bit(long_mount, n_procs):
    """R1: every stage, dropout and shuffling on."""
    run_jobs(long_mount, [dropout_flags(long_mount, f"straight{n_procs}{stage}", stage) for stage in range(4)], n_procs)
    for stage in range(4):
        run = long_mount / "models" / f"killed{n_procs}{stage}"
        words = dropout_flags(long_mount, run.name, stage)
        assert run_and_kill([ROOT / "seq2seq.py", *words], run, n_procs, 5)
        run_again([ROOT / "seq2seq.py", *words], n_procs)
        assert_same_run(long_mount / "models" / f"straight{n_procs}{stage}", run)


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments_it_still_ends_the_same(long_mount):
    """Kills fall into start-up, saving, evaluation and the end; progress comes from saving at every step."""
    begin = time.monotonic()
    codes, output = finish(start([ROOT / "seq2seq.py", *dropout_flags(long_mount, "calm", 0, save_steps=1, eval_steps=3)]))
    whole = time.monotonic() - begin  # start-up is 0.6 of it; a busy machine stretches both
    assert codes == [0], output[-3000:]
    run, rng = long_mount / "models" / "hunted", random.Random(0)
    words = dropout_flags(long_mount, "hunted", 0, save_steps=1, eval_steps=3)
    for _ in range(8):
        processes = start([ROOT / "seq2seq.py", *words])
        end = time.monotonic() + rng.uniform(0.6, 1.05) * whole
        while time.monotonic() < end and processes[0].poll() is None:
            time.sleep(0.01)
        kill(processes)
        if (run / "COMPLETE").exists():
            break
    if not (run / "COMPLETE").exists():
        codes, output = finish(start([ROOT / "seq2seq.py", *words]))
        assert codes == [0], output[-3000:]
    assert_same_run(long_mount / "models" / "calm", run)


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_another_number_of_ranks_continues_with_weights_moments_and_step(long_mount, before, after):
    """R8, dropout 0: equal to a run that had the other number of ranks from the start, weight decay and all."""
    options = dict(lr_scheduler_type="constant", weight_decay=0.3)
    run_jobs(long_mount, [flags(long_mount, f"moved{before}{s}", ds_config=f"zero{s}", max_steps=6, **options) for s in range(4)], before)
    run_jobs(long_mount, [flags(long_mount, f"stayed{after}{s}", ds_config=f"zero{s}", max_steps=12, **options) for s in range(4)], after)
    for stage in range(4):
        words = flags(long_mount, f"moved{before}{stage}", ds_config=f"zero{stage}", max_steps=12, resume=True, **options)
        codes, output = finish(start([ROOT / "seq2seq.py", *words], after))
        assert codes == [0] * after and "from step 6" in output, output[-3000:]
        moved, stayed = long_mount / "models" / f"moved{before}{stage}", long_mount / "models" / f"stayed{after}{stage}"
        assert distance(weights(stayed), weights(moved)) < 1e-6
        assert [row["step"] for row in rows(moved)] == list(range(1, 13))
