"""The gateway process, from its configuration to its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import Callable
from dataclasses import replace

from ..fd_limit import raise_fd_limit
from .app import Gateway
from .config import GatewayConfig, Limits

SPARE_FDS = 256
"""Descriptors for what is no client: links, listening sockets, files, and connections that are being refused."""
_log = logging.getLogger(__name__)


async def serve(config: GatewayConfig, on_ready: Callable[[int], None] | None = None) -> None:
    """Serve until SIGTERM, SIGINT or cancellation; open answers then get ``shutdown_grace_s``, or a second signal.

    The limit on open files is raised to what ``limits`` need; where the system allows less, fewer connections are
    accepted. ``on_ready`` is told the port once clients can connect. Raises HyperFlexisError when the port is taken or
    a tokenizer cannot be read.
    """
    gateway = Gateway(replace(config, limits=within_fd_limit(config.limits)))
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            gateway.cut()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    links: asyncio.Task[None] | None = None
    try:
        port = gateway.http.start(config.host, config.port, config.reuse_port)
        links = asyncio.create_task(gateway.controller.run())
        # What lives as long as the process need not be looked at by each collection.
        gc.collect()
        gc.freeze()
        _log.info("gateway %s listens at %s:%d", config.id, config.host, port)
        if on_ready is not None:
            on_ready(port)
        await stop.wait()
    finally:
        await gateway.http.stop(config.limits.shutdown_grace_s, gateway.cut)
        gateway.close()
        if links is not None:
            links.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await links
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def within_fd_limit(limits: Limits) -> Limits:
    """Raise this process's limit on open files for ``limits``, or bound connections by what can be had.

    A client past the bound is told so with a 503, while one past the limit of the system would wait unanswered.
    """
    allowed = raise_fd_limit(limits.max_connections + limits.max_open_requests + SPARE_FDS)
    room = allowed - min(SPARE_FDS, allowed // 2)
    if room >= limits.max_connections:
        return limits
    _log.warning(
        "max_connections is %d instead of %d: this process may open only %d files; raise the hard limit (ulimit -Hn)",
        room,
        limits.max_connections,
        allowed,
    )
    return replace(limits, max_connections=room)
