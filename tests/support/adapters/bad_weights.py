"""What can be wrong with an adapter's weights and files: each case spoils a good adapter, see `bad_adapters`."""

import io
import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from support.adapters.tiny_adapters import make_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RANK = 4
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
KEY_B = KEY.replace("lora_A", "lora_B")
FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"  # in the order of the file
CANARY = "canary"  # made in a test's folder by any pickle of ours that is opened

Tensors = dict[str, torch.Tensor]


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _join(header: object, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header_cases() -> Iterator[tuple[str, str, Callable[[dict[str, Any], bytes], bytes]]]:
    """(what, code, the good file's header and data → the bad file)"""

    def edit(key: str = KEY, **fields: Any) -> Callable[[dict[str, Any], bytes], bytes]:
        return lambda header, data: _join({**header, key: {**header[key], **fields}}, data)

    def text(change: Callable[[bytes], bytes]) -> Callable[[dict[str, Any], bytes], bytes]:
        return lambda header, data: _join(change(json.dumps(header).encode()), data)

    def shift(header: dict[str, Any], data: bytes, by: int) -> bytes:
        start, end = header[KEY]["data_offsets"]
        return edit(data_offsets=[start + by, end + by])(header, data)

    def twice(header: dict[str, Any], data: bytes) -> bytes:
        again = json.dumps({KEY: header[KEY]})[1:-1].encode()
        return _join(json.dumps(header).encode()[:-1] + b", " + again + b"}", data)

    def gap(header: dict[str, Any], data: bytes) -> bytes:
        moved = {
            key: {**entry, "data_offsets": [offset + 8 for offset in entry["data_offsets"]]}
            for key, entry in header.items()
            if key != "__metadata__"
        }
        return _join(moved, b"\0" * 8 + data)

    yield from (
        ("weights empty", "not_safetensors", lambda *_: b""),
        ("weights of seven bytes", "not_safetensors", lambda *_: b"\0" * 7),
        ("weights of zeros", "bad_header", lambda *_: b"\0" * 4096),
        ("header length 0", "bad_header", lambda header, data: _join(header, data, 0)),
        ("header length one short", "bad_header", lambda h, d: _join(h, d, len(json.dumps(h)) - 1)),
        ("header length one long", "bad_header", lambda h, d: _join(h, d, len(json.dumps(h)) + 1)),
        ("header length 2**64 - 1", "not_safetensors", lambda header, data: _join(header, data, 2**64 - 1)),
        ("header length 2**63", "not_safetensors", lambda header, data: _join(header, data, 2**63)),
        ("header length the file's", "not_safetensors", lambda h, d: _join(h, d, len(d) + len(json.dumps(h)) + 8)),
        ("header of two megabytes", "header_too_large", text(lambda good: good + b" " * (2 << 20))),
        ("header with a key twice", "bad_header", twice),
        ("header with NaN", "bad_header", text(lambda good: good.replace(b"[4,", b"[NaN,", 1))),
        ("header not UTF-8", "bad_header", text(lambda good: good.replace(b"q_proj", b"q_\xffroj", 1))),
        ("header a list", "bad_header", text(lambda good: b"[" + good + b"]")),
        ("header nested deeply", "bad_header", text(lambda _: b'{"a":' + b"[" * 100_000)),
        ("header of 5,000 tensors", "too_many_tensors",
         lambda *_: _join({f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
                           for i in range(5000)}, b"\0" * 20_000)),
        ("header without tensors", "empty", lambda *_: _join({"__metadata__": {"format": "pt"}}, b"")),
        ("metadata of numbers", "bad_header", lambda h, d: _join({**h, "__metadata__": {"a": 1}}, d)),
        ("metadata a list", "bad_header", lambda h, d: _join({**h, "__metadata__": []}, d)),
        ("offsets beyond the file", "bad_layout", lambda header, data: shift(header, data, 1 << 40)),
        ("offsets overlapping", "bad_layout", lambda header, data: shift(header, data, -16)),
        ("offsets with a gap before", "bad_layout", gap),
        ("offsets backwards", "bad_header", edit(data_offsets=[1024, 0])),
        ("offsets negative", "bad_header", edit(data_offsets=[-1024, 0])),
        ("offsets fractions", "bad_header", edit(data_offsets=[0.0, 1024.0])),
        ("offsets huge", "bad_header", edit(data_offsets=[2**64, 2**64 + 1024])),
        ("offsets of all the same bytes", "bad_layout",
         lambda h, d: _join({k: {**e, "data_offsets": [0, e["data_offsets"][1] - e["data_offsets"][0]]}
                             for k, e in h.items() if k != "__metadata__"}, d)),
        ("shape larger than its bytes", "bad_layout", edit(shape=[RANK, 65])),
        ("shape that overflows", "bad_layout", edit(shape=[2**62, 8])),
        ("shape that overflows to the right size", "bad_layout", edit(shape=[2**62 + 64, RANK])),
        ("shape beyond 64 bits", "bad_header", edit(shape=[2**64, 4])),
        ("shape negative", "bad_header", edit(shape=[-4, -64])),
        ("shape with 0", "empty_tensor", edit(shape=[0, 64], data_offsets=[0, 0])),
        ("shape of booleans", "bad_header", edit(shape=[True, True])),
        ("shape of a hundred sizes", "bad_header", edit(shape=[1] * 98 + [4, 64])),
        ("dtype half the size", "bad_layout", edit(dtype="F16")),
        ("dtype of integers", "dtype_unsupported", edit(dtype="I32")),
        ("dtype double", "dtype_unsupported", edit(dtype="F64", shape=[RANK // 2, 64])),
        ("dtype of eight bits", "dtype_unsupported", edit(dtype="F8_E4M3", shape=[RANK * 4, 64])),
        ("dtype unknown", "dtype_unsupported", edit(dtype="\x1b[31mF32")),
        ("dtype a list", "dtype_unsupported", edit(dtype=["F32"])),
        ("an entry with a field more", "bad_header", edit(strides=[64, 1])),
        ("cut off by a byte", "truncated", lambda h, d: _join(h, d[:-1])),
        ("cut off in the middle", "truncated", lambda h, d: _join(h, d[: len(d) // 2])),
        ("a byte too much", "bad_layout", lambda h, d: _join(h, d + b"\0")),
        ("a pickle inside", "not_safetensors", lambda *_: pickle.dumps({"a": [1.0] * 100})),
        ("torch's own format", "not_safetensors", lambda *_: _torch_saved()),
        ("a zip file", "not_safetensors", lambda *_: _zipped()),
        ("a GGUF file", "not_safetensors", lambda *_: b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + b"\0" * 100),
        ("a pointer of git-lfs", "lfs_pointer", lambda *_: b"version https://git-lfs.github.com/spec/v1\noid x\n"),
    )  # fmt: skip


def tensor_cases() -> Iterator[tuple[str, str, Callable[[Tensors], Tensors]]]:
    """(what, code, the good tensors → the bad ones)"""

    def put(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
        return lambda tensors: {**tensors, key: change(tensors[key]).contiguous()}

    def poke(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.clone()
            tensor[-1, -1] = value
            return tensor

        return change

    def add(key: str) -> Callable[[Tensors], Tensors]:
        return lambda tensors: {**tensors, key: torch.ones(4, 64)}

    def rename(old: str, new: str) -> Callable[[Tensors], Tensors]:
        return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}

    model = "base_model.model.model."
    yield from (
        ("NaN", "not_finite", put(KEY, poke(float("nan")))),
        ("infinity", "not_finite", put(KEY_B, poke(float("inf")))),
        ("-infinity in halves", "not_finite", put(KEY_B, lambda t: poke(float("-inf"))(t).half())),
        ("NaN in bfloat16", "not_finite", put(KEY, lambda t: poke(float("nan"))(t).bfloat16())),
        ("A transposed", "shape_mismatch", put(KEY, lambda t: t.T)),
        ("B transposed", "shape_mismatch", put(KEY_B, lambda t: t.T)),
        ("A and B exchanged", "shape_mismatch",
         lambda t: {k.replace("lora_A", "#").replace("lora_B", "lora_A").replace("#", "lora_B"): v
                    for k, v in t.items()}),
        ("A of another width", "shape_mismatch", put(KEY, lambda t: torch.ones(RANK, 65))),
        ("B of another width", "shape_mismatch", put(KEY_B, lambda t: torch.ones(63, RANK))),
        ("A a vector", "bad_shape", put(KEY, lambda t: t.flatten())),
        ("A of three dimensions", "bad_shape", put(KEY, lambda t: t[None])),
        ("A a number", "bad_shape", put(KEY, lambda t: t.sum())),
        ("A of more rank than B", "rank_mismatch", put(KEY, lambda t: torch.cat((t, t)))),
        ("A missing", "missing_tensor", lambda t: {k: v for k, v in t.items() if k != KEY}),
        ("B missing", "missing_tensor", lambda t: {k: v for k, v in t.items() if k != KEY_B}),
        ("every B missing", "missing_tensor", lambda t: {k: v for k, v in t.items() if "lora_B" not in k}),
        ("every B zero", "zero_effect", lambda t: {k: v * ("lora_A" in k) for k, v in t.items()}),
        ("every A zero", "zero_effect", lambda t: {k: v * ("lora_B" in k) for k, v in t.items()}),
        ("a tensor of no module", "unexpected_tensor", add("optimizer.step")),
        ("a tensor of an unknown module", "unexpected_tensor",
         add(f"{model}layers.0.self_attn.w_pack.lora_A.weight")),
        ("a tensor with a path for a name", "unexpected_tensor", add("../../etc/passwd")),
        ("a tensor without a name", "unexpected_tensor", add("")),
        ("a tensor with a name of 100 kB", "unexpected_tensor", add("x" * 100_000)),
        ("a tensor of layer 2 of 2", "layer_out_of_range", add(f"{model}layers.2.mlp.up_proj.lora_A.weight")),
        ("a tensor of layer -1", "unexpected_tensor", add(f"{model}layers.-1.mlp.up_proj.lora_A.weight")),
        ("a tensor of layer 1e20", "unexpected_tensor", add(f"{model}layers.{10**20}.mlp.up_proj.lora_A.weight")),
        ("a tensor of layer 00", "unexpected_tensor", add(f"{model}layers.00.mlp.up_proj.lora_A.weight")),
        ("DoRA's magnitudes", "dora_unsupported", add(KEY.replace("lora_A", "lora_magnitude_vector"))),
        ("a saved module", "modules_to_save_unsupported", add("base_model.model.score.modules_to_save.weight")),
        ("an adapted embedding", "embedding_unsupported", add(f"{model}embed_tokens.lora_embedding_A")),
        ("a new embedding", "embedding_unsupported", add(f"{model}embed_tokens.weight")),
        ("an adapted head", "lm_head_unsupported", add("base_model.model.lm_head.lora_A.weight")),
        ("a bias", "lora_bias_unsupported", add(KEY.replace("lora_A.weight", "lora_B.bias"))),
        ("a tensor in two spellings", "duplicate_tensor",
         lambda t: {FIRST.replace(".weight", ".default.weight"): t[FIRST].clone(), **t}),
        ("two adapters in one file", "several_adapters",
         lambda t: {k.replace(".weight", ".b.weight") if "up_proj" in k else k: v for k, v in t.items()}),
        ("names without their prefix", "unexpected_tensor", rename("base_model.model.model.", "")),
        ("names with a prefix too much", "unexpected_tensor", rename("base_model.model.", "base_model.model.model.")),
        ("names in capitals", "unexpected_tensor", rename("q_proj", "Q_PROJ")),
        ("names with a Greek letter", "unexpected_tensor", rename("q_proj", "q_pr\u03bfj")),
        ("names of the whole model", "unexpected_tensor", lambda _: {"model.norm.weight": torch.ones(64)}),
    )  # fmt: skip


def file_cases() -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """(what, code, what is done to the folder)"""

    def instead(name: str, put: Callable[[Path], object]) -> Callable[[Path], object]:
        def spoil(folder: Path) -> None:
            (folder / name).unlink()
            put(folder / name)

        return spoil

    def outside(path: Path) -> None:
        """A link to a good file that lies outside of the root."""
        elsewhere = path.parents[2] / f"outside-{path.parent.name}-{path.name}"
        twin = make_adapter(path.parents[2] / "outside", {"layers.0.self_attn.q_proj": (64, 64)}, RANK)
        elsewhere.write_bytes((twin / path.name).read_bytes())
        path.symlink_to(elsewhere)

    def listen(path: Path) -> None:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is at most 107 bytes long
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(path.name)
        finally:
            os.chdir(here)

    def renamed(name: str, to: str) -> Callable[[Path], object]:
        return lambda folder: (folder / name).rename(folder / to)

    def sized(size: int) -> Callable[[Path], object]:
        return lambda folder: os.truncate(folder / WEIGHTS, size)

    def folder_link(folder: Path) -> None:
        outside_folder = folder.parents[1] / f"outside-{folder.name}"
        folder.rename(outside_folder)
        folder.symlink_to(outside_folder)

    def hollow(folder: Path) -> None:
        """Three gigabytes of which the header says that they are one tensor."""
        header = {KEY: {"dtype": "F32", "shape": [3 << 28], "data_offsets": [0, 3 << 30]}}
        (folder / WEIGHTS).write_bytes(_join(header, b""))
        os.truncate(folder / WEIGHTS, (3 << 30) + len(_join(header, b"")))

    unreadable = "unreadable"
    for name, missing in ((CONFIG, "config_missing"), (WEIGHTS, "weights_missing")):
        yield from (
            (f"{name} missing", missing, instead(name, lambda path: None)),
            (f"{name} in capitals", missing, renamed(name, name.upper())),
            (f"{name} with a space behind", missing, renamed(name, name + " ")),
            (f"{name} with a Cyrillic letter", missing, renamed(name, name.replace("a", "\u0430", 1))),
            (f"{name} a folder", "not_a_file", instead(name, lambda path: path.mkdir())),
            (f"{name} a pipe", "not_a_file", instead(name, os.mkfifo)),
            (f"{name} a socket", "not_a_file", instead(name, listen)),
            (f"{name} a link to a device", "outside_root", instead(name, lambda path: path.symlink_to("/dev/zero"))),
            (f"{name} a link out", "outside_root", instead(name, outside)),
            (f"{name} a link out by dots", "outside_root",
             instead(name, lambda path: path.symlink_to("../../../../../../../etc/passwd"))),
            (f"{name} a link to a process", "outside_root",
             instead(name, lambda path: path.symlink_to("/proc/self/environ"))),
            (f"{name} a link to nothing", "not_found", instead(name, lambda path: path.symlink_to("nothing"))),
            (f"{name} a link to itself", "not_a_file", instead(name, lambda path: path.symlink_to(path.name))),
            (f"{name} not to be read", unreadable, lambda folder, name=name: (folder / name).chmod(0)),
        )  # fmt: skip
    yield from (
        ("only a pickle", "unsupported_format", _only("adapter_model.bin")),
        ("only a pickle of another name", "unsupported_format", _only("adapter.pt")),
        ("a pickle called safetensors", "not_safetensors", _only(WEIGHTS)),
        ("only shards", "weights_sharded", renamed(WEIGHTS, "adapter_model-00001-of-00002.safetensors")),
        ("an empty folder", "config_missing",
         lambda folder: [(folder / name).unlink() for name in (CONFIG, WEIGHTS)]),
        ("a folder not to be searched", unreadable, lambda folder: folder.chmod(0)),
        ("a folder not to be listed", unreadable, lambda folder: folder.chmod(0o311)),
        ("a folder that is a link out", "outside_root", folder_link),
        ("a file of a terabyte", "file_too_large", sized(1 << 40)),
        ("a file of three gigabytes of nothing", "bad_layout", sized(3 << 30)),
        ("a file of three gigabytes of one tensor", "bad_shape", hollow),
        ("a text file for a folder", "not_a_directory",
         lambda folder: [[path.unlink() for path in folder.iterdir()], folder.rmdir(), folder.write_text("x")]),
    )  # fmt: skip


class _Opens:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def _only(name: str) -> Callable[[Path], object]:
    """The weights are a pickle called `name`, and there is none but it."""

    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps(_Opens(folder.parents[1] / CANARY)))

    return spoil


def _torch_saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    return buffer.getvalue()


def _zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 100)
    return buffer.getvalue()
