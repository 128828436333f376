"""A program: the real server process over the fake engine. Prints its port once it takes requests.

python serve_fake.py '{"step_seconds": 0.05, "settings": {"drain_timeout": 1}}'
"""

import json
import logging
import sys

from guanaco.server.api.http.access_log import start_logging
from guanaco.server.api.server import bind, serve
from support.server.api_server import make_state
from support.server.fake_engine import Script


def main() -> int:
    options = json.loads(sys.argv[1])
    stop_logging = start_logging("debug")
    state = make_state(**options.get("settings", {}))
    state.engine.script = Script(step_seconds=options.get("step_seconds", 0.0))
    sock = bind(state.settings)
    code = serve(state, sock, on_started=lambda: print(sock.getsockname()[1], flush=True))
    logging.getLogger("guanaco.test").info("ended", extra={"fields": {"exit_code": code}})
    stop_logging()
    return code


if __name__ == "__main__":
    sys.exit(main())
