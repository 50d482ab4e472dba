"""Train a T5 tokenizer on text of yours, and put it with a T5 configuration into a model folder without weights.

    python data/prepare_tokenizer.py --input mytext/ --out models/my-t5 --vocab_size 32000 --size small
    python seq2seq.py @presets/t5-pretrain --model_init_name my-t5 --data mytext/ --eval_fraction 0.001

As in T5: a unigram sentencepiece model; pad 0, </s> 1, <unk> 2, then pieces, then 100 sentinels of which <extra_id_0> has the
HIGHEST id; rows of embeddings up to the next multiple of 128 (32000 + 100 -> 32128). All of printable ASCII can be written,
even where the text lacks it, as label words such as not_entailment need "_". Sizes are those of T5 v1.1, untied, without
dropout, as it was pretrained; set dropout_rate to 0.1 in config.json for fine-tuning. Input as for prepare_text.py.
"""

import argparse
import os
import pathlib
import random
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import sentencepiece
from transformers import AutoTokenizer

import common_v1 as common
import seq2seq
from prepare_text import text_files

SIZES = {  # T5 v1.1: d_model, d_ff, d_kv, heads, layers of encoder and of decoder; tiny is ours
    "tiny": (128, 256, 32, 4, 2), "small": (512, 1024, 64, 6, 8), "base": (768, 2048, 64, 12, 12), "large": (1024, 2816, 64, 16, 24),
    "xl": (2048, 5120, 64, 32, 24), "xxl": (4096, 10240, 64, 64, 24),
}
N_SENTINELS, LONGEST = 100, 4000  # sentencepiece skips sentences over 4192 bytes


def sentences(files, documents, share, problems):
    """Lines of the documents, long ones cut at blanks; of each document with probability `share`."""
    rng = random.Random(0)
    for split, path in files:
        for _, text in seq2seq.read_documents(path, split, documents, problems):
            if rng.random() < share:
                for line in text.splitlines():
                    while line:
                        cut = len(line) if len(line) <= LONGEST // 4 else line.rfind(" ", 1, LONGEST // 4) + 1 or LONGEST // 4
                        yield line[:cut]
                        line = line[cut:]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--input", required=True, nargs="+", metavar="PATH", help="text files, and folders of them")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for instance models/my-t5; an existing one is never overwritten")
    parser.add_argument("--vocab_size", type=int, default=32000, help="pieces, without the sentinels")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the T5 v1.1 configuration beside the tokenizer")
    parser.add_argument("--documents", choices=["auto", "line", "blank"], default="auto", help="what separates documents in .txt files")
    parser.add_argument("--most_mb", type=float, default=500, help="text that is used; of more, a random share of the documents [MB]")
    args = parser.parse_args(argv)
    out, problems = pathlib.Path(args.out), []
    common.start_log()
    files = [file for file in text_files(args.input, problems) if file[0] in (None, "train")]
    if out.exists():
        problems.append(f"--out {out}: exists")
    if problems:
        common.fail(problems)
    n_bytes = sum(path.stat().st_size * (4 if path.suffix == ".gz" else 1) for _, path in files)
    aside = out.with_name(out.name + ".tmp")
    aside.mkdir(parents=True, exist_ok=True)
    sentencepiece.set_random_generator_seed(0)
    try:
        with open(aside / "spiece.model", "wb") as model:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences(files, args.documents, args.most_mb * 2**20 / max(1, n_bytes), problems), model_writer=model,
                vocab_size=args.vocab_size, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
                required_chars="".join(map(chr, range(33, 127))), character_coverage=0.9999)
    except RuntimeError as error:
        problems.append(f"--vocab_size {args.vocab_size}: sentencepiece: {str(error).splitlines()[-1]}")
    if problems:
        common.fail(problems)
    tokenizer = {"tokenizer_class": "T5Tokenizer", "extra_ids": N_SENTINELS, "model_max_length": 1024, "pad_token": "<pad>", "eos_token": "</s>",
                 "unk_token": "<unk>"}
    common.write_json(aside / "tokenizer_config.json", tokenizer)
    d_model, d_ff, d_kv, num_heads, n_layers = SIZES[args.size]
    n_rows = -(-(args.vocab_size + N_SENTINELS) // 128) * 128
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "vocab_size": n_rows, "d_model": d_model, "d_ff": d_ff,
              "d_kv": d_kv, "num_heads": num_heads, "num_layers": n_layers, "num_decoder_layers": n_layers, "feed_forward_proj": "gated-gelu",
              "dropout_rate": 0.0, "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    common.write_json(aside / "config.json", config)
    loaded = AutoTokenizer.from_pretrained(aside)
    order = [loaded.convert_tokens_to_ids(f"<extra_id_{k}>") for k in range(N_SENTINELS)]
    assert order == list(range(args.vocab_size + N_SENTINELS - 1, args.vocab_size - 1, -1)), order
    os.rename(aside, out)
    print(f"{out}: {args.vocab_size} pieces + {N_SENTINELS} sentinels, {n_rows} rows of embeddings, T5 v1.1 {args.size}")
    for text in list(seq2seq.read_documents(files[0][1], None, args.documents, []))[:2]:
        ids = loaded(text[1], add_special_tokens=False).input_ids
        print(f"{len(text[1].encode()) / max(1, len(ids)):.2f} bytes per token: {' '.join(loaded.convert_ids_to_tokens(ids[:20]))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
