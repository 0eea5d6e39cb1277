"""What a client holds of a round."""

from __future__ import annotations

from dataclasses import dataclass

from hosfl_client.bfloat16 import Array
from hosfl_client.minibatches import Minibatch


@dataclass
class Visit:
    """What is held of a round while it waits.

    Attributes:
        batch: Its minibatch.
        mask: Valid positions ``(B, S)``.
        z: As it was sent, where the answer needs it; dropped when λ has come.
        head: The gradient of a head that is trained, once z₂ has come.
    """

    batch: Minibatch
    mask: Array
    z: Array | None = None
    head: Array | None = None
