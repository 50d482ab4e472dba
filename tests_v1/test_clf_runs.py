"""clf.py's run folder: what a run leaves, predictions and their reuse, stopping and continuing. All in this process."""

import itertools
import json
import math
import os
import shutil
import signal
import sys
import types

import numpy as np
import pytest
import transformers
from conftest import clf_flags, distance, in_process, preds, rows, score_records, scores, stop_at, weights, write_clf_mount

import clf
import common_v1 as common

MILD = {"template": "{input}\\nIs it long?", "target_min": 1, "target_max": 5}  # targets from 1 to 5, as people rate
pytestmark = pytest.mark.usefixtures("no_pictures")  # but `shared` is made before it, with pictures
DRAW = clf.plot_reliability


def write_data(mount, name, **splits):
    (mount / "data" / f"{name}.json").write_text(json.dumps(splits))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A mount with models/run: 12 steps on ratings from 1 to 5 behind a template, evaluated every 4. Tests only read it,
    and write runs of other names."""
    mount, before = write_clf_mount(tmp_path_factory.mktemp("clf")), dict(os.environ)
    data = json.loads((mount / "data" / "scores.json").read_text())
    for record in [record for split in data.values() for record in split if "target" in record]:
        record["target"] = 1 + 4 * record["target"]
    write_data(mount, "ratings", **data)
    with pytest.MonkeyPatch.context() as patch:
        assert in_process("clf", patch)(clf_flags(mount, data="ratings", max_steps=12, eval_steps=4, save_steps=4, **MILD)) == 0
    os.environ.clear()
    os.environ.update(before)
    return mount


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_a_run_leaves_what_the_contract_names(shared):
    run = shared / "models" / "run"
    for name in ("args.json", "env.json", "ds_config.json", "metrics.jsonl", "rawtune.json", "config.json", "model.safetensors",
                 "COMPLETE", "log.txt",
                 "code/clf.py", "code/common_v1.py", "checkpoint-8/COMPLETE", "checkpoint-12/engine", "checkpoint-12/rawtune.json", "preds.json",
                 "test_preds.json", "rank_metrics.json", "test_rank_metrics.json", "reliability.png", "test_reliability.png", "curves.png",
                 "tokenizer_config.json"):
        assert (run / name).exists(), name
    assert sorted(p.name for p in run.glob("checkpoint-*-preds.json")) == sorted(f"checkpoint-{n}-preds.json" for n in (0, 4, 8, 12))
    assert not (run / "checkpoint-4").exists() and not list(run.glob("*.tmp")) and not list(run.glob("scores-*"))
    assert [row["step"] for row in rows(run, "eval")] == [0, 4, 8, 12] and [row["step"] for row in rows(run)] == list(range(1, 13))
    assert {"step", "epoch", "split", "time", "loss", "lr", "grad_norm", "tokens_per_sec", "padding_share", "peak_memory_gb"} <= rows(run)[-1].keys()
    assert distance(weights(run), weights(run / "checkpoint-12")) == 0
    assert (run / "reliability.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (run / "reliability.png").stat().st_size > 5000


def test_rawtune_json_says_how_to_score(shared):
    found = json.loads((shared / "models" / "run" / "rawtune.json").read_text())
    assert (found["format"], found["script"], found["task"], found["family"], found["adapter"]) == (1, "clf.py", "score", "seq2seq", "none")
    assert found["record_layout"] == {"template": "{input}\nIs it long?", "max_length": 512, "truncation": "end"}
    assert found["verbaliser"] == {"positive": "yes", "negative": "no", "positive_id": 3, "negative_id": 4}
    assert (found["target_min"], found["target_max"], found["loss"]) == (1, 5, "cross_entropy") and found["base"]["sha256"] is None
    assert found["threshold"] == rows(shared / "models" / "run", "eval")[-1]["eval/optimal_threshold"]


def test_predictions_are_the_records_in_order_with_scores_in_the_users_unit(shared):
    run, data = shared / "models" / "run", json.loads((shared / "data" / "ratings.json").read_text())
    for path, split in (("preds.json", "eval"), ("checkpoint-4-preds.json", "eval"), ("test_preds.json", "test")):
        found = preds(run / path)
        assert [row["orig_d"] for row in found] == data[split] and {tuple(row) for row in found} == {("orig_d", "pred_score", "dataset")}
        assert {row["dataset"] for row in found} == {"ratings"} and all(1 < row["pred_score"] < 5 for row in found)
    assert preds(run / "preds.json") == preds(run / "checkpoint-12-preds.json") != preds(run / "checkpoint-8-preds.json")
    assert sum("target" not in row["orig_d"] for row in preds(run / "preds.json")) == 3


def test_metrics_are_of_the_rows_with_targets_and_in_the_users_unit(shared):
    run = shared / "models" / "run"
    for prefix, split in (("", "eval"), ("test_", "test")):
        found = [(row["pred_score"], row["orig_d"]["target"]) for row in preds(run / f"{prefix}preds.json") if "target" in row["orig_d"]]
        score, target = np.array(found).T
        last = rows(run, split)[-1]
        assert last[f"{split}/rmse"] == pytest.approx(np.sqrt(np.mean((score - target) ** 2)))
        assert last[f"{split}/accuracy"] == pytest.approx(np.mean((score >= 3) == (target > 3)))
        ranked = json.loads((run / f"{prefix}rank_metrics.json").read_text())
        assert len(ranked["pred_scores"]) == len(score) and ranked["gold_scores"] == pytest.approx(((target - 1) / 4).tolist())
        assert ranked["accuracy"] == pytest.approx(np.mean([(np.mean(score <= s) > 0.5) == (t > 3) for s, t in found]))


def test_the_threshold_is_chosen_on_eval_and_used_for_test(shared):
    run = shared / "models" / "run"
    threshold, last = json.loads((run / "rawtune.json").read_text())["threshold"], rows(run, "test")[-1]
    found = [(row["pred_score"] >= threshold) == (row["orig_d"]["target"] > 3) for row in preds(run / "test_preds.json")]
    assert last["test/accuracy_at_threshold"] == pytest.approx(np.mean(found)) and "test/optimal_threshold" not in last
    chosen = [(row["pred_score"], row["orig_d"]["target"] > 3) for row in preds(run / "preds.json") if "target" in row["orig_d"]]
    best = max(np.mean([(s >= t) == y for s, y in chosen]) for t in np.linspace(1, 5, 4001))
    assert np.mean([(s >= threshold) == y for s, y in chosen]) == pytest.approx(best) == pytest.approx(rows(run, "eval")[-1]["eval/optimal_accuracy"])


# ------------------------------------------------------------------------------------------------ scoring with it


@pytest.mark.parametrize("source", ["run", "run/checkpoint-12"])
def test_a_trained_model_reproduces_its_scores_to_the_last_digit_and_brings_its_layout(shared, run_clf, capsys, source):
    name = source.replace("/", "-") + "-scored"
    assert run_clf(clf_flags(shared, name, data="ratings", model_init_name=None, model_init_path=shared / "models" / source, no_train=True)) == 0
    run, again = shared / "models" / "run", shared / "models" / name
    for path in ("preds.json", "test_preds.json", "rank_metrics.json", "test_rank_metrics.json"):
        assert (again / path).read_bytes() == (run / path).read_bytes(), path
    assert rows(again, "eval")[0]["eval/loss"] == rows(run, "eval")[-1]["eval/loss"]
    for metric in ("accuracy_at_threshold", "f1_at_threshold"):
        assert rows(again, "test")[0][f"test/{metric}"] == rows(run, "test")[-1][f"test/{metric}"]
    assert "WARNING" not in capsys.readouterr().err and not (again / "model.safetensors").exists()
    assert not list(again.glob("scores-*"))


def test_training_on_goes_on_from_the_trained_weights_and_layout(shared, run_clf):
    assert run_clf(clf_flags(shared, "more", data="ratings", model_init_name="run", max_steps=1)) == 0
    more, run = shared / "models" / "more", shared / "models" / "run"
    assert preds(more / "checkpoint-0-preds.json") == preds(run / "preds.json") != preds(run / "checkpoint-0-preds.json")
    found = json.loads((more / "rawtune.json").read_text())
    assert found["record_layout"]["template"] == "{input}\nIs it long?" and found["target_max"] == 5 and found["base"]["sha256"]


def test_flags_that_differ_from_the_models_are_warned_about_and_equal_ones_are_not(shared, run_clf, capsys):
    assert run_clf(clf_flags(shared, "same", data="ratings", model_init_name="run", no_train=True, **MILD)) == 0
    assert "was trained with" not in capsys.readouterr().err
    other = {"template": "{input}", "target_max": 6.0, "positive_word": "a", "max_length": 100, "loss": "squared_error"}
    assert run_clf(clf_flags(shared, "other", data="ratings", model_init_name="run", no_train=True, **other)) == 0
    error = capsys.readouterr().err
    assert [name for name in other if f"WARNING --{name} {other[name]}: the model was trained with" not in error] == []
    assert scores(shared / "models" / "other" / "preds.json") != scores(shared / "models" / "run" / "preds.json")


def test_scores_only_and_pred_save_path(shared, run_clf, tmp_path, capsys):
    words = clf_flags(shared, None, data="ratings", model_init_name="run", no_train=True, scores_only=True,
                      pred_save_path=tmp_path / "new" / "p.json")
    assert run_clf(words) == 0
    for name in ("", "test_"):
        assert preds(tmp_path / "new" / f"{name}p.json") == [{"pred_score": s} for s in scores(shared / "models" / "run" / f"{name}preds.json")]
    folder = shared / "models" / "run_ratings_eval"
    assert (folder / "metrics.jsonl").exists() and not (folder / "preds.json").exists()
    assert run_clf(words) == 2 and f"{tmp_path}/new/p.json exists" in capsys.readouterr().err


def test_predictions_of_an_earlier_scoring_are_never_overwritten(shared, run_clf, tmp_path, capsys):
    words = clf_flags(shared, "twice", data="ratings", model_init_name="run", no_train=True)
    assert run_clf(words) == 0 and run_clf(words) == 2 and "preds.json exists" in capsys.readouterr().err
    (tmp_path / "test_p.json").write_text("mine")
    assert run_clf([*words, "--training_run_name", "thrice", "--pred_save_path", str(tmp_path / "p.json")]) == 2
    assert (tmp_path / "test_p.json").read_text() == "mine"


@pytest.mark.parametrize("size", [1, 4])
def test_scores_do_not_depend_on_the_evaluation_batch(shared, run_clf, size):
    assert run_clf(clf_flags(shared, f"batch{size}", data="ratings", model_init_name="run", no_train=True, eval_batch_size=size)) == 0
    assert scores(shared / "models" / f"batch{size}" / "preds.json") == pytest.approx(scores(shared / "models" / "run" / "preds.json"), abs=1e-6)


@pytest.mark.parametrize("name", ["bare.jsonl", "bare_list.json"])
def test_bare_json_lines_and_bare_lists_are_scored_in_order(shared, run_clf, name):
    records = [{"input": r["input"]} for r in score_records(43 + 11)[43:]]
    (shared / "data" / name).write_text(json.dumps(records) if name.endswith(".json") else "".join(json.dumps(r) + "\n" for r in records))
    assert run_clf(clf_flags(shared, None, data=name.split(".")[0], model_init_name="run", no_train=True)) == 0
    folder = shared / "models" / f"run_{name.split('.')[0]}_eval"
    assert scores(folder / "preds.json") == scores(shared / "models" / "run" / "preds.json")
    assert not (folder / "rank_metrics.json").exists() and "eval/loss" not in rows(folder, "eval")[0]


# ------------------------------------------------------------------------------------------------ scoring, interrupted


@pytest.fixture
def scored(shared, run_clf, monkeypatch):
    """scored(run, **flags) -> (exit code, texts that went through the model), with 4 texts a shard."""
    monkeypatch.setattr(clf, "SHARD", 4)
    counted, collate = [], clf.collate
    monkeypatch.setattr(clf, "collate", lambda texts, pad_id: (counted.extend(texts), collate(texts, pad_id))[1])

    def scored(run, **changes):
        counted.clear()
        return run_clf(clf_flags(shared, run, **{"data": "ratings", "model_init_name": "run", "no_train": True, **changes})), len(counted)
    return scored


def test_an_interrupted_scoring_goes_on_behind_the_last_whole_shard(shared, scored, monkeypatch):
    """A kill may leave part of a shard in the file: 4 of 11 texts and some bytes more. What was scored is not scored again, and
    what is added comes where the part was."""
    models = shared / "models"
    assert scored("calm") == (0, 16)
    for n_texts in (4, 8):
        with monkeypatch.context() as patch:
            stop_at(patch, 1)
            assert scored("cut") == (common.EXIT_SAVED, 4)
        (partial,) = (models / "cut").glob("scores-*-eval-0.f64")
        assert partial.stat().st_size == 8 * n_texts
        partial.write_bytes(partial.read_bytes() + b"half a number and more"[: 8 * 2 + 3])
    shutil.copytree(models / "cut", models / "poisoned")
    assert scored("cut") == (0, 11 - 8 + 5)
    for name in ("preds.json", "test_preds.json", "rank_metrics.json"):
        assert (models / "cut" / name).read_bytes() == (models / "calm" / name).read_bytes()
    assert not list((models / "cut").glob("*.f64"))
    poisoned = models / "poisoned" / partial.name
    poisoned.write_bytes(np.full(8, 1.5).tobytes())
    assert scored("poisoned") == (0, 8)  # the file really is what is continued
    found = scores(models / "poisoned" / "preds.json")
    assert len(set(found[:8])) == 1 and found[8:] == scores(models / "calm" / "preds.json")[8:]


def test_partial_scores_of_another_model_are_not_taken(shared, scored, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert scored("switched") == (common.EXIT_SAVED, 8)
    shutil.copytree(shared / "models" / "run" / "checkpoint-8", shared / "models" / "eight")
    assert scored("switched", model_init_name="eight") == (0, 16)


def test_a_scoring_that_was_stopped_in_the_test_split_goes_on(shared, scored, monkeypatch):
    assert scored("calm test")[0] == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 4)  # eval has shards 1 to 3
        assert scored("cut test") == (common.EXIT_SAVED, 15)
    assert scored("cut test")[0] == 0 and len(rows(shared / "models" / "cut test", "eval")) == 1
    for name in ("preds.json", "test_preds.json"):
        assert (shared / "models" / "cut test" / name).read_bytes() == (shared / "models" / "calm test" / name).read_bytes()


def test_sigterm_during_scoring_leaves_with_75_and_says_so(shared, scored, monkeypatch, capsys):
    collate = clf.collate
    with monkeypatch.context() as patch:
        patch.setattr(clf, "collate", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), collate(*a))[1])
        assert scored("terminated") == (common.EXIT_SAVED, 4)
    assert "SIGTERM: 4 of 11 texts are scored; the same command continues from here" in capsys.readouterr().out
    assert not (shared / "models" / "terminated" / "preds.json").exists()
    assert scored("terminated") == (0, 12) and "4 of 11 texts were scored before" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ training's last word


def test_the_best_checkpoint_is_kept_scored_tested_and_exported(clf_mount, run_clf):
    """The evaluation targets are training's turned round, so that learning by heart soon makes their loss rise."""
    records = [r for r in score_records(43)]
    turned = [{**r, "target": 1 - r["target"]} for r in records[:11]]
    write_data(clf_mount, "turned", train=records, eval=turned, test=turned[:5])
    assert run_clf(clf_flags(clf_mount, data="turned", max_steps=40, eval_steps=4, metric_for_best="loss", save_total_limit=1,
                             early_stopping_patience=3)) == 0
    run = clf_mount / "models" / "run"
    losses = {row["step"]: row["eval/loss"] for row in rows(run, "eval") if row["step"]}
    best_step, best = min(losses, key=losses.get), json.loads((run / "best.json").read_text())
    assert best["checkpoint"] == f"checkpoint-{best_step}" and best["value"] == losses[best_step] and best["metric"] == "loss"
    assert best_step < max(losses) == best_step + 12 < 40  # stopped three evaluations later
    assert preds(run / "preds.json") == preds(run / f"checkpoint-{best_step}-preds.json") != preds(run / f"checkpoint-{max(losses)}-preds.json")
    assert distance(weights(run), weights(run / f"checkpoint-{best_step}")) == 0 < distance(weights(run), weights(run / f"checkpoint-{max(losses)}"))
    thresholds = {row["step"]: row["eval/optimal_threshold"] for row in rows(run, "eval")}
    assert json.loads((run / "rawtune.json").read_text())["threshold"] == thresholds[best_step]
    assert run_clf(clf_flags(clf_mount, "again", data="turned", model_init_name="run", no_train=True)) == 0
    for name in ("preds.json", "test_preds.json"):
        assert preds(clf_mount / "models" / "again" / name) == preds(run / name)


