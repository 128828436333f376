"""Reads an adapter directory into a LoadedAdapter: validated, in memory of its own, identified by a digest.

Knows the base model only as `targets` (module name → (in, out) features), and nothing of adapter names, slots or
requests. The registry and the store call it, off the engine thread. Config and header are checked before memory is
allocated for the tensors.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.beside import notes_beside
from guanaco.adapters.peft.config import CONFIG_NAME, MAX_CONFIG_BYTES, MODULE_PREFIX, AdapterConfig, parse_config
from guanaco.adapters.peft.files import AdapterFiles
from guanaco.adapters.peft.matching import Resolved
from guanaco.adapters.peft.safetensors import AdapterTensors
from guanaco.kernels.lora_batch import LoraPair
from guanaco.models.error_codes import ErrorCode
from guanaco.models.formats.safetensors import StoredTensor
from guanaco.models.formats.shown import printable

WEIGHTS_NAME = "adapter_model.safetensors"
_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# A key of the file's metadata: which packed base the adapter was trained on. `guanaco train` writes it.
BASE_FINGERPRINT_KEY = "guanaco.base_fingerprint"

# Files that save_pretrained did not write have `.default` (or another adapter's name) before `.weight`.
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[A-Za-z0-9_-]+))?\.weight")
_OTHER_TABLE = "this one differs from the base's: was it trained, or the vocabulary extended?"
# Tensors that PEFT also saves if it thinks that the vocabulary may have changed → their names in the base.
_TABLES = {"base_model.model.model.embed_tokens.weight": "embed_tokens", "base_model.model.lm_head.weight": "lm_head"}
_COMPARED_ROWS = 4096  # compared at a time: 64 MiB of a 7B's embedding in float32

# A function that returns the base's embedding ("embed_tokens") or output layer ("lm_head") as stored; None if it can't
# be read.
BaseTable = Callable[[str], Tensor | None]
# Parts of tensor names that reveal which unsupported feature wrote them, the most specific first.
_FEATURES = (
    ("lora_magnitude_vector", ErrorCode.DORA_UNSUPPORTED, "it belongs to DoRA, which is not supported"),
    ("trainable_tokens", ErrorCode.TRAINABLE_TOKENS_UNSUPPORTED, "trained tokens would change the shared vocabulary"),
    (
        "modules_to_save",
        ErrorCode.MODULES_TO_SAVE_UNSUPPORTED,
        "full copies of modules cannot share a batch with the base",
    ),
    ("lora_embedding_", ErrorCode.EMBEDDING_UNSUPPORTED, "the embedding is shared by all adapters"),
    ("embed_tokens", ErrorCode.EMBEDDING_UNSUPPORTED, f"the embedding is shared by all adapters, and {_OTHER_TABLE}"),
    ("lm_head", ErrorCode.LM_HEAD_UNSUPPORTED, f"the output layer is shared by all adapters, and {_OTHER_TABLE}"),
    (".bias", ErrorCode.LORA_BIAS_UNSUPPORTED, "biases of an adapter are not computed here"),
)


@dataclass(frozen=True)
class AdapterLimits:
    """The limits that an operator sets. Guanaco's own adapters have rank 64; its 65B one has 3.2 GB in fp32."""

    max_rank: int = 256
    max_file_bytes: int = 4 << 30


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in host memory. It never changes after it was loaded."""

    version: str  # SHA-256 over the scales and tensors, 64 hex digits; equal versions compute the same
    config: AdapterConfig
    pairs: dict[str, LoraPair]  # by target, in the order of `targets`; modules without an effect are left out
    num_bytes: int  # bytes of the tensors in `pairs`
    max_rank: int
    modules_applied: int
    modules_possible: int
    notes: tuple[str, ...]  # for the operator: oddities that were no reason to refuse the adapter
    base_fingerprint: str | None


def load_adapter(
    path: Path,
    targets: dict[str, tuple[int, int]],
    *,
    name: str = "default",
    limits: AdapterLimits | None = None,
    base_table: BaseTable | None = None,
) -> LoadedAdapter:
    """Read the PEFT adapter at `path` for a base with these targets. Blocks until all tensors are in memory.

    name: the sub-folder to read if `path` itself has no config. limits: None for the defaults of AdapterLimits.
    base_table: reads the base's embedding and output layer. A saved copy of one of them is skipped with a note if it
    equals the base's, and refused otherwise. Without base_table it is always refused.

    Raises AdapterError if a file is missing, unreadable or invalid, or if the adapter is unsupported or has no effect.
    """
    files = AdapterFiles.find(path, name, CONFIG_NAME)
    with _opened(files, targets, limits or AdapterLimits()) as (config, targeted, file, names):
        wanted = _with_tensors(targeted, names)
        tables = [key for key in file.tensors if key not in names]
        for key in tables:
            if not _is_the_bases(file, key, base_table):
                raise _unexpected(key, "")
        tensors = {names[key]: _finite(tensor, key) for key, tensor in file.read_all(without=tables)}
    scales = {target: scale for target, (_, scale) in wanted.items()}
    pairs = _effective_pairs(tensors, scales)
    inert = [target for target in wanted if target not in pairs]
    notes = (*config.notes, *targeted.notes, *notes_beside(files))
    if tables:
        saved = " and ".join(_TABLES[key] for key in tables)
        notes += (f"{WEIGHTS_NAME} also has {saved}, equal to the base's: the base's is used",)
    if untrained := [target for target in targeted if target not in wanted]:
        notes += (
            f"{len(untrained)} of {len(targeted)} targeted modules have no tensors in {WEIGHTS_NAME} and stay as the "
            f"base has them, {untrained[0]} among them: right where only some layers were trained",
        )
    if inert:
        notes += (f"{len(inert)} of {len(wanted)} modules are all zero and have no effect, {inert[0]} among them",)
    return LoadedAdapter(
        version=_digest(tensors, scales),
        config=config,
        pairs=pairs,
        num_bytes=sum(pair.a.nbytes + pair.b.nbytes for pair in pairs.values()),
        max_rank=max(pair.a.shape[0] for pair in pairs.values()),
        modules_applied=len(pairs),
        modules_possible=len(targets),
        notes=notes,
        base_fingerprint=file.metadata.get(BASE_FINGERPRINT_KEY),
    )


def check_files(files: AdapterFiles, targets: dict[str, tuple[int, int]], limits: AdapterLimits) -> None:
    """Check the config and the header, without reading the tensors: fast for a file of any size.

    Raises AdapterError as `load_adapter` does, except for the tensors' values: NaN, all zero, another embedding.
    """
    with _opened(files, targets, limits):
        pass


_Side = tuple[str, str]  # (target, "A" or "B")
_Wanted = dict[str, tuple[int, float]]  # target → (rank, scale)


def _with_tensors(targeted: _Wanted, names: dict[str, _Side]) -> _Wanted:
    """The targeted modules for which the file has tensors.

    Some trainers save only the layers that they trained, and PEFT leaves the other modules as the base has them.
    """
    stored = {target for target, _ in names.values()}
    return {target: found for target, found in targeted.items() if target in stored}


@contextmanager
def _opened(
    files: AdapterFiles, targets: dict[str, tuple[int, int]], limits: AdapterLimits
) -> Iterator[tuple[AdapterConfig, Resolved, AdapterTensors, dict[str, _Side]]]:
    """(the config, its targets, the open file, the meaning of each tensor); checks that all of them fit together."""
    config = parse_config(files.read(CONFIG_NAME, MAX_CONFIG_BYTES))
    check_weights_exist(files)
    wanted = config.resolve(targets)
    if not wanted:
        raise AdapterError(ErrorCode.NO_TARGETS, "target_modules matches no module of the base model", "target_modules")
    with files.open(WEIGHTS_NAME) as handle:
        file = AdapterTensors(handle, WEIGHTS_NAME, limits.max_file_bytes)
        names = _match_names(file.tensors, targets, wanted)
        stored = {names[key]: tensor for key, tensor in file.tensors.items() if key in names}
        _check_pairs(stored, targets, _with_tensors(wanted, names), limits)
        yield config, wanted, file, names


def check_base(adapter: LoadedAdapter, fingerprint: str) -> None:
    """Raises AdapterError if the adapter records another base than this one. Most adapters record none."""
    if adapter.base_fingerprint is not None and adapter.base_fingerprint != fingerprint:
        theirs = printable(adapter.base_fingerprint[:16])
        problem = f"it was trained on a base with fingerprint {theirs}, and this one has {fingerprint[:16]}"
        raise AdapterError(ErrorCode.BASE_MISMATCH, problem)


def check_weights_exist(files: AdapterFiles) -> None:
    """Raises AdapterError if there is no safetensors file.

    If there is a pickle or there are several files instead, the message says what to do with them.
    """
    if files.exists(WEIGHTS_NAME):
        return
    try:
        names = sorted(entry.name for entry in files.directory.iterdir())
    except OSError:  # the directory may be searched, but not listed
        names = []
    if shards := [name for name in names if _SHARD.fullmatch(name)]:
        problem = (
            f"the weights are split into {len(shards)} files ({shards[0]}, …), and PEFT and this server read one: join "
            f"them there with: {JOIN_SHARDS}"
        )
        raise AdapterError(ErrorCode.WEIGHTS_SHARDED, problem, shards[0])
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if not pickles:
        problem = f"{files.directory} has no {WEIGHTS_NAME}; was the adapter saved completely?"
        raise AdapterError(ErrorCode.WEIGHTS_MISSING, problem, WEIGHTS_NAME)
    shown = printable(pickles[0])
    problem = (
        f"{shown} is a pickle, which can run code and is never opened here; make {WEIGHTS_NAME} of it with "
        "guanaco adapters convert SRC DST"
    )
    raise AdapterError(ErrorCode.UNSUPPORTED_FORMAT, problem, shown)


# A command for the adapter's directory, to run in a Python with the safetensors package.
JOIN_SHARDS = (
    'python -c "import glob; from safetensors.torch import load_file, save_file; '
    "save_file({k: t for f in glob.glob('adapter_model-*-of-*.safetensors') for k, t in load_file(f).items()}, "
    "'adapter_model.safetensors')\""
)


def _match_names(
    tensors: dict[str, StoredTensor], targets: dict[str, tuple[int, int]], wanted: _Wanted
) -> dict[str, _Side]:
    """{tensor name: which matrix of which module it is}.

    Every other tensor is refused by name, except tensors that may be the base's own embedding or output layer.
    """
    names: dict[str, _Side] = {}
    taken: set[_Side] = set()
    adapters: set[str | None] = set()
    num_layers = 1 + max((int(match[1]) for match in map(_LAYER.match, targets) if match), default=-1)
    for key in (key for key in tensors if key not in _TABLES):
        match = _KEY.fullmatch(key)
        if match is None:
            raise _unexpected(key, "no LoRA matrix that is known here")
        module = match["module"].removeprefix(MODULE_PREFIX)
        if module not in targets or module == match["module"]:
            layer = _LAYER.match(module)
            if layer and int(layer[1]) >= num_layers:
                problem = f"{printable(key)} is for layer {layer[1]}, and the base model has {num_layers} layers"
                raise AdapterError(ErrorCode.LAYER_OUT_OF_RANGE, problem, printable(key))
            raise _unexpected(key, "for a module that the base model does not have, or that cannot be adapted")
        if module not in wanted:
            problem = (
                f"{printable(key)} is there, but target_modules, exclude_modules or layers_to_transform leave it out"
            )
            raise AdapterError(ErrorCode.UNTARGETED_TENSOR, problem, printable(key))
        side = (module, match["side"])
        adapters.add(match["adapter"])
        if side in taken:
            raise AdapterError(
                ErrorCode.DUPLICATE_TENSOR, f"{printable(key)} is there in two spellings", printable(key)
            )
        if len(adapters) > 1:
            problem = f"{printable(key)} is of another adapter than those before; save adapters one by one"
            raise AdapterError(ErrorCode.SEVERAL_ADAPTERS, problem, printable(key))
        taken.add(side)
        names[key] = side
    return names


_LAYER = re.compile(r"layers\.(\d{1,9})\.")


def _unexpected(key: str, otherwise: str) -> AdapterError:
    for part, code, why in _FEATURES:
        if part in key:
            return AdapterError(code, f"{printable(key)} cannot be honoured: {why}", printable(key))
    return AdapterError(ErrorCode.UNEXPECTED_TENSOR, f"{printable(key)} is {otherwise}", printable(key))


def _is_the_bases(file: AdapterTensors, key: str, base_table: BaseTable | None) -> bool:
    """Whether the adapter's copy of the base's embedding or output layer has the base's values.

    key: its tensor name in the file, one of `_TABLES`. The values are equal if one of the two tables, rounded to the
    other's dtype, is the other bit for bit. False if the shapes differ, without base_table, or if that returns None.
    Raises AdapterError if the file can't be read.
    """
    ours = None if base_table is None else base_table(_TABLES[key])
    if ours is None or tuple(ours.shape) != file.tensors[key].shape:
        return False
    ((_, theirs),) = file.read_all(without=file.tensors.keys() - {key})
    for mine, other in zip(ours.split(_COMPARED_ROWS), theirs.split(_COMPARED_ROWS), strict=True):
        if not (torch.equal(mine.to(other.dtype), other) or torch.equal(mine, other.to(mine.dtype))):
            return False
    return True


def _check_pairs(
    stored: dict[_Side, StoredTensor],
    targets: dict[str, tuple[int, int]],
    wanted: _Wanted,
    limits: AdapterLimits,
) -> None:
    """Check that each of these modules has both matrices, with the base's sizes and the rank that the config states."""
    for target, (rank, _) in wanted.items():
        for side in ("A", "B"):
            shown = f"{target}.lora_{side}"
            if (target, side) not in stored:
                problem = f"{shown} is missing, but its other half is there; was the adapter saved completely?"
                raise AdapterError(ErrorCode.MISSING_TENSOR, problem, shown)
            shape = stored[target, side].shape
            if len(shape) != 2:
                raise AdapterError(ErrorCode.BAD_SHAPE, f"{shown} has shape {list(shape)}; a matrix is needed", shown)
            features = targets[target][0] if side == "A" else targets[target][1]
            actual_features, actual_rank = (shape[1], shape[0]) if side == "A" else shape
            if actual_features != features:
                problem = f"{shown} has shape {list(shape)}, but the base has {features} there: made for another base?"
                raise AdapterError(ErrorCode.SHAPE_MISMATCH, problem, shown)
            if actual_rank > limits.max_rank:
                problem = f"{shown} has rank {actual_rank}; raise the limit of {limits.max_rank} with --max-lora-rank"
                raise AdapterError(ErrorCode.RANK_TOO_LARGE, problem, shown)
            if actual_rank != rank:
                problem = f"{shown} has rank {actual_rank}, but {CONFIG_NAME} says {rank}"
                raise AdapterError(ErrorCode.RANK_MISMATCH, problem, shown)


