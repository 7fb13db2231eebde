"""OpenAI's HTTP API: request schemas, answers and errors. Shared by the gateway and the engines; no I/O.

Fields that OpenAI has and that cannot change the answer (``user``, ``metadata``, ``store``, ...) are ignored, as are
unknown ones. Fields that would change it and that are not built are refused by name: a wrong answer is worse than none.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from .errors import HyperFlexisError

MAX_STOPS: Final = 4
# Matching a stop string across tokens compares every suffix that it might begin in: quadratic in its length.
MAX_STOP_CHARS: Final = 256
MAX_LOGPROBS_CHAT: Final = 20
MAX_LOGPROBS_COMPLETIONS: Final = 5
# A schema is compiled to a grammar, whose size nobody bounds.
MAX_STRUCTURED_BYTES: Final = 1 << 16
# OpenAI's default for completions; chat has none and takes the rest of the context.
DEFAULT_COMPLETION_TOKENS: Final = 16

ErrorType = Literal[
    "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
]
Kind = Literal["chat", "completions"]


class ApiError(HyperFlexisError):
    """An answer that is an error, in OpenAI's shape. ``retry_after_s`` becomes the Retry-After header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def type(self) -> ErrorType:
        """OpenAI's name for this kind of error, from the status."""
        match self.status:
            case 401:
                return "authentication_error"
            case 403:
                return "permission_error"
            case 429:
                return "rate_limit_error"
            case status if status >= 500:
                return "server_error"
            case _:
                return "invalid_request_error"

    def body(self) -> bytes:
        """``{"error": {message, type, param, code}}`` as JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1, le=1 << 31)]


class SloFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body's ``slo``: milliseconds, and the name of a class."""

    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    e2e_ms: Positive | None = None
    class_: str | None = msgspec.field(default=None, name="class")


class StreamOptions(msgspec.Struct, frozen=True):
    """``include_usage`` asks for a last chunk with the token counts."""

    include_usage: bool | None = None


class CommonRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints take. ``top_k``, ``ignore_eos`` and ``slo`` are extensions.

    The fields from ``best_of`` on are there only to be refused by name; see ``check_supported``.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    stop: str | list[str] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    max_tokens: Count | None = None
    ignore_eos: bool | None = None
    slo: SloFields | None = None
    service_tier: str | None = None

    best_of: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None
    min_p: Any = None
    min_tokens: Any = None
    stop_token_ids: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None

    def stops(self) -> tuple[str, ...]:
        """The stop strings. Raises ApiError when there are too many, or one is empty or too long."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MAX_STOPS:
            raise ApiError(400, f"stop: at most {MAX_STOPS} strings, got {len(stops)}", param="stop")
        for stop in stops:
            if not stop or len(stop) > MAX_STOP_CHARS:
                raise ApiError(400, f"stop: each string has 1 to {MAX_STOP_CHARS} characters", param="stop")
        return stops


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message's content; only ``type: text`` can be served."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, frozen=True):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Any = None


class ChatRequest(CommonRequest, frozen=True, kw_only=True):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS_CHAT)] | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None
    continue_final_message: Any = None
    add_generation_prompt: Any = None

    def token_limit(self) -> int | None:
        """The most output tokens that the client asked for, None when it left that open."""
        return self.max_completion_tokens or self.max_tokens

    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token, None for no log-probabilities."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return None


class CompletionRequest(CommonRequest, frozen=True, kw_only=True):
    """Body of ``/v1/completions``. ``prompt``: a string, token ids, or a list of either (one choice each)."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS_COMPLETIONS)] | None = None
    echo: Any = None
    suffix: Any = None

    def token_limit(self) -> int:
        """The most output tokens."""
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS

    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token, None for no log-probabilities."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself. Raises ApiError for an empty prompt or a mixture of ids and texts."""
        prompt = self.prompt
        prompts: list[str | list[int]]
        if isinstance(prompt, str):
            prompts = [prompt]
        elif prompt and all(isinstance(p, int) for p in prompt):
            prompts = [[p for p in prompt if isinstance(p, int)]]
        else:
            prompts = [p for p in prompt if not isinstance(p, int)]
            if len(prompts) < len(prompt):
                raise ApiError(400, "prompt: token ids and texts cannot be mixed in one list", param="prompt")
        if not prompts or not all(prompts):
            raise ApiError(400, "prompt: must not be empty", param="prompt")
        return prompts


# Field -> values besides null that change nothing. These change the answer's shape, which the gateway itself writes.
_SHAPE: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
# These change which tokens are drawn; engines that are given the client's own body may know them.
_DRAW: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}


# So do these, which some engines know: what an answer must look like.
_STRUCTURED: dict[str, tuple[object, ...]] = {
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}


