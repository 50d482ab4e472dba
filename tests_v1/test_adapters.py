"""LoRA, new token rows, bottleneck adapters, quantised bases: PEFT and bitsandbytes as oracles, files, resuming, merging."""

import copy
import json
import pathlib

import pytest
import torch
import transformers
from conftest import bpe_tokenizer, distance

import common_v1 as common

STAGE0 = {"zero_optimization": {"stage": 0}}
SMALL = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {  # name: configuration of a model of two blocks (encoder-decoders: two and two) and width 32
    "llama": transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                      tie_word_embeddings=False, **SMALL),
    "llama tied": transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=True,
                                           **SMALL),
    "gemma": transformers.GemmaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=8,
                                      **SMALL),
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SMALL),
    "t5": transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **SMALL),
    "bart": transformers.BartConfig(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                                    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, decoder_start_token_id=2, **SMALL),
    "gpt_neox": transformers.GPTNeoXConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **SMALL),
    "opt": transformers.OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32,
                                  max_position_embeddings=64, **SMALL),
    "gptj": transformers.GPTJConfig(n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, **SMALL),
    "gpt_neo": transformers.GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]], max_position_embeddings=64,
                                         **SMALL),
    "phi": transformers.PhiConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **SMALL),
    "phi3": transformers.Phi3Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **SMALL),
    "bloom": transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SMALL),
    "falcon": transformers.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False, **SMALL)}
IDS = torch.arange(3, 63).view(4, 15)


def auto_class(config):
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


@pytest.fixture(autouse=True)
def info_lines(monkeypatch):
    """A logger remembers for which levels it is silent; setLevel makes it forget."""
    before = common.log.level
    common.log.setLevel("INFO")
    yield
    common.log.setLevel(before)


def arguments(*words):
    parser = common.Parser()
    common.add_shared_args(parser)
    return parser.parse_args([str(word) for word in words])


def write_base(folder, name):
    """A folder with random weights, large enough to matter, and a tokenizer; returns its path as a string."""
    torch.manual_seed(1)
    model = auto_class(CONFIGS[name]).from_config(CONFIGS[name])
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    model.save_pretrained(folder)
    bpe_tokenizer().save_pretrained(folder)
    return str(folder)


def load(source, *words, precision="fp32", **options):
    """load_model by flags, as the scripts do; in eval mode."""
    args, problems = arguments("--model_init_path", source, *words), []
    source, config, _ = common.open_model_folder(args, problems)
    assert problems == [], problems
    return common.load_model(auto_class(config), source, config, args, precision, STAGE0, **options).eval()


def shake(model):
    """Random numbers into everything that is trained, so that an adapter does something."""
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, **extra).logits


def off(a, b):
    return float((a - b).abs().max())


# ------------------------------------------------------------------------------------------------ LoRA and PEFT


@pytest.mark.parametrize("name, words", [("llama", []), ("gpt2", []), ("t5", ["--lora_targets", "all-linear"]), ("falcon", [])])
def test_peft_loads_our_adapter_and_gives_our_logits(tmp_path, name, words):
    peft = pytest.importorskip("peft")
    base = write_base(tmp_path / "base", name)
    model = shake(load(base, "--lora_rank", 3, "--lora_alpha", 5, *words))
    common.save_adapter(model, common.full_state_dict(model), tmp_path)
    plain = auto_class(model.config).from_pretrained(base)
    without = logits(plain)
    theirs = logits(peft.PeftModel.from_pretrained(plain, tmp_path))
    assert off(logits(model), theirs) < 1e-5 < 0.01 < off(logits(model), without)


@pytest.mark.parametrize("name, options", [
    ("llama", {"target_modules": r".*layers\.1.*(q|down)_proj", "use_rslora": True}), ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    ("t5", {"target_modules": ["q", "wo"]})])
def test_we_load_pefts_adapter_and_give_its_logits(tmp_path, name, options):
    peft = pytest.importorskip("peft")
    base = write_base(tmp_path / "base", name)
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.3, **options)
    theirs = shake(peft.get_peft_model(auto_class(CONFIGS[name]).from_pretrained(base), config))
    theirs.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").unlink(missing_ok=True)
    ours = load(tmp_path / "adapter")
    assert off(logits(ours), logits(theirs)) < 1e-5 < 0.01 < off(logits(ours), logits(auto_class(CONFIGS[name]).from_pretrained(base)))
    common.save_adapter(ours, common.full_state_dict(ours), tmp_path)  # and back again
    again = peft.PeftModel.from_pretrained(auto_class(CONFIGS[name]).from_pretrained(base), tmp_path)
    assert off(logits(again), logits(theirs)) < 1e-5


