"""A basis from what a message says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from hosfl_client.basis import Basis, Coordinates, Dense, SharedDirections
from hosfl_client.beside import Beside
from hosfl_client.client_directions import ClientDirections

_KINDS: dict[str, Callable[..., Basis]] = {
    "shared_directions": SharedDirections, "client_directions": ClientDirections, "coordinates": Coordinates,
    "dense": Dense, "beside": Beside,
}  # fmt: skip
B = TypeVar("B")


def basis_of(description: Mapping[str, Any], seed: int, round: int, sizes: Sequence[int]) -> Basis:
    """The basis whose `Basis.describe` gave ``description``; see `described`."""
    return described(description, seed, round, sizes, _KINDS)


def described(
    description: Mapping[str, Any], seed: int, round: int, sizes: Sequence[int], kinds: Mapping[str, Callable[..., B]]
) -> B:
    """The basis of an engine whose ``describe`` gave ``description``.

    Args:
        description: ``kind`` and that kind's settings, as a message carries them; ``beside``: of how many tensors at
            the end the gradient itself follows.
        seed: The run's seed; it does not travel.
        round: In which the coefficients were measured.
        sizes: Elements of each tensor, in manifest order.
        kinds: The engine's classes, by kind.

    Raises:
        ValueError: An unknown kind, or settings that are not that kind's, of another type or out of range.
    """
    if "beside" in description:
        last, own = description["beside"], {name: value for name, value in description.items() if name != "beside"}
        _check_type("beside", last, int)
        if not 0 < last < len(sizes):
            raise ValueError(f"basis.beside must be in 1..{len(sizes) - 1}, some of the trained tensors, got {last}")
        return kinds["beside"](described(own, seed, round, sizes[: len(sizes) - last], kinds), sizes, last)
    settings = {name: value for name, value in description.items() if name != "kind"}
    match description.get("kind"), sorted(settings):
        case "shared_directions", ["distribution", "probes"]:
            _check_type("probes", settings["probes"], int)
            _check_type("distribution", settings["distribution"], str)
            return kinds["shared_directions"](seed, round, **settings)
        case "client_directions", ["clients", "distribution", "probes"]:
            _check_type("probes", settings["probes"], int)
            _check_type("distribution", settings["distribution"], str)
            _check_type("clients", settings["clients"], list)
            for client in settings["clients"]:
                _check_type("clients", client, int)
            return kinds["client_directions"](seed, round, **settings)
        case "coordinates", ["count"]:
            _check_type("count", settings["count"], int)
            return kinds["coordinates"](seed, round, sizes, **settings)
        case "dense", []:
            return kinds["dense"](sizes)
    raise ValueError(
        f"no basis is described by {dict(description)}: kind must be shared_directions (with probes, distribution), "
        "client_directions (with clients as well), coordinates (with count) or dense; a later version may know it"
    )


def _check_type(name: str, value: object, kind: type) -> None:
    if type(value) is not kind:
        raise ValueError(f"basis.{name} must be of type {kind.__name__}, got {value!r:.80}")
