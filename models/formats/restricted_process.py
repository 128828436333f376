"""A child process that reads untrusted input: it gives up its privileges first, and it ends with its parent.

Both sides are here. The parent starts a module of ours and exchanges bytes with it, each time with a time limit. The
child gives up files, processes, memory and time before it reads the first byte. Used for chat templates, tokenizers,
grammars and the conversion of adapters. Apart from our exceptions it imports only the standard library, so that a child
starts fast.
"""

import ctypes
import fcntl
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, Self

from guanaco.models.errors import GuanacoError

_PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h
_F_SETSIG = 10  # linux/fcntl.h
_SIGNALS_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_LENGTH = struct.Struct(">I")
_CHUNK = 1 << 16


class ProcessTimeout(GuanacoError):
    """The child did not answer in time. It has been killed."""


class ProcessEnded(GuanacoError):
    """The child ended, or it sent something that is no answer. It has been killed."""

    def __init__(self, problem: str, status: int | None = None) -> None:
        """status: the exit status, if the child ended by itself or was killed from outside (then minus the signal)."""
        super().__init__(problem)
        self.status = status

    @property
    def was_killed(self) -> bool:
        """Whether the child was killed from outside: by an operator, by a kernel without memory, or with its parent."""
        return self.status is not None and -self.status in _SIGNALS_FROM_OUTSIDE


@dataclass(frozen=True)
class Budget:
    """The resources that a child may use from `restrict` on."""

    memory_bytes: int  # address space, with what the interpreter has already
    file_bytes: int = 0  # the largest size to which a file may grow
    cpu_seconds: int | None = None  # of its whole life


def restrict(budget: Budget) -> None:
    """Limit this process to the budget's memory, file size and time, and forbid new files, sockets and processes. This
    cannot be undone."""
    limits = {
        resource.RLIMIT_NOFILE: 0,  # no further file, socket or pipe; those that are open stay open
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: budget.file_bytes,
        resource.RLIMIT_AS: budget.memory_bytes,
    }
    if budget.cpu_seconds is not None:
        limits[resource.RLIMIT_CPU] = budget.cpu_seconds
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def limit_cpu_from_now(seconds: int) -> None:
    """Have the kernel end this process after `seconds` more of processor time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 1, hard))


def follow_parent(lifeline: int) -> None:
    """Have the kernel kill this process when the parent ends, however it ends and whatever this process does then.

    lifeline: the reading end of a pipe to which the parent never writes. The kernel signals its end at once. The death
    signal of prctl is not used: it comes when the thread that started the child ends, not when the parent does.
    """
    fcntl.fcntl(lifeline, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_RDONLY | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # the parent ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def read_frame(stream: BinaryIO) -> bytes | None:
    """The child's side: the next message, None at the end."""
    head = stream.read(_LENGTH.size)
    return stream.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else None


def write_frame(stream: BinaryIO, *parts: bytes) -> None:
    """The child's side: one message, made of `parts`."""
    stream.write(_LENGTH.pack(sum(map(len, parts))))
    for part in parts:
        stream.write(part)
    stream.flush()


class RestrictedProcess:
    """A module of ours, run as `python -I -m MODULE LIFELINE ARGUMENTS…`, which restricts itself. Not thread-safe."""

    def __init__(self, module: str, arguments: Sequence[str] = (), *, pass_fds: Sequence[int] = ()) -> None:
        """Start it. Raises OSError if no process can be started."""
        lifeline, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own module, by this interpreter
                [sys.executable, "-I", "-m", module, str(lifeline), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                pass_fds=(lifeline, *pass_fds),
                cwd="/",
                env={"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # Ctrl-C is for the parent
            )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(lifeline)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def exchange(self, message: bytes, *, seconds: float, max_bytes: int) -> bytes:
        """Send a message and wait for the answer, both within `seconds`. max_bytes: the longest answer.

        Raises ProcessTimeout or ProcessEnded; then the child has ended.
        """
        deadline = time.monotonic() + seconds
        self._send(_LENGTH.pack(len(message)) + message, deadline)
        return self.receive(deadline=deadline, max_bytes=max_bytes)

    def receive(self, *, deadline: float, max_bytes: int) -> bytes:
        """The child's next message, which must be there before `deadline` on the monotonic clock."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
        if length > max_bytes:
            self.close()
            raise ProcessEnded(f"it announced {length} bytes")
        return self._read(length, deadline)

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self._to, select.POLLOUT, deadline)
            try:
                view = view[os.write(self._to, view[:_CHUNK]) :]
            except BlockingIOError:
                continue
            except OSError:
                raise self._ended() from None

    def _read(self, num_bytes: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < num_bytes:
            self._wait(self._from, select.POLLIN, deadline)
            try:
                chunk = os.read(self._from, min(num_bytes - len(data), 1 << 20))
            except BlockingIOError:
                continue
            except OSError:
                chunk = b""
            if not chunk:
                raise self._ended()
            data += chunk
        return bytes(data)

    def _wait(self, handle: int, event: int, deadline: float) -> None:
        poll = select.poll()
        try:
            poll.register(handle, event)
            left = deadline - time.monotonic()
            is_ready = left > 0 and poll.poll(left * 1000)
        except (OSError, ValueError):  # another thread has closed it
            raise self._ended() from None
        if not is_ready:
            self.close()
            raise ProcessTimeout

    def _ended(self) -> ProcessEnded:
        self.close()
        status = self._process.returncode
        return ProcessEnded(f"status {status}", status)

    def kill(self) -> None:
        """End it at once, from another thread. The thread that exchanges messages gets ProcessEnded."""
        self._process.kill()

    def close(self) -> None:
        """End it, and close its pipes. May be called again."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
