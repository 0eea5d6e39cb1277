"""Hybrid-order split federated fine-tuning for PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hosfl_lightning import moved as _moved

if TYPE_CHECKING:
    from hosfl_lightning.algorithms import HOSFL
    from hosfl_lightning.callbacks import HybridOrder, ZerothOrderTraining
    from hosfl_lightning.models import SplitCausalLM, SplitImageClassifier, SplitSequenceClassifier
    from hosfl_lightning.orchestrator import Orchestrator
    from hosfl_lightning.run.control import Control

__version__ = "0.1.0"
__all__ = [
    "HOSFL", "Control", "HybridOrder", "Orchestrator", "SplitCausalLM", "SplitImageClassifier",
    "SplitSequenceClassifier", "ZerothOrderTraining", "__version__",
]  # fmt: skip

_PLACES = {
    "Control": "run.control",
    "HOSFL": "algorithms",
    "HybridOrder": "callbacks",
    "Orchestrator": "orchestrator",
    "SplitCausalLM": "models",
    "SplitImageClassifier": "models",
    "SplitSequenceClassifier": "models",
    "ZerothOrderTraining": "callbacks",
}
_moved.install()


def __getattr__(name: str) -> Any:
    # When it is asked for: a client needs no orchestrator, and nobody the whole package.
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
