"""Make data/skills_base.jsonl and data/skills.jsonl: four small tasks in groups, some of them with wrong answers; the demo of project_grads.py.

    {"prompt": "add 31 4 =", "completion": " 35", "skill": "add", "group": "add_clean_0"}
    {"prompt": "add 52 7 =", "completion": " 81", "skill": "add", "group": "add_noisy"}          an answer that belongs to another question
    {"prompt": "add 45 2 =", "completion": " 47", "skill": "add", "group": "add", "split": "eval"}

skills_base.jsonl has clean records of all tasks, from which a base model learns them halfway. skills.jsonl has 16 training groups of 48 records,
four a task, the last of them noisy: its answers are right in form, but shuffled among its own questions. Its evaluation part is clean, one group
a task. No question occurs twice in the two files.

    python data/make_skills.py     # rewrites both files, byte for byte the same every time
Expected: 4000 base records (3900 train, 100 eval); 768 train, 192 eval records.
"""

import json
import pathlib
import random

WORDS = "red cat moon tree dog fish milk lamp sun boat hand salt rain door bird king".split()
N_BASE, N_GROUP, N_EVAL, N_CLEAN = 1000, 48, 48, 3


def question(skill, rng):
    """(prompt, completion) of one task. add: ("add 31 4 =", " 35")."""
    if skill == "add":
        a, b = rng.randrange(10, 990), rng.randrange(1, 10)
        return f"add {a} {b} =", f" {a + b}"
    words = rng.sample(WORDS, 4 if skill == "swap" else 3)
    text = " ".join(words)
    answer = {"swap": " ".join([words[-1], *words[1:-1], words[0]]), "reverse": " ".join(words[::-1]), "sort": " ".join(sorted(words))}
    return f"{skill} {text} =", f" {answer[skill]}"


def make():
    """(records of skills_base.jsonl, records of skills.jsonl)."""
    rng, seen, base, groups = random.Random(0), set(), [], []

    def draw(skill, n):
        found = []
        while len(found) < n:
            prompt, completion = question(skill, rng)
            if prompt not in seen:
                seen.add(prompt)
                found.append((prompt, completion))
        return found
    for skill in ("add", "reverse", "sort", "swap"):
        base += [{"prompt": p, "completion": c, "skill": skill} for p, c in draw(skill, N_BASE)]
        for i in range(N_CLEAN + 1):
            pairs = draw(skill, N_GROUP)
            if i == N_CLEAN:  # every answer moves on to the next question
                answers = [c for _, c in pairs]
                pairs = [(p, c) for (p, _), c in zip(pairs, answers[1:] + answers[:1])]
            name = f"{skill}_clean_{i}" if i < N_CLEAN else f"{skill}_noisy"
            groups += [{"prompt": p, "completion": c, "skill": skill, "group": name} for p, c in pairs]
        groups += [{"prompt": p, "completion": c, "skill": skill, "group": skill, "split": "eval"} for p, c in draw(skill, N_EVAL)]
    rng.shuffle(base)
    base = [{**record, "split": "eval"} if i < 100 else record for i, record in enumerate(base)]
    return base, groups


if __name__ == "__main__":
    for name, records in zip(("skills_base.jsonl", "skills.jsonl"), make()):
        path = pathlib.Path(__file__).with_name(name)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        print(f"{path}: " + ", ".join(f"{sum(r.get('split', 'train') == split for r in records)} {split}" for split in ("train", "eval")))
        print(*records[:2], sep="\n")
