"""Server-sent events of a stream. All that is the same in each chunk is encoded once; a token adds its own text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from ..openai_api import ApiError, Kind, Usage

DONE: Final = b"data: [DONE]\n\n"
_json: Callable[[Any], bytes] = msgspec.json.Encoder().encode


class Chunks:
    """Writes the chunks of one answer. ``with_usage``: chunks say ``usage: null`` until the one that has it."""

    __slots__ = ("_between", "_end", "_head", "_open", "_plain", "_with_usage")

    def __init__(self, kind: Kind, id: str, created: int, model: str, with_usage: bool, choices: int) -> None:
        name = "chat.completion.chunk" if kind == "chat" else "text_completion"
        self._head = b'data: {"id":%b,"object":%b,"created":%d,"model":%b,"choices":[' % (
            _json(id),
            _json(name),
            created,
            _json(model),
        )
        field = b'"delta":{"content":' if kind == "chat" else b'"text":'
        self._open = [self._head + b'{"index":%d,' % i + field for i in range(choices)]
        self._between = b'},"logprobs":' if kind == "chat" else b',"logprobs":'
        self._end = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        self._plain = self._between + b'null,"finish_reason":null}' + self._end
        self._with_usage = with_usage

    def text(self, index: int, text: str) -> bytes:
        """A piece of a choice."""
        return self._open[index] + _json(text) + self._plain

    def text_with_logprobs(self, index: int, text: str, logprobs: object) -> bytes:
        """A piece of a choice and the log-probabilities of its tokens."""
        return b"".join(
            (self._open[index], _json(text), self._between, _json(logprobs), b',"finish_reason":null}', self._end)
        )

    def role(self, index: int) -> bytes:
        """A chat choice's first chunk."""
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return self._head + b'{"index":%d,' % index + delta + self._end

    def finish(self, index: int, text: str, reason: str) -> bytes:
        """A choice's last chunk, with what was still held back of its text."""
        return b"".join(
            (self._open[index], _json(text), self._between, b'null,"finish_reason":', _json(reason), b"}", self._end)
        )

    def usage(self, usage: Usage) -> bytes:
        """The chunk after the last, where it was asked for."""
        return self._head + b'],"usage":' + _json(usage) + b"}\n\n" if self._with_usage else b""


def error(error: ApiError) -> bytes:
    """The end of a stream that broke after it began."""
    return b"data: " + error.body() + b"\n\n" + DONE
