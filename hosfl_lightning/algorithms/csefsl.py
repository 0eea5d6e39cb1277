"""CSE-FSL: clients backpropagate through an auxiliary head of their own."""

from __future__ import annotations

from hosfl_lightning.algorithms.auxiliary_training import AuxiliaryTraining


class CSEFSL(AuxiliaryTraining):
    r"""Communication- and storage-efficient split learning: the exact gradient of the clients' own loss.

    ::

        client k, step e   θ_k ← rule(θ_k, ∇F(θ_k)),   θ = (θ_c, θ_a)
        every k-th step    z goes up;  θ_s ← rule(θ_s, ∂ℓ/∂θ_s)
        all                θ ← Σ_k w_k θ_k

    The server holds one half, whatever the number of clients, and sends no λ. In
    HERON-SFL's comparison (ResNet-18 on CIFAR-10, 5 clients) a client peaks at 726 MB and the traffic is 259 GB.

    Reference: Y. Mu, C. Shen, "Communication and storage efficient federated split learning", arXiv 2302.05599.
    """
