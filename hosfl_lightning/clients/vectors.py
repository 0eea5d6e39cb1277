"""What is trained as one vector, and as the message that carries it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hosfl_lightning.wire import Weights


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """The tensors one after the other, ``(d,)`` fp32, a copy on the host, where the clients' answers meet."""
    return torch.cat([tensor.detach().reshape(-1).float().cpu() for tensor in tensors])


def parts(vector: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    """What `flat` has put together, in the shapes of ``like``."""
    shapes = list(like)
    return [values.view_as(one) for values, one in zip(vector.split([one.numel() for one in shapes]), shapes)]


@torch.no_grad()
def load(vector: Tensor, trained: Mapping[str, nn.Parameter]) -> None:
    """Put a `flat` vector in the place of what is trained."""
    for parameter, values in zip(trained.values(), parts(vector, trained.values())):
        parameter.copy_(values)
    torch.clear_autocast_cache()


def message(trained: Mapping[str, Tensor], vector: Tensor, round: int, client: int, **fields: Any) -> Weights:
    """A `flat` vector in the dtypes in which the clients hold what it is of; ``fields`` are those of `Weights`."""
    named = zip(trained.items(), parts(vector, trained.values()))
    return Weights(round, client, {name: values.to(p.dtype) for (name, p), values in named}, **fields)


def content(weights: Weights, trained: Mapping[str, Tensor]) -> Tensor:
    """The `flat` vector of a `message`, whose names may come in another order."""
    return flat(weights.tensors[name] for name in trained)
