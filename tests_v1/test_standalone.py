"""The script, common_v1.py and ds_configs/ copied into an empty folder train on a mounted folder, from any place."""

import json

import pytest
import torch
import transformers
from conftest import ROOT, copy_script, finish, flags, rows, start, weights


def test_copied_script_trains_on_a_mounted_folder(mount, tmp_path_factory):
    home, cwd = tmp_path_factory.mktemp("home") / "copy", tmp_path_factory.mktemp("elsewhere")
    script = copy_script("seq2seq.py", home)
    codes, output = finish(start([script, *flags(mount, max_steps=2, ds_config=None)], cwd=cwd))
    assert codes == [0], output[-4000:]
    run_dir = mount / "models" / "run"
    files = {p.name for p in run_dir.iterdir()}
    assert files >= {"COMPLETE", "args.json", "env.json", "ds_config.json", "rawtune.json", "metrics.jsonl", "log.txt",
                     "code", "checkpoint-2",
                     "config.json", "generation_config.json", "model.safetensors", "temperature=0.00_n=1_step=0.json",
                     "temperature=0.00_n=1_step=2.json", "test_temperature=0.00_n=1_step=2.json"}
    assert not [name for name in files if name.endswith(".tmp")] and (run_dir / "checkpoint-2" / "COMPLETE").exists()
    assert sorted(p.name for p in (run_dir / "code").iterdir()) == ["common_v1.py", "seq2seq.py"]
    assert [row["step"] for row in rows(run_dir)] == [1, 2] and [row["step"] for row in rows(run_dir, "eval")] == [0, 2]
    predictions = json.loads((run_dir / "temperature=0.00_n=1_step=2.json").read_text())
    assert len(predictions) == 11 and {"prompt", "generations", "demonstration", "orig_d"} <= set(predictions[0])
    assert [p["orig_d"]["row"] for p in predictions] == list(range(43, 54))
    assert "lm_postprocess" in predictions[0]["generations"][0]
    assert list(cwd.iterdir()) == []
    assert {p.name for p in home.iterdir()} - {"__pycache__"} == {"seq2seq.py", "common_v1.py", "ds_configs"}

    model, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(run_dir, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    saved, loaded = weights(run_dir / "checkpoint-2"), model.state_dict()
    assert all(torch.equal(tensor, loaded[name].double()) for name, tensor in saved.items()) and len(saved) > 20
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_dir)
    assert tokenizer("the cat").input_ids == [13, 5, 66, 24, 1]
    fresh = transformers.AutoModelForSeq2SeqLM.from_config(model.config)
    assert not all(torch.equal(tensor, fresh.state_dict()[name].double()) for name, tensor in saved.items())


@pytest.mark.slow
def test_without_compiler_or_any_other_program_every_stage_trains(mount):
    """K1, K2: an empty PATH hides gcc, nvcc and git; offload falls back to torch AdamW with a WARNING, nothing is built."""
    (mount / "nothing").mkdir()
    for name in ("zero1", "zero2", "zero3", "zero2_offload"):
        words = [ROOT / "seq2seq.py", *flags(mount, run=name, ds_config=name)]
        codes, output = finish(start(words, env={"PATH": str(mount / "nothing"), "TORCH_EXTENSIONS_DIR": str(mount / "extensions")}), 90)
        assert codes == [0], output[-3000:]
        assert not list((mount / "extensions").glob("*"))
        assert ("WARNING" in output and "torch AdamW" in output) == ("offload" in name)
