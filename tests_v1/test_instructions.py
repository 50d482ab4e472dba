"""Task folders (--data_format ni, flan): prompts character by character, what fits, draws, caps, metrics; sft_causal.py."""

import collections
import json
import random
import re
import string
import types

import numpy as np
import pytest
from conftest import ROOT, assert_same_mathematics, bpe_tokenizer, flags, rows, run_jobs, write_llama

import common_v1 as common
import sft_causal

TASK = {
    "Definition": ["Say how many animals there are "], "Categories": ["Word  Analogy"],
    "Positive Examples": [{"input": "the cat reads", "output": "one", "explanation": "only the cat"},
                          {"input": " the cat, the dog! ", "output": "two ", "explanation": "cat and dog."},
                          {"input": "a book", "output": "no"}],
    "Negative Examples": [{"input": "the dog", "output": "three", "explanation": "one dog"}, {"input": "water", "output": "no?"}],
}
QUERY = "Now complete the following example -\nInput: the dog reads.\nOutput: "
DEFINITION = "Definition: Say how many animals there are.\n\n"
POSITIVE = [" Positive Example 1 -\nInput: the cat reads.\n Output: one.\n\n", " Positive Example 2 -\nInput: the cat, the dog!\n Output: two.\n\n"]
EXPLAINED = [" Positive Example 1 -\nInput: the cat reads.\n Output: one.\n Explanation: only the cat.\n\n",
             " Positive Example 2 -\nInput: the cat, the dog!\n Output: two.\n Explanation: cat and dog.\n\n"]
NEGATIVE = [" Negative Example 1 -\nInput: the dog.\n Output: three.\n\n", " Negative Example 2 -\nInput: water.\n Output: no?\n\n"]
FIVE = [DEFINITION + QUERY, "".join(POSITIVE) + QUERY, DEFINITION + "".join(POSITIVE) + QUERY, DEFINITION + "".join(POSITIVE + NEGATIVE) + QUERY,
        DEFINITION + "".join(EXPLAINED) + QUERY]


def words(text):
    return len(text.split())


def args_of(**changes):
    return types.SimpleNamespace(**{"data_format": "ni", "seed": 0, **common.TASK_FLAGS, **changes})


def prompts_of(task, text, limit=10**6, split="train", size=words, **changes):
    task = {"Task": "task7_count", **task, "Definition": task.get("Definition", [""])[0]}
    return common.task_prompts(args_of(**changes), split, task, text, limit, size)


def write_tasks(folder, tasks, splits):
    """<folder>/tasks/<name>.json, <folder>/splits/default/<split>_tasks.txt; tasks: {name: (object, instances)}."""
    (folder / "tasks").mkdir(parents=True)
    (folder / "splits" / "default").mkdir(parents=True)
    for name, (task, instances) in tasks.items():
        (folder / "tasks" / f"{name}.json").write_text(json.dumps({**task, "Instances": instances}))
    for split, names in splits.items():
        (folder / "splits" / "default" / f"{split}_tasks.txt").write_text("\n".join(names) + "\n\n")
    return folder


def instances(n, first="the dog reads", references=1):
    return [{"id": f"i{i}", "input": f"{first} {i}", "output": [f"{'one two three'.split()[r]} {i % 7}" for r in range(references)]} for i in range(n)]


@pytest.fixture
def folder(mount):
    """Three tasks, 40 + 9 + 9 instances; those of the first have two references."""
    return write_tasks(mount / "ni", {"task1_a": (TASK, instances(40, references=2)), "task2_b": (TASK, instances(9, "a cat")),
                                      "task3_c": ({**TASK, "Categories": ["Title Generation"]}, instances(9, "a book"))},
                       {"train": ["task1_a"], "dev": ["task2_b"], "test": ["task3_c"]})


def ni_flags(mount, run="run", **changes):
    return flags(mount, run, **{"data": None, "data_format": "ni", "task_dir": mount / "ni" / "tasks", "max_new_tokens": 3, **changes})


def run(script, words):
    args = script.parse_args(words)
    return script.main(args)


# ------------------------------------------------------------------------------------------------ prompts


def test_the_five_encodings_character_by_character():
    assert prompts_of(TASK, " the dog reads ", tk_instruct=True) == (FIVE, 0, 0)


