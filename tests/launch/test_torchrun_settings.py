"""launch/torchrun.sh --dry-run: ranks for the GPUs that torch will see, and what is refused."""

import os
import shlex
import subprocess
import sys

import pytest

from tests import ROOT

_EIGHT = "".join(f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i}abc-def)\n" for i in range(8))
_MIG = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-0abc)
  MIG 3g.20gb     Device  0: (UUID: MIG-11)
  MIG 3g.20gb     Device  1: (UUID: MIG-22)
  MIG 1g.5gb      Device  2: (UUID: MIG-33)
"""
_OURS = ("NNODES", "NPROC", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES", "STALL_SECONDS", "LOG_DIR")


def _dry_run(**settings):
    environment = {name: value for name, value in os.environ.items() if name not in _OURS}
    return subprocess.run(
        ["bash", str(ROOT / "launch/torchrun.sh"), "--dry-run", "--lr", "1"],
        env={**environment, "PYTHON": sys.executable, **settings},
        capture_output=True,
        text=True,
        check=False,
    )


def _words(**settings):
    done = _dry_run(**settings)
    assert (done.returncode, done.stderr) == (0, "")
    return shlex.split(done.stdout)


def _after(words, flag):
    return words[words.index(flag) + 1]


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A machine's nvidia-smi: call with what it lists."""

    def listing(text):
        (tmp_path / "list").write_text(text)
        program = tmp_path / "nvidia-smi"
        program.write_text(f'#!/bin/sh\n[ "$*" = --list-gpus ] && cat {tmp_path}/list\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return listing


@pytest.mark.parametrize(
    ("listed", "visible", "ranks"),
    [
        (_EIGHT, None, 8),
        (_EIGHT, "2,3", 2),
        (_EIGHT, "2, 3 ,4", 3),
        (_EIGHT, "0,1,0", 2),  # as torch: none, as one is named twice
        (_EIGHT, "0,00", 2),
        (_EIGHT, "1,2,3,1", 2),
        (_EIGHT, "0,9,1", 1),  # CUDA stops at what is not there
        (_EIGHT, "-1", 2),
        (_EIGHT, "", 2),  # hidden: two ranks on the CPU
        (_EIGHT, "GPU-1abc,GPU-7abc-def,GPU-9", 2),
        (_EIGHT, "PATH[$(touch X)]", 2),
        (_MIG, None, 1),
        (_MIG, "MIG-22,MIG-33", 1),
        (_MIG, "MIG-44", 2),
        ("", None, 2),
        ("", "0,1,2", 2),
    ],
)
def test_there_is_a_rank_for_each_gpu_that_torch_will_see(gpus, listed, visible, ranks):
    gpus(listed)
    settings = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert _after(_words(**settings), "--nproc-per-node") == str(ranks)
    assert _after(_words(NPROC="3", **settings), "--nproc-per-node") == "3"


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("NNODES", "two", "a number of nodes such as 2, or a range such as 2:4"),
        ("NNODES", "08", "a number of nodes"),
        ("NNODES", "0", "a number of nodes"),
        ("NNODES", "-1", "a number of nodes"),
        ("NNODES", "4:2", "a number of nodes"),
        ("NNODES", "2:", "a number of nodes"),
        ("NNODES", "PATH[$(touch X)]", "a number of nodes"),
        ("NPROC", "0", "a whole number from 1 "),
        ("NPROC", "a[$(touch X)]", "a whole number from 1 "),
        ("NPROC", "99999999999999999999", "a whole number from 1 "),
        ("STALL_SECONDS", "0", "a whole number from 1 "),
        ("STALL_SECONDS", "-5", "a whole number from 1 "),
        ("STALL_SECONDS", "1.5", "a whole number from 1 "),
        ("STALL_SECONDS", "abc", "a whole number from 1 "),
        ("STALL_SECONDS", "PATH[$(touch X)]", "a whole number from 1 "),
        ("JOIN_SECONDS", "1 2", "a whole number from 1 "),
        ("MAX_RESTARTS", "-1", "a whole number from 0 "),
        ("MASTER_PORT", "70000", "a whole number from 1 to 65535"),
        ("CHECK_SUMS", "no", "a whole number from 0 to 1"),
    ],
)
def test_what_is_no_number_is_refused_and_never_run(tmp_path, monkeypatch, setting, value, allowed):
    monkeypatch.chdir(tmp_path)
    done = _dry_run(**{setting: value})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {setting}={value}: must be {allowed}")
    assert done.stderr.count("\n") == 1
    assert (done.stdout, list(tmp_path.iterdir())) == ("", [])


@pytest.mark.parametrize("nodes", ["2", "2:4", "1:2"])
def test_several_nodes_need_a_place_to_meet(nodes):
    done = _dry_run(NNODES=nodes)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: NNODES={nodes} needs MASTER_ADDR")
    words = _words(NNODES=nodes, MASTER_ADDR="host")
    assert _after(words, "--nnodes") == nodes
    assert _after(words, "--rdzv-endpoint") == "host:29500"


def test_a_dry_run_shows_the_settings_with_the_command():
    words = _words(NNODES="1:1", OMP_NUM_THREADS="5", STALL_SECONDS="61")
    assert words[0] == "env"
    assert {"OMP_NUM_THREADS=5", "GLOO_SOCKET_IFNAME=lo"} <= set(words)
    assert _after(words, "--nnodes") == "1"
    assert _after(words, "--distributed-timeout-minutes") == "2"
    assert words[-2:] == ["--lr", "1"]


@pytest.mark.parametrize("script", ["torchrun.sh", "recipes/dense-151m.sh"])
@pytest.mark.parametrize("python", ["nowhere/python", str(ROOT / "README.md")])
def test_a_python_that_cannot_be_run_is_a_refusal(script, python):
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / script), "--lr", "1"],
        env={**os.environ, "PYTHON": python},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")  # 127 would be requeued
    assert done.stderr.startswith(f"error: {python} is no program. Make .venv with bash ")
    assert done.stderr.count("\n") == 1
