"""An environment of its own for each client: a virtual environment for Python, a folder with node_modules for node."""

import json
import shutil
import site
import subprocess
import sys
from pathlib import Path

from catalogue import Client

INSTALL_SECONDS = 1200


class NotInstalled(Exception):
    """A client's packages can't be installed here; the message says why."""


def prepare(client: Client, folder: Path) -> list[str]:
    """Install the client's packages into `folder` unless they are there; the command that runs its script.

    NotInstalled: the packages can't be had, or node isn't here.
    """
    if client.language == "node":
        for program in ("node", "npm"):
            if shutil.which(program) is None:
                raise NotInstalled(f"{program} is not on the PATH")
        if not _is_current(client, folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "package.json").write_text(json.dumps({"private": True, "type": "module"}))
            _run(["npm", "install", "--no-audit", "--no-fund", "--save-exact", *client.packages], folder)
            _mark(client, folder)
        # A module's imports are looked up from its own place.
        for source in client.path.parent.glob("*.mjs"):
            shutil.copy(source, folder / source.name)
        return ["node", str(folder / client.script), *client.arguments]
    python = folder / "bin" / "python"
    if not _is_current(client, folder):
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)])
        if client.shares_repository_packages:
            _share_repository_packages(python)
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *client.packages])
        _mark(client, folder)
    return [str(python), str(client.path), *client.arguments]


def versions(client: Client, folder: Path) -> dict[str, str]:
    """The installed versions of the packages that the table shows."""
    if client.language == "node":
        manifests = {name: folder / "node_modules" / name / "package.json" for name in client.shown}
        return {name: json.loads(path.read_text())["version"] for name, path in manifests.items()}
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]), sep='\\n')"
    found = _run([str(folder / "bin" / "python"), "-c", code, *client.shown])
    return dict(zip(client.shown, found.split(), strict=True))


def _share_repository_packages(python: Path) -> None:
    own = _run([str(python), "-c", "import site; print(site.getsitepackages()[0])"]).strip()
    lines = [f"import site; site.addsitedir({folder!r})" for folder in site.getsitepackages()]
    (Path(own) / "zz_repository.pth").write_text("\n".join(lines) + "\n")


def _is_current(client: Client, folder: Path) -> bool:
    mark = folder / ".installed"
    return mark.exists() and mark.read_text().splitlines() == list(client.packages)


def _mark(client: Client, folder: Path) -> None:
    (folder / ".installed").write_text("\n".join(client.packages) + "\n")


def _run(command: list[str], folder: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"`{' '.join(command)}` took longer than {INSTALL_SECONDS} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise NotInstalled(lines[-1] if lines else f"`{' '.join(command)}` ended with {done.returncode}")
    return done.stdout
