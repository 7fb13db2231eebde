"""A child of a ``serve`` that is gone, in the hands of the next one."""

from __future__ import annotations

import asyncio
import os
import signal

from .state import Running, is_alive, kill_group

POLL_S = 0.5
"""Between looks where the system has no pidfd; a look may cost a run of ``ps``."""


class AdoptedProcess:
    """A process that another one started, so that wait(2) says nothing about it here."""

    def __init__(self, identity: Running) -> None:
        self._identity = identity

    async def wait(self) -> None:
        """Return when it has ended; how, nobody knows. What it started itself is killed with it."""
        await self._wait_pidfd()
        while is_alive(self._identity):
            await asyncio.sleep(POLL_S)
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and to what it started, unless its pid is another's by now."""
        kill_group(self._identity, number)

    async def _wait_pidfd(self) -> None:
        """Return at the process's end, or at once where the system cannot tell of it."""
        try:
            fd = os.pidfd_open(self._identity.pid)
        except (AttributeError, OSError):  # not Linux, an old kernel, forbidden in a sandbox; or the process is gone
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(fd, ended.set)
        try:
            if is_alive(self._identity):  # else the pid was another's by the time it was opened
                await ended.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)
