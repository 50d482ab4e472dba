"""rl_ppo.py around its models: prompts and data sets, arguments and refusals, reward functions and reward models."""

import argparse
import copy
import json
import math
import os
import types

import conftest
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, load_file, write_babbler, write_llama, write_model

import clf
import common_v1 as common
import rl_ppo

NAMES = argparse.Namespace(raw_prompt=False)


def prompts_of(folder, **changes):
    """(Prompts, problems) of a model folder."""
    config, tokenizer = transformers.AutoConfig.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    return rl_ppo.Prompts(argparse.Namespace(raw_prompt=False, **changes), folder, config, tokenizer, problems := []), problems


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """llama (raw, <s> in front), t5, babbler (chatml template, with weights)."""
    folder = tmp_path_factory.mktemp("models")
    write_llama(folder / "llama")
    write_model(folder / "t5")
    write_babbler(folder / "babbler")
    return folder


# ------------------------------------------------------------------------------------------------ prompts


def test_a_raw_prompt_of_a_decoder_has_the_begin_token_and_of_a_t5_the_end_token(folders):
    llama, problems = prompts_of(folders / "llama")
    ids, text = llama.read({"prompt": "a: yes"})
    assert problems == [] and llama.is_raw and text == "a: yes" and ids.dtype == np.int64
    assert ids[0] == 1 and 2 not in ids and llama.tokenizer.decode(ids[1:]) == "a: yes"
    t5, problems = prompts_of(folders / "t5")
    ids, _ = t5.read({"prompt": "the cat"})
    assert problems == [] and ids.tolist() == t5.tokenizer("the cat").input_ids and ids[-1] == t5.tokenizer.eos_token_id
    assert llama.read({"messages": [{"role": "human", "content": "a: yes"}]})[0].tolist() == llama.read({"prompt": "a: yes"})[0].tolist()


def test_a_tokenizer_that_adds_an_end_token_adds_none_to_a_raw_prompt_that_is_to_be_continued(tmp_path):
    write_llama(tmp_path / "ends", adds_end=True)
    prompts, _ = prompts_of(tmp_path / "ends")
    assert prompts.tokenizer("a: yes").input_ids[-1] == 2
    assert prompts.read({"prompt": "a: yes"})[0].tolist() == prompts.tokenizer("a: yes").input_ids[:-1]


def test_a_chat_prompt_is_the_template_with_its_generation_prompt(folders):
    prompts, problems = prompts_of(folders / "babbler")
    said = {"user": " the cat\n", "assistant": "reads", "system": "a book"}
    user, assistant, system = ({"role": role, "content": text} for role, text in said.items())
    for record, messages in (({"prompt": " the cat\n"}, [user]), ({"messages": [system, user, assistant, user]}, [system, user, assistant, user])):
        ids, text = prompts.read(record)
        expected = prompts.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids.tolist() == expected and text == " the cat\n" and expected != prompts.tokenizer.apply_chat_template(messages, return_dict=False)
    raw, _ = prompts_of(folders / "babbler")
    raw.is_raw = True
    assert raw.read({"prompt": "the cat"})[0].tolist() == prompts.tokenizer("the cat").input_ids
    assert problems == [] and not prompts.is_raw


@pytest.mark.parametrize("model", ["llama", "t5", "babbler"])
@pytest.mark.parametrize("record, wrong", [
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "must end with the user's"),
    ({"prompt": "a {special} b"}, "special token"), ({"messages": [{"role": "user", "content": "{special}"}]}, "special token"),
    ({"prompt": "a \ud83d b"}, "half a character"), ({"prompt": ""}, "no 'prompt' text"), ({"prompt": " \n"}, "no 'prompt' text"),
    ({"prompt": 7}, "no 'prompt' text"), ({"input": "a"}, "has: input"), ({"messages": []}, "must be a list that is not empty"),
    ({"messages": [{"role": "friend", "content": "a"}]}, "messages[0]"), ({"messages": "a"}, "must be a list")])
def test_a_record_that_cannot_be_answered_is_refused(folders, model, record, wrong):
    prompts, _ = prompts_of(folders / model)
    record = json.loads(json.dumps(record).replace("{special}", prompts.tokenizer.eos_token))
    with pytest.raises(ValueError) as found:
        prompts.read(record)
    assert wrong in str(found.value)


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_a_raw_user_turn_without_text_is_refused_like_an_empty_prompt(folders, model):
    with pytest.raises(ValueError):
        prompts_of(folders / model)[0].read({"messages": [{"role": "user", "content": ""}]})


def test_several_turns_need_a_template(folders):
    turns = {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]}
    with pytest.raises(ValueError, match="need a chat template"):
        prompts_of(folders / "llama")[0].read(turns)
    assert len(prompts_of(folders / "babbler")[0].read(turns)[0]) > 10


def test_what_a_template_refuses_is_said_with_its_words(folders):
    prompts, _ = prompts_of(folders / "babbler")
    prompts.tokenizer.chat_template = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(ValueError, match="chat template refuses these messages: no system turns here"):
        prompts.read({"prompt": "a"})


