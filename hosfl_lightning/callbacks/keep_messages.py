"""KeepMessages: what the server receives and sends, kept in the run folder for whoever wants to look."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from hosfl_lightning.callbacks.drop_in.trainer_check import refuse_no_rounds
from hosfl_lightning.files import discard, write_whole
from hosfl_lightning.wire import LIMIT, Message, WireError, decode, encode

#: In the run folder.
FOLDER = "messages"
_PREFIX = struct.Struct("<BQ")
_DIRECTIONS = ("up", "down")


class KeptError(ValueError):
    """Messages of a run are not there, or not as they were kept."""


class Kept(NamedTuple):
    """A message that crossed, of any kind: ``up`` to the server, or ``down`` from it."""

    direction: str
    message: Any


class KeepMessages(Callback):
    """Writes what crosses into ``RUN/messages``, the frames as they are on a wire, for `hosfl attack`.

    Who reads these files reads what the server does: z, and labels where they travel. A file a round and process,
    ``round_000000.0.frames``, whole or not at all: of each message ``u8 0 (up) or 1 (down) | u64 length | frame``. A
    round that would go over the limit is not kept, nor are those after it. The files are readable by their owner alone.
    What is counted and computed stays as it is.

    Example::

        trainer:
          callbacks:
            - class_path: hosfl_lightning.callbacks.KeepMessages

    Args:
        rounds: The first so many are kept.
        max_bytes: Of all files of a process together, in bytes.

    Raises:
        ValueError: A limit is not above 0; or at setup, in a Trainer without rounds.
    """

    def __init__(self, rounds: int = 2, max_bytes: int = 1 << 28) -> None:
        for name, value in (("rounds", rounds), ("max_bytes", max_bytes)):
            if value < 1:
                raise ValueError(f"KeepMessages: {name} must be above 0, got {value}")
        self.rounds, self.max_bytes = rounds, max_bytes
        self._frames: list[bytes] | None = None  # of the present round; None: no more are kept
        self._held = 0

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a plain Trainer."""
        refuse_no_rounds(type(self).__name__, trainer)

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to listen; what an earlier run, or a round that is run again, has left is discarded."""
        self._folder = Path(trainer.log_dir) / FOLDER
        self._ending = f".{trainer.global_rank}.frames"
        self._run_id = trainer.fleet.channel.run_id
        before = sorted(self._folder.glob(f"round_*{self._ending}"))
        for path in before[trainer.global_step :]:
            discard(path)
        self._held = sum(path.stat().st_size for path in before[: trainer.global_step])
        self._frames = [] if trainer.global_step < self.rounds else None
        trainer.fleet.channel.taps.append(self._take)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the round."""
        if self._frames is None:
            return
        frames, self._frames = self._frames, [] if batch_idx + 1 < self.rounds else None
        write_whole(
            self._folder / f"round_{batch_idx:06d}{self._ending}", lambda file: file.writelines(frames), mode=0o600
        )

    def _take(self, message: Message, direction: str) -> None:
        if self._frames is None:
            return
        frame = encode(message, self._run_id)
        self._held += _PREFIX.size + len(frame)
        if self._held > self.max_bytes:
            self._frames = None
            print(f"KeepMessages: round {message.round} goes over max_bytes={self.max_bytes:,}; it and the rounds "
                  "after it are not kept", flush=True)  # fmt: skip
            return
        self._frames.append(_PREFIX.pack(_DIRECTIONS.index(direction), len(frame)) + frame)


def kept_rounds(run: Path, run_id: bytes | None = None) -> Iterator[tuple[int, list[Kept]]]:
    """The messages of each kept round, in the order of the rounds; within one in that of the processes, and of time.

    Args:
        run: The run's folder.
        run_id: That every frame must carry; None: any.

    Raises:
        KeptError: None were kept, or a file is damaged.
    """
    files = sorted((run / FOLDER).glob("round_*.frames"))
    if not files:
        raise KeptError(
            f"{run} has no {FOLDER}: they were not kept. Run it anew with trainer.callbacks: "
            "- class_path: hosfl_lightning.callbacks.KeepMessages"
        )
    for number in sorted({file.name.split(".")[0] for file in files}):
        held = [one for file in files if file.name.startswith(f"{number}.") for one in _read(file, run_id)]
        yield int(number.removeprefix("round_")), held


def _read(path: Path, run_id: bytes | None) -> Iterator[Kept]:
    data, place = path.read_bytes(), 0
    while place < len(data):
        try:
            direction, length = _PREFIX.unpack_from(data, place)
            place += _PREFIX.size
            frame = data[place : place + length]
            yield Kept(_DIRECTIONS[direction], decode(frame, run_id=run_id, limit=max(LIMIT, len(frame))))
        except (struct.error, IndexError, WireError) as error:
            raise KeptError(f"{path}: at byte {place} there is no message of this run ({error})") from error
        place += length
