"""A model cut at one layer: a client half and a server half that share the parameters of the whole."""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PreTrainedModel

from hosfl_lightning.split.check import check_equal
from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.halves import ClientHalf, Entry, Exit, ServerHalf, Stub
from hosfl_lightning.split.structure import LayerPath, Skip, Structure, find_structure, siblings
from hosfl_lightning.split.views import has_parameters, own_buffers, set_submodule, view_of_path


def split(model: PreTrainedModel, cut: int, *, check: bool = True) -> tuple[ClientHalf, ServerHalf]:
    """Cut a model at one layer: f(x) = f_s(f_c(x)), bit for bit.

    The halves are *views*: the same parameters under the same names, with other modules around them. The whole model
    stays as it is and can be used, saved and trained beside its halves. Nothing of Hugging Face's masks, positions
    or rotary embeddings is written again: both halves run the model's own forward.

    Args:
        model: causal LM or sequence classifier. LoRA is injected first, then split ``peft_model.get_base_model()``.
        cut: number of layers the client holds, from 1 to the number of layers - 1.
        check: compare the halves with the whole on ten tokens: unpadded, right- and left-padded.

    Returns:
        The client half and the server half, in the model's mode (train or eval).

    Raises:
        SplitError: the cut is out of range, the architecture does not split exactly, or what both halves hold is
            trainable (a tied head, relative positions that every layer is given).
    """
    structure = find_structure(model)
    check_cut(cut, structure.layers, type(model).__name__)
    check_tied_head(model)
    check_shared(model, structure)
    path = structure.layers.path
    client = ClientHalf(prune_to_client(view_of_path(model, path), structure, cut), structure, cut)
    server = ServerHalf(prune_to_server(view_of_path(model, path), structure, cut), structure, cut)
    check_disjoint(model, client, server, structure.shared)
    if check:
        check_equal(model, client, server)
    return client, server


def prune_to_client(model: PreTrainedModel, structure: Structure, cut: int) -> PreTrainedModel:
    """Leave in ``model``, in place, only what runs before layer ``cut``."""
    for name, module in list(siblings(model, structure.layers)):
        if not has_parameters(module):
            set_submodule(model, name, own_buffers(module))
        elif name not in structure.before | structure.shared:
            set_submodule(model, name, nn.Identity())
    stack = model.get_submodule(structure.layers.path)
    set_submodule(stack, str(cut), Exit(structure.rests[cut], stack.get_submodule(str(cut))))
    for i in range(cut + 1, structure.layers.num_layers):
        del stack._modules[str(i)]
    for name in set(model._modules) - {structure.layers.backbone}:
        del model._modules[name]
    return model


def prune_to_server(model: PreTrainedModel, structure: Structure, cut: int) -> PreTrainedModel:
    """Leave in ``model``, in place, only what runs from layer ``cut`` on, and the way there."""
    stub_client(model, structure)
    stack = model.get_submodule(structure.layers.path)
    for i in range(cut):
        kind = Entry if i == cut - 1 else Skip
        set_submodule(stack, str(i), kind(structure.rests[i], stack.get_submodule(str(i))))
    return model


def stub_client(model: PreTrainedModel, structure: Structure) -> None:
    """Replace the client's modules around the layers, in place, and keep a buffer-only one as a copy."""
    for name, module in list(siblings(model, structure.layers)):
        if not has_parameters(module):
            set_submodule(model, name, own_buffers(module))
        elif name not in structure.after | structure.shared:
            set_submodule(model, name, Stub())


def check_cut(cut: int, layers: LayerPath, architecture: str, counted: str = "layers") -> None:
    """Refuse a cut that leaves one half without a layer."""
    if isinstance(cut, bool) or not isinstance(cut, int) or not 1 <= cut <= layers.num_layers - 1:
        raise SplitError(
            f"cut={cut!r} is out of range: {architecture} has {layers.num_layers} {counted}, "
            f"so cut ({counted} at the client) goes from 1 to {layers.num_layers - 1}."
        )


def tied_head(model: PreTrainedModel) -> tuple[str, nn.Parameter] | None:
    """Name and tensor of an output embedding that is the input embedding too."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or getattr(head, "weight", None) is not getattr(embedding, "weight", model):
        return None
    weight = cast(nn.Parameter, head.weight)
    return next(n for n, p in model.named_parameters(remove_duplicate=False) if p is weight), weight


def check_tied_head(model: PreTrainedModel) -> None:
    """Refuse to train a tensor that both halves hold: each would change its own copy.

    Raises:
        SplitError: naming the tensor.
    """
    tied = tied_head(model)
    if tied is not None and tied[1].requires_grad:
        raise SplitError(
            f"{tied[0]} is both the embedding (client) and the head (server) of {type(model).__name__} and would be "
            "trained on both sides: freeze it with requires_grad_(False) (LoRA does), or untie it with "
            "tie_word_embeddings=False."
        )


def check_shared(model: PreTrainedModel, structure: Structure) -> None:
    """Refuse to train what every layer is given, in both halves.

    Raises:
        SplitError: naming the first such parameter.
    """
    named = ((f"{name}.{n}", p) for name in structure.shared for n, p in model.get_submodule(name).named_parameters())
    trained = sorted(name for name, parameter in named if parameter.requires_grad)
    if trained:
        raise SplitError(
            f"{trained[0]} is read by the layers of both halves of {type(model).__name__} and would be trained on both "
            "sides: freeze it with requires_grad_(False), as LoRA does (model.init_args.lora)."
        )


def check_disjoint(
    model: PreTrainedModel, client: ClientHalf, server: ServerHalf, shared: frozenset[str] = frozenset()
) -> None:
    """Refuse a model with a parameter that both halves would need, but a frozen tied head and what is ``shared``."""
    tied = tied_head(model)
    allowed = {id(p) for name in shared for p in model.get_submodule(name).parameters()}
    allowed |= set() if tied is None else {id(tied[1])}
    held = {id(p) for p in client.parameters()}
    both = [n for n, p in server.named_parameters() if id(p) in held - allowed]
    if both:
        raise SplitError(f"{type(model).__name__} cannot be split: both halves would need {', '.join(both)}.")
