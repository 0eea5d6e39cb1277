"""What a SplitModule holds: a whole model and its two halves, or the client's half alone."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from hosfl_lightning.models.pretrained import load_client, resolve
from hosfl_lightning.split import SplitError, add_lora, split_server
from hosfl_lightning.split.client_parameters import choose

Part = Literal["both", "client"]
Labels = Literal["server", "client"]
#: How the names of a head's parameters begin among those of a client.
HEAD = "client_head."
LABELS_STAY = "Labels and text stay at the clients: hidden states and their gradients travel, and a loss."


class Halves(NamedTuple):
    """Of one model.

    Attributes:
        client: ``f_c``.
        server: ``f_s``; None where only the client is.
        whole: The uncut model, a PeftModel with LoRA; None likewise.
        head: Of a client that has the labels; else None.
    """

    client: Any
    server: Any
    whole: Any
    head: Any


def hold(module: Any, part: Part, dtype: str, seed: int, **model_kwargs: Any) -> Halves:
    """What that part of a `SplitModule` holds, from its methods and settings.

    Raises:
        PretrainedError: The model cannot be loaded.
        SplitError: It cannot be cut as asked, or there is no such part.
    """
    if part == "both":
        return _cut(module, dtype, seed, model_kwargs)
    if part != "client":
        raise SplitError(f"model.init_args.part={part!r}: both (the whole model, in two halves) or client")
    client, head = module.load_client(dtype, seed, **model_kwargs)
    return Halves(client, None, None, head)


def check_labels_at(labels: Labels, client_holds: str) -> Labels:
    """Where the labels are.

    Raises:
        SplitError: There is no such place, or a client has no use for a head of its own.
    """
    if labels not in ("server", "client"):
        raise SplitError(f"model.init_args.labels={labels!r}: server, or client (with the head and the loss)")
    if labels == "client" and client_holds == "whole":
        raise SplitError(
            "model.init_args.client_holds=whole: clients that hold the whole model have their labels anyway; set "
            "labels to server, or client_holds to half"
        )
    return labels


def client_alone(module: Any, dtype: str, seed: int, **model_kwargs: Any) -> tuple[Any, Any]:
    """The client's half of a saved text model and its head, without the rest."""
    adapters: dict[str, Any] = {
        "lora": module.lora,
        "side": module.side,
        "client_parameters": module.trains_at_client,
        "loss": module.loss if module.labels == "client" else None,
        "trains_head": module.trains_head,
    }
    return load_client(
        module.auto_class, module.pretrained, module.cut, seed=seed, dtype=dtype, **adapters, **model_kwargs
    )


def client_of_whole(module: Any, dtype: str, seed: int, **model_kwargs: Any) -> tuple[Any, Any]:
    """Both of a whole that is gone when this returns: a view holds its own modules and no others."""
    held = _cut(module, dtype, seed, model_kwargs)
    return held.client, held.head


def here(part: Part, what: str, held: Any) -> Any:
    """What is more than the client's half.

    Raises:
        SplitError: Only that half is here.
    """
    if part == "client":
        raise SplitError(
            f"{what} is not here: with model.init_args.part: client a model holds the client's half alone; set it to "
            "both"
        )
    return held


def _cut(module: Any, dtype: str, seed: int, model_kwargs: dict[str, Any]) -> Halves:
    side, lora = module.side, module.lora
    whole = base = module.load_whole(dtype, seed, **model_kwargs)
    base.eval()
    placement = None if side is None else module.place_side(base, side)
    if lora is not None:
        whole = add_lora(
            base, module.cut, lora, head=module.trains_head, base_model_name_or_path=resolve(module.pretrained),
            seed=seed, side=placement,
        ).eval()  # fmt: skip
        base = whole.get_base_model()
    elif placement is not None:
        placement.attach(base)
    client, server = module.split_whole(base)
    head = None
    if module.labels == "client":
        server, head = split_server(server, module.loss)
    choose(client, module.trains_at_client, lora, side)
    return Halves(client, server, whole, head)
