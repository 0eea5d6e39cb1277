"""Recipes: a run's settings as YAML, parsed by LightningCLI, and saved with the run."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from hosfl_lightning.algorithms import TooFewClientsError
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.data.notice import say
from hosfl_lightning.files import plain, write_whole
from hosfl_lightning.fleet import LostProcessError
from hosfl_lightning.mistyped import meant
from hosfl_lightning.models import SplitModule
from hosfl_lightning.orchestrator import Orchestrator
from hosfl_lightning.recipe_files import RECIPE, located, read_files
from hosfl_lightning.rendering import fail, nearest, readable
from hosfl_lightning.run.divergence import DivergedError
from hosfl_lightning.run.hooks import HookError
from hosfl_lightning.usage import ABOUT

SUBCOMMANDS = ("fit", "serve", "validate", "test", "predict", "export", "replay")
#: As they stand before a key in a parser's message.
PREFIXES = (*SUBCOMMANDS, "advise", "attack")
#: What a user can mend: shown as one line. Anything else keeps its traceback.
USER_ERRORS = (
    ValueError, FileNotFoundError, HookError, ImportError, TooFewClientsError, DivergedError, LostProcessError,
    MisconfigurationException,
)  # fmt: skip


class Parser(LightningArgumentParser):
    """Takes the Orchestrator where LightningCLI expects a Trainer, and ends a bad setting with one line."""

    _subcommands_action: Any
    #: The YAML files of the command line, to say where a key stands that is not known.
    files: ClassVar[dict[str, Any]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # argparse would take --trainer.max_round for max_rounds.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    @override
    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> list[str]:
        if isinstance(lightning_class, type) and issubclass(lightning_class, Orchestrator):
            return self.add_class_arguments(
                lightning_class, nested_key, fail_untyped=False, instantiate=False, sub_configs=True
            )
        return super().add_lightning_class_args(lightning_class, nested_key, subclass_mode, required)

    @override
    def validate(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; a name that is not known comes with the nearest that is."""
        try:
            return super().validate(*args, **kwargs)
        except KeyError as error:
            [message] = error.args
            parser = getattr(error, "subcommand_parser", None) or self
            found = re.match(r"(?:Subcommand|Group) '(.+)' does not accept option '(.+)'|Option '(.+)' is not", message)
            if found is None:
                raise
            name, names = found[2] or found[3], parser.names()
            if message.startswith("Group"):
                names = [one.removeprefix(f"{found[1]}.") for one in names if one.startswith(f"{found[1]}.")]
            hint = nearest(name, names) or (f"; there are {', '.join(names)}" if len(names) < 20 else "")
            error.args = (message + hint,)
            raise

    def names(self) -> list[str]:
        """Of all options, without dashes."""
        given = [option for action in self._actions for option in action.option_strings]
        names = [one.removeprefix("--") for one in given if one.startswith("--") and not one.endswith((".help", "+"))]
        return [one for one in names if one not in ("help", "print_config", "print_shtab")]

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        fail(located(readable(self.as_typed(message)), self.files))

    def as_typed(self, message: str) -> str:
        """With options as they stand on a command line, and the nearest to one that is not known."""
        head, colon, rest = message.partition(": ")
        if head == "the following arguments are required" and self.exit_on_error:
            typed = (re.sub(rf"^({'|'.join(PREFIXES)})\.", "", name) for name in rest.split(", "))
            return head + colon + ", ".join(f"--{name}" for name in typed)
        if head != "unrecognized arguments":
            return message
        chosen = self._subcommands_action.choices.values() if self._subcommands_action else [self]
        names = [f"--{name}" for parser in chosen for name in parser.names()]
        if "--overrides" in names:  # of a comparison: settings of its recipe
            names += [f"--overrides.trainer.{name}" for name in inspect.signature(Orchestrator).parameters]
        given = [one.partition("=")[0] for one in rest.split() if one.startswith("--")]
        return message + meant(given, names)


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

    @override
    def before_instantiate_classes(self) -> None:
        """Say what takes long before anything else can be said, unless bars are not wanted."""
        config = self.config[self.subcommand]
        if config.trainer.enable_progress_bar:
            given = config.model.get("init_args", {})
            say(f"loading {given.get('pretrained') or config.model.class_path}")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Likewise for what follows."""
        trainer: Any = super().instantiate_trainer(**kwargs)
        trainer.narrates = self.config[self.subcommand].trainer.enable_progress_bar
        return trainer

    def before_validate(self) -> None:
        """Say so where there is nothing trained to evaluate."""
        if self.config[self.subcommand].get("ckpt_path") is None and self.trainer.is_global_zero:
            print(
                "no --ckpt_path: this is the model as it begins, untrained; give a run's folder or a checkpoint of it"
            )

    before_test = before_predict = before_validate

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
        rows = [plain(one) for batch in trainer.predictions for one in batch.tolist()]
        path.write_text("".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows))
        print(f"predictions written to {path}")


def command(
    args: list[str], kind: type[HOSFLCommand] | None = None, trainer: type[Orchestrator] = Orchestrator
) -> HOSFLCommand:
    """Run a subcommand of ``hosfl`` on a recipe; what it leaves: trainer, model and data.

    Args:
        args: Of the command line.
        kind: The command, where it is another one.
        trainer: Whose methods its subcommands are.
    """
    Parser.files = read_files(args)
    return (kind or HOSFLCommand)(
        SplitModule,
        FederatedDataModule,
        trainer_class=trainer,  # type: ignore[arg-type]  # our parser takes it
        parser_class=Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        parser_kwargs={"prog": "hosfl", "description": ABOUT},
        seed_everything_default=False,
        args=args,
    )
