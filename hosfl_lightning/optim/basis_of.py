"""A basis from what a message says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hosfl_client.basis_of import described
from hosfl_lightning.optim.basis import Basis, Dense, SharedDirections
from hosfl_lightning.optim.beside import Beside
from hosfl_lightning.optim.client_directions import ClientDirections
from hosfl_lightning.optim.coordinates import Coordinates

_KINDS: dict[str, Callable[..., Basis]] = {
    "shared_directions": SharedDirections, "client_directions": ClientDirections, "coordinates": Coordinates,
    "dense": Dense, "beside": Beside,
}  # fmt: skip


def basis_of(description: Mapping[str, Any], seed: int, round: int, sizes: Sequence[int]) -> Basis:
    """The basis whose `Basis.describe` gave ``description``; see `hosfl_client.basis_of.described`."""
    return described(description, seed, round, sizes, _KINDS)
