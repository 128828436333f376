"""Converts adapters of 2023 (pickled or float32 weights, old configs, keys with `.default.`) to today's format.

Opens no pickle itself: a process that can do nothing else reads the weights. Knows no base model: `weights` checks
later whether the result fits one. Called by the command line; the server never converts.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.config import CONFIG_NAME, MAX_CONFIG_BYTES, parse_config
from guanaco.adapters.peft.files import AdapterFiles
from guanaco.adapters.peft.safetensors import AdapterTensors
from guanaco.adapters.peft.weights import WEIGHTS_NAME, AdapterLimits
from guanaco.models.error_codes import ErrorCode
from guanaco.models.formats.leftovers import PartialFolder
from guanaco.models.formats.restricted_process import ProcessEnded, ProcessTimeout, RestrictedProcess
from guanaco.models.formats.shown import printable
from guanaco.models.formats.strict_json import JsonError, parse_object

PICKLED_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")
DTYPES = {"keep": "keep", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_WORKER = "guanaco.adapters.convert.worker"
_MAX_ANSWER_BYTES = 1 << 16
_BYTES_PER_SECOND = 5e6  # a slower disk makes the conversion time out
_BASE_SECONDS = 120


@dataclass(frozen=True)
class ConvertReport:
    """The result of a conversion."""

    source: Path  # the weights file
    num_tensors: int
    num_renamed: int
    dtypes: dict[str, int]  # number of tensors by dtype, as written
    source_bytes: int
    target_bytes: int
    notes: tuple[str, ...]  # what was changed in the config, and which of its fields are ignored


def convert_adapter(
    source: Path, target: Path, *, name: str = "default", dtype: str = "keep", limits: AdapterLimits | None = None
) -> ConvertReport:
    """Write the adapter at `source` (or in its sub-folder `name`) to `target`, a folder that does not exist yet.

    dtype: a key of DTYPES; "keep" turns only float64 into float32. Raises AdapterError if the adapter can't be
    converted; `target` then does not exist.
    """
    if dtype not in DTYPES:
        raise AdapterError(ErrorCode.BAD_OPTION, f"--dtype must be one of {', '.join(DTYPES)}", "dtype")
    limits = limits or AdapterLimits()
    files = AdapterFiles.find(source, name, CONFIG_NAME)
    config, notes = modern_config(files.read(CONFIG_NAME, MAX_CONFIG_BYTES))
    weights = next((n for n in (WEIGHTS_NAME, *PICKLED_NAMES) if files.exists(n)), None)
    if weights is None:
        problem = (
            f"{files.directory} has neither {WEIGHTS_NAME} nor {PICKLED_NAMES[0]}; was the adapter saved completely?"
        )
        raise AdapterError(ErrorCode.WEIGHTS_MISSING, problem, WEIGHTS_NAME)
    if os.path.lexists(target):
        raise AdapterError(ErrorCode.TARGET_EXISTS, f"{target} exists already; name a new folder", "target")
    try:
        partial = PartialFolder(target)
        incoming = partial.path
        try:
            (incoming / CONFIG_NAME).write_bytes(config)
            answer, source_bytes = _run_worker(files, weights, incoming / WEIGHTS_NAME, DTYPES[dtype], limits)
            _check_result(incoming, limits)
            incoming.chmod(0o755)
            incoming.rename(target)
        finally:
            partial.close()
    except OSError as error:
        raise AdapterError(
            ErrorCode.TARGET_UNWRITABLE, f"{target} cannot be written: {error.strerror}", "target"
        ) from None
    return ConvertReport(
        source=files.directory / weights,
        num_tensors=answer["num_tensors"],
        num_renamed=answer["num_renamed"],
        dtypes=answer["dtypes"],
        source_bytes=source_bytes,
        target_bytes=(target / WEIGHTS_NAME).stat().st_size,
        notes=(*notes, *parse_config(config).notes),
    )


def modern_config(data: bytes) -> tuple[bytes, tuple[str, ...]]:
    """(adapter_config.json as PEFT writes it today, notes on the changes). AdapterError if the old one can't be
    updated.

    PEFT before 0.4 wrote `enable_lora` and `merge_weights`, which newer PEFT dropped; hand-made files lack `peft_type`.
    """
    try:
        fields = parse_object(data)
    except JsonError as error:
        raise AdapterError(ErrorCode.BAD_CONFIG, f"{CONFIG_NAME} {error}", CONFIG_NAME) from None
    notes = []
    if fields.get("enable_lora"):
        problem = "enable_lora is set: it adapts parts of a fused layer, which the base model does not have"
        raise AdapterError(ErrorCode.ENABLE_LORA_UNSUPPORTED, problem, "enable_lora")
    for field in ("enable_lora", "merge_weights"):
        if field in fields:
            del fields[field]
            notes.append(f"{field} was removed: it no longer means anything")
    if fields.get("fan_in_fan_out") is True:
        fields["fan_in_fan_out"] = False  # peft/tuners/lora.py warned and did the same for every torch.nn.Linear
        notes.append("fan_in_fan_out was set to false: no layer of the base is transposed, and PEFT had ignored it")
    if fields.get("peft_type") is None and {"r", "lora_alpha", "target_modules"} <= fields.keys():
        fields["peft_type"] = "LORA"
        notes.append("peft_type was set to LORA, which is what the other fields describe")
    modern = json.dumps(fields, indent=2).encode()
    parse_config(modern)
    return modern, tuple(notes)


def _run_worker(
    files: AdapterFiles, weights: str, target: Path, dtype: str, limits: AdapterLimits
) -> tuple[dict[str, Any], int]:
    """Convert one file in a separate process. Returns (the process's answer, the size of the source)."""
    with files.open(weights) as source, target.open("xb") as output:
        size = os.fstat(source.fileno()).st_size
        # A float32 file halves at best, so a result within the limit needs a source of at most twice the limit.
        if size > 2 * limits.max_file_bytes:
            raise AdapterError(
                ErrorCode.FILE_TOO_LARGE, f"{weights} has {size} bytes, more than twice the limit", weights
            )
        request = {
            "source": source.fileno(),
            "target": output.fileno(),
            "is_pickle": weights != WEIGHTS_NAME,
            "dtype": dtype,
            "max_bytes": limits.max_file_bytes,
        }
        handles = (source.fileno(), output.fileno())
        seconds = _BASE_SECONDS + size / _BYTES_PER_SECOND
        try:
            with RestrictedProcess(_WORKER, pass_fds=handles) as process:
                data = process.exchange(json.dumps(request).encode(), seconds=seconds, max_bytes=_MAX_ANSWER_BYTES)
        except ProcessTimeout:
            raise AdapterError(
                ErrorCode.CONVERSION_FAILED, f"converting {weights} took too long and was stopped"
            ) from None
        except ProcessEnded as error:
            problem = f"the process that reads {weights} ended ({error}): the file is damaged, or needs too much memory"
            if error.was_killed:  # by the kernel, say, which was out of memory: that says nothing about the file
                problem = f"the process that reads {weights} was killed from outside ({error}); try again"
            raise AdapterError(ErrorCode.CONVERSION_FAILED, problem, weights) from None
        os.fsync(output.fileno())
    return _answer(data, weights), size


def _answer(data: bytes, weights: str) -> dict[str, Any]:
    """The answer of the process, checked: it is trusted as little as the file that the process read."""
    try:
        answer = parse_object(data)
    except JsonError:
        raise AdapterError(
            ErrorCode.CONVERSION_FAILED, f"the process that reads {weights} gave no answer", weights
        ) from None
    if "code" in answer:
        field = answer.get("field")
        message = printable_message(f"{weights}: {answer.get('message')}")
        raise AdapterError(_code(answer["code"]), message, None if field is None else printable(str(field)))
    return answer


def _code(word: Any) -> ErrorCode:
    try:
        return ErrorCode(word)
    except ValueError:  # the process may answer anything
        return ErrorCode.CONVERSION_FAILED


def printable_message(text: str) -> str:
    """A message from another process, as one line of at most 600 characters."""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:600])


def _check_result(directory: Path, limits: AdapterLimits) -> None:
    """Read the header of the result with the server's own reader, so that a conversion never ends with a file that the
    server refuses."""
    with AdapterFiles(directory, Path(os.path.realpath(directory))).open(WEIGHTS_NAME) as file:
        AdapterTensors(file, WEIGHTS_NAME, limits.max_file_bytes)
    for path in (directory / CONFIG_NAME, directory):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
