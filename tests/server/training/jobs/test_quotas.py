"""What counts in a key's quotas, and what stays of jobs that are forgotten."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guanaco.models.error_codes import ErrorCode
from guanaco.server.training.jobs.disk import new_id
from guanaco.server.training.jobs.errors import RequestRefused
from guanaco.server.training.jobs.limits import TrainLimits
from guanaco.server.training.jobs.records import FILE, JOB, Hyperparameters, Status
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


def test_a_job_that_leaves_all_to_the_trainer_is_planned_too(tmp_path: Path) -> None:
    """Three epochs of 60 rows, of which 6 are held out, in batches of four."""
    checker = (sys.executable, "-I", "-S", "-c", "print('{\"rows\": 60}')")

    async def work() -> None:
        for most, outcome in ((40, "failed"), (41, "succeeded")):
            limits = TrainLimits(max_steps_per_key=most)
            async with Room(tmp_path / outcome, limits=limits, checker=checker) as room:
                done = await room.until((await room.create()).id, "failed", "succeeded")
                assert done.status == outcome
                assert bool(starts(room, done.id)) == (outcome == "succeeded")
                if done.error is not None:
                    assert "has 41 steps, and this API key has 40" in done.error["message"]

    run(work)


def test_jobs_that_fail_at_once_do_not_reset_a_quota(tmp_path: Path) -> None:
    async def work() -> None:
        async with Room(tmp_path, limits=TrainLimits(max_kept_jobs_per_key=1)) as room:
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


def test_a_forgotten_job_leaves_the_adapter_of_its_model_and_nothing_else(tmp_path: Path) -> None:
    async def work() -> None:
        async with Room(tmp_path, limits=TrainLimits(max_kept_jobs_per_key=1)) as room:
            jobs = room.service.jobs
            trained = await room.until((await room.create()).id, "succeeded")
            assert jobs.adapter(trained.id).is_dir()
            # The records of two days ago count in no quota, and the older one is one too many.
            results = new_id(FILE)
            room.files.add_result(ALICE.digest, "step_metrics.csv", b"step\n", results)
            uploaded = room.upload()
            # No job may take a file with it that its key has uploaded, whatever its record says.
            old = replace(trained, id=new_id(JOB), created_at=1, finished_at=1, result_files=(results, uploaded))
            failed = replace(old, id=new_id(JOB), status=Status.FAILED)
            for job in (old, failed):
                jobs.adapter(job.id).mkdir()
                jobs.add(job)
            jobs.add(replace(trained, id=new_id(JOB), created_at=trained.created_at + 1))
            assert {old.id, failed.id}.isdisjoint(job.id for job in jobs.all())
            assert jobs.adapter(old.id).is_dir()
            assert not jobs.adapter(failed.id).exists()
            kept = {file.id for file in room.files.of(ALICE.digest)}
            assert {uploaded, *trained.result_files} <= kept
            assert results not in kept
            assert not jobs.folder(old.id).exists()

    run(work)
