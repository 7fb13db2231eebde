"""A client's stream: which tokens it has, who may add to them, and how it goes on when an instance fails.

    WAITING --begin--> RUNNING --finish, stop--> ENDED
       ^               |  ^  |
       |               +--+  |   hand_over: another instance is to go on, with the KV of the one before
       +------ lose ---------+--> ENDED when all tokens are there, or when too many instances have failed

A stream goes on elsewhere from the tokens that its client has: resume = generate(prompt ids + sent ids). So every token
is sent once, whatever happens in between. What an instance says is said for an *attempt*; what comes for an earlier
one, from an instance that was given up and still talks, is dropped here and nowhere else.

While a stream is handed over, two attempts live: the old one computes until its KV has left, the new one from there on.
Both know at which token they are, so that it does not matter whose message comes first, and what both send counts once.
When one is lost the other goes on, or is lost too; that counts as one failure.

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
    # The attempts that live, two at most: where the first token of each belongs, and where the next.
    _first: dict[int, int] = field(default_factory=dict)
    _next: dict[int, int] = field(default_factory=dict)

    def begin(self) -> int:
        """An instance is to compute what is missing. Returns the attempt's number. Raises IllegalTransition unless the
        stream waits."""
        if self.state is not StreamState.WAITING:
            raise IllegalTransition(f"a stream that is {self.state} cannot begin")
        self.state = StreamState.RUNNING
        return self._attempt()

    def hand_over(self) -> int:
        """Another instance gets the KV of the one that runs, and computes what is missing then. Returns the attempt's
        number. Raises IllegalTransition unless exactly one runs."""
        if self.state is not StreamState.RUNNING or len(self._next) != 1:
            raise IllegalTransition(f"a stream that is {self.state} on {len(self._next)} instances is not handed over")
        return self._attempt()

    @property
    def is_handed_over(self) -> bool:
        """True while two instances have it."""
        return len(self._next) > 1

    def is_live(self, attempt: int) -> bool:
        """Whether what comes for this attempt counts."""
        return attempt in self._next

    def first_of(self, attempt: int) -> int:
        """How many tokens there were before a live attempt began. Raises KeyError when it is over."""
        return self._first[attempt]

    def take(self, attempt: int, token_ids: Sequence[int]) -> Sequence[int] | None:
        """The next tokens of an attempt. Returns those that are new, the last ones of them; None when the attempt is
        over. Raises ProtocolError for more than were asked for."""
        at = self._next.get(attempt)
        if at is None:
            return None
        end, have = at + len(token_ids), len(self.tokens)
        if end > self.max_tokens:
            raise ProtocolError(f"more than the {self.max_tokens} tokens that were asked for")
        self._next[attempt] = end
        if at < have:  # the other instance has sent some of them
            token_ids = token_ids[have - at :]
        self.tokens.extend(token_ids)
        return token_ids

    def sent(self, ttft_s: float | None) -> Sent | None:
        """What the client had when it was last placed, the first of it after ``ttft_s``; None for nothing."""
        if not self.before:
            return None
        assert ttft_s is not None
        return Sent(self.before, ttft_s)

    def finish(self, attempt: int) -> bool:
        """The instance ended it; False when the attempt is over."""
        if attempt not in self._next:
            return False
        self._end()
        return True

    def lose(self, attempt: int, failed: bool = True) -> Loss | None:
        """The instance is gone, or gave the stream back (then it has not ``failed``). None when nothing changes,
        because the attempt is over or another goes on."""
        if self._next.pop(attempt, None) is None:
            return None
        del self._first[attempt]
        if self._next:
            return None
        self.failures += failed
        if len(self.tokens) >= self.max_tokens:
            self._end()
            return "complete"
        if self.failures >= MAX_FAILURES:
            self._end()
            return "exhausted"
        self.state = StreamState.WAITING
        self.before = len(self.tokens)
        return "resume"

    def stop(self) -> bool:
        """The client left, a stop string came, or there is no hope. False when it had ended."""
        ended = self.state is StreamState.ENDED
        self._end()
        return not ended

    def _attempt(self) -> int:
        self.attempt += 1
        self.before = len(self.tokens)
        self._first[self.attempt] = self._next[self.attempt] = self.before
        return self.attempt

    def _end(self) -> None:
        self.state = StreamState.ENDED
        self._first.clear()
        self._next.clear()


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
