"""Make data/clf_debug.json: how much of a news ticker is about sports, the demo of clf.py.

    {"input": "The striker scores twice. The bank cuts rates.", "target": 0.5}

One to four sentences, each about sports or about something else; the target is the share about sports, so it is soft
(0, 1/4, 1/3, 1/2, 2/3, 3/4, 1) and known by construction. Every sentence is a subject and what it does; "coach" and
"record" occur on both sides, so no single word decides. No text of one split occurs in another.

    python data/make_clf_debug.py        # rewrites data/clf_debug.json, byte for byte the same every time
Expected: 3000 train, 300 eval, 300 test records; 0.4 MB.
"""

import json
import pathlib
import random

SIZES = {"train": 3000, "eval": 300, "test": 300}
SPORTS = ("the striker|our goalkeeper|a young sprinter|the home team|the tennis star|the coach|a swimmer".split("|"),
          "scores twice|wins the final|breaks the record|misses the cup match|runs a fast race|trains for the league|beats the champion".split("|"))
OTHER = ("the bank|a minister|the city council|a new film|the farmer|the coach company|a scientist".split("|"),
         "cuts rates|signs the treaty|keeps a record of rain|opens a museum|sells more wheat|cancels the evening bus|finds a vaccine".split("|"))


def make():
    rng, seen, splits = random.Random(0), set(), {}
    for split, size in SIZES.items():
        splits[split] = []
        while len(splits[split]) < size:
            kinds = [rng.random() < 0.5 for _ in range(rng.randint(1, 4))]
            if rng.random() < 0.4:  # whole tickers about one thing are common
                kinds = kinds[:1] * len(kinds)
            parts = [SPORTS if is_sports else OTHER for is_sports in kinds]
            text = " ".join(f"{rng.choice(subjects)} {rng.choice(actions)}.".capitalize() for subjects, actions in parts)
            if text not in seen and len(kinds) > (split != "train"):  # there are 98 single sentences, all for training
                seen.add(text)
                splits[split].append({"input": text, "target": round(sum(kinds) / len(kinds), 4)})
    return splits


if __name__ == "__main__":
    splits = make()
    lines = [f'"{name}": [\n' + ",\n".join(json.dumps(r) for r in records) + "\n]" for name, records in splits.items()]
    path = pathlib.Path(__file__).with_name("clf_debug.json")
    path.write_text("{" + ",\n".join(lines) + "}\n")
    print(f"{path}: " + ", ".join(f"{len(records)} {name}" for name, records in splits.items()))
    print(*splits["train"][:3], sep="\n")
