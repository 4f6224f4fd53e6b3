"""`ultramem COMMAND`, and the names that commands and modules had before."""

import os
import subprocess
import sys

import pytest

from tests import ROOT
from ultramem_megatron import __version__
from ultramem_megatron.__main__ import COMMANDS, listing, main

_OLD = {
    "pretrain": "train",
    "run": "run",
    "generate": "generate",
    "plan": "plan",
    "evaluate": "evaluate",
    "export": "export",
    "inspect": "inspect",
    "verify_parallel": "verify",
    "integrity": "integrity",
}
"""Module that was run with -m -> the command it is now; presets, data and patches kept theirs."""

_PASS_ON = {"train", "run", "check", "plan", "verify", "bench", "gpu-report"}
"""Flags that are not theirs are Megatron's or another process's to refuse."""


def _python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_listing_has_a_line_for_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in shown
        assert command.about in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "'trian' is no command"),
        (["data"], "data prepare"),
        (["data", "praepare"], "'data praepare' is no command. There are: data prepare, data"),
        (["-x"], "There are: train, run, "),
    ],
)
def test_a_wrong_command_is_refused_with_those_there_are(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - _PASS_ON))
def test_a_wrong_flag_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        sys.exit(main([*name.split(), "--nosuch"]))
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.endswith(f" ultramem {name} --help says more.\n")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--version"], f"ultramem_megatron {__version__}\n"),
        (["help"], listing() + "\n"),
        (["data", "--help"], listing("data") + "\n"),
    ],
)
def test_what_is_said_without_a_command(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out == said


def test_no_text_asks_for_a_package_that_no_index_has() -> None:
    asked = r"pip install [^`]*ultramem-megatron"
    found = subprocess.run(["git", "grep", "-E", asked], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, "")


@pytest.mark.parametrize("words", [[], ["presets", "ultramem-1.6b-x12"]])
def test_a_reader_that_leaves_is_no_error(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "ultramem_megatron", *words],
        cwd=ROOT,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_listing_of_one_word() -> None:
    assert listing("data").count("\n") == sum(name.split()[0] == "data" for name in COMMANDS)


@pytest.mark.parametrize("old", _OLD)
def test_an_old_command_runs_and_says_its_new_name_once(old: str) -> None:
    done = _python("-m", f"ultramem_megatron.{old}", "--help" if old != "run" else "absent.py")
    new = f"`python -m ultramem_megatron {_OLD[old]}`"
    assert done.stderr.count(new) == 1, done.stderr
    if old == "run":  # its --help would be the script's own
        assert done.returncode == 2
        assert "absent.py: no such script" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout


def test_an_old_module_is_the_new_one_and_says_so_once() -> None:
    code = (
        "from ultramem_megatron.config import UltraMemConfig\n"
        "import ultramem_megatron.config, ultramem_megatron.memory.config as new\n"
        "assert UltraMemConfig is new.UltraMemConfig\n"
    )
    done = _python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is now ultramem_megatron.memory.config") == 1
