"""What counts in a key's quotas, and what stays of jobs that are forgotten."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guanaco.models.error_codes import ErrorCode
from guanaco.server.training.jobs.disk import new_id
from guanaco.server.training.jobs.errors import RequestRefused
from guanaco.server.training.jobs.limits import TrainLimits
from guanaco.server.training.jobs.records import JOB, Hyperparameters, Status
from support.training.job_runner import ALICE, BOB, Room, starts

LONG = {"FAKE_STEPS": "10000", "FAKE_SECONDS": "0.01"}


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def test_quotas_of_jobs_steps_and_hours(tmp_path: Path) -> None:
    async def work() -> None:
        async with Room(tmp_path / "jobs", limits=TrainLimits(max_jobs_per_key=1), **LONG) as room:
            first = await room.create()
            with pytest.raises(RequestRefused, match="1 jobs of this API key") as refused:
                await room.create()
            assert refused.value.code == ErrorCode.TRAINING_QUOTA_EXCEEDED
            await room.create(BOB)
            await room.service.cancel(ALICE, first.id)
            await room.create()
        async with Room(tmp_path / "steps", limits=TrainLimits(max_steps_per_key=10), FAKE_STEPS="6") as room:
            planned = await room.create(hyperparameters=Hyperparameters(n_epochs=11, batch_size=3))
            refused_job = await room.until(planned.id, "failed")
            assert refused_job.error is not None
            assert refused_job.error["code"] == "training_quota_exceeded"
            assert not starts(room, planned.id)
            await room.until((await room.create()).id, "succeeded")
            # Six of ten are used; the trainer says that it needs six more.
            stopped = await room.until((await room.create()).id, "failed", "succeeded")
            assert stopped.error is not None
            assert "has 6 steps, and this API key has 10" in stopped.error["message"]
            await room.until((await room.create(BOB)).id, "succeeded")
        limits = TrainLimits(max_hours_per_key=0.1 / 3600)
        async with Room(tmp_path / "hours", limits=limits, **LONG) as room:
            over = await room.until((await room.create()).id, "failed")
            assert over.error is not None
            assert "hours of training" in over.error["message"]
            await room.idle()
            with pytest.raises(RequestRefused, match="hours of 24"):
                await room.create()

    run(work)


def test_jobs_that_fail_at_once_do_not_reset_a_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guanaco.server.training.jobs.store.MAX_KEPT_JOBS_PER_KEY", 1)

    async def work() -> None:
        async with Room(tmp_path) as room:
            trained = await room.until((await room.create()).id, "succeeded")
            failed = [
                replace(trained, id=new_id(JOB), created_at=trained.created_at + n, step=0, train_seconds=0.0)
                for n in (1, 2)
            ]
            for job in failed:
                room.service.jobs.add(job)
            kept = {job.id for job in room.service.jobs.all()}
            assert kept == {trained.id, failed[1].id}, "the other one counts in no quota"

    run(work)


def test_a_forgotten_job_leaves_the_adapter_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guanaco.server.training.jobs.store.MAX_KEPT_JOBS_PER_KEY", 1)

    async def work() -> None:
        async with Room(tmp_path) as room:
            jobs = room.service.jobs
            trained = await room.until((await room.create()).id, "succeeded")
            assert jobs.adapter(trained.id).is_dir()
            # The records of two days ago count in no quota, and the older one is one too many.
            old = replace(trained, id=new_id(JOB), created_at=1, finished_at=1)
            failed = replace(old, id=new_id(JOB), status=Status.FAILED)
            for job in (old, failed):
                jobs.adapter(job.id).mkdir()
                jobs.add(job)
            jobs.add(replace(trained, id=new_id(JOB), created_at=trained.created_at + 1))
            assert {old.id, failed.id}.isdisjoint(job.id for job in jobs.all())
            assert jobs.adapter(old.id).is_dir()
            assert not jobs.adapter(failed.id).exists()

    run(work)
