"""Make models/tiny-t5: a T5 configuration (v1.1 layers, tied head) and a sentencepiece tokenizer, no weights.

The pieces are learnt from the demo's prompts and from sentences that the templates below make, so the folder holds
no text of anybody else's. As in the real T5: pad 0, </s> 1, <unk> 2, then pieces, then 100 sentinels of which
<extra_id_0> has the HIGHEST id; digits are single pieces; "yes" and "no", which clf.py scores, are one piece each.

    python data/make_tiny_t5.py          # rewrites models/tiny-t5 (needs data/dates.json)
Expected: 220 pieces + 100 sentinels, 320 rows of embeddings, 0.5 M parameters.
"""

import io
import itertools
import json
import pathlib

import sentencepiece

ROOT = pathlib.Path(__file__).resolve().parent.parent
N_PIECES, N_SENTINELS = 220, 100

SUBJECTS = "the cat|a dog|my friend|the teacher|this machine|our team|the old man|a small model|the number|nobody".split("|")
VERBS = "sees|likes|finds|reads|does not know|wants|is|has|will not take|writes about".split("|")
OBJECTS = "a red book|the answer|good news|the same word|three of them|water and bread|a long sentence|no reason|what you said|it".split("|")


def corpus():
    for record in json.loads((ROOT / "data" / "dates.json").read_text())["train"][:4000]:
        yield record["prompt"]
    for i, (s, v, o) in enumerate(itertools.product(SUBJECTS, VERBS, OBJECTS)):
        yield f"{s} {v} {o}."
        yield f"Is it true that {s} {v} {o}? {'yes' if i % 2 else 'no'}"
        yield f"add one to {i}: {i + 1}"
    yield from ("abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0 1 2 3 4 5 6 7 8 9 . , : ; ? ! - + = / ( ) \" '",) * 20


if __name__ == "__main__":
    folder = ROOT / "models" / "tiny-t5"
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(), model_writer=model, vocab_size=N_PIECES, model_type="unigram", split_digits=True,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, user_defined_symbols=["▁yes", "▁no"], character_coverage=1.0, num_threads=1, minloglevel=2)
    (folder / "spiece.model").write_bytes(model.getvalue())
    config = {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "vocab_size": N_PIECES + N_SENTINELS,
        "d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
        "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "initializer_factor": 1.0,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = {"tokenizer_class": "T5Tokenizer", "extra_ids": N_SENTINELS, "model_max_length": 1024,
                 "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    print(f"{folder}: {N_PIECES} pieces + {N_SENTINELS} sentinels")
