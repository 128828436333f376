"""The `guanaco` program: everything else is imported here, so that Ctrl-C while it is imported or loaded is one line.

Imports nothing at the top but the standard library. Called by the console script.
"""

import contextlib
import signal

from guanaco.server.commands.streams import end_interrupted, prepare_streams


def main() -> None:
    """Run the command line. Text that the terminal's encoding does not have is replaced, never an error."""
    try:
        prepare_streams()
        from guanaco.server.commands.main import main as run

        run()
    except KeyboardInterrupt:
        end_interrupted()
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on another Ctrl-C would only give a traceback
