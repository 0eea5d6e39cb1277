from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hosfl_lightning.data import FashionMNISTData

Write = Callable[[str, Any], str]


def idx(values: list[int], *shape: int, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + bytes(values)


def write_set(write: Write, suffix: str = "", **replaced: bytes | None) -> str:
    """12 training and 4 test images of 2x3 pixels, image i full of i, its label i mod 3; the folder."""
    content: dict[str, bytes | None] = {}
    for prefix, count in (("train", 12), ("t10k", 4)):
        content[f"{prefix}-images-idx3-ubyte"] = idx([i for i in range(count) for _ in range(6)], count, 2, 3)
        content[f"{prefix}-labels-idx1-ubyte"] = idx([i % 3 for i in range(count)], count)
    content |= {f"{name.replace('_', '-')}-ubyte": value for name, value in replaced.items()}
    paths = [write(name + suffix, value) for name, value in content.items() if value is not None]
    return str(Path(paths[0]).parent)


def make(folder: str, **settings: Any) -> FashionMNISTData:
    data = FashionMNISTData(folder, **{"num_clients": 2, "validation_fraction": 0.25, **settings})
    data.setup("fit")
    return data


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_images_and_labels_belong_together(write: Write, suffix: str) -> None:
    data = make(write_set(write, suffix))
    training = [example for client in data.clients for example in client]
    values = [int(example.pixel_values[0, 0, 0]) for example in training + data.validation_set]
    assert sorted(values) == list(range(12))
    assert [example.labels for example in training + data.validation_set] == [value % 3 for value in values]
    assert [len(training), len(data.validation_set)] == [9, 3]
    assert [int(example.pixel_values.max()) for example in data.test_set] == [0, 1, 2, 3]
    assert {example.pixel_values.shape for example in training} == {(1, 2, 3)}
    assert data.label_set.count == 3


def test_rows_come_before_columns(write: Write) -> None:
    images = idx([1, 2, 3, 4, 5, 6], 1, 2, 3)
    data = make(write_set(write, t10k_images_idx3=images, t10k_labels_idx1=idx([0], 1)), mean=0.0, std=1 / 255)
    batch = next(iter(data.test_dataloader()))
    torch.testing.assert_close(batch["pixel_values"], torch.tensor([[[[1.0, 2, 3], [4, 5, 6]]]]))


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"train_images_idx3": idx([0], 1, kind=9)}, "train-images-idx3-ubyte' is no IDX file .* begins with 00000901"),
        ({"train_images_idx3": idx([0] * 12, 12)}, "is no IDX file of bytes in 3 .* begin with 00000803 .* 00000801"),
        ({"train_images_idx3": b""}, "train-images-idx3-ubyte' is no IDX file .* begins with nothing"),
        ({"train_labels_idx1": idx([], 12)}, "train-labels-idx1-ubyte' has 0 values, but its header says 12"),
        ({"t10k_images_idx3": idx([0] * 25, 4, 2, 3)}, "t10k-images-.* has 25 values, but its header says 4 x 2 x 3"),
        ({"t10k_labels_idx1": idx([0] * 3, 3)}, "t10k-images-idx3-ubyte' has 4 images, .*t10k-labels-.* 3 labels"),
        ({"t10k_labels_idx1": idx([0, 1, 2, 3], 4)}, "t10k-labels-idx1-ubyte' has class 3, of which the training"),
    ],
)
def test_bad_files(write: Write, replaced: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=f"^folder: .*{message}") as caught:
        make(write_set(write, **replaced))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_cut_one(write: Write, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder: there is no file .*t10k-labels-idx1-ubyte"):
        make(write_set(write, t10k_labels_idx1=None))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx([0, 1, 2, 0], 4))[:-9])
    with pytest.raises(ValueError, match=r"folder: .*t10k-labels-idx1-ubyte.gz' is not a whole gzip file"):
        make(str(tmp_path))


def test_the_real_set(real_data: Callable[[str], Path]) -> None:
    data = make(str(real_data("fashion_mnist")), num_clients=5, partition="dirichlet", alpha=1.0, image_size=96)
    assert (sum(map(len, data.clients)), len(data.validation_set), len(data.test_set)) == (45_000, 15_000, 10_000)
    labels = torch.tensor([example.labels for client in data.clients for example in client])
    labels = torch.cat([labels, torch.tensor([example.labels for example in data.validation_set])])
    assert labels.bincount().tolist() == [6000] * 10
    pixels = torch.stack([example.pixel_values for example in data.test_set]).float() / 255
    assert float(pixels.mean()) == pytest.approx(0.2868, abs=1e-3)
    assert data.client_batch(4, 0)["pixel_values"].shape == (4, 1, 96, 96)
