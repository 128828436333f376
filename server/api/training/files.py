"""OpenAI's files: upload, list, get, content, delete. A file belongs to the API key that uploaded it."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from guanaco.server.api.generation.state import json_response
from guanaco.server.api.http.errors import bad_request
from guanaco.server.api.training.common import listed, owner_of, page, refusals, service_of
from guanaco.server.api.training.upload import UPLOAD_PATH, receive_file

router = APIRouter(tags=["training"])

_MOST, _DEFAULT = 10_000, 10_000  # files on a page
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"const": "fine-tune"},
                    },
                }
            }
        },
    }
}


@router.post(UPLOAD_PATH, summary="Upload a file to train on", openapi_extra=_FORM)
async def upload_file(request: Request) -> Response:
    with refusals():
        return json_response((await receive_file(request, service_of(request), owner_of(request))).public())


@router.get("/v1/files", summary="The files of this API key")
async def list_files(request: Request) -> Response:
    service, query = service_of(request), request.query_params
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise bad_request("order must be asc or desc", "order")
    purpose = query.get("purpose")
    files = [file for file in service.files.of(owner_of(request).digest) if purpose in (None, file.purpose)]
    files = files if order == "asc" else files[::-1]
    items, has_more = page(request, files, most=_MOST, default=_DEFAULT, more=("order", "purpose"))
    return json_response(listed(items, has_more, lambda file: file.public()))


@router.get("/v1/files/{file_id}", summary="One file")
async def get_file(request: Request, file_id: str) -> Response:
    with refusals():
        return json_response(service_of(request).files.get(owner_of(request).digest, file_id).public())


@router.get("/v1/files/{file_id}/content", summary="What is in a file")
async def get_content(request: Request, file_id: str) -> Response:
    files = service_of(request).files
    with refusals():
        file = files.get(owner_of(request).digest, file_id)
    return FileResponse(files.path(file), media_type="application/octet-stream", filename=file.filename)


@router.delete("/v1/files/{file_id}", summary="Remove a file")
async def delete_file(request: Request, file_id: str) -> Response:
    with refusals():
        await service_of(request).delete_file(owner_of(request), file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})
