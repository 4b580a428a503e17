"""What `/metrics` shows, in Prometheus' text format.

Names are vLLM's with the prefix `trine_`, so that its dashboards and gateway configurations need only another prefix.
Times are taken in the API process: what a client waits for, the socket to the engine included.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trine.serve.call import Call
from trine.serve.messages import Delta, Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


class Metrics:
    """Counters and histograms of one server; `engine_stats` is asked when somebody looks."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineStats()
        self._registry.register(self._engine)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, about, buckets=buckets, registry=self._registry)

        self._first = histogram("trine_time_to_first_token_seconds", "From request to first token.", _FIRST_TOKEN)
        self._between = histogram("trine_inter_token_latency_seconds", "Between tokens of a choice.", _BETWEEN)
        self._whole = histogram("trine_e2e_request_latency_seconds", "From request to last token or vector.", _WHOLE)
        self._prompt_len = histogram("trine_request_prompt_tokens", "Tokens of a prompt or text.", _TOKENS)
        self._answer_len = histogram("trine_request_generation_tokens", "Tokens of a finished choice.", _TOKENS)
        self._prompts = Counter("trine_prompt_tokens", "Tokens of all prompts and texts.", registry=self._registry)
        self._answers = Counter("trine_generation_tokens", "Tokens generated.", registry=self._registry)
        self._success = Counter(
            "trine_request_success", "Choices and texts that finished.", ["finished_reason"], registry=self._registry
        )
        self._http = Counter(
            "trine_http_requests", "Answered requests.", ["method", "path", "status"], registry=self._registry
        )
        self._in_flight = Gauge("trine_completions_in_flight", "Completions admitted.", registry=self._registry)
        self._texts = Gauge("trine_texts_in_flight", "Texts to embed or classify admitted.", registry=self._registry)

    def observe(self, call: Call, delta: Delta) -> None:
        """One delta has come from the engine."""
        now = time.monotonic()
        if delta.vector is not None:
            self._prompts.inc(delta.prompt_tokens)
            self._prompt_len.observe(delta.prompt_tokens)
            self._success.labels("stop").inc()
            self._whole.observe(now - call.started)
            return
        key = (delta.id, delta.choice)
        if delta.id not in call.first_token:
            call.first_token[delta.id] = now
            self._first.observe(now - call.started)
            self._prompts.inc(delta.prompt_tokens)
            self._prompt_len.observe(delta.prompt_tokens)
        elif key in call.last_token and delta.token_ids:
            self._between.observe((now - call.last_token[key]) / len(delta.token_ids))
        call.last_token[key] = now
        self._answers.inc(len(delta.token_ids))
        if delta.finish_reason is not None:
            self._success.labels(delta.finish_reason).inc()
            self._whole.observe(now - call.started)
            self._answer_len.observe(delta.completion_tokens)

    def count_http(self, method: str, path: str, status: int) -> None:
        """One HTTP request was answered. `path` is a route, odd methods are one: strangers cannot make series."""
        self._http.labels(method if method in _METHODS else "other", path, str(status)).inc()

    def text(self, stats: Stats, in_flight: int, texts: int) -> bytes:
        """The page."""
        self._engine.stats = stats
        self._in_flight.set(in_flight)
        self._texts.set(texts)
        return generate_latest(self._registry)


class _EngineStats(Collector):
    """The engine's own totals and states, as it last sent them."""

    def __init__(self) -> None:
        self.stats = Stats()

    def collect(self) -> list[Metric]:
        """For the registry."""
        stats = self.stats
        used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        gauges = (
            ("trine_num_requests_running", "Completions that are computed in turns.", stats.running),
            ("trine_num_requests_waiting", "Completions in the engine's queue.", stats.waiting),
            ("trine_kv_cache_usage_perc", "Used share of the key/value cache, 0 to 1.", used),
            ("trine_kv_cache_blocks", "Blocks of the key/value cache.", stats.kv_blocks_total),
        )
        counters = (
            ("trine_prefix_cache_queries", "Prompt tokens looked up in the cache.", stats.prefix_query_tokens),
            ("trine_prefix_cache_hits", "Prompt tokens found in the cache.", stats.prefix_hit_tokens),
            ("trine_num_preemptions", "Times a completion lost its blocks to others.", stats.preemptions),
            ("trine_spec_decode_num_draft_tokens", "Guessed tokens that were verified.", stats.drafted_tokens),
            ("trine_spec_decode_num_accepted_tokens", "Guessed tokens that stood.", stats.accepted_tokens),
            ("trine_engine_steps", "Steps of the engine.", stats.steps),
            ("trine_engine_step_seconds", "Time spent in steps.", stats.step_seconds),
            ("trine_engine_schedule_seconds", "The part of it spent on scheduling.", stats.schedule_seconds),
        )
        found: list[Metric] = [GaugeMetricFamily(name, about, value=value) for name, about, value in gauges]
        found += [CounterMetricFamily(name, about, value=value) for name, about, value in counters]
        return found
