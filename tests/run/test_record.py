"""What a run is made of: what another recipe changes is refused by name, in `fit` and where its weights are used."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, SequentialLR, StepLR

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.availability import Always
from hosfl_lightning.callbacks import RandomSigns
from hosfl_lightning.data import Example
from hosfl_lightning.data.content import content, digest
from hosfl_lightning.optim import SGD, AdamW
from hosfl_lightning.run.checkpoint import CheckpointError, load, save
from hosfl_lightning.run.record import MAY_CHANGE
from hosfl_lightning.split import Lora, LoraHalf
from tests.random_tokens import RandomTokens
from tests.recipe_runs import tiny_pretrained
from tests.run.test_resume import without_record
from tests.small_run import contents

DOCS = Path(__file__).parents[2] / "docs"
CLIENT, SERVER = LoraHalf(r=2, target_modules=["o_proj"]), LoraHalf(r=2, dropout=0.2, target_modules=["o_proj"])
LENGTHS = [[9, 12, 7, 12, 5, 8], [6, 10, 10, 4], [12, 11, 3, 9, 12]]


class Smoothed(SplitCausalLM):
    """A module of the user's."""

    def __init__(self, *args: Any, smoothing: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class Reversed(RandomTokens):
    """Another preparation of the same examples."""

    __qualname__ = "RandomTokens"

    def collate(self, examples: Any) -> dict[str, Any]:
        return super().collate(examples[::-1])


class OtherHeldOut(RandomTokens):
    __qualname__ = "RandomTokens"

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.validation_set = self.validation_set[:-1]


def adam(lr: float = 1e-2, kind: Any = torch.optim.AdamW, **settings: Any) -> Any:
    return lambda params: kind(params, lr=lr, **settings)


def halved(gamma: float = 0.5) -> Any:
    return lambda optimizer: StepLR(optimizer, 1, gamma=gamma)


def warmed(steps: int) -> Any:
    return lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / steps))


def in_turn(steps: int) -> Any:
    return lambda optimizer: SequentialLR(optimizer, [StepLR(optimizer, 1), StepLR(optimizer, steps)], [2])


