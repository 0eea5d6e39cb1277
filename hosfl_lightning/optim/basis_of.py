"""A basis from what a message says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hosfl_lightning.optim.basis import Basis, Dense, SharedDirections
from hosfl_lightning.optim.coordinates import Coordinates


def basis_of(description: Mapping[str, Any], seed: int, round: int, sizes: Sequence[int]) -> Basis:
    """The basis whose `Basis.describe` gave ``description``.

    Args:
        description: ``kind`` and that kind's settings, as a message carries them.
        seed: The run's seed; it does not travel.
        round: In which the coefficients were measured.
        sizes: Elements of each tensor, in manifest order.

    Raises:
        ValueError: An unknown kind, or settings that are not that kind's, of another type or out of range.
    """
    settings = {name: value for name, value in description.items() if name != "kind"}
    match description.get("kind"), sorted(settings):
        case "shared_directions", ["distribution", "probes"]:
            _check_type("probes", settings["probes"], int)
            _check_type("distribution", settings["distribution"], str)
            return SharedDirections(seed, round, **settings)
        case "coordinates", ["count"]:
            _check_type("count", settings["count"], int)
            return Coordinates(seed, round, sizes, **settings)
        case "dense", []:
            return Dense(sizes)
    raise ValueError(
        f"no basis is described by {dict(description)}: kind must be shared_directions (with probes, distribution), "
        "coordinates (with count) or dense; a later version of the package may know it"
    )


def _check_type(name: str, value: object, kind: type) -> None:
    if type(value) is not kind:
        raise ValueError(f"basis.{name} must be of type {kind.__name__}, got {value!r:.80}")
