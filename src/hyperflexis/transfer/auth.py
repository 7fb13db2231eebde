"""Two ends show each other that they know the fleet's token, and neither says it.

    target -> source   Hello(nonce)               32 random bytes; and which instance is meant, which the proofs cover
    source -> target   Challenge(nonce, proof)    HMAC-SHA256 over "source", both nonces and the Hello
    target -> source   Proof(proof)               the same over "target"
    source -> target   Welcome | Denied           come in | why not; Denied may also come instead of a Challenge

Fresh nonces from both sides: what was overheard is of no use later. The word for the side: an answer cannot be sent
back to who asked. The source proves itself first, so one that is none is found out before it has sent a byte.
What follows is not signed; see docs/weight-transfer.md.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from typing import TypeVar

import msgspec

from ..errors import ProtocolError
from .links import Refusal
from .transport import Channel, decode

TOKEN_VARIABLE = "HYPERFLEXIS_KV_TOKEN"
"""Where processes find the fleet's token."""
NONCE_BYTES = 32


class Hello(msgspec.Struct, frozen=True, tag=True):
    """From who wants the weights of ``rank`` of ``ranks`` of this ``epoch`` of an instance."""

    version: int
    nonce: bytes
    instance: str
    epoch: int
    rank: int
    ranks: int


class Challenge(msgspec.Struct, frozen=True, tag=True):
    """From the source, which knows the token as ``proof`` shows."""

    nonce: bytes
    proof: bytes


class Proof(msgspec.Struct, frozen=True, tag=True):
    """So does the target."""

    proof: bytes


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """One is let in."""


class Denied(msgspec.Struct, frozen=True, tag=True):
    """One is not."""

    reason: str


_HELLO = msgspec.msgpack.Decoder(Hello)
_CHALLENGE: msgspec.msgpack.Decoder[Challenge | Denied] = msgspec.msgpack.Decoder(Challenge | Denied)
_PROOF = msgspec.msgpack.Decoder(Proof)
_WELCOME: msgspec.msgpack.Decoder[Welcome | Denied] = msgspec.msgpack.Decoder(Welcome | Denied)
_encode = msgspec.msgpack.encode
T = TypeVar("T")


def ask_in(channel: Channel, hello: Hello, token: str) -> None:
    """A target's part; ``hello.nonce`` is from ``nonce()``. Raises Refusal when the source is none of this fleet or
    does not want to, OSError and ProtocolError."""
    said = _encode(hello)
    channel.send(said)
    answer = _receive(channel, _CHALLENGE)
    if isinstance(answer, Denied):
        raise Refusal(answer.reason)
    if len(answer.nonce) != NONCE_BYTES or not _is_proof(answer.proof, token, b"source", said, answer.nonce):
        raise Refusal("who answers does not know this fleet's token: check HYPERFLEXIS_KV_TOKEN at both ends")
    channel.send(_encode(Proof(_prove(token, b"target", said, answer.nonce))))
    verdict = _receive(channel, _WELCOME)
    if isinstance(verdict, Denied):
        raise Refusal(verdict.reason)


def let_in(channel: Channel, token: str, refusal: Callable[[Hello], str]) -> None:
    """A source's part; ``refusal`` says why somebody is not to be served (empty: he is). Raises Refusal when that is
    so, OSError and ProtocolError."""
    said = channel.receive(lambda frame: frame.header)
    hello = decode(_HELLO, said)
    if len(hello.nonce) != NONCE_BYTES:
        raise ProtocolError(f"a nonce of {len(hello.nonce)} bytes")
    reason = refusal(hello)
    mine = nonce()
    if not reason:
        channel.send(_encode(Challenge(mine, _prove(token, b"source", said, mine))))
        if _is_proof(_receive(channel, _PROOF).proof, token, b"target", said, mine):
            channel.send(_encode(Welcome()))
            return
        reason = "only instances of this fleet get weights here: check HYPERFLEXIS_KV_TOKEN at both ends"
    channel.send(_encode(Denied(reason)))
    raise Refusal(reason)


def nonce() -> bytes:
    """For one Hello."""
    return secrets.token_bytes(NONCE_BYTES)


def _prove(token: str, side: bytes, said: bytes, challenge: bytes) -> bytes:
    return hmac.digest(token.encode(), side + challenge + said, "sha256")


def _is_proof(proof: bytes, token: str, side: bytes, said: bytes, challenge: bytes) -> bool:
    return hmac.compare_digest(proof, _prove(token, side, said, challenge))


def _receive(channel: Channel, decoder: msgspec.msgpack.Decoder[T]) -> T:
    return decode(decoder, channel.receive(lambda frame: frame.header))
