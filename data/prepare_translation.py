"""Make instruction data for translation from sentence pairs that you have already, in twelve languages.

    {"prompt": "Vertaal deze tekst naar het Engels:\\n\\nGoedemorgen.", "completion": "Good morning.", "dataset": "ted_trans_nl-en",
     "source_lang": "nl", "target_lang": "en"}

    python data/prepare_translation.py --pairs wmt2019_zh-en=news.tsv wmt2019_ru-en=more.tsv.gz --eval_share 0.01 --out data/wmt.jsonl
    python data/prepare_translation.py --aligned ted_trans_de-ja ted.de ted.ja --multi_turn 0.2 --directions both --out data/ted.jsonl

A set is a table of two columns (a first line of the two languages, such as "zh<TAB>en", is a header), or two files of which line i of one
is the translation of line i of the other. Its name ends with its languages, two of ar de fr en it nl tr ru ms ko ja zh. The request is
in the language of the source, in one of three wordings. Expected, from a table of n pairs without repeats: n records, about half of
them in each direction; --directions both 2 n. With --multi_turn P a share P of the records is {"messages": [...]}, in which a pair from
at most 5 places away is asked and answered first; that is for sft_causal.py, the plain records for seq2seq.py too.

Dropped and counted: pairs of which one or both sides are empty, and pairs that are the same as an earlier one of any set but for case and
white space. --eval_share holds pairs out by a hash of each, both directions together; a pair that shares either of its texts with one
that is held out is dropped, and an earlier turn in train is of train alone, in eval of either side.
"""

import argparse
import collections
import gzip
import hashlib
import itertools
import random
import re
import sys
import zlib

from tqdm import tqdm

import records_v1 as records

LANGUAGES = "ar de fr en it nl tr ru ms ko ja zh".split()
# How a speaker of a language asks for a translation, and what the twelve are called there, in their order, in the form that the sentences need.
ASK = {
    "ar": ("العربية الألمانية الفرنسية الإنجليزية الإيطالية الهولندية التركية الروسية الملايوية الكورية اليابانية الصينية",
           ["ترجم هذا النص إلى اللغة {language}:\n\n{text}", "ما ترجمة هذا النص إلى اللغة {language}؟\n\n{text}",
            "{text}\n\nمن فضلك انقل النص أعلاه إلى اللغة {language}."]),
    "de": ("Arabische Deutsche Französische Englische Italienische Niederländische Türkische Russische Malaiische Koreanische Japanische Chinesische",
           ["Übersetze diesen Text ins {language}:\n\n{text}", "Wie lautet die Übersetzung dieses Textes ins {language}?\n\n{text}",
            "{text}\n\nBitte übertrage den Text oben ins {language}."]),
    "fr": ("arabe allemand français anglais italien néerlandais turc russe malais coréen japonais chinois",
           ["Traduis ce texte en {language} :\n\n{text}", "Comment dit-on ceci en {language} ?\n\n{text}",
            "{text}\n\nMerci de traduire le texte ci-dessus en {language}."]),
    "en": ("Arabic German French English Italian Dutch Turkish Russian Malay Korean Japanese Chinese",
           ["Translate this text into {language}:\n\n{text}", "How do you say this in {language}?\n\n{text}",
            "{text}\n\nPlease put the text above into {language}."]),
    "it": ("arabo tedesco francese inglese italiano olandese turco russo malese coreano giapponese cinese",
           ["Traduci questo testo in {language}:\n\n{text}", "Come si dice questo in {language}?\n\n{text}",
            "{text}\n\nPer favore, traduci in {language} il testo qui sopra."]),
    "nl": ("Arabisch Duits Frans Engels Italiaans Nederlands Turks Russisch Maleis Koreaans Japans Chinees",
           ["Vertaal deze tekst naar het {language}:\n\n{text}", "Hoe zeg je dit in het {language}?\n\n{text}",
            "{text}\n\nKun je de tekst hierboven in het {language} vertalen?"]),
    "tr": ("Arapçaya Almancaya Fransızcaya İngilizceye İtalyancaya Felemenkçeye Türkçeye Rusçaya Malaycaya Koreceye Japoncaya Çinceye",
           ["Şu metni {language} çevir:\n\n{text}", "Lütfen aşağıdaki metni {language} tercüme et:\n\n{text}",
            "{text}\n\nYukarıdaki metni {language} çevirir misin?"]),
    "ru": ("арабский немецкий французский английский итальянский нидерландский турецкий русский малайский корейский японский китайский",
           ["Переведи этот текст на {language} язык:\n\n{text}", "Нужен перевод на {language} язык:\n\n{text}",
            "{text}\n\nПожалуйста, переведи текст выше на {language} язык."]),
    "ms": ("Arab Jerman Perancis Inggeris Itali Belanda Turki Rusia Melayu Korea Jepun Cina",
           ["Terjemahkan teks ini ke dalam bahasa {language}:\n\n{text}", "Apakah terjemahan teks ini dalam bahasa {language}?\n\n{text}",
            "{text}\n\nTolong terjemahkan teks di atas ke dalam bahasa {language}."]),
    "ko": ("아랍어 독일어 프랑스어 영어 이탈리아어 네덜란드어 튀르키예어 러시아어 말레이어 한국어 일본어 중국어",
           ["다음 글을 {language}로 번역해 줘:\n\n{text}", "다음 글은 {language}로 뭐라고 해?\n\n{text}", "{text}\n\n위의 글을 {language}로 옮겨 줘."]),
    "ja": ("アラビア語 ドイツ語 フランス語 英語 イタリア語 オランダ語 トルコ語 ロシア語 マレー語 韓国語 日本語 中国語",
           ["次の文章を{language}に翻訳してください。\n\n{text}", "次の文章は{language}で何と言いますか。\n\n{text}", "{text}\n\n上の文章を{language}に訳してください。"]),
    "zh": ("阿拉伯语 德语 法语 英语 意大利语 荷兰语 土耳其语 俄语 马来语 韩语 日语 中文",
           ["请把下面的文字翻译成{language}：\n\n{text}", "下面的文字用{language}怎么说？\n\n{text}", "{text}\n\n请将以上文字译成{language}。"]),
}
NEAR = 5  # so far away may the pair be that stands in front as history [places]
MOST_PROBLEMS = 100  # of a file; then it is not read on


