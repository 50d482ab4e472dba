"""data/prepare_ni.py: prompts character by character, what fits, draws and caps, what seq2seq.py
makes of the records."""

import json
import pathlib
import random
import string

import pytest
from conftest import ROOT, SHARED, make_model, metrics, needs_shared, run
from transformers import AutoTokenizer

import prepare_ni
import score_predictions

TASK = {
    "Definition": ["Say how many animals there are "],
    "Categories": ["Counting"],
    "Positive Examples": [
        {"input": "the cat reads", "output": "one", "explanation": "only the cat"},
        {"input": " the cat, the dog! ", "output": "two ", "explanation": "cat and dog."},
    ],
    "Negative Examples": [
        {"input": "the dog", "output": "three", "explanation": "one dog"},
        {"input": "water", "output": "no?"},
    ],
}
QUERY = "Now complete the following example -\nInput: the dog reads.\nOutput: "
DEFINITION = "Definition: Say how many animals there are.\n\n"
POSITIVE = [
    " Positive Example 1 -\nInput: the cat reads.\n Output: one.\n\n",
    " Positive Example 2 -\nInput: the cat, the dog!\n Output: two.\n\n",
]
NEGATIVE = [
    " Negative Example 1 -\nInput: the dog.\n Output: three.\n\n",
    " Negative Example 2 -\nInput: water.\n Output: no?\n\n",
]
EXPLAINED = (
    " Positive Example 1 -\nInput: the cat reads.\n Output: one.\n Explanation: only the cat.\n\n"
    " Positive Example 2 -\nInput: the cat, the dog!\n Output: two.\n Explanation: cat and dog.\n\n"
)
FLAN = {
    "Instruction Prompt": "Count animals.\n{examplars}{task_input}",
    "Examplars": [
        {"input": " a cat", "output": "one"},
        {"input": "{task_input}!", "output": "no."},
    ],
}


def instances(n, text="the dog reads"):
    return [{"id": f"i{i}", "input": f" {text} ", "output": ["one", str(i)]} for i in range(n)]


def prepare(tasks, *words, out="data/ni.json", **splits):
    """What is written of {name: task}; splits: train=[name], ... Or the exit code."""
    pathlib.Path("tasks").mkdir(exist_ok=True)
    pathlib.Path("splits/default").mkdir(parents=True, exist_ok=True)
    for name, task in tasks.items():
        pathlib.Path("tasks", f"{name}.json").write_text(json.dumps(task))
    for split, names in splits.items():
        pathlib.Path("splits/default", f"{split}_tasks.txt").write_text("\n".join(names) + "\n")
    try:
        prepare_ni.main(["--task_dir", "tasks", "--out", out, *map(str, words)])
    except SystemExit as stop:
        return stop.code
    return json.loads(pathlib.Path(out).read_text())


def prompt_of(*words, task=TASK):
    found = prepare({"task7": {**task, "Instances": instances(1)}}, *words, dev=["task7"])
    return found["eval"][0]["prompt"]


def test_records_of_training_have_five_prompts_and_all_references():
    found = prepare(
        {"task7": {**TASK, "Instances": instances(1)}},
        *("--tk_instruct", "--num_pos_examples", 2, "--add_explanation", "--add_task_name"),
        train=["task7"],
    )
    positive, negative = "".join(POSITIVE), "".join(NEGATIVE)
    prompts = [DEFINITION, positive, DEFINITION + positive, DEFINITION + positive + negative]
    record = {
        "prompt": [shown + QUERY for shown in [*prompts, DEFINITION + EXPLAINED]],
        "completion": ["one", "0"],
        "references": ["one", "0"],
        "task": "task7",
        "categories": ["Counting"],
        "id": "i0",
    }
    assert found == {"train": [record]}


@pytest.mark.parametrize(
    "words, prompt",
    [
        ([], DEFINITION + QUERY),
        (["--no_task_definition", "--num_pos_examples", 1], POSITIVE[0] + QUERY),
        (["--tk_instruct", "--num_pos_examples", 1], DEFINITION + POSITIVE[0] + QUERY),
        (["--no_task_definition", "--add_task_name"], "task7. " + QUERY),
        (["--num_neg_examples", 9], DEFINITION + "".join(NEGATIVE) + QUERY),
        (["--num_pos_examples", 2, "--add_explanation"], DEFINITION + EXPLAINED + QUERY),
    ],
)
def test_prompts_of_evaluation(words, prompt):
    assert prompt_of(*words) == prompt


