"""Zeroth-order optimization: bases, estimators, update rules, and the optimizer made of them."""

from hosfl_lightning.optim.basis import Basis, Dense, SharedDirections, basis_of
from hosfl_lightning.optim.estimators import ESTIMATORS, central_difference, forward_difference
from hosfl_lightning.optim.local_walk import LocalWalk, check_linear
from hosfl_lightning.optim.moments import Moments
from hosfl_lightning.optim.rules import SGD, AdamW, UpdateRule
from hosfl_lightning.optim.zeroth_order import ZerothOrder

__all__ = [
    "ESTIMATORS",
    "SGD",
    "AdamW",
    "Basis",
    "Dense",
    "LocalWalk",
    "Moments",
    "SharedDirections",
    "UpdateRule",
    "ZerothOrder",
    "basis_of",
    "central_difference",
    "check_linear",
    "forward_difference",
]
