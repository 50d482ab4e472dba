"""seq2seq.py on plain text, in several processes: the same mathematics at every ZeRO stage, and after kill -9."""

import pytest
from conftest import ROOT, assert_same_mathematics, assert_same_run, rows, run_again, run_and_kill, run_jobs, write_model
from test_prepare_text import prepare
from test_pretrain import sentences, text_flags

pytestmark = pytest.mark.slow
CASES = {"t5": {}, "compact": {"span_labels": "compact"}, "ul2": {"objective": "ul2"}, "prefix": {"objective": "prefix_lm"},
         "adafactor": {"optimizer": "adafactor"}, "rms": {"optimizer": "adamw_rms"}}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A mount with 300 documents, and the runs of one process that all others are compared with. An epoch has 41 examples, so
    its sixth step has one, and the other rank none."""
    mount = tmp_path_factory.mktemp("pretrain")
    write_model(mount / "models" / "tiny")
    write_model(mount / "models" / "dropout", dropout_rate=0.1)
    (mount / "data").mkdir()
    (mount / "data" / "corpus.txt").write_text("\n".join(sentences(300)) + "\n")
    run_jobs(mount, [words(mount, f"one-{name}", **case) for name, case in CASES.items()], 1)
    return mount


def words(mount, run, **changes):
    return text_flags(mount, run, **{"data": "corpus:41", "max_steps": 7, "learning_rate": 0.001, "train_batch_size": 8, "eval_batch_size": 7, **changes})


@pytest.mark.parametrize("stage", range(4))
def test_two_processes_train_as_one_at_every_stage(shared, stage):
    cases = [name for name in CASES if stage == 0 or name not in ("adafactor", "rms")]
    run_jobs(shared, [words(shared, f"two-{name}-{stage}", ds_config=f"zero{stage}", **CASES[name]) for name in cases], 2)
    run_jobs(shared, [words(shared, f"split-{name}-{stage}", ds_config=f"zero{stage}", train_batch_size=4, gradient_accumulation_steps=2, **CASES[name])
                      for name in cases], 2)
    for name in cases:
        for kind in ("two", "split"):
            assert_same_mathematics(shared / "models" / f"{kind}-{name}-{stage}", shared / "models" / f"one-{name}")


@pytest.mark.parametrize("n_procs", [1, 2])
def test_kill_9_in_the_middle_of_an_epoch_of_a_prepared_corpus_continues_to_the_bit(shared, n_procs):
    (shared / "long.txt").write_text("\n".join(sentences(6000, seed=2)) + "\n")
    assert (shared / "data" / "long").exists() or prepare(shared, "long", "--input", str(shared / "long.txt")) == 0
    options = {"data": "long", "eval_fraction": 0, "model_init_name": "dropout", "max_steps": 60, "save_steps": 5, "logging_steps": 1}
    names = [f"{kind}-{n_procs}" for kind in ("whole", "killed")]
    run_jobs(shared, [words(shared, names[0], **options)], n_procs)
    command = [ROOT / "seq2seq.py", *words(shared, names[1], **options)]
    assert run_and_kill(command, shared / "models" / names[1], n_procs, 23)
    run_again(command, n_procs)
    assert_same_run(*(shared / "models" / name for name in names), last=60)
    assert rows(shared / "models" / names[0], "train")[-1]["epoch"] < 1
