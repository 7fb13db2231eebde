"""An address at which peers connect, each served by a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from socket import SHUT_RDWR

from . import tcp
from .tcp import SMALL_HEADER, SocketChannel

RETRY_S = 0.1
_log = logging.getLogger(__name__)


class Listener:
    """Calls ``serve`` with each connection, in a thread; what it returns from is closed. ``most`` at once: who comes
    beyond that is shown the door. Raises OSError when the address is taken, and ValueError when it is none."""

    def __init__(self, address: str, serve: Callable[[SocketChannel], None], most: int, name: str) -> None:
        self._serve = serve
        self._most = most
        self._name = name
        self._lock = threading.Lock()
        self._threads: dict[threading.Thread, SocketChannel] = {}
        self._closing = False
        self._socket, self.address = tcp.listen(address)
        self._thread = threading.Thread(target=self._accept, name=f"{name}-listen", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Free the address and let nobody else in."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def close(self) -> None:
        """The same, and cut all connections. Returns when no thread is left."""
        self.stop()
        with self._lock:
            threads = dict(self._threads)
        for thread, channel in threads.items():
            channel.close()
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError as error:
                if self._closing:
                    return
                # Too many open files, say: others may be closed soon.
                _log.warning("nobody can connect at %s now: %s", self.address, error)
                time.sleep(RETRY_S)
                continue
            channel = SocketChannel(sock, SMALL_HEADER, 0)
            thread = threading.Thread(target=self._run, args=(channel,), name=self._name, daemon=True)
            with self._lock:
                full = len(self._threads) >= self._most
                if not full:
                    self._threads[thread] = channel
            if full:
                channel.release()
            else:
                thread.start()

    def _run(self, channel: SocketChannel) -> None:
        try:
            self._serve(channel)
        finally:
            channel.close()
            channel.release()
            with self._lock:
                del self._threads[threading.current_thread()]
