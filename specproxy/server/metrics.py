"""Figures for Prometheus, named as vLLM names its own. Knows the engine's statistics and the ends of requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from specproxy.engine import EngineStats, RequestHandle

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PREFIX = "specproxy:"


class _EngineCollector:
    """Reads the engine when it is asked.

    Args:
        stats: the engine's.
        model: label of every figure.
    """

    def __init__(self, stats: Callable[[], EngineStats], model: str) -> None:
        self._stats, self._model = stats, model

    def collect(self) -> Iterable[Metric]:
        """The figures of this moment."""
        stats, label = self._stats(), ["model_name"]
        speculation = stats.speculation
        for name, help_text, value in (
            ("num_requests_running", "Requests that decode.", stats.running),
            (
                "num_requests_waiting",
                "Requests in the queue or whose prompt is being read.",
                stats.waiting + stats.reading,
            ),
            ("kv_cache_usage_perc", "Share of the key-value positions in use, 0 to 1.", stats.kv_usage),
        ):
            gauge = GaugeMetricFamily(_PREFIX + name, help_text, labels=label)
            gauge.add_metric([self._model], value)
            yield gauge
        first = speculation.drafted_per_position[:1]
        for name, help_text, value in (
            ("spec_decode_num_drafts", "Windows with drafts, counted per request.", sum(first)),
            ("spec_decode_num_draft_tokens", "Drafts that were verified.", speculation.num_draft_tokens),
            ("spec_decode_num_accepted_tokens", "Drafts that were accepted.", speculation.num_accepted_tokens),
            ("engine_cycles", "Cycles of the decode loop.", stats.cycles),
            ("engine_failed_turns", "Cycles and prompts that broke off.", stats.failed_turns),
            ("prefix_cache_hits", "Prompt tokens taken from earlier requests.", stats.reused_tokens),
            ("prefix_cache_queries", "Prompt tokens of requests begun.", stats.prompt_tokens),
        ):
            counter = CounterMetricFamily(_PREFIX + name, help_text, labels=label)
            counter.add_metric([self._model], value)
            yield counter
        positions = CounterMetricFamily(
            f"{_PREFIX}spec_decode_num_accepted_tokens_per_pos",
            "Drafts accepted at each place of a window.",
            labels=[*label, "position"],
        )
        for position, accepted in enumerate(speculation.accepted_per_position):
            positions.add_metric([self._model, str(position)], accepted)
        yield positions
        windows = CounterMetricFamily(
            f"{_PREFIX}engine_windows", "Cycles by their number of drafts.", labels=[*label, "num_draft_tokens"]
        )
        for count, cycles in sorted(stats.windows.items()):
            windows.add_metric([self._model, str(count)], cycles)
        yield windows


class Metrics:
    """The figures of one server.

    Args:
        stats: the engine's.
        model: label of every figure.
    """

    def __init__(self, stats: Callable[[], EngineStats], model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats, model))

        def histogram(name: str, help_text: str) -> Histogram:
            whole = Histogram(_PREFIX + name, help_text, ["model_name"], buckets=_SECONDS, registry=self._registry)
            return whole.labels(model)

        def counter(name: str, help_text: str) -> Counter:
            return Counter(_PREFIX + name, help_text, ["model_name"], registry=self._registry).labels(model)

        self.time_to_first_token = histogram("time_to_first_token_seconds", "From submission to the first token.")
        self.inter_token_latency = histogram("inter_token_latency_seconds", "Between two blocks of a request, as read.")
        self.time_per_output_token = histogram(
            "request_time_per_output_token_seconds", "Of a request, from its first token to its end, per further token."
        )
        self.e2e_request_latency = histogram("e2e_request_latency_seconds", "From submission to the end.")
        self.queue_time = histogram("request_queue_time_seconds", "From submission until the prompt is read.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of ended requests.")
        self.generation_tokens = counter("generation_tokens", "New tokens of ended requests.")
        self._ends = Counter(
            f"{_PREFIX}request_success", "Ended requests.", ["model_name", "finished_reason"], registry=self._registry
        )
        self._model = model

    def count(self, handle: RequestHandle) -> None:
        """Take a request that has ended, or that its reader has left, into account."""
        output = handle.output
        self._ends.labels(self._model, "cancelled" if output is None else output.finish_reason).inc()
        timings = handle.timings
        for histogram, seconds in (
            (self.queue_time, timings.queue_seconds),
            (self.time_to_first_token, timings.first_token_seconds),
            (self.e2e_request_latency, timings.total_seconds),
        ):
            if seconds is not None:
                histogram.observe(seconds)
        if output is None:
            return
        self.prompt_tokens.inc(output.num_prompt_tokens)
        self.generation_tokens.inc(len(output.tokens))
        if len(output.tokens) > 1 and timings.first_token is not None and timings.ended is not None:
            self.time_per_output_token.observe((timings.ended - timings.first_token) / (len(output.tokens) - 1))

    def render(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)
