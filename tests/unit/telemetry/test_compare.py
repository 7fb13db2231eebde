"""The report of a comparison: distributions from records, a page that needs nothing but itself, pictures."""

from __future__ import annotations

import re
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from hyperflexis.core.record import Record, Run
from hyperflexis.core.slo import Slo
from hyperflexis.errors import HyperFlexisError
from hyperflexis.telemetry import compare
from hyperflexis.telemetry.compare import Comparison, Point, Timeline, carried_text, curves
from hyperflexis.telemetry.summary import summarise
from hyperflexis.telemetry.sweep import Carried


def records(late: float) -> tuple[Record, ...]:
    slo = Slo(1.0, 0.1)
    chat = [Record("chat", slo, i * 0.5, 10, 5, "finished", 0.1 * i * late, 0.1 * i * late + 0.2, 5) for i in range(20)]
    return (*chat, Record("<b>", Slo(e2e_s=5.0), 3.0, 10, 1, "rejected"))


def comparison(loads: tuple[float, ...], lp: float | None = None) -> Comparison:
    found = {"slow": records(3.0), "fast": records(0.5)}
    summaries = {name: summarise([Run(r, 10.0, 14.0)]) for name, r in found.items()}
    resting = Timeline(10.0, [0.0, 7.0, 14.0], [[0, 2, 0], [1, 3, 0]], [[40, inf, 0], [0, 0, 0]], [[0, 50, 0]] * 2)
    return Comparison(
        title="A <title>",
        facts={"seed": "7"},
        notes=["A note."],
        points={n: [Point(x, 10 * x, s, 1.0, lp) for x in loads] for n, s in summaries.items()},
        chosen=loads[-1],
        carried={name: (Carried(1.25), Carried(None)) for name in found},
        curves={name: curves(r) for name, r in found.items()},
        timelines=dict.fromkeys(found, resting),
    )


@pytest.mark.parametrize(
    ("loads", "lp", "pictures"),
    [
        ((0.8, 1.2), 0.97, {"attainment", "classes", "latency", "timeline"}),
        ((1.0,), None, {"attainment", "latency", "timeline"}),
    ],
    ids=["sweep", "one load"],
)
def test_the_page_holds_all(loads: tuple[float, ...], lp: float | None, pictures: set[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="reports need the extra `report`")
    page = compare.write(tmp_path / "out", comparison(loads, lp))
    text = page.read_text()
    assert text.count("data:image/png;base64,") == len(pictures)
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == pictures
    assert "A &lt;title&gt;" in text and "&lt;b&gt;" in text and "<b>" not in text
    assert "A note." in text and "seed" in text and "slow" in text and "fast" in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    # Of 21 requests 20 are chat, of which TTFT 0.1 i late <= 1 holds for 4 (late 3) and 20 (late 0.5).
    assert ">19.0%<" in text and ">95.2%<" in text and ">20.0%<" in text
    assert (">1.25<" in text and ">12.50<" in text and ">97.0%<" in text) == (len(loads) > 1)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="reports need the extra `report`")
    (tmp_path / "file").write_text("")
    with pytest.raises(HyperFlexisError, match="cannot write the report"):
        compare.write(tmp_path / "file", comparison((1.0,)))


def test_curves_end_where_requests_never_came() -> None:
    slo = Slo(1.0)
    found = curves(
        [
            Record("chat", slo, 0.0, 10, 5, "finished", 0.2, 0.6, 5),
            Record("chat", slo, 0.0, 10, 1, "finished", 0.4, 0.4, 1),
            Record("chat", slo, 0.0, 10, 5, "unfinished", 3.0),
            Record("chat", slo, 0.0, 10, 5, "rejected"),
            Record("chat", slo, 0.0, 10, 5, "cancelled", 0.1),
        ]
    )["chat"]
    assert found.ttft == [(0.2, 0.25), (0.4, 0.5), (3.0, 0.75)]
    assert found.e2e == [(0.4, 0.25), (0.6, 0.5)]
    assert found.tpot == [(pytest.approx(0.1), pytest.approx(1 / 3))]  # of the three that asked for several tokens


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    slo = Slo(1.0)
    many = [Record("chat", slo, 0.0, 10, 1, "finished", float(i), float(i), 1) for i in range(1, 100_001)]
    curve = curves(many)["chat"].ttft
    assert len(curve) == compare.CURVE_POINTS and curve[-1] == (100_000.0, 1.0)
    assert all(share == pytest.approx(value / 100_000) for value, share in curve)


def test_what_a_sweep_does_not_reach_is_said() -> None:
    assert carried_text(Carried(None)) == "below the sweep"
    assert carried_text(Carried(1.5, at_least=True), 2.0) == "≥ 3.00"


def test_a_fleet_that_changes_its_size_shows_it() -> None:
    pytest.importorskip("matplotlib", reason="reports need the extra `report`")
    fixed = next(iter(comparison((1.0,)).timelines.values()))
    scaled = replace(fixed, sizes=[(0.0, 2), (5.0, 3)])
    figure = compare.timeline_figure({"fixed": replace(fixed, sizes=[(0.0, 2)]), "scaled": scaled}, 1.0)
    drawn = [panel.lines[0].get_xydata().tolist() for panel in figure.axes[3::4]]
    assert drawn == [[[0.0, 2.0], [14.0, 2.0]], [[0.0, 2.0], [5.0, 3.0], [14.0, 3.0]]]
    assert len(compare.timeline_figure({"fixed": fixed}, 1.0).axes) == 3
