"""Checks a job's files in a process of its own, whose niceness lets requests go first. Called by `runner`."""

import asyncio
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from guanaco.models.error_codes import ErrorCode
from guanaco.server.training.jobs.errors import RequestRefused, without_paths
from guanaco.server.training.jobs.process import TrainerCommand

_SECONDS = 600.0  # for both files
_MAX_MESSAGE = 2000


async def check_files(command: TrainerCommand, paths: Sequence[Path], folder: Path) -> int:
    """The number of rows of the first file. folder: the job's; its log.txt gets the process's messages.

    Raises RequestRefused, with lines and reasons, if a file can't be trained on; it is also raised if the check takes
    too long or fails. Raises OSError if the process can't be started.
    """
    with (folder / "log.txt").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command.checker,
            *map(str, paths),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            cwd=folder,
            env=command.environment(),
        )
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, process.pid, command.nice)
    try:
        output, _ = await asyncio.wait_for(process.communicate(), _SECONDS)
    except TimeoutError:
        text = f"the files could not be read within {_SECONDS:.0f} s: train on smaller ones"
        raise RequestRefused(ErrorCode.INVALID_TRAINING_FILE, text, "training_file") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
    try:
        answer = json.loads(output)
    except ValueError:
        text = f"the check of the files ended with code {process.returncode}; the server's log of this job has why"
        raise RequestRefused(ErrorCode.TRAINING_FAILED, text, "training_file") from None
    if "error" in answer:
        error = answer["error"]
        message = without_paths(str(error["message"]), map(str, paths))[:_MAX_MESSAGE]
        raise RequestRefused(ErrorCode.INVALID_TRAINING_FILE, message, error.get("param"))
    return int(answer["rows"])
