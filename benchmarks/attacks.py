"""What is left of the attacks on z, by cut, codec and noise: text and images.

    python -m benchmarks.attacks --data DATA --out docs/results/attacks     # four minutes of one CPU

DATA holds ``tinyshakespeare/input.txt``. Text: ``tiny_lm`` with LoRA as it begins, cut behind 1 to 4 of its 6 layers;
two pieces of 16 bytes a seed. Images: scikit-learn's digits through the network of `recipes/vision/digits_hosfl.yaml`
as it begins, cut behind 1 to 3 of its 4 children; 8 images a seed. z goes through the wire's codec after Gaussian
noise, whose deviation is given in parts of z's root mean square. The attacker knows the client half, and neither the
noise nor its size. What is finished is not run again: ``attacks.json`` holds every cell. ``--quick`` is one seed of few
cells.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from hosfl_lightning.attack.halves import TextHalf, cosines
from hosfl_lightning.attack.inputs import explained
from hosfl_lightning.attack.inversion import invert_images, invert_text, nearest_alone
from hosfl_lightning.attack.score import commonest, interval, tokens
from hosfl_lightning.attack.search import search
from hosfl_lightning.data import DigitsData
from hosfl_lightning.files import write_json, write_whole
from hosfl_lightning.models import SplitCausalLM, SplitImageClassifier
from hosfl_lightning.networks import ConvNet
from hosfl_lightning.run.identity import hardware
from hosfl_lightning.split import Lora, LoraHalf
from hosfl_lightning.wire import SmashedData

SEEDS = [0, 1, 2]
CODECS = ["fp32", "int8", "int4"]
NOISES = [0.0, 0.1, 0.5, 1.0, 4.0]
PIECES, LENGTH, IMAGES = 2, 16, 8
COLOURS = ("#332288", "#cc6677", "#44aa99", "#ddaa33")


class Cell(NamedTuple):
    """What is attacked."""

    task: str
    cut: int
    codec: str
    noise: float
    seed: int


def cells(quick: bool, seeds: Sequence[int]) -> Iterator[Cell]:
    """Seed after seed."""
    for seed in seeds[:1] if quick else seeds:
        for task, cuts in (("text", range(1, 5)), ("images", range(1, 4))):
            for cut in [1] if quick else cuts:
                for codec in ["fp32", "int4"] if quick else CODECS:
                    # int8 differs too little from fp32 to be worth them all.
                    for noise in [0.0, 1.0] if quick or codec == "int8" else NOISES:
                        yield Cell(task, cut, codec, noise, seed)


def sent(z: Tensor, cell: Cell) -> Tensor:
    """What the server has of it."""
    generator = torch.Generator().manual_seed(cell.seed)
    noisy = z + cell.noise * z.square().mean().sqrt() * torch.randn(z.shape, generator=generator)
    mask = torch.ones(z.shape[:2], dtype=torch.bool)
    return SmashedData.pack(0, 0, noisy, torch.zeros(len(z), dtype=torch.long), mask, cell.codec, cell.seed).unpack()[0]


class Text:
    """The text attacks.

    Args:
        data: Folder of ``tinyshakespeare``.
    """

    def __init__(self, data: Path) -> None:
        self.text = (data / "tinyshakespeare" / "input.txt").read_bytes()
        # The last tenth is what anybody has.
        self.usual = commonest(self.text[len(self.text) * 9 // 10 :])

    def __call__(self, cell: Cell) -> list[dict[str, Any]]:
        lora = Lora(client=LoraHalf(r=8, target_modules="all-linear"), server=LoraHalf(r=8))
        model = SplitCausalLM("tiny_lm", cut=cell.cut, lora=lora).eval()
        half, ids = TextHalf(model.client_half), self.pieces(model, cell.seed)
        mask = torch.ones_like(ids, dtype=torch.bool)
        with torch.no_grad():
            z = sent(model.client_half(ids, mask.long()), cell)
        loss = self.loss(model, cell)
        attacks: dict[str, Callable[[], Any]] = {
            "search": lambda: [search(half, *one) for one in zip(z, mask)],
            "nearest embedding": lambda: cosines(z, half.table).argmax(-1).tolist(),
            "nearest z of a token alone": lambda: nearest_alone(half, z).tolist(),
        }
        if cell.codec == "fp32":
            attacks["inversion"] = lambda: invert_text(half, z, mask, steps=100).tolist()
        found = []
        for name, attack in attacks.items():
            for score, measured in zip(tokens(name, ids.tolist(), guesses := attack(), self.usual), each(ids, guesses)):
                found.append(line(cell, name, score.measure, measured, score.trivial, loss))
        return found

    @torch.no_grad()
    def loss(self, model: SplitCausalLM, cell: Cell) -> float:
        """What the noise does to the model: nats a token of 16 longer pieces."""
        ids = self.pieces(model, cell.seed, 16, 64)
        z = sent(model.client_half(ids, torch.ones_like(ids)), cell)
        return float(model.loss(model.server_half(z, torch.ones_like(ids)), ids))

    def pieces(self, model: SplitCausalLM, seed: int, count: int = PIECES, length: int = LENGTH) -> Tensor:
        """``(count, length)`` tokens, of the first nine tenths."""
        generator = torch.Generator().manual_seed(1000 + seed)
        places = torch.randint(len(self.text) * 9 // 10 - length, (count,), generator=generator).tolist()
        tokenizer: Any = model.tokenizer()
        texts = [self.text[place : place + length].decode("ascii", "replace") for place in places]
        return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])


def each(ids: Tensor, guesses: Sequence[Sequence[int]]) -> Iterator[list[float]]:
    """By measure, of each piece."""
    scores = [tokens("", [truth], [guess], 0) for truth, guess in zip(ids.tolist(), guesses)]
    for measure in zip(*scores):
        yield [one.value for one in measure]


def images(cell: Cell) -> list[dict[str, Any]]:
    """The inversion of convolutional z."""
    model = SplitImageClassifier(
        cell.cut, 10, 8, 1, network=lambda: ConvNet(1, (8, 16, 32), 10, 8), seed=cell.seed
    ).eval()  # fmt: skip
    data = DigitsData(num_clients=10, batch_size=IMAGES)
    data.setup("fit")
    batch = data.client_batch(cell.seed, 0)
    mean = data.collate(data.validation_set)["pixel_values"].mean(0)
    with torch.no_grad():
        z = sent(model.client_half(batch["pixel_values"]), cell)
    shares = explained(batch["pixel_values"], invert_images(model.client_half, z, mean), mean)
    return [line(cell, "inversion", "pixels explained", shares, 0.0)]


def line(
    cell: Cell, attack: str, measure: str, values: Sequence[float], trivial: float, loss: float | None = None
) -> dict[str, Any]:
    """One entry of ``attacks.json``."""
    told = {"attack": attack, "measure": measure, "values": [round(value, 4) for value in values]}
    return {**cell._asdict(), **told, "trivial": round(trivial, 4), "loss": loss if loss is None else round(loss, 4)}


def chosen(found: Sequence[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The lines of all seeds that agree."""
    return [one for one in found if all(one[name] == value for name, value in wanted.items())]


