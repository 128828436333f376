"""convert: torch and PEFT as oracles for what 2023's files hold; what is refused, and how it is said."""

import collections
import io
import json
import shutil
import signal

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guanaco.adapters.convert.conversion import convert_adapter, modern_config
from guanaco.adapters.convert.torch_pickle import TorchFile
from guanaco.adapters.convert.worker import cast, modern_key
from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.weights import AdapterLimits, load_adapter
from guanaco.models.formats.restricted_process import ProcessEnded, RestrictedProcess
from support.adapters.evil_pickles import evil_files
from support.adapters.tiny_adapters import make_adapter, targets_of
from support.models.tiny_models import tiny_llama

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


@pytest.mark.parametrize("name", ["system_2", "expanded", "terabytes", "text"])
def test_refusals_come_through_the_process(modern, tmp_path, name):
    code, content = dict(evil_files(tmp_path / "canary"))[name]
    (modern / WEIGHTS).unlink()
    (modern / PICKLE).write_bytes(content)
    error = refusal(modern, tmp_path / "new")
    assert (error.code, PICKLE in str(error)) == (code, True)
    assert not (tmp_path / "canary").exists()


def test_a_git_lfs_pointer_is_called_so(modern, tmp_path):
    (modern / WEIGHTS).unlink()
    (modern / PICKLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    error = refusal(modern, tmp_path / "new")
    assert (error.code, error.field) == ("lfs_pointer", PICKLE)


def test_the_process_that_dies_is_a_refusal(modern, tmp_path, monkeypatch):
    monkeypatch.setattr("guanaco.adapters.convert.conversion._WORKER", "guanaco.adapters.no_such_module")
    assert refusal(modern, tmp_path / "new").code == "conversion_failed"


def test_a_process_that_is_killed_says_nothing_of_the_file(modern, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise ProcessEnded("it ended", status=-signal.SIGKILL)

    monkeypatch.setattr(RestrictedProcess, "exchange", killed)
    assert "killed from outside" in str(refusal(modern, tmp_path / "new"))


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
