"""What a client on a machine of its own keeps on its disk, each file whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

State = dict[str, Any]
"""Arrays of some engine by name."""
#: States of its own that a client keeps: so many of its rounds may a server go back.
KEPT = 32


class Storage(Protocol):
    """How an engine's arrays are bytes, and how bytes get onto the disk."""

    def dump(self, state: Mapping[str, Any], metadata: dict[str, str]) -> bytes:
        """A safetensors file."""

    def load(self, data: bytes) -> State:
        """The arrays of a safetensors file; SafetensorError, ValueError: it is none."""

    def write(self, path: Path, data: bytes) -> None:
        """A file that is there whole or not at all, durably."""


class OwnState:
    """A folder of one client.

    | file | holds |
    |---|---|
    | ``shared.safetensors`` | what all clients hold after some update: θ_c and the rule's moments |
    | ``own_<round>_<attempt>.safetensors`` | what this client alone holds after its part in a round: its moments |

    The second is written before the client's last answer of the round, and counts once the server says so.

    Args:
        folder: Made when it is not there.
        storage: Of its engine.
        discard: Deletes a file; one that is not there is no error.

    Raises:
        ValueError: The folder cannot be made, or not be written in.
    """

    def __init__(
        self, folder: str | os.PathLike[str], storage: Storage, discard: Callable[[Path], None] | None = None
    ) -> None:
        self.folder, self.storage = Path(folder), storage
        self.discard = discard or (lambda path: path.unlink(missing_ok=True))
        self._make()

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):  # else it is noticed after the first updates
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise ValueError(
                f"--state: {self.folder}: {error.strerror}; give a folder in which this client can write"
            ) from error

    def save_shared(self, state: Mapping[str, Any], run_id: bytes, version: int, incarnation: str) -> None:
        """After ``version`` updates."""
        note = {"run_id": run_id.hex(), "version": version, "incarnation": incarnation}
        self._write(self.folder / "shared.safetensors", state, note)

    def shared(self, run_id: bytes) -> tuple[State, int, str] | None:
        """State, version and incarnation; None: there is none of this run."""
        found = self._read(self.folder / "shared.safetensors")
        if found is None or found[1].get("run_id") != run_id.hex():
            return None
        state, note = found
        return state, int(note["version"]), str(note["incarnation"])

    def save_own(self, state: Mapping[str, Any], run_id: bytes, place: tuple[int, int]) -> None:
        """After the client's part in a round, at some attempt."""
        self._write(self._own(place), state, {"run_id": run_id.hex()})
        # Not by round: another run, or this one before its server went back, may have left files of later ones.
        files = self.folder.glob("own_*.safetensors")
        for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, _place_of(file)))[:-KEPT]:
            self.discard(file)

    def own(self, run_id: bytes, place: tuple[int, int]) -> State | None:
        """As it was saved; None: there is none of this run and place."""
        found = self._read(self._own(place))
        return found[0] if found is not None and found[1].get("run_id") == run_id.hex() else None

    def _own(self, place: tuple[int, int]) -> Path:
        return self.folder / f"own_{place[0]}_{place[1]}.safetensors"

    def _write(self, path: Path, state: Mapping[str, Any], note: dict[str, Any]) -> None:
        self.storage.write(path, self.storage.dump(state, {"note": json.dumps(note)}))

    def _read(self, path: Path) -> tuple[State, dict[str, Any]] | None:
        """What a file holds; one that cannot be read is named and passed over."""
        if not path.is_file():
            return None
        try:
            data = path.read_bytes()
            arrays = self.storage.load(data)
            (length,) = struct.unpack("<Q", data[:8])
            note = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["note"])
            return arrays, {"version": 0, "incarnation": "", **note}
        except (SafetensorError, ValueError, KeyError, TypeError, struct.error) as error:
            warnings.warn(f"{path} is no state that can be read ({error}); it is passed over", stacklevel=2)
            return None


def _place_of(path: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in path.stem.split("_")[1:] if part.isdecimal())
