"""SplitFed, second variant: one server half that all clients pass through in turn."""

from __future__ import annotations

from hosfl_lightning.algorithms.local_training import LocalSplitTraining


class SplitFedV2(LocalSplitTraining):
    r"""Clients in parallel, one shared server half, one client after the other; client halves averaged each round.

    ::

        for client k, step e:   θ_s ← rule(θ_s, ∂ℓ_k/∂θ_s),  λ = ∂ℓ_k/∂z;   θ_k ← rule(θ_k, ∇⟨λ, f_c(x; θ_k)⟩)
        all                     θ_c ← Σ_k w_k θ_k

    With LoRA on both halves this is SplitLoRA (arXiv 2407.00952). λ is the gradient at the server half that z was sent
    to, before its step. Arguments as in `LocalTraining`.

    Reference: SplitFed, arXiv 2004.12088, SplitFedV2.
    """
