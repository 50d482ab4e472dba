"""clf.py: scores and losses against transformers and by hand, data, metrics, runs, mistakes."""

import math
import pathlib

import conftest
import numpy as np
import pytest
import test_runs
import torch
import torch.nn.functional as F
from conftest import ROOT, make_causal, make_model, metrics, run, write_data
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DistilBertConfig,
)

import clf
import common


def make(kind):
    """models/<kind>"""
    return make_causal(kind) if kind == "llama" else make_model(kind)


def records(n, start=0):
    """Whether there are more cats than dogs, in texts of very different lengths."""
    found = []
    for i in range(start, start + n):
        rng = np.random.default_rng(i)
        words = rng.choice(["cat", "dog"], size=1 + i % 9)
        found.append({"input": " ".join(words) + f" {i}", "target": float((words == "cat").mean())})
    return found


def preferences(n, start=0):
    return [
        {"prompt": f"say {i}", "replies": ["yes"] + ["no", "a cat", "the dog"][: 1 + i % 3]}
        for i in range(start, start + n)
    ]


SHORT = ["--data", "d", "--training_run_name", "run", "--learning_rate", 1e-3, "--warmup_steps", 2]
SHORT += ["--max_length", 64]


def train(*words):
    return run(*SHORT, *words, module=clf)


def predictions(name="preds.json", folder="run"):
    return conftest.read_json(f"models/{folder}/{name}")


def about(folder="run"):
    return conftest.read_json(f"models/{folder}/rawtune.json")


def plain_logit(path, text):
    """logit(yes) - logit(no) with transformers alone, one text at a time."""
    facts = conftest.read_json(f"{path}/rawtune.json")
    tokenizer = AutoTokenizer.from_pretrained(path)
    input_ids = tokenizer(text, return_tensors="pt").input_ids
    start = {}
    if facts["family"] == "seq2seq":
        model = AutoModelForSeq2SeqLM.from_pretrained(path)
        start["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]])
    else:
        model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        logits = model.eval()(input_ids=input_ids, **start).logits[0, -1]
    words = facts["verbaliser"]
    return float(logits[words["positive_id"]] - logits[words["negative_id"]])


@pytest.mark.parametrize("kind", ["t5", "t5v1.1", "bart", "llama"])
def test_scores_are_those_of_transformers(kind):
    """Trained, saved and loaded again; padded batches and the two columns of the head change
    nothing."""
    make(kind)
    write_data("d", records(40), records(12, 40), test=[{"input": "x"}])
    words = ["--template", r"{input}\nAnswer:", "--max_steps", 4, "--train_batch_size", 8]
    assert train("--model_init_name", kind, *words) == 0
    assert metrics("run", "eval")[-1]["step"] == 4 and about()["threshold"] is not None
    for row in predictions()[:6] + predictions("test_preds.json"):
        logit = plain_logit("models/run", f"{row['orig_d']['input']}\nAnswer:")
        assert row["pred_score"] == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-5)
    # the template, the range and the threshold stay with the model
    pathlib.Path("data/lines.jsonl").write_text('{"input": "cat cat"}\n{"input": "dog"}\n')
    words = ["--no_train", "--model_init_name", "run", "--training_run_name", "scored"]
    assert run(*words, "--data", "lines", module=clf) == 0
    logit = plain_logit("models/run", "cat cat\nAnswer:")
    first, second = predictions(folder="scored")
    assert first["pred_score"] == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-5)
    assert second["orig_d"] == {"input": "dog"}


def test_bf16_models_score_in_fp32():
    make_model("t5")
    write_data("d", records(8), records(40, 8))
    assert train("--model_init_name", "t5", "--precision", "bf16", "--no_train") == 0
    scores = {row["pred_score"] for row in predictions()}
    assert len(scores) > 30 and max(scores) < 1