@pytest.mark.parametrize("change, words", [({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"modules_to_save": ["x"]}, "modules_to_save"),
                                           ({"rank_pattern": {"q": 2}}, "rank_pattern"), ({"peft_type": "IA3"}, "IA3")])
def test_other_kinds_of_peft_adapters_are_refused_by_name(tmp_path, change, words):
    base = write_base(tmp_path / "base", "llama")
    model = load(base, "--lora_rank", 2)
    common.save_adapter(model, common.full_state_dict(model), tmp_path)
    problems, path = [], tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    common.open_model_folder(arguments("--model_init_path", tmp_path), problems)
    assert len(problems) == 1 and words in problems[0]


def test_lora_starts_the_same_whatever_else_is_trained(tmp_path):
    """The numbers of one layer depend on seed and name alone; they have the spread of PEFT's kaiming_uniform_(a=sqrt(5))."""
    base = write_base(tmp_path / "base", "llama")
    few, many, other = (load(base, "--lora_rank", 4, "--lora_targets", *targets, "--seed", seed) for targets, seed in (
        (["v_proj"], 0), (["all-linear"], 0), (["v_proj"], 1)))
    name = "model.layers.1.self_attn.v_proj"
    start = few.get_submodule(name).lora_A.weight
    assert torch.equal(start, many.get_submodule(name).lora_A.weight) and not torch.equal(start, other.get_submodule(name).lora_A.weight)
    assert not torch.equal(start, few.get_submodule(name.replace("1", "0")).lora_A.weight)
    assert 0.9 * 32**-0.5 < float(start.abs().max()) <= 32**-0.5 and not few.get_submodule(name).lora_B.weight.any()
    assert torch.equal(logits(few), logits(load(base)))
    trained = {n for n, p in many.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7 and all(".lora_" in n for n in trained) and not any("lm_head" in n for n in trained)


@pytest.mark.parametrize("name, leaves", [("t5", {"q", "k", "v"}), ("llama", {"q_proj", "k_proj", "v_proj"}), ("gpt2", {"c_attn", "c_proj", "c_fc"}),
                                          ("gpt_neox", {"query_key_value"}), ("phi3", {"qkv_proj"})])
def test_targets_by_family(name, leaves):
    config = CONFIGS[name]
    plan = common.adapter_plan(arguments("--lora_rank", 2), "x", config, [])
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
        common.install_layers(model, plan)
    assert {path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, common.LoraLinear)} == leaves


def test_an_unknown_family_gets_lora_on_all_linear_layers_and_says_so(tmp_path, messages, monkeypatch):
    monkeypatch.delitem(common.LORA_TARGETS, "llama")
    base = write_base(tmp_path / "base", "llama")
    model = load(base, "--lora_rank", 2)
    assert sum(isinstance(m, common.LoraLinear) for m in model.modules()) == 14
    assert any("all linear layers" in line and "llama" in line for line in messages)


# ------------------------------------------------------------------------------------------------ new tokens


@pytest.mark.parametrize("name", ["llama", "llama tied", "gemma"])
def test_rows_of_new_tokens_travel_with_the_adapter_and_peft_reads_them(tmp_path, name):
    peft = pytest.importorskip("peft")
    base, ids = write_base(tmp_path / "base", name), torch.arange(290, 304).view(2, 7)
    start = load(base, "--lora_rank", 2, n_tokens=304, new_ids=[300, 302, 303])
    old = start.get_input_embeddings().weight[:300]
    assert start.get_input_embeddings().weight.shape == (304, 32) and off(start.get_input_embeddings().weight[301], old.mean(0)) < 1e-6
    assert off(logits(start, ids), logits(load(base, n_tokens=304), ids)) < 1e-6  # plain rows, before training
    model = shake(copy.deepcopy(start))
    common.save_adapter(model, common.full_state_dict(model), tmp_path)
    bpe_tokenizer().save_pretrained(tmp_path)
    is_tied = name != "llama"
    stored = json.loads((tmp_path / "adapter_config.json").read_text())["trainable_token_indices"]
    assert stored == ([300, 302, 303] if is_tied else {"embed_tokens": [300, 302, 303], "lm_head": [300, 302, 303]})
    plain = load(base, n_tokens=304)
    theirs = logits(peft.PeftModel.from_pretrained(plain, tmp_path), ids)
    assert off(logits(model, ids), theirs) < 1e-5 < 0.01 < off(logits(start, ids), theirs)
    assert torch.equal(logits(load(tmp_path), ids), logits(model, ids))  # ours again, rows added by itself
    hidden = torch.randn(2, 5, 32)
    whole = model.get_output_embeddings()(hidden)
    assert off(whole.flatten(0, 1), model.get_output_embeddings()(hidden.flatten(0, 1))) < 1e-6 and whole.shape == (2, 5, 304)
    args = arguments("--model_init_path", tmp_path, "--merge_lora", tmp_path / "merged")
    common.merge_and_save(auto_class(model.config), *common.open_model_folder(args, []), args)
    merged = auto_class(model.config).from_pretrained(tmp_path / "merged")
    assert off(logits(merged, ids), theirs) < 1e-5 and merged.config.vocab_size == 304


