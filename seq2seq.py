"""Train an encoder-decoder (T5, Flan-T5, mT5, ByT5, BART) on prompts and completions, or a T5 on
plain text by span corruption, with DeepSpeed.

    {"train": [{"prompt": "4 March 1997", "completion": "1997-03-04"}, ...], "eval": [...]}

    python seq2seq.py                                      # demo, 2 minutes on a laptop
    python seq2seq.py --model_init_path google/flan-t5-base --data mydata
    deepspeed --num_gpus 4 seq2seq.py --model_init_name flan-t5-xxl --data mydata

Writes models/<training_run_name>/: metrics.jsonl, predictions, checkpoint-<step>/ to resume from,
and the trained model as a plain Hugging Face folder. docs/seq2seq.md explains every number.

Loss: the sum of -log p(token | prompt, tokens before) over all target tokens of an optimizer step
(all forward steps, all processes), divided by their number.
Shapes: R rows, S source tokens, T target tokens of a row, N target tokens, D hidden, V vocabulary.
"""

import collections
import functools
import hashlib
import json
import math
import re
import string
import sys

import common  # first: it prepares the import of DeepSpeed

# isort: split
import deepspeed
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

from common import SPLITS, log

METRICS = (
    *("exact_match", "token_f1", "accuracy", "f1", "matthews"),
    *("pearson", "spearman", "rouge1", "rougeL"),
)
FLAGS = {
    "objective": ("completion", "of the training", "completion", "span_corruption"),
    "input_length": (512, "span corruption: tokens of the encoder"),
    "noise_density": (0.15, "span corruption: share of the text that is masked"),
    "mean_noise_span_length": (3.0, "span corruption: tokens of a masked span"),
    "max_source_length": (1024, "longer prompts lose their end"),
    "max_target_length": (512, "longer completions lose their end, and are not taught to stop"),
    "max_new_tokens": (512, "generation limit at evaluation"),
    "temperature": (0.001, "of sampling at evaluation; <= 0.001 is greedy"),
    "n_samples": (1, "generations per prompt; metrics take the first"),
    "metrics": (["exact_match", "token_f1"], f"of generations: {', '.join(METRICS)}", *METRICS),
    "labels": ([], "for f1 and matthews: the negative and the positive answer"),
    "optimizer": ("adamw", "adafactor: at ZeRO stage 0", "adamw", "adafactor"),
}
POSITIVE_FLAGS = (
    *("input_length", "mean_noise_span_length", "max_source_length", "max_target_length"),
    *("max_new_tokens", "n_samples"),
)
# may differ when a run goes on: they only concern evaluation
FREE_FLAGS = {"max_new_tokens", "temperature", "n_samples", "metrics", "labels"}
DEMO = (
    "--model_init_name tiny-t5 --data dates --training_run_name dates-demo --max_steps 800 "
    "--train_batch_size 128 --learning_rate 0.004 --warmup_steps 100 --eval_steps 400 "
    "--eval_batch_size 200 --max_new_tokens 16 --logging_steps 50"
)
T5_FAMILY = ("t5", "mt5")  # relative positions: several examples may share a row behind masks
EXAMPLES_PER_ROW = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # that `pack` considers
MAX_LOGITS = 2**27 if torch.cuda.is_available() else 2**26  # that exist at once
EVALUATION_EPOCH = 2**32  # of noise: one that training never reaches
NEVER = -1e9  # added to the attention score of a token that must not be seen
NUMBER = r"\s*-?\d+(\.\d+)?\s*"
GREEDY = 0.001  # the highest --temperature that means: take the likeliest token

# ------------------------------------------------------------------------------------------- data

# prompts, completions, references: lists of texts, of which training draws one of each per epoch
# and evaluation takes the first prompt and the best reference; key: the prompt, by which it is held
# out; record: as in the file
Example = collections.namedtuple("Example", "data_set key prompts completions references record")

# rows: {split: Rows or Spans}; examples: {split: [Example]} to evaluate, none of a corpus;
# sizes, amounts: of the training part of each data set, see common.Order
Data = collections.namedtuple("Data", "rows examples sizes amounts sha256")


def as_list(value):
    return value if isinstance(value, list) else [value]


def to_example(data_set, record, where, problems):
    """The Example of a record of a data file; what is wrong with it goes to problems."""
    prompt, completion = record.get("prompt"), record.get("completion")
    if "instruction" in record:  # Alpaca's names
        completion = record.get("output")
        prompt = record["instruction"]
        if record.get("input"):
            prompt = f"{prompt}\n\n{record['input']}"
    prompts, completions = as_list(prompt), as_list(completion)
    references = as_list(record.get("references", completions))
    lists = {"prompt": prompts, "completion": completions}
    if "references" in record:
        lists["references"] = references
    for name, texts in lists.items():
        if not texts:
            problems.append((where, f"{name!r} is an empty list"))
        for text in texts:
            problem = common.text_problem(text, name, record)
            if problem:
                problems.append((where, problem))
    key = prompts[0] if prompts else None
    return Example(data_set, key, prompts, completions, references, record)


