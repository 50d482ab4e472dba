"""What would fine-tuning on part of the data do? Estimates from one projected gradient per example,
without fine-tuning.

    {"prompt": "12 + 30 =", "completion": " 42", "skill": "add"}      or any record of the trainers

    python project_grads.py                             # demo: estimates beside real fine-tunes
    python project_grads.py collect --model_init_name base --data mix --groups skill --out G
    python project_grads.py collect --model_init_name base --data mix --split eval --out E
    python project_grads.py subsets --grads G --out subsets.txt
    python project_grads.py estimate --grads G --target_grads E --subsets subsets.txt --out est.csv
    deepspeed --num_gpus 4 project_grads.py collect --model_init_path some/model --data mix --out G

collect: a store of gradients of a model, one row of --dim numbers per example. estimate: to first
order the loss of a target after a step D of the weights is f + g.D, with g the target's gradient,
and fine-tuning on a subset S moves the weights along the mean gradient of S.
docs/project_grads.md explains every command and number.

Shapes: B examples of a batch, T tokens, V vocabulary, d numbers of a row, n rows of a store,
G groups, S subsets.
"""

import argparse
import collections
import csv
import functools
import hashlib
import json
import math
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import common  # first: it prepares the import of DeepSpeed

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from common import log

# the flags of common.py that a command has; the others keep their defaults
MODEL = ("model_init_name", "model_init_path", "mount_dir", "precision", "seed")
COLLECT = (*MODEL, "data_name", "quantize", "lora_rank", "lora_alpha", "lora_targets")
COLLECT_FLAGS = {
    "load_model_dir": ("", "a run folder, in place of --model_init_path"),
    "split": ("train", "which records", "train", "eval", "test"),
    "groups": ("", "key of the records that names their group; else the data set is the group"),
    "output": ("loss", "whose gradient: -log p, or log p / (1 - p)", "loss", "logodds"),
    "dim": (4096, "numbers of a row"),
    "batch_size": (16, "examples of one backward pass of one process"),
    "num_batches_gradients": (0, "only the first so many x --batch_size examples; 0: all"),
    "downsample": (1.0, "share (up to 1) or number of the examples, drawn at random"),
    "raw_prompt": (False, "prompt and completion as they are, without the chat template"),
    "max_length": (2048, "longer examples lose their end"),
    "max_source_length": (1024, "longer prompts of an encoder lose their end"),
    "out": ("", "folder of the store; the same command continues an unfinished one"),
}
STORE_FLAGS = {
    "grads": ("", "store of the training examples"),
    "target_grads": ("", "store of the examples whose loss matters"),
}
LINERR_FLAGS = {
    "grads": ("", "store whose examples are measured"),
    "scale": ([0.001, 0.003, 0.01, 0.03, 0.1], "distances, as shares of the weights' norm"),
}
SUBSETS_FLAGS = {
    "grads": STORE_FLAGS["grads"],
    "number_of_subsets": (100, "lines of the file"),
    "subset_size": (0.5, "share (up to 1) or number of the groups in each"),
    "clusters": (0, "instead: a store whose groups are so many clusters of like rows"),
    "out": ("", "file (with --clusters: store) to write"),
}
SUBSET_FLAGS = {
    **STORE_FLAGS,
    "subsets": ("", "text file, the numbers of a subset's groups on each line"),
    "limit": (0, "only so many subsets; 0: all"),
    "out": ("", "table to write, .csv"),
}
ESTIMATE_FLAGS = {
    **SUBSET_FLAGS,
    "anchor_grads": ([], "the same two stores, of the model fine-tuned on everything"),
    "fit": ("mean", "direction of a subset: its mean gradient, or a fit", "mean", "logistic"),
    "calibrate": ("", "FILE:K fits the step size to the first K runs of a table of truth"),
    "step_size": (0.0, "the step size itself, about learning rate x steps"),
}
TRUTH_FLAGS = {
    **SUBSET_FLAGS,
    "repeat": (1, "runs of each subset, with the data in another order"),
    "launcher": (shlex.quote(sys.executable), "what starts the trainer"),
}
SELECT_FLAGS = {
    **STORE_FLAGS,
    "method": ("less", "by cosine; by estimates; one by one", "less", "ensemble", "forward"),
    "estimates": ("", "ensemble: a table of estimate"),
    "step_size": (0.0, "forward: as estimate prints it"),
    "top": (0.05, "share (up to 1) or number of examples, or groups, that are kept"),
    "out": ("", "data file to write, .jsonl"),
}
DEMO_FLAGS = {
    "limit": (16, "subsets that are really fine-tuned on"),
    "out": ("project-grads-demo", "its folder; finished steps are not repeated"),
}
ALIASES = {  # names of the earlier system
    "--model_key": "--model_init_path",
    "--project_dimension": "--dim",
    "--save_name": "--out",
    "--load_sample_task_dir": "--subsets",
    "--subset_num": "--limit",
}
ALWAYS = ("--project_gradients", "--compute_pretrained_outputs", "--train_lora")  # asked or not
REQUIRED = ("grads", "target_grads", "subsets", "out")
POSITIVE = ("dim", "batch_size", "max_length", "max_source_length", "number_of_subsets", "repeat")
SHARES = ("downsample", "subset_size", "top")
FORMAT = 2  # of a store, its hash included
CHUNK = 2**26 if torch.cuda.is_available() else 2**21  # numbers of gradients that exist at once
MAX_LOGODDS = 15.0  # beyond, fp32 knows no difference
IGNORED = -100  # the label of a token that is no target
OUTPUTS = ["loss", "logodds"]
PENALTY = 0.01  # of the logistic fit, times the mean squared norm of the rows
A_LITTLE = 0.001  # relative change of the losses by a step whose size nobody knows
NEARBY = 0.001  # distance of the central difference, as a share of the weights' norm

# ------------------------------------------------------------------------------------------- data

# input_ids: of a decoder-only model all tokens, of an encoder-decoder the answer's; source_ids: what
# the encoder reads, else none; is_target: (len(input_ids),) which tokens count
Example = collections.namedtuple("Example", "source_ids input_ids is_target")


def count(share_or_number, n):
    """How many of n: a share up to 1 of them, or a number."""
    if share_or_number > 1:
        return min(n, int(share_or_number))
    return max(1, round(share_or_number * n))


def read_records(args, problems):
    """[(where, group, record)] of --split, in the order of the rows of a store."""
    records = []
    found, amounts = common.read_data_sets(args, problems)
    if any(amounts.values()):
        problems.append("--data NAME:AMOUNT is for training; here --downsample draws examples")
    for name, where, split, record in found:
        if split != args.split:
            continue
        group = pathlib.Path(name).name.split(".")[0]
        if args.groups:
            group = record.get(args.groups)
        if group is None:
            problems.append((where, f"no key {args.groups!r}, which --groups names"))
        records.append((where, str(group), record))
    if not records:
        problems.append(f"no {args.split} records")
    rng = np.random.default_rng([5, args.seed])
    n_drawn = count(args.downsample, len(records))
    drawn = sorted(rng.permutation(len(records))[:n_drawn])
    last = args.num_batches_gradients * args.batch_size or None
    return [records[i] for i in drawn[:last]]


