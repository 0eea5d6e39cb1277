"""What somebody else has written, for a terminal or a journal."""

from __future__ import annotations


def printable(text: str, most: int = 1000) -> str:
    """One line, in which nothing commands a terminal, and which every terminal can be sent.

    Args:
        text: Any, such as halves of surrogate pairs, which have no bytes.
        most: Characters; the rest is cut off.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
