"""Tokenise plain text for seq2seq.py's pretraining objectives, in parallel, into a folder that training maps instead of loading.

    python data/prepare_text.py --input mytext/ --tokenizer models/my-t5 --eval_fraction 0.001 --out data/mycorpus
    python seq2seq.py @presets/t5-pretrain --model_init_name my-t5 --data mycorpus

Input: .txt (a document per line, or blank lines between documents), .jsonl with "text", both also as .gz, or folders of them;
x.eval.txt or a folder named eval is held out, as is a share of the other documents by --eval_fraction. Output: <split>.ids,
the token ids of all documents end to end (uint16, or int32 for vocabularies over 65536), <split>.offsets, int64, where each
document begins, and corpus.json. Files are cut into parts of --part_mb; a finished part is kept in <out>.parts/, so that
the same command goes on after a kill. What comes out does not depend on the number of workers, parts or attempts. Done
already: says so and changes nothing.

tinyshakespeare.txt with models/tiny-t5, --eval_fraction 0.05. Expected: 6850 train documents of 788445 tokens, 372 and 41979 held out.
"""

import argparse
import concurrent.futures
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import sys
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one process per core instead
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

import common_v1 as common
import seq2seq

WORKER = {}  # what a worker process keeps from part to part


def text_files(names, problems):
    """[(split or None, file)] of the text files and folders that --input names."""
    files = []
    for name in names:
        n_before = len(problems)
        found = seq2seq.find_corpus(None, os.path.abspath(name), problems)[1] if os.path.exists(name) else []
        if not found and len(problems) == n_before:
            problems.append(f"{name}: no text files; expected {', '.join(seq2seq.TEXT_ENDINGS)}")
        files += found
    return files


def start_worker(tokenizer_path):
    common.start_log()  # no warnings of long texts
    WORKER["tokenizer"] = AutoTokenizer.from_pretrained(tokenizer_path)


