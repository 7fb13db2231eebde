from __future__ import annotations

from math import inf

import pytest

from hyperflexis.core.latency import Coefficients
from hyperflexis.core.latency_table import DecodeGrid, LatencyTable, PromptGrid

FORMULA = Coefficients(0.010, 2e-5, 1e-9, 1e-5, 1e-8)
TABLE = LatencyTable(
    FORMULA,
    DecodeGrid((2.0, 10.0), (100.0, 200.0, 400.0), ((0.010, 0.011, 0.015), (0.020, 0.022, 0.024))),
    PromptGrid(
        (100.0, 300.0),
        (0.0, 20.0),
        (100.0, 400.0),
        (((0.030, 0.030), (0.034, 0.040)), ((0.050, 0.050), (0.058, 0.070))),
    ),
)


def decode_s(decodes: float, kv_tokens: float) -> float:
    a, b, _ = TABLE.decode_line(decodes, kv_tokens)
    return a + b * kv_tokens


def test_grid_nodes_are_as_measured() -> None:
    assert decode_s(2, 200) == pytest.approx(0.010)
    assert decode_s(10, 10 * 400) == pytest.approx(0.024)
    assert TABLE.prompt_s(100, 0.0, 0, 0) == pytest.approx(0.030)
    assert TABLE.prompt_s(280, 0.0, 20, 20 * 400) == pytest.approx(0.070)


def test_in_between_lines_are_straight_in_every_direction() -> None:
    assert decode_s(6, 6 * 100) == pytest.approx(0.015)
    assert decode_s(6, 6 * 150) == pytest.approx((0.015 + 0.0165) / 2)
    assert decode_s(6, 6 * 300) == pytest.approx((0.0165 + 0.0195) / 2)
    assert TABLE.prompt_s(190, 0.0, 10, 10 * 250) == pytest.approx((0.030 * 2 + 0.034 + 0.040) / 8 + 0.228 / 8)


def test_decode_lines_end_where_the_next_grid_line_is_met() -> None:
    assert [TABLE.decode_line(6, kv)[2] for kv in (0, 599, 600, 1200, 2399, 2400)] == [600, 600, 1200, 2400, 2400, inf]


def test_without_decodes_their_context_does_not_matter() -> None:
    assert TABLE.prompt_s(200, 0.0, 0, 0) == pytest.approx(0.040)


def test_prompt_attention_is_added_and_grows_with_the_chunk_s_context() -> None:
    fresh, later = 100 * 50.0, 100 * (4000 + 50.0)
    assert TABLE.prompt_s(100, fresh, 0, 0) == pytest.approx(0.030 + 1e-9 * fresh)
    assert TABLE.prompt_s(100, later, 0, 0) - TABLE.prompt_s(100, fresh, 0, 0) == pytest.approx(1e-9 * 100 * 4000)


def test_outside_of_the_grid_the_formula_goes_on_from_its_edge() -> None:
    # More context, more decodes and both; fewer decodes and less context.
    assert decode_s(2, 2 * 500) == pytest.approx(0.015 + 1e-8 * 2 * 100)
    assert decode_s(15, 15 * 200) == pytest.approx(0.022 + 1e-5 * 5 + 1e-8 * 200 * 5)
    assert decode_s(15, 15 * 500) == pytest.approx(0.024 + 1e-5 * 5 + 1e-8 * (15 * 500 - 10 * 400))
    assert decode_s(1, 50) == pytest.approx(0.010 - 1e-5 + 1e-8 * (50 - 200))
    # A longer prompt, a shorter one, and more decodes beside it.
    assert TABLE.prompt_s(1000, 0.0, 0, 0) == pytest.approx(0.050 + 2e-5 * 700)
    assert TABLE.prompt_s(10, 0.0, 0, 0) == pytest.approx(0.030 - 2e-5 * 90)
    assert TABLE.prompt_s(260, 0.0, 40, 40 * 100) == pytest.approx(0.058 + 1e-5 * 20 - 2e-5 * 20 + 1e-8 * 20 * 100)
