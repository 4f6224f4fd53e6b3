"""The compiled kernels: how they are built, chosen and left out; threads; other instructions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.kernels.compiler import needs_compiler
from tests.kernels.lookup_cases import Sizes, inputs, results
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels import dispatch
from ultramem_megatron.kernels.causal_convolution import causal_convolution
from ultramem_megatron.kernels.lookup_dot import lookup_dot
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce, native_path
from ultramem_megatron.kernels.native.library import command, native_library
from ultramem_megatron.kernels.side_topk import side_topk
from ultramem_megatron.kernels.tucker_topk import tucker_topk

pytestmark = needs_compiler

_OPS = (
    "lookup_reduce",
    "lookup_main_grad",
    "lookup_prevalued",
    "side_topk",
    "tucker_topk",
    "causal_convolution",
    "grid_shuffle",
    "read_statistics",
    "adam_rows",
    "quantized",
)

_ASK = """
import logging, torch
logging.basicConfig(level="INFO", format="%(message)s")
from ultramem_megatron.kernels.dispatch import implementation
print(implementation(torch.device("cpu")))
"""


def _ask(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Which kernels a new process takes that keeps its own in `folder`."""
    env = {**os.environ, "XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, "-c", _ASK], env=env, capture_output=True, text=True)


def test_they_are_built_once_and_found_again(tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", _ASK],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    ends = [process.communicate() for process in both]
    assert [out.strip() for out, _ in ends] == ["native", "native"]
    assert sum("building the native kernels" in messages for _, messages in ends) == 1
    assert len(list((tmp_path / "ultramem_megatron").glob("*.so"))) == 1


@pytest.mark.parametrize(
    "compiler", ["false", pytest.param("no-such-compiler", marks=pytest.mark.long)]
)
def test_without_a_compiler_pytorchs_kernels_serve(compiler, tmp_path):
    found = _ask(tmp_path, CXX=compiler)
    assert found.stdout.strip() == "torch"
    assert "no native kernels, PyTorch's own serve" in found.stderr


def test_forced_where_they_cannot_be_had_they_are_refused(monkeypatch):
    monkeypatch.setenv("ULTRAMEM_KERNELS", "native")
    monkeypatch.setattr(dispatch, "native_library", lambda: None)
    dispatch._choose.cache_clear()
    with pytest.raises(UltraMemError, match="ULTRAMEM_KERNELS=native was given"):
        dispatch.implementation(torch.device("cpu"))
    dispatch._choose.cache_clear()


def test_a_gpu_without_triton_is_refused_in_one_line(monkeypatch):
    monkeypatch.delenv("ULTRAMEM_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    dispatch._choose.cache_clear()
    with pytest.raises(UltraMemError, match=r"on cuda need Triton.*ULTRAMEM_KERNELS=torch"):
        dispatch.implementation(torch.device("cuda"))
    dispatch._choose.cache_clear()


@pytest.mark.long
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "ultramem_megatron").write_text("a file")
    assert _ask(tmp_path).stdout.strip() == "torch"


def _all_ops():
    torch.manual_seed(5)
    kernels = [*results(lookup_reduce, inputs(Sizes(50, 40, 2, 9, 4, rows=7), torch.float32))]
    query, keys = (
        torch.randn(n, 2, *rest).requires_grad_() for n, *rest in ((9, 2, 2, 6), (2, 90, 2, 6))
    )
    indices, scores = side_topk(query, keys, torch.randn(2, 2, 2), 8)
    cores = torch.rand(2, 2, 2, 2).requires_grad_()
    addresses, best = tucker_topk(scores, indices, cores, 90)
    grads = torch.autograd.grad(best.square().sum(), (query, keys, cores))
    x, weight = torch.randn(70, 2, 600).requires_grad_(), torch.randn(600, 3).requires_grad_()
    convolved = causal_convolution(x, weight)
    grads += convolved, *torch.autograd.grad(convolved.square().sum(), (x, weight))
    return [*kernels, indices, scores, addresses, best, *grads]


def _rows_far_apart():
    """Picks of three rows whose low bits agree: each row must stay with one thread."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        case = inputs(Sizes(400, 40, 1, 64, 2, rows=5000), dtype)
        case.rows.copy_(case.rows % 3 * 2048 + 5)
        found += results(lookup_reduce, case)
    return found


@pytest.mark.parametrize("ops", [_all_ops, _rows_far_apart])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(ops, threads, monkeypatch):
    monkeypatch.setenv("ULTRAMEM_KERNELS", "native")
    alone = ops()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(map(torch.equal, alone, ops()))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_what_a_machine_with_a_compiler_takes(dtype, monkeypatch):
    called = []
    library = native_library()
    assert library is not None
    monkeypatch.setattr(library, "call", lambda name, *_: called.append(name))
    monkeypatch.delenv("ULTRAMEM_KERNELS", raising=False)
    case = inputs(Sizes(2, 3, 1, 4, 1), dtype)
    lookup_reduce(*case[:5])
    assert called == [f"lookup_pool_{str(dtype).removeprefix('torch.')}"]


@pytest.mark.parametrize("where", ["rows", "groups"])
@pytest.mark.parametrize("index", [-1, 7, 2**40])
@pytest.mark.parametrize("op", ["forward", "backward", "dot"])
def test_an_index_that_is_not_there_is_no_address(where, index, op, monkeypatch):
    """PyTorch's kernels refuse it too; in C++ it would read and write other memory."""
    monkeypatch.setenv("ULTRAMEM_KERNELS", "native")
    case = inputs(Sizes(4, 3, 2, 5, 7, rows=7), torch.float32)
    getattr(case, where)[1, 2] = index
    target = torch.zeros(7, 10)
    calls = {
        "forward": lambda: lookup_reduce(*case[:5]),
        "backward": lambda: native_path.backward(case.grad, *case[:4], target, True),
        "dot": lambda: lookup_dot(case.table, getattr(case, where), torch.zeros(4, 10)),
    }
    with pytest.raises(IndexError, match=f" {index} of 7"):
        calls[op]()
    assert not target.any()


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "preloaded"),
    [
        ("-march=x86-64-v3", ""),
        ("-march=x86-64", ""),
        ("-fsanitize=address,undefined -g", "libasan.so"),
    ],
    ids=["AVX2", "SSE2", "sanitizers"],
)
def test_kernels_hold_with_other_instructions_and_under_sanitizers(flags, preloaded, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec c++ "$@" {flags} -fno-sanitize-recover=all\n')
    compiler.chmod(0o755)
    env = {**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path)}
    env["ASAN_OPTIONS"] = "detect_leaks=0"
    if preloaded:
        asked = ["c++", f"-print-file-name={preloaded}"]
        env["LD_PRELOAD"] = subprocess.check_output(asked, text=True).strip()
    files = [f"tests/kernels/test_{n}.py" for n in _OPS]
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "native or main_grad", *files]
    done = subprocess.run(tests, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert list(tmp_path.glob("ultramem_megatron/*.so"))


def test_the_sources_compile_without_a_warning(tmp_path):
    warnings = ("-Wall", "-Wextra", "-Werror", "-fsyntax-only")
    done = subprocess.run(command(tmp_path / "x.so", *warnings), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
