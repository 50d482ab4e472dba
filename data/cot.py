"""Let a teacher reason, keep the chains of thought that end in the right answer, train a student
on them, and score both.

    python data/cot.py make coin_flip --n 1000 --out data/coins.json
    python data/cot.py split --dataset data/coins.json --out data/coins_split.json
    python data/cot.py teach --dataset data/coins.json --out data/taught.jsonl --model NAME \\
        --server http://127.0.0.1:8000/v1/chat/completions
    python data/cot.py filter --completions data/taught.jsonl --out data/right.jsonl
    python data/cot.py export --dataset data/coins.json --split data/coins_split.json \\
        --completions data/right.jsonl --family encoder_decoder --out data/coins_cot.json
    python seq2seq.py --model_init_path google/flan-t5-small --data coins_cot
    python data/cot.py evaluate models/<run>/*temperature=*.json

Methods and files are those of Ho et al. 2022 (https://arxiv.org/abs/2212.10071):

    data set     {"metadata": {"dataset_key": "svamp"}, "data": [{"sample_index": 0,
                  "question": "2 + 3?", "answer": "5", "rationale": "may be there"}]}
    split        {"train": [sample_index], "test": [sample_index]}
    few shots    {"svamp": {"prompt": "Q: 1 + 1?\\nA: One and one are two. The answer is 2."}}

Completions are JSON lines, which teach appends as they come, so that the same command goes on
after a stop:

    {"dataset_key": "svamp", "prediction_template": "zs_cot", "sample_index": 0,
     "completion_index": 0, "question": "2 + 3?", "answer": "5",
     "reasoning_completion": " Two and three are five.", "completion": " 5."}
"""

import argparse
import collections
import concurrent.futures
import contextlib
import http.client
import json
import math
import os
import pathlib
import random
import re
import sys
import threading
import urllib.request

import numpy as np

import records  # first: it makes common.py importable

# isort: split
import common
from common import log

ANSWER_TOKENS = 128  # of zs_cot's answer, behind the chain of thought
ATTEMPTS = 9
FIRST_WAIT = 1.0  # seconds between attempts; doubled each time, up to a minute
TIMEOUT = 600  # seconds of a request
BUSY = (0, 408, 409, 425, 429)  # worth another attempt, as are all from 500 on; 0: no reply
NOT_THIS_PROMPT = (200, 400, 413, 422)  # no completion, but other prompts may get one
ODD_SHAPE = (KeyError, TypeError, ValueError, AttributeError)  # of JSON of another layout


def number(text):
    return round(float(text), 6)


# pattern: of a candidate in a text in which `blank` has replaced `marks`; value: of a candidate, as
# it is compared
Kind = collections.namedtuple("Kind", "pattern marks blank value", defaults=["", "", str])
NUMBER = Kind(r"-?\d+(?:\.\d+)?", ",", "", number)
YES_NO = Kind(r"(?i)(?<![^ ])(?:yes|no)(?![^ ])", r"[\"'.:,\s]", " ", str.lower)
WORD = Kind(r"(?s)\A.+", r"[\"'.\s]")  # the whole text is the one candidate
A_TO_C = Kind(r"(?<!\w)[A-C](?!\w)")
A_TO_E = Kind(r"(?<!\w)[A-E](?!\w)")
A_TO_F = Kind(r"(?<!\w)[A-F](?!\w)")
DATASETS = {
    "single_eq": NUMBER,
    "addsub": NUMBER,
    "multiarith": NUMBER,
    "gsm8k": NUMBER,
    "aqua": A_TO_E,
    "svamp": NUMBER,
    "tracking_shuffled_objects": A_TO_C,
    "date_understanding": A_TO_F,
    "coin_flip": YES_NO,
    "last_letter_concatenation": WORD,
    "commonsense_qa": A_TO_E,
    "strategy_qa": YES_NO,
}
# published splits that are not 70 % at random: of so many samples so many are drawn for training
# and the last ones are for test
PUBLISHED = {
    "gsm8k": (8792, 7473, 1319),
    "aqua": (97721, 10000, 254),
    "commonsense_qa": (10962, 9741, 1221),
}
PROMPTS = {  # of teachers
    "zs": "Q: {question}\n\nA:",
    "zs_cot": "Q: {question}\nA: Let's think step by step.",
    "fs_cot": "{few_shot}\nQ: {question}\nA:",
}
PREFIXES = {  # what stands before the answer, by prediction_template
    "ft_cot_token": "-->",
    "ft_cot_natural": "Therefore, the answer is",
    "fs_cot": "The answer is",
}
STUDENTS = {  # what ends a prompt, and what begins a completion
    "decoder": (" ###", " "),
    "encoder_decoder": ("", ""),
}
Verdict = collections.namedtuple("Verdict", "accuracy contains_answer correct_format")
NAMES = """
Abigail Adam Aisha Alan Amir Amy Anna Arjun Ava Beth Brian Bruno Camila Carl Chloe Clara Colin Craig
Daisy David Diego Dora Dylan Edith Elena Eli Emil Emma Eric Esther Felix Fiona Frank Gail George
Greta Hassan Hazel Hector Hugo Ida Igor Iris Ivan Jack Janet Jorge Joseph Julia Karen Kenji Kim Lara
Leo Liam Linda Lucas Lydia Malik Marta Max Maya Miguel Mona Nadia Neil Nina Noah Nora Omar Oscar
Paul Priya Ralph Rita Rosa Ruth Ryan Samuel Sara Sean Simon Sven Tania Theo Tina Tom Uma Vera Victor
Wanda Wendy Xavier Yara Yusuf Zoe
""".split()

