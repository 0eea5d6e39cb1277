"""What of a client's half a word leaves to the client."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from hosfl_lightning.split import SplitError
from hosfl_lightning.split.personal import divide


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(2, 2, bias=False)})
        self.lora_side = nn.Linear(2, 2, bias=False)


@pytest.mark.parametrize(
    ("personal", "own"),
    [
        (False, set()),
        (True, {"conv.weight", "conv.bias", "norm.weight", "norm.bias", "lora_A.default.weight", "lora_side.weight"}),
        ("norm", {"norm.weight", "norm.bias"}),
        ("bias", {"conv.bias", "norm.bias"}),
        ("first_layer", {"conv.weight", "conv.bias"}),
        ("lora", {"lora_A.default.weight"}),
        ("side", {"lora_side.weight"}),
    ],
)
def test_a_word_names_a_part_and_the_rest_is_shared(personal: Any, own: set[str]) -> None:
    half = Half()
    trained = dict(half.named_parameters())
    shared, mine = divide(half, trained, personal)
    assert set(mine) == own
    assert [*shared] == [name for name in trained if name not in own]
    assert all(part[name] is trained[name] for part in (shared, mine) for name in part)


def test_of_what_is_trained_only() -> None:
    half = Half()
    trained = {name: p for name, p in half.named_parameters() if name != "norm.bias"}
    assert [*divide(half, trained, "bias")[1]] == ["conv.bias"]
    with pytest.raises(SplitError, match=r"personal='ia3': .* that is nothing of it; take another word"):
        divide(half, trained, "ia3")
    with pytest.raises(SplitError, match=r"personal='norm': .* that is all of it: say true"):
        divide(half, {"norm.bias": half.norm.bias}, "norm")
