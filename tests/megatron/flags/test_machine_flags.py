"""Flags filled in for the machine, never over the user's."""

import itertools

import pytest
import torch

from ultramem_megatron.megatron.flags import machine_flags


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine_flags, "_has", lambda module: False)
    monkeypatch.delenv("RANK", raising=False)
    # Set by `complete`; setting it here lets the fixture restore it.
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")


@pytest.mark.usefixtures("bare_machine")
def test_a_bare_machine_gets_everything_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    argv = machine_flags.complete(["--num-layers", "2"])
    assert argv[:2] == ["--num-layers", "2"]
    pairs = list(itertools.pairwise(argv))
    assert ("--distributed-backend", "gloo") in pairs
    assert ("--transformer-impl", "local") in pairs
    for flag in (
        "--use-cpu-initialization",
        "--no-persist-layer-norm",
        "--no-gradient-accumulation-fusion",
        "--no-masked-softmax-fusion",
        "--no-bias-dropout-fusion",
        "--no-bias-gelu-fusion",
        "--no-bias-swiglu-fusion",
        "--no-rope-fusion",
    ):
        assert argv.count(flag) == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "--distributed-backend gloo" in said


@pytest.mark.usefixtures("bare_machine")
@pytest.mark.parametrize("given", [["--distributed-backend", "mpi"], ["--distributed-backend=mpi"]])
def test_what_the_user_gave_stays(given: list[str]) -> None:
    argv = machine_flags.complete(given)
    assert "gloo" not in argv
    assert argv[: len(given)] == given


@pytest.mark.usefixtures("bare_machine")
def test_what_gloo_cannot_reduce_is_not_asked_of_it() -> None:
    assert "--no-gradient-reduce-div-fusion" in machine_flags.complete(["--use-megatron-fsdp"])
    assert "--no-gradient-reduce-div-fusion" not in machine_flags.complete(["--use-torch-fsdp2"])


def test_completing_twice_adds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    once = machine_flags.complete([])
    capsys.readouterr()
    assert machine_flags.complete(once) == once
    assert capsys.readouterr().out == ""


def test_a_gpu_machine_with_everything_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine_flags, "_has", lambda module: True)
    assert machine_flags.complete(["--num-layers", "2"]) == ["--num-layers", "2"]


def test_a_gpu_machine_without_transformer_engine_keeps_nccl(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine_flags, "_has", lambda module: module != "transformer_engine")
    flags = machine_flags.needed_flags()
    assert flags == {"--transformer-impl": ("local",), "--no-rope-fusion": ()}