def test_a_template_that_fails_on_a_plain_exchange_is_a_problem_before_the_run(folders, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / "babbler")
    tokenizer.chat_template = "{{ raise_exception('tools only') }}"
    rl_ppo.Prompts(NAMES, tmp_path, transformers.AutoConfig.from_pretrained(folders / "babbler"), tokenizer, problems := [])
    assert len(problems) == 1 and "tools only" in problems[0] and "--raw_prompt" in problems[0]


def test_replies_end_with_every_end_token_that_run_configuration_tokenizer_or_template_name(folders, tmp_path):
    assert prompts_of(folders / "llama")[0].stop_ids == [2] and prompts_of(folders / "t5")[0].stop_ids == [1]
    babbler, _ = prompts_of(folders / "babbler")
    turn_end = babbler.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert babbler.stop_ids == [2, turn_end] and turn_end > 2
    write_llama(tmp_path / "own")
    transformers.GenerationConfig(eos_token_id=[7, 9]).save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "rawtune.json").write_text(json.dumps({"script": "sft_causal.py", "stop_ids": [11]}))
    assert prompts_of(tmp_path / "own")[0].stop_ids == [7, 9, 11]


def test_padding_may_be_the_end_token_and_a_tokenizer_without_either_is_refused(folders, tmp_path):
    tokenizer = copy.deepcopy(conftest.bpe_tokenizer())
    tokenizer.pad_token = tokenizer.eos_token
    config = transformers.AutoConfig.from_pretrained(folders / "llama")
    same = rl_ppo.Prompts(NAMES, tmp_path, config, tokenizer, problems := [])
    assert problems == [] and (same.pad_id, same.stop_ids) == (2, [2])
    tokenizer.pad_token = None
    assert rl_ppo.Prompts(NAMES, tmp_path, config, tokenizer, problems).pad_id == 0 and problems == []  # it counts nowhere
    tokenizer.eos_token = None
    rl_ppo.Prompts(NAMES, tmp_path, config, tokenizer, problems)
    assert len(problems) == 1 and "nothing says where a reply ends" in problems[0]


def test_a_run_says_itself_whether_its_prompts_are_raw_and_a_clf_run_is_no_policy(folders, tmp_path):
    write_babbler(tmp_path / "run")
    for about, is_raw in (({"raw_prompt": True}, True), ({"raw_prompt": False}, False), ({"record_layout": {"source": "{prompt}"}}, True)):
        (tmp_path / "run" / "rawtune.json").write_text(json.dumps(about))
        assert prompts_of(tmp_path / "run")[0].is_raw == is_raw
    (tmp_path / "run" / "rawtune.json").write_text(json.dumps({"script": "clf.py"}))
    assert "a clf.py run scores texts" in prompts_of(tmp_path / "run")[1][0]


# ------------------------------------------------------------------------------------------------ data


@pytest.fixture
def load(tmp_path, folders):
    """load({file name: records or text}, words, model) -> (data sets, problems)."""
    def load(files, *words, model="llama", data=("a",)):
        (tmp_path / "data").mkdir(exist_ok=True)
        for name, content in files.items():
            lines = content if isinstance(content, (str, list)) else [content]
            (tmp_path / "data" / name).write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
        args = rl_ppo.parse_args(["--mount_dir", str(tmp_path), "--model_init_name", "x", "--data", *data, *map(str, words)])
        return rl_ppo.load_data(args, prompts_of(folders / model)[0], problems := []), problems
    return load


def numbered(n, **more):
    return [{"prompt": f"number {i}", "row": i, **more} for i in range(n)]


def test_records_keep_their_other_keys_and_lie_in_the_split_they_name(load):
    (data,), problems = load({"a.jsonl": [*numbered(5), *numbered(3, split="eval"), *numbered(2, split="test")]})
    assert problems == [] and data.counts == {"train": 5, "eval": 3, "test": 2}
    assert data.records["eval"][2] == {"prompt": "number 2", "row": 2, "split": "eval"}
    assert data.texts["train"] == [f"number {i}" for i in range(5)]
    assert all(len(data.ids[s]) == len(data.records[s]) == data.counts[s] for s in data.counts)
    (data,), problems = load({"b.json": {"train": numbered(4), "eval": numbered(2)}}, data=["b"])
    assert problems == [] and data.counts == {"train": 4, "eval": 2, "test": 0}
    (data,), problems = load({"c.jsonl": numbered(4), "c.eval.jsonl": numbered(2)}, data=["c"])
    assert problems == [] and data.counts == {"train": 4, "eval": 2, "test": 0}


@pytest.mark.parametrize("model, room", [("llama", 20), ("t5", 25)])
def test_prompts_that_leave_no_room_for_a_reply_are_left_out_with_a_warning(load, messages, folders, model, room):
    """seq_length is of prompt and reply for a decoder-only model, of the prompt for an encoder-decoder."""
    prompts, records = prompts_of(folders / model)[0], [{"prompt": "no " * n + "."} for n in range(1, 60)]
    lengths = [len(prompts.read(record)[0]) for record in records]
    fits = [record for record, n in zip(records, lengths) if n <= room]
    (data,), problems = load({"a.json": {"train": records, "eval": records[:1]}}, "--seq_length", 25, "--max_new_tokens", 5, model=model)
    assert problems == [] and data.records["train"] == fits and room in lengths and 0 < len(fits) < 58
    assert any(f"{59 - len(fits)} prompts are longer than {room} tokens" in line and "--seq_length" in line for line in messages)


