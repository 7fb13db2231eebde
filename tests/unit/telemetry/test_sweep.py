"""Figures over seeds and loads."""

from __future__ import annotations

import pytest

from hyperflexis.core.record import Record, Run
from hyperflexis.core.slo import Slo
from hyperflexis.telemetry.summary import Summary, summarise
from hyperflexis.telemetry.sweep import Carried, carried, combine, figures, t975, t_interval, worst_class


def summary(*ttfts: float | None, slo_class: str = "chat") -> Summary:
    """Requests that were promised a first token within a second; None was refused."""
    records = [
        Record(slo_class, Slo(1.0), float(i), 10, 5, "rejected")
        if ttft is None
        else Record(slo_class, Slo(1.0), float(i), 10, 5, "finished", ttft, ttft + 1.0, 5)
        for i, ttft in enumerate(ttfts)
    ]
    return summarise([Run(tuple(records), 10.0, 20.0)], accelerator_s=40.0)


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (4, 2.776), (30, 2.042), (60, 2.000), (1000, 1.962)])
def test_quantiles_of_student_s_t(freedom: int, quantile: float) -> None:
    assert t975(freedom) == pytest.approx(quantile, abs=6e-4)


def test_an_interval_by_hand() -> None:
    # Mean 2, standard deviation 1, three values: half width 4.303 / sqrt(3).
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0 - 2.4843, 2.0 + 2.4843), abs=1e-3)


def test_figures_are_means_over_seeds_and_counts_are_sums() -> None:
    a, b = summary(0.5, 0.5, 2.0, None), summary(0.5, 0.7)
    both = combine([a, b])
    assert both.attainment == pytest.approx((0.5 + 1.0) / 2)  # not 4/6: each seed counts alike
    assert both.mean_e2e_s == pytest.approx((a.mean_e2e_s + b.mean_e2e_s) / 2)
    assert (both.requests, both.rejected, both.accelerator_s) == (6, 1, 80.0)
    assert both.classes["chat"].requests == 6 and both.classes["chat"].attainment == pytest.approx(0.75)
    low, high = both.ci95["attainment"]
    assert low == 0.0 and high == 1.0  # two seeds say little, but a share stays a share
    assert both.ci95["attainment_by_class.chat"] == (low, high)
    assert both.ci95["mean_e2e_s"][0] < a.mean_e2e_s < both.ci95["mean_e2e_s"][1]


def test_one_seed_keeps_its_own_intervals() -> None:
    one = summary(*[0.5, 2.0] * 10)
    assert combine([one]) is one and "attainment" in one.ci95


def test_a_figure_that_a_seed_lacks_comes_from_the_others() -> None:
    both = combine([summary(None, None), summary(0.5)])
    assert both.p50_ttft_ms == pytest.approx(500.0)
    assert "p50_ttft_ms" not in both.ci95
    assert both.attainment == pytest.approx(0.5)


def test_a_class_that_a_seed_lacks_comes_from_the_others() -> None:
    both = combine([summary(0.5), summary(2.0, slo_class="code")])
    assert both.attainment_by_class == {"chat": 1.0, "code": 0.0}
    assert worst_class(both) == 0.0


def test_figures_have_the_names_of_the_intervals() -> None:
    one = summary(*[0.5, 2.0] * 10)
    assert one.ci95.keys() <= figures(one).keys()


@pytest.mark.parametrize(
    ("points", "load", "at_least"),
    [
        ({0.5: 1.0, 1.0: 0.95, 1.5: 0.85}, 1.25, False),
        ({0.5: 1.0, 1.0: 0.95}, 1.0, True),
        ({0.5: 0.8, 1.0: 0.7}, None, False),
        ({1.0: 0.9, 2.0: 0.0}, 1.0, False),
        ({2.0: 0.8, 1.0: 1.0}, 1.5, False),
        # The largest load counts where a curve crosses more than once.
        ({1.0: 1.0, 2.0: 0.8, 3.0: 0.95, 4.0: 0.85}, 3.5, False),
    ],
)
def test_the_load_that_is_carried(points: dict[float, float], load: float | None, at_least: bool) -> None:
    found = carried(points, 0.9)
    assert found == Carried(None if load is None else pytest.approx(load), at_least)


def test_no_requests_have_no_worst_class() -> None:
    assert worst_class(summarise([Run((), 1.0, 1.0)])) is None
