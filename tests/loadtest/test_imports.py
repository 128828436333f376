"""Every name that a script below loadtest/ imports from guanaco exists, also where it is imported only on a GPU."""

import ast
import importlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

LOADTEST = Path(__file__).parents[2] / "loadtest"
SCRIPTS = sorted(LOADTEST.rglob("*.py"))


def imports_of(source: str) -> Iterator[tuple[int, str, str | None]]:
    """(line, module, name) of each import from guanaco; the name is None for `import guanaco.module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found: list[tuple[str, str | None]] = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        yield from ((node.lineno, module, name) for module, name in found if module.split(".")[0] == "guanaco")


def is_there(module: str, name: str | None) -> bool:
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "guanaco":
            return False
        pytest.skip(f"{error.name} is not installed")
    if name is None or hasattr(imported, name):
        return True
    return hasattr(imported, "__path__") and find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("script", SCRIPTS, ids=[str(path.relative_to(LOADTEST)) for path in SCRIPTS])
def test_all_that_a_script_imports_from_guanaco_exists(script: Path) -> None:
    found = list(imports_of(script.read_text()))
    assert [place for place in found if not is_there(*place[1:])] == []


def test_a_name_that_has_moved_is_found() -> None:
    source = "def f():\n    from guanaco.server.errors import CommandError, Moved\nimport guanaco.server.nowhere\n"
    missing = [name or module for _, module, name in imports_of(source) if not is_there(module, name)]
    assert sorted(missing) == ["Moved", "guanaco.server.nowhere"]
