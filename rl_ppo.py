"""Train a language model on a reward by PPO, RLOO or GRPO, with DeepSpeed: decoder-only models
(Llama, Qwen, GPT-2) and encoder-decoders (T5, BART).

    {"prompt": "17 + 25 = ?", "answer": "42"}
    {"messages": [{"role": "user", "content": "17 + 25 = ?"}], "answer": "42"}

    def score(prompts, replies, records):                  # myreward.py
        return [float(record["answer"] in reply) for reply, record in zip(replies, records)]

    python rl_ppo.py                                       # demo, two minutes on a laptop
    python rl_ppo.py --policy my-sft --data mydata --reward_fn myreward.py:score
    deepspeed --num_gpus 4 rl_ppo.py --policy my-sft --data mydata --reward_model my-clf

Writes models/<training_run_name>/: metrics.jsonl, predictions, checkpoint-<step>/ to resume from,
and the trained policy as a plain Hugging Face folder. docs/rl_ppo.md explains every number.

A rollout: replies that the policy has sampled, the score of each, and of every token its
log-probability by the policy and by the reference, which is the policy as it was at the start, and
a value. Some optimizer steps learn from it, then the next one is sampled.
Loss: the clipped policy and value losses (Schulman et al. 2017, https://arxiv.org/abs/1707.06347),
summed over all reply tokens of an optimizer step (all forward steps, all processes), divided by
their number. A reply ends with its end token, or at --max_new_tokens.
Shapes: B replies of a rollout, T tokens of its longest reply; R rows of a forward step, S tokens of
a row, N reply tokens of a forward step; D hidden, V vocabulary.
"""

import argparse
import collections
import contextlib
import copy
import functools
import itertools
import json
import math
import pathlib
import re
import runpy
import sys
import traceback

import common  # first: it prepares the import of DeepSpeed

# isort: split
import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

from common import SPLITS, log
from decoding import Decoding, choose

FLAGS = {
    "policy": ("", "the model to train: a run under models/, a folder, or a hub id with a slash"),
    "reward_fn": ("", "FILE:NAME of a function (prompts, replies, records) -> list of floats"),
    "reward_model": ("", "a clf.py run, or a sequence classifier with one logit"),
    "reward_text": ("", "what a reward model reads, or {input} of a clf.py run; else both texts"),
    "heldout_reward_fn": ("", "another reward, for evaluation only: it chooses the checkpoint"),
    "heldout_reward_model": ("", "the same as a model"),
    "raw_prompt": (False, "prompts as they are, without a template"),
    "seq_length": (1024, "tokens; prompts that leave no room for a reply in it are left out"),
    "num_rollouts": (128, "replies that are sampled before --ppo_epochs of updates"),
    "n_samples": (1, "replies per prompt; rloo and grpo compare them"),
    "rollout_batch_size": (32, "replies that one process writes at once"),
    "max_new_tokens": (40, "longest reply"),
    "temperature": (1.0, "of sampling; log-probabilities are at it too"),
    "advantage": ("gae", "gae: PPO with a value head; rloo, grpo: without", "gae", "rloo", "grpo"),
    "ppo_epochs": (4, "passes over a rollout"),
    "gamma": (1.0, "discount per token"),
    "lam": (0.95, "lambda of generalised advantage estimation"),
    "cliprange": (0.2, "the ratio counts within 1 +- this"),
    "cliprange_value": (0.2, "a value counts within +- this of the old one"),
    "vf_coef": (1.0, "weight of the value loss"),
    "init_kl_coef": (0.05, "beta, the price of a nat of KL to the reference"),
    "target_kl": (6.0, "nats per reply that beta is adapted to; 0: beta stays"),
    "kl_horizon": (10000.0, "replies; the longer, the slower is beta adapted"),
    "cliprange_reward": (10.0, "scores count within +- this"),
    "reward_scaling": (
        "none",
        "scores / their running deviation; norm: minus their running mean too",
        *("none", "std", "norm"),
    ),
    "num_layers_unfrozen": (2, "train only so many top layers; 0, or beside adapters: all"),
    "n_eval": (64, "evaluation prompts"),
    "eval_temperature": (0.001, "of sampling at evaluation; <= 0.001 is greedy"),
}
DEFAULTS = {  # of shared flags, other than the siblings'
    "train_batch_size": 128,
    "lr_scheduler_type": "constant",
    "weight_decay": 1e-6,
    "logging_steps": 1,
}
POSITIVE_FLAGS = (
    *("num_rollouts", "n_samples", "rollout_batch_size", "max_new_tokens", "ppo_epochs", "n_eval"),
    *("temperature", "cliprange", "cliprange_value", "kl_horizon", "cliprange_reward"),
)
# may differ when a run goes on: they only concern evaluation and speed
FREE_FLAGS = {"rollout_batch_size", "n_eval", "eval_temperature"}
DEMO = (
    "--model_init_name tiny-llama --data wishes --reward_fn data/rewards.py:wish "
    "--training_run_name ppo-demo --max_steps 600 --num_rollouts 128 --train_batch_size 64 "
    "--ppo_epochs 2 --learning_rate 0.003 --lr_scheduler_type linear --max_new_tokens 8 "
    "--num_layers_unfrozen 0 --init_kl_coef 0.015 --target_kl 0 --eval_steps 200 "
    "--save_steps 200 --logging_steps 20 --weight_decay 0.1"
)
# means over the reply tokens of an optimizer step
METRICS = ("policy_loss", "value_loss", "entropy", "clip_fraction", "log_ratio")
# the largest |log-ratio| before the first update of a rollout; the mean difference between the
# log-probabilities while sampling and those of the whole text
RATIO_BOUND = {"fp32": 1e-5, "bf16": 0.02, "bf16-mixed": 0.02}
SAMPLER_BOUND = {"fp32": 1e-3, "bf16": 0.1, "bf16-mixed": 0.1}
MAX_LOGITS = 2**28 if torch.cuda.is_available() else 2**26  # that exist at once
IGNORED = -100  # the label of a token that is no reply
PLACE = r"\{(\w+)\}"  # in a template
GREEDY = 0.001  # the highest temperature that means: take the likeliest token

