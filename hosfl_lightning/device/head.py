"""The head that a client of a run with ``labels: client`` has, as `hosfl_client.head_file` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hosfl_lightning.models import SplitModule
from hosfl_lightning.models.halves import HEAD
from hosfl_lightning.split.closed_form import ACTIVATIONS, Activation, Norm


def head_of(model: SplitModule) -> dict[str, Tensor]:
    """What is trained of it, by its name among the client's parameters; nothing where the server has the head."""
    return {name: p.detach() for name, p in model.client_parameters.items() if name.startswith(HEAD)}


def described(model: SplitModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest's ``head``, but for its file, and the arrays that are not trained, fp32, by their names in it."""
    head: Any = model.client_head
    names = {id(p): name for name, p in model.client_parameters.items() if name.startswith(HEAD)}
    frozen = {name: p for name, p in head.named_parameters() if id(p) not in names}
    names |= {id(p): name for name, p in frozen.items()}
    used: dict[str, Tensor] = {}

    def named(p: Any) -> str | None:
        if p is None:
            return None
        name = names[id(p)]
        if name in frozen:
            used[name] = p.detach().float().cpu().contiguous()
        return name

    def dense(of: Any) -> dict[str, Any]:
        low = None if of.low is None else [named(of.low[0]), named(of.low[1]), float(of.low[2])]
        return {"kind": "dense", "weight": named(of.weight), "bias": named(of.bias), "low": low}

    def step(of: Any) -> Mapping[str, Any]:
        if isinstance(of, Norm):
            kind = {"eps": float(of.eps), "centred": of.centred, "offset": float(of.offset)}
            return {"kind": "norm", "weight": named(of.weight), "bias": named(of.bias), **kind}
        if isinstance(of, Activation):
            return {"kind": "activation", "name": next(name for name, a in ACTIVATIONS.items() if a is of)}
        return dense(of)

    closed = head.closed
    output = {"linear": dense(closed.output.linear), "scale": float(closed.output.scale), "cap": closed.output.cap}
    return {"place": closed.place, "steps": [*map(step, closed.steps)], "output": output}, used
