"""The client half at any round, from the base model and the update log alone."""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.progress import track
from safetensors.torch import save
from torch import Tensor

from hosfl_lightning import checkpoint as checkpoints
from hosfl_lightning.aggregation import apply_update, recorded
from hosfl_lightning.catch_up import same_state
from hosfl_lightning.files import write_whole
from hosfl_lightning.identity import digest, manifest
from hosfl_lightning.optim import UpdateRule, ZerothOrder
from hosfl_lightning.replay import ReplayLog
from hosfl_lightning.servers import SplitModule


class RebuildError(ValueError):
    """The log is not of this model, does not reach the round, or gives other bits than the run's checkpoint."""


def rebuild(module: SplitModule, log: ReplayLog, to: int, rule: UpdateRule) -> ZerothOrder:
    """Apply the records of rounds ``0 .. to − 1`` to a fresh model, each with the learning rate it was made with.

    Args:
        module: As its recipe builds it, untrained.
        log: The run's.
        to: Rounds to replay.
        rule: The run's update rule; its hyper-parameters come from the records.

    Returns:
        The client's optimizer, moments and step count included.

    Raises:
        RebuildError: Another model, backbone or start than the log's, or fewer records.
    """
    _check(module, log, to)
    start = log.starts[0]
    optimizer = ZerothOrder(module.client_parameters.items(), rule, seed=start["settings"]["seed"])
    run_id = bytes.fromhex(start["run_id"])
    quiet = not sys.stdout.isatty()
    for frame in track(log.frames(0, to), f"replaying {to} rounds", total=to, transient=True, disable=quiet):
        apply_update(recorded(frame, run_id), optimizer)
    return optimizer


def write_client_half(module: SplitModule, log: ReplayLog, to: int, run: Path, out: Path) -> dict[str, Any]:
    """Write ``client_half.safetensors``, θ_c by name, and ``replay.json``, what it was made of.

    Args:
        module: After `rebuild`.
        log: The run's.
        to: Rounds that were replayed.
        run: The run's folder, whose checkpoints of that round are compared bit for bit.
        out: The folder to write.

    Returns:
        The content of ``replay.json``.
    """
    state = {name: p.detach().to("cpu").contiguous() for name, p in module.client_parameters.items()}
    blob = save(state)
    same = {path.name: _equal(held, state) for path, held in _checkpoints(run, to)}
    report = {
        "run_id": log.starts[0]["run_id"],
        "round": to,
        "log_bytes": sum(map(len, log.frames(0, to))),
        "log_head": log.head(to),
        "sha256": sha256(blob).hexdigest(),
        "equal_to": [name for name, equal in same.items() if equal],
        "differs_from": [name for name, equal in same.items() if not equal],
    }
    write_whole(out / "client_half.safetensors", lambda file: file.write(blob))
    write_whole(out / "replay.json", lambda file: file.write(json.dumps(report, indent=2).encode() + b"\n"))
    return report


def _check(module: SplitModule, log: ReplayLog, to: int) -> None:
    start = log.starts[0]
    advice = "use the config.yaml of the run"
    if start["manifest"] != manifest(module.client_parameters):
        raise RebuildError(f"{log.path}: the run's client half has other trainable tensors than the model; {advice}")
    if start["fingerprint"] != module.fingerprint():
        raise RebuildError(f"{log.path}: the run's backbone has other weights than {module.pretrained!r}; {advice}")
    if start["initial"] != digest(module.client_parameters):
        raise RebuildError(f"{log.path}: the run's client half started from other values than the model; {advice}")
    if not 0 <= to <= log.rounds:
        raise RebuildError(f"--to must be between 0 and {log.rounds}, the rounds on record in {log.path}; got {to}")


def _checkpoints(run: Path, round: int) -> list[tuple[Path, dict[str, Tensor]]]:
    """The trained tensors of the run's checkpoints of that round."""
    return [(path, held["state_dict"]) for path, held in checkpoints.whole(run) if held["global_step"] == round]


def _equal(held: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    client = {name: tensor for name, tensor in held.items() if name.startswith("client_half.")}
    return same_state(client, {f"client_half.{name}": tensor for name, tensor in state.items()})
