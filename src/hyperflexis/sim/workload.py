"""A workload: who asks for what, how often, and what each request was promised; and its arrivals.

``generate`` turns a workload and a seed into a list of arrivals; the same seed gives the same list on every machine.
``workload_file`` reads workloads from YAML.

Rules of generation:

- Times, class choice and lengths draw from separate random streams, so that changing the rate keeps the lengths.
- A rate with ``cv`` is a renewal process of gamma gaps (``cv`` 1 is Poisson) in operational time: where the rate
  doubles, gaps halve, and the burstiness stays.
- A trace is read from ``start_s`` on and wraps round; ``jitter_s`` is drawn in the trace's own time, before
  ``rate_scale`` compresses it, so that it undoes the same rounding of time stamps at any rate.
- Copies and rounds of a trace, sessions, and sources of arrivals share no prefixes with each other: equal prompts would
  turn load into cache hits.
- All requests of a session are of one class, drawn at its first.
- A prompt may take what ``max_context`` leaves after its output, an output at least half of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import accumulate, takewhile
from math import exp, inf, log
from operator import attrgetter, itemgetter
from random import Random
from statistics import NormalDist
from typing import assert_never

from ..core.request import MAX_PREFIX_KEYS, PREFIX_KEY_TOKENS
from ..core.slo import Slo
from ..errors import ConfigError

MAX_ARRIVALS = 5_000_000  # about 2 GB of arrivals: more is a mistake in a rate or a duration
HASH_BLOCK_TOKENS = 512  # tokens that one entry of a trace's hash_ids stands for
SOURCE_STRIDE = 1 << 40  # hash_ids of different sources of arrivals are so far apart


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace or of a table of lengths. ``t`` in seconds; ``hash_ids`` name the 512-token blocks of its
    prompt, and those past it of its answer."""

    t: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()
    session: str = ""


@dataclass(frozen=True, slots=True)
class TraceArrivals:
    """Arrivals replayed from a trace, sorted by time and starting at 0."""

    path: str
    rows: tuple[TraceRow, ...]
    start_s: float = 0.0
    rate_scale: float = 1.0
    copies: int = 1
    jitter_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RateArrivals:
    """Arrivals at ``steps`` of (from second, requests per second); gaps have coefficient of variation ``cv``."""

    steps: tuple[tuple[float, float], ...]
    cv: float = 1.0


@dataclass(frozen=True, slots=True)
class SessionRow:
    """One request of a session, ``t`` seconds after its start. Its prompt begins with ``reusable_prefix_tokens`` of the
    latest earlier context that is as long. One without output was cut off before its first token: it is not sent, but
    later prompts may begin with its own."""

    t: float
    num_prompt_tokens: int
    num_output_tokens: int
    reusable_prefix_tokens: int


@dataclass(frozen=True, slots=True)
class SessionArrivals:
    """Sessions that begin at the times of ``starts``, each a replay of one of ``sessions`` drawn at random with the
    times in it multiplied by ``think_scale``. A session ends before the first request that exceeds the workload's
    ``max_context``; one that begins so is never drawn."""

    path: str
    sessions: tuple[tuple[SessionRow, ...], ...]
    starts: RateArrivals
    think_scale: float = 1.0


Arrivals = TraceArrivals | RateArrivals | SessionArrivals


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Whole token counts, log-normal and cut (not clipped) to ``minimum``..``maximum``."""

    median: float
    sigma: float
    minimum: int = 1
    maximum: int = 1 << 20

    def quantile(self, u: float) -> int:
        """The count below which a share ``u`` of draws falls, ``u`` in 0..1."""
        if self.sigma == 0.0:
            return min(max(round(self.median), self.minimum), self.maximum)
        normal = NormalDist(log(self.median), self.sigma)
        low, high = normal.cdf(log(self.minimum)), normal.cdf(log(self.maximum))
        p = min(max(low + u * (high - low), 1e-12), 1.0 - 1e-12)
        return min(max(round(exp(normal.inv_cdf(p))), self.minimum), self.maximum)


@dataclass(frozen=True, slots=True)
class StatisticalLengths:
    """Prompt and output lengths drawn independently."""

    prompt: LogNormal
    output: LogNormal


@dataclass(frozen=True, slots=True)
class TableLengths:
    """Pairs of prompt and output lengths drawn from the rows of a file."""

    path: str
    rows: tuple[TraceRow, ...]


Lengths = StatisticalLengths | TableLengths


@dataclass(frozen=True, slots=True)
class WorkloadClass:
    """One task. ``share`` is its weight among the workload's arrivals, 0 when it has ``arrivals`` of its own.
    ``lengths`` None takes the trace's."""

    name: str
    slo: Slo
    share: float = 0.0
    priority: float = 1.0
    lengths: Lengths | None = None
    arrivals: Arrivals | None = None
    tenant: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True)
