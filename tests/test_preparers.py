"""What all preparers of data/ promise: no key of train is in eval or test, whatever its case, its
blanks and its answer, and a script reads what is written. (prepare_glue.py leaves the published
files as they are.) What is committed is what make_demos.py and make_models.py make."""

import json
import pathlib
import re

import numpy as np
import pytest
from conftest import ROOT
from transformers import AutoTokenizer

import clf
import make_demos
import make_models
import prepare_eduqg
import prepare_ni
import prepare_oasst
import prepare_qa
import prepare_table
import prepare_text
import prepare_translation
import rewards
import seq2seq
import sft_causal

N_KEYS = 80
HELD_OUT = ["--eval_fraction", "0.2", "--test_fraction", "0.2"]
FILES = ["--train", "train.json", "--test", "test.json", *HELD_OUT]


def key(i):
    """Texts of which three have the same key: in another case, with other blanks."""
    return ("Key", "KEY ", "key  ")[i // N_KEYS] + f" {i % N_KEYS}."


def table_row(i):
    return {"q": key(i), "good": f"answer {i}", "bad": "x", "score": i % 2}


def article(i):
    questions = [{"question": f"Which {i}?", "answers": [{"text": f"answer {i}"}]}]
    return {"title": key(i), "paragraphs": [{"context": "Some.", "qas": questions}]}


def trivia(i):
    return {"Question": key(i), "Answer": {"Value": f"answer {i}", "Aliases": ["x", " "]}}


def science(i):
    row = {"support": f"Passage {i}.", "question": key(i), "correct_answer": f"answer {i}"}
    return {**row, "distractor1": "x", "distractor2": "y", "distractor3": "z"}


def comparison(i):
    answers = {"answer_0": "x", "answer_1": f"answer {i}", "score_0": -0.5, "score_1": 0.5}
    return {"question": {"full_text": key(i)}, **answers}


def tree(i):
    replies = []
    for rank, text in enumerate(["yes", f"answer {i}"]):
        replies.append({"text": text, "role": "assistant", "rank": rank})
    return {"prompt": {"text": key(i), "role": "prompter", "replies": replies}}


def write_json(name, rows):
    pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(name).write_text(json.dumps(rows))


def from_files(module, make_row, words):
    """Of files that share keys, for train and test."""
    write_json("train.json", [make_row(i) for i in range(2 * N_KEYS)])
    write_json("test.json", [make_row(i) for i in range(2 * N_KEYS, 2 * N_KEYS + 8)])
    module.main([*FILES, "--out", "data/d.json", *words.split()])


def from_pairs():
    """Every key has three translations, and the other way round."""
    for name, swap in (("a", 1), ("b", -1)):
        pairs = [(key(i), f"answer {i}")[::swap] for i in range(3 * N_KEYS)]
        lines = ["\t".join(pair) + "\n" for pair in pairs]
        pathlib.Path(f"{name}.tsv").write_text("".join(lines))
    words = ["--pairs", "a_nl-en=a.tsv", "b_en-nl=b.tsv", "--eval_fraction", "0.05"]
    prepare_translation.main([*words, "--test_fraction", "0.05", "--out", "data/d.json"])


def from_tasks():
    instances = [{"input": key(i % N_KEYS), "output": f"answer {i}"} for i in range(2 * N_KEYS)]
    task = {"Definition": "Do.", "Positive Examples": [], "Negative Examples": []}
    write_json("tasks/t.json", {**task, "Instances": instances})
    pathlib.Path("lists").mkdir()
    pathlib.Path("lists/train_tasks.txt").write_text("t\n")
    words = ["--task_dir", "tasks", "--split_dir", "lists", "--out", "data/d.json"]
    prepare_ni.main([*words, *HELD_OUT])


def from_books():
    """Three books of each key; of the same passage the key is the passage."""
    chapters = []
    for i in range(3 * N_KEYS):
        question = {"question_text": f"Why {i}?", "question_choices": [f"answer {i}", "x"]}
        passage = f"First. <hl> {key(i)} <hl> Last."
        entry = {"question": question, "answer": {"ans_choice": 0}, "hl_context": passage}
        chapters.append({"bname": f"book {i}", "questions": [entry]})
    write_json("chapters.json", chapters)
    prepare_eduqg.main(["--eduqg", "chapters.json", "--out", "books"])
    prepare_ni.main(["--task_dir", "books/tasks", "--out", "data/d.json"])


SOURCES = {  # and who reads what they write
    "table": (from_files, (prepare_table, table_row, "prompt=q completion=good"), seq2seq),
    "scores": (from_files, (prepare_table, table_row, "input=q target=score"), clf),
    "text": (from_files, (prepare_table, table_row, "text={q}"), sft_causal),
    "squad": (from_files, (prepare_qa, article, "--layout squad"), seq2seq),
    "triviaqa": (from_files, (prepare_qa, trivia, "--layout triviaqa"), sft_causal),
    "sciq": (from_files, (prepare_qa, science, "--layout sciq"), seq2seq),
    "webgpt": (from_files, (prepare_qa, comparison, "--layout webgpt"), clf),
    "chats": (from_files, (prepare_oasst, tree, "--to conversations"), sft_causal),
    "replies": (from_files, (prepare_oasst, tree, "--to pairs"), clf),
    "pairs": (from_pairs, (), seq2seq),
    "tasks": (from_tasks, (), seq2seq),
    "books": (from_books, (), seq2seq),
}


def read(script):
    """What a script makes of data/d.json: {split: [Example]}."""
    problems = []
    if script == clf:
        is_pair = "chosen" in pathlib.Path("data/d.json").read_text()
        words = ["--model_init_name", "x", "--data", "d"]
        args = clf.parse_args([*words, "--loss", "pairwise"] if is_pair else words)
        clf.complete_flags(args, None, problems)
        examples, _ = clf.read_examples(args, problems)
    elif script == sft_causal:
        args = sft_causal.parse_args(["--model_init_name", "x", "--data", "d"])
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny-llama")
        prompts = sft_causal.open_prompts(args, "x", tokenizer, problems)
        examples, _ = sft_causal.read_examples(args, prompts, problems)
    else:
        args = seq2seq.parse_args(["--model_init_name", "x", "--data", "d"])
        examples, _ = seq2seq.read_examples(args, problems)
    assert problems == []
    return examples


def keys_of(text):
    return set(re.findall(r"key\s+(\d+)", text.lower()))


@pytest.mark.parametrize("name", SOURCES)
def test_no_key_of_train_is_held_out_and_a_script_reads_it(name):
    make, words, script = SOURCES[name]
    make(*words)
    examples = read(script)
    keys = {}
    for split, found in examples.items():
        keys[split] = keys_of(json.dumps([example.record for example in found]))
        assert keys[split], f"{split} is empty"
    assert not keys["train"] & keys["eval"] and not keys["train"] & keys["test"]
    assert not keys["eval"] & keys["test"]
    assert len(keys["train"]) > N_KEYS / 3


def test_no_document_of_train_is_held_out():
    pathlib.Path("text.txt").write_text("\n\n".join(key(i % N_KEYS) for i in range(3 * N_KEYS)))
    model = str(ROOT / "models" / "tiny-t5")
    words = ["--input", "text.txt", "--tokenizer", model, "--out", "data/d"]
    prepare_text.main([*words, "--eval_fraction", "0.3"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    train, held_out = [
        keys_of(tokenizer.decode(np.fromfile(f"data/d/{split}.ids", "uint16")))
        for split in ("train", "eval")
    ]
    assert train and held_out and not train & held_out


def test_the_committed_demos_are_what_their_scripts_make(monkeypatch):
    monkeypatch.setattr(make_demos, "HERE", pathlib.Path("data").resolve())
    make_demos.main()
    names = [path.name for path in pathlib.Path("data").iterdir()]
    assert len(names) == 5
    for name in names:
        assert pathlib.Path("data", name).read_bytes() == (ROOT / "data" / name).read_bytes(), name
    assert make_models.train_unigram() == (ROOT / "models/tiny-t5/spiece.model").read_bytes()
    bpe = json.loads(make_models.train_bpe().to_str())
    assert bpe == json.loads((ROOT / "models/tiny-llama/tokenizer.json").read_text())


def test_rewards():
    wishes = [{"want": "digits"}] * 4 + [{"want": "vowels"}, {"want": "marks"}]
    replies = ["a1 2", "1 2 3 4 5", "", "abcdefgh12", "banana", "?!.,;"]
    assert rewards.wish([""] * 6, replies, wishes) == [0.4, 1, 0, 0.2, 0.5, 1]
    replies = ["so 3, then 1,204.50", "1204.5 or 7", "none", "-1204.5", "= 1204.5."]
    answers = [{"answer": "It is 1,204.5"}] * 5
    assert rewards.last_number([""] * 5, replies, answers) == [1, 0, 0, 0, 1]
    assert rewards.last_number([""], ["none"], [{"answer": "none"}]) == [0]
