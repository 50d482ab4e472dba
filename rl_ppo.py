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

import collections
import contextlib
import copy
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
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
)

from common import log
from decoding import GREEDY, Decoding, choose

FLAGS = {
    "policy": ("", "the model to train: a run, a folder, or a hub id with a slash"),
    "reward_fn": ("", "FILE:NAME of a function (prompts, replies, records) -> floats"),
    "reward_model": ("", "a run of clf.py"),
    "reward_text": ("{prompt}\\n\\n{reply}", "{input} in the template of a reward model"),
    "heldout_reward_fn": ("", "for evaluation only: it chooses the checkpoint"),
    "heldout_reward_model": ("", "the same as a model"),
    "raw_prompt": (False, "prompts as they are, without a template"),
    "seq_length": (1024, "tokens; prompts that leave no room for a reply are left out"),
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
        "none",
        "std",
        "norm",
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
    "num_rollouts",
    "n_samples",
    "rollout_batch_size",
    "max_new_tokens",
    "ppo_epochs",
    "temperature",
    "cliprange",
    "cliprange_value",
    "kl_horizon",
    "cliprange_reward",
)
# may differ when a run goes on: they only concern evaluation and speed
FREE_FLAGS = {"rollout_batch_size", "n_eval", "eval_temperature"}
DEMO = (
    "--model_init_name tiny-llama --data wishes --reward_fn data/rewards.py:wish "
    "--training_run_name ppo-demo --max_steps 600 --train_batch_size 64 "
    "--ppo_epochs 2 --learning_rate 0.003 --lr_scheduler_type linear --max_new_tokens 8 "
    "--num_layers_unfrozen 0 --init_kl_coef 0.015 --target_kl 0 --eval_steps 200 "
    "--save_steps 200 --logging_steps 20 --weight_decay 0.1"
)
# means over the reply tokens of an optimizer step
METRICS = ("policy_loss", "value_loss", "entropy", "clip_fraction", "log_ratio")
# the largest |log-ratio| before the first update of a rollout
RATIO_BOUND = {"fp32": 1e-5, "bf16": 0.02, "bf16-mixed": 0.02}
# the mean difference between log-probabilities while sampling and those of the whole text
SAMPLER_BOUND = {"fp32": 1e-3, "bf16": 0.1, "bf16-mixed": 0.1}
MAX_LOGITS = 2**27 if torch.cuda.is_available() else 2**26  # of a forward step
IGNORED = -100  # the label of a token that is no reply
PLACE = r"\{(\w+)\}"  # in a template

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
        raise ValueError("the last message has to be the user's")
    if prompts.is_raw and len(messages) > 1:
        raise ValueError("several messages need a chat template; this policy reads raw prompts")
    text = key = messages[-1]["content"]
    begin = []
    if not prompts.is_raw:
        key = prompts.render(messages, reply_follows=True)
    elif not has_encoder:
        begin = prompts.begin
    input_ids = begin + prompts.tokenizer(key, add_special_tokens=has_encoder).input_ids
    return Example(data_set, key, text, input_ids, record)


def read_data(args, prompts, config, rewards, problems):
    """Data of --data."""
    has_encoder = config.is_encoder_decoder
    n_positions = common.count_positions(config)
    room = min(args.seq_length, n_positions)
    if not has_encoder:
        room -= args.max_new_tokens
    keys = set().union(*[reward.keys for reward in rewards.values()])
    examples = collections.defaultdict(list)
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


# ------------------------------------------------------------------------------- rows and batches


