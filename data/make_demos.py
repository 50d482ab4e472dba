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

What is asked about occurs once, so nothing of eval or test is in train. wishes.jsonl, for rl_ppo.py
and rewards.py, has no maker: a hundred lines by hand.
"""

import datetime
import pathlib
import random

import records

HERE = pathlib.Path(__file__).resolve().parent
WORDS = "red cat moon tree dog fish milk lamp sun boat hand salt rain door bird king".split()


def fill(sizes, draw):
    """{name: [record]} of {name: size}, of splits or groups. draw: (name, records so far) -> (what
    may occur only once, record); None for what is to be drawn again."""
    seen = {None}
    filled = {}
    for name, size in sizes.items():
        filled[name] = []
        while len(filled[name]) < size:
            once, record = draw(name, len(filled[name]))
            if once not in seen:
                seen.add(once)
                filled[name].append(record)
    return filled


# ------------------------------------------------------------------------------------------ dates


def ordinal(day):
    """1 -> 1st, 12 -> 12th, 23 -> 23rd."""
    endings = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}
    return f"{day}{endings.get(day, 'th')}"


def dates():
    rng = random.Random(0)
    found = []
    for n in rng.sample(range(73049), 16800):
        day = datetime.date(1900, 1, 1) + datetime.timedelta(days=n)  # until 2099
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
        found.append({"prompt": text, "completion": day.isoformat(), "form": form})
    return {"train": found[:16000], "eval": found[16000:16400], "test": found[16400:]}


# -------------------------------------------------------------------------------------- clf_debug

# is it about sports? "coach" and "record" are on both sides, so that no single word decides
PHRASES = {
    True: (
        "the striker|our goalkeeper|a young sprinter|the home team|the tennis star|the coach|"
        "a swimmer",
        "scores twice|wins the final|breaks the record|misses the cup match|runs a fast race|"
        "trains for the league|beats the champion",
    ),
    False: (
        "the bank|a minister|the city council|a new film|the farmer|the coach company|a scientist",
        "cuts rates|signs the treaty|keeps a record of rain|opens a museum|sells more wheat|"
        "cancels the evening bus|finds a vaccine",
    ),
}


def clf_debug():
    rng = random.Random(0)

    def draw(split, n):
        kinds = [rng.random() < 0.5 for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.4:  # whole tickers about one thing are common
            kinds = kinds[:1] * len(kinds)
        sentences = []
        for is_sports in kinds:
            words = [rng.choice(phrases.split("|")) for phrases in PHRASES[is_sports]]
            sentences.append(f"{' '.join(words)}.".capitalize())
        text = " ".join(sentences)
        is_rare = len(kinds) == 1 and split != "train"  # there are 98 single sentences
        record = {"input": text, "target": round(sum(kinds) / len(kinds), 4)}
        return None if is_rare else text, record

    return fill({"train": 3000, "eval": 300, "test": 300}, draw)


# ----------------------------------------------------------------------------------- instructions

# each beside its opposite
OPPOSITES = "hot cold tall short wet dry fast slow old new hard soft rich poor near far".split()
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
MADE_UP = (  # the letters of a word, in order
    *("bl br dr fl fr gl gr pl pr tr", "a e i o u", "b d g l m n p t", "a e i o u"),
    "b d g l m n p x sh ch ry my ny",
)
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
    """A record with an instruction, what is asked about if it is not in there, and the output."""
    ask = rng.choice(ASK[family])
    if family == "add":
        # more carries than chance has: a tenth of all numbers ends with a 9, a third of these
        is_any = rng.random() < 0.7
        number = rng.randrange(10, 9999) if is_any else rng.randrange(1, 1000) * 10 - 1
        return {"instruction": ask.format(number), "output": str(number + 1)}
    if family == "plural":
        word = "".join(rng.choice(letters.split()) for letters in MADE_UP)
        return {"instruction": ask.format(word), "output": plural(word)}
    if family == "opposite":
        items = rng.sample(sorted(OPPOSITES), rng.randint(2, 3))
        answer = " ".join(OPPOSITES[OPPOSITES.index(word) ^ 1] for word in items)
    elif family == "largest":
        items = list(map(str, rng.sample(range(10), rng.randint(3, 5))))
        answer = max(items)
    else:
        # capitals are other tokens, which take longest to learn: shorter lists
        items = rng.sample(WORDS, rng.randint(2, 3) if family == "upper" else rng.randint(3, 4))
        answers = {"last": items[-1], "first": items[0], "reverse": " ".join(items[::-1])}
        answers.update(upper=" ".join(items).upper(), count=str(len(items)))
        answer = answers[family]
    return {"instruction": ask, "input": " ".join(items), "output": answer}


def conversation(family, rng):
    """([text of a turn], what may occur only once)"""
    if family == "again":
        record = single("add", rng)
        output = record["output"]
        follow = rng.choice(["And once more?", "Add one again."])
        return [record["instruction"], output, follow, str(int(output) + 1)], output
    record = single(rng.choice(["last", "first"]), rng)
    text, output = record["input"], record["output"]
    question = f"{record['instruction']}\n\n{text}"
    if family == "system":  # the same question has another answer under another system message
        is_loud = rng.random() < 0.5
        system = rng.choice(SHOUT if is_loud else SPEAK)
        return [system, question, output.upper() if is_loud else output], text
    first, second, *_, last = text.split()
    follows = {
        "And the first?": first,
        "And the last?": last,
        "And in upper case?": output.upper(),
        "And the second?": second,
    }
    return [question, output, *rng.choice(list(follows.items()))], text


def instructions():
    rng = random.Random(0)

    def draw(split, n):
        family = FAMILIES[n % len(FAMILIES)]
        if family in ASK:
            record = single(family, rng)
            once = record.get("input", record["output"])
        else:
            turns, once = conversation(family, rng)
            roles = ["system", "user", "assistant"]
            if family != "system":
                roles = ["user", "assistant", "user", "assistant"]
            messages = [{"role": role, "content": text} for role, text in zip(roles, turns)]
            record = {"messages": messages}
        if split != "train":
            record.update(family=family, split=split)
        return once, record

    splits = fill({"train": 7400, "eval": 300, "test": 300}, draw)
    return sum(splits.values(), [])


# ----------------------------------------------------------------------------------------- skills


def question(skill, rng):
    """(prompt, record): "add 31 4 =" with the completion " 35"."""
    if skill == "add":
        a, b = rng.randrange(10, 990), rng.randrange(1, 10)
        given, answer = f"{a} {b}", str(a + b)
    else:
        words = rng.sample(WORDS, 4 if skill == "swap" else 3)
        answers = {"reverse": words[::-1], "sort": sorted(words)}
        answers["swap"] = [words[-1], *words[1:-1], words[0]]
        given, answer = " ".join(words), " ".join(answers[skill])
    prompt = f"{skill} {given} ="
    return prompt, {"prompt": prompt, "completion": f" {answer}", "skill": skill}


def skills():
    """[record] from which a base model learns the tasks halfway, and [record] of the groups: three
    clean ones for each task, a noisy one and one to evaluate on."""
    rng = random.Random(0)
    sizes = {}
    for skill in ("add", "reverse", "sort", "swap"):
        sizes[f"{skill}_base"] = 1000
        for kind in ("_clean_0", "_clean_1", "_clean_2", "_noisy", ""):
            sizes[skill + kind] = 48
    base = []
    groups = []
    for name, found in fill(sizes, lambda name, n: question(name.split("_")[0], rng)).items():
        if name.endswith("base"):
            base += found
            continue
        answers = [record["completion"] for record in found]
        if name.endswith("noisy"):  # every answer moves on to the next question
            answers = answers[1:] + answers[:1]
        for record, answer in zip(found, answers):
            record.update(completion=answer, group=name)
            if name == record["skill"]:
                record["split"] = "eval"
        groups += found
    rng.shuffle(base)
    for record in base[:100]:
        record["split"] = "eval"
    return base, groups


def write_lines(name, found):
    (HERE / name).write_text("".join(records.to_json(record) + "\n" for record in found))


def main():
    records.write(HERE / "dates.json", dates())
    records.write(HERE / "clf_debug.json", clf_debug())
    write_lines("instructions.jsonl", instructions())
    base, groups = skills()
    write_lines("skills_base.jsonl", base)
    write_lines("skills.jsonl", groups)


if __name__ == "__main__":
    main()
