"""The page of `benchmarks.remote`: a table for each part, with its bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.remote_steps import BARE, CHECKED, OURS

BARS = {"steps": 1.5, "rounds": 1.3, "memory": 1 << 20, "kills": 2.0, "wire": 1.02}

HEAD = """\
# Clients on other machines: what the network costs

`python -m benchmarks.remote --out OUT` measures all of it on one machine, over loopback, on two of its cores, in
processes forked from one that has imported everything. What is compared was run in turn; a ratio is of medians, then
of minima.
"""

STEPS = """\
z of {z:,} bytes up, λ of {multiplier:,} down, scalars of {projected_gradients:,} up, the update of {update:,} down:
every frame encoded, hashed, sent, verified, decoded strictly and checked, by the server and the client of a run,
whose endpoints answer with tensors that are ready. gRPC: as many messages of the same lengths and the same barriers,
of which nobody looks at a byte (grpc.aio, a synchronous client, no serializers). gRPC, SHA-256: the same, each frame
hashed where it leaves and where it arrives; our frames carry that checksum. Processor time is of all processes
together. Bar: {bar} times gRPC.
"""

ROUNDS = """\
`recipes/tiny_lm/hosfl_lora.yaml` by `hosfl serve` and eight `hosfl join`, over `hosfl fit --trainer.simulation
per_client` in one process, with the same data and the same rounds, without the first. Torch's threads are set as
`OMP_NUM_THREADS` would. On two cores the one process is given both, and one thread too, where a second only costs;
the clients, which compute at once, have one thread each. On one core nothing is gained by processes that run at once:
there the ratio is of the work. Bar: {bar} on two cores.
"""

MEMORY = """\
What the server's resident memory grows by when clients join, over their number; then, after one step with all of
them, by how much it has grown for each. The allocator is the system's with its defaults: what a step leaves is mostly
what it has not given back. Bar: 1 MiB for an idle client.
"""

KILLS = """\
SIGKILL, no warning, then a new process of the same. Of the server: from when the new one listens to the last client
that is in. Of a client: from its new process (its libraries are imported, its model is none) to when it is in.
Clients wait between tries for {backoff}:
after a long outage they are in the midst of such a pause. Nobody has missed an update; catching up comes on top.
Bar: {bar} s after a short outage.
"""

WIRE = """\
Bytes that pass a TCP proxy between the server and all clients of that run, from the first connection to the
last: HTTP/2, gRPC and TLS with its handshakes included, headers of TCP and IP not; over `comm/total_bytes` of the
same run. Bar: {bar}.
"""


def page(found: dict[str, Any]) -> str:
    """All parts that were measured."""
    parts = [HEAD]
    for part, (title, body) in SECTIONS.items():
        if part in found:
            one = found[part]
            how = f"`{one['command']}`, {one['date']}, {one['machine']}, load {one['load']:.1f} at the end"
            parts.append(f"## {title}\n\n{body(one['found'])}\n{how}\n")
    return "\n".join(parts)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _verdict(value: float, part: str) -> str:
    return "met" if value <= BARS[part] else "missed"


def _steps(rows: Any) -> str:
    sizes = {**rows[0]["sizes"], "z": rows[0]["sizes"]["smashed_data"]}
    text = STEPS.format(**sizes, bar=BARS["steps"])

    def times(row: Any) -> Iterable[str]:
        yield from (f"{row['clients']}", row["link"])
        yield from (f"{1e3 * row['median'][name]:.2f} ms" for name in (OURS, BARE, CHECKED))

    def over(row: Any, name: str) -> Iterable[str]:
        yield from (f"{row['clients']}", row["link"])
        yield from (f"{row[kind][OURS] / row[kind][name]:.2f}" for kind in ("median", "minimum"))
        yield f"{row['cpu'][OURS] / row['cpu'][name]:.2f}" if row["cpu"][name] else "-"
        if name == BARE:
            yield _verdict(row["median"][OURS] / row["median"][BARE], "steps")

    tables = [_table(["clients", "link", "ours", BARE, CHECKED], map(times, rows))]
    for name, bar in ((BARE, ["bar"]), (CHECKED, list[str]())):
        head = ["clients", "link", "of medians", "of minima", "of processor times", *bar]
        tables.append(f"Ours over {name}:\n\n{_table(head, (over(row, name) for row in rows))}")
    return "\n".join([text, *tables])


def _rounds(rows: Any) -> str:
    def cells(row: Any) -> Iterable[str]:
        median, minimum = row["median"], row["minimum"]
        ratio = median["remote"] / median["one_process"]
        yield row["place"]
        yield f"{row['rounds']}"
        yield from (f"{median[name]:.3f} s" for name in ("remote", "one_process"))
        yield f"{ratio:.2f}"
        yield f"{minimum['remote'] / minimum['one_process']:.2f}"
        yield _verdict(ratio, "rounds") if row["place"].startswith("two") else ""

    head = ["cores", "rounds", "remote", "one process", "of medians", "of minima", "bar"]
    return f"{ROUNDS.format(bar=BARS['rounds'])}\n{_table(head, map(cells, rows))}"


def _memory(rows: Any) -> str:
    def cells(row: Any) -> Iterable[str]:
        yield row["link"]
        yield f"{row['clients']}"
        yield f"{row['bytes'] / 1024:.0f} KiB"
        yield _verdict(row["bytes"], "memory")
        yield f"{row['bytes_after_a_step'] / 1024:.0f} KiB"

    return f"{MEMORY}\n{_table(['link', 'clients', 'idle client', 'bar', 'after a step'], map(cells, rows))}"


def _kills(found: Any) -> str:
    def cells(what: str, seconds: list[float], bar: bool) -> Iterable[str]:
        yield what
        yield f"{len(seconds)}"
        yield f"{sorted(seconds)[len(seconds) // 2]:.2f} s"
        yield f"{max(seconds):.2f} s"
        yield _verdict(max(seconds), "kills") if bar else ""

    rows = [cells(f"server, {row['outage']:g} s away, {row['clients']} clients", row["seconds"], row["outage"] <= 1)
            for row in found["server"]]  # fmt: skip
    rows.append(cells("client", found["client"]["seconds"], True))
    text = KILLS.format(bar=BARS["kills"], backoff=found["backoff"])
    return f"{text}\n{_table(['killed', 'times', 'median', 'longest', 'bar'], rows)}"


def _wire(rows: Any) -> str:
    def cells(row: Any) -> Iterable[str]:
        total = row["sockets"]["up"] + row["sockets"]["down"]
        yield row["link"]
        yield f"{row['rounds']}"
        yield from (f"{row['sockets'][direction]:,}" for direction in ("up", "down"))
        yield f"{row['ledger']:,.0f}"
        yield f"{total / row['ledger']:.4f}"
        yield _verdict(total / row["ledger"], "wire")

    head = ["link", "rounds", "up", "down", "ledger", "sockets / ledger", "bar"]
    return f"{WIRE.format(bar=BARS['wire'])}\n{_table(head, map(cells, rows))}"


SECTIONS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "steps": ("A step without a model", _steps),
    "rounds": ("A round of eight clients", _rounds),
    "memory": ("Memory of the server", _memory),
    "kills": ("Back after a kill", _kills),
    "wire": ("Bytes on the wire", _wire),
}
