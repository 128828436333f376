"""The distribution: what is in the wheel, what it needs at run time, and that the bare folder names never become
importable."""

import ast
import json
import subprocess
import sys
import time
import tomllib
import urllib.request
import zipfile
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from guanaco.models.architectures.config_json import read_config
from guanaco.models.architectures.registry import projection_shapes
from support.adapters.tiny_adapters import make_adapter
from support.models.tiny_models import make_tiny_llama
from support.packaging.runtime_environment import make_environment, runtime_distributions

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


def test_the_wheel_holds_the_page_as_it_is_in_the_tree(wheel: Path) -> None:
    page = ROOT / "server" / "page"
    tree = {f"guanaco/{path.relative_to(ROOT).as_posix()}": path.read_bytes() for path in page.rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc")}  # fmt: skip
    opened = zipfile.ZipFile(wheel)
    found = {
        name: opened.read(name)
        for name in opened.namelist()
        if name.startswith("guanaco/server/page/") and not name.endswith(".py")
    }
    assert found == tree
    static = [content for name, content in found.items() if "/static/" in name]
    assert len(static) > 40
    assert sum(map(len, static)) < 250_000


def _report(python: Path, cwd: Path, commands: list[list[str]], *, missing: str = "-") -> dict[str, Any]:
    """What tests/support/packaging/every_command.py found in an environment."""
    done = subprocess.run(
        [python, ROOT / "tests/support/packaging/every_command.py", missing], cwd=cwd, env=_environment(cwd),
        input=json.dumps(commands), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report["failed"] == []
    assert {"", "serve", "chat", "adapters load", "aliases set", "models prune"} <= set(report["commands"])
    return report


def _environment(home: Path) -> dict[str, str]:
    """No variable of the tests' own: PYTHONPATH or GUANACO_* would reach the program."""
    return {"PATH": "/usr/bin:/bin", "HOME": str(home), "COLUMNS": "120", "LANG": "C.UTF-8"}


def test_every_command_and_module_works_with_the_runtime_dependencies_alone(tmp_path: Path) -> None:
    distributions = runtime_distributions()
    assert not {"httpx", "pytest", "transformers", "peft", "locust"} & distributions.keys()
    python = make_environment(tmp_path / "venv", distributions)
    nobody = ["--url", "http://127.0.0.1:9", "--admin-key", "k"]
    commands = [["adapters", "list", *nobody], ["aliases", "list", *nobody], ["chat", "--url", "http://127.0.0.1:9"]]
    report = _report(python, tmp_path, commands)
    assert len(report["modules"]) > 100
    for done in report["runs"]:
        assert (done["code"], done["crash"], done["output"].count("\n")) == (2, "", 1), done


def test_every_import_is_a_runtime_dependency() -> None:
    """The imports inside functions too: no command reaches them by its --help."""
    runtime, owners = runtime_distributions(), packages_distributions()
    # Tools that a developer names by a flag: the modules say what to install where they are missing.
    on_request = {("server/commands/bench/kernels_gpu.py", "bitsandbytes")}
    training = {
        "accelerate",
        "bitsandbytes",
        "matplotlib",
        "peft",
        "transformers",
    }  # of the extra, in a training's process
    for top in ("adapters", "kernels", "models", "server"):
        for path in (p for p in (ROOT / top).rglob("*.py") if (p.parent / "__init__.py").exists()):
            for name in _imported(path) - set(sys.stdlib_module_names) - {"guanaco"}:
                owning = {canonicalize_name(owner) for owner in owners.get(name, ())}
                asked = (path.relative_to(ROOT).as_posix(), name) in on_request
                asked |= name in training and path.is_relative_to(ROOT / "server/training")
                assert owning & runtime.keys() or asked, f"{path} imports {name}, which is no runtime dependency"


def _imported(path: Path) -> set[str]:
    """The top-level names of a module's imports, and of its `import_module("…")`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return {name.partition(".")[0] for name in names}


def test_the_images_install_the_runtime_dependencies() -> None:
    """The list in pyproject.toml, and nothing beside it; the CPU image leaves out Triton alone."""
    needs = PROJECT["project"]["dependencies"]
    for name, left_out in (("Dockerfile", set()), ("Dockerfile.cpu", {"triton"})):
        text = (ROOT / "docker" / name).read_text()
        code = text.split('RUN python -c "', 1)[1].split('" > /tmp/requirements.txt', 1)[0].replace("\\\n", "")
        listed = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert {Requirement(n).name for n in needs} - {Requirement(n).name for n in listed} == left_out
        assert set(listed) <= set(needs)
        assert "--requirement /tmp/requirements.txt" in text
        assert "[test]" not in text


def test_every_command_of_the_cpu_image_runs(tmp_path: Path) -> None:
    """Without Triton: a server on the tiny model, and every command that needs no GPU, beside it or against it."""
    python = make_environment(tmp_path / "venv", runtime_distributions(without=frozenset({"triton"})))
    model = str(make_tiny_llama(tmp_path / "tiny", kind="gqa"))
    shapes = projection_shapes(read_config(Path(model)))
    targets = {f"layers.{i}.{name}": (k, n) for i in range(2) for name, (n, k) in shapes.items()}
    make_adapter(tmp_path / "adapter", targets, 4, 8)
    demo = str(ROOT / "adapters/demo/pirate")
    settings = ["--model", model, "--threads", "1", "--kv-cache-memory", "4MiB", "--cache", str(tmp_path / "cache")]
    serve = [*settings, "--port", "0", "--admin-key", "k", "--adapter-root", str(tmp_path)]
    log = tmp_path / "serve.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [python, "-c", "from guanaco.server.commands.main import main; main()", "serve", *serve],
            cwd=tmp_path, env=_environment(tmp_path), stdout=out, stderr=out,
        )  # fmt: skip
    try:
        url = _url_in(log, server)
        to_server = ["--url", url, "--admin-key", "k"]
        commands = [
            ["generate", "hi", *settings, "--max-tokens", "2"],
            ["bench", *settings, "--prompt", "4", "--batches", "1", "--json"],
            ["quantize", model, str(tmp_path / "nf4")],
            ["doctor", *settings, "--offline"],
            ["serve", *settings, "--print-config"],
            ["models", "list", "--cache", str(tmp_path / "cache")],
            ["models", "prune", "--yes", "--cache", str(tmp_path / "empty")],
            ["version"],
            ["adapters", "inspect", demo],
            ["adapters", "convert", demo, str(tmp_path / "converted")],
            ["adapters", "list", *to_server],
            ["adapters", "load", "pirate", "adapter", *to_server],
            ["aliases", "set", "prod", "pirate", *to_server],
            ["aliases", "list", *to_server],
            ["chat", "--url", f"{url}/v1"],
            ["bench", "kernels"],
        ]
        *ran, refused = _report(python, tmp_path, commands, missing="triton")["runs"]
    finally:
        server.terminate()
        assert server.wait(timeout=60) == 0, log.read_text()
    for done in ran:
        assert (done["code"], done["crash"]) == (0, ""), done
    assert (refused["code"], "Triton, which is not installed" in refused["output"]) == (2, True), refused


def _url_in(log: Path, server: "subprocess.Popen[bytes]") -> str:
    """The server's address, once its banner names it and it answers."""
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        for line in log.read_text().splitlines():
            if line.startswith("health"):
                url = line.split()[-1].removesuffix("/health")
                urllib.request.urlopen(f"{url}/health/ready", timeout=30).close()
                return url
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def test_the_wheel_installs_into_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """The wheel with its runtime dependencies: every command's help, every module, and the program by its own name."""
    distributions = runtime_distributions()
    del distributions["guanaco"]
    python = make_environment(tmp_path / "venv", distributions)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", str(wheel)],
        check=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    _report(python, tmp_path, [])
    done = subprocess.run(
        [tmp_path / "venv/bin/guanaco", "--version"], env=_environment(tmp_path), cwd=tmp_path,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"guanaco {PROJECT['project']['version']}\n"), done.stderr
    where = subprocess.run(
        [python, "-c", "import guanaco.server.commands.main as m; print(m.__file__)"],
        env=_environment(tmp_path), cwd=tmp_path,
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    assert str(tmp_path / "venv") in where
