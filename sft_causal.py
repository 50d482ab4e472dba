"""Fine-tune a decoder-only model (Llama, Qwen, Gemma, Pythia, GPT-2) on instructions and chats with
DeepSpeed.

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"instruction": "Add.", "input": "2 2", "output": "4"}
    {"prompt": "2 + 2 =", "completion": "4"}          {"text": "Two and two are four."}

    python sft_causal.py                                   # demo, 2 minutes on a laptop
    python sft_causal.py --model_init_path HuggingFaceTB/SmolLM2-135M --data mydata
    deepspeed --num_gpus 4 sft_causal.py --model_init_name llama-7b --data mydata --lora_rank 16

Writes models/<training_run_name>/: metrics.jsonl, predictions, checkpoint-<step>/ to resume from,
and the trained model as a plain Hugging Face folder, whose tokenizer has the chat template.
docs/sft_causal.md explains every number.

Loss: the sum of -log p(token | tokens before) over all target tokens of an optimizer step (all
forward steps, all processes), divided by their number. Targets are what the assistant says and the
tokens that end it.
Shapes: R rows, S tokens of a row, N target tokens, D hidden, V vocabulary.
"""

import collections
import functools
import inspect
import itertools
import math
import sys

import common  # first: it prepares the import of DeepSpeed

# isort: split
import deepspeed
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GenerationConfig

from common import SPLITS, log

FLAGS = {
    "template": (
        "auto",
        "how a conversation becomes text; auto: the tokenizer's own, else chatml",
        *("auto", "chatml", "alpaca", "oasst", "plain"),
    ),
    "targets": (
        "assistant",
        "what is trained: every reply, the last one, or every token",
        *("assistant", "last", "all"),
    ),
    "raw_prompt": (False, "prompt and completion as they are, without a template"),
    "max_length": (2048, "longer examples lose their end, and are not taught to stop"),
    "pad_token": ("", "one of the tokenizer or a new one; else the end token"),
    "eos_token": ("", "one of the tokenizer or a new one"),
    "sep_token": ("", "behind a user's turn of --template plain; else a newline"),
    "n_generate": (200, "evaluation examples of each data set that are answered in text"),
    "max_new_tokens": (512, "generation limit at evaluation"),
    "temperature": (0.001, "of sampling at evaluation; <= 0.001 is greedy"),
    "n_samples": (1, "generations per prompt; metrics take the first"),
}
POSITIVE_FLAGS = ("max_length", "max_new_tokens", "n_samples")
# may differ when a run goes on: they only concern evaluation
FREE_FLAGS = {"n_generate", "max_new_tokens", "temperature", "n_samples"}
DEMO = (
    "--model_init_name tiny-llama --data instructions --training_run_name sft-demo "
    "--max_steps 1800 --train_batch_size 64 --learning_rate 0.006 --weight_decay 0.1 "
    "--warmup_steps 100 --eval_steps 900 --eval_batch_size 100 --max_new_tokens 24 "
    "--logging_steps 50 --n_generate 300"
)
TEMPLATES = {  # {bos}: the begin token, where the tokenizer puts one in front
    "chatml": """{bos}
{%- for message in messages -%}
    {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\n' if add_generation_prompt }}""",
    # Taori et al. 2023, with a newline behind "Response:" that keeps the reply's first token apart
    "alpaca": """{bos}
{%- if messages[0].role == 'system' -%}
    {{ messages[0].content + '\n\n' }}
{%- else -%}
    {{ 'Below is an instruction that describes a task' }}
    {%- if '\n\n### Input:\n' in messages[0].content -%}
        {{ ', paired with an input that provides further context' }}
    {%- endif -%}
    {{ '. Write a response that appropriately completes the request.\n\n' }}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{ '### Instruction:\n' + message.content + '\n\n### Response:\n' }}
    {%- elif message.role == 'assistant' -%}
        {{ message.content + eos_token + ('' if loop.last else '\n\n') }}
    {%- elif not loop.first -%}
        {{ raise_exception(message.role + ' may only come first') }}
    {%- endif -%}
{%- endfor -%}""",
    # the "v2" format of Open-Assistant's model_training
    "oasst": """{bos}
{%- set names = {'system': 'system', 'user': 'prompter', 'assistant': 'assistant'} -%}
{%- for message in messages -%}
    {{ '<|' + names[message.role] + '|>' + message.content + eos_token }}
{%- endfor -%}
{{ '<|assistant|>' if add_generation_prompt }}""",
    "plain": """{bos}
{%- for message in messages -%}
    {{ message.content + (eos_token if message.role == 'assistant' else sep_token or '\n') }}
{%- endfor -%}""",
}
TEMPLATE_TOKENS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "oasst": ["<|system|>", "<|prompter|>", "<|assistant|>"],
}
EXAMPLES_PER_ROW = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # that `pack` considers
MAX_LOGITS = 2**27 if torch.cuda.is_available() else 2**26  # that exist at once
IGNORED = -100  # the label of a token that is no target
MAX_LOST = 0.01  # share of the examples that may be left without a target
UNLIKE_A_CHAT = (
    "a chat would see other tokens than training: --targets last where the template rewrites "
    "earlier turns, no blanks or newlines where a reply begins, or another --template"
)
GREEDY = 0.001  # the highest --temperature that means: take the likeliest token

