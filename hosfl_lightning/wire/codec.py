"""What a codec is, and which are known here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from hosfl_lightning.parts import PartError, from_path


class Codec(ABC):
    """How an (n, h) tensor travels: as ``values`` of few bits, and a scale for each row or none.

    A subclass has a ``name``, by which messages name it, and no arguments: both sides must know all of it by that name.
    A recipe names it by its class path (``trainer.codec.multiplier: my_parts.Signs``); a client on another machine must
    have imported the same class, or says that it cannot take part. It is tried on two small tensors when it is chosen.
    """

    known: ClassVar[dict[str, Codec]] = {}
    #: On the wire.
    name: ClassVar[str]
    #: Of ``values``; a dtype that travels.
    form: ClassVar[torch.dtype] = torch.uint8
    #: Whether what comes back is off in the mean, and so of no use for z and λ.
    biased: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not isinstance(getattr(cls, "name", None), str):
            return  # abstract
        other = type(Codec.known[cls.name]) if cls.name in Codec.known else cls
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PartError(f"a codec {cls.name!r} is in {other.__module__} already; give {cls.__name__} another name")
        Codec.known[cls.name] = cls()

    def columns(self, width: int) -> int:
        """Of ``values``, for rows of ``width`` numbers."""
        return width

    def scales(self, rows: int) -> int | None:
        """How many scales go with so many rows; None: no scale."""
        return None

    @abstractmethod
    def encode(self, x: Tensor, uniform: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
        """Code.

        Args:
            x: (n, h) fp32; where it is infinite or NaN, so must be what comes back.
            uniform: Draws (n, h) fp32 in [0, 1), for unbiased rounding: the same again whenever it is done again.

        Returns:
            ``values`` (n, ``columns(h)``) in ``form``, and the scales, bf16 (``scales(n)``,), or None.
        """

    @abstractmethod
    def decode(self, values: Tensor, scale: Tensor | None, width: int) -> Tensor:
        """(n, width) fp32, finite where values and scales are; a new tensor."""


def codec_of(given: str, setting: str) -> Codec:
    """A codec by its name or its class path, tried.

    Raises:
        PartError: There is none, or it does not keep its contract.
    """
    if given in Codec.known:
        return Codec.known[given]
    if "." not in given:
        raise PartError(
            f"{setting} must be one of {', '.join(Codec.known)}, or the class path of a hosfl_lightning.wire.Codec of "
            f"your own, got {given!r}"
        )
    codec = from_path(given, setting)
    if not isinstance(codec, Codec) or not isinstance(getattr(codec, "name", None), str):
        raise PartError(
            f"{setting}: {given} is no hosfl_lightning.wire.Codec with a name; give a subclass that has one"
        )
    _try(codec, setting)
    return codec


def _try(codec: Codec, setting: str) -> None:
    what = f"{setting}: codec {type(codec).__name__}"
    for rows, width in ((3, 8), (2, 5)):
        x = torch.linspace(-1, 2, rows * width).view(rows, width)
        values, scale = codec.encode(x.clone(), lambda x=x: torch.full_like(x, 0.5))  # type: ignore[misc]
        wanted = (rows, codec.columns(width)), codec.form
        if not isinstance(values, Tensor) or (tuple(values.shape), values.dtype) != wanted:
            raise PartError(f"{what}.encode made {_shown(values)} of {tuple(x.shape)}; by its columns and form it is "
                            f"{wanted[0]} {wanted[1]}")  # fmt: skip
        scales = codec.scales(rows)
        ok = scale is None if scales is None else isinstance(scale, Tensor) and scale.shape == (scales,)
        if not ok or (scale is not None and scale.dtype != torch.bfloat16):
            raise PartError(f"{what}.encode made the scale {_shown(scale)}; by its scales it is "
                            f"{'None' if scales is None else f'({scales},) torch.bfloat16'}")  # fmt: skip
        back: Any = codec.decode(values, scale, width)
        if not isinstance(back, Tensor) or back.shape != x.shape or back.dtype != torch.float32:
            raise PartError(
                f"{what}.decode made {_shown(back)}; it is {tuple(x.shape)} torch.float32, as what was coded"
            )
        if not back.isfinite().all():
            raise PartError(f"{what}.decode made what is not finite, of finite values")


def _shown(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
