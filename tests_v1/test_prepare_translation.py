"""data/prepare_translation.py: every language's words by hand, directions and history, no pair and no text on both sides, every way to get a
file wrong, the readers of the two scripts. There is no real data at hand: miniatures."""

import argparse
import collections
import gzip
import itertools
import json
import random

import prepare_translation
import pytest

import seq2seq
import sft_causal

CODES = "ar de fr en it nl tr ru ms ko ja zh".split()


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """prepare({file: text or bytes}, "flags") -> (exit code, {split: records} or None, stdout, stderr)."""
    def prepare(files, *words, out="out.json"):
        monkeypatch.chdir(tmp_path)
        for name, text in files.items():
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        before = (tmp_path / out).exists()
        try:
            code = prepare_translation.main([*map(str, words), "--out", out])
        except SystemExit as stop:
            code = stop.code
        written = json.loads((tmp_path / out).read_text(encoding="utf-8")) if (tmp_path / out).exists() and not before else None
        return code, written, *capsys.readouterr()
    return prepare


def table(n, first="Satz", second="Sentence"):
    return "".join(f"{first} {i}\t{second} {i}\n" for i in range(n))


def answer(record):
    return record["messages"][-1]["content"] if "messages" in record else record["completion"]


NEWS = ["--pairs", "wmt_de-en=a.tsv"]

# ------------------------------------------------------------------------------------------------ words


# the first request of each language, to each neighbour in the list of languages
FIRST = {
    "ar": "ترجم هذا النص إلى اللغة الألمانية:\n\nx", "de": "Übersetze diesen Text ins Französische:\n\nx", "fr": "Traduis ce texte en anglais :\n\nx",
    "en": "Translate this text into Italian:\n\nx", "it": "Traduci questo testo in olandese:\n\nx", "nl": "Vertaal deze tekst naar het Turks:\n\nx",
    "tr": "Şu metni Rusçaya çevir:\n\nx", "ru": "Переведи этот текст на малайский язык:\n\nx",
    "ms": "Terjemahkan teks ini ke dalam bahasa Korea:\n\nx", "ko": "다음 글을 일본어로 번역해 줘:\n\nx",
    "ja": "次の文章を中国語に翻訳してください。\n\nx", "zh": "请把下面的文字翻译成阿拉伯语：\n\nx"}


def test_first_words_of_every_language():
    assert list(FIRST) == CODES == prepare_translation.LANGUAGES == list(prepare_translation.ASK)
    for source, target in zip(CODES, CODES[1:] + CODES[:1]):
        assert prepare_translation.ask((source, target), ("x", "y"), 0, 0.0) == (FIRST[source], "y")
        assert prepare_translation.ask((target, source), ("y", "x"), 1, 0.33) == (FIRST[source], "y")


def test_tables_are_whole():
    """Twelve different names, three wordings or more that have one language and one text each, a text with braces as it is."""
    for names, templates in prepare_translation.ASK.values():
        assert len(set(names.split())) == len(CODES) and len(set(templates)) == len(templates) >= 3
        for template in templates:
            assert template.count("{language}") == template.count("{text}") == 1 and template.count("{") == 2
            assert template.startswith("{text}\n\n") or template.endswith("\n\n{text}")
    prompts = {prepare_translation.ask(("en", "de"), ("{text} {0}", "y"), 0, draw)[0] for draw in (0.0, 0.5, 0.99999)}
    assert prompts == {"Translate this text into German:\n\n{text} {0}", "How do you say this in German?\n\n{text} {0}",
                       "{text} {0}\n\nPlease put the text above into German."}


