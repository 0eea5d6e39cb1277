"""Compiled halves: one graph of each shape, which reads θ as its input and so serves θ and every probe."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.halves import ServerHalf

SETTING = "model.init_args.compile"
#: Graphs of a process; one more fails by name, as an eager forward among compiled ones has other bits.
SHAPES = 256
BACKEND = "inductor"


def compile_half(half: nn.Module, what: str) -> None:
    """Compile a half in place: names, hooks and ``state_dict`` stay, and copies of it are plain.

    Shapes are no variables of the graph, nor do its kernels depend on a measurement: its bits are a function of the
    shape, so a run that goes on, which meets the shapes in another order, has those of one that was not interrupted.
    Of a server's half the layers are compiled; its head makes logits where a label is, in a number that varies.

    Args:
        half: A client's or a server's.
        what: Its name in an error.

    Raises:
        SplitError: There is no C++ compiler; later, from a forward, that the half cannot be compiled.
    """
    part = half.get_submodule(half.layer_path.backbone) if isinstance(half, ServerHalf) else half

    def plain(*args: Any, **kwargs: Any) -> Any:  # a frame of ours: torch's own are left out of graphs
        return part._call_impl(*args, **kwargs)

    fast = torch.compile(plain, fullgraph=True, dynamic=False, backend=BACKEND, options=_options())
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    limit = {"recompile_limit": SHAPES, "accumulated_recompile_limit": SHAPES, "fail_on_recompile_limit_hit": True}

    @functools.wraps(part._call_impl)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with config.patch(limit):
                return fast(*args, **kwargs)
        except FailOnRecompileLimitHit as error:
            raise SplitError(
                f"{SETTING}: {what} has met one shape too many; each is compiled, and a process makes {SHAPES} graphs "
                "at most: pad the data to few lengths, or set it to false"
            ) from error
        except TorchDynamoException as error:
            reason = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])
            raise SplitError(f"{SETTING}: {what} cannot be compiled ({reason}); set it to false") from error

    part._compiled_call_impl = call


def _options() -> dict[str, Any] | None:
    if BACKEND != "inductor":
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise SplitError(
            f"{SETTING}: there is no C++ compiler; install one (g++, clang) or name it in the variable CXX, or set "
            "it to false"
        ) from error
    # Loaded here: without compiled halves nobody waits for inductor.
    from hosfl_lightning.split.products import Products, has_products

    # Dropout draws what it draws eagerly.
    return {"fallback_random": True} | ({"post_grad_custom_pre_pass": Products()} if has_products() else {})


def compile_seconds() -> float:
    """What this process has spent compiling, in all."""
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent().get("total_wall_time", 0.0)
