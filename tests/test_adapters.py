"""LoRA against PEFT, bottlenecks, bases in 4 and 8 bits: their files, and the base left alone."""

import json
import pathlib

import conftest
import pytest
import safetensors.torch
import torch
import transformers
from conftest import metrics, run

import adapters
import chat
import common
import project_grads
import seq2seq

TOKEN_IDS = torch.arange(3, 63).view(4, 15)
SHORT = ["--data", "d", "--train_batch_size", 8, "--save_steps", 0, "--max_new_tokens", 4]
SHORT += ["--max_steps", 4, "--learning_rate", 0.01, "--warmup_steps", 0, "--logging_steps", 1]


def write_base(kind):
    """models/<kind> with weights that matter, and the data set d; returns the path."""
    conftest.write_data("d", conftest.pairs(40), conftest.pairs(6, 40))
    if kind == "gpt2":
        return conftest.make_causal(kind, initializer_range=0.02)
    return conftest.make_model(kind)


def auto_class(kind):
    is_causal = kind == "gpt2"
    return transformers.AutoModelForCausalLM if is_causal else transformers.AutoModelForSeq2SeqLM


def load(source, *words):
    """A model as the scripts load it."""
    args = seq2seq.parse_args(["--model_init_path", str(source), *words])
    problems = []
    common.check_shared_args(args, (), problems)
    common.setup_distributed(args)
    source, config, tokenizer = common.open_model(args, problems)
    assert not problems
    stage0 = {"zero_optimization": {"stage": 0}}
    return common.load_model(auto_class(config.model_type), source, config, args, stage0, tokenizer)


@torch.no_grad()
def logits(model):
    extra = {"decoder_input_ids": TOKEN_IDS} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=TOKEN_IDS, **extra).logits


def assert_close(model, other):
    torch.testing.assert_close(logits(model), logits(other), atol=2e-5, rtol=1e-4)


def distance(model, other):
    return float((logits(model) - logits(other)).abs().max())


def saved_names(folder):
    """Names of the weights of a checkpoint, also in engine/, but for tied embeddings there."""
    names = set()
    for path in folder.rglob("*.safetensors"):
        names.update(safetensors.torch.load_file(path))
    states = torch.load(folder / "engine/state/mp_rank_00_model_states.pt", weights_only=False)
    names.update(states["module"])
    names = {name for name in names if name.endswith((".weight", ".bias"))}
    return {name for name in names if not name.endswith("embed_tokens.weight")}


@pytest.mark.parametrize("words", [[], ["--lora_targets", "wo", "v", "--lora_alpha", "5"]])
def test_peft_reads_what_training_wrote(words):
    peft = pytest.importorskip("peft")
    base = pathlib.Path(write_base("t5v1.1"))
    before = (base / "model.safetensors").read_bytes()
    lora = ["--lora_rank", 3, "--lora_dropout", 0.1, *words]
    assert run("--model_init_name", "t5v1.1", "--training_run_name", "a", *SHORT, *lora) == 0
    ours = load("models/a")
    plain = auto_class("t5").from_pretrained(base)
    assert distance(ours, plain) > 0.05
    script = conftest.ROOT / "adapters.py"
    about = {**common.read_about("models/a"), "stop_ids": [1, 5]}
    common.write_json(pathlib.Path("models/a/rawtune.json"), about)
    conftest.finish(conftest.start("models/a", "models/merged", script=script))
    assert common.read_about("models/merged")["adapter"] == "none"
    settings = transformers.GenerationConfig.from_pretrained("models/merged")
    assert settings.eos_token_id == [1, 5]
    assert_close(auto_class("t5").from_pretrained("models/merged"), ours)
    assert_close(peft.PeftModel.from_pretrained(plain, "models/a"), ours)
    assert all(".lora_" in name for name in saved_names(pathlib.Path("models/a/checkpoint-4")))
    assert (base / "model.safetensors").read_bytes() == before
    frozen = safetensors.torch.load_file(base / "model.safetensors")
    for name, weight in ours.named_parameters():
        if not weight.requires_grad:
            assert torch.equal(weight, frozen[name.replace(".base_layer", "")])
    # further training begins where this ended, with the folder's own rank and targets
    run("--model_init_name", "a", "--training_run_name", "b", *SHORT)
    losses = [metrics(name, "eval") for name in "ab"]
    assert losses[1][0]["eval/loss"] == pytest.approx(losses[0][-1]["eval/loss"])
    assert losses[1][-1]["eval/loss"] < losses[1][0]["eval/loss"] < losses[0][0]["eval/loss"]
    configs = [conftest.read_json(f"models/{x}/adapter_config.json") for x in "ab"]
    assert configs[0] == configs[1] and configs[0]["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2"])
