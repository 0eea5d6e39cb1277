"""Clients without PyTorch in the server's process: exported halves, and every message as bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from typing_extensions import override

from hosfl_client import messages as frames
from hosfl_client.endpoint import Endpoint as DeviceEndpoint
from hosfl_client.half import OnnxHalf
from hosfl_client.minibatches import Minibatch
from hosfl_lightning.clients import Endpoint, Minibatches
from hosfl_lightning.clients.catch_up import state_digest
from hosfl_lightning.clients.cohort import Cohort
from hosfl_lightning.fleet import Channel, Fleet, Processes
from hosfl_lightning.fleet.member import Membership
from hosfl_lightning.wire import HELD_OUT, Message, RoundEnd, SmashedData, Terms, Update, decode, encode


class Device:
    """One client: an exported half with weights and session of its own, and the endpoint of ``hosfl-client``.

    Args:
        half: ``phone.onnx``.
        start: θ_c by name, in the place of what was exported.
        data: Makes the batches of client ``number``.
        number: Of the client.
        terms: Of the run, as bytes.
    """

    def __init__(self, half: Path, start: Mapping[str, Any], data: Minibatches, number: int, terms: bytes) -> None:
        self.half, self.number = OnnxHalf(half, threads=1), number
        for name, array in self.half.parameters().items():
            array[...] = start[name]
        told: Any = frames.decode(terms, "terms")
        self.seed, self.codec = told.seed, told.codecs["smashed_data"]

        def batch(round: int) -> Minibatch:
            return in_numpy(data([number], round))

        self.endpoint = DeviceEndpoint(self.half, self.half.manifest, batch, told)

    def handle(self, frame: bytes, run_id: bytes) -> list[bytes]:
        """The answers to a message."""
        answers = self.endpoint.handle([frames.decode(frame, run_id=run_id)])
        return [frames.encode(answer, run_id) for answer in answers]

    def hold_out(self, batch: Minibatch, round: int, number: int, run_id: bytes) -> bytes:
        """z of held-out data with its labels: what ``hosfl join`` answers a `HeldOutRequest` with."""
        z = self.half.forward(batch.inputs)
        sent = frames.SmashedData.pack(
            round, self.number, z, batch.labels, batch.mask(z.shape[1]), self.codec, self.seed, number, HELD_OUT
        )
        return frames.encode(sent, run_id)


class DeviceFleet(Fleet):
    """Each client is a `Device`; the server's replica of the client half is PyTorch's, in fp32, and moves with them.

    Args:
        replica: Hears what everybody hears.
        channel: Counts the messages.
        devices: By number.
        data: Whose validation set the devices are shown in `hold_out`.

    Attributes:
        scalars: Of updates along shared directions, what they carried, round after round.
    """

    def __init__(self, replica: Endpoint, channel: Channel, devices: Sequence[Device], data: Minibatches) -> None:
        super().__init__(channel, Processes())
        self.replica, self.devices, self.data = replica, devices, data
        self.scalars: list[float] = []

    @override
    def ask(self, requests: Mapping[int, Message], *expected: type[Message]) -> list[Any]:
        taken: list[Message] = []
        for client in self.own:
            if client in requests:
                request = self.channel.down(requests[client])
                [frame] = self.devices[client].handle(encode(request, self.channel.run_id), self.channel.run_id)
                taken += self.take(request, self._decoded(frame), expected)
        return taken

    @override
    def tell(self, message: Update | RoundEnd, clients: Sequence[int]) -> None:
        told = self.channel.down(message, receivers=len(clients))
        frame = encode(told, self.channel.run_id)
        for device in self.devices:
            device.handle(frame, self.channel.run_id)
        self.replica.handle([told])
        if isinstance(told, Update) and told.basis["kind"] == "shared_directions":
            self.scalars += told.coefficients.tolist()

    @override
    def abandon(self) -> None:
        self.replica.forget()
        for device in self.devices:
            device.endpoint.forget()

    @override
    def hold_out(self, round: int) -> Iterator[SmashedData]:
        """The one validation set, each batch through another device's half."""
        for number in range(self.data.held_out_batches):
            device = self.devices[number % len(self.devices)]
            batch = in_numpy(self.data.held_out([device.number], number))
            yield self._decoded(device.hold_out(batch, round, number, self.channel.run_id))

    def check_same(self) -> None:
        """All devices and the server's replica hold the same bits."""
        held = {device.endpoint.digest() for device in self.devices} | {state_digest(self.replica.client.optimizer)}
        if len(held) > 1:
            raise RuntimeError("the devices and the server's replica do not hold the same weights")

    def _decoded(self, frame: bytes) -> Any:
        return decode(frame, run_id=self.channel.run_id)


class Devices:
    """Stands where `hosfl_lightning.run.serving.Serving` stands in a run with clients on other machines.

    Args:
        half: ``phone.onnx``.
        trainer: Whose clients they are to be.
    """

    validate: Literal["both"] = "both"
    membership = Membership()

    def __init__(self, half: Path, trainer: Any) -> None:
        self.half, self.trainer = half, trainer

    def fleet(self, endpoint: Endpoint, channel: Channel, terms: Terms) -> DeviceFleet:
        """The clients, with θ_c as the server's replica has it."""
        start = {name: parameter.detach().numpy() for name, parameter in endpoint.trained.items()}
        data = Minibatches(self.trainer.datamodule, self.trainer.lightning_module)
        numbers = range(self.trainer.datamodule.num_clients)
        devices = [Device(self.half, start, data, number, encode(terms)) for number in numbers]
        return DeviceFleet(endpoint, channel, devices, data)


def in_numpy(cohort: Cohort) -> Minibatch:
    """A client's minibatch, in the arrays of a device."""
    batch = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in cohort.batch.items()}
    labels = batch.pop("labels")
    return Minibatch(batch, labels, sum(cohort.num_terms))
