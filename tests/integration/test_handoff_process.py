"""A handoff between two processes: through shared memory, and when one of them is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.contract.support import LIMIT_S
from tests.unit.engines.test_host import Peer, gateway_at

from hyperflexis import wire
from hyperflexis.core.links import KvSource
from hyperflexis.make_model import Recipe, make_model

pytest.importorskip("torch", reason="the torch engine needs PyTorch")

PROMPT = [40 + (7 * i) % 900 for i in range(300)]
MAX_TOKENS = 400

PROGRAM = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path
    from hyperflexis.engines.host import InstanceIdentity, run_instance
    from hyperflexis.engines.torch.engine import TorchConfig, TorchEngine
    from hyperflexis.policy.catalog import STEPS

    name, model, folder = sys.argv[1:]
    config = TorchConfig(
        "m", Path(model), STEPS["hyperflexis"], kv_tokens=2048, max_batch_tokens=64,
        kv_listen=f"unix:{folder}/{name}-kv", kv_token="fleet",
    )
    asyncio.run(
        run_instance(
            TorchEngine(config), InstanceIdentity(name, 1), f"unix:{folder}/{name}", None,
            on_ready=lambda info: print("ready", flush=True),
        )
    )
    """
)


class Instance:
    """An instance in a process of its own, and the gateway that speaks with it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, gateway: Peer) -> None:
        self.name = name
        self.process = process
        self.gateway = gateway

    def send(self, stream: int, prompt: list[int], max_tokens: int, kv: KvSource | None = None) -> None:
        sampling = wire.Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        order = wire.Generate(stream, f"r{stream}", 1, wire.pack_ids(prompt), sampling, kv=kv)
        self.gateway.links[0].send(order)

    async def ended(self, stream: int) -> wire.Finish:
        finish = await self.gateway.until(lambda: self.gateway.finish(stream))
        assert finish is not None
        return finish

    async def has(self, stream: int, tokens: int) -> list[int]:
        await self.gateway.until(lambda: len(self.gateway.tokens(stream)) >= tokens)
        return self.gateway.tokens(stream)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "1m"
    make_model(directory, Recipe("1m", context=1024))
    return directory


@pytest.fixture
async def pair(model: Path, tmp_path: Path) -> AsyncIterator[tuple[Instance, Instance]]:
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, name, str(model), str(tmp_path), stdout=asyncio.subprocess.PIPE
        )
        for name in ("source", "target")
    ]
    try:
        instances = []
        for name, process in zip(("source", "target"), processes, strict=True):
            assert process.stdout is not None
            async with asyncio.timeout(LIMIT_S):
                assert await process.stdout.readline() == b"ready\n"
            instances.append(Instance(name, process, await gateway_at(f"unix:{tmp_path}/{name}")))
        yield instances[0], instances[1]
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
            await process.wait()


def source_of(folder: Path) -> KvSource:
    return KvSource(f"unix:{folder}/source-kv", "source", 1)


async def test_a_running_request_moves_to_another_process(pair: tuple[Instance, Instance], tmp_path: Path) -> None:
    source, target = pair
    target.send(1, PROMPT, MAX_TOKENS)
    assert (await target.ended(1)).reason == "length"
    whole = target.gateway.tokens(1)
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    other = [*PROMPT[1:], 7]  # of which the target has nothing in its cache
    target.send(2, other, MAX_TOKENS)
    assert (await target.ended(2)).reason == "length"
    source.send(3, PROMPT, MAX_TOKENS)
    known = (await source.has(3, 20))[:20]
    target.send(3, PROMPT + known, MAX_TOKENS - len(known), source_of(tmp_path))
    assert (await target.ended(3)).reason == "length"
    assert (await source.ended(3)).reason == "handed"
    assert known + target.gateway.tokens(3) == whole
    assert len(source.gateway.tokens(3)) < MAX_TOKENS
    if before:
        assert set(os.listdir("/dev/shm")) <= before


async def test_a_target_that_is_killed_leaves_the_request_with_its_source(
    pair: tuple[Instance, Instance], tmp_path: Path
) -> None:
    source, target = pair
    source.send(1, PROMPT, MAX_TOKENS)
    assert (await source.ended(1)).reason == "length"
    whole = source.gateway.tokens(1)
    source.send(2, PROMPT, MAX_TOKENS)
    await source.has(2, 5)
    # Stopped, it takes nothing, and the source must not wait for it.
    os.kill(target.process.pid, signal.SIGSTOP)
    target.send(2, PROMPT, MAX_TOKENS, source_of(tmp_path))
    await source.has(2, 50)
    target.process.kill()
    end = await source.ended(2)
    assert end.reason == "length" and source.gateway.tokens(2) == whole


async def test_a_source_that_is_killed_is_a_refusal_at_the_target(
    pair: tuple[Instance, Instance], tmp_path: Path
) -> None:
    source, target = pair
    source.send(1, PROMPT, MAX_TOKENS)
    await source.has(1, 5)
    os.kill(source.process.pid, signal.SIGSTOP)  # it is reached, and says nothing
    target.send(1, PROMPT, MAX_TOKENS, source_of(tmp_path))
    target.send(2, PROMPT, 5)
    assert (await target.ended(2)).reason == "length"  # by now the other is waiting for its KV
    source.process.kill()
    end = await target.ended(1)
    assert end.reason == "refused" and "did not come" in end.message
    target.send(3, PROMPT, 5)
    assert (await target.ended(3)).reason == "length"
