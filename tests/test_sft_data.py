"""sft_causal.py's data: formats, templates, which tokens are targets, truncation, message trees, mixtures, the cache. No model is loaded."""

import json
import re

import numpy as np
import pytest
import transformers
from conftest import bpe_tokenizer, sft_flags, write_llama, write_model

import common
import sft_causal

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
                "appropriately completes the request.\n\n")
OWN = ("{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
       "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}")
# as Qwen 3 does: of earlier turns only what stands behind the thoughts
FORGETS = ("{% for m in messages %}{{ '[' + m['role'] + ']' }}{% if m['role'] == 'assistant' and not loop.last %}"
           "{{ m['content'].split('=')[-1] }}{% else %}{{ m['content'] }}{% endif %}{{ eos_token }}{% endfor %}"
           "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}")
TURNS = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "yes"},
         {"role": "user", "content": "a book"}, {"role": "assistant", "content": "x=no"}]


@pytest.fixture
def mount(tmp_path):
    write_llama(tmp_path / "models" / "llama")
    (tmp_path / "data").mkdir()
    return tmp_path


@pytest.fixture
def prepare(mount):
    """prepare(training records, **flags) -> what main gets; the records are data/own.json, and the first two of them are evaluated."""
    def prepare(records, **changes):
        (mount / "data" / "own.json").write_text(json.dumps({"train": records, "eval": records[:2]}))
        return sft_causal.prepare(sft_causal.parse_args(list(map(str, sft_flags(mount, **{"data": "own", **changes})))))
    return prepare


@pytest.fixture
def refusal(prepare, capsys):
    """refusal(records, **flags) -> the error text of a run that ends with code 2 before any model is loaded."""
    def refusal(records, **changes):
        with pytest.raises(SystemExit) as stop:
            prepare(records, **changes)
        assert stop.value.code == 2
        return capsys.readouterr().err
    return refusal


def set_template(mount, template, **tokens):
    tokenizer = transformers.AutoTokenizer.from_pretrained(mount / "models" / "llama")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(mount / "models" / "llama")


def document(job, n=0, split="train"):
    """(ids, is_target) of document n, read from the stored array without the script's help."""
    row = job.data_sets[0].tokens[split][n].tolist()
    return [-1 - v if v < 0 else v for v in row], [v < 0 for v in row]


def shown(job, n=0):
    """The text of document n, runs of targets between ⟦ and ⟧."""
    ids, is_target = document(job, n)
    text, before = "", False
    for i, target in zip([*ids, None], [*is_target, False]):
        text += ("⟦" if target else "⟧") if target != before else ""
        text += "" if i is None else bytes_of(job.tokenizer, i)
        before = target
    return text


def bytes_of(tokenizer, i):
    return tokenizer.convert_ids_to_tokens(i).replace("Ġ", " ").replace("Ċ", "\n")


def chat(user, assistant, **others):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], **others}


# ------------------------------------------------------------------------------------------------ formats and templates


ADD, SAY, TWO = {"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Say yes", "input": "", "output": "yes"}, {"messages": TURNS}
NESTED = {"message_tree_id": "t", "prompt": {"text": "the cat", "role": "prompter", "replies": [
    {"text": "no", "role": "assistant", "rank": 1, "replies": []},
    {"text": "yes", "role": "assistant", "rank": 0, "replies": [{"text": "a book", "role": "prompter", "replies": [
        {"text": "long", "role": "assistant", "replies": []}]}]}]}}
