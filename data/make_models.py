"""Make the tokenizers of models/tiny-t5 and models/tiny-llama, which demos and tests start from.

    python data/make_models.py       # rewrites both, the same bytes every time

The folders have no weights, and their configurations are written by hand. The pieces are learnt
from the demo data and from sentences that are made here. Digits are single pieces; "yes" and "no",
which clf.py scores, are one piece each. tiny-t5 is as the real T5: pad 0, </s> 1, <unk> 2, then
pieces, then 100 sentinels of which <extra_id_0> has the highest id. tiny-llama has <pad> 0, <s> 1,
</s> 2, then the 256 bytes, then merges; it has no chat template, but a few rows of embeddings more,
for the tokens that a template brings along.
"""

import io
import itertools
import pathlib

import records  # first: it makes common.py importable

# isort: split
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parent.parent
N_PIECES = 220  # of the T5, without the sentinels
N_TOKENS = 592  # of the Llama
SUBJECTS = (
    "the cat|a dog|my friend|the teacher|this machine|our team|the old man|a small model|"
    "the number|nobody"
)
VERBS = "sees|likes|finds|reads|does not know|wants|is|has|will not take|writes about"
OBJECTS = (
    "a red book|the answer|good news|the same word|three of them|water and bread|"
    "a long sentence|no reason|what you said|it"
)
CHARACTERS = (
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0 1 2 3 4 5 6 7 8 9 "
    ". , : ; ? ! - + = / ( ) \" '"
)


def sentences():
    """ "the cat sees a red book", "the cat sees the answer", ..."""
    parts = (SUBJECTS.split("|"), VERBS.split("|"), OBJECTS.split("|"))
    return map(" ".join, itertools.product(*parts))


def train_records(name):
    """The records of a demo file, those to train on."""
    found = records.read(ROOT / "data" / name, [])
    return [record for _, split, record in found if record.get("split", split) in (None, "train")]


def t5_corpus():
    for record in train_records("dates.json")[:4000]:
        yield record["prompt"]
    for i, sentence in enumerate(sentences()):
        yield f"{sentence}."
        yield f"Is it true that {sentence}? {'yes' if i % 2 else 'no'}"
        yield f"add one to {i}: {i + 1}"
    yield from [CHARACTERS] * 20


def llama_corpus():
    for record in train_records("instructions.jsonl"):
        turns = [message["content"] for message in record.get("messages", [])]
        instruction = record.get("instruction", "")
        if "plural" in instruction:  # made-up words are read letter by letter: no merges
            turns = [instruction.rsplit(" ", 1)[0]]
        yield from turns or [f"{instruction}\n\n{record.get('input', '')}", record["output"]]
    for i, sentence in enumerate(itertools.islice(sentences(), 0, None, 3)):
        answer = "yes" if i % 2 else "no"
        yield f"{sentence}.\nIs it true? {answer}\n{answer}"


def train_unigram():
    """The bytes of a sentencepiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=t5_corpus(),
        model_writer=model,
        vocab_size=N_PIECES,
        model_type="unigram",
        split_digits=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=["▁yes", "▁no"],
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def train_bpe():
    bpe = tokenizers.Tokenizer(models.BPE())
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, as_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_TOKENS,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(llama_corpus(), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return bpe


def main():
    (ROOT / "models" / "tiny-t5" / "spiece.model").write_bytes(train_unigram())
    train_bpe().save(str(ROOT / "models" / "tiny-llama" / "tokenizer.json"))


if __name__ == "__main__":
    main()
