"""clf.py before any model is loaded: records to token ids, templates, the verbaliser, refusals, who gets which example."""

import json
import math
import re
import types

import numpy as np
import pytest
from conftest import ROOT, bpe_tokenizer, clf_flags, preference_records, score_records, write_byt5, write_llama

import clf
import common_v1 as common

POINT = types.SimpleNamespace(**{**clf.LAYOUT, "template": "{input}"}, family="seq2seq")
PAIRS = types.SimpleNamespace(**{**clf.LAYOUT, "template": "{prompt}\n\n{reply}", "loss": "pairwise"}, family="seq2seq")


@pytest.fixture(scope="module")
def tokenizer():
    return common.transformers.AutoTokenizer.from_pretrained(ROOT / "models" / "tiny-t5")


@pytest.fixture
def load(clf_mount):
    """load(text or object, file name, **flags) -> (data sets, problems) of that file under data/, as clf.py reads it."""
    def load(content, name="a.json", **changes):
        if content is not None:
            (clf_mount / "data" / name).write_text(content if isinstance(content, str) else json.dumps(content))
        args, problems = clf.parse_args(list(map(str, clf_flags(clf_mount, **{"data": "a", **changes})))), []
        source, config, tokenizer = common.open_model_folder(args, problems)
        layout = clf.resolve_layout(args, source, "seq2seq" if config.is_encoder_decoder else "causal", problems)
        return clf.load_data(args, tokenizer, layout, problems), problems
    return load


@pytest.fixture
def refused(clf_mount, run_clf, monkeypatch, capsys):
    """refused(**flags) -> stderr of a run that ends with exit code 2 before the model loads and a run folder exists."""
    def refused(words=(), **changes):
        def too_late(*_):
            raise AssertionError("the model was loaded")
        monkeypatch.setattr(common, "load_model", too_late)
        assert run_clf([*clf_flags(clf_mount, **changes), *words]) == 2
        assert not (clf_mount / "models" / "run").exists()
        return capsys.readouterr().err
    return refused