@pytest.mark.parametrize("changes, expected", [
    ({}, DEFINITION + QUERY), ({"no_task_definition": True}, QUERY), ({"add_task_name": True}, "task7_count. " + DEFINITION + QUERY),
    ({"num_pos_examples": 1}, DEFINITION + POSITIVE[0] + QUERY), ({"num_neg_examples": 2}, DEFINITION + "".join(NEGATIVE) + QUERY),
    ({"num_pos_examples": 9}, DEFINITION + "".join(POSITIVE) + " Positive Example 3 -\nInput: a book.\n Output: no.\n\n" + QUERY),
    ({"num_neg_examples": 1, "add_explanation": True}, DEFINITION + NEGATIVE[0][:-1] + " Explanation: one dog.\n\n" + QUERY)], ids=str)
def test_prompt_flags(changes, expected):
    assert prompts_of(TASK, "the dog reads", **changes) == ([expected], 0, 0)


def test_evaluation_has_one_prompt_which_the_flags_say_also_with_tk_instruct():
    for split in ("eval", "test"):
        assert prompts_of(TASK, "the dog reads", split=split, tk_instruct=True, num_pos_examples=2, add_explanation=True) == ([FIVE[4]], 0, 0)


@pytest.mark.parametrize("text, line", [("why?", "why?"), ("ja", "ja."), ("ends with é", "ends with é."), ("quote”", "quote”."), ("", ".")])
def test_a_full_stop_unless_ascii_punctuation_ends_it(text, line):
    prompt, = prompts_of(TASK, text)[0]
    assert prompt == DEFINITION + f"Now complete the following example -\nInput: {line}\nOutput: "


def test_flan_prompt():
    task = {"Instruction Prompt": "Count animals.\n{examplars}{task_input}", "Examplars": [{"input": " a cat", "output": "one"}, {"input": "{task_input}!", "output": "no."}]}
    def of(n):
        return common.task_prompts(args_of(data_format="flan", num_shots=n), "train", task, " the dog", 100, words)[0]
    query = "Now complete the following example \nthe dog.\nOutput: "
    assert of(0) == [f"Count animals.\n{query}"]
    assert of(2) == [f"Count animals.\n(1) a cat.\n Output: one.\n(2) {{task_input}}!\n Output: no.\n{query}"]


# ------------------------------------------------------------------------------------------------ what fits


def tk_instruct_prompt(task, text, encoding, limit, size):
    """The published procedure step by step: an example is taken while definition, examples joined by blanks and query have at most `limit` tokens."""
    define, n_positive, n_negative, explain = encoding
    dot = lambda line: line if line[-1] in string.punctuation else line + "."
    definition = dot("Definition: " + task["Definition"][0].strip()) + "\n\n" if define else ""
    query = "Now complete the following example -\n" + dot("Input: " + text.strip()) + "\nOutput: "
    taken = {"Positive": [], "Negative": []}
    for kind, n in (("Positive", n_positive), ("Negative", n_negative)):
        for k, example in enumerate(task[kind + " Examples"][:n]):
            shown = f" {kind} Example {k + 1} -\n" + dot("Input: " + example["input"].strip()) + "\n" + dot(" Output: " + example["output"].strip()) + "\n"
            if explain and "explanation" in example:
                shown += dot(" Explanation: " + example["explanation"].strip()) + "\n"
            shown += "\n"
            before = " ".join(taken["Positive"]) + (" ".join(taken["Negative"]) if kind == "Negative" else "")
            if size(definition + before + shown + query) > limit:
                break
            taken[kind].append(shown)
    return definition + "".join(taken["Positive"]) + "".join(taken["Negative"]) + query


