"""What a developer's tools rely on: links that static tools follow, and recipes that name files which exist."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from mypy.modulefinder import FindModuleCache, SearchPaths
from mypy.options import Options

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RECIPES = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Recipes\n")[2]


def test_make_install_makes_the_links_and_the_tools_are_told() -> None:
    plan = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "install"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "ln -sfn ../../$p .typing/guanaco/$p" in plan.stdout
    tools = PROJECT["tool"]
    assert tools["mypy"]["mypy_path"] in tools["pyright"]["extraPaths"]
    assert "guanaco.server" in PROJECT["tool"]["setuptools"]["packages"]


def test_static_tools_find_every_package_through_the_links() -> None:
    """The way in which mypy looks a module up; it imports nothing."""
    subprocess.run(["make", "--no-print-directory", "links"], cwd=ROOT, check=True)
    options = Options()
    options.namespace_packages = True
    paths = SearchPaths(python_path=(), mypy_path=(str(ROOT / ".typing"),), package_path=(), typeshed_path=())
    finder = FindModuleCache(paths, None, options)
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        found = finder.find_module(package)
        assert isinstance(found, str), f"{package}: {found}"
        assert Path(found).resolve() == (ROOT / package.partition(".")[2].replace(".", "/") / "__init__.py")


@pytest.mark.parametrize("about", ["command", "endpoint", "setting", "metric", "op", "model"])
def test_a_recipe_names_files_that_exist(about: str) -> None:
    (recipe,) = re.findall(rf"^\*\*An? {about}\.\*\*(.*?)(?=^\*\*|\Z)", RECIPES, re.MULTILINE | re.DOTALL)
    named = [text for text in re.findall(r"`([\w./-]+)`", recipe) if "/" in text or text.endswith(".md")]
    assert len(named) >= 3
    for name in named:
        assert (ROOT / name).exists(), name


def test_what_recipes_call_exists() -> None:
    """Names of classes and functions in the recipes, each somewhere in the product or its tests."""
    names = set(re.findall(r"`(?:cls=)?([A-Za-z_]{4,})(?:\(ctx\))?`", RECIPES)) - {"description", "help", "model_type"}
    assert len(names) >= 8
    sources = "".join(
        path.read_text() for top in ("server", "models", "kernels", "tests") for path in (ROOT / top).rglob("*.py")
    )
    for name in names:
        assert re.search(rf"^\s*(class |def )?{name}\b[ (:=]", sources, re.MULTILINE), name
