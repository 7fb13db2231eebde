"""An instance in a simulation."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from ..batcher import Batch, Batcher
from ..core.instance import InstanceInfo
from ..sequences import Sequence as BatcherSequence
from .client import Client

if TYPE_CHECKING:
    from .handoffs import Handoff


class Phase(IntEnum):
    """What comes first at equal times."""

    FAULT = 0
    ITERATION = 1
    HANDOFF = 2
    REPORT = 3
    WATCH = 4
    SAMPLE = 5
    LAUNCH = 6


@dataclass(slots=True, eq=False)
class Instance:
    """An engine process: its Batcher, and the iterations under way.

    ``ends`` and ``seconds`` are the end times and durations of the coming iterations of ``batch``; ``version`` tells
    a planned end from one that was cut. ``last_tokens`` is a heap of (tick of the Batcher that brings it, sequence
    number, request). ``moved_at`` is when the last iteration ended. ``leaving``, ``arriving`` and
    ``returning`` are what handoffs have to do before the next plan. ``stopped``: it was ended on purpose.
    """

    number: int
    info: InstanceInfo
    batcher: Batcher
    batch: Batch | None = None
    ends: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    last_tokens: list[tuple[int, int, BatcherSequence]] = field(default_factory=list)
    version: int = 0
    up: bool = True
    stopped: bool = False
    reporting: bool = False
    slow: float = 1.0
    budget_s: float = 0.0
    moved_at: float = 0.0
    leaving: list[Handoff] = field(default_factory=list)
    arriving: list[Handoff] = field(default_factory=list)
    returning: list[BatcherSequence] = field(default_factory=list)


def client_of(seq: BatcherSequence) -> Client:
    """Whose request it is."""
    assert isinstance(seq.payload, Client)
    return seq.payload


def length_of(seq: BatcherSequence) -> int:
    """Output tokens that it will have, which no scheduler knows."""
    return client_of(seq).length
