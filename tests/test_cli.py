"""The command line: from a run's own config, and what a bad setting gets."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from safetensors.torch import load_file

from hosfl_lightning import cli
from hosfl_lightning.recipe import HOSFLCommand
from tests.recipe_runs import ROOT, Finished, command_line, hosfl, load, small

TEXT = ROOT / "recipes" / "stories260k" / "shakespeare_hosfl_lora.yaml"
CLASSES = ROOT / "recipes" / "minilm" / "banking77_hosfl_lora.yaml"
LORA = "--model.init_args.lora"
METHOD = "--trainer.algorithm.init_args"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("finished")
    return Finished(hosfl("fit", f"--config={TEXT}", *small(TEXT, root)), root)


def metrics(folder: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


class TestFromARunsConfig:
    def test_fit_again_is_the_same_run(self, finished: Finished) -> None:
        again = Path(finished.again("fit").trainer.log_dir)
        assert metrics(again) == metrics(finished.folder)
        one, two = load(again / "config.yaml"), load(finished.folder / "config.yaml")
        del one["trainer"]["default_root_dir"], two["trainer"]["default_root_dir"]
        assert one == two

    @pytest.mark.filterwarnings("ignore:The dirpath has changed")  # of the copy
    @pytest.mark.parametrize("what", ["", "checkpoints/last.ckpt"], ids=["from its folder", "from a checkpoint in it"])
    def test_fit_goes_on(
        self, finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
        what: str,
    ) -> None:  # fmt: skip
        monkeypatch.setenv("COLUMNS", "40")
        folder = shutil.copytree(finished.folder, tmp_path / "run")
        trainer = hosfl(
            "fit", f"--config={folder}/config.yaml", f"--ckpt_path={folder / what}", "--trainer.max_rounds=3"
        ).trainer
        assert trainer.global_step == trainer.summary["rounds"] == 3
        assert Path(trainer.log_dir).samefile(folder)
        assert [row["round"] for row in metrics(folder)] == ["0", "1", "2", "3"]
        assert load(folder / "config.yaml")["trainer"]["max_rounds"] == 3
        table = capsys.readouterr().out
        assert f"{trainer.summary['val_loss_last']:.4f}" in table
        assert "…" not in table

    def test_settings_that_are_refused_do_not_replace_the_runs_own(
        self, finished: Finished, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        folder = shutil.copytree(finished.folder, tmp_path / "run")
        before = (folder / "config.yaml").read_text()
        line = refused(capsys, "fit", f"--config={folder}/config.yaml", f"--ckpt_path={folder}", "--trainer.seed=7")
        assert "trainer.seed is 7, the run was made with 0; a run that goes on keeps its settings" in line
        assert (folder / "config.yaml").read_text() == before

    def test_validate_prints_what_the_run_ended_with(
        self, finished: Finished, capsys: pytest.CaptureFixture[str]
    ) -> None:
        finished.again("validate", finished.checkpoint)
        expected = json.loads((finished.folder / "summary.json").read_text())["val_loss_last"]
        assert f"val/loss  {expected:.4f}" in capsys.readouterr().out.splitlines()

    def test_a_runs_folder_is_its_recipe_too(
        self, finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("hosfl_lightning.recipe.command", lambda args: print(args))
        config = f"--config={finished.folder}/config.yaml"
        for given in (finished.folder, finished.folder / "checkpoints" / "last.ckpt"):
            cli.main(["test", f"--ckpt_path={given}"])
            assert capsys.readouterr().out == f"{['test', config, f'--ckpt_path={given}']}\n"
        cli.main(["test", config, "--ckpt_path", "last"])
        assert capsys.readouterr().out == f"{['test', config, '--ckpt_path', str(finished.folder)]}\n"

    def test_without_a_checkpoint_it_says_that_the_model_is_untrained(
        self, finished: Finished, capsys: pytest.CaptureFixture[str]
    ) -> None:
        finished.again("validate")
        assert "the model as it begins, untrained" in capsys.readouterr().out

    def test_test_prints_the_test_set(self, finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
        given = finished.command.datamodule.files[0]
        finished.again("test", finished.checkpoint, f"--data.init_args.test_files=[{given}]")
        assert "test/loss  " in capsys.readouterr().out

    def test_predict_leaves_a_line_an_example(self, finished: Finished) -> None:
        command = finished.again("predict", finished.checkpoint, "--data.init_args.eval_batch_size=4")
        lines = (Path(command.trainer.log_dir) / "predictions.jsonl").read_text().splitlines()
        batches = list(command.datamodule.predict_dataloader())
        assert len(batches) > 1
        with torch.no_grad():
            logits = [finished.command.model(b["input_ids"], b["attention_mask"]) for b in batches]
        assert [json.loads(line) for line in lines] == [row for one in logits for row in one.argmax(-1).tolist()]

    def test_export_writes_the_runs_adapter(self, finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
        out = finished.root / "exported"
        finished.again("export", finished.checkpoint, f"--out={out}")
        assert str(out) in capsys.readouterr().out
        one, two = (load_file(folder / "adapter_model.safetensors") for folder in (out, finished.folder / "adapter"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in two)
        configs = [(folder / "adapter_config.json").read_text() for folder in (out, finished.folder / "adapter")]
        assert configs[0] == configs[1]


def test_print_config_is_a_recipe(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with pytest.raises(RuntimeError, match="exit code 0"):
        finished.again("fit", "--trainer.max_rounds=7", "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_rounds"] == 7


#: What is given, and the words that must stand in the one line of the answer.
BAD_TEXT: dict[str, list[str]] = {
    "--model.init_args.cut=4": ["cut=4", "1 to 3"],
    "--model.init_args.cut=0": ["cut=0", "1 to 3"],
    "--model.init_args.cut=three": ["cut", "int", "three"],
    "--model.init_args.pretrained=/nowhere/model": ["pretrained", "/nowhere/model", "tiny_lm"],
    "--model.init_args.dtype=float7": ["dtype", "float7", "bfloat16"],
    "--model.init_args.cutt=3": ["cutt", "not accepted"],
    "--model=NoSuchModel": ["model", "NoSuchModel"],
    f"{LORA}.client.target_modules=[no_proj]": ["lora.client.target_modules", "no_proj", "q_proj"],
    f"{LORA}.server.target_modules=[no_proj]": ["lora.server.target_modules", "no_proj", "q_proj"],
    f"{LORA}.client.dropout=0.1": ["lora.client.dropout", "set it to 0"],
    f"{LORA}.server.r=0": ["r=0", "at least 1"],
    f"{METHOD}.probes=0": ["probes", "got 0"],
    f"{METHOD}.mu=0": ["mu", "> 0"],
    f"{METHOD}.mu=-0.001": ["mu", "> 0"],
    f"{METHOD}.estimator=sideways": ["estimator", "central", "sideways"],
    f"{METHOD}.distribution=cauchy": ["distribution", "gauss16", "cauchy"],
    f"{METHOD}.probez=3": ["probez", "not accepted"],
    "--trainer.algorithm=NoSuchMethod": ["trainer.algorithm", "NoSuchMethod"],
    "--trainer.clients_per_round=9": ["trainer.clients_per_round", "8 clients"],
    "--trainer.clients_per_round=0": ["trainer.clients_per_round", ">= 1"],
    "--trainer.max_rounds=0": ["trainer.max_rounds", ">= 1"],
    "--trainer.max_rounds=ten": ["trainer.max_rounds", "int", "ten"],
    "--trainer.max_round=3": ["--trainer.max_round=3", "unrecognized"],
    "--trainer.precision=16-mixed": ["trainer.precision", "16-mixed", "bf16-mixed"],
    "--trainer.accumulate_grad_batches=2": ["accumulate_grad_batches", "unrecognized"],
    "--trainer.gradient_clip_val=0": ["trainer.gradient_clip_val", "> 0"],
    "--trainer.controls=[backwards]": ["trainer.controls", "frozen", "backwards"],
    "--trainer.simulation=remote": ["trainer.simulation", "per_client", "remote"],
    "--trainer.devices=0": ["trainer.devices", "a number of processes >= 1"],
    "--data.init_args.files=[/nowhere/text.txt]": ["files", "/nowhere/text.txt"],
    "--data.init_args.files=[EMPTY]": ["files", "is empty"],
    "--data.init_args.num_clients=5000": ["num_clients=5000", "lower"],
    "--data.init_args.sequence_length=300": ["300 tokens", "256", "sequence_length"],
    "--ckpt_path=/nowhere/last.ckpt": ["ckpt_path", "/nowhere/last.ckpt"],
    "--ckpt_path=EMPTY": ["ckpt_path", "not a whole"],
}
BAD_CLASSES: dict[str, list[str]] = {
    "--data.init_args.train=LABEL_99": ["line 2", "label 99", "77 in all"],
    "--data.init_args.validation=/nowhere/v.jsonl": ["validation", "/nowhere/v.jsonl"],
    "--model.init_args.num_labels=3": ["model.init_args.num_labels", "77 classes"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").write_text("")
    (folder / "label.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 99}\n')
    return {"EMPTY": str(folder / "empty.txt"), "LABEL_99": str(folder / "label.jsonl")}


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, list[str]]:
    """Per recipe, the arguments of a good command."""
    return {
        recipe: ["fit", f"--config={recipe}", *small(recipe, tmp_path_factory.mktemp("shrunk"))]
        for recipe in (TEXT, CLASSES)
    }


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that ``hosfl args`` ends with."""
    capsys.readouterr()
    with command_line(), pytest.raises(SystemExit) as end:
        cli.main(list(args))
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("hosfl: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("recipe", "argument", "words"),
    [(TEXT, *item) for item in BAD_TEXT.items()] + [(CLASSES, *item) for item in BAD_CLASSES.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_ends_with_one_line_before_anything_is_written(
    shrunk: dict[Path, list[str]],
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    recipe: Path,
    argument: str,
    words: list[str],
) -> None:
    for name, path in files.items():
        argument = argument.replace(name, path)
    line = refused(capsys, *shrunk[recipe], f"--trainer.default_root_dir={tmp_path / 'runs'}", argument)
    assert [word for word in words if word not in line] == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["fit", "--config=/nowhere.yaml"], ["config", "/nowhere.yaml"]),
        (["fit", f"--config={TEXT}"], ["required", "pretrained"]),
        (["fit"], ["required", "model"]),
        (["fitt"], ["fitt", "compare, report, certs, join", "did you mean fit?"]),
        (["compare", "--max_round=3"], ["--max_round", "did you mean --overrides.trainer.max_rounds?"]),
        (["test", "--ckpt_path=/"], ["--ckpt_path: / is no run folder"]),
        (["validate", "--ckpt_path=best", f"--config={TEXT}"], ["'best' is not known here; give RUN"]),
    ],
)
def test_an_incomplete_command_ends_with_one_line(
    capsys: pytest.CaptureFixture[str], args: list[str], words: list[str]
) -> None:
    line = refused(capsys, *args)
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("trainer: {max_round: 3}", ["trainer.max_round", "not accept"]),
        ("trainer: {accumulate_grad_batches: 2}", ["trainer.accumulate_grad_batches", "not accept"]),
        ("trainer: {max_rounds: 3\nmodel: [", ["overlay.yaml", "line 2"]),
        ("trainer: {algorithm: {init_args: {prbes: 3}}}", ["overlay.yaml: trainer.algorithm.init_args.prbes: "]),
        ("modle: {cut: 3}", ["overlay.yaml: modle", "did you mean model?"]),
    ],
)
def test_a_bad_config_file_ends_with_one_line(
    shrunk: dict[Path, list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path, config: str, words: list[str]
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(config)
    line = refused(capsys, *shrunk[TEXT], f"--config={overlay}")
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize("action", ["fit", "validate", "export"])
def test_a_checkpoint_of_another_model_is_refused_and_left_alone(
    finished: Finished, capsys: pytest.CaptureFixture[str], tmp_path: Path, action: str
) -> None:
    checkpoint = finished.folder / "checkpoints" / "last.ckpt"
    before = checkpoint.read_bytes()
    other = [f"--trainer.default_root_dir={tmp_path}", f"{LORA}.server.r=4"]
    out = [f"--out={tmp_path / 'adapter'}"] if action == "export" else []
    line = refused(capsys, action, f"--config={finished.folder}/config.yaml", finished.checkpoint, *other, *out)
    made = "the run was made" if action == "fit" else "the weights were trained"
    assert f"model.init_args.lora.server.r is 4, {made} with 32" in line
    assert checkpoint.read_bytes() == before
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("error", "code"), [(None, 0), (ValueError("bad"), 1), (RuntimeError("bug"), 1)], ids=["done", "refused", "crashed"]
)
def test_a_wandb_run_ends_as_the_command_does(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, code: int
) -> None:
    finishes: list[int] = []

    def finish(exit_code: int) -> None:
        finishes.append(exit_code)

    def command(*args: Any, **kwargs: Any) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr("hosfl_lightning.recipe.command", command)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=object(), finish=finish))
    with pytest.raises((SystemExit, RuntimeError)) if error else nullcontext():
        cli.main([])
    assert finishes == [code]