@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_training_moves_the_new_rows_and_nothing_else_of_the_embeddings(tmp_path, name):
    base = write_base(tmp_path / "base", name)
    model = load(base, "--lora_rank", 2, n_tokens=302, new_ids=[300, 301]).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    model(input_ids=torch.tensor([[5, 300, 7, 301]]), labels=torch.tensor([[5, 300, 7, 301]])).loss.backward()
    optimizer.step()
    moved = {n for n, w in model.state_dict().items() if not torch.equal(w, before[n])}
    assert moved and all(common.ADAPTER_NAMES.search(n) for n in moved) and sum("token_adapter" in n for n in moved) == 2  # tied: two names
    whole = load(base, n_tokens=302)  # the same gradient as that of a whole embedding, at these rows
    for p in whole.parameters():
        p.requires_grad_(p is whole.get_input_embeddings().weight or p is whole.get_output_embeddings().weight)
    whole(input_ids=torch.tensor([[5, 300, 7, 301]]), labels=torch.tensor([[5, 300, 7, 301]])).loss.backward()
    assert off(model.get_input_embeddings().token_adapter.trainable_tokens_delta.grad, whole.get_input_embeddings().weight.grad[300:]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_rows_of_new_tokens_travel_with_bottlenecks_too(tmp_path, name):
    base, ids = write_base(tmp_path / "base", name), torch.arange(290, 304).view(2, 7)
    model = shake(load(base, "--train_adapter", "--reduction_factor", 8, n_tokens=304, new_ids=[300, 303]))
    common.save_adapter(model, common.full_state_dict(model), tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids)) and off(logits(again, ids), logits(load(base, n_tokens=304), ids)) > 0.01
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name, n_tokens", [("llama tied", 304), ("llama", 300)])
def test_new_rows_train_and_generate_alike_with_partitioned_weights(tmp_path, name, n_tokens, monkeypatch):
    """Stages 0 and 3, three steps; added rows (loaded whole) and spare ones (loaded partitioned), on a quantised base."""
    monkeypatch.setattr("sys.argv", ["test"])
    base, ids, found = write_base(tmp_path / "base", name), torch.arange(n_tokens - 20, n_tokens).view(2, 10), {}
    common.adopt_launcher()
    device = common.setup_distributed()
    for stage in (0, 3):
        args = arguments("--model_init_path", base, "--lora_rank", 2, "--quantize", "nf4", "--train_batch_size", 2)
        config = common.open_model_folder(args, [])[1]
        ds_config = common.read_ds_config(args, f"zero{stage}", "fp32", [])
        model = common.load_model(transformers.AutoModelForCausalLM, base, config, args, "fp32", ds_config, n_tokens=n_tokens,
                                  new_ids=[n_tokens - 4, n_tokens - 1])
        assert any(hasattr(w, "ds_id") for w in model.parameters()) == (stage == 3 and n_tokens == 300)
        optimizer = torch.optim.AdamW(common.param_groups(model, 0.0), lr=0.01)
        engine, *_ = common.deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
        for _ in range(3):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        engine.eval()
        with torch.no_grad():
            found[stage] = engine(input_ids=ids).logits, engine.module.get_output_embeddings()(torch.ones(2, 3, 32)), common.full_state_dict(model)
        if stage == 3:
            assert off(logits(common.plain_copy(model, device), ids), found[3][0]) < 1e-6
    assert off(found[0][0], found[3][0]) < 1e-5 and off(found[0][1], found[3][1]) < 1e-5
    assert distance(found[0][2], found[3][2]) < 1e-5 and sum("token_adapter" in key for key in found[3][2]) == (1 if "tied" in name else 2)