# ------------------------------------------------------------------------------------------- data

# key: the prompt as the policy reads it, by which it is held out; input_ids: its tokens; text: its
# last question alone, which a reward reads; record: as in the file
Example = collections.namedtuple("Example", "data_set key text input_ids record")

# examples: {split: [Example]}; sizes, amounts: of the training part of each data set, see
# common.Order
Data = collections.namedtuple("Data", "examples sizes amounts")


def open_prompts(args, source, tokenizer, problems):
    """common.Prompts, with all ids that end a reply; or None."""
    about = common.read_about(source)
    if about.get("script") == "clf.py":
        problems.append(f"{source} is a run of clf.py, which scores texts: expected a writer")
    was_raw = about.get("raw_prompt") or "record_layout" in about
    try:
        is_raw = args.raw_prompt or was_raw or not tokenizer.chat_template
        prompts = common.Prompts(tokenizer, is_raw)
    except ValueError as error:
        problems.append(f"{source}: {error}; --raw_prompt does without a template")
        return None
    prompts.stop_ids = sorted({*prompts.stop_ids, *about.get("stop_ids", [])} - {None})
    if not prompts.stop_ids:
        problems.append(f"{source}: its tokenizer has no end token")
    return prompts


def to_example(prompts, has_encoder, keys, data_set, record):
    """The Example of a record of a data file. Raises ValueError, which says what is wrong."""
    if "messages" in record or "conversations" in record:
        messages = prompts.messages(record)
    else:
        problem = common.text_problem(record.get("prompt"), "prompt", record)
        if problem:
            raise ValueError(problem)
        messages = [{"role": "user", "content": record["prompt"]}]
    missing = keys - set(record)
    if missing:
        raise ValueError(f"no {', '.join(missing)}, which the reward model reads")
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("the last message has to be the user's, whom the policy answers")
    if prompts.is_raw and len(messages) > 1:
        raise ValueError("several messages need a chat template; this policy reads raw prompts")
    text = key = messages[-1]["content"]
    if not prompts.is_raw:
        key = prompts.render(messages, reply_follows=True)
    input_ids = prompts.tokenizer(key, add_special_tokens=has_encoder).input_ids
    if prompts.is_raw and not has_encoder:
        input_ids = prompts.begin + input_ids
    return Example(data_set, key, text, input_ids, record)


def read_data(args, prompts, config, rewards, problems):
    """Data of --data."""
    has_encoder = config.is_encoder_decoder
    n_positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    room = min(args.seq_length, n_positions)
    if not has_encoder:
        room -= args.max_new_tokens
    keys = set().union(*[reward.keys for reward in rewards.values()])
    examples = {split: [] for split in SPLITS}
    n_long = 0
    records, amounts = common.read_data_sets(args, problems)
    for data_set, where, split, record in records:
        try:
            example = to_example(prompts, has_encoder, keys, data_set, record)
        except ValueError as error:
            problems.append((where, str(error)))
            continue
        if split == "train" and common.is_held_out(args, example.key):
            split = "eval"
        if len(example.input_ids) > room:
            n_long += 1
        elif split == "train" or len(examples[split]) < args.n_eval:
            examples[split].append(example)
    if n_long:
        log(f"WARNING {n_long} prompts of more than {room} tokens are left out (--seq_length)")
    sizes = [] if problems else common.check_examples(args, examples, amounts, problems)
    return Data(examples, sizes, list(amounts.values()))


def decode(prompts, input_ids):
    """The text of a reply. Only pad, begin and end are dropped: others may be its content."""
    tokenizer = prompts.tokenizer
    dropped = {tokenizer.pad_token_id, tokenizer.bos_token_id, *prompts.stop_ids}
    return tokenizer.decode([i for i in input_ids if i not in dropped])


# ------------------------------------------------------------------------------- rows and batches


def pad(rows, fill):
    """Lists or arrays of several lengths -> (rows, the longest of them, at least 1)."""
    longest = max(1, max(len(row) for row in rows))
    padded = np.full((len(rows), longest), fill)
    for r, row in enumerate(rows):
        padded[r, : len(row)] = row
    return padded


def collate(prompts, replies, start_id):
    """Token ids of prompts and replies -> tensors; start_id: what a decoder begins with, None
    where there is no encoder.

    input_ids (R, S): prompt and reply, or for an encoder the prompt, with its attention_mask and
    decoder_input_ids. labels (N,): the reply tokens; label_index (N,): where in the flattened
    states each is predicted.
    """
    columns = collections.defaultdict(list)
    # a rank without replies computes one padding token along
    for prompt, reply in zip(prompts or [[0]], replies or [[]]):
        if start_id is None:
            columns["input_ids"].append([*prompt, *reply])
            columns["labels"].append([IGNORED] * (len(prompt) - 1) + [*reply, IGNORED])
        else:
            columns["input_ids"].append(prompt)
            columns["attention_mask"].append([1] * len(prompt))
            columns["decoder_input_ids"].append([start_id, *reply[:-1]])
            columns["labels"].append(reply)
    labels = pad(columns.pop("labels"), IGNORED).flatten()
    arrays = {name: pad(rows, 0) for name, rows in columns.items()}
    arrays["label_index"] = np.flatnonzero(labels != IGNORED)
    arrays["labels"] = labels[arrays["label_index"]]
    return common.to_tensors(arrays)


def round_up(steps, multiple):
    """(10, 4) -> 12; 0 and -1, which have meanings of their own, stay."""
    return math.ceil(steps / multiple) * multiple if steps > 0 else steps