def test_a_metric_where_more_is_better_keeps_the_highest(clf_mount, run_clf):
    assert run_clf(clf_flags(clf_mount, max_steps=12, eval_steps=2, metric_for_best="spearman")) == 0
    run = clf_mount / "models" / "run"
    found = {row["step"]: row["eval/spearman"] for row in rows(run, "eval") if row["step"]}
    assert json.loads((run / "best.json").read_text())["value"] == max(found.values()) > min(found.values())


def test_a_missing_matplotlib_costs_the_picture_and_one_line(clf_mount, run_clf, monkeypatch, capsys):
    monkeypatch.setattr(clf, "plot_reliability", DRAW)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_data(clf_mount, "plain", eval=score_records(5))
    assert run_clf(clf_flags(clf_mount, data="plain", no_train=True)) == 0
    assert capsys.readouterr().out.count("no reliability.png: package 'matplotlib' is not installed") == 1
    assert not list((clf_mount / "models" / "run").glob("*.png")) and (clf_mount / "models" / "run" / "preds.json").exists()


def test_a_reward_model_leaves_scores_and_rewards_of_every_reply(clf_mount, run_clf):
    assert run_clf(clf_flags(clf_mount, data="pairs", loss="pairwise", max_steps=4, metric_for_best="accuracy")) == 0
    run, data = clf_mount / "models" / "run", json.loads((clf_mount / "data" / "pairs.json").read_text())
    found, rawtune = preds(run / "preds.json"), json.loads((run / "rawtune.json").read_text())
    assert [row["orig_d"] for row in found] == data["eval"]
    assert [len(row["reward"]) for row in found] == [len(record.get("replies", "12")) for record in data["eval"]]
    assert all(row["pred_score"] == pytest.approx([1 / (1 + math.exp(-z)) for z in row["reward"]]) for row in found)
    assert (rawtune["task"], rawtune["loss"], rawtune["threshold"]) == ("preference", "pairwise", None)
    assert rawtune["record_layout"]["template"] == "{prompt}\n\n{reply}" and not (run / "rank_metrics.json").exists()
    right = [np.mean([a > b for a, b in itertools.combinations(row["reward"], 2)]) for row in found]
    assert rows(run, "eval")[-1]["eval/accuracy"] == pytest.approx(np.mean(right)) and {"eval/kendall", "eval/margin"} <= rows(run, "eval")[-1].keys()
    assert run_clf(clf_flags(clf_mount, "again", data="pairs", model_init_name="run", no_train=True)) == 0
    assert preds(clf_mount / "models" / "again" / "preds.json") == found
    single = [{"prompt": r["prompt"], "reply": reply} for r in data["eval"] if "chosen" in r for reply in (r["chosen"], r["rejected"])]
    write_data(clf_mount, "single", eval=[*single, data["eval"][2]])  # one reply at a time, as PPO would have them scored
    assert run_clf(clf_flags(clf_mount, "single", data="single", model_init_name="run", no_train=True)) == 0
    *one_by_one, ranked = preds(clf_mount / "models" / "single" / "preds.json")
    pairs = [row for row in found if "chosen" in row["orig_d"]]
    for name in ("reward", "pred_score"):
        assert [row[name] for row in one_by_one] == pytest.approx([value for row in pairs for value in row[name]], abs=1e-5)
    assert ranked["orig_d"] == data["eval"][2] and ranked["reward"] == pytest.approx(found[2]["reward"], abs=1e-5)
    last = rows(clf_mount / "models" / "single", "eval")[-1]  # only what has replies to compare counts
    assert last["eval/margin"] == pytest.approx(np.mean([a - b for a, b in itertools.combinations(ranked["reward"], 2)]))