def first_text(record, name):
    """The text of a key, of a list the first. Raises ValueError."""
    text = record.get(name)
    if isinstance(text, list) and text:
        text = text[0]
    problem = common.text_problem(text, name, record)
    if problem:
        raise ValueError(problem)
    return text


def encode_raw(record, prompts, args):
    """Prompt and completion, or a plain text, as sft_causal.py reads them."""
    tokenizer = prompts.tokenizer
    prompt = ""
    if "text" in record and "prompt" not in record:
        reply = first_text(record, "text")
    else:
        prompt = first_text(record, "prompt")
        reply = first_text(record, "completion")
    prompt_ids = prompts.begin + tokenizer(prompt, add_special_tokens=False).input_ids
    reply_ids = tokenizer(reply, add_special_tokens=False).input_ids
    input_ids = [*prompt_ids, *reply_ids, tokenizer.eos_token_id]
    is_target = np.arange(len(input_ids)) >= max(1, len(prompt_ids))  # nothing predicts the first
    return Example([], input_ids, is_target)


def encode_chat(record, prompts, args):
    """A conversation up to its last reply. Targets are the replies and the end token behind each,
    as in sft_causal.py."""
    if "messages" in record or "conversations" in record:
        messages = prompts.messages(record)
    else:
        question = first_text(record, "prompt")
        answer = first_text(record, "completion")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    tokenize = functools.partial(prompts.tokenizer.encode, add_special_tokens=False)
    input_ids = []
    is_target = np.zeros(0, bool)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenize(prompts.render(messages[:i], reply_follows=True))
        text, end_token, _ = prompts.render(messages[: i + 1]).rpartition(prompts.end_token)
        until = tokenize(text + end_token)
        if until[: len(before)] != before or before[: len(input_ids)] != input_ids:
            raise ValueError("the chat template rewrites earlier turns: use another one")
        is_target = np.append(is_target, np.zeros(len(until) - len(is_target), bool))
        is_target[len(before) :] = message.get("weight", 1)
        input_ids = until
    if not input_ids:
        raise ValueError("no message of the role 'assistant'")
    return Example([], input_ids, is_target)


def encode_seq2seq(record, prompts, args):
    """Prompt and completion as seq2seq.py reads them, each with its end token."""
    tokenizer = prompts.tokenizer
    source_ids = tokenizer(first_text(record, "prompt")).input_ids
    if len(source_ids) > args.max_source_length:
        source_ids = source_ids[: args.max_source_length - 1] + source_ids[-1:]
    labels = tokenizer(first_text(record, "completion")).input_ids
    if labels[-1] != tokenizer.eos_token_id:
        labels.append(tokenizer.eos_token_id)
    return Example(source_ids, labels, np.ones(len(labels), bool))


def encode(records, prompts, args, is_seq2seq, problems):
    """[Example] of [(where, group, record)], cut to --max_length."""
    examples = []
    for where, _, record in tqdm(records, "tokenising", delay=5, disable=common.rank() > 0 or None):
        is_text = "text" in record and "prompt" not in record
        encode_record = encode_raw if prompts.is_raw or is_text else encode_chat
        if is_seq2seq:
            encode_record = encode_seq2seq
        try:
            source_ids, input_ids, is_target = encode_record(record, prompts, args)
        except ValueError as error:
            problems.append((where, str(error)))
            continue
        n = args.max_length
        examples.append(Example(source_ids, np.array(input_ids[:n]), is_target[:n]))
    n_empty = sum(not example.is_target.any() for example in examples)
    if n_empty:
        log(f"WARNING {n_empty} of {len(examples)} examples have no target left and count nowhere")
    return examples


def make_batches(examples, batch_size):
    """Lists of example numbers, alike in length, the longest first."""
    lengths = [len(example.source_ids) + len(example.input_ids) for example in examples]
    order = np.argsort(-np.array(lengths), kind="stable").tolist()
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def pad(lists, fill):
    """Lists of several lengths -> int64 (B, the longest of them)"""
    padded = np.full((len(lists), max(map(len, lists))), fill)
    for row, values in zip(padded, lists):
        row[: len(values)] = values
    return torch.from_numpy(padded)


def collate(examples, pad_id, start_id):
    """What the model reads, and labels (B, T): of each position the token that it predicts.
    Padding is on the right, where nothing sees it."""
    source_ids, input_ids, is_target = zip(*examples)
    labels = [np.where(mask, ids, IGNORED) for ids, mask in zip(input_ids, is_target)]
    if start_id is None:
        # the shift happens here and only here: position t predicts token t + 1
        labels = pad([np.append(row[1:], IGNORED) for row in labels], IGNORED)
        position_ids = torch.arange(labels.shape[1]).expand(labels.shape)
        input_ids = pad(input_ids, pad_id)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
    # or here: the decoder reads its tokens one position late
    shifted = [np.append(start_id, ids[:-1]) for ids in input_ids]
    return {
        "input_ids": pad(source_ids, pad_id),
        "attention_mask": pad([np.ones(len(ids)) for ids in source_ids], 0),
        "decoder_input_ids": pad(shifted, pad_id),
        "labels": pad(labels, IGNORED),
    }


# ------------------------------------------------------------------------------ model and outputs


def prepare(args, problems):
    """(source, config, tokenizer, records, examples): every mistake, before a weight is loaded."""
    common.resolve_precision(args, problems)
    source, config, tokenizer = common.open_model(args, problems)
    records = read_records(args, problems)
    examples = None
    if not args.model_init_name and not args.model_init_path:
        problems.append("no model: --model_init_name (under models/) or --model_init_path")
    if config:
        if type(config) not in auto_class_of(config)._model_mapping:
            problems.append(f"a {config.model_type} writes no text: expected another model")
        args.raw_prompt = args.raw_prompt or not tokenizer.chat_template
        prompts = common.Prompts(tokenizer, args.raw_prompt)
        examples = encode(records, prompts, args, config.is_encoder_decoder, problems)
    if problems:
        common.fail(problems)
    return source, config, tokenizer, records, examples


def auto_class_of(config):
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_model(args, source, config, tokenizer):
    """Collective. The model on its device, without dropout."""
    device = common.setup_distributed(args)
    auto_class = auto_class_of(config)
    ds_config = {"zero_optimization": {"stage": 0}}
    model = common.load_model(auto_class, source, config, args, ds_config, tokenizer)
    return model.to(device).eval()


def make_batch(model, tokenizer, examples):
    start_id = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
    batch = collate(examples, tokenizer.pad_token_id or 0, start_id)
    return common.to_device(batch, model.device)


def row_outputs(model, batch):
    """(2, B) fp32: the mean over the targets of each row of -log p and of log p - log(1 - p); 0
    where a row has none. Logits begin where a row has the first target."""
    inputs = dict(batch)
    labels = inputs.pop("labels")
    if "decoder_input_ids" not in inputs:
        has_target = (labels != IGNORED).any(0)
        first = int(has_target.int().argmax())
        labels = labels[:, first:]
        inputs["logits_to_keep"] = labels.shape[1]
    logits = model(**inputs, use_cache=False).logits  # (B, T - first, V)
    is_target = labels != IGNORED
    losses = common.CrossEntropy.apply(logits[is_target].float(), labels[is_target])  # (N,)
    bounded = losses.clamp(min=1e-7)
    log_odds = -bounded - torch.log(-torch.expm1(-bounded))
    values = torch.stack([losses, log_odds.clamp(-MAX_LOGODDS, MAX_LOGODDS)])  # (2, N)
    row, _ = is_target.nonzero(as_tuple=True)
    sums = torch.zeros(2, len(labels), device=labels.device).index_add(1, row, values)
    return sums / is_target.sum(1).clamp(min=1)