def answer_problem(example, args):
    """What the metrics cannot do with an example to evaluate, or None."""
    answer = str(example.references[0])
    if args.labels and answer not in args.labels:
        return f"the completion is none of --labels {' '.join(args.labels)}"
    if {"pearson", "spearman"} & set(args.metrics) and not re.fullmatch(NUMBER, answer):
        return "the completion is no number, which --metrics pearson and spearman need"
    return None


def read_examples(args, problems):
    """({split: [Example]} of all data sets of --data, {name: amount of it in an epoch})"""
    examples = {split: [] for split in SPLITS}
    records, amounts = common.read_data_sets(args, problems)
    for data_set, where, split, record in records:
        n_before = len(problems)
        example = to_example(data_set, record, where, problems)
        if len(problems) > n_before:
            continue
        if split == "train" and common.is_held_out(args, example.key):
            split = "eval"
        examples[split].append(example)
        problem = answer_problem(example, args)
        if problem and split != "train":
            problems.append((where, problem))
    return examples, amounts


def decode(tokenizer, ids):
    """The text of an answer. Only pad, begin and end are dropped: others may be its content."""
    dropped = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return tokenizer.decode([i for i in ids if i not in dropped])


def tokenize_prompts(prompts, tokenizer, max_length):
    """[input_ids]. A prompt that is cut keeps its last token, the end."""
    rows = common.tokenize(tokenizer, prompts)
    n_cut = 0
    for i, input_ids in enumerate(rows):
        if len(input_ids) > max_length:
            rows[i] = np.append(input_ids[: max_length - 1], input_ids[-1])
            n_cut += 1
    if n_cut:
        log(f"WARNING {n_cut} of {len(rows)} prompts are cut to --max_source_length {max_length}")
    return rows


def tokenize_completions(completions, tokenizer, max_length):
    """[labels], each with an end token unless it is cut."""
    rows = common.tokenize(tokenizer, completions)
    n_cut = n_lossy = 0
    for i, labels in enumerate(rows):
        # blanks may come and go beside tokens such as <extra_id_0>: nothing is lost by that
        answer = decode(tokenizer, labels).replace(" ", "")
        n_lossy += answer != completions[i].replace(" ", "")
        if labels[-1] != tokenizer.eos_token_id:
            labels = np.append(labels, np.int32(tokenizer.eos_token_id))
        n_cut += len(labels) > max_length
        # one that is cut loses its end token too, or the model would learn to stop there
        rows[i] = labels[:max_length]
    if n_cut:
        log(f"WARNING {n_cut} completions are cut to --max_target_length {max_length}")
    if n_lossy:  # unknown characters, newlines in T5's vocabulary: the model can never write them
        log(f"WARNING the vocabulary cannot spell {n_lossy} of {len(rows)} completions exactly")
    return rows


def tokenize(examples, args, tokenizer):
    """{name: array}, as Data reads them, of {split: [Example]}."""
    arrays = {}
    for split in SPLITS:
        prompts, completions, choices = [], [], []
        for example in examples[split]:
            prompts += example.prompts
            completions += example.completions
            choices.append((len(example.prompts), len(example.completions)))
        input_ids = tokenize_prompts(prompts, tokenizer, args.max_source_length)
        labels = tokenize_completions(completions, tokenizer, args.max_target_length)
        arrays[f"{split}_choices"] = np.array(choices, np.int64).reshape(-1, 2)
        arrays.update(common.Ragged.arrays(f"{split}_input_ids", input_ids))
        arrays.update(common.Ragged.arrays(f"{split}_labels", labels))
    return arrays


class Rows:
    """The tokenised prompts and completions of a split; an example has one or more of each."""

    def __init__(self, split, arrays):
        self.input_ids = common.Ragged(f"{split}_input_ids", arrays)
        self.labels = common.Ragged(f"{split}_labels", arrays)
        self.choices = arrays[f"{split}_choices"]  # (examples, 2), how many of each
        self.choose(0)

    def start_epoch(self, seed, epoch):
        """Draw one prompt and one completion of every example."""
        rng = np.random.default_rng([3, seed, epoch])
        self.choose(rng.integers(2**31, size=self.choices.shape))

    def choose(self, draws):
        """draws: (examples, 2), or 0 for the firsts. Sets .lengths, (examples, 2) in tokens."""
        offsets = np.cumsum(self.choices, axis=0) - self.choices
        self.chosen = offsets + draws % self.choices
        source_lengths = self.input_ids.lengths[self.chosen[:, 0]]
        target_lengths = self.labels.lengths[self.chosen[:, 1]]
        self.lengths = np.stack([source_lengths, target_lengths], axis=1)

    def fetch(self, ids):
        """({example: input_ids}, {example: labels})"""
        sources, targets = {}, {}
        for i in ids:
            source_row, target_row = self.chosen[i]
            sources[i] = self.input_ids[source_row]
            targets[i] = self.labels[target_row]
        return sources, targets


def load_records(args, tokenizer, problems):
    """Collective. Data of --data: every process reads the texts, one of each node tokenises."""
    examples, amounts = read_examples(args, problems)
    sizes = [] if problems else common.check_examples(args, examples, amounts, problems)
    if problems:  # the model's included: without one there is no tokenizer
        return None
    build = functools.partial(tokenize, examples, args, tokenizer)
    arrays = common.on_one_process(build)
    rows = {split: Rows(split, arrays) for split in SPLITS}
    del examples["train"]  # from here on its token ids are enough
    return Data(rows, examples, sizes, list(amounts.values()), common.sha256_of(arrays))