# --------------------------------------------------------------------------------------- template


def set_template(args, tokenizer):
    """Write --template, which is resolved, and its tokens into the tokenizer."""
    if args.template == "auto":
        has_own = tokenizer.chat_template or args.raw_prompt
        args.template = "tokenizer" if has_own else "chatml"
    if args.template in TEMPLATES:
        tokenizer.add_tokens(TEMPLATE_TOKENS.get(args.template, []), special_tokens=True)
        has_begin = common.Prompts(tokenizer, is_raw=True).begin
        begin = "{{ bos_token }}" if has_begin else ""
        tokenizer.chat_template = TEMPLATES[args.template].replace("{bos}", begin)


def open_prompts(args, source, tokenizer, problems):
    """common.Prompts of the tokenizer, to which the flags add tokens and a template; or None."""
    n_tokens = len(tokenizer)
    for name in ("pad_token", "eos_token", "sep_token"):
        token = getattr(args, name)
        if token:
            tokenizer.add_special_tokens({name: token})
    if not tokenizer.eos_token:
        problems.append(f"{source}: the tokenizer has no end token: --eos_token")
        return None
    if not tokenizer.pad_token:  # padding is never looked at
        tokenizer.pad_token = tokenizer.eos_token
    set_template(args, tokenizer)
    is_fixed = args.no_train or args.lora_rank or args.train_adapter or common.adapter_base(source)
    if is_fixed and len(tokenizer) > n_tokens:
        new = tokenizer.convert_ids_to_tokens(range(n_tokens, len(tokenizer)))
        problems.append(
            f"{source} lacks the tokens {' '.join(new)}, which only training of all weights adds: "
            "--template alpaca, --template plain or --raw_prompt needs none"
        )
    try:
        return common.Prompts(tokenizer, args.raw_prompt)
    except ValueError as error:
        problems.append(f"{source}: {error}; choose another --template")
        return None


# ------------------------------------------------------------------------------------------- data

# a conversation, or one prompt and one completion. text: all of it, which begins with the prompt;
# replies: (start, end) of what is trained, in characters. Raw text: replies None, text is what
# follows the prompt. where: in which file
Document = collections.namedtuple("Document", "where prompt text replies")

# documents: training draws one of them per epoch, evaluation takes the first; messages: of the
# first; key: its prompt, by which it is held out; references: texts of which the best counts;
# record: as in the file
Example = collections.namedtuple("Example", "data_set key messages documents references record")

# rows: {split: Rows}; examples: {split: [Example]} to evaluate; sizes, amounts: of the training
# part of each data set, see common.Order
Data = collections.namedtuple("Data", "rows examples sizes amounts sha256")


def message(role, content):
    return {"role": role, "content": content}


