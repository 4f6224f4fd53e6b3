"""FSDP2 on a CPU: Megatron's wrapper makes a mesh of "cuda"."""

import pytest
import torch

from tests.ranks import run_on_ranks


def _gradient(rank: int, ranks: int) -> torch.Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Linear(4, 2, bias=False)
    fully_shard(model, mesh=init_device_mesh("cuda", (ranks,)))
    model(torch.full((1, 4), rank + 1.0)).sum().backward()
    whole: torch.Tensor = model.weight.grad.full_tensor()  # type: ignore[union-attr]  # a DTensor
    return whole


def _with_and_without() -> torch.Tensor:
    from tests.ranks import init_gloo
    from ultramem_megatron.patches import registry

    registry.apply_all([p.name for p in registry.all_patches() if p.name != "cpu.device_mesh"])
    rank, ranks = init_gloo()
    with pytest.raises(AssertionError, match="already be moved to device cuda"):
        _gradient(rank, ranks)
    registry.apply_all()
    return _gradient(rank, ranks)


def test_fsdp2_on_a_mesh_of_cuda_averages_gradients_on_the_cpu() -> None:
    for gradient in run_on_ranks(2, _with_and_without):
        assert torch.equal(gradient, torch.full((2, 4), 1.5))
