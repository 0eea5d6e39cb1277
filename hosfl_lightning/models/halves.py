"""What a SplitModule holds: a whole model and its two halves, or the client's half alone."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from hosfl_lightning.models.pretrained import load_client, resolve
from hosfl_lightning.split import SplitError, add_lora
from hosfl_lightning.split.client_parameters import choose

Part = Literal["both", "client"]


class Halves(NamedTuple):
    """Of one model.

    Attributes:
        client: ``f_c``.
        server: ``f_s``; None where only the client is.
        whole: The uncut model, a PeftModel with LoRA; None likewise.
    """

    client: Any
    server: Any
    whole: Any


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
    return Halves(module.load_client(dtype, seed, **model_kwargs), None, None)


def client_alone(module: Any, dtype: str, seed: int, **model_kwargs: Any) -> Any:
    """The client's half of a saved text model, without the other one."""
    adapters: dict[str, Any] = {
        "lora": module.lora,
        "side": module.side,
        "client_parameters": module.trains_at_client,
    }
    return load_client(
        module.auto_class, module.pretrained, module.cut, seed=seed, dtype=dtype, **adapters, **model_kwargs
    )


def client_of_whole(module: Any, dtype: str, seed: int, **model_kwargs: Any) -> Any:
    """The client's half of a whole that is gone when this returns: a view holds its own modules and no others."""
    return _cut(module, dtype, seed, model_kwargs).client


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
    choose(client, module.trains_at_client, lora, side)
    return Halves(client, server, whole)
