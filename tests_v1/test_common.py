"""common_v1.py, each function alone: seeds, files, run folder decisions, checkpoints on disk, memory table, launchers."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, finish, flags, start, trainer_args

import common_v1 as common

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT",
            "SLURM_PROCID",
            "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID",
            "SLURM_STEP_ID", "SLURM_STEP_NODELIST")
IDENTITY = {"resolved_model": "models/tiny", "data_sha256": ["abc"], "resolved_precision": "fp32", "effective_batch": 8}


@pytest.fixture
def no_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


# ------------------------------------------------------------------------------------------------ processes


LATE_THREAD = """
import atexit, sys, threading, time
sys.path.insert(0, sys.argv[1])
import torch, common_v1 as common
common.adopt_launcher()
common.setup_distributed()
x = torch.ones(1, requires_grad=True)
x.register_hook(lambda _: time.sleep(0.3))  # a thread inside C++ that wants the interpreter back after the end
threading.Thread(target=(x * 2).backward, daemon=True).start()
class Sleeper:
    def __del__(self):
        time.sleep(1)  # the taking down lasts longer than the thread waits
sleeper = Sleeper()
atexit.register(print, "registered function ran")
time.sleep(0.1)
{end}
"""


@pytest.mark.slow
def test_a_rank_ends_with_its_exit_code_although_a_thread_still_wants_the_interpreter():
    """As gloo's threads do now and then (PyTorch issue 190489). The control: the usual ending aborts."""
    for end, code in (("common.leave(75)", 75), ("common.dist.destroy_process_group(); sys.exit(75)", -signal.SIGABRT)):
        codes, output = finish(start(["-c", LATE_THREAD.format(end=end), ROOT]))
        assert codes == [code] and "registered function ran" in output, output


def test_without_a_launcher_this_is_rank_0_of_1_on_a_free_port(no_launcher):
    common.adopt_launcher()
    assert (common.rank(), common.world_size(), common.local_world_size()) == (0, 1, 1)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and 1024 <= int(os.environ["MASTER_PORT"]) < 65536


@pytest.mark.parametrize("nodes, first", [("n[03-05,8]", "n03"), ("gpu-1,gpu-2", "gpu-1"), ("single", "single")])
def test_srun_variables_become_those_of_torchrun(no_launcher, nodes, first):
    for name, value in {"SLURM_PROCID": 5, "SLURM_LOCALID": 1, "SLURM_STEP_NUM_TASKS": 8,
                        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
                        "SLURM_JOB_ID": 41234, "SLURM_STEP_ID": 0, "SLURM_STEP_NODELIST": nodes}.items():
        no_launcher.setenv(name, str(value))
    common.adopt_launcher()
    assert (common.rank(), common.world_size(), os.environ["LOCAL_RANK"], common.local_world_size()) == (5, 8, "1", 4)
    assert os.environ["MASTER_ADDR"] == first and 20000 <= int(os.environ["MASTER_PORT"]) < 40000


@pytest.mark.parametrize("given, expected", [
    ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, ("0", "1")),  # python inside sbatch, no srun: one process
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ("0", "1")),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "RANK": "6", "WORLD_SIZE": "8"},
     ("6", "8"))])  # torchrun in srun
def test_srun_is_adopted_only_where_it_started_several_ranks(no_launcher, given, expected):
    for name, value in given.items():
        no_launcher.setenv(name, value)
    common.adopt_launcher()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == expected


