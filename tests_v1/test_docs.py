"""README.md, docs/ and data/README.md: commands parse, links lead somewhere, flags and metrics are the real ones."""

import argparse
import re
import shlex

import pytest
from conftest import ROOT, load_file

import clf
import common as common_v2
import common_v1 as common
import project_grads
import rl_ppo
import seq2seq
import sft_causal

SCRIPTS = {"project_grads.py": project_grads}
NEW = {"seq2seq.md", "sft_causal.md", "clf.md", "instructions.md", "clf.md", "pretraining.md", "adapters.md", "extend.md", "chat.md", "rl_ppo.md", "project_grads.md"}  # of version 2: see tests/
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in NEW)]
LAUNCHER_FLAGS = {"--num_gpus", "--include", "--no_ssh", "--node_rank", "--gpus-per-task", "--signal"}  # deepspeed, Slurm
OLD_FLAGS = {"--overwrite_output_dir", "--pred_dir", "--save_best_metric", "--ft_head_first"}  # of the earlier system, beside the new ones


TOOLS = [path for path in [*sorted((ROOT / "data").glob("*.py")), ROOT / "presets" / "sweeps" / "run.py"] if "def main(argv" in path.read_text()]


OF_SEQ2SEQ = ["flan-t5", "t5-pretrain", "ft-cot-t5", "tk-instruct-3b", "qog-def-pos", "qg", "flan-t5-xl"]  # presets


def commands(page):
    """The command lines of a page's bash blocks, continuation lines joined, "a && b" split."""
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield from re.split(r"&&|\|\||;", line)


def script_commands(script):
    """(page, words after the script) of every command that runs it, launchers cut off."""
    for page in PAGES:
        for line in commands(page):
            words = shlex.split(line, comments=True)
            where = [i for i, word in enumerate(words) if word == script]
            if where and words[0] not in ("cp", "#SBATCH"):
                yield page.name, words[where[0] + 1:]


def known_flags(monkeypatch, parse):
    """Every flag that the real parser has; parse: what makes it, given any words."""
    found = set()

    def look(parser, argv=None, namespace=None):
        found.update(parser._option_string_actions)
        for action in parser._actions:
            for sub in (action.choices or {}).values() if isinstance(action, argparse._SubParsersAction) else ():
                found.update(sub._option_string_actions)
        raise SystemExit
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        for kind in (common.Parser, common_v2.Parser, argparse.ArgumentParser):
            patch.setattr(kind, "parse_args", look)
        parse(["--data", "x"])
    return found


def flags_of(page, monkeypatch):
    """The flags that a page may name: docs/<script>.md those of its script, other pages those of all."""
    parsers = {**{name: script.parse_args for name, script in SCRIPTS.items()}, "rl_ppo.py": rl_ppo.parse_args, "seq2seq.py": seq2seq.parse_args, "clf.py": clf.parse_args, "sft_causal.py": sft_causal.parse_args, **{path.name: load_file(path).main for path in TOOLS}}
    own = f"{page.stem}.py"
    return set().union(*(known_flags(monkeypatch, parse) for name, parse in parsers.items() if own not in parsers or name == own))


@pytest.mark.parametrize("script, n, pages", [("project_grads.py", 6, {"README.md"})])
def test_every_command_parses(script, n, pages, monkeypatch, tmp_path):
    found = list(script_commands(script))
    assert len(found) > n and {page for page, _ in found} >= pages
    monkeypatch.chdir(tmp_path)  # presets are found from anywhere
    for page, words in found:
        args = SCRIPTS[script].parse_args(words)
        problems = []
        SCRIPTS[script].check_args(args, problems)
        assert not problems, f"{page}: {script} {shlex.join(words)}: {problems}"


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.name)
def test_every_command_of_a_tool_parses(path, monkeypatch):
    """Those of the pages and those of its own docstring."""
    class Parsed(Exception):
        pass

    parse, module = argparse.ArgumentParser.parse_args, load_file(path)

    def only_parse(parser, argv=None, namespace=None):
        parse(parser, argv, namespace)
        raise Parsed
    name = str(path.relative_to(ROOT))
    lines = [f"    {line.strip()}" for line in module.__doc__.replace("\\\n", " ").splitlines() if line.strip().startswith(f"python {name}")]
    found = [words for _, words in script_commands(name)] + [shlex.split(line, comments=True)[2:] for line in lines]
    assert found
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    for words in found:
        with pytest.raises(Parsed):
            module.main(words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_command_does_not_parse(script):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].parse_args(["--data", "mydata", "--learning-rate", "1"])
    assert stop.value.code == 2


@pytest.mark.parametrize("preset", sorted(p.name for p in (ROOT / "presets").iterdir() if p.is_file()))
def test_preset_parses_and_a_later_flag_wins(preset):
    script = dict.fromkeys(OF_SEQ2SEQ, seq2seq).get(preset, rl_ppo if preset == "rlhf-defaults" else sft_causal)
    words = [f"@presets/{preset}", "--model_init_path", "some/model", "--data", "mydata", "--seed", "7",
             *(["--reward_fn", "x.py:y"] if script is rl_ppo else [])]
    assert script.parse_args(words).data_name == ["mydata"]
    args, problems = script.parse_args([*words, "--learning_rate", "0.125"]), []
    script.check_args(args, problems)
    assert (args.learning_rate, args.seed, problems) == (0.125, 7, [])
    assert isinstance(script.parse_args(words).learning_rate, float) and script.parse_args(words).learning_rate != 0.125


def test_presets_are_layered_from_left_to_right():
    """galactica-125m over sft-defaults: what it names wins, the rest stays; and the other way round."""
    base, own = (sft_causal.parse_args([f"@presets/{name}", "--model_init_path", "m", "--data", "d"]) for name in ("sft-defaults", "galactica-125m"))
    both = sft_causal.parse_args(["@presets/sft-defaults", "@presets/galactica-125m", "--model_init_path", "m", "--data", "d"])
    turned = sft_causal.parse_args(["@presets/galactica-125m", "@presets/sft-defaults", "--model_init_path", "m", "--data", "d"])
    assert (both.learning_rate, both.weight_decay, both.train_batch_size * both.gradient_accumulation_steps) == (5e-5, 0.01, 8)
    assert both.max_grad_norm == base.max_grad_norm == 2.0 and own.max_grad_norm == 1.0
    assert turned.learning_rate == base.learning_rate == 1e-5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            heads = [re.sub(r"[^\w\- ]", "", head.lower()) for head in heads]
            assert anchor in [head.replace(" ", "-") for head in heads], f"{page.name}: {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_flag_in_backticks_exists(page, monkeypatch):
    # blocks are left out: test_every_command_parses
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    code = " ".join(re.findall(r"`([^`]+)`", text))
    named = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", code))
    assert page.name == "README.md" or len(named) > 10  # the pattern still finds them
    assert named - flags_of(page, monkeypatch) - LAUNCHER_FLAGS - OLD_FLAGS == set()
