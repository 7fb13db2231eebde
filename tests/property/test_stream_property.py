"""Streams under arbitrary failures: each ends once, and no token is lost, doubled or of a dead attempt."""

from __future__ import annotations

from random import Random
from zlib import crc32

from hypothesis import given, settings
from hypothesis import strategies as st

from hyperflexis.core.stream import MAX_FAILURES, Loss, Stream, StreamState


class _Attempt:
    """An instance that computes a continuation: the next token is a function of all before it. ``waits_for`` is the
    instance whose KV it is to get first."""

    def __init__(self, number: int, context: list[int], until: int, waits_for: _Attempt | None = None) -> None:
        self.number, self.context, self.until, self.waits_for = number, list(context), until, waits_for
        self.outbox: list[list[int] | str] = []

    def step(self, count: int) -> None:
        """Compute so many tokens; the end is a message of its own."""
        if self.waits_for is not None:
            return
        chunk = []
        for _ in range(min(count, self.until - len(self.context))):
            chunk.append(next_token(self.context))
            self.context.append(chunk[-1])
        if chunk:
            self.outbox.append(chunk)
        if len(self.context) == self.until:
            self.outbox.append("end")
            self.until = -1

    def get_kv(self) -> None:
        """The handoff: the other computes no more, and this one says what was computed since it was asked."""
        source, self.waits_for = self.waits_for, None
        if source is None:
            return
        if source.until < 0 or source.waits_for is not None:
            self.until = -1
            self.outbox.append("lost")  # it had ended, or has no KV itself
            return
        self.outbox.append(source.context[len(self.context) :])
        self.context = list(source.context)
        source.until = -1
        source.outbox.append("handed")


def note(ends: list[str], loss: Loss | None) -> None:
    if loss not in (None, "resume"):
        ends.append(loss)


def next_token(context: list[int]) -> int:
    return crc32(repr(context).encode()) % 1000


def reference(length: int) -> list[int]:
    context: list[int] = []
    for _ in range(length):
        context.append(next_token(context))
    return context


def play(random: Random) -> tuple[Stream, list[int], list[str]]:
    """One stream among instances that die, give back, and go on talking after they were given up."""
    limit = random.randint(1, 24)
    length = random.randint(1, limit)  # the model ends the text here
    stream, sent, ends = Stream(limit), list[int](), list[str]()
    attempts: list[_Attempt] = []
    while not ends or random.random() < 0.5:  # late answers may follow the end
        if stream.state is StreamState.WAITING:
            assert not ends
            attempts.append(_Attempt(stream.begin(), sent, length))
        one = random.choice(attempts)
        match random.randrange(12):
            case 0:
                note(ends, stream.lose(one.number, failed=random.random() < 0.5))
            case 1 if random.random() < 0.1:
                if stream.stop():
                    ends.append("stopped")
            case 2 | 3 | 4:
                one.step(random.randint(1, 5))
            case 5 if stream.is_live(one.number) and not stream.is_handed_over:
                attempts.append(_Attempt(stream.hand_over(), sent, length, one))
            case 6:
                one.get_kv()
            case _ if one.outbox:
                match one.outbox.pop(0):
                    case "end":
                        if stream.finish(one.number):
                            ends.append("finished")
                    case "handed":
                        note(ends, stream.lose(one.number, failed=False))
                    case "lost":
                        note(ends, stream.lose(one.number))
                    case message:
                        sent += stream.take(one.number, message) or []
            case _:
                pass
    if "finished" in ends or "complete" in ends:
        assert len(sent) == length
    assert sent == reference(length)[: len(sent)]
    return stream, sent, ends


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_a_stream_ends_once_with_its_tokens_in_order(seed: int) -> None:
    stream, sent, ends = play(Random(seed))
    assert len(ends) == 1
    assert list(stream.tokens) == sent
    assert stream.failures <= MAX_FAILURES


def test_ten_thousand_streams_under_random_faults() -> None:
    random = Random(1)
    ends = [play(random)[2] for _ in range(10_000)]
    assert all(len(end) == 1 for end in ends)
    assert {end[0] for end in ends} == {"finished", "complete", "exhausted", "stopped"}, "seed 1 meets every end"
