"""Jobs through their states over a fake trainer: order, cancel, quotas, failures, and servers that are killed."""

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from guanaco.models.error_codes import ErrorCode
from guanaco.server.training.jobs import service
from guanaco.server.training.jobs.errors import RequestRefused
from guanaco.server.training.jobs.process import TrainerCommand, TrainerProcess, end_left_behind
from guanaco.server.training.jobs.records import Hyperparameters
from support.training import job_runner
from support.training.job_runner import ALICE, BOB, ROWS, Room, is_running, starts

LONG = {"FAKE_STEPS": "10000", "FAKE_SECONDS": "0.01"}


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def test_a_job_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "GUANACO_ADMIN_KEY", "GUANACO_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "canary")

    async def work() -> None:
        async with Room(tmp_path, FAKE_GATE=str(tmp_path / "gate")) as room:
            chosen = Hyperparameters(n_epochs=2, batch_size=3, learning_rate_multiplier=0.5)
            validation = room.upload()
            job = await room.create(validation_file=validation, hyperparameters=chosen, seed=7, suffix="support")
            running = await room.until_step(job.id, 1)
            assert running.estimated_finish is not None
            assert room.service.numbers().jobs["running"] == 1
            (tmp_path / "gate").touch()
            done = await room.until(job.id, "succeeded", "failed")
            assert (done.fine_tuned_model, done.error, done.trained_tokens) == ("support", None, 40)
            assert (done.num_rows, done.step, done.steps) == (ROWS, 4, 4)
            assert done.started_at
            assert done.finished_at
            assert done.train_seconds > 0
            assert [c.step for c in done.checkpoints] == [1, 2, 3, 4]
            assert done.public_checkpoints()[0]["metrics"] == {"step": 4, "train_loss": 1.0, "valid_loss": 1.25}
            (result,) = done.result_files
            table = room.files.path(room.files.get(ALICE.digest, result)).read_text().splitlines()
            assert table[0] == "step,train_loss,valid_loss,learning_rate,tokens,tokens_per_second"
            assert table[1].startswith("1,4.0,5.0,")
            assert len(table) == 5
            metrics = [e["data"] for e in room.service.jobs.events(job.id) if e["type"] == "metrics"][::-1]
            assert [data["step"] for data in metrics] == [1, 2, 3, 4]
            assert metrics[0]["train_loss"] == 4.0
            (started,) = starts(room, job.id)
            asked = dict(zip(started["argv"][::2], started["argv"][1::2], strict=False))
            assert asked["--seed"] == "7"
            assert (asked["--epochs"], asked["--batch-size"], asked["--learning-rate"]) == ("2", "3", "0.0001")
            assert asked["--name"] == "support"
            assert asked["--validation-data"] == str(room.files.path(room.files.get(ALICE.digest, validation)))
            assert "canary" not in json.dumps(started["env"])
            assert started["env"]["HF_HUB_OFFLINE"] == "1"
            assert started["nice"] >= 5
            await room.idle()
            assert not (room.service.jobs.folder(job.id) / "work").exists()
            assert room.service.jobs.adapter(job.id).is_dir()

    run(work)


def test_one_job_trains_at_a_time_and_the_oldest_goes_first(tmp_path: Path) -> None:
    async def work() -> None:
        gate = tmp_path / "gate"
        async with Room(tmp_path / "d", FAKE_GATE=str(gate)) as room:
            jobs = [await room.create(), await room.create(BOB), await room.create()]
            await room.until_step(jobs[0].id, 1)
            for job in jobs[1:]:
                await room.until(job.id, "queued")
            gate.touch()
            for job in jobs:
                await room.until(job.id, "succeeded")
            assert room.publisher.published == [job.id for job in jobs] or len(set(room.publisher.published)) == 3
            assert room.publisher.published[0] == jobs[0].id

    run(work)


def test_files_that_are_wrong_fail_the_job(tmp_path: Path) -> None:
    said = {"error": {"message": "training_file: line 2: the answer is empty", "param": "training_file"}}
    checker = (sys.executable, "-c", f"print({json.dumps(json.dumps(said))})")

    async def work() -> None:
        async with Room(tmp_path, checker=checker) as room:
            failed = await room.until((await room.create()).id, "failed")
            assert failed.error == {
                "code": "invalid_training_file",
                "message": "training_file: line 2: the answer is empty",
                "param": "training_file",
            }
            assert not starts(room, failed.id)

    run(work)


@pytest.mark.parametrize(
    ("env", "code", "part", "num_starts"),
    [
        ({"FAKE_ERROR": "there is no memory for it"}, "out_of_memory", "there is no memory for it", 1),
        ({"FAKE_EARLY": "9"}, "training_failed", "ended with code 9 3 times without a step", 3),
        ({"FAKE_EARLY": "0"}, "training_failed", "ended with code 0", 3),
    ],
)
def test_a_trainer_that_fails(env: dict[str, str], code: str, part: str, num_starts: int, tmp_path: Path) -> None:
    async def work() -> None:
        async with Room(tmp_path, **env) as room:
            failed = await room.until((await room.create()).id, "failed")
            assert failed.error is not None
            assert failed.error["code"] == code
            assert part in failed.error["message"]
            assert len(starts(room, failed.id)) == num_starts
            assert room.service.jobs.events(failed.id)[0]["level"] == "error"
            assert (await room.until((await room.create()).id, "failed")).error, "the queue goes on"

    run(work)


