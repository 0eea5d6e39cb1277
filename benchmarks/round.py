"""What a round costs, beside another checkout of this package: seconds, and the process's peak memory.

    python -m benchmarks.round --before CHECKOUT

runs each case in processes of its own, with this code and with that of ``CHECKOUT`` in turn, and prints the ratios of
their medians; without ``--before`` the figures alone. Memory is VmHWM over the rounds alone, in processes whose
allocator gives back what is freed (``MALLOC_*``) and whose times do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent
#: Clients, examples of each in a round, tokens; and how the round is simulated.
CASES: dict[str, tuple[int, int, int, str]] = {
    "quickstart": (8, 4, 128, "batched"),
    "quickstart, per client": (8, 4, 128, "per_client"),
    "64 clients": (64, 4, 128, "batched"),
    "64 small clients, per client": (64, 1, 32, "per_client"),
}
#: An allocator that gives back what is freed, so that the peak is of what is held.
HONEST = {
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}  # fmt: skip


def child(case: str, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds of each round but the first, and the peak over them."""
    import torch
    from lightning.pytorch.callbacks import Callback

    from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
    from hosfl_lightning.data import FederatedDataModule
    from hosfl_lightning.data.tokenization import Example
    from hosfl_lightning.optim import AdamW
    from hosfl_lightning.split import Lora, LoraHalf

    torch.set_num_threads(threads)
    clients, batch, tokens, simulation = CASES[case]

    class Tokens(FederatedDataModule):
        def setup(self, stage: str) -> None:
            generator = torch.Generator().manual_seed(0)

            def example() -> Example:
                ids = torch.randint(3, 250, (tokens,), generator=generator).tolist()
                return Example(ids, list(ids))

            self.clients = [[example() for _ in range(batch)] for _ in range(clients)]
            self.validation_set = [example()]

    class Clock(Callback):
        """From the end of a round to the end of the next: whatever happens in it, wherever hooks lie."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if not self.ends:
                Path("/proc/self/clear_refs").write_text("5")
            self.ends.append(time.perf_counter())

    lora = Lora(client=LoraHalf(target_modules=["q_proj", "v_proj"]), server=LoraHalf(target_modules="all-linear"))
    model, clock = SplitCausalLM("tiny_lm", cut=3, lora=lora), Clock()
    with tempfile.TemporaryDirectory() as root:
        Orchestrator(
            HOSFL(probes=4, client_optimizer=AdamW(lr=1e-3)), max_rounds=rounds + 1, simulation=simulation,  # type: ignore[arg-type]
            val_check_interval=rounds + 1, default_root_dir=root, callbacks=[clock], enable_progress_bar=False,
            enable_checkpointing=False,
        ).fit(model, Tokens(batch_size=batch))  # fmt: skip
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": [b - a for a, b in pairwise(clock.ends)], "peak": peak * 1024}


def run(case: str, checkout: Path, arguments: argparse.Namespace, memory: bool) -> dict[str, Any]:
    """`child` in a process of its own, with the code of a checkout."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'client'}",
        **(HONEST if memory else {}),
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--child", case, f"--rounds={arguments.rounds}",
               f"--threads={arguments.threads}"]  # fmt: skip
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(case: str, arguments: argparse.Namespace) -> str:
    """One case, measured in turn."""
    checkouts = [HERE, *([Path(arguments.before).resolve()] if arguments.before else [])]
    times: list[list[float]] = [[] for _ in checkouts]
    for _ in range(arguments.repeats):
        for held, checkout in zip(times, checkouts):
            held += run(case, checkout, arguments, memory=False)["seconds"]
    peaks = [run(case, checkout, arguments, memory=True)["peak"] for checkout in checkouts]
    medians = [statistics.median(held) for held in times]
    cells = [case, f"{1e3 * medians[0]:.1f} ms", f"{peaks[0] / 2**20:.1f} MiB"]
    if arguments.before:
        cells[2:2] = [f"{medians[0] / medians[1]:.3f}", f"{min(times[0]) / min(times[1]):.3f}"]
        cells.append(f"{peaks[0] / peaks[1]:.3f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="another checkout of this package")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.rounds, arguments.threads)))
        return
    ratios = ("", " of medians / before | of minima / before |")[bool(arguments.before)]
    print(f"| case | round |{ratios} peak |{' peak / before |' if arguments.before else ''}")
    print("|" + "---|" * (6 if arguments.before else 3))
    for case in arguments.cases:
        print(row(case, arguments), flush=True)


if __name__ == "__main__":
    main()
