"""The engines under contract, and a driver that checks on every emission what no test should have to repeat."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from hyperflexis.core.latency import Coefficients
from hyperflexis.core.links import KvSource
from hyperflexis.core.profile import Domain, Profile
from hyperflexis.engines.base import Emission, Engine, EngineInfo, EngineStart
from hyperflexis.engines.emulated import EmulatedConfig, EmulatedEngine
from hyperflexis.policy.catalog import STEPS
from hyperflexis.wire import Generate, Sampling, TokenLogprob, pack_ids

LIMIT_S = 90.0
CONTEXT = 512
FINISHES = ("stop", "length", "cancelled", "refused", "moved", "handed", "invalid", "error")


@dataclass(slots=True)
class Stream:
    """What came of one request so far."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end: Emission | None = None
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not holds():
                self.moved.clear()
                await self.moved.wait()

    async def started(self) -> None:
        await self.until(lambda: bool(self.tokens or self.text))

    async def ended(self) -> Emission:
        await self.until(lambda: self.end is not None)
        assert self.end is not None
        return self.end


class Driver:
    """Drives one started engine as its host does."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.info: EngineInfo | None = None
        self.streams: dict[object, Stream] = {}
        self.stopped = False
        self.ending: Callable[[str, float], None] = lambda request_id, left_s: None
        self._numbers = itertools.count(1)

    def sink(self, emissions: list[Emission]) -> None:
        keys = [emission.key for emission in emissions]
        assert len(set(map(id, keys))) == len(keys), "two emissions of one stream in one iteration"
        for emission in emissions:
            stream = self.streams[emission.key]
            assert stream.end is None, "an emission after the last one"
            if emission.logprobs is not None:
                assert [one.token_id for one in emission.logprobs] == emission.token_ids
            stream.tokens += emission.token_ids
            stream.text += emission.text or ""
            stream.logprobs += emission.logprobs or []
            if emission.finish is not None:
                assert emission.finish in FINISHES
                stream.end = emission
            stream.moved.set()

    def send(
        self,
        prompt: list[int],
        max_tokens: int = 8,
        sampling: Sampling | None = None,
        body: str = "",
        request_id: str = "",
        hands_over: bool = False,
        kv: KvSource | None = None,
        salt: str = "",
        sent_tokens: int = 0,
    ) -> object:
        number = next(self._numbers)
        key = object()
        self.streams[key] = Stream()
        sampling = sampling or Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        body = body or json.dumps({"prompt": " ".join(map(str, prompt)), "max_tokens": sampling.max_tokens})
        request = Generate(
            stream=number,
            request_id=request_id or f"request-{number}",
            epoch=1,
            token_ids=pack_ids(prompt),
            sampling=sampling,
            body=body.encode(),
            hands_over=hands_over,
            kv=kv,
            salt=salt,
            sent_tokens=sent_tokens,
        )
        self.engine.generate(key, request)
        return key

    async def run(
        self, prompt: list[int], max_tokens: int = 8, sampling: Sampling | None = None, sent_tokens: int = 0
    ) -> Stream:
        stream = self.streams[self.send(prompt, max_tokens, sampling, sent_tokens=sent_tokens)]
        await stream.ended()
        return stream

    async def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            await self.engine.stop()


@asynccontextmanager
async def driven(engine: Engine, name: str = "", standby: bool = False) -> AsyncIterator[Driver]:
    """A started engine; it is epoch 1 of instance ``name``."""
    driver = Driver(engine)
    start = EngineStart(driver.sink, name, 1, standby, lambda *ending: driver.ending(*ending))
    driver.info = await engine.start(start)
    try:
        yield driver
    finally:
        await driver.stop()


def fast_profile(scale: float = 1.0) -> Profile:
    """An invented device: a millisecond or two for an iteration."""
    k = scale * 1e-3
    return Profile(
        name="fast",
        model="invented",
        device_kind="test",
        source="invented",
        assumptions="none",
        coefficients=Coefficients(k, k / 1e3, k / 1e7, k / 1e3, k / 1e6, 0.0),
        mape={"prefill": 0.0, "decode": 0.0, "mixed": 0.0},
        domain=Domain(256, 8, 2048),
        kv_bytes_per_token=1,
        weight_bytes=1,
        kv_capacity_tokens=2048,
        context_length=CONTEXT,
        max_batch=8,
        max_batch_tokens=256,
    )


def emulated(step: str, **options: object) -> EmulatedEngine:
    fields: dict[str, object] = {"model": "m", "profile": fast_profile(), "step": STEPS[step]}
    return EmulatedEngine(EmulatedConfig(**(fields | options)))  # type: ignore[arg-type]
