"""Runs with noise: what leaves a client, what it costs, and what goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hosfl_client.privacy import Mechanism, NoiseKey, clipped
from hosfl_lightning import HOSFL, Orchestrator, SplitImageClassifier
from hosfl_lightning.algorithms import Algorithm, SplitFedSGD
from hosfl_lightning.callbacks import PrivacyMonitor
from hosfl_lightning.clients import FirstOrderClient, SplitEndpoint, TermsError
from hosfl_lightning.clients.own_state import OwnState
from hosfl_lightning.join import _keyed
from hosfl_lightning.networks import ConvNet
from hosfl_lightning.optim import SGD
from hosfl_lightning.privacy import Privacy, TokenNoise
from hosfl_lightning.privacy.audit import Canary, audit
from hosfl_lightning.run.checkpoint import CheckpointError
from hosfl_lightning.wire import Multiplier, ProjectedGradients, StepRequest
from tests.faults import count_writes
from tests.models.image_runs import RandomImages, sgd
from tests.small_run import contents

NOISE = Privacy(clip=0.5, noise_multiplier=1.0, delta=1e-3)
pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe", "ignore:mu=")


@pytest.fixture(autouse=True, scope="module")
def without_waiting_for_the_disk() -> Iterator[None]:
    with count_writes():
        yield


def model_of() -> SplitImageClassifier:
    network = lambda: ConvNet(channels=1, widths=(2, 3), num_labels=2, image_size=8)  # noqa: E731
    return SplitImageClassifier(cut=1, num_labels=2, image_size=8, channels=1, network=network, optimizer=sgd(0.1))


def fit(root: Path, privacy: Privacy | None, algorithm: Algorithm | None = None, **settings: Any) -> Orchestrator:
    """Three clients of 6, 3 and 4 images, with minibatches of 4, 3 and 4 of them."""
    ckpt_path, model = settings.pop("ckpt_path", None), model_of()
    given: dict[str, Any] = {"max_rounds": 3, "val_check_interval": 2, "enable_progress_bar": False}
    method = algorithm or HOSFL(2, 2**-6, client_optimizer=SGD(lr=0.1))
    trainer = Orchestrator(method, default_root_dir=str(root), privacy=privacy, **given | settings)
    trainer.fit(model, RandomImages(), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Orchestrator:
    both = Privacy(clip=0.5, noise_multiplier=1.0, delta=1e-3, smashed_data=TokenNoise(1.0, 0.5))
    return fit(tmp_path_factory.mktemp("done"), both, controls=["frozen", "first_order"])


def multiplier_of(z: torch.Tensor) -> torch.Tensor:
    """Short in the first examples and long in the last."""
    return 0.01 * torch.linspace(0.2, 1, z.numel()).view_as(z) ** 3


def asked(endpoint: SplitEndpoint, clients: list[int], round: int = 0) -> tuple[list[Any], list[Any]]:
    """z and answers of these clients as one batch, λ being one and the same of each."""
    sent: Any = endpoint.handle([StepRequest(round, client) for client in clients])
    parts = [message.unpack() for message in sent]
    multipliers = [
        Multiplier.pack(round, k, multiplier_of(z), mask, "fp32", 0) for k, (z, _, mask) in zip(clients, parts)
    ]
    return sent, endpoint.handle(multipliers)


def test_answers_are_the_clipped_mean_of_examples_and_the_clients_own_noise(tmp_path: Path) -> None:
    """Per-example gradients by autograd, one at a time."""
    trainer = fit(tmp_path, NOISE, SplitFedSGD(client_optimizer=SGD(lr=0.0)), max_rounds=1)
    endpoint, model = trainer.endpoint, trainer.lightning_module
    sent, answers = asked(endpoint, [0, 1, 2], round=5)
    parameters = list(model.client_parameters.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    mechanism = Mechanism(NOISE.terms(), NoiseKey.of_seed(0))
    for client, answer in enumerate(answers):
        batch = endpoint.data([client], 5).batch
        multiplier = multiplier_of(sent[client].unpack()[0])
        shape = multiplier.shape
        rows = []
        for i in range(shape[0]):
            z = FirstOrderClient.evaluate(endpoint.client, {n: t[i : i + 1] for n, t in batch.items()})
            gradient = torch.autograd.grad(z, parameters, multiplier[i : i + 1])
            rows.append(torch.cat([part.flatten() for part in gradient]) * shape[0])  # of its own mean loss
        own = torch.stack(rows).numpy()
        lengths = np.linalg.norm(own, axis=1)
        assert lengths.min() < 0.5 < lengths.max()
        expected = mechanism.answer(own, 5, 0, client)
        np.testing.assert_allclose(answer.coefficients.numpy(), expected, atol=3e-4)  # a step of the grid
        noise = answer.coefficients.numpy() - clipped(own, 0.5).mean(0)
        assert np.std(noise) == pytest.approx(0.5 / shape[0], rel=0.25)


@pytest.mark.parametrize("level", ["example", "client"])
def test_of_a_batch_every_client_has_its_own_noise(
    level: str, done: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batched and one by one: the same values to a step of the grid, the same noise."""
    settings = {**done.endpoint.terms.privacy, "level": level}
    monkeypatch.setattr(done.endpoint, "privacy", Mechanism(settings, NoiseKey.of_seed(0)))
    sent, together = asked(done.endpoint, [0, 1, 2], round=7)
    for client in range(3):
        [z], [apart] = asked(done.endpoint, [client], round=7)
        torch.testing.assert_close(apart.coefficients, together[client].coefficients, atol=1e-3, rtol=0)
        torch.testing.assert_close(z.unpack()[0], sent[client].unpack()[0], atol=1e-3, rtol=0)
    assert len({answer.coefficients.numpy().tobytes() for answer in together}) == 3


