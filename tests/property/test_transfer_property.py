"""The two machines of a handoff, and a link that is slow and breaks: whatever happens when, at most one end may decode,
and what is accepted is whole."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from hyperflexis.core.transfer import (
    SOURCE_TRANSITIONS,
    TARGET_TRANSITIONS,
    Piece,
    Source,
    SourceState,
    Target,
    TargetState,
)
from hyperflexis.errors import IllegalTransition, ProtocolError

BUFFER = 3
"""Messages that the link holds: a sender that is ahead of it has to wait."""


class Run:
    """A request at its source, the link, and its target. KV is the number of the token it is of, in each layer."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.layers = random.randint(1, 4)
        self.prompt = random.randint(1, 12)
        start = random.randint(0, self.prompt - 1)
        self.most = random.randint(1, 5)
        self.source, self.target = Source(self.layers, start), Target(self.layers, start)
        self.there = [0] * self.layers
        self.tokens = self.prompt
        self.end: int | None = None
        self.layer = 0
        self.came: list[list[int]] = [list(range(start)) for _ in range(self.layers)]
        self.to_target: list[object] = []
        self.to_source: list[str] = []
        self.broken = False
        self.ends: list[str] = []

    def compute(self) -> None:
        """A layer of an iteration, or its end, which gives a token once all tokens before it are computed."""
        if self.source.state in (SourceState.PARKED, SourceState.OFFERED):
            with pytest.raises(IllegalTransition):
                self.source.computed(self.tokens)
        if not self.source.may_decode:
            return
        if self.end is None:
            done = self.there[0]
            self.end = min(done + self.random.randint(1, 4), self.tokens)
            self.layer = 0
        if self.layer < self.layers and self.random.random() < 0.8:  # else nobody is told before the end
            self.there[self.layer] = self.end
            self.source.layer_computed(self.layer, self.end)
            self.layer += 1
            return
        self.there = [self.end] * self.layers
        self.source.computed(self.end)
        self.tokens += self.end == self.tokens
        self.end = None

    def preempt(self) -> None:
        if self.source.may_decode and self.end is None:
            kept = self.random.randint(0, self.there[0])
            self.there = [kept] * self.layers
            self.source.computed(kept)

    def send(self) -> None:
        if self.broken or len(self.to_target) >= BUFFER:
            return
        piece = self.source.next_piece(self.most)
        if piece is not None:
            assert piece.end <= self.there[piece.layer], "KV that is not there"
            self.to_target.append(piece)
            self.source.sent(piece, checksum(piece))
        elif self.source.state is SourceState.PARKED:
            self.source.offer()
            self.to_target.append((self.tokens - 1, self.source.digest))
        elif self.source.state is SourceState.GONE:
            self.to_target.append("gone")

    def park(self) -> None:
        runs = self.end is None and self.there[0] == self.tokens - 1 >= self.prompt
        if runs and self.source.state is SourceState.STREAMING:
            self.source.park(self.tokens - 1)

    def receive(self) -> None:
        if not self.to_target or self.broken or self.target.is_over:
            return
        match self.to_target.pop(0):
            case Piece() as piece:
                self.target.received(piece, checksum(piece))
                self.came[piece.layer] += range(piece.start, piece.end)
            case (int(tokens), int(digest)):
                self.target.offered(tokens, digest)
            case _:
                self.end_target(accept=False)

    def decide(self) -> None:
        if self.target.state is TargetState.OFFERED:
            self.end_target(accept=self.random.random() < 0.7)

    def refuse(self) -> None:
        if not self.target.is_over:
            self.end_target(accept=False)

    def end_target(self, accept: bool) -> None:
        self.ends.append("target")
        if accept:
            self.target.accept()
        else:
            self.target.refuse()
        self.to_source.append("accept" if accept else "refuse")

    def hear(self) -> None:
        if not self.to_source or self.broken or self.source.is_over:
            return
        if self.to_source.pop(0) == "accept":
            self.source.accepted()
        else:
            self.source.refused()
        self.ends.append("source")

    def cancel(self) -> None:
        if not self.source.is_over:
            self.source.ended()
            self.ends.append("source")

    def cut(self) -> None:
        self.broken = True
        if not self.source.is_over:
            self.source.broke()
            self.ends.append("source")
        if self.target.state is TargetState.RECEIVING:
            self.target.refuse()
            self.ends.append("target")

    def check(self) -> None:
        assert not (self.source.may_decode and self.target.may_decode), "two decode"
        assert self.ends.count("source") <= 1 and self.ends.count("target") <= 1
        if self.target.may_decode:
            assert self.came == [list(range(self.tokens - 1))] * self.layers, "not every token once in each layer"


