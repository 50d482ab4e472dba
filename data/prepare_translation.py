"""Make requests for translation from sentence pairs, in twelve languages and both directions.

    paste ted.nl ted.en > ted.tsv
    python data/prepare_translation.py --eval_fraction 0.01 --out data/pairs.jsonl \\
        --pairs wmt2019_zh-en=news.tsv ted_trans_nl-en=ted.tsv

    {"prompt": "Vertaal deze tekst naar het Engels:\\n\\nDag.", "completion": "Hello.",
     "dataset": "ted_trans_nl-en", "source_lang": "nl", "target_lang": "en"}

The name of a set ends with two of ar de fr en it nl tr ru ms ko ja zh; its file is a table of two
columns in this order, .tsv or .csv. The request is in the language of the source, in one of three
wordings, drawn by a hash of the text.

Repeats are dropped and counted, and so are pairs that share a text with one that is held out. Both
directions of a pair are on one side of a split.
"""

import argparse
import itertools
import re

import records  # first: it makes common.py importable

# isort: split
import common
from common import SPLITS
from prepare_table import to_text

# what the twelve are called in a language, in the order of this table and as its sentences need it,
# and how its speakers ask
ASK = {
    "ar": (
        "العربية الألمانية الفرنسية الإنجليزية الإيطالية الهولندية التركية الروسية الملايوية "
        "الكورية اليابانية الصينية",
        "ترجم هذا النص إلى اللغة {language}:\n\n{text}",
        "ما ترجمة هذا النص إلى اللغة {language}؟\n\n{text}",
        "{text}\n\nمن فضلك انقل النص أعلاه إلى اللغة {language}.",
    ),
    "de": (
        "Arabische Deutsche Französische Englische Italienische Niederländische Türkische "
        "Russische Malaiische Koreanische Japanische Chinesische",
        "Übersetze diesen Text ins {language}:\n\n{text}",
        "Wie lautet die Übersetzung dieses Textes ins {language}?\n\n{text}",
        "{text}\n\nBitte übertrage den Text oben ins {language}.",
    ),
    "fr": (
        "arabe allemand français anglais italien néerlandais turc russe malais coréen "
        "japonais chinois",
        "Traduis ce texte en {language} :\n\n{text}",
        "Comment dit-on ceci en {language} ?\n\n{text}",
        "{text}\n\nMerci de traduire le texte ci-dessus en {language}.",
    ),
    "en": (
        "Arabic German French English Italian Dutch Turkish Russian Malay Korean Japanese Chinese",
        "Translate this text into {language}:\n\n{text}",
        "How do you say this in {language}?\n\n{text}",
        "{text}\n\nPlease put the text above into {language}.",
    ),
    "it": (
        "arabo tedesco francese inglese italiano olandese turco russo malese coreano "
        "giapponese cinese",
        "Traduci questo testo in {language}:\n\n{text}",
        "Come si dice questo in {language}?\n\n{text}",
        "{text}\n\nPer favore, traduci in {language} il testo qui sopra.",
    ),
    "nl": (
        "Arabisch Duits Frans Engels Italiaans Nederlands Turks Russisch Maleis Koreaans "
        "Japans Chinees",
        "Vertaal deze tekst naar het {language}:\n\n{text}",
        "Hoe zeg je dit in het {language}?\n\n{text}",
        "{text}\n\nKun je de tekst hierboven in het {language} vertalen?",
    ),
    "tr": (
        "Arapçaya Almancaya Fransızcaya İngilizceye İtalyancaya Felemenkçeye Türkçeye "
        "Rusçaya Malaycaya Koreceye Japoncaya Çinceye",
        "Şu metni {language} çevir:\n\n{text}",
        "Lütfen aşağıdaki metni {language} tercüme et:\n\n{text}",
        "{text}\n\nYukarıdaki metni {language} çevirir misin?",
    ),
    "ru": (
        "арабский немецкий французский английский итальянский нидерландский турецкий "
        "русский малайский корейский японский китайский",
        "Переведи этот текст на {language} язык:\n\n{text}",
        "Нужен перевод на {language} язык:\n\n{text}",
        "{text}\n\nПожалуйста, переведи текст выше на {language} язык.",
    ),
    "ms": (
        "Arab Jerman Perancis Inggeris Itali Belanda Turki Rusia Melayu Korea Jepun Cina",
        "Terjemahkan teks ini ke dalam bahasa {language}:\n\n{text}",
        "Apakah terjemahan teks ini dalam bahasa {language}?\n\n{text}",
        "{text}\n\nTolong terjemahkan teks di atas ke dalam bahasa {language}.",
    ),
    "ko": (
        "아랍어 독일어 프랑스어 영어 이탈리아어 네덜란드어 "
        "튀르키예어 러시아어 말레이어 한국어 일본어 중국어",
        "다음 글을 {language}로 번역해 줘:\n\n{text}",
        "다음 글은 {language}로 뭐라고 해?\n\n{text}",
        "{text}\n\n위의 글을 {language}로 옮겨 줘.",
    ),
    "ja": (
        "アラビア語 ドイツ語 フランス語 英語 イタリア語 オランダ語 "
        "トルコ語 ロシア語 マレー語 韓国語 日本語 中国語",
        "次の文章を{language}に翻訳してください。\n\n{text}",
        "次の文章は{language}で何と言いますか。\n\n{text}",
        "{text}\n\n上の文章を{language}に訳してください。",
    ),
    "zh": (
        "阿拉伯语 德语 法语 英语 意大利语 荷兰语 土耳其语 俄语 马来语 韩语 日语 中文",
        "请把下面的文字翻译成{language}：\n\n{text}",
        "下面的文字用{language}怎么说？\n\n{text}",
        "{text}\n\n请将以上文字译成{language}。",
    ),
}