def test_several_data_sets_are_mixed_and_scored_apart(clf_mount, run_clf):
    records = score_records(59, seed=1)
    write_data(clf_mount, "b", train=records[:43], eval=records[43:50], test=records[50:])
    assert run_clf(clf_flags(clf_mount, data=["scores:10", "b:0.5"], max_steps=None, num_epochs=2, metric_for_best="b/auc")) == 0
    run = clf_mount / "models" / "run"
    assert rows(run)[-1]["step"] == 2 * math.ceil((10 + 22) / 8)
    last, found = rows(run, "eval")[-1], preds(run / "preds.json")
    assert [row["dataset"] for row in found] == ["scores"] * 11 + ["b"] * 7
    n = {"scores": 8, "b": 7}  # with a target
    assert last["eval/brier"] == pytest.approx(sum(last[f"eval/{name}/brier"] * n[name] for name in n) / 15)
    assert "test/b/loss" in rows(run, "test")[-1]
    assert last["eval/scores/brier"] != last["eval/b/brier"]


def test_debug_is_ten_steps_and_at_most_100_evaluation_rows(clf_mount, run_clf):
    write_data(clf_mount, "long", train=score_records(40), eval=score_records(130, seed=1), test=score_records(3, seed=2))
    assert run_clf(clf_flags(clf_mount, data="long", debug=True, max_steps=None)) == 0
    run = clf_mount / "models" / "run"
    assert rows(run)[-1]["step"] == 10 and len(preds(run / "preds.json")) == 100 and len(preds(run / "test_preds.json")) == 3