def test_derived_seeds_are_the_same_on_every_machine_and_differ_by_every_key():
    assert common.derive_seed("a", 1) == 6222101017213550541
    seeds = [common.derive_seed(seed, what, step, rank) for seed in (0, 1) for what in ("dropout", "sample")
             for step in range(50)
             for rank in range(3)]
    assert len(set(seeds)) == len(seeds) == 600 and all(0 <= seed < 2**63 for seed in seeds)
    assert common.derive_seed("1") != common.derive_seed(1) and common.derive_seed(1, 23) != common.derive_seed(12, 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stopper_remembers_a_signal(number):
    stopper = common.Stopper(0)
    assert stopper.reason() is None
    os.kill(os.getpid(), number)
    assert stopper.reason() == number.name


def test_stopper_ends_after_max_hours_and_without_its_launcher():
    assert common.Stopper(1.0).reason() is None
    late = common.Stopper(1e-9)
    time.sleep(0.01)
    assert late.reason() == "--max_hours"
    orphan = common.Stopper(0)
    orphan.launchers = [2**22 + 1]
    assert orphan.reason() == "the launcher is gone"


# ------------------------------------------------------------------------------------------------ files


def test_write_json_never_shows_half_a_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    common.write_json(path, {"a": 1})

    def killed(*_):
        assert json.loads(path.read_text()) == {"a": 1}
        assert json.loads((tmp_path / "a.json.tmp").read_text()) == {"b": "é"}
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        common.write_json(path, {"b": "é"})
    assert json.loads(path.read_text()) == {"a": 1}
    monkeypatch.undo()
    common.write_json(path, {"b": "é"})
    assert json.loads(path.read_text()) == {"b": "é"} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_move_aside_never_overwrites(tmp_path):
    for n in range(3):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / str(n)).touch()
        assert common.move_aside(tmp_path / "run") == str(tmp_path / f"run.old-{n + 1}")
    assert {p.name: [q.name for q in p.iterdir()] for p in tmp_path.iterdir()} == {f"run.old-{n + 1}": [str(n)]
                                                                                   for n in range(3)}


def test_fsync_tree_syncs_every_file_and_folder_and_closes_them(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (tmp_path / name).touch()
    synced, handles = [], []
    monkeypatch.setattr(os, "fsync", lambda fd: (handles.append(fd), synced.append(os.readlink(f"/proc/self/fd/{fd}"))))
    common.fsync_tree(tmp_path)
    assert sorted(synced) == sorted(str(tmp_path / name) for name in (".", "x", "a", "a/y", "a/b", "a/b/z"))
    assert not any(str(tmp_path) in os.readlink(f"/proc/self/fd/{fd}") for fd in set(handles)
                   if os.path.exists(f"/proc/self/fd/{fd}"))


@pytest.mark.parametrize("rows", [[[5, 6, 1], [], [7], []], [[], []], [], [[2**31 - 1]]], ids=str)
def test_ragged_round_trip(tmp_path, rows):
    writer = common.RaggedWriter(tmp_path / "a")
    for row in rows:
        writer.append(row)
    writer.close()
    back = common.Ragged(tmp_path / "a")
    assert [back[i].tolist() for i in range(len(back))] == rows and back.lengths.tolist() == [len(row) for row in rows]


def fill(root, events, problems=None):
    with common.cache_folder(root, "key", [] if problems is None else problems) as (folder, is_new):
        events.append(is_new)
        if is_new:
            (folder / "content").write_text("whole")
        return (folder / "content").read_text()


def test_cache_folder_is_filled_once(tmp_path):
    events = []
    assert [fill(tmp_path, events), fill(tmp_path, events)] == ["whole", "whole"] and events == [True, False]
    assert sorted(p.name for p in (tmp_path / "key").iterdir()) == ["COMPLETE", "content"]


def test_cache_folder_without_marker_or_with_problems_is_not_used(tmp_path):
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "content").write_text("ha")
    events, problems = [], []
    with common.cache_folder(tmp_path, "key", problems) as (folder, is_new):
        events.append(is_new)
        problems.append("a record is wrong")
    with pytest.raises(ZeroDivisionError), common.cache_folder(tmp_path, "key", []) as (folder, is_new):
        events.append(is_new)
        1 / 0
    assert (tmp_path / "key" / "content").read_text() == "ha" and not list(tmp_path.glob("*.tmp"))
    assert fill(tmp_path, events) == "whole" and events == [True, True, True]


def test_cache_folder_left_by_a_killed_process_of_the_same_number_is_no_obstacle(tmp_path, monkeypatch):
    """In containers, host name and process number often repeat."""
    monkeypatch.setattr(common.socket, "gethostname", lambda: "box")
    (tmp_path / f"key.box.{os.getpid()}.tmp").mkdir()
    assert fill(tmp_path, []) == "whole"


