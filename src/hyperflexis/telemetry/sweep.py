"""From single runs to a comparison: figures over seeds, and the load that a policy carries.

Figures of several seeds are means of the seeds' figures with Student's t intervals, counts are sums. Seeds differ in
everything random, so these intervals, unlike those within one run, say what another seed would give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import sqrt
from statistics import NormalDist, fmean, stdev
from typing import Any

from .summary import ClassSummary, Summary

# 97.5% quantiles of Student's t with 1, 2, ... 30 degrees of freedom.
_T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_COUNTS = ("requests", "rejected", "unfinished", "failed", "cancelled", "accelerator_s")
FIGURES = (
    "attainment",
    "ttft_attainment",
    "tpot_attainment",
    "goodput_rps",
    "mean_e2e_s",
    "mean_capped_e2e_s",
    "p50_ttft_ms",
    "p99_ttft_ms",
    "p50_tpot_ms",
    "p99_tpot_ms",
)
"""The figures of a Summary that are means over seeds."""
BY_CLASS = "attainment_by_class."
_SHARES = ("attainment", "ttft_attainment", "tpot_attainment", BY_CLASS)


def t975(freedom: int) -> float:
    """The 97.5% quantile of Student's t; past the table by its expansion in 1/freedom (Abramowitz and Stegun 26.7.5),
    right to the third decimal there."""
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the mean of at least two independent values."""
    mean, half = fmean(values), t975(len(values) - 1) * stdev(values) / sqrt(len(values))
    return mean - half, mean + half


def figures(summary: Summary) -> dict[str, float | None]:
    """The figures that are averaged over seeds, by the names that ``ci95`` uses."""
    found = {name: getattr(summary, name) for name in FIGURES}
    return found | {f"{BY_CLASS}{name}": share for name, share in summary.attainment_by_class.items()}


def combine(summaries: Sequence[Summary]) -> Summary:
    """One policy's seeds (at least one) as one summary. A single seed keeps its own intervals. A figure that a seed
    does not have (no request finished, say) is averaged over the seeds that have it."""
    if len(summaries) == 1:
        return summaries[0]
    known: dict[str, list[float]] = {}
    for summary in summaries:
        for name, value in figures(summary).items():
            if value is not None:
                known.setdefault(name, []).append(value)
    means = {name: fmean(values) for name, values in known.items()}
    ci95 = {name: _interval(name, values) for name, values in known.items() if len(values) > 1}
    names = list(dict.fromkeys(name for summary in summaries for name in summary.classes))
    values: dict[str, Any] = {name: means.get(name) for name in FIGURES}
    values |= {name: _sum([getattr(summary, name) for summary in summaries]) for name in _COUNTS}
    return replace(
        summaries[0],
        **values,
        attainment_by_class={name: means.get(BY_CLASS + name) for name in names},
        ci95=ci95,
        classes={name: _combine_class([s.classes[name] for s in summaries if name in s.classes]) for name in names},
    )


def _combine_class(classes: Sequence[ClassSummary]) -> ClassSummary:
    combined: dict[str, Any] = {}
    for name in (field.name for field in fields(ClassSummary)):
        values = [value for c in classes if (value := getattr(c, name)) is not None]
        combined[name] = sum(values) if name in _COUNTS else fmean(values) if values else None
    return ClassSummary(**combined)


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _interval(name: str, values: Sequence[float]) -> tuple[float, float]:
    low, high = t_interval(values)
    if name.startswith(_SHARES):
        return max(low, 0.0), min(high, 1.0)
    return low, high


@dataclass(frozen=True, slots=True)
class Carried:
    """The largest ``load`` of a sweep at which a share of requests is kept, None when even the smallest load of the
    sweep is too much. ``at_least``: the sweep ends before the policy does."""

    load: float | None
    at_least: bool = False


def carried(points: Mapping[float, float], share: float) -> Carried:
    """Where ``points`` (load -> attainment) last cross ``share``, on the straight line between two loads."""
    loads = sorted(points)
    kept = [load for load in loads if points[load] >= share]
    if not kept:
        return Carried(None)
    last = kept[-1]
    if last == loads[-1]:
        return Carried(last, at_least=True)
    beyond = loads[loads.index(last) + 1]
    part = (points[last] - share) / (points[last] - points[beyond])
    return Carried(last + part * (beyond - last))


def worst_class(summary: Summary) -> float | None:
    """The attainment of the class that fares worst."""
    return min((share for share in summary.attainment_by_class.values() if share is not None), default=None)
