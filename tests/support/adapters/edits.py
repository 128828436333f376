"""Changes to an adapter that was saved: its tensors and its config."""

import json

import safetensors.torch

WEIGHTS = "adapter_model.safetensors"


def rewrite(path, change):
    """Change the tensors of an adapter; keys as in the file."""
    tensors = change(safetensors.torch.load_file(path / WEIGHTS))
    safetensors.torch.save_file(tensors, path / WEIGHTS)


def edit_config(path, **fields):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **fields}))


def without(*names):
    return lambda t: {name: tensor for name, tensor in t.items() if name not in names}
