"""The part of a user's LightningModule below a cut: watched while it trains, run again for probes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from hosfl_lightning.callbacks.cut_check import CutError, check_paths, client_parameters, leaves, refuse_compiled
from hosfl_lightning.optim.randomness import SameRandomness

Phase = Literal["idle", "forward", "backward", "replay"]
Replay = tuple[Callable[[], Any], SameRandomness]


class _CutReached(Exception):
    """Ends a replay; carries z. An Exception, because only those run the hooks that restore perturbed parameters."""

    def __init__(self, z: Tensor) -> None:
        self.z = z


class LowerPart:
    r"""``z = f_c(x; θ_c)``, whatever ``training_step`` computes before the module at the cut is called.

    While attached, ``training_step`` trains as before but for the cut, whose input becomes ``z.detach()``: backprop
    ends there, and ``z.grad`` is λ. `again` evaluates ``f_c`` on the same batch, under the same random state: it calls
    the innermost module that was running at the cut and holds θ_c, with the arguments it got, or else
    ``training_step`` itself, and stops at the cut.

    The first batch is traced: its graph must reach every parameter of θ_c before the cut and none after or around it.
    The graph's shape is looked at, not gradients, so that a path which is still gated by a zero is found too. For that
    batch the lower part keeps its graph as a first-order client would, with the saved tensors in host memory.

    Args:
        module: The user's module.
        cut: Dotted name of the submodule whose first differentiable input is z.
        client: Names or regular expressions of θ_c; a match ends at a dot or at the end of the parameter's name. None:
            every trainable parameter registered before the cut.
        context: The precision context of a forward.

    Raises:
        CutError: Names the setting that does not fit, here or at the first batch.
    """

    def __init__(
        self,
        module: LightningModule,
        cut: str,
        client: Sequence[str] | None,
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.module, self.cut, self.context = module, cut, context
        self.parameters = client_parameters(module, cut, client)
        refuse_compiled(module, cut, list(self.parameters))
        self._phase: Phase = "idle"
        self._traced = False
        self._place: int | str | None = None
        self._below: set[int] = set()
        self._anchor: Tensor | None = None
        self._running: list[tuple[nn.Module, Replay]] = []
        self._undo = ExitStack()
        self._undo.callback(self._require_grad, True)
        self._require_grad(False)

    def attach(self) -> None:
        """Watch ``training_step`` from now on."""
        handles = [self.module.get_submodule(self.cut).register_forward_pre_hook(self._at_cut, with_kwargs=True)]
        for holder in self.holders:
            # First of all hooks: a replay passes through the others again.
            handles.append(holder.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
            handles.append(holder.register_forward_hook(self._leave))
        for handle in handles:
            self._undo.callback(handle.remove)
        self._original = self.module.training_step

        @functools.wraps(self._original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._training_step(*args, **kwargs)

        self._undo.enter_context(replaced(training_step, (self.module, "training_step")))

    def detach(self) -> None:
        """Leave the module as it was found; forget the batch."""
        self._undo.close()
        self._anchor, self._running = None, []
        vars(self).pop("_replay", None)

    @property
    def holders(self) -> list[nn.Module]:
        """Modules around the cut and all of θ_c, outermost first, without the LightningModule itself.

        Under DDP that one is called with the arguments of ``training_step``, in a plain run with its own.
        """
        parts = self.cut.split(".")
        names = [".".join(parts[:depth]) for depth in range(1, len(parts))]
        held = [n for n in names if all(p.startswith(f"{n}.") for p in self.parameters)]
        return [self.module.get_submodule(name) for name in held]

    def take(self) -> tuple[Tensor, Tensor]:
        """``z`` and ``λ = ∂loss/∂z`` of the micro-batch, after its backward."""
        anchor, self._anchor = self._anchor, None
        self._phase = "idle"
        if anchor is None or anchor.grad is None:
            raise CutError(f"cut: the loss does not depend on the input of {self.cut!r}; choose another cut")
        return anchor.detach(), anchor.grad

    def again(self) -> Tensor:
        """``f_c`` of the last batch at the parameters as they are now; nothing else is changed by it."""
        function, same = self._replay
        return same(lambda: self._up_to_cut(function))

    def _up_to_cut(self, function: Callable[[], Any]) -> Tensor:
        self._phase = "replay"
        try:
            with silenced(self.module), self.context():
                function()
        except _CutReached as reached:
            return reached.z
        finally:
            self._phase = "idle"
        raise CutError(f"cut: {self.cut!r} is not reached when the same batch runs again, or an except clause in the "
                       "module swallowed the exception that ends a probe there")  # fmt: skip

    # ---- while the user's step runs

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._anchor, self._running = None, []
        self._replay = self._remember(functools.partial(self._original, *args, **kwargs))
        self._phase = "forward"
        try:
            with nullcontext() if self._traced else self._graph_below():
                output = self._original(*args, **kwargs)
                loss: Any = output["loss"] if isinstance(output, dict) else output
                if loss is not None:
                    self._check(loss)
        finally:
            # Activation checkpointing calls the cut once more, during backward.
            self._phase = "backward"
        return output

    def _check(self, loss: Tensor) -> None:
        if self._anchor is None:
            raise CutError(f"cut: training_step never called {self.cut!r} with a graph; choose a module that it calls "
                           "(under activation checkpointing: use_reentrant=False)")  # fmt: skip
        if not self._traced:
            check_paths(self.module, self.cut, self.parameters, self._below, leaves(loss))
            self._traced = True

    @contextmanager
    def _graph_below(self) -> Iterator[None]:
        """The lower part keeps a graph, its tensors in host memory, up to the cut."""

        def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
            return tensor.device, tensor.cpu() if self._anchor is None else tensor

        self._require_grad(True)
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[1].to(packed[0])):
                yield
        finally:
            self._require_grad(False)

    def _require_grad(self, required: bool) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(required)

    def _enter(self, holder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._phase == "forward" and self._anchor is None:
            self._running.append((holder, self._remember(functools.partial(holder, *args, **kwargs))))

    def _leave(self, holder: nn.Module, *_: Any) -> None:
        if self._running and self._running[-1][0] is holder:
            self._running.pop()

    def _remember(self, function: Callable[[], Any]) -> Replay:
        device = next(iter(self.parameters.values())).device
        return function, SameRandomness(self.module, device)

    def _at_cut(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._phase == "replay":
            raise _CutReached(self._smashed(args, kwargs))
        if self._phase == "idle" or not torch.is_grad_enabled():
            return None
        z = self._smashed(args, kwargs)
        anchor = z.detach().requires_grad_()
        if self._phase == "forward":
            if self._anchor is not None:
                raise CutError(f"cut: {self.cut!r} is called more than once in one training_step; choose another cut")
            self._below = set() if self._traced else leaves(z)
            self._anchor = anchor
            if self._running:
                self._replay = self._running[-1][1]
                self._running = []
        # A clone, so that the module may work in place (ReLU) without touching the anchor.
        inputs: dict[Any, Any] = {**dict(enumerate(args)), **kwargs, self._place: anchor.clone()}
        return tuple(inputs[i] for i in range(len(args))), {name: inputs[name] for name in kwargs}

    def _smashed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """z among the inputs: at the first batch the one with a graph, from then on the one in the same place."""
        inputs: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        if self._place is None:
            graphs = [place for place, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad]
            if not graphs:
                raise CutError(f"cut: no input of {self.cut!r} depends on {', '.join(list(self.parameters)[:3])}, ...; "
                               "choose another cut, or another client")  # fmt: skip
            self._place = graphs[0]
        return inputs[self._place]


@contextmanager
def replaced(function: Callable[..., Any], *places: tuple[object, str]) -> Iterator[None]:
    """Instance attributes that hide methods of the same name, until it is closed."""
    missing = object()
    saved = [vars(owner).get(name, missing) for owner, name in places]
    for owner, name in places:
        vars(owner)[name] = function
    try:
        yield
    finally:
        for (owner, name), value in zip(places, saved):
            if value is missing:
                del vars(owner)[name]
            else:
                vars(owner)[name] = value


def silenced(module: LightningModule) -> AbstractContextManager[None]:
    """``self.log`` and torchmetrics do nothing: user code that runs again has counted its batch already."""
    metrics = [m for m in module.modules() if isinstance(m, Metric | MetricCollection)]
    quiet = [(metric, name) for metric in metrics for name in ("update", "forward")]
    return replaced(lambda *_, **__: None, (module, "log"), *quiet)
