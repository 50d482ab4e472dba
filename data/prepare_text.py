"""Tokenise plain text for seq2seq.py's span corruption, into a folder that training memory-maps.

    python data/prepare_text.py --input mytext/ --tokenizer models/my-t5 --eval_fraction 0.001 \\
        --out data/mycorpus
    python seq2seq.py @presets/t5-pretrain --model_init_name my-t5 --data mycorpus

Input: .txt (documents between blank lines if the first megabyte has any, else a document a line),
.jsonl with "text" and, if you like, "split", both also as .gz, or folders of them. Held out for
evaluation: x.eval.txt, files in a folder named eval, records of "split": "eval", and by
--eval_fraction a share of the other documents, by a hash of each. In the same way "test".

Output: train.ids, eval.ids and test.ids, the token ids of all documents one after the other, and
corpus.json, which says how many. As in T5, no end token stands between documents. Documents of
over a megabyte are cut at a blank. All cores take part (RAYON_NUM_THREADS: fewer), and memory does
not grow with the corpus.
"""

import argparse
import hashlib
import pathlib
import re
import zlib

import records  # first: it makes common.py importable

# isort: split
import numpy as np
from tqdm import tqdm

import common
import seq2seq
from common import SPLITS, log, open_text

ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
LONGEST = 2**20  # characters of a document
BLOCK = 2**21  # characters that the tokenizer spreads over the cores at a time


def find_texts(names, problems):
    """[(split, file)] of the files and folders that --input names."""
    texts = []
    for name in names:
        root = pathlib.Path(name)
        paths = [root, *sorted(root.rglob("*"))]
        files = [path for path in paths if path.is_file() and path.name.endswith(ENDINGS)]
        if not files:
            problems.append(f"--input {name}: no file there that ends in {', '.join(ENDINGS)}")
        for path in files:
            words = [path.parent.name, *path.name.split(".")]  # eval/x.txt, x.eval.txt
            split = next((split for split in SPLITS if split in words), "train")
            texts.append((split, path))
    return texts


def pieces(text, longest):
    """A text in pieces of at most so many characters, cut at blanks where there are any."""
    while len(text) > longest:
        blank = text.rfind(" ", 1, longest + 1)
        end = blank if blank > 0 else longest
        yield text[:end]
        text = text[end:]
    yield text


def read_plain(path, problems):
    """Yield (where, split, record) of the documents of a .txt file, as common.read_records does."""
    lines = []
    try:
        with open_text(path) as file:
            has_blank_lines = re.search(r"\n[ \t]*\n", file.read(LONGEST).strip())
            file.seek(0)
            for number, line in enumerate(file, start=1):
                lines.append(line)
                if not has_blank_lines or not line.strip():
                    yield f"{path}, up to line {number}", "train", {"text": "".join(lines)}
                    lines = []
    except (OSError, EOFError, zlib.error) as error:
        problems.append(f"{path} cannot be read: {error}")
    yield f"{path}, at its end", "train", {"text": "".join(lines)}


def read_documents(split_of_file, path, problems):
    """Yield (split, document) of a file; a record may say another split than train."""
    read = common.read_records if ".jsonl" in path.suffixes else read_plain
    for where, split, record in read(path, problems):
        text = record.get("text")
        if text is not None and not str(text).strip():
            continue
        problem = common.text_problem(text, "text", record)
        if problem:
            problems.append((where, problem))
            continue
        if split_of_file != "train":
            split = split_of_file
        for piece in pieces(text, LONGEST):
            yield split, piece


def blocks(args, files, problems):
    """Yield lists of (split, document), for the tokenizer to spread over the cores."""
    block, n_characters = [], 0
    for split_of_file, path in files:
        for split, text in read_documents(split_of_file, path, problems):
            text = text.strip()
            place = common.derive_seed("document", text) / 2**63  # from 0 to 1
            if split == "train" and place < args.eval_fraction:
                split = "eval"
            block.append((split, text))
            n_characters += len(text)
            if n_characters > BLOCK:
                yield block
                block, n_characters = [], 0
    if block:
        yield block


def write_ids(args, files, folder, tokenizer, problems):
    """Write <split>.ids; returns what corpus.json says of them."""
    dtype = "uint16" if len(tokenizer) <= 2**16 else "int32"
    special_tokens = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
    ids_files = {split: open(folder / f"{split}.ids", "wb") for split in SPLITS}
    n_tokens = dict.fromkeys(SPLITS, 0)
    n_documents = dict.fromkeys(SPLITS, 0)
    n_special = n_unknown = 0
    digest = hashlib.sha256()
    n_blocks = sum(path.stat().st_size for _, path in files) // BLOCK + 1
    for block in tqdm(blocks(args, files, problems), total=n_blocks, unit=" blocks", delay=5):
        if problems:
            continue  # the rest is only checked
        texts = []
        for _, text in block:
            text, n_found = special_tokens.subn(" ", text)
            texts.append(text)
            n_special += n_found
        rows = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        for (split, _), ids in zip(block, rows):
            data = np.array(ids, dtype).tobytes()
            ids_files[split].write(data)
            digest.update(split.encode() + data)
            n_tokens[split] += len(ids)
            n_documents[split] += 1
            n_unknown += ids.count(tokenizer.unk_token_id)
    for file in ids_files.values():
        file.close()
    return {
        "format": 2,
        "dtype": dtype,
        "tokenizer": seq2seq.tokenizer_sha256(tokenizer),
        "tokenizer_name": args.tokenizer,
        "sha256": digest.hexdigest(),
        "tokens": n_tokens,
        "documents": n_documents,
        "special": n_special,
        "unknown": n_unknown,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--input", required=True, nargs="+", metavar="PATH", help="files and folders")
    add("--tokenizer", required=True, metavar="MODEL", help="folder or hub id of the model")
    add("--out", required=True, metavar="FOLDER", help="for instance data/mycorpus")
    add("--eval_fraction", type=records.share, default=0.0, help="share to hold out")
    args = parser.parse_args(argv)
    problems = []
    files = find_texts(args.input, problems)
    tokenizer = records.load_tokenizer(args.tokenizer, problems)
    with records.new_folder(args.out, problems) as folder:
        about = write_ids(args, files, folder, tokenizer, problems)
        common.write_json(folder / "corpus.json", about)
        if not problems and not any(about["tokens"].values()):
            problems.append(f"--input {' '.join(args.input)}: there is no text in these files")
    for split, n_tokens in about["tokens"].items():
        log(f"{args.out}: {about['documents'][split]} {split} documents, {n_tokens} tokens")
    log(f"left out {about['special']} special tokens in the text, such as </s>")
    if about["unknown"]:
        hint = "data/prepare_tokenizer.py makes a tokenizer for your text"
        log(f"WARNING {about['unknown']} tokens are <unk>, text that cannot be written; {hint}")


if __name__ == "__main__":
    main()