def test_as_many_examples_as_tk_instruct_takes():
    """Against the published procedure, with a real tokenizer, over limits that cut everywhere; counted, and the quick estimate in front of the
    counting never takes one that does not fit."""
    rng, tokenizer = random.Random(0), bpe_tokenizer()
    size = lambda text: len(tokenizer(text).input_ids)
    text = lambda longest: " ".join(rng.choices("the cat dog reads water book answer no yes a".split(), k=rng.randint(1, longest)))
    seen = collections.Counter()
    for _ in range(150):
        example = lambda: {"input": text(8), "output": text(2), **({"explanation": text(5)} if rng.random() < 0.7 else {})}
        task = {"Definition": [text(12)], "Positive Examples": [example() for _ in range(3)], "Negative Examples": [example() for _ in range(2)]}
        encoding = (rng.random() < 0.8, rng.randint(0, 3), rng.randint(0, 2), rng.random() < 0.5)
        given, limit = text(8), rng.randint(80, 400)
        expected = tk_instruct_prompt(task, given, encoding, limit, size)
        flags_ = dict(no_task_definition=not encoding[0], num_pos_examples=encoding[1], num_neg_examples=encoding[2], add_explanation=encoding[3])
        (found,), lost, cut = prompts_of(task, given, limit, size=size, **flags_)
        seen["lost"] += lost
        assert size(found) <= limit
        if size(expected) <= limit:
            assert found == expected
            seen["whole", expected.count("Example ")] += 1
            assert cut == 0 and lost == (expected.count("Example ") < min(encoding[1], 3) + encoding[2])
        else:
            seen["cut"] += 1
            assert found.endswith("\nOutput: ") and "Example " not in found
    assert seen["lost"] > 30 and seen["cut"] > 3 and all(seen["whole", n] > 3 for n in range(4)), seen


def test_examples_are_measured_with_blanks_between_them_as_tk_instruct_does():
    whole, = prompts_of(TASK, "the dog reads", num_pos_examples=3)[0]
    assert prompts_of(TASK, "the dog reads", len(whole) + 1, size=len, num_pos_examples=3) == ([whole], 0, 0)
    assert prompts_of(TASK, "the dog reads", len(whole), size=len, num_pos_examples=3) == ([DEFINITION + "".join(POSITIVE) + QUERY], 1, 0)


def test_examples_go_first_then_the_end_of_the_input_and_the_query_stays():
    long = " ".join(f"w{i}" for i in range(60))
    (prompt,), lost, cut = prompts_of(TASK, long, 40, num_pos_examples=2)
    assert (lost, cut) == (1, 1) and words(prompt) == 40
    assert prompt.startswith(DEFINITION + "Now complete the following example -\nInput: w0 w1 ") and re.search(r"w2\d\.\nOutput: $", prompt)
    (prompt,), lost, cut = prompts_of({**TASK, "Definition": [long]}, "the dog reads", 40, num_pos_examples=2)  # the definition is what is long
    assert (lost, cut) == (1, 1) and words(prompt) <= 40 and prompt.endswith("Input: the dog reads.\nOutput: ") and prompt.startswith("Definition: w0 w1 ")
    (prompt,), lost, cut = prompts_of({**TASK, "Definition": [long]}, long, 40)
    assert cut == 1 and words(prompt) <= 40 and prompt.endswith("\nOutput: ") and "Input: w0 w1 w2 w3" in prompt


def test_the_task_name_that_tk_instruct_does_not_measure_costs_the_last_example_not_the_query():
    whole = DEFINITION + "".join(POSITIVE) + QUERY
    assert prompts_of(TASK, "the dog reads", words(whole), num_pos_examples=2)[0] == [whole]
    assert prompts_of(TASK, "the dog reads", words(whole), num_pos_examples=2, add_task_name=True) == (["task7_count. " + DEFINITION + POSITIVE[0] + QUERY], 1, 0)


# ------------------------------------------------------------------------------------------------ folders


def read(folder, **changes):
    problems, args = [], args_of(task_dir=str(folder / "tasks"), **changes)
    found = list(common.read_tasks(args, common.find_tasks(args, problems), problems))
    assert not problems, problems
    return collections.Counter(split for _, split, *_ in found), [(split, task["Task"], instance["id"]) for _, split, task, instance in found]


def test_splits_and_caps(tmp_path):
    """Of a test task the first 100 instances count; a cap draws among what is left, for training by the seed."""
    names = {"train": ["task1_a", "task2_b"], "dev": ["task3_c"], "test": ["task4_d"]}
    folder = write_tasks(tmp_path / "f", {name: (TASK, instances(150)) for part in names.values() for name in part}, names)
    counts, rows = read(folder)
    assert counts == {"train": 300, "eval": 150, "test": 100} and [r for r in rows if r[0] == "test"] == [("test", "task4_d", f"i{i}") for i in range(100)]
    counts, capped = read(folder, max_num_instances_per_task=20, max_num_instances_per_eval_task=30)
    assert counts == {"train": 40, "eval": 30, "test": 30} and capped == [row for row in rows if row in set(capped)]  # in their order
    assert read(folder, max_num_instances_per_task=20, max_num_instances_per_eval_task=30)[1] == capped
    other = read(folder, max_num_instances_per_task=20, max_num_instances_per_eval_task=30, seed=1)[1]
    assert [r for r in other if r[0] != "train"] == [r for r in capped if r[0] != "train"] and other != capped


