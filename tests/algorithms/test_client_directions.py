"""Directions of each client's own: what moves, what travels, and who replays it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hosfl_client import client_directions
from hosfl_lightning import HOSFL
from hosfl_lightning.advise.simulated import ByBackprop
from hosfl_lightning.aggregation import Median
from hosfl_lightning.availability import Trace
from hosfl_lightning.optim import AdamW, ClientDirections, RandomProjections, SharedDirections, basis_of
from hosfl_lightning.run.checkpoint import CheckpointError
from hosfl_lightning.wire import Codecs, ProjectedGradients, Update
from tests.algorithms.plain_probes import MU, moved, step
from tests.algorithms.two_layers import Crossing, Points, TwoLayers, adamw, last_update, orchestrator

PROBES = 3
RULE = AdamW(lr=0.03, weight_decay=0.1)
pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe", "ignore:mu=.* changes only")


def method(**settings: Any) -> HOSFL:
    return HOSFL(PROBES, MU, client_optimizer=RULE, directions="client", **settings)


def fit(folder: Path, algorithm: Any = None, data: Points | None = None, **settings: Any) -> Any:
    trainer = orchestrator(algorithm or method(), folder, **settings)
    trainer.fit(TwoLayers(adamw()), data or Points())
    return trainer


def weights(trainer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.lightning_module.client_parameters.values()]


def test_all_move_along_the_directions_of_each(tmp_path: Path) -> None:
    """As in plain PyTorch: ``ĝ = Σ_k w_k (1/P) Σ_p v_kp u_kp``."""
    trainer, data, model = fit(tmp_path), Points(), TwoLayers()
    data.setup("fit")
    first, second = deepcopy(model.client_half.layer), deepcopy(model.server_half.layer)
    parameters = list(first.parameters())
    rules = [torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.1),
             torch.optim.AdamW(second.parameters(), lr=0.02, weight_decay=0.1)]  # fmt: skip
    for round in range(5):
        batches = {k: data.client_batch(k, round) for k in trainer.sample(round)}
        total, estimate = sum(len(b["labels"]) for b in batches.values()), [torch.zeros_like(p) for p in parameters]
        rules[1].zero_grad()
        for k, batch in batches.items():
            w, x = len(batch["labels"]) / total, batch["points"]
            z = first(x).detach().requires_grad_()
            (w * F.cross_entropy(second(z), batch["labels"])).backward()
            assert z.grad is not None
            multiplier, shared = z.grad / w, SharedDirections(0, round, PROBES)
            for p in range(PROBES):
                unit = torch.eye(PROBES)[p] * PROBES
                u = [c[2].clone().view_as(q) for c, q in zip(shared.of_client(k).chunks(parameters, unit), parameters)]
                with moved(parameters, u, MU):
                    value = ((multiplier * (first(x).detach() - z.detach())).double().sum() / MU).float()
                for part, d in zip(estimate, u):
                    part += w * value * d / PROBES
        rules[1].step()
        step(rules[0], parameters, estimate)
    torch.testing.assert_close(weights(trainer), [p.detach() for p in parameters], rtol=2e-5, atol=2e-6)


def test_one_batch_gives_what_clients_by_themselves_give(tmp_path: Path) -> None:
    one, other = (fit(tmp_path, simulation=kind) for kind in ("batched", "per_client"))
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-5, atol=1e-6)
    assert last_update(one).basis == last_update(other).basis


def test_scalars_travel(tmp_path: Path) -> None:
    """``P`` of each client up, along its own, and those of all down."""
    crossing = Crossing()
    fit(tmp_path, max_rounds=1, callbacks=[crossing])
    answers = [m for m in crossing.up if isinstance(m, ProjectedGradients)]
    assert [m.basis["clients"] for m in answers] == [[m.client] for m in answers] and len(answers) == 3
    assert all(m.coefficients.shape == (PROBES,) for m in answers)
    [update] = [m for m in crossing.down if isinstance(m, Update)]
    assert update.basis == answers[0].basis | {"clients": update.participants}
    expected = torch.cat([m.coefficients.double() * w for m, w in zip(answers, update.weights)]).float()
    assert torch.equal(update.coefficients, expected)


def test_who_was_away_replays_and_the_log_rebuilds(tmp_path: Path) -> None:
    online = Trace([[0, 1, 2, 3], [0, 1], [0, 1], [0, 1, 2, 3], [2, 3]])
    trainer = fit(tmp_path, availability=online, clients_per_round=2, logger=True, enable_checkpointing=True)
    assert trainer.summary["catch_up"]
    trainer.replay(TwoLayers(adamw()), None, trainer.log_dir, str(tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert (report["equal_to"], report["differs_from"]) == (["last.ckpt"], [])


def test_a_run_that_goes_on_ends_where_it_would_have(tmp_path: Path) -> None:
    kept: dict[str, Any] = {"logger": True, "enable_checkpointing": True}
    whole, part = (fit(tmp_path / name, max_rounds=n, **kept) for name, n in (("whole", 4), ("part", 2)))
    on = orchestrator(method(), tmp_path / "part", max_rounds=4, **kept)
    on.fit(TwoLayers(adamw()), Points(), ckpt_path=part.log_dir)
    assert all(torch.equal(a, b) for a, b in zip(weights(on), weights(whole), strict=True))
    shared = orchestrator(HOSFL(PROBES, MU, client_optimizer=RULE), tmp_path / "part", max_rounds=5, **kept)
    with pytest.raises(CheckpointError, match="directions"):
        shared.fit(TwoLayers(adamw()), Points(), ckpt_path=part.log_dir)


@pytest.mark.parametrize("replay_log", [True, False])
def test_too_many_directions_are_refused_before_the_run(
    replay_log: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_directions, "ALL_DIRECTIONS", 8)
    crossing = Crossing()
    with pytest.raises(ValueError, match="3 clients with 3 directions of their own are more than 8"):
        fit(tmp_path, logger=True, replay_log=replay_log, callbacks=[crossing])
    assert not crossing.down


def test_ternary_is_for_many_coefficients_of_a_client() -> None:
    ternary = Codecs(gradient="ternary")
    HOSFL(128, directions="client").check_codecs(ternary, [1000])
    with pytest.raises(ValueError, match="the 64 numbers that a client sends"):
        HOSFL(64, directions="client").check_codecs(ternary, [1000])


def test_alike_clients_estimate_better_together() -> None:
    """The mean of eight clients with one gradient: along shared directions it is one's."""
    gradient, sizes = [torch.randn(400, generator=torch.Generator().manual_seed(0))], [400]
    norm = float(gradient[0].norm())

    def cosine(kind: Any) -> float:
        total = torch.zeros(400)
        for _, piece, values in kind.chunks(
            gradient, kind.project(gradient) / max(1, len(getattr(kind, "clients", [])))
        ):
            total[piece] = values
        return float(total @ gradient[0] / total.norm() / norm)

    own = [cosine(ClientDirections(0, r, 4, range(8))) for r in range(20)]
    shared = [cosine(SharedDirections(0, r, 4)) for r in range(20)]
    assert 0.08 < sum(shared) / 20 < 0.12 and 0.24 < sum(own) / 20 < 0.31
    assert basis_of(ClientDirections(0, 0, 4, [1, 5]).describe(), 0, 0, sizes).size == 8


