"""What of a client's half is its own, and what all clients share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from torch import nn

from hosfl_lightning.split.client_parameters import select
from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.side import of_side

PersonalPart = Literal["norm", "bias", "first_layer", "ia3", "lora", "side"]
Trained = dict[str, nn.Parameter]


def divide(
    half: nn.Module, trained: Mapping[str, nn.Parameter], personal: bool | PersonalPart
) -> tuple[Trained, Trained]:
    """What all clients share of what they train, and what each keeps for itself; both in the order of ``trained``.

    Args:
        half: The client's.
        trained: Of it, by name.
        personal: Nothing, all, or the part that a word names, as `select` knows it: ``lora`` and ``side`` too.

    Raises:
        SplitError: The word names nothing that is trained, or all of it.
    """
    if isinstance(personal, bool):
        return ({}, dict(trained)) if personal else (dict(trained), {})
    own = {name for name in _named(half, personal) if name in trained}
    if not own or len(own) == len(trained):
        found = "all of it: say true" if own else "nothing of it; take another word"
        raise SplitError(
            f"trainer.algorithm.init_args.personal={personal!r}: of what the clients train that is {found} "
            f"({', '.join(get_args(PersonalPart))})"
        )
    return (
        {name: p for name, p in trained.items() if name not in own},
        {name: p for name, p in trained.items() if name in own},
    )


def _named(half: nn.Module, word: str) -> list[str]:
    names = [name for name, _ in half.named_parameters()]
    if word == "side":
        return [name for name in names if of_side(name)]
    if word == "lora":
        return [name for name in names if not of_side(name) and any(p.startswith("lora_") for p in name.split("."))]
    return select(half, word)