@pytest.mark.parametrize("change, message", [
    ({"task": None}, "line 1: no file"), ({"task": "[]"}, "no list 'Instances'"), ({"task": "{"}, "task1_a.json: cannot be read"),
    ({"Definition": []}, "'Definition' is no text"), ({"Definition": " "}, "'Definition' is no text"),
    ({"Positive Examples": [{"input": "x"}]}, "'Positive Examples' is no list of objects with 'input' and 'output'"),
    ({"Instances": [{"input": "a", "output": ["b"]}, {"input": "a", "output": []}]}, "Instances[1]: 'output' is no list of texts"),
    ({"Instances": [{"input": "a", "output": ["  "]}]}, "Instances[0]: 'output'"), ({"Instances": [{"input": 5, "output": ["b"]}]}, "no list 'Instances'"),
    ({"Instances": [{"input": "\ud83d", "output": ["b"]}]}, "half a character"), ({"Instances": []}, "'Instances' is empty"),
    ({"Categories": [5]}, "'Categories' is no list of texts"), ({"Categories": ["Task1 a"]}, "task task1_a is named like a category")], ids=str)
def test_what_is_wrong_with_a_task_is_said_before_the_model_loads(folder, mount, change, message, capsys):
    path = folder / "tasks" / "task1_a.json"
    task = json.loads(path.read_text())
    path.unlink()
    if "task" not in change:
        path.write_text(json.dumps({**task, **change}))
    elif change["task"]:
        path.write_text(change["task"])
    write_llama(mount / "models" / "llama")
    with pytest.raises(SystemExit) as stop:
        run(sft_causal, ni_flags(mount, model_init_name="llama"))
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and message in shown and "task1_a" in shown
    assert not (mount / "models" / "run").exists()


def test_a_task_named_like_the_category_of_another(folder, mount, capsys):
    write_llama(mount / "models" / "llama")
    path = folder / "tasks" / "task3_c.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "Categories": ["Task1 a"]}))
    with pytest.raises(SystemExit):
        run(sft_causal, ni_flags(mount, model_init_name="llama"))
    assert capsys.readouterr().err.count("task task1_a is named like a category") == 1


def test_a_task_without_categories_or_with_one_as_text(folder):
    path = folder / "tasks" / "task1_a.json"
    for categories, expected in ((None, []), ("Title Generation", ["Title Generation"])):
        task = json.loads(path.read_text())
        task.pop("Categories", None)
        path.write_text(json.dumps({**task, **({"Categories": categories} if categories else {})}))
        args, problems = args_of(task_dir=str(folder / "tasks")), []
        first = next(common.read_tasks(args, common.find_tasks(args, problems), problems))
        assert first[2]["Categories"] == expected and not problems


def test_a_list_that_is_no_utf8_and_a_flan_prompt_without_a_place_for_examples(folder):
    (folder / "splits" / "default" / "dev_tasks.txt").write_bytes(b"task2_b\xff\n")
    common.find_tasks(args_of(task_dir=str(folder / "tasks")), problems := [])
    assert len(problems) == 1 and "dev_tasks.txt: cannot be read" in problems[0]
    (folder / "tasks" / "task1_a.json").write_text(json.dumps({"Instruction Prompt": "Count. {task_input}", "Examplars": [], "Instances": instances(2)}))
    args = args_of(task_dir=str(folder / "tasks"), data_format="flan", num_shots=1)
    list(common.read_tasks(args, {"train task1_a": folder / "tasks" / "task1_a.json"}, problems := []))
    assert len(problems) == 1 and "no {examplars} in 'Instruction Prompt'" in problems[0]