LANGUAGES = list(ASK)


def data_set(text):
    """For argparse: ("wmt2019_zh-en", ["zh", "en"], "news.tsv") of wmt2019_zh-en=news.tsv."""
    name, _, path = text.partition("=")
    codes = re.split("[_-]", name)[-2:]
    if len(set(codes)) < 2 or not set(codes) <= set(LANGUAGES):
        example = f"wmt2019_zh-en, with two of {' '.join(LANGUAGES)}"
        raise argparse.ArgumentTypeError(f"{name}: expected a name such as {example}")
    return name, codes, path


def to_pair(row):
    """{language: text}"""
    return {code: to_text(text, code) for code, text in row.items()}


def sides(item):
    """What two pairs share if one gives the other's answer away."""
    return [f"{code} {text}" for code, text in item["pair"].items()]


def to_records(item):
    """The requests for both directions of a pair."""
    pair = item["pair"]
    found = []
    for source, target in itertools.permutations(pair):
        names, *wordings = ASK[source]
        text = pair[source]
        wording = wordings[common.derive_seed("wording", source, text) % len(wordings)]
        language = names.split()[LANGUAGES.index(target)]
        record = {
            "prompt": wording.format(language=language, text=text),
            "completion": pair[target],
            "dataset": item["dataset"],
            "source_lang": source,
            "target_lang": target,
        }
        found.append(record)
    return found


def main(argv=None):
    parser = records.make_parser(__doc__)
    records.add_fractions(parser)
    records.add_skip(parser)
    add = parser.add_argument
    add("--pairs", required=True, nargs="+", type=data_set, metavar="NAME=FILE")
    args = parser.parse_args(argv)
    problems = []
    splits = {split: [] for split in SPLITS}
    for name, codes, path in args.pairs:
        for _, pair in records.convert(path, to_pair, args, problems, codes):
            texts = list(pair.values())
            if texts == codes:  # a header
                continue
            if texts == codes[::-1]:
                problems.append(f"{path}: expected the columns {', '.join(codes)}, in this order")
            item = {"dataset": name, "pair": pair}
            key = records.normal("\n".join(sorted(sides(item))))
            splits[records.hold_out(args, "train", key)].append(item)
    records.clean(splits, sides)
    for split, items in splits.items():
        splits[split] = [record for item in items for record in to_records(item)]
    records.finish(args, splits, problems)


if __name__ == "__main__":
    main()
