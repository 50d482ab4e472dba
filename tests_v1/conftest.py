"""Fixtures: tiny models and data made on the spot, scripts run in-process or as real processes. No network."""

import contextlib
import functools
import importlib.util
import itertools
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]  # data/: what preparers import from beside them
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for name in LAUNCHER:
    os.environ.pop(name, None)
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: as the ranks of `start` have it, or the last digit may differ
os.environ["RAWTUNE_FAIL_WAIT"] = "0.5"  # seconds that other ranks let rank 0 speak first


def load_file(path):
    """A Python file as a module of its own; those of data/ can be imported by their names."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ragged_records(n, seed=0, longest=14):
    """Records whose prompts and completions differ widely in length: a mean of means is wrong on them."""
    rng = random.Random(seed)
    words = "the cat dog reads water book answer word number one two three yes no long small".split()
    return [{"prompt": " ".join(rng.choices(words, k=rng.randint(1, 12))) + f" {i}",
             "completion": " ".join(rng.choices(words, k=rng.choice([1, 1, 1, 2, 5, longest]))), "row": i} for i in range(n)]


def write_model(folder, **changes):
    """models/<folder>: the committed tiny tokenizer with a smaller configuration; no weights."""
    folder.mkdir(parents=True)
    for name in ("spiece.model", "tokenizer_config.json"):
        shutil.copy(ROOT / "models" / "tiny-t5" / name, folder)
    config = json.loads((ROOT / "models" / "tiny-t5" / "config.json").read_text())
    config.update(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, **changes)
    (folder / "config.json").write_text(json.dumps(config))


@functools.cache
def bpe_tokenizer(adds_end=False):
    """A byte-level BPE learnt on the spot: " yes", " no", "yes" and "no" are single pieces; <s> is put in front, and at
    the end </s> where asked for."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(["a: yes", "a: no", "a:\nyes", "a:\nno", "the cat reads a long book"] * 50, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>" if adds_end else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def write_llama(folder, adds_end=False, **changes):
    """models/<folder>: a decoder-only model of the Llama type and a byte-level tokenizer; no weights."""
    from transformers import LlamaConfig
    bpe_tokenizer(adds_end).save_pretrained(folder)
    LlamaConfig(**{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1, "tie_word_embeddings": False,
                   "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes}).save_pretrained(folder)


def write_babbler(folder, positions=512):
    """A random Llama with a chatml template, which never ends a reply by itself."""
    import sft_causal
    import torch
    import transformers
    write_llama(folder, vocab_size=302, initializer_range=0.3, max_position_embeddings=positions)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([transformers.AddedToken(t, special=True, normalized=False) for t in sft_causal.TEMPLATE_TOKENS["chatml"]],
                         special_tokens=True)
    tokenizer.chat_template = sft_causal.TEMPLATES["chatml"].replace("{bos}", "{{ bos_token }}")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        model.lm_head.weight[list(tokenizer.added_tokens_decoder)] = 0  # a logit of 0 is never the largest of so many
    model.save_pretrained(folder)
    return folder


def write_byt5(folder):
    """models/<folder>: a T5 on bytes (v1.1: gated, untied), whose tokenizer needs no file; no weights."""
    from transformers import ByT5Tokenizer, T5Config
    ByT5Tokenizer().save_pretrained(folder)
    T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu", dropout_rate=0.0,
             decoder_start_token_id=0, tie_word_embeddings=False).save_pretrained(folder)


def score_records(n, seed=0):
    """Texts of 1 to 24 words with soft targets: micro-batches of very different weight, and of different length."""
    rng = random.Random(seed)
    words = "the cat dog reads water book answer word number one two three yes no long small".split()
    return [{"input": " ".join(rng.choices(words, k=rng.choice([1, 2, 3, 5, 9, 24]))) + f" {i}", "target": rng.choice([0, 0, 0.25, 0.6, 1, 1]),
             "row": i} for i in range(n)]


@pytest.fixture
def mount(tmp_path):
    """A mount folder with models/tiny (dropout 0), models/dropout, data/ragged.json (43 train, 11 eval, 5 test)."""
    write_model(tmp_path / "models" / "tiny")
    write_model(tmp_path / "models" / "dropout", dropout_rate=0.1)
    (tmp_path / "data").mkdir()
    records = ragged_records(59)
    (tmp_path / "data" / "ragged.json").write_text(json.dumps({"train": records[:43], "eval": records[43:54], "test": records[54:]}))
    return tmp_path


def flags(mount, run="run", **changes):
    """A short command line on the fixtures above; flag=None leaves a flag out, flag=True makes it a switch."""
    options = {"mount_dir": mount, "model_init_name": "tiny", "data": "ragged", "training_run_name": run, "max_steps": 4,
               "train_batch_size": 8, "max_new_tokens": 4, "learning_rate": 0.01, "warmup_steps": 1, "logging_steps": 1,
               "ds_config": "zero0", "precision": "fp32", "eval_steps": 1000, "save_steps": 0, **changes}
    words = []
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name}"] + ([] if value is True else [str(v) for v in value] if isinstance(value, list) else [str(value)])
    return words


