"""Batches of packed documents, which a small run does not reach."""

from typing import Any

from tests.ranks import run_on_ranks


def _documents_for_kernels() -> dict[str, Any]:
    import torch

    from ultramem_megatron.patches import registry
    from ultramem_megatron.training.gpt_batches import Batch, packed_sequence

    registry.apply_all()
    batch: Batch = {
        "cu_seqlens": torch.tensor([[0, 3, 8]], dtype=torch.int32),
        "cu_seqlens_padded": torch.tensor([[0, 4, 12]], dtype=torch.int32),
        "max_seqlen": torch.tensor([8], dtype=torch.int32),
    }
    packed = packed_sequence(batch, tokens_per_sample=12)
    assert packed is not None
    unpacked = packed_sequence({**batch, "cu_seqlens": None}, tokens_per_sample=12)
    return {
        "for kernels": packed.cu_seqlens_q.tolist(),
        "padded": packed.cu_seqlens_kv_padded.tolist(),
        "longest": (packed.max_seqlen_q, packed.max_seqlen_kv),
        "format": packed.qkv_format,
        "without documents": unpacked,
    }


def test_document_boundaries_reach_the_attention_kernels() -> None:
    [seen] = run_on_ranks(1, _documents_for_kernels)
    assert seen == {
        "for kernels": [0, 4, 12],
        "padded": [0, 4, 12],
        "longest": (8, 8),
        "format": "thd",
        "without documents": None,
    }
