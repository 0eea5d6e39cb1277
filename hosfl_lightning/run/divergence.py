"""A run whose numbers are no numbers any more: which half, since when, what to lower, and what is left of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hosfl_lightning.run.checkpoint import whole

#: What of a client's answers says that they overflowed: NaN, infinity, or a size that no half in order has.
OVERFLOW = ("NaN or infinite", "beyond ±", " is nan", " is inf", " is -inf")
CLIENT_RATE = "trainer.algorithm.init_args.client_optimizer.lr"
#: By how the server trains.
SERVER_RATE = {"first": "model.init_args.optimizer.lr", "zeroth": "trainer.algorithm.init_args.server_optimizer.lr"}


class DivergedError(RuntimeError):
    """A half holds, or gives, NaN or infinity."""


def diverged_half(trainer: Any, clients: list[int], refused: Mapping[int, str]) -> str | None:
    """Which half has diverged, after a round of which nobody's answer could be taken; None: neither.

    Args:
        trainer: A `hosfl_lightning.run.face.TrainerFace`.
        clients: Who was asked.
        refused: Why each of them was refused.
    """
    if not_finite(trainer.server.replica.trained.values()):
        return "client"
    if not_finite(trainer.lightning_module.server_parameters.values()):
        return "server"
    overflowed = [k for k in clients if any(sign in refused.get(k, "") for sign in OVERFLOW)]
    return "client" if clients and len(overflowed) == len(clients) else None


def not_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether there is NaN or infinity in any of them."""
    return any(not bool(tensor.detach().isfinite().all()) for tensor in tensors)


def diverged(trainer: Any, half: str, round: int, evidence: str) -> DivergedError:
    """The error: since when, what to lower, and the last checkpoint of before.

    Args:
        trainer: As above.
        half: ``client`` or ``server``.
        round: Which could not be run.
        evidence: What was seen.
    """
    since = f"since the update of round {round - 1}" if round else "from the start"
    sound = _last_sound(Path(trainer.log_dir), round)
    left = f"the last sound checkpoint is {sound}" if sound is not None else "no checkpoint of before is kept"
    rate = CLIENT_RATE if half == "client" else SERVER_RATE.get(trainer.algorithm.server_order, CLIENT_RATE)
    return DivergedError(
        f"round {round}: the {half} half is not finite, or out of all bounds, {since} ({evidence}); lower {rate} and "
        f"begin anew; {left}"
    )


def _last_sound(folder: Path, round: int) -> str | None:
    """The last checkpoint of before the update that did it."""
    found = [
        (checkpoint["global_step"], file)
        for file, checkpoint in whole(folder)
        if checkpoint["global_step"] < max(round, 1) and not not_finite(checkpoint["state_dict"].values())
    ]
    last = max(found, default=None)
    return None if last is None else f"{last[1]} (round {last[0]}; hosfl validate, test and export take it)"
