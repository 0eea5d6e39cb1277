"""The upper control: the client backpropagates, gradients are averaged every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from hosfl_lightning.algorithms.personal_round import PersonalRound
from hosfl_lightning.optim import Basis, Dense
from hosfl_lightning.split.personal import PersonalPart


class SplitFedSGD(PersonalRound):
    """The same rounds with each client's exact gradient, averaged every step: ``θ_c ← rule(θ_c, Σ_k w_k g_k)``.

    Args:
        checkpointing: Clients keep each layer's input instead of its graph and run it twice.
        personal: As in `PersonalRound`: true, or a word for a part, stays with its client, moved by its own ``g_k``.

    Reference: SplitFed, arXiv 2004.12088, gradients instead of weights averaged.
    """

    def __init__(
        self, *args: Any, checkpointing: bool = False, personal: bool | PersonalPart = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, personal=personal, **kwargs)
        self.checkpointing = checkpointing

    @override
    def client_settings(self) -> dict[str, Any]:
        return {"kind": "first_order", "checkpointing": self.checkpointing, **self.settings_of_personal}

    @override
    def basis(self, seed: int, round: int, sizes: Sequence[int]) -> Basis:
        """The dense gradient."""
        return Dense(sizes)
