"""Scripts of version 1 read the runs of seq2seq.py, which is of version 2, and it reads theirs: design, sections 9.3 and 9.4."""

import json

import pytest
import score_predictions
from conftest import flags, in_process, ragged_records, rows, score_records, write_model


KINDS = {"full": {}, "lora": {"lora_rank": 2, "lora_targets": "all-linear"}, "bottleneck": {"train_adapter": True, "reduction_factor": 8}}


def quick(mount, run, **changes):
    return flags(mount, run, **{"model_init_name": None, "max_steps": 2, "learning_rate": 0.001, "warmup_steps": 0, "max_new_tokens": None, **changes})


def ppo_flags(mount, run, policy, **changes):
    return quick(mount, run, policy=policy, reward_fn=f"{mount}/reward.py:variety", num_rollouts=16, ppo_epochs=1, rollout_batch_size=8, max_new_tokens=6,
                 **changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """models/full, a tiny T5 that answers with words, and an adapter of it of each kind; data/ragged.json, data/scores.json, ask.jsonl."""
    mount = tmp_path_factory.mktemp("contract")
    (mount / "data").mkdir()
    records = [{**record, "skill": "ab"[i % 2]} for i, record in enumerate(ragged_records(59))]
    (mount / "data" / "ragged.json").write_text(json.dumps({"train": records[:43], "eval": records[43:54], "test": records[54:]}))
    (mount / "data" / "scores.json").write_text(json.dumps({"train": score_records(20), "eval": score_records(6, 1)}))
    (mount / "ask.jsonl").write_text("".join(json.dumps({"prompt": record["prompt"]}) + "\n" for record in records[43:54]))
    (mount / "reward.py").write_text("def variety(prompts, replies, records):\n    return [len(set(r)) / 10 for r in replies]\n")
    write_model(mount / "models" / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        run_main = in_process("seq2seq", patch)
        for name, words in KINDS.items():
            base = "full" if words else "tiny"
            assert run_main(flags(mount, name, model_init_name=base, max_steps=20 if words else 150, max_new_tokens=8, **words)) == 0
    return mount


@pytest.mark.parametrize("kind", KINDS)
def test_chat_answers_a_file_as_the_run_did_in_its_evaluation(place, kind, monkeypatch, tmp_path):
    run = place / "models" / kind
    words = ["--model_path", run, "--input", place / "ask.jsonl", "--output", tmp_path / "out.jsonl", "--temperature", 0, "--max_new_tokens", 8]
    assert in_process("chat", monkeypatch)(words) == 0
    predictions = json.loads((run / f"temperature=0.00_n=1_step={rows(run, 'eval')[-1]['step']}.json").read_text())
    replies = [json.loads(line)["replies"][0] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert replies == [row["generations"][0]["lm_postprocess"] for row in predictions] and len(set(replies)) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_policy_and_a_classifier(place, kind, run_ppo, run_clf, no_pictures):
    assert run_ppo(ppo_flags(place, f"ppo-{kind}", kind)) == 0
    assert run_clf(quick(place, f"clf-{kind}", model_init_name=kind, data="scores")) == 0
    records = [json.loads((place / "models" / f"{script}-{kind}" / "rawtune.json").read_text()) for script in ("ppo", "clf")]
    assert [record["adapter"] for record in records] == [{"full": "none"}.get(kind, kind)] * 2


@pytest.mark.parametrize("words", KINDS.values(), ids=KINDS)
def test_policies_of_rl_ppo_are_trained_on_as_they_answer(place, words, run_main, run_ppo, no_pictures):
    name = f"policy-{next(iter(words), 'full')}"
    assert run_ppo(ppo_flags(place, name, "full", **words)) == 0
    assert run_main(quick(place, f"{name}-on", model_init_name=name, max_new_tokens=6)) == 0
    before = json.loads((place / "models" / name / "temperature=0.00_n=1_step=2.json").read_text())
    after = json.loads((place / "models" / f"{name}-on" / "temperature=0.00_n=1_step=0.json").read_text())
    assert [r["generations"][0]["lm_postprocess"] for r in before] == [r["generations"][0]["lm_postprocess"] for r in after]


def test_predictions_are_scored(place, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    path = place / "models" / "full" / "temperature=0.00_n=1_step=150.json"
    assert score_predictions.main(["--predictions", str(path)]) == 0
    last = rows(place / "models" / "full", "eval")[-1]
    assert capsys.readouterr().out.startswith(f"all (11 predictions): exact_match {100 * last['eval/exact_match']:.4f}  rouge1 ")
