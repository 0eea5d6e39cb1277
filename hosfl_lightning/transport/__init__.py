"""How messages reach the other side."""

from hosfl_lightning.transport.in_process import InProcess, Sent

__all__ = ["InProcess", "Sent"]
