"""Messages of every kind, frames made by hand, and when two messages are the same."""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from hosfl_lightning.rng import Domain, Stream
from hosfl_lightning.wire import (
    CODECS,
    MESSAGES,
    Acknowledgement,
    Bye,
    CatchUpRequest,
    Coded,
    CodedGradient,
    HeldOutRequest,
    Hello,
    MaskedGradients,
    Message,
    MiddleOutput,
    Multiplier,
    OutputMultiplier,
    ProbedData,
    ProbeRequest,
    ProjectedGradients,
    RoundEnd,
    SecureKeys,
    SecurePeers,
    SecureShares,
    SmashedData,
    Snapshot,
    StepRequest,
    Terms,
    UnlabelledData,
    UnmaskRequest,
    Update,
    Weights,
    manifest,
)

BASIS: dict[str, Any] = {"kind": "shared_directions", "probes": 2, "distribution": "rademacher"}
RULE: dict[str, Any] = {"name": "adamw", "lr": 1e-3 / 3, "betas": [0.9, 0.999], "eps": 5e-324, "nesterov": False}
SETTINGS: dict[str, Any] = {"kind": "forward_only", "probes": 2, "mu": 1e-3 / 3, "taps": None, "layers": [0, 1]}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STREAM = Stream(0, Domain.ROUNDING)
RUN = bytes(range(16))
CODED = (SmashedData, Multiplier, ProbedData, CodedGradient, UnlabelledData, MiddleOutput, OutputMultiplier)
"""What holds z, λ or a gradient."""


