"""Texts are tokenized in a process of its own, which ends: neither the tokenizer nor the texts stay in memory."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from hosfl_client.bfloat16 import Array
from hosfl_client.examples import DataError, DataSettings, Example, read_examples

#: Exit status of a child that has told its parent why.
REFUSED = 3


def read_apart(path: Path, settings: DataSettings, tokenizer: Path | None) -> list[Example]:
    """As `read_examples`, in another process where there is text.

    Args:
        path: The device's own file.
        settings: As the manifest and the user say.
        tokenizer: File of the exported tokenizer; None: there is none.

    Raises:
        DataError: As `read_examples` does.
    """
    if settings.kind == "images" or tokenizer is None:
        return read_examples(path, settings, None)
    told = json.dumps({"path": str(path), "settings": asdict(settings), "tokenizer": str(tokenizer)})
    command = [sys.executable, "-m", "hosfl_client.apart"]
    # Else -m would import from the folder that the client is started in before all others; Python 3.10 still does.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, input=told.encode(), capture_output=True, check=False, env=environment)
    if done.returncode == REFUSED:
        raise DataError(done.stderr.decode(errors="replace").strip())
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise DataError(f"--data: {path} could not be tokenized ({why[0]:.200})")
    with np.load(io.BytesIO(done.stdout), allow_pickle=False) as held:
        values, labels = (_split(held[name], held[f"{name}_ends"]) for name in ("values", "labels"))
    per_token = settings.kind != "labelled"
    return [Example(row, label if per_token else label[0]) for row, label in zip(values, labels)]


def _split(flat: Array, ends: Array) -> list[Array]:
    return np.split(flat, ends[:-1])


def _joined(rows: Sequence[Array]) -> tuple[Array, Array]:
    """The rows behind each other, int32, and where each ends."""
    return np.concatenate([row.reshape(-1) for row in rows]).astype(np.int32), np.cumsum([row.size for row in rows])


def main() -> None:
    """The child."""
    from hosfl_client.text import Text

    told = json.load(sys.stdin)
    try:
        settings = DataSettings(**told["settings"])
        found = read_examples(Path(told["path"]), settings, Text(told["tokenizer"]))
    except DataError as error:
        print(error, file=sys.stderr)
        raise SystemExit(REFUSED) from None
    (values, values_ends), (labels, labels_ends) = (_joined(rows) for rows in zip(*found))
    np.savez(sys.stdout.buffer, values=values, values_ends=values_ends, labels=labels, labels_ends=labels_ends)


if __name__ == "__main__":
    main()
