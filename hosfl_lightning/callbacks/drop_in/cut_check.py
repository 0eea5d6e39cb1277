"""Does a module have the cut that it is told to have? Before the first batch by names, at the first by its graph."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hosfl_lightning.optim.compiled import compiled_around
from hosfl_lightning.split.client_parameters import select

#: Relative error up to which two gradients of one function agree, in any precision.
TOLERANCE = 0.05
#: For a cut so high that it leaves nothing to backprop.
NOTHING_ABOVE = ("cut: nothing is trained at %s or after it, so backprop has nothing to do; take an earlier cut, or "
                 "train all by probes with ZerothOrderTraining")  # fmt: skip
#: Names that a message lists at most.
READABLE = 16


class CutError(ValueError):
    """The cut, or the parameters named for the client, do not fit the module."""


def check_cut(cut: Any) -> None:
    """A name, before there is a module to look it up in.

    Raises:
        CutError: It is none.
    """
    if not isinstance(cut, str):
        raise CutError(f"cut: give the submodule's name as a string, such as 'net.2' (one of [name for name, _ in "
                       f"model.named_modules()]), got {type(cut).__name__}")  # fmt: skip
    if not cut:
        raise CutError("cut: '' is the whole module, above which nothing is left; give the name of a submodule, one of "
                       "[name for name, _ in model.named_modules()]")  # fmt: skip


def client_parameters(module: nn.Module, cut: str, client: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """θ_c by name, in ``named_parameters()`` order.

    A pattern that matches no name may be a word of `split.client_parameters`: what it means of all before the cut.

    Raises:
        CutError: There is no such cut or it is never called, a pattern matches nothing, a parameter is inside the
            module at the cut, or nothing is left to train there or above.
    """
    modules = [name for name, _ in module.named_modules() if name]
    if cut not in modules:
        raise CutError(f"cut: the module has no submodule {cut!r}; the nearest names are {_nearest(cut, modules)}")
    _refuse_container(cut, module.get_submodule(cut))
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    earlier = ["", *modules[: modules.index(cut)]]
    before = {name for name in trainable if name.rpartition(".")[0] in earlier}
    if client is None:
        wanted = before
        if not wanted:
            raise CutError(f"cut: no trainable parameter is registered before {cut!r}; name them in client=[...]")
    else:
        wanted = set()
        for pattern in client:
            prefixed = {n for n in trainable if pattern.endswith(".") and n.startswith(pattern)}
            matches = prefixed or {n for n in trainable if re.match(rf"(?:{pattern})(?:\.|$)", n)}
            matches = matches or before & {*select(module, pattern)}
            if not matches:
                raise CutError(f"client: {pattern!r} matches no trainable parameter; the nearest names are "
                               f"{_nearest(pattern, list(trainable))}")  # fmt: skip
            wanted |= matches
    inside = next((name for name in trainable if name in wanted and name.startswith(f"{cut}.")), None)
    if inside:
        raise CutError(f"client: {inside} is in {cut!r}, the module at the cut, so it is not below it")
    if len(wanted) == len(trainable):
        raise CutError(NOTHING_ABOVE % repr(cut))
    return {name: p for name, p in trainable.items() if name in wanted}


def _refuse_container(cut: str, module: nn.Module) -> None:
    """A list of modules has no forward: nobody calls it, and no hook at it runs."""
    if _has_forward(module):
        return
    inside = ((name, part) for name, part in module.named_modules() if name)
    first = next((name for name, part in inside if _has_forward(part)), None)
    instead = f"take {f'{cut}.{first}'!r}" if first else "take a module that is"
    raise CutError(f"cut: {cut!r} is a {type(module).__name__}, which is not called; {instead}")


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _nearest(name: str, names: list[str]) -> str:
    without_prefix = [known for known in names if known.endswith(f".{name}")]
    nearest = difflib.get_close_matches(name, names, n=5, cutoff=0.0)
    return ", ".join(dict.fromkeys([*without_prefix, *nearest][:5])) or "none"


def refuse_compiled(module: nn.Module, cut: str, client: list[str]) -> None:
    """Hooks inside a compiled module do not run as they are set and removed.

    Raises:
        CutError: A compiled submodule is around the cut or below it.
    """
    name = compiled_around(module, [cut, *client])
    if name is not None:
        raise CutError(
            f"cut: {name or type(module).__name__!r} is compiled, and a compiled module does not run the hooks by "
            f"which probes work; compile only {cut!r} and what comes after it, each by its own module.compile() "
            "(docs/drop_in.md, Compile the upper part)"
        )


def check_passes(cut: str, passes: int) -> None:
    """A training step goes through the cut once.

    Raises:
        CutError: Says how often it did.
    """
    if passes == 0:
        raise CutError(f"cut: training_step called {cut!r} 0 times with a graph, not once; choose a module that it "
                       "calls, such as one in it where they are called one by one (under activation checkpointing: "
                       "use_reentrant=False)")  # fmt: skip
    if passes > 1:
        raise CutError(f"cut: training_step called {cut!r} {passes} times, not once, so the loss has no single λ; "
                       "choose a cut that all inputs pass together (torch.cat), or another cut")  # fmt: skip


def check_paths(module: nn.Module, cut: str, client: dict[str, nn.Parameter], below: set[int], above: set[int]) -> None:
    """The loss depends on θ_c through z and on nothing else that is trained below the cut.

    Args:
        module: Holds all parameters.
        cut: For the messages.
        client: θ_c.
        below: Ids of the parameters that the graph of z reaches.
        above: Ids of those that the graph of the loss reaches when it ends at z.

    Raises:
        CutError: Names the parameters and what to change, or the cut where nothing above it is trained.
    """
    names = _names(module)
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
            shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
            raise CutError(message % shown + _suggestion(names, below - above))
    if not (above - ours) & names.keys():
        raise CutError(NOTHING_ABOVE % repr(cut))


def refuse_unfrozen(module: nn.Module, cut: str, client: dict[str, nn.Parameter], z: Tensor) -> None:
    """After the first batch, z has a graph: of an input's, or of what has been unfrozen since.

    Args:
        module: Holds all parameters.
        cut: For the message.
        client: θ_c.
        z: The input of the module at the cut.

    Raises:
        CutError: Names the first parameter that is trained now.
    """
    late = leaves(z) - {id(p) for p in client.values()}
    found = [name for number, name in _names(module).items() if number in late]
    if found:
        raise CutError(f"cut: {found[0]} was unfrozen during the run and is used before {cut!r}, where backprop no "
                       "longer arrives; unfreeze it before fit, or leave it frozen")  # fmt: skip


def _suggestion(names: dict[int, str], below: set[int]) -> str:
    """The setting that fits what the graph has shown, if a list that one can read says it."""
    plain = {number: name.partition(" (tied to ")[0] for number, name in names.items()}
    wanted = [name for number, name in plain.items() if number in below]
    fitting = prefixes(wanted, [name for number, name in plain.items() if number not in below])
    return f". What trains below it is client={fitting}" if 0 < len(fitting) <= READABLE else ""


def prefixes(wanted: Sequence[str], others: Sequence[str]) -> list[str]:
    """The shortest dotted prefixes that hold all the wanted names and none of the others."""
    found: list[str] = []
    for name in wanted:
        parts = name.split(".")
        starts = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        if not set(starts) & set(found):
            found.append(next(s for s in starts if not any(f"{other}.".startswith(f"{s}.") for other in others)))
    return found


def _names(module: nn.Module) -> dict[int, str]:
    """The names of each trainable parameter; a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(name)
    return {number: " (tied to ".join(known[:2]) + ")" * (len(known) > 1) for number, known in names.items()}


