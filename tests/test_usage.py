"""``hosfl --help``: every command, at once."""

from __future__ import annotations

import subprocess
import sys

from hosfl_lightning.cli import COMMANDS
from hosfl_lightning.usage import GROUPS, WIDTH, usage


def test_every_command_is_there() -> None:
    named = [name for commands in GROUPS.values() for name in commands]
    assert sorted(named) == sorted(COMMANDS)
    lines = usage().splitlines()
    assert all(any(line.startswith(f"  {name} ") for line in lines) for name in COMMANDS)
    assert max(map(len, lines)) <= WIDTH


def test_it_waits_for_no_library() -> None:
    code = "import sys; from hosfl_lightning.cli import main; main(['--help']); print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith(usage())
    assert not {"torch", "lightning", "transformers", "jsonargparse"} & set(told.splitlines()[-1].split())