# ------------------------------------------------------------------------------- rows and batches


def spread(order, lengths, n_rows):
    """([[example]], filled (n_rows, 2)): each example goes to the row whose fuller side is then the
    least full, source or target, in shares of all tokens."""
    total = lengths[order].sum(axis=0)
    filled = np.zeros((n_rows, 2))
    rows = [[] for _ in range(n_rows)]
    for i in order:
        share = (filled + lengths[i]) / total  # (n_rows, 2), if the example went there
        fullest = share.max(axis=1)
        tie_break = 1e-3 * share.sum(axis=1)
        best = int(np.argmin(fullest + tie_break))
        filled[best] += lengths[i]
        rows[best].append(int(i))
    return rows, filled


def pack(ids, lengths, d_model):
    """Rows of example numbers that cost little to compute, one or several examples each.

    Cost of R rows of L = S + T tokens: R L (1 + L / 2 d_model), the second part being attention,
    and 4 x padding. lengths: (examples, 2).
    """
    longer_side = lengths[ids].max(axis=1)
    longest_first = ids[np.argsort(-longer_side, kind="stable")]
    n_tokens = lengths[ids].sum()
    best_cost = math.inf
    best_rows = []
    for per_row in EXAMPLES_PER_ROW:
        n_rows = math.ceil(len(ids) / per_row)
        rows, filled = spread(longest_first, lengths, n_rows)
        row_length = filled.max(axis=0).sum()
        n_computed = n_rows * row_length
        n_padding = n_computed - n_tokens
        attention = row_length / (2 * d_model)
        cost = n_computed * (1 + attention) + 4 * n_padding
        if cost >= best_cost:
            break
        best_cost = cost
        best_rows = rows
    return best_rows


def pad(rows, fill):
    """Arrays of several lengths -> (rows, the longest of them, at least 1)."""
    longest = max(1, max(len(row) for row in rows))
    padded = np.full((len(rows), longest), fill)
    for r, row in enumerate(rows):
        padded[r, : len(row)] = row
    return padded


def flat(lists):
    return np.concatenate([np.zeros(0, np.int64), *lists])


def segments(lists):
    """[[7, 8, 9], [4]] -> [1 1 1 2]: which list each element is from."""
    return np.repeat(np.arange(len(lists)) + 1, [len(ids) for ids in lists])


def collate(rows, sources, targets, config):
    """Rows of example numbers -> tensors; sources, targets: {example: token ids}.

    input_ids, segment (R, S) and decoder_input_ids, decoder_segment (R, T): a segment is the place
    of an example in its row, from 1; 0 is padding. labels, label_example (N,) and label_index (N,):
    where in the flattened (R x T) states a label is predicted.
    The shift happens here and only here: position t reads label t - 1 and predicts label t.
    """
    start = config.decoder_start_token_id
    columns = collections.defaultdict(list)
    is_empty = not rows
    for row in rows or [[]]:  # a rank without examples computes one padding token along
        row_sources = [sources[i] for i in row]
        row_targets = [targets[i] for i in row]
        shifted = [[start, *target[:-1]] for target in row_targets]
        columns["input_ids"].append(flat(row_sources))
        columns["segment"].append(segments(row_sources))
        columns["decoder_input_ids"].append(flat(shifted))
        columns["decoder_segment"].append(segments(row_targets))
        columns["labels"].append(flat(row_targets))
        columns["label_example"].append(np.repeat(row, [len(target) for target in row_targets]))
    decoder_segment = pad(columns["decoder_segment"], 0)
    return common.to_tensors(
        {
            "input_ids": pad(columns["input_ids"], config.pad_token_id),
            "segment": pad(columns["segment"], int(is_empty)),
            "decoder_input_ids": pad(columns["decoder_input_ids"], config.pad_token_id),
            "decoder_segment": decoder_segment,
            "labels": flat(columns["labels"]),
            "label_example": flat(columns["label_example"]),
            "label_index": np.flatnonzero(decoder_segment),
        }
    )


def count_chunks(n_targets, config):
    """Chunks into which the targets are cut, so that about MAX_LOGITS logits exist at once."""
    return max(1, math.ceil(n_targets * config.vocab_size / MAX_LOGITS))


