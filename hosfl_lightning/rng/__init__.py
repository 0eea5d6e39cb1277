"""The counter-based random generator: one stream of directions, bit-identical on every device."""

from hosfl_client.rng.distributions import DISTRIBUTIONS
from hosfl_client.rng.streams import Domain, Stream
from hosfl_lightning.rng.batch import DirectionBatch
from hosfl_lightning.rng.directions import add_direction_, direction, direction_rows
from hosfl_lightning.rng.distributions import round_coefficient
from hosfl_lightning.rng.philox import philox4x32, words
from hosfl_lightning.rng.rounding import uniform16
from hosfl_lightning.rng.sampling import permutation

RADEMACHER, GAUSS16, CLIENT_SAMPLING, DATA_ORDER, COORDINATES, ROUNDING, SHIFT = Domain

__all__ = [
    "CLIENT_SAMPLING",
    "COORDINATES",
    "DATA_ORDER",
    "DISTRIBUTIONS",
    "GAUSS16",
    "RADEMACHER",
    "ROUNDING",
    "SHIFT",
    "DirectionBatch",
    "Domain",
    "Stream",
    "add_direction_",
    "direction",
    "direction_rows",
    "permutation",
    "philox4x32",
    "round_coefficient",
    "uniform16",
    "words",
]
