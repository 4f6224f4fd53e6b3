"""Half a launcher's environment is refused by name; GPUs that torch cannot see are told of."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from tests.training_runs import tiny_gpt
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults.launcher_environment import check_launcher_environment
from ultramem_megatron.faults.unseen_gpus import refuse_unseen_gpus, warn_of_unseen_gpus

_ALL = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "1",
}


@pytest.fixture
def launched(monkeypatch):
    """Call with what a launcher sets, by name; nothing else of its kind is set."""

    def environment(**given):
        for name in _ALL:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    environment()
    return environment


def test_all_of_it_or_none_is_taken(launched):
    for given in ({}, _ALL, {"MASTER_ADDR": "host", "MASTER_PORT": "1"}):
        launched(**given)
        check_launcher_environment()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_what_is_missing_is_named(launched, name):
    launched(**{given: value for given, value in _ALL.items() if given != name})
    with pytest.raises(UltraMemError, match=rf"LOCAL_RANK=0.* but not {name}: half of what"):
        check_launcher_environment()


def test_ranks_that_cannot_be_are_refused(launched):
    launched(**{**_ALL, "RANK": "2"})
    with pytest.raises(UltraMemError, match="RANK=2 in the environment, but WORLD_SIZE=2: 0 to 1"):
        check_launcher_environment()
    launched(**{**_ALL, "WORLD_SIZE": "two"})
    with pytest.raises(UltraMemError, match="WORLD_SIZE=two in the environment is no number"):
        check_launcher_environment()


def test_train_ends_at_once_instead_of_waiting_for_ranks(launched):
    launched(WORLD_SIZE="4")
    done = subprocess.run(
        [sys.executable, "-m", "ultramem_megatron", "train", *tiny_gpt()],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: WORLD_SIZE=4 in the environment, but not RANK, MASTER_ADDR, MASTER_PORT: half of"
    )


@pytest.fixture
def devices(tmp_path, monkeypatch):
    """A /dev of a machine with two GPUs that torch does not see, because of an old driver."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "null"):
        (tmp_path / name).touch()

    def no_gpu():
        warnings.warn("CUDA initialization: The NVIDIA driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", no_gpu)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path


def test_gpus_that_torch_does_not_see_are_told_loudly(devices, capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    warn_of_unseen_gpus(devices)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == lines[-1] == "*" * 100
    assert lines[1].startswith(f"WARNING: nvidia0, nvidia1 in {devices}, but torch sees no GPU")
    assert "The NVIDIA driver is too old" in lines[2]
    assert "CUDA_VISIBLE_DEVICES=" in lines[3]


def test_what_is_about_gpus_alone_is_refused(devices, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    message = (
        rf"nvidia0, nvidia1 in {devices}, but torch sees no GPU: .*driver is too old.* set CUDA_"
    )
    with pytest.raises(UltraMemError, match=message):
        refuse_unseen_gpus(devices)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refuse_unseen_gpus(devices)


def test_nothing_is_told_where_the_cpu_is_meant(devices, capsys, monkeypatch, tmp_path_factory):
    warn_of_unseen_gpus(tmp_path_factory.mktemp("dev"))  # no GPU
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("LOCAL_RANK", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            warn_of_unseen_gpus(devices)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    warn_of_unseen_gpus(devices)
    assert capsys.readouterr().err == ""
