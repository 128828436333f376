"""Get what the browser tests need besides Python packages: a Chromium of the system, and axe-core.

`make browser` calls it; with --only-what-is-here it installs and fetches nothing. Exit code 0: all is there. 3: no browser is here and none can be installed, which is said.
Without axe-core (no network) the tests of accessibility skip.
"""

import base64
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

from support.browser.program import PROGRAMS, find_browser

ROOT = Path(__file__).resolve().parents[2]
AXE = ROOT / "build" / "browser" / "axe.min.js"
AXE_URL = "https://registry.npmjs.org/axe-core/-/axe-core-4.14.1.tgz"
AXE_INTEGRITY = "sha512-FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
NO_BROWSER = 3
APT_SECONDS = 240


def install_browser() -> str:
    """Empty where a browser is there now, else why not."""
    if find_browser() is not None:
        return ""
    if "--only-what-is-here" in sys.argv:
        return f"none of {', '.join(PROGRAMS)} is on the PATH (apt install chromium)"
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return f"none of {', '.join(PROGRAMS)} is on the PATH, and only root can install one (apt install chromium)"
    print("== installing Debian's chromium", flush=True)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": False, "timeout": APT_SECONDS}
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        subprocess.run(["apt-get", "update", "-q"], env=environment, **quiet)
        subprocess.run(
            ["apt-get", "install", "-y", "-q", "--no-install-recommends", "chromium"], env=environment, **quiet
        )
    except subprocess.TimeoutExpired:
        return f"apt-get took longer than {APT_SECONDS} s"
    return "" if find_browser() is not None else "apt-get could not install chromium"


def fetch_axe() -> None:
    """axe-core from npm, with its published digest. It is never part of the wheel."""
    if AXE.exists():
        return
    try:
        with urllib.request.urlopen(AXE_URL, timeout=60) as answer:
            data = answer.read()
    except OSError as error:
        print(f"== axe-core could not be fetched ({error}): the tests of accessibility will skip")
        return
    digest = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    if digest != AXE_INTEGRITY:
        raise SystemExit("axe-core from npm is not the file that is expected: its digest differs")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None
        AXE.parent.mkdir(parents=True, exist_ok=True)
        AXE.write_bytes(member.read())


def main() -> int:
    if problem := install_browser():
        print(f"BROWSER TESTS SKIPPED: {problem}")
        return NO_BROWSER
    if "--only-what-is-here" not in sys.argv:
        fetch_axe()
    return 0


if __name__ == "__main__":
    sys.exit(main())
