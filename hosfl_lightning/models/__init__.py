"""Server heads: LightningModules that train the upper half of a cut model."""

from hosfl_lightning.models.base import SplitModule
from hosfl_lightning.models.causal_lm import SplitCausalLM
from hosfl_lightning.models.image_classification import SplitImageClassifier
from hosfl_lightning.models.pretrained import TINY_LM, PretrainedError
from hosfl_lightning.models.sequence_classification import SplitSequenceClassifier

__all__ = [
    "TINY_LM",
    "PretrainedError",
    "SplitCausalLM",
    "SplitImageClassifier",
    "SplitModule",
    "SplitSequenceClassifier",
]
