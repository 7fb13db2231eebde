from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperflexis.core.slo import Slo, SloClass
from hyperflexis.errors import ConfigError
from hyperflexis.gateway.config import ANONYMOUS, GatewayConfig, Tenant
from hyperflexis.gateway.slo_sources import SloSources
from hyperflexis.openai_api import ApiError, SloFields

CHAT = SloClass("chat", Slo(1.0, 0.05), 2.0)
BATCH = SloClass("batch", Slo(e2e_s=600.0), 0.5)
SOURCES = SloSources({"chat": CHAT, "batch": BATCH}, "chat", {"flex": "batch"})


def test_each_field_comes_from_its_strongest_source() -> None:
    headers = {"x-slo-ttft-ms": "100", "x-llm-d-slo-ttft-ms": "1", "x-llm-d-slo-tpot-ms": "7"}
    promise = SOURCES.promise(ANONYMOUS, headers, SloFields(ttft_ms=2.0, tpot_ms=3.0, e2e_ms=4000.0), None)
    assert promise.slo == Slo(0.1, 0.007, 4.0)
    assert SOURCES.promise(ANONYMOUS, {}, SloFields(tpot_ms=3.0), None).slo == Slo(1.0, 0.003)


@pytest.mark.parametrize(
    ("header", "body", "tier", "tenant", "expected"),
    [
        ("batch", "chat", None, None, "batch"),
        (None, "batch", "auto", "chat", "batch"),
        (None, None, "flex", "chat", "batch"),
        (None, None, "auto", "batch", "batch"),
        (None, None, None, None, "chat"),
    ],
)
def test_the_strongest_class_wins(
    header: str | None, body: str | None, tier: str | None, tenant: str | None, expected: str
) -> None:
    headers = {} if header is None else {"x-slo-class": header}
    who = Tenant("t", weight=3.0, default_class=tenant)
    promise = SOURCES.promise(who, headers, SloFields(class_=body), tier)
    assert promise.slo_class == expected
    assert promise.value == {"chat": 6.0, "batch": 1.5}[expected]
    assert promise.weight == 3.0


def test_a_fleet_without_classes_promises_what_is_asked() -> None:
    promise = SloSources({}, None, {}).promise(ANONYMOUS, {"x-slo-e2e-ms": "5000"}, None, "default")
    assert (promise.slo_class, promise.slo, promise.value) == ("default", Slo(e2e_s=5.0), 1.0)


def test_what_a_class_promises_may_also_be_asked_for_by_number() -> None:
    tenant = Tenant("t", floor=Slo(ttft_s=2.0))
    assert SOURCES.promise(tenant, {"x-slo-ttft-ms": "1000"}, None, None).slo.ttft_s == 1.0
    for sources in ({"x-slo-ttft-ms": "999"}, {"x-slo-ttft-ms": "1999", "x-slo-class": "batch"}):
        with pytest.raises(ApiError) as error:
            SOURCES.promise(tenant, sources, None, None)
        assert (error.value.status, error.value.param) == (403, "slo.ttft_ms")


@given(st.text())
def test_any_header_is_a_positive_duration_or_a_named_error(value: str) -> None:
    try:
        slo = SOURCES.promise(ANONYMOUS, {"x-slo-ttft-ms": value}, None, None).slo
    except ApiError as error:
        assert (error.status, error.param) == (400, "x-slo-ttft-ms")
    else:
        assert slo.ttft_s is not None and 0 < slo.ttft_s < float("inf")


@pytest.mark.parametrize(
    "change",
    [
        {"default_class": "gold"},
        {"service_tiers": {"flex": "gold"}},
        {"tenants": (Tenant("t", default_class="gold"),)},
        {"tenants": (Tenant("t", allowed_classes=frozenset({"gold"})),)},
        {"api_keys": {"k": "gold"}},
        {"models": {}},
    ],
)
def test_a_configuration_that_names_what_is_not_there(change: dict[str, object]) -> None:
    arguments: dict[str, object] = {"id": "g", "controller": "unix:/c", "models": {"m": None}, "classes": (CHAT, BATCH)}
    with pytest.raises(ConfigError, match="models" if "models" in change else "gold"):
        GatewayConfig(**(arguments | change))  # type: ignore[arg-type]


def test_keys_and_token_are_not_shown() -> None:
    config = GatewayConfig(
        "g", "unix:/c", {"m": None}, tenants=(Tenant("t"),), api_keys={"secret1": "t"}, token="secret2"
    )
    assert "secret" not in repr(config)