def test_flan_prompts():
    query = "Now complete the following example \nthe dog reads.\nOutput: "
    shots = "(1) a cat.\n Output: one.\n(2) {task_input}!\n Output: no.\n"
    assert prompt_of("--num_shots", 2, task=FLAN) == f"Count animals.\n{shots}{query}"
    other = {**FLAN, "Instruction Prompt": "{task_input}"}
    assert prepare({"t": {**other, "Instances": instances(1)}}, out="x.json", dev=["t"])


@pytest.mark.parametrize("text, line", [("ja", "ja."), ("é", "é."), ("why?", "why?"), ("", ".")])
def test_a_full_stop_unless_ascii_punctuation_ends_a_line(text, line):
    prompt = prepare_ni.tk_prompt(TASK, prepare_ni.TK_INSTRUCT[0])
    assert prepare_ni.fill(prompt, "", text).split("\n")[-2] == f"Input: {line}"


def published_prompt(task, text, encoding, max_length, count):
    """Tk-Instruct's procedure (src/ni_collator.py), step by step."""

    def dot(line):
        return line if line[-1] in string.punctuation else line + "."

    definition = ""
    if encoding.definition:
        definition = dot("Definition: " + task["Definition"][0].strip()) + "\n\n"
    query = "Now complete the following example -\n" + dot("Input: " + text.strip()) + "\nOutput: "
    taken = {"Positive": [], "Negative": []}
    for kind, n in (("Positive", encoding.n_positive), ("Negative", encoding.n_negative)):
        for number, example in enumerate(task[f"{kind} Examples"][:n], 1):
            shown = f" {kind} Example {number} -\n" + dot("Input: " + example["input"]) + "\n"
            shown += dot(" Output: " + example["output"]) + "\n"
            if encoding.explanation and "explanation" in example:
                shown += dot(" Explanation: " + example["explanation"]) + "\n"
            shown += "\n"
            before = " ".join(taken["Positive"])
            if kind == "Negative":
                before += " ".join(taken["Negative"])
            if count(definition + before + shown + query) > max_length:
                break
            taken[kind].append(shown)
    return definition + "".join(taken["Positive"] + taken["Negative"]) + query


