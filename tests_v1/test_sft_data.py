"""sft_causal.py: records to ids and masks, templates, message trees, truncation, the order of examples, and what is refused."""

import collections
import json
import runpy

import numpy as np
import pytest
import transformers
from conftest import ROOT, bpe_tokenizer, flags, write_llama, write_model

import common_v1 as common
import sft_causal

WORDS = "the cat reads a long book".split()
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "a book?"}, {"role": "assistant", "content": "no"}]
ALPACA = ("Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
          "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
ALPACA_ALONE = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
                "### Instruction:\nAdd.\n\n### Response:\n")


def args_of(**changes):
    return sft_causal.parse_args([str(word) for word in flags("nowhere", model_init_name="llama", data="x", **changes)])


def tokenizer_with(template="chatml", **options):
    """(tokenizer, end token, problems): a fresh one on which --template has been set."""
    own = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", **options}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=type(bpe_tokenizer().backend_tokenizer).from_str(bpe_tokenizer().backend_tokenizer.to_str()),
        **{name: token for name, token in own.items() if token})
    args, problems = args_of(template=template), []
    sft_causal.set_tokens(args, tokenizer, problems)
    name, end = sft_causal.set_template(args, tokenizer, problems) if not problems else (None, None)
    return tokenizer, end, problems


def encoded(tokenizer, end, record, template="chatml", **changes):
    """[(ids, is_target, tokens before each reply)] of a record; an error text where there is one."""
    args = args_of(template=template if not changes.get("raw_prompt") else "auto", **changes)
    conversations, _, wrong = sft_causal.to_conversations(record, args, template)
    return wrong or sft_causal.encode(tokenizer, [conversation for _, conversation in conversations], args, end)


def texts(tokenizer, ids, is_target):
    """The runs of targets and the runs of other tokens, as text."""
    borders = [0, *(np.flatnonzero(np.diff(is_target.astype(int))) + 1), len(ids)]
    parts = [(tokenizer.decode(ids[a:b]), bool(is_target[a])) for a, b in zip(borders, borders[1:])]
    return [text for text, target in parts if target], [text for text, target in parts if not target]


# ------------------------------------------------------------------------------------------------ templates and formats


