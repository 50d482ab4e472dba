"""docs/extend.md: its way is complete, its diff applies, is small, and computes what it says."""

import functools
import importlib.util
import inspect
import re
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT, finish, make_model, metrics, pairs, run, start, write_data
from test_runs import losses
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import seq2seq

PAGE = (ROOT / "docs" / "extend.md").read_text()
DIFF = re.search(r"^```diff\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[1]
WORDS = ["--model_init_name", "t5", "--train_batch_size", 8, "--max_steps", 3, "--logging_steps", 1]
WORDS += ["--learning_rate", 0.01, "--warmup_steps", 0, "--max_grad_norm", 0, "--max_new_tokens", 2]
KL = ["--data", "plain", "--kl_coefficient", 9]


@pytest.fixture
def extended(folder):
    """The changed script as a module."""
    for name in ("seq2seq.py", "common.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "ds_configs", folder / "ds_configs")
    subprocess.run(["git", "apply", "-"], input=DIFF, text=True, check=True, cwd=folder)
    spec = importlib.util.spec_from_file_location("extended", folder / "seq2seq.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    write_data("plain", pairs(8), pairs(2, 8))
    return module


def test_the_way_is_of_18_functions_that_fit_on_a_screen():
    names = re.findall(r"^\| `([\w.]+)` \|", PAGE, re.MULTILINE)
    assert 10 < len(names) <= 18
    for name in names:
        function = functools.reduce(getattr, name.split("."), seq2seq)
        assert len(inspect.getsource(function).splitlines()) <= 60, name


def test_five_places_and_under_thirty_lines():
    assert len(re.findall("^@@", DIFF, re.MULTILINE)) <= 5
    assert len(re.findall(r"^[+-](?!\+\+ |-- )", DIFF, re.MULTILINE)) < 30


def test_without_its_flag_and_key_nothing_changes(extended):
    make_model("t5", dropout_rate=0.1)
    words = [*WORDS, "--data", "plain", "--training_run_name"]
    run(*words, "before")
    run(*words, "after", module=extended)
    assert losses("before") == losses("after")
    assert metrics("before", "eval")[0] == metrics("after", "eval")[0]


def test_a_weight_multiplies_the_losses_of_its_record(extended):
    tokenizer = AutoTokenizer.from_pretrained(make_model("t5"))
    n_targets = [len(tokenizer(record["completion"]).input_ids) for record in pairs(8)]
    weighted = [{**record, "weight": 2 if i < 5 else 0} for i, record in enumerate(pairs(8))]
    rows = []
    for name, records in (("weighted", weighted), ("fewer", pairs(5))):
        write_data(name, records, pairs(2, 8))
        run(*WORDS, "--data", name, "--training_run_name", name, module=extended)
        rows.append(metrics(name, "train")[0])
    factor = 2 * sum(n_targets[:5]) / sum(n_targets)  # the denominator counts all tokens once
    for key in ("loss", "grad_norm"):
        assert rows[0][key] == pytest.approx(factor * rows[1][key], rel=1e-5)


@pytest.mark.parametrize("kind", ["t5v1.1", "bart"])
def test_the_kl_is_that_of_the_models_own_logits(extended, kind):
    path = make_model(kind)
    model = AutoModelForSeq2SeqLM.from_pretrained(path)
    start_model = AutoModelForSeq2SeqLM.from_pretrained(path).requires_grad_(False)
    rows = [[0], [1]] if kind == "bart" else [[0, 1]]
    sources, targets = [[5, 6, 7, 1], [8, 1]], [[9, 1], [10, 11, 12, 1]]
    batch = extended.collate(rows, sources, targets, model.config)
    with_kl = extended.TargetLosses(model, extended.TargetLosses(start_model), 0.5)
    torch.testing.assert_close(with_kl(batch), extended.TargetLosses(model)(batch))  # KL = 0
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    expected = []
    for source, target in zip(sources, targets):
        example = {"input_ids": torch.tensor([source]), "labels": torch.tensor([target])}
        p = model(**example).logits[0].softmax(dim=1)  # (n, V)
        q = start_model(**example).logits[0].softmax(dim=1)
        kl = (p * (p / q).log()).sum(dim=1)
        assert (kl > 0).all()
        expected.append(0.5 * kl - p[range(len(p)), target].log())
    expected = torch.cat(expected)
    weights = list(model.parameters())
    gradients = torch.autograd.grad(expected.sum(), weights)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    for n_chunks in (1, 3):
        found = with_kl(batch, n_chunks)
        close(found, expected)
        close(torch.autograd.grad(found.sum(), weights), gradients)


def test_the_kl_holds_a_run_back_at_any_accumulation(extended):
    make_model("t5")
    cut = ["--train_batch_size", 2, "--gradient_accumulation_steps", 4]
    for name, words in (("free", KL[:2]), ("held", KL), ("cut", [*KL, *cut])):
        run(*WORDS, *words, "--training_run_name", name, module=extended)
    assert losses("held")[0] == pytest.approx(losses("free")[0])
    assert losses("held")[2] > losses("free")[2]
    assert losses("cut") == pytest.approx(losses("held"), rel=1e-5)


@pytest.mark.slow
def test_two_ranks_compute_the_same(extended, folder):
    make_model("t5")
    run(*WORDS, *KL, "--training_run_name", "one", module=extended)
    words = [*WORDS, *KL, "--training_run_name", "two", "--ds_config", "zero3"]
    finish(start(*words, n_ranks=2, script=folder / "seq2seq.py"))
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)
