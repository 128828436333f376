"""convert: torch and PEFT as oracles for what 2023's files hold, and files that would run code if anybody let them."""

import collections
import io
import json
import os
import pickle
import pickletools
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_adapters import make_adapter, targets_of
from tiny_models import tiny_llama

from guanaco.adapters.convert import convert_adapter, modern_config
from guanaco.adapters.convert_worker import cast, convert, modern_key
from guanaco.adapters.errors import AdapterError
from guanaco.adapters.torch_pickle import MAX_PICKLE_BYTES, TorchFile
from guanaco.adapters.weights import AdapterLimits, load_adapter

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
LAYER = "base_model.model.model.layers.0.a"


@pytest.fixture(scope="module")
def targets():
    return targets_of(tiny_llama(kind="gqa", num_hidden_layers=2))


@pytest.fixture
def modern(targets, tmp_path):
    return make_adapter(tmp_path / "modern", targets, 4, seed=3, modules=["q_proj", "v_proj"])


def saved_as_pickle(path, to, change=lambda t: t, **options):
    """The same adapter as PEFT of 2023 left it."""
    shutil.copytree(path, to)
    tensors = change(safetensors.torch.load_file(to / WEIGHTS))
    (to / WEIGHTS).unlink()
    torch.save(tensors, to / PICKLE, **options)
    return to


def with_default(tensors):
    return {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}


def refusal(source, target, **options):
    with pytest.raises(AdapterError) as error:
        convert_adapter(source, target, **options)
    assert str(error.value).isprintable()
    assert not target.exists()
    assert not [entry for entry in target.parent.iterdir() if entry.name.startswith(".")], "something was left"
    return error.value


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before_1.6"])
def test_pickled_adapter_computes_the_same_afterwards(targets, modern, tmp_path, legacy):
    """Same version, that is: the same scales and bits."""
    old = saved_as_pickle(modern, tmp_path / "old", with_default, _use_new_zipfile_serialization=not legacy)
    report = convert_adapter(old, tmp_path / "new")
    assert load_adapter(tmp_path / "new", targets).version == load_adapter(modern, targets).version
    assert report.num_tensors == report.num_renamed == 8
    assert report.dtypes == {"F32": 8}
    assert report.target_bytes == (tmp_path / "new" / WEIGHTS).stat().st_size
    assert (old / PICKLE).exists()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    layout=st.sampled_from(["plain", "transposed", "view", "shared", "parameter"]),
    protocol=st.integers(2, 5),
    legacy=st.booleans(),
    wrapped=st.booleans(),
)
def test_reads_what_torch_reads(shapes, dtype, layout, protocol, legacy, wrapped):
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for index, shape in enumerate(shapes):
        tensor = torch.randn((*shape, 6), generator=generator).to(dtype)
        if layout == "transposed":
            tensor = tensor.transpose(0, -1)
        elif layout == "view":
            tensor = tensor[..., 1:4]
        elif layout == "shared":
            tensors[f"half.{index}"] = tensor[..., :3]
            tensor = tensor[..., 3:]
        elif layout == "parameter":
            tensor = torch.nn.Parameter(tensor)
        tensors[f"t.{index}"] = tensor
    if wrapped:
        tensors = collections.OrderedDict(tensors)
        tensors._metadata = {"version": 1}
    buffer = io.BytesIO()
    torch.save(tensors, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    buffer.seek(0)
    file = TorchFile(buffer)
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        ours = torch.from_numpy(file.read(name).copy())
        ours = ours.view(torch.bfloat16) if dtype == torch.bfloat16 else ours
        assert torch.equal(ours, tensor.detach())


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16", "keep"])
def test_casts_as_torch_does(modern, tmp_path, kind, wanted):
    def change(tensors):
        return {k: (v * 3.3).to(kind) for k, v in tensors.items()}

    old = saved_as_pickle(modern, tmp_path / "old", change)
    original = torch.load(old / PICKLE, weights_only=True)
    convert_adapter(old, tmp_path / "new", dtype=wanted)
    target = getattr(torch, wanted, torch.float32 if kind == torch.float64 else kind)
    for key, tensor in safetensors.torch.load_file(tmp_path / "new" / WEIGHTS).items():
        assert tensor.dtype == target
        assert torch.equal(tensor, original[key].to(target))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_bfloat16_is_rounded_as_torch_rounds(values):
    array = np.array(values, dtype="<f4")
    theirs = torch.from_numpy(array).bfloat16()
    if not bool(theirs.isfinite().all()):
        with pytest.raises(AdapterError):
            cast(array, "F32", "BF16", "x")
        return
    assert np.array_equal(cast(array, "F32", "BF16", "x"), theirs.view(torch.uint16).numpy())


def test_what_float16_cannot_hold_is_not_made_infinite(modern, tmp_path):
    old = saved_as_pickle(modern, tmp_path / "old", lambda t: {k: v * 1e6 for k, v in t.items()})
    assert refusal(old, tmp_path / "new", dtype="float16").code == "out_of_range"
    convert_adapter(old, tmp_path / "new", dtype="bfloat16")


def test_safetensors_with_old_keys_keep_what_they_record(targets, modern, tmp_path):
    tensors = with_default(safetensors.torch.load_file(modern / WEIGHTS))
    safetensors.torch.save_file(tensors, modern / WEIGHTS, metadata={"guanaco.base_fingerprint": "abc"})
    convert_adapter(modern, tmp_path / "new")
    with safetensors.safe_open(tmp_path / "new" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt", "guanaco.base_fingerprint": "abc"}
    assert load_adapter(tmp_path / "new", targets).version == load_adapter(modern, targets).version


@pytest.mark.parametrize(
    ("old", "new", "adapter"),
    [
        (f"{LAYER}.lora_A.default.weight", f"{LAYER}.lora_A.weight", "default"),
        (f"{LAYER}.lora_B.weight", f"{LAYER}.lora_B.weight", None),
        ("model.layers.0.a.lora_B.x-1.weight", f"{LAYER}.lora_B.weight", "x-1"),
        ("base_model.model.lm_head.weight", "base_model.model.lm_head.weight", None),
        ("x.lora_A.bias", "x.lora_A.bias", None),
    ],
)
def test_keys(old, new, adapter):
    assert modern_key(old) == (new, adapter)


def config(**fields):
    return json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], **fields}).encode()


