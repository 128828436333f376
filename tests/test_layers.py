"""The tree is the diagram: who may import whom, how long a file may be, and what no file may do."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "models", "adapters", "server")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if "demo" not in p.parent.name)

# layer → what of ours it may import (prefixes of guanaco.*). The most specific entry of a file counts.
ALLOWED = {
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "adapters": {"adapters", "kernels"},
    # A process that reads strangers' files is the same for adapters and models.
    "adapters/convert.py": {"adapters", "kernels", "models.restricted_process"},
    "adapters/convert_worker.py": {"adapters", "kernels", "models.restricted_process"},
    "server/engine": {"server.engine", "kernels", "models", "adapters", "server.config"},
    "server/api": {"server.api", "server.engine", "server.metrics", "server.adapter_metrics", "server.config"},
    "server/metrics.py": {"server.engine.request", "server.adapter_metrics", "server.hot_metrics"},
    "server/adapter_metrics.py": set(),
    "server/hot_metrics.py": set(),
    "server/config.py": {"server.service_links"},
    "server/service_links.py": set(),
    "server/machine.py": set(),
    "server": {"server", "kernels", "models", "adapters"},
}
# layer → outside packages that it must not import
BANNED = {
    "kernels": {"transformers", "fastapi", "tokenizers", "pydantic"},
    "models": {"transformers", "fastapi", "pydantic", "peft", "bitsandbytes"},
    "adapters": {"transformers", "fastapi", "pydantic", "peft"},
    "adapters/slot_table.py": {"torch", "transformers", "fastapi", "pydantic", "peft"},
    "server/engine": {"fastapi", "pydantic", "prometheus_client", "torch", "transformers"},
    "server/engine/cuda_graphs.py": {"fastapi", "pydantic", "prometheus_client", "transformers"},
    "server/engine/model_runner.py": {"fastapi", "pydantic", "prometheus_client", "transformers"},
    "server/engine/sampler.py": {"fastapi", "pydantic", "prometheus_client", "transformers"},
    "server/api": {"torch", "transformers", "safetensors"},
    "server/metrics.py": {"torch"},
    "server/adapter_metrics.py": {"torch"},
    "server/hot_metrics.py": {"torch"},
    "server/config.py": {"torch"},
    "server": {"transformers", "peft", "bitsandbytes"},
}


def _rule(path: Path, rules: dict[str, set[str]]) -> set[str]:
    name = path.relative_to(ROOT).as_posix()
    keys = [key for key in rules if name == key or name.startswith(key + "/")]
    return rules[max(keys, key=len)]


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_imports_point_down(path: Path) -> None:
    allowed, banned = _rule(path, ALLOWED), _rule(path, BANNED)
    for name in _imports(path):
        top = name.split(".")[0]
        assert top not in PACKAGES, f"{name}: import our packages as guanaco.{name}"
        assert top not in banned, f"{name} is not for this layer"
        if top == "guanaco":
            ours = name.removeprefix("guanaco.")
            assert any(ours == a or ours.startswith(a + ".") for a in allowed), f"{name} is not below this layer"


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_only_config_reads_the_environment_and_types_live_below(path: Path) -> None:
    source = path.read_text()
    assert "TYPE_CHECKING" not in source
    if _id(path) != "server/config.py":
        for node in ast.walk(ast.parse(source)):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            assert name not in ("environ", "getenv"), f"line {node.lineno}: settings come from server/config.py"


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_files_and_functions_stay_readable(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 70, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_every_module_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree), "no module docstring"


def test_the_rules_catch_what_they_should(tmp_path: Path) -> None:
    """The checks above can fail: a file that breaks each rule is found."""
    bad = tmp_path / "bad.py"
    bad.write_text("from guanaco.server.engine import engine\nimport torch\n")
    assert "guanaco.server.engine.engine" in set(_imports(bad))
    assert _rule(ROOT / "server/engine/scheduler.py", BANNED) >= {"torch"}
    assert "torch" not in _rule(ROOT / "server/engine/sampler.py", BANNED)
    assert "server.engine" not in _rule(ROOT / "models/llama.py", ALLOWED)
