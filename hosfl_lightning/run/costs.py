"""What a run asks of a client: memory, bytes, forwards."""

from __future__ import annotations

from typing import Any

from hosfl_lightning.callbacks import CommunicationMonitor, PeakMemoryMonitor
from hosfl_lightning.models.halves import HEAD
from hosfl_lightning.run.face import TrainerFace
from hosfl_lightning.split.client_parameters import ClientParameters
from hosfl_lightning.split.side import of_side

TOLD: dict[ClientParameters, str] = {
    "norm": "norms", "bias": "biases", "first_layer": "first layer", "ia3": "(IA)³"
}  # fmt: skip


def client_costs(trainer: TrainerFace) -> dict[str, Any]:
    """Of a client, measured in the run; sizes in bytes, times in seconds, arithmetic in plain forwards of its half."""
    memory = next(c for c in trainer.callbacks if isinstance(c, PeakMemoryMonitor)).report
    communication = next(c for c in trainer.callbacks if isinstance(c, CommunicationMonitor))
    head = [name for name in trainer.endpoint.trained if name.startswith(HEAD)]
    return {
        "trains": trainer.algorithm.client_trains or bool(head),
        "adapter": _adapter(list(trainer.endpoint.trained), trainer.lightning_module.trains_at_client),
        "d_client": sum(p.numel() for p in trainer.endpoint.trained.values()),
        "client_peak_bytes": memory.get("client_peak_bytes"),
        "client_forward_bytes": memory.get("client_forward_bytes"),
        "client_forwards_per_round": memory.get("client_forwards"),
        "client_seconds_per_round": memory.get("client_seconds"),
        "bytes_per_client_round": communication.per_client_round,
        "up_per_client_round": communication.up_bytes / max(communication.client_rounds, 1),
    }


def _adapter(names: list[str], word: ClientParameters | None) -> str:
    """What is trained of a client, in words; a head of its own comes last."""
    head, names = [n for n in names if n.startswith(HEAD)], [n for n in names if not n.startswith(HEAD)]
    side = [name for name in names if of_side(name)]
    kinds = {"side adapter": side, "LoRA": [name for name in names if "lora_" in name and name not in side]}
    found = [kind for kind, of_kind in kinds.items() if of_kind] + ([TOLD[word]] if word and names else [])
    found = found or (["all weights"] if names or not head else [])
    return " and ".join([*found, *(["head"] if head else [])])
