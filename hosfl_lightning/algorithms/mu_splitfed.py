"""MU-SplitFed: the server takes several steps on what a client sent, while the client is slow; forwards alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.algorithms.base import plain
from hosfl_lightning.algorithms.local_training import LocalTraining, Losses
from hosfl_lightning.clients.probed_endpoint import SIDES
from hosfl_lightning.clients.unbalanced_endpoint import UnbalancedEndpoint
from hosfl_lightning.clients.vectors import flat, parts
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.optim import SGD, SharedDirections, UpdateRule, ZerothOrder
from hosfl_lightning.optim.zeroth_order import check_probe_settings
from hosfl_lightning.server import Call, Outcome, Server
from hosfl_lightning.wire import Message, ProbedData, ProbeRequest, ProjectedGradients, SmashedData, Weights


class MUSplitFed(LocalTraining):
    r"""Unbalanced updates: ``τ`` zeroth-order steps of the server for one of the client, both halves averaged.

    ::

        for client k, from the shared θ_c and a copy θ_sk of θ_s, directions of its own:
            z = f_c(x; θ_c) goes up
            server   v_p = (ℓ(z; θ_sk + μ u_p^s) − ℓ(z; θ_sk − μ u_p^s)) / 2μ
                     θ_sk ← rule_s(θ_sk, (1/P) Σ_p v_p u_p^s),  τ times
            client   z_p± = f_c(x; θ_c ± μ u_p^c) go up,  v_p = (ℓ(z_p⁺; θ_sk) − ℓ(z_p⁻; θ_sk)) / 2μ comes down
                     θ_k ← rule_c(θ_c, (1/P) Σ_p v_p u_p^c)
        all          θ_c ← θ_c + η Σ_k w_k (θ_k − θ_c),   θ_s ← θ_s + η Σ_k w_k (θ_sk − θ_s)

    A client's ``2P + 1`` forwards are those of `HOSL`; between the first z and the probes the server has moved ``τ``
    times. Full vectors travel, as the paper has it. The server's rule begins without moments on each client's copy, the
    server's optimizer and its schedule are not used, and dropout is off. The training loss is the mean over both sides
    of the client's probes, after the server's steps. Weights ``w_k`` count loss terms; the paper takes 1/K.

    Its row in HO-SFL's comparison: SGD at both, 0.005 at the client, 0.01 at the server, ``η`` = 0.3, ``τ`` = 2, one
    Gaussian direction.

    Args:
        probes: ``P``, directions of a step.
        mu: ``μ``, smoothing length.
        distribution: Of the directions: ``rademacher`` or ``gauss16``.
        server_steps: ``τ``, steps of the server on one z.
        global_lr: ``η``, how far both halves go towards the mean.
        server_optimizer: Update rule on θ_s; None: SGD with learning rate 0.01.

    Raises:
        ValueError: For a setting out of range.

    Reference: Liang et al., Towards straggler-resilient split federated learning: an unbalanced update approach,
    arXiv 2510.21155; settings: HO-SFL, arXiv 2603.14773.
    """

    endpoint = UnbalancedEndpoint
    server_order = "zeroth"
    client_loss = False

    def __init__(
        self,
        probes: int = 1,
        mu: float = 1e-3,
        distribution: str = "gauss16",
        *,
        server_steps: int = 2,
        global_lr: float = 0.3,
        server_optimizer: UpdateRule | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(local_steps=1, checkpointing=False, **kwargs)
        check_probe_settings(probes, mu, "central", distribution)
        if not 1 <= server_steps <= 4096 // probes:
            raise ValueError(
                f"trainer.algorithm: server_steps must be between 1 and {4096 // probes}, so that a client's round has "
                f"at most 4096 directions of {probes} a step, got {server_steps}"
            )
        if not global_lr > 0:
            raise ValueError(f"trainer.algorithm: global_lr must be > 0, got {global_lr}")
        self.probes, self.mu, self.distribution = probes, mu, distribution
        self.server_steps, self.global_lr = server_steps, global_lr
        self.server_optimizer = server_optimizer if server_optimizer is not None else SGD(lr=0.01)
        self.server_rule: ZerothOrder
        self._start: list[Tensor] = []
        self._copies: list[tuple[Tensor, int]] = []

    @override
    def client_settings(self) -> dict[str, Any]:
        probes = {name: getattr(self, name) for name in ("probes", "mu", "distribution")}
        return {**super().client_settings(), **probes, "estimator": "central"}

    @override
    def settings(self) -> dict[str, Any]:
        """The probes' and the server's as well."""
        names = ("probes", "mu", "distribution", "server_steps", "global_lr")
        rule = {"name": type(self.server_optimizer).__name__, **self.server_optimizer.hyper_parameters()}
        return {
            **super().settings(),
            **{name: getattr(self, name) for name in names},
            **{f"server_optimizer.{name}": plain(value) for name, value in rule.items()},
        }

    @override
    def setup(self, server: Server) -> None:
        super().setup(server)
        module = server.module
        self.server_rule = ZerothOrder(
            module.server_parameters.items(), self.server_optimizer, module=module.server_half, probes=self.probes,
            mu=self.mu, estimator="central", distribution=self.distribution, seed=server.seed,
            first_tensor=len(server.replica.trained),
        )  # fmt: skip

    @override
    def server_round(self, server: Server, fleet: Fleet, call: Call) -> Outcome:
        """The server's half as the clients': a copy for each, and their mean."""
        self._start, self._copies = server.state()[0], []
        outcome = super().server_round(server, fleet, call)
        start = flat(self._start)
        vectors, terms = [vector for vector, _ in self._copies], [n for _, n in self._copies]
        shared = start + self.global_lr * (self.average(start, vectors, terms) - start)
        self._put(server, parts(shared, self._start))
        return outcome

    @override
    def visit(
        self, server: Server, fleet: Fleet, call: Call, client: int, shared: Tensor, losses: Losses
    ) -> list[Weights]:
        self._put(server, self._start)
        own: Losses = []
        request: Message = server.replica.message(shared, call.round, client, call.attempt)
        arrived: list[Any] = fleet.ask({client: request}, SmashedData, Weights)
        if arrived and isinstance(arrived[0], SmashedData):  # a client without a loss term has nothing to send
            arrived = self.answer(server, fleet, arrived[0], own)
        seen = sum(n for _, n in own)
        answers = [answer for answer in arrived if self.taken(server, fleet, client, answer, seen)]
        for answer in answers:
            losses += own
            self._copies.append((flat(server.module.server_parameters.values()), answer.num_terms))
        return answers

    def answer(self, server: Server, fleet: Fleet, message: SmashedData, losses: Losses) -> list[Weights]:
        """The server's ``τ`` steps on a client's z, then its probes, then its weights; nothing where it is refused."""
        inbox = server.admit_one(message)
        if inbox is None:
            return []
        round, client, attempt = message.round, message.client, message.attempt
        for step in range(self.server_steps):
            directions = self.directions(server, round, client).part(step * self.probes, self.probes)
            self.server_rule.record(
                self.server_rule.project(partial(server.loss, message), basis=directions), directions
            )
            self.server_rule.step()
        seen: list[Tensor] = []
        for probe, side in product(range(self.probes), range(len(SIDES))):
            request = ProbeRequest(round, client, probe, side, attempt)
            probed: list[ProbedData] = fleet.ask({client: request}, ProbedData)
            held = server.fitting([message.with_z(one.z) for one in probed])
            if not held:
                return []
            seen.append(server.loss(held[0]))
        at = torch.stack(seen).view(-1, 2).cpu()
        values = ((at[:, 0] - at[:, 1]) / (2 * server.client_rule.mu)).float()
        losses.append((at.mean(), inbox.num_terms[client]))
        basis = SharedDirections(server.seed, round, self.probes, self.distribution).describe()
        told = ProjectedGradients(round, client, basis, values, inbox.num_terms[client], attempt)
        return fleet.ask({client: told}, Weights)

    def directions(self, server: Server, round: int, client: int) -> SharedDirections:
        """Of the server's ``τ`` steps on a client's z; its tensors are numbered after the client's."""
        return self.server_rule.basis(round, self.server_steps * self.probes).of_client(client)

    @override
    def merge(self, server: Server, before: Tensor, answers: Sequence[Weights]) -> Tensor:
        """``θ + η Σ_k w_k (θ_k − θ)``."""
        return before + self.global_lr * (super().merge(server, before, answers) - before)

    def _put(self, server: Server, parameters: Sequence[Tensor]) -> None:
        server.put(parameters, server.optimizer.state_dict())
        self.server_rule.state.clear()
        for group in self.server_rule.param_groups:
            group["step"] = 0