def test_an_eval_fraction_is_drawn_from_the_text_alone_and_n_eval_is_a_limit_of_each_split(load):
    (data,), problems = load({"a.jsonl": numbered(200)}, "--eval_fraction", 0.2, "--n_eval", 1000)
    (turned,), _ = load({"a.jsonl": numbered(200)[::-1]}, "--eval_fraction", 0.2, "--n_eval", 1000)
    assert problems == [] and data.counts["train"] + data.counts["eval"] == 200 and 20 < data.counts["eval"] < 60
    assert set(data.texts["eval"]) == set(turned.texts["eval"]) and not set(data.texts["eval"]) & set(data.texts["train"])
    (few,), _ = load({"a.jsonl": [*numbered(30), *numbered(9, split="eval"), *numbered(8, split="test")]}, "--n_eval", 5)
    assert few.counts == {"train": 30, "eval": 5, "test": 5} and few.texts["eval"] == [f"number {i}" for i in range(5)]


def test_all_problems_of_all_files_are_reported_together_with_file_and_line(load):
    bad = '{"prompt": "fine"}\n{"prompt": ""}\n\nnot json\n[1]\n{"prompt": "a </s> b"}\n{"prompt": "x", "split": "dev"}\n{"messages": []}\n'
    data_sets, problems = load({"a.jsonl": bad, "b.json": {"train": [{"prompt": "fine"}, {"text": "x"}], "eval": [{"prompt": "fine"}]}},
                               data=["a", "b", "gone"])
    wanted = [("a.jsonl, line 2:", "no 'prompt'"), ("a.jsonl, line 4:", "not JSON"), ("a.jsonl, line 5:", "a list"), ("a.jsonl, line 6:", "'</s>'"),
              ("a.jsonl, line 7:", "'dev'"), ("a.jsonl, line 8:", "'messages'"), ("b.json, train[1]:", "has: text"), ("gone", "not found")]
    assert data_sets == [] and len(problems) == len(wanted)
    assert all(where in problem and what in problem for problem, (where, what) in zip(problems, wanted))


def test_data_without_training_or_evaluation_prompts_is_refused_and_prompts_in_both_are_counted(load, messages):
    assert "no evaluation records" in load({"a.jsonl": numbered(3)})[1][0]
    assert "no training records" in load({"a.jsonl": numbered(3, split="eval")})[1][0]
    assert "100 of 3 training records" in load({"a.jsonl": [*numbered(3), *numbered(1, split="eval")]}, data=["a:100"])[1][0]
    assert load({"a.jsonl": [*numbered(3), *numbered(2, split="eval")]})[1] == [] and "a: 2 of 2 eval prompts occur in the training data" in messages


# ------------------------------------------------------------------------------------------------ arguments


def parsed(*words):
    return rl_ppo.parse_args(["--data", "x", "--model_init_name", "x", *map(str, words)])


def problems_of(*words, reward=True):
    args = parsed(*words, *(["--reward_fn", "r.py:f"] if reward else []))
    rl_ppo.check_args(args, problems := [])
    return problems


def test_defaults_are_the_reference_column_of_the_earlier_system():
    """Except the learning rate: 1e-6, with an adapter 1e-4."""
    expected = {"seq_length": 1024, "max_steps": 10000, "train_batch_size": 128, "gradient_accumulation_steps": 1, "ppo_epochs": 4,
                "num_rollouts": 128,
                "init_kl_coef": 0.05, "target_kl": 6, "kl_horizon": 10000, "kl_controller": "adaptive", "gamma": 1, "lam": 0.95, "cliprange": 0.2,
                "cliprange_value": 0.2, "vf_coef": 1, "cliprange_reward": 10, "reward_scaling": "none", "learning_rate": 1e-6, "weight_decay": 1e-6,
                "lr_scheduler_type": "constant", "max_new_tokens": 40, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "num_layers_unfrozen": None,
                "advantage": "gae", "n_samples": 1, "dual_clip": 0, "entropy_coef": 0, "missing_eos_penalty": 0, "kl_cap": 30, "critic": "trunk"}
    found = vars(parsed())
    assert {name: found[name] for name in expected} == expected and problems_of() == []
    assert parsed("--lora_rank", 8).learning_rate == parsed("--train_adapter").learning_rate == 1e-4
    assert parsed("--lora_rank", 8, "--learning_rate", 3e-5).learning_rate == 3e-5 and parsed("--target_kl", 2).kl_cap == 10
    assert parsed("--target_kl", 2, "--kl_cap", 0).kl_cap == 0