# --------------------------------------------------------------------------------------- sketches


def mix(x):
    """The finaliser of splitmix64 (Steele et al. 2014), in place on int64: products wrap, and masks
    make >> a logical shift."""
    x ^= (x >> 30) & (2**34 - 1)
    x *= 0xBF58476D1CE4E5B9 - 2**64
    x ^= (x >> 27) & (2**37 - 1)
    x *= 0x94D049BB133111EB - 2**64
    x ^= (x >> 31) & (2**33 - 1)
    return x


class Sketch:
    """A random linear map of gradients to d numbers that keeps inner products.

    SJLT with one non-zero per column (Charikar et al. 2002; Kane and Nelson 2014): a hash of (seed,
    parameter, coordinate) gives each coordinate of a gradient one of d places and a sign, and a
    place adds up what falls into it. Then E[Pg . Ph] = g . h, with a variance of at most
    2 |g|^2 |h|^2 / d, as a dense random matrix has it. But no matrix exists, the cost does not
    depend on d, and a row does not depend on batch, order or device.
    """

    def __init__(self, tracked, dim, seed, device):
        """tracked: {name: weight}"""
        self.dim = dim
        self.device = device
        self.seed = seed
        self.tracked = tracked
        self.tables = {}

    def places(self, name, coordinates):
        """2 x place + sign, int32, of (n,) coordinates. With a place for either sign, one addition
        does both; finish() subtracts the halves."""
        key = common.derive_seed(self.seed, name)
        bits = mix((coordinates + 1) * (0x9E3779B97F4A7C15 - 2**64) + key)
        place = ((bits >> 32) & 0xFFFFFFFF) * self.dim >> 32
        return (2 * place + (bits & 1)).int()

    def table(self, name):
        """places() of a whole weight, kept: 4 bytes for each of its numbers."""
        if name not in self.tables:
            coordinates = torch.arange(self.tracked[name].numel(), device=self.device)
            places = [self.places(name, part) for part in coordinates.split(2**20)]
            self.tables[name] = torch.cat(places)
        return self.tables[name]

    def start(self, n_rows):
        return torch.zeros(n_rows, 2 * self.dim, device=self.device)

    def add(self, sums, name, start, values):
        """values: (B, n), of the gradients of a weight the coordinates from `start` on."""
        places = self.table(name)[start : start + values.shape[1]].long()
        sums.scatter_add_(1, places.expand(values.shape), values.float())

    def add_at(self, sums, name, coordinates, values):
        """The same for coordinates of its own in each row, (B, n); repeated ones add up."""
        sums.scatter_add_(1, self.table(name)[coordinates].long(), values.float())

    def finish(self, sums):
        """(B, d)"""
        return sums[:, 0::2] - sums[:, 1::2]


# --------------------------------------------------------------------------- per-example gradients


def tracked_parameters(model):
    """({name: weight} of linear layers and embeddings that training would change, {module: path}).
    With an adapter only the adapter's. A tied weight has its first name."""
    modules = {}
    known = set()
    for path, module in model.named_modules():
        is_linear = isinstance(module, (torch.nn.Linear, Conv1D))
        # Gemma scales what it looks up; T5 looks its relative positions up once, for all examples
        is_lookup = getattr(type(module), "forward", None) is torch.nn.Embedding.forward
        if is_linear or is_lookup and not path.endswith("relative_attention_bias"):
            modules[module] = path
            known.update(map(id, module._parameters.values()))
    tracked = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad and id(weight) in known:
            tracked[name] = weight
    return tracked, modules


