"""``hosfl certs`` from end to end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hosfl_lightning import cli
from hosfl_lightning.link.credentials import Site
from hosfl_lightning.link.revoked import Revoked
from hosfl_lightning.usage import usage
from tests.recipe_runs import SOURCES


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def certs(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """What the command prints."""
    capsys.readouterr()
    cli.main(["certs", *line.split()])
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "PRIVATE" not in printed.out
    return printed.out


def refused(capsys: pytest.CaptureFixture[str], line: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(["certs", *line.split()])
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [error] = printed.err.splitlines()
    assert error.startswith("hosfl: error: ")
    return error


def test_from_nothing_to_a_client_that_is_shut_out(capsys: pytest.CaptureFixture[str]) -> None:
    said = certs(capsys, "init --out certs/ca --name consortium")
    assert [word for word in ("consortium", "certs/ca/ca.key", "ca.crt", "revoked.txt") if word not in said] == []
    said = certs(capsys, "server --ca certs/ca --host fl.example.org --host 10.0.0.1 ::1 --out certs/server --days 20")
    assert "fl.example.org, 10.0.0.1, ::1" in said
    said = certs(capsys, "client --ca certs/ca --name hospital-a --out certs/a")
    assert "clients.yaml" in said
    server, client = Site.load("certs/server", "server"), Site.load("certs/a", "client")
    assert f"valid until {server.not_after:%Y-%m-%d}" in certs(
        capsys, "server --ca certs/ca --host a --out certs/server2 --days 20"
    )
    assert (server.name, client.name) == ("fl.example.org", "hospital-a")
    said = certs(capsys, "client --ca certs/ca --name hospital-a --out certs/a2")
    assert f"--serial {client.serial:x}" in said
    newer = Site.load("certs/a2").serial
    said = certs(capsys, f"revoke --ca certs/ca --serial {client.serial:x}")
    assert f"hospital-a, serial number {client.serial:x}" in said
    assert "Copy certs/ca/revoked.txt into the folder of the server" in said
    assert Revoked("certs/ca/revoked.txt").serials == {client.serial}
    certs(capsys, "revoke --ca certs/ca --name hospital-a")
    revoked = Revoked("certs/server/revoked.txt")
    assert newer not in revoked
    shutil.copy("certs/ca/revoked.txt", "certs/server/revoked.txt")
    assert newer in revoked
    assert client.serial in revoked
    assert "revoked already" in certs(capsys, "revoke --ca certs/ca --name hospital-a")


BAD = {
    "": ["required", "COMMAND"],
    "make": ["invalid choice", "init"],
    "init": ["--out"],
    "init --out ca": ["out=ca is there already", "new or an empty"],
    "init --out new --name a/b": ["name='a/b'"],
    "init --out new --days 0": ["--days", "'0'", "36500"],
    "init --out new --days -3": ["--days"],
    "init --out new --days 1e3": ["--days", "'1e3' is not a number of days"],
    "init --out ca/ca.key/new": ["ca/ca.key: File exists"],
    "server --ca ca --out new": ["--host"],
    "server --ca ca --out new --host": ["--host"],
    "server --ca ca --out new --host a:1": ["host='a:1'", "port"],
    "server --ca nowhere --out new --host a": ["nowhere is no CA", "hosfl certs init"],
    "client --ca ca --out new": ["--name"],
    "client --ca ca --name a": ["--out"],
    "client --ca ca --name ../a --out new": ["name='../a'"],
    "client --ca ca --name a --out new --days 9999": ["days=9999", "ends after the CA"],
    "client --ca ca --nam a --out new": ["--nam"],
    "revoke --ca ca": ["--name", "--serial"],
    "revoke --ca ca --name a --serial 1": ["not allowed with"],
    "revoke --ca ca --name nobody": ["name='nobody'", "has to nobody"],
    "revoke --ca ca --serial xyz": ["'xyz'", "hexadecimal"],
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_ends_with_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str
) -> None:
    certs(capsys, "init --out ca")
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}
    error = refused(capsys, line)
    assert [word for word in BAD[line] if word not in error] == []
    assert {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_help_is_found_and_shows_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\n  certs " in usage()
    with pytest.raises(SystemExit) as end:
        cli.main(["certs", "--help"])
    assert not end.value.code
    said = capsys.readouterr().out
    commands = ["certs init --out", "certs server --ca", "certs client --ca", "certs revoke --ca"]
    assert [words for words in commands if words not in said] == []
    assert max(map(len, said.splitlines())) <= 120


def test_nothing_else_needs_the_libraries() -> None:
    """Not the package, and not the command line."""
    code = (
        "import sys; sys.modules['grpc'] = sys.modules['cryptography'] = None\n"
        "import hosfl_lightning.cli, hosfl_lightning.orchestrator, hosfl_lightning.link.allow_list\n"
        "hosfl_lightning.cli.main(['certs', 'init', '--out', 'ca'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].endswith("pip install 'hosfl_lightning[remote]'")
    assert "cryptography" in ended.stderr


def test_it_waits_for_no_run_to_be_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from hosfl_lightning.cli import main\n"
        "main(['certs', 'init', '--out', 'ca'])\n"
        "assert not {'torch', 'lightning', 'wandb'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=60,
                   env={**os.environ, "PYTHONPATH": SOURCES})  # fmt: skip
