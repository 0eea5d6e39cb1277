"""The closed form of a model's head: read off one tiny forward, and checked against the model's own autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hosfl_lightning.split.closed_form import (
    ACTIVATIONS,
    IGNORE,
    Activation,
    ClosedHead,
    Dense,
    Norm,
    Output,
    Place,
    Step,
    places,
)
from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.halves import ServerHalf
from hosfl_lightning.split.labelled import CLOSE
from hosfl_lightning.split.side import ADAPTER
from hosfl_lightning.split.views import quiet

Loss = Callable[[Tensor, Tensor], Tensor]
#: How far a closed form may be from autograd, by the largest value, where logits have few bits; see `CLOSE`.
ROUGH = 0.1
#: Of rows of z₂: a small one shows what ε is, and a large one that it is small.
SIZES = (1.0, 0.01, 30.0)
#: What the last linear layer is made to return, to see what its values become: small, large, and both signs.
PROBES = (2.0**-10, 2.0**30, 1.0, -3.0, 20.0, -75.0)


def closed_form(head: ServerHalf, loss: Loss) -> ClosedHead:
    """Norms, linear layers, activations, pooling, scale and soft cap of a head, in closed form.

    Args:
        head: from z₂, the hidden state before the final norm, to logits.
        loss: of logits and labels; it must be the mean cross entropy, of the next token where logits are by token.

    Raises:
        SplitError: it has none that this package knows, or one that is not equal to autograd.
    """
    z, mask = _tiny(head)
    with quiet(head):
        calls, logits = _record(head, z, mask)
        place, steps = _chain(head, calls, z, mask, by_token=logits.ndim == 3)
        linear = steps[-1]
        if not isinstance(linear, Dense):
            raise refused(head, f"it ends in {type(calls[-1][0]).__name__}, not in a linear layer")
        scale, cap = _squash(head, calls[-1][0], linear, z, mask)
    found = ClosedHead(place, tuple(steps[:-1]), Output(linear, scale, cap))
    _check(head, found, loss, z, mask)
    return found


def refused(head: Any, why: str) -> SplitError:
    """The error of a head that a client cannot differentiate."""
    name = getattr(head, "architecture", type(head).__name__)
    return SplitError(
        f"model.init_args.labels=client: the head of {name} has no closed form here ({why}), and a client keeps no "
        "graph; set labels to server, or take a model whose head is a norm and linear layers"
    )


Call = tuple[nn.Module, Tensor, Tensor]


def _tiny(head: ServerHalf) -> tuple[Tensor, Tensor]:
    weight = next(p for p in head.parameters() if p.is_floating_point())
    z = torch.randn(3, 4, head.hidden_size, generator=torch.Generator().manual_seed(0))
    z *= torch.tensor(SIZES)[:, None, None]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    return z.to(weight.device, weight.dtype), mask.to(weight.device)


def _record(head: ServerHalf, z: Tensor, mask: Tensor) -> tuple[list[Call], Tensor]:
    """What the modules that compute something are given and return after z₂ is in, in order; and the logits."""
    calls: list[Call] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        calls.append((module, args[0], output))

    entry = head.get_submodule(f"{head.layer_path.path}.{head.cut - 1}")
    lora = [m for m in head.modules() if isinstance(m, LoraLayer)]
    inside = {id(part) for one in lora for part in one.modules()}
    modules = [m for m in head.modules() if _computes(m) and id(m) not in inside] + lora
    handles = [m.register_forward_hook(keep) for m in modules]
    handles.append(entry.register_forward_hook(lambda *_: calls.clear()))
    try:
        logits = head(z, mask)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise refused(head, "nothing in it has parameters")
    return calls, logits


def _computes(module: nn.Module) -> bool:
    own = next(module.parameters(recurse=False), None) is not None
    return own or ("norm" in type(module).__name__.lower() and not list(module.children()))


def _chain(
    head: ServerHalf, calls: Sequence[Call], z: Tensor, mask: Tensor, by_token: bool
) -> tuple[Place, list[Step]]:
    """Steps that lead from z₂ through all calls, and which positions they read."""
    found: Place | None = None
    steps: list[Step] = []
    given = z
    for module, wanted, output in calls:
        place, activation = _between(head, module, given, wanted, mask)
        found = place or found
        steps += [activation] if activation else []
        steps.append(_step(head, module, wanted, output))
        given = output
    if given.ndim == 2:
        return found or "first", steps
    return "every" if by_token else "last", steps  # _check finds a pooling of logits that is another


def _between(
    head: ServerHalf, module: nn.Module, given: Tensor, wanted: Tensor, mask: Tensor
) -> tuple[Place | None, Activation | None]:
    """Which positions of ``given``, all with None, and what of their values a module is given."""
    pooled: dict[Place | None, Tensor] = {None: given}
    if given.ndim == 3 and wanted.ndim == 2:
        pooled = {place: given.flatten(0, 1)[places(place, given, mask)] for place in ("first", "last")}
    fits = [
        (distance(activation(rows) if activation else rows, wanted), place, activation)
        for place, rows in pooled.items()
        for activation in (None, *ACTIVATIONS.values())
    ]
    best, place, activation = min(fits, key=lambda fit: fit[0])
    if best > _bound(wanted):
        raise refused(head, f"what leads to its {type(module).__name__} is none of {', '.join(ACTIVATIONS)}")
    return place, activation


def _step(head: ServerHalf, module: nn.Module, given: Tensor, output: Tensor) -> Step:
    weight, bias = (cast(nn.Parameter | None, getattr(module, name, None)) for name in ("weight", "bias"))
    if type(module) is nn.Linear:
        return Dense(cast(nn.Parameter, weight), bias)
    if type(module) is LoraLinear and [*module.lora_A] == [ADAPTER] and not module.lora_variant:
        a, b = (cast(nn.Parameter, one[ADAPTER].weight) for one in (module.lora_A, module.lora_B))
        return Dense(cast(nn.Parameter, weight), bias, (a, b, module.scaling[ADAPTER]))
    x = given.to(torch.promote_types(given.dtype, torch.float32))
    eps = next((getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name)), None)
    if eps is not None and (weight is None or weight.shape == given.shape[-1:]):
        norms = [Norm(weight, bias, eps, *kind) for kind in product((False, True), (0.0, 1.0))]
        best = min(norms, key=lambda norm: distance(norm(x), output))
        if distance(best(x), output) <= _bound(output):
            return best
    raise refused(head, f"its {type(module).__name__} is no linear layer, LayerNorm or RMSNorm")


def _squash(head: ServerHalf, last: nn.Module, linear: Dense, z: Tensor, mask: Tensor) -> tuple[float, float | None]:
    """Scale and soft cap of the logits, from what becomes of chosen values of the last linear layer."""
    said = []
    for probe in PROBES:
        fill = last.register_forward_hook(lambda _m, _args, out, value=probe: torch.full_like(out.float(), value))
        try:
            said.append(float(head(z[:1], mask[:1]).flatten()[0]))
        finally:
            fill.remove()
    scale, largest = said[0] / PROBES[0], said[1]
    cap = largest if abs(largest) < 0.5 * abs(scale) * PROBES[1] else None
    output = Output(linear, scale, cap)
    told, wanted = output.squash(torch.tensor(PROBES)), torch.tensor(said)
    if not torch.allclose(told, wanted, rtol=1e-4, atol=0):
        raise refused(head, "its logits are more than a scale and a soft cap of a linear layer")
    return scale, cap


def _check(head: ServerHalf, found: ClosedHead, loss: Loss, z: Tensor, mask: Tensor) -> None:
    """Logits, loss, multiplier and gradients of what is trained, against the model's own forward and autograd."""
    trained = [p for p in head.parameters() if p.requires_grad]
    classes = found.output.linear.weight.shape[0]
    labels = torch.arange(12, device=z.device).mul(7919).remainder(classes).view(3, 4)
    if found.place == "every":
        labels[0, 1] = labels[2] = IGNORE
    else:
        labels = labels[:, 1]
    with quiet(head), torch.enable_grad():
        given = z.clone().requires_grad_()
        logits = head(given, mask)
        try:
            mean = loss(logits, labels)
            wanted = torch.autograd.grad(mean, [given, *trained], allow_unused=True)
        except Exception as error:  # whatever a loss of one's own raises
            raise refused(head, f"its loss fails: {error!r}") from error
    told = found.differentiate(z, mask, labels, trained)
    # Norms of Hugging Face compute in fp32 whatever the dtype.
    rough = ROUGH if z.element_size() < 4 else CLOSE[torch.float32]
    pairs = [("multiplier", told.multiplier, wanted[0])]
    pairs += [("gradient", mine, theirs) for mine, theirs in zip(told.gradients, wanted[1:]) if theirs is not None]
    wrong = [name for name, mine, theirs in pairs if not distance(mine, theirs) <= rough]
    if not distance(told.loss, mean) <= rough:
        wrong.insert(0, "loss")
    if logits.shape != (again := found.logits(z, mask)).shape or not distance(again, logits) <= rough:
        wrong.insert(0, "logits")
    if wrong:
        raise refused(head, f"its {wrong[0]} is not that of its norms and linear layers and the mean cross entropy")


def distance(x: Tensor, wanted: Tensor) -> float:
    """``max |x − y|``, by the largest of ``y``; infinite for other shapes."""
    if x.shape != wanted.shape:
        return float("inf")
    x, wanted = x.detach().double(), wanted.detach().double()
    return float((x - wanted).abs().amax() / wanted.abs().amax().clamp_min(1e-30))


def _bound(wanted: Tensor) -> float:
    return CLOSE.get(wanted.dtype, 0.02)
