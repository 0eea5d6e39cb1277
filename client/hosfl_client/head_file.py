"""The head that lies beside an exported half, for a client that keeps its labels: its arrays, and how they are used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hosfl_client.bfloat16 import Array
from hosfl_client.head import Activation, Dense, Head, Norm, Output, Step
from hosfl_client.manifest import HalfError, Manifest

PLACES = ("every", "first", "last")


def load_head(manifest: Manifest, folder: Path, trained: Mapping[str, Array]) -> Head | None:
    """``f_h(z₂; θ_h)`` and the loss; None: the half was exported for a run whose server has the labels.

    Args:
        manifest: Of the half.
        folder: Where its files are.
        trained: θ_c by name; of the head's these very arrays are read, so that what is written into them counts.

    Raises:
        HalfError: The file or its description is damaged.
    """
    if manifest.head is None:
        return None
    path = folder / str(manifest.head["file"])
    try:
        with safe_open(path, framework="numpy") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        return head_from(manifest.head, {**held, **trained}, [trained[name] for name in manifest.of_head])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise HalfError(
            f"{path}: no head as the manifest describes it ({error!r:.200}); export the half again"
        ) from error


def head_from(described: Mapping[str, Any], arrays: Mapping[str, Array], trained: list[Array]) -> Head:
    """A head from the manifest's description of it, the arrays that this names, and those of them that are trained."""
    if described["place"] not in PLACES:
        raise ValueError(f"place {described['place']!r:.40}")
    output = described["output"]
    cap = output["cap"]
    last = Output(_dense(output["linear"], arrays), float(output["scale"]), None if cap is None else float(cap))
    return Head(described["place"], [_step(one, arrays) for one in described["steps"]], last, trained)


def _step(one: Mapping[str, Any], arrays: Mapping[str, Array]) -> Step:
    match one["kind"]:
        case "activation":
            return Activation(one["name"])
        case "norm":
            weight, bias = _optional(one["weight"], arrays), _optional(one["bias"], arrays)
            return Norm(weight, bias, float(one["eps"]), bool(one["centred"]), float(one["offset"]))
        case "dense":
            return _dense(one, arrays)
    raise ValueError(f"a step of the kind {one['kind']!r:.40}")


def _dense(one: Mapping[str, Any], arrays: Mapping[str, Array]) -> Dense:
    low = one["low"]
    if low is not None:
        a, b, scale = low
        low = arrays[a], arrays[b], float(scale)
    return Dense(arrays[one["weight"]], _optional(one["bias"], arrays), low)


def _optional(name: str | None, arrays: Mapping[str, Array]) -> Array | None:
    return None if name is None else arrays[name]
