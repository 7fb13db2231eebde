"""A KV handoff, as each of its two ends sees it: states, and the books of what has been sent. No I/O.

    source   streaming --park--> parked --offer--> offered --accepted--> handed
    target   receiving ---------offered----------> offered ---accept---> accepted

1. KV leaves while the source computes; the source decodes on.
2. When little is left, the source parks the request: nobody decodes it while the rest leaves. Then it offers it.
3. From the offer on the target alone decides. It checks that it has every token of every layer once, and accepts or
   refuses. So at most one of them ever decodes: the source while it streams or has kept the request, the target once
   it has accepted.
4. A link that breaks before the offer leaves the request with the source, one that breaks after it with nobody who
   could know: the stream is placed anew.

In each layer tokens leave in order, without gaps and without overlap; the layers may be at different tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from struct import Struct
from typing import TypeVar
from zlib import crc32

from ..errors import IllegalTransition, ProtocolError


class SourceState(StrEnum):
    """Where a handoff is at its source. KEPT: the request goes on here. MOVED: nobody knows where it is. GONE: it ended
    here before it was handed over."""

    STREAMING = "streaming"
    PARKED = "parked"
    OFFERED = "offered"
    HANDED = "handed"
    KEPT = "kept"
    MOVED = "moved"
    GONE = "gone"


class TargetState(StrEnum):
    """Where a handoff is at its target. REFUSED: it has nothing of the request, whatever the reason."""

    RECEIVING = "receiving"
    OFFERED = "offered"
    ACCEPTED = "accepted"
    REFUSED = "refused"


SOURCE_TRANSITIONS: dict[SourceState, frozenset[SourceState]] = {
    SourceState.STREAMING: frozenset({SourceState.PARKED, SourceState.KEPT, SourceState.GONE}),
    SourceState.PARKED: frozenset({SourceState.OFFERED, SourceState.KEPT, SourceState.GONE}),
    # OFFERED -> KEPT: only by the target's word. A broken link says nothing of what the target did.
    SourceState.OFFERED: frozenset({SourceState.HANDED, SourceState.KEPT, SourceState.MOVED, SourceState.GONE}),
    SourceState.HANDED: frozenset(),
    SourceState.KEPT: frozenset(),
    SourceState.MOVED: frozenset(),
    SourceState.GONE: frozenset(),
}

TARGET_TRANSITIONS: dict[TargetState, frozenset[TargetState]] = {
    TargetState.RECEIVING: frozenset({TargetState.OFFERED, TargetState.REFUSED}),
    TargetState.OFFERED: frozenset({TargetState.ACCEPTED, TargetState.REFUSED}),
    TargetState.ACCEPTED: frozenset(),
    TargetState.REFUSED: frozenset(),
}

S = TypeVar("S", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Piece:
    """KV of one layer for the tokens ``start`` to ``start + count`` of a request."""

    layer: int
    start: int
    count: int

    @property
    def end(self) -> int:
        """One past its last token."""
        return self.start + self.count


_ENTRY = Struct("<IIII")


class Ledger:
    """Which tokens of each layer have passed: all those below ``tokens[layer]``. ``digest`` is of all pieces in their
    order: equal at both ends when the same pieces passed with the same content."""

    def __init__(self, num_layers: int, start: int) -> None:
        self.tokens = [start] * num_layers
        self.digest = 0

    def enter(self, piece: Piece, checksum: int) -> None:
        """A piece with content of that checksum passed. Raises ProtocolError unless it begins where its layer ends."""
        if not 0 <= piece.layer < len(self.tokens):
            raise ProtocolError(f"KV of layer {piece.layer}, and there are {len(self.tokens)}")
        at = self.tokens[piece.layer]
        if piece.start != at or piece.count < 1:
            raise ProtocolError(f"KV of layer {piece.layer} for {piece.count} tokens from {piece.start}, not from {at}")
        self.tokens[piece.layer] = piece.end
        self.digest = crc32(_ENTRY.pack(piece.layer, piece.start, piece.count, checksum), self.digest)


class Source:
    """The end that has the request: what is there to send, what has been sent, and whose the request is.

    ``start``: the target has the KV of the tokens before it.
    """

    def __init__(self, num_layers: int, start: int) -> None:
        self.state = SourceState.STREAMING
        self._there = [0] * num_layers
        self._sent = Ledger(num_layers, start)

    @property
    def may_decode(self) -> bool:
        """Whether the request may get tokens here."""
        return self.state in (SourceState.STREAMING, SourceState.KEPT)

    @property
    def is_over(self) -> bool:
        """True when nothing more can happen."""
        return not SOURCE_TRANSITIONS[self.state]

    @property
    def left(self) -> int:
        """What is there and not sent, in tokens times layers."""
        return sum(max(there - sent, 0) for there, sent in zip(self._there, self._sent.tokens, strict=True))

    @property
    def digest(self) -> int:
        """Of all that was sent."""
        return self._sent.digest

    def layer_computed(self, layer: int, tokens: int) -> None:
        """While an iteration runs: one layer has the KV of the first ``tokens`` tokens now."""
        if self._computes():
            self._there[layer] = tokens

    def computed(self, tokens: int) -> None:
        """Between iterations: all layers have the KV of the first ``tokens`` tokens. They may be fewer than before,
        when the request was preempted; what was sent stays sent, and is the same when it is computed again."""
        if self._computes():
            self._there = [tokens] * len(self._there)

    def next_piece(self, most: int) -> Piece | None:
        """What to send next, ``most`` tokens at most: of the layer that is furthest behind. None when all that is there
        has been sent."""
        if self.state not in (SourceState.STREAMING, SourceState.PARKED):
            return None
        pairs = zip(self._there, self._sent.tokens, strict=True)
        behind = [(sent, layer) for layer, (there, sent) in enumerate(pairs) if sent < there]
        if not behind:
            return None
        start, layer = min(behind)
        return Piece(layer, start, min(self._there[layer] - start, most))

    def sent(self, piece: Piece, checksum: int) -> None:
        """The piece is on its way."""
        self._sent.enter(piece, checksum)

    def park(self, tokens: int) -> None:
        """The request stands still with the KV of its first ``tokens`` tokens: no more comes."""
        self.computed(tokens)
        self._move(SourceState.PARKED)

    def offer(self) -> None:
        """All has been sent: the target is to decide. Raises IllegalTransition while something is left."""
        if self.state is SourceState.PARKED and self.left:
            raise IllegalTransition(f"a request cannot be offered with KV of {self.left} tokens times layers unsent")
        self._move(SourceState.OFFERED)

    def accepted(self) -> None:
        """The target has it."""
        self._move(SourceState.HANDED)

    def refused(self) -> None:
        """The target has nothing of it: it goes on here."""
        self._move(SourceState.KEPT)

    def broke(self) -> None:
        """The link is down. It may well be down because the handoff is over."""
        if not self.is_over:
            self._move(SourceState.MOVED if self.state is SourceState.OFFERED else SourceState.KEPT)

    def ended(self) -> None:
        """The request ended here: its last token came, it was cancelled, or it failed."""
        if not self.is_over:
            self._move(SourceState.GONE)

    def _computes(self) -> bool:
        """False when what is computed does not matter any more. Raises IllegalTransition when nothing may be."""
        if self.state in (SourceState.PARKED, SourceState.OFFERED):
            raise IllegalTransition(f"a request that is {self.state} was computed")
        return self.state is SourceState.STREAMING

    def _move(self, to: SourceState) -> None:
        self.state = _checked("source", SOURCE_TRANSITIONS, self.state, to)


class Target:
    """The end that is to have the request: what has come, and whether it runs here. ``start``: the KV of the tokens
    before it is here already."""

    def __init__(self, num_layers: int, start: int) -> None:
        self.state = TargetState.RECEIVING
        self._received = Ledger(num_layers, start)

    @property
    def may_decode(self) -> bool:
        """Whether the request may get tokens here."""
        return self.state is TargetState.ACCEPTED

    @property
    def is_over(self) -> bool:
        """True when nothing more can happen."""
        return not TARGET_TRANSITIONS[self.state]

    def received(self, piece: Piece, checksum: int) -> None:
        """A piece came. Raises ProtocolError when it is not the next one of its layer, or comes too late."""
        if self.state is not TargetState.RECEIVING:
            raise ProtocolError(f"KV came for a request that is {self.state}")
        self._received.enter(piece, checksum)

    def offered(self, tokens: int, digest: int) -> None:
        """The source says that all has come: ``tokens`` tokens in each layer. Raises ProtocolError when something else
        came."""
        for layer, have in enumerate(self._received.tokens):
            if have != tokens:
                raise ProtocolError(f"KV of layer {layer} came for {have} tokens, and {tokens} were announced")
        if digest != self._received.digest:
            raise ProtocolError("the KV that came is not the KV that was sent: their digests differ")
        self._move(TargetState.OFFERED)

    def accept(self) -> None:
        """It runs here from now on."""
        self._move(TargetState.ACCEPTED)

    def refuse(self) -> None:
        """It does not run here, and what came of it is freed. Nothing changes once that is decided."""
        if not self.is_over:
            self._move(TargetState.REFUSED)

    def _move(self, to: TargetState) -> None:
        self.state = _checked("target", TARGET_TRANSITIONS, self.state, to)


def _checked(end: str, table: Mapping[S, frozenset[S]], old: S, new: S) -> S:
    """``new``; raises IllegalTransition unless ``old -> new`` is an edge of the table."""
    if new not in table[old]:
        raise IllegalTransition(f"the {end} of a handoff cannot move from {old} to {new}")
    return new