def test_second_process_waits_for_the_lock_and_a_killed_one_frees_it(tmp_path):
    """The other holds a shared lock: that keeps out an exclusive one only, so this also tells which ours is."""
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys, time\nlock = open(sys.argv[1], 'w')\n"
                               "fcntl.flock(lock, fcntl.LOCK_SH)\nprint('held', flush=True)\ntime.sleep(60)",
                               tmp_path / "key.lock"],
                              stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        events = []
        waiting = threading.Thread(target=fill, args=(tmp_path, events), daemon=True)
        waiting.start()
        time.sleep(0.3)
        assert events == []
    finally:
        holder.kill()
        holder.wait()
    waiting.join(5)
    assert events == [True]
    with open(tmp_path / "key.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # is free again


# ------------------------------------------------------------------------------------------------ run folder


def made_run(mount, finished=False):
    """A run folder as start_run leaves it, with one checkpoint; returns (run_dir, what changed flags lead to)."""
    run_dir = mount / "models" / "run"
    args = trainer_args(flags(mount))
    (run_dir / "checkpoint-2").mkdir(parents=True)
    (run_dir / "checkpoint-2" / "COMPLETE").touch()
    common.write_json(run_dir / "args.json", {**vars(args), **IDENTITY})
    if finished:
        (run_dir / "COMPLETE").touch()

    def decide(identity=None, **changes):
        problems = []
        args = trainer_args(flags(mount, **changes))
        found = common.start_of_run(args, run_dir, {**IDENTITY, **(identity or {})}, {"max_new_tokens"}, problems)
        return found and found.name, problems
    return run_dir, decide


def test_unfinished_run_of_the_same_flags_continues(mount):
    _, decide = made_run(mount)
    assert decide() == ("checkpoint-2", [])


@pytest.mark.parametrize("changes", [{"max_hours": 2}, {"max_new_tokens": 9}, {"logging_steps": 7},
                                     {"save_total_limit": 5},
                                     {"eval_batch_size": 3}, {"ds_config": "zero2"},
                                     {"train_batch_size": 4, "gradient_accumulation_steps": 2}, {"save_steps": 1}],
                         ids=str)
def test_flags_outside_the_mathematics_may_change(mount, changes):
    _, decide = made_run(mount)
    assert decide(**changes) == ("checkpoint-2", [])


@pytest.mark.parametrize("changes, named", [
    ({"learning_rate": 0.02}, "learning_rate: 0.01 -> 0.02"), ({"seed": 1}, "seed: 0 -> 1"),
                                            ({"max_steps": 9}, "max_steps: 4 -> 9"),
    ({"identity": {"effective_batch": 16}}, "effective_batch: 8 -> 16"), ({"identity": {"data_sha256": ["x"]}},
                                                                          "data_sha256: ['abc'] -> ['x']")])
def test_unfinished_run_with_other_flags_is_refused_naming_them(mount, changes, named):
    _, decide = made_run(mount)
    _, problems = decide(**changes)
    assert len(problems) == 1 and named in problems[0] and "--overwrite" in problems[0]


def test_finished_run_is_refused_and_resume_may_only_lengthen_it(mount, messages):
    _, decide = made_run(mount, finished=True)
    assert "finished" in decide()[1][0] and "--resume" in decide()[1][0]
    assert decide(resume=True, max_steps=8) == ("checkpoint-2", []) and "max_steps: 4 -> 8" in messages[-1]
    assert "learning_rate: 0.01 -> 0.02" in decide(resume=True, learning_rate=0.02)[1][0]
    assert decide(resume=True, learning_rate=0.02, force=["changed_flags"]) == ("checkpoint-2", [])


def test_foreign_folder_is_refused_and_overwrite_renames_it(mount, no_launcher, messages):
    run_dir, decide = made_run(mount)
    (run_dir / "args.json").unlink()
    assert "no run folder" in decide()[1][0]
    assert decide(overwrite=True) == (None, [])
    common.start_run(trainer_args(flags(mount, overwrite=True)), run_dir, IDENTITY, ROOT / "sft_causal.py")
    assert (mount / "models" / "run.old-1" / "checkpoint-2").is_dir() and not (run_dir / "checkpoint-2").exists()
    assert json.loads((run_dir / "args.json").read_text())["effective_batch"] == 8
    assert (run_dir / "code" / "common_v1.py").exists()


def test_start_run_sweeps_what_a_killed_process_left(mount, no_launcher, messages):
    run_dir, _ = made_run(mount, finished=True)
    (run_dir / "checkpoint-4.tmp").mkdir()
    (run_dir / "model.safetensors.tmp").touch()
    common.start_run(trainer_args(flags(mount)), run_dir, IDENTITY, ROOT / "sft_causal.py")
    assert not list(run_dir.glob("*.tmp")) and not (run_dir / "COMPLETE").exists()
    assert (run_dir / "checkpoint-2").is_dir()


def test_latest_checkpoint_is_the_newest_whole_one_and_the_others_are_named(tmp_path, messages):
    assert common.latest_checkpoint(tmp_path) is None
    for name, whole in {"checkpoint-9": True, "checkpoint-100": True, "checkpoint-200": False,
                        "checkpoint-300.tmp": True}.items():
        (tmp_path / name).mkdir()
        if whole:
            (tmp_path / name / "COMPLETE").touch()
    assert common.latest_checkpoint(tmp_path).name == "checkpoint-100"
    assert len(messages) == 1 and "checkpoint-200 is unfinished" in messages[0]
    assert (tmp_path / "checkpoint-200").is_dir()


def test_rewind_metrics_moves_later_rows_and_drops_half_a_line(tmp_path):
    lines = [json.dumps({"step": step, "split": split}) for step in (1, 2, 3, 4) for split in ("train", "eval")]
    for last_eval, n_kept in ((2, 4), (None, 3)):  # None: the checkpoint of step 2 knows of no evaluation at step 2
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')
        common.rewind_metrics(tmp_path, 2, last_eval)
        assert (tmp_path / "metrics.jsonl").read_text() == "\n".join(lines[:n_kept]) + "\n"
        assert (tmp_path / "metrics.replaced.jsonl").read_text() == "\n".join(lines[n_kept:]) + "\n"
        (tmp_path / "metrics.replaced.jsonl").unlink()


def test_export_root_replaces_stale_weights_and_leaves_the_checkpoint_alone(tmp_path):
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / "engine").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "state.json", "rawtune.json", "COMPLETE"):
        (checkpoint / name).write_text(f"new {name}")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "config.json.tmp"):
        (tmp_path / name).write_text("old")
    common.export_root(tmp_path, checkpoint)
    assert {p.name: p.read_text() for p in tmp_path.iterdir() if p.is_file()} == {
        **{name: f"new {name}" for name in ("config.json", "model.safetensors", "rawtune.json")}, "COMPLETE": ""}
    assert len(list(checkpoint.iterdir())) == 6


