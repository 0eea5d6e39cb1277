"""One measurement of a client without torch, in a process of its own: what `benchmarks.device` starts.

    python -m benchmarks.device_child imports
    python -m benchmarks.device_child forward | held | took  HALF TERMS EXAMPLES LENGTH REPEATS

prints JSON. Its interpreter needs `hosfl-client` and nothing else.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from benchmarks.device_script import TEXT, Script, forget_peak, held, memory, took


def main(role: str, *given: str) -> None:
    """One of them."""
    import hosfl_client.join  # noqa: F401  # what a client imports

    found: dict[str, Any] = {"imports": memory()["VmRSS"]}
    if role != "imports":
        half, terms, examples, length, repeats = given
        found |= ROLES[role](Client(Path(half), Path(terms), int(examples), int(length)), int(repeats))
    print(json.dumps(found))


class Client:
    """One whose server is a `Script`."""

    def __init__(self, half: Path, terms: Path, examples: int, length: int) -> None:
        from hosfl_client.apart import read_apart
        from hosfl_client.examples import DataSettings
        from hosfl_client.manifest import Manifest
        from hosfl_client.messages import FRAMES
        from hosfl_client.minibatches import Minibatches

        self.graph, self.manifest = half, Manifest.load(half)
        self.terms: Any = FRAMES.decode(terms.read_bytes(), "terms")
        settings = replace(DataSettings.of(self.manifest.data, batch_size=examples), sequence_length=length)
        assert self.manifest.tokenizer is not None
        with tempfile.TemporaryDirectory() as folder:
            (text := Path(folder) / "mine.txt").write_text(TEXT)
            self.batches = Minibatches(read_apart(text, settings, half.parent / self.manifest.tokenizer), settings)

    @cached_property
    def half(self) -> Any:
        """The client's own."""
        from hosfl_client.half import OnnxHalf

        return OnnxHalf(self.graph, 1)

    def join(self) -> Script:
        """It has its terms."""
        from hosfl_client.endpoint import Endpoint
        from hosfl_client.joined import Joined
        from hosfl_client.messages import FRAMES
        from hosfl_client.terms import ENDPOINTS

        half = self.half

        def build(terms: Any) -> Endpoint:
            return Endpoint(half, self.manifest, self.batches, terms)

        return Script(self.terms, Joined("a", "0", build, ENDPOINTS, FRAMES))

    @cached_property
    def session(self) -> Any:
        """ONNX Runtime's own, with the options that it has by itself, and one thread."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return ort.InferenceSession(str(self.graph), options, providers=["CPUExecutionProvider"])

    def forwards(self) -> list[Callable[[], Any]]:
        """What ONNX Runtime is asked for in a round: one forward and one a probe, or a second one with the taps."""
        from safetensors.numpy import load_file

        theta, names = load_file(self.graph.parent / self.manifest.weights), [self.manifest.output]
        feeds = {given: theta[name] for name, _, _, given in self.manifest.parameters} | self.batches(0).inputs
        session, probed = self.session, self.terms.settings["kind"] == "forward_only"
        wanted = [names] * self.terms.basis["probes"] if probed else [[*names, *self.manifest.taps]]
        return [partial(session.run, outputs, feeds) for outputs in [names, *wanted]]


def _forward(client: Client, repeats: int) -> dict[str, Any]:
    """The peak of one forward, the largest, in a process that has run none; and what is resident before it."""
    largest = client.forwards()[-1]
    before = memory()["VmRSS"]
    forget_peak()
    largest()
    return {"before": before, "peak": memory()["VmHWM"]}


def _held(client: Client, repeats: int) -> dict[str, Any]:
    """See `held`."""
    return held(client.join(), repeats)


def _took(client: Client, repeats: int) -> dict[str, Any]:
    """See `took`."""
    forwards = client.forwards()
    return took(client.join(), repeats, lambda: [forward() for forward in forwards])


ROLES = {"forward": _forward, "held": _held, "took": _took}

if __name__ == "__main__":
    main(*sys.argv[1:])
