r"""What differential privacy does to what a client sends, in numpy for every engine.

::

    answer   c̃ = (1/B) ( Σ_i v_i min(1, C/‖v_i‖₂)  +  σ C n ),   n ~ N(0, I)
    token    z̃_t = z_t min(1, C_z/‖z_t‖₂)  +  σ_z C_z n_t

v_i is an example's own vector of coefficients, or the client's whole answer, of which there is one and B = 1.

n is drawn in double precision from a stream that only who knows the key can draw again. A double that is such a sum
gives itself away by its lowest bits (Mironov, "On significance of the least significant bits for differential
privacy", CCS 2012): which of them can be reached depends on the value beneath the noise. So what is released is rounded
to a grid of 2^-12 to 2^-13 of the noise's standard deviation, where every point is reached by very many doubles. Its
proof is that of the Gaussian mechanism in real numbers; the tails end at 8.6 standard deviations, a mass of 1e-17.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hosfl_client.bfloat16 import Array

#: Normal numbers of one digest: 512 KiB of scratch.
CHUNK = 1 << 15
#: The grid's steps in a standard deviation of the noise, in powers of two.
GRID_BITS = 12
KEY_BYTES = 32


@dataclass(frozen=True)
class NoiseKey:
    """From what the noise is drawn; as it is made here, from a secret of this process.

    Attributes:
        secret: 32 bytes.
        simulated: The secret follows from the run's seed, so that a simulation repeats. Else a value has noise of its
            own: who asks again and gets the same value gets the same bits, and who gets another value under the noise
            of the first cannot subtract them.
    """

    secret: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES), repr=False)
    simulated: bool = False

    @classmethod
    def of_seed(cls, seed: int) -> NoiseKey:
        """Of simulated clients: whoever knows the run's seed can take the noise away."""
        return cls(hashlib.sha256(f"hosfl simulated noise {seed}".encode()).digest(), simulated=True)

    @classmethod
    def kept(cls, folder: str | os.PathLike[str]) -> NoiseKey:
        """Of a client on a machine of its own: made once, read by its user alone, the same when it comes back.

        Raises:
            ValueError: The file holds something else.
        """
        path = Path(folder) / "noise.key"
        with suppress(FileExistsError):
            made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.write(made, secrets.token_bytes(KEY_BYTES))
                os.fsync(made)
            finally:
                os.close(made)
        secret = path.read_bytes()
        if len(secret) != KEY_BYTES:
            raise ValueError(f"--state: {path} has {len(secret)} bytes, a key has {KEY_BYTES}; delete it")
        return cls(secret)

    def normal(self, place: str, value: Array) -> Array:
        """As many standard normal numbers as ``value`` has elements, in its shape, fp64.

        Args:
            place: What is released; no two releases have the same.
            value: Beneath the noise.
        """
        if not self.simulated:
            place += "/" + hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return normal(self.secret, place, value.size).reshape(value.shape)


def normal(secret: bytes, place: str, count: int) -> Array:
    r"""``√(−2 ln u) (cos 2πv, sin 2πv)`` of uniform numbers of 53 bits from SHAKE-256, ``(count,)`` fp64.

    Args:
        secret: The key.
        place: What the numbers are for.
        count: How many.
    """
    out = np.empty(count, np.float64)
    for first in range(0, count, CHUNK):
        part = out[first : first + CHUNK]
        pairs = (len(part) + 1) // 2
        stream = hashlib.shake_256(secret + f"{place}#{first}".encode()).digest(16 * pairs)
        u, v = ((np.frombuffer(stream, "<u8") >> np.uint64(11)) + np.uint64(1)).reshape(2, pairs) * 2.0**-53
        radius, angle = np.sqrt(-2.0 * np.log(u)), 2.0 * math.pi * v
        part[:] = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: len(part)]
    return out


def clipped(rows: Array, clip: float) -> Array:
    """``v min(1, C/‖v‖₂)`` of every row, fp64; a row that is not finite is zero, since no bound holds for it."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide = rows.astype(np.float64)
        norms = np.sqrt(np.square(wide).sum(1))
    found = np.isfinite(norms)
    wide[~found] = 0.0
    return wide * (clip / np.maximum(norms, clip, out=np.full_like(norms, clip), where=found))[:, None]


def on_grid(values: Array, deviation: float) -> Array:
    """Rounded to the power of two at or below ``deviation`` times 2^-12."""
    step = math.ldexp(1.0, math.floor(math.log2(deviation)) - GRID_BITS)
    return np.rint(values / step) * step


class Mechanism:
    """How what a client sends is clipped and noised.

    Args:
        settings: `Terms.privacy`: ``level`` (``example``, ``client``, or null: answers leave as they are), ``clip``,
            ``noise_multiplier``, ``delta``, ``token_clip``, ``token_noise_multiplier`` (null: z leaves as it is),
            ``multiplier_clip``, ``multiplier_noise_multiplier`` (the same of λ₂ of a client that has the head).
        key: Of the noise.
    """

    def __init__(self, settings: Mapping[str, Any], key: NoiseKey) -> None:
        self.level: str | None = settings["level"]
        self.clip, self.noise_multiplier = settings["clip"], settings["noise_multiplier"]
        self.of_tokens = {
            "smashed_data": (settings["token_clip"], settings["token_noise_multiplier"]),
            "output_multiplier": (settings["multiplier_clip"], settings["multiplier_noise_multiplier"]),
        }
        self.delta, self.key = settings["delta"], key

    @property
    def by_example(self) -> bool:
        """Whether an answer is made of one vector an example."""
        return self.level == "example"

    def answer(self, rows: Array, round: int, attempt: int, client: int) -> Array:
        """``c̃ (P,)`` fp32.

        Args:
            rows: ``(B, P)``, one an example or one for all of them; B must not depend on the data.
            round: Counted from 0.
            attempt: Of the round.
            client: Whose.
        """
        deviation = self.noise_multiplier * self.clip
        total = clipped(rows, self.clip).sum(0)
        noise = self.key.normal(f"answer/{round}/{attempt}/{client}", total)
        return (on_grid(total + deviation * noise, deviation) / len(rows)).astype(np.float32)

    def tokens(self, rows: Array, what: str, place: tuple[object, ...]) -> Array:
        """``z̃ (n, h)`` fp32, token by token; as given where it is not noised.

        Args:
            rows: ``(n, h)`` fp32, padding left out.
            what: ``smashed_data``, or ``output_multiplier``: then each row is of its own token's loss, not of the mean.
            place: Kind of the request, round, attempt, step and client.
        """
        clip, multiplier = self.of_tokens[what]
        if clip is None:
            return rows
        deviation = multiplier * clip
        total = clipped(rows, clip)
        noise = self.key.normal("/".join(map(str, ("tokens", *place))), total)
        return on_grid(total + deviation * noise, deviation).astype(np.float32)

    def objection(self, examples: int) -> str | None:
        """Why a client with so many examples does not take part: δ is its risk of losing one of them whole."""
        if self.by_example and self.delta > 1 / examples:
            return (
                f"trainer.privacy.delta is {self.delta:g}, above 1/{examples} of this client's examples: it would "
                "allow to publish one of them as it is; lower it at the server"
            )
        return None
