"""How fast messages are packed, encoded, decoded and unpacked, for every codec.

    python benchmarks/wire.py

Smashed data of 768 columns without padding, labels per token. MB are 10^6 bytes of z in fp32, whatever the codec sends;
each time is the median of the repeats. pack rounds z to the codec, unpack restores it; encode and decode are the frame
with its SHA-256 and its checks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from hosfl_lightning.run.identity import hardware
from hosfl_lightning.wire import TOKEN_CODECS, SmashedData, decode, encode

SHAPES = ((8, 128, 768), (32, 128, 768))


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of one call, the first one left out."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def measure(pack: Callable[[], SmashedData], repeats: int) -> tuple[bytes, list[float]]:
    """The frame, and the time of each column."""
    message = pack()
    data = encode(message)
    runs = (pack, lambda: encode(message), lambda: encode(pack()), lambda: decode(data), lambda: unpack(data))
    return data, [seconds(run, repeats) for run in runs]


def unpack(data: bytes) -> object:
    """What a server does with a frame."""
    message = decode(data)
    return message.unpack() if isinstance(message, SmashedData) else None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    print(hardware(torch.device("cpu")))
    columns = ("pack", "encode", "pack+encode", "decode", "decode+unpack")
    print(f"{'z':12} {'codec':6} {'bytes':>10} {'of fp32':>8}" + "".join(f"{name + ' MB/s':>20}" for name in columns))
    for shape in SHAPES:
        z, mask = torch.randn(shape, generator=generator), torch.ones(shape[:2], dtype=torch.bool)
        labels = torch.randint(0, 32000, shape[:2], generator=generator)
        for codec in TOKEN_CODECS:
            data, times = measure(partial(SmashedData.pack, 0, 0, z, labels, mask, codec), arguments.repeats)
            rates = "".join(f"{4e-6 * z.numel() / taken:20.0f}" for taken in times)
            size = f"{len(data):10} {len(data) / (4 * z.numel()):8.3f}"
            print(f"{'x'.join(map(str, shape)):12} {codec:6} {size}{rates}", flush=True)


if __name__ == "__main__":
    main()
