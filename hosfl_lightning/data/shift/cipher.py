"""Texts in a script that no model was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase

from typing_extensions import override

from hosfl_lightning.data.shift.contract import Sensor, TextShift

_LETTERS = len(ascii_lowercase)


@dataclass(frozen=True)
class Cipher(TextShift):
    """Letter i of the alphabet becomes letter π(i); capitals stay capitals, and all but a..z and A..Z stays as it is.

    Args:
        rotation: π(i) = i + rotation mod 26; 13 is rot13. None: π is drawn from the data's seed; with `each_client`,
            every client has its own (with `rotation`, client k that of k + 1 times as many letters).
        each_client: As in `TextShift`.

    Raises:
        ValueError: `rotation` is not in 1..25.
    """

    rotation: int | None = None

    def __post_init__(self) -> None:
        if self.rotation is not None and not 1 <= self.rotation < _LETTERS:
            raise ValueError(f"shift: rotation={self.rotation}: must lie in 1..25; null draws an alphabet")

    @override
    def __call__(self, text: str, sensor: Sensor) -> str:
        if self.rotation is None:
            order = sensor.order(_LETTERS)
        else:
            order = [(i + self.rotation * (sensor.client + 1)) % _LETTERS for i in range(_LETTERS)]
        table = {
            ord(letter): letters[order[i]]
            for letters in (ascii_lowercase, ascii_uppercase)
            for i, letter in enumerate(letters)
        }
        return text.translate(table)
