"""vLLM servers as standbys, against one that plays the part of vLLM 0.32's endpoints: what it answers in which state,
and that memory which woke has nothing in it before weights are read. Not run on a GPU."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from tests.contract.openai_server import OpenAIServer
from tests.contract.support import driven

from hyperflexis.core.weights import LoadWeights, WeightSource
from hyperflexis.engines.vllm.engine import VllmConfig, VllmEngine
from hyperflexis.errors import HyperFlexisError
from hyperflexis.policy import step

TAGS = frozenset({"weights", "kv_cache"})


class SleepingServer(OpenAIServer):
    """``weights`` is what its memory holds; ``reads`` what its loader would find, by the sources that it was told."""

    def __init__(self) -> None:
        super().__init__(token_ids=True)
        self.version = "0.32.0"
        self.can_sleep = True
        self.asleep: frozenset[str] = frozenset()
        self.weights: str | None = "right"
        self.reads = {(): "right"}
        self.load: dict[str, Any] = {"load_format": "auto", "model_loader_extra_config": {}}
        self.calls: list[str] = []
        router = self._runner.app.router
        router.add_get("/server_info", self._server_info)
        router.add_post("/sleep", self._sleep)
        router.add_post("/wake_up", self._wake_up)
        router.add_post("/collective_rpc", self._collective_rpc)

    async def _server_info(self, request: web.Request) -> web.Response:
        config = {"model_config": {"enable_sleep_mode": self.can_sleep, "model": "m"}, "load_config": self.load}
        return web.json_response({"vllm_config": config, "vllm_env": {}, "system_env": {}})

    async def _sleep(self, request: web.Request) -> web.Response:
        assert request.query["level"] == "2"
        self.calls.append("sleep")
        self.asleep, self.weights = TAGS, None
        return web.json_response({"status": "sleeping", "level": 2})

    async def _wake_up(self, request: web.Request) -> web.Response:
        tags = request.query.getall("tags")
        self.calls.append(f"wake_up {','.join(tags)}")
        if not set(tags) <= self.asleep:
            return web.json_response({"status": "sleeping" if self.asleep else "awake", "tags": tags})
        self.asleep -= set(tags)
        if "weights" in tags:
            self.weights = "nothing"
        return web.json_response({"status": "sleeping" if self.asleep else "awake", "tags": tags})

    async def _collective_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.calls.append(body["method"])
        match body["method"]:
            case "update_config":
                (name,) = body["kwargs"]["overrides"]
                assert name == "load_config"
                self.load |= body["kwargs"]["overrides"][name]
            case "reload_weights":
                if "weights" in self.asleep:
                    return web.Response(status=500, text="CUDA error: an illegal memory access was encountered")
                assert self.load["load_format"] == "hyperflexis"
                found = self.reads.get(tuple(self.load["model_loader_extra_config"]["sources"]))
                if found is None:
                    return web.Response(status=500, text="Cannot find any model weights with `m`")
                self.weights = found
        return web.json_response({"results": [None]})

    async def _generate(
        self, request: web.Request, body: dict[str, Any], prompt: list[int], kind: str
    ) -> web.StreamResponse:
        if self.asleep:
            await asyncio.Event().wait()  # scheduling is paused
        if body.get("logprobs") and not body.get("stream"):
            logprob = -0.25 if self.weights == "right" else -3.5
            top = {"top_logprobs": [{"a": logprob, "b": logprob - 1.0}]}
            return web.json_response({"choices": [{"text": "a", "token_ids": [97], "logprobs": top}]})
        return await super()._generate(request, body, prompt, kind)


@pytest.fixture
async def server() -> AsyncIterator[SleepingServer]:
    one = SleepingServer()
    await one.start()
    yield one
    await one.stop()


def standby(server: SleepingServer) -> VllmEngine:
    return VllmEngine(VllmConfig("m", server.url, step=step.plan))


def order(*addresses: str, digest: str = "") -> LoadWeights:
    return LoadWeights("i", 1, tuple(WeightSource(one, "other", 1) for one in addresses), digest)


async def test_a_standby_sleeps_and_wakes_with_weights_from_others(server: SleepingServer) -> None:
    server.reads = {("10.0.0.1:7000", "unix:/run/w"): "right"}
    async with driven(standby(server), standby=True) as driver:
        assert server.calls == ["sleep"] and server.weights is None
        refused = await driver.streams[driver.send([5, 6, 7], 3)].ended()
        assert refused.finish == "refused" and "standby" in refused.message
        loaded = await driver.engine.load(order("10.0.0.1:7000", "unix:/run/w", digest="0" * 32))
        assert loaded.problem == "" and [one.name for one in loaded.phases] == ["transfer", "check"]
        assert server.calls[1:] == ["wake_up weights", "update_config", "reload_weights", "wake_up kv_cache"]
        assert server.load["model_loader_extra_config"]["digest"] == "0" * 32
        assert server.weights == "right" and not server.asleep
        assert (await driver.streams[driver.send([5, 6, 7], 3)].ended()).finish == "length"


async def test_other_weights_are_found_and_never_served(server: SleepingServer) -> None:
    server.reads = {("10.0.0.1:7000",): "wrong", (): "right"}
    async with driven(standby(server), standby=True) as driver:
        loaded = await driver.engine.load(order("10.0.0.1:7000"))
        assert "computes otherwise than before" in loaded.problem
        assert server.asleep == TAGS and server.weights is None
        assert (await driver.streams[driver.send([5, 6, 7], 3)].ended()).finish == "refused"
        assert (await driver.engine.load(order())).problem == ""
        assert (await driver.streams[driver.send([5, 6, 7], 3)].ended()).finish == "length"


async def test_a_load_that_fails_leaves_a_standby_and_says_why(server: SleepingServer) -> None:
    server.reads = {}
    async with driven(standby(server), standby=True) as driver:
        loaded = await driver.engine.load(order())
        assert "reload_weights: status 500, Cannot find any model weights" in loaded.problem
        assert server.asleep == TAGS


async def test_a_server_that_cannot_sleep_is_no_standby(server: SleepingServer) -> None:
    server.can_sleep = False
    with pytest.raises(HyperFlexisError, match=r"sleep mode is off: start it with --enable-sleep-mode .* on a GPU"):
        async with driven(standby(server), standby=True):
            pass
    assert server.calls == []


async def test_a_server_without_the_endpoints_is_no_standby() -> None:
    plain = await OpenAIServer(token_ids=True).start()
    plain.version = "0.32.0"
    try:
        with pytest.raises(HyperFlexisError, match=r"cannot be a standby: start it with .*VLLM_SERVER_DEV_MODE=1"):
            async with driven(VllmEngine(VllmConfig("m", plain.url, step=step.plan)), standby=True):
                pass
    finally:
        await plain.stop()
