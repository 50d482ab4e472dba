"""The pages about seq2seq.py and the README: commands parse, flags, metrics and links are right."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT, make_model, metrics, pairs, run, write_data

import common
import seq2seq

SPINE = [ROOT / "docs" / name for name in ("seq2seq.md", "pretraining.md", "adapters.md")]
EXTEND = ROOT / "docs" / "extend.md"
PAGES = [ROOT / "README.md", *SPINE, EXTEND]
PRESETS = [path for path in (ROOT / "presets").glob("*") if path.is_file()]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
OTHER_FLAGS = {"--requeue", "--kl_coefficient"}  # Slurm's; that of the diff in docs/extend.md


def commands():
    """The words after seq2seq.py, of every command that runs it."""
    for page in PAGES:
        for language, text in BLOCK.findall(page.read_text()):
            for line in text.replace("\\\n", " ").splitlines() if language == "bash" else ():
                words = shlex.split(line, comments=True)
                if "seq2seq.py" in words and words[0] != "cp":
                    yield words[words.index("seq2seq.py") + 1 :]


def check(words):
    problems = []
    seq2seq.check_args(seq2seq.parse_args(words), problems)
    assert not problems, words


def test_commands_and_presets_parse(monkeypatch):
    monkeypatch.chdir(ROOT)  # where @presets/... is
    found = list(commands())
    assert len(found) > 20
    for words in found:
        check(words)
    for preset in PRESETS:
        if "seq2seq.py" in preset.read_text():
            check([f"@{preset}", "--model_init_path", "x", "--data", "y"])


@pytest.mark.parametrize("page", [*SPINE, EXTEND], ids=lambda page: page.name)
def test_flags_exist(page, capsys):
    parser = common.Parser(seq2seq.__doc__, seq2seq.FLAGS)
    known = OTHER_FLAGS | set(parser._option_string_actions)
    for script in set(re.findall(r"data/(prepare_\w+)\.py", page.read_text())):
        with pytest.raises(SystemExit):
            importlib.import_module(script).main(["--help"])
        known |= set(re.findall(r"--\w+", capsys.readouterr().out))
    text = BLOCK.sub("", page.read_text())
    named = re.findall(r"`[^`]*`", text)
    assert set(re.findall(r"(?<!\w)--\w+", " ".join(named))) <= known


def test_every_metric_is_explained():
    page = SPINE[0].read_text()
    make_model("t5")
    for name in ("one", "two"):
        write_data(name, pairs(4), pairs(2, 4), test=pairs(2, 6))
    words = ["--model_init_name", "t5", "--data", "one", "two", "--max_steps", 1]
    run(*words, "--max_new_tokens", 2, "--training_run_name", "r")
    logged = {f"eval/{name}" for name in seq2seq.METRICS}
    for row in metrics("r"):
        logged |= {re.sub("^(eval|test)/(one/|two/)?", "eval/", name) for name in row}
    explained = set(re.findall(r"`([\w/]+)`", page))
    assert logged <= explained


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
    assert sum(page.stat().st_size for page in SPINE) <= 25_000
    assert EXTEND.stat().st_size <= 6_000
