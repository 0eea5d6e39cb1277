"""Methods: what the server does in a round, and what its clients answer."""

from hosfl_lightning.algorithms.base import Algorithm
from hosfl_lightning.algorithms.csefsl import CSEFSL
from hosfl_lightning.algorithms.fedavg import FedAvg
from hosfl_lightning.algorithms.frozen import Frozen
from hosfl_lightning.algorithms.fslsage import FSLSAGE
from hosfl_lightning.algorithms.heronsfl import HERONSFL
from hosfl_lightning.algorithms.hosfl import HOSFL
from hosfl_lightning.algorithms.hosl import HOSL
from hosfl_lightning.algorithms.mixed import ClientKind, MixedHOSFL
from hosfl_lightning.algorithms.mu_splitfed import MUSplitFed
from hosfl_lightning.algorithms.split_learning import SplitLearning
from hosfl_lightning.algorithms.splitfed_sgd import SplitFedSGD
from hosfl_lightning.algorithms.splitfed_v1 import SplitFedV1
from hosfl_lightning.algorithms.splitfed_v2 import SplitFedV2
from hosfl_lightning.algorithms.zofl import ZOFL
from hosfl_lightning.algorithms.zosfl import ZOSFL
from hosfl_lightning.server import TooFewClientsError

__all__ = [
    "CSEFSL",
    "FSLSAGE",
    "HERONSFL",
    "HOSFL",
    "HOSL",
    "ZOFL",
    "ZOSFL",
    "Algorithm",
    "ClientKind",
    "FedAvg",
    "Frozen",
    "MUSplitFed",
    "MixedHOSFL",
    "SplitFedSGD",
    "SplitFedV1",
    "SplitFedV2",
    "SplitLearning",
    "TooFewClientsError",
]
