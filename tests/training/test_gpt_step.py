"""The masked loss, and what is done about a bad one."""

from typing import Any

import pytest

from tests.ranks import run_on_ranks


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

    from ultramem_megatron.training import gpt_step

    judge = _Judge()
    task: Any = gpt_step
    task.get_rerun_state_machine = lambda: judge
    task.get_args = lambda: SimpleNamespace(
        check_for_nan_in_loss_and_grad=checks, check_for_spiky_loss=checks
    )
    loss, num_tokens, report = gpt_step.loss_func(
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