def trainer_args(words):
    """The flags that the trainers share, as common_v1 reads them."""
    import common_v1 as common
    parser = common.Parser(prog="trainer.py")
    for name in ("max_new_tokens", "n_samples"):
        parser.add_argument(f"--{name}", type=int, default=1)
    common.add_task_args(parser)
    common.add_shared_args(parser)
    return parser.parse_args(list(map(str, words)))


@pytest.fixture(autouse=True)
def global_state():
    """Signal handlers, environment and torch's linear are as before after every test; a run changes them (ZeRO-3 puts DeepSpeed's own in its
    place, which has no forward-mode derivative)."""
    handlers, before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}, dict(os.environ)
    import torch.nn.functional as functional
    linear = functional.linear
    yield
    functional.linear = linear
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def messages(monkeypatch):
    """The log lines of one test, as a list of strings."""
    import common_v1 as common
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(common.log, "handlers", [handler])
    level = common.log.level
    common.log.setLevel(logging.INFO)  # not by setattr: the logger remembers which levels were on
    yield lines
    common.log.setLevel(level)


def in_process(script, monkeypatch):
    """run(words) -> exit code of the script's main in this process."""
    module = importlib.import_module(script)

    def run(words):
        if module.common.__name__ == "common":  # of version 2, where launch() does it
            module.common.adopt_launcher()
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        try:
            return module.main(module.parse_args(list(map(str, words))))
        except SystemExit as stop:
            return stop.code
    return run


@pytest.fixture
def run_main(monkeypatch):
    """run_main(words) -> exit code of seq2seq.main in this process."""
    return in_process("seq2seq", monkeypatch)


@pytest.fixture
def run_clf(monkeypatch):
    """run_clf(words) -> exit code of clf.main in this process."""
    return in_process("clf", monkeypatch)


@pytest.fixture
def run_sft(monkeypatch):
    """run_sft(words) -> exit code of sft_causal.main in this process."""
    return in_process("sft_causal", monkeypatch)


@pytest.fixture
def run_ppo(monkeypatch):
    """run_ppo(words) -> exit code of rl_ppo.main in this process."""
    return in_process("rl_ppo", monkeypatch)


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than a short run itself."""
    import common_v1 as common
    monkeypatch.setattr(common, "plot_curves", lambda *_: None)


def ports():
    """Below those that the kernel hands out (servers and connections of tests beside this one have them); each process of
    pytest-xdist has a range of its own."""
    first = 12000 + 5000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 20000
    return itertools.cycle(range(first + os.getpid() % 4000, first + 5000))


PORTS = ports()


def free_port():
    for port in PORTS:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def start(words, n_procs=1, cwd=None, env=None):
    """Start `python words` as n_procs ranks, each in a process group of its own; returns the processes."""
    port, processes = free_port(), []
    for rank in range(n_procs):
        outside = {k: v for k, v in os.environ.items() if k not in LAUNCHER}  # runs in this process have set them
        own = {**outside, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", **(env or {})}
        if n_procs > 1:
            own.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n_procs), LOCAL_WORLD_SIZE=str(n_procs),
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        output = tempfile.TemporaryFile("w+")  # not a pipe: a full one would stop its rank, and with it all others
        processes.append(subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd, env=own, stdout=output,
                                          stderr=subprocess.STDOUT, start_new_session=True))
        processes[-1].output = output
    return processes


def finish(processes, timeout=120):
    """Wait for all; -> (list of exit codes, joined output). A time-out kills and fails with the output so far."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and any(p.poll() is None for p in processes):
        time.sleep(0.05)
    timed_out = any(p.poll() is None for p in processes)
    kill(processes)
    outputs = []
    for p in processes:
        p.output.seek(0)
        outputs.append(p.output.read())
        p.output.close()
    if timed_out:
        pytest.fail(f"no end after {timeout} s:\n" + "\n".join(o[-3000:] for o in outputs))
    return [p.returncode for p in processes], "\n".join(outputs)


def kill(processes):
    """kill -9 the process groups of those that still run."""
    for p in processes:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)
        p.wait()


def run_jobs(tmp_path, jobs, n_procs, timeout=300):
    """Run several command lines, the first word of each a script of version 1, one after the other in one launch of n_procs ranks (imports cost
    8 s a process)."""
    path = tmp_path / f"jobs-{free_port()}.json"
    path.write_text(json.dumps([[str(word) for word in job] for job in jobs]))
    codes, output = finish(start([ROOT / "tests_v1" / "worker.py", path], n_procs), timeout)
    assert codes == [0] * n_procs, output[-6000:]
    return output


