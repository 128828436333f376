"""Shared by all routes of training: the request's API key, errors in the client's shape, and pages of lists."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

from starlette.requests import Request

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.generation.state import state_of
from guanaco.server.api.http.auth import ApiKey
from guanaco.server.api.http.errors import ApiError, bad_request
from guanaco.server.training.jobs.errors import RefusalKind, RequestRefused
from guanaco.server.training.jobs.records import Owner
from guanaco.server.training.jobs.service import TrainingService

_STATUS = {
    RefusalKind.CALLER: 400,
    RefusalKind.MISSING: 404,
    RefusalKind.CONFLICT: 409,
    RefusalKind.TOO_LARGE: 413,
    RefusalKind.QUOTA: 429,
    RefusalKind.STORAGE: 507,
}
_QUOTA_RETRY_SECONDS = 3600.0


def service_of(request: Request) -> TrainingService:
    """The training service. Raises a 403 if the `train` extra is not installed."""
    service = state_of(request).training
    assert service is not None, "the routes are only there with it"
    if not service.is_available:
        text = "this server can't train: its `train` extra is not installed (make install EXTRAS=train)"
        raise ApiError(403, ErrorCode.TRAINING_UNAVAILABLE, text)
    return service


def owner_of(request: Request) -> Owner:
    """The request's API key as files and jobs know it: a digest that nobody can turn back into the key."""
    key: ApiKey = request.scope["guanaco.key"]
    return Owner(sha256(b"guanaco training owner" + key.digest).hexdigest(), key.id)


@contextmanager
def refusals() -> Iterator[None]:
    """Turn refusals of training into the client's errors."""
    try:
        yield
    except RequestRefused as error:
        raise refusal(error) from None


def refusal(error: RequestRefused) -> ApiError:
    """A refusal as the client gets it."""
    retry = _QUOTA_RETRY_SECONDS if error.kind is RefusalKind.QUOTA else None
    return ApiError(_STATUS[error.kind], error.code, error.message, param=error.param, retry_after=retry)


def page(
    request: Request, items: Sequence[Any], *, most: int, default: int, more: Sequence[str] = ()
) -> tuple[Sequence[Any], bool]:
    """The part of a list that `after` and `limit` ask for, and whether more follows. Items are objects with an `id`.

    more: further query parameters of the route. Raises a 400 for others, and for an `after` that is not in the list.
    """
    after, limit = asked_page(request, most=most, default=default, more=more)
    start = 0
    if after is not None:
        ids = [_id(item) for item in items]
        if after not in ids:
            raise unknown_after()
        start = ids.index(after) + 1
    return items[start : start + limit], start + limit < len(items)


def unknown_after() -> ApiError:
    """The error for an `after` that is not in the list."""
    return bad_request("after must be the id of an item of this list", "after")


def asked_page(request: Request, *, most: int, default: int, more: Sequence[str] = ()) -> tuple[str | None, int]:
    """(`after`, `limit`) of a request for a part of a list. Raises a 400 for a bad `limit`, and for parameters
    other than these and `more`."""
    query = request.query_params
    if unknown := sorted(set(query) - {"after", "limit", *more}):
        known = ", ".join(("after", "limit", *more))
        raise bad_request(f"the query has a parameter that isn't known here; there are {known}", unknown[0][:64])
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and 1 <= int(text) <= most):
        raise bad_request(f"limit must be a number from 1 to {most}", "limit")
    return query.get("after") or None, int(text)


def listed(items: Sequence[Any], has_more: bool, shown: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """A page in OpenAI's shape."""
    data = [shown(item) for item in items]
    ends = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": ends[0], "last_id": ends[1], "has_more": has_more}


def _id(item: Any) -> str:
    return str(item["id"] if isinstance(item, dict) else item.id)