def test_what_peft_wrote_is_read_and_written_again(kind):
    peft = pytest.importorskip("peft")
    base = write_base(kind)
    ends = {"t5": ["q", "wo"], "bart": ["v_proj", "fc1"], "gpt2": ["c_attn", "c_proj"]}
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.3, target_modules=ends[kind])
    theirs = peft.get_peft_model(auto_class(kind).from_pretrained(base), config)
    for weight in theirs.parameters():
        if weight.requires_grad:
            weight.data.normal_(std=0.2)
    theirs.save_pretrained("theirs")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained("theirs")
    ours = load("theirs")
    plain = auto_class(kind).from_pretrained(base)
    assert distance(ours, plain) > 0.05
    assert_close(ours, theirs)
    pathlib.Path("again").mkdir()
    ours.adapter.save(common.full_state_dict(ours), pathlib.Path("again"))
    assert_close(peft.PeftModel.from_pretrained(plain, "again"), theirs)
    adapters.merge(adapters.parse_args(["theirs", "merged"]))
    assert_close(auto_class(kind).from_pretrained("merged"), theirs)
    # and ours, of the flags, which says that GPT-2's weights are transposed
    flags = ["--lora_rank", "2", "--lora_targets", *ends[kind]]
    ours = load(base, *flags)
    assert distance(ours, auto_class(kind).from_pretrained(base)) < 1e-6  # B starts with zeros
    for name, weight in ours.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.2)
    ours.adapter.save(common.full_state_dict(ours), pathlib.Path("again"))
    plain = auto_class(kind).from_pretrained(base)
    assert_close(peft.PeftModel.from_pretrained(plain, "again"), ours)


CHANGES = {"use_dora": True, "modules_to_save": ["lm_head"], "rank_pattern": {"q": 8}}


