"""Clients: what answers the server, and the engines that hold and train a client's half."""

from hosfl_lightning.clients.auxiliary import AuxiliaryClient, AuxiliaryHalf
from hosfl_lightning.clients.auxiliary_endpoint import AuxiliaryEndpoint, SphereEndpoint
from hosfl_lightning.clients.base import Anchor, Client, SplitClient
from hosfl_lightning.clients.cohort import Cohort, Minibatches
from hosfl_lightning.clients.endpoint import Endpoint, EndpointError, TermsError
from hosfl_lightning.clients.first_order import FirstOrderClient
from hosfl_lightning.clients.forward_only import ForwardOnlyClient
from hosfl_lightning.clients.frozen import FrozenClient
from hosfl_lightning.clients.half import Half
from hosfl_lightning.clients.lagrangian import lagrangian_term
from hosfl_lightning.clients.local_endpoint import LocalSplitEndpoint, WholeEndpoint
from hosfl_lightning.clients.local_gradient import LocalGradientClient
from hosfl_lightning.clients.mixed_endpoint import MixedEndpoint
from hosfl_lightning.clients.objective import ObjectiveClient, WholeModel
from hosfl_lightning.clients.personal_endpoint import PersonalEndpoint
from hosfl_lightning.clients.probed_endpoint import ProbedEndpoint
from hosfl_lightning.clients.split_endpoint import SplitEndpoint
from hosfl_lightning.clients.unbalanced_endpoint import UnbalancedEndpoint
from hosfl_lightning.clients.walk_endpoint import WalkEndpoint

__all__ = [
    "Anchor",
    "AuxiliaryClient",
    "AuxiliaryEndpoint",
    "AuxiliaryHalf",
    "Client",
    "Cohort",
    "Endpoint",
    "EndpointError",
    "FirstOrderClient",
    "ForwardOnlyClient",
    "FrozenClient",
    "Half",
    "LocalGradientClient",
    "LocalSplitEndpoint",
    "Minibatches",
    "MixedEndpoint",
    "ObjectiveClient",
    "PersonalEndpoint",
    "ProbedEndpoint",
    "SphereEndpoint",
    "SplitClient",
    "SplitEndpoint",
    "TermsError",
    "UnbalancedEndpoint",
    "WalkEndpoint",
    "WholeEndpoint",
    "WholeModel",
    "lagrangian_term",
]
