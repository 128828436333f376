"""From settings to what trains: who may, where it lies, what the trainer is given, and what stops a start."""

from pathlib import Path

import pytest

from guanaco.server.bootstrap.before_loading import check_before_loading
from guanaco.server.bootstrap.training import trainer_command, training_service
from guanaco.server.config import load_settings
from guanaco.server.errors import CommandError

FINGERPRINT = "f" * 64


def test_there_is_none_without_an_admin_key(tmp_path: Path) -> None:
    assert training_service(load_settings({"cache": str(tmp_path)}), FINGERPRINT, 2, 10**8) is None
    with pytest.raises(CommandError, match="--admin-key"):
        check_before_loading(load_settings({"train_key": ("0123abcd",)}))


def test_each_base_has_a_directory_that_one_server_uses(tmp_path: Path) -> None:
    settings = load_settings({"cache": str(tmp_path), "admin_key": "k", "max_train_files_per_key": 7})
    service = training_service(settings, FINGERPRINT, 2, 10**8)
    assert service is not None
    assert service.directory == tmp_path / "training" / "ffffffffffffffff"
    assert service.limits.max_files_per_key == 7
    with pytest.raises(CommandError, match="another server uses it"):
        training_service(settings, FINGERPRINT, 2, 10**8)
    other = load_settings({"admin_key": "k", "train_dir": str(tmp_path / "elsewhere")})
    found = training_service(other, FINGERPRINT, 2, 10**8)
    assert found is not None
    assert found.directory.parent == tmp_path / "elsewhere"
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match="--train-dir"):
        training_service(load_settings({"admin_key": "k", "train_dir": str(tmp_path / "file")}), FINGERPRINT, 2, 1)


def test_what_the_trainer_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("GUANACO_HUB_TOKEN", "HF_TOKEN", "SOME_SECRET"):
        monkeypatch.setenv(name, "canary")
    (tmp_path / "model").mkdir()
    settings = load_settings({"model": "./model", "cache": str(tmp_path / "c"), "admin_key": "canary", "train_nice": 7})
    command = trainer_command(settings, 6, 10**8)
    assert (command.model, command.threads, command.nice) == (str(tmp_path / "model"), 3, 7)
    environment = command.environment()
    assert environment["GUANACO_CACHE"] == str(tmp_path / "c")
    assert environment["GUANACO_OFFLINE"] == "1"
    assert "canary" not in str(environment)
    assert trainer_command(load_settings({"train_threads": 5}), 6, 10**8).threads == 5
    assert trainer_command(load_settings({}), 1, 10**8).threads == 1
    assert trainer_command(load_settings({"model": "org/name"}), 1, 10**8).model == "org/name"
    # A multiplier of 1 stands for the rate that the trainer takes by itself.
    assert command.learning_rate > trainer_command(settings, 6, 7 * 10**9).learning_rate
