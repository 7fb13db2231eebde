"""The torch engine's side of KV handoffs: its cache as bytes, and what else a request is to go on elsewhere.

A piece is [2 * kv heads, tokens, head_dim] of one layer in the cache's own dtype, whatever the block size. On a CPU it
is gathered straight into the memory that is sent, and scattered straight out of that which came. So it is on CUDA where
that memory is a device's (device_ring.py); else it goes through pinned memory. All that on a stream of its own, which
waits for the event that the model's stream reaches after the layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import msgspec
import torch
from torch import Tensor

from ...core.transfer import Piece
from ...errors import ProtocolError
from ...sequences import Sequence
from ...transfer.kv import Give, Take
from ...transfer.links import HOST_RINGS, Layout
from ...transfer.ring import Rings
from ...transfer.transport import Payload
from ...wire import TokenLogprob
from .device_ring import DeviceRings
from .model import Model
from .runner import stream_of


class _State(msgspec.Struct, frozen=True, array_like=True):
    """What the target needs besides KV and tokens: a draw depends on the seed and the token's index alone."""

    seed: int
    logprobs: list[TokenLogprob] | None


_STATE = msgspec.msgpack.Decoder(_State)


class TorchDevice:
    """A Device (engines/handoff.py) of one model and its cache. ``name`` is what the model is served as."""

    def __init__(self, model: Model, name: str) -> None:
        self._cache = model.cache
        self._device = model.device
        config = model.config
        self.layout = Layout(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=str(model.dtype).removeprefix("torch."),
            token_bytes=2 * config.num_kv_heads * config.head_dim * model.dtype.itemsize,
            model=f"{name} {config.digest}",
        )
        on_host = self._device.type == "cpu"
        self.rings: tuple[Rings, ...] = HOST_RINGS if on_host else (DeviceRings(self._device), *HOST_RINGS)
        self._computed: dict[int, torch.cuda.Event] = {}

    def give(self, seq: Sequence) -> Give:
        """See Device."""
        return partial(self._read, seq.blocks)

    def take(self, seq: Sequence) -> Take:
        """See Device."""
        return partial(self._write, seq.blocks)

    def mark(self, layers: Iterable[int]) -> None:
        """See Device."""
        if self._device.type == "cuda":
            event = torch.cuda.current_stream(self._device).record_event()
            self._computed.update(dict.fromkeys(layers, event))

    def key(self, seq: Sequence) -> object:
        """See Device."""
        return stream_of(seq.payload).key

    def state(self, seq: Sequence, since: int) -> bytes:
        """See Device."""
        stream = stream_of(seq.payload)
        logprobs = None if stream.logprobs is None else stream.logprobs[since - seq.num_prompt_tokens :]
        return msgspec.msgpack.encode(_State(stream.seed, logprobs))

    def resume(self, seq: Sequence, state: bytes, token_ids: list[int]) -> list[TokenLogprob] | None:
        """See Device."""
        try:
            came = _STATE.decode(state)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"the request's state is not one of this engine: {error}") from error
        stream = stream_of(seq.payload)
        stream.seed = came.seed
        if stream.logprobs is None:
            return None
        if came.logprobs is None or len(came.logprobs) != len(token_ids):
            raise ProtocolError("the tokens came without their log-probabilities")
        stream.logprobs += came.logprobs
        return came.logprobs

    @torch.inference_mode()
    def _read(self, blocks: list[int], piece: Piece, into: Payload) -> None:
        memory = self._tensor(into, piece)
        if self._device.type == "cpu":
            self._cache.read(piece.layer, self._slots(blocks, piece), memory)
            return
        stream = self._stream(piece.layer)
        with torch.cuda.stream(stream):
            gathered = found = memory if memory.is_cuda else torch.empty_like(memory, device=self._device)
            self._cache.read(piece.layer, self._slots(blocks, piece), gathered)
            if not memory.is_cuda:
                found = torch.empty_like(memory, pin_memory=True).copy_(gathered, non_blocking=True)
        stream.synchronize()
        if not memory.is_cuda:
            memory.copy_(found)

    @torch.inference_mode()
    def _write(self, blocks: list[int], piece: Piece, source: Payload) -> None:
        memory = self._tensor(source, piece)
        if self._device.type == "cpu":
            self._cache.write(piece.layer, self._slots(blocks, piece), memory.transpose(0, 1))
            return
        stream = self._stream(piece.layer)
        with torch.cuda.stream(stream):
            came = memory if memory.is_cuda else memory.pin_memory().to(self._device, non_blocking=True)
            self._cache.write(piece.layer, self._slots(blocks, piece), came.transpose(0, 1))
        stream.synchronize()

    def _stream(self, layer: int) -> torch.cuda.Stream:
        """One that goes on once the device has done what was marked for ``layer``."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_event(self._computed[layer])
        return stream

    def _tensor(self, memory: Payload, piece: Piece) -> Tensor:
        cache = self._cache
        dtype = cache.layers[0].dtype
        flat = memory.view(dtype) if isinstance(memory, Tensor) else torch.frombuffer(memory, dtype=dtype)
        return flat.view(2 * cache.num_kv_heads, piece.count, cache.head_dim)

    def _slots(self, blocks: list[int], piece: Piece) -> Tensor:
        size = self._cache.block_size
        first = piece.start // size
        table = torch.tensor(blocks[first : -(-piece.end // size)], device=self._device)
        slots = table[:, None] * size + torch.arange(size, device=self._device)
        return slots.flatten()[piece.start - first * size :][: piece.count]
