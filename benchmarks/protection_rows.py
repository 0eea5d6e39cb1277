"""What ``benchmarks.protections`` runs: three tasks, and what keeps data from the server in each."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.cells import placed
from benchmarks.client_learning_cells import TASKS, known, lora

RECIPES = Path(__file__).parent.parent / "recipes"
ALGORITHM, CODEC, LABELS = "trainer.algorithm", "trainer.codec.smashed_data", "model.init_args.labels"
FROZEN, FIRST_ORDER, PLAIN = "frozen", "first order", "nothing"


@dataclass(frozen=True)
class Task:
    """A model, data and clients, with what their noise is measured in.

    Args:
        recipe: Below ``recipes/``.
        overrides: Dotted keys; ``{data}`` and ``{minilm}`` are replaced.
        client: The method of the rows, with rates that an earlier table chose.
        first_order: That of the control.
        clip: Of an example's vector: the median length of those of the first rounds.
        token_clip: Of z: the median length of a token's.
        multiplier_clip: Of λ₂, each token's or example's own: likewise; None: labels do not stay here.
        noises: On z, in clips.
        attacks: That are tried.
        found: The one whose share of inputs stands in the table.
        delta: Below 1/N.
    """

    recipe: str
    overrides: dict[str, Any]
    client: dict[str, Any]
    first_order: dict[str, Any]
    clip: float
    token_clip: float
    multiplier_clip: float | None
    noises: tuple[float, float]
    attacks: tuple[str, ...]
    found: str
    delta: float = 5e-4


def rated(method: dict[str, Any], client: float, server: float) -> dict[str, Any]:
    """Overrides of a method with its learning rates."""
    algorithm = deepcopy(method)
    algorithm["init_args"]["client_optimizer"]["init_args"]["lr"] = client
    return {ALGORITHM: algorithm, "model.init_args.optimizer.init_args.lr": server}


def backprop() -> dict[str, Any]:
    """A first-order client, averaged every step."""
    rule = {"class_path": "hosfl_lightning.optim.AdamW", "init_args": {"weight_decay": 0.0}}
    return {"class_path": "hosfl_lightning.algorithms.SplitFedSGD", "init_args": {"client_optimizer": rule}}


def side(name: str, cut: int, **more: Any) -> dict[str, Any]:
    """A task of the client-learning table beside its strong server."""
    task = TASKS[name]
    server = {"r": 32, "alpha": 64, "target_modules": "all-linear"}
    return task.overrides | {
        "model.init_args.cut": cut, "model.init_args.lora.server": server, "data.init_args.num_clients": 8,
        "model.init_args.side": {"client": 0, "server": task.width}, "trainer.max_rounds": task.rounds, **more,
    }  # fmt: skip


def adapter(name: str) -> dict[str, Any]:
    """The client's side adapter alone is trained."""
    return {"model.init_args.side.client": TASKS[name].width, "model.init_args.lora.client": None}


