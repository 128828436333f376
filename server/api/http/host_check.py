"""Refuses requests with an unknown name in `Host`, on a server without API keys.

A web page can make its own name resolve to 127.0.0.1 (DNS rebinding) and then call a server on the reader's machine.
The browser still sends the page's name in `Host`, so names that were not allowed are refused. IP addresses are allowed.
With API keys the check is not needed, as the page doesn't know a key. A pure ASGI middleware; `app` puts it in the
chain.
"""

import ipaddress
import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.http.errors import ApiError

_NAME = re.compile(rb"([A-Za-z0-9_.-]+)(?::\d{0,5})?")
_IPV6 = re.compile(rb"\[([0-9A-Fa-f:.]+)\](?::\d{0,5})?")
_ALWAYS = "localhost"


class HostCheck:
    """Refuses requests whose Host is not localhost, an IP address or in `allowed`. Does nothing if `has_keys`."""

    def __init__(self, app: ASGIApp, allowed: Iterable[str], has_keys: bool) -> None:
        self.app = app
        self.allowed = frozenset({_ALWAYS, *map(_plain, allowed)})
        self.has_keys = has_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self.has_keys and not self._is_allowed(scope):
            await _REFUSED.answer(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        # `guard` refuses requests with two Host headers, and those of HTTP/1.1 without one.
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        return all(self._may_be_used(host.strip()) for host in hosts)

    def _may_be_used(self, host: bytes) -> bool:
        if match := _IPV6.fullmatch(host):
            return _is_address(match[1].decode())
        if match := _NAME.fullmatch(host):
            name = _plain(match[1].decode())
            return name in self.allowed or _is_address(name)
        return False


def _plain(name: str) -> str:
    return name.lower().removesuffix(".")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


_REFUSED = ApiError(
    403,
    ErrorCode.HOST_NOT_ALLOWED,
    "this server has no API key, so it answers only to localhost, to IP addresses, and to names given with "
    "--allowed-host; the Host header of this request has another name. Start the server with --allowed-host NAME, or "
    "set --api-key",
)
