"""The journal: every event that the controller took and what it answered, as JSON lines that can be replayed.

A segment's first line is its ``Header``: versions, fleet digest, the controller's configuration and a snapshot of its
state at that moment. Each further line is one event with its time, the effects it caused and, when observing, the
decision that HyperFlexis would have taken. So replay may begin at any segment, and old segments can be dropped.

The journal is a record, never the recovery log: when the disk is full or slow it loses lines, not requests. Events are
frozen values, so they are kept as they are and encoded by the flushing thread. At most ``max_pending`` wait; past
that they are dropped and a new segment is opened, whose snapshot lets replay go on behind the gap.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, get_args

import msgspec

from ..core.effects import Decision, Effect
from ..core.events import Event
from ..errors import ProtocolError

VERSION = 2
_log = logging.getLogger(__name__)
_EVENTS: dict[str, type] = {kind.__name__: kind for kind in get_args(Event)}
_EFFECTS: dict[str, type] = {kind.__name__: kind for kind in get_args(Effect)}


class Header(msgspec.Struct, frozen=True):
    """A segment's first line. ``config`` is the controller's, as JSON; ``snapshot`` is its state as MessagePack, since
    JSON has no infinity and deadlines may be infinite."""

    version: int
    hyperflexis: str
    fleet: str
    term: int
    now: float
    config: msgspec.Raw
    snapshot: bytes
    dropped: int = 0


class _Tagged(msgspec.Struct, frozen=True):
    type: str
    value: Any


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    now: float
    event: _Tagged
    effects: list[_Tagged]
    shadow: Decision | None = None


class _RawTagged(msgspec.Struct, frozen=True):
    type: str
    value: msgspec.Raw


class _RawLine(msgspec.Struct, frozen=True):
    now: float
    event: _RawTagged
    effects: msgspec.Raw
    shadow: msgspec.Raw = msgspec.Raw(b"null")


@dataclass(frozen=True, slots=True)
class Entry:
    """One event. ``effects`` is the JSON that ``encode_effects`` gave for the controller's answer, so that a replay
    is compared to the byte; ``shadow`` is the JSON of what HyperFlexis would have decided, or ``null``."""

    now: float
    event: Event
    effects: bytes
    shadow: bytes


@dataclass(frozen=True, slots=True)
class _Pending:
    now: float
    event: Event
    effects: Sequence[Effect]
    shadow: Decision | None


def encode_effects(effects: Sequence[Effect]) -> bytes:
    """The journal's form of a list of effects."""
    return msgspec.json.encode([_Tagged(type(effect).__name__, effect) for effect in effects])


def decode_effects(effects: bytes) -> list[Effect]:
    """What ``encode_effects`` was given. Raises ProtocolError for anything else."""
    try:
        tagged = msgspec.json.decode(effects, type=list[_RawTagged])
        return [msgspec.json.decode(one.value, type=_EFFECTS[one.type]) for one in tagged]
    except (msgspec.DecodeError, KeyError) as error:
        raise ProtocolError(f"not the effects of a version {VERSION} journal: {error}") from error


def encode_line(now: float, event: Event, effects: Sequence[Effect], shadow: Decision | None = None) -> bytes:
    """The journal's line of one handled event, with its newline."""
    tagged = [_Tagged(type(effect).__name__, effect) for effect in effects]
    return msgspec.json.encode(_Line(now, _Tagged(type(event).__name__, event), tagged, shadow)) + b"\n"


