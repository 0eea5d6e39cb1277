"""The kinds of messages of a run. A round's, in the order in which they travel:

    step 2   client k -> server   SmashedData          z_k, labels, valid-token mask
    step 3   server -> client k   Multiplier           λ_k = ∂ℓ_k/∂z_k
    step 4   client k -> server   ProjectedGradients   v_kp, p = 1..P
    step 5   server -> everybody  Update               v̄_p = Σ_k w_k v_kp, and the rule that applies it

and those of a client that comes back after missed rounds:

             client k -> server   CatchUpRequest       the version of θ_c that it holds
             server -> client k   Snapshot             θ_c and the optimizer's moments, where updates would not do

The server begins, and asks for what does not follow from its last message; a method sends some of these:

             server -> client k   StepRequest          begin the round, or go on at a local step of it
             server -> client k   ProbeRequest         z at one side of a probe
             server -> everybody  RoundEnd             whose part of a round without an Update counts
             client k -> server   Hello                when it joins: who it is
             server -> client k   Terms                then: all of a run that a client must know
             either way           Bye                  the end of a client's stream, and why
             server -> client k   HeldOutRequest       z of a batch of its validation data
             either way           Weights              full vectors, which the server averages
             client k -> server   ProbedData           z_k of one probe, which the server evaluates
             client k -> server   CodedGradient        ProjectedGradients whose coefficients have few bits each
             client k -> server   Acknowledgement      it has moved what is its own; in the place of step 4, without 5
             either way           `wire.secure`        in the place of step 4, where the server is to know the sum alone

Where the labels stay with the clients (``model.init_args.labels: client``) steps 2 and 3 are

    step 2   client k -> server   UnlabelledData       z₁, valid-token mask, n_k
             server -> client k   MiddleOutput         z₂ = f_s(z₁; θ_s)
    step 3   client k -> server   OutputMultiplier     λ₂ = ∂ℓ_k/∂z₂, and ℓ_k where it is reported
             server -> client k   Multiplier           λ_k = ∂ℓ_k/∂z₁

Every message of a round says in which attempt of it it was sent, so that a late answer is known as one.

Padding never travels: per-token tensors hold the n valid tokens only, row-major over the (B, S) positions where the
mask is True. A message holds what travels, rounded by its codec already, so that it means the same whether it is
serialised or handed over. Messages compare by identity, since tensors do not compare to one truth value.
"""

from __future__ import annotations

KINDS = (
    "smashed_data",
    "multiplier",
    "projected_gradients",
    "update",
    "catch_up_request",
    "snapshot",
    "weights",
    "probed_data",
    "coded_gradient",
    "step_request",
    "probe_request",
    "round_end",
    "terms",
    "hello",
    "bye",
    "held_out_request",
    "acknowledgement",
    "unlabelled_data",
    "middle_output",
    "output_multiplier",
    "secure_keys",
    "secure_peers",
    "secure_shares",
    "masked_gradients",
    "unmask_request",
)
"""The number of a kind in a frame is its place here, from 1 on."""