def test_lengths_of_training_and_aliases():
    assert parsed("--num_epochs", 3).max_steps is None and parsed("--num_epochs", 3).num_epochs == 3 and parsed("--debug").max_steps == 10
    assert parsed("--max_steps", 7).max_steps == 7 and parsed("--chunk_size", 5).rollout_batch_size == 5
    assert parsed("--rank_model", "m").reward_model == "m"
    assert parsed("--reward_text", r"{prompt}\n{reply}").reward_text == "{prompt}\n{reply}"  # as a shell passes it
    assert parsed("--heldout_reward_fn", "r.py:g").metric_for_best == "heldout_reward" and parsed().metric_for_best is None
    assert parsed("--heldout_reward_fn", "r.py:g", "--metric_for_best", "reward").metric_for_best == "reward"


def test_a_policy_is_a_run_under_models_or_a_path_or_a_hub_id(tmp_path):
    (tmp_path / "models" / "sft").mkdir(parents=True)
    def path(*words):
        return rl_ppo.parse_args(["--data", "x", "--mount_dir", str(tmp_path), *words]).model_init_path
    assert path("--policy", "sft") == path("--sft_model", "sft") == str(tmp_path / "models" / "sft")
    assert path("--policy", "org/name") == "org/name" and path("--policy", str(tmp_path)) == str(tmp_path)


def test_the_demo_runs_only_without_a_model_and_data_and_its_flags_are_in_order(capsys):
    args = rl_ppo.parse_args(["--max_steps", "3"])
    assert (args.training_run_name, args.max_steps, args.data_name) == ("ppo-demo", 3, ["wishes"])
    assert "demo: python rl_ppo.py" in capsys.readouterr().out
    rl_ppo.check_args(args, problems := [])
    assert problems == [] and parsed().training_run_name is None and capsys.readouterr().out == ""


@pytest.mark.parametrize("words, named", [
    (["--top_k", 5], "--top_k"), (["--top_p", 0.9], "--top_p"), (["--temperature", 0], "--temperature"), (["--temperature", 0.001], "--temperature"),
    (["--advantage", "rloo"], "--n_samples"), (["--advantage", "grpo"], "--n_samples"), (["--num_rollouts", 10, "--n_samples", 4], "--num_rollouts"),
    (["--reward_model", "m"], "--reward_model and --reward_fn exclude each other"),
    (["--heldout_reward_model", "m", "--heldout_reward_fn", "r.py:f"], "--heldout_reward_model and --heldout_reward_fn"),
    (["--precision", "fp16"], "--precision fp16"), (["--compile"], "--compile"), (["--merge_lora", "new"], "--merge_lora"),
    (["--dual_clip", 0.5], "--dual_clip"), (["--num_layers_unfrozen", -1], "--num_layers_unfrozen"),
    (["--kl_horizon", 20], "--kl_horizon"), (["--kl_horizon", 2000, "--kl_controller", "fixed"], "--kl_horizon"), (["--num_epochs", 0], "--num_epochs"),
    *[(["--advantage", "rloo", "--n_samples", 2, *flag], f"{flag[0]} has no effect") for flag in (
        ["--critic_init", "c"], ["--value_head_init", "zero"], ["--vf_coef", 0.5], ["--cliprange_value", 0.1], ["--lam", 0.9], ["--gamma", 0.9])],
    (["--critic", "reward_model"], "--critic reward_model needs --reward_model"), (["--critic_init", "gone"], "--critic_init gone"),
    (["--reference", "adapter_off"], "--reference adapter_off"), (["--reward_text", "{reply}"], "--reward_text"),
    (["--metric_for_best", "loss"], "--metric_for_best"), (["--metric_for_best", "heldout_reward"], "--heldout_reward_fn"),
    (["--gamma", 1.5], "--gamma"), (["--lam", -0.1], "--lam"), (["--cliprange", 0], "--cliprange"), (["--reward_timeout", 0], "--reward_timeout"),
    (["--target_kl", 0], "--target_kl"), (["--init_kl_coef", "nan"], "--init_kl_coef"), (["--ppo_epochs", 0], "--ppo_epochs"),
    (["--kl_cap", -1], "--kl_cap"), (["--max_new_tokens", 0], "--max_new_tokens"), (["--num_rollouts", 0], "--num_rollouts"),
    (["--num_epochs", 0], "--num_epochs")])
def test_what_cannot_work_or_has_no_effect_is_refused_by_name(words, named):
    assert any(named in problem for problem in problems_of(*words))


def test_a_reward_is_needed_and_every_problem_is_said_at_once():
    assert len(problems_of(reward=False)) == 1 and "--reward_model" in problems_of(reward=False)[0] and "--reward_fn" in problems_of(reward=False)[0]
    many = problems_of("--top_k", 5, "--compile", "--gamma", 2, "--precision", "fp16", reward=False)
    assert len(many) == 5
    assert problems_of("--advantage", "rloo", "--n_samples", 4) == problems_of("--lora_rank", 4, "--reference", "adapter_off") == []
    assert problems_of("--reward_model", "m", "--reward_text", "{reply}", "--critic", "reward_model", reward=False) == []


def test_reward_text_without_a_reply_in_it_and_a_critics_unused_start_are_refused():
    assert "--reward_text" in problems_of("--reward_model", "m", "--reward_text", "{prompt}", reward=False)[0]
    assert "--value_head_init" in problems_of("--reward_model", "m", "--critic", "reward_model", "--value_head_init", "zero", reward=False)[0]


