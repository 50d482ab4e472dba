"""Random mistakes in data files, flags, presets and DeepSpeed JSONs of all scripts: each ends in
success or in ERROR lines that name a flag or a file, exit code 2; never in a traceback or a hang.

    python tests/fuzz.py --n 2000                  # 10 minutes on 2 cores
    python tests/fuzz.py --seed 0 --only 1234      # that case again; its folder is kept

Case i is a function of (seed, i): a command that works, and one to three mistakes. It runs in a
fork of this process, and ends where a script would load its model; with a DeepSpeed JSON, when the
engine is there.
"""

import argparse
import collections
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import pathlib
import random
import re
import shlex
import shutil
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of transformers

import conftest

# isort: split
import test_chat
from tqdm import tqdm

import common

SCRIPTS = ("seq2seq", "clf", "sft_causal", "rl_ppo", "project_grads", "chat")
PRESET = "# a preset\n--training_run_name run --eval_fraction 0.3\n--model_init_name"
T5 = f"{conftest.ROOT}/models/tiny-t5"
# of a line with # there are twelve, numbered
PAIRS = '{"prompt": "why #?", "completion": ["for #", "x"], "references": ["for"], "id": #}'
PROMPTS = '{"prompt": "why #?", "answer": "for"}'
CHATS = """{"messages": [{"role": "user", "content": "why #?"}, \
{"role": "assistant", "content": "for", "weight": 1}]}"""
SCORES = '{"input": "text #", "target": 0.5}'
TREES = """{"message_id": "m#", "text": "why #?", "role": "prompter", "lang": "en", "replies": \
[{"message_id": "r#", "text": "for", "role": "assistant", "rank": 0}]}"""
SQUAD = """{"title": "t#", "paragraphs": [{"context": "For.", "qas": \
[{"question": "why #?", "answers": [{"text": "For"}]}]}]}"""
TASK = """{"Definition": ["Do."], "Categories": ["Doing"], "Negative Examples": [],
"Positive Examples": [{"input": "a", "output": "b", "explanation": "c"}], "Instances": [
{"id": "i#", "input": "why #?", "output": ["for"]},
{"id": "i", "input": "why?", "output": ["for"]}]}"""
SAMPLES = """{"metadata": {"dataset_key": "svamp"}, "data": [
{"sample_index": 1#, "question": "# and #?", "answer": "2"},
{"sample_index": 1, "question": "1 and 1?", "answer": "2"}]}"""
SPLIT = '{"train": [10, 11, 12, 13, 14, 15], "test": [16, 17]}'
TAUGHT = """{"dataset_key": "svamp", "prediction_template": "zs_cot", "sample_index": 1#, \
"completion_index": 0, "question": "# and #?", "answer": "2", "reasoning_completion": "So", \
"completion": "2"}"""
RTE = "sentence1\tsentence2\tlabel\nA.\tB #.\tentailment"
TEXT = "The quick brown fox jumps over the lazy dog, # times."
DEEPSPEED = """{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000000, \
"overlap_comm": true}, "wall_clock_breakdown": false, "steps_per_print": 100}"""
COMMANDS = (  # script, words, files
    (
        "seq2seq",
        "@preset --data d --ds_config ds.json",
        {"data/d.jsonl": PAIRS, "preset": f"{PRESET} tiny-t5", "ds.json": DEEPSPEED},
    ),
    ("clf", "@preset --data d", {"data/d.jsonl": SCORES, "preset": f"{PRESET} tiny-t5"}),
    ("sft_causal", "@preset --data d", {"data/d.jsonl": CHATS, "preset": f"{PRESET} tiny-llama"}),
    (
        "rl_ppo",
        "@preset --data d --reward_fn reward.py:f",
        {"data/d.jsonl": PROMPTS, "preset": f"{PRESET} tiny-llama", "reward.py": "f = 1"},
    ),
    (
        "project_grads",
        "collect --model_init_name tiny-t5 --data d --out G",
        {"data/d.jsonl": PAIRS},
    ),
    ("chat", "--model_path ../models/babbler --input d.jsonl --output o", {"d.jsonl": PROMPTS}),
    (
        "prepare_table",
        "--train d.csv --out o.json prompt=q completion=a",
        {"d.csv": "q,a\nwhy #?,for"},
    ),
    ("prepare_qa", "--layout squad --train d.jsonl --out o.json", {"d.jsonl": SQUAD}),
    ("prepare_oasst", "--train d.jsonl --to pairs --out o.json", {"d.jsonl": TREES}),
    ("prepare_glue", "--task rte --data_dir . --out o.json", {"train.tsv": RTE, "dev.tsv": RTE}),
    ("prepare_translation", "--pairs x_nl-en=d.tsv --out o.json", {"d.tsv": "dag #\tday #"}),
    ("prepare_text", f"--input d.txt --tokenizer {T5} --out o", {"d.txt": TEXT}),
    ("prepare_tokenizer", "--input d.txt --vocab_size 110 --out o", {"d.txt": TEXT}),
    (
        "prepare_ni",
        "--task_dir tasks --out o.json",
        {"tasks/a.json": TASK, "splits/default/train_tasks.txt": "a"},
    ),
    (
        "score_predictions",
        "--predictions d.jsonl",
        {"d.jsonl": '{"prediction": "a", "references": ["#"]}'},
    ),
    (
        "cot",
        "export --dataset d.json --split s.json --completions c.jsonl --out o.json",
        {"d.json": SAMPLES, "s.json": SPLIT, "c.jsonl": TAUGHT},
    ),
)
VALUES = (  # in JSON
    *(None, True, 0, -1, 7, 0.5, 10**400, float("nan"), float("inf"), "", " ", "x", "7"),
    *("\ud800", "\0", "</s>", "x" * 5000, [], {}, [None], [[]], {"a": 1}),
)
WORDS = (  # of a command; no path outside of the case's folder, lest it be written
    *("", " ", "-1", "0", "1", "0.5", "1e9", "9" * 30, "nan", "inf", "x", "x:y", "d:0.5"),
    *("nope.json", "data", ".", "@nope", "{x}", "\udcff"),
)
BYTES = (  # UTF-8's and UTF-16's marks, a byte of neither, a deep nesting
    *(b"", b"\xef\xbb\xbf", b"\xff\xfe{\0", b"\xff", b"\0", b'"', b"{", b"]", b",", b"\n", b"\t"),
    b"[" * 5000,
)
NAME = r"--|argument|'|/|\.\w"  # of a flag, a word or a file, in an ERROR line
PATIENCE = 60  # seconds, after which a script hangs
FORK = multiprocessing.get_context("fork")

