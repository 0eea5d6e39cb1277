"""Philox4x32-10 without its arithmetic: its constants, and which key and counter a purpose, a round, a probe have.

The ten rounds are every engine's own: `hosfl_client.rng.philox` in numpy, `hosfl_lightning.rng.philox` in PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF
BLOCK_BITS, TENSOR_BITS, CLIENT_BITS, PROBE_BITS, ROUND_BITS = 40, 16, 20, 12, 32


class Domain(IntEnum):
    """What a stream of words is used for; two domains never share a counter. 0 is reserved."""

    RADEMACHER = 1
    GAUSS16 = 2
    CLIENT_SAMPLING = 3
    DATA_ORDER = 4
    COORDINATES = 5
    ROUNDING = 6
    SHIFT = 7


def check_range(name: str, value: int, stop: int) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer with 0 <= value < stop."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < stop:
        raise ValueError(f"{name} must be an integer with 0 <= {name} < {stop}, got {value!r}")


@dataclass(frozen=True)
class Stream:
    """Key and counter of the generator, all but the tensor and the block.

    key = (seed[31:0], seed[63:32]) and, with a tensor and a block, the injective counter

        c0 = block[31:0]
        c1 = block[39:32] << 24 | domain << 16 | tensor
        c2 = (0 if client is None else client + 1) << 12 | probe
        c3 = round

    Args:
        seed: The run's seed, 64 bits.
        domain: What the words are for, see :class:`Domain`.
        round: Round of the run, 32 bits.
        client: Client id below 2^20 - 1, or ``None`` for what all clients share.
        probe: Index of the direction within the round, 12 bits.
        first_tensor: Number of the first tensor: those of the server come after the client's, so that no two of the
            model draw the same words.

    Raises:
        ValueError: A field is out of its range.
    """

    seed: int
    domain: Domain
    round: int = 0
    client: int | None = None
    probe: int = 0
    first_tensor: int = 0

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 1 << 64)
        if self.domain not in iter(Domain):
            raise ValueError(f"domain must be one of {[f'{d.name}={d.value}' for d in Domain]}, got {self.domain!r}")
        check_range("round", self.round, 1 << ROUND_BITS)
        if self.client is not None:
            check_range("client", self.client, (1 << CLIENT_BITS) - 1)
        check_range("probe", self.probe, 1 << PROBE_BITS)

    @property
    def key(self) -> tuple[int, int]:
        """The two key words (k0, k1)."""
        return self.seed & MASK32, self.seed >> 32

    def c1(self, tensor: int, block: int = 0) -> int:
        """Counter word 1: upper bits of the block, domain and tensor.

        Raises:
            ValueError: A tensor beyond 16 bits.
        """
        check_range("tensor", self.first_tensor + tensor, 1 << TENSOR_BITS)
        return block >> 32 << 24 | self.domain << TENSOR_BITS | self.first_tensor + tensor

    @property
    def c2(self) -> int:
        """Counter word 2: client and probe."""
        return (0 if self.client is None else self.client + 1) << PROBE_BITS | self.probe

    @property
    def c3(self) -> int:
        """Counter word 3: round."""
        return self.round