class Gradients:
    """The gradient of every example of a batch, sketched, from one backward pass.

    No example of a batch sees another. So the gradient of the summed output of all examples, with
    respect to what a layer computes for one of them, is that example's own. Autograd has it in hand
    at every layer, and sums over the batch only when it goes on to the weight. Here the weights are
    frozen, so that it never does: hooks take the input of each layer and the gradient of its
    output, and finish the chain rule example by example.

    A linear layer computes y_t = W x_t + b for each token t. With D_t = dL/dy_t,

        dL/dW = sum_t D_t x_t' = D' X,   dL/db = sum_t D_t,   D: (T, out), X: (T, in),

    a product of matrices for each example. Padding needs no mask: L does not depend on it, so its
    D_t is 0. GPT-2's Conv1D holds W transposed, y_t = x_t W + b: there dL/dW = X' D.
    An embedding looks up y_t = E[id_t]: D_t adds to row id_t of dL/dE. Norms, a thousandth of the
    weights, are left out.

    What is found goes into the sketch at once and is forgotten. Tied weights need no care: the
    gradient of a weight is the sum over its uses, and the sketch adds them as it adds all else.
    """

    def __init__(self, model, dim, seed, output):
        """output: whose gradient, loss or logodds."""
        self.model = model
        self.output = OUTPUTS.index(output)
        self.tracked, modules = tracked_parameters(model)
        self.sketch = Sketch(self.tracked, dim, seed, model.device)
        model.requires_grad_(False)
        names = {id(weight): name for name, weight in self.tracked.items()}
        for module, path in modules.items():
            own = {}  # {"weight": name, "bias": name} of what is tracked here
            for leaf, weight in module._parameters.items():
                if id(weight) in names:
                    own[leaf] = names[id(weight)]
            if own or isinstance(module, torch.nn.Embedding):
                module.register_forward_hook(functools.partial(self.watch, path, own))

    def watch(self, path, own, module, inputs, output):
        """After a module's forward pass: finish the chain rule once its output has a gradient."""
        if not torch.is_grad_enabled():
            return
        x = inputs[0].detach()  # (B, T, in), or ids (B, T)
        is_lookup = isinstance(module, torch.nn.Embedding)
        if len(x) != self.n_rows or x.dim() < (2 if is_lookup else 3):
            common.fail(f"{path} mixes the examples of a batch: its input is {tuple(x.shape)}")
        if is_lookup:
            output.requires_grad_()  # the graph begins here, as all weights are frozen
        if own:
            add = self.add_lookup if is_lookup else self.add_linear
            output.register_hook(lambda grad: add(own, module, x, grad))

    def add_linear(self, own, module, x, grad):
        """x: (B, .., in), grad: (B, .., out)"""
        x, grad = x.flatten(1, -2), grad.flatten(1, -2)
        if "bias" in own:
            self.sketch.add(self.sums, own["bias"], 0, grad.sum(1))
        if "weight" not in own:
            return
        left, right = (x, grad) if isinstance(module, Conv1D) else (grad, x)
        width = right.shape[2]
        n = max(1, CHUNK // (self.n_rows * width))  # rows of the weight at a time
        for first in range(0, left.shape[2], n):
            part = left[:, :, first : first + n].transpose(1, 2) @ right  # (B, n, width)
            self.sketch.add(self.sums, own["weight"], first * width, part.flatten(1))

    def add_lookup(self, own, module, ids, grad):
        """ids: (B, T), grad: (B, T, D)"""
        if module.padding_idx is not None:  # torch never trains this row
            grad = grad * (ids != module.padding_idx)[..., None]
        width = grad.shape[2]
        coordinates = ids[..., None] * width + torch.arange(width, device=ids.device)
        self.sketch.add_at(self.sums, own["weight"], coordinates.flatten(1), grad.flatten(1))

    def rows(self, batch):
        """((2, B) outputs, (B, d) sketched gradients)"""
        self.n_rows = len(batch["labels"])
        self.sums = self.sketch.start(self.n_rows)
        outputs = row_outputs(self.model, batch)
        outputs[self.output].sum().backward()
        return outputs.detach(), self.sketch.finish(self.sums)

    def check(self, batch):
        """Fail unless the rows of a batch add up to what autograd finds: a family may use a weight
        in a way of its own."""
        for weight in self.tracked.values():
            weight.requires_grad_()
        _, rows = self.rows(batch)
        sums = self.sketch.start(1)
        for name, weight in self.tracked.items():
            if weight.grad is not None:
                self.sketch.add(sums, name, 0, weight.grad.reshape(1, -1))
                weight.grad = None
        self.model.requires_grad_(False)
        expected = self.sketch.finish(sums)
        error = float((rows.sum(0) - expected).norm() / expected.norm())
        if not error < (0.1 if self.model.dtype == torch.bfloat16 else 1e-3):
            family = self.model.config.model_type
            common.fail(f"{family}: the hooks' gradients differ from autograd's by {error:.2g}")


# ------------------------------------------------------------------------------------------ store

# what must be the same for rows of two stores to be multiplied
SAME_ROWS = ["format", "dim", "seed", "output", "parameters"]


class Store:
    """What collect has finished. rows: (n, d) fp32, on disk; loss, logodds, n_tokens and group, the
    number of its group: (n,). names: of the groups. manifest: what was collected, and its flags."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.manifest = json.loads((self.path / "manifest.json").read_text())
        self.rows = np.load(self.path / "rows.npy", mmap_mode="r")
        arrays = np.load(self.path / "outputs.npz")
        self.loss, self.logodds = arrays["outputs"]
        self.n_tokens = arrays["n_tokens"]
        self.group = arrays["group"]
        self.names = arrays["names"].tolist()

    def flags(self):
        """Those of its collection, to read its data again and to load its model."""
        return argparse.Namespace(**self.manifest)


def open_stores(args, problems):
    """[Store] of --grads, --target_grads and --anchor_grads, which must belong together."""
    paths = [args.grads]
    if hasattr(args, "target_grads"):
        paths += [args.target_grads, *getattr(args, "anchor_grads", [])]
    for path in paths:
        if not pathlib.Path(path, common.COMPLETE).exists():
            problems.append(f"{path!r} is no finished store: the same collect command continues it")
    if problems:
        common.fail(problems)
    stores = [Store(path) for path in paths]
    for i, store in enumerate(stores[1:], start=1):
        same = "model_sha256" if i == 1 else "data_sha256"
        other = stores[max(0, i - 2)]  # anchors: the store of the same data
        for key in [*SAME_ROWS, same]:
            if store.manifest[key] != other.manifest[key]:
                problems.append(f"{store.path} and {other.path} have another {key}: collect anew")
    return stores


def records_of(store, problems):
    """The records behind the rows of a store, as read_records gives them."""
    records = read_records(store.flags(), problems)
    if not problems and sha256_of_records(records) != store.manifest["data_sha256"]:
        problems.append(f"{store.path}: its data files have changed: collect again")
    return records


def sha256_of_records(records):
    text = json.dumps([(group, record) for _, group, record in records])
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of_model(model):
    arrays = {}
    for name, weight in model.named_parameters():
        arrays[name] = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return common.sha256_of(arrays)


def describe(args, gradients, source, records):
    """manifest.json: what the rows are; the flags, from which records_of and linerr begin."""
    manifest = dict(vars(args))
    paths = []
    for name in args.data_name:
        path = common.find_input(args, "data", name, common.DATA_ENDINGS, [])
        paths.append(str(path.resolve()))
    manifest.update(out="", model_init_name="", model_init_path=source, data_name=paths)
    if os.path.isdir(source):
        manifest["model_init_path"] = str(pathlib.Path(source).resolve())
    manifest["format"] = FORMAT
    manifest["is_seq2seq"] = gradients.model.config.is_encoder_decoder
    shapes = {name: list(weight.shape) for name, weight in gradients.tracked.items()}
    manifest["parameters"] = shapes
    manifest["model_sha256"] = sha256_of_model(gradients.model)
    manifest["data_sha256"] = sha256_of_records(records)
    return manifest


def start_store(out, manifest):
    """Rank 0. Make the folder, or see that it is the same store, unfinished."""
    path = out / "manifest.json"
    if path.exists():
        earlier = json.loads(path.read_text())
        changed = [key for key in manifest if earlier.get(key) != manifest[key]]
        if changed:
            common.fail(f"{out} is another store ({', '.join(changed)}): choose another --out")
    elif out.exists() and any(out.iterdir()):
        common.fail(f"{out} is no store: choose another --out")
    else:
        (out / "parts").mkdir(parents=True, exist_ok=True)
        common.write_json(path, manifest)


def write_part(path, **arrays):
    """Aside, synced and renamed: after a kill a part is there or it is not."""
    aside = path.with_suffix(".tmp")
    with open(aside, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def finish_store(out, examples, records, dim):
    """Rank 0. All parts become rows.npy and outputs.npz."""
    groups = [group for _, group, _ in records]
    names, group = np.unique(groups, return_inverse=True)
    outputs = np.zeros((2, len(examples)))
    rows = np.lib.format.open_memmap(out / "rows.npy", "w+", np.float32, (len(examples), dim))
    for path in (out / "parts").glob("*.npz"):
        part = np.load(path)
        rows[part["ids"]] = part["rows"]
        outputs[:, part["ids"]] = part["outputs"]
    rows.flush()
    n_tokens = [int(example.is_target.sum()) for example in examples]
    arrays = {"outputs": outputs, "n_tokens": n_tokens, "group": group, "names": names}
    write_part(out / "outputs.npz", **arrays)
    (out / common.COMPLETE).touch()
    shutil.rmtree(out / "parts")


def collect(args, problems):
    """Outputs and sketched gradients of every example; batches are dealt over the processes."""
    source, config, tokenizer, records, examples = prepare(args, problems)
    model = load_model(args, source, config, tokenizer)
    out = pathlib.Path(args.out)
    gradients = Gradients(model, args.dim, args.seed, args.output)
    if args.lora_rank and not common.adapter_base(source):
        log("WARNING a new LoRA has B = 0 and so no gradient of A: fine-tune a little first")
    if common.rank() == 0:
        start_store(out, describe(args, gradients, source, records))
    dist.barrier()
    if (out / common.COMPLETE).exists():
        log(f"{out} is finished")
        return
    gradients.check(make_batch(model, tokenizer, examples[:3]))
    batches = make_batches(examples, args.batch_size)
    left = [i for i in range(len(batches)) if not (out / f"parts/{i}.npz").exists()]
    n_left = sum(len(batches[i]) for i in left)
    log(f"{n_left} of {len(examples)} rows to collect: {out}")
    mine = left[common.rank() :: common.world_size()]
    for i in tqdm(mine, "collecting", delay=5, disable=common.rank() > 0 or None):
        batch = make_batch(model, tokenizer, [examples[k] for k in batches[i]])
        outputs, rows = gradients.rows(batch)
        if not rows.isfinite().all():
            where, *_ = records[batches[i][0]]
            common.fail(f"a gradient is not finite; its batch begins with {where}", only_here=True)
        arrays = {"outputs": outputs.cpu().numpy(), "rows": rows.cpu().numpy()}
        write_part(out / f"parts/{i}.npz", ids=batches[i], **arrays)
    dist.barrier()  # all parts are written
    if common.rank() == 0:
        finish_store(out, examples, records, args.dim)
    dist.barrier()


# ----------------------------------------------------------------------------------------- linerr


def outputs_of(model, batches, output):
    """(n,) the output of each row of the batches; with gradients, those of their sum."""
    outputs = []
    for batch in batches:
        of_rows = row_outputs(model, batch)[OUTPUTS.index(output)]
        if of_rows.requires_grad:
            of_rows.sum().backward()
        outputs.append(of_rows.detach())
    return torch.cat(outputs).double().cpu().numpy()


def norm_of(tensors):
    squares = [tensor.double().square().sum() for tensor in tensors.values()]
    return math.sqrt(sum(map(float, squares)))


def approximation_errors(before, slope, after):
    """Of before + slope for after, (n,) each. squared_error is the earlier system's, relative to
    the larger output and squared; no_gradient the same without slope; r2 of the changes."""
    larger = np.maximum(np.maximum(abs(before), abs(after)), 1e-30)
    error = before + slope - after
    change = after - before
    return {
        "squared_error": float(np.mean(np.square(error / larger))),
        "no_gradient": float(np.mean(np.square(change / larger))),
        "r2": float(1 - np.square(error).sum() / np.square(change).sum()),
    }


def print_table(rows):
    """rows: dictionaries with the same keys."""
    log("".join(f"{name:>26}" for name in rows[0]))
    for row in rows:
        cells = [
            f"{cell:>26}" if isinstance(cell, str) else f"{cell:>26.4g}" for cell in row.values()
        ]
        log("".join(cells))


def linerr(args, problems):
    """How far the first-order approximation holds: its error against the distance from the weights,
    along the mean gradient of the examples."""
    (store,) = open_stores(args, problems)
    flags = argparse.Namespace(**store.manifest)
    source, config, tokenizer, _, examples = prepare(flags, problems)
    model = load_model(flags, source, config, tokenizer)
    tracked, _ = tracked_parameters(model)
    model.requires_grad_(False)
    batches = []
    for ids in make_batches(examples, flags.batch_size):
        batches.append(make_batch(model, tokenizer, [examples[i] for i in ids]))
    for weight in tracked.values():
        weight.requires_grad_()
    outputs_of(model, batches, flags.output)
    start = {name: weight.detach().clone() for name, weight in tracked.items()}
    step = {name: weight.grad for name, weight in tracked.items() if weight.grad is not None}

    @torch.no_grad()
    def outputs_at(distance):
        size = distance * norm_of(start) / norm_of(step)
        for name in step:
            tracked[name].copy_(start[name] + size * step[name])
        return outputs_of(model, batches, flags.output)

    before = outputs_at(0)
    slope = (outputs_at(NEARBY) - outputs_at(-NEARBY)) / (2 * NEARBY)
    rows = []
    for scale in args.scale:
        errors = approximation_errors(before, scale * slope, outputs_at(scale))
        rows.append({"distance": scale, **errors})
    print_table(rows)
    common.write_json(store.path / "linerr.json", rows)


# ---------------------------------------------------------------------------------------- subsets


def unit_rows(rows):
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def cluster(rows, k, seed):
    """(n,) cluster of each row by cosine: spherical k-means (Dhillon and Modha 2001), the best of
    four starts."""
    rows = unit_rows(rows)
    best_fit = -math.inf
    for start in range(4):
        rng = np.random.default_rng([7, seed, start])
        centres = rows[rng.choice(len(rows), k, replace=False)]
        for _ in range(50):
            cosines = rows @ centres.T
            nearest = cosines.argmax(1)
            sums = np.zeros_like(centres)
            np.add.at(sums, nearest, rows)
            centres = unit_rows(sums)
        fit = cosines.max(1).sum()
        if fit > best_fit:
            best, best_fit = nearest, fit
    return best


def write_clusters(store, k, seed, out):
    """A store with the same rows in other groups."""
    group = cluster(store.rows, min(k, len(store.rows)), seed)
    out.mkdir()
    (out / "rows.npy").symlink_to((store.path / "rows.npy").resolve())
    common.write_json(out / "manifest.json", store.manifest)
    outputs = [store.loss, store.logodds]
    names = [f"cluster_{i}" for i in range(k)]
    arrays = {"outputs": outputs, "n_tokens": store.n_tokens, "group": group, "names": names}
    write_part(out / "outputs.npz", **arrays)
    (out / common.COMPLETE).touch()
    log(f"{out}: clusters of {np.bincount(group).tolist()} examples")


def subsets(args, problems):
    """Random subsets of the groups of a store; or a store whose groups are clusters of its rows."""
    out = pathlib.Path(args.out)
    if out.exists():
        problems.append(f"--out {out} exists: choose another name")
    (store,) = open_stores(args, problems)
    if args.clusters:
        write_clusters(store, args.clusters, args.seed, out)
        return
    rng = np.random.default_rng([8, args.seed])
    n_groups = len(store.names)
    size = count(args.subset_size, n_groups)
    lines = []
    for _ in range(args.number_of_subsets):
        chosen = sorted(rng.permutation(n_groups)[:size])
        lines.append(" ".join(map(str, chosen)))
    out.write_text("\n".join(lines) + "\n")
    log(f"{out}: {len(lines)} subsets of {size} of the groups {' '.join(store.names)}")


# ----------------------------------------------------------------------------------------- tables


def read_subsets(args, store, problems):
    """[tuple of group numbers], each once, in the order of the file."""
    subsets = {}
    for line in pathlib.Path(args.subsets).read_text().splitlines():
        words = line.split()
        if not all(word.isdecimal() and int(word) < len(store.names) for word in words):
            problems.append(f"--subsets: {line!r:.40}, expected numbers below {len(store.names)}")
        elif words:
            subsets[tuple(sorted(map(int, words)))] = None
    return list(subsets)[: args.limit or None]


def write_table(path, names, rows):
    """rows: [(run, subset, (G + 1,) losses)]. Behind the run the columns of the earlier system."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "Data indices", *[f"loss_{name}" for name in names], "loss"])
        for run, subset, losses in rows:
            writer.writerow([run, " ".join(map(str, subset)), *losses])


def read_table(path):
    """(column names, {(run, subset): losses}) of a table of estimate or truth."""
    with open(path, newline="") as file:
        header, *lines = csv.reader(file)
    rows = {}
    for run, indices, *losses in lines:
        subset = tuple(map(int, indices.split()))
        rows[run, subset] = np.array(losses, float)
    return header[2:], rows


def true_runs(rows):
    """{subset: [losses of its runs]} of a table of truth."""
    runs = collections.defaultdict(list)
    for (run, subset), losses in rows.items():
        if run.isdecimal():
            runs[subset].append(losses)
    return runs


# --------------------------------------------------------------------------------------- estimate


def token_weights(store, group, n_groups):
    """(G + 1, n) fp32: in a group a row counts its target tokens, for its loss is their mean; the
    last line has all rows. So losses are those that the trainers report."""
    weights = np.zeros((n_groups + 1, len(group)), np.float32)
    weights[group, np.arange(len(group))] = store.n_tokens
    weights[-1] = store.n_tokens
    return weights


def group_means(values, store):
    """(.., n) of the rows -> (.., G + 1): the mean over the tokens of each group, and of all."""
    weights = token_weights(store, store.group, len(store.names))
    return values @ weights.T / np.maximum(weights.sum(1), 1e-30)


def group_sums(store, group, n_groups):
    """((G, d) sums of the rows over tokens, (G,) numbers of tokens)"""
    weights = token_weights(store, group, n_groups)[:-1]
    return weights @ store.rows, weights.sum(1)


def downhill(store):
    """Where a training step goes: along the gradient of the log-odds, against that of the loss."""
    return 1 if store.manifest["output"] == "logodds" else -1


def mean_directions(train, store, subsets):
    """(S, d): to first order, fine-tuning on a subset goes along the mean of its rows. train knows the
    groups of the rows."""
    sums, n_tokens = group_sums(store, train.group, len(train.names))
    member = np.zeros((len(subsets), len(n_tokens)), np.float32)
    for row, subset in zip(member, subsets):
        row[list(subset)] = 1
    return downhill(store) * (member @ sums) / (member @ n_tokens)[:, None]


def anchored_directions(train, anchor, subsets):
    """(S, d): from the model that is fine-tuned on everything to that of each subset. Gradients
    change on the way, hence the mean of those at both ends."""
    everything = tuple(range(len(train.names)))
    at_start = mean_directions(train, train, [*subsets, everything])
    at_anchor = mean_directions(train, anchor, [*subsets, everything])
    directions = (at_start + at_anchor) / 2
    return directions[:-1] - directions[-1]


def fit_logistic(rows, log_odds):
    """w (d,) that minimises the mean of log(1 + exp(-(log_odds + rows w))) + penalty |w|^2: the
    fine-tuning of a model that is linear in its weights (Zhang et al. 2025)."""
    rows = torch.as_tensor(rows, dtype=torch.float64)
    log_odds = torch.as_tensor(log_odds)
    penalty = PENALTY * rows.square().sum(1).mean()
    w = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        losses = torch.nn.functional.softplus(-(log_odds + rows @ w))
        value = losses.mean() + penalty * w.square().sum()
        value.backward()
        return value

    optimizer.step(objective)
    return w.detach().numpy()


def logistic_directions(train, subsets):
    """(S, d)"""
    directions = []
    for subset in tqdm(subsets, "fitting", delay=5):
        chosen = np.isin(train.group, subset) & (train.n_tokens > 0)
        directions.append(fit_logistic(train.rows[chosen], train.logodds[chosen]))
    return np.array(directions, np.float32)


def predict(store, directions, step_size):
    """(S, G + 1) losses after a step, to first order. Of log-odds o a loss is log(1 + exp(-o)),
    which bends as the true one does."""
    change = step_size * directions @ store.rows.T  # (S, n)
    if store.manifest["output"] == "logodds":
        after, before = -(store.logodds + change), -store.logodds
        change = np.logaddexp(0, after) - np.logaddexp(0, before)
    return group_means(store.loss + change, store)


def fit_step(args, store, predicted, problems):
    """(step size, subsets that it was fitted to): least squares of the changes in the first K true
    runs on {subset: changes (G + 1,) predicted for step size 1}, all groups together."""
    path, _, k = args.calibrate.rpartition(":")
    runs = true_runs(read_table(path)[1])
    used = [subset for subset in runs if subset in predicted][: int(k)]
    if len(used) < int(k):
        problems.append(f"--calibrate: {len(used)} of the runs in {path} are in --subsets")
        common.fail(problems)
    start = group_means(store.loss, store)
    true = np.array([runs[subset][0] - start for subset in used])[:, :-1]
    ours = np.array([predicted[subset] for subset in used])[:, :-1]
    return float((ours * true).sum() / np.square(ours).sum()), used


def estimate(args, problems):
    """The loss of every target group after fine-tuning on each subset."""
    train, target, *anchors = open_stores(args, problems)
    subsets = read_subsets(args, train, problems)
    if args.fit == "logistic" and (anchors or train.manifest["output"] != "logodds"):
        problems.append("--fit logistic: collect with --output logodds, and without --anchor_grads")
    if problems:
        common.fail(problems)
    reference = target
    if anchors:
        reference = anchors[1]
        directions = anchored_directions(train, anchors[0], subsets)
    elif args.fit == "logistic":
        directions = logistic_directions(train, subsets)
    else:
        directions = mean_directions(train, train, subsets)
    start = group_means(reference.loss, reference)
    mean_change = np.abs(directions @ reference.rows.T).mean()
    a_little = A_LITTLE * reference.loss.mean() / max(mean_change, 1e-30)
    step_size, used = args.step_size, []
    if args.calibrate:
        changes = (predict(reference, directions, a_little) - start) / a_little
        step_size, used = fit_step(args, reference, dict(zip(subsets, changes)), problems)
    if step_size <= 0:
        log(
            "WARNING nothing tells the step size (--calibrate, --step_size), or true runs go against "
            "the first order: the order of the subsets means something, the size of changes nothing"
        )
        step_size = a_little
    rows = [("base", (), group_means(target.loss, target))]
    if anchors:
        rows.append(("all", range(len(train.names)), start))
    for subset, losses in zip(subsets, predict(reference, directions, step_size)):
        rows.append(("calibration" if subset in used else "estimate", subset, losses))
    write_table(args.out, target.names, rows)
    log(f"{args.out}: {len(subsets)} subsets, step size {step_size:.6g}")


# ------------------------------------------------------------------------------------------ truth


def write_data(path, **splits):
    """A data file of the trainers, of [(where, group, record)] for each split."""
    lists = {}
    for split, records in splits.items():
        lists[split] = [record for _, _, record in records]
    common.write_json(path, lists)


def as_words(flags):
    """{name: value} -> words of a command."""
    words = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list) and value:
            words += [f"--{name}", *map(str, value)]
        elif value not in (False, [], ""):
            words += [f"--{name}", str(value)]
    return words


