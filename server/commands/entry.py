"""The `guanaco` program. Ctrl-C ends it with one line, also while the rest of the program is being imported.

So its top imports only the standard library and `streams`. Called by the console script. The server runs it as a module
to start a fine-tuning job.
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
