"""The one multipart body of this server: `POST /v1/files`, streamed to disk, never held in memory.

python-multipart takes the body apart. Part names are compared with a fixed list. A file's name is only a label: no path
is made from it.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.http.errors import ApiError, ClientGone, bad_request
from guanaco.server.training.jobs.files import Upload
from guanaco.server.training.jobs.records import TRAINING, Owner, StoredFile
from guanaco.server.training.jobs.service import TrainingService

UPLOAD_PATH = "/v1/files"
MAX_FORM_BYTES = 64 << 10  # of a body besides the file's content: boundaries, heads of parts, other fields
_MAX_FIELD_BYTES = 1024  # of a field's value
_WRITE_BYTES = 1 << 20  # so many bytes of the file are collected before they are written


@dataclass
class _Part:
    name: str = ""
    filename: str | None = None
    content: bytearray = field(default_factory=bytearray)


class _Form:
    """The callbacks of the parser: fields are kept, the file's bytes are collected until they are written."""

    def __init__(self, boundary: bytes) -> None:
        self.purpose: str | None = None
        self.filename: str | None = None
        self.file_bytes = bytearray()  # not written yet
        self.is_whole = False
        self._part = _Part()
        self._header = [bytearray(), bytearray()]  # name, value
        self._disposition = b""
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def _part_begin(self) -> None:
        self._part, self._disposition = _Part(), b""

    def _header_end(self) -> None:
        if bytes(self._header[0]).strip().lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        self._header = [bytearray(), bytearray()]

    def _headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        self._part.name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not self._part.name:
            raise bad_request("a part of the form has no name", code=ErrorCode.MALFORMED_REQUEST)
        if self._part.name not in ("file", "purpose"):
            shown = self._part.name if self._part.name.replace("_", "").isalnum() else "a field"
            what = "expires_after" if self._part.name.startswith("expires_after") else shown[:40]
            text = f"{what} is not supported here: send file and purpose; delete a file when it is no longer needed"
            raise bad_request(text, what, ErrorCode.UNSUPPORTED_PARAMETER)
        if self._part.name == "file":
            if self.filename is not None:
                raise bad_request("the form has two files: send one", "file")
            name = options.get(b"filename")
            if name is None:
                raise bad_request("file must be a file, with a filename", "file")
            self._part.filename = self.filename = name.decode("utf-8", "replace")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part.filename is not None:
            self.file_bytes += data[start:end]
        else:
            self._part.content += data[start:end]
            if len(self._part.content) > _MAX_FIELD_BYTES:
                raise bad_request(f"{self._part.name} is too long", self._part.name)

    def _part_end(self) -> None:
        if self._part.name == "purpose":
            if self.purpose is not None:
                raise bad_request("purpose is given twice", "purpose")
            self.purpose = self._part.content.decode("utf-8", "replace")
            if self.purpose != TRAINING:
                raise bad_request(f"purpose must be {TRAINING}: files for other uses are not kept here", "purpose")

    def _end(self) -> None:
        self.is_whole = True


async def receive_file(request: Request, service: TrainingService, owner: Owner) -> StoredFile:
    """Keep the file of a multipart body. Raises ApiError, RequestRefused, or ClientGone if the client leaves before the
    end; nothing of the file is left then."""
    form = _Form(_boundary(request))
    most = service.limits.max_file_bytes + MAX_FORM_BYTES
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdecimal() and int(announced) > most:
        raise _too_large(service)
    upload = await service.begin_upload(owner)
    try:
        await _read(request, form, upload, most, service)
        if not form.is_whole:
            raise bad_request("the form is cut off: its last boundary is missing", code=ErrorCode.MALFORMED_REQUEST)
        for name, value in (("file", form.filename), ("purpose", form.purpose)):
            if value is None:
                raise bad_request(f"{name} is missing", name, ErrorCode.MISSING_REQUIRED_PARAMETER)
        if not upload.num_bytes:
            raise bad_request("the file is empty", "file")
        return await service.finish_upload(upload, form.filename or "")
    finally:
        await asyncio.shield(asyncio.to_thread(service.files.drop, upload))  # once it is kept, only a record


async def _read(request: Request, form: _Form, upload: Upload, most: int, service: TrainingService) -> None:
    num_bytes, is_more = 0, True
    while is_more:
        message: Any = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        is_more = message.get("more_body", False)
        data = message.get("body", b"")
        num_bytes += len(data)
        if num_bytes > most:
            raise _too_large(service)
        try:
            form.parser.write(data)
        except FormParserError:
            raise bad_request("the form is not valid multipart", code=ErrorCode.MALFORMED_REQUEST) from None
        if num_bytes - upload.num_bytes - len(form.file_bytes) > MAX_FORM_BYTES:
            text = f"the form has more than {MAX_FORM_BYTES} bytes besides its file"
            raise ApiError(413, ErrorCode.REQUEST_TOO_LARGE, text)
        if len(form.file_bytes) >= _WRITE_BYTES or not is_more:
            piece, form.file_bytes = bytes(form.file_bytes), bytearray()
            await asyncio.to_thread(upload.write, piece)


def _boundary(request: Request) -> bytes:
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise ApiError(415, ErrorCode.UNSUPPORTED_ENCODING, "compressed bodies are not read: send the form as it is")
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
        text = "send the file as `multipart/form-data` with a boundary"
        raise ApiError(415, ErrorCode.UNSUPPORTED_MEDIA_TYPE, text)
    return boundary


def _too_large(service: TrainingService) -> ApiError:
    text = f"the file is larger than {service.limits.max_file_bytes} bytes, the most of one file: split it"
    return ApiError(413, ErrorCode.REQUEST_TOO_LARGE, text, param="file")
