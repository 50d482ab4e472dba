"""LoRA and bottleneck adapters, also over a base in 4 or 8 bits; LoRA in PEFT's format.

python adapters.py models/my-lora-run models/merged      # base and LoRA as one plain model
"""

import hashlib
import json
import logging
import pathlib
import sys

import common  # first: it prepares the import of DeepSpeed

# isort: split
import safetensors.torch
import torch
from transformers.pytorch_utils import Conv1D

# ends of layer names in the families that we know: T5; Llama and its kin, OPT, BART; GPT-2; NeoX
ATTENTION = ("q", "k", "v", "q_proj", "k_proj", "v_proj", "c_attn", "query_key_value")
BOTTLENECKS = {  # behind self-attention and behind the feed-forward network
    "mh_adapter": (
        *("SelfAttention.o", "self_attn.o_proj", "self_attn.out_proj"),
        *("attn.c_proj", "attention.out_proj", "attention.dense"),
    ),
    "output_adapter": (
        *("DenseReluDense.wo", "mlp.down_proj", "fc2", "mlp.c_proj", "mlp.dense_4h_to_h"),
    ),
}
NOT_READ = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")


def ends_with(path, names):
    return f".{path}".endswith(tuple(f".{name}" for name in names))


def sizes(linear):
    """(n_in, n_out); GPT-2's Conv1D holds its weight transposed."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return linear.in_features, linear.out_features


def new_linear(n_in, n_out, like, dtype, seed=None, bias=False):
    """Of zeros, or with torch's (and PEFT's) start from a seed of its own: the same beside any
    other layers, on every rank and at every stage."""
    torch.manual_seed(seed or 0)
    linear = torch.nn.Linear(n_in, n_out, bias, device=like.weight.device, dtype=dtype)
    if seed is None:
        for weight in linear.parameters():
            weight.data.zero_()
    return linear


class LoraLinear(torch.nn.Module):
    """y = base(x) + scale B A dropout(x) (Hu et al. 2021); B starts with zeros."""

    def __init__(self, base_layer, rank, scale, dropout, dtype, seed):
        super().__init__()
        n_in, n_out = sizes(base_layer)
        self.base_layer = base_layer
        self.scale = scale
        self.dropout = torch.nn.Dropout(dropout)
        self.lora_A = new_linear(n_in, rank, base_layer, dtype, seed)
        self.lora_B = new_linear(rank, n_out, base_layer, dtype)

    @property
    def weight(self):  # T5's feed-forward asks for its dtype
        return self.lora_A.weight

    def forward(self, x):
        y = self.base_layer(x)
        x = self.dropout(x.to(self.weight.dtype))
        update = self.scale * self.lora_B(self.lora_A(x))
        return y + update.to(y.dtype)


class BottleneckLinear(torch.nn.Module):
    """h + up(relu(down(dropout(h)))), h = base(x) (Houlsby et al. 2019); up starts with zeros."""

    def __init__(self, base_layer, part, reduction_factor, dropout, dtype, seed):
        super().__init__()
        _, n_out = sizes(base_layer)
        width = max(1, n_out // reduction_factor)
        self.base_layer = base_layer
        layers = {
            "dropout": torch.nn.Dropout(dropout),
            "down": new_linear(n_out, width, base_layer, dtype, seed, bias=True),
            "up": new_linear(width, n_out, base_layer, dtype, bias=True),
        }
        self.part = part  # which gives the weights their names in the file
        self.add_module(part, torch.nn.ModuleDict(layers))

    @property
    def weight(self):  # T5's feed-forward asks for its dtype
        return getattr(self, self.part)["down"].weight

    def forward(self, x):
        layers = getattr(self, self.part)
        h = self.base_layer(x)
        inner = layers["down"](layers["dropout"](h.to(self.weight.dtype))).relu()
        return h + layers["up"](inner).to(h.dtype)


def quantized(linear, kind, dtype):
    """A linear layer with its weight in 4 (nf4) or 8 bits (int8), by bitsandbytes."""
    import bitsandbytes as bnb  # optional package

    logging.getLogger("bitsandbytes").setLevel("ERROR")  # int8 tells of a cast at every call
    weight = linear.weight.data
    if isinstance(linear, Conv1D):
        weight = weight.T.contiguous()
    shape = (*sizes(linear), linear.bias is not None)
    if kind == "nf4":  # Dettmers et al. 2023, with double quantisation
        # stored as dtype: T5 casts its states to a weight's, and would cast them to uint8
        options = {"quant_type": "nf4", "quant_storage": dtype}
        new = bnb.nn.Linear4bit(*shape, dtype, **options)
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options)
    else:
        new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    new.bias = linear.bias
    # on some CPUs evaluation would repack the weights, and training go on with noise
    new.support_avx512bf16_for_cpu = False
    # the move to a device is what quantises
    return new.to("cuda" if torch.cuda.is_available() else "cpu")


def sha256_of_weights(folder):
    """Of a folder, so that nobody takes an adapter for that of other weights; None of a hub id."""
    digest = hashlib.sha256()
    paths = sorted(pathlib.Path(folder).glob("*.safetensors"))
    for path in paths:
        digest.update(hashlib.file_digest(path.open("rb"), "sha256").hexdigest().encode())
    return digest.hexdigest() if paths else None


class Adapter:
    """An adapter and its place in a model. config: what its folder says besides the weights."""

    FILES = {
        # configuration, weights, and what PEFT puts before their names
        "lora": ("adapter_config.json", "adapter_model.safetensors", "base_model.model."),
        "bottleneck": ("bottleneck_config.json", "bottleneck.safetensors", ""),
    }

    def __init__(self, source, base, model_config, args):
        self.base = base
        self.folder = pathlib.Path(source) if base != source else None
        self.quantize = args.quantize
        self.seed = args.seed
        self.kind = "none"  # unless set below: a base that is quantised and only evaluated
        self.config = {}
        if self.folder:
            self.kind = "bottleneck"
            if (self.folder / "adapter_config.json").exists():
                self.kind = "lora"
            self.read_folder()
        elif args.lora_rank:
            self.kind = "lora"
            self.config = self.lora_config(model_config, args)
        elif args.train_adapter:
            self.kind = "bottleneck"
            self.config = {
                "base_model_name_or_path": str(base),
                "reduction_factor": args.reduction_factor,
                "dropout": args.lora_dropout,
                "parts": args.adapter_parts,
            }

    def read_folder(self):
        config_name, weights_name, prefix = self.FILES[self.kind]
        self.config = json.loads((self.folder / config_name).read_text())
        unknown = [name for name in NOT_READ if self.config.get(name)]
        if self.config.get("peft_type", "LORA") != "LORA" or unknown:
            common.fail(f"{self.folder}: only plain LoRA can be read, not {' '.join(unknown)}")
        about = common.read_about(self.folder)
        if about and about["base"]["sha256"] not in (None, sha256_of_weights(self.base)):
            common.fail(f"{self.base} has other weights than those {self.folder} was trained on")
        named = safetensors.torch.load_file(self.folder / weights_name)
        self.weights = {name.removeprefix(prefix): weight for name, weight in named.items()}

    def about(self):
        """What rawtune.json says of it."""
        return {
            "base": {"path": str(self.base), "sha256": sha256_of_weights(self.base)},
            "adapter": self.kind,
            "quantize": self.quantize or None,
        }

    def lora_config(self, model_config, args):
        """PEFT's names."""
        is_all = args.lora_targets == ["all-linear"]
        targets = args.lora_targets or list(ATTENTION)
        return {
            "base_model_name_or_path": str(self.base),
            "peft_type": "LORA",
            "task_type": "SEQ_2_SEQ_LM" if model_config.is_encoder_decoder else "CAUSAL_LM",
            "r": args.lora_rank,
            "lora_alpha": args.lora_alpha or 2 * args.lora_rank,
            "lora_dropout": args.lora_dropout,
            "target_modules": "all-linear" if is_all else targets,
        }

    def wrap(self, layer, path, dtype):
        """The layer with an adapter where one belongs, else as it is."""
        config = self.config
        seed = common.derive_seed(self.seed, path)
        if self.kind == "lora":
            ends = config["target_modules"]
            if ends != "all-linear" and not ends_with(path, ends):
                return layer
            scale = config["lora_alpha"] / config["r"]
            return LoraLinear(layer, config["r"], scale, config["lora_dropout"], dtype, seed)
        for part in config.get("parts", ()):
            if ends_with(path, BOTTLENECKS[part]):
                factor = config["reduction_factor"]
                return BottleneckLinear(layer, part, factor, config["dropout"], dtype, seed)
        return layer

    def save(self, weights, folder):
        """Rank 0."""
        config_name, weights_name, prefix = self.FILES[self.kind]
        common.write_json(folder / config_name, self.config)
        named = {prefix + name: weight.contiguous() for name, weight in weights.items()}
        safetensors.torch.save_file(named, folder / weights_name, {"format": "pt"})


