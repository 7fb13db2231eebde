"""Pictures and a self-contained HTML page that compare policies over loads: the report of `hyperflexis simulate`.

attainment.png   share of requests on time against load, with bands and bounds (bars when there is one load)
classes.png      the same for each class (sweeps only)
latency.png      distributions of TTFT, TPOT and end-to-end time by class, at one load
timeline.png     requests waiting, time budget and KV use of each instance, at the same load
index.html       all of these and the tables; needs nothing but itself
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, isnan, log10, nan
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..core.record import Record
from ..core.slo import Slo
from ..errors import HyperFlexisError
from . import plot, report
from .plot import number, percent
from .summary import Summary, class_names, quantile
from .sweep import BY_CLASS, Carried

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVE_POINTS = 200
_MARKERS = "osD^vPX*"
_LINES = ("-", "--", ":")
_INK = "#333333"

Curve = Sequence[tuple[float, float]]
"""(seconds, share of the class's requests that took no longer), thinned. It ends below 1 where requests never came."""


@dataclass(frozen=True, slots=True)
class ClassCurves:
    """How long one class's requests took, and what they were promised."""

    slo: Slo
    ttft: Curve
    tpot: Curve
    e2e: Curve


Curves = Mapping[str, ClassCurves]
"""By class, tightest promise first."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """Series by instance at the same ``times``; the last request arrives before ``duration_s``. Infinite budgets mean
    that the policy sets none, 0 that the instance rests; ``kv`` is in percent of its capacity. ``sizes`` are (time,
    instances) where that changes."""

    duration_s: float
    times: Sequence[float]
    waiting: Sequence[Sequence[float]]
    budget_ms: Sequence[Sequence[float]]
    kv: Sequence[Sequence[float]]
    sizes: Sequence[tuple[float, int]] = ()


@dataclass(frozen=True, slots=True)
class Point:
    """A policy at one load. ``fluid`` and ``lp`` are the bounds on its attainment there."""

    load: float
    rps: float
    summary: Summary
    fluid: float
    lp: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that a report shows. ``points`` are each policy's, in order of load; ``curves`` and ``timelines`` are of the
    first seed at the load ``chosen``. ``carried`` has each policy's load and that for its worst class."""

    title: str
    facts: Mapping[str, str]
    notes: Sequence[str]
    points: Mapping[str, Sequence[Point]]
    chosen: float
    carried: Mapping[str, tuple[Carried, Carried]]
    curves: Mapping[str, Curves]
    timelines: Mapping[str, Timeline]

    @property
    def loads(self) -> list[float]:
        """In order."""
        return [point.load for point in next(iter(self.points.values()))]

    def at(self, load: float) -> dict[str, Point]:
        """Each policy at ``load``."""
        return {name: next(p for p in points if p.load == load) for name, points in self.points.items()}


def curves(records: Iterable[Record]) -> dict[str, ClassCurves]:
    """The distributions of a run's records. Every request but those cancelled is in the denominator, for TPOT every one
    that asked for at least two tokens."""
    by_class: dict[str, list[Record]] = {}
    for record in records:
        if record.outcome != "cancelled":
            by_class.setdefault(record.slo_class, []).append(record)
    found = {}
    for name in class_names(record for members in by_class.values() for record in members):
        members = by_class[name]
        several = sum(record.num_output_tokens > 1 for record in members)
        found[name] = ClassCurves(
            members[0].slo,
            _curve([r.ttft_s for r in members if r.ttft_s is not None], len(members)),
            _curve([tpot for r in members if (tpot := r.tpot_s) is not None], several),
            _curve([r.e2e_s for r in members if r.outcome == "finished" and r.e2e_s is not None], len(members)),
        )
    return found


def _curve(values: Sequence[float], count: int) -> list[tuple[float, float]]:
    ordered = sorted(values)
    step = max(len(ordered) / CURVE_POINTS, 1.0)
    picks = sorted({min(ceil((i + 1) * step), len(ordered)) - 1 for i in range(ceil(len(ordered) / step))})
    return [(ordered[pick], (pick + 1) / count) for pick in picks]


def write(out: Path, comparison: Comparison) -> Path:
    """Write the pictures and index.html into ``out``; the path of the page.

    Raises HyperFlexisError when matplotlib is missing or ``out`` cannot be written.
    """

    def draw() -> dict[str, Figure]:
        if len(comparison.loads) == 1:
            summaries = {name: points[0].summary for name, points in comparison.points.items()}
            pictures = {"attainment.png": report.attainment_figure(summaries)}
        else:
            pictures = {"attainment.png": attainment_figure(comparison), "classes.png": classes_figure(comparison)}
        return pictures | {
            "latency.png": latency_figure(comparison),
            "timeline.png": timeline_figure(comparison.timelines, comparison.chosen),
        }

    try:
        pictures = plot.save(out, draw)
        page = out / "index.html"
        page.write_text(_page(comparison, pictures))
    except OSError as error:
        raise HyperFlexisError(f"cannot write the report to {out}: {error.strerror}") from None
    return page


def attainment_figure(comparison: Comparison) -> Figure:
    """Share of requests on time against load."""
    figure, [[axes]] = plot.panels(1, 9.0, 4.6)
    first = next(iter(comparison.points.values()))
    for index, (name, points) in enumerate(comparison.points.items()):
        shares = [point.summary.attainment for point in points]
        _line(axes, index, name, points, shares, "attainment", _band_alpha(comparison))
    axes.plot([p.load for p in first], [100.0 * p.fluid for p in first], color=_INK, lw=1.3, ls=(0, (6, 2)), zorder=1)
    axes.plot([], [], color=_INK, lw=1.3, ls=(0, (6, 2)), label="shedding fluid (no deadlines, no bursts)")
    bounded = [(p.load, 100.0 * p.lp) for p in first if p.lp is not None]
    if bounded:
        axes.plot(*zip(*bounded, strict=True), color=_INK, lw=1.3, ls=":", marker="_", label="LP upper bound", zorder=1)
    _load_axes(axes, first)
    rate = first[-1].rps / first[-1].load
    both_ways: Any = (lambda load: load * rate, lambda rps: rps / rate)
    above = axes.secondary_xaxis("top", functions=both_ways)
    above.set_xlabel("requests/s", fontsize=9)
    above.tick_params(labelsize=9)
    axes.set_xlabel("load (arrival rate over the fleet's capacity for this mix)")
    axes.set_ylabel("requests on time, %")
    figure.suptitle("Attainment against load, with 95% intervals", x=0.01, ha="left", fontsize=11, weight="bold")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def classes_figure(comparison: Comparison) -> Figure:
    """A panel a class: share of its requests on time against load."""
    names = list(next(iter(comparison.points.values()))[0].summary.classes)
    columns = min(len(names), 4)
    figure, grid = plot.panels(
        columns, 10.4 / max(columns, 3), 2.9, rows=ceil(len(names) / columns), sharex="all", sharey="all"
    )
    cells, alpha = [axes for row in grid for axes in row], _band_alpha(comparison)
    for axes, slo_class in zip(cells, names, strict=False):
        for index, (name, points) in enumerate(comparison.points.items()):
            shares = [point.summary.attainment_by_class.get(slo_class) for point in points]
            _line(axes, index, name, points, shares, BY_CLASS + slo_class, alpha)
        _load_axes(axes, next(iter(comparison.points.values())))
        axes.set_title(slo_class or "-")
        axes.set_xlabel("load")
    for axes in cells[len(names) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("on time, %")
    figure.legend(*cells[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _line(
    axes: Axes,
    index: int,
    name: str,
    points: Sequence[Point],
    shares: Sequence[float | None],
    figure: str,
    alpha: float,
) -> None:
    """A policy's curve and band; what has no figure is left out."""
    shown = [(p, 100.0 * share) for p, share in zip(points, shares, strict=True) if share is not None]
    loads, colour = [p.load for p, _ in shown], plot.colour(index)
    edges = [p.summary.ci95.get(figure, (share / 100.0, share / 100.0)) for p, share in shown]
    axes.fill_between(
        loads, [100.0 * low for low, _ in edges], [100.0 * high for _, high in edges], color=colour, alpha=alpha, lw=0
    )
    axes.plot(
        loads,
        [share for _, share in shown],
        color=colour,
        lw=1.8,
        ls=_style(index),
        marker=_MARKERS[index % len(_MARKERS)],
        ms=4.5,
        label=name,
    )


def _band_alpha(comparison: Comparison) -> float:
    """Many bands on top of each other must stay pale for the lines to be seen."""
    return 0.18 if len(comparison.points) <= 3 else 0.08


def _style(index: int) -> str:
    """Where colours repeat, the lines differ."""
    return _LINES[index // len(plot.COLOURS) % len(_LINES)]


def _load_axes(axes: Axes, points: Sequence[Point]) -> None:
    axes.axhline(90.0, color="#999999", lw=1)
    axes.set_ylim(0, 103)
    axes.set_yticks([0, 20, 40, 60, 80, 90, 100])
    axes.margins(x=0.02)


def latency_figure(comparison: Comparison) -> Figure:
    """Distributions at the chosen load: a column a class, a row a figure; dashed: the promise."""
    classes = list(dict.fromkeys(name for found in comparison.curves.values() for name in found))
    rows = (("TTFT, s", "ttft", "ttft_s"), ("TPOT, ms", "tpot", "tpot_s"), ("end to end, s", "e2e", "e2e_s"))
    figure, grid = plot.panels(len(classes), max(2.6, 7.8 / len(classes)), 2.3, rows=len(rows), sharey="all")
    for panels, (label, field, promise) in zip(grid, rows, strict=True):
        for panel, slo_class in zip(panels, classes, strict=True):
            found = {name: c[slo_class] for name, c in comparison.curves.items() if slo_class in c}
            promised = getattr(next(iter(found.values())).slo, promise)
            scale = 1000.0 if "ms" in label else 1.0
            values = [scale * value for c in found.values() for value, _ in getattr(c, field)]
            low, high = _span(values + ([] if promised is None else [scale * promised]))
            for index, (name, c) in enumerate(found.items()):
                curve = getattr(c, field)
                xs = [low, *(scale * value for value, _ in curve), high]
                ys = [0.0, *(100.0 * share for _, share in curve), 100.0 * curve[-1][1] if curve else 0.0]
                panel.step(xs, ys, where="post", color=plot.colour(index), ls=_style(index), lw=1.6, label=name)
            if promised is not None:
                panel.axvline(scale * promised, color=_INK, lw=1, ls="--")
            panel.set_xscale("log")
            panel.set_xlim(low, high)
            ticks = _log_ticks(low, high)
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.set_xticks([], minor=True)
            panel.set_ylim(0, 103)
            panel.set_xlabel(label)
    for panel, slo_class in zip(grid[0], classes, strict=True):
        panel.set_title(slo_class or "-")
    for panels in grid:
        panels[0].set_ylabel("requests, %")
    title = f"How long requests took at load {comparison.chosen:.2f} (left of the dashed line: on time)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis: all but the lowest half percent, with some room."""
    positive = [value for value in values if value > 0.0] or [1.0]
    return 0.7 * quantile(positive, 0.005), 1.4 * max(positive)


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and twice and five times these where the axis is short."""
    parts = (1, 2, 5) if high < 50.0 * low else (1,)
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    return [tick for power in powers for part in parts if low <= (tick := part * 10.0**power) <= high]


def timeline_figure(timelines: Mapping[str, Timeline], load: float) -> Figure:
    """A row a policy, a column a figure; thin: each instance, thick: their mean. Grey: no more arrivals."""
    columns = (("waiting", "requests waiting"), ("budget_ms", "time budget, ms"), ("kv", "KV in use, %"))
    scaled = any(t > 0.0 for line in timelines.values() for t, _ in line.sizes)
    titles = [label for _, label in columns] + ["instances"] * scaled
    figure, grid = plot.panels(len(titles), 3.4, 1.8, rows=len(timelines), sharex="all", sharey="col")
    for index, (panels, (name, line)) in enumerate(zip(grid, timelines.items(), strict=True)):
        if scaled:
            times, counts = [t for t, _ in line.sizes], [count for _, count in line.sizes]
            end = max(line.times[-1], times[-1])
            panels[-1].step([*times, end], [*counts, counts[-1]], where="post", color=plot.colour(index), lw=1.4)
        for panel, (field, _) in zip(panels, columns, strict=False):
            series = [[_shown(field, value) for value in one] for one in getattr(line, field)]
            for one in series:
                panel.plot(line.times, one, color=plot.colour(index), lw=0.6, alpha=0.35)
            means = _smooth([_mean(values) for values in zip(*series, strict=True)])
            panel.plot(line.times, means, color=plot.colour(index), lw=1.8)
            if all(isnan(value) for value in means):
                panel.text(0.5, 0.5, "sets no budget", ha="center", va="center", transform=panel.transAxes, color=_INK)
        panels[0].set_ylabel(name)
    last_s = max(line.times[-1] for line in timelines.values())
    for panels, line in zip(grid, timelines.values(), strict=True):
        for panel in panels:
            panel.axvspan(line.duration_s, max(last_s, line.duration_s), color="#f1f1f1", lw=0, zorder=0)
    for panel, label in zip(grid[0], titles, strict=True):
        panel.set_title(label)
    for panel in grid[-1]:
        panel.set_xlabel("seconds")
        panel.set_xlim(0, max(last_s, next(iter(timelines.values())).duration_s))
        panel.set_ylim(bottom=0)
    title = (
        f"Instances over time at load {load:.2f} (thin: each one, thick: their smoothed mean, grey: no new arrivals)"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    return figure


def _shown(field: str, value: float) -> float:
    return nan if field == "budget_ms" and (value == 0.0 or not isfinite(value)) else value


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not isnan(value)]
    return fmean(known) if known else nan


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over a fortieth of the series."""
    half = len(values) // 80
    return [_mean(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title><style>{{ css }}</style>
<h1>{{ title }}</h1>
{% for note in notes %}<p>{{ note }}</p>
{% endfor %}
{% for table in tables %}<h2>{{ table.title }}</h2>
<table><tr>{% for cell in table.head %}<th class="{{ table.kind(loop.index) }}">{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for cell in row %}<td class="{{ table.kind(loop.index) }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
<h2>Pictures</h2>
{% for name, data in pictures %}<p><img alt="{{ name }}" src="data:image/png;base64,{{ data }}"></p>
{% endfor %}
<h2>How it was simulated</h2>
<table class=facts>{% for name, value in facts %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</table></html>
"""


@dataclass(frozen=True, slots=True)
class _Table:
    """``texts`` is how many of its first columns hold texts."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1

    def kind(self, column: int) -> str:
        """The CSS class of a column, counted from 1."""
        return "t" if column <= self.texts else "n"


def _page(comparison: Comparison, pictures: Mapping[str, bytes]) -> str:
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
    return template.render(
        title=comparison.title,
        css=report.CSS,
        notes=comparison.notes,
        tables=_tables(comparison),
        pictures=[(name, base64.b64encode(data).decode()) for name, data in pictures.items()],
        facts=list(comparison.facts.items()),
    )


def _tables(comparison: Comparison) -> list[_Table]:
    chosen = comparison.at(comparison.chosen)
    found = [_overall(f"At load {comparison.chosen:.2f}", chosen), _classes(chosen)]
    if len(comparison.loads) > 1:
        found.append(_carried(comparison))
        found.append(_sweep(comparison))
    return found


def _overall(title: str, points: Mapping[str, Point]) -> _Table:
    head = ("policy", "on time", "95% interval", "TTFT kept", "TPOT kept", "on time/s", "mean e2e s", "capped mean s")
    rows = []
    for name, point in points.items():
        s = point.summary
        cells = (
            name,
            percent(s.attainment),
            interval(s, "attainment"),
            percent(s.ttft_attainment),
            percent(s.tpot_attainment),
            number(s.goodput_rps, 2),
            number(s.mean_e2e_s, 2),
            number(s.mean_capped_e2e_s, 2),
            str(s.rejected),
            str(s.failed + s.unfinished),
            number(s.accelerator_s, 0),
        )
        rows.append(cells)
    return _Table(title, (*head, "rejected", "lost", "accelerator s"), rows)


def interval(summary: Summary, figure: str) -> str:
    """A share's interval, in percent; empty when there is none."""
    edges = summary.ci95.get(figure)
    return "" if edges is None else f"{100.0 * edges[0]:.1f} to {100.0 * edges[1]:.1f}"


def _classes(points: Mapping[str, Point]) -> _Table:
    head = ("policy", "class", "requests", "on time", "TTFT p50 ms", "p99", "TPOT p50 ms", "p99", "e2e p50 s", "p99")
    rows = [
        (
            name,
            slo_class or "-",
            str(c.requests),
            percent(c.attainment),
            number(c.p50_ttft_ms, 0),
            number(c.p99_ttft_ms, 0),
            number(c.p50_tpot_ms, 1),
            number(c.p99_tpot_ms, 1),
            number(c.p50_e2e_s, 2),
            number(c.p99_e2e_s, 2),
        )
        for name, point in points.items()
        for slo_class, c in point.summary.classes.items()
    ]
    return _Table("By class at that load", head, rows, texts=2)


def _carried(comparison: Comparison) -> _Table:
    first = next(iter(comparison.points.values()))
    rate = first[-1].rps / first[-1].load
    rows = [
        (name, carried_text(overall), carried_text(overall, rate), carried_text(worst), carried_text(worst, rate))
        for name, (overall, worst) in comparison.carried.items()
    ]
    head = ("policy", "90% of requests: load", "requests/s", "90% of every class: load", "requests/s")
    return _Table("The load that each policy carries", head, rows)


def carried_text(carried: Carried, factor: float = 1.0) -> str:
    """As shown in tables, times ``factor``."""
    if carried.load is None:
        return "below the sweep"
    return f"{'≥ ' if carried.at_least else ''}{factor * carried.load:.2f}"


def _sweep(comparison: Comparison) -> _Table:
    rows = []
    for load in comparison.loads:
        points = comparison.at(load)
        first = next(iter(points.values()))
        shares = [percent(point.summary.attainment) for point in points.values()]
        rows.append((f"{load:.2f}", f"{first.rps:.2f}", *shares, percent(first.fluid), percent(first.lp)))
    return _Table("Requests on time by load", ("load", "requests/s", *comparison.points, "fluid", "LP bound"), rows)
