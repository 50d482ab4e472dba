"""Make data/instructions.jsonl: small tasks on words and numbers in instruction form, the demo of sft_causal.py.

    {"instruction": "What is the last word?", "input": "red cat moon", "output": "moon"}
    {"messages": [{"role": "system", "content": "Answer in upper case."},
                  {"role": "user", "content": "Which word comes first?\n\nred cat moon"},
                  {"role": "assistant", "content": "RED"}], "family": "system", "split": "eval"}

Nine families of single instructions in the Alpaca form, with and without an input, and three of conversations: a system
message that changes the answer, and follow-up questions that make sense only with the turns before. What is asked about
(the list of words, the number, the made-up word) is drawn once and never again, so nothing of the evaluation or test split
occurs in training, and nothing can be answered by memory. The answers are known by construction. A record without `split`
is for training; the others also name their family.

    python data/make_instructions.py     # rewrites data/instructions.jsonl, byte for byte the same every time
Expected: 7400 train, 300 eval, 300 test records; 1.0 MB.
"""

import json
import pathlib
import random

SIZES = {"train": 7400, "eval": 300, "test": 300}
WORDS = "red cat moon tree dog fish milk lamp sun boat hand salt rain door bird king".split()
OPPOSITES = "hot cold|tall short|wet dry|fast slow|old new|hard soft|rich poor|near far".split("|")
OPPOSITE = {a: b for pair in OPPOSITES for a, b in (pair.split(), pair.split()[::-1])}
ASK = {  # ways to ask, per family
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


def made_up_word(rng):
    """Two syllables: 'blodam', 'grinesh', 'trupary'; 26,000 of them."""
    start, second, end = "bl br dr fl fr gl gr pl pr tr", "b d g l m n p t", "b d g l m n p x sh ch ry my ny"
    return "".join(rng.choice(letters.split()) for letters in (start, "a e i o u", second, "a e i o u", end))


def plural(word):
    """English spelling: trupary -> truparies, grinesh -> grineshes, blodam -> blodams."""
    return word[:-1] + "ies" if word.endswith("y") else word + ("es" if word.endswith(("x", "sh", "ch")) else "s")


def single(family, rng):
    """(instruction, input, output, what may occur only once) of one record. ("Add one to 41.", "", "42", 41)."""
    ask = rng.choice(ASK[family])
    if family == "add":
        # more carries than chance has: a tenth of all numbers ends with a 9, a third of these
        number = rng.randrange(10, 9999) if rng.random() < 0.7 else rng.randrange(1, 1000) * 10 - 1
        return ask.format(number), "", str(number + 1), number
    if family == "plural":
        word = made_up_word(rng)
        return ask.format(word), "", plural(word), word
    if family == "opposite":
        words = rng.sample(sorted(OPPOSITE), rng.randint(2, 3))
        return ask, " ".join(words), " ".join(OPPOSITE[word] for word in words), tuple(words)
    if family == "largest":
        numbers = rng.sample(range(10), rng.randint(3, 5))
        return ask, " ".join(map(str, numbers)), str(max(numbers)), tuple(numbers)
    # capitals are other pieces for the tokenizer, so they take longest to learn: shorter lists
    words = rng.sample(WORDS, rng.randint(2, 3) if family == "upper" else rng.randint(3, 4))
    text = " ".join(words)
    answer = {"last": words[-1], "first": words[0], "reverse": " ".join(words[::-1]), "upper": text.upper(), "count": str(len(words))}
    return ask, text, answer[family], text


def conversation(family, rng):
    """(messages, what may occur only once) of one record."""
    if family == "system":  # the same question has another answer under another system message
        instruction, text, output, once = single(rng.choice(["last", "first"]), rng)
        shout = rng.random() < 0.5
        turns = [rng.choice(["Answer in upper case.", "You shout: use capital letters."] if shout else
                            ["Answer in lower case.", "You are a helpful assistant."]),
                 f"{instruction}\n\n{text}", output.upper() if shout else output]
        return [{"role": role, "content": turn} for role, turn in zip(("system", "user", "assistant"), turns)], once
    if family == "again":
        instruction, _, output, once = single("add", rng)
        turns = [instruction, output, rng.choice(["And once more?", "Add one again."]), str(int(output) + 1)]
    else:  # "follow": questions about the list of the first turn
        instruction, text, output, once = single(rng.choice(["last", "first"]), rng)
        words = text.split()
        follow = {"And the first?": words[0], "And the last?": words[-1], "And in upper case?": output.upper(), "And the second?": words[1]}
        question = rng.choice(list(follow))
        turns = [f"{instruction}\n\n{text}", output, question, follow[question]]
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)], once


def make():
    rng, seen = random.Random(0), set()
    families = [*ASK, "opposite", "plural", "system", "follow", "follow", "again"]  # twice what takes longest to learn
    for split, size in SIZES.items():
        n = 0
        while n < size:
            family = families[n % len(families)]
            if family in ASK:
                instruction, text, output, once = single(family, rng)
                record = {"instruction": instruction, **({"input": text} if text else {}), "output": output}
            else:
                messages, once = conversation(family, rng)
                record = {"messages": messages}
            if once not in seen:
                seen.add(once)
                n += 1
                yield record if split == "train" else {**record, "family": family, "split": split}


if __name__ == "__main__":
    path = pathlib.Path(__file__).with_name("instructions.jsonl")
    records = list(make())
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{path}: " + ", ".join(f"{sum(r.get('split', 'train') == split for r in records)} {split}" for split in SIZES))
    print(*records[:3], sep="\n")
