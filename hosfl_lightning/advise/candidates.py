"""The clients that a recipe's model could have, in place of the one it names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from hosfl_lightning.advise.simulated import ByBackprop
from hosfl_lightning.algorithms import HOSFL, Algorithm, Frozen, SplitFedSGD
from hosfl_lightning.models import SplitModule
from hosfl_lightning.models.another_client import with_client
from hosfl_lightning.optim import AdamW, Uncompressed, UpdateRule
from hosfl_lightning.split import LoraHalf
from hosfl_lightning.split.client_parameters import ClientParameters

#: Width of a side adapter where neither half of the recipe has one, and directions where it probes none.
WIDTH, PROBES = 16, 8
#: Values of a gradient that fit into 4 KiB in ternary, 1.75 bits each.
IN_TERNARY = int(4096 * 8 / 1.75)


@dataclass(frozen=True)
class Candidate:
    """A client that could be taken.

    Attributes:
        name: In the table.
        make: Its model, its client half as it starts; a `SplitError` or ValueError where it can have none.
        algorithm: Its method.
        gradient: In what its gradient travels.
    """

    name: str
    make: Callable[[], SplitModule]
    algorithm: Algorithm
    gradient: str = "fp32"

    @property
    def backprop(self) -> bool:
        """Whether the client backpropagates through its half."""
        return isinstance(self.algorithm, SplitFedSGD)

    @property
    def probes(self) -> int | None:
        """``P`` of a client that probes; None: it does not."""
        method = self.algorithm
        return method.probes if isinstance(method, HOSFL) and method.estimator != "local" else None

    @property
    def in_trial(self) -> Algorithm:
        """Its method in a trial: of probes the scalars as backprop knows them."""
        if isinstance(self.algorithm, HOSFL) and self.probes is not None:
            return ByBackprop(self.algorithm)
        return self.algorithm


def comparable(method: Algorithm) -> bool:
    """Whether a round is one minibatch a client and one step of a server that backpropagates."""
    return method.local_steps == 1 and method.joint and method.server_order == "first"


def candidates(model: SplitModule, method: Algorithm, gradient: str = "fp32") -> Iterator[Candidate]:
    """The recipe's own client, then those of other parameters or of another gradient; the dearest last.

    What knows its gradient takes the recipe's ``first_order_optimizer``, where it has one, else ``client_optimizer``,
    which is also that of what probes.

    Args:
        model: The recipe's.
        method: The recipe's.
        gradient: The recipe's ``trainer.codec.gradient``.
    """
    probing = isinstance(method, HOSFL) and method.estimator != "local"
    probes = method.probes if isinstance(method, HOSFL) and probing else PROBES
    exact: UpdateRule = getattr(method, "first_order_optimizer", None) or method.client_optimizer
    if method.client_trains and comparable(method):
        told = f", P = {probes}" if probing else ""
        yield Candidate(f"the recipe's, {method.name}{told}", lambda: model, method, gradient)
    words: tuple[ClientParameters, ...] = ("norm", "first_layer")
    for word in words:
        if word != model.trains_at_client or not probing:
            scalars = HOSFL(probes, client_optimizer=method.client_optimizer)
            name = f"{word.replace('_', ' ')}, P = {probes}"
            yield Candidate(name, partial(with_client, model, None, 0, word), scalars)
    width = (model.side.client or model.side.server) if model.side is not None else WIDTH
    own_side = isinstance(method, HOSFL) and not probing
    for codec in ("fp32", "int4", "ternary"):
        if not own_side or codec != gradient:
            known = HOSFL(estimator="local", compression=Uncompressed(), client_optimizer=exact)
            make = narrow if codec == "ternary" else with_side
            yield Candidate(f"side adapter, {_told(codec)}", partial(make, model, width), known, codec)
    everything = LoraHalf(r=8, alpha=16, target_modules="all-linear") if model.lora is not None else None
    name = "backprop, LoRA on all projections" if everything is not None else "backprop, all weights"
    yield Candidate(name, partial(with_client, model, everything, 0), SplitFedSGD(exact))


def frozen(method: Algorithm) -> Frozen:
    """The client that does nothing."""
    return Frozen(method.client_optimizer if method.client_trains else AdamW())


def with_side(model: SplitModule, width: int) -> SplitModule:
    """The model with a side adapter alone at its client."""
    return with_client(model, None, width)


def narrow(model: SplitModule, width: int) -> SplitModule:
    """The same, no wider than that its gradient fits into 4 KiB in ternary."""
    made = with_side(model, width)
    values = sum(p.numel() for p in made.client_parameters.values())
    fitting = max(1, min(width, width * IN_TERNARY // values))
    return made if fitting == width else with_side(model, fitting)


def _told(codec: str) -> str:
    return {"fp32": "dense", "ternary": "ternary, 4 KiB"}.get(codec, codec)
