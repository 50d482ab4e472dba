"""Score texts by a language model's own yes and no, with DeepSpeed: classification, regression,
reward models. For encoder-decoders (T5, BART) and decoder-only models (Llama, GPT-2).

    {"train": [{"input": "The striker scored twice.", "target": 1}, ...], "eval": [...]}
    {"prompt": "Name a prime number.", "chosen": "7", "rejected": "9"}    with --loss pairwise

    python clf.py                                           # demo, a minute on a laptop
    python clf.py --model_init_path google/flan-t5-base --data mydata \\
        --template 'Is this about sports? {input}'
    python clf.py --no_train --model_init_name myrun --data texts.jsonl       # score a file

Writes models/<training_run_name>/: metrics.jsonl, preds.json, checkpoint-<step>/ to resume from,
and the trained model as a plain Hugging Face folder. docs/clf.md explains every number.

Score: P(yes) = softmax(logit(no), logit(yes))[1], of an encoder-decoder at its first step, of a
decoder-only model behind the text. Loss: the sum of -t log P(yes) - (1 - t) log P(no) over the
texts of an optimizer step (all forward steps, all processes), divided by their number. Of
preferences: of -log sigmoid(z_better - z_worse), z = logit(yes) - logit(no) (Bradley & Terry 1952;
Ouyang et al. 2022, https://arxiv.org/abs/2203.02155).
Shapes: R rows (texts), S tokens of a row, P losses (one a text, or one a pair of replies).
"""

import collections
import functools
import json
import math
import re
import shutil
import sys

import common  # first: it prepares the import of DeepSpeed

# isort: split
import deepspeed
import numpy as np
import torch
import torch.nn.functional as F

from common import SPLITS, log

FLAGS = {  # the first seven, where not given: as the model's rawtune.json says, else LAYOUT
    "template": ("", "the text to score: {keys} are those of the record, \\n a line break"),
    "positive_word": ("", "answer that counts for 1, one piece of the tokenizer; else yes"),
    "negative_word": ("", "answer that counts for 0; else no"),
    "max_length": (0, "tokens; longer texts lose the end of what was filled in; else 512"),
    "target_min": ("", "target that means a sure no; else 0"),
    "target_max": ("", "target that means a sure yes; else 1"),
    "loss": ("", "else cross_entropy", "cross_entropy", "pairwise"),
    "model_pretrain_name": ("", "folder under models/, else a hub id"),
    "train_batch_size": (32, "examples in one forward step of all processes together"),
    "weight_decay": (0.01, "AdamW's, on matrices only"),
}
LAYOUT = {
    "template": "",  # else TEMPLATES
    "positive_word": "yes",
    "negative_word": "no",
    "max_length": 512,
    "target_min": 0.0,
    "target_max": 1.0,
    "loss": "cross_entropy",
}
TEMPLATES = {"cross_entropy": "{input}", "pairwise": "{prompt}\n\n{reply}"}
LOW_IS_BETTER = ("loss", "brier", "rmse", "calibration_error")
DEMO = (
    "--model_init_name tiny-t5 --data clf_debug --training_run_name clf-demo --max_steps 400 "
    "--train_batch_size 64 --learning_rate 0.003 --warmup_steps 40 --eval_steps 100 "
    "--logging_steps 50 --metric_for_best auc"
)
PLACE = r"\{(\w+)\}"  # in a template

# ------------------------------------------------------------------------------------------- data

# key: the text without a reply, by which it is held out; texts: one, or the replies of a preference
# filled in, the best first; target: 0 to 1, nan where there is none
Example = collections.namedtuple("Example", "data_set key texts target record")

# rows: {split: Rows}; examples: {split: [Example]} to evaluate; sizes, amounts: of the training
# part of each data set, see common.Order
Data = collections.namedtuple("Data", "rows examples sizes amounts sha256")


