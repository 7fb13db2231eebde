"""The client of `bench`: one request at a time, timed, with as little work per token as can be.

Prompts are seeded random token ids where the server takes them, else that many common words; ``ignore_eos`` with
``max_tokens`` makes outputs as long as the workload says. Streams are not parsed: the first and last arrival of data
and the usage figure in the last frames are all that counts, since the client often shares its cores with the engines
that it measures. Times are ``time.monotonic``: an event loop's own clock stands still while it works and may tick in
whole milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
import time
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

import aiohttp
import msgspec

from .core.record import Record, RecordOutcome
from .core.slo import Slo
from .errors import HyperFlexisError
from .fd_limit import raise_fd_limit
from .sim.workload import HASH_BLOCK_TOKENS, Arrival

MODELS_LIMIT_S, PROBE_LIMIT_S = 30.0, 120.0  # how long a server may take to say what it serves, and for each probe
MAX_OPEN = 20_000  # requests open at once; beyond it the client itself would be what is measured

# Ids that every tokenizer has, past the special ones at the front: byte-level vocabularies have 256 base tokens.
_ID_LOW, _NUM_IDS = 16, 240
_BYTE_TO_ID = bytes(_ID_LOW + b % _NUM_IDS for b in range(256))
# One token each, with their leading space, in the common vocabularies.
_WORDS = (
    " the of and to in is that for it as was with be by on not he his but at are this have from or had an they which"
)
_USAGE = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')
_FRAME = b"data: {"
_REFUSED = frozenset({429, 503})


@dataclass(frozen=True, slots=True)
class Target:
    """A server and what it takes. ``keys`` maps tenants to API keys, "" being everyone else's. ``classes`` are the
    workload's classes that the server knows by name."""

    url: str
    model: str
    keys: Mapping[str, str]
    token_ids: bool = True
    ignore_eos: bool = True
    classes: frozenset[str] = frozenset()


class Client:
    """Sends requests of a workload to one target. Use as an async context manager."""

    def __init__(self, target: Target, seed: int) -> None:
        self.target = target
        self._seed = seed
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        self._session = _session()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def send(self, arrival: Arrival, index: int, started_at: float) -> Record:
        """Send one request now and read its answer; ``started_at`` is ``time.monotonic()`` at the start.

        ``index`` seeds the prompt. Cancelling the task drops the connection and raises CancelledError.
        """
        assert self._session is not None
        due = started_at + arrival.t
        body, headers = self._request(arrival, index)

        def record(outcome: RecordOutcome, detail: str = "", first: float | None = None, tokens: int = 0) -> Record:
            ttft_s = None if first is None else first - due
            return missed(arrival, outcome, detail, ttft_s, tokens)

        first: float | None = None
        last, frames, tail = due, 0, b""
        try:
            async with self._session.post(f"{self.target.url}/v1/completions", data=body, headers=headers) as response:
                if response.status != 200:
                    text = _message(await response.read())
                    return record("rejected" if response.status in _REFUSED else "failed", f"{response.status} {text}")
                instance = response.headers.get("x-hfx-instance", "")
                content = response.content
                while data := await content.readany():
                    last = time.monotonic()
                    new = data.count(_FRAME)
                    if first is None and new:
                        first = last
                    frames += new
                    tail = (tail + data)[-1024:]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return record("failed", f"{type(error).__name__}: {error}", first)
        usage = _USAGE.search(tail)
        if first is None or (usage is None and b'"error"' in tail):
            return record("failed", _message(tail) or "the stream was empty", first if frames > 1 else None)
        tokens = int(usage[1]) if usage else frames
        if self.target.ignore_eos and tokens < arrival.num_output_tokens:
            return record("failed", f"{tokens} of {arrival.num_output_tokens} tokens came", first, tokens)
        return replace(record("finished", "", first, tokens), e2e_s=last - due, instance=instance)

    def _request(self, arrival: Arrival, index: int) -> tuple[bytes, dict[str, str]]:
        target, slo = self.target, arrival.slo
        headers = {"content-type": "application/json"}
        for name, seconds in (("ttft", slo.ttft_s), ("tpot", slo.tpot_s), ("e2e", slo.e2e_s)):
            if seconds is not None:
                headers[f"x-slo-{name}-ms"] = f"{seconds * 1000.0:.3f}"
        if arrival.slo_class in target.classes:
            headers["x-slo-class"] = arrival.slo_class
        key = target.keys.get(arrival.tenant) or target.keys.get("")
        if key:
            headers["authorization"] = f"Bearer {key}"
        if target.token_ids:
            prompt: object = make_token_ids(arrival, Random(f"{self._seed}:{index}"))
        else:
            prompt = "".join(
                f" {word}"
                for word in Random(f"{self._seed}:{index}").choices(_WORDS.split(), k=arrival.num_prompt_tokens)
            )
        body: dict[str, object] = {
            "model": arrival.model or target.model,
            "prompt": prompt,
            "max_tokens": arrival.num_output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if target.ignore_eos:
            body["ignore_eos"] = True
        return msgspec.json.encode(body), headers


def missed(
    arrival: Arrival, outcome: RecordOutcome, detail: str, ttft_s: float | None = None, received_tokens: int = 0
) -> Record:
    """The record of a request without a last token."""
    return Record(
        arrival.slo_class,
        arrival.slo,
        arrival.t,
        arrival.num_prompt_tokens,
        arrival.num_output_tokens,
        outcome,
        ttft_s,
        received_tokens=received_tokens,
        detail=detail,
    )


def make_token_ids(arrival: Arrival, random: Random) -> list[int]:
    """A prompt of the arrival's length. Blocks named by ``hash_ids`` are equal wherever the same id appears, so that
    prefixes shared in a trace are shared here."""
    ids = array("B")
    for block in arrival.hash_ids:
        ids.frombytes(Random(block).randbytes(HASH_BLOCK_TOKENS).translate(_BYTE_TO_ID))
    missing = arrival.num_prompt_tokens - len(ids)
    if missing > 0:
        ids.frombytes(random.randbytes(missing).translate(_BYTE_TO_ID))
    return ids[: arrival.num_prompt_tokens].tolist()


def _session() -> aiohttp.ClientSession:
    raise_fd_limit(MAX_OPEN + 1024)  # one descriptor an open request
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30.0)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout, auto_decompress=False)