def lines_of(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def ids_of(data, split):
    return [row.tolist() for row in map(data.text[split].__getitem__, range(len(data.text[split])))]


# ------------------------------------------------------------------------------------------------ records to ids

CAT, TAIL = [13, 5, 66, 24], [195, 217, 10, 59, 49, 34]  # the cat; Answer:


def test_golden_ids_of_a_record_through_a_template(load):
    """Pieces: '▁the' '▁' 'c' 'at'; '▁A' 'n' 's' 'w' 'er' ':'; the end token of an encoder's text stays. A shell's \\n is a newline,
    which this tokenizer reads as a blank."""
    content = {"train": [{"input": "the cat", "kind": "{input}", "target": 0.25}], "eval": [{"input": "yes", "kind": "no"}]}
    (data,), problems = load(content)
    assert problems == [] and ids_of(data, "train") == [[*CAT, 1]] and ids_of(data, "eval") == [[3, 1]]
    (data,), _ = load(None, template="{input}\\nAnswer:")
    assert ids_of(data, "train") == [[*CAT, *TAIL, 1]]
    (data,), _ = load(None, template="{kind} {input}")
    assert ids_of(data, "eval") == [[4, 3, 1]]  # each key is filled in, once: what looks like a key in a text stays
    assert clf.fill("{kind} {input}", content["train"][0]) == "{input} the cat"


def test_an_end_token_that_a_tokenizer_adds_is_dropped_for_decoder_only_models(load, clf_mount):
    write_llama(clf_mount / "models" / "adds", adds_end=True)
    content = {"train": [{"input": "the cat reads", "target": 1}], "eval": [{"input": "a"}]}
    plain, ends = (ids_of(load(content, model_init_name=name)[0][0], "train")[0] for name in ("llama", "adds"))
    assert plain == ends == bpe_tokenizer()("the cat reads").input_ids and plain[0] == 1
    assert bpe_tokenizer(adds_end=True)("the cat reads").input_ids == [*plain, 2]


@pytest.mark.parametrize("ids, limit, n_end, expected", [
    ([5, 6, 7, 8, 1], 5, 1, [5, 6, 7, 8, 1]), ([5, 6, 7, 8, 1], 4, 1, [5, 6, 7, 1]), ([5, 6, 7, 8, 1], 4, 3, [5, 7, 8, 1]),
    ([5, 6, 7, 8, 9], 3, 0, [5, 6, 7])])
def test_a_cut_takes_the_end_of_what_was_filled_in(ids, limit, n_end, expected):
    assert clf.cut(ids, limit, n_end) == expected


def test_long_texts_keep_the_templates_end_and_are_counted(load, messages):
    content = {"train": [{"input": "the cat" + " the cat" * k, "target": 1} for k in range(3)], "eval": [{"input": "yes"}]}
    (data,), _ = load(content, template="{input} Answer:", max_length=13)
    assert ids_of(data, "train") == [[*CAT, *TAIL, 1], [*CAT, *CAT[:2], *TAIL, 1], [*CAT, *CAT[:2], *TAIL, 1]]
    assert any("a: 2 of 4 texts are longer than --max_length" in line for line in messages)
    tail = bpe_tokenizer()(" Answer:", add_special_tokens=False).input_ids
    (data,), _ = load(content, template="{input} Answer:", max_length=len(tail) + 4, model_init_name="llama")
    assert ids_of(data, "train")[2] == [*bpe_tokenizer()("the cat the cat").input_ids[:4], *tail]
    messages.clear()
    load(content, template="{input} Answer:", max_length=40)
    assert not any("longer" in line for line in messages)
    assert "the template alone ends with 7 tokens" in load(content, template="{input} Answer:", max_length=8)[1][0]


def test_unknown_characters_are_counted(load, messages):
    load({"train": [{"input": "☃ cat", "target": 1}, {"input": "the cat", "target": 0}], "eval": [{"input": "a"}]})
    assert any("a: 1 of 3 texts hold characters that this tokenizer does not know" in line for line in messages)


def test_targets_are_mapped_to_the_unit_interval_and_back():
    layout = types.SimpleNamespace(**{**vars(POINT), "target_min": 1.0, "target_max": 5.0})
    targets = [1, 2.0, 3.5, 5]
    scaled = [clf.to_texts({"input": "x", "target": t}, "train", layout)[1] for t in targets]
    assert scaled == [0, 0.25, 0.625, 1]
    logits = np.log(np.clip(scaled, 1e-12, 1 - 1e-12)) - np.log1p(-np.clip(scaled, 1e-12, 1 - 1e-12))
    assert clf.to_user(layout, logits) == pytest.approx(targets) and clf.to_user(POINT, logits) == pytest.approx(scaled, abs=1e-9)
    assert math.isnan(clf.to_texts({"input": "x"}, "eval", layout)[1]) and math.isnan(clf.to_texts({"input": "x", "target": None}, "test", layout)[1])


def test_preferences_give_one_text_per_reply_best_first():
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad", "note": 3}
    assert clf.to_texts(pair, "train", PAIRS)[0] == ["p\n\ngood", "p\n\nbad"]
    assert clf.to_texts({"prompt": "p", "replies": ["a", "b", "c"]}, "eval", PAIRS)[0] == ["p\n\na", "p\n\nb", "p\n\nc"]
    first, second = (clf.to_texts({**pair, "chosen": c}, "train", PAIRS)[2] for c in ("good", "better"))
    assert first == second != clf.to_texts({**pair, "prompt": "q"}, "train", PAIRS)[2]  # prompts tell what leaks


def test_long_preferences_lose_their_beginning_so_that_replies_stay_different(load, messages):
    """A long prompt cut at its end would make all replies equal. A first token of the model's own stays."""
    content = {"train": [{"prompt": "the cat " * 9, "chosen": "yes", "rejected": "no"}], "eval": [{"prompt": "a", "chosen": "yes", "rejected": "no"}]}
    (data,), _ = load(content, loss="pairwise", max_length=6)
    assert ids_of(data, "train") == [[*CAT, 3, 1], [*CAT, 4, 1]]
    assert any("a: 2 of 4 texts are longer than --max_length" in line for line in messages)
    (data,), _ = load(content, loss="pairwise", max_length=6, model_init_name="llama")
    whole = [bpe_tokenizer()("the cat " * 9 + f"\n\n{reply}").input_ids for reply in ("yes", "no")]
    assert ids_of(data, "train") == [[1, *ids[-5:]] for ids in whole] and whole[0] != whole[1]


def test_rows_of_ranked_replies_stay_together(load):
    (data,), problems = load({"train": preference_records(9), "eval": preference_records(3, 1)}, loss="pairwise")
    assert problems == [] and data.first["train"].tolist() == [0, 2, 4, 7, 9, 11, 15, 17, 19, 22]
    assert len(data.text["train"]) == 22 and data.counts["train"] == 9


# ------------------------------------------------------------------------------------------------ refusals

GOOD = {"input": "the cat", "target": 1}
BETTER = {"prompt": "p", "chosen": "a", "rejected": "b"}
MALFORMED = {  # name: (record, flags, words that the message must have)
    "no target": ({"input": "x", "label": 1}, {}, ["no 'target' (has: input, label)", "only evaluation records may lack it"]),
    "target null": ({"input": "x", "target": None}, {}, ["no 'target'"]),
    "target true": ({"input": "x", "target": True}, {}, ["'target' is True", "number from 0 to 1"]),
    "target a string": ({"input": "x", "target": "1"}, {}, ["'target' is '1'", "number"]),
    "target too large": ({"input": "x", "target": 1.5}, {}, ["'target' is 1.5", "expected 0 to 1", "--target_min"]),
    "target too small": ({"input": "x", "target": 0}, {"target_min": 1, "target_max": 5}, ["'target' is 0", "expected 1 to 5"]),
    "target nan": ({"input": "x", "target": math.nan}, {}, ["'target' is nan", "expected 0 to 1"]),
    "target infinite": ({"input": "x", "target": math.inf}, {}, ["'target' is inf"]),
    "input empty": ({"input": " \n", "target": 1}, {}, ["'input' is empty"]),
    "input missing": ({"text": "x", "target": 1}, {}, ["no 'input' (has: text, target)", "'{input}'"]),
    "input null": ({"input": None, "target": 1}, {}, ["no 'input'"]),
    "input a number": ({"input": 7, "target": 1}, {}, ["'input' is a int, expected a string"]),
    "template key missing": ({"input": "x", "target": 1}, {"template": "{topic}: {input}"}, ["no 'topic'", "fills in"]),
    "half a surrogate": ({"input": "\ud83d x", "target": 1}, {}, ["'input'", "half a character"]),
    "preferences without pairwise": (BETTER, {}, ["preference record", "--loss pairwise"]),
    "replies without pairwise": ({"prompt": "p", "replies": ["a", "b"]}, {}, ["preference record", "--loss pairwise"]),
    "pairwise without preferences": (GOOD, {"loss": "pairwise"}, ["no 'chosen' and 'rejected'", "(has: input, target)"]),
    "one reply": ({"prompt": "p", "replies": ["a"]}, {"loss": "pairwise"}, ["no list of 'replies'"]),
    "no rejected": ({"prompt": "p", "chosen": "a"}, {"loss": "pairwise"}, ["no 'chosen' and 'rejected'"]),
    "reply empty": ({**BETTER, "rejected": " "}, {"loss": "pairwise"}, ["'reply' is empty"]),
    "reply a number": ({"prompt": "p", "replies": ["a", 5]}, {"loss": "pairwise"}, ["'reply' is a int"]),
    "replies no list": ({"prompt": "p", "replies": "ab"}, {"loss": "pairwise"}, ["no list of 'replies'"]),
    "a single reply in train": ({"prompt": "p", "reply": "a"}, {"loss": "pairwise"}, ["only evaluation records may have a single 'reply'"]),
    "equal replies": ({**BETTER, "rejected": "a"}, {"loss": "pairwise"}, ["two of the replies are the same text"]),
    "prompt missing": ({"chosen": "a", "rejected": "b"}, {"loss": "pairwise"}, ["no 'prompt'"]),
    "half a surrogate in a reply": ({**BETTER, "rejected": "\ud83d x"}, {"loss": "pairwise"}, ["half a character"])}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_record_is_named_with_its_file_and_place(load, clf_mount, case):
    record, changes, words = MALFORMED[case]
    good = BETTER if changes.get("loss") else {**GOOD, "topic": "x"}
    for name, content, where in (("a.json", {"train": [good, record], "eval": [good]}, "train[1]"),
                                 ("b.jsonl", lines_of([{**good, "split": "eval"}, good, record]), "line 3")):
        data_sets, problems = load(content, name, data=name[0], **changes)
        assert data_sets == [] and f"{clf_mount}/data/{name}, {where}: " in problems[0]
        assert all(word in problems[0] for word in words), problems


@pytest.mark.parametrize("case", ["no target", "target null"])
def test_evaluation_records_may_lack_a_target(load, case):
    for split in ("eval", "test"):
        (data,), problems = load({"train": [GOOD], "eval": [GOOD], split: [{"input": "x", **MALFORMED[case][0]}]})
        assert problems == [] and np.isnan(data.targets[split]).tolist() == [True]


def test_all_problems_are_reported_at_once_before_the_model_loads(refused, clf_mount):
    bad = [MALFORMED[name][0] for name in ("target true", "input empty")]
    (clf_mount / "data" / "bad.json").write_text(json.dumps({"train": [GOOD, *bad], "eval": [GOOD]}))
    wrong = {"learning_rate": "nan", "max_length": 3, "target_min": 3, "positive_word": "striker", "pred_save_path": "",
             "metric_for_best": "exact_match", "class_weights": ["1", "-1"], "eval_batch_size": 0}
    error = refused(data=["bad", "scoers"], **wrong)
    assert [name for name in wrong if not re.search(rf"^ERROR .*--{name}\b", error, re.MULTILINE)] == []
    assert "train[1]: 'target' is True" in error and "train[2]: 'input' is empty" in error and "did you mean scores?" in error
    assert refused(learning_rate="nan").count("ERROR") == 1


def test_records_are_checked_even_where_the_model_is_not_found(refused, clf_mount):
    (clf_mount / "data" / "bad.json").write_text(json.dumps({"train": [MALFORMED["target true"][0]], "eval": [GOOD]}))
    error = refused(data="bad", model_init_name="tinny")
    assert "did you mean tiny?" in error and "train[0]: 'target' is True" in error


@pytest.mark.parametrize("changes, named", [
    ({"loss": "pairwise", "data": "pairs", "class_weights": ["1", "2"]}, "--class_weights has no effect with --loss pairwise"),
    ({"loss": "pairwise", "data": "pairs", "template": "{prompt}"}, "expected {reply} in it"),
    ({"loss": "hinge"}, "--loss"), ({"class_weights": "balance"}, "--class_weights balance"), ({"class_weights": ["0", "1"]}, "two positive numbers"),
    ({"template": "no key"}, "nothing is filled in"), ({"target_min": 2, "target_max": 1}, "--target_min 2.0 --target_max 1.0"),
    ({"target_max": "inf"}, "--target_min"),
    ({"metric_for_best": "other/auc"}, "--metric_for_best other/auc"), ({"metric_for_best": "kendall"}, "--metric_for_best kendall"),
    ({"data": "one_class", "metric_for_best": "auc"}, "it has no meaning on the evaluation records: all targets are on one side of the middle"),
    ({"data": "equal", "metric_for_best": "spearman"}, "all targets are equal"),
    ({"data": "no_target", "metric_for_best": "loss"}, "no evaluation record has a target"),
    ({"model_init_name": "llama", "template": "{input}. Answer: "}, "the blank at its end"),
    ({"model_init_name": "llama", "data": "long"}, "256 positions; set --max_length 256 or less"),
    ({"model_init_name": "encoder"}, "expected an encoder-decoder"), ({"precision": "fp16"}, "--force fp16")])
def test_flags_that_exclude_each_other_or_mean_nothing_are_refused(refused, clf_mount, changes, named):
    for name, evaluation in (("one_class", [{**GOOD, "target": t} for t in (1, 0.75)]), ("equal", [GOOD, GOOD]), ("no_target", [{"input": "x"}]),
                             ("long", [GOOD, {"input": "1 2 3 4 " * 70, "target": 0}])):
        (clf_mount / "data" / f"{name}.json").write_text(json.dumps({"train": [GOOD, {**GOOD, "target": 0}], "eval": evaluation}))
    bpe_tokenizer().save_pretrained(clf_mount / "models" / "encoder")
    common.transformers.BertConfig().save_pretrained(clf_mount / "models" / "encoder")
    assert named in refused(**changes)


@pytest.mark.parametrize("words, named", [(["--positive", "yes"], "'--positive': did you mean --positive_word?"),
                                          (["--max_len", "5"], "did you mean --max_length?"),
                                          (["--temperature", "1"], "unknown argument '--temperature'"), (["stray"], "'stray'")])
def test_unknown_flags_are_refused_with_the_nearest(refused, words, named):
    assert named in refused(words)


# ------------------------------------------------------------------------------------------------ verbaliser


def pieces_of(tokenizer, family, template="{input}", positive="yes", negative="no"):
    layout = types.SimpleNamespace(family=family, template=template, positive_word=positive, negative_word=negative)
    problems = []
    return clf.verbaliser(tokenizer, layout, problems), problems


def test_answers_are_the_pieces_that_would_follow_the_text(tokenizer):
    """T5's decoder begins with a piece of its own; a decoder-only model goes on after a blank, or at the start of a line."""
    assert pieces_of(tokenizer, "seq2seq") == ([4, 3], []) and tokenizer.convert_ids_to_tokens([4, 3]) == ["▁no", "▁yes"]
    bpe = bpe_tokenizer()
    assert bpe.convert_ids_to_tokens(pieces_of(bpe, "causal")[0]) == ["Ġno", "Ġyes"]
    assert bpe.convert_ids_to_tokens(pieces_of(bpe, "causal", "{input}\n")[0]) == ["no", "yes"]
    adds_end = bpe_tokenizer(adds_end=True)
    assert pieces_of(adds_end, "causal") == pieces_of(bpe, "causal")


@pytest.mark.parametrize("family, positive, negative, words", [
    ("seq2seq", "striker", "no", ["--positive_word 'striker'", "'▁'", "'ri'", "one piece each: yes, no"]),
    ("seq2seq", "yes", "☃", ["--negative_word '☃'", "'<unk>'"]), ("seq2seq", " ", "no", ["--positive_word ' '", "but 0"]),
    ("seq2seq", "yes", "yes", ["are the same piece: '▁yes'", "choose two words"]),
    ("causal", "zebra", "no", ["--positive_word 'zebra'", "'Ġ", "one piece each: yes, no"])])
def test_a_verbaliser_that_is_no_single_piece_is_refused_with_its_pieces(tokenizer, family, positive, negative, words):
    _, problems = pieces_of(tokenizer if family == "seq2seq" else bpe_tokenizer(), family, positive=positive, negative=negative)
    assert len(problems) == 1 and all(word in problems[0] for word in words), problems


def test_byt5_needs_answers_of_one_byte(clf_mount, refused):
    write_byt5(clf_mount / "models" / "byt5")
    error = refused(model_init_name="byt5")
    assert "--positive_word 'yes' is not one piece of this tokenizer but 3: 'y' 'e' 's'" in error and "y, n, 1, 0" in error
    byt5 = common.transformers.ByT5Tokenizer()
    assert pieces_of(byt5, "seq2seq", positive="y", negative="n") == ([ord("n") + 3, ord("y") + 3], [])


# ------------------------------------------------------------------------------------------------ splits, cache, examples


def test_json_lines_without_splits_train_and_with_no_train_are_scored(load):
    content = lines_of([*score_records(4), {**GOOD, "split": "eval"}])
    (data,), problems = load(content, "a.jsonl")
    assert problems == [] and (data.counts["train"], data.counts["eval"]) == (4, 1)
    (data,), problems = load(lines_of([{"input": "x"}, {"input": "y"}]), "a.jsonl", no_train=True)
    assert problems == [] and (data.counts["train"], data.counts["eval"]) == (0, 2)


def test_training_lines_that_have_an_evaluation_file_beside_them_are_not_scored(load):
    """--no_train on a data set scores the same records as training on it did."""
    load(lines_of([{"input": "held out", "target": 1}]), "a.eval.jsonl")
    for no_train in (None, True):
        (data,), problems = load(lines_of(score_records(4)), "a.jsonl", no_train=no_train)
        assert problems == [] and data.counts["eval"] == 1


def test_eval_fraction_holds_out_by_text_and_leaks_are_counted(load, messages):
    (data,), problems = load({"train": score_records(200) * 2}, eval_fraction=0.2)
    sides = {split: set(data.hashes[split].tolist()) for split in ("train", "eval")}
    assert problems == [] and not sides["train"] & sides["eval"] and len(sides["train"] | sides["eval"]) == 200 and 20 < len(sides["eval"]) < 65
    assert not any("occur in the training data" in line for line in messages)
    load({"train": [GOOD], "eval": [GOOD, {**GOOD, "target": 0}, {"input": "b"}]})
    assert any("2 of 3 eval texts occur in the training data" in line for line in messages)


def test_tokens_are_cached_until_data_layout_or_tokenizer_change(load, monkeypatch):
    calls, original = [], clf.tokenize_data_set
    monkeypatch.setattr(clf, "tokenize_data_set", lambda *a: (calls.append(1), original(*a))[1])
    content = {"train": [GOOD], "eval": [GOOD]}
    keys = {load(content, **changes)[0][0].sha256 for changes in (
        {}, {"learning_rate": 1}, {"template": "a {input}"}, {"max_length": 5}, {"target_max": 2}, {"eval_fraction": 0.5},
        {"model_init_name": "llama"})}
    assert len(keys) == len(calls) == 6


def test_the_same_step_gets_the_same_examples_whatever_the_batch_split(load, clf_mount):
    def ids(**changes):
        args = clf.parse_args(list(map(str, clf_flags(clf_mount, **changes))))
        data = clf.TrainingData(args, load(None, data="scores")[0], POINT, (1, 1), 0)
        return [data.step_ids(k).tolist() for k in range(14)]
    a, b = ids(train_batch_size=8), ids(train_batch_size=2, gradient_accumulation_steps=4)
    assert a == b and a[:6] != a[6:12] and a != ids(train_batch_size=8, seed=1)
    assert sorted(i for batch in a[:6] for i in batch) == list(range(43))


@pytest.mark.parametrize("world, accumulation", [(1, 1), (1, 4), (2, 1), (2, 4), (3, 1)])
@pytest.mark.parametrize("loss", ["cross_entropy", "pairwise"])
def test_every_example_is_dealt_to_exactly_one_forward_step_of_one_rank(load, clf_mount, monkeypatch, world, accumulation, loss):
    name = "pairs" if loss == "pairwise" else "scores"
    args = clf.parse_args(list(map(str, clf_flags(clf_mount, train_batch_size=6, gradient_accumulation_steps=accumulation))))
    data = clf.TrainingData(args, load(None, data=name, loss=loss)[0], PAIRS if loss == "pairwise" else POINT, (1, 1), 0)
    monkeypatch.setattr(common, "world_size", lambda: world)
    for step in range(data.steps_per_epoch):
        texts = []
        for rank in range(world):
            monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
            batches, total = data.micro_batches(step)
            assert len(batches) == accumulation and total == len(data.step_ids(step))
            texts += [ids[:n].tolist() for b in batches if b["weight"].any() for ids, n in zip(b["input_ids"], b["lengths"])]
        assert sorted(texts) == sorted(text.tolist() for i in data.step_ids(step) for text in data.texts(i))


def test_forward_steps_of_one_moment_have_about_equal_token_counts():
    rng = np.random.default_rng(0)
    sizes = np.clip(np.exp(rng.normal(4, 0.7, 256)), 2, 512).astype(int)
    pieces = common.deal(np.arange(256), sizes, 8)
    tokens = [int(sizes[piece].sum()) for piece in pieces]
    assert max(tokens) < 1.3 * min(tokens) and sorted(np.concatenate(pieces).tolist()) == list(range(256))
    padding = 1 - sum(tokens) / sum(len(piece) * sizes[piece].max() for piece in pieces)
    at_random = [piece for piece in np.array_split(rng.permutation(256), 8)]
    assert padding < 0.25 < 1 - sizes.sum() / sum(len(piece) * sizes[piece].max() for piece in at_random)
    assert sorted(map(len, common.deal(np.arange(3), sizes, 5))) == [0, 0, 1, 1, 1]


def test_collate_golden_rows():
    batch = clf.collate([[11, 12, 1], [13]], 9)
    assert batch["input_ids"].tolist() == [[11, 12, 1], [13, 9, 9]] and batch["lengths"].tolist() == [3, 1]
    assert clf.collate([], 9)["input_ids"].tolist() == [[9]] and clf.collate_pairs([])["weight"].tolist() == [0]


# ------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize("words, is_demo", [([], True), (["--seed", "3"], True), (["--model_init_name=x"], False),
                                            (["--model_init_path", "x"], False),
                                            (["--model_pretrain_name", "x"], False), (["--data", "x"], False), (["--ensemble", "x"], False)])
