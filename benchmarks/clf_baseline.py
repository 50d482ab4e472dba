"""What a linear model on word counts reaches on a data file of clf.py: the figure that a fine-tuned model has to beat.

    pip install scikit-learn
    python benchmarks/clf_baseline.py --data data/sst2.json --out sst2_baseline.json       # seconds on one core

TF-IDF of words and word pairs (sublinear) with logistic regression where every target is 0 or 1, else with ridge
regression. How strongly it is regularised is chosen by cross-validation on "train"; "eval" and "test" are only scored.
Where the records carry "sentence1" and "sentence2" (prepare_table.py: sentence1 sentence2), "cosine" is the similarity of the two TF-IDF
vectors, which learns from no target. "majority" is the accuracy of always saying the more frequent answer of "train".
Prints one JSON line; the data sets of results/clf_real_sets.json gave, on eval (scikit-learn 1.9.1):
    sst2    accuracy 0.742, AUC 0.798, Pearson 0.507, Spearman 0.509
    spam    accuracy 0.973, AUC 0.986, Pearson 0.915, Spearman 0.616 (test: accuracy 0.995, AUC 1.000)
    stsb    Pearson 0.132, Spearman 0.115; cosine: Pearson 0.645, Spearman 0.641
"""

import argparse
import json
import math
import pathlib

import numpy as np
import scipy.stats
import sklearn
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold

STRENGTHS = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]  # C of the logistic regression, 1 / alpha of the ridge regression


def read(path):
    """{split: records} of a .json file, or of JSON lines with a "split" key."""
    text = pathlib.Path(path).read_text(encoding="utf-8")
    if not path.endswith(".jsonl"):
        return json.loads(text)
    splits = {}
    for line in filter(str.strip, text.split("\n")):
        record = json.loads(line)
        splits.setdefault(record.get("split", "train"), []).append(record)
    return splits


def score(found, targets, binary):
    """Correlations, and for 0/1 targets the AUC; what does not exist (one class only, constant scores) is null."""
    varies = len(set(targets)) > 1 and len(set(found)) > 1
    scores = {"auc": roc_auc_score(targets, found) if varies else math.nan} if binary else {}
    scores["pearson"] = scipy.stats.pearsonr(found, targets)[0] if varies else math.nan
    scores["spearman"] = scipy.stats.spearmanr(found, targets)[0] if varies else math.nan
    return {name: None if math.isnan(value) else round(float(value), 4) for name, value in scores.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--data", required=True, help=".json or .jsonl file with train, eval and perhaps test")
    parser.add_argument("--out", help="write the figures to this JSON file")
    args = parser.parse_args()
    splits = {split: records for split, records in read(args.data).items() if records}
    targets = {split: np.array([record["target"] for record in records], dtype=float) for split, records in splits.items()}
    binary = all(set(values) <= {0.0, 1.0} for values in targets.values())
    options = {"ngram_range": (1, 2), "sublinear_tf": True}
    vectorizer = TfidfVectorizer(**options)
    features = vectorizer.fit_transform([record["input"] for record in splits["train"]])
    if binary:
        folds = StratifiedKFold(5, shuffle=True, random_state=0)  # shuffled: tables are often sorted by source
        model = GridSearchCV(LogisticRegression(max_iter=1000), {"C": STRENGTHS}, cv=folds, scoring="neg_log_loss")
        strength = model.fit(features, targets["train"]).best_params_
    else:
        model = RidgeCV(alphas=[1 / c for c in STRENGTHS]).fit(features, targets["train"])
        strength = {"alpha": round(float(model.alpha_), 4)}
    paired = all("sentence1" in record and "sentence2" in record for records in splits.values() for record in records)
    if paired:
        sentences = TfidfVectorizer(**options).fit([record[key] for record in splits["train"] for key in ("sentence1", "sentence2")])
    summary = {"data": pathlib.Path(args.data).stem, "model": "tf-idf + " + ("logistic regression" if binary else "ridge regression"),
               **strength, "features": features.shape[1], "n_train": features.shape[0], "sklearn": sklearn.__version__}
    for split in [name for name in ("eval", "test") if name in splits]:
        new = vectorizer.transform([record["input"] for record in splits[split]])
        found = model.predict_proba(new)[:, 1] if binary else model.predict(new)
        summary[split] = {"n": len(found), "mean_target": round(float(targets[split].mean()), 4)}
        if binary:
            summary[split]["accuracy"] = round(float(((found >= 0.5) == targets[split]).mean()), 4)
            summary[split]["majority"] = round(float(((targets["train"].mean() >= 0.5) == targets[split]).mean()), 4)
        summary[split].update(score(found, targets[split], binary))
        if paired:  # the vectors have length 1, so the product of two is their cosine
            left, right = (sentences.transform([record[key] for record in splits[split]]) for key in ("sentence1", "sentence2"))
            summary[split]["cosine"] = score(np.asarray(left.multiply(right).sum(axis=1)).ravel(), targets[split], binary)
    print(json.dumps(summary))
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