def trainer_command(args, store):
    """Words that start the trainer on the model of a store, with its lengths."""
    collected = store.manifest
    flags = {"save_steps": "0", "eval_steps": 10**9}
    for name in ("model_init_path", "precision", "quantize"):
        flags[name] = collected[name]
    if collected["lora_rank"]:
        for name in ("lora_rank", "lora_alpha", "lora_targets"):
            flags[name] = collected[name]
    if collected["is_seq2seq"]:
        script = "seq2seq.py"
        flags["max_source_length"] = collected["max_source_length"]
        flags["max_target_length"] = collected["max_length"]
        flags["max_new_tokens"] = 1
    else:
        script = "sft_causal.py"
        flags["max_length"] = collected["max_length"]
        flags["raw_prompt"] = collected["raw_prompt"]
        flags["n_generate"] = "0"
    start = [*shlex.split(args.launcher), str(common.HERE / script)]
    return [*start, *as_words(flags), *args.trainer_flags]


def run_trainer(command):
    """What it prints is shown where it fails."""
    launchers = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {key: os.environ[key] for key in os.environ.keys() - launchers}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        output = (result.stdout + result.stderr)[-2000:]
        common.fail(f"{output}\n{shlex.join(command)} failed; the same command goes on from here")


def last_losses(run_dir, groups):
    """(G + 1,) of the trainer's last evaluation."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    last = [row for row in rows if row["split"] == "eval"][-1]
    return [last[f"eval/{name}loss"] for name in [*[f"{group}/" for group in groups], ""]]


def truth(args, problems):
    """Fine-tune on everything, which gives the anchor, and on each subset. Losses are those of the
    trainer's evaluation: a data set for each target group."""
    train, target = open_stores(args, problems)
    subsets = read_subsets(args, train, problems)
    records = records_of(train, problems)
    target_records = records_of(target, problems)
    if problems:
        common.fail(problems)
    work = pathlib.Path(f"{args.out}.runs").resolve()
    (work / "data").mkdir(parents=True, exist_ok=True)
    groups = [f"target-{number}" for number in range(len(target.names))]
    for group, name in zip(groups, target.names):
        write_data(work / f"data/{group}.json", eval=[r for r in target_records if r[1] == name])
    command = trainer_command(args, train)
    runs = [("all", tuple(range(len(train.names))), 0)]
    for subset in subsets:
        runs += [(str(repeat), subset, repeat) for repeat in range(args.repeat)]
    rows = [("base", (), group_means(target.loss, target))]
    for run, subset, repeat in tqdm(runs, "fine-tuning", delay=5):
        name = run
        if run != "all":  # a name for all that makes the run
            key = common.derive_seed(command, subset, repeat, train.manifest["data_sha256"])
            name = f"subset-{key}"
        run_dir = work / "models" / name
        finished = work / f"{name}.json"
        if run == "all" or not finished.exists():
            chosen = [records[i] for i in np.flatnonzero(np.isin(train.group, subset))]
            write_data(work / f"data/{name}.json", train=chosen)
            flags = {"data_name": [name, *groups], "mount_dir": work, "training_run_name": name}
            run_trainer([*command, *as_words(flags), "--seed", str(args.seed + repeat)])
            common.write_json(finished, last_losses(run_dir, groups))
        if run != "all":
            shutil.rmtree(run_dir, ignore_errors=True)
        rows.append((run, subset, json.loads(finished.read_text())))
        write_table(args.out, target.names, rows)
    log(f"{args.out}: {len(runs)} true runs; the anchor is {work / 'models/all'}")


