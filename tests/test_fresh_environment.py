"""`pip install .` into environments with a torch of their own: it works, and torch stays."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.long

_STAND_IN = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "torch"
version = "2.13.0a0+nv"
[tool.setuptools]
packages = []
"""


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def _environment(folder: Path) -> tuple[Path, Path]:
    """A new one, its folder of commands, and the commit that is checked out in another."""
    _run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    source = folder / "source"
    _run("git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", source, cwd=folder)
    return folder / "venv" / "bin", source


def test_the_oldest_torch_is_kept_and_the_commands_run(tmp_path: Path) -> None:
    commands, source = _environment(tmp_path)
    (tmp_path / "own.txt").write_text("torch==2.11.0\n")
    _run(commands / "pip", "install", "torch==2.11.0", cwd=tmp_path)
    before = _run(commands / "pip", "freeze", cwd=tmp_path).split()
    _run(commands / "pip", "install", "--constraint", "own.txt", source, cwd=tmp_path)
    after = _run(commands / "pip", "freeze", cwd=tmp_path).split()
    assert set(before) <= set(after)
    assert "torch==2.11.0" in after
    assert "ultramem COMMAND" in _run(commands / "ultramem", "--help", cwd=tmp_path)
    assert "--ultramem-topk" in _run(commands / "ultramem", "flags", cwd=tmp_path)
    layer = "import torch, ultramem_megatron.memory.layer; print(torch.__version__)"
    assert _run(commands / "python", "-c", layer, cwd=tmp_path).startswith("2.11.0")
    refused = subprocess.run([commands / "ultramem", "bench", "decode"], capture_output=True)
    assert refused.returncode == 2
    assert b"not in the wheel" in refused.stderr


def test_the_container_keeps_a_torch_that_is_no_release(tmp_path: Path) -> None:
    """Resolved as launch/Dockerfile has it, beside a stand-in with a version like NVIDIA's."""
    commands, source = _environment(tmp_path)
    stand_in = tmp_path / "torch"
    stand_in.mkdir()
    (stand_in / "pyproject.toml").write_text(_STAND_IN)
    (tmp_path / "own.txt").write_text("torch==2.13.0a0+nv\n")
    _run(commands / "pip", "install", stand_in, cwd=tmp_path)
    resolve = ["install", "--dry-run", "--report", "found.json", "--constraint", "own.txt"]
    _run(commands / "pip", *resolve, f"{source}[train,plots,export,data]", cwd=tmp_path)
    report = json.loads((tmp_path / "found.json").read_text())
    found = {package["metadata"]["name"] for package in report["install"]}
    assert {"megatron-core", "transformers", "ultramem-megatron"} <= found
    assert "torch" not in found


def test_it_resolves_beside_what_megatron_bridge_asks_for(tmp_path: Path) -> None:
    """Of megatron-bridge 0.6.2; itself it asks for packages of NVIDIA's containers alone."""
    commands, source = _environment(tmp_path)
    (tmp_path / "own.txt").write_text("torch==2.11.0\ntransformers<=5.12.1\n")
    resolve = ["install", "--dry-run", "--report", "found.json", "--constraint", "own.txt"]
    _run(commands / "pip", *resolve, f"{source}[train,plots,export,data]", cwd=tmp_path)
    report = json.loads((tmp_path / "found.json").read_text())
    found = {one["metadata"]["name"]: one["metadata"]["version"] for one in report["install"]}
    assert found["torch"] == "2.11.0"
    assert tuple(map(int, found["transformers"].split("."))) <= (5, 12, 1)
