"""What the clients hold at any round, from the base model and the update log alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.progress import track
from safetensors.torch import save
from torch import Tensor, nn

from hosfl_lightning.aggregation import apply_update, recorded
from hosfl_lightning.algorithms import Algorithm
from hosfl_lightning.clients.catch_up import same_state
from hosfl_lightning.files import write_json, write_whole
from hosfl_lightning.models import SplitModule
from hosfl_lightning.optim import ZerothOrder
from hosfl_lightning.run import checkpoint as checkpoints
from hosfl_lightning.run.folder import LOG
from hosfl_lightning.run.identity import digest
from hosfl_lightning.server.replay_log import ReplayLog, other_rules
from hosfl_lightning.wire import RULES, manifest


class RebuildError(ValueError):
    """The log is not of this model, does not reach the round, or gives other bits than the run's checkpoint."""


def replay(module: SplitModule, algorithm: Algorithm, run: Path, out: Path, to: int | None) -> None:
    """`hosfl_lightning.Orchestrator.replay`, with the model in the run's precision."""
    log = ReplayLog.read(run / LOG)
    rounds = log.rounds if to is None else to
    parameters = algorithm.shared(module)
    if not parameters:
        raise RebuildError(
            f"{log.path}: with personal: true nothing of the clients' steps is on record, only who counted in which "
            "round; their halves are in the checkpoints (hosfl export)"
        )
    rebuild(module, parameters, log, rounds, algorithm)
    report = write_client(module, parameters, algorithm.client_holds, log, rounds, run, out)
    holds = f"client {algorithm.client_holds}"
    print(f"{holds} after {rounds} rounds, from {report['log_bytes']:,} bytes of log, written to {out}")
    for name in report["equal_to"]:
        print(f"equal to {name}, bit for bit")
    if report["differs_from"]:
        others = ", ".join(report["differs_from"])
        raise RebuildError(f"the {holds} that the log of {run} gives differs from {others}")


def rebuild(
    module: SplitModule, parameters: Mapping[str, nn.Parameter], log: ReplayLog, to: int, algorithm: Algorithm
) -> ZerothOrder:
    """Apply the records of rounds ``0 .. to − 1`` to a fresh model, each with the learning rate it was made with.

    Args:
        module: As its recipe builds it, untrained.
        parameters: What the clients train of it, `Algorithm.parameters`; it moves.
        log: The run's.
        to: Rounds to replay.
        algorithm: The run's: what it trains and its update rule, whose hyper-parameters come from the records.

    Returns:
        The client's optimizer, moments and step count included.

    Raises:
        RebuildError: Another model, backbone or start than the log's, or fewer records.
    """
    _check(module, parameters, log, to)
    start = log.starts[0]
    optimizer = ZerothOrder(parameters.items(), algorithm.client_optimizer, seed=start["settings"]["seed"])
    run_id = bytes.fromhex(start["run_id"])
    quiet = not sys.stdout.isatty()
    for frame in track(log.frames(0, to), f"replaying {to} rounds", total=to, transient=True, disable=quiet):
        apply_update(recorded(frame, run_id), optimizer)
    return optimizer


def write_client(
    module: SplitModule,
    parameters: Mapping[str, nn.Parameter],
    holds: str,
    log: ReplayLog,
    to: int,
    run: Path,
    out: Path,
) -> dict[str, Any]:
    """Write ``client_half.safetensors`` or ``client_whole.safetensors``, and ``replay.json``, what it was made of.

    Args:
        module: After `rebuild`.
        parameters: As given to it; they are written by name.
        holds: What a client holds of the model: ``half`` or ``whole``.
        log: The run's.
        to: Rounds that were replayed.
        run: The run's folder, whose checkpoints of that round are compared bit for bit.
        out: The folder to write.

    Returns:
        The content of ``replay.json``.
    """
    blob = save({name: p.detach().to("cpu").contiguous() for name, p in parameters.items()})
    addresses = {p.data_ptr() for p in parameters.values()}
    mine = {name: t for name, t in module.trained_state().items() if t.data_ptr() in addresses}
    heads: dict[str, Tensor] = {name: p for name, p in parameters.items() if name.startswith("auxiliary.")}
    same = {path.name: _equal(held, mine, heads) for path, held in _checkpoints(run, to)}
    report = {
        "run_id": log.starts[0]["run_id"],
        "round": to,
        "log_bytes": sum(map(len, log.frames(0, to))),
        "log_head": log.head(to),
        "sha256": sha256(blob).hexdigest(),
        "equal_to": [name for name, equal in same.items() if equal],
        "differs_from": [name for name, equal in same.items() if not equal],
    }
    write_whole(out / f"client_{holds}.safetensors", lambda file: file.write(blob))
    write_json(out / "replay.json", report, indent=2)
    return report


def _check(module: SplitModule, parameters: Mapping[str, Tensor], log: ReplayLog, to: int) -> None:
    start = log.starts[0]
    advice = "use the config.yaml of the run"
    if words := other_rules(start, RULES):
        raise RebuildError(f"{log.path}: {words}; replay it with the version that wrote it")
    if start["manifest"] != manifest(parameters):
        raise RebuildError(f"{log.path}: the run's clients have other trainable tensors than the model; {advice}")
    if start["fingerprint"] != module.fingerprint():
        raise RebuildError(f"{log.path}: the run's backbone has other weights than {module.pretrained!r}; {advice}")
    if start["initial"] != digest(parameters):
        raise RebuildError(f"{log.path}: the run's clients started from other values than the model; {advice}")
    if not 0 <= to <= log.rounds:
        raise RebuildError(f"--to must be between 0 and {log.rounds}, the rounds on record in {log.path}; got {to}")


def _checkpoints(run: Path, round: int) -> list[tuple[Path, dict[str, Any]]]:
    """The run's checkpoints of that round."""
    return [(path, held) for path, held in checkpoints.whole(run) if held["global_step"] == round]


def _equal(checkpoint: dict[str, Any], mine: dict[str, Tensor], auxiliary: dict[str, Tensor]) -> bool:
    """In the model's tensors and, unless the checkpoint holds weights only, in the auxiliary head's."""
    held = checkpoint["state_dict"]
    if "method" in checkpoint:
        held, mine = held | checkpoint["method"].get("auxiliary", {}), mine | auxiliary
    return same_state({name: held[name] for name in mine if name in held}, mine)
