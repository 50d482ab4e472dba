"""Distil a teacher's chains of thought into data files for students (Fine-tune-CoT), and score what teachers and students write.

    {"prompt": "A coin is heads up. Erin flips the coin. ...", "completion": "It starts heads up. Erin flips: tails up. ... --> no",
     "sample_index": 0, "answer": "no", "dataset_key": "coin_flip", "prediction_template": "ft_cot_token"}

A whole round with a scripted teacher, which is always right (a model: --server URL --model NAME, or --local MODEL_FOLDER):
    python data/cot.py make coin_flip --n 1000 --rationale --out cot/coin_flip.json             # 507 no, 493 yes
    python data/cot.py split --dataset cot/coin_flip.json --out cot/coin_flip__default.json     # 700 train, 300 test
    python data/cot.py teach --dataset cot/coin_flip.json --method zs_cot --rationales --root cot   # accuracy 100.00
    python data/cot.py filter --completions cot/completion_data/B_rationales__C_zs_cot/D_coin_flip.json --out cot/right.json   # 1000 of 1000
    python data/cot.py export --completions cot/right.json --dataset cot/coin_flip.json --split cot/coin_flip__default.json \\
        --method ft_cot --style token --family encoder_decoder --out data/coin_flip_cot.json   # 637 train, 63 eval, 300 test
    python seq2seq.py --data coin_flip_cot --model_init_name t5-small --training_run_name student
    python data/cot.py evaluate --best_on_eval models/student
The public sets: `make <dataset_key> --input FILE`; `split` of the public coin_flip, multiarith and date_understanding gives the
published split files byte for byte: 350/150, 420/180, 258/111.

Formats, keys and file names are those of Ho et al. 2022, "Large Language Models Are Reasoning Teachers" (public repository
itsnamgyu/reasoning-teacher), so each side reads the other's files; --root is the folder with completion_data/ and
finetune_data/, there `saved`. --compat keeps the listed bugs of their evaluator and label; see `judge` and TEMPLATES.
"""

import argparse
import collections
import concurrent.futures
import csv
import fcntl
import hashlib
import http.client
import importlib.util
import json
import math
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import numpy as np
from tqdm import tqdm

import records_v1 as records

CHAT = pathlib.Path(__file__).resolve().parent.parent / "chat.py"
EXIT_SAVED = 75  # as the trainers': stopped, and the same command goes on
STOP = "\nQ:"  # what a model invents behind its answer: the next question
ANSWER_TOKENS = 128


def choice(last):
    return {"what": f"a letter A to {last}", "find": rf"(?<!\w)[A-{last}](?!\w)", "compat": {"find": f"[A-{last}]"}}


# What counts as an answer; `judge` has the rules. clean: done to a text first; find: a candidate in it; value: what is compared (two
# floats within 1e-6); compat: what the earlier system had instead. Another kind of data set is another entry.
NUMBER = {"what": "a number", "clean": lambda text: text.replace(",", ""), "find": r"-?\d+(?:\.\d+)?", "value": float}
KINDS = {
    "A-C": choice("C"), "A-E": choice("E"), "A-F": choice("F"),
    "decimal": NUMBER,
    "integer": {**NUMBER, "compat": {"value": str}},
    "yes/no": {"what": "yes or no", "clean": lambda text: re.sub(r"[\"'.:,\s]", " ", text.lower()), "find": r"(?<![^ ])(?:yes|no)(?![^ ])"},
    "word": {"what": "a word", "clean": lambda text: re.sub(r"[\"'.\s]", "", text), "find": r"(?s)\A.*"},  # the whole text is one candidate
}
# size: of the public set. test_last: its published split is no random one but the last ones for test; train_n: so many of the rest.
DATASETS = {
    "single_eq": {"kind": "decimal", "size": 508}, "addsub": {"kind": "decimal", "size": 395}, "multiarith": {"kind": "integer", "size": 600},
    "gsm8k": {"kind": "integer", "size": 8792, "test_last": 1319}, "aqua": {"kind": "A-E", "size": 97721, "test_last": 254, "train_n": 10000},
    "svamp": {"kind": "decimal", "size": 1000}, "tracking_shuffled_objects": {"kind": "A-C", "size": 750},
    "date_understanding": {"kind": "A-F", "size": 369}, "coin_flip": {"kind": "yes/no", "size": 500},
    "last_letter_concatenation": {"kind": "word", "size": 500}, "commonsense_qa": {"kind": "A-E", "size": 10962, "test_last": 1221},
    "strategy_qa": {"kind": "yes/no", "size": 2290},
}
# (input, label) per family; prefix: what stands before the answer. openai: the earlier GPT-3 runs, marks between blank lines, stop word.
# The earlier ft_cot_natural had no comma, so its own evaluator did not find its prefix; --compat writes it so.
COMMA = "Therefore, the answer is"
TEMPLATES = {
    "ft_token": {"decoder": ("{q} ###", " {a}"), "encoder_decoder": ("{q}", "{a}"), "openai": ("{q}\n\n###\n\n", " {a} END")},
    "ft_natural": {"decoder": ("Q: {q}\n\nA:", " {a}"), "encoder_decoder": ("Q: {q}", "{a}"), "openai": ("Q: {q}\n\nA:", " {a} END")},
    "ft_cot_token": {"prefix": "-->", "decoder": ("{q} ###", " {r} --> {a}"), "encoder_decoder": ("{q}", "{r} --> {a}"),
                     "openai": ("{q}\n\n###\n\n", " {r}\n\n-->\n\n{a} END")},
    "ft_cot_natural": {"prefix": COMMA, "decoder": ("Q: {q}\n\nA: Let's think step by step.\n\n", " {r}\n\n" + COMMA + " {a}"),
                       "openai": ("Q: {q}\n\nA: Let's think step by step.\n\n", " {r}\n\n" + COMMA + " {a} END")},
    "zs": {"decoder": ("Q: {q}\n\nA:", None), "encoder_decoder": ("question: {q}", None)},
    "zs_cot": {"decoder": ("Q: {q}\nA: Let's think step by step.", None), "step 2": ("{p}{r}\n" + COMMA, None)},
    "fs_cot": {"prefix": "The answer is", "decoder": ("{few_shot}\nQ: {q}\nA:", None), "encoder_decoder": ("{few_shot}\nQ: {q}\nA:", None)},
}
METHODS = {"zs": ("zs", 128), "zs_cot": ("zs_cot", 128), "zs_cot_long": ("zs_cot", 512), "fs_cot": ("fs_cot", 128)}  # template, max_tokens
METRICS = ("accuracy", "contains_answer", "correct_format", "complete")

NAMES = """Aaron Abigail Adam Adrian Agnes Aisha Alan Albert Alejandra Alexis Alice Alina Alma Amanda Amir Amy Ana Andre Andrea Angela Anita Anna
Anthony April Arjun Arthur Ashley Audrey Ava Barbara Beatriz Becky Benjamin Bernard Beth Bianca Bonnie Brandon Brenda Brian Bruno Camila Carl
Carlos Carmen Caroline Catherine Cecilia Cesar Charles Chloe Chris Clara Claudia Colin Connor Craig Cynthia Daisy Daniel Daria David Dean
Deborah Denise Derek Diana Diego Dominic Donna Dora Dorothy Dylan Edgar Edith Eduardo Eleanor Elena Eli Elijah Elisa Ellen Emil Emily Emma
Enrique Eric Erin Esther Ethan Eva Evan Fatima Felix Fernando Fiona Flora Frances Frank Gabriel Gail Gary George Gerald Gina Gloria Gordon
Grace Greta Gustavo Hanna Harold Harriet Hassan Hazel Heather Hector Helen Henry Holly Howard Hugo Ian Ida Igor Ines Ingrid Irene Iris Isaac
Isabel Ivan Jack Jacob Jaime Janet Jasmine Jason Javier Jean Jenny Jerome Jesse Joan Joel Jonas Jordan Jorge Joseph Joshua Joyce Judith Julia
Karen Karl Kate Keith Kelly Kenji Kevin Kim Kyle Laila Lara Larry Laura Leah Leo Leslie Liam Lina Linda Lisa Lola Lorenzo Louis Lucas Lucy Luis
Lydia Malik Marco Margaret Maria Mark Marta Martin Mary Mateo Max Maya Megan Mei Melissa Mia Michael Miguel Mila Miriam Mona Monica Nadia Nancy
Naomi Natalie Nathan Neil Nicole Nina Noah Noel Nora Olga Oliver Omar Oscar Pablo Pamela Patrick Paul Paula Pedro Peter Philip Priya Quentin
Rachel Rafael Ralph Ramon Raul Rebecca Rene Ricardo Rita Robert Robin Roger Rosa Roy Ruby Ruth Ryan Sabina Sally Samuel Sandra Sara Scott Sean
Sergio Seth Sharon Sheila Silvia Simon Sofia Sonia Stella Steven Susan Sven Sylvia Tania Tariq Teresa Theo Thomas Tina Tom Tracy Uma Ursula
Valerie Vera Victor Vincent Viola Walter Wanda Wendy Wesley William Xavier Yara Yusuf Yvonne Zane Zoe""".split()


