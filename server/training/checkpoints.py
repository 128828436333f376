"""The folders of checkpoints in a trainer's work folder: their names, and the file that marks a complete one.

Needs no library of the `train` extra: the trainer writes these folders, and the server's jobs list them.
"""

from pathlib import Path

PREFIX = "checkpoint-"  # then the number of the step, as transformers names them
COMPLETE = "complete"  # the file that is written last into a checkpoint


def checkpoints(work: Path) -> dict[int, Path]:
    """Step → folder of all checkpoints in a work folder, incomplete ones too. Empty if there is no folder."""
    try:
        paths = list(work.iterdir())
    except OSError:
        return {}
    numbers = {path: path.name.removeprefix(PREFIX) for path in paths if path.name.startswith(PREFIX)}
    return {int(number): path for path, number in numbers.items() if number.isascii() and number.isdecimal()}


def is_complete(checkpoint: Path) -> bool:
    """Whether all files of the checkpoint have been written."""
    return (checkpoint / COMPLETE).is_file()