def complete_flags(args, source, problems):
    """Flags that are not given become those that the model was trained with, else LAYOUT. Sets
    args.threshold, from which on the model says yes, or None."""
    known = LAYOUT
    about = common.read_about(source) if source else {}
    if about.get("script") == "clf.py":
        words = about["verbaliser"]
        known = {**about, **about["record_layout"]}
        known["positive_word"] = words["positive"]
        known["negative_word"] = words["negative"]
    args.threshold = known.get("threshold")
    for name, default in LAYOUT.items():
        given = getattr(args, name)
        setattr(args, name, known[name])
        if not given:
            continue
        args.threshold = None  # it was for what the model was trained on
        try:
            setattr(args, name, type(default)(given))
        except ValueError:
            problems.append(f"--{name} {given}: expected a number")
    template = args.template or TEMPLATES[args.loss]
    args.template = template.replace("\\n", "\n")  # as a shell passes it
    keys = re.findall(PLACE, template)
    if not keys or (args.loss == "pairwise" and "reply" not in keys):
        problems.append(f"--template {template}: expected keys, such as {{reply}} or {{input}}")
    if not -math.inf < args.target_min < args.target_max < math.inf:
        problems.append("--target_min: expected less than --target_max")


def find_replies(record, split, problems):
    """The replies of a preference, the best first."""
    if "reply" in record and split != "train":
        return [record["reply"]]  # has a reward, but no rival
    pair = [record.get("chosen"), record.get("rejected")]
    replies = record.get("replies", pair)
    if isinstance(replies, list) and None not in replies:
        if len(set(map(str, replies))) == len(replies) > 1:
            return replies
    expected = "expected chosen and rejected, or replies: a list of different texts"
    problems.append(f"{expected}; there is {', '.join(record)}")
    return []


def find_target(args, record, split, problems):
    """The target of a record in [0, 1], nan where there is none."""
    target = record.get("target")
    low = args.target_min
    high = args.target_max
    if type(target) in (int, float) and low <= target <= high:
        return (target - low) / (high - low)
    expected = f"{low:g} (a sure no, --target_min) to {high:g} (a sure yes, --target_max)"
    problem = f"'target' is {target!r:.40}, expected a number from {expected}"
    if "target" not in record:
        problem = common.text_problem(None, "target", record)
        problem += "; preferences need --loss pairwise"
    if target is not None or split == "train":
        problems.append(problem)
    return math.nan


def fill(template, record):
    """("Is {input} {kind}?", {"input": "a goal", "kind": "sports"}) -> "Is a goal sports?"."""
    return re.sub(PLACE, lambda place: str(record.get(place[1])), template)


def to_example(args, data_set, split, record, where, problems):
    """The Example of a record of a data file; what is wrong with it goes to problems."""
    found = []
    target = math.nan
    versions = [record]
    if args.loss == "pairwise":
        versions = [{**record, "reply": reply} for reply in find_replies(record, split, found)]
    else:
        target = find_target(args, record, split, found)
    texts = []
    for version in versions:
        texts.append(fill(args.template, version))
        for name in re.findall(PLACE, args.template):
            problem = common.text_problem(version.get(name), name, version)
            if problem:
                found.append(f"{problem}; --template names the keys")
    # what is wrong with each reply is said once
    problems += [(where, problem) for problem in dict.fromkeys(found)]
    key = fill(args.template, {**record, "reply": ""})
    return Example(data_set, key, texts, target, record)


def read_examples(args, problems):
    """({split: [Example]} of all data sets of --data, {name: amount of it in an epoch})"""
    examples = {split: [] for split in SPLITS}
    records, amounts = common.read_data_sets(args, problems)
    splits = {split for _, _, split, _ in records}
    for data_set, where, split, record in records:
        if args.no_train and splits == {"train"}:  # a file to score says nothing of splits
            split = "eval"
        example = to_example(args, data_set, split, record, where, problems)
        if split == "train" and common.is_held_out(args, example.key):
            split = "eval"
        examples[split].append(example)
    return examples, amounts


