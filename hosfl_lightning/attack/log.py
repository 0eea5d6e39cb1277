"""What the update log alone gives away: its scalars, over known directions, as an estimate of a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hosfl_lightning.aggregation import recorded
from hosfl_lightning.attack.halves import TextHalf, cosines
from hosfl_lightning.attack.inputs import explained
from hosfl_lightning.attack.inversion import IMAGE_RATE, TEXT_RATE, minimise
from hosfl_lightning.attack.scene import Scene
from hosfl_lightning.attack.score import NotApplicableError, Score, exact
from hosfl_lightning.optim import basis_of
from hosfl_lightning.split import ClientHalf

#: Rounds of the log that are read at most; starts of each inversion, and its steps.
ROUNDS, STARTS, STEPS = 200, 3, 100


def from_log(scene: Scene) -> list[Score]:
    r"""``ĝ = mean_r Σ_p v̄_rp u_rp / P``, then the input whose gradient at the start points the same way.

    The observer has the log and the model as it began, and no message; θ is taken to stand still over the rounds. Of
    the inputs of the first minibatch the best match counts, for ĝ and for a random direction in its place, which is the
    trivial guess. The labels are sought with the input.

    Reference: gradient inversion, Geiping et al., arXiv 2003.14053.
    """
    if scene.log is None or not scene.log.rounds or not scene.trained:
        raise NotApplicableError("the run has no update log that moves the clients")
    batch = next((batch for _, _, batch in scene.trained_on()), None)
    if batch is None:
        raise NotApplicableError("no client answered in the kept rounds")
    scene.put_client(-1)
    estimate, real = _estimate(scene), _gradient(scene, batch)
    other = torch.randn(estimate.shape, generator=torch.Generator().manual_seed(0)).to(estimate)
    told = abs(float(torch.cosine_similarity(estimate, real, dim=0)))
    chance = math.sqrt(2 / (math.pi * len(real)))  # the mean of a random direction
    attack = _text if isinstance(scene.model.client_half, ClientHalf) else _images
    measure, found = attack(scene, batch, estimate)
    _, trivial = attack(scene, batch, other)
    note = f"{min(scene.log.rounds, ROUNDS)} rounds; |cos(ĝ, g)| is {told:.3f}, by chance {chance:.3f}"
    return [Score.of("log", measure, found, trivial, note)]


def _estimate(scene: Scene) -> Tensor:
    """ĝ, flat."""
    assert scene.log is not None
    parameters = list(scene.trained.values())
    total = [torch.zeros(p.numel(), device=scene.device) for p in parameters]
    run_id, rounds = bytes.fromhex(scene.log.starts[0]["run_id"]), min(scene.log.rounds, ROUNDS)
    for frame in scene.log.frames(0, rounds):
        update = recorded(frame, run_id)
        basis = basis_of(update.basis, scene.seed, update.round, [p.numel() for p in parameters])
        for tensor, piece, values in basis.chunks(parameters, update.coefficients.to(scene.device)):
            total[tensor][piece] += values / rounds
    return torch.cat(total)


def _gradient(scene: Scene, batch: dict[str, Tensor]) -> Tensor:
    model: Any = scene.model
    prepared = model.prepare(batch)
    with torch.enable_grad():
        return _flat(scene, model.loss(model.logits(prepared), prepared["labels"]), graph=False)


def _images(scene: Scene, batch: dict[str, Tensor], wanted: Tensor) -> tuple[str, list[float]]:
    images = batch["pixel_values"]
    mean = scene.public()["pixel_values"].mean(0).to(scene.device)
    generator = torch.Generator().manual_seed(1)
    starts = [mean[None] + 0.1 * torch.randn(1, *mean.shape, generator=generator).to(mean) for _ in range(STARTS)]
    found = [_matched(scene, wanted, start, IMAGE_RATE, scene.model.client_half) for start in starts]
    return "pixels explained", [max(explained(images, one.expand_as(images), mean)) for one in found]


def _text(scene: Scene, batch: dict[str, Tensor], wanted: Tensor) -> tuple[str, list[float]]:
    half, width = TextHalf(scene.model.client_half), batch["input_ids"].shape[1]
    size, generator = float(half.table.square().mean().sqrt()), torch.Generator().manual_seed(1)
    rows = [(ids, mask.bool()) for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    ones, found = torch.ones(1, width, device=scene.device), list[float]()
    for _ in range(STARTS):
        start = size * torch.randn(1, width, half.table.shape[1], generator=generator).to(scene.device)
        e = _matched(scene, wanted, start, TEXT_RATE * size, lambda x: half(x, ones))
        guess = cosines(e, half.table).argmax(-1)[0]
        found.append(max(exact(ids[mask].tolist(), guess[mask].tolist()) for ids, mask in rows))
    return "tokens", found


def _matched(scene: Scene, wanted: Tensor, start: Tensor, rate: float, half: Callable[[Tensor], Tensor]) -> Tensor:
    """``max_x,y cos(∂ℓ(x, y)/∂θ_c, wanted)``, labels soft: x."""

    def logits(x: Tensor) -> Tensor:
        z = half(x)
        return scene.model.server_half(z, torch.ones(z.shape[:2], device=z.device)).float()

    def loss(both: Tensor) -> Tensor:
        x, y = both[: start.numel()].view(start.shape), both[start.numel() :].view(shape)
        own = _flat(scene, -(y.softmax(-1) * logits(x).log_softmax(-1)).sum(-1).mean(), graph=True)
        return 1 - torch.cosine_similarity(own, wanted, dim=0)

    with torch.no_grad():
        shape = logits(start).shape
    both = torch.cat([start.flatten(), torch.zeros(shape, device=start.device).flatten()])
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        return minimise(both, loss, rate, STEPS)[: start.numel()].view(start.shape)


def _flat(scene: Scene, loss: Tensor, graph: bool) -> Tensor:
    """``∂loss/∂θ_c``."""
    trained = list(scene.trained.values())
    gradient = torch.autograd.grad(loss, trained, create_graph=graph, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(gradient, trained)])
