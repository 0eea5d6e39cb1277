"""``hosfl attack``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from typing_extensions import override

from hosfl_lightning import recipe
from hosfl_lightning.attack import inputs, labels, log, membership
from hosfl_lightning.attack.report import as_written, print_report, write
from hosfl_lightning.attack.scene import Scene
from hosfl_lightning.attack.score import NotApplicableError, Score
from hosfl_lightning.callbacks.keep_messages import kept_rounds
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.models import SplitModule
from hosfl_lightning.optim.compiled import eager
from hosfl_lightning.orchestrator import Orchestrator
from hosfl_lightning.rendering import nearest
from hosfl_lightning.run import folder
from hosfl_lightning.run.data_check import set_up
from hosfl_lightning.run.session import check_model
from hosfl_lightning.server.replay_log import ReplayLog

ATTACKS: dict[str, Callable[[Scene], list[Score]]] = {
    "labels": labels.travelling,
    "search": inputs.by_search,
    "nearest": inputs.by_nearest,
    "inversion": inputs.by_inversion,
    "multiplier": labels.from_multiplier,
    "membership": membership.membership,
    "log": log.from_log,
}


class Attacker(Orchestrator):
    """An Orchestrator whose server is curious."""

    def attack(
        self,
        model: SplitModule,
        datamodule: FederatedDataModule,
        run: str,
        attacks: list[str] | None = None,
        out: str | None = None,
        examples: int = 16,
    ) -> dict[str, Any]:
        """Try to recover the clients' data from what a run has sent, and say how much of it was.

        The attacker is an honest-but-curious server: it has the base model, the update log (so the client half at every
        round) and the messages that ``hosfl_lightning.callbacks.KeepMessages`` has kept. The recipe's own data is read
        to score what was found; its held-out part also stands for text or images that anybody has.

        Args:
            model: As in the run's recipe.
            datamodule: As in the run's recipe.
            run: The run's folder; the run may still be going on.
            attacks: Of ``labels, search, nearest, inversion, multiplier, membership, log``; null: all.
            out: Folder of ``attack.json`` and ``attack.png``; null: ``RUN/attack``.
            examples: That each attack takes at most.

        Returns:
            What ``attack.json`` holds.

        Raises:
            KeptError: No messages were kept, they are damaged, or not of the recipe's data.
        """
        chosen = _chosen(attacks)
        if examples < 1:
            raise ValueError(f"--examples must be >= 1, got {examples}")
        scene = self._scene(model, datamodule, Path(run), examples)
        scores, left_out = list[Score](), dict[str, str]()
        for name in chosen:
            try:
                with eager(model.compiles):  # there are gradients of gradients
                    scores += ATTACKS[name](scene)
            except NotApplicableError as error:
                left_out[name] = str(error)
            scene.put_client(-1)
        facts = _facts(scene)
        title = f"{facts['method']}, cut {facts['cut']}, z in {facts['codec']}, θ_c {facts['client_half']}"
        told = as_written(facts, scores, left_out)
        print_report(title, scores, left_out)
        target = Path(out) if out is not None else Path(run) / "attack"
        write(target, title, told, scores)
        print(f"attack.json and attack.png in {target}")
        return told

    def _scene(self, model: SplitModule, data: FederatedDataModule, run: Path, examples: int) -> Scene:
        check_model(model)
        path = run / folder.LOG
        held = ReplayLog.read(path) if path.is_file() else None
        run_id = bytes.fromhex(held.starts[0]["run_id"]) if held is not None else None
        rounds = dict(kept_rounds(run, run_id))
        if data.tokenizer is None:
            data.tokenizer, data.tokenizer_of = model.tokenizer(), model.pretrained
        data.prepare_data()
        set_up(data, model, "fit")
        if data.label_names is not None:
            model.name_labels(data.label_names)
        self.fabric.to_device(self.fabric.strategy.precision.convert_module(model))
        model.eval()
        return Scene(
            model, data, rounds, held, self.fabric.autocast, examples, self.algorithm, self.algorithm.shared(model),
            run, self.settings.seed,
        )  # fmt: skip


def _chosen(attacks: list[str] | None) -> list[str]:
    for name in attacks or ():
        if name not in ATTACKS:
            raise ValueError(f"--attacks: {name!r} is none; there are {', '.join(ATTACKS)}{nearest(name, ATTACKS)}")
    return list(attacks or ATTACKS)


def _facts(scene: Scene) -> dict[str, Any]:
    half = "of each round, from the log" if scene.halves else "of the start"
    return {
        "method": scene.algorithm.name, "cut": scene.model.cut, "client_half": half, "rounds": sorted(scene.rounds),
        "codec": ", ".join(sorted({one.codec for one in scene.crossings})) or "no message",
    }  # fmt: skip


class AttackCommand(recipe.HOSFLCommand):
    """``attack`` on the recipe of a run."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {"attack": {"model", "datamodule"}}


def main(args: list[str]) -> None:
    """``hosfl attack --run RUN [--attacks NAMES] [--out DIR] [--examples N]``."""
    recipe.command(args, AttackCommand, Attacker)
