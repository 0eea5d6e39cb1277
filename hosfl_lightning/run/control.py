"""A control: the client that the rounds are run with once more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from hosfl_lightning.algorithms import Algorithm
from hosfl_lightning.split import LoraHalf
from hosfl_lightning.split.client_parameters import ClientParameters


@dataclass
class Control:
    """The same rounds with another client: its method and what it trains are its own, all the rest is the run's.

    Attributes:
        name: In the table, and of its folder. The one called ``first_order`` closes the gap by definition.
        algorithm: Its method, of rounds like the run's: one minibatch a client, one step of a server that
            backpropagates.
        lora: LoRA on the client's layers; None: none.
        side: Width of the client's side adapter, its taps those of the model's; 0: none.
        client_parameters: As the model takes it; null: none. Without any of the three every weight of the client, where
            the model has no LoRA.

    Example::

        Control("first_order", SplitFedSGD(AdamW(lr=1e-2)), lora=LoraHalf(target_modules="all-linear"))

    Raises:
        ValueError: The name is none for a folder.
    """

    name: str
    algorithm: Algorithm
    lora: LoraHalf | None = None
    side: int = 0
    client_parameters: ClientParameters | None = None

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith(".") or PurePath(self.name).name != self.name:
            raise ValueError(f"trainer.controls: name={self.name!r} is a folder's as well: no slash, no dot in front")
