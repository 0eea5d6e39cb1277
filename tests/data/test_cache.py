from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hosfl_lightning.data import DocstringData
from hosfl_lightning.data import docstrings as module
from hosfl_lightning.data.cache import cached, folder


class Made:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, Tensor]:
        self.times += 1
        return {"b": torch.arange(6, dtype=torch.int32).view(2, 3), "a": torch.tensor([self.times])}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOSFL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_is_made_once_and_anew_for_another_key(place: Path) -> None:
    make = Made()
    first, again = cached("x", "k", make), cached("x", "k", make)
    assert make.times == 1
    assert all(torch.equal(first[name], again[name]) and first[name].dtype == again[name].dtype for name in "ab")
    assert cached("x", "other", make)["a"].item() == 2
    assert cached("x", "k", make)["a"].item() == 3
    assert [path.name for path in place.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("at", [3, 60, -1])
def test_a_damaged_file_is_made_anew(place: Path, at: int) -> None:
    make = Made()
    cached("x", "k", make)
    path = place / "x.safetensors"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    assert cached("x", "k", make)["a"].item() == 2
    path.write_bytes(content[:-3])
    assert cached("x", "k", make)["a"].item() == 3
    assert cached("x", "k", make)["a"].item() == 3


def test_a_foreign_file_is_made_anew(place: Path) -> None:
    make = Made()
    place.mkdir()
    save_file({"a": torch.tensor([9])}, place / "x.safetensors", {"key": "k"})
    assert cached("x", "k", make)["a"].item() == 1
    (place / "y.safetensors").mkdir()
    assert cached("y", "k", make)["a"].item() == 2


def test_nothing_is_kept_where_the_variable_is_empty_or_nothing_can_be(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Made()
    place.write_text("a file, no folder")
    assert [cached("x", "k", make)["a"].item() for _ in range(2)] == [1, 2]
    monkeypatch.setenv("HOSFL_CACHE", "")
    assert folder() is None
    assert cached("x", "k", make)["a"].item() == 3


def test_where_it_is_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOSFL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder() == tmp_path / "hosfl_lightning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache" / "hosfl_lightning"


def test_docstrings_are_read_once_and_again_when_a_file_has_changed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    package = tmp_path / "cached_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("\n".join(f'def f{i}():\n    """Docstring {i:03d}."""' for i in range(40)))
    monkeypatch.syspath_prepend(tmp_path)
    read: list[str] = []
    collect = module.collect_docstrings
    monkeypatch.setattr(module, "collect_docstrings", lambda name, *a: (read.append(name), collect(name, *a))[1])

    def made(**settings: int) -> DocstringData:
        sizes = {"sequence_length": 8, "validation_bytes_per_client": 100, "test_bytes_per_client": 100, **settings}
        data = DocstringData(["cached_pkg"], tokenizer=tokenizer, **sizes)
        data.setup("fit")
        return data

    first, again = made(), made()
    assert len(read) == 1
    for one, other in ((first.clients[0], again.clients[0]), (first.validation_set, again.validation_set),
                       (first.test_set, again.test_set)):  # fmt: skip
        assert len(one) == len(other) > 0
        assert all(torch.equal(a.input_ids, b.input_ids) and a.input_ids.dtype == b.input_ids.dtype == torch.int64
                   for a, b in zip(one, other))  # fmt: skip
    made(sequence_length=4)
    assert len(read) == 2
    (package / "more.py").write_text('"""One more docstring, of another file."""')
    assert len(made().clients[0]) > len(first.clients[0])
    assert len(read) == 3
    for times, file in enumerate(("__init__.py", "more.py"), 4):
        (package / file).write_text((package / file).read_text().replace("o", "oo"))
        made()
        assert len(read) == times
    monkeypatch.setattr(type(tokenizer), "__module__", "my.own")  # whose Python code may do anything
    made()
    made()
    assert len(read) == 7
