"""Records that remember where they stand, for errors with a line number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_info

OnMissing = Literal["error", "skip"]


class MissingError(ValueError):
    """A record lacks a value that is asked of it."""


class EmptyError(MissingError):
    """A file holds no record or text."""


class Row(NamedTuple):
    """One record of a dataset.

    Attributes:
        where: Its place, for messages: `train.jsonl line 7`, from 1 on; where there are no lines `train.parquet record
            6`, from 0 on as in `dataset[6]`.
        fields: Field name to value.
        file: The file that it is of, or the split on the hub.
    """

    where: str
    fields: dict[str, Any]
    file: str = ""

    def field(self, name: str, setting: str) -> Any:
        """The value of a field that must be there; `setting` is the argument that named it.

        Raises:
            MissingError: There is no such field, or it is null, NaN or blank.
        """
        if name not in self.fields:
            present = ", ".join(map(str, self.fields))
            raise MissingError(f"{self.where}: no field {name!r} ({setting}); the fields here are: {present}")
        value = self.fields[name]
        if lack := _lack(value):
            raise MissingError(f"{self.where}: field {name!r} ({setting}) is {lack}")
        return value

    def text(self, name: str, setting: str) -> str:
        """The value of a field that must be a text.

        Raises:
            MissingError: As for `field`.
            ValueError: It is of another type.
        """
        value = self.field(name, setting)
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: field {name!r} ({setting}) must be a text, not {_shown(value)}")
        return value


def complete(rows: Sequence[Row], needs: Callable[[Row], Any], on_missing: OnMissing, setting: str) -> list[Row]:
    """The records that have what is needed.

    Args:
        rows: All of a source.
        needs: Asks a record for it, by `Row.field` and `Row.text`.
        on_missing: `error` refuses the first record that lacks it, `skip` leaves such records out and says how many.
        setting: The argument that holds the source, for messages.

    Raises:
        MissingError: A record lacks it, or with `skip` all do.
    """
    kept, lacking = [], []
    for row in rows:
        try:
            needs(row)
        except MissingError as error:
            if on_missing == "error":
                raise MissingError(f"{error}; on_missing: skip leaves such records out") from error
            lacking.append(str(error))
        else:
            kept.append(row)
    if lacking and not kept:
        raise MissingError(f"{setting}: all {len(rows)} records lack what is asked of them, the first: {lacking[0]}")
    if lacking:
        rank_zero_info(f"{setting}: {len(lacking)} of {len(rows)} records are skipped, the first: {lacking[0]}")
    return kept


def _lack(value: Any) -> str | None:
    if value is None:
        return "null"
    if isinstance(value, float) and value != value:
        return "NaN"
    return "empty" if isinstance(value, str) and not value.strip() else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
