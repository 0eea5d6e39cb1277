"""The attacks on z: what was the input?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from hosfl_lightning.attack.halves import TextHalf, cosines
from hosfl_lightning.attack.inversion import invert_images, invert_text, nearest_alone
from hosfl_lightning.attack.scene import Crossing, Scene
from hosfl_lightning.attack.score import NotApplicableError, Score, commonest, tokens
from hosfl_lightning.attack.search import search

Guess = Callable[[TextHalf, Tensor, Tensor], Tensor | Sequence[Sequence[int]]]


def by_search(scene: Scene) -> list[Score]:
    """`search`, of every example."""
    return _of_text(scene, "search", _search)


def by_nearest(scene: Scene) -> list[Score]:
    """The nearest embedding; and the nearest z of a token alone, which costs V forwards of one token once."""
    told = _of_text(scene, "nearest", lambda half, z, mask: cosines(z, half.table).argmax(-1), "embedding")
    return told + _of_text(scene, "nearest", lambda half, z, mask: nearest_alone(half, z), "z of a token alone")


def by_inversion(scene: Scene) -> list[Score]:
    """`invert_text` or `invert_images`."""
    if isinstance(_first(scene).truth.get("pixel_values"), Tensor):
        return _of_images(scene)
    return _of_text(scene, "inversion", invert_text)


def explained(images: Tensor, guesses: Tensor, mean: Tensor) -> list[float]:
    """``1 − Σ(x − x̂)² / Σ(x − x̄)²`` of each image, at least 0, which the mean image ``x̄`` has."""
    error, spread = ((images - other).square().flatten(1).sum(1) for other in (guesses, mean))
    return (1 - error / spread).clamp(min=0).tolist()


def _search(half: TextHalf, z: Tensor, mask: Tensor) -> list[list[int]]:
    if half.looks_ahead():
        raise NotApplicableError(
            "z depends on later tokens, so no prefix can be tried alone; inversion does not need it"
        )
    return [search(half, *one) for one in zip(z, mask)]


def _of_text(scene: Scene, name: str, guess: Guess, note: str = "") -> list[Score]:
    truths, guesses = list[list[int]](), list[list[int]]()
    for one, some in scene.seen():
        with scene.autocast():
            half = TextHalf(scene.model.client_half)
            found = guess(half, one.z[some], one.mask[some])
        for row, ids, mask in zip(found, one.truth["input_ids"][some], one.mask[some]):
            truths.append(ids[mask].tolist())
            guesses.append(row[mask].tolist() if isinstance(row, Tensor) else list(row))
    public = scene.public()
    usual = commonest(public["input_ids"][public["attention_mask"].bool()].tolist())
    return tokens(name, truths, guesses, usual, note)


def _of_images(scene: Scene) -> list[Score]:
    mean, shares = scene.public()["pixel_values"].mean(0).to(scene.device), list[float]()
    for one, some in scene.seen():
        with scene.autocast():
            found = invert_images(scene.model.client_half, one.z[some], mean)
        shares += explained(one.truth["pixel_values"][some], found, mean)
    return [Score.of("inversion", "pixels explained", shares, 0.0, "beside the mean image")]


def _first(scene: Scene) -> Crossing:
    return next(iter(scene.seen()))[0]