def test_as_many_examples_as_tk_instruct_takes():
    """With a real tokenizer, over limits that cut everywhere; what is too long all the same loses
    its last examples, then the end of its input, and never the query."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny-llama")  # tells blanks apart
    rng = random.Random(0)

    def count(text):
        return len(tokenizer(text).input_ids)

    def text(longest):
        words = "the cat dog reads water book answer no yes a".split()
        return " ".join(rng.choices(words, k=rng.randint(1, longest)))

    def example():
        found = {"input": text(8), "output": text(2)}
        return {**found, "explanation": text(5)} if rng.random() < 0.7 else found

    cases = set()
    for _ in range(1000):
        task = {"Definition": [text(4)]}
        task["Positive Examples"] = [example() for _ in range(3)]
        task["Negative Examples"] = [example() for _ in range(2)]
        options = (rng.random() < 0.8, rng.randint(0, 3), rng.randint(0, 2), rng.random() < 0.5)
        encoding = prepare_ni.Encoding(*options)
        given, max_length = text(30), rng.randint(75, 250)
        prompt = prepare_ni.tk_prompt(task, encoding)
        found, is_cut = prepare_ni.fit(prompt, given, max_length, count)
        assert count(found) <= max_length
        expected = published_prompt(task, given, encoding, max_length, count)
        if count(expected) <= max_length:
            assert found == expected
        else:
            assert is_cut and found[-9:] == "\nOutput: "
        n_examples = sum(map(len, prompt.examples))
        cases.add((is_cut, found.count(" Example ") < n_examples))
    assert {(False, False), (False, True), (True, True)} <= cases


def test_a_definition_that_leaves_no_room_for_the_input_is_named(capsys):
    tasks = {"t": {**TASK, "Instances": instances(1)}}
    limit = ["--tokenizer", str(ROOT / "models" / "tiny-t5"), "--max_source_length", 20]
    assert prepare(tasks, *limit, train=["t"]) == 2
    assert "t.json: ValueError: --max_source_length 20 leaves no room" in capsys.readouterr().err


def test_caps_and_draws():
    tasks = {}
    for name in ("train", "dev", "test"):
        tasks[name] = {**TASK, "Instances": instances(300, name)}
    splits = {name: [name] for name in tasks}
    caps = ["--max_num_instances_per_task", 20, "--max_num_instances_per_eval_task", 150]
    found = prepare(tasks, *caps, **splits)
    ids = {split: [record["id"] for record in found[split]] for split in found}
    assert [len(ids[split]) for split in ("train", "eval", "test")] == [20, 150, 100]
    assert ids["test"] == [f"i{i}" for i in range(100)]
    assert prepare(tasks, *caps, out="again.json", **splits) == found
    # those that are held out have the one prompt of evaluation
    held = prepare(tasks, "--tk_instruct", "--eval_fraction", 0.1, out="held.json", train=["train"])
    assert all(isinstance(record["prompt"], str) for record in held["eval"])
    assert len(held["train"]) in (0, 300)  # one input, one side


@pytest.mark.parametrize(
    "change, message",
    [
        ({"Instances": 5}, "TypeError: "),
        ({"Definition": []}, "IndexError: "),
        ({"Positive Examples": [{"input": "a"}]}, "KeyError: 'output'; prepare_ni.py -h says"),
        ({"Instances": [{"input": "a"}]}, "KeyError: 'output'"),
        ({"Instruction Prompt": "Answer.", "Examplars": []}, "KeyError: '{task_input}'"),
    ],
)
def test_a_task_that_is_none_is_named(change, message, capsys):
    task = {**TASK, "Instances": instances(1), **change}
    assert prepare({"t": task}, "--num_pos_examples", 1, train=["t"]) == 2
    assert f"tasks/t.json: {message}" in capsys.readouterr().err
    assert not pathlib.Path("data/ni.json").exists()


def test_lists_and_flags_that_are_wrong(capsys):
    tasks = {"t": {**TASK, "Instances": instances(1)}}
    assert prepare(tasks, train=["t", "missing"]) == 2
    assert prepare(tasks, train=["t"], test=["t"]) == 2
    assert prepare(tasks, "--split_dir", "nowhere", train=["t"]) == 2
    assert prepare(tasks, "--num_pos_examples", -1, train=["t"]) == 2
    errors = capsys.readouterr().err
    for text in (
        "tasks/missing.json",
        "test_tasks.txt: t is a task of train already",
        "nowhere: no tasks in train_tasks.txt",
        "--num_pos_examples: invalid natural value: '-1'",
    ):
        assert text in errors


@needs_shared
def test_seq2seq_trains_on_real_tasks_and_its_predictions_are_scored_by_category(capsys):
    model = make_model("t5")
    folder = SHARED / "data" / "natural_instructions" / "tasks"
    words = ["--tk_instruct", "--num_pos_examples", 1, "--eval_fraction", 0.05]
    words += ["--max_num_instances_per_task", 40, "--max_num_instances_per_eval_task", 12]
    words += ["--tokenizer", model, "--out", "data/ni.jsonl"]
    prepare_ni.main(["--task_dir", str(folder), *map(str, words)])
    words = ["--model_init_name", "t5", "--data", "ni", "--training_run_name", "run"]
    words += ["--metrics", "exact_match", "rougeL", "--max_new_tokens", 4, "--max_steps", 2]
    assert run(*words) == 0
    assert "test/rougeL" in metrics("run", "test")[0]
    predictions = next(pathlib.Path("models/run").glob("test_*.json"))
    capsys.readouterr()
    words = ["--predictions", str(predictions), "--per_category", "--per_task"]
    assert score_predictions.main(words) == 0
    shown = capsys.readouterr().out
    for group, n in {
        "all": 24,
        "Cause Effect Classification": 12,
        "task648_answer_generation": 12,
    }.items():
        assert f"{group} ({n} predictions): exact_match " in shown