def test_configs_of_2023():
    """As alpaca-lora's and QLoRA's PEFT (0.2 to 0.4) wrote them."""
    old = config(enable_lora=None, merge_weights=False, fan_in_fan_out=True, bias="none", modules_to_save=None)
    text, notes = modern_config(old)
    fields = json.loads(text)
    assert not {"enable_lora", "merge_weights"} & fields.keys()
    assert fields["fan_in_fan_out"] is False
    assert len(notes) == 3
    bare = json.dumps({"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}).encode()
    assert json.loads(modern_config(bare)[0])["peft_type"] == "LORA"
    assert modern_config(config())[1] == ()
    for code, fields in {
        "enable_lora_unsupported": {"enable_lora": [True, False, True]},
        "dora_unsupported": {"use_dora": True},
        "bias_unsupported": {"bias": "all"},
    }.items():
        with pytest.raises(AdapterError) as error:
            modern_config(config(**fields))
        assert error.value.code == code


class Call:
    """Unpickling one calls a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Build:
    """Unpickling one imports its module and sets attributes."""

    def __init__(self, canary):
        self.canary = canary


def zipped(data, compression=zipfile.ZIP_STORED, **members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


class Reference:
    """Pickled as torch pickles a tensor of `shape` over storage 0 of `count` elements."""

    def __init__(self, shape, strides, count, offset=0):
        self.arguments = (("storage", torch.FloatStorage, "0", "cpu", count), offset, shape, strides)

    def __reduce__(self):
        storage, *rest = self.arguments
        return torch._utils._rebuild_tensor_v2, (Storage(storage), *rest, False, collections.OrderedDict())


class Storage:
    def __init__(self, reference):
        self.reference = reference


class StoragePickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.reference if isinstance(value, Storage) else None


def tensor_file(*reference, data=b"\0" * 64):
    buffer = io.BytesIO()
    StoragePickler(buffer, protocol=2).dump({"x": Reference(*reference)})
    return zipped(buffer.getvalue(), **{"data/0": data})


def evil_files(canary):
    """name → (code, content): what attackers and bad tools send."""
    shell = f"touch {canary}"
    calls = {
        "system": Call(os.system, shell),
        "eval": Call(eval, f"open({str(canary)!r}, 'w')"),
        "open": Call(open, str(canary), "w"),
        "popen": Call(subprocess.Popen, ["touch", str(canary)]),
        "import": Call(__import__, "os"),
        "built": Build(str(canary)),
        "numpy_array": np.zeros(3),
        "python_type": int,
    }
    for name, value in calls.items():
        for protocol in (0, 2, 4):
            data = pickle.dumps({"x": value}, protocol=protocol)
            yield f"{name}_{protocol}", ("unsafe_pickle", zipped(data))
    yield "bare_pickle", ("unsafe_pickle", pickle.dumps(Call(os.system, shell), protocol=2))
    yield "instance", ("unsafe_pickle", zipped(b"(S'touch'\nios\nsystem\n."))
    yield "object", ("unsafe_pickle", zipped(b"(cos\nsystem\nS'touch'\no."))
    yield "extension", ("unsafe_pickle", zipped(b"\x80\x02\x82\x01."))
    yield "jit_code", ("unsafe_pickle", zipped(b"\x80\x02c__torch__\nModule\n)\x81."))
    yield "ordered_dict_call", ("bad_pickle", zipped(b"\x80\x02ccollections\nOrderedDict\nX\x01\0\0\0a\x85R."))
    yield "function_itself", ("not_tensors", zipped(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n."))
    yield "empty_stack", ("bad_pickle", zipped(b"\x80\x02R."))
    yield "below_mark", ("bad_pickle", zipped(b"\x80\x02}(R."))
    yield "no_mark", ("bad_pickle", zipped(b"\x80\x02u."))
    yield "no_memo", ("bad_pickle", zipped(b"\x80\x02h\x05."))
    yield "no_stop", ("bad_pickle", zipped(b"\x80\x02}"))
    yield "huge_string", ("bad_pickle", zipped(b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"x."))
    yield "huge_integer", ("bad_pickle", zipped(b"I" + b"9" * 100_000 + b"\n."))
    yield "structure_too_large", ("bad_pickle", zipped(b"\x80\x02" + b"N" * (MAX_PICKLE_BYTES + 1) + b"."))
    yield "compressed", ("bad_pickle", zipped(b"\x80\x02N" * 1000 + b".", zipfile.ZIP_DEFLATED))
    yield "no_table", ("not_tensors", zipped(pickle.dumps([1, 2], protocol=2)))
    yield "checkpoint", ("not_tensors", zipped(pickle.dumps({"epoch": 3}, protocol=2)))
    yield "nested", ("not_tensors", zipped(pickle.dumps({"model": {"x": 1}}, protocol=2)))
    yield "list_in_itself", ("not_tensors", zipped(b"\x80\x02]q\0h\0a."))
    yield "empty_table", ("empty", zipped(pickle.dumps({}, protocol=2)))
    yield "no_data", ("bad_pickle", tensor_file((4, 4), (4, 1), 17))
    yield "expanded", ("file_too_large", tensor_file((2**20, 2**20), (0, 0), 16))
    yield "beyond", ("bad_pickle", tensor_file((4, 4), (8, 1), 16))
    yield "offset_beyond", ("bad_pickle", tensor_file((4, 4), (4, 1), 16, 1))
    yield "negative_offset", ("bad_pickle", tensor_file((4, 4), (4, 1), 16, -1))
    yield "negative_stride", ("bad_pickle", tensor_file((4, 4), (-4, 1), 16))
    yield "negative_shape", ("bad_pickle", tensor_file((-4, -4), (4, 1), 16))
    yield "strides_missing", ("bad_pickle", tensor_file((4, 4), (4,), 16))
    yield "zero_rows", ("empty_tensor", tensor_file((0, 4), (4, 1), 16))
    yield "terabytes", ("file_too_large", tensor_file((2**40,), (1,), 2**40))
    yield "damaged_zip", ("bad_pickle", tensor_file((4, 4), (4, 1), 16)[:-30])
    yield "text", ("bad_pickle", b"version https://git-lfs.github.com/spec/v1\n")
    yield "nothing", ("bad_pickle", b"")


EVIL = list(dict(evil_files("canary")))


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


@pytest.mark.parametrize("name", ["system_2", "expanded", "terabytes", "text"])
def test_refusals_come_through_the_process(modern, tmp_path, name):
    code, content = dict(evil_files(tmp_path / "canary"))[name]
    (modern / WEIGHTS).unlink()
    (modern / PICKLE).write_bytes(content)
    error = refusal(modern, tmp_path / "new")
    assert (error.code, PICKLE in str(error)) == (code, True)
    assert not (tmp_path / "canary").exists()


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
from guanaco.adapters.convert_worker import restrict
sys.stdout.write("")
restrict(1000, 1000)
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


def test_the_process_that_dies_is_a_refusal(modern, tmp_path, monkeypatch):
    monkeypatch.setattr("guanaco.adapters.convert._WORKER", "guanaco.adapters.no_such_module")
    assert refusal(modern, tmp_path / "new").code == "conversion_failed"


def test_limits_and_targets(modern, tmp_path):
    assert refusal(modern, tmp_path / "new", limits=AdapterLimits(max_file_bytes=4000)).code == "file_too_large"
    assert refusal(modern, tmp_path / "new", dtype="int8").code == "bad_option"
    (tmp_path / "taken").mkdir()
    with pytest.raises(AdapterError) as error:
        convert_adapter(modern, tmp_path / "taken")
    assert error.value.code == "target_exists"
    (modern / WEIGHTS).unlink()
    assert refusal(modern, tmp_path / "new").code == "weights_missing"
    (modern / PICKLE).symlink_to("/etc/passwd")
    assert refusal(modern, tmp_path / "new").code == "outside_root"


def two_names(tensors):
    return {k.replace(".weight", ".a.weight" if "v_proj" in k else ".b.weight"): v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("dtype_unsupported", lambda t: {**t, "steps": torch.arange(3)}),
        ("duplicate_tensor", lambda t: {**t, **with_default(t)}),
        ("several_adapters", two_names),
        ("empty_tensor", lambda t: {**t, "x": torch.ones(0, 3)}),
        ("empty", lambda t: {}),
    ],
)
def test_weights_that_are_refused(modern, tmp_path, code, change):
    assert refusal(saved_as_pickle(modern, tmp_path / "old", change), tmp_path / "new").code == code


def test_only_tensor_opcodes_are_known():
    """Every opcode that calls or imports in a way of its own is refused by name; a new one of Python's, too."""
    from guanaco.adapters.torch_pickle import _CONSTANTS, _FIXED

    known = _CONSTANTS | _FIXED.keys()
    assert known <= {opcode.name for opcode in pickletools.opcodes}
    assert not known & {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "REDUCE", "GLOBAL"}
