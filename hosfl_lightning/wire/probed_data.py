"""The message of a method whose server evaluates the probes: the smashed data of one perturbed client half."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hosfl_lightning.wire.checks import check_counts
from hosfl_lightning.wire.codecs import Coded
from hosfl_lightning.wire.errors import FieldError
from hosfl_lightning.wire.padding import PROBES, pack_rows, rounding_stream, unpack_rows


@dataclass(frozen=True, eq=False)
class ProbedData:
    """Client k to server: z = f_c(x_k; θ_c + μ u_p) or f_c(x_k; θ_c − μ u_p) at the valid tokens.

    Labels and mask are those of the round's `SmashedData`. Reference: HOSL, arXiv 2601.10940.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        probe: Index p of the direction, from 0 on.
        side: 0 for θ_c + μ u_p, 1 for θ_c − μ u_p.
        z: (n, h), coded; it comes back in the dtype it had.
        attempt: How often the round was repeated before, >= 0.
    """

    kind: ClassVar[str] = "probed_data"
    round: int
    client: int
    probe: int
    side: int
    z: Coded
    attempt: int = 0

    @classmethod
    def pack(
        cls,
        round: int,
        client: int,
        probe: int,
        side: int,
        z: Tensor,
        mask: Tensor,
        codec: str = "fp32",
        seed: int = 0,
        step: int = 0,
        attempt: int = 0,
    ) -> ProbedData:
        """Drops the padding of ``z`` (B, S, h) by ``mask`` (B, S) bool, and codes it.

        Raises:
            FieldError: Shapes that do not fit, a mask that is not bool, an unknown codec, or a probe, side or local
                step out of range.
        """
        check_probe(cls.kind, probe, side)
        stream = rounding_stream(cls.kind, seed, round, client, step)
        coded = pack_rows(cls.kind, "z", z, mask, codec, stream, tensor=2 + 2 * probe + side)
        return cls(round, client, probe, side, coded, attempt)

    def unpack(self, mask: Tensor) -> Tensor:
        """z as (B, S, h) with zeros at padding; ``mask`` is the one the client sent.

        Raises:
            ShapeError: The mask has another number of valid tokens than z has rows.
        """
        return unpack_rows(self.kind, self.z, mask)

    def unpacked_bytes(self) -> int:
        """Memory of z without its padding, which is the receiver's own."""
        return self.z.restored_bytes()

    def check(self) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, attempt=self.attempt)
        check_probe(self.kind, self.probe, self.side)
        self.z.check(self.kind, "z")


def check_probe(kind: str, probe: int, side: int) -> None:
    """Raises FieldError unless they name one side of a probe that a round can have."""
    check_counts(kind, probe=probe, side=side)
    if probe >= PROBES:
        raise FieldError(f"{kind}: probe must be below {PROBES}, got {probe}")
    if side > 1:
        raise FieldError(f"{kind}: side must be 0 (θ + μu) or 1 (θ − μu), got {side}")
