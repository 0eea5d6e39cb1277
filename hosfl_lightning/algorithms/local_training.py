"""Methods whose clients train on their own in a round; whole vectors are averaged at its end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor, nn

from hosfl_lightning.aggregation import AggregationRule
from hosfl_lightning.aggregation.weights import weights
from hosfl_lightning.algorithms.base import Algorithm, Runner
from hosfl_lightning.algorithms.crossing import download, taken, upload
from hosfl_lightning.clients import Cohort, FirstOrderClient
from hosfl_lightning.optim import Dense, Moments, UpdateRule, ZerothOrder
from hosfl_lightning.servers import SplitModule
from hosfl_lightning.wire import Weights


class LocalTraining(Algorithm):
    r"""``θ_k ← E local steps from θ;  θ ← θ + Σ_k w_k (θ_k − θ)``.

    The clients run one after the other. Each receives the shared weights, takes its steps with an optimizer state of
    its own, which stays with it, and sends its weights back. ``w_k`` counts the loss terms it has trained on. A client
    that was away misses nothing: it receives the weights when it is sampled again.

    Args:
        client_optimizer: As in `Algorithm`.
        client_scheduler: As in `Algorithm`.
        aggregation: As in `Algorithm`, over the clients' changes.
        local_steps: ``E``, minibatches and steps of a client in a round.
        checkpointing: Clients keep each layer's input instead of its graph and run it twice.

    Raises:
        ValueError: For a setting out of range.
    """

    joint = False
    records = False

    def __init__(
        self,
        client_optimizer: UpdateRule | None = None,
        client_scheduler: LRSchedulerCallable | None = None,
        aggregation: AggregationRule | None = None,
        local_steps: int = 1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(client_optimizer, client_scheduler, aggregation)
        if local_steps < 1:
            raise ValueError(f"trainer.algorithm: local_steps must be >= 1, got {local_steps}")
        self.local_steps, self.checkpointing = local_steps, checkpointing
        self.trained: dict[str, nn.Parameter] = {}
        self.moments: Moments

    def setup(self, module: SplitModule, seed: int, callbacks: list[Callback]) -> None:
        """As in `Algorithm`; each client keeps its own moments."""
        super().setup(module, seed, callbacks)
        self.trained = self.parameters(module)
        self.moments = Moments(self.client.optimizer)

    @abstractmethod
    def local_step(self, runner: Runner, round: int, step: int, cohort: Cohort) -> Tensor | None:
        """One step of one client on one minibatch.

        Args:
            runner: The server and the way to it.
            round: The round.
            step: The local step, 0 .. ``local_steps`` − 1.
            cohort: The client's minibatch, with a loss term.

        Returns:
            The training loss before the step, 0-d; None: the server refused the client.
        """

    def training_round(self, runner: Runner, round: int, cohorts: list[Cohort]) -> Tensor:
        """As in `Algorithm`; the loss is the mean over the loss terms of all local steps."""
        before, server = self.vector(), runner.server.state()
        try:
            shared, answers = before, list[Weights]()
            losses: list[tuple[Tensor, int]] = []
            for cohort in cohorts:
                answer = self.visit(runner, round, cohort, shared, losses)
                answers += answer
                shared = self.hand_on(shared, answer)
            runner.check_attendance(sum(answer.num_terms > 0 for answer in answers))
        except BaseException:
            self.load(before)
            self.moments.commit([])
            runner.server.put(*server)
            raise
        self.load(self.merge(before, answers))
        self.moments.commit(answer.client for answer in answers if answer.client is not None)
        self.end_round(runner)
        terms = sum(n for _, n in losses)
        return torch.stack([loss * (n / terms) for loss, n in losses]).sum()

    def visit(
        self, runner: Runner, round: int, cohort: Cohort, shared: Tensor, losses: list[tuple[Tensor, int]]
    ) -> list[Weights]:
        """Weights down, local steps, weights up; what the server takes of them: one message, or none.

        A client that is refused leaves nothing behind but what a shared server has learned from its earlier steps.
        """
        client = cohort.clients[0]
        self.load(self.content(runner.transport.down(self.message(round, client, shared))))
        own: list[tuple[Tensor, int]] = []
        with self.moments.of(client):
            for step in range(self.local_steps):
                minibatch = runner.minibatch(client, round * self.local_steps + step) if step else cohort
                if not minibatch.num_terms[0]:
                    continue
                loss = self.local_step(runner, round, step, minibatch)
                if loss is None:
                    return []
                own.append((loss, minibatch.num_terms[0]))
        answer = taken(runner, self.message(round, client, self.vector(), sum(n for _, n in own)))
        losses += own if answer else []
        return answer

    def hand_on(self, shared: Tensor, answer: Sequence[Weights]) -> Tensor:
        """What the next client begins with: as the others, the shared weights."""
        return shared

    def merge(self, before: Tensor, answers: Sequence[Weights]) -> Tensor:
        """``θ + Σ_k w_k (θ_k − θ)``."""
        return self.average(before, [self.content(a) for a in answers], [a.num_terms for a in answers])

    def average(self, before: Tensor, after: Sequence[Tensor], num_terms: Sequence[int]) -> Tensor:
        """`merge` of vectors; one without a loss term behind it does not count."""
        counted = [(vector, n) for vector, n in zip(after, num_terms) if n]
        changes = torch.stack([vector - before for vector, _ in counted])
        return before + self.aggregation(changes, weights([n for _, n in counted]))

    # ---- the weights as one vector

    def vector(self) -> Tensor:
        """What is trained, `flat`."""
        return flat(self.trained.values())

    @torch.no_grad()
    def load(self, vector: Tensor) -> None:
        """Put a `vector` in the place of what is trained."""
        for parameter, values in zip(self.trained.values(), parts(vector, self.trained.values())):
            parameter.copy_(values)
        torch.clear_autocast_cache()

    def message(self, round: int, client: int, vector: Tensor, num_terms: int = 0) -> Weights:
        """The weights in the dtypes that the client holds them in."""
        named = zip(self.trained.items(), parts(vector, self.trained.values()))
        return Weights(round, client, {name: values.to(p.dtype) for (name, p), values in named}, num_terms)

    def content(self, message: Weights) -> Tensor:
        """The `vector` of a `message`, whose names may come in another order."""
        return flat(message.tensors[name] for name in self.trained)

    def state_dict(self) -> dict[str, Any]:
        """As in `Algorithm`, and each client's moments."""
        return {**super().state_dict(), "moments": self.moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        super().load_state_dict(state)
        self.moments.load_state_dict(state["moments"])


class LocalSplitTraining(LocalTraining):
    r"""Local steps through the cut: ``z`` up, one server step, ``λ`` down, ``θ_k ← rule(θ_k, ∇⟨λ, f_c(x; θ_k)⟩)``."""

    client: FirstOrderClient

    def make_client(self, module: SplitModule, seed: int) -> FirstOrderClient:
        """A `FirstOrderClient`."""
        optimizer = ZerothOrder(module.client_parameters.items(), self.client_optimizer)
        return FirstOrderClient(module.client_half, optimizer, self.checkpointing)

    def local_step(self, runner: Runner, round: int, step: int, cohort: Cohort) -> Tensor | None:
        """As in `LocalTraining`; the server has moved when λ comes."""
        batch = runner.to_device(cohort.batch)
        with runner.autocast():
            anchor = self.client.forward(batch, cohort.rows)
        inbox = upload(runner, round, cohort, anchor.z, step)
        if not inbox:
            return None
        loss, [multipliers] = runner.server.backward([inbox], step)
        runner.server.step()
        multiplier = download(runner, cohort, anchor.z, inbox, multipliers)
        with runner.autocast():
            self._descend(batch, cohort, anchor, multiplier)
        return loss

    def rehearse(self, batch: dict[str, Tensor], cohort: Cohort, waiting: Callable[[], int]) -> int:
        """The local steps with a made-up λ."""
        held = 0
        for _ in range(self.local_steps):
            anchor = self.client.forward(batch, cohort.rows)
            held = waiting()
            self._descend(batch, cohort, anchor, torch.full_like(anchor.z, 1e-3))
        return held

    def _descend(self, batch: dict[str, Tensor], cohort: Cohort, anchor: Any, multiplier: Tensor) -> None:
        basis = Dense([p.numel() for p in self.client.optimizer.parameters])
        values = self.client.answer(batch, anchor, multiplier, cohort.rows, basis)
        self.client.optimizer.record(values[0], basis)
        self.client.optimizer.step()


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """The tensors one after the other, ``(d,)`` fp32, a copy on the host, where the clients' answers meet."""
    return torch.cat([tensor.detach().reshape(-1).float().cpu() for tensor in tensors])


def parts(vector: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    """What `flat` has put together, in the shapes of ``like``."""
    shapes = list(like)
    return [values.view_as(one) for values, one in zip(vector.split([one.numel() for one in shapes]), shapes)]
