"""Make data/dates.json: dates as people write them -> ISO 8601, the demo of seq2seq.py.

    {"prompt": "Tuesday, the 4th of March 1997", "completion": "1997-03-04", "form": "weekday"}

Days are drawn without replacement from 1900-01-01 to 2099-12-31 (73,049 days), so no completion of the evaluation or
test split occurs in training, and nothing can be answered by memory. Six surface forms; month names may be shortened,
letters may be all small or all capital. The answer is known by construction.

    python data/make_dates.py            # rewrites data/dates.json, byte for byte the same every time
Expected: 16000 train, 400 eval, 400 test records; 1.5 MB.
"""

import datetime
import json
import pathlib
import random

SIZES = {"train": 16000, "eval": 400, "test": 400}
FIRST_DAY, N_DAYS = datetime.date(1900, 1, 1), 73049


def ordinal(n):
    """1 -> 1st, 12 -> 12th, 23 -> 23rd."""
    return f"{n}{'th' if 10 <= n % 100 <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


def write_date(day, rng):
    """One way of writing `day`, and the name of that form."""
    month = day.strftime("%B") if rng.random() < 0.6 else day.strftime("%b")
    form = rng.choice(["month first", "day first", "ordinal", "weekday", "dotted", "slashed"])
    text = {
        "month first": f"{month} {day.day}, {day.year}",
        "day first": f"{day.day} {month} {day.year}",
        "ordinal": f"the {ordinal(day.day)} of {month}, {day.year}",
        "weekday": f"{day.strftime('%A')}, the {ordinal(day.day)} of {month} {day.year}",
        "dotted": f"{day.day}.{day.month}.{day.year}",  # European: the day comes first
        "slashed": f"{day.year}/{day.month:02}/{day.day:02}",
    }[form]
    case = rng.random()
    return (text.lower() if case < 0.15 else text.upper() if case < 0.3 else text), form


def make():
    rng = random.Random(0)
    days = iter(rng.sample(range(N_DAYS), sum(SIZES.values())))
    splits = {}
    for split, size in SIZES.items():
        splits[split] = []
        for _ in range(size):
            day = FIRST_DAY + datetime.timedelta(days=next(days))
            text, form = write_date(day, rng)
            splits[split].append({"prompt": text, "completion": day.isoformat(), "form": form})
    return splits


if __name__ == "__main__":
    splits = make()
    lines = [f'"{name}": [\n' + ",\n".join(json.dumps(r) for r in records) + "\n]" for name, records in splits.items()]
    path = pathlib.Path(__file__).with_name("dates.json")
    path.write_text("{" + ",\n".join(lines) + "}\n")
    print(f"{path}: " + ", ".join(f"{len(records)} {name}" for name, records in splits.items()))
    print(*splits["train"][:3], sep="\n")
