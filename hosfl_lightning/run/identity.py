"""Which run this is, and on what it runs: what messages, log records and checkpoints are checked against."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hosfl_lightning.wire import PROTOCOL, manifest

#: Where a run takes place, which must not change its name.
PLACES = ("simulation", "group_size")


def run_id(settings: Mapping[str, Any], parameters: Mapping[str, Tensor], backbone: str) -> bytes:
    """16 bytes of a run's settings and model: what its messages, log and checkpoints must have in common.

    Not of its data, of the values at which θ_c starts, nor of when it ran: repeating a run gives the same 16 bytes.

    Args:
        settings: What a resumed run must agree on, plain values.
        parameters: θ_c by name.
        backbone: Fingerprint of the frozen weights.
    """
    named = {
        "protocol": PROTOCOL,
        "settings": {name: value for name, value in settings.items() if name not in PLACES},
        "manifest": manifest(parameters),
        "backbone": backbone,
    }
    return sha256(json.dumps(named, sort_keys=True, separators=(",", ":")).encode()).digest()[:16]


def digest(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 of the bits, tensor after tensor."""
    total = sha256()
    for parameter in parameters.values():
        total.update(parameter.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def starts(state: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Of each half: which tensors it trains, and their values, as digests.

    Runs that train other adapters on a half can agree on the other half only.

    Args:
        state: `SplitModule.trained_state` before the first round.
    """
    found = {}
    for half in ("client_half", "server_half"):
        own = {name: tensor for name, tensor in state.items() if name.startswith(f"{half}.")}
        found[half] = {"tensors": sha256(json.dumps(manifest(own)).encode()).hexdigest(), "weights": digest(own)}
    return found


def hardware(device: torch.device) -> str:
    """Whatever may change the bits of a forward: library, processor, device and number of threads."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"torch {torch.__version__}, {kind}, {torch.get_num_threads()} thread(s)"


def incarnation(number: int, hardware: str) -> str:
    """``number-hash``: the number-th server of a run, on this hardware."""
    return f"{number}-{sha256(hardware.encode()).hexdigest()[:12]}"


def _processor() -> str:
    # By model: math libraries choose other kernels for processors of one instruction set.
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return f"{platform.machine()}, {model}, {torch.backends.cpu.get_cpu_capability()}"
