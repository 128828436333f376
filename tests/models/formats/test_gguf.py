"""The head of a GGUF file: the gguf package's own reader is the oracle, damage is refused and never hangs."""

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guanaco.models.errors import ModelError
from guanaco.models.formats.gguf import GgufTensor, read_table
from guanaco.models.formats.raw_file import RawFile

TYPES = gguf.GGMLQuantizationType
TENSORS = {"a": (3, 64, TYPES.F32), "b.weight": (5, 32, TYPES.Q8_0), "c": (2, 256, TYPES.Q4_K), "d": (7, 1, TYPES.F16)}


def write(path: Path, metadata: dict[str, Any], alignment: int | None = None) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in metadata.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, (rows, columns, kind) in TENSORS.items():
        raw = np.zeros(gguf.quant_shape_to_byte_shape((rows, columns), kind), dtype=np.uint8)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    file = RawFile(path)
    try:
        return read_table(file)
    finally:
        file.close()


def assert_as_the_package_reads_it(path: Path) -> None:
    oracle = gguf.GGUFReader(path)
    metadata, tensors = read(path)
    fields = {name: field for name, field in oracle.fields.items() if not name.startswith("GGUF.")}
    assert list(metadata) == list(fields)
    for name, field in fields.items():
        assert metadata[name] == field.contents(), name
        assert type(metadata[name]) is type(field.contents())
    assert [(name, t.type, t.offset, t.num_bytes) for name, t in tensors.items()] == [
        (t.name, t.tensor_type, t.data_offset, t.n_bytes) for t in oracle.tensors
    ]
    assert all(tensors[t.name].shape == tuple(reversed(t.shape.tolist())) for t in oracle.tensors)


SCALAR = st.one_of(
    st.integers(-(2**31), 2**31 - 1), st.booleans(), st.text(max_size=9), st.floats(width=32, allow_nan=False)
)
VALUE = st.one_of(
    SCALAR,
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
    st.lists(st.text(max_size=5), min_size=1, max_size=5),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5),
)


@settings(max_examples=60, deadline=None)
@given(metadata=st.dictionaries(st.from_regex(r"[a-z]{1,6}\.[a-z_]{1,6}", fullmatch=True), VALUE, max_size=6))
def test_any_metadata_are_read_as_the_package_reads_them(
    tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any]
) -> None:
    metadata.pop("general.name", None)
    assert_as_the_package_reads_it(write(tmp_path_factory.mktemp("gguf") / "m.gguf", metadata))


@pytest.mark.parametrize("kind", [t for t in gguf.GGUFValueType if t.name not in ("ARRAY", "STRING")])
def test_every_type_of_number(kind: Any, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_key_value("one", 1, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_as_the_package_reads_it(tmp_path / "m.gguf")


def test_another_alignment(tmp_path: Path) -> None:
    assert_as_the_package_reads_it(write(tmp_path / "m.gguf", {}, alignment=512))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"words": ["one", "two"], "numbers": [1, 2, 3], "x": 1.5})
    whole = path.read_bytes()
    end = max(t.offset + t.num_bytes for t in read(path)[1].values())
    for size in range(end):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"m\.gguf is damaged: .*; delete it and download"):
            read(path)


def test_damage_is_refused_or_harmless_but_never_a_crash_or_a_wait(tmp_path: Path) -> None:
    """A thousand seeded changes to the head of a file: lengths, counts, types, names."""
    path = write(tmp_path / "m.gguf", {"words": ["one", "two"], "numbers": [1, 2, 3], "x": 1.5})
    whole = path.read_bytes()
    head = min(t.offset for t in read(path)[1].values())
    rng = random.Random(0)
    refused = 0
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(head)] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        path.write_bytes(data)
        try:
            read(path)
        except ModelError:
            refused += 1
    assert 300 < refused < 1000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "does not start as a GGUF file"),
        (b"PK\3\4" * 100, "does not start as a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 is not supported"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is not supported"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "entries that it announces"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "entries that it announces"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"a", 99), "a value has type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIQ", 1, b"a", 8, 2**62), "before the end"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"\xff", 0) + b"1" * 9, "make no sense"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"a", 9) + struct.pack("<IQ", 9, 1) * 9999,
            "make no sense",
        ),
    ],
)
def test_heads_that_lie(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=said):
        read(tmp_path / "m.gguf")
