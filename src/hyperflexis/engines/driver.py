"""What engines that are driven by the Batcher share: from a Generate to a sequence, from that to a last emission,
from a Batcher to a report."""

from __future__ import annotations

from math import inf

from ..batcher import Batcher
from ..sequences import Sequence
from ..wire import Generate, unpack_ids
from .base import Emission, EngineReport


def sequence_of(request: Generate, now: float, payload: object) -> Sequence:
    """The Batcher's view of a request that came at ``now``; ``payload`` is the engine's own.

    Raises ProtocolError when the token ids are not whole u32 words.
    """
    token_ids = unpack_ids(request.token_ids)
    return Sequence(
        id=request.request_id,
        num_prompt_tokens=len(token_ids),
        max_output_tokens=request.sampling.max_tokens,
        token_ids=token_ids,
        salt=request.salt,
        value=request.value,
        first_due=_at(now, request.first_due_s),
        pace_limit_s=inf if request.pace_s is None else request.pace_s,
        last_due=_at(now, request.last_due_s),
        expected_output_tokens=request.expected_output_tokens,
        payload=payload,
        reported_before=request.reported_before,
        hands_over=request.hands_over,
    )


def finished(key: object, seq: Sequence, finish: str, message: str = "") -> Emission:
    """The last emission of a stream, with the Batcher's counts."""
    return Emission(
        key,
        [],
        finish=finish,
        num_prompt_tokens=seq.num_prompt_tokens,
        num_output_tokens=seq.output_tokens,
        cached_tokens=seq.cached_tokens,
        message=message,
    )


def report_of(batcher: Batcher) -> EngineReport:
    """Levels, counters and the requests that moved since the last call."""
    counters = batcher.counters
    return EngineReport(
        num_running=batcher.num_running,
        num_waiting=batcher.num_waiting,
        kv_used_tokens=batcher.kv_used_tokens,
        iterations=counters.iterations,
        prompt_tokens=counters.prompt_tokens,
        output_tokens=counters.output_tokens,
        prefix_hit_tokens=counters.prefix_hit_tokens,
        preemptions=counters.preemptions,
        busy_s=counters.busy_s,
        latency=batcher.latency,
        progress=batcher.take_progress(),
    )


def _at(now: float, due_s: float | None) -> float:
    return inf if due_s is None else now + due_s
