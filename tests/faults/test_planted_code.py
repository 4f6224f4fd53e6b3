"""A checkpoint is data: whatever is planted into its files, no command runs it."""

import contextlib
import os
import sys
from pathlib import Path

import pytest

from tests.faults.planted import KINDS, planted
from tests.ranks import run_on_ranks
from tests.training_runs import run_pretrain, tiny_gpt

_MEMORY = {
    "ultramem_spans": "1:2", "ultramem_num_keys": 12, "ultramem_topk": 6,
    "ckpt_format": "torch_dist", "verify_integrity": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_pretrain(1, tiny_gpt(**_MEMORY, save=folder, save_interval=2, train_iters=2))
    return folder


def _decoders(load: str, out: Path) -> dict[str, list[str]]:
    text = out / "text.txt"
    text.write_text("1 2 3 4 5 6 7 8")
    return {
        "generate": ["generate", "--load", load, "--prompt", "1 2", "--tokens", "2"],
        "evaluate": ["evaluate", "--load", load, "--data", str(out / "none")],
        "export": ["export", "--load", load, "--to", str(out / "export")],
        "inspect": ["inspect", "--load", load, "--text", str(text), "--out", str(out / "i")],
    }


def _trainings(load: str) -> dict[str, list[str]]:
    train = ["train", *tiny_gpt(**_MEMORY, train_iters=3, override_opt_param_scheduler=True)]
    return {
        "train": [*train, "--load", load],
        "train with its flags": [*train, "--load", load, "--use-checkpoint-args"],
        "train from its weights": [*train, "--pretrained-checkpoint", load],
        "upcycle": [*train, "--ultramem-upcycle", load],
    }


def _run(argv: list[str], messages: Path) -> tuple[int, str]:
    """Exit status and standard error of `ultramem` with these words."""
    from ultramem_megatron.__main__ import main

    status = 0
    with messages.open("w") as errors, contextlib.redirect_stderr(errors):
        try:
            main(argv)
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException as error:
            status = 1
            print(repr(error), file=errors)
    return status, messages.read_text()


def _try(folder: Path, commands: dict[str, list[str]]) -> dict[str, tuple[int, str, bool]]:
    """By command: status, messages, and whether it ran the payload."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))  # as python -m has it
    mark, ends = folder / "MARK", {}
    for name, argv in commands.items():
        status, messages = _run(argv, folder / "messages.txt")
        ends[name] = (status, messages, mark.exists())
        mark.unlink(missing_ok=True)
    return ends


def _tried(whole: Path, folder: Path, kind: str) -> dict[str, tuple[int, str, bool]]:
    load = planted(whole, folder, kind)
    verify = {"verify": ["integrity", str(load)]}
    ends = run_on_ranks(1, _try, folder, verify | _decoders(str(load), folder))[0]
    for name, argv in _trainings(str(load)).items():  # Megatron parses once in a process
        ends |= run_on_ranks(1, _try, folder, {name: argv})[0]
    return ends


@pytest.mark.parametrize("kind", KINDS)
def test_no_command_runs_what_is_planted(kind, whole, tmp_path):
    for command, (status, messages, ran) in _tried(whole, tmp_path, kind).items():
        assert not ran, f"{command} ran what was planted"
        last = messages.strip().splitlines()[-1:]
        print(kind, "|", command, "|", status, "|", last)
