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
not grow with the corpus. A finished folder is left as it is.
"""

import argparse
import hashlib
import os
import pathlib
import re
import shutil
import sys
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

import common
import seq2seq
from common import SPLITS, log, open_text
from records import load_tokenizer

ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
LONGEST = 2**20  # characters of a document
BLOCK = 2**21  # characters that the tokenizer spreads over the cores at a time


def find_texts(names, problems):
    """[(split, file)] of the files and folders that --input names."""
    texts = []
    for name in names:
        root = pathlib.Path(name)
        paths = sorted(root.rglob("*")) if root.is_dir() else [root]
        files = [path for path in paths if path.is_file() and path.name.endswith(ENDINGS)]
        if not files:
            problems.append(f"--input {name}: no file there that ends in {', '.join(ENDINGS)}")
        for path in files:
            words = path.name.split(".")[1:]  # x.eval.txt
            if root.is_dir():
                words.append(path.parent.name)
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
    """The documents of a .txt file."""
    with open_text(path) as file:
        head = file.read(LONGEST)
    has_blank_lines = re.search(r"\n[ \t]*\n", head.strip()) is not None
    text, number = "", 1
    with open_text(path) as file:
        while line := file.readline(LONGEST):  # the beginning of one that is longer
            if re.search("[\ud800-\udfff]", line):
                problems.append((f"{path}, line {number}", "not UTF-8: save the file as UTF-8"))
            *complete, text = pieces(text + line, LONGEST)
            is_end = not line.strip() if has_blank_lines else line.endswith("\n")
            if is_end:
                complete.append(text)
                text = ""
            yield from complete
            number += line.endswith("\n")
    yield text


def read_documents(split, path, problems):
    """(split, document) of a file; a record may say another split. Problems go to problems."""
    if ".jsonl" not in path.suffixes:
        try:
            for text in read_plain(path, problems):
                yield split, text
        except (OSError, EOFError, zlib.error) as error:
            problems.append(f"{path} cannot be read: {error}")
        return
    for where, split_of_record, record in common.read_records(path, problems):
        text = record.get("text")
        if text == "":
            continue
        problem = common.text_problem(text, "text", record)
        if problem:
            problems.append((where, problem))
            continue
        if split != "train":  # the file's name says so
            split_of_record = split
        for piece in pieces(text, LONGEST):
            yield split_of_record, piece


def blocks(args, files, problems):
    """Lists of (split, document), for the tokenizer to spread over the cores."""
    n_bytes = sum(path.stat().st_size for _, path in files)
    if any(path.suffix == ".gz" for _, path in files):
        n_bytes = None  # of the text, which is not known
    block, n_characters = [], 0
    with tqdm(total=n_bytes, unit="B", unit_scale=True, delay=5) as bar:
        for split_of_file, path in files:
            for split, text in read_documents(split_of_file, path, problems):
                bar.update(len(text))
                text = text.strip()
                if not text:
                    continue
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
    for block in blocks(args, files, problems):
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
    add("--input", required=True, nargs="+", metavar="PATH", help="text files, folders of them")
    add("--tokenizer", required=True, metavar="MODEL", help="folder or hub id of the model")
    add("--out", required=True, metavar="FOLDER", help="for instance data/mycorpus")
    add("--eval_fraction", type=float, default=0.0, help="share of the documents to hold out")
    args = parser.parse_args(argv)
    out = pathlib.Path(args.out)
    if (out / "corpus.json").exists():
        log(f"{out} is there already; to prepare it anew, delete it")
        return 0
    problems = []
    if out.exists():
        problems.append(f"--out {out}: it exists and is no corpus")
    if not 0 <= args.eval_fraction < 1:
        problems.append(f"--eval_fraction {args.eval_fraction}: expected a share from 0 to 1")
    files = find_texts(args.input, problems)
    tokenizer = load_tokenizer(args.tokenizer, problems)
    if problems:
        common.fail(problems)

    aside = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of an attempt that was stopped
    aside.mkdir(parents=True)
    about = write_ids(args, files, aside, tokenizer, problems)
    if not problems and sum(about["tokens"].values()) == 0:
        problems.append(f"--input {' '.join(args.input)}: there is no text in these files")
    if problems:
        shutil.rmtree(aside)
        common.fail(problems)
    common.write_json(aside / "corpus.json", about)
    os.rename(aside, out)
    for split, n_tokens in about["tokens"].items():
        log(f"{split}: {about['documents'][split]} documents, {n_tokens} tokens")
    if about["special"]:
        log(f"WARNING left out {about['special']} special tokens in the text, such as </s>")
    if about["unknown"]:
        log(
            f"WARNING {about['unknown']} tokens are <unk>, pieces of text that this tokenizer "
            "does not know; data/prepare_tokenizer.py makes one for your text"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
