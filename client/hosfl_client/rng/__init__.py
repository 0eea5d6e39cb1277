"""The counter-based random generator: one stream of directions, bit-identical on every engine."""

from hosfl_client.rng.directions import Piece, add_direction, direction, sums
from hosfl_client.rng.distributions import DISTRIBUTIONS, round_coefficient, round_coefficients
from hosfl_client.rng.rounding import Uniform16, uniform16
from hosfl_client.rng.sampling import permutation
from hosfl_client.rng.streams import Domain, Stream

__all__ = [
    "DISTRIBUTIONS",
    "Domain",
    "Piece",
    "Stream",
    "Uniform16",
    "add_direction",
    "direction",
    "permutation",
    "round_coefficient",
    "round_coefficients",
    "sums",
    "uniform16",
]
