"""Make records from a question answering set: SQuAD, TriviaQA, SciQ, WebGPT's comparisons.

    python data/prepare_qa.py --layout squad --train train-v2.0.json --eval dev-v2.0.json \\
        --out data/squad.jsonl

    {"prompt": "Vikings settled here.\\n\\nWho settled here?", "completion": "Vikings",
     "references": ["Vikings", "the Vikings"], "article": "Normandy"}
    {"prompt": "Why is the sky blue?", "chosen": "Air scatters blue.", "rejected": "The sea."}

The prompt is the question, of squad and sciq behind its passage. completion is the first answer,
references are all; questions without an answer go. WebGPT's pairs, for clf.py --loss pairwise,
leave out equal scores. An article of SQuAD, or else a question, is whole on one side of a split.
"""

import records  # first: it makes common.py importable

# isort: split
from prepare_table import to_text


def answered(answers):
    """The keys of a record that hold its answers, of which the first is trained."""
    completion = to_text(answers[0], "answer")
    references = dict.fromkeys([completion, *map(str.strip, answers)])
    return {"completion": completion, "references": list(filter(None, references))}


def squad(article):
    found = []
    for paragraph in article["paragraphs"]:
        context = to_text(paragraph["context"], "context")
        for item in paragraph["qas"]:
            prompt = f"{context}\n\n{to_text(item['question'], 'question')}"
            answers = [answer["text"] for answer in item["answers"]]
            if answers:
                found.append(
                    {"prompt": prompt, **answered(answers), "article": str(article["title"])}
                )
    return found


def triviaqa(row):
    answers = [row["Answer"]["Value"], *row["Answer"]["Aliases"]]
    return [{"prompt": to_text(row["Question"], "Question"), **answered(answers)}]


def sciq(row):
    question = to_text(row["question"], "question")
    prompt = f"{row['support'].strip()}\n\n{question}".strip()
    return [{"prompt": prompt, **answered([row["correct_answer"]]), "question": question}]


def webgpt(row):
    question = row["question"]
    if isinstance(question, dict):
        question = question["full_text"]
    scored = []
    for i in (0, 1):
        scored.append((float(row[f"score_{i}"]), to_text(row[f"answer_{i}"], "answer")))
    (low, worse), (high, better) = sorted(scored)
    if low == high or worse == better:
        return []
    return [{"prompt": to_text(question, "question"), "chosen": better, "rejected": worse}]


# row of the file -> [record]; a row of squad is an article
LAYOUTS = {"squad": squad, "triviaqa": triviaqa, "sciq": sciq, "webgpt": webgpt}


def key_of(record):
    """What is on one side of a split."""
    return record.get("article") or record.get("question") or record["prompt"]


def main(argv=None):
    parser = records.make_parser(__doc__)
    records.add_files(parser)
    records.add_skip(parser)
    parser.add_argument("--layout", required=True, choices=list(LAYOUTS))
    args = parser.parse_args(argv)
    problems = []
    splits = records.split_files(args, LAYOUTS[args.layout], key_of, problems)
    records.finish(args, splits, problems)


if __name__ == "__main__":
    main()
