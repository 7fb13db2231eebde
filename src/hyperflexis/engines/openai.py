"""Stands for a server that already runs and speaks OpenAI's API: vLLM, SGLang, llama.cpp, a hosted one.

The server decides its own order; here requests are sent on, counted, and timed coarsely. Two ways to speak with it:

    text       the client's own JSON goes on as it is (but for ``model``, ``stream`` and ``seed``), text comes back
    token ids  prompts go as ids to /v1/completions and ids come back (vLLM's ``return_token_ids``), which is what lets
               a stream be resumed elsewhere; the gateway then needs the model's tokenizer

An answer counts as finished only with a ``finish_reason``: a stream that just ends is an error. Log-probabilities come
back with token ids only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import msgspec

from ..core.cold_fit import ColdFit
from ..core.instance import RequestProgress
from ..core.latency import REFRESH_EVERY, Coefficients
from ..core.links import KvSource
from ..core.profile import Profile
from ..core.weights import LoadWeights
from ..errors import HyperFlexisError, ProtocolError
from ..wire import Generate, unpack_ids
from .base import STANDBY, Emission, EngineInfo, EngineReport, EngineStart, Loaded
from .openai_answer import CARDS, EVENT, Card, Event, Events, Usage, error_message, is_set, token_logprobs_of

CONNECT_S = 5.0
START_RETRY_S = 0.5
PROBE_LIMIT_S = 5.0
FIRST_TOKEN_LIMIT_S = 60.0
"""A server that has just started compiles at its first request."""
MAX_FAILURES = 3
"""Health probes in a row that may fail before the server counts as gone. A busy server may miss one."""
WINDOW, WINDOW_S = 8, 0.2
"""Tokens, and seconds, over which gaps are averaged, at least: single ones are mostly the network's and the reader's
jitter."""
BYTES_PER_TOKEN = 4
"""Of a prompt whose ids are not known, until the server tells; English text has about four."""
MAX_ERROR_BYTES = 1 << 16
HTTP_FINISH = {429: "refused", 503: "refused", 400: "invalid", 413: "invalid", 422: "invalid"}
"""How a server's status ends a stream: busy or starting, so another instance may do; the request's own fault; all else
is an error of the server."""
FALLBACK_CONTEXT = 131_072
"""For servers that do not tell theirs. Large, since the server itself refuses what is too long."""
FALLBACK_LATENCY = Coefficients(0.015, 5e-5, 2e-9, 5e-5, 5e-8, 0.5)
FALLBACK_SPREAD = 10.0
"""Where the fit starts without a profile: about an 8B model on an accelerator of 300 TFLOPS, or something ten times as
fast or slow."""
_OURS = ("slo", "priority", "service_tier", "n")
"""Fields of the body that are for the gateway. It sends each choice as a request of its own."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenAIConfig:
    """The server at ``url`` (its base, without ``/v1``), served under the name ``model``.

    ``server_model`` is its name there; None takes ``model`` where the server lists it, else its only one.
    ``api_key_env`` names the environment variable with the key. ``token_ids`` speaks token ids. ``max_batch`` is the
    most requests sent at once; more wait here. ``profile`` gives sizes and the prior of the fit. The sizes that are
    None are the server's own where it tells them, else the profile's. ``start_limit_s`` bounds the wait for a server
    that is still loading; ``probe_every_s`` is how often one that is silent is asked for its health.
    """

    model: str
    url: str
    server_model: str | None = None
    api_key_env: str | None = None
    token_ids: bool = False
    max_batch: int | None = None
    context_length: int | None = None
    kv_tokens: int | None = None
    profile: Profile | None = None
    start_limit_s: float = 600.0
    probe_every_s: float = 1.0


def first_fit(profile: Profile | None, refresh_every: int = REFRESH_EVERY, curve: bool = True) -> ColdFit:
    """Of a server that was not watched yet, whose ``profile`` says where to begin, with its ``curve`` or without."""
    if profile is None:
        return ColdFit(FALLBACK_LATENCY, FALLBACK_SPREAD, refresh_every)
    guess = profile.coefficients
    return ColdFit(guess if curve else replace(guess, curve=()), 1.0, refresh_every)


