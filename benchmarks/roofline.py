"""What bounds a forward-only client's step on this processor: products, passes over memory, and the generator.

    python -m benchmarks.roofline

The model of ``benchmarks/client_step.py``, P = 4. A step is P + 1 forwards, and at each probe θ is read and θ + μu
written, m elements of it; at the update θ is read and written, d elements. With t the seconds of a forward, B the
bandwidth of a copy and g the generator's seconds an element, the time over P + 1 forwards is at least

    1 + 8 (P m + d) / (B (P + 1) t)                      bytes alone, fp32
    1 + g P (m + d) / ((P + 1) t)                        each direction made twice, for its probe and for the update

m is less than d where few rows of an embedding are looked up. The second bound is of the generator as it is.
Seconds are the processor's, of one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.client_step import client
from hosfl_lightning.optim import SGD
from hosfl_lightning.rng import DISTRIBUTIONS, Stream, add_direction_
from hosfl_lightning.run.identity import hardware
from hosfl_lightning.split import run

PROBES, FP32 = 4, 4
SHAPES = ((8, 128), (1, 32))


class Machine(NamedTuple):
    """FLOP/s of a product, bytes/s of a copy (read and written), seconds an element of ``p += α u``."""

    products: float
    copies: float
    directions: dict[str, float]


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Of the processor, so that other work on it counts little; the median, after one to warm up."""
    found = []
    for _ in range(repeats + 1):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found[1:])


def machine(side: int, numel: int, repeats: int) -> Machine:
    """Of a square product, and of a tensor that no cache holds."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    source, target = torch.randn(numel), torch.empty(numel)
    streams = {name: Stream(0, domain) for name, domain in DISTRIBUTIONS.items()}
    return Machine(
        2 * side**3 / seconds(lambda: a @ b, repeats),
        2 * FP32 * numel / seconds(lambda: target.copy_(source), repeats),
        {name: seconds(lambda one=stream: add_direction_(target, 1e-3, one, 0), repeats) / numel  # type: ignore[misc]
         for name, stream in streams.items()},
    )  # fmt: skip


def moved(half: nn.Module, trained: Iterable[Tensor], ids: Tensor) -> tuple[int, int]:
    """(m, d): elements that a probe moves, and the update."""
    rows = {id(p): len(ids.unique()) for m in half.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    sizes = [(p.numel(), min(rows.get(id(p), len(p)), len(p)) * p[0].numel()) for p in trained]
    return sum(probed for _, probed in sizes), sum(all_of_it for all_of_it, _ in sizes)


def bounds(m: int, d: int, forward: float, here: Machine) -> tuple[float, float]:
    """By bytes, and by the generator of signs."""
    whole = (PROBES + 1) * forward
    return (
        1 + 2 * FP32 * (PROBES * m + d) / here.copies / whole,
        1 + here.directions["rademacher"] * PROBES * (m + d) / whole,
    )


@torch.no_grad()
def row(full: bool, shape: tuple[int, int], here: Machine, repeats: int) -> str:
    """Of the table."""
    who = client(full, SGD(lr=1e-4), PROBES)
    ids = torch.randint(0, 8192, shape, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with FlopCounterMode(display=False) as counter:
        run(who.half, batch)
    forward = seconds(lambda: run(who.half, batch), repeats)
    m, d = moved(who.half, who.optimizer.parameters, ids)
    by_bytes, by_generator = bounds(m, d, forward, here)
    return (
        f"| {'full' if full else 'LoRA'}, {'x'.join(map(str, shape))} | {m:,} | {d:,} | {1e3 * forward:.2f} ms "
        f"| {counter.get_total_flops() / forward / here.products:.0%} | {by_bytes:.3f} | {by_generator:.3f} |"
    )


def main() -> None:
    """Print the machine and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    here = machine(1024, 1 << 24, arguments.repeats)
    generator = ", ".join(f"{name} {1e9 * t:.2f}" for name, t in here.directions.items())
    print(f"{hardware(torch.device('cpu'))}, fp32: products {here.products / 1e9:.0f} GFLOP/s, copies "
          f"{here.copies / 1e9:.1f} GB/s, p += αu in ns an element: {generator}\n")  # fmt: skip
    print("| client | m | d | forward | of the products' FLOP/s | bound by bytes | by the generator |")
    print("|---|---|---|---|---|---|---|")
    for full in (False, True):
        for shape in SHAPES:
            print(row(full, shape, here, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