def tokenize_texts(texts, args, tokenizer, has_encoder):
    """[input_ids]. A text that is too long loses the end of what was filled in: the template's
    words behind it stay. Of a preference all replies would be equal: it loses its beginning."""
    tail = args.template.rpartition("}")[2]
    rows = common.tokenize(tokenizer, [*texts, tail, "a"])
    if not has_encoder and rows[-1][-1] == tokenizer.eos_token_id:  # but the answer comes next
        rows = [input_ids[:-1] for input_ids in rows]
    *rows, tail_ids, letter = rows
    start = int(letter[0] == tokenizer.bos_token_id)  # where the cut begins
    if args.loss != "pairwise":
        start = max(0, args.max_length + start - len(tail_ids))
    n_cut = 0
    for i, input_ids in enumerate(rows):
        n_over = len(input_ids) - args.max_length
        if n_over > 0:
            rows[i] = np.delete(input_ids, slice(start, start + n_over))
            n_cut += 1
    if n_cut:
        log(f"WARNING {n_cut} of {len(rows)} texts are cut to --max_length {args.max_length}")
    return rows


def tokenize(examples, args, tokenizer, config):
    """{name: array}, as Data reads them, of {split: [Example]}."""
    arrays = {}
    for split in SPLITS:
        texts, targets, bounds = [], [], [0]
        for example in examples[split]:
            texts += example.texts
            targets.append(example.target)
            bounds.append(len(texts))
        input_ids = tokenize_texts(texts, args, tokenizer, config.is_encoder_decoder)
        arrays.update(common.Ragged.arrays(f"{split}_input_ids", input_ids))
        arrays[f"{split}_targets"] = np.array(targets, float)
        arrays[f"{split}_bounds"] = np.array(bounds)
    return arrays


class Rows:
    """The tokenised texts of a split; an example has one, or of a preference one for each reply."""

    def __init__(self, split, arrays):
        self.input_ids = common.Ragged(f"{split}_input_ids", arrays)
        self.targets = arrays[f"{split}_targets"]  # (examples,)
        self.bounds = arrays[f"{split}_bounds"]  # (examples + 1,), where the rows of each begin
        starts = self.bounds[:-1]
        longest = np.maximum.reduceat(self.input_ids.lengths, starts)
        total = np.add.reduceat(self.input_ids.lengths, starts)
        self.lengths = np.stack([longest, total], axis=1)  # (examples, 2), in tokens

    def texts(self, i):
        """The rows of input_ids that example i has."""
        return range(*self.bounds[i : i + 2])


def load_records(args, tokenizer, config, problems):
    """Collective. Data of --data: every process reads the texts, one of each node tokenises."""
    examples, amounts = read_examples(args, problems)
    sizes = [] if problems else common.check_examples(args, examples, amounts, problems)
    if problems:  # the model's included: without one there is no tokenizer
        return None
    build = functools.partial(tokenize, examples, args, tokenizer, config)
    arrays = common.on_one_process(build)
    rows = {split: Rows(split, arrays) for split in SPLITS}
    del examples["train"]  # from here on its token ids are enough
    return Data(rows, examples, sizes, list(amounts.values()), common.sha256_of(arrays))


# ------------------------------------------------------------------------------- rows and batches


def collate(texts):
    """[input_ids] -> input_ids (R, S), padded at the right with 0, which no answer sees, and
    lengths (R,). A rank without texts computes one padding token along."""
    lengths = [len(text) for text in texts] or [1]
    input_ids = np.zeros((len(lengths), max(lengths)), int)
    for r, text in enumerate(texts):
        input_ids[r, : len(text)] = text
    return common.to_tensors({"input_ids": input_ids, "lengths": lengths})


class TrainingData:
    """The forward steps of optimizer step k on this rank, a function of (seed, k) and layout."""

    def __init__(self, args, data):
        self.args = args
        self.rows = data.rows["train"]
        batch = args.train_batch_size * args.gradient_accumulation_steps
        self.order = common.Order(args.seed, batch, data.sizes, data.amounts)

    def forward_steps(self, step):
        """([batch] of this rank, examples of the whole step, share of padding on this rank)"""
        lengths = self.rows.lengths
        ids = self.order.step_ids(step, lengths)
        world = common.world_size()
        n_pieces = world * self.args.gradient_accumulation_steps
        pieces = common.deal(ids, lengths[:, 1], n_pieces)
        mine = pieces[common.rank() :: world]  # what the ranks compute at once is of like size
        batches = [self.make_batch(piece) for piece in mine]
        n_computed = sum(batch["input_ids"].numel() for batch in batches)
        padding_share = 1 - float(lengths[np.concatenate(mine), 1].sum()) / n_computed
        return batches, len(ids), padding_share

    def make_batch(self, ids):
        """As `collate`, with the targets (R,), and the example (R,) of each row, from 0."""
        texts = []
        example = []
        for k, i in enumerate(ids):
            row_ids = self.rows.texts(i)
            texts += [self.rows.input_ids[row] for row in row_ids]
            example += [k] * len(row_ids)
        batch = collate(texts)
        batch["example"] = torch.tensor(example)
        batch["targets"] = torch.tensor(self.rows.targets[ids]).float()
        return batch


