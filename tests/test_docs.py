"""README and docs/: commands parse; flags, metrics and links are right; sizes."""

import argparse
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

SCRIPTS = {
    f"{script.__name__}.py": script
    for script in (seq2seq, clf, sft_causal, rl_ppo, project_grads, chat)
}
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted(DOCS.glob("*.md"))]
TOOLS = [path for path in (ROOT / "data").glob("*.py") if "def main(argv" in path.read_text()]
PRESETS = [path for path in (ROOT / "presets").glob("*") if path.is_file()]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
OTHER_FLAGS = {
    "--kl_coefficient",  # of the diff in docs/extend.md
    *("--requeue", "--include", "--only", "--tiny"),  # Slurm's; DeepSpeed's; of benchmarks/gpu.py
    *("--ft_head_first", "--save_best_metric"),  # of an earlier system
}


def commands(names):
    """(name, words behind it) of every command, in a block or a table, that runs one of names."""
    for page in PAGES:
        text = page.read_text()
        lines = re.findall(r"`(data/\w+\.py --[^`]*)`", text)
        for language, block in BLOCK.findall(text):
            if language == "bash":
                lines += re.split(r"\n|&&", block.replace("\\\n", " "))
        for line in lines:
            words = shlex.split(line, comments=True)
            for name in set(words) & set(names):
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
    found = list(commands(SCRIPTS))
    assert len(found) > 60 and {name for name, _ in found} == set(SCRIPTS)
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


def test_commands_of_tools_parse(monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    class Parsed(Exception):
        pass

    def only_parse(parser, words=None, namespace=None):
        parse_args(parser, words, namespace)
        raise Parsed

    names = {f"data/{path.name}": path.stem for path in TOOLS if path.name != "cot.py"}
    found = list(commands(names))
    assert len(found) > 10
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    for name, words in found:
        with pytest.raises(Parsed):
            importlib.import_module(names[name]).main(words)


def flags_of(page):
    """Those that a page may name: its script's, or of other pages all."""
    found = set(OTHER_FLAGS)
    own = f"{page.stem}.py"
    for name in [own] if own in SCRIPTS else SCRIPTS:
        script = SCRIPTS[name]
        if script is project_grads:
            found |= {*script.ALIASES, *script.ALWAYS}
            for _, flags in script.COMMANDS.values():
                found.update(f"--{flag}" for flag in flags)
        else:
            parser = common.Parser(script.__doc__, script.FLAGS)
            found.update(parser._option_string_actions)
    return found


@pytest.mark.parametrize("page", PAGES[2:], ids=lambda page: page.name)
def test_flags_exist(page, capsys):
    known = flags_of(page)
    text = page.read_text()
    tools = set(re.findall(r"data/(\w+)\.py", text)) & {path.stem for path in TOOLS}
    for name in tools:
        with pytest.raises(SystemExit):
            importlib.import_module(name).main(["--help"])
        known |= set(re.findall(r"--\w+", capsys.readouterr().out))
    named = re.findall(r"`[^`]*`", BLOCK.sub("", text))
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
        function = "data/rewards.py:last_number"
        words += ["--reward_fn", function, "--heldout_reward_fn", function]
        words += ["--num_rollouts", 4, "--train_batch_size", 4]
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
    assert PAGES[0].stat().st_size <= 16_000 and PAGES[1].stat().st_size <= 10_000
    assert sum(page.stat().st_size for page in DOCS.glob("*.md")) <= 70_000
    assert (ROOT / "chat.html").stat().st_size <= 12_000
