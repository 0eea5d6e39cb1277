"""The same model with another client: what a control trains need not be what the run trains."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from hosfl_lightning.models.base import SplitModule
from hosfl_lightning.split import LoraHalf, Side
from hosfl_lightning.split.client_parameters import ClientParameters


def with_client(
    model: SplitModule, lora: LoraHalf | None, side: int, client_parameters: ClientParameters | None = None
) -> SplitModule:
    """The model made anew with another client; the server's half starts the same.

    Args:
        model: What it is made like.
        lora: Of the client's layers; None: none.
        side: Width of the client's side adapter, its taps those of the model's; 0: none.
        client_parameters: As the model takes it. None of the three: every weight, where the model has no LoRA.

    Raises:
        ValueError: Nothing to train; or the server's half is trained whole, which LoRA at the client would end.
        SplitError: LoRA matches nothing of the client, or there is no layer to tap.
    """
    if lora is None and not side and client_parameters is None and model.lora is not None:
        raise ValueError(
            "a client without LoRA, side adapter and client_parameters trains nothing; take the control frozen"
        )
    if lora is not None and model.lora is None:
        raise ValueError("the model has no LoRA, so that its halves are trained whole; set model.init_args.lora")
    wanted: dict[str, Any] = {
        "lora": None if model.lora is None else replace(model.lora, client=lora),
        "side": _another(model.side, side),
    }
    if client_parameters is not None or model.trains_at_client is not None:
        wanted["client_parameters"] = client_parameters
    names = inspect.signature(type(model).__init__).parameters  # those of its bases may have others
    if not wanted.keys() <= names.keys():
        raise ValueError(
            f"{type(model).__name__} takes no lora, side or client_parameters, so a control cannot have a client of "
            "its own"
        )
    return type(model)(**{name: value for name, value in model.made_with.items() if name in names} | wanted)


def _another(own: Side | None, width: int) -> Side | None:
    if own is None:
        return Side(client=width) if width else None
    return replace(own, client=width) if width or own.server else None
