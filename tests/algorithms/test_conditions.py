"""What a method may be run beside, and what a round that breaks off leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning.algorithms import (
    CSEFSL,
    HERONSFL,
    HOSFL,
    HOSL,
    ZOFL,
    ZOSFL,
    Algorithm,
    FedAvg,
    Frozen,
    SplitFedSGD,
    SplitFedV1,
    SplitFedV2,
    SplitLearning,
)
from hosfl_lightning.availability import Trace
from hosfl_lightning.optim import SGD
from hosfl_lightning.run.divergence import DivergedError
from tests.algorithms.two_layers import Points, TwoLayers, orchestrator, sgd
from tests.small_run import plain


def model(**settings: Any) -> TwoLayers:
    return TwoLayers(client_holds="whole", **settings)


@pytest.mark.parametrize("kind", [FedAvg, SplitFedV1, SplitFedV2, SplitLearning, ZOFL, ZOSFL])
def test_controls_beside_other_rounds_than_theirs_are_refused(kind: type[Algorithm], tmp_path: Path) -> None:
    trainer = orchestrator(kind(), tmp_path, controls=["frozen", "first_order"])
    with pytest.raises(ValueError, match=rf"trainer.controls: a round of {kind.__name__}"):
        trainer.fit(model(), Points())


@pytest.mark.parametrize("kind", [HOSFL, HOSL, SplitFedSGD, Frozen])
def test_controls_beside_rounds_like_theirs_run(kind: type[Algorithm], tmp_path: Path) -> None:
    trainer = orchestrator(kind(), tmp_path, controls=["frozen"], max_rounds=1)
    trainer.fit(model(), Points())
    assert list(trainer.summary["controls"]) == ["frozen"]


class TestAvailability:
    """Clients come and go, and no update is written down."""

    def run(self, algorithm: Algorithm, folder: Path) -> Any:
        trainer = orchestrator(algorithm, folder, replay_log=False, availability=Trace([[0, 1, 2], [1, 2, 3]]))
        trainer.fit(model(), Points())
        return trainer

    @pytest.mark.parametrize("algorithm", [FedAvg(), Frozen()])
    def test_needs_no_log_where_nothing_is_replayed(self, algorithm: Algorithm, tmp_path: Path) -> None:
        assert self.run(algorithm, tmp_path).global_step == 5

    @pytest.mark.parametrize("algorithm", [HOSFL(), ZOFL()])
    def test_needs_one_where_updates_are(self, algorithm: Algorithm, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="replays the log"):
            self.run(algorithm, tmp_path)

    def test_heron_is_either(self) -> None:
        assert not HERONSFL().records
        assert HERONSFL(scalars=True, client_optimizer=SGD()).records


@pytest.mark.parametrize("kind", [SplitFedV1, SplitFedV2, SplitLearning])
def test_a_round_that_breaks_off_leaves_both_halves_as_they_were(kind: type[Any], tmp_path: Path) -> None:
    """The server's first step makes its weights so large that the next multiplier is no number."""
    diverging = model(optimizer=sgd(3e38))
    start = plain({name: tensor.clone() for name, tensor in diverging.trained_state().items()})
    with pytest.raises(DivergedError, match="multiplier"):
        orchestrator(kind(SGD(lr=0.1), local_steps=2), tmp_path).fit(diverging, Points())
    assert plain(diverging.trained_state()) == start


def test_a_method_without_an_auxiliary_head_for_the_model_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="auxiliary_head"):
        orchestrator(CSEFSL(), tmp_path, logger=True).fit(model(), Points())
    assert not list(tmp_path.iterdir())
