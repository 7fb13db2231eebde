"""Plots and a self-contained HTML page from the runs of one or more policies.

The page needs nothing but itself: pictures are embedded, there is no script and no link to follow.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.record import Record, Run
from ..errors import HyperFlexisError
from . import plot
from .plot import number, percent
from .summary import Summary, class_names, summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Runs = Mapping[str, Sequence[Run]]
"""Policy -> its runs. The n-th runs of all policies saw the same arrivals where there are several."""

WINDOW_S = 2.5  # of the timeline: a dozen requests each at the rates of a laptop


def write(out: Path, title: str, facts: Mapping[str, str], runs: Runs, notes: Sequence[str] = ()) -> Path:
    """Write attainment.png, ttft.png, timeline.png and index.html into ``out``; the path of the page.

    ``facts`` are shown as a table (machine, seed, versions), ``notes`` as paragraphs above the figures. Raises
    HyperFlexisError when matplotlib is missing or ``out`` cannot be written.
    """
    summaries = {label: summarise(found) for label, found in runs.items()}

    def draw() -> dict[str, Figure]:
        return {
            "attainment.png": attainment_figure(summaries),
            "ttft.png": ttft_figure(runs),
            "timeline.png": timeline_figure(runs),
        }

    try:
        pictures = plot.save(out, draw)
        page = out / "index.html"
        page.write_text(_page(title, facts, notes, summaries, pictures))
    except OSError as error:
        raise HyperFlexisError(f"cannot write the report to {out}: {error.strerror}") from None
    return page


def attainment_figure(summaries: Mapping[str, Summary]) -> Figure:
    """Bars: the share of requests on time, by class and policy."""
    figure, [[axes]] = plot.panels(1, 9.0, 3.8)
    names = list(next(iter(summaries.values())).classes)
    groups = [*names, "all"]
    width = 0.8 / len(summaries)
    for index, (label, summary) in enumerate(summaries.items()):
        shares = [100.0 * (summary.attainment_by_class.get(name) or 0.0) for name in names]
        shares.append(100.0 * (summary.attainment or 0.0))
        at = [x + (index - (len(summaries) - 1) / 2) * width for x in range(len(groups))]
        axes.bar(at, shares, width * 0.94, label=label, color=plot.colour(index))
        tops = list(shares)
        if "attainment" in summary.ci95:
            low, high = (100.0 * edge for edge in summary.ci95["attainment"])
            below, tops[-1] = max(shares[-1] - low, 0.0), max(high, shares[-1])
            axes.errorbar(at[-1], shares[-1], [[below], [tops[-1] - shares[-1]]], color="#333333", capsize=3, lw=1)
        for x, share, top in zip(at, shares, tops, strict=True):
            axes.text(x, top + 1.5, f"{share:.0f}", ha="center", fontsize=9, color="#333333")
    axes.set_xticks(range(len(groups)), [name or "-" for name in groups])
    axes.axvline(len(names) - 0.5, color="#bbbbbb", lw=1)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("requests on time, %")
    axes.grid(axis="x", visible=False)
    axes.set_title("Attainment: every promise of the request held")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def ttft_figure(runs: Runs) -> Figure:
    """One panel a class: the distribution of TTFT over its promise. A request that never got a first token counts in
    the denominator, so a curve that ends below 100% shows them."""
    names = class_names(r for r in _records(runs) if r.slo.ttft_s is not None or r.slo.e2e_s is not None)
    figure, [panels] = plot.panels(max(len(names), 1), 3.0, 3.4, sharey="all")
    for panel, name in zip(panels, names, strict=False):
        promised_first = any(r.slo.ttft_s is not None for r in _records(runs) if r.slo_class == name)
        for index, (label, found) in enumerate(runs.items()):
            records = [r for run in found for r in run.records if r.slo_class == name and r.outcome != "cancelled"]
            ratios = sorted(ratio for r in records if (ratio := _ratio(r, promised_first)) is not None)
            shares = [100.0 * (i + 1) / len(records) for i in range(len(ratios))]
            panel.step([0.01, *ratios], [0.0, *shares], where="post", color=plot.colour(index), lw=1.8, label=label)
        panel.axvline(1.0, color="#333333", lw=1, ls="--")
        panel.set_xscale("log")
        panel.set_xlim(0.03, 30)
        panel.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
        panel.set_ylim(0, 103)
        panel.set_title(name or "-")
        panel.set_xlabel("TTFT / its promise" if promised_first else "e2e / its promise")
    panels[0].set_ylabel("requests, %")
    figure.suptitle(
        "Time against deadline (left of the dashed line: on time)", x=0.01, ha="left", fontsize=11, weight="bold"
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def timeline_figure(runs: Runs) -> Figure:
    """Attainment by time of arrival, and requests waiting for a first token and receiving tokens, over all runs."""
    figure, rows = plot.panels(1, 9.0, 2.1, rows=3, sharex="all")
    on_time, waiting, running = panels = [row[0] for row in rows]
    for index, (label, found) in enumerate(runs.items()):
        colour, offset = plot.colour(index), 0.0
        for position, run in enumerate(found):
            name = label if position == 0 else None
            starts, shares = _attainment_windows(run)
            on_time.step([offset + s for s in starts], shares, where="post", color=colour, lw=1.8, label=name)
            ends = _counts((r.arrived_at, _first_at(r, run)) for r in run.records)
            waiting.step([offset + t for t, _ in ends], [n for _, n in ends], where="post", color=colour, lw=1.4)
            held = _counts((_first_at(r, run), _last_at(r, run)) for r in run.records if r.ttft_s is not None)
            running.step([offset + t for t, _ in held], [n for _, n in held], where="post", color=colour, lw=1.4)
            offset += _span(runs, position)
    offset = 0.0
    for position in range(max(len(found) for found in runs.values())):
        duration = max(found[position].duration_s for found in runs.values() if position < len(found))
        for panel in panels:
            panel.axvspan(offset + duration, offset + _span(runs, position), color="#f1f1f1", lw=0)
        offset += _span(runs, position)
    for panel, text in zip(panels, ("on time, %", "waiting", "receiving"), strict=True):
        panel.set_ylabel(text)
        panel.set_xlim(0, offset)
        panel.margins(y=0.08)
    on_time.set_ylim(0, 105)
    waiting.set_ylim(bottom=0)
    running.set_ylim(bottom=0)
    on_time.set_title("Timeline: same arrivals for every policy; grey: no new arrivals, the queue drains")
    running.set_xlabel("seconds (windows of a policy end to end)")
    figure.legend(*on_time.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _records(runs: Runs) -> Iterable[Record]:
    return (record for found in runs.values() for run in found for record in run.records)


def _ratio(record: Record, promised_first: bool) -> float | None:
    if promised_first:
        return None if record.ttft_s is None or record.slo.ttft_s is None else record.ttft_s / record.slo.ttft_s
    return None if record.e2e_s is None or record.slo.e2e_s is None else record.e2e_s / record.slo.e2e_s


def _attainment_windows(run: Run) -> tuple[list[float], list[float]]:
    """Starts of windows of arrivals and the share of their requests on time; empty windows keep the last share."""
    count = max(1, round(run.duration_s / WINDOW_S))
    totals, attained = [0] * count, [0] * count
    for record in run.records:
        if record.outcome != "cancelled":
            window = min(int(record.arrived_at / run.duration_s * count), count - 1)
            totals[window] += 1
            attained[window] += record.is_attained
    shares: list[float] = []
    for total, good in zip(totals, attained, strict=True):
        shares.append(100.0 * good / total if total else (shares[-1] if shares else 100.0))
    return [i * run.duration_s / count for i in range(count)] + [run.duration_s], [*shares, shares[-1]]


def _first_at(record: Record, run: Run) -> float:
    if record.outcome == "rejected":
        return record.arrived_at
    return run.ended_s if record.ttft_s is None else record.arrived_at + record.ttft_s


def _last_at(record: Record, run: Run) -> float:
    return run.ended_s if record.e2e_s is None else record.arrived_at + record.e2e_s


def _counts(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, int]]:
    """How many intervals are open, from each moment that it changes."""
    changes = sorted(change for start, end in intervals for change in ((start, 1), (end, -1)))
    open_now, found = 0, [(0.0, 0)]
    for at, change in changes:
        open_now += change
        found.append((at, open_now))
    return found


def _span(runs: Runs, position: int) -> float:
    """Seconds that the runs at ``position`` take up on the common time line."""
    return max(max(f[position].ended_s, f[position].duration_s) for f in runs.values() if position < len(f))


CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0 } th, td { padding: .2rem .7rem; border-bottom: 1px solid #e3e3e3 }
th { text-align: left; font-weight: 600 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
tr.all td { font-weight: 600; border-bottom: 2px solid #bbb } img { max-width: 100% } .facts td { color: #444 }
"""