@pytest.mark.parametrize("i, names", [  # each language as all twelve call it
    (0, "العربية Arabische arabe Arabic arabo Arabisch Arapçaya арабский Arab 아랍어 アラビア語 阿拉伯语"),
    (1, "الألمانية Deutsche allemand German tedesco Duits Almancaya немецкий Jerman 독일어 ドイツ語 德语"),
    (2, "الفرنسية Französische français French francese Frans Fransızcaya французский Perancis 프랑스어 フランス語 法语"),
    (3, "الإنجليزية Englische anglais English inglese Engels İngilizceye английский Inggeris 영어 英語 英语"),
    (4, "الإيطالية Italienische italien Italian italiano Italiaans İtalyancaya итальянский Itali 이탈리아어 イタリア語 意大利语"),
    (5, "الهولندية Niederländische néerlandais Dutch olandese Nederlands Felemenkçeye нидерландский Belanda 네덜란드어 オランダ語 荷兰语"),
    (6, "التركية Türkische turc Turkish turco Turks Türkçeye турецкий Turki 튀르키예어 トルコ語 土耳其语"),
    (7, "الروسية Russische russe Russian russo Russisch Rusçaya русский Rusia 러시아어 ロシア語 俄语"),
    (8, "الملايوية Malaiische malais Malay malese Maleis Malaycaya малайский Melayu 말레이어 マレー語 马来语"),
    (9, "الكورية Koreanische coréen Korean coreano Koreaans Koreceye корейский Korea 한국어 韓国語 韩语"),
    (10, "اليابانية Japanische japonais Japanese giapponese Japans Japoncaya японский Jepun 일본어 日本語 日语"),
    (11, "الصينية Chinesische chinois Chinese cinese Chinees Çinceye китайский Cina 중국어 中国語 中文")])
def test_names_of_a_language(i, names):
    assert [table[0].split()[i] for table in prepare_translation.ASK.values()] == names.split()


# ------------------------------------------------------------------------------------------------ records


def test_forward(prepare):
    """A byte-order mark and CRLF are no part of a text, quotation marks, U+2028 and a lone carriage return are."""
    texts = ["Guten Tag.", "Eins\u2028zwei\rdrei"]
    code, written, shown, _ = prepare({"a.tsv": f"\ufeff{texts[0]}\tGood day.\r\n{texts[1]} \t\"One, two\r\n"}, *NEWS, "--directions", "forward")
    requests = [template.format(language="Englische", text=text) for template in prepare_translation.ASK["de"][1] for text in texts]
    assert code == 0 and all(record.pop("prompt") in requests for record in written["train"])
    assert written == {"train": [{"completion": "Good day.", "dataset": "wmt_de-en", "source_lang": "de", "target_lang": "en"},
                                 {"completion": '"One, two', "dataset": "wmt_de-en", "source_lang": "de", "target_lang": "en"}]}
    assert shown.startswith("out.json: 2 train\ntrain, tokens of prompts (models/tiny-llama): 0% ") and "\ntrain, tokens of answers" in shown
    assert shown.endswith("wmt_de-en: 2 pairs; dropped: none\ntrain: de-en 2; with an earlier turn 0\n")