def pad(rows, fill):
    """Lists of several lengths -> (rows, the longest of them)."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=fill)


def collate(pairs, ids, start_id, device):
    """Some of the pairs [(prompt, reply)], token ids both, as tensors on the device; start_id: what
    a decoder begins with, None where there is no encoder.

    input_ids (R, S): prompt and reply, or for an encoder the prompt, with its attention_mask and
    decoder_input_ids. labels (N,): the reply tokens; label_index (N,): where in the flattened
    states each is predicted.
    """
    rows = [pairs[i] for i in ids]
    if not rows:
        rows = [([0], [])]  # a rank without replies computes one padding token along
    columns = collections.defaultdict(list)
    for prompt, reply in rows:
        if start_id is None:
            unlabelled = [IGNORED] * (len(prompt) - 1)
            columns["input_ids"].append(prompt + reply)
            columns["labels"].append(unlabelled + reply + [IGNORED])
        else:
            columns["input_ids"].append(prompt)
            columns["attention_mask"].append([1] * len(prompt))
            columns["decoder_input_ids"].append([start_id] + reply[:-1])
            columns["labels"].append(reply)
    labels = pad(columns.pop("labels"), IGNORED).flatten()
    label_index = torch.nonzero(labels != IGNORED).flatten()
    batch = {name: pad(values, 0) for name, values in columns.items()}
    batch["label_index"] = label_index
    batch["labels"] = labels[label_index]
    return common.to_device(batch, device)


def round_up(steps, multiple):
    """(10, 4) -> 12; 0 and -1, which have meanings of their own, stay."""
    return math.ceil(steps / multiple) * multiple if steps > 0 else steps


class Plan:
    """The prompts of each rollout and the replies of each optimizer step: functions of (seed,
    rollout), the same for any number of ranks. Evaluation, checkpoints and the end wait for the end
    of a rollout, so the flags' intervals are rounded up."""

    def __init__(self, args, data, config):
        self.args = args
        self.batch = args.train_batch_size * args.gradient_accumulation_steps
        world = common.world_size()
        n_tokens = args.train_batch_size // world * args.max_new_tokens
        n_logits = n_tokens * config.get_text_config().vocab_size
        # a forward step that would have too many logits is split: the mathematics is the same
        n_forward_steps = args.gradient_accumulation_steps * math.ceil(n_logits / MAX_LOGITS)
        self.n_pieces = world * n_forward_steps
        self.n_prompts = args.num_rollouts // args.n_samples
        # one by one: epochs follow each other without a gap, also in the middle of a rollout
        self.order = common.Order(args.seed, 1, data.sizes, data.amounts)
        self.no_lengths = np.zeros((sum(data.sizes), 2))
        n_rollouts = max(1, round(self.order.steps_per_epoch / self.n_prompts))  # of an epoch
        self.steps_per_rollout = args.ppo_epochs * math.ceil(args.num_rollouts / self.batch)
        self.steps_per_epoch = self.steps_per_rollout * n_rollouts
        max_steps = args.max_steps or math.ceil(args.num_epochs * self.steps_per_epoch)
        self.max_steps = round_up(max_steps, self.steps_per_rollout)
        for name in ("eval_steps", "save_steps", "logging_steps"):  # Run reads them
            setattr(args, name, round_up(getattr(args, name), self.steps_per_rollout))

    def prompts(self, rollout):
        """The numbers of the examples, each --n_samples times in a row."""
        first = rollout * self.n_prompts
        places = range(first, first + self.n_prompts)
        ids = [self.order.step_ids(place, self.no_lengths)[0] for place in places]
        return np.repeat(ids, self.args.n_samples).tolist()

    def updates(self, rollout, n_tokens):
        """[(replies of an optimizer step, [replies of each forward step of this rank])] of a
        rollout; n_tokens: of each prompt and its reply."""
        updates = []
        for epoch in range(self.args.ppo_epochs):
            rng = np.random.default_rng([5, self.args.seed, rollout, epoch])
            order = rng.permutation(len(n_tokens))
            for start in range(0, len(order), self.batch):
                ids = order[start : start + self.batch]
                pieces = common.deal(ids, n_tokens, self.n_pieces)
                mine = pieces[common.rank() :: common.world_size()]
                mine = [np.sort(piece) for piece in mine]
                updates.append((ids, mine))
        return updates


# ---------------------------------------------------------------------------------- model and loss


def run_model(model, batch):
    """Last hidden states (N, D) and logits (N, V) that predict the reply tokens, by the model's own
    forward, whose head reads these states alone. Padding is at the right and needs no mask in a
    decoder: nothing sees what follows it."""
    states = []

    def select_states(module, inputs, output):
        selected = output.last_hidden_state.flatten(0, 1)[batch["label_index"]]
        states.append(selected)
        output.last_hidden_state = selected[None]  # (1, N, D)
        return output

    hook = model.get_decoder().register_forward_hook(select_states)
    inputs = {name: batch[name] for name in batch if "label" not in name}
    logits = model(**inputs, use_cache=False).logits[0]
    hook.remove()
    return states[0], logits


