"""Recipes: a run's settings as YAML, parsed by LightningCLI, and saved with the run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from hosfl_lightning.algorithms import TooFewClientsError
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.files import write_whole
from hosfl_lightning.fleet import LostProcessError
from hosfl_lightning.models import SplitModule
from hosfl_lightning.orchestrator import Orchestrator
from hosfl_lightning.run.divergence import DivergedError
from hosfl_lightning.run.hooks import HookError

SUBCOMMANDS = ("fit", "serve", "validate", "test", "predict", "export", "replay")
DESCRIPTION = (
    "Fine-tune a split model without backprop on the clients. Clients on other machines: hosfl serve here, hosfl join "
    "--help there, with certificates of hosfl certs --help. Several methods at equal conditions: hosfl compare --help; "
    "the same tables from runs that are there: hosfl report --help."
)
#: The keys of a recipe.
RECIPE = ("seed_everything", "trainer", "model", "data")
#: What a user can mend: shown as one line. Anything else keeps its traceback.
USER_ERRORS = (
    ValueError, FileNotFoundError, HookError, ImportError, TooFewClientsError, DivergedError, LostProcessError,
)  # fmt: skip


class Parser(LightningArgumentParser):
    """Takes the Orchestrator where LightningCLI expects a Trainer, and ends a bad setting with one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # argparse would take --trainer.max_round for max_rounds.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    @override
    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> list[str]:
        if lightning_class is Orchestrator:
            return self.add_class_arguments(
                Orchestrator, nested_key, fail_untyped=False, instantiate=False, sub_configs=True
            )
        return super().add_lightning_class_args(lightning_class, nested_key, subclass_mode, required)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        fail(message)


class SaveConfig(SaveConfigCallback):
    """``config.yaml`` in the run folder, and the same settings in every logger that keeps some (W&B's config page).

    The file is there whole or not at all: a run that was killed goes on with it.
    """

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Nothing: settings that a resumed run refuses must not replace its own."""

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Save, once the settings are taken."""
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    @override
    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        config = json.loads(self.parser.dump(self.config, skip_none=False, format="json"))
        config = {name: config[name] for name in RECIPE if name in config}  # not what is of this call alone
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        write_whole(Path(trainer.log_dir) / self.config_filename, lambda file: file.write(text.encode()))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(config)


class HOSFLCommand(LightningCLI):
    """``fit, validate, test, predict, export, replay`` on a recipe with ``trainer``, ``model`` and ``data``."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {name: {"model", "datamodule"} for name in SUBCOMMANDS}

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Ours may differ from the command line on purpose, which LightningCLI warns of."""
        self.config = parser.parse_args(args)

    @override
    def _parse_ckpt_path(self) -> None:
        """Nothing: no settings are in our checkpoints, and a bad file is the Orchestrator's to refuse."""

    def after_validate(self) -> None:
        """Print what was measured."""
        for name, value in self.trainer.callback_metrics.items() if self.trainer.is_global_zero else ():
            print(f"{name}  {float(value):.4f}")

    after_test = after_validate

    def after_predict(self) -> None:
        """One line of JSON an example: its class, or the next token at every position."""
        trainer: Any = self.trainer
        if not trainer.is_global_zero:
            return
        path = Path(trainer.log_dir) / "predictions.jsonl"
        path.write_text("".join(f"{json.dumps(one)}\n" for batch in trainer.predictions for one in batch.tolist()))
        print(f"predictions written to {path}")


def command(args: list[str], kind: type[HOSFLCommand] | None = None) -> HOSFLCommand:
    """Run a subcommand of ``hosfl`` on a recipe; what it leaves: trainer, model and data."""
    return (kind or HOSFLCommand)(
        SplitModule,
        FederatedDataModule,
        trainer_class=Orchestrator,  # type: ignore[arg-type]  # our parser takes it
        parser_class=Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        parser_kwargs={"prog": "hosfl", "description": DESCRIPTION},
        seed_everything_default=False,
        args=args,
    )


def process() -> int:
    """Which of the processes of a run this is; the first is 0."""
    return getattr(rank_zero_only, "rank", 0)


def fail(message: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    where = f" in process {process()}" if process() else ""
    line = readable(message)
    print(f"hosfl: error{where}: {line}", file=sys.stderr)
    raise SystemExit(2) from ValueError(line)


def readable(message: str) -> str:
    """The line of a parser's report that says what is wrong.

    For an optional setting jsonargparse lists why the value is neither the type nor None, level by level, and dumps the
    value; the reason is the one entry that speaks of neither.
    """
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    reasons: list[str] = []
    for line in lines:
        if line.startswith("- "):
            reasons.append(line.removeprefix("- "))
        elif reasons and reasons[-1].endswith(":"):  # "Problem with given class_path": what it was stands below
            reasons[-1] += f" {line}"
    reasons = [r for r in reasons if "NoneType" not in r and not r.startswith("Does not validate")]
    if not reasons:
        return " ".join(lines)
    key = re.match(r'Parser key "([^"]+)":', lines[0])
    given = next((line for line in lines if line.startswith("Given value: ") and "Namespace" not in line), "")
    return " ".join(filter(None, [f"{key[1]}:" if key else "", "; ".join(dict.fromkeys(reasons)), given]))
