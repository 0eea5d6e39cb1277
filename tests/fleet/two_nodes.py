"""What one of two nodes runs; the nodes are two processes that find each other over loopback.

    python -m tests.fleet.two_nodes PART MODEL SHARED OWN

with a folder that both nodes see, and one that stands for the node's own disk.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from tests.fleet.two_ranks import run


class Kill(Callback):
    """The second node is killed in round 3; there is a checkpoint of round 2."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def die(pretrained: Path, shared: Path, own: Path) -> None:
    run("everything", pretrained, own, num_nodes=2)
    run("whole", pretrained, shared, callbacks=[Kill()], num_nodes=2)


def go_on(pretrained: Path, shared: Path, own: Path) -> None:
    killed = shared / "whole" / "version_0"
    run("whole", pretrained, shared, killed, num_nodes=2)
    run("everything", pretrained, own, own / "everything" / "version_0", num_nodes=2)


if __name__ == "__main__":
    part, *folders = sys.argv[1:]
    {"die": die, "go_on": go_on}[part](*map(Path, folders))
