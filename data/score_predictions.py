"""Score predictions as Super-NaturalInstructions does: exact match, ROUGE-1 and ROUGE-L, each the best over the references, x 100.

    python data/score_predictions.py --predictions models/myrun/test_temperature=0.00_n=1_step=900.json --per_category
    python data/score_predictions.py --predictions predicted_examples.jsonl --per_task --per_category
    python data/score_predictions.py --predictions outputs.csv --prediction_column y_pred --reference_columns y_true --bootstrap 1000
    python data/score_predictions.py --baseline copy_demo --task_dir tasks --split_dir splits/default --per_category

Reads our predictions (the first generation of each row; references from its task instance, else its "demonstration"), Tk-Instruct's
JSON lines ("prediction" or "Prediction", "Instance" with its "output", "Task", "Categories") and tables, as told apart by name and keys.
Exact match: lower case, ASCII punctuation out, single blanks, articles stay. ROUGE: package rouge-score with Porter's stemmer;
--track xlingual: tokens of GPT-2's tokenizer in place of English words, as the published cross-lingual figures have it.

--baseline: what no model reaches by itself, the first example's output or the input as the answer, over the test tasks of a folder
(published for the whole collection, default track: ROUGE-L 28.54 and 14.20).

Expected for the two files of 1000 outputs that Gist tokens were published with (columns as above): rougeL 57.9853 (Llama) and 50.5539
(Flan-T5); the published figures, 58.0104 and 50.5839, are medians of a bootstrap: --bootstrap 1000 gives 58.05 and 50.56.
"""

import argparse
import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

import common_v1 as common
import records

METRICS = ("exact_match", "rouge1", "rougeL")
# what Wang et al. 2022 report each category of the default track by
CATEGORIES = dict.fromkeys(("textual_entailment", "cause_effect_classification", "coreference_resolution", "dialogue_act_recognition",
                            "answerability_classification", "word_analogy"), "exact_match") | dict.fromkeys(
                           ("overlap_extraction", "keyword_tagging", "question_rewriting", "title_generation", "data_to_text",
                            "grammar_error_correction"), "rougeL")
RENAMED = {"task121_atomic_question_rewriting": "task121_zest_question_rewriting"}  # in the published predictions


class Gpt2Words:
    """Tokens of GPT-2's byte-level tokenizer, without the sign of a blank before them: a sentence's first word has none."""

    def __init__(self, name):
        from transformers import AutoTokenizer
        self.tokenizer = AutoTokenizer.from_pretrained(name)

    def tokenize(self, text):
        return [token.lstrip("Ġ") for token in self.tokenizer.tokenize(text)]


def read_predictions(args, problems):
    """[(prediction, [references], task or None, category or None)] of the file."""
    path, rows, n_before = pathlib.Path(args.predictions), [], len(problems)
    is_table = any(path.name.endswith(end) for end in (".csv", ".tsv", ".csv.gz", ".tsv.gz"))
    for name in ("prediction_column", "reference_columns"):
        if bool(getattr(args, name)) != is_table:
            problems.append(f"--{name}: " + (f"is needed for {path}, which is a table" if is_table else f"has no effect on {path}, which is no table"))
    for where, record in records.read(path, problems) if len(problems) == n_before else []:
        about = record if isinstance(record.get("Instance"), dict) else record.get("orig_d")
        about = about if isinstance(about, dict) else {}
        instance = about["Instance"] if isinstance(about.get("Instance"), dict) else {}
        if is_table:
            missing = [c for c in (args.prediction_column, *args.reference_columns) if c not in record]
            if missing:
                problems.append(f"{path}: no column {', '.join(map(repr, missing))}; it has {', '.join(record)}")
                break
            found, cells = record[args.prediction_column], [record[c] for c in args.reference_columns]
            references = [cell for cell in cells if cell.strip()] or cells[:1]  # rows may have fewer references than columns
        else:
            generations = record.get("generations")
            found = (generations[0].get("lm_postprocess") if isinstance(generations, list) and generations and isinstance(generations[0], dict)
                     else record.get("prediction", record.get("Prediction")))
            references = instance.get("output", record.get("demonstration"))
            references = [references] if isinstance(references, str) else references
        categories = about.get("Categories") or [None]
        texts = [text for text in (found, *(references if isinstance(references, list) else ())) if isinstance(text, str)]
        if not isinstance(found, str):
            problems.append(f"{where}: no text 'prediction', 'Prediction' or 'generations'")
        elif not isinstance(references, list) or not references or not all(isinstance(text, str) for text in references):
            problems.append(f"{where}: no references: expected a list 'output' in 'Instance', or 'demonstration'")
        elif not isinstance(categories, list) or not isinstance(categories[0], (str, type(None))) or not isinstance(about.get("Task"), (str, type(None))):
            problems.append(f"{where}: 'Task' is no text, or 'Categories' no list of texts")
        elif re.search("[\ud800-\udfff]", " ".join(texts)):
            problems.append(f"{where}: holds half a character (a lone \\ud800-\\udfff escape)")
        else:
            task, category = ((name or "").strip() or None for name in (about.get("Task"), categories[0]))
            rows.append((found, references, RENAMED.get(task, task), category))
    if args.per_task or args.per_category or args.out:
        problems += common.named_alike({task for _, _, task, _ in rows}, {common.category_name(category) for *_, category in rows if category})
    if not rows and not problems:
        problems.append(f"{path}: no predictions")
    return rows