def new_value_head(model, args):
    """(N, D) states -> (N, 1) values, as trlx's."""
    torch.manual_seed(common.derive_seed(args.seed, "value head"))
    size = model.get_output_embeddings().in_features
    layers = (torch.nn.Linear(size, 2 * size), torch.nn.ReLU(), torch.nn.Linear(2 * size, 1))
    return torch.nn.Sequential(*layers).to(common.DTYPES[args.precision])


class Policy(torch.nn.Module):
    """What the engine wraps: forward(batch) -> (3, N) fp32 log-probabilities, entropies and values
    of the reply tokens. The distribution is the one that is sampled from,
    softmax(logits / temperature)."""

    def __init__(self, model, temperature, value_head=None):
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.value_head = value_head

    def forward(self, batch):
        states, logits = run_model(self.model, batch)
        logits = logits.float() / self.temperature
        log_p = logits.log_softmax(dim=1)  # (N, V)
        log_probs = log_p.gather(1, batch["labels"][:, None]).squeeze(1)
        with torch.no_grad():  # the entropy is only looked at
            entropies = -(log_p.exp() * log_p).sum(dim=1)
        values = torch.zeros_like(log_probs)
        if self.value_head:
            values = self.value_head(states).squeeze(1).float()
        return torch.stack([log_probs, entropies, values])


def switch_off_dropout(model):
    """PPO compares the probabilities of a text before and after an update."""
    for module in model.modules():
        for name, value in vars(module).items():
            is_rate = name == "p" or "drop" in name  # p: of torch.nn.Dropout
            if is_rate and isinstance(value, float):
                setattr(module, name, 0.0)


def train_top_layers(model, n_layers):
    """Freeze all but the last blocks of the decoder, the norm behind them, and a head of its own.
    The encoder of T5 is frozen too, as by trlx."""
    decoder = model.get_decoder()
    blocks = next(m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList))
    model.requires_grad_(False)
    decoder.requires_grad_(True)
    blocks[:-n_layers].requires_grad_(False)
    for name, weight in decoder.named_parameters():
        if re.search("embed|wte|wpe|project_in", name):
            weight.requires_grad_(False)
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


def frozen_args(args):
    """The flags to load a model that is not trained."""
    frozen = copy.copy(args)
    frozen.lora_rank = 0
    frozen.train_adapter = False
    frozen.no_train = True
    return frozen


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

    def __init__(self, name, problems):
        self.name = name
        self.keys = set()
        self.identity = None
        file, _, function = name.rpartition(":")
        path = pathlib.Path(file)
        if not path.is_file():
            path = common.HERE / file
        try:
            self.identity = common.derive_seed(path.read_text())
            self.function = runpy.run_path(str(path))[function]
        except Exception as error:  # whatever the code of a user raises
            problems.append(f"{name}: expected FILE:NAME of a function, found {error!r}")

    def load(self, ds_config):
        """It is there already."""

    def ask(self, examples, replies):
        """{number of a reply: score} on rank 0, {} on others."""
        if common.rank() > 0:
            return {}
        prompts = [example.text for example in examples]
        records = [example.record for example in examples]
        try:
            scores = self.function(prompts, replies, records)
            return dict(enumerate(map(float, scores)))
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            common.fail(f"{self.name} fails with {error!r} ({frame.filename}, line {frame.lineno})")


class Score(torch.nn.Module):
    """forward(batch) -> (R,) fp32: logit(yes) - logit(no), as clf.py computes them."""

    def __init__(self, model, no_yes):
        super().__init__()
        self.model = model
        self.no_yes = no_yes
        head = model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            common.fail(f"a {model.config.model_type} cannot be the reward: its head has a bias")
        head.forward = self.two_columns
        if hasattr(model, "final_logits_bias"):  # BART
            model.final_logits_bias = model.final_logits_bias[:, no_yes]

    def two_columns(self, states):
        """(1, R, D) -> (1, R, 2), in fp32, for bf16 is too coarse to rank by."""
        head = self.model.get_output_embeddings()
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), head.weight[self.no_yes].float())

    def forward(self, batch):
        _, logits = run_model(self.model, batch)
        return logits[:, 1] - logits[:, 0]