# ------------------------------------------------------------------------------------------------ the evaluator


def candidates(kind, text, compat=False):
    """Everything in a text that could be the answer, in order: ("integer", "3 x 4 = 12.0") -> [3.0, 4.0, 12.0]."""
    rule = {"clean": str, "value": str, **KINDS[kind], **(KINDS[kind].get("compat", {}) if compat else {})}
    return [rule["value"](found) for found in re.findall(rule["find"], rule["clean"](text))]


def gold_value(dataset_key, answer, compat=False):
    """The gold answer as it is compared. Raises ValueError if it is none for this data set."""
    kind = DATASETS[dataset_key]["kind"]
    text = KINDS[kind].get("clean", str)(answer.strip()).strip() if isinstance(answer, str) else ""
    if not text or not re.fullmatch(KINDS[kind]["find"], text):
        raise ValueError(f"answer {answer!r}: expected {KINDS[kind]['what']}, as text")
    return candidates(kind, text, compat)[0]


def same(a, b):
    return abs(a - b) <= 1e-6 if isinstance(a, float) else a == b


def judge(dataset_key, template, completion, answer, compat=False):
    """-> {"correct", "contains_answer", "correct_format"} of one completion.

    Where the answer is looked for: behind the template's prefix, "-->" for ft_cot_token, "The answer is" for fs_cot, "Therefore, the
    answer is" for ft_cot_natural, and there the first candidate counts. If the prefix is missing, the last candidate of the whole text
    counts. The other templates (zs, zs_cot, ft_token, ft_natural, None) have no prefix: the first candidate of the whole text counts.
    Candidates: aqua, commonsense_qa: capital letters A to E that are whole words, also in brackets; date_understanding A to F,
    tracking_shuffled_objects A to C. Number sets: signed decimals once commas are dropped, equal if they differ by at most 1e-6.
    coin_flip, strategy_qa: the words yes and no, in lower case, with " ' . : , and white space as borders. last_letter_concatenation: the
    whole text without " ' . and white space. The gold answer is cleaned in the same way.
    compat, as the earlier system: gsm8k and multiarith compare numbers as strings ("5.0" is not "5"), and a letter counts inside any
    capitalised word ("Because" has a B).
    correct: the candidate that counts is the answer; contains_answer: any candidate is, of those behind the prefix if it is there;
    correct_format: the prefix is in the text, or the template has none. "complete" is not judged here: finish_reason is "stop".
    """
    prefix = TEMPLATES[template].get("prefix") if template else None
    before, found, after = completion.partition(prefix) if prefix else ("", True, completion)
    values, gold = candidates(DATASETS[dataset_key]["kind"], after if found else before, compat), gold_value(dataset_key, answer, compat)
    return {"correct": bool(values) and same(values[0] if found else values[-1], gold), "contains_answer": any(same(v, gold) for v in values),
            "correct_format": bool(found)}


def summary(meta, rows, compat=False):
    """Rows of completions -> {"n", "accuracy", ...}, shares from 0 to 1; complete: of the rows that say how they ended, or None."""
    judged = [judge(meta["dataset_key"], meta["prediction_template"], row["completion"], row["answer"], compat) for row in rows]
    ends = [row["finish_reason"] == "stop" for row in rows if row.get("finish_reason")]
    names = dict(zip(METRICS, ("correct", "contains_answer", "correct_format")))
    return {"n": len(rows), **{metric: sum(j[name] for j in judged) / len(judged) for metric, name in names.items()},
            "complete": sum(ends) / len(ends) if ends else None}


# ------------------------------------------------------------------------------------------------ files


def load(path, problems):
    """The value in a JSON file; None, and a problem, if there is none."""
    try:
        value = json.loads(pathlib.Path(path).read_bytes().decode("utf-8-sig"))
        problems += [f"{path}: holds null"] if value is None else []
        return value
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        problems.append(f"{path}: cannot be read as JSON ({error})")
        return None


def wrong_sample(sample, key):
    """What is wrong with a record that must have a sample_index, a question and an answer, or None."""
    if not isinstance(sample, dict) or type(sample.get("sample_index")) is not int or not isinstance(sample.get("question"), str):
        return "expected an object with sample_index, a whole number, and question, a text"
    try:
        gold_value(key, sample.get("answer"))
        "".join(text for text in sample.values() if isinstance(text, str)).encode()  # not half a character
    except ValueError as error:  # UnicodeEncodeError is one
        return str(error)
    if not all(isinstance(sample.get(name, ""), str) for name in ("rationale", "reasoning_completion")):
        return "the rationale is no text"
    return None if sample["question"].strip() else "the question is empty"


def load_dataset(path, problems):
    """-> (dataset_key, {sample_index: sample}) of a wrapped data set."""
    whole, n_before = load(path, problems), len(problems)
    try:
        key, data = whole["metadata"]["dataset_key"], list(whole["data"])
        DATASETS[key], data[0]
    except (KeyError, TypeError, IndexError):
        problems += [] if whole is None else [f"{path}: expected {{'metadata': {{'dataset_key'}}, 'data': [samples]}}, of {', '.join(DATASETS)}; "
                                              "`make` writes it"]
        return None, {}
    problems += [f"{path}, data[{i}]: {wrong}" for i, sample in enumerate(data) if (wrong := wrong_sample(sample, key))]
    samples = {sample["sample_index"]: sample for sample in data} if len(problems) == n_before else {}
    if 0 < len(samples) < len(data):
        problems.append(f"{path}: {len(data) - len(samples)} samples have the sample_index of another one")
    return key, samples


def load_split(path, problems, samples=None):
    """-> {"train": [sample_index], "test": [...]}; samples: those that there are."""
    found, n_before = load(path, problems), len(problems)
    try:
        train, test = ({index + 0 for index in found[part]} for part in ("train", "test"))
    except (KeyError, TypeError):
        problems += [] if found is None else [f"{path}: expected {{'train': [sample_index], 'test': [sample_index]}}"]
        return {}
    problems += [f"{path}: sample {index} is on both sides" for index in sorted(train & test)[:1]]
    problems += [f"{path}: sample {index} is not in the data set" for index in sorted((train | test) - set(samples or train | test))[:1]]
    return {"train": sorted(train), "test": sorted(test)} if len(problems) == n_before else {}


def completion_path(root, base_model, completion_key, dataset_key, train_key=None, epoch=None):
    """The earlier system's place: ("saved", "curie", "ft_cot", "aqua", "ft_cot", 3) ->
    saved/completion_data/B_curie__C_ft_cot/D_aqua__T_ft_cot__E_003.json"""
    tags = [f"D_{dataset_key}", *([f"T_{train_key}"] if train_key is not None else []), *([f"E_{epoch:03d}"] if epoch is not None else [])]
    return pathlib.Path(root) / "completion_data" / f"B_{base_model}__C_{completion_key}" / f"{'__'.join(tags)}.json"


def load_completions(path, problems, whole=None):
    """-> (metadata, rows in order) of a completion data set. What its path says must be what its metadata says."""
    path, n_before, whole = pathlib.Path(path), len(problems), load(path, problems) if whole is None else whole
    try:
        meta, found, rows = whole["metadata"], [(index, row) for index, part in whole["data"].items() for row in part], []
        DATASETS[meta["dataset_key"]], TEMPLATES[meta["prediction_template"] or "zs"], meta["completion_key"]  # null: as zs, without a prefix
        due = completion_path("", *(meta.get(name) for name in ("base_model", "completion_key", "dataset_key", "train_key", "epoch"))).parts[-2:]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problems += [] if whole is None else [f"{path}: no completion data set ({type(error).__name__}: {error}); expected 'metadata' with "
                                              "dataset_key, completion_key, prediction_template, and 'data': {sample_index: [completions]}"]
        return {}, []
    if path.name.startswith("D_") and re.fullmatch("B_.+__C_.+", path.resolve().parent.name) and path.resolve().parts[-2:] != due:
        problems.append(f"{path}: its metadata belong to {'/'.join(due)}")
    for index, row in found:
        wrong = wrong_sample(row, meta["dataset_key"])
        if not wrong and (str(row["sample_index"]) != index or type(row.get("completion_index")) is not int):
            wrong = "sample_index is another one, or there is no completion_index"
        if not wrong and not isinstance(row.get("completion"), str):
            wrong = "no completion (not finished?)"
        problems += [f"{path}, data[{index!r}]: {wrong}"] if wrong else []
        rows.append(row)
    if len(problems) == n_before:
        several = collections.Counter((row["sample_index"], row["completion_index"]) for row in rows)
        problems += [f"{path}, data['{i}']: completion_index {c} is there {n} times" for (i, c), n in several.items() if n > 1]
        problems += [f"{path}: no completions in it"] if not rows else []
    if len(problems) > n_before:
        return {}, []
    return meta, sorted(rows, key=lambda row: (row["sample_index"], row["completion_index"]))