def leaves(root: Tensor, end: Tensor | None = None) -> set[int]:
    """Ids of the leaf tensors that the autograd graph of ``root`` reaches without passing ``end``."""
    found: set[int] = set()
    seen: set[Any] = set() if end is None else {end.grad_fn}
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


def check_gradient(cut: str, names: Sequence[str], exact: Sequence[Tensor], ours: Sequence[Tensor], hint: str) -> None:
    r"""``‖g − g'‖ ≤ TOLERANCE · ‖g‖`` for ``g = ∂ℓ/∂θ_c`` by the module's own backward and ``g'`` from λ alone.

    Args:
        cut: For the message.
        names: Of the parameters.
        exact: ``g``, tensor by tensor.
        ours: ``g'``.
        hint: What may be the cause.

    Raises:
        CutError: They differ, or ``g`` is not finite; names the parameter that differs most.
    """
    pairs = [(g.double(), o.to(g.device).double()) for g, o in zip(exact, ours, strict=True)]
    errors = torch.stack([(g - o).norm() for g, o in pairs])
    sizes = torch.stack([g.norm() for g, _ in pairs])
    if not sizes.isfinite().all():
        raise CutError(f"verify: below {cut!r} the gradient of {names[int(sizes.isfinite().int().argmin())]} is not "
                       "finite; mend what divides by zero or overflows there, or take verify=False")  # fmt: skip
    size = sizes.norm()
    if not errors.norm() <= TOLERANCE * size:
        raise CutError(
            f"verify: below {cut!r} the gradient from λ differs by {float(errors.norm() / size):.0%} from that of the "
            f"loss, most in {names[int(errors.argmax())]}; {hint}"
        )
