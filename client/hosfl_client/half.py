"""The engine under a client: f_c(x; θ_c), forward only."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from safetensors import SafetensorError, safe_open

from hosfl_client.head_file import load_head
from hosfl_client.idle import Idle
from hosfl_client.manifest import HalfError, Input, Manifest

Batch = Mapping[str, np.ndarray]
"""What the half takes, by name: ``input_ids`` and ``attention_mask (B, S)``, or ``pixel_values (B, C, H, W)``."""
#: Seconds without a forward after which what the last ones have kept is given back.
IDLE = 1.0
Move = Callable[[int, np.ndarray], np.ndarray]
"""From a tensor's number in the manifest, and the tensor, to a new one of its shape and dtype."""


class Half(Protocol):
    """``f_c(x; θ_c)`` in some engine: four methods. Nothing of gradients is asked for."""

    def parameters(self) -> dict[str, np.ndarray]:
        """θ_c by name, in manifest order, a head's last; what is written into these arrays is what is read next."""

    def forward(self, batch: Batch) -> np.ndarray:
        """z ``(B, S, width)``, fp32."""

    def tapped(self, batch: Batch) -> tuple[np.ndarray, list[np.ndarray]]:
        """z, and the outputs of the layers that have a bottleneck of the side adapter, from the lowest up."""

    def perturbed(self, move: Move) -> AbstractContextManager[None]:
        """While open, forwards read ``move(i, θ_i)`` in place of θ_i, the head's left out; then θ again, as it was."""


class OnnxHalf:
    """A half that ``hosfl export-client`` wrote, in ONNX Runtime on the CPU.

    The trained tensors are inputs of the graph: a probe gives it others, and nothing is restored. What a forward needs
    is kept for the next one, until there was none for a second: without that a forward of 8 x 128 tokens takes twice
    the time, and its peak is higher, not lower.

    Args:
        path: ``phone.onnx``, or ``phone.json`` beside it.
        threads: That compute; None: one a core.

    Attributes:
        manifest: What was exported.
        head: Of a client that keeps its labels; None: the server has them.

    Raises:
        HalfError: A file is missing, another one or damaged.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        self.manifest = Manifest.load(path)
        folder = Path(path).parent
        self.manifest.check_files(folder)
        self._trained = _load(folder / self.manifest.weights, self.manifest)
        self.head = load_head(self.manifest, folder, self._trained)
        self._fed = [(name, given) for name, _, _, given in self.manifest.parameters if given]
        self._moved: dict[str, np.ndarray] | None = None
        self._session = _session(folder / self.manifest.graph, threads)
        _compare(self._session, self.manifest, folder / self.manifest.graph)
        release = weakref.WeakMethod(self.release)
        self._idle = Idle(lambda: (release() or _nothing)(), IDLE)
        weakref.finalize(self, self._idle.stop)

    def parameters(self) -> dict[str, np.ndarray]:
        """As `Half.parameters`."""
        return dict(self._trained)

    def forward(self, batch: Batch) -> np.ndarray:
        """As `Half.forward`.

        Raises:
            HalfError: The batch lacks an input, or has one of another shape; or ONNX Runtime fails.
        """
        return self._run(batch, [self.manifest.output])[0]

    def tapped(self, batch: Batch) -> tuple[np.ndarray, list[np.ndarray]]:
        """As `Half.tapped`; the list is empty where there is no side adapter."""
        z, *taps = self._run(batch, [self.manifest.output, *self.manifest.taps])
        return z, taps

    @contextmanager
    def perturbed(self, move: Move) -> Iterator[None]:
        """As `Half.perturbed`; beside θ is a second one while it is open."""
        self._moved = {name: move(i, self._trained[name]) for i, (name, _) in enumerate(self._fed)}
        try:
            yield
        finally:
            self._moved = None

    def release(self) -> None:
        """Give back what forwards have kept, by one forward on the smallest batch; nothing else runs meanwhile."""
        small = {
            one.name: np.ones([size if size > 0 else 1 for size in one.shape], one.dtype)
            for one in self.manifest.inputs
        }
        shrinking = ort.RunOptions()
        shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._session.run([self.manifest.output], self._feeds(small), shrinking)
        _trim()

    def _run(self, batch: Batch, wanted: list[str]) -> list[np.ndarray]:
        feeds = self._feeds(batch)
        with self._idle:
            try:
                found: list[np.ndarray] = self._session.run(wanted, feeds)
            except Exception as error:  # of no type in common
                raise HalfError(f"ONNX Runtime cannot run the half ({error!s:.300})") from error
        return found

    def _feeds(self, batch: Batch) -> dict[str, np.ndarray]:
        theta = self._moved or self._trained  # read once: a probe may end while another thread is here
        feeds = {given: theta[name] for name, given in self._fed}
        return feeds | {one.name: _taken(one, batch) for one in self.manifest.inputs}


def _nothing() -> None:
    """Of a half that is gone."""


@lru_cache(maxsize=1)
def _c_library() -> Any:
    return ctypes.CDLL(None)


def _trim() -> None:
    with suppress(AttributeError, OSError, TypeError):  # glibc's alone, which else keeps what was freed
        _c_library().malloc_trim(0)


def _taken(one: Input, batch: Batch) -> np.ndarray:
    if one.name not in batch:
        raise HalfError(f"the batch has no {one.name}, which the exported half takes")
    array = np.asarray(batch[one.name])
    fits = array.ndim == len(one.shape) and all(want in (-1, size) for want, size in zip(one.shape, array.shape))
    if not fits:
        raise HalfError(f"{one.name} has the shape {array.shape}, the exported half takes {one.shape} (-1: any)")
    return np.ascontiguousarray(array, one.dtype)


def _session(graph: Path, threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.enable_mem_pattern = False  # batches differ in length, and a pattern is kept for each
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors alone
    # Threads that spin between forwards cost a device its battery.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a class of its own for each reason
        raise HalfError(f"{graph}: ONNX Runtime does not take it ({error!s:.300})") from error


def _compare(session: Any, manifest: Manifest, graph: Path) -> None:
    inputs = [given for *_, given in manifest.parameters if given] + [one.name for one in manifest.inputs]
    if sorted(one.name for one in session.get_inputs()) != sorted(inputs):
        raise HalfError(f"{graph}: its inputs are not those of its manifest; export the half again")
    outputs = {one.name for one in session.get_outputs()}
    if not outputs.issuperset((manifest.output, *manifest.taps)):
        raise HalfError(f"{graph}: its outputs are not those of its manifest; export the half again")


def _load(path: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise HalfError(f"{path} is no safetensors file ({error}); export the half again") from error
    for name, shape, dtype, _ in manifest.parameters:
        held = found.get(name)
        if held is None or held.shape != shape or held.dtype != dtype:
            said = "nothing" if held is None else f"{held.dtype} {held.shape}"
            raise HalfError(f"{path}: {name} is {said}, the manifest says {dtype} {shape}; export the half again")
    if len(found) != len(manifest.parameters):
        raise HalfError(f"{path} holds tensors that the manifest does not name; export the half again")
    return {name: found[name] for name, *_ in manifest.parameters}
