"""A fleet that starts its own vLLM servers, as a user does, and what its clients see when one of them is killed."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from tests.vllm.clients import Clients
from tests.vllm.servers import ENV, SMALL, START_LIMIT_S, metric, serving

STREAMS = 24
TOKENS = 300


@dataclass
class Fleet:
    """A running ``serve`` with two instances."""

    url: str
    file: Path
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

    def one_that_answers(self) -> int:
        """A server in the middle of answers, as it says itself: slow clients hear of them later."""
        before = {pid: metric(_url(pid), "vllm:generation_tokens_total") for pid in self.servers()}
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for pid, tokens in before.items():
                url = _url(pid)
                running = metric(url, "vllm:num_requests_running")
                if running >= 4 and metric(url, "vllm:generation_tokens_total") >= tokens + 10 * running:
                    return pid
        raise AssertionError("no server answered")

    def kill_one_that_answers(self) -> None:
        """And its streams with it."""
        os.killpg(self.one_that_answers(), signal.SIGKILL)

    def drain_one_that_answers(self) -> int:
        """The status of draining it, whose streams are to go on elsewhere at once. It stands still meanwhile: the
        command takes longer to start than such a small model to answer."""
        pid = self.one_that_answers()
        os.killpg(pid, signal.SIGSTOP)
        try:
            return self.run("drain", _instance(pid), "--limit", "0")
        finally:
            os.killpg(pid, signal.SIGCONT)

    def run(self, *words: str) -> int:
        """A command of this fleet."""
        command = [sys.executable, "-m", "hyperflexis", *words, "--fleet", str(self.file)]
        return subprocess.run(command, timeout=120, check=False).returncode

    def wait_whole(self) -> None:
        """Until both instances are ready."""
        deadline = time.monotonic() + START_LIMIT_S
        while metric(self.url, "hyperflexis_instances_ready") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def wait_idle(self) -> None:
        """Until no instance reports a request; reports come after the answers."""
        deadline = time.monotonic() + 60
        while metric(self.url, "hyperflexis_requests_running") > 0:
            assert time.monotonic() < deadline, "a request was left behind"
            time.sleep(0.1)


def _instance(pid: int) -> str:
    """Whose server it is: its parent's ``--id``."""
    parent = re.search(r"^PPid:\s+(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert parent is not None
    words = Path(f"/proc/{parent[1]}/cmdline").read_text().split("\0")
    return words[words.index("--id") + 1]


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
    others = frozenset(Fleet("", Path(), model, frozenset()).servers())
    folder = tmp_path_factory.mktemp("fleet")
    with serving(entry, folder) as url:
        one = Fleet(url, folder / "fleet.yaml", model, others)
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


async def test_no_stream_fails_and_none_differs_when_a_server_is_killed_or_drained(fleet: Fleet) -> None:
    client = openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="any", max_retries=0)
    clients = Clients(client, [[40 + number, *range(100, 140)] for number in range(STREAMS)], TOKENS)
    undisturbed = await clients.answers()
    kill = asyncio.create_task(asyncio.to_thread(fleet.kill_one_that_answers))
    assert await clients.answers() == undisturbed
    await kill
    assert [finish for _, finish in undisturbed] == ["length"] * STREAMS
    went_on = metric(fleet.url, "hyperflexis_redispatched_total")
    assert went_on > 0

    await asyncio.to_thread(fleet.wait_whole)  # the one that was killed is started again
    drain = asyncio.create_task(asyncio.to_thread(fleet.drain_one_that_answers))
    assert await clients.answers() == undisturbed
    assert await drain == 0
    assert metric(fleet.url, "hyperflexis_redispatched_total") > went_on
    await asyncio.to_thread(fleet.wait_idle)
    await client.close()
