"""The clients of a round, spread over the processes of one Fabric run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from typing import TypeVar

import torch
from lightning.fabric import Fabric
from torch import Tensor, distributed, nn
from typing_extensions import override

from hosfl_lightning.transport.in_process import InProcess, Sent
from hosfl_lightning.transport.sums import RankSums
from hosfl_lightning.wire import Message, decode, encode

M = TypeVar("M", bound=Message)
T = TypeVar("T")
_LENGTH_BYTES = 8


class LostProcessError(RuntimeError):
    """Another process of the run has ended, so this one cannot go on."""


class Ranks(InProcess):
    r"""Client ``i`` of a round (in ascending order) runs in process ``i mod R``, with the server's part on its data.

    Every process holds both halves and ends every round with the same bits as one process that runs the clients one
    after the other, on the same type of device with the same number of threads (``OMP_NUM_THREADS``; where it is not
    set, Fabric divides the cores). Sums are taken in client order, never by a reduction. Roles are kept apart, not
    processes: a client's z and λ cross as encoded messages inside its process, its answer goes to all.

    What the processes tell each other are tensors and bytes, so nothing is unpickled.

    Args:
        fabric: Launched before the first use.

    Raises:
        LostProcessError: By any method that waits for the others.
    """

    def __init__(self, fabric: Fabric) -> None:
        super().__init__(serialize=True)
        self.fabric = fabric

    @override
    def own(self, clients: Sequence[T]) -> list[T]:
        return list(clients[self.fabric.global_rank :: self.fabric.world_size])

    @override
    def share(self, value: T) -> list[T]:
        return [json.loads(part) for part in self._exchange(json.dumps(value).encode())]

    @override
    def broadcast(self, message: M, receivers: int) -> M:
        """The first process speaks for the server."""
        frame = b""
        if self.fabric.is_global_zero:
            frame = encode(message, self.run_id)
            self.ledger.append(Sent(message.kind, "down", len(frame), receivers))
        first, *_ = self._exchange(frame)
        return decode(first, message.kind, run_id=self.run_id, round=message.round)  # type: ignore[return-value]

    @override
    def collect(self, answers: list[M]) -> list[M]:
        frames = [encode(message, self.run_id) for message in answers]
        block = b"".join(len(frame).to_bytes(_LENGTH_BYTES, "little") + frame for frame in frames)
        received: list[M] = []
        for stream in map(BytesIO, self._exchange(block)):
            while length := int.from_bytes(stream.read(_LENGTH_BYTES), "little"):
                received.append(decode(stream.read(length), run_id=self.run_id))  # type: ignore[arg-type]
        return received

    @override
    def sums(self, parameters: list[nn.Parameter]) -> RankSums:
        return RankSums(parameters, self.share, self.gather)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, which have one shape and dtype, in their order."""
        tensor = tensor.to(self.fabric.device)
        parts = [torch.empty_like(tensor) for _ in range(self.fabric.world_size)]
        try:
            distributed.all_gather(parts, tensor)
        except RuntimeError as error:
            raise LostProcessError(
                "another process of this run has ended: see its own message or, if it left none, what killed it "
                "(the memory of the machine?)"
            ) from error
        return parts

    def _exchange(self, data: bytes) -> list[bytes]:
        """What every process has, of any length, in their order."""
        lengths = [int(length) for length in self.gather(torch.tensor(len(data)))]
        size = max(1, *lengths)  # `frombuffer` takes no empty one
        padded = torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
        return [part[:length].cpu().numpy().tobytes() for part, length in zip(self.gather(padded), lengths)]