# --------------------------------------------------------------------------------------- the judge


def values_of(key, text):
    """The candidates of a text, as they are compared."""
    kind = DATASETS[key]
    text = re.sub(kind.marks, kind.blank, text)
    return [kind.value(candidate) for candidate in re.findall(kind.pattern, text)]


def gold_value(key, answer):
    """The right answer as it is compared. Raises ValueError if it is none of this data set."""
    values = values_of(key, answer)
    if len(values) != 1:
        raise ValueError(f"{answer!r:.40} is no answer of {key}")
    return values[0]


def judge(row):
    """The Verdict on a completion.

    accuracy: the candidate that counts is the answer. That is the first one behind the template's
        prefix (see PREFIXES); the last one of the text where the prefix is missing; the first one
        of the text for a template that has none.
    contains_answer: any candidate is, of those behind the prefix where it is there.
    correct_format: the prefix is there, or the template has none.

    Candidates are letters that are whole words; signed numbers without their commas, rounded to
    six places; the words yes and no; of last letters the whole text without marks and white space.
    """
    key = row["dataset_key"]
    gold = gold_value(key, row["answer"])
    prefix = PREFIXES.get(row["prediction_template"], "")
    text = row["completion"]
    has_format = prefix in text
    if prefix and has_format:
        text = text.partition(prefix)[2]
    hits = [value == gold for value in values_of(key, text)]
    counting = hits[:1] if has_format else hits[-1:]
    return Verdict(any(counting), any(hits), has_format)


# ------------------------------------------------------------------------------------------- files


def load(path):
    """The value of a JSON file."""
    problems = []
    value = records.load_json(pathlib.Path(path), problems)
    if problems:
        common.fail(problems)
    return value


@contextlib.contextmanager
def expecting(what, path):
    """Around reading a value that may have another shape."""
    try:
        yield
    except ODD_SHAPE as error:
        common.fail(f"{path}: expected {what} (see -h); {type(error).__name__}: {error}")


def load_dataset(args):
    """(dataset_key, {sample_index: sample})"""

    def check(sample):
        gold_value(key, sample["answer"])
        sample["question"].strip()  # an error unless it is text
        return sample["sample_index"] + 0, sample

    path = args.dataset
    with expecting(f"a data set of {', '.join(DATASETS)}", path):
        key = load(path)["metadata"]["dataset_key"]
        DATASETS[key]
    problems = []
    found = [pair for _, pair in records.convert(path, check, args, problems)]
    samples = dict(found)
    if len(samples) < len(found):
        problems.append(f"{path}: a sample_index is repeated")
    if problems:
        common.fail(problems)
    return key, samples


def load_split(path, samples):
    split = load(path)
    with expecting("a split", path):
        train, test = set(split["train"]), set(split["test"])
    if train & test or not train | test <= samples.keys():
        common.fail(f"{path}: a sample on both sides, or one that is not in the data set")
    return split


def judge_all(row):
    """[(row, the judge's verdict)] of a completion, or of a trainer's prediction."""
    rows = [row]
    if "generations" in row:
        texts = [generation["lm_postprocess"] for generation in row["generations"]]
        rows = [{**row["orig_d"], "completion": text} for text in texts]
    return [(row, judge(row)) for row in rows]


