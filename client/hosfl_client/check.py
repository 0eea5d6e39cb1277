"""``hosfl-client check``: whether this device, and the engine under a half, compute what was recorded on export.

    the same bits     a step of the update rule along the run's directions; z in every codec
    to rounding       z; the projected gradients of probes; the side adapter's exact gradient, projected

The first must agree with all other clients, or θ_c would not stay the same; the second may differ as engines do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from hosfl_client.basis import SharedDirections
from hosfl_client.bfloat16 import Array, Floats
from hosfl_client.codecs import CODECS, Coded
from hosfl_client.half import Half, OnnxHalf
from hosfl_client.known_gradient import known_gradient
from hosfl_client.lagrangian import LagrangianTerm
from hosfl_client.manifest import Manifest
from hosfl_client.optimizer import Optimizer
from hosfl_client.rng import Domain, Stream
from hosfl_client.rules import rule_of

#: How far what is computed to rounding may be from the record, as a share of its largest value.
LARGEST = {"z": 1e-3, "probes": 0.05, "side adapter": 1e-2}
#: Of the recorded round.
SEED, ROUND, PROBES = 0x0123456789ABCDEF, 7, 3
RULE = {"name": "AdamW", "lr": 0.01, "weight_decay": 0.1, "betas": [0.9, 0.999], "eps": 1e-8}
COEFFICIENTS = (0.5, -1.25, 3.0)


class CheckError(RuntimeError):
    """This device or its engine does not compute what was recorded."""


def check(half: str | Path, threads: int | None = None, say: Callable[[str], None] = print) -> None:
    """Try an exported half here.

    Args:
        half: ``phone.onnx``.
        threads: That compute.
        say: Takes a line for each part.

    Raises:
        CheckError: A part differs.
    """
    engine = OnnxHalf(half, threads)
    check_half(engine, engine.manifest, Path(half).parent, say)


def check_half(half: Half, manifest: Manifest, folder: Path, say: Callable[[str], None] = print) -> None:
    """The same of any engine.

    Args:
        half: The engine.
        manifest: Of the exported half.
        folder: Where its files are.
        say: Takes a line for each part.

    Raises:
        CheckError: A part differs, or nothing was recorded.
    """
    from safetensors.numpy import load_file

    if manifest.check is None:
        raise CheckError("--half: nothing was recorded on export; export the half again")
    held = load_file(folder / manifest.check)
    told: dict[str, str] = json.loads(bytes(held.pop("digests")))
    batch = {one.name: held[one.name] for one in manifest.inputs}
    failed = []
    found = bits(half, held["z"])
    for name, digest in told.items():
        same = found[name] == digest
        say(f"{name:<24}{'the same bits' if same else 'OTHER BITS'}")
        failed += [] if same else [name]
    for name, values in measured(half, manifest, batch, held["multiplier"], float(held["mu"])).items():
        largest = float(np.abs(held[name]).max()) or 1.0
        off = float(np.abs(values - held[name]).max()) / largest
        good = off <= LARGEST[name]
        say(f"{name:<24}{off:.1e} of the largest{'' if good else f', more than {LARGEST[name]:g}'}")
        failed += [] if good else [name]
    if failed:
        raise CheckError(f"not as it was recorded: {', '.join(failed)}; this device would end with other weights than "
                         "the run, or its engine does not run this half")  # fmt: skip


def bits(half: Half, z: Floats) -> dict[str, str]:
    """SHA-256 of what must be the same everywhere, by name.

    Args:
        half: Of whose θ_c a copy moves.
        z: ``(B, S, h)``, as recorded.
    """
    theta = [array.copy() for array in half.parameters().values()]
    optimizer = Optimizer(theta, rule_of(RULE), SEED)
    for step, distribution in enumerate(("rademacher", "gauss16"), 1):
        basis = {"kind": "shared_directions", "probes": PROBES, "distribution": distribution}
        optimizer.apply(SimpleNamespace(
            round=ROUND + step, basis=basis, coefficients=np.array(COEFFICIENTS, np.float32), rule=RULE, step=step
        ))  # fmt: skip
    found = {"directions and rule": optimizer.digest()}
    rows = z.reshape(-1, z.shape[-1])
    for codec in CODECS:
        coded = Coded.of(rows, codec, Stream(SEED, Domain.ROUNDING, ROUND, 0, 0), 0)
        total = sha256(np.ascontiguousarray(coded.values).reshape(-1).view(np.uint8).data)
        total.update(np.ascontiguousarray(coded.restore()).reshape(-1).view(np.uint8).data)
        found[f"codec {codec}"] = total.hexdigest()
    return found


def measured(
    half: Half, manifest: Manifest, batch: Mapping[str, Array], multiplier: Floats, mu: float
) -> dict[str, Floats]:
    """What may differ by rounding.

    Args:
        half: The engine.
        manifest: Of the half.
        batch: As recorded.
        multiplier: λ at the valid positions, ``(n, h)``.
        mu: μ.
    """
    z = half.forward(batch)
    mask = batch["attention_mask"].astype(bool) if "attention_mask" in batch else np.ones(z.shape[:2], bool)
    coded, basis = Coded("fp32", "float32", multiplier.shape[1], multiplier), SharedDirections(SEED, ROUND, PROBES)
    term = LagrangianTerm(coded, mask)
    base, theta, probes = term(z), [*half.parameters().values()], []
    for probe in range(PROBES):
        moved = [np.empty_like(array) for array in theta]
        basis.perturb(theta, probe, float(np.float32(mu)), moved)
        with half.perturbed(lambda number, _, moved=moved: moved[number]):  # type: ignore[misc]
            probes.append((term(half.forward(batch)) - base) / float(np.float32(mu)))
    found = {"z": np.where(mask[..., None], z, 0), "probes": np.array(probes, np.float32)}
    if manifest.side:
        known = known_gradient(half, manifest, batch, coded, mask)
        found["side adapter"] = basis.project(known)
    return found
