"""The table of all metrics: names, labels and meaning. Text format of Prometheus.

A token touches none of them: a request's figures are taken when it is handed over and at its end, levels are read when
asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from .core.effects import Cause, Planned
from .core.instance import InstanceReport
from .core.launch import Phase
from .core.slo import Slo

Outcome = Literal["finished", "cancelled", "failed", "rejected"]
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
_TPOT_BUCKETS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
_GAP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
_E2E_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)
_BY_CLASS = ("model", "slo_class")


class Scaling(Protocol):
    """See wire.Scaled."""

    @property
    def planned(self) -> Planned | None:
        """The last plan."""

    @property
    def states(self) -> Mapping[str, int]:
        """Instances in each state."""

    @property
    def phases(self) -> Mapping[Phase, tuple[int, float]]:
        """How many of each phase of a start there were, and their seconds."""


@dataclass(frozen=True, slots=True)
class Levels:
    """What a gateway knows at this moment. ``ready`` counts ready instances of each model; ``scaled``: what the
    controller says of those that are scaled."""

    open_requests: int
    connections: int
    controller_up: bool
    ready: Mapping[str, int]
    reports: Sequence[InstanceReport]
    scaled: Mapping[str, Scaling]


@dataclass(frozen=True, slots=True)
class _Finished:
    """What a finished request of one model and class touches, with its labels looked up once."""

    requests: Counter
    attained: Counter
    first_attained: Counter
    pace_attained: Counter
    prompt_tokens: Counter
    output_tokens: Counter
    ttft: Histogram
    tpot: Histogram
    e2e: Histogram


class GatewayMetrics:
    """All metrics of one gateway process."""

    def __init__(self, read_levels: Callable[[], Levels]) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...]) -> Counter:
            return Counter(f"hyperflexis_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"hyperflexis_{name}", text, _BY_CLASS, buckets=buckets, registry=self._registry)

        self._requests = counter(
            "requests",
            "Requests that ended, by outcome: finished, cancelled, failed, rejected",
            (*_BY_CLASS, "outcome"),
        )
        self._attained = counter("slo_attained", "Finished requests of which every SLO held", _BY_CLASS)
        self._first_attained = counter(
            "slo_ttft_attained", "Finished requests whose first token came in time", _BY_CLASS
        )
        self._pace_attained = counter("slo_tpot_attained", "Finished requests that kept their pace", _BY_CLASS)
        self._ttft = histogram(
            "time_to_first_token_seconds", "Arrival at the gateway to the first token", _TTFT_BUCKETS
        )
        self._tpot = histogram("time_per_output_token_seconds", "(e2e - ttft) / (output tokens - 1)", _TPOT_BUCKETS)
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival at the gateway to the last token", _E2E_BUCKETS)
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests", _BY_CLASS)
        self._output_tokens = counter("generation_tokens", "Output tokens of finished requests", _BY_CLASS)
        self._errors = counter("http_errors", "Requests answered with an error, by status and code", ("status", "code"))
        self._redispatched = counter(
            "redispatched", "Requests asked for again because their instance failed", ("model",)
        )
        self._handoffs = counter(
            "handoffs",
            "Requests that were to go on at another instance, by outcome: handed, failed",
            ("model", "outcome"),
        )
        self._handoff_gap = histogram(
            "handoff_gap_seconds", "Last token before a handoff to the first one after it", _GAP_BUCKETS
        )
        self._finished: dict[tuple[str, str], _Finished] = {}
        self._registry.register(_LevelsCollector(read_levels))

    def request_ended(
        self,
        model: str,
        slo_class: str,
        outcome: Outcome,
        slo: Slo,
        prompt_tokens: int,
        output_tokens: int,
        ttft_s: float | None,
        e2e_s: float,
    ) -> None:
        """One request is over. ``ttft_s`` is None when it had no token."""
        if outcome != "finished":
            self._requests.labels(model, slo_class, outcome).inc()
            return
        found = self._finished.get((model, slo_class))
        if found is None:
            found = self._finished[model, slo_class] = self._labelled(model, slo_class)
        found.requests.inc()
        found.prompt_tokens.inc(prompt_tokens)
        found.output_tokens.inc(output_tokens)
        found.e2e.observe(e2e_s)
        if ttft_s is not None:
            found.ttft.observe(ttft_s)
            if output_tokens > 1:
                found.tpot.observe((e2e_s - ttft_s) / (output_tokens - 1))
        first_s = e2e_s if ttft_s is None else ttft_s
        if slo.is_met(first_s, e2e_s, output_tokens):
            found.attained.inc()
        if slo.is_first_met(first_s):
            found.first_attained.inc()
        if slo.is_pace_met(first_s, e2e_s, output_tokens):
            found.pace_attained.inc()

    def _labelled(self, model: str, slo_class: str) -> _Finished:
        by_class = (model, slo_class)
        return _Finished(
            self._requests.labels(model, slo_class, "finished"),
            self._attained.labels(*by_class),
            self._first_attained.labels(*by_class),
            self._pace_attained.labels(*by_class),
            self._prompt_tokens.labels(*by_class),
            self._output_tokens.labels(*by_class),
            self._ttft.labels(*by_class),
            self._tpot.labels(*by_class),
            self._e2e.labels(*by_class),
        )

    def error_answered(self, status: int, code: str | None) -> None:
        """An error went to a client."""
        self._errors.labels(str(status), code or "").inc()

    def redispatched(self, model: str) -> None:
        """A request is asked for again."""
        self._redispatched.labels(model).inc()

    def handed_over(self, model: str, slo_class: str, gap_s: float | None) -> None:
        """A request goes on at another instance, ``gap_s`` after its last token; None when it had none."""
        self._handoffs.labels(model, "handed").inc()
        if gap_s is not None:
            self._handoff_gap.labels(model, slo_class).observe(gap_s)

    def handoff_failed(self, model: str) -> None:
        """A request did not go on at the instance that was to have it."""
        self._handoffs.labels(model, "failed").inc()

    def render(self) -> bytes:
        """The text that ``/metrics`` answers."""
        return generate_latest(self._registry)


class _LevelsCollector(Collector):
    """Levels and the instances' own counters, read when asked for."""

    def __init__(self, read: Callable[[], Levels]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        levels = self._read()
        yield GaugeMetricFamily("hyperflexis_requests_open", "Requests in this gateway", levels.open_requests)
        yield GaugeMetricFamily("hyperflexis_connections", "Client connections of this gateway", levels.connections)
        yield GaugeMetricFamily(
            "hyperflexis_controller_up", "1 while the controller is connected", float(levels.controller_up)
        )
        ready = GaugeMetricFamily("hyperflexis_instances_ready", "Ready instances", labels=["model"])
        for model, number in levels.ready.items():
            ready.add_metric([model], number)
        yield ready
        yield from _scaling(levels.scaled)
        for name, text, gauge in _INSTANCE_GAUGES:
            family = GaugeMetricFamily(f"hyperflexis_{name}", text, labels=["instance"])
            for report in levels.reports:
                family.add_metric([report.id], gauge(report))
            yield family
        for name, text, count in _INSTANCE_COUNTERS:
            counter = CounterMetricFamily(f"hyperflexis_{name}", text, labels=["instance"])
            for report in levels.reports:
                counter.add_metric([report.id], count(report))
            yield counter


def _scaling(scaled: Mapping[str, Scaling]) -> Iterator[Metric]:
    """Of models that are scaled: what there is, what is planned, and what starts took."""
    states = GaugeMetricFamily(
        "hyperflexis_instances",
        "Instances of a scaled model by state; shells are in standby",
        labels=["model", "state"],
    )
    launches = SummaryMetricFamily(
        "hyperflexis_launch_seconds", "Phases of starts, as the instances measured them", labels=["model", "phase"]
    )
    for model, one in scaled.items():
        for state, number in one.states.items():
            states.add_metric([model, state], number)
        for phase, (count, seconds) in one.phases.items():
            launches.add_metric([model, phase], count, seconds)
    causes = GaugeMetricFamily(
        "hyperflexis_scale_cause",
        "1 for what decides the desired instances, 0 for the others",
        labels=["model", "cause"],
    )
    plans = {model: one.planned for model, one in scaled.items() if one.planned is not None}
    for model, plan in plans.items():
        for cause in get_args(Cause):
            causes.add_metric([model, cause], float(plan.cause == cause))
    yield states
    yield launches
    yield causes
    for name, text, read in _PLAN_GAUGES:
        family = GaugeMetricFamily(f"hyperflexis_scale_{name}", text, labels=["model"])
        for model, plan in plans.items():
            family.add_metric([model], read(plan))
        yield family


_PLAN_GAUGES: tuple[tuple[str, str, Callable[[Planned], float]], ...] = (
    ("desired_instances", "What the demand asks for", lambda plan: plan.desired),
    ("held_instances", "What is kept, within all limits", lambda plan: plan.held),
    ("demand_instances", "Instances that the demand keeps busy", lambda plan: plan.demand),
    ("margin", "What is kept beyond the demand, in square roots of it", lambda plan: plan.margin),
    ("horizon_seconds", "What the next start is expected to take", lambda plan: plan.horizon_s),
    ("forecast_error_ratio", "Mean relative error of what was forecast that far ahead", lambda plan: plan.error),
)


_Read = Callable[[InstanceReport], float]
_INSTANCE_GAUGES: tuple[tuple[str, str, _Read], ...] = (
    ("requests_running", "Requests that an instance computes", lambda r: r.num_running),
    ("requests_waiting", "Requests that wait in an instance", lambda r: r.num_waiting),
    ("kv_used_tokens", "Context tokens that an instance's running requests hold", lambda r: r.kv_used_tokens),
)
_INSTANCE_COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    ("iterations", "Iterations of an instance", lambda r: r.iterations),
    ("preemptions", "Requests whose KV an instance took back", lambda r: r.preemptions),
    ("prefix_hit_tokens", "Prompt tokens whose KV an instance found", lambda r: r.prefix_hit_tokens),
    ("instance_prompt_tokens", "Prompt tokens that an instance computed", lambda r: r.prompt_tokens),
    ("instance_output_tokens", "Tokens that an instance generated", lambda r: r.output_tokens),
    ("busy_seconds", "Time that an instance spent in iterations", lambda r: r.busy_s),
)