def test_the_advisors_trial_answers_along_them(tmp_path: Path) -> None:
    """Its clients backpropagate; at a small μ the update is the same."""
    found = []
    for algorithm in (method(estimator="central"), ByBackprop(method())):
        crossing = Crossing()
        fit(tmp_path, algorithm, max_rounds=1, callbacks=[crossing])
        found += [m for m in crossing.down if isinstance(m, Update)]
    assert found[0].basis == found[1].basis
    torch.testing.assert_close(found[0].coefficients, found[1].coefficients, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize(("settings", "said"), [
    ({"personal": True}, "leave personal out"),
    ({"compression": RandomProjections(8), "estimator": "local"}, "leave compression out"),
    ({"aggregation": Median()}, "no two coefficients are of one direction"),
])  # fmt: skip
def test_what_does_not_go_together(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        method(**settings)


def test_another_word_for_directions() -> None:
    with pytest.raises(ValueError, match="directions='own': one of shared, client"):
        HOSFL(directions="own")  # type: ignore[arg-type]


@pytest.mark.parametrize(("changes", "said"), [
    ({"clients": [2, 1]}, "must be different and ascend"),
    ({"clients": [1, 1]}, "must be different and ascend"),
    ({"clients": [1.0]}, "must be of type int"),
    ({"clients": list(range(40_000))}, "more than 65536 in a round"),
])  # fmt: skip
def test_a_description_from_outside_is_checked(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        basis_of(ClientDirections(0, 0, 2, [1]).describe() | changes, 0, 0, [3])
