"""Children on this machine: started in a session of their own, with their output in a log file.

A session of its own keeps a terminal's Ctrl-C from the child, so that ``serve`` alone decides the order of the stop;
it is also a process group, so that a signal reaches what the child itself started.

A child waits at a gate until its pid is known to whoever keeps the books. Were ``serve`` killed before that, nobody
could find the child again; the gate then sees the end of its input and the child ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

GATE = 'read -r go && exec "$@" </dev/null'
"""What a child runs first: it becomes the command, under the same pid, once it reads a line."""


class LocalProcess:
    """A child that was started."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def wait(self) -> int:
        """Its exit status, negative for the signal that ended it. What it started itself is killed with it."""
        code = await self._process.wait()
        self.signal(signal.SIGKILL)
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the child and to what it started."""
        # Either error says that the whole group is gone; macOS gives EPERM while a zombie is left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


async def start_process(
    command: Sequence[str], env: Mapping[str, str], log: Path, started: Callable[[int], None]
) -> LocalProcess:
    """Start ``command`` with ``env`` on top of this process's environment; the log of its last run becomes LOG.1.

    ``started`` is called with the pid before the command begins, which it never does when that raises. A command that
    is not there ends with status 127. Raises OSError when no process can be started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_name(f"{log.name}.1"))
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", GATE, "sh", *command),
            stdin=asyncio.subprocess.PIPE,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
            start_new_session=True,
        )
    assert process.stdin is not None
    try:
        started(process.pid)
        process.stdin.write(b"go\n")
    finally:
        process.stdin.close()
    return LocalProcess(process)


def process_age_s() -> float:
    """Seconds since this process began; where the system does not say, those that it has computed for: less."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # not Linux
        return time.process_time()


def own_command(*arguments: str) -> list[str]:
    """The command line that runs this program's command in a new process."""
    return [sys.executable, "-m", "hyperflexis", *arguments]


def instance_command(
    id: str, epoch: int, name: str, engine: str, listen: str, controller: str, step: str, options: Sequence[str]
) -> list[str]:
    """Start one instance here; ``options`` are the engine's own (``--model DIR``, ``--threads 1``, ...)."""
    return own_command(
        "instance",
        *("--id", id, "--epoch", str(epoch), "--name", name, "--engine", engine),
        *("--listen", listen, "--controller", controller, "--step", step),
        *options,
    )
