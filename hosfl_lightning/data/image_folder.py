"""The user's own pictures: a folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import override

from hosfl_lightning.data.images import ImageData, ImageExample
from hosfl_lightning.data.labels import LabelSet
from hosfl_lightning.data.pixels import read_image

_SUFFIXES = (".png", ".jpg", ".jpeg")


class ImageFolderData(ImageData):
    """Pictures in `folder/train/CLASS/`, perhaps `folder/validation/CLASS/` and `folder/test/CLASS/`, PNG or JPEG.

    The classes are the names of the folders in `train`, in sorted order. Where `validation` or `test` is absent, a
    share of the training pictures is held out. Pictures larger than `image_size` are shrunk as they are read.

    Args:
        folder: The folder with `train` in it.
        settings: All others of `ImageData`; `image_size` is needed unless all pictures have one size.

    Example::

        data = ImageFolderData("flowers", image_size=96, test_fraction=0.2, num_clients=8)
    """

    def __init__(self, folder: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.folder = folder

    @override
    def read(self, split: str) -> list[ImageExample]:
        """The pictures of a split, class by class, by name."""
        root = Path(self.folder, split)
        if not root.is_dir():
            if split == "train":
                raise FileNotFoundError(f"folder: there is no folder {str(root)!r} to hold a folder for each class")
            return []
        classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not classes:
            raise ValueError(f"folder: {str(root)!r} must hold a folder for each class, and holds none")
        if split == "train":
            self.label_set = LabelSet(len(classes), classes)
        return [example for name in classes for example in self._read_class(root / name)]

    def _read_class(self, folder: Path) -> list[ImageExample]:
        names = list(self.label_set.names or ())
        if folder.name not in names:
            raise ValueError(f"folder: {str(folder)!r} is a class that 'train' has no folder for")
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
        if not paths:
            raise ValueError(f"folder: {str(folder)!r} holds no image; known are {', '.join(_SUFFIXES)}")
        label = names.index(folder.name)
        return [ImageExample(read_image(path, "folder", self.image_size), label) for path in paths]
