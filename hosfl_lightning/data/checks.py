"""Refusing settings that make no sense, before anything is read."""

from __future__ import annotations


def check_at_least(minimum: int, **settings: int | None) -> None:
    """Refuse a setting below `minimum`; None is a setting that is not used."""
    for name, value in settings.items():
        if value is not None and value < minimum:
            raise ValueError(f"{name}={value}: must be at least {minimum}")


def check_fraction(**settings: float) -> None:
    """Refuse a share that leaves nothing on one side."""
    for name, value in settings.items():
        if not 0 < value < 1:
            raise ValueError(f"{name}={value}: must lie between 0 and 1")


def check_share(**settings: float) -> None:
    """Refuse a share that leaves nothing of the whole; 0 is a share that is not taken."""
    for name, value in settings.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value}: must be at least 0 and below 1")


def check_choice(choices: tuple[str, ...], **settings: str) -> None:
    """Refuse a word that is none of the choices."""
    for name, value in settings.items():
        if value not in choices:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")
