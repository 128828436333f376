"""The errors of the Hugging Face hub's library as messages for the operator, for models and for adapters.

Called by all code that downloads from the hub.
"""

from dataclasses import dataclass

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import ModelError

# The exceptions with which a call of the library may fail through no bug of ours.
LIBRARY_ERRORS = (OSError, httpx2.HTTPError, HFValidationError, XetDownloadError)


class HubError(ModelError):
    """Files that could not be downloaded. `code` says why; the message is for the operator."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Words:
    """The message for each failure. They are formatted with `spec`, `repository`, `revision`, `status` and `error`."""

    gated: str
    no_revision: str
    no_repository: str
    bad_id: str
    incomplete: str
    offline: str
    unreachable: str
    answered: str
    not_stored: str
    broken_off: str


_ADAPTER_BROKEN_OFF = "{spec} was not downloaded: the hub cannot be reached, or broke off; try again"
_ADAPTER_NOT_THERE = "{repository} is not on the hub: check the name (a private one needs --hub-token)"
OF_ADAPTERS = Words(
    gated="{spec} is gated: accept its terms on its page, and give a token of that account (--hub-token)",
    no_revision="{repository} has no such revision; name a branch, a tag or a commit of it",
    no_repository=_ADAPTER_NOT_THERE,
    bad_id=_ADAPTER_NOT_THERE,
    incomplete=_ADAPTER_BROKEN_OFF,
    offline="{spec} was not downloaded before, and offline mode forbids downloads",
    unreachable=_ADAPTER_BROKEN_OFF,
    answered="{spec} was not downloaded: the hub answered {status}; check the token, or try later",
    not_stored="{spec} cannot be stored ({error}): make room in the cache",
    broken_off=_ADAPTER_BROKEN_OFF,
)
_MODEL_NOT_HERE = "{spec} is not a path here, it was not downloaded before, and "
OF_MODELS = Words(
    gated="{spec} is gated: accept its terms on its page, and give a token of that account (HF_TOKEN)",
    no_revision="{spec} does not exist: {repository} has no revision {revision!r}; "
    "name a branch, a tag or a commit of it",
    no_repository="{spec} is neither a path here nor a model on the hub: check the name (a private one needs HF_TOKEN)",
    bad_id="{spec} does not exist, and is no hub id like org/name either: check the path",
    incomplete="{spec} was downloaded only in part, and the hub cannot be asked now: go online and start again",
    offline=_MODEL_NOT_HERE + "offline mode forbids to download it: check the path or go online",
    unreachable=_MODEL_NOT_HERE + "the hub cannot be reached: check the path or go online",
    answered="{spec} was not downloaded: the hub answered {status}; check the token (HF_TOKEN), or try later",
    not_stored="{spec} cannot be stored ({error}): make room, or name another cache directory",
    broken_off="{spec} was not downloaded completely ({error}): start again, whole files are kept",
)


def explained(
    error: Exception, words: Words, *, spec: str, repository: str, revision: str | None, offline: bool = False
) -> HubError:
    """A HubError with a code and a one-line message for `error`, which must be one of LIBRARY_ERRORS.

    words: the sentences of models or of adapters. spec: the address as the operator wrote it. repository, revision:
    its parts. offline: the library was told not to ask the hub.
    """
    code, text = _told(error, words, offline)
    shown: object = error
    if isinstance(error, OSError) and words is OF_ADAPTERS:
        shown = error.strerror or error  # the whole text has the path, which clients must not learn
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    line = text.format(spec=spec, repository=repository, revision=revision, status=status, error=shown)
    return HubError(code, " ".join(line.split()))  # errors of libraries may have several lines


def _told(error: Exception, words: Words, offline: bool) -> tuple[ErrorCode, str]:
    """The code and the message. The order of the tests matters: some errors are subclasses of others."""
    if isinstance(error, GatedRepoError):
        return ErrorCode.HUB_FORBIDDEN, words.gated
    if isinstance(error, RevisionNotFoundError):
        return ErrorCode.HUB_NOT_FOUND, words.no_revision
    if isinstance(error, RepositoryNotFoundError):
        return ErrorCode.HUB_NOT_FOUND, words.no_repository
    if isinstance(error, HFValidationError):
        return ErrorCode.HUB_NOT_FOUND, words.bad_id
    if isinstance(error, IncompleteSnapshotError):
        return ErrorCode.HUB_FAILED, words.incomplete
    if isinstance(error, OfflineModeIsEnabled):
        return ErrorCode.HUB_OFFLINE, words.offline
    if isinstance(error, LocalEntryNotFoundError):
        is_offline = offline or isinstance(error.__cause__, OfflineModeIsEnabled)
        return (ErrorCode.HUB_OFFLINE, words.offline) if is_offline else (ErrorCode.HUB_FAILED, words.unreachable)
    if isinstance(error, HfHubHTTPError):
        is_forbidden = error.response.status_code in (401, 403)
        return ErrorCode.HUB_FORBIDDEN if is_forbidden else ErrorCode.HUB_FAILED, words.answered
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return ErrorCode.STORE_FAILED, words.not_stored
    return ErrorCode.HUB_FAILED, words.broken_off
