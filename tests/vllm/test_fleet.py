"""A fleet that starts its own vLLM servers, as a user does, and what its clients see when one of them is killed."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from tests.vllm.clients import Clients
from tests.vllm.servers import ENV, SMALL, metric, serving

STREAMS = 24
TOKENS = 300


@dataclass
class Fleet:
    """A running ``serve`` with two instances."""

    url: str
    model: Path
    others: frozenset[int]

    def servers(self) -> list[int]:
        """Pids of its API servers, each the leader of its group; without ``others`` of the same model."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                pid = int(folder.name)
                ours = b"vllm.entrypoints.openai.api_server" in words and str(self.model).encode() in words
                if ours and os.getpgid(pid) == pid and pid not in self.others:
                    found.append(pid)
            except (OSError, ProcessLookupError):
                continue
        return sorted(found)

    def kill_one_that_answers(self) -> None:
        """Kill a server in the middle of answers, as it says itself: slow clients hear of them later."""
        before = {pid: metric(_url(pid), "vllm:generation_tokens_total") for pid in self.servers()}
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for pid, tokens in before.items():
                url = _url(pid)
                running = metric(url, "vllm:num_requests_running")
                if running >= 4 and metric(url, "vllm:generation_tokens_total") >= tokens + 10 * running:
                    os.killpg(pid, signal.SIGKILL)
                    return
        raise AssertionError("no server answered")


def _url(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return f"http://127.0.0.1:{words[words.index('--port') + 1]}"


@pytest.fixture(scope="module")
def fleet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    entry = {
        "name": "m",
        "engine": "vllm",
        "path": str(model),
        "args": {"arguments": shlex.join(SMALL), "max_batch": 16, "max_batch_tokens": 512},
        "env": ENV,
        "instances": {"min": 2},
    }
    others = frozenset(Fleet("", model, frozenset()).servers())
    with serving(entry, tmp_path_factory.mktemp("fleet")) as url:
        one = Fleet(url, model, others)
        assert len(one.servers()) == 2
        yield one
        pids = one.servers()
    assert not [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists()], "servers outlived the fleet"
    assert not one.servers()


def test_the_official_client_chats_and_completes(fleet: Fleet) -> None:
    client = openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="any")
    assert [one.id for one in client.models.list().data] == ["m"]
    chat = client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "hello there"}],
        max_tokens=12,
        temperature=0,
        extra_headers={"x-slo-ttft-ms": "5000", "x-slo-tpot-ms": "500"},
        extra_body={"ignore_eos": True},
    )
    assert chat.choices[0].finish_reason == "length" and chat.choices[0].message.content
    assert chat.usage is not None and chat.usage.completion_tokens == 12
    pieces = list(
        client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "hello there"}],
            max_tokens=12,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == chat.choices[0].message.content
    whole = client.completions.create(
        model="m", prompt=[5, 6, 7], max_tokens=6, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
    )
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and len(logprobs.token_logprobs) == 6
    assert all(one is not None and one <= 0.0 for one in logprobs.token_logprobs)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="m", prompt=[5] * 600, max_tokens=6)


async def test_no_stream_fails_and_none_differs_when_a_server_is_killed(fleet: Fleet) -> None:
    client = openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="any", max_retries=0)
    clients = Clients(client, [[40 + number, *range(100, 140)] for number in range(STREAMS)], TOKENS)
    undisturbed = await clients.answers()
    kill = asyncio.create_task(asyncio.to_thread(fleet.kill_one_that_answers))
    streams = clients.start()
    await kill
    disturbed = await asyncio.gather(*streams)
    assert [finish for _, finish in disturbed] == ["length"] * STREAMS
    assert disturbed == undisturbed
    assert metric(fleet.url, "hyperflexis_redispatched_total") > 0
    await client.close()
