"""The counters of the server, for Prometheus."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_TOKENS = (64, 256, 1_024, 4_096, 16_384, 65_536, 262_144)


class Metrics:
    """The counters of one server; two in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("kvote_requests", "Requests answered", ["endpoint", "status"], **own)
        self.waiting = Gauge("kvote_requests_waiting", "Requests in the queue", **own)
        self.running = Gauge("kvote_requests_running", "Prompts being read and answers being generated", **own)
        self.prompt_tokens = Counter("kvote_prompt_tokens", "Tokens of prompts read", **own)
        self.generated_tokens = Counter("kvote_generated_tokens", "Tokens generated", **own)
        self.reused_tokens = Counter("kvote_reused_tokens", "Tokens of prompts that were held already", **own)
        self.nbytes = Gauge("kvote_cache_bytes", "Bytes that caches in use hold", **own)
        self.peak = Gauge("kvote_cache_peak_bytes", "Most bytes that the cache of one request held", **own)
        self.documents = Gauge("kvote_documents", "Documents held", **own)
        self.document_bytes = Gauge("kvote_document_bytes", "Bytes that documents hold", **own)
        self.tokens_read = Histogram("kvote_tokens_read", "Tokens that the last step read", buckets=_TOKENS, **own)
        self.seconds = Histogram("kvote_first_token_seconds", "Time to the first token", buckets=_SECONDS, **own)

    @property
    def peak_bytes(self) -> float:
        return float(self.registry.get_sample_value("kvote_cache_peak_bytes") or 0)

    def first(self, arrived: float) -> float:
        """Notes the time to a request's first token, and returns it in seconds."""
        seconds = time.perf_counter() - arrived
        self.seconds.observe(seconds)
        return seconds

    def text(self) -> bytes:
        return generate_latest(self.registry)
