"""What a request was promised, from all the places that may say so. Pure.

The class: header ``x-slo-class``, else the body's ``slo.class``, else ``service_tier``, else the tenant's default,
else the fleet's. Each SLO field by itself: header, else body, else the class. A client's own ``priority`` is ignored:
how much a request matters is its class's and its tenant's affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from ..core.slo import Slo, SloClass
from ..openai_api import ApiError, SloFields
from .config import Tenant

# The class of requests in a fleet that has no classes.
NO_CLASS = SloClass("default", Slo())
# OpenAI's own names; those that no class is mapped to leave the choice open, as their default does.
_OPENAI_TIERS = frozenset({"auto", "default", "flex", "scale", "priority", "standard_only"})
_FIELDS = (("ttft_ms", "ttft_s"), ("tpot_ms", "tpot_s"), ("e2e_ms", "e2e_s"))
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class Promise:
    """What holds for one request. ``value`` is class priority times tenant weight."""

    slo_class: str
    slo: Slo
    value: float
    weight: float
    fail_fast: bool


@dataclass(frozen=True, slots=True)
class SloSources:
    """The fleet's side of it."""

    classes: Mapping[str, SloClass]
    default_class: str | None
    service_tiers: Mapping[str, str]

    def promise(
        self, tenant: Tenant, headers: Mapping[str, str], body: SloFields | None, service_tier: str | None
    ) -> Promise:
        """Merge the sources. Raises ApiError: 400 for a bad value, 403 for a class or an SLO that is not allowed."""
        slo_class = self._slo_class(tenant, headers, body, service_tier)
        asked = _asked(headers, body)
        _check_floor(asked, tenant, slo_class)
        fail_fast = headers.get("x-slo-fail-fast", "false").strip().lower()
        if fail_fast not in _TRUTH:
            raise _bad("x-slo-fail-fast", f"must be true or false, got {fail_fast!r}")
        value = slo_class.priority * tenant.weight
        return Promise(slo_class.name, asked.over(slo_class.slo), value, tenant.weight, _TRUTH[fail_fast])

    def _slo_class(
        self, tenant: Tenant, headers: Mapping[str, str], body: SloFields | None, tier: str | None
    ) -> SloClass:
        if (name := headers.get("x-slo-class")) is not None:
            where = "x-slo-class"
        elif body is not None and (name := body.class_) is not None:
            where = "slo.class"
        elif (name := self._tier_class(tier)) is not None:
            where = "service_tier"
        elif (name := tenant.default_class or self.default_class) is not None:
            where = "slo.class"
        else:
            return NO_CLASS
        found = self.classes.get(name)
        if found is None:
            raise _bad(where, f"no class is named {name!r}; the classes are {sorted(self.classes)}", "unknown_class")
        allowed = tenant.allowed_classes
        if allowed is not None and name not in allowed:
            message = f"{where}: class {name!r} is not allowed to tenant {tenant.name!r}; it may use {sorted(allowed)}"
            raise ApiError(403, message, param=where, code="class_not_allowed")
        return found

    def _tier_class(self, tier: str | None) -> str | None:
        if tier is None or tier in self.service_tiers:
            return None if tier is None else self.service_tiers[tier]
        if tier not in _OPENAI_TIERS:
            known = sorted({*self.service_tiers, "auto", "default"})
            raise _bad("service_tier", f"no tier is named {tier!r}; the tiers are {known}")
        return None


def _asked(headers: Mapping[str, str], body: SloFields | None) -> Slo:
    found: dict[str, float | None] = {}
    for ms, s in _FIELDS:
        name = f"x-slo-{ms.replace('_', '-')}"
        if name not in headers:
            name = f"x-llm-d-slo-{ms.replace('_', '-')}"
        value = _milliseconds(name, headers[name]) if name in headers else None
        if value is None and body is not None:
            value = getattr(body, ms)
        found[s] = None if value is None else value / 1e3
    return Slo(**found)


def _milliseconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise _bad(name, f"must be a number of milliseconds, got {text[:40]!r}") from None
    if not isfinite(value) or value <= 0.0:
        raise _bad(name, f"must be a finite number of milliseconds above 0, got {text[:40]!r}")
    return value


def _check_floor(asked: Slo, tenant: Tenant, slo_class: SloClass) -> None:
    # What the class promises by itself may be asked for by number too.
    for ms, s in _FIELDS:
        wanted, floor, promised = getattr(asked, s), getattr(tenant.floor, s), getattr(slo_class.slo, s)
        if wanted is None or floor is None:
            continue
        tightest = floor if promised is None else min(floor, promised)
        if wanted < tightest:
            message = f"slo.{ms}: the tightest allowed to tenant {tenant.name!r} is {tightest * 1e3:g} ms"
            raise ApiError(403, message, param=f"slo.{ms}", code="slo_not_allowed")


def _bad(param: str, message: str, code: str = "invalid_slo") -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code=code)
