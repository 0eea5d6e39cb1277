"""Zeroth-order optimization: bases, estimators, update rules, and the optimizer made of them."""

from hosfl_lightning.optim.basis import Basis, Dense, SharedDirections
from hosfl_lightning.optim.basis_of import basis_of
from hosfl_lightning.optim.beside import Beside
from hosfl_lightning.optim.client_directions import ClientDirections
from hosfl_lightning.optim.compression import Compression, RandomProjections, RandomSubset, Uncompressed
from hosfl_lightning.optim.coordinates import Coordinates
from hosfl_lightning.optim.estimators import (
    ESTIMATORS,
    CentralDifference,
    Estimator,
    EstimatorError,
    ForwardDerivative,
    ForwardDifference,
    Probes,
    central_difference,
    estimator_of,
    forward_derivative,
    forward_difference,
)
from hosfl_lightning.optim.local_walk import LocalWalk, check_linear
from hosfl_lightning.optim.moments import Moments
from hosfl_lightning.optim.own_parameters import OwnParameters, swapped
from hosfl_lightning.optim.rules import SGD, AdamW, UpdateRule, check_rule, rule_of
from hosfl_lightning.optim.zeroth_order import ZerothOrder

__all__ = [
    "ESTIMATORS",
    "SGD",
    "AdamW",
    "Basis",
    "Beside",
    "CentralDifference",
    "ClientDirections",
    "Compression",
    "Coordinates",
    "Dense",
    "Estimator",
    "EstimatorError",
    "ForwardDerivative",
    "ForwardDifference",
    "LocalWalk",
    "Moments",
    "OwnParameters",
    "Probes",
    "RandomProjections",
    "RandomSubset",
    "SharedDirections",
    "Uncompressed",
    "UpdateRule",
    "ZerothOrder",
    "basis_of",
    "central_difference",
    "check_linear",
    "check_rule",
    "estimator_of",
    "forward_derivative",
    "forward_difference",
    "rule_of",
    "swapped",
]
