"""A branch at its boundaries: which pauses are over when; beside which layers it can run."""

import pytest
import torch

from ultramem_megatron.communication.branch import Branch
from ultramem_megatron.communication.pausing import run
from ultramem_megatron.memory.spans import Span


def _steps(pauses, done):
    for number in range(pauses):
        done.append(number)
        yield
    return torch.tensor(float(pauses))


@pytest.mark.parametrize(
    ("pauses", "boundaries", "phases_begun"),
    [
        # After the start and each boundary but the last, which is the join.
        (0, 2, [0, 0]),
        (1, 4, [1, 1, 1, 1]),
        (2, 4, [1, 1, 2, 2]),
        (2, 6, [1, 1, 1, 2, 2, 2]),
        (3, 4, [1, 1, 2, 3]),
        (4, 2, [1, 3]),
        (3, 2, [1, 2]),
    ],
)
def test_pauses_are_spread_over_boundaries(pauses, boundaries, phases_begun):
    done = []
    branch = Branch(_steps(pauses, done), torch.ones(1), pauses=pauses, boundaries=boundaries)
    begun = [len(done)]
    for _ in range(boundaries - 1):
        branch.go_on()
        begun.append(len(done))
    assert begun == phases_begun
    assert branch.join() == pauses == len(done)
    assert branch.join() == pauses  # again, should a layer ask twice
    assert run(_steps(pauses, [])) == pauses


_UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform"}
_BLOCK = {"recompute_granularity": "full", "recompute_method": "block"}


def _two_stages_of(chunks):
    return {
        "pipeline_model_parallel_size": 2,
        "pipeline_dtype": torch.float32,
        "virtual_pipeline_model_parallel_size": chunks,
    }


@pytest.mark.parametrize(
    ("span", "changes", "end"),
    [
        (Span(2, 5), {}, 5),
        (Span(3, 3), {}, 3),
        (Span(2, 5), _two_stages_of(None), 4),  # layers 1-4 and 5-8
        (Span(5, 7), _two_stages_of(None), 7),
        (Span(2, 5), _two_stages_of(2), 2),  # layers 1-2, 3-4, 5-6, 7-8
        (Span(2, 5), {**_UNIFORM, "recompute_num_layers": 1}, 2),
        (Span(2, 5), {**_UNIFORM, "recompute_num_layers": 3}, 3),
        (Span(4, 6), {**_UNIFORM, "recompute_num_layers": 3}, 6),
        (Span(7, 8), {**_UNIFORM, "recompute_num_layers": 3}, 8),
        (Span(5, 8), {**_UNIFORM, "recompute_num_layers": 3, **_two_stages_of(None)}, 7),
        (Span(2, 5), {**_BLOCK, "recompute_num_layers": 2}, 2),
        (Span(3, 5), {**_BLOCK, "recompute_num_layers": 2}, 5),
        (Span(6, 8), {**_BLOCK, "recompute_num_layers": 2, **_two_stages_of(None)}, 6),
        (Span(2, 5), {"recompute_granularity": "selective"}, 5),
    ],
)
def test_where_a_branch_ends(span, changes, end):
    from megatron.core.transformer import TransformerConfig

    from ultramem_megatron.megatron.layer.overlap import branch_end, describe_overlap

    config = TransformerConfig(num_layers=8, hidden_size=8, num_attention_heads=1, **changes)
    assert branch_end(span, config) == end
    shown = describe_overlap((span,), config)
    if span.start == span.end:
        assert "nothing to overlap" in shown
    elif end == span.start:
        assert f"overlaps nothing: it joins after layer {end}, where" in shown
    else:
        assert ("recomputed stretch ends" in shown) == (end < span.end)