# ------------------------------------------------------------------------------------------------ reward functions

FUNCTIONS = """
import os, sys, time
print("said while it was read")

def length(prompts, replies, records):
    print("said while it was called")
    return [len(reply) + record.get("bonus", 0) + len(prompt) / 100 for prompt, reply, record in zip(prompts, replies, records)]

def broken(prompts, replies, records):
    raise KeyError("the answer is missing")

def short(prompts, replies, records):
    return [1.0] * (len(replies) - 1)

def long(prompts, replies, records):
    return [1.0] * len(replies) + [float("nan")]

def nan(prompts, replies, records):
    return [float("nan") if reply == "bad" else 1.0 for reply in replies]

def sleepy(prompts, replies, records):
    time.sleep(60)

def children(prompts, replies, records):
    os.system("echo said by a child; cat")
    return [1.0] * len(replies)

def where(prompts, replies, records):
    return [os.getpid(), float(os.getcwd() == records[0]["cwd"]), float("RANK" in os.environ), float("torch" in sys.modules)]
"""


@pytest.fixture
def function(tmp_path):
    """function(name, timeout) -> (RewardFunction, problems)."""
    made = []
    def function(name, timeout=20.0):
        (tmp_path / "reward.py").write_text(FUNCTIONS)
        made.append(rl_ppo.RewardFunction(f"{tmp_path / 'reward.py'}:{name}", timeout, problems := []))
        return made[-1], problems
    yield function
    for process in (f.process for f in made if f.process):
        process.kill()
        process.communicate()


def test_a_reward_function_sees_prompts_replies_and_records_in_a_process_of_its_own(function, tmp_path, monkeypatch):
    reward, problems = function("length")
    assert problems == [] and reward(["p", "pp"], ["", "één"], [{}, {"bonus": 5}]) == [0.01, 8.02]
    assert reward(["half \ud83d"] * 300, ["x" * 1000] * 300, [{}] * 300) == [1000.06] * 300  # more than a pipe holds
    assert reward.sha256 == common.file_sha256(tmp_path / "reward.py")
    monkeypatch.setenv("RANK", "0")
    reward, _ = function("where")
    pid, *found = reward([""] * 4, [""] * 4, [{"cwd": os.getcwd()}] * 4)
    assert found == [1, 0, 0] and pid == reward.process.pid


@pytest.mark.parametrize("spec, wrong", [("gone.py:f", "there is no file 'gone.py'"), ("reward.py", "expected file.py:name"),
                                         ("reward.py:", "expected file.py:name"),
                                         ("reward.py:not a name", "expected file.py:name"), ("reward.py:absent", "ended with exit code 1")])