class Plan:
    """The prompts of each rollout and the replies of each optimizer step: functions of (seed,
    rollout), the same for any number of ranks. Evaluation, checkpoints and the end wait for the end
    of a rollout, so the flags' intervals are rounded up."""

    def __init__(self, args, data):
        self.args = args
        self.batch = args.train_batch_size * args.gradient_accumulation_steps
        self.n_prompts = args.num_rollouts // args.n_samples
        # one by one: epochs follow each other without a gap, also in the middle of a rollout
        options = {"seed": args.seed, "train_batch_size": 1, "gradient_accumulation_steps": 1}
        self.order = common.Order(argparse.Namespace(**options), data.sizes, data.amounts)
        self.no_lengths = np.zeros((sum(data.sizes), 2))
        n_rollouts = max(1, round(self.order.steps_per_epoch / self.n_prompts))  # of an epoch
        self.steps_per_rollout = args.ppo_epochs * math.ceil(args.num_rollouts / self.batch)
        self.steps_per_epoch = self.steps_per_rollout * n_rollouts
        max_steps = args.max_steps or math.ceil(args.num_epochs * self.steps_per_epoch)
        self.max_steps = round_up(max_steps, self.steps_per_rollout)
        for name in ("eval_steps", "save_steps", "logging_steps"):
            setattr(args, name, round_up(getattr(args, name), self.steps_per_rollout))

    def prompts(self, rollout):
        """The numbers of the examples, each --n_samples times in a row."""
        first = rollout * self.n_prompts
        ids = []
        for place in range(first, first + self.n_prompts):
            example = int(self.order.step_ids(place, self.no_lengths)[0])
            ids += [example] * self.args.n_samples
        return ids

    def updates(self, rollout, n_tokens):
        """[(replies of an optimizer step, [replies of each forward step of this rank])] of a
        rollout; n_tokens: of each prompt and its reply."""
        world = common.world_size()
        n_pieces = world * self.args.gradient_accumulation_steps
        updates = []
        for epoch in range(self.args.ppo_epochs):
            rng = np.random.default_rng([5, self.args.seed, rollout, epoch])
            order = rng.permutation(len(n_tokens))
            for start in range(0, len(order), self.batch):
                ids = order[start : start + self.batch]
                pieces = common.deal(ids, n_tokens, n_pieces)
                mine = [np.sort(piece) for piece in pieces[common.rank() :: world]]
                updates.append((ids, mine))
        return updates


# ---------------------------------------------------------------------------------- model and loss


def target_states(model, batch):
    """(N, D) last hidden states, from which the reply tokens are predicted. Padding is at the right
    and needs no mask in a decoder: nothing sees what follows it."""
    if "decoder_input_ids" not in batch:
        output = model.base_model(input_ids=batch["input_ids"], use_cache=False)
        return output.last_hidden_state.flatten(0, 1)[batch["label_index"]]
    mask = batch["attention_mask"]
    encoder = model.get_encoder()
    source = encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    output = model.get_decoder()(
        input_ids=batch["decoder_input_ids"],
        encoder_hidden_states=source,
        encoder_attention_mask=mask,
        use_cache=False,
    )
    return output.last_hidden_state.flatten(0, 1)[batch["label_index"]]


def scale_states(states, config):
    """What T5 does before its head."""
    if getattr(config, "scale_decoder_outputs", False):
        return states * config.d_model**-0.5
    return states


def finish_logits(logits, config):
    """What a few families do behind their head."""
    logits = logits / getattr(config, "logits_scaling", 1)  # Granite
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = torch.tanh(logits / config.final_logit_softcapping)
        logits = logits * config.final_logit_softcapping
    return logits


def new_value_head(model, args):
    """(N, D) states -> (N, 1) values, as trlx's."""
    torch.manual_seed(common.derive_seed(args.seed, "value head"))
    size = model.get_output_embeddings().in_features
    layers = (torch.nn.Linear(size, 2 * size), torch.nn.ReLU(), torch.nn.Linear(2 * size, 1))
    return torch.nn.Sequential(*layers).to(common.DTYPES[args.precision])


class Policy(torch.nn.Module):
    """What the engine wraps: forward(batch) -> (3, N) fp32 log-probabilities, entropies and values
    of the reply tokens. Logits only where there is one. The distribution is the one that is sampled
    from, softmax(logits / temperature)."""

    def __init__(self, model, temperature, value_head=None):
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.value_head = value_head

    def forward(self, batch, n_chunks=1):
        states = target_states(self.model, batch)
        log_probs_of = self.log_probs
        if n_chunks > 1 and torch.is_grad_enabled():  # logits are recomputed in the backward pass
            log_probs_of = functools.partial(checkpoint, self.log_probs, use_reentrant=False)
        state_chunks = states.tensor_split(n_chunks)
        label_chunks = batch["labels"].tensor_split(n_chunks)
        chunks = map(log_probs_of, state_chunks, label_chunks)
        log_probs, entropies = torch.cat(list(chunks), dim=1)
        values = torch.zeros_like(log_probs)
        if self.value_head is not None:
            values = self.value_head(states).squeeze(1).float()
        return torch.stack([log_probs, entropies, values])

    def log_probs(self, states, labels):
        """(n, D) states and (n,) labels -> (2, n) log-probabilities and entropies."""
        logits = self.logits(states) / self.temperature
        with torch.no_grad():  # the entropy is only looked at
            log_p = logits.log_softmax(dim=1)
            entropies = -(log_p.exp() * log_p).sum(dim=1)
        log_probs = -common.CrossEntropy.apply(logits, labels)
        return torch.stack([log_probs, entropies])

    def logits(self, states):
        """(n, D) -> (n, V) fp32"""
        model = self.model
        states = scale_states(states, model.config)
        logits = model.get_output_embeddings()(states).float()
        if hasattr(model, "final_logits_bias"):  # BART
            logits = logits + model.final_logits_bias
        return finish_logits(logits, model.config)


