"""Lightning callbacks: steps of the round, and monitors."""

from hosfl_lightning.callbacks.budget import Budget
from hosfl_lightning.callbacks.communication_monitor import CommunicationMonitor
from hosfl_lightning.callbacks.dimension_free_aggregation import DimensionFreeAggregation
from hosfl_lightning.callbacks.drop_in.hybrid_order import HybridOrder
from hosfl_lightning.callbacks.drop_in.zeroth_order_training import ZerothOrderTraining
from hosfl_lightning.callbacks.gradient_alignment import GradientAlignment
from hosfl_lightning.callbacks.keep_messages import KeepMessages
from hosfl_lightning.callbacks.lagrangian_update import LagrangianUpdate
from hosfl_lightning.callbacks.peak_memory_monitor import PeakMemoryMonitor
from hosfl_lightning.callbacks.privacy_monitor import PrivacyMonitor
from hosfl_lightning.callbacks.progress import RoundProgressBar
from hosfl_lightning.callbacks.random_signs import RandomSigns
from hosfl_lightning.callbacks.serve_console import ServeConsole

__all__ = [
    "Budget",
    "CommunicationMonitor",
    "DimensionFreeAggregation",
    "GradientAlignment",
    "HybridOrder",
    "KeepMessages",
    "LagrangianUpdate",
    "PeakMemoryMonitor",
    "PrivacyMonitor",
    "RandomSigns",
    "RoundProgressBar",
    "ServeConsole",
    "ZerothOrderTraining",
]
