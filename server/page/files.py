"""The page's files as a browser gets them: path in the URL → bytes, content type and ETag. Read once, at the start.

Knows no HTTP server. No path of a request reaches the file system: only keys of `read_page()` are served.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

STATIC = Path(__file__).parent / "static"
VENDORED = Path(__file__).parent / "vendored.json"  # which file of which npm package, with digests and licences
START = "/"  # the page itself
PREFIX = "/page/"  # scripts, styles and pictures

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}


@dataclass(frozen=True)
class PageFile:
    """One file. `etag` is made of its content, so it changes exactly when the content does."""

    body: bytes
    content_type: str
    etag: str


def read_page() -> dict[str, PageFile]:
    """All files by their path in the URL: `/` is the page, everything else lies below `/page/`."""
    found = {}
    for path in sorted(STATIC.rglob("*")):
        if path.suffix in _TYPES and path.is_file():
            name = path.relative_to(STATIC).as_posix()
            found[START if name == "index.html" else PREFIX + name] = _read(path)
    return found


def _read(path: Path) -> PageFile:
    body = path.read_bytes()
    return PageFile(body, _TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')
