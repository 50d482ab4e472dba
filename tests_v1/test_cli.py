"""The command line: flags, presets, precision, DeepSpeed JSON, memory table, schedule; refusals and their words."""

import json
import math
import re

import pytest
import torch
import transformers
from conftest import flags, ragged_records, write_llama

import common_v1 as common
import sft_causal


@pytest.fixture
def mount(tmp_path):
    write_llama(tmp_path / "models" / "tiny")
    (tmp_path / "data").mkdir()
    records = ragged_records(59)
    (tmp_path / "data" / "ragged.json").write_text(json.dumps({"train": records[:43], "eval": records[43:54], "test": records[54:]}))
    return tmp_path


@pytest.fixture
def refused(run_sft, monkeypatch, capsys):
    """refused(words) -> stderr of a run that ends with exit code 2 before the model loads."""
    def refused(words):
        def too_late(*_):
            raise AssertionError("the model was loaded")
        monkeypatch.setattr(common, "load_model", too_late)
        assert run_sft(list(map(str, words))) == 2
        return capsys.readouterr().err
    return refused


def parsed(*words):
    return vars(sft_causal.parse_args(["--model_init_name", "x", *map(str, words)]))


# ------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize("words, named", [
    (["--train_batch", "8"], "'--train_batch': did you mean --train_batch_size?"),
                                          (["--learning_rte=1"], "did you mean --learning_rate?"),
    (["--temp", "1"], "did you mean --temperature?"), (["--zzz"], "unknown argument '--zzz'"),
                                          (["--max_steps", "many"], "--max_steps"),
    (["--lr_scheduler_type", "step"], "'cosine'"), (["stray"], "'stray'"), (["--no_train", "--evl_steps", "5"],
                                                                            "did you mean --eval_steps?"),
    (["@missing/preset"], "missing/preset"), (["--force", "everything"], "changed_flags")])
def test_unknown_and_abbreviated_flags_are_refused_with_the_nearest(refused, mount, words, named):
    assert named in refused([*flags(mount), *words])


def test_data_and_data_name_and_both_spellings_of_a_value_are_the_same():
    same = [parsed(*words) for words in (["--data", "a", "--seed", 3], ["--data_name", "a", "--seed=3"],
                                         ["--data=a", "--seed=3"], ["--data_name=a", "--seed", 3])]
    assert same[1:] == same[:1] * 3 != [parsed("--data=a", "--seed=4")] * 3
    assert parsed("--data", "a", "b:0.5", "--seed=3")["data_name"] == ["a", "b:0.5"]


def test_presets_have_comments_and_quotes_and_later_flags_win(tmp_path):
    (tmp_path / "inner").write_text("--n_samples 4 --seed 5")
    (tmp_path / "preset").write_text(
        f"# a comment\n--seed 7 --learning_rate=0.5  # peak\n\n--data 'my data' b\n@{tmp_path}/inner\n")
    got = parsed(f"@{tmp_path}/preset", "--learning_rate", "0.25")
    assert (got["seed"], got["learning_rate"], got["data_name"], got["n_samples"]) == (5, 0.25, ["my data", "b"], 4)
    assert parsed("--learning_rate", "0.25", f"@{tmp_path}/preset")["learning_rate"] == 0.5


def test_presets_are_found_beside_the_script(tmp_path, monkeypatch):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "short").write_text("--max_steps 5")
    monkeypatch.setattr(common, "HERE", tmp_path)
    assert parsed("@presets/short")["max_steps"] == 5


@pytest.mark.parametrize("words, is_demo", [([], True), (["--seed", "3"], True), (["--model_init_name=x"], False),
                                            (["--model_init_path", "x"], False),
                                            (["--data", "x"], False), (["--data_name=x"], False),
                                            (["@presets/x"], False)])
def test_demo_flags_are_used_and_shown_only_where_no_model_and_no_data_are_named(tmp_path, monkeypatch, capsys, words,
                                                                                 is_demo):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "x").write_text("--max_steps 5")
    monkeypatch.setattr(common, "HERE", tmp_path)
    args = sft_causal.parse_args(words)
    assert ((args.training_run_name, args.data_name) == ("sft-demo", ["instructions"])) == is_demo
    assert ("demo: python sft_causal.py " + " ".join([sft_causal.DEMO, *words]) in capsys.readouterr().out) == is_demo
    assert args.seed == (3 if "--seed" in words else 0)


