"""Membership: was this example trained on? Told from what the model and its clients say of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hosfl_lightning.attack.scene import Scene
from hosfl_lightning.attack.score import NotApplicableError, Score, auc, auc_score
from hosfl_lightning.clients.cohort import Batch
from hosfl_lightning.optim import Basis, basis_of
from hosfl_lightning.run import checkpoint as checkpoints
from hosfl_lightning.server.server import uncoded
from hosfl_lightning.wire import CodedGradient, ProjectedGradients


def membership(scene: Scene) -> list[Score]:
    """Members are the examples of the kept minibatches; the others are held out.

    By the loss (Yeom et al., arXiv 1709.01604) and by the norm of the scalars, both of the model at the run's last
    checkpoint; and by how alike an example's scalars are to those that its client sent in the run's first round.
    Held-out examples may be of another kind than the members, so the trivial guess is the same figure of the model at
    the start; of the likeness, that to the scalars of another client.
    """
    dealt = list(scene.trained_on())
    sides = [one for _, _, batch in dealt for one in alone(batch)], list(alone(scene.public()))
    before = dict(_by_figures(scene, *sides))
    with _trained(scene) as rounds:
        after = dict(_by_figures(scene, *sides))
    found = [
        auc_score("membership", *values, auc(*before[name]), f"by {name}, model after {rounds} rounds")
        for name, values in after.items()
    ]
    return [*found, *_by_likeness(scene, dealt, sides[1])]


def _by_figures(scene: Scene, *sides: Sequence[Batch]) -> Iterator[tuple[str, tuple[list[float], list[float]]]]:
    """What is smaller of a member, negated: of both sides."""
    with torch.no_grad():
        members, others = ([-float(_loss(scene, batch)) for batch in side] for side in sides)
    yield "loss", (members, others)
    basis = scene.algorithm.basis(scene.seed, 0, [p.numel() for p in scene.trained.values()]) if scene.trained else None
    if basis is not None:  # else the method has no scalars
        own = basis.of_clients([0])  # one client's are as good as another's
        members, others = ([-float(_scalars(scene, batch, own)[0].norm()) for batch in side] for side in sides)
        yield "norm of scalars", (members, others)


def _by_likeness(scene: Scene, dealt: Sequence[tuple[int, int, Batch]], others: Sequence[Batch]) -> Iterator[Score]:
    """``cos(V(x), v_k)`` of an example's scalars with client k's in round 0, of which both halves are known."""
    answers: dict[int, ProjectedGradients] = {
        one.message.client: uncoded(one.message)
        for one in scene.rounds.get(0, [])
        if isinstance(one.message, ProjectedGradients | CodedGradient)
    }
    sent = [(answers[client], batch) for round, client, batch in dealt if round == 0 and client in answers]
    if not sent or len(sent[0][0].coefficients) < 2:
        return
    scene.put_client(0)
    pairs = [(sent[i][0], sent[(i + 1) % len(sent)][0]) for i in range(len(sent))]  # its client's, and another's
    known = [_likeness(scene, one, pair) for pair, (_, batch) in zip(pairs, sent) for one in alone(batch)]
    strange = [_likeness(scene, one, pairs[i % len(sent)]) for i, one in enumerate(others)]
    (members, by_another), (outside, of_another) = zip(*known), zip(*strange)
    trivial = auc(by_another, of_another) if len(sent) > 1 else 0.5
    note = f"by likeness to {len(sent[0][0].coefficients)} scalars of round 0"
    yield auc_score("membership", members, outside, trivial, note)


def _likeness(scene: Scene, example: Batch, answers: Sequence[ProjectedGradients]) -> list[float]:
    """With each of the answers, each in its own basis."""
    sizes = [p.numel() for p in scene.trained.values()]
    scalars = _scalars(scene, example, *(basis_of(one.basis, scene.seed, 0, sizes) for one in answers))
    found = zip(scalars, answers)
    return [float(torch.cosine_similarity(mine, one.coefficients.to(mine), dim=0)) for mine, one in found]


@contextmanager
def _trained(scene: Scene) -> Iterator[int]:
    """The model as the run's last checkpoint has it; after how many rounds."""
    before = {name: tensor.clone() for name, tensor in scene.model.trained_state().items()}
    held = max((one for _, one in checkpoints.whole(scene.run)), key=lambda one: one["global_step"], default=None)
    if held is None:
        raise NotApplicableError("the run has no checkpoint yet, so what it has learned is not known")
    try:
        checkpoints.load_model(scene.model, held)
        yield held["global_step"]
    finally:
        scene.model.load_trained_state(before)


def alone(batch: Batch) -> Iterator[Batch]:
    """Each example as a batch of its own."""
    for row in range(len(batch["labels"])):
        yield {name: tensor[row : row + 1] for name, tensor in batch.items()}


def _loss(scene: Scene, batch: Batch) -> Tensor:
    model: Any = scene.model
    prepared = {name: tensor.to(scene.device) for name, tensor in model.prepare(batch).items()}
    with scene.autocast():
        return model.loss(model.logits(prepared), prepared["labels"])


def _scalars(scene: Scene, batch: Batch, *bases: Basis) -> list[Tensor]:
    """``⟨∂ℓ/∂θ_c, u_p⟩`` in each basis, by backprop: the attacker may."""
    with torch.enable_grad():
        gradient = torch.autograd.grad(_loss(scene, batch), list(scene.trained.values()), allow_unused=True)
    known = [torch.zeros_like(p) if g is None else g for p, g in zip(scene.trained.values(), gradient)]
    return [basis.project(known) for basis in bases]
