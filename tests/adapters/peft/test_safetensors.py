"""Containers that attackers and bad tools send, each with its code, and the good ones against the library."""

import io
import json
import os
import pickle
import struct
import zipfile

import pytest
import safetensors.torch
import torch

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.safetensors import MAX_HEADER_BYTES, MAX_TENSORS, AdapterTensors


def build(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def read(tmp_path, content, max_bytes=1 << 24):
    path = tmp_path / "file"
    path.write_bytes(content)
    with path.open("rb", buffering=0) as handle:
        return dict(AdapterTensors(handle, "file", max_bytes).read_all())


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 100)
    return buffer.getvalue()


def torch_saved():
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    return buffer.getvalue()


CORPUS = {
    "empty": (b"", "not_safetensors"),
    "seven_bytes": (b"\0" * 7, "not_safetensors"),
    "header_of_nothing": (b"\0" * 8, "bad_header"),
    "length_max": (build({}, length=2**64 - 1), "not_safetensors"),
    "length_sign_bit": (build({}, length=2**63), "not_safetensors"),
    "length_beyond_file": (build({}, length=3), "not_safetensors"),
    "length_100_mb": (build({}, length=100_000_001), "not_safetensors"),
    "header_over_limit": (build(b"{" + b" " * MAX_HEADER_BYTES + b"}"), "header_too_large"),
    "not_utf8": (build(b'{"\xff": 1}'), "bad_header"),
    "utf16": (build('{"a": 1}'.encode("utf-16")), "bad_header"),
    "byte_order_mark": (build(b"\xef\xbb\xbf" + json.dumps({"a": entry()}).encode(), b"\0" * 8), "bad_header"),
    "not_json": (build(b"a = 1"), "bad_header"),
    "list": (build(b"[]"), "bad_header"),
    "trailing_text": (build(b"{} x"), "bad_header"),
    "deep": (build(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "bad_header"),
    "nan_in_header": (build(b'{"a": NaN}'), "bad_header"),
    "duplicate_name": (
        build(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8),
        "bad_header",
    ),
    "no_tensor": (build({"__metadata__": {"format": "pt"}}), "empty"),
    "metadata_no_strings": (build({"__metadata__": {"a": 1}, "a": entry()}, b"\0" * 8), "bad_header"),
    "metadata_no_table": (build({"__metadata__": ["a"], "a": entry()}, b"\0" * 8), "bad_header"),
    "metadata_huge": (
        build({"__metadata__": {"a": "x" * MAX_HEADER_BYTES}, "a": entry()}, b"\0" * 8),
        "header_too_large",
    ),
    "many_tensors": (
        build({f"t{i}": entry(4 * i, 4 * i + 4, (1,)) for i in range(MAX_TENSORS + 1)}, b"\0" * 4 * (MAX_TENSORS + 1)),
        "too_many_tensors",
    ),
    "entry_no_table": (build({"a": 1}), "bad_header"),
    "entry_null": (build({"a": None}), "bad_header"),
    "entry_lacks_dtype": (build({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8), "bad_header"),
    "entry_has_more": (build({"a": {**entry(), "strides": [1]}}, b"\0" * 8), "bad_header"),
    "truncated": (build({"a": entry()}, b"\0" * 7), "truncated"),
    "trailing_bytes": (build({"a": entry()}, b"\0" * 9), "bad_layout"),
    "overlap": (build({"a": entry(), "b": entry(4, 12)}, b"\0" * 12), "bad_layout"),
    "same_bytes_twice": (build({"a": entry(), "b": entry()}, b"\0" * 8), "bad_layout"),
    "hole": (build({"a": entry(), "b": entry(12, 20)}, b"\0" * 20), "bad_layout"),
    "hole_at_start": (build({"a": entry(4, 12)}, b"\0" * 12), "bad_layout"),
    "size_mismatch": (build({"a": entry(shape=(3,))}, b"\0" * 8), "bad_layout"),
    "size_overflow": (build({"a": entry(shape=(2**32, 2**32))}, b"\0" * 8), "bad_layout"),
    "size_wraps_to_eight": (build({"a": entry(shape=(2**61 + 1, 2))}, b"\0" * 8), "bad_layout"),
    "size_of_many_digits": (
        build(b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 4000)),
        "bad_header",
    ),
    "many_dimensions": (build({"a": entry(shape=(1,) * 9 + (2,))}, b"\0" * 8), "bad_header"),
    "negative_shape": (build({"a": entry(shape=(-2,))}, b"\0" * 8), "bad_header"),
    "float_shape": (build({"a": entry(shape=(2.0,))}, b"\0" * 8), "bad_header"),
    "true_shape": (build({"a": entry(shape=(True, 2))}, b"\0" * 8), "bad_header"),
    "shape_no_list": (build({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, b"\0" * 8), "bad_header"),
    "zero_size": (build({"a": entry(0, 0, (0, 4)), "b": entry()}, b"\0" * 8), "empty_tensor"),
    "reversed_offsets": (build({"a": entry(8, 0)}, b"\0" * 8), "bad_header"),
    "one_offset": (build({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}, b"\0" * 8), "bad_header"),
    "offsets_beyond": (build({"a": entry(2**40, 2**40 + 8)}, b"\0" * 8), "bad_layout"),
    "unknown_dtype": (build({"a": entry(dtype="F31")}, b"\0" * 8), "dtype_unsupported"),
    "int_dtype": (build({"a": entry(dtype="I32")}, b"\0" * 8), "dtype_unsupported"),
    "double_dtype": (build({"a": entry(shape=(1,), dtype="F64")}, b"\0" * 8), "dtype_unsupported"),
    "fp8_dtype": (build({"a": entry(shape=(8,), dtype="F8_E4M3")}, b"\0" * 8), "dtype_unsupported"),
    "dtype_no_text": (build({"a": entry(dtype=["F32"])}, b"\0" * 8), "dtype_unsupported"),
    "pickle": (pickle.dumps({"a": [1.0] * 100}), "not_safetensors"),
    "torch_save": (torch_saved(), "not_safetensors"),
    "zip": (zipped(), "not_safetensors"),
    "gguf": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + b"\0" * 100, "not_safetensors"),
    "html": (b"<!DOCTYPE html><html>404</html>", "not_safetensors"),
    "lfs_pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not_safetensors"),
}


