"""`ultramem COMMAND --help` of every command: works, keeps examples as typed, and is quick."""

import importlib
import subprocess
import sys

import pytest

from ultramem_megatron.__main__ import COMMANDS

_MEGATRONS = {"train"}
"""Whose help is Megatron's own parser's."""

_ASK = """
import sys
from ultramem_megatron.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
print("torch" in sys.modules or "megatron.core" in sys.modules, file=sys.stderr)
"""


def _ask(*words):
    return subprocess.run(
        [sys.executable, "-c", _ASK, *words], capture_output=True, text=True, check=False
    )


def _help(*words):
    return _ask(*words, "--help")


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - _MEGATRONS))
def test_help_needs_no_torch_and_keeps_examples_as_typed(name):
    done = _help(*name.split())
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "False", "torch or Megatron was imported"
    assert f"ultramem {name}" in done.stdout.splitlines()[0]
    about = importlib.import_module(f"ultramem_megatron.{COMMANDS[name].module}").__doc__ or ""
    if about.splitlines()[0] in done.stdout:  # else the command has a description of its own
        assert about.strip() in done.stdout


def test_the_listing_of_flags_needs_no_torch():
    done = _ask("flags", "--ultramem-preset", "ultramem-1.6b-x12")
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "False", "torch or Megatron was imported"
    assert "pkm: product keys, the baseline. One of: tdqkr, pkm." in " ".join(done.stdout.split())


def test_help_of_train_lists_megatrons_flags_and_ours_in_groups():
    done = _help("train")
    assert done.returncode == 0, done.stderr[-2000:]
    for said in (
        "--ultramem-topk",
        "UltraMem memory layers: their tables on many ranks:",
        "--tensor-model-parallel-size",
        "1.10 = 10%",  # the lone % that was a traceback
    ):
        assert said in done.stdout
    assert "Falling back" not in done.stderr
