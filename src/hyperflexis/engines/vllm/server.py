"""Starts a vLLM server for an instance and ends it with all that it started, however this process ends.

vLLM is several processes, and its engine core outlives the API server by minutes when that is killed. So the server is
the leader of a process group of its own with a guard in it: a shell that reads a pipe from here. When the pipe closes,
by ``stop`` or because this process is gone, the guard kills the group.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import HyperFlexisError
from .terms import PROFILE_VARIABLE

GUARDED = 'exec 3<&0; { read -r _ <&3; kill -KILL 0; } & exec "$@" 3<&- </dev/null'
"""The guard beside the command, which keeps the pid of the group."""
SCHEDULER = "hyperflexis.engines.vllm.SloScheduler"
RESUMED = "hyperflexis.engines.vllm.worker.Resumed"
STOP_LIMIT_S = 5.0
"""How long a server may take to end after SIGTERM."""
GIVES_KV = {
    "kv_connector": "NixlConnector",
    "kv_role": "kv_both",
    # Where KV does not come the prompt is computed once more, so that the stream goes on.
    "kv_load_failure_policy": "recompute",
}
"""For ``--kv-transfer-config``. The buffer is where the platform computes: on a CPU, there."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to start a server of ``directory``, which it serves as ``name``. ``python``: the interpreter that has vLLM.
    ``scheduler``: ours inside it, which begins with the iteration model of ``profile``. ``standby``: it can sleep.
    ``gives_kv``: to others of its kind, and takes theirs. ``arguments`` follow ours and win over them; ``env`` goes on
    top of this process's environment."""

    name: str
    directory: Path
    python: str = sys.executable
    scheduler: bool = False
    profile: str | None = None
    standby: bool = False
    gives_kv: bool = False
    max_batch: int | None = None
    max_batch_tokens: int | None = None
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def command(self, port: int) -> list[str]:
        """The command line of a server at ``port``. The module is what ``vllm serve`` runs, and is also there in
        builds that lack the command."""
        words = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.directory)]
        words += ["--served-model-name", self.name, "--host", "127.0.0.1", "--port", str(port)]
        # Without the first, prefix hits are not told; the second keeps our order where the scheduler is vLLM's own.
        words += ["--enable-prompt-tokens-details", "--scheduling-policy", "priority"]
        if self.scheduler:
            words[-1:] = ["fcfs", "--scheduler-cls", SCHEDULER, "--worker-extension-cls", RESUMED]
        if self.gives_kv:
            words += ["--kv-transfer-config", json.dumps(GIVES_KV)]
        if self.max_batch is not None:
            words += ["--max-num-seqs", str(self.max_batch)]
        if self.max_batch_tokens is not None:
            words += ["--max-num-batched-tokens", str(self.max_batch_tokens)]
        if self.standby:
            words.append("--enable-sleep-mode")
        return [*words, *self.arguments]

    @property
    def environment(self) -> dict[str, str]:
        """Of the server. Sleeping is among vLLM's endpoints for developers; it listens at this host alone."""
        ours = {"VLLM_SERVER_DEV_MODE": "1"} if self.standby else {}
        if self.profile is not None:
            ours[PROFILE_VARIABLE] = self.profile
        return {**os.environ, **ours, **self.env}


class VllmServer:
    """A server that was started; its output goes where this process's goes."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, side: SideChannel) -> None:
        self._process = process
        self._side = side
        self.url = url

    @property
    def pid(self) -> int:
        """Of the API server, and of its process group."""
        return self._process.pid

    async def ended(self) -> str:
        """Wait for its end and say how it ended. What it left of its group is killed."""
        code = await self._process.wait()
        self._kill()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    async def stop(self) -> None:
        """SIGTERM, and after STOP_LIMIT_S SIGKILL to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_LIMIT_S)
        except TimeoutError:
            pass
        finally:
            self._kill()
            self._side.close()
        await self._process.wait()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


class SideChannel:
    """A port at which a server tells others how to reach its KV. The server listens there half a minute after it was
    started, so the port is kept from others until then: by a socket that is bound and does not listen."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ZeroMQ sets it too
        self._socket.bind(("127.0.0.1", 0))

    def env(self) -> dict[str, str]:
        """What tells the server."""
        host, port = self._socket.getsockname()
        return {"VLLM_NIXL_SIDE_CHANNEL_HOST": host, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)}

    def close(self) -> None:
        """Let others have it."""
        self._socket.close()


async def start_server(recipe: Recipe) -> VllmServer:
    """Start a server at a free port; it does not answer yet. Raises HyperFlexisError when there is no interpreter."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    side = SideChannel()
    try:
        process = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", GUARDED, "sh", *recipe.command(port)),
            stdin=asyncio.subprocess.PIPE,
            env={**recipe.environment, **side.env(), **recipe.env},
            start_new_session=True,
        )
    except OSError as error:
        side.close()
        raise HyperFlexisError(f"vLLM cannot be started: {error}") from error
    return VllmServer(process, f"http://127.0.0.1:{port}", side)
