from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from hosfl_lightning.data import HubImageData


class FakeDataset(list):
    features: dict[str, Any] = {"img": SimpleNamespace(), "fine": SimpleNamespace(names=["ant", "bee"])}


def records(start: int, count: int, mode: str = "RGB") -> FakeDataset:
    """Image i is full of i, its class i mod 2."""
    return FakeDataset(
        {"img": Image.new("L", (4, 4), i).convert(mode), "fine": i % 2} for i in range(start, start + count)
    )


def make(monkeypatch: pytest.MonkeyPatch, splits: dict[str, FakeDataset], **settings: Any) -> HubImageData:
    module = SimpleNamespace(load_dataset=lambda name, config, split: splits[split])
    monkeypatch.setitem(sys.modules, "datasets", module)
    data = HubImageData("some/set", **{"image_field": "img", "label_field": "fine", "num_clients": 2, **settings})
    data.setup("fit")
    return data


def test_images_labels_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(monkeypatch, {"train": records(0, 20), "test": records(100, 5)})
    training = [example for client in data.clients for example in client] + data.validation_set
    assert sorted((int(e.pixel_values[2, 3, 3]), e.labels) for e in training) == [(i, i % 2) for i in range(20)]
    assert [(int(e.pixel_values[0, 0, 0]), e.labels) for e in data.test_set] == [(i, i % 2) for i in range(100, 105)]
    assert len(data.validation_set) == 2
    assert data.label_set.names == ["ant", "bee"]


def test_other_splits_and_no_test_set(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"a": records(0, 6, "L"), "b": records(50, 3, "L")}
    data = make(monkeypatch, splits, train="a", validation="b", test=None, channels=1)
    assert [int(e.pixel_values[0, 0, 0]) for e in data.validation_set] == [50, 51, 52]
    assert data.test_set == []


def test_large_images_are_shrunk_as_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(monkeypatch, {"train": records(0, 6), "test": records(0, 1)}, image_size=2)
    assert data.test_set[0].pixel_values.shape == (3, 2, 2)


def test_labels_without_names_are_those_of_the_training_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDataset, "features", {})
    assert make(monkeypatch, {"train": records(0, 6), "test": records(0, 1)}).label_set.count == 2
    test = FakeDataset([{"img": Image.new("L", (4, 4)), "fine": 2}])
    with pytest.raises(ValueError, match="some/set test record 0: label 2 is out of range, the 2 classes"):
        make(monkeypatch, {"train": records(0, 6), "test": test})


def test_bad_records_name_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": records(0, 6), "test": records(0, 1)}
    with pytest.raises(ValueError, match=r"some/set train record 0: no field 'image' \(image_field\); .*: img, fine"):
        make(monkeypatch, splits, image_field="image")
    with pytest.raises(ValueError, match=r"no field 'label' \(label_field\)"):
        make(monkeypatch, splits, label_field="label")
    with pytest.raises(ValueError, match="image_field 'fine' holds no image but a str"):
        make(monkeypatch, splits, image_field="fine")
    with pytest.raises(ValueError, match="split 'test' has no records"):
        make(monkeypatch, splits | {"test": FakeDataset()})


def test_the_real_library_on_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, name, count in (("train", "ant", 4), ("train", "bee", 4), ("test", "bee", 2)):
        (tmp_path / "set" / split / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "set" / split / name / f"{i}.png")
    data = HubImageData(str(tmp_path / "set"), num_clients=2)
    data.setup("fit")
    assert sum(map(len, data.clients)) == 7
    assert {example.labels for client in data.clients for example in client} == {0, 1}
    assert data.label_set.names == ["ant", "bee"]
    assert len(data.test_set) == 2
