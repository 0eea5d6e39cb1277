"""A TCP proxy that counts what passes it: the bytes that the sockets carry, without the headers of IP and TCP."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from contextlib import suppress

from benchmarks.remote_children import Talk


def proxy(port: int, talk: Talk) -> None:
    """Between whoever connects here and ``port``; any order is answered by the bytes so far, ``up`` and ``down``."""
    counts: list[Counter[str]] = []  # one of each thread: a common one would lose bytes
    listening = socket.create_server(("127.0.0.1", 0))
    talk.say(port=listening.getsockname()[1])
    threading.Thread(target=_accept, args=(listening, port, counts), daemon=True).start()
    for _ in talk:
        talk.say(**{direction: sum(count[direction] for count in counts) for direction in ("up", "down")})


def _accept(listening: socket.socket, port: int, counts: list[Counter[str]]) -> None:
    while True:
        near, _ = listening.accept()
        try:
            far = socket.create_connection(("127.0.0.1", port))
        except OSError:
            near.close()  # nobody there yet
            continue
        for source, drain, direction in ((near, far, "up"), (far, near, "down")):
            counts.append(Counter())
            threading.Thread(target=_pump, args=(source, drain, counts[-1], direction), daemon=True).start()


def _pump(source: socket.socket, drain: socket.socket, count: Counter[str], direction: str) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 18):
            count[direction] += len(data)
            drain.sendall(data)
    for end in (source, drain):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
