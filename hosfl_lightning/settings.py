"""What may be set, said before anything is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hosfl_lightning.controls import CONTROLS

if TYPE_CHECKING:
    from hosfl_lightning.orchestrator import Orchestrator

#: No GradScaler among them.
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def check_settings(trainer: Orchestrator) -> None:
    """What can be said before model and data are known.

    Raises:
        ValueError: Names the setting and what it may be.
    """
    for name in ("max_rounds", "val_check_interval", "log_every_n_steps", "min_clients"):
        if getattr(trainer, name) < 1:
            raise ValueError(f"trainer.{name} must be >= 1, got {getattr(trainer, name)}")
    if trainer.clients_per_round is not None and trainer.clients_per_round < 1:
        raise ValueError(f"trainer.clients_per_round must be >= 1 or null for all, got {trainer.clients_per_round}")
    if trainer.simulation not in ("batched", "per_client"):
        raise ValueError(f"trainer.simulation must be batched or per_client, got {trainer.simulation!r}")
    if trainer.on_too_few not in ("repeat", "stop"):
        raise ValueError(f"trainer.on_too_few must be repeat or stop, got {trainer.on_too_few!r}")
    if type(trainer.devices) is not int or trainer.devices < 1:
        raise ValueError(f"trainer.devices must be a number of processes >= 1, got {trainer.devices!r}")
    if trainer.devices > 1 and trainer.simulation == "batched":
        raise ValueError(
            "trainer.simulation=batched is one batch in one process; with trainer.devices > 1 leave it out"
        )
    if trainer.precision not in PRECISIONS:
        reason = (
            "fp16 needs a GradScaler, which scales λ and refuses forward-only steps; "
            if str(trainer.precision).startswith("16")
            else ""
        )
        raise ValueError(f"trainer.precision={trainer.precision!r}: {reason}use one of {', '.join(PRECISIONS)}")
    for name in trainer.controls:
        if name not in CONTROLS:
            raise ValueError(f"trainer.controls: {name!r} is not one of {', '.join(CONTROLS)}")
    if trainer.gradient_clip_val is not None and not trainer.gradient_clip_val > 0:
        raise ValueError(f"trainer.gradient_clip_val must be > 0, or null for none, got {trainer.gradient_clip_val}")
    if not 0 <= trainer.seed < 2**64:
        raise ValueError(f"trainer.seed must be between 0 and 2**64 - 1, got {trainer.seed}")


def checked_sample(wanted: int | None, clients: int, needed: int) -> int:
    """How many clients a round samples.

    Args:
        wanted: ``trainer.clients_per_round``.
        clients: Of the data.
        needed: ``trainer.min_clients``.

    Raises:
        ValueError: More than there are, or fewer than needed.
    """
    if wanted is not None and wanted > clients:
        raise ValueError(f"trainer.clients_per_round is {wanted}, but the data has {clients} clients; lower it")
    sampled = wanted if wanted is not None else clients
    if needed > sampled:
        raise ValueError(f"trainer.min_clients is {needed}, but a round has {sampled} clients; lower it")
    return sampled
