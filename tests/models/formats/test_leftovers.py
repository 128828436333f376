"""What a killed process left is removed by the next one; what somebody still fills, or never was ours, stays."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from guanaco.models.formats.leftovers import PartialFolder, remove_leftovers

PROGRAM = """
import sys, time
from pathlib import Path
from guanaco.models.formats.leftovers import PartialFolder
folder = PartialFolder(Path(sys.argv[1]))
(folder.path / "half").write_text("half")
print(folder.path, flush=True)
time.sleep(60)
"""


def make_old(path: Path) -> None:
    os.utime(path, (1.0, 1.0))


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "model"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(target)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        make_old(left)
        remove_leftovers(target)
        assert (left / "half").exists(), "its process still runs"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    remove_leftovers(target)
    assert not left.exists()


@pytest.mark.parametrize(
    "name", [".model.partial-notes", ".model-abcdefgh", ".other.partial-abcdefgh", "model.partial-abcdefgh"]
)
def test_what_was_never_ours_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    make_old(tmp_path / name)
    remove_leftovers(tmp_path / "model")
    assert (tmp_path / name).is_dir()


def test_a_new_folder_removes_the_leftovers_and_can_take_its_name(tmp_path: Path) -> None:
    left, fresh = tmp_path / ".model.partial-abcdefgh", tmp_path / ".model.partial-hgfedcba"
    for path in (left, fresh):
        path.mkdir()
    make_old(left)
    partial = PartialFolder(tmp_path / "model")
    assert not left.exists()
    assert fresh.exists(), "its process may be about to hold it"
    partial.path.rename(tmp_path / "model")
    partial.close()
    assert (tmp_path / "model").is_dir()
