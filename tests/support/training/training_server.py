"""The HTTP side with training, over the made-up model of `adapter_server`; the trainer is the fake one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from guanaco.server.api.http.auth import KeyRing
from guanaco.server.api.server import make_server
from guanaco.server.training.jobs.limits import TrainLimits
from guanaco.server.training.jobs.process import TrainerCommand
from guanaco.server.training.jobs.service import TrainingService
from support.server.adapter_server import AdapterServer, make_adapter_server
from support.training.job_runner import CHECKER, TRAINER

ADMIN, ALICE, BOB, CAROL = "sesame", "sk-alice", "sk-bob", "sk-carol"  # Carol may not train


def key_id(key: str) -> str:
    """The id that a server gives to a key."""
    found = KeyRing([key]).find(key.encode())
    assert found is not None
    return found.id


class TrainingServer(AdapterServer):
    """`with make_training_server(directory) as server:`"""

    training: TrainingService

    def http(self, key: str | None = ALICE) -> httpx.Client:
        """A client with a key."""
        return self.client(headers={} if key is None else {"Authorization": f"Bearer {key}"})


def make_training_server(
    directory: Path,
    *,
    keys: Sequence[str] = (ALICE, BOB, CAROL),
    limits: TrainLimits | None = None,
    is_available: bool = True,
    checker: Sequence[str] = CHECKER,
    env: dict[str, str] | None = None,
    **settings: Any,
) -> TrainingServer:
    """A server that is not started yet; the adapter that its jobs make is `directory/root/made`.

    Whatever `directory` holds of an earlier one comes back."""
    ids = tuple(key_id(key) for key in keys if key != CAROL)
    made = make_adapter_server(directory, keys=keys, **{"train_key": ids, **settings})
    made.source("made", seed=5)
    command = TrainerCommand(
        "base", 1, 5, 2e-4, TRAINER, checker, {"FAKE_ADAPTER": str(made.root / "made"), **(env or {})}
    )
    service = TrainingService(
        directory / "training", limits or TrainLimits(), command, is_available=is_available, poll_seconds=0.02
    )
    service.open()
    object.__setattr__(made.state, "training", service)
    made.state.metrics.set_training(service.numbers)
    sources = made.manager._sources
    sources._policy = replace(sources._policy, trained=service.jobs.adapters)
    server: TrainingServer = made  # type: ignore[assignment]
    server.__class__ = TrainingServer
    server.training = service
    server.server = make_server(made.state, made._started.set)
    return server
