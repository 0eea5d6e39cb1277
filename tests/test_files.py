from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import pytest

from hosfl_lightning.files import write_whole


def test_what_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.bin"
    write_whole(path, lambda file: file.write(b"old"))

    def fails(file: BinaryIO) -> None:
        file.write(b"half of the new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fails)
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]
    write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
