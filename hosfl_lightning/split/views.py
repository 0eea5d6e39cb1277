"""Second modules over the same parameters, and running a model without leaving a trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)


def view(module: Model) -> Model:
    """A second module over the same parameters and children, whose children and hooks can be changed freely."""
    twin = copy.copy(module)
    for key, value in vars(module).items():
        if key in ("_parameters", "_buffers", "_modules") or (key.endswith("_hooks") and isinstance(value, dict)):
            twin.__dict__[key] = copy.copy(value)
    return twin


def view_of_path(model: Model, path: str) -> Model:
    """A view of ``model`` in which every module down to ``path`` is a view too."""
    twin = view(model)
    name, _, rest = path.partition(".")
    child = twin._modules[name]
    assert child is not None
    twin._modules[name] = view_of_path(child, rest) if rest else view(child)
    return twin


def has_parameters(module: nn.Module) -> bool:
    """Whether there is any parameter in it."""
    return next(module.parameters(), None) is not None


def own_buffers(module: nn.Module) -> nn.Module:
    """A view all the way down, so that a half on another device moves its own rotary tables only."""
    twin = view(module)
    for name, child in module.named_children():
        twin._modules[name] = own_buffers(child)
    return twin


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule with that dotted name."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The token embeddings, (V, h)."""
    return cast(Tensor, model.get_input_embeddings().weight)


@contextmanager
def quiet(*modules: nn.Module) -> Iterator[None]:
    """No dropout and no autograd inside; every module's mode and the random states come back after."""
    modes = [(m, m.training) for module in modules for m in module.modules()]
    devices = {p.device for module in modules for p in module.parameters() if p.is_cuda}
    try:
        for m, _ in modes:
            m.training = False
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


@contextmanager
def padding_token(model: PreTrainedModel, token: int | None) -> Iterator[None]:
    """Another padding token in the model's config while inside: some forwards read it."""
    settings = vars(model.config.get_text_config())  # no validation: some configs refuse None
    given = settings.get("pad_token_id")
    try:
        settings["pad_token_id"] = token
        yield
    finally:
        settings["pad_token_id"] = given
