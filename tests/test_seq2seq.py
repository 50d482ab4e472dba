"""seq2seq.py: data by hand, loss and gradients against a slow reference, whole runs."""

import json
import os
import pathlib
import shutil
import signal
import tempfile
import types

import conftest
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import test_runs
import torch
import torch.nn.functional as F
import transformers
from conftest import make_model, metrics, pairs, write_data

import common
import seq2seq

KINDS = ["t5", "t5v1.1", "mt5", "bart"]

# --------------------------------------------------------------------------------------------- data


def load(flags=""):
    """Data of data/d.json with the tiny T5's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(conftest.ROOT / "models" / "tiny-t5")
    args = seq2seq.parse_args(f"--model_init_name t5 --data d {flags}".split())
    problems = []
    data = seq2seq.load_records(args, tokenizer, problems)
    assert problems == []
    return data, tokenizer


def texts_of(rows, tokenizer):
    """[(prompt, completion)] as chosen."""
    sources, targets = rows.fetch(range(len(rows.lengths)))
    texts = []
    for i in sources:
        pair = (sources[i].tolist(), targets[i].tolist())
        texts.append(tuple(seq2seq.decode(tokenizer, ids) for ids in pair))
    return texts


def test_prompts_and_completions_become_token_ids():
    records = [
        {"prompt": "spell 4", "completion": "four", "id": 9},
        {"instruction": "spell", "input": "4", "output": "four"},
        {"instruction": "spell", "input": "", "output": "four"},
    ]
    write_data("d", records, [{**records[0], "references": ["4", "IV"]}])
    data, tokenizer = load()
    sources, targets = data.rows["train"].fetch(range(3))
    for i, prompt in enumerate(["spell 4", "spell\n\n4", "spell"]):
        assert sources[i].tolist() == tokenizer(prompt).input_ids
        assert targets[i].tolist() == tokenizer("four").input_ids
    assert targets[0][-1] == tokenizer.eos_token_id
    assert data.examples["eval"][0].references == ["4", "IV"]


def test_what_is_too_long_is_cut_and_a_cut_completion_does_not_end(capsys):
    record = {"prompt": "one two three four", "completion": "five six seven eight"}
    write_data("d", [record], [record])
    data, tokenizer = load("--max_source_length 5 --max_target_length 3")
    sources, targets = data.rows["train"].fetch([0])
    prompt_ids = tokenizer(record["prompt"]).input_ids
    assert sources[0].tolist() == [*prompt_ids[:4], tokenizer.eos_token_id]
    assert targets[0].tolist() == tokenizer(record["completion"]).input_ids[:3]
    assert "1 of 1 prompts are cut" in capsys.readouterr().out


def test_training_draws_from_lists_and_evaluation_takes_the_firsts():
    record = {"prompt": ["a", "b", "c"], "completion": ["1", "2"]}
    write_data("d", [record] * 200, [record])
    data, tokenizer = load()
    rows = data.rows["train"]
    rows.start_epoch(seed=0, epoch=0)
    drawn = texts_of(rows, tokenizer)
    for prompt in "abc":
        for completion in "12":
            assert 15 < drawn.count((prompt, completion)) < 55  # 33 of 200
    rows.start_epoch(seed=0, epoch=1)
    assert texts_of(rows, tokenizer) != drawn
    rows.start_epoch(seed=0, epoch=0)
    assert texts_of(rows, tokenizer) == drawn
    assert texts_of(data.rows["eval"], tokenizer) == [("a", "1")]
    assert data.examples["eval"][0].references == ["1", "2"]


def test_eval_fraction_keeps_repeats_together_and_adds_to_an_eval_list():
    records = pairs(200)
    for i, record in enumerate(records):
        record["prompt"] += f" or {i // 2}"  # mostly twice
    write_data("d", records, pairs(1, start=500))
    data, tokenizer = load("--eval_fraction 0.3")
    held_out = {example.prompts[0] for example in data.examples["eval"]}
    trained = {prompt for prompt, _ in texts_of(data.rows["train"], tokenizer)}
    n_held_out = len(data.examples["eval"]) - 1
    assert 30 < n_held_out < 90 and not held_out & trained
    assert data.sizes == [200 - n_held_out]
    again, _ = load("--eval_fraction 0.3 --seed 5")
    assert again.examples["eval"] == data.examples["eval"]


def test_collate_by_hand():
    config = types.SimpleNamespace(decoder_start_token_id=3, pad_token_id=9)
    sources = {4: [11, 12, 1], 7: [13, 1]}
    targets = {4: [21, 1], 7: [22, 23, 1]}
    packed = seq2seq.collate([[4, 7], [7]], sources, targets, config)
    expected = {
        "input_ids": [[11, 12, 1, 13, 1], [13, 1, 9, 9, 9]],
        "segment": [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]],
        "decoder_input_ids": [[3, 21, 3, 22, 23], [3, 22, 23, 9, 9]],
        "decoder_segment": [[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]],
        "labels": [21, 1, 22, 23, 1, 22, 23, 1],
        "label_example": [4, 4, 7, 7, 7, 7, 7, 7],
        "label_index": [0, 1, 2, 3, 4, 5, 6, 7],
    }
    assert {name: tensor.tolist() for name, tensor in packed.items()} == expected
    apart = seq2seq.collate([[4], [7]], sources, targets, config)
    assert apart["label_index"].tolist() == [0, 1, 3, 4, 5]  # of 2 x 3 positions


def test_pack_keeps_every_example_and_leaves_little_padding():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal([3, 2], 0.7, (300, 2)).astype(int) + 1
    ids = rng.permutation(300)[:64]
    rows = seq2seq.pack(ids, lengths, d_model=256)
    assert sorted(sum(rows, [])) == sorted(ids)
    filled = np.array([lengths[row].sum(axis=0) for row in rows])
    n_computed = len(rows) * filled.max(axis=0).sum()
    assert filled.sum() / n_computed > 0.9


# ---------------------------------------------------------------------------------- loss, gradients

ROWS = [[0, 3], [1], [2, 4]]


def make_losses(kind):
    """(TargetLosses, sources, targets of five examples) of a small model."""
    path = make_model(kind)
    auto_class = transformers.AutoModelForSeq2SeqLM
    common.untie_head(auto_class, transformers.AutoConfig.from_pretrained(path))
    model = auto_class.from_pretrained(path)
    rng = np.random.default_rng(0)
    sources, targets = {}, {}
    for i in range(5):
        sources[i] = rng.integers(3, 300, 3 + 4 * i)
        targets[i] = rng.integers(3, 300, 9 - 2 * i)
    return seq2seq.TargetLosses(model), sources, targets


def make_batch(losses, sources, targets, rows=ROWS):
    if losses.model.config.model_type == "bart":
        rows = [[i] for row in rows for i in row]
    return seq2seq.collate(rows, sources, targets, losses.model.config)


def reference_losses(model, source, target):
    """(n,) of one example alone, by the model's own forward."""
    logits = model(input_ids=torch.tensor([source]), labels=torch.tensor([target])).logits[0]
    return F.cross_entropy(logits, torch.tensor(target), reduction="none")


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_single_examples(kind):
    losses_of, sources, targets = make_losses(kind)
    model = losses_of.model
    batch = make_batch(losses_of, sources, targets)
    n_logits = []
    head = model.get_output_embeddings()
    head.register_forward_hook(
        lambda module, states, logits: n_logits.append(logits[..., 0].numel())
    )
    losses = losses_of(batch, n_chunks=3)
    losses.sum().backward()
    grads = conftest.gradients(model)
    # of the 25 targets and nothing else, in 3 chunks, and again in the backward pass
    assert kind == "bart" or n_logits == [9, 8, 8, 8, 8, 9]
    for i in range(5):
        expected = reference_losses(model, sources[i].tolist(), targets[i].tolist())
        expected.sum().backward()
        torch.testing.assert_close(
            losses[batch["label_example"] == i], expected, atol=1e-5, rtol=1e-5
        )
    for name, expected_grad in conftest.gradients(model).items():
        error = (grads[name] - expected_grad).norm()
        assert error < 1e-5 * expected_grad.norm() + 1e-6, name
    with torch.no_grad():
        evaluated = losses_of(batch)
    torch.testing.assert_close(evaluated[0], losses.detach())


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_rank_without_examples_has_a_loss_of_zero_and_no_gradient(kind):
    losses_of, _, _ = make_losses(kind)
    batch = seq2seq.collate([], {}, {}, losses_of.model.config)
    losses = losses_of(batch, n_chunks=2)
    losses.sum().backward()
    assert losses.shape == (0,)
    assert losses_of.model.get_input_embeddings().weight.grad is not None  # it took part
    for grad in conftest.gradients(losses_of.model).values():
        assert not grad.any()


