"""Reading workload files: YAML text in, frozen values out, every mistake named with its line and remedy.

Files named by the workload are read through a function that the caller passes in: nothing here touches a disk.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from math import isfinite

import yaml

from ..core.slo import Slo
from ..errors import ConfigError
from .workload import (
    Arrivals,
    Lengths,
    LogNormal,
    Phase,
    RateArrivals,
    SessionArrivals,
    SessionRow,
    StatisticalLengths,
    TableLengths,
    TraceArrivals,
    TraceRow,
    Workload,
    WorkloadClass,
    share_tables,
)
from .workload_csv import parse_rates, parse_sessions, parse_table

ReadFile = Callable[[str], str]
"""Gives the text of a file named in a workload; raises OSError when it cannot be read."""

ARRIVAL_KEYS: dict[str, tuple[str, ...]] = {
    "trace": ("start_s", "rate_scale", "copies", "jitter_s"),
    "sessions": ("rate_rps", "steps", "rate_scale", "time_scale", "cv", "think_scale"),
    "rate_rps": ("cv",),
    "steps": ("rate_scale", "time_scale", "cv"),
}
"""Kinds of arrivals, in the order in which their key decides, and the keys that each takes besides."""


class _Field:
    """A place in the file: its node, its dotted name, and errors that say where it is."""

    def __init__(self, node: yaml.Node, name: str, file: str) -> None:
        self.node, self.name, self.file = node, name, file

    def error(self, message: str) -> ConfigError:
        where = f"{self.file}:{self.node.start_mark.line + 1}"
        return ConfigError(f"{where}: {self.name}: {message}" if self.name else f"{where}: {message}")

    def fields(self, known: Sequence[str], required: Sequence[str] = ()) -> dict[str, _Field]:
        """The keys of a mapping. Refuses others, doubles, and missing ones."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error(f"must be a mapping with the keys {', '.join(known)}")
        found: dict[str, _Field] = {}
        for key_node, value_node in self.node.value:
            key = str(key_node.value)
            field = _Field(value_node, f"{self.name}.{key}" if self.name else key, self.file)
            at_key = _Field(key_node, field.name, self.file)
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
                raise at_key.error(f"unknown key; {hint}")
            if key in found:
                raise at_key.error("given twice; keep one")
            found[key] = field
        for key in required:
            if key not in found:
                raise self.error(f"{key!r} is missing; add it")
        return found

    def pairs(self) -> list[tuple[str, _Field]]:
        """A mapping with free keys."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error("must be a mapping")
        return [(str(k.value), _Field(v, f"{self.name}.{k.value}", self.file)) for k, v in self.node.value]

    def items(self) -> list[_Field]:
        if not isinstance(self.node, yaml.SequenceNode) or not self.node.value:
            raise self.error("must be a list with at least one entry")
        return [_Field(node, f"{self.name}[{i}]", self.file) for i, node in enumerate(self.node.value)]

    def number(self, minimum: float, maximum: float = 1e12, exclusive: bool = False) -> float:
        """A finite number of at least (above, when ``exclusive``) ``minimum``."""
        try:
            value = float(self.node.value) if isinstance(self.node, yaml.ScalarNode) else float("nan")
        except ValueError:
            value = float("nan")
        low = value > minimum if exclusive else value >= minimum
        if not isfinite(value) or not low or value > maximum:
            bound = f"above {minimum:g}" if exclusive else f"of at least {minimum:g}"
            given = repr(self.node.value) if isinstance(self.node, yaml.ScalarNode) else "a list or mapping"
            raise self.error(
                f"must be a number {bound}" + (f" up to {maximum:g}" if maximum < 1e12 else "") + f", not {given}"
            )
        return value

    def whole(self, minimum: int, maximum: int = 1 << 40) -> int:
        value = self.number(minimum, maximum)
        if value != int(value):
            raise self.error(f"must be a whole number, not {value:g}")
        return int(value)

    def text(self) -> str:
        if not isinstance(self.node, yaml.ScalarNode) or not str(self.node.value).strip():
            raise self.error("must be a text")
        return str(self.node.value)


def parse_workload(text: str, name: str, read: ReadFile) -> Workload:
    """The workload in ``text``.

    ``name`` is the file's name for messages; ``read`` gives the text of the csv files it names. Raises ConfigError
    naming file, line, field and remedy.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{name}:{line}: not YAML: {error.problem}") from None
    if node is None:
        raise ConfigError(f"{name}: the file is empty; it needs duration_s, arrivals and classes")
    reader = _Reader(name, read)
    top = _Field(node, "", name).fields(
        ("seed", "duration_s", "max_context", "arrivals", "classes", "phases"), required=("duration_s", "classes")
    )
    arrivals = reader.arrivals(top["arrivals"]) if "arrivals" in top else None
    classes = tuple(reader.workload_class(field, arrivals) for field in top["classes"].items())
    names = [c.name for c in classes]
    for index, given in enumerate(names):
        if given in names[:index]:
            raise top["classes"].items()[index].error(f"a second class named {given!r}; give it another name")
    shared = {c.name for c in classes if c.arrivals is None}
    if shared and arrivals is None:
        raise top["classes"].error(f"class {min(shared)!r} has no arrivals; add them there or for the whole workload")
    if arrivals is not None and not shared:
        raise top["arrivals"].error("every class has its own arrivals; remove these or those of one class")
    if shared and sum(c.share for c in classes) <= 0.0:
        raise top["classes"].error("all shares are 0; give at least one class a positive share")
    phases = tuple(reader.phase(field, shared) for field in top["phases"].items()) if "phases" in top else ()
    if any(a.at_s >= b.at_s for a, b in pairwise(phases)):
        raise top["phases"].error("at_s must grow from phase to phase; sort them")
    starts, tables = share_tables([c for c in classes if c.arrivals is None], phases)
    for start, table in zip(starts, tables, strict=True):
        if table and table[-1] <= 0.0:
            raise top["phases"].error(f"all shares are 0 from second {start:g} on; give one class a positive share")
    return Workload(
        name=name.rsplit("/", 1)[-1],
        seed=top["seed"].whole(0) if "seed" in top else 0,
        duration_s=top["duration_s"].number(0.0, 1e7, exclusive=True),
        max_context=top["max_context"].whole(2) if "max_context" in top else None,
        arrivals=arrivals,
        classes=classes,
        phases=phases,
    )


