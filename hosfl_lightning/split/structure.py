"""Where a model can be cut: its list of layers, and what runs before and after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.views import (
    embedding_weight,
    has_parameters,
    padding_token,
    quiet,
    set_submodule,
    view,
    view_of_path,
)

#: What a layer returns behind the hidden state, where it returns a tuple.
Rest = tuple[Any, ...] | None
#: The tuples that text models' layers return, in the order in which they are tried.
RESTS: tuple[Rest, ...] = (None, (), (None,), (None, None))


@dataclass(frozen=True)
class LayerPath:
    """The list of layers of a model.

    Attributes:
        path: dotted name of the ``nn.ModuleList`` in the whole model, such as ``"model.layers"``.
        num_layers: its length.
    """

    path: str
    num_layers: int

    @property
    def backbone(self) -> str:
        """Name of the child of the whole model that holds the layers, such as ``"model"`` or ``"bert"``."""
        return self.path.split(".")[0]

    @property
    def parents(self) -> list[str]:
        """Dotted names of the modules between the whole model and the list: ``["model", "model.decoder"]``."""
        parts = self.path.split(".")
        return [".".join(parts[:i]) for i in range(1, len(parts))]


@dataclass(frozen=True)
class Structure:
    """What a tiny forward shows about a model.

    Attributes:
        layers: where the layers are.
        before: dotted names of the siblings of the layers (at any level of the backbone) that run before the first one.
        after: those that run after the last one.
        rests: of each layer, what it returns behind the hidden state, tensors as ``None``; ``None``: no tuple.
        shared: dotted names of the siblings whose parameters every layer is given (DeBERTa's relative positions).
        token_head: name of the head whose output, one row of logits a token, a classifier pools; else ``None``.
    """

    layers: LayerPath
    before: frozenset[str]
    after: frozenset[str]
    rests: tuple[Rest, ...]
    shared: frozenset[str]
    token_head: str | None


class Skip(nn.Module):
    """A layer that hands its input on, as a tensor or as the first entry of a tuple.

    Args:
        rest: the other entries; ``None``: a tensor.
        layer: in whose place it is: what its caller may ask of it, such as its kind of attention, or whether there is a
            module in it, is answered alike; no tensor is kept.
    """

    def __init__(self, rest: Rest, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.rest = rest
        given = {} if layer is None else vars(layer)
        plain = {n: value for n, value in given.items() if n[0] != "_" and not isinstance(value, Tensor)}
        self.__dict__.update({n: value for n, value in plain.items() if not hasattr(self, n)})
        for name, child in given.get("_modules", {}).items():
            self._modules[name] = child and nn.Identity()

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:
        """Return the first argument, as a layer would."""
        return hidden_states if self.rest is None else (hidden_states, *self.rest)


def find_layers(model: PreTrainedModel) -> LayerPath:
    """Find the one list of layers of a causal LM or sequence classifier.

    It is the shallowest ``nn.ModuleList`` whose length is the number of layers in the config.

    Raises:
        SplitError: the model is wrapped, has no head, is an encoder-decoder, or has no such list or several.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise SplitError(f"{name} is not a transformers model: pass the bare model (of a PeftModel: get_base_model()).")
    if getattr(model.config, "is_encoder_decoder", False):
        raise SplitError(f"{name} cannot be split: an encoder-decoder has two stacks of layers.")
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    depth = min((n.count(".") for n in lists), default=0)
    lists = [n for n in lists if n.count(".") == depth]
    if len(lists) != 1:
        found = "no list" if not lists else f"{len(lists)} lists ({', '.join(lists)})"
        raise SplitError(f"{name} cannot be split: found {found} of num_hidden_layers={wanted} layers in it.")
    if depth == 0:
        raise SplitError(f"{name} cannot be split: it has no head; pass a causal LM or a sequence classifier.")
    layers = LayerPath(lists[0], int(wanted or 0))
    around = [model.get_submodule(n) for n in ["", *layers.parents]]
    if any("forward" in vars(module) or module._compiled_call_impl is not None for module in around):
        raise SplitError(f"{name} cannot be split: its forward was replaced; load it without device_map, uncompiled.")
    return layers


def siblings(model: nn.Module, layers: LayerPath) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the backbone beside the path to the layers, with their dotted names."""
    steps = {*layers.parents, layers.path}
    for parent in layers.parents:
        for name, child in model.get_submodule(parent).named_children():
            if f"{parent}.{name}" not in steps:
                yield f"{parent}.{name}", child


def find_structure(model: PreTrainedModel) -> Structure:
    """Record, in a forward of five tokens in which every layer is skipped, what runs before and after the layers.

    Works on the meta device too. The model, its modes and the global random state stay as they are.

    Raises:
        SplitError: as in :func:`find_layers`, or the forward fails.
    """
    layers = find_layers(model)
    failure: Exception | None = None
    for rest in RESTS:
        try:
            found = _record(model, layers, rest)
        except SplitError:
            raise
        except Exception as error:  # whatever a foreign forward raises, it is refused by name
            failure = error
            continue
        if found is not None:
            return found
    raise SplitError(f"{type(model).__name__} cannot be split: its forward fails without its layers.") from failure


def _record(model: PreTrainedModel, layers: LayerPath, rest: Rest) -> Structure | None:
    twin = view_of_path(model, layers.path)
    stack = model.get_submodule(layers.path)
    calls: list[str] = []
    outputs: dict[str, Any] = {}
    given: list[Any] = []

    def watch(name: str, module: nn.Module) -> None:
        watched = view(module)
        watched.register_forward_pre_hook(lambda *_: calls.append(name))
        watched.register_forward_hook(lambda _m, _args, output: outputs.update({name: output}))
        set_submodule(twin, name, watched)

    for name, module in list(siblings(twin, layers)):
        watch(name, module)
    for name, module in list(twin.named_children()):
        if name != layers.backbone:
            watch(name, module)
    for i in range(layers.num_layers):
        watch(f"{layers.path}.{i}", Skip(rest, stack.get_submodule(str(i))))
    twin.get_submodule(f"{layers.path}.0").register_forward_pre_hook(
        lambda _layer, args, kwargs: given.extend([*args[1:], *kwargs.values()]), with_kwargs=True
    )
    beside = dict(siblings(model, layers))
    tokens = torch.zeros(1, 5, dtype=torch.long, device=embedding_weight(model).device)
    with quiet(twin), padding_token(model, None), _asking(beside.values()):
        logits = twin(input_ids=tokens, use_cache=False, return_dict=True).logits
        shared = _reached(given, beside)
    _refuse_between(model, layers, calls)
    return _read(layers, rest, calls, outputs, logits, shared)


@contextmanager
def _asking(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Their parameters ask for a gradient inside, and there is a graph."""
    found = [(p, p.requires_grad) for module in modules for p in module.parameters() if p.is_floating_point()]
    try:
        for parameter, _ in found:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in found:
            parameter.requires_grad_(required)


def _reached(given: Iterable[Any], modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """Names of the modules on whose parameters the tensors depend."""
    tensors = [value for value in given if isinstance(value, Tensor) and value.requires_grad]
    named = [(name, p) for name, module in modules.items() for p in module.parameters() if p.requires_grad]
    if not tensors or not named:
        return frozenset()
    gradients = torch.autograd.grad([t.sum() for t in tensors], [p for _, p in named], allow_unused=True)
    return frozenset(name for (name, _), gradient in zip(named, gradients) if gradient is not None)


def _refuse_between(model: PreTrainedModel, layers: LayerPath, calls: list[str]) -> None:
    """Refuse what runs after some layer and has parameters (DeBERTa's convolution): no half's list of layers holds it.

    Raises:
        SplitError: naming it.
    """
    names = [f"{layers.path}.{i}" for i in range(layers.num_layers)]
    if names[0] in calls and names[-1] in calls:
        for name in calls[calls.index(names[0]) : calls.index(names[-1])]:
            if name not in names and has_parameters(model.get_submodule(name)):
                raise SplitError(f"{type(model).__name__} cannot be split: {name} runs between its layers.")


def _read(
    layers: LayerPath,
    rest: Rest,
    calls: list[str],
    outputs: dict[str, Any],
    logits: Tensor,
    shared: frozenset[str],
) -> Structure | None:
    names = [f"{layers.path}.{i}" for i in range(layers.num_layers)]
    if [c for c in calls if c in set(names)] != names:
        raise RuntimeError("the layers do not run once each, in order")
    start, end = (outputs[n] if rest is None else outputs[n][0] for n in (names[0], names[-1]))
    if start.shape != end.shape:  # the caller unpacked a bare tensor: layers return tuples here
        return None
    first, last = calls.index(names[0]), calls.index(names[-1])
    heads = [c for c in calls if "." not in c]
    pools = bool(heads) and logits.ndim == 2 and outputs[heads[-1]].ndim == 3
    return Structure(
        layers,
        before=frozenset(c for c in calls[:first] if "." in c),
        after=frozenset(c for c in calls[last:] if "." in c and c not in names),
        rests=(rest,) * layers.num_layers,
        shared=shared,
        token_head=heads[-1] if pools else None,
    )
