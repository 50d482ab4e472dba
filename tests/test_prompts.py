"""common.Prompts and the templates of sft_causal.py: texts to the letter, roles, refusals."""

import conftest
import pytest
import transformers

import common
import sft_causal

TEMPLATES = ("chatml", "alpaca", "oasst", "plain")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "a book?"},
    {"role": "assistant", "content": "no"},
]


def tokenizer_of_tiny_llama():
    return transformers.AutoTokenizer.from_pretrained(conftest.ROOT / "models" / "tiny-llama")


def open_prompts(flags="", change=None):
    """(Prompts or None, problems) of the tiny Llama's tokenizer with the flags of a run."""
    tokenizer = tokenizer_of_tiny_llama()
    for name, value in (change or {}).items():
        setattr(tokenizer, name, value)
    args = sft_causal.parse_args(["--model_init_name", "llama", *flags.split()])
    problems = []
    return sft_causal.open_prompts(args, "models/llama", tokenizer, problems), problems


ALPACA = "<s>Below is an instruction that describes a task"
REQUEST = ". Write a response that appropriately completes the request.\n\n### Instruction:\nAdd."
RENDERED = [
    (
        "chatml",
        CHAT[:3],
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nthe cat?<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n",
    ),
    (
        "oasst",
        CHAT,
        "<s><|system|>Be brief.</s><|prompter|>the cat?</s><|assistant|>yes</s>"
        "<|prompter|>a book?</s><|assistant|>no</s>",
    ),
    ("plain", CHAT[1:], "<s>the cat?\nyes</s>a book?\nno</s>"),
    (
        "alpaca",
        CHAT,
        "<s>Be brief.\n\n### Instruction:\nthe cat?\n\n### Response:\nyes</s>\n\n"
        "### Instruction:\na book?\n\n### Response:\nno</s>",
    ),
    (
        "alpaca",
        {"instruction": "Add.", "output": "3"},
        f"{ALPACA}{REQUEST}\n\n### Response:\n3</s>",
    ),
    (
        "alpaca",
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        f"{ALPACA}, paired with an input that provides further context{REQUEST}"
        "\n\n### Input:\n1 2\n\n### Response:\n3</s>",
    ),
    (
        "chatml",
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        "<s><|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n",
    ),
]


@pytest.mark.parametrize("template, messages, text", RENDERED)
def test_templates_to_the_letter(template, messages, text):
    prompts, problems = open_prompts(f"--template {template}")
    args = sft_causal.parse_args(["--model_init_name", "llama", "--template", template])
    if isinstance(messages, dict):
        (messages,) = sft_causal.to_conversations(args, messages)
    assert prompts.render(messages) == text and not problems
    question = prompts.render(messages[:-1], reply_follows=True)
    assert text.startswith(question) and text != question


def test_auto_takes_the_tokenizers_own_template_else_chatml_and_begins_as_the_tokenizer_does():
    assert open_prompts()[0].end_token == "<|im_end|>"
    own = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    prompts, _ = open_prompts(change={"chat_template": own})
    assert prompts.render(CHAT[1:3]) == "the cat?</s>yes</s>"
    assert prompts.end_token == "</s>" and prompts.stop_ids == [prompts.tokenizer.eos_token_id]
    assert prompts.begin == [prompts.tokenizer.bos_token_id]
    tokenizer = tokenizer_of_tiny_llama()
    tokenizer.bos_token = None
    assert common.Prompts(tokenizer, is_raw=True).begin == []


def test_stop_ids_are_the_end_of_a_turn_and_of_a_text():
    prompts, _ = open_prompts()
    tokens = prompts.tokenizer.convert_ids_to_tokens(prompts.stop_ids)
    assert set(tokens) == {"<|im_end|>", "</s>"}


