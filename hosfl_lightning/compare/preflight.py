"""The data of a comparison, looked at before any of its methods: what is wrong with it is no method's fault."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any, NoReturn

import yaml

from hosfl_lightning import recipe
from hosfl_lightning.compare.configs import Job
from hosfl_lightning.compare.settings import ComparisonError
from hosfl_lightning.compare.worker import print_into
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.models import SplitModule
from hosfl_lightning.models.pretrained import load_tokenizer
from hosfl_lightning.rendering import readable
from hosfl_lightning.run.settings import RunSettings


def see_data(job: Job) -> list[str]:
    """Set the data up once, as every method's run will, and see that a round finds clients.

    No model is built: data that asks for a tokenizer that only the model knows is left to the first rounds.

    Args:
        job: Its recipe is written; all methods have the same data.

    Returns:
        What the data said of itself, line by line.

    Raises:
        ComparisonError: The data cannot be had, read or dealt to the clients.
    """
    print_into(job.log)
    config, said = yaml.safe_load(job.config.read_text()), io.StringIO()
    if not config.get("data"):
        return []  # which every recipe must have, as the first round says
    try:
        with redirect_stdout(said):
            data = _built(config["data"])
            if data.tokenizer is None:
                data.tokenizer = _tokenizer(config.get("model"))
            data.prepare_data()
            data.setup("fit")
        counts = {name: n for name in ("clients_per_round", "min_clients") if (n := config["trainer"].get(name))}
        RunSettings(**counts).sample_size(data.num_clients, data.num_clients - len(data.holders))
    except OfTheModelError:
        return []
    except SystemExit as end:
        raise ComparisonError(f"recipe: {end.__cause__ or end}") from None
    except recipe.USER_ERRORS as error:
        raise ComparisonError(f"recipe: {readable(str(error))}") from None
    return said.getvalue().splitlines()


class OfTheModelError(Exception):
    """Only the model knows its tokenizer."""


class Unknown:
    """In the place of a tokenizer that is not known here."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Somebody wants to tokenize."""
        raise OfTheModelError

    def __getattr__(self, name: str) -> NoReturn:
        raise OfTheModelError


def _built(config: Any) -> FederatedDataModule:
    parser = recipe.Parser(prog="hosfl compare")
    parser.add_subclass_arguments(FederatedDataModule, "data", required=True)
    return parser.instantiate(parser.parse_object({"data": config})).data


def _tokenizer(model: Any) -> Any:
    """That of the model's ``pretrained``, where its class takes that one."""
    try:
        module, _, name = model["class_path"].rpartition(".")
        kind = getattr(import_module(module or "hosfl_lightning.models"), name)
        if kind.tokenizer is SplitModule.tokenizer:
            return load_tokenizer(model["init_args"]["pretrained"])
    except Exception:  # whatever it is, the first round says it of the model
        pass
    return Unknown()
