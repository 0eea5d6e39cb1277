"""Federated data: who holds which examples, and which of them a client uses in a round."""

from hosfl_lightning.data.classification import ClassificationData
from hosfl_lightning.data.dealt import TokenRows
from hosfl_lightning.data.digits import DigitsData
from hosfl_lightning.data.docstrings import DocstringData
from hosfl_lightning.data.fashion_mnist import FashionMNISTData
from hosfl_lightning.data.federated import FederatedDataModule
from hosfl_lightning.data.hub_images import HubImageData
from hosfl_lightning.data.image_folder import ImageFolderData
from hosfl_lightning.data.images import ImageData, ImageExample
from hosfl_lightning.data.instructions import InstructionData
from hosfl_lightning.data.partition import (
    IID,
    ByField,
    ByFile,
    Dirichlet,
    Examples,
    Partitioner,
    QuantitySkew,
    Shards,
    partition_by_field,
    partition_dirichlet,
    partition_iid,
)
from hosfl_lightning.data.readers import Reader
from hosfl_lightning.data.rows import Row
from hosfl_lightning.data.text import TextData
from hosfl_lightning.data.tokenization import Example, collate, language_blocks, token_stream

__all__ = [
    "IID",
    "ByField",
    "ByFile",
    "ClassificationData",
    "DigitsData",
    "Dirichlet",
    "DocstringData",
    "Example",
    "Examples",
    "FashionMNISTData",
    "FederatedDataModule",
    "HubImageData",
    "ImageData",
    "ImageExample",
    "ImageFolderData",
    "InstructionData",
    "Partitioner",
    "QuantitySkew",
    "Reader",
    "Row",
    "Shards",
    "TextData",
    "TokenRows",
    "collate",
    "language_blocks",
    "partition_by_field",
    "partition_dirichlet",
    "partition_iid",
    "token_stream",
]
