"""Each operation at the paper's shapes, beside PyTorch's own; the L2 cache is flushed."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch

from launch.benchmarks.kernels import attentions, convolutions, lookups, prevalued_lookups, topks
from launch.benchmarks.kernels.candidate import Candidate, implementations
from launch.benchmarks.kernels.measure import timed
from launch.benchmarks.kernels.shapes import Shape
from launch.gpu_report.row import Row, attempted
from launch.gpu_report.shapes import OF_227M, OF_1600M, TINY

_DECODING = [
    attentions.Decoding(batch, context) for batch, context in ((1, 32768), (8, 8192), (64, 2048))
]
_FEW = attentions.Decoding(2, 600, heads=4, width=16, dtype=torch.float32)

_Build = Callable[[Shape, torch.device], list[Candidate]]
_ALIGNED = dataclasses.replace(OF_1600M, num_keys=1792)
_V2_227M = Shape(
    hidden=768, num_keys=1138, topk=32, value_dim=192, heads=1, expansion=1, dtype=torch.bfloat16
)
_PEER = Shape(
    num_keys=1024, topk=16, value_dim=2048, heads=8, cores=1, expansion=1, dtype=torch.bfloat16
)
_HIDDEN = dataclasses.replace(OF_1600M, hidden=2048)
_TOKENS = (64, 8192)
_CASES: tuple[tuple[str, _Build, str, Shape], ...] = (
    ("lookup", lookups.candidates, "1.6B shape", OF_1600M),
    ("lookup", lookups.candidates, "227M shape", OF_227M),
    ("lookup behind pre-values", prevalued_lookups.candidates, "UltraMemV2's 227M", _V2_227M),
    ("lookup behind pre-values", prevalued_lookups.candidates, "PEER's, width 2048", _PEER),
    ("side top-m", topks.side_candidates, "1.6B shape", OF_1600M),
    ("side top-m", topks.side_candidates, "keys a multiple of 64", _ALIGNED),
    ("grid top-m", topks.tucker_candidates, "1.6B shape", OF_1600M),
    ("query convolution", convolutions.candidates, "width 2048", _HIDDEN),
)


def rows(large: bool) -> Iterator[Row]:
    """Microseconds, forward and both passes."""
    device = torch.device("cuda" if large else "cpu")
    for op, build, words, shape in _CASES:
        for tokens in _TOKENS if large else (16,):
            sized = dataclasses.replace(shape if large else TINY, tokens=tokens)
            name = f"{words}, T {tokens}"
            yield from attempted(f"{op}, {name}", partial(_times, op, build, sized, name, device))
    for size in _DECODING if large else [_FEW]:
        where = f"decoding, batch {size.batch}, {size.context} keys"
        yield from attempted(f"attention, {where}", partial(_attention, size, where, device))


def _attention(size: attentions.Decoding, where: str, device: torch.device) -> Iterator[Row]:
    steps = attentions.steps(size, device)
    results = [step().float() for step in steps.values()]
    error = float((results[0] - results[1]).norm() / results[1].norm())
    yield Row(what=f"attention, {where}, difference", value=float(f"{error:.2e}"), unit="relative")
    for whose, step in steps.items():
        yield from attempted(whose, partial(_microseconds, step, f"{whose}, {where}", device))


def _times(op: str, build: _Build, shape: Shape, name: str, device: torch.device) -> Iterator[Row]:
    torch.manual_seed(1)
    own = implementations(device)
    candidates = build(shape, device)
    default = [candidate.name for candidate in candidates if candidate.name in own][-1]
    for candidate in candidates:
        ours = candidate.name == default
        known = ("bag" in candidate.name, "FBGEMM" in candidate.name)  # FBGEMM where installed
        compared = candidate.name == prevalued_lookups.TWO_PASSES or any(known)
        if not ours and not compared:
            continue  # the others take seconds, and GBs, at these sizes
        whose = op if ours else candidate.name
        for passes, step in (
            ("forward", candidate.inference),
            ("forward and backward", candidate.training),
        ):
            what = f"{whose} {passes}, {name}"
            yield from attempted(what, partial(_microseconds, step, what, device))


def _microseconds(step: Callable[[], object], what: str, device: torch.device) -> Iterator[Row]:
    yield Row(what=what, value=round(1e3 * timed(step, device).median, 1), unit="us")
