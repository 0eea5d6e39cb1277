"""Tokens from z: exactly where nothing is in the way, on both sides of padding, and through few bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from hosfl_lightning.attack.halves import TextHalf, rows
from hosfl_lightning.attack.inversion import invert_images, invert_text
from hosfl_lightning.attack.score import NotApplicableError
from hosfl_lightning.attack.search import search
from hosfl_lightning.split import split
from hosfl_lightning.wire import SmashedData
from tests.split.tiny_models import CAUSAL, tiny_model

IDS = torch.tensor([[5, 41, 7, 7, 12, 63, 30], [9, 3, 22, 50, 1, 17, 8]])


def half_of(family: str, cut: int = 2) -> TextHalf:
    auto = AutoModelForCausalLM if family in CAUSAL else AutoModelForSequenceClassification
    return TextHalf(split(tiny_model(family, auto), cut)[0])


def sent(half: TextHalf, ids: Tensor, mask: Tensor, codec: str = "fp32") -> Tensor:
    with torch.no_grad():
        z = half.half(ids, mask.long())
    return SmashedData.pack(0, 0, z, ids, mask, codec).unpack()[0]


class TestSearch:
    # Sliding windows shorter than the text, learned positions, rotary ones.
    @pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mistral"])
    def test_finds_every_token(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hosfl_lightning.attack.search.CHUNK", 2)  # it goes on where none of these is the one
        half, mask = half_of(family), torch.ones_like(IDS, dtype=torch.bool)
        z = sent(half, IDS, mask)
        assert [search(half, *one) for one in zip(z, mask)] == IDS.tolist()

    @pytest.mark.parametrize("left", [True, False])
    def test_where_there_is_padding(self, left: bool) -> None:
        half = half_of("llama")
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1] if left else [1, 1, 1, 1, 1, 0, 0]]).bool()
        z = sent(half, IDS[:1], mask)
        assert search(half, z[0], mask[0]) == IDS[0][mask[0]].tolist()

    def test_through_four_bits_with_a_beam(self) -> None:
        half, mask = half_of("llama", cut=1), torch.ones_like(IDS, dtype=torch.bool)
        z = sent(half, IDS, mask, "int4")
        found = torch.tensor([search(half, *one) for one in zip(z, mask)])
        assert (found == IDS).float().mean() >= 0.9

    def test_a_beam_takes_a_first_token_back(self) -> None:
        """The first z lies nearer to another token's; what follows gives it away."""
        half, mask = half_of("llama"), torch.ones(7, dtype=torch.bool)
        z = sent(half, IDS[:1], mask[None])[0]
        z[0] = 0.55 * half.alone[6] + 0.45 * half.alone[int(IDS[0, 0])]
        assert search(half, z, mask, beam=1)[0] == 6
        assert search(half, z, mask) == IDS[0].tolist()

    def test_distances_are_summed(self) -> None:
        """The second z is a little nearer to what follows on another first token, the first one clearly not."""
        half, mask = half_of("llama"), torch.ones(2, 2, dtype=torch.bool)
        own, other = sent(half, torch.tensor([[5, 41], [6, 41]]), mask)
        z = torch.stack([0.55 * own[0] + 0.45 * other[0], 0.48 * own[1] + 0.52 * other[1]])
        assert search(half, z, mask[0]) == [5, 41]

    def test_of_a_cache_the_rows_are_copies(self) -> None:
        half = half_of("llama")
        cache, one = DynamicCache(), torch.ones(1)
        half.step(IDS[0, :1], one, cache)
        half.step(torch.arange(3), torch.ones(2), rows(cache, torch.zeros(3, dtype=torch.long)))
        assert cache.get_seq_length() == 1


class TestInversion:
    def test_reads_a_half_that_looks_ahead(self) -> None:
        half, mask = half_of("bert", cut=1), torch.ones_like(IDS, dtype=torch.bool)
        assert half.looks_ahead()
        assert not half_of("llama").looks_ahead()
        found = invert_text(half, sent(half, IDS, mask), mask, steps=60)
        assert (found == IDS).float().mean() >= 0.95

    def test_images_come_back_from_a_convolution(self) -> None:
        torch.manual_seed(0)
        layer, images = torch.nn.Conv2d(1, 4, 3, padding=1), torch.rand(2, 1, 6, 6)
        half = lambda x: layer(x).flatten(2).transpose(1, 2)  # noqa: E731
        found = invert_images(half, half(images).detach(), images.new_full((1, 6, 6), 0.5))
        assert (found - images).square().mean() < 0.1 * (images - 0.5).square().mean()


def test_what_takes_no_tokens_is_refused() -> None:
    with pytest.raises(NotApplicableError, match="takes no tokens"):
        TextHalf(torch.nn.Linear(2, 2))
