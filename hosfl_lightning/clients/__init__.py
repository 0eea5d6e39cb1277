"""Clients: what holds the lower half and how it is trained."""

from hosfl_lightning.clients.auxiliary import AuxiliaryClient, AuxiliaryHalf
from hosfl_lightning.clients.base import Anchor, Client, Cohort, SplitClient, lagrangian_term, run
from hosfl_lightning.clients.first_order import FirstOrderClient
from hosfl_lightning.clients.forward_only import ForwardOnlyClient
from hosfl_lightning.clients.frozen import FrozenClient
from hosfl_lightning.clients.local_gradient import LocalGradientClient
from hosfl_lightning.clients.objective import ObjectiveClient, WholeModel

__all__ = [
    "Anchor",
    "AuxiliaryClient",
    "AuxiliaryHalf",
    "Client",
    "Cohort",
    "FirstOrderClient",
    "ForwardOnlyClient",
    "FrozenClient",
    "LocalGradientClient",
    "ObjectiveClient",
    "SplitClient",
    "WholeModel",
    "lagrangian_term",
    "run",
]