class RewardModel:
    """A run of clf.py. Small files first, then load()."""

    def __init__(self, args, name, problems):
        self.name = self.identity = name
        self.args = frozen_args(args)
        self.args.quantize = ""
        name_model(self.args, name)
        self.source, self.config, self.tokenizer = common.open_model(self.args, problems)
        self.about = common.read_about(self.source or name)
        self.keys = set()  # of a record, besides its prompt
        if self.about.get("script") != "clf.py":
            problems.append(f"--reward_model {name}: expected a run of clf.py")
            return
        text = args.reward_text.replace("\\n", "\n")  # as a shell passes it
        self.template = self.about["record_layout"]["template"].replace("{input}", text)
        self.keys = set(re.findall(PLACE, self.template)) - {"prompt", "reply"}

    def load(self, ds_config):
        """Collective."""
        self.start_id = start_id_of(self.config)
        options = (self.source, self.config, self.args, ds_config, self.tokenizer)
        model = common.load_model(common.auto_class_of(self.config), *options)
        words = self.about["verbaliser"]
        no_yes = [words["negative_id"], words["positive_id"]]
        self.engine = freeze(Score(model, no_yes), ds_config)

    def read(self, example, reply):
        """The token ids of what the model reads of a reply; too many lose their beginning."""
        values = {**example.record, "prompt": example.text, "reply": reply}
        text = re.sub(PLACE, lambda place: str(values[place[1]]), self.template)
        tokenizer = self.tokenizer
        input_ids = tokenizer(text).input_ids
        if self.start_id is None and input_ids[-1] == tokenizer.eos_token_id:
            input_ids.pop()  # as clf.py: the answer comes next
        n_begin = int(input_ids[0] == tokenizer.bos_token_id)
        n_cut = len(input_ids) - self.about["record_layout"]["max_length"]
        if n_cut > 0:
            del input_ids[n_begin : n_begin + n_cut]
        return input_ids

    @torch.no_grad()
    def ask(self, examples, replies):
        """Collective. {number of a reply: score} of this rank's share."""
        # the state before the answer is asked for: any token serves as the answer
        pairs = [(self.read(*pair), [0]) for pair in zip(examples, replies)]
        lengths = [len(input_ids) for input_ids, _ in pairs]
        scores = {}
        for ids in common.my_batches(lengths, self.args.eval_batch_size):
            batch = collate(pairs, ids, self.start_id, self.engine.device)
            logits = self.engine(batch)
            scores.update(zip(ids, logits.tolist()))
        return scores


def score(reward, examples, replies):
    """Collective. (n,) scores of replies."""
    n_replies = len(replies)
    by_number = common.gather(reward.ask(examples, replies))
    scores = np.array([by_number[i] for i in sorted(by_number)])
    if len(scores) != n_replies or not np.isfinite(scores).all():
        common.fail(f"{reward.name}: no finite number for each of {n_replies}: {scores}")
    return scores


def open_rewards(args, problems):
    """{"reward": ..., and perhaps "heldout_reward": ...}"""
    rewards = {}
    for name in ("reward", "heldout_reward"):
        function = getattr(args, f"{name}_fn")
        model = getattr(args, f"{name}_model")
        if function and model:
            problems.append(f"--{name}_fn and --{name}_model exclude each other")
        if function:
            rewards[name] = RewardFunction(function, problems)
        elif model:
            rewards[name] = RewardModel(args, model, problems)
    if "reward" not in rewards:
        problems.append("no reward: --reward_fn FILE:NAME or --reward_model")
    return rewards


# ---------------------------------------------------------------------------------------- rollouts


