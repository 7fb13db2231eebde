"""One run: a policy on a scenario at a load, in the window of a seed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from hyperflexis.core.links import Split
from hyperflexis.core.record import Record
from hyperflexis.policy_file import load_policy
from hyperflexis.sim.config import SimConfig, SimResult
from hyperflexis.sim.driver import simulate
from hyperflexis.sim.planned import planned_prefill
from hyperflexis.telemetry.summary import e2e_cap_s, e2e_or_end

from .scenarios import FIRST_TUNING_SEED, SCENARIOS, Windows

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Task:
    """A run. ``policy`` is a spec of ``load_policy``, files relative to the repository's root. ``slowness`` stretches
    the device and what the scheduler is told of it, ``device_factor`` the device alone; the load refers to the device
    as it is. With ``requests`` the row keeps each request's end-to-end time. ``mode``: `colocated`, `auto`,
    `convertible` (all do both, for good), or `static:K` (K instances compute prompts, the others decode)."""

    scenario: str
    policy: str
    load: float
    seed: int
    duration_s: float
    slowness: float = 1.0
    device_factor: float = 1.0
    noise: float = 0.0
    report_delay_s: float = 0.0
    known_lengths: bool = False
    requests: bool = False
    mode: str = "colocated"


@dataclass(frozen=True, slots=True)
class Row:
    """A run's figures. Means are over all arrivals: a request without a last token counts with the time from its
    arrival to the end of the run; the capped mean counts none beyond three times its promise. ``classes`` has
    (requests, on time); ``outside_share`` is the share of iteration time outside of what the profile was measured for.
    ``e2e_s`` and ``on_time`` are by request in order of arrival, where the task asked for them. ``ttft_kept`` and
    ``tpot_kept`` are shares of all requests; ``exposed_s`` is the mean over ``handoffs``."""

    attainment: float
    classes: Mapping[str, tuple[int, int]]
    mean_e2e_s: float
    mean_capped_e2e_s: float
    rejected: int
    unfinished: int
    prompt_tokens: int
    prefix_hit_tokens: int
    outside_share: float
    cpu_s: float
    e2e_s: Sequence[float]
    on_time: Sequence[bool]
    ttft_kept: float = 0.0
    tpot_kept: float = 0.0
    handoffs: int = 0
    exposed_s: float = 0.0
    transitions: int = 0

    @property
    def requests(self) -> int:
        """All arrivals."""
        return sum(count for count, _ in self.classes.values())

    @property
    def worst_class(self) -> float:
        """The attainment of the class that fares worst."""
        return min(kept / count for count, kept in self.classes.values())


Rows = Mapping[Task, Row]


def measure(windows: Windows, task: Task) -> Row:
    """Perform a run."""
    began = time.process_time()
    name, rules = load_policy(str(ROOT / task.policy) if task.policy.endswith(".py") else task.policy)
    slowness = task.slowness * task.device_factor
    arrivals = windows.arrivals(task.scenario, task.load, task.seed, task.duration_s, slowness)
    split = split_of(task.mode, SCENARIOS[task.scenario].instances)
    if task.mode == "auto":
        split = Split(planned(windows, task))
    config = SimConfig(
        profile=windows.profile(task.scenario, task.slowness),
        instances=SCENARIOS[task.scenario].instances,
        policy=name,
        rules=rules,
        seed=task.seed,
        noise=task.noise,
        device_factor=task.device_factor,
        report_delay_s=task.report_delay_s,
        known_lengths=task.known_lengths,
        split=split,
    )
    result = simulate(config, arrivals, task.duration_s)
    return row_of(result, time.process_time() - began, task.requests)


def row_of(result: SimResult, cpu_s: float, requests: bool) -> Row:
    """The figures of a run with at least one arrival."""
    records, counters, ended_s = result.run.records, result.counters, result.run.ended_s
    e2e_s = [e2e_or_end(record, ended_s) for record in records]
    return Row(
        attainment=sum(record.is_attained for record in records) / len(records),
        classes=_classes(records),
        mean_e2e_s=fmean(e2e_s),
        mean_capped_e2e_s=fmean(min(s, e2e_cap_s(record)) for s, record in zip(e2e_s, records, strict=True)),
        rejected=sum(record.outcome == "rejected" for record in records),
        unfinished=sum(record.outcome in ("unfinished", "failed") for record in records),
        prompt_tokens=counters.prompt_tokens,
        prefix_hit_tokens=counters.prefix_hit_tokens,
        outside_share=counters.outside_s / max(counters.busy_s, 1e-9),
        cpu_s=cpu_s,
        e2e_s=[round(s, 3) for s in e2e_s] if requests else [],
        on_time=[record.is_attained for record in records] if requests else [],
        ttft_kept=sum(record.is_first_attained for record in records) / len(records),
        tpot_kept=sum(record.is_pace_attained for record in records) / len(records),
        handoffs=counters.handoffs,
        exposed_s=counters.exposed_s / max(counters.handoffs, 1),
        transitions=counters.transitions,
    )


def planned(windows: Windows, task: Task) -> int:
    """The instances that begin with prompts alone, as planned from a tuning window of the same load."""
    profile, instances = windows.profile(task.scenario, task.slowness), SCENARIOS[task.scenario].instances
    arrivals = windows.arrivals(task.scenario, task.load, FIRST_TUNING_SEED, task.duration_s, task.slowness)
    return planned_prefill(arrivals, profile, instances, task.duration_s)


def split_of(mode: str, instances: int) -> Split | None:
    """A task's mode as the simulator's."""
    match mode.split(":"):
        case ["colocated"]:
            return None
        case ["auto"]:
            return Split()
        case ["convertible"]:
            return Split(adapt=False)
        case ["static", prefill]:
            return Split.of(instances, int(prefill), static=True)
        case _:
            raise ValueError(f"no mode {mode!r}")


def _classes(records: Iterable[Record]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for record in records:
        count, kept = found.get(record.slo_class, (0, 0))
        found[record.slo_class] = (count + 1, kept + record.is_attained)
    return dict(sorted(found.items()))


def row_from_dict(data: Mapping[str, Any]) -> Row:
    """The row that ``asdict`` made into ``data``. Raises KeyError or TypeError for one of another form."""
    if data.keys() != {field.name for field in fields(Row)}:
        raise KeyError("a row of another form")
    classes = {name: (count, kept) for name, (count, kept) in data["classes"].items()}
    return Row(**{**data, "classes": classes})