@pytest.mark.parametrize("template, record, rendered", [
    ("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, f"<s>{ALPACA}3</s>"),
    ("alpaca", {"instruction": "Add.", "input": "", "output": "3"}, f"<s>{ALPACA_ALONE}3</s>"),
    ("oasst", {"instruction": "Add.", "input": "1 2", "output": "3"}, "<s><|prompter|>Add.\n\n1 2</s><|assistant|>3</s>"),
    ("oasst", {"messages": CHAT}, "<s><|system|>Be brief.</s><|prompter|>the cat?</s><|assistant|>yes</s><|prompter|>a book?</s><|assistant|>no</s>"),
    ("chatml", {"prompt": "Add.", "completion": "3"}, "<s><|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"),
    ("chatml", {"messages": CHAT[:3]}, "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nthe cat?<|im_end|>\n"
     "<|im_start|>assistant\nyes<|im_end|>\n"),
    ("plain", {"messages": CHAT[1:]}, "<s>the cat?\nyes</s>a book?\nno</s>"),
    ("alpaca", {"messages": CHAT}, "<s>Be brief.\n\n### Instruction:\nthe cat?\n\n### Response:\nyes</s>\n\n"
     "### Instruction:\na book?\n\n### Response:\nno</s>"),
    ("chatml", {"text": "the cat"}, "<s>the cat</s>"),
    ("chatml", {"prompt": {"role": "prompter", "text": "the cat?", "replies": [{"role": "assistant", "text": "yes", "replies": []}]}},
     "<s><|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"),
])
def test_a_record_becomes_this_text_to_the_letter(template, record, rendered):
    """Ids are those of apply_chat_template; one begin token, in front."""
    tokenizer, end, problems = tokenizer_with(template)
    (ids, is_target, before), = encoded(tokenizer, end, record, template)
    assert not problems and tokenizer.decode(ids) == rendered
    assert ids.tolist().count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("template, end_token", [("alpaca", "</s>"), ("oasst", "</s>"), ("chatml", "<|im_end|>"), ("plain", "</s>")])
def test_targets_are_exactly_the_replies_and_their_end_tokens(template, end_token):
    """C1: as many end tokens among the targets as replies; the first token of a reply is one; system, user and begin token never."""
    tokenizer, end, _ = tokenizer_with(template)
    (ids, is_target, before), = encoded(tokenizer, end, {"messages": CHAT}, template)
    wanted, others = texts(tokenizer, ids, is_target)
    assert end == end_token and wanted == [f"yes{end}", f"no{end}"] and all(is_target[n] and not is_target[n - 1] for n in before)
    assert (ids[is_target] == tokenizer.convert_tokens_to_ids(end)).sum() == 2
    assert "Be brief." in "".join(others) and "a book?" in "".join(others) and not is_target[0]
    (_, last, _), = encoded(tokenizer, end, {"messages": CHAT}, template, targets="last")
    (_, every, _), = encoded(tokenizer, end, {"messages": CHAT}, template, targets="all")
    assert texts(tokenizer, ids, last)[0] == [f"no{end}"] and every.all()


@pytest.mark.parametrize("template", sft_causal.TEMPLATES)
def test_prompt_ids_are_those_that_a_reader_of_the_saved_tokenizer_gets(template, tmp_path):
    """C3, for every turn. Negative control: another conversation."""
    tokenizer, end, _ = tokenizer_with(template)
    (ids, is_target, before), = encoded(tokenizer, end, {"messages": CHAT}, template)
    tokenizer.save_pretrained(tmp_path)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path)

    def prompt(messages):
        return reader.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert [prompt(CHAT[:2]), prompt(CHAT[:4])] == [ids[:n].tolist() for n in before]
    assert reader.apply_chat_template(CHAT, tokenize=True, return_dict=False) == ids.tolist()
    assert prompt(CHAT[:1] + CHAT[3:4]) != ids[:before[0]].tolist()
    assert sft_causal.check_ids(tokenizer, CHAT, ids, before, "assistant") is None
    assert "apply_chat_template" in sft_causal.check_ids(tokenizer, CHAT, ids[1:], before, "assistant")
    assert "other ids alone" in sft_causal.check_ids(tokenizer, CHAT, ids, [before[0] + 1, before[1]], "assistant")


def test_the_end_token_is_a_target_although_padding_has_its_id():
    """C2."""
    tokenizer, end, problems = tokenizer_with("plain", pad_token="</s>")
    (ids, is_target, _), = encoded(tokenizer, end, {"prompt": "the cat?", "completion": "yes"}, "plain")
    assert not problems and tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids(end) == ids[-1] and is_target[-1]
    batch = sft_causal.collate([[0], [1]], [sft_causal.seal(ids, is_target), sft_causal.seal(ids[:4], np.arange(4) > 2)], tokenizer.pad_token_id)
    assert (batch["target_ids"] == tokenizer.pad_token_id).sum() == 1 and len(batch["target_ids"]) == is_target.sum() + 1


def test_raw_prompts_are_joined_as_they_are_and_the_completion_is_trained():
    tokenizer, end, _ = tokenizer_with("chatml")
    (ids, is_target, before), = encoded(tokenizer, end, {"prompt": "a:", "completion": " yes"}, raw_prompt=True)
    assert tokenizer.decode(ids) == "<s>a: yes</s>" and texts(tokenizer, ids, is_target)[0] == [" yes</s>"] and before == [int((~is_target).sum())]
    assert ids[: before[0]].tolist() == tokenizer("a:").input_ids


def test_plain_texts_and_chats_of_one_block_keep_their_places():
    tokenizer, end, _ = tokenizer_with()
    block = [("", "the cat"), CHAT, ("a:", " yes"), CHAT[1:3], [{"role": "user", "content": "<s>"}, CHAT[2]], CHAT[:3]]
    together = sft_causal.encode(tokenizer, block, args_of(), end)
    for conversation, found in zip(block, together, strict=True):
        alone, = sft_causal.encode(tokenizer, [conversation], args_of(), end)
        assert str(alone) == str(found)
    assert len({str(found) for found in together}) == len(block) and "special token" in together[4]


