"""The HTTP requests of one server, by route and status, under the names that vLLM's dashboards read.

vLLM gets these two series from prometheus-fastapi-instrumentator. Probes, scrapes and the page's files are not counted.
A part of `metrics`.
"""

from prometheus_client import CollectorRegistry, Counter, Histogram

NO_HANDLER = "none"  # no route has this path, or the request was refused before its route was looked up
OTHER_METHOD = "other"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0)


class HttpMetrics:
    """Counts answered requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "http_requests",
            "Answered HTTP requests, by route, method and class of status. Probes and scrapes are not counted.",
            ["handler", "method", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "From a request's head to the end of its answer, by route and method.",
            ["handler", "method"],
            buckets=_BUCKETS,
            registry=registry,
        )

    def observe(self, handler: str | None, method: str, status: int, seconds: float) -> None:
        """Count a request. handler: its route's pattern, never a client's path; None: no route has its path."""
        handler, method = handler or NO_HANDLER, method if method in _METHODS else OTHER_METHOD
        self._requests.labels(handler, method, f"{status // 100}xx").inc()
        self._seconds.labels(handler, method).observe(seconds)
