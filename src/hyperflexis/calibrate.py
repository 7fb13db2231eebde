"""``hyperflexis calibrate``: a profile from measured iterations, with the error that it will have.

The measurements come from a csv file, or are made here and now, on the torch engine or on a vLLM
server. What cannot be measured (texts, price, start-up) comes from options or from an existing profile (``--like``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

from .calibrate_csv import read_samples
from .calibrate_fit import (
    CURVE_UNTIL,
    GridAxes,
    LeftOut,
    Predict,
    Sample,
    fit,
    fit_table,
    knots_of,
    left_out,
    mape,
    numerics,
)
from .calibrate_sizes import MEMORY_GB, MEMORY_SHARE, MODELS, RESERVE_BYTES, find_shape
from .calibrate_sizes import kv_bytes_per_token as kv_bytes_of
from .calibrate_sizes import kv_capacity_tokens as kv_capacity_of
from .calibrate_sizes import weight_bytes as weight_bytes_of
from .calibrate_torch import LiveConfig, measure
from .calibrate_vllm import measure as measure_vllm
from .core.latency import Coefficients
from .core.latency_table import Axis, LatencyTable
from .core.profile import REGIMES, Domain, Profile, profile_from_dict, profile_to_dict
from .engines.profiles import load_profile, save_profile
from .errors import HyperFlexisError

TEXTS = ("name", "model", "device_kind", "source", "assumptions", "price_source")
NUMBERS = ("kv_capacity_tokens", "context_length", "max_batch", "max_batch_tokens", "price_per_hour")
DIGITS = 5
"""Significant digits of fitted numbers in the file: far below any fit's error."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """Coefficients, and the table that the device follows more closely, if one was asked for."""

    coefficients: Coefficients
    table: LatencyTable | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Fit a latency profile: from a csv file of measured iterations, or live with --engine torch or vllm. Writes "
        "the profile and prints its error, also on grid lines that the fit was not shown. See docs/profiles.md."
    )
    add = parser.add_argument
    add("measurements", type=Path, nargs="?", metavar="FILE.csv", help="measured iterations; formats: docs/profiles.md")
    add("--out", type=Path, required=True, metavar="PROFILE.json", help="the profile to write")
    add("--json", metavar="FILE", help="also write the errors as JSON; - prints them")
    group = parser.add_argument_group("what to fit")
    add = group.add_argument
    add("--where", action="append", default=[], metavar="COLUMN=VALUE", help="only rows like this; may be repeated")
    add(
        "--curve-until",
        type=float,
        default=float(CURVE_UNTIL),
        metavar="TOKENS",
        help="the linear layers' cost may bend up to here, 0 for nowhere (default: %(default)g)",
    )
    add("--table", action="store_true", help="also fit a table with interpolation, which the device then follows")
    for axis, text in (("tokens", "tokens of an iteration"), ("decodes", "decodes"), ("context", "contexts")):
        add(f"--table-{axis}", type=_axis, metavar="N,N,...", help=f"the table's {text} (default: powers of two)")
    group = parser.add_argument_group("what the profile states")
    add = group.add_argument
    add("--like", metavar="NAME|FILE", help="take all that is not fitted and not given here from this profile")
    add("--name", help="default: the name of the file that is written")
    add("--model", metavar="NAME|DIR", help=f"{', '.join(MODELS)}, or a directory with a config.json: gives the bytes")
    add("--device-kind", metavar="KIND", help=f"{', '.join(MEMORY_GB)}, or another with --memory-gb")
    add("--devices", type=int, default=1, metavar="N", help="devices of one instance (default: %(default)s)")
    add("--memory-gb", type=float, metavar="GB", help="memory of one device, where the kind is not known")
    add("--source", help="where the measurements are from")
    add("--assumptions", help="what the source does not state (default: how the sizes follow)")
    add("--kv-capacity-tokens", type=int, metavar="N", help="default: from memory and weights")
    add("--context-length", type=int, metavar="N", help="default: the model's")
    add("--max-batch", type=int, metavar="N", help="most requests of an iteration (default: 256; torch: 64)")
    add("--max-batch-tokens", type=int, metavar="N", help="most tokens of an iteration (default: 8192; torch: 2048)")
    add("--price-per-hour", type=float, metavar="USD", help="of one instance's accelerators; needs --price-source")
    add("--price-source", metavar="TEXT", help="where the price is from")
    group = parser.add_argument_group("live")
    add = group.add_argument
    add(
        "--engine",
        choices=["torch", "vllm"],
        help="measure this engine instead of reading a file: torch on this machine, or vllm with --url; needs --model",
    )
    add("--url", metavar="URL", help="of a vLLM server that does nothing else, without /v1")
    add("--server-model", metavar="NAME", help="the model's name there (default: the only one)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--dtype", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    add("--threads", type=int, default=1, metavar="N", help="of a CPU (default: %(default)s)")
    add(
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="runs of each shape; the median counts (default: %(default)s)",
    )


def main(args: argparse.Namespace) -> int:
    """Run the command. Raises HyperFlexisError for what the user has to change."""
    if (args.engine is None) == (args.measurements is None):
        raise HyperFlexisError(
            "give either FILE.csv with measurements, or --engine torch --model DIR, or --engine vllm --url URL"
        )
    numerics()  # better known to be missing before minutes of measuring than after
    match args.engine:
        case None:
            samples, stated = _from_file(args)
        case "vllm":
            samples, stated = _live_vllm(args)
        case _:
            samples, stated = _live(args)
    axes = _axes(args, samples) if args.table else None

    def build(rest: Sequence[Sample]) -> Predict:
        return device_of(stated, _fitted(rest, args.curve_until, axes))

    fitted = _fitted(samples, args.curve_until, axes)
    lines = left_out(samples, build)
    profile = replace(
        stated,
        coefficients=fitted.coefficients,
        table=fitted.table,
        mape=_rounded(mape(samples, device_of(stated, fitted))),
        left_out_mape=_rounded(lines.inner),
        domain=_domain(samples),
    )
    profile_from_dict(profile_to_dict(profile), str(args.out))  # raises for options that are out of range
    save_profile(profile, args.out)
    formula = mape(samples, fitted.coefficients.predict)
    print(_statement(profile, len(samples), lines, formula))
    if args.json:
        _write_json(args.json, profile, len(samples), lines, formula)
    return 0


def device_of(profile: Profile, fitted: Fitted) -> Predict:
    """What ``profile`` takes for an iteration with these numbers in it."""
    return replace(profile, coefficients=fitted.coefficients, table=fitted.table).iteration_s


def _fitted(samples: Sequence[Sample], curve_until: float, axes: GridAxes | None) -> Fitted:
    """The fit as it will be in the file: rounded, and the table on the rounded formula."""
    c = fit(samples, knots_of(samples, curve_until))
    coefficients = Coefficients(
        c0=_digits(c.c0),
        c1=_digits(c.c1),
        c2=_digits(c.c2),
        c3=_digits(c.c3),
        c4=_digits(c.c4),
        q90=round(c.q90, 3),
        curve=tuple((x, _digits(y)) for x, y in c.curve),
    )
    if axes is None:
        return Fitted(coefficients, None)
    table = fit_table(samples, coefficients, axes)
    return Fitted(
        coefficients,
        replace(
            table,
            decode=replace(table.decode, seconds=_microseconds(table.decode.seconds)),
            prompt=replace(table.prompt, seconds=_microseconds(table.prompt.seconds)),
        ),
    )


def _from_file(args: argparse.Namespace) -> tuple[Sequence[Sample], Profile]:
    """What was measured, and the profile before anything is fitted: the options, then --like, then defaults."""
    stated = _stated(args)
    return read_samples(args.measurements, _selection(args.where)), stated


def _stated(args: argparse.Namespace) -> Profile:
    given = {"name": args.out.stem} | _given(args)
    if args.like is not None:
        like = load_profile(args.like)
        if args.model is not None or args.device_kind is not None:
            # Another model or device has another price and start-up.
            given = {"price_per_hour": None, "price_source": None, "start": None} | given
            given |= _sizes(args, args.model or like.model, args.device_kind or like.device_kind)
        return replace(like, **given)
    missing = [f"--{key.replace('_', '-')}" for key in ("model", "device_kind", "source") if key not in given]
    if missing:
        raise HyperFlexisError(f"{' and '.join(missing)} missing: give them, or --like PROFILE")
    if "price_per_hour" in given and "price_source" not in given:
        raise HyperFlexisError("--price-per-hour needs --price-source: say where the price is from")
    defaults = {"max_batch": 256, "max_batch_tokens": 8192}
    return _profile(defaults | given | _sizes(args, args.model, args.device_kind))


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The profile's fields that options name."""
    return {key: value for key in (*TEXTS, *NUMBERS) if (value := getattr(args, key)) is not None}


def _sizes(args: argparse.Namespace, model: str, device_kind: str) -> dict[str, Any]:
    """Bytes and capacity of ``model`` on ``device_kind``, and the sentences that say how they follow, but for what
    options name."""
    memory_gb = args.memory_gb or MEMORY_GB.get(device_kind)
    shape = find_shape(model)
    if memory_gb is None:
        raise HyperFlexisError(f"the memory of {device_kind!r} is not known; give --memory-gb")
    sizes: dict[str, Any] = {
        "kv_bytes_per_token": kv_bytes_of(shape),
        "weight_bytes": weight_bytes_of(shape),
        "kv_capacity_tokens": kv_capacity_of(shape, memory_gb, args.devices),
        "context_length": shape.context_length,
        "assumptions": (
            f"kv_capacity_tokens is what {args.devices} x {MEMORY_SHARE} x {memory_gb:g} GB hold beside the weights "
            f"and {RESERVE_BYTES / 1e9:g} GB a device for activations. max_batch and max_batch_tokens are an engine's "
            "usual limits, not measured."
        ),
    }
    return sizes | _given(args) | {"model": model if model in MODELS else Path(model).resolve().name}


def _live(args: argparse.Namespace) -> tuple[Sequence[Sample], Profile]:
    """Measure the torch engine on this machine."""
    if args.model is None:
        raise HyperFlexisError("--engine torch needs --model DIR; make one with 'hyperflexis make-model DIR'")
    if args.like is not None or args.where:
        raise HyperFlexisError("--like and --where are for measurements from a file, not for --engine torch")
    if args.rounds < 1 or args.threads < 1:
        raise HyperFlexisError("--rounds and --threads must be at least 1")
    config = LiveConfig(
        Path(args.model),
        args.device,
        args.dtype,
        args.threads,
        args.max_batch or 64,
        args.max_batch_tokens or 2048,
        args.rounds,
    )
    live = measure(config, lambda done: print(f"round {done} of {config.rounds}", file=sys.stderr))
    return live.samples, _profile(
        {
            "name": args.out.stem,
            "device_kind": live.device_kind,
            "source": (
                f"Measured on this machine by 'hyperflexis calibrate --engine torch': {len(live.samples)} shapes, "
                f"median of {config.rounds} runs, {live.dtype}, {config.threads} thread(s)."
            ),
            "assumptions": "One iteration is the forward pass and the choice of tokens; queues and streams are extra.",
            "kv_bytes_per_token": live.kv_bytes_per_token,
            "weight_bytes": live.weight_bytes,
            "kv_capacity_tokens": live.kv_capacity_tokens,
            "context_length": live.context_length,
            "max_batch": config.max_batch,
            "max_batch_tokens": config.max_batch_tokens,
        }
        | _given(args)
        | {"model": config.directory.resolve().name}
    )


def _live_vllm(args: argparse.Namespace) -> tuple[Sequence[Sample], Profile]:
    """Measure a vLLM server."""
    from .engines.vllm.engine import VllmConfig, VllmEngine

    if args.url is None or args.model is None or args.device_kind is None:
        raise HyperFlexisError("--engine vllm needs --url URL of a running server, --model NAME|DIR and --device-kind")
    if args.like is not None or args.where:
        raise HyperFlexisError("--like and --where are for measurements from a file, not for --engine vllm")
    if args.rounds < 1:
        raise HyperFlexisError("--rounds must be at least 1")
    shape = find_shape(args.model)
    name = args.model if args.model in MODELS else Path(args.model).resolve().name
    engine = VllmEngine(
        VllmConfig(
            name,
            args.url,
            server_model=args.server_model,
            max_batch=args.max_batch,
            max_batch_tokens=args.max_batch_tokens,
            start_limit_s=10.0,
        )
    )
    live = asyncio.run(
        measure_vllm(engine, args.rounds, lambda done: print(f"round {done} of {args.rounds}", file=sys.stderr))
    )
    info = live.info
    if live.left_out:
        most = max(shape.decodes for shape in live.left_out)
        print(
            f"{len(live.left_out)} shapes of up to {most} decodes were left out: the first of their streams was at the "
            "end of the server's context before the last began (--max-model-len)",
            file=sys.stderr,
        )
    return live.samples, _profile(
        {
            "name": args.out.stem,
            "source": (
                f"Measured through the API of a running vLLM by 'hyperflexis calibrate --engine vllm': "
                f"{len(live.samples)} shapes, median of {args.rounds} runs."
            ),
            "assumptions": (
                "One iteration is what lies between two tokens of a stream. A request costs "
                f"{1e3 * live.overhead_s:.1f} ms beside its iterations, which are not in the profile. "
                "kv_bytes_per_token and weight_bytes are those of the model's configuration."
            ),
            "kv_bytes_per_token": kv_bytes_of(shape),
            "weight_bytes": weight_bytes_of(shape),
            "kv_capacity_tokens": info.kv_capacity_tokens,
            "context_length": info.context_length,
            "max_batch": info.max_batch,
            "max_batch_tokens": info.max_batch_tokens,
        }
        | _given(args)
        | {"model": name}
    )


def _profile(stated: Mapping[str, Any]) -> Profile:
    nothing = Coefficients(1.0, 0.0, 0.0, 0.0, 0.0)
    return Profile(**stated, coefficients=nothing, mape={}, domain=Domain(1, 1, 1))


def _domain(samples: Sequence[Sample]) -> Domain:
    return Domain(
        prefill_tokens=max(int(max(s.prefill_tokens for s in samples)), 1),
        decodes=max(int(max(s.decodes for s in samples)), 1),
        kv_tokens=max(int(max(s.kv_tokens for s in samples)), 1),
    )


def _axes(args: argparse.Namespace, samples: Sequence[Sample]) -> GridAxes:
    def axis(given: Axis | None, name: str, values: Callable[[Sample], float], least: float) -> Axis:
        measured = [values(s) for s in samples if name in s.lines]
        if not measured:
            raise HyperFlexisError(f"--table needs measurements of several {name}; there are none")
        if given is not None:
            return given
        low, high = min(least, *measured), max(measured)
        between = [2.0**k for k in range(31) if low < 2.0**k < high]
        return tuple(sorted({low, *between, high}))

    return GridAxes(
        tokens=axis(args.table_tokens, "tokens", lambda s: s.prefill_tokens + s.decodes, inf),
        decodes=axis(args.table_decodes, "decodes", lambda s: s.decodes, 1.0),
        contexts=axis(args.table_context, "context", lambda s: s.kv_tokens / s.decodes, inf),
    )


def _axis(text: str) -> Axis:
    try:
        lines = tuple(float(part) for part in text.split(","))
    except ValueError:
        lines = ()
    if not lines or lines[0] < 1.0 or any(b <= a for a, b in pairwise(lines)):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of growing numbers like 1,8,64")
    return lines


def _selection(where: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in where:
        column, mark, value = text.partition("=")
        if not mark or not column:
            raise HyperFlexisError(f"--where {text!r}: write COLUMN=VALUE")
        found[column.strip()] = value.strip()
    return found


def _digits(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _microseconds(seconds: Any) -> Any:
    """Rounded to 10 microseconds: measurements of milliseconds have no more."""
    if isinstance(seconds, tuple):
        return tuple(_microseconds(value) for value in seconds)
    return round(max(seconds, 1e-5), 5)


def _rounded(errors: Mapping[str, float | None]) -> dict[str, float | None]:
    return {regime: None if error is None else round(error, 4) for regime, error in errors.items()}


def _statement(profile: Profile, count: int, lines: LeftOut, formula: Mapping[str, float | None]) -> str:
    """The errors as a table for people."""
    rows: list[tuple[str, Mapping[str, float | None]]] = [("fitted", profile.mape)]
    if profile.table is not None:
        rows.append(("the formula alone", formula))
    rows.append(("left-out lines", profile.left_out_mape))
    rows += [(f"  of {axis}", errors) for axis, errors in lines.by_axis.items()]
    rows.append(("left-out edges", lines.outer))
    out = [f"{profile.name}: {count} iterations", f"{'mean error':20}" + "".join(f"{regime:>10}" for regime in REGIMES)]
    for name, errors in rows:
        shown = ["-" if (e := errors.get(regime)) is None else f"{100 * e:.1f}%" for regime in REGIMES]
        out.append(f"{name:20}" + "".join(f"{text:>10}" for text in shown))
    return "\n".join(out)


def _write_json(target: str, profile: Profile, count: int, lines: LeftOut, formula: Mapping[str, float | None]) -> None:
    found = {
        "profile": profile.name,
        "iterations": count,
        "mape": profile.mape,
        "formula_mape": _rounded(formula),
        "left_out_mape": profile.left_out_mape,
        "left_out_by_axis": {axis: _rounded(errors) for axis, errors in lines.by_axis.items()},
        "left_out_edges_mape": _rounded(lines.outer),
    }
    text = json.dumps(found, indent=2)
    if target == "-":
        print(text)
        return
    try:
        Path(target).write_text(text + "\n")
    except OSError as error:
        raise HyperFlexisError(f"--json {target} cannot be written: {error.strerror}") from error
