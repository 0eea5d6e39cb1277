"""A run whose numbers are no numbers any more: which half, since when, what to lower, and what is left of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.algorithms import TooFewClientsError
from hosfl_lightning.optim.growth import RUNAWAY, Growth, SilentProbes
from hosfl_lightning.run.checkpoint import whole
from hosfl_lightning.server import RoundWatcher
from hosfl_lightning.wire import Update, WireError

#: What of a client's answers says that they overflowed: NaN, infinity, or a size that no half in order has.
OVERFLOW = ("NaN or infinite", "beyond ±", " is nan", " is inf", " is -inf")
CLIENT_RATE = "trainer.algorithm.init_args.client_optimizer.lr"
#: By how the server trains.
SERVER_RATE = {"first": "model.init_args.optimizer.lr", "zeroth": "trainer.algorithm.init_args.server_optimizer.lr"}


class DivergedError(RuntimeError):
    """A half holds, or gives, NaN or infinity."""


#: How a run ends that diverges, and says nothing but that its rates do not bear it; anything else is a fault.
DIVERGED = (DivergedError, TooFewClientsError, WireError)


class Halves(RoundWatcher):
    """What each half was at the start, which tells the one that has run away from the one that it took along.

    Args:
        trainer: A `hosfl_lightning.run.face.TrainerFace`, its halves where the rounds begin.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.growth = {
            "client": Growth(trainer.server.replica.trained.values()),
            "server": Growth(trainer.lightning_module.server_parameters.values()),
        }
        self._probes = SilentProbes(self.growth["client"], "the client half", CLIENT_RATE)
        self._told: set[str] = set()

    @override
    def on_update(self, update: Update) -> None:
        """A control says nothing: the run itself is told of by then. Nor one whose server has run away, see `warn`."""
        silent = not bool(update.coefficients.any())
        if self.trainer.announces and not (silent and self.growth["server"].now() >= RUNAWAY):
            self._probes.saw(update.coefficients, update.round)

    def blamed(self, otherwise: str) -> str:
        """The half that is not finite, else the one that has grown by far, else ``otherwise``."""
        grown = {half: growth.now() for half, growth in self.growth.items()}
        half = max(grown, key=lambda one: grown[one])  # the client, where both are infinite
        return half if grown[half] >= RUNAWAY else otherwise

    def grown(self, half: str) -> str:
        """In words; of neither half: what may be the cause instead."""
        grown = self.growth[half].now()
        if RUNAWAY <= grown < float("inf"):
            return f"; its weights have grown {grown:.0e}-fold since the start"
        estimator = getattr(self.trainer.algorithm, "estimator", "")
        own = "" if isinstance(estimator, str) else f" and at what {type(estimator).__name__} returns"
        settled = grown < RUNAWAY and hasattr(self.trainer.algorithm, "mu")
        return f"; neither half has grown, so look at mu{own} too" if settled else ""

    def warn(self, round: int) -> None:
        """Of a half that goes on far from where it began, once; where the numbers are waited for anyway."""
        for half, growth in self.growth.items() if self.trainer.announces else ():
            grown = growth.now()
            if half not in self._told and grown >= RUNAWAY:
                how = f"has grown {grown:.0e}-fold since the start" if grown < float("inf") else "is not finite"
                rank_zero_warn(
                    f"round {round}: the {half} half {how}, it has probably diverged; lower "
                    f"{rate_of(self.trainer, half)}"
                )
                self._told.add(half)


def diverged_half(trainer: Any, halves: Halves, clients: list[int], refused: Mapping[int, str]) -> str | None:
    """Which half has diverged, after a round of which nobody's answer could be taken; None: neither.

    Args:
        trainer: As above.
        halves: Of the run.
        clients: Who was asked.
        refused: Why each of them was refused.
    """
    if not_finite(trainer.server.replica.trained.values()):
        return "client"
    if not_finite(trainer.lightning_module.server_parameters.values()):
        return "server"
    overflowed = [k for k in clients if any(sign in refused.get(k, "") for sign in OVERFLOW)]
    return halves.blamed("client") if clients and len(overflowed) == len(clients) else None


def rate_of(trainer: Any, half: str) -> str:
    """The setting of its learning rate."""
    return CLIENT_RATE if half == "client" else SERVER_RATE.get(trainer.algorithm.server_order, CLIENT_RATE)


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
    return DivergedError(
        f"round {round}: the {half} half is not finite, or out of all bounds, {since} ({evidence}); lower "
        f"{rate_of(trainer, half)} and begin anew; {left}"
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
