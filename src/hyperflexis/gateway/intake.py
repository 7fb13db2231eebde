"""From a body to what the fleet is asked for: parse, validate, resolve the promise, tokenise. Pure, for any thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..openai_api import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Kind,
    check_supported,
    parse_request,
    structured_outputs,
)
from ..wire import ModelStatus, Sampling, pack_ids
from .config import Tenant
from .slo_sources import Promise, SloSources
from .text import ByteText, Text, prefix_keys

# Engines that take text do not say how long it is in their tokens; the usual English ratio.
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. ``token_ids`` are packed u32, empty for engines that take the client's body."""

    token_ids: bytes
    num_tokens: int
    max_tokens: int
    prefix_keys: tuple[int, ...]
    tail: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Intake:
    """A client's request, understood. Each prompt gets ``n`` choices. ``text`` is None for engines that take text;
    these get ``body``."""

    kind: Kind
    model: str
    tenant: Tenant
    promise: Promise
    prompts: tuple[Prompt, ...]
    n: int
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    text: Text | None
    body: bytes

    @property
    def num_choices(self) -> int:
        """Generations in all."""
        return self.n * len(self.prompts)


@dataclass(frozen=True, slots=True)
class Intakes:
    """What turning bodies into intakes needs to know: models with their texts, and the sources of SLOs."""

    texts: Mapping[str, Text | None]
    slo_sources: SloSources
    max_choices: int

    def read(
        self,
        kind: Kind,
        body: bytes,
        headers: Mapping[str, str],
        tenant: Tenant,
        statuses: Mapping[str, ModelStatus],
    ) -> Intake:
        """Raises ApiError for all that a client can get wrong."""
        request = parse_request(kind, body)
        model = request.model
        if model not in self.texts:
            message = f"no model is named {model!r} here; the models are {sorted(self.texts)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        promise = self.slo_sources.promise(tenant, headers, request.slo, request.service_tier)
        status = statuses.get(model)
        if status is None:
            message = f"no instance of {model!r} has been ready yet"
            raise ApiError(503, message, code="no_instance_ready", retry_after_s=2.0)
        text = self.texts[model]
        if text is None and status.returns_token_ids:
            text = ByteText()
        check_supported(request, engine_takes_body=text is None, structured_outputs=status.structured_outputs)
        if text is None:
            prompts: Sequence[Prompt] = [_opaque(request, body, status.context_length)]
        else:
            limit = request.token_limit()
            salt = tenant.name
            param = "messages" if isinstance(request, ChatRequest) else "prompt"
            prompts = [_prompt(ids, limit, status.context_length, salt, param) for ids in _token_ids(request, text)]
        n = request.n or 1
        if n * len(prompts) > self.max_choices:
            raise ApiError(400, f"n: {n * len(prompts)} choices, at most {self.max_choices} are allowed", param="n")
        return Intake(
            kind=kind,
            model=model,
            tenant=tenant,
            promise=promise,
            prompts=tuple(prompts),
            n=n,
            sampling=_sampling(request, "" if text is None else structured_outputs(request)),
            stops=request.stops(),
            stream=bool(request.stream),
            include_usage=request.stream_options is not None and bool(request.stream_options.include_usage),
            text=text,
            body=body if text is None else b"",
        )


def _token_ids(request: ChatRequest | CompletionRequest, text: Text) -> list[list[int]]:
    if isinstance(request, ChatRequest):
        return [text.encode_chat(request.messages)]
    found = []
    for prompt in request.prompts():
        if isinstance(prompt, str):
            found.append(text.encode(prompt))
            continue
        size = text.vocab_size()
        if not 0 <= min(prompt) <= max(prompt) < size:
            raise ApiError(400, f"prompt: token ids are from 0 to {size - 1}", param="prompt")
        found.append(prompt)
    return found


def _prompt(ids: list[int], limit: int | None, context: int, salt: str, param: str) -> Prompt:
    if not ids:
        raise ApiError(400, f"{param}: no tokens", param=param)
    room = context - len(ids)
    if room < 1:
        message = f"the prompt has {len(ids)} tokens; with one output token the context of {context} is exceeded"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    packed = pack_ids(ids)
    max_tokens = room if limit is None else min(limit, room)
    return Prompt(packed, len(ids), max_tokens, prefix_keys(packed, salt), tuple(ids[-8:]))


def _opaque(request: ChatRequest | CompletionRequest, body: bytes, context: int) -> Prompt:
    if request.num_logprobs() is not None:
        raise ApiError(400, "logprobs: the engine of this model does not return them", param="logprobs")
    if isinstance(request, CompletionRequest) and len(request.prompts()) > 1:
        raise ApiError(400, "prompt: the engine of this model takes one prompt a request", param="prompt")
    limit = request.token_limit()
    tokens = max(1, len(body) // _BYTES_PER_TOKEN)
    room = max(1, context - tokens)
    return Prompt(b"", tokens, room if limit is None else min(limit, room), (), ())


def _sampling(request: ChatRequest | CompletionRequest, structured: str) -> Sampling:
    top_k = request.top_k or 0
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(top_k, 0),  # -1 means off to other servers
        seed=request.seed,
        ignore_eos=bool(request.ignore_eos),
        logprobs=request.num_logprobs(),
        structured=structured,
    )
