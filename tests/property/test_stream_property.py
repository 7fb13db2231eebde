"""Streams under arbitrary failures: each ends once, and no token is lost, doubled or of a dead attempt."""

from __future__ import annotations

from random import Random
from zlib import crc32

from hypothesis import given, settings
from hypothesis import strategies as st

from hyperflexis.core.stream import MAX_FAILURES, Stream, StreamState


class _Attempt:
    """An instance that computes a continuation: the next token is a function of all before it."""

    def __init__(self, number: int, context: list[int], until: int) -> None:
        self.number, self.context, self.until = number, list(context), until
        self.outbox: list[list[int] | None] = []

    def step(self, count: int) -> None:
        """Compute so many tokens; the end is a message of its own."""
        chunk = []
        for _ in range(min(count, self.until - len(self.context))):
            chunk.append(next_token(self.context))
            self.context.append(chunk[-1])
        if chunk:
            self.outbox.append(chunk)
        if len(self.context) == self.until:
            self.outbox.append(None)
            self.until = -1


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
        match random.randrange(10):
            case 0:
                match stream.lose(one.number, failed=random.random() < 0.5):
                    case None | "resume":
                        pass
                    case end:
                        ends.append(end)
            case 1 if random.random() < 0.1:
                if stream.stop():
                    ends.append("stopped")
            case 2 | 3 | 4:
                one.step(random.randint(1, 5))
            case _ if one.outbox:
                message = one.outbox.pop(0)
                if message is None:
                    if stream.finish(one.number):
                        ends.append("finished")
                elif stream.take(one.number, message):
                    sent += message
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
