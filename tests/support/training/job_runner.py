"""The room of jobs over the fake trainer, without an adapter manager. As a program: a server to be killed.

`python job_runner.py DIRECTORY HOLD`: takes up what is in the directory, and stays where HOLD says: `validating`,
`running` or `publishing`. It prints a line when it is there.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

from guanaco.server.config import harmless_environment
from guanaco.server.training.jobs.disk import read_lines
from guanaco.server.training.jobs.files import FileStore
from guanaco.server.training.jobs.limits import TrainLimits
from guanaco.server.training.jobs.process import TrainerCommand
from guanaco.server.training.jobs.records import Hyperparameters, Job, Owner
from guanaco.server.training.jobs.runner import JobRunner, PublishError
from guanaco.server.training.jobs.service import JobRequest, TrainingService

ALICE, BOB = Owner("a" * 64, "aaaaaaaa"), Owner("b" * 64, "bbbbbbbb")
ROWS = 3
CHECKER = (sys.executable, "-I", "-S", "-c", f"print('{{\"rows\": {ROWS}}}')")
TRAINER = (sys.executable, "-S", str(Path(__file__).with_name("fake_trainer.py")))
WAIT = 30.0


class FakePublisher:
    """Publishes nothing; `error` is raised, `gate` holds."""

    def __init__(self) -> None:
        self.published: list[str] = []
        self.taken: dict[str, str] = {}  # name → the owner that it is for
        self.error: str | None = None
        self.gate: asyncio.Event | None = None
        self.reached = asyncio.Event()

    def may_have(self, owner: str, name: str) -> bool:
        return self.taken.get(name, owner) == owner

    async def version(self, job: Job) -> str:
        return "v" * 64

    async def publish(self, job: Job) -> str:
        self.reached.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise PublishError(self.error)
        self.published.append(job.id)
        return job.name

    async def unload(self, owner: str, name: str) -> bool:
        return False


class Room:
    """A service over a directory, and its publisher. `async with Room(directory, FAKE_STEPS=…) as room:`"""

    def __init__(self, directory: Path, *, checker: Any = CHECKER, limits: TrainLimits | None = None, **env: str):
        command = TrainerCommand("base", 1, 5, 2e-4, TRAINER, checker, {**harmless_environment(), **env})
        self.service = TrainingService(
            directory, limits or TrainLimits(), command, is_available=True, poll_seconds=0.02
        )
        self.publisher = FakePublisher()

    async def __aenter__(self) -> "Room":
        self.service.open()
        self.service.start(self.publisher)  # type: ignore[arg-type]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.service.close()

    @property
    def files(self) -> FileStore:
        return self.service.files

    @property
    def runner(self) -> JobRunner:
        assert self.service._runner is not None
        return self.service._runner

    def upload(self, owner: Owner = ALICE, content: bytes = b'{"prompt": "a", "completion": "b"}\n') -> str:
        upload = self.files.begin(owner.digest)
        upload.write(content)
        return self.files.add(upload, "chat.jsonl").id

    async def create(self, owner: Owner = ALICE, **fields: Any) -> Job:
        return await self.service.create(owner, JobRequest("base", self.upload(owner), **fields))

    async def until(self, job_id: str, *statuses: str) -> Job:
        """Wait for one of these states; the job then."""
        async with asyncio.timeout(WAIT):
            while True:
                job = self.service.jobs.get(job_id)
                assert job is not None
                if job.status.value in statuses:
                    return job
                await asyncio.sleep(0.005)

    async def until_step(self, job_id: str, step: int) -> Job:
        async with asyncio.timeout(WAIT):
            while (job := self.service.jobs.get(job_id)) is None or job.step < step:
                await asyncio.sleep(0.005)
        return job

    async def idle(self) -> None:
        """Wait until nothing trains, and what a job has left is removed."""
        async with asyncio.timeout(WAIT):
            while self.runner._current is not None:
                await asyncio.sleep(0.005)

    def messages(self, job_id: str) -> list[str]:
        """The events' texts, the first one first."""
        return [event["message"] for event in self.service.jobs.events(job_id)][::-1]


def is_running(pid: int) -> bool:
    """Whether a process works. One that has ended and that nobody has asked about yet doesn't."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def starts(room: Room, job_id: str) -> list[dict[str, Any]]:
    """How the trainer was started, each time."""
    return list(read_lines(room.service.jobs.folder(job_id) / "starts.jsonl"))


async def _hold(directory: Path, where: str) -> None:
    slow = (sys.executable, "-c", "import time; print('at it', flush=True); time.sleep(10)")
    steps = {"FAKE_STEPS": "1000", "FAKE_SECONDS": "0.05"} if where == "running" else {}
    room = Room(directory, checker=slow if where == "validating" else CHECKER, **steps)
    if where == "publishing":
        room.publisher.gate = asyncio.Event()
    async with room:
        job = await room.create(hyperparameters=Hyperparameters(n_epochs=2), suffix="support")
        if where == "publishing":
            await room.publisher.reached.wait()
        elif where == "running":
            await room.until_step(job.id, 2)
        print(job.id, flush=True)
        await asyncio.sleep(WAIT)


if __name__ == "__main__":
    asyncio.run(_hold(Path(sys.argv[1]), sys.argv[2]))
