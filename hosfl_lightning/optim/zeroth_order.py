"""ZerothOrder: a ``torch.optim.Optimizer`` that needs forward evaluations only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from hosfl_lightning.optim.basis import Basis, SharedDirections
from hosfl_lightning.optim.compiled import compiled_around, eager
from hosfl_lightning.optim.estimators import (
    ESTIMATORS,
    Estimator,
    EstimatorError,
    Probes,
    chosen,
    measured,
)
from hosfl_lightning.optim.probing import dual_layerwise, perturbed_in_place, perturbed_layerwise
from hosfl_lightning.optim.randomness import Evaluations, SameRandomness
from hosfl_lightning.optim.readers import Readers
from hosfl_lightning.optim.rules import SGD, UpdateRule, check_rule
from hosfl_lightning.rng import DISTRIBUTIONS, round_coefficient


class ZerothOrder(torch.optim.Optimizer):
    r"""``ĝ = (1/P) Σ_p v_p u_p``, then ``rule`` on θ; ``v_p`` are projected gradients measured by forwards.

    ``E[ĝ]`` is the gradient of ``f`` (up to the estimator's bias); its cosine with the gradient is about ``√(P/d)``.
    No ``.grad`` is ever made, no direction is ever stored, the random state of torch is left alone: directions come
    from the counter generator under ``(seed, step, p)``.

    In a plain loop, or under Lightning's manual optimization, or under Fabric::

        zo = ZerothOrder(model.parameters(), AdamW(lr=1e-3), module=model, probes=8)
        zo.step(lambda: loss_fn(model(x), y))          # P + 1 evaluations, as LBFGS calls its closure

    Apart, when the values are measured elsewhere (a split round)::

        v = zo.project(objective)                      # (P,) or (P, K), fp64; θ has its old bits afterwards
        zo.record(v)                                   # the scalars to apply
        zo.step()

    Learning rate, hyper-parameters, seed and step live in ``param_groups``, moments in ``state``: ``state_dict``
    carries all of it. Under ``lightning.Trainer`` every closure call fires ``on_before_optimizer_step``; with `record`
    there is one call a step. Call `project` and `record` on the raw optimizer (``opt.optimizer``), not on Lightning's
    wrapper.

    Args:
        params: Parameters, named parameters or groups; their order is the manifest of the directions.
        rule: What to do with ``ĝ``: `SGD`, `AdamW` of `hosfl_lightning.optim.rules`.
        module: The module the objective runs, submodule by submodule. Then probes are layer-wise, the extra memory is
            its largest leaf, and norm statistics do not see the probes. Without it, or where it is compiled, all
            parameters are perturbed at once beside a copy of their bits.
        probes: ``P``, directions a step.
        mu: ``μ``, smoothing length; rounded once to what the distribution multiplies exactly.
        estimator: ``forward`` (``P + 1`` evaluations, the paper's), ``central`` (``2P``), ``jvp`` (``P`` with dual
            numbers, exact, ``μ`` unused; needs ``module``), or an `Estimator` of one's own.
        distribution: ``rademacher`` or ``gauss16``.
        seed: 64-bit seed of the directions.
        first_tensor: Number of the first tensor in the directions; the server's follow the client's.

    Raises:
        EstimatorError: ``jvp`` without a module.
        ValueError: For a setting out of range; the message names it.

    Reference: HO-SFL, arXiv 2603.14773; MeZO, arXiv 2305.17333.
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: UpdateRule | None = None,
        *,
        module: nn.Module | None = None,
        probes: int = 2,
        mu: float = 1e-3,
        estimator: Estimator | str = "forward",
        distribution: str = "rademacher",
        seed: int = 0,
        first_tensor: int = 0,
    ) -> None:
        estimator = check_probe_settings(probes, mu, estimator, distribution, ESTIMATORS)
        self.estimator = ESTIMATORS[estimator] if isinstance(estimator, str) else estimator
        if self.estimator.dual and module is None:
            raise EstimatorError(
                f"estimator: {estimator} puts dual numbers in the place of parameters: pass module=, whose forward the "
                "objective runs, or take central"
            )
        self.rule = rule if rule is not None else SGD()
        check_rule(self.rule, "rule")
        self.module, self.first_tensor = module, first_tensor
        # A graph reads the parameters as its inputs and runs no hook of a layer.
        self.compiled = False
        # A list, mutated in place: Lightning's wrappers copy attributes on write but share what an attribute refers to.
        self._recorded: list[tuple[Basis, Tensor]] = []
        self._known: tuple[list[Any], Readers] | None = None
        #: Numbers of the tensors that probes move; None: all of them. The gradient of the others is known.
        self.probed: set[int] | None = None
        super().__init__(params, {**self.rule.hyper_parameters(), "step": 0})
        self.param_groups[0].update(probes=probes, mu=mu, distribution=distribution, seed=seed)
        self.basis(0)  # refuses a seed out of range

    @override
    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's tensors are numbered after those already there.

        Raises:
            ValueError: A parameter is not contiguous, is wider than fp32, or is not in ``module``.
        """
        super().add_param_group(param_group)
        known = None if self.module is None else {id(p) for p in self.module.parameters()}
        for parameter in self.param_groups[-1]["params"]:
            if not parameter.is_contiguous():
                raise ValueError("ZerothOrder needs contiguous parameters: directions are numbered in row-major order")
            if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"ZerothOrder adds in fp32 and would truncate {parameter.dtype}: use module.float()")
            if known is not None and id(parameter) not in known:
                raise ValueError("ZerothOrder got a parameter that is not in module= and would never be perturbed: "
                                 "pass the module that holds them all, or module=None")  # fmt: skip
        if self.module is not None:
            ours = {id(p) for p in self.parameters}
            names = [name for name, p in self.module.named_parameters() if id(p) in ours]
            self.compiled = compiled_around(self.module, names) is not None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters; the position of a tensor here is its number in the directions."""
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parameters[0].device

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self.param_groups[0]["step"]

    @property
    def prescription(self) -> dict[str, Any]:
        """The rule's name and its hyper-parameters now, one set for all groups: what a message says of it."""
        group = self.param_groups[0]
        return {"name": type(self.rule).__name__, **{name: group[name] for name in self.rule.hyper_parameters()}}

    def basis(self, round: int, probes: int | None = None) -> SharedDirections:
        """The directions of one round, ``P`` or another number; `step` on its own uses the number of steps taken."""
        group = self.param_groups[0]
        probes = probes or group["probes"]
        return SharedDirections(group["seed"], round, probes, group["distribution"], self.first_tensor)

    @property
    def mu(self) -> float:
        """``μ``, rounded so that ``μ · u`` is exact in fp32."""
        group = self.param_groups[0]
        return float(round_coefficient(group["mu"], DISTRIBUTIONS[group["distribution"]]))

    @property
    def smoothing(self) -> float | None:
        """`mu` of the coefficients that are measured; None: there are none, or exact ones."""
        return self.mu if self.estimator.smoothed and self.probed != set() else None

    def perturbed(self, basis: SharedDirections, probe: int, scale: float) -> AbstractContextManager[None]:
        """While it is open, the objective sees ``θ + scale · u_probe``; afterwards θ has its saved bits."""
        stream, alpha = basis.streams[probe], torch.tensor(scale, dtype=torch.float32, device=self.device)
        readers = self.readers()
        if readers.together is not None:
            return readers.together.perturbed(stream, alpha)
        if self.module is None or self.compiled:
            return perturbed_in_place(readers, stream, alpha)
        return perturbed_layerwise(self.module, readers, stream, alpha)

    @contextmanager
    def dual(self, basis: SharedDirections, probe: int) -> Iterator[None]:
        """While it is open, the objective sees the dual numbers ``θ + ε u_probe``; what is compiled runs eagerly."""
        assert self.module is not None  # as __init__ asks
        with eager(self.compiled), dual_layerwise(self.module, self.readers(), basis.streams[probe]):
            yield

    def readers(self) -> Readers:
        """Who reads what the probes move, looked up once for as long as that is the same tensors."""
        parameters, probed = self.parameters, self.probed
        key = [probed and frozenset(probed), *((id(p), p.dtype, p.device) for p in parameters)]
        if self._known is None or self._known[0] != key:
            self._known = key, Readers(parameters, probed)
        return self._known[1]

    @torch.no_grad()
    def project(
        self, objective: Callable[[], Tensor], *, basis: SharedDirections | None = None, base: Tensor | None = None
    ) -> Tensor:
        """Projected gradients of ``objective`` along the basis; parameters, modes and random state are left as found.

        Args:
            objective: ``f`` at the current parameters, a scalar or one value a client ``(K,)``.
            basis: Default: the directions of the next step.
            base: ``f(θ)`` when known, which saves a forward of the forward difference.

        Returns:
            ``(P,)`` or ``(P, K)``, fp64.
        """
        same = SameRandomness(self.module, self.device)
        return self._project(lambda: same(objective), basis or self.basis(self.steps), base)

    def record(self, coefficients: Tensor, basis: Basis | None = None) -> None:
        """Keep the coefficients that the next `step` applies.

        Args:
            coefficients: ``(basis.size,)``, averaged over clients.
            basis: Default: the directions of the next step.

        Raises:
            ValueError: Another shape.
        """
        basis = basis or self.basis(self.steps)
        if coefficients.shape != (basis.size,):
            raise ValueError(f"the update needs one coefficient per direction, ({basis.size},), got "
                             f"{tuple(coefficients.shape)}: average over clients, a loss must be a scalar")  # fmt: skip
        self._recorded[:] = [(basis, coefficients.detach().to(self.device, torch.float32))]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from what was recorded, else from ``closure`` evaluated at θ and at the probes.

        Returns:
            The closure's value at θ, or None. Where the estimator is `symmetric`, as central is, the mean of its values
            at θ ± μ u_p, ``f(θ) + O(μ²)``, which saves a forward (but where ``module`` has norm statistics to move).

        Raises:
            RuntimeError: Nothing was recorded and there is no closure, or it returns no loss.
        """
        if self._recorded:
            loss = closure() if closure is not None else None
        else:
            first = partial(_asked, closure)
            values, loss = self.measure(Evaluations(SameRandomness(self.module, self.device), first))
            self.record(values)
        self._update(*self._recorded.pop())
        return loss

    @torch.no_grad()
    def measure(self, evaluations: Evaluations) -> tuple[Tensor, Tensor]:
        """Projected gradients along the directions of the next step, and the loss.

        Args:
            evaluations: Of ``f``; the first is at ``θ``, or where the estimator is `symmetric` and no norm statistics
                move at ``θ + μ u_1``.

        Returns:
            ``(P,)`` fp64, and ``f(θ)``, or the mean of all evaluations where none is at ``θ``.
        """
        seen: list[Tensor] = []

        def objective() -> Tensor:
            value = evaluations()
            seen.append(value.detach())
            return value

        # Norm statistics are those at θ, whatever the estimator.
        base = None if self.estimator.symmetric and not evaluations.same.norms else evaluations().detach()
        values = self._project(objective, self.basis(self.steps), base)
        return values, torch.stack(seen).double().mean(0).to(seen[0].dtype) if base is None else base

    def _project(self, objective: Callable[[], Tensor], basis: SharedDirections, base: Tensor | None) -> Tensor:
        probes = Probes(basis.size, self.mu, partial(self.perturbed, basis), partial(self.dual, basis))
        values, readers = measured(self.estimator, objective, probes, base), self.readers()
        if self.estimator.smoothed and not readers.effective:  # the host waits until then, and not in every step
            readers.effective = bool(values.any())
            if not readers.effective:
                self.check_seen(objective, basis)
        return values

    def check_seen(self, objective: Callable[[], Tensor], basis: SharedDirections) -> None:
        """Of probes that gave nothing but zeros: raise `UnseenProbeError` unless the objective runs what they move."""
        if self.module is not None:
            alpha = torch.tensor(self.mu, dtype=torch.float32, device=self.device)
            with eager(self.compiled), perturbed_layerwise(self.module, self.readers(), basis.streams[0], alpha):
                objective()

    @override
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments stay fp32: torch casts them to the parameter's dtype, too narrow in bf16."""
        super().load_state_dict(state_dict)
        numbered = [i for group in state_dict["param_groups"] for i in group["params"]]
        for number, parameter in zip(numbered, self.parameters):
            for slot, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][slot] = value.to(parameter.device, copy=True)

    def _update(self, basis: Basis, coefficients: Tensor) -> None:
        for group in self.param_groups:
            group["step"] += 1
        parameters = self.parameters
        groups = [group for group in self.param_groups for _ in group["params"]]
        for tensor, piece, gradient in basis.chunks(parameters, coefficients):
            self._update_piece(parameters[tensor], piece, gradient, groups[tensor])
        # Autocast may hold casts of the old parameters, made without a graph, until its outermost context ends.
        torch.clear_autocast_cache()

    def _update_piece(self, parameter: Tensor, piece: slice, gradient: Tensor, group: dict[str, Any]) -> None:
        slots = self.rule.slots(group)
        state = self.state[parameter] if slots else {}
        for slot in slots:
            if slot not in state:
                state[slot] = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        flat = parameter.detach().view(-1)[piece]
        wide = flat.float()  # fp32 already: the same memory, updated in place
        self.rule.update_(wide, gradient, {slot: state[slot][piece] for slot in slots}, group["step"], group)
        if wide is not flat:
            flat.copy_(wide)


def _asked(closure: Callable[[], Any] | None) -> Tensor:
    loss = None if closure is None else closure()
    if loss is None:
        raise RuntimeError("ZerothOrder.step() has nothing to apply: pass a closure that returns the loss, or record() "
                           "coefficients first")  # fmt: skip
    return loss


def check_probe_settings(
    probes: int,
    mu: float,
    estimator: Estimator | str,
    distribution: str,
    estimators: Iterable[str] = ("forward", "central"),
) -> Estimator | str:
    """Refuse what no step could use; ``estimators`` are those that the caller can serve.

    Returns:
        The estimator: one that ships by its name, one of somebody's own as an instance.

    Raises:
        ValueError: Names the setting and what it may be.
    """
    SharedDirections(0, 0, probes, distribution)
    fp32 = torch.finfo(torch.float32)
    if not fp32.tiny <= mu <= fp32.max:
        raise ValueError(f"mu must be > 0 and finite in fp32, got {mu}")
    return chosen(estimator, estimators)
