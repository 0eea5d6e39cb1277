"""A slow link: bytes pass, late, and no more than so many a second."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Throttle:
    """A relay from a port of its own to another.

    Args:
        port: Where it leads, on this machine.
        bytes_a_second: Of each direction of each connection.
        delay: Seconds before each piece.

    Attributes:
        address: Where it listens.
        carried: Bytes, either way.
    """

    def __init__(self, port: int, bytes_a_second: float, delay: float) -> None:
        self.port, self.bytes_a_second, self.delay = port, bytes_a_second, delay
        self.carried = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.port))
                except OSError:  # the server is not there yet
                    near.close()
                    continue
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(1024):
                time.sleep(self.delay + len(piece) / self.bytes_a_second)
                target.sendall(piece)
                self.carried += len(piece)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def throttled(port: int, bytes_a_second: float, delay: float) -> Iterator[Throttle]:
    throttle = Throttle(port, bytes_a_second, delay)
    yield throttle
    throttle.listener.close()
