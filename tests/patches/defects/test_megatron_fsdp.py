"""Megatron-FSDP's wrapper: parts of fewer ranks, of one alone, states of shards without numbers."""

from typing import Any

import pytest
import torch

from tests.ranks import RanksFailed, init_gloo, run_on_ranks
from ultramem_megatron.patches import registry


def _start(experts: int, without: str = "") -> int:
    """Rank of two, with `experts` ranks that have different parts."""
    from megatron.core import parallel_state

    registry.apply_all([p.name for p in registry.all_patches() if p.name != without])
    rank, _ = init_gloo()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=experts)
    return rank


def _wrapped(part: bool) -> Any:
    """A linear map (3, 4) in all shards; part: its weight is not the same on all ranks."""
    from megatron.core.distributed import DistributedDataParallelConfig, FullyShardedDataParallel
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=2, num_attention_heads=1)
    shards = DistributedDataParallelConfig(
        use_megatron_fsdp=True,
        use_distributed_optimizer=True,
        data_parallel_sharding_strategy="optim_grads_params",
        gradient_reduce_div_fusion=False,
    )
    linear: Any = torch.nn.Linear(4, 3)
    linear.weight.allreduce = not part
    return FullyShardedDataParallel(config, shards, linear, fsdp_unit_modules=[torch.nn.Linear])


def _gradient(model: Any, rank: int, micro_batches: int) -> torch.Tensor:
    """Of the weight, of inputs (1, 4) that are rank + 1: this rank's shard."""
    for _ in range(micro_batches):
        model(torch.full((1, 4), rank + 1.0)).sum().backward()
    model.finish_grad_sync()
    shard: torch.Tensor = model.module.module.weight.grad._local_tensor
    return shard


def _parts(without: str) -> torch.Tensor:
    rank = _start(2, without)
    return _gradient(_wrapped(part=True), rank, 1)


def test_a_part_of_one_rank_is_reduced_over_it_alone() -> None:
    with pytest.raises(RanksFailed, match="no expt_dp_group"):  # but takes experts, by their names
        run_on_ranks(2, _parts, "doors.megatron_fsdp_parts")
    for rank, gradient in enumerate(run_on_ranks(2, _parts, "")):
        assert torch.equal(gradient, torch.full((3, 4), (rank + 1) / 2))


def _replicas() -> tuple[torch.Tensor, bool]:
    rank = _start(1)
    model = _wrapped(part=True)
    gradient = _gradient(model, rank, 2)
    return gradient, model.module.module.weight.allreduce


def test_a_part_of_two_ranks_is_averaged_over_them() -> None:
    shards = run_on_ranks(2, _replicas)
    assert torch.equal(torch.cat([shard for shard, _ in shards]), torch.full((3, 4), 2 * 1.5))
    assert not any(tag for _, tag in shards)


def _lone(without: str) -> torch.Tensor:
    rank = _start(2, without)
    return _gradient(_wrapped(part=True), rank, 3)


def test_a_part_of_one_rank_is_divided_once_a_step() -> None:
    defect = run_on_ranks(2, _lone, "defects.megatron_fsdp_lone_parts")
    for rank, gradient in enumerate(run_on_ranks(2, _lone, "")):
        assert torch.equal(gradient, torch.full((3, 4), 3 * (rank + 1) / 2))
        assert not torch.equal(gradient, defect[rank]), "upstream divides once"


def _states(without: str) -> list[str]:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    rank = _start(1, without)
    model = _wrapped(part=False)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1e-3, use_distributed_optimizer=True), [model]
    )
    _gradient(model, rank, 1)
    optimizer.step()
    model.module._replace_param_with_distributed_if_needed()
    metadata = {"distrib_optim_sharding_type": "fsdp_dtensor"}
    return list(optimizer.sharded_state_dict({}, metadata=metadata)["state"])


def test_every_rank_has_a_state_of_what_it_has_nothing_of() -> None:
    first, second = run_on_ranks(2, _states, "defects.megatron_fsdp_empty_shards")
    assert first != second, "upstream completes the states"
    first, second = run_on_ranks(2, _states, "")
    assert first == second
    assert len(first) == 2


def _norm(without: str) -> float:
    """Of a part (3, 4) of twos or threes, by rank, and zeros."""
    rank = _start(2, without)
    model = _wrapped(part=True)
    from megatron.training.utils.common_utils import calc_dtensor_params_l2_norm

    linear = model.module.module
    linear.weight._local_tensor.data.fill_(rank + 2)
    linear.bias._local_tensor.data.zero_()
    norm: float = calc_dtensor_params_l2_norm(list(model.parameters()))
    return norm


def test_the_norm_of_parameters_has_all_parts() -> None:
    each = run_on_ranks(2, _norm, "defects.megatron_fsdp_params_norm")
    assert each == pytest.approx([48**0.5, 108**0.5])
    assert run_on_ranks(2, _norm, "") == pytest.approx([156**0.5] * 2)
