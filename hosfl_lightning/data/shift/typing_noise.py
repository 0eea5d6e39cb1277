"""Texts with slips of the fingers."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from hosfl_lightning.data.shift.contract import Sensor, TextShift

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
#: The key to the left and right of a letter, on the keyboard of an English typewriter; at an end the same twice.
_BESIDE = {
    letter: (row[i - 1] if i else row[1], row[i + 1] if i + 1 < len(row) else row[-2])
    for row in _ROWS
    for i, letter in enumerate(row)
}


@dataclass(frozen=True)
class TypingNoise(TextShift):
    """Each letter a..z or A..Z slips with probability `rate`: the key beside it, it twice, none, or the next first.

    A text has its slips once and for all. With `each_client` the rate of client k is uniform in (0, `rate`).

    Args:
        rate: Of letters that slip.
        each_client: As in `TextShift`.

    Raises:
        ValueError: `rate` is not in (0, 1).
    """

    rate: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"shift: rate={self.rate}: must lie between 0 and 1")

    @override
    def __call__(self, text: str, sensor: Sensor) -> str:
        rate = self.rate * (float(sensor.uniform(1)) if self.each_client else 1)
        slips, kinds = sensor.uniform_each(2, max(1, len(text)))[0].tolist()
        found, place = list[str](), 0
        while place < len(text):
            letter = text[place]
            if letter.lower() not in _BESIDE or slips[place] >= rate:
                found.append(letter)
            else:
                found.append(_slip(text[place : place + 2], kinds[place]))
                place += kinds[place] >= 0.75  # the next one is written already
            place += 1
        return "".join(found)


def _slip(pair: str, kind: float) -> str:
    """A letter, with the one after it where there is one, gone wrong in one of four equally likely ways."""
    letter, eighth = pair[0], int(kind * 8)
    if eighth < 2:
        beside = _BESIDE[letter.lower()][eighth]
        return beside.upper() if letter.isupper() else beside
    return (letter * 2, "", pair[::-1])[eighth // 2 - 1]