# ------------------------------------------------------------------------------------------ metrics


def test_token_f1():
    assert seq2seq.token_f1("the red book", "a red cat") == 0.5
    assert seq2seq.token_f1("Red, Book!", "red book") == 1
    assert seq2seq.token_f1("red red", "red") == pytest.approx(2 / 3)
    assert seq2seq.token_f1("the", "a") == 1
    assert seq2seq.token_f1("", "red") == 0


def test_text_metrics_take_the_best_reference():
    answers = ["a red cat", "dog"]
    references = [["a blue cat", "a red cat "], ["cat", "dogs"]]
    assert seq2seq.text_metric("exact_match", answers, references, []) == 0.5
    assert seq2seq.text_metric("token_f1", answers, references, []) == 0.5
    # rouge-score stems: dogs is dog
    assert seq2seq.text_metric("rougeL", answers, references, []) == 1
    rouge1 = seq2seq.text_metric("rouge1", ["cat red"], [["red cat", "dog"]], [])
    rouge_l = seq2seq.text_metric("rougeL", ["cat red"], [["red cat", "dog"]], [])
    assert (rouge1, rouge_l) == (1, 0.5)


def test_label_metrics_are_scikit_learns_and_other_answers_are_wrong():
    rng = np.random.default_rng(0)
    gold = rng.choice(["no", "yes"], 50)
    answers = rng.choice(["no", "yes", "maybe"], 50)
    wrong = np.where(gold == "yes", "no", "yes")
    predicted = np.where(answers == "maybe", wrong, answers)
    arguments = (list(answers), [[text] for text in gold], ["no", "yes"])
    f1 = sklearn.metrics.f1_score(gold, predicted, pos_label="yes")
    matthews = sklearn.metrics.matthews_corrcoef(gold, predicted)
    assert seq2seq.text_metric("f1", *arguments) == pytest.approx(f1)
    assert seq2seq.text_metric("matthews", *arguments) == pytest.approx(matthews)
    constant = (["no"] * 50, *arguments[1:])
    assert seq2seq.text_metric("matthews", *constant) == 0


