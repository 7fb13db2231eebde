"""Servers with weights from others: the same log-probabilities as from disk, whatever goes wrong on the way."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.vllm.servers import ENV, SMALL, START_LIMIT_S, Server, Servers, recipe

from hyperflexis.engines.vllm.sleep import Sleeper
from hyperflexis.engines.vllm.weights import EPOCH, NAME, Model, configuration
from hyperflexis.errors import HyperFlexisError
from hyperflexis.make_model import Recipe, make_model
from hyperflexis.transfer.auth import TOKEN_VARIABLE
from hyperflexis.transfer.weights import WeightServer

TOKEN = "the fleet's word"
PROMPTS = [[7 + (number + 3) * place % 900 for place in range(20 + 60 * number)] for number in range(5)]


class Log:
    """What a server writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def text(self) -> str:
        return self.path.read_text(errors="replace")

    def wait_for(self, words: str) -> str:
        deadline = time.monotonic() + START_LIMIT_S
        while words not in self.text:
            assert time.monotonic() < deadline, self.text[-4000:]
            time.sleep(0.05)
        return next(line for line in self.text.splitlines() if words in line)


class Loading:
    """Servers of this file's tests, by name."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self._stack = ExitStack()

    def start(self, name: str, standby: bool = False, **extra: object) -> tuple[Server, Log]:
        arguments = (*SMALL, "--load-format", "hyperflexis", "--model-loader-extra-config", json.dumps(extra))
        log = self.folder / f"{name}.log"
        env = {**ENV, TOKEN_VARIABLE: TOKEN} | ({"VLLM_SERVER_DEV_MODE": "1"} if standby else {})
        one = replace(recipe(self.model, "stock", arguments), env=env)
        server = Server(one, log)
        self._stack.callback(server.stop)
        return server, Log(log)

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def loading(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loading]:
    with closing(Loading(model, tmp_path_factory.mktemp("loading"))) as one:
        yield one


def answers(url: str) -> list[Any]:
    """Tokens with the log-probabilities of prompts and answers, to the last bit."""
    found = []
    for prompt in PROMPTS:
        body = {"model": "m", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 5}
        body |= {"prompt_logprobs": 3, "return_token_ids": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            (choice,) = json.loads(answer.read())["choices"]
        assert len(set(choice["token_ids"])) > 3, "one token repeated would prove nothing"
        found.append((choice["token_ids"], choice["logprobs"], choice["prompt_logprobs"]))
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def source(stack: ExitStack, directory: Path, token: str = TOKEN, damaged: bool = False) -> str:
    """A source in this process that gives a directory's checkpoint; returns its address."""
    config = json.loads((directory / "config.json").read_text())
    shard = Model(configuration(config), tuple(directory.glob("*.safetensors"))).read(shared=True)
    if damaged:
        shard.arena.view[shard.layout.blocks[1].start + 5] ^= 1  # what it says of itself is still right
    server = WeightServer("127.0.0.1:0", shard, NAME, EPOCH, token)
    stack.callback(server.close)
    return server.address


def test_weights_from_others_are_those_on_disk_and_what_is_not_is_left(
    model: Path, servers: Servers, loading: Loading, tmp_path: Path
) -> None:
    other, wider = tmp_path / "other", tmp_path / "wider"
    make_model(other, Recipe("1m", context=2048, seed=99))
    make_model(wider, Recipe("1m", context=1024))
    tcp, local = f"127.0.0.1:{free_port()}", f"unix:{tmp_path}/w"
    disk = answers(servers.url("stock"))
    with ExitStack() as stack:
        bad = {
            f"127.0.0.1:{free_port()}": "refused",
            source(stack, model, token="another"): TOKEN_VARIABLE,
            source(stack, wider): "model's configuration",
            source(stack, other): "has other values than in",
            source(stack, model, damaged=True): "was damaged on its way",
        }
        first, log = loading.start("first", sources=list(bad), listen=tcp)
        first.wait_ready()
    for address, words in bad.items():
        assert words in log.wait_for(f"no weights from {address} over tcp")
    assert "they are read from disk" in log.text and "weights from 127" not in log.text.replace("no weights from", "")
    assert answers(first.url) == disk
    log.wait_for(f"weights are given at {tcp}")

    second, log = loading.start("second", sources=[tcp], listen=local)
    second.wait_ready()
    log.wait_for(f"weights from {tcp} over tcp")
    assert "read from disk" not in log.text
    assert answers(second.url) == disk

    # A chain: the first has ended, and who comes third gets what it gave.
    first.stop()
    third, log = loading.start("third", standby=True, sources=[tcp, local])
    third.wait_ready()
    assert "refused" in log.wait_for(f"no weights from {tcp} over tcp")
    log.wait_for(f"weights from {local} over shared memory")
    assert answers(third.url) == disk
    asyncio.run(sleep_and_wake(third.url, local))
    assert log.text.count(f"weights from {local} over shared memory") == 2
    assert answers(third.url) == disk


async def sleep_and_wake(url: str, source: str) -> None:
    """vLLM's endpoints take what the adapter sends. On a CPU none of it frees memory, which is found out."""
    async with aiohttp.ClientSession() as session:
        sleeper = Sleeper(url, session)
        with pytest.raises(HyperFlexisError, match="its sleep mode is off"):
            await sleeper.check()
        with pytest.raises(HyperFlexisError, match="the server is awake"):
            await sleeper.wake([source])
        await sleeper.sleep()
        await sleeper.wake([source])


def test_a_setting_that_is_none_is_named(model: Path) -> None:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    from hyperflexis.engines.vllm.loader import register

    register()
    with pytest.raises(ValueError, match=r"unknown field `source`; write \{\"sources\": "):
        get_model_loader(LoadConfig(load_format="hyperflexis", model_loader_extra_config={"source": ["127.0.0.1:1"]}))
