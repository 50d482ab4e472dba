"""clf.py's training loop, through the engine in this process: its mathematics, precisions, failures, stopping and resuming."""

import json
import math

import pytest
import torch
from conftest import assert_same_run, clf_flags, distance, preds, rows, stop_at, weights, write_llama

import clf
import common_v1 as common

pytestmark = pytest.mark.usefixtures("no_pictures")


# ------------------------------------------------------------------------------------------------ the mathematics of the loop


def test_accumulation_splits_give_the_same_losses_gradients_and_weights_and_a_mean_of_means_does_not(clf_mount, run_clf, monkeypatch):
    """Ragged texts, class weights, and a sixth step of 3 texts over up to 4 forward steps."""
    models = clf_mount / "models"
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        words = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "class_weights": ["1", "3"], "max_steps": 6,
                 "learning_rate": 0.001}
        assert run_clf(clf_flags(clf_mount, f"{batch}", **words)) == 0
        for mine, theirs in zip(rows(models / f"{batch}"), rows(models / "8"), strict=True):
            assert (mine["loss"], mine["grad_norm"]) == (pytest.approx(theirs["loss"], rel=1e-6), pytest.approx(theirs["grad_norm"], rel=1e-6))
            assert mine["lr"] == theirs["lr"] and mine["target_tokens"] == theirs["target_tokens"]
        assert distance(weights(models / "8"), weights(models / f"{batch}")) < 1e-6
    real = clf.TrainingData.micro_batches
    def mean_of_means(self, step):
        batches, total = real(self, step)
        for batch in batches:
            batch["weight"] = batch["weight"] * total / len(batches) / max(1e-9, float(batch["weight"].sum()))
        return batches, total
    monkeypatch.setattr(clf.TrainingData, "micro_batches", mean_of_means)
    assert run_clf(clf_flags(clf_mount, "mutated", **words)) == 0
    assert abs(rows(models / "mutated")[0]["grad_norm"] / rows(models / "8")[0]["grad_norm"] - 1) > 1e-2
    assert distance(weights(models / "8"), weights(models / "mutated")) > 1e-4


def test_half_kl_takes_half_the_gradient_of_cross_entropy_and_class_weights_change_it(clf_mount, run_clf):
    norms = {}
    for name, changes in (("cross_entropy", {}), ("half_kl", {"loss": "half_kl"}), ("weights", {"class_weights": ["1", "3"]}),
                          ("equal", {"class_weights": ["2", "2"]})):
        assert run_clf(clf_flags(clf_mount, name, max_steps=1, **changes)) == 0
        norms[name] = rows(clf_mount / "models" / name)[0]["grad_norm"]
    assert 2 * norms["half_kl"] == pytest.approx(norms["cross_entropy"], rel=1e-6)
    assert norms["equal"] == pytest.approx(norms["cross_entropy"], rel=1e-6)
    assert norms["weights"] != pytest.approx(norms["cross_entropy"], rel=1e-2)


def test_evaluating_after_every_step_leaves_the_training_with_dropout_as_it_was(clf_mount, run_clf):
    """Every step trains in training mode, with the noise of its own."""
    for name, changes in (("often", {"eval_steps": 1}), ("rarely", {}), ("without", {"model_init_name": "tiny"})):
        assert run_clf(clf_flags(clf_mount, name, **{"model_init_name": "dropout", **changes})) == 0
    often, rarely, without = (clf_mount / "models" / name for name in ("often", "rarely", "without"))
    assert distance(weights(often), weights(rarely)) == 0 and [r["loss"] for r in rows(often)] == [r["loss"] for r in rows(rarely)]
    assert rows(rarely)[0]["loss"] != pytest.approx(rows(without)[0]["loss"], rel=1e-3)


@pytest.mark.parametrize("model, change", [("tiny", {"gradient_checkpointing": True}), ("llama", {"gradient_checkpointing": True}),
                                           ("tiny", {"ds_config": "zero2_offload"}), ("tiny", {"ds_config": "zero3_offload"})])
def test_memory_savers_do_not_change_the_result(clf_mount, run_clf, model, change):
    options, plain = {"model_init_name": model, "ds_config": "zero2", "learning_rate": 0.001, "save_steps": 3}, clf_mount / "models" / "plain"
    assert run_clf(clf_flags(clf_mount, "plain", **options)) == 0
    assert run_clf(clf_flags(clf_mount, "saved", **{**options, **change})) == 0
    assert distance(weights(plain), weights(clf_mount / "models" / "saved")) < 1e-6 < 1e-4 < distance(weights(plain), weights(plain / "checkpoint-3"))