def switch_off_dropout(model):
    """PPO compares the probabilities of a text before and after an update."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def train_top_layers(model, n_layers):
    """Freeze all but the last blocks of the decoder, the norm behind them, and a head of its own.
    The encoder of T5 is frozen too, as by trlx."""
    decoder = model.get_decoder()
    blocks = next(m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList))
    model.requires_grad_(False)
    for name, weight in decoder.named_parameters():
        number = re.search(r"\d+", name)  # of the block
        if number:
            weight.requires_grad_(int(number[0]) >= len(blocks) - n_layers)
        else:
            weight.requires_grad_(not re.search("embed|wte|wpe|project_in", name))
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        head.requires_grad_(True)


@contextlib.contextmanager
def adapter_off(model):
    """The model without its adapter: the reference where the adapter is new."""
    layers = [module for module in model.modules() if hasattr(module, "base_layer")]
    for layer in layers:
        layer.forward = layer.base_layer.__call__
    yield
    for layer in layers:
        del layer.forward


def frozen_args(args, **changes):
    """The flags to load a model that is not trained."""
    off = {"lora_rank": 0, "train_adapter": False, "gradient_checkpointing": False}
    return argparse.Namespace(**{**vars(args), **off, "no_train": True, **changes})


def freeze(module, ds_config):
    """Collective. An engine of a model that is not trained: partitioned where the policy is, else
    whole."""
    config = copy.deepcopy(ds_config)
    if config["zero_optimization"]["stage"] < 3:
        config["zero_optimization"] = {"stage": 0}
        config["bf16"] = {"enabled": False}  # the weights are of that type already
    engine, *_ = deepspeed.initialize(model=module.requires_grad_(False), config=config)
    engine.eval()
    return engine


# ----------------------------------------------------------------------------------------- rewards


class RewardFunction:
    """A Python function of the user's, which rank 0 asks."""

    def __init__(self, spec, problems):
        self.spec = spec
        self.keys = set()
        self.identity = None
        file, _, name = spec.rpartition(":")
        path = pathlib.Path(file)
        if not path.is_file():
            path = common.HERE / file
        if not path.is_file():
            problems.append(f"{spec}: expected FILE:NAME, and there is no file {file!r}")
            return
        self.identity = common.derive_seed(path.read_text())
        try:
            self.function = runpy.run_path(str(path))[name]
        except Exception as error:  # whatever the code of a user raises
            problems.append(f"{spec}: {error!r}")

    def load(self, ds_config):
        """It is there already."""

    def ask(self, examples, replies):
        prompts = [example.text for example in examples]
        records = [example.record for example in examples]
        try:
            scores = [float(score) for score in self.function(prompts, replies, records)]
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{frame.filename}, line {frame.lineno}"
            common.fail(f"{self.spec} fails with {error!r} ({where})")
        if len(scores) != len(replies) or not np.isfinite(scores).all():
            common.fail(f"{self.spec}: no finite number for each of {len(replies)}: {scores}")
        return scores

    def __call__(self, examples, replies):
        """Collective. (n,) scores of replies."""
        scores = [None]
        if common.rank() == 0:
            scores = [self.ask(examples, replies)]
        dist.broadcast_object_list(scores)
        return np.array(scores[0])


class Score(torch.nn.Module):
    """forward(batch) -> (R,) fp32: logit(yes) - logit(no) of a clf.py run as it computes them, or
    the one logit of a sequence classifier."""

    def __init__(self, model, no_yes):
        super().__init__()
        self.model = model
        self.no_yes = no_yes

    def forward(self, batch):
        model = self.model
        if self.no_yes is None:
            output = model(batch["input_ids"], attention_mask=batch["attention_mask"])
            return output.logits[:, 0].float()
        states = scale_states(target_states(model, batch), model.config)
        head = model.get_output_embeddings()
        assert getattr(head, "bias", None) is None, "a head with a bias: not written yet"
        with common.whole(head.weight), torch.autocast(states.device.type, enabled=False):
            # in fp32, for bf16 is too coarse to rank by
            logits = F.linear(states.float(), head.weight[self.no_yes].float())
        no, yes = finish_logits(logits, model.config).unbind(dim=1)
        return yes - no


class RewardModel:
    """A clf.py run, or a sequence classifier with one logit. Small files first, then load()."""

    def __init__(self, args, name, problems):
        self.spec = self.identity = name
        self.args = frozen_args(args, quantize="")
        name_model(self.args, name)
        self.source, self.config, self.tokenizer = common.open_model(self.args, problems)
        self.text = args.reward_text.replace("\\n", "\n") or "{prompt}\n\n{reply}"
        self.template = "{input}"
        self.no_yes = None
        self.max_length = getattr(self.tokenizer, "model_max_length", 0)
        self.auto_class = AutoModelForSequenceClassification
        self.start_id = 0  # a classifier reads its text as an encoder does
        about = common.read_about(self.source) if self.source else {}
        if about.get("script") == "clf.py":
            self.template = about["record_layout"]["template"]
            self.max_length = about["record_layout"]["max_length"]
            words = about["verbaliser"]
            self.no_yes = [words["negative_id"], words["positive_id"]]
            self.auto_class = auto_class_of(self.config)
            self.start_id = start_id_of(self.config)
        elif self.config and self.config.num_labels != 1:
            problems.append(f"{name}: expected a run of clf.py, or a classifier with one logit")
        names = set(re.findall(PLACE, self.template + self.text))
        self.keys = names - {"prompt", "reply", "input"}

    def load(self, ds_config):
        """Collective."""
        model = common.load_model(
            self.auto_class, self.source, self.config, self.args, ds_config, self.tokenizer
        )
        if model.config.pad_token_id is None:  # a classifier looks for it
            model.config.pad_token_id = 0
        self.engine = freeze(Score(model, self.no_yes), ds_config)

    def read(self, example, reply):
        """The token ids of what the model reads of a reply; too many lose their beginning."""
        values = {**example.record, "prompt": example.text, "reply": reply}
        values["input"] = fill(self.text, values)
        tokenizer = self.tokenizer
        input_ids = tokenizer(fill(self.template, values)).input_ids
        if self.start_id is None and input_ids[-1] == tokenizer.eos_token_id:
            input_ids = input_ids[:-1]  # as clf.py: the answer comes next
        n_cut = max(0, len(input_ids) - self.max_length)
        n_begin = int(input_ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id))
        return input_ids[:n_begin] + input_ids[n_begin + n_cut :]

    @torch.no_grad()
    def __call__(self, examples, replies):
        """Collective. (n,) scores of replies."""
        texts = list(map(self.read, examples, replies))
        scores = {}
        for ids in common.my_batches([len(text) for text in texts], self.args.eval_batch_size):
            # the state before the answer is asked for: any token serves as the answer
            batch = collate([texts[i] for i in ids], [[0]] * len(ids), self.start_id)
            logits = self.engine(common.to_device(batch, self.engine.device))
            scores.update(zip(ids, logits.double().tolist()))
        scores = common.gather(scores)
        scores = np.array([scores[i] for i in range(len(texts))])
        if not np.isfinite(scores).all():
            common.fail(f"{self.source}: a score is not finite; try --precision fp32")
        return scores


