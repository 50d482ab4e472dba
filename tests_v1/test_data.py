"""Data: records to token ids, every file format and every way to get it wrong, the cache, packing, collate."""

import gzip
import json

import numpy as np
import pytest
from conftest import ROOT, finish, flags, ragged_records, start

import common_v1 as common
import seq2seq

RECORDS = [{"prompt": "the cat", "completion": "yes"}, {"prompt": "4 March 1997", "completion": "1997-03-04"}]


@pytest.fixture(scope="module")
def tokenizer():
    return common.transformers.AutoTokenizer.from_pretrained(ROOT / "models" / "tiny-t5")


@pytest.fixture
def load(mount, tokenizer):
    """load(text or object, file name, **flags) -> (data sets, problems) of that file under data/."""
    def load(content, name="a.json", **changes):
        if content is not None:
            text = (content if isinstance(content, str) else json.dumps(content)).encode()
            (mount / "data" / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        problems = []
        return seq2seq.load_data(seq2seq.parse_args(flags(mount, **{"data": "a", **changes})), tokenizer,
                                 problems), problems
    return load


def lines_of(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def ids_of(data, side, split):
    return [row.tolist() for row in getattr(data, side)[split]]


# ------------------------------------------------------------------------------------------------ records


def test_golden_ids_of_hand_written_records(load):
    """Pieces: '▁the' '▁' 'c' 'at' </s>; '▁yes' </s>; '▁' '4' '▁March' ...; both sides end with </s>."""
    (data,), problems = load({"train": RECORDS, "eval": RECORDS[:1]})
    assert problems == []
    assert ids_of(data, "source", "train") == [[13, 5, 66, 24, 1], [5, 18, 114, 5, 6, 9, 9, 17, 1]]
    assert ids_of(data, "target", "train") == [[3, 1], [5, 6, 9, 9, 17, 175, 8, 15, 175, 8, 18, 1]]


@pytest.mark.parametrize("ids, limit, source, target, target_with_eos", [
    ([5, 6, 7, 1], 4, [5, 6, 7, 1], [5, 6, 7, 1], [5, 6, 7, 1]), ([5, 6, 7, 1], 3, [5, 6, 1], [5, 6, 7], [5, 6, 1]),
    ([5, 6, 7, 1], 2, [5, 1], [5, 6], [5, 1]), ([5, 6, 7], 3, [5, 6, 7], [5, 6, 7], [5, 6, 1]),
                                                                         ([5, 6], 3, [5, 6], [5, 6, 1], [5, 6, 1])])
def test_truncation_keeps_the_end_token_of_prompts_only(ids, limit, source, target, target_with_eos):
    assert seq2seq.encode_source(ids, limit, 1) == source
    assert seq2seq.encode_target(ids, limit, 1, False) == target
    assert seq2seq.encode_target(ids, limit, 1, True) == target_with_eos


def test_truncated_completions_are_counted_and_end_as_the_flag_says(load, messages):
    for switch, last in ((None, 9), (True, 1)):
        (data,), _ = load({"train": RECORDS, "eval": RECORDS}, max_target_length=4, max_source_length=6,
                          truncated_eos=switch)
        assert ids_of(data, "target", "train") == [[3, 1], [5, 6, 9, last]]
        assert ids_of(data, "source", "train") == [[13, 5, 66, 24, 1], [5, 18, 114, 5, 6, 1]]
    assert any("2 of 4 completions are longer than --max_target_length 4" in line for line in messages)
    assert any("2 of 4 prompts are longer than --max_source_length 6" in line for line in messages)


@pytest.mark.parametrize("record, pair", [
    ({"instruction": "Add", "input": "1 2", "output": "3"}, ("Add\n\n1 2", "3")),
                                          ({"instruction": "Add", "input": "", "output": "3"}, ("Add", "3")),
    ({"instruction": "Add", "output": "3"}, ("Add", "3")), ({"prompt": "p", "completion": " c ", "instruction": "x"},
                                                            ("p", " c "))])
def test_alpaca_and_plain_records(record, pair):
    assert seq2seq.to_pair(record) == (*pair, None)


@pytest.mark.parametrize("record, named", [({"instruction": "Add", "input": 5, "output": "6"}, "'input'"),
                                           ({"instruction": "Add"}, "'output'")])
def test_alpaca_fields_of_a_wrong_type_are_refused_rather_than_dropped(record, named):
    assert named in str(seq2seq.to_pair(record)[2])


def test_duplicates_are_separate_records_and_extra_keys_ride_along(load):
    record = {**RECORDS[0], "id": 7, "tags": ["a", {"b": None}]}
    (data,), problems = load({"train": [RECORDS[1]] * 3 + RECORDS, "eval": [record, record]})
    assert problems == [] and (data.counts["train"], data.counts["eval"]) == (5, 2)
    assert data.records["eval"] == [{"prompt": "the cat", "completion": "yes", "orig_d": record}] * 2


def test_extra_keys_ride_along_whatever_they_hold(load, tmp_path):
    record = {**RECORDS[0], "half a surrogate": "\ud83d", "number": 10**30, "line": "a\u2028b", "nested": [{}]}
    (data,), _ = load({"train": RECORDS, "eval": [record]})
    assert data.records["eval"][0]["orig_d"] == record
    common.write_json(tmp_path / "predictions.json", data.records["eval"])
    assert json.loads((tmp_path / "predictions.json").read_text()) == data.records["eval"]


SPLIT_LINES = lines_of({**record, "split": split} for record, split in zip(RECORDS * 2, ("train", "eval", "train",
                                                                                         "test")))


@pytest.mark.parametrize("name, content", [
    ("a.json", json.dumps({"train": [RECORDS[0]] * 2, "eval": RECORDS[1:], "test": RECORDS[1:]})),
                                           ("a.jsonl", SPLIT_LINES),
    ("a.json.gz", json.dumps({"test": RECORDS[1:], "eval": RECORDS[1:], "train": [RECORDS[0]] * 2})),
                                           ("a.jsonl.gz", SPLIT_LINES),
    ("a.jsonl", "\ufeff" + SPLIT_LINES), ("a.jsonl", "\n" + SPLIT_LINES.replace("\n", "\r\n \r\n"))], ids=repr)
def test_every_format_gives_the_same_splits(load, name, content):
    (data,), problems = load(content, name)
    assert problems == [] and [data.counts[s] for s in ("train", "eval", "test")] == [2, 1, 1]
    assert ids_of(data, "target", "train") == [[3, 1]] * 2
    assert data.records["test"][0]["completion"] == "1997-03-04"


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_splits_beside_a_json_lines_file(load, mount, ending):
    load(lines_of(RECORDS[1:]), f"a.eval.{ending}")
    load(lines_of(RECORDS[:1] * 4), f"a.test.{ending}")
    (data,), problems = load(lines_of(RECORDS), f"a.{ending}")
    assert problems == [] and [data.counts[s] for s in ("train", "eval", "test")] == [2, 1, 4]
    assert data.records["eval"][0]["prompt"] == "4 March 1997"


def test_a_bare_list_is_training_data_but_for_records_that_name_their_split(load):
    (data,), problems = load([{"instruction": "Add", "input": "1 2", "output": "3"}, RECORDS[0], {**RECORDS[1], "split": "eval"}])
    assert problems == [] and [data.counts[s] for s in ("train", "eval", "test")] == [2, 1, 0]
    assert data.records["eval"][0]["prompt"] == RECORDS[1]["prompt"]


def test_eval_fraction_holds_out_by_prompt_the_same_way_every_time(load):
    records = ragged_records(400) + ragged_records(100)  # 100 prompts occur twice
    (data,), problems = load({"train": records}, eval_fraction=0.1)
    sides = {split: set(data.hashes[split].tolist()) for split in ("train", "eval")}
    assert problems == [] and not sides["train"] & sides["eval"] and len(sides["train"] | sides["eval"]) == 400
    assert data.counts["train"] + data.counts["eval"] == 500 and 20 <= len(sides["eval"]) <= 65
    (again,), _ = load({"train": records[::-1]}, eval_fraction=0.1)
    assert set(again.hashes["eval"].tolist()) == sides["eval"]
    (other,), _ = load({"train": records}, eval_fraction=0.2)
    assert set(other.hashes["eval"].tolist()) > sides["eval"]


def test_eval_fraction_adds_to_an_eval_split_that_the_set_brings(load):
    (data,), problems = load({"train": ragged_records(200), "eval": RECORDS}, eval_fraction=0.2)
    assert problems == [] and data.counts["train"] + data.counts["eval"] == 202 and 20 < data.counts["eval"] < 65
    assert [record["orig_d"] for record in data.records["eval"]][-2:] == RECORDS
    assert not set(data.hashes["train"].tolist()) & set(data.hashes["eval"].tolist())


def test_one_set_of_several_may_bring_the_eval_split(load):
    load({"train": RECORDS}, "b.json")
    content = {"train": RECORDS, "eval": RECORDS}
    assert load(content, data=["a", "b"])[1] == [] and any("no evaluation" in p for p in load(None, data="b")[1])


def test_eval_prompts_that_occur_in_train_are_counted(load, messages):
    load({"train": RECORDS, "eval": [RECORDS[0], {"prompt": "new", "completion": "yes"}, RECORDS[0]],
          "test": [{"prompt": "b", "completion": "c"}]})
    leaks = [line for line in messages if "occur in the training data" in line]
    assert len(leaks) == 1 and "2 of 3 eval prompts" in leaks[0]


@pytest.mark.parametrize("completion", ['{"a"', "two\nlines", "你好", "a  b", "yes</s>"])
def test_completions_that_the_tokenizer_cannot_write_are_an_error_above_one_percent(load, messages, completion):
    good = ragged_records(196)
    for n_bad, is_error in ((3, True), (2, False)):
        content = {"train": good + [{"prompt": f"p {i}", "completion": completion} for i in range(n_bad)],
                   "eval": good[:4 - n_bad]}
        _, problems = load(content)
        found = [p for p in problems if f"{n_bad} of 200" in p and "byt5" in p and "mt5" in p and "--allow_lossy" in p]
        assert len(found) == len(problems) == is_error
        assert any(f"{n_bad} of 200" in line and repr(completion)[1:-1] in line for line in messages) != is_error
    (data,), problems = load({"train": good + [{"prompt": f"p {i}", "completion": completion} for i in range(3)],
                              "eval": good[:1]}, allow_lossy=True)
    assert problems == [] and data.counts["lossy"] == 3


# ------------------------------------------------------------------------------------------------ malformed input

OK = lines_of([{**RECORDS[0], "split": "eval"}] + RECORDS)
MALFORMED = {  # name: (file name, content, words that the message must have)
    "missing key": ("a.json", {"train": [RECORDS[0], {"prompt": "x", "answer": "y"}], "eval": RECORDS},
                    ["train[1]", "'completion'", "answer"]),
    "missing key in eval": ("a.json", {"train": RECORDS, "eval": [{"completion": "y"}]}, ["eval[0]", "'prompt'"]),
    "wrong type": ("a.jsonl", OK + '{"prompt": "x", "completion": 3}', ["line 4", "'completion'", "int", "string"]),
    "null": ("a.jsonl", OK + '{"prompt": null, "completion": "y"}', ["line 4", "'prompt'"]),
    "empty completion": ("a.jsonl", OK + '\n{"prompt": "x", "completion": ""}', ["line 5", "'completion' is empty"]),
    "whitespace completion": ("a.json", {"train": [{"prompt": "x", "completion": " \n"}], "eval": RECORDS},
                              ["train[0]", "is empty"]),
    "not an object": ("a.jsonl", OK + "[1, 2]", ["line 4", "list", "object"]),
    "not an object in a list": ("a.json", {"train": ["text"], "eval": RECORDS}, ["train[0]", "str", "object"]),
    "broken line": ("a.jsonl", '{"prompt": "x", \n' + OK, ["line 1", "not JSON"]),
    "a word on top": ("a.json", '"text"', ["expected an object of lists"]),
    "not an object in a bare list": ("a.json", [RECORDS[0], "text"], ["a.json, [1]", "str", "object"]),
    "lines in a .json": ("a.json", OK, ["not JSON", ".jsonl"]),
    "no training records": ("a.json", {"eval": RECORDS}, ["no training records"]),
    "no eval records": ("a.json", {"train": RECORDS}, ["a: no evaluation records", "--eval_fraction"]),
    "empty file": ("a.jsonl", "", ["no training records"]),
    "unknown split": ("a.jsonl", OK + lines_of([{**RECORDS[0], "split": "dev"}]),
                      ["line 4", "'dev'", "train, eval or test"]),
    "split of a wrong type": ("a.jsonl", OK + lines_of([{**RECORDS[0], "split": ["train"]}]),
                              ["line 4", "train, eval or test"]),
    "half a surrogate": ("a.jsonl", OK + '{"prompt": "\\ud83d x", "completion": "y"}', ["line 4", "'prompt'"]),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(OK.encode() * 50)[:-20], ["cannot be read"]),
    "no gzip": ("a.json.gz", b"{}", ["cannot be read"]),
    "not UTF-8": ("a.jsonl", OK.encode() + '{"prompt": "é", "completion": "y"}'.encode("latin-1"), ["not UTF-8"]),
    "a folder": ("a.json", None, ["a.json"]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_named_with_the_place_and_the_remedy(load, mount, case):
    name, content, words = MALFORMED[case]
    if content is None:
        (mount / "data" / name).mkdir()
    if isinstance(content, bytes):  # as they are, not compressed once more
        (mount / "data" / name).write_bytes(content)
        content = None
    data_sets, problems = load(content, name)
    assert data_sets == [] or "no " in words[0]
    assert len(problems) >= 1 and all(word in problems[0] for word in words), problems
    assert f"{mount}/data/{name}" in problems[0] or case == "no eval records"  # that is a matter of all sets together


def test_all_malformed_sets_of_a_run_are_reported_together_before_the_model_loads(mount, run_main, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(common, "load_model", lambda *_: loaded.append(1))
    one_by_one = ("a folder", "no eval records", "split of a wrong type", "half a surrogate")
    names = {case: f"set{i}" for i, case in enumerate(MALFORMED) if case not in one_by_one}
    for case, name in names.items():
        content = MALFORMED[case][1]
        text = content if isinstance(content, bytes | str) else json.dumps(content)
        path = mount / "data" / MALFORMED[case][0].replace("a.", f"{name}.")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert run_main(flags(mount, data=[*names.values(), "raged"], learning_rate=-1)) == 2
    error = capsys.readouterr().err
    assert loaded == [] and not (mount / "models" / "run").exists()
    assert [name for name in names.values() if f"/data/{name}." not in error] == [] and len(names) >= 15
    assert "raged" in error and "did you mean ragged?" in error and "--learning_rate -1.0" in error


def test_name_that_means_two_files_is_refused(load, mount, monkeypatch, tmp_path_factory):
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    (here / "data").mkdir()
    assert load({"train": RECORDS, "eval": RECORDS})[1] == []
    (here / "data" / "a.json").write_text("{}")
    assert any("data/a is ambiguous" in p and "/data/a.json and data/a.json" in p for p in load(None)[1])
    (here / "data" / "a.json").unlink()
    assert "ambiguous" in load(lines_of(RECORDS), "a.jsonl")[1][0]


def test_path_to_a_file_is_taken_as_it_is(load, mount, tmp_path_factory):
    path = tmp_path_factory.mktemp("elsewhere") / "b.json"
    assert str(path) in load(None, data=path)[1][0]
    path.write_text(json.dumps({"train": RECORDS, "eval": RECORDS}))
    assert load(None, data=path)[0][0].counts["train"] == 2


# ------------------------------------------------------------------------------------------------ cache, memory


def test_tokens_are_cached_until_data_lengths_or_tokenizer_change(load, mount, monkeypatch):
    calls = []
    original = seq2seq.tokenize_data_set
    monkeypatch.setattr(seq2seq, "tokenize_data_set", lambda *a: (calls.append(1), original(*a))[1])
    content = {"train": RECORDS, "eval": RECORDS}
    keys = {load(content, **changes)[0][0].sha256 for changes in ({}, {"learning_rate": 1}, {"max_source_length": 5},
                                                                  {"max_target_length": 5},
                                                                   {"truncated_eos": True}, {"eval_fraction": 0.5},
                                                                  {"max_source_length": 5})}
    assert len(keys) == len(calls) == 5
    key = load({"train": RECORDS[::-1], "eval": RECORDS})[0][0].sha256
    assert key not in keys and len(calls) == 6
    (mount / "data" / ".cache" / key / "COMPLETE").unlink()
    (mount / "data" / ".cache" / key / "train.source.ids").write_bytes(b"")
    (data,), _ = load(None)
    assert len(calls) == 7 and ids_of(data, "source", "train")[1] == [13, 5, 66, 24, 1]


def test_unwritable_cache_names_cache_dir(load, mount):
    (mount / "file").touch()
    _, problems = load({"train": RECORDS, "eval": RECORDS}, cache_dir=mount / "file" / "below")
    assert len(problems) == 1 and "--cache_dir" in problems[0] and "file/below" in problems[0]
    assert load(None, cache_dir=mount / "cache")[1] == [] and any((mount / "cache").glob("*/COMPLETE"))


MEMORY = """
import json, re, sys
sys.path.insert(0, {root!r})
import common_v1 as common, seq2seq
tokenizer = common.transformers.AutoTokenizer.from_pretrained({root!r} + "/models/tiny-t5")
peaks = []
for n in (20000, 200000):
    with open(f"{{n}}.jsonl", "w") as file:
        for i in range(n):
            split = "train" if i else "eval"
            record = {{"prompt": f"cat {{i}}", "completion": "yes", "split": split, "note": "x" * 1000}}
            file.write(json.dumps(record) + "\\n")
    problems = []
    args = seq2seq.parse_args(["--data", f"{{n}}.jsonl", "--cache_dir", "cache"])
    data = seq2seq.load_data(args, tokenizer, problems)
    assert not problems and data[0].counts["train"] == n - 1, problems
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
print("GREW", peaks[1] - peaks[0])
"""


@pytest.mark.slow
def test_json_lines_load_in_bounded_memory(tmp_path):
    codes, output = finish(start(["-c", MEMORY.format(root=str(ROOT))], cwd=tmp_path))
    assert codes == [0], output[-3000:]
    small, large = ((tmp_path / f"{n}.jsonl").stat().st_size for n in (20000, 200000))
    assert large - small > 180e6  # what a list would take at least
    assert int(output.rsplit("GREW", 1)[1]) < 90, output[-200:]


# ------------------------------------------------------------------------------------------------ packing, collate


def ragged_lengths(n, seed=0):
    """(n, 2) source and target lengths, spread like GSM8K's questions and answers."""
    rng = np.random.default_rng(seed)
    return np.clip(np.exp(rng.normal([4.3, 4.6], [0.45, 0.55], (n, 2))), 2, 512).astype(int)


def padding_share(rows, lengths):
    """Of groups of rows: the share of computed positions that hold no token."""
    computed = sum(len(group) * lengths_of.max(0).sum() for group in rows if group != []
                   for lengths_of in [np.array([lengths[row].sum(0) for row in group])])
    return 1 - sum(lengths[row].sum() for group in rows for row in group) / computed


@pytest.mark.parametrize("packed", [True, False])
def test_padding_is_at_most_five_percent_on_ragged_data(packed):
    lengths, n_ranks = ragged_lengths(4096), 2
    batches = common.epoch_batches(np.arange(4096), lengths, 64, 0, 0)
    groups = [group for batch in batches[:16] for piece in common.deal(batch, lengths.sum(1), n_ranks)
              for group in seq2seq.plan(piece, lengths, 256, packed, 64)]
    assert padding_share(groups, lengths) <= 0.05
    random_order = [[[int(i)] for i in part] for part in np.random.default_rng(1).permutation(1024).reshape(-1, 32)]
    assert padding_share(random_order, lengths) > 0.2


@pytest.mark.parametrize("packed", [True, False])
def test_every_example_is_dealt_planned_and_packed_exactly_once(packed):
    rng = np.random.default_rng(5)
    lengths = ragged_lengths(300)
    for n, n_pieces in [(1, 1), (1, 4), (3, 8), (64, 1), (100, 7), *rng.integers(1, [200, 9], (10, 2))]:
        ids = rng.permutation(300)[:n]
        pieces = common.deal(ids, lengths.sum(1), n_pieces)
        found = [i for piece in pieces for group in seq2seq.plan(piece, lengths, 96, packed, 64) for row in group
                 for i in row]
        assert len(pieces) == n_pieces and sorted(found) == sorted(ids.tolist())
        assert packed or all(len(row) == 1 for piece in pieces for group in seq2seq.plan(piece, lengths, 96, packed,
                                                                                         64) for row in group)


def test_pieces_are_balanced_in_tokens_and_empty_where_examples_run_out():
    lengths = ragged_lengths(128)
    tokens = [int(lengths[piece].sum()) for piece in common.deal(np.arange(128), lengths.sum(1), 8)]
    assert max(tokens) < 1.15 * min(tokens) and max(len(p) for p in common.deal(np.arange(128), lengths.sum(1), 8)) > 16 + 4
    assert sorted(map(len, common.deal(np.arange(3), lengths.sum(1), 5))) == [0, 0, 1, 1, 1]


def test_collate_golden_rows_of_two_examples():
    """Start id 0, pad id 9. Decoder position t reads target t - 1; what comes after the last target is segment 1."""
    sources, targets = {4: [11, 12, 1], 7: [13, 1]}, {4: [21, 1], 7: [22, 23, 1]}
    packed = seq2seq.collate([[4, 7]], sources, targets, 0, 9)
    assert {name: tensor.tolist() for name, tensor in packed.items()} == {
        "source_ids": [[11, 12, 1, 13, 1]], "source_segment": [[1, 1, 1, 2, 2]],
        "decoder_ids": [[0, 21, 0, 22, 23]], "decoder_segment": [[1, 1, 2, 2, 2]],
        "target_index": [0, 1, 2, 3, 4], "target_ids": [21, 1, 22, 23, 1], "target_example": [4, 4, 7, 7, 7]}
    padded = seq2seq.collate([[7], [4]], sources, targets, 0, 9)
    assert {name: tensor.tolist() for name, tensor in padded.items()} == {
        "source_ids": [[13, 1, 9], [11, 12, 1]], "source_segment": [[1, 1, 0], [1, 1, 1]],
        "decoder_ids": [[0, 22, 23], [0, 21, 9]], "decoder_segment": [[1, 1, 1], [1, 1, 1]],
        "target_index": [0, 1, 2, 3, 4], "target_ids": [22, 23, 1, 21, 1], "target_example": [7, 7, 7, 4, 4]}
    empty = seq2seq.collate([], sources, targets, 0, 9)
    assert empty["source_ids"].shape == empty["decoder_ids"].shape == (1, 1) and empty["target_ids"].shape == (0,)


def test_packed_rows_keep_every_target_beside_its_own_source():
    rng, lengths = np.random.default_rng(2), ragged_lengths(40)
    sources, targets = ({i: rng.integers(2, 300, lengths[i, side]) for i in range(40)} for side in (0, 1))
    for group in seq2seq.plan(np.arange(40), lengths, 96, True, 64):
        batch = {name: tensor.numpy() for name, tensor in seq2seq.collate(group, sources, targets, 0, 1).items()}
        segments = batch["decoder_segment"].flatten()
        for r, row in enumerate(group):
            for segment, i in enumerate(row, 1):
                mine = batch["target_example"] == i
                places = batch["target_index"][mine]
                assert batch["source_ids"][r][batch["source_segment"][r] == segment].tolist() == sources[i].tolist()
                assert batch["target_ids"][mine].tolist() == targets[i].tolist() and set(segments[places]) == {segment}
                assert batch["decoder_ids"].flatten()[places].tolist() == [0, *targets[i][:-1]]
                assert set(places // batch["decoder_ids"].shape[1]) == {r}
        assert max(map(len, group)) > 1