# files: {name: bytes}
Case = collections.namedtuple("Case", "script words files")


def expand(text):
    """The bytes of a file."""
    lines = []
    for line in text.splitlines():
        lines += [line.replace("#", str(i)) for i in range(12 if "#" in line else 1)]
    return "\n".join(lines).encode()


def splice(sequence, piece, rng):
    """A piece in place of nothing, of one element, or of the rest."""
    start = rng.randrange(len(sequence) + 1)
    end = rng.choice((start, start + 1, len(sequence)))
    return sequence[:start] + piece + sequence[end:]


def mutate_value(value, rng):
    """A JSON value with a mistake somewhere in it."""
    if not value or not isinstance(value, (dict, list)) or rng.random() < 0.2:
        return rng.choice(VALUES)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    kind = rng.randrange(5)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[key.upper()] = value.pop(key)
    else:
        value[key] = mutate_value(value[key], rng)
    return value


def mutate_json(name, content, rng):
    """The bytes of a file of JSON, or of JSON lines."""
    lines = content.splitlines() if name.endswith(".jsonl") else [content]
    with contextlib.suppress(ValueError, RecursionError):  # no JSON, or not any more
        k = rng.randrange(len(lines))
        lines[k] = json.dumps(mutate_value(json.loads(lines[k]), rng)).encode()
    return b"\n".join(lines)


def flags_of(script, words):
    """All that its help mentions."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        start(script, [*words, "-h"])
    return re.findall(r"--\w+", text.getvalue())


def make_case(seed, i):
    rng = random.Random(f"{seed} {i}")
    script, text, files = rng.choice(COMMANDS)
    words = text.split()
    flags = flags_of(script, text.replace("@preset", "").split())
    files = {name: expand(content) for name, content in files.items()}
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(list(files))
        kind = rng.choice(("value", "bytes", "flag", "word"))
        if kind == "value":
            files[name] = mutate_json(name, files[name], rng)
        elif kind == "bytes":
            pieces = BYTES if "." in name else BYTES[:-1]  # no name of a file is as long
            files[name] = splice(files[name], rng.choice(pieces), rng)
        elif kind == "flag":
            words = [*words, rng.choice(flags), rng.choice(WORDS)]
        else:
            misspelt = rng.choice(flags)[:-1]
            words = splice(words, [rng.choice((*WORDS, misspelt))], rng)
    return Case(script, words, files)


def start(script, words):
    module = importlib.import_module(script)
    if script in SCRIPTS:
        common.launch(module.main, module.parse_args(words))
    sys.exit(module.main(words))


def stop(*args, **options):
    raise SystemExit(0)


def be_script(case, folder):
    """In a fork: the script as from a command line."""
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if "ds.json" in case.files:
        common.Run.resume = stop
    else:
        common.load_model = stop
    start(case.script, case.words)


def run_case(case, folder):
    """(exit code, None where it hangs; output)"""
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    process = FORK.Process(target=be_script, args=(case, folder))
    process.start()
    process.join(PATIENCE)
    code = process.exitcode
    process.kill()
    return code, (folder / "output.txt").read_text(errors="replace")


def is_fault(code, output):
    if code == 2:  # a line names a flag, a word or a file
        errors = re.findall("(?:ERROR|error:) .*", output)
        return "Traceback" in output or not re.search(NAME, "\n".join(errors))
    return code != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--n", type=int, default=2000, help="cases")
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    parser.add_argument("--only", type=int, help="run this case and keep its folder")
    args = parser.parse_args()
    root = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.chdir(root)
    os.mkdir("models")
    test_chat.make_babbler()
    counts = collections.Counter()
    n_faults = 0
    for i in tqdm(range(args.n) if args.only is None else [args.only], disable=None):
        case = make_case(args.seed, i)
        code, output = run_case(case, root / str(i))
        counts[f"exit code {code}"] += 1
        n_faults += is_fault(code, output)
        if is_fault(code, output) or args.only is not None:
            tqdm.write(f"\n--seed {args.seed} --only {i}: exit code {code} of {case.script}.py")
            tqdm.write(f"{shlex.join(case.words)}\n{output[-2000:]}")
        if args.only is None:
            shutil.rmtree(root / str(i))
    print(f"{n_faults} faults; {dict(counts)}; {root}")
    return 1 if n_faults else 0


if __name__ == "__main__":
    sys.exit(main())
