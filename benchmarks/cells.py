"""What tables of cells have in common, whatever is compared in a cell: settings filled in, and rows of results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hosfl_lightning.compare.statistics import spread

FROZEN, FIRST_ORDER = "frozen", "first order"
#: In what a client's update travels, by the compression of a gradient that it knows.
BASES = {"Uncompressed": "dense", "RandomSubset": "coordinates"}


class Named(Protocol):
    """A cell: one comparison."""

    @property
    def name(self) -> str:
        """Its folder."""


C = TypeVar("C", bound=Named)


def chosen(parser: argparse.ArgumentParser, names: Sequence[str] | None, cells: Sequence[C]) -> list[C]:
    """The cells that ``--cells`` names, in the order of the table, all without it; an unknown name ends the parser."""
    known = {cell.name: cell for cell in cells}
    if unknown := [name for name in names or () if name not in known]:
        parser.error(f"--cells: {', '.join(unknown)} is not one of {', '.join(known)}")
    return [cell for name, cell in known.items() if name in (names or known)]


def placed(value: Any, places: dict[str, str]) -> Any:
    """With ``{data}`` and ``{minilm}`` replaced, at any depth."""
    if isinstance(value, dict):
        return {name: placed(one, places) for name, one in value.items()}
    if isinstance(value, list):
        return [placed(one, places) for one in value]
    return value.format(**places) if isinstance(value, str) else value


def strings(value: Any) -> Iterator[str]:
    """At any depth."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from strings(one)
    elif isinstance(value, str):
        yield value


def measured(
    about: dict[str, Any], settings: dict[str, dict[str, Any]], results: dict[str, Any], metric: str, plain: str
) -> Iterator[dict[str, Any]]:
    """A row a method: bytes are a client-round's, forwards those of the client half.

    ``edge`` names the rates at an end of those that were tried (of two, always); ``failed`` says why, by seed. A row
    without a finished run has no costs. ``gap_closed_std`` is that of ``gap_closed_each_seed``.

    Args:
        about: The cell.
        settings: Every method's by name.
        results: Of the comparison.
        metric: Beside the loss.
        plain: What a client trains of whom nothing is said.
    """
    for name, found in results["methods"].items():
        method, gap = settings[name], found["gap_closed"]
        init, each = method["algorithm"].get("init_args", {}), gap_of_each_seed(results, name)
        chosen = method["overrides"].get("model.init_args.client_parameters", plain)
        side = method["overrides"].get("model.init_args.side", {}).get("client")
        yield {
            **about, "split": results["evaluated_on"], "method": name, "adapter": "side" if side else chosen,
            "estimator": init.get("estimator", "forward" if "probes" in init else None),
            "client_backprop": class_of(method["algorithm"]) == "SplitFedSGD", "d_client": found.get("d_client"),
            "probes": init.get("probes"), **sent(method, found.get("d_client")),
            "rounds": found.get("rounds"), "bytes_up": found.get("bytes_up_per_client_round"),
            "bytes_down": found.get("bytes_down_per_client_round"),
            "client_peak_bytes": found.get("client_peak_bytes"),
            "client_inference_bytes": found.get("client_inference_bytes"),
            "client_forward_equivalents": found.get("client_forwards_per_round"),
            "loss": found["loss"], metric: found[metric], "below_frozen": found["below_frozen"],
            "gap_closed": gap["value"] if gap else None, "gap_closed_interval": gap and [gap["low"], gap["high"]],
            "gap_closed_std": spread(each.values())["sd"], "gap_closed_each_seed": each,
            "no_gap_closed": found["no_gap_closed"], "client_put_back": found["client_put_back"],
            "learning_rate": found["point"], "edge": at_ends(found), "seeds": found["seeds"], "failed": found["failed"],
        }  # fmt: skip


def finished(cells: Sequence[C], out: Path) -> list[tuple[C, dict[str, Any]]]:
    """Those whose results are there, of this call or an earlier one."""
    paths = [(cell, out / "cells" / cell.name / "results.json") for cell in cells]
    return [(cell, json.loads(path.read_text())) for cell, path in paths if path.is_file()]


def sent(method: dict[str, Any], d_client: float | None) -> dict[str, Any]:
    """In what a client's update travels, and how many values a client-round that is."""
    init, name = method["algorithm"].get("init_args", {}), class_of(method["algorithm"])
    if name == "Frozen":
        return {"aggregation": None, "codec": None, "scalars_up": 0}
    compression = init.get("compression", {"class_path": "Uncompressed"})
    count = compression.get("init_args", {}).get("count") or init.get("probes") or d_client
    basis = "shared_directions" if "probes" in init else BASES[class_of(compression)]
    codec = method["overrides"].get("trainer.codec.gradient", "fp32")
    return {"aggregation": basis, "codec": codec, "scalars_up": count}


def class_of(setting: dict[str, Any]) -> str:
    """Its name without the module's."""
    return setting["class_path"].rpartition(".")[2]


def at_ends(found: dict[str, Any]) -> list[str]:
    """The learning rates of a row that are the lowest or the highest that were tried."""
    tried = [trial["point"] for trial in found["trials"]]
    ends = {key: {pick(one[key] for one in tried) for pick in (min, max)} for key in (tried[0] if tried else ())}
    return [key for key, rate in (found["point"] or {}).items() if len(ends.get(key, ())) > 1 and rate in ends[key]]


def gap_of_each_seed(results: dict[str, Any], name: str) -> dict[str, float]:
    """(frozen − method) / (frozen − first order) of each seed alone; empty where over all of them there is no gap."""
    if results["methods"][name]["gap_closed"] is None:
        return {}
    frozen, first, own = (results["methods"][one]["loss"]["values"] for one in (FROZEN, FIRST_ORDER, name))
    return {
        seed: (frozen[seed] - own[seed]) / (frozen[seed] - first[seed])
        for seed in sorted(frozen.keys() & first.keys() & own.keys())
        if frozen[seed] != first[seed]
    }