class TrainingData:
    """The forward steps of optimizer step k on this rank, a function of (seed, k) and layout."""

    def __init__(self, args, data, config):
        self.args = args
        self.config = config
        self.rows = data.rows["train"]
        batch = args.train_batch_size * args.gradient_accumulation_steps
        self.order = common.Order(args.seed, batch, data.sizes, data.amounts)
        self.epoch = None
        # the same all through a run: ZeRO-3 gathers the head for each chunk, and prefetches what it
        # gathered before
        per_forward = args.train_batch_size // common.world_size()
        longest = np.sort(self.rows.lengths[:, 1])[-per_forward:]
        self.n_chunks = count_chunks(longest.sum(), config)

    def forward_steps(self, step):
        """([batch] of this rank, target tokens of the whole step, share of padding on this rank)"""
        epoch = step // self.order.steps_per_epoch
        if epoch != self.epoch:
            self.rows.start_epoch(self.args.seed, epoch)
            self.epoch = epoch
        lengths = self.rows.lengths
        ids = self.order.step_ids(step, lengths)
        n_tokens = lengths.sum(axis=1)
        world = common.world_size()
        n_pieces = world * self.args.gradient_accumulation_steps
        pieces = common.deal(ids, n_tokens, n_pieces)
        mine = pieces[common.rank() :: world]  # what the ranks compute at once is of like size
        batches = [self.make_batch(piece) for piece in mine]
        n_targets = int(lengths[ids, 1].sum())
        n_computed = 0
        for batch in batches:
            n_computed += batch["input_ids"].numel() + batch["decoder_input_ids"].numel()
        padding_share = 1 - float(n_tokens[np.concatenate(mine)].sum()) / n_computed
        return batches, n_targets, padding_share

    def make_batch(self, ids):
        rows = [[i] for i in ids.tolist()]
        if self.config.model_type in T5_FAMILY and rows:
            rows = pack(ids, self.rows.lengths, self.config.d_model)
        return collate(rows, *self.rows.fetch(ids.tolist()), self.config)


# --------------------------------------------------------------------------------- span corruption


def span_counts(length, density, mean_length):
    """(noise tokens, spans) of a text of `length` tokens. span_counts(512, 0.15, 3) = (77, 26)."""
    n_noise = round(length * density)
    n_noise = min(max(n_noise, 1), length - 1)
    n_spans = round(n_noise / mean_length)
    n_spans = min(max(n_spans, 1), n_noise, length - n_noise)
    return n_noise, n_spans


def pair_lengths(length, density, mean_length):
    """(source tokens, target tokens) of a text of `length` tokens, end tokens included."""
    n_noise, n_spans = span_counts(length, density, mean_length)
    return length - n_noise + n_spans + 1, n_noise + n_spans + 1


def text_length(input_length, density, mean_length):
    """Tokens of text that fill the encoder, as t5's random_spans_helper: (512, 0.15, 3) -> 568."""
    length = input_length - 1
    while pair_lengths(length + 1, density, mean_length)[0] <= input_length:
        length += 1
    n_source, n_target = pair_lengths(length, density, mean_length)
    if density == 0.5 and n_target > n_source:  # t5 too wants no more targets than inputs
        length -= 1
    return length


def random_lengths(n_items, n_spans, rng):
    """(n_spans,) positive lengths with the sum n_items."""
    starts_span = np.zeros(n_items, int)  # the first item starts one anyway
    is_chosen = np.arange(n_items - 1) < n_spans - 1
    starts_span[1:] = rng.permutation(is_chosen)
    span_of_item = starts_span.cumsum()
    return np.bincount(span_of_item, minlength=n_spans)


def span_mask(length, density, mean_length, rng):
    """(length,) bool, True = noise: spans of text and noise in turn, as t5's."""
    n_noise, n_spans = span_counts(length, density, mean_length)
    noise_lengths = random_lengths(n_noise, n_spans, rng)
    text_lengths = random_lengths(length - n_noise, n_spans, rng)
    lengths = np.stack([text_lengths, noise_lengths], axis=1)  # (n_spans, 2)
    is_noise = np.tile([False, True], n_spans)
    return np.repeat(is_noise, lengths.flatten())


def corrupt(tokens, mask, sentinels, eos):
    """[10 11 12 13 14], 01100 -> [10 s0 13 14 eos], [s0 11 12 eos] with s0 = sentinels[0]."""
    is_start = mask & ~np.append(False, mask[:-1])
    starts = np.flatnonzero(is_start)
    marks = sentinels[: len(starts)]
    source = tokens.astype(np.int64)
    source[starts] = marks
    source = source[is_start | ~mask]
    target = np.insert(tokens, starts, marks)  # before each span of noise
    target = target[np.insert(mask, starts, True)]
    return np.append(source, eos), np.append(target, eos)


class Spans:
    """Examples made from a split of a corpus, by (seed, epoch, place) alone."""

    def __init__(self, args, tokens, sentinels, eos):
        self.tokens = tokens  # mapped: nothing of its size is in memory
        self.sentinels = sentinels
        self.eos = eos
        self.noise = (args.noise_density, args.mean_noise_span_length)
        self.length = text_length(args.input_length, *self.noise)
        n_examples = math.ceil(len(tokens) / self.length)  # the last one goes on at the beginning
        self.lengths = np.broadcast_to(pair_lengths(self.length, *self.noise), (n_examples, 2))
        self.start_epoch(args.seed, EVALUATION_EPOCH)

    def start_epoch(self, seed, epoch):
        self.keys = (seed, epoch)

    def fetch(self, ids):
        """({example: input_ids}, {example: labels})"""
        # each epoch cuts the corpus at other places
        begin = common.derive_seed("begin", *self.keys) % self.length
        sources, targets = {}, {}
        for i in ids:
            rng = np.random.default_rng([4, *self.keys, i])
            first = begin + i * self.length
            positions = np.arange(first, first + self.length) % len(self.tokens)
            mask = span_mask(self.length, *self.noise, rng)
            pair = corrupt(self.tokens[positions], mask, self.sentinels, self.eos)
            sources[i], targets[i] = pair
        return sources, targets


