"""Measurements of a server for Prometheus, in a registry of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .models import ServedModel

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of requests and tokens, times, and how many texts run and wait."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("expertctl_requests", "Answered requests.", ("path", "status"), registry=self._registry)
        self.tokens = Counter(
            "expertctl_tokens", "Tokens read (prompt) and generated.", ("model", "kind"), registry=self._registry
        )
        self.seconds = Histogram(
            "expertctl_request_seconds",
            "Time from the body of a request to the end of its answer.",
            ("model",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_seconds = Histogram(
            "expertctl_first_token_seconds",
            "Time from the body of a request to its first text.",
            ("model",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_EngineGauges(models))

    def text(self) -> bytes:
        """Return all measurements in Prometheus's text format."""
        return generate_latest(self._registry)


class _EngineGauges(Collector):
    """Texts that run and wait now, by model."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = models

    def collect(self) -> Iterator[GaugeMetricFamily]:
        running = GaugeMetricFamily("expertctl_running", "Texts in the batch.", labels=("model",))
        waiting = GaugeMetricFamily("expertctl_waiting", "Texts in the queue.", labels=("model",))
        for model in self._models:
            running.add_metric([model.name], _total(engine.num_running for engine in model.engines))
            waiting.add_metric([model.name], _total(engine.num_waiting for engine in model.engines))
        yield running
        yield waiting


def _total(numbers: Iterable[int]) -> float:
    return float(sum(numbers))
