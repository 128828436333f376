"""Checks a request's head beyond its syntax: `CONNECT`, `Host`, version, transfer coding.

If a proxy and this server read a request differently, an attacker can smuggle a second request past the proxy. So a
head that could be read in two ways is refused. Called by `guard` once per request.
"""

from collections.abc import Sequence

OLD_VERSION = "1.0"
_VERSIONS = (OLD_VERSION, "1.1")


def head_fault(method: bytes, version: str, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """The client's error message; None if the head is good. headers: with names in lower case."""
    if version not in _VERSIONS:
        return "this server speaks HTTP/1.1 and HTTP/1.0 only"
    if method == b"CONNECT":
        return "this server is no proxy: there is no CONNECT"
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1:
        return "the request has more than one Host header; send exactly one"
    if version != OLD_VERSION and not any(host.strip() for host in hosts):
        return "the request has no Host header, or an empty one; HTTP/1.1 needs it"
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if codings and version == OLD_VERSION:
        return "Transfer-Encoding needs HTTP/1.1; send the body with a Content-Length"
    if codings and codings != [b"chunked"]:
        return "the only Transfer-Encoding that is read is `chunked`, alone; send the body uncompressed"
    return None