def test_a_trainer_that_is_killed_resumes(tmp_path: Path) -> None:
    async def work() -> None:
        async with Room(tmp_path, FAKE_KILL="2") as room:
            done = await room.until((await room.create()).id, "succeeded", "failed")
            assert done.error is None
            first, second = starts(room, done.id)
            assert ("--resume" in first["argv"], "--resume" in second["argv"]) == (False, True)
            assert any("started again" in text for text in room.messages(done.id))

    run(work)


def test_an_adapter_that_is_refused_says_so_and_stays(tmp_path: Path) -> None:
    async def work() -> None:
        async with Room(tmp_path) as room:
            room.publisher.error = "the trained adapter was not published (zero_effect)"
            failed = await room.until((await room.create()).id, "failed")
            assert failed.error is not None
            assert failed.error["code"] == ErrorCode.PUBLISH_FAILED
            assert failed.fine_tuned_model is None
            assert room.service.jobs.adapter(failed.id).is_dir()

    run(work)


def test_cancel_in_every_state(tmp_path: Path) -> None:
    async def work() -> None:
        slow = (sys.executable, "-c", "import time; time.sleep(60)")
        async with Room(tmp_path / "v", checker=slow) as room:
            job = await room.create()
            assert (await room.service.cancel(ALICE, job.id)).status == "cancelled"
        async with Room(tmp_path / "r", **LONG) as room:
            running, queued = await room.create(), await room.create()
            await room.until_step(running.id, 1)
            await room.until(queued.id, "queued")
            with pytest.raises(RequestRefused) as refused:
                await room.service.cancel(BOB, running.id)
            assert refused.value.code == ErrorCode.JOB_NOT_FOUND
            assert (await room.service.cancel(ALICE, queued.id)).status == "cancelled"
            assert not starts(room, queued.id)
            (started,) = starts(room, running.id)
            cancelled = await room.service.cancel(ALICE, running.id)
            assert cancelled.status == "cancelled"
            await room.idle()
            assert not is_running(started["pid"]), "the process is gone"
            assert not room.service.jobs.adapter(running.id).exists()
            with pytest.raises(RequestRefused, match="has ended already: it is cancelled"):
                await room.service.cancel(ALICE, running.id)
        async with Room(tmp_path / "p") as room:
            room.publisher.gate = asyncio.Event()
            job = await room.create()
            await room.publisher.reached.wait()
            with pytest.raises(RequestRefused, match="is being published") as refused:
                await room.service.cancel(ALICE, job.id)
            assert refused.value.code == ErrorCode.JOB_NOT_CANCELLABLE
            room.publisher.gate.set()
            await room.until(job.id, "succeeded")

    run(work)


def test_an_orderly_end_writes_a_checkpoint_and_the_next_server_resumes(tmp_path: Path) -> None:
    async def work() -> None:
        async with Room(tmp_path, FAKE_STEPS="400", FAKE_SECONDS="0.01") as room:
            job = await room.create(suffix="support")
            await room.until_step(job.id, 3)
            (started,) = starts(room, job.id)
            await room.service.close()
            assert not is_running(started["pid"])
            before = room.service.jobs.get(job.id)
            assert before is not None
            assert before.status == "running"
        async with Room(tmp_path, FAKE_STEPS="8") as room:
            (room.service.jobs.folder(job.id) / "work").is_dir()
            done = await room.until(job.id, "succeeded")
            assert "--resume" in starts(room, job.id)[1]["argv"]
            assert done.train_seconds > before.train_seconds - 1e-9
            assert any("where it was interrupted" in text for text in room.messages(job.id))

    run(work)