class _Reader:
    """Builds the parts of a workload; reads each csv file once."""

    def __init__(self, file: str, read: ReadFile) -> None:
        self._file, self._read = file, read
        self._tables: dict[tuple[str, bool], tuple[TraceRow, ...]] = {}
        self._sessions: dict[str, tuple[tuple[SessionRow, ...], ...]] = {}

    def text(self, field: _Field, path: str) -> str:
        try:
            return self._read(path)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise field.error(
                f"cannot read {path}: {reason}; put it beside {self._file}, or give --csv {path}=FILE"
            ) from None

    def table(self, field: _Field, path: str, timed: bool) -> tuple[TraceRow, ...]:
        key = (path, timed)
        if key not in self._tables:
            self._tables[key] = parse_table(self.text(field, path), path, timed)
        return self._tables[key]

    def sessions(self, field: _Field, path: str) -> tuple[tuple[SessionRow, ...], ...]:
        if path not in self._sessions:
            self._sessions[path] = parse_sessions(self.text(field, path), path)
        return self._sessions[path]

    def arrivals(self, field: _Field) -> Arrivals:
        keys = field.fields(tuple(dict.fromkeys(chain(ARRIVAL_KEYS, *ARRIVAL_KEYS.values()))))
        kind = next((kind for kind in ARRIVAL_KEYS if kind in keys), "")
        foreign = sorted(keys.keys() - {kind, *ARRIVAL_KEYS.get(kind, ())})
        if not kind or any(key in ARRIVAL_KEYS for key in foreign):
            raise field.error(
                "needs exactly one of trace, sessions, rate_rps and steps (sessions with either of the last)"
            )
        if foreign:
            raise keys[foreign[0]].error(f"has no meaning with {kind}; remove it")
        match kind:
            case "trace":
                return self._trace_arrivals(keys)
            case "sessions":
                path = keys["sessions"].text()
                if ("rate_rps" in keys) == ("steps" in keys):
                    raise field.error("sessions need one of rate_rps and steps: how many begin per second")
                think_scale = keys["think_scale"].number(0.0, exclusive=True) if "think_scale" in keys else 1.0
                return SessionArrivals(
                    path, self.sessions(keys["sessions"], path), self._rate_arrivals(keys), think_scale
                )
            case _:
                return self._rate_arrivals(keys)

    def _rate_arrivals(self, keys: dict[str, _Field]) -> RateArrivals:
        cv = keys["cv"].number(0.0, 100.0, exclusive=True) if "cv" in keys else 1.0
        if "rate_rps" in keys:
            for key in ("rate_scale", "time_scale"):
                if key in keys:
                    raise keys[key].error("has no meaning with rate_rps; remove it")
            return RateArrivals(((0.0, keys["rate_rps"].number(0.0, 1e6, exclusive=True)),), cv)
        faster = keys["rate_scale"].number(0.0, exclusive=True) if "rate_scale" in keys else 1.0
        longer = keys["time_scale"].number(0.0, exclusive=True) if "time_scale" in keys else 1.0
        steps = [(t * longer, rate * faster) for t, rate in self._steps(keys["steps"])]
        return RateArrivals(tuple(steps), cv)

    def _steps(self, field: _Field) -> Sequence[tuple[float, float]]:
        if isinstance(field.node, yaml.ScalarNode) and field.node.tag == "tag:yaml.org,2002:str":
            path = field.text()
            return parse_rates(self.text(field, path), path)
        if not isinstance(field.node, yaml.SequenceNode):
            raise field.error("must be a list of [from second, requests per second], or the name of a csv file of them")
        steps: list[tuple[float, float]] = []
        for step in field.items():
            pair = step.items()
            if len(pair) != 2:
                raise step.error("must be [from second, requests per second]")
            steps.append((pair[0].number(0.0), pair[1].number(0.0, 1e6)))
            if len(steps) == 1 and steps[0][0] != 0.0:
                raise step.error("the first step must start at second 0")
            if len(steps) > 1 and steps[-1][0] <= steps[-2][0]:
                raise step.error("must start after the step before it")
        return steps

    def _trace_arrivals(self, keys: dict[str, _Field]) -> TraceArrivals:
        path = keys["trace"].text()
        rows = self.table(keys["trace"], path, timed=True)
        if rows[0].t > 0.0:
            rows = tuple(replace(row, t=row.t - rows[0].t) for row in rows)
        if rows[-1].t <= 0.0:
            raise keys["trace"].error(f"{path} needs at least two rows at different times")
        start_s = keys["start_s"].number(0.0) if "start_s" in keys else 0.0
        if start_s >= rows[-1].t:
            raise keys["start_s"].error(f"is past the end of the trace ({rows[-1].t:.0f} s)")
        copies = keys["copies"].whole(1, 10_000) if "copies" in keys else 1
        jitter_s = keys["jitter_s"].number(0.0) if "jitter_s" in keys else 0.0
        if copies > 1 and jitter_s == 0.0:
            raise keys["copies"].error("copies arrive at the same instants; set jitter_s above 0")
        rate_scale = keys["rate_scale"].number(0.0, exclusive=True) if "rate_scale" in keys else 1.0
        return TraceArrivals(path, rows, start_s, rate_scale, copies, jitter_s)

    def workload_class(self, field: _Field, shared: Arrivals | None) -> WorkloadClass:
        known = ("name", "share", "ttft_ms", "tpot_ms", "e2e_ms", "priority", "lengths", "arrivals", "tenant", "model")
        keys = field.fields(known, required=("name",))

        def seconds(key: str) -> float | None:
            return keys[key].number(0.0, 1e9, exclusive=True) / 1000.0 if key in keys else None

        arrivals = self.arrivals(keys["arrivals"]) if "arrivals" in keys else None
        if arrivals is not None and "share" in keys:
            raise keys["share"].error("a class with arrivals of its own takes no share; remove one of the two")
        if arrivals is None and "share" not in keys:
            raise field.error("'share' is missing; add it, or arrivals of its own")
        lengths = self.lengths(keys["lengths"]) if "lengths" in keys else None
        source = arrivals or shared
        if lengths is None and not isinstance(source, TraceArrivals | SessionArrivals):
            raise field.error("'lengths' is missing; only a trace or sessions bring their own")
        if lengths is not None and isinstance(source, SessionArrivals):
            raise keys["lengths"].error("sessions bring their own; remove it")
        return WorkloadClass(
            name=keys["name"].text(),
            slo=Slo(seconds("ttft_ms"), seconds("tpot_ms"), seconds("e2e_ms")),
            share=keys["share"].number(0.0, 1e9) if "share" in keys else 0.0,
            priority=keys["priority"].number(0.0, 1e6, exclusive=True) if "priority" in keys else 1.0,
            lengths=lengths,
            arrivals=arrivals,
            tenant=keys["tenant"].text() if "tenant" in keys else "",
            model=keys["model"].text() if "model" in keys else "",
        )

    def lengths(self, field: _Field) -> Lengths:
        if isinstance(field.node, yaml.ScalarNode):
            path = field.text()
            return TableLengths(path, self.table(field, path, timed=False))
        keys = field.fields(("prompt", "output"), required=("prompt", "output"))
        return StatisticalLengths(self.log_normal(keys["prompt"]), self.log_normal(keys["output"]))

    def log_normal(self, field: _Field) -> LogNormal:
        if isinstance(field.node, yaml.ScalarNode):
            count = field.whole(1, 1 << 20)
            return LogNormal(count, 0.0, count, count)
        inner = field.fields(("lognormal",), required=("lognormal",))["lognormal"]
        keys = inner.fields(("median", "sigma", "min", "max"), required=("median", "sigma"))
        minimum = keys["min"].whole(1, 1 << 20) if "min" in keys else 1
        maximum = keys["max"].whole(1, 1 << 20) if "max" in keys else 1 << 20
        if minimum > maximum:
            raise keys["max"].error(f"is below min ({minimum}); raise it")
        return LogNormal(keys["median"].number(1.0, 1 << 20), keys["sigma"].number(0.0, 10.0), minimum, maximum)

    def phase(self, field: _Field, shared: set[str]) -> Phase:
        keys = field.fields(("at_s", "shares"), required=("at_s", "shares"))
        shares: list[tuple[str, float]] = []
        for name, share in keys["shares"].pairs():
            if name not in shared:
                raise share.error(f"no class of that name takes a share; classes that do: {', '.join(sorted(shared))}")
            shares.append((name, share.number(0.0, 1e9)))
        return Phase(keys["at_s"].number(0.0, exclusive=True), tuple(shares))
