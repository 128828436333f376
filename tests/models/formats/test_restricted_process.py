"""The restricted process's start: what goes wrong leaves nothing behind."""

import os
import subprocess

import pytest

from guanaco.models.formats.restricted_process import RestrictedProcess


def test_a_start_that_fails_leaves_no_file_descriptor_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is out of processes tries again and again; each try would cost it descriptors."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(OSError, match="no more processes"):
            RestrictedProcess("guanaco.models.text.template_worker")
    assert len(os.listdir("/proc/self/fd")) == len(before)
