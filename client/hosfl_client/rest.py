"""What is done once nothing has been asked for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Rest:
    """Calls a function after some seconds without work, once until there is work again; never beside it.

    Args:
        act: What is called, in a thread of its own.
        seconds: Of silence.
    """

    def __init__(self, act: Callable[[], None], seconds: float) -> None:
        self.act, self.seconds = act, seconds
        self._changed, self._since = threading.Condition(), float("inf")
        threading.Thread(target=self._wait, daemon=True).start()

    @contextmanager
    def working(self) -> Iterator[None]:
        """While it is open, and for so many seconds after it, nothing is called."""
        with self._changed:
            try:
                yield
            finally:
                self._since = time.monotonic()
                self._changed.notify()

    def _wait(self) -> None:
        with self._changed:
            while True:
                left = self._since + self.seconds - time.monotonic()
                if left > 0:
                    self._changed.wait(None if left == float("inf") else left)
                    continue
                self._since = float("inf")
                self.act()