def test_correlations_are_scipys_and_no_number_is_the_value_farthest_off():
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 11, 40) / 2  # with ties; from 0 to 5
    gold[:2] = 0, 5
    predicted = np.round(gold + rng.normal(size=40))
    answers = [str(value) for value in predicted]
    for i in range(2, 6):
        answers[i] = "none"
        predicted[i] = 0 if gold[i] > 2.5 else 5
    references = [[str(value)] for value in gold]
    pearson = scipy.stats.pearsonr(predicted, gold)[0]
    spearman = scipy.stats.spearmanr(predicted, gold)[0]
    assert seq2seq.text_metric("pearson", answers, references, []) == pytest.approx(pearson)
    assert seq2seq.text_metric("spearman", answers, references, []) == pytest.approx(spearman)


# --------------------------------------------------------------------------------------------- runs


def train(name, flags="", model="t5"):
    """models/<name> of data/d.json"""
    words = f"--training_run_name {name} --model_init_name {model} --data d --learning_rate 0.02"
    words += " --max_source_length 100 --max_target_length 100 --max_new_tokens 8"
    words += f" --logging_steps 1 {flags}"
    return conftest.run(*words.split())


BY_HEART = [
    *pairs(6),
    {"prompt": "mask", "completion": "<extra_id_0> one <extra_id_1>two", "id": 7},
]


@pytest.fixture
def finished(folder, tmp_path_factory):
    """models/run of a T5 v1.1 that knows BY_HEART by heart; trained once."""
    kept = tmp_path_factory.getbasetemp() / "finished"
    if not kept.exists():
        make_model("t5v1.1")
        write_data("d", BY_HEART, BY_HEART, test=BY_HEART[:2])
        assert train_by_heart() == 0
        shutil.copytree(folder, kept)
    shutil.copytree(kept, folder, dirs_exist_ok=True)


def train_by_heart(flags=""):
    words = "--max_steps 60 --eval_steps 30 --lr_scheduler_type constant_with_warmup"
    words += " --metric_for_best exact_match --max_new_tokens 24"
    return train("run", f"{words} {flags}", "t5v1.1")


