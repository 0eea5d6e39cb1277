from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.algorithms import SplitFedSGD
from hosfl_lightning.callbacks import LagrangianUpdate, RandomSigns
from hosfl_lightning.optim import SGD, RandomSubset, Uncompressed
from hosfl_lightning.server import Server
from hosfl_lightning.split import Lora, LoraHalf, Side
from hosfl_lightning.wire import ProjectedGradients
from tests.callbacks.drop_in.plain_modules import fit, hybrid, mlp
from tests.conftest import RandomTokens
from tests.small_run import SmallRun, contents

pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe")  # of so small a model is crooked

Answers = dict[tuple[int, int], Tensor]
Run = Callable[..., Answers]

SIDE = {"side": Side(4), "lora": Lora(client=None, server=LoraHalf(r=4, target_modules="all-linear"))}
#: A method that stands still, so that with and without signs the answers are to the same questions.
METHODS: dict[str, tuple[HOSFL, dict[str, Any]]] = {
    "probes": (HOSFL(probes=12, client_optimizer=SGD(lr=0)), {}),
    "dense": (HOSFL(estimator="local", compression=Uncompressed(), client_optimizer=SGD(lr=0)), SIDE),
    "subset": (HOSFL(estimator="local", compression=RandomSubset(64), client_optimizer=SGD(lr=0)), SIDE),
}


@pytest.fixture
def answers(
    make_model: Callable[..., SplitCausalLM],
    make_orchestrator: Callable[..., Orchestrator],
    data: RandomTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """What the clients of a run answer, by round and client."""

    def run(name: str = "dense", callback: LagrangianUpdate | None = None, **settings: Any) -> Answers:
        method, of_model = METHODS[name]
        seen: Answers = {}
        screened = Server.screen

        def watched(self: Server, *given: Any) -> list[ProjectedGradients]:
            taken = screened(self, *given)
            if self is trainer.server:  # and not the one that the memory monitor rehearses with
                seen.update({(one.round, one.client): one.coefficients for one in taken})
            return taken

        with monkeypatch.context() as patch:
            patch.setattr(Server, "screen", watched)
            trainer = make_orchestrator(method, callbacks=[callback or LagrangianUpdate()], **settings)
            trainer.fit(make_model(optimizer=still, **of_model), data)
        return seen

    return run


def still(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0)


@pytest.mark.parametrize("name", METHODS)
def test_magnitudes_stay_and_half_of_the_signs_turn(answers: Run, name: str) -> None:
    told, turned = answers(name), answers(name, RandomSigns())
    assert told.keys() == turned.keys() == {(r, k) for r in range(3) for k in range(3)}
    kept: list[float] = []
    for at, values in told.items():
        torch.testing.assert_close(turned[at].abs(), values.abs(), rtol=0, atol=0)
        moves = values != 0  # of a bottleneck whose `up` is zero, half of the gradient is
        kept += (turned[at] == values)[moves].tolist()
    assert len(kept) >= 100
    assert abs(sum(kept) / len(kept) - 0.5) < 4 * 0.5 / math.sqrt(len(kept))


def test_signs_are_those_of_the_seeds_the_round_and_the_client(answers: Run) -> None:
    def signs(callback: RandomSigns, **settings: Any) -> dict[tuple[int, int], list[bool]]:
        told, turned = answers(**settings), answers(callback=callback, **settings)
        return {at: (told[at] * turned[at] > 0).tolist() for at in told}

    first = signs(RandomSigns())
    others = [signs(RandomSigns(seed=1)), signs(RandomSigns(), seed=5)]
    patterns = [tuple(one) for run in (first, *others) for one in run.values()]
    assert len(set(patterns)) == len(patterns) == 27
    assert signs(RandomSigns(), simulation="per_client") == first


def test_killed_and_resumed_is_never_killed(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    random = torch.get_rng_state()
    run.fit(RandomSigns())
    assert torch.equal(torch.get_rng_state(), random)
    files = contents(run.folder)
    shutil.rmtree(run.folder)
    run.fit(RandomSigns(), max_rounds=2)
    run.fit(RandomSigns(), ckpt_path=run.folder)
    assert contents(run.folder) == files


def test_a_method_without_the_step_refuses_it(make_orchestrator: Callable[..., Orchestrator]) -> None:
    with pytest.raises(ValueError, match="SplitFedSGD has no step for RandomSigns; remove it"):
        make_orchestrator(SplitFedSGD(), callbacks=[RandomSigns()])


@pytest.mark.parametrize("others", [[], [hybrid()]], ids=["alone", "with HybridOrder"])
def test_a_plain_trainer_is_refused(others: list[Callback]) -> None:
    with pytest.raises(ValueError, match="RandomSigns works on the rounds of an Orchestrator; remove it"):
        fit(mlp(), *others, RandomSigns())