SEVERAL = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
sys.modules["matplotlib.figure"] = None  # not installed, as it were: drawing takes longer than a short run
import common_v1 as common
script = importlib.import_module(sys.argv[3])
{before}
asked = []
for stop, settings, words in json.load(open(sys.argv[2])):
    asked.clear()
    common.Stopper.reason = lambda self: asked.append(1) or ("a test" if len(asked) == stop else None)
    for name, value in settings.items():
        setattr(script, name, value)
    code = script.main(script.parse_args(words))
    assert code == (common.EXIT_SAVED if stop else 0), (code, words)
common.leave(0)
"""


def run_several(mount, script, jobs, n_procs, before=""):
    """Like run_jobs, for jobs that may be stopped: [(step or shard after which to stop or None, {global of the script: value}, words)].
    before: Python that changes `script` first."""
    path = mount / f"several-{free_port()}.json"
    path.write_text(json.dumps([(stop, settings, [str(word) for word in words]) for stop, settings, words in jobs]))
    codes, output = finish(start(["-c", SEVERAL.format(before=before), ROOT, path, script], n_procs), 300)
    assert codes == [0] * n_procs, output[-6000:]


def run_and_kill(command, run, n_procs, after_steps):
    """Start the ranks, kill -9 all when metrics.jsonl has the wanted number of steps; False if the run was faster."""
    processes = start(command, n_procs)
    while any(p.poll() is None for p in processes):
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count('"split": "train"') >= after_steps:
            break
        time.sleep(0.003)
    was_running = any(p.poll() is None for p in processes)
    kill(processes)
    return was_running and not (run / "COMPLETE").exists()


def run_again(command, n_procs):
    """The same command after a kill or a stop: it continues and ends well."""
    codes, output = finish(start(command, n_procs))
    assert codes == [0] * n_procs and "continuing" in output, output[-3000:]


def copy_script(name, folder):
    """What a script needs in a container: itself, common_v1.py and ds_configs/ in a new folder; -> the copied script."""
    folder.mkdir()
    for file in (name, "common_v1.py"):
        shutil.copy(ROOT / file, folder)
    shutil.copytree(ROOT / "ds_configs", folder / "ds_configs")
    return folder / name


def launch(launcher, words, cwd):
    """`deepspeed --num_gpus 2 script ...` or torchrun, from the environment of the tests."""
    binary = shutil.which(launcher[0], path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    port = ["--master_port", str(free_port())]  # both take 29500 otherwise, and two tests may run at the same time
    result = subprocess.run([binary, *port, *launcher[1:], *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def rows(run_dir, split="train"):
    return [row for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if row["split"] == split]


def weights(folder):
    """{name: float64 array} of a Hugging Face folder."""
    import safetensors.torch
    tensors = {}
    for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
        tensors.update(safetensors.torch.load_file(file))
    return {name: tensor.double() for name, tensor in tensors.items()}


def distance(a, b):
    """Relative distance of two weight dictionaries in norm."""
    assert a.keys() == b.keys()
    return (sum(float(((a[k] - b[k]) ** 2).sum()) for k in a) / sum(float((a[k] ** 2).sum()) for k in a)) ** 0.5


def assert_same_mathematics(run, expected):
    """Another layout of the same command: losses, gradient norms, evaluation and weights within 1e-6."""
    for mine, theirs in zip(rows(run), rows(expected), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6) and mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
        assert (mine["lr"], mine["target_tokens"], mine["step"]) == (theirs["lr"], theirs["target_tokens"], theirs["step"])
    assert distance(weights(expected), weights(run)) < 1e-6
    assert rows(run, "eval")[-1]["eval/loss"] == pytest.approx(rows(expected, "eval")[-1]["eval/loss"], rel=1e-6)


def stop_at(monkeypatch, step):
    """The Stopper asks to leave at the given optimizer step (it is asked once a step, or once a shard of scored texts)."""
    import common_v1 as common
    asked = []
    monkeypatch.setattr(common.Stopper, "reason", lambda self: asked.append(1) or ("a test" if len(asked) == step else None))


def moments(checkpoint):
    """AdamW's moments and step counts of a checkpoint, as flat tensors in file order."""
    import torch
    found = []

    def walk(thing):
        if torch.is_tensor(thing):
            found.append(thing.double().flatten())
        elif isinstance(thing, dict):
            for key in sorted(thing, key=str):
                walk(thing[key])
        elif isinstance(thing, (list, tuple)):
            for part in thing:
                walk(part)
    for path in sorted((checkpoint / "engine" / "state").glob("*.pt")):
        state = torch.load(path, weights_only=False)
        walk(state.get("optimizer_state_dict", state.get("optimizer")))
    return torch.cat(found)


def assert_same_run(a, b, last=12):
    """Weights, moments and every logged loss are equal to the bit."""
    import torch
    assert distance(weights(a), weights(b)) == 0
    assert torch.equal(moments(a / f"checkpoint-{last}"), moments(b / f"checkpoint-{last}"))
    for name in ("loss", "grad_norm", "lr"):
        assert [row[name] for row in rows(a)] == [row[name] for row in rows(b)]
    assert [row["step"] for row in rows(b)] == list(range(1, last + 1))
