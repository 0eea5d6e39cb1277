"""Methods: what happens in a round."""

from hosfl_lightning.algorithms.base import Algorithm, TooFewClientsError
from hosfl_lightning.algorithms.csefsl import CSEFSL
from hosfl_lightning.algorithms.fedavg import FedAvg
from hosfl_lightning.algorithms.frozen import Frozen
from hosfl_lightning.algorithms.fslsage import FSLSAGE
from hosfl_lightning.algorithms.heronsfl import HERONSFL
from hosfl_lightning.algorithms.hosfl import HOSFL
from hosfl_lightning.algorithms.hosl import HOSL
from hosfl_lightning.algorithms.split_learning import SplitLearning
from hosfl_lightning.algorithms.splitfed_sgd import SplitFedSGD
from hosfl_lightning.algorithms.splitfed_v1 import SplitFedV1
from hosfl_lightning.algorithms.splitfed_v2 import SplitFedV2
from hosfl_lightning.algorithms.zofl import ZOFL
from hosfl_lightning.algorithms.zosfl import ZOSFL

__all__ = [
    "CSEFSL",
    "FSLSAGE",
    "HERONSFL",
    "HOSFL",
    "HOSL",
    "ZOFL",
    "ZOSFL",
    "Algorithm",
    "FedAvg",
    "Frozen",
    "SplitFedSGD",
    "SplitFedV1",
    "SplitFedV2",
    "SplitLearning",
    "TooFewClientsError",
]