def test_other_names_of_roles_are_understood_and_what_follows_the_last_reply_is_left_out():
    human = [{"role": role, "content": message["content"]} for role, message in zip(("system", "human", "gpt", "prompter", "bot"), CHAT)]
    assert sft_causal.clean_messages([*human, {"role": "user", "content": "unanswered"}]) == (CHAT, None)
    assert sft_causal.clean_messages(CHAT[:2])[0] is None


def test_no_begin_token_where_the_tokenizer_puts_none_in_front():
    tokenizer, problems = tokenizer_with()[0], []
    tokenizer.backend_tokenizer.post_processor = type(tokenizer.backend_tokenizer.post_processor)("$A", "$A $B", [])
    _, end = sft_causal.set_template(args_of(template="chatml"), tokenizer, problems)
    for record, start in (({"messages": CHAT[1:3]}, "<|im_start|>user"), ({"text": "the cat"}, "the cat</s>")):
        (ids, _, _), = encoded(tokenizer, end, record)
        assert tokenizer.bos_token == "<s>" and tokenizer.decode(ids).startswith(start)


def test_a_missing_token_is_named_with_its_flag_and_given_by_it():
    for name, flag in (("pad_token", "--pad_token"), ("eos_token", "--eos_token")):
        _, _, problems = tokenizer_with(**{name: None})
        assert len(problems) == 1 and flag in problems[0]
    tokenizer, problems = tokenizer_with(pad_token=None)[0], []
    sft_causal.set_tokens(args_of(pad_token="<fill>", sep_token="<sep>"), tokenizer, problems)
    assert not problems and tokenizer.pad_token == "<fill>" and tokenizer.convert_tokens_to_ids("<fill>") >= 283
    sft_causal.set_template(args_of(template="plain"), tokenizer, problems)
    assert sft_causal.render(tokenizer, CHAT[1:3]) == "<s>the cat?<sep>yes</s>"


@pytest.mark.parametrize("template, words", [
    ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "writes no end token"),
    ("{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}", "writes no end token"),  # C7: not one id
    ("{{ raise_exception('never') }}", "fails on a plain exchange")])
def test_a_template_that_teaches_no_end_is_refused(template, words):
    tokenizer, problems = tokenizer_with()[0], []
    tokenizer.chat_template = template
    assert sft_causal.set_template(args_of(), tokenizer, problems)[1] is None and words in problems[0]


