"""Time of ``p += α·u``, in nanoseconds per element, against ``torch.randn`` and ``add_``.

Run by hand: ``python benchmarks/directions.py [--threads 1] [--device cpu] [--sizes 4096 1000000 10000000]``. Every
number is the fastest of ``--repeats`` runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hosfl_lightning.rng import DISTRIBUTIONS, DirectionBatch, Stream, add_direction_
from hosfl_lightning.run.identity import hardware

ALPHA = 1e-3
LORA_TENSORS, LORA_NUMEL = 32, 4096


def fastest(step: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of the fastest of ``repeats`` calls, after two to warm up."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


def add_randn_(generator: torch.Generator, out: Tensor) -> None:
    out.add_(torch.randn(out.shape, generator=generator, device=out.device), alpha=ALPHA)


def add_one_(stream: Stream, out: Tensor) -> None:
    add_direction_(out, ALPHA, stream, 0)


def add_one_by_one_(stream: Stream, outs: Sequence[Tensor]) -> None:
    for tensor, out in enumerate(outs):
        add_direction_(out, ALPHA, stream, tensor)


def add_together_(stream: Stream, outs: Sequence[Tensor]) -> None:
    batch = DirectionBatch(stream, [(tensor, out.numel()) for tensor, out in enumerate(outs)], device=outs[0].device)
    for i, out in enumerate(outs):
        batch.add_(i, out, ALPHA)


def print_sizes(sizes: Sequence[int], repeats: int, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    print("| p += α·u, ns per element | " + " | ".join(f"d = {d:,}" for d in sizes) + " |")
    print("|---|" + "---|" * len(sizes))
    outs = [torch.zeros(d, device=device) for d in sizes]
    steps: dict[str, Callable[[Tensor], None]] = {"torch.randn, add_": partial(add_randn_, generator)}
    steps |= {name: partial(add_one_, Stream(0, domain)) for name, domain in DISTRIBUTIONS.items()}
    for name, step in steps.items():
        times = [fastest(partial(step, out), repeats, device) / out.numel() for out in outs]
        print(f"| {name} | " + " | ".join(f"{1e9 * t:.2f}" for t in times) + " |")


def print_batch(repeats: int, device: torch.device) -> None:
    outs = [torch.zeros(LORA_NUMEL, device=device) for _ in range(LORA_TENSORS)]
    print(f"\n| {LORA_TENSORS} LoRA tensors of {LORA_NUMEL:,}, ms | one by one | together |")
    print("|---|---|---|")
    for name, domain in DISTRIBUTIONS.items():
        stream = Stream(0, domain)
        one_by_one = fastest(partial(add_one_by_one_, stream, outs), repeats, device)
        together = fastest(partial(add_together_, stream, outs), repeats, device)
        print(f"| {name} | {1e3 * one_by_one:.2f} | {1e3 * together:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 10**6, 10**7])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{hardware(args.device)}, fp32\n")
    print_sizes(args.sizes, args.repeats, args.device)
    print_batch(args.repeats, args.device)


if __name__ == "__main__":
    main()
