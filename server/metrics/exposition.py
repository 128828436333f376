"""Chooses the format in which a scraper gets the series, by its Accept header. A part of `metrics`."""

import re
from collections.abc import Callable
from functools import partial

from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

_BAD_VERSION = re.compile(r"version=(?!\d{1,9}(\.\d{1,9})*\s*([;,]|$))", re.ASCII)  # the library would raise TypeError


def encoder(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    """(the function that writes the series, its content type): prometheus_client's choice, but "underscores" escaping
    is left out.

    Prometheus 2 asks for OpenMetrics without an escaping. prometheus_client then means "underscores" and writes
    `vllm_…` for `vllm:…` in samples (prometheus/client_python, issue 1177), so that every `vllm:` series is missing.
    All names here are valid under that escaping, so nothing need be escaped.
    """
    encode, content_type = choose_encoder("" if _BAD_VERSION.search(accept) else accept)
    kind, _, rest = content_type.partition(";")
    escaping = rest.partition("escaping=")[2] or openmetrics.UNDERSCORES
    if escaping != openmetrics.UNDERSCORES:
        return encode, content_type
    if kind == "application/openmetrics-text":
        version = rest.partition("version=")[2].partition(";")[0]
        return partial(openmetrics.generate_latest, escaping=openmetrics.ALLOWUTF8, version=version), content_type
    return partial(generate_latest, escaping=openmetrics.ALLOWUTF8), content_type
