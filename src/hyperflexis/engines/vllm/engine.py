"""Stands for a vLLM server, one that runs or one that it starts. What it knows beyond any OpenAI-compatible server:

token ids         in and out, always; so streams can be resumed, and the gateway makes the text
what it is        release, KV cache, whether our scheduler is in it (terms.py)
order             stock servers get what they would begin now, with a priority (window.py); a server with our
                  scheduler gets all, with what was promised, and decides itself
prefixes          tenants are kept apart by vLLM's ``cache_salt``
iterations        told by our scheduler, else fitted from outside as with any server
KV                where servers give it to each other, requests go on elsewhere at the end of their prompt (handoff.py)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from ...core.links import KvSource
from ...core.transfer import SourceState
from ...core.weights import LoadWeights, Phase
from ...errors import HyperFlexisError, ProtocolError
from ...policy.step import StepPolicy
from ...sequences import Sequence
from ...transfer.links import Refusal
from ...wire import Generate
from ..base import EngineInfo, EngineReport, EngineStart, Loaded
from ..driver import sequence_of
from ..handoff import HandoffConfig
from ..openai import OpenAIConfig, OpenAIEngine, ServerStream
from ..openai_answer import NULL, Event
from ..torch.config import DTYPE_BYTES, load_config
from .handoff import DECODES_ELSEWHERE, Fetched, NixlHandoffs
from .server import Recipe, VllmServer, start_server
from .sleep import Sleeper
from .startup import agree, fingerprint, warm_up
from .terms import MAX_REPORT_BYTES, PROBE, REPORTS_VARIABLE, SENT, Capabilities, Promise, StepReport
from .window import Window

LEAST_VERSION = (0, 10, 2)
"""The first that returns token ids."""
MAX_BATCH, MAX_BATCH_TOKENS = 256, 2048
"""vLLM's own, where a server tells no others."""
REPORT_LIVES_S = 2.0
"""Older than this, what the scheduler told last says nothing any more."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VllmConfig(OpenAIConfig):
    """As OpenAIConfig, always with token ids. ``step`` orders requests in front of a stock server, for which
    ``max_batch`` and ``max_batch_tokens`` should be its own ``--max-num-seqs`` and ``--max-num-batched-tokens``.
    ``recipe`` starts a server, in place of ``url``. ``kv_listen``: address (``unix:PATH`` or HOST:PORT) at which other
    instances ask for requests whose prompts were computed here, None for nowhere; ``kv_token``: the word that they
    share. The servers need a KV connector then, NIXL's."""

    step: StepPolicy[Any] | None = None
    max_batch_tokens: int | None = None
    recipe: Recipe | None = None
    kv_listen: str | None = None
    kv_token: str = ""


class _Parameters(msgspec.Struct):
    hyperflexis: Capabilities | None = None
    remote_engine_id: str | None = None


class _Prompt(Event):
    """The whole answer to a request for one token."""

    kv_transfer_params: msgspec.Raw = NULL


class _Probed(msgspec.Struct):
    kv_transfer_params: _Parameters | None = None


class _Version(msgspec.Struct):
    version: str


_PROMPT = msgspec.json.Decoder(_Prompt)


