"""What is recorded of a half on export, for ``hosfl-client check`` on a device: bits by PyTorch, values by the half."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from hosfl_client import check
from hosfl_client.half import OnnxHalf
from hosfl_lightning.clients.catch_up import state_digest
from hosfl_lightning.device.figures import as_arrays
from hosfl_lightning.device.samples import Samples
from hosfl_lightning.optim import SharedDirections, ZerothOrder, rule_of
from hosfl_lightning.rng import Domain, Stream
from hosfl_lightning.wire import CODECS, Coded

#: Examples and tokens of the batch.
EXAMPLES, TOKENS = 2, 8


def record(path: Path, trained: Mapping[str, Tensor], samples: Samples, mu: float) -> bytes:
    """A safetensors file: a small batch, λ, what the written half made of them, and ``digests``, JSON.

    Args:
        path: The written graph.
        trained: θ_c by name.
        samples: What it takes.
        mu: μ.
    """
    exported = OnnxHalf(path)
    batch = as_arrays(samples.batch(EXAMPLES, TOKENS))
    z = exported.forward(batch)
    rows = int(batch["attention_mask"].sum()) if "attention_mask" in batch else z.shape[0] * z.shape[1]
    multiplier = torch.randn(rows, z.shape[2], generator=torch.Generator().manual_seed(0)).numpy()
    found = check.measured(exported, exported.manifest, batch, multiplier, mu)
    digests = json.dumps(_bits(trained, torch.from_numpy(found["z"]))).encode()
    held = {**batch, **found, "multiplier": multiplier, "mu": np.array(mu, np.float32)}
    return save({**held, "digests": np.frombuffer(digests, np.uint8)})


def _bits(trained: Mapping[str, Tensor], z: Tensor) -> dict[str, str]:
    """As `hosfl_client.check.bits`, by PyTorch."""
    theta = [nn.Parameter(tensor.clone(), requires_grad=False) for tensor in trained.values()]
    rule = rule_of({name: tuple(v) if isinstance(v, list) else v for name, v in check.RULE.items()})
    optimizer = ZerothOrder(theta, rule, seed=check.SEED)
    for step, distribution in enumerate(("rademacher", "gauss16"), 1):
        basis = SharedDirections(check.SEED, check.ROUND + step, check.PROBES, distribution)
        optimizer.record(torch.tensor(check.COEFFICIENTS), basis)
        optimizer.step()
    found = {"directions and rule": state_digest(optimizer)}
    for codec in CODECS:
        coded = Coded.of(z.flatten(0, 1), codec, Stream(check.SEED, Domain.ROUNDING, check.ROUND, 0, 0), 0)
        total = sha256(_bytes(coded.values))
        total.update(_bytes(coded.restore()))
        found[f"codec {codec}"] = total.hexdigest()
    return found


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