def test_an_interrupt_ends_with_a_line_that_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("interrupted; go on with --ckpt_path=runs/version_0")

    monkeypatch.setattr("hosfl_lightning.recipe.command", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "hosfl: interrupted; go on with --ckpt_path=runs/version_0\n"


def test_a_run_says_what_it_is_at_before_its_first_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loading, tokenizing and the first validation may take minutes; where bars are off, so are these lines."""
    given = small(TEXT, tmp_path)
    command = ["fit", f"--config={TEXT}", *given, "--trainer.max_rounds=1", "--trainer.controls=null"]
    model = next(arg.partition("=")[2] for arg in given if arg.startswith("--model.init_args.pretrained="))
    lines = [f"loading {model}", "reading and tokenizing the data", "validating before round 1"]
    capsys.readouterr()
    hosfl(*command)
    assert not set(lines) & {*capsys.readouterr().out.splitlines()}
    hosfl(*command, "--trainer.enable_progress_bar=true")
    assert [line for line in capsys.readouterr().out.splitlines() if line in lines] == lines


def test_a_network_of_ones_own_is_named_by_its_class(capsys: pytest.CaptureFixture[str]) -> None:
    made = HOSFLCommand.__new__(HOSFLCommand)
    made.subcommand = "fit"
    model = Namespace(class_path="mine.Model", init_args=Namespace(pretrained=None))
    made.config = Namespace(fit=Namespace(trainer=Namespace(enable_progress_bar=True), model=model))
    made.before_instantiate_classes()
    assert "loading mine.Model" in "".join(capsys.readouterr())
