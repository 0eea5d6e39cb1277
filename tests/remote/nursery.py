"""One process that has imported everything, and becomes a server or a client in a moment: it forks.

    python -m tests.remote.nursery

A line of JSON in, ``{"role": ..., "spec": PATH, "log": PATH}``, a line out: the new process's number. An empty line
asks for those that have ended, as ``{number: exit status}``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import torch

# The libraries that take seconds to import; none of them may have started a thread when the process forks.
import hosfl_lightning.join
import hosfl_lightning.recipe  # noqa: F401
import tests.fleet.test_pipe  # noqa: F401
from tests.remote import actors, island


def main() -> None:
    torch.set_num_threads(1)
    ended: dict[int, int] = {}
    for line in sys.stdin:
        reap(ended)
        if line.strip():
            order = json.loads(line)
            print(born(order["role"], order["spec"], order["log"]), flush=True)
        else:
            print(json.dumps(ended), flush=True)


def born(role: str, spec: str, log: str) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        die_with_parent()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        told = json.loads(Path(spec).read_text())
        if on := told.get("island"):
            island.enter(on)
            island.audit()
            os.environ |= island.TEMPTATION
        {
            "island": island.island,
            "stray": island.stray,
            "server": actors.server,
            "client": actors.client,
            "rank": actors.rank,
        }[role](told)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def die_with_parent() -> None:
    """Where the system knows how: nobody is left behind by a test that was killed."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def reap(ended: dict[int, int]) -> None:
    try:
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main()
