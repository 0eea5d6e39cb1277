"""A line between clients and a server that can be cut, or is slow."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress


class Line:
    """Listens at a port of its own and hands bytes on, both ways.

    Args:
        port: Of the server.
        bytes_a_second: Of each direction of each connection; 0: as many as come.
        delay: Seconds before each piece of 1 KiB, of a slow line.

    Attributes:
        port: Where clients connect.
        carried: Bytes so far.
    """

    def __init__(self, port: int, bytes_a_second: float = 0.0, delay: float = 0.0) -> None:
        self.server, self.bytes_a_second, self.delay = port, bytes_a_second, delay
        self.carried = 0
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End all connections; new ones may be made."""
        ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                try:
                    there = socket.create_connection(("127.0.0.1", self.server))
                except OSError:
                    here.close()
                    continue
                self._ends += [here, there]
                for ends in ((here, there), (there, here)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1024 if self.bytes_a_second else 1 << 16):
                if self.bytes_a_second:
                    time.sleep(self.delay + len(data) / self.bytes_a_second)
                self.carried += len(data)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
