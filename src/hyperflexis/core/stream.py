"""A client's stream: which tokens it has, who may add to them, and how it goes on when an instance fails.

    WAITING --begin--> RUNNING --finish, stop--> ENDED
       ^                  |
       +------- lose -----+--> ENDED when all tokens are there, or when too many instances have failed

A stream goes on elsewhere from the tokens that its client has: resume = generate(prompt ids + sent ids). So every token
is sent once, whatever happens in between. What an instance says is said for an *attempt*; what comes for an earlier
one, from an instance that was given up and still talks, is dropped here and nowhere else.

An engine that gives no token ids answers anew from the beginning. Then its answer must first repeat what was sent.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import inf
from typing import Literal

from ..errors import IllegalTransition, ProtocolError
from .request import Request
from .slo import Slo

MAX_FAILURES = 3
"""Instances that may fail one request: more would hide a request that kills instances."""


class StreamState(StrEnum):
    """Where a stream is."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


Loss = Literal["resume", "complete", "exhausted"]
"""What becomes of a stream whose instance was lost: it is to be placed again; it had all its tokens; it has failed."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What a client already has of an answer that goes on: ``num_tokens``, the first of them ``ttft_s`` after the
    arrival."""

    num_tokens: int
    ttft_s: float


def continued(request: Request, sent: Sent | None) -> Request:
    """The request for the rest of an answer: what was sent is part of its prompt."""
    return request if sent is None else _shifted(request, sent.num_tokens)


def as_asked(request: Request, sent_tokens: int) -> Request:
    """The inverse of ``continued``."""
    return _shifted(request, -sent_tokens) if sent_tokens else request


def _shifted(request: Request, tokens: int) -> Request:
    prompt, output = request.num_prompt_tokens + tokens, request.max_output_tokens - tokens
    return replace(request, num_prompt_tokens=prompt, max_output_tokens=output)


def due(slo: Slo, expected_output_tokens: float, sent: Sent | None) -> tuple[float, float]:
    """When the next token is due, in seconds after the arrival, and the seconds for each token; inf where nothing is
    promised. ``expected_output_tokens`` are those of the whole answer. Token k + 1 is due k paces after the first."""
    first_s = slo.first_token_by_s(expected_output_tokens)
    pace_s = slo.pace_s(expected_output_tokens, 0.0 if first_s == inf else first_s)
    return (first_s if sent is None else sent.ttft_s + sent.num_tokens * pace_s), pace_s


def _no_tokens() -> array[int]:
    return array("I")


@dataclass(slots=True, eq=False)
class Stream:
    """One answer of at most ``max_tokens`` tokens. ``tokens`` are all ids so far, in order, 4 bytes each; ``before`` is
    how many there were when it was last placed. ``attempt`` counts placements, ``failures`` those that failed."""

    max_tokens: int
    state: StreamState = StreamState.WAITING
    attempt: int = 0
    failures: int = 0
    before: int = 0
    tokens: array[int] = field(default_factory=_no_tokens)

    def begin(self) -> int:
        """An instance is to compute what is missing. Returns the attempt's number. Raises IllegalTransition unless the
        stream waits."""
        if self.state is not StreamState.WAITING:
            raise IllegalTransition(f"a stream that is {self.state} cannot begin")
        self.state = StreamState.RUNNING
        self.attempt += 1
        return self.attempt

    def take(self, attempt: int, token_ids: Sequence[int]) -> bool:
        """The next tokens; False when they are of an earlier attempt. Raises ProtocolError for more than were asked
        for."""
        if attempt != self.attempt or self.state is not StreamState.RUNNING:
            return False
        if len(self.tokens) + len(token_ids) > self.max_tokens:
            raise ProtocolError(f"more than the {self.max_tokens} tokens that were asked for")
        self.tokens.extend(token_ids)
        return True

    def sent(self, ttft_s: float | None) -> Sent | None:
        """What the client had when it was last placed, the first of it after ``ttft_s``; None for nothing."""
        if not self.before:
            return None
        assert ttft_s is not None
        return Sent(self.before, ttft_s)

    def finish(self, attempt: int) -> bool:
        """The instance ended it; False when that is of an earlier attempt."""
        if attempt != self.attempt or self.state is not StreamState.RUNNING:
            return False
        self.state = StreamState.ENDED
        return True

    def lose(self, attempt: int, failed: bool = True) -> Loss | None:
        """The instance is gone, or gave the stream back (then it has not ``failed``). None when nothing changes,
        because the attempt is an earlier one."""
        if attempt != self.attempt or self.state is not StreamState.RUNNING:
            return None
        self.failures += failed
        if len(self.tokens) >= self.max_tokens:
            self.state = StreamState.ENDED
            return "complete"
        if self.failures >= MAX_FAILURES:
            self.state = StreamState.ENDED
            return "exhausted"
        self.state = StreamState.WAITING
        self.before = len(self.tokens)
        return "resume"

    def stop(self) -> bool:
        """The client left, a stop string came, or there is no hope. False when it had ended."""
        ended, self.state = self.state is StreamState.ENDED, StreamState.ENDED
        return not ended


@dataclass(slots=True, eq=False)
class Repetition:
    """The text of a stream without token ids. After ``again`` what was said must come once more, unheard."""

    said: list[str] = field(default_factory=list)
    left: str = ""

    def again(self) -> None:
        """The answer begins anew."""
        self.said = ["".join(self.said)]
        self.left = self.said[0]

    def push(self, piece: str) -> str:
        """What of ``piece`` is new. Raises ProtocolError when it is not what was said before."""
        if self.left:
            n = min(len(piece), len(self.left))
            if piece[:n] != self.left[:n]:
                raise ProtocolError("the engine gives no token ids, and its new answer differs from what was sent")
            self.left, piece = self.left[n:], piece[n:]
        self.said.append(piece)
        return piece
