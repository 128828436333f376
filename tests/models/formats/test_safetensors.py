"""The safetensors reader: what the library reads, we read; what is damaged is refused before memory is taken."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from guanaco.models.errors import ModelError
from guanaco.models.formats.safetensors import DTYPES, SafetensorsFile

TENSORS = {
    "half": torch.randn(3, 5).half(),
    "b.float": torch.randn(7).bfloat16(),
    "full": torch.randn(2, 3, 4),
    "codes": torch.arange(11, dtype=torch.uint8),
    "ids": torch.arange(6).view(3, 2),
}


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_tensors_are_those_that_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    expected = load_file(path)
    assert file.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(file.read(name), tensor)
        assert file.read(name).dtype == tensor.dtype
    file.close()


def test_tensors_survive_the_file(tmp_path: Path) -> None:
    """Memory of our own, no map: a file that shrinks later must not kill the process."""
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    file = SafetensorsFile(path)
    tensor = file.read("full")
    path.write_bytes(b"")
    assert torch.equal(tensor, TENSORS["full"])
    with pytest.raises(ModelError, match="ends at byte"):
        file.read("half")
    file.close()


def test_every_dtype_of_the_format_that_torch_has_is_known() -> None:
    for name, dtype in DTYPES.items():
        assert name.lstrip("BFIU").split("_")[0] in (str(8 * dtype.itemsize), "OOL")


def test_any_truncation_is_noticed_when_the_file_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"x\.safetensors is damaged: .*; delete it and download"):
            SafetensorsFile(path)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"\x80\x04pickle", "makes no sense"),
        (b"[1]", "makes no sense"),
        (b"[" * 100_000, "makes no sense"),
        (b'{"a": 1}', "makes no sense"),
        ({"a": entry(shape=(3,))}, "12 bytes, but 8 are set aside"),
        ({"a": entry(shape=(-2,), offsets=(0, -8))}, "are no sizes"),
        ({"a": entry(shape=(2.0,))}, "are no sizes"),
        ({"a": entry(dtype="F12")}, "F12"),
        ({"a": entry(offsets=(8, 16))}, "truncated: .* of "),
        ({"a": entry(shape=(1 << 40,), offsets=(0, 1 << 42))}, "truncated"),
        (json.dumps({"a": entry()})[:-1].encode() + b"," + json.dumps({"a": entry()})[1:].encode(), "twice"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, said: str) -> None:
    with pytest.raises(ModelError, match=f"is damaged: .*{said}"):
        SafetensorsFile(write(tmp_path / "x.safetensors", header, b"\0" * 8))


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 1 << 62) + b"{}", b"PK\3\4" + b"x" * 100])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is damaged"):
        SafetensorsFile(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        SafetensorsFile(tmp_path / "x.safetensors")
