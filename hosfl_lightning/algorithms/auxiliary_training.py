"""Methods whose clients have an auxiliary head, and with it a loss of their own."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from hosfl_lightning.algorithms.local_training import LocalTraining
from hosfl_lightning.clients.auxiliary_endpoint import AuxiliaryEndpoint


class AuxiliaryTraining(LocalTraining):
    r"""``θ = (θ_c, θ_a)`` descends ``F(θ) = ℓ(f_a(f_c(x; θ_c); θ_a), y)`` at the clients; the server trains on their z.

    ::

        client k, step e   z = f_c(x; θ_c);   θ_k ← rule(θ_k, an estimate of ∇F)
        every k-th step    z goes up;  θ_s ← rule(θ_s, ∂ℓ(f_s(z; θ_s), y)/∂θ_s), one client after the other
        all                θ ← θ + Σ_k w_k (θ_k − θ)

    Steps are counted over the rounds, and the first is one at which z goes up. No λ comes back. The training loss that
    is logged is the clients' F. The head is one linear layer on the pooled z for images; for language it is the
    server's first blocks, its norm and its unembedding, as they are when the run begins.

    Args:
        upload_every: ``k``.
        auxiliary_blocks: Server blocks in the head, 0 .. all that it holds.

    Raises:
        ValueError: For a setting out of range.
    """

    endpoint = AuxiliaryEndpoint

    def __init__(self, *args: Any, upload_every: int = 1, auxiliary_blocks: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if upload_every < 1:
            raise ValueError(f"trainer.algorithm: upload_every must be >= 1, got {upload_every}")
        self.upload_every, self.auxiliary_blocks = upload_every, auxiliary_blocks

    @override
    def client_settings(self) -> dict[str, Any]:
        own = {"upload_every": self.upload_every, "auxiliary_blocks": self.auxiliary_blocks}
        return {**super().client_settings(), **own}

    @override
    def due(self, round: int, step: int) -> bool:
        return (round * self.local_steps + step) % self.upload_every == 0

    @override
    def replied(self, round: int, step: int) -> bool:
        return False

    @override
    def settings(self) -> dict[str, Any]:
        """The head's as well."""
        own = {"upload_every": self.upload_every, "auxiliary_blocks": self.auxiliary_blocks}
        return {**super().settings(), **own}
