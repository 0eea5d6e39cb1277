"""What autocast remembers of parameters that are about to move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fresh_autocast() -> Iterator[None]:
    """Autocast keeps its casts of parameters until its outermost context ends: none may pass between θ and θ'."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
