"""What an endpoint says that it needs of a model is what it takes."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from lightning.fabric import Fabric

from hosfl_lightning import HOSFL
from hosfl_lightning.clients import Endpoint, Minibatches
from hosfl_lightning.split import SplitError
from hosfl_lightning.wire import Codecs
from tests.fleet.pipe_client import LENGTHS, model_of
from tests.fleet.test_pipe import CASES as BEHIND_A_PIPE
from tests.fleet.test_pipe import Case, common

#: With one whose server cannot evaluate what it does not hold.
CASES = BEHIND_A_PIPE | {"personal": Case(lambda: HOSFL(personal=True, **common()))}


@pytest.mark.parametrize("name", CASES)
def test_who_needs_half_is_made_of_half_and_who_needs_the_whole_is_not(name: str, tiny_folder: Path) -> None:
    case = CASES[name]
    algorithm, recipe = case.algorithm(), case.recipe
    terms = algorithm.terms(model_of(str(tiny_folder), **recipe), 0, Codecs(), clients=len(LENGTHS))
    alone, fabric = model_of(str(tiny_folder), part="client", **recipe), Fabric(accelerator="cpu", devices=1)
    if algorithm.endpoint.needs == "half":
        assert type(Endpoint.of(alone, Minibatches(None, alone), terms, fabric)) is algorithm.endpoint
        return
    with pytest.raises(SplitError, match=r"model.init_args.part: client"):
        Endpoint.of(alone, Minibatches(None, alone), terms, fabric)


def test_all_endpoints_of_the_package_are_among_them() -> None:
    here = {
        k for k in Endpoint.known.values() if k.__module__.startswith("hosfl_lightning.") and not inspect.isabstract(k)
    }
    assert here == {case.algorithm().endpoint for case in CASES.values()}
    assert {kind.__name__ for kind in here if kind.needs == "whole"} == {
        "WholeEndpoint", "WalkEndpoint", "AuxiliaryEndpoint", "SphereEndpoint",
    }  # fmt: skip
