"""Causal depthwise convolution in the plainest form: a sum of shifted views.

S positions, B sequences, D channels, K taps, L pieces of S/L positions, one after the other, each
without gaps in time. Source: UltraMem, arXiv 2411.12364, section 3.2 (bag of tricks 7).
"""

import torch
from torch import Tensor

from ultramem_megatron.kernels.precision import at_least_float32


def causal_convolution_reference(
    x: Tensor, weight: Tensor, history: Tensor | None = None, reach: Tensor | None = None
) -> Tensor:
    """out[s] = sum over taps k of weight[:, k] * x[s - (K-1-k)], summed in float32 or better.

    x: (S, B, D), any floating dtype; weight: (D, K).
    history: the (L, K-1, B, D) inputs before each piece; None: x is one piece, zeros before it.
    reach: (S, B) integers, how many inputs before a token are of its document; None: all.
    Returns (S, B, D) in the dtype of x; differentiable in x, weight and history.

    With x [1, 2, 3], one sequence and channel, and weight [10, 1] the result is [1, 12, 23]; with
    reach [0, 0, 1] it is [1, 2, 23].
    """
    taps = weight.shape[1]
    if history is None:
        history = x.new_zeros(1, taps - 1, *x.shape[1:])
    pieces = x.reshape(len(history), len(x) // len(history), *x.shape[1:])
    padded = torch.cat([history, pieces], 1)  # (L, K-1 + S/L, B, D)
    # Shifted views: a convolution would want its own order of dimensions, there and back, and CPUs
    # take several times as long for it.
    out = at_least_float32(x.new_zeros(1, 1, 1, 1))
    for tap in range(taps):
        seen = padded[:, tap : tap + pieces.shape[1]]
        if reach is not None:
            own = reach >= taps - 1 - tap
            seen = seen.where(own.view(*pieces.shape[:3], 1), 0)
        out = torch.addcmul(out, seen, weight[:, tap])
    return out.to(x.dtype).flatten(0, 1)


def causal_convolution_step_reference(x: Tensor, weight: Tensor, history: Tensor) -> Tensor:
    """The convolution of one position; x then takes its place in the history.

    x: (1, B, D). history: (K-1, B, D) inputs before it, replaced in place by the last K-1, x among
    them, and not differentiable. Returns (1, B, D).

    With x [3], history [1, 2] and weight [100, 10, 1] the result is [123], the history [2, 3].
    """
    seen = torch.cat([history, x])
    out = causal_convolution_reference(x, weight, seen[:-1].unsqueeze(0))
    history.copy_(seen[1:].detach())
    return out
