"""Step 5 of a round: who is heard, by which rule the answers become one, and the record that applies it."""

from hosfl_lightning.aggregation.rules import (
    AggregationRule,
    Median,
    NormClippedMean,
    TrimmedMean,
    WeightedMean,
    aggregated,
)
from hosfl_lightning.aggregation.screening import LIMIT, screen
from hosfl_lightning.aggregation.update import MEAN, UpdateError, apply_update, combine, prescribe, recorded, update_of
from hosfl_lightning.aggregation.weights import weighted_mean, weights

__all__ = [
    "LIMIT",
    "MEAN",
    "AggregationRule",
    "Median",
    "NormClippedMean",
    "TrimmedMean",
    "UpdateError",
    "WeightedMean",
    "aggregated",
    "apply_update",
    "combine",
    "prescribe",
    "recorded",
    "screen",
    "update_of",
    "weighted_mean",
    "weights",
]