TEXTS = {
    "alpaca with input": ("alpaca", ADD, f"<s>{ALPACA_INPUT}### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n⟦3</s>⟧"),
    "alpaca without": ("alpaca", SAY, f"<s>{ALPACA}### Instruction:\nSay yes\n\n### Response:\n⟦yes</s>⟧"),
    "alpaca, two turns": ("alpaca", TWO, "<s>Brief.\n\n### Instruction:\nthe cat\n\n### Response:\n⟦yes</s>⟧\n\n### Instruction:\na book\n\n"
                          "### Response:\n⟦x=no</s>⟧"),
    "oasst": ("oasst", TWO, "<s><|system|>Brief.</s><|prompter|>the cat</s><|assistant|>⟦yes</s>⟧<|prompter|>a book</s><|assistant|>⟦x=no</s>⟧"),
    "oasst of a nested tree": ("oasst", NESTED, "<s><|prompter|>the cat</s><|assistant|>⟦yes</s>⟧<|prompter|>a book</s><|assistant|>⟦long</s>⟧"),
    "chatml": ("chatml", TWO, "<s><|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
               "<|im_start|>user\na book<|im_end|>\n<|im_start|>assistant\n⟦x=no<|im_end|>⟧\n"),
    "chatml by default, with an input": (None, ADD, "<s><|im_start|>user\nAdd\n\n1 2<|im_end|>\n<|im_start|>assistant\n⟦3<|im_end|>⟧\n"),
    "a pair is one exchange": (None, {"prompt": "2 +", "completion": "4"}, "<s><|im_start|>user\n2 +<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n"),
    "other names of the roles": (None, {"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]},
                                 "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"),
    "plain": ("plain", TWO, "<s>Brief.\nthe cat\n⟦yes</s>⟧a book\n⟦x=no</s>⟧"),
    "text": (None, {"text": "the cat reads"}, "<s>⟦the cat reads</s>⟧"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_record_becomes_this_text_with_these_targets(prepare, name):
    template, record, expected = TEXTS[name]
    assert shown(prepare([record], template=template)) == expected


def test_golden_ids(prepare):
    """Of the fixture's tokenizer: 1 begins, 2 ends, 283 and 284 are chatml's, 261 'yes', 201 a newline."""
    ids, is_target = document(prepare([chat("the cat", "yes")]))
    user, assistant = [87, 85, 71, 84], [67, 85, 85, 75, 85, 86, 67, 80, 86]
    assert ids == [1, 283, *user, 201, 272, 277, 284, 201, 283, *assistant, 201, 261, 284, 201]
    assert is_target == [False] * 22 + [True, True, False]
    ids, is_target = document(prepare([{"prompt": "the cat", "completion": " yes"}], raw_prompt=True))
    assert (ids, is_target) == ([1, 272, 277, 275, 2], [False, False, False, True, True])


def test_the_tokenizers_own_template_is_used_and_its_end_token_trained(mount, prepare):
    set_template(mount, OWN)
    job = prepare([{"messages": TURNS}])
    assert (job.template, job.end) == ("tokenizer", "</s>")
    assert shown(job) == ("<s><|system|>\nBrief.</s>\n<|user|>\nthe cat</s>\n<|assistant|>\n⟦yes</s>⟧\n<|user|>\na book</s>\n<|assistant|>\n"
                          "⟦x=no</s>⟧\n")


def test_a_flat_file_and_a_nested_one_of_the_same_tree_are_the_same_document(mount, prepare):
    """The order of the lines does not matter; a message whose parent is missing is left out and counted."""
    expected = document(prepare([NESTED], template="oasst"))
    lines = [("4", "3", "assistant", "long", None), ("3", "2", "prompter", "a book", None), ("2", "1", "assistant", "yes", 0),
             ("5", "1", "assistant", "no", 1), ("1", None, "prompter", "the cat", None), ("6", "9", "assistant", "lost", 0)]
    keys = ("message_id", "parent_id", "role", "text", "rank")
    (mount / "data" / "flat.jsonl").write_text("\n".join(json.dumps({**dict(zip(keys, line)), "message_tree_id": "1"}) for line in lines))
    (mount / "data" / "flat.eval.jsonl").write_text(json.dumps({"text": "a"}))
    job = prepare([NESTED], data="flat", template="oasst")
    assert document(job) == expected and job.data_sets[0].counts["train"] == 1
    assert job.data_sets[0].counts["messages without their parent"] == 1


@pytest.mark.parametrize("template", ["alpaca", "oasst", "chatml", "plain", None])
def test_what_is_trained_before_a_reply_is_what_the_saved_tokenizer_renders_for_a_chat(mount, prepare, template, tmp_path):
    """C3: one begin token, and the ids before each run of targets are apply_chat_template's with add_generation_prompt."""
    if template is None:
        set_template(mount, OWN)
    job = prepare([{"messages": TURNS}], template=template)
    job.tokenizer.save_pretrained(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids, is_target = document(job)
    assert ids.count(saved.bos_token_id) == 1 and ids[0] == saved.bos_token_id
    starts = [t for t in range(1, len(ids)) if is_target[t] and not is_target[t - 1]]
    assert len(starts) == 2
    for start, n_messages in zip(starts, (2, 4)):
        prompt = saved.apply_chat_template(TURNS[:n_messages], tokenize=True, return_dict=False, add_generation_prompt=True)
        assert prompt == ids[:start]


@pytest.mark.parametrize("template", ["alpaca", "oasst", "chatml", "plain"])
def test_targets_are_exactly_the_replies_each_with_its_end_token(prepare, template):
    """C1, on 60 random conversations, with system messages and up to three turns."""
    rng, words = np.random.default_rng(0), "the cat reads a long book yes no é 7".split()
    def text():
        return " ".join(rng.choice(words, rng.integers(1, 8)))
    records = []
    for i in range(60):
        messages = [{"role": "system", "content": text()}] if i % 3 == 0 else []
        for _ in range(1 + i % 3):
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        records.append({"messages": messages})
    job = prepare(records, template=template)
    end = job.tokenizer.convert_tokens_to_ids(job.end)
    for n, record in enumerate(records):
        ids, is_target = document(job, n)
        replies = [m["content"] for m in record["messages"] if m["role"] == "assistant"]
        labels = [i for i, target in zip(ids, is_target) if target]
        assert labels.count(end) == len(replies)
        assert job.tokenizer.decode(labels) == "".join(reply + job.end for reply in replies)
        for t in range(1, len(ids)):  # a run of targets begins with the reply's first token
            if is_target[t] and not is_target[t - 1]:
                assert replies.pop(0).startswith(job.tokenizer.decode([ids[t]]).strip("�"))


def test_an_end_token_that_is_also_the_padding_is_trained_all_the_same(prepare):
    """C2."""
    job = prepare([chat("the cat", "yes")], template="plain", pad_token="</s>")
    assert job.tokenizer.pad_token_id == job.tokenizer.eos_token_id
    assert shown(job) == "<s>the cat\n⟦yes</s>⟧"
    batch = sft_causal.collate([[0]], job.data_sets[0].tokens["train"], 2)
    assert batch["target_ids"].tolist() == [261, 2] and batch["target_index"].tolist() == [4 - 1, 5 - 1]


def test_targets_last_and_all(prepare):
    assert shown(prepare([{"messages": TURNS}], template="oasst", targets="last")) == (
        "<s><|system|>Brief.</s><|prompter|>the cat</s><|assistant|>yes</s><|prompter|>a book</s><|assistant|>⟦x=no</s>⟧")
    assert shown(prepare([chat("the cat", "yes")], template="oasst", targets="all")) == "<s>⟦<|prompter|>the cat</s><|assistant|>yes</s>⟧"


def test_what_follows_the_last_reply_is_left_out(prepare):
    job = prepare([{"messages": [*TURNS, {"role": "user", "content": "never answered"}]}, {"messages": TURNS}], template="oasst")
    assert document(job, 0) == document(job, 1)


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_template_that_rewrites_history_is_refused_and_its_last_turn_can_be_trained(mount, prepare, refusal):
    set_template(mount, FORGETS)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x=yes"}, *TURNS[3:]]
    error = refusal([{"messages": turns}])
    assert "turn 2 in another way once others follow" in error and "--targets last" in error
    assert shown(prepare([{"messages": turns}], targets="last")) == "[user]a</s>[assistant]yes</s>[user]a book</s>[assistant]⟦x=no</s>⟧"


def test_a_template_without_an_end_token_or_with_one_of_several_pieces_is_refused(mount, refusal):
    """C7."""
    for end in ("", "<END>"):
        set_template(mount, "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '" + end + "\\n' }}{% endfor %}"
                     "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
        error = refusal([chat("a", "b")])
        assert "writes no end token after an assistant turn" in error and "--template" in error


def test_a_prompt_that_a_chat_would_tokenise_otherwise_is_refused(mount, refusal, prepare):
    """A reply that begins with newlines, where the tokenizer joins two of them: the template's newline and the reply's would be one token."""
    import tokenizers
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(["a\n\n\nb"] * 50, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    assert len(tokenizer("a\n\n\nb").input_ids) == 4
    tokenizer.save_pretrained(mount / "models" / "llama")
    error = refusal([chat("a", "yes"), chat("a", "\n\nb")])
    assert "own.json, train[1]: a token reaches over the border of prompt and reply" in error and "train[0]" not in error
    assert shown(prepare([chat("a", "b\n\n\nb")], template="oasst")).endswith("<|assistant|>⟦b\n\n\nb</s>⟧")


def test_ids_that_are_not_the_templates_are_refused(prepare, refusal, monkeypatch):
    """The check on the first 100 documents, with the template rendered otherwise for training than for the chat."""
    real = sft_causal.render
    monkeypatch.setattr(sft_causal, "render", lambda *a: real(*a).replace("<s>", "<s><s>"))
    assert "train[0]: its ids are not those of apply_chat_template" in refusal([chat("a", "b")])


@pytest.mark.parametrize("record", [chat("say </s>", "b"), chat("a", "<|im_end|>"), {"text": "x<s>y"}, {"prompt": "<pad>", "completion": "b"}])
def test_special_tokens_inside_the_text_are_refused_with_their_place(refusal, record):
    error = refusal([chat("a", "b"), record])
    assert re.search(r"own.json, train\[1\]: the text holds the special token '(</s>|<\|im_end\|>|<s>|<pad>)'", error)


BAD = [({"messages": [{"role": "user", "content": "a"}]}, "no message of the role 'assistant'"),
       ({"messages": "a"}, "'messages' is no list"),
       ({"messages": [{"role": "user", "content": 7}, {"role": "assistant", "content": "b"}]}, "messages[0] has no 'role' and 'content' that are strings"),
       ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "messages[1]: the assistant's 'content' is empty"),
       ({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "c"}, {"role": "assistant", "content": "b"}]}, "tool"),
       ({"instruction": "a", "output": ""}, "'output' is empty"), ({"instruction": "a"}, "no 'output'"), ({"instruction": 5, "output": "b"}, "'instruction' is a int"),
       ({"instruction": "a", "input": 5, "output": "b"}, "'input' is a int"), ({"prompt": "a", "completion": None}, "no 'completion'"),
       ({"prompt": "a", "completion": 4}, "'completion' is a int"), ({"text": ""}, "'text' is empty"), ({"question": "a"}, "none of the known formats"),
       (chat("a", "b\ud800"), "half a character"), ("text", "a str, expected an object")]


def test_everything_that_is_wrong_is_reported_at_once_with_its_place(refusal):
    """The template is oasst, which knows three roles."""
    error = refusal([chat("a", "b"), chat("a", "b")] + [record for record, _ in BAD], template="oasst", top_p=3)
    for i, (_, message) in enumerate(BAD, 2):
        line = next((line for line in error.splitlines() if f"own.json, train[{i}]: " in line), "")
        assert message in line, (i, message, line)
    assert "--top_p 3" in error and "train[0]" not in error and "train[1]" not in error


def test_lines_are_numbered(mount, refusal):
    (mount / "data" / "lines.jsonl").write_text('{"text": "a"}\n\nnot json\n{"text": 5}\n{"text": "b", "split": "evaluation"}\n')
    error = refusal([chat("a", "b")], data="lines")
    assert "lines.jsonl, line 3: not JSON" in error and "lines.jsonl, line 4: 'text' is a int" in error and "line 5: split 'evaluation'" in error


def test_malformed_trees_are_left_out_or_reported(mount, prepare, refusal):
    trees = [{"prompt": {"text": "a", "role": "prompter", "replies": replies}} for replies in
             (None, [None], [{"text": 5, "role": "assistant"}], [{"text": "b", "role": "prompter"}], [{"text": "b", "role": "assistant", "deleted": True}])]
    job = prepare([NESTED, NESTED, *trees], template="oasst")
    assert job.data_sets[0].counts["train"] == 2 and job.data_sets[0].counts["trees without a usable thread"] == 5
    nodes = [{"message_id": "1", "parent_id": None, "role": "prompter", "text": "a"}] * 2
    assert "own.json, train[1]: 'message_id' '1'" in refusal(nodes)


@pytest.mark.parametrize("kind", ["pad", "eos"])
def test_a_missing_token_names_its_flag_and_the_flag_helps(mount, prepare, refusal, kind):
    path = mount / "models" / "llama" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config[f"{kind}_token"]
    path.write_text(json.dumps(config))
    error = refusal([chat("a", "b")])
    assert f"the tokenizer has no {kind} token" in error and f"--{kind}_token TEXT" in error
    job = prepare([chat("a", "b")], template="plain", **{f"{kind}_token": "<|new|>"})
    assert getattr(job.tokenizer, f"{kind}_token_id") == len(bpe_tokenizer()) and job.new_ids == [len(bpe_tokenizer())]
    assert shown(job) == "<s>a\n⟦b" + ("<|new|>⟧" if kind == "eos" else "</s>⟧")


def test_encoder_decoders_and_encoders_are_refused(mount, refusal):
    write_model(mount / "models" / "t5")
    assert "is a t5: expected a decoder-only language model" in refusal([chat("a", "b")], model_init_name="t5")
    bpe_tokenizer().save_pretrained(mount / "models" / "bert")
    transformers.BertConfig(vocab_size=300, hidden_size=32, num_attention_heads=4).save_pretrained(mount / "models" / "bert")
    assert "is a bert: expected a decoder-only language model" in refusal([chat("a", "b")], model_init_name="bert")


@pytest.mark.parametrize("changes, message", [
    ({"n_samples": 2}, "--n_samples 2"), ({"top_p": 0.5}, "--top_p has no effect"), ({"truncation": "start", "truncated_eos": True}, "--truncated_eos"),
    ({"raw_prompt": True, "template": "plain"}, "--raw_prompt uses no template"), ({"poly_eps": 2}, "--poly_eps"),
    ({"bidirectional_prompt": True, "attention": "flex_attention"}, "--bidirectional_prompt needs a mask"),
    ({"bidirectional_prompt": True, "targets": "all"}, "--bidirectional_prompt with --targets all"), ({"max_length": 3}, "--max_length 3"),
    ({"oasst_paths": "all"}, "--oasst_paths: no effect"), ({"oasst_lang": ["en"]}, "--oasst_lang: no effect"), ({"eos_token": ""}, "--eos_token: empty"),
    ({"metric_for_best": "accuracy"}, "--metric_for_best accuracy"), ({"metric_for_best": "exact_match", "n_generate": 0}, "needs generated answers"),
    ({"neftune_alpha": -1}, "--neftune_alpha"), ({"data": ["own:9"]}, "9 of 1 training records")])
def test_flags_that_contradict_each_other_or_do_nothing_are_refused(refusal, changes, message):
    assert message in refusal([chat("a", "b")], **changes)


def test_a_length_beyond_the_models_positions_is_refused(refusal, prepare):
    long = chat("a", "the cat " * 200)
    assert "has 256 positions" in refusal([long])
    assert len(document(prepare([long], max_length=256))[0]) == 256


# ------------------------------------------------------------------------------------------------ truncation


def long_document():
    return chat(" ".join("abcdefghij"), " ".join("klmnopqrstu"))


def test_truncation_takes_an_end_and_the_mask_goes_with_its_tokens(prepare):
    whole, targets = document(prepare([long_document()], template="oasst"))
    assert (len(whole), sum(targets)) == (45, 22)
    for how, expected in (("end", (whole[:30], targets[:30])), ("start", ([1, *whole[-29:]], [False, *targets[-29:]]))):
        assert document(prepare([long_document()], template="oasst", max_length=30, truncation=how)) == expected
    ids, is_target = document(prepare([long_document()], template="oasst", max_length=30, truncated_eos=True))
    assert (ids, is_target) == (whole[:29] + [2], targets[:30])


def test_the_end_token_is_not_written_over_a_cut_prompt(prepare):
    """--truncated_eos ends replies; what was cut inside a later question keeps its last token."""
    record = {"messages": [*chat("a", "b")["messages"], *long_document()["messages"]]}
    whole, _ = document(prepare([record], template="oasst"))
    ids, is_target = document(prepare([record], template="oasst", max_length=12, truncated_eos=True))
    assert ids == whole[:12] and not is_target[-1] and sum(is_target) == 2


def test_a_document_without_a_target_left_is_dropped_and_counted_and_many_are_an_error(prepare, refusal, messages):
    """C4. The share is 1 %."""
    short, lost = chat("a", "b"), chat("the cat " * 20, "b")
    error = refusal([short] * 60 + [lost], template="oasst", max_length=20)
    assert "1 of 63 documents have no target token left after truncation" in error and "--truncation start" in error
    job = prepare([short] * 120 + [lost], template="oasst", max_length=20)
    assert job.data_sets[0].counts["train"] == 120 and len(job.data_sets[0].tokens["train"]) == 120
    assert any("1 of 123 documents have no target token left" in line and "are left out" in line for line in messages)
    assert any("1 of 123 documents are longer than --max_length 20" in line for line in messages)
    assert len(document(prepare([short] * 20 + [lost], template="oasst", max_length=20, truncation="start"), 20)[0]) == 20


def training_data(job, **changes):
    args = sft_causal.parse_args(["--data", "own", "--train_batch_size", "8", "--seed", "3"] + [
        str(word) for name, value in changes.items() for word in ([f"--{name}"] if value is True else [f"--{name}", value])])
    args.train_batch_size = changes.get("train_batch_size", 8)
    return sft_causal.TrainingData(args, job.data_sets, 32, 300, 0, False)


def test_random_windows_are_slices_of_the_document_with_a_target_and_others_each_epoch(prepare):
    job = prepare([long_document(), chat("a", "b")], template="oasst", max_length=12, truncation="random_window")
    whole, targets = document(job)
    assert len(whole) == 45  # nothing is cut before the epoch is known
    def windows(seed, epochs=40):
        data, found = training_data(job, max_length=12, truncation="random_window", seed=seed), []
        for epoch in range(epochs):
            data.start_epoch(epoch)
            ids, is_target = sft_causal.unseal(data.example(0))
            start = next(s for s in range(len(whole)) if whole[s: s + 12] == ids.tolist())
            assert is_target.tolist() == [False] + targets[start + 1: start + 12] and is_target.any()
            assert data.n_targets[0] == is_target.sum() and data.lengths[0] == 12 and data.example(1).tolist() == job.data_sets[0].tokens["train"][1].tolist()
            found.append(start)
        return found
    found = windows(3)
    # a window's first token is no target, so the first one, token 23, may stand last at the earliest
    assert targets.index(True) == 23 and min(found) >= 23 - 11 and max(found) <= 45 - 12 and len(set(found)) > 10
    assert found == windows(3) and found != windows(4)


# ------------------------------------------------------------------------------------------------ message trees


def node(text, role, replies=(), **others):
    return {"text": text, "role": role, "replies": list(replies), **others}


def tree():
    """Four answers: A with two follow-ups, B with none; probabilities of a random walk 1/4, 1/4, 1/2."""
    return {"message_tree_id": "t", "prompt": node("q", "prompter", [
        node("A", "assistant", [node("q1", "prompter", [node("A1", "assistant", lang="de")]),
                                node("q2", "prompter", [node("A2", "assistant", lang="en", labels={"quality": {"value": 0.2}})])], rank=1,
             lang="en", labels={"name": ["spam", "quality"], "value": [0.0, 0.9]}),
        node("B", "assistant", rank=0, lang="de")], lang="en")}


def paths(**changes):
    args = sft_causal.parse_args(["--data", "x"])
    vars(args).update(changes)
    return {"/".join(m["content"] for m in messages): p for p, messages in sft_causal.tree_paths(changes.pop("root", tree()["prompt"]), args)}


def test_threads_of_a_tree():
    assert paths() == {"q/B": 1.0}
    assert paths(oasst_paths="all") == {"q/A/q1/A1": 1.0, "q/A/q2/A2": 1.0, "q/B": 1.0}
    assert paths(oasst_paths="random") == {"q/A/q1/A1": 0.25, "q/A/q2/A2": 0.25, "q/B": 0.5}


def test_filtered_messages_do_not_exist_nor_do_their_replies():
    assert paths(oasst_lang=["en"]) == {"q/A": 1.0}  # its follow-ups have no language
    assert paths(oasst_lang=["de"]) == {}
    assert paths(oasst_paths="random", oasst_min_quality=0.5) == {"q/A/q1/A1": 0.25, "q/A": 0.25, "q/B": 0.5}  # A2 is bad, others have no label
    assert paths(oasst_paths="all", oasst_min_quality=0.95) == {"q/B": 1.0}
    root = tree()["prompt"]
    root["replies"][0]["deleted"] = True
    assert paths(root=root, oasst_paths="all") == {"q/B": 1.0}


def test_random_threads_follow_the_walk_change_with_the_epoch_and_repeat_with_the_seed(prepare):
    job = prepare([tree(), chat("a", "b")], template="oasst", oasst_paths="random")
    def drawn(seed, epochs):
        data, found = training_data(job, oasst_paths="random", seed=seed), []
        for epoch in range(epochs):
            data.start_epoch(epoch)
            found.append(int(data.chosen[0]))
            assert data.chosen[1] == 3
        return found
    texts = [shown(job, n).count("⟦") for n in range(3)]
    found = drawn(3, 2000)
    shares = np.bincount(found, minlength=3) / 2000
    assert sorted(texts) == [1, 2, 2]
    for share, n_replies in zip(shares, texts):
        assert share == pytest.approx({1: 0.5, 2: 0.25}[n_replies], abs=4 * (0.25 / 2000) ** 0.5)
    assert found[:50] == drawn(3, 50) != drawn(4, 50) and len(set(found)) == 3


def test_every_thread_is_an_example_of_oasst_paths_all_and_one_of_the_others(prepare):
    assert [prepare([tree()], template="oasst", oasst_paths=how).data_sets[0].counts["train"] for how in ("all", "best", "random")] == [3, 1, 1]


def test_evaluation_takes_the_likeliest_thread(prepare):
    job = prepare([tree()], template="oasst", oasst_paths="random")
    assert job.data_sets[0].records["eval"][0]["completion"] == "B" and len(job.data_sets[0].tokens["eval"]) == 1


# ------------------------------------------------------------------------------------------------ the examples of a step


def of_all_ranks(data, step, world, monkeypatch):
    """[example numbers] and target counts of each rank's forward steps."""
    found = []
    for rank in range(world):
        with monkeypatch.context() as patch:
            patch.setattr(common, "rank", lambda: rank)
            patch.setattr(common, "world_size", lambda: world)
            batches, n_targets = data.micro_batches(step)
        found += [(sorted(set(batch["target_example"].tolist())), n_targets, len(batch["target_ids"]), n_chunks) for batch, n_chunks, _ in batches]
    return found


def test_mixtures_take_exact_amounts_another_sample_each_epoch_and_ranks_share_none(mount, prepare, monkeypatch):
    for name, size in (("one", 40), ("two", 22)):
        (mount / "data" / f"{name}.json").write_text(json.dumps({"train": [chat(f"{name} {i}", "yes " * (1 + i % 5)) for i in range(size)],
                                                                 "eval": [chat(name, "b")]}))
    job = prepare([chat("a", "b")], data=["one:0.25", "two:15"], template="plain")
    epochs = {}
    for batch, accumulation, world in ((8, 1, 1), (8, 1, 2), (2, 4, 3), (4, 2, 2)):
        data = training_data(job, train_batch_size=batch, gradient_accumulation_steps=accumulation)
        data.sizes, data.amounts = [40, 22], [0.25, 15]
        assert (data.per_epoch, data.steps_per_epoch) == (25, 4)
        for epoch in range(2):
            steps = [of_all_ranks(data, epoch * 4 + k, world, monkeypatch) for k in range(4)]
            for step in steps:
                numbers = [i for part, *_ in step for i in part]
                assert len(numbers) == len(set(numbers))
                assert {n for _, n, _, _ in step} == {sum(n for _, _, n, _ in step)}  # every rank knows the targets of the whole step
            found = [sorted(i for part, *_ in step for i in part) for step in steps]
            assert [len(numbers) for numbers in found] == [8, 8, 8, 1]
            assert epochs.setdefault(epoch, found) == found  # whatever the split and the ranks
            everything = sorted(sum(found, []))
            assert sum(i < 40 for i in everything) == 10 and sum(i >= 40 for i in everything) == 15 and len(set(everything)) == 25
    assert sorted(sum(epochs[0], [])) != sorted(sum(epochs[1], []))


def test_amounts_out_of_range_are_refused(refusal):
    for amount in ("0", "3", "0.0001"):
        assert f"own:{amount}" in refusal([chat("a", "b"), chat("c", "d")], data=[f"own:{amount}"])


def test_a_bare_alpaca_list_with_eval_fraction_keeps_duplicates_together(mount, prepare):
    records = [{"instruction": f"Say {i % 60}", "input": "", "output": f"yes {i}"} for i in range(180)]
    (mount / "data" / "bare.json").write_text(json.dumps(records))
    job = prepare([chat("a", "b")], data="bare", eval_fraction=0.2)
    data = job.data_sets[0]
    assert data.counts["train"] + data.counts["eval"] == 180 and 9 <= data.counts["eval"] <= 72 and data.counts["eval"] % 3 == 0
    assert not set(data.hashes["train"]) & set(data.hashes["eval"])


def test_evaluation_prompts_that_were_trained_are_a_warning(prepare, messages):
    prepare([chat("a", "b"), chat("c", "d")])
    assert any("2 of 2 eval prompts occur in the training data" in line for line in messages)


# ------------------------------------------------------------------------------------------------ packing, the cache


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_keeps_every_document_whole_and_once_within_the_capacity(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, 80)
    ids = rng.permutation(80)[:50]
    rows = sft_causal.best_fit(ids, lengths, 64)
    assert sorted(i for row in rows for i in row) == sorted(ids.tolist())
    assert max(lengths[row].sum() for row in rows) <= 64
    free = [64 - lengths[row].sum() for row in rows]
    assert len(rows) <= 1.23 * lengths[ids].sum() / 64 + 2 and sorted(free)[-2] < 64  # best-fit decreasing needs at most 11/9 of the optimum
    assert sft_causal.best_fit(np.arange(4), np.array([5, 4, 3, 2]), 7) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("sparse", [False, True])
def test_packed_rows_hold_each_document_once_and_cost_no_more_than_single_ones(sparse):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 100, 40)
    def cost(rows):
        S = max(int(lengths[row].sum()) for row in rows)
        return len(rows) * S * (1 if sparse else 1 + S / (4 * 32))
    for ids in (np.arange(40), np.array([7]), np.array([3, 9])):
        rows = sft_causal.pack(ids, lengths, 256, 32, sparse)
        assert sorted(i for row in rows for i in row) == ids.tolist() and max(lengths[row].sum() for row in rows) <= 256
        assert cost(rows) <= cost([[i] for i in ids])
    assert sft_causal.pack(np.empty(0, int), lengths, 256, 32, sparse) == []
    assert cost(sft_causal.pack(np.arange(40), lengths, 256, 32, sparse)) < 0.8 * cost([[i] for i in range(40)])


def test_collate_shifts_once_restarts_positions_and_has_one_token_where_there_is_no_document():
    documents = [np.array([5, ~6, ~7], np.int32), np.array([8, 9, ~10], np.int32), np.array([11, ~12], np.int32)]
    batch = {name: tensor.tolist() for name, tensor in sft_causal.collate([[0, 1], [2]], documents, 0, True, True, True).items()}
    assert batch["input_ids"] == [[5, 6, 7, 8, 9, 10], [11, 12, 0, 0, 0, 0]]
    assert batch["position_ids"] == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]]
    assert batch["document"] == [[1, 1, 1, 2, 2, 2], [1, 1, 0, 0, 0, 0]] and batch["document_length"] == [[3] * 6, [2, 2, 1, 1, 1, 1]]
    assert batch["is_prompt"] == [[True, False, False, True, True, False], [True] + [False] * 5]
    assert (batch["target_index"], batch["target_ids"], batch["target_example"]) == ([0, 1, 4, 6], [6, 7, 10, 12], [0, 0, 1, 2])
    empty = sft_causal.collate([], {}, 0, True, True, True)
    assert empty["input_ids"].tolist() == [[0]] and empty["target_index"].numel() == 0 and empty["target_ids"].dtype == empty["input_ids"].dtype


