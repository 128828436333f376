"""Whether a `tokenizer.json` can be read and used within bounds: tried in a restricted process before it is loaded.

A tokenizer's patterns are the model's, and the library runs them on this process's threads, where nothing can stop
them. So a pattern that backtracks without end, and a file that takes all memory, are found here. Called by the wiring.
"""

import hashlib
import json
from pathlib import Path

from guanaco.models.errors import ModelError
from guanaco.models.formats.restricted_process import ProcessEnded, ProcessTimeout, RestrictedProcess
from guanaco.models.formats.small_files import MAX_TOKENIZER_BYTES, read_small

SECONDS = 120.0  # a machine that is busy takes ten times what one takes that is not
PROBE_SECONDS = 1.0  # of processor time, for a text of 4000 characters; a good tokenizer takes some milliseconds
_WORKER = "guanaco.models.text.tokenizer_worker"
_MAX_ANSWER_BYTES = 1 << 16
_passed: set[str] = set()


def check_tokenizer(path: Path, *, seconds: float = SECONDS, probe_seconds: float = PROBE_SECONDS) -> None:
    """Try the tokenizer.json of the directory `path`, if it has one. A content that has passed isn't tried again.

    seconds: for everything. probe_seconds: of processor time, for one text. Raises ModelError for a tokenizer that is
    damaged, or takes too much time or memory.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        return
    try:
        data = read_small(file, MAX_TOKENIZER_BYTES)
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}); download it again") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest in _passed:
        return
    try:
        with RestrictedProcess(_WORKER, (str(probe_seconds),)) as process:
            answer = process.exchange(data, seconds=seconds, max_bytes=_MAX_ANSWER_BYTES)
    except ProcessTimeout:
        raise _refused(file, f"trying it took more than {seconds:g} s") from None
    except ProcessEnded as error:
        if error.was_killed:  # by the kernel, say, which was out of memory: that says nothing about the file
            raise ModelError(f"the process that tries {file} was killed from outside ({error}); try again") from None
        raise _refused(file, f"the process that tried it ended ({error}): it takes too much memory or time") from None
    except OSError as error:
        raise ModelError(f"no process to try {file} in could be started: {error.strerror}") from error
    if (problem := json.loads(answer)["problem"]) is not None:
        raise _refused(file, problem)
    _passed.add(digest)


def _refused(file: Path, problem: str) -> ModelError:
    return ModelError(f"{file} cannot be used as a tokenizer: {problem}; download it again, or get it elsewhere")
