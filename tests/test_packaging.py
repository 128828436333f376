"""The distribution: what is in the wheel, and that the bare folder names never become importable."""

import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _packages_of_the_tree() -> set[str]:
    folders = {
        p.parent for top in ("adapters", "kernels", "models", "server") for p in (ROOT / top).rglob("__init__.py")
    }
    return {"guanaco." + ".".join(f.relative_to(ROOT).parts) for f in folders}


def test_the_package_list_is_the_tree() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == _packages_of_the_tree()


@pytest.mark.parametrize("name", ["kernels", "models", "adapters", "server"])
def test_bare_names_do_not_resolve_into_the_repository(name: str) -> None:
    spec = find_spec(name)
    assert spec is None or not str(spec.origin).startswith(str(ROOT))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tracked tree, as a release would be."""
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    source.mkdir()
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in names:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        cwd=out, check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_and_the_demo_adapters(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (p for top in ("adapters", "kernels", "models", "server") for p in (ROOT / top).rglob("*.py")):
        relative = path.relative_to(ROOT)
        if (path.parent / "__init__.py").exists():
            assert f"guanaco/{relative.as_posix()}" in names
    for path in (ROOT / "adapters/demo").glob("*/adapter_*"):
        assert f"guanaco/{path.relative_to(ROOT).as_posix()}" in names
    assert not {n for n in names if n.startswith(("kernels/", "models/", "server/", "adapters/", "tests/"))}
    assert "guanaco/__init__.py" not in names


def test_the_wheel_installs_into_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """`guanaco --help` and `guanaco version` from the wheel alone; dependencies are borrowed, our code is not."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, cwd=tmp_path, timeout=120)
    python = tmp_path / "venv/bin/python"
    subprocess.run(
        [python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", str(wheel)],
        check=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    # A .pth file's import lines are not run for directories on PYTHONPATH, so the editable install does not leak in.
    libraries = next(p for p in sys.path if p.endswith("site-packages"))
    environment = {"PYTHONPATH": libraries, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    for arguments in (["--help"], ["version"], ["serve", "--help"]):
        done = subprocess.run(
            [tmp_path / "venv/bin/guanaco", *arguments], env=environment, cwd=tmp_path,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    where = subprocess.run(
        [python, "-c", "import guanaco.server.cli as m; print(m.__file__)"], env=environment, cwd=tmp_path,
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    assert str(tmp_path / "venv") in where
