"""Hybrid-order split federated fine-tuning for PyTorch Lightning."""

from hosfl_lightning.algorithms import HOSFL
from hosfl_lightning.orchestrator import Orchestrator
from hosfl_lightning.servers import SplitCausalLM, SplitImageClassifier, SplitSequenceClassifier

__version__ = "0.1.0"
__all__ = ["HOSFL", "Orchestrator", "SplitCausalLM", "SplitImageClassifier", "SplitSequenceClassifier", "__version__"]
