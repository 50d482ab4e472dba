"""Train a T5 tokenizer on your text, and put it with a T5 configuration into a model folder.

    python data/prepare_tokenizer.py --input mytext/ --out models/my-t5 --vocab_size 32000 \\
        --size small
    python data/prepare_text.py --input mytext/ --tokenizer models/my-t5 --eval_fraction 0.001 \\
        --out data/mycorpus
    python seq2seq.py @presets/t5-pretrain --model_init_name my-t5 --data mycorpus

As in T5: a unigram sentencepiece model; pad 0, </s> 1, <unk> 2, then the pieces, then 100
sentinels of which <extra_id_0> has the highest id; rows of embeddings up to the next multiple of
128 (32000 + 100 -> 32128). All of printable ASCII can be written, even where the text lacks it:
label words such as not_entailment need "_". Sizes are those of T5 v1.1, untied and without
dropout, as it was pretrained; set dropout_rate to 0.1 in config.json for fine-tuning.
"""

import argparse

import records  # first: it makes common.py importable

# isort: split
import sentencepiece

import common
from prepare_text import find_texts, pieces, read_documents

SIZES = {  # T5 v1.1: d_model, d_ff, d_kv, heads, layers of encoder and of decoder; tiny is ours
    "tiny": (128, 256, 32, 4, 2),
    "small": (512, 1024, 64, 6, 8),
    "base": (768, 2048, 64, 12, 12),
    "large": (1024, 2816, 64, 16, 24),
    "xl": (2048, 5120, 64, 32, 24),
    "xxl": (4096, 10240, 64, 64, 24),
}
N_SENTINELS = 100
LONGEST = 1000  # characters of a sentence; sentencepiece skips those of over 4192 bytes
MOST_SENTENCES = 1_000_000  # of more, a random sample: all of them have to fit into memory
PRINTABLE_ASCII = "".join(map(chr, range(33, 127)))


def sentences(files, problems):
    """The lines of the documents that are not held out, long ones in pieces."""
    for split, path in files:
        for split_of_document, text in read_documents(split, path, problems):
            if split_of_document == "train":
                for line in text.splitlines():
                    yield from pieces(line, LONGEST)


def train(files, vocab_size, path, problems):
    """Write the sentencepiece model."""
    sentencepiece.set_random_generator_seed(0)
    try:
        with open(path, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences(files, problems),
                model_writer=file,
                vocab_size=vocab_size,
                model_type="unigram",
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                required_chars=PRINTABLE_ASCII,
                character_coverage=0.9999,
                input_sentence_size=MOST_SENTENCES,
                minloglevel=2,
            )
    except Exception as error:  # of two kinds
        problems.append(f"--vocab_size {vocab_size}: sentencepiece: {str(error).splitlines()[-1]}")


def make_config(size, vocab_size):
    """As T5 v1.1's is published; transformers' T5Config would write tie_word_embeddings true."""
    d_model, d_ff, d_kv, n_heads, n_layers = SIZES[size]
    n_tokens = vocab_size + N_SENTINELS
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": (n_tokens + 127) // 128 * 128,
        "d_model": d_model,
        "d_ff": d_ff,
        "d_kv": d_kv,
        "num_heads": n_heads,
        "num_layers": n_layers,
        "num_decoder_layers": n_layers,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--input", required=True, nargs="+", metavar="PATH", help="as of prepare_text.py")
    add("--out", required=True, metavar="FOLDER", help="for instance models/my-t5")
    add("--vocab_size", type=int, default=32000, help="pieces, without the sentinels")
    add("--size", choices=SIZES, default="small", help="of the T5 v1.1 configuration")
    args = parser.parse_args(argv)
    problems = []
    files = find_texts(args.input, problems)
    with records.new_folder(args.out, problems) as folder:
        train(files, args.vocab_size, folder / "spiece.model", problems)
        about = {
            "tokenizer_class": "T5Tokenizer",
            "extra_ids": N_SENTINELS,
            "model_max_length": 1024,
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        }
        common.write_json(folder / "tokenizer_config.json", about)
        config = make_config(args.size, args.vocab_size)
        common.write_json(folder / "config.json", config)
    rows = f"{config['vocab_size']} rows of embeddings"
    common.log(f"{args.out}: {args.vocab_size} pieces, {N_SENTINELS} sentinels, {rows}")


if __name__ == "__main__":
    main()
