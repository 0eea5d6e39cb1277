"""The clients of a run in an interpreter of their own, which knows nothing but what comes through its standard input.

    python -m tests.fleet.pipe_client MODEL

An order is one letter, a length and so many bytes; what comes back is a number of frames, each with its length.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric import Fabric

from hosfl_lightning.clients import Endpoint, Minibatches
from hosfl_lightning.models import SplitCausalLM
from hosfl_lightning.models.halves import Labels, Part
from hosfl_lightning.split import Lora, LoraHalf, Side
from hosfl_lightning.wire import decode, encode
from tests.random_tokens import RandomTokens

LENGTHS = [[9, 12, 7, 12, 5, 8], [6, 10, 10, 4], [12, 11, 3, 9, 12]]


def model_of(
    pretrained: str,
    side: bool = False,
    whole: bool = False,
    part: Part = "both",
    rank: int = 2,
    labels: Labels = "server",
    head: int = 0,
) -> SplitCausalLM:
    """What both sides build for themselves, from the recipe that each has."""
    client = None if side else LoraHalf(r=rank, target_modules=["q_proj", "v_proj", "down_proj"])
    lora = Lora(client=client, server=LoraHalf(r=4, target_modules="all-linear"), head=head)
    return SplitCausalLM(
        pretrained, cut=2, lora=lora, optimizer=adamw, client_holds="whole" if whole else "half",
        side=Side(client=4) if side else None, part=part, labels=labels,
    )  # fmt: skip


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


def read(stream: BinaryIO) -> bytes:
    return stream.read(int.from_bytes(stream.read(8), "little"))


def write(stream: BinaryIO, data: bytes) -> None:
    stream.write(len(data).to_bytes(8, "little") + data)


class Client:
    """Takes orders."""

    def __init__(self, pretrained: str) -> None:
        self.pretrained = pretrained
        self.endpoint: Endpoint

    def join(self, order: bytes) -> list[bytes]:
        """A new run: this client's own recipe, then the server's terms."""
        recipe, _, terms = order.partition(b"\n")
        model, data = model_of(self.pretrained, **json.loads(recipe)), RandomTokens(LENGTHS)
        data.tokenizer = model.tokenizer()
        data.setup("fit")
        model.eval()
        told: Any = decode(terms, "terms")
        self.endpoint = Endpoint.of(model, Minibatches(data, model), told, Fabric(accelerator="cpu"))
        return []

    def handle(self, order: bytes) -> list[bytes]:
        """A request, or what is for everybody."""
        request = decode(order)
        return [encode(answer, self.run_id(order)) for answer in self.endpoint.handle([request])]

    def run_id(self, order: bytes) -> bytes:
        from hosfl_lightning.wire import peek

        return peek(order).run_id

    def modules(self, order: bytes) -> list[bytes]:
        """What this interpreter has imported of the package."""
        return [json.dumps([name for name in sys.modules if name.startswith("hosfl_lightning.")]).encode()]


def main(pretrained: str) -> None:
    torch.set_num_threads(1)
    client, stdin, stdout = Client(pretrained), sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what libraries print is no frame
    orders = {b"T": client.join, b"R": client.handle, b"M": client.modules}
    while letter := stdin.read(1):
        frames = orders[letter](read(stdin))
        stdout.write(len(frames).to_bytes(1, "little"))
        for frame in frames:
            write(stdout, frame)
        stdout.flush()


if __name__ == "__main__":
    main(str(Path(sys.argv[1])))
