"""Children of one process that has imported everything: they fork, take orders and answer, a line of JSON each."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


class Talk:
    """A child's end: orders in, answers out."""

    def __init__(self, orders: int, answers: int) -> None:
        self._orders, self._answers = os.fdopen(orders), os.fdopen(answers, "w")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (order := self.hear()) is not None:
            yield order

    def hear(self) -> dict[str, Any] | None:
        """The next order; None: there will be none."""
        line = self._orders.readline()
        return json.loads(line) if line else None

    def say(self, **answer: Any) -> None:
        """Answer."""
        print(json.dumps(answer), file=self._answers, flush=True)


#: The parent's ends of all pipes that are open.
_OURS: set[int] = set()


class Child:
    """A process of its own, in which ``role`` runs; nothing here may have started gRPC.

    Args:
        role: What it does.
        log: Where what it prints goes.
        threads: Of torch.
        cores: Which it may run on; None: all.
    """

    def __init__(
        self, role: Callable[[Talk], None], log: Path, threads: int = 1, cores: set[int] | None = None
    ) -> None:
        orders, mine = os.pipe()
        yours, answers = os.pipe()
        _OURS.update((mine, yours))
        self.log, self.began = log, time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            for end in _OURS:  # those of its siblings too: else none would hear that there are no more orders
                os.close(end)
            _live(role, Talk(orders, answers), log, threads, cores)
        os.close(orders)
        os.close(answers)
        self._orders, self._answers = os.fdopen(mine, "w"), os.fdopen(yours)

    def order(self, **order: Any) -> None:
        """Have it do something."""
        print(json.dumps(order), file=self._orders, flush=True)

    def answer(self) -> dict[str, Any]:
        """What it says next.

        Raises:
            RuntimeError: It has ended.
        """
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"a process has ended:\n{self.log.read_text()}")
        return json.loads(line)

    def ask(self, **order: Any) -> dict[str, Any]:
        """Order and answer."""
        self.order(**order)
        return self.answer()

    def end(self) -> None:
        """There are no more orders; wait until it ends, well.

        Raises:
            RuntimeError: It ended badly.
        """
        self._stop_talking()
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        if status:
            raise RuntimeError(f"a process has ended with {status}:\n{self.log.read_text()}")

    def kill(self) -> None:
        """As a machine that loses its power."""
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._stop_talking()
            self.pid = 0

    def _stop_talking(self) -> None:
        if self._orders.closed:
            return
        _OURS.difference_update((self._orders.fileno(), self._answers.fileno()))
        for end in (self._orders, self._answers):
            with suppress(OSError):
                end.close()


class Family:
    """All children of a measurement; none survives it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.children = folder, list[Child]()

    def __enter__(self) -> Family:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.kill()

    def born(self, role: Callable[[Talk], None], name: str, **kwargs: Any) -> Child:
        """One more."""
        child = Child(role, self.folder / f"{name}.log", **kwargs)
        self.children.append(child)
        return child


def _live(role: Callable[[Talk], None], talk: Talk, log: Path, threads: int, cores: set[int] | None) -> None:
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores or os.sched_getaffinity(0))
        role(talk)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(ValueError, OSError):
            sys.stdout.flush()
        os._exit(status)
