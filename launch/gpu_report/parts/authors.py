"""The lookup beside that of UltraMem's authors, whose CUDA sources `--authors` names.

Theirs (github.com/ZihaoHuang-notabot/Ultra-Sparse-Memory-Network, fuse_ops/fused_lookup) is built
here, by torch's own builder, and is no part of this project. It takes bfloat16, addresses in 32
bits, and adds rows' gradients to a float32 buffer. Only kernels are timed of theirs, of ours what a
training step has: the forward and, alone, the backward in autograd.

N table rows, V value dim, T tokens, P picks per token, C cores, E groups.
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import cpp_extension

from launch.benchmarks.kernels.lookups import COMPARED_ROWS, make_table
from launch.benchmarks.kernels.measure import timed
from launch.benchmarks.kernels.shapes import Shape
from launch.gpu_report.row import Row, attempted
from launch.gpu_report.shapes import OF_227M, OF_1600M, TINY
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce
from ultramem_megatron.tools.gpu_report import AUTHORS, SOURCES

_Passes = tuple[Callable[[], Tensor], Callable[[], Tensor]]
"""Forward, sums (T, E, V); backward, gradient of scores (T, P, C), which adds to `main_grad`."""

_ALLOWED = 2e-2
"""Relative error between the two: all that theirs writes but rows' gradients is bfloat16."""
_SHAPES = (("1.6B shape", OF_1600M), ("227M shape", OF_227M))
_TOKENS = (64, 8192)


def rows(large: bool) -> Iterator[Row]:
    """Microseconds of both, forward and backward, where results agree."""
    what, folder = "the authors' lookup", os.environ.get(AUTHORS)
    if folder is None:
        yield Row(what=what, value="not compared: give --authors PATH, their folder fuse_ops")
        return
    yield from attempted(what, partial(_beside, Path(folder), large))


def _beside(folder: Path, large: bool) -> Iterator[Row]:
    begun = time.monotonic()
    extension = _built(folder)
    yield Row(what="build of the authors' lookup", value=round(time.monotonic() - begun), unit="s")
    device = torch.device("cuda" if large else "cpu")
    for words, shape in _SHAPES:
        for tokens in _TOKENS if large else (16,):
            cast = shape if large else dataclasses.replace(TINY, dtype=torch.bfloat16)
            sized = dataclasses.replace(cast, tokens=tokens)
            name = f"{words}, T {tokens}"
            yield from attempted(
                f"the authors' lookup, {name}", partial(_compared, extension, sized, name, device)
            )


def _built(folder: Path) -> Any:
    """Their extension, as their own script has it, but for the GPU that is here.

    Raises UltraMemError with the end of what the compilers said.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return cpp_extension.load(
                name="authors_lookup",
                sources=[str(folder / name) for name in SOURCES],
                build_directory=scratch,
                extra_cflags=["-O3"],
                extra_cuda_cflags=["-O3", "--use_fast_math", "-arch=native"],
            )
        except RuntimeError as error:
            raise UltraMemError(f"not built: {str(error)[-350:]}") from error


def _compared(extension: Any, shape: Shape, name: str, device: torch.device) -> Iterator[Row]:
    """Raises UltraMemError where they disagree: nothing wrong is timed."""
    given = _inputs(shape, device)
    both = {"lookup": _ours(given), "the authors' lookup": _theirs(extension, given)}
    ours, theirs = (_results(given, *passes) for passes in both.values())
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(theirs, ours, strict=True))
    if not error <= _ALLOWED:
        raise UltraMemError(f"they differ by {error:.1e} (allowed {_ALLOWED:.0e}): not timed.")
    yield Row(what=f"the authors' lookup and ours, {name}", value=error, unit="relative difference")
    for whose, passes in both.items():
        for step, words in zip(passes, ("forward", "backward"), strict=True):
            taken = round(1e3 * timed(step, device).median, 1)
            yield Row(what=f"{whose} {words}, {name}", value=taken, unit="us")


class _Given(NamedTuple):
    """What a lookup and its backward get, and the buffer (N, V) of the table's gradient."""

    table: Tensor
    rows: Tensor
    groups: Tensor
    scores: Tensor
    grad: Tensor
    main_grad: Tensor


def _inputs(shape: Shape, device: torch.device) -> _Given:
    index = (shape.tokens, shape.picks)
    table = make_table(shape, device)
    scores = torch.randn(*index, shape.cores, device=device).bfloat16().float()  # both hold them
    return _Given(
        table,
        torch.randint(shape.values, index, device=device),
        torch.randint(shape.expansion, index, device=device),
        scores.requires_grad_(),
        torch.randn(shape.tokens, shape.expansion, shape.value_dim, device=device).bfloat16(),
        table.main_grad,  # type: ignore[attr-defined]  # Megatron's tag
    )


def _ours(given: _Given) -> _Passes:
    forward = partial(lookup_reduce, *given[:4], given.grad.shape[1])
    out = forward()

    def backward() -> Tensor:
        leaves = given.table, given.scores
        return torch.autograd.grad(out, leaves, given.grad, retain_graph=True)[1]

    return torch.no_grad()(forward), backward


def _theirs(extension: Any, given: _Given) -> _Passes:
    table, grad = given.table.detach(), given.grad.flatten(1)
    addresses = (given.groups * len(table) + given.rows).int()
    scores = given.scores.detach().bfloat16().permute(2, 0, 1).contiguous()
    sizes = (len(table), len(table), 0, given.grad.shape[1], 0, False)  # one table, no padding

    def forward() -> Tensor:
        out: Tensor = extension.forward(addresses, table, scores, *sizes)
        return out.view(given.grad.shape)

    def backward() -> Tensor:
        arguments = (addresses, table, scores, grad, given.main_grad, *sizes)
        of_scores: Tensor = extension.backward(*arguments)
        return of_scores.permute(1, 2, 0)

    return forward, backward


def _results(
    given: _Given, forward: Callable[[], Tensor], backward: Callable[[], Tensor]
) -> list[Tensor]:
    """The sums and both gradients, of the table's those of some rows that are read."""
    read = given.rows.unique()[:COMPARED_ROWS]
    given.main_grad.zero_()
    found = forward(), backward(), given.main_grad[read]
    return [tensor.float() for tensor in found]
