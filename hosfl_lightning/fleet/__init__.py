"""Where the clients are: all that the server knows of them, behind `ask` and `tell`."""

from hosfl_lightning.fleet.absentees import Absentees
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.fleet.channel import Channel, Sent
from hosfl_lightning.fleet.local import LocalFleet
from hosfl_lightning.fleet.processes import Processes
from hosfl_lightning.fleet.ranks import LostProcessError, RankProcesses, Ranks

__all__ = [
    "Absentees",
    "Channel",
    "Fleet",
    "LocalFleet",
    "LostProcessError",
    "Processes",
    "RankProcesses",
    "Ranks",
    "Sent",
]
