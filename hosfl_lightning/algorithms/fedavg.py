"""Federated averaging: the whole model at the clients, no cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from torch import Tensor

from hosfl_lightning.algorithms.base import Runner
from hosfl_lightning.algorithms.local_training import LocalTraining
from hosfl_lightning.clients import Cohort, ObjectiveClient, WholeModel
from hosfl_lightning.optim import ZerothOrder
from hosfl_lightning.servers import SplitModule


class FedAvg(LocalTraining):
    r"""Local steps of backprop on the whole model, full vectors averaged.

    ::

        for client k, step e:   θ_k ← rule(θ_k, ∇ℓ_k(f(x; θ_k), y))
        all                     θ ← Σ_k w_k θ_k,   θ = (θ_c, θ_s)

    With LoRA on both halves this is FedLoRA (FedIT, arXiv 2305.05644). Neither inputs nor labels nor smashed data leave
    a client. ``client_optimizer`` moves both halves; the model's own optimizer and schedule, the server's, are not
    used, and LoRA's dropout is off. Needs ``model.init_args.client_holds: whole``. Arguments as in `LocalTraining`.

    Reference: McMahan et al., Communication-efficient learning of deep networks from decentralized data,
    arXiv 1602.05629, algorithm 1.
    """

    client_holds: ClassVar[Literal["half", "whole"]] = "whole"
    server_order: ClassVar[Literal["first", "zeroth", "none"]] = "none"
    client: ObjectiveClient

    def make_client(self, module: SplitModule, seed: int) -> ObjectiveClient:
        """An `ObjectiveClient` over both halves."""
        optimizer = ZerothOrder(self.parameters(module).items(), self.client_optimizer)
        whole = WholeModel(module.client_half, module.server_half)
        return ObjectiveClient(whole, optimizer, module.loss, checkpointing=self.checkpointing)

    def local_step(self, runner: Runner, round: int, step: int, cohort: Cohort) -> Tensor:
        """As in `LocalTraining`; the server has no part in it."""
        batch = runner.to_device(cohort.batch)
        with runner.autocast():
            return self.client.descend(batch)

    def rehearse(self, batch: dict[str, Tensor], cohort: Cohort, waiting: Callable[[], int]) -> int:
        """The local steps; nobody waits."""
        for _ in range(self.local_steps):
            self.client.descend(batch)
        return 0