def fill(template, values):
    """("Q: {prompt}", {"prompt": "2 + 2?"}) -> "Q: 2 + 2?"."""
    return re.sub(PLACE, lambda place: str(values[place[1]]), template)


def open_rewards(args, problems):
    """{"reward": ..., and perhaps "heldout_reward": ...}"""
    rewards = {}
    for name in ("reward", "heldout_reward"):
        function, model = getattr(args, f"{name}_fn"), getattr(args, f"{name}_model")
        if function:
            rewards[name] = RewardFunction(function, problems)
        elif model:
            rewards[name] = RewardModel(args, model, problems)
    return rewards


# ---------------------------------------------------------------------------------------- rollouts


def sample(args, engine, prompts, examples, keys, temperature):
    """Collective. [(token ids, their log-probabilities)], a reply to each example, which depends on
    its key and the weights alone. A row that has ended leaves and the next prompts join, so that
    finished replies cost nothing."""
    device = engine.device
    generators = [None] * len(keys)
    if temperature > GREEDY:
        generators = [torch.Generator(device).manual_seed(key) for key in keys]
    lengths = np.array([len(example.input_ids) for example in examples])
    longest_first = np.argsort(-lengths, kind="stable").tolist()
    waiting = longest_first[common.rank() :: common.world_size()]
    replies = {i: ([], []) for i in waiting}
    rows = []  # the numbers of the replies that are being written
    tokens = None  # (rows,), the last of each
    with common.generating(engine, GenerationConfig()) as model:
        decoding = Decoding(model)
        while rows or waiting:
            logits = []
            if rows:
                logits.append(decoding.step(tokens[:, None]))
            n_free = args.rollout_batch_size - len(rows)
            # several at once: to read a prompt takes as long as a token of all rows
            may_join = decoding.can_join and n_free >= args.rollout_batch_size / 4
            if waiting and (may_join or not rows):
                joining, waiting = waiting[:n_free], waiting[n_free:]
                logits.append(decoding.read([examples[i].input_ids for i in joining]))
                rows += joining
            scores = torch.cat(logits) / max(temperature, GREEDY)  # (rows, V)
            tokens = choose(scores, [generators[i] for i in rows])
            log_probs = scores.log_softmax(dim=1).gather(1, tokens[:, None])
            new_ids, new_log_probs = tokens.tolist(), log_probs.flatten().tolist()
            goes_on = []
            for r, i in enumerate(rows):
                input_ids, reply_log_probs = replies[i]
                input_ids.append(new_ids[r])
                reply_log_probs.append(new_log_probs[r])
                if input_ids[-1] not in prompts.stop_ids and len(input_ids) < args.max_new_tokens:
                    goes_on.append(r)
            if len(goes_on) < len(rows):
                rows = [rows[r] for r in goes_on]
                kept = torch.tensor(goes_on, dtype=torch.int64, device=device)
                decoding.keep(kept)
                tokens = tokens[kept]
    replies = common.gather(replies)
    return [replies[i] for i in range(len(examples))]


class Rollout:
    """B replies to examples, as `sample` gives them."""

    def __init__(self, examples, sampled, start_id, device):
        self.prompts = [example.input_ids for example in examples]
        self.replies = [ids for ids, _ in sampled]
        self.start_id = start_id
        self.device = device
        self.lengths = np.array([len(ids) for ids in self.replies])
        self.n_tokens = self.lengths + [len(ids) for ids in self.prompts]
        is_reply = np.arange(max(self.lengths)) < self.lengths[:, None]
        self.is_reply = torch.tensor(is_reply, device=device)  # (B, T)

    def batch(self, ids):
        prompts = [self.prompts[i] for i in ids]
        replies = [self.replies[i] for i in ids]
        return common.to_device(collate(prompts, replies, self.start_id), self.device)


@torch.no_grad()
def score_tokens(engine, reference, rollout, pieces, n_chunks):
    """Collective. (3, B, T) fp64: log-probabilities of policy and reference, and values; pieces:
    the replies of each forward step of this rank."""
    is_reply = rollout.is_reply
    scored = torch.zeros(3, *is_reply.shape, dtype=torch.float64, device=engine.device)
    for ids in pieces:
        batch = rollout.batch(ids)
        log_probs, _, values = engine(batch, n_chunks)
        if reference:
            ref_log_probs, *_ = reference(batch, n_chunks)
        else:
            with adapter_off(engine.module.model):
                ref_log_probs, *_ = engine(batch, n_chunks)
        is_scored = torch.zeros_like(is_reply)
        is_scored[ids] = is_reply[ids]
        scored[:, is_scored] = torch.stack([log_probs, ref_log_probs, values]).double()
    dist.all_reduce(scored)  # each reply is one rank's, the others hold zeros
    return scored


# --------------------------------------------------------------------------------- PPO mathematics


def scale_scores(args, scores, sums):
    """(B,) scores as --reward_scaling and --cliprange_reward count them. sums: number of scores so
    far, their sum, that of their squares; updated in place."""
    found = (len(scores), float(scores.sum()), float(np.square(scores).sum()))
    sums[:] = [old + new for old, new in zip(sums, found)]
    n, total, squares = sums
    variance = (squares - total**2 / n) / max(1, n - 1)
    if args.reward_scaling == "norm":
        scores = scores - total / n
    if args.reward_scaling != "none":
        scores = scores / (math.sqrt(max(0, variance)) + 1e-8)
    return scores.clip(-args.cliprange_reward, args.cliprange_reward)


