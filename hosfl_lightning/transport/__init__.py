"""How messages reach the other side."""

from hosfl_lightning.transport.in_process import InProcess, Sent
from hosfl_lightning.transport.ranks import LostProcessError, Ranks

__all__ = ["InProcess", "LostProcessError", "Ranks", "Sent"]