def languages_of(name, problems):
    """"wmt2019_zh-en" -> ("zh", "en")."""
    found = re.fullmatch(r"[\w.-]+_([a-z]+)-([a-z]+)", name)
    codes = found.groups() if found else ("", "")
    unknown = [code for code in codes if code not in ASK]
    if unknown or codes[0] == codes[1]:
        problems.append(f"{name}: " + ("no languages in it" if not found else f"no language {' or '.join(unknown)}" if unknown else "one language")
                        + f"; expected a name such as wmt2019_zh-en, with two of {' '.join(LANGUAGES)}")
    return codes


def code_of(word):
    """"EN", "en-US" and "English" -> "en"; None where it names no language that is known."""
    word = word.casefold()
    return next((code for code, name in zip(LANGUAGES, ASK["en"][0].casefold().split()) if word == name or re.fullmatch(rf"{code}([-_]\w+)?", word)), None)


def lines_of(path):
    """Lines of a text file, also .gz, without their ends. Raises ValueError, which names the file."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:  # U+2028 and the like are text
            yield from (line.rstrip("\r\n") for line in file)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); expected UTF-8 text") from None


def raw_pairs(name, paths, languages, problems):
    """Yield both texts of each line of a table of two columns, or of two files with as many lines."""
    n_problems, n, turned = len(problems), [0, 0], False
    if len(paths) == 1:
        for number, line in enumerate(lines_of(paths[0]), 1):
            values = [value.strip() for value in line.split("\t")] if line.strip() else ["", ""]
            if number == 1 and sorted(codes := [code_of(value) or "" for value in values]) == sorted(languages):  # a header
                turned = codes[0] != languages[0]
            elif len(values) == 2:
                yield tuple(reversed(values)) if turned else tuple(values)
            else:
                problems.append(f"{paths[0]}, line {number}: number of columns {len(values)}, expected 2, a text and its translation")
                if len(problems) - n_problems == MOST_PROBLEMS:
                    return
    else:
        for texts in itertools.zip_longest(*map(lines_of, paths)):
            n = [count + (text is not None) for count, text in zip(n, texts)]
            if None not in texts:
                yield tuple(text.strip() for text in texts)
        if n[0] != n[1]:
            problems.append(f"{name}: {paths[0]} has {n[0]} lines, {paths[1]} {n[1]}; expected as many, line by line each other's translation")


def same(language, text):
    """What two texts share if they count as the same."""
    return f"{language} {records.normal(text)}"


def read_set(name, paths, languages, max_rows, seen, problems):
    """-> [(key, texts, place)], the key the same for both directions, the place that of the line, and how many pairs were dropped why.
    seen: keys of this and earlier sets."""
    pairs, dropped = [], collections.Counter()
    try:
        for place, texts in enumerate(tqdm(raw_pairs(name, paths, languages, problems), name, unit=" pairs", delay=5)):
            key = hashlib.sha256("\n".join(sorted(map(same, languages, texts))).encode()).digest()
            why = "empty" if not any(texts) else "with one side only" if not all(texts) else "beyond --max_rows" if len(pairs) == max_rows else \
                "repeated" if key in seen else None
            if why:
                dropped[why] += 1
            else:
                seen.add(key)
                pairs.append((key, texts, place))
    except ValueError as error:
        problems.append(f"{name}: {error}")
    return pairs, dropped


def split_pairs(sets, eval_share):
    """{name: (languages, pairs)} -> {split: {name: pairs}}, number of pairs that train loses as eval has one of their texts. By a hash of each pair."""
    splits, held, n_lost = {split: {name: [] for name in sets} for split in ("train", "eval")}, set(), 0
    for name, (languages, pairs) in sets.items():
        for pair in pairs:
            key, texts, _ = pair
            is_eval = int.from_bytes(key[:8], "big") / 2 ** 64 < eval_share
            splits["eval" if is_eval else "train"][name].append(pair)
            held.update(map(same, languages, texts) if is_eval else ())
    for name, (languages, _) in sets.items():
        kept = [pair for pair in splits["train"][name] if held.isdisjoint(map(same, languages, pair[1]))]
        n_lost += len(splits["train"][name]) - len(kept)
        splits["train"][name] = kept
    return splits, n_lost


def ask(languages, texts, source, draw):
    """-> the prompt in the words of the source's language, and the answer. draw: a number from 0 to 1, which chooses the words."""
    names, templates = ASK[languages[source]]
    language = names.split()[LANGUAGES.index(languages[1 - source])]
    return templates[int(draw * len(templates))].format(language=language, text=texts[source]), texts[1 - source]


