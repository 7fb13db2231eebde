"""What OpenAI-compatible servers answer: streamed events, model lists, errors. Only the fields that are used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from ..errors import ProtocolError
from ..wire import TokenLogprob

MAX_EVENT_BYTES = 1 << 20
NULL = msgspec.Raw(b"null")


def is_set(raw: msgspec.Raw) -> bool:
    """Whether a field that is kept as JSON says anything."""
    return bytes(raw) not in (b"null", b"[]")


class Delta(msgspec.Struct):
    """What a chat's event adds."""

    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: msgspec.Raw = NULL


class Logprobs(msgspec.Struct):
    """Log-probabilities of a completion's tokens."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(msgspec.Struct):
    """One choice of an event: ``delta`` in a chat, ``text`` in a completion, ``token_ids`` from vLLM."""

    delta: Delta | None = None
    text: str | None = None
    token_ids: list[int] | None = None
    logprobs: msgspec.Raw = NULL
    finish_reason: str | None = None


class Details(msgspec.Struct):
    """Of the prompt's tokens."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Token counts; the last event has them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: Details | None = None


class Event(msgspec.Struct):
    """One event of a streamed answer."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: msgspec.Raw = NULL


class Card(msgspec.Struct):
    """A model that the server has; ``max_model_len`` is vLLM's context length."""

    id: str
    max_model_len: int | None = None


class Cards(msgspec.Struct):
    """The list of models."""

    data: list[Card]


EVENT = msgspec.json.Decoder(Event)
CARDS = msgspec.json.Decoder(Cards)
_LOGPROBS = msgspec.json.Decoder(Logprobs)


@dataclass(slots=True)
class Events:
    """The data of server-sent events out of a byte stream. Raises ProtocolError for one that is too large."""

    _buffer: bytes = b""
    _data: list[bytes] = field(default_factory=list)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The data of each event that ``data`` completes."""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) + sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise ProtocolError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].strip())
            elif not line and self._data:
                yield b"\n".join(self._data)
                self._data = []


def error_message(body: bytes) -> str:
    """What an error's body says, whichever of the usual shapes it has."""
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body.decode("utf-8", "replace").strip()[:500]
    if isinstance(data, dict):
        data = data.get("error", data)
    if isinstance(data, dict):
        data = data.get("message") or data.get("detail") or data
    return str(data)[:2000]


def token_logprobs_of(raw: msgspec.Raw, ids: list[int]) -> list[TokenLogprob]:
    """vLLM's log-probabilities under ``return_tokens_as_token_ids``, where a token is ``token_id:N``."""
    data = _LOGPROBS.decode(raw)
    tops = data.top_logprobs or [None] * len(ids)
    return [
        TokenLogprob(
            token, logprob or 0.0, [(int(name.rpartition(":")[2]), value) for name, value in (top or {}).items()]
        )
        for token, logprob, top in zip(ids, data.token_logprobs, tops, strict=False)
    ]
