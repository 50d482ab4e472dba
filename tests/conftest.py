"""Tiny models and data; runs in this process (fast), or in their own (ranks, kills)."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "data"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")

import common  # first: it prepares the import of DeepSpeed

# isort: split
import pytest
import ranks
import safetensors.torch
import torch
import transformers

import seq2seq

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
common.adopt_launcher()
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own, with models/ and data/."""
    monkeypatch.chdir(tmp_path)
    for name in ("models", "data"):
        (tmp_path / name).mkdir()
    # untie_head changes the class, which has to be whole again for the next test
    tied = dict(transformers.T5ForConditionalGeneration._tied_weights_keys)
    monkeypatch.setattr(transformers.T5ForConditionalGeneration, "_tied_weights_keys", tied)
    yield tmp_path
    torch.backends.cuda.enable_flash_sdp(True)  # rl_ppo.py switches it off for a T5
    for number in (signal.SIGTERM, signal.SIGUSR1):  # which a run in this process has taken
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def refused(capsys):
    """A function that calls another one, which must leave with 2, and returns what it says."""

    def refused(function, *arguments, **others):
        with pytest.raises(SystemExit) as error:
            function(*arguments, **others)
        assert error.value.code == 2
        return capsys.readouterr().err

    return refused


def write_data(name, train, evaluation, **others):
    """data/<name>.json of lists of records."""
    lists = {"train": train, "eval": evaluation, **others}
    pathlib.Path("data", f"{name}.json").write_text(json.dumps(lists))


def pairs(n, start=0):
    """Records of very different lengths: n times a number and the words of its digits."""
    words = "zero one two three four five six seven eight nine".split()
    records = []
    for i in range(start, start + n):
        digits = str(i * i * 7919)[: 1 + i % 9]
        spelled = " ".join(words[int(digit)] for digit in digits)
        records.append({"prompt": f"spell {digits}", "completion": spelled})
    return records


SMALL = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}


def make_model(kind, weights=True, **changes):
    """models/<kind>: t5 (v1.0, tied head), t5v1.1, mt5 or bart, with the tiny T5's tokenizer."""
    path = pathlib.Path("models", kind)
    shutil.copytree(ROOT / "models" / "tiny-t5", path)
    ids = {"vocab_size": 320, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    if kind == "bart":
        small = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0}
        small.update(encoder_attention_heads=4, decoder_attention_heads=4, bos_token_id=0)
        small.update(encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128)
        config = transformers.BartConfig(**{**ids, **small, **changes})
    elif kind == "mt5":
        config = transformers.MT5Config(**{**ids, **SMALL, **changes})
    else:
        is_v1_1 = kind == "t5v1.1"
        activation = "gated-gelu" if is_v1_1 else "relu"
        ids["tie_word_embeddings"] = ids["scale_decoder_outputs"] = not is_v1_1
        options = {**ids, **SMALL, "feed_forward_proj": activation, **changes}
        config = transformers.T5Config(**options)
    config.save_pretrained(path)
    if weights:
        torch.manual_seed(0)
        auto_class = transformers.AutoModelForSeq2SeqLM
        common.untie_head(auto_class, config)
        auto_class.from_config(config).save_pretrained(path)
    return str(path)


def read_json(path):
    return json.loads(pathlib.Path(path).read_text())


def run(*words, module=seq2seq):
    """A run in this process; returns its exit code. Mistakes raise SystemExit(2)."""
    args = module.parse_args([str(word) for word in words])
    try:
        return module.main(args)
    except SystemExit as stop:
        if stop.code:
            raise
        return 0  # a finished run


def weights(name):
    """{name: tensor} of the exported model of a run."""
    return safetensors.torch.load_file(f"models/{name}/model.safetensors")


def distance(name, other):
    """Norm of the difference of the weights, as a share of their norm."""
    vectors = []
    for run_name in (name, other):
        of_run = sorted(weights(run_name).items())
        vectors.append(torch.cat([weight.double().flatten() for _, weight in of_run]))
    return float((vectors[0] - vectors[1]).norm() / vectors[0].norm())


def gradients(model):
    """{name: gradient}, which are set to zero."""
    grads = {}
    for name, weight in model.named_parameters():
        grads[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
    model.zero_grad()
    return grads


def metrics(name, split=None):
    """Rows of metrics.jsonl of a run."""
    lines = pathlib.Path("models", name, "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if split in (None, row["split"])]


def start(*words, n_ranks=1, script=ROOT / "seq2seq.py", launcher=None, environment=None):
    """A run as a user starts it: a Popen of its own, with torchrun where it has several ranks."""
    if n_ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher = [*torchrun, "--nproc_per_node", n_ranks]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)  # of this process
    words = [str(word) for word in [*(launcher or [sys.executable]), script, *words]]
    output = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would stop the run
    process = subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT)
    process.output = output
    return process


def start_many(runs, n_ranks, module=seq2seq):
    """Several runs of a script, one after the other, in processes that fork."""
    runs = [[str(word) for word in words] for words in runs]
    return ranks.Ranks(runs, n_ranks, module)


def finish(process, code=0, timeout=300):
    """The output of a process, which must leave with this exit code."""
    deadline = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.output.seek(0)
    output = process.output.read()
    assert process.poll() == code, output[-3000:]
    return output


CAUSAL = {  # transformers' configuration, and what is not SMALL_CAUSAL about it
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (transformers.Qwen2Config, {}),
    "gemma": (transformers.GemmaConfig, {"head_dim": 8}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 8, "sliding_window": 8}),
    "granite": (transformers.GraniteConfig, {"logits_scaling": 4.0}),
    "pythia": (transformers.GPTNeoXConfig, {}),
    "gpt2": (transformers.GPT2Config, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "opt": (transformers.OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
}
SMALL_CAUSAL = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_causal(kind, weights=True, **changes):
    """models/<kind>: a small decoder-only model of a family, with the tiny Llama's tokenizer."""
    path = pathlib.Path("models", kind)
    shutil.copytree(ROOT / "models" / "tiny-llama", path)
    config_class, options = CAUSAL[kind]
    config = config_class(**{**SMALL_CAUSAL, **options, **changes})
    config.save_pretrained(path)
    if weights:
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)
