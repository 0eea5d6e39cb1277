"""Callbacks for a plain Trainer, and their parts."""

from hosfl_lightning.callbacks.drop_in.hybrid_order import HybridOrder
from hosfl_lightning.callbacks.drop_in.zeroth_order_training import ZerothOrderTraining

__all__ = ["HybridOrder", "ZerothOrderTraining"]
