"""FSDP2's wrapper: what its units leave out, a loss per token, whose state is whose."""

from typing import Any

import torch

from tests.ranks import init_gloo, run_on_ranks
from ultramem_megatron.patches import registry


def _wrap(linear: Any) -> Any:
    from megatron.core.distributed import (
        TorchFullyShardedDataParallel,
        TorchFullyShardedDataParallelConfig,
    )
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=2, num_attention_heads=1)
    return TorchFullyShardedDataParallel(config, TorchFullyShardedDataParallelConfig(), linear)


def _wrapped(rank: int, own: bool = False) -> Any:
    """A linear map (2, 4) of inputs (1, 4) that are rank + 1; own: its weight is of fewer ranks."""
    linear: Any = torch.nn.Linear(4, 2)
    linear.weight.allreduce = not own
    model = _wrap(linear)
    model(torch.full((1, 4), rank + 1.0)).sum().backward()
    return model


def _start(without: tuple[str, ...]) -> int:
    from megatron.core import parallel_state

    registry.apply_all([p.name for p in registry.all_patches() if p.name not in without])
    rank, _ = init_gloo()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=1)
    return rank


def _scaled() -> torch.Tensor:
    model = _wrapped(_start(without=("defects.fsdp2_token_loss",)))
    weight = model.module.weight
    before = weight.grad.full_tensor()
    model.scale_gradients(0.25)
    assert torch.equal(weight.grad.full_tensor(), before)
    registry.apply_all()
    model.scale_gradients(torch.tensor(0.25))
    whole: torch.Tensor = weight.grad.full_tensor()
    return whole


def test_gradients_of_a_loss_per_token_are_scaled() -> None:
    for gradient in run_on_ranks(2, _scaled):
        assert torch.equal(gradient, torch.full((2, 4), (1 + 2) * 0.25))


def _is_itself() -> tuple[bool, bool]:
    from megatron.core.dist_checkpointing import optimizer

    weight = _wrapped(_start(without=("defects.fsdp2_checkpoints",))).module.weight
    before = optimizer.to_local_if_dtensor(weight) is weight._local_tensor
    registry.apply_all()
    return before, optimizer.to_local_if_dtensor(weight) is weight._local_tensor


def test_a_shard_is_found_by_its_identity() -> None:
    assert run_on_ranks(2, _is_itself) == [(False, True)] * 2


def _left_out() -> tuple[bool, torch.Tensor, torch.Tensor]:
    rank = _start(without=("doors.fsdp2_units",))
    cut_before = hasattr(_wrapped(rank, own=True).module.weight, "full_tensor")
    registry.apply_all()
    model = _wrapped(rank, own=True)
    model.finish_grad_sync()
    return cut_before, model.module.weight.grad, model.module.bias.grad.full_tensor()


def test_what_is_of_fewer_ranks_stays_whole_and_is_averaged_over_those_that_have_it() -> None:
    for cut_before, weight, bias in run_on_ranks(2, _left_out):
        assert cut_before
        assert torch.equal(weight, torch.full((2, 4), 1.5))
        assert torch.equal(bias, torch.ones(2))


def _cut() -> tuple[int, ...]:
    from ultramem_megatron.patches.doors.fsdp2_units import SHARD_DIM

    _start(without=())
    linear = torch.nn.Linear(4, 1, bias=False)
    setattr(linear.weight, SHARD_DIM, 1)
    return tuple(_wrap(linear).module.weight._local_tensor.shape)


def test_a_parameter_is_cut_along_the_dimension_of_its_tag() -> None:
    assert run_on_ranks(2, _cut) == [(1, 2)] * 2
