"""The advice: it flips with where the task's gain lies, leaves everything as it was, and refuses what it cannot say."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.seed import _collect_rng_states
from torch import Tensor, nn

from hosfl_lightning import HOSFL, cli
from hosfl_lightning.advise.candidates import Candidate
from hosfl_lightning.advise.command import Advisor
from hosfl_lightning.advise.ranking import FREEZE
from hosfl_lightning.algorithms import Algorithm, FedAvg
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.models import SplitImageClassifier
from hosfl_lightning.models.another_client import with_client
from hosfl_lightning.optim import AdamW
from tests.models.image_runs import Picture
from tests.recipe_runs import ROOT, command_line

DIGITS = ROOT / "recipes" / "vision" / "digits_hosfl.yaml"


class OnePixel(FederatedDataModule):
    """4x4 images whose first pixel tells the class, of some with a wrong label; the others are noise."""

    def __init__(self, wrong: float, held_out: int = 96, examples: int = 128) -> None:
        super().__init__(batch_size=16, eval_batch_size=32)
        self.wrong, self.held_out, self.examples = wrong, held_out, examples

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def picture(number: int) -> Picture:
            pixels, label = torch.randn(1, 4, 4, generator=generator), number % 2
            pixels[0, 0, 0] = 2 * label - 1
            return Picture(pixels, label ^ int(torch.rand((), generator=generator) < self.wrong))

        self.clients = [[picture(n) for n in range(self.examples)] for _ in range(3)]
        self.validation_set = [picture(n) for n in range(self.held_out)]

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        pixels = torch.stack([one.pixel_values for one in examples])
        return {"pixel_values": pixels, "labels": torch.tensor([one.labels for one in examples])}


class Drawing(OnePixel):
    """Draws from everybody's random state, as augmentation may."""

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        torch.rand(()), random.random()
        return super().collate(examples)


def network(sees: bool) -> nn.Sequential:
    """Two features at the cut; the client's layer begins with the first pixel in one of them, or in none."""
    first, head = nn.Linear(16, 2), nn.Linear(2, 2)
    with torch.no_grad():
        first.weight[:, 0] = 0.0
        if sees:
            first.weight.zero_()
            first.weight[0, 0] = 1.0
        first.bias.zero_()
    return nn.Sequential(nn.Sequential(nn.Flatten(), first), head)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.1, weight_decay=0.0)


def model(sees: bool) -> SplitImageClassifier:
    return SplitImageClassifier(1, 2, 4, 1, network=lambda: network(sees), optimizer=adamw)


def advisor(root: Path, algorithm: Algorithm | None = None, **settings: Any) -> Advisor:
    method = algorithm or HOSFL(8, client_optimizer=AdamW(lr=0.05, weight_decay=0.0))
    given: dict[str, Any] = {"max_rounds": 40, "enable_progress_bar": False, "default_root_dir": str(root)}
    return Advisor(method, **given | settings)


def random_states() -> dict[str, str]:
    """Of torch, NumPy and Python."""
    found = _collect_rng_states()
    return {name: str(one.tolist() if isinstance(one, Tensor) else one) for name, one in found.items()}


class TestTheAdvice:
    def test_is_to_train_where_all_the_gain_lies_below_the_cut(self, tmp_path: Path) -> None:
        advice = advisor(tmp_path).advise(model(sees=False), OnePixel(wrong=0.0))
        assert advice["choice"] in ("the recipe's, HOSFL, P = 8", "backprop, all weights")
        best = advice["findings"][0]
        assert best["gain"][1] > 0.3
        assert best["share"][1] > 0.5
        assert any("Take " in line for line in advice["words"])
        assert {"norm, P = 8", "first layer, P = 8", "side adapter, dense"} <= advice["left_out"].keys()
        scalars = next(one for one in advice["findings"] if one["probes"])
        assert scalars["values"] == 34
        assert scalars["cosine"] == pytest.approx((8 / 41) ** 0.5)
        assert scalars["measured_cosine"] == pytest.approx(scalars["cosine"], abs=0.3)

    def test_is_to_freeze_where_the_server_can_do_it_alone(self, tmp_path: Path) -> None:
        advice = advisor(tmp_path).advise(model(sees=True), OnePixel(wrong=0.25))
        assert advice["choice"] == FREEZE
        assert any("Freeze" in line for line in advice["words"])

    def test_leaves_everything_as_it_was(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        trainer, cut, data = advisor(tmp_path / "runs"), model(sees=False), Drawing(wrong=0.0)
        before = {name: tensor.clone() for name, tensor in cut.trained_state().items()}
        torch.manual_seed(7)
        states = random_states()
        trainer.advise(cut, data, rounds=2, batches=8)
        assert random_states() == states
        assert all(torch.equal(tensor, before[name]) for name, tensor in cut.trained_state().items())
        assert data.eval_batch_size == 32
        assert [*tmp_path.rglob("*")] == []

    def test_leaves_the_model_as_it_was_when_it_is_stopped(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cut = model(sees=False)
        before = {name: tensor.clone() for name, tensor in cut.trained_state().items()}

        def stopped(*_: Any) -> None:
            assert any(not torch.equal(tensor, before[name]) for name, tensor in cut.trained_state().items())
            raise KeyboardInterrupt

        monkeypatch.setattr("hosfl_lightning.advise.measurement._warmed", stopped)
        with pytest.raises(KeyboardInterrupt):
            advisor(tmp_path).advise(cut, OnePixel(0.0), rounds=2, batches=8)
        assert all(torch.equal(tensor, before[name]) for name, tensor in cut.trained_state().items())


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "given", "message"),
        [
            ({}, {"rounds": 3}, "--rounds must be even"),
            ({}, {"batches": 4}, "--batches must be >= 8"),
            ({"devices": 2}, {}, "hosfl advise runs in one process"),
            ({"algorithm": FedAvg()}, {}, "FedAvg has no cut"),
        ],
    )
    def test_of_settings(self, tmp_path: Path, settings: dict[str, Any], given: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            advisor(tmp_path, **settings).advise(model(sees=True), OnePixel(0.0), **given)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (OnePixel(0.0, held_out=10), "hold out more, or lower --batches"),
            (OnePixel(0.0, examples=16), "lower data.init_args.batch_size or num_clients"),
        ],
    )
    def test_of_data(self, tmp_path: Path, data: OnePixel, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            advisor(tmp_path).advise(model(sees=True), data, rounds=2)

    def test_of_a_client_with_nothing_to_train(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where none of the clients that there are can be had."""
        cut = model(sees=True)
        bare = [Candidate("norm", partial(with_client, cut, None, 0, "norm"), HOSFL())]
        monkeypatch.setattr("hosfl_lightning.advise.command.candidates", lambda *_: bare)
        with pytest.raises(ValueError, match=r"nothing to train below the cut, or none .*has no norm"):
            advisor(tmp_path).advise(cut, OnePixel(0.0), rounds=2)


@pytest.mark.filterwarnings("ignore:the two sides of a probe")
def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--data.init_args.num_clients=2", "--trainer.enable_progress_bar=false"]
    with command_line():
        cli.main(["advise", f"--config={DIGITS}", "--rounds=2", "--batches=8", f"--out={tmp_path}", *overrides])
    out = capsys.readouterr().out
    advice = json.loads((tmp_path / "advice.json").read_text())
    assert [*tmp_path.iterdir()] == [tmp_path / "advice.json"]
    assert all(line in out for line in advice["words"])
    names = {one["name"] for one in advice["findings"]}
    assert {"norm, P = 8", "first layer, P = 8", "side adapter, dense", "backprop, all weights"} <= names
    assert "in simulation" in out
