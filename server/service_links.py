"""Recognises the environment variables that Kubernetes and Docker name after a service and set in each container.

A service called `guanaco` or `guanaco-gpu` makes variables that start like our own: `GUANACO_PORT=tcp://10.0.0.1:80`,
`GUANACO_SERVICE_HOST`, `GUANACO_GPU_PORT_80_TCP_ADDR`. They are not settings. Used by `config`.
"""

import re

# Names after the prefix GUANACO_: those of Kubernetes and Docker, then ENV, which only Docker's links have.
_SERVICE = r"(?:[A-Z0-9_]+_)?"
_BY_NAME = re.compile(
    rf"{_SERVICE}(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9_]+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_PROTO|_PORT|_ADDR)?)"
    rf"|{_SERVICE}ENV_\w+"
)
# `PORT` is also a setting, and `NAME` (of Docker's links) may be a typing error. So their values decide.
_BY_VALUE = (
    (re.compile(rf"{_SERVICE}PORT"), re.compile(r"(?:tcp|udp|sctp)://.*")),
    (re.compile(rf"{_SERVICE}NAME"), re.compile(r"/[^/]+/.+")),
)


def is_service_link(name: str, value: str) -> bool:
    """Whether a variable was set for a service. name: without our prefix, in upper or lower case."""
    upper = name.upper()
    if _BY_NAME.fullmatch(upper):
        return True
    return any(names.fullmatch(upper) and values.fullmatch(value) for names, values in _BY_VALUE)
