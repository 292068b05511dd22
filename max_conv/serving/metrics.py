"""The counters of a server, for Prometheus."""

from collections.abc import Callable, Sequence
from typing import Any

import prometheus_client as prometheus

from .queue import Job

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one server. Each server has separate counters, so that several can run in one process."""

    def __init__(self) -> None:
        self.registry = registry = prometheus.CollectorRegistry()
        prefix = "max_conv_"
        self.requests = prometheus.Counter(
            prefix + "requests", "Requests by status.", ["model", "code"], registry=registry
        )
        self.seconds = prometheus.Histogram(
            prefix + "request_seconds",
            "From the end of a request's body to its answer.",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        self.wait = prometheus.Histogram(
            prefix + "queue_seconds", "Waiting in the queue.", ["model"], buckets=SECONDS, registry=registry
        )
        self.call = prometheus.Histogram(
            prefix + "call_seconds", "A call of the model.", ["model"], buckets=SECONDS, registry=registry
        )
        self.rows = prometheus.Histogram(
            prefix + "batch_rows", "Rows of a call.", ["model"], buckets=ROWS, registry=registry
        )
        self.waiting = prometheus.Gauge(prefix + "waiting", "Requests that wait.", ["model"], registry=registry)
        self.streams = prometheus.Gauge(prefix + "streams", "Signals that go on.", ["model"], registry=registry)

    def of(self, model: str) -> "ModelMetrics":
        """Returns the counters of a model."""
        return ModelMetrics(self, model)

    def text(self) -> tuple[bytes, str]:
        """Returns all counters as Prometheus reads them, and the media type."""
        return prometheus.generate_latest(self.registry), prometheus.CONTENT_TYPE_LATEST


class ModelMetrics:
    """The counters of a model."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self._seconds, self._wait, self._call, self._rows = (
            metric.labels(model) for metric in (metrics.seconds, metrics.wait, metrics.call, metrics.rows)
        )
        self._codes: dict[int, Any] = {}

    def watch(self, waiting: Callable[[], int], streams: Callable[[], int]) -> None:
        """Registers two functions: the number of requests that wait, and of signals that go on."""
        self._metrics.waiting.labels(self._model).set_function(waiting)
        self._metrics.streams.labels(self._model).set_function(streams)

    def answered(self, code: int, seconds: float | None = None) -> None:
        """Counts a request."""
        counter = self._codes.get(code)
        if counter is None:
            counter = self._codes[code] = self._metrics.requests.labels(self._model, code)
        counter.inc()
        if seconds is not None:
            self._seconds.observe(seconds)

    def seen(self, jobs: Sequence[Job], began: float, took: float) -> None:
        """Counts a call of the model."""
        self._rows.observe(sum(job.rows for job in jobs))
        self._call.observe(took)
        for job in jobs:
            self._wait.observe(began - job.since)