class Kit:
    """A small run of two rounds, and others that differ from it in one thing."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "runs" / "version_0"
        self.pretrained = tiny_pretrained(root / "model", "llama", 3)

    def model(self, kind: Any = SplitCausalLM, **changed: Any) -> SplitCausalLM:
        given: dict[str, Any] = {
            "pretrained": str(self.pretrained), "cut": 1, "lora": Lora(CLIENT, SERVER), "optimizer": adam(),
            "lr_scheduler": halved(),
        }  # fmt: skip
        return kind(**given | changed)

    def trainer(self, **changed: Any) -> Orchestrator:
        rounds = {name: changed.pop(name) for name in ("client_optimizer", "client_scheduler", "mu") if name in changed}
        method = {"client_optimizer": AdamW(lr=1e-2), "client_scheduler": halved(), "mu": 1e-3}
        given: dict[str, Any] = {
            "max_rounds": 2, "clients_per_round": 2, "default_root_dir": str(self.root / "runs"),
            "enable_progress_bar": False, "gradient_clip_val": 1.0,
        }  # fmt: skip
        return Orchestrator(HOSFL(**method | rounds), **given | changed)  # type: ignore[arg-type]

    def fit(self, model: Any = None, data: Any = None, trainer: Any = None, ckpt_path: Any = None) -> Orchestrator:
        made = self.trainer(**trainer or {})
        made.fit(self.model(**model or {}), data or RandomTokens(LENGTHS), str(ckpt_path) if ckpt_path else None)
        return made


#: Changed, and what the message says: the setting, its value here, its value in the run.
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "client's alpha": (
        {"model": {"lora": Lora(replace(CLIENT, alpha=32), SERVER)}},
        "model.init_args.lora.client.alpha is 32, the run was made with 16",
    ),
    "server's alpha": ({"model": {"lora": Lora(CLIENT, replace(SERVER, alpha=8))}}, "lora.server.alpha is 8, "),
    "dropout": ({"model": {"lora": Lora(CLIENT, replace(SERVER, dropout=0.0))}}, "lora.server.dropout is 0.0, "),
    "targets": (
        {"model": {"lora": Lora(CLIENT, replace(SERVER, target_modules=["q_proj"]))}},
        'lora.server.target_modules is ["q_proj"], the run was made with ["o_proj"]',
    ),
    "no adapters": ({"model": {"lora": None}}, "model.init_args.lora is null, the run was made with {"),
    "cut": ({"model": {"cut": 2}}, "model.init_args.cut is 2, the run was made with 1"),
    "dtype": ({"model": {"dtype": "bfloat16"}}, "model.init_args.dtype is bfloat16, the run was made with float32"),
    "model's seed": ({"model": {"seed": 3}}, "model.init_args.seed is 3, the run was made with 0"),
    "model's class": ({"model": {"kind": Smoothed}}, "ckpt_path: model is Smoothed, the run was made with Split"),
    "optimizer": (
        {"model": {"optimizer": adam(kind=torch.optim.SGD, momentum=0.9)}},
        "model.init_args.optimizer.class_path is SGD, the run was made with AdamW",
    ),
    "its rate": ({"model": {"optimizer": adam(0.1)}}, "init_args.optimizer.lr is 0.1, the run was made with 0.01"),
    "its decay": ({"model": {"optimizer": adam(weight_decay=0.5)}}, "optimizer.weight_decay is 0.5, the run was made"),
    "its schedule": (
        {"model": {"lr_scheduler": halved(0.7)}},
        "model.init_args.lr_scheduler.gamma is 0.7, the run was made with 0.5",
    ),
    "no schedule": ({"model": {"lr_scheduler": None}}, "model.init_args.lr_scheduler is null, the run was made with {"),
    "another schedule": ({"model": {"lr_scheduler": warmed(5)}}, "lr_scheduler.class_path is LambdaLR, the run was"),
    "client's rate": (
        {"trainer": {"client_optimizer": AdamW(lr=0.1)}},
        "trainer.algorithm.init_args.client_optimizer.lr is 0.1, the run was made with 0.01",
    ),
    "client's rule": (
        {"trainer": {"client_optimizer": SGD(lr=1e-2)}},
        "trainer.algorithm.init_args.client_optimizer is SGD, the run was made with AdamW",
    ),
    "client's schedule": (
        {"trainer": {"client_scheduler": halved(0.7)}},
        "trainer.algorithm.init_args.client_scheduler.gamma is 0.7, the run was made with 0.5",
    ),
    "mu": ({"trainer": {"mu": 0.01}}, "trainer.algorithm.init_args.mu is 0.01, the run was made with 0.001"),
    "clipping": ({"trainer": {"gradient_clip_val": 2.0}}, "gradient_clip_val is 2.0, the run was made with 1.0"),
    "no clipping": ({"trainer": {"gradient_clip_val": None}}, "trainer.gradient_clip_val is null, the run was made w"),
    "precision": ({"trainer": {"precision": "bf16-mixed"}}, "trainer.precision is bf16-mixed, the run was made"),
    "simulation": ({"trainer": {"simulation": "per_client"}}, "trainer.simulation is per_client, the run was"),
    "run's seed": ({"trainer": {"seed": 7}}, "trainer.seed is 7, the run was made with 0"),
    "answers": ({"trainer": {"callbacks": [RandomSigns()]}}, "trainer.callbacks.RandomSigns is {"),
    "batch size": (
        {"data": RandomTokens(LENGTHS, batch_size=2)},
        "data.init_args.batch_size is 2, the run was made with 4",
    ),
    "data's seed": ({"data": RandomTokens(LENGTHS, seed=1)}, "data.init_args.seed is 1, the run was made with 0"),
    "examples": (
        {"data": RandomTokens([[9, 12, 7, 12, 5, 7], *LENGTHS[1:]])},
        "data.clients' examples is 15 examples in 3 (sha256 ",
    ),
    "why they are others": (
        {"data": RandomTokens([[9, 12, 7, 12, 5, 7], *LENGTHS[1:]])},
        "data.init_args.lengths is [[9, 12, 7, 12, 5, 7], [6, 10, 10, 4], [12, 11, 3, 9, 12]], the run was made",
    ),
    "clients": ({"data": RandomTokens(LENGTHS[:2])}, "the number of clients is 2, the run was made with 3"),
    "held out": ({"data": OtherHeldOut(LENGTHS)}, "data.held-out examples is 7 examples in 2"),
    "preparation": ({"data": Reversed(LENGTHS)}, "data.first batch is "),
}  # fmt: skip
#: Those that change what weights mean.
MEANING = ("client's alpha", "server's alpha", "cut", "targets", "no adapters")


@pytest.mark.parametrize(("changed", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_another_run_is_refused_by_name(kit: Kit, changed: dict[str, Any], message: str) -> None:
    before = {path: path.read_bytes() for path in kit.folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=re.escape(message)) as refused:
        kit.fit(**changed, ckpt_path=kit.folder)
    assert "\n" not in str(refused.value)
    assert {path: path.read_bytes() for path in kit.folder.rglob("*") if path.is_file()} == before


def test_a_schedule_is_looked_into(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.fit({"lr_scheduler": warmed(5)}, trainer={"client_scheduler": in_turn(3)})
    with pytest.raises(CheckpointError, match=r"lr_lambdas is .*0\.25, .*, the run was made with .*0\.2, "):
        kit.fit({"lr_scheduler": warmed(4)}, trainer={"client_scheduler": in_turn(3)}, ckpt_path=kit.folder)
    with pytest.raises(CheckpointError, match=r"client_scheduler\.schedulers is .*\"step_size\": 4"):
        kit.fit({"lr_scheduler": warmed(5)}, trainer={"client_scheduler": in_turn(4)}, ckpt_path=kit.folder)


def test_other_weights_and_another_argument_of_a_users_module(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.fit({"kind": Smoothed, "smoothing": 0.2})
    with pytest.raises(CheckpointError, match=r"model\.init_args\.smoothing is 0\.1, the run was made with 0\.2"):
        kit.fit({"kind": Smoothed}, ckpt_path=kit.folder)
    other = SplitCausalLM(str(kit.pretrained), cut=1).whole
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.5
    shutil.copytree(kit.pretrained, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"other weights than those of model\.init_args\.pretrained="):
        kit.fit({"kind": Smoothed, "smoothing": 0.2, "pretrained": str(tmp_path / "other")}, ckpt_path=kit.folder)


def test_a_run_that_died_before_its_first_checkpoint(kit: Kit, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kit.folder, tmp_path / "runs" / "version_0"))
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match=r"lora\.client\.alpha is 32, the run was made with 16"):
        kit.fit(OTHERS["client's alpha"][0]["model"], ckpt_path=folder)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_what_may_change_does_not_change_a_bit(tmp_path: Path) -> None:
    kit, moved = Kit(tmp_path / "one"), tmp_path / "moved"
    steady: dict[str, Any] = {"availability": Always(), "max_rounds": 4}
    expected = kit.fit(trainer=steady | {"val_check_interval": 1}).lightning_module.trained_state()
    kit = Kit(tmp_path / "two")
    kit.fit(trainer=steady | {"max_rounds": 2})
    shutil.move(kit.root, moved)
    kit.root, kit.folder, kit.pretrained = moved, moved / "runs" / "version_0", moved / "model"
    data = RandomTokens(LENGTHS)
    data.eval_batch_size = 3
    changed = {
        "val_check_interval": 3, "log_every_n_steps": 2, "on_too_few": "repeat", "enable_progress_bar": False,
        "controls": ["frozen"], "default_root_dir": str(moved / "elsewhere"),
    }  # fmt: skip
    got = kit.fit({"client_holds": "whole"}, data, steady | changed, kit.folder).lightning_module.trained_state()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_every_argument_is_compared_or_may_change() -> None:
    arguments = set(inspect.signature(Orchestrator).parameters)
    compared = {
        "algorithm", "clients_per_round", "simulation", "seed", "codec", "availability", "catch_up", "precision",
        "gradient_clip_val", "privacy", "secure_aggregation", "group_size",
    }  # fmt: skip
    assert arguments == compared | set(MAY_CHANGE)
    assert compared.isdisjoint(MAY_CHANGE)
    page = (DOCS / "resume.md").read_text()
    assert [name for name in MAY_CHANGE if f"`{name}`" not in page] == []


class TestAnEarlierVersion:
    @pytest.mark.filterwarnings("ignore:The dirpath has changed")
    def test_its_runs_go_on_and_one_line_says_what_was_not_compared(
        self, kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = Path(shutil.copytree(kit.folder, tmp_path / "runs" / "version_0"))
        without_record(folder)
        with pytest.raises(CheckpointError, match=r"trainer\.seed is 7, the run was made with 0"):
            kit.fit(trainer={"seed": 7}, ckpt_path=folder)
        kit.fit(ckpt_path=folder, trainer={"max_rounds": 3, "gradient_clip_val": 2.0})
        told = [line for line in capsys.readouterr().out.splitlines() if "earlier version" in line]
        assert len(told) == 1
        assert "kept no record of its model, data and server; of these, only what the weights show is" in told[0]

    def test_its_weights_are_taken(self, kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "old.ckpt"
        held = load(kit.folder / "checkpoints" / "last.ckpt")
        save({name: value for name, value in held.items() if name != "record"}, path)
        model = kit.model(lora=Lora(replace(CLIENT, alpha=32), SERVER))
        kit.trainer().export(model, None, str(path), str(tmp_path / "out"))
        assert "earlier version, which kept no record of its model; LoRA's alpha" in capsys.readouterr().out


class TestWeights:
    @pytest.mark.parametrize("name", MEANING)
    @pytest.mark.parametrize("entry", ["validate", "export"])
    def test_another_meaning_is_refused_by_name(self, kit: Kit, tmp_path: Path, name: str, entry: str) -> None:
        changed, message = OTHERS[name]
        model, trainer = kit.model(**changed["model"]), kit.trainer(logger=False)
        message = message.replace("the run was made with", "the weights were trained with")
        more = {"out": str(tmp_path / "out")} if entry == "export" else {}
        with pytest.raises(CheckpointError, match=re.escape(message)):
            getattr(trainer, entry)(model, RandomTokens(LENGTHS), ckpt_path=str(kit.folder), **more)

    def test_a_run_folder_is_its_last_checkpoint_in_any_precision(
        self, kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("hosfl_lightning.split.compiled.BACKEND", "eager")
        last = str(kit.folder / "checkpoints" / "last.ckpt")
        data = RandomTokens(LENGTHS)
        [expected] = kit.trainer(logger=False).validate(kit.model(), data, last)
        [start] = kit.trainer(logger=False).validate(kit.model(), data)
        assert expected != start
        elsewhere = kit.model(seed=5, optimizer=adam(0.5), lr_scheduler=None, compile=True)
        for model in (kit.model(), elsewhere):
            assert kit.trainer(logger=False).validate(model, data, str(kit.folder)) == [expected]
        [rounded] = kit.trainer(logger=False).validate(kit.model(dtype="bfloat16"), data, str(kit.folder))
        assert rounded["val/loss"] == pytest.approx(expected["val/loss"], rel=0.02)
        assert kit.trainer(logger=False).predict(kit.model(), data, str(kit.folder))
        kit.trainer().export(kit.model(), None, str(kit.folder), str(tmp_path / "folder"))
        kit.trainer().export(kit.model(), None, last, str(tmp_path / "file"))
        assert contents(tmp_path / "folder") == contents(tmp_path / "file")

    def test_a_folder_without_a_checkpoint(self, kit: Kit, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="is no run's folder with a checkpoint in it"):
            kit.trainer().export(kit.model(), None, str(tmp_path), str(tmp_path / "out"))


class TestDigest:
    def test_content_alone_counts(self) -> None:
        tokens = [3, 4, 5]
        rows = [Example(tokens, list(tokens)), Example(torch.tensor(tokens), torch.tensor(tokens))]
        assert len({digest([[row]]) for row in rows}) == 1
        others = [Example([3, 4, 6], tokens), Example(tokens, 3), Example(tokens, [3, 4, -100]), {"a": [1.5, "x"]},
                  (torch.zeros(2, 2, dtype=torch.uint8), 1), torch.ones(2, dtype=torch.bfloat16)]  # fmt: skip
        assert len({digest([[row]]) for row in [*rows, *others]}) == 1 + len(others)
        assert digest([[rows[0]], []]) != digest([[], [rows[0]]])

    def test_a_hundred_thousand_examples_take_a_second(self) -> None:
        row = torch.arange(128)
        examples = [Example(row, row) for _ in range(100_000)]
        began = time.process_time()
        digest([examples])
        assert time.process_time() - began < 2  # about 0.6; the machine may be busy


def test_the_record_is_in_the_folder_and_plain(kit: Kit) -> None:
    record = json.loads((kit.folder / "run.json").read_text())["record"]
    assert record == load(kit.folder / "checkpoints" / "last.ckpt")["record"]
    assert record["model"]["init_args"]["lora"]["client"]["alpha"] == 16


def test_a_batch_that_is_another_every_time_is_not_compared() -> None:
    class Augmented(RandomTokens):
        calls = 0

        def client_batch(self, client: int, round: int) -> dict[str, Any]:
            Augmented.calls += 1
            return {"x": torch.rand(2) + Augmented.calls}

    data, state = Augmented(LENGTHS), torch.get_rng_state()
    data.setup("fit")
    assert content(data)[2] is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_schedule_that_ends_before_the_run_is_refused_before_round_1(kit: Kit, tmp_path: Path) -> None:
    def one_cycle(optimizer: Any) -> Any:
        return OneCycleLR(optimizer, 0.1, total_steps=2)

    there = {"default_root_dir": str(tmp_path), "max_rounds": 3}
    for setting, model, trainer in (
        ("model.init_args.lr_scheduler", {"lr_scheduler": one_cycle}, {}),
        ("trainer.algorithm.init_args.client_scheduler", {}, {"client_scheduler": one_cycle}),
    ):
        with pytest.raises(ValueError, match=rf"{setting}: OneCycleLR ends after total_steps=2, trainer.max_rounds is"):
            kit.fit(model=model, trainer={**there, **trainer})
    kit.fit(model={"lr_scheduler": one_cycle}, trainer={**there, "max_rounds": 2})
