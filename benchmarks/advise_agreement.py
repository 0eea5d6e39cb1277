"""Whether a ranking that was predicted is the one that was measured."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import mean, quantiles
from typing import TypeVar

T = TypeVar("T")
FREEZE = "freeze"
DRAWN = 2000


@dataclass(frozen=True)
class Row:
    """A client in a cell.

    Args:
        name: Its method's.
        predicted: Its gain as advised; the frozen client's is 0.
        measured: Its gain at each seed, frozen minus it in test loss.
        backprop: Whether it backpropagates.
    """

    name: str
    predicted: float
    measured: tuple[float, ...]
    backprop: bool = False

    @property
    def gain(self) -> float:
        """Measured, mean over seeds."""
        return mean(self.measured)


@dataclass(frozen=True)
class Cell:
    """A cell.

    Args:
        name: Its name.
        rows: The frozen client's among them.
        choice: What the advisor says to take.
        share: Of the predicted decrease below the cut, of the widest client.
    """

    name: str
    rows: tuple[Row, ...]
    choice: str
    share: float

    @property
    def best(self) -> Row:
        """That gained most."""
        return max(self.rows, key=lambda row: row.gain)

    @property
    def chosen(self) -> Row:
        """That was advised."""
        return next(row for row in self.rows if row.name == self.choice)

    @property
    def least(self) -> float:
        """Of the best row's mean gain, the 2.5th percentile of a bootstrap over seeds."""
        return interval([mean(resampled(self.best.measured, generator)) for generator in generators()])[0]

    @property
    def right(self) -> bool:
        """Whether the choice gained as much as the best row's interval begins with."""
        return self.chosen.gain >= self.least


def kendall(pairs: Sequence[tuple[float, float]]) -> tuple[int, int]:
    """Concordant minus discordant pairs, and all of them; one that is tied in either counts 0."""
    signs = [_sign((a[0] - b[0]) * (a[1] - b[1])) for a, b in combinations(pairs, 2)]
    return sum(signs), len(signs)


def over_rows(cells: Sequence[Cell]) -> float:
    """τ over all pairs of rows that stand in one cell."""
    counted = [kendall([(row.predicted, row.gain) for row in cell.rows]) for cell in cells]
    return sum(agree for agree, _ in counted) / max(sum(total for _, total in counted), 1)


def over_cells(cells: Sequence[Cell], of: Callable[[Cell], tuple[float, float]]) -> float:
    """τ over cells of what ``of`` predicts and measures."""
    agree, total = kendall([of(cell) for cell in cells])
    return agree / max(total, 1)


def most(cell: Cell) -> tuple[float, float]:
    """The highest gain, predicted and measured."""
    return max(row.predicted for row in cell.rows), cell.best.gain


def shares(cell: Cell) -> tuple[float, float]:
    """The share below the cut, and the highest gain measured."""
    return cell.share, cell.best.gain


def bootstrap(cells: Sequence[Cell], figure: Callable[[Sequence[Cell]], float]) -> tuple[float, float]:
    """95 % interval of a figure: cells are drawn, then in each the seeds, the same of all its rows."""
    return interval([figure([reseeded(cell, g) for cell in resampled(cells, g)]) for g in generators()])


def reseeded(cell: Cell, generator: random.Random) -> Cell:
    """With seeds drawn anew."""
    places = resampled(range(len(cell.rows[0].measured)), generator)
    rows = tuple(replace(row, measured=tuple(row.measured[n] for n in places)) for row in cell.rows)
    return replace(cell, rows=rows)


def resampled(items: Sequence[T], generator: random.Random) -> list[T]:
    """As many, with replacement."""
    return generator.choices(items, k=len(items))


def generators() -> Iterator[random.Random]:
    """One a resample, the same every time."""
    return (random.Random(number) for number in range(DRAWN))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """2.5th and 97.5th percentile."""
    cuts = quantiles(values, n=40, method="inclusive")
    return cuts[0], cuts[-1]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def report(cells: Sequence[Cell], tuned: Sequence[str]) -> str:
    """The tables: a line a cell, then the figures of the cells that were not tuned on, then of those that were."""
    parts = [_lines(cells, tuned)]
    for title, some in (
        ("Reported cells", [cell for cell in cells if cell.name not in tuned]),
        ("Cells on which the rule was tuned", [cell for cell in cells if cell.name in tuned]),
    ):
        parts.append(_figures(title, some) if some else "")
    return "\n".join(part for part in parts if part)


def _lines(cells: Sequence[Cell], tuned: Sequence[str]) -> str:
    head = ["cell", "choice", "its gain, predicted", "measured", "best row, measured", "within", "τ of rows"]
    lines = [head, ["---"] * len(head)]
    for cell in cells:
        agree, total = kendall([(row.predicted, row.gain) for row in cell.rows])
        name = f"{cell.name} (tuned)" if cell.name in tuned else cell.name
        lines.append([
            name, cell.choice, f"{cell.chosen.predicted:.3f}", f"{cell.chosen.gain:.3f}",
            f"{cell.best.name}: {cell.best.gain:.3f}, from {cell.least:.3f}", "yes" if cell.right else "**no**",
            f"{agree / max(total, 1):.2f}",
        ])  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _figures(title: str, cells: Sequence[Cell]) -> str:
    lines = [
        f"{title}: {sum(cell.right for cell in cells)} of {len(cells)} choices within the interval of the best row"
    ]
    figures: list[tuple[str, Callable[[Sequence[Cell]], float]]] = [("rows of a cell", over_rows)]
    if len(cells) > 2:
        figures += [
            ("cells, by predicted gain", lambda some: over_cells(some, most)),
            ("cells, by share below the cut", lambda some: over_cells(some, shares)),
        ]
    for what, figure in figures:
        low, high = bootstrap(cells, figure)
        lines.append(f"Kendall's τ over {what}: {figure(cells):.2f} [{low:.2f}, {high:.2f}]")
    misses = [cell for cell in cells if not cell.right]
    lines += [
        f"Miss: {cell.name}: {cell.choice} {cell.chosen.gain:.3f}, best {cell.best.name} {cell.best.gain:.3f}"
        for cell in misses
    ]
    return "".join(f"- {line}\n" for line in lines)
