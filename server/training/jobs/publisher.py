"""Publishes trained adapters through the life cycle of all adapters, so that the server answers with them.

The only file of this room that knows `server.adapters`. A job's adapter has the source `job:ftjob-…`. It gets its name
only if the name is free, or stands for an adapter that a job of the same key made.
"""

import logging
from pathlib import Path
from typing import Any

from guanaco.adapters.errors import AdapterError
from guanaco.models.error_codes import ErrorCode
from guanaco.server.adapters.manager import AdapterManager
from guanaco.server.adapters.sources import LoadRequest, job_source
from guanaco.server.training.jobs.disk import read_json
from guanaco.server.training.jobs.records import JOB, Job
from guanaco.server.training.jobs.runner import PublishError
from guanaco.server.training.jobs.store import JobStore

logger = logging.getLogger("guanaco.training")

_TRIES = 4  # attempts to publish; others may take or change the name while the adapter is read
_RACES = (ErrorCode.NAME_TAKEN, ErrorCode.VERSION_CONFLICT)


class AdapterPublisher:
    """Publishes through one adapter manager."""

    def __init__(self, manager: AdapterManager, jobs: JobStore) -> None:
        self._manager = manager
        self._jobs = jobs

    def may_have(self, owner: str, name: str) -> bool:
        """See `Publisher`."""
        return self._version_to_replace(owner, name) is not None or not self._is_taken(name)

    async def version(self, job: Job) -> str:
        """See `Publisher`."""
        try:
            return str((await self._manager.check(job.name, job_source(job.id)))["version"])
        except AdapterError as error:
            raise PublishError(_message(error)) from None

    async def publish(self, job: Job) -> str:
        """See `Publisher`. If the name was taken meanwhile, a part of the job's id is appended to it."""
        for _ in range(_TRIES):
            name = job.name
            if not self.may_have(job.owner, name):
                name = f"{job.name[:51]}-{job.id.removeprefix(JOB + '-')[:12]}"
            before = self._version_to_replace(job.owner, name)
            # A name that exists keeps its profile: the operator may have opened it to other keys.
            profile = self._profile(job) if before is None else None
            wanted = LoadRequest(name, job_source(job.id), before is not None, before, profile)
            try:
                await self._manager.load(wanted)
            except AdapterError as error:
                if error.code in _RACES:
                    continue
                raise PublishError(_message(error)) from None
            return name
        raise PublishError("the model's name changed again and again while it was published; create the job again")

    async def unload(self, owner: str, name: str) -> bool:
        """See `Publisher`."""
        if self._version_to_replace(owner, name) is None:
            return False
        await self._manager.unload(name)
        return True

    def _profile(self, job: Job) -> dict[str, Any]:
        """The profile beside the adapter, with the key that made it as the only allowed key."""
        beside = read_json(Path(self._jobs.adapter(job.id)) / "guanaco.json") or {}
        return {**beside, "allowed_keys": [job.key_id]}

    def _version_to_replace(self, owner: str, name: str) -> str | None:
        """The version that a name stands for, if a job of this key made it; else None."""
        entry = self._manager.registry.resolve(name)
        if entry is None or entry.version not in self._jobs.versions(owner, name):
            return None
        return entry.version

    def _is_taken(self, name: str) -> bool:
        if self._manager.registry.is_taken(name):
            return True
        try:
            self._manager.registry.check_free(name)
        except AdapterError as error:
            if error.code is not ErrorCode.NAME_TAKEN:
                raise
            return True
        return False


def _message(error: AdapterError) -> str:
    """The message for the client. It has no details, since they may hold the server's paths; the log has them."""
    logger.warning("a trained adapter was not published: %s", error)
    return f"the trained adapter was not published ({error.code}); the server's log and its operator can say more"
