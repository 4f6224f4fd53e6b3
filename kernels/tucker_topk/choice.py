"""Which Tucker grid top-m runs; see dispatch.py."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.grid_shuffle import grid_shuffle
from ultramem_megatron.kernels.tucker_topk import native_path
from ultramem_megatron.kernels.tucker_topk.eager import tucker_topk_eager
from ultramem_megatron.kernels.tucker_topk.reference import tucker_topk_reference
from ultramem_megatron.kernels.tucker_topk.shapes import tucker_topk_shapes


def tucker_topk(
    scores: Tensor,
    keys: Tensor,
    cores: Tensor,
    keys_per_side: int,
    best: int | None = None,
    shuffle: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Addresses (T, H, best) and scores (T, H, best, C); see `tucker_topk_reference`.

    shuffle: tables of `grid_shuffle`, by which addresses are then shuffled; on GPUs in the same
    kernel.

    What an implementation has no kernels for (float64) PyTorch's own compute.
    """
    chosen = implementation(scores.device)
    pairs = keys.shape[-1] if best is None else best
    if chosen == "triton" and scores.dtype != torch.float64:
        from ultramem_megatron.kernels.tucker_topk.fused import FusedTuckerTopk  # needs Triton

        fused: tuple[Tensor, Tensor]
        fused = FusedTuckerTopk.apply(scores, keys, cores, keys_per_side, pairs, shuffle)
        return fused
    addresses, found = _on_the_grid(chosen, scores, keys, cores, keys_per_side, pairs)
    return addresses if shuffle is None else grid_shuffle(addresses, shuffle), found


def _on_the_grid(
    chosen: str, scores: Tensor, keys: Tensor, cores: Tensor, keys_per_side: int, best: int
) -> tuple[Tensor, Tensor]:
    if chosen == "shapes":
        return tucker_topk_shapes(scores, keys, cores, best)
    if chosen == "reference":
        return tucker_topk_reference(scores, keys, cores, keys_per_side, best)
    if chosen == "native" and native_path.serves(scores):
        own = native_path.NativeTuckerTopk
        addresses, found = own.apply(scores, keys, cores, keys_per_side, best)
        return addresses, found
    return tucker_topk_eager(scores, keys, cores, keys_per_side, best)
