"""Several runs of seq2seq.py, one after the other, in one start of a process or of torchrun."""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import common  # first: it prepares the import of DeepSpeed

# isort: split
import seq2seq


def main(runs):
    for words in runs:
        assert seq2seq.main(seq2seq.parse_args(words)) == 0


if __name__ == "__main__":
    common.launch(main, json.loads(sys.argv[1]))
