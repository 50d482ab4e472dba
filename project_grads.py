"""What would fine-tuning on part of the data do? Estimates from one projected gradient per example,
without fine-tuning.

    {"prompt": "12 + 30 =", "completion": " 42", "skill": "add"}      or any record of the trainers

    python project_grads.py                             # demo: estimates beside real fine-tunes
    python project_grads.py collect --model_init_name base --data mix --groups skill --out G
    python project_grads.py collect --model_init_name base --data mix --split eval --out E
    python project_grads.py subsets --grads G --out subsets.txt
    python project_grads.py estimate --grads G --target_grads E --subsets subsets.txt --out est.csv
    deepspeed --num_gpus 4 project_grads.py collect --model_init_path some/model --data mix --out G

collect: a store of gradients of a model, a row of --dim numbers for each example. estimate: to
first order the loss of a target after a step D of the weights is f + g.D, with g the target's
gradient, and fine-tuning on a subset S goes along the mean gradient of S.
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
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import common  # first: it prepares the import of DeepSpeed

# isort: split
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from common import log

# flags of common.py that collect has; the others keep their defaults
MODEL = [
    "model_init_name",
    "model_init_path",
    "mount_dir",
    "data_name",
    "precision",
    "quantize",
    "lora_rank",
    "lora_alpha",
]
SEED = (0, "of the sketch, of drawing and of new weights")
COLLECT_FLAGS = {
    **{name: common.SHARED_FLAGS[name] for name in MODEL},
    "split": ("train", "train, eval or test", "train", "eval", "test"),
    "groups": ("", "key of the records that names their group"),
    "dim": (4096, "numbers of a row"),
    "seed": SEED,
    "batch_size": (16, "examples of one backward pass"),
    "num_batches_gradients": (0, "only so many x --batch_size examples"),
    "downsample": (1.0, "share or number of examples"),
    "raw_prompt": (False, "texts without a template"),
    "max_length": (2048, "longer examples lose their end"),
    "max_source_length": (1024, "the same of an encoder's prompts"),
    "out": ("", "folder of the store"),
}
GRADS = {"grads": ("", "store of the training examples")}
PAIR = {**GRADS, "target_grads": ("", "store of the target examples")}
LINERR_FLAGS = {
    **GRADS,
    "scale": (0.1, "distance / norm of the weights"),
}
SUBSETS_FLAGS = {
    **GRADS,
    "number_of_subsets": (100, "lines of the file"),
    "subset_size": (0.5, "share or number of groups"),
    "clusters": (0, "instead: a store with clusters as groups"),
    "seed": SEED,
    "out": ("", "file (or store) to write"),
}
TABLE = {
    **PAIR,
    "subsets": ("", "file of group numbers"),
    "limit": (0, "only the first so many subsets"),
    "out": ("", "table to write, .csv"),
}
ESTIMATE_FLAGS = {
    **TABLE,
    "anchor_grads": ([], "the same two at the anchor"),
    "fit": ("mean", "mean or logistic, of a subset", "mean", "logistic"),
    "calibrate": ("", "FILE:K, by K runs of truth"),
    "step_size": (0.0, "learning rate x steps"),
}
TRUTH_FLAGS = {
    **TABLE,
    "repeat": (1, "runs of each subset, in another order"),
    "launcher": (shlex.quote(sys.executable), "what starts the trainer"),
}
COMPARE_FLAGS = {
    "estimates": ("", "table of estimate"),
    "truth": ("", "table of truth"),
}
SELECT_FLAGS = {
    **PAIR,
    "method": ("less", "less, ensemble or forward", "less", "ensemble", "forward"),
    "estimates": ("", "a table, for ensemble"),
    "top": (0.05, "share or number to keep"),
    "out": ("", "data file to write, .json"),
}
DEMO_FLAGS = {
    "limit": (16, "subsets to fine-tune on"),
    "out": ("project-grads-demo", "its folder"),
}
ALIASES = {  # names of GradEx
    "--model_key": "--model_init_path",
    "--load_model_dir": "--model_init_path",
    "--project_dimension": "--dim",
    "--save_name": "--out",
    "--load_sample_task_dir": "--subsets",
    "--subset_num": "--limit",
}
ALWAYS = ("--project_gradients", "--compute_pretrained_outputs", "--train_lora")  # asked or not
POSITIVE = (
    "dim",
    "batch_size",
    "max_length",
    "max_source_length",
    "downsample",
    "subset_size",
    "top",
)
REQUIRED = ("grads", "target_grads", "subsets", "truth", "out")
CHUNK = 2**26 if torch.cuda.is_available() else 2**21  # numbers of gradients that exist at once
IGNORED = -100  # the label of a token that is no target
SURE = 0.001  # losses below are taken for this one, where odds are needed
PENALTY = 0.01  # of the logistic fit, times the mean squared norm of the rows
DISTANCES = np.array([0.01, 0.03, 0.1, 0.3, 1])  # of linerr, as shares of --scale

# ------------------------------------------------------------------------------------------- data

# input_ids: of a decoder-only model all tokens, of an encoder-decoder the answer's; source_ids:
# what the encoder reads, else none; is_target: (len(input_ids),) which tokens count
Example = collections.namedtuple("Example", "source_ids input_ids is_target")


def count(share_or_number, n):
    """How many of n: a share up to 1 of them, or a number."""
    if share_or_number > 1:
        return int(share_or_number)
    return max(1, round(share_or_number * n))


def read_records(args, problems):
    """[(where, group, record)] of --split, in the order of the rows of a store."""
    records = []
    found, amounts = common.read_data_sets(args, problems)
    if any(amounts.values()):
        problems.append("--data NAME:AMOUNT: use --downsample")
    for name, where, split, record in found:
        if split != args.split:
            continue
        group = pathlib.Path(name).name.split(".")[0]
        if args.groups:
            group = record.get(args.groups)
        if group is None:
            problems.append((where, f"no {args.groups!r}, which --groups names"))
        records.append((where, str(group), record))
    if not records:
        problems.append(f"no {args.split} records")
    rng = np.random.default_rng([args.seed, 5])
    n_drawn = count(args.downsample, len(records))
    order = rng.permutation(len(records))
    drawn = sorted(order[:n_drawn])
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


def encode_raw(record, prompts):
    """Prompt and completion, or a plain text, as sft_causal.py reads them."""
    tokenize = functools.partial(prompts.tokenizer.encode, add_special_tokens=False)
    prompt_ids = list(prompts.begin)
    name = "text"
    if "prompt" in record or "text" not in record:
        prompt_ids += tokenize(first_text(record, "prompt"))
        name = "completion"
    reply_ids = tokenize(first_text(record, name))
    input_ids = [*prompt_ids, *reply_ids, prompts.tokenizer.eos_token_id]
    is_target = np.arange(len(input_ids)) >= max(1, len(prompt_ids))  # nothing predicts the first
    return Example([], input_ids, is_target)


def encode_chat(record, prompts):
    """A conversation up to its last reply. Targets are the replies and the end token behind each,
    as in sft_causal.py."""
    if "messages" in record or "conversations" in record:
        messages = prompts.messages(record)
    else:
        messages = [
            {"role": "user", "content": first_text(record, "prompt")},
            {"role": "assistant", "content": first_text(record, "completion")},
        ]
    tokenize = functools.partial(prompts.tokenizer.encode, add_special_tokens=False)
    input_ids = []
    is_target = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenize(prompts.render(messages[:i], reply_follows=True))
        text = prompts.render(messages[: i + 1])
        reply, end_token, _ = text.rpartition(prompts.end_token)
        until = tokenize(reply + end_token)
        n = len(before)
        if until[:n] != before or before[: len(input_ids)] != input_ids:
            raise ValueError("the chat template rewrites earlier turns: use another one")
        is_trained = message.get("weight", 1) == 1
        is_target += [False] * (n - len(input_ids))
        is_target += [is_trained] * (len(until) - n)
        input_ids = until
    if not input_ids:
        raise ValueError("no message of the role 'assistant'")
    return Example([], input_ids, np.array(is_target))


def encode_seq2seq(record, prompts, max_source_length):
    """Prompt and completion as seq2seq.py reads them, each with its end token."""
    source_ids = prompts.tokenizer.encode(first_text(record, "prompt"))
    if len(source_ids) > max_source_length:
        source_ids = source_ids[: max_source_length - 1] + source_ids[-1:]
    labels = prompts.tokenizer.encode(first_text(record, "completion"))
    if labels[-1] != prompts.tokenizer.eos_token_id:
        labels.append(prompts.tokenizer.eos_token_id)
    return Example(source_ids, labels, np.ones(len(labels), bool))


def encode(record, prompts, args, is_seq2seq):
    """The Example of a record, cut to --max_length. Raises ValueError."""
    if is_seq2seq:
        example = encode_seq2seq(record, prompts, args.max_source_length)
    elif prompts.is_raw or ("text" in record and "prompt" not in record):
        example = encode_raw(record, prompts)
    else:
        example = encode_chat(record, prompts)
    n = args.max_length
    input_ids = np.array(example.input_ids[:n])
    return Example(example.source_ids, input_ids, example.is_target[:n])


def make_batches(examples, batch_size):
    """Lists of example numbers, alike in length, the longest first."""
    lengths = [len(example.source_ids) + len(example.input_ids) for example in examples]
    order = np.argsort(lengths, kind="stable")[::-1].tolist()
    starts = range(0, len(order), batch_size)
    return [order[start : start + batch_size] for start in starts]


def pad(lists, fill):
    """Lists of several lengths -> int64 (B, the longest of them)"""
    longest = max(map(len, lists))
    padded = np.full((len(lists), longest), fill)
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
        return {
            "input_ids": pad(input_ids, pad_id),
            "labels": labels,
        }
    # or here: the decoder reads its tokens one position late
    shifted = [np.append(start_id, ids[:-1]) for ids in input_ids]
    masks = [np.ones(len(ids)) for ids in source_ids]
    return {
        "input_ids": pad(source_ids, pad_id),
        "attention_mask": pad(masks, 0),
        "decoder_input_ids": pad(shifted, pad_id),
        "labels": pad(labels, IGNORED),
    }


# ------------------------------------------------------------------------------ model and outputs


class Opened:
    """A model and the examples of a data set. Collective."""

    def __init__(self, args, problems):
        """Every mistake is reported before a weight is loaded."""
        device = common.setup_distributed(args)
        common.resolve_precision(args, problems)
        if not args.model_init_name and not args.model_init_path:
            problems.append("no model: --model_init_name or --model_init_path")
        self.source, config, self.tokenizer = common.open_model(args, problems)
        self.records = read_records(args, problems)
        if config:
            self.read_examples(args, config, problems)
        if problems:
            common.fail(problems)
        ds_config = {"zero_optimization": {"stage": 0}}
        model = common.load_model(
            self.auto_class, self.source, config, args, ds_config, self.tokenizer
        )
        self.model = model.to(device).eval()

    def read_examples(self, args, config, problems):
        is_seq2seq = config.is_encoder_decoder
        self.auto_class = common.auto_class_of(config)
        if type(config) not in self.auto_class._model_mapping:
            problems.append(f"a {config.model_type} writes no text: expected another model")
        self.start_id = config.decoder_start_token_id if is_seq2seq else None
        args.raw_prompt = args.raw_prompt or not self.tokenizer.chat_template
        self.examples = []
        try:
            prompts = common.Prompts(self.tokenizer, args.raw_prompt)
        except ValueError as error:
            problems.append(f"{self.source}: {error}")
            return
        for where, _, record in common.progress(self.records, "tokenising"):
            try:
                self.examples.append(encode(record, prompts, args, is_seq2seq))
            except ValueError as error:
                problems.append((where, str(error)))

    def batch(self, ids):
        examples = [self.examples[i] for i in ids]
        batch = collate(examples, self.tokenizer.pad_token_id or 0, self.start_id)
        return common.to_device(batch, self.model.device)


def row_losses(model, batch):
    """(B,) fp32: the mean over the targets of each row of -log p; 0 where a row has none. Logits
    begin where a row has the first target."""
    inputs = dict(batch)
    labels = inputs.pop("labels")
    if "decoder_input_ids" not in inputs:
        has_target = (labels != IGNORED).any(0)
        first = int(has_target.int().argmax())
        labels = labels[:, first:]
        inputs["logits_to_keep"] = labels.shape[1]
    logits = model(**inputs, use_cache=False).logits  # (B, labels.shape[1], V)
    is_target = labels != IGNORED
    target_logits = logits[is_target].float()  # (N, V)
    losses = F.cross_entropy(target_logits, labels[is_target], reduction="none")  # (N,)
    row, _ = is_target.nonzero(as_tuple=True)
    sums = losses.new_zeros(len(labels)).index_add(0, row, losses)
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
            n = self.tracked[name].numel()
            parts = torch.arange(n, device=self.device).split(2**20)
            self.tables[name] = torch.cat([self.places(name, part) for part in parts])
        return self.tables[name]

    def start(self, n_rows):
        return torch.zeros(n_rows, 2 * self.dim, device=self.device)

    def add(self, sums, name, start, values):
        """values: (B, n), of the gradients of a weight the coordinates from `start` on."""
        stop = start + values.shape[1]
        places = self.table(name)[start:stop].long()
        sums.scatter_add_(1, places.expand(values.shape), values.float())

    def add_at(self, sums, name, coordinates, values):
        """The same for coordinates of its own in each row, (B, n); repeated ones add up."""
        places = self.table(name)[coordinates].long()
        sums.scatter_add_(1, places, values.float())

    def finish(self, sums):
        """(B, d)"""
        return sums[:, 0::2] - sums[:, 1::2]


# --------------------------------------------------------------------------- per-example gradients


def has_rule(path, module):
    """Whether Gradients knows the gradients of the module's weights. Not of scaled embeddings, as
    Gemma has, nor of positions that are looked up once for all examples, as in GPT-2 and T5."""
    if isinstance(module, (torch.nn.Linear, Conv1D)):
        return True
    is_plain = type(module).forward is torch.nn.Embedding.forward
    return is_plain and not path.endswith(("wpe", "relative_attention_bias"))


class Gradients:
    """The gradient of every example of a batch, sketched, from one backward pass.

    No example of a batch sees another. So the gradient of the summed loss of all examples, with
    respect to what a layer computes for one of them, is that example's own. Autograd has it in hand
    at every layer, and sums over the batch only when it goes on to the weight. Here the weights are
    frozen, so that it never does: hooks take the input of each layer and the gradient of its
    output, and finish the chain rule example by example.

    A linear layer computes y_t = W x_t + b for each token t. With D_t = dL/dy_t,

        dL/dW = sum_t D_t x_t' = D' X,   dL/db = sum_t D_t,   D: (T, out), X: (T, in),

    a product of matrices for each example. Padding needs no mask: L does not depend on it, so its
    D_t is 0. GPT-2's Conv1D holds W transposed, y_t = x_t W + b: there dL/dW = X' D.
    An embedding looks up y_t = E[id_t]: D_t adds to row id_t of dL/dE.

    What is found goes into the sketch at once and is forgotten. Tied weights need no care: the
    gradient of a weight is the sum over its uses, and the sketch adds them as it adds all else.
    """

    def __init__(self, model, dim, seed):
        self.model = model
        names = {}  # of each weight that training would change; of a tied one the first
        for path, module in model.named_modules():
            if not has_rule(path, module):
                continue
            own = {}  # {"weight": name, "bias": name}
            for leaf, weight in module.named_parameters(recurse=False):
                if weight.requires_grad:
                    own[leaf] = names.setdefault(weight, f"{path}.{leaf}")
            module.register_forward_hook(functools.partial(self.watch, path, own))
        self.tracked = {name: weight for weight, name in names.items()}
        self.sketch = Sketch(self.tracked, dim, seed, model.device)
        model.requires_grad_(False)

    def watch(self, path, own, module, inputs, output):
        """After a module's forward pass: finish the chain rule once its output has a gradient."""
        if not torch.is_grad_enabled():
            return
        x = inputs[0].detach()  # (B, T, in), or ids (B, T)
        is_lookup = isinstance(module, torch.nn.Embedding)
        has_rows = len(x) == self.n_rows and x.dim() + is_lookup >= 3
        if own and not has_rows:
            common.fail(f"{path} mixes the examples of a batch: its input is {tuple(x.shape)}")
        if is_lookup:
            output.requires_grad_()  # the graph begins here, as all weights are frozen
        if own:
            add = self.add_lookup if is_lookup else self.add_linear
            output.register_hook(lambda grad: add(own, module, x, grad))

    def add_linear(self, own, module, x, grad):
        """x: (B, .., in), grad: (B, .., out)"""
        x = x.flatten(1, -2)
        grad = grad.flatten(1, -2)
        if "bias" in own:
            self.sketch.add(self.sums, own["bias"], 0, grad.sum(1))
        if "weight" not in own:
            return
        left, right = grad, x
        if isinstance(module, Conv1D):
            left, right = x, grad
        width = right.shape[2]
        n = max(1, CHUNK // (self.n_rows * width))  # rows of the weight at a time
        for first in range(0, left.shape[2], n):
            columns = left[:, :, first : first + n]
            part = columns.transpose(1, 2) @ right  # (B, n, width)
            self.sketch.add(self.sums, own["weight"], first * width, part.flatten(1))

    def add_lookup(self, own, module, ids, grad):
        """ids: (B, T), grad: (B, T, D)"""
        if module.padding_idx is not None:  # torch never trains this row
            grad = grad * (ids != module.padding_idx)[..., None]
        width = grad.shape[2]
        columns = torch.arange(width, device=ids.device)
        coordinates = ids[..., None] * width + columns
        self.sketch.add_at(self.sums, own["weight"], coordinates.flatten(1), grad.flatten(1))

    def rows(self, batch):
        """((B,) losses, (B, d) sketched gradients)"""
        self.n_rows = len(batch["labels"])
        self.sums = self.sketch.start(self.n_rows)
        losses = row_losses(self.model, batch)
        losses.sum().backward()
        return losses.detach(), self.sketch.finish(self.sums)

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
        error = (rows.sum(0) - expected).norm() / expected.norm()
        if not error < 0.05:  # bf16 comes to 0.01
            common.fail(f"in this family the gradients differ from autograd's by {error:.2g}")


# ------------------------------------------------------------------------------------------ store


class Store:
    """What collect has finished. rows: (n, d) fp32, on disk; loss, n_tokens, group (a number of
    names): (n,). manifest: what was collected, with which flags."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.manifest = json.loads((self.path / "manifest.json").read_text())
        self.rows = np.load(self.path / "rows.npy", mmap_mode="r")
        arrays = np.load(self.path / "losses.npz")
        self.loss = arrays["loss"]
        self.n_tokens = arrays["n_tokens"]
        names, self.group = np.unique(arrays["groups"], return_inverse=True)
        self.names = names.tolist()


def open_stores(args, problems):
    """[Store] of --grads, --target_grads and --anchor_grads, which must belong together."""
    paths = [args.grads]
    if "target_grads" in args:
        paths += [args.target_grads, *vars(args).get("anchor_grads", [])]
    for path in paths:
        if not pathlib.Path(path, common.COMPLETE).exists():
            problems.append(f"{path!r} is no finished store")
    if problems:
        common.fail(problems)
    stores = [Store(path) for path in paths]
    for i, store in enumerate(stores):
        # with the first store of the same model and of the same data, which may be itself
        for same, other in (("model_sha256", stores[i - i % 2]), ("data_sha256", stores[i % 2])):
            for key in ("format", "dim", "seed", "parameters", same):
                if store.manifest[key] != other.manifest[key]:
                    problems.append(f"{store.path} and {other.path} have another {key}")
    return stores


def sha256_of_records(records):
    text = json.dumps([(group, record) for _, group, record in records])
    return hashlib.sha256(text.encode()).hexdigest()


def records_of(store, problems):
    """(n,) the records behind the rows of a store."""
    records = read_records(argparse.Namespace(**store.manifest), problems)
    if sha256_of_records(records) != store.manifest["data_sha256"]:
        problems.append(f"{store.path}: its data files have changed: collect again")
    return np.array([record for *_, record in records], object)


def describe(args, opened, gradients):
    """manifest.json: what the rows are, and the flags that open the model and the data again."""
    weights = {
        name: weight.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        for name, weight in opened.model.named_parameters()
    }
    return {
        **vars(args),
        "local_rank": None,  # this one and the next may differ when a store is continued
        "out": None,
        "model_init_path": opened.source,
        "format": 2,  # of a store, its hash included
        "is_seq2seq": opened.start_id is not None,
        "parameters": {name: list(w.shape) for name, w in gradients.tracked.items()},
        "model_sha256": common.sha256_of(weights),
        "data_sha256": sha256_of_records(opened.records),
    }


def start_store(out, manifest):
    """Rank 0. Make the folder, or see that it is the same store, unfinished."""
    path = out / "manifest.json"
    if path.exists():
        earlier = json.loads(path.read_text())
        changed = [key for key in manifest if earlier.get(key) != manifest[key]]
        if changed:
            common.fail(f"{out} is another store: {changed}")
    elif out.exists() and not (out / "parts").exists():
        common.fail(f"{out} is no store")
    else:
        (out / "parts").mkdir(parents=True, exist_ok=True)
        common.write_json(path, manifest)


def finish_store(out, **arrays):
    np.savez(out / "losses.npz", **arrays)
    (out / common.COMPLETE).touch()


def merge_parts(out, opened, batches, dim):
    """Rank 0. All parts become rows.npy and losses.npz."""
    n = len(opened.examples)
    loss = np.zeros(n)
    rows = np.lib.format.open_memmap(out / "rows.npy", "w+", np.float32, (n, dim))
    for i, ids in enumerate(batches):
        part = np.load(out / f"parts/{i}.npz")
        rows[ids] = part["rows"]
        loss[ids] = part["losses"]
    rows.flush()
    n_tokens = [example.is_target.sum() for example in opened.examples]
    _, groups, _ = zip(*opened.records)
    finish_store(out, loss=loss, n_tokens=n_tokens, groups=groups)
    shutil.rmtree(out / "parts")


def collect(args, problems):
    """Losses and sketched gradients of every example; batches are dealt over the processes."""
    opened = Opened(args, problems)
    out = pathlib.Path(args.out)
    gradients = Gradients(opened.model, args.dim, args.seed)
    if common.rank() == 0:
        start_store(out, describe(args, opened, gradients))
    dist.barrier()
    if (out / common.COMPLETE).exists():
        log(f"{out} is finished")
        return
    batches = make_batches(opened.examples, args.batch_size)
    gradients.check(opened.batch(batches[0][:3]))
    log(f"{out}: {len(opened.examples)} rows")
    mine = range(common.rank(), len(batches), common.world_size())
    for i in common.progress(mine, "collecting"):
        path = out / f"parts/{i}.npz"
        if path.exists():
            continue
        losses, rows = gradients.rows(opened.batch(batches[i]))
        if not rows.isfinite().all():
            common.fail(f"a gradient of batch {i} is not finite", only_here=True)
        # renamed when it is whole: after a kill a part is there or it is not
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.savez(file, losses=losses.cpu(), rows=rows.cpu())
        os.replace(file.name, path)
    dist.barrier()  # all parts are written
    if common.rank() == 0:
        merge_parts(out, opened, batches, args.dim)


# ----------------------------------------------------------------------------------------- linerr


@torch.no_grad()
def losses_of(opened, batches):
    """(n,) float64, the losses of the rows of the batches."""
    losses = [row_losses(opened.model, batch) for batch in batches]
    return torch.cat(losses).double().cpu().numpy()


def show(title, figures):
    cells = [f"{name} {value:.4g}" for name, value in figures.items()]
    log(f"{title:<26}" + "  ".join(cells))


def linerr(args, problems):
    """How far the first-order approximation holds: its error against the distance from the weights,
    against the mean gradient of the examples. relative_error: norm of the errors / norm of the
    changes of the losses; 1 is as bad as "nothing changes"."""
    (store,) = open_stores(args, problems)
    flags = argparse.Namespace(**store.manifest)
    flags.precision = "fp32"  # bf16 cannot change a weight by 0.1 %
    opened = Opened(flags, problems)
    batches = [opened.batch(ids) for ids in make_batches(opened.examples, flags.batch_size)]
    before = losses_of(opened, batches)
    for batch in batches:
        row_losses(opened.model, batch).sum().backward()
    weights = [weight for weight in opened.model.parameters() if weight.grad is not None]
    starts = [weight.detach().clone() for weight in weights]
    steps = [-weight.grad for weight in weights]
    norm = torch.nn.utils.get_total_norm
    scale = norm(starts) / norm(steps)

    @torch.no_grad()
    def changes_at(distance):
        for weight, start, step in zip(weights, starts, steps):
            weight.copy_(start + distance * scale * step)
        return losses_of(opened, batches) - before

    nearby = 0.001
    slope = (changes_at(nearby) - changes_at(-nearby)) / (2 * nearby)
    table = {}
    for distance in args.scale * DISTANCES:
        change = changes_at(distance)
        error = distance * slope - change
        relative_error = np.linalg.norm(error) / np.linalg.norm(change)
        name = f"distance {distance:.3g}"
        table[name] = {"relative_error": relative_error}
        show(name, table[name])
    common.write_json(store.path / "linerr.json", table)


# ---------------------------------------------------------------------------------------- subsets


def unit_rows(rows):
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(norms, 1e-30)


def cluster(rows, k, seed):
    """(n,) cluster of each row by cosine: spherical k-means (Dhillon and Modha 2001)."""
    rows = unit_rows(rows)
    rng = np.random.default_rng([seed, 7])
    centres = rows[rng.choice(len(rows), k, replace=False)]
    for _ in range(50):
        nearest = (rows @ centres.T).argmax(1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, rows)
        centres = unit_rows(sums)
    return nearest


def write_clusters(store, k, seed, out):
    """A store with the same rows in other groups."""
    nearest = cluster(store.rows, k, seed)
    out.mkdir()
    (out / "rows.npy").symlink_to((store.path / "rows.npy").resolve())
    common.write_json(out / "manifest.json", store.manifest)
    groups = [f"cluster_{i}" for i in nearest]
    finish_store(out, loss=store.loss, n_tokens=store.n_tokens, groups=groups)
    log(f"{out}: clusters of {np.bincount(nearest).tolist()} examples")


def subsets(args, problems):
    """Random subsets of the groups of a store; or a store whose groups are clusters of its rows."""
    (store,) = open_stores(args, problems)
    out = pathlib.Path(args.out)
    if args.clusters:
        write_clusters(store, args.clusters, args.seed, out)
        return
    rng = np.random.default_rng([args.seed, 8])
    n_groups = len(store.names)
    size = count(args.subset_size, n_groups)
    lines = []
    for _ in range(args.number_of_subsets):
        chosen = sorted(rng.permutation(n_groups)[:size])
        lines.append(" ".join(map(str, chosen)))
    out.write_text("\n".join(lines) + "\n")
    log(f"{out}: subsets of {size} of the groups {' '.join(store.names)}")


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


# ----------------------------------------------------------------------------------------- tables


def write_table(path, names, rows):
    """rows: [(run, subset, (G,) losses)]. Columns: run, numbers of the groups, losses."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "Data indices", *[f"loss_{name}" for name in names]])
        for run, subset, losses in rows:
            indices = " ".join(map(str, subset))
            writer.writerow([run, indices, *losses])


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
    """(G, n): in its group a row counts its target tokens, for its loss is their mean. So losses
    are those that the trainers report."""
    n = len(group)
    weights = np.zeros((n_groups, n), np.float32)
    weights[group, np.arange(n)] = store.n_tokens
    return weights


def group_means(values, store):
    """(.., n) of the rows -> (.., G): the mean over the tokens of each group."""
    weights = token_weights(store, store.group, len(store.names))
    n_tokens = np.maximum(weights.sum(1), 1e-30)
    return values @ weights.T / n_tokens


def group_sums(train, store):
    """((G, d) sums of the rows over tokens, (G,) numbers of tokens), in the groups of train."""
    weights = token_weights(store, train.group, len(train.names))
    return weights @ store.rows, weights.sum(1)


def membership(subsets, n_groups):
    """(S, G) 1 where a subset has a group, else 0"""
    member = np.zeros((len(subsets), n_groups), np.float32)
    for row, subset in zip(member, subsets):
        row[list(subset)] = 1
    return member


def mean_directions(train, store, subsets):
    """(S, d): to first order, fine-tuning on a subset goes against the mean of its rows."""
    sums, n_tokens = group_sums(train, store)
    member = membership(subsets, len(n_tokens))
    return -(member @ sums) / (member @ n_tokens)[:, None]


def anchored_directions(train, anchor, subsets):
    """(S, d): from the model that is fine-tuned on everything to that of each subset. Gradients
    change on the way, hence the mean of those at both ends."""
    subsets = [*subsets, tuple(range(len(train.names)))]  # the last: everything
    at_start = mean_directions(train, train, subsets)
    at_anchor = mean_directions(train, anchor, subsets)
    directions = (at_start + at_anchor) / 2
    return directions[:-1] - directions[-1]


def fit_logistic(rows, log_odds):
    """w (d,) that minimises the mean of log(1 + exp(-(log_odds + rows w))) + penalty |w|^2: the
    fine-tuning of a model that is linear in its weights (Zhang et al. 2025)."""
    rows = torch.tensor(rows).double()
    log_odds = torch.tensor(log_odds)
    penalty = PENALTY * rows.square().sum(1).mean()
    w = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        margins = log_odds + rows @ w
        value = F.softplus(-margins).mean() + penalty * w.square().sum()
        value.backward()
        return value

    optimizer.step(objective)
    return w.detach().numpy()


def logistic_directions(train, subsets):
    """(S, d). With p = exp(-loss), the log-odds log p / (1 - p) have the gradient of the loss
    divided by p - 1."""
    p = np.exp(-np.maximum(train.loss, SURE))
    log_odds = np.log(p) - np.log(1 - p)
    directions = []
    for subset in common.progress(subsets, "fitting"):
        chosen = np.isin(train.group, subset) & (train.n_tokens > 0)
        scale = p[chosen] - 1
        rows = train.rows[chosen] / scale[:, None]
        directions.append(fit_logistic(rows, log_odds[chosen]))
    return np.array(directions, np.float32)


def fit_step(args, subsets, slopes, start):
    """(step size, subsets that it was fitted to): least squares of the changes from start (G,) in
    the first K true runs on slopes (S, G), all groups together."""
    path, _, k = args.calibrate.rpartition(":")
    runs = true_runs(read_table(path)[1])
    used = [i for i, subset in enumerate(subsets) if subset in runs][: int(k)]
    if len(used) < int(k):
        common.fail(f"--calibrate: {len(used)} runs in {path} are of --subsets")
    x = slopes[used]
    subsets = [subsets[i] for i in used]
    y = np.array([runs[subset][0] for subset in subsets]) - start
    step_size = (x * y).sum() / np.square(x).sum()
    return float(step_size), subsets


def estimate(args, problems):
    """The loss of every target group after fine-tuning on each subset."""
    train, target, *anchors = open_stores(args, problems)
    subsets = read_subsets(args, train, problems)
    if len(anchors) == 1 or (anchors and args.fit == "logistic"):
        problems.append("--anchor_grads: two stores, no --fit logistic")
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
    slopes = directions @ group_means(reference.rows.T, reference)  # (S, G)
    step_size = args.step_size
    used = []
    if args.calibrate:
        step_size, used = fit_step(args, subsets, slopes, start)
    if step_size <= 0:
        log("WARNING no step size, or true runs go against the first order: only ranks count")
        step_size = 0.001 * start.mean() / abs(slopes).mean()
    rows = [("base", (), group_means(target.loss, target))]
    for subset, losses in zip(subsets, start + step_size * slopes):
        run = "calibration" if subset in used else "estimate"
        rows.append((run, subset, losses))
    write_table(args.out, target.names, rows)
    log(f"{args.out}: {len(subsets)} subsets, step size {step_size:.6g}")


# ------------------------------------------------------------------------------------------ truth


def write_data(path, **splits):
    """A data file of the trainers, of (n,) records for each split."""
    common.write_json(path, {split: records.tolist() for split, records in splits.items()})


def trainer_command(args, store):
    """Words that start the trainer on the model of a store, with its lengths."""
    collected = store.manifest
    length = collected["max_length"]
    script = "sft_causal.py"
    flags = {"max_length": length, "n_generate": 0}
    if collected["is_seq2seq"]:
        script = "seq2seq.py"
        flags = {
            "max_target_length": length,
            "max_new_tokens": 1,
            "max_source_length": collected["max_source_length"],
        }
    for name in ("model_init_path", "precision", "quantize", "lora_rank", "lora_alpha"):
        if collected[name]:
            flags[name] = collected[name]
    words = shlex.split(args.launcher)
    words += [common.HERE / script, "--save_steps", 0, "--eval_steps", 10**9]
    for name, value in flags.items():
        words += [f"--{name}", value]
    if collected["raw_prompt"] and not collected["is_seq2seq"]:
        words.append("--raw_prompt")
    return [*words, *args.trainer_flags]


def run_trainer(command):
    """What it prints is shown where it fails."""
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode:
        output = (result.stdout + result.stderr)[-2000:]
        common.fail(f"{output}\n{shlex.join(words)} failed")


def truth(args, problems):
    """Fine-tune on everything, which gives the anchor, and on each subset. Losses are those of the
    trainer's last evaluation: a data set for each target group."""
    train, target = open_stores(args, problems)
    subsets = read_subsets(args, train, problems)
    records = records_of(train, problems)
    target_records = records_of(target, problems)
    if problems:
        common.fail(problems)
    work = pathlib.Path(f"{args.out}.runs").resolve()
    (work / "data").mkdir(parents=True, exist_ok=True)
    groups = [f"target-{g}" for g in range(len(target.names))]
    for g, group in enumerate(groups):
        write_data(work / f"data/{group}.json", eval=target_records[target.group == g])
    runs = [("all", tuple(range(len(train.names))), 0)]
    for repeat in range(args.repeat):
        runs += [(str(repeat), subset, repeat) for subset in subsets]
    rows = [("base", (), group_means(target.loss, target))]
    for run, subset, repeat in common.progress(runs, "fine-tuning"):
        name = run
        if run != "all":
            name = f"subset-{common.derive_seed(subset, repeat)}"
        write_data(work / f"data/{name}.json", train=records[np.isin(train.group, subset)])
        words = ["--mount_dir", work, "--training_run_name", name, "--seed", repeat]
        words += ["--data_name", name, *groups]
        # a run that is finished says so and ends, one that was stopped goes on
        run_trainer([*trainer_command(args, train), *words])
        metrics = work / "models" / name / "metrics.jsonl"
        *_, line = metrics.read_text().splitlines()
        last = json.loads(line)
        losses = [last[f"eval/{group}/loss"] for group in groups]
        rows.append((run, subset, losses))
        write_table(args.out, target.names, rows)
        if run != "all":  # only its figures are needed
            for path in metrics.parent.rglob("*"):
                if path.suffix in (".safetensors", ".pt"):
                    path.unlink()
    log(f"the anchor is {work / 'models/all'}")


# ---------------------------------------------------------------------------------------- compare


def ranks(losses):
    """(S, G), of each column: how many are lower less how many are higher."""
    return np.sign(losses[:, None] - losses).sum(1)


def correlation(a, b):
    """Pearson's, mean over the columns of (S, G); 0 where a column is constant."""
    a = a - a.mean(0)
    b = b - b.mean(0)
    norms = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
    products = (a * b).sum(0)
    return np.mean(products / np.maximum(norms, 1e-9))


def agreement(estimates, true, base):
    """Of (S, G) losses. Correlations are across subsets, mean over groups; r2 is that of changes
    from base (G,), the losses before fine-tuning."""
    error = estimates - true
    change = true - base
    return {
        "pearson": correlation(estimates, true),
        "spearman": correlation(ranks(estimates), ranks(true)),
        "relative_error": np.mean(np.abs(error) / true),
        "r2": 1 - np.square(error).sum() / np.square(change).sum(),
    }


def compare(args, problems):
    """Estimates against true runs, beside what another run would say and what none needs."""
    columns, estimates = read_table(args.estimates)
    true_columns, true_rows = read_table(args.truth)
    runs = true_runs(true_rows)
    shared = [subset for subset in runs if ("estimate", subset) in estimates]
    if columns != true_columns or len(shared) < 3:
        common.fail(
            f"columns {columns} and {true_columns}, {len(shared)} subsets in both tables: expected "
            "the same columns and 3 subsets"
        )
    base = true_rows["base", ()]
    found = np.array([estimates["estimate", subset] for subset in shared])
    true = np.array([np.mean(runs[subset], axis=0) for subset in shared])
    table = {"estimate": agreement(found, true, base)}
    repeated = [runs[subset][:2] for subset in shared if len(runs[subset]) > 1]
    if len(repeated) > 2:
        first, second = np.array(repeated).swapaxes(0, 1)
        table["ceiling: another order"] = agreement(first, second, base)
    table["baseline: nothing changes"] = agreement(0 * true + base, true, base)
    table["baseline: mean of truth"] = agreement(0 * true + true.mean(0), true, base)
    for name, figures in table.items():
        show(name, figures)
    common.write_json(f"{args.estimates}.compare.json", table)
    scatter(f"{args.estimates}.png", found - base, true - base, columns)


def scatter(path, estimates, true, columns):
    try:
        from matplotlib.figure import Figure  # optional package
    except ImportError:
        log("no picture: pip install matplotlib")
        return
    figure = Figure()
    axes = figure.add_subplot(xlabel="true change of the loss", ylabel="estimated change")
    axes.axline((0, 0), slope=1)
    axes.plot(true, estimates, ".", label=columns)
    axes.legend()
    figure.savefig(path)


# ----------------------------------------------------------------------------------------- select


def influence(train, target):
    """(n,) how much a row helps: its cosine with the rows of a target group, mean over these, the
    greatest of the groups (LESS, Xia et al. 2024)."""
    target_rows = unit_rows(target.rows)
    means = [target_rows[target.group == g].mean(0) for g in range(len(target.names))]
    cosines = unit_rows(train.rows) @ np.array(means).T  # (n, G)
    return cosines.max(1)


def forward_gains(train, target):
    """(G,) by how much each group lowers the mean loss of the target, for training by epochs, where
    each brings its own steps along. The estimate is linear: what is best first stays so."""
    sums, n_tokens = group_sums(train, train)
    gradients = group_means(target.rows.T, target)  # (d, groups of the target)
    return sums @ gradients.mean(1) / n_tokens.sum()


def ensemble(path, n_groups):
    """(G,) less the mean estimated loss of the subsets that have a group."""
    subsets = []
    losses = []
    for (run, subset), estimated in read_table(path)[1].items():
        if run == "estimate":
            subsets.append(subset)
            losses.append(estimated.mean())
    member = membership(subsets, n_groups)
    n_subsets = member.sum(0)
    if not n_subsets.all():
        common.fail(f"{path}: no subset has group {n_subsets.argmin()}")
    return -(losses @ member) / n_subsets


def select(args, problems):
    """A data file of the examples, or groups of examples, that help the target most."""
    train, target = open_stores(args, problems)
    records = records_of(train, problems)
    target_records = records_of(target, problems)
    if problems:
        common.fail(problems)
    names = train.names
    if args.method == "less":
        scores = influence(train, target)
        names = range(len(scores))
    elif args.method == "forward":
        scores = forward_gains(train, target)
    else:
        scores = ensemble(args.estimates, len(names))
    n = count(args.top, len(scores))
    best = np.argsort(-scores)[:n]
    if args.method == "forward":
        best = best[scores[best] > 0]
    kept = best
    if args.method != "less":
        kept = np.flatnonzero(np.isin(train.group, best))
    scored = [(names[i], float(scores[i])) for i in best]
    write_data(args.out, train=records[np.sort(kept)], eval=target_records)
    common.write_json(f"{args.out}.scores.json", scored)
    log(f"{args.out}: {len(kept)} of {len(records)} examples, scores in {args.out}.scores.json")


# ------------------------------------------------------------------------------------------- demo

DEMO_BASE = """
--model_init_name tiny-llama --raw_prompt --training_run_name base --max_steps 90 --n_generate 0
--train_batch_size 64 --learning_rate 0.004 --warmup_steps 50 --save_steps 0 --eval_steps 90
"""
DEMO_STUDY = """
collect {data} --model_init_name base --split train --out G
collect {data} --model_init_name base --split eval --out E
subsets --grads G --number_of_subsets 200 --out subsets.txt
truth {stores} --limit {limit} --out truth.csv -- --max_steps 40 --train_batch_size 32 \
--learning_rate 1e-4 --lr_scheduler_type constant
collect {data} --model_init_path truth.csv.runs/models/all --split train --out GA
collect {data} --model_init_path truth.csv.runs/models/all --split eval --out EA
estimate {stores} --calibrate truth.csv:3 --out base.csv
compare --estimates base.csv --truth truth.csv
estimate {stores} --anchor_grads GA EA --calibrate truth.csv:3 --out anchor.csv
compare --estimates anchor.csv --truth truth.csv
select --grads G --target_grads E --method ensemble --estimates anchor.csv --top 12 --out best.json
"""
DEMO_READING = """
The tables compare estimates with real fine-tunes, at the base model and around the anchor, which
is fine-tuned on everything. spearman: are subsets ranked alike? r2: are the sizes right?"""


def demo(args, problems):
    """16 groups of four tasks, four of them with wrong answers: which group helps which task?"""
    os.makedirs(args.out)
    os.chdir(args.out)
    data = common.HERE / "data"
    base = [*DEMO_BASE.split(), "--data_name", f"{data}/skills_base.jsonl"]
    log(f"in {args.out}: python sft_causal.py {shlex.join(base)}")
    run_trainer([sys.executable, common.HERE / "sft_causal.py", *base])
    study = DEMO_STUDY.format(
        data=f"--data {shlex.quote(str(data))}/skills.jsonl --groups group --raw_prompt",
        stores="--grads G --target_grads E --subsets subsets.txt",
        limit=args.limit,
    )
    for line in study.strip().splitlines():
        log(f"\npython project_grads.py {line}")
        main(parse_args(shlex.split(line)))
    log(DEMO_READING)


# ------------------------------------------------------------------------------------------- main

COMMANDS = {
    "collect": (collect, COLLECT_FLAGS),
    "linerr": (linerr, LINERR_FLAGS),
    "subsets": (subsets, SUBSETS_FLAGS),
    "estimate": (estimate, ESTIMATE_FLAGS),
    "truth": (truth, TRUTH_FLAGS),
    "compare": (compare, COMPARE_FLAGS),
    "select": (select, SELECT_FLAGS),
    "demo": (demo, DEMO_FLAGS),
}


def check_args(args, problems):
    """What can be said without a store or a model."""
    for name, value in vars(args).items():
        is_needed = name in REQUIRED or (name == "estimates" and args.command == "compare")
        if is_needed and value == "":
            problems.append(f"--{name} is missing")
        if name in POSITIVE and value <= 0:
            problems.append(f"--{name} {value}: expected more than 0")
    if not re.fullmatch(r"(.+:[1-9]\d*)?", vars(args).get("calibrate", "")):
        problems.append(f"--calibrate {args.calibrate}: expected FILE:3, a table and a number")
    if args.command in ("subsets", "select", "demo") and os.path.exists(args.out):
        problems.append(f"--out {args.out} exists")
    if args.command != "collect" and common.world_size() > 1:
        problems.append(f"{args.command} runs in one process")


def main(args):
    problems = []
    check_args(args, problems)
    if problems and args.command != "collect":  # which finds more
        common.fail(problems)
    command, _ = COMMANDS[args.command]
    try:
        command(args, problems)
    except FileNotFoundError as error:
        common.fail(str(error))


def parse_args(argv):
    """Without a command the demo. Flags behind -- are the trainer's."""
    split = argv.index("--") if "--" in argv else len(argv)
    words = [ALIASES.get(word, word) for word in argv[:split] if word not in ALWAYS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher gives it
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (function, flags) in COMMANDS.items():
        command = commands.add_parser(name, description=function.__doc__, allow_abbrev=False)
        for flag, spec in flags.items():
            common.add_flag(command, flag, *spec)
    args = parser.parse_args(words or ["demo"])
    for name, (default, *_) in common.SHARED_FLAGS.items():
        vars(args).setdefault(name, default)
    args.trainer_flags = argv[split + 1 :]
    args.no_train = True  # of common.open_model: nothing is added to the model
    return args


if __name__ == "__main__":
    common.launch(main, parse_args(sys.argv[1:]))
