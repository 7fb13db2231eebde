"""The gateway process, from its configuration to its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import Callable

from .app import Gateway
from .config import GatewayConfig

_log = logging.getLogger(__name__)


async def serve(config: GatewayConfig, on_ready: Callable[[int], None] | None = None) -> None:
    """Serve until SIGTERM, SIGINT or cancellation; open answers then get ``shutdown_grace_s``, or a second signal.

    ``on_ready`` is told the port once clients can connect. Raises HyperFlexisError when the port is taken or a
    tokenizer cannot be read.
    """
    gateway = Gateway(config)
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