def _page(
    title: str,
    facts: Mapping[str, str],
    notes: Sequence[str],
    summaries: Mapping[str, Summary],
    pictures: Mapping[str, bytes],
) -> str:
    escape = html.escape
    images = "".join(
        f'<p><img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></p>'
        for name, data in pictures.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{CSS}</style>'
        f"<h1>{escape(title)}</h1>"
        + "".join(f"<p>{escape(note)}</p>" for note in notes)
        + "<h2>By policy and class</h2>"
        + _class_table(summaries)
        + "<h2>Overall</h2>"
        + _overall_table(summaries)
        + f"<h2>Pictures</h2>{images}<h2>How it was measured</h2><table class=facts>"
        + "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
        + "</table></html>\n"
    )


def _class_table(summaries: Mapping[str, Summary]) -> str:
    headings = (
        "requests",
        "on time",
        "TTFT p50 ms",
        "p99",
        "TPOT p50 ms",
        "p99",
        "e2e p50 s",
        "p99",
        "rejected",
        "lost",
    )
    rows = ["<tr><th>policy</th><th>class</th>" + "".join(f"<th class=n>{h}</th>" for h in headings) + "</tr>"]
    for label, summary in summaries.items():
        for name, c in summary.classes.items():
            cells = (
                str(c.requests),
                percent(c.attainment),
                number(c.p50_ttft_ms, 0),
                number(c.p99_ttft_ms, 0),
                number(c.p50_tpot_ms, 1),
                number(c.p99_tpot_ms, 1),
                number(c.p50_e2e_s, 2),
                number(c.p99_e2e_s, 2),
                str(c.rejected),
                str(c.failed + c.unfinished),
            )
            rows.append(_row((label, name or "-"), cells, ""))
        cells = (
            str(summary.requests),
            percent(summary.attainment),
            number(summary.p50_ttft_ms, 0),
            number(summary.p99_ttft_ms, 0),
            number(summary.p50_tpot_ms, 1),
            number(summary.p99_tpot_ms, 1),
            "",
            "",
            str(summary.rejected),
            str(summary.failed + summary.unfinished),
        )
        rows.append(_row((label, "all"), cells, " class=all"))
    return f"<table>{''.join(rows)}</table>"


def _overall_table(summaries: Mapping[str, Summary]) -> str:
    headings = ("on time (95% interval)", "goodput, requests/s", "mean e2e s", "mean capped e2e s")
    rows = ["<tr><th>policy</th>" + "".join(f"<th class=n>{h}</th>" for h in headings) + "</tr>"]
    for label, summary in summaries.items():
        interval = summary.ci95.get("attainment")
        spread = f" ({percent(interval[0])} to {percent(interval[1])})" if interval else ""
        cells = (
            percent(summary.attainment) + spread,
            number(summary.goodput_rps, 2),
            number(summary.mean_e2e_s, 2),
            number(summary.mean_capped_e2e_s, 2),
        )
        rows.append(_row((label,), cells, ""))
    return f"<table>{''.join(rows)}</table>"


def _row(names: Sequence[str], cells: Sequence[str], attributes: str) -> str:
    texts = "".join(f"<td>{html.escape(name)}</td>" for name in names)
    return f"<tr{attributes}>{texts}{''.join(f'<td class=n>{html.escape(cell)}</td>' for cell in cells)}</tr>"