@pytest.mark.parametrize("name", CHANGES)
def test_an_adapter_with_more_in_it_is_refused_by_name(name, refused):
    base = write_base("t5")
    model = load(base, "--lora_rank", "2")
    folder = pathlib.Path("adapter")
    folder.mkdir()
    model.adapter.save(common.full_state_dict(model), folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    load(folder)
    common.write_json(folder / "adapter_config.json", {**model.adapter.config, name: CHANGES[name]})
    assert f"only plain LoRA can be read, not {name}" in refused(load, folder)


def test_a_base_without_weights_or_with_others_is_refused(refused):
    write_base("t5")
    assert "tiny-t5 has no weights" in refused(
        load, conftest.ROOT / "models" / "tiny-t5", "--lora_rank", "2"
    )
    run("--model_init_name", "t5", "--training_run_name", "a", "--lora_rank", 2, *SHORT)
    model = auto_class("t5").from_pretrained("models/t5")
    model.shared.weight.data[0, 0] += 1
    model.save_pretrained("models/t5")
    assert "models/t5 has other weights than those models/a was trained" in refused(
        load, "models/a"
    )


def test_a_bottleneck_is_houlsbys():
    torch.manual_seed(0)
    base = torch.nn.Linear(12, 16)
    layer = adapters.BottleneckLinear(base, "mh_adapter", 4, 0.0, torch.float32, 1)
    x = torch.randn(5, 12)
    assert torch.equal(layer(x), base(x))  # nothing is changed at the start
    down, up = layer.mh_adapter["down"], layer.mh_adapter["up"]
    for weight in (down.bias, up.weight, up.bias):
        torch.nn.init.normal_(weight)
    h = base(x)
    inner = (h @ down.weight.T + down.bias).clamp(min=0)  # (5, 4)
    torch.testing.assert_close(layer(x), h + inner @ up.weight.T + up.bias)


def test_bottlenecks_are_trained_saved_and_read():
    """Names, shapes and files as in version 1."""
    write_base("t5")
    words = ["--train_adapter", "--reduction_factor", 8, "--training_run_name"]
    run("--model_init_name", "t5", *SHORT, *words, "a")
    run("--model_init_name", "t5", *SHORT, *words, "one", "--adapter_parts", "mh_adapter")
    shapes = {"down.weight": (4, 32), "down.bias": (4,), "up.weight": (32, 4), "up.bias": (32,)}
    expected = {}
    for stack in ("encoder", "decoder"):
        for block in (0, 1):
            for ending, shape in shapes.items():
                layer = f"{stack}.block.{block}.layer"
                last = 1 if stack == "encoder" else 2
                expected[f"{layer}.0.SelfAttention.o.mh_adapter.{ending}"] = shape
                expected[f"{layer}.{last}.DenseReluDense.wo.output_adapter.{ending}"] = shape
    weights = safetensors.torch.load_file("models/a/bottleneck.safetensors")
    assert {name: weight.shape for name, weight in weights.items()} == expected
    assert saved_names(pathlib.Path("models/a/checkpoint-4")) >= set(expected)
    assert len(safetensors.torch.load_file("models/one/bottleneck.safetensors")) == 16
    config = conftest.read_json("models/a/bottleneck_config.json")
    assert config == {
        "base_model_name_or_path": "models/t5",
        "reduction_factor": 8,
        "dropout": 0.0,
        "parts": ["mh_adapter", "output_adapter"],
    }
    losses = [row["eval/loss"] for row in metrics("a", "eval")]
    assert losses[-1] < losses[0]
    run("--no_train", "--model_init_name", "a", *SHORT, "--training_run_name", "e")
    assert metrics("e")[0]["eval/loss"] == pytest.approx(losses[-1])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_in_few_bits(kind, refused):
    pytest.importorskip("bitsandbytes")
    base = write_base("gpt2")  # its weights are transposed
    plain = auto_class("gpt2").from_pretrained(base)
    error = logits(load(base, "--no_train", "--quantize", kind)) - logits(plain)
    assert 0 < error.std() < 0.15 * logits(plain).std()
    write_base("t5v1.1")  # its feed-forward casts the states to the dtype of a weight
    words = ["--model_init_name", "t5v1.1", *SHORT, "--lora_rank", 4, "--training_run_name"]
    run(*words, "full")
    run(*words, "few", "--quantize", kind)
    full, few = metrics("full"), metrics("few")
    for row, other in zip(full, few):
        name = "loss" if row["split"] == "train" else "eval/loss"
        assert row[name] == pytest.approx(other[name], rel=0.04)
    assert full[0]["eval/loss"] > full[-1]["eval/loss"] + 1
    names = saved_names(pathlib.Path("models/few/checkpoint-4"))
    assert names and all(".lora_" in name for name in names)
    about = conftest.read_json("models/few/rawtune.json")
    assert (about["adapter"], about["quantize"]) == ("lora", kind)
    # a run, and a plain base, are evaluated as they were
    words = ["--no_train", "--data", "d", "--quantize", kind, "--max_new_tokens", 4]
    for name, row in (("t5v1.1", few[0]), ("few", few[-1])):
        run(*words, "--model_init_name", name, "--training_run_name", f"{name}-eval")
        evaluated = metrics(f"{name}-eval")[0]
        assert evaluated["eval/loss"] == pytest.approx(row["eval/loss"], rel=1e-4)
    assert "nothing to train: --lora_rank" in refused(
        run, "--model_init_name", "t5v1.1", *SHORT, "--quantize", kind
    )


@pytest.mark.slow
def test_lora_at_zero3_on_two_ranks_and_what_reads_a_run(capsys):
    """The weights of one process, also after a stop; chat.py gives our answers."""
    write_base("t5v1.1")
    words = ["--model_init_name", "t5v1.1", *SHORT, "--lora_rank", 4, "--lr_scheduler_type"]
    words += ["constant", "--lora_dropout", 0.0, "--training_run_name"]
    sharded = [*words, "zero3", "--ds_config", "zero3"]
    runs = [[*sharded, "--max_steps", 2], sharded]  # the second goes on with the first
    process = conftest.start_many(runs, n_ranks=2)
    run(*words, "plain")
    run(*words, "bottleneck", "--train_adapter", "--lora_rank", 0)
    conftest.finish(process)
    plain, zero3 = (
        safetensors.torch.load_file(f"models/{name}/adapter_model.safetensors")
        for name in ("plain", "zero3")
    )
    assert plain.keys() == zero3.keys()
    for name, weight in plain.items():
        assert (weight - zero3[name]).norm() < 1e-4 * weight.norm()
    prompts = [json.dumps({"prompt": record["prompt"]}) for record in conftest.pairs(6, 40)]
    pathlib.Path("prompts.jsonl").write_text("\n".join(prompts))
    for name in ("zero3", "bottleneck"):
        files = ["--input", "prompts.jsonl", "--output", f"{name}.jsonl"]
        sampling = ["--temperature", 0, "--max_new_tokens", 4]
        model = ["--model_path", f"models/{name}"]
        assert run(*model, *files, *sampling, module=chat) == 0
        path = pathlib.Path(f"models/{name}/temperature=0.00_n=1_step=4.json")
        ours = [row["generations"][0]["lm_postprocess"] for row in conftest.read_json(path)]
        lines = pathlib.Path(f"{name}.jsonl").read_text().splitlines()
        replies = [json.loads(line)["replies"][0] for line in lines]
        assert replies == ours
        assert len(set(replies)) > 1
    grads = ["collect", "--model_init_name", "zero3", "--data_name", "d", "--out", "grads"]
    capsys.readouterr()
    run(*grads, module=project_grads)
    output = capsys.readouterr()
    assert "lora adapters in" in output.err + output.out and "grads: 40 rows" in output.out