def sample(args, engine, prompts, examples, key, temperature):
    """Collective. (token ids of each reply, their log-probabilities). A reply depends on its
    example, key and the weights alone. A row that has ended leaves and the next prompts join, so
    that finished replies cost nothing."""
    device = engine.device
    n_examples = len(examples)
    longest_first = sorted(range(n_examples), key=lambda i: -len(examples[i].input_ids))
    waiting = longest_first[common.rank() :: common.world_size()]
    generators = [None] * n_examples
    if temperature > GREEDY:
        for i in waiting:
            seed = common.derive_seed(args.seed, *key, i)
            generators[i] = torch.Generator(device).manual_seed(seed)
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
            log_probs = scores.log_softmax(dim=1).gather(1, tokens[:, None]).squeeze(1)
            goes_on = []
            for i, token, log_prob in zip(rows, tokens.tolist(), log_probs.tolist()):
                input_ids, reply_log_probs = replies[i]
                input_ids.append(token)
                reply_log_probs.append(log_prob)
                has_room = len(input_ids) < args.max_new_tokens
                goes_on.append(has_room and token not in prompts.stop_ids)
            if not all(goes_on):
                rows = list(itertools.compress(rows, goes_on))
                kept = torch.tensor(goes_on, device=device).nonzero().flatten()
                decoding.keep(kept)
                tokens = tokens[kept]
    replies = common.gather(replies)
    return zip(*[replies[i] for i in range(n_examples)])


@torch.no_grad()
def score_tokens(engine, reference, pairs, is_reply, updates, start_id):
    """Collective. (3, B, T) fp64: log-probabilities of policy and reference, and values; by the
    forward steps of `updates`, a pass over the rollout."""
    scored = torch.zeros(3, *is_reply.shape, dtype=torch.float64, device=engine.device)
    for ids in [piece for _, pieces in updates for piece in pieces]:
        batch = collate(pairs, ids, start_id, engine.device)
        log_probs, _, values = engine(batch)
        if reference:
            ref_log_probs, *_ = reference(batch)
        else:
            with adapter_off(engine.module.model):
                ref_log_probs, *_ = engine(batch)
        is_scored = torch.zeros_like(is_reply)
        is_scored[ids] = is_reply[ids]
        scored[:, is_scored] = torch.stack([log_probs, ref_log_probs, values]).double()
    dist.all_reduce(scored)  # each reply is one rank's, the others hold zeros
    return scored


# --------------------------------------------------------------------------------- PPO mathematics


def scale_scores(args, scores, sums):
    """(B,) scores as --reward_scaling and --cliprange_reward count them. sums: number of scores so
    far, their sum, that of their squares; updated in place."""
    added = [len(scores), scores.sum(), np.square(scores).sum()]
    sums[:] = np.add(sums, added).tolist()
    n, total, squares = sums
    variance = (squares - total**2 / n) / max(1, n - 1)
    if args.reward_scaling == "norm":
        scores = scores - total / n
    if args.reward_scaling != "none":
        deviation = math.sqrt(max(0, variance))
        scores = scores / (deviation or 1.0)  # 0: all have been equal
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


def estimate_advantages(args, is_reply, scored, scores, beta):
    """(5, B, T): the columns of `scored`, advantages and returns; KL to the reference, the mean of
    the replies [nats]. scores: (B,)."""
    log_probs, ref_log_probs, values = scored
    scores = torch.tensor(scores, device=scored.device)
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
    table = torch.stack([*scored, advantages, returns])
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
    expected = torch.tensor(np.concatenate(sampled))
    gap = float((expected - log_probs.cpu()).abs().mean())
    if not gap <= SAMPLER_BOUND[args.precision]:
        common.fail(
            f"log-probabilities while sampling are {gap:.3g} off those of the whole text: one "
            "sees other positions, another mask or other weights"
        )
    return gap


def check_first_ratio(args, log_ratio):
    """Before the first update of a rollout, policy and sampler are one."""
    largest = max(log_ratio.abs().tolist(), default=0.0)
    if not largest <= RATIO_BOUND[args.precision]:
        common.fail(
            f"the log-ratio before the first update of a rollout is {largest:.3g}, and not 0: "
            "dropout, or another kernel",
            only_here=True,
        )


# -------------------------------------------------------------------------------------- evaluation


def reply_metrics(prompts, replies):
    """Of the token ids of replies."""
    return {
        "reply_tokens": np.mean([len(ids) for ids in replies]),
        "eos_rate": np.mean([ids[-1] in prompts.stop_ids for ids in replies]),
    }


def predictions_name(args, split, step):
    prefix = "test_" if split == "test" else ""
    return f"{prefix}temperature={args.eval_temperature:.2f}_n=1_step={step}.json"


