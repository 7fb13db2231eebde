"""The bench against a small real server: what it counts, and what it says when something is wrong."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from hyperflexis import bench
from hyperflexis.bench import Progress, run_bench
from hyperflexis.bench_client import find_target
from hyperflexis.core.slo import Slo
from hyperflexis.errors import HyperFlexisError
from hyperflexis.sim.workload import Arrival

FAST = Slo(ttft_s=5.0, tpot_s=5.0)


@dataclass
class Server:
    """A completions server whose behaviour a test chooses; it keeps what it was asked."""

    url: str = ""
    takes_token_ids: bool = True
    classes: tuple[str, ...] = ("chat",)
    key: str = ""
    status: int = 200
    short_by: int = 0
    breaks_after: int | None = None
    hold: asyncio.Event | None = None
    hold_probes: asyncio.Event | None = None
    usage: bool = True
    asked: list[dict[str, object]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    was_asked: asyncio.Event = field(default_factory=asyncio.Event)

    async def models(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        return web.json_response({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not self.takes_token_ids and isinstance(body["prompt"], list):
            return web.json_response({"error": {"message": "prompt must be a text"}}, status=400)
        if request.headers.get("x-slo-class", "chat") not in self.classes:
            return web.json_response({"error": {"message": "unknown class"}}, status=400)
        is_probe = "x-slo-ttft-ms" not in request.headers
        if is_probe and self.hold_probes is not None:
            await self.hold_probes.wait()
        if not is_probe:
            self.asked.append(body)
            self.was_asked.set()
            self.headers.append({k.lower(): v for k, v in request.headers.items()})
            if self.status != 200:
                return web.json_response({"error": {"message": "too busy"}}, status=self.status)
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "x-hfx-instance": "i-0"})
        await response.prepare(request)
        tokens = body["max_tokens"] - (0 if is_probe else self.short_by)
        for sent in range(tokens):
            if not is_probe and sent == self.breaks_after:
                await response.write(b'data: {"error":{"message":"the engine died","code":"engine_lost"}}\n\n')
                return response
            await response.write(b'data: {"choices":[{"index":0,"text":" a"}]}\n\n')
            if sent == 0 and not is_probe and self.hold is not None:
                await self.hold.wait()
        if self.usage:
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens}
            await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    found = Server()
    app = web.Application()
    app.router.add_get("/v1/models", found.models)
    app.router.add_post("/v1/completions", found.completions)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield found
    if found.hold is not None:
        found.hold.set()
    await runner.cleanup()


def arrivals(count: int, slo: Slo = FAST, tokens: int = 3) -> list[Arrival]:
    return [Arrival(0.01 * i, "chat", slo, 1.0, 50 + i, tokens) for i in range(count)]


def nothing(_: Progress) -> None:
    """No progress shown."""


async def run(server: Server, wanted: list[Arrival], classes: tuple[str, ...] = ("chat",)) -> bench.BenchResult:
    target = await find_target(server.url, None, {}, classes)
    return await run_bench(wanted, 0.1, target, 1, nothing)


async def test_sends_the_wanted_lengths_and_promises_and_counts_what_comes(server: Server) -> None:
    result = await run(server, arrivals(5))
    assert [len(body["prompt"]) for body in server.asked] == [50, 51, 52, 53, 54]  # type: ignore[arg-type]
    assert all(body["max_tokens"] == 3 and body["ignore_eos"] is True for body in server.asked)
    assert all(h["x-slo-ttft-ms"] == "5000.000" and h["x-slo-class"] == "chat" for h in server.headers)
    for record in result.run.records:
        assert record.outcome == "finished" and record.received_tokens == 3 and record.instance == "i-0"
        assert record.ttft_s is not None and record.e2e_s is not None
        assert 0.0 < record.ttft_s <= record.e2e_s
    assert all(record.is_attained for record in result.run.records)


async def test_prompts_depend_on_the_seed_and_share_named_blocks(server: Server) -> None:
    target = await find_target(server.url, "tiny", {}, [])
    one = Arrival(0.0, "", FAST, 1.0, 1100, 1, hash_ids=(7, 8, 9))
    two = Arrival(0.0, "", FAST, 1.0, 1100, 1, hash_ids=(7, 8, 10))
    plain = Arrival(0.0, "", FAST, 1.0, 1100, 1)
    for seed in (1, 1, 2):
        await run_bench([one, two, plain], 0.1, target, seed, nothing)
    prompts = [body["prompt"] for body in server.asked]
    assert prompts[0][:1024] == prompts[1][:1024] and prompts[0][1024:] != prompts[1][1024:]  # type: ignore[index]
    assert prompts[2] == prompts[5] and prompts[2] != prompts[8]
    assert all(len(prompt) == 1100 for prompt in prompts)  # type: ignore[arg-type]


async def test_falls_back_to_words_and_drops_unknown_classes(server: Server) -> None:
    server.takes_token_ids = False
    server.classes = ("other", "chat")
    result = await run(server, arrivals(1), classes=("chat", "mystery"))
    assert len(str(server.asked[0]["prompt"]).split()) == 50
    assert server.headers[0]["x-slo-class"] == "chat"
    mystery = Arrival(0.0, "mystery", FAST, 1.0, 5, 1)
    await run(server, [mystery], classes=("chat", "mystery"))
    assert "x-slo-class" not in server.headers[1]
    assert result.run.records[0].outcome == "finished"


async def test_counts_tokens_without_usage(server: Server) -> None:
    server.usage = False
    result = await run(server, arrivals(1, tokens=4))
    assert result.run.records[0].received_tokens == 4


async def test_refusals_errors_and_short_answers_are_misses(server: Server) -> None:
    server.status = 429
    rejected = (await run(server, arrivals(1))).run.records[0]
    server.status = 500
    failed = (await run(server, arrivals(1))).run.records[0]
    server.status, server.breaks_after = 200, 2
    broken = (await run(server, arrivals(1))).run.records[0]
    server.breaks_after, server.short_by = None, 1
    short = (await run(server, arrivals(1))).run.records[0]
    assert [r.outcome for r in (rejected, failed, broken, short)] == ["rejected", "failed", "failed", "failed"]
    assert not any(r.is_attained for r in (rejected, failed, broken, short))
    assert rejected.detail == "429 too busy"
    assert broken.detail == "the engine died" and broken.ttft_s is not None
    assert short.detail == "2 of 3 tokens came"


async def test_what_never_ends_is_unfinished_after_ten_times_the_duration(server: Server) -> None:
    target = await find_target(server.url, None, {}, [])
    server.hold = asyncio.Event()
    result = await run_bench(arrivals(2), 0.02, target, 1, nothing)
    assert [record.outcome for record in result.run.records] == ["unfinished", "unfinished"]
    assert 0.2 <= result.run.ended_s < 5.0


async def test_stopping_cancels_what_is_open_and_sends_no_more(server: Server) -> None:
    target = await find_target(server.url, None, {}, [])
    server.hold, stop = asyncio.Event(), asyncio.Event()
    late = Arrival(60.0, "chat", FAST, 1.0, 5, 1)
    seen: list[Progress] = []

    def stop_when_sent(progress: Progress) -> None:
        seen.append(progress)
        if progress.sent == 2:
            stop.set()

    result = await run_bench([*arrivals(2), late], 60.0, target, 1, stop_when_sent, stop)
    assert [record.outcome for record in result.run.records] == ["cancelled", "cancelled"]
    assert result.stopped and result.run.duration_s < 60.0
    assert seen[-1].total == 3 and "open 2" in seen[-1].line()


@pytest.mark.parametrize(
    ("url", "model", "says"),
    [
        ("http://127.0.0.1:9", None, "is it running"),
        ("127.0.0.1:8080", None, "http://"),
        (None, "other", "it serves tiny"),
    ],
)
async def test_a_wrong_target_is_one_clear_error(server: Server, url: str | None, model: str | None, says: str) -> None:
    with pytest.raises(HyperFlexisError, match=says):
        await find_target(url or server.url, model, {}, [])


async def test_a_refused_connection_is_told_in_the_systems_words() -> None:
    with pytest.raises(HyperFlexisError, match=r"Connection refused") as raised:
        await find_target("http://127.0.0.1:9", None, {}, [])
    assert "ssl" not in str(raised.value) and "\n" not in str(raised.value)


async def test_a_server_that_never_answers_is_a_clear_error() -> None:
    left = asyncio.Event()

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await left.wait()
        writer.close()

    listening = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        with pytest.raises(HyperFlexisError) as raised:
            await find_target(url, None, {}, [], models_limit_s=0.2)
    finally:
        left.set()
        listening.close()
    assert str(raised.value) == f"{url} accepted the connection but did not answer within 0.2 s (/v1/models)"


async def test_a_probe_that_never_ends_is_a_clear_error(server: Server) -> None:
    server.hold_probes = asyncio.Event()
    try:
        with pytest.raises(HyperFlexisError, match=r"did not answer within 0\.2 s \(a completion of one token\)"):
            await find_target(server.url, None, {}, [], probe_limit_s=0.2)
    finally:
        server.hold_probes.set()


async def test_a_missing_key_is_a_clear_error(server: Server) -> None:
    server.key = "secret"
    with pytest.raises(HyperFlexisError, match="--api-key"):
        await find_target(server.url, None, {}, [])
    assert (await find_target(server.url, None, {"": "secret"}, [])).model == "tiny"


SCRIPT = """
import argparse, sys
from hyperflexis import bench
from hyperflexis.errors import HyperFlexisError
parser = argparse.ArgumentParser()
bench.add_arguments(parser)
try:
    sys.exit(bench.main(parser.parse_args()))
