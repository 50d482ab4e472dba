"""Several ranks, every ZeRO stage: the same mathematics as one process, and no hang."""

import json

import pytest
from conftest import ROOT, distance, finish, flags, launch, ragged_records, rows, run_jobs, start, weights, write_model


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A mount whose runs several tests look at: the layout grid on two ranks, and its reference on one."""
    mount = tmp_path_factory.mktemp("grid")
    write_model(mount / "models" / "tiny")
    (mount / "data").mkdir()
    records = ragged_records(59)
    (mount / "data" / "ragged.json").write_text(json.dumps({"train": records[:43], "eval": records[43:54], "test": records[54:]}))
    jobs = [flags(mount, f"2x{stage}x{batch}x{accumulation}", ds_config=f"zero{stage}", train_batch_size=batch, max_steps=6,
                  gradient_accumulation_steps=accumulation)
            for stage in range(4) for batch, accumulation in ((8, 1), (2, 4))]
    run_jobs(mount, jobs, 2)
    return mount


@pytest.fixture
def one_rank(shared, run_main):
    """The same command on one process, stage 0, no accumulation."""
    if not (shared / "models" / "reference").exists():
        assert run_main(flags(shared, "reference", max_steps=6)) == 0
    return shared / "models" / "reference"


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("split", ["8x1", "2x4"])
def test_two_ranks_and_accumulation_give_the_losses_gradients_and_weights_of_one_batch(shared, one_rank, stage, split):
    """A1, A2, A3: step 6 is the partial one, 3 examples over up to 8 pieces, so some ranks hold no target at all. Data are
    ragged: dividing by local counts, or dropping the factor world, changes grad_norm in the first digit."""
    run = shared / "models" / f"2x{stage}x{split}"
    for mine, theirs in zip(rows(run), rows(one_rank), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
        assert mine["target_tokens"] == theirs["target_tokens"]
    assert distance(weights(one_rank), weights(run)) < 1e-6
    for split_name in ("eval", "test"):
        assert rows(run, split_name)[-1][f"{split_name}/loss"] == pytest.approx(rows(one_rank, split_name)[-1][f"{split_name}/loss"], rel=1e-6)


def test_the_learning_rate_is_its_closed_form_in_every_layout(shared, one_rank):
    """H1: the accumulation split does not step the schedule."""
    from common_v1 import lr_at
    expected = [lr_at(k, 0.01, "linear", 1, 6) for k in range(6)]
    for run in [one_rank, *(shared / "models").glob("2x*")]:
        assert [row["lr"] for row in rows(run)] == expected


def test_dropping_the_world_factor_would_be_seen(shared, one_rank, run_main, monkeypatch):
    """Negative control of the grid: the mutated loop (a mean over the wrong count) is far outside the bound."""
    import seq2seq
    real = seq2seq.TrainingData.micro_batches
    monkeypatch.setattr(seq2seq.TrainingData, "micro_batches", lambda self, step: (real(self, step)[0], real(self, step)[1] * 2))
    assert run_main(flags(shared, "mutated", max_steps=6, overwrite=True)) == 0
    assert abs(rows(shared / "models" / "mutated")[0]["grad_norm"] / rows(one_rank)[0]["grad_norm"] - 1) > 0.4


def test_a_zero3_export_has_whole_tensors_and_the_logits_of_the_run(shared, one_rank):
    """R5: plain transformers reloads it; tied weights once; no zero-size tensor."""
    import torch
    from transformers import AutoModelForSeq2SeqLM
    run = shared / "models" / "2x3x8x1"
    tensors = weights(run)
    assert "lm_head.weight" not in tensors and all(t.numel() for t in tensors.values())
    a, b = (AutoModelForSeq2SeqLM.from_pretrained(folder).eval() for folder in (run, one_rank))
    ids = torch.tensor([[5, 6, 7, 1]])
    assert torch.allclose(a(input_ids=ids, labels=ids).logits, b(input_ids=ids, labels=ids).logits, atol=1e-4)
    assert not torch.allclose(a(input_ids=ids, labels=ids).logits, a(input_ids=ids + 1, labels=ids).logits, atol=1e-4)


def predictions(folder):
    return {path.name: [[g["lm_postprocess"] for g in row["generations"]] for row in json.loads(path.read_text())]
            for path in sorted(folder.glob("*temperature*.json"))}


@pytest.mark.slow
def test_evaluation_is_the_same_on_any_number_of_ranks_for_any_size(shared, one_rank, run_main):
    """F1, E4: 1 to 9 rows on 1, 2 and 3 ranks, some without any; every row once; digits equal."""
    def jobs(n):
        for size in range(1, 10):
            (shared / "data" / f"dev{size}.json").write_text(json.dumps({"train": [], "eval": ragged_records(size, seed=size)}))
            yield flags(shared, f"dev{size}_{n}", model_init_name="reference", data=f"dev{size}", no_train=True, eval_batch_size=2,
                        train_batch_size=6, max_new_tokens=6)
    for n in (1, 2, 3):
        run_jobs(shared, list(jobs(n)), n)
    for size in range(1, 10):
        found = [rows(shared / "models" / f"dev{size}_{n}", "eval")[0] for n in (1, 2, 3)]
        for name in ("eval/loss", "eval/exact_match", "eval/token_f1"):
            assert found[0][name] == found[1][name] == found[2][name]
        assert predictions(shared / "models" / f"dev{size}_1") == predictions(shared / "models" / f"dev{size}_3")


@pytest.mark.slow
def test_zero3_generation_gathered_and_synced_equals_one_process_and_leaves_training_alone(tmp_path, run_main):
    """E1, E2, E3, E4: a trained model stops its answers at different lengths; 3 rows in batches of 2 leave one rank with
    less work; evaluation after every step does not change the training."""
    write_model(tmp_path / "models" / "tiny")
    (tmp_path / "data").mkdir()
    records = ragged_records(8)
    (tmp_path / "data" / "eight.json").write_text(json.dumps({"train": records, "eval": records[:3]}))
    base = dict(data="eight", max_new_tokens=40, eval_batch_size=2, learning_rate=0.015, warmup_steps=10)
    assert run_main(flags(tmp_path, "one", **base, max_steps=60, eval_steps=20)) == 0
    common_flags = dict(**base, ds_config="zero3", max_steps=60)
    run_jobs(tmp_path, [flags(tmp_path, "gathered", **common_flags, eval_steps=20, zero3_generation="gathered"),
                        flags(tmp_path, "synced", **common_flags, eval_steps=20, zero3_generation="synced"),
                        flags(tmp_path, "rarely", **common_flags),
                        flags(tmp_path, "sampled", **base, model_init_name="one", ds_config="zero3", no_train=True, temperature=1.0, n_samples=3)], 2)
    one, gathered, synced, rarely = (tmp_path / "models" / name for name in ("one", "gathered", "synced", "rarely"))
    assert predictions(one) == predictions(gathered) == predictions(synced)
    lengths = {len(texts[0].split()) for texts in predictions(one)["temperature=0.00_n=1_step=60.json"]}
    assert len(lengths) > 1, "the answers should end at different steps"
    assert distance(weights(gathered), weights(rarely)) == 0 and distance(weights(synced), weights(rarely)) == 0
    assert run_main(flags(tmp_path, "sampled1", **base, model_init_name="one", no_train=True, temperature=1.0, n_samples=3)) == 0
    assert predictions(tmp_path / "models" / "sampled") == predictions(tmp_path / "models" / "sampled1")


@pytest.mark.slow
def test_the_best_weights_are_exported_and_tested_under_zero3(tmp_path, run_main):
    """R7 under ZeRO-3: copied in place, no second engine."""
    write_model(tmp_path / "models" / "tiny")
    (tmp_path / "data").mkdir()
    records = ragged_records(59)
    for record in records[43:]:
        record["completion"] = "QXZWVUKJQXZWVUKJQXZWVUKJ"  # the loss of these soon rises
    (tmp_path / "data" / "other.json").write_text(json.dumps({"train": records[:43], "eval": records[43:54], "test": records[54:]}))
    run_jobs(tmp_path, [flags(tmp_path, "run", data="other", ds_config="zero3", max_steps=18, eval_steps=3, metric_for_best="loss",
                              learning_rate=0.03, save_total_limit=1)], 2)
    run = tmp_path / "models" / "run"
    best = json.loads((run / "best.json").read_text())["checkpoint"]
    assert best != "checkpoint-18" and distance(weights(run), weights(run / best)) == 0
    assert run_main(flags(tmp_path, "again", data="other", model_init_name="run", no_train=True)) == 0
    assert rows(tmp_path / "models" / "again", "test")[0]["test/loss"] == pytest.approx(rows(run, "test")[0]["test/loss"], rel=1e-6)


@pytest.mark.slow
def test_bad_input_ends_two_ranks_with_code_2_and_every_problem_named(mount):
    (mount / "data" / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "completion": ""}\nnot json\n')
    processes = start([ROOT / "seq2seq.py", *flags(mount, data="bad", train_batch_size=7)], 2)
    for process in processes:  # rank 1 speaks too only because no launcher ends it after rank 0
        codes, output = finish([process], 60)
        assert codes == [2]
        for words in ("bad.jsonl, line 1: no 'completion'", "line 2: 'completion' is empty", "line 3: not JSON", "--train_batch_size 7"):
            assert output.count(words) == 1, output


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["deepspeed", "--num_gpus", "4"], ["torchrun", "--nproc_per_node", "2"]])
def test_the_users_command_lines_run_under_the_launchers(tmp_path, launcher):
    """The README's command on a machine without GPUs, with a tiny model under the big one's name."""
    write_model(tmp_path / "models" / "flan-t5-xxl")
    (tmp_path / "data").mkdir()
    records = ragged_records(59)
    (tmp_path / "data" / "synthetic_explain.json").write_text(json.dumps({"train": records[:43], "eval": records[43:]}))
    launch(launcher, [ROOT / "seq2seq.py", *(
        "--model_init_name flan-t5-xxl --training_run_name 0216syn_explain --gradient_accumulation_steps 2 --train_batch_size 8 --max_steps 61 "
        "--data synthetic_explain --eval_steps 20 --temperature 0.001 --n_samples 1 --max_new_tokens 8").split()], tmp_path)
    assert (tmp_path / "models" / "0216syn_explain" / "temperature=0.00_n=1_step=60.json").exists()
    assert [row["step"] for row in rows(tmp_path / "models" / "0216syn_explain", "eval")] == [0, 20, 40, 60, 61]