def check_supported(
    request: ChatRequest | CompletionRequest, engine_takes_body: bool, structured_outputs: bool = False
) -> None:
    """Raise ApiError naming the first field whose meaning would be lost.

    ``engine_takes_body``: the engine gets the client's JSON as it is, so that what only concerns the draw is its own.
    ``structured_outputs``: it knows these.
    """
    lost = [_SHAPE]
    if not engine_takes_body:
        lost += [_DRAW] if structured_outputs else [_DRAW, _STRUCTURED]
    for table in lost:
        for name, neutral in table.items():
            value = getattr(request, name, None)
            if value is not None and value not in neutral:
                raise _unsupported(name)
    if isinstance(request, ChatRequest):
        if request.tools and request.tool_choice != "none":
            raise _unsupported("tools")
        if engine_takes_body:
            return
        for i, message in enumerate(request.messages):
            if message.tool_calls:
                raise _unsupported(f"messages[{i}].tool_calls")
            for j, part in enumerate(message.content if isinstance(message.content, list) else ()):
                if part.type != "text" or part.text is None:
                    raise _unsupported(f"messages[{i}].content[{j}] of type {part.type}")


class Structured(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What an answer must look like, in vLLM's words (``structured_outputs``): one of these."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None
    grammar: str | None = None
    json_object: Literal[True] | None = None


class _JsonSchema(msgspec.Struct, frozen=True):
    schema: dict[str, Any]


class _JsonFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_schema"):
    json_schema: _JsonSchema


class _AnyJsonFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_object"):
    pass


class _TextFormat(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    pass


def structured_outputs(request: ChatRequest | CompletionRequest) -> str:
    """What the answer must look like, as JSON of a Structured; empty where that is free. Raises ApiError naming the
    field that is wrong, or the second of two that say something else."""
    found: tuple[str, Structured] | None = None
    for name in _STRUCTURED:
        value = getattr(request, name)
        if value is None:
            continue
        try:
            wanted = _structured(name, value)
        except msgspec.ValidationError as error:
            raise ApiError(400, f"{name}: {error}", param=name) from error
        if wanted is None:
            continue
        if found is not None:
            raise ApiError(400, f"{name}: {found[0]} says already what the answer is to look like", param=name)
        found = name, wanted
    if found is None:
        return ""
    text = msgspec.json.encode(found[1]).decode()
    if len(text) > MAX_STRUCTURED_BYTES:
        raise ApiError(400, f"{found[0]}: {len(text)} bytes, at most {MAX_STRUCTURED_BYTES}", param=found[0])
    if sum(value is not None for value in msgspec.structs.astuple(found[1])) != 1:
        message = f"{found[0]}: give one of json, regex, choice, grammar and json_object"
        raise ApiError(400, message, param=found[0])
    return text


def _structured(name: str, value: Any) -> Structured | None:
    if name == "response_format":
        match msgspec.convert(value, _JsonFormat | _AnyJsonFormat | _TextFormat):
            case _JsonFormat(json_schema):
                return Structured(json=json_schema.schema)
            case _AnyJsonFormat():
                return Structured(json_object=True)
            case _:
                return None
    if name == "structured_outputs":
        return msgspec.convert(value, Structured)
    return msgspec.convert({name.removeprefix("guided_"): value}, Structured)


def _unsupported(name: str) -> ApiError:
    return ApiError(
        400,
        f"{name} is not supported here; leave it out",
        param=name.split(" ")[0],
        code="unsupported_parameter",
    )


_CHAT = msgspec.json.Decoder(ChatRequest)
_COMPLETION = msgspec.json.Decoder(CompletionRequest)
_AT = re.compile(r"^(.*?)(?: - at `\$\.?(.*?)`)?$", re.DOTALL)
_NAMED = re.compile(r"field `([^`]+)`")


def parse_request(kind: Kind, body: bytes) -> ChatRequest | CompletionRequest:
    """Decode and validate a body. Raises ApiError (400) that names the field and what was expected of it."""
    decoder = _CHAT if kind == "chat" else _COMPLETION
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        found = _AT.match(str(error))
        what, where = (found[1], found[2] or "") if found else (str(error), "")
        named = _NAMED.search(what)  # "Object missing required field `model`"
        param = ".".join(p for p in (where, named[1] if named else "") if p) or None
        raise ApiError(400, f"{param}: {what}" if param else what, param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


class PromptDetails(msgspec.Struct, frozen=True):
    """``cached_tokens``: prompt tokens whose KV was found."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Token counts of one answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    """The ``usage`` object."""
    return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, PromptDetails(cached_tokens))


class TopLogprob(msgspec.Struct, frozen=True):
    """One candidate token. ``bytes`` is None where the token is only a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(msgspec.Struct, frozen=True):
    """One sampled token of a chat answer."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """``logprobs`` of a chat choice."""

    content: list[ChatLogprob]


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """``logprobs`` of a completions choice. ``text_offset`` counts characters from the answer's start."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AnswerMessage(msgspec.Struct, frozen=True):
    """The assistant's message."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One choice of a chat answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class CompletionChoice(msgspec.Struct, frozen=True):
    """One choice of a completions answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str


class Answer(msgspec.Struct, frozen=True):
    """A whole answer, not streamed."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice] | list[CompletionChoice]
    usage: Usage


class ModelCard(msgspec.Struct, frozen=True):
    """One entry of ``/v1/models``. ``max_model_len`` (tokens) is None until an instance was ready once."""

    id: str
    created: int
    max_model_len: int | None
    object: str = "model"
    owned_by: str = "hyperflexis"


class ModelList(msgspec.Struct, frozen=True):
    """Body of ``/v1/models``."""

    data: list[ModelCard]
    object: str = "list"


def encode(value: Any) -> bytes:
    """JSON of any of the structs above."""
    return msgspec.json.encode(value)
