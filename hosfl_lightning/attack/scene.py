"""What the attacker holds, and the truth that only scores it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hosfl_lightning.aggregation import apply_update, recorded
from hosfl_lightning.attack.score import NotApplicableError
from hosfl_lightning.callbacks.keep_messages import Kept, KeptError
from hosfl_lightning.clients.cohort import Minibatches
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.models import SplitModule
from hosfl_lightning.run.rebuild import rebuild
from hosfl_lightning.server.replay_log import ReplayLog
from hosfl_lightning.wire import HELD_OUT, Coded
from hosfl_lightning.wire.padding import unpack_rows


@dataclass
class Crossing:
    """One minibatch of one client as it crossed, and what it was.

    Attributes:
        round: Of the run.
        client: Its number.
        codec: In what z travelled.
        z: ``(B, S, h)``.
        mask: ``(B, S)`` bool.
        labels: As they travelled, int64; None: they did not.
        multipliers: Gradients by z that crossed for it, ``(B, S, h)``, by the direction and name of their field.
        middle: ``z₂ (B, S, h)``, where the server sent it; None: it has the head.
        truth: The recipe's batch: ``input_ids`` or ``pixel_values``, and ``labels``.
    """

    round: int
    client: int
    codec: str
    z: Tensor
    mask: Tensor
    labels: Tensor | None
    multipliers: dict[str, Tensor]
    middle: Tensor | None
    truth: dict[str, Tensor]


@dataclass
class Scene:
    """One run, as an attack sees it.

    Args:
        model: As it began; its client half can be put to where it was in a round.
        data: Set up. Its clients' examples are the truth; the held-out ones stand for text or images that anybody has.
        rounds: Kept messages, by round.
        log: The update log; None: the run wrote none.
        autocast: Opens the run's precision.
        sampled: Examples that an attack takes at most.
        algorithm: The run's.
        trained: Parameters that the log's updates move, by name.
        run: The run's folder.
        seed: The run's, of its directions.
    """

    model: SplitModule
    data: FederatedDataModule
    rounds: dict[int, list[Kept]]
    log: ReplayLog | None
    autocast: Callable[[], AbstractContextManager[Any]]
    sampled: int
    algorithm: Any
    trained: dict[str, nn.Parameter]
    run: Path
    seed: int

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.start = {name: p.detach().clone() for name, p in self.trained.items()}
        self.halves: dict[int, dict[str, Tensor]] = {}
        self.halves = dict(self._replay())
        self.batches = Minibatches(self.data, self.model)
        self.crossings = [one for number, kept in self.rounds.items() for one in self._crossings(number, kept)]

    def put_client(self, round: int) -> None:
        """θ_c as it was when the round began: of the log, or of the start where there is none."""
        held = self.halves.get(round, self.start)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(held[name])

    def seen(self) -> Iterator[tuple[Crossing, slice]]:
        """Crossings with the examples to take of each, as many as are to be sampled in all; θ_c is put to their round.

        Raises:
            NotApplicableError: No z crossed.
        """
        left = self.sampled
        for one in self.crossings:
            if left <= 0:
                return
            self.put_client(one.round)
            yield one, slice(0, min(left, len(one.z)))
            left -= len(one.z)
        if not self.crossings:
            raise NotApplicableError("no smashed data crossed in the kept rounds")

    def trained_on(self) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """Round, client and recipe's batch of whoever answered in a kept round; of as many examples as are sampled."""
        left = self.sampled
        for round, kept in self.rounds.items():
            clients = {
                one.message.client: None for one in kept if one.direction == "up" and self._in_round(one.message)
            }
            for client in clients:
                if left <= 0:
                    return
                batch = {name: tensor[:left] for name, tensor in self._batch(round, client).items()}
                left -= len(batch["labels"])
                yield round, client, batch

    def public(self) -> dict[str, Tensor]:
        """Held-out examples as a batch: what anybody can have of the same kind."""
        return self.data.collate(self.data.validation_set[: max(self.sampled, 16)])

    def _replay(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """θ_c before each kept round."""
        if self.log is None or not self.trained:
            return
        optimizer = rebuild(self.model, self.trained, self.log, 0, self.algorithm)
        run_id = bytes.fromhex(self.log.starts[0]["run_id"])
        for round, frame in enumerate(self.log.frames(0, min(self.log.rounds, max(self.rounds) + 1))):
            yield round, {name: p.detach().clone() for name, p in self.trained.items()}
            apply_update(recorded(frame, run_id), optimizer)
        self.put_client(-1)

    def _crossings(self, round: int, kept: list[Kept]) -> Iterator[Crossing]:
        messages = [one for one in kept if self._in_round(one.message)]
        last = {self._place(one.message): one.message for one in messages if self._is_smashed(one)}
        for (client, step), message in last.items():
            truth = self._batch(round, client, step)
            mask = message.mask
            if not torch.equal(mask, truth["attention_mask"].bool().cpu()):
                raise KeptError(
                    f"{self.run}: client {client} sent other examples in round {round} than its recipe deals it, so "
                    "there is no truth to score by; attack a run whose clients' data is the recipe's"
                )
            labels = message.unpack_labels() if getattr(message, "labels", None) is not None else None
            about = [one for one in messages if self._place(one.message) == (client, step)]
            about = [one for one in about if one.message.attempt == message.attempt]
            sent = {f"{one.direction} {name}": self._rows(coded, mask) for one in about
                    for name, coded in _coded(one.message)}  # fmt: skip
            z, middle = sent.pop("up z"), sent.pop("down z", None)
            yield Crossing(round, client, message.z.codec, z, mask.to(self.device), labels, sent, middle, truth)

    def _batch(self, round: int, client: int, step: int = 0) -> dict[str, Tensor]:
        dealt = self.batches([client], round * self.algorithm.local_steps + step).batch
        return {name: tensor.to(self.device) for name, tensor in dealt.items()}

    @staticmethod
    def _in_round(message: Any) -> bool:
        return hasattr(message, "client") and getattr(message, "attempt", HELD_OUT) != HELD_OUT

    @staticmethod
    def _is_smashed(one: Kept) -> bool:
        return one.direction == "up" and hasattr(one.message, "z") and hasattr(one.message, "mask")

    @staticmethod
    def _place(message: Any) -> tuple[int, int]:
        return getattr(message, "client", -1), getattr(message, "step", 0)

    def _rows(self, coded: Coded, mask: Tensor) -> Tensor:
        return unpack_rows("attack", coded, mask).float().to(self.device)


def _coded(message: Any) -> Iterator[tuple[str, Coded]]:
    """What it holds with a row a token."""
    for field in fields(message):
        value = getattr(message, field.name)
        if isinstance(value, Coded) and field.name != "coefficients":
            yield field.name, value