_BODY = msgspec.json.Decoder(dict[str, msgspec.Raw])
_CACHE = re.compile(r'vllm:cache_config_info\{[^}]*\bblock_size="(\d+)"[^}]*\bnum_gpu_blocks="(\d+)"')


@dataclass(slots=True, eq=False)
class ServerStream:
    """One request: ``body`` goes to ``path`` when it is sent. Times in seconds of the engine's clock."""

    key: object
    request: Generate
    path: str
    body: dict[str, Any]
    num_prompt_tokens: int
    num_output_tokens: int = 0
    sent_at: float = 0.0
    cached_tokens: int = 0
    alone: bool = False
    decodes_before: int = 0
    kv_before: int = 0
    first_at: float | None = None
    finish_reason: str | None = None
    moved: bool = False
    task: asyncio.Task[None] | None = None


@dataclass(slots=True)
class _Window:
    """What happened over some iterations of the server, told by the tokens of one stream. Sums over iterations."""

    lead: ServerStream
    began_at: float
    iterations: int = 0
    prefill_tokens: int = 0
    attention: float = 0.0
    decodes: int = 0
    kv_tokens: int = 0


@dataclass(slots=True)
class _Counters:
    iterations: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    busy_s: float = 0.0


class OpenAIEngine:
    """See the module."""

    def __init__(self, config: OpenAIConfig) -> None:
        self._config = config
        self._clock = time.monotonic
        self._url = config.url.rstrip("/")
        self._model = config.server_model or config.model
        # What is seen from outside are means over iterations, of which a curve says nothing.
        self._fit = first_fit(config.profile, refresh_every=1, curve=False)
        self._prior = self._fit.coefficients
        self._counters = _Counters()
        self._streams: dict[object, ServerStream] = {}
        self._pending: dict[object, Emission] = {}
        self._window: _Window | None = None
        self._busy_since: float | None = None
        self._heard_at = 0.0
        self._draining = False
        self._standby = False
        self._takes_kv = False
        self._failure: str | None = None
        self._health: asyncio.Task[None] | None = None

    async def start(self, start: EngineStart) -> EngineInfo:
        """Wait for the server and ask what it serves. Its requests are not handed over.

        Raises HyperFlexisError when it does not answer in time, refuses the key, does not serve the model, or is to
        speak token ids and cannot.
        """
        self._sink = start.sink
        self._standby = start.standby
        self._loop = asyncio.get_running_loop()
        config, profile = self._config, self._config.profile
        max_batch = config.max_batch or (profile.max_batch if profile is not None else 256)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        # The limit holds for streams; health probes must not wait behind them.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=max_batch), timeout=timeout, headers=self._headers()
        )
        self._probes = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=PROBE_LIMIT_S), headers=self._headers()
        )
        try:
            card = await self._find_model()
            if config.token_ids:
                await self._check_token_ids()
            kv_tokens = config.kv_tokens or await self._find_kv_tokens()
        except BaseException:
            await self._close()
            raise
        context = config.context_length or card.max_model_len or (profile and profile.context_length)
        if not context:
            context = FALLBACK_CONTEXT
            _log.warning("%s does not tell its context length; %d assumed", self._url, context)
        self._health = self._loop.create_task(self._watch())
        return EngineInfo(
            model=config.model,
            engine="openai",
            device_kind=profile.device_kind if profile is not None else "unknown",
            context_length=context,
            kv_capacity_tokens=kv_tokens or (profile.kv_capacity_tokens if profile is not None else 16 * context),
            max_batch=max_batch,
            max_batch_tokens=profile.max_batch_tokens if profile is not None else 8192,
            returns_token_ids=config.token_ids,
            latency=self._prior,
            guessed=True,
        )

    async def load(self, order: LoadWeights) -> Loaded:
        """At once: the server has its weights."""
        self._standby = False
        return Loaded()

    def set_send_rate(self, bytes_per_s: float | None) -> None:
        """Without effect: there are no weights to give."""

    def generate(self, key: object, request: Generate) -> None:
        """See the contract."""
        refusal = self._failure or ("the instance is draining" if self._draining else "")
        refusal = refusal or (STANDBY if self._standby else "")
        if refusal:
            self._sink([Emission(key, [], finish="refused", message=refusal)])
            return
        if request.kv is not None and not self._takes_kv:
            self._sink([Emission(key, [], finish="refused", message="the server takes no KV")])
            return
        try:
            path, body = self._request(request)
        except (ProtocolError, msgspec.DecodeError) as error:
            self._sink([Emission(key, [], finish="invalid", message=f"the request's body cannot be sent on: {error}")])
            return
        num_prompt_tokens = len(request.token_ids) // 4 or len(request.body) // BYTES_PER_TOKEN
        if not self._streams:
            self._busy_since = self._clock()
        stream = self._streams[key] = ServerStream(key, request, path, body, num_prompt_tokens)
        self._admit(stream)

    def _admit(self, stream: ServerStream) -> None:
        """Send a new request at once. Where the order is ours, it waits here for its turn."""
        self._send(stream)

    def _send(self, stream: ServerStream) -> None:
        sent = [one for one in self._streams.values() if one.task is not None]
        running = [one for one in sent if one.first_at is not None]
        stream.sent_at = self._clock()
        # A prefill is timed only when no other shares it.
        stream.alone = len(running) == len(sent)
        stream.decodes_before = len(running)
        stream.kv_before = sum(one.num_prompt_tokens + one.num_output_tokens for one in running)
        for other in sent:
            if other.first_at is None:
                other.alone = False
        stream.task = self._loop.create_task(self._serve(stream, stream.path, msgspec.json.encode(stream.body)))

    def cancel(self, key: object) -> None:
        """Close the request's connection, by which the server learns of it."""
        stream = self._streams.get(key)
        if stream is not None:
            self._finish(stream, "cancelled")
            self._flush()

    def report(self) -> EngineReport:
        """The state now, as far as it can be seen from here. Raises HyperFlexisError once the server is gone."""
        if self._failure is not None:
            raise HyperFlexisError(self._failure)
        counters, now = self._counters, self._clock()
        if self._busy_since is not None:
            counters.busy_s += now - self._busy_since
            self._busy_since = now
        running = [stream for stream in self._streams.values() if stream.first_at is not None]
        progress = []
        for stream in running:
            if stream.moved:
                stream.moved = False
                progress.append(
                    RequestProgress(stream.request.request_id, stream.num_prompt_tokens, stream.num_output_tokens)
                )
        return EngineReport(
            num_running=len(running),
            num_waiting=len(self._streams) - len(running),
            kv_used_tokens=sum(one.num_prompt_tokens + one.num_output_tokens for one in running),
            iterations=counters.iterations,
            prompt_tokens=counters.prompt_tokens,
            output_tokens=counters.output_tokens,
            prefix_hit_tokens=counters.cached_tokens,
            preemptions=0,
            busy_s=counters.busy_s,
            latency=self._fit.coefficients,
            progress=tuple(progress),
        )

    def stay(self, request_id: str) -> None:
        """Without effect: its requests are not handed over."""

    def set_role(self, prefill_share: float) -> None:
        """Accepted and without effect: the server takes what it is sent."""

    def keep_links(self, sources: Iterable[KvSource]) -> None:
        """Its requests are not handed over."""

    def drain(self) -> None:
        """See the contract."""
        self._draining = True

    async def stop(self) -> None:
        """See the contract. The server itself goes on."""
        self._draining = True
        if self._health is not None:
            self._health.cancel()
            await asyncio.gather(self._health, return_exceptions=True)
        tasks = [stream.task for stream in self._streams.values() if stream.task is not None]
        self._end_all("the instance stopped")
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._close()

    def _headers(self) -> dict[str, str]:
        name = self._config.api_key_env
        if name is None:
            return {}
        key = os.environ.get(name)
        if not key:
            raise HyperFlexisError(f"the environment variable {name} with the key of {self._url} is not set")
        return {"Authorization": f"Bearer {key}"}

    async def _close(self) -> None:
        await self._session.close()
        await self._probes.close()

    async def _find_model(self) -> Card:
        """The model's entry in /v1/models, waiting for a server that is not up yet."""
        limit_s = self._config.start_limit_s
        deadline = self._clock() + limit_s
        while True:
            try:
                async with self._probes.get(f"{self._url}/v1/models") as answer:
                    body = await answer.read()
                    status = answer.status
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                reason = str(error) or type(error).__name__
            else:
                if status == 200:
                    return self._pick(body)
                if status in (401, 403):
                    raise HyperFlexisError(f"{self._url} refuses the key ({status}); set api_key_env to its variable")
                reason = f"status {status}"
                if status < 500 and status != 429:
                    raise HyperFlexisError(
                        f"{self._url}/v1/models answers {status}; is the base URL right, without /v1?"
                    )
            if self._clock() + START_RETRY_S > deadline:
                raise HyperFlexisError(f"{self._url} does not answer after {limit_s:g} s: {reason}; is it running?")
            await asyncio.sleep(START_RETRY_S)

    def _pick(self, body: bytes) -> Card:
        try:
            cards = CARDS.decode(body).data
        except msgspec.DecodeError as error:
            raise HyperFlexisError(f"{self._url}/v1/models is not OpenAI's model list: {error}") from error
        by_name = {card.id: card for card in cards}
        card = by_name.get(self._model)
        if card is None and self._config.server_model is None and len(cards) == 1:
            card = cards[0]
        if card is None:
            names = ", ".join(sorted(by_name)) or "none"
            raise HyperFlexisError(f"{self._url} does not serve {self._model!r}; its models are {names}")
        self._model = card.id
        return card

    async def _check_token_ids(self) -> None:
        """One token is worth knowing before the first client's request whether ids come back."""
        choices = EVENT.decode(await self._one_token({})).choices
        if not choices or choices[0].token_ids is None:
            raise HyperFlexisError(f"{self._url} returns no token ids (vLLM 0.10.2 or later does); leave token_ids out")

    async def _one_token(self, more: dict[str, Any]) -> bytes:
        """The answer to a request for one token with ``more`` fields; an empty one where the server fails."""
        request = {"model": self._model, "prompt": [1], "max_tokens": 1, "return_token_ids": True} | more
        url, limit = f"{self._url}/v1/completions", aiohttp.ClientTimeout(total=FIRST_TOKEN_LIMIT_S)
        try:
            async with self._probes.post(url, json=request, timeout=limit) as answer:
                body = await answer.read()
                return body if answer.status == 200 and body.startswith(b"{") else b"{}"
        except (aiohttp.ClientError, TimeoutError, OSError):
            return b"{}"

    async def _find_kv_tokens(self) -> int | None:
        """Context tokens of the KV cache, where the server is a vLLM that tells."""
        try:
            async with self._probes.get(f"{self._url}/metrics") as answer:
                found = _CACHE.search(await answer.text()) if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError, UnicodeDecodeError):
            found = None
        return int(found[1]) * int(found[2]) if found else None

    async def _watch(self) -> None:
        """Probe the server while nothing else is heard from it; after MAX_FAILURES in a row it is gone."""
        failures = 0
        path = "/health"
        every_s = self._config.probe_every_s
        while self._failure is None:
            await asyncio.sleep(every_s)
            if self._clock() - self._heard_at < every_s:
                failures = 0
                continue
            try:
                async with self._probes.get(f"{self._url}{path}") as answer:
                    if answer.status in (404, 405) and path == "/health":
                        path = "/v1/models"
                        continue
                    reason = f"status {answer.status}" if answer.status >= 500 else None
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                reason = str(error) or type(error).__name__
            failures = failures + 1 if reason else 0
            if failures >= MAX_FAILURES:
                self._failure = f"{self._url} does not answer: {reason}"
                self._end_all(self._failure)

    def _request(self, request: Generate) -> tuple[str, dict[str, Any]]:
        """Path and body to send."""
        if self._config.token_ids:
            return "/v1/completions", self._ids_body(request)
        body: dict[str, Any] = dict(_BODY.decode(request.body))
        for name in _OURS:
            body.pop(name, None)
        body |= {"model": self._model, "stream": True, "stream_options": {"include_usage": True}}
        if request.sampling.seed is not None:
            body["seed"] = request.sampling.seed  # each choice has its own
        path = "/v1/chat/completions" if request.kind == "chat" else "/v1/completions"
        return path, body

    def _ids_body(self, request: Generate) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": unpack_ids(request.token_ids),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if sampling.top_k > 0:
            body["top_k"] = sampling.top_k
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.ignore_eos:
            body["ignore_eos"] = True
        if sampling.stop_token_ids:
            body["stop_token_ids"] = list(sampling.stop_token_ids)
        if sampling.logprobs is not None:
            body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
        return body

    async def _serve(self, stream: ServerStream, path: str, body: bytes) -> None:
        """One request, from the connection to its end."""
        try:
            await self._converse(stream, path, body)
        except aiohttp.ClientConnectorError as error:
            self._finish(stream, "refused", f"the server cannot be reached: {error}")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._finish(stream, "error", f"the server's answer broke off: {str(error) or type(error).__name__}")
        except (ProtocolError, msgspec.DecodeError, ValueError) as error:
            self._finish(stream, "error", f"the server's answer is not OpenAI's format: {error}")
        finally:
            self._flush()

    async def _converse(self, stream: ServerStream, path: str, body: bytes) -> None:
        """Send it and read what comes. Whoever calls this knows what its exceptions say of the server."""
        async with self._post(path, body) as answer:
            if await self._is_answered(stream, answer, "text/event-stream"):
                await self._read(stream, answer.content)

    def _post(self, path: str, body: bytes) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self._session.post(f"{self._url}{path}", data=body, headers={"Content-Type": "application/json"})

    async def _is_answered(self, stream: ServerStream, answer: aiohttp.ClientResponse, content_type: str) -> bool:
        """Whether the server does what it was asked for; the stream ends if it does not."""
        if answer.status != 200:
            message = error_message(await answer.content.read(MAX_ERROR_BYTES)) or f"status {answer.status}"
            self._finish(stream, HTTP_FINISH.get(answer.status, "error"), message)
        elif answer.content_type != content_type:
            self._finish(stream, "error", f"the server answered with {answer.content_type}, not with {content_type}")
        else:
            return True
        return False

    async def _read(self, stream: ServerStream, content: aiohttp.StreamReader) -> None:
        events = Events()
        async for data in content.iter_any():
            self._heard_at = self._clock()
            for event in events.feed(data):
                if event == b"[DONE]":
                    self._complete(stream)
                else:
                    self._take(stream, EVENT.decode(event))
            self._flush()
        self._complete(stream)

    def _complete(self, stream: ServerStream) -> None:
        """The server has said all that it has to say."""
        match stream.finish_reason:
            case None:
                self._finish(stream, "error", "the server ended the stream without a finish_reason")
            case "stop" | "length" as reason:
                self._finish(stream, reason)
            case other:
                self._finish(stream, "error", f"the server ended the answer with {other}")

    def _take(self, stream: ServerStream, event: Event) -> None:
        """One event of a stream: tokens, the counts, or an error."""
        if stream.key not in self._streams:
            return
        if is_set(event.error):
            self._finish(stream, "error", error_message(bytes(event.error)) or "the server reports an error")
            return
        if event.usage is not None and event.usage.prompt_tokens:
            usage = event.usage
            self._count_prompt(stream, usage)
            self._counters.output_tokens += max(usage.completion_tokens - stream.num_output_tokens, 0)
            stream.num_output_tokens = max(usage.completion_tokens, stream.num_output_tokens)
        if not event.choices:
            return
        choice = event.choices[0]
        if choice.finish_reason is not None:
            stream.finish_reason = choice.finish_reason
        if self._config.token_ids:
            ids, text = choice.token_ids or [], None
            num = len(ids)
            if choice.finish_reason == "stop":
                # vLLM sends the token that stopped it; by the contract it is counted and not part of the answer.
                ids = ids[:-1]
        else:
            delta = choice.delta
            if delta is not None and is_set(delta.tool_calls):
                self._finish(stream, "error", "the server answers with tool calls, which are not carried")
                return
            ids, text = [], (delta.content if delta is not None else choice.text) or None
            # An event is about a token; the counts at the end are exact.
            num = 1 if text or (delta is not None and delta.reasoning_content) else 0
        if num:
            self._observe(stream, num)
        if ids or text:
            out = self._pending.get(stream.key)
            if out is None:
                out = self._pending[stream.key] = Emission(stream.key, [])
            out.token_ids += ids
            if text is not None:
                out.text = (out.text or "") + text
            if ids and is_set(choice.logprobs):
                out.logprobs = (out.logprobs or []) + token_logprobs_of(choice.logprobs, ids)

    def _count_prompt(self, stream: ServerStream, usage: Usage) -> None:
        """What the server tells of the prompt."""
        details = usage.prompt_tokens_details
        stream.num_prompt_tokens = usage.prompt_tokens
        stream.cached_tokens = (details.cached_tokens or 0) if details is not None else 0

    def _observe(self, stream: ServerStream, num_tokens: int) -> None:
        """Count tokens, and learn from the gaps between those of one stream: each is about an iteration."""
        now = self._clock()
        stream.moved = True
        stream.num_output_tokens += num_tokens
        self._counters.output_tokens += num_tokens
        window = self._window
        if stream.first_at is None:
            self._prompt_ended(stream, now)
        elif window is None:
            self._counters.iterations += num_tokens
            self._window = _Window(stream, now)
        elif window.lead is stream:
            self._counters.iterations += num_tokens
            running = [one for one in self._streams.values() if one.first_at is not None]
            n = window.iterations = window.iterations + num_tokens
            window.decodes += len(running) * num_tokens
            window.kv_tokens += sum(one.num_prompt_tokens + one.num_output_tokens for one in running) * num_tokens
            if n >= WINDOW and now - window.began_at >= WINDOW_S:
                # The model is linear: the mean of shapes takes the mean of times.
                shape = (round(window.prefill_tokens / n), window.attention / n, round(window.decodes / n))
                self._fit.observe(*shape, round(window.kv_tokens / n), (now - window.began_at) / n)
                self._window = _Window(stream, now)

    def _prompt_ended(self, stream: ServerStream, now: float) -> None:
        """Its first token is there."""
        stream.first_at = now
        self._counters.iterations += 1
        if self._window is not None:
            self._window.prefill_tokens += stream.num_prompt_tokens
            self._window.attention += 0.5 * stream.num_prompt_tokens**2

    def _finish(self, stream: ServerStream, reason: str, message: str = "") -> None:
        """Mark the end, once; the emission leaves with the next flush."""
        if self._streams.pop(stream.key, None) is None:
            return
        if self._window is not None and self._window.lead is stream:
            self._window = None
        now = self._clock()
        if not self._streams and self._busy_since is not None:
            self._counters.busy_s += now - self._busy_since
            self._busy_since = None
        if stream.first_at is not None:
            computed = max(stream.num_prompt_tokens - stream.cached_tokens, 0)
            self._counters.prompt_tokens += computed
            self._counters.cached_tokens += stream.cached_tokens
            if stream.alone and computed:
                attention = computed * (stream.cached_tokens + 0.5 * computed)
                ttft_s = stream.first_at - stream.sent_at
                self._fit.observe(computed, attention, stream.decodes_before, stream.kv_before, ttft_s)
        out = self._pending.setdefault(stream.key, Emission(stream.key, []))
        out.finish = reason
        out.message = message
        out.num_prompt_tokens = stream.num_prompt_tokens
        out.num_output_tokens = stream.num_output_tokens
        out.cached_tokens = stream.cached_tokens
        task = stream.task
        if task is not None and task is not asyncio.current_task(self._loop):
            task.cancel()

    def _flush(self) -> None:
        if self._pending:
            pending = list(self._pending.values())
            self._pending = {}
            self._sink(pending)

    def _end_all(self, message: str) -> None:
        for stream in list(self._streams.values()):
            self._finish(stream, "error", message)
        self._flush()
