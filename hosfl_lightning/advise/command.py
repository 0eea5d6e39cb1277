"""``hosfl advise``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from typing_extensions import override

from hosfl_lightning import recipe
from hosfl_lightning.advise.candidates import candidates, comparable
from hosfl_lightning.advise.measurement import Measurement, measure
from hosfl_lightning.advise.ranking import choose, ranked
from hosfl_lightning.advise.words import SIMULATED, print_advice, sentences
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.files import write_json
from hosfl_lightning.models import SplitModule
from hosfl_lightning.orchestrator import Orchestrator
from hosfl_lightning.run.session import check_model

#: Rounds of a trial: enough on the tasks on which the rule was tuned, see docs/advise.md.
ROUNDS, BATCHES = 40, 24


class Advisor(Orchestrator):
    """An Orchestrator that says which client to train, before it does."""

    def advise(
        self,
        model: SplitModule,
        datamodule: FederatedDataModule,
        rounds: int | None = None,
        batches: int = BATCHES,
        out: str | None = None,
    ) -> dict[str, Any]:
        """Measure what each client of this model should gain, and say which to take; a diagnosis in simulation.

        Every client is tried for a few rounds from the same start; beside the server that a frozen client leaves, the
        gradients of both halves say how much there is to learn below the cut. It backpropagates through the client's
        half, which no device of the method does.

        Args:
            model: The cut model.
            datamodule: The clients' data.
            rounds: Of each trial, even; null: 40, or the recipe's rounds where they are fewer.
            batches: Rounds whose gradients are measured, and held-out batches that score a trial; 8 at least.
            out: Folder of ``advice.json``; null: nothing is written.

        Returns:
            What ``advice.json`` holds.
        """
        rounds = rounds if rounds is not None else max(2, min(ROUNDS, self.settings.max_rounds) // 2 * 2)
        self._refuse(model, rounds, batches)
        if self.progress_bar_callback:
            print(SIMULATED, flush=True)
        known = candidates(model, self.algorithm, self.settings.codec.gradient)
        found = measure(self, model, datamodule, known, rounds, batches)
        if not found.findings:
            why = next(iter(found.left_out.values()))
            raise ValueError(f"model: there is nothing to train below the cut, or none that its method can: {why}")
        choice = choose(found.findings)
        print_advice(found, choice)
        advice = as_written(found, choice)
        if out is not None:
            write_json(Path(out) / "advice.json", advice, indent=2)
            print(f"advice.json in {out}")
        return advice

    def _refuse(self, model: SplitModule, rounds: int, batches: int) -> None:
        check_model(model)
        if self.algorithm.client_holds != "half" or not comparable(self.algorithm):
            raise ValueError(
                f"trainer.algorithm: {self.algorithm.name} has no cut with a server that backpropagates each round of "
                "one minibatch a client, so there is no share below it to measure; advise on a recipe of HOSFL"
            )
        if model.labels == "client":
            raise ValueError("hosfl advise needs the loss at the server; set model.init_args.labels: server")
        if self.settings.world_size > 1:
            raise ValueError("hosfl advise runs in one process; set trainer.devices: 1 and trainer.num_nodes: 1")
        if rounds < 2 or rounds % 2:
            raise ValueError(f"--rounds must be even and >= 2, for its middle is looked at as well, got {rounds}")
        if batches < 8:
            raise ValueError(f"--batches must be >= 8, or nothing is told from noise, got {batches}")


class AdviseCommand(recipe.HOSFLCommand):
    """``advise`` on a recipe of ``fit``."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {"advise": {"model", "datamodule"}}


def main(args: list[str]) -> None:
    """``hosfl advise --config RECIPE [--rounds N] [--batches N] [--out DIR]``."""
    recipe.command(args, AdviseCommand, Advisor)


def as_written(found: Measurement, choice: str) -> dict[str, Any]:
    """Plain values: what was measured, the best predicted gain first, and what follows."""
    told = asdict(found) | {"findings": [asdict(one) for one in ranked(found.findings)]}
    return {"choice": choice, "words": sentences(found, choice), **told}
