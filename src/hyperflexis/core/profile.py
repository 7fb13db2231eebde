"""A profile: one model on one kind of device, as numbers. Read from JSON under ``profiles/``; no I/O here.

Two things are told apart. ``coefficients`` is what the scheduler plans with: a formula of few numbers that an online
fit corrects. ``iteration_s`` is what the device takes, as exactly as the source allows: the ``table`` where there is
one, else the formula. The simulator and the emulated engine keep to the second and let the scheduler find out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf, isfinite
from typing import Any

from ..errors import ConfigError
from .latency import Coefficients
from .latency_table import Axis, DecodeGrid, LatencyTable, Line, PromptGrid

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
class Start:
    """Seconds of a new instance's start-up, phase after phase: the ``process`` until its engine begins, the engine's
    own initialisation, reading the ``weights`` from local disk, and the ``warm_up`` (graph capture, first run)."""

    process_s: float
    engine_init_s: float
    weights_s: float
    warm_up_s: float
    source: str


@dataclass(frozen=True, slots=True)
class Profile:
    """A model on a device.

    ``mape`` is the mean absolute relative error of ``iteration_s`` in each of REGIMES (0.05: five percent);
    ``left_out_mape`` the same on lines of the measured grid (a chunk size, a batch, a context) that a fit was not
    shown, None where the source has nothing of the regime. Bytes are of one instance, over all of its devices.
    ``kv_capacity_tokens`` is the context that its KV cache holds; ``max_batch`` and ``max_batch_tokens`` are the
    engine's limits on requests and tokens of one iteration. ``price_per_hour`` is that of one instance's accelerators
    in US dollars, None where no source states one. ``assumptions`` states what the source does not.
    """

    name: str
    model: str
    device_kind: str
    source: str
    assumptions: str
    coefficients: Coefficients
    mape: Mapping[str, float | None]
    domain: Domain
    kv_bytes_per_token: int
    weight_bytes: int
    kv_capacity_tokens: int
    context_length: int
    max_batch: int
    max_batch_tokens: int
    left_out_mape: Mapping[str, float | None] = field(default_factory=dict)
    table: LatencyTable | None = None
    price_per_hour: float | None = None
    price_source: str | None = None
    start: Start | None = None

    def iteration_s(self, prefill_tokens: float, attention: float, decodes: float, kv_tokens: float) -> float:
        """Seconds that the device takes for an iteration with ``attention`` = sum n*(ctx + n/2) over its chunks."""
        if not prefill_tokens:
            a, b, _ = self.decode_line(decodes, kv_tokens)
            return a + b * kv_tokens
        if self.table is None:
            return self.coefficients.predict(prefill_tokens, attention, decodes, kv_tokens)
        return self.table.prompt_s(prefill_tokens, attention, decodes, kv_tokens)

    def decode_line(self, decodes: float, kv_tokens: float) -> Line:
        """``(a, b, kv_until)``: an iteration of ``decodes`` >= 1 and nothing else takes ``a + b * KV`` seconds, to the
        bit what ``iteration_s`` says, for every KV from ``kv_tokens`` up to, but without, ``kv_until``."""
        if self.table is None:
            c = self.coefficients
            return c.c0 + c.c3 * decodes, c.c4, inf
        return self.table.decode_line(decodes, kv_tokens)


_TEXTS = ("name", "model", "device_kind", "source", "assumptions")
_SIZES = (
    "kv_bytes_per_token",
    "weight_bytes",
    "kv_capacity_tokens",
    "context_length",
    "max_batch",
    "max_batch_tokens",
)
_FIELDS = {*_TEXTS, *_SIZES, "coefficients", "mape", "left_out_mape", "domain"}
_OPTIONAL = {"table", "price_per_hour", "price_source", "start"}
_COEFFICIENTS = ("c0", "c1", "c2", "c3", "c4", "q90")
_DOMAIN = ("prefill_tokens", "decodes", "kv_tokens")
_START = ("process_s", "engine_init_s", "weights_s", "warm_up_s")


def profile_from_dict(data: object, where: str) -> Profile:
    """A profile from parsed JSON. ``where`` names the file in errors.

    Raises ConfigError naming the field that is missing, unknown or out of range.
    """
    fields = _object(data, where, _FIELDS, _OPTIONAL)
    coefficients = _coefficients(fields["coefficients"], f"{where}: coefficients")
    limits = _object(fields["domain"], f"{where}: domain", set(_DOMAIN))
    texts = {key: _text(fields[key], f"{where}: {key}") for key in _TEXTS}
    sizes = {key: _size(fields[key], f"{where}: {key}") for key in _SIZES}
    price, price_source = fields.get("price_per_hour"), fields.get("price_source")
    if price is not None:
        price = _number(price, f"{where}: price_per_hour")
        price_source = _text(price_source, f"{where}: price_source")
    return Profile(
        name=texts["name"],
        model=texts["model"],
        device_kind=texts["device_kind"],
        source=texts["source"],
        assumptions=texts["assumptions"],
        coefficients=coefficients,
        mape=_errors(fields["mape"], f"{where}: mape"),
        domain=Domain(**{key: _size(limits[key], f"{where}: domain.{key}") for key in _DOMAIN}),
        kv_bytes_per_token=sizes["kv_bytes_per_token"],
        weight_bytes=sizes["weight_bytes"],
        kv_capacity_tokens=sizes["kv_capacity_tokens"],
        context_length=sizes["context_length"],
        max_batch=sizes["max_batch"],
        max_batch_tokens=sizes["max_batch_tokens"],
        left_out_mape=_errors(fields["left_out_mape"], f"{where}: left_out_mape"),
        table=_table(fields["table"], f"{where}: table", coefficients) if fields.get("table") is not None else None,
        price_per_hour=price,
        price_source=price_source,
        start=_start(fields["start"], f"{where}: start") if fields.get("start") is not None else None,
    )


def profile_to_dict(profile: Profile) -> dict[str, Any]:
    """What ``profile_from_dict`` reads, in the order in which a person wants to read it."""
    c, start, domain = profile.coefficients, profile.start, profile.domain
    data: dict[str, Any] = {key: getattr(profile, key) for key in _TEXTS}
    data["coefficients"] = {key: getattr(c, key) for key in _COEFFICIENTS}
    if c.curve:
        data["coefficients"]["curve"] = [[_plain(x), _plain(y)] for x, y in c.curve]
    data["mape"] = {key: profile.mape.get(key) for key in REGIMES}
    data["left_out_mape"] = {key: profile.left_out_mape.get(key) for key in REGIMES}
    data["domain"] = {key: getattr(domain, key) for key in _DOMAIN}
    data |= {key: getattr(profile, key) for key in _SIZES}
    data |= {"price_per_hour": profile.price_per_hour, "price_source": profile.price_source}
    data["start"] = None if start is None else {key: getattr(start, key) for key in (*_START, "source")}
    if profile.table is not None:
        decode, prompt = profile.table.decode, profile.table.prompt
        data["table"] = {
            "decode": {
                "decodes": [_plain(x) for x in decode.decodes],
                "context": [_plain(x) for x in decode.contexts],
                "ms": _milliseconds(decode.seconds),
            },
            "prompt": {
                "tokens": [_plain(x) for x in prompt.tokens],
                "decodes": [_plain(x) for x in prompt.decodes],
                "context": [_plain(x) for x in prompt.contexts],
                "ms": _milliseconds(prompt.seconds),
            },
        }
    return data


def _plain(value: float) -> float:
    """Without a decimal point where there is nothing behind it."""
    return int(value) if value.is_integer() else value


def _milliseconds(seconds: Any) -> Any:
    if isinstance(seconds, tuple):
        return [_milliseconds(value) for value in seconds]
    return round(1e3 * seconds, 9)  # nine: to take away what the multiplication added, and no more


def _coefficients(data: object, where: str) -> Coefficients:
    fields = _object(data, where, set(_COEFFICIENTS), {"curve"})
    numbers = {key: _number(fields[key], f"{where}.{key}") for key in _COEFFICIENTS}
    if numbers["c0"] + numbers["c3"] + numbers["c4"] <= 0.0:
        raise ConfigError(f"{where}: c0, c3 and c4 are all zero, so a decode would take no time")
    return Coefficients(**numbers, curve=_curve(fields.get("curve", []), f"{where}.curve"))


def _curve(data: object, where: str) -> tuple[tuple[float, float], ...]:
    knots = []
    for i, knot in enumerate(_list(data, where)):
        if len(_list(knot, f"{where}[{i}]")) != 2:
            raise ConfigError(f"{where}[{i}] must be a pair [tokens, effective tokens]")
        knots.append((_number(knot[0], f"{where}[{i}][0]"), _number(knot[1], f"{where}[{i}][1]")))
    if knots and knots[0] != (0.0, 0.0):
        raise ConfigError(f"{where} must begin with [0, 0]")
    for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(knots), 1):
        if x1 <= x0 or y1 < y0:
            raise ConfigError(f"{where}[{i}]: tokens must grow, and effective tokens must not fall")
    return tuple(knots)


def _table(data: object, where: str, formula: Coefficients) -> LatencyTable:
    parts = _object(data, where, {"decode", "prompt"})
    decode = _object(parts["decode"], f"{where}.decode", {"decodes", "context", "ms"})
    decodes, contexts = (_axis(decode[key], f"{where}.decode.{key}") for key in ("decodes", "context"))
    if decodes[0] < 1.0:
        raise ConfigError(f"{where}.decode.decodes must begin with at least 1")
    prompt = _object(parts["prompt"], f"{where}.prompt", {"tokens", "decodes", "context", "ms"})
    tokens, among, theirs = (_axis(prompt[key], f"{where}.prompt.{key}") for key in ("tokens", "decodes", "context"))
    if tokens[-1] <= among[-1]:
        raise ConfigError(f"{where}.prompt: the last of tokens must be more than the last of decodes")
    table = LatencyTable(
        formula,
        DecodeGrid(decodes, contexts, _seconds(decode["ms"], (decodes, contexts), f"{where}.decode.ms")),
        PromptGrid(tokens, among, theirs, _seconds(prompt["ms"], (tokens, among, theirs), f"{where}.prompt.ms")),
    )
    for count in (1.0, *decodes):
        if table.decode_line(count, 0.0)[0] <= 0.0:
            raise ConfigError(
                f"{where}.decode: {count:.0f} decodes without context would take no time: c3 or c4 is too large"
            )
    return table


def _axis(data: object, where: str) -> Axis:
    lines = tuple(_number(value, f"{where}[{i}]") for i, value in enumerate(_list(data, where)))
    if not lines or any(b <= a for a, b in pairwise(lines)):
        raise ConfigError(f"{where} must be a list of numbers that grow")
    return lines


def _seconds(data: object, axes: Sequence[Axis], where: str) -> Any:
    """Nested tuples of seconds from nested lists of milliseconds, one level for each axis."""
    if not axes:
        milliseconds = _number(data, where)
        if milliseconds == 0.0:
            raise ConfigError(f"{where} must be more than 0")
        return milliseconds / 1e3
    values = _list(data, where)
    if len(values) != len(axes[0]):
        raise ConfigError(f"{where} must have {len(axes[0])} entries, one for each line of its axis, not {len(values)}")
    return tuple(_seconds(value, axes[1:], f"{where}[{i}]") for i, value in enumerate(values))


def _start(data: object, where: str) -> Start:
    fields = _object(data, where, {*_START, "source"})
    phases = {key: _number(fields[key], f"{where}.{key}") for key in _START}
    return Start(**phases, source=_text(fields["source"], f"{where}.source"))


def _errors(data: object, where: str) -> dict[str, float | None]:
    fields = _object(data, where, set(REGIMES))
    return {key: None if fields[key] is None else _number(fields[key], f"{where}.{key}") for key in REGIMES}


def _object(data: object, where: str, keys: set[str], optional: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: must be an object, not {type(data).__name__}")
    known = keys | (optional or set())
    if missing := sorted(keys - data.keys()):
        raise ConfigError(f"{where}: {missing[0]!r} is missing; the fields are {', '.join(sorted(known))}")
    if unknown := sorted(str(key) for key in data.keys() - known):
        raise ConfigError(f"{where}: {unknown[0]!r} is no field of it; the fields are {', '.join(sorted(known))}")
    return data


def _list(data: object, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise ConfigError(f"{where} must be a list, not {type(data).__name__}")
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
