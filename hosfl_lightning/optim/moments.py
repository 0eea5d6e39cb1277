"""The moments of clients that each keep their own, in one optimizer that a simulation runs them with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hosfl_lightning.optim.zeroth_order import ZerothOrder

Slots = dict[int, dict[str, Tensor]]
"""What is kept of each parameter, by its number and a name."""
Held = tuple[int, Slots]
"""Steps taken, and the moments of each parameter."""


class Moments:
    """Step counts and moments by client; what a client did in a round counts once the server has taken it (`commit`).

    Args:
        optimizer: Whose rule all clients have; between clients it holds no moments.
    """

    def __init__(self, optimizer: ZerothOrder) -> None:
        self.optimizer = optimizer
        self.held: dict[int, Held] = {}
        self._moved: dict[int, Held] = {}

    @contextmanager
    def of(self, client: int) -> Iterator[None]:
        """The optimizer is that client's inside."""
        steps, slots = self.held.get(client, (0, {}))
        slots = {**self.fresh, **slots}
        self._put(steps, {i: {name: t.clone() for name, t in held.items()} for i, held in slots.items()})
        try:
            yield
            self._moved[client] = self.optimizer.steps, self._take()
        finally:
            self._put(0, {})

    def commit(self, clients: Iterable[int]) -> None:
        """The round is over: keep what these clients did in it, and forget what the others did."""
        self.held |= {client: self._moved[client] for client in clients if client in self._moved}
        self._moved = {}

    def moved(self, client: int) -> dict[str, Tensor] | None:
        """What a client has done in a round that does not count yet, to be `put_back`; None: nothing."""
        if client not in self._moved:
            return None
        steps, slots = self._moved[client]
        flat = {f"{i}.{name}": t for i, held in slots.items() for name, t in held.items()}
        return {"steps": torch.tensor(steps), **flat}

    def put_back(self, client: int, state: Mapping[str, Tensor]) -> None:
        """What that client's state is now, as `moved` gave it.

        Raises:
            ValueError: It is of other parameters, or of another rule.
        """
        parameters, slots = self.optimizer.parameters, dict[int, dict[str, Tensor]]()
        for key, tensor in state.items():
            number, _, name = key.partition(".")
            if key == "steps":
                continue
            fits = number.isdecimal() and int(number) < len(parameters) and name in self.names
            if not fits or tensor.shape != (parameters[int(number)].numel(),):
                raise ValueError(f"the moments of {key:.80} are not those of this run")
            slots.setdefault(int(number), {})[name] = tensor.to(self.optimizer.device, copy=True)
        self.held[client] = int(state["steps"]), slots

    def tensors(self, client: int) -> list[Tensor]:
        """That client's moments, as of its last round that counted."""
        names = self.optimizer.rule.slots(self.optimizer.param_groups[0])
        slots = self.held.get(client, (0, {}))[1]
        return [held[name] for held in slots.values() for name in names if name in held]

    @property
    def names(self) -> tuple[str, ...]:
        """Of what is kept of a parameter."""
        return self.optimizer.rule.slots(self.optimizer.param_groups[0])

    @property
    def fresh(self) -> Slots:
        """What a client begins with that has not moved yet."""
        return {}

    def _take(self) -> Slots:
        state = self.optimizer.state
        return {i: dict(state[p]) for i, p in enumerate(self.optimizer.parameters) if p in state}

    def _put(self, steps: int, slots: Slots) -> None:
        for group in self.optimizer.param_groups:
            group["step"] = steps
        self.optimizer.state.clear()
        for number, parameter in enumerate(self.optimizer.parameters):
            if number in slots:
                self.optimizer.state[parameter] = slots[number]

    def state_dict(self) -> dict[int, Any]:
        """By client."""
        return {client: [steps, slots] for client, (steps, slots) in self.held.items()}

    def load_state_dict(self, state: dict[int, Any]) -> None:
        """Continue from `state_dict`."""
        device = self.optimizer.device
        self._moved = {}
        self.held = {
            client: (
                steps,
                {i: {name: t.to(device) for name, t in held.items()} for i, held in slots.items()},
            )
            for client, (steps, slots) in state.items()
        }
