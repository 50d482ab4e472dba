"""The pages about seq2seq.py and the README: commands parse, flags, metrics and links are right."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT, make_model, metrics, pairs, run, write_data

import chat
import clf
import common
import project_grads
import rl_ppo
import seq2seq
import sft_causal

SCRIPTS = {"seq2seq.py": seq2seq, "clf.py": clf, "sft_causal.py": sft_causal, "chat.py": chat}
SCRIPTS["rl_ppo.py"] = rl_ppo
SCRIPTS["project_grads.py"] = project_grads
DOCS = ROOT / "docs"
TOPICS = ["seq2seq", "pretraining", "adapters", "extend", "clf", "sft_causal", "instructions"]
TOPICS += ["chat", "rl_ppo", "project_grads"]
PAGES = [ROOT / "README.md", *(DOCS / f"{name}.md" for name in TOPICS)]
PRESETS = [path for path in (ROOT / "presets").glob("*") if path.is_file()]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
# that of the diff in docs/extend.md; DeepSpeed's launcher's; of an earlier system
OTHER_FLAGS = {"--kl_coefficient", "--include", "--ft_head_first", "--save_best_metric"}


def commands():
    """(script, words), of every command that runs one of ours."""
    for page in PAGES:
        for language, text in BLOCK.findall(page.read_text()):
            for line in text.replace("\\\n", " ").splitlines() if language == "bash" else ():
                words = shlex.split(line, comments=True)
                for name in set(words) & set(SCRIPTS):
                    if words[0] != "cp":
                        yield name, words[words.index(name) + 1 :]


def check(name, words):
    problems = []
    script = SCRIPTS[name]
    args = script.parse_args(words)
    check_args = getattr(script, "check_args", None)
    if check_args:
        check_args(args, problems)
    else:
        common.check_shared_args(args, (), problems)
    assert not problems, words


def test_commands_and_presets_parse(monkeypatch):
    monkeypatch.chdir(ROOT)  # where @presets/... is
    found = list(commands())
    assert len(found) > 30 and {name for name, _ in found} == set(SCRIPTS)
    for name, words in found:
        check(name, words)
    for preset in PRESETS:
        for name in SCRIPTS:
            words = [f"@{preset}", "--model_init_path", "x", "--data", "y"]
            if name == "rl_ppo.py":
                words += ["--reward_fn", "x.py:y"]
            is_ppo = preset.name == "rlhf-defaults"  # which names the others too
            if name in preset.read_text() and is_ppo == (name == "rl_ppo.py"):
                check(name, words)


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_flags_exist(page, capsys):
    script = SCRIPTS.get(f"{page.stem}.py", seq2seq)
    if script is project_grads:
        known = {*script.ALIASES, *script.ALWAYS}
        for _, flags in script.COMMANDS.values():
            known.update(f"--{name}" for name in flags)
    else:
        parser = common.Parser(script.__doc__, script.FLAGS)
        known = OTHER_FLAGS | set(parser._option_string_actions)
    for name in set(re.findall(r"data/((?:prepare|score)_\w+)\.py", page.read_text())):
        with pytest.raises(SystemExit):
            importlib.import_module(name).main(["--help"])
        known |= set(re.findall(r"--\w+", capsys.readouterr().out))
    text = BLOCK.sub("", page.read_text())
    named = re.findall(r"`[^`]*`", text)
    assert set(re.findall(r"(?<!\w)--\w+", " ".join(named))) <= known


@pytest.mark.parametrize("name", ["seq2seq.py", "clf.py", "rl_ppo.py"])
def test_every_metric_is_explained(name):
    page = (DOCS / name.replace(".py", ".md")).read_text()
    make_model("t5")
    for data in ("one", "two"):
        records = pairs(8)
        for i, record in enumerate(records):
            record.update(input=record["prompt"], target=i % 2, answer="1")
        write_data(data, records[:4], records[4:6], test=records[6:])
    words = ["--model_init_name", "t5", "--data", "one", "two", "--max_steps", 1]
    if name == "rl_ppo.py":
        reward = [
            "data/rewards.py:last_number",
            "--heldout_reward_fn",
            "data/rewards.py:last_number",
        ]
        words += ["--reward_fn", *reward, "--num_rollouts", 4, "--train_batch_size", 4]
    run(*words, "--training_run_name", "r", module=SCRIPTS[name])
    found = set()
    for row in metrics("r"):
        if row["split"] != "train" or name != "clf.py":
            found |= {re.sub("^(eval|test)/(one/|two/)?", "", metric) for metric in row}
    explained = set(re.findall(r"`(?:eval/)?([\w/]+)`", page)) | {"step", "epoch", "split"}
    assert found <= explained


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert anchor in [
                re.sub(r"[^\w ]", "", head.lower()).replace(" ", "-") for head in headings
            ]


def test_sizes():
    assert sum(page.stat().st_size for page in PAGES[1:]) <= 72_400
