"""The page of `benchmarks.device`: the targets, and a table for each part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

MIB = 1 << 20
TARGETS = {"install": 200, "idle": 90, "start": 2, "8 x 128": 1.05, "1 x 32": 1.15, "peak": 1.10}
MODELS = {
    "tiny_lm": "tiny_lm (hidden 128)",
    "llama_512": "Llama, hidden 512, random weights",
    "llama_1024": "Llama, hidden 1,024, random weights",
}
KINDS = {"lora": "LoRA, 4 probes", "side": "side adapter"}

HEAD = """\
# A client without PyTorch: install, start, memory, rounds

`hosfl-client` beside `hosfl join`, the client in PyTorch, on one machine, one thread each; every figure is of a process
of its own, and where there are several it is their median. The client's half is three layers with LoRA on `q_proj`,
`v_proj`, `o_proj` and `down_proj` (rank 8; four probes) or with a side adapter (width 16), z in bf16, λ in int8, as in
`examples/device`. Times are of the processor, because other work ran on the machine. Resident memory (RSS) counts the
pages of libraries that are touched, too. The machine has two cores, which were shared with other work.

    python -m benchmarks.device --out docs/results/device
"""

BESIDE = """\
Of a round, "in PyTorch" is that client's round over the same forwards of ONNX Runtime.
"""

INSTALL = """\
Bytes in site-packages above an empty environment's (pip and setuptools not counted), after `pip install ./client`; of
the client in PyTorch what `hosfl_lightning[remote]` requires, CPU wheels. Of the client's {total:.0f} MB,
{bytecode:.0f} MB are bytecode that pip compiles for every module: `pip install --no-compile ./client` leaves it out,
and Python writes what it imports. {hub:.0f} MB (huggingface_hub and what that requires) come with `tokenizers` and are
never imported.
"""

START = """\
From the command to "this is client k of the run", with a server (`hosfl serve`, tiny_lm) that waits for more clients;
by the clock, and by the processor; memory more than two seconds later. The client without torch reads and tokenizes
its text in a process that has ended by then: its time counts, its memory does not.
"""

MEMORY = """\
tiny_lm, 8 x 128 tokens a round, MiB. These processes have no line to a server, which is about 3 MiB more: between
rounds a client is just below the target of 90 MiB. Idle and waiting are after more than a second: by then
what ONNX Runtime kept for the next forward was given back. While it waits for λ a client holds, beside weights and
session, its batch, the frame that it sent (0.25 MiB, in case it is asked again) and, with LoRA, z as it was computed
(0.5 MiB).
"""

ROUNDS = """\
A round: three frames in (begin, λ, update), two out (z, scalars or gradient), all of decoding, checks, checksums,
codecs, forwards, directions and the update. ONNX Runtime's own: its session with its own options, P + 1 forwards (with
a side adapter 2, one with the layers' outputs), nothing else, in turn with the rounds. Milliseconds of the processor;
the rounds follow each other at once. Where a second passes between messages, memory has been given back, and the next
forward takes it again: about 5 ms more for tiny_lm at 8 x 128.
"""

REACHED = """\
What a round does beside forwards takes 3 to 9 ms here, and does not grow with the model as forwards do: some is per
tensor and frame (Python), some per element of λ, z and θ (codec, directions, fp64 sums). A forward of tiny_lm takes
0.7 ms at 1 x 32 tokens and 13 at 8 x 128, one of hidden size 512 takes 6 at 1 x 32: of so little the overhead is more
than the target allows, whatever is left out. A ratio below 1 is the machine's noise.
"""

PEAKS = """\
The most that a client holds in a round of 8 x 128 tokens, over the most that a process holds that has imported the
same, loaded the graph and runs one forward by ONNX Runtime's own session. MiB.
"""

MOBIZO = """\
MobiZO (arXiv 2409.15520), the nearest system on devices, is not federated; it was not run here, and what it publishes
is of other models on other devices and another engine (ExecuTorch): not comparable with these figures.
"""


def page(found: dict[str, Any]) -> str:
    """All parts that were measured."""
    parts = [HEAD]
    rows = [row for part in ("install", "start", "rounds", "peaks") if part in found
            for row in TARGET_ROWS[part](found[part]["found"])]  # fmt: skip
    if rows:
        table = _table(["figure", "target", "measured", "verdict", "in PyTorch"], rows)
        parts.append(f"## Targets\n\n{table}\n{BESIDE}")
    for part, (title, body) in SECTIONS.items():
        if part in found:
            one = found[part]
            how = f"`--parts {part}`, {one['date']}, {one['machine']}, load {one['load']:.1f} at the end"
            parts.append(f"## {title}\n\n{body(one['found'])}\n{how}\n")
    return "\n".join([*parts, f"## MobiZO\n\n{MOBIZO}"])


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _verdict(value: float, target: float) -> str:
    return "met" if value <= target else "missed"


def _install_targets(found: Any) -> Iterator[list[str]]:
    total, other = found["client"]["bytes"] / 1e6, f"{found['torch']['bytes'] / 1e6:,.0f}"
    lean, target = (found["client"]["bytes"] - found["client"]["bytecode"]) / 1e6, TARGETS["install"]
    yield ["installed, MB", f"{target}", f"{total:.0f}", _verdict(total, target), other]
    yield ["the same with `--no-compile`", f"{target}", f"{lean:.0f}", _verdict(lean, target), ""]


def _start_targets(found: Any) -> Iterator[list[str]]:
    own, other = found["client"], found["torch"]
    idle = own["VmRSS"] / MIB
    yield ["idle joined client, tiny_lm, MiB", f"{TARGETS['idle']}", f"{idle:.0f}", _verdict(idle, TARGETS["idle"]),
           f"{other['VmRSS'] / MIB:.0f}"]  # fmt: skip
    yield ["start to joined, s", f"{TARGETS['start']}", f"{own['seconds']:.2f}",
           _verdict(own["seconds"], TARGETS["start"]), f"{other['seconds']:.1f}"]  # fmt: skip


def _rounds_targets(found: Any) -> Iterator[list[str]]:
    for row in found:
        shape, client = _shape(row), row["client"]
        yield [f"round over forwards, {shape}, {row['model']}, {KINDS[row['kind']]}", f"{TARGETS[shape]}",
               f"{client['ratio']:.2f}", _verdict(round(client["ratio"], 2), TARGETS[shape]),
               f"{row['torch']['round'] / client['alone']:.2f}"]  # fmt: skip


def _peaks_targets(found: Any) -> Iterator[list[str]]:
    for row in found:
        ratio = row["round"]["peak"] / row["forward"]["peak"]
        yield [f"peak over one forward's, {row['model']}, {KINDS[row['kind']]}", f"{TARGETS['peak']:.2f}",
               f"{ratio:.2f}", _verdict(ratio, TARGETS["peak"]), ""]  # fmt: skip


TARGET_ROWS = {
    "install": _install_targets, "start": _start_targets, "rounds": _rounds_targets, "peaks": _peaks_targets,
}  # fmt: skip


def _shape(row: Any) -> str:
    return " x ".join(map(str, row["shape"]))


def _install(found: Any) -> str:
    own, torch = found["client"], found["torch"]
    text = INSTALL.format(total=own["bytes"] / 1e6, bytecode=own["bytecode"] / 1e6, hub=own["hub"] / 1e6)
    rows = [["all", f"{own['bytes'] / 1e6:.0f}", "all", f"{torch['bytes'] / 1e6:,.0f}"]]
    rows += [[a, f"{b / 1e6:.0f}", c, f"{d / 1e6:.0f}"]
             for (a, b), (c, d) in zip(own["packages"].items(), torch["packages"].items())]  # fmt: skip
    return f"{text}\n{_table(['hosfl-client', 'MB', 'in PyTorch', 'MB'], rows)}"


def _start(found: Any) -> str:
    rows = [
        [name, f"{one['seconds']:.2f} s", f"{one['processor']:.2f} s", f"{one['VmRSS'] / MIB:.0f} MiB",
         f"{one['RssAnon'] / MIB:.0f} MiB", f"{one['VmHWM'] / MIB:.0f} MiB"]
        for name, one in (("hosfl-client", found["client"]), ("in PyTorch", found["torch"]))
    ]  # fmt: skip
    head = ["client", "joined after", "of the processor", "resident", "not of files", "most so far"]
    return f"{START}\n{_table(head, rows)}"


def _memory(found: Any) -> str:
    rows = [
        [name, KINDS[kind], *(f"{one[key] / MIB:.1f}" for key in ("imports", "idle", "waits", "peak"))]
        for kind, both in found.items()
        for name, one in (("hosfl-client", both["client"]), ("in PyTorch", both["torch"]))
    ]
    head = ["client", "trains", "after imports", "idle between rounds", "waiting for λ", "peak of a round"]
    return f"{MEMORY}\n{_table(head, rows)}"


def _rounds(found: Any) -> str:
    rows = [
        [MODELS[row["model"]], KINDS[row["kind"]], _shape(row), f"{1e3 * row['client']['round']:.1f}",
         f"{1e3 * row['client']['alone']:.1f}", f"{row['client']['ratio']:.2f}", f"{1e3 * row['torch']['round']:.1f}"]
        for row in found
    ]  # fmt: skip
    head = ["model", "trains", "batch", "round", "forwards alone", "ratio", "round in PyTorch"]
    return f"{ROUNDS}\n{_table(head, rows)}\n{REACHED}"


def _peaks(found: Any) -> str:
    rows = [
        [MODELS[row["model"]], KINDS[row["kind"]], f"{row['forward']['before'] / MIB:.1f}",
         f"{row['forward']['peak'] / MIB:.1f}", f"{row['round']['idle'] / MIB:.1f}",
         f"{row['round']['peak'] / MIB:.1f}",
         f"{row['round']['peak'] / row['forward']['peak']:.3f}"]
        for row in found
    ]  # fmt: skip
    head = ["model", "trains", "before the forward", "its peak", "client, idle", "peak of a round", "ratio"]
    return f"{PEAKS}\n{_table(head, rows)}"


SECTIONS = {
    "install": ("Install", _install), "start": ("Start", _start), "memory": ("Memory", _memory),
    "rounds": ("Rounds", _rounds), "peaks": ("Peaks", _peaks),
}  # fmt: skip
