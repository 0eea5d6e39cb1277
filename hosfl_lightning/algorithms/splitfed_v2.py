"""SplitFed, second variant: one server half that all clients pass through in turn."""

from __future__ import annotations

from hosfl_lightning.algorithms.local_training import LocalSplitTraining


class SplitFedV2(LocalSplitTraining):
    r"""Clients in parallel, one shared server half, one client after the other; client halves averaged each round.

    ::

        for client k, step e:   θ_s ← rule(θ_s, ∂ℓ_k/∂θ_s),  λ = ∂ℓ_k/∂z;   θ_k ← rule(θ_k, ∇⟨λ, f_c(x; θ_k)⟩)
        all                     θ_c ← Σ_k w_k θ_k

    With LoRA on both halves this is SplitLoRA (arXiv 2407.00952). λ is the gradient at the server half that z was sent
    to, before its step. Clients pass in the order of their numbers.

    As HO-SFL reports SplitLoRA, accuracy on SST-2 / RTE: OPT-125M 87.5 / 57.8, Gemma-3-270M 90.3 / 59.6, LLaMA-3.2-1B
    94.4 / 70.0. As HERON-SFL does: 4.59 GB at the client for GPT2-medium on E2E, 3 clients; without LoRA, ResNet-18 on
    CIFAR-10, 5 clients: 710 MB and 391 GB of traffic.

    Reference: SplitFed, arXiv 2004.12088, SplitFedV2; HO-SFL, arXiv 2603.14773; HERON-SFL, arXiv 2601.09076.
    """
