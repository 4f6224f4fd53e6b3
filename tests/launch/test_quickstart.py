"""The quickstart end to end, at its tiny size: everything it promises is there and is right."""

import contextlib
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import quickstart, recipe, report, stage
from tests import ROOT
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.size import memory_size
from ultramem_megatron.memory.spans import parse_spans

STEPS = 6
WORDS = ["the", "memory", "holds", "values", "and", "each", "value", "has", "two", "keys"]


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    """What launch/quickstart.sh does once the environment is there, from another folder."""
    command = [sys.executable, "-P", "-m", "launch.quickstart", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    lines = (" ".join(WORDS[i * j % len(WORDS)] for j in range(1, 9)) for i in range(1, 600))
    file.write_text("".join(f"{i}. {line}.\n\n" for i, line in enumerate(lines)))
    return file


@pytest.fixture(scope="module")
def finished(
    text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("run") / "quick start"
    result = call("--tiny", "--text", text, "--output", folder, "--steps", STEPS, "--", "--lr=3e-3")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result


Finished = tuple[Path, subprocess.CompletedProcess[str]]


def summary_of(finished: Finished) -> dict:
    return json.loads((finished[0] / "summary.json").read_text(encoding="utf-8"))


def test_the_command_for_curves_can_be_pasted(finished: Finished) -> None:
    folder, result = finished
    [line] = [line for line in result.stdout.splitlines() if line.startswith("  curves ")]
    words = shlex.split(line)
    assert words[1:] == [".venv/bin/tensorboard", "--logdir", str(folder / "tensorboard")]


def test_summary_agrees_with_tensorboard(finished: Finished) -> None:
    summary = summary_of(finished)
    curves = report.read_curves(finished[0] / "tensorboard")
    assert [point.step for point in curves.train] == list(range(1, STEPS + 1))
    assert curves.valid[-1].step == STEPS
    loss = summary["loss"]
    assert loss["first"] == curves.train[0].value
    assert loss["last"] == curves.train[-1].value
    assert loss["validation"] == curves.valid[-1].value
    assert 5.5 < loss["first"] < 7.0  # about ln 512 before anything is learnt
    assert loss["last"] < loss["first"]
    data = json.loads((finished[0] / "data" / "data.json").read_text())
    assert loss["unigram_entropy"] == data["unigram_entropy"]
    assert 2 < loss["unigram_entropy"] < 6
    assert summary["tokens_per_second"] > 0
    assert summary["config"]["training"]["lr"] == 3e-3
    assert summary["config"]["ranks"] == 2


def test_parameters_are_counted(finished: Finished) -> None:
    config = UltraMemConfig(
        spans=parse_spans("1:2", 2), num_keys=16, key_dim=16, value_dim=16, topk=4
    )
    memory = memory_size(config, hidden_size=32)
    vocabulary = summary_of(finished)["data"]["vocab_size"]
    padded = -(-vocabulary // 128) * 128  # Megatron rounds embedding and output up
    layer = 2 * 32 + (3 + 1 + 4 + 4) * 32 * 32  # norms, attention, MLP
    expected = {"dense": 2 * padded * 32 + 2 * layer + 32 + memory.dense, "sparse": 16 * 16 * 16}
    assert memory.sparse == expected["sparse"]
    assert summary_of(finished)["parameters"] == {**expected, "total": sum(expected.values())}


def test_training_was_resumed_from_a_checkpoint(finished: Finished) -> None:
    folder = finished[0]
    resume_at = summary_of(finished)["resumed_at_step"]
    assert resume_at == recipe.make_recipe(tiny=True, steps=STEPS).resume_at
    assert {path.name for path in (folder / "checkpoints").glob("iter_*")} == {
        f"iter_{resume_at:07d}",
        f"iter_{STEPS:07d}",
    }
    first, second = ((folder / "logs" / f"{n}.log").read_text() for n in ("train", "resume"))
    assert f" iteration        1/{STEPS:8d} " in first
    assert f" iteration {resume_at + 1:8d}/" not in first
    assert f" iteration {resume_at:8d}/" not in second
    assert f" iteration {resume_at + 1:8d}/" in second


def test_sample_and_picture_are_there(finished: Finished) -> None:
    folder, result = finished
    sample = summary_of(finished)["sample"]
    assert any(word in sample["prompt"] for word in WORDS)  # from the user's own text
    assert len(sample["text"]) > len(sample["prompt"])
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (folder / "loss.png").stat().st_size > 10_000
    assert "above the unigram entropy" in result.stdout  # six steps teach little
    assert f"step {STEPS:>5}/{STEPS}" in result.stdout


def test_every_stage_is_timed(finished: Finished) -> None:
    seconds = summary_of(finished)["seconds"]
    stages = {"setup", "data", "train", "resume", "sample", "report"}
    assert set(seconds) == stages | {"total"}
    assert seconds["total"] == pytest.approx(sum(seconds[name] for name in stages), abs=2)
    assert seconds["train"] > 1


def test_finished_run_is_continued_without_training(finished: Finished, text: Path) -> None:
    folder, _ = finished
    before = (folder / "checkpoints" / "latest_checkpointed_iteration.txt").stat().st_mtime_ns
    flags = ("--tiny", "--text", text, "--output", folder, "--steps", STEPS, "--continue")
    refused = call(*flags)
    assert refused.returncode == 1
    assert "had another training" in refused.stderr
    assert "leave out --continue" in refused.stderr
    result = call(*flags, "--", "--lr", "3e-3")
    assert result.returncode == 0, result.stderr
    assert "is up to date" in result.stdout
    assert f"already at step {STEPS}" in result.stdout
    after = (folder / "checkpoints" / "latest_checkpointed_iteration.txt").stat().st_mtime_ns
    assert before == after


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The driver in this process, stopped where training would begin."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "train", stop)
    return lambda *arguments: quickstart.main([str(argument) for argument in arguments])


def test_next_call_starts_afresh_but_keeps_the_data(
    stopped: Callable[..., int], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    flags = ("--tiny", "--text", text, "--output", folder)
    assert stopped(*flags) == 130
    assert "--continue" in capsys.readouterr().err
    (folder / "checkpoints" / "iter_1").mkdir(parents=True)
    made = ("checkpoints/iter_1/old", "summary.json")
    for name in (*made, "notes.txt"):  # the last is not ours
        (folder / name).touch()
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**settings, "made": made}))
    manifest = (folder / "data" / "data.json").stat().st_ino
    assert stopped(*flags, "--steps", 9) == 130
    assert {item.name for item in folder.iterdir()} == {
        *("data", ".quickstart", "settings.json", "notes.txt")
    }
    assert (folder / "data" / "data.json").stat().st_ino == manifest


@pytest.mark.parametrize("name", ["checkpoints/mine.pt", "logs/a/b", "loss.png", "tensorboard"])
def test_what_no_stage_has_made_is_left_alone(
    stopped: Callable[..., int],
    text: Path,
    tmp_path: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--tiny", "--text", text, "--output", tmp_path / "run")
    assert stopped(*flags) == 130
    mine = tmp_path / "run" / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    if name == "tensorboard":
        (tmp_path / "disk").mkdir()
        mine.symlink_to(tmp_path / "disk")
    else:
        mine.write_text("mine")
    assert stopped(*flags, "--continue") == 130  # nor does a stage that ends make it ours
    capsys.readouterr()
    assert stopped(*flags) == 1
    assert f"run: {name} is in the way" in capsys.readouterr().err
    assert os.path.lexists(mine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "absent"], "--text absent: no such file or folder"),
        (["--steps", "1"], "--steps 1: must be at least 3"),
        (["--ranks", "0"], "--ranks 0: must be at least 1"),
        (["--continue"], "--continue: no run in"),
        (["--output", "used"], "used: another quickstart is at work there"),
        (["--output", "foreign"], "foreign: has logs, but not from a quickstart"),
        (["--output", "settings"], "settings: has settings.json, but not from a quickstart"),
    ],
)
def test_wrong_calls_end_before_training(
    stopped: Callable[..., int],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign" / "logs").mkdir(parents=True)
    (tmp_path / "used").mkdir()
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "settings.json").write_text('{"users": 1}')
    with (tmp_path / "used" / ".quickstart").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = stopped("--tiny", "--text", text, "--output", "run", *arguments)
    assert status == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "foreign" / "logs").exists()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int, int], list[str]]:
    """Ranks that claim to begin at one step and to save another; gives the launched commands."""

    def pretend(begins: int, saves: int) -> list[str]:
        commands: list[str] = []

        def run(_name: str, command: list[str], *_: object) -> None:
            commands.append(" ".join(command))
            tracker = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
            tracker.parent.mkdir(exist_ok=True)
            tracker.write_text(str(saves))

        monkeypatch.setattr(stage, "run", run)
        monkeypatch.setattr(stage.TrainingProgress, "first_step", begins, raising=False)
        monkeypatch.setattr(stage.TrainingProgress, "__init__", lambda *_: None)
        return commands

    return pretend


