"""A virtual environment that holds the runtime dependencies and nothing of the test tools.

Nothing is downloaded: it links to the distributions that are installed here, as far as guanaco's own metadata asks for
them, directly or through others.
"""

import sys
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def runtime_distributions(*, without: frozenset[str] = frozenset()) -> dict[str, Distribution]:
    """guanaco and what it needs at run time, by canonical name. without: names that are left out, and what only they
    need. A dependency that is not installed here is an AssertionError."""
    found: dict[str, Distribution] = {}
    waiting: list[tuple[str, frozenset[str]]] = [("guanaco", frozenset())]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if name in without or (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            raise AssertionError(f"{name} is a runtime dependency and is not installed here") from None
        for text in found[name].requires or ():
            need = Requirement(text)
            wanted = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            if need.marker is None or any(need.marker.evaluate(where) for where in wanted):
                waiting.append((canonicalize_name(need.name), frozenset(need.extras)))
    return found


def make_environment(directory: Path, distributions: dict[str, Distribution]) -> Path:
    """Write the environment into `directory`; the path of its Python."""
    venv.create(directory, symlinks=True, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    libraries = directory / "lib" / version / "site-packages"
    for found in distributions.values():
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (libraries / top).exists():
                (libraries / top).symlink_to(found.locate_file(top))
    return directory / "bin" / "python"
