"""What is written of a trained model: one adapter, or one for each client that has a half of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save

from hosfl_lightning.files import write_whole
from hosfl_lightning.models import SplitModule
from hosfl_lightning.rendering import listed
from hosfl_lightning.run import checkpoint as checkpoints
from hosfl_lightning.run import folder
from hosfl_lightning.run.by_client import OwnHalves, held_by, of_checkpoint, own_halves
from hosfl_lightning.run.face import TrainerFace
from hosfl_lightning.run.session import check_weights

#: Of a client whose model has no LoRA, in place of an adapter: all that it trains.
CLIENT = "client_half.safetensors"


def export(trainer: TrainerFace, model: SplitModule, ckpt_path: str, out: str, client: int | None) -> None:
    """`hosfl_lightning.Orchestrator.export`.

    Raises:
        CheckpointError: No such client, or one of a run whose clients are all alike.
    """
    checkpoint = folder.weights(ckpt_path)
    check_weights(trainer, model, checkpoint)
    checkpoints.load_model(model, checkpoint)
    if "personal" not in checkpoint:
        if client is not None:
            raise checkpoints.CheckpointError(
                f"client: the clients of {ckpt_path} all hold the same half; leave it out"
            )
        model.export(out)
        print(f"adapter written to {out}")
        return
    count = checkpoint["settings"]["clients"]
    if client is not None and not 0 <= client < count:
        raise checkpoints.CheckpointError(f"client: {client} is not in 0..{count - 1}, the clients of {ckpt_path}")
    written = write_clients(model, of_checkpoint(model, checkpoint), Path(out), client)
    print(f"{len(written)} client(s) written to {out}: {listed(written)}")


def after_run(trainer: Any, model: SplitModule) -> None:
    """The adapter, or those of all clients that have moved, into the run folder; nothing without LoRA."""
    if not trainer.is_global_zero or model.lora is None:
        return
    out = Path(trainer.log_dir) / "adapter"
    if trainer.algorithm.personal:
        write_clients(model, own_halves(trainer), out)
    else:
        model.export(str(out))


def write_clients(model: SplitModule, halves: OwnHalves, out: Path, client: int | None = None) -> list[str]:
    """``client_<k>`` for each client that has moved, or for one, whether it has or not; their names.

    Each is an adapter with that client's part, the server's in it; without LoRA what the client trains, as tensors.
    """
    written = []
    for k in sorted(halves) if client is None else [client]:
        place = out / f"client_{k}"
        with held_by(model, halves, k):
            if model.lora is not None:
                model.export(str(place))
            else:
                data = save({name: p.detach().cpu().contiguous() for name, p in model.client_parameters.items()})
                write_whole(place / CLIENT, lambda file, data=data: file.write(data))  # type: ignore[misc]
        written.append(place.name)
    return written
