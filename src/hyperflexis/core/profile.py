"""A profile: one model on one kind of device, as numbers. Read from JSON under ``profiles/``; no I/O here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from ..errors import ConfigError
from .latency import Coefficients

REGIMES = ("prefill", "decode", "mixed")


@dataclass(frozen=True, slots=True)
class Domain:
    """The largest values that the fit has seen; what lies beyond is extrapolated. Sizes in tokens of one iteration."""

    prefill_tokens: int
    decodes: int
    kv_tokens: int

    def contains(self, prefill_tokens: float, decodes: float, kv_tokens: float) -> bool:
        """Whether an iteration of this shape lies inside what was measured."""
        return prefill_tokens <= self.prefill_tokens and decodes <= self.decodes and kv_tokens <= self.kv_tokens


@dataclass(frozen=True, slots=True)
class Profile:
    """A model on a device.

    ``mape`` is the mean absolute relative error of the fit in each of REGIMES (0.05: five percent). Bytes are of one
    instance, over all of its devices. ``kv_capacity_tokens`` is the context that its KV cache holds; ``max_batch`` and
    ``max_batch_tokens`` are the engine's limits on requests and tokens of one iteration. ``assumptions`` states what
    the source does not.
    """

    name: str
    model: str
    device_kind: str
    source: str
    assumptions: str
    coefficients: Coefficients
    mape: Mapping[str, float]
    domain: Domain
    kv_bytes_per_token: int
    weight_bytes: int
    kv_capacity_tokens: int
    context_length: int
    max_batch: int
    max_batch_tokens: int


_TEXTS = ("name", "model", "device_kind", "source", "assumptions")
_SIZES = (
    "kv_bytes_per_token",
    "weight_bytes",
    "kv_capacity_tokens",
    "context_length",
    "max_batch",
    "max_batch_tokens",
)
_FIELDS = {*_TEXTS, *_SIZES, "coefficients", "mape", "domain"}
_COEFFICIENTS = ("c0", "c1", "c2", "c3", "c4", "q90")
_DOMAIN = ("prefill_tokens", "decodes", "kv_tokens")


def profile_from_dict(data: object, where: str) -> Profile:
    """A profile from parsed JSON. ``where`` names the file in errors.

    Raises ConfigError naming the field that is missing, unknown or out of range.
    """
    fields = _object(data, where, _FIELDS)
    numbers = _object(fields["coefficients"], f"{where}: coefficients", set(_COEFFICIENTS))
    coefficients = Coefficients(**{key: _number(numbers[key], f"{where}: coefficients.{key}") for key in _COEFFICIENTS})
    if coefficients.c0 + coefficients.c3 + coefficients.c4 <= 0.0:
        raise ConfigError(f"{where}: coefficients: c0, c3 and c4 are all zero, so a decode would take no time")
    errors = _object(fields["mape"], f"{where}: mape", set(REGIMES))
    limits = _object(fields["domain"], f"{where}: domain", set(_DOMAIN))
    texts = {key: _text(fields[key], f"{where}: {key}") for key in _TEXTS}
    sizes = {key: _size(fields[key], f"{where}: {key}") for key in _SIZES}
    return Profile(
        name=texts["name"],
        model=texts["model"],
        device_kind=texts["device_kind"],
        source=texts["source"],
        assumptions=texts["assumptions"],
        coefficients=coefficients,
        mape={key: _number(errors[key], f"{where}: mape.{key}") for key in REGIMES},
        domain=Domain(**{key: _size(limits[key], f"{where}: domain.{key}") for key in _DOMAIN}),
        kv_bytes_per_token=sizes["kv_bytes_per_token"],
        weight_bytes=sizes["weight_bytes"],
        kv_capacity_tokens=sizes["kv_capacity_tokens"],
        context_length=sizes["context_length"],
        max_batch=sizes["max_batch"],
        max_batch_tokens=sizes["max_batch_tokens"],
    )


def _object(data: object, where: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: must be an object, not {type(data).__name__}")
    if missing := sorted(keys - data.keys()):
        raise ConfigError(f"{where}: {missing[0]!r} is missing; the fields are {', '.join(sorted(keys))}")
    if unknown := sorted(str(key) for key in data.keys() - keys):
        raise ConfigError(f"{where}: {unknown[0]!r} is no field of it; the fields are {', '.join(sorted(keys))}")
    return data


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where} must be a text that is not empty")
    return value


def _size(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where} must be a whole number of at least 1, not {value!r}")
    return value


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value) or value < 0.0:
        raise ConfigError(f"{where} must be a finite number of at least 0, not {value!r}")
    return float(value)