def token_rewards(kl, scores, lengths, beta):
    """(B, T): -beta KL of each reply token, and the score on the last one (Ziegler et al. 2019,
    eq. 2). kl: (B, T), 0 outside of replies; scores, lengths: (B,)."""
    rewards = -beta * kl
    rewards[torch.arange(len(scores)), lengths - 1] += scores
    return rewards


def gae(rewards, values, is_reply, gamma, lam):
    """Advantages and returns (B, T) (Schulman et al. 2016, https://arxiv.org/abs/1506.02438,
    eq. 16); 0 outside of replies, whose last token no value follows."""
    rewards = rewards * is_reply
    values = values * is_reply
    advantages = torch.zeros_like(rewards)
    advantage = next_values = 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        advantage = delta + gamma * lam * advantage
        next_values = values[:, t]
        advantages[:, t] = advantage
    return advantages, advantages + values


def whiten(advantages, is_reply):
    """Mean 0 and variance 1 over all reply tokens of the rollout; unbiased variance."""
    tokens = advantages[is_reply]
    variance = tokens.var() if len(tokens) > 1 else 0.0
    return (advantages - tokens.mean()) * is_reply / (variance + 1e-8) ** 0.5


def group_advantages(scores, n_samples, kind):
    """(B,) scores of n_samples replies to each prompt, in a row -> (B,) advantages: score - mean of
    the others (rloo: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, eq. 8), or (score -
    mean) / deviation (grpo: Shao et al. 2024, https://arxiv.org/abs/2402.03300, 4.1.2)."""
    groups = scores.view(-1, n_samples)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if kind == "rloo":
        return (centred * n_samples / (n_samples - 1)).flatten()
    return (centred / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()


def estimate_advantages(args, rollout, scored, scores, beta):
    """(5, B, T): the columns of `scored`, advantages and returns; KL to the reference, the mean of
    the replies [nats]. scores: (B,)."""
    log_probs, ref_log_probs, values = scored
    is_reply = rollout.is_reply
    scores = torch.tensor(scores, device=rollout.device)
    kl = log_probs - ref_log_probs
    reply_kl = kl.sum(dim=1)
    returns = torch.zeros_like(values)
    if args.advantage == "gae":
        rewards = token_rewards(kl, scores, is_reply.sum(dim=1), beta)
        advantages, returns = gae(rewards, values, is_reply, args.gamma, args.lam)
        advantages = whiten(advantages, is_reply)
    else:
        if args.advantage == "rloo":  # grpo has the price of KL in its loss
            scores = scores - beta * reply_kl
        advantages = group_advantages(scores, args.n_samples, args.advantage)[:, None] * is_reply
    table = torch.stack([log_probs, ref_log_probs, values, advantages, returns])
    return table.float(), float(reply_kl.mean())


def next_beta(beta, kl, args):
    """The price of KL for the next rollout (Ziegler et al. 2019, section 2.2). kl: mean of the
    replies [nats]."""
    if args.target_kl == 0:
        return beta
    error = min(0.2, max(-0.2, kl / args.target_kl - 1))
    return beta * (1 + error * min(1, args.num_rollouts / args.kl_horizon))


# ------------------------------------------------------------------------------------- invariants


def check_sampler(args, sampled, log_probs):
    """The mean difference of the sampler's log-probabilities to (n,) those of the whole text."""
    expected = torch.tensor([x for _, reply_log_probs in sampled for x in reply_log_probs])
    gap = float((expected - log_probs.cpu()).abs().mean())
    if not gap <= SAMPLER_BOUND[args.precision]:
        common.fail(
            f"log-probabilities while sampling are {gap:.3g} off those of the whole text: one of "
            "the two sees other positions, another mask or other weights in this model family"
        )
    return gap


def check_first_ratio(args, log_ratio):
    """Before the first update of a rollout, policy and sampler are one."""
    largest = max(log_ratio.abs().tolist(), default=0.0)
    if not largest <= RATIO_BOUND[args.precision]:
        common.fail(
            f"the log-ratio before the first update of a rollout is {largest:.3g}, and not 0: two "
            "passes over the same text differ, by dropout or another kernel",
            only_here=True,
        )


# -------------------------------------------------------------------------------------- evaluation


def reply_metrics(prompts, replies):
    """Of the token ids of replies."""
    return {
        "reply_tokens": float(np.mean([len(ids) for ids in replies])),
        "eos_rate": float(np.mean([ids[-1] in prompts.stop_ids for ids in replies])),
    }


def predictions_name(args, split, step):
    prefix = "test_" if split == "test" else ""
    return f"{prefix}temperature={args.eval_temperature:.2f}_n=1_step={step}.json"


def evaluate(args, engine, prompts, examples, rewards, split, run):
    """Collective. Means over the replies to the examples of `split`; the predictions file."""
    keys = [common.derive_seed(args.seed, split, i) for i in range(len(examples))]
    sampled = sample(args, engine, prompts, examples, keys, args.eval_temperature)
    replies = [ids for ids, _ in sampled]
    texts = [decode(prompts, ids) for ids in replies]
    scores = {name: reward(examples, texts) for name, reward in rewards.items()}
    predictions = []
    for i, example in enumerate(examples):
        row_scores = {name: float(column[i]) for name, column in scores.items()}
        predictions.append(
            {
                "prompt": example.text,
                "generations": [{"lm_postprocess": texts[i], **row_scores}],
                "demonstration": example.record.get("completion"),
                "orig_d": example.record,
                "dataset": example.data_set,
            }
        )
    step = run.step
    if split == "test":  # by the weights that are exported
        step = run.chosen().name.removeprefix("checkpoint-")
    if common.rank() == 0:
        run.write_predictions(predictions_name(args, split, step), predictions)
    metrics = {name: float(column.mean()) for name, column in scores.items()}
    return {**metrics, **reply_metrics(prompts, replies)}


def show_before_and_after(args, run):
    """Rank 0. Ten evaluation prompts with the first reply and that of the exported policy."""
    predictions = []
    for step in ("0", run.chosen().name.removeprefix("checkpoint-")):
        path = run.dir / predictions_name(args, "eval", step)
        predictions.append(json.loads(path.read_text())[:10])
    for rows in zip(*predictions):
        log(repr(rows[0]["prompt"][-200:]))
        for row in rows:
            (generation,) = row["generations"]
            log(f"{generation['reward']:10.3g}  {generation['lm_postprocess'][:200]!r}")


# ---------------------------------------------------------------------------------------- training


def auto_class_of(config):
    has_encoder = config is not None and config.is_encoder_decoder
    return AutoModelForSeq2SeqLM if has_encoder else AutoModelForCausalLM


def start_id_of(config):
    return config.decoder_start_token_id if config.is_encoder_decoder else None


def name_model(args, name):
    """Point the model flags at a run under models/, a folder, or a hub id, which has a slash. Any
    other name is refused by common.open_model, which says what there is."""
    folder = common.find_input(args, "models", name, [], [])
    if folder or "/" in name:
        args.model_init_path = str(folder or name)
    else:
        args.model_init_name, args.model_init_path = name, ""


def check_args(args, problems):
    common.check_shared_args(args, POSITIVE_FLAGS, problems)
    if args.temperature <= GREEDY:
        problems.append("--temperature: greedy replies have no alternatives to learn from")
    if args.num_rollouts % args.n_samples:
        problems.append(f"--num_rollouts counts replies: expected a multiple of {args.n_samples}")
    if args.advantage != "gae" and args.n_samples < 2:
        problems.append(f"--advantage {args.advantage} compares replies: --n_samples 4, or more")
    if bool(args.reward_fn) == bool(args.reward_model):
        problems.append("expected either --reward_fn FILE:NAME or --reward_model")
    if args.heldout_reward_fn and args.heldout_reward_model:
        problems.append("--heldout_reward_fn and --heldout_reward_model exclude each other")
    if args.precision == "fp16":
        problems.append("--precision fp16: a step that it skips would spoil a rollout; use bf16")
    if args.compile:
        problems.append("--compile is not offered here: every batch has another shape")


def count_chunks(args, config):
    """Chunks into which reply tokens are cut, so that at most MAX_LOGITS logits exist at once; the
    same all through a run, as ZeRO-3 gathers the head for each of them."""
    n_tokens = args.train_batch_size // common.world_size() * args.max_new_tokens
    return max(1, math.ceil(n_tokens * config.get_text_config().vocab_size / MAX_LOGITS))


def prepare(args):
    """All that can be wrong, found and reported together before any weight is loaded."""
    problems = []
    ds_config = prompts = data = None
    check_args(args, problems)
    source, config, tokenizer = common.open_model(args, problems)
    rewards = open_rewards(args, problems)
    identity = [reward.identity for reward in rewards.values()]
    if config:
        ds_config = common.make_ds_config(args, auto_class_of(config), config, problems)
        prompts = open_prompts(args, source, tokenizer, problems)
    if prompts:
        data = read_data(args, prompts, config, rewards, problems)
        identity.append(common.derive_seed(data.examples["train"]))
    run = common.Run(args, FREE_FLAGS, ds_config, identity, problems)
    if problems:
        common.fail(problems)
    return source, config, ds_config, prompts, data, rewards, run


def load_models(args, source, config, ds_config, tokenizer):
    """Collective. The Policy to train, and the reference, an engine: a copy of what it starts as;
    None where that is the policy without its new adapter."""
    options = (auto_class_of(config), source, config)
    model = common.load_model(*options, args, ds_config, tokenizer)
    switch_off_dropout(model)
    value_head = reference = None
    adapter = getattr(model, "adapter", None)
    if args.num_layers_unfrozen and not adapter:
        train_top_layers(model, args.num_layers_unfrozen)
    if args.advantage == "gae" and not args.no_train:
        value_head = new_value_head(model, args)
    if not args.no_train and (not adapter or adapter.folder):
        start = common.load_model(*options, frozen_args(args), ds_config, tokenizer)
        reference = freeze(Policy(start, args.temperature), ds_config)
    return Policy(model, args.temperature, value_head), reference


def describe(source, config, prompts):
    """What rawtune.json says of the policy, for all that read it."""
    about = {
        **common.read_about(source),
        "format": 1,
        "script": "rl_ppo.py",
        "stop_ids": prompts.stop_ids,
        "base": {"path": source, "sha256": None},
        "adapter": "none",
        "quantize": None,
    }
    if config.is_encoder_decoder:
        layout = {"source": "{prompt}", "target": "{completion}"}
        return {**about, "task": "completion", "family": "seq2seq", "record_layout": layout}
    return {**about, "task": "chat", "family": "causal", "raw_prompt": prompts.is_raw}


def main(args):
    # 1 data and models
    device = common.setup_distributed(args)
    rank = common.rank()
    world = common.world_size()
    source, config, ds_config, prompts, data, rewards, run = prepare(args)
    tokenizer = prompts.tokenizer
    start_id = start_id_of(config)
    plan = Plan(args, data)
    max_steps = plan.max_steps
    run.start(__file__, device, max_steps, plan.steps_per_epoch)
    if device.type == "cpu" and config.is_encoder_decoder:
        # its kernel takes T5's bias only where no gradient is computed: the ratio would not be 1
        torch.backends.cuda.enable_flash_sdp(False)
    policy, reference = load_models(args, source, config, ds_config, tokenizer)
    model = policy.model
    model.generation_config = GenerationConfig(eos_token_id=prompts.stop_ids)  # is exported
    for reward in rewards.values():
        reward.load(ds_config)

    # 2 engine
    optimizer = None if args.no_train else common.make_adamw(policy, args)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=ds_config)
    run.resume(engine)
    log(f"replies end with {tokenizer.convert_ids_to_tokens(prompts.stop_ids)}")

    def evaluation(split):
        return evaluate(args, engine, prompts, data.examples[split], rewards, split, run)

    if args.no_train:
        for split in ("eval", "test"):
            if data.examples[split]:
                run.log(split, evaluation(split))
        return 0
    about = describe(source, config, prompts)
    if rank == 0 and hasattr(model, "adapter"):
        about.update(model.adapter.about())
    if run.eval_is_due():  # the baseline, or what a stop left out
        run.evaluated(evaluation("eval"))
    state = run.state
    state.setdefault("beta", args.init_kl_coef)
    state.setdefault("score_sums", [0.0, 0.0, 0.0])
    n_chunks = count_chunks(args, config)

    # 3 loop: a rollout, a function of (seed, rollout) and the weights, and the updates from it
    first = run.step // plan.steps_per_rollout
    last = first if run.finished() else max_steps // plan.steps_per_rollout  # killed before export
    for index in tqdm(range(first, last), "rollouts", disable=rank > 0 or None):
        examples = [data.examples["train"][i] for i in plan.prompts(index)]
        keys = [common.derive_seed(args.seed, "rollout", index, i) for i in range(len(examples))]
        sampled = sample(args, engine, prompts, examples, keys, args.temperature)
        rollout = Rollout(examples, sampled, start_id, device)
        updates = plan.updates(index, rollout.n_tokens)
        # by the forward steps of the first pass, so that the first ratio is exactly 1
        first_pass = updates[: len(updates) // args.ppo_epochs]
        pieces = itertools.chain(*[pieces for _, pieces in first_pass])
        scored = score_tokens(engine, reference, rollout, pieces, n_chunks)
        metrics = reply_metrics(prompts, rollout.replies)
        metrics["sampler_gap"] = check_sampler(args, sampled, scored[0][rollout.is_reply])

        texts = [decode(prompts, ids) for ids in rollout.replies]
        raw_scores = rewards["reward"](examples, texts)
        scores = scale_scores(args, raw_scores, state["score_sums"])
        table, kl = estimate_advantages(args, rollout, scored, scores, state["beta"])
        metrics.update(score=raw_scores.mean(), score_std=raw_scores.std(), kl=kl)
        metrics["beta"] = beta = state["beta"]

        for n_updates, (ids, pieces) in enumerate(updates):
            lr = common.set_lr(engine, run.step, args, max_steps)
            n_tokens = int(rollout.lengths[ids].sum())  # of the step, on all ranks
            loss_sum = torch.zeros((), dtype=torch.float64, device=device)
            sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
            for i, piece in enumerate(pieces):
                engine.set_gradient_accumulation_boundary(i == len(pieces) - 1)
                log_probs, entropies, values = engine(rollout.batch(piece), n_chunks)  # (N,) each
                columns = table[:, piece][:, rollout.is_reply[piece]]  # (5, N)
                old_log_probs, ref_log_probs, old_values, advantages, returns = columns
                log_ratio = log_probs - old_log_probs
                ratio = log_ratio.exp()
                clipped_ratio = ratio.clamp(1 - args.cliprange, 1 + args.cliprange)
                unclipped_losses = -advantages * ratio
                clipped_losses = -advantages * clipped_ratio
                policy_losses = torch.maximum(unclipped_losses, clipped_losses)
                change = (values - old_values).clamp(-args.cliprange_value, args.cliprange_value)
                errors = (values - returns).square()
                clipped_errors = (old_values + change - returns).square()
                value_losses = torch.maximum(errors, clipped_errors) / 2
                loss = policy_losses.sum() + args.vf_coef * value_losses.sum()
                if args.advantage == "grpo":  # k3 of Schulman 2020, which is never negative
                    ref_log_ratio = ref_log_probs - log_probs
                    loss = loss + beta * (ref_log_ratio.expm1() - ref_log_ratio).sum()
                # DeepSpeed averages over the processes, hence x world
                engine.backward(loss * (world / n_tokens))
                loss_sum += loss.detach()
                is_clipped = clipped_losses > unclipped_losses
                found = (policy_losses, value_losses, entropies, is_clipped, log_ratio.abs())
                sums += torch.stack([column.detach().sum().double() for column in found])
                if n_updates == 0:
                    check_first_ratio(args, log_ratio)
            # one exchange: every rank learns the loss of the step, and whether any rank has to stop
            loss_sum, n_stop, grad_norm = common.step_totals(engine, loss_sum, run.must_stop())
            engine.step()
            loss = loss_sum / n_tokens
            grad_norm = common.check_step(engine, args, run.step, loss, grad_norm)
            dist.all_reduce(sums)
            metrics.update(zip(METRICS, (sums / n_tokens).tolist()))
            named = {f"ppo/{name}": value for name, value in metrics.items()}
            run.stepped(loss, n_tokens, lr=lr, grad_norm=grad_norm, **named)

        state["beta"] = next_beta(beta, kl, args)
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
    if data.examples["test"]:
        run.load_chosen(engine)
        run.log("test", evaluation("test"))
    if rank == 0:
        show_before_and_after(args, run)
        common.export(run)
    return 0


def parse_args(argv):
    flags = {**FLAGS, "learning_rate": (0.0, "peak; 0: 1e-6, with an adapter 1e-4")}
    for name, default in DEFAULTS.items():
        flags[name] = (default, *common.SHARED_FLAGS[name][1:])
    args = common.Parser(__doc__, flags, DEMO).parse_args(argv)
    if args.policy:
        name_model(args, args.policy)
    if args.learning_rate == 0:
        base = common.adapter_base(args.model_init_path)
        has_adapter = args.lora_rank or args.train_adapter or base
        args.learning_rate = 1e-4 if has_adapter else 1e-6
    if not args.metric_for_best and (args.heldout_reward_fn or args.heldout_reward_model):
        args.metric_for_best = "heldout_reward"
    return args


if __name__ == "__main__":
    common.launch(main, parse_args(sys.argv[1:]))
