"""Make the demo data of this folder: small tasks whose answers are known by construction.

    python data/make_demos.py        # rewrites the files below, the same bytes every time

    dates.json         seq2seq.py: dates as people write them, to be put as ISO 8601
        {"prompt": "Tuesday, the 4th of March 1997", "completion": "1997-03-04", "form": "weekday"}
    clf_debug.json     clf.py: which share of a news ticker is about sports
        {"input": "The striker scores twice. The bank cuts rates.", "target": 0.5}
    instructions.jsonl sft_causal.py: twelve families of tasks on words and numbers, also as chats
        {"instruction": "What is the last word?", "input": "red cat moon", "output": "moon"}
    skills_base.jsonl, skills.jsonl     project_grads.py: four tasks; some groups have wrong answers
        {"prompt": "add 31 4 =", "completion": " 35", "skill": "add", "group": "add_clean_0"}
    wishes.jsonl       rl_ppo.py: a wish for one kind of character, see rewards.py
        {"prompt": "May I have some digits?", "want": "digits", "split": "eval"}

What is asked about occurs once, so nothing of eval or test is in train.
"""

import datetime
import json
import pathlib
import random

import records

HERE = pathlib.Path(__file__).resolve().parent
WORDS = "red cat moon tree dog fish milk lamp sun boat hand salt rain door bird king".split()


def fill(sizes, draw):
    """Yield (split, record) until each split has its size. draw: (split, records so far) -> (what
    may occur only once, record); None for what is to be drawn again."""
    seen = {None}
    for split, size in sizes.items():
        n = 0
        while n < size:
            once, record = draw(split, n)
            if once not in seen:
                seen.add(once)
                n += 1
                yield split, record


# ------------------------------------------------------------------------------------------ dates