def test_we_read_rows_that_peft_trained(tmp_path):
    peft = pytest.importorskip("peft")
    base, ids = write_base(tmp_path / "base", "llama"), torch.arange(290, 304).view(2, 7)
    for form in ([300, 303], {"embed_tokens": [300, 303], "lm_head": [300, 303]}):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=form)
        theirs = shake(peft.get_peft_model(load(base, n_tokens=304), config))
        theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**stored, "base_model_name_or_path": base}))
        assert off(logits(load(tmp_path / "adapter"), ids), logits(theirs, ids)) < 1e-5


# ------------------------------------------------------------------------------------------------ quantised base


@pytest.mark.parametrize("shape, scale", [((64, 128), 1.0), ((96, 320), 0.02), ((5, 64), 1e-4)])
def test_nf4_codes_and_magnitudes_are_those_of_bitsandbytes(shape, scale):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    weight[0, :64] = 0  # a block of zeros
    packed, state = functional.quantize_4bit(weight.clone(), blocksize=64, quant_type="nf4", compress_statistics=False)
    codes, absmax = common.quantize_nf4(weight)
    assert torch.equal(absmax, state.absmax.float()) and torch.equal(codes, packed.flatten())
    assert torch.equal(torch.tensor(common.NF4), state.code.float())


@pytest.mark.parametrize("n_in, n_out", [(128, 96), (50, 7), (64, 700)])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_dequantised_weights_are_as_near_as_the_codes_allow(kind, n_in, n_out):
    torch.manual_seed(0)
    linear = torch.nn.Linear(n_in, n_out)
    with torch.no_grad():
        linear.weight[::3] *= 20  # blocks and rows of very different size
    quantized = common.QuantizedLinear(linear, kind, torch.float32)
    error = (quantized.dequantize(torch.float32) - linear.weight).abs()
    if kind == "int8":
        assert (error <= linear.weight.abs().amax(1, keepdim=True) / 254 * 1.001).all()
    else:
        flat = torch.nn.functional.pad(linear.weight.detach().flatten(), (0, -linear.weight.numel() % 64)).view(-1, 64)
        absmax = flat.abs().amax(1)
        gap = max(b - a for a, b in zip(common.NF4, common.NF4[1:])) / 2  # half of the widest gap of the code book
        bound = absmax * gap + (absmax - absmax.mean()).abs().max() / 254  # the second part: magnitudes in 8 bits
        assert (error.flatten() <= bound.repeat_interleave(64)[: error.numel()] * 1.001).all()
    assert error.max() > 0 and len(list(quantized.parameters())) == 1 and not [n for n in quantized.state_dict() if n != "bias"]


@pytest.mark.parametrize("kind, at_most", [("nf4", 0.52), ("int8", 1.04)])
def test_bytes_per_parameter(kind, at_most, messages, tmp_path):
    quantized = common.QuantizedLinear(torch.nn.Linear(512, 256), kind, torch.float32)
    assert 0.5 < common.quantized_bytes([quantized]) / 512 / 256 < at_most
    load(write_base(tmp_path / "base", "llama"), "--quantize", kind, "--no_train")
    assert any("14 linear layers" in line and "bytes per parameter" in line for line in messages)


@pytest.mark.parametrize("make", [lambda: torch.nn.Linear(40, 24), lambda: common.Conv1D(24, 40)])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_layer_computes_and_propagates_like_a_plain_one_with_its_weights(kind, make):
    torch.manual_seed(0)
    linear = make()
    quantized = common.QuantizedLinear(linear, kind, torch.float32)
    plain = common._plain_linear(quantized)
    assert type(plain) is type(linear) and plain.weight.shape == linear.weight.shape
    grads = []
    for layer in (quantized, plain, linear):
        x = torch.ones(3, 5, 40).cumsum(-1).sin().requires_grad_()
        (layer(x) ** 2).sum().backward()
        grads.append(x.grad)
    assert off(grads[0], grads[1]) < 1e-5 < off(grads[0], grads[2])


