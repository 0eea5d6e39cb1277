from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hosfl_lightning.data import ImageFolderData
from hosfl_lightning.data.pixels import read_image, to_pixels


def picture(path: Path, value: int, mode: str = "RGB", size: tuple[int, int] = (4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 255)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """10 colour cats 0..9 and 10 grey dogs 50..59 to train on."""
    for i in range(10):
        picture(tmp_path / f"train/cat/{i}.png", i)
        picture(tmp_path / f"train/dog/{i}.PNG", 50 + i, mode="L")
    (tmp_path / "train/.cache").mkdir()
    (tmp_path / "train/dog/notes.txt").write_text("no picture")
    return tmp_path


def make(folder: Path, **settings: Any) -> ImageFolderData:
    data = ImageFolderData(str(folder), **{"num_clients": 2, **settings})
    data.setup("fit")
    return data


def content(data: ImageFolderData) -> dict[int, int]:
    """First pixel to class, of all images for training and validation."""
    examples = [example for client in data.clients for example in client] + data.validation_set
    return {int(example.pixel_values[0, 0, 0]): example.labels for example in examples}


def test_a_class_is_a_folder(folder: Path) -> None:
    data = make(folder)
    assert content(data) == dict.fromkeys(range(10), 0) | {50 + i: 1 for i in range(10)}
    assert data.label_set.names == ["cat", "dog"]
    assert data.test_set == []


def test_own_splits(folder: Path) -> None:
    picture(folder / "test/dog/a.jpeg", 70, mode="L")
    picture(folder / "validation/cat/a.png", 71)
    data = make(folder)
    assert [example.labels for example in data.test_set] == [1]
    assert [int(example.pixel_values[0, 0, 0]) for example in data.validation_set] == [71]
    assert sum(map(len, data.clients)) == 20


def test_a_test_share(folder: Path) -> None:
    data = make(folder, test_fraction=0.25)
    assert len(data.test_set) == 5
    assert len(content(data)) == 15


def test_large_pictures_are_shrunk_as_read_and_small_ones_enlarged_in_the_batch(folder: Path) -> None:
    picture(folder / "train/cat/large.png", 99, size=(40, 20))
    data = make(folder, image_size=8, num_clients=1, batch_size=18)
    assert {tuple(e.pixel_values.shape[1:]) for e in data.clients[0] + data.validation_set} == {(4, 4), (8, 8)}
    assert data.client_batch(0, 0)["pixel_values"].shape == (18, 3, 8, 8)


def test_shrinking_averages(tmp_path: Path) -> None:
    stripes = np.tile(np.array([0, 200], np.uint8), (16, 8))
    Image.fromarray(stripes).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", "folder", 4)
    assert pixels.shape == (1, 4, 4)
    assert (pixels.int() - 100).abs().max() <= 20


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)])
def test_modes(mode: str, channels: int) -> None:
    pixels = to_pixels(Image.new("RGB", (2, 3), (255, 255, 255)).convert(mode), "a", None)
    assert torch.equal(pixels, torch.full((channels, 3, 2), 255, dtype=torch.uint8))


def test_deep_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a.png: an image of Pillow's mode 'I;16' is not read; save it as 8-bit"):
        to_pixels(Image.new("I;16", (2, 2)), "a.png", None)


def test_the_cameras_orientation_is_followed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("L", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg", "folder", None).shape == (1, 8, 4)


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder: there is no folder .*none/train'"):
        make(tmp_path / "none")
    (folder / "test").mkdir()
    with pytest.raises(ValueError, match=r"folder: .*test' must hold a folder for each class, and holds none"):
        make(folder)
    picture(folder / "test/bird/a.png", 0)
    with pytest.raises(ValueError, match=r"folder: .*test/bird' is a class that 'train' has no folder for"):
        make(folder)
    (folder / "train/bird").mkdir()
    with pytest.raises(ValueError, match=r"folder: .*train/bird' holds no image; known are .png, .jpg"):
        make(folder)


@pytest.mark.parametrize("keep", [0, 20, 45])
def test_a_damaged_picture_is_named(folder: Path, keep: int) -> None:
    path = folder / "train/cat/3.png"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"folder: .*cat/3.png' cannot be read as an image"):
        make(folder)
