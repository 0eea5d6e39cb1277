"""What a client holds, and how it catches up: it replays the updates that it missed, or takes a snapshot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor, nn

from hosfl_client.refusals import CatchUpError
from hosfl_lightning.optim import ZerothOrder

State = dict[str, Tensor]


def client_state(optimizer: ZerothOrder, copy: bool = False) -> State:
    """θ_c and the optimizer's moments, ``number.theta`` and ``number.slot``: all that a client needs to go on."""
    held: State = {}
    for number, parameter in enumerate(optimizer.parameters):
        slots = {"theta": parameter.detach(), **optimizer.state.get(parameter, {})}
        held |= {f"{number}.{slot}": t.to("cpu", copy=True) if copy else t for slot, t in slots.items()}
    return held


def sized_state(optimizer: ZerothOrder) -> State:
    """What `client_state` gives after the first step, without its values or their memory."""
    slots = optimizer.rule.slots(optimizer.param_groups[0])
    held: State = {}
    for number, p in enumerate(optimizer.parameters):
        held[f"{number}.theta"] = torch.empty_like(p, device="meta")
        held |= {f"{number}.{slot}": torch.empty(p.numel(), dtype=torch.float32, device="meta") for slot in slots}
    return held


def replica_of(optimizer: ZerothOrder, state: Mapping[str, Tensor], step: int) -> ZerothOrder:
    """An optimizer over tensors of its own, with another's rule and seed, at ``state`` after ``step`` updates."""
    parameters = [nn.Parameter(torch.empty_like(p), requires_grad=False) for p in optimizer.parameters]
    replica = ZerothOrder(parameters, optimizer.rule, seed=optimizer.param_groups[0]["seed"])
    replica.param_groups[0]["step"] = step
    for name, tensor in state.items():
        number, _, slot = name.partition(".")
        parameter = parameters[int(number)]
        if slot == "theta":
            parameter.copy_(tensor)
        else:
            replica.state[parameter][slot] = tensor.to(parameter.device, copy=True)
    return replica


def load_state(optimizer: ZerothOrder, state: Mapping[str, Tensor], step: int) -> None:
    """Go on from a `client_state` after ``step`` updates.

    Raises:
        CatchUpError: It is of other tensors. Nothing has moved then.
    """
    expected = sized_state(optimizer)
    theta = {name for name in expected if name.endswith(".theta")}
    if not theta <= state.keys() <= expected.keys():
        raise CatchUpError(f"a state of {len(state)} tensors, this client trains {len(theta)}, or with another rule")
    for name, tensor in state.items():
        mine = expected[name]
        if tensor.shape != mine.shape or tensor.dtype != mine.dtype:
            raise CatchUpError(f"a state whose tensor {name} is {tensor.dtype} {[*tensor.shape]}, not that of the run")
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["step"] = step
    with torch.no_grad():
        for name, tensor in state.items():
            number, _, slot = name.partition(".")
            parameter = optimizer.parameters[int(number)]
            if slot == "theta":
                parameter.copy_(tensor)
            else:
                optimizer.state[parameter][slot] = tensor.to(parameter.device, copy=True)
    torch.clear_autocast_cache()


def state_digest(optimizer: ZerothOrder) -> str:
    """SHA-256 of the step count and of the bits of a `client_state`: what clients that are up to date agree on."""
    total = sha256(json.dumps(optimizer.steps).encode())
    for name, tensor in sorted(client_state(optimizer).items()):
        total.update(name.encode())
        total.update(_bits(tensor.cpu()).numpy().data)
    return total.hexdigest()


def same_state(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two clients hold the same bits."""
    return a.keys() == b.keys() and all(torch.equal(_bits(a[name]), _bits(b[name].to(a[name].device))) for name in a)


def _bits(tensor: Tensor) -> Tensor:
    # As bytes: −0 is not 0, and a NaN equals itself.
    return tensor.contiguous().view(-1).view(torch.uint8)
