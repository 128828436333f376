"""Reads requests that offer another protocol as HTTP/1.1, with their body. RFC 9110 lets a server ignore `Upgrade`.

Java's default client offers `h2c` with every request. httptools treats all bytes after such a head as the other
protocol. So it gets the head a second time, without the offer, built from the fields that httptools itself has parsed:
a second parser might see another request in the bytes. Used by `guard`.
"""

from collections.abc import Iterable
from typing import Any

import httptools


class HttpOnlyParser:
    """httptools' request parser for `protocol`, whose callbacks do nothing while `offers_upgrade` is true."""

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self._parser = self._new()

    @property
    def offers_upgrade(self) -> bool:
        """Whether the head just parsed offers another protocol. If so, it is parsed once more without the offer."""
        return bool(self._parser.should_upgrade())

    def feed_data(self, data: bytes) -> None:
        """Raises httptools.HttpParserError."""
        rest = memoryview(data)
        while True:
            try:
                self._parser.feed_data(rest)
            except httptools.HttpParserUpgrade as upgrade:
                method, version = self._parser.get_method(), self._parser.get_http_version()
                head = _head(method, self._protocol.url, version, self._protocol.headers)
                rest = rest[upgrade.args[0] :]
                self._parser = self._new()
                self._parser.feed_data(head)
            else:
                return

    def get_method(self) -> bytes:
        return bytes(self._parser.get_method())

    def get_http_version(self) -> str:
        return str(self._parser.get_http_version())

    def should_keep_alive(self) -> bool:
        return bool(self._parser.should_keep_alive())

    def should_upgrade(self) -> bool:
        """Called by uvicorn; False, so that it stays with HTTP/1.1."""
        return False

    def _new(self) -> Any:
        parser = httptools.HttpRequestParser(self._protocol)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return parser


def _head(method: bytes, url: bytes, version: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    lines = [b"%s %s HTTP/%s" % (method, url, version.encode())]
    lines += [name + b": " + value for name, value in headers if name != b"upgrade"]
    return b"\r\n".join([*lines, b"", b""])