# ---------------------------------------------------------------------------------------- compare


def ranks(values):
    """Ties get the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def correlation(a, b):
    """Pearson's, mean over the columns of (S, G)."""
    a, b = a - a.mean(0), b - b.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))
    return float(np.nanmean(found)) if np.isfinite(found).any() else math.nan


def agreement(estimates, true, base):
    """Of (S, G) losses. Correlations are across subsets, mean over groups; r2 is that of the changes
    from base (G,), the losses before fine-tuning."""
    error = estimates - true
    ranked = [np.apply_along_axis(ranks, 0, losses) for losses in (estimates, true)]
    return {
        "pearson": correlation(estimates, true),
        "spearman": correlation(*ranked),
        "relative_error": float(np.mean(np.abs(error) / np.abs(true))),
        "r2": float(1 - np.square(error).sum() / np.square(true - base).sum()),
    }


def compare(args, problems):
    """Estimates against true runs, beside what another run would say and what none needs."""
    columns, estimates = read_table(args.estimates)
    true_columns, true_rows = read_table(args.truth)
    runs = true_runs(true_rows)
    shared = [subset for subset in runs if ("estimate", subset) in estimates]
    if columns != true_columns or len(shared) < 3:
        problems.append(f"{len(shared)} subsets with the same groups in both tables, 3 expected")
    if problems:
        common.fail(problems)
    base = true_rows["base", ()][:-1]
    true = np.array([np.mean(runs[subset], axis=0) for subset in shared])[:, :-1]
    found = np.array([estimates["estimate", subset] for subset in shared])[:, :-1]
    nothing, mean = np.zeros_like(true) + base, np.zeros_like(true) + true.mean(0)
    table = {"estimate": agreement(found, true, base)}
    repeated = [runs[subset][:2] for subset in shared if len(runs[subset]) > 1]
    if len(repeated) > 2:
        first, second = np.array(repeated)[:, :, :-1].swapaxes(0, 1)
        table["ceiling: another order"] = agreement(first, second, base)
    table["baseline: nothing changes"] = agreement(nothing, true, base)
    table["baseline: mean of truth"] = agreement(mean, true, base)
    print_table([{"": name, **row} for name, row in table.items()])
    common.write_json(f"{args.estimates}.compare.json", {"subsets": len(shared), **table})
    scatter(f"{args.estimates}.png", found - base, true - base, columns)


