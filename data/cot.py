"""Let a teacher reason, keep the chains of thought that end in the right answer, train a student
on them, and score both.

    python data/cot.py make coin_flip --n 1000 --rationale --out data/coins.json
    python data/cot.py split --dataset data/coins.json --out data/coins_split.json
    python data/cot.py teach --dataset data/coins.json --rationales --out data/taught.jsonl
    python data/cot.py filter --completions data/taught.jsonl --out data/right.jsonl
    python data/cot.py export --dataset data/coins.json --split data/coins_split.json \\
        --completions data/right.jsonl --family encoder_decoder --out data/coins_cot.json
    python seq2seq.py --model_init_path google/flan-t5-small --data coins_cot
    python data/cot.py evaluate --best_on_eval models/<run>

Methods and files are those of Ho et al. 2022 (https://arxiv.org/abs/2212.10071):

    data set     {"metadata": {"dataset_key": "svamp"}, "data": [{"sample_index": 0,
                  "question": "2 + 3?", "answer": "5", "rationale": "may be there"}]}
    split        {"train": [sample_index], "test": [sample_index]}
    few shots    {"svamp": {"prompt": "Q: 1 + 1?\\nA: One and one are two. The answer is 2."}}

Completions are ours, a line for each; those of the earlier system, D_<dataset_key>.json, are read
too. teach appends a line as it comes, so that the same command goes on after a stop:

    {"dataset_key": "svamp", "prediction_template": "zs_cot", "sample_index": 0,
     "completion_index": 0, "question": "2 + 3?", "answer": "5",
     "reasoning_completion": " Two and three are five.", "completion": " 5."}
"""

import argparse
import collections
import concurrent.futures
import contextlib
import fcntl
import http.client
import json
import math
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import urllib.request

import numpy as np
from tqdm import tqdm

import records  # first: it makes common.py importable

# isort: split
import common
from common import log

ANSWER_TOKENS = 128  # of zs_cot's answer, behind the chain of thought
LOCAL_FILES = ("prompts.json", "replies.txt")  # beside --out, while chat.py works
ATTEMPTS = 9
FIRST_WAIT = 1.0  # seconds between attempts; doubled each time, up to a minute
TIMEOUT = 600  # seconds of a request
BUSY = (0, 408, 409, 425, 429)  # worth another attempt, as are all from 500 on; 0: no reply
NOT_THIS_PROMPT = (200, 400, 413, 422)  # no completion, but other prompts may get one