def install(model, source, base, args):
    """Collective. Quantise, freeze and wrap the layers. The adapter is that of the folder `source`,
    which training continues, else the flags'."""
    if not common.has_weights(base):
        common.fail(f"{base} has no weights that an adapter could belong to")
    adapter = model.adapter = Adapter(source, base, model.config, args)
    dtype = model.dtype
    n_wrapped = 0
    model.requires_grad_(False)
    for path, layer in list(model.named_modules()):
        if (
            not isinstance(layer, (torch.nn.Linear, Conv1D))
            or layer is model.get_output_embeddings()
        ):
            continue
        if args.quantize:
            layer = quantized(layer, args.quantize, dtype)
        wrapped = adapter.wrap(layer, path, dtype)
        n_wrapped += wrapped is not layer
        model.set_submodule(path, wrapped)
    if not n_wrapped and not args.no_train:
        common.fail("nothing to train: --lora_rank, --train_adapter, --lora_targets")
    if adapter.folder:
        model.load_state_dict(adapter.weights, strict=False)
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        different = sorted(trained ^ set(adapter.weights))
        if different:
            common.fail(f"{source}: weights and layers differ: {different[:4]}")
    common.log(f"{base}: {adapter.kind} adapters in {n_wrapped} layers {args.quantize}")