def find_sentinels(tokenizer):
    """Token ids of <extra_id_0>, <extra_id_1>, ..."""
    vocabulary = tokenizer.get_vocab()
    sentinels = []
    while True:
        name = f"<extra_id_{len(sentinels)}>"
        if name not in vocabulary:
            name = f"▁{name}"  # so mT5's tokenizer spells it
        if name not in vocabulary:
            return sentinels
        sentinels.append(vocabulary[name])


def tokenizer_sha256(tokenizer):
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def load_corpus(args, tokenizer, problems):
    """Data of a corpus that data/prepare_text.py has tokenised."""
    folder = common.find_input(args, "data", args.data_name[0], [], problems)
    if folder is None or tokenizer is None:
        return None
    path = folder / "corpus.json"
    if not path.exists() or len(args.data_name) > 1:
        problems.append(
            "--objective span_corruption takes one folder that data/prepare_text.py made"
        )
        return None
    about = json.loads(path.read_text())
    if about["tokenizer"] != tokenizer_sha256(tokenizer):
        problems.append(f"{folder} has another tokenizer's ids ({about['tokenizer_name']})")
    sentinels = find_sentinels(tokenizer)
    length = text_length(args.input_length, args.noise_density, args.mean_noise_span_length)
    _, n_spans = span_counts(length, args.noise_density, args.mean_noise_span_length)
    if length < 2 or n_spans > len(sentinels):
        found = f"{len(sentinels)} <extra_id_...> for {n_spans} spans in {length} tokens"
        problems.append(f"--input_length {args.input_length}: {found}")
        return None
    rows = {}
    for split in SPLITS:
        tokens = np.zeros(0)
        if about["tokens"][split]:
            tokens = np.memmap(folder / f"{split}.ids", about["dtype"], "r")
        if len(tokens) != about["tokens"][split]:
            problems.append(f"{folder}/{split}.ids is not whole: prepare it again")
        elif len(tokens) < length and split != "test":
            problems.append(
                f"{folder}: {len(tokens)} tokens of {split} text, an example has {length}"
            )
        rows[split] = Spans(args, tokens, sentinels, tokenizer.eos_token_id)
    return Data(rows, {}, [len(rows["train"].lengths)], [None], about["sha256"])


# --------------------------------------------------------------------------------- model and loss


def run_stack(stack, hidden_states, bias, encoder_states=None, cross_bias=None):
    """The layers of a T5 stack, which share one bias: T5Stack itself would join bias and mask anew
    in every layer of the encoder, and keep all for the backward pass. (R, S or T, D) -> same."""
    hidden_states = stack.dropout(hidden_states)
    for block in stack.block:
        hidden_states, *_ = block(
            hidden_states,
            position_bias=bias,
            encoder_hidden_states=encoder_states,
            encoder_decoder_position_bias=cross_bias,
        )
    hidden_states = stack.final_layer_norm(hidden_states)
    return stack.dropout(hidden_states)


def masked_bias(stack, query_segment, key_segment):
    """(R, heads, queries, keys): T5's relative positions where a query may see a key: in its own
    example, of a decoder not behind itself."""
    attention = stack.block[0].layer[0].SelfAttention
    bias = attention.compute_bias(query_segment.shape[1], key_segment.shape[1])
    is_visible = query_segment[:, None, :, None] == key_segment[:, None, None]
    if stack.is_decoder:
        is_visible = is_visible.tril()
    return torch.where(is_visible, bias, NEVER)


class TargetLosses(torch.nn.Module):
    """What the engine wraps: forward(batch) -> (N,) fp32 loss of every target token; without
    gradients (2, N), with whether it is the likeliest. Of a T5 no logits where there is no target.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.is_packed = model.config.model_type in T5_FAMILY
        self.states = self.packed_states if self.is_packed else self.plain_logits

    def forward(self, batch, n_chunks=1):
        states = self.states(batch)
        loss_function = self.losses
        if not self.is_packed:  # all logits exist already
            n_chunks = 1
        if n_chunks > 1 and torch.is_grad_enabled():  # logits are recomputed in the backward pass
            loss_function = functools.partial(checkpoint, self.losses, use_reentrant=False)
        state_chunks = states.tensor_split(n_chunks)
        label_chunks = batch["labels"].tensor_split(n_chunks)
        losses = map(loss_function, state_chunks, label_chunks)
        return torch.cat(list(losses), dim=-1)

    def losses(self, states, labels):
        """(n, D) states, or (n, V) logits, and (n,) labels -> (n,) losses; to evaluate (2, n)"""
        logits = self.logits(states)
        losses = F.cross_entropy(logits, labels, reduction="none")
        if torch.is_grad_enabled():
            return losses
        is_likeliest = logits.argmax(dim=1) == labels
        return torch.stack([losses, is_likeliest.float()])

    def logits(self, states):
        """(n, V) fp32 of a packed T5's (n, D) states; of others they are the logits already."""
        if self.is_packed:
            states = self.model.get_output_embeddings()(states)
        return states.float()

    def plain_logits(self, batch):
        """(N, V) of any encoder-decoder with an example per row; positions are its own business."""
        output = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["segment"] > 0,
            decoder_input_ids=batch["decoder_input_ids"],
            use_cache=False,
        )
        logits = output.logits.flatten(0, 1)  # (R x T, V)
        return logits[batch["label_index"]]

    def packed_states(self, batch):
        """(N, D) of a T5 with several examples per row, which do not see each other. T5's positions
        are relative: nothing restarts."""
        model = self.model
        source, target = batch["segment"], batch["decoder_segment"]
        # looked up together: each look-up costs a dense gradient of the whole embedding
        ids = torch.cat([batch["input_ids"], batch["decoder_input_ids"]], dim=1)
        embedded = model.get_input_embeddings()(ids)  # (R, S + T, D)
        source_states, target_states = embedded.split([source.shape[1], target.shape[1]], dim=1)
        encoder_bias = masked_bias(model.encoder, source, source)
        encoder_states = run_stack(model.encoder, source_states, encoder_bias)
        decoder_bias = masked_bias(model.decoder, target, target)
        is_same = target[:, None, :, None] == source[:, None, None]
        cross_bias = torch.where(is_same, 0.0, NEVER).to(encoder_bias.dtype)  # (R, 1, T, S)
        hidden_states = run_stack(
            model.decoder, target_states, decoder_bias, encoder_states, cross_bias
        )
        hidden_states = hidden_states.flatten(0, 1)[batch["label_index"]]
        if getattr(model.config, "scale_decoder_outputs", False):  # T5 v1.0 with a tied head
            hidden_states = hidden_states * model.config.d_model**-0.5
        return hidden_states


