"""Real vLLM servers for the tests here, each started once in a run: stock, and with our scheduler inside."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hyperflexis.engines.vllm.server import GUARDED, Recipe, SideChannel

FLAVOURS = ["stock", "scheduler"]
START_LIMIT_S = 900.0
"""A busy machine of two cores takes minutes."""
ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
IN_PROCESS = ("--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor")
"""The engine computes in its own process, as it does on a single GPU. On a CPU vLLM would start a worker beside it, and
the two wait for each other by spinning: two servers then keep four cores busy. What vLLM has against it is that the
worker's process is given its threads; ENV says how many."""
EXACT = ("--dtype", "float32", "--enforce-eager", *IN_PROCESS)
SMALL = (*EXACT, "--max-model-len", "512", "--block-size", "32", "--num-gpu-blocks-override", "64")
"""The sizes that the engines' contract is tested with: 512 tokens of context, 2048 of KV cache."""


def recipe(model: Path, flavour: str, arguments: tuple[str, ...] = SMALL) -> Recipe:
    return Recipe(
        "m", model, scheduler=flavour == "scheduler", max_batch=8, max_batch_tokens=512, arguments=arguments, env=ENV
    )


class Server:
    """One server; ``log`` has what it wrote."""

    def __init__(self, recipe: Recipe, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._side = SideChannel()
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", GUARDED, "sh", *recipe.command(port)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**recipe.environment, **self._side.env(), **recipe.env},
                start_new_session=True,
            )

    def wait_ready(self) -> Server:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"vLLM did not start:\n{self._log.read_text()[-4000:]}"
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise AssertionError(f"no answer after {START_LIMIT_S:g} s:\n{self._log.read_text()[-4000:]}")

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # the guard kills the group
        self._process.wait()
        self._side.close()


class Servers:
    """One server a flavour, started when it is first asked for; they run side by side."""

    def __init__(self, model: Path, logs: Path) -> None:
        self.model = model
        self._logs = logs
        self._servers: dict[str, Server] = {}

    def url(self, flavour: str) -> str:
        if not self._servers:
            for one in FLAVOURS:
                self._servers[one] = Server(recipe(self.model, one), self._logs / f"{one}.log")
        return self._servers[flavour].wait_ready().url

    def stop(self) -> None:
        for server in self._servers.values():
            server.stop()


@contextmanager
def serving(entry: dict[str, object], folder: Path) -> Iterator[str]:
    """A fleet of one model, from its start to its end; the URL of its gateway."""
    file = folder / "fleet.yaml"
    file.write_text(json.dumps({"model": entry, "listen": "127.0.0.1:0", "state_dir": str(folder / "state")}))
    log = folder / "serve.log"
    with log.open("wb") as output:
        serve = subprocess.Popen(
            [sys.executable, "-m", "hyperflexis", "serve", str(file)], stdout=output, stderr=output
        )
    try:
        yield _ready(log, serve)
    finally:
        serve.send_signal(signal.SIGTERM)  # killed, it would leave the fleet to the next serve
        serve.wait(60)


def _ready(log: Path, serve: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        assert serve.poll() is None, log.read_text()
        found = re.search(r"ready after .* at (http://\S+);", log.read_text())
        if found is not None:
            return found[1]
        time.sleep(0.5)
    raise AssertionError(log.read_text())


def metric(url: str, name: str) -> float:
    """The sum of all series whose names begin so."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    found = [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name)]
    assert found, f"{name} is not among the metrics of {url}"
    return sum(found)