def tokenize_part(job):
    """One part of one file into a folder of its own, written aside and renamed; -> (bytes of the file, problems)."""
    folder, path, split, start, end, documents, eval_fraction = job
    problems, aside = [], folder.with_suffix(".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    # positions in a .gz are those of its content, and it is one part
    found = seq2seq.read_documents(path, split, documents, problems, start, math.inf if path.suffix == ".gz" else end)
    counts = seq2seq.tokenize_documents(found, aside, WORKER["tokenizer"], eval_fraction)
    if not problems:
        common.write_json(aside / "counts.json", counts)
        common.fsync_tree(aside)
        os.rename(aside, folder)
    return end - start, problems


def join(parts, out, about):
    """The parts, one after the other, as one folder: written aside and renamed."""
    aside, digest = out.with_name(out.name + ".tmp"), hashlib.sha256()
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    counts = [json.loads((part / "counts.json").read_text()) for part in parts]
    for split in ("train", "eval", "test"):
        with open(aside / f"{split}.ids", "wb") as ids, open(aside / f"{split}.offsets", "wb") as offsets:
            offsets.write(np.int64(0).tobytes())
            end = 0
            for part, count in zip(parts, counts):
                with open(part / f"{split}.ids", "rb") as file:
                    while block := file.read(2**24):
                        digest.update(block)
                        ids.write(block)
                offsets.write((np.fromfile(part / f"{split}.offsets", np.int64)[1:] + end).tobytes())
                end += count[f"{split} tokens"]
        digest.update(split.encode())
    totals = {name: value if name == "dtype" else sum(count[name] for count in counts) for name, value in counts[0].items()}
    common.write_json(aside / "corpus.json", {**totals, "sha256": digest.hexdigest(), **about})
    common.fsync_tree(aside)
    os.rename(aside, out)
    return totals


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--input", required=True, nargs="+", metavar="PATH", help="text files, and folders of them")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="folder or hub id of the model that is to be trained")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for instance data/mytext; an existing one is never overwritten")
    parser.add_argument("--eval_fraction", type=float, default=0.0, help="share of the documents that is held out, by a hash of each [0-1]")
    parser.add_argument("--documents", choices=["auto", "line", "blank"], default="auto", help="what separates documents in .txt files")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--part_mb", type=float, default=16, help="text that a worker tokenises at a time [MB]")
    args = parser.parse_args(argv)
    out, problems = pathlib.Path(args.out), []
    common.start_log()
    files = text_files(args.input, problems)
    for name, is_right in (("eval_fraction", 0 <= args.eval_fraction < 1), ("workers", args.workers > 0), ("part_mb", args.part_mb > 0)):
        problems += [] if is_right else [f"--{name} {getattr(args, name)}: out of range"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    except (OSError, ValueError, ImportError) as error:
        problems.append(f"--tokenizer {args.tokenizer}: {str(error).splitlines()[0]}")
    if problems:
        common.fail(problems)
    size = max(1, int(args.part_mb * 2**20))
    plan = {"tokenizer": common.tokenizer_fingerprint(tokenizer), "tokenizer_name": args.tokenizer, "documents": args.documents,
            "eval_fraction": args.eval_fraction, "files": [[split, str(path), path.stat().st_size, path.stat().st_mtime_ns] for split, path in files]}
    work = out.with_name(out.name + ".parts")
    if out.exists() and not (out / "corpus.json").is_file():
        common.fail(f"{out} exists: choose another --out")
    for place, record in ((out, out / "corpus.json"), (work, work / "plan.json")):
        before = json.loads(record.read_text()) if record.is_file() else {}
        if record.is_file() and {key: before.get(key) for key in plan} != plan:
            common.fail(f"{place} exists and was made from other files or flags: choose another --out, or delete it")
    if out.exists():
        print(f"{out}: prepared already")
        return 0
    if not (work / "plan.json").is_file() or json.loads((work / "plan.json").read_text())["part bytes"] != size:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        common.write_json(work / "plan.json", {**plan, "part bytes": size})
    jobs = []
    for split, path in files:
        n_bytes = path.stat().st_size
        bounds = [0, n_bytes] if path.suffix == ".gz" or n_bytes <= size else [*range(0, n_bytes, size), n_bytes]
        jobs += [(work / f"{len(jobs) + i:06}", path, split, start, end, args.documents, args.eval_fraction)
                 for i, (start, end) in enumerate(zip(bounds, bounds[1:]))]
    todo, started = [job for job in jobs if not job[0].exists()], time.perf_counter()
    if len(todo) < len(jobs):
        print(f"{work}: {len(jobs) - len(todo)} of {len(jobs)} parts are there already")
    n_bytes = sum(job[4] - job[3] for job in todo)
    with tqdm(total=n_bytes, desc="tokenising", unit="B", unit_scale=True, delay=5) as bar:
        if args.workers == 1 or len(todo) < 2:
            start_worker(args.tokenizer)
            results = map(tokenize_part, todo)
        else:
            pool = concurrent.futures.ProcessPoolExecutor(min(args.workers, len(todo)), multiprocessing.get_context("spawn"), start_worker, (args.tokenizer,))
            results = (future.result() for future in concurrent.futures.as_completed([pool.submit(tokenize_part, job) for job in todo]))
        for done, wrong in results:
            bar.update(done)
            problems += wrong
    if problems:
        common.fail(problems)
    totals = join([job[0] for job in jobs], out, plan)
    shutil.rmtree(work)
    seconds = time.perf_counter() - started
    print(f"{out}: " + ", ".join(f"{totals[f'{s} documents']} {s} documents of {totals[f'{s} tokens']} tokens" for s in ("train", "eval", "test"))
          + f"; {totals['bytes'] / max(1, sum(totals[f'{s} tokens'] for s in ('train', 'eval', 'test'))):.2f} bytes per token, {n_bytes / seconds / 1e6:.2f} MB/s")
    if totals["special"]:
        print(f"WARNING {totals['special']} special tokens that are spelled out in the text (such as </s>) were left out", file=sys.stderr)
    if totals["unknown"]:
        print(f"WARNING {totals['unknown']} pieces of text are unknown to this tokenizer (data/prepare_tokenizer.py makes one)", file=sys.stderr)
    ids, ends = np.fromfile(out / "train.ids", totals["dtype"], 2000), np.fromfile(out / "train.offsets", np.int64, 3)
    for start, end in zip(ends, ends[1:]):
        print(repr(tokenizer.decode(ids[start:end])[:200]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