# --------------------------------------------------------------------------------- model and loss


class YesNo(torch.nn.Module):
    """What the engine wraps: forward(batch) -> (R,) fp32 logit(yes) - logit(no).

    The model's own forward runs as it is, but its head computes two columns instead of V, in fp32:
    a bf16 logit of 10 has steps of 0.06, too coarse to rank by.
    """

    def __init__(self, model, no_yes, device):
        super().__init__()
        self.model = model
        self.last = None  # where a decoder-only model answers
        self.register_buffer("no_yes", torch.tensor(no_yes, device=device), persistent=False)
        self.head = [model.get_output_embeddings()]  # in a list: it is no second module
        self.head[0].forward = self.two_columns  # still called as a module: ZeRO-3 gathers it

    def two_columns(self, hidden_states):
        """(R, S, D) -> (R, 1, V), 0 but for no and yes."""
        head = self.head[0]
        if self.last is not None:
            hidden_states = hidden_states[self.last].unsqueeze(1)
        weight = head.weight[self.no_yes].float()
        # (R, 2), not by a matmul, which autocast would run in bf16
        columns = (hidden_states.float() * weight).sum(2)
        if getattr(head, "bias", None) is not None:
            columns = columns + head.bias[self.no_yes]
        logits = columns.new_zeros(len(columns), len(head.weight))
        return logits.index_copy(1, self.no_yes, columns).unsqueeze(1)

    def forward(self, batch):
        input_ids = batch["input_ids"]
        lengths = batch["lengths"]
        inputs = {"input_ids": input_ids}
        config = self.model.config
        if config.is_encoder_decoder:
            start = config.decoder_start_token_id
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            inputs["attention_mask"] = positions < lengths[:, None]
            inputs["decoder_input_ids"] = torch.full_like(input_ids[:, :1], start)
        else:
            # what follows the last token cannot change it, so padding needs no mask
            rows = torch.arange(len(lengths), device=lengths.device)
            self.last = (rows, lengths - 1)
        logits = self.model(**inputs, use_cache=False).logits
        assert logits.shape[1] == 1, "this family does not call its head"
        return logits[:, 0, self.no_yes].diff().squeeze(1)  # yes - no


def pair_losses(logits, example):
    """(R,) logits of replies, the best of an example first -> (P,) losses of all pairs of replies
    to the same prompt, which together weigh 1 (Ouyang et al. 2022)."""
    is_same = example[:, None] == example  # (R, R)
    better, worse = is_same.triu(1).nonzero(as_tuple=True)
    n_replies = is_same.sum(dim=1)[better]
    n_pairs = n_replies * (n_replies - 1) / 2
    return F.softplus(logits[worse] - logits[better]) / n_pairs


def losses(logits, batch, kind):
    """(R,) logits -> (P,)"""
    example = batch["example"]
    logits = logits[: len(example)]  # not of the padding that a rank computes along
    if kind == "pairwise":
        return pair_losses(logits, example)
    return F.binary_cross_entropy_with_logits(logits, batch["targets"], reduction="none")


# ------------------------------------------------------------------------------------- evaluation


def sigmoid(logits):
    """Exact also where exp would overflow."""
    return np.exp(-np.logaddexp(0, -logits))