def _message(body: bytes) -> str:
    """The error text in a JSON body or SSE frame, or what there is, in one line."""
    match = re.search(rb'"message"\s*:\s*"((?:[^"\\]|\\.)*)"', body)
    text = (match[1] if match else body).decode(errors="replace")
    return " ".join(text.split())[:300]


def _reason(error: Exception) -> str:
    """Why there is no connection, in the operating system's words where it has some."""
    cause = getattr(error, "os_error", error)
    if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError) and (cause.errno or 0) > 0:
        return os.strerror(cause.errno or 0)
    return str(getattr(cause, "strerror", None) or cause) or type(error).__name__


@contextlib.asynccontextmanager
async def _answer_within(limit_s: float, url: str, what: str) -> AsyncIterator[None]:
    limit = asyncio.timeout(limit_s)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise HyperFlexisError(
            f"{url} accepted the connection but did not answer within {limit_s:g} s ({what})"
        ) from None


async def find_target(
    url: str,
    model: str | None,
    keys: Mapping[str, str],
    classes: Sequence[str],
    models_limit_s: float = MODELS_LIMIT_S,
    probe_limit_s: float = PROBE_LIMIT_S,
) -> Target:
    """Ask the server what it serves and takes: token ids, ``ignore_eos``, class names.

    ``model`` None takes the only one served. ``models_limit_s`` and ``probe_limit_s`` bound how long the server may
    take for its list of models and for each probe. Raises HyperFlexisError with a remedy.
    """
    url = url.rstrip("/").removesuffix("/v1")
    if not re.match(r"https?://[^/]", url):
        raise HyperFlexisError(f"--url {url!r} is no address of a server; give one like http://127.0.0.1:8080")
    headers = {"authorization": f"Bearer {keys['']}"} if keys.get("") else {}
    async with _session() as session:
        try:
            # Half the limit for the connection: one that never opens is another mistake than a silent server.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=models_limit_s / 2)
            async with (
                _answer_within(models_limit_s, url, "/v1/models"),
                session.get(f"{url}/v1/models", headers=headers, timeout=timeout) as response,
            ):
                body = await response.read()
                if response.status == 401:
                    raise HyperFlexisError(f"{url} wants an API key: give it with --api-key")
                if response.status != 200:
                    raise HyperFlexisError(f"{url}/v1/models answered {response.status}: {_message(body)}")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise HyperFlexisError(
                f"nothing answers at {url} ({_reason(error)}); is it running? start it, or correct --url"
            ) from None
        try:
            served = [entry.id for entry in msgspec.json.decode(body, type=_Models).data]
        except msgspec.DecodeError:
            raise HyperFlexisError(f"{url}/v1/models is no OpenAI list of models; is --url right?") from None
    if model is None:
        if len(served) != 1:
            raise HyperFlexisError(f"{url} serves {', '.join(served) or 'no model'}: choose with --model")
        model = served[0]
    if model not in served:
        raise HyperFlexisError(
            f"{url} does not serve {model!r}; it serves {', '.join(served) or 'no model'}: correct --model"
        )
    detail = ""
    for token_ids, ignore_eos in ((True, True), (False, True), (False, False)):
        target = Target(url, model, keys, token_ids, ignore_eos)
        outcome = await _probe(target, "", probe_limit_s)
        if outcome.outcome == "finished":
            known = [name for name in classes if await _knows_class(target, name, probe_limit_s)]
            return replace(target, classes=frozenset(known))
        if not outcome.detail.startswith("4") or outcome.outcome == "rejected":
            raise HyperFlexisError(f"{url} cannot serve {model!r} now: {outcome.detail}")
        detail = outcome.detail
    raise HyperFlexisError(f"{url} refuses a plain completion: {detail}")


async def _knows_class(target: Target, name: str, limit_s: float) -> bool:
    return (await _probe(replace(target, classes=frozenset({name})), name, limit_s)).outcome == "finished"


async def _probe(target: Target, slo_class: str, limit_s: float) -> Record:
    what = f"a completion of one token{f' in class {slo_class}' if slo_class else ''}"
    async with _answer_within(limit_s, target.url, what), Client(target, seed=0) as client:
        return await client.send(Arrival(0.0, slo_class, Slo(), 1.0, 4, 1), 0, time.monotonic())


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]
