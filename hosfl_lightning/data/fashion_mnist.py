"""Fashion-MNIST, MNIST and their like: grey images in IDX files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.data.decoding import read_bytes
from hosfl_lightning.data.images import ImageData, ImageExample
from hosfl_lightning.data.labels import LabelSet

_PREFIXES = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 8


class FashionMNISTData(ImageData):
    """The four IDX files of Fashion-MNIST, or of anything under the same names, such as MNIST.

    `train-images-idx3-ubyte` and `train-labels-idx1-ubyte` are for training and validation, `t10k-images-idx3-ubyte`
    and `t10k-labels-idx1-ubyte` the test set, each also with `.gz`.

    Args:
        folder: The folder that holds the files.
        channels: 1, or 3 for a model that was trained on colour: grey is repeated.
        mean: Of the pixels in [0, 1]; the default is Fashion-MNIST's.
        std: Of the pixels in [0, 1]; the default is Fashion-MNIST's.
        settings: All others of `ImageData`.

    Reference: Xiao et al. 2017, arXiv 1708.07747; the format: LeCun, Cortes, Burges, the MNIST database.

    Example::

        data = FashionMNISTData("fashion_mnist", num_clients=20, partition="dirichlet", alpha=0.3)
    """

    def __init__(
        self,
        folder: str,
        channels: Literal[1, 3] = 1,
        mean: float | list[float] = 0.286,
        std: float | list[float] = 0.353,
        **settings: Any,
    ) -> None:
        super().__init__(channels=channels, mean=mean, std=std, **settings)
        self.folder = folder

    @override
    def read(self, split: str) -> list[ImageExample]:
        """The images of `train` or `test` with their labels."""
        if split not in _PREFIXES:
            return []
        names = [self._path(f"{_PREFIXES[split]}-{name}-ubyte") for name in ("images-idx3", "labels-idx1")]
        images, labels = (read_idx(path, dimensions, "folder") for path, dimensions in zip(names, (3, 1)))
        if len(images) != len(labels):
            raise ValueError(f"folder: {names[0]!r} has {len(images)} images, {names[1]!r} {len(labels)} labels")
        largest = int(labels.max()) if len(labels) else 0
        if split == "train":
            self.label_set = LabelSet(largest + 1)
        if largest >= self.label_set.count:
            raise ValueError(f"folder: {names[1]!r} has class {largest}, of which the training set knows nothing")
        return [ImageExample(image, label) for image, label in zip(images[:, None], labels.tolist())]

    def _path(self, name: str) -> str:
        plain, packed = Path(self.folder, name), Path(self.folder, f"{name}.gz")
        return str(packed if packed.is_file() and not plain.is_file() else plain)


def read_idx(path: str, dimensions: int, setting: str) -> Tensor:
    """The array of an IDX file of unsigned bytes, uint8.

    The file: two zero bytes, the kind (8: unsigned byte), the number of dimensions, each dimension as a big-endian
    32-bit integer, then the values, the last dimension running fastest.

    Args:
        path: The file, also with .gz.
        dimensions: How many dimensions the array must have.
        setting: The argument that names the file, for messages.

    Raises:
        FileNotFoundError: If the path is not a file.
        ValueError: If it is no such file, or is longer or shorter than its header says.
    """
    content = read_bytes(path, setting)
    magic = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    start = 4 + 4 * dimensions
    if content[:4] != magic or len(content) < start:
        raise ValueError(
            f"{setting}: {path!r} is no IDX file of bytes in {dimensions} dimension(s); it must begin with "
            f"{magic.hex()} and the dimensions, and begins with {content[:4].hex() or 'nothing'}"
        )
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    if len(content) - start != math.prod(shape):
        sizes = " x ".join(map(str, shape))
        raise ValueError(f"{setting}: {path!r} has {len(content) - start} values, but its header says {sizes}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy()).view(shape)
