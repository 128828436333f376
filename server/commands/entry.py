"""The `guanaco` program. It imports everything else itself, so that Ctrl-C during an import also ends with one line.

Imports nothing at the top but the standard library. Called by the console script, and run as a
module by the server, which starts trainers.
"""

import contextlib
import signal

from guanaco.server.commands.streams import end_interrupted, heed_sigterm, prepare_streams


def main() -> None:
    """Run the command line. Characters that the terminal's encoding lacks are replaced, and never an error."""
    try:
        prepare_streams()
        heed_sigterm()
        from guanaco.server.commands.main import main as run

        run()
    except KeyboardInterrupt:
        end_interrupted()
    finally:
        with contextlib.suppress(ValueError):  # raised outside of the main thread
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # another Ctrl-C would only print a traceback


if __name__ == "__main__":
    main()
