"""What a recipe may set of each method: arguments are handed up by ``**kwargs``, and none may be lost on the way."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentParser

from hosfl_lightning import algorithms
from hosfl_lightning.algorithms import Algorithm
from hosfl_lightning.optim import SGD

ALL = {"client_optimizer", "client_scheduler", "aggregation"}
PROBES = {"probes", "mu", "distribution"}
LOCAL = {"local_steps", "checkpointing"}
HEAD = {"upload_every", "auxiliary_blocks"}
ARGUMENTS = {
    "CSEFSL": ALL | LOCAL | HEAD,
    "FSLSAGE": ALL | LOCAL | HEAD | {"align_every", "align_steps", "align_lr"},
    "FedAvg": ALL | LOCAL,
    "Frozen": ALL | {"report_loss"},
    "HERONSFL": ALL | HEAD | {"local_steps", "probes", "mu", "scalars"},
    "HOSFL": ALL
    | PROBES
    | {"estimator", "first_order_optimizer", "compression", "taps", "personal", "report_loss"}
    | {"probe_batch", "directions"},
    "HOSL": ALL | PROBES,
    "MUSplitFed": ALL | PROBES | {"server_steps", "global_lr", "server_optimizer"},
    "MixedHOSFL": ALL | {"report_loss", "clients", "mu", "estimator", "distribution", "checkpointing"},
    "SplitFedSGD": ALL | {"report_loss", "checkpointing", "personal"},
    "SplitFedV1": ALL | LOCAL,
    "SplitFedV2": ALL | LOCAL,
    "SplitLearning": (ALL - {"aggregation"}) | LOCAL,
    "ZOFL": ALL | PROBES | {"estimator", "local_steps"},
    "ZOSFL": ALL | PROBES | {"server_optimizer"},
}


def test_every_method_is_here() -> None:
    named = {name for name in algorithms.__all__ if isinstance(kind := getattr(algorithms, name), type)
             and issubclass(kind, Algorithm)}  # fmt: skip
    assert named - {"Algorithm"} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ["HOSFL", "ZOSFL", "ZOFL", "MUSplitFed", "MixedHOSFL"])
def test_an_optimizer_in_a_place_it_does_not_have_is_no_other_setting(name: str) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        getattr(algorithms, name)(2, 1e-3, "forward", "rademacher", SGD())


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_may_be_set(name: str) -> None:
    parser = ArgumentParser()
    found = parser.add_class_arguments(getattr(algorithms, name), "a")
    assert {argument.removeprefix("a.") for argument in found} == ARGUMENTS[name]