@pytest.mark.parametrize("layout", [(10, 1), (5, 2)])
def test_loss_and_gradient_of_a_step_are_those_of_the_mean_over_its_texts(layout):
    """Against transformers, one text at a time."""
    path = make_model("t5")
    write_data("d", records(9), records(9))
    words = ["--model_init_name", "t5", "--logging_steps", 1, "--max_steps", 1]
    words += ["--train_batch_size", layout[0], "--gradient_accumulation_steps", layout[1]]
    assert train(*words) == 0
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSeq2SeqLM.from_pretrained(path)
    no_yes = tokenizer.convert_tokens_to_ids(["▁no", "▁yes"])
    start = torch.tensor([[model.config.decoder_start_token_id]])
    loss = 0.0
    for record in records(9):
        input_ids = tokenizer(record["input"], return_tensors="pt").input_ids
        logits = model(input_ids=input_ids, decoder_input_ids=start).logits[0, 0, no_yes]
        target = torch.tensor([1 - record["target"], record["target"]])
        loss = loss - (target * logits.log_softmax(0)).sum() / 9
    loss.backward()
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    row = metrics("run", "train")[0]
    assert row["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(float(torch.nn.utils.get_total_norm(grads)), rel=1e-4)
    assert metrics("run", "eval")[0]["eval/loss"] == pytest.approx(float(loss), rel=1e-5)


def test_pairs_are_those_of_one_prompt_and_weigh_1_together():
    logits = torch.tensor([3.0, 1.0, 0.5, 2.0, 4.0], requires_grad=True)
    example = torch.tensor([0, 0, 1, 1, 1])
    losses = clf.pair_losses(logits, example)

    def one(better, worse):
        return -F.logsigmoid(logits[better] - logits[worse])

    expected = one(0, 1) + (one(2, 3) + one(2, 4) + one(3, 4)) / 3
    assert float(losses.sum()) == pytest.approx(float(expected))
    found = clf.pair_metrics(logits.detach().numpy(), [0, 2, 5])
    assert found["loss"] == pytest.approx(float(expected) / 2)
    assert found["accuracy"] == 0.5 and clf.pair_metrics(np.ones(2), [0, 1, 2]) == {}
    assert clf.pair_metrics(np.ones(2), [0, 2])["accuracy"] == 0.5  # a tie


def test_a_reward_model_learns_which_reply_is_better():
    make_model("t5")
    write_data("d", preferences(60), preferences(9, 60), test=[{"prompt": "say 7", "reply": "no"}])
    words = ["--model_init_name", "t5", "--loss", "pairwise", "--metric_for_best", "accuracy"]
    assert train(*words, "--max_steps", 40, "--eval_steps", 20) == 0
    assert metrics("run", "eval")[-1]["eval/accuracy"] == 1.0
    row = predictions()[2]
    assert row["reward"][0] > max(row["reward"][1:]) and len(row["reward"]) == 4
    single = predictions("test_preds.json")[0]
    assert single["reward"] == pytest.approx(plain_logit("models/run", "say 7\n\nno"), abs=1e-4)
    assert about()["task"] == "preference" and about()["record_layout"]["truncation"] == "start"


# ------------------------------------------------------------------------------------------- data


def examples_of(record, split="train", **changes):
    """(Example, problems)"""
    args = clf.parse_args(["--model_init_name", "x"])
    for name, value in {"template": "{input}", **changes}.items():
        setattr(args, name, str(value))
    problems = []
    clf.complete_flags(args, None, problems)
    return clf.to_example(args, "d", split, record, "here", problems), problems


def test_templates_and_targets():
    example, problems = examples_of({"input": "{kind}", "kind": "b", "target": 0.25})
    assert (example.texts, example.target, problems) == (["{kind}"], 0.25, [])
    record = {"a": "x", "b": "y {a}", "target": 3.5}
    example, _ = examples_of(record, template=r"{b}\n{a}?", target_min=1, target_max=5)
    assert example.texts == ["y {a}\nx?"] and example.target == 0.625
    assert math.isnan(examples_of({"input": "x"}, "eval")[0].target)
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    example, _ = examples_of(pair, template="", loss="pairwise")
    assert example.texts == ["p\n\ngood", "p\n\nbad"] and example.key == "p\n\n"


@pytest.mark.parametrize(
    "record, changes, message",
    [
        ({"text": "x", "label": 1}, {}, "'input' is missing; there is text, label"),
        ({"text": "x", "label": 1}, {}, "'target' is missing; there is text, label"),
        ({"input": "x", "target": "yes"}, {}, "'target' is 'yes', expected a number from 0"),
        ({"input": "x", "target": True}, {}, "'target' is True, expected a number"),
        ({"input": "x", "target": 2}, {}, "0 (a sure no, --target_min) to 1 (a sure yes"),
        ({"input": " ", "target": 1}, {}, "'input' is ' ', expected text"),
        ({"input": 5, "target": 1}, {}, "'input' is 5, expected text"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, {}, "preferences need --loss pairwise"),
        ({"prompt": "p", "chosen": "a"}, {"loss": "pairwise"}, "there is prompt, chosen"),
        ({"prompt": "p", "replies": ["a", "a"]}, {"loss": "pairwise"}, "a list of different texts"),
        ({"prompt": "p", "replies": ["a", 7]}, {"loss": "pairwise"}, "'reply' is 7"),
    ],
)
def test_records_that_are_wrong(record, changes, message):
    template = {"template": ""} if "loss" in changes else {}
    _, problems = examples_of(record, **template, **changes)
    assert message in str(problems)


def test_long_texts_lose_the_end_of_what_was_filled_in_and_preferences_their_beginning():
    args = clf.parse_args(["--model_init_name", "x"])
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny-t5")
    args.template, args.loss, args.max_length = "{input} Answer:", "cross_entropy", 13
    text = "the cat the cat the cat"
    (input_ids,) = clf.tokenize_texts([f"{text} Answer:"], args, tokenizer, True)
    tail = tokenizer("Answer:").input_ids
    whole = tokenizer(text).input_ids
    assert input_ids.tolist() == whole[: 13 - len(tail)] + tail
    args.loss = "pairwise"
    (input_ids,) = clf.tokenize_texts([text], args, tokenizer, True)
    assert input_ids.tolist() == whole[-13:]
    # of a decoder-only model the begin token stays, and no end token stands before the answer
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny-llama")
    plain = tokenizer(text).input_ids
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    special = [(begin, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)]
    adds_end = TemplateProcessing(single=f"{begin} $A {end}", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = adds_end
    args.max_length = 5
    (input_ids,) = clf.tokenize_texts([text], args, tokenizer, False)
    assert tokenizer(text).input_ids == [*plain, tokenizer.eos_token_id]
    assert input_ids.tolist() == [tokenizer.bos_token_id, *plain[-4:]]
    args.loss = "cross_entropy"
    for args.template, end in (("{input}", []), ("{input} dog", tokenizer(" dog").input_ids[1:-1])):
        texts = [args.template.replace("{input}", text)]
        (input_ids,) = clf.tokenize_texts(texts, args, tokenizer, False)
        assert input_ids.tolist() == plain[: 5 - len(end)] + end


def test_answers_are_pieces_where_an_answer_begins():
    args = clf.parse_args(["--model_init_name", "x"])
    args.negative_word, args.positive_word, args.template = "no", "yes", "{input}"
    t5 = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny-t5")
    assert clf.answer_ids(args, t5, True, []) == t5.convert_tokens_to_ids(["▁no", "▁yes"])
    llama = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny-llama")
    found = clf.answer_ids(args, llama, False, [])
    assert llama.convert_ids_to_tokens(found) == ["Ġno", "Ġyes"]
    args.template = "{input}\n"
    problems = []
    found = clf.answer_ids(args, llama, False, problems)
    assert problems or llama.convert_ids_to_tokens(found) == ["no", "yes"]
    args.positive_word = "certainly not"
    clf.answer_ids(args, t5, True, problems)
    assert "'certainly not' is not one piece of the tokenizer" in problems[-1]


# ---------------------------------------------------------------------------------------- metrics


def test_metrics_agree_with_scikit_learn_and_scipy():
    sklearn = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    logits = np.round(rng.normal(size=300), 1)  # with ties
    targets = np.round(1 / (1 + np.exp(-logits - rng.normal(size=300))), 1)
    logits, targets = np.append(logits, 0.0), np.append(targets, np.nan)
    args = clf.parse_args(["--model_init_name", "x"])
    args.target_min, args.target_max, args.threshold = 1.0, 5.0, 3.0
    found = clf.point_metrics(args, logits, targets)
    logits, targets = logits[:-1], targets[:-1]  # the one without a target does not count
    scores, is_yes = 1 / (1 + np.exp(-logits)), targets > 0.5
    expected = {
        "loss": -np.mean(targets * np.log(scores) + (1 - targets) * np.log(1 - scores)),
        "accuracy": sklearn.accuracy_score(is_yes, scores >= 0.5),
        "accuracy_at_threshold": sklearn.accuracy_score(is_yes, scores >= 0.5),
        "f1": sklearn.f1_score(is_yes, scores >= 0.5),
        "auc": sklearn.roc_auc_score(is_yes, logits),
        "brier": np.mean((scores - targets) ** 2),
        "rmse": 4 * np.sqrt(np.mean((scores - targets) ** 2)),
        "pearson": stats.pearsonr(scores, targets)[0],
        "spearman": stats.spearmanr(scores, targets)[0],
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
    tried = [np.mean((scores >= t) == is_yes) for t in [*(np.unique(scores) - 1e-9), 2]]
    assert found["optimal_accuracy"] == pytest.approx(max(tried))
    threshold = (found["optimal_threshold"] - 1) / 4
    assert np.mean((scores >= threshold) == is_yes) == pytest.approx(max(tried))
    gaps = [abs(np.sum((scores - targets)[(scores * 10).astype(int) == b])) for b in range(10)]
    assert found["calibration_error"] == pytest.approx(sum(gaps) / 300)
    one_side = clf.point_metrics(args, logits, np.ones(300))
    assert "auc" not in one_side and "pearson" not in one_side
    assert clf.point_metrics(args, np.full(300, 60.0), targets)["spearman"] == 0
    assert clf.point_metrics(args, logits, np.full(300, np.nan)) == {}


@pytest.mark.parametrize("metric", ["auc", "brier"])
def test_the_best_checkpoint_is_exported_and_a_lower_loss_breaks_ties(metric):
    """auc is 1.0 twice: the checkpoint that is surer of it is the better one."""
    make_model("t5")
    easy = [{"input": word, "target": target} for word, target in (("cat", 1), ("dog", 0))]
    write_data("d", easy * 32, easy)
    words = ["--model_init_name", "t5", "--metric_for_best", metric, "--eval_steps", 10]
    assert train(*words, "--max_steps", 40) == 0
    rows = [row for row in metrics("run", "eval") if row["eval/auc"] == 1.0 and row["step"]]
    best = min(rows, key=lambda row: row["eval/loss"])
    assert len(rows) > 1 and best["eval/brier"] == min(row["eval/brier"] for row in rows)
    exported = pathlib.Path("models/run/model.safetensors").read_bytes()
    checkpoint = pathlib.Path("models/run", f"checkpoint-{best['step']}", "model.safetensors")
    assert exported == checkpoint.read_bytes()
    assert about()["threshold"] == best["eval/optimal_threshold"]


# ------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "words, message",
    [
        (["--template", "no key"], "--template no key: expected keys"),
        (["--template", "{input} "], "end it without a blank"),
        (["--max_length", 300], "--max_length 300: models/llama has 256 positions"),
        (["--target_min", "low"], "--target_min low: expected a number"),
        (["--target_min", "2"], "--target_min: expected less than --target_max"),
        (["--target_max", "inf"], "--target_min: expected less than --target_max"),
        (["--precision", "fp16", "--ds_config", "zero0"], "--precision fp16 needs ZeRO"),
        (["--loss", "pairwise"], "a list of different texts; there is input, target"),
        (["--positive_word", "no"], "are the same piece"),
        (["--data", "x"], "data/x not found; there is: d.json"),
    ],
)
def test_mistakes_are_reported_before_the_model_loads(words, message, refused):
    make("llama")
    write_data("d", records(4), records(2))
    assert message in refused(train, "--model_init_name", "llama", *words)
    assert not pathlib.Path("models/run").exists()


def test_an_encoder_is_refused(refused):
    AutoTokenizer.from_pretrained(ROOT / "models" / "tiny-t5").save_pretrained("models/encoder")
    DistilBertConfig(vocab_size=320).save_pretrained("models/encoder")
    write_data("d", records(4), records(2))
    assert "a distilbert writes no text" in refused(train, "--model_init_name", "encoder")


def test_the_earlier_command_finds_a_folder_or_takes_the_hub_id():
    make_model("t5")
    for name, path in (("google/t5", "models/t5"), ("google/flan-t5-xl", "google/flan-t5-xl")):
        words = ["--model_pretrain_name", name, "--data_name", "1226verifier_ft_all"]
        args = clf.parse_args([*words, "--max_steps", "2001", "--eval_steps", "2000"])
        assert args.model_init_path == path


def test_adapters_train_scores_too():
    make("llama")
    write_data("d", records(20), records(8, 20))
    words = ["--model_init_name", "llama", "--max_steps", 3, "--lora_rank", 2]
    assert train(*words) == 0
    assert about()["adapter"] == "lora"
    before = [row["pred_score"] for row in predictions()]
    words = ["--no_train", "--model_init_name", "run", "--data", "d", "--training_run_name", "s"]
    assert run(*words, module=clf) == 0
    assert [row["pred_score"] for row in predictions(folder="s")] == pytest.approx(before)


@pytest.mark.slow
@pytest.mark.parametrize("kind, loss", [("t5", "cross_entropy"), ("llama", "pairwise")])
def test_ranks_and_stages_agree_and_a_killed_run_continues_to_the_bit(kind, loss):
    """Two ranks at each stage against one; 5 steps, of which the last is short, in two parts."""
    make(kind)
    data = records if loss == "cross_entropy" else preferences
    write_data("d", data(38), data(9, 38))
    words = [*SHORT[:2], *SHORT[4:], "--model_init_name", kind, "--loss", loss]
    words += ["--logging_steps", 1, "--max_steps", 5, "--eval_steps", 2]
    words += ["--gradient_accumulation_steps", 2]
    halves = [*words, "--train_batch_size", 4]
    runs = test_runs.at_stages(halves)
    conftest.finish(conftest.start_many(runs, 2, clf))
    run(*halves, "--training_run_name", "one", module=clf)
    for stage in test_runs.STAGES:
        for key in ("loss", "grad_norm"):
            one = test_runs.losses("one", key)
            assert test_runs.losses(stage, key) == pytest.approx(one, rel=1e-5)
        scores = [row["pred_score"] for row in predictions(folder=stage)]
        expected = [row["pred_score"] for row in predictions(folder="one")]
        assert np.allclose(np.hstack(scores), np.hstack(expected), atol=1e-5)
    whole = [test_runs.bits(stage) for stage in test_runs.STAGES]
    for stage in test_runs.STAGES:  # as if killed behind the checkpoint of step 4
        conftest.shutil.rmtree(f"models/{stage}/checkpoint-5")
        pathlib.Path("models", stage, common.COMPLETE).unlink()
    output = conftest.finish(conftest.start_many(runs, 2, clf))
    assert output.count("from step 4") == 4
    assert [test_runs.bits(stage) for stage in test_runs.STAGES] == whole


@pytest.mark.slow
def test_the_demo_tells_sports_from_other_news():
    for name in ("models/tiny-t5", "data/clf_debug.json"):
        pathlib.Path(name).symlink_to(ROOT / name)
    assert run(module=clf) == 0
    assert metrics("clf-demo", "test")[0]["test/auc"] > 0.98
