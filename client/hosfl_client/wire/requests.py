"""What the server asks of its clients where its last message does not say it already."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hosfl_client.wire.arrays import Arrays
from hosfl_client.wire.checks import check_counts, check_probe, check_settings
from hosfl_client.wire.errors import FieldError


@dataclass(frozen=True, eq=False)
class StepRequest:
    """Server to client k: begin this round, or go on with it at a local step.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        attempt: How often the round was repeated before, >= 0.
        step: Local step within the round, >= 0.
        rule: Name, learning rate and hyper-parameters of the rule that the client's own steps follow, as in an
            `Update`; empty where it takes none.
    """

    kind: ClassVar[str] = "step_request"
    round: int
    client: int
    attempt: int = 0
    step: int = 0
    rule: dict[str, Any] = field(default_factory=dict)

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, attempt=self.attempt, step=self.step)
        check_settings(self.kind, "rule", self.rule)


@dataclass(frozen=True, eq=False)
class ProbeRequest:
    """Server to client k: send z at θ_c + μ u_p, or at θ_c − μ u_p, of the batch of the round.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        probe: Index p of the direction, from 0 on.
        side: 0 for θ_c + μ u_p, 1 for θ_c − μ u_p.
        attempt: How often the round was repeated before, >= 0.
    """

    kind: ClassVar[str] = "probe_request"
    round: int
    client: int
    probe: int
    side: int
    attempt: int = 0

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, attempt=self.attempt)
        check_probe(self.kind, self.probe, self.side)


#: The attempt of what clients hold out: of no training, so that a late answer is not taken for one of the next round.
HELD_OUT = 1 << 20


@dataclass(frozen=True, eq=False)
class HeldOutRequest:
    """Server to client k: send z of a batch of the validation data that is yours; nothing comes back.

    Attributes:
        round: Rounds that are done, >= 0.
        client: Client number k, >= 0.
        step: Number of the batch, below `CatchUpRequest.held_out`; that of the answer.
        attempt: `HELD_OUT`.
    """

    kind: ClassVar[str] = "held_out_request"
    round: int
    client: int
    step: int
    attempt: int = HELD_OUT

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, step=self.step, attempt=self.attempt)


@dataclass(frozen=True, eq=False)
class RoundEnd:
    """Server to those it asked: an attempt of a round that makes no `Update` is over.

    Attributes:
        round: Round number, >= 0.
        counted: The clients whose part in it counts; nobody's where the attempt has failed.
        attempt: How often the round was repeated before, >= 0.
    """

    kind: ClassVar[str] = "round_end"
    round: int
    counted: list[int]
    attempt: int = 0

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types are as stated above."""
        check_counts(self.kind, round=self.round, attempt=self.attempt)
        if not isinstance(self.counted, list):
            raise FieldError(f"{self.kind}: counted must be a list, got {self.counted!r:.80}")
        for client in self.counted:
            check_counts(self.kind, counted=client)
