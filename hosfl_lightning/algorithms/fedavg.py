"""Federated averaging: the whole model at the clients, no cut."""

from __future__ import annotations

from hosfl_lightning.algorithms.local_training import LocalTraining
from hosfl_lightning.clients.local_endpoint import WholeEndpoint


class FedAvg(LocalTraining):
    r"""Local steps of backprop on the whole model, full vectors averaged.

    ::

        for client k, step e:   θ_k ← rule(θ_k, ∇ℓ_k(f(x; θ_k), y))
        all                     θ ← Σ_k w_k θ_k,   θ = (θ_c, θ_s)

    With LoRA on both halves this is FedLoRA (FedIT, arXiv 2305.05644). Neither inputs nor labels nor smashed data leave
    a client. ``client_optimizer`` moves both halves; the model's own optimizer and schedule, the server's, are not
    used, and LoRA's dropout is off. Needs ``model.init_args.client_holds: whole``.

    Reference: McMahan et al., Communication-efficient learning of deep networks from decentralized data,
    arXiv 1602.05629, algorithm 1.
    """

    endpoint = WholeEndpoint
    client_holds = "whole"
    server_order = "none"
