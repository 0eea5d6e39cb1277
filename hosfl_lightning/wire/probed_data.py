"""The message of a method whose server evaluates the probes: the smashed data of one perturbed client half."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hosfl_client.padding import rounding_stream
from hosfl_client.wire.checks import check_probe
from hosfl_client.wire.coded import ProbedDataFields, probe_index
from hosfl_lightning.wire.codecs import Coded
from hosfl_lightning.wire.padding import pack_rows, unpack_rows


@dataclass(frozen=True, eq=False)
class ProbedData(ProbedDataFields):
    """z of one side of a probe."""

    z: Coded

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
        coded = pack_rows(cls.kind, "z", z, mask, codec, stream, tensor=probe_index(probe, side))
        return cls(round, client, probe, side, coded, attempt)

    def unpack(self, mask: Tensor) -> Tensor:
        """z as (B, S, h) with zeros at padding; ``mask`` is the one the client sent.

        Raises:
            ShapeError: The mask has another number of valid tokens than z has rows.
        """
        return unpack_rows(self.kind, self.z, mask)