def completions_text(meta, rows, indices=()):
    """The earlier system's JSON, byte for byte; indices: those that are in it even without a row."""
    data = {str(index): [] for index in sorted({*indices, *(row["sample_index"] for row in rows)})}
    for row in rows:
        data[str(row["sample_index"])].append(row)
    return json.dumps({"metadata": meta, "data": data}, indent=4)


def check_new(path, suffix, problems):
    path = pathlib.Path(path)
    if path.exists() or path.suffix not in suffix.split():
        problems.append(f"{path}: " + ("exists; move it away or choose another name" if path.exists() else f"expected a name in {suffix}"))
    return path


# ------------------------------------------------------------------------------------------------ make


def coin_flip(names, rng):
    flips = [rng.random() < 0.5 for _ in names]
    acts = [f"{name} {'flips' if flip else 'does not flip'} the coin" for name, flip in zip(names, flips)]
    up, steps = True, ["It starts heads up."]
    for name, flip in zip(names, flips):
        up = up != flip
        steps.append(f"{name} {'flips' if flip else 'does not flip'}: {'heads' if up else 'tails'} up.")
    question = f"A coin is heads up. {'. '.join(acts)}. Is the coin still heads up? Note that \"flip\" here means \"reverse\"."
    return question, "yes" if up else "no", " ".join(steps)


def last_letters(names, rng):
    answer = "".join(name[-1] for name in names)
    steps = [f"{name} ends in {name[-1]}." for name in names]
    return f'Take the last letters of each words in "{" ".join(names)}" and concatenate them.', answer, " ".join([*steps, f"Together: {answer}."])


SYNTHETIC = {"coin_flip": coin_flip, "last_letter_concatenation": last_letters}


def multiple_choice(question, choices):
    return f"{question.strip()} Answer choices: " + ", ".join(f"({chr(65 + i)}) {text.strip()}" for i, text in enumerate(choices)) + "."


def read_raw(key, row, shuffle):
    """A record of a public set, in its own layout or the earlier system's, -> (question, answer, rationale or None).

    Multiple choice becomes "<question> Answer choices: (A) <text>, (B) <text>." and, for BIG-bench tasks, "<question>\\nWhich choice is
    true? Answer choices: ..."; date_understanding's choices, of which the right one stands first, are put in the order that the earlier
    system drew (`shuffle`: RandomState(0), a permutation per record)."""
    rationale = row.get("rationale")
    if "sQuestion" in row:  # MultiArith, AddSub, SingleEq
        question, (answer,) = row["sQuestion"].strip(), row["lSolutions"]
        answer = int(answer) if key == "multiarith" and answer == int(answer) else answer
    elif "Body" in row:  # SVAMP
        question, answer = f"{row['Body'].strip()} {row['Question'].strip()}", row["Answer"]
    elif "options" in row:  # AQuA
        question, answer = multiple_choice(row["question"], [re.sub(r"^\s*[A-E]\)", "", text) for text in row["options"]]), row["correct"]
    elif "answerKey" in row:  # CommonsenseQA
        question, answer = multiple_choice(row["question"]["stem"], [c["text"] for c in row["question"]["choices"]]), row["answerKey"]
    elif "target_scores" in row:  # BIG-bench
        choices = list(row["target_scores"])
        (right,) = (i for i, score in enumerate(row["target_scores"].values()) if score)
        if key == "strategy_qa":
            question, answer, rationale = row["input"].strip(), choices[right], re.sub(r"^(Yes|No)\.\s*", "", row.get("target", "")) or None
        else:
            places = shuffle.permutation(len(choices)).tolist() if key == "date_understanding" else range(len(choices))
            ordered = [text.removesuffix(".") for _, text in sorted(zip(places, choices))]
            question, answer = multiple_choice(row["input"].strip() + "\nWhich choice is true?", ordered), chr(65 + places[right])
    else:
        question, answer = row["question"], row["answer"]
        if key == "gsm8k" and "####" in answer:
            rationale, answer = map(str.strip, answer.split("####"))
    return question, str(answer) if type(answer) in (int, float) else answer, rationale


def read_samples(args, problems):
    """[(question, answer, rationale, sample_index or None)] of the files of a public set."""
    found, n_before, shuffle = [], len(problems), np.random.RandomState(0)
    for where, row in [record for path in args.input for record in records.read(path, problems)]:
        inner = next((name for name in ("examples", "data") if isinstance(row.get(name), list)), None)
        if inner == "data" and row.get("metadata") != {"dataset_key": args.dataset_key}:
            problems.append(f"{where}: metadata {row.get('metadata')}, expected {{'dataset_key': '{args.dataset_key}'}}")
        for where, row in [(f"{where}, {inner}[{i}]", part) for i, part in enumerate(row[inner])] if inner else [(where, row)]:
            try:
                question, answer, rationale = read_raw(args.dataset_key, row, shuffle)
            except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
                problems.append(f"{where}: no record of {args.dataset_key} ({type(error).__name__}: {error})")
                continue
            index = row.get("sample_index")
            sample = {"sample_index": 0 if index is None else index, "question": question, "answer": answer, "rationale": rationale or ""}
            wrong = wrong_sample(sample, args.dataset_key)
            problems += [f"{where}: {wrong}"] if wrong else []
            found.append((question, answer, rationale, index))
    if not found and len(problems) == n_before:
        problems.append(f"{args.input[0]}: no records in it")
    return found


def make(args):
    problems, notes, found = [], [], {}
    out = check_new(args.out, ".json", problems)
    if args.input:
        given = [name for name in ("n", "names", "seed") if getattr(args, name) is not None] + ["rationale"] * args.rationale
        problems += [f"--{name}: for sets that are made; with --input all is as the files have it" for name in given]
        found = read_samples(args, problems)
        size = DATASETS[args.dataset_key]["size"]
        notes += [f"the public {args.dataset_key} has {size} samples, this one {len(found)}"] if len(found) != size else []
    elif args.dataset_key not in SYNTHETIC:
        problems.append(f"{args.dataset_key}: --input FILE is needed; only {' and '.join(SYNTHETIC)} can be made without")
    else:
        n, n_names, rng = 500 if args.n is None else args.n, 4 if args.names is None else args.names, random.Random(args.seed or 0)
        possible = math.perm(len(NAMES), max(n_names, 0)) * (2 ** max(n_names, 0) if args.dataset_key == "coin_flip" else 1)
        if not 1 <= n_names <= 100 or not 1 <= n <= possible / 2:  # drawn until new: above a half that becomes slow
            problems.append(f"--n {n} --names {n_names}: expected 1 to 100 names, and 1 to {possible // 2} questions with these names")
        while not problems and len(found) < n:
            question, *rest = SYNTHETIC[args.dataset_key](rng.sample(NAMES, n_names), rng)
            found[question] = rest
        found = [(question, answer, rationale if args.rationale else None, None) for question, (answer, rationale) in found.items()]
    if problems:
        return records.stop(problems)
    indices = [index for *_, index in found]
    if any(index is not None for index in indices) and (None in indices or len(set(indices)) < len(indices)):
        notes.append(f"samples are numbered anew, 0 to {len(found) - 1}, as not all have a sample_index of their own; splits and completions go by it")
        indices = [None] * len(found)
    samples = [{"sample_index": i if index is None else index, "question": question, "answer": answer, **({"rationale": rationale} if rationale else {})}
               for i, (index, (question, answer, rationale, _)) in enumerate(zip(indices, found))]
    records.write_aside(out, json.dumps({"metadata": {"dataset_key": args.dataset_key}, "data": samples}, indent=4, ensure_ascii=False) + "\n")
    n_repeated = len(samples) - len({sample["question"] for sample in samples})
    notes += [f"questions that are repeated: {n_repeated}"] if n_repeated else []
    answers = collections.Counter(sample["answer"] for sample in samples).most_common(6)
    print(f"{out}: {len(samples)} samples, {sum('rationale' in s for s in samples)} with a rationale; answers: "
          + ", ".join(f"{answer} {count}" for answer, count in answers), *notes, *map(json.dumps, samples[:2]), sep="\n")
    return 0


