"""What a client trains: θ_c, the moments of its rule, and the records that move them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, Protocol

import numpy as np

from hosfl_client.basis import Basis
from hosfl_client.basis_of import basis_of
from hosfl_client.bfloat16 import BFLOAT16, Array, Floats, cast, widen
from hosfl_client.refusals import CatchUpError
from hosfl_client.rules import RuleError, UpdateRule, rule_of

State = dict[str, Array]


class UpdateError(ValueError):
    """The record does not belong to the client that was to apply it."""


class Record(Protocol):
    """Of an `Update`, what moves θ_c."""

    @property
    def round(self) -> int:
        """In which its coefficients were measured."""

    @property
    def basis(self) -> dict[str, Any]:
        """How they are to be read."""

    @property
    def coefficients(self) -> Floats:
        """``(size of the basis,)`` fp32."""

    @property
    def rule(self) -> dict[str, Any]:
        """Name and hyper-parameters."""

    @property
    def step(self) -> int:
        """Number of the step, from 1 on."""


class Optimizer:
    """θ_c, in arrays that are somebody else's and move in place, and the moments.

    Args:
        parameters: Contiguous, fp32, bf16 or fp16; their order numbers the directions.
        rule: `rule_of` what the terms say; each record brings the settings of its round.
        seed: The run's.

    Raises:
        ValueError: An array that is not contiguous, or of another dtype.
    """

    def __init__(self, parameters: Sequence[Array], rule: UpdateRule, seed: int) -> None:
        for parameter in parameters:
            if not parameter.flags.c_contiguous or not parameter.flags.writeable:
                raise ValueError("an Optimizer needs contiguous arrays that can be written to: take copies of them")
            if parameter.dtype not in (np.float32, np.float16, BFLOAT16):
                raise ValueError(f"an Optimizer adds in fp32 and would truncate {parameter.dtype}")
        self.parameters, self.rule, self.seed = list(parameters), rule, seed
        self.steps = 0
        self.moments: State = {}

    @property
    def sizes(self) -> list[int]:
        """Elements of each tensor."""
        return [parameter.size for parameter in self.parameters]

    def prescribe(self, rule: Mapping[str, Any], what: str) -> None:
        """The steps to come follow what the server says of the rule: the learning rate of the round above all.

        Args:
            rule: Name and hyper-parameters, as a message carries them.
            what: The message, for the error.

        Raises:
            UpdateError: Another rule, or settings that it does not take.
        """
        self.rule = self._prescribed(rule, what)

    def apply(self, update: Record) -> None:
        """``θ ← rule(θ, Σ_p v̄_p b_p)`` with the hyper-parameters *of the record*: live, late or in a replay.

        Args:
            update: Of the same rule and run, the next step. Nothing has moved if this raises.

        Raises:
            UpdateError: Another rule, settings that it does not take, or not the next step.
            ValueError: A basis that is not known, or another number of coefficients than it has.
        """
        what = f"the update of round {update.round}"
        rule = self._prescribed(update.rule, what)
        missing = update.step - 1 - self.steps
        if missing:
            raise UpdateError(
                f"{what} is step {update.step}, the client has taken {self.steps}: "
                + (f"apply the {missing} missing before it, in order" if missing > 0 else "it was applied already")
            )
        basis = basis_of(update.basis, self.seed, update.round, self.sizes)
        coefficients = np.asarray(update.coefficients, np.float32)
        if coefficients.shape != (basis.size,):
            raise ValueError(f"{what} needs {basis.size} coefficients, got {[*coefficients.shape]}")
        self.rule = rule
        self.step(basis, coefficients)

    def step(self, basis: Basis, coefficients: Floats) -> None:
        """One step of the rule, as it is, along ``basis``."""
        self.steps += 1
        for number, parameter in enumerate(self.parameters):
            for name in (f"{number}.{slot}" for slot in self.rule.slots):
                if name not in self.moments:
                    self.moments[name] = np.zeros(parameter.size, np.float32)
        flat = [parameter.reshape(-1) for parameter in self.parameters]
        for number, piece, gradient in basis.chunks(coefficients, self.sizes):
            state: dict[str, Floats] = {slot: self.moments[f"{number}.{slot}"][piece] for slot in self.rule.slots}
            part = flat[number][piece]
            wide = part if part.dtype == np.float32 else widen(part)
            self.rule.update(wide, gradient, state, self.steps)
            if wide is not part:
                cast(wide, part)

    def state(self) -> State:
        """θ_c and the moments, ``number.theta`` and ``number.slot``: the arrays themselves."""
        return {f"{number}.theta": p for number, p in enumerate(self.parameters)} | self.moments

    def load(self, state: Mapping[str, Array], steps: int) -> None:
        """Go on from a `state` after so many updates, which is copied.

        Raises:
            CatchUpError: It is of other tensors. Nothing has moved then.
        """
        forms = {f"{number}.theta": (p.shape, p.dtype) for number, p in enumerate(self.parameters)}
        expected = dict(forms)
        for number, parameter in enumerate(self.parameters):
            for slot in self.rule.slots:
                expected[f"{number}.{slot}"] = ((parameter.size,), np.dtype(np.float32))
        if not forms.keys() <= state.keys() <= expected.keys():
            raise CatchUpError(
                f"a state of {len(state)} tensors, this client trains {len(forms)}, or with another rule"
            )
        for name, array in state.items():
            if (array.shape, array.dtype) != expected[name]:
                raise CatchUpError(
                    f"a state whose tensor {name} is {array.dtype} {[*array.shape]}, not that of the run"
                )
        self.steps = steps
        self.moments = {name: array.copy() for name, array in state.items() if name not in forms}
        for number, parameter in enumerate(self.parameters):
            parameter[...] = state[f"{number}.theta"]

    def digest(self) -> str:
        """SHA-256 of the step count and of the bits of the `state`: what clients that are up to date agree on."""
        total = sha256(json.dumps(self.steps).encode())
        for name, array in sorted(self.state().items()):
            total.update(name.encode())
            total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return total.hexdigest()

    def _prescribed(self, rule: Mapping[str, Any], what: str) -> UpdateRule:
        own = type(self.rule).__name__
        if rule.get("name") != own:
            raise UpdateError(f"{what} is for the rule {rule.get('name')!s:.80}, the client's is {own}")
        try:
            return rule_of(rule, what)
        except RuleError as error:
            raise UpdateError(str(error)) from error
