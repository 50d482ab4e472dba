"""Several runs of a script, one after the other, in one start of a process or of torchrun."""

import importlib
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import common


def main(runs):
    script = importlib.import_module(sys.argv[1])
    for words in runs:
        try:
            assert script.main(script.parse_args(words)) == 0
        except SystemExit as stop:
            assert stop.code == 0  # a finished run


if __name__ == "__main__":
    common.launch(main, json.loads(sys.argv[2]))
