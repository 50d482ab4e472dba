"""Make models/tiny-llama: a Llama configuration and a byte-level BPE tokenizer, no weights and no chat template.

The merges are learnt from the demo's training records and from sentences that the templates below make, so the folder
holds no text of anybody else's. <pad> 0, <s> 1, </s> 2, then the 256 bytes (any UTF-8 text can be written), then the
merges; digits are single pieces; "yes" and "no", with and without a blank before them, are one piece each, as clf.py needs.
The configuration has a few rows more than the tokenizer has pieces, for the tokens that a chat template brings along.

    python data/make_tiny_llama.py       # rewrites models/tiny-llama (needs data/instructions.jsonl)
Expected: 592 pieces, 600 rows of embeddings, 0.28 M parameters.
"""

import itertools
import json
import pathlib

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parent.parent
N_PIECES, N_ROWS = 592, 600
SPECIAL = ["<pad>", "<s>", "</s>"]

SUBJECTS = "the cat|a dog|my friend|the teacher|this machine|our team|the old man|a small model|the number|nobody".split("|")
VERBS = "sees|likes|finds|reads|does not know|wants|is|has|will not take|writes about".split("|")
OBJECTS = "a red book|the answer|good news|the same word|three of them|water and bread|a long sentence|no reason|what you said|it".split("|")


def corpus():
    for line in (ROOT / "data" / "instructions.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record.get("split", "train") == "train":
            turns = [message["content"] for message in record.get("messages", [])]
            if "plural" in record.get("instruction", ""):  # no merges for made-up words: they are read and written letter by letter
                turns = [record["instruction"].rsplit(" ", 1)[0]]
            yield from turns or [record["instruction"] + "\n\n" + record.get("input", ""), record["output"]]
    for i, parts in enumerate(itertools.islice(itertools.product(SUBJECTS, VERBS, OBJECTS), 0, None, 3)):
        answer = "yes" if i % 2 else "no"
        yield f"{' '.join(parts)}.\nIs it true? {answer}\n{answer}"


def make_tokenizer():
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=N_PIECES, special_tokens=SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return bpe


if __name__ == "__main__":
    folder = ROOT / "models" / "tiny-llama"
    folder.mkdir(parents=True, exist_ok=True)
    bpe = make_tokenizer()
    split = [word for word in ("yes", "no", " yes", " no") if len(bpe.encode(word, add_special_tokens=False).ids) != 1]
    assert not split, f"not one piece each: {split}"
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": N_ROWS, "hidden_size": 96,
        "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 6,
        "max_position_embeddings": 512, "initializer_range": 0.1, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "clean_up_tokenization_spaces": False,
                 "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    print(f"{folder}: {bpe.get_vocab_size()} pieces, {N_ROWS} rows")
