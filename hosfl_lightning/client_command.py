"""``hosfl join``: take part in a run that is served elsewhere."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from jsonargparse import Namespace

from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.models import SplitModule
from hosfl_lightning.recipe import Parser
from hosfl_lightning.rendering import fail

#: Settings of the command that `join` does not have, or has in another form.
BESIDE = ("config", "imports", "model", "data")
DESCRIPTION = """\
Take part in a run that hosfl serve offers on another machine. The recipe has two keys, `model` and `data`: the
server's model, cut and adapters, and the data of this machine, of which z and the labels travel. Whatever is cut or
killed, start the same command again: it goes on where it was.
"""


def main(args: list[str]) -> None:
    """``hosfl join --server HOST:PORT --config client.yaml --certs DIR``."""
    from hosfl_lightning.clients.endpoint import TermsError
    from hosfl_lightning.join import ServerGoneError, TurnedAwayError, join

    parser = _parser(prog="hosfl join", description=DESCRIPTION)
    parser.add_argument("-c", "--config", action="config", help="A YAML file with these settings.")
    parser.add_argument(
        "--imports", type=list[str], default=[], metavar="[MODULE,...]",
        help="Modules of the run's own parts (estimators, update rules, codecs, endpoints), which messages name.",
    )  # fmt: skip
    parser.add_function_arguments(join, skip={"model", "data", "backoff", "limits", "notify"})
    given = parser.parse_args(args)
    for module in given.imports:
        import_module(module)

    def model(part: str) -> Any:
        chosen = given.model.clone()
        chosen.init_args.part = part
        return _made("model", chosen)

    own = {name: value for name, value in vars(given).items() if name not in BESIDE}
    try:
        said = join(model=model, data=_made("data", given.data), **own)
    except (TurnedAwayError, ServerGoneError, TermsError) as error:
        fail(str(error))
    except KeyboardInterrupt as interrupt:
        interrupt.args = ("interrupted; the same command goes on",)
        raise
    print(said)


def _parser(**kwargs: Any) -> Parser:
    parser = Parser(**kwargs)
    parser.add_lightning_class_args(SplitModule, "model", subclass_mode=True, required=True)
    parser.add_lightning_class_args(FederatedDataModule, "data", subclass_mode=True, required=True)
    return parser


def _made(name: str, chosen: Namespace) -> Any:
    """One of the two, as its class path says; the other is not built."""
    kind: Any = SplitModule if name == "model" else FederatedDataModule
    parser = Parser()
    parser.add_lightning_class_args(kind, name, subclass_mode=True, required=True)
    return parser.instantiate_classes(Namespace(**{name: chosen}))[name]
