"""A checkpoint is data: whatever is planted into its files, no command runs it."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.planted import KINDS, TRUSTING, planted
from tests.ranks import run_on_ranks
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.faults.trust import TRUST

_CHECKED: dict[str, Any] = {"ckpt_format": "torch_dist", "verify_integrity": True}
_MEMORY: dict[str, Any] = {
    **_CHECKED,
    "ultramem_spans": "1:2",
    "ultramem_num_keys": 12,
    "ultramem_topk": 6,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return _saved(tmp_path_factory.mktemp("whole"), _MEMORY)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return _saved(tmp_path_factory.mktemp("dense"), _CHECKED)


def _saved(folder: Path, flags: dict[str, Any]) -> Path:
    run_pretrain(1, tiny_gpt(**flags, save=folder, save_interval=2, train_iters=2))
    return folder


def _decoders(load: Path, out: Path) -> dict[str, list[str]]:
    text = out / "text.txt"
    text.write_text("1 2 3 4 5 6 7 8")
    return {
        "integrity": ["integrity", str(load)],
        "inspect": ["inspect", "--load", str(load), "--text", str(text), "--out", str(out / "i")],
        "export": ["export", "--load", str(load), "--to", str(out / "export")],
        "evaluate": ["evaluate", "--load", str(load), "--data", str(out / "none")],
        "generate": ["generate", "--load", str(load), "--prompt", "1 2", "--tokens", "2"],
    }


def _trainings(load: Path) -> dict[str, list[str]]:
    train = ["train", *tiny_gpt(**_MEMORY, train_iters=3, override_opt_param_scheduler=True)]
    return {
        "train": [*train, "--load", str(load)],
        "train with its flags": [*train, "--load", str(load), "--use-checkpoint-args"],
        "train from its weights": [*train, "--pretrained-checkpoint", str(load)],
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


@pytest.mark.parametrize("kind", KINDS)
def test_no_command_that_reads_runs_what_is_planted(kind, whole, tmp_path):
    load = planted(whole, tmp_path, kind)
    ends = run_on_ranks(1, _try, tmp_path, _decoders(load, tmp_path))[0]
    _check(ends, refused=kind not in ("nothing", "random state"))
    assert ends["integrity"][0] == 0


_FAST = ("nothing", "flags", "extra state", "flag that names a module")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in _FAST else pytest.mark.long) for k in KINDS]
)
def test_no_training_runs_what_is_planted(kind, whole, dense, tmp_path):
    upcycled = tmp_path / "upcycled"
    upcycled.mkdir()
    trainings = _trainings(planted(whole, tmp_path, kind))
    trainings["upcycle"] = [
        *trainings["train"][:-2],
        "--ultramem-upcycle",
        str(planted(dense, upcycled, kind)),
    ]
    for name, argv in trainings.items():  # Megatron parses its flags once in a process
        folder = upcycled if name == "upcycle" else tmp_path
        ends = run_on_ranks(1, _try, folder, {name: argv})[0]
        unread = kind == "random state" and name not in ("train", "train with its flags")
        repaired = kind == "tracker" and name.startswith("train")
        _check(ends, refused=not unread and not repaired and kind != "nothing")


def _check(ends: dict[str, tuple[int, str, bool]], refused: bool) -> None:
    for command, (status, messages, ran) in ends.items():
        assert not ran, f"{command} ran what was planted"
        if refused and command != "integrity":
            assert status == 2, (command, messages)
            assert messages.splitlines()[-1].startswith("error: "), (command, messages)
        elif command in ("inspect", "export", "upcycle") or command.startswith("train"):
            assert status == 0, (command, messages)


def test_files_of_ones_own_may_be_trusted(whole, tmp_path):
    """It also shows that the payload is one."""
    load = planted(whole, tmp_path, "flags")
    export = {"export": _decoders(load, tmp_path)["export"]}
    assert run_on_ranks(1, _try, tmp_path, export, env={TRUST: "1"})[0]["export"][2]


def _tokenizer_with_code(folder: Path) -> str:
    """A tokenizer's folder in which every file that may name a class names one that makes MARK."""
    names = folder / "tokenizer"
    names.mkdir()
    mark = f"open({str(folder / 'MARK')!r}, 'w').close()"
    (names / "planted_class.py").write_text(mark)
    (folder / "planted_module.py").write_text(mark)
    of_class = {"AutoTokenizer": ["planted_class.T", "planted_class.T"], "AutoConfig": "x.T"}
    asked = {"auto_map": of_class, "tokenizer_class": "T", "model_type": "planted"}
    for file in ("tokenizer_config.json", "config.json"):
        (names / file).write_text(json.dumps(asked))
    asked = {"tokenizer_class": "planted_module.T", "class_path": "planted_module"}
    (names / "tokenizer_metadata.json").write_text(json.dumps(asked))
    return str(names)


def test_no_command_runs_what_a_tokenizer_names(whole, tmp_path):
    """Nor where the checkpoint's own flags ask for it."""
    load = planted(whole, tmp_path, TRUSTING)
    flags = ["--tokenizer-model", _tokenizer_with_code(tmp_path)]
    commands = _decoders(load, tmp_path)
    trainings = _trainings(load)
    for name, argv in {
        "generate": [*commands["generate"], *flags],
        "train": [*trainings["train"], "--tokenizer-type", "HuggingFaceTokenizer", *flags],
        "train with its flags": [*trainings["train with its flags"], *flags],
    }.items():
        status, messages, ran = run_on_ranks(1, _try, tmp_path, {name: argv})[0][name]
        assert not ran, f"{name} ran what the tokenizer names"
        assert status == 2, (name, messages)
        assert messages.splitlines()[-1].startswith("error: "), (name, messages)