def test_both_and_random_directions(prepare):
    code, written, shown, _ = prepare({"a.tsv": table(200)}, *NEWS, "--directions", "both")
    assert code == 0 and [(r["source_lang"], r["completion"]) for r in written["train"][:4]] == [
        ("de", "Sentence 0"), ("en", "Satz 0"), ("de", "Sentence 1"), ("en", "Satz 1")] and len(written["train"]) == 400
    wordings = collections.Counter(record["prompt"].replace(str(i // 2), "") for i, record in enumerate(written["train"]))
    assert len(wordings) == 6 and min(wordings.values()) > 40  # about 67 each
    code, written, shown, _ = prepare({"a.tsv": table(200)}, *NEWS, out="random.json")
    n = collections.Counter(record["source_lang"] for record in written["train"])
    assert code == 0 and n.total() == 200 and 70 < n["de"] < 130 and f"de-en {n['de']}" in shown and f"en-de {n['en']}" in shown
    assert all(("Satz" if record["source_lang"] == "de" else "Sentence") in record["prompt"] for record in written["train"])


def test_aligned_files_compressed_files_and_headers(prepare):
    files = {"t.de": "eins\nzwei\n", "t.ja.gz": gzip.compress("一\n二".encode()), "b.tsv": "en\tzh\nthree\t三\n",
             "c.tsv.gz": gzip.compress("zh\ten\n四\tfour\n".encode())}
    code, written, shown, _ = prepare(files, "--pairs", "news_zh-en=b.tsv", "wmt2019.v1_zh-en=c.tsv.gz",
                                      "--aligned", "ted_trans_de-ja", "t.de", "t.ja.gz", "--directions", "forward")
    assert code == 0 and [(r["dataset"], r["source_lang"], r["completion"]) for r in written["train"]] == [
        ("news_zh-en", "zh", "three"), ("wmt2019.v1_zh-en", "zh", "four"), ("ted_trans_de-ja", "de", "一"), ("ted_trans_de-ja", "de", "二")]
    assert "三" in written["train"][0]["prompt"] and "train: zh-en 2, de-ja 2;" in shown


@pytest.mark.parametrize("header", ["EN\tDE", "en-US\tde_DE", "English\tGerman", "german\tenglish"])
def test_headers_in_other_words(prepare, header):
    code, written, _, _ = prepare({"a.tsv": f"{header}\nhello\thallo\n" if header[0] in "Ee" else f"{header}\nhallo\thello\n"}, *NEWS, "--directions", "forward")
    assert code == 0 and [(record["source_lang"], record["completion"]) for record in written["train"]] == [("de", "hello")]


def test_what_is_dropped_is_counted(prepare):
    """Empty pairs, lone sides, repeats, also of another set and the other way round; what is beyond --max_rows."""
    files = {"a.tsv": "a\tb\n\n \t \nlone\t\n\tlone\nA \tB\na\tother\n", "b.tsv": "b\ta\nc\td\ne\tf\ng\th\n",
             "t.de": "x\n\n\ny\n", "t.en": "u\n\nv\nw\n"}
    code, written, shown, _ = prepare(files, *NEWS, "other_en-de=b.tsv", "--aligned", "ted_de-en", "t.de", "t.en", "--directions", "forward",
                                      "--max_rows", 2)
    assert code == 0 and [record["completion"] for record in written["train"]] == ["b", "other", "d", "f", "u", "w"]
    assert ("wmt_de-en: 2 pairs; dropped: 2 empty, 2 with one side only, 1 repeated\nother_en-de: 2 pairs; dropped: 1 repeated, 1 beyond --max_rows\n"
            "ted_de-en: 2 pairs; dropped: 1 empty, 1 with one side only\n") in shown


def test_an_earlier_turn(prepare):
    """Another pair of the same set, at most five places away, asked in the same direction."""
    code, written, shown, _ = prepare({"a.tsv": table(300), "b.tsv": table(50, "Zin", "Line")}, *NEWS, "ted_nl-en=b.tsv", "--multi_turn", 0.2)
    assert code == 0 and len(written["train"]) == 350
    talks = [record for record in written["train"] if "messages" in record]
    assert 40 < len(talks) < 100 and f"; with an earlier turn {len(talks)}\n" in shown
    gaps = set()
    for record in talks:
        assert list(record) == ["messages", "dataset", "source_lang", "target_lang"]
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"] * 2
        asked, answered, asks, answers = ([word for word in message["content"].split() if word.isdigit()][-1] for message in record["messages"])
        assert asked == answered and asks == answers
        gaps.add(int(asks) - int(asked))
        word = {"wmt_de-en": "Satz", "ted_nl-en": "Zin"}[record["dataset"]] if record["target_lang"] == "en" else \
            {"wmt_de-en": "Sentence", "ted_nl-en": "Line"}[record["dataset"]]
        assert all(f"{word} " in message["content"] for message in record["messages"][::2])
    assert gaps == {-5, -4, -3, -2, -1, 1, 2, 3, 4, 5}
    plain = prepare({}, *NEWS, "ted_nl-en=b.tsv", out="plain.json")[1]["train"]
    assert [answer(record) for record in plain] == [answer(record) for record in written["train"]]  # the pair itself comes last
    assert all(a == b for a, b in zip(plain, written["train"]) if "prompt" in b)
    assert all("messages" in record for record in prepare({}, *NEWS, "--multi_turn", 1, out="all.json")[1]["train"])


def test_an_earlier_turn_never_gives_the_answer(prepare):
    """A neighbour that shares a text is none, on either side and in other letters; a pair without neighbours stays alone."""
    for text in ("Danke\tThanks\nDanke\tThank you\n", "Guten Tag\tHello\nHallo\thello\n"):
        code, written, _, _ = prepare({"a.tsv": text}, *NEWS, "--multi_turn", 1, "--directions", "both", out=f"{len(text)}.json")
        assert code == 0 and len(written["train"]) == 4 and not any("messages" in record for record in written["train"])


def test_an_earlier_turn_is_as_near_where_pairs_are_held_out(prepare):
    written = prepare({"a.tsv": table(600)}, *NEWS, "--multi_turn", 1, "--eval_share", 0.05)[1]
    for split, part in written.items():
        gaps = [abs(int(b) - int(a)) for r in part for a, b in [[[w for w in m["content"].split() if w.isdigit()][-1] for m in r["messages"][::2]]]]
        assert len(gaps) == len(part) > 10 and set(gaps) == {1, 2, 3, 4, 5}, split


# ------------------------------------------------------------------------------------------------ splits


def texts_of(record):
    """The texts of a record: what reads "Satz 7", in small letters."""
    turns = [message["content"] for message in record["messages"]] if "messages" in record else [record["prompt"], record["completion"]]
    return {f"{word} {number}".casefold() for turn in turns for word, number in itertools.pairwise(turn.split()) if number.isdigit()}


def leaks(written):
    """Texts of training that are those of an eval pair itself; what stands before that may be a pair of training."""
    held = [{**record, "messages": record["messages"][-2:]} if "messages" in record else record for record in written["eval"]]
    return set().union(*map(texts_of, written["train"])) & set().union(*map(texts_of, held))


def test_no_pair_and_no_text_is_on_both_sides(prepare, monkeypatch):
    """German texts have two translations each, some in capitals; a second set has half of the English ones again."""
    words = [*NEWS, "other_en-de=b.tsv", "--directions", "both", "--multi_turn", 0.5]
    files = {"a.tsv": "".join(f"{'SATZ' if i % 4 == 3 else 'Satz'} {i // 2}\tSentence {i}\n" for i in range(600)),
             "b.tsv": table(300, "Sentence", "Spruch")}
    code, written, shown, _ = prepare(files, *words, "--eval_share", 0.1)
    n_train, n_eval = len(written["train"]) // 2, len(written["eval"]) // 2
    assert code == 0 and leaks(written) == set() and 60 < n_eval < 120 and any("messages" in record for record in written["eval"])
    assert 900 - n_train - n_eval > 50 and f"\n{900 - n_train - n_eval} pairs of train dropped that share a text with eval\n" in shown
    # negative controls: the check sees an earlier turn from the other side, and pairs that share a text
    mixed = prepare({}, *words, out="mixed.json")[1]["train"]
    held = {answer(record) for record in written["eval"]}
    assert len(leaks({"train": [record for record in mixed if answer(record) not in held], "eval": [r for r in mixed if answer(r) in held]})) > 30
    monkeypatch.setattr(prepare_translation, "same", lambda language, text, n=itertools.count(): f"{text} {next(n)}")
    assert len(leaks(prepare({}, *words, "--eval_share", 0.1, "--multi_turn", 0, out="torn.json")[1])) > 30


def test_a_pairs_fate_does_not_depend_on_others(prepare):
    whole = prepare({"a.tsv": table(200)}, *NEWS, "--eval_share", 0.2)[1]
    part = prepare({"a.tsv": "".join(reversed(table(200).splitlines(True)[50:]))}, *NEWS, "--eval_share", 0.2, out="part.json")[1]
    assert 20 < len(whole["eval"]) < 60
    for split in ("train", "eval"):
        assert all(record in whole[split] for record in part[split]) and len(part[split]) < len(whole[split])


def test_the_same_bytes_every_time(prepare, tmp_path):
    words = [*NEWS, "--multi_turn", 0.3, "--eval_share", 0.2]
    state = random.getstate()
    for name in ("a.jsonl", "b.jsonl"):
        with pytest.raises(json.JSONDecodeError):  # lines
            prepare({"a.tsv": table(100)}, *words, out=name)
    content = (tmp_path / "a.jsonl").read_bytes()
    assert content == (tmp_path / "b.jsonl").read_bytes() and random.getstate() == state
    assert {json.loads(line)["split"] for line in content.splitlines()} == {"train", "eval"}
    one, other = (prepare({}, *words, "--seed", seed, out=f"{seed}.json")[1] for seed in (0, 1))
    assert one != other and {split: len(part) for split, part in one.items()} == {split: len(part) for split, part in other.items()}


# ------------------------------------------------------------------------------------------------ what is refused


def test_all_problems_at_once_with_their_places(prepare):
    files = {"a.tsv": "eins\tone\nzwei\ndrei\tthree\t3\n", "t.de": "a\nb\nc\n", "t.en": "a\nb\n"}
    code, written, shown, errors = prepare(files, "--pairs", "x_de-en=a.tsv", "a.tsv", "x_en-vi=a.tsv", "--aligned", "ted_de-en", "t.de", "t.en",
                                           "--multi_turn", 2, "--max_rows", 0, "--eval_share", -1, out="out.txt")
    assert (code, written, shown) == (2, None, "")
    assert errors.splitlines() == [
        "--out out.txt: expected a name that ends in .json or .jsonl, in a folder that exists",
        "--multi_turn 2.0: expected a probability from 0 to 1",
        "--eval_share -1.0: expected 0 or more, below 1",
        "--max_rows 0: expected 1 or more",
        "--pairs a.tsv: expected NAME=FILE",
        "a.tsv, line 2: number of columns 1, expected 2, a text and its translation",
        "a.tsv, line 3: number of columns 3, expected 2, a text and its translation",
        "x_en-vi: no language vi; expected a name such as wmt2019_zh-en, with two of ar de fr en it nl tr ru ms ko ja zh",
        "a.tsv, line 2: number of columns 1, expected 2, a text and its translation",
        "a.tsv, line 3: number of columns 3, expected 2, a text and its translation",
        "ted_de-en: t.de has 3 lines, t.en 2; expected as many, line by line each other's translation"]


@pytest.mark.parametrize("files, words, message", [
    ({}, [], "nothing to read: expected --pairs NAME=FILE or --aligned NAME FILE FILE"),
    ({}, NEWS, "wmt_de-en: a.tsv cannot be read ([Errno 2]"),
    ({"a.tsv": b"a\xff\tb\n"}, NEWS, "wmt_de-en: a.tsv cannot be read ('utf-8' codec"),
    ({"a.tsv.gz": b"no gzip"}, ["--pairs", "wmt_de-en=a.tsv.gz"], "wmt_de-en: a.tsv.gz cannot be read ("),
    ({"a.tsv.gz": gzip.compress(table(99).encode())[:-20]}, ["--pairs", "wmt_de-en=a.tsv.gz"], "wmt_de-en: a.tsv.gz cannot be read ("),
    ({"a.tsv": ""}, NEWS, "wmt_de-en: 0 pairs; dropped: none; expected pairs"),
    ({"a.tsv": "\n\nx\t\n"}, NEWS, "wmt_de-en: 0 pairs; dropped: 2 empty, 1 with one side only; expected pairs"),
    ({"a.tsv": "de\ten\n"}, NEWS, "wmt_de-en: 0 pairs"),
    ({"a.tsv": "", "b.tsv": ""}, [*NEWS, "b_de-en=b.tsv"], "\nb_de-en: 0 pairs"),
    ({"a.tsv": "x\n" * 1000}, NEWS, "... and 60 more problems"),
    ({"a.tsv": table(3)}, ["--pairs", "wmt_de-en=a.tsv", "wmt_de-en=a.tsv"], "wmt_de-en: two sets of this name"),
    ({"a.tsv": table(3)}, ["--pairs", "wmt_de-en=a.tsv", "b_de-en=a.tsv"], "b_de-en: 0 pairs; dropped: 3 repeated; expected pairs"),
    ({"a.tsv": table(3)}, ["--pairs", "wmt=a.tsv"], "wmt: no languages in it; expected a name such as wmt2019_zh-en"),
    ({"a.tsv": table(3)}, ["--pairs", "de-en=a.tsv"], "de-en: no languages in it; expected a name such as wmt2019_zh-en"),
    ({"a.tsv": table(3)}, ["--pairs", "x_de-de=a.tsv"], "x_de-de: one language; expected a name such as"),
    ({"a.tsv": table(3)}, ["--pairs", "x_ger-eng=a.tsv"], "x_ger-eng: no language ger or eng; expected"),
    ({"a.tsv": table(3)}, ["--pairs", "=a.tsv"], ": no languages in it"),
    ({"a.tsv": table(3)}, [*NEWS, "--eval_share", 1e-9], "eval: no record is left; wmt_de-en: 3 pairs; dropped: none; 0 pairs of train dropped"),
    ({"a.tsv": table(3)}, [*NEWS, "--eval_share", "nan"], "--eval_share nan: expected 0 or more, below 1"),
    ({"a.tsv": table(3)}, [*NEWS, "--multi_turn", "nan"], "--multi_turn nan: expected a probability"),
    ({"a.tsv": table(3)}, [*NEWS, "--tokenizer", "."], "--tokenizer .: "),
    ({"a.tsv": table(3)}, [*NEWS, "--directions", "backward"], "invalid choice: 'backward'"),
    ({"a.tsv": table(3)}, [*NEWS, "--aligned", "x_de-en", "a.tsv"], "expected 3 arguments"),
    ({"a.tsv": table(3)}, [*NEWS, "--max", 3], "unrecognized arguments: --max 3")])
def test_refused(prepare, files, words, message):
    code, written, shown, errors = prepare(files, *words)
    assert (code, written, shown) == (2, None, "") and message in errors


def test_an_existing_file_is_never_overwritten(prepare, tmp_path):
    assert prepare({"a.tsv": table(3)}, *NEWS)[0] == 0
    before = (tmp_path / "out.json").read_bytes()
    code, _, _, errors = prepare({"a.tsv": table(4)}, *NEWS)
    assert (code, errors) == (2, "--out out.json: exists; move it away or choose another name\n") and (tmp_path / "out.json").read_bytes() == before


# ------------------------------------------------------------------------------------------------ the scripts


def test_the_scripts_read_what_is_written(prepare):
    files = {f"{code}.tsv": table(20, f"Text {code}", "Sentence") for code in CODES if code != "en"}
    sets = [f"mini_{code}-en={code}.tsv" for code in CODES if code != "en"]
    for record in prepare(files, "--pairs", *sets, "--directions", "both")[1]["train"]:
        problems = []
        example = seq2seq.to_example("set", record, "here", problems)
        assert (example.prompts, example.completions, problems) == ([record["prompt"]], [record["completion"]], [])
    talks = prepare({}, "--pairs", *sets, "--multi_turn", 0.5, out="talks.json")[1]["train"]
    assert {record["dataset"] for record in talks} == {name.partition("=")[0] for name in sets}
    for record in talks:
        (messages,) = sft_causal.to_conversations(None, record)
        assert messages[-1]["content"] == record.get("completion", messages[-1]["content"]) and len(messages) == (4 if "messages" in record else 2)
