"""Names of sites: a certificate's common name."""

from __future__ import annotations

import re

from hosfl_lightning.link.errors import LinkError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
RULE = "1 to 64 of the letters A-Z a-z, digits, '.', '_' and '-', a letter or a digit first"


def is_name(name: object) -> bool:
    """Whether it can be the name of a site."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_name(name: str, setting: str, error: type[LinkError]) -> str:
    """The name itself.

    Raises:
        LinkError: It is none; of type ``error``.
    """
    if not is_name(name):
        raise error(f"{setting}={name!r} is not the name of a site; {RULE}")
    return name
