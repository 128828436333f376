"""Pickles beside an adapter, or in its place: never opened."""

import json
import pickle

import pytest

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.weights import WEIGHTS_NAME as WEIGHTS
from guanaco.adapters.peft.weights import load_adapter
from support.adapters.tiny_adapters import make_adapter, targets_of
from support.models.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def targets():
    return targets_of(tiny_llama(num_hidden_layers=1))


class Canary:
    """Unpickling one creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.pt", "adapter.pth", "x.ckpt", "x.pkl"])
def test_only_a_pickle_is_refused_and_not_opened(targets, tmp_path, name):
    path, canary = make_adapter(tmp_path / "a", targets, 4), tmp_path / "canary"
    (path / WEIGHTS).unlink()
    (path / name).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(AdapterError, match="guanaco adapters convert") as error:
        load_adapter(path, targets)
    assert (error.value.code, error.value.field) == ("unsupported_format", name)
    assert not canary.exists()


def test_pickles_beside_or_under_the_right_name(targets, tmp_path):
    path, canary = make_adapter(tmp_path / "a", targets, 4), tmp_path / "canary"
    evil = pickle.dumps(Canary(canary))
    for name in ("adapter_model.bin", "training_args.bin", "adapter_model.pt"):
        (path / name).write_bytes(evil)
    (path / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    (path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.T", null]}}')
    config = json.loads((path / "adapter_config.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.M"}, "auto_mapping": {"parent_library": "evil"}}
    (path / "adapter_config.json").write_text(json.dumps(config | {"_attn_implementation": "evil"}))
    assert load_adapter(path, targets).modules_applied == 7
    for protocol in range(6):
        (path / WEIGHTS).write_bytes(pickle.dumps(Canary(canary), protocol=protocol))
        with pytest.raises(AdapterError) as error:
            load_adapter(path, targets)
        assert error.value.code == "not_safetensors"
    (path / "adapter_config.json").write_bytes(evil)
    with pytest.raises(AdapterError) as error:
        load_adapter(path, targets)
    assert error.value.code == "bad_config"
    assert not canary.exists()