@pytest.mark.parametrize("name", CORPUS)
def test_refused_with_its_code(tmp_path, name):
    content, code = CORPUS[name]
    with pytest.raises(AdapterError) as error:
        read(tmp_path, content)
    assert error.value.code == code
    assert str(error.value).isprintable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_the_library_wrote(tmp_path, dtype):
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in {"b": (3, 5), "a": (7,), "c.d": (1, 1), "é\n": (2, 3, 4)}.items()
    }
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    loaded = read(tmp_path, content)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == dtype for name, tensor in tensors.items())


def test_dtypes_mixed_at_odd_offsets(tmp_path):
    """Nothing promises that a float32 starts at a multiple of four."""
    half = torch.arange(3, dtype=torch.float16)
    single = torch.arange(2, dtype=torch.float32)
    data = half.numpy().tobytes() + single.numpy().tobytes()
    loaded = read(tmp_path, build({"s": entry(6, 14), "h": entry(0, 6, (3,), "F16")}, data))
    assert torch.equal(loaded["h"], half)
    assert torch.equal(loaded["s"], single)
    assert loaded["s"].data_ptr() % 4 == 0


def test_tensors_are_not_the_file(tmp_path):
    """Overwriting and truncating the file afterwards changes nothing: no map of it. Together they take their own bytes,
    each from a cache line on."""
    path = tmp_path / "file"
    path.write_bytes(safetensors.torch.save({"a": torch.ones(1000), "b": torch.ones(1000)}))
    with path.open("rb", buffering=0) as handle:
        loaded = dict(AdapterTensors(handle, "file", 1 << 20).read_all())
    with path.open("r+b") as handle:
        handle.write(b"\xff" * 9000)
        handle.truncate(10)
    assert all(bool((tensor == 1).all()) for tensor in loaded.values())
    assert {tensor.untyped_storage().data_ptr() for tensor in loaded.values()} == {loaded["a"].data_ptr()}
    assert loaded["b"].data_ptr() == loaded["a"].data_ptr() + 4032
    assert loaded["a"].untyped_storage().nbytes() == 2 * 4032


def test_limit_on_the_file(tmp_path):
    with pytest.raises(AdapterError) as error:
        read(tmp_path, safetensors.torch.save({"a": torch.ones(1000)}), max_bytes=4000)
    assert error.value.code == "file_too_large"


def test_sparse_terabyte_is_refused_at_once(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(build({"a": entry(0, 2**40 - 4096, (2**38 - 1024,))}))
    os.truncate(path, 2**40)
    with path.open("rb", buffering=0) as handle, pytest.raises(AdapterError) as error:
        AdapterTensors(handle, "file", 4 << 30)
    assert error.value.code == "file_too_large"


@pytest.mark.parametrize("change", ["truncate", "overwrite"])
def test_file_that_changes_while_it_is_read(tmp_path, change):
    path = tmp_path / "file"
    path.write_bytes(safetensors.torch.save({"a": torch.ones(1000), "b": torch.ones(1000)}))
    with path.open("rb", buffering=0) as handle:
        tensors = AdapterTensors(handle, "file", 1 << 20).read_all()
        next(tensors)
        if change == "truncate":
            os.truncate(path, 5000)
        else:
            with path.open("r+b") as writer:
                writer.seek(6000)
                writer.write(b"\xff" * 100)
            os.utime(path, ns=(1, 1))  # whatever the clock's resolution
        with pytest.raises(AdapterError) as error:
            list(tensors)
    assert error.value.code == ("truncated" if change == "truncate" else "changed_while_reading")


def test_short_reads_are_continued(tmp_path):
    """A pipe-like file system may hand out a few bytes at a time."""

    class Slow(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:7])

    path = tmp_path / "file"
    tensors = {"a": torch.arange(100.0)}
    path.write_bytes(safetensors.torch.save(tensors))
    with Slow(path) as handle:
        loaded = dict(AdapterTensors(handle, "file", 1 << 20).read_all())
    assert torch.equal(loaded["a"], tensors["a"])


def test_the_library_accepts_no_file_that_we_refuse_without_a_reason(tmp_path):
    """What safetensors 0.8 takes and we don't is on purpose: a list, so that a change of either side is seen."""
    accepted = set()
    for name, (content, _) in CORPUS.items():
        try:
            safetensors.torch.load(content)
        except Exception:
            continue
        accepted.add(name)
    assert accepted == {
        "duplicate_name",
        "entry_has_more",
        "zero_size",
        "many_tensors",
        "many_dimensions",
        "metadata_huge",
        "no_tensor",
        "header_over_limit",
        "int_dtype",
        "double_dtype",
        "fp8_dtype",
    }
