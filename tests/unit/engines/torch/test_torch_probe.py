from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hyperflexis.core.latency import Coefficients
from hyperflexis.engines.torch.loader import load
from hyperflexis.engines.torch.probe import fit, probe, shapes


def test_fit_finds_the_coefficients_behind_the_times() -> None:
    truth = Coefficients(5e-3, 4e-4, 3e-7, 8e-4, 4e-7)
    rows = [shape.features() for shape in shapes(64, 2048, 8192, 100_000)]
    got = fit(rows, [truth.predict(*row) for row in rows])
    for name in ("c0", "c1", "c2", "c3", "c4"):
        assert getattr(got, name) == pytest.approx(getattr(truth, name), rel=0.02)


def test_fit_is_never_negative_and_stays_near_noisy_times() -> None:
    rows = [shape.features() for shape in shapes(64, 2048, 8192, 100_000)]
    times = [1e-3 * (1.0 + 0.3 * (-1) ** i) for i in range(len(rows))]
    got = fit(rows, times)
    assert min(got.c0, got.c1, got.c2, got.c3, got.c4) >= 0.0
    assert got.predict(*rows[0]) == pytest.approx(1e-3, rel=0.5)


@pytest.mark.parametrize(
    ("batch", "tokens", "context", "kv"), [(64, 2048, 8192, 131072), (1, 16, 32, 32), (4, 64, 512, 600)]
)
def test_probes_keep_within_the_limits(small_model: Path, batch: int, tokens: int, context: int, kv: int) -> None:
    wanted = shapes(batch, tokens, context, kv)
    assert wanted[0].decodes == 1
    for shape in wanted:
        assert shape.decodes <= batch
        assert shape.prefill <= tokens
        assert max(shape.decode_context + 1, shape.prefill_context + shape.prefill) <= context
        assert shape.decodes * (shape.decode_context + 1) <= kv


def test_probing_measures_a_model(small_model: Path) -> None:
    runner = load(small_model, torch.device("cpu"), None, 512, 16, 512)
    got = probe(runner, shapes(8, 64, 512, 512))
    assert 0.0 < got.decode_s(1, 64) < 1.0