def test_a_run_leaves_what_the_contract_names(finished):
    evaluations = metrics("run", "eval")
    assert [row["step"] for row in evaluations] == [0, 30, 60]
    names = {"loss", "token_accuracy", "exact_match", "token_f1"}
    keys = {f"eval/{name}" for name in names}
    assert set(evaluations[0]) == {"step", "epoch", "split", *keys}
    assert evaluations[0]["eval/exact_match"] == 0
    assert evaluations[0]["eval/token_accuracy"] < 0.5
    assert evaluations[-1]["eval/exact_match"] == 1
    assert evaluations[-1]["eval/token_accuracy"] == 1
    (tested,) = metrics("run", "test")
    assert tested["test/exact_match"] == 1
    places = [(row["step"], row["split"]) for row in metrics("run")]
    assert len(set(places)) == len(places) == 60 + 3 + 1

    prediction = conftest.read_json("models/run/temperature=0.00_n=1_step=60.json")[-1]
    assert prediction == {
        "prompt": "mask",
        "generations": [{"lm_postprocess": "<extra_id_0> one<extra_id_1> two"}],
        "demonstration": "<extra_id_0> one <extra_id_1>two",
        "orig_d": BY_HEART[-1],
        "dataset": "d",
    }
    assert len(conftest.read_json("models/run/test_temperature=0.00_n=1_step=60.json")) == 2
    about = conftest.read_json("models/run/rawtune.json")
    assert about["format"] == 1
    assert about["script"] == "seq2seq.py"
    assert about["family"] == "seq2seq"
    assert about["base"] == {"path": "models/t5v1.1", "sha256": None}
    for name in ("COMPLETE", "args.json", "code/seq2seq.py", "checkpoint-30/COMPLETE"):
        assert pathlib.Path("models/run", name).exists()


def test_the_exported_folder_is_a_hugging_face_model_with_its_own_head(finished):
    exported = conftest.weights("run")
    assert not torch.equal(exported["lm_head.weight"], exported["shared.weight"])
    # not untied by us: as other programs load it
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained("models/run")
    loss = reference_loss(model, BY_HEART)
    evaluated = metrics("run", "eval")[-1]["eval/loss"]
    assert float(loss) == pytest.approx(evaluated, abs=1e-5)


