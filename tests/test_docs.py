"""README.md, docs/ and data/README.md: commands parse, links lead somewhere, flags and metrics are the real ones."""

import json
import os
import re
import shlex
import shutil

import pytest
from conftest import ROOT, finish, flags, rows, start

import common
import seq2seq

PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHER_FLAGS = {"--num_gpus", "--no_ssh", "--node_rank", "--gpus-per-task", "--signal"}  # deepspeed, Slurm
OLD_FLAGS = {"--overwrite_output_dir", "--pred_dir"}  # of the earlier system, named beside the new ones


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


def known_flags(monkeypatch):
    """Every flag that the real parser has."""
    found = set()

    def look(parser, argv):
        found.update(parser._option_string_actions)
        raise SystemExit
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(common.Parser, "parse_args", look)
        seq2seq.parse_args(["--data", "x"])
    return found


def test_every_command_parses(monkeypatch, tmp_path):
    found = list(script_commands("seq2seq.py"))
    assert len(found) > 12 and {page for page, _ in found} >= {"README.md", "seq2seq.md"}
    monkeypatch.chdir(tmp_path)  # presets are found from anywhere
    for page, words in found:
        args = seq2seq.parse_args(words)
        problems = []
        seq2seq.check_args(args, problems)
        assert not problems, f"{page}: seq2seq.py {shlex.join(words)}: {problems}"


def test_a_wrong_command_does_not_parse():
    with pytest.raises(SystemExit) as stop:
        seq2seq.parse_args(["--data", "mydata", "--learning-rate", "1"])
    assert stop.value.code == 2


@pytest.mark.parametrize("preset", sorted(p.name for p in (ROOT / "presets").iterdir()))
def test_preset_parses_and_a_later_flag_wins(preset):
    words = [f"@presets/{preset}", "--model_init_path", "google/flan-t5-base", "--data", "mydata", "--seed", "7"]
    assert seq2seq.parse_args(words).data_name == ["mydata"]
    args, problems = seq2seq.parse_args([*words, "--learning_rate", "0.125"]), []
    seq2seq.check_args(args, problems)
    assert (args.learning_rate, args.seed, problems) == (0.125, 7, [])
    assert seq2seq.parse_args(words).learning_rate != 0.125


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
    assert page.name == "README.md" or len(named) > 20  # the pattern still finds them
    assert named <= known_flags(monkeypatch) | LAUNCHER_FLAGS | OLD_FLAGS


def test_every_metric_is_explained(mount, run_main):
    """A run with two data sets and a test part logs no number that docs/seq2seq.md does not name."""
    shutil.copy(mount / "data" / "ragged.json", mount / "data" / "other.json")
    assert run_main(flags(mount, data=["ragged", "other"], max_steps=1)) == 0
    run = mount / "models" / "run"
    logged = {name for split in ("train", "eval", "test") for row in rows(run, split) for name in row}
    logged |= {"mfu", "mfu_of_matmul"}  # on a GPU
    logged = {re.sub("/(ragged|other)/", "/<dataset>/", name) for name in logged}
    explained = set(re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "seq2seq.md").read_text()))
    assert {"loss", "eval/<dataset>/exact_match", "test/token_f1"} <= logged
    assert logged <= explained


@pytest.mark.slow
def test_first_command_of_the_readme_reaches_its_promise(tmp_path):
    """`python seq2seq.py` in a copy of the repository, so that the user's models/dates-demo stays as it is."""
    assert "pip install -r requirements.txt && python seq2seq.py\n" in (ROOT / "README.md").read_text()
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("seq2seq.py", "common.py"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "ds_configs", copy / "ds_configs")
    shutil.copytree(ROOT / "models" / "tiny-t5", copy / "models" / "tiny-t5")
    shutil.copytree(ROOT / "data", copy / "data", ignore=shutil.ignore_patterns(".cache"))
    cores = str(len(os.sched_getaffinity(0)))
    codes, output = finish(start(["seq2seq.py"], cwd=copy, env={"OMP_NUM_THREADS": cores}), timeout=600)
    assert codes == [0], output[-3000:]
    run = copy / "models" / "dates-demo"
    assert rows(run, "test")[-1]["test/exact_match"] >= 0.95
    predictions = json.loads(next(run.glob("test_temperature=0.00_n=1_step=*.json")).read_text())
    assert len(predictions) == 400 and set(predictions[0]) >= {"prompt", "generations", "demonstration", "orig_d"}