# ------------------------------------------------------------------------------------- evaluation


def normalized_words(text):
    """SQuAD's normalisation: lower case, no punctuation, no articles (Rajpurkar et al. 2016)."""
    no_punctuation = str.maketrans("", "", string.punctuation)
    text = text.lower()
    text = text.translate(no_punctuation)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return text.split()


def exact_match(answer, reference):
    return float(answer.strip() == reference.strip())


def token_f1(answer, reference):
    """F1 of the bags of words. token_f1("the red book", "a red cat") = 0.5."""
    answer_words = collections.Counter(normalized_words(answer))
    reference_words = collections.Counter(normalized_words(reference))
    n_words = answer_words.total() + reference_words.total()
    if n_words == 0:
        return 1.0
    shared_words = answer_words & reference_words
    return 2 * shared_words.total() / n_words


def rouge(name):
    from rouge_score import rouge_scorer  # optional package

    scorer = rouge_scorer.RougeScorer([name], use_stemmer=True)
    return lambda answer, reference: scorer.score(reference, answer)[name].fmeasure


def best_over_references(score, answers, references):
    """Mean over answers of the best score over the references of each."""
    best = []
    for answer, texts in zip(answers, references):
        best.append(max(score(answer, text) for text in texts))
    return float(np.mean(best))


