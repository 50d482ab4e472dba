"""Make records for any of the scripts from a table or JSON file: rename columns, fill templates.

    python data/prepare_table.py --train t.csv --eval_fraction 0.1 --out data/t.json \\
        prompt=question completion=answer

KEY=COLUMN renames, COLUMN alone keeps its name; columns that are not named stay behind. With
{places} it is a template: prompt="Question: {question}\\n\\n{passage}". A column may be a path into
nested JSON: answers.text.0. Which script reads the records, the keys say:

    prompt=question completion=answer          seq2seq.py, sft_causal.py
    instruction input output=answer            seq2seq.py, sft_causal.py; input may be empty
    messages=chat                              sft_causal.py
    text="{title}\\n\\n{body}"                   sft_causal.py, prepare_text.py
    input=sentence target=label                clf.py; words: --positive spam makes 1 and 0
    prompt=question chosen=good rejected=bad   clf.py --loss pairwise
    prompt=question answer                     rl_ppo.py, whose reward function finds the answer

Files: .csv; .tsv, in which a quotation mark is text; .jsonl; .json with a list of objects, an
object of columns, or lists named train, eval, test. split=COLUMN says where a row belongs.

White space around a text goes. So do repeats, and rows whose prompt a later split has (train, eval,
test); case and white space make no difference there.
"""

import functools
import json
import re

import records  # first: it makes common.py importable

# isort: split
import common

PLACE = r"\{([^{}]+)\}"
QUESTIONS = ("prompt", "instruction", "input", "text")
TEXTS = (*QUESTIONS, "completion", "output", "references", "chosen", "rejected")


def field(text):
    """For argparse: (key of the record, its column or template)."""
    key, equals, source = text.partition("=")
    if not key or (equals and not source):
        raise ValueError
    return key, (source or key).replace("\\n", "\n")  # as a shell passes it


def look_up(row, path):
    """The value of a column, or at a path: ({"a": [{"b": 1}]}, "a.0.b") -> 1."""
    if path in row:
        return row[path]
    value = row
    try:
        for name in path.split("."):
            value = value[int(name) if isinstance(value, list) else name]
    except (LookupError, TypeError, ValueError):
        raise ValueError(f"no {path!r}; there is {', '.join(row)}") from None
    return value


def to_text(value, name):
    """A cell as a text; numbers, true and false as JSON writes them."""
    if isinstance(value, (dict, list)):
        raise ValueError(f"{name!r} is {value!r:.60}, expected a text: name its parts, as {name}.0")
    text = value.strip() if isinstance(value, str) else json.dumps(value)
    if not text or value is None:
        raise ValueError(f"{name!r} is empty")
    return text


def fill(template, row):
    """The text of a template with {places}."""
    # not str.format: columns may have names with dots and brackets
    return re.sub(PLACE, lambda place: to_text(look_up(row, place[1]), place[1]), template)


def to_target(value, name, positive):
    """A cell as a number."""
    label = to_text(value, name)
    if positive:
        return float(label == positive)
    try:
        return float(label)
    except ValueError:
        hint = "--positive WORD makes 1 and 0 of words"
        raise ValueError(f"{name!r} is {label!r}, no number: {hint}") from None


def to_records(row, args):
    """[the record of a row], with its split if a column says it."""
    record = {}
    if str(row.get("split")) in records.SPLIT_OF:
        record["split"] = row["split"]
    for key, source in args.fields:
        value = fill(source, row) if re.search(PLACE, source) else look_up(row, source)
        if key == "input" and not value and "instruction" in record:  # Alpaca's may be empty
            continue
        if key == "target":
            value = to_target(value, source, args.positive)
        elif key in TEXTS and isinstance(value, list):  # alternatives
            value = [to_text(item, source) for item in value]
        elif key in TEXTS:
            value = to_text(value, source)
        record[key] = value
    if record.get("split", "train") not in records.SPLIT_OF:
        raise ValueError(f"split {record['split']!r}, expected train, eval or test")
    if "chosen" in record and record["chosen"] == record.get("rejected"):
        raise ValueError("chosen and rejected are equal")
    question(record)  # raises what is wrong with messages
    return [record]


def question(record):
    """The text that two records share if one gives the other's answer away."""
    texts = []
    for name in QUESTIONS:
        texts += records.texts_of(record.get(name))
    if "messages" in record:
        messages = common.Prompts.messages(record)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        texts += [message["content"] for message in messages]
    return "\n".join(texts) or records.to_json(record)


def main(argv=None):
    parser = records.make_parser(__doc__)
    records.add_files(parser)
    records.add_skip(parser)
    add = parser.add_argument
    add("fields", nargs="+", type=field, metavar="KEY=COLUMN", help="or KEY=TEMPLATE, or COLUMN")
    add("--positive", metavar="WORD", help="target=COLUMN is 1 where it holds this word, else 0")
    add("--no_header", action="store_true", help="columns are named 0, 1, ...")
    args = parser.parse_args(argv)
    problems = []
    use = functools.partial(to_records, args=args)
    names = [] if args.no_header else None
    splits = records.split_files(args, use, question, problems, names)
    targets = [record.get("target") for found in splits.values() for record in found]
    if args.positive and targets and 1.0 not in targets:
        problems.append(f"--positive {args.positive}: no row has this word")
    records.finish(args, splits, problems)


if __name__ == "__main__":
    main()