except HyperFlexisError as error:
    sys.exit(str(error))
"""


async def bench_process(*arguments: str) -> asyncio.subprocess.Process:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SCRIPT,
        *arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
    )


WORKLOAD = """
duration_s: 0.5
arrivals: {rate_rps: 40}
classes:
  - {name: chat, share: 1, ttft_ms: 5000, tpot_ms: 5000, lengths: {prompt: 20, output: 4}}
"""


async def test_the_command_prints_a_table_and_writes_json(server: Server, tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(WORKLOAD)
    process = await bench_process(
        str(tmp_path / "w.yaml"), "--url", server.url, "--label", "x", "--seed", "3", "--json", "-"
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    document = json.loads(out)
    policy = document["policies"]["x"]
    assert document["workload"] == "w.yaml" and document["seeds"] == [3]
    assert policy["attainment"] == 1.0 and policy["attainment_by_class"] == {"chat": 1.0}
    assert policy["requests"] == len(server.asked) > 5
    assert policy["rejected"] == policy["unfinished"] == 0
    assert policy["client_p50_ttft_ms"] == policy["p50_ttft_ms"] > 0
    assert "chat" in err.decode()
    assert err.decode().startswith(f"asking {server.url} ...")
    assert "does not know" not in err.decode()


async def test_the_command_names_the_classes_that_the_server_does_not_know(server: Server, tmp_path: Path) -> None:
    extra = "".join(
        f"  - {{name: {name}, share: 1, ttft_ms: 5000, lengths: {{prompt: 20, output: 4}}}}\n"
        for name in ("fable", "riddle")
    )
    (tmp_path / "w.yaml").write_text(WORKLOAD + extra)
    process = await bench_process(str(tmp_path / "w.yaml"), "--url", server.url)
    _, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    line = "The server does not know class fable, riddle: their SLOs are sent per request, their priorities are not."
    assert line in err.decode().splitlines()


async def test_ctrl_c_still_reports(server: Server, tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(WORKLOAD.replace("0.5", "300"))
    process = await bench_process(str(tmp_path / "w.yaml"), "--url", server.url, "--json", str(tmp_path / "o.json"))
    await server.was_asked.wait()
    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    assert process.returncode == 130, err.decode()
    assert "chat" in out.decode()
    assert json.loads((tmp_path / "o.json").read_bytes())["stopped"] is True


def test_arguments_have_defaults() -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args(["w.yaml"])
    assert args.url == "http://127.0.0.1:8080" and args.rate_scale == 1.0 and args.api_key == []
