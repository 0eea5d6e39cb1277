"""One half of a saved model, built without ever holding the other half's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hosfl_lightning.gguf import named_after, opened, weights
from hosfl_lightning.split.adapters import Lora, add_client_lora, add_head_lora, save_head
from hosfl_lightning.split.client_parameters import ClientParameters, choose
from hosfl_lightning.split.cut import (
    check_cut,
    check_shared,
    check_tied_head,
    prune_to_client,
    prune_to_server,
    stub_client,
)
from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.halves import ClientHalf, ServerHalf
from hosfl_lightning.split.head import ClientHead, head_of, prune_to_ends
from hosfl_lightning.split.placement import place_client_side
from hosfl_lightning.split.recognition import Loss
from hosfl_lightning.split.side import Side
from hosfl_lightning.split.structure import Structure, find_structure, siblings
from hosfl_lightning.split.views import set_submodule, view_of_path


def load_client_half(
    path: str | PathLike[str], cut: int, *, auto_class: Any = AutoModelForCausalLM, **kwargs: Any
) -> ClientHalf:
    """Read the embeddings and the first ``cut`` layers of a saved model, and nothing else.

    The half has no adapter; `build_client_half` gives it its own.

    Args:
        path: folder or hub name of a model saved as safetensors, in one file or in shards; or a GGUF file, whose
            other tensors are read one at a time and dropped.
        cut: number of layers the client holds, from 1 to the number of layers - 1.
        auto_class: ``AutoModelForCausalLM`` or ``AutoModelForSequenceClassification``: which model is cut.
        **kwargs: for ``from_pretrained``, such as ``dtype`` or ``revision``.

    Returns:
        The client half, in eval mode, as :func:`split` of the whole model would give it.

    Raises:
        SplitError: the cut is out of range, or the architecture has no list of layers.
    """
    model, structure = _load(path, cut, auto_class, prune_to_client, kwargs)
    return ClientHalf(model, structure, cut)


def build_client_half(
    path: str | PathLike[str],
    cut: int,
    *,
    lora: Lora | None = None,
    side: Side | None = None,
    client_parameters: ClientParameters | None = None,
    seed: int = 0,
    auto_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> ClientHalf:
    """The half that `build_client` gives.

    Raises:
        SplitError: as `build_client`.
    """
    adapters: dict[str, Any] = {"lora": lora, "side": side, "client_parameters": client_parameters}
    return build_client(path, cut, seed=seed, auto_class=auto_class, **adapters, **kwargs)[0]


def build_client(
    path: str | PathLike[str],
    cut: int,
    *,
    lora: Lora | None = None,
    side: Side | None = None,
    client_parameters: ClientParameters | None = None,
    seed: int = 0,
    loss: Loss | None = None,
    trains_head: bool = False,
    auto_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> tuple[ClientHalf, ClientHead | None]:
    """`load_client_half` with the client's adapters: names, order and start are those of a whole that is split.

    What asks for a gradient is what the client trains: the adapters; without any, every weight.

    Args:
        path: folder or hub name of a model saved as safetensors, in one file or in shards; or a GGUF file, whose
            other tensors are read one at a time and dropped.
        cut: number of layers the client holds, from 1 to the number of layers - 1.
        lora: of both halves; the server's is not looked at. ``None``: the server trains its half whole.
        side: as `place_side` takes it; the server's bottleneck is not attached.
        client_parameters: as `choose` takes it.
        seed: of the adapters' start.
        loss: of logits and labels: the head is read too, and is the client's. ``None``: it is not.
        trains_head: the head is trained whole, beside LoRA as well.
        auto_class: ``AutoModelForCausalLM`` or ``AutoModelForSequenceClassification``: which model is cut.
        **kwargs: for ``from_pretrained``, such as ``dtype`` or ``revision``.

    Raises:
        SplitError: as :func:`load_client_half`, `add_lora`, `place_side`, `choose`, :func:`split` of the whole, and
            `ClientHead`.
    """
    check = check_tied_head if lora is None else None
    prune = prune_to_client if loss is None else prune_to_ends
    ends, structure = _load(path, cut, auto_class, prune, kwargs, check)
    model = ends if loss is None else prune_to_client(view_of_path(ends, structure.layers.path), structure, cut)
    if loss is not None and lora is not None:
        ends.requires_grad_(False)
        if trains_head:
            save_head(ends, structure.layers)
        if lora.head:
            add_head_lora(ends, lora.head, seed)
    half, layers = ClientHalf(model, structure, cut), structure.layers
    placement = place_client_side(model, layers, cut, side, seed, half) if side is not None and side.client else None
    if lora is not None:
        half.requires_grad_(False)
    if lora is not None and lora.client is not None:
        add_client_lora(model, layers, cut, lora.client, seed=seed)
    if placement is not None:
        placement.attach(model)
    choose(half.eval(), client_parameters, lora, side)
    return half, None if loss is None else head_of(ends, structure, loss)


def load_server_half(
    path: str | PathLike[str], cut: int, *, auto_class: Any = AutoModelForCausalLM, **kwargs: Any
) -> ServerHalf:
    """Read the layers from ``cut`` on, the final norm and the head of a saved model, and nothing else.

    A tied head is read from the embeddings that it is tied to. Arguments and errors as in :func:`load_client_half`.
    """
    model, structure = _load(path, cut, auto_class, prune_to_server, kwargs)
    stub_client(model, structure)
    return ServerHalf(model, structure, cut)


Prune = Callable[[PreTrainedModel, Structure, int], PreTrainedModel]
Check = Callable[[PreTrainedModel], None]


def _load(
    path: str | PathLike[str],
    cut: int,
    auto_class: Any,
    prune: Prune,
    kwargs: dict[str, Any],
    check: Check | None = None,
) -> tuple[PreTrainedModel, Structure]:
    # All of them: some change the config, such as num_hidden_layers.
    others = {name: value for name, value in kwargs.items() if name != "dtype"}
    with torch.random.fork_rng(devices=[]), opened(str(path)) as (folder, more):
        config = AutoConfig.from_pretrained(folder, **more, **others)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
            empty = auto_class.from_config(config)
            structure, kind = find_structure(empty), type(empty)
        check_cut(cut, structure.layers, kind.__name__)
        if check is not None:
            check(empty)
            check_shared(empty, structure)
        pruned = _pruned(kind, structure, cut, prune)
        of_head: Any = {"ignore_mismatched_sizes": prune is prune_to_ends, "output_loading_info": True}
        loaded: Any = pruned.from_pretrained(folder, **more, **weights(str(path)), **of_head, **kwargs)
        model = loaded[0]
        _check_sizes(model, loaded[1]["mismatched_keys"])
        named_after(str(path), model)
    model.__class__ = kind
    return model, structure


def _check_sizes(model: PreTrainedModel, differ: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Only a head may be of another size than the saved one: it is a fresh one then."""
    for name, saved, here in differ:
        if name.startswith(f"{model.base_model_prefix}."):
            raise SplitError(
                f"{name} has the size {tuple(saved)} where it is saved, and {tuple(here)} by the config; save it again."
            )


def _pruned(kind: type[PreTrainedModel], structure: Structure, cut: int, prune: Prune) -> type[PreTrainedModel]:
    """The model's class, with the other half's modules dropped while they are still on the meta device.

    ``from_pretrained`` then reads only the tensors that are left, with all it knows about dtypes, shards, renamed
    keys and buffers. An embedding tied to a head that is left stays for the time being: the head is read from it.
    """

    def init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        whole = dict(siblings(self, structure.layers))
        prune(self, structure, cut)
        left = {n for n, _ in self.named_parameters(remove_duplicate=False)}
        self.all_tied_weights_keys = {head: tied for head, tied in self.all_tied_weights_keys.items() if head in left}
        for name, module in whole.items():
            if any(tied.startswith(f"{name}.") for tied in self.all_tied_weights_keys.values()):
                set_submodule(self, name, module)

    def init_weights(self: PreTrainedModel, module: nn.Module) -> None:
        if module is not self or prune is not prune_to_client:  # some start their head here, which a client has not
            kind._init_weights(self, module)

    silent = {"_keys_to_ignore_on_load_unexpected": [".*"]}  # the other half's tensors are no news
    methods = {"__init__": init, "_init_weights": init_weights}
    return type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__, **silent})