def test_scales_survive_a_cast_and_the_type_is_autocasts():
    quantized = common.QuantizedLinear(torch.nn.Linear(64, 64), "nf4", torch.float32)
    before = quantized.dequantize(torch.float32)
    assert torch.equal(copy.deepcopy(quantized).bfloat16().dequantize(torch.float32), before)
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantized(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32 and quantized(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_quantised_model_is_near_the_plain_one_and_its_head_is_untouched(tmp_path, name):
    base = write_base(tmp_path / "base", name)
    plain = load(base)
    ours = {kind: load(base, "--quantize", kind, "--no_train") for kind in ("int8", "nf4")}
    error = {kind: float((logits(model) - logits(plain)).norm() / logits(plain).norm()) for kind, model in ours.items()}
    assert 0 < error["int8"] < 0.02 and error["int8"] < error["nf4"] < 0.25
    assert isinstance(ours["nf4"].get_output_embeddings(), torch.nn.Linear)
    assert not any(isinstance(m, (torch.nn.Linear, common.Conv1D)) for m in common.linear_layers(ours["nf4"]).values())


# ------------------------------------------------------------------------------------------------ bottleneck adapters


@pytest.mark.parametrize("name", CONFIGS)
def test_bottlenecks_change_nothing_at_first_and_have_the_size_of_the_formula(tmp_path, name):
    """2 L (2 h (h / rf) + h / rf + h) parameters, L blocks of encoder and decoder together."""
    base, config = write_base(tmp_path / "base", name), CONFIGS[name]
    plain, words, h, rf = load(base), ["--train_adapter", "--reduction_factor", 8], 32, 8
    model = load(base, *words)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    blocks = 4 if config.is_encoder_decoder else 2
    assert sum(p.numel() for p in trained.values()) == 2 * blocks * (2 * h * (h // rf) + h // rf + h)
    assert torch.equal(logits(model), logits(plain)) and all("mh_adapter" in n or "output_adapter" in n for n in trained)
    for kept, flag in (("output_adapter", "--no_mh_adapter"), ("mh_adapter", "--no_output_adapter")):
        one = load(base, *words, flag)
        assert all(kept in n for n, p in one.named_parameters() if p.requires_grad) and off(logits(shake(one)), logits(plain)) > 1e-3
    down = [p for n, p in trained.items() if "down.weight" in n]
    assert 0.015 < float(torch.cat([p.flatten() for p in down]).std()) < 0.025


def test_a_bottleneck_is_never_thinner_than_one_and_does_what_the_paper_says(tmp_path):
    model = shake(load(write_base(tmp_path / "base", "llama"), "--train_adapter"))  # 32 // 128
    layer = model.model.layers[0].self_attn.o_proj
    part, x = layer.mh_adapter, torch.randn(3, 32)
    assert part["down"].weight.shape == (1, 32) and part["dropout"].p == 0.1
    h = layer.base_layer(x)
    by_hand = h + torch.relu(h @ part["down"].weight.T + part["down"].bias) @ part["up"].weight.T + part["up"].bias
    assert off(layer(x), by_hand) < 1e-6 < off(layer(x), h)


def test_bottlenecks_are_read_back(tmp_path):
    base = write_base(tmp_path / "base", "t5")
    model = shake(load(base, "--train_adapter", "--reduction_factor", 4, "--no_mh_adapter", "--adapter_dropout", 0.25))
    common.save_adapter(model, common.full_state_dict(model), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "bottleneck.safetensors", "bottleneck_config.json"]
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model)) and again.adapter_plan.dropout == 0.25
    problems = []
    common.open_model_folder(arguments("--model_init_path", tmp_path, "--merge_lora", tmp_path / "out"), problems)
    assert len(problems) == 1 and "nothing can be merged" in problems[0]


# ------------------------------------------------------------------------------------------------ both kinds


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("words", [["--lora_rank", 3, "--lora_alpha", 5, "--lora_dropout", 0.1], ["--train_adapter", "--reduction_factor", 8]],
                         ids=["lora", "bottleneck"])
def test_with_adapters_off_the_base_answers_to_the_bit_and_they_come_back(tmp_path, name, words):
    base = write_base(tmp_path / "base", name)
    model, without, calls = shake(load(base, *words)), logits(load(base)), []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: calls.append(module))
    before, called = logits(model), calls.copy()
    calls.clear()
    with pytest.raises(ValueError, match="also after an error"), common.adapters_off(model):
        assert torch.equal(logits(model), without) and calls == called
        raise ValueError("also after an error")
    assert torch.equal(logits(model), before) and off(before, without) > 0.01


# ------------------------------------------------------------------------------------------------ merging and refusals


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "falcon"])
@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_merging_leaves_a_plain_model(tmp_path, name, kind):
    base = write_base(tmp_path / "base", name)
    model = shake(load(base, "--lora_rank", 2, "--lora_targets", "all-linear", *(["--quantize", kind] if kind else [])))
    before = logits(model)
    common.merge_adapter(model)
    plain = auto_class(model.config).from_config(model.config)
    assert off(logits(model), before) < 1e-5 and not any(isinstance(m, (common.LoraLinear, common.QuantizedLinear)) for m in model.modules())
    assert model.state_dict().keys() == plain.state_dict().keys() and off(before, logits(load(base))) > 0.01


