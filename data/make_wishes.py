"""Make data/wishes.jsonl: prompts that ask for one kind of character, the demo of rl_ppo.py; data/rewards.py checks the replies.

    {"prompt": "Nothing but vowels.", "want": "vowels"}
    {"prompt": "May I have some digits?", "want": "digits", "split": "eval"}

Four kinds in twenty-five phrasings, of which four are for evaluation only and one for the test.

    python data/make_wishes.py     # rewrites data/wishes.jsonl, byte for byte the same every time
Expected: 80 train, 16 eval, 4 test records; 6 KB.
"""

import json
import pathlib

KINDS = ["digits", "vowels", "capitals", "marks"]
PHRASES = ["Write {}.", "Please write {}.", "Only {} now.", "I want {}.", "Give me {}.", "Nothing but {}.", "Send {}.", "Show me {}.", "Type {} for me.",
           "A line of {}.", "Fill this with {}.", "{}, please.", "{} only.", "Just {}.", "I need {}.", "May I see {}?", "Could I get {}?",
           "Print some {}.", "Let me see {}.", "{}, nothing more."]
EVAL_PHRASES = ["May I have some {}?", "Write only {}.", "I would like {}.", "{} and nothing else."]
TEST_PHRASES = ["Could you type {}?"]


def records():
    for split, phrases in (("train", PHRASES), ("eval", EVAL_PHRASES), ("test", TEST_PHRASES)):
        for phrase in phrases:
            for kind in KINDS:
                yield {"prompt": phrase.format(kind), "want": kind, **({"split": split} if split != "train" else {})}


def main():
    path = pathlib.Path(__file__).resolve().parent / "wishes.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records()))
    print(f"{path.name}: {sum(1 for _ in records())} records")


if __name__ == "__main__":
    main()
