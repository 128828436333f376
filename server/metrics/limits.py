"""Limits of the queue and of memory, with which alerts compare the present use. A part of `metrics`."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Gauge


def publish_limits(
    registry: CollectorRegistry, *, max_queued_requests: int, memory: Callable[[], tuple[int, int]]
) -> None:
    """Add the limits to a registry. Call once. memory: (bytes in all, bytes left); called at every scrape."""

    def gauge(name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=registry)

    gauge("guanaco_max_queued_requests", "Requests that may wait: --max-queued-requests.").set(max_queued_requests)
    gauge("guanaco_memory_limit_bytes", "Memory that the container or the machine has.").set_function(
        lambda: memory()[0]
    )
    gauge("guanaco_memory_available_bytes", "Memory that is left.").set_function(lambda: memory()[1])