def ordinal(n):
    """1 -> 1st, 12 -> 12th, 23 -> 23rd."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{'th' if 10 <= n % 100 <= 20 else ending}"


def dates():
    rng = random.Random(0)
    sizes = {"train": 16000, "eval": 400, "test": 400}
    days = iter(rng.sample(range(73049), sum(sizes.values())))  # from 1900 to 2099

    def draw(split, n):
        day = datetime.date(1900, 1, 1) + datetime.timedelta(days=next(days))
        month = day.strftime("%B" if rng.random() < 0.6 else "%b")
        forms = {
            "month first": f"{month} {day.day}, {day.year}",
            "day first": f"{day.day} {month} {day.year}",
            "ordinal": f"the {ordinal(day.day)} of {month}, {day.year}",
            "weekday": f"{day:%A}, the {ordinal(day.day)} of {month} {day.year}",
            "dotted": f"{day.day}.{day.month}.{day.year}",  # European: the day comes first
            "slashed": f"{day.year}/{day.month:02}/{day.day:02}",
        }
        form, text = rng.choice(list(forms.items()))
        case = rng.random()
        if case < 0.15:
            text = text.lower()
        elif case < 0.3:
            text = text.upper()
        return day, {"prompt": text, "completion": day.isoformat(), "form": form}

    return fill(sizes, draw)


# -------------------------------------------------------------------------------------- clf_debug

# "coach" and "record" are on both sides, so that no single word decides
SPORTS = (
    "the striker|our goalkeeper|a young sprinter|the home team|the tennis star|the coach|a swimmer",
    "scores twice|wins the final|breaks the record|misses the cup match|runs a fast race|"
    "trains for the league|beats the champion",
)
OTHER = (
    "the bank|a minister|the city council|a new film|the farmer|the coach company|a scientist",
    "cuts rates|signs the treaty|keeps a record of rain|opens a museum|sells more wheat|"
    "cancels the evening bus|finds a vaccine",
)


def clf_debug():
    rng = random.Random(0)

    def draw(split, n):
        kinds = [rng.random() < 0.5 for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.4:  # whole tickers about one thing are common
            kinds = kinds[:1] * len(kinds)
        sentences = []
        for is_sports in kinds:
            words = [rng.choice(part.split("|")) for part in (SPORTS if is_sports else OTHER)]
            sentences.append(f"{' '.join(words)}.".capitalize())
        text = " ".join(sentences)
        is_rare = len(kinds) == 1 and split != "train"  # there are 98 single sentences
        record = {"input": text, "target": round(sum(kinds) / len(kinds), 4)}
        return None if is_rare else text, record

    return fill({"train": 3000, "eval": 300, "test": 300}, draw)


# ----------------------------------------------------------------------------------- instructions

OPPOSITES = "hot cold|tall short|wet dry|fast slow|old new|hard soft|rich poor|near far"
ASK = {
    "last": ["What is the last word?", "Repeat the last word.", "Which word comes last?"],
    "first": ["What is the first word?", "Repeat the first word.", "Which word comes first?"],
    "reverse": ["Write the words in reverse order.", "Turn the order of the words around."],
    "upper": ["Write this in upper case.", "Put this into capital letters."],
    "count": ["How many words are there?", "Count the words."],
    "opposite": ["Give the opposite of each word.", "Replace every word by its opposite."],
    "plural": ["What is the plural of the made-up word {}?", "Write the plural of {}."],
    "add": ["Add one to {}.", "Which number comes after {}?"],
    "largest": ["Which number is the largest?", "Find the largest number."],
}
# twice what takes longest to learn
FAMILIES = [*ASK, "opposite", "plural", "system", "follow", "follow", "again"]
SHOUT = ["Answer in upper case.", "You shout: use capital letters."]
SPEAK = ["Answer in lower case.", "You are a helpful assistant."]


def plural(word):
    """English spelling: trupary -> truparies, grinesh -> grineshes, blodam -> blodams."""
    if word.endswith("y"):
        return f"{word[:-1]}ies"
    return word + ("es" if word.endswith(("x", "sh", "ch")) else "s")


def single(family, rng):
    """(instruction, input, output); what is asked about is the input, else the number or word."""
    ask = rng.choice(ASK[family])
    if family == "add":
        # more carries than chance has: a tenth of all numbers ends with a 9, a third of these
        is_any = rng.random() < 0.7
        number = rng.randrange(10, 9999) if is_any else rng.randrange(1, 1000) * 10 - 1
        return ask.format(number), "", str(number + 1)
    if family == "plural":
        ends = "b d g l m n p x sh ch ry my ny"
        syllables = ("bl br dr fl fr gl gr pl pr tr", "a e i o u", "b d g l m n p t", "a e i o u")
        word = "".join(rng.choice(letters.split()) for letters in (*syllables, ends))
        return ask.format(word), "", plural(word)
    if family == "opposite":
        pairs = [pair.split() for pair in OPPOSITES.split("|")]
        opposite = dict(pairs) | {b: a for a, b in pairs}
        words = rng.sample(sorted(opposite), rng.randint(2, 3))
        return ask, " ".join(words), " ".join(map(opposite.get, words))
    if family == "largest":
        numbers = rng.sample(range(10), rng.randint(3, 5))
        return ask, " ".join(map(str, numbers)), str(max(numbers))
    # capitals are other tokens, which take longest to learn: shorter lists
    words = rng.sample(WORDS, rng.randint(2, 3) if family == "upper" else rng.randint(3, 4))
    text = " ".join(words)
    answers = {"last": words[-1], "first": words[0], "reverse": " ".join(words[::-1])}
    answers.update(upper=text.upper(), count=str(len(words)))
    return ask, text, answers[family]


def conversation(family, rng):
    """([text of a turn], what may occur only once)"""
    if family == "again":
        instruction, _, output = single("add", rng)
        follow = rng.choice(["And once more?", "Add one again."])
        return [instruction, output, follow, str(int(output) + 1)], output
    instruction, text, output = single(rng.choice(["last", "first"]), rng)
    question = f"{instruction}\n\n{text}"
    if family == "system":  # the same question has another answer under another system message
        is_loud = rng.random() < 0.5
        system = rng.choice(SHOUT if is_loud else SPEAK)
        return [system, question, output.upper() if is_loud else output], text
    words = text.split()
    follows = {
        "And the first?": words[0],
        "And the last?": words[-1],
        "And in upper case?": output.upper(),
        "And the second?": words[1],
    }
    follow, answer = rng.choice(list(follows.items()))
    return [question, output, follow, answer], text


def instructions():
    rng = random.Random(0)

    def draw(split, n):
        family = FAMILIES[n % len(FAMILIES)]
        if family in ASK:
            instruction, text, output = single(family, rng)
            once = text or output
            record = {"instruction": instruction, "input": text, "output": output}
            if not text:
                del record["input"]
        else:
            turns, once = conversation(family, rng)
            roles = ["user", "assistant"] * 2
            if family == "system":
                roles = ["system", *roles]
            messages = [{"role": role, "content": text} for role, text in zip(roles, turns)]
            record = {"messages": messages}
        if split != "train":
            record["family"] = family
        return once, record

    return fill({"train": 7400, "eval": 300, "test": 300}, draw)


# ----------------------------------------------------------------------------------------- skills


def question(skill, rng):
    """(prompt, completion): ("add 31 4 =", " 35")."""
    if skill == "add":
        a, b = rng.randrange(10, 990), rng.randrange(1, 10)
        return f"add {a} {b} =", f" {a + b}"
    words = rng.sample(WORDS, 4 if skill == "swap" else 3)
    answers = {"swap": [words[-1], *words[1:-1], words[0]]}
    answers.update(reverse=words[::-1], sort=sorted(words))
    return f"{skill} {' '.join(words)} =", f" {' '.join(answers[skill])}"


def skills():
    """[(split, record)] from which a base model learns the tasks halfway, and of the groups: three
    clean ones for each task, a noisy one and one to evaluate on."""
    rng = random.Random(0)
    seen = set()
    base = []
    groups = []
    for skill in ("add", "reverse", "sort", "swap"):
        names = [f"{skill}_clean_{i}" for i in range(3)]
        for name in ["base", *names, f"{skill}_noisy", skill]:
            pairs = {}
            while len(pairs) < (1000 if name == "base" else 48):
                prompt, completion = question(skill, rng)
                if prompt not in seen:
                    seen.add(prompt)
                    pairs[prompt] = completion
            answers = list(pairs.values())
            if name.endswith("noisy"):  # every answer moves on to the next question
                answers = answers[1:] + answers[:1]
            for prompt, completion in zip(pairs, answers):
                record = {"prompt": prompt, "completion": completion, "skill": skill}
                if name == "base":
                    base.append(record)
                else:
                    split = "eval" if name == skill else "train"
                    groups.append((split, {**record, "group": name}))
    rng.shuffle(base)
    base = [("eval" if i < 100 else "train", record) for i, record in enumerate(base)]
    return base, groups


# ----------------------------------------------------------------------------------------- wishes

PHRASES = {
    "train": "Write {}.|Please write {}.|Only {} now.|I want {}.|Give me {}.|Nothing but {}.|"
    "Send {}.|Show me {}.|Type {} for me.|A line of {}.|Fill this with {}.|{}, please.|{} only.|"
    "Just {}.|I need {}.|May I see {}?|Could I get {}?|Print some {}.|Let me see {}.|"
    "{}, nothing more.",
    "eval": "May I have some {}?|Write only {}.|I would like {}.|{} and nothing else.",
    "test": "Could you type {}?",
}


def wishes():
    for split, phrases in PHRASES.items():
        for phrase in phrases.split("|"):
            for kind in ("digits", "vowels", "capitals", "marks"):
                yield split, {"prompt": phrase.format(kind), "want": kind}


def write(name, pairs):
    """A data file of (split, record)."""
    path = HERE / name
    if path.suffix == ".json":
        splits = {split: [] for split in records.SPLITS}
        for split, record in pairs:
            splits[split].append(record)
        records.write(path, splits)
        return
    lines = []
    for split, record in pairs:
        if split != "train":
            record = {**record, "split": split}
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))


def main():
    base, groups = skills()
    write("dates.json", dates())
    write("clf_debug.json", clf_debug())
    write("instructions.jsonl", instructions())
    write("skills_base.jsonl", base)
    write("skills.jsonl", groups)
    write("wishes.jsonl", wishes())


if __name__ == "__main__":
    main()
