"""Answers that an HTTP/1.0 client can read: never in chunks.

An answer with a Content-Length goes out as it is. One without (a stream) goes out as plain bytes, and the end of the
connection is its end. Without this uvicorn sends chunks, and a client of HTTP/1.0 takes their sizes for text. Called by
`guard`, for one request at a time.
"""

from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


def without_chunks(app: Any, cycle: RequestResponseCycle) -> Any:
    """`app` for the one request of `cycle`, whose answer has no chunks. uvicorn closes after each HTTP/1.0 answer."""

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