def load_rows(args, path):
    """[(row, the judge's verdict)] of a file."""
    problems = []
    rows = []
    for _, judged in records.convert(path, judge_all, args, problems):
        rows += judged
    if problems or not rows:
        common.fail(problems or f"{path}: no completions")
    return rows


# -------------------------------------------------------------------------------------------- make


def coin_flip(names, rng):
    """(question, answer, rationale)"""
    acts = []
    steps = ["It starts heads up."]
    side = "heads"
    for name in names:
        act = rng.choice(["flips", "does not flip"])
        if act == "flips":
            side = "tails" if side == "heads" else "heads"
        acts.append(f"{name} {act} the coin.")
        steps.append(f"{name} {act}: {side} up.")
    question = (
        f"A coin is heads up. {' '.join(acts)} Is the coin still heads up? "
        'Note that "flip" here means "reverse".'
    )
    return question, "yes" if side == "heads" else "no", " ".join(steps)


def last_letters(names, rng):
    """(question, answer, rationale)"""
    words = " ".join(names)
    question = f'Take the last letters of each words in "{words}" and concatenate them.'
    answer = "".join(name[-1] for name in names)
    steps = [f"{name} ends in {name[-1]}." for name in names]
    return question, answer, " ".join([*steps, f"Together: {answer}."])


MADE = {"coin_flip": coin_flip, "last_letter_concatenation": last_letters}


def make(args):
    """Write a data set that needs no source; others come as JSON from their publishers."""
    key = " ".join(args.words)
    n_most = math.perm(len(NAMES), args.names) // 2  # else new ones are hard to find
    if key not in MADE or not 0 < args.n <= n_most:
        common.fail(f"expected make {' or make '.join(MADE)}, and --n from 1 to {n_most}")
    rng = random.Random(args.seed)
    samples = {}  # by question, so that none is there twice
    while len(samples) < args.n:
        question, answer, rationale = MADE[key](rng.sample(NAMES, args.names), rng)
        sample = {"sample_index": len(samples), "question": question, "answer": answer}
        sample["rationale"] = rationale
        samples.setdefault(question, sample)
    found = {"metadata": {"dataset_key": key}, "data": list(samples.values())}
    common.write_json(args.out, found)
    log(f"{args.out}: {args.n} samples")


# ------------------------------------------------------------------------------------------- split


def template_of(question):
    """What a question shares with others of its kind: "Ann has 3 pens. Why?" -> "N has N pens".

    Choices go, and the last sentence, which asks, if anything is before it. Numbers, pronouns and
    all words with a capital are masked, those too that begin a sentence: that joins rather too
    much than too little, so that nothing leaks."""
    text = re.split(r"\s*(?:Which choice is true\?|Answer choices:)", question.strip())[0]
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
    text = " ".join(sentences[:-1]) or text
    text = re.sub(r"(?i)\b(?:he|she|his|her|hers|him|himself|herself)\b", "N", text)
    text = re.sub(r"\d\S*|\b[A-Z]\w*(?:'s)?", "N", text)
    text = re.sub(r"\W+", " ", text).strip()
    return re.sub(r"\bN(?: N)+\b", "N", text)


def draw_templates(samples, n_train, rng):
    """[sample_index] for training, at most n_train: of each template all samples or none."""
    groups = collections.defaultdict(list)
    for index, sample in samples.items():
        groups[template_of(sample["question"])].append(index)
    train = []
    for template in rng.permutation(list(groups)):
        if len(train) + len(groups[template]) <= n_train:
            train += groups[template]
    return train


def split(args):
    """Write which samples are for training and which for test: the published split where there is
    one, else 70 % at random; or no kind of question on both sides."""
    key, samples = load_dataset(args)
    indices = list(samples)
    n_train = round(len(indices) * 0.7)  # a half goes to the even side, as published
    n_published, n_drawn, n_test = PUBLISHED.get(key, (0, 0, 0))
    rng = np.random.RandomState(args.seed)  # 0: as published
    if args.kind == "template":
        train = draw_templates(samples, n_train, rng)
    elif len(indices) == n_published:
        train = rng.permutation(indices[:-n_test])[:n_drawn].tolist()
        indices = indices[-n_test:]
    else:
        train = rng.permutation(indices)[:n_train].tolist()
    test = set(indices) - set(train)
    found = {"train": sorted(train), "test": sorted(test)}
    args.out.write_text(json.dumps(found, indent=4))
    log(f"{args.out}: {len(train)} train, {len(test)} test")


