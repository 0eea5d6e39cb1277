"""Every node is asked to join, and again when its ClientApp has ended before the run."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid


class Invitations:
    """While it is entered, each node of the federation that is there has one message to answer.

    A node that came late, or whose ClientApp failed, was killed or was turned away, is asked again.

    Args:
        grid: Of the ServerApp.
        longest: Seconds that a message stays valid.
        every: Seconds from one look to the next.
        pause: Seconds that a node which has answered is left alone.
        patience: Seconds to wait for the last answers when the run is over.
    """

    def __init__(
        self, grid: Grid, longest: float, every: float = 2.0, pause: float = 20.0, patience: float = 30.0
    ) -> None:
        self.grid, self.longest, self.every, self.pause, self.patience = grid, longest, every, pause, patience
        self.open: dict[str, int] = {}
        self.rests_until: dict[int, float] = {}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self.thread.join()
        until = time.monotonic() + (self.patience if kind is None else 0.0)
        # A run that is over takes no more answers, and Flower would call them lost.
        while self.open and time.monotonic() < until:
            self.collect()
            time.sleep(0.5)

    def _watch(self) -> None:
        while not self.over.wait(self.every):
            try:
                self.collect()
                self.invite()
            except httpx.HTTPError as error:
                print(f"the SuperLink does not answer: {error}")

    def collect(self) -> None:
        """Take the answers that have come."""
        for answer in self.grid.pull_messages([*self.open]) if self.open else ():
            node = self.open.pop(answer.metadata.reply_to_message_id)
            self.rests_until[node] = time.monotonic() + self.pause
            if answer.has_error():
                print(f"node {node}: {answer.error.reason}")

    def invite(self) -> None:
        """Ask those that have nothing to answer."""
        busy, now = {*self.open.values()}, time.monotonic()
        free = [n for n in self.grid.get_node_ids() if n not in busy and self.rests_until.get(n, now) <= now]
        asked = self.grid.push_messages([Message(RecordDict(), n, "train", ttl=self.longest) for n in free])
        self.open |= {message: node for message, node in zip(asked, free) if message}