@torch.no_grad()
def merge(args):
    """A plain model of a LoRA folder and its base: computed in fp32, saved in the base's type."""
    common.setup_distributed(args)
    problems = []
    source, config, tokenizer = common.open_model(args, problems)
    out = pathlib.Path(args.training_run_name)
    if out.exists() or not pathlib.Path(args.model_init_path, "adapter_config.json").exists():
        problems.append("expected a LoRA folder, and one that does not exist")
    if problems:
        common.fail(problems)
    auto_class = common.auto_class_of(config)
    stage_0 = {"zero_optimization": {"stage": 0}}
    model = common.load_model(auto_class, source, config, args, stage_0, tokenizer)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoraLinear):
            update = layer.scale * layer.lora_B.weight @ layer.lora_A.weight
            linear = layer.base_layer
            linear.weight += update.T if isinstance(linear, Conv1D) else update
            model.set_submodule(path, linear)
    about = common.read_about(source)
    if "stop_ids" in about:
        model.generation_config.eos_token_id = about["stop_ids"]
    model.to(config.dtype or torch.float32).save_pretrained(out)
    tokenizer.save_pretrained(out)
    if about:
        common.write_json(out / "rawtune.json", {**about, "adapter": "none"})
    common.log(f"{out} holds {model.adapter.base} with {source} merged in")


def parse_args(argv):
    if len(argv) != 2:
        common.fail("usage: python adapters.py RUN OUT")
    words = ["--no_train", "--precision", "fp32", "--model_init_path", argv[0]]
    words += ["--training_run_name", argv[1]]
    return common.Parser(__doc__, {}).parse_args(words)


if __name__ == "__main__":
    import adapters  # load_model makes the classes of this module, not those of __main__

    common.launch(adapters.merge, adapters.parse_args(sys.argv[1:]))
