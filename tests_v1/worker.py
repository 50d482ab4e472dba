"""One rank of a launch that runs several command lines, one after the other; see conftest.run_jobs."""

import importlib
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
sys.modules["matplotlib.figure"] = None  # not installed, as it were: drawing takes longer than a short run

for words in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    script = importlib.import_module(words.pop(0).removesuffix(".py"))
    code = script.main(script.parse_args(words))
    if code:
        sys.exit(f"exit code {code} from {script.__name__}.py {' '.join(words)}")
importlib.import_module("common_v1").leave(0)  # as the scripts do: a rank that ends with an open process group may abort