def reference_loss(model, records):
    """The mean over target tokens, one record at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)
    losses = []
    for record in records:
        source, target = tokenizer([record["prompt"], record["completion"]]).input_ids
        losses.append(reference_losses(model, source, target))
    return torch.cat(losses).mean()


def test_the_same_command_says_that_it_is_finished_and_more_steps_extend_it(finished, capsys):
    before = metrics("run")
    assert train_by_heart() == 0
    assert "models/run is finished" in capsys.readouterr().out
    assert metrics("run") == before
    assert train_by_heart("--max_steps 62") == 0
    assert "from step 60" in capsys.readouterr().out
    steps = [row["step"] for row in metrics("run", "train")]
    assert steps == list(range(1, 63))
    (tested,) = metrics("run", "test")
    assert tested["step"] == 62
    assert pathlib.Path("models/run/COMPLETE").exists()


def test_changed_flags_and_data_are_refused_by_name_and_overwrite_renames(finished, refused):
    write_data("d", BY_HEART[:-1], BY_HEART)
    errors = refused(train_by_heart, "--weight_decay 0.1 --eval_batch_size 3")
    assert "weight_decay was 0.0" in errors
    assert "data_sha256 was" in errors
    assert "eval_batch_size" not in errors
    assert train_by_heart("--max_steps 1 --overwrite") == 0
    (old,) = pathlib.Path("models").glob("run.old-*")
    assert (old / "COMPLETE").exists()
    assert (old / "checkpoint-60").exists()
    assert [row["step"] for row in metrics("run", "train")] == [1]


def test_evaluation_alone_may_be_repeated_and_inherits_no_decoding_settings(finished):
    settings = {"no_repeat_ngram_size": 1, "repetition_penalty": 9.0, "forced_eos_token_id": 1}
    settings.update(max_length=5, suppress_tokens=[*range(10, 60)])
    path = pathlib.Path("models/run/generation_config.json")
    path.write_text(json.dumps(settings))
    for n in (24, 2):
        assert train("again", f"--no_train --max_new_tokens {n} --seed {n}", "run") == 0
    (older,) = pathlib.Path("models").glob("again.old-*")
    name = "temperature=0.00_n=1_step={}.json"
    answers = conftest.read_json(older / name.format(0))
    assert answers == conftest.read_json(f"models/run/{name.format(60)}")
    assert conftest.read_json(f"models/again/{name.format(0)}") != answers
    places = [(row["step"], row["split"]) for row in metrics("again")]
    assert places == [(0, "eval"), (0, "test")]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_forward_steps_do_not_change_a_step(kind):
    make_model(kind)
    write_data("d", pairs(40), pairs(4, start=90))
    # Adam blows up rounding errors of gradients near 0, in proportion to the learning rate
    flags = "--num_epochs 1 --learning_rate 0.001 --train_batch_size"
    assert train("whole", f"{flags} 16", kind) == 0
    assert train("split", f"{flags} 4 --gradient_accumulation_steps 4", kind) == 0
    whole = metrics("whole", "train")
    split = metrics("split", "train")
    assert len(whole) == 3  # of 16, 16 and 8 examples
    for whole_row, split_row in zip(whole, split):
        assert split_row["loss"] == pytest.approx(whole_row["loss"], rel=1e-6)
        assert split_row["grad_norm"] == pytest.approx(whole_row["grad_norm"], rel=1e-5)
    assert conftest.distance("whole", "split") < 1e-6


def test_the_loss_of_a_step_is_the_mean_over_its_target_tokens():
    path = make_model("t5")
    records = pairs(7)
    write_data("d", records, records)
    flags = "--train_batch_size 2 --gradient_accumulation_steps 5 --max_steps 1"
    assert train("run", flags) == 0
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(path)
    loss = reference_loss(model, records)
    loss.backward()
    grad_norm = torch.nn.utils.get_total_norm(conftest.gradients(model).values())
    (row,) = metrics("run", "train")
    assert row["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(float(grad_norm), rel=1e-4)


def test_stopped_and_continued_is_the_same_to_the_bit(monkeypatch):
    make_model("t5", dropout_rate=0.1)
    lists = {"prompt": ["spell 1", "one"], "completion": ["one", "1"]}
    write_data("d", [*pairs(24), lists], pairs(4, start=90))
    flags = "--train_batch_size 4 --gradient_accumulation_steps 2 --max_steps 7"
    flags += " --logging_steps 4 --eval_steps 3 --weight_decay 0.1"
    assert train("whole", flags) == 0
    stepped = common.Run.stepped

    def stepped_and_stopped(run, *arguments, **others):
        stepped(run, *arguments, **others)
        if run.step in (2, 4):  # noticed in the next step: when an evaluation is due, and when not
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "stepped", stepped_and_stopped)
        assert train("stopped", flags) == common.EXIT_SAVED
        assert [row["step"] for row in metrics("stopped", "eval")] == [0]
        assert train("stopped", flags) == common.EXIT_SAVED
    assert not pathlib.Path("models/stopped/COMPLETE").exists()
    with pytest.raises(SystemExit):
        train("stopped", f"{flags} --max_steps 8")  # only a finished run can be extended
    assert train("stopped", flags) == 0
    (whole, whole_rows), (stopped, rows) = map(test_runs.bits, ("whole", "stopped"))
    for file in ("model.safetensors", "temperature=0.00_n=1_step=7.json"):
        assert whole[file] == stopped[file]
    assert whole_rows == rows


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero3"])
def test_the_best_checkpoint_is_kept_tested_and_exported(stage, monkeypatch):
    make_model("t5")
    records = pairs(8)
    write_data("d", records, records, test=records)
    qualities = {0: 0.9, 2: 0.5, 4: 0.2, 6: 0.1}
    tested = {}

    def evaluate(args, engine, tokenizer, data, split, run):
        if split == "test":
            tested.update(common.full_state_dict(engine.module.model))
        seq2seq.write_predictions(args, [], {}, split, run)
        return {"loss": 1.0, "quality": qualities[run.step]}

    monkeypatch.setattr(seq2seq, "evaluate", evaluate)
    flags = (
        f"--metric_for_best quality --early_stopping_patience 2 --eval_steps 2 --ds_config {stage}"
    )
    assert train("run", f"{flags} --max_steps 20 --save_total_limit 1") == 0
    checkpoints = pathlib.Path("models/run").glob("checkpoint-*")
    assert {path.name for path in checkpoints} == {"checkpoint-2", "checkpoint-6"}
    conftest.read_json("models/run/test_temperature=0.00_n=1_step=2.json")  # named after the best
    names = ("run", "run/checkpoint-2", "run/checkpoint-6")
    exported, best, last = map(conftest.weights, names)
    for name, weight in best.items():
        assert torch.equal(exported[name], weight)
        assert torch.equal(tested[name], weight)
        assert not torch.equal(last[name], weight)


def test_data_sets_are_mixed_scored_apart_and_sampled():
    make_model("t5")
    write_data("d", pairs(8), pairs(3))
    write_data("e", pairs(40), pairs(5))
    flags = "--data d e:0.2 --temperature 0.8 --n_samples 3 --num_epochs 1"
    assert train("run", f"{flags} --train_batch_size 4 --eval_batch_size 7") == 0
    test_runs.check_mixture(["d"] * 3 + ["e"] * 5)


def test_nothing_is_kept_on_disk_but_the_run(folder, monkeypatch):
    make_model("t5")
    write_data("d", pairs(8), pairs(2))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = set(folder.rglob("*"))
    assert train("run", "--max_steps 1") == 0
    for path in set(folder.rglob("*")) - before:
        assert path.is_relative_to(folder / "models" / "run")
