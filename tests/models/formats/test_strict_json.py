"""What the standard's JSON is not."""

from pathlib import Path

import pytest

from guanaco.models.errors import ModelError
from guanaco.models.formats.strict_json import JsonError, parse_object, read_json


def test_an_object_keeps_its_order():
    assert list(parse_object(b'{"z": 1, "a": {"y": [2.5, null], "b": "\\u00e9"}}').items()) == [
        ("z", 1),
        ("a", {"y": [2.5, None], "b": "é"}),
    ]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not an object"),
        (b"1", "not an object"),
        (b'{"a": 1} x', "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b'{"a": 1, "a": 2}', "key a twice"),
        (b'{"b": {"a": 1, "a": 1}}', "key a twice"),
        (b'{"a\\n": 1, "a\\n": 2}', r"key a\\n twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e400}', "too large"),
        (b'{"a": ' + b"1" * 5000 + b"}", "too long"),
        (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\x01"}', "not JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_refused(data, says):
    with pytest.raises(JsonError, match=says):
        parse_object(data)


def test_a_models_json_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """A repeated key and Infinity refuse no model that others load; what is no JSON object does."""
    path = tmp_path / "config.json"
    path.write_text('{"a": 1, "a": 2, "b": Infinity}')
    assert read_json(path) == {"a": 2, "b": float("inf")}
    for text, said in (("[]", "not an object"), ("{", "not JSON"), ("\ufeff{}", "byte order mark")):
        path.write_text(text)
        with pytest.raises(ModelError, match=rf"config\.json .*{said}.*; download the model again"):
            read_json(path)
    with pytest.raises(ModelError, match="is missing"):
        read_json(tmp_path / "none.json")
