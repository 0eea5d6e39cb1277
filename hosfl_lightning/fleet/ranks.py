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

from hosfl_lightning.fleet.local import LocalFleet
from hosfl_lightning.fleet.processes import Processes
from hosfl_lightning.fleet.sums import RankSums
from hosfl_lightning.wire import Message, RoundEnd, Update, decode, encode

M = TypeVar("M", bound=Message)
T = TypeVar("T")
_LENGTH_BYTES = 8


class LostProcessError(RuntimeError):
    """Another process of the run has ended, so this one cannot go on."""


class RankProcesses(Processes):
    r"""Client ``i`` of a round (in ascending order) runs in process ``i mod R``, with the server's part on its data.

    Every process holds both halves and ends every round with the same bits as one process that runs the clients one
    after the other, on the same type of device with the same number of threads (``OMP_NUM_THREADS``; where it is not
    set, Fabric divides the cores). Sums are taken in client order, never by a reduction.

    What the processes tell each other are tensors and bytes, so nothing is unpickled.

    Args:
        fabric: Launched before the first use.

    Raises:
        LostProcessError: By any method that waits for the others.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric

    @property
    @override
    def is_first(self) -> bool:
        return self.fabric.is_global_zero

    @override
    def own(self, clients: Sequence[T]) -> list[T]:
        return list(clients[self.fabric.global_rank :: self.fabric.world_size])

    @override
    def share(self, value: T) -> list[T]:
        return [json.loads(part) for part in self._exchange(json.dumps(value).encode())]

    @override
    def say(self, frame: bytes) -> bytes:
        first, *_ = self._exchange(frame if self.fabric.is_global_zero else b"")
        return first

    @override
    def collect(self, answers: list[M]) -> list[M]:
        frames = [encode(message) for message in answers]
        block = b"".join(len(frame).to_bytes(_LENGTH_BYTES, "little") + frame for frame in frames)
        received: list[M] = []
        for stream in map(BytesIO, self._exchange(block)):
            while length := int.from_bytes(stream.read(_LENGTH_BYTES), "little"):
                received.append(decode(stream.read(length)))  # type: ignore[arg-type]
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


class Ranks(LocalFleet):
    """The clients of a round, spread over processes. Roles are kept apart, not processes: a client's z and λ cross as
    encoded messages inside its process, its answer goes to all, and the first process speaks for the server.
    """

    @override
    def tell(self, message: Update | RoundEnd, clients: Sequence[int]) -> None:
        frame = encode(message, self.channel.run_id)
        if self.processes.is_first:
            self.channel.count(message, "down", len(frame), len(clients))
        heard = decode(self.processes.say(frame), message.kind, run_id=self.channel.run_id, round=message.round)
        self.endpoint.handle([heard])
