"""Old module names work, and say the new one."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

import hosfl_lightning
from hosfl_lightning.models import SplitCausalLM
from hosfl_lightning.moved import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_name_is_the_module_of_today(old: str) -> None:
    sys.modules.pop(f"hosfl_lightning.{old}", None)
    with pytest.warns(FutureWarning, match=f"hosfl_lightning.{old} is now hosfl_lightning.{MOVED[old]}"):
        module = import_module(f"hosfl_lightning.{old}")
    assert module is import_module(f"hosfl_lightning.{MOVED[old]}")
    assert module.__spec__ is not None
    assert module.__spec__.name == module.__name__ == f"hosfl_lightning.{MOVED[old]}"


def test_a_recipe_of_before_names_a_class_that_is_found() -> None:
    """Run folders hold full class paths, such as this one."""
    sys.modules.pop("hosfl_lightning.servers.causal_lm", None)
    with pytest.warns(FutureWarning, match="is now hosfl_lightning.models"):
        assert import_module("hosfl_lightning.servers.causal_lm").SplitCausalLM is SplitCausalLM


def test_no_name_is_old_and_new() -> None:
    new = {name.split(".")[0] for name in MOVED.values()}
    assert not new & MOVED.keys()


def test_the_face_names_what_it_has() -> None:
    for name in hosfl_lightning.__all__:
        assert getattr(hosfl_lightning, name)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        hosfl_lightning.Nothing  # noqa: B018