# ------------------------------------------------------------------------------------------------ ensemble


def write_predictions(folder, name, values, only_scores=False, texts="abc"):
    records = [{"input": text, "target": i / 2} for i, text in enumerate(texts)]
    whole = [{"orig_d": r, "pred_score": v, "dataset": "d"} for r, v in zip(records, values)]
    (folder / name).write_text(json.dumps([{"pred_score": v} for v in values] if only_scores else whole))
    return folder / name


def test_ensembles_by_rank_and_by_logit_are_those_by_hand(tmp_path, run_clf, capsys):
    a, b = write_predictions(tmp_path, "a.json", [0.1, 0.6, 0.6]), write_predictions(tmp_path, "b.json", [0.9, 0.2, 0.95])
    expected = {"rank": [(1 / 3 + 2 / 3) / 2, (1 + 1 / 3) / 2, 1.0], "logit": []}
    for p, q in zip([0.1, 0.6, 0.6], [0.9, 0.2, 0.95]):
        mean = (math.log(p / (1 - p)) + math.log(q / (1 - q))) / 2
        expected["logit"].append(1 / (1 + math.exp(-mean)))
    for how, values in expected.items():
        assert run_clf(["--ensemble", a, b, "--ensemble_by", how, "--pred_save_path", tmp_path / "out" / f"{how}.json"]) == 0
        found = preds(tmp_path / "out" / f"{how}.json")
        assert [row["pred_score"] for row in found] == pytest.approx(values) and [row["orig_d"] for row in found] == [r["orig_d"] for r in preds(a)]
        assert "auc 1 " in capsys.readouterr().out
    assert run_clf(["--ensemble", a, b, "--pred_save_path", tmp_path / "s.json", "--scores_only"]) == 0
    assert scores(tmp_path / "s.json") == pytest.approx(expected["rank"]) and {tuple(row) for row in preds(tmp_path / "s.json")} == {("pred_score",)}