# what: for messages; pattern: of a candidate in a text in which `blank` has replaced `marks`;
# value: of a candidate, as it is compared
Kind = collections.namedtuple("Kind", "what pattern marks blank value", defaults=["", "", str])
NUMBER = Kind("a number", r"-?\d+(?:\.\d+)?", ",", "", float)
YES_NO = Kind("yes or no", r"(?i)(?<![^ ])(?:yes|no)(?![^ ])", r"[\"'.:,\s]", " ", str.lower)
WORD = Kind("a word", r"(?s)\A.*", r"[\"'.\s]")  # the whole text is the one candidate
A_TO_C = Kind("a letter from A to C", r"(?<!\w)[A-C](?!\w)")
A_TO_E = Kind("a letter from A to E", r"(?<!\w)[A-E](?!\w)")
A_TO_F = Kind("a letter from A to F", r"(?<!\w)[A-F](?!\w)")
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
# published splits that are not 70 % at random: of so many samples the last ones are for test, and
# so many of the others are drawn for training
PUBLISHED = {
    "gsm8k": (8792, 1319, 7473),
    "aqua": (97721, 254, 10000),
    "commonsense_qa": (10962, 1221, 9741),
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
STUDENTS = {  # prompt, and completion with and without a chain of thought
    "decoder": ("{question} ###", " {rationale} --> {answer}", " {answer}"),
    "encoder_decoder": ("{question}", "{rationale} --> {answer}", "{answer}"),
}
METRICS = ("accuracy", "contains_answer", "correct_format", "complete")
NAMES = """
Abigail Adam Aisha Alan Amir Amy Anna Arjun Ava Beth Brian Bruno Camila Carl Chloe Clara Colin Craig
Daisy David Diego Dora Dylan Edith Elena Eli Emil Emma Eric Esther Felix Fiona Frank Gail George
Greta Hassan Hazel Hector Hugo Ida Igor Iris Ivan Jack Janet Jorge Joseph Julia Karen Kenji Kim Lara
Leo Liam Linda Lucas Lydia Malik Marta Max Maya Miguel Mona Nadia Neil Nina Noah Nora Omar Oscar
Paul Priya Ralph Rita Rosa Ruth Ryan Samuel Sara Sean Simon Sven Tania Theo Tina Tom Uma Vera Victor
Wanda Wendy Xavier Yara Yusuf Zoe
""".split()

# --------------------------------------------------------------------------------------- the judge


def gold_value(key, answer):
    """The right answer as it is compared. Raises ValueError if it is none of this data set."""
    kind = DATASETS[key]
    text = re.sub(kind.marks, kind.blank, answer).strip()
    if not text or not re.fullmatch(kind.pattern, text):
        raise ValueError(f"answer {answer!r:.40}, expected {kind.what}")
    return kind.value(text)


def judge(row):
    """{metric: whether} of a completion.

    accuracy: the candidate that counts is the answer. That is the first one behind the template's
        prefix (see PREFIXES); the last one of the text where the prefix is missing; the first one
        of the text for a template that has none.
    contains_answer: any candidate is, of those behind the prefix where it is there.
    correct_format: the prefix is there, or the template has none.
    complete: the text ended by itself; only where that is known.

    Candidates are letters that are whole words; signed numbers without their commas, equal within
    1e-6; the words yes and no; of last letters the whole text without marks and white space.
    """
    kind = DATASETS[row["dataset_key"]]
    gold = gold_value(row["dataset_key"], row["answer"])
    prefix = PREFIXES.get(row["prediction_template"])
    text = row["completion"]
    has_format = prefix is None or prefix in text
    if prefix and has_format:
        text = text.partition(prefix)[2]
    hits = []
    for candidate in re.findall(kind.pattern, re.sub(kind.marks, kind.blank, text)):
        value = kind.value(candidate)
        is_number = kind is NUMBER
        hits.append(abs(value - gold) <= 1e-6 if is_number else value == gold)
    counting = hits[:1] if has_format else hits[-1:]
    verdict = {"accuracy": any(counting), "contains_answer": any(hits)}
    verdict["correct_format"] = has_format
    if row.get("finish_reason"):
        verdict["complete"] = row["finish_reason"] == "stop"
    return verdict


# ------------------------------------------------------------------------------------------- files


def load(path):
    """The value of a JSON file."""
    problems = []
    value = records.load_json(pathlib.Path(path), problems)
    if problems:
        common.fail(problems)
    return value


def write_text(path, text):
    """Write aside, then rename: a reader never sees half a file."""
    aside = pathlib.Path(f"{path}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def check_rows(path, check, rows):
    """[check(row)]; leave if that is an error for one of them."""
    problems = []
    found = []
    for i, row in enumerate(rows):
        try:
            found.append(check(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append((f"{path}, record {i}", f"{type(error).__name__}: {error} (see -h)"))
    if problems or not rows:
        common.fail(problems or f"{path}: no records")
    return found


@contextlib.contextmanager
def expecting(what, path):
    """Around reading a value that may have another shape."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        common.fail(f"{path}: expected {what} (see -h); {type(error).__name__}: {error}")


def load_dataset(path):
    """(dataset_key, {sample_index: sample})"""

    def check(sample):
        gold_value(key, sample["answer"])
        problem = common.text_problem(sample["question"], "question", sample)
        if problem:
            raise ValueError(problem)
        return sample["sample_index"] + 0, sample

    found = load(path)
    with expecting(f"a data set of {', '.join(DATASETS)}", path):
        key = found["metadata"]["dataset_key"]
        data = list(found["data"])
        DATASETS[key]
    samples = dict(check_rows(path, check, data))
    if len(samples) < len(data):
        common.fail(f"{path}: a sample_index is repeated")
    return key, samples


def load_split(path, samples):
    split = load(path)
    with expecting("a split", path):
        train, test = set(split["train"]), set(split["test"])
    if train & test or not train | test <= samples.keys():
        common.fail(f"{path}: a sample on both sides, or one that is not in the data set")
    return split


def load_rows(path):
    """[(row, the judge's verdict)] of completions, or of a trainer's predictions."""
    path = pathlib.Path(path)
    if path.suffix == ".jsonl":
        problems = []
        rows = [row for _, _, row in records.read(path, problems)]
        if problems:
            common.fail(problems)
    else:
        found = load(path)
        rows = []
        with expecting("completions or predictions", path):
            if isinstance(found, dict):  # of the earlier system
                for group in found["data"].values():
                    rows += [{**found["metadata"], **row} for row in group]
                found = []
            for prediction in found:
                for generation in prediction["generations"]:
                    text = generation["lm_postprocess"]
                    rows.append({**prediction["orig_d"], "completion": text})
    return check_rows(path, lambda row: (row, judge(row)), rows)


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
    question = f"A coin is heads up. {' '.join(acts)} Is the coin still heads up? "
    question += 'Note that "flip" here means "reverse".'
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
    key = args.words[0] if len(args.words) == 1 else None
    if key not in MADE:
        common.fail(f"expected make {' or make '.join(MADE)}")
    if not 0 < args.n <= math.perm(len(NAMES), args.names) / 2:  # else new ones are hard to find
        common.fail(f"--n {args.n}: too few questions, or too many for --names {args.names}")
    rng = random.Random(args.seed)
    samples = {}
    while len(samples) < args.n:
        names = rng.sample(NAMES, args.names)
        question, answer, rationale = MADE[key](names, rng)
        sample = {"sample_index": len(samples), "question": question, "answer": answer}
        if args.rationale:
            sample["rationale"] = rationale
        samples.setdefault(question, sample)  # no question twice
    found = {"metadata": {"dataset_key": key}, "data": list(samples.values())}
    write_text(args.out, json.dumps(found, indent=4) + "\n")
    log(f"{args.out}: {args.n} samples, the first: {found['data'][0]}")


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


def draw_templates(samples, n_train, seed):
    """[sample_index] for training, at most n_train: of each template all samples or none."""
    groups = collections.defaultdict(list)
    for index, sample in samples.items():
        groups[template_of(sample["question"])].append(index)
    groups = list(groups.values())
    train = []
    for i in np.random.RandomState(seed).permutation(len(groups)):
        if len(train) + len(groups[i]) <= n_train:
            train += groups[i]
    return train


def split(args):
    """Write which samples are for training and which for test: the published split where there is
    one, else 70 % at random; or no kind of question on both sides."""
    key, samples = load_dataset(args.dataset)
    indices = list(samples)
    n_train = round(len(indices) * 0.7)  # a half goes to the even side, as published
    n_drawn = args.train_n
    n_published, n_test, n_published_train = PUBLISHED.get(key, (0, 0, 0))
    if args.kind == "template":
        train = draw_templates(samples, n_train, args.seed)
    elif len(indices) == n_published:
        train = indices[:-n_test]
        n_drawn = n_drawn or n_published_train
    else:
        train = np.random.RandomState(0).permutation(indices)[:n_train].tolist()
    test = sorted(set(indices) - set(train))
    if n_drawn:
        train = np.random.RandomState(args.seed).permutation(sorted(train))[:n_drawn].tolist()
    if not train or not test or n_drawn > len(train):
        common.fail(f"{len(indices)} samples give {len(train)} for train and {len(test)} for test")
    write_text(args.out, json.dumps({"train": sorted(train), "test": test}, indent=4))
    log(f"{args.out}: {len(train)} train, {len(test)} test")


# ------------------------------------------------------------------------------------------- teach


def steps_of(args):
    """[(step, max_tokens, temperature)] of what is asked one after the other. zs_cot's chain of
    thought is drawn; the answer that follows from it is not."""
    if args.method == "zs_cot":
        return [("reasoning_", args.max_tokens, args.temperature), ("", ANSWER_TOKENS, 0.0)]
    return [("", args.max_tokens, args.temperature)]


def fill_in(row, step, text, finish_reason):
    """Put an answer into a row, without the next question, which a model may invent. Returns
    whether it is an answer."""
    text, found, _ = text.partition("\nQ:")
    row[f"{step}completion"] = text.encode(errors="replace").decode()  # half a character
    row[f"{step}finish_reason"] = "stop" if found else finish_reason
    if step:
        row["prompt"] = f"{row['reasoning_prompt']}{text.strip()}\nTherefore, the answer is"
    return text.strip() != "" and finish_reason != "error"


def seed_of(args, *key):
    """31 bits, which all servers take."""
    return common.derive_seed(args.seed, *key) % 2**31


class AnyReply(urllib.request.HTTPErrorProcessor):
    """Every reply is a reply: no exception for a status, no redirect with the key in it."""

    def http_response(self, request, response):
        return response

    https_response = http_response


class Server:
    """A teacher behind OpenAI's API. Its key goes into a header and nowhere else."""

    def __init__(self, args, problems):
        self.args = args
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        self.is_chat = args.server.endswith("/chat/completions")
        self.limit = "max_tokens"
        self.stopped = threading.Event()
        self.opener = urllib.request.build_opener(AnyReply)
        if not re.fullmatch(r"https?://[^\s@?]+/completions", args.server):
            problems.append("--server: expected http[s]://.../v1/[chat/]completions")
        if not self.key.isascii() or not self.key.isprintable():
            problems.append("OPENAI_API_KEY has characters that no header can hold")

    def post(self, body):
        """(status, text) of a request; status 0: no reply."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.args.server, json.dumps(body).encode(), headers)
        try:
            with self.opener.open(request, timeout=TIMEOUT) as reply:
                return reply.status, reply.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return 0, f"{type(error).__name__}: {error}"

    def parse(self, text):
        """(status, completion or "", finish reason) of a reply with status 200. Servers report
        errors in it all the same, beside the choices or in one."""
        try:
            reply = json.loads(text)
            choice = {**reply, **(reply.get("choices") or [{}])[0]}
            if choice.get("error"):
                return int(choice["error"]["code"]), "", None
            completion = choice["message"]["content"] if self.is_chat else choice["text"]
            return 200, completion + "", choice.get("finish_reason")
        except (json.JSONDecodeError, RecursionError):  # cut, or no JSON
            return 0, "", None
        except (KeyError, TypeError, ValueError, AttributeError):  # null is a filter's answer
            return 200, "", None

    def ask(self, prompt, max_tokens, temperature, seed):
        """(completion or "", finish reason, the server's words), after as many attempts as it
        takes. Raises SystemExit where no prompt would get an answer."""
        body = {"model": self.args.model, "temperature": temperature, "prompt": prompt}
        if self.is_chat:
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        if temperature:
            body["seed"] = seed
        for attempt in range(ATTEMPTS):
            status, text = self.post({**body, self.limit: max_tokens})
            if status == 400 and "max_completion_tokens" in text:  # what newer models call it
                self.limit = "max_completion_tokens"
                status, text = self.post({**body, self.limit: max_tokens})
            words = f"{self.args.server}: status {status} {text[:500].strip()}"
            if self.key:
                words = words.replace(self.key, "***")
            completion, finish_reason = "", None
            if status == 200:
                status, completion, finish_reason = self.parse(text)
            if status in NOT_THIS_PROMPT:
                return completion, finish_reason, words
            if status not in BUSY and status < 500:
                self.stopped.set()
                common.fail(words)
            wait = min(60.0, FIRST_WAIT * 2**attempt)
            log(f"{words}; waiting {wait:g} s, attempt {attempt + 1} of {ATTEMPTS}")
            if self.stopped.wait(wait):
                break
        self.stopped.set()
        common.print_error(f"gave up: {words}; the same command goes on")
        raise SystemExit(common.EXIT_SAVED)

    def answer(self, row):
        """(row, "" or why it has no completion)"""
        if self.stopped.is_set():
            return row, "not asked"
        seed = seed_of(self.args, row["sample_index"], row["completion_index"])
        for step, *limits in steps_of(self.args):
            text, finish_reason, words = self.ask(row[f"{step}prompt"], *limits, seed)
            if not fill_in(row, step, text, finish_reason):
                return row, words
        return row, ""

    def answer_all(self, rows):
        """Yield (row, "" or why it has no completion)."""
        pool = concurrent.futures.ThreadPoolExecutor(self.args.workers)
        try:
            asked = [pool.submit(self.answer, row) for row in rows]
            done = concurrent.futures.as_completed(asked)
            for future in tqdm(done, "rows", len(rows), disable=None):
                yield future.result()
        finally:
            self.stopped.set()
            pool.shutdown(cancel_futures=True)


def run_chat(args, rows, step, max_tokens, temperature):
    """[reply] from chat.py's file mode, which goes on after a stop."""
    prompts, replies = (args.out.with_suffix(f".{step}{ending}") for ending in LOCAL_FILES)
    name = "prompt" if args.chat else "text"
    text = json.dumps([{**row, name: row[f"{step}prompt"]} for row in rows])
    if prompts.exists() and prompts.read_text() != text:
        common.fail(f"{prompts} is of another command: finish that one, or move it away")
    write_text(prompts, text)
    if not replies.exists():
        command = [sys.executable, common.HERE / "chat.py", "--model_path", args.local]
        command += ["--input", prompts, "--output", replies, "--max_new_tokens", max_tokens]
        command += ["--temperature", temperature, "--top_p", 1, "--seed", seed_of(args, text)]
        code = subprocess.run([str(word) for word in command]).returncode
        if code:
            raise SystemExit(code)
    return [json.loads(line) for line in open(replies, encoding="utf-8", newline="\n")]


def answer_locally(args, rows):
    """Yield (row, "" or why it has no completion)."""
    for limits in steps_of(args) if rows else ():
        answered = []
        for row, reply in zip(rows, run_chat(args, rows, *limits)):
            if fill_in(row, limits[0], reply["replies"][0], reply["finish_reasons"][0]):
                answered.append(row)
            else:
                yield row, "an empty answer"
        rows = answered
    for row in rows:
        yield row, ""
    for step, *_ in steps_of(args):
        for ending in LOCAL_FILES:
            args.out.with_suffix(f".{step}{ending}").unlink(missing_ok=True)


def answer_from(args, samples, rows):
    """Yield (row, "") with the data set's own rationales."""
    for row in rows:
        with expecting("a rationale in each sample", args.dataset):
            rationale = samples[row["sample_index"]]["rationale"].strip()
        row["completion"] = f" {rationale} The answer is {row['answer']}."
        yield row, ""


def check_teach(args, problems):
    if args.rationales:
        args.method = "fs_cot"  # the form of what is said
    elif (args.method == "fs_cot") != bool(args.few_shot):
        problems.append("--few_shot FILE goes with --method fs_cot")
    if bool(args.server) + bool(args.local) + args.rationales != 1:
        problems.append("expected one of --server, --local, --rationales")
    if args.k > 1 and (args.rationales or not args.temperature):
        problems.append("--k above 1 needs a model and --temperature 0.7")


def make_rows(args, key, samples):
    """[row], --k of each sample, with all that the same command puts there again."""
    about = {name: getattr(args, name) for name in ("model", "chat", "temperature", "max_tokens")}
    about.update(dataset_key=key, prediction_template=args.method)
    few_shot = ""
    if args.few_shot:
        found = load(args.few_shot)
        with expecting(f"a prompt for {key}", args.few_shot):
            few_shot = found[key]["prompt"]
    step = steps_of(args)[0][0]
    rows = []
    for sample in samples:
        row = {name: sample[name] for name in ("sample_index", "question", "answer")}
        question = sample["question"].strip()
        prompt = PROMPTS[args.method].format(few_shot=few_shot, question=question)
        for n in range(args.k):
            rows.append({**about, **row, "completion_index": n, f"{step}prompt": prompt})
    return rows


def open_completions(path):
    """(file to append to, {(sample_index, completion_index): row that is there})"""
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
    except BlockingIOError:
        common.fail(f"{path}: another process is writing it")
    file.seek(0)
    *lines, torn = file.read().split("\n")
    rows = {}
    with expecting("completions of teach", path):
        for row in map(json.loads, lines):
            rows[row["sample_index"], row["completion_index"]] = row
    if torn and not rows:
        common.fail(f"{path}: teach did not write it")
    file.truncate(file.tell() - len(torn))  # of a killed process; all is ASCII
    return file, rows


def teach(args):
    """Let a teacher answer. Answers are kept as they come, and the same command goes on."""
    problems = []
    key, samples = load_dataset(args.dataset)
    chosen = list(samples.values())
    if args.split:
        chosen = [samples[index] for index in load_split(args.split, samples)["train"]]
    check_teach(args, problems)
    server = Server(args, problems) if args.server else None
    if problems:
        common.fail(problems)
    args.model = args.model or args.local
    file, there = open_completions(args.out)
    todo = []
    for row in make_rows(args, key, chosen):
        earlier = there.get((row["sample_index"], row["completion_index"]))
        if not earlier:
            todo.append(row)
        elif not row.items() <= earlier.items():
            common.fail(f"{args.out} was begun by another command: choose another --out")
    log(f"{args.out}: {len(there)} completions are there, {len(todo)} are asked for")
    if server:
        answers = server.answer_all(todo)
    elif args.local:
        answers = answer_locally(args, todo)
    else:
        answers = answer_from(args, samples, todo)
    missing = []
    for row, reason in answers:
        if reason:
            missing.append((f"sample {row['sample_index']}", reason))
        else:
            file.write(json.dumps(row) + "\n")
            file.flush()
    if missing:
        log("the same command asks again for what is missing")
        common.fail(missing)
    print_table([args.out])


# ---------------------------------------------------------------------------------- filter, export


def filter_right(args):
    """Keep the completions that are right."""
    found = load_rows(args.completions)
    right = [row for row, verdict in found if verdict["accuracy"]]
    write_text(args.out, "".join(json.dumps(row) + "\n" for row in right))
    log(f"{args.out}: {len(right)} of {len(found)} completions are right")


def rationale_of(row):
    """What stands before a teacher's answer, or ""."""
    if "reasoning_completion" in row:
        return row["reasoning_completion"].strip()
    prefix = PREFIXES.get(row["prediction_template"])
    return row["completion"].partition(prefix)[0].strip() if prefix else ""


def right_rationales(args, samples):
    """{sample_index: [rationale]} of a teacher's completions."""
    found = collections.defaultdict(list)
    rows = load_rows(args.completions)
    for row, verdict in rows:
        index = row["sample_index"]
        if row["question"] != samples.get(index, row)["question"]:
            common.fail(f"{args.completions}: sample {index} is another one in {args.dataset}")
        rationale = rationale_of(row)
        is_usable = rationale and "-->" not in rationale  # which would end it
        if verdict["accuracy"] and is_usable:
            found[index].append(rationale)
    log(f"{sum(map(len, found.values()))} of {len(rows)} completions are right, with a rationale")
    return found


def student_record(args, key, sample, rationale=""):
    """A training example; without a rationale the completion is the answer alone."""
    prompt, with_rationale, answer = STUDENTS[args.family]
    fields = {"question": sample["question"].strip(), "answer": sample["answer"].strip()}
    completion = with_rationale if rationale else answer
    return {
        "prompt": prompt.format(**fields),
        "completion": completion.format(rationale=rationale, **fields),
        "sample_index": sample["sample_index"],
        "answer": fields["answer"],
        "dataset_key": key,
        "prediction_template": "ft_cot_token" if args.completions else "ft_token",
    }


def export(args):
    """Write a data file for seq2seq.py or sft_causal.py."""
    key, samples = load_dataset(args.dataset)
    parts = load_split(args.split, samples)
    rationales = right_rationales(args, samples) if args.completions else {}
    splits = {"train": [], "eval": [], "test": []}
    for index in parts["train"]:
        sample = samples[index]
        taught = rationales.get(index, [])
        if common.is_held_out(args, records.normal(sample["question"])):
            # one record a question, also where the teacher was never right
            splits["eval"].append(student_record(args, key, sample, *taught[:1]))
        elif args.completions:
            splits["train"] += [student_record(args, key, sample, each) for each in taught]
        else:
            splits["train"].append(student_record(args, key, sample))
    splits["test"] = [student_record(args, key, samples[index]) for index in parts["test"]]
    splits = {split: found for split, found in splits.items() if found}
    if "train" not in splits:
        common.fail("no records for train")
    records.write(args.out, splits)
    records.show(args.out, splits)


# ---------------------------------------------------------------------------------------- evaluate


def print_table(paths):
    """Metrics in per cent, a line for each data set and template of a file."""
    log("".join(f"{name:>17}" for name in (*METRICS, "n")) + "  data set, template, file")
    for path in paths:
        groups = collections.defaultdict(list)
        for row, verdict in load_rows(path):
            groups[row["dataset_key"], row["prediction_template"]].append(verdict)
        for (key, template), verdicts in groups.items():
            line = ""
            for metric in METRICS:
                known = [verdict[metric] for verdict in verdicts if metric in verdict]
                line += f"{100 * sum(known) / len(known):17.2f}" if known else f"{'-':>17}"
            log(f"{line}{len(verdicts):17}  {key}, {template}, {path}")


def best_on_eval(folder):
    """[file] of the evaluations of a run, and of the test at the step that is best on the
    validation part. The tests of other steps are not opened."""
    paths = {}
    n_right = {}
    for path in pathlib.Path(folder).glob("temperature=*_step=*.json"):
        step = int(path.stem.partition("_step=")[2])
        paths[step] = path
        n_right[step] = sum(verdict["accuracy"] for _, verdict in load_rows(path))
    if not paths:
        common.fail(f"{folder}: no temperature=..._step=N.json, predictions of a run")
    steps = sorted(paths)
    trained = [step for step in steps if step > 0] or steps
    best = max(trained, key=n_right.get)  # of equals the first
    log(f"best on eval is step {best}")
    found = [paths[step] for step in steps]
    test = paths[best].with_name(f"test_{paths[best].name}")
    if test.exists():
        return [*found, test]
    log(f"no {test}: seq2seq.py --no_train with the weights of checkpoint-{best} makes one")
    return found


def evaluate(args):
    """Score completions, and predictions of the trainers."""
    paths = list(args.words)
    if args.saved_dir:
        folder = pathlib.Path(args.saved_dir)
        paths += sorted([*folder.rglob("*.jsonl"), *folder.rglob("D_*.json")])
    if args.best_on_eval:
        paths += best_on_eval(args.best_on_eval)
    if not paths:
        common.fail("nothing to judge: expected files, --saved_dir or --best_on_eval")
    print_table(paths)


# ------------------------------------------------------------------------------------ command line

COMMANDS = {  # name: (function, flags that it needs)
    "make": (make, ["out"]),
    "split": (split, ["dataset", "out"]),
    "teach": (teach, ["dataset", "out"]),
    "filter": (filter_right, ["completions", "out"]),
    "export": (export, ["dataset", "split", "out"]),
    "evaluate": (evaluate, []),
}
FLAGS = {  # as in common.py
    "out": ("", "file to write"),
    "dataset": ("", "data set, as make writes it"),
    "split": ("", "as split writes it; teach asks only its training part"),
    "completions": ("", "of teach; export without them: students learn answers alone"),
    "seed": (0, "of what is drawn"),
    # make
    "n": (500, "questions, none twice"),
    "names": (4, "people, or words, in a question"),
    "rationale": (False, "with chains of thought"),
    # split
    "kind": ("random", "template: no kind of question on both sides", "random", "template"),
    "train_n": (0, "draw so many of the training part; 0: all"),
    # teach
    "method": ("zs_cot", "prompt", *PROMPTS),
    "server": ("", "its .../v1/[chat/]completions; key: OPENAI_API_KEY"),
    "model": ("", "its name at the server"),
    "local": ("", "or what chat.py takes as --model_path"),
    "chat": (False, "--local: prompts are messages; else text that is continued"),
    "rationales": (False, "or the data set's own rationales"),
    "few_shot": ("", "solved questions for fs_cot"),
    "k": (1, "completions of each question"),
    "temperature": (0.0, "of sampling"),
    "max_tokens": (128, "of a completion, or of a chain of thought"),
    "workers": (4, "requests to a server at a time"),
    # export
    "family": ("encoder_decoder", "of the student", *STUDENTS),
    "eval_fraction": (0.1, "share of the training part for eval"),
    # evaluate
    "saved_dir": ("", "all completions in this folder"),
    "best_on_eval": ("", "run folder: choose the step on eval, then score its test"),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("words", nargs="*", help="of make: the data set; of evaluate: files")
    for name, spec in FLAGS.items():
        common.add_flag(parser, name, *spec)
    args = parser.parse_args(argv)
    command, needed = COMMANDS[args.command]
    missing = [f"--{name} is missing" for name in needed if not getattr(args, name)]
    args.out = pathlib.Path(args.out)
    if command in (teach, filter_right) and args.out.suffix != ".jsonl":
        missing.append("--out: expected a name that ends in .jsonl")
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
