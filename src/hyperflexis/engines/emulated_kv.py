"""The KV of an engine without a model: a few bytes a token that tell a wrong token, place or layer, and the time that
real KV would take on its way.

    content      token id, mixed with a number that depends on the position and the layer; checked when all has come
    arrival      latency + bytes / rate after it was there, one piece after the other on an instance's one way out

KV counts as there layer by layer while its iteration runs, as a device computes it, though the emulated iteration has
its tokens only at the end: what would have left by then needs to wait no more.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from functools import partial
from random import Random

from ..core.transfer import Piece
from ..errors import ProtocolError
from ..transfer.kv import Give, Take
from ..transfer.links import Layout
from ..wire import pack_ids

NUM_LAYERS = 8
"""Parts in which the KV of an iteration leaves. Fewer than a model has layers: the last part, which nothing hides, is
larger, and each part costs this machine time."""
TOKEN_BYTES = 4


@dataclass(slots=True)
class KvHistory:
    """Where a request's KV is from. ``computed``: up to which token of the prompt, from when to when. ``came``: KV from
    elsewhere by layer, from the token at ``start`` on."""

    computed: list[tuple[int, float, float]] = field(default_factory=list)
    start: int = 0
    came: list[bytearray] = field(default_factory=list)


class EmulatedKv:
    """All KV of one instance. Real KV has ``bytes_per_token``; its way out has ``latency_s`` and ``bytes_per_s``."""

    def __init__(
        self, model: str, bytes_per_token: int, context_length: int, latency_s: float, bytes_per_s: float
    ) -> None:
        self.layout = Layout(NUM_LAYERS, 0, 0, "emulated", TOKEN_BYTES, model)
        self._layer_bytes = bytes_per_token / NUM_LAYERS
        self._latency_s = latency_s
        self._bytes_per_s = bytes_per_s
        # Every layer looks at it from another place on.
        self._noise = Random(0).randbytes(TOKEN_BYTES * (context_length + NUM_LAYERS))
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._closed = threading.Event()

    def give(self, token_ids: list[int], kv: KvHistory) -> Give:
        """Gives the KV of a request not sooner than it would come."""
        return partial(self._read, token_ids, kv, time.monotonic())

    def take(self, kv: KvHistory, start: int) -> Take:
        """Keeps the KV of a request that comes from the token at ``start`` on."""
        kv.start, kv.came = start, [bytearray() for _ in range(NUM_LAYERS)]
        return partial(self._write, kv)

    def check(self, token_ids: list[int], kv: KvHistory) -> None:
        """All KV of the tokens but the last one has come. Raises ProtocolError when it is that of others."""
        end = len(token_ids) - 1
        for layer, came in enumerate(kv.came):
            if came != self._content(token_ids, Piece(layer, kv.start, end - kv.start)):
                raise ProtocolError(f"KV of other tokens came in layer {layer}")
        kv.came = []

    def close(self) -> None:
        """Nobody waits for KV any more."""
        self._closed.set()

    def _read(self, token_ids: list[int], kv: KvHistory, asked_at: float, piece: Piece, into: memoryview) -> None:
        into[:] = self._content(token_ids, piece)
        ready_at = max(self._ready_at(kv, piece), asked_at)
        with self._lock:
            begins_at = max(self._free_at, ready_at)
            self._free_at = begins_at + piece.count * self._layer_bytes / self._bytes_per_s
            arrives_at = self._free_at + self._latency_s
        self._closed.wait(max(arrives_at - time.monotonic(), 0.0))

    def _write(self, kv: KvHistory, piece: Piece, source: memoryview) -> None:
        kv.came[piece.layer] += source

    def _ready_at(self, kv: KvHistory, piece: Piece) -> float:
        """When the last of its tokens was computed in its layer. Tokens that were decoded are there at once."""
        for end, began, ended in kv.computed:
            if piece.end <= end:
                return began + (ended - began) * (piece.layer + 1) / NUM_LAYERS
        return time.monotonic()

    def _content(self, token_ids: list[int], piece: Piece) -> bytes:
        ids = pack_ids(token_ids[piece.start : piece.end])
        noise = self._noise[TOKEN_BYTES * (piece.start + piece.layer) :][: len(ids)]
        mixed = int.from_bytes(ids, "little") ^ int.from_bytes(noise, "little")
        return mixed.to_bytes(len(ids), "little")
