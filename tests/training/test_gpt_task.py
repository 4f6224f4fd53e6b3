"""Parts of the GPT task that a small run does not reach."""

from typing import Any

import pytest

from tests.ranks import run_on_ranks


def _documents_for_kernels() -> dict[str, Any]:
    import torch

    from ultramem_megatron.patches import registry
    from ultramem_megatron.training import gpt_datasets as gpt_task

    registry.apply_all()
    batch: gpt_task.Batch = {
        "cu_seqlens": torch.tensor([[0, 3, 8]], dtype=torch.int32),
        "cu_seqlens_padded": torch.tensor([[0, 4, 12]], dtype=torch.int32),
        "max_seqlen": torch.tensor([8], dtype=torch.int32),
    }
    packed = gpt_task._packed_sequence(batch, tokens_per_sample=12)
    assert packed is not None
    unpacked = gpt_task._packed_sequence({**batch, "cu_seqlens": None}, tokens_per_sample=12)
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


class _Judge:
    """Stands in for Megatron's rerun state machine and notes what it would have rejected."""

    def __init__(self) -> None:
        self.rejected: list[tuple[str, bool]] = []

    def is_unexpectedly_large(self, result: Any, threshold: float, context: str) -> bool:
        return bool(result > threshold)

    def validate_result(
        self, result: Any, rejection_func: Any, message: str, tolerance: float, fatal: bool
    ) -> None:
        if rejection_func(result):
            self.rejected.append((message, fatal))


def _masked_loss(
    losses: list[float], mask: list[float], checks: bool
) -> tuple[float, int, list[float], list[tuple[str, bool]]]:
    from types import SimpleNamespace

    import torch

    from ultramem_megatron.training import gpt_datasets as gpt_task

    judge = _Judge()
    task: Any = gpt_task
    task.get_rerun_state_machine = lambda: judge
    task.get_args = lambda: SimpleNamespace(
        check_for_nan_in_loss_and_grad=checks, check_for_spiky_loss=checks
    )
    loss, num_tokens, report = gpt_task.loss_func(
        torch.tensor([mask]), torch.tensor([losses], dtype=torch.bfloat16)
    )
    assert loss.dtype == torch.float32
    assert num_tokens.dtype == torch.int32
    return float(loss), int(num_tokens), report["lm loss"].tolist(), judge.rejected


def test_the_loss_sums_the_tokens_that_count() -> None:
    [result] = run_on_ranks(1, _masked_loss, [1.0, 2.0, 4.0], [1.0, 0.0, 1.0], True)
    assert result == (5.0, 2, [5.0, 2.0], [])


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (float("nan"), [("the loss of this rank is NaN", True)]),
        (float("-inf"), [("the loss of this rank is infinite", True)]),
        (64.0, [("the loss exceeds 10 times the largest so far", False)]),
    ],
)
def test_a_bad_loss_is_rejected_where_the_flags_ask(
    bad: float, expected: list[tuple[str, bool]]
) -> None:
    [checked] = run_on_ranks(1, _masked_loss, [1.0, bad], [1.0, 1.0], True)
    assert checked[3] == expected
    [unchecked] = run_on_ranks(1, _masked_loss, [1.0, bad], [1.0, 1.0], False)
    assert unchecked[3] == []