class Phase:
    """From ``at_s`` on the named classes have these shares; the others keep theirs."""

    at_s: float
    shares: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """A whole workload. ``arrivals`` is None when every class has its own."""

    name: str
    seed: int
    duration_s: float
    max_context: int | None
    arrivals: Arrivals | None
    classes: tuple[WorkloadClass, ...]
    phases: tuple[Phase, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to send ``t`` seconds after the start. ``tenant`` and ``model`` are empty when not given.
    ``hash_ids`` as in TraceRow."""

    t: float
    slo_class: str
    slo: Slo
    priority: float
    num_prompt_tokens: int
    num_output_tokens: int
    tenant: str = ""
    model: str = ""
    hash_ids: tuple[int, ...] = ()
    session: str = ""


def scaled(workload: Workload, factor: float) -> Workload:
    """The workload with every arrival rate multiplied by ``factor`` (lengths and mix stay)."""
    if not 0.0 < factor < inf:
        raise ConfigError(f"rate scale {factor} must be a positive number")

    def faster(rate: RateArrivals) -> RateArrivals:
        return replace(rate, steps=tuple((t, rps * factor) for t, rps in rate.steps))

    def scale(arrivals: Arrivals | None) -> Arrivals | None:
        match arrivals:
            case None:
                return None
            case TraceArrivals():
                return replace(arrivals, rate_scale=arrivals.rate_scale * factor)
            case RateArrivals():
                return faster(arrivals)
            case SessionArrivals():
                return replace(arrivals, starts=faster(arrivals.starts))
            case _:
                assert_never(arrivals)

    classes = tuple(replace(c, arrivals=scale(c.arrivals)) for c in workload.classes)
    return replace(workload, arrivals=scale(workload.arrivals), classes=classes)


def with_slos(workload: Workload, slos: dict[str, Slo]) -> Workload:
    """The workload with the named classes' promises replaced."""
    classes = tuple(replace(c, slo=slos.get(c.name, c.slo)) for c in workload.classes)
    return replace(workload, classes=classes)


def generate(workload: Workload, seed: int | None = None) -> list[Arrival]:
    """All arrivals in time order, first at or after 0, last before ``duration_s``.

    ``seed`` replaces the workload's own. Raises ConfigError past ``MAX_ARRIVALS``.
    """
    seed = workload.seed if seed is None else seed
    shared = [c for c in workload.classes if c.arrivals is None]
    found: list[Arrival] = []
    if workload.arrivals is not None:
        found += _arrivals_of(workload, workload.arrivals, shared, workload.phases, f"{seed}", 0)
    for source, own in enumerate(workload.classes, start=1):
        if own.arrivals is not None:
            found += _arrivals_of(workload, own.arrivals, [own], (), f"{seed}:{own.name}", source)
    found.sort(key=attrgetter("t"))
    return found


def prefix_keys(arrival: Arrival) -> tuple[int, ...]:
    """Chained 64-bit keys of the prompt's first whole blocks of 256 tokens, at most 64, as far as ``hash_ids`` name
    them: two keys an entry. Equal keys mean equal prompts up to there, for one tenant."""
    tokens = min(arrival.num_prompt_tokens, len(arrival.hash_ids) * HASH_BLOCK_TOKENS)
    count = min(tokens // PREFIX_KEY_TOKENS, MAX_PREFIX_KEYS)
    keys: list[int] = []
    for digest in _chained(arrival, -(-count * PREFIX_KEY_TOKENS // HASH_BLOCK_TOKENS)):
        keys += (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"))
    return tuple(keys[:count])


def block_keys(arrival: Arrival, block_size: int) -> list[bytes]:
    """Keys of the full KV blocks of ``block_size`` tokens, a divisor of 512, that ``hash_ids`` name; none beyond them.

    Equal keys mean equal content up to there, for one tenant. They reach into the answer only where ``hash_ids`` have
    entries past the prompt's: a prompt's last entry says nothing of what follows it.
    """
    if HASH_BLOCK_TOKENS % block_size:
        raise ValueError(f"block_size {block_size} must divide {HASH_BLOCK_TOKENS}")
    if not arrival.hash_ids:
        return []
    named = len(arrival.hash_ids) * HASH_BLOCK_TOKENS
    tokens = arrival.num_prompt_tokens
    if named >= tokens + HASH_BLOCK_TOKENS:
        tokens += arrival.num_output_tokens
    count = min(tokens, named) // block_size
    places = [place.to_bytes(2, "little") for place in range(HASH_BLOCK_TOKENS // block_size)]
    keys = [digest + place for digest in _chained(arrival, -(-count // len(places))) for place in places]
    return keys[:count]


def _chained(arrival: Arrival, count: int) -> Iterator[bytes]:
    """128-bit digests of the first ``count`` hash_ids, each with all before it."""
    digest = arrival.tenant.encode()
    for hash_id in arrival.hash_ids[:count]:
        digest = blake2b(b"%d:%b" % (hash_id, digest), digest_size=16).digest()
        yield digest


def _arrivals_of(
    workload: Workload,
    source: Arrivals,
    classes: Sequence[WorkloadClass],
    phases: Sequence[Phase],
    seed: str,
    number: int,
) -> Iterator[Arrival]:
    """``number`` tells the workload's sources of arrivals apart."""
    choice, lengths = Random(f"{seed}:class"), Random(f"{seed}:lengths")
    starts, tables = share_tables(classes, phases)
    class_of: dict[str, WorkloadClass] = {}
    for t, row in _times(source, workload, seed, number):
        session = row.session if row is not None else ""
        chosen = class_of.get(session)
        if chosen is None:
            table = tables[bisect_right(starts, t) - 1]
            chosen = classes[min(bisect_right(table, choice.random() * table[-1]), len(classes) - 1)]
            if session:
                class_of[session] = chosen
        # Two draws a request whatever its class, so that one class's lengths do not shift another's.
        u, v = lengths.random(), lengths.random()
        hash_ids: tuple[int, ...] = ()
        match chosen.lengths:
            case None:
                assert row is not None  # workload_file refuses a rate without lengths
                prompt, output, hash_ids = row.num_prompt_tokens, row.num_output_tokens, row.hash_ids
            case StatisticalLengths():
                prompt, output = chosen.lengths.prompt.quantile(u), chosen.lengths.output.quantile(v)
            case TableLengths():
                pick = chosen.lengths.rows[int(u * len(chosen.lengths.rows))]
                prompt, output = pick.num_prompt_tokens, pick.num_output_tokens
            case _:
                assert_never(chosen.lengths)
        if workload.max_context is not None and prompt + output > workload.max_context:
            prompt = min(prompt, workload.max_context - min(output, workload.max_context // 2))
            output = min(output, workload.max_context - prompt)
            hash_ids = hash_ids[: -(-prompt // HASH_BLOCK_TOKENS)]
        yield Arrival(
            t,
            chosen.name,
            chosen.slo,
            chosen.priority,
            prompt,
            output,
            chosen.tenant,
            chosen.model,
            hash_ids,
            session,
        )


def share_tables(classes: Sequence[WorkloadClass], phases: Sequence[Phase]) -> tuple[list[float], list[list[float]]]:
    """Start of each phase and the cumulative shares in it. A class with its own arrivals is alone: share 1."""
    shares = {c.name: c.share if c.arrivals is None else 1.0 for c in classes}
    starts, tables = [0.0], [list(accumulate(shares.values()))]
    for phase in phases:
        shares |= dict(phase.shares)
        starts.append(phase.at_s)
        tables.append(list(accumulate(shares.values())))
    return starts, tables


def _times(source: Arrivals, workload: Workload, seed: str, number: int) -> Iterator[tuple[float, TraceRow | None]]:
    """Arrival times in order, each with its row of the trace or session."""
    random, duration_s = Random(f"{seed}:times"), workload.duration_s
    match source:
        case RateArrivals():
            for t in _rate_times(source, duration_s, random):
                yield t, None
        case TraceArrivals():
            yield from _trace_times(source, duration_s, random, number)
        case SessionArrivals():
            yield from _session_times(source, workload, random, Random(f"{seed}:sessions"), number)
        case _:
            assert_never(source)


def _rate_times(source: RateArrivals, duration_s: float, random: Random) -> Iterator[float]:
    ends = [t for t, _ in source.steps[1:]] + [duration_s]
    expected = sum(max(0.0, min(end, duration_s) - t) * rate for (t, rate), end in zip(source.steps, ends, strict=True))
    if expected > MAX_ARRIVALS:
        raise ConfigError(f"about {expected:.0f} arrivals (limit {MAX_ARRIVALS}): lower the rate or duration_s")
    shape = 1.0 / (source.cv * source.cv)
    gap = random.expovariate(1.0) if source.cv == 1.0 else random.gammavariate(shape, 1.0 / shape)
    for (start, rate), end in zip(source.steps, ends, strict=True):
        # ``gap`` is what is left of the current gap in operational time, where the rate is 1.
        t, end = start, min(end, duration_s)
        while t < end and rate > 0.0:
            if t + gap / rate >= end:
                gap -= (end - t) * rate
                break
            t += gap / rate
            yield t
            gap = random.expovariate(1.0) if source.cv == 1.0 else random.gammavariate(shape, 1.0 / shape)


def _trace_times(
    source: TraceArrivals, duration_s: float, random: Random, number: int
) -> Iterator[tuple[float, TraceRow]]:
    rows = source.rows
    # The trace's period: its length and one mean gap, so that wrapping keeps the rate.
    period = rows[-1].t * len(rows) / max(len(rows) - 1, 1)
    end = source.start_s + duration_s * source.rate_scale
    expected = source.copies * len(rows) * duration_s * source.rate_scale / period
    if expected > MAX_ARRIVALS:
        raise ConfigError(
            f"about {expected:.0f} arrivals (limit {MAX_ARRIVALS}): lower rate_scale, copies or duration_s"
        )
    stride = 1 + max((h for row in rows for h in row.hash_ids), default=0)
    found: list[tuple[float, TraceRow]] = []
    for lap in range(int(end // period) + 1):
        for copy in range(source.copies):
            shift = lap * source.copies + copy
            first_id = number * SOURCE_STRIDE + shift * stride
            for row in rows:
                t = row.t + lap * period
                if t < source.start_s:
                    continue
                if t >= end:
                    break
                t = (t + random.uniform(0.0, source.jitter_s) - source.start_s) / source.rate_scale
                if t < duration_s:
                    if first_id and (row.hash_ids or row.session):
                        row = replace(
                            row,
                            hash_ids=tuple(h + first_id for h in row.hash_ids),
                            session=f"{row.session}+{number}.{shift}" if row.session else "",
                        )
                    found.append((t, row))
    found.sort(key=itemgetter(0))
    yield from found


def _session_times(
    source: SessionArrivals, workload: Workload, starts: Random, picks: Random, number: int
) -> Iterator[tuple[float, TraceRow]]:
    limit = inf if workload.max_context is None else workload.max_context
    fitting = [
        tuple(takewhile(lambda row: row.num_prompt_tokens + row.num_output_tokens <= limit, rows))
        for rows in source.sessions
    ]
    fitting = [rows for rows in fitting if rows]
    if not fitting:
        raise ConfigError(f"{source.path}: every session begins with more than max_context ({limit}) tokens; raise it")
    found: list[tuple[float, TraceRow]] = []
    first_id = number * SOURCE_STRIDE
    for index, start in enumerate(_rate_times(source.starts, workload.duration_s, starts)):
        rows = fitting[int(picks.random() * len(fitting))]
        all_ids, first_id = _session_ids(rows, first_id)
        for row, hash_ids in zip(rows, all_ids, strict=True):
            t = start + row.t * source.think_scale
            if row.num_output_tokens and t < workload.duration_s:
                session = f"session-{number}.{index}"
                found.append((t, TraceRow(t, row.num_prompt_tokens, row.num_output_tokens, hash_ids, session)))
        if len(found) > MAX_ARRIVALS:
            raise ConfigError(f"more than {MAX_ARRIVALS} arrivals: lower rate_rps or duration_s")
    found.sort(key=itemgetter(0))
    yield from found


def _session_ids(rows: Sequence[SessionRow], first_id: int) -> tuple[list[tuple[int, ...]], int]:
    """For each request of a session the names of its context's blocks, and the next free name.

    Only whole blocks are shared, so up to 511 tokens of a reusable prefix are not.
    """
    contexts: list[tuple[int, tuple[int, ...]]] = []
    for row in rows:
        reused = row.reusable_prefix_tokens
        shared = next((ids for tokens, ids in reversed(contexts) if tokens >= reused), ())
        shared = shared[: reused // HASH_BLOCK_TOKENS]
        tokens = row.num_prompt_tokens + row.num_output_tokens
        next_id = first_id + -(-tokens // HASH_BLOCK_TOKENS) - len(shared)
        contexts.append((tokens, (*shared, *range(first_id, next_id))))
        first_id = next_id
    return [ids for _, ids in contexts], first_id
