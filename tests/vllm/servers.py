"""Real vLLM servers for the tests here, each started once in a run: stock, and with our scheduler inside."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from hyperflexis.engines.vllm.server import GUARDED, Recipe

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
EXACT = ("--dtype", "float32", "--enforce-eager")
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
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", GUARDED, "sh", *recipe.command(port)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **recipe.env},
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