@pytest.mark.parametrize("precision, config", [("bf16", "zero1"), ("bf16-mixed", "zero0"), pytest.param("fp64", "auto", marks=pytest.mark.slow)])
def test_precisions_follow_the_fp32_run(clf_mount, run_clf, precision, config):
    for name, changes in (("fp32", {}), ("other", {"precision": precision, "ds_config": config})):
        assert run_clf(clf_flags(clf_mount, name, max_steps=20, learning_rate=0.003, logging_steps=5, **changes)) == 0
    a, b = ([row["loss"] for row in rows(clf_mount / "models" / run)] for run in ("fp32", "other"))
    assert max(abs(x - y) / x for x, y in zip(a, b)) < (1e-5 if precision == "fp64" else 0.03) and (precision == "fp64" or a != b)


@pytest.mark.skipif(not common.deepspeed.accelerator.get_accelerator().is_fp16_supported(), reason="DeepSpeed has no fp16 on this CPU")
def test_an_overflowed_fp16_step_is_repeated_and_does_not_advance_the_schedule(clf_mount, run_clf):
    (clf_mount / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": {"enabled": "auto", "initial_scale_power": 24}}))
    words = clf_flags(clf_mount, model_init_name="llama", ds_config=clf_mount / "ds.json", precision="fp16", max_steps=5, learning_rate=1e-3)
    assert run_clf(words) == 0
    found = rows(clf_mount / "models" / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert [row["lr"] for row in found] == pytest.approx([common.lr_at(k, 1e-3, "linear", 1, 5) for k in range(5)])
    assert "overflow" in (clf_mount / "models" / "run" / "log.txt").read_text()


def test_a_non_finite_loss_stops_before_the_update_and_keeps_the_checkpoints(clf_mount, run_clf, monkeypatch, capsys):
    forward, calls = clf.YesNo.forward, []
    def poisoned(self, input_ids, lengths):
        calls.append(self.training)
        return forward(self, input_ids, lengths) * (math.nan if calls.count(True) == 4 and self.training else 1.0)
    monkeypatch.setattr(clf.YesNo, "forward", poisoned)
    assert run_clf(clf_flags(clf_mount, save_steps=2)) == 2
    assert "step 4: the loss is nan" in capsys.readouterr().err
    assert sorted(p.name for p in (clf_mount / "models" / "run").glob("checkpoint-?")) == ["checkpoint-2"]


@pytest.mark.parametrize("while_training", [True, False])
def test_out_of_memory_names_the_step_the_shapes_and_the_next_thing(clf_mount, run_clf, monkeypatch, capsys, while_training):
    forward = clf.YesNo.forward
    def full(self, *batch):
        if self.training == while_training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *batch)
    monkeypatch.setattr(clf.YesNo, "forward", full)
    assert run_clf(clf_flags(clf_mount)) == 2
    error = capsys.readouterr().err
    assert ("step 1: out of memory" in error and "--gradient_accumulation_steps" in error if while_training
            else "evaluation: out of memory" in error and "--eval_batch_size" in error)


def test_tokenising_happens_before_any_process_group(clf_mount, run_clf, monkeypatch):
    order, load, setup = [], clf.load_data, common.setup_distributed
    monkeypatch.setattr(clf, "load_data", lambda *a: order.append("data") or load(*a))
    monkeypatch.setattr(common, "setup_distributed", lambda: order.append("group") or setup())
    assert run_clf(clf_flags(clf_mount, max_steps=1)) == 0
    assert order == ["data", "group"]


# ------------------------------------------------------------------------------------------------ resume


def resume_flags(mount, run, task, **changes):
    own = {"point": {"model_init_name": "dropout"}, "pair": {"model_init_name": "llama-dropout", "data": "pairs", "loss": "pairwise"}}[task]
    return clf_flags(mount, run, **{**own, "max_steps": 4, "save_steps": 1, "train_batch_size": 4, "gradient_accumulation_steps": 2, **changes})


@pytest.mark.parametrize("task", ["point", "pair"])
def test_two_steps_and_two_more_equal_four_to_the_bit_with_dropout(clf_mount, run_clf, monkeypatch, task):
    write_llama(clf_mount / "models" / "llama-dropout", attention_dropout=0.1)
    models = clf_mount / "models"
    assert run_clf(resume_flags(clf_mount, "straight", task)) == 0
    for name in ("stopped", "other"):
        with monkeypatch.context() as patch:
            stop_at(patch, 2)
            assert run_clf(resume_flags(clf_mount, name, task)) == common.EXIT_SAVED
    assert [row["step"] for row in rows(models / "stopped")] == [1, 2]
    assert run_clf(resume_flags(clf_mount, "stopped", task)) == 0
    assert_same_run(models / "straight", models / "stopped", 4)
    assert preds(models / "straight" / "preds.json") == preds(models / "stopped" / "preds.json")
    derive = common.derive_seed  # the negative control: other dropout draws after the stop
    monkeypatch.setattr(common, "derive_seed", lambda *keys: derive(*keys, "other") if "dropout" in keys else derive(*keys))
    assert run_clf(resume_flags(clf_mount, "other", task)) == 0
    assert distance(weights(models / "straight"), weights(models / "other")) > 1e-6


def test_a_run_that_stopped_after_its_best_evaluation_still_exports_and_scores_the_best(clf_mount, run_clf, monkeypatch):
    options = {"max_steps": 12, "eval_steps": 2, "metric_for_best": "loss", "learning_rate": 0.05}
    assert run_clf(clf_flags(clf_mount, "straight", **options)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        assert run_clf(clf_flags(clf_mount, "stopped", **options)) == common.EXIT_SAVED
    assert run_clf(clf_flags(clf_mount, "stopped", **options)) == 0
    a, b = clf_mount / "models" / "straight", clf_mount / "models" / "stopped"
    best = json.loads((a / "best.json").read_text())
    assert json.loads((b / "best.json").read_text()) == best and best["checkpoint"] < "checkpoint-8"
    assert preds(a / "preds.json") == preds(b / "preds.json") and distance(weights(a), weights(b)) == 0
    assert [row["eval/loss"] for row in rows(a, "eval")] == [row["eval/loss"] for row in rows(b, "eval")]


def test_a_stopped_run_with_pred_save_path_continues(clf_mount, run_clf, monkeypatch, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "p.json"
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run_clf(clf_flags(clf_mount, pred_save_path=path)) == common.EXIT_SAVED
    assert run_clf(clf_flags(clf_mount, pred_save_path=path)) == 0 and len(preds(path)) == 11


@pytest.mark.parametrize("own_path", [False, True])
def test_a_run_that_was_killed_at_the_test_split_continues(clf_mount, run_clf, monkeypatch, tmp_path_factory, own_path):
    """The evaluation's last predictions are written by then, and are this run's own."""
    words = clf_flags(clf_mount, pred_save_path=tmp_path_factory.mktemp("out") / "p.json" if own_path else None)
    evaluate = clf.evaluate

    def killed(args, engine, data_sets, split, *rest):
        if split == "test":
            raise KeyboardInterrupt
        return evaluate(args, engine, data_sets, split, *rest)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clf, "evaluate", killed)
        run_clf(words)
    assert not (clf_mount / "models" / "run" / "COMPLETE").exists()
    assert run_clf(words) == 0 and (clf_mount / "models" / "run" / "COMPLETE").exists()


@pytest.mark.parametrize("step", [2, 4])
def test_a_stop_at_the_step_of_an_evaluation_changes_nothing_that_is_exported(clf_mount, run_clf, monkeypatch, step):
    """The evaluation comes after the restart then, and its threshold and rank as the best belong to a checkpoint that exists."""
    words = {"max_steps": 4, "eval_steps": 2, "metric_for_best": "loss"}
    assert run_clf(clf_flags(clf_mount, "straight", **words)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert run_clf(clf_flags(clf_mount, "stopped", **words)) == common.EXIT_SAVED
    assert json.loads((clf_mount / "models" / "stopped" / f"checkpoint-{step}" / "rawtune.json").read_text())["threshold"] is None
    assert run_clf(clf_flags(clf_mount, "stopped", **words)) == 0
    straight, stopped = clf_mount / "models" / "straight", clf_mount / "models" / "stopped"
    for name in ("rawtune.json", "best.json", "preds.json", "test_preds.json", f"checkpoint-{step}/rawtune.json"):
        assert (straight / name).read_bytes() == (stopped / name).read_bytes(), name
    (a,), (b,) = rows(straight, "test"), rows(stopped, "test")
    assert a.keys() == b.keys() and "test/accuracy_at_threshold" in a and a["test/accuracy_at_threshold"] == b["test/accuracy_at_threshold"]


def test_a_continued_run_does_not_write_over_a_strangers_file(clf_mount, run_clf, monkeypatch, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "p.json"
    path.write_text("mine")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run_clf(clf_flags(clf_mount)) == common.EXIT_SAVED
    assert run_clf(clf_flags(clf_mount, pred_save_path=path)) == 2 and path.read_text() == "mine"


def test_a_run_is_not_continued_under_another_task_and_scoring_flags_may_change(clf_mount, run_clf, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run_clf(clf_flags(clf_mount)) == common.EXIT_SAVED
    for changes in ({"template": "a {input}"}, {"loss": "squared_error"}, {"class_weights": "balanced"}, {"positive_word": "a"}, {"target_max": 2}):
        assert run_clf(clf_flags(clf_mount, **changes)) == 2
        assert f"{next(iter(changes))}: None -> " in capsys.readouterr().err
    assert run_clf(clf_flags(clf_mount, scores_only=True, eval_batch_size=4)) == 0
    assert {tuple(row) for row in preds(clf_mount / "models" / "run" / "preds.json")} == {("pred_score",)}
