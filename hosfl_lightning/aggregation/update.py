"""The update record of a round: made from the answers, and applied again by anybody who holds the seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hosfl_lightning.aggregation.rules import AggregationRule, WeightedMean, aggregated
from hosfl_lightning.aggregation.weights import weights
from hosfl_lightning.optim import ZerothOrder, basis_of
from hosfl_lightning.wire import LIMIT, ProjectedGradients, Update, decode

MEAN: AggregationRule = WeightedMean()
"""The rule wherever none is given."""


class Prescribed(Protocol):
    """What an update record says of the rule that applies it."""

    @property
    def steps(self) -> int:
        """Steps taken."""

    @property
    def prescription(self) -> dict[str, Any]:
        """The rule's name and hyper-parameters now."""


class UpdateError(ValueError):
    """The record does not belong to the client that was to apply it."""


def combine(
    answers: Sequence[ProjectedGradients],
    optimizer: Prescribed,
    rule: AggregationRule = MEAN,
    mu: float | None = None,
) -> Update:
    """A round's answers as one update record.

    Args:
        answers: Of those who answered, in any order, all of one round and basis; w_k = n_k / Σ n over them.
        optimizer: Whose rule and hyper-parameters the record carries, one set for all groups; its next step is the
            record's. The server's replica of the clients', or in a plain Trainer the client's own.
        rule: How the coefficients become one vector.
        mu: Smoothing length as rounded, where there are probes.

    Returns:
        Who took part with which weights, v̄, and the rule with its learning rate: enough for `apply_update`.

    Raises:
        ValueError: No answer, none with a loss term, or a client whose coefficients are not finite: `screen` first.
    """
    answers = sorted(answers, key=lambda answer: answer.client)
    clients, num_terms = [answer.client for answer in answers], [answer.num_terms for answer in answers]
    basis, coefficients = summed(answers, weights(num_terms), rule)
    return update_of(answers[0].round, basis, coefficients, clients, num_terms, optimizer, mu)


def update_of(
    round: int,
    basis: dict[str, Any],
    mean: Tensor,
    clients: list[int],
    num_terms: Sequence[int],
    optimizer: Prescribed,
    mu: float | None = None,
) -> Update:
    """The update record of what the answers gave.

    Args:
        round: The round.
        basis: In what the coefficients are expressed, described.
        mean: v̄, (P,) float32.
        clients: Who took part, ascending.
        num_terms: Their n_k; one of them is not 0.
        optimizer: As in `combine`.
        mu: As in `combine`.
    """
    w = weights(num_terms)
    return Update(round, basis, mean, optimizer.prescription, optimizer.steps + 1, clients, w, mu)


def summed(
    answers: Sequence[ProjectedGradients], w: Sequence[float], rule: AggregationRule
) -> tuple[dict[str, Any], Tensor]:
    """Of answers in client order, a basis and coefficients in it: ``v̄_p``, or ``w_k v_kp`` of directions of their own.

    The mean of gradients along different directions is along all of them.
    """
    basis, rows = answers[0].basis, torch.stack([answer.coefficients for answer in answers])
    if basis.get("kind") != "client_directions":
        return basis, aggregated(rule, rows, w)
    own, beside = rows.tensor_split([basis["probes"]], dim=1)
    scaled = (own.double() * torch.tensor(w, dtype=torch.float64)[:, None]).float().flatten()
    mean = aggregated(rule, beside, w)  # of a head's gradient, which is along nobody's directions
    return {**basis, "clients": [answer.client for answer in answers]}, torch.cat([scaled, mean])


def recorded(frame: bytes, run_id: bytes) -> Update:
    """The update of a frame of the run's own log, which may be longer than what is taken from a wire.

    Raises:
        WireError: The frame is no update of this run.
    """
    return decode(frame, "update", run_id=run_id, limit=max(LIMIT, len(frame)))  # type: ignore[return-value]


def apply_update(update: Update, optimizer: ZerothOrder) -> None:
    """``θ ← rule(θ, Σ_p v̄_p b_p)`` with the hyper-parameters *of the record*: live, late or in a replay, the same bits.

    A client that was away for a while would else apply old rounds with today's learning rate.

    Args:
        update: What `combine` made, or its copy from a message or a log.
        optimizer: Of the same rule, with the run's seed, after ``update.step - 1`` steps. Left as it was if this
            raises.

    Raises:
        UpdateError: Another rule, settings that it does not take, or not the optimizer's next step.
        ValueError: A basis that is not known, or another number of coefficients than it has.
    """
    what = f"the update of round {update.round}"
    hyper_parameters = _hyper_parameters(update.rule, optimizer, what)
    missing = update.step - 1 - optimizer.steps
    if missing:
        raise UpdateError(
            f"{what} is step {update.step}, the client has taken {optimizer.steps}: "
            + (f"apply the {missing} missing before it, in order" if missing > 0 else "it was applied already")
        )
    sizes = [parameter.numel() for parameter in optimizer.parameters]
    basis = basis_of(update.basis, optimizer.param_groups[0]["seed"], update.round, sizes)
    optimizer.record(update.coefficients, basis)
    for group in optimizer.param_groups:
        group.update(hyper_parameters)
    optimizer.step()


def prescribe(optimizer: ZerothOrder, rule: Mapping[str, Any], what: str) -> None:
    """The steps to come follow what the server says of the rule: the learning rate of the round above all.

    Args:
        optimizer: A client's.
        rule: `ZerothOrder.prescription` of the server's, as a message carries it.
        what: The message, for the error.

    Raises:
        UpdateError: Another rule, or settings that it does not take.
    """
    hyper_parameters = _hyper_parameters(rule, optimizer, what)
    for group in optimizer.param_groups:
        group.update(hyper_parameters)


def _hyper_parameters(rule: Mapping[str, Any], optimizer: ZerothOrder, what: str) -> dict[str, object]:
    name, own = rule.get("name"), type(optimizer.rule).__name__
    if name != own:
        raise UpdateError(f"{what} is for the rule {name}, the client's optimizer is {own}")
    recorded: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in rule.items() if k != "name"}
    expected = optimizer.rule.hyper_parameters()
    if recorded.keys() != expected.keys():
        raise UpdateError(f"{what} has the settings {sorted(recorded)} of {own}, not {sorted(expected)}")
    for k, value in recorded.items():
        if not _alike(value, expected[k]):
            raise UpdateError(f"{what} has {k} = {value!r:.80}; {own} needs one like {expected[k]!r}")
    try:
        return type(optimizer.rule)(**recorded).hyper_parameters()
    except ValueError as error:
        raise UpdateError(f"{what}: {error}") from error


def _alike(value: object, own: object) -> bool:
    """Of one type, where integers and floats are numbers, finite, and tuples agree entry by entry."""
    if isinstance(own, tuple):
        return isinstance(value, tuple) and len(value) == len(own) and all(map(_alike, value, own))
    if isinstance(value, int | float) and isinstance(own, int | float):
        return isinstance(value, bool) == isinstance(own, bool) and math.isfinite(value)
    return type(value) is type(own)
