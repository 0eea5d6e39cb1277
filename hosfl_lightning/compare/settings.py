"""What a comparison is: the methods, what they share, and what each may spend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse.typing import Path_fr

from hosfl_lightning.rendering import listed, nearest

#: Keys by which a grid may name the two learning rates.
SHORT = {
    "client_lr": "trainer.algorithm.init_args.client_optimizer.init_args.lr",
    "server_lr": "model.init_args.optimizer.init_args.lr",
}
#: Set by the comparison for every run.
OWNED = (
    "trainer.algorithm.class_path", "trainer.max_rounds", "trainer.val_check_interval", "trainer.controls",
    "trainer.logger", "trainer.default_root_dir", "trainer.enable_progress_bar",
    "trainer.enable_checkpointing", "trainer.seed", "model.init_args.seed", "data.init_args.seed",
)  # fmt: skip
#: What makes a comparison one; a method may not change it.
SHARED = (
    "data", "trainer.clients_per_round", "trainer.availability", "trainer.min_clients", "trainer.precision",
    "trainer.gradient_clip_val", "model.init_args.pretrained",
)  # fmt: skip


class ComparisonError(ValueError):
    """A comparison that cannot be made, or would not be one."""


@dataclass
class Method:
    """One row of the table.

    Args:
        grid: Points that are tried at the tuning seed: dotted keys of the recipe, or `SHORT` names, and their values.
        algorithm: ``class_path`` and ``init_args``, as ``trainer.algorithm`` in a recipe; null: the catalogue's.
        overrides: Dotted keys and values at all points.
    """

    grid: list[dict[str, Any]]
    algorithm: dict[str, Any] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class Limits:
    """What one run may spend; exactly one of them.

    Args:
        rounds: Rounds.
        samples: Examples processed by all clients.
        bytes: Bytes on the wire, both directions, all clients.
        client_forwards: Arithmetic of all clients, in plain forwards of the client half.
    """

    rounds: int | None = None
    samples: int | None = None
    bytes: int | None = None
    client_forwards: float | None = None

    @property
    def kind(self) -> str:
        """The one that is given."""
        return next(name for name, value in vars(self).items() if value is not None)

    @property
    def value(self) -> float:
        """Its value."""
        return getattr(self, self.kind)


@dataclass
class Tuning:
    """How the grid point is chosen: by the last validation of a run at one seed."""

    seed: int = 0
    metric: str = "val/loss"
    mode: Literal["min", "max"] = "min"


@dataclass
class Target:
    """A value on the validation set; the first round that reaches it is reported."""

    metric: str
    value: float


@dataclass
class Publish:
    """Where the results go besides the folder: a W&B run of this project."""

    project: str = "hosfl"
    mode: Literal["online", "offline", "disabled"] = "offline"


@dataclass
class Comparison:
    """Methods on the same data, partitions, initial weights, client samples and seeds, under one budget.

    Args:
        out: The folder of all runs and results; one that was killed, or has more methods or seeds now, goes on in it.
        recipe: What the methods share: ``trainer``, ``model`` and ``data`` as for ``hosfl fit``.
        methods: By the name in the table.
        catalogue: A file of methods by name, ``algorithm`` and ``overrides``, for those that are only named here.
        budget: What one run may spend.
        overrides: Dotted keys of the recipe and values over it; on the command line ``--overrides.model.cut=2``.
        seeds: Of data, model and run; every method runs under each of them.
        tuning: How each method's grid point is chosen.
        metric: Beside the loss, as the model logs it after ``val/`` and ``test/``; null: the loss alone.
        mode: Whether a high or a low value of the metric is good.
        target: Null: the frozen control's mean validation loss at its end.
        first_order: Name of the row that closes the gap by definition; null: the one whose method is SplitFedSGD.
        validations: Points of a curve, without the one at the start.
        jobs: Runs at a time, 1 or 2.
        only: Names of the methods to compare; null: all.
        point: Number of the one grid point to take of every method, from 0 on; null: all are tried.
        wandb: Log the results to W&B as well.
    """

    out: str
    recipe: Path_fr  # type: ignore[valid-type]  # a class made at run time
    methods: dict[str, Method]
    budget: Limits
    overrides: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    tuning: Tuning = field(default_factory=Tuning)
    metric: str | None = None
    mode: Literal["min", "max"] = "max"
    target: Target | None = None
    first_order: str | None = None
    validations: int = 10
    jobs: int = 2
    only: list[str] | None = None
    point: int | None = None
    wandb: Publish | None = None
    catalogue: Path_fr | None = None  # type: ignore[valid-type]

    def look_up(self, catalogue: dict[str, Any]) -> None:
        """Complete the methods that are only named, by what ``catalogue`` says of them.

        Raises:
            ComparisonError: It knows one of them not.
        """
        for name, method in self.methods.items():
            if method.algorithm is not None:
                continue
            if name not in catalogue:
                known = f"; it has {listed(catalogue)}" if catalogue else ""
                raise ComparisonError(f"methods.{name}: give its algorithm, or a catalogue that has it{known}")
            entry = catalogue[name]
            overrides = {**flat(entry.get("overrides", {})), **flat(method.overrides)}
            self.methods[name] = Method(method.grid, entry["algorithm"], overrides)

    def check(self) -> None:
        """Keep the methods of ``only``, and refuse what can be refused without the recipe.

        Raises:
            ComparisonError: Names the setting and the fix.
        """
        for name in self.only or ():
            if name not in self.methods:
                known = listed(self.methods)
                raise ComparisonError(f"only: {name!r} is not one of {known}{nearest(name, self.methods)}")
        if self.first_order is not None and self.first_order not in self.methods:
            raise ComparisonError(f"first_order: {self.first_order!r} is not one of {listed(self.methods)}")
        self.methods = {name: self.methods[name] for name in self.only or self.methods}
        given = [f"{name}={value}" for name, value in vars(self.budget).items() if value is not None]
        if len(given) != 1 or not self.budget.value > 0:
            raise ComparisonError(
                f"budget: give exactly one of {', '.join(vars(self.budget))}, above 0; got {', '.join(given) or 'none'}"
            )
        if not self.methods:
            raise ComparisonError("methods: there are none")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ComparisonError(f"seeds={self.seeds}: give each seed once, and at least one")
        if self.jobs not in (1, 2):
            raise ComparisonError(f"jobs={self.jobs}: 1 or 2 runs at a time")
        if self.validations < 1:
            raise ComparisonError(f"validations={self.validations}: must be at least 1")
        self._check_grids()
        self._check_keys()
        if self.point is not None and self.grid_size > 1:
            if not 0 <= self.point < self.grid_size:
                raise ComparisonError(f"point={self.point}: the grids have points 0 to {self.grid_size - 1}")
            for method in self.methods.values():
                method.grid = [method.grid[self.point]]

    @property
    def grid_size(self) -> int:
        """Points of every method's grid."""
        return len(next(iter(self.methods.values())).grid)

    def _check_grids(self) -> None:
        sizes = {name: len(method.grid) for name, method in self.methods.items()}
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            shown = ", ".join(f"{listed([name])} {size}" for name, size in sizes.items())
            raise ComparisonError(
                f"methods: grids of different or no points ({shown}); every row gets the same number of learning "
                "rates, at least one, or the best-tuned method wins"
            )

    def _check_keys(self) -> None:
        for setting, key, own in self._keys():
            if within(key, OWNED):
                raise ComparisonError(f"{setting}: {key} is set by the comparison itself; leave it out")
            if own and within(key, SHARED):
                raise ComparisonError(
                    f"{setting}: {key} is the same for all methods; set it in the comparison's overrides"
                )
        for name in self.methods:
            if not name or name.startswith(".") or "/" in name:
                raise ComparisonError(f"methods: {name!r} is a folder's name as well: no slash, no dot in front")

    def _keys(self) -> Iterator[tuple[str, str, bool]]:
        """Each dotted key: where it is given, in full, and whether it is one method's."""
        yield from (("overrides", key, False) for key in flat(self.overrides))
        for name, method in self.methods.items():
            yield from ((f"methods.{name}.overrides", key, True) for key in flat(method.overrides))
            for point in method.grid:
                yield from ((f"methods.{name}.grid", key, True) for key in flat(point))


def within(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of ``names``, or a part of one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys in full; ``{a: {b.c: 1}}`` is ``{a.b.c: 1}``, but an object with a ``class_path`` is one value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value and "class_path" not in value:
            found |= {f"{SHORT.get(key, key)}.{name}": one for name, one in flat(value).items()}
        else:
            found[SHORT.get(key, key)] = value
    return found