def test_a_file_or_name_that_is_missing_is_a_problem_before_the_run(tmp_path, monkeypatch, capfd, spec, wrong):
    (tmp_path / "reward.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    rl_ppo.RewardFunction(spec, 20, problems := [])
    assert len(problems) == 1 and spec in problems[0] and wrong in problems[0]
    assert spec != "reward.py:absent" or "no attribute 'absent'" in capfd.readouterr().err


@pytest.mark.parametrize("code, said", [("import no_such_package", "No module named 'no_such_package'"), ("def f(:", "SyntaxError"),
                                        ("raise SystemExit(3)", "")])
def test_an_error_while_the_file_is_read_is_a_problem_and_its_words_are_shown(tmp_path, capfd, code, said):
    (tmp_path / "bad.py").write_text(code)
    rl_ppo.RewardFunction(f"{tmp_path}/bad.py:f", 20, problems := [])
    assert len(problems) == 1 and f"exit code {3 if 'Exit' in code else 1}" in problems[0] and said in capfd.readouterr().err


def test_a_file_of_the_users_finds_its_neighbours_and_one_beside_the_script_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text("def f(prompts, replies, records): return [2.0] * len(replies)")
    (tmp_path / "mine.py").write_text("from neighbour import f")
    reward = rl_ppo.RewardFunction(f"{tmp_path}/mine.py:f", 20, problems := [])
    monkeypatch.chdir(tmp_path)
    wish = rl_ppo.RewardFunction("data/rewards.py:wish", 20, problems)
    assert problems == [] and reward(["a"], ["b"], [{}]) == [2.0] and wish(["a"], ["a1 2"], [{"want": "digits"}]) == [0.4]
    for f in (reward, wish):
        f.process.communicate()  # it ends when nobody asks any more
        assert f.process.returncode == 0


@pytest.mark.parametrize("name, said", [
    ("broken", ["exit code 1", "the answer is missing"]), ("short", ["2 numbers for 3 replies"]), ("long", ["4 numbers for 3 replies"]),
    ("nan", ["nan for the reply 'bad' to 'q'", "expected a finite number"])])
def test_a_call_that_goes_wrong_ends_the_run_with_what_it_said(function, capfd, name, said):
    reward, problems = function(name)
    with pytest.raises(SystemExit) as stop:
        reward(["p", "q", "r"], ["good", "bad", "fine"], [{}] * 3)
    errors = capfd.readouterr().err
    assert problems == [] and stop.value.code == 2 and all(text in errors for text in (*said, f"reward.py:{name}"))


def test_programs_that_a_reward_function_starts_do_not_disturb_its_answers(function, capfd):
    """A child's output is not an answer, and its input is not the next request."""
    reward, problems = function("children", 5.0)
    assert problems == [] and reward(["p"], ["r"], [{}]) == [1.0] == reward(["p"], ["r"], [{}]) and "said by a child" in capfd.readouterr().err


def test_a_function_that_takes_too_long_is_killed_and_the_flag_is_named(function, capfd):
    reward, problems = function("sleepy", 1.0)
    with pytest.raises(SystemExit) as stop:
        reward(["p"], ["r"], [{}])
    assert problems == [] and stop.value.code == 2 and "no answer within 1 s" in (said := capfd.readouterr().err) and "--reward_timeout" in said
    assert reward.process.wait(5) == -9


def test_the_committed_rewards_by_example():
    rewards = load_file(ROOT / "data" / "rewards.py")
    def wish(want, *replies):
        return rewards.wish([""] * len(replies), list(replies), [{"want": want}] * len(replies))
    assert wish("digits", "a1 2", "1 2 3 4 5", "", "12", "abcdefgh12") == [0.4, 1, 0, 0.4, 0.2]
    assert wish("vowels", "aeiou", "AEIOU", "banana") == [1, 0, 0.5] and wish("capitals", "ABCde\n") == [0.6] and wish("marks", "?!.,;") == [1]
    answers = [{"answer": "Paris "}] * 3
    assert rewards.exact_answer([""] * 3, [" Paris\n", "paris", "Paris."], answers) == [1, 0, 0]
    assert rewards.last_number([""] * 5, ["so 3, then 1,204.50", "1204.5 or 7", "none", "-1204.5", "= 1204.5."],
                               [{"answer": "The sum is 1,204.5"}] * 5) == [1, 0, 0, 0, 1]
    assert rewards.last_number([""], ["none"], [{"answer": "none"}]) == [0]


# ------------------------------------------------------------------------------------------------ what a reward model reads


def part_of(tokenizer, reward_text=None, limit=None, template=None, no_yes=None, encoder_decoder=False, n_end=0):
    return types.SimpleNamespace(tokenizer=tokenizer, template=template, reward_text=reward_text, limit=limit, no_yes=no_yes, n_end=n_end,
                                 config=types.SimpleNamespace(is_encoder_decoder=encoder_decoder))


def clf_run(folder, template, max_length=512, task="score", model="llama", adds_end=False):
    """A folder as clf.py leaves it, as `read_reward_model` reads it; and the layout by which clf.py itself reads."""
    write_llama(folder, adds_end) if model == "llama" else write_model(folder)
    (folder / "model.safetensors").write_bytes(common.safetensors.torch.save({"x": torch.zeros(1)}))
    layout = types.SimpleNamespace(template=template, max_length=max_length, loss="pairwise" if task == "preference" else "cross_entropy")
    (folder / "rawtune.json").write_text(json.dumps({
        "script": "clf.py", "task": task, "family": "causal" if model == "llama" else "seq2seq", "record_layout": {"template": template, "max_length": max_length},
        "verbaliser": {"negative_id": 17, "positive_id": 90}}))
    part = rl_ppo.read_reward_model(parsed("--reward_model", folder), str(folder), "--reward_model", problems := [])
    assert problems == [], problems
    return part, layout


def as_clf_reads(part, layout, text):
    """Ids of a text in clf.py's own training rows."""
    return clf.tokenize_texts([text], layout, part.tokenizer, part.config.is_encoder_decoder)[0].tolist()


RECORD = {"prompt": "the cat", "topic": "a book", "number": 3}


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_a_clf_run_reads_its_own_layout_by_its_own_tokenizer(tmp_path, model):
    part, layout = clf_run(tmp_path / "run", "Of {topic}: {prompt}\n\n{reply}\nGood?", model=model)
    assert part.no_yes == [17, 90] and part.limit == 512
    reply = "reads {prompt} long"
    ids = rl_ppo.reward_ids(part, "the cat", reply, RECORD, "unused")
    text = f"Of a book: the cat\n\n{reply}\nGood?"  # what the reply holds is not filled in again
    assert ids == as_clf_reads(part, layout, text) == part.tokenizer(text).input_ids
    part, layout = clf_run(tmp_path / "input", "{input}\nGood?", model=model)
    assert rl_ppo.reward_ids(part, "the cat", "reads", RECORD, "the cat reads") == as_clf_reads(part, layout, "the cat reads\nGood?")


def test_an_end_token_that_a_tokenizer_adds_is_taken_off_for_a_decoder_only_clf_run_and_kept_for_others(tmp_path):
    part, layout = clf_run(tmp_path / "run", "{prompt}: {reply}", adds_end=True)
    ids = rl_ppo.reward_ids(part, "a", "yes", {}, "a yes")
    assert ids == as_clf_reads(part, layout, "a: yes") == part.tokenizer("a: yes").input_ids[:-1] and ids[-1] != 2
    assert rl_ppo.reward_ids(part_of(part.tokenizer), "a", "yes", {}, "a: yes") == [*ids, 2]  # a sequence classifier
    t5, _ = clf_run(tmp_path / "t5", "{prompt}: {reply}", model="t5")
    assert rl_ppo.reward_ids(t5, "a", "yes", {}, "a yes")[-1] == 1


@pytest.mark.parametrize("task", ["score", "preference"])
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_long_texts_are_cut_as_clf_cuts_them(tmp_path, task, model):
    """Scores keep the template's end, preferences all but the beginning, or long prompts would make their replies equal."""
    template = "{prompt}\n\n{reply}" + ("\nGood?" if task == "score" else "")
    part, layout = clf_run(tmp_path / "run", template, max_length=20, task=task, model=model)
    prompt, reply = "the cat reads " * 9, "a long book"
    ids, whole = rl_ppo.reward_ids(part, prompt, reply, {}, ""), part.tokenizer(clf.fill(template, {"prompt": prompt, "reply": reply})).input_ids
    assert len(ids) == 20 < len(whole) and ids == as_clf_reads(part, layout, clf.fill(template, {"prompt": prompt, "reply": reply}))
    short = rl_ppo.reward_ids(part, "a", "b", {}, "")
    assert len(short) < 20 and short == as_clf_reads(part, layout, clf.fill(template, {"prompt": "a", "reply": "b"}))
    if task == "preference":
        assert ids != rl_ppo.reward_ids(part, prompt, "a long cat", {}, "")


def test_a_model_without_a_layout_reads_reward_text_or_the_chat_template_or_the_joined_text(folders):
    plain, chat = (transformers.AutoTokenizer.from_pretrained(folders / name) for name in ("llama", "babbler"))
    assert rl_ppo.reward_ids(part_of(plain), "p", "r", {}, "the cat reads") == plain("the cat reads").input_ids
    assert rl_ppo.reward_ids(part_of(chat, "Q: {prompt} A: {reply}"), "p", "r", {}, "x") == chat("Q: p A: r").input_ids
    user, answer = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "reads"}
    history = [{"role": "system", "content": "a book"}, user]
    for record, messages in (({"prompt": "the cat"}, [user, answer]), ({"messages": history}, [*history, answer])):
        expected = chat.apply_chat_template(messages, return_dict=False)
        assert rl_ppo.reward_ids(part_of(chat), "the cat", "reads", record, "x") == expected
    long = plain("the cat reads a long book").input_ids
    # the first token stays: BERT has its score there
    assert rl_ppo.reward_ids(part_of(plain, limit=5, n_end=4), "p", "r", {}, "the cat reads a long book") == [long[0], *long[-4:]]
    assert rl_ppo.reward_ids(part_of(plain, "{reply}"), "p", "", {}, "") != []


