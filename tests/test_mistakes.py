"""Mistakes that newcomers make: one line that says what to mend, exit code 2, no weight loaded."""

import gzip
import json
import os
import pathlib
import re
import shutil

import conftest
import pytest
import safetensors.torch
import transformers

import common

RECORDS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(8)]
DATA = json.dumps({"train": RECORDS[:6], "eval": RECORDS[6:]})
LINES = "\n".join(json.dumps(record) for record in RECORDS)
OPTIMIZER = json.dumps({"zero_optimization": {"stage": 1}, "optimizer": {"type": "Lamb"}})
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with t5 and bart, made once."""
    root = tmp_path_factory.mktemp("models")
    (root / "models").mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        for kind in ("t5", "bart"):
            conftest.make_model(kind)
    return root / "models"


@pytest.fixture(autouse=True)
def prepared(folder, models):
    """t5, bart and the data set ok are there."""
    for kind in ("t5", "bart"):
        (folder / "models" / kind).symlink_to(models / kind)
    (folder / "data" / "ok.json").write_text(DATA)


def refusal(capsys, *words, loads=False):
    """The one line of a run that is refused, unless `loads` before it has loaded the model."""
    common_words = ["--model_init_name", "t5", "--data", "ok", "--max_steps", 2]
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as error:
        if not loads:
            monkeypatch.delattr(common, "load_model")
        conftest.run(*common_words, *words)
    lines = re.findall("^ERROR (.*)", capsys.readouterr().err, re.MULTILINE)
    assert error.value.code == 2 and len(lines) == 1, lines
    return lines[0]


WORDS = [
    ("--data nope", "data/nope not found; there is: ok.json"),
    ("--data ok:7", "--data ok:7: it has 6 training records"),
    ("--data ok:1.5", "expected a fraction like :0.05 or a count like :500"),
    ("--model_init_name nope", "models/nope not found; there is: "),
    ("--model_init_name tiny-llama", "no encoder-decoder, see sft_causal.py"),
    ("--training_run_name foreign", "models/foreign is no run folder"),
    ("--metrics bleu", "argument --metrics: invalid choice: 'bleu'"),
    ("--metrics f1", "--metrics f1 and matthews need --labels NEGATIVE POSITIVE"),
    (
        "--metrics accuracy --labels yes no",
        "2 records, first data/ok.json, eval[0]: the completion",
    ),
    ("--metrics pearson", "is no number, which --metrics pearson and spearman need"),
    ("--n_samples 4", "greedy decoding gives the same each time: --temperature 0.8"),
    ("--precision fp64", "--precision fp64: expected auto, fp32, bf16, bf16-mixed, fp16"),
    ("--precision transformer-engine", "--precision transformer-engine: expected auto, fp32"),
    ("--precision 16-true", "--precision fp16: "),
    ("--precision bf16 --ds_config zero0", "--precision bf16 needs ZeRO: --ds_config zero1"),
    ("--optimizer adafactor --ds_config zero2", "--optimizer adafactor needs --ds_config zero0"),
    ("--early_stopping_patience 2", "--early_stopping_patience needs --metric_for_best"),
    ("--ds_config zero9", "--ds_config zero9: "),
    ("--ds_config lamb.json", "lamb.json: remove optimizer and scheduler"),
    ("--train_batch_size 0", "--train_batch_size 0: expected a positive number"),
    (
        "--batch_size=8",
        "unknown argument --batch_size=8: did you mean --eval_batch_size, --train_b",
    ),
    ("--max_step 8", "did you mean --max_steps"),  # no abbreviations
    ("@presets/flan", "No such file or directory: 'presets/flan'"),
]


@pytest.mark.parametrize("words, message", WORDS)
def test_words(words, message, folder, capsys):
    shutil.copytree(folder / "models" / "t5", folder / "models" / "foreign")
    (folder / "lamb.json").write_text(OPTIMIZER)
    assert message in refusal(capsys, *words.split())


def of_split(split, record, n=1):
    return json.dumps({"train": RECORDS, "eval": RECORDS[:1], split: [record] * n})


FILES = [  # name, content, message
    (
        "keys.json",
        of_split("train", {"question": "a", "prompt": "b"}, 170),
        "170 records, first data/keys.json, train[0]: 'completion' is missing; there is "
        "question, prompt: data/prepare_table.py can rename them",
    ),
    (
        "twice.json",
        DATA.replace("completion", "prompt"),
        "data/twice.json: a key is repeated among prompt, prompt: rename it",
    ),
    (
        "validation.json",
        of_split("validation", RECORDS[0], 3),
        "3 records, first data/validation.json, validation[0]: split 'validation', expected "
        "train, eval, test",
    ),
    ("lines.json", LINES, "expected lists train, eval, test, or lines in a .jsonl"),
    ("list.jsonl", LINES.replace("{", "[{", 1), "data/list.jsonl, line 1: "),
    ("latin.jsonl", LINES.replace("answer 3", "fa\u00e7ade").encode("latin-1"), "line 4: "),
    (
        "broken.jsonl.gz",
        gzip.compress(LINES.encode())[:-9],
        "data/broken.jsonl.gz, line 7: Compressed file ended",
    ),
    ("zeros.json.gz", b"\0" * 99, "data/zeros.json.gz: Not a gzipped file"),
    (
        "half.json",
        of_split("eval", {"prompt": "a", "completion": "\ud83d"}),
        "data/half.json, eval[0]: 'completion' holds bytes that are no UTF-8, or half a character",
    ),
    (
        "empty.json",
        of_split("train", {"prompt": "a", "completion": " "}),
        "data/empty.json, train[0]: 'completion' is ' ', expected text",
    ),
    (
        "nothing.json",
        of_split("train", {"prompt": "a", "completion": []}),
        "data/nothing.json, train[0]: 'completion' is an empty list",
    ),
    ("noeval.jsonl", LINES, "no evaluation records: a list eval, or --eval_fraction 0.05"),
    ("notrain.json", json.dumps({"eval": RECORDS}), "no training records: a list train"),
]


@pytest.mark.parametrize("name, content, message", FILES)
def test_data_files(name, content, message, capsys):
    content = content if isinstance(content, bytes) else content.encode()
    pathlib.Path("data", name).write_bytes(content)
    assert message in refusal(capsys, "--data", name.partition(".")[0])


WEIGHTS = [  # a file in place of model.safetensors, content, message
    ("tf_model.h5", "x" * 4000, "models/new/tf_model.h5: expected weights in safetensors"),
    (
        "flax_model.msgpack",
        "x" * 4000,
        "models/new/flax_model.msgpack: expected weights in safetensors",
    ),
    (
        "consolidated.00.pth",
        "x" * 4000,
        "models/new/consolidated.00.pth: expected weights in safetensors",
    ),
    (
        "model.safetensors.part",
        "x" * 4000,
        "models/new/model.safetensors.part: expected weights in safetensors",
    ),
    ("model.safetensors", POINTER, "models/new/model.safetensors: expected weights in safetensors"),
    ("pytorch_model.bin", POINTER, "models/new/pytorch_model.bin: expected weights in safetensors"),
]


def copy_model(name, without=("model.safetensors",)):
    """models/<name>, a copy of t5 without some files."""
    new = pathlib.Path("models", name)
    shutil.copytree("models/t5", new, ignore=shutil.ignore_patterns(*without))
    return new


def add_tokens(folder, *tokens):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name, content, message", WEIGHTS)
def test_weights_in_another_format(name, content, message, capsys):
    (copy_model("new") / name).write_text(content)
    assert message in refusal(capsys, "--model_init_name", "new")


def test_a_folder_without_a_vocabulary_or_with_more_tokens_than_rows(capsys):
    copy_model("wordless", ["spiece.model", "tokenizer*"])
    assert "has no tokenizer" in refusal(capsys, "--model_init_name", "wordless")
    add_tokens(copy_model("more", []), "{", "}")
    message = "the tokenizer has 322 tokens, the embedding 320 rows"
    for words in (["--no_train"], ["--lora_rank", 2]):
        assert message in refusal(capsys, "--model_init_name", "more", *words)


def test_weights_that_are_missing_or_damaged_are_not_made_up(capsys):
    """Known only when they are loaded."""
    weights = safetensors.torch.load_file("models/t5/model.safetensors")
    weights.pop("encoder.final_layer_norm.weight")
    safetensors.torch.save_file(weights, copy_model("part") / "model.safetensors")
    whole = pathlib.Path("models/t5/model.safetensors").read_bytes()
    (copy_model("cut") / "model.safetensors").write_bytes(whole[:9000])
    shards = copy_model("shards")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained("models/t5")
    model.save_pretrained(shards, max_shard_size="100KB")
    (shards / "model-00003-of-00003.safetensors").unlink()
    messages = {
        "part": "weights are missing, such as ['encoder.final_layer_norm.weight']",
        "cut": "its weights cannot be loaded",
        "shards": "model-00003-of-00003.safetensors",
    }
    for name, message in messages.items():
        line = refusal(capsys, "--model_init_name", name, loads=True)
        assert line.startswith(f"models/{name}: ") and message in line
        assert not list(pathlib.Path("models").glob("*/checkpoint-*"))


def test_an_unknown_metric_is_named_before_training(capsys):
    line = refusal(capsys, "--metric_for_best", "rouge", "--training_run_name", "a", loads=True)
    assert line.startswith("--metric_for_best rouge: expected one of loss, token_accuracy, exact_m")
    assert not conftest.metrics("a", "train")


def test_prompts_that_are_longer_than_the_positions(capsys):
    lengths = {"--max_source_length": 128, "--max_target_length": 128, "--max_new_tokens": 128}
    for flag in lengths:
        words = ["--model_init_name", "bart"]
        for name, value in {**lengths, flag: 129}.items():
            words += [name, value]
        assert refusal(capsys, *words) == f"{flag} 129: models/bart has 128 positions"


def test_variables_that_an_earlier_launcher_has_left(monkeypatch):
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    for left in ({"WORLD_SIZE": "2"}, {"LOCAL_RANK": "3"}, {"RANK": "0", "WORLD_SIZE": "1"}):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in {"MASTER_ADDR": "gone", "SLURM_NTASKS": "2", **left}.items():
            monkeypatch.setenv(name, value)
        common.adopt_launcher()
        values = [os.environ[name] for name in names]
        assert values == ["0", "0", "1", "127.0.0.1", "0"]


def test_training_adds_rows_for_tokens_beyond_the_embedding():
    """../shared/cases/06"""
    add_tokens(copy_model("more", []), "{", "}")
    records = [{"prompt": f"json of {word}", "completion": f"{{{word}}}"} for word in "abcd"]
    conftest.write_data("braces", records * 2, records)
    words = ["--data", "braces", "--max_new_tokens", 4, "--training_run_name"]
    conftest.run("--model_init_name", "more", "--max_steps", 2, *words, "grown")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained("models/grown")
    assert model.get_input_embeddings().weight.shape == (322, 32)
    conftest.run("--model_init_name", "grown", "--no_train", *words, "again")
    losses = [conftest.metrics(name, "eval")[-1]["eval/loss"] for name in ("grown", "again")]
    assert losses[0] == pytest.approx(losses[1])
