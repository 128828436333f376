"""Which folders count as checkpoints."""

from pathlib import Path

from guanaco.server.training.checkpoints import COMPLETE, checkpoints
from guanaco.server.training.jobs.progress import checkpoint_steps


def test_only_complete_checkpoints_are_listed(tmp_path: Path) -> None:
    for name in ("checkpoint-4", "checkpoint-12", "checkpoint-20", "checkpoint-x", "checkpoint-²", "other-3"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-4", "checkpoint-12", "checkpoint-x"):
        (tmp_path / name / COMPLETE).touch()
    assert checkpoint_steps(tmp_path) == (4, 12)
    assert sorted(checkpoints(tmp_path)) == [4, 12, 20]


def test_no_folder_has_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoint_steps(tmp_path / "missing") == ()
