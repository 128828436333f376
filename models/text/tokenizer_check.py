"""Checks that a `tokenizer.json` takes little time and memory: it is tried in a restricted process before it is loaded.

A model brings its own patterns, and the library runs them on this process's threads, where nothing can stop them. This
check finds patterns that backtrack without end, and files that take all memory. Called before a model is loaded.
"""

import contextlib
import hashlib
import json
import threading
from pathlib import Path

from guanaco.models.errors import ModelError
from guanaco.models.formats.restricted_process import ProcessEnded, ProcessTimeout, RestrictedProcess
from guanaco.models.formats.small_files import MAX_TOKENIZER_BYTES, read_small

SECONDS = 120.0  # for the whole check; a busy machine takes ten times as long as an idle one
PROBE_SECONDS = 1.0  # of processor time for a text of 4000 characters; a good tokenizer takes a few milliseconds
_WORKER = "guanaco.models.text.tokenizer_worker"
_MAX_ANSWER_BYTES = 1 << 16
_passed: set[str] = set()
_under_way: dict[str, threading.Lock] = {}  # digest → held while a process tries this content


def begin_check(path: Path) -> None:
    """Begin the check of a directory on another thread. `check_tokenizer` then waits for its end, and says what is
    wrong."""

    def check() -> None:
        with contextlib.suppress(Exception):  # `check_tokenizer` repeats a check that failed, and raises its error
            check_tokenizer(path)

    # A daemon: it may wait for two minutes, and the kernel ends its process when this one ends.
    threading.Thread(target=check, name="guanaco-tokenizer-check", daemon=True).start()


def check_tokenizer(path: Path, *, seconds: float = SECONDS, probe_seconds: float = PROBE_SECONDS) -> None:
    """Check the tokenizer.json of the directory `path`, if it has one. The same content is checked only once.

    seconds: limit of the whole check. probe_seconds: limit of processor time for one text. Raises ModelError for a
    tokenizer that is damaged or takes too much time or memory.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        return
    try:
        data = read_small(file, MAX_TOKENIZER_BYTES)
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}); download it again") from error
    digest = hashlib.sha256(data).hexdigest()
    with _under_way.setdefault(digest, threading.Lock()):
        if digest not in _passed:
            _try_out(file, data, seconds, probe_seconds)
            _passed.add(digest)


def _try_out(file: Path, data: bytes, seconds: float, probe_seconds: float) -> None:
    """Try the content `data` of `file` in a process of its own. Raises ModelError as `check_tokenizer` does."""
    try:
        with RestrictedProcess(_WORKER, (str(probe_seconds),)) as process:
            answer = process.exchange(data, seconds=seconds, max_bytes=_MAX_ANSWER_BYTES)
    except ProcessTimeout:
        raise _refused(file, f"trying it took more than {seconds:g} s") from None
    except ProcessEnded as error:
        if error.was_killed:  # perhaps by the kernel, which was out of memory: the file may be good
            raise ModelError(f"the process that tries {file} was killed from outside ({error}); try again") from None
        raise _refused(file, f"the process that tried it ended ({error}): it takes too much memory or time") from None
    except OSError as error:
        raise ModelError(f"no process to try {file} in could be started: {error.strerror}") from error
    if (problem := json.loads(answer)["problem"]) is not None:
        raise _refused(file, problem)


def _refused(file: Path, problem: str) -> ModelError:
    return ModelError(f"{file} cannot be used as a tokenizer: {problem}; download it again, or get it elsewhere")
