"""What the package asks for: ranges that admit what was tested, and everything that it imports."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests import ROOT
from ultramem_megatron.errors import _EXTRAS

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
_WHEELS_OWN = ("ultramem_megatron", "kernels", "patches")
_MODULES = {
    "lm_eval": "lm-eval",
    "megatron": "megatron-core",
    "transformer_engine": "transformer-engine",
}
"""Module -> distribution, where the names differ."""
_BROUGHT = {"triton", "omegaconf", "pytest"}
"""By torch and by megatron-core[training]; pytest only where tests run."""


def _requirements(*extras: str) -> list[Requirement]:
    optional = _PROJECT["optional-dependencies"]
    words = [*_PROJECT["dependencies"], *(word for extra in extras for word in optional[extra])]
    return [Requirement(word) for word in words if not word.startswith("ultramem-megatron")]


def _named(requirements: list[Requirement]) -> set[str]:
    return {requirement.name.lower().replace("_", "-") for requirement in requirements}


def test_ranges_admit_the_versions_that_were_tested_together() -> None:
    pins = [
        Requirement(line)
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    ranges = {r.name: r for r in _requirements("train", "plots", "export", "data")}
    assert {pin.name for pin in pins} <= set(ranges) | {"megatron-core"}
    for pin in pins:
        (version,) = (clause.version for clause in pin.specifier)
        assert ranges[pin.name].specifier.contains(version), pin


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("torch", "2.11.0"),
        ("torch", "2.15.0"),
        ("transformers", "5.12.1"),
        ("megatron-core", "0.17.1"),
    ],
)
def test_ranges_admit_what_other_peoples_environments_have(name: str, version: str) -> None:
    for requirement in _requirements("train"):
        if requirement.name == name:
            assert requirement.specifier.contains(version)


def _imported() -> set[str]:
    found = set()
    for folder in _WHEELS_OWN:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"ultramem_megatron"} - _BROUGHT


def test_everything_imported_is_asked_for() -> None:
    asked = _named(_requirements(*(set(_PROJECT["optional-dependencies"]) - {"all", "dev"})))
    assert {_MODULES.get(name, name) for name in _imported()} <= asked


def test_a_missing_extra_is_named_by_the_one_that_brings_it() -> None:
    for package, extra in _EXTRAS.items():
        if package not in _BROUGHT:
            assert _MODULES.get(package, package) in _named(_requirements(extra))


def test_a_wheel_holds_the_code_and_no_measurements(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in (*_WHEELS_OWN, "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(tmp_path),
            str(source),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"ultramem_megatron/py.typed", "ultramem_megatron/kernels/dispatch.py"} <= names
    assert "ultramem_megatron/patches/doors/flops.py" in names
    assert "ultramem_megatron/tools/old_names/pretrain.py" in names
    assert not [name for name in names if re.match(r"(launch|tests)/", name)]
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    command = "from ultramem_megatron.__main__ import main; main(['--help'])"
    shown = subprocess.run(
        [sys.executable, "-c", command],
        env={"PYTHONPATH": str(installed)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "ultramem COMMAND" in shown.stdout