def test_tokens_are_cached_until_something_changes_them(mount, prepare, monkeypatch):
    calls, real = [], sft_causal.tokenize_data_set
    monkeypatch.setattr(sft_causal, "tokenize_data_set", lambda *a: calls.append(1) or real(*a))
    records = [chat("a", "b"), {"messages": TURNS}]
    first = document(prepare(records), 1)
    assert document(prepare(records, learning_rate=0.5, packing=True, loss="poly"), 1) == first and len(calls) == 1
    for n, changes in enumerate(({"template": "oasst"}, {"targets": "last"}, {"targets": "all"}, {"max_length": 40}, {"max_length": 40, "truncation": "start"},
                                 {"eos_token": "<|new|>"}, {"max_length": 40, "truncated_eos": True}), 2):
        job = prepare(records, **changes)
        assert len(calls) == n, changes
        assert "targets" in changes or document(job, 1)[0] != first[0] or changes == {"eos_token": "<|new|>"}
    for n, template in enumerate(("alpaca", "plain"), 9):  # neither adds a token, so the tokenizer is the same
        prepare(records, template=template)
        assert len(calls) == n
    for n, template in enumerate((OWN, OWN.replace("|>", "]")), 11):
        set_template(mount, template)
        prepare(records)
        assert len(calls) == n
    prepare(records[:1])
    assert len(calls) == 13


def test_a_refused_file_leaves_nothing_in_the_cache(prepare, refusal):
    refusal([chat("a", "b"), chat("a", "</s>")])
    assert "</s>" in refusal([chat("a", "b"), chat("a", "</s>")])
    assert shown(prepare([chat("a", "b")])).endswith("⟦b<|im_end|>⟧\n")


def test_marked_text_shows_the_targets():
    tokenizer = bpe_tokenizer()
    assert sft_causal.marked(tokenizer, *sft_causal.unseal([272, 277, ~275, ~2])) == "the cat⟦ yes</s>⟧"
    assert sft_causal.marked(tokenizer, *sft_causal.unseal([272, ~275, 277, ~2])) == "the⟦ yes⟧ cat⟦</s>⟧"
