"""Who is heard in a round: answers that no rule can use are refused by name, and the round goes on with the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hosfl_lightning.optim import Basis
from hosfl_lightning.wire import ProjectedGradients

#: Largest magnitude of a coefficient. Real ones are about the norm of a gradient; one of 1e6 says that a probe with a
#: smoothing length of 1e-3 changes the loss by 1,000 nats, where no derivative means anything.
LIMIT = 1e6


def screen(
    answers: Sequence[ProjectedGradients], round: int, basis: Basis | Mapping[int, Basis | None], limit: float = LIMIT
) -> tuple[list[ProjectedGradients], dict[int, str]]:
    """Tell the answers that can be aggregated from those that cannot; nothing raises.

    Args:
        answers: Of a round, one a client.
        round: The round.
        basis: In what the clients were asked to answer, all or each; None: it was not asked.
        limit: Largest magnitude of a coefficient, > 0.

    Returns:
        The answers to aggregate, in the order given, and for every other client the reason in words, such as
        ``"coefficient 1 is nan"``.
    """
    valid: list[ProjectedGradients] = []
    refused: dict[int, str] = {}
    for answer in answers:
        asked = basis if isinstance(basis, Basis) else basis.get(answer.client)
        reason = _objection(answer, round, asked, limit)
        if reason is None:
            valid.append(answer)
        else:
            refused[answer.client] = reason
    return valid, refused


def _objection(answer: ProjectedGradients, round: int, basis: Basis | None, limit: float) -> str | None:
    if basis is None:
        return "it was not asked for an answer"
    if answer.round != round:
        return f"its answer is for round {answer.round}, this is round {round}"
    if answer.basis != basis.describe():
        return f"its answer is in the basis {answer.basis}, the round's is {basis.describe()}"
    if answer.coefficients.shape != (basis.size,):
        return f"it sent {list(answer.coefficients.shape)} coefficients, the round has [{basis.size}]"
    # Not `> limit`: that is false for nan.
    bad = torch.nonzero(~(answer.coefficients.abs() <= limit))
    if not len(bad):
        return None
    number = int(bad[0])
    value = answer.coefficients[number].item()
    return f"coefficient {number} is {value:g}" + (f", beyond ±{limit:g}" if abs(value) > limit else "")
