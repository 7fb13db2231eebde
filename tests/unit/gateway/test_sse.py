from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperflexis.gateway.sse import DONE, Chunks, error
from hyperflexis.openai_api import ApiError, Kind, usage


def data(chunk: bytes) -> dict[str, object]:
    assert chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") and chunk.count(b"\n") == 2
    found: dict[str, object] = json.loads(chunk[6:])
    return found


@given(st.text(), st.sampled_from(["chat", "completions"]), st.booleans())
def test_chunks_are_what_json_would_have_written(text: str, kind: Kind, with_usage: bool) -> None:
    chunks = Chunks(kind, 'id"1', 5, "a/m\n", with_usage, 2)
    name = "chat.completion.chunk" if kind == "chat" else "text_completion"

    def expected(choice: dict[str, object]) -> dict[str, object]:
        common = {"id": 'id"1', "object": name, "created": 5, "model": "a/m\n", "choices": [choice]}
        return common | ({"usage": None} if with_usage else {})

    body: dict[str, object] = {"delta": {"content": text}} if kind == "chat" else {"text": text}
    assert data(chunks.text(1, text)) == expected({"index": 1, **body, "logprobs": None, "finish_reason": None})
    found = data(chunks.text_with_logprobs(0, text, {"content": []}))
    assert found == expected({"index": 0, **body, "logprobs": {"content": []}, "finish_reason": None})
    found = data(chunks.finish(0, text, "stop"))
    assert found == expected({"index": 0, **body, "logprobs": None, "finish_reason": "stop"})


@pytest.mark.parametrize("with_usage", [False, True])
def test_usage_only_where_asked_for(with_usage: bool) -> None:
    chunk = Chunks("chat", "id", 5, "m", with_usage, 1).usage(usage(3, 4, 2))
    if not with_usage:
        assert chunk == b""
    else:
        found = data(chunk)
        assert found["choices"] == []
        assert found["usage"] == {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 2},
        }


def test_an_error_is_the_streams_last_word() -> None:
    found = error(ApiError(502, 'broke "so"', code="instance_lost"))
    assert found.endswith(DONE)
    assert data(found.removesuffix(DONE))["error"] == {
        "message": 'broke "so"',
        "type": "server_error",
        "param": None,
        "code": "instance_lost",
    }