def evaluate(args, engine, prompts, examples, rewards, split, run):
    """Collective. Means over the replies to the examples of `split`; the predictions file."""
    replies, _ = sample(args, engine, prompts, examples, (split,), args.eval_temperature)
    texts = [prompts.decode(ids) for ids in replies]
    generations = [{"lm_postprocess": text} for text in texts]
    metrics = reply_metrics(prompts, replies)
    for name, reward in rewards.items():
        scores = score(reward, examples, texts)
        metrics[name] = scores.mean()
        for generation, value in zip(generations, scores.tolist()):
            generation[name] = value
    predictions = []
    for example, generation in zip(examples, generations):
        predictions.append(
            {
                "prompt": example.text,
                "generations": [generation],
                "demonstration": example.record.get("completion"),
                "orig_d": example.record,
                "dataset": example.data_set,
            }
        )
    step = run.step
    if split == "test":  # by the weights that are exported
        step = run.state["best_step"] or run.step
    if common.rank() == 0:
        common.write_json(run.dir / predictions_name(args, split, step), predictions)
    return metrics


def show_before_and_after(args, run):
    """Rank 0. Ten evaluation prompts with the first reply and that of the exported policy."""
    chosen = run.state["best_step"] or run.step
    paths = [run.dir / predictions_name(args, "eval", step) for step in (0, chosen)]
    if not all(path.exists() for path in paths):  # deleted, or --eval_temperature has changed
        return
    before, after = [json.loads(path.read_text()) for path in paths]
    for old, new in zip(before[:10], after):
        log(repr(old["prompt"][-200:]))
        for row in (old, new):
            generation = row["generations"][0]
            log(f"{generation['reward']:10.3g}  {generation['lm_postprocess']!r}")


# ---------------------------------------------------------------------------------------- training


def start_id_of(config):
    return config.decoder_start_token_id if config.is_encoder_decoder else None


def name_model(args, name):
    """Point the model flags at a run under models/, a folder, or a hub id, which has a slash. Any
    other name is refused by common.open_model, which says what there is."""
    folder = common.find_input(args, "models", name, [], [])
    args.model_init_name = name
    args.model_init_path = ""
    if folder or "/" in name:
        args.model_init_path = str(folder or name)


def check_args(args, problems):
    common.check_shared_args(args, POSITIVE_FLAGS, problems)
    if args.temperature <= GREEDY:
        problems.append("--temperature: greedy replies have no alternatives to learn from")
    if args.num_rollouts % args.n_samples:
        problems.append(f"--num_rollouts counts replies: expected a multiple of {args.n_samples}")
    if args.advantage != "gae" and args.n_samples < 2:
        problems.append(f"--advantage {args.advantage} compares replies: --n_samples 4, or more")
    if args.precision == "fp16":
        problems.append("--precision fp16: a step that it skips would spoil a rollout; use bf16")
    if args.compile:
        problems.append("--compile is not offered here: every batch has another shape")