def test_one_role_map_for_every_script():
    names = ("developer", "human", "gpt", "prompter", "assistant")
    expected = [{"role": turn["role"], "content": turn["content"]} for turn in CHAT]
    openai = [{"role": name, "content": turn["content"]} for name, turn in zip(names, CHAT)]
    sharegpt = [{"from": name, "value": turn["content"]} for name, turn in zip(names, CHAT)]
    assert common.Prompts.messages({"messages": openai}) == expected
    assert common.Prompts.messages({"conversations": sharegpt}) == expected
    tool = {"role": "tool", "content": "0 coins"}
    assert common.Prompts.messages({"messages": [tool]}) == [tool]
    prompts, _ = open_prompts()
    assert "<|im_start|>tool\n0 coins<|im_end|>" in prompts.render([tool])


def turn(**keys):
    return {"messages": [{"role": "user", "content": "time?", **keys}]}


REFUSED = [
    (turn(tool_calls=[{"id": "1"}]), "'tool_calls' is not supported"),
    ({**turn(), "tools": [{"type": "function"}]}, "'tools' is not supported"),
    (turn(role="wizard"), "role 'wizard', expected system, user, assistant or tool"),
    (turn(role=["user"]), "role ['user'], expected"),
    (turn(content=""), "'content' is '', expected text"),
    (turn(content=None), "'content' is None, expected text"),
    (turn(content=[{"type": "text", "text": "Hi"}]), "'content' is [{'type': 'text'"),
    (turn(content="half \ud800"), "half a character"),
    ({"messages": "Hi"}, "expected messages: a list of objects with role and content"),
    ({"messages": ["Hi"]}, "expected messages: a list of objects"),
    ({"conversations": None}, "expected messages: a list of objects"),
]


@pytest.mark.parametrize("record, message", REFUSED)
def test_records_that_are_refused(record, message):
    with pytest.raises(ValueError) as error:
        common.Prompts.messages(record)
    assert message in str(error.value)


@pytest.mark.parametrize("token", ["<|im_end|>", "<s>"])
def test_special_tokens_in_a_text_are_refused(token):
    prompts, _ = open_prompts()
    with pytest.raises(ValueError) as error:
        prompts.render([{"role": "user", "content": f"a{token}b"}])
    assert f"the special token {token!r}: remove it" in str(error.value)


TOKENIZERS = [
    ({"eos_token": None}, "", "the tokenizer has no end token: --eos_token"),
    ({"eos_token": ""}, "", "the tokenizer has no end token: --eos_token"),
    ({"chat_template": "{{ messages[0].content }}"}, "", "writes no end token after a reply"),
    ({"chat_template": "{{ raise_exception('no') }}"}, "", "the chat template fails: no"),
    ({"chat_template": {"rag": "", "tool_use": ""}}, "", "the chat template fails: "),
    ({}, "--lora_rank 4", "lacks the tokens <|im_start|> <|im_end|>, which only training of all"),
    ({}, "--no_train --template oasst", "lacks the tokens <|system|> <|prompter|> <|assistant|>"),
    ({}, "--train_adapter --pad_token <fill> --template plain", "lacks the tokens <fill>"),
]


@pytest.mark.parametrize("change, flags, message", TOKENIZERS)
def test_tokenizers_that_are_refused(change, flags, message):
    _, problems = open_prompts(flags, change)
    assert len(problems) == 1 and message in problems[0]


def test_tokens_of_the_flags():
    flags = "--pad_token <fill> --eos_token <end> --sep_token <sep> --template plain"
    prompts, problems = open_prompts(flags)
    assert prompts.render(CHAT[1:3]) == "<s>the cat?<sep>yes<end>" and not problems
    assert prompts.end_token == "<end>" and prompts.tokenizer.pad_token == "<fill>"
    for flags in ("--lora_rank 4 --template alpaca", "--lora_rank 4 --raw_prompt"):
        assert open_prompts(flags)[1] == []
    prompts, _ = open_prompts(change={"pad_token": None})
    assert prompts.tokenizer.pad_token == "</s>"
