"""Lets web pages of the origins in `--allow-origin` read this server's answers, on the clients' routes only.

Keys decide who may send requests (`auth`). Only the browser's preflight request needs none. Pure ASGI around
Starlette's middleware. `app` puts it in the chain outside the key check, so that a page can read a refusal.
"""

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from guanaco.server.api.http.auth import OPEN_PATHS

# Pages may use only these paths. A new route is closed until it is listed here; never list admin, files or jobs routes.
CORS_PATHS = OPEN_PATHS | {
    *("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens"),
    "/v1/responses",
    *("/tokenize", "/detokenize", "/tokenizer_info", "/version"),
}
_BELOW = ("/v1/models/", "/v1/responses/")
_METHODS = ("GET", "HEAD", "POST", "DELETE")
_STAINLESS: tuple[str, ...] = ("Arch", "Async", "Helper-Method", "Lang", "OS", "Package-Version", "Poll-Helper")
_STAINLESS += ("Retry-Count", "Runtime", "Runtime-Version", "Timeout")
# Our headers, and those that OpenAI's and Anthropic's clients add in a browser.
_HEADERS = (
    *("Authorization", "X-Api-Key", "X-Request-Id", "X-Split-Key"),
    *("Cache-Control", "Idempotency-Key", "Last-Event-ID", "User-Agent", "X-Requested-With"),
    *("OpenAI-Beta", "OpenAI-Organization", "OpenAI-Project"),
    *("Anthropic-Beta", "Anthropic-Dangerous-Direct-Browser-Access", "Anthropic-Version"),
    *(f"X-Stainless-{name}" for name in _STAINLESS),
)
_EXPOSED = ("Retry-After", "X-Adapter-Version", "X-Ignored-Fields", "X-Request-Id", "Request-Id")
_PREFLIGHT_SECONDS = 600  # how long a browser remembers the answer to a preflight


class ClientCors:
    """Answers preflights and names the allowed origin, on CORS_PATHS and the paths of each model and response."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        """origins: exact origins, or only `*`."""
        self.app = app
        self._cors = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=_HEADERS,
            expose_headers=_EXPOSED,
            allow_private_network=True,  # an allowed origin may be a public site, and this server in a private network
            max_age=_PREFLIGHT_SECONDS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] == "http" and (scope["path"] in CORS_PATHS or scope["path"].startswith(_BELOW))
        await (self._cors if is_open else self.app)(scope, receive, send)