def test_all_problems_are_reported_at_once(refused, mount):
    wrong = {"train_batch_size": 0, "learning_rate": "nan", "warmup_steps": -1, "max_length": 1, "top_p": 0,
             "n_samples": 3, "num_epochs": 0, "max_grad_norm": "inf", "metric_for_best": "bleu",
             "eval_fraction": 1, "save_total_limit": 0,
             "max_new_tokens": 0, "training_run_name": "../x", "seed": -1, "resume": True, "overwrite": True}
    error = refused(flags(mount, **wrong, model_init_name="tinny"))
    assert [name for name in wrong if not re.search(rf"^ERROR .*--{name}\b", error, re.M)] == []
    assert "did you mean tiny?" in error and len(re.findall("^ERROR ", error, re.M)) >= len(wrong)
    assert refused(flags(mount, learning_rate="nan")).count("ERROR") == 1


@pytest.mark.parametrize("changes, named", [
    ({"top_p": 0.5}, "--top_p has no effect"),
                                            ({"n_samples": 2}, "greedy"),
    ({"early_stopping_patience": 2}, "needs --metric_for_best"), ({"data": "ragged:5000"}, "5000 of 43"),
                                            ({"data": "ragged:0.001"}, "0 of 43"),
    ({"data": "ragged:0"}, "--data ragged:0"), ({"training_run_name": "/abs"}, "--training_run_name"),
                                            ({"ds_config": "zero7"}, "--ds_config zero7"),
    ({"compile": True, "ds_config": "zero3"}, "--compile"), ({"model_init_name": None, "data": None}, "no model"),
                                            ({"precision": "bf8"}, "--precision bf8")])
def test_flags_that_exclude_each_other_or_mean_nothing_are_refused(refused, mount, changes, named):
    words = flags(mount, **changes) if changes.get("model_init_name", 1) else ["--mount_dir", mount, "--data", "ragged"]
    assert named in refused(words)


def test_run_that_would_rename_its_own_model_is_refused(refused, mount):
    assert "tiny" in refused(flags(mount, run="tiny", overwrite=True))
    assert (mount / "models" / "tiny" / "config.json").exists()


@pytest.mark.parametrize("batch, world, nearest", [(8, 3, 9), (7, 2, 8), (1, 4, 4), (10, 4, 8)])
def test_batch_that_the_processes_cannot_share_is_refused(refused, mount, monkeypatch, batch, world, nearest):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("RANK", "0")
    error = refused(flags(mount, train_batch_size=batch))
    assert f"cannot be divided by {world} processes; nearest: {nearest}" in error
    problems = []
    sft_causal.check_args(sft_causal.parse_args(flags(mount, train_batch_size=nearest)), problems)
    assert problems == []


# ------------------------------------------------------------------------------------------------ precision

ALIASES = {"fp32": "fp32", "32": "fp32", "32-true": "fp32", "bf16": "bf16", "bf16-true": "bf16",
           "bf16-mixed": "bf16-mixed", "fp16": "fp16",
           "16-true": "fp16", "fp64": "fp64", "64": "fp64", "64-true": "fp64"}


@pytest.mark.parametrize("spelling", ALIASES)
def test_precision_aliases(mount, spelling):
    args, problems = sft_causal.parse_args(flags(mount, precision=spelling)), []
    sft_causal.check_args(args, problems)
    assert problems == [] and common.resolve_precision(args) == ALIASES[spelling] and ALIASES[spelling] in common.DTYPES
    assert set(ALIASES) | {"16-mixed"} == set(common.PRECISIONS)


@pytest.mark.parametrize("has_gpu, expected", [(False, "fp32"), (True, "bf16")])
def test_precision_auto_is_bf16_where_the_gpu_has_it(mount, monkeypatch, has_gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert common.resolve_precision(sft_causal.parse_args(flags(mount, precision="auto"))) == expected


# ------------------------------------------------------------------------------------------------ DeepSpeed JSON


@pytest.fixture
def read(tmp_path, mount):
    """read(JSON object, **flags) -> (effective configuration, problems)."""
    def read(content, precision="fp32", **changes):
        (tmp_path / "own.json").write_text(json.dumps(content))
        problems = []
        return common.read_ds_config(sft_causal.parse_args(flags(mount, **changes)), str(tmp_path / "own.json"),
                                     precision, problems), problems
    return read


@pytest.mark.parametrize("own, auto, flag", [
    ({"train_batch_size": 64}, {"train_batch_size": "auto"}, "--train_batch_size"),
    ({"train_micro_batch_size_per_gpu": 4}, {"train_micro_batch_size_per_gpu": "auto"}, "--train_batch_size"),
    ({"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": "auto"}, "--gradient_accumulation_steps"),
    ({"gradient_clipping": 1.0}, {"gradient_clipping": "auto"}, "--max_grad_norm"),
    ({"bf16": {"enabled": True}}, {"bf16": {"enabled": "auto"}}, "--precision"), ({"bf16": {"enabled": False}},
                                                                                  {"bf16": "auto"}, "--precision"),
    ({"fp16": {"enabled": True, "loss_scale": 0}}, {"fp16": {"enabled": "auto", "loss_scale": 0}}, "--precision"),
    ({"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": "auto"}}},
     {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "--learning_rate"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}},
     {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}},
     "--warmup_steps")], ids=lambda value: json.dumps(value)[:40])