def _finite(tensor: Tensor, key: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        problem = f"{printable(key)} holds NaN or infinity: the training diverged, or the file is damaged"
        raise AdapterError(ErrorCode.NOT_FINITE, problem, printable(key))
    return tensor


def _effective_pairs(tensors: dict[_Side, Tensor], scales: dict[str, float]) -> dict[str, LoraPair]:
    """The pairs that have an effect. Raises AdapterError if no pair has one, as before the first training step, when
    every B is zero."""
    pairs = {}
    for target, scale in scales.items():
        a, b = tensors[target, "A"], tensors[target, "B"]
        if scale == 0 or not bool(a.any()) or not bool(b.any()):
            continue
        if a.dtype != b.dtype:  # exact, since float32 can hold every float16 and bfloat16
            a, b = a.float(), b.float()
        pairs[target] = LoraPair(a=a, b=b, scale=scale)
    if sum(pair.a.nbytes + pair.b.nbytes for pair in pairs.values()) != sum(t.nbytes for t in tensors.values()):
        # The file's tensors share one block of memory: a dropped pair would stay in it, and its bytes would be counted
        # nowhere.
        pairs = {target: LoraPair(pair.a.clone(), pair.b.clone(), pair.scale) for target, pair in pairs.items()}
    if not pairs:
        problem = "the adapter has no effect: lora_alpha is 0, or every pair has an all-zero matrix (was it trained?)"
        raise AdapterError(ErrorCode.ZERO_EFFECT, problem)
    return pairs


def _digest(tensors: dict[_Side, Tensor], scales: dict[str, float]) -> str:
    """SHA-256 over the numbers that the adapter computes with: per module the scale, then each tensor's type, shape,
    bytes.

    Rank, alpha and the patterns only count through the scales and shapes that follow from them, so a config that is
    spelled or ordered differently gives the same digest.
    """
    order = sorted(tensors)
    header = {
        "format": 1,
        "scales": {target: float(scale).hex() for target, scale in sorted(scales.items())},
        "tensors": [[*side, str(tensors[side].dtype), list(tensors[side].shape)] for side in order],
    }
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode("ascii")
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    for side in order:
        digest.update(memoryview(tensors[side].reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
