"""Membership told from scalars: each answer is read in the directions in which it was measured."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hosfl_lightning import HOSFL
from hosfl_lightning.attack import membership
from hosfl_lightning.optim import Basis
from hosfl_lightning.wire import ProjectedGradients

PROBES, WIDTH = 16, 12


def scene_of(directions: Any) -> tuple[Any, list[tuple[int, int, Any]], list[Any]]:
    """Three clients with an example each, whose scalars in round 0 are exact; the examples; others, held out."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(9, WIDTH, generator=generator), torch.arange(9) % 3
    batches = [{"x": inputs[i : i + 1], "labels": labels[i : i + 1]} for i in range(9)]
    w = nn.Parameter(torch.randn(3, WIDTH, generator=generator))
    model = SimpleNamespace(prepare=lambda batch: batch, loss=F.cross_entropy, logits=lambda batch: batch["x"] @ w.T)
    algorithm = HOSFL(PROBES, directions=directions)
    basis: Basis = algorithm.basis(7, 0, [w.numel()])
    answers = []
    for k, batch in enumerate(batches[:3]):
        own, loss = basis.of_clients([k]), model.loss(model.logits(batch), batch["labels"])
        scalars = own.project(torch.autograd.grad(loss, [w]))
        answers.append(SimpleNamespace(message=ProjectedGradients(0, k, own.describe(), scalars, 1)))
    scene = SimpleNamespace(
        model=model, trained={"w": w}, seed=7, algorithm=algorithm, rounds={0: answers}, device=torch.device("cpu"),
        autocast=nullcontext, put_client=lambda round: None,
    )  # fmt: skip
    return scene, [(0, k, batch) for k, batch in enumerate(batches[:3])], batches[3:]


@pytest.mark.parametrize("directions", ["shared", "client"])
def test_an_example_is_like_its_own_client_s_scalars(directions: Any) -> None:
    scene, dealt, others = scene_of(directions)
    [score] = membership._by_likeness(scene, dealt, others)
    assert score.value == 1.0 > score.trivial
    assert score.note == f"by likeness to {PROBES} scalars of round 0"
    for _, k, batch in dealt:
        answer = scene.rounds[0][k].message
        assert membership._likeness(scene, batch, [answer]) == pytest.approx([1.0])


@pytest.mark.parametrize("directions", ["shared", "client"])
def test_the_norm_is_that_of_an_example_s_scalars(directions: Any) -> None:
    scene, dealt, others = scene_of(directions)
    _, (name, (members, _)) = membership._by_figures(scene, [batch for *_, batch in dealt], others)
    first = float(scene.rounds[0][0].message.coefficients.norm())
    assert name == "norm of scalars" and members[0] == pytest.approx(-first) and len(set(members)) == 3
