"""The `guanaco` program: everything else is imported here, so that Ctrl-C while it is imported or loaded is one line.

Imports nothing at the top but the standard library. Called by the console script.
"""

import sys

EXIT_INTERRUPTED = 130  # 128 plus SIGINT, as shells report it


def main() -> None:
    """Run the command line. Text that the terminal's encoding does not have is replaced, never an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        from guanaco.server.commands.main import main as run

        run()
    except KeyboardInterrupt:
        print("guanaco: interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
