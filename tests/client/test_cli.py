"""What a person who gave the command wrongly is told: one line, the setting and the fix."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from hosfl_client import cli
from hosfl_client.credentials import CredentialsError, Site
from hosfl_client.joined import Joined
from hosfl_client.own_state import OwnState
from hosfl_client.state import NumpyStorage
from hosfl_lightning.link.authority import Authority
from tests.recipe_runs import ROOT

NAME = "Lab-a.1_x"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    Authority.make(folder / "ca", "authority").client(NAME, folder / "site")
    return folder / "site"


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1, error
    return error


def join(**changes: str | None) -> list[str]:
    given = {"server": "127.0.0.1:1", "half": "no/phone.onnx", "data": "x.txt", "name": "a", **changes}
    return ["join", "--insecure", *(f"--{k}={v}" for k, v in given.items() if v is not None)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"server": "here"}, "--server must be HOST:PORT, the port at most 65535, got 'here'"),
        ({"server": "127.0.0.1:99999"}, "the port at most 65535, got '127.0.0.1:99999'"),
        ({"half": "."}, "--half: . is a folder; give the .onnx file in it"),
        ({"half": None}, "the following arguments are required: --half (hosfl-client join --help)"),
        ({"threads": "0"}, "argument --threads: must be an integer >= 1, got '0'"),
        ({"save-every": "-1"}, "argument --save-every: must be an integer >= 1, got '-1'"),
        ({"server": "example.org:1"}, "--insecure sends everything in plain text"),
        ({"name": None}, "--name: without certificates a client must say who it is"),
        ({}, "--half: no/phone.json: no manifest of an exported half (No such file or directory); copy all files"),
    ],
)
def test_one_line(changes: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in said(join(**changes), capsys)


def test_help_imports_nothing_that_takes_time() -> None:
    code = "import sys; from hosfl_client import cli\ntry: cli.main(['join', '--help'])\nfinally: print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": str(ROOT / "client")}).stdout  # fmt: skip
    assert "--half FILE" in told and "nothing else is ever connected to" in told
    assert not {"numpy", "onnxruntime", "grpc", "tokenizers", "torch"} & {*told.splitlines()[-1].split()}


def test_onnx_runtime_reports_nothing(exported: Any, tmp_path: Path) -> None:
    """It keeps a number of the device, and what it will send, under the home of who runs it."""
    told = {k: v for k, v in os.environ.items() if k not in ("CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    half = exported()
    code = f"from hosfl_client.half import OnnxHalf; OnnxHalf({str(half)!r}, 1)"
    subprocess.run([sys.executable, "-c", code], check=True,
                   env={**told, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "client")})  # fmt: skip
    assert not [*tmp_path.rglob("deviceid")]


@pytest.mark.parametrize("case", ["a file", "below a file", "read-only"])
def test_a_state_that_cannot_be_written(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "state"
    if case == "read-only":
        monkeypatch.setattr("os.access", lambda *_: False)
    else:
        folder.write_text("")
    with pytest.raises(ValueError, match=r"--state: .*state.*; give a folder in which this client can write"):
        OwnState(folder / "a" if case == "below a file" else folder, NumpyStorage())


def test_a_site_is_known_by_its_certificate(site: Path) -> None:
    assert Site.load(site).name == NAME


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "ca.crt").unlink(), "ca.crt is missing; take all of the folder"),
        (lambda folder: (folder / "site.key").write_text("x"), "has no PRIVATE KEY in PEM"),
        (lambda folder: (folder / "site.crt").write_bytes((folder / "site.key").read_bytes()), "no CERTIFICATE in PEM"),
        (lambda folder: (folder / "site.key").write_text(
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"), "has a password"),
        (lambda folder: (folder / "site.crt").write_text(
            "-----BEGIN CERTIFICATE-----\nMAMCAQU=\n-----END CERTIFICATE-----\n"), "is no certificate in PEM"),
        (lambda folder: (folder / "site.crt").write_text(
            "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"), "is no certificate in PEM"),
        (shutil.rmtree, "is no folder"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_whole(change: Any, words: str, site: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(site, tmp_path / "site"))
    change(folder)
    with pytest.raises(CredentialsError, match=words):
        Site.load(folder)


def test_it_writes_now_and_then() -> None:
    with pytest.raises(ValueError, match="save_every must be >= 1, got 0"):
        Joined("a", "0", Mock(), [], Mock(), save_every=0)


def test_a_key_that_others_can_read(site: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(site, tmp_path / "site"))
    (folder / "site.key").chmod(0o644)
    with pytest.warns(UserWarning, match="chmod 600"):
        Site.load(folder)


def test_what_is_kept_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, run = OwnState(tmp_path / "state", NumpyStorage()), bytes(16)
    state = {"0.theta": np.arange(6, dtype=np.float32).reshape(2, 3), "0.exp_avg": np.zeros(6, np.float32)}
    disk.save_shared(state, run, 4, "abc")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        disk.save_shared({"0.theta": np.ones(1, np.float32)}, run, 5, "abc")
    found = disk.shared(run)
    assert found is not None and found[1:] == (4, "abc")
    assert all(np.array_equal(found[0][name], array) for name, array in state.items())
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["shared.safetensors"]
    assert disk.shared(bytes([1]) * 16) is None