SHAKESPEARE, POLARITY = "shakespeare", "mr_polarity"
ALL = {
    "digits": Task(
        "vision/digits_hosfl_norm.yaml", {"model.init_args.cut": 3, "trainer.max_rounds": 100}, {},
        rated(backprop(), 0.01, 0.01), clip=1.5, token_clip=4.0, multiplier_clip=None,
        noises=(0.03, 0.1), attacks=("labels", "inversion", "multiplier"), found="pixels explained",
    ),
    SHAKESPEARE: Task(
        TASKS[SHAKESPEARE].recipe, side(SHAKESPEARE, 3),
        adapter(SHAKESPEARE) | rated(known("Uncompressed"), 0.01, 0.005),
        lora("all-linear") | rated(backprop(), 0.006, 0.005), clip=1.3, token_clip=7.0, multiplier_clip=1.3,
        noises=(0.1, 0.4), attacks=("labels", "search", "multiplier"), found="tokens",
    ),
    POLARITY: Task(
        TASKS[POLARITY].recipe, side(POLARITY, 5, **{"data.init_args.partition": "iid", "trainer.max_rounds": 50}),
        adapter(POLARITY) | rated(known("Uncompressed"), 0.001, 0.0007),
        lora("all-linear") | rated(backprop(), 0.0015, 0.0007), clip=0.15, token_clip=11.0, multiplier_clip=0.05,
        noises=(0.1, 0.4), attacks=("labels", "nearest", "multiplier"), found="tokens",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A task and what protects its clients."""

    task: str
    protection: str
    overrides: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """In the table's file."""
        return f"{self.task}/{self.protection}"

    @property
    def noises_z(self) -> bool:
        """Whether what is trained on is other z than what is validated on."""
        return "smashed_data" in self.overrides.get("trainer.privacy", {})

    def recipe(self, seed: int, quick: bool, folder: Path, places: dict[str, str]) -> dict[str, Any]:
        """The task's recipe with this protection; its run goes into ``folder``."""
        task = ALL[self.task]
        found: dict[str, Any] = yaml.safe_load((RECIPES / task.recipe).read_text())
        method = {
            FROZEN: {ALGORITHM: {"class_path": "hosfl_lightning.algorithms.Frozen"}},
            FIRST_ORDER: task.first_order,
        }
        chosen = placed(task.overrides, places) | method.get(self.protection, task.client) | self.overrides
        for key, value in chosen.items():
            put(found, key, value)
        trainer, init = found["trainer"], found["model"]["init_args"]
        trainer["max_rounds"] = 2 if quick else trainer["max_rounds"]
        trainer |= {
            "seed": seed, "val_check_interval": trainer["max_rounds"], "default_root_dir": str(folder), "controls": [],
            "enable_progress_bar": False, "enable_checkpointing": False, "callbacks": [
                {"class_path": "hosfl_lightning.callbacks.KeepMessages", "init_args": {"rounds": 1}}],
        }  # fmt: skip
        init["seed"] = found["data"]["init_args"]["seed"] = seed
        return found


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """A value under its dotted key."""
    *above, last = key.split(".")
    for name in above:
        tree = tree.setdefault(name, {})
    tree[last] = deepcopy(value)


def rows(name: str) -> list[Row]:
    """The controls, no protection, and each protection of a task."""
    task = ALL[name]
    found: dict[str, dict[str, Any]] = {FROZEN: {}, FIRST_ORDER: {}, PLAIN: {}}

    def tokens(clip: float | None, multiplier: float) -> dict[str, Any]:
        return {"clip": clip, "noise_multiplier": multiplier}

    if task.multiplier_clip is not None:
        found["labels stay"] = {LABELS: "client"}
        noise = {"multiplier": tokens(task.multiplier_clip, 0.2)}
        found["labels stay, noise 0.2 on λ₂"] = {LABELS: "client", "trainer.privacy": noise}
    for codec in ("int8", "int4"):
        found[f"z in {codec}"] = {CODEC: codec}
    for multiplier in task.noises:
        found[f"noise {multiplier:g} on z"] = {"trainer.privacy": {"smashed_data": tokens(task.token_clip, multiplier)}}
    for epsilon in (8, 3, 1):
        answers = {"level": "example", "clip": task.clip, "epsilon": float(epsilon), "delta": task.delta}
        found[f"ε = {epsilon} on answers"] = {"trainer.privacy": answers}
    if task.multiplier_clip is not None:
        most = task.noises[1]
        both = {"smashed_data": tokens(task.token_clip, most), "multiplier": tokens(task.multiplier_clip, 0.2)}
        found[f"labels stay, noise {most:g} on z, 0.2 on λ₂"] = {LABELS: "client", "trainer.privacy": both}
    return [Row(name, protection, overrides) for protection, overrides in found.items()]


EVERY = [row for name in ALL for row in rows(name)]
QUICK = [row for row in rows("digits") if row.protection in (FROZEN, FIRST_ORDER, PLAIN, "z in int4")]
