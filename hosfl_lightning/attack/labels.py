"""Labels: those that travel, and those that λ gives away."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hosfl_lightning.attack.halves import cosines
from hosfl_lightning.attack.scene import Crossing, Scene
from hosfl_lightning.attack.score import NotApplicableError, Score, auc_score, commonest

IGNORE = -100
#: Clusterings from other starts, and shuffles by which chance is known.
STARTS, SHUFFLES = 8, 20


def travelling(scene: Scene) -> list[Score]:
    """Labels in the messages, which nobody has to attack."""
    crossings = [one for one, _ in scene.seen() if one.labels is not None]
    if not crossings:
        raise NotApplicableError("no labels travel")
    kept = [one.truth["labels"].cpu() for one in crossings]
    hits = [float(a == b) for one, t in zip(crossings, kept) for a, b in _counted(one.labels, t)]
    usual = commonest(_valid(scene.public()["labels"]))
    trivial = [float(usual == b) for t in kept for _, b in _counted(t, t)]
    return [Score.of("labels", "labels", hits, trivial, "they travel: nothing to attack")]


def from_multiplier(scene: Scene) -> list[Score]:
    """λ = ∂ℓ/∂z of each example, or of each token of a language model."""
    crossings = [one for one, _ in scene.seen() if one.multipliers]
    if not crossings:
        raise NotApplicableError("no multipliers crossed in the kept rounds")
    names = sorted({name for one in crossings for name in one.multipliers})
    attack = _by_token if crossings[0].truth["labels"].dim() == 2 else _by_cluster
    return [score for name in names for score in attack(scene, [one for one in crossings if name in one.multipliers],
                                                        name)]  # fmt: skip


def _by_token(scene: Scene, crossings: Sequence[Crossing], name: str) -> list[Score]:
    r"""``argmax_v cos(−λ_t, W_v)``: behind a head alone ``λ_t = (softmax − e_y) W / n``, and row ``y`` is the nearest.

    Through layers and a norm between z and the head less of it is left.
    """
    head = scene.model.whole.get_output_embeddings()
    if head is None:
        raise NotApplicableError("the model has no head whose rows are tokens")
    hits, truth = list[float](), list[int]()
    for one in crossings:
        targets = _targets(one)
        counted = targets != IGNORE
        guess = cosines(-one.multipliers[name][counted], head.weight.detach()).argmax(-1)
        hits += (guess == targets[counted]).float().tolist()
        truth += targets[counted].tolist()
    usual = commonest(_valid(scene.public()["labels"]))
    trivial = [float(usual == y) for y in truth]
    found = [Score.of("multiplier", "next tokens", hits, trivial, f"from {name}, nearest row of the head")]
    own_head: Any = getattr(scene.model, "client_head", None)
    if own_head is not None and name == "up multiplier" and all(one.middle is not None for one in crossings):
        exact = list[float]()
        for one in crossings:
            assert one.middle is not None
            targets, head_here = _targets(one), partial(own_head, attention_mask=one.mask)
            guess = behind_head(head_here, one.middle, one.multipliers[name])
            exact += (guess == targets)[targets != IGNORE].float().tolist()
        found.append(Score.of("multiplier", "next tokens", exact, trivial, f"from {name}, z₂ and the public head"))
    return found


def behind_head(head: Callable[[Tensor], Tensor], z: Tensor, multiplier: Tensor, tried: int = 512) -> Tensor:
    r"""``argmax_y cos(λ_t, ∂(−log softmax(head(z_t))_y)/∂z_t)``: the label itself, where the head is known.

    Tried are the labels whose logit ``−λ_t`` raises most.

    Args:
        head: ``z₂ (B, S, h)`` to logits ``(B, S, V)``, each position by itself.
        z: ``z₂``.
        multiplier: ``λ₂ (B, S, h)``; its scale does not matter.
        tried: Labels of each position at most.

    Returns:
        ``(B, S)``.
    """
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        rises = torch.func.jvp(head, (z.detach(),), (-multiplier,))[1]
        labels = rises.topk(min(tried, rises.shape[-1])).indices
        logits = head(z).float()
        likeness = list[Tensor]()
        for one in labels.split(1, dim=-1):
            loss = (logits.logsumexp(-1, keepdim=True) - logits.gather(-1, one)).sum()
            (gradient,) = torch.autograd.grad(loss, [z], retain_graph=True)
            likeness.append(torch.cosine_similarity(gradient.float(), multiplier, dim=-1))
    return labels.gather(-1, torch.stack(likeness, -1).argmax(-1, keepdim=True))[..., 0]


def _targets(one: Crossing) -> Tensor:
    """The token that each position is to predict."""
    return torch.nn.functional.pad(one.truth["labels"][:, 1:], (0, 1), value=IGNORE)


def _by_cluster(scene: Scene, crossings: Sequence[Crossing], name: str) -> list[Score]:
    """Directions of λ in as many clusters as classes; each is given the label that is commonest in it.

    That is generous, so the trivial guess is given it too: clusters of the same sizes at random. Of two classes the
    norm is tried as well.

    Reference: Li et al., "Label leakage and protection in two-party split learning", arXiv 2102.08504.
    """
    rows = torch.cat([one.multipliers[name].flatten(1) for one in crossings])
    labels = [int(y) for one in crossings for y in one.truth["labels"]]
    classes = len(scene.data.label_names or ()) or max(labels) + 1
    clusters = clustered(normalize(rows, dim=-1), classes)
    generator, chance = random.Random(0), list[float]()
    for _ in range(SHUFFLES):
        shuffled = generator.sample(labels, k=len(labels))
        chance.append(fmean(_named(clusters, shuffled)))
    found = [Score.of("multiplier", "labels", _named(clusters, labels), fmean(chance), f"from {name}, by direction")]
    if classes == 2 and len(set(labels)) == 2:
        norms = rows.norm(dim=-1).tolist()
        ones, zeros = ([n for n, y in zip(norms, labels) if y == side] for side in (1, 0))
        found.append(auc_score("multiplier", ones, zeros, note=f"from {name}, labels by norm"))
    return found


def clustered(units: Tensor, count: int, rounds: int = 30) -> list[int]:
    """Spherical k-means of unit rows ``(n, d)``, the best of several starts: the cluster of each."""
    generator, best, found = torch.Generator().manual_seed(0), -float("inf"), torch.zeros(len(units), dtype=torch.long)
    for _ in range(STARTS):
        centres = units[torch.randint(len(units), (1,), generator=generator)]
        while len(centres) < min(count, len(units)):  # the farthest from all
            centres = torch.cat([centres, units[(units @ centres.T).amax(-1).argmin()][None]])
        for _ in range(rounds):
            nearest = (units @ centres.T).argmax(-1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, units)
            centres = torch.where(sums.norm(dim=-1, keepdim=True) > 0, normalize(sums, dim=-1), centres)
        fit = float((units @ centres.T).amax(-1).sum())
        if fit > best:
            best, found = fit, (units @ centres.T).argmax(-1)
    return [int(cluster) for cluster in found]


def _named(clusters: Sequence[int], labels: Sequence[int]) -> list[float]:
    """Whether each example has the commonest label of its cluster."""
    names = {c: Counter(y for k, y in zip(clusters, labels) if k == c).most_common(1)[0][0] for c in set(clusters)}
    return [float(names[c] == y) for c, y in zip(clusters, labels)]


def _counted(guess: Tensor | None, truth: Tensor) -> Iterable[tuple[int, int]]:
    assert guess is not None
    counted = truth != IGNORE
    return zip(guess[counted].tolist(), truth[counted].tolist())


def _valid(labels: Tensor) -> list[int]:
    return labels[labels != IGNORE].tolist()
