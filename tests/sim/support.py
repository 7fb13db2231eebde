"""A small device to count on by hand."""

from __future__ import annotations

from hyperflexis.core.latency import Coefficients
from hyperflexis.core.latency_table import LatencyTable
from hyperflexis.core.profile import Domain, Profile
from hyperflexis.core.slo import Slo
from hyperflexis.sim.workload import Arrival


def device(
    coefficients: Coefficients,
    *,
    kv_capacity_tokens: int = 1_000_000,
    max_batch: int = 64,
    max_batch_tokens: int = 16_384,
    context_length: int = 1_000_000,
    table: LatencyTable | None = None,
) -> Profile:
    return Profile(
        name="test",
        model="test",
        device_kind="test",
        source="none",
        assumptions="none",
        coefficients=coefficients,
        mape={},
        domain=Domain(max_batch_tokens, max_batch, kv_capacity_tokens),
        kv_bytes_per_token=1,
        weight_bytes=1,
        kv_capacity_tokens=kv_capacity_tokens,
        context_length=context_length,
        max_batch=max_batch,
        max_batch_tokens=max_batch_tokens,
        table=table,
    )


def arrival(t: float, prompt: int, output: int, slo: Slo, name: str = "a", hash_ids: tuple[int, ...] = ()) -> Arrival:
    return Arrival(t, name, slo, 1.0, prompt, output, hash_ids=hash_ids)
