"""What the adapter and the scheduler inside vLLM say to each other. Both import this, and it imports neither.

request -> server    ``vllm_xargs``, flat numbers: the fields of Promise under the names in PREFIX, and SENT: so many
                     of the prompt's last tokens are of the answer, which goes on
server -> adapter    the answer to a request with PROBE has ``kv_transfer_params.hyperflexis``: a Capabilities
server -> adapter    where REPORTS_VARIABLE names a Unix datagram socket: a StepReport, at most each REPORT_EVERY_S
adapter -> server    PROFILE_VARIABLE names a profile, where the scheduler's iteration model begins
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import msgspec

from ...core.latency import Coefficients
from ...errors import ProtocolError

PREFIX = "hfx_"
PROBE = "hfx_probe"
SENT = "hfx_sent"
KEY = "hyperflexis"
REPORTS_VARIABLE = "HYPERFLEXIS_VLLM_REPORTS"
PROFILE_VARIABLE = "HYPERFLEXIS_VLLM_PROFILE"
REPORT_EVERY_S = 0.05
MAX_REPORT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Promise:
    """What a request was promised. ``*_due_s`` in seconds after it was sent, ``pace_s`` in seconds per output token;
    None where nothing is. ``value``: priority times tenant weight, positive."""

    first_due_s: float | None = None
    pace_s: float | None = None
    last_due_s: float | None = None
    value: float = 1.0
    expected_output_tokens: float = 128.0

    def to_xargs(self) -> dict[str, float]:
        """As fields of ``vllm_xargs``."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {PREFIX + name: value for name, value in values if value is not None}

    @classmethod
    def from_xargs(cls, xargs: Mapping[str, object] | None) -> Promise:
        """The inverse; fields of others are left alone. Raises ProtocolError naming a field that is no number, or a
        value that is not positive."""
        found: dict[str, float] = {}
        for field in fields(cls):
            value = (xargs or {}).get(PREFIX + field.name)
            if value is None:
                continue
            try:
                found[field.name] = float(value)  # type: ignore[arg-type]  # the except clause is for what is none
            except (TypeError, ValueError):
                raise ProtocolError(f"{PREFIX}{field.name}: {value!r} is no number") from None
        promise = cls(**found)
        if not promise.value > 0.0:
            raise ProtocolError(f"{PREFIX}value: {promise.value} is not positive")
        return promise


def sent_tokens(xargs: Mapping[str, object] | None) -> int:
    """What SENT says; 0 where it says nothing that makes sense."""
    found = (xargs or {}).get(SENT, 0)
    return found if isinstance(found, int) and found > 0 else 0


class Capabilities(msgspec.Struct, frozen=True):
    """What a server with the scheduler in it tells: our release there, requests and tokens of an iteration."""

    release: str
    max_batch: int
    max_batch_tokens: int


class StepReport(msgspec.Struct, frozen=True, array_like=True):
    """Levels now, counters over the life of the server, and the fitted iteration model: its five coefficients and q90,
    and the profile's curve."""

    num_running: int
    num_waiting: int
    kv_used_tokens: int
    iterations: int
    prompt_tokens: int
    output_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    busy_s: float
    latency: tuple[float, float, float, float, float, float]
    curve: tuple[tuple[float, float], ...] = ()

    def coefficients(self) -> Coefficients:
        """The model as policies take it."""
        return Coefficients(*self.latency, self.curve)
