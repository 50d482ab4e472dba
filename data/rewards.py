"""Reward functions for rl_ppo.py: (prompts, replies, records) -> one float per reply, higher is better.

    python rl_ppo.py --policy my-sft --data myprompts --reward_fn data/rewards.py:wish
"""

KINDS = {"digits": set("0123456789"), "vowels": set("aeiou"), "capitals": set("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), "marks": set(".,;:!?-()/'\"")}


def wish(prompts, replies, records):
    """Share of a reply's characters, blanks not counted, that are of the kind that the record wants. "a1 2" for digits -> 0.667."""
    shares = []
    for reply, record in zip(replies, records):
        characters = [c for c in reply if not c.isspace()]
        shares.append(sum(c in KINDS[record["want"]] for c in characters) / len(characters) if characters else 0.0)
    return shares
