"""Does a module have the cut that it is told to have? Before the first batch by names, at the first by its graph."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class CutError(ValueError):
    """The cut, or the parameters named for the client, do not fit the module."""


def client_parameters(module: nn.Module, cut: str, client: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """θ_c by name, in ``named_parameters()`` order.

    Raises:
        CutError: There is no such cut, a pattern matches nothing, or a parameter is inside the module at the cut.
    """
    modules = [name for name, _ in module.named_modules() if name]
    if cut not in modules:
        last = cut.rsplit(".", 1)[-1]
        near = [name for name in modules if name.rsplit(".", 1)[-1] == last] or [n for n in modules if "." not in n]
        raise CutError(f"cut: the module has no submodule {cut!r}; there is, for example, {', '.join(near[:5])}")
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if client is None:
        earlier = ["", *modules[: modules.index(cut)]]
        wanted = {name for name in trainable if name.rpartition(".")[0] in earlier}
        if not wanted:
            raise CutError(f"cut: no trainable parameter is registered before {cut!r}; name them in client=[...]")
    else:
        wanted = set()
        for pattern in client:
            matches = {n for n in trainable if re.match(rf"(?:{pattern})(?:\.|$)", n)}
            if not matches:
                raise CutError(f"client: {pattern!r} matches no trainable parameter, such as {next(iter(trainable))!r}")
            wanted |= matches
    inside = next((name for name in trainable if name in wanted and name.startswith(f"{cut}.")), None)
    if inside:
        raise CutError(f"client: {inside} is in {cut!r}, the module at the cut, so it is not below it")
    return {name: p for name, p in trainable.items() if name in wanted}


def refuse_compiled(module: nn.Module, cut: str, client: list[str]) -> None:
    """Hooks inside a compiled module do not run as they are set and removed.

    Raises:
        CutError: A compiled submodule is around the cut or below it.
    """
    for name, part in module.named_modules():
        compiled = part._compiled_call_impl is not None or "_orig_mod" in part._modules
        if compiled and any(inside.startswith(f"{name}.") for inside in [cut, *client]):
            raise CutError(
                f"cut: {name!r} is compiled, so nothing can be hooked in it; compile modules above the cut only"
            )


def check_paths(module: nn.Module, cut: str, client: dict[str, nn.Parameter], below: set[int], above: set[int]) -> None:
    """The loss depends on θ_c through z and on nothing else that is trained below the cut.

    Args:
        module: Holds all parameters.
        cut: For the messages.
        client: θ_c.
        below: Ids of the parameters that the graph of z reaches.
        above: Ids of those that the graph of the loss reaches when it ends at z.

    Raises:
        CutError: Names the parameters and what to change.
    """
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    ours = {id(p) for p in client.values()}
    complaints = [
        (ours & above & below, f"cut: the loss also reaches %s by a path around {cut!r} (a skip connection or a tied "
                               "weight), whose gradient would be lost; move the cut, or leave them out of client"),
        ((ours & above) - below, f"client: %s are used at or after {cut!r}, not before it; leave them out"),
        (ours - above - below, f"client: %s are not used before {cut!r}, so a probe would move them by noise; leave "
                               "them out, or freeze them"),
        (below - ours, f"client: %s are trained and used before {cut!r}, where backprop no longer arrives; name them "
                       "in client too, or freeze them"),
    ]  # fmt: skip
    for wrong, message in complaints:
        found = [name for number, name in names.items() if number in wrong]
        if found:
            raise CutError(message % (", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")))


def leaves(root: Tensor) -> set[int]:
    """Ids of the leaf tensors that the autograd graph of ``root`` reaches."""
    found: set[int] = set()
    seen: set[Any] = set()
    pending = [root.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        pending += [earlier for earlier, _ in node.next_functions]
    return found
