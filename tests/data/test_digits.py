from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from hosfl_lightning.data import DigitsData, ImageExample


def make(seed: int) -> DigitsData:
    data = DigitsData(num_clients=6, partition="dirichlet", alpha=1.0, batch_size=16, seed=seed)
    data.setup("fit")
    return data


def as_rows(examples: list[ImageExample]) -> list[tuple[int, ...]]:
    return [(example.labels, *example.pixel_values.flatten().tolist()) for example in examples]


def test_every_digit_is_somewhere_once_with_its_label() -> None:
    data = make(0)
    everything = [example for client in data.clients for example in client] + data.validation_set + data.test_set
    original = load_digits()
    pixels = (original.data * 255 / 16).round().astype(int).tolist()
    expected = [(label, *row) for label, row in zip(original.target.tolist(), pixels)]
    assert sorted(as_rows(everything)) == sorted(expected)
    assert [len(data.validation_set), len(data.test_set)] == [359, 359]
    assert data.label_set.count == 10


def test_the_split_is_the_same_for_every_seed() -> None:
    a, b = make(0), make(1)
    assert as_rows(a.validation_set) == as_rows(b.validation_set)
    assert as_rows(a.test_set) == as_rows(b.test_set)
    assert as_rows(a.clients[0]) != as_rows(b.clients[0])


def test_a_batch_is_normalised() -> None:
    data = make(0)
    batch = data.collate([example for client in data.clients for example in client])
    assert batch["pixel_values"].shape == (1079, 1, 8, 8)
    assert abs(float(batch["pixel_values"].mean())) < 0.01
    assert abs(float(batch["pixel_values"].std()) - 1) < 0.01
    assert torch.equal(batch["labels"].unique(), torch.arange(10))