def ranks(values):
    """Ties share their mean. [3, 1, 3] -> [2.5, 1, 2.5]."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts)
    mean_rank = last_rank - (counts - 1) / 2
    return mean_rank[inverse]


def correlation(predicted, gold):
    """Pearson's, which of two labels is Matthews'; 0 where one side is constant."""
    if np.ptp(predicted) == 0 or np.ptp(gold) == 0:
        return 0.0
    return float(np.corrcoef(predicted, gold)[0, 1])


def label_metric(name, answers, gold_texts, labels):
    """f1 or matthews of two labels, of which the second is positive."""
    negative, positive = labels
    gold = np.array([text == positive for text in gold_texts])
    predicted = ~gold  # an answer that is no label counts as wrong
    for i, answer in enumerate(answers):
        if answer in labels:
            predicted[i] = answer == positive
    if name == "matthews":
        return correlation(predicted.astype(float), gold.astype(float))
    n_hits = (predicted & gold).sum()
    n_positive = predicted.sum() + gold.sum()
    return float(2 * n_hits / n_positive) if n_positive else 0.0


def number_metric(name, answers, gold_texts):
    """pearson or spearman; an answer that is no number counts as the gold value farthest off."""
    gold = np.array([float(text) for text in gold_texts])
    lowest = gold.min()
    highest = gold.max()
    is_high = gold - lowest > highest - gold
    predicted = np.where(is_high, lowest, highest)
    for i, answer in enumerate(answers):
        if re.fullmatch(NUMBER, answer):
            predicted[i] = float(answer)
    if name == "spearman":
        return correlation(ranks(predicted), ranks(gold))
    return correlation(predicted, gold)


def text_metric(name, answers, references, labels):
    """0 to 1, or a correlation. references: a list of texts per answer, of which the best counts;
    metrics of labels and numbers take the first."""
    if name == "token_f1":
        return best_over_references(token_f1, answers, references)
    if name in ("exact_match", "accuracy"):
        return best_over_references(exact_match, answers, references)
    if name in ("rouge1", "rougeL"):
        return best_over_references(rouge(name), answers, references)
    gold_texts = [texts[0].strip() for texts in references]
    if name in ("f1", "matthews"):
        return label_metric(name, answers, gold_texts, labels)
    return number_metric(name, answers, gold_texts)


def generation_settings(args, config, tokenizer):
    """Made anew: nothing is inherited from the generation_config.json of a model."""
    sampling = {}
    if args.temperature > GREEDY:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        num_return_sequences=args.n_samples,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        **sampling,
    )


def generate(args, engine, tokenizer, rows):
    """Collective. {example: [answers]} of this rank's share of the Rows."""
    answers = {}
    n = args.n_samples
    config = engine.module.model.config
    settings = generation_settings(args, config, tokenizer)
    batch_size = max(1, args.eval_batch_size // n)
    with common.generating(engine, settings) as model:
        for ids in common.my_batches(rows.lengths[:, 0], batch_size):
            if not ids:
                continue
            batch = collate([[i] for i in ids], *rows.fetch(ids), config)
            batch = common.to_device(batch, engine.device)
            # a batch is the same for any number of ranks, and so are its samples
            torch.manual_seed(common.derive_seed(args.seed, "sample", ids))
            output_ids = model.generate(
                input_ids=batch["input_ids"],  # (R, S), padded at the right as in training
                attention_mask=batch["segment"] > 0,
            ).tolist()
            for k, i in enumerate(ids):
                samples = output_ids[k * n : k * n + n]
                answers[i] = [decode(tokenizer, sample) for sample in samples]
    return answers


@torch.no_grad()
def row_losses(args, engine, rows):
    """Collective. {example: (summed loss, right tokens, target tokens)} of Rows or Spans."""
    config = engine.module.model.config
    lengths = rows.lengths
    n_chunks = count_chunks(lengths[:, 1].max() * args.eval_batch_size, config)
    sums = {}
    of_example = torch.zeros(2, len(lengths), dtype=torch.float64)
    engine.eval()
    for ids in common.my_batches(lengths.sum(axis=1), args.eval_batch_size):
        batch = collate([[i] for i in ids], *rows.fetch(ids), config)
        losses = engine(common.to_device(batch, engine.device), n_chunks)  # (2, N)
        of_example.index_add_(1, batch["label_example"], losses.double().cpu())
        for i in ids:
            sums[i] = (*of_example[:, i].tolist(), int(lengths[i, 1]))
    engine.train()
    return common.gather(sums)


def mean_losses(sums, ids):
    loss, n_right, n_tokens = np.array([sums[i] for i in ids]).sum(axis=0)
    return {"loss": loss / n_tokens, "token_accuracy": n_right / n_tokens}


def write_predictions(args, examples, answers, split, run):
    predictions = []
    for i, example in enumerate(examples):
        predictions.append(
            {
                "prompt": example.prompts[0],
                "demonstration": example.completions[0],
                "generations": [{"lm_postprocess": text} for text in answers[i]],
                "orig_d": example.record,
                "dataset": example.data_set,
            }
        )
    prefix, step = "", run.step
    if split == "test":  # by the weights that are exported
        prefix, step = "test_", run.chosen().name.removeprefix("checkpoint-")
    settings = f"temperature={args.temperature:.2f}_n={args.n_samples}"
    common.write_json(run.dir / f"{prefix}{settings}_step={step}.json", predictions)


def evaluate(args, engine, tokenizer, data, split, run):
    """Collective. Metrics over all examples of `split`, each counted once; the predictions file."""
    rows = data.rows[split]
    sums = row_losses(args, engine, rows)
    if args.objective == "span_corruption":
        return mean_losses(sums, sums)
    examples = data.examples[split]
    answers = common.gather(generate(args, engine, tokenizer, rows))
    references = []
    for example in examples:
        # as the model would spell them: blanks beside added tokens are no difference
        ids = tokenizer(example.references).input_ids
        references.append([decode(tokenizer, text_ids) for text_ids in ids])
    groups = collections.defaultdict(list, {"": range(len(examples))})
    if len(data.sizes) > 1:
        for i, example in enumerate(examples):
            groups[f"{example.data_set}/"].append(i)
    metrics = {}
    for prefix, ids in groups.items():
        for name, value in mean_losses(sums, ids).items():
            metrics[prefix + name] = value
        first_answers = [answers[i][0].strip() for i in ids]
        group_references = [references[i] for i in ids]
        for name in args.metrics:
            value = text_metric(name, first_answers, group_references, args.labels)
            metrics[prefix + name] = value
    if common.rank() == 0:
        write_predictions(args, examples, answers, split, run)
    return metrics


# --------------------------------------------------------------------------------------- training


def check_args(args, problems):
    common.check_shared_args(args, POSITIVE_FLAGS, problems)
    if args.temperature <= GREEDY and args.n_samples > 1:
        problems.append("--n_samples: greedy decoding gives the same each time: --temperature 0.8")
    if {"f1", "matthews"} & set(args.metrics) and len(args.labels) != 2:
        problems.append("--metrics f1 and matthews need --labels NEGATIVE POSITIVE")
    if {"rouge1", "rougeL"} & set(args.metrics):
        try:
            rouge("rouge1")
        except ImportError:
            problems.append("--metrics rouge1 and rougeL need the package rouge-score")
    if args.objective == "span_corruption" and not 0 < args.noise_density < 1:
        problems.append(f"--noise_density {args.noise_density}: expected a share between 0 and 1")


def check_model(args, source, config, ds_config, problems):
    if getattr(config, "decoder_start_token_id", None) is None:
        problems.append(f"{source}: config.json lacks decoder_start_token_id")
    n_positions = common.count_positions(config)
    for name in ("max_source_length", "max_target_length", "max_new_tokens"):
        if getattr(args, name) > n_positions:
            problems.append(f"--{name} {getattr(args, name)}: {source} has {n_positions} positions")
    stage = ds_config["zero_optimization"]["stage"]
    if args.optimizer == "adafactor" and stage:  # which flattens the matrices it looks at
        problems.append("--optimizer adafactor needs --ds_config zero0 and fp32 or bf16-mixed")
    if args.objective == "span_corruption" and config.model_type not in T5_FAMILY:
        problems.append(f"--objective span_corruption is for T5, and {source} is none")


def prepare(args):
    """All that can be wrong, found and reported together before any weight is loaded."""
    problems = []
    ds_config = None
    check_args(args, problems)
    source, config, tokenizer = common.open_model(args, problems)
    if config and not config.is_encoder_decoder:
        problems.append(f"{source} is a {config.model_type}: no encoder-decoder, see sft_causal.py")
    elif config:
        ds_config = common.make_ds_config(args, AutoModelForSeq2SeqLM, config, problems)
    if ds_config:
        check_model(args, source, config, ds_config, problems)
    load = load_records if args.objective == "completion" else load_corpus
    data = load(args, tokenizer, problems)
    run = common.Run(args, FREE_FLAGS, ds_config, data and data.sha256, problems)
    if problems:
        common.fail(problems)
    return source, config, tokenizer, ds_config, data, run


def make_optimizer(args, model):
    if args.no_train:
        return None
    if args.optimizer == "adafactor":  # Shazeer & Stern 2018; the rate counts per RMS of a weight
        from transformers import Adafactor  # takes seconds to import

        options = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
        return Adafactor(model.parameters(), **options, relative_step=False)
    return common.make_adamw(model, args)


def main(args):
    # 1 data and model
    device = common.setup_distributed(args)
    rank = common.rank()
    world = common.world_size()
    source, config, tokenizer, ds_config, data, run = prepare(args)
    train_data = TrainingData(args, data, config)
    n_chunks = train_data.n_chunks
    steps_per_epoch = train_data.order.steps_per_epoch
    max_steps = args.max_steps or math.ceil(args.num_epochs * steps_per_epoch)
    run.start(__file__, max_steps, steps_per_epoch)
    model = common.load_model(AutoModelForSeq2SeqLM, source, config, args, ds_config, tokenizer)

    # 2 engine
    engine, *_ = deepspeed.initialize(
        model=TargetLosses(model),
        optimizer=make_optimizer(args, model),
        config=ds_config,
    )
    run.resume(engine)

    def evaluation(split):
        return evaluate(args, engine, tokenizer, data, split, run)

    if args.no_train:
        for split in ("eval", "test"):
            if len(data.rows[split].lengths):
                run.log(split, evaluation(split))
        log(f"{run.dir} has the predictions")
        return 0
    about = {
        "format": 1,
        "script": "seq2seq.py",
        "task": args.objective,
        "family": "seq2seq",
        "record_layout": {"source": "{prompt}", "target": "{completion}"},
        "base": {"path": source, "sha256": None},
        "adapter": "none",
        "quantize": None,
    }
    if rank == 0 and hasattr(model, "adapter"):
        about.update(model.adapter.about())
    if run.eval_is_due():  # the baseline, or what a stop left out
        run.evaluated(evaluation("eval"))

    # 3 loop: the forward steps of a step are a pure function of (seed, step)
    last_step = run.step if run.finished() else max_steps  # finished: killed before its export
    steps = common.ahead(train_data.forward_steps, run.step, last_step)
    for step, (batches, n_targets, padding_share) in steps:
        lr = common.set_lr(engine, step, args, max_steps)
        # seeded by the step, so that a checkpoint needs no state of random numbers
        torch.manual_seed(common.derive_seed(args.seed, "dropout", step, rank))
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            engine.set_gradient_accumulation_boundary(is_last)
            batch = common.to_device(batch, device)
            losses = engine(batch, n_chunks)  # (N,)
            forward_loss = losses.sum()
            # DeepSpeed averages over the processes, hence x world
            engine.backward(forward_loss * (world / n_targets))
            loss_sum += forward_loss.detach()
        # one exchange: every rank learns the loss of the step, and whether any rank has to stop
        loss_sum, n_stop, grad_norm = common.step_totals(engine, loss_sum, run.must_stop())
        engine.step()
        loss = loss_sum / n_targets
        grad_norm = common.check_step(engine, args, step, loss, grad_norm)
        run.stepped(loss, n_targets, lr=lr, padding_share=padding_share, grad_norm=grad_norm)
        if run.save_is_due() or n_stop:
            common.save_checkpoint(engine, model, tokenizer, run, about)
        if run.eval_is_due() and not n_stop:  # after saving: it may run out of memory
            run.evaluated(evaluation("eval"))
        if n_stop:
            log(f"saved at step {run.step}: the same command, without --overwrite, continues")
            return common.EXIT_SAVED
        if run.finished():
            break

    # 4 export: the best checkpoint or the last one, tested once
    if len(data.rows["test"].lengths):
        common.load_checkpoint(engine, run.chosen())
        run.log("test", evaluation("test"))
    if rank == 0:
        common.export(run)
    return 0


def parse_args(argv):
    return common.Parser(__doc__, FLAGS, DEMO).parse_args(argv)


if __name__ == "__main__":
    common.launch(main, parse_args(sys.argv[1:]))
