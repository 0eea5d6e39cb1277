"""What a server says of its settings before it listens."""

from __future__ import annotations

import pytest

from hosfl_lightning import Orchestrator
from hosfl_lightning.algorithms import HOSFL, FedAvg
from hosfl_lightning.clients.own_state import KEPT
from hosfl_lightning.run.serve import _check
from hosfl_lightning.run.serving import Serving


def test_checkpoints_that_are_further_apart_than_moments_are_kept_are_named() -> None:
    serving = Serving("127.0.0.1:0", "clients.yaml", insecure=True)
    with pytest.warns(UserWarning, match=f"val_check_interval is {KEPT + 1}, .* FedAvg keep their moments of {KEPT}"):
        _check(Orchestrator(FedAvg(), val_check_interval=KEPT + 1, logger=False), serving)
    _check(Orchestrator(FedAvg(), val_check_interval=KEPT, logger=False), serving)
    _check(Orchestrator(HOSFL(), val_check_interval=KEPT + 1, logger=False), serving)