def finite_bits(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform bit patterns but NaN and infinity: every subnormal and signed zero is a value that has to survive."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    x = raw.view(dtype).reshape(shape)
    return torch.where(x.isfinite(), x, -0.0)


def smashed(seed: int, codec: str = "fp32", dtype: torch.dtype = torch.float32, per_token: bool = True) -> SmashedData:
    draw = random.Random(seed)
    batch, length, hidden = draw.randint(1, 5), draw.randint(1, 37), draw.randint(1, 9)
    lengths = torch.tensor([draw.randint(0, length) for _ in range(batch)])
    mask = torch.arange(length) < lengths[:, None]
    labels = torch.full((batch, length) if per_token else (batch,), draw.choice([-100, 0, 31999, 2**31 - 1]))
    z = finite_bits(seed, batch, length, hidden, dtype=dtype)
    if codec != "fp32":
        z = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    round, client = 10 ** draw.randint(0, 6), draw.randint(0, 99)
    return SmashedData.pack(round, client, z, labels, mask, codec, seed, step=7 * seed, attempt=seed)


def messages(seed: int, codec: str = "fp32", dtype: torch.dtype = torch.float32) -> list[Message]:
    """One of each kind; some tensors are empty."""
    first = smashed(seed, codec, dtype, per_token=seed % 2 == 0)
    coefficients = finite_bits(seed, seed % 17)
    state = {"w.lora_A": finite_bits(seed, seed % 3, 5, dtype=dtype), "é \n": finite_bits(seed), "m": coefficients}
    mu = loss = None if seed % 5 == 0 else 1e-3 / (seed + 1)
    trained = {name: finite_bits(seed, seed % 3, 5, dtype=FLOATS[seed % 3]) for name in ("w.lora_A", "", "é \n")}
    sender, terms = (None, 0) if seed % 2 == 0 else (first.client, seed)
    gradient = finite_bits(seed, 64 * seed + seed % 2)  # no row, whole rows, and rows with one that is not full
    if codec != "fp32":
        gradient = torch.randn(len(gradient), generator=torch.Generator().manual_seed(seed))
    basis = BASIS | {"µ": 1 / 3, "note": 'a "b" \\ \n é'}
    rows = torch.arange(seed * 8, dtype=torch.uint8).reshape(seed, 8)
    held, codecs = manifest(trained if seed else {}), {"smashed_data": codec, "multiplier": "fp32"}
    return [
        first,
        Multiplier(first.round, first.client, first.z, seed, 9 * seed),
        ProjectedGradients(first.round, 4, basis, coefficients, 10 ** min(seed, 18), seed, loss, 3 * seed),
        Update(
            first.round, BASIS, coefficients, RULE, seed, list(range(seed)), [1 / (k + 3) for k in range(seed)], mu, "a"
        ),
        CatchUpRequest(first.round, 0, seed, "cpu-é", "0f" * seed, seed),
        Snapshot(first.round, 7, seed, "a", "the log was shorter", seed, state if seed else {}),
        Weights(first.round, sender, trained if seed else {}, terms, seed, RULE if sender is None else {}, loss, seed),
        ProbedData(first.round, first.client, seed, seed % 2, first.z, seed),
        CodedGradient.pack(first.round, first.client, BASIS, gradient, seed, codec, seed, attempt=seed),
        StepRequest(first.round, first.client, seed, 9 * seed, RULE if seed % 2 else {}),
        ProbeRequest(first.round, first.client, 4095 - seed, seed % 2, seed),
        RoundEnd(first.round, list(range(seed)), seed),
        Terms(first.round, sender, "é", SETTINGS, 2**64 - 1 - seed, held, RULE, BASIS if seed % 2 else {}, codecs,
              bool(seed % 2), "bf16-mixed", "ab" * seed),
        Hello(first.round, "é", "0.1", "00ff" * seed, ["A", "B"][: seed % 3]),
        Bye(first.round, "é" * seed, bool(seed % 2), not seed % 2),
        HeldOutRequest(first.round, first.client, 9 * seed, seed),
        Acknowledgement(first.round, first.client, seed, bool(seed % 2)),
        UnlabelledData(first.round, first.client, first.z, first.mask, len(first.z.values) // 2, seed, 9 * seed),
        MiddleOutput(first.round, first.client, first.z, seed, 9 * seed),
        OutputMultiplier(first.round, first.client, first.z, loss, seed, 9 * seed),
        SecureKeys(first.round, first.client, basis, rows.flatten(), 10 ** min(seed, 18), seed, "é" * seed),
        SecurePeers(first.round, first.client, list(range(len(rows))), rows, seed, seed),
        SecureShares(first.round, first.client, list(range(len(rows))), rows, seed),
        MaskedGradients(first.round, first.client, rows.flatten(), seed),
        UnmaskRequest(first.round, first.client, list(range(seed)), seed),
    ]  # fmt: skip


def every_form(seed: int) -> list[Message]:
    """One message of each kind, and those that are coded in every codec."""
    return [m for c in CODECS for m in messages(seed, c) if c == CODECS[0] or isinstance(m, CODED)]


def same(left: Any, right: Any) -> bool:
    """Equal types, values, dtypes, shapes and bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, (Coded, *MESSAGES.values())):
        return same(vars(left), vars(right))
    return bool(left == right) and repr(left) == repr(right)


def seal(payload: bytes, **changes: Any) -> bytes:
    """An envelope written from its description, sharing nothing with the package."""
    values = {"magic": b"HOSF", "version": 2, "kind": 3, "reserved": 0, "round": 1, "client": 3, "run": bytes(16)}
    values |= {"length": len(payload)} | changes
    fixed = struct.pack("<4sHBBII16sQ", *values.values())
    return fixed + hashlib.sha256(fixed + payload).digest() + payload


def reseal(data: bytes) -> bytes:
    """The frame with the checksum of its bytes."""
    return data[:40] + hashlib.sha256(data[:40] + data[72:]).digest() + data[72:]


def frame(plain: object, tensors: dict[str, Tensor] | None = None, **changes: Any) -> bytes:
    """A frame whose payload is written by safetensors; ``plain`` may be JSON text already."""
    text = plain if isinstance(plain, str) else json.dumps(plain)
    return seal(save({"coefficients": torch.ones(2)} if tensors is None else tensors, {"message": text}), **changes)
