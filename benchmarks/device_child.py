"""One measurement of a client without torch, in a process of its own: what `benchmarks.device` starts.

    python -m benchmarks.device_child imports | forward | waiting | round  HALF TERMS EXAMPLES LENGTH REPEATS

prints JSON. Its interpreter has `hosfl-client` and nothing else.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import contextmanager
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.device_script import Script, forget_peak, memory


def main(role: str, half: str, terms: str, examples: str, length: str, repeats: str) -> None:
    """One of them."""
    import hosfl_client.join  # what a client imports

    found: dict[str, Any] = {"imports": memory()}
    if role != "imports":
        found |= ROLES[role](Client(Path(half), Path(terms), int(examples), int(length)), int(repeats))
    print(json.dumps(found))


class Client:
    """One whose examples are random letters, and whose server is a `Script`."""

    def __init__(self, half: Path, terms: Path, examples: int, length: int) -> None:
        from hosfl_client.endpoint import Endpoint
        from hosfl_client.examples import DataSettings, read_examples
        from hosfl_client.half import OnnxHalf
        from hosfl_client.messages import FRAMES
        from hosfl_client.minibatches import Minibatches
        from hosfl_client.text import Text

        self.graph, self.half, self.terms = half, OnnxHalf(half, 1), FRAMES.decode(terms.read_bytes(), "terms")
        manifest = self.half.manifest
        settings = replace(DataSettings.of(manifest.data, batch_size=examples), sequence_length=length)
        with tempfile.TemporaryDirectory() as folder:
            (text := Path(folder) / "mine.txt").write_text("the quick brown fox jumps over the lazy dog; " * 80)
            rows = read_examples(text, settings, Text(half.parent / manifest.tokenizer))
        self.batches = Minibatches(rows, settings)
        self.endpoint = lambda terms: Endpoint(self.half, manifest, self.batches, terms)

    def join(self) -> Script:
        """It has its terms."""
        from hosfl_client.joined import Joined
        from hosfl_client.messages import FRAMES
        from hosfl_client.terms import ENDPOINTS

        return Script(self.terms, Joined("a", "0", self.endpoint, ENDPOINTS, FRAMES, None))

    def forwards(self) -> list[tuple[Any, list[str], dict[str, Any]]]:
        """What ONNX Runtime itself is asked for in a round: one forward and one a probe, or one with the taps.

        Its session has the options that it has by itself, and one thread.
        """
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = ort.InferenceSession(str(self.graph), options, providers=["CPUExecutionProvider"])
        manifest, theta = self.half.manifest, self.half.parameters()
        feeds = {given: theta[name] for name, _, _, given in manifest.parameters} | self.batches(0).inputs
        probes = self.terms.basis["probes"] if self.terms.settings["kind"] == "forward_only" else 1
        return [(session, [manifest.output], feeds)] + [(session, [manifest.output, *manifest.taps], feeds)] * probes


def forward(client: Client, repeats: int) -> dict[str, Any]:
    """The peak of one forward, the first, beside what is resident before it."""
    session, wanted, feeds = client.forwards()[-1]
    before = memory()
    forget_peak()
    session.run(wanted, feeds)
    return {"before": before, "peak": memory()["VmHWM"]}


def waiting(client: Client, repeats: int) -> dict[str, Any]:
    """What is resident in a round, and its peak; the median of some rounds."""
    script = client.join()
    rounds: list[dict[str, int]] = []
    for number in range(repeats):
        idle = memory()["VmRSS"]
        forget_peak()
        answer = script.ask(script.step(number))
        waits = memory()["VmRSS"]
        sent = memory()["VmHWM"]
        frame = script.multiplier(number, answer)
        del answer
        forget_peak()
        before = memory()["VmRSS"]
        answer = script.ask(frame)
        answered = memory()["VmHWM"]
        del frame
        update = script.update(number, answer)
        script.joined.handle(update)
        rounds.append({"idle": idle, "waits": waits, "before": before, "sent": sent, "answered": answered, "after": memory()["VmRSS"]})
    return {"first": rounds[0], "median": {name: median(one[name] for one in rounds) for name in rounds[0]}}


def round(client: Client, repeats: int) -> dict[str, Any]:
    """Processor time of a client's round, and of ONNX Runtime's forwards alone, in turn."""
    script, forwards = client.join(), client.forwards()
    whole: list[float] = []
    alone: list[float] = []
    parts: dict[str, list[float]] = {"sent": [], "answered": [], "moved": []}
    for number in range(repeats + 1):
        begin = time.process_time()
        for session, wanted, feeds in forwards:
            session.run(wanted, feeds)
        alone.append(time.process_time() - begin)
        took = []
        with timed(took):
            answer = script.ask(script.step(number))
        frame = script.multiplier(number, answer)
        with timed(took):
            answer = script.ask(frame)
        frame = script.update(number, answer)
        with timed(took):
            script.joined.handle(frame)
        whole.append(sum(took))
        for name, value in zip(parts, took):
            parts[name].append(value)
    return {
        "round": median(whole[1:]), "forwards": median(alone[1:]),
        "ratio": median(a / b for a, b in zip(whole[1:], alone[1:])),
        **{name: median(values[1:]) for name, values in parts.items()},
    }  # fmt: skip


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    begin = time.process_time()
    yield
    into.append(time.process_time() - begin)


ROLES = {"forward": forward, "waiting": waiting, "round": round}

if __name__ == "__main__":
    main(*sys.argv[1:])
