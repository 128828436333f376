"""What the base is called, and what is refused before a model is loaded."""

from pathlib import Path

import pytest

from guanaco.server.bootstrap.before_loading import base_name, check_before_loading
from guanaco.server.config import Settings
from guanaco.server.errors import CommandError
from support.adapters.tiny_adapters import make_adapter

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (f"hub/models--org--tiny/snapshots/{COMMIT}", "org/tiny"),
        (f"hub/models--org--tiny/snapshots/{COMMIT}/", "org/tiny"),
        (f"hub/models--org--tiny/snapshots/x/../{COMMIT}", "org/tiny"),
        ("hub/models--gpt--a--b/snapshots/main", "gpt/a--b"),
        ("hub/models--alone/snapshots/main", "alone"),
        ("snapshots/mine", "mine"),
        ("hub/models--org--tiny/other/mine", "mine"),
    ],
)
def test_a_snapshot_of_a_hub_cache_is_called_as_its_repository(path: str, name: str, tmp_path: Path) -> None:
    for part in (path, path.replace("x/../", ""), path.partition("/..")[0]):
        (tmp_path / part).mkdir(parents=True, exist_ok=True)
    assert base_name(Settings(model=f"{tmp_path}/{path}")) == name
    assert base_name(Settings(model=f"{tmp_path}/{path}", served_model_name="x")) == "x"


def test_a_link_and_a_file_keep_their_own_names(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--tiny" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "tiny.Q4.gguf").touch()
    (tmp_path / "mine").symlink_to(folder)
    assert base_name(Settings(model=str(tmp_path / "mine"))) == "mine"
    assert base_name(Settings(model=str(folder / "tiny.Q4.gguf"))) == "tiny.Q4.gguf"
    assert base_name(Settings(model=f"{tmp_path}/mine/..")) == tmp_path.name


def test_an_adapter_that_is_a_git_lfs_pointer_is_refused_before_loading(tmp_path: Path) -> None:
    path = make_adapter(tmp_path / "a", {"layers.0.self_attn.q_proj": (8, 8)}, 2, modules=["q_proj"])
    (path / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CommandError, match=r"--adapter x: adapter_model.safetensors is a Git LFS pointer"):
        check_before_loading(Settings(adapter=(f"x={path}",)))