# ------------------------------------------------------------------------------------------------ split


def template_of(question):
    """What a question shares with others of its kind: "Ann has 3 pens. How many are left?" and "Bob has 12 pens. ..." -> "N has pens".

    Choices and the last sentence (what is asked) are dropped if anything is before them; numbers, dates, pronouns and all words with a
    capital are masked, also where a sentence begins. That joins rather too much than too little, so nothing leaks."""
    text = re.split(r"\s*(?:Which choice is true\?|Answer choices:)", question.strip())[0]
    text = " ".join(re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)[:-1]) or text
    text = re.sub(r"\b(?:he|she|his|her|hers|him|himself|herself)\b", "N", text, flags=re.IGNORECASE)
    text = re.sub(r"\d\S*|\b[A-Z]\w*(?:'s)?", "N", text)
    return re.sub(r"\bN(?: N)+\b", "N", re.sub(r"\W+", " ", text).strip())


def split(args):
    problems, notes = [], []
    out = check_new(args.out, ".json", problems)
    key, samples = load_dataset(args.dataset, problems)
    indices, rule, test_last, train_n = list(samples), DATASETS.get(key, {}), args.test_last, args.train_n
    if args.kind == "random" and test_last is None and "test_last" in rule:
        test_last, train_n = rule["test_last"], train_n or rule.get("train_n")
        if samples and len(samples) != rule["size"]:
            problems.append(f"{args.dataset}: {len(samples)} samples; the published split of {key}, the last {test_last} for test, is of "
                            f"{rule['size']}: say --test_last N")
    if not 0 <= args.seed < 2**32:
        problems.append(f"--seed {args.seed}: expected 0 to {2**32 - 1}")
        args.seed = 0
    if args.seed and args.kind == "random" and train_n is None:
        problems.append(f"--seed {args.seed}: the random split is the published one, always the same; --seed draws --train_n and the template split")
    if test_last is not None and args.kind == "template":
        problems.append("--test_last: not with --kind template")
    n_train = round(len(indices) * 0.7)  # a half goes to the even side: 395 -> 276
    train = np.random.RandomState(0).permutation(indices).tolist()[:n_train] if test_last is None else indices[:max(0, len(indices) - test_last)]
    if args.kind == "template":
        groups = collections.defaultdict(list)
        for index, sample in samples.items():
            groups[template_of(sample["question"])].append(index)
        groups, train = list(groups.values()), []
        for i in np.random.RandomState(args.seed).permutation(len(groups)):
            train += groups[i] if len(train) + len(groups[i]) <= n_train else []
        notes.append(f"templates: {len(groups)}, the largest with {max(map(len, groups), default=0)} samples")
    test = sorted(set(indices) - set(train))
    n_possible = len(train)
    if train_n is not None:
        train = np.random.RandomState(args.seed).permutation(sorted(train)).tolist()[:max(0, train_n)]
    if samples and (not train or not test or train_n is not None and len(train) < train_n):
        problems.append(f"{args.dataset}: {len(samples)} samples give {n_possible} for train and {len(test)} for test; " + ", ".join(
            notes or ["both need one, and --train_n no more than there are"]))
    if problems:
        return records.stop(problems)
    records.write_aside(out, json.dumps({"train": sorted(train), "test": test}, indent=4 if args.kind == "random" else None))
    in_train = {samples[i]["question"] for i in train}
    if n_both := sum(samples[i]["question"] in in_train for i in test):
        print(f"WARNING: {n_both} test questions are also in train, word for word", file=sys.stderr)
    print(f"{out}: {len(train)} train, {len(test)} test", *notes, sep="\n")
    return 0


# ------------------------------------------------------------------------------------------------ teach


class Stop(Exception):
    """A teacher does not go on: (message, exit code). What it wrote is kept."""


