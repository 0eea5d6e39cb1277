"""What ``benchmarks.protections`` runs and says, without the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.protection_page import page
from benchmarks.protection_rows import ALL, EVERY, FIRST_ORDER, FROZEN, PLAIN, Row
from hosfl_lightning.privacy import Privacy, TokenNoise

PLACES = {"data": "/data", "minilm": "/minilm"}


@pytest.mark.parametrize("row", EVERY, ids=lambda row: row.name)
def test_a_recipe_holds_its_protection_alone(row: Row, tmp_path: Path) -> None:
    """The same run as without it, but for the keys that it names; what is asked of privacy can be met."""
    [plain] = [one for one in EVERY if one.task == row.task and one.protection == PLAIN]
    own, other = (flat(one.recipe(1, False, tmp_path, PLACES)) for one in (row, plain))
    changed = {key for key in own.keys() | other.keys() if own.get(key) != other.get(key)}
    named = tuple(key.replace(".init_args", "") for key in row.overrides)
    allowed = named if row.protection not in (FROZEN, FIRST_ORDER) else ("trainer.algorithm", "model")
    assert all(key.startswith(allowed) for key in changed) and bool(changed) is (row.protection != PLAIN)
    if "trainer.privacy" in row.overrides:
        given = row.overrides["trainer.privacy"]
        tokens = {name: TokenNoise(**given[name]) for name in ("smashed_data", "multiplier") if name in given}
        Privacy(**given | tokens)
    assert own["model.seed"] == 1 and not str(own).count("{data}")


def flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = above if key == "init_args" else f"{above}.{key}" if above else key
        found |= flat(value, name) if isinstance(value, dict) else {name: value}
    return found


def one(protection: str, seed: int, after: float, as_sent: float | None = None, found: float = 1.0) -> dict[str, Any]:
    scores = [{"measure": "tokens", "value": value, "trivial": 0.05} for value in (found, found / 2)]
    return {"row": f"shakespeare/{protection}", "seed": seed, "rounds": 3, "after": after, "as_sent": as_sent,
            "scores": scores}  # fmt: skip


def test_the_table_takes_the_best_attack_and_the_loss_on_what_is_sent() -> None:
    runs = [one(FROZEN, seed, 3.0 + seed) for seed in (0, 1, 2)] + [one(FIRST_ORDER, s, 2.0 + s) for s in (0, 1, 2)]
    runs += [one("noise 0.1 on z", seed, 9.0 + seed, 2.5 + seed, 0.4) for seed in (0, 1, 2)]
    runs += [one("noise 0.4 on z", seed, 2.0 + seed, 4.0 + seed, 0.1) for seed in (0, 1, 2)]
    table = page({"command": "c", "date": "d", "machine": "m", "runs": runs})
    assert (
        "| noise 0.1 on z | 10.0000 ± 1.0000 | 3.5000 ± 1.0000 | 50 % [50 %, 50 %] | 40 % ± 0 | – | 5 %, – |" in table
    )
    assert "| noise 0.4 on z | 3.0000 ± 1.0000 | 5.0000 ± 1.0000 | behind frozen | 10 % ± 0 | – | 5 %, – |" in table
    assert f"{ALL['shakespeare'].found} found" in table
