"""Rows that are decoded together, a token a step. Rows join and leave between two steps.

    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]  # one a row
    decoding = Decoding(model)
    logits = decoding.read([[5, 8, 13], [7, 2]])  # two rows join: (2, V)
    tokens = choose(logits / temperature, generators)  # (2,)
    logits = decoding.step(tokens[:, None])  # (2, V)
    decoding.keep(torch.tensor([1]))  # the first row leaves

A row's generator draws once a token, so that its text depends on its own seed alone. The
log-probability of what was chosen is torch.log_softmax(logits / temperature, dim=1) at tokens;
what cuts a distribution, such as top_k, sets scores to -inf before choose.

A step appends a column to the cache of all rows, so all rows end at the same column. A decoder's
rows are therefore padded on the left, behind a mask, and count their positions from their first
token. The output of an encoder does not grow: it is padded on the right, as in training.

Where decoding.can_join is False the decoder counts padding, as BART's does. Then all rows must
begin together, and those of a decoder-only model must be equally long.

Shapes: B rows, n rows that join, T tokens in the cache, t tokens of a step, S source tokens,
D hidden, V vocabulary.
"""

import inspect

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

GREEDY = 0.001  # the highest temperature that means: take the likeliest token
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def collate(prompts, side, device):
    """input_ids and attention_mask, both (n, longest prompt), of lists of token ids."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    masks = [torch.ones_like(row) for row in rows]
    input_ids = pad_sequence(rows, batch_first=True, padding_side=side)
    attention_mask = pad_sequence(masks, batch_first=True, padding_side=side)
    return input_ids.to(device), attention_mask.to(device)


def stack(old, new, side, dim):
    """The rows of both tensors, (B + n, ...). The one that is shorter in dimension `dim` gets zeros
    on one side; masks hide them."""
    length = max(old.shape[dim], new.shape[dim])
    padded = []
    for tensor in (old, new):
        shape = list(tensor.shape)
        shape[dim] = length - shape[dim]
        zeros = tensor.new_zeros(shape)
        halves = [zeros, tensor] if side == "left" else [tensor, zeros]
        padded.append(torch.cat(halves, dim))
    return torch.cat(padded)


def stack_caches(old, new, side):
    """Append the rows of the cache `new` to `old`, in place."""
    for old_layer, new_layer in zip(old.layers, new.layers):  # (B, heads, T or S, head size)
        old_layer.keys = stack(old_layer.keys, new_layer.keys, side, 2)
        old_layer.values = stack(old_layer.values, new_layer.values, side, 2)


class Decoding:
    """The rows of one model, decoder-only or encoder-decoder. Call it without gradients."""

    def __init__(self, model):
        config = model.config
        layer_types = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
        if model._is_stateful or set(layer_types) - ATTENTION:
            raise ValueError(f"a {config.model_type} keeps more than keys and values")
        parameters = inspect.signature(model.forward).parameters
        self.model = model
        self.is_encoder_decoder = config.is_encoder_decoder
        self.takes_position_ids = "position_ids" in parameters
        # T5's kin and ALiBi know only distances between tokens
        is_relative = hasattr(config, "relative_attention_num_buckets")
        is_relative = is_relative or config.model_type in ("bloom", "mpt")
        self.can_join = self.takes_position_ids or is_relative
        self.attention_mask = None  # (B, T), of the decoder; None without rows
        self.cache = None  # of the decoder's self-attention
        self.cross_cache = None
        self.encoder_hidden_states = None  # (B, S, D)
        self.encoder_attention_mask = None  # (B, S)

    def read(self, prompts):
        """Rows join: lists of token ids. Returns the logits (n, V) behind each of them."""
        # computed apart: beside a long prompt, each running row would be padded to its length
        new = Decoding(self.model)
        # made without the config: layers with a sliding window then keep all columns too
        new.cache = DynamicCache()
        if self.is_encoder_decoder:
            input_ids = new.read_source(prompts)
        else:
            if not self.can_join and len({len(prompt) for prompt in prompts}) > 1:
                raise ValueError("this family counts padding: prompts of one length at a time")
            input_ids, new.attention_mask = collate(prompts, "left", self.model.device)
        logits = new.next_logits(input_ids)
        self.join(new)
        return logits

    def read_source(self, prompts):
        """Run the encoder; returns the decoder's input_ids (n, 1), its start tokens."""
        input_ids, attention_mask = collate(prompts, "right", self.model.device)
        outputs = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        self.encoder_hidden_states = outputs.last_hidden_state
        self.encoder_attention_mask = attention_mask
        self.cross_cache = DynamicCache()
        start_id = self.model.config.decoder_start_token_id
        decoder_input_ids = torch.full_like(input_ids[:, :1], start_id)
        self.attention_mask = torch.ones_like(decoder_input_ids)
        return decoder_input_ids

    def join(self, new):
        """Append the rows of another Decoding."""
        if self.attention_mask is None:
            self.cache = new.cache
            self.cross_cache = new.cross_cache
            self.attention_mask = new.attention_mask
            self.encoder_hidden_states = new.encoder_hidden_states
            self.encoder_attention_mask = new.encoder_attention_mask
            return
        stack_caches(self.cache, new.cache, "left")
        self.attention_mask = stack(self.attention_mask, new.attention_mask, "left", 1)
        if self.is_encoder_decoder:
            stack_caches(self.cross_cache, new.cross_cache, "right")
            self.encoder_hidden_states = stack(
                self.encoder_hidden_states, new.encoder_hidden_states, "right", 1
            )
            self.encoder_attention_mask = stack(
                self.encoder_attention_mask, new.encoder_attention_mask, "right", 1
            )

    def step(self, input_ids):
        """Append input_ids (B, t) to the rows. Returns the logits (B, V) behind them."""
        new_columns = torch.ones_like(input_ids)
        self.attention_mask = torch.cat([self.attention_mask, new_columns], dim=1)
        return self.next_logits(input_ids)

    def next_logits(self, input_ids):
        """The logits (B, V) behind input_ids (B, t), whose columns attention_mask already has."""
        if self.is_encoder_decoder:
            inputs = self.encoder_decoder_inputs(input_ids)
        else:
            inputs = self.decoder_only_inputs(input_ids)
        outputs = self.model(**inputs, use_cache=True)
        last_logits = outputs.logits[:, -1]
        return last_logits.float()  # bfloat16 is too coarse for sampling and log_probs

    def encoder_decoder_inputs(self, decoder_input_ids):
        """Of model.forward; here attention_mask means the encoder's."""
        return {
            # given, so that the encoder does not run again in every step
            "encoder_outputs": BaseModelOutput(self.encoder_hidden_states),
            "attention_mask": self.encoder_attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": self.attention_mask,
            "past_key_values": EncoderDecoderCache(self.cache, self.cross_cache),
        }

    def decoder_only_inputs(self, input_ids):
        """Of model.forward."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": self.attention_mask,
            "past_key_values": self.cache,
            "logits_to_keep": 1,  # those of a whole prompt would be (n, T, V)
        }
        if self.takes_position_ids:
            position_ids = self.attention_mask.cumsum(dim=1) - 1  # (B, T)
            position_ids = position_ids.clamp(min=0)  # padding has none, but needs a valid one
            inputs["position_ids"] = position_ids[:, -input_ids.shape[1] :]
        return inputs

    def keep(self, rows):
        """Only these rows go on; rows: a tensor of their numbers, in the new order."""
        if len(rows) == 0:
            self.attention_mask = self.cache = self.cross_cache = None
            return
        self.attention_mask = self.attention_mask[rows]
        self.cache.batch_select_indices(rows)
        if self.is_encoder_decoder:
            self.cross_cache.batch_select_indices(rows)
            self.encoder_hidden_states = self.encoder_hidden_states[rows]
            self.encoder_attention_mask = self.encoder_attention_mask[rows]
        # columns that only those which left have used; or the cache of a busy server would grow
        n_unused = int(self.attention_mask.argmax(dim=1).min())
        self.attention_mask = self.attention_mask[:, n_unused:]
        for layer in self.cache.layers:
            layer.keys = layer.keys[:, :, n_unused:]
            layer.values = layer.values[:, :, n_unused:]


def choose(scores, generators):
    """A token for each row, (B,), drawn from softmax(scores), (B, V), with the noise of the row's
    generator; the likeliest where that is None. The argmax of log p + Gumbel noise is a draw from p
    (Maddison et al. 2014); torch.multinomial has one noise for the whole batch."""
    noisy = scores.clone()
    for row, generator in zip(noisy, generators):
        if generator is not None:
            uniform = torch.rand(len(row), generator=generator, device=row.device)
            row -= torch.log(-torch.log(uniform))
    return noisy.argmax(dim=1)
