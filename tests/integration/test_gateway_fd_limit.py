"""A gateway where the system allows few open files. In a process of its own, since a lowered hard limit stays."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
GATEWAY = """
import asyncio, resource, sys
from hyperflexis.gateway.config import GatewayConfig
from hyperflexis.gateway.server import serve
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 100))
config = GatewayConfig(id="g", controller="unix:" + sys.argv[1], models={"m": None}, port=0)
asyncio.run(serve(config, lambda port: print(port, flush=True)))
"""
RAISE = """
import resource
from hyperflexis.fd_limit import raise_fd_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))
print([raise_fd_limit(wanted) for wanted in (50, 200, 50, 1000)], resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_the_limit_is_raised_as_far_as_may_be_and_never_lowered() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RAISE], env={"PYTHONPATH": SOURCE}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[100, 200, 200, 300] (300, 300)\n"


def test_connections_beyond_the_systems_limit_are_refused_instead_of_stalled(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", GATEWAY, str(tmp_path / "c")],
        env={"PYTHONPATH": SOURCE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as gateway:
        assert gateway.stdout is not None and gateway.stderr is not None
        kept = []
        try:
            port = int(gateway.stdout.readline())
            for _ in range(50):
                kept.append(socket.create_connection(("127.0.0.1", port), 10.0))
                kept[-1].sendall(b"GET /health HTTP/1.1\r\n\r\n")
                assert b" 200 " in kept[-1].recv(4096)
            for _ in range(60):  # more than there are descriptors left
                with socket.create_connection(("127.0.0.1", port), 10.0) as refused:
                    assert b" 503 " in refused.recv(4096)
            kept[0].sendall(b"GET /health HTTP/1.1\r\n\r\n")
            assert b" 200 " in kept[0].recv(4096)
        finally:
            for sock in kept:
                sock.close()
            gateway.terminate()
        said = gateway.stderr.read()
        assert gateway.wait(10.0) == 0
    assert "max_connections is 50 instead of 8192" in said
    assert "cannot accept" not in said