def test_flags_and_lists_that_do_not_go_together(folder, mount, capsys):
    (folder / "splits" / "default" / "dev_tasks.txt").write_text("task2_b\ntask1_a\ntask9_x\n")
    with pytest.raises(SystemExit) as stop:
        run(sft_causal, ni_flags(mount, data="ragged", num_shots=2, add_explanation=True, max_num_instances_per_task=0))
    shown = capsys.readouterr().err
    for message in ("line 2: task task1_a is in train already", "line 3: no file", "--num_shots has no effect with --data_format ni", "--data ragged: --data_format ni reads",
                    "--add_explanation has no effect without examples", "--max_num_instances_per_task 0: expected 1 or more"):
        assert message in shown
    with pytest.raises(SystemExit):
        run(sft_causal, flags(mount, tk_instruct=True, num_pos_examples=2))
    assert "--num_pos_examples has no effect without --data_format" in (shown := capsys.readouterr().err) and "--tk_instruct has no effect" in shown
    with pytest.raises(SystemExit):
        run(sft_causal, ni_flags(mount, task_dir=mount / "nowhere"))
    assert "nowhere: expected a folder" in capsys.readouterr().err
    assert stop.value.code == 2


# ------------------------------------------------------------------------------------------------ training


def test_sft_causal_has_every_prompt_and_reference_and_draws_them(folder, mount):
    write_llama(mount / "models" / "llama", max_position_embeddings=1024)
    args = sft_causal.parse_args(ni_flags(mount, model_init_name="llama", tk_instruct=True, num_pos_examples=2))
    _, _, tokenizer = common.open_model_folder(args, [])
    template, end = sft_causal.set_template(args, tokenizer, problems := [])
    data, = sft_causal.load_data(args, tokenizer, template, end, problems)
    assert not problems and data.counts["train"] == 40 and len(data.tokens["train"]) == 400 and len(data.tokens["eval"]) == 9
    training = sft_causal.TrainingData(args, [data], 32, 302, tokenizer.pad_token_id, False)
    training.start_epoch(0)
    ids, is_target = sft_causal.unseal(training.example(5))
    text = tokenizer.decode(ids)
    assert any(f"<|im_start|>user\n{prompt}<|im_end|>" in text for prompt in prompts_of(TASK, "the dog reads 5", tk_instruct=True)[0])
    assert tokenizer.decode(ids[is_target]) in ("one 5<|im_end|>", "two 5<|im_end|>")
    first = training.chosen.copy()
    training.start_epoch(1)
    counts = np.bincount(np.concatenate([first, training.chosen]) % 10, minlength=10)
    assert (first != training.chosen).any() and counts.max() < 20
    assert "<|im_start|>user\n" + prompts_of(TASK, "a cat 0", split="eval", num_pos_examples=2)[0][0] in tokenizer.decode(sft_causal.unseal(data.tokens["eval"][0])[0])


@pytest.mark.slow
def test_a_run_reports_overall_by_category_and_by_task_and_resumes_exactly(folder, mount):
    write_llama(mount / "models" / "llama", max_position_embeddings=1024)
    words_ = dict(model_init_name="llama", tk_instruct=True, num_pos_examples=2, eval_steps=3, max_steps=8, save_steps=3, lr_scheduler_type="constant", warmup_steps=None, metric_for_best="rougeL")
    assert run(sft_causal, ni_flags(mount, "whole", **words_)) == 0
    assert run(sft_causal, ni_flags(mount, "parts", **{**words_, "max_steps": 3})) == 0
    assert run(sft_causal, ni_flags(mount, "parts", **words_, resume=True)) == 0  # into the second epoch, whose draws are others
    whole, parts = rows(mount / "models" / "whole"), rows(mount / "models" / "parts")
    assert len(whole) == 8
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"]
    test = rows(mount / "models" / "whole", "test")[-1]
    for metric in ("exact_match", "rouge1", "rougeL"):
        assert {f"test/{metric}", f"test/{metric}_for_title_generation", f"test/{metric}_for_task3_c"} <= set(test)
    assert test["test/gen_len"] >= 1 and "test/token_f1" not in test
    predictions = json.loads(next((mount / "models" / "whole").glob("test_*.json")).read_text())
    assert len(predictions) == 9 and predictions[0]["orig_d"]["Instance"]["output"] == ["one 0"] and set(predictions[0]["orig_d"]) == {"Task", "Categories", "Instance"}


