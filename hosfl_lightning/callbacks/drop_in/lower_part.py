"""The part of a user's LightningModule below a cut: watched while it trains, run again for probes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from hosfl_lightning.callbacks.drop_in.batch_state import BatchState, Replay
from hosfl_lightning.callbacks.drop_in.cut_check import (
    CutError,
    check_passes,
    check_paths,
    client_parameters,
    leaves,
    refuse_compiled,
    refuse_unfrozen,
)
from hosfl_lightning.callbacks.drop_in.lower_graph import ArrivingGradients, graph_below
from hosfl_lightning.callbacks.drop_in.silence import replaced, silenced
from hosfl_lightning.optim.randomness import SameRandomness

Phase = Literal["idle", "forward", "backward", "replay"]


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
    The graph's shape is looked at, not gradients, so that a path which is still gated by a zero is found too. Of the
    tensors that this graph would save, none is kept; to verify, they are, in host memory, and backprop goes on below
    the cut that once: what is `arriving` is the gradient of θ_c as the module has it without a cut.

    Args:
        module: The user's module.
        cut: Dotted name of the submodule whose first differentiable input is z.
        client: Names or regular expressions of θ_c; a match ends at a dot or at the end of the parameter's name. None:
            every trainable parameter registered before the cut.
        context: The precision context of a forward.
        verify: Let gradients arrive below the cut until whoever compares them says that nothing is `unverified`.

    Raises:
        CutError: Names the setting that does not fit, here or at the first batch.
    """

    def __init__(
        self,
        module: LightningModule,
        cut: str,
        client: Sequence[str] | None,
        context: Callable[[], AbstractContextManager[Any]],
        verify: bool = False,
    ) -> None:
        self.module, self.cut, self.context, self.unverified = module, cut, context, verify
        refuse_compiled(module, cut, [])  # which renames what is in it
        self.parameters = client_parameters(module, cut, client)
        refuse_compiled(module, cut, list(self.parameters))
        self._phase: Phase = "idle"
        self._traced = False
        self._works_in_place = True
        self._given: Tensor | None = None
        self._place: int | str | None = None
        self._below: set[int] = set()
        self._batch = BatchState()
        self._left = 0
        self.arriving = ArrivingGradients([])
        self._undo = ExitStack()
        self._undo.callback(self._require_grad, True)
        self._require_grad(False)

    def attach(self) -> None:
        """Watch ``training_step`` from now on."""
        # First of all hooks: those at the cut are above it, and a replay of a holder passes through its others again.
        cut = self.module.get_submodule(self.cut)
        # The upper part may be compiled, and a compiled module takes its hooks into the graph.
        at_cut = self._at_cut if cut._compiled_call_impl is None else torch.compiler.disable(self._at_cut)
        handles = [cut.register_forward_pre_hook(at_cut, prepend=True, with_kwargs=True)]
        for holder in self.holders:
            handles.append(holder.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
            handles.append(holder.register_forward_hook(self._leave))
        for handle in handles:
            self._undo.callback(handle.remove)
        if self.unverified:  # not earlier: autograd remembers on which device a parameter was
            self._require_grad(True)
            self.arriving = ArrivingGradients(list(self.parameters.values()))
            self._undo.callback(self.arriving.remove)
            self._require_grad(False)
        self._original = self.module.training_step

        @functools.wraps(self._original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._training_step(*args, **kwargs)

        self._undo.enter_context(replaced(training_step, (self.module, "training_step")))

    def detach(self) -> None:
        """Leave the module as it was found; forget the batch."""
        self._undo.close()
        self._batch = BatchState()

    @property
    def holders(self) -> list[nn.Module]:
        """Modules around the cut and all of θ_c, outermost first, without the LightningModule itself.

        Under DDP that one is called with the arguments of ``training_step``, in a plain run with its own.
        """
        parts = self.cut.split(".")
        names = [".".join(parts[:depth]) for depth in range(1, len(parts))]
        held = [n for n in names if all(p.startswith(f"{n}.") for p in self.parameters)]
        return [self.module.get_submodule(name) for name in held]

    @property
    def untaken(self) -> bool:
        """There was a forward, and no backward that was heard of."""
        return self._batch.anchor is not None

    def check(self, loss: Tensor) -> None:
        """What is about to be differentiated depends on θ_c through z alone.

        Raises:
            CutError: Names what does not fit.
        """
        self._phase = "backward"
        check_passes(self.cut, self._batch.passes)
        if not self._traced:
            above = leaves(loss, end=self._batch.anchor)
            check_paths(self.module, self.cut, self.parameters, self._below, above)
            self._traced = True
            self._works_in_place = self._given is None or self._given._version > 0
            self._given = None

    def take(self) -> tuple[Tensor, Tensor]:
        """``z`` and ``λ = ∂loss/∂z`` of the micro-batch, after its backward."""
        anchor = self._batch.anchor
        self.rest()
        if anchor is None or anchor.grad is None:
            raise CutError(f"cut: the loss does not depend on the input of {self.cut!r}; choose another cut")
        return anchor.detach(), anchor.grad

    def rest(self) -> None:
        """Backprop is over, or will not come; the batch may still be run again."""
        self._batch.anchor, self._phase = None, "idle"
        self._require_grad(False)

    def forget(self) -> None:
        """The batch is over, and nobody runs it again."""
        self.rest()
        self._batch = BatchState()

    def again(self) -> Tensor:
        """``f_c`` of the last batch at the parameters as they are now; nothing else is changed by it."""
        return self._replay.same(self._up_to_cut)

    @property
    def _replay(self) -> Replay:
        assert self._batch.replay is not None
        return self._batch.replay

    def vjp(self, multiplier: Tensor) -> list[Tensor]:
        """``∂⟨λ, f_c(x; θ_c)⟩/∂θ_c`` of the last batch by a replay with a graph, its tensors in host memory.

        Args:
            multiplier: λ, of the shape of z.
        """
        parameters = list(self.parameters.values())

        def differentiate() -> tuple[Tensor | None, ...]:
            with torch.enable_grad(), self._graph():
                z = self._up_to_cut()
            if not z.requires_grad:
                return (None,) * len(parameters)
            return torch.autograd.grad(z, parameters, multiplier, allow_unused=True)

        try:
            found = self._replay.same(differentiate)
        finally:
            self.rest()
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]

    def _up_to_cut(self) -> Tensor:
        self._phase, self._left = "replay", self._batch.skipped
        try:
            with silenced(self.module), self.context():
                self._replay.function()
        except _CutReached as reached:
            return reached.z
        finally:
            self._phase = "idle"
        raise CutError(f"cut: {self.cut!r} is not reached when the same batch runs again, or an except clause in the "
                       "module swallowed the exception that ends a probe there")  # fmt: skip

    # ---- while the user's step runs

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.arriving.clear()
        self._batch = BatchState()
        self._batch.replay = self._remember(functools.partial(self._original, *args, **kwargs))
        self._phase = "forward"
        try:
            with nullcontext() if self._traced and not self.unverified else self._graph():
                return self._original(*args, **kwargs)
        finally:
            # Activation checkpointing calls the cut once more, during backward.
            if self._phase == "forward":
                self._phase = "backward"

    @contextmanager
    def _graph(self) -> Iterator[None]:
        self._require_grad(True)
        with graph_below(lambda: self._batch.anchor is None, self.unverified):
            yield

    def _require_grad(self, required: bool) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(required)

    def _enter(self, holder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._phase == "forward" and self._batch.anchor is None:
            self._batch.running.append((holder, self._remember(functools.partial(holder, *args, **kwargs))))

    def _leave(self, holder: nn.Module, *_: Any) -> None:
        if self._batch.running and self._batch.running[-1][0] is holder:
            self._batch.running.pop()

    def _remember(self, function: Callable[[], Any]) -> Replay:
        device = next(iter(self.parameters.values())).device
        return Replay(function, SameRandomness(self.module, device), self._batch.calls)

    def _at_cut(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._phase == "replay":
            if not self._left:
                raise _CutReached(self._smashed(args, kwargs))
            self._left -= 1  # one of the user's own passes without a graph
            return None
        self._batch.calls += self._phase == "forward"
        if self._phase == "idle" or not torch.is_grad_enabled():
            return None
        self._batch.passes += self._phase == "forward"
        if self._phase == "forward" and self._batch.passes > 1:
            return None
        z = self._smashed(args, kwargs)
        lifted = z.clone() if self.unverified else z.detach().requires_grad_()
        # A clone, until it is known that no module works in place (ReLU) on what it is given here.
        given = lifted.clone() if self._works_in_place else lifted
        if self._phase == "forward":
            self._meet(z, lifted, given)
        inputs: dict[Any, Any] = {**dict(enumerate(args)), **kwargs, self._place: given}
        return tuple(inputs[i] for i in range(len(args))), {name: inputs[name] for name in kwargs}

    def _meet(self, z: Tensor, anchor: Tensor, given: Tensor) -> None:
        if not self._traced:
            self._below, self._given = leaves(z), given
        elif z.requires_grad:
            refuse_unfrozen(self.module, self.cut, self.parameters, z)
        anchor.retain_grad()
        self._batch.anchor = anchor
        if self._batch.running:
            self._batch.replay = self._batch.running[-1][1]
            self._batch.running = []
        elif not self.module.automatic_optimization:
            raise CutError(
                f"cut: under manual optimization a probe must not run training_step again, with its optimizer steps; "
                f"put {self.cut!r} and the modules below it into one submodule that training_step calls"
            )
        self._batch.skipped = self._batch.calls - self._replay.calls - 1

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
