"""Reward functions for rl_ppo.py: (prompts, replies, records) -> a float for each reply, higher is
better.

    python rl_ppo.py --policy my-sft --data wishes --reward_fn data/rewards.py:wish

prompts and replies are texts, records the lines of the data file: a function finds there what it
checks against. One of your own needs nothing from this file.
"""

import re

KINDS = {
    "digits": "0123456789",
    "vowels": "aeiou",
    "capitals": "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "marks": ".,;:!?-()/'\"",
}


def wish(prompts, replies, records):
    """Share of a reply's characters, blanks not counted, of the kind that record["want"] names. A
    reply of fewer than 5 gets less in proportion: "a1 2" for digits -> 2 / 5, "1 2 3 4 5" -> 1."""
    rewards = []
    for reply, record in zip(replies, records):
        characters = "".join(reply.split())
        n_right = sum(map(KINDS[record["want"]].count, characters))
        rewards.append(n_right / max(5, len(characters)))
    return rewards


def find_number(text):
    """The last number of a text without its thousands commas, or None."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


def last_number(prompts, replies, records):
    """1.0 where the last number of the reply is that of record["answer"], else 0.0."""
    rewards = []
    for reply, record in zip(replies, records):
        number = find_number(reply)
        rewards.append(float(number is not None and number == find_number(record["answer"])))
    return rewards
