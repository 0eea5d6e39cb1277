"""The same model with another client: what a control trains need not be what the run trains."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, Self

from hosfl_lightning.split import Lora, LoraHalf, Side


class AnotherClient:
    """Remembers what it was made with, and makes itself again with one thing changed."""

    lora: Lora | None
    side: Side | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An empty module that knows its arguments."""
        module = super().__new__(cls)
        object.__setattr__(module, "_made_with", (args, kwargs))
        return module

    def with_client(self, lora: LoraHalf | None, side: int) -> Self:
        """The same model, made anew with another client; the server's half starts the same.

        Args:
            lora: Of the client's layers; None: none.
            side: Width of the client's side adapter, its taps those of this model's; 0: none.

        Raises:
            ValueError: Neither; or the server's half is trained whole, which LoRA at the client would end.
            SplitError: LoRA matches nothing of the client, or there is no layer to tap.
        """
        if lora is None and not side:
            raise ValueError("a client without LoRA and without a side adapter trains nothing; take the control frozen")
        if lora is not None and self.lora is None:
            raise ValueError("the model has no LoRA, so that its halves are trained whole; set model.init_args.lora")
        args, kwargs = self._made_with  # type: ignore[attr-defined]
        made = inspect.signature(type(self).__init__).bind(self, *args, **kwargs)
        made.arguments["lora"] = None if self.lora is None else replace(self.lora, client=lora)
        made.arguments["side"] = _another(self.side, side)
        return type(self)(*made.args[1:], **made.kwargs)


def _another(own: Side | None, width: int) -> Side | None:
    if own is None:
        return Side(client=width) if width else None
    return replace(own, client=width) if width or own.server else None