def checksum(piece: Piece) -> int:
    return hash((piece.layer, piece.start, piece.count)) & 0xFFFFFFFF


STEPS = ("compute",) * 4 + ("send",) * 6 + ("receive",) * 6 + ("park", "decide", "hear") * 2
RARE = ("preempt", "refuse", "cancel", "cut")


@settings(max_examples=600, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_at_most_one_end_decodes_and_both_end_once(seed: int) -> None:
    random = Random(seed)
    run = Run(random)
    trouble = random.choice((0.0, 0.01, 0.1))
    for _ in range(random.randint(1, 400)):
        getattr(run, random.choice(RARE if random.random() < trouble else STEPS))()
        run.check()
        if run.source.is_over and run.target.is_over:
            break
    # Nothing else goes wrong: both come to an end, unless the request ends first.
    for _ in range(2000):
        if run.source.is_over and run.target.is_over:
            break
        for step in ("compute", "send", "receive", "park", "decide", "hear"):
            getattr(run, step)()
            run.check()
        if run.source.is_over and not run.target.is_over and run.source.state is not SourceState.GONE:
            run.cut()  # what follows a source that is over
    assert run.source.is_over and run.target.is_over
    assert run.ends.count("source") == 1 and run.ends.count("target") == 1
    assert (run.source.state is SourceState.HANDED) <= (run.target.state is TargetState.ACCEPTED)
    assert (run.source.state is SourceState.KEPT) <= (run.target.state is TargetState.REFUSED)
    event(f"source {run.source.state}, target {run.target.state}")


@given(layers=st.integers(1, 5), start=st.integers(0, 5), seed=st.integers(0, 1 << 32))
def test_a_target_takes_each_layers_tokens_in_order_and_once(layers: int, start: int, seed: int) -> None:
    random = Random(seed)
    target = Target(layers, start)
    have = [start] * layers
    for _ in range(30):
        piece = Piece(random.randint(-1, layers), random.randint(0, 8), random.randint(0, 3))
        if 0 <= piece.layer < layers and piece.start == have[piece.layer] and piece.count:
            target.received(piece, 1)
            have[piece.layer] = piece.end
        else:
            with pytest.raises(ProtocolError):
                target.received(piece, 1)
    with pytest.raises(ProtocolError):
        target.offered(max(have) + 1, 0)
    assert target.state is TargetState.RECEIVING


def test_content_that_is_not_what_was_sent_is_not_offered() -> None:
    source, target = Source(1, 0), Target(1, 0)
    source.computed(2)
    piece = source.next_piece(9)
    assert piece == Piece(0, 0, 2)
    source.sent(piece, 5)
    target.received(piece, 6)
    with pytest.raises(ProtocolError, match="digest"):
        target.offered(2, source.digest)


def test_nothing_is_offered_before_all_of_it_was_sent() -> None:
    source = Source(2, 0)
    source.computed(3)
    source.park(3)
    with pytest.raises(IllegalTransition, match="unsent"):
        source.offer()
    assert source.left == 6 and source.state is SourceState.PARKED


def test_illegal_moves_raise() -> None:
    moves = {
        SourceState.PARKED: lambda one: one.park(0),
        SourceState.OFFERED: lambda one: one.offer(),
        SourceState.HANDED: lambda one: one.accepted(),
        SourceState.KEPT: lambda one: one.refused(),
    }
    for state in SourceState:
        for to, move in moves.items():
            source = Source(1, 0)
            source.state = state
            if to in SOURCE_TRANSITIONS[state]:
                move(source)
                assert source.state is to
            else:
                with pytest.raises(IllegalTransition):
                    move(source)
    for state in TargetState:
        target = Target(1, 0)
        target.state = state
        if TargetState.ACCEPTED in TARGET_TRANSITIONS[state]:
            target.accept()
        else:
            with pytest.raises(IllegalTransition):
                target.accept()
