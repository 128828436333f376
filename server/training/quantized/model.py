"""Loads a model as a transformers model that trains adapters on the base as it is served.

The weights come from `models.loading`, as the server's do: both processes map one packed file, so the base is in memory
once. Knows no data, recipes or jobs. Called by `server.training.base`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guanaco.kernels import NativeUnavailable, load_ops
from guanaco.models.architectures.config import ModelConfig
from guanaco.models.errors import ModelError
from guanaco.models.loading.loader import LoadedModel, load_model
from guanaco.models.loading.progress import Progress
from guanaco.server.training.quantized.linear import Decoder, ServedEmbedding, ServedLinear

DTYPES = (torch.float32, torch.bfloat16)


def load_base(
    source: Path,
    *,
    cache_dir: Path | None = None,
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    keep_float32: bool = False,
    max_model_len: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """The model at `source` for training: a transformers model of its architecture, all parameters frozen.

    source: the path that the server loads, as `ensure_demo_model` or `resolve_model` (`models.loading`) return it: a
    directory of safetensors, dense or in bitsandbytes' NF4, or a GGUF file.
    cache_dir: the server's cache (`settings.cache_dir`). With it the packed weights are mapped, and server and trainer
    share their pages; without it each has a copy of its own.
    dtype: of activations and gradients, float32 or bfloat16. threads: of the decoder; None: as many as torch has.
    keep_float32, max_model_len, progress: as in `load_model`. keep_float32 must be what the server has (true for
    `--dtype float32`), or the fingerprints differ.

    Projections, biases, norms, embedding and head are those that are served, bit for bit. `base_fingerprint` says which
    base it is; `guanaco_notes` (a tuple of lines) on the model has the loader's remarks. Nothing in it is trainable
    until PEFT wraps it. One thread may run it at a time.
    Raises ModelError for an error in `source`, ValueError for another dtype, and ImportError without the
    `train` extra.
    """
    if dtype not in DTYPES:
        raise ValueError(f"a base trains in float32 or bfloat16, not in {dtype}")
    ops, notes = _load_ops(dtype, threads or torch.get_num_threads())
    loaded = load_model(
        source,
        ops,
        cache_dir=cache_dir,
        progress=progress,
        keep_float32=keep_float32,
        max_model_len=max_model_len,
    )
    model = _empty_model(loaded.config, dtype)
    _fill(model, loaded, Decoder(ops), dtype)
    _check_complete(model, source)
    model.requires_grad_(False)
    model.guanaco_fingerprint = loaded.fingerprint
    model.guanaco_notes = (*loaded.notes, *notes)
    return model


def base_fingerprint(model: Any) -> str:
    """The fingerprint of the base that `load_base` has made, or of a PEFT model around it: hex SHA-256, the same that
    the server computes and that adapters carry as `guanaco.base_fingerprint`. Raises ValueError for another model."""
    fingerprint = getattr(model, "guanaco_fingerprint", None)  # PEFT's models pass attributes on to their base
    if not isinstance(fingerprint, str):
        raise ValueError("this model was not made by load_base, so its base has no fingerprint")
    return fingerprint


def _load_ops(dtype: torch.dtype, threads: int) -> tuple[Any, tuple[str, ...]]:
    """(the provider that decodes, notes for the operator)."""
    cpu = torch.device("cpu")
    try:
        return load_ops("cpu", device=cpu, dtype=dtype, threads=threads, in_torch_threads=True), ()
    except NativeUnavailable as error:
        note = f"slow, and the base is not shared with a server: {error}"
        return load_ops("reference", device=cpu, dtype=dtype), (note,)


def _empty_model(config: ModelConfig, dtype: torch.dtype) -> Any:
    """transformers' model of this config without any memory for weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = AutoConfig.for_model(**config.to_json())
    fields.use_cache = False  # training has no use for keys and values of the past
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(fields, dtype=dtype, attn_implementation="sdpa")
    # It has no weights, only frequencies that follow from the config, so it is built in real memory.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=fields)
    return model


def _fill(model: Any, loaded: LoadedModel, decoder: Decoder, dtype: torch.dtype) -> None:
    """Put the served weights in the places of the empty ones."""
    linears, tensors = loaded.model.linears, loaded.model.tensors
    for name, handle in linears.items():
        place = name if name == "lm_head" else f"model.{name}"
        _replace(model, place, ServedLinear(handle, tensors.get(f"{name}.bias"), decoder, dtype))
    table = tensors["embed_tokens.weight"]
    _replace(model, "model.embed_tokens", ServedEmbedding(table, dtype, model.model.embed_tokens.padding_idx))
    for name, norm in _norms(tensors).items():
        module = model.get_submodule(f"model.{name}")
        module.weight = nn.Parameter(norm.to(dtype), requires_grad=False)


def _norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Module's name → weight of a norm: every `.weight` tensor but the embedding."""
    weights = {name.removesuffix(".weight"): t for name, t in tensors.items() if name.endswith(".weight")}
    del weights["embed_tokens"]
    return weights


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _check_complete(model: nn.Module, source: Path) -> None:
    """Raise ModelError if transformers' model has a tensor that the served one lacks: nothing would fill it."""
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise ModelError(
            f"{source}: transformers' model has {empty[0]}, which the served one has not: this architecture cannot be "
            "trained here"
        )