def make_run(folder: Path) -> quickstart.Run:
    return quickstart.Run(Namespace(), recipe.make_recipe(tiny=True, steps=8), folder, ranks=2)


def test_continued_run_does_only_what_is_left(
    ranks: Callable[[int, int], list[str]], tmp_path: Path
) -> None:
    run = make_run(tmp_path)
    first = ranks(1, 6)
    quickstart.train(run, "train", after=0, upto=6)
    assert len(first) == 1
    assert first[0].endswith("--exit-interval 6")
    assert "--load" not in first[0]
    second = ranks(7, 8)
    quickstart.train(run, "train", after=0, upto=6)
    assert second == []
    quickstart.train(run, "resume", after=6, upto=8)
    assert len(second) == 1
    assert second[0].endswith(f"--load {tmp_path / 'checkpoints'}")
    assert "--exit-interval" not in second[0]


@pytest.mark.parametrize(("begins", "saves"), [(1, 8), (7, 7)])
def test_run_that_did_not_resume_or_did_not_finish_is_noticed(
    ranks: Callable[[int, int], list[str]], tmp_path: Path, begins: int, saves: int
) -> None:
    ranks(begins, saves)
    with pytest.raises(stage.StageError, match="should train from step 7 and save step 8, but"):
        quickstart.train(make_run(tmp_path), "resume", after=6, upto=8)