def test_rows_that_are_answered_are_spread_over_the_tasks(folder, mount):
    write_llama(mount / "models" / "llama", max_position_embeddings=1024)
    names = ["task2_b", "task3_c"]
    (folder / "splits" / "default" / "dev_tasks.txt").write_text("\n".join(names))
    (folder / "splits" / "default" / "test_tasks.txt").unlink()
    assert run(sft_causal, ni_flags(mount, model_init_name="llama", max_steps=1, n_generate=6)) == 0
    predictions = json.loads(next((mount / "models" / "run").glob("temp*step=1.json")).read_text())
    assert collections.Counter(p["orig_d"]["Task"] for p in predictions) == {name: 3 for name in names}


@pytest.mark.slow
def test_two_processes_draw_and_train_as_one_at_stages_0_and_3(folder, mount):
    write_llama(mount / "models" / "llama", max_position_embeddings=1024)
    options = dict(model_init_name="llama", tk_instruct=True, num_pos_examples=2, max_steps=7, learning_rate=0.001, eval_batch_size=7)  # into the second epoch
    run_jobs(mount, [["sft_causal.py", *ni_flags(mount, "one", **options)]], 1)
    run_jobs(mount, [["sft_causal.py", *ni_flags(mount, f"two-{stage}", ds_config=f"zero{stage}", **options)] for stage in (0, 3)], 2)
    run_jobs(mount, [["sft_causal.py", *ni_flags(mount, f"split-{stage}", ds_config=f"zero{stage}", train_batch_size=4, gradient_accumulation_steps=2, **options)]
                     for stage in (0, 3)], 2)
    for run_name in (f"{kind}-{stage}" for kind in ("two", "split") for stage in (0, 3)):
        assert_same_mathematics(mount / "models" / run_name, mount / "models" / "one")
        assert {k: v for k, v in rows(mount / "models" / run_name, "test")[-1].items() if "rouge" in k} == {
            k: v for k, v in rows(mount / "models" / "one", "test")[-1].items() if "rouge" in k}
    run_jobs(mount, [["sft_causal.py", *ni_flags(mount, "other", **{**options, "tk_instruct": False})]], 1)  # the control
    with pytest.raises(AssertionError):
        assert_same_mathematics(mount / "models" / "other", mount / "models" / "one")


# ------------------------------------------------------------------------------------------------ metrics


def test_scores_are_rouge_scores_best_over_references_and_exact_match_keeps_articles():
    from rouge_score import rouge_scorer
    scorer, reference = common.rouge_scorer(), rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    text, references = "The dogs were running to a house", ["a dog runs home", "houses"]
    each = [reference.score(r, text) for r in references]
    em, r1, rl = common.instruction_scores(text, references, scorer)
    assert em == 0 and r1 == max(s["rouge1"].fmeasure for s in each) > 0 and rl == max(s["rougeL"].fmeasure for s in each) > 0
    for prediction, gold, same in (("  The Dog! ", ["x", "the  dog"], 1), ("the dog", ["dog"], 0), ("don't", ["dont"], 1), ("", [""], 1), ("é", ["É"], 1)):
        assert common.instruction_scores(prediction, gold, scorer)[0] == same


def test_metrics_by_category_and_task():
    scores = [(1, 1, 0.5), (0, 0.25, 0.25), (0, 1 / 3, 0)]
    found = common.instruction_metrics(scores, ["t1", "t1", "t2"], ["Word  Analogy", None, "Word Analogy"])
    assert found == {"exact_match": 33.3333, "rouge1": 52.7778, "rougeL": 25.0, "exact_match_for_word_analogy": 50.0, "rouge1_for_word_analogy": 66.6667,
                     "rougeL_for_word_analogy": 25.0, "exact_match_for_t1": 50.0, "rouge1_for_t1": 62.5, "rougeL_for_t1": 37.5,
                     "exact_match_for_t2": 0.0, "rouge1_for_t2": 33.3333, "rougeL_for_t2": 0.0}


# ------------------------------------------------------------------------------------------------ real files


@pytest.mark.skipif(not (ROOT.parent / "shared" / "data" / "natural_instructions").is_dir(), reason="needs ../shared")
def test_real_tasks():
    folder = ROOT.parent / "shared" / "data" / "natural_instructions"
    counts, _ = read(folder)
    assert counts == {"train": 238 + 195, "test": 200}
