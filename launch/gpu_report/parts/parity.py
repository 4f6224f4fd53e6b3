"""Each operation and a whole layer against the reference of the same dtype, outputs and gradients.

A selection may differ where two keys score alike to rounding; errors are of norms, relative.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from launch.benchmarks.kernels import convolutions, layers, lookups, prevalued_lookups, topks
from launch.benchmarks.kernels.candidate import Candidate, implementations
from launch.benchmarks.kernels.shapes import Shape
from launch.gpu_report.parts import decoding_parity
from launch.gpu_report.row import Row, attempted
from ultramem_megatron.kernels.dispatch import implementation

_OPS: dict[str, Callable[[Shape, torch.device], list[Candidate]]] = {
    "lookup": lookups.candidates,
    "lookup behind pre-values": prevalued_lookups.candidates,
    "side top-m": topks.side_candidates,
    "grid top-m": topks.tucker_candidates,
    "query convolution": convolutions.candidates,
    "layer": layers.candidates,
}
_PAPER = Shape(hidden=1600, num_keys=1100, topk=42, value_dim=1024)
_ODD = Shape(hidden=124, num_keys=131, topk=13, value_dim=60, expansion=9, heads=3, cores=3)
_WIDE = Shape(hidden=384, num_keys=200, topk=80, value_dim=384, expansion=1, cores=1)
_TINY = Shape(hidden=32, num_keys=40, topk=6, value_dim=16)
_DTYPES = (torch.float32, torch.bfloat16)
_ALLOWED, _ALLOWED_IN_HALVES = 1e-2, 0.5
"""Half precision makes many keys score alike, of which any may be picked: of one token, much."""


def rows(large: bool) -> Iterator[Row]:
    """Relative errors, worst of outputs and gradients, and whether twice gives the same."""
    device = torch.device("cuda" if large else "cpu")
    for shape in _shapes(large):
        for dtype in _dtypes(shape):
            for op, build in _OPS.items():
                if dtype != torch.float32 and op == "grid top-m":
                    continue  # its scores are float32 always
                cast = dataclasses.replace(shape, dtype=dtype)
                name = f"{op}, {_words(cast)}"
                yield from attempted(name, partial(_errors, build, cast, name, device))
            cast = dataclasses.replace(shape, dtype=dtype)
            name = f"decoding, {_words(cast)}"
            yield from attempted(name, partial(_decoding_errors, cast, name, device))
    yield from attempted("AdamW on rows", partial(_adam_rows, device))


def _shapes(large: bool) -> Sequence[Shape]:
    if not large:
        return [dataclasses.replace(_TINY, tokens=7)]
    some = [dataclasses.replace(_PAPER, tokens=tokens) for tokens in (1, 7, 64, 512)]
    return [*some, *(dataclasses.replace(shape, tokens=33) for shape in (_ODD, _WIDE))]


def _dtypes(shape: Shape) -> Sequence[torch.dtype]:
    """float16 at one shape, as it takes the kernels of bfloat16."""
    return (*_DTYPES, torch.float16) if shape.tokens == 64 else _DTYPES


def _words(shape: Shape) -> str:
    dtype = str(shape.dtype).removeprefix("torch.")
    return f"{dtype}, T {shape.tokens}, n {shape.num_keys}, m {shape.topk}, Dv {shape.value_dim}"


def _adam_rows(device: torch.device) -> Iterator[Row]:
    """Whether our kernel's bits are those of PyTorch's fused AdamW, or that one serves."""
    from ultramem_megatron.kernels.adam_rows import choice, native_path

    if implementation(device) == "triton":
        from ultramem_megatron.kernels.adam_rows import triton_path as path
    elif implementation(device) == "native":
        path = native_path
    else:
        return  # PyTorch's own serves
    same = choice.agrees(path, device)
    yield Row(what="AdamW on rows, ours and PyTorch's", value="equal" if same else "not equal")


def _errors(
    build: Callable[[Shape, torch.device], list[Candidate]],
    shape: Shape,
    name: str,
    device: torch.device,
) -> Iterator[Row]:
    torch.manual_seed(1)
    ours = [c for c in build(shape, device) if c.kernels in implementations(device)]
    expected = ours[0].results()
    for candidate in ours[1:]:
        yield from attempted(f"{name}, {candidate.name}", partial(_of, candidate, expected, name))


def _of(candidate: Candidate, expected: dict[str, torch.Tensor], name: str) -> Iterator[Row]:
    found, again = candidate.results(), candidate.results()
    yield _worst(f"{name}, {candidate.name}", found, expected)
    repeats = all(torch.equal(found[key], again[key]) for key in found)
    yield Row(what=f"{name}, {candidate.name}, twice", value="equal" if repeats else "not equal")


def _decoding_errors(shape: Shape, name: str, device: torch.device) -> Iterator[Row]:
    torch.manual_seed(1)
    reference, *others = implementations(device)
    results = decoding_parity.outputs(shape, device, [reference, *others])
    expected = next(results)
    for kernels, found in zip(others, results, strict=True):
        yield _worst(f"{name}, {kernels}", found, expected)


def _worst(what: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> Row:
    """The largest error; an error of the report where that is no rounding."""
    errors = {name: _error(found[name], truth) for name, truth in expected.items()}
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    value, allowed = errors[worst], _ALLOWED if "float32" in what else _ALLOWED_IN_HALVES
    if not value <= allowed:
        return Row(what=what, error=f"{worst} is off by {value:.1e}, relative ({allowed} allowed)")
    return Row(what=what, value=float(f"{value:.2e}"), unit=f"relative, of {worst}")


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    truth = expected.double()
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-30))