def test_ensembles_of_other_units_and_of_scores_only(tmp_path, run_clf, capsys):
    a, b = (write_predictions(tmp_path, f"{n}.json", values, True) for n, values in (("a", [1.0, 3.0, 5.0]), ("b", [3.0, 3.0, 5.0])))
    words = ["--ensemble", a, b, "--ensemble_by", "logit", "--target_min", 1, "--target_max", 5]
    assert run_clf([*words, "--pred_save_path", tmp_path / "out.json"]) == 0
    assert scores(tmp_path / "out.json")[1:] == pytest.approx([3, 5], abs=1e-6) and "no targets" in capsys.readouterr().out
    layout = types.SimpleNamespace(target_min=-0.1, target_max=0.2)
    sure = write_predictions(tmp_path, "sure.json", clf.to_user(layout, np.array([-50.0, 0.0, 50.0])).tolist(), True)
    assert run_clf(["--ensemble", sure, sure, "--target_min", -0.1, "--target_max", 0.2, "--pred_save_path", tmp_path / "saturated.json"]) == 0


@pytest.mark.parametrize("name, content, named", [
    ("other texts", {"texts": "abd"}, "other records than"), ("another order", {"texts": "acb"}, "other records than"),
    ("shorter", {"texts": "ab"}, "other records"),
    ("out of range", {"values": [0.1, 1.2, 0.3]}, "from 0 to 1"), ("lists", {"values": [[0.1, 0.2]] * 3}, "expected one score"),
    ("missing", None, "no predictions file"), ("not JSON", "x", "no predictions file"), ("no scores", "[{}]", "KeyError")])