def share(lines: Sequence[dict[str, Any]]) -> str:
    """Mean over examples with its interval; a dash where there are none."""
    if not lines:
        return "–"
    values = [value for one in lines for value in one["values"]]
    low, high = interval(values)
    return f"{fmean(values):.0%} [{100 * low:.0f}, {100 * high:.0f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    return ["| " + " | ".join(one) + " |" for one in [head, ["---"] * len(head), *rows]]


def page(told: dict[str, Any]) -> str:
    """``table.md``."""
    found = told["cells"]
    by_noise = [f"noise {noise:g}" for noise in NOISES]
    parts = [
        f"Seeds {' '.join(map(str, told['seeds']))}, {told['date']}, {told['machine']}.",
        "",
        "Search, tokens:",
        "",
    ]
    parts += table(["cut", "codec", *by_noise], [
        [str(cut), codec, *(share(chosen(found, task="text", cut=cut, codec=codec, noise=noise, attack="search",
                                         measure="tokens")) for noise in NOISES)]
        for cut in range(1, 5) for codec in CODECS
    ])  # fmt: skip
    parts += ["", "The other attacks, fp32, tokens:", ""]
    names = ["nearest embedding", "nearest z of a token alone", "inversion"]
    parts += table(["cut", "attack", *by_noise], [
        [str(cut), name, *(share(chosen(found, task="text", cut=cut, codec="fp32", noise=noise, attack=name,
                                        measure="tokens")) for noise in NOISES)]
        for cut in range(1, 5) for name in names
    ])  # fmt: skip
    parts += ["", "Images, inversion, pixels explained:", ""]
    parts += table(["cut", "codec", *by_noise], [
        [str(cut), codec, *(share(chosen(found, task="images", cut=cut, codec=codec, noise=noise)) for noise in NOISES)]
        for cut in range(1, 4) for codec in CODECS
    ])  # fmt: skip
    parts += ["", "Loss of the untrained text model on that z, nats a token:", ""]
    parts += table(["cut", "codec", *by_noise], [
        [str(cut), codec, *(mean_loss(chosen(found, task="text", cut=cut, codec=codec, noise=noise, attack="search",
                                             measure="tokens")) for noise in NOISES)]
        for cut in range(1, 5) for codec in CODECS
    ])  # fmt: skip
    trivial = fmean([one["trivial"] for one in chosen(found, task="text", measure="tokens")] or [0.0])
    return "\n".join([*parts, "", f"The trivial guess: {trivial:.0%} of tokens, 0 % of pixels.", ""])


