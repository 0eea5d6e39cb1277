"""Noise beside directions of each client's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hosfl_client.privacy import Mechanism, NoiseKey
from hosfl_lightning import HOSFL
from hosfl_lightning.clients import SplitEndpoint
from hosfl_lightning.optim import SGD, ClientDirections
from tests.privacy.test_run import NOISE, asked, fit, multiplier_of, without_waiting_for_the_disk

__all__ = ["without_waiting_for_the_disk"]  # a fixture
PROBES, CLIENTS, ROUND, CLIP = 3, [0, 1, 2], 7, 0.5
pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe", "ignore:mu=")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> SplitEndpoint:
    method = HOSFL(PROBES, 2**-6, directions="client", client_optimizer=SGD(lr=0.1))
    return fit(tmp_path_factory.mktemp("own"), NOISE, method, max_rounds=1).endpoint  # type: ignore[return-value]


@pytest.mark.parametrize("level", ["example", "client"])
def test_along_own_directions_a_batch_is_as_clients_by_themselves(
    level: str, endpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**endpoint.terms.privacy, "level": level}
    monkeypatch.setattr(endpoint, "privacy", Mechanism(settings, NoiseKey.of_seed(0)))
    _, together = asked(endpoint, CLIENTS, round=ROUND)
    assert [one.basis["clients"] for one in together] == [[0], [1], [2]]
    for client in CLIENTS:
        _, [apart] = asked(endpoint, [client], round=ROUND)
        torch.testing.assert_close(apart.coefficients, together[client].coefficients, atol=1e-3, rtol=0)


def test_along_own_directions_each_example_is_clipped(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against probes of one example at a time."""
    silent = Mechanism({**endpoint.terms.privacy, "clip": CLIP}, NoiseKey.of_seed(0))
    monkeypatch.setattr(silent, "noise_multiplier", 1e-6)
    monkeypatch.setattr(endpoint, "privacy", silent)
    sent, answers = asked(endpoint, CLIENTS, round=ROUND)
    engine, clipped = endpoint.client, 0
    for client, answer in zip(CLIENTS, answers):
        z = sent[client].unpack()[0]
        multiplier, batch = multiplier_of(z), endpoint.data([client], ROUND).batch
        basis, rows = ClientDirections(0, ROUND, PROBES, [client]), []
        with torch.no_grad():
            for p in range(PROBES):
                change = engine.probe(batch, basis, p, engine.optimizer.mu) - z
                each = (multiplier * change).double().flatten(1).sum(1) / engine.optimizer.mu
                rows.append(each * len(z))  # of its own mean loss
        own = torch.stack(rows, 1)
        clipped += int((own.norm(dim=1) > CLIP).sum())
        wanted = (own * (CLIP / own.norm(dim=1, keepdim=True)).clamp(max=1)).mean(0)
        torch.testing.assert_close(answer.coefficients.double(), wanted, rtol=1e-3, atol=1e-6)
    assert 0 < clipped < 11