def baseline(args, problems):
    """The same rows of a baseline over the test tasks."""
    args = argparse.Namespace(**common.TASK_FLAGS | dict(vars(args), data_format="ni", seed=0, max_num_instances_per_eval_task=None))
    rows, without = [], set()
    for _, _, task, instance in common.read_tasks(args, common.find_tasks(args, problems, ("test",)), problems):
        if args.baseline == "copy_demo" and not task["Positive Examples"]:
            without.add(task["Task"])
            continue
        found = instance["input"] if args.baseline == "copy_input" else task["Positive Examples"][0]["output"]
        rows.append((found, instance["output"], task["Task"], (task["Categories"] or [None])[0]))
    problems += [f"task {name} has no positive example to copy" for name in sorted(without)]
    if not rows and not problems:
        problems.append(f"--task_dir {args.task_dir}: no instances of test tasks")
    return rows


def bootstrap(scores, n, seed=0):
    """Median and 95 % interval of the mean, over n resamples of the rows: (rows, metrics) -> (3, metrics)."""
    rng = np.random.default_rng(seed)
    means = [scores[rng.integers(len(scores), size=len(scores))].mean(0) for _ in range(n)]
    return np.quantile(means, (0.5, 0.025, 0.975), axis=0)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--predictions", help=".json, .jsonl, .csv or .tsv, also as .gz [path]")
    what.add_argument("--baseline", choices=["copy_demo", "copy_input"], help="with --task_dir")
    parser.add_argument("--task_dir", help="of a baseline: a folder of <task>.json files")
    parser.add_argument("--split_dir", help="of a baseline: the folder with test_tasks.txt, default: ../splits/default beside --task_dir")
    parser.add_argument("--prediction_column", metavar="COLUMN", help="of a table")
    parser.add_argument("--reference_columns", nargs="+", metavar="COLUMN", help="of a table, one or several")
    parser.add_argument("--track", choices=["default", "xlingual"], default="default")
    parser.add_argument("--gpt2_tokenizer", help="for --track xlingual: hub id or folder, default gpt2")
    parser.add_argument("--per_task", "--compute_per_task_metrics", action="store_true", help="each task as well, by its category's metric first")
    parser.add_argument("--per_category", "--compute_per_category_metrics", action="store_true", help="each category as well")
    parser.add_argument("--bootstrap", type=int, default=0, help="median and 95 %% interval over this many resamples of the rows [count], 0 = off")
    parser.add_argument("--out", help="write all figures to this .json file; an existing one is never overwritten")
    args = parser.parse_args(argv)
    problems, scorer = [], None
    if args.out:
        records.check_out(args.out, problems)
    if args.bootstrap < 0:
        problems.append(f"--bootstrap {args.bootstrap}: expected 0 (off) or more")
    if args.predictions and (args.task_dir or args.split_dir):
        problems.append("--task_dir and --split_dir belong to --baseline")
    if args.baseline and (args.prediction_column or args.reference_columns):
        problems.append("--prediction_column and --reference_columns belong to --predictions")
    if args.gpt2_tokenizer and args.track != "xlingual":
        problems.append("--gpt2_tokenizer belongs to --track xlingual")
    rows = baseline(args, problems) if args.baseline else read_predictions(args, problems)
    for flag, place in (("per_task", 2), ("per_category", 3)):
        missing = sum(row[place] is None for row in rows)
        if getattr(args, flag) and missing:
            problems.append(f"--{flag}: {missing} of {len(rows)} rows name no {flag[4:]}")
    try:
        scorer = common.rouge_scorer(Gpt2Words(args.gpt2_tokenizer or "gpt2") if args.track == "xlingual" else None)
    except ImportError as error:
        problems.append(f"package 'rouge-score' is needed ({error}): pip install rouge-score")
    except (OSError, ValueError) as error:
        problems.append(f"--gpt2_tokenizer {args.gpt2_tokenizer or 'gpt2'}: {error}")
    if problems:
        return records.stop(problems)
    scores = np.array([common.instruction_scores(found, references, scorer)
                       for found, references, _, _ in tqdm(rows, desc="scoring", unit=" rows", delay=5)])
    metrics = common.instruction_metrics(scores, [task for _, _, task, _ in rows], [category for *_, category in rows])
    print(f"{len(rows)} predictions: " + "  ".join(f"{name} {metrics[name]}" for name in METRICS))
    if args.bootstrap:
        found = 100 * bootstrap(scores, args.bootstrap)
        for k, name in enumerate(METRICS):
            metrics[f"{name}_bootstrap"] = [round(float(value), 4) for value in found[:, k]]
            print("{}: median of {} resamples {:.2f}, 95 % from {:.2f} to {:.2f}".format(name, args.bootstrap, *found[:, k]))
    for flag, place in (("per_category", 3), ("per_task", 2)):
        groups = {}
        for row in rows:
            category = common.category_name(row[3] or "")
            groups.setdefault(category if place == 3 else row[2], []).append(category)
        for name, members in sorted(groups.items()) if getattr(args, flag) else ():
            first = CATEGORIES.get(members[0], "rougeL")
            names = [first, *(n for n in METRICS if n != first)]
            print(f"{name} ({len(members)}): " + "  ".join(f"{n} {metrics[f'{n}_for_{name}']}" for n in names))
    if args.out:
        with open(args.out, "x", encoding="utf-8") as file:
            json.dump(metrics, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
