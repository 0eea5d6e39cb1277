"""What a client on a machine of its own keeps on its disk, each file whole or not at all."""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from hosfl_lightning.files import discard, write_whole

State = dict[str, Tensor]
#: States of its own that a client keeps: so many of its rounds may a server go back.
KEPT = 32


class OwnState:
    """A folder of one client.

    | file | holds |
    |---|---|
    | ``shared.safetensors`` | what all clients hold after some update: θ_c and the rule's moments |
    | ``own_<round>_<attempt>.safetensors`` | what this client alone holds after its part in a round: its moments |

    The second is written before the client's last answer of the round, and counts once the server says so.

    Args:
        folder: Made when it is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def save_shared(self, state: Mapping[str, Tensor], run_id: bytes, version: int, incarnation: str) -> None:
        """After ``version`` updates."""
        note = {"run_id": run_id.hex(), "version": version, "incarnation": incarnation}
        _write(self.folder / "shared.safetensors", state, note)

    def shared(self, run_id: bytes) -> tuple[State, int, str] | None:
        """State, version and incarnation; None: there is none of this run."""
        found = _read(self.folder / "shared.safetensors")
        if found is None or found[1].get("run_id") != run_id.hex():
            return None
        state, note = found
        return state, int(note["version"]), str(note["incarnation"])

    def save_own(self, state: Mapping[str, Tensor], run_id: bytes, place: tuple[int, int]) -> None:
        """After the client's part in a round, at some attempt."""
        _write(self._own(place), state, {"run_id": run_id.hex()})
        # Not by round: another run, or this one before its server went back, may have left files of later ones.
        files = self.folder.glob("own_*.safetensors")
        for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, _place_of(file)))[:-KEPT]:
            discard(file)

    def own(self, run_id: bytes, place: tuple[int, int]) -> State | None:
        """As it was saved; None: there is none of this run and place."""
        found = _read(self._own(place))
        return found[0] if found is not None and found[1].get("run_id") == run_id.hex() else None

    def _own(self, place: tuple[int, int]) -> Path:
        return self.folder / f"own_{place[0]}_{place[1]}.safetensors"


def _place_of(path: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in path.stem.split("_")[1:] if part.isdecimal())


def _write(path: Path, state: Mapping[str, Tensor], note: dict[str, Any]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    data = safetensors.torch.save(tensors, metadata={"note": json.dumps(note)})
    write_whole(path, lambda file: file.write(data))


def _read(path: Path) -> tuple[State, dict[str, Any]] | None:
    """What a file holds; one that cannot be read is named and passed over."""
    if not path.is_file():
        return None
    try:
        data = path.read_bytes()
        tensors = safetensors.torch.load(data)
        (length,) = struct.unpack("<Q", data[:8])
        note = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["note"])
        return tensors, {"version": 0, "incarnation": "", **note}
    except (SafetensorError, ValueError, KeyError, TypeError, struct.error) as error:
        warnings.warn(f"{path} is no state that can be read ({error}); it is passed over", stacklevel=2)
        return None
