"""convert: files that would run code if anybody let them, damaged ones, and what its process may do at all."""

import io
import json
import pickle
import pickletools
import subprocess
import sys
import zipfile

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guanaco.adapters.convert.torch_pickle import TorchFile
from guanaco.adapters.convert.worker import convert
from guanaco.adapters.errors import AdapterError
from support.adapters.evil_pickles import EVIL, evil_files


def test_evil_files_run_nothing_and_have_their_codes(tmp_path):
    """In this process, where a canary would show, and faster than in forty of their own."""
    canary, wrong = tmp_path / "canary", {}
    for name, (code, content) in evil_files(canary):
        path = tmp_path / "file"
        path.write_bytes(content)
        with path.open("rb") as file, (tmp_path / "out").open("wb") as out:
            try:
                convert(file, out, is_pickle=True, dtype="keep", max_bytes=1 << 30)
                seen = "converted"
            except AdapterError as error:
                seen = error.code
                wrong.update({name: str(error)} if not str(error).isprintable() else {})
        wrong.update({name: (code, seen)} if seen != code else {})
        assert not canary.exists(), name
    assert not wrong
    assert len(EVIL) >= 50


def test_the_canary_would_show(tmp_path):
    """The files above do what they claim where somebody trusts them."""
    canary = tmp_path / "canary"
    code, content = dict(evil_files(canary))["open_2"]
    assert code == "unsafe_pickle"
    pickle.loads(zipfile.ZipFile(io.BytesIO(content)).read("archive/data.pkl"))["x"].close()
    assert canary.exists()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_files_are_refused_or_read_and_nothing_else(data):
    """Any bytes changed, anything cut off: an AdapterError or tensors, never another exception."""
    buffer = io.BytesIO()
    legacy = data.draw(st.booleans())
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(3)}, buffer, _use_new_zipfile_serialization=not legacy)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 700)))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) if data.draw(st.booleans()) else len(content) :]
    try:
        file = TorchFile(io.BytesIO(bytes(content)))
        for name in file.tensors:
            file.read(name)
    except AdapterError:
        pass


_TRIES = """
import json, os, socket, sys, threading
from guanaco.adapters.convert.worker import budget, restrict
sys.stdout.write("")
restrict(budget(1000, 1000))
def attempt(function):
    try:
        function()
    except (OSError, MemoryError, RuntimeError) as error:
        return type(error).__name__
    return "allowed"
import errno
tries = {
    "open": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "create": lambda: os.open("/tmp/guanaco-canary", os.O_CREAT | os.O_WRONLY),
    "socket": lambda: socket.socket(),
    "pipe": lambda: os.pipe(),
    "listdir": lambda: os.listdir("/"),
    "memory": lambda: bytearray(3 << 30),
}
print(json.dumps({name: attempt(function) for name, function in tries.items()}))
"""


def test_the_process_can_neither_open_nor_connect_nor_swell():
    done = subprocess.run(
        [sys.executable, "-I", "-c", _TRIES],
        capture_output=True,
        timeout=60,
        check=True,
        env={"OPENBLAS_NUM_THREADS": "1"},
    )
    result = json.loads(done.stdout)
    assert len(result) == 6
    assert "allowed" not in result.values(), result


def test_only_tensor_opcodes_are_known():
    """Every opcode that calls or imports in a way of its own is refused by name; a new one of Python's, too."""
    from guanaco.adapters.convert.torch_pickle import _CONSTANTS, _FIXED

    known = _CONSTANTS | _FIXED.keys()
    assert known <= {opcode.name for opcode in pickletools.opcodes}
    assert not known & {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "REDUCE", "GLOBAL"}
