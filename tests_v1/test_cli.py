"""The command line: flags, presets, precision, DeepSpeed JSON, memory table, schedule; refusals and their words."""

import json
import math
import re

import pytest
import torch
import transformers
from conftest import flags, ragged_records, trainer_args, write_llama

import common_v1 as common


@pytest.fixture
def mount(tmp_path):
    write_llama(tmp_path / "models" / "tiny")
    (tmp_path / "data").mkdir()
    records = ragged_records(59)
    (tmp_path / "data" / "ragged.json").write_text(json.dumps({"train": records[:43], "eval": records[43:54], "test": records[54:]}))
    return tmp_path


def parsed(*words):
    return vars(trainer_args(["--model_init_name", "x", *map(str, words)]))


# ------------------------------------------------------------------------------------------------ flags


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


# ------------------------------------------------------------------------------------------------ precision

ALIASES = {"fp32": "fp32", "32": "fp32", "32-true": "fp32", "bf16": "bf16", "bf16-true": "bf16",
           "bf16-mixed": "bf16-mixed", "fp16": "fp16",
           "16-true": "fp16", "fp64": "fp64", "64": "fp64", "64-true": "fp64"}


@pytest.mark.parametrize("spelling", ALIASES)
def test_precision_aliases(mount, spelling):
    args, problems = trainer_args(flags(mount, precision=spelling)), []
    common.check_shared_args(args, problems)
    assert problems == [] and common.resolve_precision(args) == ALIASES[spelling] and ALIASES[spelling] in common.DTYPES
    assert set(ALIASES) | {"16-mixed"} == set(common.PRECISIONS)


@pytest.mark.parametrize("has_gpu, expected", [(False, "fp32"), (True, "bf16")])
def test_precision_auto_is_bf16_where_the_gpu_has_it(mount, monkeypatch, has_gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert common.resolve_precision(trainer_args(flags(mount, precision="auto"))) == expected


# ------------------------------------------------------------------------------------------------ DeepSpeed JSON


@pytest.fixture
def read(tmp_path, mount):
    """read(JSON object, **flags) -> (effective configuration, problems)."""
    def read(content, precision="fp32", **changes):
        (tmp_path / "own.json").write_text(json.dumps(content))
        problems = []
        return common.read_ds_config(trainer_args(flags(mount, **changes)), str(tmp_path / "own.json"),
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
    args = trainer_args(flags(mount, warmup_steps=given, lr_scheduler_type=schedule))
    assert common.warmup_steps(args, steps) == warmup
    assert [f"--warmup_steps {given}" in line and f"{min(2000, steps // 10)} is usual" in line
            for line in messages] == [True] * is_warned
    assert math.isclose(common.lr_at(warmup, 1.0, schedule, warmup, steps), 1.0)
