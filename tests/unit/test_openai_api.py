from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperflexis.openai_api import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    check_supported,
    parse_request,
    structured_outputs,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}


def parse(kind: Any, body: Any) -> Any:
    return parse_request(kind, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("status", "type"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (502, "server_error"),
        (503, "server_error"),
    ],
)
def test_an_error_has_openais_shape(status: int, type: str) -> None:
    body = json.loads(ApiError(status, "what", code="c", param="p").body())
    assert body == {"error": {"message": "what", "type": type, "param": "p", "code": "c"}}


def test_null_means_left_out() -> None:
    names = ("stream", "n", "stop", "temperature", "top_p", "seed", "max_tokens", "logprobs", "tools", "logit_bias")
    request = parse("chat", {**CHAT, **dict.fromkeys(names)})
    check_supported(request, engine_takes_body=False)
    assert (request.token_limit(), request.stops(), request.num_logprobs()) == (None, (), None)


def test_limits_stops_and_log_probabilities() -> None:
    request = parse("chat", {**CHAT, "max_tokens": 5, "max_completion_tokens": 7, "stop": "x", "logprobs": True})
    assert (request.token_limit(), request.stops(), request.num_logprobs()) == (7, ("x",), 0)
    assert parse("completions", COMPLETION).token_limit() == 16
    assert parse("completions", {**COMPLETION, "stop": ["a", "b"]}).stops() == ("a", "b")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_forms_of_a_prompt(prompt: Any, expected: Any) -> None:
    assert parse("completions", {**COMPLETION, "prompt": prompt}).prompts() == expected


def test_engines_that_take_the_body_may_know_what_ours_do_not() -> None:
    draw = parse("chat", {**CHAT, "presence_penalty": 1, "response_format": {"type": "json_object"}})
    check_supported(draw, engine_takes_body=True)
    with pytest.raises(ApiError, match="presence_penalty"):
        check_supported(draw, engine_takes_body=False)
    shape = parse("completions", {**COMPLETION, "echo": True})
    with pytest.raises(ApiError, match="echo"):
        check_supported(shape, engine_takes_body=True)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}}},
            {"json": {"type": "array"}},
        ),
        ({"guided_json": {"type": "array"}}, {"json": {"type": "array"}}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": "root ::= a"}, {"grammar": "root ::= a"}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
    ],
)
def test_what_an_answer_must_look_like(fields: dict[str, Any], expected: Any) -> None:
    request = parse("chat", CHAT | fields)
    check_supported(request, engine_takes_body=False, structured_outputs=True)
    found = structured_outputs(request)
    assert (json.loads(found) if found else None) == expected
    if expected is not None:
        with pytest.raises(ApiError) as error:
            check_supported(request, engine_takes_body=False)
        assert error.value.param in fields


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": 3}, "guided_regex"),
        ({"guided_regex": "a" * 70_000}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"unknown": 1}}, "structured_outputs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
    ],
)
def test_what_it_cannot_look_like_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as error:
        structured_outputs(parse("chat", CHAT | fields))
    assert error.value.status == 400 and error.value.param == param


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ApiError) as error:
        parse("chat", {"model": "m"})
    assert error.value.param == "messages"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
fields = sorted({*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__})


@given(st.sampled_from(["chat", "completions"]), st.dictionaries(st.sampled_from(fields), json_values, max_size=4))
def test_any_body_is_read_or_refused_with_a_4xx(kind: Any, change: dict[str, Any]) -> None:
    base = CHAT if kind == "chat" else COMPLETION
    try:
        request = parse(kind, base | change)
        check_supported(request, engine_takes_body=False, structured_outputs=True)
        structured_outputs(request)
        request.stops(), request.num_logprobs(), request.token_limit()
        if isinstance(request, CompletionRequest):
            request.prompts()
    except ApiError as error:
        assert error.status == 400
        assert error.message


@given(st.binary(max_size=50))
def test_any_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(ApiError):
        parse_request("chat", body)
