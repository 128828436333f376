"""The models this server answers for, by name: the base first, then its adapters.

Doesn't load anything and knows no paths: the wiring says what is served. An unknown name is a 404, never the base.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from guanaco.server.api.errors import model_not_found
from guanaco.server.engine.request import LoraRef

OWNER = "guanaco"


@dataclass(frozen=True)
class ServedModel:
    """One name that clients may put into `model`."""

    name: str
    max_model_len: int
    root: str  # what it was made from: a hub id, or the name; shown to clients
    parent: str | None = None  # an adapter's base
    version: str | None = None  # an adapter's content digest; None: the base model
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def adapter(self) -> str | None:
        """The name as an adapter's name; None for the base."""
        return self.name if self.version is not None else None

    @property
    def loras(self) -> tuple[LoraRef, ...]:
        return () if self.version is None else (LoraRef(self.version),)

    @property
    def fingerprint(self) -> str | None:
        """`system_fingerprint` of the answers: which content of the adapter gave them."""
        return None if self.version is None else f"fp_{self.version[:12]}"

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
        }


class Catalog:
    """The served models in the order in which they are listed."""

    def __init__(self, base: ServedModel, adapters: Iterable[ServedModel] = ()) -> None:
        self.base = base
        self._models = {model.name: model for model in (base, *adapters)}

    def get(self, name: str) -> ServedModel:
        """The model of that name; a 404 where there is none."""
        model = self._models.get(name)
        if model is None:
            raise model_not_found()
        return model

    def all(self) -> tuple[ServedModel, ...]:
        return tuple(self._models.values())
