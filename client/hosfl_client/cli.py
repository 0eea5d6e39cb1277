"""``hosfl-client``: what a device runs."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from hosfl_client import __version__

DESCRIPTION = """\
A client of a split federated run that computes forwards alone: no PyTorch.

    hosfl-client join --server HOST:PORT --half phone.onnx --data mine.jsonl --certs DIR
    hosfl-client check --half phone.onnx

The half is what `hosfl export-client` wrote on the machine of the server: copy all files of it. What leaves this
device is the smashed data at the cut, the labels and the mask, and a few scalars or a gradient a round.
"""
JOIN = """\
Take part in a run that `hosfl serve` offers. Whatever is cut or killed, start the same command again: it goes on where
it was.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    given = _parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_: print(f"hosfl-client: warning: {message}", file=sys.stderr, flush=True)
    try:
        given.run(given)
    except KeyboardInterrupt:
        print("hosfl-client: interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("HOSFL_CLIENT_DEBUG"):
            raise
        fail(str(error) or type(error).__name__)


def fail(message: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    print(f"hosfl-client: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def say(text: str) -> None:
    """A line with the time, at once."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


class _Parser(argparse.ArgumentParser):
    """Ends a wrong setting with one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} ({self.prog} --help)")


def _count(text: str) -> int:
    """An integer from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("hosfl-client", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"hosfl-client {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="join | check")

    join = commands.add_parser("join", help="take part in a run", description=JOIN)
    join.set_defaults(run=_join)
    join.add_argument("--server", required=True, metavar="HOST:PORT", help="nothing else is ever connected to")
    _half(join)
    join.add_argument(
        "--data", required=True, metavar="FILE",
        help=".jsonl or .csv with a text (and a label) a record, .txt or .md for running text, .npz with images and "
        "labels",
    )  # fmt: skip
    who = join.add_mutually_exclusive_group(required=True)
    who.add_argument("--certs", metavar="DIR", help="ca.crt, site.crt and site.key, as hosfl certs client made them")
    who.add_argument("--insecure", action="store_true", help="plain text, to 127.0.0.1 only; needs --name")
    join.add_argument("--name", help="who this is; with --certs it is the certificate's common name")
    join.add_argument("--server-name", metavar="NAME", help="what the server's certificate says, if not its address")
    join.add_argument("--state", metavar="DIR", help="what this client keeps (default: hosfl_client_<name>)")
    join.add_argument("--save-every", type=_count, default=10, metavar="N", help="updates between writes (default 10)")
    join.add_argument("--give-up", type=float, default=600.0, metavar="S", help="seconds without it (default 600)")
    own = join.add_argument_group("the data, where it differs from the recipe that was exported")
    own.add_argument("--batch-size", type=_count, metavar="N", help="examples a round")
    own.add_argument("--text-field", metavar="FIELD", help="of a record")
    own.add_argument("--label-field", metavar="FIELD", help="of a record")

    check = commands.add_parser("check", help="try this device's arithmetic and a half, against recorded values")
    check.set_defaults(run=_check)
    _half(check)
    return parser


def _half(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--half", required=True, metavar="FILE", help="phone.onnx; its other files lie beside it")
    parser.add_argument("--threads", type=_count, default=None, metavar="N", help="that compute (default: one a core)")


def _join(given: Any) -> None:
    from hosfl_client.join import join

    print(join(
        given.server, given.half, given.data, given.certs, name=given.name, insecure=given.insecure,
        server_name=given.server_name, state=given.state, threads=given.threads, save_every=given.save_every,
        give_up=given.give_up, batch_size=given.batch_size, text_field=given.text_field,
        label_field=given.label_field, notify=say,
    ))  # fmt: skip


def _check(given: Any) -> None:
    from hosfl_client.check import check

    check(given.half, given.threads, print)


if __name__ == "__main__":
    main()