def scatter(path, estimates, true, columns):
    try:
        from matplotlib.figure import Figure  # optional package
    except ImportError:
        log("no picture: pip install matplotlib")
        return
    figure = Figure(layout="constrained")
    axes = figure.add_subplot(xlabel="true change of the loss", ylabel="estimated change")
    axes.axline((0, 0), slope=1, color="grey")
    for i, name in enumerate(columns[:-1]):
        axes.plot(true[:, i], estimates[:, i], ".", label=name)
    axes.legend()
    figure.savefig(path)


# ----------------------------------------------------------------------------------------- select


def influence(train, target):
    """(n,) how much each training row helps: its cosine with the rows of a target group, mean over
    these, the greatest of the groups (LESS, Xia et al. 2024)."""
    target_rows = unit_rows(target.rows)
    means = [target_rows[target.group == g].mean(0) for g in range(len(target.names))]
    return (unit_rows(train.rows) @ np.array(means).T).max(1)


def forward_selection(train, target, step_size, n_most):
    """{group: estimated mean loss with it}: the next group is the one that lowers it most. For
    training by epochs, where each group brings its own steps along."""
    sums, n_tokens = group_sums(train, train.group, len(train.names))
    steps = downhill(train) * sums / n_tokens.sum()
    chosen = {}
    while len(chosen) < n_most:
        left = [g for g in range(len(steps)) if g not in chosen]
        directions = steps[list(chosen)].sum(0) + steps[left]
        losses = predict(target, directions, step_size)[:, -1]
        if losses.min() > min(chosen.values(), default=math.inf):
            break
        chosen[left[losses.argmin()]] = float(losses.min())
    return chosen


def ensemble(path, n_most):
    """{group: mean estimated loss of the subsets that have it}, the lowest first."""
    losses = collections.defaultdict(list)
    for (run, subset), estimated in read_table(path)[1].items():
        if run == "estimate":
            for g in subset:
                losses[g].append(estimated[-1])
    means = {g: float(np.mean(losses[g])) for g in losses}
    return {g: means[g] for g in sorted(means, key=means.get)[:n_most]}