def test_export_root_brings_the_critic_along(tmp_path):
    critic, exported = tmp_path / "checkpoint-4" / "critic", tmp_path / "critic"
    critic.mkdir(parents=True)
    exported.mkdir()
    for name in ("model.safetensors", "config.json", "state.json"):
        (critic / name).write_text(f"new {name}")
    for name in ("model.safetensors", "model.safetensors.tmp"):
        (exported / name).write_text("old")
    common.export_root(tmp_path, tmp_path / "checkpoint-4")
    assert {p.name: p.read_text() for p in exported.iterdir()} == {p.name: p.read_text() for p in critic.iterdir()}
    assert [p.samefile(critic / p.name) for p in sorted(exported.iterdir())] == [False, True, False]  # people edit small files
    (tmp_path / "checkpoint-5").mkdir()
    common.export_root(tmp_path, tmp_path / "checkpoint-5")  # as most scripts' checkpoints are: without


# ------------------------------------------------------------------------------------------------ order of examples


@pytest.mark.parametrize("spec, expected", [
    ("a", ("a", None)), ("a:0.05", ("a", 0.05)), ("a:500", ("a", 500)), ("a:1", ("a", 1)), ("a:1.0", ("a", 1.0)),
                                            ("x/a.json:5", ("x/a.json", 5)),
    ("c:/a", ("c:/a", None)), ("a:0", None), ("a:0.0", None), ("a:-3", None), ("a:-0.5", None), ("a:1.5", None),
                                            ("a:1e999", None)])
def test_amounts_with_a_point_are_fractions_and_others_counts(spec, expected):
    problems = []
    value = common.parse_data_spec(spec, problems)
    if expected:
        assert value == expected and type(value[1]) is type(expected[1]) and problems == []
    else:
        assert len(problems) == 1 and f"--data {spec}: " in problems[0]


