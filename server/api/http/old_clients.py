"""Answers for HTTP/1.0 clients: never in chunks.

An answer with a Content-Length is sent as it is. An answer without one (a stream) is sent as plain bytes and ends with
the connection. Otherwise uvicorn would send chunks, and an HTTP/1.0 client would read their sizes as text. Called by
`guard`, for one request at a time.
"""

from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


def without_chunks(app: Any, cycle: RequestResponseCycle) -> Any:
    """Wrap `app` for the one request of `cycle`, so that its answer has no chunks. uvicorn then closes the
    connection."""

    async def unchunked(scope: Any, receive: Any, send: Any) -> None:
        has_length = False

        async def send_plain(message: Any) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
                if not has_length:
                    cycle.chunked_encoding = False  # None lets uvicorn choose chunks
            elif not has_length:
                cycle.expected_content_length = len(message.get("body", b""))  # uvicorn sends no more than it expects
            await send(message)

        await app(scope, receive, send_plain)

    return unchunked
