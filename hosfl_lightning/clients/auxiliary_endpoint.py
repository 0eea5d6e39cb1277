"""Clients with an auxiliary head, and so with a loss of their own; their z goes to the server now and then."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from hosfl_lightning.clients.auxiliary import AuxiliaryClient, AuxiliaryHalf
from hosfl_lightning.clients.cohort import Batch, Cohort
from hosfl_lightning.clients.local_endpoint import LocalEndpoint, Steps, mean_loss
from hosfl_lightning.optim import LocalWalk, SharedDirections, ZerothOrder
from hosfl_lightning.wire import Message, Multiplier, ProjectedGradients, StepRequest


class AuxiliaryEndpoint(LocalEndpoint):
    r"""``Weights →`` steps on ``F(θ)``, every k-th z up ``→ Weights``; a λ that comes for z aligns the head to it.

    | setting | meaning |
    |---|---|
    | ``local_steps, checkpointing`` | as in `LocalEndpoint` |
    | ``upload_every`` | ``k`` |
    | ``auxiliary_blocks`` | server blocks in the head |
    | ``align_steps, align_lr`` | of an alignment |
    """

    client: AuxiliaryClient
    needs = "whole"  # its head is a copy of server layers

    @staticmethod
    @override
    def hold(model: Any, settings: dict[str, Any]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """The layers before the cut and a head of its own; θ_c is trained, then θ_a under ``auxiliary.``."""
        head = model.auxiliary_head(settings["auxiliary_blocks"])
        own = {f"auxiliary.{name}": p for name, p in head.named_parameters() if p.requires_grad}
        return AuxiliaryHalf(model.client_half, head), {**model.client_parameters, **own}

    @override
    def make_client(self, half: Any) -> AuxiliaryClient:
        optimizer = ZerothOrder(self.trained.items(), self.rule)
        return AuxiliaryClient(half, optimizer, self.model.loss, checkpointing=self.terms.settings["checkpointing"])

    @override
    def local_step(self, request: Any, step: int, cohort: Cohort, batch: Batch) -> Steps:
        settings = self.terms.settings
        with self.fabric.autocast():
            z, loss = self.client.forward(batch)
            self.client.backward(loss)  # before it waits, so that no graph does
        reply = yield from self.send(request, step, cohort, z)
        if isinstance(reply, Multiplier):
            multiplier = cohort.multiplier(z, [reply])
            with self.fabric.autocast():
                self.client.align(batch, z, multiplier, settings["align_steps"], settings["align_lr"])
        return loss.detach()

    def send(self, request: Any, step: int, cohort: Cohort, z: torch.Tensor) -> Generator[Message, Any, Any]:
        """z goes up where it is due; the server's reply."""
        if (request.round * self.local_steps + step) % self.terms.settings["upload_every"]:
            return None
        return (yield self.smashed(cohort, z, request, step)[0])

    @override
    def state_dict(self) -> dict[str, Any]:
        """The optimizer, each client's moments, and θ_a."""
        held = {name: p.detach().clone() for name, p in self.trained.items() if name.startswith("auxiliary.")}
        return {**super().state_dict(), "auxiliary": held}

    @override
    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name, tensor in state["auxiliary"].items():
            self.trained[name].copy_(tensor)


class SphereEndpoint(AuxiliaryEndpoint):
    r"""The same by forwards alone, along directions on the unit sphere.

    With ``scalars`` a round begins with a ``StepRequest`` and ends with ``ProjectedGradients``; θ is then where it was.

    | setting | meaning |
    |---|---|
    | ``probes, mu`` | directions of a local step, and how far along them |
    | ``scalars`` | coefficients along shared directions in the place of weights |
    """

    @override
    def make_client(self, half: Any) -> AuxiliaryClient:
        settings = self.terms.settings
        optimizer = ZerothOrder(
            self.trained.items(), self.rule, module=half, probes=settings["probes"], mu=settings["mu"],
            distribution="gauss16", seed=self.terms.seed,
        )  # fmt: skip
        return AuxiliaryClient(half, optimizer, self.model.loss, backprop=False)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._walk: LocalWalk | None = None

    @override
    def begins(self, request: Message) -> bool:
        scalars = self.terms.settings["scalars"]
        return isinstance(request, StepRequest) and request.step == 0 if scalars else super().begins(request)

    @override
    def walk(self, request: Any) -> Generator[Message, Any, None]:
        if not self.terms.settings["scalars"]:
            yield from super().walk(request)
            return
        losses: list[tuple[torch.Tensor, int]] = []
        self.prescribed(request)
        with LocalWalk(self.client.optimizer, self.directions(request.round), self.local_steps) as self._walk:
            terms, examples = yield from self.steps(request, request.client, losses)
        yield ProjectedGradients(
            request.round, request.client, self._walk.basis.describe(), self._walk.coefficients, terms,
            request.attempt, loss=mean_loss(losses) or 0.0, num_examples=examples,
        )  # fmt: skip

    @override
    def local_step(self, request: Any, step: int, cohort: Cohort, batch: Batch) -> Steps:
        with self.fabric.autocast():
            z, loss = self.client.forward(batch)
        sending = self.send(request, step, cohort, z)
        del z  # the server has it
        yield from sending
        with self.fabric.autocast():
            self.descend(request, step, batch, loss)
        return loss

    def descend(self, request: Any, step: int, batch: Batch, loss: torch.Tensor) -> None:
        """``θ ← rule(θ, ĝ)`` where ``loss`` is ``F(θ)``."""
        settings = self.terms.settings
        client = None if settings["scalars"] else request.client
        directions = self.directions(request.round, client).part(step * settings["probes"], settings["probes"])
        values = self.client.probe(batch, loss, directions, settings["mu"])
        if settings["scalars"]:
            assert self._walk is not None
            self._walk.move(step, values)
            return
        self.client.optimizer.record(values, directions)
        self.client.optimizer.step()

    def directions(self, round: int, client: int | None = None) -> SharedDirections:
        """Of all local steps of the round, ``P`` each: those that all share, or a client's own."""
        shared = self.client.optimizer.basis(round, self.local_steps * self.terms.settings["probes"])
        return shared if client is None else shared.of_client(client)
