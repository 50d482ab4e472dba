"""data/prepare_glue.py: every task's prompt and answer by hand, both forms, every way to get a file wrong, the real sets."""

import json

import prepare_glue
import pytest
from conftest import ROOT

SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """prepare(task, {file: text or bytes}, "more flags") -> (exit code, what was written or None, stdout, stderr)."""
    def prepare(task, files, *words, out="out.json"):
        monkeypatch.chdir(tmp_path)
        for name, text in files.items():
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        before = (tmp_path / out).exists()
        parse = json.loads if out.endswith(".json") else lambda text: [json.loads(line) for line in text.split("\n")[:-1]]
        try:
            code = prepare_glue.main(["--task", task, "--data_dir", ".", "--out", out, *words])
        except SystemExit as stop:
            code = stop.code
        written = parse((tmp_path / out).read_text(encoding="utf-8")) if (tmp_path / out).exists() and not before else None
        return code, written, *capsys.readouterr()
    return prepare


def table(*rows):
    return "".join("\t".join(row) + "\n" for row in rows)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


SST2 = table(("sentence", "label"), ("a gem ", "1"), ("dull", "0"))
STSB = ("index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score")
MNLI = ("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse",
        "sentence1", "sentence2", "label1")
PAIR = ("index", "sentence1", "sentence2", "label")


def mnli(premise, hypothesis, *labels):
    return ("0", "1", "1n", "fiction", "( a )", "( b )", "(A a)", "(B b)", premise, hypothesis, *labels)


def stsb(*scores):
    return table(STSB, *(("0", "main", "images", "2014", "0001", "none", "none", "A cat.", "A dog.", score) for score in scores))


# ------------------------------------------------------------------------------------------------ records

