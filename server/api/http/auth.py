"""API keys: everything is closed unless it is listed here as open, and keys are only ever kept and compared as digests.

Doesn't know routes: it reads the path before a route is looked up. A pure ASGI middleware; `app` puts it in the chain.
"""

import hashlib
import hmac
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from starlette.types import ASGIApp, Receive, Scope, Send

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.http.access_log import record_of
from guanaco.server.api.http.errors import ApiError
from guanaco.server.config import Settings, SettingsError, read_named_file

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
# Routes that change adapters or end the server: they need an admin key, and are closed if the server has none.
ADMIN_PATHS = ("/v1/adapters", "/v1/aliases", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/drain")


# Training over the API: for the admin key, and for the API keys that --train-key names.
TRAINING_PATHS = ("/v1/files", "/v1/fine_tuning")


def is_training_path(path: str) -> bool:
    return any(path == training or path.startswith(f"{training}/") for training in TRAINING_PATHS)


def is_admin_path(path: str) -> bool:
    return any(path == admin or path.startswith(f"{admin}/") for admin in ADMIN_PATHS)


@dataclass(frozen=True)
class ApiKey:
    """One key that clients may send. `id` may be shown in logs; it says nothing about the key."""

    id: str
    digest: bytes  # SHA-256 of the key's bytes


class KeyRing:
    """The keys of this server. An empty ring lets everybody in."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        texts = [key.strip() for key in keys]
        if not all(texts):
            raise SettingsError("a key is empty: it would let everybody in")
        digests = dict.fromkeys(_digest(text.encode()) for text in texts)
        self._keys = tuple(ApiKey(_digest(b"guanaco key id" + d).hex()[:8], d) for d in digests)
        self._salt_secret = secrets.token_bytes(32)

    @classmethod
    def admin(cls, settings: Settings) -> Self:
        """The keys of --admin-key and --admin-key-file. Raises SettingsError if the file can't be read or has no
        key."""
        keys = [] if settings.admin_key is None else [settings.admin_key.get_secret_value()]
        return cls(keys + _keys_in_file("--admin-key-file", settings.admin_key_file))

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The keys of --api-key and --api-key-file. Raises SettingsError if the file can't be read or has no key."""
        keys = [key.get_secret_value() for key in settings.api_key]
        return cls(keys + _keys_in_file("--api-key-file", settings.api_key_file))

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, presented: bytes) -> ApiKey | None:
        """The key of the ring that was sent; None if it isn't one. All keys are always compared, in constant time."""
        digest = _digest(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def has(self, key: ApiKey) -> bool:
        """Whether a key that was found is one of this ring."""
        return any(hmac.compare_digest(key.digest, other.digest) for other in self._keys)

    def cache_salt(self, key: ApiKey | None, client_salt: str | None) -> str:
        """The prefix-cache tenant of a request: different for each key, and for each salt that its client chooses.

        Without keys and salts all requests share one cache (empty salt). The salt can't be guessed: it is an HMAC with
        a secret of this process. A tenant who could name another's salt could find out its prompts by measuring
        latency.
        """
        if key is None and client_salt is None:
            return ""
        digest = hmac.new(self._salt_secret, key.digest if key else b"", "sha256")
        digest.update(b"\0" + client_salt.encode() if client_salt is not None else b"")
        return digest.hexdigest()


def _keys_in_file(flag: str, path: Path | None) -> list[str]:
    """The keys in a file, one per line. Blank lines and lines that begin with # are skipped."""
    if path is None:
        return []
    try:
        text = read_named_file(flag, path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SettingsError(f"{flag} {path}: it is not text in UTF-8") from None
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise SettingsError(f"{flag} {path}: holds no key; write one a line")
    return keys


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def presented_key(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """The key in `Authorization: Bearer …` or `X-Api-Key`; None if there is none, or more than one."""
    found = []
    for name, value in headers:
        if name == b"authorization":
            scheme, _, token = value.strip().partition(b" ")
            if scheme.lower() != b"bearer" or not token.strip():
                return None
            found.append(token.strip())
        elif name == b"x-api-key":
            if not value.strip():
                return None
            found.append(value.strip())
    return found[0] if len(set(found)) == 1 else None


class AuthMiddleware:
    """Refuses requests without a key of the ring, unless the path is open or the ring is empty.

    Admin paths have a ring of their own, and are closed if that is empty. An admin key is also valid on all other
    paths, as an ordinary key: controllers have one key for both. Training paths always need a key that may train.
    """

    def __init__(
        self, app: ASGIApp, keys: KeyRing, admin_keys: KeyRing, train_key_ids: Collection[str] | None = None
    ) -> None:
        """train_key_ids: the ids of the API keys that may train; None: this server has no training paths."""
        self.app = app
        self.keys = keys
        self.admin_keys = admin_keys
        self.train_key_ids = train_key_ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            for_admins = is_admin_path(scope["path"])
            trains = self.train_key_ids is not None and is_training_path(scope["path"])
            admin = for_admins and bool(self.admin_keys)
            presented = presented_key(scope["headers"])
            key = self._find(presented, admin)
            if key is None and (admin or trains or self.keys):
                await _wrong_key(presented, admin or (trains and not self.keys)).answer(scope, receive, send)
                return
            if key is not None:
                record_of(scope).key_id = key.id
                scope["guanaco.key"] = key
            if for_admins and not admin:
                await _ADMIN_DISABLED.answer(scope, receive, send)
                return
            if trains and key is not None and not self.may_train(key):
                await _TRAINING_NOT_ALLOWED.answer(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def may_train(self, key: ApiKey) -> bool:
        """Whether a key that is valid here may use the training paths."""
        return self.admin_keys.has(key) or key.id in (self.train_key_ids or ())

    def _find(self, presented: bytes | None, admin: bool) -> ApiKey | None:
        """The key that was sent, if the path accepts it. Both rings are always searched, so that the time doesn't tell
        which one has the key."""
        if presented is None:
            return None
        of_client, of_admin = self.keys.find(presented), self.admin_keys.find(presented)
        return of_admin if admin else of_client or of_admin


_TRAINING_NOT_ALLOWED = ApiError(
    403,
    ErrorCode.TRAINING_NOT_ALLOWED,
    "this API key may not upload files or train; the operator can allow it with --train-key and the key's id",
)
_ADMIN_DISABLED = ApiError(
    403,
    ErrorCode.ADMIN_DISABLED,
    "adapters can't be changed while this server runs; start it with --admin-key to allow it",
)


def _wrong_key(presented: bytes | None, admin: bool) -> ApiError:
    kind = "admin" if admin else "API"
    which = "its admin key" if admin else "one of its API keys"
    text = f"send {which} to this server as `Authorization: Bearer KEY` or `X-Api-Key: KEY`"
    if presented is None:
        return ApiError(401, ErrorCode.MISSING_ADMIN_KEY if admin else ErrorCode.MISSING_API_KEY, text)
    code = ErrorCode.INVALID_ADMIN_KEY if admin else ErrorCode.INVALID_API_KEY
    return ApiError(401, code, f"this {kind} key is not valid; {text}")
