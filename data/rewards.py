"""Reward functions for rl_ppo.py: (prompts, replies, records) -> one float per reply, higher is better.

    python rl_ppo.py --policy my-sft --data wishes --reward_fn data/rewards.py:wish

prompts and replies are texts; records are the lines of the data file, so a function finds there what it checks against.
A function of your own needs nothing from this file.
"""

import re

KINDS = {"digits": "0123456789", "vowels": "aeiou", "capitals": "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "marks": ".,;:!?-()/'\""}


def wish(prompts, replies, records):
    """Share of a reply's characters that are of the kind that record["want"] names, blanks not counted; replies of fewer than 5 get less in
    proportion. "a1 2" for digits -> 2 / 5, "1 2 3 4 5" -> 1."""
    rewards = []
    for reply, record in zip(replies, records):
        characters = "".join(reply.split())
        rewards.append(sum(c in KINDS[record["want"]] for c in characters) / max(5, len(characters)))
    return rewards


def exact_answer(prompts, replies, records):
    """1.0 where the reply is record["answer"], blanks at its ends not counted, else 0.0."""
    return [float(reply.strip() == record["answer"].strip()) for reply, record in zip(replies, records)]


def last_number(prompts, replies, records):
    """1.0 where the last number of the reply is that of record["answer"], thousands commas not counted, else 0.0."""
    def number(text):
        found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
        return float(found[-1]) if found else None
    return [float(number(reply) is not None and number(reply) == number(record["answer"])) for reply, record in zip(replies, records)]