def test_other_names_of_roles_mean_the_same_to_the_reward_model_as_to_the_policy(folders):
    """{"role": "human"} is a user's turn when the policy reads it."""
    chat = transformers.AutoTokenizer.from_pretrained(folders / "babbler")
    named = [rl_ppo.reward_ids(part_of(chat), "the cat", "reads", {"messages": [{"role": role, "content": content}]}, "x")
             for role, content in (("user", "the cat"), ("human", "the cat"), ("user", [{"type": "text", "text": "the cat"}]))]
    assert named[0] == named[1] == named[2]


def test_a_record_key_named_input_does_not_hide_the_reply(tmp_path):
    """Alpaca-like records keep an input; a clf.py run on plain texts has the template {input}."""
    part, _ = clf_run(tmp_path / "run", "{input}")
    found = [rl_ppo.reward_ids(part, "the cat", reply, {"prompt": "the cat", "input": "a book"}, f"the cat {reply}") for reply in ("reads", "yes")]
    assert found[0] != found[1]


@pytest.mark.parametrize("labels, accepted", [(1, True), (2, False)])
def test_a_sequence_classifier_needs_one_logit(tmp_path, labels, accepted):
    write_llama(tmp_path / "rm")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "rm")
    config.num_labels = labels
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    part = rl_ppo.read_reward_model(parsed("--reward_model", "x"), str(tmp_path / "rm"), "--reward_model", problems := [])
    if accepted:
        assert problems == [] and part.auto_class is transformers.AutoModelForSequenceClassification and (part.no_yes, part.limit) == (None, 256)
    else:
        assert part is None and len(problems) == 1 and "--reward_model" in problems[0] and "2 outputs" in problems[0] and "one logit" in problems[0]


def test_a_language_model_or_a_folder_without_weights_is_no_reward_model(folders, tmp_path):
    for name, wrong in (("babbler", "LlamaForCausalLM"), ("gone", "gone")):
        assert rl_ppo.read_reward_model(parsed(), str(folders / name), "--heldout_reward_model", problems := []) is None
        assert problems and all("--heldout_reward_model" in problem for problem in problems) and wrong in problems[0]
    write_llama(tmp_path / "rm", architectures=["LlamaForSequenceClassification"], num_labels=1)
    rl_ppo.read_reward_model(parsed(), str(tmp_path / "rm"), "--reward_model", problems := [])
    assert len(problems) == 1 and "has no weights" in problems[0]


