from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hosfl_lightning import SplitCausalLM, SplitImageClassifier
from hosfl_lightning.models import fingerprint
from hosfl_lightning.split import Lora, LoraHalf
from tests.models.image_runs import saved
from tests.split.tiny_images import CLASSES, tiny_image_model


def test_it_tells_every_frozen_tensor_of_the_client_half(make_model: Callable[..., SplitCausalLM]) -> None:
    model = make_model()
    before, half = model.client_fingerprint(), model.client_half
    frozen = [n for n, _ in half.named_parameters() if n not in model.client_parameters]
    assert len(frozen) == 1 + 2 * 9
    for name in frozen:
        value = half.get_parameter(name).data.view(-1)[-1:]
        old = value.clone()
        value.add_(1)
        assert model.client_fingerprint() != before, name
        value.copy_(old)
    for p in [*model.client_parameters.values(), *model.server_half.parameters()]:
        p.data.add_(1)
    assert model.client_fingerprint() == before


def test_it_tells_names_and_shapes() -> None:
    given = torch.arange(6.0)
    found = {
        fingerprint.of_all(t)
        for t in ({"a": given}, {"b": given}, {"a": given.view(2, 3)}, {"a": given[:3], "b": given[3:]})
    }
    assert len(found) == 4


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"a": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).T, "b": torch.tensor(3)}
    one = fingerprint.of_all(given)
    monkeypatch.setattr(fingerprint, "PIECE", 4)
    assert fingerprint.of_all(given) == one


def test_precision_does_not_show_and_without_frozen_tensors_it_says_so(tiny_folder: Path) -> None:
    lora = Lora(LoraHalf(r=2), LoraHalf(r=2))
    full, half = (SplitCausalLM(str(tiny_folder), 2, lora, dtype=dtype) for dtype in ("float32", "bfloat16"))  # type: ignore[arg-type]
    assert full.client_fingerprint() == half.client_fingerprint()
    assert SplitCausalLM(str(tiny_folder), 2).client_fingerprint() == "all trained"


def test_norm_statistics_are_among_them(tmp_path: Path) -> None:
    model = SplitImageClassifier(
        cut=2, num_labels=CLASSES, image_size=32, pretrained=saved(tiny_image_model("ResNet"), tmp_path)
    )
    before = model.client_fingerprint()
    next(m for m in model.client_half.modules() if isinstance(m, nn.BatchNorm2d)).running_var.add_(1)  # type: ignore[union-attr]
    assert model.client_fingerprint() != before
