"""One rank of a launch that runs several command lines of seq2seq.py, one after the other; see conftest.run_jobs."""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import seq2seq  # noqa: E402

for words in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    code = seq2seq.main(seq2seq.parse_args(words))
    if code:
        sys.exit(f"exit code {code} from {' '.join(words)}")