def prepare(args):
    """All that can be wrong, found and reported together before any weight is loaded."""
    problems = []
    ds_config = prompts = data = None
    check_args(args, problems)
    source, config, tokenizer = common.open_model(args, problems)
    rewards = open_rewards(args, problems)
    identity = [reward.identity for reward in rewards.values()]
    if config:
        ds_config = common.make_ds_config(args, common.auto_class_of(config), config, problems)
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
    options = (common.auto_class_of(config), source, config)
    model = common.load_model(*options, args, ds_config, tokenizer)
    switch_off_dropout(model)
    if args.no_train:
        return Policy(model, args.temperature), None
    value_head = reference = None
    adapter = getattr(model, "adapter", None)
    if args.num_layers_unfrozen and not adapter:
        train_top_layers(model, args.num_layers_unfrozen)
    if args.advantage == "gae":
        value_head = new_value_head(model, args)
    if not adapter or adapter.folder:
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
    plan = Plan(args, data, config)
    max_steps = plan.max_steps
    run.start(__file__, max_steps, plan.steps_per_epoch)
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

    def evaluation(split):
        return evaluate(args, engine, prompts, data.examples[split], rewards, split, run)

    if args.no_train:
        for split in ("eval", "test"):
            if data.examples[split]:
                run.log(split, evaluation(split))
        log(f"{run.dir} has the predictions")
        return 0
    about = describe(source, config, prompts)
    if rank == 0 and hasattr(model, "adapter"):
        about.update(model.adapter.about())
    if run.eval_is_due():  # the baseline, or what a stop left out
        run.evaluated(evaluation("eval"))
    state = run.state
    state.setdefault("beta", args.init_kl_coef)
    state.setdefault("score_sums", [0, 0, 0])

    # 3 loop: a rollout, a function of (seed, rollout) and the weights, and the updates from it
    first = run.step // plan.steps_per_rollout
    last = first if run.finished() else max_steps // plan.steps_per_rollout  # killed before export
    for index in common.progress(range(first, last), "rollouts"):
        examples = [data.examples["train"][i] for i in plan.prompts(index)]
        key = ("rollout", index)
        replies, sampled = sample(args, engine, prompts, examples, key, args.temperature)
        pairs = list(zip([example.input_ids for example in examples], replies))
        lengths = np.array([len(reply) for reply in replies])
        updates = plan.updates(index, lengths + [len(prompt) for prompt, _ in pairs])
        is_reply = np.arange(max(lengths)) < lengths[:, None]  # (B, T)
        is_reply = torch.tensor(is_reply, device=device)
        # by the forward steps of the first pass, so that the first ratio is exactly 1
        first_pass = updates[: len(updates) // args.ppo_epochs]
        scored = score_tokens(engine, reference, pairs, is_reply, first_pass, start_id)
        metrics = reply_metrics(prompts, replies)
        metrics["sampler_gap"] = check_sampler(args, sampled, scored[0, is_reply])

        reply_texts = [prompts.decode(ids) for ids in replies]
        raw_scores = score(rewards["reward"], examples, reply_texts)
        scores = scale_scores(args, raw_scores, state["score_sums"])
        beta = state["beta"]
        table, kl = estimate_advantages(args, is_reply, scored, scores, beta)
        metrics.update(score=raw_scores.mean(), score_std=raw_scores.std(), kl=kl, beta=beta)

        for k, (ids, pieces) in enumerate(updates):
            lr = common.set_lr(engine, run.step, args, max_steps)
            n_tokens = int(lengths[ids].sum())  # of the step, on all ranks
            loss_sum = 0.0
            metric_sums = 0.0  # (METRICS,)
            for i, piece in enumerate(pieces):
                engine.set_gradient_accumulation_boundary(i == len(pieces) - 1)
                batch = collate(pairs, piece, start_id, device)
                log_probs, entropies, values = engine(batch)  # (N,) each
                columns = table[:, piece][:, is_reply[piece]]  # (5, N)
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
                loss_sum += loss.detach().double()
                is_clipped = clipped_losses > unclipped_losses
                found = (policy_losses, value_losses, entropies, is_clipped, log_ratio.abs())
                metric_sums += torch.stack([column.detach().sum().double() for column in found])
                if k == 0:
                    check_first_ratio(args, log_ratio)
            # one exchange: every rank learns the loss of the step, and whether any rank has to stop
            loss_sum, n_stop, grad_norm = common.step_totals(engine, loss_sum, run.must_stop())
            engine.step()
            loss = loss_sum / n_tokens
            grad_norm = common.check_step(engine, args, run.step, loss, grad_norm)
            dist.all_reduce(metric_sums)
            metrics.update(zip(METRICS, (metric_sums / n_tokens).tolist()))
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
        common.load_checkpoint(engine, run.chosen())
        run.log("test", evaluation("test"))
    if rank == 0:
        common.export(run)
        show_before_and_after(args, run)
    return 0


def parse_args(argv):
    flags = {**FLAGS, "learning_rate": (0.0, "peak; 0: 1e-6, with an adapter 1e-4")}
    for name, default in DEFAULTS.items():
        flags[name] = (default, *common.SHARED_FLAGS[name][1:])
    args = common.Parser(__doc__, flags, DEMO).parse_args(argv)
    policy = args.policy or (not args.model_init_path and args.model_init_name)
    if policy:
        name_model(args, policy)
    if args.learning_rate == 0:
        base = common.adapter_base(args.model_init_path)
        has_adapter = args.lora_rank or args.train_adapter or base
        args.learning_rate = 1e-4 if has_adapter else 1e-6
    if not args.metric_for_best and (args.heldout_reward_fn or args.heldout_reward_model):
        args.metric_for_best = "heldout_reward"
    return args


if __name__ == "__main__":
    common.launch(main, parse_args(sys.argv[1:]))
