"""The bundled page over HTTP: its static files, and nothing else, are open to everybody who reaches the port.

The page has to load before it can ask for a key, so this stands outside of `auth`. It answers GET and HEAD of exactly
the paths that `server/page/files.py` read at the start. Every other request goes on to the layers inside. Pure ASGI.
"""

from collections.abc import Mapping

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from guanaco.server.api.http.access_log import record_of
from guanaco.server.api.http.middleware import PAGE_ROUTE
from guanaco.server.page.files import START, PageFile

# Scripts and styles of this origin alone, no images from elsewhere, no frames, no forms. Text becomes HTML only through
# the policy that DOMPurify registers.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-cache",  # the browser keeps a file and asks whether it is still the same
}


class PageFiles:
    """Answers requests for the page's files. `/` is the page only for requests that accept HTML, as a browser's do and
    API clients' don't."""

    def __init__(self, app: ASGIApp, files: Mapping[str, PageFile]) -> None:
        self.app = app
        self.files = files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        file = self._asked_for(scope)
        if file is None:
            await self.app(scope, receive, send)
            return
        record_of(scope).route = PAGE_ROUTE
        await _response(scope, file)(scope, receive, send)

    def _asked_for(self, scope: Scope) -> PageFile | None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return None
        file = self.files.get(scope["path"])
        return None if scope["path"] == START and not accepts_html(scope) else file


def _response(scope: Scope, file: PageFile) -> Response:
    headers = {**_HEADERS, "ETag": file.etag}
    if scope["path"] == START:
        headers["Vary"] = "Accept"
    known = ",".join(_values(scope, b"if-none-match"))
    if file.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    if scope["method"] == "HEAD":
        headers["Content-Length"] = str(len(file.body))
        return Response(headers=headers, media_type=file.content_type)
    return Response(file.body, headers=headers, media_type=file.content_type)


def accepts_html(scope: Scope) -> bool:
    """Whether the client is a browser that asks for a page."""
    for accepted in ",".join(_values(scope, b"accept")).split(","):
        kind, *parameters = (part.strip().lower() for part in accepted.split(";"))
        if kind == "text/html":
            return not any(p.replace(" ", "") in ("q=0", "q=0.0", "q=0.00", "q=0.000") for p in parameters)
    return False


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]
