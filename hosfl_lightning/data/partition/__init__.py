"""Which client holds which examples: partitioners, their contract, and the short words for them in a recipe."""

from hosfl_lightning.data.partition.by_field import ByField, partition_by_field
from hosfl_lightning.data.partition.by_file import ByFile
from hosfl_lightning.data.partition.contract import Examples, Partitioner, deal
from hosfl_lightning.data.partition.dirichlet import Dirichlet, partition_dirichlet
from hosfl_lightning.data.partition.iid import IID, partition_iid
from hosfl_lightning.data.partition.quantity_skew import QuantitySkew
from hosfl_lightning.data.partition.shards import Shards
from hosfl_lightning.data.partition.shuffles import fixed_subset
from hosfl_lightning.data.partition.words import spelled

__all__ = [
    "IID",
    "ByField",
    "ByFile",
    "Dirichlet",
    "Examples",
    "Partitioner",
    "QuantitySkew",
    "Shards",
    "deal",
    "fixed_subset",
    "partition_by_field",
    "partition_dirichlet",
    "partition_iid",
    "spelled",
]
