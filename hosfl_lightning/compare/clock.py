"""What the validations of a rehearsal take."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class Clock(Callback):
    """Times the validations.

    Attributes:
        validations: Seconds of each.
    """

    def __init__(self) -> None:
        self.validations: list[float] = []
        self.began = 0.0

    @override
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """It begins."""
        self.began = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """It is over."""
        self.validations.append(time.perf_counter() - self.began)