def ranks(values):
    """Ties share their mean. [3, 1, 3] -> [2.5, 1, 2.5]."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts)
    mean_rank = last_rank - (counts - 1) / 2
    return mean_rank[inverse]


def roc_auc(scores, is_positive):
    """Probability that a yes scores above a no, ties half (Mann & Whitney 1947)."""
    rank = ranks(scores)
    gap = rank[is_positive].mean() - rank[~is_positive].mean()
    return 0.5 + gap / len(rank)


def calibration_error(scores, targets):
    """Mean over ten bins, weighted by their texts, of |mean score - mean target|, as Guo et al.
    2017."""
    bins = np.minimum(scores * 10, 9).astype(int)
    gaps = np.bincount(bins, scores - targets)
    return np.abs(gaps).sum() / len(scores)


def best_threshold(scores, is_positive):
    """The score from which on "yes" is right most often: halfway to its lower neighbour."""
    values, inverse = np.unique(scores, return_inverse=True)
    gains = np.bincount(inverse, 1 - 2 * is_positive)  # of a no to a value
    gains_below = np.append(0, np.cumsum(gains))
    i = np.argmax(gains_below)
    bounds = [0.0, *values, 1.0]
    return (bounds[i] + bounds[i + 1]) / 2


def point_metrics(args, logits, targets):
    """Metrics of (n,) logits against (n,) targets in [0, 1]; texts without one (nan) do not count.
    rmse and thresholds are in the unit of the records."""
    has_target = ~np.isnan(targets)
    logits = logits[has_target]
    targets = targets[has_target]
    if not len(targets):
        return {}
    scores = sigmoid(logits)
    is_positive = targets > 0.5
    is_predicted = scores >= 0.5
    low = args.target_min
    span = args.target_max - low
    losses = np.logaddexp(0, logits) - targets * logits
    n_hits = np.sum(is_predicted & is_positive)
    n_yes = is_predicted.sum() + is_positive.sum()
    brier = np.mean((scores - targets) ** 2)
    threshold = best_threshold(scores, is_positive)
    is_optimal = (scores >= threshold) == is_positive
    metrics = {
        "loss": losses.mean(),
        "accuracy": np.mean(is_predicted == is_positive),
        "f1": 2 * n_hits / max(1, n_yes),
        "brier": brier,
        "rmse": span * math.sqrt(brier),
        "calibration_error": calibration_error(scores, targets),
        "optimal_threshold": low + span * threshold,
        "optimal_accuracy": is_optimal.mean(),
    }
    if 0 < is_positive.mean() < 1:
        metrics["auc"] = roc_auc(logits, is_positive)
    if np.ptp(targets):  # of scores that are all the same: nan, counted as 0
        metrics["pearson"] = np.nan_to_num(np.corrcoef(scores, targets)[0, 1])
        metrics["spearman"] = np.nan_to_num(np.corrcoef(ranks(logits), ranks(targets))[0, 1])
    if args.threshold is not None:  # chosen on other texts: an honest figure
        is_predicted = low + span * scores >= args.threshold
        metrics["accuracy_at_threshold"] = np.mean(is_predicted == is_positive)
    return metrics


def pair_metrics(logits, bounds):
    """Means over examples, each with the rows from one bound to the next, the best reply first;
    single replies do not count."""
    losses = []
    accuracies = []
    for rewards in np.split(logits, bounds[1:-1]):
        better, worse = np.triu_indices(len(rewards), 1)
        if len(better):
            margins = rewards[better] - rewards[worse]
            losses.append(np.logaddexp(0, -margins).mean())
            accuracies.append(np.heaviside(margins, 0.5).mean())  # ties half
    if not losses:
        return {}
    return {"loss": np.mean(losses), "accuracy": np.mean(accuracies)}


@torch.no_grad()
def score(args, engine, input_ids):
    """Collective. (texts,) logits of a Ragged, on every rank."""
    found = {}
    engine.eval()
    for ids in common.my_batches(input_ids.lengths, args.eval_batch_size):
        batch = collate([input_ids[i] for i in ids])
        logits = engine(common.to_device(batch, engine.device))
        found.update(zip(ids, logits.tolist()))
    engine.train()
    found = common.gather(found)
    logits = np.array([found[i] for i in sorted(found)])
    if not np.isfinite(logits).all():
        common.fail("scores are not finite: try --precision fp32")
    return logits


def write_predictions(args, examples, rows, logits, name, run):
    span = args.target_max - args.target_min
    scores = args.target_min + span * sigmoid(logits)
    predictions = []
    for i, example in enumerate(examples):
        texts = rows.texts(i)
        if len(texts) == 1:
            texts = texts[0]
        row = {
            "orig_d": example.record,
            "pred_score": scores[texts].tolist(),
            "dataset": example.data_set,
        }
        if args.loss == "pairwise":
            row["reward"] = logits[texts].tolist()
        predictions.append(row)
    common.write_json(run.dir / name, predictions)


def evaluate(args, engine, data, split, run):
    """Collective. Metrics over all examples of `split`, each counted once; the predictions file."""
    rows = data.rows[split]
    logits = score(args, engine, rows.input_ids)
    if args.loss == "pairwise":
        metrics = pair_metrics(logits, rows.bounds)
    else:
        metrics = point_metrics(args, logits, rows.targets)
    if common.rank() == 0:
        name = f"checkpoint-{run.step}-preds.json"
        if split == "test":
            name = "test_preds.json"
        elif args.no_train:
            name = "preds.json"
        write_predictions(args, data.examples[split], rows, logits, name, run)
    return metrics


# --------------------------------------------------------------------------------------- training


def answer_ids(args, tokenizer, has_encoder, problems):
    """[id of no, id of yes], each the one piece that the word is where an answer begins: of a
    decoder-only model after a blank, unless the template ends with a line break."""
    context = ""
    if not has_encoder:
        context = "a:\n" if args.template.endswith("\n") else "a: "
    n_before = len(tokenizer.tokenize(context.rstrip(" ")))
    found = []
    for word in (args.negative_word, args.positive_word):
        pieces = tokenizer.tokenize(context + word)[n_before:]
        ids = tokenizer.convert_tokens_to_ids(pieces)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            problems.append(f"the answer {word!r} is not one piece of the tokenizer: {pieces}")
        found += ids[:1]
    if found[:1] == found[1:]:
        problems.append("--positive_word and --negative_word are the same piece")
    return found


def check_model(args, source, config, tokenizer, problems):
    if "MaskedLM" in str(config.architectures):
        problems.append(f"{source} is an encoder: expected a model that writes text")
    if not config.is_encoder_decoder and args.template.endswith(" "):
        problems.append("--template: end it without a blank, which belongs to the answer")
    n_positions = common.count_positions(config)
    if args.max_length > n_positions:
        problems.append(f"--max_length {args.max_length}: {source} has {n_positions} positions")
    answer_ids(args, tokenizer, config.is_encoder_decoder, problems)


def prepare(args):
    """All that can be wrong, found and reported together before any weight is loaded."""
    problems = []
    ds_config = None
    common.check_shared_args(args, (), problems)
    source, config, tokenizer = common.open_model(args, problems)
    complete_flags(args, source, problems)
    if config:
        check_model(args, source, config, tokenizer, problems)
        ds_config = common.make_ds_config(args, common.auto_class_of(config), config, problems)
    data = load_records(args, tokenizer, config, problems)
    run = common.Run(args, set(), ds_config, data and data.sha256, problems)
    if problems:
        common.fail(problems)
    return source, config, tokenizer, ds_config, data, run


def main(args):
    # 1 data and model
    device = common.setup_distributed(args)
    rank = common.rank()
    world = common.world_size()
    source, config, tokenizer, ds_config, data, run = prepare(args)
    train_data = TrainingData(args, data)
    steps_per_epoch = train_data.order.steps_per_epoch
    max_steps = args.max_steps or math.ceil(args.num_epochs * steps_per_epoch)
    run.start(__file__, max_steps, steps_per_epoch)
    auto_class = common.auto_class_of(config)
    model = common.load_model(auto_class, source, config, args, ds_config, tokenizer)
    no_yes = answer_ids(args, tokenizer, config.is_encoder_decoder, [])

    # 2 engine
    engine, *_ = deepspeed.initialize(
        model=YesNo(model, no_yes, device),
        optimizer=None if args.no_train else common.make_adamw(model, args),
        config=ds_config,
    )
    run.resume(engine)

    def evaluation(split):
        return evaluate(args, engine, data, split, run)

    if args.no_train:
        for split in ("eval", "test"):
            if data.examples[split]:
                run.log(split, evaluation(split))
        log(f"{run.dir} has the predictions")
        return 0
    args.threshold = None  # it was of the weights that training starts from
    is_pairwise = args.loss == "pairwise"
    about = {  # for all that read the model
        "format": 1,
        "script": "clf.py",
        "task": "preference" if is_pairwise else "score",
        "family": "seq2seq" if config.is_encoder_decoder else "causal",
        "record_layout": {
            "template": args.template,
            "max_length": args.max_length,
            "truncation": "start" if is_pairwise else "end",
        },
        "loss": args.loss,
        "verbaliser": {
            "positive": args.positive_word,
            "negative": args.negative_word,
            "positive_id": no_yes[1],
            "negative_id": no_yes[0],
        },
        "target_min": args.target_min,
        "target_max": args.target_max,
        "threshold": None,
        "base": {"path": source, "sha256": None},
        "adapter": "none",
        "quantize": None,
    }
    if rank == 0 and hasattr(model, "adapter"):
        about.update(model.adapter.about())

    if run.eval_is_due():  # the baseline, or what a stop left out
        run.evaluated(evaluation("eval"), LOW_IS_BETTER)

    # 3 loop: the forward steps of a step are a pure function of (seed, step)
    last_step = run.step if run.finished() else max_steps  # finished: killed before its export
    steps = common.ahead(train_data.forward_steps, run.step, last_step)
    for step, (batches, n_examples, padding_share) in steps:
        lr = common.set_lr(engine, step, args, max_steps)
        # seeded by the step, so that a checkpoint needs no state of random numbers
        torch.manual_seed(common.derive_seed(args.seed, "dropout", step, rank))
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            engine.set_gradient_accumulation_boundary(is_last)
            batch = common.to_device(batch, device)
            logits = engine(batch)  # (R,)
            forward_loss = losses(logits, batch, args.loss).sum()
            # DeepSpeed averages over the processes, hence x world
            engine.backward(forward_loss * (world / n_examples))
            loss_sum += forward_loss.detach()
        # one exchange: every rank learns the loss of the step, and whether any rank has to stop
        loss_sum, n_stop, grad_norm = common.step_totals(engine, loss_sum, run.must_stop())
        engine.step()
        loss = loss_sum / n_examples
        grad_norm = common.check_step(engine, args, step, loss, grad_norm)
        run.stepped(loss, n_examples, lr=lr, padding_share=padding_share, grad_norm=grad_norm)
        if run.save_is_due() or n_stop:
            common.save_checkpoint(engine, model, tokenizer, run, about)
        if run.eval_is_due() and not n_stop:  # after saving: it may run out of memory
            run.evaluated(evaluation("eval"), LOW_IS_BETTER)
        if n_stop:
            log(f"saved at step {run.step}: the same command, without --overwrite, continues")
            return common.EXIT_SAVED
        if run.finished():
            break

    # 4 export: the best checkpoint or the last one, tested once
    chosen = run.chosen()
    state = json.loads((chosen / "state.json").read_text())
    args.threshold = state["metrics"].get("optimal_threshold")
    if data.examples["test"]:
        common.load_checkpoint(engine, run.chosen())
        run.log("test", evaluation("test"))
    if rank == 0:
        about["threshold"] = args.threshold
        common.write_json(chosen / "rawtune.json", about)
        shutil.copy(run.dir / f"{chosen.name}-preds.json", run.dir / "preds.json")
        common.export(run)
    return 0


def parse_args(argv):
    args = common.Parser(__doc__, FLAGS, DEMO).parse_args(argv)
    name = args.model_pretrain_name
    if name and not (args.model_init_name or args.model_init_path):
        folder = common.mount(args) / "models" / name.split("/")[-1]
        args.model_init_path = str(folder) if folder.is_dir() else name
    return args


if __name__ == "__main__":
    common.launch(main, parse_args(sys.argv[1:]))