class VllmEngine(OpenAIEngine):
    """See the module."""

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(replace(config, token_ids=True))
        self._vllm = config
        self._server: VllmServer | None = None
        self._server_ended: asyncio.Future[str] | None = None
        self._inside: Capabilities | None = None
        self._version = ""
        self._line: Window | None = None
        self._waits: dict[object, Sequence] = {}
        self._look: asyncio.TimerHandle | None = None
        self._began = self._clock()
        self._reports = _Reports()
        self._sleeper: Sleeper | None = None
        self._fingerprint: dict[str, float] = {}
        self._handoffs: NixlHandoffs | None = None
        self._fetching: dict[object, asyncio.Task[None]] = {}
        self._fetched: dict[object, Fetched] = {}
        self._parked: dict[object, ServerStream] = {}

    async def start(self, start: EngineStart) -> EngineInfo:
        """Start the server, if that is asked for, and find out what it is. In standby it has its weights for the
        start, and then sleeps.

        Raises HyperFlexisError when it ends or does not answer in time, is no vLLM or too old a one, does not serve
        the model, or is to sleep and cannot.
        """
        config, recipe = self._vllm, self._vllm.recipe
        ended: asyncio.Future[str] | None = None
        if recipe is not None:
            reports = await self._reports.open()
            env = {**recipe.env, REPORTS_VARIABLE: reports}
            self._server = await start_server(replace(recipe, standby=start.standby, env=env))
            self._url = self._server.url
            ended = self._server_ended = asyncio.ensure_future(self._server.ended())
        starting = asyncio.ensure_future(super().start(start))
        try:
            both: set[asyncio.Future[Any]] = {starting} if ended is None else {starting, ended}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if ended is not None and ended.done():
                raise HyperFlexisError(f"vLLM {ended.result()} while it started; what it wrote above says why")
            info = starting.result()
        except BaseException:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await self._stop_server()
            raise
        if ended is not None:
            ended.add_done_callback(self._server_gone)
        info = self._described(info)
        try:
            longest = min(info.max_batch_tokens, info.context_length // 2)
            await warm_up(self._one_token, self._fit, longest, info.max_batch)
            if start.standby:
                await self._lie_down()
            if config.kv_listen is not None:
                handoff = HandoffConfig(config.kv_listen, config.kv_token, start.instance, start.epoch)
                serves = f"{info.model} vLLM {self._version}"
                self._handoffs = NixlHandoffs(handoff, serves, start.ending, start.linked)
                self._takes_kv = True
                size = self._kv_bytes_per_token()
                info = replace(info, kv_address=self._handoffs.address, kv_bytes_per_token=size, parks=True)
        except BaseException:
            await self.stop()
            raise
        return replace(info, latency=self._fit.coefficients)

    async def load(self, order: LoadWeights) -> Loaded:
        """See the contract. What the server has tried, its log says."""
        if self._sleeper is None:
            return await super().load(order)
        began = self._clock()
        try:
            await self._sleeper.wake([source.address for source in order.sources], order.digest)
            woken = self._clock()
            same = agree(await fingerprint(self._one_token), self._fingerprint)
            problem = "" if same else "the server computes otherwise than before it slept"
        except HyperFlexisError as error:
            problem = str(error)
        if problem:
            with contextlib.suppress(HyperFlexisError):  # it is a standby in either case
                await self._sleeper.sleep()
            return Loaded(problem=problem)
        await super().load(order)
        return Loaded(phases=(Phase("transfer", woken - began), Phase("check", self._clock() - woken)))

    def report(self) -> EngineReport:
        """As told by the scheduler inside the server, else as seen from here. Raises HyperFlexisError once the server
        is gone."""
        report, told = super().report(), self._reports.last
        # What stands still between two servers is no work of this one: it must not look as if it hung over it.
        prompts = sum(stream.first_at is not None for stream in self._parked.values())
        running, waiting = report.num_running - prompts, report.num_waiting - (len(self._parked) - prompts)
        report = replace(report, num_running=running, num_waiting=waiting)
        if told is None:
            return report
        found = msgspec.structs.asdict(told) | {"latency": told.coefficients()}
        del found["curve"]
        # It tells nothing while nothing runs, and does not know of what is on its way to it.
        if self._clock() - self._reports.at > REPORT_LIVES_S:
            found |= {"num_running": report.num_running, "kv_used_tokens": report.kv_used_tokens}
        found["num_waiting"] = max(report.num_running + report.num_waiting - found["num_running"], 0)
        return replace(report, **found)

    def stay(self, request_id: str) -> None:
        """See Engine."""
        if self._handoffs is not None:
            self._handoffs.stay(request_id)

    def keep_links(self, sources: Iterable[KvSource]) -> None:
        """See Engine."""
        if self._handoffs is not None:
            self._handoffs.keep_links(sources)

    async def stop(self) -> None:
        """End all streams with ``error``, and the server if it was started here."""
        if self._look is not None:
            self._look.cancel()
        await super().stop()
        if self._handoffs is not None:
            await self._handoffs.close()
        await self._stop_server()

    def _described(self, info: EngineInfo) -> EngineInfo:
        config, inside = self._vllm, self._inside
        max_batch = config.max_batch or (inside.max_batch if inside else MAX_BATCH)
        max_batch_tokens = config.max_batch_tokens or (inside.max_batch_tokens if inside else MAX_BATCH_TOKENS)
        if inside is None and config.step is not None:
            self._line = Window(config.step, max_batch, max_batch_tokens, info.kv_capacity_tokens)
        order = f"scheduler of HyperFlexis {inside.release}" if inside else "vLLM's own scheduler, a window in front"
        _log.info(
            "%s: vLLM %s, %d tokens of context, %d of KV cache, %s",
            *(self._url, self._version, info.context_length, info.kv_capacity_tokens, order),
        )
        found = replace(info, engine="vllm", structured_outputs=True)
        return replace(found, max_batch=max_batch, max_batch_tokens=max_batch_tokens)

    async def _check_token_ids(self) -> None:
        self._version = await self._find_version()
        await super()._check_token_ids()
        try:
            found = msgspec.json.decode(await self._one_token({"vllm_xargs": {PROBE: 1}}), type=_Probed)
        except msgspec.DecodeError as error:
            raise HyperFlexisError(f"{self._url}: the scheduler inside speaks otherwise than we do: {error}") from error
        parameters = found.kv_transfer_params
        self._inside = parameters.hyperflexis if parameters is not None else None
        recipe = self._vllm.recipe
        if recipe is not None and recipe.scheduler and self._inside is None:
            raise HyperFlexisError(
                f"vLLM {self._version} runs without our scheduler although it was asked for: is there another "
                "--scheduler-cls among the arguments? Remove it, or set scheduler: vllm"
            )
        if self._vllm.kv_listen is not None:
            found = msgspec.json.decode(await self._one_token({"kv_transfer_params": DECODES_ELSEWHERE}), type=_Probed)
            if found.kv_transfer_params is None or found.kv_transfer_params.remote_engine_id is None:
                raise HyperFlexisError(
                    f"{self._url} gives no KV to other servers, as mode disaggregated asks for: start it with "
                    "--kv-transfer-config for NixlConnector (docs/engines/vllm.md)"
                )

    async def _lie_down(self) -> None:
        self._sleeper = Sleeper(self._url, self._probes)
        await self._sleeper.check()
        self._fingerprint = await fingerprint(self._one_token)
        if not self._fingerprint:
            raise HyperFlexisError(
                f"{self._url} tells no log-probabilities, by which a standby is checked when it wakes"
            )
        await self._sleeper.sleep()

    async def _find_version(self) -> str:
        """Raises HyperFlexisError for what is no vLLM, or one that cannot return token ids."""
        try:
            async with self._probes.get(f"{self._url}/version") as answer:
                body = await answer.read() if answer.status == 200 else b""
            version = msgspec.json.decode(body, type=_Version).version
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
            raise HyperFlexisError(
                f"{self._url} does not say which vLLM it is; for other servers use engine openai"
            ) from error
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
        if numbers < LEAST_VERSION:
            least = ".".join(map(str, LEAST_VERSION))
            raise HyperFlexisError(f"{self._url} is vLLM {version}, which returns no token ids: upgrade to {least}")
        return version

    def _request(self, request: Generate) -> tuple[str, dict[str, Any]]:
        path, body = super()._request(request)
        structured = request.sampling.structured
        if structured:
            if request.sent_tokens and self._inside is None:
                raise ProtocolError(
                    "vLLM's own scheduler would begin a structured answer anew, so it cannot go on: --scheduler-cls "
                    "hyperflexis.engines.vllm.SloScheduler on its servers lets it"
                )
            body["structured_outputs"] = msgspec.Raw(structured.encode())
        if request.salt:
            body["cache_salt"] = request.salt
        return path, body

    def _kv_bytes_per_token(self) -> int:
        """What the profile says, else what follows from the model's configuration; 0 where neither is known."""
        config = self._vllm
        if config.profile is not None:
            return config.profile.kv_bytes_per_token
        if config.recipe is None:
            return 0
        try:
            model = load_config(config.recipe.directory)
        except HyperFlexisError:
            return 0  # an architecture that our own engine does not know
        return model.kv_elements_per_token * DTYPE_BYTES[model.dtype]

    def _admit(self, stream: ServerStream) -> None:
        if stream.request.kv is not None:
            self._parked[stream.key] = stream
            self._fetching[stream.key] = self._loop.create_task(self._fetch(stream))
        else:
            self._order(stream)

    async def _fetch(self, stream: ServerStream) -> None:
        """Have the instance that computed the prompt offer it; then it waits for its turn as any other."""
        assert self._handoffs is not None
        try:
            fetched = self._fetched[stream.key] = await self._handoffs.fetch(stream.request)
        except (Refusal, ProtocolError) as error:
            del self._fetching[stream.key]
            self._finish(stream, "refused", f"its KV did not come: {error}")
            self._flush()
        else:
            del self._fetching[stream.key]
            stream.body["kv_transfer_params"] = fetched.parameters
            self._order(stream)

    def _order(self, stream: ServerStream) -> None:
        """Send a request, or have it wait for its turn where the order is ours."""
        request = stream.request
        if self._line is None:
            if self._inside is not None:
                promise = Promise(
                    request.first_due_s,
                    request.pace_s,
                    request.last_due_s,
                    request.value,
                    request.expected_output_tokens,
                )
                stream.body["vllm_xargs"] = promise.to_xargs()
                if request.sent_tokens:
                    stream.body["vllm_xargs"][SENT] = request.sent_tokens
            self._send(stream)
            return
        now = self._clock()
        seq = self._waits[stream.key] = sequence_of(request, now, stream)
        self._line.add(seq, now, seq.num_prompt_tokens - 1 if request.kv is not None else 0)
        self._look_soon()

    async def _converse(self, stream: ServerStream, path: str, body: bytes) -> None:
        if stream.request.kv is not None:
            stream.alone = False  # its prompt was computed elsewhere: its time says nothing
        if stream.request.hands_over and self._handoffs is not None:
            if not await self._stays(stream, path, self._handoffs):
                return
            stream.alone = False
        await super()._converse(stream, path, body)

    async def _stays(self, stream: ServerStream, path: str, handoffs: NixlHandoffs) -> bool:
        """Have the prompt computed, and hand the request over. Whether it is to go on here."""
        body = {name: value for name, value in stream.body.items() if name != "stream_options"}
        body |= {"stream": False, "max_tokens": 1, "kv_transfer_params": DECODES_ELSEWHERE}
        async with self._post(path, msgspec.json.encode(body)) as answer:
            if not await self._is_answered(stream, answer, "application/json"):
                return False
            found = _PROMPT.decode(await answer.read())
        choice = found.choices[0] if found.choices else None
        if choice is None or not choice.token_ids or found.usage is None:
            self._finish(stream, "error", "the server answers without a token")
            return False
        now = self._heard_at = self._clock()
        self._count_prompt(stream, found.usage)
        self._prompt_ended(stream, now)
        if self._line is not None:
            self._line.took(self._waits[stream.key], 1, now)
            self._look_soon()
        if choice.finish_reason != "length":
            # Its first token ended it. That is counted, and is not part of the answer.
            stream.num_output_tokens, stream.finish_reason = 1, choice.finish_reason
            self._complete(stream)
            return False
        self._parked[stream.key] = stream
        state = await handoffs.offer(stream.request, choice.token_ids[0], bytes(found.kv_transfer_params))
        self._parked.pop(stream.key, None)
        match state:
            case SourceState.HANDED:
                self._finish(stream, "handed")
            case SourceState.MOVED:
                self._finish(stream, "moved", "whether its target has it is not known")
            case _:
                return True
        return False

    def _observe(self, stream: ServerStream, num_tokens: int) -> None:
        first = stream.first_at is None
        fetched = self._fetched.pop(stream.key, None)
        if fetched is not None:
            fetched.accept()
            del self._parked[stream.key]
        super()._observe(stream, num_tokens)
        if self._line is not None:
            self._line.took(self._waits[stream.key], stream.num_output_tokens, self._clock())
            if first:
                self._look_soon()

    def _finish(self, stream: ServerStream, reason: str, message: str = "") -> None:
        self._parked.pop(stream.key, None)
        fetching = self._fetching.pop(stream.key, None)
        if fetching is not None:
            fetching.cancel()
        fetched = self._fetched.pop(stream.key, None)
        if fetched is not None:  # nothing came: it goes on where its prompt was computed
            fetched.refuse(message or reason)
            reason = reason if reason == "cancelled" else "refused"
        super()._finish(stream, reason, message)
        seq = self._waits.pop(stream.key, None)
        if seq is not None and self._line is not None:
            self._line.end(seq)
            self._look_soon()

    def _look_soon(self, seconds: float = 0.0) -> None:
        """Ask the window soon, once for all that happens until then."""
        if self._look is not None:
            self._look.cancel()
        self._look = self._loop.call_later(seconds, self._fill)

    def _fill(self) -> None:
        """Send what is due."""
        window = self._line
        if window is None or not self._waits:
            return
        now, latency = self._clock(), self._fit.coefficients
        for seq in window.due(now, latency):
            stream = seq.payload
            assert isinstance(stream, ServerStream)
            stream.body["priority"] = window.priority(seq, now, self._began)
            self._send(stream)
        again_s = window.look_again_s(latency)
        if again_s is not None:
            self._look_soon(again_s)

    def _server_gone(self, ended: asyncio.Future[str]) -> None:
        if self._failure is None and not self._draining and not ended.cancelled():
            self._failure = f"vLLM {ended.result()}"
            self._end_all(self._failure)

    async def _stop_server(self) -> None:
        if self._server_ended is not None:
            self._server_ended.cancel()
        if self._server is not None:
            await self._server.stop()
        self._reports.close()


class _Reports(asyncio.DatagramProtocol):
    """What the scheduler inside the server tells. ``last`` came ``at`` a time of the monotonic clock."""

    def __init__(self) -> None:
        self.last: StepReport | None = None
        self.at = 0.0
        self._folder: Path | None = None
        self._transport: asyncio.BaseTransport | None = None

    async def open(self) -> str:
        """Begin to listen; where is returned. For this user alone."""
        self._folder = Path(tempfile.mkdtemp(prefix="hfx-vllm-"))
        path = str(self._folder / "reports")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listener.bind(path)
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, sock=listener)
        return path

    def datagram_received(self, data: bytes, addr: object) -> None:
        """asyncio's callback. What is none of ours is passed over."""
        if len(data) <= MAX_REPORT_BYTES:
            with contextlib.suppress(msgspec.DecodeError):
                self.last = msgspec.msgpack.decode(data, type=StepReport)
                self.at = asyncio.get_running_loop().time()

    def close(self) -> None:
        """Listen no more."""
        if self._transport is not None:
            self._transport.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
