"""``hosfl certs``: a CA, and one folder for every site."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import override

from hosfl_lightning.link.authority import Authority
from hosfl_lightning.link.certificates import common_name
from hosfl_lightning.link.errors import CertificateError
from hosfl_lightning.link.revoked import parse_serial
from hosfl_lightning.rendering import nearest

DESCRIPTION = """\
Certificates for runs with clients on other machines: server and clients show each other one, and talk to nobody
without. You keep a CA, a folder that signs them, on a machine of your own:

  hosfl certs init --out certs/ca
  hosfl certs server --ca certs/ca --host fl.example.org --out certs/server
  hosfl certs client --ca certs/ca --name hospital-a --out certs/hospital-a

Copy each folder to its site, over a channel that you trust: whoever has site.key is that site. certs/ca stays
where it is. A client whose key may be known to others, or who must not come back, is revoked:

  hosfl certs revoke --ca certs/ca --name hospital-a
"""
_LONGEST = 36500


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    @override
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Remembers them: what is missing may be there under another name."""
        self.given = [str(one).partition("=")[0] for one in args or []]
        return super().parse_known_args(args, namespace)

    def names(self) -> list[str]:
        """Of all options, those of its commands among them."""
        chosen = [action.choices for action in self._actions]
        below = [parser for choices in chosen if isinstance(choices, dict) for parser in choices.values()]
        own = [option for action in self._actions for option in action.option_strings]
        return [*own, *(name for parser in below for name in parser.names())]

    @override
    def error(self, message: str) -> NoReturn:
        """One line, which the command line ends with."""
        names = self.names()
        unknown = [one for one in self.given if one.startswith("--") and one not in names]
        hint = f" (got {unknown[0]}{nearest(unknown[0], names)})" if unknown and "required" in message else ""
        if message.startswith("unrecognized"):
            hint = "".join(nearest(one, names) for one in re.findall(r"--[\w-]+", message)[:1])
        raise CertificateError(f"{self.prog}: {message}{hint}")


def main(args: list[str]) -> None:
    """``hosfl certs init | server | client | revoke``.

    Raises:
        CertificateError: What the user can mend.
    """
    given = _parser().parse_args(args)
    try:
        given.run(given)
    except OSError as error:
        raise CertificateError(f"{error.filename or 'disk'}: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hosfl certs", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    init = _command(commands, "init", _init, "Make a CA.")
    init.add_argument("--out", required=True, metavar="DIR", help="Its folder: a new one.")
    init.add_argument("--name", default="hosfl", help="What it calls itself in its certificate; hosfl.")
    _days(init, 3650)
    server = _command(commands, "server", _server, "Make the folder of the server.")
    _authority(server)
    server.add_argument(
        "--host", required=True, nargs="+", action="extend", metavar="HOST",
        help="What clients call the server: a host name or an IP address, or several.",
    )  # fmt: skip
    client = _command(commands, "client", _client, "Make the folder of a client.")
    _authority(client)
    client.add_argument("--name", required=True, help="The client's name, as the server's clients.yaml has it.")
    for one in (server, client):
        one.add_argument("--out", required=True, metavar="FOLDER", help="The site's folder: a new one.")
        _days(one, 365)
    revoke = _command(commands, "revoke", _revoke, "Shut a site out, for good.")
    _authority(revoke)
    which = revoke.add_mutually_exclusive_group(required=True)
    which.add_argument("--name", help="All certificates of this name.")
    which.add_argument("--serial", type=_serial, help="One certificate, by its serial number in hexadecimal.")
    return parser


def _command(commands: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(run=run)
    return parser


def _authority(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ca", required=True, metavar="DIR", help="The folder that hosfl certs init made.")


def _days(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument("--days", type=_number, default=default, help=f"How long it is valid; {default}.")


def _number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days from 1 to {_LONGEST}")
    return int(text)


def _serial(text: str) -> int:
    serial = parse_serial(text)
    if serial is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no serial number in hexadecimal")
    return serial


def _init(given: argparse.Namespace) -> None:
    authority = Authority.make(given.out, given.name, given.days)
    folder = Path(given.out)
    print(f"The CA {given.name} is in {folder}, valid until {authority.certificate.not_valid_after_utc:%Y-%m-%d}.")
    print(f"  {folder / 'ca.key'}  signs certificates: whoever has it can be any site. It stays here; keep a copy safe")
    print(f"  {folder / 'ca.crt'}  its certificate, a copy of which is in every site's folder")
    print(f"  {folder / 'revoked.txt'}  who is shut out: nobody yet")
    print(f"Next: hosfl certs server --ca {shlex.quote(given.out)} --host HOST --out FOLDER")


def _server(given: argparse.Namespace) -> None:
    certificate = Authority.load(given.ca).server(given.host, given.out, given.days)
    until = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
    print(f"The server's folder is {given.out}: site.crt for {', '.join(given.host)}, valid until {until},")
    print("  site.key (secret), ca.crt and revoked.txt. Copy it to the machine of the server.")
    print(f"Next: hosfl certs client --ca {shlex.quote(given.ca)} --name NAME --out FOLDER")


def _client(given: argparse.Namespace) -> None:
    authority = Authority.load(given.ca)
    earlier = authority.valid(given.name)
    certificate = authority.client(given.name, given.out, given.days)
    until = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
    print(f"The folder of {given.name} is {given.out}: site.crt, valid until {until}, site.key (secret) and ca.crt.")
    print("  Copy it to the machine of the client. In the server's clients.yaml stands NUMBER: " + given.name)
    for one in earlier:
        print(f"Its certificate {one.serial_number:x} is valid too; to end it: hosfl certs revoke "
              f"--ca {shlex.quote(given.ca)} --serial {one.serial_number:x}")  # fmt: skip


def _revoke(given: argparse.Namespace) -> None:
    revoked = Authority.load(given.ca).revoke(given.name, given.serial)
    for one in revoked:
        print(f"Revoked: {common_name(one)}, serial number {one.serial_number:x}.")
    if not revoked:
        print("Nothing new: what you named is revoked already.")
    print(f"Copy {Path(given.ca) / 'revoked.txt'} into the folder of the server; a server that runs reads it again.")
