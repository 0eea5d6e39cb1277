"""Data that no method can be run on is found before the first of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hosfl_lightning.compare import runner as runners
from hosfl_lightning.compare.command import parse
from hosfl_lightning.compare.configs import Job, write_config
from hosfl_lightning.compare.preflight import see_data
from hosfl_lightning.compare.runner import Runner
from hosfl_lightning.compare.settings import Comparison, ComparisonError
from tests.compare.conftest import hosfl
from tests.compare.tiny import METHODS, write

IMAGES = {
    "model": {
        "class_path": "hosfl_lightning.models.SplitImageClassifier",
        "init_args": {"network": {"class_path": "no.such.Network"}, "cut": 1, "num_labels": 10},
    },
    "data": {"class_path": "hosfl_lightning.data.DigitsData", "init_args": {}},
}
SKEWED = {"class_path": "Dirichlet", "init_args": {"alpha": 0.1}}


def job(folder: Path, overrides: dict[str, Any], **parts: Any) -> Job:
    """The first run of a comparison whose recipe has other parts."""
    path = write(folder, overrides=overrides)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | parts
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    comparison = parse(Comparison, "", [f"--config={path}", f"--out={folder / 'out'}"])
    one = Job("HO-SFL", 0, 0, str(folder / "rehearsal"))
    write_config(one, comparison, Runner(comparison).base, 1, 1)
    return one


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker would print into its log."""
    monkeypatch.setattr("hosfl_lightning.compare.preflight.print_into", lambda path: None)


@pytest.mark.parametrize(
    ("overrides", "parts", "message"),
    [
        ({"data.init_args.num_clients": 5000}, {}, "num_clients=5000 is more than the"),
        ({"data.init_args.num_clients": None}, {}, "num_clients: partition=iid needs the number of clients"),
        ({"data.init_args.files": ["none.txt"]}, {}, "files: there is no file or folder 'none.txt'"),
        ({"data.init_args.partitioner": SKEWED}, {}, "Dirichlet needs the label of each example, which TextData"),
        ({"data.init_args.partitioner": {"class_path": "Dirichlett"}}, {}, "Dirichlett"),
        ({"data.init_args.partitioner": {"class_path": "Shards", "init_args": {"shards_per_client": 0}}}, {},
         "shards_per_client=0: must be at least 1"),
        ({"trainer.clients_per_round": 4}, {}, "trainer.clients_per_round is 4, but the data has 3 clients"),
        ({"trainer.min_clients": 3}, {}, "trainer.min_clients is 3, but a round has 2 clients"),
        ({"data.init_args.min_examples_per_client": 900, "data.init_args.partition": "dirichlet"}, IMAGES,
         "min_examples_per_client=900: 10 clients need 9000 examples"),
        (
            {
                "data.init_args.partitioner": {
                    "class_path": "Dirichlet", "init_args": {"alpha": 0.01, "min_examples_per_client": 0},
                },
                "data.init_args.num_clients": 100, "trainer.clients_per_round": 100,
            },
            IMAGES, r"trainer.clients_per_round is 100, but only \d+ of the data's 100 clients hold an example",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_no_methods_fault(
    tmp_path: Path, overrides: dict[str, Any], parts: dict[str, Any], message: str
) -> None:
    with pytest.raises(ComparisonError, match=f"^recipe: .*{message}") as refused:
        see_data(job(tmp_path, overrides, **parts))
    assert "\n" not in str(refused.value)
    assert not any(name in str(refused.value) for name in METHODS)


def test_what_the_partition_says_is_told(tmp_path: Path) -> None:
    hundred = {"data.init_args.num_clients": 100, "data.init_args.partitioner": SKEWED}
    [line] = see_data(job(tmp_path, hundred, **IMAGES))
    assert line.startswith("Dirichlet: drawn again")


@pytest.mark.parametrize("pretrained", ["no/such/model", None])
def test_a_tokenizer_that_only_the_model_knows_is_left_to_the_first_round(
    tmp_path: Path, pretrained: str | None
) -> None:
    assert see_data(job(tmp_path, {"model.init_args.pretrained": pretrained})) == []


def test_it_comes_before_any_method_and_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners.worker, "rehearse", None)  # nobody may ask for it
    config = write(tmp_path, overrides={"data.init_args.num_clients": 5000})
    with pytest.raises(SystemExit) as end:
        hosfl("compare", f"--config={config}", f"--out={tmp_path / 'out'}")
    told = capfd.readouterr()
    assert end.value.code == 2
    assert "hosfl: error: recipe: num_clients=5000 is more than the" in told.err
    assert "One round of each" not in told.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock"}
