"""What the server takes of somebody's own model and method, checked where it comes in."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hosfl_lightning.models import SplitModule
from hosfl_lightning.parts import PartError
from hosfl_lightning.server.call import Outcome


def scalar_loss(module: SplitModule, output: Any, graph: bool = True) -> Tensor:
    """The loss of what ``training_step`` returns: a tensor, or a dictionary with ``loss``.

    Raises:
        PartError: It is no scalar, or has no graph where one is needed.
    """
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point() or (graph and not loss.requires_grad):
        raise PartError(
            f"model: {type(module).__name__}.training_step (loss) returned {_shown(loss)}; it returns the mean over "
            "the batch's loss terms, a tensor of shape () with a graph"
        )
    return loss


def counted(module: SplitModule, labels: Tensor) -> int:
    """``n``, of a client's labels.

    Raises:
        PartError: It is no number of loss terms.
    """
    terms: Any = module.count(labels)
    if type(terms) is not int or terms < 0:
        raise PartError(
            f"model: {type(module).__name__}.count returned {terms if terms is None else _shown(terms)}; it returns "
            "how many loss terms the labels have, an int >= 0 (int(...) of a tensor)"
        )
    return terms


def reached(module: SplitModule, gradient: Tensor | None) -> Tensor:
    """λ, which a backward has left at z.

    Raises:
        PartError: It has left none.
    """
    if gradient is None:
        raise PartError(
            f"model: the loss of {type(module).__name__}.training_step does not depend on batch['z'], the smashed "
            "data; it must run server_half on them, and detach nothing"
        )
    return gradient


def sound(method: str, outcome: Any) -> Outcome:
    """What a method's ``server_round`` returns.

    Raises:
        PartError: It is no `Outcome` of a loss and a number of examples.
    """
    loss = getattr(outcome, "loss", None)
    is_loss = (
        loss is None
        or isinstance(loss, float)
        or (isinstance(loss, Tensor) and not loss.dim() and not loss.requires_grad)
    )
    if not isinstance(outcome, Outcome) or not is_loss or type(outcome.num_examples) is not int:
        given = _shown(outcome) if not isinstance(outcome, Outcome) else f"a loss of {_shown(loss)}"
        raise PartError(
            f"trainer.algorithm: {method}.server_round returned {given}; it returns hosfl_lightning.server.Outcome("
            "loss, num_examples): the round's mean loss, a float or a detached tensor of shape (), or None, and an "
            "int"
        )
    return outcome


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r:.60}"
    return f"a tensor of shape {tuple(value.shape)}, {value.dtype}" + (", with a graph" if value.requires_grad else "")
