"""Lightning loggers that a resumed run can go on with."""

from hosfl_lightning.loggers.csv import CSVLogger

__all__ = ["CSVLogger"]