def test_smashed_data_are_noised_and_the_clients_own_are_not(done: Orchestrator) -> None:
    endpoint: Any = done.endpoint
    [sent] = endpoint.handle([StepRequest(8, 0)])
    z, _, mask = sent.unpack()
    clean = clipped(endpoint.visits[0].anchor.z[mask].numpy(), 1.0)
    noise = z[mask].numpy() - clean
    assert np.std(noise) == pytest.approx(0.5, rel=0.1) and np.abs(clean).max() <= 1.0
    endpoint.forget()


def test_the_cost_is_logged_and_summed_up(done: Orchestrator) -> None:
    """Client 0 has one minibatch of 4 of its 6 in an epoch; the others' are whole, so all their examples are in 3."""
    assert done.summary["privacy"]["releases"] == 3
    assert done.summary["privacy"]["epsilon"] == pytest.approx(NOISE.spent(3))
    assert done.summary["privacy"]["token_epsilon"] == pytest.approx(NOISE.spent(16))  # σ/2 = 1/4: as of 16 at 1
    rows = contents(Path(done.log_dir))["metrics.csv"]
    costs = [float(row["privacy/epsilon"]) for row in rows if row["privacy/epsilon"]]
    assert costs == pytest.approx([NOISE.spent(t) for t in (1, 2, 3)])
    [monitor] = [one for one in done.callbacks if isinstance(one, PrivacyMonitor)]
    assert monitor.uses[1] == [3, 3, 3] and sum(monitor.uses[0]) == 12 and len(monitor.uses[0]) == 6


def test_controls_answer_without_noise(done: Orchestrator, tmp_path: Path) -> None:
    """Their smashed data have that of the run."""
    tokens = Privacy(delta=1e-3, smashed_data=TokenNoise(1.0, 0.5))
    alone = fit(tmp_path, tokens, SplitFedSGD(client_optimizer=SGD(lr=0.1)))
    assert alone.summary["privacy"]["epsilon"] is None
    assert done.summary["controls"]["first_order"]["val_loss_last"] == alone.summary["val_loss_last"]


def test_a_run_that_goes_on_ends_where_it_would_have(tmp_path: Path) -> None:
    whole = Path(fit(tmp_path / "whole", NOISE).log_dir)
    part = Path(fit(tmp_path / "part", NOISE, max_rounds=2).log_dir)
    on = fit(tmp_path / "part", NOISE, ckpt_path=str(part))
    assert on.summary["privacy"]["releases"] == 3
    assert contents(whole)["metrics.csv"] == contents(part)["metrics.csv"]
    with pytest.raises(CheckpointError, match=r"trainer.privacy.noise_multiplier is 2.0"):
        fit(tmp_path / "part", Privacy(clip=0.5, noise_multiplier=2.0, delta=1e-3), ckpt_path=str(part), max_rounds=4)


def test_an_attempt_that_fails_is_counted_and_has_noise_of_its_own(tmp_path: Path) -> None:
    told: list[ProjectedGradients] = []

    class Deaf(PrivacyMonitor):
        """Client 0's first answers do not arrive."""

        def on_answers(self, answers: list[ProjectedGradients]) -> list[ProjectedGradients]:
            told.extend(answers)
            return [one for one in answers if (one.client, one.attempt) != (0, 0)]

    settings: dict[str, Any] = {"min_clients": 3, "on_too_few": "repeat", "max_rounds": 1, "callbacks": [Deaf()]}
    trainer = fit(tmp_path, NOISE, **settings)
    assert trainer.summary["privacy"]["releases"] == 2
    first, second = (one.coefficients for one in told if one.client == 1)
    assert float((first - second).abs().max()) > 0.01


@pytest.mark.parametrize("level", ["example", "client"])
def test_the_audit_takes_the_noise_that_is_stated_and_catches_a_quarter_of_it(tmp_path: Path, level: Any) -> None:
    privacy = Privacy(level, clip=0.5, noise_multiplier=1.0 if level == "example" else 2.0, delta=1e-3)
    endpoint: Any = fit(tmp_path, privacy, max_rounds=1).endpoint
    stated = privacy.spent(1)
    assert 0.5 < audit(Canary(endpoint, client=1), 2000, 1e-3) < stated
    endpoint.privacy.noise_multiplier /= 4
    assert audit(Canary(endpoint, client=1), 2000, 1e-3) > stated


def test_epsilon_is_met_by_the_round_that_is_the_last(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Privacy("client", 0.5, epsilon=4.0, delta=1e-3), max_rounds=2)
    assert trainer.summary["privacy"]["epsilon"] == pytest.approx(4.0)
    with pytest.raises(ValueError, match="1/3 of the 3 examples of the smallest client"):
        fit(tmp_path, Privacy(clip=0.5, epsilon=4.0, delta=0.4))


def test_a_client_elsewhere_has_a_secret_of_its_own(done: Orchestrator, tmp_path: Path) -> None:
    endpoint = done.endpoint
    alone = SplitEndpoint(done.lightning_module, endpoint.data, endpoint.terms, endpoint.fabric)
    assert alone.privacy is not None and not alone.privacy.key.simulated
    kept = _keyed(alone, OwnState(tmp_path)).privacy
    assert kept is not None and kept.key == NoiseKey.kept(tmp_path)


def test_an_endpoint_that_cannot_add_noise_does_not_take_part(done: Orchestrator) -> None:
    endpoint = done.endpoint

    class Talkative(SplitEndpoint):
        noises = False

    with pytest.raises(TermsError, match="a Talkative cannot"):
        Talkative(done.lightning_module, endpoint.data, endpoint.terms, endpoint.fabric)