def texts_of(record, name):
    """The text of a key, or its texts, as a list. Raises ValueError."""
    texts = record.get(name)
    if not isinstance(texts, list):
        texts = [texts]
    if not texts:
        raise ValueError(f"{name!r} is an empty list")
    for text in texts:
        problem = common.text_problem(text, name, record)
        if problem:
            raise ValueError(problem)
    return texts


def to_conversations(args, record):
    """[[message]] of a record: one for each of its prompts and completions."""
    if "messages" in record or "conversations" in record:
        messages = common.Prompts.messages(record)
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()  # nobody has answered
        return [messages]
    if "instruction" in record:  # Alpaca's names
        questions = texts_of(record, "instruction")
        answers = texts_of(record, "output")
        if record.get("input"):
            separator = "\n\n### Input:\n" if args.template == "alpaca" else "\n\n"
            contexts = texts_of(record, "input")
            pairs = itertools.product(questions, contexts)
            questions = [separator.join(pair) for pair in pairs]
    elif "text" in record and "prompt" not in record:
        return [[message("text", text)] for text in texts_of(record, "text")]
    else:
        questions = texts_of(record, "prompt")
        answers = texts_of(record, "completion")
    conversations = []
    for question in questions:
        for answer in answers:
            conversations.append([message("user", question), message("assistant", answer)])
    return conversations


def to_document(args, prompts, messages, where):
    """The Document of a conversation that ends with the assistant, or of a plain text."""
    if not messages:
        raise ValueError("no message of the role 'assistant'")
    if messages[0]["role"] == "text":
        return Document(where, "", messages[0]["content"], None)
    if prompts.is_raw:
        if len(messages) != 2:
            raise ValueError("--raw_prompt takes prompt and completion, or text")
        prompt, completion = [turn["content"] for turn in messages]
        return Document(where, prompt, completion, None)
    text = prompts.render(messages)
    replies = []
    turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    for i in turns[-1:] if args.targets == "last" else turns:
        prompt = prompts.render(messages[:i], reply_follows=True)
        turn = prompts.render(messages[: i + 1])
        end = turn.rfind(prompts.end_token) + len(prompts.end_token)
        if not turn.startswith(prompt) or end <= len(prompt) or not text.startswith(turn[:end]):
            raise ValueError(UNLIKE_A_CHAT)
        if messages[i].get("weight", 1):
            replies.append((len(prompt), end))
    return Document(where, prompt, text, replies)


def to_example(args, prompts, data_set, record, where):
    """The Example of a record of a data file. Raises ValueError, which says what is wrong."""
    conversations = to_conversations(args, record)
    documents = [to_document(args, prompts, messages, where) for messages in conversations]
    references = [messages[-1]["content"] for messages in conversations]
    if "references" in record:
        references = texts_of(record, "references")
    key = documents[0].prompt or documents[0].text
    return Example(data_set, key, conversations[0], documents, references, record)


def read_examples(args, prompts, problems):
    """({split: [Example]} of all data sets of --data, {name: amount of it in an epoch})"""
    examples = {split: [] for split in SPLITS}
    records, amounts = common.read_data_sets(args, problems)
    for data_set, where, split, record in records:
        try:
            example = to_example(args, prompts, data_set, record, where)
        except ValueError as error:
            problems.append((where, str(error)))
            continue
        if split == "train" and common.is_held_out(args, example.key):
            split = "eval"
        examples[split].append(example)
    return examples, amounts


def find_labels(document, input_ids, offsets):
    """(n,) ids of the tokens that begin in a reply, else IGNORED. offsets: (start, end) of each
    token, in characters."""
    starts = np.array(offsets)[:, 0]
    labels = np.full(len(input_ids), IGNORED)
    for start, end in document.replies:
        is_target = (starts >= start) & (starts < end)
        labels[is_target] = np.array(input_ids)[is_target]
    return labels