REFUSED = {
    "--lora_alpha": ["--lora_alpha", 8], "--train_adapter exclude": ["--lora_rank", 2, "--train_adapter"], "--reduction_factor": ["--reduction_factor", 8],
    "quantised weights are not trained": ["--quantize", "nf4"], "no adapter to train": ["--train_adapter", "--no_mh_adapter", "--no_output_adapter"],
    "no linear layer has such a name": ["--lora_rank", 2, "--lora_targets", "query"], "stand alone": ["--lora_rank", 2, "--lora_targets", "auto", "q"],
    "below 1": ["--lora_rank", 2, "--lora_dropout", 1.0], "holds no LoRA adapter": ["--merge_lora", "nowhere"], "positive numbers": ["--lora_rank", -1],
    "found in no parameter's name": ["--freeze", "encoder", "nothing_like_this"], "leaves no parameter": ["--freeze", "."],
    "not a regular expression": ["--freeze", "("], "no effect with --no_train": ["--lora_rank", 2, "--no_train"], "1 or more": ["--train_adapter", "--reduction_factor", 0],
    "--compile does not go": ["--lora_rank", 2, "--quantize", "int8", "--compile"]}


@pytest.mark.parametrize("words", REFUSED)
def test_refused(tmp_path, words):
    """Before a model loads: only its configuration is there."""
    CONFIGS["t5"].save_pretrained(tmp_path)
    bpe_tokenizer().save_pretrained(tmp_path)
    args, problems = arguments("--model_init_path", tmp_path, *REFUSED[words]), []
    common.check_shared_args(args, problems)
    source, config, _ = common.open_model_folder(args, problems)
    common.count_trained(transformers.AutoModelForSeq2SeqLM, source, config, args, 1, problems)
    assert any(words in problem for problem in problems), problems


def test_bottlenecks_in_an_unknown_family_are_refused(tmp_path, monkeypatch):
    base, problems = write_base(tmp_path / "base", "llama"), []
    monkeypatch.delitem(common.BOTTLENECKS, "llama")
    common.open_model_folder(arguments("--model_init_path", base, "--train_adapter"), problems)
    assert len(problems) == 1 and "llama is not known" in problems[0]


# ------------------------------------------------------------------------------------------------ memory


def test_frozen_weights_count_without_gradients_and_quantised_ones_by_their_bytes(tmp_path):
    billion = 10**9
    assert common.memory_per_gpu(billion, "zero0", "fp32", 1, n_trained=0) == 4 * billion
    assert common.memory_per_gpu(billion, "zero1", "bf16", 4, n_trained=billion // 10) == pytest.approx(2e9 + 0.1e9 * (6 + 12 / 4))
    assert common.memory_per_gpu(0, "zero3", "bf16", 4, n_trained=0, frozen_bytes=5) == 5
    base, config = write_base(tmp_path / "base", "llama"), CONFIGS["llama"]
    n_params = common.count_parameters(transformers.AutoModelForCausalLM, config)
    args = arguments("--lora_rank", 2, "--quantize", "int8")
    n_trained, (n_quantized, size) = common.count_trained(transformers.AutoModelForCausalLM, base, config, args, n_params, [])
    model = load(base, "--lora_rank", 2, "--quantize", "int8")
    assert n_trained == sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * (64 + 48 + 48)
    linears = [p.numel() for n, p in load(base).named_parameters() if "proj" in n]
    assert n_quantized == sum(linears) and size == common.quantized_bytes([m for m in model.modules() if isinstance(m, common.QuantizedLinear)])


def test_a_plain_folder_is_no_adapter_folder(tmp_path):
    assert common.read_adapter(write_base(tmp_path / "base", "llama"), []) is None
    assert common.adapter_kind(load(pathlib.Path(tmp_path / "base"))) == "none"