def test_demo_flags_are_used_and_shown_only_where_no_model_and_no_data_are_named(capsys, words, is_demo):
    args = clf.parse_args(words)
    assert ((args.training_run_name, args.model_init_name) == ("clf-demo", "tiny-t5")) == is_demo and args.data_name[0] in ("clf_debug", "x")
    assert ("demo: python clf.py " + " ".join([clf.DEMO, *words]) in capsys.readouterr().out) == is_demo


def test_the_earlier_systems_command_parses_and_finds_its_model(clf_mount, monkeypatch):
    command = "--model_pretrain_name google/flan-t5-xl --data_name 1226verifier_ft_all --max_steps 2001 --eval_steps 2000 --save_steps 2000"
    def found():
        args = clf.parse_args([*command.split(), "--mount_dir", str(clf_mount)])
        return args.model_init_name, args.model_init_path
    assert found() == (None, "google/flan-t5-xl")
    (clf_mount / "models" / "flan-t5-xl").mkdir()
    assert found() == ("flan-t5-xl", None)
    (clf_mount / "models" / "google" / "flan-t5-xl").mkdir(parents=True)
    assert found() == ("google/flan-t5-xl", None)
    args = clf.parse_args(["--model_pretrain_name", "a/b"])
    assert (args.data_name, args.train_batch_size, args.weight_decay, args.learning_rate) == (["clf_debug"], 32, 0.01, 5e-5)
