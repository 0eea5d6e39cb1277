"""RandomSigns: the control whose clients answer as often and as much, and say nothing."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from typing import Any

from typing_extensions import override

from hosfl_lightning.callbacks.drop_in.trainer_check import refuse_no_rounds
from hosfl_lightning.callbacks.lagrangian_update import LagrangianUpdate
from hosfl_lightning.rng import Domain, Stream, direction
from hosfl_lightning.wire import ProjectedGradients


class RandomSigns(LagrangianUpdate):
    r"""``v_kp ← s_kp v_kp``, ``s_kp = ±1`` at random: step 4 with coefficients of the right size that carry no signal.

    In the place of `LagrangianUpdate`, whose keys it logs. What such a run gains on a frozen client is not learning: it
    is the noise of the updates, or of the seeds. Everything else of the run is as without it, the bytes that travel
    included.

    Example::

        trainer:
          callbacks: [hosfl_lightning.callbacks.RandomSigns]

    Args:
        seed: Another one draws other signs in the same run. They follow from it and from the run's seed, the round and
            the client.

    Raises:
        ValueError: At setup, in a Trainer without rounds.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a plain Trainer."""
        refuse_no_rounds(type(self).__name__, trainer)

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The run's seed is known now."""
        super().on_train_start(trainer, pl_module)
        # A key of its own: under the run's seed the signs could be those of a direction.
        named = f"random signs/{trainer.seed}/{self.seed}"
        self._key = int.from_bytes(blake2b(named.encode(), digest_size=8).digest(), "little")

    @override
    def on_answers(self, answers: list[ProjectedGradients]) -> list[ProjectedGradients]:
        """The coefficients as they arrived, each with a random sign."""
        return [replace(one, coefficients=one.coefficients * self._signs(one)) for one in answers]

    def _signs(self, answer: ProjectedGradients) -> Any:
        stream = Stream(self._key, Domain.RADEMACHER, answer.round, answer.client)
        return direction(stream, 0, 0, len(answer.coefficients), device=answer.coefficients.device)
