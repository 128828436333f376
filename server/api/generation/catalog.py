"""The models of this server by name: the base first, then its adapters.

Reads the registry of adapters and the table of aliases; loads nothing. An unknown name is a 404, never the base.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from guanaco.adapters.versions.aliases import AliasTable
from guanaco.adapters.versions.profile import Profile
from guanaco.adapters.versions.registry import AdapterEntry, AdapterRegistry
from guanaco.models.error_codes import ErrorCode
from guanaco.server.adapters.sources import shown_source
from guanaco.server.api.http.auth import ApiKey
from guanaco.server.api.http.errors import ApiError, alias_target_missing, bad_request, model_not_found
from guanaco.server.api.http.lifecycle import Admission
from guanaco.server.api.values.adapters import number_of
from guanaco.server.engine.request import LoraRef
from guanaco.server.metrics.adapters import MIXTURE_LABEL

OWNER = "guanaco"
_ALIAS_LOOKS = 4  # attempts to follow an alias that changes at the same moment


@dataclass(frozen=True)
class ServedModel:
    """A model that clients may name, or the base with the adapters that one request combines."""

    name: str
    max_model_len: int
    root: str  # its source as clients see it: a hub id, or the name
    parent: str | None = None  # an adapter's base
    version: str | None = None  # an adapter's content digest; None: the base model
    created: int = field(default_factory=lambda: int(time.time()))
    base_fingerprint: str = ""  # of the base's content
    mixture: tuple[LoraRef, ...] = ()  # the weighted adapters, if the request names several itself
    mixed_names: tuple[str, ...] = ()  # the names of these adapters
    profile: Profile | None = None
    version_keys: tuple[str, ...] | None = None  # ids of the API keys for which the version was published; None: all
    stands_for: str | None = None  # an alias's target for this request, or an adapter's own name; None for the base

    def is_open_to(self, key: ApiKey | None) -> bool:
        """Whether the holder of a key may use the model and see that it exists."""
        allowed = None if self.profile is None else self.profile.allowed_keys
        return all(keys is None or (key is not None and key.id in keys) for keys in (allowed, self.version_keys))

    @property
    def counted_as(self) -> str | None:
        """The adapter's name in the metrics, even if the request named an alias; None for the base."""
        if self.mixture:
            return MIXTURE_LABEL
        return None if self.version is None else self.stands_for or self.name

    @property
    def loras(self) -> tuple[LoraRef, ...]:
        return self.mixture if self.version is None else (LoraRef(self.version),)

    @property
    def versions(self) -> str | None:
        """The content digests of all adapters, separated by commas, for the answer's header; None for the base."""
        return ",".join(lora.version for lora in self.loras) or None

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint` of the answers: a digest of the base and of the ordered (version, scale) list."""
        content = [self.base_fingerprint, [[lora.version, float(lora.scale).hex()] for lora in self.loras]]
        return "fp_" + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def card(self) -> dict[str, Any]:
        """The entry in GET /v1/models. No `name` key: Open WebUI shows a null one as the model's name."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": OWNER,
            "root": self.root,
            "parent": self.parent,
            "max_model_len": self.max_model_len,
            "permission": [],
            "base_fingerprint": self.base_fingerprint,
            # An alias may give another version to each request.
            "version": self.version if self.stands_for in (None, self.name) else None,
        }


@dataclass(frozen=True)
class Caller:
    """The sender of a request: its API key, and the text by which a weighted alias chooses a target."""

    key: ApiKey | None
    split_key: str | None = None  # None: the request's id
    request_id: str = ""
    counts: bool = True  # whether the request counts as a use of the alias

    @property
    def chosen_by(self) -> str:
        return self.request_id if self.split_key is None else self.split_key


class Catalog:
    """The served models in the order in which they are listed."""

    def __init__(
        self,
        base: ServedModel,
        adapters: Iterable[ServedModel] = (),
        live: AdapterRegistry | None = None,
        aliases: AliasTable | None = None,
    ) -> None:
        """live: adapters that may change while the server runs. aliases: further names of them; an adapter's own name
        goes first."""
        self.base = base
        self._models = {model.name: model for model in (base, *adapters)}
        self._live = live
        self._aliases = aliases

    def get(self, name: str, key: ApiKey | None) -> ServedModel:
        """The model of that name, to show it. Raises a 404 if there is none for this key."""
        model = self._models.get(name)
        if model is None and self._live is not None and (entry := self._live.resolve(name)) is not None:
            model = self._model_of(entry)
        if model is None:
            model = self._model_of_alias(name, Caller(key))
        if model is None or not model.is_open_to(key):
            raise model_not_found()
        return model

    def is_known(self, name: str, key: ApiKey | None) -> bool:
        """Whether requests with this key may name the model. An alias is not followed: that happens when a request is
        prepared."""
        if (model := self._models.get(name)) is not None:
            return model.is_open_to(key)
        if self._live is not None and (entry := self._live.resolve(name)) is not None:
            return self._model_of(entry).is_open_to(key)
        return self._aliases is not None and name in self._aliases.names() and self._is_alias_open_to(name, key)

    def acquire(self, name: str, caller: Caller, admission: Admission) -> ServedModel:
        """The model of that name, to use it. Its version is held until `admission` is released. Raises a 404."""
        model = self._models.get(name)
        if model is not None:
            return model
        if self._live is None:
            raise model_not_found()
        live, entry = self._live, self._live.acquire(name)
        is_alias = entry is None
        if entry is None:
            entry = self._acquire_by_alias(name, caller)
        version = entry.version
        admission.on_release(lambda: live.release(version))
        acquired = self._model_of(entry, alias=name if is_alias else None)
        if not acquired.is_open_to(caller.key) or (is_alias and not self._is_alias_open_to(name, caller.key)):
            raise model_not_found()  # not "forbidden": a client that may not use it must not learn that it exists
        if is_alias and caller.counts:
            live.count_use(name)
        return acquired

    def _acquire_by_alias(self, name: str, caller: Caller) -> AdapterEntry:
        """The adapter that an alias gives a caller, held. Tried again if the alias changes at that moment."""
        if self._live is None or self._aliases is None:
            raise model_not_found()
        for _ in range(_ALIAS_LOOKS):
            target = self._aliases.follow(name, caller.chosen_by)
            if target is None or not self._is_alias_open_to(name, caller.key):
                raise model_not_found()
            if (entry := self._live.acquire(target.name, target.version)) is not None:
                return entry
        raise alias_target_missing()

    def acquire_mixture(
        self, model_name: str, adapters: Sequence[tuple[str, float]], caller: Caller, admission: Admission
    ) -> ServedModel:
        """The base with several adapters at once, in the request's order. adapters: (name, scale). Raises a 400 or
        404."""
        if model_name != self.base.name:
            text = f"with adapters, model must be the base, {self.base.name}: the adapters are added to it"
            raise bad_request(text, "model")
        loras, names = [], []
        for index, (name, scale) in enumerate(adapters):
            try:
                model = self.acquire(name, caller, admission)
            except ApiError as error:
                if error.code != ErrorCode.MODEL_NOT_FOUND:
                    raise
                text = f"no adapter is called as adapters[{index}].name says; GET /v1/models lists them"
                raise ApiError(
                    error.status, ErrorCode.ADAPTER_NOT_FOUND, text, param=f"adapters[{index}].name"
                ) from None
            if model.version is None:
                raise bad_request("the base is no adapter", f"adapters[{index}].name")
            loras.append(LoraRef(model.version, scale))
            names.append(model.stands_for or model.name)
        if len({lora.version for lora in loras}) != len(loras):
            raise bad_request("two of the adapters are the same one: add their scales up", "adapters")
        return replace(self.base, mixture=tuple(loras), mixed_names=tuple(names))

    def all(self, key: ApiKey | None) -> tuple[ServedModel, ...]:
        """All models that the holder of a key may use."""
        live = () if self._live is None else self._live.entries()
        models = [*self._models.values(), *(self._model_of(entry) for entry in live)]
        if self._aliases is not None:
            caller = Caller(key)
            models += [m for name in self._aliases.names() if (m := self._model_of_alias(name, caller)) is not None]
        return tuple(model for model in models if model.is_open_to(key))

    def numbered_adapters(self, key: ApiKey | None) -> dict[int, str]:
        """Number → name of the adapters that the holder of a key may use, in the order of their names. Aliases have no
        number, and neither have two adapters whose names make the same one."""
        names = sorted(m.name for m in self.all(key) if m.version is not None and m.stands_for in (None, m.name))
        times = Counter(map(number_of, names))
        return {number: name for name in names if times[number := number_of(name)] == 1}

    def hidden_adapters(self, key: ApiKey | None) -> frozenset[str]:
        """The names of the adapters that the holder of a key may not use."""
        live = () if self._live is None else self._live.entries()
        models = [*self._models.values(), *(self._model_of(entry) for entry in live)]
        return frozenset(model.name for model in models if not model.is_open_to(key))

    def _is_alias_open_to(self, name: str, key: ApiKey | None) -> bool:
        """Whether the holder of a key may use all adapters to which an alias leads. Those not loaded don't count."""
        if self._live is None or self._aliases is None:
            return False
        targets = self._aliases.leads_to(name)
        entries = [entry for t in targets if (entry := self._live.resolve(t.name, t.version)) is not None]
        return all(self._model_of(entry).is_open_to(key) for entry in entries)

    def _model_of_alias(self, name: str, caller: Caller) -> ServedModel | None:
        """An alias as a model, to show it. None if there is none for this key, or if one of its targets is missing."""
        if self._live is None or self._aliases is None:
            return None
        target = self._aliases.follow(name, caller.chosen_by)
        if target is None or not self._is_alias_open_to(name, caller.key):
            return None
        if any(self._live.resolve(t.name, t.version) is None for t in self._aliases.leads_to(name)):
            return None
        entry = self._live.resolve(target.name, target.version)
        return None if entry is None else self._model_of(entry, alias=name)

    def _model_of(self, entry: AdapterEntry, alias: str | None = None) -> ServedModel:
        base = self.base
        return ServedModel(
            name=alias or entry.name,
            max_model_len=base.max_model_len,
            root=entry.name if alias else shown_source(entry.name, entry.source),
            parent=base.name,
            version=entry.version,
            created=int(entry.loaded_at),
            base_fingerprint=base.base_fingerprint,
            profile=entry.profile,
            version_keys=entry.version_keys,
            stands_for=entry.name,
        )
