"""Score predictions as Super-NaturalInstructions does: exact match, ROUGE-1 and ROUGE-L, x 100.

    python data/score_predictions.py --per_category --per_task \\
        --predictions "models/myrun/test_temperature=0.00_n=1_step=900.json"
    python data/score_predictions.py --predictions outputs.csv --prediction_column y_pred \\
        --reference_columns y_true

Reads the predictions of our scripts, of which the first generation counts, JSON lines with
"prediction" and "references" (or, as Tk-Instruct writes them, "Prediction" and "Instance"), and
tables. Of several references the best counts. Exact match: after lower case, without ASCII
punctuation, single blanks; articles stay. ROUGE: F-measure of the package rouge-score, stemmed.

Two public files of 1000 outputs (jayelm/gisting) have ROUGE-L 57.9853 (Llama) and 50.5539
(Flan-T5); published, as medians of a bootstrap, are 58.0104 and 50.5839.
"""

import argparse
import collections
import string
import sys

import records  # first: it makes common.py importable

# isort: split
import numpy as np
from tqdm import tqdm

import common
from common import log

METRICS = ("exact_match", "rouge1", "rougeL")
REFERENCES = ("references", "reference", "output", "completion", "demonstration")

Row = collections.namedtuple("Row", "prediction references task category")


def fields_of(record):
    """{name in lower case: value} of a record and of what it was made from."""
    fields = {}
    for name in ("Instance", "orig_d"):
        if isinstance(record.get(name), dict):
            fields.update(fields_of(record[name]))
    fields.update((name.lower(), value) for name, value in record.items())
    return fields


def to_row(record, args):
    """The Row of a record; texts that are missing are None."""
    if args.prediction_column:
        cells = [record[name] for name in args.reference_columns]
        references = list(filter(None, cells)) or [""]  # a row may have fewer of them
        return Row(record[args.prediction_column], references, None, None)
    fields = fields_of(record)
    prediction = fields.get("prediction")
    if fields.get("generations"):
        prediction = fields["generations"][0].get("lm_postprocess")
    name = next(name for name in REFERENCES if fields.get(name) is not None)
    categories = records.as_list(fields.get("categories") or fields.get("category"))
    return Row(prediction, records.as_list(fields[name]) or [""], fields.get("task"), categories[0])


def read_rows(args, problems):
    rows = []
    for where, _, record in records.read(args.predictions, problems):
        try:
            row = to_row(record, args)
            "".join([row.prediction, *row.references])  # a TypeError unless all are texts
            rows.append(row)
        except (LookupError, TypeError, AttributeError, StopIteration):
            hint = "of a table: --prediction_column, --reference_columns"
            problems.append((where, f"no prediction and references in {list(record)}; {hint}"))
    if not rows and not problems:
        problems.append(f"{args.predictions}: no predictions")
    return rows


def normal(text):
    no_punctuation = str.maketrans("", "", string.punctuation)
    return " ".join(text.lower().translate(no_punctuation).split())


def score(row, scorer):
    """[exact match, ROUGE-1, ROUGE-L], each 0 to 100 and the best over the references."""
    scores = []
    for reference in row.references:
        rouge = scorer.score(target=reference, prediction=row.prediction)
        is_equal = normal(reference) == normal(row.prediction)
        scores.append([is_equal, rouge["rouge1"].fmeasure, rouge["rougeL"].fmeasure])
    return 100 * np.max(np.array(scores, float), axis=0)


def show(name, scores):
    """Log the means of scores, [(metrics,)]."""
    means = np.mean(scores, axis=0)
    shown = [f"{metric} {mean:.4f}" for metric, mean in zip(METRICS, means)]
    log(f"{name} ({len(scores)} predictions): {'  '.join(shown)}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--predictions", required=True, metavar="FILE", help=".json, .jsonl, .csv or .tsv, or .gz")
    add("--prediction_column", metavar="COLUMN", help="of a table")
    add("--reference_columns", nargs="+", default=[], metavar="COLUMN", help="of a table")
    add("--per_category", action="store_true", help="of each category")
    add("--per_task", action="store_true", help="of each task")
    args = parser.parse_args(argv)
    problems = []
    if bool(args.prediction_column) != bool(args.reference_columns):
        problems.append("a table needs both --prediction_column and --reference_columns")
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        problems.append("the package rouge-score is needed")
    rows = read_rows(args, problems)
    if problems:
        common.fail(problems)
    scorer = rouge_scorer.RougeScorer(METRICS[1:], use_stemmer=True)
    groups = collections.defaultdict(list)
    for row in tqdm(rows, unit=" rows", delay=5):
        scores = score(row, scorer)
        groups[0, "all"].append(scores)
        if args.per_category:
            groups[1, str(row.category)].append(scores)
        if args.per_task:
            groups[2, str(row.task)].append(scores)
    for place, name in sorted(groups):
        show(name, groups[place, name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
