"""What operators watch, in Prometheus' form: sbd_* and the vllm: names that autoscalers read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..completion import Chunk
from ..streams import Delivered
from .model import Model

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0),
    *(100.0, 250.0),
)
_TIMES = 100  # of chunks, noted together: behind a forward each call is a slow one
_PER_FORWARD = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24, 32)


class Metrics:
    """Of all models of a server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("model_name",)

        def counter(name: str, about: str, *more: str) -> Counter:
            return Counter(name, about, (*labels, *more), registry=self.registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(name, about, labels, buckets=buckets, registry=self.registry)

        self.answers = Counter(
            "sbd_http_answers", "Answers, by path and status.", ("path", "status"),
            registry=self.registry,
        )  # fmt: skip
        self.refused = Counter(
            "sbd_requests_refused", "Requests that were not let in, by status.",
            ("status",), registry=self.registry,
        )  # fmt: skip
        self.texts = counter(
            "sbd_texts", "Texts that had their turn, by how they ended.", "outcome"
        )
        self.prompt_tokens = counter("sbd_prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = counter("sbd_cached_tokens", "Of these, not computed but found.")
        self.tokens = counter("sbd_completion_tokens", "Tokens of texts.")
        self.nfe = counter("sbd_nfe", "Forwards that decided something, summed over texts.")
        self.per_forward = histogram(
            "sbd_tokens_per_forward", "Tokens per forward of a text.", _PER_FORWARD
        )
        self.first = histogram(
            "sbd_time_to_first_token_seconds", "From when a text's request was read."
        )
        self.between = histogram("sbd_time_between_chunks_seconds", "From chunk to chunk.")
        self.whole = histogram("sbd_request_seconds", "From when a text's request was read.")
        # What an autoscaler of vLLM's reads.
        self.vllm_first = histogram("vllm:time_to_first_token_seconds", "As sbd_...")
        self.vllm_success = counter("vllm:request_success", "Texts that ended.", "finished_reason")

    def text(self) -> str:
        return generate_latest(self.registry).decode()


class Gauges(Collector):
    """What is read off at the moment that somebody asks."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        usages = {model.alias: model.engine.usage for model in self._models}
        budgets = {model.alias: model.engine.kv_budget for model in self._models}
        gates = {model.alias: model.gate for model in self._models}

        def gauge(name: str, about: str, value: Callable[[str], float]) -> Metric:
            family = GaugeMetricFamily(name, about, labels=["model_name"])
            for alias in usages:
                family.add_metric([alias], value(alias))
            return family

        def counter(name: str, about: str, value: Callable[[str], float]) -> Metric:
            family = CounterMetricFamily(name, about, labels=["model_name"])
            for alias in usages:
                family.add_metric([alias], value(alias))
            return family

        for name in ("sbd_texts_running", "vllm:num_requests_running"):
            yield gauge(name, "Texts that are generated.", lambda a: gates[a].running)
        for name in ("sbd_texts_waiting", "vllm:num_requests_waiting"):
            yield gauge(name, "Texts that wait for their turn.", lambda a: gates[a].waiting)
        yield gauge("sbd_sequences", "Texts with a KV cache.", lambda a: usages[a].admitted)
        yield gauge(
            "sbd_sequences_waiting", "Texts that wait for room in the KV budget.",
            lambda a: usages[a].waiting,
        )  # fmt: skip
        yield gauge("sbd_kv_used_bytes", "Of texts.", lambda a: usages[a].kv_used)
        yield gauge("sbd_kv_cached_bytes", "Of texts that ended.", lambda a: usages[a].kv_cached)
        yield gauge("sbd_kv_budget_bytes", "Of all caches.", lambda a: budgets[a])
        yield gauge(
            "vllm:kv_cache_usage_perc", "Share of the KV budget in use, 0 to 1.",
            lambda a: usages[a].kv_used / budgets[a],
        )  # fmt: skip
        yield counter("sbd_forwards", "Of the engine.", lambda a: usages[a].forwards)
        yield counter("sbd_forward_rows", "Rows of these.", lambda a: usages[a].rows)
        yield counter(
            "sbd_forward_prompt_rows", "Of these, of prompts.", lambda a: usages[a].prompt_rows
        )
        for name in ("sbd_prefix_cache_queries", "vllm:prefix_cache_queries"):
            yield counter(name, "Tokens of prompts.", lambda a: usages[a].prompt_tokens)
        for name in ("sbd_prefix_cache_hits", "vllm:prefix_cache_hits"):
            yield counter(
                name, "Of these, found in another text's cache.", lambda a: usages[a].cached_tokens
            )


class Watch:
    """Of one model."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model

    @contextmanager
    def text(self, called: float) -> Iterator[Seen]:
        """One text: `called` is when it was asked for, by perf_counter."""
        seen = Seen(self._metrics, self._model, called)
        try:
            yield seen
        finally:
            seen.close()


class Seen:
    """A text that has its turn. outcome: how it ended."""

    def __init__(self, metrics: Metrics, model: str, called: float) -> None:
        self._metrics, self._model = metrics, model
        self._called = called
        self._times: list[float] = []  # of chunks; the gaps between them are not noted yet
        self.outcome = "cancelled"
        self.generation: Delivered | None = None

    def add(self, chunk: Chunk) -> None:
        if chunk.finish_reason:
            self.outcome = chunk.finish_reason
        if not chunk.tokens:
            return
        if not self._times:
            for first in (self._metrics.first, self._metrics.vllm_first):
                first.labels(self._model).observe(perf_counter() - self._called)
        self._times.append(perf_counter())
        if len(self._times) > _TIMES:
            self._note_times()

    def _note_times(self) -> None:
        between = self._metrics.between.labels(self._model)
        for before, after in pairwise(self._times):
            between.observe(after - before)
        del self._times[:-1]

    def close(self) -> None:
        metrics, model = self._metrics, self._model
        self._note_times()
        metrics.texts.labels(model, self.outcome).inc()
        metrics.whole.labels(model).observe(perf_counter() - self._called)
        if self.outcome in ("stop", "length"):
            metrics.vllm_success.labels(model, self.outcome).inc()
        if self.generation is None:
            return
        completion = self.generation.completion
        metrics.tokens.labels(model).inc(len(completion.tokens))
        metrics.nfe.labels(model).inc(completion.stats.nfe)
        if completion.stats.nfe:
            metrics.prompt_tokens.labels(model).inc(completion.stats.prompt_tokens)
            metrics.cached_tokens.labels(model).inc(completion.stats.cached_tokens)
            metrics.per_forward.labels(model).observe(completion.stats.tokens_per_forward)