def tokenize_block(documents, args, prompts, problems):
    """[(input_ids, labels, (tokens of the prompt, targets, tokens))], cut to --max_length."""
    tokenizer = prompts.tokenizer
    prompt_texts = [document.prompt for document in documents]
    prompt_rows = tokenizer(prompt_texts, add_special_tokens=False).input_ids
    texts = [document.text for document in documents]
    encoding = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    rows = []
    columns = zip(documents, prompt_rows, encoding.input_ids, encoding.offset_mapping)
    for document, prompt_ids, input_ids, offsets in columns:
        if document.replies is None:
            prompt_ids = prompts.begin + prompt_ids
            reply_ids = [*input_ids, tokenizer.eos_token_id]
            input_ids = prompt_ids + reply_ids
            labels = np.array([IGNORED] * len(prompt_ids) + reply_ids)
        elif input_ids[: len(prompt_ids)] != prompt_ids:
            problems.append((document.where, UNLIKE_A_CHAT))
            continue
        else:
            labels = find_labels(document, input_ids, offsets)
        if args.targets == "all":
            labels = np.array(input_ids)
        labels[0] = IGNORED  # nothing predicts it
        labels = labels[: args.max_length]
        # nothing to answer: a plain text, or one that has lost its reply
        can_ask = document.prompt and len(prompt_ids) < len(labels)
        n_targets = np.count_nonzero(labels != IGNORED)
        counts = (len(prompt_ids) if can_ask else 0, n_targets, len(input_ids))
        rows.append((np.array(input_ids[: args.max_length]), labels, counts))
    return rows


def tokenize(examples, args, prompts):
    """{name: array}, as Rows reads them, of {split: [Example]}."""
    arrays = {}
    problems = []
    for split in SPLITS:
        documents, choices, rows = [], [], []
        for example in examples[split]:
            documents += example.documents
            choices.append(len(example.documents))
        blocks = range(0, len(documents), 1000)
        for start in common.progress(blocks, "tokenising"):
            block = documents[start : start + 1000]
            rows += tokenize_block(block, args, prompts, problems)
        input_ids, labels, counts = zip(*rows) if rows else ([], [], [])
        arrays[f"{split}_choices"] = np.array(choices, np.int64)
        arrays[f"{split}_counts"] = np.array(counts, np.int64).reshape(-1, 3)
        arrays.update(common.Ragged.arrays(f"{split}_input_ids", input_ids))
        arrays.update(common.Ragged.arrays(f"{split}_labels", labels))
    _, n_targets, n_tokens = np.concatenate([arrays[f"{split}_counts"] for split in SPLITS]).T
    n_lost = np.count_nonzero(n_targets == 0)
    n_cut = np.count_nonzero(n_tokens > args.max_length)
    cut = f"{n_cut} of {len(n_tokens)} examples are cut to --max_length {args.max_length}"
    if n_lost > MAX_LOST * len(n_tokens):
        lost = f"{n_lost} of {len(n_tokens)} examples have no target token"
        problems.append(f"{lost}: their replies have weight 0, or {cut}")
    if problems:
        common.fail(problems, only_here=True)
    if n_cut or n_lost:
        log(f"WARNING {cut}; {n_lost} have no target and teach nothing")
    return arrays


class Rows:
    """The tokenised documents of a split; an example has one or more."""

    def __init__(self, split, arrays):
        self.input_ids = common.Ragged(f"{split}_input_ids", arrays)
        self.labels = common.Ragged(f"{split}_labels", arrays)  # of its own tokens, not shifted
        self.counts = arrays[f"{split}_counts"]  # (documents, 3), see tokenize_block
        self.choices = arrays[f"{split}_choices"]  # (examples,), how many documents
        self.choose(0)

    def start_epoch(self, seed, epoch):
        """Draw one document of every example."""
        rng = np.random.default_rng([3, seed, epoch])
        self.choose(rng.integers(2**31, size=self.choices.shape))

    def choose(self, draws):
        """draws: (examples,), or 0. Sets .lengths: (examples, 2), tokens and targets."""
        offsets = np.cumsum(self.choices) - self.choices
        self.chosen = offsets + draws % self.choices
        n_tokens = self.input_ids.lengths[self.chosen]
        self.lengths = np.stack([n_tokens, self.counts[self.chosen, 1]], axis=1)

    def fetch(self, ids):
        """({example: input_ids}, {example: labels})"""
        input_ids, labels = {}, {}
        for i in ids:
            input_ids[i] = self.input_ids[self.chosen[i]]
            labels[i] = self.labels[self.chosen[i]]
        return input_ids, labels

    def question(self, i):
        """The ids before the last reply; none of a plain text."""
        return self.input_ids[self.chosen[i]][: self.counts[self.chosen[i], 0]]


