"""Something that is done once nothing else has been for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType


class Idle:
    """Calls ``act`` once, ``seconds`` after the last use, in a thread of its own and never during a use.

    Example::

        idle = Idle(half.release, 1.0)
        with idle:  # a use
            ...

    Args:
        act: What is due then.
        seconds: Without a use; they count from now on.
    """

    def __init__(self, act: Callable[[], object], seconds: float) -> None:
        self._act, self._seconds = act, seconds
        # One thread may come in twice: what is done lets go of the last reference to what then stops this.
        self._lock, self._used = threading.RLock(), threading.Event()
        self._stopped = False
        self._put_off()
        threading.Thread(target=self._watch, name="idle", daemon=True).start()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_off()
        self._lock.release()

    def stop(self) -> None:
        """Nothing is due any more; waits until nothing is done, unless what is done calls it."""
        with self._lock:
            self._stopped = True
        self._used.set()

    def _put_off(self) -> None:
        self._due = time.monotonic() + self._seconds
        self._used.set()

    def _watch(self) -> None:
        while self._used.wait() and not self._stopped:
            # A use moves the time on and wakes nobody: it must cost nothing.
            while (left := self._due - time.monotonic()) > 0 and not self._stopped:
                time.sleep(left)
            with self._lock:
                if not self._stopped and time.monotonic() >= self._due:
                    self._used.clear()
                    self._act()