@pytest.mark.parametrize("where", ["validating", "running", "publishing"])
def test_a_server_that_is_killed_in_a_state_loses_nothing(where: str, tmp_path: Path) -> None:
    script = Path(job_runner.__file__)
    path = os.pathsep.join([str(script.parents[2]), *sys.path])
    with subprocess.Popen(
        [sys.executable, script, tmp_path, where],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as server:
        assert server.stdout is not None
        job_id = server.stdout.readline().strip()
        server.send_signal(signal.SIGKILL)
        server.wait()

    async def work() -> None:
        async with Room(tmp_path, FAKE_STEPS="5") as room:
            found = room.service.jobs.get(job_id)
            assert found is not None, job_id
            events = room.messages(job_id)
            assert events[0] == "The job was created; its files are checked."
            done = await room.until(job_id, "succeeded", "failed")
            assert done.error is None
            assert room.messages(job_id)[: len(events)] == events
            assert room.publisher.published == [job_id]
            again = starts(room, job_id)
            assert [("--resume" in each["argv"]) for each in again] == {
                "validating": [False],
                "running": [False, True],
                "publishing": [False],
            }[where]
            assert not any(is_running(each["pid"]) for each in again), "no trainer is left"
            steps = [e["data"]["step"] for e in room.service.jobs.events(job_id) if e["data"]]
            assert len(steps) == len(set(steps))

    run(work)


def test_a_training_that_ended_while_no_server_looked_is_published(tmp_path: Path) -> None:
    async def work() -> None:
        async with Room(tmp_path, FAKE_GATE=str(tmp_path / "gate")) as room:
            job = await room.create()
            await room.until_step(job.id, 1)
        out = room.service.jobs.adapter(job.id)
        out.mkdir()
        answer = {"adapter": str(out), "steps": 4, "trained_tokens": 40}
        (room.service.jobs.folder(job.id) / "stdout").write_text(json.dumps(answer) + "\n")
        async with Room(tmp_path) as room:
            done = await room.until(job.id, "succeeded")
            assert (done.trained_tokens, len(starts(room, job.id))) == (40, 1)

    run(work)


def test_a_trainer_that_was_left_behind_is_ended(tmp_path: Path) -> None:
    """Also one that does not heed SIGTERM."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('deaf', 'w'); time.sleep(60)"

    async def work() -> None:
        process = TrainerProcess(tmp_path)
        await process.start([sys.executable, "-S", "-c", deaf], TrainerCommand(nice=0))
        while not (tmp_path / "deaf").exists():
            await asyncio.sleep(0.005)
        await asyncio.to_thread(end_left_behind, tmp_path, grace_seconds=0.05)
        end = await process.wait()
        assert end is not None
        assert end.code == -signal.SIGKILL
        end_left_behind(tmp_path)

    run(work)


def test_a_full_disk_fails_one_job_and_not_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with Room(tmp_path) as room:
            first = room.service.jobs.note

            def full(job_id: str, message: str, **options: Any) -> None:
                if message == "The job has started.":
                    raise OSError(28, "No space left on device")
                first(job_id, message, **options)

            monkeypatch.setattr(room.service.jobs, "note", full)
            failed = await room.until((await room.create()).id, "failed")
            assert failed.error is not None
            assert "No space left on device" in failed.error["message"]
            monkeypatch.undo()
            await room.until((await room.create()).id, "succeeded")

    run(work)


def test_a_trainer_does_not_outlive_the_watch_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with Room(tmp_path, **LONG) as room:
            note = room.service.jobs.note

            def full(job_id: str, message: str, **options: Any) -> None:
                if message.startswith("Step"):
                    raise OSError(28, "No space left on device")
                note(job_id, message, **options)

            monkeypatch.setattr(room.service.jobs, "note", full)
            job = await room.create()
            await room.until(job.id, "failed")
            (started,) = starts(room, job.id)
            assert not is_running(started["pid"])
            monkeypatch.undo()

    run(work)


def test_names(tmp_path: Path) -> None:
    async def work() -> None:
        async with Room(tmp_path, **LONG) as room:
            room.publisher.taken["theirs"] = BOB.digest
            with pytest.raises(RequestRefused, match="has this name already") as refused:
                await room.create(suffix="theirs")
            assert (refused.value.code, refused.value.param) == (ErrorCode.NAME_TAKEN, "suffix")
            job = await room.create()
            assert job.name.startswith("ft-")

    run(work)


def test_a_lock_that_is_let_go_in_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that a killed server was starting has that server's lock until it runs its own program."""
    held = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    monkeypatch.setattr(service.time, "sleep", lambda _: os.close(held))
    handle = os.open(tmp_path / "lock", os.O_RDWR)
    service._take_lock(handle)
    os.close(handle)


def test_a_second_server_does_not_get_the_directory(tmp_path: Path) -> None:
    async def work() -> None:
        async with Room(tmp_path):
            with pytest.raises(BlockingIOError):
                Room(tmp_path).service.open()

    run(work)


def test_damaged_records_are_left_out_and_named(tmp_path: Path) -> None:
    async def work() -> None:
        async with Room(tmp_path) as room:
            job = await room.create()
            await room.until(job.id, "succeeded")
            whole = await room.create()
            await room.until(whole.id, "succeeded")
            events = room.service.jobs.folder(whole.id) / "events.jsonl"
        (room.service.jobs.folder(job.id) / "job.json").write_text("{}")
        with events.open("ab") as file:
            file.write(b'{"id": "cut o')  # a crash in the middle of a line
        room = Room(tmp_path)
        (note,) = room.service.open()
        assert job.id in note
        assert room.service.jobs.get(job.id) is None
        room.service.jobs.note(whole.id, "after")
        assert [room.messages(whole.id)[0], room.messages(whole.id)[-1]] == [
            "The job was created; its files are checked.",
            "after",
        ]
        await room.service.close()

    run(work)
