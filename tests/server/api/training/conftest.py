"""Servers with training: one for the tests of a file, which share no names and no files' ids."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.training.training_server import TrainingServer, make_training_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    """One server for all tests of a file."""
    directory: Path = tmp_path_factory.mktemp("server")
    with make_training_server(directory) as live:
        yield live
