"""Raw requests and answers, as the tests of connections write and read them."""

import json
import re

CHUNKED_HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
)
GET = b"GET /version HTTP/1.1\r\nHost: t\r\n\r\n"


def status_of(answer: bytes) -> int:
    match = re.match(rb"HTTP/1\.1 (\d+)", answer)
    return int(match[1]) if match else 0


def code_of(answer: bytes) -> str:
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"]
