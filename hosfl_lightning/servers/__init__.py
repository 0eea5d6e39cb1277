"""Server heads: LightningModules that train the upper half of a cut model."""

from hosfl_lightning.servers.base import SplitModule
from hosfl_lightning.servers.causal_lm import SplitCausalLM
from hosfl_lightning.servers.image_classification import SplitImageClassifier
from hosfl_lightning.servers.pretrained import TINY_LM, PretrainedError
from hosfl_lightning.servers.sequence_classification import SplitSequenceClassifier

__all__ = [
    "TINY_LM",
    "PretrainedError",
    "SplitCausalLM",
    "SplitImageClassifier",
    "SplitModule",
    "SplitSequenceClassifier",
]
