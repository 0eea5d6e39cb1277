"""Where an image classifier can be cut: a forward of its own shows which list of layers it runs in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.structure import LayerPath, Rest, Structure, siblings
from hosfl_lightning.split.views import quiet


@dataclass
class Recording:
    """One forward of a model, module by module.

    Attributes:
        calls: dotted names, in the order in which the modules were called.
        shapes: of the first tensor that each was given, without the batch.
        outputs: of the tensor, or first tensor of a tuple, that each returned; ``()`` if it was anything else.
        rests: of each, what it returned behind that tensor, tensors as ``None``; ``None``: no tuple.
    """

    calls: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rests: dict[str, Rest] = field(default_factory=dict)

    def in_order(self, names: Sequence[str]) -> bool:
        """Whether these were called once each, in this order."""
        wanted = set(names)
        return [c for c in self.calls if c in wanted] == list(names)


def record(model: nn.Module, images: Tensor) -> Recording:
    """Run ``model`` on ``images`` in eval mode; its hooks, modes and statistics and the random state stay as they are.

    Raises:
        SplitError: the forward fails.
    """
    recording, handles = Recording(), []
    try:
        for name, module in model.named_modules(remove_duplicate=False):
            handles += _watch(recording, name, module)
        with quiet(model):
            model(images)
    except Exception as error:  # whatever a foreign forward raises, it is refused by name
        raise SplitError(
            f"{type(model).__name__} cannot be split: its forward fails on images of shape {tuple(images.shape[1:])} "
            f"with {error!r}; set channels and image_size to what it takes."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return recording


def _watch(recording: Recording, name: str, module: nn.Module) -> list[RemovableHandle]:
    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.calls.append(name)
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), torch.empty(1))
        recording.shapes[name] = tuple(first.shape[1:])

    def leave(_module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
        others = output[1:] if isinstance(output, tuple) else None
        recording.rests[name] = None if others is None else tuple(map(_without_tensors, others))
        first = next(iter(output), None) if isinstance(output, tuple) else output
        recording.outputs[name] = tuple(first.shape[1:]) if isinstance(first, Tensor) else ()

    return [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]


def _without_tensors(value: Any) -> Any:
    """Numbers and tuples of them stay: one image size gives the same ones."""
    plain = value if isinstance(value, tuple) else (value,)
    return value if all(isinstance(one, int | float | None) for one in plain) else None


def find_image_structure(model: PreTrainedModel, recording: Recording) -> Structure:
    """The shallowest ``nn.ModuleList`` whose entries ran once each, in order, and what ran before and after it.

    Raises:
        SplitError: there is no such list, there are several, or the model has no head.
    """
    name = type(model).__name__
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    lists = [n for n in lists if recording.in_order(entries(model, n))]
    depth = min((n.count(".") for n in lists), default=0)
    lists = [n for n in lists if n.count(".") == depth]
    if len(lists) != 1:
        found = "no list" if not lists else f"{len(lists)} lists ({', '.join(lists)})"
        raise SplitError(f"{name} cannot be split: found {found} of layers that run once each, in order.")
    if depth == 0:
        raise SplitError(f"{name} cannot be split: it has no head; pass a model for image classification.")
    names = entries(model, lists[0])
    layers = LayerPath(lists[0], len(names))
    first, last = (recording.calls.index(n) for n in (names[0], names[-1]))
    beside = {n for n, _ in siblings(model, layers)}
    return Structure(
        layers,
        before=frozenset(beside.intersection(recording.calls[:first])),
        after=frozenset(beside.intersection(recording.calls[last:])),
        rests=tuple(recording.rests[n] for n in names),
        shared=frozenset(),
        token_head=None,
    )


def entries(model: nn.Module, path: str) -> list[str]:
    """Dotted names of the children of the module at ``path``."""
    prefix = f"{path}." if path else ""
    return [f"{prefix}{child}" for child in model.get_submodule(path)._modules]
