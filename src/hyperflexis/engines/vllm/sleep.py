"""A vLLM server as a standby: at sleep level 2 it keeps its process, kernels and graphs, and its GPU has neither
weights nor KV. Woken, it reads weights by its model loader, so from others where loader.py gets them.

    sleep    POST /sleep?level=2
    wake     POST /wake_up?tags=weights                    memory for them, with nothing in it
             POST /collective_rpc update_config            where they come from
             POST /collective_rpc reload_weights           into that memory
             POST /wake_up?tags=kv_cache                   requests are taken from here on

vLLM has these for servers with VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode, which it refuses on CPUs. **Not run on a
GPU**: written from vLLM 0.32's source, and tested against a server that plays its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec

from ...errors import HyperFlexisError
from .weights import LOAD_FORMAT

STEP_LIMIT_S = 1800.0
"""Of one step. Weights may come from a slow disk."""
REMEDY = "start it with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1, on a GPU"


class _ModelConfig(msgspec.Struct):
    enable_sleep_mode: bool = False


class _VllmConfig(msgspec.Struct):
    model_config: _ModelConfig


class _ServerInfo(msgspec.Struct):
    vllm_config: _VllmConfig


class _Status(msgspec.Struct):
    status: str = ""


class Sleeper:
    """Of the server at ``url``; ``session`` has the headers that it asks for. All raise HyperFlexisError when the
    server does not do what it was told, or does not answer."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def check(self) -> None:
        """See that it can sleep: a server on a CPU answers that it does, and does nothing."""
        try:
            info = msgspec.json.decode(await self._ask("GET", "/server_info?config_format=json"), type=_ServerInfo)
        except (HyperFlexisError, msgspec.DecodeError) as error:
            raise HyperFlexisError(f"{self._url} cannot be a standby: {REMEDY} ({error})") from error
        if not info.vllm_config.model_config.enable_sleep_mode:
            raise HyperFlexisError(f"{self._url} cannot be a standby, as its sleep mode is off: {REMEDY}")

    async def sleep(self) -> None:
        """Give weights and KV up. What runs is aborted."""
        await self._ask("POST", "/sleep?level=2&mode=abort")

    async def wake(self, sources: Sequence[str], digest: str = "") -> None:
        """Get the weights from the first of ``sources`` that gives them, else from disk; then take requests."""
        await self._told("/wake_up?tags=weights", "sleeping")
        extra = {"sources": list(sources)} | ({"digest": digest} if digest else {})
        load = {"load_format": LOAD_FORMAT, "model_loader_extra_config": extra}
        await self._call("update_config", {"overrides": {"load_config": load}})
        await self._call("reload_weights", {})
        await self._told("/wake_up?tags=kv_cache", "awake")

    async def _told(self, path: str, wanted: str) -> None:
        body = await self._ask("POST", path)
        try:
            status = msgspec.json.decode(body, type=_Status).status
        except msgspec.DecodeError as error:
            raise HyperFlexisError(f"{self._url}{path}: {error}") from error
        if status != wanted:
            raise HyperFlexisError(f"{self._url}{path}: the server is {status or 'in no state that it tells'}")

    async def _call(self, method: str, kwargs: dict[str, Any]) -> None:
        await self._ask("POST", "/collective_rpc", {"method": method, "kwargs": kwargs})

    async def _ask(self, verb: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        what = f"{path} {body['method']}" if body is not None else path
        try:
            limit = aiohttp.ClientTimeout(total=STEP_LIMIT_S)
            async with self._session.request(verb, f"{self._url}{path}", json=body, timeout=limit) as answer:
                text = await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise HyperFlexisError(f"{self._url}: {what}: {error or type(error).__name__}") from error
        if answer.status != 200:
            said = text[:500].decode(errors="replace")
            raise HyperFlexisError(f"{self._url}: {what}: status {answer.status}, {said}")
        return text
