"""A device clips and noises as a client in PyTorch does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hosfl_client.join import keyed
from hosfl_client.privacy import NoiseKey
from hosfl_client.refusals import TermsError
from hosfl_client.terms import check_terms
from hosfl_lightning.clients import Endpoint
from hosfl_lightning.privacy import Privacy, TokenNoise
from hosfl_lightning.wire import MiddleOutput, Multiplier, StepRequest
from tests.client.test_endpoint import Pair, values


class Silence(NoiseKey):
    """What is beneath the noise."""

    def normal(self, place: str, value: Any) -> Any:
        return np.zeros(value.shape)


def private(name: str, pretrained: str, folder: Path, level: Any = "example", sigma: float = 1e-3) -> Pair:
    (folder / "mine.txt").write_text("the quick brown fox jumps over the lazy dog; " * 6)
    both = Pair(name, pretrained, folder)
    clip = {"side adapter": 0.01}.get(name, 0.02)
    noise = Privacy(level, clip, sigma, delta=1e-3, smashed_data=TokenNoise(0.5, sigma))
    both.terms = replace(both.terms, privacy=noise.terms())
    old: Any = both.torch
    both.torch = Endpoint.of(old.model, old.data, both.terms, old.fabric)
    both.torch.checks = False
    both.device = both.another()
    return both


def answered(both: Pair, key: NoiseKey) -> list[Any]:
    """z and answers to a λ that is long in some examples, of torch and of the device."""
    both.torch.privacy.key = both.device.privacy.key = key  # type: ignore[union-attr]
    theirs_z, z = both.ask(StepRequest(3, 2))
    generator = torch.Generator().manual_seed(1)
    shape = theirs_z.unpack()[0].shape
    scale = torch.tensor([1e-3, 1.0, 1e-2])[:, None, None]
    multiplier = scale * torch.randn(shape, generator=generator)
    theirs, mine = both.ask(Multiplier.pack(3, 2, multiplier, theirs_z.mask, "fp32", 0))
    return [theirs_z.unpack()[0], z.unpack()[0], values(theirs), values(mine)]


@pytest.mark.parametrize(("name", "level"), [
    ("hosfl", "example"), ("own directions", "example"), ("own projections", "example"),
    ("side and LoRA", "example"), ("side adapter", "example"), ("side adapter", "client"),
])  # fmt: skip
def test_a_device_clips_and_noises_as_torch_does(name: str, level: Any, tiny_folder: Path, tmp_path: Path) -> None:
    both = private(name, str(tiny_folder), tmp_path, level)
    theirs_z, z, theirs, mine = answered(both, Silence(b""))
    torch.testing.assert_close(z, theirs_z, atol=1e-5, rtol=0)
    assert float(z.norm(dim=-1).max()) <= 0.5 + 1e-3
    assert 0.002 < float(theirs.norm()) < 1.1 * both.terms.privacy["clip"]  # a codec rounds
    torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-3)
    _, _, noised, same = answered(both, NoiseKey.of_seed(5))
    assert not torch.equal(noised, theirs)
    torch.testing.assert_close(same - mine, noised - theirs, atol=1e-7, rtol=1e-3)  # the same noise: a grid's step off


@pytest.mark.parametrize("name", ["labels stay", "labels stay, frozen"])
def test_the_noise_on_the_output_multiplier_is_a_token_s_own(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Of n λ₂, each token's own loss: clipped, noised, and divided by n again; the same bits of noise in both."""
    (tmp_path / "mine.txt").write_text("the quick brown fox jumps over the lazy dog; " * 6)
    both, clip = Pair(name, str(tiny_folder), tmp_path), 0.05
    codecs = {**both.terms.codecs, "multiplier": "fp32"}
    both.terms = replace(both.terms, codecs=codecs, privacy=Privacy(multiplier=TokenNoise(clip, 0.5)).terms())
    old: Any = both.torch
    both.torch, both.device = Endpoint.of(old.model, old.data, both.terms, old.fabric), both.another()
    found, terms = [], 0
    for key in (Silence(b""), NoiseKey.of_seed(5)):
        both.torch.privacy.key = both.device.privacy.key = key  # type: ignore[union-attr]
        sent, _ = both.ask(StepRequest(3, 2))
        z = torch.randn(*sent.mask.shape, 32, generator=torch.Generator().manual_seed(0))
        answers = both.ask(MiddleOutput.pack(3, 2, z, sent.mask, codec=codecs["smashed_data"]))
        found += [one.multiplier.restore() for one in answers]
        terms = sent.num_terms
        both.torch.forget()
        both.device.forget()
    bare, same, noised, too = found
    longest = float(bare.norm(dim=-1).max()) * terms
    assert longest == pytest.approx(clip, rel=2e-2)  # on a grid
    torch.testing.assert_close(same, bare, atol=1e-6, rtol=1e-3)
    assert float((noised - bare).std()) * terms == pytest.approx(0.5 * clip, rel=0.1)
    torch.testing.assert_close(too - same, noised - bare, atol=1e-6, rtol=1e-3)


def test_a_device_keeps_its_key_and_looks_at_delta(tiny_folder: Path, tmp_path: Path) -> None:
    both = private("hosfl", str(tiny_folder), tmp_path)
    key = keyed(both.device, tmp_path, 10).privacy.key  # type: ignore[union-attr]
    assert keyed(both.another(), tmp_path, 10).privacy.key == key and not key.simulated  # type: ignore[union-attr]
    with pytest.raises(TermsError, match="above 1/1001 of this client's examples"):
        keyed(both.device, tmp_path, 1001)
    with pytest.raises(TermsError, match="a ProbedEndpoint cannot"):
        check_terms(replace(both.terms, endpoint="ProbedEndpoint"), both.half.manifest)
