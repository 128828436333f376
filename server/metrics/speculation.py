"""vLLM's series about draft tokens. Used by `server`."""

from prometheus_client import CollectorRegistry, Counter

from guanaco.server.engine.speculation.speculator import MAX_DRAFT_TOKENS


class SpeculationMetrics:
    """How many draft tokens were verified, and how many of them were right, in all and by their place in the draft."""

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, list(labels), registry=registry).labels(**labels)

        self._drafts = counter("vllm:spec_decode_num_drafts", "Drafts that were verified.")
        self._drafted = counter("vllm:spec_decode_num_draft_tokens", "Draft tokens that were verified.")
        self._accepted = counter("vllm:spec_decode_num_accepted_tokens", "Draft tokens that were right.")
        by_place = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens that were right, by their place in the draft.",
            [*labels, "position"],
            registry=registry,
        )
        self._by_place = [by_place.labels(**labels, position=str(place)) for place in range(MAX_DRAFT_TOKENS)]

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Count one draft."""
        self._drafts.inc()
        self._drafted.inc(num_drafted)
        self._accepted.inc(num_accepted)
        for place in self._by_place[:num_accepted]:
            place.inc()