def test_files_that_do_not_match_are_refused(tmp_path, run_clf, capsys, name, content, named):
    good, bad = write_predictions(tmp_path, "good.json", [0.1, 0.2, 0.3]), tmp_path / "bad.json"
    if isinstance(content, str):
        bad.write_text(content)
    elif content:
        write_predictions(tmp_path, "bad.json", content.get("values", [0.1, 0.2, 0.3]), texts=content.get("texts", "abc"))
    words = ["--ensemble", good, bad, "--pred_save_path", tmp_path / "out.json"]
    assert run_clf(words) == 2 and not (tmp_path / "out.json").exists()
    error = capsys.readouterr().err
    assert named in error and str(bad) in error


def test_an_ensemble_never_overwrites_and_needs_a_place(tmp_path, run_clf, capsys):
    good = write_predictions(tmp_path, "good.json", [0.1, 0.2, 0.3])
    before = good.read_bytes()
    assert run_clf(["--ensemble", good, good, "--pred_save_path", good]) == 2 and good.read_bytes() == before
    assert run_clf(["--ensemble", good, good]) == 2 and "--ensemble needs --pred_save_path" in capsys.readouterr().err


def test_help_shows_every_flag_of_the_script(capsys):
    with pytest.raises(SystemExit) as stop:
        clf.parse_args(["-h"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{name} " in shown for name in (*clf.LAYOUT, "class_weights", "ensemble", "pred_save_path"))


def test_an_unknown_family_and_a_model_without_weights_are_told_apart(clf_mount, run_clf, capsys):
    """A folder without weights is trained from scratch and says so; the same command twice gives the same scores."""
    for name in ("one", "two"):
        assert run_clf(clf_flags(clf_mount, name, model_init_name="llama", no_train=True)) == 0
        assert "llama has no weights" in capsys.readouterr().out
    a, b = (scores(clf_mount / "models" / name / "preds.json") for name in ("one", "two"))
    assert a == b and len(set(a)) == 11
    transformers.BertConfig().save_pretrained(clf_mount / "models" / "llama")
    assert run_clf(clf_flags(clf_mount, "bert", model_init_name="llama", no_train=True)) == 2
