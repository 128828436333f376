"""The page's files: small, all of them reachable, and the vendored ones exactly those of the npm packages."""

import base64
import hashlib
import io
import json
import re
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from guanaco.server.page.files import PREFIX, START, STATIC, VENDORED, read_page

MAX_BYTES = 250_000  # of all files together, uncompressed
MAX_FILES, MAX_LINES = 16, 400  # as for Python: of a folder, of a file
PACKAGES: list[dict[str, Any]] = json.loads(VENDORED.read_text())["packages"]
OURS = sorted(p for p in STATIC.rglob("*") if p.is_file() and p.parent.name != "vendor")


def test_the_page_stays_small() -> None:
    assert sum(p.stat().st_size for p in STATIC.rglob("*") if p.is_file()) <= MAX_BYTES
    for folder in (p for p in STATIC.rglob("*") if p.is_dir()):
        assert len([p for p in folder.iterdir() if p.is_file()]) <= MAX_FILES, folder.name
    for path in OURS:
        assert len(path.read_text().splitlines()) <= MAX_LINES, path.name


@pytest.mark.parametrize("path", [p for p in OURS if p.suffix == ".js"], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_script_says_what_it_is_and_imports_what_is_there(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("// "), "the first line says what the file is for"
    for name in re.findall(r'(?:from|import) "([^"]+)"', text):
        assert name.startswith("."), f"{name}: browsers find files by relative paths alone"
        assert (path.parent / name).is_file(), name
    for word in ("eval(", "new Function", "document.write", "insertAdjacentHTML", ".outerHTML", "http://", "https://"):
        assert word not in text, word
    assert text.count("dangerouslySetInnerHTML") == (path.name == "message.js"), "HTML comes from markdown.js alone"


def test_every_file_is_served_under_its_name() -> None:
    page = read_page()
    names = {
        START if p.name == "index.html" else PREFIX + p.relative_to(STATIC).as_posix()
        for p in STATIC.rglob("*")
        if p.is_file()
    }
    assert set(page) == names
    assert page[START].content_type == "text/html; charset=utf-8"
    assert page["/page/app/main.js"].content_type.startswith("text/javascript")
    assert page["/page/vendor/marked.mjs"].content_type.startswith("text/javascript")
    tags = {file.etag for file in page.values()}
    assert len(tags) == len(page)
    for link in re.findall(r'(?:href|src)="([^"]+)"', page[START].body.decode()):
        assert "/" + link in page, link


def test_the_vendored_files_are_those_of_the_list() -> None:
    listed = {entry["file"]: entry["sha256"] for package in PACKAGES for entry in package["files"]}
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (STATIC / "vendor").iterdir()}
    assert found == listed, "npm packages changed: see server/page/README.md"
    licences = (VENDORED.parent / "LICENCES.txt").read_text()
    for package in PACKAGES:
        assert package["licence"]
        assert f"{package['package']} {package['version']}" in licences


@pytest.mark.accept
@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p["package"])
def test_the_vendored_files_are_those_of_npm(package: dict[str, Any]) -> None:
    """Downloads each package, and compares."""
    with urllib.request.urlopen(package["tarball"], timeout=60) as answer:
        data = answer.read()
    digest = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    assert digest == package["integrity"]
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for entry in package["files"]:
            member = archive.extractfile(f"package/{entry['from']}")
            assert member is not None
            content = member.read()
            if change := entry.get("change"):
                old, new = (text.encode() for text in change)
                assert content.count(old) == 1
                content = content.replace(old, new)
            assert (STATIC / "vendor" / entry["file"]).read_bytes() == content