# ------------------------------------------------------------------------------------------- teach


class AnyReply(urllib.request.HTTPErrorProcessor):
    """Every reply is a reply: no exception for a status, no redirect with the key in it."""

    def http_response(self, request, response):
        return response

    https_response = http_response


OPENER = urllib.request.build_opener(AnyReply)


class Server:
    """A teacher behind OpenAI's API. Its key goes into a header and nowhere else."""

    def __init__(self, args):
        self.args = args
        self.key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"
        self.is_chat = args.server.endswith("/chat/completions")
        self.limit = "max_tokens"
        self.stopped = threading.Event()

    def post(self, body):
        """(status, text) of a request; status 0: no reply."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(self.args.server, json.dumps(body).encode(), headers)
        try:
            with OPENER.open(request, timeout=TIMEOUT) as reply:
                return reply.status, reply.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return 0, f"{type(error).__name__}: {error}"

    def parse(self, status, text):
        """(status, completion or "", finish reason) of a reply. Servers report errors with status
        200 too, beside the choices or in one."""
        if status != 200:
            return status, "", None
        try:
            reply = json.loads(text)
            choice = {**reply, **(reply.get("choices") or [{}])[0]}
            if choice.get("error"):
                return int(choice["error"]["code"]), "", None
            completion = choice["message"]["content"] if self.is_chat else choice["text"]
            return 200, completion + "", choice.get("finish_reason")
        except (json.JSONDecodeError, RecursionError):  # cut, or no JSON
            return 0, "", None
        except ODD_SHAPE:  # null is a filter's answer
            return 200, "", None

    def ask(self, row, step, max_tokens, temperature):
        """(completion or "", finish reason, the server's words), after as many attempts as it
        takes. Raises SystemExit where no prompt would get an answer."""
        prompt = row[f"{step}prompt"]
        body = {"model": row["model"], "temperature": temperature, "prompt": prompt}
        if self.is_chat:
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        if temperature:
            key = (self.args.seed, row["sample_index"], row["completion_index"])
            body["seed"] = common.derive_seed(*key) % 2**31  # which all servers take
        for attempt in range(ATTEMPTS):
            status, text = self.post({**body, self.limit: max_tokens})
            if status == 400 and "max_completion_tokens" in text:  # what newer models call it
                self.limit = "max_completion_tokens"
                status, text = self.post({**body, self.limit: max_tokens})
            text_without_key = text[:500].strip().replace(self.key, "***")
            words = f"{self.args.server}: status {status} {text_without_key}"
            status, completion, finish_reason = self.parse(status, text)
            if status in NOT_THIS_PROMPT:
                return completion, finish_reason, words
            is_busy = status in BUSY or status >= 500
            log(f"{words}; attempt {attempt + 1} of {ATTEMPTS}")
            if not is_busy or self.stopped.wait(min(60, FIRST_WAIT * 2**attempt)):
                break
        self.stopped.set()
        common.print_error(f"{words}; the same command goes on")
        raise SystemExit(common.EXIT_SAVED if is_busy else 2)

    def answer(self, row):
        """(row, "" or why it has no completion). zs_cot asks twice: its chain of thought is drawn,
        the answer that follows from it is not."""
        if self.stopped.is_set():
            return row, "not asked"
        limits = (self.args.max_tokens, self.args.temperature)
        steps = [("", *limits)]
        if "reasoning_prompt" in row:
            steps = [("reasoning_", *limits), ("", ANSWER_TOKENS, 0.0)]
        for step, *limits in steps:
            text, finish_reason, words = self.ask(row, step, *limits)
            text = text.partition("\nQ:")[0]  # a model may invent the next question
            if not text.strip() or finish_reason == "error":
                return row, words
            row[f"{step}completion"] = text
            row[f"{step}finish_reason"] = finish_reason
            if step:
                row["prompt"] = f"{row['reasoning_prompt']}{text.strip()}\nTherefore, the answer is"
        return row, ""

    def answer_all(self, rows):
        """Yield (row, "" or why it has no completion)."""
        with concurrent.futures.ThreadPoolExecutor(self.args.workers) as pool:
            try:
                asked = [pool.submit(self.answer, row) for row in rows]
                answers = concurrent.futures.as_completed(asked)
                for future in common.progress(answers, "rows", total=len(rows)):
                    yield future.result()
            finally:
                self.stopped.set()  # or all the others would be asked first


def check_teach(args):
    problems = []
    if (args.method == "fs_cot") != bool(args.few_shot):
        problems.append("--few_shot FILE goes with --method fs_cot")
    if not re.fullmatch(r"https?://\S+/completions", args.server):
        problems.append("--server: expected http[s]://.../v1/[chat/]completions")
    if args.k > 1 and not args.temperature:
        problems.append("--k above 1 needs --temperature 0.7")
    if args.out.suffix != ".jsonl":
        problems.append("--out: expected a name that ends in .jsonl")
    if problems:
        common.fail(problems)


def make_rows(args, key, samples):
    """[row], --k of each sample, with all that the same command puts there again."""
    about = {"dataset_key": key, "prediction_template": args.method, "model": args.model}
    about.update(temperature=args.temperature, max_tokens=args.max_tokens)
    few_shot = ""
    if args.few_shot:
        with expecting(f"a prompt for {key}", args.few_shot):
            few_shot = load(args.few_shot)[key]["prompt"]
    name = "reasoning_prompt" if args.method == "zs_cot" else "prompt"
    rows = []
    for sample in samples:
        row = {field: sample[field] for field in ("sample_index", "question", "answer")}
        question = sample["question"].strip()
        row[name] = PROMPTS[args.method].format(few_shot=few_shot, question=question)
        rows += [{**about, **row, "completion_index": i} for i in range(args.k)]
    return rows


def load_completions(path):
    """{(sample_index, completion_index): row} of what teach has written."""
    path.touch()
    text = path.read_text()
    *lines, torn = text.split("\n")
    rows = {}
    with expecting("completions of teach", path):
        for row in map(json.loads, lines):
            rows[row["sample_index"], row["completion_index"]] = row
    if torn and not rows:
        common.fail(f"{path}: teach did not write it")
    os.truncate(path, len(text) - len(torn))  # of a killed process; all is ASCII
    return rows


def teach(args):
    """Let a teacher answer. Answers are kept as they come, and the same command goes on."""
    check_teach(args)
    key, samples = load_dataset(args)
    chosen = load_split(args.split, samples)["train"] if args.split else samples
    there = load_completions(args.out)
    todo = []
    for row in make_rows(args, key, [samples[index] for index in chosen]):
        earlier = there.get((row["sample_index"], row["completion_index"]))
        if not earlier:
            todo.append(row)
        elif not row.items() <= earlier.items():
            common.fail(f"{args.out} was begun by another command: choose another --out")
    log(f"{args.out}: {len(there)} completions are there, {len(todo)} are asked for")
    missing = []
    with open(args.out, "a") as file:
        for row, reason in Server(args).answer_all(todo):
            if reason:
                where = f"sample {row['sample_index']}"
                missing.append((where, f"{reason}; the same command asks again"))
            else:
                print(json.dumps(row), file=file, flush=True)
    if missing:
        common.fail(missing)


# ---------------------------------------------------------------------------------- filter, export


def filter_right(args):
    """Keep the completions that are right."""
    rows = load_rows(args, args.completions)
    right = [row for row, verdict in rows if verdict.accuracy]
    records.write(args.out, {"train": right})
    log(f"{args.out}: {len(right)} of {len(rows)} completions are right")


def right_rationales(args, samples):
    """{sample_index: [rationale]} of a teacher's completions."""
    found = collections.defaultdict(list)
    for row, verdict in load_rows(args, args.completions):
        index = row.get("sample_index")
        if index not in samples or row.get("question") != samples[index]["question"]:
            common.fail(f"{args.completions}: sample {index} is another one in {args.dataset}")
        rationale = str(row.get("reasoning_completion") or "").strip()
        if row["prediction_template"] == "fs_cot":
            rationale = row["completion"].partition(PREFIXES["fs_cot"])[0].strip()
        is_usable = rationale and "-->" not in rationale  # which would end it
        if verdict.accuracy and is_usable:
            found[index].append(rationale)
    return found


def student_record(args, key, sample, rationale):
    """A training example; without a rationale the completion is the answer alone."""
    ending, beginning = STUDENTS[args.family]
    answer = sample["answer"].strip()
    if rationale:
        beginning += f"{rationale} --> "
    has_rationales = args.completions or args.rationales
    return {
        "prompt": sample["question"].strip() + ending,
        "completion": beginning + answer,
        "sample_index": sample["sample_index"],
        "answer": answer,
        "dataset_key": key,
        "prediction_template": "ft_cot_token" if has_rationales else "ft_token",
    }


def export(args):
    """Write a data file for seq2seq.py or sft_causal.py."""
    key, samples = load_dataset(args)
    parts = load_split(args.split, samples)
    if args.completions:
        rationales = right_rationales(args, samples)
    elif args.rationales:
        with expecting("a rationale in each sample", args.dataset):
            rationales = {index: [sample["rationale"].strip()] for index, sample in samples.items()}
    else:
        rationales = dict.fromkeys(samples, [""])  # the answer alone
    splits = {"train": [], "eval": [], "test": []}
    for index in parts["train"]:
        taught = rationales.get(index, [])
        name = "train"
        if common.is_held_out(args, records.normal(samples[index]["question"])):
            name = "eval"
            # one record a question, also where the teacher was never right
            taught = taught[:1] or [""]
        splits[name] += [student_record(args, key, samples[index], each) for each in taught]
    splits["test"] = [student_record(args, key, samples[index], "") for index in parts["test"]]
    records.finish(args, splits, [])


# ---------------------------------------------------------------------------------------- evaluate


def print_table(args, paths):
    """Metrics in per cent, a line for each data set and template of a file."""
    log("".join(f"{name:>17}" for name in (*Verdict._fields, "n")) + "  data set, template, file")
    for path in paths:
        groups = collections.defaultdict(list)
        for row, verdict in load_rows(args, path):
            groups[f"{row['dataset_key']}, {row['prediction_template']}"].append(verdict)
        for name, verdicts in groups.items():
            cells = [f"{100 * mean:17.2f}" for mean in np.mean(verdicts, axis=0)]
            log(f"{''.join(cells)}{len(verdicts):17}  {name}, {path}")


def evaluate(args):
    """Score completions, and predictions of the trainers."""
    paths = args.words
    if args.saved_dir:
        paths += sorted(pathlib.Path(args.saved_dir).rglob("*.jsonl"))
    if not paths:
        common.fail("nothing to judge: expected files, or --saved_dir")
    print_table(args, paths)


# ------------------------------------------------------------------------------------ command line

COMMANDS = {  # name: (function, flags that it needs)
    "make": (make, ["out"]),
    "split": (split, ["dataset", "out"]),
    "teach": (teach, ["dataset", "model", "out"]),
    "filter": (filter_right, ["completions", "out"]),
    "export": (export, ["dataset", "split", "out"]),
    "evaluate": (evaluate, []),
}
FLAGS = {  # as in common.py
    "out": ("", "file to write"),
    "dataset": ("", "data set, as make writes it"),
    "split": ("", "as split writes it"),
    "completions": ("", "of teach"),
    "seed": (0, "of what is drawn"),
    "skip_malformed": (False, "drop rows that cannot be used"),
    # make
    "n": (500, "questions"),
    "names": (4, "people or words in each"),
    # split
    "kind": ("random", "template: no kind of question on both sides", "random", "template"),
    # teach
    "method": ("zs_cot", "prompt", *PROMPTS),
    "server": ("", "its .../v1/[chat/]completions; key: OPENAI_API_KEY"),
    "model": ("", "its name at the server"),
    "few_shot": ("", "solved questions for fs_cot"),
    "k": (1, "completions of each question"),
    "temperature": (0.0, "of sampling"),
    "max_tokens": (128, "of an answer, or a chain of thought"),
    "workers": (4, "requests at a time"),
    # export; without completions or rationales students learn answers alone
    "rationales": (False, "the data set's own rationales"),
    "family": ("encoder_decoder", "of the student", *STUDENTS),
    "eval_fraction": (0.1, "share of the training part for eval"),
    # evaluate
    "saved_dir": ("", "all completions in this folder"),
}


def main(argv=None):
    parser = common.Parser(__doc__, FLAGS, shared_flags={})
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("words", nargs="*", help="of make: the data set; of evaluate: files")
    args = parser.parse_args(argv or sys.argv[1:])
    command, needed = COMMANDS[args.command]
    missing = [f"--{name} is missing" for name in needed if not getattr(args, name)]
    args.out = pathlib.Path(args.out)
    if missing:
        common.fail(missing)
    try:
        if needed and command != teach:  # which goes on with a file
            records.new_file(args.out)
        command(args)
    # paths that cannot be read or written, numbers that are no counts or seeds
    except (OSError, ValueError, argparse.ArgumentTypeError) as error:
        common.fail(f"{args.command}: {error}")
    except KeyboardInterrupt:
        return common.EXIT_SAVED
    return 0


if __name__ == "__main__":
    sys.exit(main())
