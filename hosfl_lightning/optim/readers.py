"""Which submodule reads which parameters in its own forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

from torch import nn

from hosfl_lightning.optim.submodules import submodules
from hosfl_lightning.optim.together import Together

Owned = list[tuple[int, nn.Parameter]]
"""Tensors with their number in the directions."""


class Readers:
    """The submodules that read some of ``parameters``, looked up once for as long as a module is built alike.

    Args:
        parameters: The position of each is its number in the directions.
        only: Numbers of the tensors that count; None: all.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], only: Set[int] | None = None) -> None:
        self.parameters = list(parameters)
        self.index = {id(p): i for i, p in enumerate(self.parameters) if only is None or i in only}
        #: Moves them all at once, whoever reads them, where they are few.
        self.together = Together.of({i: self.parameters[i] for i in self.index.values()})
        #: Whether a probe has moved the objective yet.
        self.effective = False
        self._seen: list[object] = []
        self._found: list[tuple[nn.Module, Owned]] = []

    def of(self, module: nn.Module) -> list[tuple[nn.Module, Owned]]:
        """Each with what it reads; a submodule or a parameter that was put in, taken out or tied since is seen."""
        built = _parts(module)
        if len(built) != len(self._seen) or any(a is not b for a, b in zip(built, self._seen)):
            self._found = list(self._look(module))
            self._seen = built  # held, so that no other object comes to lie where one of them lay
        return self._found

    def _look(self, module: nn.Module) -> Iterator[tuple[nn.Module, Owned]]:
        for reader in module.modules():
            owned = [(self.index[id(p)], p) for p in _read_by(reader) if id(p) in self.index]
            if owned:
                yield reader, owned


def _parts(module: nn.Module) -> list[object]:
    """Of what a module is built, in order."""
    return [part for one in submodules(module) for part in (one, *one._parameters.values())]


def _read_by(module: nn.Module) -> Iterator[nn.Parameter]:
    """What the forward of ``module`` reads itself: its own parameters and those of children that nobody calls."""
    yield from module.parameters(recurse=isinstance(module, nn.MultiheadAttention))
    for child in module.children():
        if type(child).forward is nn.Module.forward:  # a ParameterList or ParameterDict
            yield from _read_by(child)
