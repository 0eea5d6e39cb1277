"""The server's side of a round."""

from hosfl_lightning.server.call import Call, Outcome
from hosfl_lightning.server.catch_up import CatchUp, Records
from hosfl_lightning.server.descent import Descent
from hosfl_lightning.server.inbox import Inbox
from hosfl_lightning.server.replica import Replica
from hosfl_lightning.server.server import Server, TooFewClientsError
from hosfl_lightning.server.watching import RoundWatcher

__all__ = [
    "Call",
    "CatchUp",
    "Descent",
    "Inbox",
    "Outcome",
    "Records",
    "Replica",
    "RoundWatcher",
    "Server",
    "TooFewClientsError",
]
