"""How near to a tie the selections of a training run come.

Layouts add up in different orders. Where two keys, or two pairs of keys, score alike to rounding,
this decides which one is selected: then everything after it differs, and rightly so. Runs are
therefore compared only where no selection of the run they are compared with is a near-tie.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tests.closeness import rounding

NEAR_TIE = rounding(torch.float32, 16)
"""Distance to the best that is left out, relative to the largest score, below which rounding may
decide: scores are products of vectors of some 16 numbers."""

_closest = math.inf
_shortlists: dict[Any, Tensor] = {}


def watch() -> None:
    """In a rank, before it trains: look at all selections of memory layers."""
    torch.nn.modules.module.register_module_forward_hook(_look)


def closest_call() -> float:
    """In a rank: the smallest distance so far, infinite if nothing was selected."""
    return _closest


@torch.no_grad()
def _look(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
    from ultramem_megatron.memory.retrieval.keys import ProductKeys

    if isinstance(module, ProductKeys):
        query, directions, topk = inputs
        _, scores = module.forward(query, directions, module.config.keys_per_side)
        combined = torch.einsum("thsan,sha->thsn", scores, directions.to(scores.dtype))
        _remember(combined, topk)
        _shortlists[module] = output[1]
    elif isinstance(keys := getattr(module, "keys", None), ProductKeys):
        row, column = _shortlists[keys].unbind(2)
        if hasattr(module, "cores"):
            core = module.cores.total().to(row.dtype)
            grid = torch.einsum("thai,hab,thbj->thij", row, core, column)
        else:
            grid = row.squeeze(2).unsqueeze(3) + column
        _remember(grid.flatten(2), module.config.topk)


def _remember(scores: Tensor, topk: int) -> None:
    """Of (..., candidates): how far the last that is taken is from the first that is not."""
    global _closest
    if scores.shape[-1] > topk and scores.numel() > 0:
        best = scores.topk(topk + 1).values
        gaps = (best[..., -2] - best[..., -1]) / scores.abs().amax(-1)
        _closest = min(_closest, gaps.min().item())