# ------------------------------------------------------------------------------------------------ scores

TEXTS = [np.random.default_rng(1).integers(5, 64, n).tolist() for n in (4, 19, 1, 12, 7, 30, 2, 9)]


def classifier(kind, pad_id=0):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "pad_token_id": pad_id, "num_labels": 1}
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, eos_token_id=2, bos_token_id=1, initializer_range=0.2)
    elif kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=pad_id, num_labels=1,
                                         initializer_range=0.2,
                                         bos_token_id=None, eos_token_id=2)
    else:
        config = transformers.BertConfig(**sizes, initializer_range=0.2, max_position_embeddings=64)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def score(reward, texts, fill=0):
    """Scores of one batch padded on the right, as `score_replies` pads."""
    lengths = torch.tensor([len(text) for text in texts])
    ids = torch.full((len(texts), int(lengths.max())), fill)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    with torch.no_grad():
        return reward(ids, lengths)


@pytest.mark.parametrize("kind, pad_id", [("llama", 0), ("llama", 2), ("gpt2", 2), ("bert", 0)])
def test_the_score_of_a_text_is_the_same_alone_and_among_longer_ones_also_where_it_ends_with_the_padding(kind, pad_id):
    texts = [text + [2] * (i % 3) for i, text in enumerate(TEXTS)]  # 2: the end token, which is the padding's where pad_id is 2
    reward = rl_ppo.RewardModel(classifier(kind, pad_id), None)
    alone = torch.cat([score(reward, [text]) for text in texts])
    for fill in (0, 2, 63):
        assert torch.allclose(score(reward, texts, fill), alone, atol=1e-5)
    assert alone.shape == (8,) and alone.dtype == torch.float32 and alone.std() > 0.01
    plain = classifier(kind, pad_id)
    if pad_id == 0:  # transformers' own reading, where it is right: the last token that is not the padding's
        with torch.no_grad():
            assert torch.allclose(torch.cat([plain(torch.tensor([text])).logits[:, 0] for text in texts]), alone, atol=1e-5)
    elif kind == "llama":  # the negative control: the last token that is no padding's id is another where a text ends with it
        assert not torch.allclose(torch.cat([plain.model(torch.tensor([text])).last_hidden_state[:, len(text) - 1 - i % 3] @ plain.score.weight[0]
                                             for i, text in enumerate(texts)]), alone, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "t5 v1.0", "t5 v1.1", "bart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clf_run_scores_exactly_as_clf_does(family, dtype):
    def model():
        torch.manual_seed(0)
        t5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        if family == "llama":
            config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                              initializer_range=0.2)
            return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
        if family == "bart":
            config = transformers.BartConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                                             decoder_attention_heads=4,
                                             encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.2)
        else:
            config = transformers.T5Config(**t5, **({"tie_word_embeddings": False, "scale_decoder_outputs": False} if family == "t5 v1.1" else {}))
        made = transformers.AutoModelForSeq2SeqLM.from_config(config)
        if family == "bart":
            made.final_logits_bias = torch.randn(1, 64)
        return made.to(dtype).eval()
    yes_no = clf.YesNo(model(), [17, 40], torch.device("cpu"))
    mine, theirs = (score(reward, TEXTS) for reward in (rl_ppo.RewardModel(model(), [17, 40]),
                                                        lambda ids, lengths: yes_no({"input_ids": ids, "lengths": lengths})))
    assert torch.equal(mine, theirs) and mine.dtype == torch.float32 and mine.std() > 1e-3
    assert torch.allclose(score(rl_ppo.RewardModel(model(), [40, 17]), TEXTS), -theirs, atol=1e-6)
    if dtype == torch.float32:
        alone = torch.cat([score(rl_ppo.RewardModel(model(), [17, 40]), [text]) for text in TEXTS])
        assert torch.allclose(alone, mine, atol=1e-5)


def test_the_longest_text_that_is_read_fits_the_positions_of_the_model(folders, tmp_path):
    """RoBERTa's positions start behind its padding's id: of 20, 18 are usable."""
    torch.manual_seed(0)
    conftest.bpe_tokenizer().save_pretrained(tmp_path / "rm")
    transformers.RobertaForSequenceClassification(transformers.RobertaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=20, num_labels=1,
        pad_token_id=1)).save_pretrained(tmp_path / "rm")
    part = rl_ppo.read_reward_model(parsed(), str(tmp_path / "rm"), "--reward_model", problems := [])
    assert problems == []
    reward = rl_ppo.RewardModel(part.auto_class.from_pretrained(tmp_path / "rm").eval(), None)
    ids = rl_ppo.reward_ids(part, "p", "r", {}, "the cat reads " * 30)
    assert len(ids) >= 18 and math.isfinite(score(reward, [ids]))


def test_a_bf16_classifiers_score_is_computed_in_fp32():
    reward = rl_ppo.RewardModel(classifier("llama").bfloat16(), None)
    found = score(reward, TEXTS)
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float()) and math.isfinite(found.sum())
