"""GradientAlignment: how well the client's update points along the gradient, and what it is good for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from hosfl_lightning.aggregation.weights import weights
from hosfl_lightning.callbacks.round_callback import RoundCallback
from hosfl_lightning.clients import Client
from hosfl_lightning.optim import Basis, Beside
from hosfl_lightning.server import Inbox
from hosfl_lightning.wire import Multiplier, Update

Term = tuple[dict[str, Tensor], Tensor, int]
"""``x_k``, ``λ_k (B, S, h)`` and ``n_k`` of one client: its Lagrangian term is ``⟨λ_k, f_c(x_k; θ_c)⟩``."""


class GradientAlignment(RoundCallback):
    r"""Every n rounds ``g_k = ∇_{θ_c} ⟨λ_k, f_c(x_k; θ_c)⟩`` by backprop, beside the ``ĝ`` that is applied.

    With ``ḡ = Σ_k w_k g_k``, ``∇_s`` the server's gradient before clipping, and ``Δθ`` what each half's own step does:

    | logged key | meaning | unit |
    |---|---|---|
    | ``alignment/cosine`` | ``⟨ĝ, ḡ⟩ / ‖ĝ‖‖ḡ‖``; about ``√(P/d_c)`` of ``P`` random directions | – |
    | ``alignment/relative_norm`` | ``‖ĝ‖ / ‖ḡ‖`` | – |
    | ``alignment/noise_scale`` | ``Σ_k w_k ‖g_k‖² / ‖ḡ‖²``: 1 where all clients agree | – |
    | ``alignment/client_decrease`` | ``−⟨ḡ, Δθ_c⟩``, first-order decrease of the loss by the client's step | nats |
    | ``alignment/server_decrease`` | ``−⟨∇_s, Δθ_s⟩``, the same of the server's step | nats |
    | ``alignment/client_share`` | client / (client + server) decrease, of this round's batches | – |

    What is not defined is not logged: the cosine of a client that does not move, the share of a loss that no step
    lowers. The mean of such shares over rounds is noise: divide the sums of the decreases.

    For simulation: the measurement runs a client's backward, whose memory no client of the method has. The run itself
    stays as it is, to the bit, but for ``time/round_seconds`` and, on CUDA, ``memory/cuda_peak_bytes`` of such rounds.

    Args:
        every_n_rounds: Rounds ``n, 2n, …``, the first being round 1; a multiple of ``trainer.log_every_n_steps``, or
            rows are not written.

    Raises:
        ValueError: ``every_n_rounds`` is below 1; or at setup, in a run of several processes or without rounds.
    """

    needs = "multipliers"

    def __init__(self, every_n_rounds: int = 10) -> None:
        if every_n_rounds < 1:
            raise ValueError(f"GradientAlignment: every_n_rounds must be >= 1, got {every_n_rounds}")
        self.every_n_rounds = every_n_rounds
        self._figures: dict[str, float | None] = {}
        self._halves: list[Half] = []
        self._seen: list[tuple[Inbox, Mapping[int, Multiplier]]] = []  # of each group of the round
        self._update: Update | None = None

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a run in which the clients' gradients are not at hand."""
        if stage != "fit":
            return
        if not hasattr(trainer, "processes"):
            raise ValueError("GradientAlignment measures the rounds of an Orchestrator; remove it from this Trainer")
        if trainer.world_size > 1:
            raise ValueError(
                f"GradientAlignment needs the gradients of all clients in one process, and there are "
                f"{trainer.world_size}; set trainer.devices: 1 and trainer.num_nodes: 1, or remove it from "
                "trainer.callbacks"
            )

        if trainer.algorithm.personal:
            raise ValueError(
                "GradientAlignment measures the one step that all clients take, and with personal each takes its own; "
                "remove it from trainer.callbacks"
            )

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The clients of a simulation, and their data, are at hand."""
        self._trainer = trainer

    @override
    def on_multipliers(self, inbox: Inbox, multipliers: Mapping[int, Multiplier]) -> None:
        if self.due(self._trainer.global_step):
            self._seen.append((inbox, multipliers))
        self._update = None

    @override
    def on_update(self, update: Update) -> None:
        self._update = update

    @override
    def before_step(self) -> None:
        """Measure before either half moves; nothing of it is sent."""
        trainer, seen = self._trainer, self._seen
        if not seen:
            return
        self._seen = []
        with trainer.fabric.autocast():
            terms = [self._term(one, sent[one.client]) for inbox, sent in seen for one in inbox.messages]
            known = None
            if self._update is not None:
                basis = trainer.server.basis(self._update.round).of_clients(self._update.participants)
                known = of_half(basis, self._update.coefficients)
            server = [*trainer.lightning_module.server_parameters.values()]
            self.measure(trainer.endpoint.client, terms, server, known)

    def _term(self, message: Any, multiplier: Multiplier) -> Term:
        cohort = self._trainer.endpoint.data([message.client], message.round)
        batch = self._trainer.to_device(cohort.batch)
        return batch, multiplier.unpack(message.mask), cohort.num_terms[0]

    @override
    def forget(self) -> None:
        self._seen = []

    def due(self, round: int) -> bool:
        """Whether a round, counted from 0, is measured."""
        return (round + 1) % self.every_n_rounds == 0

    def measure(
        self, client: Client, terms: Sequence[Term], server: Sequence[nn.Parameter], update: tuple[Basis, Tensor] | None
    ) -> None:
        """Called when the update is known and neither half has moved.

        Args:
            client: Its half at θ_c.
            terms: Of the clients whose loss the server has in its gradient.
            server: θ_s, with ``∇_s`` in ``.grad``.
            update: ``ĝ``: a basis, and ``v̄ (basis.size,)`` in it; None: the client does not move.
        """
        parameters = client.optimizer.parameters
        total, square = [torch.zeros_like(p, dtype=torch.float64) for p in parameters], 0.0
        for (batch, multiplier, _), w in zip(terms, weights([n for _, _, n in terms])):
            own = client_gradient(client, batch, multiplier)
            square += w * inner(own, own)
            for part, gradient in zip(total, own):
                part += w * gradient.double()
        along, applied = against(parameters, update, total)
        norm = inner(total, total)
        self._figures = {
            "cosine": _ratio(along, math.sqrt(applied * norm)),
            "relative_norm": _ratio(math.sqrt(applied), math.sqrt(norm)),
            "noise_scale": _ratio(square, norm),
        }
        known = [(p, p.grad.clone()) for p in server if p.grad is not None]
        self._halves = [Half.now(zip(parameters, total)), Half.now(known)]

    @override
    def report(self, trainer: Any, pl_module: Any) -> None:
        """Both halves have moved: log what was measured."""
        if not self._halves:
            return
        client, server = (half.decrease() for half in self._halves)
        share = _ratio(client, client + server)
        self._figures |= {"client_decrease": client, "server_decrease": server, "client_share": share}
        for name, value in self._figures.items():
            if value is not None:
                pl_module.log(f"alignment/{name}", value)
        self._halves = []


@dataclass(frozen=True)
class Half:
    """What one half trains, as it was before its step, and the gradient of the loss there."""

    parameters: list[Tensor]
    before: list[Tensor]
    gradients: list[Tensor]

    @classmethod
    def now(cls, parts: Iterable[tuple[Tensor, Tensor]]) -> Half:
        """From parameters and their gradients, before the step."""
        parameters, gradients = map(list, zip(*parts))
        return cls(parameters, [p.detach().clone() for p in parameters], gradients)

    def decrease(self) -> float:
        """``−⟨∇, Δθ⟩``, after the step."""
        moved = [p.detach().double() - before.double() for p, before in zip(self.parameters, self.before)]
        return -inner(self.gradients, moved)


def client_gradient(client: Client, batch: dict[str, Tensor], multiplier: Tensor) -> Sequence[Tensor]:
    """``∂⟨λ, f_c(x; θ_c)⟩/∂θ_c`` by backprop through the half, tensor by tensor; of the client nothing changes.

    Args:
        client: Its half is in eval mode.
        batch: ``x``.
        multiplier: ``λ (B, S, h)``.
    """
    half: Any = client.half
    names = {id(p): name for name, p in half.named_parameters()}
    leaves = {names[id(p)]: p.detach().requires_grad_() for p in client.optimizer.parameters}
    with torch.enable_grad():
        z = functional_call(half, leaves, tuple(batch[name] for name in half.inputs))
    return torch.autograd.grad(z, list(leaves.values()), multiplier.to(z), materialize_grads=True)


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """``⟨a, b⟩`` over all tensors, in fp64."""
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def against(
    parameters: Sequence[Tensor], update: tuple[Basis, Tensor] | None, total: Sequence[Tensor]
) -> tuple[float, float]:
    """``⟨ĝ, ḡ⟩`` and ``‖ĝ‖²``, from ``ĝ`` piece by piece; arguments as of `GradientAlignment.measure`, and ``ḡ``."""
    along = square = 0.0
    if update is not None:
        basis, mean = update
        for tensor, piece, part in basis.chunks(parameters, mean.to(parameters[0].device, torch.float32)):
            along += inner([part], [total[tensor].view(-1)[piece]])
            square += inner([part], [part])
    return along, square


def of_half(basis: Basis, coefficients: Tensor) -> tuple[Basis, Tensor]:
    """Without what is of a head at the client, whose gradient stands beside."""
    return (basis.first, coefficients[: basis.first.size]) if isinstance(basis, Beside) else (basis, coefficients)


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
