"""Losses of later tokens over context-parallel ranks: as many tokens as there are."""

import pytest
import torch

from tests.ranks import init_gloo, run_on_ranks
from ultramem_megatron.patches import registry


def _counted(without: str) -> tuple[list[float], float]:
    """A mask of ones over (1, 8) a rank, after one roll, and the number of its ones."""
    registry.apply_all([p.name for p in registry.all_patches() if p.name != without])
    from megatron.core import parallel_state
    from megatron.core.transformer import multi_token_prediction

    init_gloo()
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    group = parallel_state.get_context_parallel_group()
    mask, count = multi_token_prediction.roll_tensor(torch.ones(1, 8), cp_group=group)
    return mask[0].tolist(), float(count)


def test_ranks_count_the_tokens_that_the_sequence_has() -> None:
    for rank, (mask, count) in enumerate(run_on_ranks(2, _counted, "")):
        assert mask == [1] * 7 + [rank]  # rank 0 has the end
        assert count == 7.5


@pytest.mark.long
def test_each_counts_its_own_upstream() -> None:
    counts = [n for _, n in run_on_ranks(2, _counted, "defects.later_tokens_over_context")]
    assert counts == [7, 8]