def test_ending_the_driver_ends_the_ranks(text: Path, tmp_path: Path) -> None:
    flags = ["--tiny", "--text", str(text), "--output", str(tmp_path / "run"), "--steps", "99999"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "launch.quickstart", *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "2/5 training" in line:
            break
    time.sleep(2)  # torchrun is up
    assert ranks_of(tmp_path)
    process.terminate()
    assert process.wait(timeout=60) == 130
    assert ranks_of(tmp_path) == []


def ranks_of(folder: Path) -> list[str]:
    """Processes whose command line names the folder, by /proc."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if str(folder) in line and "pretrain" in line]


def test_failed_training_names_the_stage_and_the_reason(text: Path, tmp_path: Path) -> None:
    flags = ("--tiny", "--text", text, "--output", tmp_path / "run", "--ranks", 1)
    result = call(*flags, "--", "--ultramem-value-expansion", "3")
    assert result.returncode == 1
    assert "error: stage 'train' failed with exit status" in result.stderr
    assert "--ultramem-value-expansion is 3; it must be a square" in result.stderr
    assert not (tmp_path / "run" / "summary.json").exists()


def test_one_gpu_gets_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for count, ranks in ((0, 2), (1, 1), (8, 2)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.setattr(Path, "exists", lambda self: True)
        assert quickstart.choose_ranks(None) == ranks
    assert quickstart.choose_ranks(5) == 5