class Refused(Exception):
    """A server does not answer this prompt: it is too long, or filtered."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):  # it would carry the key to another host
        return None


class Server:
    """An OpenAI-compatible endpoint; the key comes from OPENAI_API_KEY and goes nowhere but into the request's header."""

    first_wait_sec = 1.0

    def __init__(self, args, problems):
        self.args, self.stop, self.refused = args, threading.Event(), []
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        self.opener = urllib.request.build_opener(NoRedirect)
        self.chat = args.server.endswith("/chat/completions")
        self.kind = "chat/completions" if self.chat else "completions"  # not the address: a server may move
        url = re.fullmatch(r"(https?)://([\w.-]+|\[[\da-f:]+\])(:\d+)?(/[^?#@]*)?/completions", args.server)
        if not url or not args.server.isascii() or re.search(r"\s", args.server):
            problems.append("--server: expected a whole address that ends in /v1/completions or /v1/chat/completions, without a password or query")
        if not args.model:
            problems.append("--server: --model NAME is needed, as the server knows it")
        if not self.key.isascii() or not self.key.isprintable():
            problems.append("OPENAI_API_KEY: has characters that no header can hold")
        elif self.key and url and url[1] == "http" and url[2] not in ("127.0.0.1", "localhost", "[::1]"):
            print("WARNING: OPENAI_API_KEY goes over plain http to another machine; use https", file=sys.stderr)

    def ask(self, prompt, max_tokens, temperature, seed):
        """-> (text, finish_reason). 429, 5xx and lost connections are tried again; whatever else goes wrong is a Stop."""
        body = {"model": self.args.model, "max_tokens": max_tokens, "temperature": temperature, "stop": [STOP],
                **({"seed": seed} if temperature else {}),
                **({"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt})}
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        request = urllib.request.Request(self.args.server, json.dumps(body).encode(), headers)
        for attempt in range(1, self.args.retries + 2):
            status, asked_wait, what = 0, None, ""
            try:
                try:
                    reply = self.opener.open(request, timeout=self.args.timeout_sec)
                except urllib.error.HTTPError as error:  # a reply like any other
                    reply = error
                with reply:
                    text, status, asked_wait = reply.read().decode(errors="replace"), reply.status, reply.headers.get("Retry-After", "")
                what = f"HTTP {status} {text[:500].strip()}"
                if status == 200:
                    reply = json.loads(text)
                    try:
                        (one,) = reply["choices"]
                        text, end = one["message"]["content"] if self.chat else one["text"], one.get("finish_reason")
                    except (KeyError, TypeError, ValueError, AttributeError):
                        text = end = 0
                    if isinstance(text, str) and isinstance(end, str | None):
                        return text, end
                    # null, such as of a content filter, is no answer; anything else is no such server
                    status = 400 if text is None else 404
            except (OSError, http.client.HTTPException) as error:  # no connection, a time-out, a reply that was cut
                what = f"{type(error).__name__} {error}"
            except (ValueError, RecursionError):  # no JSON: cut, or an error page
                status = 0
            what = f"{self.args.server}: {what}"
            what = what.replace(self.key, "***") if self.key else what
            if status in (400, 413, 422):
                raise Refused(what)
            if 0 < status < 500 and status not in (408, 409, 425, 429):
                self.stop.set()
                raise Stop(what, 2)
            asked = float(asked_wait) if re.fullmatch(r"\d{1,9}(\.\d+)?", asked_wait or "") else 0.0
            wait = max(min(asked, 3600.0), min(60.0, self.first_wait_sec * 2 ** (attempt - 1)))
            if attempt <= self.args.retries:
                tqdm.write(f"{what}; waiting {wait:g} s, then attempt {attempt + 1} of {self.args.retries + 1}", file=sys.stderr)
                if self.stop.wait(wait):
                    break
        self.stop.set()
        raise Stop(f"{what}; gave up after {attempt} attempts", EXIT_SAVED)

    def __call__(self, rows, step, max_tokens, temperature, keep):
        n_kept = 0

        def one(row):
            nonlocal n_kept
            if not self.stop.is_set():
                seed = seed_of(self.args.seed, step, row["sample_index"], row["completion_index"])
                try:
                    keep(row, *self.ask(row[f"{step}prompt"], max_tokens, temperature, seed))
                    n_kept += 1
                except Refused as error:  # this prompt alone, unless nothing is accepted
                    self.refused.append(f"sample {row['sample_index']}, completion {row['completion_index']}{step and ', reasoning'}: {error}")
                    if not n_kept and len(self.refused) >= 8:
                        self.stop.set()

        with concurrent.futures.ThreadPoolExecutor(self.args.workers) as pool:
            asked = [pool.submit(one, row) for row in rows]
            try:
                for done in concurrent.futures.as_completed(asked):
                    done.result()
            except BaseException:  # Ctrl-C too: what is under way is paid for, so it is waited for and kept
                self.stop.set()
                print("stopping; requests under way are waited for", file=sys.stderr)
                raise


class Local:
    """A model on this machine: chat.py's file mode, which continues by itself where it was stopped."""

    def __init__(self, args, path):
        self.args, self.path, self.kind = args, path, "chat.py --chat" if args.chat else "chat.py"

    def __call__(self, rows, step, max_tokens, temperature, keep):
        prompts, replies = (self.path.with_name(f"{self.path.name}.{step}{name}.jsonl") for name in ("prompts", "replies"))
        todo = {(row["sample_index"], row["completion_index"]): row for row in rows}
        key = "prompt" if self.args.chat else "text"
        while todo:
            if not replies.exists():
                wanted = "".join(json.dumps({key: row[f"{step}prompt"], "sample_index": i, "completion_index": c}) + "\n"
                                 for (i, c), row in todo.items())
                if prompts.exists() and prompts.read_text(encoding="utf-8") != wanted:
                    raise Stop(f"{prompts}: begun with other rows or flags; finish it with those, or delete it (its replies are lost then)", 2)
                records.write_aside(prompts, wanted)
                command = [sys.executable, str(CHAT), "--model_path", self.args.local, "--input", str(prompts), "--output", str(replies),
                           "--max_new_tokens", str(max_tokens), "--temperature", str(temperature), "--top_p", "1",
                           "--seed", str(seed_of(self.args.seed, step, *map(list, todo)))]
                if code := subprocess.run(command).returncode:
                    raise Stop(f"chat.py ended with exit code {code}", code if code in (2, EXIT_SAVED) else 1)
            for line in replies.read_text(encoding="utf-8").split("\n")[:-1]:
                reply = json.loads(line)
                row = todo.get((reply["orig_d"]["sample_index"], reply["orig_d"]["completion_index"]))
                if row and reply["orig_d"].get(key) == row[f"{step}prompt"]:
                    keep(row, reply["replies"][0], reply["finish_reasons"][0])
                    del todo[row["sample_index"], row["completion_index"]]
            prompts.unlink(missing_ok=True)
            replies.unlink()


class Scripted:
    """The teacher that says the data set's own rationales and answers."""

    kind = "scripted"

    def __init__(self, samples):
        self.samples = samples

    def __call__(self, rows, step, max_tokens, temperature, keep):
        for row in rows:
            rationale, answer = (self.samples[row["sample_index"]][name].strip() for name in ("rationale", "answer"))
            is_cot = "reasoning_completion" in row
            keep(row, f" {rationale}" if step else f" {answer}." if is_cot else f" {rationale} The answer is {answer}.", "stop")


def seed_of(*parts):
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big") >> 1


def read_part(path, meta, problems):
    """Unfinished rows -> {(sample_index, completion_index): row}; a last line without an end was cut by a kill and is taken off."""
    whole, rows = path.read_bytes(), {}
    lines = whole.split(b"\n")[:-1]
    try:
        parsed = [json.loads(line) for line in lines]
        rows = {(row["sample_index"], row["completion_index"]): row for row in parsed[1:]}  # the second step's row replaces the first step's
        check_same_command(path, parsed[0] if parsed else {}, meta, problems)
    except (ValueError, KeyError, TypeError, AttributeError):
        problems.append(f"{path}: has lines that `teach` did not write; move it away")
    if not problems:
        os.truncate(path, len(whole) - len(whole.split(b"\n")[-1]))
    return rows


def check_same_command(path, old, new, problems):
    other = [f"{name} {old[name]!r} there, {new[name]!r} now" for name in new if name in old and old[name] != new[name]]
    problems += [f"{path}: made by another command ({', '.join(other)}); choose another --root, or move it away"] if other else []


def teach(args):
    problems, few_shot = [], None
    key, samples = load_dataset(args.dataset, problems)
    template, max_tokens = METHODS[args.method]
    max_tokens = max_tokens if args.max_tokens is None else args.max_tokens
    temperature = (0.0 if args.k == 1 else 0.7) if args.temperature is None else args.temperature
    if min(args.k, max_tokens, args.workers, args.retries + 1) < 1 or not 0 < args.timeout_sec < 1e6:
        problems.append("--k, --max_tokens, --workers, --timeout_sec: expected more than 0; --retries: 0 or more")
    if not 0 <= temperature <= 2 or args.k > 1 and not temperature:
        problems.append(f"--k {args.k} --temperature {temperature:g}: expected 0 to 2, and above 0 where --k is above 1 (else all are the same)")
    if args.family not in TEMPLATES[template]:
        problems.append(f"--family {args.family}: {args.method} has no prompt for it")
    if bool(args.split) != bool(args.part):
        problems.append("--split and --part go together")
    if args.chat and not args.local:
        problems.append("--chat: belongs to --local; a server's address says what it is")
    if (args.method == "fs_cot") != bool(args.few_shot):
        problems.append("--few_shot FILE: needed for --method fs_cot, and for no other")
    elif args.few_shot and (prompts := load(args.few_shot, problems)) is not None and samples:
        try:
            few_shot = prompts[key]["prompt"] + ""
        except (KeyError, TypeError):
            problems.append(f"{args.few_shot}: no prompt for {key}; expected {{'{key}': {{'prompt': ...}}}}")
    if args.rationales:
        if args.k != 1 or temperature or template not in ("zs_cot", "fs_cot"):
            problems.append("--rationales: one a question, no --k and no --temperature, and --method zs_cot or fs_cot")
        without = [i for i, sample in samples.items() if not sample.get("rationale", "").strip()]
        problems += [f"{args.dataset}: {len(without)} samples have no rationale, sample {without[0]} is one"] if without else []
    chosen = load_split(args.split, problems, samples).get(args.part, []) if args.split else list(samples)
    if not chosen and not problems:
        problems.append(f"{args.split}: no samples in {args.part}")
    model = args.model or args.local or "rationales"
    base_model, completion_key = pathlib.PurePath(model).name, args.method + (f"_t{100 * temperature:g}" if temperature else "")
    if not re.fullmatch(r"[\w.:@+-]+", base_model):
        problems.append(f"--model {model}: its last part becomes part of a file name; expected letters, digits and . : @ + - _")
    path = completion_path(args.root, base_model, completion_key, key)
    teacher = Server(args, problems) if args.server else Local(args, path) if args.local else Scripted(samples)
    if problems:
        return records.stop(problems)
    meta = {"base_model": base_model, "dataset_key": key, "completion_key": completion_key, "finetune_key": None, "train_key": None, "epoch": None,
            "prediction_template": template, "model": model, "family": args.family, "seed": args.seed, "temperature": temperature,
            "max_tokens": max_tokens, "teacher": teacher.kind}
    if template == "zs_cot":  # the chain of thought is drawn; the answer that follows from it is not
        meta.update(reasoning_temperature=temperature, reasoning_max_tokens=max_tokens, temperature=0.0, max_tokens=ANSWER_TOKENS)
    if few_shot:
        meta["few_shot_sha256"] = hashlib.sha256(few_shot.encode()).hexdigest()
        if n_shown := sum(" ".join(samples[i]["question"].split()) in " ".join(few_shot.split()) for i in chosen):
            print(f"WARNING: {n_shown} of the questions stand in the few-shot prompt, with their answers", file=sys.stderr)
    wanted = [{"sample_index": i, "completion_index": c, **{name: samples[i][name] for name in ("question", "answer")}}
              for i in chosen for c in range(args.k)]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + "l.part")
    with open(part, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return records.stop([f"{part}: another process is writing it"])
        except OSError as error:
            print(f"WARNING: {part}: no locks on this file system ({error}), so two processes could write it at the same time", file=sys.stderr)
        try:
            return fill_in(path, part, file, meta, wanted, teacher, few_shot)
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()


def fill_in(path, part, file, meta, wanted, teacher, few_shot):
    """Ask for the wanted rows that neither the finished nor the unfinished file has; -> exit code."""
    problems, rows, two_steps = [], {}, meta["prediction_template"] == "zs_cot"
    if path.exists():
        old, found = load_completions(path, problems)
        check_same_command(path, old, meta, problems)
        rows, meta = {(row["sample_index"], row["completion_index"]): row for row in found}, {**meta, **old}
    rows.update(read_part(part, meta, problems))
    for i, row in enumerate(wanted):
        wanted[i] = rows.setdefault((row["sample_index"], row["completion_index"]), row)
        if any(wanted[i][name] != row[name] for name in ("question", "answer")) and not problems:
            problems.append(f"{path}: sample {row['sample_index']} has another question or answer there")
    if problems:
        return records.stop(problems)
    lock, todo = threading.Lock(), [row for row in wanted if "completion" not in row]
    print(f"{path}: {len(wanted) - len(todo)} of {len(wanted)} completions are there", file=sys.stderr)
    steps = ("reasoning_", "") if two_steps else ("",)
    bar = tqdm(total=sum(f"{step}completion" not in row for row in todo for step in steps), desc="requests", delay=2)

    def write(thing):
        with lock:
            file.write(json.dumps(thing) + "\n")
            file.flush()
            os.fsync(file.fileno())

    if todo and not part.stat().st_size:
        write(meta)
    try:
        for step in steps:
            def keep(row, text, finish, step=step):
                text = text.encode(errors="replace").decode()  # half a character, which JSON can carry
                cut = text.find(STOP)
                row[f"{step}completion"], row[f"{step}finish_reason"] = (text, finish) if cut < 0 else (text[:cut], "stop")
                write(row)
                bar.update()

            asked = [row for row in todo if f"{step}completion" not in row and (not two_steps or step or "reasoning_completion" in row)]
            for row in asked:
                row[f"{step}prompt"], _ = render(meta["prediction_template"], "step 2" if two_steps and not step else meta["family"], row, few_shot)
            teacher(asked, step, meta[f"{step}max_tokens"], meta[f"{step}temperature"], keep)
    except (Stop, KeyboardInterrupt) as error:
        message, code = error.args if isinstance(error, Stop) else ("stopped", EXIT_SAVED)
        n_kept = sum("completion" in row for row in wanted)
        print(f"{message}\n{n_kept} of {len(wanted)} completions are kept; the same command goes on", file=sys.stderr)
        return code
    finally:
        bar.close()
    finished = [rows[at] for at in sorted(rows) if "completion" in rows[at]]
    if todo and finished:
        records.write_aside(path, completions_text(meta, finished))
    if refused := getattr(teacher, "refused", []):
        records.stop([*refused, f"{path}: {sum('completion' in row for row in wanted)} of {len(wanted)} completions are kept; the same command asks again "
                      "for what was refused; to go on without, leave those samples out of a --split"])
        return 2
    if part.exists() and len(finished) == len(rows):  # else there are rows of another --part or --k that are not done
        part.unlink()
    ends = collections.Counter(row.get("finish_reason") for row in wanted)
    print(f"{path}: {len(wanted)} completions; ended by " + ", ".join(f"{end} {n}" for end, n in ends.items()),
          f"accuracy {100 * summary(meta, wanted)['accuracy']:.2f}", sep="\n")
    return 0


# ------------------------------------------------------------------------------------------------ filter, export


def render(template, family, row, few_shot=None, compat=False):
    """-> (input, label) of a row with question, answer and, where the template wants it, reasoning_prompt and reasoning_completion;
    their white space at both ends goes: ("ft_token", "decoder", {"question": "2 + 2? ", "answer": "4"}) -> ("2 + 2? ###", " 4")."""
    names = {"q": "question", "a": "answer", "r": "reasoning_completion", "p": "reasoning_prompt"}
    fields = {short: row.get(name, "").strip() for short, name in names.items()}
    shapes = (shape.replace(COMMA, COMMA.replace(",", "")) if compat and shape else shape for shape in TEMPLATES[template][family])
    return tuple(shape.format(**fields, few_shot=few_shot) if shape is not None else None for shape in shapes)


def rationale_of(row, template):
    """Of a teacher's completion: its own field, else what stands before the answer."""
    prefix = TEMPLATES[template].get("prefix") if template else None
    return (row["reasoning_completion"] if "reasoning_completion" in row else row["completion"].partition(prefix)[0] if prefix else "").strip()


def is_right(row, meta, compat):
    return judge(meta["dataset_key"], meta.get("prediction_template"), row["completion"], row["answer"], compat)["correct"]


def n_completions(meta, rows):
    """Of a question, at most; of what `filter` left, those that there were before."""
    return meta.get("completions") or max((row.get("completion_index", 0) + 1 for row in rows), default=1)


def filter_correct(args):
    problems = []
    out = check_new(args.out, ".json", problems)
    meta, rows = load_completions(args.completions, problems)
    if problems:
        return records.stop(problems)
    right, asked = [row for row in rows if is_right(row, meta, args.compat)], {row["sample_index"] for row in rows}
    records.write_aside(out, completions_text({**meta, "completions": n_completions(meta, rows)}, right, asked))
    n_right = collections.Counter(row["sample_index"] for row in right)
    counts = collections.Counter(n_right[index] for index in asked)
    print(f"{out}: {len(right)} of {len(rows)} completions are correct; {counts[0]} of {len(asked)} questions have none",
          "questions by correct completions: " + ", ".join(f"{n} with {count}" for count, n in sorted(counts.items())), sep="\n")
    return 0


def is_held_out(question, share):
    """The same question with other white space or case is on the same side."""
    return records.place_of(records.normal(question)) < share


def export(args):
    problems, template, is_cot = [], f"{args.method}_{args.style}", args.method == "ft_cot"
    key, samples = load_dataset(args.dataset, problems)
    parts = load_split(args.split, problems, samples)
    meta, rows = load_completions(args.completions, problems) if args.completions else ({}, list(samples.values()))
    if is_cot != bool(args.completions):
        problems.append("--completions FILE: needed for --method ft_cot, and for no other")
    if args.family not in TEMPLATES[template] or args.to == "rawtune" and args.family == "openai":
        problems.append(f"--family {args.family}: not for {template} --to {args.to}")
    if (args.to == "rawtune") != bool(args.out) or args.out and pathlib.Path(args.out).suffix not in (".json", ".jsonl"):
        problems.append("--out FILE.json or FILE.jsonl: needed for --to rawtune; --to earlier writes to its own place under --root")
    val_share = 0.1 if args.val_share is None else args.val_share
    if not 0 <= val_share < 1 or args.k is not None and (args.k < 1 or not is_cot):
        problems.append("--val_share: expected 0 to below 1; --k: 1 or more, of ft_cot's completions")
    if args.to == "earlier" and (args.tokenizer or args.val_share is not None):
        problems.append("--val_share and --tokenizer: belong to --to rawtune")
    if meta and samples and meta["dataset_key"] != key:
        problems.append(f"{args.completions}: of {meta['dataset_key']}, and {args.dataset} is {key}")
    if is_cot and args.k is not None and rows and args.k > (n_there := n_completions(meta, rows)):
        problems.append(f"--k {args.k}: {args.completions} has {n_there} completions of a question")
    problems += [f"{args.completions}, data['{row['sample_index']}']: another question or answer than in {args.dataset}" for row in rows
                 if any(row[name].strip() != samples.get(row["sample_index"], {name: ""})[name].strip() for name in ("question", "answer"))]
    count = records.token_counter(args.tokenizer, problems) if args.to == "rawtune" and not problems else None
    if problems:
        return records.stop(problems)
    taught = {index: [] for index in parts["train"]}  # the rows for training
    rows = [row for row in rows if row["sample_index"] in taught and (args.k is None or row["completion_index"] < args.k)]
    right = [row for row in rows if not is_cot or is_right(row, meta, args.compat)]
    told = [{**row, "reasoning_completion": rationale_of(row, meta["prediction_template"])} if is_cot else row for row in right]
    prefix = TEMPLATES[template].get("prefix")
    fit = [row for row in told if not is_cot or row["reasoning_completion"] and prefix not in row["reasoning_completion"]]
    for row in fit:
        taught[row["sample_index"]].append(row)
    n_without = sum(not row["reasoning_completion"] for row in told) if is_cot else 0
    notes = [f"train part: {len(rows) - len(right)} wrong completions and {n_without} without a rationale left out"
             + (f", {n_within} with {prefix!r} in the rationale" if (n_within := len(told) - len(fit) - n_without) else "")
             + f"; {sum(not found for found in taught.values())} of {len(taught)} questions have none left"]
    if args.to == "rawtune" and args.family == "encoder_decoder" and (n_lines := sum("\n" in row["reasoning_completion"] for row in fit if is_cot)):
        notes.append(f"{n_lines} rationales have several lines, which T5's tokenizer turns into blanks")

    def record(row, is_gold=False):
        prompt, label = render(template, args.family, row, compat=args.compat)
        label = render(f"ft_{args.style}", args.family, row)[1] if is_gold else label
        return {"prompt": prompt, "completion": label, "sample_index": row["sample_index"], "answer": row["answer"].strip(), "dataset_key": key,
                "prediction_template": template}

    if args.to == "earlier":
        splits = {"train": [record(row) for found in taught.values() for row in found]}
        k = args.k or n_completions(meta, rows)
        name = f"{meta['completion_key']}_{key}" + (f"_{k}aug" if re.search(r"_t\d", meta["completion_key"]) else "") if is_cot else key
        out = pathlib.Path(args.root) / "finetune_data" / f"P_{args.family}" / f"F_{name}.json{'l' * (args.family == 'openai')}"
        if args.family == "openai":
            text = "\n".join(json.dumps({name: row[name] for name in ("prompt", "completion")}) for row in splits["train"])
        else:
            names = {"sample_index": "sample_index", "input": "prompt", "label": "completion"}
            text = json.dumps({theirs: [row[ours] for row in splits["train"]] for theirs, ours in names.items()}, indent=4)
    else:
        held_out = {index for index in taught if is_held_out(samples[index]["question"], val_share)}
        splits = {"train": [record(row) for index, found in taught.items() if index not in held_out for row in found],
                  # one record a question, also where the teacher was wrong: the accuracy is that of all questions
                  "eval": [record(taught[i][0]) if taught[i] else record(samples[i], True) for i in taught if i in held_out],
                  "test": [record(samples[index], True) for index in parts["test"]]}
        notes.append(f"eval: {sum(not taught[i] for i in held_out)} questions have the gold answer alone as completion; test: all")
        if not val_share:
            del splits["eval"]
        out = pathlib.Path(args.out)
        text = "".join(records.pieces(out, splits))
    if empty := [name for name, part in splits.items() if not part]:
        return records.stop([f"{out}: nothing for {' and '.join(empty)}; {notes[0]}"])
    if out.exists() and out.read_bytes() != text.encode():
        return records.stop([f"{out}: exists and differs; move it away or choose another name"])
    notes += ["the file was there already, the same"] if out.exists() else []
    if not out.exists():
        records.write_aside(out, text)
    if args.to == "rawtune":
        records.show(out, splits, {name: lambda row, name=name: row[name] for name in ("prompt", "completion")}, count, args.tokenizer)
    else:
        notes.insert(0, f"{out}: {len(splits['train'])} train")
    print(*notes, sep="\n")
    return 0


# ------------------------------------------------------------------------------------------------ evaluate


def load_rows(path, template, problems):
    """Rows as `summary` takes them: of a completion data set, or of a trainer's predictions, a row for each generation."""
    whole, rows = load(path, problems), []
    if whole is not None and not isinstance(whole, list):
        meta, rows = load_completions(path, problems, whole)
        return [{**row, "dataset_key": meta["dataset_key"], "prediction_template": template or meta["prediction_template"]} for row in rows]
    for i, prediction in enumerate(whole or []):
        try:
            orig = prediction["orig_d"]
            row = {"sample_index": orig.get("sample_index"), "dataset_key": orig["dataset_key"], "answer": orig["answer"],
                   "prediction_template": template or orig["prediction_template"]}
            gold_value(row["dataset_key"], row["answer"]), TEMPLATES[row["prediction_template"]]
            rows += [{**row, "completion": generation["lm_postprocess"] + "", "finish_reason": generation.get("finish_reason")}
                     for generation in prediction["generations"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"{path}, [{i}]: no prediction for a record of `export` ({type(error).__name__}: {error})")
    return rows


def scored(path, template, compat, problems, wanted=None):
    """-> (accuracy over the rows of a file, lines of the printed table, one for each data set); wanted: sample indices, None = all."""
    rows = [row for row in load_rows(path, template, problems) if wanted is None or row["sample_index"] in wanted]
    if not rows or problems:
        problems += [] if problems else [f"{path}: no completions" + " of this part" * (wanted is not None)]
        return 0.0, []
    groups, n_right, lines = collections.defaultdict(list), 0, []
    for row in rows:
        groups[row["dataset_key"], row["prediction_template"]].append(row)
    for (key, kind), group in groups.items():
        result = summary({"dataset_key": key, "prediction_template": kind}, group, compat)
        n_right += round(result["n"] * result["accuracy"])
        lines.append([str(path), key, kind, *result.values()])
    return n_right / len(rows), lines


def best_on_eval(args, problems):
    """The step that is best on the validation predictions, the earliest of equals; of the test files that step's alone is opened."""
    runs, shown, notes = collections.defaultdict(dict), [], []
    for path in pathlib.Path(args.best_on_eval).glob("temperature=*.json"):
        if found := re.fullmatch(r"(temperature=.+_n=\d+)_step=(\d+)\.json", path.name):
            runs[found[1]][int(found[2])] = path
    if not runs:
        problems.append(f"{args.best_on_eval}: no predictions of an evaluation (temperature=..._n=..._step=N.json) in it")
    for decoding, paths in sorted(runs.items()):
        results = {step: scored(path, args.template, args.compat, problems) for step, path in sorted(paths.items())}
        shown += [line for _, lines in results.values() for line in lines]
        if len({sum(line[3] for line in lines) for _, lines in results.values()}) > 1:
            print(f"WARNING: {decoding}: the steps were evaluated on different numbers of questions (column n)", file=sys.stderr)
        best = max(results, key=lambda step: results[step][0])  # of equals the first
        notes.append(f"{decoding}: best on eval is step {best}")
        test = paths[best].with_name(f"test_{paths[best].name}")
        if test.exists():
            shown += scored(test, args.template, args.compat, problems)[1]
        else:
            print(f"WARNING: no {test.name}; score the test part once, with --no_train and the weights of checkpoint-{best}", file=sys.stderr)
    return shown, notes


def saved_results(args, problems):
    """A tree of completion files -> ({(model, method): {data set: accuracy}}, a line for each file, notes). Of several epochs the table
    has the last: the best one would be chosen on the test part."""
    table, lines, last, places, sizes = collections.defaultdict(dict), [], {}, {}, collections.defaultdict(set)
    for path in tqdm(sorted(pathlib.Path(args.saved_dir).glob("**/B_*__C_*/D_*.json")), desc="files", delay=2):
        meta, rows = load_completions(path, problems)
        if args.split and meta:
            wanted = set(load_split(pathlib.Path(args.split) / f"{meta['dataset_key']}__default.json", problems).get(args.part, []))
            rows = [row for row in rows if row["sample_index"] in wanted]
        if not rows:
            problems += [] if problems else [f"{path}: no completions" + " of this part" * bool(args.split)]
            continue
        result, epoch = summary(meta, rows, args.compat), meta.get("epoch")
        method = " ".join(filter(None, dict.fromkeys([meta["completion_key"], meta.get("train_key")])))
        at = (meta["base_model"], method, meta["dataset_key"])
        lines.append([*at, epoch, *result.values()])
        if (other := places.setdefault((*at, epoch), path)) != path:
            problems.append(f"{path}: a cell of the table that {other} has already; give --saved_dir a tree with one of them")
        sizes[meta["dataset_key"]].add(result["n"])
        if at not in last or (epoch or 0) > last[at]:
            last[at], table[at[:2]][at[2]] = epoch or 0, result["accuracy"]
    if not lines and not problems:
        problems.append(f"{args.saved_dir}: no completion files (B_<model>__C_<method>/D_<data set>.json) below it")
    return table, lines, [f"{key}: the files have {', '.join(map(str, sorted(found)))} completions, --csv shows which" for key, found in sizes.items()
                          if len(found) > 1]


def draw(table, keys, path):
    """Bars: a group for each data set, a colour for each model and method."""
    from matplotlib.figure import Figure  # no pyplot: no window system is asked
    figure = Figure(figsize=(2 + len(keys) * max(1, len(table) / 4), 4), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(table)
    for i, (at, found) in enumerate(table.items()):
        places = [k + (i - (len(table) - 1) / 2) * width for k, key in enumerate(keys) if key in found]
        axes.bar(places, [100 * found[key] for key in keys if key in found], width, label=" ".join(at))
    axes.set(ylabel="accuracy [%]", ylim=(0, 100))
    axes.set_xticks(range(len(keys)), keys, rotation=30, ha="right")
    axes.legend(fontsize="small")
    figure.savefig(path)


def evaluate(args):
    problems, notes = [], []
    if bool(args.files) + bool(args.best_on_eval) + bool(args.saved_dir) != 1:
        problems.append("expected one of: files, --best_on_eval RUN_DIR, --saved_dir DIR")
    if bool(args.split) != bool(args.part) or args.best_on_eval and args.split:
        problems.append("--split and --part go together, and not with --best_on_eval")
    if (args.csv or args.figure) and not args.saved_dir or args.template and args.saved_dir:
        problems.append("--csv and --figure: belong to --saved_dir; --template: not with it")
    for path, suffixes in ((args.csv, ".csv"), (args.figure, ".svg .png .pdf")):
        if path and not check_new(path, suffixes, problems).parent.is_dir():
            problems.append(f"{path}: no such folder")
    if args.figure and not importlib.util.find_spec("matplotlib"):
        problems.append("--figure: package 'matplotlib' is not installed")
    if problems:
        return records.stop(problems)
    shown = [["file", "data set", "template", "n", *METRICS]]
    if args.saved_dir:
        table, lines, notes = saved_results(args, problems)
        keys = [key for key in DATASETS if any(key in found for found in table.values())]
        shown = [["model", "method", *keys], *([*at, *(found.get(key) for key in keys)] for at, found in table.items())]
    elif args.best_on_eval:
        found, notes = best_on_eval(args, problems)
        shown += found
    else:
        wanted = set(load_split(args.split, problems).get(args.part, [])) if args.split else None
        shown += [line for path in args.files for line in scored(path, args.template, args.compat, problems, wanted)[1]]
    if problems:
        return records.stop(problems)
    if args.csv:
        with open(args.csv, "x", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([["model", "method", "dataset", "epoch", "n", *METRICS], *lines])
    if args.figure:
        draw(table, keys, args.figure)
    cells = [["-" if cell is None else f"{100 * cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in shown]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(*("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells), *notes, sep="\n")
    return 0


# ------------------------------------------------------------------------------------------------ command line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, text):
        found = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        found.set_defaults(run=run)
        return found

    one = command("make", make, "write a data set: a synthetic one, or a public one from its files")
    one.add_argument("dataset_key", choices=list(DATASETS))
    one.add_argument("--input", nargs="+", metavar="FILE", help="files of the public set, joined in this order: as published, or question and answer")
    one.add_argument("--n", type=int, help="how many questions are made [count], default 500; none twice")
    one.add_argument("--names", type=int, help="people, or words, in a question [count], default 4")
    one.add_argument("--seed", type=int, help="of the questions that are made [integer], default 0")
    one.add_argument("--rationale", action="store_true", help="with every made question a correct chain of thought, for `teach --rationales`")
    one.add_argument("--out", required=True, metavar="FILE", help="an existing one is never overwritten")

    one = command("split", split, "write which samples are for training and which for test")
    one.add_argument("--dataset", required=True, metavar="FILE")
    one.add_argument("--out", required=True, metavar="FILE", help="usually <dataset_key>__default.json or __template.json")
    one.add_argument("--kind", choices=["random", "template"], default="random", help="random: 70 %% for training, or the published rule of gsm8k, "
                     "aqua and commonsense_qa; template: no kind of question on both sides (default: random)")
    one.add_argument("--test_last", type=int, metavar="N", help="the last N samples for test, the rest for training")
    one.add_argument("--train_n", type=int, metavar="N", help="only N drawn samples of the training part, as few-shot subsets are made")
    one.add_argument("--seed", type=int, default=0, help="of --train_n and of --kind template [integer] (default: 0); the random split "
                     "itself is always the published one")

    one = command("teach", teach, "let a teacher answer; rows are kept as they come, and the same command goes on")
    one.add_argument("--dataset", required=True, metavar="FILE")
    one.add_argument("--method", required=True, choices=list(METHODS), help="the prompt; zs_cot_long: zs_cot with 512 tokens")
    teacher = one.add_mutually_exclusive_group(required=True)
    teacher.add_argument("--server", metavar="URL", help="OpenAI-compatible endpoint, the whole address up to /v1/completions or "
                         "/v1/chat/completions; the key is taken from the environment variable OPENAI_API_KEY")
    teacher.add_argument("--local", metavar="MODEL", help="what chat.py takes as --model_path")
    teacher.add_argument("--rationales", action="store_true", help="the data set's own ones")
    one.add_argument("--model", metavar="NAME", help="for a server; its last part is the B_<name> of the path, by default the folder's name")
    one.add_argument("--chat", action="store_true", help="--local: each prompt is a user's turn; without, its text is continued")
    one.add_argument("--family", choices=["decoder", "encoder_decoder"], default="decoder", help="the prompts' form (default: decoder)")
    one.add_argument("--few_shot", metavar="FILE", help="for fs_cot: {data set: {prompt}}")
    one.add_argument("--split", metavar="FILE", help="ask only a part of the samples")
    one.add_argument("--part", choices=["train", "test"])
    one.add_argument("--k", type=int, default=1, help="completions of a question [count]")
    one.add_argument("--temperature", type=float, help="default 0, 0.7 where --k is above 1")
    one.add_argument("--max_tokens", type=int, help="of a rationale, or of a completion [tokens], default 128, zs_cot_long 512; "
                     f"zs_cot's answer has {ANSWER_TOKENS}")
    one.add_argument("--seed", type=int, default=0, help="of sampling, where the server knows it [integer]")
    one.add_argument("--workers", type=int, default=4, help="requests to a server at a time [count] (default: 4)")
    one.add_argument("--retries", type=int, default=8, help="after 429, 5xx and lost connections [count] (default: 8)")
    one.add_argument("--timeout_sec", type=float, default=120, help="of a request [s] (default: 120)")
    one.add_argument("--root", default=".", metavar="DIR", help="the folder of completion_data/ (default: .)")

    one = command("filter", filter_correct, "keep the completions that are correct")
    one.add_argument("--completions", required=True, metavar="FILE")
    one.add_argument("--out", required=True, metavar="FILE")
    one.add_argument("--compat", action="store_true", help="judge as the earlier system, with its bugs")

    one = command("export", export, "write data files for students, of correct completions and of the split's training part alone")
    one.add_argument("--dataset", required=True, metavar="FILE")
    one.add_argument("--split", required=True, metavar="FILE")
    one.add_argument("--completions", metavar="FILE", help="the teacher's, for ft_cot")
    one.add_argument("--method", required=True, choices=["ft", "ft_cot"], help="answers alone, or chains of thought")
    one.add_argument("--style", required=True, choices=["token", "natural"])
    one.add_argument("--family", required=True, choices=["decoder", "encoder_decoder", "openai"])
    one.add_argument("--to", choices=["rawtune", "earlier"], default="rawtune", help="a data file for seq2seq.py and sft_causal.py, or the earlier "
                     "system's finetune_data/P_<family>/F_<key> (default: rawtune)")
    one.add_argument("--out", metavar="FILE", help="for rawtune, .json or .jsonl; a file that differs is never overwritten")
    one.add_argument("--root", default=".", metavar="DIR", help="the folder of finetune_data/ (default: .)")
    one.add_argument("--k", type=int, help="the first k completions of a question, default all")
    one.add_argument("--val_share", type=float, help="of the training part, for eval [0-1], default 0.1")
    one.add_argument("--compat", action="store_true", help="judge, and write ft_cot_natural's label, as the earlier system: without its comma")
    records.add_tokenizer(one)

    one = command("evaluate", evaluate, "accuracy, contains_answer, correct_format and complete, in per cent")
    one.add_argument("files", nargs="*", metavar="FILE", help="completion data sets, or predictions of seq2seq.py and sft_causal.py")
    one.add_argument("--best_on_eval", metavar="RUN_DIR", help="choose the step on the validation predictions, then score that step's test file")
    one.add_argument("--saved_dir", metavar="DIR", help="score all completion files below: model and method x data set")
    one.add_argument("--split", metavar="PATH", help="score only a part: a split file, or with --saved_dir a folder of <dataset_key>__default.json")
    one.add_argument("--part", choices=["train", "test"])
    one.add_argument("--template", choices=list(TEMPLATES), help="default: what the files say")
    one.add_argument("--csv", metavar="FILE", help="with --saved_dir: a line for each file")
    one.add_argument("--figure", metavar="FILE", help="with --saved_dir: .svg, .png or .pdf, needs matplotlib")
    one.add_argument("--compat", action="store_true", help="judge as the earlier system, with its bugs")

    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except OSError as error:  # a path that is no good, a full disk
        return records.stop([str(error)])


if __name__ == "__main__":
    sys.exit(main())
