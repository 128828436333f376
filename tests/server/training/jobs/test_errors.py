"""Words for a client have no paths of the server."""

import pytest

from guanaco.server.training.jobs.errors import without_paths

HIDDEN = "(a file of the server)"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data is full", f"{HIDDEN} is full"),
        ("/tmp/work/a.json: no", f"{HIDDEN}: no"),
        ("can't write '/home/my name/x' here", f"can't write {HIDDEN} here"),
        ("at (/x), [/y] and path=/z;", f"at ({HIDDEN}), [{HIDDEN}] and path={HIDDEN};"),
        ("~/models and file:///etc/x, too", f"{HIDDEN} and {HIDDEN}, too"),
        ("/models/my base/x.bin cannot be read", f"{HIDDEN} cannot be read"),
        ("see http://127.0.0.1:8000/v1/files; 3/4 and/or 2 tokens / s", None),
    ],
)
def test_paths_are_hidden_and_nothing_else(text: str, shown: str | None) -> None:
    assert without_paths(text, ["/models/my base", ""]) == (shown or text)
