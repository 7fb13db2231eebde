"""A request and the states it moves through at cluster level.

The table is the only source of legal moves; the architecture page's diagram is generated from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from ..errors import IllegalTransition
from .slo import Slo

PREFIX_KEY_TOKENS, MAX_PREFIX_KEYS = 256, 64
"""Prompt tokens that a prefix key stands for; the most keys of a prompt."""


class RequestState(StrEnum):
    """Where a request is. WAITING: known, not yet bound to an instance."""

    WAITING = "waiting"
    DISPATCHED = "dispatched"
    FINISHED = "finished"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    FAILED = "failed"


REQUEST_TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.WAITING: frozenset(
        {RequestState.DISPATCHED, RequestState.REJECTED, RequestState.CANCELLED, RequestState.FAILED}
    ),
    # DISPATCHED -> WAITING: the instance refused it or died before the first token.
    RequestState.DISPATCHED: frozenset(
        {RequestState.WAITING, RequestState.FINISHED, RequestState.CANCELLED, RequestState.FAILED}
    ),
    RequestState.FINISHED: frozenset(),
    RequestState.REJECTED: frozenset(),
    RequestState.CANCELLED: frozenset(),
    RequestState.FAILED: frozenset(),
}


def check_request_move(old: RequestState, new: RequestState) -> None:
    """Raise IllegalTransition unless ``old -> new`` is an edge of the table."""
    if new not in REQUEST_TRANSITIONS[old]:
        raise IllegalTransition(f"request cannot move from {old} to {new}")


@dataclass(frozen=True, slots=True)
class Request:
    """What the controller knows of a request: sizes and promises, never its text.

    ``value`` is class priority times tenant weight (larger matters more), ``weight`` the tenant's. ``prefix_keys`` are
    64-bit chained hashes of the prompt per 256 tokens. ``max_output_tokens`` is the client's limit, already cut to the
    context.
    """

    id: str
    model: str
    tenant: str
    slo_class: str
    slo: Slo
    value: float
    num_prompt_tokens: int
    max_output_tokens: int
    prefix_keys: tuple[int, ...] = ()
    fail_fast: bool = False
    weight: float = 1.0


class QueuedJob(NamedTuple):
    """A request's prompt in a queue that one server works off. ``due`` (on the caller's clock) and ``work_s`` in
    seconds. ``price`` is what is compared when something has to go: the work of keeping it, per value. Jobs compare by
    deadline; among equals the cheaper comes first, so that ties do not depend on arrival."""

    due: float
    price: float
    id: str
    work_s: float
    value: float
