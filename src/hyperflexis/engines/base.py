"""The engine contract: token ids go in, token ids come out, text is the gateway's view.

An engine lives in one instance process behind ``engines/host.py``, which speaks ``wire`` with gateways and the
controller. All calls below come from the host's event loop and must not block it. One contract suite
(``tests/contract``) runs over every implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from ..core.instance import RequestProgress
from ..core.latency import Coefficients
from ..core.launch import Phase as StartPhase
from ..core.links import KvSource, Link
from ..core.weights import Attempt, LoadWeights, Phase
from ..wire import Generate, TokenLogprob

STANDBY = "the instance is a standby: it has no weights"
"""Why a standby refuses a stream."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is, known once it has started. Sizes in tokens; ``latency`` is the prior of the fit. Other
    instances get the KV of its requests at ``kv_address`` (empty: nowhere), ``kv_bytes_per_token`` for each token,
    and its weights at ``weights_address``: those with ``weights_digest`` (empty: none yet, or it does not know), of
    ``weights_bytes``. ``guessed``: its iterations are not measured but guessed from what comes of them.
    ``structured_outputs``: it keeps answers to what ``Sampling.structured`` says. ``parks``: a request with
    ``hands_over`` stands still when its prompt is computed, until it is asked for or told to ``stay``."""

    model: str
    engine: str
    device_kind: str
    context_length: int
    kv_capacity_tokens: int
    max_batch: int
    max_batch_tokens: int
    returns_token_ids: bool
    latency: Coefficients
    kv_address: str = ""
    kv_bytes_per_token: int = 0
    weights_address: str = ""
    weights_digest: str = ""
    weights_bytes: int = 0
    guessed: bool = False
    structured_outputs: bool = False
    parks: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of a ``load``. ``digest`` is that of the weights which are there now, where the engine knows it. With
    a ``problem`` there are none, and ``load`` may be called again; without attempts too, it had not come to ask."""

    attempts: tuple[Attempt, ...] = ()
    phases: tuple[Phase, ...] = ()
    digest: str = ""
    problem: str = ""


@dataclass(slots=True)
class Emission:
    """What one stream produced in one iteration. ``key`` is what ``generate`` was given.

    Exactly one emission of a stream has ``finish`` set (stop, length, cancelled, refused, moved, handed, invalid,
    error) and it is the last.
    The token that stopped a text (end of text, a stop token) is counted in ``num_output_tokens`` and not among
    ``token_ids``.
    """

    key: object
    token_ids: list[int]
    text: str | None = None
    logprobs: list[TokenLogprob] | None = None
    finish: str | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    cached_tokens: int = 0
    message: str = ""


Sink = Callable[[list[Emission]], None]
"""Receives all emissions of an iteration at once, on the event loop."""

Ending = Callable[[str, float], None]
"""Hears, on the event loop, of a request that is to be handed over: its id, and the seconds until its first token."""


Linked = Callable[[KvSource, Link | None, str], None]
"""Hears, on the event loop, of the link to a source of KV: how it was measured, or None and why there is none."""


PhaseOver = Callable[[StartPhase, float], None]
"""Hears, on the event loop, of each phase of a start that is over, and its seconds."""


@dataclass(frozen=True, slots=True)
class EngineStart:
    """How an engine is to start, and who hears what of it. It is ``epoch`` of ``instance`` to those that ask it for KV
    or weights. In ``standby`` it loads all but the weights, and refuses every stream until ``load`` has succeeded.

    ``sink`` gets what streams produce, ``ending`` hears of each request with ``hands_over`` once, when the last chunk
    of its prompt begins, ``linked`` of each link, ``phase_over`` of what the start consists of."""

    sink: Sink
    instance: str = ""
    epoch: int = 0
    standby: bool = False
    ending: Ending | None = None
    linked: Linked | None = None
    phase_over: PhaseOver | None = None


@dataclass(frozen=True, slots=True)
class EngineReport:
    """Counters over the engine's life and levels now; ``progress`` covers requests that moved since the last call."""

    num_running: int
    num_waiting: int
    kv_used_tokens: int
    iterations: int
    prompt_tokens: int
    output_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    busy_s: float
    latency: Coefficients
    progress: tuple[RequestProgress, ...]


class Engine(Protocol):
    """One engine serving one copy of a model's weights."""

    async def start(self, start: EngineStart) -> EngineInfo:
        """Load and warm up. Raises HyperFlexisError with a remedy when the model or the memory does not do."""

    async def load(self, order: LoadWeights) -> Loaded:
        """Of a standby: get the weights from the first source that gives them, else from disk, see that they compute
        what they do at their source, and take requests from then on. One at a time."""

    def set_send_rate(self, bytes_per_s: float | None) -> None:
        """How fast weights may be given away from now on, in all, and slower while requests run; None: as fast as it
        goes, whatever that does to requests."""

    def generate(self, key: object, request: Generate) -> None:
        """Begin a stream; emissions with ``key`` follow. A request that cannot be served (too long for the context
        or the KV cache) is answered by one emission that finishes with ``invalid``, one that another instance may take
        (this one drains or is full) with ``refused``, and so is one with ``kv`` that cannot be had from there."""

    def cancel(self, key: object) -> None:
        """End a stream and free its KV by the next iteration. Emits ``cancelled`` once, or nothing if it had ended."""

    def stay(self, request_id: str) -> None:
        """A request that ``ending`` heard of goes on here. Nobody waits for this where the engine does not park."""

    def report(self) -> EngineReport:
        """The state now. Cheap: called ten times a second. Raises HyperFlexisError once the engine has broken for good:
        its streams have ended with ``error``, and its process should end too."""

    def set_role(self, prefill_share: float) -> None:
        """Share of prefill work accepted: 1 prefill only, 0 decode only."""

    def keep_links(self, sources: Iterable[KvSource]) -> None:
        """Be ready to get KV from these instances, and from no others; ``linked`` hears of each."""

    def drain(self) -> None:
        """Refuse what comes from now on and finish what runs."""

    async def stop(self) -> None:
        """End all streams with ``error`` and free the device."""