def test_a_template_that_rewrites_history_is_refused_naming_a_way_out_that_works():
    tokenizer, problems = tokenizer_with()[0], []
    tokenizer.chat_template = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + ('(thought)' if m['role'] == 'assistant' and loop.last "
                               "else '') + m['content'] + '<|im_end|>\n' }}{% endfor %}"
                               "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    name, end = sft_causal.set_template(args_of(), tokenizer, problems)
    found, = sft_causal.encode(tokenizer, [CHAT], args_of(), end)
    assert not problems and "--targets last" in found and "turn 3" in found
    (ids, is_target, _), = sft_causal.encode(tokenizer, [CHAT], args_of(targets="last"), end)
    assert texts(tokenizer, ids, is_target)[0] == ["(thought)no<|im_end|>"]


def test_spelled_out_special_tokens_and_half_characters_are_refused():
    tokenizer, end, _ = tokenizer_with()
    for text, words in (("a <|im_end|> b", "'<|im_end|>'"), ("<s>strike", "'<s>'"), ("half \ud800", "half a character")):
        for record in ({"prompt": text, "completion": "yes"}, {"prompt": "a", "completion": text}, {"text": text}):
            assert words in encoded(tokenizer, end, record)[0]


def test_a_token_over_the_border_of_prompt_and_reply_is_refused():
    """A tokenizer in which two newlines are one piece, and a reply that begins with one."""
    tokenizer, end, _ = tokenizer_with()
    tokenizer.add_tokens(["\n\n"])
    assert "reaches over the border" in encoded(tokenizer, end, {"prompt": "a", "completion": "\nyes"})[0]
    assert not isinstance(encoded(tokenizer, end, {"prompt": "a", "completion": "yes"})[0], str)


# ------------------------------------------------------------------------------------------------ length


def test_truncation_cuts_where_it_says_and_the_mask_moves_with_its_tokens():
    ids, is_target = np.array([1, 5, 6, 7, 8, 2]), np.array([0, 0, 1, 0, 1, 1], bool)

    def cut(limit, how, end_id=None):
        found, mask = sft_causal.truncate(ids, is_target, limit, how, 1, end_id)
        return found.tolist(), found[mask].tolist()
    assert cut(6, "end") == (ids.tolist(), [6, 8, 2]) and cut(9, "start") == (ids.tolist(), [6, 8, 2])
    assert cut(5, "end") == ([1, 5, 6, 7, 8], [6, 8]) and cut(5, "end", 2) == ([1, 5, 6, 7, 2], [6, 2]) and cut(4, "end", 2) == ([1, 5, 6, 7], [6])
    assert cut(4, "start") == ([1, 7, 8, 2], [8, 2]) and cut(3, "start") == ([1, 8, 2], [8, 2])
    assert sft_causal.truncate(ids[1:], is_target[1:], 2, "start", 1, None)[0].tolist() == [8, 2]
    assert sft_causal.truncate(ids[1:], is_target[1:], 2, "start", 1, None)[1].tolist() == [False, True]  # nothing comes before the first
    assert [list(part) for part in sft_causal.unseal(sft_causal.seal(ids, is_target))] == [ids.tolist(), is_target.tolist()]


def test_random_windows_always_hold_a_target_and_reach_every_one():
    is_target, seen = np.zeros(40, bool), collections.Counter()
    is_target[[3, 20, 39]] = True
    for i in range(300):
        start, n = sft_causal.random_window(is_target, 8, np.random.default_rng(i))
        assert 0 <= start <= 32 and n == is_target[start + 1: start + 8].sum() > 0
        seen.update(t for t in (3, 20, 39) if start < t < start + 8)
    assert set(seen) == {3, 20, 39}


@pytest.mark.parametrize("limit", [50, 70, 110])
def test_packed_rows_never_reach_over_max_length_however_wide_rows_pay(limit):
    """A huge model: attention costs nothing beside the rest, so fewer paddings win and rows grow up to the limit. A tiny one: they do not."""
    lengths = np.random.default_rng(limit).integers(2, 50, 30)
    huge, tiny = (sft_causal.pack(np.arange(30), lengths, limit, width, False) for width in (10**6, 1))
    for rows in (huge, tiny):
        assert sorted(i for row in rows for i in row) == list(range(30)) and max(lengths[row].sum() for row in rows) <= limit
    assert len(huge) <= len(tiny)
    with_room = sft_causal.pack(np.arange(30), np.full(30, 10), 300, 1, True)  # sparse: one row takes all
    assert len(with_room) == 1


# ------------------------------------------------------------------------------------------------ message trees


def node(text, role="assistant", replies=(), **more):
    return {"text": text, "role": role, "replies": list(replies), **more}


TREE = node("q", "prompter", [
    node("worse", rank=1, lang="en", replies=[node("more?", "prompter", [node("more", lang="en")], lang="en"),
                                              node("unanswered", "prompter", lang="en")]),
    node("best", rank=0, lang="en", labels={"name": ["quality"], "value": [0.3]}),
    node("unranked", lang="de", labels={"quality": {"value": 0.9, "count": 3}}),
    node("gone", rank=-1, deleted=True, lang="en")], lang="en")


def threads(**changes):
    return {tuple(message["content"] for message in messages): round(probability, 4)
            for probability, messages in sft_causal.tree_paths(TREE, args_of(**changes))}


def test_threads_of_a_tree():
    """best: lowest rank, not the deleted one; all: every leaf, an unanswered question ends with the reply before it; random: by its walk."""
    assert threads() == {("q", "best"): 1.0}
    assert threads(oasst_paths="all") == {("q", "worse", "more?", "more"): 1.0, ("q", "worse"): 1.0, ("q", "best"): 1.0, ("q", "unranked"): 1.0}
    assert threads(oasst_paths="random") == {("q", "worse", "more?", "more"): 0.1667, ("q", "worse"): 0.1667,
                                             ("q", "best"): 0.3333, ("q", "unranked"): 0.3333}
    assert threads(oasst_paths="all", oasst_lang=["en"]).keys() == {("q", "worse", "more?", "more"), ("q", "worse"), ("q", "best")}
    assert threads(oasst_min_quality=0.5) == {("q", "worse", "more?", "more"): 1.0}
    assert threads(oasst_lang=["de"]) == {}


def test_flat_messages_grow_the_nested_tree_and_orphans_are_counted():
    flat, problems = [], []

    def flatten(tree, parent):
        own = {name: value for name, value in tree.items() if name != "replies"}
        flat.append(("here", "train", {**own, "message_id": f"m{len(flat)}", "parent_id": parent, "message_tree_id": "t"}))
        own_id = flat[-1][2]["message_id"]
        for reply in tree["replies"]:
            flatten(reply, own_id)
    flatten(TREE, None)
    flat.append(("here", "train", {"message_id": "x", "parent_id": "nowhere", "text": "lost", "role": "assistant"}))
    roots, n_orphans = sft_causal.grow_trees(flat, problems)
    assert n_orphans == 1 and len(roots) == 1 and not problems
    for paths in ("best", "all"):
        nested = sft_causal.tree_paths(TREE, args_of(oasst_paths=paths))
        assert sft_causal.tree_paths(roots[0][2]["prompt"], args_of(oasst_paths=paths)) == nested


# ------------------------------------------------------------------------------------------------ whole data sets


def records(n, longest=6):
    return [{"prompt": f"{' '.join(WORDS[: 1 + i % 5])} {i}", "completion": " ".join(WORDS[: 1 + i % longest])} for i in range(n)]


@pytest.fixture
def sft_mount(tmp_path):
    write_llama(tmp_path / "models" / "llama")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_text(json.dumps({"train": records(43), "eval": records(3)}))
    alpaca = [{"instruction": f"the cat {i}", "output": str(i)} for i in range(20)]  # a bare list, as it is published
    (tmp_path / "data" / "b.json").write_text(json.dumps(alpaca))
    return tmp_path


def training_data(mount, **changes):
    args, problems = sft_causal.parse_args([str(w) for w in flags(mount, model_init_name="llama", **{"data": "a", **changes})]), []
    _, config, tokenizer = common.open_model_folder(args, problems)
    sft_causal.set_tokens(args, tokenizer, problems)
    template, end = sft_causal.set_template(args, tokenizer, problems)
    data_sets = sft_causal.load_data(args, tokenizer, template, end, problems)
    assert not problems
    return sft_causal.TrainingData(args, data_sets, 32, 300, tokenizer.pad_token_id, False), data_sets, tokenizer


def test_the_same_step_gets_the_same_examples_for_any_split_and_ranks_share_them_out(sft_mount, monkeypatch):
    def ids(**changes):
        data = training_data(sft_mount, **changes)[0]
        return [data.step_ids(k).tolist() for k in range(12)]
    a = ids(train_batch_size=8)
    assert a == ids(train_batch_size=2, gradient_accumulation_steps=4) and a != ids(train_batch_size=8, seed=1) and a[:6] != a[6:]
    assert sorted(i for batch in a[:6] for i in batch) == list(range(43))
    monkeypatch.setattr(common, "chunk_tokens", lambda vocabulary: 7)
    for world in (2, 3):
        data, seen, targets, chunks = training_data(sft_mount, train_batch_size=12, gradient_accumulation_steps=2)[0], [], set(), set()
        monkeypatch.setattr(common, "world_size", lambda: world)
        for rank in range(world):
            monkeypatch.setattr(common, "rank", lambda: rank)
            batches, n_targets = data.micro_batches(1)
            targets.add(n_targets)
            chunks.add(tuple(n_chunks for _, n_chunks, _ in batches))
            assert all(len(batch["target_ids"]) <= 7 * n_chunks for batch, n_chunks, _ in batches)
            seen += [int(i) for batch, _, _ in batches for i in sorted(set(batch["target_example"].tolist()))]
        assert sorted(seen) == sorted(data.step_ids(1).tolist()) and len(targets) == 1  # disjoint, and none is missing
        assert len(chunks) == 1 and max(max(n) for n in chunks) > 1  # or ZeRO-3 would wait for ever: every rank calls the head equally often


def test_mixtures_take_exact_counts_and_another_sample_each_epoch(sft_mount):
    data, data_sets, _ = training_data(sft_mount, data=["a:0.5", "b:7"], eval_fraction=0.2, train_batch_size=64)
    n_a, n_b = (d.counts["train"] for d in data_sets)
    epochs = [data.step_ids(k) for k in range(4)]
    for ids in epochs:
        assert (ids < n_a).sum() == round(0.5 * n_a) and (ids >= n_a).sum() == 7 and len(set(ids.tolist())) == len(ids)
    assert len({tuple(sorted(ids.tolist())) for ids in epochs}) == 4
    assert data_sets[1].counts["eval"] + n_b == 20 and n_b < 20  # a bare list, part of which is held out


def test_evaluation_rows_keep_their_prompt_their_reply_and_their_record(sft_mount):
    """Of a tree: its likeliest thread, the second of these three, in evaluation; all of them in training."""
    tree = node("q", "prompter", [node("once", replies=[node("x?", "prompter", [node("x1"), node("x2")])]), node("often")])
    rows = [{"messages": CHAT, "note": 5, "split": "eval"}, {"prompt": "a", "completion": "b", "split": "test"},
            {"prompt": tree, "message_tree_id": "t", "split": "eval"}, {"prompt": tree, "message_tree_id": "t"},
            {"prompt": tree, "message_tree_id": "u", "tree_state": "aborted_low_grade"}]
    (sft_mount / "data" / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, (data,), tokenizer = training_data(sft_mount, data="c", oasst_paths="random")
    chat, thread = data.records["eval"]
    assert chat["prompt"] == CHAT[:-1] and chat["completion"] == "no" and chat["orig_d"]["note"] == 5
    assert thread == {"prompt": [{"role": "user", "content": "q"}], "completion": "often", "orig_d": {"message_tree_id": "t"}}
    assert data.prompt["eval"][0].tolist() == tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True, return_dict=False)
    assert [record["completion"] for record in data.records["test"]] == ["b"] and len(data.tokens["eval"]) == 2
    assert len(data.tokens["train"]) == 3 and np.diff([0, *data.edges["train"]]) == pytest.approx([0.25, 0.25, 0.5])
    assert data.counts["train"] == 1 and data.counts["trees without a usable thread"] == 1


def test_answers_to_one_prompt_are_not_held_out_apart_and_known_evaluation_prompts_are_warned_of(sft_mount, messages):
    """--eval_fraction splits by prompt: its answer stands nowhere in the training data. Control: a prompt given in both lists is counted."""
    twice = [{"prompt": f"the cat {i % 40}", "completion": str(i)} for i in range(80)]
    (sft_mount / "data" / "d.json").write_text(json.dumps(twice))
    _, (data,), _ = training_data(sft_mount, data="d", eval_fraction=0.3)
    train, held = set(data.hashes["train"]), set(data.hashes["eval"])
    assert held and train and not held & train and len(held | train) == 40 and len(data.hashes["eval"]) == 2 * len(held)
    assert not any("occur in the training data" in line for line in messages)
    (sft_mount / "data" / "e.json").write_text(json.dumps({"train": twice, "eval": [*twice[:1], {"prompt": "a dog?", "completion": "no"}]}))
    training_data(sft_mount, data="e")
    assert any("e: 1 of 2 eval prompts occur in the training data" in line for line in messages)


def test_random_threads_and_windows_are_functions_of_seed_and_epoch(sft_mount):
    trees = [{"message_tree_id": str(i), "prompt": node(f"{i}", "prompter", [node(" ".join(WORDS) * k) for k in (1, 20, 40)])} for i in range(30)]
    (sft_mount / "data" / "trees.jsonl").write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    options = {"data": "trees", "oasst_paths": "random", "truncation": "random_window", "max_length": 40, "train_batch_size": 64,
               "eval_fraction": 0.2}

    def drawn(epoch, **changes):
        data = training_data(sft_mount, **{**options, **changes})[0]
        data.start_epoch(epoch)
        rows = [data.example(i) for i in range(len(data.chosen))]
        assert all(len(row) == data.lengths[i] <= 40 and (row < 0).sum() == data.n_targets[i] > 0 and row[0] >= 0 for i, row in enumerate(rows))
        return data.chosen.tolist(), [row.tolist() for row in rows]
    assert drawn(0) == drawn(0) and drawn(0)[0] != drawn(1)[0] and drawn(0)[1] != drawn(1)[1] and drawn(0) != drawn(0, seed=1)
    long = {"data": "long", "oasst_paths": "best"}
    (sft_mount / "data" / "long.json").write_text(json.dumps([{"prompt": str(i), "completion": " ".join(WORDS) * 3} for i in range(30)]))
    first, again, second = drawn(0, **long), drawn(0, **long), drawn(1, **long)
    assert first == again and first[0] == second[0] and first[1] != second[1]  # one document each, another window of it
    picks = np.array([drawn(epoch)[0] for epoch in range(40)])
    shares = np.bincount((picks % 3).ravel(), minlength=3) / picks.size  # three threads of each tree, equally likely
    assert abs(shares - 1 / 3).max() < 0.06


def test_documents_without_a_target_are_dropped_aloud_and_refused_above_one_percent(sft_mount, run_sft, capsys):
    """C4. 1 of 101 and 2 of 101."""
    for n_long in (1, 2):
        some = [*records(101 - n_long), *({"prompt": "the cat " * 60 + str(i), "completion": "yes"} for i in range(n_long))]
        (sft_mount / "data" / f"long{n_long}.json").write_text(json.dumps({"train": some, "eval": records(2)}))
    assert run_sft(flags(sft_mount, model_init_name="llama", data="long1", max_length=40, max_steps=1, n_generate=0)) == 0
    assert "1 of 103 documents have no target token left" in capsys.readouterr().err
    assert run_sft(flags(sft_mount, "other", model_init_name="llama", data="long2", max_length=40, max_steps=1)) == 2
    assert "2 of 103 documents have no target token left" in capsys.readouterr().err
    kept = {"truncation": "start", "max_steps": 1, "n_generate": 0}
    assert run_sft(flags(sft_mount, "third", model_init_name="llama", data="long2", max_length=40, **kept)) == 0


def test_everything_that_is_wrong_is_reported_at_once_before_the_model_loads(sft_mount, run_sft, capsys, monkeypatch):
    lines = {'{"instruction": "a", "output": ""}': "'output' is empty",
             '{"messages": [{"role": "user", "content": "x"}]}': "no message of the role 'assistant'",
             '{"messages": "x"}': "no list of objects", '{"prompt": "a"}': "no 'completion'", '{"foo": 1}': "none of the known formats",
             "not json": "not JSON",
             '{"prompt": "a", "completion": "x<|im_end|>y"}': "special token '<|im_end|>'", '{"text": 5}': "expected a string",
             '{"instruction": "a", "input": 7, "output": "b"}': "'input' is a int",
             '{"prompt": "a", "completion": "b", "split": "dev"}': "split 'dev'",
             '{"prompt": "a", "completion": "\\ud800"}': "half a character",
             '{"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "y"}]}': "messages[0] has no"}
    (sft_mount / "data" / "bad.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(common, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert run_sft(flags(sft_mount, model_init_name="llama", data="bad", max_length=3, poly_eps=2.0)) == 2
    out = capsys.readouterr().err
    for number, words in enumerate(lines.values(), 1):
        line, = [line for line in out.splitlines() if f"bad.jsonl, line {number}:" in line]
        assert words in line
    assert "--max_length 3" in out and "--poly_eps 2.0" in out
    (sft_mount / "data" / "flat.jsonl").write_text('{"message_id": "1", "text": "hi", "role": "prompter"}\n' * 2)
    assert run_sft(flags(sft_mount, model_init_name="llama", data="flat")) == 2 and "no other message has" in capsys.readouterr().err


@pytest.mark.parametrize("changes, words", [
    ({"oasst_paths": "all"}, "no OpenAssistant tree"), ({"truncated_eos": True, "truncation": "start"}, "no effect"), ({"n_samples": 3}, "greedy"),
    ({"raw_prompt": True, "template": "alpaca"}, "uses no template"), ({"bidirectional_prompt": True, "targets": "all"}, "must not see"),
    ({"metric_for_best": "exact_match", "n_generate": 0}, "generated answers"), ({"metric_for_best": "rouge"}, "expected one of loss"),
    ({"data": "a:900"}, "of 43 training records"), ({"data": "b"}, "no evaluation records"), ({"model_init_name": "tiny"}, "seq2seq.py"),
    ({"model_init_name": "short"}, "has 16 positions")])
def test_refused(sft_mount, run_sft, capsys, changes, words):
    write_model(sft_mount / "models" / "tiny")
    write_llama(sft_mount / "models" / "short", max_position_embeddings=16)
    assert run_sft(flags(sft_mount, **{"model_init_name": "llama", "data": "a", **changes})) == 2 and words in capsys.readouterr().err


def test_the_cache_is_used_again_and_not_for_another_template(sft_mount, monkeypatch):
    made, real = [], sft_causal.tokenize_data_set
    monkeypatch.setattr(sft_causal, "tokenize_data_set", lambda *inputs: made.append(1) or real(*inputs))
    for changes, n in (({}, 1), ({}, 1), ({"template": "oasst"}, 2), ({"targets": "last"}, 3), ({"show_examples": 3, "packing": True}, 3),
                       ({"template": "alpaca"}, 4), ({"template": "plain"}, 5),  # these two add no token: the tokenizer is the same
                       ({"max_length": 40}, 6), ({"max_length": 40, "truncation": "start"}, 7), ({"max_length": 40, "truncated_eos": True}, 8)):
        training_data(sft_mount, **changes)
        assert len(made) == n


def test_ids_that_are_not_the_templates_are_refused_with_their_place(sft_mount, run_sft, capsys, monkeypatch):
    """As if training rendered another text than a chat does: the first documents of a data set are compared."""
    real = sft_causal.render
    monkeypatch.setattr(sft_causal, "render", lambda *inputs: real(*inputs).replace("<s>", "<s><s>"))
    assert run_sft(flags(sft_mount, model_init_name="llama", data="a")) == 2
    assert "a.json, train[0]: its ids are not those of apply_chat_template" in capsys.readouterr().err


def test_a_refused_file_leaves_nothing_in_the_cache(sft_mount, run_sft, capsys):
    (sft_mount / "data" / "f.json").write_text(json.dumps({"train": [*records(3), {"text": "</s>"}], "eval": records(1)}))
    for _ in range(2):
        assert run_sft(flags(sft_mount, model_init_name="llama", data="f")) == 2 and "special token '</s>'" in capsys.readouterr().err


def test_orphans_of_all_files_of_a_data_set_are_counted(sft_mount):
    """The second file has none, which once was the count of both."""
    lost = {"message_id": "6", "parent_id": "9", "role": "assistant", "text": "lost"}
    (sft_mount / "data" / "g.jsonl").write_text("\n".join(json.dumps(record) for record in [lost, *records(2)]))
    (sft_mount / "data" / "g.eval.jsonl").write_text(json.dumps({"text": "a"}))
    assert training_data(sft_mount, data="g")[1][0].counts["messages without their parent"] == 1


def test_shown_examples_mark_their_targets(sft_mount, run_sft, capsys):
    assert run_sft(flags(sft_mount, model_init_name="llama", data="a", max_steps=1, n_generate=0, show_examples=1)) == 0
    assert "<|im_start|>user\nthe 0<|im_end|>\n<|im_start|>assistant\n⟦the<|im_end|>⟧" in capsys.readouterr().out


def test_the_demo_data_is_what_its_maker_makes_and_no_prompt_is_in_two_splits():
    made = runpy.run_path(ROOT / "data" / "make_instructions.py")
    found, prompts = (ROOT / "data" / "instructions.jsonl").read_text().splitlines(), collections.defaultdict(set)
    for record in map(json.loads, found):
        conversation = record.get("messages", [None])[:-1] or [record.get("instruction"), record.get("input")]
        prompts[json.dumps(conversation)].add(record.get("split", "train"))
    assert len(found) == sum(made["SIZES"].values()) and all(len(splits) == 1 for splits in prompts.values())