def load_records(args, prompts, problems):
    """Collective. Data of --data: every process reads the texts, one of each node tokenises."""
    if prompts is None:  # without a model there is no template
        return None
    examples, amounts = read_examples(args, prompts, problems)
    sizes = [] if problems else common.check_examples(args, examples, amounts, problems)
    if problems:
        return None
    build = functools.partial(tokenize, examples, args, prompts)
    arrays = common.on_one_process(build)
    rows = {split: Rows(split, arrays) for split in SPLITS}
    del examples["train"]  # from here on its token ids are enough
    return Data(rows, examples, sizes, list(amounts.values()), common.sha256_of(arrays))


# ------------------------------------------------------------------------------- rows and batches


def pack(ids, lengths, d_model):
    """Rows of example numbers that cost little to compute, one or several examples each.

    Cost of R rows of S tokens: R S (1 + S / 4 d_model), the second part being attention.
    lengths: (examples,).
    """
    longest_first = ids[np.argsort(-lengths[ids], kind="stable")]
    best_cost = math.inf
    best_rows = []
    for per_row in EXAMPLES_PER_ROW:
        n_rows = math.ceil(len(ids) / per_row)
        rows = [[] for _ in range(n_rows)]
        filled = np.zeros(n_rows)
        for i in longest_first:
            emptiest = int(filled.argmin())
            rows[emptiest].append(int(i))
            filled[emptiest] += lengths[i]
        row_length = filled.max()
        cost = n_rows * row_length * (1 + row_length / (4 * d_model))
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


def collate(rows, input_ids, labels, pad_id):
    """Rows of example numbers -> tensors; input_ids, labels: {example: (n,)}.

    input_ids (R, S); position_ids (R, S), where a row has several examples: they restart with each.
    labels, label_example (N,) and label_index (N,): where in the flattened (R x S) states a label
    is predicted.
    The shift happens here and only here: position t reads token t and predicts token t + 1.
    """
    columns = collections.defaultdict(list)
    for row in rows or [[]]:  # a rank without examples computes one padding token along
        lengths = [len(input_ids[i]) for i in row]
        shifted = [np.append(labels[i][1:], IGNORED) for i in row]
        columns["input_ids"].append(flat([input_ids[i] for i in row]))
        columns["position_ids"].append(flat([np.arange(length) for length in lengths]))
        columns["labels"].append(flat(shifted))
        columns["example"].append(np.repeat(row, lengths))
    padded_labels = pad(columns["labels"], IGNORED).flatten()
    label_index = np.flatnonzero(padded_labels != IGNORED)
    arrays = {
        "input_ids": pad(columns["input_ids"], pad_id),
        "labels": padded_labels[label_index],
        "label_example": pad(columns["example"], 0).flatten()[label_index],
        "label_index": label_index,
    }
    if max(map(len, rows), default=0) > 1:
        arrays["position_ids"] = pad(columns["position_ids"], 0)
    return common.to_tensors(arrays)


def count_chunks(n_targets, config):
    """Chunks into which the targets are cut, so that about MAX_LOGITS logits exist at once."""
    return max(1, math.ceil(n_targets * config.get_text_config().vocab_size / MAX_LOGITS))