def to_records(name, languages, pairs, around, args):
    """The pairs of one set and split -> records. What is drawn for a pair depends on the seed, on the pair and on those around it.
    around: the pairs that may be an earlier turn, for training those of training alone."""
    at = {place: texts for _, texts, place in around}
    for key, texts, place in pairs:
        rng = random.Random(f"{args.seed} {key.hex()}")
        sides = {"both": (0, 1), "forward": (0,), "random": (int(rng.random() < 0.5),)}[args.directions]
        for source in sides:
            words, history, which, its_words = (rng.random() for _ in range(4))
            near = [at[there] for there in range(place - NEAR, place + NEAR + 1) if there in at
                    and not any(records.normal(a) == records.normal(b) for a, b in zip(at[there], texts))]  # it would give the answer away
            turns = [ask(languages, texts, source, words)]
            if history < args.multi_turn and near:
                turns.insert(0, ask(languages, near[int(which * len(near))], source, its_words))
                record = {"messages": [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]}
            else:
                record = dict(zip(("prompt", "completion"), turns[0]))
            yield {**record, "dataset": name, "source_lang": languages[source], "target_lang": languages[1 - source]}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--pairs", nargs="+", action="extend", default=[], metavar="NAME=FILE", help="a table of two columns between tabs, also .gz; "
                        "the name ends with the languages of the columns: wmt2019_zh-en=news.tsv")
    parser.add_argument("--aligned", nargs=3, action="append", default=[], metavar=("NAME", "FILE", "FILE"), help="two files with as many lines, "
                        "also .gz: ted_trans_de-ja ted.de ted.ja")
    parser.add_argument("--directions", choices=["random", "both", "forward"], default="random", help="of a pair: one of the two, by chance | both, "
                        "a record each | as the name says")
    parser.add_argument("--multi_turn", type=float, default=0.0, metavar="P", help="with this probability a pair from nearby stands in front as an "
                        "earlier turn, for sft_causal.py only [0-1], 0 = never")
    parser.add_argument("--max_rows", type=int, default=100000, help="of each set the first so many pairs [count]")
    parser.add_argument("--eval_share", type=float, default=0.0, help="share of the pairs for eval [0-1], 0 = none")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn: words, directions, history")
    records.add_arguments(parser)
    args, problems = parser.parse_args(argv), []
    records.check_out(args.out, problems)
    if not 0 <= args.multi_turn <= 1:
        problems.append(f"--multi_turn {args.multi_turn}: expected a probability from 0 to 1")
    if not 0 <= args.eval_share < 1:
        problems.append(f"--eval_share {args.eval_share}: expected 0 or more, below 1")
    if args.max_rows < 1:
        problems.append(f"--max_rows {args.max_rows}: expected 1 or more")
    problems += [f"--pairs {text}: expected NAME=FILE" for text in args.pairs if "=" not in text]
    given = [(text.partition("=")[0], [text.partition("=")[2]]) for text in args.pairs if "=" in text]
    given += [(name, files) for name, *files in args.aligned]
    names = [name for name, _ in given]
    problems += [f"{name}: two sets of this name" for name in dict.fromkeys(names) if names.count(name) > 1]
    if not args.pairs and not args.aligned:
        problems.append("nothing to read: expected --pairs NAME=FILE or --aligned NAME FILE FILE")
    count, sets, seen, notes = records.token_counter(args.tokenizer, problems), {}, set(), []
    for name, paths in given:
        n_before, languages = len(problems), languages_of(name, problems)
        pairs, dropped = read_set(name, paths, languages, args.max_rows, seen, problems)
        sets[name] = languages, pairs
        notes.append(f"{name}: {len(pairs)} pairs; dropped: " + (", ".join(f"{n} {why}" for why, n in dropped.items()) or "none"))
        if not pairs and len(problems) == n_before:
            problems.append(f"{notes[-1]}; expected pairs")
    splits, n_lost = split_pairs(sets, args.eval_share)
    notes += [f"{n_lost} pairs of train dropped that share a text with eval"] if args.eval_share else []
    made = {split: [record for name, (languages, pairs) in sets.items()
                    for record in to_records(name, languages, splits[split][name], splits["train"][name] if split == "train" else pairs, args)]
            for split in ("train", "eval")[: 1 + (args.eval_share > 0)] if not problems}
    problems += [f"{split}: no record is left; {'; '.join(notes)}" for split, part in made.items() if not part]
    if problems:
        return records.stop(problems)
    records.write(args.out, made)

    def side(record, is_answer):
        turns = [message["content"] for message in record["messages"]] if "messages" in record else [record["prompt"], record["completion"]]
        return turns[-1] if is_answer else "\n\n".join(turns[:-1])

    records.show(args.out, made, {"prompts": lambda record: side(record, False), "answers": lambda record: side(record, True)}, count, args.tokenizer)
    for split, part in made.items():
        directions = collections.Counter(f"{record['source_lang']}-{record['target_lang']}" for record in part)
        notes.append(f"{split}: " + ", ".join(f"{direction} {n}" for direction, n in directions.items())
                     + f"; with an earlier turn {sum('messages' in record for record in part)}")
    print(*notes, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