GOLDENS = {  # task: (the train and eval file, two examples with the label's integer, labels, metrics)
    "cola": (table(("gj04", "1", "", "They rode."), ("gj04", "0", "*", 'They\r"rode.')),
             [("cola sentence: They rode.", "acceptable", 1), ('cola sentence: They\r"rode.', "unacceptable", 0)],
             (["unacceptable", "acceptable"], ["matthews", "accuracy"])),
    "sst2": (SST2, [("sst2 sentence: a gem", "positive", 1), ("sst2 sentence: dull", "negative", 0)],
             (["negative", "positive"], ["accuracy"])),
    "mrpc": ("\ufeff" + table(("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"), ("1", "7", "8", "Amrozi said.", 'He said "so'),
                              ("0", "9", "10", "Up.", "Down.")),
             [('mrpc sentence1: Amrozi said. sentence2: He said "so', "equivalent", 1),
              ("mrpc sentence1: Up. sentence2: Down.", "not_equivalent", 0)],
             (["not_equivalent", "equivalent"], ["f1", "accuracy"])),
    "qqp": (table(("id", "qid1", "qid2", "question1", "question2", "is_duplicate"), ("1", "2", "3", "Why?", "How?", "0"),
                  ("4", "5", "6", "Who is he?", "Who's he?", "1")),
            [("qqp question1: Why? question2: How?", "not_duplicate", 0),
             ("qqp question1: Who is he? question2: Who's he?", "duplicate", 1)],
            (["not_duplicate", "duplicate"], ["accuracy", "f1"])),
    "qnli": (table(("index", "question", "sentence", "label"), ("0", "Who?", "It was Ann.", "entailment"), ("1", "When?", "Here.", "not_entailment")),
             [("qnli question: Who? sentence: It was Ann.", "entailment", 0), ("qnli question: When? sentence: Here.", "not_entailment", 1)],
             (["entailment", "not_entailment"], ["accuracy"])),
    "rte": (table(PAIR, ("0", "Ann ran.", "She ran.", "entailment"), ("1", "Up.", "Down.", "not_entailment")),
            [("rte sentence1: Ann ran. sentence2: She ran.", "entailment", 0), ("rte sentence1: Up. sentence2: Down.", "not_entailment", 1)],
            (["entailment", "not_entailment"], ["accuracy"])),
    "wnli": (table(PAIR, ("0", "He fed it.", "It ate.", "1"), ("1", "Up.", "Down.", "0")),
             [("wnli sentence1: He fed it. sentence2: It ate.", "entailment", 1), ("wnli sentence1: Up. sentence2: Down.", "not_entailment", 0)],
             (["not_entailment", "entailment"], ["accuracy"])),
    "boolq": (lines({"question": "is it hot", "passage": "Sun: a\tstar\u2028.", "idx": 0, "label": True},
                    {"question": "is it cold", "passage": "Sun.", "idx": 1, "label": False}),
              [("boolq passage: Sun: a\tstar\u2028. question: is it hot", "True", 1), ("boolq passage: Sun. question: is it cold", "False", 0)],
              (["False", "True"], ["accuracy"])),
    "cb": (lines({"premise": "It may rain.", "hypothesis": "it rains", "label": "neutral", "idx": 0},
                 {"premise": "It rains.", "hypothesis": "it is dry", "label": "contradiction", "idx": 1}),
           [("cb hypothesis: it rains premise: It may rain.", "neutral", 2), ("cb hypothesis: it is dry premise: It rains.", "contradiction", 1)],
           (["entailment", "contradiction", "neutral"], ["accuracy"])),
    "copa": (lines({"premise": "I fell.", "choice1": "It was icy.", "choice2": "I sang.", "question": "cause", "label": 0, "idx": 0},
                   {"premise": "It rained.", "choice1": "I sang.", "choice2": "I got wet.", "question": "effect", "label": 1, "idx": 1}),
             [("copa choice1: It was icy. choice2: I sang. premise: I fell. question: cause", "choice1", 0),
              ("copa choice1: I sang. choice2: I got wet. premise: It rained. question: effect", "choice2", 1)],
             (["choice1", "choice2"], ["accuracy"])),
    "superglue_rte": (lines({"premise": "Ann ran.", "hypothesis": "She ran.", "label": "entailment", "idx": 0},
                            {"premise": "Up.", "hypothesis": "Down.", "label": "not_entailment", "idx": 1}),
                      [("rte hypothesis: She ran. premise: Ann ran.", "entailment", 0), ("rte hypothesis: Down. premise: Up.", "not_entailment", 1)],
                      (["entailment", "not_entailment"], ["accuracy"])),
    "wic": (lines({"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "idx": 0, "label": False, "start1": 2, "version": 1.1},
                  {"word": "run", "sentence1": "I run.", "sentence2": "You run.", "idx": 1, "label": True}),
            [("wic sentence1: A bank. sentence2: The bank. word: bank", "False", 0),
             ("wic sentence1: I run. sentence2: You run. word: run", "True", 1)],
            (["False", "True"], ["accuracy"])),
}


def files_of(task, text):
    return dict.fromkeys(prepare_glue.TASKS[task]["files"].values(), text)


def test_every_task_has_a_golden():
    assert {*GOLDENS, "mnli", "stsb"} == set(prepare_glue.TASKS)


@pytest.mark.parametrize("task", GOLDENS)
def test_golden(prepare, task):
    text, examples, (labels, metrics) = GOLDENS[task]
    code, written, shown, errors = prepare(task, files_of(task, text))
    records = [{"prompt": prompt, "completion": word} for prompt, word, _ in examples]
    assert (code, errors) == (0, "") and written == {"train": records, "eval": records}
    assert list(written) == ["train", "eval"] and all(labels[label] == word for _, word, label in examples)
    assert shown.splitlines()[-1] == (
        f"python seq2seq.py --model_init_path google/t5-v1_1-base --data out.json --metrics {' '.join(metrics)} --labels {' '.join(labels)} "
        f"--metric_for_best {metrics[0]} --max_new_tokens 8")


def test_mnli_hypothesis_is_the_second_sentence_and_mismatched_is_a_data_set_of_its_own(prepare, tmp_path):
    """Train has one annotator's label and dev has five; label1 is not the answer, gold_label is."""
    dev = (*MNLI, "label2", "label3", "label4", "label5", "gold_label")
    files = {"train.tsv": table((*MNLI, "gold_label"), mnli("It rained.", "It was wet.", "neutral", "entailment")),
             "dev_matched.tsv": table(dev, mnli("A.", "B.", "neutral", "neutral", "neutral", "neutral", "entailment", "contradiction")),
             "dev_mismatched.tsv": table(dev, mnli("C.", "D.", *["entailment"] * 5, "neutral"), mnli("E.", "F.", *["neutral"] * 5, "entailment"))}
    (tmp_path / "data").mkdir()
    code, written, shown, _ = prepare("mnli", files, out="data/mnli.json")
    assert code == 0 and written == {
        "train": [{"prompt": "mnli hypothesis: It was wet. premise: It rained.", "completion": "entailment"}],
        "eval": [{"prompt": "mnli hypothesis: B. premise: A.", "completion": "contradiction"}]}
    assert json.loads((tmp_path / "data/mnli_mismatched.json").read_text()) == {"eval": [
        {"prompt": "mnli hypothesis: D. premise: C.", "completion": "neutral"},
        {"prompt": "mnli hypothesis: F. premise: E.", "completion": "entailment"}]}
    assert shown.startswith("data/mnli.json: 1 train, 1 eval\ndata/mnli_mismatched.json: 2 eval\n") and "\ndev_mismatched.tsv: 2 records\n" in shown
    assert "data/mnli_mismatched.json: entailment 1, neutral 1, contradiction 0; characters" in shown
    assert shown.splitlines()[-1].endswith("--data mnli mnli_mismatched --metrics accuracy --labels entailment neutral contradiction "
                                           "--metric_for_best mnli/accuracy --max_new_tokens 8")
    (tmp_path / "data/mnli.json").unlink()
    code, written, _, errors = prepare("mnli", files, out="data/mnli.json")
    assert (code, written, errors) == (2, None, "--out data/mnli_mismatched.json: exists\n")


# 0.3 * 5 is 1.5, to the even 2; 2.5 * 5 is 12.5, to the even 12; but 0.3 / 0.2 is 1.4999999999999998
@pytest.mark.parametrize("words, answers", [([], ["4.4", "3.8", "2.4", "0.0", "0.4", "5.0", "1.2", "3.6"]),
                                            (["--stsb_step", "0.2"], ["4.4", "3.8", "2.4", "0.0", "0.4", "5.0", "1.2", "3.6"]),
                                            (["--stsb_step", "0.1"], ["4.4", "3.8", "2.5", "0.1", "0.3", "5.0", "1.2", "3.7"])])
def test_stsb_steps(prepare, words, answers):
    scores = ["4.400", "3.75", "2.5", "0.1", "0.3", "5", "1.25", "3.667"]
    code, written, shown, _ = prepare("stsb", files_of("stsb", stsb(*scores)), *words)
    assert code == 0 and shown.endswith("--metrics spearman pearson --metric_for_best spearman --max_new_tokens 8\n")
    assert written["train"] == [{"prompt": "stsb sentence1: A cat. sentence2: A dog.", "completion": answer, "references": [str(float(score))]}
                                for answer, score in zip(answers, scores, strict=True)]
    assert "train: mean score 2.621; characters 0% 40" in shown


def test_an_entry_is_all_that_a_new_task_needs(prepare, monkeypatch):
    """Also a test split, where it has labels, and a JSON column that is no word."""
    entry = {"files": {"train": "a.jsonl", "test": "test.jsonl"}, "text": "spam {a.b}: {c}!", "label": "y", "words": {"-1": "ham", "1": "spam"},
             "metrics": ["f1"]}
    monkeypatch.setitem(prepare_glue.TASKS, "spam", entry)
    files = {"a.jsonl": lines({"a.b": "{c}", "c": "d", "y": 1}), "test.jsonl": lines({"a.b": "e", "c": "f", "y": -1})}
    code, written, shown, _ = prepare("spam", files)
    assert code == 0 and "not written" not in shown
    assert written == {"train": [{"prompt": "spam {c}: d!", "completion": "spam"}], "test": [{"prompt": "spam e: f!", "completion": "ham"}]}


# ------------------------------------------------------------------------------------------------ what is written


def test_both_forms_and_what_is_printed(prepare, tmp_path):
    files = {"train.tsv": SST2.replace("\n", "\r\n") + "\r\n\n", "dev.tsv": table(("label", "sentence"), ("1", "schön\u2028")),
             "test.tsv": table(("index", "sentence"), ("0", "x"))}
    code, _, shown, _ = prepare("sst2", files)
    first, second = {"prompt": "sst2 sentence: a gem", "completion": "positive"}, {"prompt": "sst2 sentence: dull", "completion": "negative"}
    assert code == 0 and (tmp_path / "out.json").read_text(encoding="utf-8") == (
        '{"train": [\n' + json.dumps(first) + ",\n" + json.dumps(second) + "\n],\n"
        '"eval": [\n{"prompt": "sst2 sentence: schön", "completion": "positive"}\n]}\n')
    assert shown.splitlines()[:-1] == [
        "out.json: 2 train, 1 eval", "train.tsv: 2 records", "dev.tsv: 1 records",
        "test.tsv: not written (the test files of GLUE and SuperGLUE have no labels)",
        "train: negative 1, positive 1; characters 0% 19 5% 19 50% 19 95% 20 100% 20",
        "eval: negative 0, positive 1; characters 0% 20 5% 20 50% 20 95% 20 100% 20", str(first), str(second)]
    code, written, again, _ = prepare("sst2", files, out="out.jsonl")
    assert code == 0 and again == shown.replace("out.json", "out.jsonl")
    assert written == [{"split": "train", **first}, {"split": "train", **second},
                       {"split": "eval", "prompt": "sst2 sentence: schön", "completion": "positive"}]


def test_clf(prepare):
    """Two labels: the integer, in rte 1 is not_entailment; scores stay as they are; three labels are refused."""
    code, written, shown, _ = prepare("rte", files_of("rte", GOLDENS["rte"][0]), "--clf")
    assert code == 0 and written == dict.fromkeys(["train", "eval"], [
        {"input": "rte sentence1: Ann ran. sentence2: She ran.", "target": 0}, {"input": "rte sentence1: Up. sentence2: Down.", "target": 1}])
    assert "train: entailment 1, not_entailment 1; characters" in shown
    code, written, _, _ = prepare("stsb", files_of("stsb", stsb("3.667")), "--clf", out="out.jsonl")
    assert code == 0 and written == [{"split": split, "input": "stsb sentence1: A cat. sentence2: A dog.", "target": 3.667}
                                     for split in ("train", "eval")]
    code, written, shown, errors = prepare("cb", files_of("cb", GOLDENS["cb"][0]), "--clf", out="cb.json")
    assert (code, written, shown, errors) == (2, None, "", "--clf: cb has 3 labels, clf.py tells two apart\n")


def test_skip_malformed_drops_and_counts(prepare):
    files = {"train.tsv": SST2 + table(("a", "b", "1"), ("x", "2"), (" ", "1"), ("fine", "1")), "dev.tsv": SST2}
    code, written, shown, _ = prepare("sst2", files, "--skip_malformed")
    assert code == 0 and [record["prompt"] for record in written["train"]] == [f"sst2 sentence: {text}" for text in ("a gem", "dull", "fine")]
    assert shown.splitlines()[:3] == ["out.json: 3 train, 2 eval", "train.tsv: 3 records, 3 malformed lines dropped; "
                                      "the first: line 4: number of columns 3, expected 2", "dev.tsv: 2 records, 0 malformed lines dropped"]
    files["dev.tsv"] = table(("sentence", "label"), ("x", "-1"))
    code, written, _, errors = prepare("sst2", files, "--skip_malformed", out="other.json")
    assert (code, written) == (2, None)
    assert errors == "dev.tsv: 0 records, 1 malformed lines dropped; the first: line 2: label '-1', expected 0 or 1\n"


# ------------------------------------------------------------------------------------------------ what is refused


def test_all_problems_at_once_with_their_lines(prepare):
    files = {"train.tsv": SST2 + "too\tmany\t1\n\nfew\n\t1\nx\tgood\nx\t\n", "dev.tsv": table(("text", "label"), ("x", "1"))}
    code, written, shown, errors = prepare("sst2", files, "--stsb_step", "0.1", out="out.tsv")
    assert (code, written, shown) == (2, None, "")
    assert errors.splitlines() == [
        "--out out.tsv: expected a name that ends in .json or .jsonl, in a folder that exists",
        "--stsb_step: sst2 has no scores",
        "train.tsv, line 4: number of columns 3, expected 2",
        "train.tsv, line 6: number of columns 1, expected 2",
        "train.tsv, line 7: sentence '', expected a text",
        "train.tsv, line 8: label 'good', expected 0 or 1",
        "train.tsv, line 9: label '', expected 0 or 1",
        "dev.tsv: no columns named 'sentence'; it has text, label",
    ]


def test_many_problems_are_counted(prepare):
    code, _, _, errors = prepare("cola", files_of("cola", "x\n" * 50))
    assert code == 2 and len(errors.splitlines()) == 41 and errors.endswith("... and 60 more problems\n")
    assert errors.startswith("train.tsv, line 1: number of columns 1, expected 4\n")


CB = {"premise": "a", "hypothesis": "b", "label": "neutral"}


@pytest.mark.parametrize("task, text, words, message", [
    ("sst2", None, [], "dev.tsv: cannot be read ([Errno 2]"),
    ("sst2", None, ["--skip_malformed"], "dev.tsv: cannot be read ([Errno 2]"),
    ("sst2", b"sentence\tlabel\n\xff\t1\n", ["--skip_malformed"], "dev.tsv: cannot be read ('utf-8' codec"),
    ("sst2", "", [], "dev.tsv: no columns named 'sentence'"),
    ("sst2", "sentence\tlabel\tlabel\nx\t1\t1\n", ["--skip_malformed"], "dev.tsv: 2 columns named 'label'; it has sentence, label, label"),
    ("sst2", "sentence\tlabel\n", [], "dev.tsv: 0 records\n"),
    ("cola", table(("source", "label", "mark", "sentence")), [], "dev.tsv, line 1: label 'label', expected 0 or 1"),
    ("stsb", stsb("1", "5.1"), [], "dev.tsv, line 3: score '5.1', expected a number from 0 to 5"),
    ("stsb", stsb("-0.1"), [], "dev.tsv, line 2: score '-0.1', expected"),
    ("stsb", stsb("nan"), [], "dev.tsv, line 2: score 'nan', expected"),
    ("stsb", stsb(""), [], "dev.tsv, line 2: score '', expected"),
    ("stsb", stsb("1"), ["--clf", "--stsb_step", "0.1"], "--stsb_step: --clf keeps the scores as they are"),
    ("stsb", stsb("1"), ["--stsb_step", "0.5"], "invalid choice: 0.5"),
    ("cb", lines(CB) + "premise\n", [], "val.jsonl, line 2: expected a JSON object, found premise"),
    ("cb", lines([1]), [], "val.jsonl, line 1: expected a JSON object, found [1]"),
    ("cb", lines(CB) + '{"premise": "a\n', [], "val.jsonl, line 2: Unterminated string"),
    ("cb", lines({"premise": "a", "label": "neutral"}), [], "val.jsonl, line 1: no key 'hypothesis'; it has premise, label"),
    ("cb", lines({**CB, "premise": None}), [], "val.jsonl, line 1: premise None, expected a text"),
    ("cb", lines({**CB, "premise": " "}), [], "val.jsonl, line 1: premise '', expected a text"),
    ("cb", lines({**CB, "premise": "\ud800"}), [], "val.jsonl, line 1: 'utf-8' codec can't encode"),
    ("cb", lines({**CB, "label": 2}), [], "val.jsonl, line 1: label '2', expected entailment or contradiction or neutral"),
    ("boolq", lines({"passage": "a", "question": "b", "label": 1}), [], "val.jsonl, line 1: label '1', expected false or true"),
    ("sst2", SST2, ["--task", "sst"], "invalid choice: 'sst'"),
    ("sst2", SST2, ["--skip"], "unrecognized arguments: --skip")])
def test_refused(prepare, task, text, words, message):
    """Train is fine, unless the golden says otherwise; the second file is what it is."""
    train, second = prepare_glue.TASKS[task]["files"].values()
    files = {train: stsb("1") if task == "stsb" else GOLDENS[task][0], **({} if text is None else {second: text})}
    code, written, shown, errors = prepare(task, files, *words)
    assert (code, written, shown) == (2, None, "") and message in errors


def test_an_existing_file_is_never_overwritten(prepare, tmp_path):
    files = files_of("sst2", SST2)
    assert prepare("sst2", files)[0] == 0
    before = (tmp_path / "out.json").read_bytes()
    code, _, _, errors = prepare("sst2", files_of("sst2", SST2 + "more\t1\n"))
    assert (code, errors) == (2, "--out out.json: exists\n") and (tmp_path / "out.json").read_bytes() == before
    code, written, _, errors = prepare("sst2", files, out="nowhere/out.json")
    assert (code, written) == (2, None) and "in a folder that exists" in errors


# ------------------------------------------------------------------------------------------------ the real files


@pytest.mark.parametrize("task, folder, train, dev, counts", [
    ("sst2", "SST-2", 2000, 500, ["train: negative 887, positive 1113;", "eval: negative 209, positive 291;"]),
    ("cola", "CoLA", 2000, 522, ["train: unacceptable 614, acceptable 1386;", "eval: unacceptable 163, acceptable 359;"]),
    ("rte", "RTE", 1000, 277, ["train: entailment 495, not_entailment 505;", "eval: entailment 146, not_entailment 131;"]),
    ("stsb", "STS-B", 1875, 500, ["train: mean score 2.648;", "eval: mean score 2.12;"])])
def test_real_files(prepare, task, folder, train, dev, counts):
    if not (SHARED / folder).is_dir():
        pytest.skip(f"no {SHARED / folder}")
    code, written, shown, _ = prepare(task, {}, "--data_dir", str(SHARED / folder), out="out.jsonl")
    assert code == 0 and shown.startswith(f"out.jsonl: {train} train, {dev} eval\n") and all(count in shown for count in counts)
    assert [record["split"] for record in written] == [*["train"] * train, *["eval"] * dev]
