"""`python -m guanaco.server.training.jobs.check FILE…`: whether files can be trained on, as one line of JSON.

Runs in a process of its own, because a large file takes time that requests need. Its memory does not grow with the
file. The line is `{"rows": N}` with the number of rows of the first file, or `{"error": {"message", "param"}}` with the
first wrong rows.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from guanaco.server.training.data.reading import read_conversations
from guanaco.server.training.data.rows import DataError

_MAX_SHOWN = 3
_PARAMS = ("training_file", "validation_file")


def check(paths: Sequence[Path]) -> dict[str, object]:
    """The result as JSON data. paths: the training file, and the validation file if there is one."""
    num_rows = []
    for path, param in zip(paths, _PARAMS, strict=False):
        try:
            data = read_conversations(path, keeps_rows=False)
        except DataError as error:
            return _problem(str(error).replace(str(path), "the file"), param)
        if num_refused := data.num_refused.total():
            shown = [f"line {refusal.line}: {refusal.reason}" for refusal in data.refusals[:_MAX_SHOWN]]
            more = f"; and {num_refused - len(shown)} more" if num_refused > len(shown) else ""
            return _problem(
                f"{num_refused} of {data.num_rows} rows can't be trained on: {'; '.join(shown)}{more}", param
            )
        num_rows.append(data.num_good)
    return {"rows": num_rows[0]}


def _problem(message: str, param: str) -> dict[str, object]:
    return {"error": {"message": f"{param}: {message}", "param": param}}


if __name__ == "__main__":
    print(json.dumps(check([Path(text) for text in sys.argv[1:]])))
