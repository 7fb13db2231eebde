"""From the records of runs to the figures that people compare: attainment, goodput, latencies, with their spread.

Attainment is strict: a request counts when all of its promises hold, and every arrival is in the denominator but
those that the client cancelled. A request without a last token (rejected, failed, unfinished) enters the mean
end-to-end time with the time from its arrival to the end of the run. Percentiles of TTFT are over requests that got
a first token, those of TPOT over requests that finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf, isnan, nan
from random import Random

from ..core.record import Record, Run

# Requests near each other in time share their fate, so the bootstrap draws blocks of arrivals, not single ones.
BLOCK_S = 5.0
RESAMPLES = 400
CAP_FACTOR = 3.0  # the capped mean counts no request beyond three times what its promises add up to


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """One class. Times in milliseconds, ``None`` where no request has the figure; ``requests`` leaves out cancelled."""

    requests: int
    attainment: float | None
    p50_ttft_ms: float | None
    p99_ttft_ms: float | None
    p50_tpot_ms: float | None
    p99_tpot_ms: float | None
    p50_e2e_s: float | None
    p99_e2e_s: float | None
    rejected: int
    failed: int
    unfinished: int


@dataclass(frozen=True, slots=True)
class Summary:
    """One policy over all its runs. ``goodput_rps`` is requests on time per second of arrivals. ``ci95`` has 95%
    bootstrap intervals within these runs; they say nothing of other seeds or machines."""

    requests: int
    attainment: float | None
    attainment_by_class: dict[str, float | None]
    goodput_rps: float
    mean_e2e_s: float | None
    mean_capped_e2e_s: float | None
    p50_ttft_ms: float | None
    p99_ttft_ms: float | None
    p50_tpot_ms: float | None
    p99_tpot_ms: float | None
    rejected: int
    unfinished: int
    failed: int
    cancelled: int
    accelerator_s: float | None
    ci95: dict[str, tuple[float, float]]
    classes: dict[str, ClassSummary]


def class_names(records: Iterable[Record]) -> list[str]:
    """The classes of ``records``, tightest promise first."""
    tightest: dict[str, tuple[float, float]] = {}
    for record in records:
        slo = record.slo
        key = (inf if slo.ttft_s is None else slo.ttft_s, inf if slo.e2e_s is None else slo.e2e_s)
        tightest[record.slo_class] = min(key, tightest.get(record.slo_class, key))
    return sorted(tightest, key=lambda name: (tightest[name], name))


def quantile(values: Sequence[float], q: float) -> float:
    """The ``q`` quantile with linear interpolation; nan of nothing."""
    if not values:
        return nan
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def e2e_or_end(record: Record, ended_s: float) -> float:
    """Seconds from arrival to the last token, or to the end of the run where none came."""
    if record.outcome == "finished" and record.e2e_s is not None:
        return record.e2e_s
    return max(ended_s - record.arrived_at, 0.0)


def e2e_cap_s(record: Record) -> float:
    """Three times what the request was promised end to end (``inf`` when its promises set no such time)."""
    slo = record.slo
    cap = inf if slo.e2e_s is None else slo.e2e_s
    if slo.ttft_s is not None and slo.tpot_s is not None:
        cap = min(cap, slo.ttft_s + (record.num_output_tokens - 1) * slo.tpot_s)
    return CAP_FACTOR * cap


def summarise(runs: Sequence[Run], accelerator_s: float | None = None) -> Summary:
    """Pool ``runs`` of one policy."""
    pooled = [(record, run.ended_s) for run in runs for record in run.records if record.outcome != "cancelled"]
    duration = sum(run.duration_s for run in runs)
    names = class_names(record for record, _ in pooled)
    classes = {name: _class_summary([r for r, _ in pooled if r.slo_class == name]) for name in names}
    ttfts = [record.ttft_s for record, _ in pooled if record.ttft_s is not None]
    tpots = [record.tpot_s for record, _ in pooled if record.tpot_s is not None]
    return Summary(
        requests=len(pooled),
        attainment=_clean(_attainment(pooled)),
        attainment_by_class={name: c.attainment for name, c in classes.items()},
        goodput_rps=sum(record.is_attained for record, _ in pooled) / duration if duration else 0.0,
        mean_e2e_s=_clean(_mean_e2e(pooled)),
        mean_capped_e2e_s=_clean(_mean_capped(pooled)),
        p50_ttft_ms=_ms(ttfts, 0.5),
        p99_ttft_ms=_ms(ttfts, 0.99),
        p50_tpot_ms=_ms(tpots, 0.5),
        p99_tpot_ms=_ms(tpots, 0.99),
        rejected=sum(record.outcome == "rejected" for record, _ in pooled),
        unfinished=sum(record.outcome == "unfinished" for record, _ in pooled),
        failed=sum(record.outcome == "failed" for record, _ in pooled),
        cancelled=sum(record.outcome == "cancelled" for run in runs for record in run.records),
        accelerator_s=accelerator_s,
        ci95=_intervals(runs),
        classes=classes,
    )


_Pool = Sequence[tuple[Record, float]]


def _attainment(pool: _Pool) -> float:
    return sum(record.is_attained for record, _ in pool) / len(pool) if pool else nan


def _mean_e2e(pool: _Pool) -> float:
    return sum(e2e_or_end(record, end) for record, end in pool) / len(pool) if pool else nan


def _mean_capped(pool: _Pool) -> float:
    return sum(min(e2e_or_end(record, end), e2e_cap_s(record)) for record, end in pool) / len(pool) if pool else nan


def _median_ttft_ms(pool: _Pool) -> float:
    return 1000.0 * quantile([record.ttft_s for record, _ in pool if record.ttft_s is not None], 0.5)


_RESAMPLED: dict[str, Callable[[_Pool], float]] = {
    "attainment": _attainment,
    "mean_e2e_s": _mean_e2e,
    "mean_capped_e2e_s": _mean_capped,
    "p50_ttft_ms": _median_ttft_ms,
}


def _intervals(runs: Sequence[Run]) -> dict[str, tuple[float, float]]:
    blocks: dict[tuple[int, int], list[tuple[Record, float]]] = {}
    for index, run in enumerate(runs):
        for record in run.records:
            if record.outcome != "cancelled":
                blocks.setdefault((index, int(record.arrived_at / BLOCK_S)), []).append((record, run.ended_s))
    pools = list(blocks.values())
    if len(pools) < 2:
        return {}
    random = Random(0)  # the same records always give the same intervals
    draws: dict[str, list[float]] = {name: [] for name in _RESAMPLED}
    for _ in range(RESAMPLES):
        pool = [item for block in random.choices(pools, k=len(pools)) for item in block]
        for name, figure in _RESAMPLED.items():
            draws[name].append(figure(pool))
    found: dict[str, tuple[float, float]] = {}
    for name, values in draws.items():
        kept = [v for v in values if not isnan(v)]
        if kept:
            found[name] = (quantile(kept, 0.025), quantile(kept, 0.975))
    return found


def _class_summary(records: Sequence[Record]) -> ClassSummary:
    ttfts = [r.ttft_s for r in records if r.ttft_s is not None]
    tpots = [r.tpot_s for r in records if r.tpot_s is not None]
    ends = [r.e2e_s for r in records if r.outcome == "finished" and r.e2e_s is not None]
    return ClassSummary(
        requests=len(records),
        attainment=sum(r.is_attained for r in records) / len(records) if records else None,
        p50_ttft_ms=_ms(ttfts, 0.5),
        p99_ttft_ms=_ms(ttfts, 0.99),
        p50_tpot_ms=_ms(tpots, 0.5),
        p99_tpot_ms=_ms(tpots, 0.99),
        p50_e2e_s=_clean(quantile(ends, 0.5)),
        p99_e2e_s=_clean(quantile(ends, 0.99)),
        rejected=sum(r.outcome == "rejected" for r in records),
        failed=sum(r.outcome == "failed" for r in records),
        unfinished=sum(r.outcome == "unfinished" for r in records),
    )


def _ms(values: Sequence[float], q: float) -> float | None:
    return _clean(1000.0 * quantile(values, q))


def _clean(value: float) -> float | None:
    return None if isnan(value) else value
