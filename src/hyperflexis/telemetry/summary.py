"""From the records of runs to the figures that people compare: attainment, goodput, latencies, with their spread.

Attainment is strict: a request counts when all of its promises hold, and every arrival is in the denominator but
those that the client cancelled. A request without a last token (rejected, failed, unfinished) enters the mean
end-to-end time with the time from its arrival to the end of the run. Percentiles of TTFT are over requests that got
a first token, those of TPOT over requests that finished.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf, isnan, nan
from random import Random

from ..core.record import Record, Run

# Requests near each other in time share their fate, so the bootstrap draws blocks of arrivals, not single ones.
BLOCK_S = 5.0
MAX_BLOCKS = 200  # longer runs have longer blocks: more of them tell no more and cost as much again
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
    """One policy over all its runs. ``ttft_attainment`` and ``tpot_attainment`` are the shares of requests that kept
    the promise of the prefill and of the decode stage. ``goodput_rps`` is requests on time per second of arrivals.
    ``ci95`` has 95% intervals by figure, and by class as ``attainment_by_class.NAME``: those of ``summarise`` are
    bootstrap intervals within its runs and say nothing of other seeds or machines; those of ``sweep.combine`` are over
    seeds."""

    requests: int
    attainment: float | None
    ttft_attainment: float | None
    tpot_attainment: float | None
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
    total = _Block()
    for record, ended_s in pooled:
        total.add(record, ended_s)
    count = total.requests
    names = class_names(record for record, _ in pooled)
    classes = {name: _class_summary([r for r, _ in pooled if r.slo_class == name]) for name in names}
    tpots = [record.tpot_s for record, _ in pooled if record.tpot_s is not None]
    return Summary(
        requests=count,
        attainment=total.attained / count if count else None,
        ttft_attainment=sum(record.is_first_attained for record, _ in pooled) / count if count else None,
        tpot_attainment=sum(record.is_pace_attained for record, _ in pooled) / count if count else None,
        attainment_by_class={name: c.attainment for name, c in classes.items()},
        goodput_rps=total.attained / duration if duration else 0.0,
        mean_e2e_s=total.e2e_s / count if count else None,
        mean_capped_e2e_s=total.capped_e2e_s / count if count else None,
        p50_ttft_ms=_ms(total.ttfts, 0.5),
        p99_ttft_ms=_ms(total.ttfts, 0.99),
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


@dataclass(slots=True)
class _Block:
    """Sums over the arrivals of one stretch of a run. ``classes`` has (requests, on time) of each class."""

    requests: int = 0
    attained: int = 0
    e2e_s: float = 0.0
    capped_e2e_s: float = 0.0
    ttfts: list[float] = field(default_factory=list)
    classes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, record: Record, ended_s: float) -> None:
        e2e_s, attained = e2e_or_end(record, ended_s), record.is_attained
        self.requests += 1
        self.attained += attained
        self.e2e_s += e2e_s
        self.capped_e2e_s += min(e2e_s, e2e_cap_s(record))
        if record.ttft_s is not None:
            self.ttfts.append(record.ttft_s)
        requests, kept = self.classes.get(record.slo_class, (0, 0))
        self.classes[record.slo_class] = (requests + 1, kept + attained)


def _blocks(runs: Sequence[Run]) -> list[_Block]:
    length_s = max(BLOCK_S, sum(run.duration_s for run in runs) / MAX_BLOCKS)
    blocks: dict[tuple[int, int], _Block] = {}
    for index, run in enumerate(runs):
        for record in run.records:
            if record.outcome != "cancelled":
                blocks.setdefault((index, int(record.arrived_at / length_s)), _Block()).add(record, run.ended_s)
    for block in blocks.values():
        block.ttfts.sort()
    return list(blocks.values())


def _intervals(runs: Sequence[Run]) -> dict[str, tuple[float, float]]:
    blocks = _blocks(runs)
    if len(blocks) < 2:
        return {}
    values = sorted({ttft for block in blocks for ttft in block.ttfts})
    random = Random(0)  # the same records always give the same intervals
    draws: dict[str, list[float]] = {}
    for _ in range(RESAMPLES):
        drawn = Counter(random.choices(range(len(blocks)), k=len(blocks)))
        for name, value in _resample([(blocks[index], times) for index, times in drawn.items()], values):
            draws.setdefault(name, []).append(value)
    return {name: (quantile(found, 0.025), quantile(found, 0.975)) for name, found in draws.items()}


def _resample(drawn: Sequence[tuple[_Block, int]], values: Sequence[float]) -> Iterable[tuple[str, float]]:
    """Figures of a sample that holds each block so many times; ``values`` are all different TTFTs, sorted."""
    requests = sum(times * block.requests for block, times in drawn)
    yield "attainment", sum(times * block.attained for block, times in drawn) / requests
    yield "mean_e2e_s", sum(times * block.e2e_s for block, times in drawn) / requests
    yield "mean_capped_e2e_s", sum(times * block.capped_e2e_s for block, times in drawn) / requests
    if any(block.ttfts for block, _ in drawn):
        yield "p50_ttft_ms", 1000.0 * resampled_median([(block.ttfts, times) for block, times in drawn], values)
    classes: dict[str, tuple[int, int]] = {}
    for block, times in drawn:
        for name, (count, kept) in block.classes.items():
            before = classes.get(name, (0, 0))
            classes[name] = (before[0] + times * count, before[1] + times * kept)
    for name, (count, kept) in classes.items():
        yield f"attainment_by_class.{name}", kept / count


def resampled_median(parts: Sequence[tuple[Sequence[float], int]], values: Sequence[float]) -> float:
    """The median of a sample made of sorted parts, each taken so many times, without building it."""

    def up_to(value: float) -> int:
        return sum(times * bisect_right(part, value) for part, times in parts)

    total = sum(times * len(part) for part, times in parts)
    index = bisect_left(values, (total + 1) // 2, key=up_to)
    low = values[index]
    if total % 2 or up_to(low) > total // 2:
        return low
    high = min(part[at] for part, _ in parts if (at := bisect_right(part, low)) < len(part))
    return (low + high) / 2.0


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