def test_mixed_sets_are_drawn_anew_each_epoch_and_the_same_for_the_same_seed():
    sizes, amounts = [100, 40, 7], [0.05, 30, None]
    epochs = [common.mixed_epoch(sizes, amounts, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    for ids in epochs:
        assert len(set(ids)) == len(ids) and np.histogram(ids, [0, 100, 140, 147])[0].tolist() == [5, 30, 7]
    assert (epochs[0] == epochs[3]).all() and (epochs[0] != epochs[1]).any() and (epochs[0] != epochs[2]).any()
    assert all(common.mixed_epoch([4], [amount], 0, 3).tolist() == [0, 1, 2, 3] for amount in (1.0, 4, None))


@pytest.mark.parametrize("trial", range(12))
def test_batches_hold_every_example_once_and_depend_on_seed_and_epoch_only(trial):
    rng = np.random.default_rng(trial)
    n, batch = int(rng.integers(1, 3000)), int(rng.integers(1, 70))
    lengths, ids = rng.integers(1, 400, (5000, 2)), rng.permutation(5000)[:n]
    batches = common.epoch_batches(ids, lengths, batch, 3, trial)
    assert sorted(np.concatenate(batches)) == sorted(ids)
    assert [len(b) for b in batches] == [batch] * (n // batch) + [n % batch] * (n % batch > 0)
    again, other = common.epoch_batches(ids, lengths, batch, 3, trial), common.epoch_batches(ids, lengths, batch, 3,
                                                                                             trial + 1)
    assert all((a == b).all() for a, b in zip(batches, again)) and (n < 5 or any((a != b).any() for a,
                                                                                 b in zip(batches, other)))


def test_length_cells_are_alike_in_length():
    lengths = np.random.default_rng(0).integers(1, 1000, (640, 2))
    cells = common.length_cells(np.arange(640), lengths, 16)
    assert sorted(np.concatenate(cells)) == list(range(640)) and {len(cell) for cell in cells} == {40}
    spread = np.mean([np.ptp(lengths[cell], axis=0) for cell in cells])
    assert spread < 300 < np.mean([np.ptp(lengths[cell], axis=0) for cell in np.split(np.arange(640), 16)])


# ------------------------------------------------------------------------------------------------ optimiser, memory


def test_weight_decay_falls_on_matrices_only_also_when_zero3_has_flattened_them():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    model[0].weight.ds_shape, model[0].weight.data = model[0].weight.shape, torch.empty(0)
    decayed, free = common.param_groups(model, 0.3)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert [id(p) for p in free["params"]] == [id(p) for p in (model[0].bias, model[1].weight, model[1].bias,
                                                               model[2].bias)]


@pytest.mark.parametrize("n_params, name, precision, n_gpus, gigabytes", [
    (1, "zero0", "fp32", 1, 4 + 4 + 8), (1, "zero0", "bf16-mixed", 8, 16), (1, "zero1", "bf16", 4, 2 + 6 + (4 + 8) / 4),
    (1, "zero2", "bf16", 4, 2 + (6 + 12) / 4), (11, "zero3", "bf16", 4, 11 * 20 / 4 + 2 * 3 / 4),
                                                                          (1, "zero2", "fp32", 2, 4 + 16 / 2),
    (1, "zero1", "fp64", 2, 8 + 8 + 24 / 2), (11, "zero2_offload", "bf16", 8, 22), (11, "zero3_offload", "bf16", 1, 2)])
def test_memory_per_gpu_equals_hand_numbers(n_params, name, precision, n_gpus, gigabytes):
    assert common.memory_per_gpu(n_params * 10**9, name, precision, n_gpus) == pytest.approx(gigabytes * 1e9, rel=1e-12)


def test_estimate_table_stars_what_fits():
    rows = {line.split()[0]: line for line in common.estimate_table(10**9, "bf16", 10e9).splitlines()[2:]}
    assert rows["zero1"].count("*") == 0 and "20.00 " in rows["zero1"]
    assert rows["zero2"].split()[1:] == ["20.00", "11.00", "6.50*", "4.25*", "3.12*"]
    assert list(rows)[:6] == common.STAGES


def test_new_weights_need_no_allocation_to_be_counted():
    config = common.transformers.T5Config(d_model=8192, d_ff=655360, num_layers=8)  # 690 GB in fp32
    n = common.count_parameters(common.transformers.AutoModelForSeq2SeqLM, config)
    assert n > 10**11 and np.log10(n) < 12