class TrainingData:
    """The forward steps of optimizer step k on this rank, a function of (seed, k) and layout."""

    def __init__(self, args, data, config, pad_id):
        self.args = args
        self.config = config
        self.pad_id = pad_id
        self.is_packed = False  # main finds out whether the model can
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
        n_tokens, n_targets = self.rows.lengths.T
        ids = self.order.step_ids(step, self.rows.lengths[:, [0, 0]])
        world = common.world_size()
        n_pieces = world * self.args.gradient_accumulation_steps
        pieces = common.deal(ids, n_tokens, n_pieces)
        mine = pieces[common.rank() :: world]  # what the ranks compute at once is of like size
        batches = [self.make_batch(piece) for piece in mine]
        n_computed = sum(batch["input_ids"].numel() for batch in batches)
        padding_share = 1 - float(n_tokens[np.concatenate(mine)].sum()) / n_computed
        return batches, max(1, int(n_targets[ids].sum())), padding_share

    def make_batch(self, ids):
        rows = [[i] for i in ids.tolist()]
        if self.is_packed and rows:
            rows = pack(ids, self.rows.lengths[:, 0], self.config.get_text_config().hidden_size)
        return collate(rows, *self.rows.fetch(ids.tolist()), self.pad_id)


# --------------------------------------------------------------------------------- model and loss


class TargetLosses(torch.nn.Module):
    """What the engine wraps: forward(batch) -> (N,) fp32 loss of every target token; without
    gradients (2, N), with whether it is the likeliest. No logits where there is no target."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, n_chunks=1):
        states = self.states(batch)
        loss_function = self.losses
        if n_chunks > 1 and torch.is_grad_enabled():  # logits are recomputed in the backward pass
            loss_function = functools.partial(checkpoint, self.losses, use_reentrant=False)
        state_chunks = states.tensor_split(n_chunks)
        label_chunks = batch["labels"].tensor_split(n_chunks)
        losses = map(loss_function, state_chunks, label_chunks)
        return torch.cat(list(losses), dim=-1)

    def losses(self, states, labels):
        """(n, D) states and (n,) labels -> (n,) losses; to evaluate (2, n)"""
        logits = self.logits(states)
        losses = F.cross_entropy(logits, labels, reduction="none")
        if torch.is_grad_enabled():
            return losses
        is_likeliest = logits.argmax(dim=1) == labels
        return torch.stack([losses, is_likeliest.float()])

    def logits(self, states):
        """(n, V) fp32 of (n, D), with what a few families do behind their head."""
        logits = self.model.get_output_embeddings()(states).float()
        config = self.model.config
        logits = logits / getattr(config, "logits_scaling", 1)  # Granite
        if getattr(config, "logit_scale", None):  # Cohere
            logits = logits * config.logit_scale
        if getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / config.final_logit_softcapping)
            logits = logits * config.final_logit_softcapping
        return logits

    def states(self, batch):
        """(N, D). transformers makes the mask of packed rows from positions that restart. Padding
        needs none: it comes last, and no token sees what follows it."""
        options = {}
        if "position_ids" in batch:
            options["position_ids"] = batch["position_ids"]
        output = self.model.base_model(input_ids=batch["input_ids"], use_cache=False, **options)
        return output.last_hidden_state.flatten(0, 1)[batch["label_index"]]


@torch.no_grad()
def can_pack(args, engine, pad_id):
    """Collective. Whether rows may hold several examples: not in a family that lets one see the
    other, or that counts positions on. Fails where our logits are not the model's own."""
    model = engine.module.model
    tolerance = 1e-3 if args.precision == "fp32" else 0.05
    n_rows = model.config.get_text_config().vocab_size
    first, second = np.random.default_rng(0).integers(n_rows, size=(2, 20))
    examples = {0: first, 1: second, 2: first[::-1]}
    n_targets = len(second) - 1

    def losses(row):
        """Of example 1, the last of the row."""
        batch = collate([row], examples, examples, pad_id)
        return engine(common.to_device(batch, engine.device))[0, -n_targets:]

    engine.eval()
    alone = losses([1])
    input_ids = torch.as_tensor(examples[1], device=engine.device)
    logits = model(input_ids=input_ids[None], use_cache=False).logits[0].float()
    expected = F.cross_entropy(logits[:-1], input_ids[1:], reduction="none")
    if not torch.allclose(alone, expected, tolerance, tolerance):
        common.fail(f"{model.config.model_type}: this family changes its logits in another way")
    is_packed = "position_ids" in inspect.signature(model.base_model.forward).parameters
    if is_packed:
        packed = losses([0, 1])
        is_apart = torch.allclose(packed, losses([2, 1]), tolerance / 1000, tolerance / 1000)
        is_packed = is_apart and torch.allclose(packed, alone, tolerance, tolerance)
    engine.train()
    return is_packed