def select(args, problems):
    """A data file of the examples, or groups of examples, that help the target most."""
    train, target = open_stores(args, problems)
    records = records_of(train, problems)
    target_records = records_of(target, problems)
    n_groups = count(args.top, len(train.names))
    if args.method == "forward" and not args.step_size:
        problems.append("--method forward: --step_size, as estimate prints it")
    if problems:
        common.fail(problems)
    if args.method == "less":
        scores = influence(train, target)
        kept = np.argsort(-scores)[: count(args.top, len(scores))]
        scored = [(int(i), float(scores[i])) for i in kept]
    else:
        if args.method == "forward":
            best = forward_selection(train, target, args.step_size, n_groups)
        else:
            best = ensemble(args.estimates, n_groups)
        kept = np.flatnonzero(np.isin(train.group, list(best)))
        scored = [(train.names[g], best[g]) for g in best]
    write_data(args.out, train=[records[i] for i in sorted(kept)], eval=target_records)
    common.write_json(f"{args.out}.scores.json", scored)
    log(f"{args.out}: {len(kept)} of {len(records)} examples; the best are {scored[:5]}")


# ------------------------------------------------------------------------------------------- demo

DEMO_BASE = """
--model_init_name tiny-llama --raw_prompt --training_run_name base --max_steps 90 --n_generate 0
--train_batch_size 64 --learning_rate 0.004 --warmup_steps 50 --save_steps 0 --eval_steps 90
"""
DEMO = """
collect --model_init_path {out}/models/base {data} --split train --out {out}/G
collect --model_init_path {out}/models/base {data} --split eval --out {out}/E
subsets --grads {out}/G --number_of_subsets 200 --out {out}/subsets.txt
truth {stores} --limit {limit} --out {out}/truth.csv -- {tune}
collect --model_init_path {out}/truth.csv.runs/models/all {data} --split train --out {out}/GA
collect --model_init_path {out}/truth.csv.runs/models/all {data} --split eval --out {out}/EA
estimate {stores} --calibrate {out}/truth.csv:3 --out {out}/base.csv
compare {out}/base.csv {out}/truth.csv
estimate {stores} {anchors} --calibrate {out}/truth.csv:3 --out {out}/anchor.csv
compare {out}/anchor.csv {out}/truth.csv
select {pair} --method ensemble --estimates {out}/anchor.csv --top 12 --out {out}/chosen.json
"""


def demo(args, problems):
    """16 groups of four tasks, four of them with wrong answers: which group helps which task?"""
    out = args.out
    data = common.HERE / "data"
    pair = f"--grads {out}/G --target_grads {out}/E"
    parts = {
        "data": f"--data {data}/skills.jsonl --groups group --raw_prompt",
        "pair": pair,
        "stores": f"{pair} --subsets {out}/subsets.txt",
        "anchors": f"--anchor_grads {out}/GA {out}/EA",
        "tune": "--max_steps 40 --train_batch_size 32 --learning_rate 0.0001 "
        "--lr_scheduler_type constant",
    }
    base = shlex.split(DEMO_BASE) + ["--data_name", f"{data}/skills_base.jsonl", "--mount_dir", out]
    log("a base model that knows the tasks a little: python sft_causal.py " + shlex.join(base))
    run_trainer([sys.executable, str(common.HERE / "sft_causal.py"), *base])
    for line in DEMO.format(out=out, limit=args.limit, **parts).split("\n"):
        words = line.split()
        if words and not (words[0] == "subsets" and os.path.exists(words[-1])):
            log(f"\npython project_grads.py {line}")
            main(parse_args(words))
    log(DEMO_READING.format(out=out))


DEMO_READING = """
{out} holds all of it. Each row above is an agreement with real fine-tunes, of which three have given
the step size and are not judged. base: gradients of the base model; anchor: around the model that is
fine-tuned on everything. Spearman 1 would rank the subsets of every task as fine-tuning does, r2 says
whether the sizes are right too. chosen.json leaves out the groups with wrong answers."""

# ------------------------------------------------------------------------------------------- main

COMMANDS = {
    "collect": (collect, COLLECT, COLLECT_FLAGS),
    "linerr": (linerr, (), LINERR_FLAGS),
    "subsets": (subsets, ("seed",), SUBSETS_FLAGS),
    "estimate": (estimate, (), ESTIMATE_FLAGS),
    "truth": (truth, ("seed",), TRUTH_FLAGS),
    "compare": (compare, (), {}),
    "select": (select, (), SELECT_FLAGS),
    "demo": (demo, (), DEMO_FLAGS),
}


def check_args(args, problems):
    """What can be said without a store or a model."""
    for name, value in vars(args).items():
        if name in REQUIRED and value == "":
            problems.append(f"--{name} is missing")
        if name in POSITIVE and value < 1:
            problems.append(f"--{name} {value}: expected 1 or more")
        if name in SHARES and not (0 < value <= 1 or value > 1 and value == int(value)):
            problems.append(f"--{name} {value}: expected a share up to 1, or a whole number")
        if name in ("subsets", "estimates", "truth") and value and not os.path.exists(value):
            problems.append(f"{value} is not there")
    if args.command != "collect" and common.world_size() > 1:
        problems.append(f"{args.command} runs in one process")
    if args.command == "select" and (args.method == "ensemble") != bool(args.estimates):
        problems.append("--method ensemble and --estimates belong together")
    if args.command == "estimate":
        path, _, k = args.calibrate.rpartition(":")
        if args.calibrate and not (os.path.exists(path) and k.isdecimal()):
            problems.append(f"--calibrate {args.calibrate}: expected a table and a number, FILE:3")


def main(args):
    problems = []
    check_args(args, problems)
    command, *_ = COMMANDS[args.command]
    command(args, problems)


def parse_args(argv):
    """Without a command the demo. Flags behind -- are the trainer's."""
    argv, trainer_flags = [*argv], []
    if "--" in argv:
        split = argv.index("--")
        argv, trainer_flags = argv[:split], argv[split + 1 :]
    argv = [ALIASES.get(word, word) for word in argv if word not in ALWAYS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher gives it
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (function, shared, own_flags) in COMMANDS.items():
        sub = parsers.add_parser(name, description=function.__doc__, allow_abbrev=False)
        sub.set_defaults(**{flag: spec[0] for flag, spec in common.SHARED_FLAGS.items()})
        for flag in shared:
            common.add_flag(sub, flag, *common.SHARED_FLAGS[flag])
        for flag, spec in own_flags.items():
            common.add_flag(sub, flag, *spec)
        if name == "compare":
            sub.add_argument("estimates")
            sub.add_argument("truth")
    args = parser.parse_args(argv or ["demo"])
    args.trainer_flags = trainer_flags
    args.no_train = True  # of common.open_model: nothing is added to the model
    if args.command == "linerr":
        args.scale = list(map(float, args.scale))
    if args.command == "collect" and args.load_model_dir:
        args.model_init_path = args.load_model_dir
    return args


if __name__ == "__main__":
    common.launch(main, parse_args(sys.argv[1:]))