class Journal:
    """Writes segments ``journal-NNNNNN.jsonl`` into ``directory``, the last ``keep`` of them.

    ``make_header`` is called on the event loop between two events; its snapshot must be of that moment.
    """

    def __init__(
        self,
        directory: Path,
        make_header: Callable[[int], Header],
        max_segment_bytes: int = 64 << 20,
        keep: int = 4,
        max_pending: int = 50_000,
    ) -> None:
        self._directory = directory
        self._make_header = make_header
        self._max_segment_bytes = max_segment_bytes
        self._keep = keep
        self._max_pending = max_pending
        self._pending: list[_Pending | Header] = [make_header(0)]
        self._dropped = 0
        self._file: BinaryIO | None = None
        self._bytes = 0
        self._failed = False
        directory.mkdir(parents=True, exist_ok=True)

    def append(self, now: float, event: Event, effects: Sequence[Effect], shadow: Decision | None = None) -> None:
        """Note one handled event; no I/O and no encoding here."""
        if len(self._pending) < self._max_pending and not self._dropped:
            self._pending.append(_Pending(now, event, effects, shadow))
        else:
            self._dropped += 1

    def _take(self) -> list[_Pending | Header]:
        """What is to be written now, closed by a new segment's header when the current one is full or has a gap."""
        batch, self._pending = self._pending, []
        # A header is only ever the first that is pending; the segment that it opens is not full yet.
        opens = bool(batch) and isinstance(batch[0], Header)
        if self._dropped or (self._bytes >= self._max_segment_bytes and not opens):
            self._pending.append(self._make_header(self._dropped))
            self._dropped = 0
        return batch

    def _write(self, batch: list[_Pending | Header]) -> None:
        try:
            for item in batch:
                if isinstance(item, Header):
                    self._open_segment()
                    data = msgspec.json.encode(item) + b"\n"
                else:
                    data = encode_line(item.now, item.event, item.effects, item.shadow)
                assert self._file is not None
                self._file.write(data)
                self._bytes += len(data)
            if self._file is not None:
                self._file.flush()
        except OSError as error:
            self._failed = True
            _log.error("the journal in %s cannot be written and stops here: %s", self._directory, error)

    def _open_segment(self) -> None:
        if self._file is not None:
            self._file.close()
        old = segments(self._directory)
        number = int(old[-1].stem.rpartition("-")[2]) + 1 if old else 1
        for path in old[: max(len(old) - self._keep + 1, 0)]:
            path.unlink(missing_ok=True)
        self._file = (self._directory / f"journal-{number:06d}.jsonl").open("wb")
        self._bytes = 0

    async def flush(self) -> None:
        """Write what is pending, in a thread. Not to be called twice at once."""
        batch = self._take()
        if batch and not self._failed:
            await asyncio.get_running_loop().run_in_executor(None, self._write, batch)

    async def run(self, period_s: float = 1.0) -> None:
        """Flush each ``period_s`` until cancelled."""
        while True:
            await asyncio.sleep(period_s)
            await self.flush()

    def close(self) -> None:
        """Write the rest and close."""
        if not self._failed:
            self._write(self._pending)
        if self._file is not None:
            self._file.close()
            self._file = None


def segments(directory: Path) -> list[Path]:
    """The segments of a journal, oldest first."""
    return sorted(directory.glob("journal-*.jsonl"))


def read_journal(path: Path) -> Iterator[Header | Entry]:
    """A segment's header and entries, or those of all segments when ``path`` is a directory.

    A last line cut short by a crash is left out. Raises ProtocolError naming file and line for anything else that
    is not a journal line of this version.
    """
    for segment in segments(path) if path.is_dir() else [path]:
        with segment.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    yield _read_header(line) if number == 1 else _read_entry(line)
                except (msgspec.DecodeError, KeyError) as error:
                    raise ProtocolError(
                        f"{segment}:{number}: not a line of a version {VERSION} journal: {error}"
                    ) from error


def _read_header(line: bytes) -> Header:
    header = msgspec.json.decode(line, type=Header)
    if header.version != VERSION:
        raise msgspec.DecodeError(f"its version is {header.version}")
    return header


def _read_entry(line: bytes) -> Entry:
    raw = msgspec.json.decode(line, type=_RawLine)
    event: Event = msgspec.json.decode(raw.event.value, type=_EVENTS[raw.event.type])
    return Entry(raw.now, event, bytes(raw.effects), bytes(raw.shadow))