# ------------------------------------------------------------------------------------- evaluation


def exact_match(answer, reference):
    return float(answer.strip() == reference.strip())


def generation_settings(args, prompts):
    """Made anew: nothing is inherited from the generation_config.json of a model."""
    sampling = {}
    if args.temperature > GREEDY:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0}
    return GenerationConfig(
        num_return_sequences=args.n_samples,
        num_beams=1,
        pad_token_id=prompts.tokenizer.pad_token_id,
        eos_token_id=prompts.stop_ids,
        **sampling,
    )


def generate(args, engine, prompts, rows, asked):
    """Collective. {example: [answers]} of this rank's share of the examples `asked`."""
    answers = {}
    n = args.n_samples
    settings = generation_settings(args, prompts)
    n_positions = common.count_positions(engine.module.model.config)
    batch_size = max(1, args.eval_batch_size // n)
    questions = [rows.question(i).tolist() for i in asked]
    with common.generating(engine, settings) as model:
        for places in common.my_batches([len(ids) for ids in questions], batch_size):
            if not places:
                continue
            ids = [asked[k] for k in places]
            # the mask is made of lengths: padding may have the id of the end token
            batch = prompts.tokenizer.pad(
                {"input_ids": [questions[k] for k in places]},
                padding_side="left",
                return_tensors="pt",
            )
            longest = batch["input_ids"].shape[1]
            settings.max_new_tokens = min(args.max_new_tokens, n_positions - longest)
            # a batch is the same for any number of ranks, and so are its samples
            torch.manual_seed(common.derive_seed(args.seed, "sample", ids))
            output_ids = model.generate(**batch.to(engine.device))[:, longest:].tolist()
            for k, i in enumerate(ids):
                samples = output_ids[k * n : k * n + n]
                answers[i] = [prompts.decode(sample) for sample in samples]
    return answers


@torch.no_grad()
def row_losses(args, engine, rows, pad_id):
    """Collective. {example: (summed loss, right tokens, target tokens)} of Rows."""
    config = engine.module.model.config
    lengths = rows.lengths
    n_chunks = count_chunks(lengths[:, 1].max() * args.eval_batch_size, config)
    sums = {}
    of_example = torch.zeros(2, len(lengths), dtype=torch.float64)
    engine.eval()
    for ids in common.my_batches(lengths[:, 0], args.eval_batch_size):
        batch = collate([[i] for i in ids], *rows.fetch(ids), pad_id)
        losses = engine(common.to_device(batch, engine.device), n_chunks)  # (2, N)
        of_example.index_add_(1, batch["label_example"], losses.double().cpu())
        for i in ids:
            sums[i] = (*of_example[:, i].tolist(), int(lengths[i, 1]))
    engine.train()
    return common.gather(sums)


def mean_losses(sums, ids):
    loss, n_right, n_tokens = np.array([sums[i] for i in ids]).sum(axis=0)
    if n_tokens == 0:  # all of them have lost their targets
        return {}
    return {"loss": loss / n_tokens, "token_accuracy": n_right / n_tokens}


def write_predictions(args, examples, answers, split, run):
    predictions = []
    for i in sorted(answers):
        example = examples[i]
        *question, reply = example.messages
        if args.raw_prompt:
            question = question[0]["content"]
        predictions.append(
            {
                "prompt": question,
                "demonstration": reply["content"],
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


def evaluate(args, engine, prompts, data, split, run):
    """Collective. Loss over all examples of `split`, each counted once; exact match of the answers
    to --n_generate of each data set; the predictions file."""
    rows = data.rows[split]
    examples = data.examples[split]
    sums = row_losses(args, engine, rows, prompts.tokenizer.pad_token_id)
    groups = collections.defaultdict(list)
    for i, example in enumerate(examples):
        groups[f"{example.data_set}/"].append(i)
    asked = []
    for ids in groups.values():
        asked += [i for i in ids if len(rows.question(i))][: args.n_generate]
    answers = common.gather(generate(args, engine, prompts, rows, asked))
    scores = {}
    for i in asked:
        scores[i] = max(exact_match(answers[i][0], text) for text in examples[i].references)
    if len(data.sizes) == 1:
        groups.clear()
    groups[""] = range(len(examples))
    metrics = {}
    for prefix, ids in groups.items():
        for name, value in mean_losses(sums, ids).items():
            metrics[prefix + name] = value
        group_scores = [scores[i] for i in ids if i in scores]
        if group_scores:
            metrics[f"{prefix}exact_match"] = float(np.mean(group_scores))
    if common.rank() == 0:
        write_predictions(args, examples, answers, split, run)
    return metrics


# --------------------------------------------------------------------------------------- training


def check_args(args, problems):
    common.check_shared_args(args, POSITIVE_FLAGS, problems)
    if args.temperature <= GREEDY and args.n_samples > 1:
        problems.append("--n_samples: greedy decoding gives the same each time: --temperature 0.8")


def check_lengths(args, source, config, data, problems):
    n_positions = common.count_positions(config)
    longest = max(data.rows[split].input_ids.lengths.max(initial=0) for split in SPLITS)
    if longest > n_positions:
        problems.append(
            f"--max_length {args.max_length}: there are examples of {longest} tokens, and "
            f"{source} has {n_positions} positions"
        )


def prepare(args):
    """All that can be wrong, found and reported together before any weight is loaded."""
    problems = []
    ds_config = prompts = None
    check_args(args, problems)
    source, config, tokenizer = common.open_model(args, problems)
    if config and config.is_encoder_decoder:
        problems.append(f"{source} is a {config.model_type}: no decoder-only model, see seq2seq.py")
    elif config:
        ds_config = common.make_ds_config(args, AutoModelForCausalLM, config, problems)
        prompts = open_prompts(args, source, tokenizer, problems)
    data = load_records(args, prompts, problems)
    if data:
        check_lengths(args, source, config, data, problems)
    run = common.Run(args, FREE_FLAGS, ds_config, data and data.sha256, problems)
    if problems:
        common.fail(problems)
    return source, config, ds_config, prompts, data, run


def main(args):
    # 1 data and model
    device = common.setup_distributed(args)
    rank = common.rank()
    world = common.world_size()
    source, config, ds_config, prompts, data, run = prepare(args)
    tokenizer = prompts.tokenizer
    train_data = TrainingData(args, data, config, tokenizer.pad_token_id)
    n_chunks = train_data.n_chunks
    steps_per_epoch = train_data.order.steps_per_epoch
    max_steps = args.max_steps or math.ceil(args.num_epochs * steps_per_epoch)
    run.start(__file__, max_steps, steps_per_epoch)
    model = common.load_model(AutoModelForCausalLM, source, config, args, ds_config, tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=prompts.stop_ids)  # is exported

    # 2 engine
    optimizer = None if args.no_train else common.make_adamw(model, args)
    engine, *_ = deepspeed.initialize(
        model=TargetLosses(model), optimizer=optimizer, config=ds_config
    )
    train_data.is_packed = can_pack(args, engine, tokenizer.pad_token_id)
    if not train_data.is_packed:
        log("WARNING this family would mix the examples of a row: one example per row")
    run.resume(engine)
    log(f"template {args.template}, replies end with {prompts.end_token!r}")

    def evaluation(split):
        return evaluate(args, engine, prompts, data, split, run)

    if args.no_train:
        for split in ("eval", "test"):
            if len(data.rows[split].lengths):
                run.log(split, evaluation(split))
        log(f"{run.dir} has the predictions")
        return 0
    about = {
        "format": 1,
        "script": "sft_causal.py",
        "task": "chat",
        "family": "causal",
        "template": args.template,
        "end_token": prompts.end_token,
        "stop_ids": prompts.stop_ids,
        "raw_prompt": args.raw_prompt,
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
