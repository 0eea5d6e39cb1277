"""The docs: links lead somewhere, examples compile and run, keys are logged, recipes and callbacks are all there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from hosfl_lightning import callbacks
from hosfl_lightning.callbacks.communication_monitor import KINDS, RARE_KINDS
from hosfl_lightning.cli import main
from hosfl_lightning.privacy import Privacy
from tests.callbacks.drop_in.plain_modules import LIGHTNING_WARNINGS, fit, hybrid, mlp
from tests.recipe_runs import ROOT, command_line, header_commands, name_of
from tests.small_run import SmallRun

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
RECIPES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if header_commands(path)]
pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`"),
    pytest.mark.filterwarnings("ignore:the two sides of a probe"),
]
FIGURES = re.compile(r"\d\.\d")
RUNNABLE = "# runnable\n"


def name(path: Path) -> str:
    return path.relative_to(DOCS).as_posix()


def python_of(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


def rows_of(path: Path) -> set[str]:
    return {line for line in path.read_text().splitlines() if line.startswith("|")}


def keys_of(kind: type) -> set[str]:
    """In the first column of the tables in a docstring."""
    cells = re.findall(r"^\s*\| (``.*?``) \|", kind.__doc__ or "", flags=re.MULTILINE)
    return {key for cell in cells for key in re.findall(r"``([\w/<>]+)``", cell)}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Keys of a run in rounds and of two runs of a plain Trainer, but for the module's own."""
    run = SmallRun(tmp_path_factory.mktemp("run"))
    run.fit(
        callbacks.GradientAlignment(every_n_rounds=1),
        callbacks.Budget(),
        max_rounds=2,
        privacy=Privacy(clip=1.0, epsilon=8.0),
    )
    keys = set((run.folder / "metrics.csv").read_text().splitlines()[0].split(","))
    for callback in (hybrid(), callbacks.ZerothOrderTraining()):
        keys |= set(fit(mlp(), callback, callbacks.PeakMemoryMonitor()).callback_metrics)
    return {key for key in keys if "/" in key and not key.startswith("val/")}


class TestLinks:
    @pytest.mark.parametrize("path", PAGES, ids=name)
    def test_lead_somewhere(self, path: Path) -> None:
        links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))
        local = [link.split("#")[0] for link in links if not link.startswith(("http", "#"))]
        assert [link for link in local if not (path.parent / link).exists()] == []

    def test_every_page_is_in_the_navigation_or_grows_there(self) -> None:
        nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
        named = set(re.findall(r"[\w/]+\.md", str(nav)))
        assert named == {name(path) for path in PAGES if path.parent == DOCS}


def columns_of(text: str) -> list[int]:
    """Of each table."""
    return [line.count("|") - 1 for line in re.findall(r"^\|[-:| ]+\|$", text, flags=re.MULTILINE)]


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_no_table_is_wider_than_a_page_shows(path: Path) -> None:
    assert max(columns_of(path.read_text()), default=0) <= 7


class TestExamples:
    def test_there_are_some(self) -> None:
        assert sum(RUNNABLE in code for path in PAGES for code in python_of(path)) >= 3

    @pytest.mark.parametrize("path", [path for path in PAGES if python_of(path)], ids=name)
    def test_compile(self, path: Path) -> None:
        for code in python_of(path):
            compile(code, name(path), "exec")

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile's own look at its inputs
    @pytest.mark.parametrize("path", [p for p in PAGES if any(RUNNABLE in c for c in python_of(p))], ids=name)
    def test_run_one_after_the_other(self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls what jsonargparse renamed
        names: dict[str, object] = {"__name__": "docs"}
        for code in python_of(path):
            if code.startswith(RUNNABLE):
                exec(code, names)
        assert "trainer" in names


def commands_of(path: Path) -> list[list[str]]:
    """What begins with ``hosfl`` in a page's indented blocks and starts from a recipe, split as a shell would."""
    found = re.findall(r"^ {4}.*?\b(hosfl .*--config recipes/.*)$", path.read_text().replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(command) for command in found]


COMMANDS = [words for path in PAGES for words in commands_of(path)]


class TestCommands:
    def test_there_are_some(self) -> None:
        assert {words[1] for words in COMMANDS} == {"fit", "compare", "advise", "export-client"}

    @pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
    def test_is_understood(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with command_line(), pytest.raises(SystemExit) as end:
            main([*words[1:], "--print_config"])
        assert end.value.code == 0, capsys.readouterr().err

    def test_scripts_are_there(self) -> None:
        text = "".join(path.read_text() for path in PAGES)
        files = re.findall(r"python ((?:tools|benchmarks)/\w+\.py)", text)
        files += [f"{module.replace('.', '/')}.py" for module in re.findall(r"python -m (benchmarks\.\w+)", text)]
        assert len(files) >= 4
        assert [file for file in files if not (ROOT / file).is_file()] == []


class TestCallbacks:
    def test_all_are_in_the_reference(self) -> None:
        there = re.findall(
            r"^::: hosfl_lightning\.callbacks\.(\w+)$", (DOCS / "callbacks.md").read_text(), re.MULTILINE
        )
        assert sorted(there) == sorted(callbacks.__all__)

    @pytest.mark.parametrize("callback", callbacks.__all__)
    def test_every_key_of_its_tables_is_logged(self, callback: str, logged: set[str]) -> None:
        documented = keys_of(getattr(callbacks, callback)) - {"memory/cuda_peak_bytes", "comm/<kind>_bytes"}
        assert sorted(documented - logged) == []

    def test_every_logged_key_is_in_a_table(self, logged: set[str]) -> None:
        documented = {key for name in callbacks.__all__ for key in keys_of(getattr(callbacks, name))}
        documented |= {f"comm/{kind}_bytes" for kind in (*KINDS, *RARE_KINDS)}
        the_orchestrators = re.findall(r"`(\w+/\w+)`", (DOCS / "callbacks.md").read_text())
        assert sorted(logged - documented - set(the_orchestrators)) == []


class TestRecipes:
    @pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
    def test_is_listed_with_its_command(self, recipe: Path) -> None:
        commands = [command.split() for command in re.findall(r"`(hosfl .*?)`", (DOCS / "recipes.md").read_text())]
        assert header_commands(recipe)[0] in commands


def test_figures_of_choosing_are_rows_of_what_was_measured() -> None:
    measured = {row for path in (DOCS / "results").glob("*.md") for row in rows_of(path)}
    unlinked = {re.sub(r"\(results/", "(", row) for row in rows_of(DOCS / "choosing.md")}
    figures = {row for row in unlinked if FIGURES.search(row)}
    assert figures
    assert figures - measured == set()