def test_own_numbers_in_keys_that_flags_own_are_refused_and_auto_works(read, own, auto, flag):
    config, problems = read(own)
    assert len(problems) == 1 and "own.json" in problems[0] and repr(next(iter(own))) in problems[0]
    assert flag in problems[0]
    config, problems = read(auto)
    config["fp16"].pop("loss_scale", None)  # details of a precision stay the JSON's own
    assert problems == [] and config == read({})[0] and "auto" not in json.dumps(config)


def test_trainer_style_json_with_auto_everywhere_works(read, messages):
    config, problems = read({
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16}, "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto",
                                                  "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                                                     "warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "overlap_comm": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
                              "stage3_prefetch_bucket_size": "auto", "stage3_gather_16bit_weights_on_model_save": True},
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
                             "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False}, gradient_accumulation_steps=3,
                            max_grad_norm=0.5, precision="bf16")
    assert problems == [] and config["zero_optimization"] == {"stage": 3, "overlap_comm": True, "sub_group_size": 1e9,
                                                              "stage3_gather_16bit_weights_on_model_save": True}
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"],
            config["gradient_clipping"]) == (8, 3, 0.5)
    assert config["bf16"] == {"enabled": True} and config["fp16"]["enabled"] is False
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert not {"optimizer", "scheduler"} & set(config) and sum("is not used" in line for line in messages) == 2
    assert common.deepspeed.DeepSpeedConfig(config).train_batch_size == 24


@pytest.mark.parametrize("content", [[1], {"zero_optimization": 3}, {"zero_optimization": {"stage": "three"}},
                                     {"zero_optimization": {"stage": 4}},
                                     {"zero_optimization": {"stage": -1}}], ids=json.dumps)
def test_json_that_is_no_configuration_is_refused(read, content):
    assert any("own.json" in problem for problem in read(content)[1])


def test_parts_that_are_null_are_left_to_deepspeed(read):
    assert read({"zero_optimization": {"stage": 2, "offload_optimizer": None}})[1] == []


@pytest.mark.parametrize("precision, stage, remedy", [("bf16", 0, "zero1"), ("fp64", 3, "zero1"), ("fp64", 0, "zero1"),
                                                      ("bf16", 1, None), ("fp64", 2, None),
                                                      ("bf16-mixed", 0, None), ("fp32", 3, None)])
def test_stage_and_precision_that_do_not_go_together_are_refused(read, precision, stage, remedy):
    _, problems = read({"zero_optimization": {"stage": stage}}, precision)
    assert len(problems) == (remedy is not None)
    assert all(f"--precision {precision}" in p and f"--ds_config {remedy}" in p for p in problems)