def mean_loss(lines: Sequence[dict[str, Any]]) -> str:
    """Over seeds."""
    return f"{fmean(one['loss'] for one in lines):.2f}" if lines else "–"


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """By noise: a line a cut, solid as computed with its interval, dotted in int4; grey is the trivial guess."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.2, 4.0), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2, sharey=True)
        tasks = (("text", "tokens", "text: exact search", 4), ("images", "pixels explained", "images: inversion", 3))
        for axes, (task, measure, title, cuts) in zip(panels, tasks):
            of_task = [one for one in chosen(found, task=task, measure=measure)
                       if one["attack"] == ("search" if task == "text" else "inversion")]  # fmt: skip
            for cut in range(1, cuts + 1):
                for codec, style in (("fp32", "-"), ("int4", ":")):
                    _curve(axes, of_task, cut, codec, style)
            axes.axhline(fmean([one["trivial"] for one in of_task] or [0.0]), color="#888888", linewidth=1)
            axes.set_xticks(range(len(NOISES)), [f"{noise:g}" for noise in NOISES])
            axes.set(title=title, xlabel="noise on z, parts of its rms", ylim=(-0.03, 1.05))
        panels[0].set_ylabel("share recovered")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        figure.savefig(path)


def _curve(axes: Any, found: Sequence[dict[str, Any]], cut: int, codec: str, style: str) -> None:
    points = []
    for place, noise in enumerate(NOISES):
        values = [v for one in chosen(found, cut=cut, codec=codec, noise=noise) for v in one["values"]]
        if values:
            points.append((place + 0.06 * (cut - 2.5), fmean(values), *interval(values)))
    if points:
        x, mean, low, high = zip(*points)
        axes.plot(x, mean, style, marker="o", markersize=4, color=COLOURS[cut - 1], label=f"cut {cut}, {codec}")
        if codec == "fp32":
            axes.vlines(x, low, high, color=COLOURS[cut - 1], linewidth=1, alpha=0.6)


def arguments(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds tinyshakespeare")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="one seed of few cells, in seconds")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> None:
    """See the module."""
    own = arguments(args)
    own.out.mkdir(parents=True, exist_ok=True)
    file = own.out / "attacks.json"
    told: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"cells": []}
    done = {tuple(one[name] for name in Cell._fields) for one in told["cells"]}
    text = Text(own.data)
    told |= {
        "command": "python -m benchmarks.attacks --data DATA --out OUT", "seeds": own.seeds,
        "date": datetime.date.today().isoformat(), "machine": hardware(torch.device("cpu")),
    }  # fmt: skip
    seed = None
    for cell in cells(own.quick, own.seeds):
        if cell in done:
            continue
        told["cells"] += (text if cell.task == "text" else images)(cell)
        if (cell.task, cell.seed, cell.cut) != seed:
            print(*cell, flush=True)
            seed = (cell.task, cell.seed, cell.cut)
            write_json(file, told)
    write_json(file, told)
    write_whole(own.out / "table.md", lambda out: out.write(page(told).encode()))
    draw(told["cells"], own.out / "attacks.png")
    print(page(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
