"""`python child.py LOCK NICE PARENT COMMAND…`: becomes a trainer.

Holds the lock file for as long as the trainer lives, so that a new server sees one that an earlier server left behind.
The kernel sends it SIGTERM when the server dies, at which a trainer writes a checkpoint. Then it runs the command.
"""

import ctypes
import fcntl
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Never returns: this process becomes the command."""
    lock, nice, parent, *command = arguments
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.ftruncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())
    os.set_inheritable(handle, True)
    os.nice(int(nice))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it died before the kernel was asked
            sys.exit(128 + signal.SIGTERM)
    os.execv(command[0], command)  # noqa: S606 (an absolute path of this interpreter; no shell)


if __name__ == "__main__":
    main(sys.argv[1:])