def test_offloading_never_builds_an_extension(read, messages):
    config, problems = read({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert problems == [] and config["zero_force_ds_cpu_optimizer"] is False and "torch AdamW" in messages[-1]
    assert "zero_force_ds_cpu_optimizer" not in read({"zero_optimization": {"stage": 2}})[0]


@pytest.mark.parametrize("billions, precision, world, gigabytes, expected", [
    (1, "fp32", 1, 30, "zero0"), (1, "bf16", 1, 30, "zero1"), (4, "bf16", 4, 60, "zero1"), (4, "bf16", 4, 40, "zero2"),
                                                                             (4, "bf16", 4, 30, "zero3"),
    (11.3, "bf16", 4, 80, "zero3"), (1, "fp64", 4, 40, "zero1"), (1, "bf16-mixed", 8, 21, "zero0"),
    (4, "bf16", 4, 20, "zero2_offload on 4 GPUs"), (4, "bf16", 4, 8, "zero3_offload on 4 GPUs"),
                                                                             (1, "fp32", 1, 1, "none up to 64 GPUs")])
def test_auto_takes_the_lowest_stage_that_fits_or_names_the_smallest_setup_that_does(monkeypatch, billions, precision,
                                                                                     world, gigabytes, expected):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr(common, "device_memory", lambda: gigabytes * 1e9)
    problems = []
    stage = common.choose_stage(int(billions * 1e9), precision, problems)
    assert (stage == expected
            and problems == []) if " " not in expected else f"smallest set-up that does: {expected} (" in problems[0]


def test_setup_that_auto_names_exists_in_that_precision(monkeypatch):
    monkeypatch.setattr(common, "device_memory", lambda: 50e9)
    problems = []
    assert common.choose_stage(10**10, "fp64", problems) in ("zero1", "zero2")  # what read_ds_config checks next
    assert "zero3" not in problems[0].split("does:")[1].split("(")[0]


# ------------------------------------------------------------------------------------------------ estimate, schedule


def test_estimate_prints_the_table_and_loads_no_weights(run_sft, mount, monkeypatch, capsys):
    monkeypatch.setattr(common, "load_model", lambda *_: 1 / 0)
    monkeypatch.setattr(common, "device_memory", lambda: 1)  # nothing fits: still a table
    assert run_sft(flags(mount, estimate=True, precision="bf16", ds_config="auto")) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", out, re.M) for name in common.STAGES) and "bf16" in out
    assert not (mount / "models" / "run").exists()


def test_estimate_is_printed_by_rank_0_only(run_sft, mount, monkeypatch, capsys):
    for rank, prints in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run_sft(flags(mount, estimate=True)) == 0 and ("zero3" in capsys.readouterr().out) == prints


def test_estimate_does_not_mind_a_finished_run(run_sft, mount):
    (mount / "models" / "run").mkdir()
    common.write_json(mount / "models" / "run" / "args.json", {})
    (mount / "models" / "run" / "COMPLETE").touch()
    assert run_sft(flags(mount, estimate=True)) == 0


THEIRS = {"linear": transformers.get_linear_schedule_with_warmup,
          "cosine": transformers.get_cosine_schedule_with_warmup,
          "constant_with_warmup": lambda optimizer, warmup,
          _: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
          "constant": lambda optimizer, *_: transformers.get_constant_schedule(optimizer)}


@pytest.mark.parametrize("warmup, steps", [(0, 12), (4, 10), (1, 2)])
@pytest.mark.parametrize("schedule", THEIRS)
def test_learning_rate_is_that_of_transformers_with_a_warmup_that_starts_one_step_later_there(schedule, warmup, steps):
    """Ours uses (k + 1) / warmup at update k, so no update is lost to a rate of 0; after warm-up both agree."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler, theirs = THEIRS[schedule](optimizer, warmup, steps), []
    for _ in range(steps + 1):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = [common.lr_at(step, 0.3, schedule, warmup, steps) for step in range(steps + 1)]
    shift = 0 if schedule == "constant" else 1
    assert ours[:warmup] == pytest.approx(theirs[shift:warmup + shift], rel=1e-12)
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12, abs=1e-17)
    assert ours[max(0, warmup - 1)] == max(ours) == 0.3 and all(rate > 0 for rate in ours[:-1])
    assert ours[-1] == (0 if schedule in ("linear", "cosine") else 0.3)
    if warmup > 1 and schedule != "constant":
        assert ours[:2] == pytest.approx([0.3 / warmup, 0.6 / warmup]) != pytest.approx(theirs[:2])


@pytest.mark.parametrize("given, schedule, steps, warmup, is_warned", [
    (None, "linear", 1000, 100, False), (None, "linear", 10**6, 2000, False), (None, "cosine", 5, 0, False),
                                                                       (400, "linear", 1000, 400, True),
    (333, "linear", 1000, 333, False), (400, "constant", 1000, 400, False), (0, "linear", 10, 0, False)])
def test_warmup_default_and_warning(mount, messages, given, schedule, steps, warmup, is_warned):
    args = sft_causal.parse_args(flags(mount, warmup_steps=given, lr_scheduler_type=schedule))
    assert common.warmup_steps(args, steps) == warmup
    assert [f"--warmup_steps {given}" in line and f"{min(2000, steps // 10)} is usual" in line
            for line in messages] == [True] * is_warned
    assert math.isclose(common.lr_at(warmup, 1.0, schedule, warmup, steps), 1.0)
