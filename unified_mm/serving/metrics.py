"""The server's metrics, which Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable

import jax
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counts and times of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "unified_mm_requests",
            "Requests by route and status; status 0: who asked had gone.",
            ("route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "unified_mm_request_seconds",
            "From a request's head to the end of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self.watch("unified_mm_array_bytes", "In arrays that the process holds.", array_bytes)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Counts a request that has ended, and its time."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def watch(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Adds a gauge whose value is computed when it is read."""
        Gauge(name, what, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


def array_bytes() -> float:
    """Returns the bytes of all arrays that live on this process's devices."""
    return float(sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted()))
